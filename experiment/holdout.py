"""Values of a column held out in turn: each is the test set of LoRAs that nothing was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from experiment.phases import Experiment


def hold_out(experiment: Experiment, names: Sequence[str]) -> dict | None:
    """Return ``analysis.holdout`` of results.json; None where it is not asked for."""
    return None
