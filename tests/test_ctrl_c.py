"""Ctrl-C on a terminal, which sends SIGINT to every process of the program at once: quiet, and soon over."""

import os
import pty
import re
import select
import signal
import sys
import termios
import time
from pathlib import Path

import pytest
from making import write_collection
from working import until

import ablation_experiment
import data


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command: str):
        self.output = b""
        self.process, self.file = pty.fork()
        if self.process == 0:
            os.environ["OMP_NUM_THREADS"] = "2"  # workers
            os.execv(command[0], command)
        looks = termios.tcgetattr(self.file)
        looks[3] |= termios.NOFLSH  # else a second Ctrl-C takes away what is written and not yet read
        termios.tcsetattr(self.file, termios.TCSANOW, looks)

    def read(self, seconds: float) -> bool:
        """Read what there is within some time; return whether more may come."""
        if select.select([self.file], [], [], seconds)[0]:
            try:
                self.output += os.read(self.file, 2**16)
            except OSError:  # nobody has the terminal any more
                return False
        return True

    def read_until(self, pattern: str) -> None:
        """Read until the output matches."""
        end = time.monotonic() + 120
        while not re.search(pattern.encode(), self.output):
            assert self.read(1.0) and time.monotonic() < end, self.output

    def handles(self, number: signal.Signals) -> bool:
        """Return whether the program has a handler of a signal."""
        caught = re.search(r"SigCgt:\t(\w+)", Path(f"/proc/{self.process}/status").read_text())[1]
        return bool(int(caught, 16) >> number - 1 & 1)

    def interrupt(self, times: int) -> tuple[int, float, str]:
        """Press Ctrl-C; return exit code, seconds until the end, and what all processes have written since."""
        before, start = len(self.output), time.monotonic()
        for _ in range(times):
            os.write(self.file, b"\x03")
        ended = os.waitpid(self.process, 0)[1], time.monotonic() - start
        while self.read(1.0) and time.monotonic() < start + 20:  # workers have the terminal too, until they end
            pass
        os.close(self.file)
        return os.waitstatus_to_exitcode(ended[0]), ended[1], self.output[before:].decode()


@pytest.mark.parametrize(
    ("moment", "seconds", "times"),
    [
        ("", 0.0, 1),  # the imports
        ("Phase 1", 0.2, 2),  # workers begin
        pytest.param("Phase 1", 3.0, 1, marks=pytest.mark.slow),  # and are at work
        pytest.param("Phase 3", 0.0, 1, marks=pytest.mark.slow),
        pytest.param("Controls", 1.0, 1, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_ends_the_program_and_its_workers_without_a_word_but_one(tmp_path, moment, seconds, times):
    root, program = write_collection(tmp_path / "small", classes=2, per_class=10), Path(ablation_experiment.__file__)
    flags = [f"--dataset={root}", f"--output-dir={tmp_path / 'out'}", "--top-k=1", "--controls=basic"]
    terminal = Terminal(sys.executable, str(program), *flags, "--representations=stats,vae", "--device=cpu")
    until(lambda: terminal.handles(signal.SIGUSR1))
    terminal.read_until(moment)
    time.sleep(seconds)
    code, took, said = terminal.interrupt(times)
    said = said[said.index("^C") :].replace("^C", "")
    assert (code, said.strip()) == (130, "Stopped by SIGINT. The same command continues where this one stopped.")
    assert took < 5  # a second, on a machine that is not busy


def test_ctrl_c_ends_an_inspection_likewise(tmp_path):
    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    terminal = Terminal(sys.executable, data.__file__, "inspect", str(root))
    until(lambda: terminal.handles(signal.SIGUSR1))
    code, _, said = terminal.interrupt(1)
    assert (code, said.replace("^C", "").strip()) == (130, "Stopped by SIGINT.")
