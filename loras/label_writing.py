"""``python data.py label FOLDER``: a table of a folder's LoRAs, to fill in.

It has a row for each LoRA, whose name is read back as that LoRA, and a label where a run would read one without a
table. Anything else that is known, as what the header says of the training, is a guess: it stands in a column of its
own, which is never read as a label. A spreadsheet computes no cell of it, and reads it as UTF-8 by its byte order mark.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from loras import building, checkpoints, headers, names, small_files
from loras.checkpoints import Choice
from loras.command_line import program_path
from loras.flags import NAMED_DATASETS
from loras.keys import LoraFileError
from loras.label_names import KnownNames, leads_elsewhere
from loras.label_tables import FILE_NAME, LabelError
from loras.labels import FOLDERS, HINT, Labels, column_values, counted, read_labels, would_make_classes
from loras.names import plain
from loras.weight_files import find_weight_files

DEFAULT_NAME = "labels.csv"  # no name that is read without --labels: half-filled, it would stop a run on folders
DELIMITERS = {".csv": ",", ".tsv": "\t"}
FEWEST = 3  # LoRAs of a folder whose name is taken as their label; fewer make no class
# Fields of headers that may name the concept, by what they are called in a hint.
HINTS = {
    "title": "modelspec.title",
    "trigger": "modelspec.trigger_phrase",
    "output": "ss_output_name",
    "name": "name",
    "comment": "ss_training_comment",
}
DATASET_FOLDERS = "ss_dataset_dirs"  # JSON; kohya names each folder by its repeats and its concept: 10_sks dog
MAX_FOLDERS, MAX_HINT = 3, 60  # folders of a hint, characters of each of its parts


class Row(NamedTuple):
    """A row of the table: the name that it gives the LoRA, the files that are read for it, and all files of it."""

    name: str
    read: tuple[str, ...]
    files: tuple[str, ...]


def run(args: argparse.Namespace) -> int:
    """Run ``python data.py label``. Exit codes: 0 done, 2 refused or failed."""
    try:
        lines = write_table(args.path, args.out)
    except LabelError as error:
        print("\n".join(f"error: {finding}" for finding in error.findings), file=sys.stderr)
    except OSError as error:
        print(f"error: {plain(building.fault_of(error))}. Mend that, and start again.", file=sys.stderr)
    else:
        print("\n".join(map(plain, lines)))
        return 0
    return 2


def write_table(root: Path, out: Path | None = None) -> list[str]:
    """Write the table of a folder, and return lines on what is in it and what to do next.

    Args:
        root: The folder.
        out: The table, csv or tsv; None: labels.csv in the folder.

    Raises:
        LabelError: There is no LoRA; the table is there already, cannot be called so, or cannot be written.
        OSError: The folder cannot be read.
    """
    out = root / DEFAULT_NAME if out is None else out
    _check_out(root, out)
    paths, _, _ = find_weight_files(root)
    if not paths:
        raise LabelError(f"{root}: no *.safetensors file in it. Give a folder of LoRAs.")
    choice = checkpoints.choose(root, paths, by_folder=False, step=checkpoints.FINAL)
    rows, unnamed = rows_of(choice)
    if not rows:
        raise LabelError(f"{root}: no table can hold the names of its files, as {unnamed[0]}. Rename them.")
    labels, source = known_labels(rows, read_labels(root, paths))
    hints = {row.name: _hint_of_file(root, row) for row in building.Progress(log=sys.stderr).track(rows, "headers")}
    columns = [FILE_NAME, "label", *([HINT] if any(hints.values()) else [])]
    cells = [[row.name, labels.get(row.name, ""), hints[row.name]][: len(columns)] for row in rows]
    text = io.StringIO()
    csv.writer(text, delimiter=DELIMITERS[out.suffix.lower()], lineterminator="\n").writerows([columns, *cells])
    _check_out(root, out)  # it may have been written meanwhile
    try:
        building.write_atomically(out, text.getvalue().encode("utf-8-sig"))
    except OSError as error:
        raise LabelError(f"{out}: cannot be written ({error.strerror}). Name another place with --out.") from error
    lines = [f"{out}: {_loras(len(rows))}, {_filled_words(len(labels), len(rows), source)}"]
    if hints_there := sum(map(bool, hints.values())):
        lines.append(f"hints:   {HINT} has what the headers of {hints_there} say of their training; it is no label")
    if unnamed:
        lines.append(f"missing: {len(unnamed)} whose names no table can hold, as {unnamed[0]}: rename them")
    return lines + _fields_line(root, paths) + _next_lines(root, out, done=len(labels) == len(rows))


def _check_out(root: Path, out: Path) -> None:
    """Refuse what is no folder, and a table that is there or that has another form."""
    if not os.path.isdir(root):
        fault = "a file, not a folder" if os.path.lexists(root) else "no such folder"
        raise LabelError(f"{root}: {fault}. Give a folder of LoRAs.")
    if out.suffix.lower() not in DELIMITERS:
        raise LabelError(f"--out {out}: neither .csv nor .tsv. Name the table so.")
    if os.path.lexists(out):
        mend = f"Fill it in for --labels={shlex.quote(os.fspath(out))}, or name another with --out."
        raise LabelError(f"{out}: is there already, and is not overwritten. {mend}")


# ----------------------------------------------------------------------------------------------------------------------
# Rows, labels and hints
# ----------------------------------------------------------------------------------------------------------------------


def rows_of(choice: Choice) -> tuple[list[Row], list[str]]:
    """Return a row for each LoRA, and the files that no name in a table can stand for.

    A LoRA with checkpoints has one row, under the name of its folder, which is right for every --step.
    """
    known = KnownNames(choice)
    left_out = defaultdict(list)
    for path, lora in choice.left_out.items():
        left_out[lora].append(path)
    named = [
        (f"{lora}/", Row(lora, chosen, (*chosen, *left_out[lora])))
        for lora, chosen in choice.groups.items()
        if len(chosen) == 1
    ]
    whole = {path for _, row in named for path in row.read}
    named += [(path, Row(path, (path,), (path,))) for path in choice.paths if path not in whole]
    rows, unnamed = [], []
    for name, row in sorted(named):
        cell = _cell(name, row.read, known)
        if cell is None:
            unnamed.append(plain(name))
        else:
            rows.append(row._replace(name=cell))
    return rows, unnamed


def _cell(name: str, files: tuple[str, ...], known: KnownNames) -> str | None:
    """Return a cell that names files, that no spreadsheet changes, and that is read back as them; None for no such."""
    has_letter = re.search(r"[^\W\d_]", name)  # else it may be taken for a number or a date
    for cell in [name, f"./{name}"] if has_letter else [f"./{name}"]:
        is_sound = not names.fault(cell) and names.spreadsheet_cell(cell) == cell and not leads_elsewhere(cell)
        if is_sound and not known.several(cell, None) and known.files(cell, None) == files:
            return cell
    return None


def known_labels(rows: Sequence[Row], read: Labels) -> tuple[dict[str, str], str]:
    """Return the labels that a run would read without the table, by row, and where they come from.

    The name of a folder counts where at least `FEWEST` LoRAs are in it, and where that holds for two: else each folder
    may be a LoRA, or all be in one.
    """
    labels = {}
    for row in rows:
        own = {read.label[path] for path in row.files if path in read.label}
        if len(own) == 1:
            labels[row.name] = own.pop()
    if read.source == FOLDERS:
        counts = Counter(labels.values())
        classes = {label for label, count in counts.items() if count >= FEWEST}
        labels = {name: label for name, label in labels.items() if label in classes and len(classes) > 1}
    sound = {
        name: label
        for name, label in labels.items()
        if not names.fault(label) and names.spreadsheet_cell(label) == label
    }
    return sound, read.source


def _hint_of_file(root: Path, row: Row) -> str:
    """Return what the header of a LoRA says of its training; empty where it says nothing, or cannot be read."""
    try:
        fields = headers.parse_header(headers.read_header(root / row.read[-1])).fields
    except (LoraFileError, OSError):  # inspect says so
        return ""
    return hint_of(fields, Path(row.name).stem)


def hint_of(fields: dict[str, str], name: str) -> str:
    """Return what the fields of a header say of the concept, in words, less what the file's own name says.

    Example:
        >>> hint_of({"ss_dataset_dirs": '{"10_sks dog": {}}', "ss_output_name": "rex", "ss_seed": "1"}, "rex")
        'trained on: sks dog'
    """
    texts = {"trained on": ", ".join(_dataset_folders(fields.get(DATASET_FOLDERS, "")))}
    texts |= {word: fields.get(name, "").strip() for word, name in HINTS.items()}
    parts, known = [], {"", "none", name.casefold()}
    for word, text in texts.items():
        if text.casefold() not in known:
            known.add(text.casefold())
            parts.append(f"{word}: {text[:MAX_HINT]}")
    return "; ".join(parts)


def _dataset_folders(text: str) -> Iterable[str]:
    """Return the concepts of the folders that kohya trained on."""
    try:
        folders = small_files.parse_object(text)
    except ValueError:
        return []
    concepts = dict.fromkeys(re.sub(r"^\d+_", "", folder).strip() for folder in folders if folder.isprintable())
    return list(concepts)[:MAX_FOLDERS]


# ----------------------------------------------------------------------------------------------------------------------
# What is printed
# ----------------------------------------------------------------------------------------------------------------------


def _loras(count: int) -> str:
    return f"{count} LoRA" + ("s" if count > 1 else "")


def _filled_words(filled: int, count: int, source: str) -> str:
    if not filled:
        return "no label known"
    return f"{filled} labelled from {source}" + (f", {count - filled} to fill in" if filled < count else "")


def _fields_line(root: Path, paths: Sequence[str]) -> list[str]:
    """Return a line on the fields of metadata.json files that make classes without a table, if there are any."""
    fields = would_make_classes(column_values(root, paths, None), len(paths))
    choice = "--label-column=NAME takes one of these instead, without a table"
    return [f"fields:  {building.METADATA_NAME} beside them has {counted(fields)}: {choice}"] if fields else []


def _next_lines(root: Path, out: Path, done: bool) -> list[str]:
    folder, flag = shlex.quote(os.fspath(root)), f"--labels={shlex.quote(os.fspath(out))}"
    folder = f"./{folder}" if folder in NAMED_DATASETS else folder  # else a name of the built-in ones
    fill_in = [] if done else ["fill in the column label of each LoRA (in a spreadsheet: save as CSV UTF-8), then"]
    look, experiment = program_path("data.py"), program_path("ablation_experiment.py")
    commands = [f"python {look} inspect {folder} {flag}", f"python {experiment} --dataset={folder} {flag}"]
    return [("next:    " if i == 0 else "         ") + line for i, line in enumerate(fill_in + commands)]
