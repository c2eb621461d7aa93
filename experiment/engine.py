"""The engine: hands units of work to joblib, and writes what comes back.

On a CPU worker processes do them (loky), one thread each; on GPUs threads of this process, one for each GPU; with
``--scheduler`` the workers of a Dask cluster. The numbers are the same whoever works. The main process alone writes
unit files (but for large ones), prints and counts.

A worker notes the unit that it begins in a file, which it removes when that is done. The notes of lost workers stay:
their units are done again, with fewer beside them, at last alone, and a unit with three notes is given up.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from joblib import Parallel, delayed, parallel_config

from experiment import store
from experiment.cluster import lost_worker_error
from experiment.signals import end_with, killed_for_memory
from experiment.units import Outcome, Unit, finish, finish_elsewhere, program_digest
from training.stacks import start_thread

LOSSES = 3  # of workers at a unit, after which it is given up


class Engine:
    """Workers that do units.

    Args:
        devices: A CPU, or GPUs.
        cores: Units at once on a CPU.
        cluster: A client of a Dask cluster whose workers do them instead; see `cluster.connect`.
        run: Name of this run among those that share a cache.
    """

    def __init__(
        self, devices: Sequence[torch.device], cores: int = 1, cluster: object | None = None, run: str = "run"
    ):
        self.device, self.cores, self.cluster, self.run = devices[0], cores, cluster, run
        on_cpu = self.device.type == "cpu"
        self.devices, self.threads = devices, cores if on_cpu else len(devices)
        self.in_processes = cluster is not None or (on_cpu and cores > 1)
        self._notes: Path | None = None
        self._killed = killed_for_memory()
        self._loss_error = BrokenProcessPool if cluster is None else lost_worker_error()

    def close(self) -> None:
        """Remove the notes, and leave the cluster."""
        if self._notes is not None:
            shutil.rmtree(self._notes, ignore_errors=True)
        if self.cluster is not None:
            self.cluster.close()

    def count_workers(self) -> int:
        """Return how many units are done at once; of a cluster, by the workers that it has now."""
        return self.threads if self.cluster is None else len(self.cluster.ncores())

    def do(self, units: Sequence[Unit]) -> Iterator[str]:
        """Do what is not finished; yield for each unit in order, as soon as it is, "" or why it failed.

        Raises:
            Exception: Whatever a unit raised, but for its failures.
        """
        failures = {unit.path: "" for unit in units if unit.path.exists()}
        missing = {unit.path: unit for unit in units if unit.path not in failures}
        with closing(self._outcomes(list(missing.values()))) as outcomes:
            for unit in units:
                while unit.path not in failures:
                    path, outcome = next(outcomes)
                    if outcome.arrays is not None:
                        store.save_arrays(path, outcome.arrays)
                    failures[path] = outcome.failure
                yield failures[unit.path]

    def _outcomes(self, units: list[Unit]) -> Iterator[tuple[Path, Outcome]]:
        if not units:
            return
        if self._notes is None:
            self._notes = units[0].path.parent.with_name(f"begun-{self.run}")
            shutil.rmtree(self._notes, ignore_errors=True)  # of a run that was killed
            self._notes.mkdir(parents=True)
        away = [unit for unit in units if self.in_processes and not unit.in_main]
        here = [unit for unit in units if not self.in_processes or unit.in_main]
        working = self._start(away)
        yield from self.map(partial(finish, notes=self._notes), here, self.threads)
        yield from self._collect(working, away)

    # -- threads of this process --------------------------------------------------------------------------------------

    def map(self, function: Callable, items: Iterable, threads: int) -> Iterator:
        """Yield what ``function(item, device=...)`` gives in threads of this process, in any order."""
        free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
        for device in islice(cycle(self.devices), threads):
            free.put(device)

        def call(item: object) -> object:
            device = free.get()
            try:
                start_thread(device)
                return function(item, device=device)
            finally:
                free.put(device)

        # Two threads at least: joblib would use the main thread for a single one.
        pool = Parallel(max(2, threads), backend="threading", return_as="generator_unordered", pre_dispatch=threads)
        return pool(delayed(call)(item) for item in items)

    def call(self, function: Callable[[], object]) -> object:
        """Return what a function gives in a thread like those that train."""
        (result,) = self.map(lambda _, device: function(), [None], threads=1)
        return result

    # -- processes ----------------------------------------------------------------------------------------------------

    def _start(self, units: list[Unit], at_once: int | None = None) -> Iterator[tuple[Path, Outcome]]:
        """Hand units to worker processes; return an iterator over those that are finished."""
        if not units:
            return iter(())
        device = self.device if self.device.type == "cpu" else torch.device("cuda", 0)  # a worker sees one
        task = delayed(partial(finish_elsewhere, notes=self._notes, device=device, program=program_digest()))
        if self.cluster is not None:
            if not self.cluster.ncores():
                print("waiting for the first worker of the Dask cluster", flush=True)
                self.cluster.wait_for_workers(1)
            backend = {"backend": "dask", "client": self.cluster}
            how = {"n_jobs": -1, "pre_dispatch": "all"}
        else:
            begin = {"initializer": end_with, "initargs": (os.getpid(),)}
            backend = {"backend": "loky", "inner_max_num_threads": 1, **begin}
            how = {"n_jobs": self.cores, "pre_dispatch": at_once or self.cores, "max_nbytes": None}
        with parallel_config(**backend):
            return Parallel(return_as="generator_unordered", batch_size=1, **how)(task(unit) for unit in units)

    def _collect(self, working: Iterator, units: list[Unit]) -> Iterator[tuple[Path, Outcome]]:
        """Yield the outcomes of units that worker processes were handed; what was lost with a worker is done again."""
        missing, idle = {unit.path: unit for unit in units}, 0
        while missing:
            try:
                for path, outcome in working:
                    del missing[path]
                    yield path, outcome
            except self._loss_error as error:
                loss = self._describe_loss(error)
                lost = [f"{unit.label} ({path.stem})" for path, unit in missing.items() if self._count_losses(path)]
                idle += not lost
                if idle == LOSSES:
                    raise OSError(f"{LOSSES} times a worker {loss} before it had begun a unit") from error
                print(f"  a worker {loss}; it was at: {' or '.join(lost) or 'no unit'}; that is done again", flush=True)
                for path in [path for path in missing if self._count_losses(path) >= LOSSES]:
                    unit = missing.pop(path)
                    yield path, Outcome(failure=f"{unit.label}: each of {self._count_losses(path)} workers {loss}")
            except CancelledError as error:
                raise OSError("the connection to the Dask scheduler is lost") from error
            if missing:
                losses = {path: self._count_losses(path) for path in missing}
                fewest = min(losses.values())
                again = [unit for path, unit in missing.items() if losses[path] == fewest]
                working = self._start(again, {0: self.cores, 1: max(1, self.cores // 2)}.get(fewest, 1))

    def _count_losses(self, path: Path) -> int:
        """Return how many workers have begun a unit and not done it."""
        return len(list(self._notes.glob(f"{path.name}.*")))

    def _describe_loss(self, error: Exception) -> str:
        """Return how a worker ended, after "a worker"."""
        codes = re.findall(r"\b(\w+)\(-?\d+\)", str(error))  # loky has them in its message only
        killed, self._killed = self._killed, killed_for_memory()
        if self._killed > killed:
            return "was ended by the system, as memory had run out"
        if "SIGKILL" in codes:
            return "was ended by SIGKILL, as where memory runs out: fewer workers (OMP_NUM_THREADS) take less"
        return f"was ended by {codes[0]}" if codes else "was lost"
