"""Folders as trainers leave them: checkpoints, and adapters with names, inside a LoRA's folder; which of them are read.

    <class>/<lora>/adapter_model.safetensors                    the last adapter
    <class>/<lora>/checkpoint-100/adapter_model.safetensors     an earlier one; also step_000500/, checkpoints/epoch-3/
    <class>/<lora>/500/adapter_model.safetensors                also <lora>-000500/, where folders are the labels
    <class>/<lora>/my_style/adapter_model.safetensors           PEFT saves an adapter with a name into a folder of it
    <class>/<lora>/0000100_adapters.safetensors                 MLX, beside adapters.safetensors

Where folders are the labels, the first two are the class and the LoRA, whatever they are called: <class>/checkpoint-1/
and <class>/checkpoint-2/ are LoRAs. Where a table or metadata.json files are, this holds for the first folder.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from loras.copies import split_moment
from loras.names import plain
from loras.notices import Finding, Notice

FINAL, ALL = "final", "all"  # values of --step beside a number
PEFT_NAME = "adapter_model.safetensors"
MAX_NAMED = 6  # folders in a message
MLX_CHECKPOINT = re.compile(r"(\d{1,12})_adapters\.safetensors")
_CONTAINER = re.compile(r"checkpoints?|ckpts?", re.IGNORECASE)
_LAST = re.compile(r"(?:(?:checkpoint|ckpt)[-_. ]?)?(?:final|last|latest)(?:[-_. ](?:checkpoint|ckpt))?", re.IGNORECASE)
_NUMBER = re.compile(r"[-_](\d{4,12})$")  # of a file among checkpoints
_NUMBERED = re.compile(r"(.*?)[-_.= ]?(\d{1,12})")  # of a folder in a LoRA's
_WORDS = ("", "global", "checkpoint", "ckpt", "save", "model", "adapter", "lora", "pytorch_lora_weights")  # trainers'


def step_of(text: str) -> str:
    """Return the value of a --step flag.

    Raises:
        ValueError: It is neither ``final`` nor ``all`` nor a number.
    """
    if text in (FINAL, ALL):
        return text
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ValueError(f"{text} is no step: give final, all or a number")
    return str(int(text))


class _Place(NamedTuple):
    """The place of a file in a trainer's folder: LoRA, adapter's name, and moment of the training, () for the last."""

    lora: str
    adapter: str
    moment: tuple[int, ...]
    path: str

    @property
    def folder(self) -> str:
        """The folder of the file."""
        return os.path.dirname(self.path)


@dataclass(frozen=True)
class Choice:
    """The files of a collection that are read.

    Attributes:
        step: The value of --step, or ``all`` where a column of a table implies it.
        paths: The files, sorted.
        groups: The chosen files of each LoRA's folder that holds checkpoints or adapters with names, the last one last.
        left_out: The LoRA's folder of each file that is not chosen.
        at: The file at each step, by LoRA's folder and the number of the step, "" for the last.
        findings: Folders of which nothing can be chosen.
    """

    step: str
    paths: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    at: dict[tuple[str, str], str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def without(self, paths: Iterable[str]) -> Choice:
        """Return the choice less some files, which are left out as checkpoints are."""
        lora_of = self.lora_of
        gone = {path: lora_of[path] for path in paths}
        groups = {lora: tuple(path for path in chosen if path not in gone) for lora, chosen in self.groups.items()}
        kept = tuple(path for path in self.paths if path not in gone)
        return Choice(self.step, kept, groups, self.left_out | gone, self.at, self.findings)

    @cached_property
    def lora_of(self) -> dict[str, str]:
        """The LoRA's folder of each chosen file that lies in one with checkpoints or adapters with names."""
        return {path: lora for lora, chosen in self.groups.items() for path in chosen}

    @property
    def notice(self) -> Notice | None:
        """The notice of what is left out; None where nothing is."""
        if not self.left_out:
            return None
        names = Counter(_name_inside(path, lora) for path, lora in sorted(self.left_out.items()))
        shown = ", ".join(plain(name) for name in sorted(names, key=_natural)[:MAX_NAMED])
        shown += f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        count, loras = len(self.left_out), len(set(self.left_out.values()))
        subject = f"{count} files in the folders of {loras} LoRAs are" if count > 1 else "1 file in a LoRA's folder is"
        of_step = {FINAL: "takes the last of each", ALL: "takes each step once"}
        rule = f"--step {self.step} {of_step.get(self.step, 'takes that of each')}"
        mend = "--step all makes each checkpoint a sample, --step N takes one."
        message = f"{subject} left out ({shown}): {rule}. {mend}"
        return Notice("checkpoints", message, tuple(sorted(self.left_out)))


def _name_inside(path: str, lora: str) -> str:
    """Return the folder of a file in its LoRA's, or the name of the file that lies in that itself."""
    inside = os.path.relpath(path, lora)
    return os.path.dirname(inside) or inside


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,12})", name) if part]


def folders_of(path: str) -> list[str]:
    """Return the folders whose metadata.json is of a file: its own, and those of its LoRA, the nearest first.

    Out of the folder of PEFT's adapter with a name, too, if two folders or more are left.
    """
    parts = path.split(os.sep)[:-1]
    without_moments = [part for i, part in enumerate(parts) if not i or _moment(part, parts[:i]) is None]
    folders = [os.sep.join(parts), os.sep.join(without_moments)]
    inside = False
    while len(parts) > 1:
        if _moment(parts[-1], parts[:-1]) is None:
            if inside or len(parts) < 3 or os.path.basename(path) != PEFT_NAME:
                break
            inside = True
        parts.pop()
        folders.append(os.sep.join(parts))
    return list(dict.fromkeys(folders))


def choose(root: Path, paths: Sequence[str], by_folder: bool, step: str) -> Choice:
    """Choose the weight files that are read, of those that lie in a collection.

    Args:
        root: The collection.
        paths: All its weight files, relative to it.
        by_folder: Whether folders are the labels.
        step: ``final``: of each LoRA's folder the adapter in the folder itself, or one with a name, else the last
            checkpoint; ``all``: one of each step; a number: the checkpoint of that step.
    """
    places, others = _trainers_folders(paths, 2 if by_folder else 1)
    chosen, findings, groups = [], [], {}
    left_out: dict[str, str] = {}
    at: dict[tuple[str, str], str] = {}
    for lora, members in places.items():
        steps = _steps(members)
        if not steps:
            adapters = _few(sorted({place.adapter for place in members} - {""}))
            reason = f"several adapters ({adapters}), and none in the folder itself"
            mend = "Label each in a table (--labels), or keep one."
            findings.append(Finding(tuple(place.path for place in members), f"{reason}. {mend}", f"{root / lora}"))
            continue
        at |= {(lora, str(moment[-1])): files[0].path for moment, files in steps.items() if moment}
        at[lora, ""] = list(steps.values())[-1][0].path
        taken = _taken(root, steps, step)
        if taken is None:
            reason = f"no checkpoint {step}: there {_listed(steps)}. Give another --step, or leave it out."
            findings.append(Finding(tuple(place.path for place in members), reason, f"{root / lora}"))
            continue
        groups[lora] = tuple(place.path for place in taken)
        left_out |= {place.path: lora for place in members if place.path not in set(groups[lora])}
        chosen += groups[lora]
    if step in (FINAL, ALL):
        chosen += others
    elif others:
        reason = f"no checkpoint {step}: it has none. Give another --step, or leave it out."
        findings += [Finding((path,), reason) for path in others]
    return Choice(step, tuple(sorted(chosen)), groups, left_out, at, tuple(findings))


def _trainers_folders(paths: Sequence[str], protected: int) -> tuple[dict[str, list[_Place]], list[str]]:
    """Return the files of each LoRA's folder in which a trainer has left more than a LoRA, and all other files."""
    by_lora: dict[str, list[_Place]] = defaultdict(list)
    others = []
    for path in paths:
        if place := _place(path, protected):
            by_lora[place.lora].append(place)
        else:
            others.append(path)
    folders = {}
    for lora, places in by_lora.items():
        if any(place.moment or place.adapter or place.folder != lora for place in places):
            folders[lora] = places
        else:
            others += [place.path for place in places]
    return folders, others


def _place(path: str, protected: int) -> _Place | None:
    """Return the place of a file; None for one that lies in no LoRA's folder, or deeper than a trainer puts it."""
    *folders, name = path.split(os.sep)
    if len(folders) < protected:
        return None
    names, moment, container, inside = [], (), "", False
    for i, part in enumerate(folders[protected:], protected):
        numbers = _moment(part, folders[:i])
        if numbers is None and protected > 1:  # in a LoRA's folder
            numbers = _numbered(part, folders[protected - 1])
        inside |= numbers is not None
        container = part if numbers == () and not _LAST.fullmatch(part) else container
        if numbers is None:
            names.append(part)
        else:
            moment += numbers
    if match := MLX_CHECKPOINT.fullmatch(name):
        moment += (int(match[1]),)
    elif container and not moment:
        stem = name.removesuffix(".safetensors")
        number = _NUMBER.search(stem)
        moment = split_moment(stem)[1] or ((int(number[1]),) if number else ())
    if protected == 1:  # each folder that is no moment may be a LoRA of its own
        return _Place(os.sep.join([folders[0], *names]), "", moment, path)
    if len(names) > 1 or (names and name != PEFT_NAME and not inside):
        return None
    return _Place(os.sep.join(folders[:protected]), "".join(names), moment, path)


def is_moment(name: str) -> bool:
    """Return whether a folder is named by a moment of a training, wherever it lies."""
    return _moment(name, ()) is not None


def step_named(text: str) -> str:
    """Return the step that a table's cell names by a folder, ``checkpoint-100``: "" for the last; else the text."""
    if text == FINAL or _LAST.fullmatch(text):
        return ""
    numbers = _moment(text, ())
    return str(numbers[-1]) if numbers else text


def _moment(part: str, above: Sequence[str]) -> tuple[int, ...] | None:
    """Return the numbers of a folder that is named by a moment of a training, () for the last; None for another.

    Beside the moment there may be a word of trainers, or the name of a folder ``above``.
    """
    if _CONTAINER.fullmatch(part) or _LAST.fullmatch(part):
        return ()
    if above and _CONTAINER.fullmatch(above[-1]) and part.isdecimal():
        return (int(part),)
    rest, numbers = split_moment(part)
    if not numbers and (match := re.fullmatch(r"save[-_. ]?(\d{1,12})", part, re.IGNORECASE)):
        return (int(match[1]),)
    return numbers if numbers and (rest.lower() in _WORDS or rest in above) else None


def _numbered(part: str, lora: str) -> tuple[int, ...] | None:
    """Return the number of a folder in a LoRA's, alone or after a trainer's word or the LoRA's name: x/x-000001/."""
    match = _NUMBERED.fullmatch(part)
    return (int(match[2]),) if match and (match[1].lower() in _WORDS or match[1] == lora) else None


def _steps(places: Sequence[_Place]) -> dict[tuple[int, ...], list[_Place]]:
    """Return the files of each moment in time, the last adapter last.

    Of several folders of one moment one is taken, the LoRA's own before others. Adapters with names count where the
    folder itself holds none; none is returned where several do, as none of them is the LoRA.
    """
    own = [place for place in places if not place.adapter]
    if all(place.moment for place in own):
        if len({place.adapter for place in places} - {""}) > 1:
            return {}
        own = list(places)
    steps: dict[tuple[int, ...], list[_Place]] = {}
    for place in sorted(own, key=lambda place: (place.folder.count(os.sep), place.folder, place.path)):
        files = steps.setdefault(place.moment, [])
        if not files or files[0].folder == place.folder:  # several files of one folder may be LoRAs of their own
            files.append(place)
    return {moment: steps[moment] for moment in sorted(steps, key=lambda moment: (not moment, moment))}


def _taken(root: Path, steps: dict[tuple[int, ...], list[_Place]], step: str) -> list[_Place] | None:
    """Return the files that --step takes; None for a step that is not there."""
    last = list(steps)[-1]
    if step == FINAL:
        return steps[last]
    if step != ALL:
        return next((files for moment, files in steps.items() if moment and moment[-1] == int(step)), None)
    kept = dict(steps)
    if not last and len(steps) > 1:
        before = list(steps)[-2]
        if any(_same_bytes(root / steps[before][0].path, root / file.path) for file in steps[last]):
            del kept[before]  # both folders of one moment
    return [place for files in kept.values() for place in files]


def _same_bytes(one: Path, other: Path) -> bool:
    """Return whether two plain files hold the same bytes; of most, the first block differs."""
    try:
        if not (one.is_file() and other.is_file()) or one.stat().st_size != other.stat().st_size:
            return False
        with open(one, "rb") as first, open(other, "rb") as second:
            while (block := first.read(2**20)) == second.read(2**20):
                if not block:
                    return True
    except OSError:  # indexing says so
        pass
    return False


def _listed(steps: Iterable[tuple[int, ...]]) -> str:
    return listed([str(moment[-1]) if moment else "the last" for moment in steps])


def listed(words: Sequence[str]) -> str:
    """Return some steps with the verb before them."""
    return f"{'is' if len(words) == 1 else 'are'} {_few(words)}"


def _few(words: Sequence[str]) -> str:
    return ", ".join(plain(word) for word in words[:MAX_NAMED]) + (", ..." if len(words) > MAX_NAMED else "")
