"""Seconds and memory of indexing, features and packing as a collection grows, and of indexing many small files.

    python benchmarks/growth.py [--sizes 1000 8000] [--files 90000] [--repeats 1]

Collections of Stable Diffusion 1.5's shapes (`sd15_zoo`, 0.4 MB a LoRA) and of small LoRAs, each with a metadata.json
and an adapter_config.json beside it and metadata of its own in its header, are written to the temporary folder and
removed again; the packed weights take as much disk as a collection. Each phase of each collection runs in a process of
its own, which prints its seconds and its peak resident memory, the interpreter and torch included. The files were
just written, so they come from the page cache where that holds them. With repeats the sizes alternate, and times are
medians. The last line is the time per LoRA of all phases at the largest size over that at the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

sys.path.insert(0, str(Path(__file__).parents[1]))

from sd15_zoo import write_zoo

import data
from experiment import extraction
from experiment.engine import Engine
from experiment.settings import count_cores
from loras.building import WEIGHTS_NAME
from representations import REPRESENTATIONS

PHASES = ("index", "features", "packing")
FEATURES = [name for name, row in REPRESENTATIONS.items() if row.made == "computed"]
CLASSES = 10
CPU = torch.device("cpu")


def write_small(out: Path, count: int) -> None:
    """Write ``count`` LoRAs of two modules as ``<class>/<lora>/``, with JSON files beside the weights."""
    tensors = {
        f"unet.mid_block.attentions.{module}.to_q.lora.{role}.weight": np.ones((4, 4), np.float32)
        for module in range(2)
        for role in ("down", "up")
    }
    for i in range(count):
        folder = out / str(i % CLASSES) / f"{i:06}"
        folder.mkdir(parents=True)
        (folder / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"training": str(i)}))
        (folder / "metadata.json").write_text(json.dumps({"category_label": i % CLASSES, "number": i}))
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}))


def measure(phase: str, root: Path) -> dict[str, float]:
    """Run one phase in this process; return its seconds, and the process's peak resident memory in MiB."""
    start = time.perf_counter()
    collection = data.index_collection(root)
    if phase != "index":
        start = time.perf_counter()
        names = FEATURES if phase == "features" else [extraction.WEIGHTS]
        with tempfile.TemporaryDirectory(dir=root.parent) as cache:
            extraction.extract(collection, names, Path(cache), CPU, Engine([CPU], count_cores()))
            seconds = time.perf_counter() - start  # without the removal
    else:
        seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()  # Linux; getrusage would count the parent's peak too
    peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    return {"seconds": seconds, "mib": peak / 1024}


def in_fresh_process(phase: str, root: Path) -> dict[str, float]:
    """Call `measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", phase, str(root)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Write, measure, print, remove."""
    parser = argparse.ArgumentParser(description="Time and memory of reading a collection as it grows.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 8000], help="LoRAs (1000 8000)")
    parser.add_argument("--files", type=int, default=90_000, help="small files to index (90000)")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each phase and size (1)")
    parser.add_argument("--measure", nargs=2, metavar=("PHASE", "ROOT"), help="one phase, in this process, as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores ({platform.machine()}), {count_cores()} threads, torch {torch.__version__}", flush=True)
    sizes = sorted(args.sizes)
    with tempfile.TemporaryDirectory() as folder:
        roots = {size: Path(folder) / str(size) for size in sizes}
        for size, root in roots.items():
            write_zoo(root, size)
        measured: dict[tuple[str, int], list[dict]] = {(phase, size): [] for phase in PHASES for size in sizes}
        for _ in range(args.repeats):
            for (phase, size), runs in measured.items():
                runs.append(in_fresh_process(phase, roots[size]))
    per_lora = {key: statistics.median(run["seconds"] for run in runs) / key[1] for key, runs in measured.items()}
    header = "".join(f"{f'N = {size:,}':>12}" for size in sizes)
    print(f"{'ms per LoRA':12}{header}{'ratio':>8}   peak memory, MiB")
    for phase in PHASES:
        times = [per_lora[phase, size] for size in sizes]
        peaks = (f"{max(run['mib'] for run in measured[phase, size]):8,.0f}" for size in sizes)
        columns = "".join(f"{1000 * seconds:12.3f}" for seconds in times)
        print(f"{phase:12}{columns}{times[-1] / times[0]:8.2f}   {''.join(peaks)}", flush=True)
    totals = [sum(per_lora[phase, size] for phase in PHASES) for size in sizes]
    columns = "".join(f"{1000 * seconds:12.3f}" for seconds in totals)
    print(f"{'all':12}{columns}{totals[-1] / totals[0]:8.2f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_small(Path(folder) / "small", args.files)
        small = in_fresh_process("index", Path(folder) / "small")
    print(f"{args.files:,} small files indexed in {small['seconds']:.1f} s, {small['mib']:,.0f} MiB")
    print(f"ratio: {totals[-1] / totals[0]:.2f}")


if __name__ == "__main__":
    main()
