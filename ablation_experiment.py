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
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
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
from stacked_training import DROPOUT, HIDDEN, Models, Schedule, Split, scored, standardise, train_classifiers

BUILT_IN_SIZES = {"small": 100, "1k": 1_000, "10k": 10_000}
NAMED_DATASETS = ("1k", "10k", "50k", "100k", "small")
# Parameters in a stack. For a CPU 16 classifiers of one layer; a GPU is to be filled.
STACK_PARAMETERS = {"cpu": 9_000_000, "cuda": 500_000_000}
PCA_COMPONENTS = 100
RESULT_FILES = ("top_layers.json", "results.txt", "samples.csv", "predictions.npz", "results.json")
SCHEMA_VERSION = 1


class UsageError(ValueError):
    """A flag cannot be used; the message says what to do."""


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
            "stack": {"parameters": STACK_PARAMETERS[self.device.type]},
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
    names = (
        list(REPRESENTATIONS)
        if args.representations == "all"
        else [name.strip() for name in args.representations.split(",")]
    )
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


def locate(args: argparse.Namespace) -> tuple[str, Path, bool]:
    """Name and folder of the collection, and whether it is the built-in one, which is trained if it is not there.

    Raises:
        UsageError: There is no such collection, and none is trained in its place.
    """
    name = args.dataset
    if name not in NAMED_DATASETS:
        if not Path(name).is_dir():
            named = ", ".join(NAMED_DATASETS)
            raise UsageError(f"--dataset {name}: no such folder. give a folder of LoRAs, or one of {named}.")
        return Path(name).resolve().name, Path(name), False
    folder = (args.data_dir or Path("data")) / name
    if folder.is_dir():
        return name, folder, False
    if args.data_dir is not None:
        raise UsageError(f"{folder}: no such folder. put the collection there, or leave out --data-dir for the digits.")
    if name not in BUILT_IN_SIZES:
        raise UsageError(
            f"{folder}: no such folder. put the collection there, or name the folder above it: --data-dir."
        )
    folder = Path("data") / "built-in-digits" / name
    if not folder.is_dir():
        count = BUILT_IN_SIZES[name]
        seconds, size = digits_zoo.estimate(count)
        say(
            f"There is no {Path('data') / name}: training the built-in digits, {count} LoRAs, into {folder}, once "
            f"(about {seconds / 60:.1f} minutes on two CPU cores, {size / 2**20:.0f} MiB on disk)"
        )
        try:
            digits_zoo.build(folder, count, progress=Progress())
        except FileExistsError as error:  # something else lies where the half-built collection would
            raise UsageError(str(error)) from error
        say()
    return name, folder, True


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
        elif time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            say(f"  {stage}: {done} of {total}")


def track(items: Iterable, stage: str) -> Iterator:
    """Iterate and show how far it is."""
    items = list(items)
    progress = Progress()
    for done, item in enumerate(items, 1):
        yield item
        progress(stage, done, len(items))


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
# The experiment
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the classifiers of one representation and condition read.

    ``x`` float32[N, F] is standardised, ``live`` bool[F] tells which columns are left, ``num_layers`` how many matrices
    those describe, and ``key`` what they depend on beside the features' own cache key.
    """

    x: torch.Tensor
    live: np.ndarray
    num_layers: int
    key: dict


class Experiment:
    """A collection under one split and one set of settings; the phases' trainings, each unit of work done once."""

    def __init__(self, settings: Settings, collection: Collection, rows: dict[str, np.ndarray], extracted: Extracted):
        self.settings, self.collection, self.rows, self.extracted = settings, collection, rows, extracted
        self.device = settings.device
        self.split = Split(*(torch.from_numpy(rows[part]).to(self.device) for part in ("train", "validation", "test")))
        self.y = torch.from_numpy(collection.y).to(self.device)
        self.held_out = np.concatenate([rows["validation"], rows["test"]])
        self.units = store.Units(extracted.folder / "units")
        self.predictions = {"rows": self.held_out, "y": collection.y[self.held_out]}
        self.key = {  # what every unit depends on beside its own models
            "features": extracted.suffix,
            "code": store.code_digest(stacked_training),
            "torch": torch.__version__,
            "seed": settings.seed,
        }

    def features(self, name: str) -> torch.Tensor:
        """Cached features on the device, float32[N, L or P, F], or the packed weights, float32[N, sum of widths]."""
        return torch.from_numpy(np.array(self.extracted.load(name))).to(self.device)

    def stacks(self, models: list, parameters: int) -> list[list]:
        """The models in stacks, as large as this kind of device takes; fixed by the collection and the flags."""
        at_once = max(1, STACK_PARAMETERS[self.device.type] // parameters)
        return [models[start : start + at_once] for start in range(0, len(models), at_once)]

    # -- classifiers --------------------------------------------------------------------------------------------------

    def classify(self, x: torch.Tensor, models: list, live: np.ndarray, key: dict, label: str) -> dict[str, np.ndarray]:
        """Train classifiers in stacks, or read those that are finished.

        Args:
            x: Standardised inputs, float32[S, N, F].
            models: (source, run) of each model, in the order that fills the stacks.
            live: Columns that the models read, bool[F].
            key: What tells these units from others.
            label: For the progress bar.

        Returns:
            The arrays of `train_classifiers`, and the metrics of every part of the split, for all models.
        """
        classes, schedule = len(self.collection.classes), self.settings.classifier
        parameters = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise((x.shape[2], *HIDDEN, classes)))
        key = {"kind": "classifier", **self.key, **key, "schedule": asdict(schedule)}
        key["live"] = "all" if live.all() else np.packbits(live).tobytes().hex()
        finished = []
        for stack in track(self.stacks(models, parameters), label):
            source, run = (torch.tensor(column) for column in zip(*stack, strict=True))
            mask = None if live.all() else torch.from_numpy(live).expand(len(stack), -1)
            compute = partial(
                train_classifiers,
                x,
                self.y,
                self.split,
                Models(source, run, mask),
                classes,
                schedule=schedule,
                seed=self.settings.seed,
                hidden=HIDDEN,
                dropout=DROPOUT,
            )
            finished.append(self.units.get({**key, "models": stack}, compute))
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
        trained = self.classify(x, models, np.ones(x.shape[2], bool), {"inputs": "single layers"}, "ranking")
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
        inputs = self.inputs(name, removed)
        models = [(0, run) for run in range(self.settings.num_runs)]
        trained = self.classify(inputs.x[None], models, inputs.live, inputs.key, f"{condition} {name}")
        for kind in ("predicted", "log_loss", "epochs"):
            self.predictions[f"{condition}/{name}/{kind}"] = trained[kind]
        metrics = [f"{part}_{metric}" for metric in ("accuracy", "f1") for part in ("train", "val", "test")]
        return {
            "num_layers": inputs.num_layers,
            "num_features": int(inputs.live.sum()),
            **{
                m: {"mean": mean(trained[m]), "std": deviation(trained[m]), "runs": trained[m].tolist()}
                for m in metrics
            },
        }

    def inputs(self, name: str, removed: list[int]) -> Inputs:
        """The columns of a representation, and which of them are left without some layers."""
        collection, kind, key = self.collection, REPRESENTATIONS[name].kind, {"inputs": name}
        kept = np.ones(len(collection.layers), bool)
        kept[removed] = False
        if kind == "pair":
            kept_pairs = np.ones(len(collection.modules), bool)
            kept_pairs[collection.pair_of_layer[removed]] = False
            kept = kept_pairs[collection.pair_of_layer]
            x = self.features(name)
            live = np.repeat(kept_pairs, x.shape[2])
        elif kind == "matrix":
            x = self.features(name)
            live = np.repeat(kept, x.shape[2])
        elif kind == "autoencoder":
            encoded = self.encode(name)
            x = torch.from_numpy(np.concatenate(encoded, axis=1)).to(self.device)
            live = np.repeat(kept, [layer.shape[1] for layer in encoded])
            key |= self.autoencoder_key(name)
        else:
            x = self.features(WEIGHTS)
            live = np.repeat(kept, collection.weights_per_layer)
        if name == "pca":  # components of what is left, not what is left of the components
            x = x[:, torch.from_numpy(live).to(self.device)]
            x = PCA(PCA_COMPONENTS).fit(x[self.split.train]).transform(x)
            live = np.ones(x.shape[1], bool)
            key["removed"] = removed
        return Inputs(standardise(x.flatten(1), self.split.train), live, int(kept.sum()), key)

    # -- autoencoders -------------------------------------------------------------------------------------------------

    def autoencoder_key(self, name: str) -> dict:
        """What the fitted autoencoders of one kind depend on."""
        schedule = asdict(self.settings.autoencoder)
        return {**self.key, "learned": name, "learner": store.code_digest(autoencoders), "fit": schedule}

    def encode(self, name: str) -> list[np.ndarray]:
        """Features float32[N, latent] of each layer from an autoencoder of its own, fitted on train rows or read."""
        widths = np.array(self.collection.weights_per_layer)
        stacks = []
        for width in np.unique(widths).tolist():
            layers = np.flatnonzero(widths == width).tolist()
            stacks += self.stacks(layers, autoencoders.num_parameters(name, width))
        encoded: list = [None] * len(widths)
        for layers in track(stacks, f"fitting {name}"):
            key = {"kind": "autoencoder", **self.autoencoder_key(name), "layers": layers}
            unit = self.units.get(key, partial(self._fit_autoencoders, name, layers))
            for layer, features in zip(layers, unit["features"], strict=True):
                encoded[layer] = features
        return encoded

    def _fit_autoencoders(self, name: str, layers: list[int]) -> dict[str, np.ndarray]:
        packed, columns = self.extracted.load(WEIGHTS), data.layer_columns(self.collection)
        x = torch.from_numpy(np.stack([packed[:, columns[layer]] for layer in layers])).to(self.device)  # (M, N, width)
        x = standardise(x, self.split.train)
        schedule, seed = self.settings.autoencoder, self.settings.seed
        return autoencoders.fit_transform(name, x, self.split, schedule=schedule, seed=seed)


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
    settings = resolve(args)
    watch = Stopwatch()
    name, folder, built_in = locate(args)
    with watch.phase("index"):
        collection = data.index_collection(folder, name)
        data.check_classes(collection)
    if settings.top_k >= len(collection.layers):
        raise UsageError(f"--top-k {settings.top_k}: these LoRAs have {len(collection.layers)} layers. give fewer.")
    kinds = {name: REPRESENTATIONS[name].kind for name in settings.representations}
    flat = [name for name, kind in kinds.items() if kind in ("weights", "autoencoder")]
    not_run = [{"representation": n, "reason": collection.mixed_ranks} for n in flat if collection.mixed_ranks]
    chosen = [name for name in kinds if not (collection.mixed_ranks and name in flat)]
    rows = data.split_rows(collection.y, settings.seed)
    header = describe(settings, collection, rows, "built-in digits" if built_in else "files", not_run)
    say(report.announcement(header))

    needed = {"stats"} | (set(chosen) - set(flat)) | ({WEIGHTS} if flat and not not_run else set())
    cache = args.cache_dir or args.output_dir / ".cache"
    with watch.phase("features"):
        extracted = data.extract(collection, sorted(needed), cache, settings.device, track)
    header["dataset"]["fingerprint"] = extracted.fingerprint
    target = args.output_dir / f"ablation_{name}"
    if already_there(target, header):
        say(f"\nNothing to do: {target} holds the results of these settings on these files.")
        return 3 if not_run else 0
    experiment = Experiment(settings, collection, rows, extracted)
    results = header | run_phases(experiment, chosen, watch) | {"timing": watch.timing()}
    write_results(target, experiment, results)
    say(f"\nWritten to {target}: {', '.join(RESULT_FILES)} ({results['timing']['total']:.0f} s)")
    return 3 if not_run else 0


def describe(settings: Settings, collection: Collection, rows: dict, source: str, not_run: list[dict]) -> dict:
    """What results.json says before the first number: the inputs, the settings and the machine."""
    test, classes = collection.y[rows["test"]], len(collection.classes)
    largest = np.full((1, len(test)), np.bincount(test, minlength=classes).argmax())
    accuracy, f1 = scored(test, largest, classes)
    on_gpu = settings.device.type == "cuda"
    modules = (stacked_training, representations, autoencoders, lora_files, data, report, sys.modules[__name__])
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": {
            "name": collection.name,
            "source": source,
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
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(settings.device) if on_gpu else f"CPU, {platform.machine()}",
            "threads": torch.get_num_threads(),
            "code": store.code_digest(*modules),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "chance": {"accuracy": float(accuracy[0]), "f1": float(f1[0])},
        "representations_not_run": not_run,
    }


def run_phases(experiment: Experiment, chosen: list[str], watch: Stopwatch) -> dict:
    """The three phases, each result printed as it arrives."""
    settings, layers = experiment.settings, experiment.collection.layers
    say(f"\nPhase 1: each of {len(layers)} layers alone, on 7 statistics\n{report.LAYER_HEADER}")
    with watch.phase("ranking"):
        ranking = experiment.rank_layers()
    for rank, record in enumerate(ranking[: settings.top_k], 1):
        say(report.layer_row(rank, record))
    top = [record["layer"] for record in ranking[: settings.top_k]]
    removed = [depth for depth, layer in enumerate(layers) if layer.name in top]

    with watch.phase("autoencoders"):
        for name in chosen:
            if REPRESENTATIONS[name].kind == "autoencoder":
                experiment.encode(name)
    found: dict[str, dict] = {"ablation": {}, "baseline": {}}
    for condition, without, title in (
        ("ablation", removed, f"Phase 2: without the top {settings.top_k} layers"),
        ("baseline", [], "Phase 3: with all layers"),
    ):
        say(f"\n{title}\n{report.RESULT_HEADER}")
        for name in chosen:
            with watch.phase(condition):
                found[condition][name] = experiment.evaluate(name, without, condition)
            say(report.result_row(name, found[condition][name]))
    return {
        "layer_ranking": ranking,
        "top_layers": top,
        "ablation_results": found["ablation"],
        "baseline_results": found["baseline"],
    }


def already_there(target: Path, header: dict) -> bool:
    """Whether a folder holds whole results of the same inputs, settings and program."""
    if not all((target / name).exists() for name in RESULT_FILES):
        return False
    there = json.loads((target / "results.json").read_text(encoding="utf-8"))
    same = all(there.get(key) == header[key] for key in ("schema_version", "dataset", "config"))
    return same and there["environment"]["code"] == header["environment"]["code"]


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
    except KeyboardInterrupt:
        print("\ninterrupted. the same command continues where this one stopped.", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
