"""Checks of the files of a collection one by one, as ``python data.py inspect`` does them without any feature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loras import copies, lora_files
from loras.lora_files import LoraFileError
from loras.notices import Finding, unreadable
from loras.recipe import IndexedFile
from loras.scales import count_scales
from loras.weight_checks import Checked, check_weights


def with_scales(root: Path, files: Iterable[IndexedFile]) -> tuple[list[IndexedFile], list[Finding]]:
    """Return files with the scales of their alpha tensors, and the faults of those where that cannot be."""
    read, faults = [], []
    for file in files:
        try:
            if file.layout.alphas:
                alphas = lora_files.read_alphas(root / file.path, file.header)
                file = replace(file, scales=count_scales(file.header, file.adapter_config, alphas))
        except LoraFileError as error:
            faults.append(Finding((file.path,), str(error)))
        except OSError as error:
            faults.append(Finding((file.path,), unreadable(error)))
        read.append(file)
    return read, faults


def check_files(root: Path, files: Iterable[IndexedFile]) -> tuple[dict[str, Checked], list[Finding]]:
    """Read the weights of each file once; return what they show, by path, and what is wrong with the others."""
    checked, faults = {}, []
    for file in files:
        try:
            result = check_weights(root / file.path, file.header, file.adapter_config)
            fault = result.fault
        except LoraFileError as error:
            fault = str(error)
        except OSError as error:
            fault = unreadable(error)
        if fault:
            faults.append(Finding((file.path,), fault))
        else:
            checked[file.path] = result
    return checked, faults


def twins_of(root: Path, files: Sequence[IndexedFile], checked: dict[str, Checked]) -> list[list[int]]:
    """Return the groups of rows of files that hold the same weights."""

    def read(row: int) -> np.ndarray:
        return lora_files.read_weights(root / files[row].path, files[row].header).weights

    results = [checked[file.path] for file in files]
    sizes = np.stack([result.sizes for result in results])
    return copies.find_copies([result.digest for result in results], sizes, [file.layout for file in files], read)
