"""What is trained, in which units: the ranking of layers, what is learned from weights, and all representations.

An experiment is a collection under one split and one set of settings. Every training is a stack of models, and a
finished stack is a unit of work, named by all that it depends on: each is trained once, by whichever thread is free.

Shape letters: N LoRAs, L layers, P modules (pairs of layers), F features, S input sources.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import sklearn
import torch

import autoencoders
from data import Collection
from experiment import store
from experiment.extraction import Extracted
from experiment.workers import Crew, Task, TaskFailedError
from representations import MEASURES, REPRESENTATIONS
from training import kernels
from training.classifier import DROPOUT, HIDDEN, Models, scored, train_classifiers
from training.pca import PCA
from training.stacks import Schedule, Split, Stored, standardise

# Parameters in a stack: of 4 classifiers of one layer for a CPU, near whose caches they stay; of 561 for a GPU.
STACK_PARAMETERS = {"cpu": 2_200_000, "cuda": 300_000_000}
# Of 4 to 12 autoencoders for a CPU: enough stacks to keep its threads busy to the end.
AUTOENCODER_PARAMETERS = {"cpu": 7_000_000, "cuda": 300_000_000}
RUNS_IN_STACK = {"cpu": 1, "cuda": 10}  # of one representation, so that more runs find the first ones finished
MEMORY_SHARE = 0.6  # of the device's memory that resident weights may take
PCA_COMPONENTS = 100
ATTRIBUTED = "stats"  # the representation of whose classifiers gradient attribution is kept
EACH_LAYER = "stats, layer by layer"  # what the classifiers of the ranking read


# What running out of memory raises: torch on a GPU, numpy, torch on a CPU; the last one raises it for much else too.
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError, RuntimeError)


class TrainingError(RuntimeError):
    """What cannot go on without it could not be trained; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What the experiment does, resolved from the flags."""

    top_k: int
    num_runs: int
    rank_by: str
    seed: int
    quick: bool
    device: torch.device
    representations: tuple[str, ...]
    layers: str | None  # pattern; see `data.select_layers`
    controls: str  # one of `comparisons.LEVELS`
    null_shuffles: int  # rankings to train on shuffled labels
    classifier: Schedule
    autoencoder: Schedule

    def config(self) -> dict:
        """What results.json keeps of the settings: all that decides the numbers, no path and no machine."""
        return {
            "top_k": self.top_k,
            "num_runs": self.num_runs,
            "rank_by": self.rank_by,
            "seed": self.seed,
            "quick": self.quick,
            "device": self.device.type,
            "representations": list(self.representations),
            "layers": self.layers,
            "controls": self.controls,
            "null_shuffles": self.null_shuffles,
            "classifier": {**asdict(self.classifier), "hidden": list(HIDDEN), "dropout": DROPOUT},
            "autoencoder": asdict(self.autoencoder),
            "stack": {
                "parameters": STACK_PARAMETERS[self.device.type],
                "autoencoder_parameters": AUTOENCODER_PARAMETERS[self.device.type],
                "runs": RUNS_IN_STACK[self.device.type],
            },
        }


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory does not do."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def start_thread(device: torch.device) -> None:
    """What each thread does first: use one core, and the process's GPU.

    Results then do not depend on the number of threads. Classifiers that are sure of their train rows are full of
    numbers below 1e-38, over which a CPU takes many times as long: they count as 0.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)


@dataclass(frozen=True)
class StoredRows:
    """Some rows and columns of the packed weights, given out in blocks of rows: what PCA asks of a matrix."""

    packed: store.Shards
    rows: np.ndarray
    columns: np.ndarray
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), len(self.columns)

    def split(self, length: int) -> Iterator[torch.Tensor]:
        """Blocks float32[length, F] on the device; the last may be shorter."""
        for start in range(0, len(self.rows), length):
            block = self.packed.read(self.rows[start : start + length], self.columns)
            yield torch.from_numpy(block).to(self.device)


@dataclass(frozen=True)
class Classifiers:
    """Classifiers that read the same inputs: which columns of them are live, and the stacks that hold the models.

    ``live`` bool[F]; ``keys`` are of the finished stacks, ``tasks`` the work that finishes them.
    """

    label: str
    num_layers: int
    live: np.ndarray
    keys: list[dict]
    tasks: list[Task]


class Experiment:
    """A collection under one split and one set of settings; the phases' trainings, each unit of work done once."""

    def __init__(
        self,
        settings: Settings,
        collection: Collection,
        selected: np.ndarray,
        rows: dict,
        extracted: Extracted,
        crew: Crew,
        progress: Callable[[str, int, int], None],
    ):
        self.settings, self.collection, self.rows, self.extracted = settings, collection, rows, extracted
        self.device, self.crew, self.progress = settings.device, crew, progress
        self.selected = selected
        self.depths = np.flatnonzero(selected)  # of the L layers that the experiment is about, in the files' layers
        self.layers = [collection.layers[depth] for depth in self.depths]
        self.widths = np.array(collection.weights_per_layer)[self.depths]
        self.pair_of_layer = collection.pair_of_layer[self.depths]
        self.pairs = np.flatnonzero(np.bincount(self.pair_of_layer) == 2)  # of which both layers are there
        self.split = Split(*(torch.from_numpy(rows[part]) for part in ("train", "validation", "test"))).to(self.device)
        self.y = torch.from_numpy(collection.y).to(self.device)
        self.held_out = np.concatenate([rows["validation"], rows["test"]])
        self.units = store.Units(extracted.folder / "units")
        self.predictions = {"rows": self.held_out, "y": collection.y[self.held_out]}
        self.smaller_stacks: dict[str, int] = {}  # made so for want of memory
        self.ranking: np.ndarray | None = None  # layers, most predictive first, int64[L]; see `rank_layers`
        self._inputs: dict[str, torch.Tensor | Stored] = {}  # of the latest classifiers
        self._one_reads = threading.Lock()
        self._pca_keys: dict[str, dict] = {}  # of finished scores, by what classifiers call them
        self.key = {  # what every unit depends on beside its models
            "code": store.code_digest("training", "experiment/phases", "experiment/store"),
            "features": extracted.suffix,
            "torch": torch.__version__,
            "device": self.device.type,
            "seed": settings.seed,
            "layers": store.array_digest(selected),
            "labels and split": store.array_digest(collection.y, *rows.values()),
        }

    def features(self, name: str) -> torch.Tensor:
        """Cached features on the device, float32[N, L or P, F]."""
        items = self.pairs if (REPRESENTATIONS | MEASURES)[name].kind == "pair" else self.depths
        return torch.from_numpy(self.extracted.load(name)[:, items]).to(self.device)

    def columns(self, kept: np.ndarray) -> np.ndarray:
        """Where the weights of layers ``kept`` bool[L] lie among those of a file, int64[W]."""
        in_files = np.zeros(len(self.collection.layers), bool)
        in_files[self.depths[kept]] = True
        return np.flatnonzero(np.repeat(in_files, self.collection.weights_per_layer))

    def whole_pairs(self, kept: np.ndarray) -> np.ndarray:
        """Which pairs have both layers among those kept, bool[..., L] -> bool[..., P]."""
        members = [np.flatnonzero(self.pair_of_layer == pair) for pair in self.pairs]
        return kept[..., np.array(members, int).reshape(-1, 2)].all(-1)

    def live_inputs(self, name: str, kept: np.ndarray) -> np.ndarray:
        """Which inputs of a representation are of layers kept, bool[..., L] -> bool[..., F]; not of pca.

        The inputs of a kernel are the pairs whose kernels are summed.
        """
        kind = REPRESENTATIONS[name].kind
        if kind == "kernel":
            return self.whole_pairs(kept)
        if kind == "pair":  # a pair with one layer left is none
            return np.repeat(self.whole_pairs(kept), len(REPRESENTATIONS[name].feature_names), axis=-1)
        if kind == "matrix":
            return np.repeat(kept, len(REPRESENTATIONS[name].feature_names), axis=-1)
        widths = self.widths.tolist()
        if kind == "autoencoder":
            widths = [autoencoders.latent_width(name, width) for width in widths]
        return np.repeat(kept, widths, axis=-1)

    # -- units of work ------------------------------------------------------------------------------------------------

    def task(self, key: dict, compute: Callable[[list], dict], stack: list, label: str, here: bool = False) -> Task:
        """The work of ``compute(stack)``; where training diverges or memory does not do, the task has failed."""

        def attempt() -> dict[str, np.ndarray]:
            try:
                return self._within_memory(compute, stack, label)
            except FloatingPointError as error:
                raise TaskFailedError(str(error)) from error
            except OUT_OF_MEMORY as error:
                if not out_of_memory(error):
                    raise
                told = str(error).rstrip(". ")
                raise TaskFailedError(f"out of memory with one model at a time: {told}") from error

        return Task(self.units.path(key).exists, lambda: self.units.save(key, attempt()), here)

    def _within_memory(self, compute: Callable[[list], dict], stack: list, label: str) -> dict[str, np.ndarray]:
        """Arrays of a stack, trained in smaller ones if need be; ``stack`` int64[M] of them tells in how large ones.

        Each stack begins whole, whatever happened to others: so it does not matter who trains which.
        """
        at_once, start = len(stack), 0
        parts: list[dict[str, np.ndarray]] = []
        while start < len(stack):
            part = stack[start : start + at_once]
            try:
                parts.append(compute(part) | {"stack": np.full(len(part), at_once)})
                start += len(part)
                continue
            except OUT_OF_MEMORY as error:
                if len(part) == 1 or not out_of_memory(error):
                    raise
            torch.cuda.empty_cache()  # here, and not while the exception still holds what was allocated
            at_once = len(part) // 2
            told = f"  {label}: {len(part)} models do not fit the memory of {self.device}: trying {at_once} at once"
            print(told, flush=True)
        return {name: np.concatenate([arrays[name] for arrays in parts]) for name in parts[0]}

    def note_smaller(self, keys: list[dict], label: str) -> None:
        """Take down where finished stacks were smaller than planned, in this run or an earlier one."""
        made = [(int(self.units.load(key, ["stack"])["stack"].min()), len(key["models"])) for key in keys]
        if smaller := [size for size, planned in made if size < planned]:
            self.smaller_stacks[label] = min(smaller)

    # -- classifiers --------------------------------------------------------------------------------------------------

    def classifiers(
        self, source: str, live: np.ndarray, models: list, label: str, num_layers: int, at_most: int | None = None
    ) -> Classifiers:
        """Plan classifiers in stacks.

        Args:
            source: What they read, see `inputs`.
            live: Which of its columns they see, bool[F], or bool[M, F] where each sees others.
            models: (source, run) of each model, in the order that fills the stacks.
            label: For the progress bar, and to tell of smaller stacks.
            num_layers: How many layers the live columns are of.
            at_most: Models in a stack, even where it would take more; None: no bound.
        """
        classes, schedule = len(self.collection.classes), self.settings.classifier
        parameters = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise((live.shape[-1], *HIDDEN, classes)))
        at_once = max(1, min(STACK_PARAMETERS[self.device.type] // parameters, at_most or len(models)))
        stacks = [list(range(len(models)))[start : start + at_once] for start in range(0, len(models), at_once)]
        of_model = np.broadcast_to(live, (len(models), live.shape[-1]))
        key = {"kind": "classifier", **self.key, "inputs": source}
        key |= {"schedule": asdict(schedule), "hidden": HIDDEN, "dropout": DROPOUT}
        if source in autoencoders.AUTOENCODERS:
            key |= {"learner": store.code_digest("autoencoders"), "learned by": asdict(self.settings.autoencoder)}
        keys = [
            {**key, "live": store.array_digest(_common(of_model[stack])), "models": [models[i] for i in stack]}
            for stack in stacks
        ]
        compute = partial(self._train_classifiers, source, of_model, models)
        tasks = [self.task(key, compute, stack, label) for key, stack in zip(keys, stacks, strict=True)]
        if source == "flat_vec" and self.crew.forks and not all(task.finished() for task in tasks):
            try:
                self.crew.prepared(self._packed.ready)  # so that helpers, copies of this process, share what it holds
            except OUT_OF_MEMORY as error:  # which each task will meet, and tell
                if not out_of_memory(error):
                    raise
        return Classifiers(label, num_layers, live, keys, tasks)

    def _train_classifiers(
        self, source: str, live: np.ndarray, models: list, stack: list[int]
    ) -> dict[str, np.ndarray]:
        of_source, run = (torch.tensor(column) for column in zip(*(models[i] for i in stack), strict=True))
        return train_classifiers(
            self.inputs(source),
            self.y,
            self.split,
            Models(of_source, run, None if live[stack].all() else torch.from_numpy(live[stack])),
            len(self.collection.classes),
            schedule=replace(self.settings.classifier, hidden=HIDDEN),
            seed=self.settings.seed,
            block=len(REPRESENTATIONS[source].feature_names) if source == ATTRIBUTED else None,
            dropout=DROPOUT,
        )

    def trained(self, plan: Classifiers) -> dict[str, np.ndarray]:
        """The arrays of `train_classifiers`, and the metrics of every part of the split, for all models of a plan."""
        self.note_smaller(plan.keys, plan.label)
        finished = [self.units.load(key) for key in plan.keys]
        trained = {name: np.concatenate([arrays[name] for arrays in finished]) for name in finished[0]}
        boundary, classes = len(self.rows["validation"]), len(self.collection.classes)
        for name, part in (("val", slice(None, boundary)), ("test", slice(boundary, None))):
            truth = self.collection.y[self.held_out[part]]
            trained[f"{name}_accuracy"], trained[f"{name}_f1"] = scored(truth, trained["predicted"][:, part], classes)
        return trained

    def machines(self, kept: np.ndarray, label: str, num_layers: int) -> Classifiers:
        """Plan a support vector machine for each choice of pairs, bool[K, P]; one run each, as nothing is drawn."""
        at_once = self.update_kernels.at_once
        stacks = [list(range(len(kept)))[start : start + at_once] for start in range(0, len(kept), at_once)]
        key = {"kind": "kernel", **self.key, "sklearn": sklearn.__version__}
        keys = [{**key, "pairs": store.array_digest(kept[stack]), "models": len(stack) * [0]} for stack in stacks]

        def compute(stack: list[int]) -> dict[str, np.ndarray]:
            classes = len(self.collection.classes)
            return kernels.classify_each(self.update_kernels, kept[stack], self.collection.y, self.rows, classes)

        # The kernels stay in memory, for all tasks.
        tasks = [self.task(key, compute, stack, label, here=True) for key, stack in zip(keys, stacks, strict=True)]
        return Classifiers(label, num_layers, kept[0], keys, tasks)

    @cached_property
    def update_kernels(self) -> kernels.UpdateKernels:
        """Kernels of the pairs; nothing is read before the first is asked for."""
        read = self.extracted.factor_reader(self.collection)
        return kernels.UpdateKernels(
            lambda p, rows: read(int(self.pairs[p]), rows),
            len(self.pairs),
            self.rows["train"],
            len(self.collection.files),
            seed=self.settings.seed,
            device=self.device,
        )

    # -- phase 1 ------------------------------------------------------------------------------------------------------

    def rank_layers(self) -> list[dict]:
        """Every layer alone, on its seven statistics: records as in top_layers.json, most predictive first."""
        layers, runs = self.layers, self.settings.num_runs
        models = [(layer, run) for run in range(runs) for layer in range(len(layers))]
        live = np.ones(len(REPRESENTATIONS["stats"].feature_names), bool)
        plan = self.classifiers(EACH_LAYER, live, models, "ranking", num_layers=1)
        for done, reason in enumerate(self.crew.do(plan.tasks), 1):
            self.progress("ranking", done, len(plan.tasks))
            if reason:
                raise TrainingError(f"the layers cannot be ranked: {reason}")
        trained = self.trained(plan)
        by_layer = {name: a.reshape(runs, len(layers), *a.shape[1:]).swapaxes(0, 1) for name, a in trained.items()}
        for name in ("predicted", "log_loss", "epochs"):
            self.predictions[f"layers/{name}"] = by_layer[name]  # (L, runs, ...)
        records = [
            {
                "layer": layer.name,
                "accuracy": mean(by_layer["test_accuracy"][depth]),
                "accuracy_std": deviation(by_layer["test_accuracy"][depth]),
                "val_accuracy": mean(by_layer["val_accuracy"][depth]),
                "module": layer.module,
                "role": layer.role,
            }
            for depth, layer in enumerate(layers)
        ]
        # Ties: by validation accuracy, validation loss, depth; never by test accuracy where validation is to choose.
        by = ["accuracy"] * (self.settings.rank_by == "test") + ["val_accuracy"]
        loss = by_layer["validation_loss"].mean(1)
        order = sorted(range(len(layers)), key=lambda d: (*(-records[d][name] for name in by), loss[d], d))
        self.ranking = np.array(order)
        return [records[depth] for depth in order]

    # -- phases 2 and 3 -----------------------------------------------------------------------------------------------

    def evaluate(self, names: list[str], removed: list[int], condition: str) -> Iterator[tuple[str, dict | str]]:
        """Representations without some layers: of each its entry in results.json, or why there is none.

        Args:
            names: The representations; of learned ones, those that `learn` has fitted.
            removed: Depths of the layers that are left out.
            condition: "baseline" or "ablation", for the progress bar and predictions.npz.
        """
        plans = {name: self.plan(name, removed, condition) for name in names}
        outcomes = self.crew.do([task for plan in plans.values() for task in plan.tasks])
        for name, plan in plans.items():
            reasons = set()
            for done in range(1, len(plan.tasks) + 1):
                reasons.add(next(outcomes))
                self.progress(plan.label, done, len(plan.tasks))
            reason = max(reasons)
            yield name, reason or self.entry(name, plan, condition)
        next(outcomes, None)  # until the threads have ended

    def plan(self, name: str, removed: list[int], condition: str) -> Classifiers:
        """The classifiers of one representation without some layers."""
        source, kept = name, self.without(removed)
        num_layers = int(kept.sum())
        if REPRESENTATIONS[name].kind in ("pair", "kernel"):
            num_layers = 2 * int(self.whole_pairs(kept).sum())
        if REPRESENTATIONS[name].kind == "kernel":
            return self.machines(self.whole_pairs(kept)[None], f"{condition} {name}", num_layers)
        if name == "pca":  # components of what is left, not what is left of the components
            source = f"pca of layers {store.array_digest(kept)}"
            self._pca_keys[source], _ = self.principal_components(kept)
            live = np.ones(self.units.load(self._pca_keys[source])["scores"].shape[1], bool)
        else:
            live = self.live_inputs(name, kept)
        models = [(0, run) for run in range(self.settings.num_runs)]
        at_most = RUNS_IN_STACK[self.device.type]
        return self.classifiers(source, live, models, f"{condition} {name}", num_layers, at_most)

    def under(self, name: str, kept: np.ndarray) -> dict[str, np.ndarray]:
        """A representation under conditions kept bool[K, R, L], layers kept in each run; see `train_classifiers`.

        Equal conditions are trained once, and on a CPU those of the phases not again. Where no input is left nothing is
        trained: that predicts the largest class of the test rows.

        Returns:
            ``predicted`` int32[K, R, V + T], and ``attribution`` float32[K, R, L] of ``ATTRIBUTED``.

        Raises:
            TrainingError: A training diverged, or memory did not do.
        """
        conditions, runs, layers = kept.shape
        masks = np.concatenate([kept, np.broadcast_to(np.arange(runs)[:, None], (conditions, runs, 1))], axis=2)
        distinct, position = np.unique(masks.reshape(-1, layers + 1), axis=0, return_inverse=True)
        live = self.live_inputs(name, distinct[:, :layers].astype(bool))
        some = live.any(1)
        test = self.collection.y[self.rows["test"]]
        found = {"predicted": np.full((len(distinct), len(self.held_out)), np.bincount(test).argmax(), np.int32)}
        if name == ATTRIBUTED:
            found["attribution"] = np.zeros((len(distinct), layers), np.float32)
        if some.any():
            trained = self.trained(self._finished(self._plan_under(name, live[some], distinct[some, layers].tolist())))
            for array in found:
                found[array][some] = trained[array]
        return {array: values[position].reshape(conditions, runs, -1) for array, values in found.items()}

    def _plan_under(self, name: str, live: np.ndarray, runs: list[int]) -> Classifiers:
        """Classifiers of a representation that see the inputs ``live`` bool[M, F], each in its run."""
        if REPRESENTATIONS[name].kind == "kernel":
            return self.machines(live, f"controls {name}", len(self.layers))
        at_most = 1 if self.device.type == "cpu" else None
        models = [(0, run) for run in runs]
        return self.classifiers(name, live, models, f"controls {name}", len(self.layers), at_most)

    def _finished(self, plan: Classifiers) -> Classifiers:
        """The plan, carried out."""
        for done, reason in enumerate(self.crew.do(plan.tasks), 1):
            self.progress(plan.label, done, len(plan.tasks))
            if reason:
                raise TrainingError(reason)
        return plan

    def without(self, removed: list[int]) -> np.ndarray:
        """Which layers are kept, bool[L]."""
        kept = np.ones(len(self.layers), bool)
        kept[removed] = False
        return kept

    def entry(self, name: str, plan: Classifiers, condition: str) -> dict:
        """What results.json holds of finished classifiers; their predictions are kept too."""
        trained = self.trained(plan)
        for kind in ("predicted", "log_loss", "epochs"):
            if kind in trained:  # a kernel's classifier has neither losses nor epochs
                self.predictions[f"{condition}/{name}/{kind}"] = trained[kind]
        metrics = [f"{part}_{metric}" for metric in ("accuracy", "f1") for part in ("train", "val", "test")]
        return {
            "num_layers": plan.num_layers,
            "num_features": int(plan.live.sum()),
            **{
                m: {"mean": mean(trained[m]), "std": deviation(trained[m]), "runs": trained[m].tolist()}
                for m in metrics
            },
        }

    def inputs(self, source: str) -> torch.Tensor | Stored:
        """What classifiers read, standardised, float32[S, N, F].

        Those of the latest two sources are kept, as threads may be at either; a helper, which is one, keeps one.

        Args:
            source: A representation, `EACH_LAYER` (S is then L), or principal components by the layers they are of.
        """
        with self._one_reads:
            if source not in self._inputs:
                while len(self._inputs) > (0 if self.crew.forks else 1):
                    del self._inputs[next(iter(self._inputs))]
                self._inputs[source] = self._read(source)
            return self._inputs[source]

    def _read(self, source: str) -> torch.Tensor | Stored:
        if source == EACH_LAYER:
            return standardise(self.features("stats").transpose(0, 1).contiguous(), self.split.train)  # (L, N, 7)
        if source == "flat_vec":
            return self._packed
        if source.startswith("pca"):
            x = torch.from_numpy(self.units.load(self._pca_keys[source])["scores"])
        elif source in autoencoders.AUTOENCODERS:
            x = torch.from_numpy(np.concatenate(self.encoded(source), axis=1))
        else:
            x = self.features(source).flatten(1)
        return standardise(x.to(self.device), self.split.train)[None]

    @cached_property
    def _packed(self) -> Stored:
        """The weights; held on the device where they fit it, and read only if a stack is to be trained."""
        packed, columns = self.extracted.weights(), self.columns(self.without([]))
        shape = packed.shape[0], len(columns)
        read = packed.read if shape == packed.shape else partial(packed.read, columns=columns)
        fits = 4 * math.prod(shape) < MEMORY_SHARE * memory_of(self.device)
        return Stored(read, shape, self.split.train, hold=fits)

    # -- what is learned from the weights -----------------------------------------------------------------------------

    def learn(self, names: list[str], conditions: list[list[int]]) -> dict[str, str]:
        """Fit autoencoders, and PCA under each condition, a list of removed layers; why it failed, by representation.

        Everything is fitted on train rows only.
        """
        work: list[tuple[str, Task]] = []
        for name in names:
            if name == "pca":
                work += [(name, self.principal_components(self.without(removed))[1]) for removed in conditions]
            elif REPRESENTATIONS[name].kind == "autoencoder":
                fit = partial(self._fit_autoencoders, name)
                work += [
                    (name, self.task(key, fit, stack, label)) for key, stack, label in self.autoencoder_stacks(name)
                ]
        failed: dict[str, str] = {}
        for done, reason in enumerate(self.crew.do([task for _, task in work]), 1):
            name = work[done - 1][0]
            self.progress("fitting autoencoders and pca", done, len(work))
            if reason:
                failed.setdefault(name, reason)
        for name in names:
            if name != "pca" and name not in failed:
                for key, _, label in self.autoencoder_stacks(name):
                    self.note_smaller([key], label)
        return failed

    def principal_components(self, kept: np.ndarray) -> tuple[dict, Task]:
        """Key and work of the scores float32[N, k] of layers ``kept`` bool[L], components fitted on train rows."""
        key = {"kind": "pca", **self.key, "kept": store.array_digest(kept), "components": PCA_COMPONENTS}

        def compute(_: list) -> dict[str, np.ndarray]:
            packed, columns = self.extracted.weights(), self.columns(kept)
            train = StoredRows(packed, self.rows["train"], columns, self.device)
            rows = StoredRows(packed, np.arange(packed.shape[0]), columns, self.device)
            return {"scores": PCA(PCA_COMPONENTS).fit(train).transform(rows).cpu().numpy()}

        return key, self.task(key, compute, [0], "pca")

    def autoencoder_stacks(self, name: str) -> list[tuple[dict, list[int], str]]:
        """The stacks of a representation: key, layers, and what progress calls it; one autoencoder for each layer."""
        key = {"kind": "autoencoder", **self.key, "learned": name}
        key |= {"learner": store.code_digest("autoencoders"), "schedule": asdict(self.settings.autoencoder)}
        stacks: list[tuple[dict, list[int], str]] = []
        for width in np.unique(self.widths).tolist():
            layers = np.flatnonzero(self.widths == width).tolist()
            # A parameter is held five times: itself, its gradient, two moments, the best so far; a weight once.
            parameters = autoencoders.num_parameters(name, width) + len(self.collection.files) * width // 5
            count = math.ceil(len(layers) * parameters / AUTOENCODER_PARAMETERS[self.device.type])
            at_once = math.ceil(len(layers) / min(count, len(layers)))  # stacks of about equal size
            for start in range(0, len(layers), at_once):
                stack = layers[start : start + at_once]
                stacks.append(({**key, "models": stack}, stack, f"fitting {name}, {width} weights a layer"))
        return stacks

    def _fit_autoencoders(self, name: str, layers: list[int]) -> dict[str, np.ndarray]:
        packed, columns = self.extracted.weights(), self.collection.files[0].layout.columns
        x = torch.empty(len(layers), packed.shape[0], self.widths[layers[0]], device=self.device)
        for m, layer in enumerate(layers):
            weights = torch.from_numpy(packed.read(None, columns[self.depths[layer]])).to(self.device)
            x[m] = standardise(weights, self.split.train)
        schedule, seed = self.settings.autoencoder, self.settings.seed
        return autoencoders.fit_transform(name, x, self.split, schedule=schedule, seed=seed)

    def encoded(self, name: str) -> list[np.ndarray]:
        """Features float32[N, latent] of each layer from its finished autoencoder."""
        of_layer: dict[int, np.ndarray] = {}
        for key, layers, _ in self.autoencoder_stacks(name):
            of_layer |= zip(layers, self.units.load(key, ["features"])["features"], strict=True)
        return [of_layer[layer] for layer in range(len(of_layer))]


def _common(rows: np.ndarray) -> np.ndarray:
    """The row that all rows are, or else all of them."""
    return rows[0] if (rows == rows[0]).all() else rows


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has for this process, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    group = Path("/proc/self/cgroup")  # Linux, version 2: what a job or a container may take
    if group.exists():
        inside = Path("/sys/fs/cgroup", group.read_text().splitlines()[-1].split(":", 2)[2].lstrip("/"))
        for folder in (inside, *inside.parents):
            bound = folder / "memory.max"
            limits += [int(bound.read_text())] if bound.exists() and bound.read_text().strip().isdigit() else []
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def mean(values: np.ndarray) -> float:
    """Mean, rounded so that the order of equal terms cannot decide a tie."""
    return round(float(np.mean(values)), 12)


def deviation(values: np.ndarray) -> float:
    """Sample standard deviation (ddof 1), 0 for a single value."""
    return round(float(np.std(values, ddof=1)), 12) if len(values) > 1 else 0.0
