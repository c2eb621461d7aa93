"""Other columns that the weights tell: accuracies of linear probes, against chance and against the concept alone.

The p of a probe is by values permuted against its predictions, nothing trained again. It holds for all representations
of a column together (the largest accuracy above its own average in each permutation: Westfall & Young,
"Resampling-based multiple testing", 1993), and times the number of columns for all of them (Bonferroni).

Shape letters as in evidence.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.chance import guessed, null_accuracies
from analysis.draws import ALPHA, ROUNDING, Draws, exceedance
from analysis.evidence import PERMUTATIONS, RESAMPLES

BEYOND, THROUGH, CHANCE = "beyond the concept", "perhaps through the concept", "chance"  # outcomes


@dataclass(frozen=True)
class Probed:
    """A column and the predictions of its probes.

    Attributes:
        name: Of the column.
        values: Its C values.
        y: Value of each LoRA, int64[N]; -1 for none.
        concept: Class of each LoRA, int64[N].
        rows: Indices of the LoRAs with a value, of each part of the split.
        groups: Group of each LoRA, int[N].
        trained_on: Train LoRAs that probes were trained on.
        bins: Number of bins that its numbers were put in; None: they were not.
        predicted: Predicted values of validation LoRAs, then test LoRAs, int[V + T], by representation.
    """

    name: str
    values: Sequence[str]
    y: np.ndarray
    concept: np.ndarray
    rows: dict[str, np.ndarray]
    groups: np.ndarray
    trained_on: int
    bins: int | None
    predicted: dict[str, np.ndarray]

    @property
    def commonest(self) -> int:
        """The commonest value of the train LoRAs, which is always guessed."""
        return int(np.bincount(self.y[self.rows["train"]]).argmax())

    def from_concept(self) -> np.ndarray:
        """Return what the concept alone gives: a mask of the test LoRAs whose value is that of most train LoRAs of it.

        bool[T]. Of a concept without train LoRAs the commonest value of all is guessed.
        """
        train, test = self.rows["train"], self.rows["test"]
        votes = np.zeros((int(self.concept.max()) + 1, len(self.values)))
        np.add.at(votes, (self.concept[train], self.y[train]), 1)
        guess = np.where(votes.any(1), votes.argmax(1), self.commonest)
        return guess[self.concept[test]] == self.y[test]


def tell(
    columns: Sequence[Probed], seed: int, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS
) -> list[dict]:
    """Return the records of all columns, as ``analysis.also.columns`` holds them."""
    return [_told(column, len(columns), seed, resamples, permutations) for column in columns]


def _told(column: Probed, count: int, seed: int, resamples: int, permutations: int) -> dict:
    """Return the record of one of ``count`` columns."""
    names, rows = list(column.predicted), column.rows
    truth, validation, boundary = column.y[rows["test"]], column.y[rows["validation"]], len(rows["validation"])
    predicted = np.stack([column.predicted[name] for name in names])[:, None].astype(np.int64)  # (L, 1, V + T)
    validated = (predicted[..., :boundary] == validation).mean((1, 2))
    predicted = predicted[..., boundary:]
    correct, by_concept = predicted == truth, column.from_concept()[None]
    draws = Draws(column.groups[rows["test"]], resamples, seed)
    drawn = draws.accuracies([*correct, by_concept])
    estimates = [draws.estimate(hits, of_draws) for hits, of_draws in zip((*correct, by_concept), drawn, strict=True)]
    p, p_family, needed = _against_permuted(column, predicted, seed, permutations, ALPHA / count)
    p_family = np.minimum(1, count * p_family)
    told = p_family < ALPHA
    among = np.flatnonzero(told) if told.any() else np.arange(len(names))
    best = int(among[validated[among].argmax()])  # the first of equal ones
    beyond = draws.differences([(correct[best], by_concept)])[0]
    beyond["p_family"] = min(1.0, count * float(beyond["p"]))
    beyond["significant"] = beyond["p_family"] < ALPHA and bool(beyond["difference"] > 0)
    return {
        "column": column.name,
        "values": [
            {"value": value, "loras": int((column.y == position).sum())} for position, value in enumerate(column.values)
        ],
        "bins": column.bins,
        "split_sizes": {part: len(of_part) for part, of_part in rows.items()},
        "trained_on": column.trained_on,
        "units": draws.units,
        "chance": float((truth == column.commonest).mean()),
        "representations": [
            {
                "representation": name,
                **estimates[i],
                "val_accuracy": validated[i],
                "p": p[i],
                "p_family": p_family[i],
                "significant": bool(told[i]),
            }
            for i, name in enumerate(names)
        ],
        "best": names[best],
        "tied_on_validation": [names[i] for i in among if i != best and validated[i] == validated[best]],
        "needed": needed[best],
        "from_concept": estimates[-1],
        "beyond_concept": beyond,
        "outcome": (BEYOND if beyond["significant"] else THROUGH) if told[best] else CHANCE,
    }


def _against_permuted(
    column: Probed, predicted: np.ndarray, seed: int, permutations: int, alpha: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return p of predictions int[L, 1, T] against permuted values, and what they would need, float[L] each.

    The p is of each alone, then of each among all; what is needed is the accuracy that a p among all below ``alpha``
    takes, which may be more than 1.
    """
    truth, groups = column.y[column.rows["test"]], column.groups[column.rows["test"]]
    null = null_accuracies(predicted, truth, groups, len(column.values), permutations, seed)
    accuracy, own = (predicted == truth).mean((1, 2)), guessed(predicted, truth)
    margins = (null - own).max(1)
    as_large = int(np.ceil(alpha * (1 + permutations) - ROUNDING)) - 1  # permutations that give alpha or more
    needed = own + np.sort(margins)[-as_large] if as_large else np.full(len(own), 2.0)
    return exceedance(accuracy, null), exceedance(accuracy - own, margins[:, None]), needed
