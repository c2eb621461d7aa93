"""Values of a column held out in turn: each is the test set of LoRAs that nothing was trained on.

Shape letters: N LoRAs, R runs, V and T validation and test LoRAs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from analysis.evidence import Evidence
from analysis.holdout import LEAST_VALUES, Fit, Ordinary, held_out
from data import Collection
from experiment import estimates
from experiment.arrays import WEIGHTS
from experiment.columns import HELD_OUT_BY, columns_named, columns_of
from experiment.dynamics import UnfollowedError, trainings_of
from experiment.phases import Experiment, emptied
from experiment.plans import TrainingError
from experiment.units import FAILURES, FAULTS, one_memory_error, reason_of
from loras.building import say
from loras.label_bins import number_of
from representations import REPRESENTATIONS
from training.splits import split_rows
from training.stacks import numpy_stream

LEAST_LORAS, MOST_VALUES = 10, 10
MOST_NAMED = 20  # values of a reason for which they are left out, and such reasons
OTHER_REASONS = "other reasons"
RUNS = 3  # at most, unless all controls are asked for
LEAST_OF_CLASS = 3  # LoRAs among the others, of which train and validation need one each


def hold_out(experiment: Experiment, names: Sequence[str]) -> dict | None:
    """Return ``analysis.holdout`` of results.json; None where it is not asked for.

    Classifiers are trained anew without the LoRAs of each value; those of the ordinary split are there already, but of
    a representation that was not run.

    Args:
        experiment: All phases done.
        names: The representations that were run with and without the top layers.
    """
    settings, collection = experiment.settings, experiment.collection
    if settings.holdout is None:
        return None
    columns = columns_of(collection)
    (column,) = columns_named(settings.holdout, columns)
    value_of = np.array([columns[column].get(file.path, "") for file in collection.files], object)
    rows_of, left_out = choose_values(collection, value_of, settings.seed, units_of(collection, column))
    chosen, not_run = _representations(experiment)
    runs = settings.num_runs if settings.controls == "all" else min(RUNS, settings.num_runs)
    found = {
        "column": column,
        "runs": runs,
        "without_value": int((value_of == "").sum()),
        "why": None,
        "left_out": left_out,
        "not_run": not_run,
        "best": None,
        "trained": len(experiment.rows["train"]),
        "values": [],
        "representations": {},
    }
    fits: list[Fit] = []
    if len(rows_of) >= LEAST_VALUES and chosen:
        ordinary = _ordinary(experiment, names, chosen, runs, value_of, not_run)
        chosen = [name for name in chosen if name not in not_run]
        fits = _fits(experiment, rows_of, chosen, runs, found)
    found["left_out"] = by_reason(found["left_out"])
    if len(fits) < LEAST_VALUES or not fits[0].predicted:
        count = len(fits) if fits else len(rows_of)
        why = f"at least {LEAST_VALUES} values that can be held out are needed, and there is {count or 'none'}"
        return found | {"why": "no representation could be run" if len(not_run) == len(HELD_OUT_BY) else why}
    return found | held_out(fits, ordinary, _evidence(experiment))


def units_of(collection: Collection, column: str) -> np.ndarray | None:
    """Return what counts as one LoRA where the LoRAs of a value are counted, int[N]; None where each does.

    That is a group, such as the checkpoints of a LoRA, or its copies. Of the group column itself each value is a group,
    and of its LoRAs only the checkpoints are one.
    """
    if collection.group_column != column:
        return collection.groups
    units = np.arange(len(collection.y))
    try:
        for rows in trainings_of(collection).values():
            units[list(rows.values())] = min(rows.values())
    except UnfollowedError:  # two files of one step: they cannot be told apart
        return collection.groups
    return units


def choose_values(
    collection: Collection, value_of: np.ndarray, seed: int, units: np.ndarray | None = None
) -> tuple[dict[str, dict[str, np.ndarray]], list[dict]]:
    """Return the rows of each part of the split that tests each value, and the values that are left out, with reasons.

    Tested are at most ten values of at least ten LoRAs each, the most frequent ones, in the order of numbers, or names.
    Which of equally frequent ones is drawn: by name they could all be of the same classes.

    Args:
        collection: The LoRAs.
        value_of: The value of each, str[N]; empty where it has none.
        seed: Of the splits of the others, and of the draw.
        units: What counts as one LoRA, int[N]; None: a group, or where there are none each.
    """
    rows_by_value: dict[str, list[int]] = defaultdict(list)
    for row, value in enumerate(value_of.tolist()):
        if value:
            rows_by_value[value].append(row)
    units = collection.groups if units is None else units
    sizes = {value: _size(units, rows) for value, rows in rows_by_value.items()}
    once = units is not None and units is collection.groups
    few = f"fewer than {LEAST_LORAS} LoRAs{', those of a group counted once' if once else ''}"
    chosen: dict[str, dict[str, np.ndarray]] = {}
    left_out = []
    names = np.array(sorted(rows_by_value), object)
    drawn = numpy_stream(seed, "values held out").permutation(names).tolist()
    for value in sorted(drawn, key=lambda value: -sizes[value]):
        tested, reason = np.array(rows_by_value[value]), ""
        if sizes[value] < LEAST_LORAS:
            reason = few
        elif len(chosen) == MOST_VALUES:
            reason = f"beyond the {MOST_VALUES} most frequent that can be held out"
        else:
            try:
                chosen[value] = rows_without(collection, tested, seed)
            except ValueError as error:
                reason = str(error)
        if reason:
            left_out.append(_left_out(collection, value, tested, reason))
    return {value: chosen[value] for value in sorted(chosen, key=_order)}, left_out


def _size(groups: np.ndarray | None, rows: Sequence[int]) -> int:
    """Return how many groups rows are of; without groups, how many rows there are."""
    return len(rows) if groups is None else len(np.unique(groups[rows]))


def _left_out(collection: Collection, value: str, rows: np.ndarray, reason: str) -> dict:
    return {"value": value, "loras": len(rows), "groups": _size(collection.groups, rows), "reason": reason}


def by_reason(left_out: Sequence[dict]) -> list[dict]:
    """Return values that are left out by reason, the commonest first, with the number and the largest twenty of each.

    Of a column of ids that is nearly every LoRA. Beyond twenty reasons, as of single classes, all others are one.
    """
    commonest = Counter(entry["reason"] for entry in left_out).most_common(MOST_NAMED)
    members: dict[str, list[dict]] = {reason: [] for reason, _ in commonest}
    for entry in sorted(left_out, key=lambda entry: -entry["loras"]):
        named = {key: entry[key] for key in ("value", "loras", "groups")}
        members.setdefault(entry["reason"] if entry["reason"] in members else OTHER_REASONS, []).append(named)
    return [
        {"reason": reason, "count": len(values), "named": values[:MOST_NAMED]} for reason, values in members.items()
    ]


def _order(value: str) -> tuple[bool, float, str]:
    """Return a key that sorts numbers by size, and before words."""
    number = number_of(value)
    return number is None, number or 0.0, value


def rows_without(collection: Collection, tested: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the rows of ``train``, ``validation`` and ``test`` where just the rows ``tested`` int[n] are tested.

    LoRAs of a group that has a member among them are in no part. The others are split as ever, and their train and test
    parts train together.

    Raises:
        ValueError: The others have not all classes of these, or make no such split; the message says which and why.
    """
    y, groups, others = collection.y, collection.groups, np.ones(len(collection.y), bool)
    others[tested] = False
    if groups is not None:
        others &= ~np.isin(groups, groups[tested])
    counts = np.bincount(y[others], minlength=len(collection.classes))
    missing = np.flatnonzero((np.bincount(y[tested], minlength=len(counts)) > 0) & (counts == 0))
    apart = missing[np.bincount(y, minlength=len(counts))[missing] == np.bincount(y[tested])[missing]]
    if len(apart):
        raise ValueError(f"no LoRA of {_some([collection.classes[label] for label in apart])} has another value")
    if len(missing):
        named = _some([collection.classes[label] for label in missing])
        raise ValueError(f"all LoRAs of {named} with another value share a group with these")
    if few := [collection.classes[label] for label in np.flatnonzero((counts > 0) & (counts < LEAST_OF_CLASS))]:
        raise ValueError(f"fewer than {LEAST_OF_CLASS} LoRAs of {_some(few)} are left to train and validate on")
    if (counts > 0).sum() < 2:
        raise ValueError("the other LoRAs are of one class")
    rows = np.flatnonzero(others)
    parts = split_rows(np.unique(y[rows], return_inverse=True)[1], seed, None if groups is None else groups[rows])
    train = np.sort(np.concatenate([parts["train"], parts["test"]]))
    return {"train": rows[train], "validation": rows[parts["validation"]], "test": tested}


def _some(classes: Sequence[str]) -> str:
    """Return classes in words, the first of them and how many others there are."""
    more = f" and {len(classes) - 1} other classes" if len(classes) > 2 else ""
    return f"{classes[0]} and {classes[1]}" if len(classes) == 2 else f"{classes[0]}{more}"


def _representations(experiment: Experiment) -> tuple[list[str], dict[str, str]]:
    """Return the representations that can be run, and why others cannot."""
    not_run = dict.fromkeys(emptied(experiment, HELD_OUT_BY, []), "of no pair both layers are there")
    not_run |= estimates.unfit(experiment.estimates, [name for name in HELD_OUT_BY if name not in not_run])
    for name in HELD_OUT_BY:
        array = name if REPRESENTATIONS[name].made == "computed" else WEIGHTS
        if name not in not_run and not experiment.extracted.path(array).exists():
            not_run[name] = "the cache folder has no room for the weights of all LoRAs, packed"
    return [name for name in HELD_OUT_BY if name not in not_run], not_run


def _ordinary(
    experiment: Experiment,
    names: Sequence[str],
    chosen: Sequence[str],
    runs: int,
    value_of: np.ndarray,
    not_run: dict[str, str],
) -> Ordinary:
    """Return what classifiers of the ordinary split predict; add to ``not_run`` why others cannot be trained there."""
    predicted = {name: experiment.predictions.conditions["baseline"][name]["predicted"] for name in names}
    if others := [name for name in chosen if name not in predicted]:
        again = experiment.again(experiment.collection, None, runs)
        again.inputs = again.planner.inputs = experiment.inputs  # weights in memory are the same
        trained, failed = _trained(again, others)
        not_run |= failed
        predicted |= trained
    rows, boundary = experiment.rows, len(experiment.rows["validation"])
    truth = experiment.collection.y[rows["validation"]]
    seen = np.isin(value_of[rows["test"]].astype(str), value_of[rows["train"]].astype(str))
    used = {name: predicted[name] for name in chosen if name in predicted}
    return Ordinary(
        seen=seen,
        predicted={name: classes[:, boundary:] for name, classes in used.items()},
        validated={name: round(float((classes[:, :boundary] == truth).mean()), 12) for name, classes in used.items()},
    )


def _fits(experiment: Experiment, rows_of: dict[str, dict], names: Sequence[str], runs: int, found: dict) -> list[Fit]:
    """Train without each value; note values and representations that fail in ``left_out`` and ``not_run`` of found.

    A representation that fails without every value is not run; a value without which another one fails is left out.
    """
    outcomes: dict[str, tuple[dict[str, np.ndarray], dict[str, str]]] = {}
    fits = {}
    for number, (value, rows) in enumerate(rows_of.items(), 1):
        experiment.inputs.release()  # memory, for the next kernels
        again = experiment.again(experiment.collection, rows, runs)
        predicted, failed = outcomes[value] = _trained(again, names)
        again.inputs.release()
        trained, validated = again.rows["train"], len(rows["validation"])
        truth = experiment.collection.y[rows["test"]]
        predicted = {name: classes[:, validated:] for name, classes in predicted.items()}
        largest = int(np.bincount(experiment.collection.y[trained]).argmax())
        fits[value] = Fit(value, rows["test"], len(trained), largest, predicted)
        reached = [f"{name} {100 * (classes == truth).mean():.1f} %" for name, classes in predicted.items()]
        reached += [f"{name} not run: {reason}" for name, reason in failed.items()]
        say(f"held out {number} of {len(rows_of)}: {found['column']}={value}: {', '.join(reached)}")
    for name in names:
        reasons = [failed[name] for _, failed in outcomes.values() if name in failed]
        if len(reasons) == len(outcomes):
            found["not_run"][name] = reasons[0]
    left = [name for name in names if name not in found["not_run"]]
    whole = []
    for value, fit in fits.items():
        if reasons := [f"{name}: {outcomes[value][1][name]}" for name in left if name in outcomes[value][1]]:
            found["left_out"].append(_left_out(experiment.collection, value, fit.rows, reasons[0]))
        else:
            whole.append(fit)
    _keep(experiment, whole, left)
    return whole


def _trained(experiment: Experiment, names: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Train with all layers; return the predictions int[R, V + T] by representation, and why others failed."""
    failed = {}
    try:
        with one_memory_error():
            for name, entry in experiment.evaluate(list(names), [], "held out"):
                if isinstance(entry, str):
                    failed[name] = entry
    except FAULTS:
        raise
    except (TrainingError, *FAILURES) as error:
        failed |= {name: reason_of(error) for name in names}
    done = experiment.predictions.conditions.get("held out", {})
    return {name: done[name]["predicted"] for name in names if name in done and name not in failed}, failed


def _keep(experiment: Experiment, fits: Sequence[Fit], names: Sequence[str]) -> None:
    """Keep the predictions of all LoRAs for predictions.npz, int32[R, N], -1 where a LoRA was not tested."""
    for name in names if fits else ():
        runs = len(fits[0].predicted[name])
        predicted = np.full((runs, len(experiment.collection.y)), -1, np.int32)
        for fit in fits:
            predicted[:, fit.rows] = fit.predicted[name]
        experiment.predictions.further[f"holdout/{name}/predicted"] = predicted


def _evidence(experiment: Experiment) -> Evidence:
    """Return labels, groups, split and seed as the analysis asks for them; nothing of it ranks layers."""
    collection, settings = experiment.collection, experiment.settings
    return Evidence(
        layers=(),
        classes=collection.classes,
        y=collection.y,
        rows=experiment.rows,
        groups=collection.groups,
        ranking=np.arange(0),
        top_k=settings.top_k,
        predictions=experiment.predictions,
        seed=settings.seed,
    )
