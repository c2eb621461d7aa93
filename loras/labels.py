"""Labels and groups of LoRAs: from a table, a metadata.json beside the weights, or the folder; the first that exists.

A table names each weight file, or the folder of a LoRA, in ``file_name``. These names are only ever compared with the
files of the collection: no path is made of them, so they lead nowhere else. Where the labels come from decides which
folders are LoRAs, and so which checkpoints are read (loras/checkpoints.py).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from loras import checkpoints, names, small_files
from loras.building import METADATA_NAME
from loras.checkpoints import Choice
from loras.label_tables import FILE_NAME, STEP, LabelError, columns_of, rows, table_at
from loras.lora_files import LoraFileError
from loras.names import plain
from loras.notices import Finding

LABEL_COLUMNS = ("category_label", "label")  # of a table; the first that it has, where --label-column names none
LONG_TEXT = 200  # characters; a caption is no group and no number
METADATA_FIELD = "category_label"
MAX_SHOWN = 12  # columns in a message


@dataclass
class Labels:
    """Label and group of each weight file that has one, by path, and the reasons why others have none.

    ``column`` is that of the table or the field of the metadata.json files; None where folders are the labels.
    ``choice`` are the files that are read. ``faults`` concern all labels at once, in the form of a `LabelError`'s
    findings.
    """

    choice: Choice
    source: str = ""
    column: str | None = None
    table: Path | None = None
    label: dict[str, str] = field(default_factory=dict)
    group: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def read_labels(
    root: Path,
    paths: Sequence[str],
    table: Path | None = None,
    column: str | None = None,
    group_column: str | None = None,
    step: str | None = None,
) -> Labels:
    """Choose the files of a collection that are read, and read label and group of each.

    Labels come from the first that exists: ``table``; metadata.csv or metadata.jsonl at the root; metadata.json
    beside the weight files; where no column is named, their class folders. Groups stand in the table if it has such a
    column, else in the metadata.json files.

    Args:
        root: The collection.
        paths: All its weight files, relative to it.
        table: A csv or jsonl of labels, wherever it lies.
        column: Column or field of the label. None: ``category_label``; in a table else ``label``, else the only column.
        group_column: Column or field of the group. None: no groups.
        step: What is read of a training, see `checkpoints.choose`. None: the last, or where the table has a column
            ``step`` all that it names.
    """
    result = Labels(Choice(checkpoints.FINAL, tuple(paths)), table=table)
    try:
        result.table = table or table_at(root)
        columns = columns_of(result.table) if result.table else []
        beside, unreadable = None, []
        if not result.table or (group_column and group_column not in columns):
            beside = _fields_beside(root, paths, (column or METADATA_FIELD, group_column), unreadable)
        by_folder = not result.table and not column and METADATA_FIELD not in beside.names
        implied = step is None and STEP in columns
        step = step or (checkpoints.ALL if implied else checkpoints.FINAL)
        result.choice = checkpoints.choose(root, paths, by_folder, step)
        result.findings += result.choice.findings
        if result.table:
            _label_by_table(result, root, columns, (column, group_column), only_named=implied)
        if beside:
            chosen = set(result.choice.paths)
            beside = _Beside({path: row for path, row in beside.fields.items() if path in chosen}, beside.names)
            result.findings += [finding for finding in unreadable if chosen.intersection(finding.files)]
            if not result.table:
                _label_by_metadata_or_folder(result, root, beside, column)
            if group_column:
                _group_by_metadata(result, root, beside, group_column)
    except LabelError as error:
        result.faults += error.findings
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def _label_by_table(
    result: Labels, root: Path, columns: list[str], asked: tuple[str | None, str | None], only_named: bool
) -> None:
    """Fill in labels and groups of a table; with ``only_named`` checkpoints that it does not name are left out."""
    table, (column, group_column) = result.table, asked
    result.column = column or _default_column(table, columns, group_column)
    if result.column not in columns:
        choices = f"the columns there are: {counted(column_values(root, result.choice.paths, table))}"
        fault = f"no label: no column {result.column}; {choices}"
        raise LabelError(f"{table}: {fault}. Choose one with --label-column.")
    result.source = f"{result.column} in {plain(table.name)}"
    for path, row in _rows_of_files(result, root, columns):
        _put(result.label, path, row.get(result.column))
        _put(result.group, path, row.get(group_column))
    if only_named:
        groups = (group for group in result.choice.groups.values() if result.label.keys() & set(group))
        result.choice = result.choice.without([path for group in groups for path in group if path not in result.label])
    tried = f"no row with {result.column} for it in {table.name}; the columns there are: {_listed(columns)}"
    for path in result.choice.paths:
        if path not in result.label:
            mend = "Label it or leave it out."
            if lora := result.choice.lora_of.get(path):
                mend = f"Label it, or its folder {lora}, or choose another --step."
            result.findings.append(Finding((path,), f"no label: {tried}. {mend}"))
        elif group_column in columns and path not in result.group:
            result.findings.append(_no_group(path, group_column, f"its row in {table.name}"))


def _default_column(table: Path, columns: list[str], group_column: str | None) -> str:
    """Return the column of the label where none is named."""
    for name in LABEL_COLUMNS:
        if name in columns:
            return name
    others = [name for name in columns if name not in (group_column, STEP)]
    if len(others) == 1:
        return others[0]
    choices = f"the columns there are: {counted(column_values(table.parent, [], table))}"
    fault = f"no label: no column {' or '.join(LABEL_COLUMNS)}; {choices}"
    raise LabelError(f"{table}: {fault}. Choose one with --label-column.")


def _rows_of_files(result: Labels, root: Path, columns: list[str]) -> Iterator[tuple[str, dict]]:
    """Yield path and row of each weight file that a table names; rows for missing files become findings.

    A row may also name the folder of one LoRA, with all its checkpoints that are read, or in a column ``step`` one of
    them. Rows of files that --step leaves out are passed over.

    Raises:
        LabelError: Rows name no file, one outside the collection, or one that another row has named.
    """
    known = _Known(result.choice)
    lines: dict[str, int] = {}
    faults = []
    for line, row in rows(result.table):
        name, place = row.get(FILE_NAME), f"{result.table}: line {line}"
        if not isinstance(name, str) or not name.strip():
            faults.append(f"{place}: names no file in {FILE_NAME}. Name one, or remove the row.")
        elif "://" in name or re.match(r"[/\\]|[A-Za-z]:[/\\]", name) or ".." in re.split(r"[/\\]", name):
            faults.append(f"{place}: {name!r} is not a path below the collection. Name it relative to {root}.")
        elif (paths := known.files(name, row.get(STEP))) is None and (steps := known.steps(name)):
            step = plain(str(row.get(STEP)))
            fault = f"{plain(name)} has no checkpoint {step}: there {steps}. Mend the step, or remove the row."
            result.findings.append(Finding((name,), fault, place))
        elif paths is None:
            fault = f"a label for a missing file: no weight file {name!r} in {root}, of whose folders hidden and linked"
            fault += f" ones are not read; the columns there are: {_listed(columns)}"
            result.findings.append(Finding((name,), f"{fault}. Fetch the file or remove the row.", place))
        elif again := [path for path in paths if path in lines]:
            faults.append(f"{place}: {name!r} again, after line {lines[again[0]]}. Keep one row for each LoRA.")
        else:
            for path in paths:
                lines[path] = line
                yield path, row
    if faults:
        raise LabelError(*faults)


class _Known:
    """The names by which rows of a table may call files: their paths, or folders that hold one LoRA."""

    def __init__(self, choice: Choice):
        self.choice = choice
        folders: dict[str, list[str]] = defaultdict(list)
        for path in choice.paths:
            for folder in _above(path):
                folders[folder].append(path)
        self.by_name = {folder: tuple(paths) for folder, paths in folders.items() if len(paths) == 1}
        others = [*choice.left_out, *(path for finding in choice.findings for path in finding.files)]
        left_out = {folder for path in others for folder in _above(path)} - folders.keys()
        self.by_name |= dict.fromkeys((*others, *left_out), ())
        self.by_name |= {lora: paths for lora, paths in choice.groups.items() if lora not in choice.paths}
        self.by_name |= {path: (path,) for path in choice.paths}

    def files(self, name: str, step: object) -> tuple[str, ...] | None:
        """Return the files that a row is of; None where there is none of that name."""
        for path in _written(name):
            if step is not None and path in self.choice.groups:
                return self.by_name.get(self.choice.at.get((path, _step_text(step))))
            if path in self.by_name:
                return self.by_name[path]
        return None

    def steps(self, name: str) -> str:
        """Return the steps of a LoRA's folder, in words; nothing where the name is of something else."""
        lora = next((path for path in _written(name) if path in self.choice.groups), None)
        steps = sorted((step for folder, step in self.choice.at if folder == lora), key=lambda s: (not s, len(s), s))
        return checkpoints.listed([step or "the last" for step in steps]) if steps else ""


def _written(name: str) -> list[str]:
    """Return the paths that a row may mean."""
    return [PurePosixPath(written).as_posix() for written in (name, name.replace("\\", "/"))]


def _step_text(step: object) -> str:
    """Return the cell of a step as `Choice.at` has it; also ``checkpoint-100``, and 100.0 as spreadsheets write it."""
    text = (_text(step) or "").strip().lower()
    number = re.fullmatch(r"0*(\d{1,12})(?:\.0*)?", text)
    if number:
        return number[1]
    return checkpoints.step_named(text)


def _above(path: str) -> Iterator[str]:
    """Yield the folders of a collection in which a file lies, the innermost first."""
    while path := os.path.dirname(path):
        yield path


# ----------------------------------------------------------------------------------------------------------------------
# metadata.json beside the weights, and folders
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Beside:
    """The wanted fields of the metadata.json beside each weight file; files beside which it is unreadable are left out.

    ``fields`` maps a path to field to text; ``names`` are the wanted fields that some file has, whatever their value.
    """

    fields: dict[str, dict[str, str]]
    names: set[str]


def _fields_beside(root: Path, paths: Sequence[str], wanted: Iterable[str | None], findings: list[Finding]) -> _Beside:
    """Read all metadata.json files, and add those that cannot be read to the findings."""
    beside = _Beside({}, set())
    for path, files, document in _documents(root, paths):
        if isinstance(document, LoraFileError):
            findings.append(Finding(tuple(files), str(document), place=path))
            continue
        fields: dict[str, str] = {}
        for name in wanted:
            if name in document:
                beside.names.add(name)
                _put(fields, name, document[name])
        beside.fields.update(dict.fromkeys(files, fields))
    return beside


def _documents(root: Path, paths: Sequence[str]) -> Iterator[tuple[str, list[str], dict | LoraFileError]]:
    """Yield each metadata.json, the files that it is of, and its content, or what is wrong with it.

    That of a LoRA's folder is of its checkpoints too, where they have none of their own.
    """
    by_folders = defaultdict(list)
    for path in paths:
        by_folders[os.path.dirname(path), os.path.basename(path) == checkpoints.PEFT_NAME].append(path)
    for files in by_folders.values():
        place, document = "", None
        for folder in checkpoints.folders_of(files[0]):
            place = os.path.join(root, folder, METADATA_NAME)
            try:
                document = read_json(place)
                if fault := next(filter(None, map(names.fault, document or ())), ""):
                    document = LoraFileError(f"{METADATA_NAME} has a field whose name {fault}. Rename it.")
            except LoraFileError as error:
                document = error
            if document is not None:
                break
        yield place, files, {} if document is None else document


def _label_by_metadata_or_folder(result: Labels, root: Path, beside: _Beside, column: str | None) -> None:
    """Fill in labels of metadata.json, if a file has the field or a flag names it, else of folders."""
    name = column or METADATA_FIELD
    if column and column not in beside.names:
        raise LabelError(f"{root}: no label: {_no_field(root, beside, column)}. Choose one with --label-column.")
    if name in beside.names:
        result.column, result.source = name, f"{name} in {METADATA_NAME}"
        for path, fields in beside.fields.items():
            _put(result.label, path, fields.get(name))
        tried = f"no {name} (a text or a number) in {METADATA_NAME} beside it, as other files here have"
    else:
        result.source = "the folder names"
        for path in beside.fields:
            if path in result.choice.lora_of or path.count(os.sep) in (1, 2):
                _put(result.label, path, path.split(os.sep)[0])
        tried = f"no {METADATA_NAME} with {name} beside it, and it does not lie in <class>/ or <class>/<lora>/"
    missing = [path for path in beside.fields if path not in result.label]
    choices = _list_fields(root, list(beside.fields)) if missing else ""
    reason = f"no label: {tried}; {choices}. Label it or leave it out."
    result.findings += [Finding((path,), reason) for path in missing]


def _group_by_metadata(result: Labels, root: Path, beside: _Beside, name: str) -> None:
    """Fill in groups of metadata.json."""
    if name not in beside.names:
        tried = f"no column {name} in {result.table.name}, and " if result.table else ""
        fault = f"no group: {tried}{_no_field(root, beside, name)}"
        raise LabelError(f"{root}: {fault}. Choose one with --group-column.")
    for path, fields in beside.fields.items():
        _put(result.group, path, fields.get(name))
        if path not in result.group:
            result.findings.append(_no_group(path, name, f"{METADATA_NAME} beside it"))


def _no_field(root: Path, beside: _Beside, name: str) -> str:
    return f"no {METADATA_NAME} beside a weight file has {name}; {_list_fields(root, list(beside.fields))}"


def _no_group(path: str, name: str, where: str) -> Finding:
    return Finding((path,), f"no group: {where} has no {name} (a text or a number). Add it or leave the file out.")


def read_json(path: str) -> dict | None:
    """Read a JSON object; None where there is no such file. Equal texts give the same object, not to be changed.

    Raises:
        LoraFileError: It is no JSON object, or larger than any that belongs to a LoRA.
    """
    name = os.path.basename(path)
    try:
        return small_files.read_object(path)
    except FileNotFoundError:
        return None
    except small_files.NoObjectError as error:
        raise LoraFileError(f"{name} holds no JSON object. Mend or remove it.") from error
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise LoraFileError(f"{name} is not readable as JSON ({words}). Mend or remove it.") from error


# ----------------------------------------------------------------------------------------------------------------------
# Columns and their values
# ----------------------------------------------------------------------------------------------------------------------


def column_values(root: Path, paths: Sequence[str], table: Path | None) -> dict[str, Counter]:
    """Count each value of each column of a table, or without a table of each field of the metadata.json files.

    Lists, objects and nothing count as no value. Files that cannot be read are passed over: `read_labels`, which reads
    them too where there is no table, reports them.
    """
    values: dict[str, Counter] = defaultdict(Counter)

    def count(row: dict, times: int) -> None:
        for name, value in row.items():
            text = _text(value)
            if name != FILE_NAME and text is not None:
                values[name][text] += times

    if table:
        for _, row in rows(table):
            count(row, 1)
        return dict(values)
    for _, files, document in _documents(root, paths):
        if not isinstance(document, LoraFileError):
            count(document, len(files))
    return dict(values)


def values_by_file(
    root: Path, paths: Sequence[str], table: Path | None, ignored: Counter, choice: Choice | None = None
) -> dict[str, dict[str, str]]:
    """Return the values of each column of a table and of each field of the metadata.json files, by path.

    Lists, objects, long texts and nothing count as no value; a column of the table goes before a field of its name.
    Files that cannot be read, which only happens beside a table, are passed over, and counted in ``ignored``.

    Args:
        root: The collection.
        paths: Its files, which may be fewer than were chosen.
        table: That of the labels, if it has one.
        ignored: Counts what is left out.
        choice: The files that were chosen; None: these.
    """
    values: dict[str, dict[str, str]] = defaultdict(dict)
    unreadable, wanted = 0, set(paths)

    def put(name: str, path: str, value: object) -> None:
        text = _text(value)
        if text is not None and len(text) <= LONG_TEXT and path in wanted:
            values[name][path] = sys.intern(plain(text))

    named = Labels(choice or Choice(checkpoints.FINAL, tuple(paths)), table=table)
    for path, row in _rows_of_files(named, root, []) if table else ():
        for name in row.keys() - {FILE_NAME}:
            put(name, path, row[name])
    columns = set(values)
    for _, files, document in _documents(root, paths):
        if isinstance(document, LoraFileError):
            unreadable += 1
            continue
        for name in document.keys() - columns:
            for path in files:
                put(name, path, document[name])
    if unreadable:
        ignored[f"{METADATA_NAME} that cannot be read"] = unreadable
    return {name: values[name] for name in sorted(values) if values[name]}


def would_make_classes(values: dict[str, Counter], samples: int) -> dict[str, Counter]:
    """Return the columns that give every LoRA a label, at least two labels, and each to at least three LoRAs."""
    return {
        name: counts
        for name, counts in values.items()
        if len(counts) >= 2 and min(counts.values()) >= 3 and counts.total() >= samples
    }


def _list_fields(root: Path, paths: list[str]) -> str:
    """List the fields of the metadata.json files, in words."""
    values = column_values(root, paths, None)
    return f"the fields there are: {counted(values)}" if values else f"there is no {METADATA_NAME} with fields"


def counted(values: dict[str, Counter]) -> str:
    """List columns with the number of their values, in words."""
    return _listed(
        [f"{name} ({len(counts)} {'value' if len(counts) == 1 else 'values'})" for name, counts in values.items()]
    )


def _listed(columns: list[str]) -> str:
    """List the first names on one line, whatever stands in them."""
    shown = [plain(name[:80]) for name in columns[:MAX_SHOWN]]
    if len(columns) > MAX_SHOWN:
        shown.append("...")
    return ", ".join(shown) or "none"


def _put(texts: dict[str, str], key: str, value: object) -> None:
    """Keep the text of a value, if it has one."""
    text = _text(value)
    if text is not None:
        texts[key] = sys.intern(text)  # of tens of thousands of files each label is held once


def _text(value: object) -> str | None:
    """Return a value as a label: a text as it is, a number as JSON writes it; None for anything else."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return None


def near_duplicates(labels: Iterable[str]) -> list[list[str]]:
    """Return the groups of labels that differ only in case, blanks, or the Unicode form of their letters."""
    groups = defaultdict(list)
    for label in labels:
        groups["".join(unicodedata.normalize("NFKC", label).casefold().split())].append(label)
    return [group for group in groups.values() if len(group) > 1]
