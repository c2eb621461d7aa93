"""Findings and notices: what is wrong with files, and what is reported of those that are used.

A finding is of files that cannot be used. A notice is about files that can be read but may mean something else than
their owner thinks: copies, scales, untrained LoRAs, and the like. With --strict it is a fault of its files too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loras.names import one_line

# Of some messages, where it is not asked for; data.noted does it.
ADVICE = re.compile(r"[,;] (as )?--strict --skip-bad (does|leaves them out)")
MAX_LISTED = 20  # files, or groups of files, of a notice that results.json lists


@dataclass(frozen=True)
class Finding:
    """A fault of some files, which can be left out; their paths are relative to the collection.

    ``reason`` reads ``what is wrong. What to do.``; ``place`` stands in the message instead of the first file's path.
    """

    files: tuple[str, ...]
    reason: str
    place: str = ""

    def line(self, root: Path) -> str:
        """Return the finding as a line ``<path>: what is wrong. What to do.``."""
        return one_line(f"{self.place or root / self.files[0]}: {self.reason}")


def grouped(lines: Sequence[str]) -> list[str]:
    """Return lines ``<path>: what is wrong. What to do.``, of those that say the same of many paths one with the count.

    Example:
        >>> grouped(["a: no label. Mend it.", "b: a pickle. Convert it.", "c: no label. Mend it."])
        ['a and 1 more: no label. Mend it.', 'b: a pickle. Convert it.']
    """
    places: dict[str, list[str]] = defaultdict(list)
    for line in dict.fromkeys(lines):
        end = line.find(".safetensors: ")  # a path may hold a colon too
        start = line.find(": ", max(0, end))
        places[line[start:] if start > 0 else ""].append(line[:start] if start > 0 else line)
    shown = []
    for reason, same in places.items():
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        shown += [f"{same[0]}{more}{reason}"] if reason else same
    return shown


def unreadable(error: OSError) -> str:
    """Return the reason of a finding, given the system's error for a file."""
    return f"cannot be read ({error.strerror or error}). Mend that, or leave it out."


@dataclass(frozen=True)
class Notice:
    """A report on some files.

    Attributes:
        kind: A short name of the kind, such as ``copies``.
        message: One sentence for a person, and one that says what to do: ``what is there. What to do.``
        files: Paths of the files that it is about, relative to the collection, sorted.
        groups: Where files belong together, such as copies of one another: their paths, each group sorted.
    """

    kind: str
    message: str
    files: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = ()

    @property
    def reason(self) -> str:
        """The message where its files are left out: without the advice to do what has been done."""
        return ADVICE.sub("", self.message)

    def record(self) -> dict:
        """Return the notice as results.json holds it in ``dataset.findings``."""
        return {
            "kind": self.kind,
            "message": self.message,
            "count": len(self.files),
            "files": list(self.files[:MAX_LISTED]),
            "groups": [list(group) for group in self.groups[:MAX_LISTED]],
        }
