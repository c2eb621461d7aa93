"""Which LoRA layers give the fine-tuning concept away, and which representation of the weights sees it best?

    python ablation_experiment.py --dataset=1k --top-k=5

Three phases over a collection of LoRAs whose concept is known: every layer alone (which predict?), every
representation without the top-k layers (does prediction survive?), every representation with all layers (which is
best?), and controls that tell what the answers mean. Writes top_layers.json, results.json, results.txt, samples.csv,
predictions.npz and figures/ to <output-dir>/ablation_<dataset>/. Everything meets here; nothing imports this module
but tests and benchmarks.

Shape letters: N LoRAs, L layers, P modules (pairs of layers), F features, S input sources.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import data
from data import Collection, CollectionError
from experiment import controls, store
from experiment.extraction import WEIGHTS, extract, identity
from experiment.phases import (
    OUT_OF_MEMORY,
    STACK_PARAMETERS,
    Experiment,
    Settings,
    TrainingError,
    out_of_memory,
    start_thread,
)
from experiment.workers import Crew, FaultElsewhereError, assemble
from loras import digits_zoo, labels
from report import figures, page, text
from representations import REPRESENTATIONS
from training.splits import split_collection
from training.stacks import Schedule, scored

BUILT_IN_SIZES = {"small": 100, "1k": 1_000, "10k": 10_000}
NAMED_DATASETS = ("1k", "10k", "50k", "100k", "small")
THREADS = torch.get_num_threads()  # tasks at once on a CPU, one thread each
RESULT_FILES = ("top_layers.json", "results.txt", "samples.csv", "predictions.npz", "results.json")
PAGE = "figures/report.html"  # and the pictures beside it; not without an analysis
PROGRAM = (  # of which results are; tests and benchmarks are no part of it
    *("ablation_experiment", "autoencoders", "data", "representations"),
    *("analysis", "experiment", "loras", "report", "training"),
)
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

    def __init__(self, shown: bool = True):
        self.shown, self.stage, self.bar, self.told = shown, "", None, time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of a stage are finished."""
        if not self.shown:
            return
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

    PHASES = ("index", "features", "ranking", "autoencoders", "ablation", "baseline", "analysis")

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
    add("--dataset", default="1k", help="1k, 10k, 50k, 100k or small, in --data-dir; or any folder of LoRAs (1k)")
    add(
        "--data-dir",
        type=Path,
        help="where the named collections lie (data). only without this flag a missing small, 1k or 10k is trained "
        "instead: the built-in digits",
    )
    data.add_label_flags(add)
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
        "--controls",
        choices=controls.LEVELS,
        help="what to compare with. basic: all that needs no training, and for stats in 3 runs 20 random removals, the "
        "bottom k, the top k alone, curves of at most 12 points, all of it for update_kernel too if it is run, and the "
        "best representation without fitting on a split by groups where a column looks like one; all: also ensemble "
        "and update_sketch, every run, 32 points, what each layer adds to the top k (basic; none with --quick)",
    )
    add(
        "--null-shuffles",
        type=int,
        default=0,
        metavar="N",
        help="also train the ranking N times on shuffled labels, one run each, as a check of the whole (0)",
    )
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


def resolve(args: argparse.Namespace) -> Settings:
    """Check all flags before anything is read.

    Raises:
        UsageError: A flag is out of range or names what is not there.
    """
    if args.top_k < 1:
        raise UsageError(f"--top-k {args.top_k}: at least one layer is to be removed. give 1 or more.")
    if args.num_runs is not None and args.num_runs < 1:
        raise UsageError(f"--num-runs {args.num_runs}: at least one run is needed. give 1 or more.")
    if args.null_shuffles < 0:
        raise UsageError(f"--null-shuffles {args.null_shuffles}: give 0 or more.")
    if not args.dataset:
        raise UsageError("--dataset: empty. give a folder of LoRAs, or leave it out.")
    if args.labels is not None and (fault := labels.table_fault(args.labels)):
        raise UsageError(f"--labels {args.labels}: {fault}")
    for flag, value in (("--label-column", args.label_column), ("--group-column", args.group_column)):
        if value is not None and not value.strip():
            raise UsageError(f"{flag}: empty. name a column, or leave it out.")
    if args.layers is not None and not all(map(str.strip, args.layers.split(","))):
        raise UsageError(f"--layers {args.layers}: an empty pattern. give a part of a layer's name, or leave it out.")
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
        layers=args.layers,
        controls=args.controls or ("none" if quick else "basic"),
        null_shuffles=args.null_shuffles,
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
        name = "cuda" if gpus else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of several processes each has a GPU of its own
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device. give auto, cpu, cuda or cuda:N.") from error
    if device.type not in STACK_PARAMETERS:
        raise UsageError(f"--device {name}: not supported. give auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        fewer = ", or start fewer processes" if "LOCAL_RANK" in os.environ else ""
        raise UsageError(f"--device {name}: there are {gpus} GPUs here. give cpu, or one that is there{fewer}.")
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
# From arguments to files
# ----------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """The whole experiment; the exit code is 0, or 3 where a representation could not be run by a single process.

    Raises:
        UsageError: A flag cannot be used.
        CollectionError: The collection cannot be used. The output folder is left as it was.
    """
    settings = resolve(args)
    crew = assemble(
        THREADS if settings.device.type == "cpu" else 1, partial(start_thread, settings.device), settings.device
    )
    # One thread for each product: sums of several are rounded otherwise, and the workers use all cores already.
    with redirect_stdout(None) if crew.rank > 0 else nullcontext(), threadpool_limits(1, "blas"):
        code = carry_out(args, settings, crew)
    crew.leave()
    return 0 if code == 3 and crew.size > 1 else code  # torchrun takes any other code for a failure


def carry_out(args: argparse.Namespace, settings: Settings, crew: Crew) -> int:
    """What each process of the job does: see `run`."""
    progress, cache = Progress(crew.rank == 0), args.cache_dir or args.output_dir / ".cache"
    say(text.settings_lines(settings.config(), environment(settings.device), args.output_dir))
    name, folder = crew.agree(lambda: [str(part) for part in locate(args, progress)])
    watch = Stopwatch()
    with watch.phase("index"):
        collection = index(args, name, Path(folder), progress)
    plan = make_plan(settings, collection)
    target = args.output_dir / f"ablation_{name}"
    with only_process(target) if crew.rank == 0 else nullcontext():
        with store.made(cache) if crew.size > 1 else nullcontext():
            crew.check_shared(cache)
        while True:
            check_alike(crew, collection, plan)
            try:
                with watch.phase("features"):
                    extracted = extract(collection, plan.needed, cache, settings.device, crew, progress, args.skip_bad)
                break
            except CollectionError as error:
                if not (args.skip_bad and error.files):
                    raise
                say(f"skipped   {len(error.files)} more, found on reading their weights")
                collection = data.without(collection, error.files)
                plan = make_plan(settings, collection)
        plan.header["dataset"]["fingerprint"] = extracted.fingerprint
        if there := crew.agree(lambda: finished_results(target, plan.header)):
            say(f"\nNothing to do: {target} holds the results of these settings on these files.")
            return 3 if there["not run"] else 0
        store.remove_stale(extracted.folder)
        experiment = Experiment(settings, collection, plan.selected, plan.rows, extracted, crew, progress)
        results = plan.header | run_phases(experiment, plan.chosen, plan.not_run, watch)
        results |= {"analysis": analyse(experiment, results, watch), "timing": watch.timing()}
        results["config"]["stack"]["smaller"] = experiment.smaller_stacks
        written = RESULT_FILES + (PAGE,) * (results["analysis"] is not None)
        if crew.rank == 0:
            write_results(target, experiment, results)
    left_out = f"; not run, and results.txt says why: {', '.join(plan.not_run)}" * bool(plan.not_run)
    say(f"\nWritten to {target}: {', '.join(written)} ({results['timing']['total']:.0f} s){left_out}")
    return 3 if plan.not_run else 0


def check_alike(crew: Crew, collection: Collection, plan: Plan) -> None:
    """Refuse to share work with processes that were started otherwise, or see other files.

    Raises:
        OSError: This process is not about to do the same as rank 0.
    """
    environment = [plan.header["environment"][key] for key in ("torch", "code")]
    mine = store.digest([identity(collection), plan.header["dataset"], plan.header["config"], environment])
    if crew.agree(lambda: mine) != mine:
        raise OSError(f"process {crew.rank} of the job has other files, flags or another program than the first one")


def index(args: argparse.Namespace, name: str, folder: Path, progress: Progress) -> Collection:
    """The collection as the flags describe it."""
    return data.index_collection(
        folder,
        name,
        progress.track,
        labels=args.labels,
        label_column=args.label_column,
        group_column=args.group_column,
        skip_bad=args.skip_bad,
    )


@dataclass(frozen=True)
class Plan:
    """What is to be done with a collection.

    ``selected`` bool[L] are the layers that --layers keeps, ``rows`` the parts of the split, ``chosen`` the
    representations that can run, ``not_run`` why others cannot, ``needed`` the arrays to extract; ``header`` is what
    results.json says before the first number.
    """

    selected: np.ndarray
    rows: dict[str, np.ndarray]
    chosen: list[str]
    not_run: dict[str, str]
    needed: list[str]
    header: dict


def make_plan(settings: Settings, collection: Collection) -> Plan:
    """Check what is asked for against the collection, and tell it.

    Raises:
        UsageError: More layers are to be removed than there are.
        CollectionError: The labels or groups make no classification task.
    """
    data.check_classes(collection)
    rows = split_collection(collection, settings.seed)
    selected = data.select_layers(collection, settings.layers)
    if settings.top_k >= selected.sum():
        matching = f" that match {settings.layers}" if settings.layers else ""
        raise UsageError(f"--top-k {settings.top_k}: these LoRAs have {selected.sum()} layers{matching}. give fewer.")
    flat = [n for n in settings.representations if REPRESENTATIONS[n].kind in ("weights", "autoencoder")]
    not_run = {n: collection.mixed_ranks for n in flat if collection.mixed_ranks}
    chosen = [n for n in settings.representations if n not in not_run]
    weights = [n for n in chosen if n in flat or REPRESENTATIONS[n].kind == "kernel"]
    needed = {"stats", controls.UPDATES} | set(chosen) - set(weights) | ({WEIGHTS} if weights else set())
    header = describe(settings, collection, rows, selected)
    say(text.collection_lines(header, len(chosen)))
    for left_out, reason in not_run.items():
        say(text.not_run_line(left_out, reason))
    return Plan(selected, rows, chosen, not_run, sorted(needed), header)


@contextmanager
def only_process(target: Path) -> Iterator[None]:
    """Hold the folder of results for this process.

    Raises:
        UsageError: Another process holds it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(store.locked(target.with_name(f".{target.name}.lock")))
        except store.LockedError as error:
            raise UsageError(f"{target}: {error} is at work in it. wait, or give another --output-dir.") from None
        yield


def environment(device: torch.device) -> dict:
    """The machine and the program, as results.json tells them."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "threads": THREADS,
        "code": store.code_digest(*PROGRAM),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(settings: Settings, collection: Collection, rows: dict[str, np.ndarray], selected: np.ndarray) -> dict:
    """What results.json says before the first number: the inputs, the settings and the machine."""
    samples = [[file.path, file.label, file.group] for file in collection.files]
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
            "num_layers_selected": int(selected.sum()),
            "label_source": collection.label_source,
            "label_column": collection.label_column,
            "group_column": collection.group_column,
            "num_groups": None if collection.groups is None else int(collection.groups.max()) + 1,
            "samples": store.digest(samples),  # the fingerprint is of contents, and knows no groups
            "metadata": store.digest(collection.columns) if controls.asked_for(settings) else None,
            "ignored": dict(collection.ignored),
            "skipped": collection.skipped_records,
        },
        "config": settings.config(),
        "environment": environment(settings.device),
        "chance": {"accuracy": float(accuracy[0]), "f1": float(f1[0])},
    }


def run_phases(experiment: Experiment, chosen: list[str], not_run: dict[str, str], watch: Stopwatch) -> dict:
    """The three phases, each result printed as it arrives; adds what turns out not to be possible to ``not_run``."""
    settings, layers = experiment.settings, experiment.layers
    say(f"\nPhase 1: each of {len(layers)} layers alone, on 7 statistics\n{text.LAYER_HEADER}")
    with watch.phase("ranking"):
        ranking = experiment.rank_layers()
    for rank, record in enumerate(ranking[: settings.top_k], 1):
        say(text.layer_row(rank, record))
    top = [record["layer"] for record in ranking[: settings.top_k]]
    removed = [depth for depth, layer in enumerate(layers) if layer.name in top]
    for name in chosen:
        kept = experiment.without(removed)
        if REPRESENTATIONS[name].kind in ("pair", "kernel") and not experiment.whole_pairs(kept).any():
            whose = f"the top {settings.top_k} layers leave" if len(experiment.pairs) else "--layers leaves"
            not_run[name] = f"{whose} no pair whole"
            say(text.not_run_line(name, not_run[name]))
    learned = [name for name in chosen if name == "pca" or REPRESENTATIONS[name].kind == "autoencoder"]
    with watch.phase("autoencoders"):
        for name, reason in experiment.learn(learned, [removed, []]).items():
            not_run[name] = reason
            say(text.not_run_line(name, reason))
    found: dict[str, dict] = {"ablation": {}, "baseline": {}}
    for condition, without, title in (
        ("ablation", removed, f"Phase 2: without the top {settings.top_k} layers"),
        ("baseline", [], "Phase 3: with all layers"),
    ):
        say(f"\n{title}\n{text.RESULT_HEADER}")
        left = [name for name in chosen if name not in not_run]
        with watch.phase(condition):
            for name, entry in experiment.evaluate(left, without, condition):
                if isinstance(entry, str):
                    not_run[name] = entry
                    say(text.not_run_line(name, entry))
                else:
                    found[condition][name] = entry
                    say(text.result_row(name, entry))
    return {
        "layer_ranking": ranking,
        "top_layers": top,
        "ablation_results": {name: entry for name, entry in found["ablation"].items() if name not in not_run},
        "baseline_results": found["baseline"],
        "representations_not_run": [{"representation": name, "reason": not_run[name]} for name in not_run],
    }


def analyse(experiment: Experiment, results: dict, watch: Stopwatch) -> dict | None:
    """What the numbers of the phases mean, beside controls; the answers are printed. None where none is asked for."""
    if not controls.asked_for(experiment.settings):
        return None
    say("\nControls, and what the numbers mean")
    names = [name for name in results["baseline_results"] if name in results["ablation_results"]]
    with watch.phase("analysis"):
        found = controls.analysed(experiment, names, say)
    if found:  # None on all processes but the first
        say("\n".join(text.short_answers(results | {"analysis": found})))
    return found


def finished_results(target: Path, header: dict) -> dict | None:
    """What the results in a folder have ``not run``, if they are whole and of these contents, settings and program."""
    try:
        there = json.loads((target / "results.json").read_text(encoding="utf-8"))
        datasets = [{**results["dataset"], "path": ""} for results in (there, header)]  # where it lies may change
        configs = [{**results["config"], "stack": ""} for results in (there, header)]  # a stack may have been smaller
        same = there["schema_version"] == header["schema_version"] and configs[0] == configs[1]
        same = same and datasets[0] == datasets[1] and there["environment"]["code"] == header["environment"]["code"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # none, or not written by this program
        return None
    expected = RESULT_FILES + (PAGE,) * bool(same and there.get("analysis"))
    whole = same and all((target / name).exists() for name in expected)
    return {"not run": there["representations_not_run"]} if whole else None


def write_results(target: Path, experiment: Experiment, results: dict) -> None:
    """Write all result files, results.json last; what lies there of other settings is moved to previous/<n>/ first."""
    drawn = figures.draw(results)
    files = {f"figures/{name}": content for name, content in drawn.items()}
    if results["analysis"] is not None:
        files[PAGE] = page.render_page(results, drawn)
    earlier = {path.relative_to(target).as_posix() for path in (target / "figures").glob("[!.]*")}
    store.replace_all(target, files | result_files(experiment, results), sorted(earlier - files.keys()))


def result_files(experiment: Experiment, results: dict) -> dict[str, bytes]:
    """The contents of all files but figures, in the order of ``RESULT_FILES``."""
    part_of = {row: part for part, rows in experiment.rows.items() for row in rows.tolist()}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    grouped = experiment.collection.group_column is not None
    writer.writerow(("file", "label", "split", "group")[: 3 + grouped])
    for row, file in enumerate(experiment.collection.files):
        part = {"validation": "val"}.get(part_of[row], part_of[row])
        writer.writerow((file.path, file.label, part, file.group)[: 3 + grouped])
    top = results["layer_ranking"][: experiment.settings.top_k]
    contents = (
        store.canonical_json(top, indent=2),
        text.render_text(results).encode(),
        table.getvalue().encode(),
        store.packed_arrays(experiment.predictions.arrays()),
        store.canonical_json(results, indent=2),
    )
    return dict(zip(RESULT_FILES, contents, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad flags or input, 3 done but for representations that cannot run.

    And 130 where SIGINT stopped it, 143 where SIGTERM or SIGUSR1 did.
    """
    try:
        return run(parse_arguments(arguments))
    except (UsageError, CollectionError) as error:
        lines = error.shown() if isinstance(error, CollectionError) else f"error: {error}"
        rank = os.environ.get("RANK", "0")  # of several processes most find the same: the others are brief
        print(lines if rank == "0" else f"process {rank}: {lines.splitlines()[0]}", file=sys.stderr)
    except FaultElsewhereError:
        pass  # rank 0 tells
    except TrainingError as error:
        print(f"error: {error}. try another --seed or --device.", file=sys.stderr)
    except OSError as error:
        told = str(error).rstrip(".")
        print(f"error: {told}. the same command continues where this one stopped.", file=sys.stderr)
    except OUT_OF_MEMORY as error:
        if not out_of_memory(error):
            raise
        told = str(error).rstrip(". ")
        print(f"error: out of memory: {told}. try another --device, or fewer threads or processes.", file=sys.stderr)
    except KeyboardInterrupt:  # where Python's own handler is at work, see `stop`
        print("\ninterrupted. the same command continues where this one stopped.", file=sys.stderr)
        return 130
    return 2


def stop(number: int, _: object) -> None:
    """End the process at a signal: at once, as it might at any moment; what was finished is on disk and whole."""
    name = signal.Signals(number).name
    with suppress(OSError):  # nobody may be listening any more
        os.write(2, f"\nstopped by {name}. the same command continues where this one stopped.\n".encode())
    os._exit(130 if number == signal.SIGINT else 143)


def command_line() -> int:
    """`main`, where signals end the process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    return main()


if __name__ == "__main__":
    sys.exit(command_line())
