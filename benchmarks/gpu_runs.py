"""Whole programs on a GPU: ranking, experiment, its repetition and continuation: sections of benchmarks/gpu.py."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_networks import Bench
from sd15_zoo import write_zoo

from experiment.settings import count_cores
from representations import OF_WEIGHTS

ROOT = Path(__file__).parents[1]
# The representations that there were when the bar of a minute was set; the others are measured beside them.
FIFTEEN = (
    *("flat_vec", "stats", "pca", "spectral", "matrix_norms", "distribution", "coupling", "frequency"),
    *("info_theoretic", "ensemble", "vae", "contrastive", "denoising", "update_sketch", "update_kernel"),
)
VARYING = {"environment", "timing"}  # sections of results.json that differ from run to run
MINIATURE = ["--quick", "--layers=mid_block"]  # 8 of the 128 layers
END_SECONDS = 4.0  # that a program has to end when its time is up
PHASES = "phase  "  # begins the tables of whole_run.py
TAIL = 15  # lines of a log that are printed where a program failed


class RunError(RuntimeError):
    """A program that failed, or did not end in time."""


def start(bench: Bench, script: str, arguments: list[str], log: str) -> tuple[subprocess.Popen, Path]:
    """Start a script of the project on the device; return it and the file of all that it prints."""
    path = (bench.out or bench.scratch) / f"{log}.txt"
    device = f"--device={bench.device}"  # one GPU, also where there are several
    command = [sys.executable, str(ROOT / script), *arguments, device]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    with path.open("a") as file:
        file.write(f"$ python {script} {' '.join(command[2:])}\n")
        file.flush()
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment), path


def run(bench: Bench, script: str, arguments: list[str], log: str) -> str:
    """Run a script of the project on the device; return what it printed.

    Raises:
        RunError: It failed, or the section's time ran out; the last lines are printed, from its tables on.
    """
    process, path = start(bench, script, arguments, log)
    begun, fault = time.monotonic(), ""
    try:
        code = process.wait(max(1.0, bench.left() - 2 * END_SECONDS))
        if code not in (0, 3):
            fault = f"ended with exit code {code}"
    except subprocess.TimeoutExpired:
        fault = f"did not end in {time.monotonic() - begun:.0f} s"
        process.terminate()  # whole_run.py then prints its tables
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        process.kill()
        process.wait()
    text = path.read_text(errors="replace")
    text = text[text.rfind("$ python") :]  # of this run
    if fault:
        tables = text.rfind(f"\n{PHASES}")
        print(text[tables:].strip() if tables >= 0 else "\n".join(text.splitlines()[-TAIL:]), flush=True)
        raise RunError(f"{script} {fault}")
    return text


def zoo(bench: Bench, count: int) -> Path:
    """Return a folder of SD1.5-like LoRAs, written by all cores unless another section has."""
    folder = bench.scratch / f"zoo{count}"
    ready = folder.with_suffix(".ready")
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        begun = time.monotonic()
        write_zoo(folder, count, workers=count_cores())
        ready.touch()
        print(f"{count} LoRAs written in {time.monotonic() - begun:.1f} s", flush=True)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Speed
# ----------------------------------------------------------------------------------------------------------------------


def ranking(bench: Bench) -> str:
    """Time the ranking against the textbook loop: benchmarks/ranking.py."""
    sizes = ["--layers=128", "--runs=10", "--repeats=3", "--textbook=8"]
    if bench.small:
        sizes = ["--layers=4", "--runs=1", "--repeats=1", "--textbook=2", "--epochs=2"]
    lines = run(bench, "benchmarks/ranking.py", sizes, "ranking").strip().splitlines()
    print("\n".join(lines[:1] + lines[-3:-1]), flush=True)
    return f"{lines[-1]}; {lines[-2]}"


def accuracies(results: dict, reference: dict | None) -> tuple[str, int, int]:
    """Format test accuracies of both conditions, and how far they are from a reference in standard errors.

    The standard error of a difference is by the deviations over runs, at least half a test LoRA.

    Returns:
        The table, how many accuracies were compared, and how many of these are beyond two standard errors.
    """
    lines = [f"{'test accuracy, %':<18}{'without top':>12}{'all layers':>12}"]
    compared = beyond = 0
    test = results["dataset"]["split_sizes"]["test"]
    for name in results["baseline_results"]:
        cells = [f"{name:<18}"]
        for condition in ("ablation_results", "baseline_results"):
            entry = results[condition].get(name, {}).get("test_accuracy")
            cells.append(f"{100 * entry['mean']:>12.2f}" if entry else f"{'-':>12}")
            other = (reference or {}).get(condition, {}).get(name, {}).get("test_accuracy")
            if entry and other:
                variance = sum(x["std"] ** 2 / len(x["runs"]) for x in (entry, other))
                away = (entry["mean"] - other["mean"]) / max(math.sqrt(variance), 0.5 / test)
                compared, beyond = compared + 1, beyond + (abs(away) > 2)
                cells.append(f" ({away:+.1f} SE)")
        lines.append("".join(cells))
    return "\n".join(lines), compared, beyond


def results_in(output: Path) -> dict:
    """Return the results of the one collection in an output folder."""
    (path,) = output.glob("ablation_*/results.json")
    return json.loads(path.read_text())


def whole(bench: Bench, count: int, names: tuple[str, ...], log: str, output: Path) -> tuple[str, dict]:
    """Run the experiment under benchmarks/whole_run.py, print its tables; return its figure and the results."""
    flags = [f"--dataset={zoo(bench, count)}", f"--output-dir={output}", f"--representations={','.join(names)}"]
    if bench.small:
        flags += MINIATURE
    text = run(bench, "benchmarks/whole_run.py", flags, log)
    print(text[text.rindex(f"\n{PHASES}") :].strip(), flush=True)
    return text.strip().splitlines()[-1].removeprefix("figure: "), results_in(output)


def whole_of(bench: Bench, count: int) -> str:
    """Run the fifteen representations, and compare their accuracies."""
    output = bench.scratch / f"whole{count}"
    figure, results = whole(bench, count, FIFTEEN, f"whole{count}", output)
    reference = json.loads(bench.against.read_text()) if bench.against else None
    table, compared, beyond = accuracies(results, reference)
    print(table, flush=True)
    if bench.out:
        (bench.out / f"whole{count}.json").write_text(json.dumps(results))
    line = f"{count:,} LoRAs, {len(results['baseline_results'])} representations: {figure}"
    return line + (f", {beyond} of {compared} accuracies beyond 2 SE of the reference" if compared else "")


def others(bench: Bench) -> str:
    """Run the other representations beside the fifteen, on the same 1,000 LoRAs and in the same folders."""
    count = 60 if bench.small else 1000
    names = tuple(name for name in OF_WEIGHTS if name not in FIFTEEN)
    figure, results = whole(bench, count, names, f"others{count}", bench.scratch / f"whole{count}")
    print(accuracies(results, None)[0], flush=True)
    return f"{count:,} LoRAs, {', '.join(names)}: {figure}"


def whole1k(bench: Bench) -> str:
    """Run the whole experiment on 1,000 LoRAs."""
    return whole_of(bench, 60 if bench.small else 1000)


def whole10k(bench: Bench) -> str:
    """Run the whole experiment on 10,000 LoRAs."""
    return whole_of(bench, 80 if bench.small else 10_000)


# ----------------------------------------------------------------------------------------------------------------------
# The same bytes
# ----------------------------------------------------------------------------------------------------------------------


def different_files(first: Path, second: Path) -> list[str]:
    """Return the files of two folders of results that differ; of results.json not by environment and timing."""

    def contents(folder: Path) -> dict[str, object]:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        parsed = json.loads(files["results.json"])
        return files | {"results.json": {key: value for key, value in parsed.items() if key not in VARYING}}

    ours, theirs = contents(first), contents(second)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def experiment_flags(bench: Bench, output: Path) -> list[str]:
    """Return the flags of the runs that are compared."""
    flags = [f"--dataset={zoo(bench, 60 if bench.small else 100)}", "--quick", f"--output-dir={output}"]
    return [*flags, *MINIATURE, "--representations=stats,update_sketch,vae"] if bench.small else flags


def finished_units(output: Path) -> int:
    """Return how many units of work an output folder holds."""
    return len(list((output / ".cache").glob("**/units/*.npz")))


def undisturbed(bench: Bench) -> Path:
    """Return the output folder of a run from start to end; run it, unless another section has."""
    output = bench.scratch / "same1"
    if not list(output.glob("ablation_*/results.json")):
        begun = time.monotonic()
        run(bench, "ablation_experiment.py", experiment_flags(bench, output), "same")
        print(f"{time.monotonic() - begun:.0f} s, {finished_units(output)} units", flush=True)
    return output


def compared(first: Path, second: Path) -> str:
    """Return a sentence on the files of two output folders.

    Raises:
        RunError: They differ.
    """
    folders = [next(output.glob("ablation_*")) for output in (first, second)]
    if names := different_files(*folders):
        raise RunError(f"other bytes in {', '.join(names)}")
    files = sum(path.is_file() for path in folders[0].rglob("*"))
    return f"the same bytes in {files} files"


def same(bench: Bench) -> str:
    """Run the experiment twice."""
    first, second = undisturbed(bench), bench.scratch / "same2"
    begun = time.monotonic()
    run(bench, "ablation_experiment.py", experiment_flags(bench, second), "same")
    print(f"{time.monotonic() - begun:.0f} s, {finished_units(second)} units", flush=True)
    return f"twice: {compared(first, second)}"


def continued(bench: Bench) -> str:
    """Kill the experiment after a third of its units and after two thirds, continue it, and compare the results."""
    whole_output, output = undisturbed(bench), bench.scratch / "continued"
    units, flags = finished_units(whole_output), experiment_flags(bench, output)
    for number, share in ((signal.SIGKILL, 1 / 3), (signal.SIGUSR1, 2 / 3)):
        process, _ = start(bench, "ablation_experiment.py", flags, "continued")
        while process.poll() is None and finished_units(output) < share * units:
            if bench.left() < 10:
                process.kill()
                raise RunError("no time to wait for the units after which it is killed")
            time.sleep(0.05)
        if process.poll() is not None:
            raise RunError(f"it ended before it could be killed, with exit code {process.returncode}")
        process.send_signal(number)
        print(f"{number.name} with {finished_units(output)} of {units} units: exit code {process.wait()}", flush=True)
    run(bench, "ablation_experiment.py", flags, "continued")
    return f"killed twice and continued: {compared(whole_output, output)}"
