"""A collection in the making, and what everything that is written to disk shares: whole files, locks, progress.

A file is written beside its place and then renamed over it, so a reader or a crash sees all of it or nothing. A folder
of many LoRAs is built as ``<out>.partial`` and renamed when it is whole; after a kill the next build continues there.
Locks keep processes of one user out of each other's way; they are no protection from a hostile one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TextIO

from tqdm import tqdm

from loras import small_files
from loras.names import plain

WEIGHTS_NAME, METADATA_NAME = "pytorch_lora_weights.safetensors", "metadata.json"  # of a LoRA that is built here
IMPORT_NAME = "import.json"  # the record of a published collection that is imported
TEMPORARY = re.compile(r"^\..*\.[0-9a-f]{8}$")  # the name of a file while it is written
STALE_SECONDS = 3600  # a temporary file of this age is no longer being written
MAX_HOLDER_BYTES = 200  # of the line in a lock file
MAX_RECORD_BYTES = 2**28  # of a JSON document that this program has written
FIRST_SECONDS, LOG_SECONDS = 10, 60  # until a line of a stage's progress in a log file, and between such lines
SETTLED_SECONDS = 1.0  # of a stage, in which finished work of an earlier run is reported
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


# ----------------------------------------------------------------------------------------------------------------------
# Whole files
# ----------------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees all of it or nothing."""
    with written_atomically(path) as file:
        file.write(data)


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside ``path`` that replaces it when the body ends; it is removed when the body fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _named_in_errors(path):
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # else a crash of the machine could leave the new name with old or no content
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Add a path to the errors of the system that name no file: a full disk, a failing read."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def canonical_json(value: object, indent: int | None = None) -> bytes:
    """Return strict JSON (no NaN, no Infinity) with keys in the order given, the same bytes for equal values."""
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # half a surrogate pair becomes its JSON escape


def read_object(path: Path) -> dict | None:
    """Return the JSON object in a file; None where the file is absent, holds something else, or is no plain file.

    Raises:
        OSError: The file cannot be read; the error names it. A caller that waits for the file would wait for ever.
    """
    try:
        with _named_in_errors(path):
            return small_files.read_object(path, MAX_RECORD_BYTES)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def fault_of(error: OSError) -> str:
    """Return the path and what is wrong with it, without a full stop."""
    system = error.filename is not None and error.strerror is not None
    return f"{error.filename}: {error.strerror}" if system else str(error).rstrip(".")


def remove_temporaries(folder: Path, age: float = STALE_SECONDS) -> None:
    """Remove the temporary files below a folder that killed processes left more than ``age`` seconds ago."""
    for path in folder.rglob(".*"):
        with suppress(FileNotFoundError):  # another process may remove it too
            if TEMPORARY.search(path.name) and path.is_file() and time.time() - path.stat().st_mtime > age:
                path.unlink()


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; afterwards remove those that were made here and are empty."""
    new = [path for path in (folder, *folder.absolute().parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in new:
            with suppress(OSError, ValueError):  # not empty, already removed, or no path that there can be
                path.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# Locks
# ----------------------------------------------------------------------------------------------------------------------


class LockedError(RuntimeError):
    """A lock that another process holds; the message names it."""


_lock_files: set[BinaryIO] = set()  # of the locks that this process holds


def _release_after_fork() -> None:
    """Close the lock files in a forked process, which would otherwise hold the locks until it too has ended."""
    for file in _lock_files:
        file.close()


os.register_at_fork(after_in_child=_release_after_fork)


@contextmanager
def locked(path: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock file, which the system releases when the process ends, however it ends.

    Args:
        path: The lock file; removed afterwards.
        wait: Called with the holder before waiting for it; None: do not wait.

    Raises:
        LockedError: Another process holds it.
        OSError: A link or a device lies at its path, or it cannot be made.
    """
    with made(path.parent):
        file = _open_locked(path, wait)
        try:
            file.seek(0)
            file.truncate()
            started = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(f"process {os.getpid()} on {platform.node()}, since {started}".encode())
            file.flush()
            _lock_files.add(file)
            yield
        finally:
            path.unlink(missing_ok=True)
            _lock_files.discard(file)
            file.close()


def _open_locked(path: Path, wait: Callable[[str], None] | None) -> BinaryIO:
    """Open and lock a file, and make sure that it still has its name when the lock is ours."""
    while True:
        try:
            file = _open_lock_file(path)
        except FileNotFoundError:  # its holder had made the folder, and has just removed it
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            if wait is None:
                file.close()
                raise LockedError(holder) from None
            wait(holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            # A file system without locks: two processes may do the same work, but files are written whole.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                return file
        file.close()  # its holder has just removed it, and others would lock a new one of that name


def _open_lock_file(path: Path) -> BinaryIO:
    """Open a lock file, or make it; never what a link in its place leads to, which would be emptied."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "a link in the place of a lock file; remove it", os.fspath(path)) from error
    file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "a pipe or a device in the place of a lock file; remove it", os.fspath(path))
    return file


def _holder(file: BinaryIO) -> str:
    """Return the text with which the holder of a lock file names itself; it may be about to write it."""
    for _ in range(20):
        file.seek(0)
        if holder := file.read(MAX_HOLDER_BYTES).decode(errors="replace").strip():
            return plain(holder)
        time.sleep(0.05)
    return "another process"


# ----------------------------------------------------------------------------------------------------------------------
# A collection in the making
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def partial_folder(
    out: Path, check: Callable[[Path], object], wait: Callable[[str], None] | None = None
) -> Iterator[Path | None]:
    """Yield ``<out>.partial``, held by this process alone, and rename it to ``out`` when the body ends.

    Where `holds_something` is true of ``out`` once the lock is held, None is yielded and nothing is made or renamed:
    another process may have finished the collection since the caller looked.

    What an earlier build left there stays, less its temporary files; the body completes it. When the body fails before
    any LoRA is written, the folder is removed, and so are the parents that were made for it.

    Args:
        out: The collection.
        check: Called with the partial folder where it holds something; raises where that is no part of this build.
        wait: Called with another process that is building there, before waiting for it; None: do not wait.

    Raises:
        LockedError: Another process is building there.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        with locked(out.with_name(f".{out.name}.lock"), wait):
            if holds_something(out):
                yield None
                return
            partial.mkdir(parents=True, exist_ok=True)
            if any(not TEMPORARY.search(path.name) for path in partial.iterdir()):
                check(partial)
            remove_temporaries(partial, age=-math.inf)  # whatever the clock of the file system says
            try:
                yield partial
            except BaseException:
                if not any(path.is_dir() for path in partial.iterdir()):
                    shutil.rmtree(partial)
                raise
            partial.rename(out)
    except LockedError as error:
        raise LockedError(f"{partial}: {error} is at work there. Wait for it, or end it.") from None


def holds_something(out: Path) -> bool:
    """Return whether a path is taken by anything but an empty folder; a link to nowhere takes it too."""
    return os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir()))


def write_lora(folder: Path, metadata: bytes, weights: bytes) -> None:
    """Write the two files of a LoRA; the weights come last, so that a folder with weights is whole."""
    write_atomically(folder / METADATA_NAME, metadata)
    write_atomically(folder / WEIGHTS_NAME, weights)


class Progress:
    """The progress of a stage, and about how long the rest takes: a bar on a terminal, in a log file a line at times.

    Args:
        shown: Whether it is shown at all.
        log: The file for the plain lines, standard output where none is given.
    """

    def __init__(self, shown: bool = True, log: TextIO | None = None):
        self.shown, self.log = shown, log
        self.stage = ""
        self.bar: tqdm | None = None
        self.last_line = time.monotonic()
        self._begun, self._due = 0.0, 0.0  # of the stage, and seconds until its next line
        self._since: tuple[float, float | None] = (0.0, None)  # from when, and which share, its speed is counted

    def __call__(self, stage: str, done: int, total: int | None, share: float | None = None) -> None:
        """Show that ``done`` of ``total`` steps of a stage are finished; None: nobody knows how many there are.

        ``share`` is the part of the work that these steps are, in [0, 1]; None: all steps are alike.
        """
        if not self.shown:
            return
        now = time.monotonic()
        if share is None and total:
            share = done / total
        if stage != self.stage:
            self.stage, self._begun, self._due = stage, now, FIRST_SECONDS
            self._since = now, share
        elif now - self._begun < SETTLED_SECONDS:  # what is reported at once was there before: it shows no speed
            self._since = now, share
        left = self._left(now, share)
        if sys.stderr.isatty():
            self._draw(done, total, left)
        elif done != total and now - max(self.last_line, self._begun) > self._due:
            self.last_line, self._due = now, LOG_SECONDS
            count = f"{done}" if total is None else f"{done} of {total}"
            print(f"  {stage}: {count}{left and f', {left}'}", file=self.log, flush=True)
        if done == total:
            self.stage = ""

    def _left(self, now: float, share: float | None) -> str:
        """Return about how long the rest takes, in words; empty where nothing shows it."""
        start, first = self._since
        if share is None or first is None or share <= first or share >= 1 or now <= start:
            return ""
        return f"{duration((now - start) * (1 - share) / (share - first))} left"

    def _draw(self, done: int, total: int | None, left: str) -> None:
        if self.bar is None or self.bar.desc != self.stage:
            self._close()
            how = {"bar_format": BAR} if total else {}
            self.bar = tqdm(total=total, desc=self.stage, leave=False, **how)
        self.bar.set_postfix_str(left, refresh=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None

    def track(self, items: Iterable, stage: str) -> Iterator:
        """Yield the items and show how many are done."""
        items = list(items)
        for done, item in enumerate(items):
            self(stage, done, len(items))
            yield item
        self(stage, len(items), len(items))


def duration(seconds: float) -> str:
    """Return about how many seconds, as people say them, to about one digit."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 85:
        return f"about {round(seconds, -1 if seconds > 15 else 0):.0f} s"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    hours = seconds / 3600
    return f"about {hours:.1f} h" if hours < 48 else f"about {round(hours / 24)} days"


def say(line: str = "") -> None:
    """Print a line at once, also into a log file and above a bar."""
    with tqdm.external_write_mode():
        print("\n".join(map(plain, line.split("\n"))), flush=True)
