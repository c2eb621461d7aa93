"""Units of work: each a small file named by a digest of all that it depends on.

A unit whose key has been computed before is read instead of computed: that is how a rerun resumes. A stack that does
not fit the memory is trained in smaller ones and stays one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from experiment import store
from experiment.workers import Task, TaskFailedError


class OutOfMemory(MemoryError):
    """Memory has run out; the message is the library's."""


@contextmanager
def one_memory_error() -> Iterator[None]:
    """Raise `OutOfMemory` for whatever a library raises where memory runs out.

    On a GPU torch has a class for it, numpy raises MemoryError, and torch on a CPU RuntimeError, as for much else.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        on_cpu = type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)  # a class of ours may quote it
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise OutOfMemory(str(error).rstrip(". ")) from error


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

    def save(self, key: dict, arrays: dict[str, np.ndarray]) -> None:
        """Keep the arrays of a unit that is finished."""
        store.save_arrays(self.path(key), arrays)

    def load(self, key: dict, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Return the arrays of a finished unit, or those of the given names only."""
        return store.load_arrays(self.path(key), names)

    def task(self, key: dict, compute: Callable[[list], dict], stack: list, label: str, in_main: bool = False) -> Task:
        """Return the work of ``compute(stack)``; it fails where training diverges or memory runs out.

        Args:
            key: Of the unit.
            compute: From models of the stack to arrays whose first axis is the models.
            stack: The models.
            label: To report smaller stacks.
            in_main: See `Task`.
        """

        def attempt() -> dict[str, np.ndarray]:
            try:
                return _within_memory(compute, stack, label)
            except FloatingPointError as error:
                raise TaskFailedError(str(error)) from error
            except OutOfMemory as error:
                raise TaskFailedError(f"out of memory with one model at a time: {error}") from error

        return Task(self.path(key).exists, lambda: self.save(key, attempt()), in_main)

    def smaller_stack(self, keys: list[dict]) -> int | None:
        """Return the size of the smallest stack that had to be smaller than planned; None where none had.

        Args:
            keys: Of finished units, in this run or an earlier one, with their ``models``.
        """
        sizes = [(int(self.load(key, ["stack"])["stack"].min()), len(key["models"])) for key in keys]
        return min((size for size, planned in sizes if size < planned), default=None)


def _within_memory(compute: Callable[[list], dict], stack: list, label: str) -> dict[str, np.ndarray]:
    """Return the arrays of a stack, trained in smaller ones if need be.

    ``stack`` int64[M] among the arrays is the size of the stack that each model was trained in. Each stack begins
    whole, whatever happened to others: so it does not matter who trains which.
    """
    at_once, start = len(stack), 0
    parts: list[dict[str, np.ndarray]] = []
    while start < len(stack):
        part = stack[start : start + at_once]
        try:
            with one_memory_error():
                parts.append(compute(part) | {"stack": np.full(len(part), at_once)})
            start += len(part)
            continue
        except OutOfMemory:
            if len(part) == 1:
                raise
        torch.cuda.empty_cache()  # here, and not while the exception still holds what was allocated
        at_once = len(part) // 2
        print(f"  {label}: {len(part)} models do not fit the memory: trying {at_once} at once", flush=True)
    return {name: np.concatenate([arrays[name] for arrays in parts]) for name in parts[0]}
