"""Text of ``python data.py inspect``: a collection's contents as lines."""

from __future__ import annotations

from pathlib import Path

from loras.labels import plain

MAX_SCALES = 12
NOT_CHECKED = "weights: not read; NaN, copies, untrained LoRAs and outliers were not checked"
WEIGHTS_CHECKED = "weights: read and checked for NaN, copies, untrained LoRAs and outliers"


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
    lines += ["dtypes:  " + _listed(contents["dtypes"]), "classes: " + _listed(contents["classes"])]
    if contents["num_groups"] is not None:
        lines.append(f"groups:  {contents['num_groups']} by {contents['group_column']}")
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
