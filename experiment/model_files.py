"""The folder ``model/`` beside the results: tensors in safetensors files, and a manifest that says what they are.

The manifest is JSON with a digest of itself, and has the SHA-256 of every other file. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data import CollectionError
from experiment import store
from experiment.header import PROGRAM
from experiment.settings import MODEL_FOLDER
from loras.building import canonical_json, fault_of, read_object, write_atomically, written_atomically

FOLDER, MANIFEST, RESULTS = MODEL_FOLDER, "manifest.json", "results.json"
FORMAT = 1  # of the manifest and the tensors; another is refused
PARTS = {"format", "results", "dataset", "classes", "modules", "passed_over", "kept", "files", "versions", "digest"}
TEMPORARY = ".model-"  # before what is being written
_PLAIN = re.compile(r"[a-z_]+\.safetensors")  # no path out of the folder
_DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "bool": "BOOL"}
AGAIN = "Run the experiment again with the same flags, which makes it anew."


@dataclass(frozen=True)
class Made:
    """A tensor that is made when it is written: its dtype as numpy names it, its shape, and what makes it."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray | Tensor) -> Made:
        """Return that of an array that is there."""
        array = np.asarray(array)
        return cls(array.dtype.name, array.shape, lambda: array)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def write_tensors(path: Path, tensors: dict[str, Made]) -> tuple[str, int]:
    """Write a safetensors file, one tensor in memory at a time; return its SHA-256 and its bytes."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = canonical_json(entries).strip()
    header += b" " * (-len(header) % 8)
    contents = hashlib.sha256()
    with written_atomically(path) as file:
        for block in _blocks(header, tensors):
            contents.update(block)
            file.write(block)
    return contents.hexdigest(), 8 + len(header) + end


def _blocks(header: bytes, tensors: dict[str, Made]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors.values():
        array = np.asarray(tensor.make(), tensor.dtype, order="C")
        if array.shape != tensor.shape:
            raise AssertionError(f"a tensor of shape {array.shape}, not {tensor.shape}")
        yield memoryview(array.reshape(-1)).cast("B") if array.size else b""


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of ``model/`` below ``target`` when the body ends, or is removed."""
    for left in target.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)
    new, old = target / f"{TEMPORARY}new", target / f"{TEMPORARY}old"
    try:
        new.mkdir()
        yield new
        if os.path.lexists(target / FOLDER):
            (target / FOLDER).rename(old)
        new.rename(target / FOLDER)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def identity_of(results: dict) -> dict:
    """Return what says which results a model belongs to: digests of the files, the labels and the settings."""
    dataset, config = results["dataset"], {**results["config"], "stack": ""}
    return {
        "fingerprint": dataset["fingerprint"],
        "samples": dataset["samples"],
        "config": store.digest(config),
    }


def versions() -> dict[str, str]:
    """Return the versions of what predictions depend on."""
    libraries = {name: version(name) for name in ("numpy", "scikit-learn")}
    return {"program": store.code_digest(*PROGRAM), "torch": torch.__version__} | libraries


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write the manifest, with its digest."""
    whole = {"format": FORMAT, **manifest, "versions": versions()}
    write_atomically(folder / MANIFEST, canonical_json({**whole, "digest": _digest(whole)}, indent=2))


def _digest(manifest: dict) -> str:
    return hashlib.sha256(canonical_json(manifest)).hexdigest()


class ModelFolder:
    """A folder ``model/`` that is what was written there.

    Args:
        path: The folder of results, or ``model/`` itself.

    Attributes:
        manifest: What it says.

    Raises:
        CollectionError: It is missing, damaged, of another format, or belongs to other results than those beside it.
    """

    def __init__(self, path: Path):
        self.folder = path if os.path.lexists(path / MANIFEST) else path / FOLDER
        try:
            self.manifest = self._checked()
        except OSError as error:
            raise _refused(f"{fault_of(error)}. Mend that, or give another folder.") from error

    def _checked(self) -> dict:
        if not self.folder.is_dir():
            fault = "no model/ in it" if self.folder.parent.is_dir() else "no such folder"
            mend = "Give the folder of results of an experiment, or its model/."
            raise _refused(f"{self.folder.parent}: {fault}. {mend}")
        path = self.folder / MANIFEST
        manifest = read_object(path)
        if manifest is None or not manifest.keys() >= PARTS:
            raise _refused(f"{path}: missing, or no manifest of a model. {AGAIN}")
        if manifest.get("format") != FORMAT:
            raise _refused(f"{path}: its format is not {FORMAT}, which this program reads. {AGAIN}")
        try:
            expected = _digest({key: value for key, value in manifest.items() if key != "digest"})
        except ValueError:  # numbers that strict JSON has not
            expected = None
        if manifest.get("digest") != expected:
            raise _refused(f"{path}: damaged or edited (its digest is another). {AGAIN}")
        for name, sha in manifest["files"].items():
            if not _PLAIN.fullmatch(name):
                raise _refused(f"{path}: a file of a name that is none of a model's. {AGAIN}")
            if (self.folder / name).is_symlink() or not store.has_digest(self.folder / name, sha):
                raise _refused(f"{self.folder / name}: missing or damaged (its SHA-256 is another). {AGAIN}")
        self._check_results(manifest)
        return manifest

    def _check_results(self, manifest: dict) -> None:
        """Refuse a model that is not of the results beside it, where there are any."""
        path = self.folder.parent / RESULTS
        if self.folder.name != FOLDER or not path.exists():
            return
        try:
            same = identity_of(read_object(path) or {}) == manifest["results"]
        except (LookupError, TypeError, ValueError):
            same = False
        if not same:
            raise _refused(f"{self.folder}: belongs to other results than {path}. {AGAIN}")

    @property
    def records(self) -> list[dict]:
        """Records of the classifiers, the best by validation first."""
        return self.manifest["kept"]

    @property
    def notes(self) -> list[str]:
        """The versions that differ from those that the model was made with, in words."""
        made, here = self.manifest["versions"], versions()
        other = [f"{name} {made.get(name)} (here {here[name]})" for name in here if made.get(name) != here[name]]
        return [f"made with {', '.join(other)}: numbers may differ by rounding, or more"] if other else []

    @contextmanager
    def tensors(self, record: dict) -> Iterator[Callable[[str], Tensor]]:
        """Yield a reader of the tensors of a record, by name.

        Raises:
            CollectionError: A tensor is missing.
        """
        path = self.folder / record["file"]
        try:
            with safe_open(path, framework="pt") as file:
                yield file.get_tensor
        except SafetensorError as error:
            raise _refused(f"{path}: not what this program has written ({error}). {AGAIN}") from error


def _refused(finding: str) -> CollectionError:
    return CollectionError([finding])


def is_whole(target: Path, results: dict) -> bool:
    """Return whether what results say was kept lies beside them."""
    said = results.get("model")
    if not said or not said["kept"]:
        return True
    try:
        model = ModelFolder(target)
    except CollectionError:
        return False
    same = identity_of(results) == model.manifest["results"]
    return same and [r["representation"] for r in model.records] == [r["representation"] for r in said["kept"]]
