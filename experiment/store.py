"""Finished work on disk: arrays and shards, digests of what they depend on, and results that replace others."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from loras.building import TEMPORARY, write_atomically, written_atomically

ROOT = Path(__file__).parent.parent  # of this program
STALE_SECONDS = 7 * 24 * 3600  # a run's folder of this age is nobody's any more
FILE_SECONDS = 120  # until every machine sees a new file


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


def mapped_rows(path: Path, shape: tuple[int, ...], blocks: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
    """Return an array float32 in a file, mapped, so that processes share its pages; write it where it is not there.

    Args:
        path: The .npy file, which another process may remove at any moment.
        shape: Of the array.
        blocks: Yields consecutive rows.
    """
    while True:
        try:
            return np.load(path, mmap_mode="c", allow_pickle=False)  # as torch asks for memory that it may write to
        except FileNotFoundError:
            with written_atomically(path) as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks():
                    file.write(np.ascontiguousarray(block, "<f4").data)


def digest(value: object) -> str:
    """Return 16 hexadecimal digits that stand for a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest(*parts: str) -> str:
    """Return 16 hexadecimal digits that stand for the source of modules: results of another one are not trusted.

    Args:
        parts: Modules and folders of this program, such as "autoencoders", "experiment/store" and "training".
    """
    return digest([_source(part) for part in parts])


@cache  # the source that is running, also when a file is edited under a long run
def _source(part: str) -> list[list[str]]:
    """Return names and contents of a module, or of all modules and templates of a folder."""
    folder, module = ROOT / part, ROOT / f"{part}.py"  # data/ of the user may lie beside data.py
    whole = folder.is_dir() and not module.exists()
    paths = sorted([*folder.glob("*.py"), *folder.glob("*.html")]) if whole else [module]
    return [[path.name, path.read_text(encoding="utf-8")] for path in paths]


def array_digest(*arrays: np.ndarray) -> str:
    """Return 16 hexadecimal digits that stand for the shapes and contents of arrays."""
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
    for path in (folder / name for name in contents):
        for temporary in path.parent.glob(f".{path.name}.*"):
            if TEMPORARY.search(temporary.name):
                temporary.unlink()
    present = [*also, *(name for name in (*others, last) if (folder / name).exists())]
    if also or last in present or any((folder / name).read_bytes() != contents[name] for name in present):
        target = _previous(folder, present, last)
        for name in present:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(target / name)
    for name, content in contents.items():
        write_atomically(folder / name, content)


def _previous(folder: Path, present: list[str], last: str) -> Path:
    """Return the folder ``previous/<n>`` that files are moved to: a new one, or one that a killed process began.

    It was begun and not finished where the last file is still present, and neither that nor any other that is present
    has been moved there.
    """
    numbers = [int(path.name) for path in (folder / "previous").glob("[0-9]*") if path.name.isdecimal()]
    latest = max(numbers, default=0)
    target = folder / "previous" / str(latest)
    moved = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    begun = latest and last in present and last not in moved and moved.isdisjoint(present)
    return target if begun else target.with_name(str(latest + 1))


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz atomically; see `packed_arrays`."""
    write_atomically(path, packed_arrays(arrays))


def packed_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """Return the content of an .npz, the same bytes for equal arrays (`np.savez` stores the time of day)."""
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
    """Return all arrays of an .npz, or those of the given names; nothing pickled is ever loaded."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names or archive.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, LookupError) as error:
        raise OSError(f"{path} is damaged ({error}). Remove it") from error


def make_run_folder(cache: Path, owner: str) -> Path:
    """Make a folder for what a run writes for its own workers, and remove those that killed runs have left.

    Args:
        cache: Folder that runs share.
        owner: Name that no two runs at work share.
    """
    for path in (cache / "runs").glob("*"):
        with suppress(FileNotFoundError):  # another process removes it too
            if path.name.startswith(f"{owner}-") or time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    folder = cache / "runs" / f"{owner}-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    return folder


def wait_for(path: Path) -> None:
    """Wait until this machine sees a file that another one may have written.

    Raises:
        OSError: It does not come.
    """
    since = time.monotonic()
    while not path.exists():
        if time.monotonic() - since > FILE_SECONDS:
            raise OSError(f"{path} is not there, though a worker has written it")
        time.sleep(0.1)


def shard_path(folder: Path, first_row: int) -> Path:
    """Return where the shard that begins with a row lies."""
    return folder / f"{first_row:08}.npy"


def map_shards(folder: Path) -> list[np.ndarray]:
    """Return the shards of a folder in the order of their rows, memory-mapped; names show where one is missing."""
    arrays, rows = [], 0
    for path in sorted(folder.glob("[0-9]*.npy")):
        if path != shard_path(folder, rows):
            raise OSError(f"{folder}: rows {rows} to {int(path.stem) - 1} are missing. Remove that folder.")
        try:
            arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise OSError(f"{path} is damaged ({error}). Remove the folder that it lies in") from error
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
        """Return rows and columns of the array.

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
            values = np.empty((len(rows), len(span)), np.float32)
        else:
            span = range(picked.min(initial=self.shape[1]), picked.max(initial=-1) + 1)
            values = np.empty((len(rows), len(picked)), np.float32)
        if not values.size:
            return values
        if rows.min() < 0 or rows.max() >= self.shape[0] or span.start < 0 or span.stop > self.shape[1]:
            wanted = f"rows {rows.min()} to {rows.max()}, columns {span.start} to {span.stop - 1}"
            raise IndexError(f"{wanted} of an array {self.shape}")
        shard_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        if picked is not None:
            picked, buffer = picked - span.start, np.empty(len(span), np.float32)
        for shard in np.unique(shard_of_row).tolist():
            path, start = self.files[shard]
            at = np.flatnonzero(shard_of_row == shard)
            numbers = (rows[at] - self.starts[shard]) * self.shape[1] + span.start  # that lie before what is read
            with open(path, "rb", buffering=0) as file:
                for i, offset in zip(at.tolist(), (start + 4 * numbers).tolist(), strict=True):
                    _read_into(values[i] if picked is None else buffer, file, offset)
                    if picked is not None:
                        np.take(buffer, picked, out=values[i])
        return values


def _read_into(array: np.ndarray, file: BinaryIO, offset: int) -> None:
    """Fill a contiguous array from a place in a file."""
    wanted = memoryview(array).cast("B")
    while wanted:
        count = os.preadv(file.fileno(), [wanted], offset)
        if not count:
            raise OSError(f"{file.name}: cut short. Remove the cache folder that it lies in.")
        wanted, offset = wanted[count:], offset + count
