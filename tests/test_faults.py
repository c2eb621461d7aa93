"""Killed, stopped, crowded out: whatever happens to a run, the next one ends with the same bytes."""

import contextlib
import glob
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from making import quick_runs, write_collection
from working import alive, children, until, workers

import ablation_experiment
from ablation_experiment import FIGURE_FOLDER, RESULT_FILES
from experiment import store
from experiment.signals import ENDING, end_at_signals

ROOT = Path(ablation_experiment.__file__).parent
FLAGS = ("--top-k=1", "--quick", "--num-runs=1", "--device=cpu", "--representations=stats,pca,coupling,vae,flat_vec")
KINDS = ("passes/*/*.json", "*/units/classifier-*", "*/units/autoencoder-*", "*/units/pca-*")
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
SCRIPT = ROOT / "ablation_experiment.py"


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ablation_experiment"])
    return context


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("collections") / "small", classes=2, per_class=10)


@pytest.fixture(scope="module")
def expected(processes, collection, tmp_path_factory):
    """The result files of a run that nothing happened to, and how long it took."""
    out = tmp_path_factory.mktemp("expected")
    start = time.monotonic()
    assert started(processes, collection, out).wait() == 0
    return results_in(out), time.monotonic() - start


class Run:
    """A run in threads of a process that begins with everything imported; its output goes to a pipe."""

    def __init__(self, context, arguments, file_size, whole):
        self.output, output = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(arguments, output, file_size, whole))
        self.process.start()
        output.close()
        self.pid = self.process.pid

    def running(self):
        return self.process.is_alive()

    def join(self, seconds):
        self.process.join(seconds)

    def wait(self, seconds=120):
        self.process.join(seconds)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def lines(self):
        with os.fdopen(os.dup(self.output.fileno())) as output:
            return output.read().splitlines()

    def kill(self, number=signal.SIGKILL):
        if self.running():
            os.kill(self.pid, number)
        return self.wait()


def _child(arguments, output, file_size, whole):
    """The program as a process of its own runs it, or with little of what takes long beside the training."""
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.environ["OMP_NUM_THREADS"] = "1"
    end_at_signals()
    if file_size:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    with contextlib.nullcontext() if whole else quick_runs():
        code = ablation_experiment.main(arguments)
    sys.exit(code)


class Program(Run):
    """The program as a user starts it, with two worker processes; it takes seconds to import what it needs."""

    def __init__(self, arguments, log):
        command, environment = [sys.executable, str(SCRIPT), *arguments], os.environ | {"OMP_NUM_THREADS": "2"}
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        self.pid = self.process.pid

    def running(self):
        return self.process.poll() is None

    def join(self, seconds):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def wait(self, seconds=120):
        return self.process.wait(seconds)

    def lines(self):
        return self.log.read_text().splitlines()


def started(context, collection, out, *flags, cores=1, file_size=0, whole=False):
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["--dataset", str(collection), "--output-dir", str(out), *FLAGS, *flags]
    return Run(context, arguments, file_size, whole) if cores == 1 else Program(arguments, out.with_suffix(".log"))


def results_in(out):
    """Return the result files, less what may differ between two runs, as the environment that the page shows."""
    folder = out / "ablation_small"
    found = {name: (folder / name).read_bytes() for name in RESULT_FILES}
    results = json.loads(found.pop("results.json"))
    del found["report.html"]
    return found | {name: value for name, value in results.items() if name not in ("environment", "timing")}


def units_of(out, kind):
    """Return the files of one kind that a run has in its cache so far; a folder that it removes meanwhile has none."""
    return [out / ".cache" / path for path in glob.iglob(kind, root_dir=out / ".cache")]


def finished_work(out):
    return {path: path.stat().st_mtime_ns for kind in KINDS[1:] for path in units_of(out, kind)}


def assert_whole(out, expected):
    """Assert that the results are those expected, with nothing beside them, and every finished unit can be read."""
    assert results_in(out) == expected
    assert {path.name for path in (out / "ablation_small").iterdir()} - {FIGURE_FOLDER} == {*RESULT_FILES}
    for path in finished_work(out):
        assert store.load_arrays(path)
    assert not [path for path in out.iterdir() if path.name.endswith(".lock")]


# -- kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [*KINDS[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:]), "../ablation_small/results.txt"],
)
def test_a_kill_right_after_each_kind_of_unit_loses_nothing(processes, collection, expected, tmp_path, kind):
    killed = False
    for trial in range(10):  # a pass takes its documents away again, maybe before anyone has seen them
        out = tmp_path / f"out{trial}"
        run = started(processes, collection, out)
        while run.running() and not units_of(out, kind):
            pass
        killed = run.kill() == -signal.SIGKILL
        before = finished_work(out)
        assert started(processes, collection, out).wait() == 0
        assert before.items() <= finished_work(out).items()  # nothing was computed again
        assert_whole(out, expected[0])
        if killed or kind.endswith("results.txt"):  # the last one comes a moment before the end
            break
    assert killed or kind.endswith("results.txt")


def kills_at_random_moments(processes, collection, expected, tmp_path, number, cores):
    """Kill runs until they get to their end; every other time, where there are several, a worker and not the run."""
    draw, kills, trial, seconds = random.Random(0), 0, 0, expected[1] + (4 if cores > 1 else 0)
    while kills < number:
        out, trial = tmp_path / f"out{trial}", trial + 1
        before: dict = {}
        while True:
            run = started(processes, collection, out, cores=cores)
            run.join(draw.uniform(0, seconds))
            at_work = workers(run.pid) if run.running() else []
            if at_work and kills % 2:
                os.kill(draw.choice(at_work), signal.SIGKILL)  # the same run goes on
                kills += 1
                run.join(draw.uniform(0, seconds))
            started_by_it = children(run.pid) if run.running() else []
            code = run.kill()
            kills += code == -signal.SIGKILL
            until(lambda processes=started_by_it: not any(map(alive, processes)), seconds=5)
            after = finished_work(out)
            assert before.items() <= after.items()  # of what an earlier run finished nothing is done again
            before = after
            if code != -signal.SIGKILL:
                assert code == 0, run.lines()
                break
        assert_whole(out, expected[0])
    print(f"{kills} kills survived in {trial} runs with identical results")


@pytest.mark.slow
def test_forty_kills_of_runs_and_of_workers_lose_nothing(processes, collection, expected, tmp_path):
    kills_at_random_moments(processes, collection, expected, tmp_path, 10, cores=1)
    start = time.monotonic()
    assert started(processes, collection, tmp_path / "whole", whole=True).wait() == 0
    expected = results_in(tmp_path / "whole"), time.monotonic() - start
    kills_at_random_moments(processes, collection, expected, tmp_path / "workers", 30, cores=2)


def at_work(out: Path) -> set[int]:
    """Return the processes that have noted a unit which they do."""
    return {int(path.name.split(".")[-2]) for path in units_of(out, "*/runs/*/*.npz.*")}


@pytest.mark.slow  # the default run ends workers in miniature, in test_engine.py
def test_a_run_goes_on_where_a_worker_is_killed_and_gives_the_same_as_one_core(processes, tmp_path):
    """With inputs so large that torch itself would share them among threads."""
    root = write_collection(tmp_path / "small", classes=2, per_class=20, modules=4, width=128)
    flags = ("--num-runs=2", "--representations=vae,flat_vec")
    assert started(processes, root, tmp_path / "one", *flags, whole=True).wait() == 0
    out = tmp_path / "two"
    run = started(processes, root, out, *flags, cores=2)
    until(lambda: finished_work(out) and at_work(out) & set(workers(run.pid)))
    began = {*workers(run.pid), *children(run.pid)}
    os.kill(min(at_work(out) & set(workers(run.pid))), signal.SIGKILL)
    until(lambda: set(workers(run.pid)) - began)
    began |= set(children(run.pid))
    assert run.wait() == 0
    (line,) = [line for line in run.lines() if line.startswith("  a worker was ended by SIGKILL, as where memory runs")]
    assert "; at work: " in line and line.endswith("; that is done again")
    assert_whole(out, results_in(tmp_path / "one"))
    until(lambda: not any(map(alive, began)), seconds=5)


# -- signals ----------------------------------------------------------------------------------------------


PHASES = {  # what is there when a phase has begun
    "reading": "passes/*/*.json",
    "ranking": "*/units/classifier-*",
    "fitting": "*/units/autoencoder-*",
    "results": "../ablation_small/.*",
}
ALL = [(phase, number) for phase in PHASES for number in ENDING]
BY_DEFAULT = [("reading", signal.SIGUSR1), ("ranking", signal.SIGTERM), ("fitting", signal.SIGINT)]


@pytest.mark.parametrize(
    ("phase", "number"),
    [pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.slow) for case in ALL],
    ids=lambda part: part if isinstance(part, str) else part.name,
)
def test_signals_end_the_run_and_the_same_command_continues(processes, collection, expected, tmp_path, phase, number):
    ended = False
    for trial in range(10):  # a phase may be over before anyone has seen it
        out = tmp_path / f"out{trial}"
        run = started(processes, collection, out)
        while run.running() and not units_of(out, PHASES[phase]):
            pass
        start = time.monotonic()
        code, seconds = run.kill(number), time.monotonic() - start
        before = finished_work(out)
        lines = run.lines()
        if phase == "ranking":  # the others are as after a kill
            assert started(processes, collection, out).wait() == 0
            assert before.items() <= finished_work(out).items()
            assert_whole(out, expected[0])
        if ended := code != 0:
            assert code == CODES[number] and seconds < 2
            assert lines[-1] == f"Stopped by {number.name}. The same command continues where this one stopped."
            break
    assert ended


def test_signals_end_a_run_with_workers_and_its_processes(processes, collection, tmp_path):
    """All of its processes get the signal, as from a terminal or Slurm."""
    run = started(processes, collection, tmp_path / "out", cores=2)
    until(lambda: len(workers(run.pid)) == 2)
    time.sleep(1.0)
    started_by_it, start = children(run.pid), time.monotonic()
    os.killpg(run.pid, signal.SIGUSR1)
    assert run.wait() == 143 and time.monotonic() - start < 2
    *_, before, last = run.lines()
    assert last == "Stopped by SIGUSR1. The same command continues where this one stopped." and not before
    until(lambda: not any(map(alive, started_by_it)), seconds=5)


def catches(process: int, number: int) -> bool:
    """Return whether a process handles a signal already."""
    status = Path(f"/proc/{process}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for handlers in /proc")
@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_signals_end_a_run_that_has_just_begun(collection, tmp_path, each):
    """Also while it imports, as soon as Python itself has started: of an earlier moment no program knows."""
    cases = [(0.0, signal.SIGTERM), (0.5, signal.SIGINT), (1.0, signal.SIGUSR1), (2.0, signal.SIGTERM)]
    if each:
        cases = [(delay, number) for delay in (0.0, 0.1, 0.5, 1.0, 2.0) for number in ENDING]
    for delay, number in cases:
        command = [sys.executable, SCRIPT, "--dataset", collection, "--output-dir", tmp_path / f"{delay}-{number}"]
        run = subprocess.Popen([*map(str, command), *FLAGS], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        until(lambda run=run: catches(run.pid, ENDING[-1]))  # the last of which the program sets its handler
        time.sleep(delay)
        os.kill(run.pid, number)
        _, said = run.communicate(timeout=2)
        assert run.returncode == CODES[number], said
        assert said.decode().strip() == f"Stopped by {number.name}. The same command continues where this one stopped."


def test_a_run_whose_output_nobody_reads_ends_in_a_line_and_goes_on_later(processes, collection, expected, tmp_path):
    """As where it is piped into a program that ends."""
    out, errors = tmp_path / "out", tmp_path / "errors.txt"
    arguments = ["--dataset", str(collection), "--output-dir", str(out), *FLAGS]
    process = processes.Process(target=_unheard, args=(arguments, str(errors)))
    process.start()
    process.join(120)
    assert process.exitcode == 2
    line = "error: nobody reads the output any more (a broken pipe). The same command continues where this one stopped."
    assert errors.read_text().splitlines() == [line]
    assert started(processes, collection, out).wait() == 0
    assert_whole(out, expected[0])


def _unheard(arguments, errors):
    """The program with a pipe that is closed for standard output."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.dup2(write_end, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(ablation_experiment.main(arguments))


# -- disks and caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_size", "where"),
    [
        pytest.param(1000, "/passes/", marks=pytest.mark.slow),
        pytest.param(1000, "/units/", marks=pytest.mark.slow),
        (12000, "/ablation_small/"),
    ],
)
def test_a_full_disk_is_told_in_a_line_and_corrupts_nothing(
    processes, collection, expected, tmp_path, file_size, where
):
    """Files that may not grow beyond a size fail as on a full disk: in the pass, in a unit, in the results."""
    out = tmp_path / "out"
    if where == "/units/":
        begun = started(processes, collection, out)
        while begun.running() and not units_of(out, "*/features/weights-*"):
            pass
        begun.kill()
    run = started(processes, collection, out, file_size=file_size)
    assert run.wait() == 2
    *_, before, last = run.lines()
    assert last.startswith(f"error: {out}") and ": File too large. " in last and not before.startswith("  File")
    assert where in last and last.endswith("The same command continues where this one stopped.")
    assert where == "/units/" or not [path for path in out.rglob(".*") if path.is_file()]  # no temporary file is left
    assert started(processes, collection, out).wait() == 0
    assert_whole(out, expected[0])


def test_a_damaged_unit_is_done_again_with_a_line(processes, collection, expected, tmp_path):
    out = tmp_path / "out"
    assert started(processes, collection, out).wait() == 0
    shutil.rmtree(out / "ablation_small")
    path = units_of(out, "*/units/classifier-*")[0]
    path.write_bytes(path.read_bytes()[:-30])
    run = started(processes, collection, out)
    assert run.wait() == 0
    told = f"cache     {path} is damaged (its digest is another): removed, and computed again"
    assert told in run.lines()
    assert_whole(out, expected[0])


# -- two at once ----------------------------------------------------------------------------------------------


def two_writers(processes, collection, expected, tmp_path, rounds):
    """Two processes begin together on one output folder, in every other round while one of them has already begun."""
    refused = 0
    for number in range(rounds):
        out = tmp_path / f"out{number}"
        first = started(processes, collection, out)
        if number % 2:
            time.sleep(expected[1] / 2)
        runs = [first, started(processes, collection, out)]
        for run in runs:
            code, last = run.wait(), run.lines()[-1]
            assert code == 0 or (code == 2 and last.startswith(f"error: {out / 'ablation_small'}: process ")), last
            refused += code == 2
        assert_whole(out, expected[0])
    print(f"{rounds} rounds of two writers, {refused} refused, 0 corrupt files")
    return refused


def test_two_processes_on_one_output_folder_never_corrupt_it(processes, collection, expected, tmp_path):
    assert two_writers(processes, collection, expected, tmp_path, 2) > 0


@pytest.mark.slow
def test_two_processes_never_corrupt_an_output_folder_in_ten_rounds(processes, collection, expected, tmp_path):
    assert two_writers(processes, collection, expected, tmp_path, 10) > 0


@pytest.mark.slow
def test_two_processes_with_one_cache_do_the_same_in_two_folders(processes, collection, expected, tmp_path):
    cache = f"--cache-dir={tmp_path / 'cache'}"
    runs = [started(processes, collection, tmp_path / out, cache) for out in ("one", "two")]
    assert [run.wait() for run in runs] == [0, 0], [run.lines()[-1] for run in runs]
    for out in ("one", "two"):
        assert results_in(tmp_path / out) == expected[0]
