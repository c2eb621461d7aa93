"""Tables of labels: csv, or jsonl (a JSON object a line), with the weight file of each row in ``file_name``.

They come from spreadsheets and scripts: UTF-8 or UTF-16 with a byte order mark, any line ends, cells separated by
commas, semicolons (a spreadsheet's csv where the comma is the decimal sign) or tabs. Where no column is called
``file_name``, another common name is taken for it.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TextIO

from loras import names, small_files

FILE_NAME, STEP = "file_name", "step"
# What else a column of the files may be called, in any case, with blanks, hyphens or underscores or without.
FILE_COLUMNS = ("filename", "file", "filepath", "path", "name", "lora", "lora_name", "model", "model_name")
TABLES = ("metadata.csv", "metadata.jsonl")  # at the root of a collection
SEPARATORS = {".csv": ",;\t", ".tsv": "\t,;"}  # by suffix, the first where the header shows none
SUFFIXES = (*SEPARATORS, ".jsonl")
SAVE_AS_CSV = "Save it as CSV UTF-8, and give that."
OTHER_KINDS = {  # by the first bytes, whatever the suffix
    b"PK\x03\x04": "a workbook (xlsx, ods) or another archive",
    b"\xd0\xcf\x11\xe0": "a workbook (xls)",
    b"PAR1": "parquet",
}
WORKBOOKS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?[,;]*', re.IGNORECASE)
MAX_TABLE_BYTES = 2**27  # two million rows of 64 bytes
MAX_LINE = 2**20  # characters of a line of jsonl


class LabelError(ValueError):
    """Labels that cannot be read; each finding reads ``<path>: what is wrong. What to do.``."""

    def __init__(self, *findings: str):
        super().__init__("\n".join(findings))
        self.findings = [names.one_line(finding) for finding in findings]


@dataclass(frozen=True)
class Table:
    """A table: its path, the column that names the files, and the others."""

    path: Path
    file_column: str = FILE_NAME
    columns: tuple[str, ...] = ()


def table_fault(table: Path) -> str:
    """Return what is wrong with a --labels file at first sight; empty where nothing is."""
    suffix = table.suffix.lower()
    if os.path.exists(table) and not os.path.isfile(table):
        return "not a plain file. Remove it."
    if not os.path.isfile(table):
        return "no such file. Give a csv, tsv or jsonl with the columns file_name and label."
    if suffix in WORKBOOKS:
        return f"a workbook, which is not read. {SAVE_AS_CSV}"
    if suffix not in SUFFIXES:
        return "neither .csv, .tsv nor .jsonl. Give a table with the columns file_name and label."
    return ""


def table_at(root: Path) -> Path | None:
    """Return the table at the root of a collection, if it has one."""
    tables = [root / name for name in TABLES if os.path.lexists(root / name)]
    if len(tables) > 1:
        raise LabelError(f"{root}: holds both {' and '.join(TABLES)}. Keep one, or name one with --labels.")
    return tables[0] if tables else None


def open_table(path: Path, names_of_files: Container[str], asked: Sequence[str | None] = ()) -> Table:
    """Read the columns of a table, and find that which names the files.

    It is ``file_name``, in any case; else the one of the `FILE_COLUMNS` in which the most cells are names of files, the
    first of these where several are that.

    Args:
        path: The table.
        names_of_files: Names that a weight file of the collection may have in a table.
        asked: Columns of the label and the group, which name the files only where no other does.

    Raises:
        LabelError: It cannot be read, holds no row, names no files, or a column has a name that is none.
    """
    table = Table(path)
    columns = _columns(table)
    if not columns:
        raise LabelError(f"{path}: no label: holds no row. Name each weight file in {FILE_NAME}, and its label.")
    if faults := [fault for fault in map(names.fault, columns) if fault]:
        raise LabelError(f"{path}: a column's name {faults[0]}. Rename it.")
    if FILE_NAME not in columns:
        table = Table(path, _file_column(path, columns, names_of_files, asked))
        columns = _columns(table)
    return replace(table, columns=tuple(name for name in columns if name != FILE_NAME))


def _columns(table: Table) -> list[str]:
    return list(dict.fromkeys(name for _, row in rows(table) for name in row))


def _file_column(path: Path, columns: list[str], names_of_files: Container[str], asked: Sequence[str | None]) -> str:
    """Return the column that names the files, of a table without ``file_name``."""
    candidates = [name for key in FILE_COLUMNS for name in columns if column_key(name) == column_key(key)]
    candidates = [name for name in candidates if name not in asked] or candidates
    if not candidates:
        listed = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
        fault = f"no column {FILE_NAME} (nor {', '.join(FILE_COLUMNS)}), but {listed}"
        raise LabelError(f"{path}: {fault}. Call the column that names the weight files {FILE_NAME}.")
    if len(candidates) == 1:
        return candidates[0]
    matches = Counter(
        name for _, row in _read(path) for name in candidates if _names_a_file(row.get(name), names_of_files)
    )
    return max(candidates, key=lambda name: matches[name])  # the first of those that are that


def _names_a_file(cell: object, names_of_files: Container[str]) -> bool:
    return isinstance(cell, str) and any(path in names_of_files for path in written_paths(cell))


def written_paths(name: str) -> list[str]:
    """Return the paths that a cell may mean: as it is written, and with slashes for backslashes."""
    return [PurePosixPath(written).as_posix() for written in (name, name.replace("\\", "/"))]


def column_key(name: str) -> str:
    """Return a column's name without case, blanks, hyphens and underscores, by which spellings of it are one."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def text_of(cell: object) -> str | None:
    """Return a cell as a label: a text as it is, a number as JSON writes it; None for anything else."""
    if isinstance(cell, str):
        return cell if cell.strip() else None
    if isinstance(cell, int) or (isinstance(cell, float) and math.isfinite(cell)):
        return json.dumps(cell)
    return None


def rows(table: Table) -> Iterator[tuple[int, dict]]:
    """Yield line number and cells of each row of a table, by column; the file's name stands in ``file_name``.

    Raises:
        LabelError: It cannot be read.
    """
    for line, row in _read(table.path):
        yield line, _with_file_name(row, table.file_column)


def _with_file_name(row: dict, column: str) -> dict:
    """Return a row in which the file's name stands in ``file_name``.

    That is the cell of ``column``; of objects that spell it otherwise, the first that is the same in any case.
    """
    if FILE_NAME in row:
        return row
    alike = (name for name in row if name.strip().lower() == column.strip().lower())
    column = column if column in row else next(alike, None)
    return {FILE_NAME if name == column else name: cell for name, cell in row.items()}


def _read(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield line number and cells of each row of a file, by column.

    Raises:
        LabelError: It cannot be read.
    """
    if fault := table_fault(path):
        raise LabelError(f"{path}: {fault}")
    try:
        data = small_files.read_bytes(path, MAX_TABLE_BYTES)
        file = small_files.open_text(b"" if data.startswith(tuple(OTHER_KINDS)) else data)
    except small_files.EncodingError as error:
        raise LabelError(f"{path}: {error}. {_saved_as_utf8(path, error.encodings)}") from error
    except (OSError, ValueError) as error:
        raise LabelError(f"{path}: not readable ({error}). Mend the table.") from error
    if kind := next((kind for start, kind in OTHER_KINDS.items() if data.startswith(start)), ""):
        raise LabelError(f"{path}: {kind}, and no text. {SAVE_AS_CSV}")
    try:
        suffix = path.suffix.lower()
        yield from _objects(file) if suffix == ".jsonl" else _cells(file, SEPARATORS[suffix])
    except ValueError as error:
        raise LabelError(f"{path}: {error}. Mend the table.") from error


def _saved_as_utf8(path: Path, encodings: Sequence[str]) -> str:
    """Return how a table of another encoding becomes UTF-8; ``encodings`` are those that it may have."""
    mend = "Save it as UTF-8 (in a spreadsheet: CSV UTF-8"
    if encodings:
        mend += f"; elsewhere: `iconv -f {encodings[0]} -t UTF-8 {shlex.quote(os.fspath(path))} > FILE`"
    if len(encodings) > 1:
        mend += ", with the encoding that reads right"
    return f"{mend})."


def _objects(file: TextIO) -> Iterator[tuple[int, dict]]:
    line = 0
    while text := file.readline(MAX_LINE):
        line += 1
        try:
            if len(text) == MAX_LINE:
                raise ValueError(f"more than {MAX_LINE} characters")
            if text.strip():
                yield line, small_files.parse_object(text)
        except ValueError as error:
            raise _unreadable(line, error) from error


def _cells(file: TextIO, separators: str) -> Iterator[tuple[int, dict]]:
    separator, line = _separator(file, separators)
    above = line
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if repeated := [name for name, count in Counter(filter(None, header)).items() if count > 1]:
            raise ValueError(f"two columns are called {repeated[0]}")
        for cells in reader:
            line = above + reader.line_num
            if not any(cells):  # a blank line, also as a spreadsheet writes it
                continue
            if len(cells) < len(header) or any(cells[len(header) :]):
                raise ValueError(f"{len(cells)} cells under {len(header)} columns")
            # A column without a name is the row number of a data frame.
            yield line, {name: cell for name, cell in zip(header, cells, strict=False) if name}
    except (ValueError, csv.Error) as error:
        raise _unreadable(line, error) from error


def _separator(file: TextIO, separators: str) -> tuple[str, int]:
    """Return the separator, and the lines before the columns: a spreadsheet may have written ``sep=;`` in one.

    Else it is what makes ``file_name`` a cell of the first line, or another name of that column; where none does, that
    which makes the most cells.
    """
    first = file.readline(MAX_LINE)
    if match := _SEPARATOR_LINE.fullmatch(first.strip("\r\n")):
        return match[1], 1
    file.seek(0)
    headers = {cut: [cell.strip().strip('"').lower() for cell in first.split(cut)] for cut in separators}
    other_names = set(map(column_key, FILE_COLUMNS))
    with_name = [cut for cut, cells in headers.items() if FILE_NAME in cells]
    with_name += [cut for cut, cells in headers.items() if not other_names.isdisjoint(map(column_key, cells))]
    return next(iter(with_name), max(headers, key=lambda cut: len(headers[cut]))), 0


def _unreadable(line: int, error: Exception) -> ValueError:
    return ValueError(f"line {max(line, 1)}: not readable ({error})")
