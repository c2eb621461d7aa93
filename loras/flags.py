"""Flags of ``data.py``, of which those that say how a collection is read are the experiment's too."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from loras.command_line import Parser, whole_number

NAMED_DATASETS = ("1k", "10k", "50k", "100k", "small", "dynamics")  # what --dataset takes beside folders
# Those that indexing takes by the same names; --layers chooses among the layers that were indexed.
OF_INDEX = ("labels", "label_column", "group_column", "step", "common_layers", "skip_bad", "strict")


def add_collection_flags(add: Callable) -> None:
    """Add the flags; ``add`` is a parser's ``add_argument``."""
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="csv, tsv or jsonl with the columns file_name and label; `python data.py label FOLDER` writes one (none)",
    )
    add(
        "--label-column",
        metavar="NAME",
        help="column of the table, or field of the metadata.json files, that is the label (category_label; in a table "
        "else label, else its only column)",
    )
    add(
        "--group-column",
        metavar="NAME",
        help="column of the table, or field of the metadata.json files: LoRAs that share its value are never on both "
        "sides of the split (none)",
    )
    add(
        "--step",
        type=_step,
        metavar="STEP",
        help="of a LoRA's folder that holds checkpoints: final, the last adapter; a number, the checkpoint of that "
        "step; all, each of them as a sample, those of one LoRA on one side of the split (final; all where the table "
        "of labels has a column step)",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out files that cannot be used, and list them, instead of refusing",
    )
    add(
        "--strict",
        action="store_true",
        help="refuse what is otherwise only reported: copies, mixed scales, untrained LoRAs, and the like; with "
        "--skip-bad leave those files out",
    )
    add(
        "--common-layers",
        action="store_true",
        help="where files differ in their layers, keep the modules that all of them have, instead of refusing",
    )
    add(
        "--layers",
        metavar="PATTERN",
        help="only layers whose name or canonical module matches: attn2, '*.to_v.*', or a comma list; '!attn2' leaves "
        "out what matches (all)",
    )


def _step(text: str) -> str:
    from loras import checkpoints  # and numpy, for which --help would wait

    try:
        return checkpoints.step_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_arguments(
    arguments: list[str] | None = None, add_experiment_flags: Callable[[Parser], None] | None = None
) -> argparse.Namespace:
    """Parse the flags of ``inspect``, ``import`` and ``label``.

    Args:
        arguments: Of the command line.
        add_experiment_flags: Adds to ``inspect`` all flags of the experiment, of which this folder knows those of
            `add_collection_flags`; None: it takes these alone.
    """
    parser = Parser(description="Look at a folder of LoRAs before an experiment, or make one.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser(
        "inspect",
        help="show what a folder of LoRAs holds, and all for which an experiment would refuse it",
        description="Show what a folder of LoRAs holds, and all for which an experiment would refuse it: exit code 2. "
        "Nothing is trained, and nothing is left behind.",
        epilog="All other flags of the experiment are taken too, and stand in the command of the last line.",
    )
    look.add_argument("path", metavar="FOLDER", help=f"any folder of LoRAs; or one of {', '.join(NAMED_DATASETS)}")
    look.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    look.add_argument("--all", action="store_true", help="list every layer and every class")
    look.add_argument(
        "--headers-only",
        action="store_true",
        help="do not read the weights: no NaN, copies, epochs, untrained LoRAs or outliers are looked for",
    )
    (add_experiment_flags or (lambda parser: add_collection_flags(parser.add_argument)))(look)
    publish = commands.add_parser("import", help="turn a published parquet collection into a folder of LoRAs")
    publish.add_argument("source", help="a parquet file, a folder of them, or owner/name of a data set of the hub")
    publish.add_argument("out", type=Path, help="folder to make; it may exist if the same import made it")
    publish.add_argument(
        "--rank", type=whole_number, help="rank of the LoRAs, where cells are flat lists (the column rank, or 1)"
    )
    publish.add_argument(
        "--skip-bad", action="store_true", help="leave out rows with NaN or a missing cell, and say how many"
    )
    publish.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out columns, by name or with * (none)",
    )
    publish.add_argument("--subset", help="of a data set of the hub that has several (none)")
    publish.add_argument("--split", help="of a data set of the hub that has several (the only one)")
    label = commands.add_parser("label", help="write a table of the LoRAs in a folder, to fill in their labels")
    label.add_argument("path", metavar="FOLDER", type=Path, help="folder of LoRAs")
    label.add_argument("--out", type=Path, metavar="FILE", help="the table, csv or tsv (labels.csv in the folder)")
    return parser.parse_args(arguments)
