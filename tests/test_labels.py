import csv
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from making import FILE_NAME, lora, module_names, write_collection, write_lora
from safetensors.torch import save_file

import data
from ablation_experiment import main
from data import CollectionError, check_classes, index_collection, select_layers
from experiment.phases import split_collection
from experiment.settings import Networks
from loras import label_tables, labels


def findings(root, **flags) -> list[str]:
    with pytest.raises(CollectionError) as error:
        check_classes(index_collection(root, **flags))
    return error.value.findings


def flat_collection(root, count: int = 6):
    """Files 0.safetensors ... in the root of a collection, where no folder is a label."""
    for i in range(count):
        write_lora(root / f"{i}.safetensors", lora(1, seed=i))
    return root


def table(path, header, *rows):
    """A csv, or for .jsonl the same as objects."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(dict(zip(header, row, strict=False))) + "\n" for row in rows)
        else:
            csv.writer(file).writerows([header, *rows])
    return path


def rows_of(count: int = 6, *columns):
    """Rows for the files of `flat_collection`, with a column for each function of the file's number."""
    return [(f"{i}.safetensors", *(column(i) for column in columns)) for i in range(count)]


def cats_and_dogs(i):
    return "cat" if i % 2 else "dog"


def metadata_collection(root, count: int = 12):
    """LoRAs with a metadata.json beside each: four fields, of which not all make classes."""
    for i in range(count):
        fields = {"category_label": f"c{i % 3}", "num_images": 4 + i % 2, "name": f"lora {i}", "tags": ["x"]}
        write_lora(root / f"{i:02}" / FILE_NAME, lora(1, seed=i), fields)
    return root


# ----------------------------------------------------------------------------------------------------------------------
# Where labels come from
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_at_the_root_labels_the_files_that_it_names(tmp_path, name):
    table(flat_collection(tmp_path) / name, ["file_name", "label"], *rows_of(6, cats_and_dogs))
    collection = index_collection(tmp_path)
    assert [file.label for file in collection.files] == ["dog", "cat"] * 3
    assert (collection.label_source, collection.label_column) == (f"label in {name}", "label")
    check_classes(collection)


def test_the_first_source_that_is_there_wins(tmp_path):
    """Folders, then metadata.json, then the table at the root, then that of --labels, each laid over the one before."""
    root = write_collection(tmp_path / "zoo")
    paths = [file.path for file in index_collection(root).files]
    assert index_collection(root).label_source == "the folder names"
    for path in paths:
        (root / path).with_name("metadata.json").write_text(json.dumps({"category_label": "beside", "label": 1}))
    assert {file.label for file in index_collection(root).files} == {"beside"}
    table(root / "metadata.csv", ["file_name", "label"], *[(path, "table") for path in paths])
    assert {file.label for file in index_collection(root).files} == {"table"}
    given = table(tmp_path / "mine.jsonl", ["file_name", "label"], *[(path, "given") for path in paths])
    collection = index_collection(root, labels=given)
    assert {file.label for file in collection.files} == {"given"}
    assert collection.label_source == "label in mine.jsonl"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["label", "category_label"], "category_label"),
        (["rank", "label"], "label"),
        (["concept"], "concept"),
        (["", "concept"], "concept"),  # the row numbers of a data frame
    ],
)
def test_the_label_column_where_none_is_named(tmp_path, columns, expected):
    rows = rows_of(6, *[lambda i, name=name: f"{name} {i % 2}" for name in columns])
    table(flat_collection(tmp_path) / "metadata.csv", ["file_name", *columns], *rows)
    collection = index_collection(tmp_path)
    assert collection.label_column == expected and collection.classes == [f"{expected} 0", f"{expected} 1"]


def test_several_columns_and_none_of_a_known_name_are_listed_with_their_numbers_of_values(tmp_path):
    rows = rows_of(6, cats_and_dogs, lambda i: i)
    table(flat_collection(tmp_path) / "metadata.csv", ["file_name", "animal", "number"], *rows)
    assert findings(tmp_path) == [
        f"{tmp_path / 'metadata.csv'}: no label: no column category_label or label; the columns there are: "
        "animal (2 values), number (6 values). Choose one with --label-column."
    ]
    assert index_collection(tmp_path, label_column="animal").classes == ["cat", "dog"]
    # The column of the groups is not the label: one other is left.
    assert index_collection(tmp_path, group_column="number").classes == ["cat", "dog"]


def test_any_metadata_field_is_a_question_of_its_own(tmp_path):
    """Numbers are labels too; another field is another task on the same LoRAs."""
    metadata_collection(tmp_path)
    assert index_collection(tmp_path).classes == ["c0", "c1", "c2"]
    collection = index_collection(tmp_path, label_column="num_images")
    assert collection.classes == ["4", "5"] and collection.label_source == "num_images in metadata.json"
    check_classes(collection)


@pytest.mark.parametrize(
    ("value", "label"), [("a b", "a b"), (3, "3"), (-0.5, "-0.5"), (True, "true"), ("3", "3"), ("ü, \U0001f408", None)]
)
def test_texts_are_labels_as_they_are_and_numbers_as_json_writes_them(tmp_path, value, label):
    table(flat_collection(tmp_path) / "metadata.jsonl", ["file_name", "label"], *rows_of(6, lambda _: value))
    assert {file.label for file in index_collection(tmp_path).files} == {label or value}


def test_csv_with_a_byte_order_mark_quotes_and_blank_lines(tmp_path):
    flat_collection(tmp_path, 3)
    (tmp_path / "metadata.csv").write_bytes(
        '\ufefffile_name,label\r\n0.safetensors,"a ""b"", c"\r\n\r\n./1.safetensors,x\r\n2.safetensors,x\r\n'.encode()
    )
    assert [file.label for file in index_collection(tmp_path).files] == ['a "b", c', "x", "x"]


SPREADSHEETS = {
    "backslashes": "file_name,label\r\na\\0.safetensors,x\r\n.\\a\\1.safetensors,y\r\n",
    "semicolons": 'file_name;label\r\na/0.safetensors;x\r\n"a/1.safetensors";"y"\r\n',
    "tabs": "file_name\tlabel\na/0.safetensors\tx\na/1.safetensors\ty\n",
    "quoted names of columns": '"label";"file_name"\nx;a/0.safetensors\ny;a/1.safetensors\n',
    "old line ends": "file_name,label\ra/0.safetensors,x\ra/1.safetensors,y\r",
    "blank lines": "file_name,label\n\n,\na/0.safetensors,x\n,,\n\r\na/1.safetensors,y\n\n",
    "trailing separators": "file_name,label,,\na/0.safetensors,x,,\na/1.safetensors,y,,\n",
    "trailing separators of rows": "file_name;label\na/0.safetensors;x;\na/1.safetensors;y;\n",
    "spaces in the header": " file_name , label\na/0.safetensors,x\na/1.safetensors,y",
    "commas in cells": 'file_name;label;price\na/0.safetensors;x;"1,5"\na/1.safetensors;y;2,5\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("case", SPREADSHEETS)
def test_tables_as_spreadsheets_write_them(tmp_path, case, encoding):
    for i in range(2):
        write_lora(tmp_path / "a" / f"{i}.safetensors", lora(1, seed=i))
    (tmp_path / "metadata.csv").write_bytes(SPREADSHEETS[case].encode(encoding))
    collection = index_collection(tmp_path, label_column="label")
    assert [file.label for file in collection.files] == ["x", "y"] and collection.label_column == "label"


@pytest.mark.parametrize("column", ["Filename", "FILE", "path", "File Path", "name", "LoRA", "lora-name", "model"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_column_of_files_by_another_name(tmp_path, column, separator):
    flat_collection(tmp_path)
    rows = [[column, "Label", "artist"], *([f"{i}", cats_and_dogs(i), "x"] for i in range(6))]  # without suffix
    (tmp_path / "metadata.csv").write_text("\n".join(map(separator.join, rows)))
    collection = index_collection(tmp_path)
    assert [file.label for file in collection.files] == ["dog", "cat"] * 3 and collection.label_column == "Label"
    assert collection.columns == {"Label": dict(zip(PATHS, ["dog", "cat"] * 3, strict=True)), "artist": ALL_X}


PATHS = [f"{i}.safetensors" for i in range(6)]
ALL_X = dict.fromkeys(PATHS, "x")


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (["name", "path", "label"], lambda i: (f"style {i}", f"{i}.safetensors", "x"), "path"),
        (["path", "name", "label"], lambda i: (f"/home/me/{i}.png", f"{i}", "x"), "name"),
        (["name", "lora", "label"], lambda i: (f"{i}", f"{i}", "x"), "name"),  # the first of those that name files
        (["model", "file name", "label"], lambda i: ("sd15", f"{i}", "x"), "file name"),
        (["path", "File_Name", "label"], lambda i: (f"{5 - i}", f"{i}", "x"), "file_name"),  # which goes before all
        (["name", "model"], lambda i: (f"{i}", "x"), "name"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_of_several_columns_the_one_that_names_files(tmp_path, columns, row, expected, suffix):
    table(flat_collection(tmp_path) / f"metadata.{suffix}", columns, *map(row, range(6)))
    collection = index_collection(tmp_path)
    assert collection.table.file_column == expected and collection.class_counts == {"x": 6}


def test_a_column_that_is_asked_for_names_no_files(tmp_path):
    table(flat_collection(tmp_path) / "metadata.csv", ["model", "name"], *[("ab"[i % 2], f"{i}") for i in range(6)])
    assert index_collection(tmp_path, label_column="model").class_counts == {"a": 3, "b": 3}
    table(tmp_path / "metadata.csv", ["name", "label"], *[(f"{i}", "x") for i in range(6)])
    (finding,) = findings(tmp_path, label_column="name")
    assert finding.endswith(
        "the columns there are: label (1 value), and name, which names the files. Choose one with --label-column."
    )


def test_names_without_suffix_and_of_files_elsewhere(tmp_path):
    """A name that is a path, or a folder, is that; without its folder it is no name, but the error has the path."""
    for path in ("v1.5.safetensors", "a/x.SAFETENSORS", "b/x.safetensors", "b/y/1.safetensors"):
        write_lora(tmp_path / path, lora(1))
    path = table(
        tmp_path / "metadata.csv", ["name", "label"], ("v1.5", "1"), ("a\\x", "2"), ("./b/x", "3"), ("b/y", "4")
    )
    labels = {file.path: file.label for file in index_collection(tmp_path).files}
    assert labels == {"a/x.SAFETENSORS": "2", "b/x.safetensors": "3", "b/y/1.safetensors": "4", "v1.5.safetensors": "1"}
    table(path, ["name", "label"], ("v1.5", "1"), ("x", "2"), ("b/x", "3"), ("b/y", "4"))
    assert findings(tmp_path)[0].endswith(
        "Write its path, if it is a/x.SAFETENSORS, or b/x.safetensors; else remove the row."
    )
    write_lora(tmp_path / "v1.5.Safetensors", lora(1))
    assert findings(tmp_path)[0] == f"{path}: line 2: 'v1.5' may be v1.5.Safetensors and v1.5.safetensors. Write which."


def test_a_tsv_is_read_and_a_workbook_refused(tmp_path):
    root = flat_collection(tmp_path / "zoo")
    (tmp_path / "mine.tsv").write_text("\n".join(["lora\tnote, long", *(f"{i}\t{i % 2}" for i in range(6))]))
    assert index_collection(root, labels=tmp_path / "mine.tsv").class_counts == {"0": 3, "1": 3}
    for name, kind in (
        ("mine.xlsx", "a workbook, which is not read"),
        ("mine.csv", "a workbook (xlsx, ods) or another"),
    ):
        (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(9))
        (finding,) = findings(root, labels=tmp_path / name)
        assert finding.startswith(f"{tmp_path / name}: {kind}")
        assert finding.endswith(". Save it as CSV UTF-8, and give that.")


@pytest.mark.parametrize(
    ("label", "encoding", "name"),
    [
        ("Bär", "latin-1", "CP1252"),
        ("アニメ", "shift-jis", "CP932"),
        ("动漫风格", "gbk", "GB18030"),
        ("만화", "euc-kr", "CP949"),
        ("аниме", "cp1251", "CP1251"),
    ],
)
def test_a_table_of_another_encoding_says_how_it_reads_in_some(tmp_path, label, encoding, name):
    path = flat_collection(tmp_path, 1) / "metadata.csv"
    path.write_bytes(f"file_name;label\n0.safetensors;{label}\n".encode(encoding))
    (finding,) = findings(tmp_path)
    assert finding.startswith(f"{path}: not UTF-8: byte 0x") and f"{name} '{label}'" in finding
    assert "Save it as UTF-8 (in a spreadsheet: CSV UTF-8; elsewhere: `iconv -f C" in finding.replace("-f G", "-f C")
    path.write_bytes("file_name,label\n0.safetensors,a".encode("utf-16-be"))
    assert f"`iconv -f UTF-16BE -t UTF-8 {path} > FILE`" in findings(tmp_path)[0]


def test_jsonl_as_windows_writes_it(tmp_path):
    flat_collection(tmp_path, 2)
    rows = ['{"file_name": ".\\\\0.safetensors", "label": "ä"}', "", '{"file_name": "1.safetensors", "label": "b"}']
    for encoding, end in (("utf-8-sig", "\r\n"), ("utf-16", "\r")):
        (tmp_path / "metadata.jsonl").write_bytes(end.join(rows).encode(encoding))
        assert [file.label for file in index_collection(tmp_path).files] == ["ä", "b"]


@pytest.mark.parametrize("name", ["C:\\loras\\x.safetensors", "c:/x", "a\\..\\..\\x"])
def test_paths_of_a_drive_are_not_below_the_collection(tmp_path, name):
    table(flat_collection(tmp_path, 1) / "metadata.csv", ["file_name", "label"], (name, "a"))
    assert f"line 2: {name!r} is not a path below the collection. " in findings(tmp_path)[0]


def test_a_row_may_name_the_folder_of_one_lora(tmp_path):
    root = write_collection(tmp_path)
    folders = [os.path.dirname(file.path) for file in index_collection(root).files]
    table(root / "metadata.csv", ["file_name", "label"], *[(f"{folder}/", "x") for folder in folders])
    assert {file.label for file in index_collection(root).files} == {"x"}
    table(root / "metadata.csv", ["file_name", "label"], ("class_0", "x"))  # holds three
    assert findings(root)[0].startswith(f"{root / 'metadata.csv'}: line 2: a label for a missing file: ")


# ----------------------------------------------------------------------------------------------------------------------
# Tables that cannot be used
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "a/../../x.safetensors", "/etc/passwd", "http://x/y", "file:///etc/x", "..\\x", "\\\\host\\x"],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_names_that_lead_out_of_the_collection_are_refused(tmp_path, monkeypatch, name, suffix):
    root = flat_collection(tmp_path / "zoo")
    write_lora(tmp_path / "x.safetensors", lora(1))
    path = table(root / f"metadata.{suffix}", ["file_name", "label"], *rows_of(6, cats_and_dogs), (name, "cat"))
    opened = []
    monkeypatch.setattr(data.lora_files, "read_header", lambda path: opened.append(str(path)) or b"")
    monkeypatch.setattr(data.lora_files, "parse_header", lambda *_: NO_HEADER)
    line = 8 if suffix == "csv" else 7
    for skip_bad in (False, True):
        assert findings(root, skip_bad=skip_bad) == [
            f"{path}: line {line}: {name!r} is not a path below the collection. Name it relative to {root}."
        ]
    assert set(opened) == {str(root / f"{i}.safetensors") for i in range(6)}


NO_HEADER = data.lora_files.Header(data.lora_files.Places(data.lora_files.Layout(()), (), (), ()), 8, b"")


def test_a_name_through_a_link_out_of_the_collection_is_no_file_of_it(tmp_path):
    root = flat_collection(tmp_path / "zoo")
    write_lora(tmp_path / "outside" / "x.safetensors", lora(1))
    (root / "link").symlink_to(tmp_path / "outside")
    rows = [*rows_of(6, cats_and_dogs), ("link/x.safetensors", "cat")]
    path = table(root / "metadata.csv", ["file_name", "label"], *rows)
    (finding,) = findings(root)
    assert finding.startswith(f"{path}: line 8: a label for a missing file: no weight file 'link/x.safetensors' in ")


OTHER_NAMES = f"no column file_name (nor {', '.join(label_tables.FILE_COLUMNS)})"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("csv", b"", "no label: holds no row"),
        ("csv", b"file_name,label\n", "no label: holds no row"),
        ("csv", b"photo,label\n0.safetensors,a\n", "no column file_name (nor filename, file, filepath, path, name, "),
        ("csv", b"photo;label\n0.safetensors;a\n", OTHER_NAMES + ", but photo, label. Call the column that names "),
        ("csv", b"file_name,a\xe2\x80\xaeb\n0.safetensors,a\n", "a column's name 'a\\u202eb' is not printable text"),
        ("csv", b"file_name,label\n0.safetensors,a,b\n", "line 2: not readable (3 cells under 2 columns)"),
        ("csv", b"file_name,label\n0.safetensors\n", "line 2: not readable (1 cells under 2 columns)"),
        ("csv", b'file_name,label\n0.safetensors,"a', "line 1: not readable (unexpected end of data)"),
        ("csv", b"file_name,label,label\n0.safetensors,a,b\n", "line 1: not readable (two columns are called label)"),
        (
            "csv",
            "file_name,label\n0.safetensors,Bär\n".encode("cp1252"),
            "not UTF-8: byte 0xe4 in line 2, in CP1252 'Bär', CP1251 'Bдr'",
        ),
        ("csv", b"\xff\xfef\0i\0l", "not readable as UTF-16"),
        (
            "csv",
            "file_name,label\n0.safetensors,a".encode("utf-16-le"),
            "holds NUL bytes: UTF-16",
        ),
        ("jsonl", b"\xff", "not UTF-8: byte 0xff in line 1"),
        ("csv", b"file_name,label\n0.safetensors," + b"a" * 200_000, "line 1: not readable (field larger than field"),
        ("csv", b"file_name,label\n,a\n", "line 2: names no file in file_name"),
        ("csv", b"file_name,label\n0.safetensors,a\n./0.safetensors,b\n", "line 3: './0.safetensors' again, after"),
        ("jsonl", b"", "no label: holds no row"),
        ("jsonl", b'{"file_name": "0.safetensors", "label": "a"}\n{', "line 2: not readable (Expecting property name"),
        ("jsonl", b'{"file_name": "0.safetensors", "label": "a"}\n\n[1]', "line 3: not readable (not a JSON object)"),
        ("jsonl", b"[" * 100_000, "line 1: not readable ("),
        ("jsonl", b'{"file_name": 1' + b"0" * 5000 + b"}", "line 1: not readable ("),
        ("jsonl", b'{"file_name": 7, "label": "a"}', "line 1: names no file in file_name"),
    ],
)
def test_a_table_that_cannot_be_read_is_told_with_its_line(tmp_path, name, content, words):
    path = flat_collection(tmp_path, 1) / f"metadata.{name}"
    path.write_bytes(content)
    for skip_bad in (False, True):  # it is no file that could be left out
        (finding,) = findings(tmp_path, skip_bad=skip_bad)
        assert finding.startswith(f"{path}: {words}")


@pytest.mark.parametrize(
    "lines",
    [
        ("sep=;", "file_name;label"),
        ('"sep=|"', "File_Name|label"),
        ("FILE_NAME\tlabel",),
        ("sep=,,", "file_name,label"),
    ],
)
def test_spreadsheets_say_the_separator_and_write_names_in_any_case(tmp_path, lines):
    flat_collection(tmp_path)
    separator = lines[-1][9]
    rows = [*lines, *(f"{i}.safetensors{separator}{'ab'[i % 2]}" for i in range(6))]
    for end in ("\n", "\r\n"):
        (tmp_path / "metadata.csv").write_bytes(end.join(rows).encode())
        assert index_collection(tmp_path).class_counts == {"a": 3, "b": 3}
    (tmp_path / "metadata.csv").write_text("\n".join([*rows, f"9.safetensors{separator}a"]))
    assert findings(tmp_path)[0].startswith(f"{tmp_path}/metadata.csv: line {len(rows) + 1}: a label for a missing")


def test_tables_are_bounded_plain_files(tmp_path, monkeypatch):
    flat_collection(tmp_path, 1)
    path = tmp_path / "metadata.csv"
    path.write_text("file_name,label\n")
    monkeypatch.setattr(label_tables, "MAX_TABLE_BYTES", 10)
    assert findings(tmp_path)[0].startswith(f"{path}: not readable (16 bytes, more than 10)")
    path.unlink()
    os.mkfifo(path)  # which would be read for ever
    assert findings(tmp_path) == [f"{path}: not a plain file. Remove it."]
    path.unlink()
    path.mkdir()
    assert findings(tmp_path) == [f"{path}: not a plain file. Remove it."]
    assert findings(tmp_path, labels=tmp_path / "no.csv")[0].startswith(f"{tmp_path / 'no.csv'}: no such file")
    other = tmp_path / "0.safetensors"
    assert findings(tmp_path, labels=other)[0].startswith(f"{other}: neither .csv, .tsv nor .jsonl")


def test_metadata_json_is_bounded_and_a_plain_file(tmp_path):
    path = write_lora(tmp_path / "a" / FILE_NAME, lora(1), {"category_label": "a"}).parent / "metadata.json"
    path.write_bytes(b" " * (2**20 + 1))
    fault = "metadata.json is not readable as JSON (1048577 bytes, more than 1048576)"
    assert findings(tmp_path)[0].startswith(f"{path}: {fault}")
    path.unlink()
    os.mkfifo(path)
    assert findings(tmp_path)[0].startswith(f"{path}: metadata.json is not readable as JSON (not a plain file)")


def test_a_table_that_is_a_link_to_nowhere_is_not_passed_over(tmp_path):
    write_collection(tmp_path)
    (tmp_path / "metadata.csv").symlink_to("nowhere.csv")
    assert findings(tmp_path)[0].startswith(f"{tmp_path / 'metadata.csv'}: no such file")


def test_two_tables_are_refused(tmp_path):
    for name in label_tables.TABLES:
        table(flat_collection(tmp_path) / name, ["file_name", "label"], *rows_of(6, cats_and_dogs))
    assert findings(tmp_path) == [
        f"{tmp_path}: holds both metadata.csv and metadata.jsonl. Keep one, or name one with --labels."
    ]
    assert index_collection(tmp_path, labels=tmp_path / "metadata.csv").classes == ["cat", "dog"]


@pytest.mark.parametrize("label", ["a\nb", "\x1b[31m", "a\u202eb", "a\u2028", "a\u200b", "\ufeffa", 256 * "a"])
def test_labels_and_groups_are_printable_and_no_captions(tmp_path, label):
    for column in ("label", "group"):
        rows = [(name, label if column == "label" else "x", label) for name, _ in rows_of(6, str)]
        table(flat_collection(tmp_path) / "metadata.jsonl", ["file_name", "label", "group"], *rows)
        faults = findings(tmp_path, group_column="group")
        words = "has 256 characters" if len(label) == 256 else "is not printable text"
        assert len(faults) == 6 and all(f"{words}. Rename it, or leave it out." in finding for finding in faults)
        assert all(finding.isprintable() for finding in faults)


# ----------------------------------------------------------------------------------------------------------------------
# The rows about labels of the table of bad input, through the program
# ----------------------------------------------------------------------------------------------------------------------


def no_label_in_a_folder(root):
    write_collection(root)
    path = write_lora(root / "stray.safetensors", lora())
    tried = "no metadata.json with category_label beside it, and it does not lie in <class>/ or <class>/<lora>/"
    return [], f"{path}: no label: {tried}; there is no metadata.json with fields. Label it or leave it out."


def no_label_in_a_metadata_json(root):
    metadata_collection(root)
    path = root / "03" / FILE_NAME
    (path.parent / "metadata.json").write_text('{"num_images": 4}')
    tried = "no category_label (a text or a number) in metadata.json beside it, as other files here have"
    choices = "category_label (3 values), num_images (2 values), name (11 values)"
    return [], f"{path}: no label: {tried}; the fields there are: {choices}. Label it or leave it out."


def no_such_field(root):
    metadata_collection(root)
    choices = "category_label (3 values), num_images (2 values), name (12 values)"
    return ["--label-column=concept"], (
        f"{root}: no label: no metadata.json beside a weight file has concept; the fields there are: {choices}. "
        "Choose one with --label-column."
    )


def no_row_for_a_file(root):
    path = table(flat_collection(root) / "metadata.csv", ["file_name", "label", "x"], *rows_of(5, cats_and_dogs, str))
    tried = f"no row for it in {path.name}; the columns there are: label, x"
    return [], f"{root / '5.safetensors'}: no label: {tried}. Label it or leave it out."


def an_empty_cell(root):
    rows = [*rows_of(5, cats_and_dogs), ("5.safetensors", " ")]
    path = table(flat_collection(root) / "metadata.csv", ["file_name", "label"], *rows)
    return [], f"{path}: line 7: label is empty. Fill it in, or --skip-bad leaves these LoRAs out."


def empty_cells(root):
    rows = [*rows_of(2, cats_and_dogs), *((f"{i}.safetensors", "") for i in (2, 3, 5)), ("4.safetensors", "cat")]
    path = table(flat_collection(root) / "metadata.csv", ["file_name", "label"], *rows)
    return [], f"{path}: lines 4 to 6: label is empty. Fill it in, or --skip-bad leaves these LoRAs out."


def a_list_in_a_cell(root):
    rows = [*rows_of(5, cats_and_dogs), ("5.safetensors", ["cat"])]
    path = table(flat_collection(root) / "metadata.jsonl", ["file_name", "label"], *rows)
    words = "label is neither a text nor a number. Write one, or --skip-bad leaves these LoRAs out."
    return [], f"{path}: line 6: {words}"


def no_folder_and_no_table(root):
    flat_collection(root, 60)
    fault = "of 60 LoRAs in it none lies in <class>/ or <class>/<lora>/, and there is no metadata.json with fields"
    table_words = "the line file_name,label and one such as 0.safetensors,anime for each LoRA"
    mend = f"Label them in a table (--labels FILE): {table_words}. `python data.py label {root}` writes it, to fill in."
    return [], f"{root}: no label: {fault}. {mend}"


def no_folder_and_a_table_that_no_flag_names(root):
    path = table(flat_collection(root) / "my labels.csv", ["file_name", "label"], *rows_of(6, cats_and_dogs))
    fault = "of 6 LoRAs in it none lies in <class>/ or <class>/<lora>/, and there is no metadata.json with fields"
    other = f"`python data.py label {root} --out FILE` writes another, to fill in"
    return [], f"{root}: no label: {fault}. `--labels='{path}'` takes labels from that table; {other}."


def no_field_and_nothing_to_choose(root):
    write_collection(root)
    fault = "no metadata.json beside a weight file has concept; there is no metadata.json with fields"
    example = f"class_0/0000/{FILE_NAME},anime"
    table_words = f"the line file_name,label and one such as {example} for each LoRA"
    mend = f"Label them in a table (--labels FILE): {table_words}. `python data.py label {root}` writes it, to fill in."
    return ["--label-column=concept"], f"{root}: no label: {fault}. {mend}"


def no_column_beside_the_files(root):
    path = table(flat_collection(root) / "metadata.csv", ["file_name"], *rows_of(6))
    fault = "no column category_label or label; there is none but that of the files"
    return [], f"{path}: no label: {fault}. Add a column label."


def several_columns_and_a_likely_one(root):
    path = table(flat_collection(root) / "metadata.csv", ["path", "size", "Class"], *rows_of(6, str, cats_and_dogs))
    choices = "the columns there are: size (6 values), Class (2 values), and path, which names the files"
    fault = f"no column category_label or label; {choices}"
    return [], f"{path}: no label: {fault}. --label-column=Class takes that one."


def a_name_of_two(root):
    write_lora(root / "a.safetensors", lora(1))
    write_lora(root / "a" / "1.safetensors", lora(1))
    path = table(root / "metadata.csv", ["file_name", "label"], ("a", "cat"), ("a/", "dog"))
    return [], f"{path}: line 2: 'a' may be a.safetensors and a/. Write which."


def each_lora_in_a_folder(root):
    for i in range(6):
        write_lora(root / f"{i}" / FILE_NAME, lora(1, seed=i))
    return [], (
        f"{root}: labels from the folder names give as many labels as LoRAs (6): looks like an id; no other column "
        "would make classes. Choose labels that repeat. Where folders are no concepts, "
        f"`python data.py label {root}` writes a table for --labels, to fill in."
    )


def no_such_column(root):
    path = table(flat_collection(root) / "metadata.csv", ["file_name", "label"], *rows_of(6, cats_and_dogs))
    choices = "the columns there are: label (2 values)"
    message = f"{path}: no label: no column concept; {choices}. Choose one with --label-column."
    return ["--label-column=concept"], message


def a_label_for_a_missing_file(root):
    rows = [*rows_of(6, cats_and_dogs), ("6.safetensors", "cat")]
    path = table(flat_collection(root).parent / "mine.csv", ["file_name", "label"], *rows)
    fault = f"no weight file '6.safetensors' in {root}, of whose folders hidden and linked ones are not read"
    message = f"{path}: line 8: a label for a missing file: {fault}; the columns there are: label. Fetch the file or "
    return [f"--labels={path}"], f"{message}remove the row."


def a_label_for_each_lora(root):
    metadata_collection(root)
    return ["--label-column=name"], (
        f"{root}: labels from name in metadata.json give as many labels as LoRAs (12): looks like an id; columns that "
        "would make classes: category_label (3 values), num_images (2 values). Choose one with --label-column."
    )


def a_label_for_each_lora_and_nothing_else(root):
    table(flat_collection(root) / "metadata.csv", ["file_name", "label"], *rows_of(6, str))
    return [], (
        f"{root}: labels from label in metadata.csv give as many labels as LoRAs (6): looks like an id; no other "
        "column would make classes. Choose labels that repeat."
    )


def one_class(root):
    write_collection(root, classes=1)
    message = "labels from the folder names give fewer than two classes (class_0: 3). At least two concepts are needed."
    command = f"python data.py label {root}"
    mend = f"Where folders are no concepts, `{command}` writes a table for --labels, to fill in."
    return [], f"{root}: {message} {mend}"


def a_class_of_two(root):
    write_collection(root, classes=2, per_class=4)
    for i in (0, 1):
        (root / "class_1" / f"000{i}" / FILE_NAME).unlink()
    return [], (
        f"{root}: labels from the folder names give a class with fewer than three LoRAs (class_1: 2, class_0: 4). "
        "Train, validation and test need one each."
    )


def a_class_of_two_in_two_spellings(root):
    rows = zip(PATHS, ["cat", "Cat", "cat", "dog", "dog", "dog"], strict=True)
    table(flat_collection(root) / "metadata.csv", ["file_name", "label"], *rows)
    return [], (
        f"{root}: labels from label in metadata.csv give a class with fewer than three LoRAs (Cat: 1, cat: 2, dog: 3). "
        "Train, validation and test need one each. 'Cat' and 'cat' may be one label."
    )


def no_group_beside(root):
    metadata_collection(root)
    path = root / "03" / FILE_NAME
    (path.parent / "metadata.json").write_text('{"category_label": "c0"}')
    message = "no group: metadata.json beside it has no num_images (a text or a number). Add it or leave the file out."
    return ["--group-column=num_images"], f"{path}: {message}"


def no_group_in_a_row(root):
    rows = [*rows_of(5, cats_and_dogs, str), ("5.safetensors", "cat", "")]
    table(flat_collection(root) / "metadata.csv", ["file_name", "label", "owner"], *rows)
    message = "no group: its row in metadata.csv has no owner (a text or a number). Add it or leave the file out."
    return ["--group-column=owner"], f"{root / '5.safetensors'}: {message}"


def no_group_column(root):
    table(flat_collection(root) / "metadata.csv", ["file_name", "label"], *rows_of(6, cats_and_dogs))
    return ["--group-column=owner"], (
        f"{root}: no group: no column owner in metadata.csv, and no metadata.json beside a weight file has owner; "
        "there is no metadata.json with fields. Add it, or leave out --group-column."
    )


def two_groups_in_a_class(root):
    metadata_collection(root)
    message = "num_images gives a class with fewer than three groups (c0: 2, c1: 2, c2: 2). Train, validation and test"
    return ["--group-column=num_images"], f"{root}: {message} need one each: group by another column."


BAD_LABELS = [
    no_label_in_a_folder,
    no_label_in_a_metadata_json,
    no_such_field,
    no_row_for_a_file,
    an_empty_cell,
    empty_cells,
    a_list_in_a_cell,
    no_folder_and_no_table,
    no_folder_and_a_table_that_no_flag_names,
    no_field_and_nothing_to_choose,
    no_column_beside_the_files,
    several_columns_and_a_likely_one,
    a_name_of_two,
    each_lora_in_a_folder,
    no_such_column,
    a_label_for_a_missing_file,
    a_label_for_each_lora,
    a_label_for_each_lora_and_nothing_else,
    one_class,
    a_class_of_two,
    a_class_of_two_in_two_spellings,
    no_group_beside,
    no_group_in_a_row,
    no_group_column,
    two_groups_in_a_class,
]


@pytest.mark.parametrize("bad", BAD_LABELS, ids=lambda make: make.__name__)
def test_bad_labels_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, bad):
    flags, message = bad(tmp_path / "zoo")
    out = tmp_path / "out"
    (out / ".cache").mkdir(parents=True)
    (out / "mine.txt").write_text("kept")
    before = listing(tmp_path)
    assert main(["--dataset", str(tmp_path / "zoo"), "--output-dir", str(out), "--top-k=1", "--quick", *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert listing(tmp_path) == before


def listing(root) -> dict:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels=no/such.csv"], "--labels no/such.csv: no such file"),
        (["--label-column="], "--label-column: empty"),
        (["--group-column= "], "--group-column: empty"),
        (["--layers=a,,b"], "--layers a,,b: an empty pattern"),
        (["--layers=attn7"], "--layers attn7: 'attn7' matches none of 4 layers. The first ones are unet."),
        (["--layers=attentions.0", "--top-k=2"], "--top-k 2: these LoRAs have 2 layers that match attentions.0"),
    ],
)
def test_flags_of_labels_and_layers_are_refused_in_one_line(tmp_path, capsys, flags, words):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=3)
    assert main(["--dataset", str(root), "--output-dir", str(tmp_path / "out"), "--top-k=1", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Labels that may be one
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["anime", "Anime", " anime", "ANIME ", "animes"], [[" anime", "ANIME ", "Anime", "anime"]]),
        (
            ["line art", "line_art", "Line-Art", "line  art", "lineart"],
            [["Line-Art", "line  art", "line art", "line_art"]],
        ),
        (["-1", "1", "1.0", "+1", "01"], []),  # numbers are what they are
        (["1-2", "1 2"], [["1 2", "1-2"]]),
        (["straße", "STRASSE", "Strasse"], [["STRASSE", "Strasse", "straße"]]),
        (["e\u0301", "é", "ｅ́"], [["e\u0301", "é", "ｅ\u0301"]]),
        (["ｱﾆﾒ", "アニメ", "动漫"], [["アニメ", "ｱﾆﾒ"]]),
        (["a–b", "a-b", "a—b"], [["a-b", "a–b", "a—b"]]),
        (["", " ", "_", "-"], [["", " "]]),
        (["c++", "c", "C#", "c#"], [["C#", "c#"]]),
        ([], []),
    ],
)
def test_labels_that_differ_only_in_how_they_are_written(given, expected):
    assert labels.near_duplicates([*given, *given]) == expected


def test_similar_labels_are_classes_of_their_own_with_a_notice(tmp_path):
    rows = [
        (path, label) for path, label in zip(PATHS, ["anime", "Anime", " anime", "anime", "dog", "dog"], strict=True)
    ]
    path = table(flat_collection(tmp_path) / "metadata.csv", ["file_name", "label"], *rows)
    collection = index_collection(tmp_path)
    assert collection.classes == [" anime", "Anime", "anime", "dog"]  # nothing is changed silently
    (notice,) = (notice for notice in collection.notices if notice.kind == "similar labels")
    assert notice.message == (
        "labels that differ only in case, blanks or hyphens are read as classes of their own: ' anime' (1), 'Anime' "
        "(1), 'anime' (2). If they are one concept, write it in one way (label in metadata.csv)."
    )
    assert notice.files == ("1.safetensors", "2.safetensors") and notice.groups == (tuple(PATHS[:4]),)
    (finding,) = findings(tmp_path, strict=True)
    assert finding == f"{tmp_path / '1.safetensors'} and 1 more: {notice.message}"
    assert index_collection(tmp_path, strict=True, skip_bad=True).class_counts == {"anime": 2, "dog": 2}
    table(path, ["file_name", "label"], *rows_of(6, cats_and_dogs))
    assert not index_collection(tmp_path).notices


def test_many_similar_labels_are_one_notice_of_bounded_length(tmp_path):
    rows = [(f"{i}.safetensors", "ab"[i % 2] * 250 + f"{i // 4}" + "xX"[i // 2 % 2]) for i in range(80)]
    table(flat_collection(tmp_path, 80) / "metadata.csv", ["file_name", "label"], *rows)
    (notice,) = index_collection(tmp_path).notices
    assert len(notice.groups) == 40 and "; and 34 more such sets. If" in notice.message and len(notice.message) < 1500


# ----------------------------------------------------------------------------------------------------------------------
# Leaving out what is bad
# ----------------------------------------------------------------------------------------------------------------------


def bad_collection(root):
    """Twelve LoRAs, of which six cannot be used, each for a reason of its own; and a pickle. Path to words."""
    for i in range(12):
        write_lora(root / f"{i:02}" / FILE_NAME, lora(seed=i), {"category_label": f"c{i % 2}"})
    paths = [f"{i:02}/{FILE_NAME}" for i in range(12)]
    (root / paths[0]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    save_file({"a.hada_w1_a": torch.ones(2, 2)}, root / paths[1])
    (root / "02" / "metadata.json").write_text("{")
    (root / "03" / "metadata.json").write_text("{}")
    write_lora(root / paths[4], lora(3) | {"a.dora_scale": torch.ones(2)})
    write_lora(root / paths[5], lora(width=12))
    (root / "pickle").mkdir()
    (root / "pickle" / "x.bin").write_bytes(b"\x80")
    words = ["a Git LFS pointer", "a LoHa adapter", "metadata.json is not readable", "no label: ", "adds 2 layers"]
    return dict(zip(paths, [*words, "unet_"], strict=False)) | {"pickle/x.bin": "a pickle checkpoint"}


def test_bad_files_are_left_out_with_their_reasons(tmp_path):
    words = bad_collection(tmp_path)
    faults = findings(tmp_path)
    assert len(faults) == len(words)  # all of them refuse the collection
    collection = index_collection(tmp_path, skip_bad=True)
    assert [file.path for file in collection.files] == [f"{i:02}/{FILE_NAME}" for i in range(6, 12)]
    assert [path for path, _ in collection.skipped] == sorted(words)
    assert not collection.ignored  # as the file with a dora_scale is not in it
    for path, reason in collection.skipped:
        assert reason.startswith(words[path]) and any(words[path] in finding for finding in faults)
    check_classes(collection)


def test_a_row_for_a_missing_file_is_left_out_too(tmp_path):
    table(flat_collection(tmp_path, 6) / "metadata.csv", ["file_name", "label"], *rows_of(8, cats_and_dogs))
    assert len(findings(tmp_path)) == 2
    skipped = index_collection(tmp_path, skip_bad=True).skipped
    assert [path for path, _ in skipped] == ["6.safetensors", "7.safetensors"]


def test_what_is_wrong_with_the_whole_is_refused_all_the_same(tmp_path):
    bad_collection(tmp_path)
    for path in sorted(tmp_path.rglob("*.safetensors"))[7:]:
        path.write_bytes(b"")
    (finding,) = findings(tmp_path, skip_bad=True)
    assert "give after 12 files were left out fewer than two classes (c0: 1)" in finding
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"")
    assert len(findings(tmp_path, skip_bad=True)) > 12


def test_files_can_be_left_out_later_and_the_rest_is_the_collection_without_them(tmp_path):
    root = write_collection(tmp_path, classes=2, per_class=4)
    whole = index_collection(root)
    bad = [whole.files[i].path for i in (0, 5)]
    assert whole.y.tolist() == [0] * 4 + [1] * 4  # known before, and not to be kept
    less = data.without(whole, [(bad[1], "NaN. Train again."), (bad[0], "too old."), (bad[0], "another reason.")])
    assert less.skipped == ((bad[0], "too old."), (bad[1], "NaN. Train again."))
    assert less.y.tolist() == [0] * 3 + [1] * 3 and less.class_counts == {"class_0": 3, "class_1": 3}
    assert data.without(less, [(less.files[0].path, "x.")]).skipped[:2] == less.skipped
    with pytest.raises(CollectionError) as error:
        data.without(less, [(file.path, "bad.") for file in less.files])
    assert error.value.findings[0] == f"{root / less.files[0].path}: bad."


def test_names_that_no_file_can_hold_are_escaped_where_they_are_listed(tmp_path):
    table(flat_collection(tmp_path) / "metadata.jsonl", ["file_name", "label"], *rows_of(6, cats_and_dogs))
    (tmp_path / os.fsdecode(b"\xff\n.safetensors")).write_bytes(b"")
    ((path, reason),) = index_collection(tmp_path, skip_bad=True).skipped
    assert path == "\\udcff\\n.safetensors" and json.dumps([path, reason], ensure_ascii=False).encode()


# ----------------------------------------------------------------------------------------------------------------------
# Groups
# ----------------------------------------------------------------------------------------------------------------------


def test_groups_that_cannot_be_parted_are_refused(tmp_path):
    """Each class has three groups, but every split leaves a part without one."""
    groups = ["A"] * 2 + ["B"] * 2 + ["C"] * 1 + ["D"] * 3
    labels_of = ["x", "y", "x", "z", "x", "y", "z", "y"]
    rows = rows_of(8, lambda i: labels_of[i], lambda i: groups[i])
    table(flat_collection(tmp_path, 8) / "metadata.csv", ["file_name", "label", "owner"], *rows)
    collection = index_collection(tmp_path, group_column="owner")
    with pytest.raises(CollectionError) as error:
        split_collection(collection, 0)
    message = "groups by owner: no split of the 4 groups was found that has every class in each part"
    assert error.value.findings == [f"{tmp_path}: {message}. Group by another column, or leave out --group-column."]


def test_groups_come_from_the_table_or_from_metadata_beside(tmp_path):
    metadata_collection(tmp_path)
    assert index_collection(tmp_path, group_column="num_images").groups.tolist() == [0, 1] * 6
    rows = [(f"{i:02}", "x", f"owner {i % 3}") for i in range(12)]
    table(tmp_path / "metadata.csv", ["file_name", "label", "owner"], *rows)
    assert index_collection(tmp_path, group_column="owner").groups.tolist() == [0, 1, 2] * 4
    assert index_collection(tmp_path, group_column="num_images").groups.tolist() == [0, 1] * 6
    assert index_collection(tmp_path).groups is None


# ----------------------------------------------------------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------------------------------------------------------


def two_styles(tmp_path):
    """One network of 2 x 2 modules as diffusers and as kohya write it, a collection each."""
    modules = [f"unet.mid_block.attentions.0.transformer_blocks.{b}.attn2.to_{p}" for b in (0, 1) for p in "qv"]
    for i in range(3):
        for style in ("diffusers", "kohya"):
            tensors = {}
            for module in modules:
                name = f"lora_{module.replace('.', '_')}.lora_" if style == "kohya" else f"{module}.lora."
                tensors[f"{name}down.weight"], tensors[f"{name}up.weight"] = torch.ones(2, 6), torch.ones(6, 2)
            write_lora(tmp_path / style / "a" / f"{i}.safetensors", tensors)
    return [index_collection(tmp_path / style) for style in ("diffusers", "kohya")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("attn2", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("*.to_v.*", [2, 3, 6, 7]),
        ("*_to_v", [2, 3, 6, 7]),
        ("to_v", [2, 3, 6, 7]),
        ("transformer_blocks.1", [4, 5, 6, 7]),
        ("*transformer_blocks_?_attn2_to_q_up", [1, 5]),
        ("*_up", [1, 3, 5, 7]),
        ("to_q_down, blocks.0.attn2.to_v", [0, 2, 3, 4]),
    ],
)
def test_layers_are_chosen_by_name_whatever_wrote_the_files(tmp_path, pattern, expected):
    for collection in two_styles(tmp_path):
        selected = select_layers(collection, pattern)
        assert selected.dtype == bool and np.flatnonzero(selected).tolist() == expected


def test_layers_are_chosen_by_shown_names_too(tmp_path):
    diffusers, kohya = two_styles(tmp_path)
    assert np.flatnonzero(select_layers(diffusers, "*.lora.up.weight")).tolist() == [1, 3, 5, 7]
    with pytest.raises(CollectionError, match=r"--layers .*matches none of 8 layers\. The first ones are lora_"):
        select_layers(kohya, "*.lora.up.weight")


@pytest.mark.parametrize("pattern", ["attn1", "attn2,attn1", "to_V", "attn2.*", "[", "to_v.*"])
def test_a_pattern_without_a_layer_is_refused_with_some_that_are_there(tmp_path, pattern):
    for collection in two_styles(tmp_path):
        with pytest.raises(CollectionError) as error:
            select_layers(collection, pattern)
        (finding,) = error.value.findings
        assert finding.startswith(f"--layers {pattern}: {pattern.split(',')[-1]!r} matches none of 8 layers.")
        assert finding.endswith(f"{collection.layers[2].name}.")


# ----------------------------------------------------------------------------------------------------------------------
# inspect, and the results
# ----------------------------------------------------------------------------------------------------------------------


def test_inspect_lists_the_columns_that_could_be_the_label(tmp_path, capsys):
    metadata_collection(tmp_path)
    assert data.main(["inspect", str(tmp_path), "--top-k=1"]) == 0
    out = capsys.readouterr().out
    assert "columns: category_label (3), num_images (2), name (12) (number of values)\n" in out
    assert "would make classes (--label-column): num_images\n" in out
    assert data.main(["inspect", str(tmp_path), "--top-k=1", "--label-column=num_images", "--json"]) == 0
    contents = json.loads(capsys.readouterr().out)
    assert contents["columns"] == {"category_label": 3, "num_images": 2, "name": 12}
    assert contents["classes"] == {"4": 6, "5": 6} and contents["label_column"] == "num_images"
    assert contents["group_column"] is None and contents["num_groups"] is None and "groups:" not in out
    assert data.main(["inspect", str(tmp_path), "--top-k=1", "--group-column=num_images"]) == 2
    captured = capsys.readouterr()
    assert "groups:  2 by num_images" in captured.out and "fewer than three groups" in captured.err


def test_inspect_takes_labels_skip_bad_and_layers(tmp_path, capsys):
    root = write_collection(tmp_path / "zoo", per_class=4)
    (root / "class_0" / "0001" / FILE_NAME).write_bytes(b"")
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.safetensors"))
    mine = table(
        tmp_path / "mine.csv", ["file_name", "concept"], *[(path, f"c{i % 2}") for i, path in enumerate(paths)]
    )
    flags = ["inspect", str(root), f"--labels={mine}", "--skip-bad", "--layers=attentions.1", "--top-k=1"]
    assert data.main([*flags, "--json"]) == 0
    contents = json.loads(capsys.readouterr().out)
    assert contents["label_source"] == "concept in mine.csv" and contents["classes"] == {"c0": 4, "c1": 3}
    assert [entry["path"] for entry in contents["skipped"]] == [f"class_0/0001/{FILE_NAME}"]
    assert contents["layers_selected"] == [2, 3] and len(contents["layers"]) == 4
    assert data.main([*flags, "--all"]) == 0
    out = capsys.readouterr().out
    assert "7 LoRAs of 4 layers, 2 of them chosen by --layers; labels from concept in mine.csv" in out
    shown = f"2  down           2x8  {module_names(2)[1]}.lora.down.weight"
    assert shown in out and module_names(2)[0] not in out
    assert f"skipped: class_0/0001/{FILE_NAME}: incomplete download" in out
    assert data.main(["inspect", str(root), "--top-k=1", "--skip-bad", "--layers=attn7"]) == 2
    assert capsys.readouterr().err.startswith("error: --layers attn7: 'attn7' matches none of 4 layers.")


NETWORKS = Networks(classifier=(16, 16, 16))


def test_results_tell_labels_groups_and_what_was_left_out(tmp_path, capsys):
    root = metadata_collection(tmp_path / "zoo", 24)
    for i in range(24):
        (root / f"{i:02}" / "metadata.json").write_text(json.dumps({"kind": "Aa"[i % 2], "owner": f"o{i // 3}"}))
    (root / "03" / FILE_NAME).write_bytes(b"<!DOCTYPE html>")
    flags = ["--dataset", str(root), "--output-dir", str(tmp_path / "out"), "--top-k=1", "--quick", "--device=cpu"]
    flags += ["--representations=stats", "--label-column=kind", "--group-column=owner", "--skip-bad"]
    assert main(flags, NETWORKS) == 0
    out = capsys.readouterr().out
    assert "skipped   1 file left out, as --skip-bad asks" in out and "8 groups by owner, each in one part" in out
    folder = tmp_path / "out" / "ablation_zoo"
    dataset = json.loads((folder / "results.json").read_text())["dataset"]
    assert dataset["label_source"] == "kind in metadata.json" and dataset["classes"] == ["A", "a"]
    assert [finding["kind"] for finding in dataset["findings"]] == ["similar labels"]
    assert "note      labels that differ only in case" in out
    assert (dataset["label_column"], dataset["group_column"], dataset["num_groups"]) == ("kind", "owner", 8)
    ((path, reason),) = ((entry["path"], entry["reason"]) for entry in dataset["skipped"])
    assert path == f"03/{FILE_NAME}" and reason.startswith("a web page saved as weights")
    text = (folder / "results.txt").read_text()
    assert "labels that differ only in case, blanks or hyphens are read as classes" in text
    assert "1 file left out" in text and "8 groups by owner" in text
    rows = list(csv.DictReader((folder / "samples.csv").open()))
    assert list(rows[0]) == ["file", "label", "split", "group"] and len(rows) == 23
    parts = {group: {row["split"] for row in rows if row["group"] == group} for group in {r["group"] for r in rows}}
    assert len(parts) == 8 and all(len(split) == 1 for split in parts.values())
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    assert main(flags, NETWORKS) == 0
    assert "Nothing to do" in capsys.readouterr().out
    # The same contents and labels in other groups are another split, and other results.
    for i in range(24):
        (root / f"{i:02}" / "metadata.json").write_text(json.dumps({"kind": "Aa"[i % 2], "owner": f"o{i % 12 // 2}"}))
    assert main(flags, NETWORKS) == 0
    assert "Nothing to do" not in capsys.readouterr().out


def test_a_group_column_never_makes_another_column_the_label(tmp_path, capsys):
    """``label`` is the label also where it is asked for as the group, which is refused as such."""
    root = tmp_path / "zoo"
    write_collection(root, classes=2, per_class=6)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.safetensors"))
    rows = [f"{name},{name[6]},{'AB'[i % 2]}" for i, name in enumerate(names)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label,artist", *rows]))
    arguments = ["--dataset", str(root), "--output-dir", str(tmp_path / "out"), "--group-column=label"]
    assert main(arguments) == 2
    assert "label gives a class with fewer than three groups (0: 1, 1: 1)" in capsys.readouterr().err


def test_the_values_beside_the_weights_by_file(tmp_path):
    """Those of a table go before those of metadata.json; lists, nothing and captions are none."""
    root = metadata_collection(tmp_path / "zoo", count=4)
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.safetensors"))
    for i, path in enumerate(paths):
        beside = root / path
        fields = {"steps": 10 * i, "artist": f"a{i % 2}", "tags": ["x"], "caption": 201 * "y", "note": None}
        (beside.parent / "metadata.json").write_text(json.dumps(fields))
    path = table(tmp_path / "labels.csv", ["file_name", "label", "steps"], *[[path, "c", 7] for path in paths[:3]])
    named = label_tables.open_table(path, set(paths))
    values = labels.values_by_file(root, paths, None, Counter())
    assert list(values) == ["artist", "steps"] and values["steps"] == {p: str(10 * i) for i, p in enumerate(paths)}
    values = labels.values_by_file(root, paths, named, Counter())
    assert list(values) == ["artist", "label", "steps"] and values["steps"] == dict.fromkeys(paths[:3], "7")
    (root / paths[0]).parent.joinpath("metadata.json").write_text("{broken")
    ignored = Counter(pickles=2)
    for _ in range(2):  # a collection that lost files reads them again
        assert paths[0] not in labels.values_by_file(root, paths, named, ignored)["artist"]
        assert ignored == {"pickles": 2, "metadata.json that cannot be read": 1}
