"""Finished work as small files: written whole or not at all, found again by what they depend on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def canonical_json(value: object, indent: int | None = None) -> bytes:
    """Strict JSON (no NaN, no Infinity) with keys in the order given, the same bytes for equal values."""
    return (json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n").encode()


def digest(value: object) -> str:
    """Sixteen hexadecimal digits that stand for a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest(*modules: ModuleType) -> str:
    """Stands for the source of modules: what they compute is not trusted once they have changed."""
    return digest([_source(module) for module in modules])


@cache  # the source that is running, also when the file is edited under a long run
def _source(module: ModuleType) -> str:
    return Path(module.__file__).read_text(encoding="utf-8")


def array_digest(*arrays: np.ndarray) -> str:
    """Sixteen hexadecimal digits that stand for the shapes and contents of arrays."""
    contents = hashlib.sha256()
    for array in arrays:
        contents.update(f"{array.dtype.str}{array.shape}".encode())
        contents.update(np.ascontiguousarray(array).data)
    return contents.hexdigest()[:16]


def move_to_previous(folder: Path, names: Iterable[str]) -> None:
    """Move those of the named files that are in a folder to its next ``previous/<n>/``; nothing is ever lost."""
    there = [folder / name for name in names if (folder / name).exists()]
    if there:
        numbers = [int(kept.name) for kept in (folder / "previous").glob("[0-9]*") if kept.name.isdecimal()]
        kept = folder / "previous" / str(max(numbers, default=0) + 1)
        kept.mkdir(parents=True)
        for path in there:
            path.rename(kept / path.name)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz atomically, the same bytes for equal arrays (`np.savez` stores the time of day)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980-01-01
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, member.getvalue())
    write_atomically(path, buffer.getvalue())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz; nothing pickled is ever loaded."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


class Units:
    """Finished units of work in a folder, each a small .npz named by a digest of all that it depends on.

    A unit whose key has been computed before is read instead of computed: that is how a rerun resumes.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: dict) -> Path:
        """Where the unit of this key lies, whether it is there or not."""
        return self.folder / f"{key['kind']}-{digest(key)}.npz"

    def get(self, key: dict, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The unit's arrays: read if they are there, else computed by ``compute()`` and kept."""
        path = self.path(key)
        if not path.exists():
            save_arrays(path, compute())
        return load_arrays(path)
