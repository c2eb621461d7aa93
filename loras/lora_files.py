"""Weights of one LoRA file: read by what its header promises, no more than that, and what is wrong with them.

A LoRA writes the update of a weight matrix as a product of two factors: ``down`` (A), float[rank, in], and ``up`` (B),
float[out, rank]. One network has one set of layers whatever wrote the file (see keys.py); a layer is shown under the
name that it has in the file. A header is parsed once (headers.py), and of a file only those bytes are read that its
pairs need: nothing is mapped, and what is truncated or replaced meanwhile is an error in words.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loras.headers import (
    ADAPTER_METADATA,
    CONFIG,
    MAX_CONFIG_LENGTH,
    MAX_FIELDS,
    MAX_HEADER_BYTES,
    MAX_TENSORS_BYTES,
    Header,
    open_file,
    parse_header,
    read_header,
)
from loras.keys import LoraFileError
from loras.layouts import Layer, Layout, by_layout, packed_layout
from loras.products import BYTES_OF_TYPE, FLOAT_TYPES, IDENTITY, PRODUCTS, Factor, Places

__all__ = [
    "ADAPTER_METADATA", "CONFIG", "FLOAT_TYPES", "MAX_CONFIG_LENGTH", "MAX_FIELDS", "MAX_HEADER_BYTES",
    "MAX_TENSORS_BYTES", "Contents", "Header", "Layer", "Layout",
    "LoraFileError", "NotFiniteError", "Places", "by_layout", "check_finite", "file_stat",
    "packed_layout", "parse_header", "read_alphas", "read_header", "read_weights",
]  # fmt: skip

CHUNK_NUMBERS = 2**22  # read at once: 16 MiB of float32
_CHANGED = "changed since it was indexed. Start again."

Read = Callable[[int, int], bytes]  # from first byte and size to bytes, fewer where the file ends


class NotFiniteError(LoraFileError):
    """Weights that are NaN or infinite."""


class Contents(NamedTuple):
    """The contents of a file: weights float32[W] in the layout's order, alpha by module, and a digest of what was read.

    The digest is of the header and of the bytes that the pairs need, which is all that any result can depend on.
    """

    weights: np.ndarray
    alphas: dict[str, float]
    digest: str


def file_stat(path: Path | str) -> tuple[int, int, int, int]:
    """Return size, mtime and ctime in ns, and inode, by which an unchanged file is known.

    Archives unpack files with the mtimes that these had; the ctime is the file system's own.
    """
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def read_weights(path: Path | str, header: Header) -> Contents:
    """Read the weights of a file, and nothing that lies beside its pairs.

    Raises:
        LoraFileError: The file has another header by now, or is shorter than it promises, or no file any more.
        OSError: It cannot be read.
    """
    with open_file(path) as file:
        return _contents(partial(_read_at, file.fileno()), header)


def _read_at(descriptor: int, start: int, size: int) -> bytes:
    parts = []
    while size and (part := os.pread(descriptor, size, start)):
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _contents(read: Read, header: Header) -> Contents:
    """Read what the pairs of a file need, by a function that reads bytes of it."""
    first = read(0, header.data_start)
    if len(first) != header.data_start or hashlib.sha256(first[8:]).digest() != header.digest:
        raise LoraFileError(_CHANGED)
    if 8 + int.from_bytes(first[:8], "little") != header.data_start:
        raise LoraFileError(_CHANGED)
    digest = hashlib.sha256(first)

    def bytes_of(byte: int, size: int) -> bytes:
        data = read(header.data_start + byte, size)
        if len(data) != size:
            raise LoraFileError(_CHANGED)
        digest.update(f"{byte} {size} ".encode())
        digest.update(data)
        return data

    weights = _weights(bytes_of, header.places)
    return Contents(weights, _alphas(bytes_of, header.places), digest.hexdigest())


def _weights(bytes_of: Read, places: Places) -> np.ndarray:
    weights = np.empty(places.layout.width, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are the caller's to find
        for run in places.runs:
            for start in range(run.start, run.stop, CHUNK_NUMBERS):
                stop, size = min(start + CHUNK_NUMBERS, run.stop), BYTES_OF_TYPE[run.dtype]
                data = bytes_of(run.byte + (start - run.start) * size, (stop - start) * size)
                weights[start:stop] = _numbers(data, run.dtype)
        last: dict[Factor, np.ndarray] = {}
        # Experts, which share a tensor, are neighbours by its place in the file: it is read once.
        for product in sorted(places.products, key=lambda product: [factor.byte for factor in product.factors]):
            tensors = [_tensor(bytes_of, factor, last) for factor in product.factors]
            last = dict(zip(product.factors, tensors, strict=True))
            weights[product.start : product.stop] = PRODUCTS[product.kind](*tensors, *product.arguments).ravel()
    return weights


def _tensor(bytes_of: Read, factor: Factor, last: dict[Factor, np.ndarray]) -> np.ndarray:
    """Return a tensor in its shape, as it was read last or read now."""
    if factor in last:
        return last[factor]
    if factor.dtype == IDENTITY:
        return np.eye(*factor.shape)
    count = int(np.prod(factor.shape, dtype=np.int64))
    tensor = _numbers(bytes_of(factor.byte, count * BYTES_OF_TYPE[factor.dtype]), factor.dtype).reshape(factor.shape)
    return tensor.T if factor.transposed else tensor


def _alphas(bytes_of: Read, places: Places) -> dict[str, float]:
    return {module: float(_numbers(bytes_of(byte, _size(dtype)), dtype)[0]) for module, dtype, byte in places.alphas}


def _size(dtype: str) -> int:
    """Return the bytes of a number, of a float or of an integer."""
    return BYTES_OF_TYPE.get(dtype) or int(dtype[1:]) // 8


def read_alphas(path: Path | str, header: Header) -> dict[str, float]:
    """Read alpha by module, and nothing else of a file.

    Raises:
        LoraFileError: The file is shorter than it promises.
    """

    def bytes_of(byte: int, size: int) -> bytes:
        data = _read_at(file.fileno(), header.data_start + byte, size)
        if len(data) != size:
            raise LoraFileError(_CHANGED)
        return data

    with open_file(path) as file:
        return _alphas(bytes_of, header.places)


def check_finite(weights: np.ndarray, layout: Layout) -> None:
    """Refuse NaN and infinity in flattened weights.

    Raises:
        NotFiniteError: There is one; the message says in how many layers.
    """
    if not np.isfinite(weights).all():
        named = zip(layout.layers, layout.columns, strict=True)
        bad = [layer.name for layer, columns in named if not np.isfinite(weights[columns]).all()]
        raise NotFiniteError(f"NaN or infinity in {len(bad)} tensors, first in {bad[0]}. Train again or leave it out.")


def _numbers(data: bytes, dtype: str) -> np.ndarray:
    """Return the numbers of a safetensors type that bytes stand for; types that numpy lacks become float32."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOATS_OF_8_BITS:
        return _FLOATS_OF_8_BITS[dtype][np.frombuffer(data, np.uint8)]
    return np.frombuffer(data, f"<{dtype[0].lower()}{_size(dtype)}")


def _floats_of_8_bits() -> dict[str, np.ndarray]:
    """Return the number that each byte stands for, float32[256] for each type."""
    byte = np.arange(256, dtype=np.uint16)
    e5m2 = (byte << 8).view(np.float16).astype(np.float32)  # the upper half of a float16
    # Three bits of mantissa, an exponent that is 8 less than a float16's; no infinity, and one NaN of either sign.
    e4m3 = ((byte & 0x80) << 8 | (byte & 0x7F) << 7).view(np.float16).astype(np.float32) * 2**8
    e4m3[[0x7F, 0xFF]] = np.nan
    return {"F8_E5M2": e5m2, "F8_E4M3": e4m3}


_FLOATS_OF_8_BITS = _floats_of_8_bits()
