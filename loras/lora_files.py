"""One LoRA file: its layers in the network's order, its weights, and what is wrong with it, in words.

A LoRA writes the update of a weight matrix as a product of two factors: ``down`` (A), float[rank, in], and ``up`` (B),
float[out, rank]. One network has one set of layers whatever wrote the file (see keys.py); a layer is shown under the
name that it has in the file. A header is parsed once, and the weights are read with what parsing found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from loras.blocks import attention_of, blocks_of, projection_of
from loras.keys import SCALE, LoraFileError, canonical_module, depth_key, ignored_as, parse_key

MAX_HEADER_BYTES = 25_000_000  # the library allows 100 MB; a hostile header of that size took it 9 seconds and 1.4 GB
MAX_TENSORS_BYTES = 5_000_000  # of a header less its metadata: some 30,000 tensors
MAX_KEY_LENGTH = 1000
BYTES_OF_TYPE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
FLOAT_TYPES = tuple(BYTES_OF_TYPE)
FLOAT32_MAX = float(np.finfo(np.float32).max)
INTEGER_TYPES = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")  # of an alpha


class NotFiniteError(LoraFileError):
    """Weights that are NaN or infinite."""


@dataclass(frozen=True)
class Layer:
    """One matrix of a LoRA: the down or the up factor of a module.

    ``name`` is the key in the file, ``module`` the canonical module, ``role`` "down" or "up"; ``shape`` (rows, cols)
    with a convolution's kernel folded into the columns; ``dtype`` as safetensors writes it; ``block`` the name of its
    block (see blocks.py), "" where it is in none.
    """

    name: str
    module: str
    role: str
    shape: tuple[int, int]
    dtype: str
    block: str = ""

    @property
    def projection(self) -> str:
        """The function of its module in the block, such as "q"; "" where the name does not say."""
        return projection_of(self.module)

    @property
    def attention(self) -> str:
        """The attention that its module is of, such as "attn2"; "" for none."""
        return attention_of(self.module)

    @property
    def rank(self) -> int:
        """The side that the two factors of a module share."""
        return self.shape[0] if self.role == "down" else self.shape[1]

    @property
    def free_side(self) -> int:
        """The other side, which the base model fixes: in for down, out for up."""
        return self.shape[1] if self.role == "down" else self.shape[0]


@dataclass(frozen=True, eq=False)  # compared by identity: equal layouts are mostly one object
class Layout:
    """Layers that a header promises, in the network's order, the key of each module's alpha, and what is ignored."""

    layers: tuple[Layer, ...]
    alphas: dict[str, str] = field(default_factory=dict)
    ignored: Counter = field(default_factory=Counter)

    @property
    def modules(self) -> list[str]:
        """Canonical ids of the modules, in the network's order; each has a down and an up."""
        return [layer.module for layer in self.layers if layer.role == "down"]

    @property
    def columns(self) -> tuple[slice, ...]:
        """The columns of each layer in the flattened weights."""
        ends = accumulate((prod(layer.shape) for layer in self.layers), initial=0)
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @cached_property
    def width(self) -> int:
        """The number of weights."""
        return sum(prod(layer.shape) for layer in self.layers)


def by_layout(layouts: Iterable[Layout]) -> list[list[int]]:
    """Return the positions of each distinct layout; equal ones are mostly one object, so there are few."""
    positions = defaultdict(list)
    for position, layout in enumerate(layouts):
        positions[id(layout)].append(position)
    return list(positions.values())


def packed_layout(layouts: Sequence[Layout]) -> Layout:
    """Return the layout of weights that are packed to one width: each layer is padded to its largest rank.

    The layouts differ in nothing but ranks. Where these are equal too, the first layout is returned itself.
    """
    first = layouts[0]
    layers_of_files = list(zip(*(layout.layers for layout in layouts), strict=True))
    if all(layer.shape == layers[0].shape for layers in layers_of_files for layer in layers):
        return first
    padded = []
    for layers in layers_of_files:
        rank, side = max(layer.rank for layer in layers), layers[0].free_side
        padded.append(replace(layers[0], shape=(rank, side) if layers[0].role == "down" else (side, rank)))
    return Layout(tuple(padded))


# ----------------------------------------------------------------------------------------------------------------------
# Headers
# ----------------------------------------------------------------------------------------------------------------------


METADATA, ADAPTER_METADATA = "__metadata__", "lora_adapter_metadata"
# Fields of the metadata that may state a scale; of several the first counts. Kohya's stand beside alpha tensors.
ALPHA_FIELDS = ("ss_network_alpha", "lora_alpha", "alpha")
RANK_FIELDS = ("ss_network_dim", "lora_rank", "rank", "r")
_accepted: set[tuple[bytes, int]] = set()  # digests of headers that the library has accepted, with the file's size
# What parsing raises where the contents are not what they should be.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def read_header(path: Path | str) -> bytes:
    """Read the JSON header of a safetensors file and check it against the file's size; no tensor is read.

    The size of a header is bounded before it is read.

    Raises:
        LoraFileError: The file is something else, or incomplete.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise LoraFileError("a pipe or a device, not a file. Remove it.")
        size = status.st_size
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise LoraFileError("a Git LFS pointer, not weights. Fetch the weights with `git lfs pull`.")
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise LoraFileError("a web page saved as weights. Download the file itself.")
        if start.startswith(b"PK\x03\x04"):
            raise LoraFileError("a pickle checkpoint: never loaded. Convert it to safetensors.")
        if size < 8:
            raise LoraFileError(f"incomplete download: has {size} bytes, a header alone needs 8. Download it again.")
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES and re.match(rb"\x80[\x02-\x05]", start):
            raise LoraFileError("a pickle checkpoint: never loaded. Convert it to safetensors.")
        if length > MAX_HEADER_BYTES:
            raise LoraFileError(f"not a safetensors file: its header would be {length} bytes. Download it again.")
        if 8 + length > size:
            raise _incomplete(size, 8 + length)
        header = start[8 : 8 + length]
        header += file.read(length - len(header))
    known = (hashlib.sha256(header).digest(), size)
    if known not in _accepted:
        _check_header(path, header, size)
        if len(_accepted) >= 2**12:  # files of one collection mostly share their header to the byte
            _accepted.clear()
        _accepted.add(known)
    return header


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file, also a pipe that nobody may ever write to, without waiting."""
    return os.open(path, flags | os.O_NONBLOCK)


def _incomplete(size: int, promised: int) -> LoraFileError:
    return LoraFileError(f"incomplete download: has {size} bytes, header promises {promised}. Download it again.")


def _check_header(path: Path | str, header: bytes, size: int) -> None:
    """Refuse a header that the library refuses; it checks that the tensors tile the data exactly."""
    try:
        with safe_open(path, "np"):
            return
    except (SafetensorError, ValueError) as error:
        fault = error
    try:
        entries = json.loads(header)
        data = max((entry["data_offsets"][1] for key, entry in entries.items() if key != METADATA), default=0)
        short = isinstance(data, int) and size < 8 + len(header) + data < 2**63
    except UNREADABLE:
        short = False
    if short:
        raise _incomplete(size, 8 + len(header) + data) from fault
    raise LoraFileError(f"not a readable safetensors file ({fault}). Download it again.") from fault


class _Run(NamedTuple):
    """Weights of one type that lie in the data as in the layout: first byte, first column and end in the flat array."""

    dtype: str
    byte: int
    start: int
    stop: int


class _Factor(NamedTuple):
    """A tensor of a LoCon in Tucker form."""

    dtype: str
    byte: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Places:
    """A layout, and the places of its numbers in the data of a file.

    ``alphas`` are (module, type, first byte); ``cores`` a down, a mid and the columns of what they multiply to.
    """

    layout: Layout
    runs: tuple[_Run, ...]
    alphas: tuple[tuple[str, str, int], ...]
    cores: tuple[tuple[_Factor, _Factor, int, int], ...]


@dataclass(frozen=True, slots=True)
class Header:
    """The parsed header of a file: places, which files of equal tensors share, and what is its own.

    ``data_start`` is the byte of the file at which its data begin, ``digest`` stands for the bytes of the header.
    ``adapter_configs`` are what ``lora_adapter_metadata`` says of the adapter of each component, "" for none.
    """

    places: Places
    data_start: int
    digest: bytes
    adapter_configs: dict[str, dict] = field(default_factory=dict)
    field_names: tuple[str, ...] = ()
    field_values: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """The layers that the header promises; equal layouts are mostly one object."""
        return self.places.layout

    @property
    def fields(self) -> dict[str, str]:
        """The short fields of the header's metadata."""
        return dict(zip(self.field_names, self.field_values, strict=True))

    def keeping(self, modules: frozenset[str]) -> Header:
        """Return the header with the layers of only these canonical modules, the others are not read."""
        return replace(self, places=_kept_places(self.places, modules))


def parse_header(header: bytes) -> Header:
    """Parse a safetensors header: layers, alphas, ignored tensors, where each lies, and the metadata of the writer.

    Places are mostly one object for files of equal tensors, layouts also where the order of keys differs.

    Raises:
        LoraFileError: No LoRA pair, a missing partner, ranks that differ, two adapters, a family that is refused, or
            metadata that cannot be read.
    """
    tensors, metadata = _split(header)
    places = _parse(tensors)
    configs = _adapter_configs(metadata.pop(ADAPTER_METADATA)) if ADAPTER_METADATA in metadata else _NO_CONFIGS
    short = (name for name, value in metadata.items() if len(value) <= MAX_FIELD_LENGTH and value.isprintable())
    names = _kept_names(tuple(sorted(short)))  # safetensors writes them in any order
    values = tuple(sys.intern(metadata[name]) for name in names)
    return Header(places, 8 + len(header), hashlib.sha256(header).digest(), configs, names, values)


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    """Return an object of a header; refuse a key that stands twice, as readers differ about which one counts."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        double, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise LoraFileError(f"two tensors have the key {double}. Keep one.")
    return entries


def _split(header: bytes) -> tuple[str, dict[str, str]]:
    """Return the header without ``__metadata__``, and that.

    Writers mostly put it first, and kohya fills it differently for each file. Where it stands elsewhere, it is left in.
    """
    text = header.decode()
    if match := _METADATA.match(text):
        tensors, metadata = "{" + text[match.end() :], _readable(METADATA, match[1])
    else:
        elsewhere = '"__metadata__"' in text and len(text) <= MAX_TENSORS_BYTES
        tensors, metadata = text, _readable("header", text).get(METADATA) if elsewhere else {}
    return tensors, {name: value for name, value in (metadata or {}).items() if isinstance(value, str)}


def _readable(name: str, text: str) -> dict | None:
    try:
        return json.loads(text)
    except UNREADABLE as error:
        raise LoraFileError(f"its {name} is not readable as JSON ({error}). Mend or remove it.") from error


# Names and values are texts, as the library has checked; nothing is matched twice, so time is linear in the length.
_METADATA = re.compile(
    r"""\{\s*"__metadata__"\s*:\s*(null|\{(?:[^"{}]++|"(?:[^"\\]++|\\.)*+")*+\})[\s,]*+""", re.DOTALL
)
# Trainers write some hundred fields; a longer text is a list, or prose.
MAX_FIELDS, MAX_FIELD_LENGTH, MAX_NAME_LENGTH = 500, 200, 100
MAX_CONFIG_LENGTH = 2**20
# What is kept of PEFT's configuration of an adapter, which diffusers writes into the header.
CONFIG_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights")
_NO_CONFIGS: dict[str, dict] = {}


@lru_cache(maxsize=2**8)
def _kept_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of fields that may be of use, of no more than any trainer writes."""
    kept = [name for name in names if name.isprintable() and len(name) <= MAX_NAME_LENGTH]
    stating = [name for name in kept[MAX_FIELDS:] if name in (*ALPHA_FIELDS, *RANK_FIELDS)]
    return tuple(map(sys.intern, kept[:MAX_FIELDS] + stating))


def _adapter_configs(text: str) -> dict[str, dict]:
    """Return the configuration of each component's adapter, less what is not used: ``unet.r`` is r of ``unet``.

    Raises:
        LoraFileError: The text is no JSON object, or larger than any that belongs to a LoRA.
    """
    if len(text) > MAX_CONFIG_LENGTH:
        raise LoraFileError(f"its {ADAPTER_METADATA} has {len(text)} characters. Mend or remove it.")
    document = _readable(ADAPTER_METADATA, text)
    if not isinstance(document, dict):
        raise LoraFileError(f"its {ADAPTER_METADATA} holds no JSON object. Mend or remove it.")
    configs: dict[str, dict] = {}
    for key, value in document.items():
        component, _, name = key.rpartition(".")
        if name in CONFIG_FIELDS and value is not None:
            configs.setdefault(component, {})[name] = value
    try:
        return _shared_configs(json.dumps(configs))
    except UNREADABLE as error:
        raise LoraFileError(f"its {ADAPTER_METADATA} is not readable ({error}). Mend or remove it.") from error


_shared_configs = lru_cache(maxsize=2**8)(json.loads)  # writers list the rest, as target modules, in any order


@lru_cache(maxsize=64)
def _parse(header: str) -> Places:
    """Parse a header without metadata."""
    if len(header) > MAX_TENSORS_BYTES:
        raise LoraFileError(f"its header describes tensors in {len(header)} bytes, more than any LoRA has. Is it one?")
    entries = json.loads(header, object_pairs_hook=_without_doubles)
    entries.pop(METADATA, None)
    factors, alphas, ignored = _sort_keys(entries)
    if not factors:
        raise LoraFileError(f"no LoRA pair; the first keys are {', '.join(list(entries)[:3]) or 'none'}. Is it a LoRA?")
    mids = {module: key for (module, role), key in factors.items() if role == "mid"}
    modules = tuple(sorted({module for module, _ in factors}))
    block_of = dict(zip(modules, blocks_of(modules), strict=True))
    layers = {}
    for (module, role), key in factors.items():
        if role != "mid":
            shape = _matrix_shape(key, role, entries[key])
            layers[module, role] = _layer(key, module, role, shape, entries[key]["dtype"], block_of[module])
    for module, mid in mids.items():
        layers[module, "down"] = _with_mid(layers.get((module, "down")), module, mid, entries)
    _check_pairs(layers)
    ordered = sorted(layers.values(), key=lambda layer: depth_key(layer.module, layer.role))
    layout = _layout(tuple(ordered), tuple(sorted(alphas.items())), tuple(sorted(ignored.items())))
    return _places(layout, entries, mids)


def _sort_keys(entries: dict) -> tuple[dict[tuple[str, str], str], dict[str, str], Counter]:
    """Return the keys of factors by module and role, those of alphas by module, and how many are neither."""
    factors: dict[tuple[str, str], str] = {}
    alphas: dict[str, str] = {}
    ignored: Counter = Counter()
    adapters: dict[str, str] = {}
    for key, entry in entries.items():
        if len(key) > MAX_KEY_LENGTH:
            raise LoraFileError(f"a key of {len(key)} characters, {key}. Is it a LoRA?")
        if parsed := parse_key(key):
            if not key.isprintable():
                raise LoraFileError(f"the key {key!a} is not plain text. Rename it or leave the file out.")
            if parsed.adapter:
                adapters.setdefault(parsed.adapter, key)
            if len(adapters) > 1:
                raise LoraFileError(f"holds several adapters ({', '.join(adapters.values())}). Save one to a file.")
            first = factors.setdefault((parsed.module, parsed.role), key)
            if first != key:
                fault = f"two tensors are the {parsed.role} of module {parsed.module}: {first} and {key}"
                raise LoraFileError(f"{fault}. Keep one.")
        elif match := re.match(SCALE, key):
            _check_alpha(key, entry)
            module = canonical_module(match["m"])
            first = alphas.setdefault(sys.intern(module), sys.intern(key))
            if first != key:
                raise LoraFileError(f"two tensors are the alpha of module {module}: {first} and {key}. Keep one.")
        else:
            ignored[ignored_as(key)] += 1
    for module in alphas.keys() - {module for module, _ in factors}:
        ignored["*.alpha without its module"] += 1
        del alphas[module]
    return factors, alphas, ignored


def _check_alpha(key: str, entry: dict) -> None:
    if prod(entry["shape"]) != 1:
        raise LoraFileError(f"{key} has shape {entry['shape']}, not that of a number. Save alpha as one.")
    if entry["dtype"] not in FLOAT_TYPES + INTEGER_TYPES:
        raise LoraFileError(f"{key} is of type {entry['dtype']}. Save it as one of {', '.join(FLOAT_TYPES)}.")


# Of tens of thousands of files each layer, and mostly each layout and its places, are held once.
_layer = lru_cache(maxsize=2**16)(Layer)


@lru_cache(maxsize=2**10)
def _layout(layers: tuple[Layer, ...], alphas: tuple[tuple[str, str], ...], ignored: tuple) -> Layout:
    return Layout(layers, dict(alphas), Counter(dict(ignored)))


_shared_places = lru_cache(maxsize=2**10)(Places)


def _places(layout: Layout, entries: dict, mids: dict[str, str]) -> Places:
    """Find the numbers of a layout; neighbours in both data and layout are one run: keys are mostly sorted."""
    runs: list[_Run] = []
    cores = []
    for layer, columns in zip(layout.layers, layout.columns, strict=True):
        entry = entries[layer.name]
        if layer.role == "down" and layer.module in mids:
            cores.append((_factor(entry), _factor(entries[mids[layer.module]]), columns.start, columns.stop))
            continue
        _append_run(runs, _Run(layer.dtype, entry["data_offsets"][0], columns.start, columns.stop))
    alphas = [(module, entries[key]["dtype"], entries[key]["data_offsets"][0]) for module, key in layout.alphas.items()]
    return _shared_places(layout, tuple(runs), tuple(alphas), tuple(cores))


@lru_cache(maxsize=2**10)
def _kept_places(places: Places, modules: frozenset[str]) -> Places:
    """Return the places of only some modules; those of equal tensors stay one object."""
    layout = places.layout
    alphas = tuple((module, key) for module, key in sorted(layout.alphas.items()) if module in modules)
    layers = tuple(layer for layer in layout.layers if layer.module in modules)
    kept = _layout(layers, alphas, tuple(sorted(layout.ignored.items())))
    moved = {layer.name: columns for layer, columns in zip(kept.layers, kept.columns, strict=True)}
    runs: list[_Run] = []
    cores = []
    by_start = {start: (down, mid) for down, mid, start, _ in places.cores}
    starts = [run.start for run in places.runs]
    for layer, columns in zip(layout.layers, layout.columns, strict=True):
        if layer.name not in moved:
            continue
        target = moved[layer.name]
        if columns.start in by_start:
            cores.append((*by_start[columns.start], target.start, target.stop))
            continue
        run = places.runs[bisect_right(starts, columns.start) - 1]
        byte = run.byte + (columns.start - run.start) * BYTES_OF_TYPE[run.dtype]
        _append_run(runs, _Run(run.dtype, byte, target.start, target.stop))
    alpha_places = tuple(place for place in places.alphas if place[0] in modules)
    return _shared_places(kept, tuple(runs), alpha_places, tuple(cores))


def _append_run(runs: list[_Run], run: _Run) -> None:
    """Append a run; one that follows the last both in the data and in the layout becomes part of it."""
    if runs:
        last = runs[-1]
        end = last.byte + (last.stop - last.start) * BYTES_OF_TYPE[last.dtype]
        if (run.dtype, run.byte, run.start) == (last.dtype, end, last.stop):
            runs[-1] = last._replace(stop=run.stop)
            return
    runs.append(run)


def _factor(entry: dict) -> _Factor:
    return _Factor(entry["dtype"], entry["data_offsets"][0], tuple(entry["shape"]))


def _matrix_shape(key: str, role: str, entry: dict) -> tuple[int, int]:
    """Return rows and columns of a factor; a convolution's kernel is part of the columns."""
    shape = entry["shape"]
    if entry["dtype"] not in FLOAT_TYPES:
        raise LoraFileError(f"{key} is of type {entry['dtype']}. Save it as one of {', '.join(FLOAT_TYPES)}.")
    if len(shape) not in (2, 4) or prod(shape) == 0 or (len(shape) == 4 and role == "up" and shape[2:] != [1, 1]):
        raise LoraFileError(f"{key} has shape {shape}: neither a matrix nor a convolution's factor. Is it a LoRA?")
    return shape[0], prod(shape[1:])


def _with_mid(down: Layer | None, module: str, mid: str, entries: dict) -> Layer:
    """Return the down of a LoCon in Tucker form, multiplied by its mid: the kernel is the mid's.

    LyCORIS writes the update of a convolution as up·mid·down with a down [r, in, 1, 1] and a mid [r, r, kh, kw].
    """
    shape = entries[mid]["shape"]
    if entries[mid]["dtype"] not in FLOAT_TYPES:
        raise LoraFileError(f"{mid} is of type {entries[mid]['dtype']}. Save it as one of {', '.join(FLOAT_TYPES)}.")
    if down is None:
        raise LoraFileError(f"module {module} has a mid {shape} but no down. Save both factors.")
    thin = entries[down.name]["shape"]
    if len(shape) != 4 or prod(shape) == 0 or shape[:2] != [down.rank, down.rank] or prod(thin[2:]) != 1:
        raise LoraFileError(f"ranks differ in module {module}: down {thin}, mid {shape}. Save all factors of one LoRA.")
    return replace(down, shape=(down.rank, down.free_side * prod(shape[2:])))


def _check_pairs(layers: dict[tuple[str, str], Layer]) -> None:
    """Refuse a module that lacks a factor, or whose factors differ in rank."""
    for (module, role), layer in layers.items():
        other = "up" if role == "down" else "down"
        partner = layers.get((module, other))
        if partner is None:
            raise LoraFileError(f"module {module} has a {role} {list(layer.shape)} but no {other}. Save both factors.")
        if layer.rank != partner.rank:
            down, up = (layer, partner) if role == "down" else (partner, layer)
            shapes = f"down {list(down.shape)}, up {list(up.shape)}"
            raise LoraFileError(f"ranks differ in module {module}: {shapes}. Save both factors of one LoRA.")


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


def file_stat(path: Path | str) -> tuple[int, int, int, int]:
    """Return size, mtime and ctime in ns, and inode, by which an unchanged file is known.

    Archives unpack files with the mtimes that these had; the ctime is the file system's own.
    """
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def load_weights(data: bytes | np.ndarray, header: Header) -> tuple[np.ndarray, dict[str, float]]:
    """Return the flattened matrices of a file in the layout's order, and alpha by module.

    Args:
        data: The whole file, bytes or uint8[size].
        header: Its header, parsed before.

    Returns:
        Weights float32[W] (float64 on disk is rounded), and the alphas that the file holds.

    Raises:
        LoraFileError: The file has another header by now, or is shorter than it promises.
    """
    changed = "changed since it was indexed. Start again."
    length = int.from_bytes(bytes(data[:8]), "little")
    if 8 + length != header.data_start or hashlib.sha256(data[8 : header.data_start]).digest() != header.digest:
        raise LoraFileError(changed)
    try:
        return _weights(data, header), _alphas(data, header)
    except ValueError as error:  # there are not that many bytes
        raise LoraFileError(changed) from error


def _weights(data: bytes | np.ndarray, header: Header) -> np.ndarray:
    places = header.places
    weights = np.empty(places.layout.width, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are the caller's to find
        for run in places.runs:
            weights[run.start : run.stop] = _numbers(
                data, run.dtype, header.data_start + run.byte, run.stop - run.start
            )
        for down, mid, start, stop in places.cores:
            wide, core = (
                _numbers(data, factor.dtype, header.data_start + factor.byte, prod(factor.shape))
                .reshape(factor.shape)
                .astype(np.float64)
                for factor in (down, mid)
            )
            wide = wide.reshape(len(wide), -1)  # (r, in)
            weights[start:stop] = np.einsum("ijhw,jc->ichw", core, wide).ravel()
    return weights


def _alphas(data: bytes | np.ndarray, header: Header) -> dict[str, float]:
    places = ((module, dtype, header.data_start + byte) for module, dtype, byte in header.places.alphas)
    return {module: float(_numbers(data, dtype, byte, 1)[0]) for module, dtype, byte in places}


def read_alphas(path: Path | str, header: Header) -> dict[str, float]:
    """Read alpha by module, and nothing else of a file.

    Raises:
        LoraFileError: The file is shorter than it promises.
    """
    alphas = {}
    with open(path, "rb") as file:
        for module, dtype, byte in header.places.alphas:
            file.seek(header.data_start + byte)
            try:
                alphas[module] = float(_numbers(file.read(8), dtype, 0, 1)[0])
            except ValueError as error:
                raise LoraFileError("changed since it was indexed. Start again.") from error
    return alphas


def check_finite(weights: np.ndarray, layout: Layout) -> None:
    """Refuse NaN and infinity in flattened weights.

    Raises:
        NotFiniteError: There is one; the message says in how many layers.
    """
    if not np.isfinite(weights).all():
        named = zip(layout.layers, layout.columns, strict=True)
        bad = [layer.name for layer, columns in named if not np.isfinite(weights[columns]).all()]
        raise NotFiniteError(f"NaN or infinity in {len(bad)} tensors, first in {bad[0]}. Train again or leave it out.")


def _numbers(data: bytes | np.ndarray, dtype: str, start: int, count: int) -> np.ndarray:
    """Return ``count`` numbers of a safetensors type from a byte on; types that numpy lacks become float32."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2", count, start).astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOATS_OF_8_BITS:
        return _FLOATS_OF_8_BITS[dtype][np.frombuffer(data, np.uint8, count, start)]
    return np.frombuffer(data, f"<{dtype[0].lower()}{int(dtype[1:]) // 8}", count, start)


def _floats_of_8_bits() -> dict[str, np.ndarray]:
    """Return the number that each byte stands for, float32[256] for each type."""
    byte = np.arange(256, dtype=np.uint16)
    e5m2 = (byte << 8).view(np.float16).astype(np.float32)  # the upper half of a float16
    # Three bits of mantissa, an exponent that is 8 less than a float16's; no infinity, and one NaN of either sign.
    e4m3 = ((byte & 0x80) << 8 | (byte & 0x7F) << 7).view(np.float16).astype(np.float32) * 2**8
    e4m3[[0x7F, 0xFF]] = np.nan
    return {"F8_E5M2": e5m2, "F8_E4M3": e4m3}


_FLOATS_OF_8_BITS = _floats_of_8_bits()
