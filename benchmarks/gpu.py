"""Everything that is to be known of the program on one GPU, in at most ten minutes; needs no network and no data.

    python benchmarks/gpu.py                                  # all sections, in this order
    python benchmarks/gpu.py --section ceilings numbers steps
    python benchmarks/gpu.py --device=cpu                     # in miniature: shows that the script runs

    ceilings    large copies and products, a launch by Python and in a recording
    numbers     gradients, features, components and kernels against the CPU's
    recorded    training with recorded steps against training without, and in four threads at once
    steps       milliseconds of a step of each stack of the program, recorded and not
    ranking     against the textbook loop
    whole1k     the experiment on 1,000 SD1.5 LoRAs by phase and unit
    others1k    the representations that are not among the fifteen, in the same folders
    same        --quick twice: the same bytes
    continued   killed and continued: the same bytes
    whole10k    the experiment on 10,000

Each section is a process of its own with a limit of its own: one that fails, or hangs, takes nothing from the next,
and what was printed stands wherever all is cut off. With a variable OUT that names a folder, logs are kept there.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import gpu_networks
import gpu_numbers
import gpu_runs
from gpu_networks import Bench

from experiment.settings import have_repeatable_products

TOTAL_SECONDS = 600
GRACE = 5.0  # seconds after its limit in which a section may still end by itself
LINES = 25  # of a traceback
# Sections begin with what is imported here, but nobody may have touched the GPU before.
processes = get_context("fork")


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        run: Prints its figures, and returns the line of the summary.
        limit: Seconds that it may take.
        on_device: Whether its own process computes on the device; else those that it starts.
    """

    run: Callable[[Bench], str]
    limit: float
    on_device: bool = True


SECTIONS = {
    "ceilings": Section(gpu_networks.ceilings, 60),
    "numbers": Section(gpu_numbers.numbers, 120),
    "recorded": Section(gpu_numbers.recorded, 120),
    "steps": Section(gpu_networks.steps, 120),
    "ranking": Section(gpu_runs.ranking, 90, on_device=False),
    "whole1k": Section(gpu_runs.whole1k, 300, on_device=False),
    "others1k": Section(gpu_runs.others, 120, on_device=False),
    "same": Section(gpu_runs.same, 120, on_device=False),
    "continued": Section(gpu_runs.continued, 150, on_device=False),
    "whole10k": Section(gpu_runs.whole10k, 560, on_device=False),
}


class Tee:
    """A stream that is printed, and written to a file too."""

    def __init__(self, stream, path: Path):
        self.stream, self.file = stream, path.open("a", buffering=1)

    def write(self, text: str) -> int:
        """Write to both."""
        self.file.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush both."""
        self.file.flush()
        self.stream.flush()


def carry_out(section: Section, bench: Bench, limit: float, summary: Connection) -> None:
    """Run a section in this process, and send the line of the summary; hanging, it ends with all threads' stacks."""
    os.setsid()  # to be killed with whatever it has started
    faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
    try:
        if section.on_device:
            gpu_numbers.begin_thread(bench.device)
        line = section.run(bench)
        print(line, flush=True)
    except gpu_runs.RunError as error:
        line = f"FAILED: {error}"
        print(line, flush=True)
    except Exception as error:
        print("\n".join(traceback.format_exc().splitlines()[-LINES:]), flush=True)
        line = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    summary.send(line)


def isolated(section: Section, bench: Bench, limit: float) -> str:
    """Run a section in a process of its own; return the line of the summary."""
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=carry_out, args=(section, bench, limit, sender))
    process.start()
    sender.close()
    try:
        process.join(limit + GRACE)
    finally:
        with suppress(ProcessLookupError):  # also what it has started
            os.killpg(process.pid, signal.SIGKILL)
    process.join()
    with suppress(EOFError):
        return receiver.recv()
    return f"FAILED: ended without a word, exit code {process.exitcode}"


def count_gpus() -> int:
    """Return the number of GPUs, as another process sees them: this one must not touch them."""
    with processes.Pool(1) as pool:
        return pool.apply(torch.cuda.device_count)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description="Check and time the program on one GPU.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: all in miniature (cuda)")
    parser.add_argument("--section", nargs="+", metavar="NAME", choices=SECTIONS, help="only these (all)")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help=f"in all, at most ({TOTAL_SECONDS})")
    parser.add_argument("--against", type=Path, help="results.json of the same 1,000 LoRAs on a CPU, to compare with")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections and print the summary; exit with 1 where one failed, or has found numbers that are wrong."""
    args = parse_arguments(arguments)
    begun = time.monotonic()
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)  # of BLAS's idle threads
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # that the scratch folder goes
    if args.device == "cuda" and not count_gpus():
        print("There is no GPU here, so there is nothing to measure. --device=cpu runs everything in miniature.")
        return
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        sys.stdout = Tee(sys.stdout, out / "gpu.txt")
    have_repeatable_products()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    summary = {}
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        for name in [name for name in SECTIONS if name in (args.section or SECTIONS)]:
            left, now = begun + args.seconds - time.monotonic(), time.monotonic()
            limit = min(SECTIONS[name].limit, left - GRACE)
            if limit < 5:
                summary[name] = "no time left"
                continue
            print(f"\n== {name} (at {now - begun:.0f} s, at most {limit:.0f} s)", flush=True)
            bench = Bench(device, Path(scratch), out, now + limit, args.against)
            line = isolated(SECTIONS[name], bench, limit)
            summary[name] = f"{line} [{time.monotonic() - now:.0f} s]"
        print(f"\n== summary (at {time.monotonic() - begun:.0f} s)")
        for name, line in summary.items():
            print(f"{name:<10} {line}", flush=True)
    if any(line.startswith(("FAILED", "WRONG")) for line in summary.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
