"""Which LoRA layers give the fine-tuning concept away, and which representation of the weights sees it best?

    python ablation_experiment.py --dataset=1k --top-k=5

Three phases over a collection of LoRAs whose concept is known: every layer alone (which predict?), every
representation without the top-k layers (does prediction survive?), every representation with all layers (which is
best?). Writes top_layers.json, results.json, results.txt, samples.csv and predictions.npz to
<output-dir>/ablation_<dataset>/. Everything meets here; nothing imports this module but tests.

Shape letters: N LoRAs, L layers, P modules (pairs of layers), F features, S input sources.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import autoencoders
import data
import digits_zoo
import lora_files
import report
import representations
import stacked_training
import store
from data import WEIGHTS, Collection, CollectionError, Extracted
from representations import PCA, REPRESENTATIONS
from stacked_training import DROPOUT, HIDDEN, Models, Schedule, Split, Stored, scored, standardise, train_classifiers

BUILT_IN_SIZES = {"small": 100, "1k": 1_000, "10k": 10_000}
NAMED_DATASETS = ("1k", "10k", "50k", "100k", "small")
# Parameters in a stack: of 8 classifiers of one layer for a CPU, near whose caches they stay; of 561 for a GPU.
STACK_PARAMETERS = {"cpu": 4_300_000, "cuda": 300_000_000}
# Autoencoders stop at very different epochs: of a larger stack more are left at the end.
AUTOENCODER_PARAMETERS = {"cpu": 29_000_000, "cuda": 300_000_000}
RUNS_IN_STACK = {"cpu": 2, "cuda": 10}  # of one representation, so that more runs find the first ones finished
MEMORY_SHARE = 0.6  # of the device's memory that resident weights may take
PCA_COMPONENTS = 100
RESULT_FILES = ("top_layers.json", "results.txt", "samples.csv", "predictions.npz", "results.json")
LOG_SECONDS = 60  # between lines of progress in a log file
SCHEMA_VERSION = 1


class UsageError(ValueError):
    """A flag cannot be used; the message says what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Words and time on the way
# ----------------------------------------------------------------------------------------------------------------------


def say(line: str = "") -> None:
    """Print a line at once, also into a log file."""
    print(line, flush=True)


class Progress:
    """Shows how far a stage is: a bar on a terminal, in a log file a plain line about once a minute."""

    def __init__(self):
        self.stage, self.bar, self.told = "", None, time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of a stage are finished."""
        if sys.stderr.isatty():
            if stage != self.stage:
                self.stage, self.bar = stage, tqdm(total=total, desc=stage, leave=False)
            self.bar.update(done - self.bar.n)
            if done == total:
                self.bar.close()
                self.stage = ""
        elif time.monotonic() - self.told > LOG_SECONDS:
            self.told = time.monotonic()
            say(f"  {stage}: {done} of {total}")

    def track(self, items: Iterable, stage: str) -> Iterator:
        """Iterate and show how far it is."""
        items = list(items)
        for done, item in enumerate(items):
            self(stage, done, len(items))
            yield item
        self(stage, len(items), len(items))


class Stopwatch:
    """Seconds by phase."""

    PHASES = ("index", "features", "ranking", "autoencoders", "ablation", "baseline")

    def __init__(self):
        self.seconds = dict.fromkeys(self.PHASES, 0.0)
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def timing(self) -> dict[str, float]:
        """Seconds of each phase and in total, to the millisecond."""
        seconds = self.seconds | {"total": time.perf_counter() - self.start}
        return {name: round(value, 3) for name, value in seconds.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Flags of the command line, unresolved."""
    parser = argparse.ArgumentParser(
        description="Rank LoRA layers by how well they predict the concept, remove the best, compare representations."
    )
    add = parser.add_argument_group("collection").add_argument
    add(
        "--dataset",
        default="1k",
        help="1k, 10k, 50k, 100k or small, a folder in --data-dir; or any folder of LoRAs (1k)",
    )
    add(
        "--data-dir",
        type=Path,
        help="where the named collections lie (data). only without this flag a missing small, 1k or 10k is trained "
        "instead: the built-in digits",
    )
    add = parser.add_argument_group("experiment").add_argument
    add("--top-k", type=int, default=5, help="number of most predictive layers to remove (5)")
    add("--num-runs", type=int, help="trainings of each classifier (10; 3 with --quick)")
    add(
        "--rank-by",
        choices=("test", "val"),
        default="test",
        help="accuracy that ranks the layers. test: as the experiment is defined; val: keeps the choice off the test "
        "rows (test)",
    )
    add("--representations", default="all", help=f"all, or a comma list of {', '.join(REPRESENTATIONS)} (all)")
    add("--seed", type=int, default=42, help="of the split and of all training (42)")
    add(
        "--quick",
        action="store_true",
        help="for trying things out: 3 runs, patience 5, at most 30 classifier and 8 autoencoder epochs",
    )
    add = parser.add_argument_group("files and machine").add_argument
    add("--output-dir", type=Path, default=Path("ablation-results"), help="folder of results (ablation-results)")
    add("--cache-dir", type=Path, help="folder of finished work, reused by later runs (<output-dir>/.cache)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one (auto)")
    return parser.parse_args(arguments)


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
            "classifier": {"hidden": list(HIDDEN), "dropout": DROPOUT, **asdict(self.classifier)},
            "autoencoder": asdict(self.autoencoder),
            "stack": {
                "parameters": STACK_PARAMETERS[self.device.type],
                "autoencoder_parameters": AUTOENCODER_PARAMETERS[self.device.type],
                "runs": RUNS_IN_STACK[self.device.type],
            },
        }


def resolve(args: argparse.Namespace) -> Settings:
    """Check all flags before anything is read.

    Raises:
        UsageError: A flag is out of range or names what is not there.
    """
    if args.top_k < 1:
        raise UsageError(f"--top-k {args.top_k}: at least one layer is to be removed. give 1 or more.")
    if args.num_runs is not None and args.num_runs < 1:
        raise UsageError(f"--num-runs {args.num_runs}: at least one run is needed. give 1 or more.")
    if not args.dataset:
        raise UsageError("--dataset: empty. give a folder of LoRAs, or leave it out.")
    check_writable("--output-dir", args.output_dir)
    if args.cache_dir is not None:
        check_writable("--cache-dir", args.cache_dir)
    asked = ",".join(REPRESENTATIONS) if args.representations == "all" else args.representations
    names = [name.strip() for name in asked.split(",")]
    if unknown := [name for name in names if name not in REPRESENTATIONS]:
        raise UsageError(f"--representations {','.join(unknown)}: not known. choose from {', '.join(REPRESENTATIONS)}.")
    quick = args.quick
    return Settings(
        top_k=args.top_k,
        num_runs=args.num_runs or (3 if quick else 10),
        rank_by=args.rank_by,
        seed=args.seed,
        quick=quick,
        device=resolve_device(args.device),
        representations=tuple(name for name in REPRESENTATIONS if name in names),
        classifier=Schedule(max_epochs=30 if quick else 1000, patience=5 if quick else 20, lr_patience=10),
        autoencoder=Schedule(max_epochs=8 if quick else 100, patience=5 if quick else 15),
    )


def check_writable(flag: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before any work is done for it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {folder}: {there} is not a folder that can be written to. give another.")


def resolve_device(name: str) -> torch.device:
    """The torch device of a --device flag.

    Raises:
        UsageError: It is no device of a supported kind, or it is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device. give auto, cpu, cuda or cuda:N.") from error
    if device.type not in STACK_PARAMETERS:
        raise UsageError(f"--device {name}: not supported. give auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UsageError(f"--device {name}: there are {gpus} GPUs here. give cpu, or one that is there.")
    return device


def locate(args: argparse.Namespace, progress: Progress) -> tuple[str, Path]:
    """Name and folder of the collection; the built-in one is trained if it is to be used and not there.

    Raises:
        UsageError: There is no such collection, and none is trained in its place.
    """
    name = args.dataset
    if name not in NAMED_DATASETS:
        if not Path(name).is_dir():
            fault = "a file, not a folder" if Path(name).exists() else "no such folder"
            raise UsageError(f"--dataset {name}: {fault}. give a folder of LoRAs, or {', '.join(NAMED_DATASETS)}.")
        begun = digits_zoo.is_built_here(Path(name)) or (Path(name) / "import.json").exists()
        if name.rstrip("/").endswith(".partial") and begun:
            raise UsageError(f"--dataset {name}: a half-built collection. finish it with the command that began it.")
        return Path(os.path.abspath(name)).name, Path(name)
    folder = (args.data_dir or Path("data")) / name
    if folder.is_dir():
        return name, folder
    there = f"`python data.py import SOURCE {folder}` puts a published collection there"
    if args.data_dir is not None:
        raise UsageError(f"{folder}: no such folder. {there}; or leave out --data-dir for the digits.")
    if name not in BUILT_IN_SIZES or os.path.lexists(folder):  # a link to nowhere is no reason to train digits
        raise UsageError(f"{folder}: no such folder. {there}; or name its parent with --data-dir.")
    built_in, count = Path("data") / "built-in-digits" / name, BUILT_IN_SIZES[name]
    if not built_in.is_dir():
        seconds, size = digits_zoo.estimate(count)
        say(
            f"There is no {folder}: training the built-in digits, {count} LoRAs, into {built_in}, once "
            f"(about {seconds / 60:.1f} minutes on two CPU cores, {size / 2**20:.0f} MiB on disk)"
        )
    try:
        digits_zoo.build(built_in, count, progress=progress)  # returns at once where it is whole
    except FileExistsError as error:
        raise UsageError(str(error)) from error
    return name, built_in


# ----------------------------------------------------------------------------------------------------------------------
# The experiment
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What classifiers read: ``x`` float32[S, N, F], standardised, of which columns ``live`` bool[F] are left.

    ``identity`` stands for ``x`` in the keys of finished units: its numbers, or what they are computed from.
    """

    x: torch.Tensor | Stored
    live: np.ndarray
    identity: str

    @classmethod
    def of(cls, x: torch.Tensor, live: np.ndarray | None = None) -> Inputs:
        """Inputs known by their very numbers, whatever code made them."""
        live = np.ones(x.shape[2], bool) if live is None else live
        return cls(x, live, store.array_digest(x.cpu().numpy()))


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


class Experiment:
    """A collection under one split and one set of settings; the phases' trainings, each unit of work done once."""

    def __init__(
        self, settings: Settings, collection: Collection, rows: dict, extracted: Extracted, progress: Progress
    ):
        self.settings, self.collection, self.rows, self.extracted = settings, collection, rows, extracted
        self.device, self.progress = settings.device, progress
        self.split = Split(*(torch.from_numpy(rows[part]) for part in ("train", "validation", "test"))).to(self.device)
        self.y = torch.from_numpy(collection.y).to(self.device)
        self.held_out = np.concatenate([rows["validation"], rows["test"]])
        self.units = store.Units(extracted.folder / "units")
        self.predictions = {"rows": self.held_out, "y": collection.y[self.held_out]}
        self.smaller_stacks: dict[str, int] = {}  # made so for want of memory
        self.key = {  # what every unit depends on beside its inputs and models
            "code": store.code_digest(stacked_training, store),
            "torch": torch.__version__,
            "device": self.device.type,
            "seed": settings.seed,
            "labels and split": store.array_digest(collection.y, *rows.values()),
        }

    def features(self, name: str) -> torch.Tensor:
        """Cached features on the device, float32[N, L or P, F]."""
        features = self.extracted.load(name)
        return torch.from_numpy(features if features.flags.writeable else np.array(features)).to(self.device)

    def in_stacks(
        self, models: list, at_once: int, key: dict, compute: Callable[[list], dict], label: str
    ) -> Iterator[tuple[list, dict[str, np.ndarray]]]:
        """Each stack of models with the arrays that ``compute(stack)`` gives for it, read where they are finished.

        A stack holds ``at_once`` models; which share one is fixed by the collection, the flags and the kind of device.
        Where the device's memory does not do, a smaller one is tried, which the output and the results tell.
        """
        at_once, start = min(at_once, self.smaller_stacks.get(label, at_once)), 0
        while start < len(models):
            self.progress(label, start, len(models))
            stack = models[start : start + at_once]
            arrays = self._computed({**key, "models": stack}, partial(compute, stack), len(stack) > 1)
            if arrays is None:
                at_once = self.smaller_stacks[label] = len(stack) // 2
                say(f"  {label}: {len(stack)} models do not fit the memory of {self.device}: trying {at_once} at once")
                continue
            yield stack, arrays
            start += len(stack)
        self.progress(label, start, start)

    def _computed(self, key: dict, compute: Callable[[], dict], may_fail: bool) -> dict[str, np.ndarray] | None:
        """A unit of work; None where memory runs out and that may happen."""
        try:
            return self.units.get(key, compute)
        except torch.OutOfMemoryError:
            if not may_fail:
                raise
        torch.cuda.empty_cache()  # here, and not while the exception still holds what was allocated
        return None

    # -- classifiers --------------------------------------------------------------------------------------------------

    def classify(self, inputs: Inputs, models: list, label: str, at_most: int | None = None) -> dict[str, np.ndarray]:
        """Train classifiers in stacks, or read those that are finished.

        Args:
            inputs: What they read.
            models: (source, run) of each model, in the order that fills the stacks.
            label: For the progress bar.
            at_most: Models in a stack, even where it would take more; None: no bound.

        Returns:
            The arrays of `train_classifiers`, and the metrics of every part of the split, for all models.
        """
        classes, schedule = len(self.collection.classes), self.settings.classifier
        widths = (inputs.x.shape[2], *HIDDEN, classes)
        parameters = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))
        at_once = max(1, min(STACK_PARAMETERS[self.device.type] // parameters, at_most or len(models)))
        live = store.array_digest(inputs.live)
        key = {"kind": "classifier", **self.key, "inputs": inputs.identity, "live": live, "schedule": asdict(schedule)}
        key |= {"hidden": HIDDEN, "dropout": DROPOUT}

        def compute(stack: list) -> dict[str, np.ndarray]:
            source, run = (torch.tensor(column) for column in zip(*stack, strict=True))
            mask = None if inputs.live.all() else torch.from_numpy(inputs.live).expand(len(stack), -1)
            return train_classifiers(
                inputs.x,
                self.y,
                self.split,
                Models(source, run, mask),
                classes,
                schedule=schedule,
                seed=self.settings.seed,
                hidden=HIDDEN,
                dropout=DROPOUT,
            )

        finished = [arrays for _, arrays in self.in_stacks(models, at_once, key, compute, label)]
        trained = {name: np.concatenate([arrays[name] for arrays in finished]) for name in finished[0]}
        boundary = len(self.rows["validation"])
        for name, part in (("val", slice(None, boundary)), ("test", slice(boundary, None))):
            truth = self.collection.y[self.held_out[part]]
            trained[f"{name}_accuracy"], trained[f"{name}_f1"] = scored(truth, trained["predicted"][:, part], classes)
        return trained

    # -- phase 1 ------------------------------------------------------------------------------------------------------

    def rank_layers(self) -> list[dict]:
        """Every layer alone, on its seven statistics: records as in top_layers.json, most predictive first."""
        layers, runs = self.collection.layers, self.settings.num_runs
        x = standardise(self.features("stats").transpose(0, 1), self.split.train)  # (L, N, 7)
        models = [(layer, run) for run in range(runs) for layer in range(len(layers))]
        trained = self.classify(Inputs.of(x), models, "ranking")
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
        return [records[depth] for depth in order]

    # -- phases 2 and 3 -----------------------------------------------------------------------------------------------

    def evaluate(self, name: str, removed: list[int], condition: str) -> dict:
        """One representation without some layers: its entry in results.json.

        Args:
            name: The representation.
            removed: Depths of the layers that are left out.
            condition: "baseline" or "ablation", for the progress bar and predictions.npz.
        """
        kept = np.ones(len(self.collection.layers), bool)
        kept[removed] = False
        if REPRESENTATIONS[name].kind == "pair":  # a pair with one layer left is none
            kept_pairs = np.ones(len(self.collection.modules), bool)
            kept_pairs[self.collection.pair_of_layer[removed]] = False
            kept = kept_pairs[self.collection.pair_of_layer]
        inputs = self.inputs(name, kept)
        models = [(0, run) for run in range(self.settings.num_runs)]
        trained = self.classify(inputs, models, f"{condition} {name}", at_most=RUNS_IN_STACK[self.device.type])
        for kind in ("predicted", "log_loss", "epochs"):
            self.predictions[f"{condition}/{name}/{kind}"] = trained[kind]
        metrics = [f"{part}_{metric}" for metric in ("accuracy", "f1") for part in ("train", "val", "test")]
        return {
            "num_layers": int(kept.sum()),
            "num_features": int(inputs.live.sum()),
            **{
                m: {"mean": mean(trained[m]), "std": deviation(trained[m]), "runs": trained[m].tolist()}
                for m in metrics
            },
        }

    def inputs(self, name: str, kept: np.ndarray) -> Inputs:
        """A representation's columns, of which those of the layers ``kept`` bool[L] are live."""
        kind, widths = REPRESENTATIONS[name].kind, self.collection.weights_per_layer
        if name == "flat_vec":
            return Inputs(self._packed, np.repeat(kept, widths), self._packed_identity)
        if name == "pca":  # components of what is left, not what is left of the components
            scores = torch.from_numpy(self.principal_components(np.repeat(kept, widths)))
            return Inputs.of(self._standardised(scores.to(self.device)))
        if kind == "autoencoder":
            encoded = self.encode(name)
            x = torch.from_numpy(np.concatenate(encoded, axis=1)).to(self.device)
            return Inputs.of(self._standardised(x), np.repeat(kept, [layer.shape[1] for layer in encoded]))
        if kind == "pair":
            kept = kept[[layer.role == "down" for layer in self.collection.layers]]
        x = self.features(name)
        return Inputs.of(self._standardised(x.flatten(1)), np.repeat(kept, x.shape[2]))

    def _standardised(self, x: torch.Tensor) -> torch.Tensor:
        return standardise(x, self.split.train)[None]

    @cached_property
    def _packed(self) -> Stored:
        """The weights; held on the device where they fit it, and read only if a stack is to be trained."""
        packed = self.extracted.weights()
        fits = 4 * math.prod(packed.shape) < MEMORY_SHARE * memory_of(self.device)
        return Stored(packed.read, packed.shape, self.split.train, hold=fits)

    @property
    def _packed_identity(self) -> str:
        return store.digest([WEIGHTS, self.extracted.suffix, store.code_digest(sys.modules[__name__])])

    def principal_components(self, live: np.ndarray) -> np.ndarray:
        """PCA of the live columns of the weights, fitted on train rows, computed or read: scores float32[N, k]."""
        key = {"kind": "pca", **self.key, "weights": self._packed_identity, "live": store.array_digest(live)}

        def compute() -> dict[str, np.ndarray]:
            packed, columns = self.extracted.weights(), np.flatnonzero(live)
            train = StoredRows(packed, self.rows["train"], columns, self.device)
            rows = StoredRows(packed, np.arange(packed.shape[0]), columns, self.device)
            return {"scores": PCA(PCA_COMPONENTS).fit(train).transform(rows).cpu().numpy()}

        return self.units.get({**key, "components": PCA_COMPONENTS}, compute)["scores"]

    # -- autoencoders -------------------------------------------------------------------------------------------------

    def encode(self, name: str) -> list[np.ndarray]:
        """Features float32[N, latent] of each layer from an autoencoder of its own, fitted on train rows or read."""
        key = {"kind": "autoencoder", **self.key, "weights": self.extracted.suffix, "learned": name}
        key |= {"learner": store.code_digest(autoencoders), "schedule": asdict(self.settings.autoencoder)}
        widths = np.array(self.collection.weights_per_layer)
        encoded: list = [None] * len(widths)
        for width in np.unique(widths).tolist():
            layers = np.flatnonzero(widths == width).tolist()
            # A parameter is held five times: itself, its gradient, two moments, the best so far; a weight once.
            parameters = autoencoders.num_parameters(name, width) + len(self.collection.files) * width // 5
            stacks = math.ceil(len(layers) * parameters / AUTOENCODER_PARAMETERS[self.device.type])
            at_once = math.ceil(len(layers) / min(stacks, len(layers)))  # stacks of about equal size
            fit, label = partial(self._fit_autoencoders, name), f"fitting {name}, {width} weights a layer"
            for stack, unit in self.in_stacks(layers, at_once, key, fit, label):
                for layer, features in zip(stack, unit["features"], strict=True):
                    encoded[layer] = features
        return encoded

    def _fit_autoencoders(self, name: str, layers: list[int]) -> dict[str, np.ndarray]:
        packed, columns = self.extracted.weights(), self.collection.files[0].layout.columns
        shape = len(layers), packed.shape[0], self.collection.weights_per_layer[layers[0]]
        x = torch.empty(shape, device=self.device)
        for m, layer in enumerate(layers):
            weights = torch.from_numpy(packed.read(None, columns[layer])).to(self.device)
            x[m] = standardise(weights, self.split.train)
        schedule, seed = self.settings.autoencoder, self.settings.seed
        return autoencoders.fit_transform(name, x, self.split, schedule=schedule, seed=seed)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def mean(values: np.ndarray) -> float:
    """Mean, rounded so that the order of equal terms cannot decide a tie."""
    return round(float(np.mean(values)), 12)


def deviation(values: np.ndarray) -> float:
    """Sample standard deviation (ddof 1), 0 for a single value."""
    return round(float(np.std(values, ddof=1)), 12) if len(values) > 1 else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# From arguments to files
# ----------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """The whole experiment; the exit code is 0, or 3 where a representation could not be run.

    Raises:
        UsageError: A flag cannot be used.
        CollectionError: The collection cannot be used. The output folder is left as it was.
    """
    settings, progress = resolve(args), Progress()
    # Classifiers that are sure of their train rows are full of numbers below 1e-38, over which a CPU takes many times
    # as long: they count as 0. Said before anything is computed, as threads that run already would not hear of it.
    torch.set_flush_denormal(True)
    say(report.settings_lines(settings.config(), environment(settings.device), args.output_dir))
    name, folder = locate(args, progress)
    watch = Stopwatch()
    with watch.phase("index"):
        collection = data.index_collection(folder, name, progress.track)
        data.check_classes(collection)
    if settings.top_k >= len(collection.layers):
        raise UsageError(f"--top-k {settings.top_k}: these LoRAs have {len(collection.layers)} layers. give fewer.")
    flat = [n for n in settings.representations if REPRESENTATIONS[n].kind in ("weights", "autoencoder")]
    not_run = {n: collection.mixed_ranks for n in flat if collection.mixed_ranks}
    chosen = [n for n in settings.representations if n not in not_run]
    rows = data.split_rows(collection.y, settings.seed)
    header = describe(settings, collection, rows)
    say(report.collection_lines(header, len(chosen)))
    for left_out, reason in not_run.items():
        say(report.not_run_line(left_out, reason))

    needed = {"stats"} | {n for n in chosen if n not in flat} | ({WEIGHTS} if set(chosen) & set(flat) else set())
    cache = args.cache_dir or args.output_dir / ".cache"
    with watch.phase("features"):
        extracted = data.extract(collection, sorted(needed), cache, settings.device, progress.track)
    header["dataset"]["fingerprint"] = extracted.fingerprint
    target = args.output_dir / f"ablation_{name}"
    if there := finished_results(target, header):
        say(f"\nNothing to do: {target} holds the results of these settings on these files.")
        return 3 if there["representations_not_run"] else 0
    experiment = Experiment(settings, collection, rows, extracted, progress)
    results = header | run_phases(experiment, chosen, not_run, watch) | {"timing": watch.timing()}
    results["config"]["stack"]["smaller"] = experiment.smaller_stacks
    write_results(target, experiment, results)
    say(f"\nWritten to {target}: {', '.join(RESULT_FILES)} ({results['timing']['total']:.0f} s)")
    return 3 if not_run else 0


def environment(device: torch.device) -> dict:
    """The machine and the program, as results.json tells them."""
    modules = (stacked_training, representations, autoencoders, lora_files, data, store, report, sys.modules[__name__])
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "code": store.code_digest(*modules),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(settings: Settings, collection: Collection, rows: dict[str, np.ndarray]) -> dict:
    """What results.json says before the first number: the inputs, the settings and the machine."""
    test, classes = collection.y[rows["test"]], len(collection.classes)
    largest = np.full((1, len(test)), np.bincount(test, minlength=classes).argmax())
    accuracy, f1 = scored(test, largest, classes)
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": {
            "name": collection.name,
            "source": "built-in digits" if digits_zoo.is_built_here(collection.root) else "files",
            "path": collection.root.as_posix(),
            "num_samples": len(collection.files),
            "num_classes": classes,
            "classes": collection.classes,
            "class_counts": collection.class_counts,
            "split_sizes": {part: len(indices) for part, indices in rows.items()},
            "num_layers": len(collection.layers),
            "label_source": collection.label_source,
            "ignored": dict(collection.ignored),
            "skipped": [],
        },
        "config": settings.config(),
        "environment": environment(settings.device),
        "chance": {"accuracy": float(accuracy[0]), "f1": float(f1[0])},
    }


def run_phases(experiment: Experiment, chosen: list[str], not_run: dict[str, str], watch: Stopwatch) -> dict:
    """The three phases, each result printed as it arrives; adds what turns out not to be possible to ``not_run``."""
    settings, layers = experiment.settings, experiment.collection.layers
    say(f"\nPhase 1: each of {len(layers)} layers alone, on 7 statistics\n{report.LAYER_HEADER}")
    with watch.phase("ranking"):
        ranking = experiment.rank_layers()
    for rank, record in enumerate(ranking[: settings.top_k], 1):
        say(report.layer_row(rank, record))
    top = [record["layer"] for record in ranking[: settings.top_k]]
    removed = [depth for depth, layer in enumerate(layers) if layer.name in top]
    pairs_left = set(experiment.collection.pair_of_layer) - set(experiment.collection.pair_of_layer[removed])

    for name in chosen:
        kind = REPRESENTATIONS[name].kind
        if kind == "pair" and not pairs_left:
            not_run[name] = f"the top {settings.top_k} layers leave no pair whole"
            say(report.not_run_line(name, not_run[name]))
        elif kind == "autoencoder":
            with watch.phase("autoencoders"):
                attempt(name, not_run, partial(experiment.encode, name))
    found: dict[str, dict] = {"ablation": {}, "baseline": {}}
    for condition, without, title in (
        ("ablation", removed, f"Phase 2: without the top {settings.top_k} layers"),
        ("baseline", [], "Phase 3: with all layers"),
    ):
        say(f"\n{title}\n{report.RESULT_HEADER}")
        for name in chosen:
            if name not in not_run:
                with watch.phase(condition):
                    entry = attempt(name, not_run, partial(experiment.evaluate, name, without, condition))
                if entry:
                    found[condition][name] = entry
                    say(report.result_row(name, entry))
    return {
        "layer_ranking": ranking,
        "top_layers": top,
        "ablation_results": {name: entry for name, entry in found["ablation"].items() if name not in not_run},
        "baseline_results": found["baseline"],
        "representations_not_run": [{"representation": name, "reason": not_run[name]} for name in not_run],
    }


def attempt(name: str, not_run: dict[str, str], work: Callable):
    """The work's result; None where training diverges or memory does not do, and the reason is noted."""
    try:
        return work()
    except FloatingPointError as error:
        not_run[name] = str(error)
    except torch.OutOfMemoryError as error:
        not_run[name] = f"out of memory with one model at a time: {error}"
    say(report.not_run_line(name, not_run[name]))
    return None


def finished_results(target: Path, header: dict) -> dict | None:
    """The results in a folder, if they are whole and of the same contents, settings and program."""
    try:
        there = json.loads((target / "results.json").read_text(encoding="utf-8"))
        datasets = [{**results["dataset"], "path": ""} for results in (there, header)]  # where it lies may change
        configs = [{**results["config"], "stack": ""} for results in (there, header)]  # a stack may have been smaller
        same = there["schema_version"] == header["schema_version"] and configs[0] == configs[1]
        same = same and datasets[0] == datasets[1] and there["environment"]["code"] == header["environment"]["code"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # none, or not written by this program
        return None
    return there if same and all((target / name).exists() for name in RESULT_FILES) else None


def write_results(target: Path, experiment: Experiment, results: dict) -> None:
    """Write all result files, results.json last; what lies there of other settings is moved to previous/<n>/ first."""
    store.move_to_previous(target, RESULT_FILES)
    part_of = {row: part for part, rows in experiment.rows.items() for row in rows.tolist()}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("file", "label", "split"))
    for row, file in enumerate(experiment.collection.files):
        writer.writerow((file.path, file.label, {"validation": "val"}.get(part_of[row], part_of[row])))
    top = results["layer_ranking"][: experiment.settings.top_k]
    store.write_atomically(target / "samples.csv", table.getvalue().encode())
    store.save_arrays(target / "predictions.npz", experiment.predictions)
    store.write_atomically(target / "top_layers.json", store.canonical_json(top, indent=2))
    store.write_atomically(target / "results.txt", report.render_text(results).encode())
    store.write_atomically(target / "results.json", store.canonical_json(results, indent=2))


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad flags or input, 3 done but for representations that cannot run, 130 interrupted."""
    try:
        return run(parse_arguments(arguments))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
    except CollectionError as error:
        print(error.shown(), file=sys.stderr)
    except torch.OutOfMemoryError as error:  # of the ranking, and so is the next one
        print(
            f"error: one model alone does not fit the device's memory: {error} try another --device.", file=sys.stderr
        )
    except FloatingPointError as error:
        print(f"error: {error}. try another --seed.", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}. the same command continues where this one stopped.", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted. the same command continues where this one stopped.", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
