"""Labels and groups of LoRAs: from a table, a metadata.json beside the weights, or the folder; the first that exists.

A table is csv, or jsonl (a JSON object a line), and names each weight file in ``file_name``. These names are only ever
compared with the files of the collection: no path is made of them, so they lead nowhere else.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import stat
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TextIO

from loras.building import METADATA_NAME
from loras.lora_files import LoraFileError

FILE_NAME = "file_name"
TABLES = ("metadata.csv", "metadata.jsonl")  # at the root of a collection
LABEL_COLUMNS = ("category_label", "label")  # of a table; the first that it has, where --label-column names none
LONG_TEXT = 200  # characters; a caption is no group and no number
METADATA_FIELD = "category_label"
MAX_TABLE_BYTES = 2**27  # two million rows of 64 bytes
MAX_JSON_BYTES = 2**20
MAX_SHOWN = 12  # columns in a message
NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and surrogates


class LabelError(ValueError):
    """Labels that cannot be read; each finding reads ``<path>: what is wrong. What to do.``."""

    def __init__(self, *findings: str):
        super().__init__("\n".join(findings))
        self.findings = [plain(finding) for finding in findings]


@dataclass(frozen=True)
class Finding:
    """A fault of some files, which can be left out; their paths are relative to the collection.

    ``reason`` reads ``what is wrong. What to do.``; ``place`` stands in the message instead of the first file's path.
    """

    files: tuple[str, ...]
    reason: str
    place: str = ""

    def line(self, root: Path) -> str:
        """Return the finding as a line ``<path>: what is wrong. What to do.``."""
        return plain(f"{self.place or root / self.files[0]}: {self.reason}")


def plain(text: str) -> str:
    """Return a text as one line that every file can hold: control characters and surrogates are escaped."""
    return NOT_TEXT.sub(lambda match: ascii(match[0])[1:-1], text)


@dataclass
class Labels:
    """Label and group of each weight file that has one, by path, and the reasons why others have none.

    ``column`` is that of the table or the field of the metadata.json files; None where folders are the labels.
    ``faults`` concern all labels at once, in the form of a `LabelError`'s findings.
    """

    source: str = ""
    column: str | None = None
    table: Path | None = None
    label: dict[str, str] = field(default_factory=dict)
    group: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def read_labels(
    root: Path, paths: list[str], table: Path | None = None, column: str | None = None, group_column: str | None = None
) -> Labels:
    """Read label and group of each weight file of a collection.

    Labels come from the first that exists: ``table``; metadata.csv or metadata.jsonl at the root; metadata.json
    beside the weight files; where no column is named, their class folders. Groups stand in the table if it has such a
    column, else in the metadata.json files.

    Args:
        root: The collection.
        paths: Its weight files, relative to it.
        table: A csv or jsonl of labels, wherever it lies.
        column: Column or field of the label. None: ``category_label``; in a table else ``label``, else the only column.
        group_column: Column or field of the group. None: no groups.
    """
    result = Labels(table=table)
    try:
        result.table = table or _table_at(root)
        columns = _label_by_table(result, root, paths, column, group_column) if result.table else []
        if not result.table or (group_column and group_column not in columns):
            beside = _fields_beside(root, paths, (column or METADATA_FIELD, group_column), result.findings)
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


def table_fault(table: Path) -> str:
    """Return what is wrong with a --labels file at first sight; empty where nothing is."""
    if not table.is_file():
        return "no such file. Give a csv or jsonl with the columns file_name and label."
    if table.suffix.lower() not in (".csv", ".jsonl"):
        return "neither .csv nor .jsonl. Give a table with the columns file_name and label."
    return ""


def _table_at(root: Path) -> Path | None:
    """Return the table at the root of a collection, if it has one."""
    tables = [root / name for name in TABLES if os.path.lexists(root / name)]
    if len(tables) > 1:
        raise LabelError(f"{root}: holds both {' and '.join(TABLES)}. Keep one, or name one with --labels.")
    return tables[0] if tables else None


def _label_by_table(
    result: Labels, root: Path, paths: list[str], column: str | None, group_column: str | None
) -> list[str]:
    """Fill in labels and groups of a table; return its columns but for ``file_name``."""
    table = result.table
    columns = list(dict.fromkeys(name for _, row in _rows(table) for name in row))
    if not columns:
        raise LabelError(f"{table}: no label: holds no row. Name each weight file in file_name, and its label.")
    if FILE_NAME not in columns:
        raise LabelError(f"{table}: no column {FILE_NAME}, but {_listed(columns)}. Name each weight file in one.")
    columns.remove(FILE_NAME)
    result.column = column or _default_column(table, columns, group_column)
    if result.column not in columns:
        choices = f"the columns there are: {counted(column_values(root, paths, table))}"
        fault = f"no label: no column {result.column}; {choices}"
        raise LabelError(f"{table}: {fault}. Choose one with --label-column.")
    result.source = f"{result.column} in {table.name}"
    for path, row in _rows_of_files(result, root, paths, columns):
        _put(result.label, path, row.get(result.column))
        _put(result.group, path, row.get(group_column))
    tried = f"no row with {result.column} for it in {table.name}; the columns there are: {_listed(columns)}"
    for path in paths:
        if path not in result.label:
            result.findings.append(Finding((path,), f"no label: {tried}. Label it or leave it out."))
        elif group_column in columns and path not in result.group:
            result.findings.append(_no_group(path, group_column, f"its row in {table.name}"))
    return columns


def _default_column(table: Path, columns: list[str], group_column: str | None) -> str:
    """Return the column of the label where none is named."""
    for name in LABEL_COLUMNS:
        if name in columns:
            return name
    others = [name for name in columns if name != group_column]
    if len(others) == 1:
        return others[0]
    choices = f"the columns there are: {counted(column_values(table.parent, [], table))}"
    fault = f"no label: no column {' or '.join(LABEL_COLUMNS)}; {choices}"
    raise LabelError(f"{table}: {fault}. Choose one with --label-column.")


def _rows_of_files(result: Labels, root: Path, paths: list[str], columns: list[str]) -> Iterator[tuple[str, dict]]:
    """Yield path and row of each weight file that a table names; rows for missing files become findings.

    A row may also name the folder of one LoRA.

    Raises:
        LabelError: Rows name no file, one outside the collection, or one that another row has named.
    """
    folders = Counter(os.path.dirname(path) for path in paths)
    known = {os.path.dirname(path): path for path in paths if folders[os.path.dirname(path)] == 1}
    known |= {path: path for path in paths}
    lines: dict[str, int] = {}
    faults = []
    for line, row in _rows(result.table):
        name, place = row.get(FILE_NAME), f"{result.table}: line {line}"
        if not isinstance(name, str) or not name.strip():
            faults.append(f"{place}: names no file in {FILE_NAME}. Name one, or remove the row.")
        elif "://" in name or name[0] in "/\\" or ".." in re.split(r"[/\\]", name):
            faults.append(f"{place}: {name!r} is not a path below the collection. Name it relative to {root}.")
        elif (path := known.get(PurePosixPath(name).as_posix())) is None:
            fault = f"a label for a missing file: no weight file {name!r} in {root}, of whose folders hidden and linked"
            fault += f" ones are not read; the columns there are: {_listed(columns)}"
            result.findings.append(Finding((name,), f"{fault}. Fetch the file or remove the row.", place))
        elif path in lines:
            faults.append(f"{place}: {name!r} again, after line {lines[path]}. Keep one row for each LoRA.")
        else:
            lines[path] = line
            yield path, row
    if faults:
        raise LabelError(*faults)


def _rows(table: Path) -> Iterator[tuple[int, dict]]:
    """Yield line number and cells of each row of a table, by column.

    Raises:
        LabelError: It cannot be read.
    """
    line = 0
    try:
        if fault := table_fault(table):
            raise LabelError(f"{table}: {fault}")
        with _open_text(table, MAX_TABLE_BYTES) as file:
            if table.suffix.lower() == ".jsonl":
                for text in file:
                    line += 1
                    if text.strip():
                        yield line, _json_object(text)
                return
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if repeated := [name for name, count in Counter(filter(None, header)).items() if count > 1]:
                raise ValueError(f"two columns are called {repeated[0]}")
            for cells in reader:
                line = reader.line_num
                if cells and len(cells) != len(header):
                    raise ValueError(f"{len(cells)} cells under {len(header)} columns")
                if cells:  # a column without a name is the row number of a data frame
                    yield line, {name: cell for name, cell in zip(header, cells, strict=True) if name}
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, LabelError):
            raise
        raise LabelError(f"{table}: line {max(line, 1)}: not readable ({error}). Mend the table.") from error


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


def _fields_beside(root: Path, paths: list[str], wanted: Iterable[str | None], findings: list[Finding]) -> _Beside:
    """Read all metadata.json files, and add those that cannot be read to the findings."""
    beside = _Beside({}, set())
    for folder, files in _by_folder(paths).items():
        path = os.path.join(root, folder, METADATA_NAME)
        try:
            document = read_json(path) or {}
        except LoraFileError as error:
            findings.append(Finding(tuple(files), str(error), place=path))
            continue
        fields: dict[str, str] = {}
        for name in wanted:
            if name in document:
                beside.names.add(name)
                _put(fields, name, document[name])
        beside.fields.update(dict.fromkeys(files, fields))
    return beside


def _by_folder(paths: list[str]) -> dict[str, list[str]]:
    folders = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    return folders


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
            if path.count(os.sep) in (1, 2):
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
        with _open_text(path, MAX_JSON_BYTES) as file:
            return _json_object(file.read())
    except FileNotFoundError:
        return None
    except _NoObjectError as error:
        raise LoraFileError(f"{name} holds no JSON object. Mend or remove it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LoraFileError(f"{name} is not readable as JSON ({error}). Mend or remove it.") from error


# ----------------------------------------------------------------------------------------------------------------------
# Columns and their values
# ----------------------------------------------------------------------------------------------------------------------


def column_values(root: Path, paths: list[str], table: Path | None) -> dict[str, Counter]:
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
        for _, row in _rows(table):
            count(row, 1)
        return dict(values)
    for folder, files in _by_folder(paths).items():
        try:
            count(read_json(os.path.join(root, folder, METADATA_NAME)) or {}, len(files))
        except LoraFileError:
            continue
    return dict(values)


def values_by_file(root: Path, paths: list[str], table: Path | None, ignored: Counter) -> dict[str, dict[str, str]]:
    """Return the values of each column of a table and of each field of the metadata.json files, by path.

    Lists, objects, long texts and nothing count as no value; a column of the table goes before a field of its name.
    Files that cannot be read, which only happens beside a table, are passed over, and counted in ``ignored``.
    """
    values: dict[str, dict[str, str]] = defaultdict(dict)
    unreadable = 0

    def put(name: str, path: str, value: object) -> None:
        if not (isinstance(value, str) and len(value) > LONG_TEXT):
            _put(values[name], path, value)

    for path, row in _rows_of_files(Labels(table=table), root, paths, []) if table else ():
        for name in row.keys() - {FILE_NAME}:
            put(name, path, row[name])
    columns = set(values)
    for folder, files in _by_folder(paths).items():
        try:
            document = read_json(os.path.join(root, folder, METADATA_NAME)) or {}
        except LoraFileError:
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


def _listed(names: list[str]) -> str:
    """List the first names on one line, whatever stands in them."""
    shown = [plain(name[:80]) for name in names[:MAX_SHOWN]]
    if len(names) > MAX_SHOWN:
        shown.append("...")
    return ", ".join(shown) or "none"


class _NoObjectError(ValueError):
    """A JSON text that is something else than an object."""


def _json_object(text: str) -> dict:
    value = _parsed_json(text)
    if not isinstance(value, dict):
        raise _NoObjectError("not a JSON object")
    return value


def _parsed_json(text: str) -> object:
    return _parsed_short(text) if len(text) < 2**14 else json.loads(text)


_parsed_short = lru_cache(maxsize=64)(json.loads)  # files of a folder mostly have few texts between them


def _open_text(path: Path | str, most: int) -> TextIO:
    """Open a file that holds plain text of at most ``most`` bytes; a pipe would never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a plain file")
    if status.st_size > most:
        raise ValueError(f"{status.st_size} bytes, more than {most}")
    return open(path, encoding="utf-8-sig", newline="")


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
