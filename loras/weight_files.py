"""Weight files: those that a folder holds, and those that differ from the others in their layers."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from loras.building import WEIGHTS_NAME
from loras.labels import Finding
from loras.lora_files import by_layout
from loras.recipe import IndexedFile

PREFERRED_FILES = (WEIGHTS_NAME, "adapter_model.safetensors", "adapters.safetensors")  # of diffusers, PEFT, MLX
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_weight_files(root: Path) -> tuple[list[str], list[Finding], Counter]:
    """Find the weight files below a folder.

    Returns:
        Sorted paths relative to it, what is wrong with the folders, and how many of what are left out.
    """
    paths, findings = [], []
    ignored: Counter = Counter()
    errors: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=errors.append):
        ignored["hidden folders"] += sum(sub.startswith(".") for sub in subfolders)
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        ignored["linked folders"] += sum(os.path.islink(os.path.join(folder, sub)) for sub in subfolders)
        weights = [name for name in names if name.lower().endswith(".safetensors") and not name.startswith(".")]
        preferred = [name for name in PREFERRED_FILES if name in weights][:1]
        if preferred:
            ignored[f"*.safetensors beside {preferred[0]}"] += len(weights) - 1
        inside = folder[len(os.fspath(root)) :].lstrip(os.sep)
        paths += [os.path.join(inside, name) for name in preferred or weights]
        pickles = sorted(os.path.join(inside, name) for name in names if name.lower().endswith(PICKLE_SUFFIXES))
        if weights:
            ignored["pickles beside *.safetensors"] += len(pickles)
        else:
            reason = "a pickle checkpoint: never loaded. Convert it to safetensors."
            findings += [Finding((path,), reason) for path in pickles]
    for error in errors:
        folder = os.path.relpath(error.filename, root)
        findings.append(Finding((folder,), f"cannot be listed ({error.strerror}). Mend its permissions."))
    return sorted(paths), findings, ignored


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
            place = f"{root / min(paths)}" + and_more(len(paths))
            findings.append(Finding(tuple(paths), reason, place))
    return findings


def _difference(sides: dict[str, int], common: dict[str, int], others: str) -> str:
    """Describe how the free sides of a file's layers differ from those of ``others``; empty if they do not."""
    lacking = [layer for layer in common if layer not in sides]
    extra = [layer for layer in sides if layer not in common]
    if lacking or extra:
        parts = [f"lacks {len(lacking)} layers ({lacking[0]} ...)"] if lacking else []
        parts += [f"adds {len(extra)} layers ({extra[0]} ...)"] if extra else []
        return f"{' and '.join(parts)} compared with {others}. Keep LoRAs of the same layers to a collection."
    for layer, side in sides.items():
        if side != common[layer]:
            fault = f"{layer} is {side} wide, but {common[layer]} in {others}: mixed base models"
            return f"{fault}. Keep one base model to a collection."
    return ""


def and_more(count: int) -> str:
    """Return the words behind the first of a number of files."""
    return f" and {count - 1} more" if count > 1 else ""
