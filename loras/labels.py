"""Labels and groups of LoRAs: from a table, a metadata.json beside the weights, or the folder; the first that exists.

A table names each weight file, or the folder of a LoRA (loras/label_names.py). Where the labels come from decides
which folders are LoRAs, and so which checkpoints are read (loras/checkpoints.py).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from loras import checkpoints, names, small_files
from loras.building import METADATA_NAME
from loras.checkpoints import Choice
from loras.command_line import program_path
from loras.label_names import KnownNames, leads_elsewhere, names_of_files
from loras.label_tables import (
    FILE_NAME,
    STEP,
    SUFFIXES,
    LabelError,
    Table,
    column_key,
    open_table,
    rows,
    table_at,
    text_of,
)
from loras.lora_files import LoraFileError
from loras.names import plain
from loras.notices import Finding, Notice

LABEL_COLUMNS = ("category_label", "label")  # of a table; the first that it has, where --label-column names none
LONG_TEXT = 200  # characters; a caption is no group and no number
METADATA_FIELD = "category_label"
FOLDERS = "the folder names"  # the source of labels without a column
NO_FIELDS = f"there is no {METADATA_NAME} with fields"
LIKELY_COLUMNS = ("class", "concept", "category", "target")  # of a label, but only its owner knows
NO_LABEL, NO_SOURCE = "(no label)", "nothing yet"  # of files that are only looked at
HINT = "label_hint"  # the column that `python data.py label` writes beside the labels: a help to its reader alone
EMPTY, NO_TEXT = "is empty. Fill it in", "is neither a text nor a number. Write one"  # of cells
MAX_GROUPS = 6  # of labels that may be one, in a message
# Between letters or digits; a hyphen before a number is its sign.
_BETWEEN = re.compile(r"(?<=[^\W_])[\s_\-\u2010-\u2015]+(?=[^\W_])")
MAX_SHOWN = 12  # columns, or runs of lines, in a message


class LabelledFile(Protocol):
    """A file of a collection, with its label."""

    path: str
    label: str


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
    table: Table | None = None
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
        table: A csv, tsv or jsonl of labels, wherever it lies.
        column: Column or field of the label. None: ``category_label``; in a table else ``label``, else the only column.
        group_column: Column or field of the group. None: no groups.
        step: What is read of a training, see `checkpoints.choose`. None: the last, or where the table has a column
            ``step`` all that it names.
    """
    result = Labels(Choice(checkpoints.FINAL, tuple(paths)))
    try:
        if path := table or table_at(root):
            result.table = open_table(path, names_of_files(paths), (column, group_column))
        columns = result.table.columns if result.table else ()
        beside, unreadable = None, []
        if not result.table or (group_column and group_column not in columns):
            beside = _fields_beside(root, paths, (column or METADATA_FIELD, group_column), unreadable)
        by_folder = not result.table and not column and METADATA_FIELD not in beside.names
        implied = step is None and STEP in columns
        step = step or (checkpoints.ALL if implied else checkpoints.FINAL)
        result.choice = checkpoints.choose(root, paths, by_folder, step)
        result.findings += result.choice.findings
        if result.table:
            _label_by_table(result, root, (column, group_column), only_named=implied)
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


def without_labels(labels: Labels) -> Labels:
    """Return the same files, all of one class, ``NO_LABEL``, without the reasons why they have none."""
    label, findings = dict.fromkeys(labels.choice.paths, NO_LABEL), list(labels.choice.findings)
    return replace(labels, source=NO_SOURCE, column=None, label=label, faults=[], findings=findings)


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def _label_by_table(result: Labels, root: Path, asked: tuple[str | None, str | None], only_named: bool) -> None:
    """Fill in labels and groups of a table; with ``only_named`` checkpoints that it does not name are left out."""
    table, (column, group_column) = result.table, asked
    result.column = column or _default_column(table, group_column)
    if result.column not in table.columns:
        raise _no_column(table, result.column)
    result.source = f"{result.column} in {plain(table.path.name)}"
    unlabelled: dict[str, tuple[int, object]] = {}  # line and cell of files whose rows have no label
    for line, path, row in _rows_of_files(result, root):
        _put(result.label, path, row.get(result.column))
        _put(result.group, path, row.get(group_column))
        if path not in result.label:
            unlabelled[path] = line, row.get(result.column)
    if only_named:
        groups = (group for group in result.choice.groups.values() if result.label.keys() & set(group))
        result.choice = result.choice.without([path for group in groups for path in group if path not in result.label])
    chosen = set(result.choice.paths)
    result.findings += _empty_cells(table, result.column, {p: at for p, at in unlabelled.items() if p in chosen})
    tried = f"no row for it in {table.path.name}; the columns there are: {_listed(table.columns)}"
    for path in result.choice.paths:
        if path not in result.label and path not in unlabelled:
            mend = "Label it or leave it out."
            if lora := result.choice.lora_of.get(path):
                mend = f"Label it, or its folder {lora}, or choose another --step."
            result.findings.append(Finding((path,), f"no label: {tried}. {mend}"))
        elif path in result.label and group_column in table.columns and path not in result.group:
            result.findings.append(_no_group(path, group_column, f"its row in {table.path.name}"))


def _empty_cells(table: Table, column: str, unlabelled: dict[str, tuple[int, object]]) -> Iterator[Finding]:
    """Yield a finding of the files whose cells are empty, and one of those whose cells are neither text nor number."""
    kinds: dict[str, dict[str, int]] = {EMPTY: {}, NO_TEXT: {}}
    for path, (line, cell) in unlabelled.items():
        is_empty = cell is None or isinstance(cell, str) or cell != cell  # NaN: a data frame's empty cell
        kinds[EMPTY if is_empty else NO_TEXT][path] = line
    for words, lines in kinds.items():
        if lines:
            reason = f"{column} {words}, or --skip-bad leaves these LoRAs out."
            yield Finding(tuple(lines), reason, f"{table.path}: {_line_words(lines.values())}")


def _line_words(lines: Iterable[int]) -> str:
    """Return the lines of a table in words, those that follow each other by the first and the last.

    Example:
        >>> _line_words([2, 3, 4, 7])
        'lines 2 to 4, 7'
    """
    runs: list[list[int]] = []
    for line in sorted(set(lines)):
        if runs and runs[-1][-1] == line - 1:
            runs[-1][1:] = [line]
        else:
            runs.append([line])
    shown = [" to ".join(map(str, run)) for run in runs[:MAX_SHOWN]]
    word = "line" if len(runs) == len(runs[0]) == 1 else "lines"
    return f"{word} {', '.join(shown)}" + ", ..." * (len(runs) > MAX_SHOWN)


def _default_column(table: Table, group_column: str | None) -> str:
    """Return the column of the label where none is named."""
    for name in LABEL_COLUMNS:
        if name in table.columns:
            return name
    for name in LABEL_COLUMNS:
        if alike := [column for column in table.columns if column_key(column) == column_key(name)]:
            return alike[0]
    others = [name for name in table.columns if name not in (group_column, STEP, HINT)]
    if len(others) == 1:
        return others[0]
    raise _no_column(table, " or ".join(LABEL_COLUMNS))


def _no_column(table: Table, name: str) -> LabelError:
    """Return the error of a table without a column for the label, with those that there are to choose from."""
    if not table.columns:
        mend = "there is none but that of the files. Add a column label."
        return LabelError(f"{table.path}: no label: no column {name}; {mend}")
    values = column_values(table.path.parent, [], table)
    listed = {column: values.get(column, Counter()) for column in table.columns if column != HINT}
    choices = f"the columns there are: {counted(listed)}"
    meant = [column for column in table.columns if column_key(column) in (column_key(name), *LIKELY_COLUMNS)]
    if table.file_column != FILE_NAME:
        choices += f", and {plain(table.file_column)}, which names the files"
    mend = f"--label-column={shlex.quote(meant[0])} takes that one." if meant else "Choose one with --label-column."
    return LabelError(f"{table.path}: no label: no column {name}; {choices}. {mend}")


def _rows_of_files(result: Labels, root: Path) -> Iterator[tuple[int, str, dict]]:
    """Yield line, path and row of each weight file that a table names; rows for missing files become findings.

    A row may also name the folder of one LoRA, with all its checkpoints that are read, or in a column ``step`` one of
    them. Rows of files that --step leaves out are passed over.

    Raises:
        LabelError: Rows name no file, one outside the collection, or one that another row has named.
    """
    known, table = KnownNames(result.choice), result.table
    lines: dict[str, int] = {}
    faults = []
    for line, row in rows(table):
        name, place = row.get(FILE_NAME), f"{table.path}: line {line}"
        if not isinstance(name, str) or not name.strip():
            faults.append(f"{place}: names no file in {table.file_column}. Name one, or remove the row.")
        elif leads_elsewhere(name):
            faults.append(f"{place}: {name!r} is not a path below the collection. Name it relative to {root}.")
        elif several := known.several(name, row.get(STEP)):
            listed = " and ".join(map(plain, several))
            faults.append(f"{place}: {name!r} may be {listed}. Write which.")
        elif (paths := known.files(name, row.get(STEP))) is None and (steps := known.steps(name)):
            step = plain(str(row.get(STEP)))
            fault = f"{plain(name)} has no checkpoint {step}: there {steps}. Mend the step, or remove the row."
            result.findings.append(Finding((name,), fault, place))
        elif paths is None:
            result.findings.append(Finding((name,), _missing_file(name, root, known, table.columns), place))
        elif again := [path for path in paths if path in lines]:
            faults.append(f"{place}: {name!r} again, after line {lines[again[0]]}. Keep one row for each LoRA.")
        else:
            for path in paths:
                lines[path] = line
                yield line, path, row
    if faults:
        raise LabelError(*faults)


def _missing_file(name: str, root: Path, known: KnownNames, columns: Sequence[str]) -> str:
    """Return the reason of a row whose file is not there."""
    fault = f"a label for a missing file: no weight file {name!r} in {root}, of whose folders hidden and linked"
    fault += f" ones are not read; the columns there are: {_listed(columns)}"
    if elsewhere := known.elsewhere(name):
        return f"{fault}. Write its path, if it is {elsewhere}; else remove the row."
    return f"{fault}. Fetch the file or remove the row."


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
    """Fill in labels of metadata.json, if a file has the field or a flag names it, else of folders.

    Raises:
        LabelError: No file has the field that a flag names, or no file lies in a class folder.
    """
    name = column or METADATA_FIELD
    if column and column not in beside.names:
        fault, has_fields = _no_field(root, beside, column)
        mend = "Choose one with --label-column." if has_fields else by_table(root, list(beside.fields))
        raise LabelError(f"{root}: no label: {fault}. {mend}")
    if name in beside.names:
        result.column, result.source = name, f"{name} in {METADATA_NAME}"
        for path, fields in beside.fields.items():
            _put(result.label, path, fields.get(name))
        tried = f"no {name} (a text or a number) in {METADATA_NAME} beside it, as other files here have"
    else:
        result.source = FOLDERS
        for path in beside.fields:
            if path in result.choice.lora_of or path.count(os.sep) in (1, 2):
                _put(result.label, path, path.split(os.sep)[0])
        tried = f"no {METADATA_NAME} with {name} beside it, and it does not lie in <class>/ or <class>/<lora>/"
    missing = [path for path in beside.fields if path not in result.label]
    if not missing:
        return
    choices = _list_fields(root, list(beside.fields))
    if result.source == FOLDERS and not result.label:
        fault = f"of {len(missing)} LoRAs in it none lies in <class>/ or <class>/<lora>/"
        fault += f"; {choices}: --label-column=NAME takes one" if choices else f", and {NO_FIELDS}"
        raise LabelError(f"{root}: no label: {fault}. {by_table(root, missing)}")
    reason = f"no label: {tried}; {choices or NO_FIELDS}. Label it or leave it out."
    result.findings += [Finding((path,), reason) for path in missing]


def by_table(root: Path, paths: Sequence[str]) -> str:
    """Return how LoRAs are labelled by a table, in sentences; a table that already lies in their folder is named."""
    files = os.listdir(root) if paths else []
    there = sorted(name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
    if there:
        flag = f"--labels={shlex.quote(os.path.join(root, there[0]))}"
        return f"`{flag}` takes labels from that table; `{label_command(root)} --out FILE` writes another, to fill in."
    example = next((path for path in paths if re.fullmatch(r"[\w./-]{1,60}", path)), "lora_01.safetensors")
    words = f"Label them in a table (--labels FILE): the line file_name,label and one such as {example},anime for each"
    return f"{words} LoRA. `{label_command(root)}` writes it, to fill in."


def instead_of(source: str, root: Path) -> str:
    """Return how other labels are given than those of a source that make no classes: a sentence, for folder names."""
    if source != FOLDERS:
        return ""
    return f" Where folders are no concepts, `{label_command(root)}` writes a table for --labels, to fill in."


def label_command(root: Path) -> str:
    """Return the command that writes a table of labels to fill in."""
    return f"python {program_path('data.py')} label {shlex.quote(os.fspath(root))}"


def _group_by_metadata(result: Labels, root: Path, beside: _Beside, name: str) -> None:
    """Fill in groups of metadata.json."""
    if name not in beside.names:
        tried = f"no column {name} in {result.table.path.name}, and " if result.table else ""
        fault, has_choice = _no_field(root, beside, name)
        if result.table and {*result.table.columns} - {result.column, HINT}:
            has_choice = True
        mend = "Choose one with --group-column." if has_choice else "Add it, or leave out --group-column."
        raise LabelError(f"{root}: no group: {tried}{fault}. {mend}")
    for path, fields in beside.fields.items():
        _put(result.group, path, fields.get(name))
        if path not in result.group:
            result.findings.append(_no_group(path, name, f"{METADATA_NAME} beside it"))


def _no_field(root: Path, beside: _Beside, name: str) -> tuple[str, bool]:
    """Return that no metadata.json has a field, with the fields there are, and whether there is any."""
    choices = _list_fields(root, list(beside.fields))
    return f"no {METADATA_NAME} beside a weight file has {name}; {choices or NO_FIELDS}", bool(choices)


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


def column_values(root: Path, paths: Sequence[str], table: Table | None) -> dict[str, Counter]:
    """Count each value of each column of a table, or without a table of each field of the metadata.json files.

    Lists, objects and nothing count as no value. Files that cannot be read are passed over: `read_labels`, which reads
    them too where there is no table, reports them.
    """
    values: dict[str, Counter] = defaultdict(Counter)

    def count(row: dict, times: int) -> None:
        for name, value in row.items():
            text = text_of(value)
            if name not in (FILE_NAME, HINT) and text is not None:
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
    root: Path, paths: Sequence[str], table: Table | None, ignored: Counter, choice: Choice | None = None
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
        text = text_of(value)
        if text is not None and len(text) <= LONG_TEXT and path in wanted:
            values[name][path] = sys.intern(plain(text))

    named = Labels(choice or Choice(checkpoints.FINAL, tuple(paths)), table=table)
    for _, path, row in _rows_of_files(named, root) if table else ():
        for name in row.keys() - {FILE_NAME, HINT}:
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
    """List the fields of the metadata.json files, in words; empty where there is none."""
    values = column_values(root, paths, None)
    return f"the fields there are: {counted(values)}" if values else ""


def counted(values: dict[str, Counter]) -> str:
    """List columns with the number of their values, in words."""
    return _listed(
        [f"{name} ({len(counts)} {'value' if len(counts) == 1 else 'values'})" for name, counts in values.items()]
    )


def _listed(columns: Sequence[str]) -> str:
    """List the first names on one line, whatever stands in them."""
    shown = [plain(name[:80]) for name in columns[:MAX_SHOWN]]
    if len(columns) > MAX_SHOWN:
        shown.append("...")
    return ", ".join(shown) or "none"


def _put(texts: dict[str, str], key: str, value: object) -> None:
    """Keep the text of a value, if it has one."""
    text = text_of(value)
    if text is not None:
        texts[key] = sys.intern(text)  # of tens of thousands of files each label is held once


# ----------------------------------------------------------------------------------------------------------------------
# Labels that may be one
# ----------------------------------------------------------------------------------------------------------------------


def near_duplicates(labels: Iterable[str]) -> list[list[str]]:
    """Return the labels that differ only in how they are written, in sorted groups of two or more.

    These are case, blanks around them, forms of a letter that Unicode takes as compatible (NFKC), and blanks, hyphens
    or underscores between letters or digits, where any of these stands for any other.

    Example:
        >>> near_duplicates(["anime", "line art", "Anime", "dog", " anime", "Line_Art", "lineart"])
        [[' anime', 'Anime', 'anime'], ['Line_Art', 'line art']]
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        groups[_spelling(label)].add(label)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _spelling(label: str) -> str:
    """Return what labels that differ only in how they are written have in common."""
    text = label
    for _ in range(2):  # what has become a small letter may have another form
        text = unicodedata.normalize("NFKC", text).casefold()
    return _BETWEEN.sub(" ", text.strip())


def may_be_one(labels: Iterable[str]) -> str:
    """Return that the first labels that differ only in how they are written may be one: a sentence, or nothing."""
    groups = near_duplicates(labels)
    return f" {' and '.join(repr(label[:40]) for label in groups[0][:MAX_GROUPS])} may be one label." if groups else ""


def similar_labels(files: Sequence[LabelledFile], source: str) -> list[Notice]:
    """Return the notice of labels that differ only in how they are written; its files have the rarer spellings.

    Args:
        files: The files of a collection.
        source: Where their labels come from, in words.
    """
    paths: dict[str, list[str]] = defaultdict(list)
    for file in files:
        paths[file.label].append(file.path)
    groups = near_duplicates(paths)
    if not groups:
        return []
    shown, rarer = [], []
    for group in groups:
        commonest = max(group, key=lambda label: len(paths[label]))
        rarer += [path for label in group if label != commonest for path in paths[label]]
        labels = [f"'{plain(label[:40])}' ({len(paths[label])})" for label in group[:MAX_SHOWN]]
        shown.append(", ".join(labels) + ", ..." * (len(group) > MAX_SHOWN))
    listed = "; ".join(shown[:MAX_GROUPS])
    if len(groups) > MAX_GROUPS:
        listed += f"; and {len(groups) - MAX_GROUPS} more such sets"
    message = (
        f"labels that differ only in case, blanks or hyphens are read as classes of their own: {listed}. "
        f"If they are one concept, write it in one way ({source})."
    )
    members = tuple(tuple(sorted(path for label in group for path in paths[label])) for group in groups)
    return [Notice("similar labels", message, tuple(sorted(rarer)), members)]
