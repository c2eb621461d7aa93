"""Names: which may be used, how others are shown, and screens, shells and spreadsheets that they end in."""

import csv
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from making import FILE_NAME, NARROW, lora, write_collection, write_lora

import ablation_experiment
import data
from data import CollectionError, index_collection
from loras import names

PROGRAM = data.__file__


@pytest.mark.parametrize("text", ["", "a b", "Bär", "猫", "🐈", "a,b;c", "=1+1", "$x_1$", "<b>", "x" * 255])
def test_texts_that_may_be_names(text):
    assert names.fault(text) == "" and names.plain(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\udcff", "\\udcff"),
        ("a\u202eb", "a\\u202eb"),
        ("\u2066a\u2069", "\\u2066a\\u2069"),
        ("\u200ea\u200f", "\\u200ea\\u200f"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("\u200ba\ufeff", "\\u200ba\\ufeff"),
        ("a\x85b\x9b", "a\\x85b\\x9b"),
    ],
)
def test_texts_that_are_no_names_are_shown_escaped(text, shown):
    assert names.fault(text) == f"'{shown}' is not printable text" and names.plain(text) == shown


def test_a_long_text_is_no_name_and_not_shown_whole():
    assert names.fault("x" * 256) == f"'{'x' * 40}...' has 256 characters"
    assert len(names.fault("\n" * 10**6)) < 200


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(text):
    assert names.spreadsheet_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["a=1", "", "'=1", "1-2", " =1"])
def test_other_cells_stay_as_they_are(text):
    assert names.spreadsheet_cell(text) == text


def test_samples_csv_holds_no_formula():
    files = [SimpleNamespace(path=f"{label}/0.safetensors", label=label, group="@x") for label in ("=cmd|' c'!A0", "b")]
    rows = {"train": np.array([1]), "validation": np.array([0])}
    collection = SimpleNamespace(files=files, groups=np.array([0, 0]))
    written = ablation_experiment.samples(SimpleNamespace(rows=rows, collection=collection)).decode()
    assert list(csv.reader(io.StringIO(written))) == [
        ["file", "label", "split", "group"],
        ["'=cmd|' c'!A0/0.safetensors", "'=cmd|' c'!A0", "val", "'@x"],
        ["b/0.safetensors", "b", "train", "'@x"],
    ]


# ----------------------------------------------------------------------------------------------------------------------
# At the door
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"\xff\xfe", "a\u202eb".encode(), b"a\nb", "a\u2028".encode()])
@pytest.mark.parametrize("place", ["class_1/{}/x.safetensors", "{}/0/x.safetensors", "class_1/{}.safetensors"])
def test_files_of_such_names_are_findings(tmp_path, capsys, name, place):
    root = write_collection(tmp_path)
    path = os.fsdecode(place.format("@").encode().replace(b"@", name))
    write_lora(root / path, lora())
    assert data.main(["inspect", str(root), "--top-k=1", "--headers-only"]) == 2
    told = capsys.readouterr().err
    assert (
        told == f"error: {tmp_path}/{names.plain(path)}: its name '{names.plain(path)}' is not printable text. "
        "Rename it, or leave it out.\n"
    )
    assert data.main(["inspect", str(root), "--top-k=1", "--headers-only", "--skip-bad", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_samples"] == 6 and [entry["path"] for entry in found["skipped"]] == [names.plain(path)]


@pytest.mark.parametrize("name", [b"zoo\xff", "zoo\u202e".encode()])
def test_a_collection_of_such_a_name_is_refused(tmp_path, capsys, name):
    root = write_collection(tmp_path / os.fsdecode(name))
    told = f"error: {names.plain(str(root))}: a name that is not printable text. Rename the folder.\n"
    assert data.main(["inspect", str(root), "--top-k=1"]) == 2 and capsys.readouterr().err == told
    arguments = ["--dataset", str(root), "--output-dir", str(tmp_path / "out"), "--device=cpu"]
    assert ablation_experiment.main(arguments, NARROW) == 2 and capsys.readouterr().err == told
    assert not (tmp_path / "out").exists()


def test_columns_and_fields_of_such_names_are_refused(tmp_path):
    root = write_collection(tmp_path)
    path = root / "class_0" / "0000" / "metadata.json"
    path.write_text(json.dumps({"a\u202eb": 1}))
    with pytest.raises(CollectionError) as error:
        index_collection(root)
    assert error.value.findings == [
        f"{path}: metadata.json has a field whose name 'a\\u202eb' is not printable text. Rename it."
    ]
    assert len(index_collection(root, skip_bad=True).files) == 5
    path.unlink()
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": f"class_0/0000/{FILE_NAME}", "a\nb": 1, "label": 2}))
    with pytest.raises(CollectionError) as error:
        index_collection(root)
    fault = "a column's name 'a\\nb' is not printable text. Rename it."
    assert error.value.findings == [f"{root / 'metadata.jsonl'}: {fault}"]


def test_values_of_other_columns_are_escaped(tmp_path):
    root = write_collection(tmp_path)
    (root / "class_0" / "0000" / "metadata.json").write_text('{"note": "a\\nb\\ud83d\\ude00", "odd": "\\ud800"}')
    columns = index_collection(root).columns
    assert [list(values.values()) for values in columns.values()] == [["a\\nb\U0001f600"], ["\\ud800"]]


# ----------------------------------------------------------------------------------------------------------------------
# Screens and shells
# ----------------------------------------------------------------------------------------------------------------------


def test_a_screen_without_the_letters_shows_them_escaped(tmp_path, monkeypatch):
    root = write_collection(tmp_path)
    (root / "class_0").rename(root / "Bär 🐻")
    for flags in ([], ["--json"]):
        screen = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, "ascii"))
        assert data.main(["inspect", str(root), "--top-k=1", "--headers-only", *flags]) == 0
        shown = screen.getvalue()
        assert not flags or json.loads(shown)["classes"] == {"Bär 🐻": 3, "class_1": 3}
        assert flags or b"B\\xe4r \\U0001f43b (3)" in shown


@pytest.mark.slow
def test_the_experiment_needs_no_letters_of_the_screen(tmp_path):
    root = write_collection(tmp_path / "zoo", per_class=6)
    (root / "class_0").rename(root / "Bär 🐻")
    script = os.path.join(os.path.dirname(PROGRAM), "ablation_experiment.py")
    flags = ["--top-k=1", "--quick", "--num-runs=1", "--representations=stats", "--device=cpu"]
    command = [sys.executable, script, "--dataset", str(root), "--output-dir", str(tmp_path / "out"), *flags]
    variables = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=variables, timeout=600)
    assert done.returncode == 0 and b"B\\xe4r" in done.stdout and b"Traceback" not in done.stderr
    done = subprocess.run([*command, "--labels=Ü.csv"], capture_output=True, env=variables, timeout=600)
    assert done.returncode == 2 and done.stderr.startswith(b"error: --labels \\xdc.csv: no such file.")


def test_what_is_suggested_for_a_shell_is_quoted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ablation_experiment.main(["--dataset=50k", "--data-dir=my data; rm x"]) == 2
    told = capsys.readouterr().err
    assert f"`python data.py import SOURCE {shlex.quote('my data; rm x/50k')}`" in told


def test_a_stream_that_was_closed_when_python_began_goes_nowhere_in_children_too():
    child = "import os; os.fstat(2); print('whole')"
    program = (
        "from loras import names; names.escape_output(); import subprocess, sys; sys.stderr.write('lost'); "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True, close_fds=False)"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} 2>&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(PROGRAM).parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n", "")
