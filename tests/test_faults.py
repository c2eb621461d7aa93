"""Killed, stopped, crowded out: whatever happens to a run, the next one ends with the same bytes."""

import glob
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from making import write_collection

import ablation_experiment
from ablation_experiment import files_of
from experiment import store

ROOT = Path(ablation_experiment.__file__).parent
FLAGS = ("--top-k=1", "--quick", "--num-runs=2", "--device=cpu", "--representations=stats,pca,coupling,vae,flat_vec")
KINDS = ("passes/*/*.json", "*/units/classifier-*", "*/units/autoencoder-*", "*/units/pca-*")


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
    """A process at work, whose output goes to a pipe."""

    def __init__(self, context, arguments, file_size):
        self.output, output = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(arguments, output, file_size))
        self.process.start()
        output.close()

    def wait(self, seconds=120):
        self.process.join(seconds)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def lines(self):
        with os.fdopen(os.dup(self.output.fileno())) as output:
            return output.read().splitlines()

    def kill(self, number=signal.SIGKILL):
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        return self.wait()


def _child(arguments, output, file_size):
    """The program as a process of its own runs it."""
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    if file_size:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = ["ablation_experiment.py", *arguments]
    sys.exit(ablation_experiment.command_line())


def started(context, collection, out, *flags, file_size=0):
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["--dataset", str(collection), "--output-dir", str(out), *FLAGS, *flags]
    return Run(context, arguments, file_size)


def results_in(out):
    """Return the result files, less what may differ between two runs."""
    folder = out / "ablation_small"
    found = {name: (folder / name).read_bytes() for name in files_of({})}
    results = json.loads(found.pop("results.json"))
    return found | {name: value for name, value in results.items() if name not in ("environment", "timing")}


def units_of(out, kind):
    """Return the files of one kind that a run has in its cache so far; a folder that it removes meanwhile has none."""
    return [out / ".cache" / path for path in glob.iglob(kind, root_dir=out / ".cache")]


def finished_work(out):
    return {path: path.stat().st_mtime_ns for kind in KINDS[1:] for path in units_of(out, kind)}


def assert_whole(out, expected):
    """Assert that the results are those expected, with nothing beside them, and every finished unit can be read."""
    assert results_in(out) == expected
    assert sorted(path.name for path in (out / "ablation_small").iterdir()) == sorted(files_of({}))
    for path in finished_work(out):
        assert store.load_arrays(path)
    assert not [path for path in out.iterdir() if path.name.endswith(".lock")]


# -- kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "../ablation_small/results.txt"])
def test_a_kill_right_after_each_kind_of_unit_loses_nothing(processes, collection, expected, tmp_path, kind):
    killed = False
    for trial in range(10):  # a pass takes its documents away again, maybe before anyone has seen them
        out = tmp_path / f"out{trial}"
        run = started(processes, collection, out)
        while run.process.is_alive() and not units_of(out, kind):
            pass
        killed = run.kill() == -signal.SIGKILL
        before = finished_work(out)
        assert started(processes, collection, out).wait() == 0
        assert before.items() <= finished_work(out).items()  # nothing was computed again
        assert_whole(out, expected[0])
        if killed or kind.endswith("results.txt"):  # the last one comes a moment before the end
            break
    assert killed or kind.endswith("results.txt")


def kills_at_random_moments(processes, collection, expected, tmp_path, number):
    draw, kills, trial = random.Random(0), 0, 0
    while kills < number:
        out, trial = tmp_path / f"out{trial}", trial + 1
        before: dict = {}
        while True:
            run = started(processes, collection, out)
            run.process.join(draw.uniform(0, expected[1]))
            code = run.kill()
            kills += code == -signal.SIGKILL
            after = finished_work(out)
            assert before.items() <= after.items()  # of what an earlier run finished nothing is done again
            before = after
            if code != -signal.SIGKILL:
                assert code == 0, run.lines()
                break
        assert_whole(out, expected[0])
    print(f"{kills} kills survived in {trial} runs with identical results")


def test_kills_at_random_moments_lose_nothing(processes, collection, expected, tmp_path):
    kills_at_random_moments(processes, collection, expected, tmp_path, 1)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_lose_nothing(processes, collection, expected, tmp_path):
    kills_at_random_moments(processes, collection, expected, tmp_path, 30)


# -- signals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_signals_end_the_run_and_the_same_command_continues(processes, collection, expected, tmp_path, name, code):
    out = tmp_path / "out"
    run = started(processes, collection, out)
    while run.process.is_alive() and not units_of(out, "*/units/classifier-*"):
        pass
    assert run.kill(getattr(signal, name)) == code
    said = f"Stopped by {name}. The same command continues where this one stopped."
    assert run.lines()[-1] == said
    before = finished_work(out)
    assert before and started(processes, collection, out).wait() == 0
    assert before.items() <= finished_work(out).items()
    assert_whole(out, expected[0])


# -- disks and caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file_size", "where"), [(1000, "/passes/"), (1000, "/units/"), (12000, "/ablation_small/")])
def test_a_full_disk_is_told_in_a_line_and_corrupts_nothing(
    processes, collection, expected, tmp_path, file_size, where
):
    """Files that may not grow beyond a size fail as on a full disk: in the pass, in a unit, in the results."""
    out = tmp_path / "out"
    if where == "/units/":
        begun = started(processes, collection, out)
        while begun.process.is_alive() and not units_of(out, "*/features/weights-*"):
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


def test_a_damaged_cache_is_told_in_a_line(processes, collection, expected, tmp_path):
    out = tmp_path / "out"
    assert started(processes, collection, out).wait() == 0
    (out / "ablation_small" / "results.json").unlink()
    path = units_of(out, "*/units/classifier-*")[0]
    path.write_bytes(path.read_bytes()[:-30])
    run = started(processes, collection, out)
    assert run.wait() == 2
    last = run.lines()[-1]
    assert last.startswith(f"error: {path} is damaged") and "Remove it. The same command continues" in last
    path.unlink()
    assert started(processes, collection, out).wait() == 0
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
def test_two_processes_never_corrupt_an_output_folder_in_twenty_rounds(processes, collection, expected, tmp_path):
    assert two_writers(processes, collection, expected, tmp_path, 20) > 0


def test_two_processes_with_one_cache_do_the_same_in_two_folders(processes, collection, expected, tmp_path):
    cache = f"--cache-dir={tmp_path / 'cache'}"
    runs = [started(processes, collection, tmp_path / out, cache) for out in ("one", "two")]
    assert [run.wait() for run in runs] == [0, 0], [run.lines()[-1] for run in runs]
    for out in ("one", "two"):
        assert results_in(tmp_path / out) == expected[0]


# -- several processes of one job ---------------------------------------------------------------------------


SCRIPT = ROOT / "ablation_experiment.py"


def torchrun(collection, out, *flags, threads=1, script=SCRIPT):
    """Start two processes of one job in the folder that holds the output's; with several threads each has children."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script]
    command += ["--dataset", collection, "--output-dir", out, *FLAGS, *flags]
    return subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        cwd=out.parent,
    )


@pytest.mark.parametrize(("threads", "through_a_link"), [pytest.param(1, False, marks=pytest.mark.slow), (2, True)])
def test_two_processes_of_one_job_give_the_same_bytes_as_one(collection, expected, tmp_path, threads, through_a_link):
    script = SCRIPT
    if through_a_link:
        script = tmp_path / "linked.py"
        script.symlink_to(SCRIPT)
    job = torchrun(collection, tmp_path / "out", threads=threads, script=script)
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output
    assert output.count("Phase 1") == 1  # only one of them speaks
    assert_whole(tmp_path / "out", expected[0])
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "linked.py"}  # nothing lies in the folder of the start


def test_a_job_that_lost_a_process_ends_and_the_next_one_continues(processes, collection, expected, tmp_path):
    assert started(processes, collection, tmp_path / "whole", "--num-runs=8").wait() == 0
    out = tmp_path / "out"
    job = torchrun(collection, out, "--num-runs=8")
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    while job.poll() is None and len(units_of(out, "*/units/classifier-*")) < 3:
        time.sleep(0.01)
    os.kill(int(workers.read_text().split()[-1]), signal.SIGKILL)
    output, _ = job.communicate(timeout=240)
    assert job.returncode not in (0, None), output
    assert "in carry_out" not in output  # no traceback of ours
    before = finished_work(out)
    again = torchrun(collection, out, "--num-runs=8")
    output, _ = again.communicate(timeout=240)
    assert before and again.returncode == 0, output
    assert before.items() <= finished_work(out).items()
    assert_whole(out, results_in(tmp_path / "whole"))


@pytest.mark.parametrize("flag", ["--top-k=4", pytest.param("--dataset=nowhere", marks=pytest.mark.slow)])
def test_a_job_says_what_is_wrong_and_ends(collection, tmp_path, flag):
    """Faults that all processes meet, or the first alone, for which the others wait."""
    job = torchrun(collection, tmp_path / "out", flag)
    output, _ = job.communicate(timeout=240)
    said = [line for line in output.splitlines() if line.startswith(f"error: {flag.split('=')[0]}")]
    assert job.returncode != 0 and len(said) == 1 and "another program" not in output
    assert "in carry_out" not in output  # no traceback of ours
    assert not (tmp_path / "out").exists()


def test_units_do_not_depend_on_the_number_of_threads(tmp_path):
    """With inputs so large that torch itself would share them among threads."""
    root = write_collection(tmp_path / "small", classes=2, per_class=20, modules=4, width=128)
    for threads in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        command = [sys.executable, ROOT / "ablation_experiment.py", "--dataset", root, "--output-dir"]
        command = [*map(str, command), str(tmp_path / threads), *FLAGS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert results_in(tmp_path / "1") == results_in(tmp_path / "2")
