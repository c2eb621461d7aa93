"""What the experiment's figures are compared with: controls are trained, cheaper explanations read, all is analysed.

A module of its own between trainings.py, which knows no question, and analysis.py, which trains nothing. Of an
experiment on another split or on other labels nothing is new but those: it is the same `Experiment` again.

Shape letters: N LoRAs, L layers, P modules (pairs of layers), R runs, K conditions, V and T validation and test LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis import questions
from analysis.comparison import norms
from analysis.evidence import Evidence, permuted, stream
from analysis.questions import Controls
from analysis.removal import Conditions, plan_controls
from data import Collection, CollectionError, check_classes
from experiment.phases import ATTRIBUTED, Experiment, Settings, TrainingError
from representations import REPRESENTATIONS
from training.splits import split_collection

LEVELS = ("none", "basic", "all")
UPDATES = "updates"  # effective rank, norm and scale of each update
SAMPLES = 200  # LoRAs in which features that are one and the same number are looked for


@dataclass(frozen=True)
class Extent:
    """How much is trained to compare with: of which representations, how many runs at most, draws and curve points."""

    names: tuple[str, ...]
    runs: int
    points: int
    conditional: bool


EXTENTS = {
    "basic": Extent(("stats",), 3, 12, False),
    "all": Extent(("stats", "ensemble", "update_sketch"), 10**6, 32, True),
}
# Random draws, and random orders of removal; a condition costs little where the kernels of all modules are kept.
DRAWS, ORDERS = {"kept kernels": 200, "else": 20}, {"kept kernels": 5, "else": 1}


def asked_for(settings: Settings) -> bool:
    """Whether there is to be an analysis."""
    return settings.controls != "none" or settings.null_shuffles > 0


def analysed(experiment: Experiment, names: Sequence[str], say: Callable[[str], None]) -> dict | None:
    """`analysis` of results.json, whatever is trained for it trained.

    None where none is asked for, and on all processes of a job but the first, which only train.

    Args:
        experiment: All phases done.
        names: Representations that were run with and without the top layers.
        say: Prints a line.
    """
    if not asked_for(experiment.settings):
        return None
    level, shuffles = experiment.settings.controls, experiment.settings.null_shuffles
    e, not_run = evidence_of(experiment), {}

    def tried(name: str, train: Callable) -> object:
        """What ``train()`` gives; None where it cannot be done, which is noted."""
        try:
            return train()
        except TrainingError as error:
            not_run[name] = str(error)
            say(f"controls: {name} not run: {error}")
            return None

    conditions, attributed = {}, None
    for name in control_names(experiment, names, level):
        plan = plan_of(experiment, e, name, level)
        if trained := tried(name, lambda name=name, plan=plan: experiment.under(name, plan.kept)):
            conditions[name] = plan, remember(experiment, name, plan, trained["predicted"])
            if name == ATTRIBUTED:
                attributed = name, trained["attribution"][plan.where("all")[0]]
    columns = group_columns(experiment) if level != "none" else {}
    again = tried("grouped split", lambda: grouped(experiment, e, names, columns))
    on_shuffled = tried("null shuffles", lambda: shuffled(experiment, shuffles)) if shuffles else None
    if experiment.crew.rank > 0:
        return None
    statistics, updates = (loaded(experiment, name) for name in ("stats", UPDATES))
    cheap = {
        "norms": norms(statistics, updates),
        "ranks and shapes": ranks(experiment),
        "metadata": metadata(experiment),
    }
    controls = Controls(level, conditions, attributed, cheap, list(columns), again, on_shuffled)
    return questions.analyse(e, names, statistics, updates, samples(experiment, names), controls) | {
        "controls_not_run": not_run
    }


def remember(experiment: Experiment, name: str, plan: Conditions, predicted: np.ndarray) -> np.ndarray:
    """Keep controls for predictions.npz, classes int[K, R, V + T]; return those of the test LoRAs, int[K, R, T]."""
    predicted = predicted.astype(np.min_scalar_type(len(experiment.collection.classes)))
    arrays = {"names": np.array(plan.names), "kept": plan.kept, "predicted": predicted}
    experiment.predictions.controls[name] = arrays
    return predicted[..., len(experiment.rows["validation"]) :]


def evidence_of(experiment: Experiment) -> Evidence:
    """What the finished phases of an experiment tell."""
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


def loaded(experiment: Experiment, name: str) -> np.ndarray:
    """Features of the experiment's layers, or of its whole pairs, float32[N, L or P, F]."""
    return experiment.features(name).cpu().numpy()


def samples(experiment: Experiment, names: Sequence[str]) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """Matrix-wise features of some LoRAs from all over the collection, float32[n, L, F], and their names."""
    count = len(experiment.collection.files)
    rows = np.unique(np.linspace(0, count - 1, min(SAMPLES, count)).astype(int))
    matrix_wise = [name for name in names if REPRESENTATIONS[name].kind == "matrix" and name != "ensemble"]
    return {
        name: (experiment.extracted.load(name, rows)[:, experiment.depths], REPRESENTATIONS[name].feature_names)
        for name in matrix_wise
    }


# ----------------------------------------------------------------------------------------------------------------------
# Controls of the removal
# ----------------------------------------------------------------------------------------------------------------------


def control_names(experiment: Experiment, names: Sequence[str], level: str) -> list[str]:
    """The representations that controls are trained on: ``stats``, whose features are always there, and others run.

    A kernel is one of them where its modules' kernels are kept, or all is asked for.
    """
    if level == "none":
        return []
    kernels = [name for name in names if REPRESENTATIONS[name].kind == "kernel"]
    if kernels and level != "all" and not experiment.update_kernels.keeps:
        kernels = []
    return [name for name in EXTENTS[level].names if name == "stats" or name in names] + kernels


def plan_of(experiment: Experiment, e: Evidence, name: str, level: str) -> Conditions:
    """The conditions of one representation."""
    extent, kernel = EXTENTS[level], REPRESENTATIONS[name].kind == "kernel"
    how_many = "kept kernels" if kernel and experiment.update_kernels.keeps else "else"
    return plan_controls(
        e.ranking,
        [layer.role for layer in e.layers],
        e.top_k,
        runs=1 if kernel else min(extent.runs, experiment.settings.num_runs),
        draws=DRAWS[how_many],
        points=extent.points,
        orders=ORDERS[how_many],
        conditional=extent.conditional and name == "stats",
        seed=e.seed,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Explanations that need no weights
# ----------------------------------------------------------------------------------------------------------------------


def ranks(experiment: Experiment) -> np.ndarray | None:
    """Rank of each layer in each file, float[N, L]; None where all files are alike."""
    collection, depths = experiment.collection, experiment.depths.tolist()
    if not collection.mixed_ranks:
        return None
    found = np.array([[file.layout.layers[d].rank for d in depths] for file in collection.files], np.float32)
    return found if (found != found[0]).any() else None


def metadata(experiment: Experiment) -> np.ndarray | None:
    """The numbers that tables and metadata.json files tell of each file, float[N, columns]; None where there are none.

    Left out are the label itself, under whatever name, and whole numbers of which each LoRA has its own, as ids are.
    """
    collection = experiment.collection
    columns = []
    for name, of_file in collection.columns.items():
        numbers = [_number(of_file.get(file.path)) for file in collection.files]
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


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if np.isfinite(number) else None


# ----------------------------------------------------------------------------------------------------------------------
# The experiment on another split, and on other labels
# ----------------------------------------------------------------------------------------------------------------------


def group_columns(experiment: Experiment) -> dict[str, dict[str, str]]:
    """Columns that look like groups which no split keeps together, with the value of each file.

    Each file has a value, and most share it with another; either the column is called a group, or all LoRAs of one
    value are of one class while classes have several values, as of the artists or sets of images of a concept.
    """
    collection = experiment.collection
    if collection.group_column is not None:
        return {}
    found = {}
    for name, of_file in collection.columns.items():
        if name == collection.label_column or len(of_file) < len(collection.files):
            continue
        values, group = np.unique([of_file[file.path] for file in collection.files], return_inverse=True)
        pairs = len(np.unique(np.stack([group, collection.y]), axis=1).T)
        nested = pairs == len(values) > len(collection.classes)
        if 2 * len(values) <= len(group) and len(values) > 1 and (nested or "group" in name.lower()):
            found[name] = of_file
    return found


def grouped(experiment: Experiment, e: Evidence, names: Sequence[str], columns: dict) -> tuple | None:
    """The best representation of which nothing is fitted to the split, on one that keeps groups together.

    The best is chosen by validation: by test the figure beside it would be the largest of many.

    Args:
        experiment: The one that knew no groups.
        e: What it found.
        names: The representations that were run.
        columns: Of `group_columns`; the first that allows a split is taken.

    Returns:
        The column, the representation, and truth, groups and predictions of the test LoRAs of that split; None where no
        column allows one, or all representations are fitted.

    Raises:
        TrainingError: A training diverged.
    """
    settings, collection = experiment.settings, experiment.collection
    fixed = [name for name in names if REPRESENTATIONS[name].kind in ("matrix", "pair")]
    for column, of_file in columns.items() if fixed else ():
        files = tuple(replace(file, group=of_file[file.path]) for file in collection.files)
        by_group = replace(collection, files=files, group_column=column)
        try:
            check_classes(by_group)
            rows = split_collection(by_group, settings.seed)
        except CollectionError:  # too few groups in a class to be dealt to three parts
            continue
        best = max(fixed, key=lambda name: e.validated("baseline", name).mean())
        again = another(experiment, by_group, rows, settings.num_runs)
        for _, entry in again.evaluate([best], [], "grouped"):
            if isinstance(entry, str):
                raise TrainingError(entry)
        predicted = again.predictions.conditions["grouped"][best]["predicted"][:, len(rows["validation"]) :]
        return column, best, by_group.y[rows["test"]], by_group.groups[rows["test"]], predicted
    return None


def shuffled(experiment: Experiment, shuffles: int) -> np.ndarray:
    """Test accuracy of each layer where labels were shuffled before training, one run, float[shuffles, L].

    Labels of groups are shuffled as in the permutation test.

    Raises:
        TrainingError: A training diverged.
    """
    collection, rows = experiment.collection, experiment.rows
    groups = np.arange(len(collection.y)) if collection.groups is None else collection.groups
    found = []
    for y in permuted(collection.y, groups, shuffles, stream(experiment.settings.seed, "shuffles")):
        pairs = zip(collection.files, y.tolist(), strict=True)
        files = tuple(replace(file, label=collection.classes[c]) for file, c in pairs)
        again = another(experiment, replace(collection, files=files), rows, 1)
        again.rank_layers()
        predicted = again.predictions.layers["predicted"][:, 0, len(rows["validation"]) :]
        found.append((predicted == again.collection.y[rows["test"]]).mean(1))
    return np.stack(found)


def another(experiment: Experiment, collection: Collection, rows: dict, num_runs: int) -> Experiment:
    """The same experiment on the same files with other labels, groups or split."""
    return Experiment(
        replace(experiment.settings, num_runs=num_runs),
        collection,
        experiment.selected,
        rows,
        experiment.extracted,
        experiment.crew,
        experiment.progress,
    )
