"""Sections of results.txt and report.html on further questions, one row each; nothing of what was not asked.

Figures of theirs are rows of `report.figures`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from report import dynamics, holdout, probes
from report.tables import Table


class FurtherSection(NamedTuple):
    """A section of the page, by the key of its section in ``analysis``.

    ``lines`` returns the sentences of the results, the first of which the console shows too; ``tables`` their tables
    by name. Both return nothing where there is no section.
    """

    anchor: str
    heading: str
    lines: Callable[[dict], list[str]]
    tables: Callable[[dict], dict[str, Table]]


FURTHER = (
    FurtherSection("holdout", "Values that were held out", holdout.lines, holdout.tables),
    FurtherSection("also", "What else the weights tell", probes.lines, probes.tables),
    FurtherSection("dynamics", "Steps of the training", dynamics.lines, dynamics.tables),
)


def further_lines(results: dict) -> dict[str, list[str]]:
    """Return the sentences by section, of those that are there."""
    made = {section.anchor: section.lines(results) for section in FURTHER if results.get("analysis")}
    return {anchor: lines for anchor, lines in made.items() if lines}


def further_tables(results: dict) -> dict[str, Table]:
    """Return all tables by name."""
    made: dict[str, Table] = {}
    for section in FURTHER if results.get("analysis") else ():
        made |= section.tables(results)
    return made
