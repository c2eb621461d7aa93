"""Accuracy of every representation on LoRAs whose class lies in a known place: which representation for which LoRAs?

    python benchmarks/regimes.py [--cells written-640-1,digits-256-1] [--representations stats,update_kernel] [--quick]

A cell is a collection of 300 LoRAs of 16 modules and ten classes: planted (see planted_zoo.py, by whose names cells are
called), or digits LoRAs really trained at width 256, rank 1, on to_q and to_v only. The real program reads its files
and trains every row of the table of representations on all layers: test accuracy in percent, the mean of ``--runs``
trainings (a support vector machine has one) and ``--seeds`` collections. With 60 test LoRAs a standard error is at
most 6.5 points, and 1.3 at 99 %; chance is 10. By default eleven cells, one factor changed at a time; ``--cells=all``
takes each of 46. The digits of ``digits-256-1`` take 21 minutes to train on one core.

2026-11-26, one core of an AMD EPYC, --runs=2, 670 s: update_views reaches 93 to 100 % in all cells but scale, where
update_spectrum is best with 58, and update_kernel 10 to 92. The table stands in docs/representations.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parents[1]))

from planted_zoo import KINDS, RANKS, WIDTHS, Planted, write_zoo

import ablation_experiment
import data
from experiment.engine import Engine
from experiment.phases import Experiment
from experiment.settings import Networks, count_cores, resolve
from loras import digits_zoo
from loras.building import Progress, write_lora
from representations import OF_WEIGHTS, REPRESENTATIONS

DIGITS, DIGITS_WIDTH = "digits-256-1", 256
DIGITS_MODULES = [name for name in digits_zoo.LORA_MODULES if name.endswith(("to_q", "to_v"))]
ALL = [*("-".join(map(str, cell)) for cell in product(KINDS, WIDTHS, RANKS)), DIGITS]
DEFAULT = (
    *("written-64-1", "written-320-1", "written-640-1", "read-320-1", "read-640-1", "both-64-1"),
    *("both-320-1", "both-320-4", "both-320-mixed", "scale-320-1", "pairs-320-1"),
)
LORAS, QUICK_LORAS = 300, 100


# ----------------------------------------------------------------------------------------------------------------------
# Collections
# ----------------------------------------------------------------------------------------------------------------------


def write_digits(out: Path, count: int, seed: int = 0, width: int = DIGITS_WIDTH) -> None:
    """Train ``count`` digits LoRAs of rank 1 on ``DIGITS_MODULES`` of a base model of another width, and write them."""
    images, labels = digits_zoo.load_images()
    groups = digits_zoo.image_groups(labels, seed)
    base = digits_zoo.train_base(images, labels, seed, lambda *_: None, width)
    for first in range(0, count, digits_zoo.STACK):
        numbers = range(first, min(first + digits_zoo.STACK, count))
        plans = [digits_zoo.plan_lora(seed, i, groups, len(DIGITS_MODULES), 1, width) for i in numbers]
        factors = digits_zoo.train_stack(base, images, plans, DIGITS_MODULES)
        for row, (number, plan) in enumerate(zip(numbers, plans, strict=True)):
            layers = {
                f"transformer.{module}.lora.{role}.weight": factor[row].contiguous()
                for module, pair in factors.items()
                for role, factor in zip(("down", "up"), pair, strict=True)
            }
            metadata = json.dumps({"category_label": str(plan.digit)}).encode()
            write_lora(out / str(plan.digit) / f"{number:05}", metadata, save(layers))


def write_cell(out: Path, name: str, count: int, seed: int) -> None:
    """Write the collection of a cell."""
    if name == DIGITS:
        write_digits(out, count, seed)
    else:
        write_zoo(out, count, Planted.named(name), seed)


# ----------------------------------------------------------------------------------------------------------------------
# The program on them
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A collection as the program has read it: the experiment, what can run, and why the others cannot."""

    experiment: Experiment
    chosen: list[str]
    not_run: dict[str, str]


@contextmanager
def opened(
    folder: Path,
    flags: Sequence[str],
    networks: Networks = Networks(),  # noqa: B008
    cores: int | None = None,
) -> Iterator[Opened]:
    """Index a collection and extract its features as the program does; say nothing.

    Args:
        folder: The collection; finished work lies beside it.
        flags: Of the program's command line.
        networks: Widths of the networks.
        cores: Workers on a CPU; None: as many as the program takes.
    """
    fixed = [f"--dataset={folder}", f"--output-dir={folder.with_name('results')}", "--controls=none", "--top-k=1"]
    args = ablation_experiment.parse_arguments([*fixed, *flags])
    settings = resolve(args, networks)
    engine = Engine(settings.devices, cores or count_cores())
    quiet = Progress(shown=False)
    with closing(engine), threadpool_limits(1, "blas"):
        with redirect_stdout(io.StringIO()):
            collection = data.index_as_asked(args, folder, folder.name, quiet)
            cache = args.output_dir / ".cache"
            indexed = collection, ablation_experiment.make_plan(settings, collection, engine, cache)
            collection, plan, extracted = ablation_experiment.read_weights(
                args, settings, indexed, cache, engine, quiet
            )
        experiment = Experiment(settings, collection, plan.selected, plan.rows, extracted, engine, quiet)
        yield Opened(experiment, plan.chosen, dict(plan.not_run))


def evaluated(experiment: Experiment, name: str) -> tuple[list[float] | None, float]:
    """Train one representation on all layers; return its test accuracies (None: it cannot run), and the seconds."""
    start = time.perf_counter()
    if experiment.fit([name], [[]]):
        return None, time.perf_counter() - start
    ((_, entry),) = experiment.evaluate([name], [], "baseline")
    runs = None if isinstance(entry, str) else entry["test_accuracy"]["runs"]
    return runs, time.perf_counter() - start


def accuracies_of(folder: Path, flags: Sequence[str], **networks: Networks) -> tuple[dict[str, float], dict]:
    """Return the mean test accuracy of each representation, in percent (NaN: it cannot run), and its seconds."""
    accuracies, seconds = {}, {}
    with opened(folder, flags, **networks) as collection:
        accuracies = dict.fromkeys(collection.not_run, np.nan)
        for name in collection.chosen:
            runs, seconds[name] = evaluated(collection.experiment, name)
            accuracies[name] = np.nan if runs is None else 100 * float(np.mean(runs))
    return accuracies, seconds


def measure(cell: str, names: Sequence[str], count: int, seeds: int, flags: Sequence[str]) -> tuple[dict, dict]:
    """Return the mean accuracy of representations on the collections of a cell, and the seconds of each part."""
    results, seconds = [], {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            write_cell(Path(folder, "zoo"), cell, count, seed)
            seconds["writing"] = seconds.get("writing", 0) + time.perf_counter() - start
            accuracies, spent = accuracies_of(Path(folder, "zoo"), [f"--representations={','.join(names)}", *flags])
            results.append(accuracies)
            for name, value in spent.items():
                seconds[name] = seconds.get(name, 0) + value
    return {name: float(np.mean([result[name] for result in results])) for name in names}, seconds


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


def summary(cell: str, accuracies: dict[str, float], seconds: dict[str, float]) -> str:
    """Return a line on a finished cell: its cost, and the best representations."""
    ran = {name: value for name, value in accuracies.items() if not np.isnan(value)}
    best = sorted(ran, key=lambda name: -ran[name])[:4]
    slowest = max(seconds, key=seconds.get)
    texts = ", ".join(f"{name} {ran[name]:.1f}" for name in best)
    return f"{cell:<16}{sum(seconds.values()):>5.0f} s ({slowest} {seconds[slowest]:.0f} s)  {texts}"


def table(results: dict[str, dict[str, float]]) -> str:
    """Return a row for each representation and a column for each cell, headed by kind, width and rank."""
    heads = list(zip(*(cell.split("-") for cell in results), strict=True))
    lines = [f"{title:<18}" + "".join(f"{part:>9}" for part in head) for title, head in
             zip(("test accuracy, %", "width", "rank"), heads, strict=True)]  # fmt: skip
    for name in REPRESENTATIONS:
        if any(name in accuracies for accuracies in results.values()):
            values = [accuracies.get(name, np.nan) for accuracies in results.values()]
            lines.append(f"{name:<18}" + "".join(f"{'-' if np.isnan(x) else format(x, '.1f'):>9}" for x in values))
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description="Compare representations where the class lies in a known place.")
    parser.add_argument("--cells", default="", help="a comma list of KIND-WIDTH-RANK, or all (eleven of them)")
    parser.add_argument("--representations", default="all", help="all, or a comma list (all)")
    parser.add_argument("--autoencoders", action="store_true", help="also the autoencoders beyond a width of 64")
    parser.add_argument("--runs", type=int, default=3, help="trainings of each classifier (3)")
    parser.add_argument("--seeds", type=int, default=1, help="collections of each cell (1)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_LORAS} LoRAs, and the program's own --quick")
    args = parser.parse_args(arguments)
    args.cells = {"": list(DEFAULT), "all": ALL}.get(args.cells) or args.cells.split(",")
    for cell in args.cells:
        if cell != DIGITS:
            Planted.named(cell)
    args.names = list(OF_WEIGHTS) if args.representations == "all" else args.representations.split(",")
    return args


def names_in(cell: str, names: Sequence[str], autoencoders: bool) -> list[str]:
    """Return the representations that are trained in a cell."""
    wide = int(cell.split("-")[1]) > WIDTHS[0] and not autoencoders
    return [name for name in names if not (wide and REPRESENTATIONS[name].made == "autoencoder")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells and print each as it is finished, then the table."""
    args = parse_arguments(arguments)
    count = QUICK_LORAS if args.quick else LORAS
    print(f"{os.cpu_count()} cores ({platform.machine()}), {count_cores()} workers, torch "
          f"{torch.__version__}; {count} LoRAs, {args.runs} runs, {args.seeds} collections of each cell")  # fmt: skip
    flags = [f"--num-runs={args.runs}", *(["--quick"] if args.quick else [])]
    results, start = {}, time.perf_counter()
    for cell in args.cells:
        names = names_in(cell, args.names, args.autoencoders)
        results[cell], seconds = measure(cell, names, count, args.seeds, flags)
        print(summary(cell, results[cell], seconds), flush=True)
    print(f"\n{table(results)}\n{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
