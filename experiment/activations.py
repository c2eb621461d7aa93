"""Inputs of modules that were recorded from the base model: the file of --activations, checked before any work.

Of each module of the collection 8 of its rows are read, evenly spaced from the first to the last, and nothing else.
Keys are canonical modules, or any name that stands for one in a LoRA, such as a module's path in diffusers.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from data import Collection, CollectionError
from experiment import store
from loras.headers import read_header
from loras.keys import LoraFileError, canonical_module
from loras.names import plain
from representations import SKETCH

if TYPE_CHECKING:
    from safetensors import PySafeSlice

DTYPES = ("F64", "F32", "F16", "BF16")
RECORD = "docs/activations.md says how to record them"


@dataclass(frozen=True)
class Activations:
    """Inputs of each module of a collection, float32[8, in], and a digest of them and of the modules' names."""

    inputs: dict[str, np.ndarray]
    digest: str


def read(path: Path, collection: Collection) -> Activations:
    """Read 8 inputs of each module of a collection.

    Raises:
        CollectionError: The file cannot be read, or does not hold such inputs of every module; each fault is named.
    """
    shown = f"--activations {plain(os.fspath(path))}"
    try:
        read_header(path)
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            inputs, found = _inputs(tensors, collection)
    except (LoraFileError, SafetensorError, OSError) as error:
        raise CollectionError([f"{shown}: {getattr(error, 'strerror', None) or error}"]) from error
    if found:
        raise CollectionError([f"{shown}: {plain(fault)}" for fault in found])
    digests = [[module, store.array_digest(inputs[module])] for module in collection.modules]
    return Activations(inputs, store.digest(digests))


def faults(path: Path | None, collection: Collection) -> list[str]:
    """Return why `read` refuses a file; nothing of none."""
    try:
        if path is not None:
            read(path, collection)
    except CollectionError as error:
        return error.findings
    return []


def _inputs(tensors: dict[str, PySafeSlice], collection: Collection) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return inputs by module, and what is wrong with them."""
    downs = zip(collection.modules, collection.layers[::2], strict=True)  # a module's up follows its down
    keys_of = _keys_of(tensors, collection)
    if not keys_of:
        first = ", ".join(list(tensors)[:3]) or "none"
        return {}, [f"has inputs of no module of these LoRAs, such as {collection.modules[0]}; its first keys are "
                    f"{first}. {RECORD}."]  # fmt: skip
    inputs, found = {}, []
    for module, down in downs:
        wrong = list(_faults(module, keys_of[module], tensors, down.shape[1]))
        if not wrong:
            inputs[module], wrong = _rows(keys_of[module][0], tensors)
        found += wrong
    return inputs, found


def _keys_of(tensors: dict[str, PySafeSlice], collection: Collection) -> defaultdict[str, list[str]]:
    """Return the keys that stand for each module of a collection; others are left alone."""
    modules, keys_of = set(collection.modules), defaultdict(list)
    for key in tensors:
        module = key if key in modules else canonical_module(key)
        if module in modules:
            keys_of[module].append(key)
    return keys_of


def _faults(module: str, keys: list[str], tensors: dict[str, PySafeSlice], width: int) -> Iterator[str]:
    """Yield what the header shows to be wrong with the inputs of a module."""
    if not keys:
        yield f"has no inputs of {module}. {RECORD}."
        return
    if len(keys) > 1:
        yield f"has inputs of {module} more than once: {', '.join(keys)}. Keep one."
        return
    (key,) = keys
    shape, dtype = list(tensors[key].get_shape()), tensors[key].get_dtype()
    if len(shape) != 2 or shape[1] != width:
        yield f"{key} has shape {shape}, and this module of the LoRAs reads inputs of {width}: [n, {width}]. {RECORD}."
    elif shape[0] < SKETCH:
        yield f"{key} has {shape[0]} inputs, and {SKETCH} are needed. Record more."
    if dtype not in DTYPES:
        yield f"{key} is of {dtype}. Give one of {', '.join(DTYPES)}."


def _rows(key: str, tensors: dict[str, PySafeSlice]) -> tuple[np.ndarray, list[str]]:
    """Return the 8 rows that are read, float32[8, in], and what is wrong with them."""
    last = tensors[key].get_shape()[0] - 1
    places = [i * last // (SKETCH - 1) for i in range(SKETCH)]
    rows = np.concatenate([tensors[key][place : place + 1].float().numpy() for place in places])
    bad = [place for place, row in zip(places, rows, strict=True) if not np.isfinite(row).all()]
    if bad:
        fault = f"NaN, infinity or values beyond float32 in input {bad[0]}, which is read"
    elif not rows.any():
        fault = f"the {SKETCH} inputs that are read are 0, which no update changes"
    else:
        return rows, []
    return rows, [f"{key}: {fault}. Record them again."]
