"""The engine: units are done once and written, whoever does them and whoever is lost."""

import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import working
from making import write_collection
from working import alive, children, unit, until

import ablation_experiment
from data import index_collection
from experiment import engine as engines
from experiment import extraction, phases, signals, store, threads
from experiment.engine import Engine
from experiment.phases import Experiment, split_collection
from experiment.settings import UsageError, count_cores, resolve
from experiment.units import Outcome, finish_elsewhere, program_digest

ROOT, TESTS = Path(ablation_experiment.__file__).parent, Path(__file__).parent
CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
# Whoever works: threads of this process, or processes of its own.
each_way = pytest.mark.parametrize("cores", [1, 2], ids=["threads", "processes"])


@pytest.fixture
def engine(cores):
    engine = Engine([CPU], cores)
    yield engine
    engine.close()


@pytest.fixture
def processes():
    engine = Engine([CPU], 2)
    yield engine
    engine.close()


def arrays(unit):
    return {name: array.tolist() for name, array in store.load_arrays(unit.path).items()}


# -- what is done ---------------------------------------------------------------------------------------------------


def test_units_are_begun_in_an_order_of_their_own_and_told_in_theirs(tmp_path):
    begun = []

    def compute(device, stack, name):
        begun.append(name)
        return {"models": np.array(stack)}

    units = [unit(tmp_path, str(i), partial(compute, name=i)) for i in range(4)]
    engine = Engine([CPU], 1)
    told = [unit.path.exists() and reason for unit, reason in zip(units, engine.do(units, units[::-1]), strict=True)]
    engine.close()
    assert begun == [3, 2, 1, 0] and told == [""] * 4


def test_the_share_that_is_done_goes_by_what_units_cost_and_the_largest_come_first(tmp_path):
    small, large = ([unit(tmp_path, f"{name}{i}") for i in range(2)] for name in ("small", "large"))
    costs = {each.path: 1.0 for each in small} | {each.path: 4.0 for each in large}
    plans = [phases.Plan("small", [], small), phases.Plan("large", [], large), phases.Plan("none", [], [])]
    begun = phases._to_begin(plans, costs)
    assert begun == large + small
    assert phases._to_begin([*plans, phases.Plan("one", [], small[:1])], costs)[0] == small[0]  # of few units first
    seen: list[tuple] = []
    for _ in range(2):  # the second time all is done
        tally, engine = phases.Tally(lambda *call: seen.append(call[1:]), "phase 2", costs), Engine([CPU], 1)
        assert list(engine.do(small + large, begun, tally)) == [""] * 4
        engine.close()
    assert seen == [(0, 4, 0.0), (1, 4, 0.4), (2, 4, 0.8), (3, 4, 0.9), (4, 4, 1.0)]
    large[0].path.unlink()  # of an earlier run, the others are there
    phases.Tally(lambda *call: seen.append(call[1:]), "phase 3", costs)(large[0].path)
    assert seen[5:] == [(3, 4, 0.0), (4, 4, 1.0)]


@each_way
def test_each_unit_is_done_once_and_told_in_order(engine, cores, tmp_path):
    sleeps = [partial(working.worked, seconds=0.02 * (i % 3)) for i in range(12)]
    units = [unit(tmp_path, str(i), sleep) for i, sleep in enumerate(sleeps)]
    for told, reason in enumerate(engine.do(units)):
        assert reason == "" and units[told].path.exists()
    at_work = {arrays(unit)["process"][0] for unit in units}
    assert at_work == {os.getpid()} if cores == 1 else os.getpid() not in at_work
    written = {unit.path: unit.path.stat().st_mtime_ns for unit in units}
    assert list(engine.do(units)) == [""] * 12 and list(engine.do([])) == []
    assert {path: path.stat().st_mtime_ns for path in written} == written  # finished ones are not done again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "units"]
    assert engine.folder.is_relative_to(tmp_path / "runs") and not list(engine.folder.iterdir())
    engine.close()
    assert [path.name for path in tmp_path.iterdir()] == ["units"]


@each_way
def test_a_unit_that_cannot_be_done_leaves_the_others_alone(engine, tmp_path):
    diverge = partial(working.fail, error=FloatingPointError("training diverged"))
    units = [unit(tmp_path, "a"), unit(tmp_path, "b", diverge), unit(tmp_path, "c")]
    assert list(engine.do(units)) == ["", "training diverged", ""]
    assert [unit.path.exists() for unit in units] == [True, False, True]


@each_way
def test_any_other_fault_is_raised_and_ends_the_job(engine, tmp_path):
    error = working.Fault("disk full")
    units = [unit(tmp_path, "0", partial(working.fail, error=error))]
    units += [unit(tmp_path, str(i), partial(working.worked, seconds=0.05)) for i in range(1, 50)]
    with pytest.raises(type(error), match="disk full"):
        list(engine.do(units))
    time.sleep(0.2)
    assert sum(unit.path.exists() for unit in units) < 10
    assert list(engine.do(units[1:3])) == ["", ""]  # it is not broken


@each_way
@pytest.mark.filterwarnings("ignore:.* tasks")  # pytest has its own filters
def test_who_no_longer_listens_stops_the_work(engine, tmp_path):
    units = [unit(tmp_path, str(i), partial(working.worked, seconds=0.01)) for i in range(100)]
    outcomes = engine.do(units)
    assert next(outcomes) == ""
    outcomes.close()
    assert sum(unit.path.exists() for unit in units) < 10
    assert list(engine.do(units[:5])) == [""] * 5


def test_large_arrays_are_written_by_the_worker(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "save_arrays", None)  # here, not there
    large = unit(tmp_path, "large", working.large)
    assert list(processes.do([large])) == [""]
    monkeypatch.undo()
    assert store.load_arrays(large.path)["numbers"].nbytes == 2**24


def test_units_that_share_what_this_process_keeps_are_done_here_beside_the_others(processes, tmp_path):
    units = [unit(tmp_path, str(i), in_main=i % 3 == 0) for i in range(12)]
    assert list(processes.do(units)) == [""] * 12
    at_work = [arrays(unit)["process"][0] for unit in units]
    assert set(at_work[::3]) == {os.getpid()} and os.getpid() not in at_work[1::3] + at_work[2::3]


def test_a_function_is_called_in_a_thread_that_is_prepared(monkeypatch):
    prepared, called = [], []
    monkeypatch.setattr(threads, "start_thread", lambda device: prepared.append(threading.get_ident()))
    engine = Engine([CPU], 2)
    for _ in range(2):
        assert engine.call(lambda: called.append(threading.get_ident()) or "result") == "result"
    assert called == 2 * prepared and prepared != [threading.get_ident()]
    engine.close()
    with pytest.raises(MemoryError):
        Engine([CPU]).call(lambda: bytearray(2**62))


class Stream:
    """A stream of a GPU that is not there."""

    def __init__(self, device):
        self.device, self.synchronised = device, 0

    def synchronize(self):
        """Count."""
        self.synchronised += 1


@pytest.fixture
def streams(monkeypatch):
    """Return the streams that threads make for GPUs that are not there: nothing is computed on them."""
    made = []

    def set_own_stream(device):
        made.append(Stream(device))
        return made[-1]

    monkeypatch.setattr(threads, "start_thread", lambda device: None)
    monkeypatch.setattr(threads, "set_own_stream", set_own_stream)
    return made


def own_stream():
    return threads._of_thread.stream


def test_each_gpu_is_used_by_four_threads_at_once_on_a_stream_each(tmp_path, streams):
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    busy, meet, seen = [], threading.Barrier(8, timeout=30), []

    def compute(device, stack):
        assert own_stream() not in busy and own_stream().device == device
        busy.append(own_stream())
        if len(seen) < 8:
            seen.append(device)
            meet.wait()  # all work at the same time
        busy.remove(own_stream())
        return working.worked(device, stack)

    engine = Engine(gpus, cores=8)
    assert engine.count_workers() == 8 and not engine.in_processes
    assert list(engine.do([unit(tmp_path, str(i), compute) for i in range(12)])) == [""] * 12
    assert sorted(seen, key=str) == [gpus[0]] * 4 + [gpus[1]] * 4
    again = [unit(tmp_path, f"{i} again", working.worked) for i in range(8)]
    assert list(engine.do(again)) == [""] * 8 and engine.call(own_stream).device == gpus[0]
    assert len(streams) == 9  # made once, and one for calls
    assert sum(stream.synchronised for stream in streams) == 12 + 8 + 1
    engine.close()


def test_a_stream_is_done_before_an_error_is_told(streams):
    engine = Engine([torch.device("cuda", 0)])
    with pytest.raises(working.Fault):
        engine.call(partial(working.fail, None, None, working.Fault()))
    assert [stream.synchronised for stream in streams] == [1]
    engine.close()


def test_a_worker_of_a_cluster_has_a_stream_for_its_gpu(tmp_path, streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "chosen by the user")
    task = partial(finish_elsewhere, notes=tmp_path, kind="cuda", program=program_digest())
    assert not any(outcome.failure for _, outcome in (task(unit(tmp_path, name)) for name in "ab"))
    assert [(stream.device.type, stream.synchronised) for stream in streams] == [("cuda", 2)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "chosen by the user"
    threads.call_on(CPU, lambda: None)  # this thread is one of a CPU again


def test_support_vector_machines_beside_a_gpu_hold_up_nobody_and_are_told_as_they_come(tmp_path, streams):
    """Each waits for one of the other kind, and outcomes are written before the slowest has ended."""
    gpu = torch.device("cuda", 0)
    meet, slow, seen = threading.Barrier(4 + 3, timeout=30), threading.Event(), []

    def compute(device, stack, last=False):
        seen.append(own_stream())
        meet.wait()
        assert not last or slow.wait(30)
        return working.worked(device, stack)

    engine = Engine([gpu], cores=7)
    units = [unit(tmp_path, str(i), compute, in_main=i < 3) for i in range(6)]
    units.append(unit(tmp_path, "last", partial(compute, last=True)))
    outcomes = engine.do(units)
    assert [next(outcomes) for _ in range(6)] == [""] * 6
    assert all(unit.path.exists() for unit in units[:6]) and not units[6].path.exists()
    slow.set()
    assert list(outcomes) == [""] and len(set(seen)) == 7 and {stream.device for stream in seen} == {gpu}
    engine.close()


def test_a_fault_beside_a_gpu_ends_the_job_while_others_are_at_work(tmp_path, streams):
    """Nothing waits for a support vector machine that takes half a minute."""
    endless, begun = threading.Event(), threading.Event()

    def wait(device, stack):
        begun.set()
        endless.wait(60)
        return working.worked(device, stack)

    def fail(device, stack):
        assert begun.wait(30)
        raise working.Fault("disk full")

    engine, start = Engine([torch.device("cuda", 0)], cores=5), time.monotonic()
    units = [unit(tmp_path, "svm", wait, in_main=True), unit(tmp_path, "a", fail)]
    with pytest.raises(working.Fault, match="disk full"):
        list(engine.do(units))
    outcomes = engine.do([unit(tmp_path, "b"), unit(tmp_path, "c", wait)])
    assert next(outcomes) == ""
    outcomes.close()
    assert time.monotonic() - start < 30
    endless.set()
    engine.close()


def test_a_unit_that_is_out_of_memory_beside_others_is_done_again_alone(tmp_path, streams):
    """Several of them, some of support vector machines: no stack is smaller for what was beside it."""
    at_work, most, lock, first = [], [], threading.Lock(), threading.Barrier(4, timeout=30)

    def compute(device, stack, name, alone_only, fits=9):
        with lock:
            at_work.append(name)
            most.append((name, len(at_work), len(stack)))
            attempts = sum(other == name for other, *_ in most)
        try:
            if attempts == 1 and name < 4:
                first.wait()
            time.sleep(0.02)
            if len(stack) > fits or (alone_only and len(at_work) > 1):
                raise torch.OutOfMemoryError("Tried to allocate a lot.")
            return {"predicted": np.array(stack)}
        finally:
            with lock:
                at_work.remove(name)

    engine, units = Engine([torch.device("cuda", 0)], cores=8), []
    for i in range(8):
        how = {"name": i, "alone_only": i in (1, 2), "fits": 2 if i == 3 else 9}
        small = unit(tmp_path, str(i), partial(compute, **how), in_main=i % 2 == 0)
        units.append(replace(small, stack=list(range(4))))
    assert list(engine.do(units)) == [""] * 8
    sizes = [arrays(unit)["stack"] for unit in units]
    assert sizes == [[4] * 4] * 3 + [[2] * 4] + [[4] * 4] * 4
    again = [(beside, size) for name, beside, size in most if name == 3]
    assert again[0][0] > 1 and again[1:] == [(1, 4), (1, 2), (1, 2)]
    assert max(beside for _, beside, _ in most) >= 4
    engine.close()


# -- workers that are lost ------------------------------------------------------------------------------------------


@linux
def test_a_unit_that_ends_its_workers_is_given_up_and_no_other_one(processes, tmp_path, capsys, monkeypatch):
    """The one that another worker was at when the guilty one's ended is done again, and well."""
    counts, deaths = tmp_path / "vmstat", tmp_path / "deaths"
    counts.write_text("pgfault 5\noom_kill 7\noom_kill_victim 1\n")
    monkeypatch.setattr(signals, "SYSTEM_COUNTS", counts)
    processes._killed = signals.killed_for_memory()
    counts.write_text("pgfault 5\noom_kill 8\n")  # at the first loss
    deaths.mkdir()
    guilty = unit(tmp_path, "guilty", partial(working.killed, deaths=deaths, times=9, beside="0"))
    others = [unit(tmp_path, "0", partial(working.accompany, deaths=deaths))]
    others += [unit(tmp_path, str(i)) for i in range(1, 5)]
    failure, *reasons = processes.do([guilty, *others])
    how = "was ended by SIGKILL, as where memory runs out: fewer workers (OMP_NUM_THREADS) take less"
    assert failure == f"unit guilty: each of 3 workers {how}" and reasons == [""] * 5
    first, *more = capsys.readouterr().out.splitlines()
    first_how = "was ended by SIGKILL, while the system ended processes for want of memory"
    assert first == f"  a worker {first_how}; at work: unit guilty (guilty) or unit 0 (0); that is done again"
    assert more == [f"  a worker {how}; at work: unit guilty (guilty); that is done again"] * 2, more
    assert len(list(deaths.iterdir())) == 3 and not guilty.path.exists()
    assert all(arrays(other)["device"] == ["cpu"] for other in others)


@linux
@pytest.mark.slow
def test_a_file_that_is_cut_short_while_workers_have_it_mapped_is_written_again(processes, tmp_path, capsys):
    """The system ends them by SIGBUS."""
    cut = unit(tmp_path, "cut", partial(working.cut_short, shared=tmp_path / "shared" / "flat.npy"))
    assert list(processes.do([cut])) == [""] and arrays(cut)["sum"] == [64 * 4096]
    how, said = "was ended by SIGBUS, as where a file that it has mapped is cut short", capsys.readouterr().out
    assert f"  a worker {how}; at work: unit cut (cut); that is done again" in said.splitlines()


def test_three_losses_in_a_row_before_a_unit_is_begun_end_the_job(processes, tmp_path, monkeypatch, capsys):
    """Not those of workers that had begun one, and not two before and two after some work."""
    units = {name: unit(tmp_path, name) for name in "ab"}
    events = iter(["", "", "a", "", "", "done b", "", ""])

    def start(units, task, at_once):
        event = next(events)
        if event.startswith("done"):
            yield tmp_path / "units" / f"{event[-1]}.npz", Outcome(working.worked(CPU, [0]))
        elif event:
            (processes.folder / f"{event}.npz.host.1.2").touch()
        raise BrokenProcessPool("The exit codes of the workers are {SIGSEGV(-11)}")

    monkeypatch.setattr(processes, "_start", start)
    with pytest.raises(OSError, match=r"^3 times a worker was ended by SIGSEGV before it had begun a unit: The exit"):
        list(processes.do(list(units.values())))
    at = [f"unit {event} ({event})" if event == "a" else "no unit" for event in ("", "", "a", "", "", "", "")]
    lines = [f"  a worker was ended by SIGSEGV; at work: {name}; that is done again" for name in at]
    assert capsys.readouterr().out.splitlines() == lines and not list(events)
    assert [unit.path.exists() for unit in units.values()] == [False, True]


@linux
@pytest.mark.slow
def test_workers_that_always_end_before_they_begin_end_the_job(processes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "end_with", working.kill_at_start)
    with pytest.raises(OSError, match=r"^3 times a worker was ended by SIGKILL.* before it had begun a unit: "):
        list(processes.do([unit(tmp_path, str(i)) for i in range(4)]))
    assert capsys.readouterr().out.count("at work: no unit; that is done again") == 2


JOB = f"""
import sys
from functools import partial
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]
import torch, working
from experiment.engine import Engine
folder = Path(sys.argv[1])
units = [working.unit(folder, str(i), partial(working.endless, folder=folder / "at work")) for i in range(4)]
list(Engine([torch.device("cpu")], 2).do(units))
"""


def start_endless(folder, **how):
    """Start a job whose units never end."""
    (folder / "at work").mkdir(parents=True)
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(JOB), folder], start_new_session=True, **how)


def end_by_kill(job) -> list[int]:
    """End a job by SIGKILL; return the processes that it had started, which must end within five seconds."""
    started = children(job.pid)
    job.kill()
    job.wait()
    until(lambda: not any(map(alive, started)), seconds=5)
    return started


@linux
def test_no_worker_outlives_a_process_that_is_killed(tmp_path):
    job = start_endless(tmp_path)
    until(lambda: len(list((tmp_path / "at work").iterdir())) == 2)
    at_work = {int(path.name) for path in (tmp_path / "at work").iterdir()}
    for worker in at_work:
        for number in (signal.SIGINT, signal.SIGUSR1):  # as from a terminal or a cluster: the main process decides
            os.kill(worker, number)
    time.sleep(0.2)
    assert all(map(alive, at_work))
    assert at_work <= set(end_by_kill(job))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 10])
def test_no_worker_outlives_a_process_that_is_killed_while_workers_import(tmp_path, number):
    draw = random.Random(0)
    for i in range(number):
        job = start_endless(tmp_path / str(i), stderr=subprocess.DEVNULL)
        until(lambda job=job: working.workers(job.pid))
        time.sleep(draw.uniform(0, 1.5) if i else 0.3)
        assert len(end_by_kill(job)) >= 2


# -- what a worker is told ------------------------------------------------------------------------------------------


def test_a_worker_of_another_program_or_of_other_files_is_refused(tmp_path, processes, monkeypatch):
    (tmp_path / "notes").mkdir()
    task = partial(finish_elsewhere, unit(tmp_path, "a"), kind="cpu")
    with pytest.raises(UsageError, match=r"^the worker on .* has another version of this program, or of torch\."):
        task(notes=tmp_path / "notes", program="0123456789abcdef")
    with pytest.raises(UsageError, match=rf"does not see {tmp_path}/elsewhere\. Give a --cache-dir that all machines"):
        task(notes=tmp_path / "elsewhere" / "notes", program=program_digest())
    with pytest.raises(UsageError, match=r"sees no GPU\. Start workers that do, or give --device=cpu\."):
        partial(task, kind="cuda")(notes=tmp_path / "notes", program=program_digest())
    monkeypatch.setattr(engines, "program_digest", lambda: "0123456789abcdef")
    with pytest.raises(UsageError, match="another version of this program"):
        list(processes.do([unit(tmp_path, "a")]))


def test_a_unit_of_an_ordinary_experiment_is_small(tmp_path):
    """A thousand LoRAs of 128 layers; what is large lies in the cache folder."""
    few = index_collection(write_collection(tmp_path / "zoo", classes=5, per_class=4, modules=64))
    collection = replace(few, files=few.files * 50)
    settings = resolve(ablation_experiment.parse_arguments(["--device=cpu"]))
    kept, rows = np.ones(len(collection.layers), bool), split_collection(collection, settings.seed)
    extracted = extraction._Pass(collection, tmp_path / "cache", CPU).extracted("0123456789abcdef")
    experiment = Experiment(settings, collection, kept, rows, extracted, Engine([CPU]), lambda *_: None)
    units = {
        "stats": experiment.plan("stats", [3], "ablation").todo[0],
        "flat_vec": experiment.plan("flat_vec", [3], "ablation").todo[0],
        "vae": experiment.inputs.fitting_units("vae", [[]])[0],
        "pca": experiment.inputs.fitting_units("pca", [[3]])[0],
    }
    assert collection.y.shape == (1000,) and len(collection.layers) == 128
    sizes = {name: len(pickle.dumps(unit)) for name, unit in units.items()}
    assert max(sizes.values()) < 100_000, sizes


@linux
def test_cores_are_those_that_this_process_may_use(monkeypatch):
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    allowed = os.sched_getaffinity(0)
    assert count_cores() <= len(allowed)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert count_cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "100")
    assert count_cores() <= len(allowed)
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")  # of nested regions; for one, what there is
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert count_cores() == 1
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert count_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
