"""Names in a table's rows, and the weight files that each is of.

A name is a weight file's path, that without ``.safetensors``, or the folder of one LoRA; slashes or backslashes. Names
are only ever compared with the files of the collection: no path is made of them, so they lead nowhere else.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

from loras import checkpoints
from loras.checkpoints import Choice
from loras.label_tables import text_of, written_paths
from loras.names import plain

SUFFIX = ".safetensors"
MAX_NAMED = 3  # files in a message


def names_of_files(paths: Iterable[str]) -> set[str]:
    """Return all names that weight files may have in a table, whatever is chosen of them."""
    names = {name for path in paths for name in (path, stem(path), *_above(path))}
    return names - {""}


def leads_elsewhere(name: str) -> bool:
    """Return whether a name is not that of something below the collection."""
    return bool("://" in name or re.match(r"[/\\]|[A-Za-z]:[/\\]", name)) or ".." in re.split(r"[/\\]", name)


def stem(path: str) -> str:
    """Return the path of a weight file without its suffix."""
    return path[: -len(SUFFIX)] if path.lower().endswith(SUFFIX) else path


def _above(path: str) -> Iterator[str]:
    """Yield the folders of a collection in which a file lies, the innermost first."""
    while path := os.path.dirname(path):
        yield path


class KnownNames:
    """The names by which rows of a table may call the files that are chosen, and those that are left out."""

    def __init__(self, choice: Choice):
        self.choice = choice
        folders: dict[str, list[str]] = defaultdict(list)
        for path in choice.paths:
            for folder in _above(path):
                folders[folder].append(path)
        self.by_name = {folder: tuple(paths) for folder, paths in folders.items() if len(paths) == 1}
        others = [*choice.left_out, *(path for finding in choice.findings for path in finding.files)]
        left_out = {folder for path in others for folder in _above(path)} - folders.keys()
        self.by_name |= dict.fromkeys((*others, *left_out), ())
        self.by_name |= {lora: paths for lora, paths in choice.groups.items() if lora not in choice.paths}
        self.by_name |= {path: (path,) for path in choice.paths}
        self.paths = dict.fromkeys((*choice.paths, *others))
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        for path in self.paths:
            self.by_stem[stem(path)].append(path)

    def files(self, name: str, step: object) -> tuple[str, ...] | None:
        """Return the files that a row is of; None where there is none of that name, or where several names fit it."""
        for path in written_paths(name):
            if step is not None and path in self.choice.groups:
                return self.by_name.get(self.choice.at.get((path, _step_text(step))))
            if path in self.by_name:
                return self.by_name[path]
            if path in self.by_stem:
                return self.by_name[self.by_stem[path][0]]
        return None

    def several(self, name: str, step: object) -> list[str]:
        """Return the names that one without a suffix may stand for, where these are two or more."""
        for path in written_paths(name):
            is_folder = path in self.by_name and (name[-1:] in ("/", "\\") or path not in self.by_stem)
            if path in self.paths or is_folder or (step is not None and path in self.choice.groups):
                return []
            if path in self.by_stem:
                names = self.by_stem[path] + [f"{path}/"] * (path in self.by_name)
                return names if len(names) > 1 else []
        return []

    def elsewhere(self, name: str) -> str:
        """Return the paths of files that have a name in another folder, in words; empty where none does."""
        paths = self._by_last_name.get(stem(written_paths(name)[-1]).rpartition("/")[2], [])
        shown = ", or ".join(plain(path) for path in sorted(paths)[:MAX_NAMED])
        return shown + ", ..." * (len(paths) > MAX_NAMED)

    @cached_property
    def _by_last_name(self) -> dict[str, list[str]]:
        """The files by the last part of their paths, without its suffix."""
        by_name = defaultdict(list)
        for path in self.paths:
            by_name[os.path.basename(stem(path))].append(path)
        return by_name

    def steps(self, name: str) -> str:
        """Return the steps of a LoRA's folder, in words; nothing where the name is of something else."""
        lora = next((path for path in written_paths(name) if path in self.choice.groups), None)
        steps = sorted((step for folder, step in self.choice.at if folder == lora), key=lambda s: (not s, len(s), s))
        return checkpoints.listed([step or "the last" for step in steps]) if steps else ""


def _step_text(step: object) -> str:
    """Return the cell of a step as `Choice.at` has it; also ``checkpoint-100``, and 100.0 as spreadsheets write it."""
    text = (text_of(step) or "").strip().lower()
    number = re.fullmatch(r"0*(\d{1,12})(?:\.0*)?", text)
    if number:
        return number[1]
    return checkpoints.step_named(text)
