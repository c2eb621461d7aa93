"""Dask clusters: a client of one that is running. A scheduler runs whatever reaches it, so that others must not.

Encryption and keys come from Dask's own configuration (``DASK_DISTRIBUTED__COMM__TLS__...``); see docs/cluster.md.
"""

from __future__ import annotations

import ipaddress
import json
import logging
from pathlib import Path
from urllib.parse import urlsplit

from experiment.settings import UsageError

ANSWER_SECONDS = 30  # until a scheduler has answered


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
    protocol, host = address.split("://")[0], urlsplit(address).hostname
    if protocol != "tls" and not (insecure or _is_loopback(host)):
        raise UsageError(
            f"--scheduler {scheduler}: {address} is not encrypted, and runs the code of whoever reaches it. "
            "Start the cluster with TLS (see docs/cluster.md), or give --insecure-cluster."
        )
    try:
        return Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
    except (OSError, TypeError, ValueError, RuntimeError) as error:  # of files of keys, and of the connection
        raise UsageError(f"--scheduler {scheduler}: no Dask scheduler answers at {address} ({error}).") from error


def _address_of(scheduler: str) -> str:
    if "://" in scheduler:
        return scheduler
    path = Path(scheduler)
    try:
        return json.loads(path.read_text(encoding="utf-8"))["address"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"--scheduler {scheduler}: neither an address, such as tls://host:8786, nor the file of a Dask scheduler."
        ) from error


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def lost_worker_error() -> type[Exception]:
    """Return the error of a unit at which Dask has lost several workers."""
    from distributed.scheduler import KilledWorker  # takes a second to import

    return KilledWorker
