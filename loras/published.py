"""Published parquet collections of LoRAs -> a folder of LoRA files: ``python data.py import SOURCE OUT``.

A row of such a collection is a LoRA: a column for each layer, named by its key, whose cells are lists (or nested lists)
of numbers; ``category_label`` or ``label``; and small columns about the training. Each row becomes::

    <out>/000013/pytorch_lora_weights.safetensors    unet.down_blocks.0...attn1.to_q.lora.down.weight
    <out>/000013/metadata.json                       category_label, and the other small columns

where 000013 is the number of the row in the collection, counted from 0. A few rows are held at a time. The work is done
in ``<out>.partial``, which is renamed when whole; an import that was stopped continues when started again.

pyarrow, and datasets for the hub, are optional and imported here only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from loras import building, keys, lora_files
from loras.lora_files import LoraFileError
from loras.names import fault as name_fault

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ModuleNotFoundError:  # reported when it is needed
    pa = None

MAX_NAMED = 3  # columns named in a message


class RefusedError(ValueError):
    """A source that cannot be imported; each line reads ``<path>: what is wrong. What to do.``."""


class BadRowError(ValueError):
    """A row that is no LoRA; the message says what is wrong."""


@dataclass(frozen=True)
class Limits:
    """The most that is held at a time; after each batch the state is written.

    ``batch_bytes`` are counted as parquet does; the rows of a data set of the hub have no size beforehand.
    """

    batch_rows: int = 64
    batch_bytes: int = 2**25
    hub_rows: int = 16


@dataclass(frozen=True)
class Source:
    """The rows of a published collection.

    ``identity`` (JSON) distinguishes it from other sources. ``rows`` is None where their number is unknown.
    ``batches(start, names)`` yields (path, number of the batch's first row in it, record batch) from the row ``start``
    of the collection on, with at least the named columns.
    """

    name: str
    identity: dict
    schema: pa.Schema
    rows: int | None
    batches: Callable[[int, list[str]], Iterator[tuple[str, int, pa.RecordBatch]]]


@dataclass(frozen=True)
class Columns:
    """The use of each column of a collection.

    ``roles`` maps columns of weights to "down", "up" or "" (an alpha); ``shapes`` has those that the schema gives;
    ``flat`` are the columns whose lists have no shape; ``small`` go to metadata.json, ``left_out`` nowhere.
    """

    roles: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    flat: frozenset[str]
    label: str
    small: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass
class State:
    """The state of an import: ``rows`` were read, of which ``left_out`` were no LoRAs (``faults`` are the first)."""

    source: dict
    rows: int = 0
    left_out: int = 0
    faults: list[str] = field(default_factory=list)


# ----------------------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------------------


def open_source(name: str, subset: str | None = None, split: str | None = None, *, limits: Limits = Limits()) -> Source:
    """Open a parquet file, a folder of them (in the order of their paths), or a data set ``owner/name`` of the hub.

    Raises:
        RefusedError: It does not exist, cannot be read, or needs a library that is not installed.
    """
    path = Path(name)
    if not path.exists() and (name.endswith(".parquet") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise RefusedError(f"{name}: no such file or folder. Give parquet files, or owner/name of a hub data set.")
    if pa is None:
        raise RefusedError(f"{name}: pyarrow, which reads parquet, is not installed. Run `pip install pyarrow`.")
    if not path.exists():
        return hub_source(name, subset, split, limits=limits)
    if subset or split:
        raise RefusedError(f"{name}: --subset and --split are for data sets of the hub. Leave them out.")
    return parquet_source(path, limits)


def parquet_source(path: Path, limits: Limits = Limits()) -> Source:
    """Open a parquet file or a folder of them; only headers are read."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise RefusedError(f"{path}: no *.parquet file in it. Give the folder that holds the shards.")
    identity, counts, schema = [], [], None
    for file in files:
        with _reading(file), pq.ParquetFile(file) as parquet:
            schema_of_file = parquet.schema_arrow
            counts.append(parquet.metadata.num_rows)
        schema = schema or schema_of_file
        if different := _different_columns(schema, schema_of_file):
            fault = f"its columns differ from those of {files[0]} ({different})"
            raise RefusedError(f"{file}: {fault}. Import one collection at a time, each into its own folder.")
        stat = file.stat()
        identity.append([os.path.relpath(file, path), stat.st_size, stat.st_mtime_ns])

    def batches(start: int, names: list[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        for file, rows in zip(files, counts, strict=True):
            if start < rows:
                yield from _parquet_batches(file, start, names, limits)
            start = max(0, start - rows)

    return Source(str(path), {"files": identity}, schema, sum(counts), batches)


def _different_columns(schema: pa.Schema, other: pa.Schema) -> str:
    """Return the first difference of two schemas in words; empty where an import makes the same of both.

    Writers store one column as ``list`` in a file and as ``large_list`` in the next, and in floats of any width.
    """
    if missing := sorted(set(schema.names) ^ set(other.names)):
        return _first(missing)
    for name in schema.names:
        kinds = schema.field(name).type, other.field(name).type
        if _kind(kinds[0]) != _kind(kinds[1]):
            return f"{name}: {kinds[1]}, not {kinds[0]}"
    return ""


def _kind(kind: pa.DataType) -> tuple:
    """Return what an import makes of a column of a type: shape, depth and kind of its items."""
    shape = tuple(kind.shape) if isinstance(kind, pa.FixedShapeTensorType) else None
    depth, leaf = _unnested(kind)
    tests = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, _is_text)
    return shape, depth, next((test for test in tests if test(leaf)), str(leaf))


def _parquet_batches(
    file: Path, start: int, names: list[str], limits: Limits
) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    """Yield the rows of a file from ``start`` on, in batches that are small whatever the file's row groups are."""
    # Without buffers of its own a reader would hold all columns of a row group, packed.
    with _reading(file), pq.ParquetFile(file, buffer_size=2**16, pre_buffer=False) as parquet:
        first = 0
        for group in range(parquet.num_row_groups):
            rows, size = parquet.metadata.row_group(group).num_rows, parquet.metadata.row_group(group).total_byte_size
            if first + rows > start:
                batch_rows = max(1, min(limits.batch_rows, limits.batch_bytes * rows // max(1, size)))
                row = first
                for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=names, use_threads=False):
                    skipped = max(0, start - row)
                    if skipped < batch.num_rows:
                        yield str(file), row + skipped, batch.slice(skipped)
                    row += batch.num_rows
            first += rows


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Refuse a file where the library fails to read it, in the library's words."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        with open(file, "rb") as stream:
            if stream.read(40).startswith(b"version https://git-lfs"):
                fault = "a Git LFS pointer, not parquet. Fetch the file with `git lfs pull`."
                raise RefusedError(f"{file}: {fault}") from error
        raise RefusedError(f"{file}: not a readable parquet file ({_one_line(error)}). Download it again.") from error


def hub_source(name: str, subset: str | None = None, split: str | None = None, *, limits: Limits = Limits()) -> Source:
    """Open a data set of the hub, streamed; it has to have one split, or ``split`` names one."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        fault = "no such folder, and datasets, which reads the hub, is not installed"
        raise RefusedError(f"{name}: {fault}. Run `pip install datasets`.") from error
    with _asking(name):
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)
        if isinstance(stream, dict):
            if len(stream) > 1:
                raise RefusedError(f"{name}: has the splits {', '.join(stream)}. Choose one with --split.")
            split, stream = next(iter(stream.items()))
        stream = stream.with_format("arrow")
        head = next(iter(stream.iter(1)), None)
    if head is None:
        raise RefusedError(f"{name}: holds no rows. Look at its page, or choose another with --subset or --split.")

    def batches(start: int, names: list[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        with _asking(name):
            for table in stream.select_columns(names).skip(start).iter(limits.hub_rows):
                for batch in table.to_batches():
                    yield name, start, batch
                    start += batch.num_rows

    identity = {"hub": name, "subset": subset, "split": str(split), "columns": head.schema.names}
    return Source(name, identity, head.schema, None, batches)


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Refuse a data set where the hub or the way to it fails, in the library's words."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:  # the library, what it downloads with, and the parsers of files: no common class
        fault = f"datasets says {type(error).__name__}: {_one_line(error)}"
        raise RefusedError(f"{name}: {fault}. Mend that and start again, which continues.") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


# ----------------------------------------------------------------------------------------------------------------------
# Columns
# ----------------------------------------------------------------------------------------------------------------------


def sort_columns(name: str, schema: pa.Schema, leave_out: list[str]) -> Columns:
    """Sort columns into weights, label, small ones and others, by name and type.

    Raises:
        RefusedError: There are no layers, or columns of numbers without a layer's name, or no label.
    """
    roles: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    flat: set[str] = set()
    small, left_out, unknown = [], [], []
    for column in schema:
        depth, leaf = _unnested(column.type)
        if any(fnmatchcase(column.name, pattern) for pattern in leave_out):
            left_out.append(column.name)
        elif (role := _role(name, column.name)) is not None:
            if not _is_number(leaf) or depth not in ((0, 1) if role == "" else (1, 2, 4)):
                raise RefusedError(f"{name}: column {column.name} is {column.type}, not lists of numbers. Mend it.")
            if role and not pa.types.is_floating(leaf):
                fault = f"column {column.name} is {column.type}: whole numbers, which no weights are"
                raise RefusedError(f"{name}: {fault}. Save them as floats, with the scale that they were quantised by.")
            roles[column.name] = role
            if isinstance(column.type, pa.FixedShapeTensorType):
                shapes[column.name] = _tensor_shape(name, column)
            elif role and depth == 1:
                flat.add(column.name)
        elif depth and _is_number(leaf) and not any(re.search(p, column.name) for p in keys.IGNORED.values()):
            unknown.append(column.name)
        elif not depth and (_is_number(leaf) or pa.types.is_boolean(leaf) or _is_text(leaf)):
            small.append(column.name)
        else:
            left_out.append(column.name)
    if len(set(schema.names)) != len(schema.names):
        raise RefusedError(f"{name}: two columns have one name. Rename one.")
    if faults := [fault for fault in map(name_fault, [*roles, *small]) if fault]:
        raise RefusedError(f"{name}: a column's name {faults[0]}. Rename it.")
    _check_layers(name, roles, unknown, schema)
    labels = [column for column in ("category_label", "label") if column in small + left_out]
    label = next((column for column in labels if not any(fnmatchcase(column, pattern) for pattern in leave_out)), None)
    if label is None or not (_is_text(schema.field(label).type) or pa.types.is_integer(schema.field(label).type)):
        others = f"the other columns are {_first(small + left_out)}"
        raise RefusedError(f"{name}: no column category_label or label of texts or whole numbers; {others}. Add one.")
    return Columns(roles, shapes, frozenset(flat), label, tuple(small), tuple(left_out))


def _check_layers(name: str, roles: dict[str, str], unknown: list[str], schema: pa.Schema) -> None:
    """Refuse columns that are not the layers of a LoRA, both factors of each module, or hold other lists of numbers."""
    layers = [column for column, role in roles.items() if role]
    if not layers and len(unknown) == 1:
        fault = f"one flat vector per row ({unknown[0]}): it has no layers"
        raise RefusedError(f"{name}: {fault}. Get the collection with a column for each layer.")
    if not layers:
        fault = f"no column is named as a layer is; the first columns are {_first(unknown or schema.names)}"
        raise RefusedError(f"{name}: {fault}. Name them by the keys of a LoRA, <module>.lora.down.weight.")
    if unknown:
        fault = f"columns of numbers that are not named as a layer is: {_first(unknown)} ({len(unknown)} in all)"
        raise RefusedError(f"{name}: {fault}. Name them by the keys of a LoRA, or --leave-out their names.")
    # With one shape for all columns a fault can only be one of their names.
    header = {column: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} for column in roles}
    try:
        lora_files.parse_header(json.dumps(header).encode())
    except LoraFileError as error:
        raise RefusedError(f"{name}: its columns: {error}") from error


def _role(name: str, column: str) -> str | None:
    """Return "down" or "up", "" for an alpha; None for a column that is not of a LoRA."""
    try:
        parsed = keys.parse_key(column)
    except LoraFileError as error:
        raise RefusedError(f"{name}: {error}") from error
    if parsed:
        return parsed.role
    return "" if re.match(keys.SCALE, column) else None


def _unnested(kind: pa.DataType) -> tuple[int, pa.DataType]:
    """Return the depth of nested lists in a column's type, and the type of their items."""
    depth = 0
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        depth, kind = depth + 1, kind.value_type
    return depth, kind


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _tensor_shape(name: str, column: pa.Field) -> tuple[int, ...]:
    """Return the shape in Arrow's own tensor type."""
    order = column.type.permutation
    if order is not None and list(order) != sorted(order):
        raise RefusedError(f"{name}: column {column.name} holds permuted tensors. Save them in the order of rows.")
    return tuple(column.type.shape)


def _first(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "") or "none"


# ----------------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------------


def lora_of_row(batch: pa.RecordBatch, i: int, columns: Columns, rank: int | None) -> tuple[bytes, dict]:
    """Return a safetensors file and its metadata, of one row.

    float16 stays, other numbers are rounded to float32. Lists that have no shape are r rows (down) or r columns (up): r
    is ``rank``, or else the column of that name, or else 1.

    Raises:
        BadRowError: A cell is missing, NaN, infinite, or of no matrix's shape, or the factors of a module do not match.
    """
    metadata = {name: _small_cell(batch, name, i) for name in columns.small}
    if metadata[columns.label] in (None, ""):
        raise BadRowError(f"column {columns.label}: missing")
    if columns.flat and rank is None:
        rank = metadata.get("rank", 1)
    if columns.flat and (type(rank) is not int or rank < 1):
        raise BadRowError(f"column rank: {rank} is no rank, and flat lists have no shape without one")
    tensors = {}
    for name, role in columns.roles.items():
        try:
            tensors[name] = _tensor(batch.column(name), i, columns.shapes.get(name))
            if name in columns.flat:
                tensors[name] = tensors[name].reshape((rank, -1) if role == "down" else (-1, rank))
        except ValueError as error:
            raise BadRowError(f"column {name}: {error}") from error
    data = save(tensors, {"format": "pt"})
    try:
        lora_files.parse_header(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except LoraFileError as error:
        raise BadRowError(str(error)) from error
    return data, {"category_label": metadata[columns.label]} | metadata


def _tensor(column: pa.Array, i: int, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return the numbers of a cell in the shape of its nested lists, or in that which the schema gives."""
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    values, sides = column.slice(i, 1), []
    while not _is_number(values.type):
        if values.null_count:
            raise ValueError("missing")
        lengths = set(pc.list_value_length(values).to_pylist())
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError("empty, or lists of differing lengths")
        sides.append(lengths.pop())
        values = values.flatten()
    if values.null_count:
        raise ValueError("missing")
    numbers = values.to_numpy(zero_copy_only=False)
    if numbers.dtype != np.float16:
        with np.errstate(over="ignore"):
            numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError("NaN, infinity, or beyond float32")
    return numbers.reshape(shape or sides)


def _small_cell(batch: pa.RecordBatch, name: str, i: int) -> str | int | float | bool | None:
    """Return a cell as metadata.json holds it; strict JSON has no NaN."""
    try:
        value = batch.column(name)[i].as_py()
    except UnicodeDecodeError as error:
        raise BadRowError(f"column {name}: not Unicode text") from error
    return None if isinstance(value, float) and not np.isfinite(value) else value


# ----------------------------------------------------------------------------------------------------------------------
# Import
# ----------------------------------------------------------------------------------------------------------------------


def import_rows(source: Source, columns: Columns, out: Path, rank: int | None, skip_bad: bool) -> tuple[State, bool]:
    """Write each row of a source into its folder of ``out``, or continue an import of the same that was stopped.

    Rows are written to ``<out>.partial``, a batch at a time, and then the state. Rows beyond the state are removed at
    the start, so at most one batch is written twice.

    Returns:
        The state at the end, and whether ``out`` existed already.

    Raises:
        RefusedError: ``out`` is something else, a row is bad (without ``skip_bad``; the rows of the batches before it
            are kept), or all are.
        OSError: A state cannot be read, or a file not be written.
        LockedError: Another import is at work there.
    """
    identity = source.identity | {"rank": rank, "left_out": list(columns.left_out)}
    if building.holds_something(out):
        return _state_of(out, identity), True
    with building.partial_folder(out, lambda partial: _state_of(partial, identity)) as partial:
        if partial is None:  # another process has put something at ``out`` meanwhile
            return _state_of(out, identity), True
        state = _state_of(partial, identity) if (partial / building.IMPORT_NAME).exists() else State(identity)
        _remove_rows_beyond(partial, state.rows)
        _write_state(partial, state)
        progress = building.Progress()
        for where, first, batch in source.batches(state.rows, [*columns.roles, *columns.small]):
            loras, faults = _loras_of_batch(batch, where, first, columns, rank)
            if faults and not skip_bad:
                mend = "Mend it, or leave out such rows with --skip-bad."
                raise RefusedError("\n".join(f"{fault} {mend}" for fault in faults))
            for row, data, metadata in loras:
                folder = partial / f"{state.rows + row:06}"
                building.write_lora(folder, building.canonical_json(metadata, indent=2), data)
            state.rows += batch.num_rows
            state.left_out += len(faults)
            state.faults = (state.faults + faults)[:MAX_NAMED]
            _write_state(partial, state)
            progress("import", state.rows, source.rows)
        progress("import", state.rows, state.rows)  # closes the bar, also where the number of rows was unknown
        if state.rows == state.left_out:
            fault = f"none of its {state.rows} rows is a LoRA. Give another collection."
            raise RefusedError("\n".join([f"{source.name}: {fault}", *state.faults]))
    return state, False


def _loras_of_batch(
    batch: pa.RecordBatch, where: str, first: int, columns: Columns, rank: int | None
) -> tuple[list[tuple[int, bytes, dict]], list[str]]:
    """Return row, file and metadata of each LoRA of a batch, and the faults of its other rows."""
    loras, faults = [], []
    for row in range(batch.num_rows):
        try:
            loras.append((row, *lora_of_row(batch, row, columns, rank)))
        except BadRowError as error:
            faults.append(f"{where}: row {first + row} (counted from 0): {str(error).rstrip('.')}.")
    return loras, faults


def _state_of(folder: Path, identity: dict) -> State:
    """Read the state of the import in a folder; refuse a folder of anything else."""
    contents = building.read_object(folder / building.IMPORT_NAME)
    try:
        state = State(**contents) if contents is not None else None
    except TypeError:  # the state of another program
        state = None
    if state is None or not _is_plausible(state):
        raise RefusedError(f"{folder}: exists and is no import. Give another folder, or remove it.")
    if state.source != identity:
        fault = "was imported from another source, or with other --rank or --leave-out"
        raise RefusedError(f"{folder}: {fault}. Give another folder, or remove it.")
    return state


def _is_plausible(state: State) -> bool:
    """Return whether a state could be one that this program has written."""
    counts = state.rows, state.left_out
    texts = isinstance(state.faults, list) and all(isinstance(fault, str) for fault in state.faults)
    return all(type(count) is int for count in counts) and 0 <= state.left_out <= state.rows and texts


def _write_state(folder: Path, state: State) -> None:
    building.write_atomically(folder / building.IMPORT_NAME, building.canonical_json(asdict(state)))


def _remove_rows_beyond(folder: Path, rows: int) -> None:
    """Remove the folders of rows that were begun after the state was written."""
    for path in folder.iterdir():
        if path.name.isdecimal() and int(path.name) >= rows:
            shutil.rmtree(path)


# ----------------------------------------------------------------------------------------------------------------------
# python data.py import
# ----------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, limits: Limits = Limits()) -> int:
    """Run ``python data.py import``. Exit codes: 0 done, 2 refused or failed."""
    try:
        if args.rank is not None and args.rank < 1:
            raise RefusedError(f"--rank {args.rank}: no rank. Give 1 or more.")
        if args.out.name in ("", ".."):
            raise RefusedError(f"{args.out}: has no name of its own. Give a folder by its name.")
        source = open_source(args.source, args.subset, args.split, limits=limits)
        columns = sort_columns(source.name, source.schema, args.leave_out)
        state, existed = import_rows(source, columns, args.out, args.rank, args.skip_bad)
    except (RefusedError, building.LockedError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
    except OSError as error:
        print(f"error: {building.fault_of(error)}. Mend that; the same command then continues.", file=sys.stderr)
    else:
        print("\n".join(_outcome(args, columns, state, existed)))
        return 0
    return 2


def _outcome(args: argparse.Namespace, columns: Columns, state: State, existed: bool) -> list[str]:
    """Return lines on what was imported, and what to do next."""
    layers = sum(role != "" for role in columns.roles.values())
    origin = ", imported before: nothing to do" if existed else f" from {state.rows} rows of {args.source}"
    lines = [
        f"{args.out}: {state.rows - state.left_out} LoRAs of {layers} layers{origin}",
        f"label:    {columns.label}",
        "metadata: " + ", ".join(columns.small),
    ]
    if columns.left_out:
        lines.append("left out: " + ", ".join(columns.left_out))
    if columns.flat and args.rank is None and "rank" not in columns.small:
        lines.append("rank:     1, assumed: flat lists have no shape, --rank R gives another")
    if state.left_out:
        lines.append(f"skipped:  {state.left_out} of {state.rows} rows, which are no LoRAs; the first:")
        lines += [f"  {fault}" for fault in state.faults]
    out = shlex.quote(str(args.out))
    return [
        *lines,
        "next:     python data.py inspect " + out,
        "          python ablation_experiment.py --dataset=" + out,
    ]
