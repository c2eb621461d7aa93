"""Predictions of finished classifiers, and one set of bootstrap and permutation draws for all of them.

scipy's `bootstrap` and `permutation_test` draw anew for each statistic and know no groups. Here hundreds of accuracies
share their draws, so that differences between them, and the largest among them, are drawn too. Everything is a product
of small integers, which float32 holds exactly: equal predictions give equal accuracies, whatever the machine.

Intervals are of 95 %, over test LoRAs (whole groups where there are groups), and over runs where it says so. All
accuracies are shares.

Shape letters, in this folder: N LoRAs, V validation LoRAs, T test LoRAs, G groups of them, L layers in the network's
order (or other classifiers that are compared), P modules, M described LoRAs, R runs, C classes, F features, K
conditions, B draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from typing import Protocol

import numpy as np
from scipy import sparse, stats

Arrays = dict[str, np.ndarray]

BLOCK = 2**24  # numbers worked on at a time
LEVEL, ALPHA = 0.95, 0.05  # of all intervals and tests
RESAMPLES = PERMUTATIONS = 10_000


def stream(*key: object) -> np.random.Generator:
    """Return a generator seeded by the SHA-256 of its key: other keys give independent streams, any seed is valid."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


# ----------------------------------------------------------------------------------------------------------------------
# Bootstrap
# ----------------------------------------------------------------------------------------------------------------------


class Draws:
    """Bootstrap resamples of test LoRAs, whole groups at a time, and of runs (Efron & Tibshirani, 1993).

    Args:
        groups: Group of each LoRA, int[T]; each a group of its own where there are none.
        count: B.
        seed: Of the draws.
        block: Numbers worked on at a time. How many draws share a random stream depends on it.
    """

    def __init__(self, groups: np.ndarray, count: int, seed: int, block: int = BLOCK):
        self.group = np.unique(groups, return_inverse=True)[1]
        self.count, self.seed, self.block = count, seed, block

    def accuracies(self, correct: Sequence[np.ndarray], resample_runs: bool = True) -> np.ndarray:
        """Return the accuracy of each classifier in every draw, float64[L, B].

        Classifiers of equal numbers of runs share the draws of runs: what they have in common does not count as a
        difference.

        Args:
            correct: Of each classifier, the LoRAs that each run recognises, bool[R, T]; R may differ.
            resample_runs: Whether runs are drawn too; else all of them count in every draw.
        """
        accuracies = np.empty((len(correct), self.count))
        run_counts = np.array([len(runs) for runs in correct])
        for start, rows in self._blocks():
            columns, total = slice(start, start + len(rows)), rows.sum(1, dtype=float)
            for runs in np.unique(run_counts).tolist():
                members = np.flatnonzero(run_counts == runs)
                drawn_runs = self._counts(len(rows), runs, "runs", start).T if resample_runs else None
                batch_size = max(1, self.block // (runs * max(rows.shape)))
                for batch in np.split(members, range(batch_size, len(members), batch_size)):
                    stacked = np.stack([correct[i] for i in batch])  # (batch, R, T)
                    accuracies[batch, columns] = self._hits(stacked, rows, drawn_runs) / (runs * total)
        return accuracies

    @staticmethod
    def _hits(correct: np.ndarray, rows: np.ndarray, drawn_runs: np.ndarray | None) -> np.ndarray:
        """Count correct answers, [L, b], LoRAs as often as ``rows`` [b, T] has them, runs as ``drawn_runs`` [R, b]."""
        if drawn_runs is None:
            return correct.sum(1, dtype=np.float32) @ rows.T
        hits = (correct.reshape(-1, rows.shape[1]).astype(np.float32) @ rows.T).reshape(*correct.shape[:2], -1)
        return np.einsum("lrb,rb->lb", hits, drawn_runs, dtype=float)

    def least_p(self, a: np.ndarray, b: np.ndarray) -> float:
        """Return the least two-sided p that a difference of two classifiers, bool[R, T] each, can have: 2^(1 - d).

        That of an exact test which exchanges the two in each of the d LoRAs (or groups) where they differ. A bootstrap
        of the few rows on which one of them wins knows no defeat, and would call three wins out of three certain.
        """
        differences = np.bincount(self.group, weights=a.mean(0) - b.mean(0))
        return min(1.0, 2.0 ** (1 - int((np.abs(differences) > 1e-9).sum())))

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of the first draw of a block, and how often each draw has each LoRA, float32[b, T]."""
        block_size = max(1, self.block // (4 * len(self.group)))
        for start in range(0, self.count, block_size):
            size = min(block_size, self.count - start)
            counts = self._counts(size, int(self.group.max()) + 1, "rows", start)
            yield start, counts.astype(np.float32)[:, self.group]

    def _counts(self, draws: int, items: int, purpose: str, start: int) -> np.ndarray:
        """Draw as many items as there are, with replacement, and count each, int[draws, items]."""
        picked = stream(self.seed, purpose, items, start).integers(items, size=(draws, items))
        picked += items * np.arange(draws)[:, None]
        return np.bincount(picked.ravel(), minlength=draws * items).reshape(draws, items)


def interval(drawn: np.ndarray) -> np.ndarray:
    """Return the central 95 % of the last axis: float[..., B] -> float[..., 2].

    Of a handful of LoRAs or groups it is too narrow, and of an accuracy of 0 or 1 it is a point.
    """
    outside = (1 - LEVEL) / 2
    return np.moveaxis(np.quantile(drawn, (outside, 1 - outside), axis=-1), 0, -1)


def estimate(correct: np.ndarray, drawn: np.ndarray) -> dict:
    """Return the accuracy of a classifier, correct bool[R, T], and its interval, given the draws float[B]."""
    return {"accuracy": correct.mean(), "interval": interval(drawn)}


def sign_p(drawn: np.ndarray) -> np.ndarray:
    """Return two-sided bootstrap p of differences against 0, float[..., B] -> float[...]: twice the share beyond 0."""
    beyond = np.minimum((drawn <= 0).sum(-1), (drawn >= 0).sum(-1))
    return np.minimum(1.0, 2 * (1 + beyond) / (1 + drawn.shape[-1]))


def holm(p: Sequence[float]) -> np.ndarray:
    """Return adjusted p of a family of tests (Holm, 1979): the i-th smallest of m times m - i + 1, made monotone.

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


# ----------------------------------------------------------------------------------------------------------------------
# Permutation
# ----------------------------------------------------------------------------------------------------------------------


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

    Returns:
        Mean accuracy over runs, float64[count, L].
    """
    layers, runs, size = predicted.shape
    hits, present = np.empty((count, layers)), np.bincount(y, minlength=num_classes)
    layers_at_once = max(1, 4 * block // (size * num_classes))
    draws_at_once = max(1, block // (4 * size))
    for first in range(0, layers, layers_at_once):
        part = slice(first, first + layers_at_once)
        votes = _votes(predicted[part], num_classes)
        votes_for_class = votes.reshape(size, num_classes, -1).sum(0, dtype=float)  # (C, layers)
        generator = stream(seed, "permutations", size)  # the same permutations for each part
        for start in range(0, count, draws_at_once):
            draws = min(draws_at_once, count - start)
            labels = permuted(y, groups, draws, generator)
            cells = (np.arange(size) * num_classes + labels).ravel()  # of each LoRA, its drawn class's row of votes
            ends = np.arange(0, cells.size + 1, size)
            chosen = sparse.csr_array((np.ones(cells.size, np.float32), cells, ends), (draws, len(votes)))
            drawn = (np.arange(draws)[:, None] * num_classes + labels).ravel()
            drawn = np.bincount(drawn, minlength=draws * num_classes).reshape(draws, num_classes)
            hits[start : start + draws, part] = chosen @ votes + (present - drawn) @ votes_for_class / size
    return hits / (runs * size)


def _votes(predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the runs that predict each class of each LoRA: int[L, R, T] -> float32[T * C, L]."""
    layers, _, size = predicted.shape
    votes = np.zeros((size * num_classes, layers), np.float32)
    for layer, of_layer in enumerate(predicted):
        cells = np.arange(size) * num_classes + of_layer  # (R, T)
        votes[:, layer] = np.bincount(cells.ravel(), minlength=len(votes))
    return votes


def exceedance(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return p of observed float[L] against null float[B, L or 1], float64[L]: (1 + draws as large) / (1 + B)."""
    slack = 1e-9  # of two equal fractions of which one was rounded
    return (1 + (null >= observed - slack).sum(0)) / (1 + len(null))


def spearman(a: np.ndarray, b: np.ndarray) -> dict | None:
    """Return the rank correlation, its interval and its p; None of fewer than 4 or of a constant.

    The interval is by Fisher's transformation with the deviation ``sqrt((1 + r² / 2) / (n - 3))`` (Bonett & Wright,
    2000). P is that of all orders up to n = 7 (four in perfect order are one chance in twelve), else scipy's.
    """
    if len(a) < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = stats.rankdata(a), stats.rankdata(b)
    r, p = stats.spearmanr(a, b)
    if len(a) <= 7:
        orders = np.array(list(permutations(b - b.mean())))
        all_r = orders @ (a - a.mean()) / (len(a) * a.std() * b.std())
        p = (np.abs(all_r) >= abs(r) - 1e-9).mean()
    within = min(abs(r), 1 - 1e-12) * np.sign(r)  # the transformation of 1 is infinite
    half = stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt((1 + within**2 / 2) / (len(a) - 3))
    return {"r": r, "interval": np.tanh(np.arctanh(within) + np.array([-half, half])), "p": p}


# ----------------------------------------------------------------------------------------------------------------------
# What the analysis reads
# ----------------------------------------------------------------------------------------------------------------------


class Layer(Protocol):
    """A layer as the analysis sees it."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def module(self) -> str:
        """The canonical id of its module."""

    @property
    def role(self) -> str:
        """Its factor of the update: ``down`` or ``up``."""


@dataclass
class Predictions:
    """Predicted classes of the held-out rows of finished classifiers: validation rows, then test rows.

    A kernel's classifier has ``predicted`` only: neither losses nor epochs.

    Attributes:
        rows: Indices of the held-out LoRAs, int64[V + T].
        y: Their classes, int64[V + T].
        layers: Each layer alone: ``predicted`` int[L, R, V + T], ``log_loss``, ``epochs``.
        conditions: By condition ("baseline", "ablation" or "grouped") and representation: ``predicted`` int[R, V + T],
            ``log_loss``, ``epochs``.
        controls: By representation: ``names`` and ``kept`` of the conditions, ``predicted`` int[K, R, V + T].
    """

    rows: np.ndarray
    y: np.ndarray
    layers: Arrays = field(default_factory=dict)
    conditions: dict[str, dict[str, Arrays]] = field(default_factory=dict)
    controls: dict[str, Arrays] = field(default_factory=dict)

    def arrays(self) -> Arrays:
        """Return all arrays under their names in predictions.npz, such as ``baseline/stats/predicted``."""
        named = {"layers": self.layers}
        for condition, representations in self.conditions.items():
            named |= {f"{condition}/{name}": arrays for name, arrays in representations.items()}
        named |= {f"controls/{name}": arrays for name, arrays in self.controls.items()}
        flat = {f"{prefix}/{kind}": array for prefix, arrays in named.items() for kind, array in arrays.items()}
        return {"rows": self.rows, "y": self.y, **flat}


@dataclass(frozen=True)
class Evidence:
    """The finished predictions of an experiment, and all that is needed to test them.

    Attributes:
        layers: The L layers.
        classes: Names of the C classes.
        y: Class of each LoRA, int[N].
        rows: Indices of the LoRAs of each part of the split.
        groups: Group of each LoRA, int[N]; None without a group column.
        ranking: The layers, most predictive first, int[L].
        top_k: Number of layers that were removed.
        predictions: Those of all finished classifiers.
        seed: Of all draws.
        resamples: Number of bootstrap draws.
        permutations: Number of permutations of the test labels.
    """

    layers: Sequence[Layer]
    classes: Sequence[str]
    y: np.ndarray
    rows: dict[str, np.ndarray]
    groups: np.ndarray | None
    ranking: np.ndarray
    top_k: int
    predictions: Predictions
    seed: int
    resamples: int = RESAMPLES
    permutations: int = PERMUTATIONS

    @cached_property
    def truth(self) -> np.ndarray:
        """Classes of the test LoRAs, int[T]."""
        return self.y[self.rows["test"]]

    @cached_property
    def test_groups(self) -> np.ndarray:
        """Group of each test LoRA, int[T]; each a group of its own where there are none."""
        return np.arange(len(self.truth)) if self.groups is None else self.groups[self.rows["test"]]

    @cached_property
    def draws(self) -> Draws:
        """The bootstrap draws that everything shares."""
        return Draws(self.test_groups, self.resamples, self.seed)

    @cached_property
    def chance(self) -> float:
        """Share of the largest class among the test LoRAs."""
        return float(np.bincount(self.truth).max() / len(self.truth))

    def layer_predictions(self) -> np.ndarray:
        """Return the predicted classes of the test LoRAs by each layer alone, int[L, R, T]."""
        return self._test_rows(self.predictions.layers)

    def predicted(self, condition: str, name: str) -> np.ndarray:
        """Return the predicted classes of the test LoRAs by a representation under a condition, int[R, T]."""
        return self._test_rows(self.predictions.conditions[condition][name])

    def layer_validation(self) -> np.ndarray:
        """Return a mask of the validation LoRAs that each layer alone recognises, bool[L, R, V]."""
        return self._validation_hits(self.predictions.layers)

    def validated(self, condition: str, name: str) -> np.ndarray:
        """Return a mask of the validation LoRAs that a representation recognises under a condition, bool[R, V]."""
        return self._validation_hits(self.predictions.conditions[condition][name])

    def null(self, predicted: np.ndarray) -> np.ndarray:
        """Return accuracies on permuted test labels of predictions int[L, R, T], float64[B, L]."""
        return null_accuracies(predicted, self.truth, self.test_groups, len(self.classes), self.permutations, self.seed)

    def _test_rows(self, arrays: Arrays) -> np.ndarray:
        """Return the predictions of the test LoRAs, which stand after those of the validation LoRAs."""
        return arrays["predicted"][..., len(self.rows["validation"]) :]

    def _validation_hits(self, arrays: Arrays) -> np.ndarray:
        """Return a mask of the validation LoRAs that are recognised."""
        rows = self.rows["validation"]
        return arrays["predicted"][..., : len(rows)] == self.y[rows]
