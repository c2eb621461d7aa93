"""Finished work on disk: arrays and shards, digests of what they depend on, and results that replace others."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from loras.building import TEMPORARY, canonical_json, read_object, write_atomically, written_atomically

ROOT = Path(__file__).parent.parent  # of this program
STALE_SECONDS = 7 * 24 * 3600  # a run's folder of this age is nobody's any more
FILE_SECONDS = 120  # until every machine sees a new file
SEAL_BYTES = hashlib.sha256().digest_size  # at the end of a file
PREVIOUS = "previous"  # where earlier results go, below the folder of results
SHARDS_NAME = "shards.json"  # beside shards: what they are to be


class DamagedError(OSError):
    """Something in the cache that is not what was written there; the message says which file, and what to do."""


def save_array(path: Path, array: np.ndarray) -> str:
    """Write an .npy atomically, without a second copy of the array and without mapping the file; return its sha256.

    The unwritten pages of a mapped file count as memory of the process; those of a plain write do not.
    """
    array = np.asarray(array, order="C")
    if array.dtype.hasobject:
        raise ValueError(f"{path}: objects would have to be pickled")
    with written_atomically(path) as file:
        hashed = _Hashed(file)
        np.lib.format.write_array_header_1_0(hashed, np.lib.format.header_data_from_array_1_0(array))
        hashed.write(array.data)  # not numpy's own way of writing, which does not say why it failed
    return hashed.contents.hexdigest()


def shared_rows(
    path: Path, shape: tuple[int, ...], blocks: Callable[[], Iterable[np.ndarray]], mapped: bool = True
) -> np.ndarray:
    """Return an array float32 in a file that processes share; write it where it is not there, or was damaged.

    Args:
        path: The .npy file, which another process may remove at any moment.
        shape: Of the array.
        blocks: Yields consecutive rows.
        mapped: Whether it is mapped, so that processes share its pages; else it is read. A process dies where a file
            that it has mapped is cut short: that is for workers, whose units are then done again.
    """
    while True:
        try:
            check_seal(path)
            array = np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False)  # as torch asks for, to write
            if (array.dtype, array.shape) == (np.float32, shape):
                return array
            raise DamagedError(f"{path}: {array.dtype} {array.shape}")
        except FileNotFoundError:
            with _sealed(path) as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks():
                    file.write(np.ascontiguousarray(block, "<f4").data)
        except (DamagedError, ValueError) as error:
            throw_away(path, error)


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


def replace_all(folder: Path, contents: dict[str, bytes], also: Sequence[str] = (), keep: bool = True) -> None:
    """Write files that belong together, and move those that are there to ``previous/<n>/``: nothing is ever lost.

    The last one counts: where it is, the others are there too. So a process that was killed between them can be told
    from one that had finished, and what it had begun is finished. Only one process at a time may do this in a folder.

    Args:
        folder: Where they lie.
        contents: By path in the folder.
        also: Files there that belong to those of before, and have no like among those to be written.
        keep: Whether those that are there are moved; else they are replaced, as those of a run that is not done yet.

    Raises:
        OSError: A folder in it is a link, through which files elsewhere would be moved; or it cannot be written.
    """
    *others, last = contents
    for inside in sorted({PREVIOUS, *(os.path.dirname(name) for name in (*contents, *also))} - {""}):
        _refuse_link(folder / inside)
    for path in (folder / name for name in contents):
        for temporary in path.parent.glob(f".{path.name}.*"):
            if TEMPORARY.search(temporary.name):
                temporary.unlink()
    if not keep:
        for name in also:
            (folder / name).unlink(missing_ok=True)
        also = ()
    present = [*also, *(name for name in (*others, last) if (folder / name).exists())]
    if keep and (also or last in present or any((folder / name).read_bytes() != contents[name] for name in present)):
        target = _previous(folder, present, last)
        _refuse_link(target)
        for name in present:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(target / name)
    for name, content in contents.items():
        write_atomically(folder / name, content)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link, which results are not written through: remove it", os.fspath(path))


def _previous(folder: Path, present: list[str], last: str) -> Path:
    """Return the folder ``previous/<n>`` that files are moved to: a new one, or one that a killed process began.

    It was begun and not finished where the last file is still present, and neither that nor any other that is present
    has been moved there.
    """
    numbers = [int(path.name) for path in (folder / PREVIOUS).glob("[0-9]*") if path.name.isdecimal()]
    latest = max(numbers, default=0)
    target = folder / PREVIOUS / str(latest)
    moved = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    begun = latest and last in present and last not in moved and moved.isdisjoint(present)
    return target if begun else target.with_name(str(latest + 1))


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz with a seal, atomically; see `packed_arrays`. Deflated it would be 7 % smaller, at 32 MB/s."""
    with _sealed(path) as file:
        file.write(packed_arrays(arrays, zipfile.ZIP_STORED))


def packed_arrays(arrays: dict[str, np.ndarray], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return the content of an .npz, the same bytes for equal arrays (`np.savez` stores the time of day)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980-01-01
            entry.compress_type = compression
            archive.writestr(entry, member.getvalue())
    return buffer.getvalue()


def load_arrays(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Return all arrays of an .npz with a seal, or those of the given names; nothing pickled is ever loaded.

    Raises:
        DamagedError: It is not what was written there.
    """
    check_seal(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names or archive.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, LookupError) as error:
        raise DamagedError(f"{path} is damaged ({error}). Remove it") from error


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


def describe_shards(folder: Path, about: str, array: tuple[np.dtype, tuple[int, ...]], shards: list) -> None:
    """Write what the shards of a folder are to be, beside them.

    Args:
        folder: Where they lie.
        about: What they are; the shards of anything else are not taken for them.
        array: dtype and shape of a row.
        shards: Number of rows and sha256 of each file.
    """
    dtype, shape = array
    write_document(folder / SHARDS_NAME, {"dtype": np.dtype(dtype).str, "shape": list(shape), "shards": shards}, about)


class Shards:
    """An array [N, ...] that is never held whole: consecutive rows in each .npy file of a folder.

    Rows are read, not mapped: the pages of a mapped file count as memory of the process, and where a mapped file is
    cut short the process dies. Each file is compared with its digest when this process first reads of it.

    Args:
        folder: Where the files lie.
        about: What they are, as `describe_shards` was told.

    Raises:
        DamagedError: They are not what was written, as far as can be seen without reading them.
    """

    def __init__(self, folder: Path, about: str):
        self.folder, known = folder, read_document(folder / SHARDS_NAME, about)
        if known is None:
            raise DamagedError(f"{folder / SHARDS_NAME} is missing. Remove {folder}")
        self.dtype, self._row = np.dtype(known["dtype"]), tuple(known["shape"])
        self._digests = [digest for _, digest in known["shards"]]
        self.starts = np.cumsum([0, *(rows for rows, _ in known["shards"])])  # first row of each shard, and N
        self.shape = (int(self.starts[-1]), *self._row)
        self.paths = [shard_path(folder, first) for first in self.starts[:-1].tolist()]
        for number, path in enumerate(self.paths):
            if not path.exists():
                raise DamagedError(f"{folder}: {path.name} is missing. Remove that folder")
            if path.stat().st_size <= self._bytes(number):
                raise DamagedError(f"{path} is damaged (cut short). Remove {folder}")

    def _bytes(self, number: int) -> int:
        """Return the bytes of the rows of a shard."""
        return int(self.starts[number + 1] - self.starts[number]) * math.prod(self._row) * self.dtype.itemsize

    def check(self) -> None:
        """Compare all shards with their digests, less those that this process has compared already.

        Raises:
            DamagedError: One is another.
        """
        for number in range(len(self.paths)):
            with self._opened(number):
                pass

    @contextmanager
    def _opened(self, number: int) -> Iterator[tuple[BinaryIO, int]]:
        """Yield the file of a shard and the place where its rows begin."""
        path, rows = self.paths[number], int(self.starts[number + 1] - self.starts[number])
        with open(path, "rb", buffering=0) as file:
            try:
                _check(file, path, hashlib.sha256(), self._digests[number])
                file.seek(0)
                np.lib.format.read_magic(file)
                shape, turned, dtype = np.lib.format.read_array_header_1_0(file)
                if (shape, dtype) != ((rows, *self._row), self.dtype) or turned:
                    raise ValueError(f"{dtype} {shape}")
            except ValueError as error:
                raise DamagedError(f"{path} is damaged ({error}). Remove {self.folder}") from error
            yield file, file.tell()

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the rows of each shard in turn."""
        for number, first in enumerate(self.starts[:-1].tolist()):
            values = np.empty((int(self.starts[number + 1]) - first, *self._row), self.dtype)
            with self._opened(number) as (file, start):
                _read_into(values, file, start)
            yield values

    def whole(self) -> np.ndarray:
        """Return the array [N, ...]."""
        values = np.empty(self.shape, self.dtype)
        for number, (first, last) in enumerate(pairwise(self.starts.tolist())):
            with self._opened(number) as (file, start):
                _read_into(values[first:last], file, start)
        return values

    def read(self, rows: np.ndarray | None = None, columns: slice | np.ndarray | None = None) -> np.ndarray:
        """Return rows of the array, and columns of an array [N, W].

        Args:
            rows: In any order, also repeated, int[n]; None: all.
            columns: A slice without a step, or in any order int[w]; None: all.

        Returns:
            A copy, [n, ...] or [n, w].

        Raises:
            IndexError: There is no such row or column.
            DamagedError: A shard is not what was written.
        """
        width = math.prod(self._row)
        rows = np.arange(self.shape[0]) if rows is None else np.asarray(rows)
        picked = None if columns is None or isinstance(columns, slice) else np.asarray(columns)
        if picked is None:
            span = range(width)[columns or slice(None)]
            values = np.empty((len(rows), len(span)), self.dtype)
        else:
            span = range(picked.min(initial=width), picked.max(initial=-1) + 1)
            values = np.empty((len(rows), len(picked)), self.dtype)
        shape = (len(rows), *self._row) if columns is None else values.shape
        if not values.size:
            return values.reshape(shape)
        if rows.min() < 0 or rows.max() >= self.shape[0] or span.start < 0 or span.stop > width:
            wanted = f"rows {rows.min()} to {rows.max()}, columns {span.start} to {span.stop - 1}"
            raise IndexError(f"{wanted} of an array {self.shape}")
        shard_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        if picked is not None:
            picked, buffer = picked - span.start, np.empty(len(span), self.dtype)
        for shard in np.unique(shard_of_row).tolist():
            at = np.flatnonzero(shard_of_row == shard)
            numbers = (rows[at] - self.starts[shard]) * width + span.start  # that lie before what is read
            with self._opened(shard) as (file, start):
                for i, offset in zip(at.tolist(), (start + self.dtype.itemsize * numbers).tolist(), strict=True):
                    _read_into(values[i] if picked is None else buffer, file, offset)
                    if picked is not None:
                        np.take(buffer, picked, out=values[i])
        return values.reshape(shape)


def _read_into(array: np.ndarray, file: BinaryIO, offset: int) -> None:
    """Fill a contiguous array from a place in a file."""
    wanted = memoryview(array.reshape(-1)).cast("B")
    while wanted:
        count = os.preadv(file.fileno(), [wanted], offset)
        if not count:
            raise DamagedError(f"{file.name} is damaged (cut short). Remove {Path(file.name).parent}")
        wanted, offset = wanted[count:], offset + count


# ----------------------------------------------------------------------------------------------------------------------
# Seals: nothing damaged is taken for what was written
# ----------------------------------------------------------------------------------------------------------------------


class _Hashed:
    """A file that is being written, and the sha256 of what has been written."""

    def __init__(self, file: BinaryIO, before: bytes = b""):
        self.file, self.contents = file, hashlib.sha256(before)

    def write(self, data: bytes | memoryview) -> None:
        """Write and hash."""
        self.contents.update(data)
        self.file.write(data)


@contextmanager
def _sealed(path: Path) -> Iterator[_Hashed]:
    """Yield a file that replaces ``path`` when the body ends, with a seal at its end.

    The seal is the sha256 of the file's place in the cache and of all before it: a file that was copied from another
    place has another.
    """
    with written_atomically(path) as file:
        hashed = _Hashed(file, _place(path))
        yield hashed
        file.write(hashed.contents.digest())


def _place(path: Path) -> bytes:
    """Return the place of a file in the cache, which may itself be moved: the last two folders, and the name."""
    return os.fsencode("/".join(path.parts[-3:]))


def check_seal(path: Path) -> None:
    """Compare a file with its seal, if this process has not done so since the file has changed.

    Raises:
        DamagedError: It is not what was written there.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size - SEAL_BYTES
        try:
            if size < 0:
                raise ValueError("cut short")
            seal = os.pread(file.fileno(), SEAL_BYTES, size).hex()
            _check(file, path, hashlib.sha256(_place(path)), seal, size)
        except ValueError as error:
            raise DamagedError(f"{path} is damaged ({error}). Remove it") from error


_right: dict[Path, tuple] = {}  # files that had their digests: that, and their state then


def _check(file: BinaryIO, path: Path, contents: hashlib._Hash, expected: str, size: int | None = None) -> None:
    """Compare a file, or its beginning, with a digest, if this process has not done so since the file has changed.

    Args:
        file: Opened, without a buffer.
        path: Of the file.
        contents: The hash, which may have begun.
        expected: Hexadecimal digits.
        size: Bytes of the beginning; None: all.

    Raises:
        ValueError: It has another.
    """
    status = os.fstat(file.fileno())
    state = (expected, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if _right.get(path) == state:
        return
    left, buffer = status.st_size if size is None else size, memoryview(bytearray(2**20))
    file.seek(0)
    while left > 0 and (count := file.readinto(buffer[: min(left, len(buffer))])):
        contents.update(buffer[:count])
        left -= count
    if left or contents.hexdigest() != expected:
        raise ValueError("its digest is another")
    _right[path] = state


def has_digest(path: Path, expected: str | None) -> bool:
    """Return whether a file is there and has this sha256."""
    try:
        with open(path, "rb", buffering=0) as file:
            _check(file, path, hashlib.sha256(), expected or "")
    except (FileNotFoundError, ValueError):
        return False
    return True


def throw_away(path: Path, why: Exception) -> None:
    """Remove a file or folder of the cache that cannot be used, and say so: whoever calls computes it again."""
    missing = f"{path} is not whole: {Path(why.filename).name} is missing" if isinstance(why, FileNotFoundError) else ""
    print(f"cache     {missing or str(why).partition('. Remove')[0]}: removed, and computed again", flush=True)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Return whether a file with a seal is there; a damaged one is thrown away."""
    try:
        check_seal(path)
    except FileNotFoundError:
        return False
    except DamagedError as error:
        throw_away(path, error)
        return False
    return True


def write_document(path: Path, value: dict, about: str) -> None:
    """Write a JSON object with a digest of itself and of what it is about, atomically."""
    write_atomically(path, canonical_json(_sealed_document(value, about)))


def _sealed_document(value: dict, about: str) -> dict:
    return {"digest": digest([about, value]), "of": about, "value": value}


def read_document(path: Path, about: str) -> dict | None:
    """Return what `write_document` wrote about something; None where there is none.

    Raises:
        DamagedError: There is something else.
    """
    if not path.exists():
        return None
    document = read_object(path) or {}
    value = document.get("value")
    with suppress(ValueError):  # of a number that is none
        if isinstance(value, dict) and document == _sealed_document(value, about):
            return value
    raise DamagedError(f"{path} is damaged, or of other files. Remove it")
