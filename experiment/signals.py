"""Signals: they end the program within a second, and worker processes end with the process that started them.

Imports only what takes no time: it is at work before the libraries are imported.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TO_ALL = (signal.SIGINT, signal.SIGUSR1)  # a terminal, or a cluster, sends them to all processes of a job
SYSTEM_COUNTS = Path("/proc/vmstat")  # of Linux, among them how many processes it has ended for want of memory
CONTINUES = "The same command continues where this one stopped."
POLL_SECONDS = 1.0  # between looks for the process that started this one


def end_at_signals(advice: str = CONTINUES) -> None:
    """End this process at `ENDING` signals with a line, also while its main thread is inside a library.

    Python calls a handler in the main thread, when a library has returned to it. But it writes the number of a signal
    to a pipe as it arrives, and a thread reads that.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in ENDING:
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        while (number := os.read(read_end, 1)[0]) not in ENDING:
            pass
        stop(number, advice)

    threading.Thread(target=wait, daemon=True).start()
    # A helper process of joblib outlives this one by a moment and removes temporary folders, with a warning.
    ignored = "ignore:resource_tracker"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), ignored]))


def stop(number: int, advice: str = CONTINUES) -> None:
    """End the process at a signal: at once, as it might at any moment; what was finished is on disk and whole."""
    name = signal.Signals(number).name
    with suppress(OSError):  # nobody may be listening any more
        os.write(2, f"\nStopped by {name}. {advice}".rstrip().encode() + b"\n")
    os._exit(130 if number == signal.SIGINT else 143)


@contextmanager
def unheard_by_children() -> Iterator[None]:
    """Have processes that the body begins never see the signals that a terminal, or a cluster, sends to all of a job.

    They are blocked in this thread, which its children inherit: while these begin they would show where they were
    interrupted. Meanwhile the signals go to another thread of this process.
    """
    from multiprocessing import resource_tracker

    from joblib.externals.loky.backend import resource_tracker as loky_tracker

    for tracker in (loky_tracker, resource_tracker):  # which begin processes of their own, and then unblock signals
        tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: int) -> None:
    """Make this worker process end within two seconds of the process that started it, however that ends.

    Args:
        parent: Process id of the one that started it; it may have ended already.
    """
    from joblib.externals.loky import process_executor

    # Inputs that a worker keeps are no leak of memory, for which loky would start it anew (where psutil is installed).
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize
    for number in TO_ALL:
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:  # not PDEATHSIG: that follows the thread that started this process
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def killed_for_memory() -> int:
    """Return how many processes the system has ended for want of memory, 0 where it does not count them."""
    counts = SYSTEM_COUNTS.read_text() if SYSTEM_COUNTS.exists() else ""
    return int((re.findall(r"^oom_kill (\d+)$", counts, re.M) or [0])[0])
