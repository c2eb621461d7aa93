"""What the analysis rests on: finished predictions, and one set of bootstrap and permutation draws for all of them.

scipy's `bootstrap` and `permutation_test` draw anew for each statistic and know no groups. Here hundreds of accuracies
share their draws, so that differences between them, and the largest among them, are drawn too. Everything is a product
of small integers, which float32 holds exactly: equal predictions give equal accuracies, whatever the machine.

Intervals are of 95 %, over test LoRAs (whole groups where there are groups), and over runs where it says so. All
accuracies are shares.

Shape letters: N LoRAs, n test LoRAs, G groups of them, R runs, L classifiers that are compared, C classes, B draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
from scipy import sparse, stats

from loras.lora_files import Layer

BLOCK = 2**24  # numbers worked on at a time
LEVEL, ALPHA = 0.95, 0.05  # of all intervals and tests
RESAMPLES = PERMUTATIONS = 10_000


def stream(*key: object) -> np.random.Generator:
    """A generator seeded by the SHA-256 of its key: streams of different keys are independent, and any seed will do."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


class Draws:
    """Bootstrap resamples of test LoRAs, whole groups at a time, and of runs (Efron & Tibshirani, 1993).

    Args:
        groups: Group of each LoRA, int[n]; each a group of its own where there are none.
        count: B.
        seed: Of the draws.
    """

    def __init__(self, groups: np.ndarray, count: int, seed: int):
        self.group = np.unique(groups, return_inverse=True)[1]
        self.count, self.seed = count, seed

    def accuracies(self, correct: Sequence[np.ndarray], runs: bool = True) -> np.ndarray:
        """Accuracy of each classifier in every draw, float64[L, B].

        Classifiers of as many runs see the same runs drawn: what they have in common does not count as a difference.

        Args:
            correct: Of each classifier, which LoRAs each run recognises, bool[R, n]; R may differ.
            runs: Whether runs are drawn too; else all of them count in every draw.
        """
        found = np.empty((len(correct), self.count))
        sizes = np.array([len(one) for one in correct])
        for start, rows in self._blocks():
            at, total = slice(start, start + len(rows)), rows.sum(1, dtype=float)
            for size in np.unique(sizes).tolist():
                members = np.flatnonzero(sizes == size)
                drawn = self._counts(len(rows), size, "runs", start).T if runs else None
                at_once = max(1, BLOCK // (size * max(rows.shape)))
                for some in np.split(members, range(at_once, len(members), at_once)):
                    each = np.stack([correct[i] for i in some])  # (some, R, n)
                    found[some, at] = self._hits(each, rows, drawn) / (size * total)
        return found

    @staticmethod
    def _hits(correct: np.ndarray, rows: np.ndarray, drawn: np.ndarray | None) -> np.ndarray:
        """How many are right, of LoRAs as often as ``rows`` [b, n] says, of runs as ``drawn`` [R, b]: [L, b]."""
        if drawn is None:
            return correct.sum(1, dtype=np.float32) @ rows.T
        hits = (correct.reshape(-1, rows.shape[1]).astype(np.float32) @ rows.T).reshape(*correct.shape[:2], -1)
        return np.einsum("lrb,rb->lb", hits, drawn, dtype=float)

    def least_p(self, a: np.ndarray, b: np.ndarray) -> float:
        """The least two-sided p that a difference of two classifiers, bool[R, n] each, can have: 2^(1 - d).

        That of an exact test which exchanges the two in each of the d LoRAs (or groups) where they differ. A bootstrap
        of the few rows on which one of them wins knows no defeat, and would call three wins out of three certain.
        """
        apart = np.bincount(self.group, weights=a.mean(0) - b.mean(0))
        return min(1.0, 2.0 ** (1 - int((np.abs(apart) > 1e-9).sum())))

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """How often each LoRA is drawn, float32[b, n], in blocks of draws, and the first draw of each."""
        at_once = max(1, BLOCK // (4 * len(self.group)))
        for start in range(0, self.count, at_once):
            size = min(at_once, self.count - start)
            counts = self._counts(size, int(self.group.max()) + 1, "rows", start)
            yield start, counts.astype(np.float32)[:, self.group]

    def _counts(self, draws: int, items: int, purpose: str, start: int) -> np.ndarray:
        """How often each item is drawn, int[draws, items]."""
        picked = stream(self.seed, purpose, items, start).integers(items, size=(draws, items))
        picked += items * np.arange(draws)[:, None]
        return np.bincount(picked.ravel(), minlength=draws * items).reshape(draws, items)


def interval(drawn: np.ndarray) -> np.ndarray:
    """The central 95 % of the last axis: float[..., B] -> float[..., 2].

    Of a handful of LoRAs or groups it is too narrow, and of an accuracy of 0 or 1 it is a point.
    """
    outside = (1 - LEVEL) / 2
    return np.moveaxis(np.quantile(drawn, (outside, 1 - outside), axis=-1), 0, -1)


def sign_p(drawn: np.ndarray) -> np.ndarray:
    """Two-sided bootstrap p of differences against 0, float[..., B] -> float[...]: twice the share beyond 0."""
    beyond = np.minimum((drawn <= 0).sum(-1), (drawn >= 0).sum(-1))
    return np.minimum(1.0, 2 * (1 + beyond) / (1 + drawn.shape[-1]))


def holm(p: Sequence[float]) -> np.ndarray:
    """Adjusted p of a family of tests (Holm, 1979): the i-th smallest of m times m - i + 1, made monotone.

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def permuted(y: np.ndarray, groups: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Labels in random order, whole groups at a time, int[count, n].

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
    source = starts[donor] + position * sizes[donor] // sizes[own]  # (count, n)
    if (y[rows] != y[rows][starts][own]).any():  # a group with different labels
        within = np.argsort(own + generator.random((count, len(y))), axis=1)
        source = np.take_along_axis(within, source, axis=1)
    found = np.empty((count, len(y)), y.dtype)
    found[:, rows] = y[rows][source]
    return found


def null_accuracies(
    predicted: np.ndarray, y: np.ndarray, groups: np.ndarray, num_classes: int, count: int, seed: int
) -> np.ndarray:
    """Accuracies of finished predictions on permuted test labels: what chance gives, nothing trained again.

    All classifiers see the same permutation, so the largest of a row is the largest that chance gives among them, and
    the choice of the best among many is paid for (Westfall & Young, 1993). Where groups differ in size, permuted labels
    hold more or fewer of a class; what that gives to a classifier by how often it says the class is taken off, so that
    always guessing one class is never above chance.

    Args:
        predicted: Classes, int[L, R, n].
        y: True classes, int[n].
        groups: Group of each LoRA, int[n].
        num_classes: C.
        count: Number of permutations.
        seed: Of the permutations.

    Returns:
        Mean accuracy over runs, float64[count, L].
    """
    layers, runs, n = predicted.shape
    found, present = np.empty((count, layers)), np.bincount(y, minlength=num_classes)
    layers_at_once = max(1, 4 * BLOCK // (n * num_classes))
    for first in range(0, layers, layers_at_once):
        part = slice(first, first + layers_at_once)
        votes = np.zeros((n * num_classes, len(predicted[part])), np.float32)  # runs that say so, by LoRA and class
        for layer, of_layer in enumerate(predicted[part]):
            cells = np.arange(n) * num_classes + of_layer  # (R, n)
            votes[:, layer] = np.bincount(cells.ravel(), minlength=n * num_classes)
        says = votes.reshape(n, num_classes, -1).sum(0, dtype=float)  # (C, layers)
        generator = stream(seed, "permutations", n)  # the same permutations for each part
        draws = max(1, BLOCK // (4 * n))
        for start in range(0, count, draws):
            size = min(draws, count - start)
            labels = permuted(y, groups, size, generator)
            cells = (np.arange(n) * num_classes + labels).ravel()
            ends = np.arange(0, cells.size + 1, n)
            chosen = sparse.csr_array((np.ones(cells.size, np.float32), cells, ends), (size, len(votes)))
            drawn = (np.arange(size)[:, None] * num_classes + labels).ravel()
            drawn = np.bincount(drawn, minlength=size * num_classes).reshape(size, num_classes)
            found[start : start + size, part] = chosen @ votes + (present - drawn) @ says / n
    return found / (runs * n)


def exceedance(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """P of observed float[L] against null float[B, L or 1]: (1 + draws at least as large) / (1 + B), float64[L]."""
    slack = 1e-9  # of two equal fractions of which one was rounded
    return (1 + (null >= observed - slack).sum(0)) / (1 + len(null))


def spearman(a: np.ndarray, b: np.ndarray) -> dict | None:
    """Rank correlation, its p and its interval; None of fewer than 4 or of a constant.

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


@dataclass(frozen=True)
class Evidence:
    """What the analysis rests on.

    Attributes:
        layers: The L layers.
        classes: Names of the C classes.
        y: Class of each LoRA, int[N].
        rows: Indices of the LoRAs of each part of the split.
        groups: Group of each LoRA, int[N]; None without a group column.
        ranking: The layers, most predictive first, int[L].
        top_k: How many of them were removed.
        predictions: As in predictions.npz.
        seed: Of all draws.
    """

    layers: Sequence[Layer]
    classes: Sequence[str]
    y: np.ndarray
    rows: dict[str, np.ndarray]
    groups: np.ndarray | None
    ranking: np.ndarray
    top_k: int
    predictions: dict[str, np.ndarray]
    seed: int

    @cached_property
    def truth(self) -> np.ndarray:
        """Classes of the test LoRAs, int[n]."""
        return self.y[self.rows["test"]]

    @cached_property
    def test_groups(self) -> np.ndarray:
        """Group of each test LoRA, int[n]; its own where there are none."""
        return np.arange(len(self.truth)) if self.groups is None else self.groups[self.rows["test"]]

    @cached_property
    def draws(self) -> Draws:
        """The bootstrap draws that everything shares."""
        return Draws(self.test_groups, RESAMPLES, self.seed)

    @cached_property
    def chance(self) -> float:
        """Share of the largest class among the test LoRAs."""
        return float(np.bincount(self.truth).max() / len(self.truth))

    def predicted(self, name: str) -> np.ndarray:
        """Predicted classes of the test LoRAs, int[..., R, n]."""
        return self.predictions[f"{name}/predicted"][..., len(self.rows["validation"]) :]

    def validated(self, name: str) -> np.ndarray:
        """Which of the validation LoRAs are recognised, bool[..., R, v]."""
        rows = self.rows["validation"]
        return self.predictions[f"{name}/predicted"][..., : len(rows)] == self.y[rows]

    def null(self, predicted: np.ndarray) -> np.ndarray:
        """Accuracies on permuted test labels of predictions int[L, R, n], float64[B, L]."""
        return null_accuracies(predicted, self.truth, self.test_groups, len(self.classes), PERMUTATIONS, self.seed)


def estimate(correct: np.ndarray, drawn: np.ndarray) -> dict:
    """Accuracy of a classifier, correct bool[R, n], and its interval, given the draws float[B]."""
    return {"accuracy": correct.mean(), "interval": interval(drawn)}
