"""The sbatch files of slurm/ on a real Slurm of two nodes on this machine (slurm_cluster.sh), on cores instead of GPUs.

Run by ``python -m pytest -m slurm tests/test_slurm.py``, as root, with the packages that slurm_cluster.sh names.
"""

import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from making import planted_collection

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "tests" / "slurm_cluster.sh"
SCRIPTS = sorted((ROOT / "slurm").glob("*"))
# So many runs that there is time to disturb them.
FLAGS = ("--quick", "--num-runs=8", "--representations=stats", "--controls=none", "--top-k=2", "--device=cpu")
FEW_CORES = ("--cpus-per-task=1", "--mem=2G")
RESULTS = ("top_layers.json", "results.txt", "samples.csv", "predictions.npz", "results.json")


def missing_for_slurm() -> str:
    """Return what this machine lacks for a Slurm of its own, or nothing."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode:
        return "needs root, and namespaces"
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "openssl") if not shutil.which(name)]
    return f"needs {', '.join(absent)}" if absent else ""


# ----------------------------------------------------------------------------------------------------------------------
# The files themselves
# ----------------------------------------------------------------------------------------------------------------------


def test_the_document_names_each_file_and_each_file_that_is_named_is_there():
    text = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    assert set(re.findall(r"\bslurm/(\w+\.sbatch)\b", text)) == {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_file_is_a_whole_script_that_is_queued_again_and_keeps_its_log(path):
    text = path.read_text("utf-8")
    flags = re.findall(r"^#SBATCH (\S+)$", text, re.M)
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120"} <= set(flags)
    assert f"slurm/{path.name}" in text and "\nexport PYTHONPATH=$repository\n" in text
    assert max(map(len, text.splitlines())) <= 120
    subprocess.run(["bash", "-n", path], check=True)


# ----------------------------------------------------------------------------------------------------------------------
# On Slurm
# ----------------------------------------------------------------------------------------------------------------------


class Cluster:
    """A Slurm of two nodes, ``node1`` and ``node2``, and the jobs that were submitted to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PORT": str(20000 + os.getpid() % 10000),
        }

    def do(self, action: str, *arguments: str) -> None:
        """Start or stop it, lose a node or begin one."""
        subprocess.run([CLUSTER, action, self.folder, *arguments], env=self.environment, check=True)

    def call(self, *command: object) -> str:
        """Return what a command of Slurm prints."""
        command = [str(word) for word in command]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout

    def submit(self, name: str, out: Path, *flags: object, sbatch=(), variables=None, first: str = "") -> "Job":
        """Submit a file of slurm/ with its variables for this machine.

        Args:
            name: Of the file, without its ending.
            out: For the results, the file that is submitted, and the log.
            flags: For the program.
            sbatch: Flags that stand before the file.
            variables: Values of other variables at the file's top.
            first: A line that is put before these.
        """
        values = {"python": sys.executable, "output": out, "flags": "()"} | (variables or {})
        text = (ROOT / "slurm" / f"{name}.sbatch").read_text("utf-8")
        for variable, value in values.items():
            text, count = re.subn(rf"^{variable}=.*", f"{variable}={value}", text, flags=re.M)
            assert count == 1, variable
        out.mkdir(exist_ok=True)
        script = out / "job.sbatch"
        script.write_text(text.replace("\nrepository=", f"\n{first}\nrepository=", 1))
        sbatch = ["--parsable", f"--output={out}/log.%a", *FEW_CORES, *sbatch]
        return Job(self, int(self.call("sbatch", *sbatch, script, *FLAGS, *flags)), out)


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: int, out: Path):
        self.cluster, self.number, self.out = cluster, number, out

    @property
    def log(self) -> str:
        """All that it has printed."""
        return "".join(path.read_text() for path in sorted(self.out.glob("log.*")))

    def state(self) -> dict[str, str]:
        """Return what Slurm says of it; of an array, of the task that is not yet completed, where there is one."""
        tasks = self.cluster.call("scontrol", "show", "job", self.number).strip().split("\n\n")
        states = [dict(re.findall(r"(\w+)=(\S+)", task)) for task in tasks]
        return next((state for state in states if state["JobState"] != "COMPLETED"), states[0])

    def wait_for(self, text: str) -> None:
        """Wait until its log has a text."""
        until(lambda: text in self.log, lambda: self.log)

    def end(self) -> dict[str, str]:
        """Wait for its end; return its state. Nothing of it is left, neither processes nor keys."""
        until(lambda: self.state()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), lambda: self.log)
        until(lambda: not processes_with(f"SLURM_JOB_ID={self.number}"), lambda: self.log, seconds=5)
        assert list(self.out.glob(".job-*")) == []
        return self.state()

    def completed(self, restarts: int) -> None:
        """Wait for its end, which is a good one."""
        state = self.end()
        assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), (
            self.log
        )


def until(condition, describe, seconds: float = 120) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, describe()
        time.sleep(0.1)


def processes_with(variable: str) -> list[dict[str, str]]:
    """Return the environments of the processes that have a variable, as ``NAME=value``, in theirs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            content = process.joinpath("environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if variable in content:
            words = process.joinpath("cmdline").read_text().split("\0")
            found.append(dict(line.split("=", 1) for line in content if "=" in line) | {"command": " ".join(words)})
    return found


def contents(out: Path, name: str = "small") -> dict:
    """Return the results of a run, without what may differ."""
    found = {file: (out / f"ablation_{name}" / file).read_bytes() for file in RESULTS}
    results = json.loads(found.pop("results.json"))
    return found | {"results": {key: value for key, value in results.items() if key not in ("environment", "timing")}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing_for_slurm():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.do("start")
    yield cluster
    cluster.do("stop")


@pytest.fixture(scope="module")
def collections(tmp_path_factory):
    """A folder with two collections, ``small`` and ``other``."""
    folder = tmp_path_factory.mktemp("collections")
    planted_collection(folder / "small")
    planted_collection(folder / "other", seed=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(collections, tmp_path_factory):
    """The results for ``small`` without Slurm."""
    out = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, ROOT / "ablation_experiment.py", f"--dataset={collections / 'small'}", *FLAGS]
    subprocess.run([*command, f"--output-dir={out}"], check=True, capture_output=True)
    return contents(out)


@pytest.mark.slurm
def test_files_for_one_node_end_with_the_bytes_of_a_run_without_slurm(cluster, collections, undisturbed, tmp_path):
    """An array over two collections with one cache too; one job inherits nothing and has no home it can write to."""
    small = f"--dataset={collections / 'small'}"
    bare = cluster.submit("one_node", tmp_path / "1", small, sbatch=["--export=NONE"], first="export HOME=/dev/null")
    four = cluster.submit("four_gpus", tmp_path / "2", small, sbatch=["--nice=1"])
    datasets = {"datasets": f"({collections}/small {collections}/other)"}
    array = cluster.submit("array", tmp_path / "3", sbatch=["--array=0-1", "--nice=2"], variables=datasets)
    for job in (bare, four, array):
        job.completed(restarts=0)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3") == undisturbed
    assert contents(tmp_path / "3", "other")["results"]["dataset"]["name"] == "other"
    assert {path.name for path in (tmp_path / "3").glob("*")} >= {"cache", "log.0", "log.1"}


@pytest.mark.slurm
def test_a_job_of_several_nodes_lets_nobody_in_and_goes_on_when_it_loses_one(
    cluster, collections, undisturbed, tmp_path
):
    nodes = ["--ntasks-per-node=2", "--gpus-per-node=2", "--export=NONE"]
    job = cluster.submit("several_nodes", tmp_path / "out", f"--dataset={collections / 'small'}", sbatch=nodes)
    until(lambda: list((tmp_path / "out").glob(".job-*/scheduler.json")), lambda: job.log)
    (folder,) = (tmp_path / "out").glob(".job-*")
    check_access(folder, tmp_path)
    tasks = [process for process in processes_with(f"SLURM_JOB_ID={job.number}") if "SLURM_STEP_ID" in process]
    workers = [task for task in tasks if " dask worker " in task["command"]]
    seen = sorted((worker["SLURMD_NODENAME"], worker["CUDA_VISIBLE_DEVICES"]) for worker in workers)
    assert seen == [(node, gpu) for node in ("node1", "node2") for gpu in ("0", "1")]
    job.wait_for("Phase 1")
    cluster.do("lose", "node2")
    job.wait_for("Written to")
    cluster.do("begin", "node2")
    state = job.end()  # Slurm may have noticed before the run was at its end, and have queued the job again
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    assert contents(tmp_path / "out") == undisturbed


def check_access(folder: Path, elsewhere: Path) -> None:
    """Check that the scheduler of a job of four workers takes who has its key, and nobody else."""
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "key.pem")}
    assert list(modes.values()) == [0o700, 0o600]
    own, other = ((place / "certificate.pem", place / "key.pem") for place in (folder, elsewhere))
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=lora-ablation"]
    subprocess.run([*openssl, "-out", other[0], "-keyout", other[1]], check=True, capture_output=True)
    address = json.loads((folder / "scheduler.json").read_text())["address"]
    for certificate in (None, other):
        assert answer_of(address, certificate) == b""
    assert b"compression" in answer_of(address, own)  # the first message of Dask, to whoever it talks with
    connect = (
        "import sys; from distributed import Client; Client(sys.argv[1], timeout=60).wait_for_workers(4, timeout=60)"
    )
    roles = {"CA_FILE": own[0], "CLIENT__CERT": own[0], "CLIENT__KEY": own[1]}
    keys = {f"DASK_DISTRIBUTED__COMM__TLS__{role}": str(path) for role, path in roles.items()}
    subprocess.run([sys.executable, "-c", connect, address], env=os.environ | keys, check=True)
    assert b"compression" not in answer_of(address.replace("tls://", "tcp://"), None)


def answer_of(address: str, certificate: tuple[Path, Path] | None) -> bytes:
    """Return the first bytes that a scheduler sends to who connects, with a certificate and its key or without."""
    protocol, host, port = re.fullmatch(r"(\w+)://(.*):(\d+)", address).groups()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(*certificate)
    try:
        with socket.create_connection((host, int(port)), timeout=10) as plain:
            if protocol == "tcp":
                plain.sendall(bytes(64))
                return plain.recv(1000)
            with context.wrap_socket(plain) as encrypted:
                return encrypted.recv(1000)
    except (ssl.SSLError, ConnectionError):
        return b""


@pytest.mark.slurm
@pytest.mark.parametrize("name", ["one_node", pytest.param("several_nodes", marks=pytest.mark.slow)])
def test_a_job_that_its_signal_queues_again_continues(cluster, collections, undisturbed, tmp_path, name):
    few = ["--ntasks-per-node=1"]
    job = cluster.submit(name, tmp_path / "out", f"--dataset={collections / 'small'}", sbatch=few)
    job.wait_for("Phase 1")
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)  # as Slurm does before the time is up
    job.completed(restarts=1)
    assert "Stopped by SIGTERM" in job.log and job.log.count("Phase 1") == 2
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.slurm
def test_a_job_that_cannot_be_queued_again_stops_and_says_so(cluster, collections, tmp_path):
    small = f"--dataset={collections / 'small'}"
    job = cluster.submit("one_node", tmp_path / "out", small, sbatch=["--no-requeue"])
    job.wait_for("Phase 1")
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)
    state = job.end()
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "143:0"), job.log
    assert f"Job {job.number} could not be queued again: submit the same file again, and it continues." in job.log


@pytest.mark.slurm
@pytest.mark.slow
def test_the_exit_code_of_a_job_is_that_of_the_run(cluster, tmp_path):
    job = cluster.submit("several_nodes", tmp_path / "out", "--dataset=nowhere", sbatch=["--ntasks-per-node=1"])
    state = job.end()
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0"), job.log
    assert "error: " in job.log


@pytest.mark.slurm
@pytest.mark.slow
def test_a_job_whose_first_node_is_lost_is_queued_again_and_continues(cluster, collections, undisturbed, tmp_path):
    few = ["--ntasks-per-node=1"]
    job = cluster.submit("several_nodes", tmp_path / "out", f"--dataset={collections / 'small'}", sbatch=few)
    job.wait_for("Phase 1")
    cluster.do("lose", "node1")
    until(lambda: "down" in cluster.call("sinfo", "--noheader", "--nodes=node1", "--format=%T"), lambda: job.log)
    cluster.do("begin", "node1")
    job.completed(restarts=1)
    assert contents(tmp_path / "out") == undisturbed
