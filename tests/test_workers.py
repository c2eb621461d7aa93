import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from experiment import workers
from experiment.settings import UsageError
from experiment.workers import FaultElsewhereError, Task, TaskFailedError, Workers, start_workers


def task(folder, name, work=lambda: None):
    """Work that leaves a file of its name behind."""

    def run():
        work()
        (folder / name).touch()

    return Task((folder / name).exists, run)


def test_each_task_is_done_once_and_told_in_order(tmp_path):
    done = []
    tasks = [task(tmp_path, str(i), lambda i=i: (time.sleep(0.02 * (i % 3)), done.append(i))) for i in range(12)]
    for i, reason in enumerate(Workers(4).do(tasks)):
        assert reason == "" and (tmp_path / str(i)).exists()
    assert sorted(done) == list(range(12))
    assert list(Workers(4).do(tasks)) == [""] * 12 and len(done) == 12  # finished


def test_nothing_to_do_is_done_at_once():
    assert list(Workers(2).do([])) == []


def test_threads_work_at_the_same_time_each_prepared(tmp_path):
    prepared, meet = [], threading.Barrier(3, timeout=30)
    group = Workers(3, lambda: prepared.append(threading.get_ident()))
    assert list(group.do([task(tmp_path, str(i), meet.wait) for i in range(3)])) == [""] * 3
    assert len(set(prepared)) == 3
    assert list(group.do([task(tmp_path, str(i)) for i in range(3, 6)], threads=1)) == [""] * 3
    assert len(prepared) == 4


def test_a_task_that_cannot_be_done_leaves_the_others_alone(tmp_path):
    def fail():
        raise TaskFailedError("diverged")

    tasks = [task(tmp_path, "a"), task(tmp_path, "b", fail), task(tmp_path, "c")]
    assert list(Workers(2).do(tasks)) == ["", "diverged", ""]


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt, SystemExit])
def test_any_other_fault_ends_the_job_and_is_raised(tmp_path, fault):
    def fail():
        raise fault("disk full")

    begun = []
    tasks = [task(tmp_path, "0", fail)] + [task(tmp_path, str(i), lambda i=i: begun.append(i)) for i in range(1, 9)]
    with pytest.raises(fault, match="disk full"):
        list(Workers(1).do(tasks))
    assert begun == []


def test_a_fault_after_the_last_task_is_raised_too(tmp_path):
    first_is_done = threading.Event()

    def prepare():
        if threading.current_thread() is not threads[0]:
            first_is_done.wait(10)
            raise OSError("no device")
        time.sleep(0.1)  # until the other one waits

    threads = []

    def outcomes():
        for reason in Workers(2, lambda: (threads.append(threading.current_thread()), prepare())).do(tasks):
            yield reason
            first_is_done.set()

    tasks = [task(tmp_path, "a"), Task((tmp_path / "a").exists, lambda: None)]
    with pytest.raises(OSError, match="no device"):
        list(outcomes())


def test_who_no_longer_listens_stops_the_threads(tmp_path):
    begun = []
    tasks = [task(tmp_path, str(i), lambda i=i: (time.sleep(0.01), begun.append(i))) for i in range(100)]
    outcomes = Workers(1).do(tasks)
    assert next(outcomes) == ""
    outcomes.close()
    assert len(begun) < 10


linux = pytest.mark.skipif(sys.platform != "linux", reason="worker processes are for Linux")


@linux
def test_processes_do_what_is_not_to_be_done_here(tmp_path):
    def run(i):
        (tmp_path / str(i)).write_text(str(os.getpid()))
        time.sleep(0.05)

    tasks = [Task((tmp_path / str(i)).exists, lambda i=i: run(i), in_main=i % 3 == 0) for i in range(12)]
    assert list(Workers(2, forks=True).do(tasks)) == [""] * 12
    at_work = [int((tmp_path / str(i)).read_text()) for i in range(12)]
    assert set(at_work[::3]) == {os.getpid()}
    children = {pid for i, pid in enumerate(at_work) if i % 3}
    assert os.getpid() not in children and len(children) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def many_jobs(folder, rounds):
    """Run jobs of threads, each followed at once by one of processes, and by a function in a prepared thread."""

    def run(path):
        x = torch.ones(200, 200)
        torch.linalg.svd(x @ x)  # so that MKL allocates memory for this thread
        path.touch()

    def job(name, here):
        paths = [Path(folder, f"{name}-{i}") for i in range(2)]
        return [Task(path.exists, lambda path=path: run(path), here) for path in paths]

    group = Workers(2, lambda: torch.set_num_threads(1), forks=True)
    for number in range(rounds):
        assert list(group.do(job(f"threads-{number}", True))) == ["", ""]
        assert list(group.do(job(f"processes-{number}", False))) == ["", ""]
        group.call_prepared(lambda number=number: run(Path(folder, f"prepared-{number}")))
        assert list(group.do(job(f"more-{number}", False))) == ["", ""]


@linux
@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_processes_forked_right_after_threads_never_hang(tmp_path, rounds):
    script = f"import test_workers; test_workers.many_jobs({str(tmp_path)!r}, {rounds})"
    folders = os.pathsep.join([str(Path(workers.__file__).parent.parent), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": folders}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=30 + 3 * rounds)


def test_a_fault_in_a_prepared_thread_keeps_nothing_alive():
    class Matrix:
        """What was being filled when memory ran out."""

    seen = []

    def fill():
        matrix = Matrix()
        seen.append(weakref.ref(matrix))
        raise MemoryError("no more")

    gc.disable()
    try:
        with contextlib.suppress(MemoryError):
            Workers(1).call_prepared(fill)
        assert seen[0]() is None
    finally:
        gc.enable()


@linux
def test_a_fault_in_a_prepared_thread_is_raised_here():
    with pytest.raises(OSError, match="disk full"):
        Workers(1).call_prepared(lambda: (_ for _ in ()).throw(OSError("disk full")))


@linux
def test_processes_are_prepared_and_find_what_there_was_at_the_start(tmp_path):
    prepared, there = [], {"weights": 3}
    tasks = [
        task(tmp_path, str(i), lambda i=i: (tmp_path / f"{i}.seen").write_text(f"{prepared} {there}")) for i in range(4)
    ]
    assert list(Workers(2, lambda: prepared.append("ready"), forks=True).do(tasks)) == [""] * 4
    for i in range(4):
        assert (tmp_path / f"{i}.seen").read_text() == "['ready'] {'weights': 3}"


def test_nobody_is_forked_for_one_thread_one_task_or_finished_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "WorkerProcess", None)
    tasks = [task(tmp_path, str(i)) for i in range(3)]
    assert list(Workers(1, forks=True).do(tasks)) == [""] * 3
    assert list(Workers(2, forks=True).do([*tasks, task(tmp_path, "3")])) == [""] * 4


@linux
@pytest.mark.parametrize(
    ("device", "shows_gpus", "lists_threads", "forks"),
    [("cpu", False, True, True), ("cpu", True, True, False), ("cuda", True, True, False), ("cpu", False, False, False)],
)
def test_there_are_processes_on_a_cpu_where_no_gpu_shows_and_threads_are_listed(
    monkeypatch, tmp_path, device, shows_gpus, lists_threads, forks
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: shows_gpus)
    if not lists_threads:
        monkeypatch.setattr(workers, "THREAD_LIST", tmp_path / "proc" / "self" / "task")
    assert start_workers(2, lambda: None, torch.device(device)).forks == forks


def test_a_function_is_called_in_a_prepared_thread():
    prepared, called = [], []
    group = Workers(2, lambda: prepared.append(threading.get_ident()))
    group.call_prepared(lambda: called.append(threading.get_ident()))
    assert called == prepared != [threading.get_ident()]
    with pytest.raises(MemoryError):
        group.call_prepared(lambda: bytearray(2**62))


class Unspeakable(Exception):
    """Cannot be told to another process: it is made of two things and keeps one."""

    def __init__(self, one, two):
        super().__init__(one)


@linux
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (OSError("disk full"), OSError),
        (KeyboardInterrupt("disk full"), KeyboardInterrupt),
        (SystemExit("disk full"), SystemExit),
        (Unspeakable("disk full", 2), RuntimeError),
    ],
)
def test_what_a_process_raises_is_raised_here_and_says_where(tmp_path, fault, told):
    def fail():
        raise fault

    tasks = [task(tmp_path, "0", fail), *(task(tmp_path, str(i), lambda: time.sleep(0.2)) for i in range(1, 9))]
    with pytest.raises(told, match="disk full") as caught:
        list(Workers(2, forks=True).do(tasks))
    assert "in fail" in "".join(caught.value.__notes__)
    assert len(list(tmp_path.iterdir())) < 8


@linux
def test_a_process_tells_of_a_task_that_cannot_be_done(tmp_path):
    def fail():
        raise TaskFailedError("diverged")

    tasks = [task(tmp_path, "a"), task(tmp_path, "b", fail), task(tmp_path, "c")]
    assert list(Workers(2, forks=True).do(tasks)) == ["", "diverged", ""]


@linux
def test_a_process_that_is_killed_ends_the_job(tmp_path):
    tasks = [task(tmp_path, "a", lambda: os.kill(os.getpid(), signal.SIGKILL)), task(tmp_path, "b")]
    with pytest.raises(OSError, match="ended by SIGKILL, as where memory runs out"):
        list(Workers(2, forks=True).do(tasks))


@linux
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_process(tmp_path, ending):
    """A job whose tasks never end, and write down who they are; SIGINT reaches all processes, as from a terminal."""
    job = f"""
    import os, pathlib, sys, time
    sys.path.insert(0, {str(Path(workers.__file__).parent.parent)!r})
    from experiment.workers import Workers, Task
    def run(i):
        pathlib.Path({str(tmp_path)!r}, str(i)).write_text(str(os.getpid()))
        while True: time.sleep(1)
    list(Workers(2, forks=True).do([Task(lambda: False, lambda i=i: run(i)) for i in range(2)]))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(job)], start_new_session=True)
    try:
        until(lambda: len([f for f in tmp_path.iterdir() if f.read_text()]) == 2)
        children = [int(file.read_text()) for file in tmp_path.iterdir()]
        if ending == signal.SIGKILL:
            process.kill()
            until(lambda: not any(alive(pid) for pid in children))
        else:
            os.killpg(process.pid, ending)  # Python's own handler waits for its threads, which wait for the processes
            time.sleep(0.5)
            assert all(alive(pid) for pid in children)
    finally:
        process.kill()
        process.wait()
    until(lambda: not any(alive(pid) for pid in children))


def alive(pid):
    """Return whether a process exists and has not ended, unlike one that waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, seconds=60):
    """Wait for what must come about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_processes_share_the_tasks_and_tell_of_failures(tmp_path):
    """Two members, as of two processes, that talk through one store and see one folder."""
    shared, done = HashStore(), {0: [], 1: []}
    members = [Workers(1, shared=shared, rank=rank, size=2) for rank in (0, 1)]
    told = {}

    def process(rank):
        def work(i):
            time.sleep(0.01)
            done[rank].append(i)
            if i == 5:
                raise TaskFailedError("diverged")

        for _ in range(2):  # the second job finds all but the failed task finished
            tasks = [task(tmp_path, str(i), lambda i=i: work(i)) for i in range(20)]
            told.setdefault(rank, []).append(list(members[rank].do(tasks)))
        told[rank].append(members[rank].broadcast(lambda: {"from": rank}))
        told[rank].append(members[rank].broadcast(lambda: ["again", rank]))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = [""] * 5 + ["diverged"] + [""] * 14
    assert told[0] == told[1] == [expected, expected, {"from": 0}, ["again", 0]]
    assert sorted(done[0] + done[1]) == sorted([*range(20), 5])
    assert done[0] and done[1]


def test_what_rank_0_cannot_decide_is_raised_there_and_ends_the_others():
    shared, raised = HashStore(), {}

    def process(rank):
        try:
            Workers(1, shared=shared, rank=rank, size=2).broadcast(lambda: 1 / 0)
        except Exception as error:
            raised[rank] = type(error)

    in_threads(process)
    assert raised == {0: ZeroDivisionError, 1: FaultElsewhereError}


def test_nobody_leaves_a_meeting_before_all_are_there():
    shared, events = HashStore(), []

    def process(rank):
        group = Workers(1, shared=shared, rank=rank, size=2)
        time.sleep(0.3 * rank)
        events.append("come")
        group.barrier()
        events.append("gone")
        group.leave()

    in_threads(process)
    assert events == ["come", "come", "gone", "gone"]


def test_a_process_without_signs_of_life_is_lost(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(workers, "SILENT_SECONDS", 0.5)
    alone = Workers(1, shared=HashStore(), rank=0, size=2)
    with pytest.raises(OSError, match="process 1 of the job is lost"):
        alone.barrier()
    with pytest.raises(OSError, match="process 1 of the job is lost"):
        list(alone.do([Task(lambda: False, lambda: time.sleep(2))]))


def test_processes_that_see_other_folders_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "FILE_SYSTEM_SECONDS", 0.3)
    shared, raised = HashStore(), {}

    def process(rank):
        (tmp_path / str(rank)).mkdir()
        try:
            Workers(1, shared=shared, rank=rank, size=2).check_shared(tmp_path / str(rank))
        except UsageError as error:
            raised[rank] = str(error)
            shared.add("barrier 2", 1)  # lets the other one go, which would find this one lost

    in_threads(process)
    assert list(raised) == [1] and "not one folder for all processes" in raised[1]
    assert not list((tmp_path / "0").iterdir())


def in_threads(process):
    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
