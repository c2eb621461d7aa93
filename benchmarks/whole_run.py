"""The whole experiment, phase by phase: seconds, share of the time, peak memory of host and device.

    python benchmarks/whole_run.py 1000                # on Stable-Diffusion-1.5-like LoRAs, written first
    python benchmarks/whole_run.py --dataset=1k        # on a collection that is there, or the built-in digits
    python benchmarks/whole_run.py 1000 --again        # and once more with one more layer removed

Other flags go to the experiment, written with ``=``: ``--quick``, ``--device=cpu``, ``--num-runs=3``, and
``--controls=basic`` for the classifiers trained to compare with, left out by default. It runs in a
fresh output folder, so nothing is reused, unless ``--output-dir=`` names another. Peak host memory (Linux) is the
larger of this process's peak and of the sum over it and its workers, sampled every five seconds, with pages of mapped
files that the system could drop. Device peaks are those of tensors on the first GPU.

A second table lists the units of work that threads of this process did, as all are on a GPU: seconds of a label are
summed over its units, which may run beside each other; "from" and "to" are seconds after the start. Ended by SIGTERM
it prints both tables as far as it came.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from sd15_zoo import write_zoo

import ablation_experiment
from experiment.flags import BUILT_IN_SIZES, BUILT_IN_STEPS
from experiment.settings import count_cores
from experiment.units import Outcome, Unit
from loras import digits_zoo

SAMPLE_SECONDS = 5.0
LABELS = 20  # of units that are listed


def resident() -> int:
    """Return bytes of memory of this process and of those it has started; shared pages count once (PSS)."""
    total = 0
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    for process in ("self", *children):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def host_peak() -> int:
    """Return the largest resident set of this process alone since `forget_peaks`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def forget_peaks() -> None:
    """Reset the peaks."""
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class Metered(ablation_experiment.Stopwatch):
    """The experiment's stopwatch, which also records the peak memory of each phase."""

    latest: Metered | None = None

    def __init__(self):
        super().__init__()
        Metered.latest = self
        self.host, self.device = dict.fromkeys(self.PHASES, 0), dict.fromkeys(self.PHASES, 0)  # peaks, bytes
        self.current: str | None = None  # phase
        self.begun = 0.0  # when that began
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            phase, total = self.current, resident()
            if phase is not None and phase == self.current:  # the same before and after
                self.host[phase] = max(self.host[phase], total)
            time.sleep(SAMPLE_SECONDS)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase, and take in its peaks."""
        forget_peaks()
        self.current, self.begun = name, time.perf_counter()
        with super().phase(name):
            yield
        self.current = None
        self.host[name] = max(self.host[name], host_peak())
        if torch.cuda.is_available():
            self.device[name] = max(self.device[name], torch.cuda.max_memory_allocated())

    def table(self, total: float) -> str:
        """Format seconds, share and peaks by phase; one that has not ended counts as far as it came."""
        seconds = dict(self.seconds)
        if self.current is not None:
            seconds[self.current] += time.perf_counter() - self.begun
        lines = [f"{'phase':<14}{'seconds':>9}{'share':>8}{'host peak':>12}{'device peak':>13}"]
        for name in self.PHASES:
            share, host, device = seconds[name] / total, self.host[name] / 2**30, self.device[name] / 2**30
            lines.append(f"{name:<14}{seconds[name]:>9.1f}{share:>8.1%}{host:>8.2f} GiB{device:>9.2f} GiB")
        rest = total - sum(seconds.values())
        return "\n".join([*lines, f"{'the rest':<14}{rest:>9.1f}{rest / total:>8.1%}", f"{'total':<14}{total:>9.1f}"])


class TimedUnits:
    """The seconds of all units that threads of this process do, by label.

    Replaces `Unit.attempt` while it is entered.
    """

    def __init__(self):
        self.spans: dict[str, list[tuple[float, float]]] = {}  # (begin, end) of each, seconds after the start
        self.threads: set[int] = set()
        self.start, self.lock, self.attempt = time.perf_counter(), threading.Lock(), Unit.attempt

    def __enter__(self) -> TimedUnits:
        """Begin."""

        def attempt(unit: Unit, device: torch.device) -> Outcome:
            begin = time.perf_counter()
            try:
                return self.attempt(unit, device)
            finally:
                with self.lock:
                    span = begin - self.start, time.perf_counter() - self.start
                    self.spans.setdefault(unit.label, []).append(span)
                    self.threads.add(threading.get_ident())

        Unit.attempt = attempt
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        Unit.attempt = self.attempt

    def table(self) -> str:
        """Format the labels, those that took longest first; empty where no unit was done here."""
        lines = [f"{'units':<44}{'count':>6}{'seconds':>9}{'longest':>9}{'from':>8}{'to':>8}"]
        totals = {label: sum(end - begin for begin, end in spans) for label, spans in self.spans.items()}
        for label in sorted(totals, key=totals.get, reverse=True)[:LABELS]:
            begins, ends = zip(*self.spans[label], strict=True)
            longest = max(end - begin for begin, end in self.spans[label])
            figures = f"{totals[label]:>9.1f}{longest:>9.1f}{min(begins):>8.1f}{max(ends):>8.1f}"
            lines.append(f"{label[:43]:<44}{len(begins):>6}{figures}")
        total = sum(totals.values())
        lines.append(f"{'all':<44}{sum(map(len, self.spans.values())):>6}{total:>9.1f}, {len(self.threads)} threads")
        return "\n".join(lines) if totals else ""


def measured(arguments: list[str]) -> float:
    """Run the experiment, print its tables, also where it is ended before, and return its seconds."""
    print(f"$ python ablation_experiment.py {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    try:
        with TimedUnits() as units:
            code = ablation_experiment.main(arguments)
    finally:
        total = time.perf_counter() - start
        if Metered.latest is not None:  # it came so far
            print(f"\n{Metered.latest.table(total)}", flush=True)
        if torch.cuda.is_available():
            print(f"device memory held at most in the last phase: {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB")
        print(f"\n{units.table()}\n", flush=True)
    if code not in (0, 3):
        sys.exit(code)
    return total


def main() -> None:
    """Write the collection where it is to be written, run, and print the figure."""
    parser = argparse.ArgumentParser(description="Time the whole experiment phase by phase.")
    parser.add_argument("count", type=int, nargs="?", help="SD1.5-like LoRAs to write and use; none with --dataset")
    parser.add_argument("--dataset", help="a collection that is there instead, or 1k, 10k, small")
    parser.add_argument("--top-k", type=int, default=5, help="layers to remove (5)")
    parser.add_argument("--again", action="store_true", help="then run once more with one more layer removed")
    args, rest = parser.parse_known_args()
    if (args.count is None) == (args.dataset is None):
        parser.error("give either a number of LoRAs to write or a --dataset")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ablation_experiment.Stopwatch = Metered
    cpu = f"CPU only, {count_cores()} workers"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    print(f"python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, {machine}")
    with tempfile.TemporaryDirectory() as folder:
        dataset = args.dataset
        if args.count:
            dataset = str(Path(folder, "zoo"))
            start = time.perf_counter()
            write_zoo(Path(dataset), args.count, workers=count_cores())
            print(f"{args.count} LoRAs written in {time.perf_counter() - start:.0f} s")
        elif dataset in BUILT_IN_SIZES and not Path("data", dataset).is_dir():
            steps = BUILT_IN_STEPS.get(dataset, ())
            digits_zoo.build(Path("data/built-in-digits", dataset), BUILT_IN_SIZES[dataset], steps=steps)
        fixed = [f"--dataset={dataset}", f"--output-dir={folder}/results", "--controls=none", *rest]
        first = measured([*fixed, f"--top-k={args.top_k}"])
        if args.again:
            second = measured([*fixed, f"--top-k={args.top_k + 1}"])
            print(f"figure: {second / first:.3f} of the first run's time")
        else:
            print(f"figure: {first:.1f} seconds")


if __name__ == "__main__":
    main()
