"""Sets of layers: how those of a collection's files differ, those that all files have, and those that are chosen.

Two files of one network may hold different layers: one trainer adapts the feed-forward networks too, another only
the attention. Such files are refused, or compared on the modules that all of them have (--common-layers).

Shape letters: L layers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from loras.lora_files import Layer, by_layout
from loras.notices import Finding, Notice
from loras.recipe import IndexedFile
from loras.scales import count_scales

MAX_NAMED = 3  # modules in a message
EXCEPT = "!"  # before a pattern of layers to leave out
REMEDY = "Keep LoRAs of the same layers to a collection, or compare those that all files have: --common-layers."


def layer_differences(root: Path, files: Sequence[IndexedFile]) -> list[Finding]:
    """Find files that differ in their layers, or in more than the rank; the commonest layers are the measure."""
    holders = defaultdict(list)
    for positions in by_layout(file.layout for file in files):
        layout = files[positions[0]].layout
        sides = tuple((f"{layer.module} {layer.role}", layer.free_side) for layer in layout.layers)
        holders[sides] += [files[i].path for i in positions]
    common = max(holders, key=lambda sides: len(holders[sides]), default=())
    others = ""
    if holders:
        others = f"{len(holders[common])} files" if len(holders[common]) > 1 else min(holders[common])
    findings = []
    for sides, paths in holders.items():
        if reason := _difference(dict(sides), dict(common), others):
            findings.append(Finding(tuple(paths), reason, _place(root, paths)))
    return findings


def _difference(sides: dict[str, int], common: dict[str, int], others: str) -> str:
    """Describe how the free sides of a file's layers differ from those of ``others``; empty if they do not."""
    lacking = [layer for layer in common if layer not in sides]
    extra = [layer for layer in sides if layer not in common]
    if lacking or extra:
        parts = [f"lacks {len(lacking)} layers ({lacking[0]} ...)"] if lacking else []
        parts += [f"adds {len(extra)} layers ({extra[0]} ...)"] if extra else []
        return f"{' and '.join(parts)} compared with {others}. {REMEDY}"
    for layer, side in sides.items():
        if side != common[layer]:
            fault = f"{layer} is {side} wide, but {common[layer]} in {others}: mixed base models"
            return f"{fault}. Keep one base model to a collection."
    return ""


def and_more(count: int) -> str:
    """Return the words behind the first of a number of files."""
    return f" and {count - 1} more" if count > 1 else ""


def _place(root: Path, paths: Sequence[str]) -> str:
    return f"{root / min(paths)}{and_more(len(paths))}"


# ----------------------------------------------------------------------------------------------------------------------
# Layers that all files have
# ----------------------------------------------------------------------------------------------------------------------


def strangers(root: Path, files: Sequence[IndexedFile]) -> list[Finding]:
    """Find the files without which the others have a module in common; none where all have one.

    They are the fewest that lack one module: the one that most files have.
    """
    holders = _holders(files)
    if not files or max(holders.values(), default=0) == len(files):
        return []
    measure = max(holders, key=holders.get)  # of equals the first in the network's order
    shared = _common([file for file in files if measure in file.layout.modules])
    findings = []
    for positions in by_layout(file.layout for file in files):
        modules = files[positions[0]].layout.modules
        if measure in modules:
            continue
        paths = [files[i].path for i in positions]
        least = f"{len(shared.intersection(modules))} of its {len(modules)} modules are among the {len(shared)}"
        reason = (
            f"no layer is common to all {len(files)} files: {least} that {holders[measure]} other files have in common "
            f"({measure} ...). Keep LoRAs of one network to a collection, or leave it out."
        )
        findings.append(Finding(tuple(paths), reason, _place(root, paths)))
    return findings


def keep_common(files: Sequence[IndexedFile]) -> tuple[list[IndexedFile], dict[str, int]]:
    """Return files with only the modules that all of them have, and for each other module the files that have it."""
    if not files:
        return [], {}
    holders, shared = _holders(files), _common(files)
    others = {module: count for module, count in holders.items() if module not in shared}
    if not others:
        return list(files), {}
    headers = [file.header.keeping(shared) for file in files]
    kept = [
        replace(file, header=header, scales=count_scales(header, file.adapter_config))
        for file, header in zip(files, headers, strict=True)
    ]
    return kept, others


def common_notice(files: Sequence[IndexedFile], others: dict[str, int]) -> Notice:
    """Return the notice of the modules that --common-layers leaves out; ``others`` as `keep_common` returns it."""
    kept, total = len(files[0].layout.modules), len(files)
    named = ", ".join(f"{module} in {count}" for module, count in list(others.items())[:MAX_NAMED])
    more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
    message = (
        f"--common-layers keeps the {2 * kept} layers ({kept} modules) that all {total} LoRAs have and leaves out "
        f"{len(others)} modules ({named}{more}). What these know is not in the results."
    )
    return Notice("common layers", message, ())


def _holders(files: Sequence[IndexedFile]) -> Counter[str]:
    """Return the number of files that have each module, in the order of the layouts."""
    holders: Counter[str] = Counter()
    for positions in by_layout(file.layout for file in files):
        for module in files[positions[0]].layout.modules:
            holders[module] += len(positions)
    return holders


def _common(files: Sequence[IndexedFile]) -> frozenset[str]:
    layouts = (files[positions[0]].layout for positions in by_layout(file.layout for file in files))
    return frozenset.intersection(*(frozenset(layout.modules) for layout in layouts))


# ----------------------------------------------------------------------------------------------------------------------
# Choice by name
# ----------------------------------------------------------------------------------------------------------------------


def matching(layers: Sequence[Layer], pattern: str | None) -> np.ndarray:
    """Return the layers that a comma list of patterns names, bool[L]; None names all.

    A pattern with ``*``, ``?`` or ``[`` is to match the whole of a layer's shown name, of its canonical module, or of
    that with its role (``..._attn1_to_v_up``); any other may stand anywhere in one of them. In canonical names a dot is
    an underscore: ``*.to_v.*`` finds the same layers whatever wrote the files. A pattern behind ``!`` takes its layers
    out of those that the others name, or out of all where there are no others, wherever it stands in the list.

    Raises:
        ValueError: A pattern of the list matches no layer, or no layer is left.
    """
    if pattern is None:
        return np.ones(len(layers), bool)
    if not pattern.isprintable():
        raise ValueError("not printable text. Give a part of a layer's name.")
    kept, removed = np.zeros(len(layers), bool), np.zeros(len(layers), bool)
    patterns = [single.strip() for single in pattern.split(",")]
    for single in patterns:
        chosen = [_matches(layer, single.removeprefix(EXCEPT).strip()) for layer in layers]
        if not any(chosen):
            names = ", ".join(layer.name for layer in layers[:3])
            raise ValueError(f"{single!r} matches none of {len(layers)} layers. The first ones are {names}.")
        if single.startswith(EXCEPT):
            removed |= chosen
        else:
            kept |= chosen
    selected = ~removed & (kept | all(single.startswith(EXCEPT) for single in patterns))
    if not selected.any():
        raise ValueError(f"leaves none of {len(layers)} layers. Leave out fewer.")
    return selected


def _matches(layer: Layer, pattern: str) -> bool:
    whole = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    canonical = layer.module, f"{layer.module}_{layer.role}"
    return fnmatchcase(layer.name, whole) or any(fnmatchcase(name, whole.replace(".", "_")) for name in canonical)
