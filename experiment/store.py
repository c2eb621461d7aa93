"""Finished work as small files: written whole or not at all, found again by what they depend on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from loras.building import TEMPORARY, write_atomically, written_atomically

PROGRAM = Path(__file__).parent.parent  # the folder of this program


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy atomically, without a second copy of the array and without mapping the file.

    The unwritten pages of a mapped file count as memory of the process; those of a plain write do not.
    """
    array = np.asarray(array, order="C")
    if array.dtype.hasobject:
        raise ValueError(f"{path}: objects would have to be pickled")
    with written_atomically(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)  # not numpy's own way of writing, which does not say why it failed


def digest(value: object) -> str:
    """Sixteen hexadecimal digits that stand for a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest(*parts: str) -> str:
    """Return 16 hexadecimal digits that stand for the source of modules: results of another source are not trusted.

    Args:
        parts: Modules and folders of this program, such as "autoencoders", "experiment/store" and "training".
    """
    return digest([_source(part) for part in parts])


@cache  # the source that is running, also when a file is edited under a long run
def _source(part: str) -> list[list[str]]:
    """Names and contents of a module, or of all modules of a folder."""
    folder = PROGRAM / part
    paths = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    return [[path.name, path.read_text(encoding="utf-8")] for path in paths]


def array_digest(*arrays: np.ndarray) -> str:
    """Sixteen hexadecimal digits that stand for the shapes and contents of arrays."""
    contents = hashlib.sha256()
    for array in arrays:
        contents.update(f"{array.dtype.str}{array.shape}".encode())
        contents.update(np.ascontiguousarray(array).data)
    return contents.hexdigest()[:16]


def replace_all(folder: Path, contents: dict[str, bytes], also: Sequence[str] = ()) -> None:
    """Write files that belong together, and move those that are there to ``previous/<n>/``: nothing is ever lost.

    The last one counts: where it is, the others are there too. So a process that was killed between them can be told
    from one that had finished, and what it had begun is finished. Only one process at a time may do this in a folder.

    Args:
        folder: Where they lie.
        contents: By path in the folder.
        also: Files there that belong to those of before, and have no like among those to be written.
    """
    *others, last = contents
    paths = [folder / name for name in contents]
    for left in [found for path in paths for found in path.parent.glob(f".{path.name}.*")]:
        if TEMPORARY.search(left.name):
            left.unlink()
    there = [*also, *(name for name in (*others, last) if (folder / name).exists())]
    if also or last in there or any((folder / name).read_bytes() != contents[name] for name in there):
        numbers = [int(kept.name) for kept in (folder / "previous").glob("[0-9]*") if kept.name.isdecimal()]
        latest = max(numbers, default=0)
        kept = folder / "previous" / str(latest)
        # A folder with neither the last one nor anything else that is here was begun by a process that was killed.
        moved = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
        begun = latest and last in there and last not in moved and moved.isdisjoint(there)
        kept = kept if begun else kept.with_name(str(latest + 1))
        for name in there:
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(kept / name)
    for name, content in contents.items():
        write_atomically(folder / name, content)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz atomically; see `packed_arrays`."""
    write_atomically(path, packed_arrays(arrays))


def packed_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """The content of an .npz, the same bytes for equal arrays (`np.savez` stores the time of day)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980-01-01
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, member.getvalue())
    return buffer.getvalue()


def load_arrays(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """All arrays of an .npz, or those of the given names; nothing pickled is ever loaded."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names or archive.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, LookupError) as error:
        raise OSError(f"{path} is damaged ({error}). remove it") from error


def shard_path(folder: Path, first_row: int) -> Path:
    """Where the shard that begins with a row lies."""
    return folder / f"{first_row:08}.npy"


def map_shards(folder: Path) -> list[np.ndarray]:
    """The shards of a folder in the order of their rows, memory-mapped; their names tell of one that is missing."""
    arrays, rows = [], 0
    for path in sorted(folder.glob("[0-9]*.npy")):
        if path != shard_path(folder, rows):
            raise OSError(f"{folder}: rows {rows} to {int(path.stem) - 1} are missing. remove that folder.")
        try:
            arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise OSError(f"{path} is damaged ({error}). remove the folder that it lies in") from error
        rows += len(arrays[-1])
    return arrays


class Shards:
    """An array float32[N, W] that is never held whole: consecutive rows in each .npy file of a folder.

    Rows are read, not mapped: the pages of a mapped file count as memory of the process.
    """

    def __init__(self, folder: Path):
        mapped = map_shards(folder)
        self.files = [(Path(array.filename), array.offset) for array in mapped]
        self.starts = np.cumsum([0, *(len(array) for array in mapped)])  # first row of each shard, and N
        self.shape = (int(self.starts[-1]), mapped[0].shape[1])

    def read(self, rows: np.ndarray | None = None, columns: slice | np.ndarray | None = None) -> np.ndarray:
        """Some rows and columns.

        Args:
            rows: In any order, also repeated, int[n]; None: all.
            columns: A slice without a step, or in any order int[w]; None: all.

        Returns:
            A copy, float32[n, w].

        Raises:
            IndexError: There is no such row or column.
        """
        rows = np.arange(self.shape[0]) if rows is None else np.asarray(rows)
        picked = None if columns is None or isinstance(columns, slice) else np.asarray(columns)
        if picked is None:
            span = range(self.shape[1])[columns or slice(None)]
            found = np.empty((len(rows), len(span)), np.float32)
        else:
            span = range(picked.min(initial=self.shape[1]), picked.max(initial=-1) + 1)
            found = np.empty((len(rows), len(picked)), np.float32)
        if not found.size:
            return found
        if rows.min() < 0 or rows.max() >= self.shape[0] or span.start < 0 or span.stop > self.shape[1]:
            asked = f"rows {rows.min()} to {rows.max()}, columns {span.start} to {span.stop - 1}"
            raise IndexError(f"{asked} of an array {self.shape}")
        shard_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        if picked is not None:
            picked, buffer = picked - span.start, np.empty(len(span), np.float32)
        for shard in np.unique(shard_of_row).tolist():
            path, start = self.files[shard]
            at = np.flatnonzero(shard_of_row == shard)
            numbers = (rows[at] - self.starts[shard]) * self.shape[1] + span.start  # that lie before what is read
            with open(path, "rb", buffering=0) as file:
                for i, offset in zip(at.tolist(), (start + 4 * numbers).tolist(), strict=True):
                    _read_into(found[i] if picked is None else buffer, file, offset)
                    if picked is not None:
                        np.take(buffer, picked, out=found[i])
        return found


def _read_into(array: np.ndarray, file: BinaryIO, offset: int) -> None:
    """Fill a contiguous array from a place in a file."""
    wanted = memoryview(array).cast("B")
    while wanted:
        count = os.preadv(file.fileno(), [wanted], offset)
        if not count:
            raise OSError(f"{file.name}: cut short. remove the cache folder that it lies in.")
        wanted, offset = wanted[count:], offset + count


class Units:
    """Finished units of work in a folder, each a small .npz named by a digest of all that it depends on.

    A unit whose key has been computed before is read instead of computed: that is how a rerun resumes.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: dict) -> Path:
        """Where the unit of this key lies, whether it is there or not."""
        return self.folder / f"{key['kind']}-{digest(key)}.npz"

    def save(self, key: dict, arrays: dict[str, np.ndarray]) -> None:
        """Keep the arrays of a unit that is finished."""
        save_arrays(self.path(key), arrays)

    def load(self, key: dict, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """The arrays of a finished unit, or those of the given names only."""
        return load_arrays(self.path(key), names)
