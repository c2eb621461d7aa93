"""Who does the work: threads of one process, or of several that torchrun has started, which take tasks in turn.

A task leaves a file behind, and by that file everyone knows that it is finished. So a job goes on where a killed one
stopped, and what the processes tell each other is small: who takes which task, and what cannot be done.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch.distributed import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

POLL_SECONDS = 0.1  # between looks for the files that other processes write
FILE_SYSTEM_SECONDS = 120  # until every machine sees a new file
WAIT = timedelta(days=30)  # of one process for another


class TaskFailedError(RuntimeError):
    """One task cannot be done, by whomever, and the others can; the message says why."""


@dataclass(frozen=True)
class Task:
    """Work that leaves files behind: ``finished()`` looks for them, ``run()`` writes them."""

    finished: Callable[[], bool]
    run: Callable[[], None]


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
    """

    def __init__(
        self,
        threads: int = 1,
        prepare: Callable[[], None] = lambda: None,
        shared: Store | None = None,
        rank: int = 0,
        size: int = 1,
    ):
        self.threads, self.prepare, self.rank, self.size = threads, prepare, rank, size
        self.shared, self.jobs, self.questions = shared or HashStore(), 0, 0

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

        def work() -> None:
            try:
                self.prepare()
                while not stop.is_set() and (i := self.shared.add(job, 1) - 1) < len(tasks):
                    try:
                        if not tasks[i].finished():
                            tasks[i].run()
                    except TaskFailedError as error:
                        failed[i] = str(error)
                        self.shared.set(f"{job}, task {i}", str(error))
                    with news:
                        news.notify()
            except BaseException as error:  # raised again in the main thread
                faults.append(error)
                stop.set()
                with news:
                    news.notify()

        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads or self.threads, len(tasks)))]
        for worker in workers:
            worker.start()
        try:
            for i, task in enumerate(tasks):
                with news:
                    while not (faults or i in failed or task.finished()):
                        news.wait(POLL_SECONDS)
                        if self.size > 1 and self.shared.check([f"{job}, task {i}"]):
                            failed[i] = self.shared.get(f"{job}, task {i}").decode()
                if faults:
                    raise faults[0]
                yield failed.get(i, "")
        finally:
            stop.set()
            for worker in workers:
                worker.join()

    def agree(self, decide: Callable[[], object]) -> object:
        """What ``decide()`` gives on rank 0, a JSON value, told to every process."""
        self.questions += 1
        question = f"question {self.questions}"
        if self.rank == 0:
            self.shared.set(question, json.dumps(decide()))
        return json.loads(self.shared.get(question))

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def check_shared(self, folder: Path) -> None:
        """Refuse to share work with processes that do not see the same folder, which must be there.

        Raises:
            OSError: This process does not see what rank 0 writes.
        """
        if self.size == 1:
            return
        token = folder / f".seen-by-all-{self.agree(lambda: secrets.token_hex(8))}"
        if self.rank == 0:
            token.touch()
        self.wait()
        for _ in range(FILE_SYSTEM_SECONDS):
            if token.exists():
                break
            time.sleep(1)
        else:
            raise OSError(f"{folder} is not the same folder in all processes. give one that all of them share")
        self.wait()
        if self.rank == 0:
            token.unlink()


def assemble(threads: int, prepare: Callable[[], None], device: torch.device) -> Crew:
    """The threads of this process; and those of the others, where torchrun has started several.

    The processes of a job talk through torch.distributed: nccl where they train on GPUs, gloo on CPUs.

    Args:
        threads: Of this process.
        prepare: Called first in each thread.
        device: That this process trains on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Crew(threads, prepare)
    shared, rank, size = next(rendezvous("env://"))
    shared.set_timeout(WAIT)
    on_gpu = device.type == "cuda"
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore("group", shared),
        rank=rank,
        world_size=size,
        timeout=WAIT,
        device_id=device if on_gpu else None,
    )
    return Crew(threads, prepare, PrefixStore("crew", shared), rank, size)
