"""Values that the threads of a device share, each made by one of them, and raw weights that stay on a GPU.

Each thread of a GPU has a stream of its own, and streams do not wait for each other. Hence two rules:

1. What one thread makes and others read is complete before they get it: the maker waits for its stream (`Once`).
2. The stream that made a tensor may write to its memory as soon as no Python object refers to it. So what is shared is
   dropped where no unit is at work (``release``), or stays referred to by the units that read it (evicted by
   `Latest`): a unit ends with copies of its results to the host, which wait for its stream; one that fails may read
   what was written since, but its numbers are not used.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiment import store
from experiment.settings import memory_of
from training.memory import is_out_of_memory
from training.stacks import filled, wait_for_stream

# Of a device's memory that raw weights may take: with the standardised ones beside them half of a GPU, and units of its
# four threads have the other half. On a CPU reading is cheap.
RAW_SHARE = {"cpu": 0.0, "cuda": 0.25}


class Once:
    """A value that the first thread to ask for it makes, while others that ask wait; one that failed is tried again.

    It is told at each `get` how to make it: were that kept, an owner whose method makes it would be part of a cycle,
    and stay on the device, with all that was read, until Python looks for cycles.

    Args:
        device: Where its tensors lie.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._lock = threading.Lock()
        self._made: list[Any] = []

    def get(self, make: Callable[[], Any]) -> Any:
        """Return the value, made if it is not there."""
        with self._lock:
            if not self._made:
                value = make()
                wait_for_stream(self.device)
                self._made.append(value)
            return self._made[0]

    def clear(self) -> None:
        """Let go of the value, where no unit is at work; it is made again where it is asked for."""
        with self._lock:
            self._made.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the value, if it is a tensor that has been made."""
        return sum(getattr(value, "nbytes", 0) for value in self._made)


class Latest:
    """A cache of the values asked for last (LRU), each made by one thread, while others go on with what is there.

    Args:
        device: Where their tensors lie.
        kept: Values kept at most.
        memory: Bytes of tensors that are kept at most beside the latest.
    """

    def __init__(self, device: torch.device, kept: int, memory: float = math.inf):
        self.device, self.kept, self.memory = device, kept, memory
        self._lock = threading.Lock()
        self._values: dict[Hashable, Once] = {}  # the latest last

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value of a key, made if it is not kept."""
        with self._lock:
            once = self._values.pop(key, None) or Once(self.device)
            while self._values and (len(self._values) >= self.kept or self._nbytes() > self.memory):
                del self._values[next(iter(self._values))]
            self._values[key] = once
        return once.get(make)

    def _nbytes(self) -> int:
        return sum(once.nbytes for once in self._values.values())

    def clear(self) -> None:
        """Let go of all values, where no unit is at work."""
        with self._lock:
            self._values.clear()


class Raw:
    """Packed weights float32[N, W], or their sketches, as tensors on a device.

    Where they fit a GPU all are read once, in the order in which they are stored, and stay there for all that is
    learned from them; else each read is one of the stored ones. The numbers are the same.

    Args:
        packed: Opens the stored ones.
        device: Where tensors are to lie.
        share: Of the device's memory that they may take; None: `RAW_SHARE`.
    """

    def __init__(self, packed: Callable[[], store.Shards], device: torch.device, share: float | None = None):
        self.device, self.share = device, RAW_SHARE[device.type] if share is None else share
        self._packed = packed
        self._stored, self._held = Once(device), Once(device)

    @property
    def shape(self) -> tuple[int, int]:
        """N and W."""
        return self._open().shape

    def _open(self) -> store.Shards:
        return self._stored.get(self._packed)

    def _hold(self) -> Tensor | None:
        if not self.share or 4 * math.prod(self.shape) > self.share * memory_of(self.device):
            return None
        try:
            return filled(self.shape, lambda: map(torch.from_numpy, self._open().blocks()), self.device)
        except (MemoryError, RuntimeError) as error:  # others may use the device too
            if not is_out_of_memory(error):
                raise
            return None

    def read(self, rows: np.ndarray | None = None, columns: slice | np.ndarray | None = None) -> Tensor:
        """Return rows and columns as `store.Shards.read` does, float32[n, w], perhaps a view: not to be written to."""
        x = self._held.get(self._hold)
        if x is None:
            return torch.from_numpy(self._open().read(rows, columns)).to(self.device)
        if isinstance(columns, slice):
            x = x[:, columns]
        if rows is not None:
            x = x.index_select(0, torch.as_tensor(rows).to(self.device))
        return x.index_select(1, torch.as_tensor(columns).to(self.device)) if isinstance(columns, np.ndarray) else x

    def forget(self) -> None:
        """Give back the memory, where no unit is at work; it is read again where it is asked for."""
        self._held.clear()
        self._stored.clear()
