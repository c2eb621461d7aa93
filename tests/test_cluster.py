"""Dask clusters: the same bytes as on one machine, whoever comes late or is lost, and nobody without the key.

The cluster of this file listens on loopback alone, encrypted by a certificate of its own.
"""

import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import working
from making import NARROW, planted_collection
from test_faults import results_in
from working import unit, until

import ablation_experiment
from experiment import cluster as clusters
from experiment import store
from experiment.cluster import connect
from experiment.engine import Engine
from experiment.settings import UsageError

dask = pytest.importorskip("dask")
pytest.importorskip("distributed")
ROOT, TESTS = Path(ablation_experiment.__file__).parent, Path(__file__).parent
CPU = ablation_experiment.torch.device("cpu")
FLAGS = ("--top-k=2", "--quick", "--num-runs=2", "--device=cpu", "--representations=stats,vae,flat_vec,update_kernel")


def certificate(folder: Path, name: str) -> dict[str, str]:
    """Make a certificate; return Dask's settings that use it, by the environment variable of each."""
    paths = {part: folder / f"{name}-{part}.pem" for part in ("cert", "key")}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    subprocess.run([*command, "-keyout", paths["key"], "-out", paths["cert"]], check=True, capture_output=True)
    prefix = "DASK_DISTRIBUTED__COMM__"
    settings = {f"{prefix}REQUIRE_ENCRYPTION": "true", f"{prefix}TLS__CA_FILE": str(paths["cert"])}
    for who in ("SCHEDULER", "WORKER", "CLIENT"):
        settings |= {f"{prefix}TLS__{who}__{part.upper()}": str(path) for part, path in paths.items()}
    return settings


def here(settings: dict[str, str | None]):
    """Use settings in this process, whose configuration Dask has read before."""
    names = {name: name.removeprefix("DASK_").lower().replace("__", ".").replace("_", "-") for name in settings}
    return dask.config.set({names[name]: value for name, value in settings.items()})


class Cluster:
    """A scheduler and its workers, in processes of their own.

    Args:
        folder: Of the scheduler's file and of logs.
        environment: Variables beside those of this process.
        flags: Of the scheduler.
    """

    def __init__(self, folder: Path, environment: dict[str, str], *flags: str):
        self.folder, self.file = folder, folder / "scheduler.json"
        paths = {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, TESTS])), "DASK_TEMPORARY_DIRECTORY": str(folder)}
        self.environment = os.environ | environment | paths
        self.processes: list[subprocess.Popen] = []
        self.scheduler = self._start("scheduler", "--host=127.0.0.1", "--port=0", *flags)
        until(self.file.exists)

    def _start(self, what: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", what, f"--scheduler-file={self.file}", "--no-dashboard", *flags]
        log = (self.folder / f"{what}{len(self.processes)}.log").open("w")
        with log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment))
        return self.processes[-1]

    def worker(self, *flags: str) -> subprocess.Popen:
        """Start a worker; it comes some seconds later."""
        local = self.folder / f"local{len(self.processes)}"
        return self._start("worker", "--nthreads=1", f"--local-directory={local}", *(flags or ["--no-nanny"]))

    def engine(self) -> Engine:
        return Engine([CPU], cluster=connect(str(self.file), insecure=False))

    def close(self) -> None:
        for process in reversed(self.processes):  # workers first
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Dask's settings, by their environment variables; they are used in this process too."""
    if shutil.which("openssl") is None:
        pytest.skip("makes keys by openssl")
    settings = certificate(tmp_path_factory.mktemp("keys"), "ours")
    with here(settings):
        yield settings


@pytest.fixture(scope="module")
def cluster(keys, tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), keys, "--protocol=tls")
    yield cluster
    cluster.close()


@pytest.fixture
def engine(cluster):
    engine = cluster.engine()
    yield engine
    engine.close()


def run(root, out, *flags):
    return ablation_experiment.main(["--dataset", str(root), "--output-dir", str(out), *FLAGS, *flags], NARROW)


def test_a_cluster_gives_the_same_bytes_as_one_core_and_its_first_worker_may_come_late(
    cluster, one_core, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "small"
    planted_collection(root, per_class=10)
    assert run(root, tmp_path / "alone") == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clusters, "SILENT_SECONDS", 0.5)
    capsys.readouterr()
    threading.Timer(1.0, cluster.worker).start()
    assert run(root, Path("many"), f"--scheduler={cluster.file}") == 0  # a relative path, of another folder than theirs
    said = capsys.readouterr().out
    assert f"cluster   workers at {cluster.file}: 0 now; " in said
    assert "the Dask cluster has no worker: waiting for one (" in said
    assert results_in(tmp_path / "many") == results_in(tmp_path / "alone")
    units = [sorted(path.name for path in tmp_path.glob(f"{out}/.cache/*/units/*")) for out in ("alone", "many")]
    assert units[0] == units[1] and not list(tmp_path.glob("many/.cache/*/runs"))


@pytest.mark.slow
def test_workers_come_and_go(cluster, engine, tmp_path):
    """A second one comes while the first is at work, then one is killed at a unit, which the other does."""
    if not cluster.processes[1:]:
        cluster.worker()
    (tmp_path / "met").mkdir()
    late = cluster.worker()
    meet = partial(working.meet, folder=tmp_path / "met", number=2)
    units = [unit(tmp_path, f"meet{i}", meet) for i in range(6)]
    assert list(engine.do(units)) == [""] * 6
    assert {path.name for path in (tmp_path / "met").iterdir()} >= {str(late.pid)} and engine.count_workers() == 2
    (tmp_path / "deaths").mkdir()
    lost = unit(tmp_path, "lost", partial(working.killed, deaths=tmp_path / "deaths", times=1, beside="lost"))
    others = [unit(tmp_path, f"other{i}", partial(working.worked, seconds=0.05)) for i in range(9)]
    assert list(engine.do([lost, *others])) == [""] * 10
    assert len(list((tmp_path / "deaths").iterdir())) == 1
    until(lambda: sum(process.poll() is None for process in cluster.processes) == 2)
    assert engine.count_workers() == 1
    assert store.load_arrays(lost.path)["process"][0] in [process.pid for process in cluster.processes]


@pytest.mark.slow
def test_a_unit_that_ends_its_workers_is_given_up(keys, tmp_path):
    """Workers that a nanny starts again."""
    environment = keys | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    cluster = Cluster(tmp_path, environment, "--protocol=tls")
    try:
        cluster.worker("--nanny")
        cluster.worker("--nanny")
        (tmp_path / "deaths").mkdir()
        guilty = unit(tmp_path, "guilty", partial(working.killed, deaths=tmp_path / "deaths", times=9, beside="guilty"))
        others = [unit(tmp_path, f"other{i}", partial(working.worked, seconds=0.2)) for i in range(9)]
        engine = cluster.engine()
        failure, *reasons = engine.do([guilty, *others])
        engine.close()
        lost = len(list((tmp_path / "deaths").iterdir()))
        assert failure == f"unit guilty: each of {lost} workers at it was lost" and 3 <= lost <= 5
        assert reasons == [""] * 9
    finally:
        cluster.close()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 2.0])
def test_a_run_ends_in_a_line_where_the_scheduler_is_killed_and_the_next_continues(keys, tmp_path, delay):
    root = tmp_path / "small"
    planted_collection(root, per_class=10)
    command = [sys.executable, ROOT / "ablation_experiment.py", "--dataset", root, "--output-dir", tmp_path / "out"]
    command = [*map(str, command), *FLAGS, "--num-runs=9"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for name in ("one", "two"):
        cluster = Cluster(tmp_path / name, keys, "--protocol=tls")
        try:
            cluster.worker()
            how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | keys}
            job = subprocess.Popen([*command, f"--scheduler={cluster.file}"], **how)
            if name == "one":
                until(lambda: list(tmp_path.glob("out/.cache/*/units/classifier-*")))
                time.sleep(delay)
                start = time.monotonic()
                cluster.scheduler.kill()
                output, error = job.communicate(timeout=90)
                print(f"ended after {time.monotonic() - start:.1f} s: {job.returncode}\n{output}\n{error}")
                assert time.monotonic() - start < 60
                assert job.returncode == 2 and error.count("\n") == 1
                assert error.startswith("error: the connection to the Dask scheduler is lost. The same command contin")
                finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/.cache/*/units/*")}
            else:
                output, error = job.communicate(timeout=120)
                assert job.returncode == 0 and error == "", error
        finally:
            cluster.close()
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/.cache/*/units/*")}.items()


def refusal(scheduler: str, insecure: bool = False) -> str:
    """Return why a scheduler is refused.

    A client that could not be made is removed at once. Where Python did that while it makes the next one, Dask would
    wait for itself for ever; the program makes but one.
    """
    try:
        connect(scheduler, insecure).close()
    except UsageError as error:
        reason = str(error)
        error.__traceback__ = error.__cause__ = error.__context__ = None
    gc.collect()
    return reason


# -- who is refused -------------------------------------------------------------------------------------------------


def test_who_has_not_the_key_is_refused(cluster, keys, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "ANSWER_SECONDS", 2)
    words = rf"^--scheduler {cluster.file}: no Dask scheduler answers at tls://127\.0\.0\.1:\d+ \(.+\)\.$"
    for settings in (dict.fromkeys(keys), certificate(tmp_path, "theirs")):
        with here(settings):
            reason = refusal(str(cluster.file))
        assert re.match(words, reason)


@pytest.mark.parametrize("scheduler", ["tcp://192.0.2.1:8786", "tcp://node7:8786", "ucx://10.0.0.1:8786"])
def test_a_scheduler_that_anybody_reaches_is_refused(scheduler, tmp_path):
    file = tmp_path / "scheduler.json"
    file.write_text(f'{{"address": "{scheduler}"}}')
    for named in (scheduler, str(file)):
        reason = refusal(named)
        assert reason.startswith(f"--scheduler {named}: {scheduler} is not encrypted, and runs the code of whoever")
        assert reason.endswith("or give --insecure-cluster.")


def test_a_scheduler_that_is_not_there_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clusters, "ANSWER_SECONDS", 1)
    root = tmp_path / "small"
    planted_collection(root, per_class=3)
    (tmp_path / "scheduler.json").write_text("[1]")
    neither = "neither an address, such as tls://host:8786, nor the file of a Dask scheduler."
    for scheduler, words in {
        "tcp://127.0.0.1:9": "no Dask scheduler answers at tcp://127.0.0.1:9 (",
        str(tmp_path / "nowhere.json"): "neither a file that is there nor an address, such as tls://host:8786.",
        str(tmp_path / "scheduler.json"): neither,
    }.items():
        assert run(root, tmp_path / "out", f"--scheduler={scheduler}") == 2
        error = capsys.readouterr().err
        gc.collect()
        assert error.startswith(f"error: --scheduler {scheduler}: {words}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dask_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(
        UsageError, match=r"^--scheduler needs Dask \(.*\)\. `pip install -r requirements-cluster\.txt`"
    ):
        connect("tls://node7:8786", insecure=False)


def test_a_cluster_that_anybody_reaches_may_be_asked_for(tmp_path, monkeypatch):
    """It is refused for another reason: nobody answers."""
    monkeypatch.setattr(clusters, "ANSWER_SECONDS", 1)
    assert "no Dask scheduler answers at tcp://192" in refusal("tcp://192.0.2.1:8786", insecure=True)
