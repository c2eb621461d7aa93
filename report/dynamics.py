"""Steps of the training: sentences, table and figure."""

from __future__ import annotations

from report.tables import Table


def lines(results: dict) -> list[str]:
    """Return the sentences; none where the section is not there."""
    return []


def tables(results: dict) -> dict[str, Table]:
    """Return the tables by name; none where the section is not there."""
    return {}
