"""What the analysis rests on: finished predictions, and one set of bootstrap and permutation draws for all of them.

scipy's `bootstrap` and `permutation_test` draw anew for each statistic and know no groups. Here hundreds of accuracies
share their draws, so that differences between them, and the largest among them, are drawn too. Everything is a product
of small integers, which float32 holds exactly: equal predictions give equal accuracies, whatever the machine.

Intervals are of 95 %, over test LoRAs (whole groups where there are groups), and over runs where it says so. All
accuracies are shares.

Shape letters: N LoRAs, n test LoRAs, G groups of them, R runs, L classifiers that are compared, C classes, B draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse, stats

from lora_files import Layer

BLOCK = 2**24  # numbers worked on at a time
LEVEL, ALPHA = 0.95, 0.05  # of all intervals and tests
RESAMPLES = PERMUTATIONS = 10_000


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
            at, total = slice(start, start + len(rows)), rows.sum(1)
            for size in np.unique(sizes):
                members = np.flatnonzero(sizes == size)
                each = np.stack([correct[i] for i in members]).astype(np.float32)  # (members, R, n)
                hits = (each.reshape(-1, rows.shape[1]) @ rows.T).reshape(len(members), size, -1).astype(float)
                drawn = self._counts(len(rows), size, "runs", start).T if runs else np.ones((size, len(rows)))
                found[members, at] = (hits * drawn).sum(1) / (size * total)
        return found

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """How often each LoRA is drawn, float32[b, n], in blocks of draws, and the first draw of each."""
        at_once = max(1, BLOCK // len(self.group))
        for start in range(0, self.count, at_once):
            size = min(at_once, self.count - start)
            yield start, self._counts(size, int(self.group.max()) + 1, "rows", start)[:, self.group].astype(np.float32)

    def _counts(self, draws: int, items: int, purpose: str, start: int) -> np.ndarray:
        """How often each item is drawn, int[draws, items]."""
        generator = np.random.default_rng([self.seed, start, items, *purpose.encode()])
        picked = generator.integers(items, size=(draws, items)) + items * np.arange(draws)[:, None]
        return np.bincount(picked.ravel(), minlength=draws * items).reshape(draws, items)


def interval(drawn: np.ndarray) -> np.ndarray:
    """The central 95 % of the last axis: float[..., B] -> float[..., 2]."""
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
    """Labels in random order, whole groups moved together, int[count, n].

    The groups' labels are laid end to end in a random order of groups, and dealt to the rows in the first one. Where
    groups differ in size a group may so be cut in two; how often each class occurs never changes.
    """
    group = np.unique(groups, return_inverse=True)[1]
    if len(y) == group.max() + 1:
        return generator.permuted(np.tile(y, (count, 1)), axis=1)
    rows = np.argsort(group, kind="stable")
    keys = generator.random((count, group.max() + 1))[:, group[rows]]
    found = np.empty((count, len(y)), y.dtype)
    found[:, rows] = y[rows][np.argsort(keys, axis=1, kind="stable")]
    return found


def null_accuracies(
    predicted: np.ndarray, y: np.ndarray, groups: np.ndarray, num_classes: int, count: int, seed: int
) -> np.ndarray:
    """Accuracies of finished predictions on permuted test labels: what chance gives, nothing trained again.

    All classifiers see the same permutation, so the largest of a row is the largest that chance gives among them, and
    the choice of the best among many is paid for (Westfall & Young, 1993).

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
    found = np.empty((count, layers))
    layers_at_once = max(1, 4 * BLOCK // (n * num_classes))
    for first in range(0, layers, layers_at_once):
        part = slice(first, first + layers_at_once)
        votes = np.zeros((n * num_classes, len(predicted[part])), np.float32)  # runs that say so, by LoRA and class
        cells = np.arange(n) * num_classes + predicted[part]  # (layers, R, n)
        for layer, of_layer in enumerate(cells):
            votes[:, layer] = np.bincount(of_layer.ravel(), minlength=n * num_classes)
        generator = np.random.default_rng([seed, n])  # the same permutations for each part
        draws = max(1, BLOCK // (4 * n))
        for start in range(0, count, draws):
            size = min(draws, count - start)
            picked = np.arange(n) * num_classes + permuted(y, groups, size, generator)
            ends = np.arange(0, picked.size + 1, n)
            chosen = sparse.csr_array((np.ones(picked.size, np.float32), picked.ravel(), ends), (size, len(votes)))
            found[start : start + size, part] = chosen @ votes
    return found / (runs * n)


def exceedance(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """P of observed float[L] against null float[B, L or 1]: (1 + draws at least as large) / (1 + B), float64[L]."""
    slack = 1e-9  # of two equal fractions of which one was rounded
    return (1 + (null >= observed - slack).sum(0)) / (1 + len(null))


def spearman(a: np.ndarray, b: np.ndarray) -> dict | None:
    """Rank correlation, its p and its interval by Fisher's transformation; None of fewer than 4 or of a constant."""
    if len(a) < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    found = stats.spearmanr(a, b)
    low, high = stats.pearsonr(stats.rankdata(a), stats.rankdata(b)).confidence_interval(LEVEL)
    return {"r": found.statistic, "interval": [low, high], "p": found.pvalue}


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

    def null(self, predicted: np.ndarray) -> np.ndarray:
        """Accuracies on permuted test labels of predictions int[L, R, n], float64[B, L]."""
        return null_accuracies(predicted, self.truth, self.test_groups, len(self.classes), PERMUTATIONS, self.seed)


def estimate(correct: np.ndarray, drawn: np.ndarray) -> dict:
    """Accuracy of a classifier, correct bool[R, n], and its interval, given the draws float[B]."""
    return {"accuracy": correct.mean(), "interval": interval(drawn)}
