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
from contextlib import suppress
from pathlib import Path

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SYSTEM_COUNTS = Path("/proc/vmstat")  # of Linux, among them how many processes it has ended for want of memory
POLL_SECONDS = 1.0  # between looks for the process that started this one


def end_at_signals() -> None:
    """End this process at `ENDING` signals, also while its main thread is inside a library.

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
        stop(number)

    threading.Thread(target=wait, daemon=True).start()
    # A helper process of joblib outlives this one by a moment and removes temporary folders, with a warning.
    ignored = "ignore:resource_tracker"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), ignored]))


def stop(number: int) -> None:
    """End the process at a signal: at once, as it might at any moment; what was finished is on disk and whole."""
    name = signal.Signals(number).name
    with suppress(OSError):  # nobody may be listening any more
        os.write(2, f"\nStopped by {name}. The same command continues where this one stopped.\n".encode())
    os._exit(130 if number == signal.SIGINT else 143)


def end_with(parent: int) -> None:
    """Make this worker process end within two seconds of the process that started it, however that ends.

    Args:
        parent: Process id of the one that started it; it may have ended already.
    """
    from joblib.externals.loky import process_executor

    # Inputs that a worker keeps are no leak of memory, for which loky would start it anew (where psutil is installed).
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize
    for number in (signal.SIGINT, signal.SIGUSR1):  # a terminal, or a cluster, sends them to all processes of a job
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
