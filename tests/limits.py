"""The memory that a piece of work adds, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Added:
    """The most memory that was held beyond that held before, in bytes; 0 where the system does not say."""

    bytes: int = 0

    @property
    def mebibytes(self) -> float:
        return self.bytes / 2**20


@contextmanager
def peak_of_memory() -> Iterator[Added]:
    """Yield what is known at the end: the most resident memory of this process, less that at the start."""
    added, reset = Added(), Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    yield added
    added.bytes = max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
