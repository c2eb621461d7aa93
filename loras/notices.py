"""Notices: reports of a collection while the run goes on, on copies, scales, untrained LoRAs, and the like.

A notice is about files that can be read but may mean something else than their owner thinks. With --strict it is a
fault of its files, as what cannot be read always is.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_LISTED = 20  # files, or groups of files, of a notice that results.json lists


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

    def record(self) -> dict:
        """Return the notice as results.json holds it in ``dataset.findings``."""
        return {
            "kind": self.kind,
            "message": self.message,
            "count": len(self.files),
            "files": list(self.files[:MAX_LISTED]),
            "groups": [list(group) for group in self.groups[:MAX_LISTED]],
        }
