"""Who does the work: threads of one process, or of several that torchrun has started, which take tasks in turn.

A task leaves a file behind, and by that file everyone knows that it is finished. So a job goes on where a killed one
stopped, and what the processes tell each other is small: who takes which task, and what cannot be done.

Training is thousands of small steps, and Python runs one at a time in a process: threads that train on a CPU wait for
each other. So there, where there are several and the system is Linux, each has a `Helper`, a process that works for it.
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

POLL_SECONDS = 0.1  # between looks for what other processes do
FILE_SYSTEM_SECONDS = 120  # until every machine sees a new file
BEAT_SECONDS = 5.0  # between signs of life
THREADS = Path("/proc/self/task")  # the system's own list of the threads of this process
SILENT_SECONDS = 300.0  # without one, and a process is taken for lost


class TaskFailedError(RuntimeError):
    """One task cannot be done, by whomever, and the others can; the message says why."""


class FaultElsewhereError(RuntimeError):
    """Rank 0 has met a fault, which it tells itself."""


@dataclass(frozen=True)
class Task:
    """Work that leaves files behind: ``finished()`` looks for them, ``run()`` writes them.

    ``here`` keeps it from a `Helper`: it leaves something in memory for other tasks (kernels), or consists of few large
    steps, which let each other run (the pass over files).
    """

    finished: Callable[[], bool]
    run: Callable[[], None]
    here: bool = False


class Helper:
    """A process that does tasks for one thread: a copy of this process as it was at the start of the job.

    It ends when it is told to, or when this process does, however that ends.

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
            Exception: Whatever it raised, told again here.
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
                how += ", as where memory does not do: fewer threads (OMP_NUM_THREADS) take less"
            raise OSError(f"a process that trained has ended {how}") from None
        if error is not None:
            raise error

    def end(self) -> None:
        """Let it go, and wait until it is gone."""
        with suppress(OSError):  # it has ended before
            self.connection.send(None)
        self.process.join()
        self.connection.close()

    def _serve(
        self, tasks: Sequence[Task], prepare: Callable[[], None], lifeline: tuple[int, int], connection: Connection
    ) -> None:
        """What the process does: tasks as it is told their numbers, answered by None or what they raised."""
        for number in (signal.SIGINT, signal.SIGUSR1):  # a terminal, or a cluster, sends them to all processes of a job
            signal.signal(number, signal.SIG_IGN)  # this one ends with the first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(lifeline[1])

        def hold_on() -> None:
            os.read(lifeline[0], 1)  # until there is nobody to write
            os._exit(1)

        threading.Thread(target=hold_on, daemon=True).start()
        prepare()
        while (task := connection.recv()) is not None:
            try:
                tasks[task].run()
            except BaseException as error:  # raised again by `run`
                _send(connection, error)
            else:
                connection.send(None)


def _send(connection: Connection, error: BaseException) -> None:
    """Tell an exception to another process, with the traceback of this one as a note."""
    note = f"\nin a process that trained:\n{''.join(traceback.format_exception(error))}"
    try:
        copied = copy.copy(error)  # made anew, as it will be there
        copied.add_note(note)
        connection.send(copied)
    except Exception:  # whatever a class raises that cannot be made anew, or is not known there
        told = RuntimeError(repr(error))
        told.add_note(note)
        connection.send(told)


class Crew:
    """The threads that share the tasks: of this process, and of others if there are several.

    Each thread takes the next task that nobody has taken, so that none waits while there is one. Processes tell each
    other of finished tasks by the files themselves, so they see one file system, and they ask for the same jobs in the
    same order.

    Args:
        threads: Of this process.
        prepare: Called first in each thread.
        shared: A store of torch.distributed through which the processes talk; None: this process is alone.
        rank: Of this process among ``size``. Rank 0 decides and writes what is written once.
        size: Number of processes.
        forks: Whether each of several threads has a `Helper`.
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
        self.threads, self.prepare, self.rank, self.size = threads, prepare, rank, size
        self.shared, self.jobs, self.questions, self.meetings = shared or HashStore(), 0, 0, 0
        self.heard = dict.fromkeys(range(size), (0, time.monotonic()))  # signs of life of each process, and since when
        self.listened = time.monotonic()
        if size > 1:
            threading.Thread(target=self._beat, daemon=True).start()

    def do(self, tasks: Sequence[Task], threads: int | None = None) -> Iterator[str]:
        """Do what is not finished; yields for each task in order, as soon as it is finished, "" or why it failed.

        Args:
            tasks: The same in every process.
            threads: Of this process, if not as many as it has.

        Raises:
            Exception: Whatever a task of this process raised, other than `TaskFailedError`.
        """
        self.jobs += 1
        job, news, stop = f"job {self.jobs}", threading.Condition(), threading.Event()
        failed: dict[int, str] = {}  # by task
        faults: list[BaseException] = []

        def work(helper: Helper | None) -> None:
            try:
                self.prepare()
                while not stop.is_set() and (i := self._add(job) - 1) < len(tasks):
                    try:
                        if not tasks[i].finished():
                            if helper is None or tasks[i].here:
                                tasks[i].run()
                            else:
                                helper.run(i)
                    except TaskFailedError as error:
                        failed[i] = str(error)
                        self._tell(f"{job}, task {i}", str(error))
                    with news:
                        news.notify()
            except BaseException as error:  # raised again in the main thread
                faults.append(error)
                stop.set()
                with news:
                    news.notify()

        count = min(threads or self.threads, len(tasks))
        with self._helpers(count, tasks) as helpers:
            workers = [threading.Thread(target=work, args=(helper,), daemon=True) for helper in helpers]
            for worker in workers:
                worker.start()
            try:
                for i, task in enumerate(tasks):
                    with news:
                        while not (faults or i in failed or task.finished()):
                            news.wait(POLL_SECONDS)
                            if (reason := self._told(f"{job}, task {i}")) is not None:
                                failed[i] = reason
                            self._listen()
                    if faults:
                        raise faults[0]
                    yield failed.get(i, "")
            finally:
                stop.set()
                for worker in workers:
                    _join(worker)
        if faults:  # of a thread that met it when all tasks were finished
            raise faults[0]

    @contextmanager
    def _helpers(self, count: int, tasks: Sequence[Task]) -> Iterator[list[Helper | None]]:
        """The helper of each of some threads, which has none where there is nothing to help with."""
        if not self.forks or sum(not (task.here or task.finished()) for task in tasks) < 2:
            yield [None] * count
            return
        with ExitStack() as ending:
            lifeline = os.pipe()
            for end in lifeline:
                ending.callback(os.close, end)
            helpers = []
            for _ in range(count):  # before there are threads, whose locks a copy would find locked for ever
                helpers.append(Helper(tasks, self.prepare, lifeline))
                ending.callback(helpers[-1].end)
            yield helpers

    def prepared(self, function: Callable[[], object]) -> None:
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
        _join(worker)
        if faults:
            raise faults[0]

    def agree(self, decide: Callable[[], object]) -> object:
        """What ``decide()`` gives on rank 0, a JSON value, told to every process.

        Raises:
            FaultElsewhereError: It raised an exception there, where it is raised too.
        """
        self.questions += 1
        question = f"question {self.questions}"
        if self.rank == 0:
            try:
                told = json.dumps({"decided": decide()})
            except Exception:
                self._tell(question, json.dumps({}))
                raise
            self._tell(question, told)
        else:
            self._until(lambda: self._told(question) is not None)
            told = self._told(question)
        if "decided" not in (answer := json.loads(told)):
            raise FaultElsewhereError
        return answer["decided"]

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.meetings += 1
        here = f"meeting {self.meetings}"
        self._add(here)
        self._until(lambda: self._add(here, 0) >= self.size)

    def leave(self) -> None:
        """Wait for the others at the end; rank 0, through whose machine they may talk, leaves last."""
        self.wait()
        self._add("left")
        if self.rank == 0:
            self._until(lambda: self._add("left", 0) >= self.size)

    def check_shared(self, folder: Path) -> None:
        """Refuse to share work with processes that do not see the same folder, which must be there.

        Raises:
            OSError: This process does not see what rank 0 writes.
        """
        if self.size == 1:
            return
        token = folder / f".seen-by-all-{self.agree(lambda: secrets.token_hex(8))}"
        try:
            if self.rank == 0:
                token.touch()
            self.wait()
            since = time.monotonic()
            while not token.exists():
                if time.monotonic() - since > FILE_SYSTEM_SECONDS:
                    raise OSError(f"{folder} is not one folder for all processes. it must be, for them to share work")
                time.sleep(POLL_SECONDS)
            self.wait()
        finally:
            if self.rank == 0:
                token.unlink()

    # -- what the processes tell each other -----------------------------------------------------------------------

    def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for the others in short steps, so that signals are heard meanwhile."""
        while not condition():
            self._listen()
            time.sleep(POLL_SECONDS)

    def _add(self, name: str, number: int = 1) -> int:
        """Count, together with the others."""
        try:
            return self.shared.add(name, number)
        except RuntimeError as error:
            raise OSError("the other processes of the job cannot be reached") from error

    def _tell(self, name: str, text: str) -> None:
        try:
            self.shared.set(name, text)
        except RuntimeError as error:
            raise OSError("the other processes of the job cannot be reached") from error

    def _told(self, name: str) -> str | None:
        """What some process has told under a name; None as long as none has."""
        try:
            return self.shared.get(name).decode() if self.shared.check([name]) else None
        except RuntimeError as error:
            raise OSError("the other processes of the job cannot be reached") from error

    def _beat(self) -> None:
        """Give a sign of life from time to time."""
        with suppress(OSError):  # there is nobody left to hear it
            while True:
                self._add(f"alive {self.rank}")
                time.sleep(BEAT_SECONDS)

    def _listen(self) -> None:
        """Look for signs of life of the others.

        Raises:
            OSError: One of them has given none for a long time.
        """
        now = time.monotonic()
        if self.size == 1 or now - self.listened < BEAT_SECONDS:
            return
        self.listened = now
        for rank, (beats, since) in self.heard.items():
            if (count := self._add(f"alive {rank}", 0)) != beats:
                self.heard[rank] = count, now
            elif now - since > SILENT_SECONDS:
                raise OSError(f"process {rank} of the job is lost")


def _join(worker: threading.Thread) -> None:
    """Wait until a thread has ended, for the system too.

    `Thread.join` returns while the native thread still cleans up what its libraries kept for it. A process forked at
    that moment copies a lock of MKL's allocator that nobody will ever release there, and spins for ever.
    """
    worker.join()
    while THREADS.joinpath(str(worker.native_id)).exists():
        time.sleep(0.001)


def assemble(threads: int, prepare: Callable[[], None], device: torch.device) -> Crew:
    """The threads of this process; and those of the others, where torchrun has started several.

    The processes of a job meet through torch.distributed, nccl where they train on GPUs, gloo on CPUs, and then talk
    through its store.

    Args:
        threads: Of this process.
        prepare: Called first in each thread.
        device: That this process trains on.

    Raises:
        OSError: The processes do not reach each other.
    """
    # A forked process can use neither a GPU, which autograd looks for wherever one shows, nor the libraries of macOS.
    # Without the system's list of threads nobody knows when it is safe to fork.
    forks = device.type == "cpu" and sys.platform == "linux" and THREADS.is_dir() and not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Crew(threads, prepare, forks=forks)
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
    return Crew(threads, prepare, PrefixStore("crew", shared), rank, size, forks)
