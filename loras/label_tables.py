"""Tables of labels: csv, or jsonl (a JSON object a line), with the weight file of each row in ``file_name``.

They come from spreadsheets and scripts: UTF-8 or UTF-16 with a byte order mark, any line ends, cells separated by
commas, semicolons (a spreadsheet's csv where the comma is the decimal sign) or tabs.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from loras import names, small_files

FILE_NAME, STEP = "file_name", "step"
TABLES = ("metadata.csv", "metadata.jsonl")  # at the root of a collection
SEPARATORS = ",;\t"
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?[,;]*', re.IGNORECASE)
MAX_TABLE_BYTES = 2**27  # two million rows of 64 bytes
MAX_LINE = 2**20  # characters of a line of jsonl


class LabelError(ValueError):
    """Labels that cannot be read; each finding reads ``<path>: what is wrong. What to do.``."""

    def __init__(self, *findings: str):
        super().__init__("\n".join(findings))
        self.findings = [names.one_line(finding) for finding in findings]


def table_fault(table: Path) -> str:
    """Return what is wrong with a --labels file at first sight; empty where nothing is."""
    if os.path.exists(table) and not os.path.isfile(table):
        return "not a plain file. Remove it."
    if not os.path.isfile(table):
        return "no such file. Give a csv or jsonl with the columns file_name and label."
    if table.suffix.lower() not in (".csv", ".jsonl"):
        return "neither .csv nor .jsonl. Give a table with the columns file_name and label."
    return ""


def table_at(root: Path) -> Path | None:
    """Return the table at the root of a collection, if it has one."""
    tables = [root / name for name in TABLES if os.path.lexists(root / name)]
    if len(tables) > 1:
        raise LabelError(f"{root}: holds both {' and '.join(TABLES)}. Keep one, or name one with --labels.")
    return tables[0] if tables else None


def columns_of(table: Path) -> list[str]:
    """Return the columns of a table, without that of the files.

    Raises:
        LabelError: It cannot be read, holds no row, names no files, or a column has a name that is none.
    """
    columns = list(dict.fromkeys(name for _, row in rows(table) for name in row))
    if not columns:
        raise LabelError(f"{table}: no label: holds no row. Name each weight file in file_name, and its label.")
    if faults := [fault for fault in map(names.fault, columns) if fault]:
        raise LabelError(f"{table}: a column's name {faults[0]}. Rename it.")
    if FILE_NAME not in columns:
        listed = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
        raise LabelError(f"{table}: no column {FILE_NAME}, but {listed}. Name each weight file in one.")
    columns.remove(FILE_NAME)
    return columns


def rows(table: Path) -> Iterator[tuple[int, dict]]:
    """Yield line number and cells of each row of a table, by column.

    Raises:
        LabelError: It cannot be read.
    """
    if fault := table_fault(table):
        raise LabelError(f"{table}: {fault}")
    try:
        file = small_files.open_text(small_files.read_bytes(table, MAX_TABLE_BYTES))
    except small_files.EncodingError as error:
        raise LabelError(f"{table}: {error}. Save it as UTF-8 (in a spreadsheet: CSV UTF-8).") from error
    except (OSError, ValueError) as error:
        raise LabelError(f"{table}: not readable ({error}). Mend the table.") from error
    try:
        for line, row in _objects(file) if table.suffix.lower() == ".jsonl" else _cells(file):
            yield line, row if FILE_NAME in row else {_column(name, row): cell for name, cell in row.items()}
    except ValueError as error:
        raise LabelError(f"{table}: {error}. Mend the table.") from error


def _column(name: str, row: dict) -> str:
    """Return the name of a column: ``file_name`` in whatever case the first such column of the row has it."""
    alike = (other for other in row if other.strip().lower() == FILE_NAME)
    return FILE_NAME if name == next(alike, None) else name


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


def _cells(file: TextIO) -> Iterator[tuple[int, dict]]:
    separator, line = _separator(file)
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


def _separator(file: TextIO) -> tuple[str, int]:
    """Return the separator, and the lines before the columns: a spreadsheet may have written ``sep=;`` in one.

    Else it is what makes ``file_name`` a cell of the first line; a comma where none does.
    """
    first = file.readline(MAX_LINE)
    if match := _SEPARATOR_LINE.fullmatch(first.strip("\r\n")):
        return match[1], 1
    file.seek(0)
    for separator in SEPARATORS:
        if FILE_NAME in (cell.strip().strip('"').lower() for cell in first.split(separator)):
            return separator, 0
    return SEPARATORS[0], 0


def _unreadable(line: int, error: Exception) -> ValueError:
    return ValueError(f"line {max(line, 1)}: not readable ({error})")
