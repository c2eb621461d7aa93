"""Flags of the command line; `settings.resolve` checks them.

Imports only what takes no time: --help and mistakes are answered before any library is imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loras.command_line import Parser, whole_number
from loras.flags import add_collection_flags

BUILT_IN_SIZES = {"small": 100, "1k": 1_000, "10k": 10_000, "dynamics": 200}
BUILT_IN_STEPS = {"dynamics": (1, 2, 4, 8, 15, 30, 45, 60)}  # at which each LoRA is a sample; of others only the last
LEVELS = ("none", "basic", "all")  # of controls
UNLISTED = (  # by the help of ``inspect``
    *("--rank-by", "--controls", "--null-shuffles", "--splits", "--save-models"),
    *("--scheduler", "--insecure-cluster", "--partial-ok"),
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the command line; `resolve` checks them."""
    parser = Parser(
        usage="%(prog)s [--dataset FOLDER] [--quick] [flags]",
        description="Rank LoRA layers by how well they predict the concept, remove the best, compare representations. "
        "In brackets: what a flag is without being given.",
        epilog="python data.py inspect FOLDER shows what a folder of LoRAs holds, before an experiment.",
    )
    _add_collection_flags(parser.add_argument_group("collection"))
    _add_experiment_flags(parser.add_argument_group("experiment"))
    _add_comparison_flags(parser.add_argument_group("what the results are compared with"))
    _add_further_flags(parser.add_argument_group("what else is asked of the LoRAs"))
    _add_machine_flags(parser.add_argument_group("files and machine"))
    return parser.parse_args(arguments)


def add_preflight_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags but --dataset, as a folder is named there; those that decide nothing there are not listed."""
    _add_collection_flags(_Listed(parser.add_argument_group("collection")))
    group = _Listed(parser.add_argument_group("of the experiment that is asked about"))
    for add_flags in (_add_experiment_flags, _add_comparison_flags, _add_further_flags, _add_machine_flags):
        add_flags(group)


class _Listed:
    """A group of flags without --dataset, that lists none of the ``UNLISTED``."""

    def __init__(self, group: argparse._ArgumentGroup):
        self.group = group

    def add_argument(self, name: str, **how: object) -> None:
        """Add a flag as the group does."""
        if name != "--dataset":
            self.group.add_argument(name, **how | ({"help": argparse.SUPPRESS} if name in UNLISTED else {}))


def _add_collection_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--dataset",
        default="1k",
        metavar="FOLDER",
        help="any folder of LoRAs; or 1k, 10k, 50k, 100k, small or dynamics, which lie in --data-dir (1k)",
    )
    add(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="where the named collections lie (data). Only without this flag a missing small, 1k, 10k or dynamics "
        "is trained instead: the built-in digits, of dynamics 200 at 8 steps of their training",
    )
    add_collection_flags(add)
    add(
        "--keep-twins",
        action="store_true",
        help="leave copies of a LoRA, and epochs of one training, where the split puts them, also on both sides of it; "
        "without this flag they are kept together",
    )


def _add_experiment_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--quick",
        action="store_true",
        help="for trying things out: 3 runs, patience 5, at most 30 epochs of classifiers and 8 of autoencoders, and "
        "--controls=none; it is analysed and drawn all the same",
    )
    add("--top-k", type=whole_number, default=5, metavar="K", help="most predictive layers to remove (5)")
    add("--num-runs", type=whole_number, metavar="R", help="trainings of each classifier (10; 3 with --quick)")
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
        metavar="NAMES",
        help="all, or a comma list such as stats,spectral,update_kernel; README.md lists the names, and so does the "
        "answer to a name that is unknown (all, less those that this machine would take long for: the run says which)",
    )
    add(
        "--sketch-flat",
        action="store_true",
        help="flat_vec, pca and the autoencoders read at most 256 numbers of each layer, a fixed sparse random "
        "projection of its weights, and are marked as sketched: for LoRAs of millions of weights",
    )
    add("--seed", type=whole_number, default=42, metavar="NUMBER", help="of the split and of all training (42)")


def _add_comparison_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--controls",
        choices=LEVELS,
        help="what to train to compare with; what needs no training is always analysed. none: nothing, so whether "
        "prediction is robust has no verdict; basic: for stats in 3 runs 39 random removals, the bottom k, the top k "
        "alone, curves of at least 12 points; each representation without the layers that other test LoRAs choose, in "
        "3 runs; and the best representation without fitting on a split by groups where a column looks like one; "
        "update_kernel and update_views too, with 200 removals, where their kernels are kept; all: also ensemble and "
        "update_sketch, both kernels in any case, every run, 32 points, what each layer adds to the top k, and "
        "attention in 19 trainings on permuted labels (basic; none with --quick)",
    )
    add(
        "--null-shuffles",
        type=whole_number,
        default=0,
        metavar="N",
        help="also train the ranking N times on shuffled labels, one run each, as a check of the whole (0)",
    )
    add(
        "--splits",
        type=whole_number,
        default=1,
        metavar="N",
        help="splits into train, validation and test LoRAs. Each ranks the layers and removes its own top ones; the "
        "results are those of the first, beside their variation over all (1)",
    )


def _add_further_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--holdout",
        metavar="COLUMN",
        help="test on the LoRAs of each value of a column in turn, such as rank or artist, and train on all others: "
        "at most 10 values with at least 10 LoRAs each, by stats, update_sketch and update_views. A column is one of "
        "the table or of the metadata.json files, or a field of the headers (none)",
    )
    add(
        "--also",
        metavar="COLUMNS",
        help="a comma list of other columns that the same features are to predict, by linear classifiers; all: every "
        "column with 2 to 50 values, at most 100; none. A column of more numbers is put in quantile bins where it is "
        "named (none; all with --controls=all)",
    )
    add(
        "--activations",
        type=Path,
        metavar="FILE",
        help="safetensors with inputs of each module, recorded from the base model: adds the representation "
        "update_response, of the outputs that an update adds for 8 of them (none)",
    )
    add(
        "--save-models",
        default="best",
        metavar="NAMES",
        help="what is kept in model/ beside the results, for predict.py: best, a comma list of update_spectrum, "
        "update_sketch, update_kernel, update_views and update_attention, or none. best: of update_spectrum and "
        "update_sketch the better one by validation, and update_views, or else update_kernel (best)",
    )


def _add_machine_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    default = Path("ablation-results")
    add("--output-dir", type=Path, default=default, metavar="FOLDER", help=f"of the results ({default})")
    add(
        "--cache-dir",
        type=Path,
        metavar="FOLDER",
        help="of finished work, which later runs read instead of doing it again (<output-dir>/.cache)",
    )
    add(
        "--figure-style",
        choices=("report", "paper"),
        default="report",
        help="figures under a sentence with their finding; or plain ones for a paper, where they can be read also as "
        "wide as one column. Another style draws finished results anew, and trains nothing (report)",
    )
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
