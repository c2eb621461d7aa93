"""One LoRA file: which layers it holds, in the network's order, and what is wrong with it, in words.

A LoRA writes the update of a weight matrix as a product of two factors: ``down`` (A), float[rank, in], and ``up`` (B),
float[out, rank]. Every trainer names them differently. Here each key is parsed into a canonical module and a role, so
that one network has one set of layers whatever wrote the file; a layer is shown under the name it has in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

MAX_HEADER_BYTES = 25_000_000  # of the 100 MB that the library allows, hostile ones took it 9 seconds and 1.4 GB
MAX_TENSORS_BYTES = 5_000_000  # of a header less its metadata: some 30,000 tensors
MAX_KEY_LENGTH = 1000
MAX_MESSAGE_LENGTH = 1000
FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
FLOAT32_MAX = float(np.finfo(np.float32).max)
INTEGER_TYPES = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")  # of an alpha

# Each pattern gives the module `m`, the role `r`, and where a file can hold several adapters, the adapter `a`.
KEY_FAMILIES = {
    "numbered": r"^lora\.(?P<r>down|up)\.weight\.(?P<m>\d+)$",
    "diffusers": r"^(?P<m>.+)\.lora\.(?P<r>down|up)\.weight$",
    "diffusers text encoder": r"^(?P<m>.+)\.lora_linear_layer\.(?P<r>down|up)\.weight$",
    "diffusers legacy": r"^(?P<m>.+?)(?:\.processor)?\.to_(?P<p>q|k|v|out)_lora\.(?P<r>down|up)\.weight$",
    "PEFT": r"^(?P<m>.+)\.lora_(?P<r>A|B)\.weight$",
    "PEFT with adapter name": r"^(?P<m>.+)\.lora_(?P<r>A|B)\.(?P<a>[^.]+)\.weight$",
    "PEFT bare": r"^(?P<m>.+)\.lora_(?P<r>A|B)$",
    "kohya": r"^(?P<m>.+)\.lora_(?P<r>down|up|mid)\.weight$",
    "XLabs": r"^(?P<m>.+\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<r>down|up)\.weight$",
    "cloneofsimo": r"^(?P<m>(?:unet|text_encoder):\d+):(?P<r>down|up)$",
}
SCALE = r"^(?P<m>.+)\.alpha$"
REFUSED_FAMILIES = {
    "a LoHa": r"\.hada_(w[12]_[ab]|t[12])$",
    "a LoKr": r"\.lokr_(w[12](_[ab])?|t[12])$",
    "an OFT": r"\.oft_blocks$",
    "a full-difference": r"\.(diff|diff_b)$",
    "a mangled kohya": r"^lora_(unet|te\d?)_.+_lora_(down|up)\.weight$",
}
IGNORED = {
    "*.dora_scale": r"\.dora_scale$",
    "*.lora_magnitude_vector": r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$",
    "*.lora_A.bias, *.lora_B.bias": r"\.lora_[AB]\.bias$",
    "embeddings <...>": r"^<.+>$",
    "*.modules_to_save.*": r"\.modules_to_save\.",
}


class LoraFileError(ValueError):
    """A file cannot be used; the message says what is wrong and what to do.

    Names in it come from files that anyone may have written: the message is one line of printable characters, and what
    is too long is cut in the middle.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(line) > MAX_MESSAGE_LENGTH:
            line = f"{line[: MAX_MESSAGE_LENGTH // 2]} ... {line[-MAX_MESSAGE_LENGTH // 2 :]}"
        super().__init__(line)


class NotFiniteError(LoraFileError):
    """Weights are NaN or infinite."""


@dataclass(frozen=True)
class Layer:
    """One matrix of a LoRA: the down or the up factor of a module.

    ``name`` is the key in the file, ``module`` the canonical module, ``role`` "down" or "up"; ``shape`` (rows, cols)
    with a convolution's kernel folded into the columns; ``dtype`` as safetensors writes it.
    """

    name: str
    module: str
    role: str
    shape: tuple[int, int]
    dtype: str

    @property
    def rank(self) -> int:
        """The side that the two factors of a module share."""
        return self.shape[0] if self.role == "down" else self.shape[1]

    @property
    def free_side(self) -> int:
        """The other side, which the base model fixes: in for down, out for up."""
        return self.shape[1] if self.role == "down" else self.shape[0]


@dataclass(frozen=True)
class Layout:
    """What a header promises: layers in the network's order, the key of each module's alpha, and what was ignored."""

    layers: tuple[Layer, ...]
    alphas: dict[str, str] = field(default_factory=dict)
    ignored: Counter = field(default_factory=Counter)

    @property
    def columns(self) -> tuple[slice, ...]:
        """Where each layer lies among the flattened weights."""
        ends = accumulate((prod(layer.shape) for layer in self.layers), initial=0)
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @cached_property
    def width(self) -> int:
        """Number of weights."""
        return sum(prod(layer.shape) for layer in self.layers)


def canonical_module(raw: str) -> str:
    """The one id of a module in every style of naming.

    Wrappers (``base_model.model.``, ``diffusion_model.``) are stripped, kohya's component prefixes spelled out,
    ``.processor`` dropped and dots (and cloneofsimo's colon) become underscores. The inverse is ambiguous.

    Example:
        >>> canonical_module("unet.mid_block.attentions.0.proj_in")
        'unet_mid_block_attentions_0_proj_in'
        >>> canonical_module("lora_unet_mid_block_attentions_0_proj_in")
        'unet_mid_block_attentions_0_proj_in'
    """
    while (stripped := raw.removeprefix("base_model.model.").removeprefix("diffusion_model.")) != raw:
        raw = stripped
    for kohya, component in (
        ("lora_unet_", "unet_"),
        ("lora_transformer_", "transformer_"),
        ("lora_te_", "text_encoder_"),
        ("lora_te1_", "text_encoder_"),
        ("lora_te2_", "text_encoder_2_"),
        ("lora_te3_", "text_encoder_3_"),
    ):
        if raw.startswith(kohya):
            raw = component + raw.removeprefix(kohya)
    return re.sub(r"\.processor(?=\.|$)", "", raw).replace(".", "_").replace(":", "_")


_WORD = re.compile(r"conv_in|conv_out|single_transformer_blocks|transformer_blocks|[^\W\d_]+|\d{1,18}")
# Words of one row stand in the row's order, wherever the alphabet would put them.
_ORDERED_WORDS = (
    ("conv_in", "down", "mid", "up", "conv_out"),
    ("transformer_blocks", "single_transformer_blocks"),
    ("q", "k", "v", "out"),
)
_RANK_OF_WORD = {word: (row[0], i) for row in _ORDERED_WORDS for i, word in enumerate(row)}


@lru_cache(maxsize=2**16)
def depth_key(module: str, role: str) -> tuple:
    """Sort key that puts layers in the network's order; a file's own order is alphabetical and means nothing.

    Natural sort of the canonical id, text encoders before unet or transformer; conv_in, down, mid, up, out;
    transformer_blocks before single_transformer_blocks; q, k, v, out; down before up.
    """
    parts = []
    for word in _WORD.findall(module):
        if word.isdecimal():
            parts.append((1, int(word), "", 0))  # numbers after words: text_encoder before text_encoder_2
        else:
            parts.append((0, 0, *_RANK_OF_WORD.get(word, (word, 0))))
    return (not module.startswith("text_encoder"), parts, module, role == "up")


@dataclass(frozen=True)
class _Key:
    """A parsed key: its module as the file spells it and as everyone does, its role, and the adapter it belongs to."""

    module: str
    role: str
    adapter: str


@lru_cache(maxsize=2**16)  # headers differ more than keys do
def parse_key(key: str) -> _Key | None:
    """Module, role and adapter of a weight's key; None for a key that is no LoRA weight.

    Raises:
        LoraFileError: The key belongs to a family that is refused.
    """
    for name, pattern in REFUSED_FAMILIES.items():
        if re.search(pattern, key):
            raise LoraFileError(f"{name} adapter ({key}), which cannot be read. Convert it or leave it out.")
    for name, pattern in KEY_FAMILIES.items():
        if match := re.match(pattern, key):
            parts = match.groupdict()
            module = parts["m"]
            if name == "diffusers legacy":
                module += ".to_out.0" if parts["p"] == "out" else f".to_{parts['p']}"
            role = {"A": "down", "B": "up"}.get(parts["r"], parts["r"])
            return _Key(canonical_module(module), role, parts.get("a") or "")
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Headers
# ----------------------------------------------------------------------------------------------------------------------


_checked: set[tuple[bytes, int]] = set()  # digests of headers that the library has accepted, with the file's size
# What parsing raises where the contents are not what they should be.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def read_header(path: Path | str) -> bytes:
    """The JSON header of a safetensors file, checked against the size of the file; no tensor is read.

    Its size is bounded before it is read.

    Raises:
        LoraFileError: The file is something else, or not all of it is here.
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
    seen = (hashlib.sha256(header).digest(), size)
    if seen not in _checked:
        _check_header(path, header, size)
        if len(_checked) >= 2**12:  # files of one collection mostly share their header to the byte
            _checked.clear()
        _checked.add(seen)
    return header


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a pipe at once, that nobody may ever write to."""
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
        data = max((entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"), default=0)
        short = isinstance(data, int) and size < 8 + len(header) + data < 2**63
    except _UNREADABLE:
        short = False
    if short:
        raise _incomplete(size, 8 + len(header) + data) from fault
    raise LoraFileError(f"not a readable safetensors file ({fault}). Download it again.") from fault


@dataclass(frozen=True)
class _Stored:
    """A parsed header: the layout, and where in the data its weights lie.

    ``runs`` are (type, first byte, columns of the flattened weights) of neighbouring tensors; ``alphas`` (module,
    type, first byte); ``cores`` the header's entries of a down and a mid, with the columns of what they multiply to.
    """

    layout: Layout
    runs: list[tuple[str, int, slice]]
    alphas: list[tuple[str, str, int]]
    cores: list[tuple[dict, dict, slice]]


def parse_layout(header: bytes) -> Layout:
    """Layers, alphas and ignored tensors that a safetensors header promises.

    Equal ones are mostly the same object, also where the headers differ in their metadata or in the order of keys.

    Raises:
        LoraFileError: No LoRA pair, a missing partner, ranks that differ, two adapters, or a family that is refused.
    """
    return _parse(_without_metadata(header)).layout


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    """An object of a header; JSON allows a key to stand twice, and then readers may differ about which one counts."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        double, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise LoraFileError(f"two tensors have the key {double}. Keep one.")
    return entries


def _without_metadata(header: bytes) -> str:
    """The header less ``__metadata__``, which writers put first and where kohya tells of each training at length."""
    text = header.decode()
    metadata = _METADATA.match(text)
    return "{" + text[metadata.end() :] if metadata else text


# Names and values are texts, as the library has made sure of; nothing is tried twice, so the time grows as the length.
_METADATA = re.compile(
    r"""\{\s*"__metadata__"\s*:\s*(?:null|\{(?:[^"{}]++|"(?:[^"\\]++|\\.)*+")*+\})[\s,]*+""", re.DOTALL
)


@lru_cache(maxsize=64)
def _parse(header: str) -> _Stored:
    """What `parse_layout` and `load_weights` need of a header without metadata."""
    if len(header) > MAX_TENSORS_BYTES:
        raise LoraFileError(f"its header describes tensors in {len(header)} bytes, more than any LoRA has. Is it one?")
    entries = json.loads(header, object_pairs_hook=_without_doubles)
    entries.pop("__metadata__", None)
    factors, alphas, ignored = _sorted_out(entries)
    if not factors:
        raise LoraFileError(f"no LoRA pair; the first keys are {', '.join(list(entries)[:3]) or 'none'}. Is it a LoRA?")
    mids = {module: key for (module, role), key in factors.items() if role == "mid"}
    layers = {}
    for (module, role), key in factors.items():
        if role != "mid":
            shape = _matrix_shape(key, role, entries[key])
            layers[module, role] = _layer(key, module, role, shape, entries[key]["dtype"])
    for module, mid in mids.items():
        layers[module, "down"] = _with_mid(layers.get((module, "down")), module, mid, entries)
    _check_pairs(layers)
    ordered = sorted(layers.values(), key=lambda layer: depth_key(layer.module, layer.role))
    layout = _layout(tuple(ordered), tuple(sorted(alphas.items())), tuple(sorted(ignored.items())))
    places = [(entries[key], module) for module, key in layout.alphas.items()]
    stored = [(module, entry["dtype"], entry["data_offsets"][0]) for entry, module in places]
    cores = [
        (entries[layer.name], entries[mids[layer.module]], columns)
        for layer, columns in zip(layout.layers, layout.columns, strict=True)
        if layer.role == "down" and layer.module in mids
    ]
    return _Stored(layout, _runs(layout, entries, mids), stored, cores)


def _sorted_out(entries: dict) -> tuple[dict[tuple[str, str], str], dict[str, str], Counter]:
    """Keys of a header: of factors by module and role, of alphas by module; and how many are neither."""
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
                told = f"two tensors are the {parsed.role} of module {parsed.module}: {first} and {key}"
                raise LoraFileError(f"{told}. Keep one.")
        elif match := re.match(SCALE, key):
            _check_alpha(key, entry)
            module = canonical_module(match["m"])
            first = alphas.setdefault(sys.intern(module), sys.intern(key))
            if first != key:
                raise LoraFileError(f"two tensors are the alpha of module {module}: {first} and {key}. Keep one.")
        else:
            ignored[_ignored_as(key)] += 1
    for module in alphas.keys() - {module for module, _ in factors}:
        ignored["*.alpha without its module"] += 1
        del alphas[module]
    return factors, alphas, ignored


def _check_alpha(key: str, entry: dict) -> None:
    if prod(entry["shape"]) != 1:
        raise LoraFileError(f"{key} has shape {entry['shape']}, not that of a number. Save alpha as one.")
    if entry["dtype"] not in FLOAT_TYPES + INTEGER_TYPES:
        raise LoraFileError(f"{key} is of type {entry['dtype']}. Save it as one of {', '.join(FLOAT_TYPES)}.")


# Of tens of thousands of files each layer, and mostly each layout, is held once.
_layer = lru_cache(maxsize=2**16)(Layer)


@lru_cache(maxsize=2**10)
def _layout(layers: tuple[Layer, ...], alphas: tuple[tuple[str, str], ...], ignored: tuple) -> Layout:
    return Layout(layers, dict(alphas), Counter(dict(ignored)))


def _runs(layout: Layout, entries: dict, mids: dict[str, str]) -> list[tuple[str, int, slice]]:
    """Runs of weights that lie in the data as they do in the layout; keys are mostly sorted, so there are few."""
    runs: list[tuple[str, int, slice]] = []
    end = None
    for layer, columns in zip(layout.layers, layout.columns, strict=True):
        if layer.role == "down" and layer.module in mids:
            end = None
            continue
        start, stop = entries[layer.name]["data_offsets"]
        if start == end and layer.dtype == runs[-1][0]:
            _, start, before = runs.pop()
            columns = slice(before.start, columns.stop)
        runs.append((layer.dtype, start, columns))
        end = stop
    return runs


def _matrix_shape(key: str, role: str, entry: dict) -> tuple[int, int]:
    """Rows and columns of a factor; a convolution's kernel is part of the columns."""
    shape = entry["shape"]
    if entry["dtype"] not in FLOAT_TYPES:
        raise LoraFileError(f"{key} is of type {entry['dtype']}. Save it as one of {', '.join(FLOAT_TYPES)}.")
    if len(shape) not in (2, 4) or prod(shape) == 0 or (len(shape) == 4 and role == "up" and shape[2:] != [1, 1]):
        raise LoraFileError(f"{key} has shape {shape}: neither a matrix nor a convolution's factor. Is it a LoRA?")
    return shape[0], prod(shape[1:])


def _with_mid(down: Layer | None, module: str, mid: str, entries: dict) -> Layer:
    """The down of a LoCon in Tucker form, once multiplied by its mid: the kernel is the mid's.

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
    return _layer(down.name, module, "down", (down.rank, down.free_side * prod(shape[2:])), down.dtype)


def _ignored_as(key: str) -> str:
    """The pattern under which a tensor that is no LoRA weight is counted."""
    for name, pattern in IGNORED.items():
        if re.search(pattern, key):
            return name
    if "lora" in key.lower():
        raise LoraFileError(f"{key} names a LoRA in an unknown way. Rename its keys or leave the file out.")
    return "tensors that are no LoRA"


def _check_pairs(layers: dict[tuple[str, str], Layer]) -> None:
    """Every module has both factors, and they agree on the rank."""
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


def load_weights(data: bytes | np.ndarray, layout: Layout) -> tuple[np.ndarray, dict[str, float]]:
    """The flattened matrices of a file in the layout's order, and alpha by module.

    Args:
        data: The whole file, bytes or uint8[size].
        layout: What its header promises.

    Returns:
        Weights float32[layout.width] (float64 on disk is rounded), and the alphas that the file holds.

    Raises:
        LoraFileError: The header promises another layout.
    """
    end = 8 + int.from_bytes(bytes(data[:8]), "little")
    try:
        stored = _parse(_without_metadata(bytes(data[8:end])))
        if stored.layout != layout:
            raise ValueError("another layout")
        return _weights(data, end, stored), _alphas(data, end, stored)
    except _UNREADABLE as error:
        raise LoraFileError("changed since it was indexed. Start again.") from error


def _weights(data: bytes | np.ndarray, end: int, stored: _Stored) -> np.ndarray:
    """The flattened matrices; the header ends at byte ``end``."""
    weights = np.empty(stored.layout.width, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are the caller's to find
        for dtype, start, columns in stored.runs:
            weights[columns] = _numbers(data, dtype, end + start, columns.stop - columns.start)
        for down, mid, columns in stored.cores:
            wide, core = (
                _numbers(data, entry["dtype"], end + entry["data_offsets"][0], prod(entry["shape"]))
                .reshape(entry["shape"])
                .astype(np.float64)
                for entry in (down, mid)
            )
            wide = wide.reshape(len(wide), -1)  # (r, in)
            weights[columns] = np.einsum("ijhw,jc->ichw", core, wide).ravel()
    return weights


def _alphas(data: bytes | np.ndarray, end: int, stored: _Stored) -> dict[str, float]:
    return {module: float(_numbers(data, dtype, end + start, 1)[0]) for module, dtype, start in stored.alphas}


def check_finite(weights: np.ndarray, layout: Layout) -> None:
    """Refuse NaN and infinity in flattened weights.

    Raises:
        LoraFileError: There is one; the message says in how many layers.
    """
    if not np.isfinite(weights).all():
        named = zip(layout.layers, layout.columns, strict=True)
        bad = [layer.name for layer, columns in named if not np.isfinite(weights[columns]).all()]
        raise NotFiniteError(f"NaN or infinity in {len(bad)} tensors, first in {bad[0]}. Train again or leave it out.")


def _numbers(data: bytes | np.ndarray, dtype: str, start: int, count: int) -> np.ndarray:
    """``count`` numbers of a safetensors type from a byte on; what numpy lacks, as float32."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2", count, start).astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOATS_OF_8_BITS:
        return _FLOATS_OF_8_BITS[dtype][np.frombuffer(data, np.uint8, count, start)]
    return np.frombuffer(data, f"<{dtype[0].lower()}{int(dtype[1:]) // 8}", count, start)


def _floats_of_8_bits() -> dict[str, np.ndarray]:
    """The number that each byte stands for, float32[256] of each type."""
    byte = np.arange(256, dtype=np.uint16)
    e5m2 = (byte << 8).view(np.float16).astype(np.float32)  # the upper half of a float16
    # Three bits of mantissa, an exponent that is 8 less than a float16's; no infinity, and one NaN of either sign.
    e4m3 = ((byte & 0x80) << 8 | (byte & 0x7F) << 7).view(np.float16).astype(np.float32) * 2**8
    e4m3[[0x7F, 0xFF]] = np.nan
    return {"F8_E5M2": e5m2, "F8_E4M3": e4m3}


_FLOATS_OF_8_BITS = _floats_of_8_bits()


def update_scales(layout: Layout, alphas: dict[str, float], adapter_config: dict | None) -> dict[str, float]:
    """The factor s of each module's update s·up·down.

    kohya stores alpha in the file, s = alpha / rank. PEFT stores ``lora_alpha`` in ``adapter_config.json``,
    s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``; ``alpha_pattern`` and ``rank_pattern`` override
    single modules. The rank is the file's own; a configuration that names another belongs to another file. A missing or
    zero alpha means s = 1.

    Raises:
        LoraFileError: An alpha is no finite number, a pattern no regular expression, or a rank not the file's.
    """
    config = adapter_config or {}
    if not alphas and not config:
        return {layer.module: 1.0 for layer in layout.layers if layer.role == "down"}
    scales = {}
    for layer in layout.layers:
        if layer.role == "up":
            continue
        from_file = layer.module in alphas
        alpha = alphas[layer.module] if from_file else _configured_alpha(config, layer)
        if not abs(alpha) <= FLOAT32_MAX:  # not >, which NaN would pass
            raise LoraFileError(f"alpha of module {layer.module} is {alpha}. Mend it or leave the file out.")
        root = 0.5 if config.get("use_rslora") and not from_file else 1.0
        scales[layer.module] = alpha / layer.rank**root if alpha else 1.0
    return scales


def _configured_alpha(config: dict, layer: Layer) -> float:
    """The alpha that ``adapter_config.json`` gives a module, 0 if none."""
    path = re.split(r"\.lora[._]", layer.name)[0].removeprefix("base_model.model.")
    try:
        alpha = _configured(config, "alpha_pattern", "lora_alpha", path)
        rank = _configured(config, "rank_pattern", "r", path)
    except (*_UNREADABLE, OverflowError, re.error) as error:
        told = f"adapter_config.json has an unusable alpha or rank ({error})"
        raise LoraFileError(f"{told}. Mend or remove it.") from error
    if rank and rank != layer.rank:
        told = f"adapter_config.json says rank {rank:g} for {path}, where the file has {layer.rank}"
        raise LoraFileError(f"{told}. Mend or remove it.")
    return alpha


def _configured(config: dict, patterns: str, default: str, path: str) -> float:
    """The value of the first pattern that names the end of a module's path, or else the default: PEFT's rule."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return float(config.get(default) or 0)
