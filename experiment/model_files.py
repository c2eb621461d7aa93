"""The folder ``model/`` beside the results: tensors in safetensors files, and a manifest that says what they are.

The manifest is JSON with a digest of itself, and has the SHA-256 of every other file. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import CollectionError
from experiment import store
from experiment.header import PROGRAM
from experiment.model_checks import StoredTensors, check_tensors, manifest_fault
from experiment.settings import MODEL_FOLDER
from loras.building import canonical_json, fault_of, read_object, write_atomically, written_atomically
from loras.headers import METADATA, open_file, read_header
from loras.keys import LoraFileError

FOLDER, MANIFEST, RESULTS = MODEL_FOLDER, "manifest.json", "results.json"
FORMAT = 1  # of the manifest and the tensors; another is refused
PARTS = {"format", "results", "dataset", "classes", "modules", "passed_over", "kept", "files", "versions", "digest"}
TEMPORARY = ".model-"  # before what is being written
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
        path: The folder of results or its results.json, or ``model/`` itself.

    Attributes:
        manifest: What it says.

    Raises:
        CollectionError: It is missing, damaged, of another format, or belongs to other results than those beside it.
    """

    def __init__(self, path: Path):
        try:
            path = path.parent if path.name == RESULTS and path.is_file() else path
            self.folder = path if os.path.lexists(path / MANIFEST) else path / FOLDER
            self.manifest = self._checked()
        except OSError as error:
            raise _refused(f"{fault_of(error)}. Mend that, or give another folder.") from error

    def _checked(self) -> dict:
        if not self.folder.is_dir():
            given = self.folder.parent
            fault = "no model/ in it" if given.is_dir() else "a file" if os.path.lexists(given) else "no such folder"
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
        except (ValueError, RecursionError):  # numbers that strict JSON has not
            expected = None
        if manifest.get("digest") != expected:
            raise _refused(f"{path}: damaged or edited (its digest is another). {AGAIN}")
        if fault := manifest_fault(manifest):
            raise _refused(f"{path}: not what this program has written: {fault}. {AGAIN}")
        for name, sha in manifest["files"].items():
            if not self._is_plain(name) or not store.has_digest(self.folder / name, sha):
                raise _refused(f"{self.folder / name}: missing or damaged (its SHA-256 is another). {AGAIN}")
        self._check_results(manifest)
        return manifest

    def _is_plain(self, name: str) -> bool:
        """Return whether a file is there, and no link, and no pipe, which would be waited for."""
        return stat.S_ISREG(os.lstat(self.folder / name).st_mode) if os.path.lexists(self.folder / name) else False

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

    def refused(self, record: dict, fault: str) -> CollectionError:
        """Return the error that refuses what a record says, or its tensors."""
        return _refused(f"{self.folder / record['file']}: not what this program has written ({fault}). {AGAIN}")

    @contextmanager
    def tensors(self, record: dict) -> Iterator[Callable[[str], Tensor]]:
        """Yield a reader of the tensors of a record, by name; their dtypes and shapes are those of its kind.

        Nothing is mapped: what others may cut short at any moment would end the process by a signal.

        Raises:
            CollectionError: A tensor is missing, or another than such a record has, or not finite.
        """
        path = self.folder / record["file"]
        with open_file(path) as file:
            with self._in_words(record):
                header = read_header(path)
                if file.read(8 + len(header))[8:] != header:
                    raise LoraFileError("changed while it was read")
                entries = {name: entry for name, entry in json.loads(header).items() if name != METADATA}
                tensors = StoredTensors(file, 8 + len(header), entries)
                check_tensors(tensors, record, len(self.manifest["classes"]), self.manifest["modules"])
            yield partial(self._tensor, tensors, record)

    def _tensor(self, tensors: StoredTensors, record: dict, name: str) -> Tensor:
        with self._in_words(record):
            return tensors.get(name)

    @contextmanager
    def _in_words(self, record: dict) -> Iterator[None]:
        try:
            yield
        except LoraFileError as error:
            raise self.refused(record, str(error).rstrip(".")) from error


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
