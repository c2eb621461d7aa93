"""Steps of each LoRA's training: from which on the concept can be predicted, and from which modules first.

Asked wherever a collection holds several steps of LoRAs: folders with checkpoints under --step all, or files that a
table with a column ``step`` names. LoRAs are trained on and tested in the parts of the experiment's own split. At each
step classifiers are trained on the train LoRAs as they are then, and tested on the test LoRAs as they are then; those
of the last step are tested on these at all steps. Nothing is extracted again.

Shape letters: S steps, T test LoRAs, R runs, P modules.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.dynamics import Curve, Followed, Modules, analyse_steps, unanswered
from data import Collection
from experiment.phases import Experiment
from loras import checkpoints
from loras.label_tables import STEP
from loras.names import plain
from representations import RANKING

FINAL = math.inf  # the step of an adapter that lies in no checkpoint's folder
MOST_STEPS = 12
RUNS = 3  # of classifiers, unless all controls are asked for
KERNELS = ("update_views", "update_kernel")  # of whole modules; the first that was run is trained
LORA_COLUMNS = ("lora", "lora_name")  # of a table whose files lie in no folders of checkpoints
WHICH = "Name each file's LoRA in a column lora of the table."

Trainings = dict[str, dict[float, int]]  # row of each step, by LoRA


class UnfollowedError(ValueError):
    """Steps that are there and cannot be compared; the message says why, as a part of a sentence."""


def follow_steps(experiment: Experiment, names: Sequence[str]) -> dict | None:
    """Return ``analysis.dynamics`` of results.json; None where no LoRA has several steps."""
    try:
        trainings = trainings_of(experiment.collection)
        if not any(len(rows) > 1 for rows in trainings.values()):
            return None
        design = Design.of(experiment, trainings)
    except UnfollowedError as error:
        return unanswered(str(error))
    experiment.inputs.release()  # memory, for those of the steps
    followed = _train(experiment, design, names)
    return analyse_steps(followed, experiment.settings.seed)


# ----------------------------------------------------------------------------------------------------------------------
# Which files are which steps of which LoRA
# ----------------------------------------------------------------------------------------------------------------------


def trainings_of(collection: Collection) -> Trainings:
    """Return the rows of a collection's LoRAs by step; none where there are no steps to be told apart.

    Raises:
        UnfollowedError: Two files are the same step of one LoRA, or nothing says of which LoRA files are.
    """
    if any(len(paths) > 1 for paths in collection.choice.groups.values()):
        return _of_folders(collection)
    if collection.table and STEP in collection.table.columns:
        return _of_table(collection)
    return {}


def has_steps(collection: Collection) -> bool:
    """Return whether some LoRA has several steps that can be compared."""
    try:
        return any(len(rows) > 1 for rows in trainings_of(collection).values())
    except UnfollowedError:
        return False


def _of_folders(collection: Collection) -> Trainings:
    """Return what folders with checkpoints hold; of several files of one moment, the first."""
    choice, row_of = collection.choice, {file.path: row for row, file in enumerate(collection.files)}
    trainings: Trainings = defaultdict(dict)
    numbered = set()
    for (lora, number), path in choice.at.items():
        if number and path in row_of:
            trainings[lora][int(number)] = row_of[path]
            numbered.add(path)
    for (lora, number), path in choice.at.items():
        if not number and path in row_of and path not in numbered:
            trainings[lora][FINAL] = row_of[path]
    return dict(trainings)


def _of_table(collection: Collection) -> Trainings:
    """Return what a table with a column ``step`` names: LoRAs by a column of theirs, else by the folder of the files.

    Raises:
        UnfollowedError: Two files are the same step of one LoRA, or nothing says of which LoRA files are.
    """
    columns, paths = collection.columns, [file.path for file in collection.files]
    loras = next((columns[name] for name in LORA_COLUMNS if name in columns), {})
    steps = {row: _number(columns.get(STEP, {}).get(path)) for row, path in enumerate(paths)}
    steps = {row: step for row, step in steps.items() if step is not None}
    if len({*steps.values()}) < 2:
        return {}
    _refuse_class_folders(collection, [row for row in steps if not loras.get(paths[row])])
    trainings: Trainings = defaultdict(dict)
    for row, step in steps.items():
        lora = loras.get(paths[row]) or os.path.dirname(paths[row])
        if (other := trainings[lora].setdefault(step, row)) != row:
            pair = f"{plain(paths[other])} and {plain(paths[row])}"
            raise UnfollowedError(f"{pair} would be step {step_name(step)} of one LoRA. {WHICH}")
    return dict(trainings)


def _refuse_class_folders(collection: Collection, rows: Sequence[int]) -> None:
    """Refuse rows whose folder would stand for their LoRA, and holds several labels or all files of a class.

    Raises:
        UnfollowedError: A folder does.
    """
    y, of_class = collection.y, np.bincount(collection.y)
    by_folder = defaultdict(list)
    for row in rows:
        by_folder[os.path.dirname(collection.files[row].path)].append(row)
    for folder, members in by_folder.items():
        labels, counts = np.unique(y[members], return_counts=True)
        whole = [collection.classes[label] for label in labels[counts == of_class[labels]].tolist()]
        if len(labels) > 1 or whole:
            words = "files of several labels" if len(labels) > 1 else f"all files of the class {plain(whole[0])}"
            place = plain(folder) or "the collection's own folder"
            raise UnfollowedError(f"{place} holds {words}, which need not be steps of one LoRA. {WHICH}")


def _number(text: str | None) -> float | None:
    """Return the step that a table's cell names; None for one that is no number of a step."""
    text = checkpoints.step_named((text or "none").strip())
    if not text:
        return FINAL
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < FINAL and number == int(number) else None


def step_name(step: float) -> str:
    """Return a step as text."""
    return checkpoints.FINAL if step == FINAL else str(int(step))


# ----------------------------------------------------------------------------------------------------------------------
# Which steps are compared, on which LoRAs
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """The steps that are compared, and the LoRAs that have all of them.

    Attributes:
        steps: The S steps, ascending.
        left_out: Other steps.
        rows: Rows of each part of the split by step, int64[S, .].
        loras: Number of LoRAs, with those that are left out.
    """

    steps: list[float]
    left_out: list[float]
    rows: dict[str, np.ndarray]
    loras: int

    @classmethod
    def of(cls, experiment: Experiment, trainings: Trainings) -> Design:
        """Return the design of an experiment.

        Raises:
            UnfollowedError: Too few LoRAs have the same steps, or steps of one LoRA are in several parts of the split.
        """
        part_of = {row: part for part, rows in experiment.rows.items() for row in rows.tolist()}
        files, y = experiment.collection.files, experiment.collection.y
        used = {lora: {step: row for step, row in rows.items() if row in part_of} for lora, rows in trainings.items()}
        used = {lora: rows for lora, rows in used.items() if rows}
        steps = choose_steps(used)
        rows = defaultdict(list)
        for lora in sorted(used):
            if not used[lora].keys() >= {*steps}:
                continue
            of_lora = [used[lora][step] for step in steps]
            if len(parts := {part_of[row] for row in of_lora}) > 1:
                words = f"steps of {plain(lora)} are on several sides of the split, as {plain(files[of_lora[0]].path)}"
                raise UnfollowedError(f"{words}. Keep those of a LoRA together: --group-column names its column.")
            if len({*y[of_lora].tolist()}) == 1:  # of several labels, it is no training of one concept
                rows[parts.pop()].append(of_lora)
        by_step = {part: np.array(rows[part], int).reshape(-1, len(steps)).T for part in experiment.rows}
        others = sorted({step for of_lora in used.values() for step in of_lora} - {*steps})
        design = cls(steps, others, by_step, len(used))
        design.check(y)
        return design

    def check(self, y: np.ndarray) -> None:
        """Refuse what no classifier can be trained on, given the class of each row.

        Raises:
            UnfollowedError: There is too little.
        """
        if len(self.steps) < 2:
            raise UnfollowedError("no two steps are there of half of the LoRAs.")
        missing = set(y.tolist()) - set(y[self.rows["train"][0]].tolist())
        if missing or not self.rows["validation"].size or self.rows["test"].shape[1] < 2:
            named = ", ".join(map(step_name, self.steps))
            few = "a class has no train LoRA" if missing else "there are too few validation or test LoRAs"
            raise UnfollowedError(f"{few} with all of the steps {named}.")

    @property
    def places(self) -> np.ndarray:
        """Binary logarithms of the steps, float[S]."""
        return places_of(self.steps)


def choose_steps(trainings: Trainings) -> list[float]:
    """Return the steps that are compared, ascending: those of at least half of the LoRAs, at most twelve.

    As long as fewer than half of the LoRAs have all of them, the rarest, or the earliest of these, is left out. Of more
    than twelve those are taken that are nearest to an even spread of their logarithms, with the first and the last.
    """
    held = Counter(step for rows in trainings.values() for step in rows)
    steps = sorted(step for step, count in held.items() if 2 * count >= len(trainings))
    while len(steps) > 1 and 2 * sum(rows.keys() >= {*steps} for rows in trainings.values()) < len(trainings):
        steps.remove(min(steps, key=lambda step: (held[step], step)))
    if len(steps) > MOST_STEPS:
        places = places_of(steps)
        even = np.linspace(places[0], places[-1], MOST_STEPS)
        steps = [steps[i] for i in np.unique(np.abs(places - even[:, None]).argmin(1)).tolist()]
    return steps


def places_of(steps: Sequence[float]) -> np.ndarray:
    """Return binary logarithms of steps, float[S]; step 0 is half the next one, and the final one twice the one before.

    Example:
        >>> places_of([0, 100, 200, FINAL]).round(2).tolist()
        [5.64, 6.64, 7.64, 8.64]
    """
    numbers = np.array(steps, float)
    if len(steps) > 1 and numbers[0] == 0:
        numbers[0] = numbers[1] / 2 if numbers[1] < FINAL else 1
    if len(steps) > 1 and numbers[-1] == FINAL:
        numbers[-1] = 2 * numbers[-2]
    return np.log2(np.maximum(numbers, 1e-9))


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def _train(experiment: Experiment, design: Design, names: Sequence[str]) -> Followed:
    """Train classifiers at each step; keep what they predict for predictions.npz.

    Raises:
        TrainingError: A training diverged, or memory ran out.
    """
    kernel = next((name for name in KERNELS if name in names), None)
    modules_why = "" if kernel else f"neither {KERNELS[0]} nor {KERNELS[1]} was run"
    if kernel and experiment.settings.controls != "all" and not experiment.inputs.modules.kernels(kernel).keeps:
        modules_why = "the kernels of all modules are too large to be kept; --controls=all trains them all the same"
    predicted = [_train_at(experiment, design, s, kernel, not modules_why) for s in range(len(design.steps))]
    last = predicted[-1]  # by name, (R or P, S, T); of other steps (R or P, 1, T)
    arrays = {
        name: Curve(np.stack([step[name][:, -1] for step in predicted]), last[name].swapaxes(0, 1)) for name in last
    }
    collection, tested = experiment.collection, design.rows["test"][-1]
    kept = experiment.predictions.further
    kept["dynamics/rows"] = design.rows["test"]
    for name, curve in arrays.items():
        kept |= {f"dynamics/{name}/{how}": array for how, array in curve._asdict().items()}
    alone = arrays.pop("modules", None)
    sizes = {part: rows.shape[1] for part, rows in design.rows.items()}
    counts = {"followed": sum(sizes.values()), "left_out": design.loras - sum(sizes.values())}
    return Followed(
        steps=[step_name(step) for step in design.steps],
        places=design.places,
        left_out=[step_name(step) for step in design.left_out],
        counts=counts | {"trained": sizes["train"], "tested": sizes["test"]},
        classes=collection.classes,
        truth=collection.y[tested],
        groups=tested if collection.groups is None else collection.groups[tested],
        curves=arrays,
        modules=None if alone is None else _modules(experiment, kernel, alone),
        modules_why=modules_why,
    )


def _train_at(
    experiment: Experiment, design: Design, step: int, kernel: str | None, with_modules: bool
) -> dict[str, np.ndarray]:
    """Train at one step, by its position; return the predicted classes of the test LoRAs.

    Those are as they are at that step; where it is the last, at all steps.

    Returns:
        Of each representation int[R, 1 or S, T], and of the ``modules`` alone int[P, 1 or S, T].
    """
    rows = {part: of_steps[step] for part, of_steps in design.rows.items()}
    if step == len(design.steps) - 1:
        rows["test"] = design.rows["test"].ravel()
    every = experiment.settings.controls == "all"
    runs = experiment.settings.num_runs if every else min(RUNS, experiment.settings.num_runs)
    again = experiment.again(experiment.collection, rows, runs)
    label = f"step {step_name(design.steps[step])}"
    plans = {RANKING: again.plan(RANKING, [], label)}
    if kernel:
        modules = len(again.inputs.pairs)
        masks = np.concatenate(
            [np.ones((1, modules), bool), np.eye(modules if with_modules else 0, modules, dtype=bool)]
        )
        plans[kernel] = again.planner.plan_kernels(kernel, masks, f"{label} {kernel}")
    predicted = {}
    for name, plan in plans.items():
        scores = again.planner.carry_out(plan, again.progress)["predicted"][:, len(rows["validation"]) :]
        predicted[name] = scores.reshape(len(scores), -1, design.rows["test"].shape[1])
    again.inputs.release()
    if kernel:
        predicted |= {kernel: predicted[kernel][:1]} | ({"modules": predicted[kernel][1:]} if with_modules else {})
    smallest = np.min_scalar_type(len(experiment.collection.classes))
    return {name: array.astype(smallest) for name, array in predicted.items()}


def _modules(experiment: Experiment, kernel: str, alone: Curve) -> Modules:
    """Return what is told of modules, from one of the two layers of each."""
    layers = [experiment.layers[members[0]] for members in experiment.inputs.members]
    facts = ([getattr(layer, fact) for layer in layers] for fact in ("module", "block", "attention", "projection"))
    return Modules(kernel, *facts, alone)
