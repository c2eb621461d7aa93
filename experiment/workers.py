"""Workers: threads of one process, or of several that torchrun has started, which take tasks in turn.

A task leaves a file behind, and by that file every process knows that it is finished. So a job goes on where a killed
one stopped, and the messages between processes are small: the number of the next task, and what cannot be done.

Training is thousands of small steps, and Python runs one at a time in a process: threads that train on a CPU wait for
each other. So there, where there are several and the system is Linux, each thread has a `WorkerProcess`.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed
from torch.distributed import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from experiment.settings import UsageError

POLL_SECONDS = 0.1  # between looks for what other processes do
FILE_SYSTEM_SECONDS = 120  # until every machine sees a new file
BEAT_SECONDS = 5.0  # between signs of life
SILENT_SECONDS = 300.0  # without a sign of life, and a process is taken for lost
THREAD_LIST = Path("/proc/self/task")  # the system's own list of the threads of this process


class TaskFailedError(RuntimeError):
    """A task that no process can do, though others can be done; the message says why."""


class FaultElsewhereError(RuntimeError):
    """A fault of rank 0, which reports it."""


@dataclass(frozen=True)
class Task:
    """Work that leaves files behind: ``finished()`` looks for them, ``run()`` writes them.

    ``in_main`` keeps it from a `WorkerProcess`: it leaves something in memory for other tasks (kernels), or consists of
    few large steps, which let each other run (the pass over files).
    """

    finished: Callable[[], bool]
    run: Callable[[], None]
    in_main: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# Processes that train for threads
# ----------------------------------------------------------------------------------------------------------------------


class WorkerProcess:
    """A process that does tasks for one thread: a copy of this process as it was at the start of the job.

    It ends when it is asked to, or when this process does, however that ends.

    Args:
        tasks: Of the job.
        prepare: Called first.
        lifeline: A pipe, of which this process alone holds the end to write to and never does.
    """

    def __init__(self, tasks: Sequence[Task], prepare: Callable[[], None], lifeline: tuple[int, int]):
        forked = multiprocessing.get_context("fork")
        self.connection, other_end = forked.Pipe()
        self.process = forked.Process(target=self._serve, args=(tasks, prepare, lifeline, other_end), daemon=True)
        self.process.start()
        other_end.close()  # so that it is closed when the process has ended

    def run(self, task: int) -> None:
        """Have a task done.

        Raises:
            Exception: Whatever it raised, raised again here.
            OSError: The process has ended.
        """
        try:
            self.connection.send(task)
            error = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            if code == -signal.SIGKILL:
                how += ", as where memory runs out: fewer threads (OMP_NUM_THREADS) take less"
            raise OSError(f"a process that trained has ended {how}") from None
        if error is not None:
            raise error

    def end(self) -> None:
        """Ask it to end, and wait until it has."""
        with suppress(OSError):  # it has ended before
            self.connection.send(None)
        self.process.join()
        self.connection.close()

    def _serve(
        self, tasks: Sequence[Task], prepare: Callable[[], None], lifeline: tuple[int, int], connection: Connection
    ) -> None:
        """Do tasks by their numbers, each answered by None or by what it raised."""
        for number in (signal.SIGINT, signal.SIGUSR1):  # a terminal, or a cluster, sends them to all processes of a job
            signal.signal(number, signal.SIG_IGN)  # this one ends with the first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(lifeline[1])

        def end_with_parent() -> None:
            os.read(lifeline[0], 1)  # until there is nobody to write
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
        prepare()
        while (task := connection.recv()) is not None:
            try:
                tasks[task].run()
            except BaseException as error:  # raised again by `run`
                _send(connection, error)
            else:
                connection.send(None)


def _send(connection: Connection, error: BaseException) -> None:
    """Send an exception to another process, with the traceback of this one as a note."""
    note = f"\nin a process that trained:\n{''.join(traceback.format_exception(error))}"
    try:
        copied = copy.copy(error)  # made anew, as it will be there
        copied.add_note(note)
        connection.send(copied)
    except Exception:  # whatever a class raises that cannot be made anew, or is not known there
        message = RuntimeError(repr(error))
        message.add_note(note)
        connection.send(message)


@contextmanager
def worker_processes(count: int, tasks: Sequence[Task], prepare: Callable[[], None]) -> Iterator[list[WorkerProcess]]:
    """Start processes, before there are threads: a copy would find their locks locked for ever."""
    with ExitStack() as ending:
        lifeline = os.pipe()
        for end in lifeline:
            ending.callback(os.close, end)
        processes = []
        for _ in range(count):
            processes.append(WorkerProcess(tasks, prepare, lifeline))
            ending.callback(processes[-1].end)
        yield processes


def join(worker: threading.Thread) -> None:
    """Wait until a thread has ended, for the system too.

    `Thread.join` returns while the native thread still cleans up what its libraries kept for it. A process forked at
    that moment copies a lock of MKL's allocator that nobody will ever release there, and spins for ever.
    """
    worker.join()
    while THREAD_LIST.joinpath(str(worker.native_id)).exists():
        time.sleep(0.001)


# ----------------------------------------------------------------------------------------------------------------------
# Messages between processes
# ----------------------------------------------------------------------------------------------------------------------


class Messages:
    """Texts and counters that the processes of a job share, and signs of life of each.

    Args:
        shared: A store of torch.distributed; None: this process is alone.
        rank: Of this process among ``size``.
        size: Number of processes.
    """

    def __init__(self, shared: Store | None, rank: int, size: int):
        self.shared, self.rank, self.size = shared or HashStore(), rank, size
        self.heard = dict.fromkeys(range(size), (0, time.monotonic()))  # signs of life of each process, and since when
        self.listened = time.monotonic()
        if size > 1:
            threading.Thread(target=self._beat, daemon=True).start()

    def add(self, name: str, number: int = 1) -> int:
        """Add to a counter; return its sum over all processes."""
        try:
            return self.shared.add(name, number)
        except RuntimeError as error:
            raise OSError("the other processes of the job cannot be reached") from error

    def set(self, name: str, text: str) -> None:
        """Send a text to all processes under a name."""
        try:
            self.shared.set(name, text)
        except RuntimeError as error:
            raise OSError("the other processes of the job cannot be reached") from error

    def get(self, name: str) -> str | None:
        """Return the text that a process has sent under a name; None as long as none has."""
        try:
            return self.shared.get(name).decode() if self.shared.check([name]) else None
        except RuntimeError as error:
            raise OSError("the other processes of the job cannot be reached") from error

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for the others in short steps, so that signals are handled meanwhile."""
        while not condition():
            self.listen()
            time.sleep(POLL_SECONDS)

    def listen(self) -> None:
        """Look for signs of life of the others.

        Raises:
            OSError: A process has given none for a long time.
        """
        now = time.monotonic()
        if self.size == 1 or now - self.listened < BEAT_SECONDS:
            return
        self.listened = now
        for rank, (beats, since) in self.heard.items():
            if (count := self.add(f"alive {rank}", 0)) != beats:
                self.heard[rank] = count, now
            elif now - since > SILENT_SECONDS:
                raise OSError(f"process {rank} of the job is lost")

    def _beat(self) -> None:
        """Give a sign of life from time to time."""
        with suppress(OSError):  # there is nobody left to hear it
            while True:
                self.add(f"alive {self.rank}")
                time.sleep(BEAT_SECONDS)


# ----------------------------------------------------------------------------------------------------------------------
# The workers
# ----------------------------------------------------------------------------------------------------------------------


class Workers:
    """The threads that share the tasks: of this process, and of others if there are several.

    Each thread takes the next task that nobody has taken, so that none waits while there is one. Processes learn of
    finished tasks by the files themselves, so they see one file system, and they ask for the same jobs in the same
    order.

    Args:
        threads: Of this process.
        prepare: Called first in each thread.
        shared: A store of torch.distributed for messages between processes; None: this process is alone.
        rank: Of this process among ``size``. Rank 0 decides and writes what is written once.
        size: Number of processes.
        forks: Whether each of several threads has a `WorkerProcess`.
    """

    def __init__(
        self,
        threads: int = 1,
        prepare: Callable[[], None] = lambda: None,
        shared: Store | None = None,
        rank: int = 0,
        size: int = 1,
        forks: bool = False,
    ):
        self.forks = forks and threads > 1
        self.threads, self.prepare = threads, prepare
        self.rank, self.size = rank, size
        self.messages = Messages(shared, rank, size)
        self.jobs = self.broadcasts = self.barriers = 0

    def do(self, tasks: Sequence[Task], threads: int | None = None) -> Iterator[str]:
        """Do what is not finished; yield for each task in order, as soon as it is finished, "" or why it failed.

        Args:
            tasks: The same in every process.
            threads: Of this process, if not as many as it has.

        Raises:
            Exception: Whatever a task of this process raised, other than `TaskFailedError`.
        """
        self.jobs += 1
        job = _Job(f"job {self.jobs}", tasks, self.messages, self.prepare)
        count = min(threads or self.threads, len(tasks))
        with self._processes(count, tasks) as processes:
            workers = [threading.Thread(target=job.work, args=(process,), daemon=True) for process in processes]
            for worker in workers:
                worker.start()
            try:
                yield from job.outcomes()
            finally:
                job.stop.set()
                for worker in workers:
                    join(worker)
        job.raise_fault()  # of a thread that met it when all tasks were finished

    @contextmanager
    def _processes(self, count: int, tasks: Sequence[Task]) -> Iterator[list[WorkerProcess | None]]:
        """Start the process of each of some threads; None for each where there is nothing for processes to do."""
        if not self.forks or sum(not (task.in_main or task.finished()) for task in tasks) < 2:
            yield [None] * count
            return
        with worker_processes(count, tasks, self.prepare) as processes:
            yield processes

    def call_prepared(self, function: Callable[[], object]) -> None:
        """Call a function in a thread that is prepared as those that work are.

        Raises:
            Exception: Whatever the function raised.
        """
        faults: list[BaseException] = []

        def work() -> None:
            try:
                self.prepare()
                function()
            except BaseException as error:  # raised again below
                faults.append(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        join(worker)
        if faults:
            try:
                raise faults.pop()
            finally:
                del faults, work  # else the traceback, which holds this frame, would keep what ran out of memory

    def broadcast(self, decide: Callable[[], object]) -> object:
        """Return what ``decide()`` gives on rank 0, a JSON value, on every process.

        Raises:
            FaultElsewhereError: It raised an exception there, where it is raised too.
        """
        self.broadcasts += 1
        name = f"broadcast {self.broadcasts}"
        if self.rank == 0:
            try:
                message = json.dumps({"decided": decide()})
            except Exception:
                self.messages.set(name, json.dumps({}))
                raise
            self.messages.set(name, message)
        else:
            self.messages.wait_until(lambda: self.messages.get(name) is not None)
            message = self.messages.get(name)
        if "decided" not in (answer := json.loads(message)):
            raise FaultElsewhereError
        return answer["decided"]

    def barrier(self) -> None:
        """Wait until every process has come here."""
        self.barriers += 1
        name = f"barrier {self.barriers}"
        self.messages.add(name)
        self.messages.wait_until(lambda: self.messages.add(name, 0) >= self.size)

    def leave(self) -> None:
        """Wait for the others at the end; rank 0, on whose machine the messages may be, leaves last."""
        self.barrier()
        self.messages.add("left")
        if self.rank == 0:
            self.messages.wait_until(lambda: self.messages.add("left", 0) >= self.size)

    def check_shared(self, folder: Path) -> None:
        """Refuse to share work with processes that do not see the same folder, which must be there.

        Raises:
            UsageError: This process does not see what rank 0 writes.
        """
        if self.size == 1:
            return
        token = folder / f".seen-by-all-{self.broadcast(lambda: secrets.token_hex(8))}"
        try:
            if self.rank == 0:
                token.touch()
            self.barrier()
            since = time.monotonic()
            while not token.exists():
                if time.monotonic() - since > FILE_SYSTEM_SECONDS:
                    raise UsageError(f"{folder}: not one folder for all processes. Give one that all machines share.")
                time.sleep(POLL_SECONDS)
            self.barrier()
        finally:
            if self.rank == 0:
                token.unlink()


class _Job:
    """The state of one `Workers.do`: which tasks failed, what a thread raised, and whether to stop."""

    def __init__(self, name: str, tasks: Sequence[Task], messages: Messages, prepare: Callable[[], None]):
        self.name, self.tasks = name, tasks
        self.messages, self.prepare = messages, prepare
        self.news, self.stop = threading.Condition(), threading.Event()
        self.failed: dict[int, str] = {}  # by task
        self.faults: list[BaseException] = []

    def work(self, process: WorkerProcess | None) -> None:
        """Take tasks until there are none, or until a fault."""
        try:
            self.prepare()
            while not self.stop.is_set() and (i := self.messages.add(self.name) - 1) < len(self.tasks):
                try:
                    self._do(i, process)
                except TaskFailedError as error:
                    self.failed[i] = str(error)
                    self.messages.set(f"{self.name}, task {i}", str(error))
                with self.news:
                    self.news.notify()
        except BaseException as error:  # raised again in the main thread
            self.faults.append(error)
            self.stop.set()
            with self.news:
                self.news.notify()

    def _do(self, i: int, process: WorkerProcess | None) -> None:
        if self.tasks[i].finished():
            return
        if process is None or self.tasks[i].in_main:
            self.tasks[i].run()
        else:
            process.run(i)

    def outcomes(self) -> Iterator[str]:
        """Yield "" or why it failed, for each task in order."""
        for i, task in enumerate(self.tasks):
            with self.news:
                while not (self.faults or i in self.failed or task.finished()):
                    self.news.wait(POLL_SECONDS)
                    if (reason := self.messages.get(f"{self.name}, task {i}")) is not None:
                        self.failed[i] = reason
                    self.messages.listen()
            self.raise_fault()
            yield self.failed.get(i, "")

    def raise_fault(self) -> None:
        """Raise what a thread raised first, if any did."""
        if self.faults:
            raise self.faults[0]


def start_workers(threads: int, prepare: Callable[[], None], device: torch.device) -> Workers:
    """Return the workers of this process; and of the others, where torchrun has started several.

    The processes of a job meet through torch.distributed, nccl where they train on GPUs, gloo on CPUs, and then send
    messages through its store.

    Args:
        threads: Of this process.
        prepare: Called first in each thread.
        device: That this process trains on.

    Raises:
        OSError: The processes do not reach each other.
    """
    # A forked process can use neither a GPU, which autograd looks for wherever one shows, nor the libraries of macOS.
    # Without the system's list of threads nobody knows when it is safe to fork.
    forks = device.type == "cpu" and sys.platform == "linux" and THREAD_LIST.is_dir() and not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers(threads, prepare, forks=forks)
    try:
        shared, rank, size = next(rendezvous("env://"))
        on_gpu = device.type == "cuda"
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore("group", shared),
            rank=rank,
            world_size=size,
            device_id=device if on_gpu else None,
        )
        torch.distributed.barrier()  # all are there, and reach each other
    except RuntimeError as error:
        raise OSError(f"the processes of the job do not reach each other ({error})") from error
    return Workers(threads, prepare, PrefixStore("workers", shared), rank, size, forks)
