"""Chance: accuracies on permuted labels, and the test of a family of classifiers against them and against guessing.

scipy's `permutation_test` draws anew for each statistic and knows no groups. Here all classifiers of a family share
their permutations, so that the largest among them is drawn too.

Shape letters as in evidence.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from analysis.draws import ALPHA, BLOCK, ROUNDING, exceedance, parts_of, stream
from analysis.evidence import Evidence


def permuted(y: np.ndarray, groups: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return labels in random order, whole groups at a time, int[count, N].

    Each group takes the labels of another one, in random order, left out or repeated evenly where that has more or
    fewer. Groups whose labels are all alike thus keep labels that are all alike, whatever their sizes; where each
    group has labels of all kinds, what is left is their order within groups. How often each class occurs changes
    where groups differ in size.
    """
    group = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(group)
    if len(sizes) == len(y):
        return generator.permuted(np.tile(y, (count, 1)), axis=1)
    rows = np.argsort(group, kind="stable")
    own, starts = group[rows], np.cumsum(sizes) - sizes
    position = np.arange(len(y)) - starts[own]
    donor = generator.permuted(np.tile(np.arange(len(sizes)), (count, 1)), axis=1)[:, own]
    source = starts[donor] + position * sizes[donor] // sizes[own]  # (count, N)
    if (y[rows] != y[rows][starts][own]).any():  # a group with different labels
        within = np.argsort(own + generator.random((count, len(y))), axis=1)
        source = np.take_along_axis(within, source, axis=1)
    labels = np.empty((count, len(y)), y.dtype)
    labels[:, rows] = y[rows][source]
    return labels


def null_accuracies(
    predicted: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    num_classes: int,
    count: int,
    seed: int,
    block: int = BLOCK,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return accuracies of finished predictions on permuted test labels: what chance gives, nothing trained again.

    All classifiers see the same permutation, so the largest of a row is the largest that chance gives among them, and
    the choice of the best among many is paid for (Westfall & Young, 1993). Where groups differ in size, permuted labels
    hold more or fewer of a class; what that gives to a classifier by how often it predicts the class is subtracted, so
    that always guessing one class is never above chance.

    Args:
        predicted: Classes, int[L, R, T].
        y: True classes, int[T].
        groups: Group of each LoRA, int[T].
        num_classes: C.
        count: Number of permutations.
        seed: Of the permutations.
        block: Numbers worked on at a time.
        weights: What a recognised LoRA of each class counts, float[L, C]; None: 1.

    Returns:
        Mean accuracy over runs, float64[count, L]; with weights the mean of what recognised LoRAs count.
    """
    layers, runs, size = predicted.shape
    hits, present = np.empty((count, layers)), np.bincount(y, minlength=num_classes)
    layers_at_once = max(1, (4 if weights is None else 2) * block // (size * num_classes))
    draws_at_once = max(1, block // (4 * size))
    for first in range(0, layers, layers_at_once):
        part = slice(first, first + layers_at_once)
        votes = _votes(predicted[part], num_classes, None if weights is None else weights[part])
        votes_for_class = votes.reshape(size, num_classes, -1).sum(0, dtype=float)  # (C, layers)
        generator = stream(seed, "permutations", size)  # the same permutations for each part
        for start in range(0, count, draws_at_once):
            draws = min(draws_at_once, count - start)
            labels = permuted(y, groups, draws, generator)
            cells = (np.arange(size) * num_classes + labels).ravel()  # of each LoRA, its drawn class's row of votes
            ends = np.arange(0, cells.size + 1, size)
            chosen = sparse.csr_array((np.ones(cells.size, np.float32), cells, ends), (draws, len(votes)))
            surplus = (present - _counts(labels, num_classes)) @ votes_for_class
            surplus /= size
            surplus += chosen @ votes
            hits[start : start + draws, part] = surplus
    return np.divide(hits, runs * size, out=hits)


def _counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count each class in each row of labels: int[B, T] -> int[B, C]."""
    cells = (np.arange(len(labels))[:, None] * num_classes + labels).ravel()
    return np.bincount(cells, minlength=len(labels) * num_classes).reshape(-1, num_classes)


def _votes(predicted: np.ndarray, num_classes: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Count the runs that predict each class of each LoRA, times weights [L, C]: int[L, R, T] -> float[T * C, L].

    Counts are float32, which holds them exactly; weighted ones are float64, so that rounding is far below `ROUNDING`.
    """
    layers, _, size = predicted.shape
    votes = np.zeros((size * num_classes, layers), np.float32 if weights is None else np.float64)
    for layer, of_layer in enumerate(predicted):
        cells = np.arange(size) * num_classes + of_layer  # (R, T)
        votes[:, layer] = np.bincount(cells.ravel(), minlength=len(votes))
    if weights is not None:
        votes *= np.tile(weights.T, (size, 1))
    return votes


def guessed(predicted: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the accuracy that predictions have on permuted labels on average, int[L, R, T] -> float64[L].

    The sum over classes of the class's share of the LoRAs times its share of the predictions; see `null_accuracies`.
    """
    classes = int(max(y.max(), predicted.max())) + 1 if weights is None else weights.shape[1]
    says = np.stack([(predicted == label).mean((1, 2)) for label in range(classes)], axis=1)  # (L, C)
    share = np.bincount(y, minlength=classes) / len(y)
    return (says * share if weights is None else says * share * weights).sum(1)


def _margins(null: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return the largest accuracy above its own average in each permutation: float[B, L], float[L] -> float[B]."""
    return np.concatenate([(null[part] - own).max(1) for part in parts_of(*null.shape)])


def f1_weights(predicted: np.ndarray, y: np.ndarray, num_classes: int) -> np.ndarray:
    """Return what a recognised LoRA of each class adds to T times the macro-F1, float64[L, C].

    That of the predictions of all runs int[L, R, T] together: ``F1_c = 2 hits_c / (R n_c + said_c)``, so the macro-F1
    is a weighted sum of hits, whose weights no permutation of labels changes.
    """
    said = np.stack([(predicted == label).sum((1, 2)) for label in range(num_classes)], axis=1)
    runs, size = predicted.shape[1:]
    return 2 * runs * size / (num_classes * np.maximum(said + runs * np.bincount(y, minlength=num_classes), 1))


def null_of(evidence: Evidence, predicted: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return `null_accuracies` of the evidence's test LoRAs, float64[B, L]."""
    size, count, seed = len(evidence.classes), evidence.permutations, evidence.seed
    return null_accuracies(predicted, evidence.truth, evidence.test_groups, size, count, seed, weights=weights)


@dataclass(frozen=True)
class ChanceTest:
    """Accuracies of a family of L classifiers against permuted test labels, and against always guessing one class.

    Each is compared with what it would be on permuted labels on average, which for a classifier that often says the
    largest class is more than for others; and by how much it is above that with the largest such number of the
    family (Westfall & Young, 1993).

    Attributes:
        accuracy: Mean over runs, float[L].
        guessed: On permuted labels, on average, float[L].
        null: On permuted labels, float[B, L].
        margins: Largest accuracy above ``guessed`` in each permutation, float[B].
        p: Of each alone, float[L].
        p_family: Of each among all, float[L].
        p_f1: Likewise of macro-F1, float[L]; None where classes are about equally frequent.
        above_null: Mask of those whose ``p_family`` is below 0.05, bool[L]: they know something of the concept.
        above_chance: Mask of those among them that are right more often than always guessing the largest class, by a
            simultaneous interval of the paired difference, bool[L].
    """

    accuracy: np.ndarray
    guessed: np.ndarray
    null: np.ndarray
    margins: np.ndarray
    p: np.ndarray
    p_family: np.ndarray
    p_f1: np.ndarray | None
    above_null: np.ndarray
    above_chance: np.ndarray

    @classmethod
    def of(cls, evidence: Evidence, predicted: Sequence[np.ndarray]) -> ChanceTest:
        """Test predicted classes of the test LoRAs, int[R, T] each; R may differ."""
        counts = np.bincount(evidence.truth, minlength=len(evidence.classes))
        alike = np.ptp(counts) <= 1  # guessing is then right as often as permuted labels are, but for one LoRA
        if not alike:  # before the null is there, which takes as much memory as the draws
            records = evidence.draws.differences([(runs == evidence.truth, evidence.guess) for runs in predicted])
            above_chance = np.array([record["interval"][0] > 0 for record in records])
        p_f1 = None
        if evidence.unequal:
            f1, own_f1, null = cls._against_null(evidence, predicted, by_f1=True)
            p_f1 = exceedance(f1 - own_f1, _margins(null, own_f1)[:, None])
            del null
        accuracy, own, null = cls._against_null(evidence, predicted, by_f1=False)
        margins = _margins(null, own)
        p_family = exceedance(accuracy - own, margins[:, None])
        above_null = p_family < ALPHA
        if alike:
            above_chance = exceedance(accuracy - evidence.chance, margins[:, None]) < ALPHA
        p = exceedance(accuracy, null)
        return cls(accuracy, own, null, margins, p, p_family, p_f1, above_null, above_null & above_chance)

    @staticmethod
    def _against_null(evidence: Evidence, predicted: Sequence[np.ndarray], by_f1: bool) -> tuple[np.ndarray, ...]:
        """Return the score of each and that on permuted labels on average, float[L], and in each, float[B, L]."""
        score, own = np.empty(len(predicted)), np.empty(len(predicted))
        null = None
        run_counts = np.array([len(runs) for runs in predicted])
        for runs in np.unique(run_counts).tolist():
            members = np.flatnonzero(run_counts == runs)
            stacked = np.stack([predicted[i] for i in members])
            weights = f1_weights(stacked, evidence.truth, len(evidence.classes)) if by_f1 else None
            hits = (stacked == evidence.truth).mean(1)  # (members, T)
            score[members] = (hits if weights is None else hits * weights[:, evidence.truth]).mean(1)
            own[members] = guessed(stacked, evidence.truth, weights)
            of_members = null_of(evidence, stacked, weights)
            if len(members) == len(predicted):
                null = of_members
                break
            null = np.empty((evidence.permutations, len(predicted))) if null is None else null
            null[:, members] = of_members
        return score, own, null

    @property
    def margin(self) -> float:
        """The accuracy above ``guessed`` that must be exceeded for a ``p_family`` below 0.05."""
        as_large = int(np.ceil(ALPHA * (1 + len(self.margins)) - ROUNDING)) - 1  # permutations that give 0.05 or more
        return float(np.sort(self.margins)[-max(1, as_large)])
