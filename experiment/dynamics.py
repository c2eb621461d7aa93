"""Steps of each LoRA's training: from which on the concept can be predicted, and from which modules first."""

from __future__ import annotations

from collections.abc import Sequence

from experiment.phases import Experiment


def follow_steps(experiment: Experiment, names: Sequence[str]) -> dict | None:
    """Return ``analysis.dynamics`` of results.json; None where it is not asked for."""
    return None
