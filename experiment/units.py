"""Units of work: each a small file named by a digest of all that it depends on.

A unit whose key has been computed before is read instead of computed: that is how a rerun resumes. A stack that does
not fit the memory is trained in smaller ones and stays one unit.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from data import CollectionError
from experiment import store
from experiment.settings import UsageError, have_repeatable_products
from experiment.threads import call_on, permits_of
from training.memory import is_out_of_memory
from training.recorded import release_memory

PROGRAM = ("autoencoders", "data", "representations", "experiment", "loras", "training")  # of which workers run
LOSSES = 3  # of workers at a unit, after which it is given up
LARGE = 2**24  # bytes of a unit's arrays, from which on whoever computes them writes the file


class OutOfMemory(MemoryError):
    """Memory has run out; the message is the library's."""


@contextmanager
def one_memory_error() -> Iterator[None]:
    """Raise `OutOfMemory` for whatever a library raises where memory runs out; see `is_out_of_memory`."""
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error).rstrip(". ")) from error


# What a training, a control, a question or a figure can fail by, through the numbers that it is given: memory, and what
# numpy, scipy, scikit-learn (LibSVM, LogisticRegression), torch and matplotlib raise for numbers that they cannot use.
# No mistake of the program is one, such as AssertionError, TypeError, LookupError or ZeroDivisionError: these end it.
FAILURES = (OutOfMemory, FloatingPointError, OverflowError, ValueError, torch.linalg.LinAlgError)
FAULTS = (UsageError, CollectionError)  # of what was given: they are ValueErrors, and no failures


def reason_of(failure: Exception) -> str:
    """Return why something failed, in a line."""
    said = " ".join(str(failure).split()) or type(failure).__name__
    return f"out of memory: {said}" if isinstance(failure, OutOfMemory) else said


class Openable(Protocol):
    """A small description of inputs, which any worker opens from the cache folder."""

    def open(self, device: torch.device) -> object:
        """Return what `Unit.compute` reads, on a device."""

    def forget(self, device: torch.device) -> None:
        """Give back what is kept on a device where no unit is at work; it is read again where it is asked for."""


# From opened inputs and models of the stack to arrays whose first axis is the models.
Compute = Callable[[object, list], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Unit:
    """A unit of work, small and picklable: ``compute`` is a function, or a partial of one, importable by name.

    Attributes:
        path: The file that is there when it is finished.
        description: Of the inputs.
        compute: Computes the arrays.
        stack: The models.
        label: Names it in messages.
        in_main: Whether the main process computes it: it shares with others what it keeps in memory (kernels).
    """

    path: Path
    description: Openable
    compute: Compute
    stack: list
    label: str
    in_main: bool = False

    def attempt(self, device: torch.device) -> Outcome:
        """Compute the arrays on a device; it fails where training diverges, or by others of `FAILURES`."""

        def compute(part: list) -> dict[str, np.ndarray]:
            return self.compute(self.description.open(device), part)

        try:
            arrays = _within_memory(compute, self.stack, device, partial(self.description.forget, device))
        except FAULTS:
            raise
        except OutOfMemory as error:
            return Outcome(failure=f"out of memory with one model at a time: {error}")
        except FAILURES as error:
            return Outcome(failure=reason_of(error))
        at_once = int(arrays["stack"].min())
        if sum(array.nbytes for array in arrays.values()) < LARGE:
            return Outcome(arrays, at_once=at_once)
        store.save_arrays(self.path, arrays)
        return Outcome(at_once=at_once)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a unit.

    Attributes:
        arrays: None where they are written already, or there are none.
        failure: The reason why there are none; else empty.
        at_once: Models in the smallest stack that were trained at once; None where it failed.
    """

    arrays: dict[str, np.ndarray] | None = None
    failure: str = ""
    at_once: int | None = None


def notes_of(path: Path, notes: Path) -> int:
    """Return how many workers have begun the unit of a file and not done it, given the folder of their notes."""
    return len(list(notes.glob(f"{path.name}.*")))


def finish(unit: Unit, notes: Path, device: torch.device) -> tuple[Path, Outcome]:
    """Do a unit on a device, and note that it is being done meanwhile; return its path and outcome."""
    note = notes / f"{unit.path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    note.write_text(unit.label)
    try:
        return unit.path, unit.attempt(device)
    finally:
        note.unlink(missing_ok=True)


def finish_elsewhere(unit: Unit, notes: Path, kind: str, program: str) -> tuple[Path, Outcome]:
    """Do a unit in a worker process, on its CPU or, as it sees but one, its GPU.

    Args:
        unit: The unit.
        notes: Folder of notes.
        kind: Of the device, "cpu" or "cuda".
        program: Of the main process, as `program_digest` gives it.

    Raises:
        UsageError: This worker is of another program, sees no GPU, or not the files of the run.
    """
    here = socket.gethostname()
    if program != program_digest():
        raise UsageError(f"the worker on {here} has another version of this program, or of torch. Start all again.")
    if not notes.is_dir():
        raise UsageError(
            f"the worker on {here} does not see {notes.parent}. Give a --cache-dir that all machines share."
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"the worker on {here} sees no GPU. Start workers that do, or give --device=cpu.")
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        have_repeatable_products()

    def finish_here() -> tuple[Path, Outcome]:
        with threadpool_limits(1):
            return finish(unit, notes, device)

    return call_on(device, finish_here)


@cache
def program_digest() -> str:
    """Return a digest of the program that units are computed by."""
    return store.digest([store.code_digest(*PROGRAM), torch.__version__])


class Units:
    """Finished units of work in a folder.

    Args:
        folder: Where they lie.
        common: What every unit depends on beside its own key.
    """

    def __init__(self, folder: Path, common: dict | None = None):
        self.folder, self.common = folder, common or {}

    def path(self, key: dict) -> Path:
        """Return where the unit of this key lies, finished or not."""
        return self.folder / f"{key['kind']}-{store.digest(self.common | key)}.npz"

    def load(self, key: dict, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Return the arrays of a finished unit, or those of the given names only."""
        return store.load_arrays(self.path(key), names)

    def unit(
        self, key: dict, description: Openable, compute: Compute, stack: list, label: str, in_main: bool = False
    ) -> Unit:
        """Return the unit of this key; the other arguments are its attributes."""
        return Unit(self.path(key), description, compute, stack, label, in_main)

    def smaller_stack(self, keys: list[dict]) -> int | None:
        """Return the size of the smallest stack that had to be smaller than planned; None where none had.

        Args:
            keys: Of finished units, in this run or an earlier one, with their ``models``.
        """
        sizes = [(int(self.load(key, ["stack"])["stack"].min()), len(key["models"])) for key in keys]
        return min((size for size, planned in sizes if size < planned), default=None)


def _within_memory(
    compute: Callable[[list], dict], stack: list, device: torch.device, forget: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Return the arrays of a stack, trained in smaller ones if need be.

    Where memory runs out beside others on a GPU, the stack is done again with nothing beside it, and nothing kept there
    that others have read: what happened to be at work, or was before, decides no size.
    """
    if device.type == "cpu":
        return _in_parts(compute, stack)
    permits = permits_of(device)
    with suppress(OutOfMemory), permits.beside_others():
        return _computed(compute, stack, len(stack))
    with permits.alone():
        forget()
        release_memory()
        return _in_parts(compute, stack)


def _in_parts(compute: Callable[[list], dict], stack: list) -> dict[str, np.ndarray]:
    """Return the arrays of a stack, of smaller ones where it does not fit the memory.

    ``stack`` int64[M] among the arrays is the size of the stack that each model was trained in. Each stack begins
    whole, whatever happened to others: so it does not matter who trains which.
    """
    at_once, start = len(stack), 0
    parts: list[dict[str, np.ndarray]] = []
    while start < len(stack):
        part = stack[start : start + at_once]
        try:
            parts.append(_computed(compute, part, at_once))
            start += len(part)
            continue
        except OutOfMemory:
            if len(part) == 1:
                raise
        release_memory()  # here, and not while the exception still holds what was allocated
        at_once = len(part) // 2
    return {name: np.concatenate([arrays[name] for arrays in parts]) for name in parts[0]}


def _computed(compute: Callable[[list], dict], part: list, at_once: int) -> dict[str, np.ndarray]:
    with one_memory_error():
        return compute(part) | {"stack": np.full(len(part), at_once)}
