"""Which LoRA layers give the fine-tuning concept away, and which representation of the weights sees it best?

    python ablation_experiment.py --dataset=1k --top-k=5

Three phases over a collection of LoRAs whose concept is known: every layer alone (which predict?), every representation without
the top-k layers (does prediction survive?), every representation with all layers (which is best?). It writes top_layers.json,
results.json, results.txt, samples.csv and predictions.npz to <output-dir>/ablation_<dataset>/. Everything meets here; nothing imports
this module but tests.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import autoencoders
import data
import digits_zoo
import report
import representations
import stacked_training
import store
from data import WEIGHTS, Collection, CollectionError, Extracted
from representations import PCA, REPRESENTATIONS
from stacked_training import Models, Schedule, Split, scored, standardise, train_classifiers

BUILT_IN_SIZES = {"small": 100, "1k": 1_000, "10k": 10_000}
NAMED_DATASETS = ("1k", "10k", "50k", "100k", "small")
# Parameters of a stack. A CPU is fastest while weights, gradients and Adam's moments stay near its cache; a GPU is to be filled.
STACK_PARAMETERS = {"cpu": 2**22, "cuda": 2**29}
HIDDEN = (512, 512, 512)
RESULT_FILES = ("top_layers.json", "results.json", "results.txt", "samples.csv", "predictions.npz")
SCHEMA_VERSION = 1


class UsageError(ValueError):
    """A flag cannot be used; the message says what to do."""


# --------------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Flags of the command line, unresolved."""
    parser = argparse.ArgumentParser(
        description="Rank LoRA layers by how well they predict the concept, remove the best, compare representations.",
    )
    collection = parser.add_argument_group("collection")
    collection.add_argument(
        "--dataset",
        default="1k",
        help="1k, 10k, 50k, 100k or small: a folder in --data-dir; or the path of any folder of LoRAs (1k)",
    )
    collection.add_argument(
        "--data-dir",
        type=Path,
        help="folder of the named data sets (data). without this flag, a missing small, 1k or 10k is trained: the built-in digits",
    )
    experiment = parser.add_argument_group("experiment")
    experiment.add_argument("--top-k", type=int, default=5, help="number of most predictive layers to remove (5)")
    experiment.add_argument("--num-runs", type=int, help="trainings of each classifier (10; 3 with --quick)")
    experiment.add_argument(
        "--rank-by",
        choices=("test", "val"),
        default="test",
        help="accuracy that ranks the layers: test, as the experiment is defined, or val, which keeps the choice off the test rows (test)",
    )
    experiment.add_argument(
        "--representations", default="all", help=f"all, or a comma list of: {', '.join(REPRESENTATIONS)} (all)"
    )
    experiment.add_argument("--seed", type=int, default=42, help="of the split and of all training (42)")
    experiment.add_argument(
        "--quick",
        action="store_true",
        help="for trying things out: 3 runs, patience 5, at most 30 classifier and 8 autoencoder epochs",
    )
    machine = parser.add_argument_group("files and machine")
    machine.add_argument(
        "--output-dir", type=Path, default=Path("ablation-results"), help="folder of results (ablation-results)"
    )
    machine.add_argument(
        "--cache-dir", type=Path, help="folder of finished work, to share or to place elsewhere (<output-dir>/.cache)"
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: a GPU if there is one)")
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
            "classifier": {"hidden": list(HIDDEN), "dropout": 0.3, **asdict(self.classifier)},
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
    names = list(REPRESENTATIONS) if args.representations == "all" else args.representations.split(",")
    unknown = [name for name in names if name not in REPRESENTATIONS]
    if unknown:
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
    """The torch device of a --device flag."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device. give auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: not supported. give auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UsageError(f"--device {name}: {gpus} GPUs are visible here. give cpu, or one that is there.")
    return device


def locate(args: argparse.Namespace) -> tuple[str, Path, bool]:
    """Name, folder and whether it is the built-in collection, which is trained first if it is not there.

    Raises:
        UsageError: There is no such collection, and none is trained in its place.
    """
    name = args.dataset
    if name not in NAMED_DATASETS:
        folder = Path(name)
        if not folder.is_dir():
            raise UsageError(
                f"--dataset {name}: no such folder. give a folder of LoRAs, or one of {', '.join(NAMED_DATASETS)}."
            )
        return folder.resolve().name, folder, False
    folder = (args.data_dir or Path("data")) / name
    if folder.is_dir():
        return name, folder, False
    if args.data_dir is not None:
        raise UsageError(
            f"{folder}: no such folder. put the collection there, or leave out --data-dir to use the built-in digits."
        )
    if name not in BUILT_IN_SIZES:
        raise UsageError(
            f"{folder}: no such folder, and no built-in collection is that large. put the collection there, or name its folder with --data-dir."
        )
    folder = Path("data") / "built-in-digits" / name
    if not folder.is_dir():
        train_built_in(folder, BUILT_IN_SIZES[name])
    return name, folder, True


def train_built_in(folder: Path, count: int) -> None:
    """Train the built-in collection, saying beforehand what it costs."""
    seconds, size = digits_zoo.estimate(count)
    say(
        f"No collection is there: training the built-in digits, {count} LoRAs, into {folder} once "
        f"(about {seconds / 60:.0f} minutes on two CPU cores, {size / 2**20:.0f} MiB on disk)."
    )
    bars: dict[str, tqdm] = {}
    last = time.monotonic()

    def advance(stage: str, done: int, total: int) -> None:
        nonlocal last
        if sys.stderr.isatty():
            bar = bars.setdefault(stage, tqdm(total=total, desc=stage, leave=False))
            bar.update(done - bar.n)
        elif time.monotonic() - last > 60:
            last = time.monotonic()
            say(f"{stage}: {done} of {total}")

    digits_zoo.build(folder, count, progress=advance)
    for bar in bars.values():
        bar.close()


# --------------------------------------------------------------------------------------------------------
# Words on the way
# --------------------------------------------------------------------------------------------------------


def say(line: str = "") -> None:
    """Print a line at once, also into a log file."""
    print(line, flush=True)


def progress(items: Iterable, label: str) -> Iterator:
    """Iterate with a bar on a terminal, and with a plain line about once a minute in a log file."""
    items = list(items)
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, leave=False)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > 60:
            last = time.monotonic()
            say(f"  {label}: {done} of {len(items)}")


class Stopwatch:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def timing(self) -> dict[str, float]:
        """Seconds of each phase and in total, to the millisecond."""
        names = ("index", "features", "ranking", "autoencoders", "ablation", "baseline")
        seconds = {name: self.seconds.get(name, 0.0) for name in names}
        return {name: round(s, 3) for name, s in (*seconds.items(), ("total", time.perf_counter() - self.start))}


# --------------------------------------------------------------------------------------------------------
# The experiment
# --------------------------------------------------------------------------------------------------------


class Experiment:
    """A collection under one split and one set of settings; each phase is a method that returns what results.json holds."""

    def __init__(self, settings: Settings, collection: Collection, extracted: Extracted):
        self.settings, self.collection, self.extracted = settings, collection, extracted
        device = settings.device
        self.rows = data.split_rows(collection.y, settings.seed)
        self.split = Split(*(torch.from_numpy(self.rows[part]).to(device) for part in ("train", "validation", "test")))
        self.y = torch.from_numpy(collection.y).to(device)
        self.held_out = np.concatenate([self.rows["validation"], self.rows["test"]])
        self.units = store.Units(extracted.folder / "units")
        self.predictions: dict[str, np.ndarray] = {"rows": self.held_out, "y": collection.y[self.held_out]}
        # All that every unit of this experiment depends on, beside its own models.
        self.key = {
            "features": extracted.suffix,
            "code": store.code_digest(stacked_training),
            "torch": torch.__version__,
            "seed": settings.seed,
            "stack": STACK_PARAMETERS[device.type],
        }

    def features(self, name: str) -> torch.Tensor:
        """Features of a representation on the device, float32[N, L or P, F]."""
        return torch.from_numpy(np.array(self.extracted.load(name))).to(self.settings.device)

    # -- classifiers -------------------------------------------------------------------------------------

    def classify(
        self, x: torch.Tensor, models: list[tuple[int, int]], live: np.ndarray | None, key: dict, label: str
    ) -> dict:
        """Train classifiers in stacks, or read those that are finished.

        Args:
            x: Standardised inputs, float32[S, N, F].
            models: (source, run) of each model, in the order that fills the stacks.
            live: Columns that the models read, bool[F]; None for all.
            key: What tells these units from others.
            label: For the progress bar.

        Returns:
            The arrays of `train_classifiers` for all models.
        """
        widths = (x.shape[2], *HIDDEN, len(self.collection.classes))
        parameters = sum((fan_in + 1) * fan_out for fan_in, fan_out in zip(widths, widths[1:], strict=False))
        at_once = max(1, STACK_PARAMETERS[self.settings.device.type] // parameters)
        finished = []
        for start in progress(range(0, len(models), at_once), label):
            part = models[start : start + at_once]
            source, run = (torch.tensor(column) for column in zip(*part, strict=True))
            mask = None if live is None else torch.from_numpy(live).expand(len(part), -1)
            unit = {
                "kind": "classifier",
                **key,
                **self.key,
                "models": part,
                "schedule": asdict(self.settings.classifier),
            }
            unit["live"] = None if live is None else np.packbits(live).tobytes().hex()

            def compute(models=Models(source, run, mask)):
                return train_classifiers(
                    x,
                    self.y,
                    self.split,
                    models,
                    widths[-1],
                    schedule=self.settings.classifier,
                    seed=self.settings.seed,
                )

            finished.append(self.units.get(unit, compute))
        return {name: np.concatenate([arrays[name] for arrays in finished]) for name in finished[0]}

    def metrics(self, trained: dict) -> dict[str, np.ndarray]:
        """Accuracy and macro-F1 of each model on each part of the split."""
        classes, boundary = len(self.collection.classes), len(self.rows["validation"])
        found = {"train_accuracy": trained["train_accuracy"], "train_f1": trained["train_f1"]}
        for name, part in (("val", slice(None, boundary)), ("test", slice(boundary, None))):
            truth = self.collection.y[self.held_out[part]]
            found[f"{name}_accuracy"], found[f"{name}_f1"] = scored(truth, trained["predicted"][:, part], classes)
        return found

    # -- phase 1 -----------------------------------------------------------------------------------------

    def rank_layers(self) -> list[dict]:
        """Every layer alone, on its seven statistics: records as in top_layers.json, most predictive first."""
        layers, runs = self.collection.layers, self.settings.num_runs
        x = standardise(self.features("stats").transpose(0, 1), self.split.train)  # (L, N, 7)
        models = [(layer, run) for run in range(runs) for layer in range(len(layers))]
        trained = self.classify(x, models, None, {"inputs": "single layers"}, "ranking")
        by_layer = {
            name: array.reshape(runs, len(layers), *array.shape[1:]).swapaxes(0, 1) for name, array in trained.items()
        }
        self.predictions["layers/predicted"] = by_layer["predicted"]
        self.predictions["layers/log_loss"] = by_layer["log_loss"]
        self.predictions["layers/epochs"] = by_layer["epochs"]
        metrics = {
            name: values.reshape(runs, len(layers)).T for name, values in self.metrics(trained).items()
        }  # (L, runs)
        records = [
            {
                "layer": layer.name,
                "accuracy": mean(metrics["test_accuracy"][depth]),
                "accuracy_std": deviation(metrics["test_accuracy"][depth]),
                "val_accuracy": mean(metrics["val_accuracy"][depth]),
                "module": layer.module,
                "role": layer.role,
            }
            for depth, layer in enumerate(layers)
        ]
        first, second = (
            ("accuracy", "val_accuracy") if self.settings.rank_by == "test" else ("val_accuracy", "accuracy")
        )
        loss = by_layer["validation_loss"].mean(1)
        order = sorted(range(len(layers)), key=lambda d: (-records[d][first], -records[d][second], loss[d], d))
        return [records[depth] for depth in order]

    # -- phases 2 and 3 ----------------------------------------------------------------------------------

    def evaluate(self, name: str, removed: list[int], condition: str) -> dict:
        """One representation without some layers: its entry in results.json.

        Args:
            name: The representation.
            removed: Depths of the layers left out.
            condition: "baseline" or "ablation", for labels and predictions.npz.
        """
        runs = [(0, run) for run in range(self.settings.num_runs)]
        x, live, key, num_layers = self.inputs(name, removed)
        trained = self.classify(x[None], runs, None if live.all() else live, key, f"{condition} {name}")
        for kind in ("predicted", "log_loss", "epochs"):
            self.predictions[f"{condition}/{name}/{kind}"] = trained[kind]
        summary = {
            metric: {"mean": mean(values), "std": deviation(values), "runs": values.tolist()}
            for metric, values in self.metrics(trained).items()
        }
        return {"num_layers": num_layers, "num_features": int(live.sum()), **summary}

    def inputs(self, name: str, removed: list[int]) -> tuple[torch.Tensor, np.ndarray, dict, int]:
        """Standardised inputs float32[N, F], the live columns bool[F], what identifies them, and the layers they describe."""
        collection, representation = self.collection, REPRESENTATIONS[name]
        kept = np.ones(len(collection.layers), bool)
        kept[removed] = False
        key: dict = {"inputs": name}
        if representation.kind == "pair":
            kept_pairs = np.ones(len(collection.modules), bool)
            kept_pairs[collection.pair_of_layer[removed]] = False
            kept, groups, columns = kept_pairs[collection.pair_of_layer], kept_pairs, self.features(name)
            live, x = np.repeat(groups, columns.shape[2]), columns.flatten(1)
        elif representation.kind == "matrix":
            columns = self.features(name)
            live, x = np.repeat(kept, columns.shape[2]), columns.flatten(1)
        elif representation.kind == "autoencoder":
            encoded = self.encode(name)
            live = np.repeat(kept, [part.shape[1] for part in encoded])
            x = torch.from_numpy(np.concatenate(encoded, axis=1)).to(self.settings.device)
            key["autoencoder"] = self.autoencoder_key(name)
        else:
            live = np.repeat(kept, collection.weights_per_layer)
            x = self.features(WEIGHTS)
            if name == "pca":
                x = x[:, torch.from_numpy(live).to(x.device)]
                x = PCA(100).fit(x[self.split.train]).transform(x)
                key["removed"], live = removed, np.ones(x.shape[1], bool)
        return standardise(x, self.split.train), live, key, int(kept.sum())

    # -- autoencoders ------------------------------------------------------------------------------------

    def autoencoder_key(self, name: str) -> dict:
        """What the fitted autoencoders of one kind depend on."""
        return {
            **self.key,
            "autoencoder": name,
            "schedule": asdict(self.settings.autoencoder),
            "learner": store.code_digest(autoencoders),
        }

    def encode(self, name: str) -> list[np.ndarray]:
        """Features float32[N, latent] of each layer from its own autoencoder, fitted on the train rows or read."""
        widths = np.array(self.collection.weights_per_layer)
        columns = data.layer_columns(self.collection)
        encoded: list = [None] * len(widths)
        stacks = []
        for width in np.unique(widths).tolist():
            layers = np.flatnonzero(widths == width).tolist()
            at_once = max(1, STACK_PARAMETERS[self.settings.device.type] // autoencoders.parameters(name, width))
            stacks += [layers[start : start + at_once] for start in range(0, len(layers), at_once)]
        for layers in progress(stacks, f"fitting {name}"):

            def compute(layers=layers):
                packed = self.extracted.load(WEIGHTS)
                x = torch.from_numpy(np.stack([packed[:, columns[layer]] for layer in layers])).to(self.settings.device)
                x = standardise(x, self.split.train)
                return autoencoders.fit_transform(
                    name, x, self.split, schedule=self.settings.autoencoder, seed=self.settings.seed
                )

            unit = {"kind": "autoencoder", **self.autoencoder_key(name), "layers": layers}
            for layer, features in zip(layers, self.units.get(unit, compute)["features"], strict=True):
                encoded[layer] = features
        return encoded


def mean(values: np.ndarray) -> float:
    """Mean, rounded so that the order of equal terms cannot decide a tie."""
    return round(float(np.mean(values)), 12)


def deviation(values: np.ndarray) -> float:
    """Sample standard deviation (ddof 1), 0 for a single value."""
    return round(float(np.std(values, ddof=1)), 12) if len(values) > 1 else 0.0


def run(args: argparse.Namespace) -> int:
    """From arguments to files; the exit code is 0, or 3 where a representation could not be run."""
    settings = resolve(args)
    watch = Stopwatch()
    name, folder, built_in = locate(args)
    with watch.phase("index"):
        collection = data.index_collection(folder, name)
        data.check_classes(collection)
    if settings.top_k >= len(collection.layers):
        raise UsageError(
            f"--top-k {settings.top_k}: the LoRAs have {len(collection.layers)} layers. give a smaller number."
        )
    not_run = []
    if collection.mixed_ranks:
        needing = [
            name for name in settings.representations if REPRESENTATIONS[name].kind in ("weights", "autoencoder")
        ]
        not_run = [{"representation": name, "reason": collection.mixed_ranks} for name in needing]
    chosen = [name for name in settings.representations if name not in {entry["representation"] for entry in not_run}]
    announce(settings, collection, built_in, chosen, not_run)

    cache = args.cache_dir or args.output_dir / ".cache"
    needed = {"stats"} | {name for name in chosen if REPRESENTATIONS[name].kind in ("matrix", "pair")}
    if len(needed | set(chosen)) > len(needed):
        needed.add(WEIGHTS)
    with watch.phase("features"):
        extracted = data.extract(collection, sorted(needed), cache, settings.device, progress)
    target = args.output_dir / f"ablation_{name}"
    experiment = Experiment(settings, collection, extracted)
    header = header_of(experiment, folder, built_in, not_run)
    if already_there(target, header):
        say(f"\nNothing to do: {target} holds the results of these settings on these files.")
        return 3 if not_run else 0
    results = header | run_phases(experiment, chosen, watch)
    results["timing"] = watch.timing()
    write_results(target, experiment, results)
    say(f"\nWritten to {target}: {', '.join(RESULT_FILES)} ({results['timing']['total']:.0f} s)")
    return 3 if not_run else 0


def announce(
    settings: Settings, collection: Collection, built_in: bool, chosen: list[str], not_run: list[dict]
) -> None:
    """Say what will be done, with what, on what, before it is done."""
    config = settings.config()
    say("settings: " + ", ".join(f"{key} {config[key]}" for key in ("top_k", "num_runs", "rank_by", "seed", "quick")))
    gpu = (
        f" ({torch.cuda.get_device_name(settings.device)})"
        if settings.device.type == "cuda"
        else f" ({torch.get_num_threads()} threads)"
    )
    say(f"device:   {settings.device}{gpu}")
    sizes = {part: len(rows) for part, rows in data.split_rows(collection.y, settings.seed).items()}
    say(
        f"data:     {len(collection.files)} LoRAs{' of the BUILT-IN DIGITS collection' if built_in else ''} in {collection.root}, "
        f"{len(collection.classes)} classes from {collection.label_source}, {len(collection.layers)} layers; "
        f"split {sizes['train']} / {sizes['validation']} / {sizes['test']}"
    )
    for pattern, count in collection.ignored.items():
        say(f"          ignored: {pattern} ({count})")
    say(
        f"plan:     rank {len(collection.layers)} layers, then {len(chosen)} representations without the top {settings.top_k} and with all"
    )
    for entry in not_run:
        say(f"          not run: {entry['representation']}: {entry['reason']}")


def header_of(experiment: Experiment, folder: Path, built_in: bool, not_run: list[dict]) -> dict:
    """What results.json says before the first number: the inputs, the settings and the machine."""
    collection, y = experiment.collection, experiment.collection.y
    test = y[experiment.rows["test"]]
    guess = np.full((1, len(test)), np.bincount(test, minlength=len(collection.classes)).argmax())
    accuracy, f1 = scored(test, guess, len(collection.classes))
    device = experiment.settings.device
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": {
            "name": collection.name,
            "source": "built-in digits" if built_in else "files",
            "path": folder.as_posix(),
            "num_samples": len(collection.files),
            "num_classes": len(collection.classes),
            "classes": collection.classes,
            "class_counts": collection.class_counts,
            "split_sizes": {part: len(rows) for part, rows in experiment.rows.items()},
            "num_layers": len(collection.layers),
            "label_source": collection.label_source,
            "ignored": dict(collection.ignored),
            "fingerprint": experiment.extracted.fingerprint,
            "skipped": [],
        },
        "config": experiment.settings.config(),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "code": store.code_digest(
                stacked_training, representations, autoencoders, data, report, sys.modules[__name__]
            ),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "chance": {"accuracy": float(accuracy[0]), "f1": float(f1[0])},
        "representations_not_run": not_run,
    }


def run_phases(experiment: Experiment, chosen: list[str], watch: Stopwatch) -> dict:
    """The three phases, each result printed as it arrives."""
    settings, collection = experiment.settings, experiment.collection
    say(f"\nPhase 1: each of {len(collection.layers)} layers alone, on 7 statistics")
    with watch.phase("ranking"):
        ranking = experiment.rank_layers()
    top = [record["layer"] for record in ranking[: settings.top_k]]
    for record in ranking[: settings.top_k]:
        say(f"  {100 * record['accuracy']:5.1f} ± {100 * record['accuracy_std']:<4.1f} {record['layer']}")
    depth_of = {layer.name: depth for depth, layer in enumerate(collection.layers)}
    removed = sorted(depth_of[name] for name in top)

    with watch.phase("autoencoders"):
        for name in chosen:
            if REPRESENTATIONS[name].kind == "autoencoder":
                experiment.encode(name)
    found: dict[str, dict] = {"ablation": {}, "baseline": {}}
    phases = (
        ("ablation", removed, f"Phase 2: without the top {settings.top_k} layers"),
        ("baseline", [], "Phase 3: all layers"),
    )
    for condition, without, title in phases:
        say(f"\n{title}\n  {report.RESULT_HEADER}")
        for name in chosen:
            with watch.phase(condition):
                found[condition][name] = experiment.evaluate(name, without, condition)
            say(f"  {report.result_row(name, found[condition][name])}")
    return {
        "layer_ranking": ranking,
        "top_layers": top,
        "ablation_results": found["ablation"],
        "baseline_results": found["baseline"],
    }


# --------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------


def already_there(target: Path, header: dict) -> bool:
    """Whether a folder holds whole results of the same inputs, settings and program."""
    if not all((target / name).exists() for name in RESULT_FILES):
        return False
    there = json.loads((target / "results.json").read_text(encoding="utf-8"))
    same = all(there.get(key) == header[key] for key in ("schema_version", "dataset", "config"))
    return same and there["environment"]["code"] == header["environment"]["code"]


def write_results(target: Path, experiment: Experiment, results: dict) -> None:
    """Write all result files; results of other settings that lie there are moved to previous/<n>/ first."""
    there = [target / name for name in RESULT_FILES if (target / name).exists()]
    if there:
        numbers = [int(folder.name) for folder in (target / "previous").glob("[0-9]*")]
        kept = target / "previous" / str(max(numbers, default=0) + 1)
        kept.mkdir(parents=True)
        for path in there:
            path.rename(kept / path.name)
    part_of = {row: name for name, rows in experiment.rows.items() for row in rows.tolist()}
    names = {"train": "train", "validation": "val", "test": "test"}
    lines = ["file,label,split"]
    lines += [
        ",".join(map(csv_field, (f.path, f.label, names[part_of[i]])))
        for i, f in enumerate(experiment.collection.files)
    ]
    top = results["layer_ranking"][: experiment.settings.top_k]
    store.write_atomically(target / "samples.csv", ("\n".join(lines) + "\n").encode())
    store.save_arrays(target / "predictions.npz", experiment.predictions)
    store.write_atomically(target / "top_layers.json", store.canonical_json(top, indent=2))
    store.write_atomically(target / "results.txt", report.render_text(results).encode())
    store.write_atomically(
        target / "results.json", store.canonical_json(results, indent=2)
    )  # last: it says that all is there


def csv_field(value: str) -> str:
    """A field quoted where RFC 4180 asks for it."""
    return '"' + value.replace('"', '""') + '"' if any(c in value for c in ',"\r\n') else value


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 done, 2 bad flags or input, 3 done but for representations that could not be run, 130 interrupted."""
    try:
        return run(parse_arguments(arguments))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
    except CollectionError as error:
        print("\n".join(f"error: {line}" for line in error.shown()), file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted. the same command continues where this one stopped.", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
