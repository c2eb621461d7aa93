"""Steps of training that a GPU repeats from a recording: all their kernels as one CUDA graph.

Starting some hundred small kernels from Python takes longer than most of them take: 7 microseconds each on an H100,
1 in a recording. On a CPU a step is called as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

capturing = threading.Lock()  # held while a thread records: a process records one step at a time
of_thread = threading.local()  # ``graph``: the last one that a thread recorded


class Recorded:
    """A function without arguments that a GPU records at its second call, and from then on repeats.

    The function must find its inputs and leave its results in the same tensors at each call, and look at no number.
    Its first call runs as it is, so that libraries make ready and what is kept from step to step is there. What else
    it depends on must not change: make another one where it does.

    Args:
        function: Does a step.
        device: Where.
        generators: Those of the device that the function draws from. A repetition goes on where they are, so they may
            be seeded anew between two calls.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, generators: Sequence[torch.Generator] = ()):
        self.function, self.generators = function, generators
        self.records = is_recorded(device)
        self.begun = False
        self._repeat: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Do the step."""
        if not self.records or not self.begun:
            self.begun = True
            self.function()
            return
        if self._repeat is None:
            try:
                self._repeat = record(self.function, self.generators)
            except torch.OutOfMemoryError:  # memory that is kept for reuse cannot be given back during a recording
                self.records = False
                self.function()
                return
        self._repeat()


def is_recorded(device: torch.device) -> bool:
    """Return whether steps on a device are recorded."""
    return device.type == "cuda"


def record(function: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
    """Record a function as a CUDA graph on this thread's stream, which must not be the default one; return its replay.

    Other threads may go on meanwhile, but must not wait for the whole device: see `capturing`. The recordings of a
    thread share the memory of what lives within a step only, so they must not be repeated by two threads at once. The
    last graph is kept for the sake of that memory: given back, it would not be found again before the device is full,
    and while a thread records nothing can be given back.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    last = getattr(of_thread, "graph", None)
    with capturing:
        graph.capture_begin(None if last is None else last.pool(), capture_error_mode="thread_local")
        try:
            function()
        except BaseException:
            with suppress(RuntimeError):  # of a recording that broke off; the first error says why
                graph.capture_end()
            raise
        graph.capture_end()
        of_thread.graph = graph  # the last one may end here, so under the lock
        del last
    return graph.replay
