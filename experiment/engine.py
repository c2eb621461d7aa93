"""The engine: hands units of work to whoever does them, and writes what comes back.

On a CPU worker processes of joblib do them (loky), one thread each; on GPUs threads of this process, `STREAMS` for each
GPU; with ``--scheduler`` the workers of a Dask cluster. The numbers are the same whoever works. The main process alone
writes unit files (but for large ones), prints and counts.

Support vector machines are fitted on CPUs by threads of this process. Beside GPUs these are as many as cores allow, at
most `OTHER_THREADS`, and compute kernels on the first GPU.

A worker notes the unit that it begins in a file, which it removes when that is done. The notes of lost workers stay:
their units are done again, with fewer beside them, at last alone, and a unit with three notes is given up.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from joblib import Parallel, delayed, parallel_config

from experiment import store
from experiment.cluster import finish_on
from experiment.settings import STREAMS
from experiment.signals import end_with, killed_for_memory, unheard_by_children
from experiment.threads import Threads, Work, outcomes_of
from experiment.units import LOSSES, Outcome, Unit, finish, finish_elsewhere, notes_of, program_digest
from loras.building import say

warnings.filterwarnings("ignore", r"\d+ tasks (have been|which were) ", UserWarning)  # of joblib, beside an error

OTHER_THREADS = 12  # of each kind that does not train, at most: with them no GPU has more than its 32 streams


class Engine:
    """Workers that do units.

    Args:
        devices: A CPU, or GPUs.
        cores: Units at once on a CPU.
        cluster: A client of a Dask cluster whose workers do them instead; see `cluster.connect`.

    Attributes:
        folder: Of this run, beside the units: notes, and arrays that workers share; None before `begin`.
        threads: Units at once in this process, less support vector machines beside GPUs.
        streams: Units at once on one GPU.
    """

    def __init__(self, devices: Sequence[torch.device], cores: int = 1, cluster: object | None = None):
        self.devices, self.cores, self.cluster = devices, cores, cluster
        on_cpu = devices[0].type == "cpu"
        self.streams = 1 if on_cpu or cluster is not None else STREAMS
        self.threads = cores if on_cpu else self.streams * len(devices)
        self.in_processes = cluster is not None or (on_cpu and cores > 1)
        self.folder: Path | None = None
        self._processes = 0  # as many as there have been units at once
        self._killed = killed_for_memory()
        # Those that train, those that read weights, and those that use what the main process keeps on its device.
        self._trainers = Threads(list(islice(cycle(devices), self.threads)))
        self._readers = Threads(list(islice(cycle(devices), OTHER_THREADS)))
        self._keepers = Threads(OTHER_THREADS * [devices[0]])

    def begin(self, cache: Path, owner: str = "alone") -> None:
        """Make the folder of this run; see `store.make_run_folder`."""
        self.folder = self.folder or store.make_run_folder(cache, owner)

    def close(self) -> None:
        """Remove the folder of this run, leave the cluster, and have threads end when they are done."""
        all_threads = self._trainers, self._readers, self._keepers
        for threads in all_threads:
            threads.close()
        for threads in all_threads:
            threads.wait()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # another run is at work there
                self.folder.parent.rmdir()
        if self.cluster is not None:
            self.cluster.close()

    def count_workers(self) -> int:
        """Return how many units are done at once; of a cluster, by the workers that it has now."""
        return self.threads if self.cluster is None else sum(self.cluster.ncores().values())

    def do(
        self,
        units: Sequence[Unit],
        begun: Sequence[Unit] | None = None,
        done: Callable[[Path], None] = lambda path: None,
    ) -> Iterator[str]:
        """Do what is not finished; yield for each unit in order, as soon as it is, "" or why it failed.

        Args:
            units: The units.
            begun: The same units in the order in which to begin them; None: the order of ``units``.
            done: Called with the path of each unit when it is done, in whatever order that is.

        Raises:
            Exception: Whatever a unit raised, but for its failures.
        """
        failures = {unit.path: "" for unit in units if store.is_whole(unit.path)}
        missing = {unit.path: unit for unit in begun or units if unit.path not in failures}
        with closing(self._outcomes(list(missing.values()))) as outcomes:
            for unit in units:
                while unit.path not in failures:
                    path, outcome = next(outcomes)
                    if outcome.at_once is not None and outcome.at_once < (count := len(missing[path].stack)):
                        label = missing[path].label
                        say(f"  {label}: {count} models do not fit the memory: {outcome.at_once} at once")
                    if outcome.arrays is not None:
                        store.save_arrays(path, outcome.arrays)
                    elif not outcome.failure:
                        store.wait_for(path)
                    failures[path] = outcome.failure
                    done(path)
                yield failures[unit.path]

    def _outcomes(self, units: list[Unit]) -> Iterator[tuple[Path, Outcome]]:
        if not units:
            return
        self.begin(units[0].path.parent.parent)
        finish_here = partial(finish, notes=self.folder)
        in_main = [unit for unit in units if unit.in_main]
        others = [unit for unit in units if not unit.in_main]
        if not self.in_processes:
            if self.devices[0].type == "cpu":
                yield from outcomes_of(Work(self._trainers, finish_here, in_main + others, self.threads))
                return
            svms = Work(self._keepers, finish_here, in_main, max(1, self.cores - self.threads))
            yield from outcomes_of(svms, Work(self._trainers, finish_here, others, self.threads))
            return
        task = partial(finish_elsewhere, notes=self.folder, kind=self.devices[0].type, program=program_digest())
        work = self._finish_in_processes if self.cluster is None else partial(finish_on, self.cluster)
        with closing(work(others, task)) as outcomes:
            next(outcomes)  # the workers have begun
            yield from outcomes_of(Work(self._keepers, finish_here, in_main, 1))
            yield from outcomes

    def map(self, function: Callable, items: Sequence, threads: int) -> Iterator:
        """Yield what ``function(item, device=...)`` gives in so many threads, at most `OTHER_THREADS`, in any order."""
        return outcomes_of(Work(self._readers, function, items, threads))

    def call(self, function: Callable[[], object]) -> object:
        """Return what a function gives in a thread like those that train, on the device of the main process."""
        (result,) = outcomes_of(Work(self._keepers, lambda _, device: function(), [None], 1))
        return result

    def _finish_in_processes(self, units: list[Unit], task: Callable) -> Iterator[tuple[Path, Outcome] | None]:
        """Yield None when worker processes have begun, then outcomes; what is lost with a worker is done again."""
        missing, noted = {unit.path: unit for unit in units}, {unit.path: 0 for unit in units}
        outcomes, in_vain = self._start(units, task, self.cores), 0
        yield None
        while missing:
            try:
                for path, outcome in outcomes:
                    del missing[path]
                    in_vain = 0
                    yield path, outcome
            except BrokenProcessPool as error:
                before, noted = noted, {path: notes_of(path, self.folder) for path in missing}
                lost = [f"{unit.label} ({path.stem})" for path, unit in missing.items() if noted[path] > before[path]]
                loss, in_vain = self._describe_loss(error), 0 if lost else in_vain + 1
                if in_vain == LOSSES:
                    cause = str(error.__cause__ or error).strip().splitlines()[-1]
                    raise OSError(f"{LOSSES} times a worker {loss} before it had begun a unit: {cause}") from error
                say(f"  a worker {loss}; at work: {' or '.join(lost) or 'no unit'}; that is done again")
                for path in [path for path in missing if noted[path] >= LOSSES]:
                    yield path, Outcome(failure=f"{missing.pop(path).label}: each of {noted[path]} workers {loss}")
            if missing:
                fewest = min(noted[path] for path in missing)
                at_once = max(1, self.cores >> fewest) if fewest < LOSSES - 1 else 1
                outcomes = self._start([u for path, u in missing.items() if noted[path] == fewest], task, at_once)

    def _start(self, units: list[Unit], task: Callable, at_once: int) -> Iterator[tuple[Path, Outcome]]:
        """Hand units to worker processes, as many as there are units, at most one for each core."""
        if not units:
            return iter(())
        self._processes = max(self._processes, 2, min(self.cores, len(units)))
        begin = {"initializer": end_with, "initargs": (os.getpid(),)}
        with parallel_config("loky", inner_max_num_threads=1, **begin):
            how = {"batch_size": 1, "pre_dispatch": at_once, "max_nbytes": None}
            pool = Parallel(self._processes, return_as="generator_unordered", **how)
        with unheard_by_children():
            return pool(delayed(task)(unit) for unit in units)

    def _describe_loss(self, error: Exception) -> str:
        """Return how a worker ended, after "a worker"."""
        codes = re.findall(r"\b(\w+)\(-?\d+\)", str(error))  # loky has them in its message only
        killed, self._killed = self._killed, killed_for_memory()
        if "SIGBUS" in codes:
            return "was ended by SIGBUS, as where a file that it has mapped is cut short"
        if "SIGKILL" not in codes:
            return f"was ended by {codes[0]}" if codes else "was lost"
        if self._killed > killed:
            return "was ended by SIGKILL, while the system ended processes for want of memory"
        return "was ended by SIGKILL, as where memory runs out: fewer workers (OMP_NUM_THREADS) take less"
