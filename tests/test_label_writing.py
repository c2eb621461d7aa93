"""``python data.py label``: each row is read back as the LoRA that it is of, and nothing is guessed or overwritten."""

import csv
import json
import os
import shlex
import subprocess
import sys

import pytest
from making import FILE_NAME, lora, write_collection, write_lora
from safetensors.torch import save_file

import data
from data import CollectionError, index_collection, select_layers
from experiment.contents import contents_of
from loras import label_writing
from loras.command_line import program_path
from loras.label_writing import hint_of
from loras.weight_files import find_weight_files


def label(capsys, *arguments) -> tuple[int, str, str]:
    code = data.main(["label", *map(str, arguments)])
    return code, *capsys.readouterr()


def cells(path, delimiter: str = ",") -> list[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def fill(path, labels: str = "ab") -> None:
    """Write labels into the empty cells of a table, in turn."""
    rows = cells(path)
    for i, row in enumerate(rows):
        row["label"] = row["label"] or labels[i % len(labels)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_flat_folder_becomes_a_table_that_is_filled_in_and_read(tmp_path, capsys):
    root = tmp_path / "my loras"
    for i in range(6):
        write_lora(root / f"{i}.safetensors", lora(1, seed=i))
    out = root / "labels.csv"
    folder, flag = shlex.quote(str(root)), f"--labels={shlex.quote(str(out))}"
    assert label(capsys, root) == (
        0,
        f"{out}: 6 LoRAs, no label known\n"
        "next:    fill in the column label of each LoRA (in a spreadsheet: save as CSV UTF-8), then\n"
        f"         python {program_path('data.py')} inspect {folder} {flag}\n"
        f"         python {program_path('ablation_experiment.py')} --dataset={folder} {flag}\n",
        "",
    )
    assert out.read_bytes().startswith(b"\xef\xbb\xbffile_name,label\n0.safetensors,\n")  # as Excel knows UTF-8
    with pytest.raises(CollectionError, match=r"labels\.csv: lines 2 to 7: label is empty\. Fill it in"):
        index_collection(root, labels=out)
    fill(out)
    assert index_collection(root, labels=out).class_counts == {"a": 3, "b": 3}
    before = out.read_bytes()
    code, _, error = label(capsys, root)
    assert code == 2 and out.read_bytes() == before
    words = f"is there already, and is not overwritten. Fill it in for {flag}, or name another with --out."
    assert error == f"error: {out}: {words}\n"


def test_a_folder_that_has_the_name_of_a_collection_is_meant_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path / "small" / "a.safetensors", lora(1))
    _, out, _ = label(capsys, "small")
    assert "data.py inspect ./small --labels=small/labels.csv\n" in out
    assert "--dataset=./small --labels=small/labels.csv\n" in out


def test_whoever_reads_may_stop_at_once(tmp_path):
    write_lora(tmp_path / "zoo" / "a.safetensors", lora(1))
    command = f"set -o pipefail; {sys.executable} {data.__file__} label {tmp_path / 'zoo'} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "zoo" / "labels.csv").exists()


def test_a_hint_alone_is_no_label(tmp_path):
    for name in "abcdef":
        write_lora(tmp_path / f"{name}.safetensors", lora(1))
    rows = "".join(f"{name}.safetensors,x\n" for name in "abcdef")
    (tmp_path / "labels.csv").write_text(f"file_name,label_hint\n{rows}")
    with pytest.raises(CollectionError, match="no label: no column category_label or label"):
        index_collection(tmp_path, labels=tmp_path / "labels.csv")


def test_labels_are_filled_in_where_a_run_would_read_them(tmp_path, capsys):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=3)
    write_lora(root / "stray.safetensors", lora())
    write_lora(root / "one" / "x.safetensors", lora())  # a folder of one may be a LoRA
    code, out, _ = label(capsys, root, "--out", tmp_path / "new" / "mine.tsv")
    assert code == 0 and "8 LoRAs, 6 labelled from the folder names, 2 to fill in" in out
    rows = {row["file_name"]: row["label"] for row in cells(tmp_path / "new" / "mine.tsv", "\t")}
    assert rows["stray.safetensors"] == rows["one/x.safetensors"] == ""
    assert rows[f"class_1/0002/{FILE_NAME}"] == "class_1" and len(rows) == 8
    for path in find_weight_files(root)[0]:
        (root / path).with_name("metadata.json").write_text(json.dumps({"category_label": "x", "kind": "=1"}))
    code, out, _ = label(capsys, root)
    assert "8 LoRAs, 8 labelled from category_label in metadata.json\nnext:    python data.py inspect" in out
    assert {row["label"] for row in cells(root / "labels.csv")} == {"x"}
    (root / "metadata.csv").write_text("file_name,label\nstray.safetensors,=1+1\none/x,ok\n")  # computed by Excel
    code, out, _ = label(capsys, root, "--out", tmp_path / "third.csv")
    assert "8 LoRAs, 1 labelled from label in metadata.csv, 7 to fill in" in out


@pytest.mark.parametrize("layout", ["{}/pytorch_lora_weights.safetensors", "all/{}.safetensors"])
def test_folders_that_are_loras_or_hold_all_are_no_labels(tmp_path, capsys, layout):
    for i in range(6):
        path = tmp_path / layout.format(f"lora_{i}")
        write_lora(path, lora(1), {"artist": "xy"[i % 2], "id": i} if "pytorch" in layout else None)
    code, out, _ = label(capsys, tmp_path)
    assert code == 0 and "6 LoRAs, no label known" in out
    assert ("fields:  metadata.json beside them has artist (2 values): --label-column=NAME" in out) == (
        layout[0] == "{"
    )


def test_a_lora_of_many_checkpoints_has_one_row_for_every_step(tmp_path, capsys):
    for name in ("x", "y", "0003"):
        for step in (100, 200, 300):
            write_lora(tmp_path / name / f"checkpoint-{step}" / "adapter_model.safetensors", lora(1, seed=step))
    write_lora(tmp_path / "alone.safetensors", lora(1))
    assert label(capsys, tmp_path)[0] == 0
    out = tmp_path / "labels.csv"
    assert [row["file_name"] for row in cells(out)] == ["./0003/", "alone.safetensors", "x/", "y/"]
    fill(out, "a")
    assert len(index_collection(tmp_path, labels=out).files) == 4
    assert len(index_collection(tmp_path, labels=out, step="all").files) == 10
    assert index_collection(tmp_path, labels=out, step="100", skip_bad=True).class_counts == {"a": 3}


HOSTILE = [
    *("=cmd|x.safetensors", "-1.safetensors", "@x.safetensors", "+.safetensors", "a,b.safetensors", 'q"q.safetensors'),
    *(" blank .safetensors", "日本/é.safetensors", "C:/x.safetensors", "a\\b.safetensors", "<b>.safetensors"),
    *(
        "a.safetensors",
        "a/1.safetensors",
        "1-2.safetensors",
        "b.SAFETENSORS",
        "b.safetensors",
        "x" * 200 + ".safetensors",
    ),
    *("\\\\host.safetensors", "~.safetensors", "%s{0}.safetensors", "sep=;.safetensors"),
]


def test_whatever_files_are_called_each_row_is_read_back_as_its_file(tmp_path, capsys):
    for name in HOSTILE:
        write_lora(tmp_path / name, lora(1))
    unnamed = [
        "new\nline.safetensors",
        "\u202eevil.safetensors",
        os.fsdecode(b"\xff.safetensors"),
        "a\\..\\up.safetensors",
    ]
    for name in unnamed:
        write_lora(tmp_path / "bad" / name, lora(1))
    code, text, _ = label(capsys, tmp_path)
    out = tmp_path / "labels.csv"
    assert code == 0 and f"{len(HOSTILE)} LoRAs, no label known" in text
    assert "missing: 4 whose names no table can hold, as bad/" in text and text.replace("\n", "").isprintable()
    rows = cells(out)
    assert not any(row["file_name"].startswith(("=", "+", "-", "@")) for row in rows)
    fill(out)
    collection = index_collection(tmp_path, labels=out, skip_bad=True)
    assert sorted(file.path for file in collection.files) == sorted(HOSTILE)
    assert [path for path, _ in collection.skipped if not path.startswith("bad/")] == []


def test_hints_are_in_a_column_that_is_never_read_as_a_label_or_compared(tmp_path, capsys):
    for i in range(6):
        fields = {"ss_dataset_dirs": json.dumps({f"10_{'dc'[i % 2]}og": {"img_count": 1}}), "modelspec.title": "=1+1"}
        save_file(lora(1, seed=i), tmp_path / f"{i}.safetensors", metadata=fields)
    (tmp_path / "6.safetensors").write_bytes(b"broken")
    assert (
        "hints:   label_hint has what the headers of 6 say of their training; it is no label"
        in label(capsys, tmp_path)[1]
    )
    out = tmp_path / "labels.csv"
    assert [row["label_hint"] for row in cells(out)][:2] == [
        "trained on: dog; title: =1+1",
        "trained on: cog; title: =1+1",
    ]
    assert cells(out)[6]["label_hint"] == ""
    fill(out)
    collection = index_collection(tmp_path, labels=out, skip_bad=True)
    assert list(collection.columns) == ["label"] and contents_of(collection, select_layers(collection, None))[
        "columns"
    ] == {"label": 2}
    collection = index_collection(tmp_path, labels=out, label_column="label_hint", skip_bad=True)
    assert len(collection.classes) == 2  # asked for, it is


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({}, ""),
        ({"ss_output_name": "Rex", "name": "rex", "modelspec.title": "None"}, ""),
        ({"ss_dataset_dirs": '{"5_a b": 1, "3_a b": 1, "c": 1, "1_": 1}'}, "trained on: a b, c, "),
        ({"ss_dataset_dirs": "[" * 500, "ss_training_comment": "x" * 99}, f"comment: {'x' * 60}"),
        ({"modelspec.title": "T", "modelspec.trigger_phrase": "t", "name": "n"}, "title: T; name: n"),
    ],
)
def test_a_hint_says_what_the_name_does_not(fields, hint):
    assert hint_of(fields, "rex") == hint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no"], "no: no such folder. Give a folder of LoRAs."),
        (["file"], "file: a file, not a folder. Give a folder of LoRAs."),
        (["empty"], "empty: no *.safetensors file in it. Give a folder of LoRAs."),
        (["zoo", "--out=x.xlsx"], "--out x.xlsx: neither .csv nor .tsv. Name the table so."),
        (["zoo", "--out=link.csv"], "link.csv: is there already, and is not overwritten. "),
        (
            ["zoo", "--out=file/x.csv"],
            "file/x.csv: cannot be written (File exists). Name another place with --out.",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path / "zoo" / "a.safetensors", lora(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link.csv").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    code, out, error = label(capsys, *arguments)
    assert code == 2 and not out and error.startswith(f"error: {words}") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupt_leaves_no_table(tmp_path, monkeypatch, capsys):
    write_lora(tmp_path / "a.safetensors", lora(1))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(label_writing, "_hint_of_file", interrupt)
    assert label(capsys, tmp_path) == (130, "", "\nInterrupted.\n")
    assert not (tmp_path / "labels.csv").exists()
