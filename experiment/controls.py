"""Controls: trains what the results are compared with, reads cheaper explanations, and has all of it analysed.

Of an experiment on another split or on other labels nothing is new but those: it is the same `Experiment` again.

Shape letters: N LoRAs, L layers, P pairs of layers, R runs, K conditions, V and T validation and test LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.preprocessing import OneHotEncoder

from analysis import comparison, questions
from analysis.cross_fitting import Choice, TrainedSets
from analysis.evidence import Evidence
from analysis.questions import Controls
from analysis.removal_plan import Conditions, Order, plan_controls
from data import Collection, CollectionError, check_classes, keep_together
from experiment.checks import group_columns
from experiment.further import answer_further
from experiment.phases import Experiment, emptied, on_permuted_labels, split_collection
from experiment.plans import TrainingError
from experiment.readings import attended, mapped
from experiment.units import FAILURES, FAULTS, one_memory_error, reason_of
from loras.recipe import recipe_columns
from representations import COMPUTED, FEATURES, MAPPED, RANKING, REPRESENTATIONS, UPDATES

RECIPE_WIDTH = 300  # values of recipe fields that a cheap explanation reads at most
MAX_NUMBER = 1e30  # of a column that is read as numbers: squares of larger ones are none in float32
SAMPLES = 200  # LoRAs in which features that are the same number are looked for


@dataclass(frozen=True)
class Extent:
    """The amount that is trained to compare with.

    Attributes:
        names: Representations.
        runs: At most; None: as many as the experiment has.
        points: Of each removal curve, at least.
        conditional: Representations of which each other layer is added to the top k.
    """

    names: tuple[str, ...]
    runs: int | None
    points: int
    conditional: tuple[str, ...] = ()


EXTENTS = {
    "basic": Extent((RANKING,), runs=3, points=12),
    "all": Extent((RANKING, "ensemble", "update_sketch"), runs=None, points=32, conditional=(RANKING,)),
}
# Random draws, and random orders of removal; a condition costs little where the kernels of all modules are kept.
DRAWS, ORDERS = {"kept kernels": 200, "else": 39}, {"kept kernels": 5, "else": 1}


def analyse(experiment: Experiment, names: Sequence[str], say: Callable[[str], None]) -> dict:
    """Return `analysis` of results.json, whatever is trained for it trained.

    Args:
        experiment: All phases done.
        names: Representations that were run with and without the top layers.
        say: Prints a line.
    """
    controlled = experiment.settings.controls != "none"
    say("\nControls, and what the numbers mean" if controlled else "\nWhat the numbers mean")
    evidence, attempts = evidence_of(experiment), Attempts(say)
    columns = attempts("columns of groups", lambda: group_columns(experiment.collection))
    trained = _train(experiment, evidence, names, columns or {}, attempts)
    statistics, updates = (_loaded(experiment, name) for name in (RANKING, UPDATES))
    cheap = {
        "norms": lambda: comparison.norms(statistics, updates),
        "ranks and shapes": lambda: ranks(experiment),
        "metadata": lambda: metadata(experiment),
        "recipe": lambda: recipe(experiment, updates),
    }
    cheap = {name: attempts(f"cheap explanation by {name}", read) for name, read in cheap.items()}
    controls = replace(trained, cheap=cheap)
    sampled = attempts("features that coincide", lambda: samples(experiment, names)) or {}
    analysis = questions.analyse(evidence, names, statistics, updates, sampled, controls, attempts)
    return analysis | answer_further(experiment, names, attempts) | {"controls_not_run": attempts.failed}


class Attempts:
    """Things that may fail, and the reasons of those that did, by name.

    Args:
        say: Prints a line.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say, self.failed = say, {}

    def __call__(self, name: str, do: Callable[[], object]) -> object:
        """Return what ``do()`` gives; None where it fails, by `FAILURES` or in training, which is noted."""
        try:
            with one_memory_error():
                return do()
        except FAULTS:
            raise
        except (TrainingError, *FAILURES) as error:
            self.failed[name] = reason_of(error)
            self.say(f"controls: {name} not run: {self.failed[name]}")
            return None


def _train(
    experiment: Experiment, evidence: Evidence, names: Sequence[str], columns: dict, attempt: Attempts
) -> Controls:
    """Train all controls that are asked for, less those that fail."""
    level = experiment.settings.controls
    conditions: dict[str, tuple[Conditions, np.ndarray]] = {}
    attributions: dict[str, np.ndarray] = {}
    controlled = control_names(experiment, names, level)
    of_layers = Order.of_layers(evidence) if controlled else None
    for name in controlled:
        trained = attempt(name, lambda name=name: train_conditions(experiment, evidence, name, level, of_layers))
        if trained:
            plan, arrays = trained
            conditions[name] = plan, keep(experiment, name, plan, arrays)
            if "attribution" in arrays:
                attributions[name] = arrays["attribution"][plan.where("all")[0]]
    shuffles = experiment.settings.null_shuffles
    order = conditions[MAPPED][0].order.names if MAPPED in conditions else None
    controls = Controls(
        level=level,
        conditions=conditions,
        attributed=(RANKING, attributions[RANKING]) if RANKING in attributions else None,
        unused=list(columns),
        grouped=attempt("grouped split", lambda: grouped(experiment, evidence, names, columns)) if controlled else None,
        shuffled=attempt("null shuffles", lambda: shuffled(experiment, shuffles)) if shuffles else None,
        cross_fitted=attempt(
            "removal of layers that other test LoRAs choose",
            lambda: cross_fitted(experiment, evidence, names, level, conditions.get(RANKING)),
        )
        or TrainedSets(),
        attended=attempt("attention", lambda: attended(experiment, names, level == "all")),
        mapped=attempt("map of the collection", lambda: mapped(experiment, names, order)) or (),
    )
    for name, reason in controls.cross_fitted.not_run.items():
        attempt.say(f"controls: {name} without what each fold chose not run: {reason}")
    return controls


def keep(experiment: Experiment, name: str, plan: Conditions, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Keep controls of `train_conditions` for predictions.npz; return those of the test LoRAs, int[K, R, T]."""
    dtype = np.min_scalar_type(len(experiment.collection.classes))
    predicted = {kind: arrays[kind].astype(dtype) for kind in ("predicted", "modules") if kind in arrays}
    experiment.predictions.controls[name] = {"names": np.array(plan.names), "kept": plan.kept, **predicted}
    return predicted["predicted"][..., len(experiment.rows["validation"]) :]


def evidence_of(experiment: Experiment) -> Evidence:
    """Return the evidence that the finished phases of an experiment leave."""
    collection, settings = experiment.collection, experiment.settings
    return Evidence(
        layers=experiment.layers,
        classes=collection.classes,
        y=collection.y,
        rows=experiment.rows,
        groups=collection.groups,
        ranking=experiment.ranking,
        top_k=settings.top_k,
        predictions=experiment.predictions,
        seed=settings.seed,
    )


def _loaded(experiment: Experiment, name: str) -> np.ndarray:
    """Return features of the experiment's layers, or of its whole pairs, float32[N, L or P, F]."""
    return experiment.inputs.features(name).cpu().numpy()


def samples(experiment: Experiment, names: Sequence[str]) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """Return features by layer of LoRAs from all over the collection, float32[n, L, F], and their names."""
    count = len(experiment.collection.files)
    rows = np.unique(np.linspace(0, count - 1, min(SAMPLES, count)).astype(int))
    sampled = {}
    for name in names:
        row = REPRESENTATIONS[name]
        if (row.unit, row.made) == ("layer", "computed") and not row.joins:  # no feature is looked at twice
            features = experiment.extracted.load(name, rows)[:, experiment.inputs.depths]
            sampled[name] = features, row.feature_names
    return sampled


# ----------------------------------------------------------------------------------------------------------------------
# Controls of the removal
# ----------------------------------------------------------------------------------------------------------------------


def control_names(experiment: Experiment, names: Sequence[str], level: str) -> list[str]:
    """Return the representations that controls are trained on.

    The one that layers are ranked by always is, as its features are always extracted; a kernel is where its modules'
    kernels are kept, or all is asked for.
    """
    if level == "none":
        return []
    kernels = [name for name in names if REPRESENTATIONS[name].made == "kernel"]
    if level != "all":
        kernels = [name for name in kernels if experiment.inputs.modules.kernels(name).keeps]
    return [name for name in EXTENTS[level].names if name in {RANKING, *names}] + kernels


def train_conditions(
    experiment: Experiment, evidence: Evidence, name: str, level: str, of_layers: Order
) -> tuple[Conditions, dict[str, np.ndarray]]:
    """Train a representation under its conditions; return these and what was trained.

    That is `Experiment.train_under`'s, and of a representation that reads whole modules the predicted classes of each
    ``modules`` alone, int[P, R, V + T].

    Args:
        experiment: All phases done.
        evidence: What they left.
        name: Of the representation.
        level: Of the controls.
        of_layers: The layers as they are ranked.

    Raises:
        TrainingError: A training diverged, or memory ran out.
    """
    if REPRESENTATIONS[name].unit == "layer":
        plan = plan_of(experiment, of_layers, name, level)
        return plan, experiment.train_under(name, plan.kept)
    alone = train_modules(experiment, name, runs_of(experiment, name, EXTENTS["basic"]))
    order = Order.of_modules(evidence, experiment.inputs.members, **alone)
    plan = plan_of(experiment, order, name, level)
    return plan, experiment.train_under(name, plan.kept) | {"modules": alone["predicted"]}


def train_modules(experiment: Experiment, name: str, runs: int) -> dict[str, np.ndarray]:
    """Train a representation that reads whole modules on each of them alone.

    Returns:
        ``predicted`` int32[P, runs, V + T], and ``log_loss`` likewise where a classifier has one.

    Raises:
        TrainingError: A training diverged, or memory ran out.
    """
    planner, modules, label = experiment.planner, len(experiment.inputs.pairs), f"modules {name}"
    if REPRESENTATIONS[name].made == "kernel":
        plan = planner.plan_kernels(name, np.eye(modules, dtype=bool), label)
    else:
        models = [(module, run) for module in range(modules) for run in range(runs)]
        live = np.ones(len(REPRESENTATIONS[name].feature_names), bool)
        source = replace(experiment.inputs.ranking_source(), name=name)  # each unit alone, as in the ranking
        plan = planner.plan_classifiers(source, live, models, label)
    scores = planner.carry_out(plan, experiment.progress)
    kinds = [kind for kind in ("predicted", "log_loss") if kind in scores]
    return {kind: scores[kind].reshape(modules, runs, -1) for kind in kinds}


def runs_of(experiment: Experiment, name: str, extent: Extent) -> int:
    """Return the number of runs of a representation's controls; nothing is drawn for a kernel."""
    runs = experiment.settings.num_runs
    if REPRESENTATIONS[name].made == "kernel":
        return 1
    return runs if extent.runs is None else min(extent.runs, runs)


def plan_of(experiment: Experiment, order: Order, name: str, level: str) -> Conditions:
    """Return the conditions of one representation whose units are in this order."""
    extent, is_kernel = EXTENTS[level], REPRESENTATIONS[name].made == "kernel"
    cost = "kept kernels" if is_kernel and experiment.inputs.modules.kernels(name).keeps else "else"
    return plan_controls(
        order,
        runs=runs_of(experiment, name, extent),
        draws=DRAWS[cost],
        points=extent.points,
        orders=ORDERS[cost],
        conditional=name in extent.conditional,
        seed=experiment.settings.seed,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The removal of layers that were chosen on other test LoRAs
# ----------------------------------------------------------------------------------------------------------------------


def cross_fitted(
    experiment: Experiment,
    evidence: Evidence,
    names: Sequence[str],
    level: str,
    measured: tuple[Conditions, np.ndarray] | None = None,
) -> TrainedSets:
    """Train without each distinct set of top layers that folds of the test LoRAs choose, and each set alone.

    Args:
        experiment: All phases done.
        evidence: What they left.
        names: The representations that were run.
        level: Of the controls; at ``none`` nothing is trained.
        measured: The conditions of the ranking representation, and the classes of the test LoRAs int[K, R, T]; all that
            is needed where validation chose the layers.
    """
    all_layers = evidence.predicted("baseline", RANKING) if RANKING in names else None
    if experiment.settings.rank_by != "test":
        return _chosen_by_validation(all_layers, measured)
    choice = Choice.of(evidence)
    if choice is None or level == "none":
        return TrainedSets(all_layers=all_layers)
    runs = min(EXTENTS[level].runs or experiment.settings.num_runs, experiment.settings.num_runs)
    again = experiment.again(experiment.collection, None, runs)
    again.inputs = again.planner.inputs = experiment.inputs  # weights in memory are the same
    layers = range(len(experiment.layers))
    removed, not_run = _without_each(again, names, choice.sets, "cross-fitted")
    others = [[layer for layer in layers if layer not in top] for top in choice.sets]
    alone, failed = _without_each(again, [RANKING], others, "top k alone")
    whole, failed_whole = _without_each(again, [RANKING], [[]], "cross-fitted, all layers")
    if failed:
        not_run["the top layers alone"] = failed[RANKING]
    if failed_whole:
        not_run["all layers, to compare with"] = failed_whole[RANKING]
    kept, smallest = removed.copy(), np.min_scalar_type(len(experiment.collection.classes))
    if alone:
        kept["top layers alone"] = alone[RANKING]
    experiment.predictions.conditions["cross_fitted"] = {
        name: {"predicted": predicted.astype(smallest)} for name, predicted in kept.items()
    }
    tested = len(experiment.rows["test"])
    return TrainedSets(
        removed={name: predicted[..., -tested:] for name, predicted in removed.items()},
        alone=alone[RANKING][..., -tested:] if alone else None,
        all_layers=whole[RANKING][0, :, -tested:] if whole else None,
        not_run=not_run,
    )


def _chosen_by_validation(all_layers: np.ndarray | None, measured: tuple[Conditions, np.ndarray] | None) -> TrainedSets:
    """Return what no fold is to choose again, with the top k alone where controls were trained."""
    why = "the layers are ranked by validation accuracy, so no test row takes part in the choice"
    if measured is None:
        return TrainedSets(why=why, all_layers=all_layers)
    conditions, predicted = measured
    alone, whole = (predicted[conditions.where(name)] for name in ("top alone", "all"))
    return TrainedSets(why=why, alone=alone, all_layers=whole[0])


def _without_each(
    experiment: Experiment, names: Sequence[str], sets: list[list[int]], condition: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Train without each set of layers; return predictions int[S, R, V + T], and why others were not trained."""
    not_run = experiment.fit(list(names), sets)
    for removed in sets:
        for name in emptied(experiment, names, removed):
            not_run.setdefault(name, "nothing is left of it without the layers that a fold chose")
    conditions = [f"{condition} {number}" for number in range(1, len(sets) + 1)]
    for number, removed in zip(conditions, sets, strict=True):
        for name, entry in experiment.evaluate([name for name in names if name not in not_run], removed, number):
            if isinstance(entry, str):
                not_run[name] = entry
    trained = [experiment.predictions.conditions.get(number, {}) for number in conditions]
    done = [name for name in names if name not in not_run]
    return {name: np.stack([arrays[name]["predicted"] for arrays in trained]) for name in done}, not_run


# ----------------------------------------------------------------------------------------------------------------------
# Explanations that need no weights
# ----------------------------------------------------------------------------------------------------------------------


def ranks(experiment: Experiment) -> np.ndarray | None:
    """Return the rank of each layer in each file, float[N, L]; None where all files are alike."""
    collection, depths = experiment.collection, experiment.inputs.depths.tolist()
    if not collection.mixed_ranks:
        return None
    table = np.array([[file.layout.layers[d].rank for d in depths] for file in collection.files], np.float32)
    return table if (table != table[0]).any() else None


def metadata(experiment: Experiment) -> np.ndarray | None:
    """Return the numbers in tables and metadata.json files, float[N, columns]; None where there are none.

    Left out are the label itself, under whatever name, and whole numbers of which each LoRA has its own, as ids are.
    """
    collection = experiment.collection
    columns = []
    for name, values_by_file in collection.columns.items():
        numbers = [_number(values_by_file.get(file.path)) for file in collection.files]
        if name == collection.label_column or None in numbers:
            continue
        column = np.array(numbers)
        values = len(np.unique(column))
        pairs = len(np.unique(np.stack([column, collection.y]), axis=1).T)
        is_id = values == len(column) and (column == np.floor(column)).all()
        is_label = values == pairs == len(collection.classes)
        if values > 1 and not is_id and not is_label:
            columns.append(column)
    return np.stack(columns, axis=1) if columns else None


def recipe(experiment: Experiment, updates: np.ndarray) -> np.ndarray | None:
    """Return the values of the recipe's fields (see `loras.recipe`), one-hot, uint8[N, values]; None where all agree.

    Fields of the fewest values come first, as far as the width goes.

    Args:
        experiment: The experiment.
        updates: Measures of the updates, float[N, P, F], of which the scale is one.
    """
    scales = updates[..., FEATURES[UPDATES].feature_names.index("scale")]
    columns = sorted(recipe_columns(experiment.collection.files, scales).values(), key=lambda column: len(set(column)))
    widths = np.cumsum([len(set(column)) for column in columns])
    columns = columns[: np.searchsorted(widths, RECIPE_WIDTH, "right")]
    if not columns:
        return None
    return OneHotEncoder(sparse_output=False, dtype=np.uint8).fit_transform(np.array(columns, object).T)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if abs(number) <= MAX_NUMBER else None


# ----------------------------------------------------------------------------------------------------------------------
# The experiment on another split, and on other labels
# ----------------------------------------------------------------------------------------------------------------------


def grouped(experiment: Experiment, evidence: Evidence, names: Sequence[str], columns: dict) -> tuple | None:
    """Evaluate the best representation of which nothing is fitted to the split, on one that keeps groups together.

    The best is chosen by validation: by test the figure beside it would be the largest of many.

    Args:
        experiment: The one that knew no groups.
        evidence: What it left.
        names: The representations that were run.
        columns: Of `checks.group_columns`; the first that allows a split is taken.

    Returns:
        The column, the representation, and truth, groups and predictions of the test LoRAs of that split; None where no
        column allows one, or all representations are fitted.

    Raises:
        TrainingError: A training diverged.
    """
    settings, collection = experiment.settings, experiment.collection
    fixed = [name for name in names if REPRESENTATIONS[name].made in COMPUTED]
    for column, values_by_file in columns.items() if fixed else ():
        by_group = grouped_by(collection, column, values_by_file)
        try:
            check_classes(by_group)
            rows = split_collection(by_group, settings.seed)
        except CollectionError:  # too few groups in a class to be dealt to three parts
            continue
        best = max(fixed, key=lambda name: evidence.validated("baseline", name).mean())
        again = experiment.again(by_group, rows, settings.num_runs)
        for _, entry in again.evaluate([best], [], "grouped"):
            if isinstance(entry, str):
                raise TrainingError(entry)
        predicted = again.predictions.conditions["grouped"][best]["predicted"][:, len(rows["validation"]) :]
        return column, best, by_group.y[rows["test"]], by_group.groups[rows["test"]], predicted
    return None


def grouped_by(collection: Collection, column: str, values_by_file: dict[str, str]) -> Collection:
    """Return a collection whose groups are those of a column, and keep copies and epochs together as before."""
    files = tuple(replace(file, group=values_by_file[file.path]) for file in collection.files)
    return keep_together(
        replace(collection, files=files, group_column=column, together=False), collection.rows_of_groups
    )


def shuffled(experiment: Experiment, shuffles: int) -> np.ndarray:
    """Return test accuracies of layers on labels shuffled before training, one run, float[shuffles, L].

    Raises:
        TrainingError: A training diverged.
    """
    accuracies = []
    for again in on_permuted_labels(experiment, shuffles, "shuffles"):
        again.rank()
        predicted = again.predictions.layers["predicted"][:, 0, len(experiment.rows["validation"]) :]
        accuracies.append((predicted == again.collection.y[experiment.rows["test"]]).mean(1))
    return np.stack(accuracies)
