"""Plans: which models train in which unit, and the scores of those that are finished.

Which models share a unit is fixed by the collection, the flags and the kind of device, never by what is left to do, who
works, or free memory.

Shape letters: M models, F features, P pairs of layers, K conditions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise

import numpy as np
import torch

from experiment import store
from experiment.engine import Engine
from experiment.inputs import Inputs, Source
from experiment.networks import NETWORKS
from experiment.settings import STACK_PARAMETERS, Settings, count_cores
from experiment.units import OutOfMemory, Unit, Units, one_memory_error
from representations import REPRESENTATIONS
from training import kernels
from training.classifier import DROPOUT, Models, scored, train_classifiers
from training.stacks import Schedule


class TrainingError(RuntimeError):
    """Something without which the experiment cannot go on could not be trained; the message says why."""


@dataclass(frozen=True)
class Plan:
    """Models that read the same inputs: ``keys`` of the units that hold them, ``todo`` the units themselves."""

    label: str
    keys: list[dict]
    todo: list[Unit]


class Planner:
    """Planner of the classifiers and support vector machines of an experiment.

    Args:
        settings: Schedule, seed, device.
        inputs: What they read.
        units: Where finished ones lie.
        engine: Will train.

    Attributes:
        smaller_stacks: By label, the size of the smallest stack that had to be smaller than planned.
    """

    def __init__(self, settings: Settings, inputs: Inputs, units: Units, engine: Engine):
        self.settings, self.inputs = settings, inputs
        self.units, self.engine = units, engine
        self.smaller_stacks: dict[str, int] = {}
        self.y, self.num_classes = inputs.samples.y, inputs.samples.num_classes
        self.held_out = np.concatenate([inputs.rows["validation"], inputs.rows["test"]])

    def plan_classifiers(
        self,
        source: Source,
        live: np.ndarray,
        models: list[tuple[int, int]],
        label: str,
        at_most: int | None = None,
        keep_parameters: bool = False,
    ) -> Plan:
        """Plan classifiers in stacks: multilayer perceptrons, or the networks of a representation that is trained.

        Args:
            source: What they read.
            live: The columns of it that they see, bool[F], or bool[M, F] where each sees others.
            models: (source, run) of each model, in the order that fills the stacks.
            label: For the progress bar, and to report smaller stacks.
            at_most: Models in a stack, even where it would take more; None: no bound.
            keep_parameters: Whether those of networks are kept, to be read afterwards.
        """
        schedule, parameters = self._size(source, live.shape[-1])
        at_once = max(1, min(STACK_PARAMETERS[self.settings.device.type] // parameters, at_most or len(models)))
        live_of_model = np.broadcast_to(live, (len(models), live.shape[-1]))
        key = {"kind": "classifier", "inputs": asdict(source), "schedule": asdict(schedule), "dropout": DROPOUT}
        key |= self.inputs.depends_on(source.name)
        keep_parameters &= source.name in NETWORKS
        key |= {"parameters": True} if keep_parameters else {}
        stacks = _stacks(len(models), at_once)
        keys, units = [], []
        for stack in stacks:
            seen = _common(live_of_model[stack])
            keys.append({**key, "live": store.array_digest(seen), "models": [models[i] for i in stack]})
            training = Training(
                source,
                [models[i] for i in stack],
                Packed.of(seen),
                self.y,
                self.num_classes,
                self.settings,
                keep_parameters,
            )
            compute, positions = partial(_train, training=training), list(range(len(stack)))
            units.append(self.units.unit(keys[-1], self.inputs.description, compute, positions, label))
        self._prepare(source, units)
        return Plan(label, keys, units)

    def _size(self, source: Source, columns: int) -> tuple[Schedule, int]:
        """Return the schedule of the classifiers that read a source, and the parameters of each."""
        if source.name in NETWORKS:
            network = NETWORKS[source.name]
            schedule = network.schedule(self.settings)
            return schedule, network.parameters(self.inputs.modules.shapes, self.num_classes, schedule)
        schedule = self.settings.classifier
        widths = (columns, *schedule.hidden, self.num_classes)
        return schedule, sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))

    def _prepare(self, source: Source, units: list[Unit]) -> None:
        """Write what worker processes on CPUs share before they begin, that it is not done twice."""
        if self.inputs.description.folder is None or all(unit.path.exists() for unit in units):
            return
        with suppress(OutOfMemory), one_memory_error():  # each unit will meet it, and report it
            self.engine.call(partial(self.inputs.prepare, source))

    def plan_kernels(self, name: str, kept: np.ndarray, label: str) -> Plan:
        """Plan a support vector machine for each choice of pairs, bool[K, P]; one run each, as nothing is drawn."""
        stacks = _stacks(len(kept), self.inputs.modules.kernels(name).at_once)
        key = {"kind": "kernel", "name": name, "sklearn": version("scikit-learn")}
        keys = [{**key, "pairs": store.array_digest(kept[stack]), "models": len(stack) * [0]} for stack in stacks]

        units = []
        for key, stack in zip(keys, stacks, strict=True):
            fit = partial(_fit_kernels, name=name, kept=kept[stack], y=self.y, num_classes=self.num_classes)
            # The kernels stay in memory, for all units.
            description, positions = self.inputs.description, list(range(len(stack)))
            units.append(self.units.unit(key, description, fit, positions, label, in_main=True))
        return Plan(label, keys, units)

    def carry_out(self, plan: Plan, progress: Callable[[str, int, int], None]) -> dict[str, np.ndarray]:
        """Do the work of a plan; return its scores.

        Raises:
            TrainingError: A training diverged, or memory ran out.
        """
        for done, reason in enumerate(self.engine.do(plan.todo), 1):
            progress(plan.label, done, len(plan.todo))
            if reason:
                raise TrainingError(reason)
        return self.load_scores(plan)

    def load_scores(self, plan: Plan) -> dict[str, np.ndarray]:
        """Return the arrays of finished units, and the metrics of every part of the split, for all models of a plan."""
        self.note_smaller(plan.keys, plan.label)
        finished = [self.units.load(key) for key in plan.keys]
        scores = {name: np.concatenate([arrays[name] for arrays in finished]) for name in finished[0]}
        boundary = len(self.inputs.rows["validation"])
        for name, part in (("val", slice(None, boundary)), ("test", slice(boundary, None))):
            truth, predicted = self.y[self.held_out[part]], scores["predicted"][:, part]
            scores[f"{name}_accuracy"], scores[f"{name}_f1"] = scored(truth, predicted, self.num_classes)
        return scores

    def note_smaller(self, keys: list[dict], label: str) -> None:
        """Note where finished stacks were smaller than planned."""
        if (size := self.units.smaller_stack(keys)) is not None:
            self.smaller_stacks[label] = min(size, self.smaller_stacks.get(label, size))


@dataclass(frozen=True)
class Packed:
    """A mask bool[..., F], eight columns in a byte."""

    bits: np.ndarray
    columns: int

    @classmethod
    def of(cls, mask: np.ndarray) -> Packed:
        """Return a mask packed."""
        return cls(np.packbits(mask, axis=-1), mask.shape[-1])

    def unpacked(self) -> np.ndarray:
        """Return the mask."""
        return np.unpackbits(self.bits, axis=-1, count=self.columns).astype(bool)


@dataclass(frozen=True)
class Training:
    """A stack of classifiers that is to be trained, as `Planner.plan_classifiers` plans it.

    Attributes:
        source: What they read.
        models: (source, run) of each of M.
        live: The columns that they see, bool[F] or bool[M, F].
        y: Class of each LoRA, int64[N].
        num_classes: Number of classes.
        settings: Schedule and seed.
        keep_parameters: Whether those of networks are kept.
    """

    source: Source
    models: list[tuple[int, int]]
    live: Packed
    y: np.ndarray
    num_classes: int
    settings: Settings
    keep_parameters: bool


def _train(inputs: Inputs, stack: list[int], training: Training) -> dict[str, np.ndarray]:
    """Train the models at these positions of a stack."""
    source, settings = training.source, training.settings
    source_of_model, run = (torch.tensor(column) for column in zip(*(training.models[i] for i in stack), strict=True))
    x, y = inputs.read(source), torch.from_numpy(training.y).to(inputs.device)
    live = training.live.unpacked()
    live = np.broadcast_to(live, (len(training.models), live.shape[-1]))[stack]
    stacked = Models(source_of_model, run, None if live.all() else torch.from_numpy(live))
    if source.name in NETWORKS:
        network = NETWORKS[source.name]
        how = inputs.modules.shapes, network.schedule(settings), settings.seed, training.keep_parameters
        return network.train(x, y, inputs.split, stacked, training.num_classes, *how)
    row = REPRESENTATIONS[source.name]
    attributed = (row.unit, row.made) == ("layer", "computed") and not source.each_layer
    return train_classifiers(
        x,
        y,
        inputs.split,
        stacked,
        training.num_classes,
        schedule=settings.classifier,
        seed=settings.seed,
        block=len(row.feature_names) if attributed else None,
    )


def _fit_kernels(
    inputs: Inputs, stack: list[int], name: str, kept: np.ndarray, y: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    """Fit a support vector machine to each choice of pairs at these positions of ``kept`` bool[K, P]."""
    threads = 1 if inputs.device.type == "cpu" else count_cores()  # beside a GPU most cores are idle
    return kernels.classify_each(inputs.modules.kernels(name), kept[stack], y, inputs.rows, num_classes, threads)


def _stacks(count: int, at_once: int) -> list[list[int]]:
    """Return the positions of so many models in stacks."""
    return [list(range(start, min(start + at_once, count))) for start in range(0, count, at_once)]


def _common(rows: np.ndarray) -> np.ndarray:
    """Return the row that all rows equal, or else all of them."""
    return rows[0] if (rows == rows[0]).all() else rows
