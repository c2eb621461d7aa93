"""Other columns that the weights tell: accuracies of linear probes, against chance and against the concept alone.

The p of a probe is by values permuted against its predictions, nothing trained again. It holds for all representations
of a column together (the largest accuracy above its own average in each permutation: Westfall & Young,
"Resampling-based multiple testing", 1993), and times the number of columns for all of them (Bonferroni). The least p
is that of none among the permutations: of many columns there are more of these, so that it can be below 5 %.

Whether more is known than the concept is tested likewise, by values permuted within each concept: what a probe knows
through the concept alone stays. (The commonest value of a concept's train LoRAs is no measure of that: of values of
equal numbers it is the one that is rarest among its test LoRAs.)

Shape letters as in evidence.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.chance import guessed, null_accuracies
from analysis.draws import ALPHA, ROUNDING, Draws, exceedance, stream
from analysis.evidence import PERMUTATIONS, RESAMPLES

PERMUTATIONS_EACH, MOST_PERMUTATIONS = 40, 200_000  # at least so many for each of many columns, up to a limit
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
        failed: Why there are none of another representation that is probed for other columns, by representation.
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
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def commonest(self) -> int:
        """The commonest value of the train LoRAs, which is always guessed."""
        return int(np.bincount(self.y[self.rows["train"]]).argmax())

    @property
    def groups_within_concepts(self) -> bool:
        """The answer to whether the test LoRAs of each group are of one concept: values can be permuted within it."""
        test = self.rows["test"]
        pairs = np.stack([self.groups[test], self.concept[test]])
        return np.unique(pairs, axis=1).shape[1] == len(np.unique(pairs[0]))

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
    columns: Sequence[Probed],
    seed: int,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """Return the records of all columns, as ``analysis.also.columns`` holds them.

    Args:
        columns: What was predicted of each.
        seed: Of all draws.
        resamples: Bootstrap draws.
        permutations: At least; of more than 250 columns there are 40 for each, up to 200,000.
        progress: Is told how many columns are done, of how many.
    """
    count, records = len(columns), []
    permutations = max(permutations, min(PERMUTATIONS_EACH * count, MOST_PERMUTATIONS))
    for column in columns:
        records.append(_told(column, count, seed, resamples, permutations))
        progress(len(records), count)
    return records


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
    own, null = _permuted(np.zeros(len(truth), int), predicted, column, seed, permutations)
    p, p_family, needed = _against(correct.mean((1, 2)), own, null, ALPHA / count)
    p_family = np.minimum(1, count * p_family)
    told = p_family < ALPHA
    among = np.flatnonzero(told) if told.any() else np.arange(len(names))
    best = int(among[validated[among].argmax()])  # the first of equal ones
    beyond = _beyond(column, predicted, best, count, seed, permutations) if column.groups_within_concepts else None
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
        "permutations": permutations,
        "too_few_permutations": not count / (1 + permutations) < ALPHA,
        "from_concept": estimates[-1],
        "beyond_concept": beyond,
        "failed": [{"representation": name, "reason": reason} for name, reason in column.failed.items()],
        "outcome": (BEYOND if beyond and beyond["significant"] else THROUGH) if told[best] else CHANCE,
    }


def _beyond(column: Probed, predicted: np.ndarray, best: int, count: int, seed: int, permutations: int) -> dict:
    """Return whether the best of predictions int[L, 1, T] know more than the concept, of one of ``count`` columns."""
    test = column.rows["test"]
    accuracy = (predicted == column.y[test]).mean((1, 2))
    own, null = _permuted(column.concept[test], predicted, column, seed, permutations)
    p = float(_against(accuracy, own, null, ALPHA)[1][best])
    return {
        "permuted": own[best],
        "difference": accuracy[best] - own[best],
        "p": p,
        "p_family": min(1.0, count * p),
        "significant": count * p < ALPHA,
    }


def _permuted(
    strata: np.ndarray, predicted: np.ndarray, column: Probed, seed: int, permutations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracies of predictions int[L, 1, T] where values are permuted within each stratum, int[T].

    On average, float[L], and in each permutation, float[B, L]. Each stratum has draws of its own.
    """
    truth, groups = column.y[column.rows["test"]], column.groups[column.rows["test"]]
    own, null = np.zeros(len(predicted)), np.zeros((permutations, len(predicted)))
    for stratum in np.unique(strata).tolist():
        among = strata == stratum
        part, values, of_stratum = predicted[..., among], truth[among], stream(seed, "strata", stratum)
        own += among.mean() * guessed(part, values)
        drawn = groups[among], len(column.values), permutations, int(of_stratum.integers(2**31))
        null += among.mean() * null_accuracies(part, values, *drawn)
    return own, null


def _against(
    accuracy: np.ndarray, own: np.ndarray, null: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return p of accuracies against those of `_permuted`, and what they would need, float[L] each.

    The p is of each alone, then of each among all; what is needed is the accuracy that a p among all below ``alpha``
    takes, which may be more than 1.
    """
    margins = (null - own).max(1)
    as_large = int(np.ceil(alpha * (1 + len(null)) - ROUNDING)) - 1  # permutations that give alpha or more
    needed = own + np.sort(margins)[-as_large] if as_large else np.full(len(own), 2.0)
    return exceedance(accuracy, null), exceedance(accuracy - own, margins[:, None]), needed
