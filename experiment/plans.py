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
from itertools import pairwise

import numpy as np
import sklearn
import torch

from experiment import store
from experiment.inputs import Inputs, Source
from experiment.networks import NETWORKS
from experiment.settings import STACK_PARAMETERS, Settings
from experiment.units import OutOfMemory, Units, one_memory_error
from experiment.workers import Task, Workers
from representations import REPRESENTATIONS
from training import kernels
from training.classifier import DROPOUT, Models, scored, train_classifiers
from training.stacks import Schedule


class TrainingError(RuntimeError):
    """Something without which the experiment cannot go on could not be trained; the message says why."""


@dataclass(frozen=True)
class Plan:
    """Models that read the same inputs: ``keys`` of the units that hold them, ``tasks`` the work that is to be done."""

    label: str
    keys: list[dict]
    tasks: list[Task]


class Planner:
    """Planner of the classifiers and support vector machines of an experiment.

    Args:
        settings: Schedule, seed, device.
        inputs: What they read.
        units: Where finished ones lie.
        workers: Who will train.

    Attributes:
        smaller_stacks: By label, the size of the smallest stack that had to be smaller than planned.
    """

    def __init__(self, settings: Settings, inputs: Inputs, units: Units, workers: Workers):
        self.settings, self.inputs = settings, inputs
        self.units, self.workers = units, workers
        self.smaller_stacks: dict[str, int] = {}
        self.y, self.num_classes = inputs.collection.y, len(inputs.collection.classes)
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
        if REPRESENTATIONS[source.name].made == "autoencoder":
            key |= self.inputs.learned.key()
        keep_parameters &= source.name in NETWORKS
        key |= {"parameters": True} if keep_parameters else {}
        stacks = _stacks(len(models), at_once)
        keys = [
            {**key, "live": store.array_digest(_common(live_of_model[stack])), "models": [models[i] for i in stack]}
            for stack in stacks
        ]
        compute = partial(self._train_classifiers, source, live_of_model, models, keep_parameters)
        tasks = [self.units.task(key, compute, stack, label) for key, stack in zip(keys, stacks, strict=True)]
        self._read_before_fork(source, tasks)
        return Plan(label, keys, tasks)

    def _size(self, source: Source, columns: int) -> tuple[Schedule, int]:
        """Return the schedule of the classifiers that read a source, and the parameters of each."""
        if source.name in NETWORKS:
            network = NETWORKS[source.name]
            schedule = network.schedule(self.settings)
            return schedule, network.parameters(self.inputs.modules.shapes, self.num_classes, schedule)
        schedule = self.settings.classifier
        widths = (columns, *schedule.hidden, self.num_classes)
        return schedule, sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))

    def _read_before_fork(self, source: Source, tasks: list[Task]) -> None:
        """Read into this process what is large, so that those forked from it share it."""
        if not self.workers.forks or all(task.finished() for task in tasks):
            return
        with suppress(OutOfMemory), one_memory_error():  # each task will meet it, and report it
            if REPRESENTATIONS[source.name].made == "flat":
                self.workers.call_prepared(self.inputs.flat_weights.ready)
            elif source.name in NETWORKS:
                self.workers.call_prepared(lambda: self.inputs.read(source))

    def _train_classifiers(
        self,
        source: Source,
        live: np.ndarray,
        models: list[tuple[int, int]],
        keep_parameters: bool,
        stack: list[int],
    ) -> dict[str, np.ndarray]:
        source_of_model, run = (torch.tensor(column) for column in zip(*(models[i] for i in stack), strict=True))
        x, y = self.inputs.read(source), torch.from_numpy(self.y).to(self.settings.device)
        stacked = Models(source_of_model, run, None if live[stack].all() else torch.from_numpy(live[stack]))
        inputs, settings = self.inputs, self.settings
        if source.name in NETWORKS:
            network = NETWORKS[source.name]
            modules, schedule = inputs.modules.shapes, network.schedule(settings)
            how = modules, schedule, settings.seed, keep_parameters
            return network.train(x, y, inputs.split, stacked, self.num_classes, *how)
        row = REPRESENTATIONS[source.name]
        attributed = (row.unit, row.made) == ("layer", "computed") and not source.each_layer
        return train_classifiers(
            x,
            y,
            inputs.split,
            stacked,
            self.num_classes,
            schedule=settings.classifier,
            seed=settings.seed,
            block=len(row.feature_names) if attributed else None,
        )

    def plan_kernels(self, name: str, kept: np.ndarray, label: str) -> Plan:
        """Plan a support vector machine for each choice of pairs, bool[K, P]; one run each, as nothing is drawn."""
        stacks = _stacks(len(kept), self.inputs.modules.kernels(name).at_once)
        key = {"kind": "kernel", "name": name, "sklearn": sklearn.__version__}
        keys = [{**key, "pairs": store.array_digest(kept[stack]), "models": len(stack) * [0]} for stack in stacks]

        def compute(stack: list[int]) -> dict[str, np.ndarray]:
            of_modules, rows = self.inputs.modules.kernels(name), self.inputs.rows
            return kernels.classify_each(of_modules, kept[stack], self.y, rows, self.num_classes)

        # The kernels stay in memory, for all tasks.
        tasks = [self.units.task(key, compute, stack, label, True) for key, stack in zip(keys, stacks, strict=True)]
        return Plan(label, keys, tasks)

    def carry_out(self, plan: Plan, progress: Callable[[str, int, int], None]) -> dict[str, np.ndarray]:
        """Do the work of a plan; return its scores.

        Raises:
            TrainingError: A training diverged, or memory ran out.
        """
        for done, reason in enumerate(self.workers.do(plan.tasks), 1):
            progress(plan.label, done, len(plan.tasks))
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


def _stacks(count: int, at_once: int) -> list[list[int]]:
    """Return the positions of so many models in stacks."""
    return [list(range(start, min(start + at_once, count))) for start in range(0, count, at_once)]


def _common(rows: np.ndarray) -> np.ndarray:
    """Return the row that all rows equal, or else all of them."""
    return rows[0] if (rows == rows[0]).all() else rows
