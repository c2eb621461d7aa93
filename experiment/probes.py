"""Probes: other columns, predicted from features that are there already by linear classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from experiment.phases import Experiment


def probe_columns(experiment: Experiment, names: Sequence[str]) -> dict | None:
    """Return ``analysis.also`` of results.json; None where it is not asked for."""
    return None
