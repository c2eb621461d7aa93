"""The experiment on further splits of the same collection (``--splits``).

Each split ranks the layers, removes its own top ones, and evaluates the representations with and without. Features do
not depend on the split; what is fitted to train rows is fitted again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from analysis.across_splits import SplitOutcome, across_splits
from analysis.questions import plain
from data import CollectionError
from experiment import store
from experiment.controls import evidence_of
from experiment.phases import Experiment, emptied, split_collection
from experiment.plans import TrainingError
from training.stacks import seed_of


def repeat(experiment: Experiment, names: Sequence[str], say: Callable[[str], None]) -> dict | None:
    """Return `splits` of results.json, whatever is trained for it trained; None where one split is asked for.

    A split that cannot be done, or has the same rows as an earlier one, is left out; so is a representation that a
    split cannot do. Both are reported with the reason.

    Args:
        experiment: All phases done, on the first split.
        names: Representations that were run with and without the top layers.
        say: Prints a line.
    """
    settings = experiment.settings
    if settings.splits == 1:
        return None
    say("\nThe same on other splits into train, validation and test LoRAs")
    outcomes, seen = [_outcome_of(experiment, names)], {_rows_of(experiment): 1}
    not_run: dict[str, str] = {}
    splits_not_run: dict[str, str] = {}
    for number in range(2, settings.splits + 1):
        experiment.inputs.release()  # memory, for those of the next split
        try:
            seed = seed_of(settings.seed, "split", number - 1)
            again = experiment.again(
                experiment.collection, split_collection(experiment.collection, seed), settings.num_runs
            )
            if (same := seen.setdefault(_rows_of(again), number)) < number:
                splits_not_run[str(number)] = f"the same LoRAs in each part as split {same}"
            else:
                outcomes.append(_outcome(again, [name for name in names if name not in not_run], number, not_run))
                say(_line(outcomes, number, settings.splits, settings.top_k, again))
        except (CollectionError, TrainingError) as error:
            splits_not_run[str(number)] = str(error)
        if reason := splits_not_run.get(str(number)):
            say(f"split {number} of {settings.splits}: left out: {reason}")
    for name, reason in not_run.items():
        say(f"{name}: not compared over splits: {reason}")
    layers = [layer.name for layer in experiment.layers]
    return plain(across_splits(outcomes, layers, settings.top_k, not_run, splits_not_run))


def _rows_of(experiment: Experiment) -> str:
    """Return a digest of the rows of each part."""
    return store.array_digest(*experiment.rows.values())


def _outcome(experiment: Experiment, names: list[str], number: int, not_run: dict[str, str]) -> SplitOutcome:
    """Do the phases on a split; add why a representation cannot be done there to ``not_run``.

    Raises:
        TrainingError: The layers cannot be ranked.
    """
    experiment.rank()
    top = sorted(experiment.ranking[: experiment.settings.top_k].tolist())
    faults = dict.fromkeys(emptied(experiment, names, top), "no pair is whole without its top layers")
    faults |= experiment.fit([name for name in names if name not in faults], [top, []])
    for condition, removed in (("ablation", top), ("baseline", [])):
        asked = [name for name in names if name not in faults]
        faults |= {
            name: entry for name, entry in experiment.evaluate(asked, removed, condition) if isinstance(entry, str)
        }
    not_run |= {name: f"split {number}: {reason}" for name, reason in faults.items()}
    return _outcome_of(experiment, [name for name in names if name not in faults])


def _outcome_of(experiment: Experiment, names: Sequence[str]) -> SplitOutcome:
    """Return what the comparison needs of a split whose phases are done."""
    chosen_by = {"test": "test", "val": "validation"}[experiment.settings.rank_by]
    return SplitOutcome.of(evidence_of(experiment), names, chosen_by)


def _line(outcomes: Sequence[SplitOutcome], number: int, count: int, top_k: int, experiment: Experiment) -> str:
    """Return the line of the console on the latest split."""
    first, latest = outcomes[0], outcomes[-1]
    layer = latest.ranking[0]
    name, accuracy = experiment.layers[layer].name, 100 * latest.accuracies[layer]
    shared = len(set(first.ranking[:top_k].tolist()) & set(latest.ranking[:top_k].tolist()))
    line = (
        f"split {number} of {count}: first {name}, {accuracy:.1f} %; {shared} of its top {top_k} are those of split 1"
    )
    if latest.baseline:
        low, high = (100 * bound for bound in (min(latest.baseline.values()), max(latest.baseline.values())))
        line += f"; with all layers {low:.1f} to {high:.1f} %"
    return line
