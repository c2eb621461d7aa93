"""Stub of the light pass over the weights of one file: to be replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loras import lora_files
from loras.lora_files import Header, Layer, LoraFileError, NotFiniteError
from loras.notices import Notice


@dataclass(frozen=True)
class Checked:
    """The digest of a file's contents, the norm of each layer, float64[L], and what is wrong with it, if anything."""

    digest: str
    norms: np.ndarray
    fault: str


def check_weights(path: Path, header: Header) -> Checked:
    """Read the weights of a file once."""
    try:
        content = np.fromfile(path, np.uint8)
        weights, _ = lora_files.load_weights(content, header)
        lora_files.check_finite(weights, header.layout)
    except (LoraFileError, NotFiniteError, OSError) as error:
        return Checked("", np.zeros(len(header.layout.layers)), str(error))
    norms = np.array([np.linalg.norm(weights[columns].astype(np.float64)) for columns in header.layout.columns])
    return Checked(hashlib.sha256(content).hexdigest(), norms, "")


def weight_notices(
    paths: Sequence[str], labels: Sequence[str], checked: Sequence[Checked], layers: Sequence[Layer]
) -> list[Notice]:
    """Return what weights show of files that can be used."""
    untrained = tuple(path for path, one in zip(paths, checked, strict=True) if not one.norms[1::2].any())
    message = f"every update is zero in {len(untrained)} LoRAs: untrained. Train them or leave them out."
    return [Notice("untrained", message, untrained)] if untrained else []
