"""Predictions of finished classifiers, and all that is needed to test them.

Intervals are of 95 %, over test LoRAs (whole groups where there are groups), and over runs where it says so. All
accuracies are shares.

Shape letters, in this folder: N LoRAs, V validation LoRAs, T test LoRAs, G groups of them, L layers in the network's
order (or other classifiers that are compared), P modules, M described LoRAs, R runs, C classes, F features, K
conditions, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from typing import Protocol

import numpy as np
from scipy import stats

from analysis.draws import ALPHA, Draws, stream

Arrays = dict[str, np.ndarray]

RESAMPLES = PERMUTATIONS = 10_000
LEAST_CORRELATED = 5  # numbers, below which no correlation is given


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

    @property
    def block(self) -> str:
        """The name of its block, such as ``IN04``; empty where it is in none, as what follows."""

    @property
    def attention(self) -> str:
        """The attention that its module is of, such as ``attn2``."""

    @property
    def projection(self) -> str:
        """The function of its module in the block, such as ``q``."""


@dataclass
class Predictions:
    """Predicted classes of the held-out rows of finished classifiers: validation rows, then test rows.

    A kernel's classifier has ``predicted`` only: neither losses nor epochs.

    Attributes:
        rows: Indices of the held-out LoRAs, int64[V + T].
        y: Their classes, int64[V + T].
        layers: Each layer alone: ``predicted`` int[L, R, V + T], ``log_loss``, ``epochs``.
        conditions: By condition ("baseline", "ablation" or "grouped") and representation: ``predicted`` int[R, V + T],
            ``log_loss``, ``epochs``. Under "cross_fitted" ``predicted`` int[S, R, V + T] only, of S removed sets.
        controls: By representation: ``names`` and ``kept`` of the conditions, ``predicted`` int[K, R, V + T].
    """

    rows: np.ndarray
    y: np.ndarray
    layers: Arrays = field(default_factory=dict)
    conditions: dict[str, dict[str, Arrays]] = field(default_factory=dict)
    controls: dict[str, Arrays] = field(default_factory=dict)
    further: Arrays = field(default_factory=dict)

    def arrays(self) -> Arrays:
        """Return all arrays under their names in predictions.npz, such as ``baseline/stats/predicted``."""
        named = {"layers": self.layers}
        for condition, representations in self.conditions.items():
            named |= {f"{condition}/{name}": arrays for name, arrays in representations.items()}
        named |= {f"controls/{name}": arrays for name, arrays in self.controls.items()}
        flat = {f"{prefix}/{kind}": array for prefix, arrays in named.items() for kind, array in arrays.items()}
        return {"rows": self.rows, "y": self.y, **flat, **self.further}


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
        return share_of_largest(self.truth)

    def layer_predictions(self) -> np.ndarray:
        """Return the predicted classes of the test LoRAs by each layer alone, int[L, R, T]."""
        return self._test_rows(self.predictions.layers)

    def layer_validation_loss(self) -> np.ndarray:
        """Return the mean log-loss of each layer alone on the validation LoRAs, float[L]."""
        return self.predictions.layers["log_loss"][..., : len(self.rows["validation"])].mean((1, 2))

    def predicted(self, condition: str, name: str) -> np.ndarray:
        """Return the predicted classes of the test LoRAs by a representation under a condition, int[R, T]."""
        return self._test_rows(self.predictions.conditions[condition][name])

    def layer_validation(self) -> np.ndarray:
        """Return a mask of the validation LoRAs that each layer alone recognises, bool[L, R, V]."""
        return self._validation_hits(self.predictions.layers)

    def validation_predictions(self, condition: str, name: str) -> np.ndarray:
        """Return the predicted classes of the validation LoRAs by a representation under a condition, int[R, V]."""
        return self.predictions.conditions[condition][name]["predicted"][..., : len(self.rows["validation"])]

    def validated(self, condition: str, name: str) -> np.ndarray:
        """Return a mask of the validation LoRAs that a representation recognises under a condition, bool[R, V]."""
        return self._validation_hits(self.predictions.conditions[condition][name])

    @cached_property
    def unequal(self) -> bool:
        """The answer to whether the largest class has more than twice the test LoRAs of the smallest."""
        counts = np.bincount(self.truth, minlength=len(self.classes))
        return bool(counts.max() > 2 * counts.min())

    @cached_property
    def guess(self) -> np.ndarray:
        """A mask of the test LoRAs that always guessing their largest class recognises, bool[1, T]."""
        return (self.truth == np.bincount(self.truth).argmax())[None]

    def _test_rows(self, arrays: Arrays) -> np.ndarray:
        """Return the predictions of the test LoRAs, which stand after those of the validation LoRAs."""
        return arrays["predicted"][..., len(self.rows["validation"]) :]

    def _validation_hits(self, arrays: Arrays) -> np.ndarray:
        """Return a mask of the validation LoRAs that are recognised."""
        rows = self.rows["validation"]
        return arrays["predicted"][..., : len(rows)] == self.y[rows]


def share_of_largest(y: np.ndarray) -> float:
    """Return the share of the largest class of y, which always guessing it is right on."""
    return float(np.bincount(y).max() / len(y))


def choose_rows(y: np.ndarray, at_most: int, seed: int, purpose: str = "rows described") -> np.ndarray:
    """Return rows of y, all or ``at_most`` drawn as evenly from its classes as possible, int64[M], ascending.

    Each purpose has draws of its own.
    """
    if len(y) <= at_most:
        return np.arange(len(y))
    drawn = stream(seed, purpose).permutation(len(y))
    by_class, sizes = drawn[np.argsort(y[drawn], kind="stable")], np.bincount(y)
    place = np.arange(len(y)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # among those of its class
    return np.sort(by_class[np.argsort(place, kind="stable")[: max(1, at_most)]])


def none_for_nan(values: np.ndarray) -> np.ndarray:
    """Replace NaN, which stands for a number that is not known, by None."""
    return np.where(np.isnan(values), None, values)


def spearman(a: np.ndarray, b: np.ndarray) -> dict | None:
    """Return the rank correlation, its interval and its p; None of fewer than five or of a constant.

    The interval is by Fisher's transformation with the deviation ``sqrt((1 + r² / 2) / (n - 3))`` (Bonett & Wright,
    2000). P is that of all orders up to n = 8, else scipy's.
    """
    if len(a) < LEAST_CORRELATED or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = stats.rankdata(a), stats.rankdata(b)
    r, p = stats.spearmanr(a, b)
    if len(a) <= 8:
        orders = np.array(list(permutations(b - b.mean())))
        all_r = orders @ (a - a.mean()) / (len(a) * a.std() * b.std())
        p = (np.abs(all_r) >= abs(r) - 1e-9).mean()
    within = min(abs(r), 1 - 1e-12) * np.sign(r)  # the transformation of 1 is infinite
    half = stats.norm.isf(ALPHA / 2) * np.sqrt((1 + within**2 / 2) / (len(a) - 3))
    return {"r": r, "interval": np.tanh(np.arctanh(within) + np.array([-half, half])), "p": p}
