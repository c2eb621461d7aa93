"""The plan before the work: about how long each phase takes on this machine, and in how much memory and on which disk.

Only what is asked for is named. How many models the controls train follows from `experiment.controls`; how many sets of
layers the folds choose is known afterwards, so that all of them count as distinct.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.cross_fitting import FOLDS
from analysis.removal_plan import MOST, curve_points
from experiment.estimates import (
    NOTHING,
    SHARE,
    START_SECONDS,
    Estimate,
    Estimates,
    Speed,
    in_words,
    sized,
)
from experiment.settings import memory_of, nearest_of
from loras.building import duration
from representations import FEATURES, RANKING, REPRESENTATIONS

SMALL_SECONDS = 60  # a plan that takes less is said in one line
ANALYSIS_SECONDS = 8  # of intervals, permutations and figures, of a hundred LoRAs or a thousand
MOST_NAMED = 5  # representations in a line of the plan
LEAST_SHARE = 0.05  # of a phase, from which on a representation is named
UNIT_BYTES = 2_500  # of a finished unit, beside what it holds of each held-out LoRA
NAMED_CONDITIONS = 5  # of controls: all, without the top k, most and bottom k, and the top k alone


@dataclass(frozen=True)
class Step:
    """A step of the run.

    Attributes:
        label: Its name.
        costs: What it costs, by representation, or by "" where it is of none.
        constant: Seconds that no worker shares.
    """

    label: str
    costs: dict[str, Estimate]
    constant: float = 0.0

    def seconds(self, speed: Speed, workers: int) -> dict[str, float]:
        """Return the seconds of each part."""
        return {name: cost.seconds(speed, workers) for name, cost in self.costs.items()}

    def line(self, seconds: dict[str, float]) -> str:
        """Return the step in a line, its largest parts first and the small ones together."""
        total = sum(seconds.values()) + self.constant
        parts = sorted((name for name in seconds if name), key=lambda name: -seconds[name])
        named = [name for name in parts[:MOST_NAMED] if seconds[name] >= LEAST_SHARE * total]
        shown = [f"{name} {_short(seconds[name])}" for name in named]
        if (others := len(parts) - len(named)) and named:
            shown.append(f"{others} more {_short(sum(seconds[name] for name in parts[len(named) :]))}")
        return f"{'':<10}{self.label:<16} {duration(total)}{': ' if shown else ''}{', '.join(shown)}"


def steps_of(estimates: Estimates, names: Sequence[str]) -> list[Step]:
    """Return the steps that are asked for, in the order in which they are done."""
    settings = estimates.settings
    fitting = {name: cost for name in names if (cost := estimates.fitting(name)) != NOTHING}
    training = {name: estimates.training(name) for name in names}
    phases = [
        Step("ranking", {"": estimates.ranking()}),
        Step("fitting", fitting),
        Step("phases 2 and 3", training),
    ]
    steps = [Step("reading weights", {"": estimates.reading()}), *phases]
    controls = control_costs(estimates, names)
    steps.append(Step("controls" if controls else "analysis", controls, ANALYSIS_SECONDS))
    if more := settings.splits - 1:
        costs = [cost.times(more) for step in phases for cost in step.costs.values()]
        steps.append(Step(f"{more} more split{'s' * (more > 1)}", {"": _sum(costs)}))
    return [step for step in steps if step.costs or step.constant]


def total_seconds(estimates: Estimates, names: Sequence[str], speed: Speed, workers: int, streams: int = 1) -> float:
    """Return about how many seconds the run takes, see `lines` for the arguments."""
    steps = steps_of(estimates, names)
    total = sum(sum(step.seconds(speed, workers // streams).values()) + step.constant for step in steps)
    return total + (START_SECONDS if workers > 1 or estimates.device.type != "cpu" else 0)


def _sum(costs: Sequence[Estimate]) -> Estimate:
    total = NOTHING
    for cost in costs:
        total = total.then(cost)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Controls
# ----------------------------------------------------------------------------------------------------------------------


def control_costs(estimates: Estimates, names: Sequence[str]) -> dict[str, Estimate]:
    """Return about what is trained to compare with, by representation, but for a split that keeps groups together.

    That trains the best one once more, which is known afterwards.
    """
    from experiment.controls import EXTENTS  # takes half a second, with what it analyses by

    settings, costs = estimates.settings, {}
    if settings.null_shuffles:
        costs["shuffled labels"] = estimates.ranking().times(settings.null_shuffles / settings.num_runs)
    if settings.controls == "none":
        return costs
    extent = EXTENTS[settings.controls]
    runs = min(extent.runs or settings.num_runs, settings.num_runs)
    for name in dict.fromkeys([RANKING, *names]):
        cost = NOTHING
        if name in extent.names or (REPRESENTATIONS[name].made == "kernel" and _has_controls(estimates, name)):
            cost = cost.then(_removals(estimates, name, runs))
        if settings.rank_by == "test":
            cost = cost.then(_cross_fitted(estimates, name, runs, name in names))
        if name == "update_attention" and settings.controls == "all":
            cost = cost.then(_models(estimates, name, _permuted()))
        if cost != NOTHING:
            costs[name] = cost
    return costs


def _permuted() -> int:
    from experiment.readings import PERMUTED

    return PERMUTED


def _has_controls(estimates: Estimates, name: str) -> bool:
    return estimates.settings.controls == "all" or estimates.keeps_kernels


def _models(estimates: Estimates, name: str, count: float) -> Estimate:
    """Return the cost of so many classifiers of a representation, or of support vector machines."""
    if REPRESENTATIONS[name].made == "kernel":
        return estimates.machine(name).times(count)
    return estimates.training(name).times(count / (2 * estimates.settings.num_runs))


def _removals(estimates: Estimates, name: str, runs: int) -> Estimate:
    """Return the cost of a representation's controls of the removal, see `controls.plan_of`."""
    from experiment.controls import DRAWS, EXTENTS, ORDERS

    extent, of_layers = EXTENTS[estimates.settings.controls], REPRESENTATIONS[name].unit == "layer"
    is_kernel = REPRESENTATIONS[name].made == "kernel"
    kind = "kept kernels" if is_kernel and estimates.keeps_kernels else "else"
    units = len(estimates.widths) if of_layers else estimates.pairs
    points = max(0, len(curve_points(units, extent.points)) - 2) if units else 0
    doubled = max(1, units // MOST).bit_length()
    conditions = NAMED_CONDITIONS + DRAWS[kind] + (2 + ORDERS[kind]) * points + doubled
    conditions += units if name in extent.conditional else 0
    if is_kernel:
        return _models(estimates, name, conditions + units)
    cost = _models(estimates, name, conditions * runs)
    return cost if of_layers else cost.then(estimates.each_unit(name, units * runs))


def _cross_fitted(estimates: Estimates, name: str, runs: int, is_asked: bool) -> Estimate:
    """Return the cost of training without the layers that each fold of the test LoRAs chooses, see `cross_fitted`."""
    row, sets = REPRESENTATIONS[name], FOLDS if is_asked else 0
    alone = FOLDS + 1 if name == RANKING else 0
    cost = _models(estimates, name, (sets + alone) * (1 if row.made == "kernel" else runs))
    return cost.then(estimates.fitting(name).times(sets / 2)) if row.made == "pca" else cost


# ----------------------------------------------------------------------------------------------------------------------
# Disk
# ----------------------------------------------------------------------------------------------------------------------


def disk_bytes(estimates: Estimates, names: Sequence[str], steps: Sequence[Step], packed: int, workers: int) -> int:
    """Return about how many bytes the cache folder will take, of which what workers share is removed at the end.

    Args:
        estimates: Of the experiment.
        names: The representations.
        steps: Of the run.
        packed: Bytes of packed weights that are still to be written.
        workers: Worker processes that share inputs.
    """
    count, held_out = estimates.count, estimates.count - estimates.train
    units = {"layer": len(estimates.widths), "pair": estimates.pairs}
    widths = [len(row.feature_names) * units[row.unit] for name, row in FEATURES.items() if name in {RANKING, *names}]
    shared = sum(4 * count * estimates.columns(name) for name in names) if workers > 1 else 0
    finished = sum(cost.units for step in steps for cost in step.costs.values()) * (UNIT_BYTES + 12 * held_out)
    return packed + 4 * count * sum(widths) + shared + finished


# ----------------------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------------------


def _short(seconds: float) -> str:
    return duration(seconds).removeprefix("about ")


def _relative(folder: Path) -> Path:
    """Return a folder as it is called from here, if it lies below."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def memory_words(
    estimates: Estimates, steps: Sequence[Step], workers: int, streams: int, memory: int
) -> tuple[str, str]:
    """Return the memory that workers take at once, and what to do where there is less; that is empty where not."""
    on_cpu = estimates.device.type == "cpu"
    at_once = workers if on_cpu else streams
    costs = [(name or step.label, cost) for step in steps for name, cost in step.costs.items()]
    together = [(min(at_once, max(1, cost.units)) * cost.memory, name, cost) for name, cost in costs]
    most, name, cost = max(together, key=lambda entry: entry[0])
    parameters = f", {in_words(cost.parameters)} parameters" if cost.parameters else ""
    words = f"{sized(most)} of {sized(memory)} ({name}{parameters})"
    if at_once < 2 or most <= SHARE * memory:
        return words, ""
    mend = "fewer (OMP_NUM_THREADS) take less" if on_cpu else "what does not fit is done again alone"
    return words, f"{at_once} workers at once may take {sized(most)}, more than there is; {mend}"


def not_in_it(estimates: Estimates) -> list[str]:
    """Return what the run does beyond the steps of the plan: further questions, and the folder model/.

    The folder is named where classifiers are asked for by name, or beside a question: by default it takes seconds.
    """
    from experiment.dynamics import has_steps  # takes half a second, with what it analyses by

    settings = estimates.settings
    more = ["--holdout"] if settings.holdout is not None else []
    more += ["--also"] if settings.also != () else []
    more += ["steps of the training"] if has_steps(estimates.collection) else []
    return [*more, "model/"] if settings.save_models or (more and settings.save_models is None) else more


def lines(
    estimates: Estimates,
    names: Sequence[str],
    speed: Speed,
    cache: Path,
    packed: int = 0,
    workers: int = 1,
    streams: int = 1,
    memory: int | None = None,
) -> list[str]:
    """Return the plan in lines: one, or from a minute on also one for each step; and one of what is not in it.

    Args:
        estimates: Of the experiment.
        names: The representations.
        speed: Of a core or GPU.
        cache: The folder of finished work.
        packed: Bytes of packed weights that are still to be written there.
        workers: Workers at once.
        streams: Workers that share a GPU, and its speed.
        memory: Bytes of the device; None: those that it has.
    """
    on_cpu = estimates.device.type == "cpu"
    steps = steps_of(estimates, names)
    seconds = [step.seconds(speed, workers // streams) for step in steps]
    total = total_seconds(estimates, names, speed, workers, streams)
    in_memory, mend = memory_words(
        estimates, steps, workers, streams, memory_of(estimates.device) if memory is None else memory
    )
    size = disk_bytes(estimates, names, steps, packed, workers if on_cpu else 1)
    on_disk = f"{sized(size)} of {sized(shutil.disk_usage(nearest_of(cache)).free)} free in {_relative(cache)}"
    first = f"{'estimate':<10}{duration(max(1, total))} on this machine"
    if total < SMALL_SECONDS:
        shown = [f"{first}; memory {in_memory}; disk {on_disk}"]
    else:
        shown = [f"{first}:", *(step.line(parts) for step, parts in zip(steps, seconds, strict=True))]
        shown += [f"{'memory':<10}{in_memory}", f"{'disk':<10}{on_disk}"]
    shown += [f"{'memory':<10}{mend}"] if mend else []
    return [*shown, f"{'not in it':<10}{', '.join(more)}"] if (more := not_in_it(estimates)) else shown
