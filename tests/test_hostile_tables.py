"""Thousands of tables of labels by a grammar: each is refused in words, or read as a slow reader of simple rules does.

``pytest -m slow tests/test_hostile_tables.py`` tries 30,000, the default run a fiftieth.
"""

import csv
import io
import json
import math
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from limits import peak_of_memory
from making import write_lora

from data import CollectionError, check_classes, index_collection
from experiment.contents import contents_of

MOST_SECONDS, MOST_MEMORY = 2.0, 2**30
FILES = [
    *(f"cat/{number:02}.safetensors" for number in range(4)),
    *(f"dog/{number:02}/pytorch_lora_weights.safetensors" for number in range(3)),
    *("dog/a b.safetensors", "größe/é, 'x'.safetensors", "größe/日本.safetensors", "CON.safetensors"),
]


# ----------------------------------------------------------------------------------------------------------------------
# The grammar
# ----------------------------------------------------------------------------------------------------------------------

ODD_TEXTS = [
    *("", " ", "\t", "NaN", "None", "null", "0", "-1", "1e300", "1e999", "Infinity", "=1+1", "@x", "+", '"', "'", '""'),
    *("\x00", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u2029", "\u202eevil", "\u2066x\u2069", "\u200f", "\ufeff", "a\nb"),
    *("\ud800", "\udfff\ud800", "\U0001f600", "é", "e\u0301", "ａ", "a,b", "a;b", "a\tb", "x" * 300, "x" * 200_000),
    *(
        "error: /etc/passwd: gone. Start again.",
        "{0}",
        "%s",
        "<b>",
        "../..",
        "C:\\x",
        "cat\\",
        "\\\\host\\share",
        "/etc",
    ),
]
ODD_VALUES = [
    *(None, True, False, 0, -1, 1.5, 1e300, 10**400, 2**63, [], {}, [1], {"a": 1}, [["x"]], "NaN"),
    *(math.nan, math.inf, -math.inf, 1e-320, -0.0),
]
ODD_PATHS = [
    *("/etc/passwd", "/cat/00.safetensors", "../zoo/cat/00.safetensors", "cat/../cat/00.safetensors", "cat/.."),
    *("C:\\zoo\\cat\\00.safetensors", "c:cat/00.safetensors", "\\\\host\\zoo\\00.safetensors", "\\cat\\00.safetensors"),
    *("https://x/cat/00.safetensors", "file:///cat/00.safetensors", "cat", "dog", ".", "./", "~/cat/00.safetensors"),
    *("cat/00.safetensors/", "CAT/00.SAFETENSORS", "cat/00", "dog/00", "cat//00.safetensors", "cat/00.safetensors\x00"),
    *("cat\\..\\cat\\00.safetensors", "nul", "größe/é", "cat/00.safetensors ", "\u202ecat/00.safetensors", "x" * 5000),
]


@dataclass(frozen=True)
class Table:
    """A table as bytes, the arguments that it is read with, and whether nothing is wrong with it."""

    name: str
    contents: bytes
    sound: bool
    arguments: dict


def sound_rows(draw: random.Random) -> list[dict]:
    """A row for each file, with labels of one of the forms that people use."""
    label = draw.choice(["label", "label", "category_label", "concept"])
    labels = draw.choice(
        [["cat", "dog"], ["Größe 1", "日本", "a, b"], ["1", "2"], ["'quoted'", 'say "x"'], ["01", "1.0"]]
    )
    path_of = draw.choice(
        [
            *(str, str, lambda path: f"./{path}", lambda path: path.replace("/", "\\")),
            *(lambda path: path.replace("/", "//"), lambda path: path.removesuffix(".safetensors")),
        ]
    )
    names = draw.choice(["file_name", "file_name", "file_name", "Path", "File Name", "lora"])
    if draw.random() < 0.2:  # a LoRA's folder stands for its file
        path_of = lambda path: str(Path(path).parent) if "pytorch" in path else path  # noqa: E731
    rows = [{names: path_of(path), label: labels[i % len(labels)]} for i, path in enumerate(FILES)]
    if draw.random() < 0.5:
        for i, row in enumerate(rows):
            row["artist"] = f"artist {i // 2}"
            row["caption"] = draw.choice(["a photo", 'a "photo",\nof two lines', "y" * 500])
    if label == "concept":
        rows = [{names: row[names], "concept": row["concept"]} for row in rows]
    draw.shuffle(rows)
    return rows


def spoil_rows(draw: random.Random, rows: list[dict], values: bool) -> None:
    """Change one thing: a cell, a path, a row twice or missing, a column's name, a column more in one row."""
    row, other = draw.choice(rows), draw.choice(rows)
    columns = list(row) or [""]
    odd = draw.choice([*ODD_TEXTS, *ODD_VALUES] if values else ODD_TEXTS)
    kind = draw.randrange(8)
    names = next((name for name in columns if name in ("Path", "File Name", "lora")), "file_name")
    if kind == 0:
        row[draw.choice(columns)] = odd
    elif kind == 1:
        row[names] = draw.choice([*ODD_PATHS, other.get(names), odd])
    elif kind == 2:
        rows.insert(draw.randrange(len(rows)), dict(other))
    elif kind == 3:
        rows.remove(row)
    elif kind == 4:
        name, new = draw.choice(columns), draw.choice([*ODD_TEXTS, *columns, "File_Name", " file_name", "label", "0"])
        for each in rows if draw.random() < 0.7 else [row]:
            if name in each:
                each[new] = each.pop(name)
    elif kind == 5:
        row[draw.choice(ODD_TEXTS)] = odd
    elif kind == 6:
        row.pop(draw.choice(columns), None)
    else:
        name = draw.choice(columns)
        for each in rows:
            each[name] = odd
    if not rows:
        rows.append({})


def as_csv(draw: random.Random, rows: list[dict], sound: bool) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    ends = draw.choice(["\n", "\r\n", "\r"])
    quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(
        text, lineterminator=ends, quoting=quoting, delimiter=draw.choice(",,,,,,,;\t" if sound else ",,,,,,,,,;\t|")
    )
    cells = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    if draw.random() < 0.2:  # a data frame's row numbers
        cells = [["", *cells[0]], *([number, *row] for number, row in enumerate(cells[1:]))]
    if not sound and draw.random() < 0.1:  # ragged
        ragged = draw.choice(cells)
        draw.choice([lambda: ragged.append("x"), ragged.clear, lambda: ragged.insert(0, "")])()
    for row in cells:
        try:
            writer.writerow(row)
        except csv.Error:  # the csv module cannot write it
            writer.writerow([""])
    return text.getvalue() + draw.choice(["", "", ends, ends * 3])


def as_jsonl(draw: random.Random, rows: list[dict], sound: bool) -> str:
    ends, plain = draw.choice(["\n", "\r\n", "\n\n"]), draw.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=plain) for row in rows]
    if not sound and draw.random() < 0.3:
        at, deep = draw.randrange(len(lines)), draw.choice([20, 500, 5_000, 100_000])
        line = lines[at]
        lines[at] = draw.choice(
            [
                *("[]", "null", "1", '"x"', "{}", "{", "}{", "NaN", line[:-1], line + line, line[1:], f"[{line}]"),
                *('{"file_name":' + "[" * deep + "]" * deep + "}", '{"a":' * deep + "1" + "}" * deep),
                *(line[:-1] + ',"label":"cat","label":"dog"}', line[:-1] + ',"file_name":"cat/00.safetensors"}'),
                *(line[:-1] + ',"label":' + "9" * 5000 + "}", line.replace('": "', '": "\\ud800', 1), "\x00", "//x"),
            ]
        )
    return ends.join(lines) + draw.choice(["", ends])


def spoil_bytes(draw: random.Random, contents: bytes) -> bytes:
    """Change some bytes: flipped, cut, put in, of another line's end, or of a file of another kind."""
    changed = bytearray(contents or b"x")
    at = draw.randrange(len(changed))
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at:at] = draw.choice(
            [b"\x00", b"\xff", b'"', b"\r", b"\n", b"\x1a", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\x80", b",", b"\\"]
        )
    elif kind == 3:
        changed[at : at + draw.randint(1, 60)] = draw.randbytes(draw.randint(0, 20))
    elif kind == 4:
        return bytes(changed).replace(b"\n", draw.choice([b"\r", b"\n\r", b"\x0b", b"\xe2\x80\xa8", b"\x85", b""]))
    else:
        return draw.choice(
            [b"", b"\n" * 50, b"PK\x03\x04" + contents, b"PAR1" + contents, b"<!DOCTYPE html>", b"\x00" * 99]
        )
    return bytes(changed)


ENCODINGS = [*["utf-8"] * 12, "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "shift-jis", "utf-7"]


def table(draw: random.Random) -> Table:
    """A table, in a third of the cases as it should be."""
    rows, sound = sound_rows(draw), draw.random() < 1 / 3
    ending = draw.choice(["csv", "jsonl"])
    for _ in range(0 if sound else draw.choice([0, 1, 1, 1, 2])):
        spoil_rows(draw, rows, values=ending == "jsonl")
    text = (as_csv if ending == "csv" else as_jsonl)(draw, rows, sound)
    encoding = draw.choice(["utf-8", "utf-8-sig"] if sound else ENCODINGS)
    contents = text.encode(encoding, "replace" if encoding[:3] in ("cp1", "shi") else "surrogatepass")
    if not sound and draw.random() < 0.2:
        contents = spoil_bytes(draw, contents)
    arguments = {"label_column": None, "group_column": None, "skip_bad": False}
    if all("artist" in row for row in rows) and draw.random() < 0.5:
        arguments["group_column"] = "artist"
    if not sound:
        arguments["skip_bad"] = draw.random() < 0.7
        arguments["label_column"] = draw.choice([*[None] * 12, "label", "artist", "\u202e", "file_name"])
    return Table(f"{'LABELS' if draw.random() < 0.1 else 'labels'}.{ending}", contents, sound, arguments)


# ----------------------------------------------------------------------------------------------------------------------
# The slow reader
# ----------------------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A table that is not to be read."""


def slow_rows(name: str, contents: bytes) -> list[dict]:
    """The rows of UTF-8, or UTF-16 that says so, its cells separated by whatever makes the name of the files one."""
    try:
        text = contents.decode("utf-16" if contents[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise Refused("not objects")
            return [escaped(row) for row in rows]
        firsts = {cut: next(csv.reader(io.StringIO(text, newline=""), delimiter=cut), []) for cut in ",;\t"}
        tests = (lambda name: name.strip().lower() == "file_name", lambda name: slow_key(name) in FILE_KEYS)
        cuts = [cut for test in tests for cut, first in firsts.items() if any(map(test, first))]
        separator = [*cuts, ","][0]
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header, *lines = list(rows) or [[]]
    except (ValueError, RecursionError, csv.Error) as error:
        raise Refused from error
    header, lines = [name.strip() for name in header], [line for line in lines if any(line)]
    if max(Counter(name for name in header if name).values(), default=0) > 1:
        raise Refused("a column twice")
    if any(len(line) < len(header) or any(line[len(header) :]) for line in lines):
        raise Refused("ragged")
    return [{name: cell for name, cell in zip(header, line, strict=False) if name} for line in lines]


def escaped(value: object) -> object:
    """A JSON value with lone surrogates, which no file can hold, written out."""
    if isinstance(value, dict):
        return {escaped(name): escaped(item) for name, item in value.items()}
    return shown(value, "[\ud800-\udfff]") if isinstance(value, str) else value


def shown(text: str, letters: str = r"[\s\S]") -> str:
    """A text in which those of some letters that do not print are written out."""
    return re.sub(letters, lambda m: m[0] if m[0].isprintable() else ascii(m[0])[1:-1], text)


def slow_text(value: object) -> str | None:
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return None


def slow_path(name: object) -> str | None:
    """The file that a name means; None where it means none."""
    if not isinstance(name, str) or not name.strip():
        raise Refused("no name")
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "://" in name:
        raise Refused("a path elsewhere")
    path = "/".join(parts)
    if path in FILES:
        return path
    if f"{path}.safetensors" in FILES:
        return f"{path}.safetensors"
    inside = [file for file in FILES if file.startswith(f"{path}/")]  # the folder of one LoRA
    return inside[0] if len(inside) == 1 else None


FILE_KEYS = ["filename", "file", "filepath", "path", "name", "lora", "loraname", "model", "modelname"]


def slow_key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if not letter.isspace() and letter not in "-_")


def all_named(rows: list[dict]) -> list[dict]:
    """Rows in which the column of the files is called file_name: in any case, or else by the first other name."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if any(name.strip().lower() == "file_name" for name in columns):
        return [named(row, "file_name") for row in rows]
    others = [name for key in FILE_KEYS for name in columns if slow_key(name) == key]
    assert len(others) < 2, "the grammar has one"
    return [named(row, others[0]) for row in rows] if others else rows


def named(row: dict, column: str) -> dict:
    """A row in which a column, in whatever case it is there first, is called file_name."""
    alike = column if column in row else next((name for name in row if name.strip().lower() == column.lower()), None)
    if alike is None or "file_name" in row:
        return row
    return {"file_name" if name == alike else name: value for name, value in row.items()}


def slow_values(made: Table) -> tuple[dict, str]:
    """Each file's texts by column, and the column of the label."""
    rows = all_named(slow_rows(made.name, made.contents))
    columns = {name for row in rows for name in row} - {"file_name"}
    if not all(name.isprintable() and len(name) < 256 for name in columns):
        raise Refused("a column whose name is none")
    column = made.arguments["label_column"] or next((n for n in ("category_label", "label") if n in columns), None)
    if column is None:
        columns -= {made.arguments["group_column"]}
        if len(columns) != 1:
            raise Refused("no label")
        (column,) = columns
    values: dict[str, dict] = {}
    for row in rows:
        path = slow_path(row.get("file_name"))
        if path in values:
            raise Refused("a file twice")
        if path is None and not made.arguments["skip_bad"]:
            raise Refused("no such file")
        if path is not None:
            texts = {name: slow_text(value) for name, value in row.items() if name != "file_name"}
            values[path] = {name: text for name, text in texts.items() if text is not None}
    return values, column


# ----------------------------------------------------------------------------------------------------------------------
# The program's reader
# ----------------------------------------------------------------------------------------------------------------------


def check_words(message: str) -> None:
    assert message.isprintable() and len(message) < 10_000, ascii(message[:300])
    assert re.match(r"\S.*: .*\. [A-Z`-].*[.)]$", message), message


def read(root: Path, made: Table) -> str:
    """Read a collection with this table: "refused" or "accepted", anything else is an error."""
    path = root.parent / made.name
    path.write_bytes(made.contents)
    try:
        collection = index_collection(root, labels=path, **made.arguments)
    except CollectionError as error:
        assert not made.sound, error
        for finding in error.findings:
            check_words(finding)
        return "refused"
    values, column = slow_values(made)
    group = made.arguments["group_column"]
    for file in collection.files:
        assert file.label == values[file.path][column]
        assert file.label.isprintable() and len(file.label) < 256
        assert group is None or file.group == values[file.path][group]
    assert len(collection.files) + len(collection.skipped) == len(FILES) or made.arguments["skip_bad"]
    for skipped, reason in collection.skipped:
        assert skipped.isprintable() and reason.isprintable()
        names = [values.get(skipped, {}).get(name, "\n") for name in (column, group) if name]
        assert not all(name.isprintable() and len(name) < 256 for name in names), (skipped, reason)
    check_columns(collection, values)
    try:
        check_classes(collection)
    except CollectionError as error:
        assert not made.sound
        assert all(finding.isprintable() for finding in error.findings)
    return "accepted"


def check_columns(collection, values: dict[str, dict]) -> None:
    """Compare what else the table says of the files with what the slow reader reads."""
    json.dumps(contents_of(collection, np.ones(len(collection.layers), bool)))
    used = {file.path for file in collection.files}
    for name, of_files in collection.columns.items():
        assert name.isprintable()
        texts = {path: row[name] for path, row in values.items() if path in used and name in row}
        assert of_files == {path: shown(text) for path, text in texts.items() if len(text) <= 200}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tables") / "zoo"
    for file in FILES:
        write_lora(root / file, {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)})
    return root


@pytest.mark.parametrize(
    "count", [pytest.param(600, id="600"), pytest.param(30_000, id="30,000", marks=pytest.mark.slow)]
)
def test_a_table_is_refused_in_words_or_read_as_a_slow_reader_reads_it(zoo, capsys, count):
    draw, outcomes, slowest = random.Random(count), Counter(), 0.0
    with peak_of_memory() as added:
        for _ in range(count):
            made = table(draw)
            start = time.perf_counter()
            outcomes[read(zoo, made), made.sound] += 1
            slowest = max(slowest, time.perf_counter() - start)
            assert slowest < MOST_SECONDS, made.contents[:2000]
    with capsys.disabled():
        refused, accepted = outcomes["refused", False], outcomes["accepted", False]
        print(
            f"\n{count} tables: {outcomes['accepted', True]} sound ones are read; of the others {refused} are refused"
        )
        print(
            f"and {accepted} read as a slow reader reads them; the slowest {slowest:.2f} s, {added.mebibytes:.0f} MiB"
        )
    assert added.bytes < MOST_MEMORY
    assert min(refused, accepted) > count // 30
