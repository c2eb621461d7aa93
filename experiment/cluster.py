"""Dask clusters: a client of one that is running, and units of work on it.

A scheduler runs the code of whoever reaches it, so that others must not: encryption and keys come from Dask's own
configuration (``DASK_DISTRIBUTED__COMM__TLS__...``), see docs/cluster.md.

Units go through Dask's own client and not through joblib's backend for it: that one waits for ever where Dask gives a
task up, and has this process do the work where there is a single worker (joblib 1.6).
"""

from __future__ import annotations

import ipaddress
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from experiment.settings import UsageError
from experiment.store import ROOT
from experiment.units import LOSSES, Outcome, Unit, notes_of

ANSWER_SECONDS = 30  # until a scheduler has answered
POLL_SECONDS = 0.02  # between looks for finished units
SILENT_SECONDS = 60  # without workers, until that is said


def connect(scheduler: str, insecure: bool) -> object:
    """Return a client of a Dask cluster.

    Args:
        scheduler: Address of its scheduler, or the file that the scheduler has written (``--scheduler-file``).
        insecure: Whether messages may travel between machines unencrypted, open to whoever reaches the scheduler.

    Raises:
        UsageError: There is no such scheduler, Dask is not installed, or the address is not secure.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(f"--scheduler needs Dask ({error}). `pip install -r requirements-cluster.txt`.") from error
    for name in ("distributed", "distributed.client"):  # they print the stack where a connection is lost; we a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    address = _address_of(scheduler)
    _check_secure(scheduler, address, insecure)
    try:
        client = Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
    except (OSError, TypeError, ValueError, RuntimeError) as error:  # of files of keys, and of the connection
        raise UsageError(f"--scheduler {scheduler}: no Dask scheduler answers at {address} ({error}).") from error
    try:  # it may listen to more than this machine, though it is reached from here
        _check_secure(scheduler, client.scheduler_info()["address"], insecure)
    except UsageError:
        client.close()
        raise
    return client


def _address_of(scheduler: str) -> str:
    """Return an address, or read that of a file, which may not be written yet."""
    if "://" in scheduler:
        return scheduler
    path, since = Path(scheduler), time.monotonic()
    while not path.exists() and path.parent.is_dir() and time.monotonic() - since < ANSWER_SECONDS:
        time.sleep(POLL_SECONDS)
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        if not path.exists():
            fault = "neither a file that is there nor an address, such as tls://host:8786"
            raise UsageError(f"--scheduler {scheduler}: {fault}.") from error
        raise UsageError(
            f"--scheduler {scheduler}: neither an address, such as tls://host:8786, nor the file of a Dask scheduler."
        ) from error


def _check_secure(scheduler: str, address: str, insecure: bool) -> None:
    """Refuse an address that others can reach unencrypted.

    Raises:
        UsageError: It is one, or none at all.
    """
    try:
        host = urlsplit(address).hostname or ""
    except ValueError as error:
        raise UsageError(f"--scheduler {scheduler}: {address} is no address ({error}).") from error
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        loopback = host == "localhost"
    if not (insecure or loopback or address.startswith("tls://")):
        raise UsageError(
            f"--scheduler {scheduler}: {address} is not encrypted, and runs the code of whoever reaches it. "
            "Start the cluster with TLS (see docs/cluster.md), or give --insecure-cluster."
        )


def finish_on(client: object, units: list[Unit], task: Callable) -> Iterator[tuple[Path, Outcome] | None]:
    """Yield None when units are handed to a cluster, then their outcomes, in any order.

    Units of workers that are lost go to others, by Dask itself; one that it gives up is handed to it again until as
    many workers as `LOSSES` have been lost at it.

    Raises:
        UsageError: The scheduler cannot import this program.
        OSError: The scheduler is lost.
        Exception: Whatever a unit raised.
    """
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    def submit(unit: Unit) -> object:
        return client.submit(task, unit, key=f"{unit.path.stem}-{secrets.token_hex(4)}", pure=False)

    pending, attempts = {submit(unit): unit for unit in units}, Counter()
    # Without results: it forgets units whose result is lost with a worker, and who are then given up.
    finished, heard = as_completed(list(pending), client.loop), time.monotonic()
    yield None
    try:
        while pending:
            for future in finished.next_batch(block=False):
                unit, heard = pending.pop(future), time.monotonic()
                try:
                    with _named_faults():
                        outcome = future.result()  # waits until it is computed again, where it is lost with a worker
                except KilledWorker:
                    pass
                else:
                    yield outcome
                    continue
                attempts[unit.path] += 1
                lost = max(attempts[unit.path], notes_of(unit.path, task.keywords["notes"]))
                if lost >= LOSSES:
                    yield unit.path, Outcome(failure=f"{unit.label}: each of {lost} workers at it was lost")
                else:
                    pending[again := submit(unit)] = unit
                    finished.add(again)
            if time.monotonic() - heard > SILENT_SECONDS:
                heard = time.monotonic()
                if not client.ncores():
                    hint = f"workers that cannot import the program end at once: PYTHONPATH={ROOT}"
                    print(f"the Dask cluster has no worker: waiting for one ({hint})", flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        client.cancel(list(pending))


@contextmanager
def _named_faults() -> Iterator[None]:
    """Raise what Dask raises for faults of the cluster as errors that say what to do.

    Raises:
        UsageError: The scheduler cannot import this program.
        OSError: The scheduler is lost.
    """
    try:
        yield
    except CancelledError as error:
        raise OSError("the connection to the Dask scheduler is lost") from error
    except RuntimeError as error:
        if "deserialization" not in str(error):
            raise
        fault = f"the Dask scheduler cannot import this program ({error.__cause__ or error})"
        raise UsageError(f"{fault}. Start scheduler and workers with PYTHONPATH={ROOT}.") from error
