"""Parts of ``python data.py inspect``: the checks of files one by one, and a collection's contents as lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loras import copies, lora_files
from loras.lora_files import LoraFileError
from loras.names import plain
from loras.notices import Finding, Notice, unreadable
from loras.recipe import IndexedFile
from loras.scales import count_scales
from loras.weight_checks import Checked, check_weights, weight_notices

MAX_SCALES = 12
NOT_CHECKED = "weights: not read; NaN, copies, epochs, untrained LoRAs and outliers were not checked"
CHECKED = "weights: read and checked for NaN, copies, epochs, untrained LoRAs and outliers"


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


def twins_of(
    root: Path, files: Sequence[IndexedFile], checked: dict[str, Checked]
) -> tuple[list[list[int]], list[Finding]]:
    """Return the groups of rows of files that hold the same weights, and the fault of those whose labels differ."""

    def read(row: int) -> np.ndarray:
        return lora_files.read_weights(root / files[row].path, files[row].header).weights

    results = [checked[file.path] for file in files]
    sizes = np.stack([result.sizes for result in results])
    twins = copies.find_copies([result.digest for result in results], sizes, [file.layout for file in files], read)
    return twins, copies.contradictions([file.path for file in files], _labels(files), twins)


def _labels(files: Sequence[IndexedFile]) -> list[str]:
    return [file.label for file in files]


def notices_of_weights(
    files: Sequence[IndexedFile],
    checked: dict[str, Checked],
    twins: list[list[int]],
    strict: bool,
    selected: np.ndarray,
) -> list[Notice]:
    """Return what the weights of files show that can be used, and which are epochs of one training.

    ``selected`` are the layers that --layers keeps, bool[L].
    """
    paths, labels = [file.path for file in files], _labels(files)
    norms = np.stack([checked[path].norms for path in paths])
    sessions = [copies.session_id(file.header.fields) for file in files]
    epochs = copies.find_epochs(paths, sessions, twins)
    twin_notices = copies.twin_notices(paths, labels, twins, epochs, strict=strict)
    return weight_notices(paths, labels, files[0].layout.modules, norms, selected) + twin_notices


def content_lines(path: Path, contents: dict) -> list[str]:
    """Return what ``inspect`` prints of headers, given what it prints as JSON."""
    layers = {depth: contents["layers"][depth] for depth in contents["layers_selected"]}
    selected = f", {len(layers)} of them listed" if len(layers) < len(contents["layers"]) else ""
    width = max(len(layer["name"]) for layer in layers.values())
    lines = [
        f"{path}: {contents['num_samples']} LoRAs of {len(contents['layers'])} layers{selected}; "
        f"labels from {contents['label_source']}"
    ]
    if contents["mixed_ranks"]:
        lines.append("ranks differ between LoRAs: the shapes are those of the first file")
    if contents["products"]:
        products = _counted(contents["products"], "module")
        lines.append(
            f"{products} of LoHa or LoKr: read as pairs of a larger rank, each factor shown under the name of one of "
            "the tensors that it is made of"
        )
    lines += ["dtypes:  " + _listed(contents["dtypes"]), "classes: " + _listed(contents["classes"])]
    if contents["num_groups"] is not None:
        lines.append(f"groups:  {contents['num_groups']} by {contents['group_column'] or 'LoRA, with its checkpoints'}")
    chooses = " (number of values; --label-column chooses)" if contents["columns"] else ""
    lines += [
        "scales:  " + _scales(contents["scales"]),
        f"columns: {_listed(contents['columns'])}{chooses}",
        "ignored: " + _listed(contents["ignored"]),
    ]
    lines += skipped_lines(contents["skipped"])
    lines.append(f"{'depth':>5}  {'role':4}  {'shape':>12}  {'layer':{width}}  module")
    for depth, layer in layers.items():
        shape = "x".join(map(str, layer["shape"]))
        lines.append(f"{depth:5}  {layer['role']:4}  {shape:>12}  {layer['name']:{width}}  {layer['module']}")
    return lines


def skipped_lines(skipped: list[dict[str, str]]) -> list[str]:
    """Return a line for each file left out."""
    return [f"skipped: {entry['path']}: {entry['reason']}" for entry in skipped]


def left_line(class_counts: dict[str, int]) -> str:
    """Return the numbers of what is left where files were left out for their weights."""
    return f"left:    {_counted(sum(class_counts.values()), 'LoRA')}; classes: {_listed(class_counts)}"


def notice_lines(notices: list[dict]) -> list[str]:
    """Return a line for each notice."""
    return [f"note: {plain(notice['message'])}" for notice in notices]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "nothing"


def _scales(records: list[dict]) -> str:
    shown = [
        f"{record['scale']:g} ({record['source']}, {_counted(record['modules'], 'module')} of "
        f"{_counted(record['files'], 'LoRA')})"
        for record in records[:MAX_SCALES]
    ]
    if len(records) > MAX_SCALES:
        shown.append(f"and {len(records) - MAX_SCALES} more")
    return ", ".join(shown)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count > 1 else "")
