"""Classes in place of very many: those at both ends by name, and the mean of the others.

Shape letters: C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_CLASSES = 40  # that have a row each
NAMED_CLASSES = 12  # of more, those of each end that have one


@dataclass(frozen=True)
class Rows:
    """The rows of a map of classes: classes at one end, the mean of the others, classes at the other end.

    ``others`` is empty, and so is ``last``, where each class has a row.
    """

    first: tuple[int, ...]
    others: tuple[int, ...] = ()
    last: tuple[int, ...] = ()

    @classmethod
    def of(cls, scores: Sequence[float], order: Sequence[int] | None = None, most: int = MOST_CLASSES) -> Rows:
        """Choose the rows of classes by their scores, the highest first.

        Args:
            scores: The score of each class, float[C]; NaN for classes that have nothing to show, which have no row.
            order: Order of classes where each has a row; else that of the scores.
            most: Classes that have a row each, at most.

        Example:
            >>> Rows.of([0.5, float("nan"), 0.7])
            Rows(first=(2, 0), others=(), last=())
        """
        scores = np.asarray(scores, float)
        by_score = [c for c in np.argsort(-scores, kind="stable").tolist() if not np.isnan(scores[c])]
        if len(by_score) <= most:
            shown = by_score if order is None else [c for c in order if not np.isnan(scores[c])]
            return cls(tuple(map(int, shown)))
        ends = by_score[:NAMED_CLASSES], by_score[-NAMED_CLASSES:]
        return cls(tuple(ends[0]), tuple(by_score[NAMED_CLASSES:-NAMED_CLASSES]), tuple(ends[1]))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.first) + bool(self.others) + len(self.last)

    @property
    def named(self) -> list[int]:
        """The classes that have a row of their own, in the order of these."""
        return [*self.first, *self.last]

    def values(self, of_classes: np.ndarray) -> np.ndarray:
        """Return the values of the rows, of those of the classes: float[C, ...] -> float[rows, ...]."""
        middle = [of_classes[list(self.others)].mean(0, keepdims=True)] if self.others else []
        return np.concatenate([of_classes[list(self.first)], *middle, of_classes[list(self.last)]])

    def labels(self, named: Sequence[str]) -> list[str]:
        """Return the labels of the rows, given those of ``named``."""
        middle = [f"mean of {len(self.others)} others"] if self.others else []
        return [*named[: len(self.first)], *middle, *named[len(self.first) :]]

    @property
    def edges(self) -> list[float]:
        """Places of the lines between the three parts."""
        if not self.others:
            return []
        return [len(self.first) - 0.5, len(self.first) + 0.5]
