"""Weight files: those that a folder holds."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

from loras.building import WEIGHTS_NAME
from loras.checkpoints import MLX_CHECKPOINT, PEFT_NAME
from loras.notices import Finding

PREFERRED_FILES = (WEIGHTS_NAME, PEFT_NAME, "adapters.safetensors")  # as diffusers, PEFT and MLX name the last
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_DEPTH = 32  # folders in each other


def find_weight_files(root: Path) -> tuple[list[str], list[Finding], Counter]:
    """Find the weight files below a folder.

    Returns:
        Sorted paths relative to it, what is wrong with the folders, and how many of what are left out.
    """
    paths, findings = [], []
    ignored: Counter = Counter()
    errors: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=errors.append):
        inside = folder[len(os.fspath(root)) :].lstrip(os.sep)
        ignored["hidden folders"] += sum(sub.startswith(".") for sub in subfolders)
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        ignored["linked folders"] += sum(os.path.islink(os.path.join(folder, sub)) for sub in subfolders)
        if inside.count(os.sep) + 1 >= MAX_DEPTH and inside:
            ignored[f"folders deeper than {MAX_DEPTH} levels"] += len(subfolders)
            subfolders.clear()
        weights = [name for name in names if name.lower().endswith(".safetensors") and not name.startswith(".")]
        chosen = _preferred(weights)
        if len(weights) > len(chosen):
            ignored[f"*.safetensors beside {chosen[0]}"] += len(weights) - len(chosen)
        paths += [os.path.join(inside, name) for name in chosen]
        pickles = sorted(os.path.join(inside, name) for name in names if name.lower().endswith(PICKLE_SUFFIXES))
        if weights:
            ignored["pickles beside *.safetensors"] += len(pickles)
        else:
            reason = "a pickle checkpoint: never loaded. Convert it to safetensors."
            findings += [Finding((path,), reason) for path in pickles]
    findings += [_not_listed(root, error) for error in errors]
    return sorted(paths), findings, +ignored


def _preferred(weights: list[str]) -> list[str]:
    """Return the files of a folder that are LoRAs: all, or where one has the name of a LoRA that one.

    MLX's checkpoints lie beside its last adapter.
    """
    name = next((name for name in PREFERRED_FILES if name in weights), None)
    if name is None:
        return weights
    return [name] + [other for other in weights if name == PREFERRED_FILES[2] and MLX_CHECKPOINT.fullmatch(other)]


def _not_listed(root: Path, error: OSError) -> Finding:
    mend = "Mend its permissions"
    if error.errno == errno.ENAMETOOLONG:
        mend = "Shorten the names of its folders"
    elif error.errno == errno.ENOENT:
        mend = "It was removed meanwhile: start again"
    return Finding((os.path.relpath(error.filename, root),), f"cannot be listed ({error.strerror}). {mend}.")
