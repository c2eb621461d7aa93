"""Files beside the weights: whatever lies there is read in bounds, or refused in words."""

import json
import os
import socket

import pytest
from making import FILE_NAME, lora, write_collection, write_lora

import ablation_experiment
import data
from data import CollectionError, index_collection
from experiment import datasets
from loras import building, digits_zoo, small_files

WHOLE = b'{"lora_alpha": 8, "r": 2, "note": "x"}'


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def endless(path):
    path.symlink_to("/proc/self/fd/0")


def folder(path):
    path.mkdir()


def unix_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # such names are short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def contents(data):
    def spoil(path):
        path.write_bytes(data)

    return spoil


SPOILED = {
    "pipe": (pipe, "not a plain file"),
    "device": (device, "not a plain file"),
    "socket": (unix_socket, "No such device or address"),
    "folder": (folder, "Is a directory"),
    "link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "megabytes": (contents(b" " * 2**21), "2097152 bytes, more than 1048576"),
    "deep lists": (contents(b"[" * 10**5), "nested too deeply"),
    "deep objects": (contents(b'{"a":' * 10**5), "nested too deeply"),
    "101 lists": (contents(b'{"a":' + b"[" * 101 + b"]" * 101 + b"}"), "nested too deeply"),
    "a huge integer": (contents(b'{"a": 1' + b"0" * 5000 + b"}"), "Exceeds the limit (4300 digits)"),
    "Windows-1252": (contents('{"a": "ä"}'.encode("cp1252")), "not UTF-8: byte 0xe4 in line 1, in CP1252 'ä'"),
    "UTF-16 without a mark": (contents(WHOLE.decode().encode("utf-16-le")), "holds NUL bytes: UTF-16 without"),
    "half a file": (contents(WHOLE[:-1]), "Expecting ',' delimiter"),
}


@pytest.mark.parametrize("name", ["metadata.json", "adapter_config.json"])
@pytest.mark.parametrize("case", SPOILED)
def test_what_cannot_be_read_is_a_finding_of_its_lora(tmp_path, name, case):
    spoil, words = SPOILED[case]
    path = write_collection(tmp_path) / "class_0" / "0000" / name
    spoil(path)
    with pytest.raises(CollectionError) as error:
        index_collection(tmp_path)
    (finding,) = error.value.findings
    place = path if name == "metadata.json" else path.with_name(FILE_NAME)
    assert finding.startswith(f"{place}: {name} is not readable as JSON ({words}") and finding.endswith(
        "Mend or remove it."
    )
    assert len(index_collection(tmp_path, skip_bad=True).files) == 5


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        b"\xef\xbb\xbf" + WHOLE,
        WHOLE.decode().encode("utf-16"),
        WHOLE[:-1] + b', "a": NaN, "b": -Infinity, "c": 1e300, "d": 1e999, "e": 1' + b"0" * 4000 + b"}",
        WHOLE[:-1] + b', "a": ' + b"[" * 50 + b"]" * 50 + b"}",
        WHOLE[:-1] + b', "\\ud800": "\\udfff", "b": ["\\ud83d\\ude00"]}',
    ],
)
def test_odd_contents_that_are_no_fault(tmp_path, text):
    path = write_collection(tmp_path) / "class_0" / "0000" / "metadata.json"
    path.write_bytes(text)
    path.with_name("adapter_config.json").write_bytes(text)
    collection = index_collection(tmp_path)
    assert collection.files[0].scales[0].scale.value == 4.0
    assert collection.columns["lora_alpha"] == {collection.files[0].path: "8"}
    json.dumps([collection.columns, str(collection.files[0].adapter_config)], ensure_ascii=False).encode()


def test_surrogates_without_a_partner_are_escaped():
    text = r'{"\ud800": ["\udfff x", "\ud83d\ude00"], "n": 1}'
    assert small_files.parse_object(text) == {"\\ud800": ["\\udfff x", "\U0001f600"], "n": 1}


def test_a_file_that_grows_is_bounded_too(tmp_path):
    """As those of /proc, whose size is 0 whatever they hold."""
    with pytest.raises(ValueError, match="more than 10 bytes"):
        small_files.read_bytes("/proc/self/status", 10)
    assert small_files.read_bytes("/proc/self/status", 10**6).startswith(b"Name:")


# ----------------------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [pipe, device, contents(b"[" * 10**6), contents(b"{"), contents(b"\xff")])
def test_a_strangers_record_is_none(tmp_path, spoil):
    spoil(tmp_path / "recipe.json")
    assert building.read_object(tmp_path / "recipe.json") is None
    assert not digits_zoo.is_built_here(tmp_path)


def test_only_what_lies_in_the_programs_own_place_is_built_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, other = datasets.BUILT_IN / "small", tmp_path / "small"
    for place in (own, other, tmp_path / "data" / "1k"):
        write_collection(place)
        (place / "recipe.json").write_text('{"built_by": "digits_zoo"}')
    assert datasets.is_built_in(own) and datasets.is_built_in(own.absolute())
    assert not datasets.is_built_in(other)
    assert not datasets.is_built_in(tmp_path / "data" / "1k")
    (own / "recipe.json").unlink()
    assert not datasets.is_built_in(own)


def test_a_record_of_results_that_is_none_is_no_reason_to_wait(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    assert ablation_experiment.finished_results(tmp_path, {}) is None
    os.unlink(tmp_path / "results.json")
    for text in ("[" * 10**5, "[]", "{}", '{"dataset": [], "config": 1}', '{"dataset": {}, "config": {}}'):
        (tmp_path / "results.json").write_text(text)
        assert ablation_experiment.finished_results(tmp_path, {"dataset": {}, "config": {}}) is None


# ----------------------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------------------


def test_folders_in_folders_are_read_to_a_depth(tmp_path, capsys):
    root = write_collection(tmp_path / "zoo")
    (root / "class_0" / "/".join("d" * 100)).mkdir(parents=True)
    assert data.main(["inspect", str(root), "--top-k=1", "--headers-only"]) == 0
    assert "folders deeper than 32 levels (1)" in capsys.readouterr().out


def test_names_that_are_too_long_together_are_a_finding(tmp_path):
    root = write_collection(tmp_path / "zoo")
    here = os.getcwd()
    os.chdir(root / "class_0")
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    os.chdir(here)
    with pytest.raises(CollectionError) as error:
        index_collection(root)
    assert error.value.findings[0].endswith("cannot be listed (File name too long). Shorten the names of its folders.")
    assert len(index_collection(root, skip_bad=True).files) == 6


def test_a_file_that_vanishes_is_a_finding(tmp_path, monkeypatch):
    paths = sorted(write_collection(tmp_path).rglob("*.safetensors"))
    read = data.lora_files.read_header

    def remove(path):
        paths[3].unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(data.lora_files, "read_header", remove)
    with pytest.raises(CollectionError) as error:
        index_collection(tmp_path)
    assert error.value.findings == [
        f"{paths[3]}: cannot be read (No such file or directory). Mend that, or leave it out."
    ]


@pytest.mark.slow
def test_numbers_and_texts_of_strangers_do_not_end_a_run(tmp_path):
    """Columns of 1e300, 10**300, NaN and lone surrogates, with an analysis: once they ended it after all training."""
    root = tmp_path / "zoo"
    for c in range(2):
        for i in range(12):
            number = 12 * c + i
            fields = {"a": 1e300 * (number + 1), "b": 10**300 + number, "c": float("nan"), "d": i % 5 * 1e38}
            fields |= {"e": f"x\n\u202e{i % 4}", "f": f"1e{300 + i}", "artist": f"\ud800{i % 6}{c}"}
            path = write_lora(root / f"class_{c}" / f"{i}" / FILE_NAME, lora(seed=number), fields)
            config = {"r": 2, "lora_alpha": 4, "x": 10**1000 + i % 2, "y": 1e308 * (1 + i % 2), "z": f"\ud800{i % 3}"}
            (path.parent / "adapter_config.json").write_text(json.dumps(config))
    flags = ["--dataset", str(root), "--output-dir", str(tmp_path / "out"), "--top-k=1", "--quick", "--device=cpu"]
    flags += ["--representations=stats", "--num-runs=1", "--controls=basic"]
    assert ablation_experiment.main(flags, ablation_experiment.Networks(classifier=(32, 32, 32))) == 0
