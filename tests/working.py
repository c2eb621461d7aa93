"""Units of work for tests: what worker processes import by name. And processes, to watch them end."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiment import store
from experiment.units import LARGE, Unit


class Nothing:
    """A description of inputs that opens to the device that they are asked for on."""

    def open(self, device):
        return device

    def forget(self, device):
        pass


class Fault(Exception):
    """Something that no unit expects."""


def unit(folder: Path, name: str, compute: Callable | None = None, in_main: bool = False) -> Unit:
    """Return a unit; by default one that says who did it."""
    return Unit(folder / "units" / f"{name}.npz", Nothing(), compute or worked, [0], f"unit {name}", in_main)


def worked(device, stack, seconds: float = 0.0):
    """Say who did it."""
    time.sleep(seconds)
    return {"process": np.array([os.getpid()]), "device": np.array([str(device)])}


def fail(device, stack, error: Exception):
    raise error


def large(device, stack):
    return {"numbers": np.zeros(LARGE // 8)}


def killed(device, stack, deaths: Path, times: int, beside: str = "*"):
    """End this worker by SIGKILL, so many times; the first time while another one is at the unit ``beside``."""
    died = len(list(deaths.iterdir()))
    if died < times:
        (deaths / str(died)).touch()
        until(lambda: died or list(deaths.parent.glob(f"runs/*/{beside}.npz.*")))
        os.kill(os.getpid(), signal.SIGKILL)
    return worked(device, stack)


def meet(device, stack, folder: Path, number: int):
    """Wait until so many workers are at work."""
    (folder / str(os.getpid())).touch()
    until(lambda: len(list(folder.iterdir())) >= number)
    return worked(device, stack)


def accompany(device, stack, deaths: Path):
    """Be at work when another worker is ended."""
    until(lambda: list(deaths.iterdir()))
    return worked(device, stack, seconds=0.5)


def cut_short(device, stack, shared: Path):
    """Sum what workers share in a file, which the first of them cuts short while it has it mapped."""
    rows = np.ones((64, 4096), np.float32)
    mapped = store.shared_rows(shared, rows.shape, lambda: [rows])
    with contextlib.suppress(FileExistsError):
        (shared.parent / "cut").touch(exist_ok=False)
        os.truncate(shared, 1000)
    return {"sum": np.array([mapped.sum()])}


def kill_at_start(*_):
    """End a worker before it has begun a unit."""
    os.kill(os.getpid(), signal.SIGKILL)


def endless(device, stack, folder: Path):
    """Say who is at work, and never end."""
    (folder / f"{os.getpid()}").touch()
    while True:
        time.sleep(1)


# -- processes --------------------------------------------------------------------------------------------------------


def until(condition: Callable[[], object], seconds: float = 60) -> float:
    """Wait for what must come about; return the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - start


def alive(process: int) -> bool:
    """Return whether a process exists and has not ended, unlike one that waits to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(process: int) -> list[int]:
    """Return the child processes of a process, whichever of its threads has started them."""
    found = []
    for thread in Path(f"/proc/{process}/task").glob("*"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            found += map(int, (thread / "children").read_text().split())
    return found


def workers(process: int) -> list[int]:
    """Return the worker processes of joblib that a process has."""
    found = []
    for child in children(process):
        with contextlib.suppress(OSError):
            found += [child] if b"popen_loky" in Path(f"/proc/{child}/cmdline").read_bytes() else []
    return found
