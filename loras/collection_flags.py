"""Flags that say how a collection is read: those of ``data.py inspect``, and of the experiment too."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from loras import checkpoints

# Those that indexing takes by the same names; --layers chooses among the layers that were indexed.
OF_INDEX = ("labels", "label_column", "group_column", "step", "common_layers", "skip_bad", "strict")


def add_collection_flags(add: Callable) -> None:
    """Add the flags; ``add`` is a parser's ``add_argument``."""
    add("--labels", type=Path, metavar="FILE", help="csv or jsonl with the columns file_name and label (none)")
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
        help="only layers whose name or canonical module matches: attn2, '*.to_v.*', or a comma list (all)",
    )


def _step(text: str) -> str:
    try:
        return checkpoints.step_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
