"""The command line: answers before any library is imported, and mistakes named in one line."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from experiment.flags import parse_arguments
from loras.command_line import Parser, suggestion
from loras.flags import parse_arguments as parse_data_arguments

ROOT = Path(__file__).parents[1]
HEAVY = {"joblib", "matplotlib", "numpy", "safetensors", "scipy", "sklearn", "threadpoolctl", "torch", "tqdm"}


def imported(*command: str) -> tuple[int, str, str, set[str]]:
    """Return exit code and output of a Python process, and the packages that it has imported."""
    command = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    lines = done.stderr.splitlines()
    names = {line.rpartition("|")[2].split(".")[0].strip() for line in lines if line.startswith("import time:")}
    errors = "".join(f"{line}\n" for line in lines if not line.startswith("import time:"))
    return done.returncode, done.stdout, errors, names


@pytest.mark.parametrize(
    ("flag", "code", "error"),
    [("--help", 0, ""), ("--quik", 2, "error: --quik: no such flag. Did you mean --quick?\n")],
)
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(flag, code, error):
    done, printed, errors, names = imported("ablation_experiment.py", flag)
    assert (done, errors) == (code, error) and "argparse" in names and not names & HEAVY
    if flag == "--help":
        usage, *_ = printed.split("\n\n")
        assert len(usage.splitlines()) == 1 and "files and machine:\n" in printed


def test_flags_of_data_need_nothing_heavy_either():
    code, _, errors, names = imported("-c", "from loras.flags import parse_arguments; parse_arguments(['inspekt'])")
    assert (code, errors) == (2, "error: command: 'inspekt' is not known. Did you mean inspect?\n")
    assert not names & HEAVY


@pytest.mark.parametrize(
    ("parse", "arguments", "message"),
    [
        (parse_arguments, "--rep=stats", "--rep: no such flag. Did you mean --representations?"),
        (parse_arguments, "--sk", "--sk: no such flag. Did you mean --skip-bad or --sketch-flat?"),
        (parse_arguments, "--top_k=3", "--top_k: no such flag. Did you mean --top-k?"),
        (parse_arguments, "-quick", "-quick: no such flag. Did you mean --quick?"),
        (parse_arguments, "--xyz 5", "--xyz: no such flag. "),
        (parse_arguments, "my-loras", "'my-loras': no flag stands before it. "),
        (parse_arguments, "--controls=basik", "--controls: 'basik' is not known. Did you mean basic?"),
        (parse_arguments, "--rank-by=tets", "--rank-by: 'tets' is not known. Did you mean test?"),
        (parse_arguments, "--rank-by=9", "--rank-by: '9' is not known. Choose from test, val."),
        (parse_arguments, "--top-k=many", "--top-k: 'many' is not a whole number."),
        (parse_arguments, "--seed=1e400", "--seed: '1e400' is not a whole number."),
        (parse_arguments, "--\x1b[31m\u202e", "--\\x1b[31m\\u202e: no such flag. "),
        (parse_arguments, "--" + 5000 * "x", "--" + 38 * "x" + ": no such flag. "),
        (parse_data_arguments, "inspect x --jsn", "--jsn: no such flag. Did you mean --json?"),
        (parse_data_arguments, "inspect x y", "'y': no flag stands before it. "),
        (parse_data_arguments, "import", "the following arguments are required: source, out"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_nearest_word(capsys, parse, arguments, message):
    with pytest.raises(SystemExit) as ended:
        parse(arguments.split(" "))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1
    assert len(error) < 200


def test_every_flag_is_itself_and_no_beginning_of_it_is():
    """An abbreviation would change its meaning with each new flag."""
    parser = Parser()
    parser.add_argument("--quick", action="store_true")
    assert parser.parse_args(["--quick"]) == argparse.Namespace(quick=True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--quic"])


def test_words_that_begin_alike_come_first_and_far_ones_not_at_all():
    words = ["stats", "update_views", "update_kernel", "pca"]
    assert suggestion("update", words) == " Did you mean update_views or update_kernel?"
    assert suggestion("Update-Kernel", words) == " Did you mean update_kernel?"
    assert suggestion("stat", words) == " Did you mean stats?" == suggestion("stast", words)
    assert suggestion("astrology", words) == suggestion("", words) == suggestion("--", words) == ""
