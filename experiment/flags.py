"""Flags of the command line; `settings.resolve` checks them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from experiment.networks import FEW_LORAS, FEW_MODULES, NETWORKS
from experiment.settings import LEVELS
from loras.flags import add_collection_flags
from representations import REPRESENTATIONS

BUILT_IN_SIZES = {"small": 100, "1k": 1_000, "10k": 10_000}
NAMED_DATASETS = ("1k", "10k", "50k", "100k", "small")
COSTLY = (
    f"{' and '.join(name for name, network in NETWORKS.items() if network.reads == 'factors')} only on a GPU, or for "
)
COSTLY += f"fewer than {FEW_LORAS:,} LoRAs of at most {FEW_MODULES} modules"

FIGURE_STYLE = "report: figures under a sentence with their finding; paper: without it, and also as wide as one column "
FIGURE_STYLE += "where they can be read so. Another style draws finished results anew, and trains nothing (report)"
SKETCH_FLAT = "flat_vec, pca and the autoencoders read at most 256 numbers of each layer, a fixed sparse random "
SKETCH_FLAT += "projection of its weights, and are marked as sketched: for LoRAs of millions of weights"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the command line; `resolve` checks them."""
    parser = argparse.ArgumentParser(
        description="Rank LoRA layers by how well they predict the concept, remove the best, compare representations."
    )
    add = parser.add_argument_group("collection").add_argument
    add("--dataset", default="1k", help="1k, 10k, 50k, 100k or small, in --data-dir; or any folder of LoRAs (1k)")
    add(
        "--data-dir",
        type=Path,
        help="where the named collections lie (data). Only without this flag a missing small, 1k or 10k is trained "
        "instead: the built-in digits",
    )
    add_collection_flags(add)
    add(
        "--keep-twins",
        action="store_true",
        help="leave copies of a LoRA, and epochs of one training, where the split puts them, also on both sides of it; "
        "without this flag they are kept together",
    )
    add_experiment_flags(parser.add_argument_group("experiment").add_argument)
    add = parser.add_argument_group("files and machine").add_argument
    add("--output-dir", type=Path, default=Path("ablation-results"), help="folder of results (ablation-results)")
    add("--cache-dir", type=Path, help="folder of finished work, reused by later runs (<output-dir>/.cache)")
    add("--figure-style", choices=("report", "paper"), default="report", help=FIGURE_STYLE)
    add(
        "--device",
        default="auto",
        help="auto, cpu, cuda or cuda:N; cuda takes all GPUs that are visible, auto too if there are any (auto)",
    )
    add(
        "--scheduler",
        metavar="ADDRESS",
        help="address of a running Dask scheduler, or the file that it has written: its workers train (none: this "
        "machine does)",
    )
    add(
        "--insecure-cluster",
        action="store_true",
        help="accept a scheduler on another machine without TLS, which runs whatever reaches it",
    )
    add(
        "--partial-ok",
        action="store_true",
        help="exit with 0, not 3, where only some representations could not be run",
    )
    return parser.parse_args(arguments)


def add_experiment_flags(add: Callable) -> None:
    """Add the flags that decide the numbers; ``add`` is a parser's ``add_argument``."""
    add("--top-k", type=int, default=5, help="number of most predictive layers to remove (5)")
    add("--num-runs", type=int, help="trainings of each classifier (10; 3 with --quick)")
    add(
        "--rank-by",
        choices=("test", "val"),
        default="test",
        help="accuracy that ranks the layers. test: as the experiment is defined; val: keeps the choice off the test "
        "rows (test)",
    )
    add(
        "--representations",
        default="all",
        help=f"all, or a comma list of {', '.join(REPRESENTATIONS)} (all, but {COSTLY})",
    )
    add("--sketch-flat", action="store_true", help=SKETCH_FLAT)
    add("--seed", type=int, default=42, help="of the split and of all training (42)")
    add(
        "--splits",
        type=int,
        default=1,
        metavar="N",
        help="splits into train, validation and test LoRAs. Each ranks the layers and removes its own top ones; the "
        "results are those of the first, beside their variation over all (1)",
    )
    add(
        "--controls",
        choices=LEVELS,
        help="what to compare with. basic: all that needs no training, and for stats in 3 runs 39 random removals, the "
        "bottom k, the top k alone, curves of at least 12 points; each representation without the layers that other "
        "test LoRAs choose, in 3 runs; and the best representation without fitting on a split by groups where a "
        "column looks like one; update_kernel and update_views too, with 200 removals, where their "
        "kernels are kept; all: also ensemble and update_sketch, both kernels in any case, every run, 32 points, what "
        "each layer adds to the top k, and attention in 19 trainings on permuted labels (basic; none with --quick)",
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
        help="for trying things out: 3 runs, patience 5, at most 30 epochs of classifiers and 8 of autoencoders",
    )
