"""Weight files: those that a folder holds."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from loras.building import WEIGHTS_NAME
from loras.checkpoints import MLX_CHECKPOINT, PEFT_NAME, is_moment
from loras.copies import split_moment
from loras.notices import Finding

PREFERRED_FILES = (WEIGHTS_NAME, PEFT_NAME, "adapters.safetensors")  # as diffusers, PEFT and MLX name the last
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_DEPTH = 32  # folders in each other
_STATE_FOLDER = re.compile(r"(.*)[-_. ]state", re.IGNORECASE)  # as kohya names what it goes on from
_EPOCH_OR_LAST = re.compile(r".*[-_]\d{6,12}|(?:.*[-_. ])?(?:last|final|latest)", re.IGNORECASE)
_STATE_FILE = re.compile(  # accelerate, transformers, DeepSpeed, torchtune
    r"(?:optimizer|scheduler|scaler|sampler|random_states|rng_state|recipe_state|training_args)[_\d]*\.\w+"
    r"|train_state\.json|.*_(?:model|optim)_states\.pt"
)


def find_weight_files(root: Path) -> tuple[list[str], list[Finding], Counter]:
    """Find the weight files below a folder.

    Returns:
        Sorted paths relative to it, what is wrong with the folders, and how many of what are left out.
    """
    paths, pickles = [], []
    ignored: Counter = Counter()
    errors: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=errors.append):
        inside = folder[len(os.fspath(root)) :].lstrip(os.sep)
        if inside and _is_state(folder, names):
            ignored["folders of a training's state"] += 1
            subfolders.clear()
            continue
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
        here = sorted(os.path.join(inside, name) for name in names if name.lower().endswith(PICKLE_SUFFIXES))
        if weights:
            ignored["pickles beside *.safetensors"] += len(here)
        else:
            pickles += here
    alone = _without_loras(pickles, paths)
    ignored["pickles in folders of LoRAs"] += len(pickles) - len(alone)
    reason = "a pickle checkpoint: never loaded. Convert it to safetensors."
    findings = [Finding((path,), reason) for path in alone]
    findings += [_not_listed(root, error) for error in errors]
    return sorted(paths), findings, +ignored


def _is_state(folder: str, names: Sequence[str]) -> bool:
    """Return whether a folder is called ``x-state`` and holds what a training goes on from, whose weights are no LoRA.

    A class or LoRA may be called so too. Of a state, ``x`` ends with a moment of the training, or is a LoRA beside the
    folder, or an optimizer is beside the weights in it.
    """
    name = _STATE_FOLDER.fullmatch(os.path.basename(folder))
    if not name:
        return False
    beside = os.path.join(os.path.dirname(folder), f"{name[1]}.safetensors")
    of_moment = split_moment(name[1])[1] or _EPOCH_OR_LAST.fullmatch(name[1])
    if of_moment or os.path.lexists(beside):
        return True
    return any(name.endswith(".safetensors") for name in names) and any(map(_STATE_FILE.fullmatch, names))


def _without_loras(pickles: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return the pickles but for those in the folders of LoRAs, which are states of their trainings.

    In the second folder of a path, <class>/<lora>/, all belong to a LoRA that is there. The first may be a class, whose
    LoRAs may all be pickles but one: it is a LoRA's folder if the weights in it have the name that a trainer gives the
    last; and what only a trainer writes belongs to the checkpoints that are there.
    """
    second, own, trained = set(), set(), set()
    for path in paths:
        first, *others = path.split(os.sep)
        if len(others) > 1:
            second.add((first, others[0]))
            if is_moment(others[0]):
                trained.add(first)
        elif others and others[0] in PREFERRED_FILES:
            own.add(first)
    alone = []
    for path in pickles:
        first, *others = path.split(os.sep)
        of_training = first in trained and _STATE_FILE.fullmatch(os.path.basename(path))
        if not ((first, *others[:1]) in second or first in own or of_training):
            alone.append(path)
    return alone


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
