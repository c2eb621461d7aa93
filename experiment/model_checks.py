"""Checks of what a folder ``model/`` says: its digest shows damage, not who has written it.

Shape letters: R runs, C classes, P modules, F features of a LoRA, K of them that are not constant, H hidden, m columns
of a kernel, r rank, t train LoRAs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from experiment.predictors import PARAMETERS, UNLABELLED
from experiment.settings import KEPT
from loras import names
from loras.keys import LoraFileError
from representations import REPRESENTATIONS
from training import attention
from training.kernels import KERNELS

LARGEST_SIDE, LARGEST_SIDES = 2**24, 2**30  # inputs or outputs of a module; of all modules together
MOST_LAYERS, MOST_RUNS = 16, 10**6
LARGEST = 1e300  # of a number
LONGEST = 4 * names.MAX_LENGTH  # letters of a module's name, which is made of names
TEMPERATURES = 1e-12, 1e12  # scores are divided by it
KINDS = {"computed": ("layers",), "kernel": ("pairs", "rest"), "trained": ("attention",)}  # by how features are made
FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
_TYPES = {**FLOATS, "I64": np.int64, "BOOL": np.uint8}
ENDLESS = "norm_spread"  # infinite where a train LoRA leaves a module alone

Shape = tuple[int | str, ...]  # a letter stands for one number, at least 1, wherever it stands


# ----------------------------------------------------------------------------------------------------------------------
# The manifest
# ----------------------------------------------------------------------------------------------------------------------


def manifest_fault(manifest: dict) -> str:
    """Return what is wrong with the parts of a manifest, the first; empty where nothing is."""
    for part, (is_right, words) in _PARTS.items():
        if not is_right(manifest[part]):
            return words
    seen = set()
    for record in manifest["kept"]:
        for name, is_right in _FIELDS.items():
            if not is_right(record.get(name)):
                return f"{name} of a record in kept is missing, or none that this program writes"
        if fault := _record_fault(record, manifest["files"]):
            return fault
        if record["representation"] in seen:
            return f"{record['representation']} stands twice in kept"
        seen.add(record["representation"])
    return ""


def _record_fault(record: dict, files: dict) -> str:
    """Return what is wrong with a record whose fields are right each by itself."""
    name, kind = record["representation"], record["kind"]
    if kind not in KINDS[REPRESENTATIONS[name].made]:
        return f"{name} is of a kind that does not belong to it"
    if kind == "layers" and not _whole(record.get("layers"), MOST_LAYERS):
        return f"the number of layers of {name} is none from 1 to {MOST_LAYERS}"
    if record["file"] != f"{name}.safetensors" or record["file"] not in files:
        return f"the file of {name} is not {name}.safetensors, or without a SHA-256"
    return ""


def _whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(text, str) and text.isprintable() and len(text) <= LONGEST for text in value
    )


def _are_classes(value: object) -> bool:
    return _texts(value) and 2 <= len(value) == len(set(value)) and not any(map(names.fault, value))


def _are_modules(value: object) -> bool:
    if not (isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)):
        return False
    modules = [entry.get("module") for entry in value]
    sides = [entry.get(side) for entry in value for side in ("inputs", "outputs")]
    sane = all(_whole(side, LARGEST_SIDE) for side in sides) and sum(sides) <= LARGEST_SIDES
    return sane and _texts(modules) and all(modules) and len(modules) == len(set(modules))


def _are_files(value: object) -> bool:
    known = {f"{name}.safetensors" for name in KEPT}
    return isinstance(value, dict) and value.keys() <= known


def _texts_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_dataset(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _is_usual(value: object) -> bool:
    """Return whether these are medians, as many spreads above 0, a bound or none, and what is a text or a number."""
    if not isinstance(value, dict):
        return False
    medians, spreads = value.get("medians"), value.get("spreads")
    if not (isinstance(medians, list) and isinstance(spreads, list) and 1 <= len(medians) == len(spreads)):
        return False
    others = [value[name] for name in value if name not in ("medians", "spreads", "bound")]
    bound = value.get("bound", "")
    return (
        all(map(_number, medians))
        and all(_number(spread) and spread > 0 for spread in spreads)
        and (bound is None or _number(bound))
        and all(other is None or isinstance(other, str | bool) or _number(other) for other in others)
    )


_PARTS: dict[str, tuple[Callable[[object], bool], str]] = {
    "results": (_texts_by_name, "its results are not texts by name"),
    "dataset": (_is_dataset, "its dataset has no name"),
    "classes": (_are_classes, "its classes are not two or more different names"),
    "modules": (_are_modules, "its modules are not different names, each with inputs and outputs"),
    "passed_over": (_texts, "passed_over is no list of names"),
    "files": (_are_files, "a file of a name that is none of a model's"),
    "versions": (_texts_by_name, "its versions are not texts by name"),
    "kept": (
        lambda value: isinstance(value, list) and value and all(isinstance(record, dict) for record in value),
        "kept is no list of records, or empty",
    ),
}
_FIELDS: dict[str, Callable[[object], bool]] = {
    "representation": lambda value: isinstance(value, str) and value in KEPT,
    "kind": lambda value: isinstance(value, str),
    "file": lambda value: isinstance(value, str),
    "runs": lambda value: _whole(value, MOST_RUNS),
    "temperature": lambda value: _number(value) and TEMPERATURES[0] <= value <= TEMPERATURES[1],
    "validation": lambda value: isinstance(value, dict) and all(_number(value.get(key)) for key in ("loras", "chance")),
    "validation_accuracy": lambda value: _number(value) and 0 <= value <= 1,
    "landmarks": lambda value: value is None or _whole(value, 2**40),
    "usual": _is_usual,
}


# ----------------------------------------------------------------------------------------------------------------------
# Tensors
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of an open safetensors file: read one at a time, never mapped.

    Args:
        file: Open, to read.
        start: The byte at which the data begin.
        entries: Of the header, which `loras.headers.read_header` has checked, by name.
        sizes: The numbers that letters of shapes stand for.
    """

    file: BinaryIO
    start: int
    entries: dict[str, dict]
    sizes: dict[str, int] = field(default_factory=dict)

    def check(self, name: str, types: Iterable[str], shape: Shape) -> None:
        """Refuse a tensor of another dtype or shape; letters that nothing has fixed yet stand for what it has.

        Raises:
            LoraFileError: It is another, or missing.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise LoraFileError(f"has no tensor {name}")
        found = entry["shape"]
        if entry["dtype"] not in types:
            raise LoraFileError(f"its tensor {name} is {entry['dtype']}, not {' or '.join(types)}")
        same = len(found) == len(shape)
        for here, side in zip(found, shape, strict=False):
            expected = self.sizes.setdefault(side, here) if isinstance(side, str) else side
            same &= here == expected and (here >= 1 or not isinstance(side, str))
        if not same:
            raise LoraFileError(f"its tensor {name} has the shape {found}, which does not fit the others")

    def get(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            LoraFileError: It is missing, not finite, or cut short meanwhile.
        """
        entry = self.entries.get(name)
        if entry is None or entry["dtype"] not in _TYPES:
            raise LoraFileError(f"has no tensor {name}")
        array = np.empty(math.prod(entry["shape"]), _TYPES[entry["dtype"]])
        if array.size:
            self.file.seek(self.start + entry["data_offsets"][0])
            if self.file.readinto(memoryview(array).cast("B")) != array.nbytes:
                raise LoraFileError("changed while it was read")
        if entry["dtype"] in FLOATS and not (_at_most_endless(array) if name == ENDLESS else np.isfinite(array).all()):
            raise LoraFileError(f"its tensor {name} is not finite")
        array = array != 0 if entry["dtype"] == "BOOL" else array
        return torch.from_numpy(array.reshape(entry["shape"]))


def _at_most_endless(spread: np.ndarray) -> bool:
    return bool((spread > 0).all())  # NaN is not


def check_tensors(tensors: StoredTensors, record: dict, classes: int, modules: list[dict]) -> None:
    """Refuse tensors that are not those of a record, before any but the smallest is read.

    Args:
        tensors: Of its file.
        record: Of the manifest, which `manifest_fault` has passed.
        classes: Their number, C.
        modules: Of the manifest.

    Raises:
        LoraFileError: One is missing, or of another dtype or shape.
    """
    tensors.sizes.update(P=len(modules), C=classes, R=record["runs"])
    for name in ("norm_mean", "norm_spread"):
        tensors.check(name, FLOATS, ("P",))
    if record["kind"] == "layers":
        _check_layers(tensors, record)
        return
    kernel = KERNELS[UNLABELLED if record["kind"] == "attention" else record["representation"]]
    tensors.check("own", FLOATS, ("m",))
    tensors.check("weights", FLOATS, ("P", kernel.views))
    tensors.check("sizes", FLOATS, ("P",))
    read = tensors.get("sizes").numpy() > 0
    if record["kind"] == "attention":
        _check_attention(tensors, np.flatnonzero(read).tolist())
    else:
        _check_machine(tensors, record)
        read &= tensors.get("weights").numpy().any(1)
    for module in np.flatnonzero(read).tolist():
        rank = f"r{module}"
        tensors.check(f"down.{module}", FLOATS, ("m", rank, modules[module]["inputs"]))
        tensors.check(f"up.{module}", FLOATS, ("m", modules[module]["outputs"], rank))
        tensors.check(f"size.{module}", FLOATS, ("m",))


def _check_layers(tensors: StoredTensors, record: dict) -> None:
    features = len(REPRESENTATIONS[record["representation"]].feature_names)
    tensors.check("columns", ("BOOL",), (features * tensors.sizes["P"],))
    read = int(tensors.get("columns").sum())
    for name in ("mean", "scale"):
        tensors.check(name, FLOATS, (read,))
    tensors.check("train", FLOATS, ("t", read))
    side: int | str = read
    for layer in range(record["layers"]):
        outputs = "C" if layer == record["layers"] - 1 else f"H{layer}"
        tensors.check(f"{PARAMETERS}weight{layer}", ("F32",), ("R", side, outputs))
        tensors.check(f"{PARAMETERS}bias{layer}", ("F32",), ("R", 1, outputs))
        side = outputs


def _check_machine(tensors: StoredTensors, record: dict) -> None:
    if record["runs"] != 1:
        raise LoraFileError(f"has one support vector machine, where the manifest says {record['runs']}")
    classes = tensors.sizes["C"]
    if record["kind"] == "rest":
        decisions = classes if classes > 2 else 1
        tensors.check("coefficients", FLOATS, (decisions, "m"))
        tensors.check("intercept", FLOATS, (decisions,))
        return
    tensors.check("coefficients", FLOATS, (classes - 1, "m"))
    tensors.check("intercept", FLOATS, (classes * (classes - 1) // 2,))
    tensors.check("counts", ("I64",), ("C",))
    counts = tensors.get("counts").tolist()
    if min(counts) < 0 or sum(counts) != tensors.sizes["m"]:
        raise LoraFileError("its tensor counts does not count the support vectors")


def _check_attention(tensors: StoredTensors, read: list[int]) -> None:
    modules, classes = tensors.sizes["P"], tensors.sizes["C"]
    tensors.check(f"{PARAMETERS}gate_score", ("F32",), ("R", "H", 1))
    for name, shape in attention.parameter_shapes(modules, classes, tensors.sizes["H"]).items():
        tensors.check(PARAMETERS + name, ("F32",), ("R", *shape))
    tensors.check("train", FLOATS, ("t", modules * attention.TOKEN))
    for module in read:
        tensors.check(f"map.{module}", FLOATS, ("m", attention.COORDINATES))
        tensors.check(f"shift.{module}", FLOATS, (attention.COORDINATES,))
        for name in ("mean", "scale"):
            tensors.check(f"{name}.{module}", FLOATS, (1, attention.TOKEN))
