"""Bins of labels that are numbers (``--label-bins``): quantile bins, each a class.

A bin holds the numbers from its first edge up to the next, which is left out; the last bin holds its end too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from itertools import pairwise
from typing import Protocol

import numpy as np

from loras.names import plain
from loras.notices import Finding

LARGEST = 1e300  # of a number: larger ones have no room for edges beside them
END_DIGITS = 6  # of the least and the largest number, of whose label more digits would help nobody
ALL_DIGITS = 17  # that tell any two float64 apart
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


class LabelledFile(Protocol):
    """A file of a collection, with its label."""

    path: str
    label: str


def number_of(text: str) -> float | None:
    """Return the number that a text writes; None where it writes none, or one beyond `LARGEST`.

    Example:
        >>> number_of(" 1e3 "), number_of("nan"), number_of("1_000"), number_of("anime")
        (1000.0, None, None, None)
    """
    match = _NUMBER.fullmatch(text.strip())
    number = float(match[0]) if match else math.inf
    return number if abs(number) <= LARGEST else None


def not_numbers(files: Iterable[LabelledFile]) -> list[Finding]:
    """Return the findings of files whose label is there and is no number."""
    mend = "Mend it, leave out --label-bins, or --skip-bad leaves these LoRAs out."
    return [
        Finding((file.path,), f"its label '{plain(file.label[:40])}' is no number, as --label-bins asks. {mend}")
        for file in files
        if file.label and number_of(file.label) is None
    ]


def bins_of(texts: Sequence[str], count: int) -> list[str]:
    """Return the bin of each number, as ``[a, b)`` or, of the last bin, ``[b, c]``.

    Bins hold about equal numbers of LoRAs, and equal numbers are never divided: each edge is where the share of the
    numbers below it is nearest to that of so many bins, as far as every bin holds a number. Edges are written with the
    fewest digits that divide the numbers alike.

    Args:
        texts: Numbers, as `number_of` reads them.
        count: Number of bins, at least 2.

    Raises:
        ValueError: There are fewer distinct numbers than bins.

    Example:
        >>> bins_of(["1", "2", "3", "3", "10", "20"], 2)
        ['[1, 3)', '[1, 3)', '[3, 20]', '[3, 20]', '[3, 20]', '[3, 20]']
    """
    values, place, sizes = np.unique([number_of(text) for text in texts], return_inverse=True, return_counts=True)
    if len(values) < count:
        raise ValueError(f"{len(values)} distinct number{'' if len(values) == 1 else 's'}")
    firsts = _first_values(np.cumsum(sizes), count)
    edges = [_shortest(values[first - 1], values[first]) for first in firsts[1:]]
    ends = [_rounded(values[0], END_DIGITS, ROUND_FLOOR), _rounded(values[-1], END_DIGITS, ROUND_CEILING)]
    written = [_text(edge) for edge in (ends[0], *edges, ends[1])]
    labels = [f"[{low}, {high})" for low, high in pairwise(written)]
    labels[-1] = f"{labels[-1][:-1]}]"
    bins = np.searchsorted(firsts, place, side="right") - 1
    return [labels[position] for position in bins.tolist()]


def in_order(labels: Iterable[str]) -> list[str]:
    """Return distinct labels sorted: as texts, or where all are bins, by their numbers.

    Example:
        >>> in_order(["[10, 20]", "[2, 10)"]), in_order(["10", "2"])
        (['[2, 10)', '[10, 20]'], ['10', '2'])
    """
    distinct = sorted(set(labels))
    edges = {label: [number_of(edge) for edge in label[1:-1].split(", ")] for label in distinct}
    are_bins = all(label[:1] == "[" and len(edge) == 2 and None not in edge for label, edge in edges.items())
    return sorted(distinct, key=edges.get) if are_bins else distinct


def _first_values(below: np.ndarray, count: int) -> list[int]:
    """Return the position of the first distinct value of each bin, given how many numbers are at most each value."""
    firsts, distinct = [0], len(below)
    for position in range(1, count):
        possible = np.arange(firsts[-1] + 1, distinct - (count - position) + 1)  # each bin holds a value
        away = np.abs(below[possible - 1] - below[-1] * position / count)
        firsts.append(int(possible[away.argmin()]))  # the first of equal ones
    return firsts


def _shortest(below: float, value: float) -> Decimal:
    """Return the number of the fewest digits above ``below`` and at most ``value``, rounded down from that."""
    if below < 0 <= value:
        return Decimal(0)
    rounded = (_rounded(value, digits, ROUND_FLOOR) for digits in range(1, ALL_DIGITS))
    return next((number for number in rounded if number > Decimal(repr(float(below)))), Decimal(repr(float(value))))


def _rounded(value: float, digits: int, how: str) -> Decimal:
    return Context(prec=digits, rounding=how).create_decimal(repr(float(value)))


def _text(number: Decimal) -> str:
    """Return a number as Python writes it, whole ones without a point: ``1500``, ``0.25``, ``1e-07``."""
    return repr(float(number) + 0.0).removesuffix(".0")  # never -0
