"""Probabilities of classes for LoRAs of unknown class, and what is unlike anything in training.

Everything is fitted on rows that the classifiers have not been trained on: the temperature on validation rows, the
measure of what is unlike on these too where they are enough, else on all that are held out.

Shape letters: R runs, n LoRAs, C classes, P modules, K measures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

LOG_TEMPERATURES = -12.0, 12.0  # between which the temperature is looked for
GRID = 49  # temperatures tried first
WRONG = 0.1  # of a validation row, which counts as wrong whatever the others are
WIDE, LEAST_SHARE = 0.9, 1e-3  # the quantile that the spread reaches to; the least of it, of the median
UNUSUAL = 20  # one in so many LoRAs like those held out is flagged, at most
LEAST_ROWS, MOST_ROWS = UNUSUAL - 1, 2_000  # that a bound is measured on
LEAST_SPREAD = 0.01  # of logarithms of norms: 1 % of a norm
LEAST_NORM = 1e-6  # of the usual norm; what is smaller counts as this
TRAIN_ROWS, TRAIN_NUMBERS = 2_000, 2**26  # that distances are taken to, at most


def mean_probabilities(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Return the mean over runs of ``softmax(scores / temperature)``, float[R, n, C] -> float64[n, C]."""
    return softmax(np.asarray(scores, np.float64) / temperature, axis=2).mean(0)


def log_loss(scores: np.ndarray, y: np.ndarray, temperature: float, smoothing: float = 0.0) -> float:
    """Return the mean of ``-log p`` of the true class, in nats, p as of `mean_probabilities`.

    Args:
        scores: Of each run, float[R, n, C].
        y: Classes, int[n].
        temperature: Divides the scores.
        smoothing: Share of the truth that is not the true class but the likeliest other one.
    """
    logs = np.asarray(scores, np.float64) / temperature
    logs = logsumexp(logs - logsumexp(logs, axis=2, keepdims=True), axis=0) - np.log(len(logs))  # (n, C)
    place = np.arange(len(y))
    true = logs[place, y]
    logs[place, y] = -np.inf
    return float(-((1 - smoothing) * true + smoothing * logs.max(1)).mean())


def fit_temperature(scores: np.ndarray, y: np.ndarray) -> float:
    """Return the temperature above 0 of the smallest log-loss (Guo et al., "On calibration", 2017), within e^±12.

    Of n rows and 2 more, a tenth of one counts as wrong: n rows that are all right do not show that none is ever wrong
    (Platt, "Probabilistic outputs for support vector machines", 1999), and the temperature would be 0.

    Shapes: scores float[R, n, C] and classes int[n] of validation rows.
    """

    def loss(log: float) -> float:
        return log_loss(scores, y, float(np.exp(log)), WRONG / (len(y) + 2))

    grid = np.linspace(*LOG_TEMPERATURES, GRID)  # of a mean of softmaxes the loss may have several minima
    losses = [loss(log) for log in grid]
    best = int(np.argmin(losses))
    found = minimize_scalar(loss, bounds=(grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]), method="bounded")
    return float(np.exp(found.x if found.fun <= losses[best] else grid[best]))


@dataclass(frozen=True)
class Norms:
    """The usual size of the update of each module: mean and standard deviation of its logarithm, float64[P] each."""

    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, norms: np.ndarray) -> Norms:
        """Return those of train rows' norms float[n, P]; updates that are zero tell nothing of the others."""
        norms = np.asarray(norms, np.float64)
        updated = norms > 0
        count = np.maximum(updated.sum(0), 1)
        logs = np.log(np.where(updated, norms, 1))
        mean = logs.sum(0) / count
        spread = np.sqrt((np.where(updated, logs - mean, 0) ** 2).sum(0) / count)
        # Of a module that some train LoRAs leave alone, no update is as usual as they make it.
        return cls(mean, np.where(updated.all(0), np.maximum(spread, LEAST_SPREAD), np.inf))

    def surprise(self, norms: np.ndarray) -> np.ndarray:
        """Return the largest of ``|log norm - mean| / spread`` over the modules, float[n, P] -> float64[n]."""
        least = np.exp(self.mean) * LEAST_NORM
        logs = np.log(np.maximum(np.asarray(norms, np.float64), least))
        return (np.abs(logs - self.mean) / self.spread).max(1, initial=0.0)


@dataclass(frozen=True)
class Usual:
    """Measures of how far held-out LoRAs are from train LoRAs, K of them: medians, spreads, and a bound on the score.

    The spread lies between the median and the 90 % quantile: some measures differ little between LoRAs, others much,
    and over their medians alone what is far from all train LoRAs would not be told from what is a little large.

    Attributes:
        medians: Of each measure.
        spreads: Of each measure, above 0.
        bound: A LoRA of a larger score is unlike those known; None where the rows are too few to tell.
        measured_on: "validation", or "held-out" for validation and test rows together.
        rows: The number of these rows that all this was measured on.
    """

    medians: tuple[float, ...]
    spreads: tuple[float, ...]
    bound: float | None
    measured_on: str
    rows: int

    @classmethod
    def of(cls, measures: np.ndarray, measured_on: str = "validation") -> Usual:
        """Return that of the measures of held-out rows, float[n, K].

        Of LoRAs that are drawn as these rows are, at most one in 20 is above the bound, on average over such rows: it
        is the ceil(0.95 (n + 1))-th smallest score of the n (Vovk et al., "Algorithmic learning in a random world",
        2005), which 18 rows do not have. Each row is scored by medians and spreads of the others, as a new LoRA is.
        """
        measures = np.asarray(measures, np.float64)
        n = len(measures)
        rank = -(-(UNUSUAL - 1) * (n + 1) // UNUSUAL)
        usual = cls(*_scale(measures), None, measured_on, n)
        if rank > n:
            return usual
        others = (cls(*_scale(np.delete(measures, i, axis=0)), None, measured_on, n - 1) for i in range(n))
        scores = [usual_of_others.scores(measures[[i]])[0] for i, usual_of_others in enumerate(others)]
        return replace(usual, bound=float(np.sort(scores)[rank - 1]))

    def scores(self, measures: np.ndarray) -> np.ndarray:
        """Return how unlike LoRAs are: the largest of the measures float[n, K] less their medians, in spreads, [n]."""
        return ((np.asarray(measures, np.float64) - self.medians) / self.spreads).max(1)

    def is_unlike(self, scores: np.ndarray) -> np.ndarray:
        """Return which scores float[n] are above the bound, bool[n]; without a bound none is."""
        if self.bound is None:
            return np.zeros(len(scores), bool)
        return scores > self.bound + 1e-4 * (1 + abs(self.bound))  # rounding of the same LoRA's score is no difference


def _scale(measures: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return medians and spreads of measures float64[n, K], n at least 1."""
    median, high = np.quantile(measures, [0.5, WIDE], axis=0)
    spread = np.maximum(high - median, LEAST_SHARE * np.abs(median))
    return tuple(median.tolist()), tuple(np.where(spread > 0, spread, 1).tolist())


def rows_of_bound(validation: int, test: int) -> tuple[np.ndarray, str]:
    """Return the positions among held-out rows that `Usual` is measured on, and which rows these are.

    They are the validation rows, which come first, where these are enough for a bound: so the share of test rows that
    are flagged is measured on others. Else they are all. Of more than 2,000 every so many is taken.
    """
    count, name = (validation, "validation") if validation >= LEAST_ROWS else (validation + test, "held-out")
    return np.linspace(0, count - 1, min(count, MOST_ROWS)).astype(int), name


def evenly(y: np.ndarray, most: int) -> np.ndarray:
    """Return positions of at most so many rows, as evenly over the classes int[n] as there are: sorted int64.

    Example:
        >>> evenly(np.array([0, 0, 0, 0, 1, 1]), 4).tolist()
        [0, 1, 4, 5]
    """
    place = np.empty(len(y), int)  # of a row among those of its class
    for c in np.unique(y):
        place[y == c] = np.arange((y == c).sum())
    return np.sort(np.argsort(place, kind="stable")[:most])


def most_train_rows(numbers: int) -> int:
    """Return how many train rows of so many numbers each are kept, for distances to them."""
    return max(1, min(TRAIN_ROWS, TRAIN_NUMBERS // max(1, numbers)))
