"""Threads of this process that work: each on one device, and on a GPU on a stream of its own.

Several threads share a GPU, whose small kernels run side by side. Streams do not wait for each other: what a thread has
computed is handed on when its stream is done. On the default stream no step could be recorded, see `training.recorded`.
torch has 32 streams for a GPU, which it gives out in turn.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial

import torch

from training.recorded import capturing
from training.stacks import start_thread

_of_thread = threading.local()  # device and stream that this thread is prepared for


def call_on(device: torch.device, function: Callable[[], object]) -> object:
    """Return what a function gives in this thread, which is prepared for the device when it is first used.

    Also where the function fails its stream is done when this returns.
    """
    if getattr(_of_thread, "device", None) != device:
        with capturing:
            start_thread(device)
            _of_thread.stream = set_own_stream(device)
        _of_thread.device = device
    try:
        return function()
    finally:
        if _of_thread.stream is not None:
            _of_thread.stream.synchronize()


def set_own_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Make a stream of a GPU, and have this thread work on it from now on; None on a CPU, which has none.

    What cuBLAS and linear algebra need is made too, while no other thread records.
    """
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError):  # where there is no memory now, the first product makes it
        torch.cuda.current_blas_handle()
        _load_linear_algebra(device)
    return stream


@cache
def _load_linear_algebra(device: torch.device) -> None:
    """Have torch load its library, as it does at the first call, and fails to where two threads make that at once."""
    torch.linalg.eigh(torch.eye(2, device=device))


class Threads:
    """Threads that last, begun when there is work for them.

    They are daemons: a process that ends by an error does not wait for what they are at, as it would for the threads
    of `concurrent.futures`; on a GPU `wait` does.

    Args:
        devices: The device of each.
    """

    def __init__(self, devices: Sequence[torch.device]):
        self.devices = devices
        self._calls: queue.SimpleQueue[Callable[[torch.device], None] | None] = queue.SimpleQueue()
        self._begun: list[threading.Thread] = []

    def begin(self, count: int) -> None:
        """Begin as many threads as that, or all that there are to be."""
        for device in self.devices[len(self._begun) : count]:
            thread = threading.Thread(target=_serve, args=(self._calls, device), daemon=True)
            thread.start()
            self._begun.append(thread)

    def put(self, call: Callable[[torch.device], None]) -> None:
        """Have a thread call this with its device, after what was put before."""
        self._calls.put(call)

    def close(self) -> None:
        """Have all threads end when they are done with what they are at."""
        with suppress(queue.Empty):
            while True:  # what nobody waits for any more
                self._calls.get_nowait()
        for _ in self._begun:
            self._calls.put(None)

    def wait(self) -> None:
        """Wait for the threads of GPUs, which have been told to end.

        A process that ends while one of its threads is inside of CUDA's libraries ends by SIGABRT.
        """
        for thread, device in zip(self._begun, self.devices, strict=False):
            if device.type == "cuda":
                thread.join()
        self._begun = []


def _serve(calls: queue.SimpleQueue, device: torch.device) -> None:
    """Make calls until there is None."""
    while (call := calls.get()) is not None:
        call(device)
        del call  # it may hold much


@dataclass(frozen=True)
class Work:
    """Items for threads, of which each is given to ``function(item, device=...)``, and at most ``at_once`` at once."""

    threads: Threads
    function: Callable
    items: Sequence
    at_once: int


def outcomes_of(*works: Work) -> Iterator:
    """Yield what the functions give, in any order, as soon as it is there; closing the generator stops the rest.

    Raises:
        BaseException: Whatever a function raised; items that are not begun by then are dropped.
    """
    outcomes: queue.SimpleQueue[tuple[object, BaseException | None]] = queue.SimpleQueue()
    left = [deque(work.items) for work in works]
    try:
        for work, items in zip(works, left, strict=True):
            at_once = min(work.at_once, len(items), len(work.threads.devices))
            work.threads.begin(at_once)
            for _ in range(at_once):
                work.threads.put(partial(_next, work, items, outcomes))
        for _ in range(sum(len(work.items) for work in works)):
            outcome, error = outcomes.get()
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # the traceback holds this frame, and all that the function had
            yield outcome
    finally:
        for items in left:
            items.clear()


def _next(work: Work, items: deque, outcomes: queue.SimpleQueue, device: torch.device) -> None:
    """Do the next item of a work, if one is left, and have another thread do the one after."""
    try:
        item = items.popleft()
    except IndexError:
        return
    try:
        outcomes.put((call_on(device, partial(work.function, item, device=device)), None))
    except BaseException as error:
        items.clear()
        outcomes.put((None, error))
    if items:
        work.threads.put(partial(_next, work, items, outcomes))


class Permits:
    """Permits to work on a device, many at once or one alone: a readers-writer lock that prefers writers.

    A thread takes its permit before any lock, and never a second one.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._at_work, self._alone, self._waiting = 0, False, 0

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """Hold a permit that others may have too."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._at_work -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the only permit, when those who have one are done."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._alone and not self._at_work)
                self._alone = True
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


_permits: dict[str, Permits] = {}


def permits_of(device: torch.device) -> Permits:
    """Return the permits of a device, which the threads of this process share."""
    return _permits.setdefault(str(device), Permits())
