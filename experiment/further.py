"""Further questions, asked of a finished experiment: each a row of ``FURTHER``, and a section of ``analysis``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from analysis.questions import plain
from experiment.dynamics import follow_steps
from experiment.holdout import hold_out
from experiment.phases import Experiment
from experiment.probes import probe_columns

# Of the experiment, all phases done, and the representations that were run: the section, None where it is not asked
# for. Predictions are kept in ``experiment.predictions.further``.
Answer = Callable[[Experiment, Sequence[str]], dict | None]
FURTHER: dict[str, tuple[str, Answer]] = {  # by section: its name in messages
    "holdout": ("values held out", hold_out),
    "also": ("other columns", probe_columns),
    "dynamics": ("steps of the training", follow_steps),
}


def answer_further(
    experiment: Experiment, names: Sequence[str], attempt: Callable[[str, Callable], object]
) -> dict[str, dict | None]:
    """Return the sections of all further questions; None for those that are not asked, or fail, which is noted."""
    return {
        section: plain(attempt(title, lambda answer=answer: answer(experiment, names)))
        for section, (title, answer) in FURTHER.items()
    }
