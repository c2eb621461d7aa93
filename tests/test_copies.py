import hashlib

import numpy as np
import pytest
import torch
from making import STYLES, lora, module_names, write_lora
from safetensors.torch import load_file, save_file

from loras import copies, lora_files
from loras.copies import find_copies, find_epochs, joined, session_id, twin_notices
from loras.weight_checks import check_weights


def groups_of(root):
    """Groups of copies below a folder, by file name, as an inspection of it finds them; and the rows that were read."""
    paths = sorted(root.rglob("*.safetensors"))
    headers = [lora_files.parse_header(lora_files.read_header(path)) for path in paths]
    checked = [check_weights(path, header) for path, header in zip(paths, headers, strict=True)]
    rows_read = []

    def read(row):
        rows_read.append(row)
        return lora_files.read_weights(paths[row], headers[row]).weights

    sizes = np.stack([entry.sizes for entry in checked])
    found = find_copies([entry.digest for entry in checked], sizes, [header.layout for header in headers], read)
    return [[paths[row].stem for row in group] for group in found], rows_read


def others(root, count=6, **shape):
    for i in range(count):
        write_lora(root / f"other{i}.safetensors", lora(seed=100 + i, **shape))


def in_style(tensors, style):
    return {
        STYLES[style](module, role): tensors[f"{module}.lora.{role}.weight"]
        for module in module_names(len(tensors) // 2)
        for role in ("down", "up")
    }


def noisy(tensors, size):
    generator = torch.Generator().manual_seed(7)
    return {name: t * (1 + size * torch.randn(t.shape, generator=generator)) for name, t in tensors.items()}


SAME = {
    "the same bytes": lambda tensors: tensors,
    "fp16": lambda tensors: {name: t.half() for name, t in tensors.items()},
    "bf16": lambda tensors: {name: t.bfloat16() for name, t in tensors.items()},
    "fp8": lambda tensors: {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()},
    "fp64": lambda tensors: {name: t.double() for name, t in tensors.items()},
    "ups alone in fp16": lambda tensors: {name: t.half() if ".up." in name else t for name, t in tensors.items()},
    "keys of kohya": lambda tensors: in_style(tensors, "kohya"),
    "keys of PEFT": lambda tensors: in_style(tensors, "PEFT"),
    "keys of kohya in fp16": lambda tensors: {name: t.half() for name, t in in_style(tensors, "kohya").items()},
    "keys in another order": lambda tensors: {
        name.replace("unet.", "base_model.model.unet."): t for name, t in tensors.items()
    },
    "noise of 1e-7": lambda tensors: noisy(tensors, 1e-7),
    "noise of 1e-5": lambda tensors: noisy(tensors, 1e-5),
    "small weights and 1e-6": lambda tensors: {name: t + 1e-6 for name, t in tensors.items()},
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_weights_are_found_however_they_are_written(tmp_path, change):
    others(tmp_path)
    first = {name: t * (0.03 if "small" in change else 1) for name, t in lora(seed=1).items()}
    write_lora(tmp_path / "a.safetensors", first)
    write_lora(tmp_path / "b.safetensors", SAME[change](first))
    assert groups_of(tmp_path)[0] == [["a", "b"]]


def test_another_order_of_the_data_is_no_other_lora(tmp_path):
    others(tmp_path)
    path = write_lora(tmp_path / "a.safetensors", lora(seed=1))
    # The library sorts tensors of one type by name: with types of several sizes they lie otherwise.
    mixed = {name: t.double() if i % 2 else t for i, (name, t) in enumerate(load_file(path).items())}
    save_file(mixed, tmp_path / "b.safetensors")
    assert groups_of(tmp_path)[0] == [["a", "b"]]


def trained_otherwise(tensors):
    return {name: t if ".down." in name else torch.randn(t.shape) for name, t in tensors.items()}


DIFFERENT = {
    "the same init": trained_otherwise,
    "the same init in fp16": lambda tensors: {name: t.half() for name, t in trained_otherwise(tensors).items()},
    "noise of 1e-3": lambda tensors: noisy(tensors, 1e-3),
    "twice the size": lambda tensors: {name: 2 * t for name, t in tensors.items()},
    "other signs": lambda tensors: {name: -t for name, t in tensors.items()},
    "rows reversed": lambda tensors: {name: t.flip(0) for name, t in tensors.items()},
    "noise of 1e-2 in bf16": lambda tensors: {name: t.bfloat16() for name, t in noisy(tensors, 1e-2).items()},
    "another rank": lambda tensors: lora(rank=4, seed=1),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_other_weights_are_no_copies(tmp_path, change):
    others(tmp_path)
    write_lora(tmp_path / "a.safetensors", lora(seed=1))
    write_lora(tmp_path / "b.safetensors", DIFFERENT[change](lora(seed=1)))
    assert groups_of(tmp_path)[0] == []


def test_one_tiny_factor_that_differs_is_enough(tmp_path):
    """Ups that are barely trained weigh nothing beside the downs, and are all that tells such files apart."""
    for i in range(6):
        tensors = {name: t * (1e-6 if ".up." in name else 1) for name, t in trained_otherwise(lora(seed=1)).items()}
        write_lora(tmp_path / f"{i}.safetensors", tensors)
        write_lora(tmp_path / f"{i}half.safetensors", {name: t.bfloat16() for name, t in tensors.items()})
    assert groups_of(tmp_path)[0] == [[f"{i}", f"{i}half"] for i in range(6)]


def test_files_without_a_like_and_equal_bytes_are_not_read_again(tmp_path):
    others(tmp_path)
    for name in "ab":
        write_lora(tmp_path / f"{name}.safetensors", lora(seed=1))
    assert groups_of(tmp_path) == ([["a", "b"]], [])


def test_many_copies_are_one_group_though_each_is_compared_with_few(tmp_path):
    for i in range(40):
        write_lora(tmp_path / f"{i:02}.safetensors", {name: t * (1 + i * 1e-8) for name, t in lora(seed=1).items()})
    write_lora(tmp_path / "half.safetensors", {name: t.half() for name, t in lora(seed=1).items()})
    ((group), _) = groups_of(tmp_path)
    assert [len(members) for members in group] == [41]


def test_untrained_loras_of_one_init_are_copies_and_others_are_not(tmp_path):
    for i in range(4):
        tensors = {name: t * (".down." in name) for name, t in lora(seed=min(i, 2)).items()}
        write_lora(tmp_path / f"{i}.safetensors", tensors, None)
    assert groups_of(tmp_path)[0] == [["2", "3"]]


def test_the_work_does_not_grow_with_the_pairs_of_files():
    """2,000 LoRAs of one init, whose downs are equal: none is read again but the one copy and its like."""
    generator = np.random.default_rng(0)
    layout = lora_files.Layout(tuple(lora_files.Layer(f"l{i}", f"m{i // 2}", ("down", "up")[i % 2], (4, 4), "F32")
                                     for i in range(8)))  # fmt: skip
    weights = generator.standard_normal((2000, 8, 16)).astype(np.float32)
    weights[:, ::2] = weights[0, ::2]
    weights[1234] = weights[77] * np.float32(1 + 1e-7)
    digests = [hashlib.sha256(row.tobytes()).digest() for row in weights]
    rows_read = []

    def read(row):
        rows_read.append(row)
        return weights[row].ravel()

    sizes = np.sqrt(np.square(weights.astype(np.float64)).mean(2))
    assert find_copies(digests, sizes, [layout] * 2000, read) == [[77, 1234]]
    assert set(rows_read) == {77, 1234}


def test_groups_with_a_row_in_common_are_one():
    assert joined(7, [[0, 3], [3, 5], [1, 6]]) == [[0, 3, 5], [1, 6]]
    assert joined(3, []) == []


EPOCHS = {
    "kohya": (["a/x-000001", "a/x-000002", "a/x"], [["a/x-000001", "a/x-000002", "a/x"]]),
    "kohya without the last": (["a/x-000001", "a/x-000002"], []),
    "ai-toolkit": (["a/x_000000250", "a/x_000000500", "a/x"], [["a/x_000000250", "a/x_000000500", "a/x"]]),
    "kohya's steps": (["a/x-step00000500", "a/x-step00001000"], [["a/x-step00000500", "a/x-step00001000"]]),
    "a letter": (["a/x_e5", "a/x_e10", "a/y_e5"], [["a/x_e5", "a/x_e10"]]),
    "a letter alone": (["a/e1", "a/e2", "a/e3"], []),
    "two moments": (["a/x-e01-s0100", "a/x-e02-s0200"], [["a/x-e01-s0100", "a/x-e02-s0200"]]),
    "words alone": (["a/epoch-3", "a/epoch-10", "b/epoch-3"], [["a/epoch-3", "a/epoch-10"]]),
    "numbers before words": (["a/x_500steps", "a/x_1000steps", "a/x"], [["a/x_500steps", "a/x_1000steps", "a/x"]]),
    "kohya without a name": (
        ["a/epoch-000001", "a/epoch-000002", "a/last"],
        [["a/epoch-000001", "a/epoch-000002", "a/last"]],
    ),
    "the last alone": (["a/last", "b/last", "b/final"], []),
    "the last named so": (["a/x-epoch2", "a/x-last"], [["a/x-epoch2", "a/x-last"]]),
    "folders": (
        ["a/x/checkpoint-500/model", "a/x/checkpoint-1000/model", "a/x/model", "a/y/checkpoint-500/model"],
        [["a/x/checkpoint-500/model", "a/x/checkpoint-1000/model", "a/x/model"]],
    ),
    "plain numbers": (["a/lora_01", "a/lora_02", "a/lora"], []),
    "numbers of six digits": (["a/000001", "a/000002", "b/000001"], []),
    "versions": (["a/x_v1", "a/x_v2", "a/x-final", "a/x"], []),
    "seasons": (["a/show_s1", "a/show_s2"], []),
    "another folder": (["a/x-000001", "b/x"], []),
}


@pytest.mark.parametrize("case", EPOCHS)
def test_epochs_are_told_by_their_names(case):
    names, expected = EPOCHS[case]
    paths = [f"{name}.safetensors" for name in sorted(names)]
    found = find_epochs(paths, [None] * len(paths))
    assert [[paths[row].removesuffix(".safetensors") for row in group] for group in found] == expected


def test_epochs_are_told_by_the_session_in_their_headers(tmp_path):
    sessions = []
    for session, epoch in (("7", "1"), ("7", "2"), ("8", "3"), ("8", "3"), (None, None)):
        metadata = {"ss_session_id": session, "ss_epoch": epoch} if session else {"other": "ss_session_id"}
        save_file(lora(), tmp_path / "x.safetensors", metadata)
        header = lora_files.parse_header(lora_files.read_header(tmp_path / "x.safetensors"))
        sessions.append(session_id(header.fields))
    assert sessions[4] is None
    # Two files of one moment may have been given each other's header by a tool: they are no epochs.
    assert find_epochs([f"{i}/x.safetensors" for i in range(5)], sessions) == [[0, 1]]


def test_of_a_session_the_header_says_which_is_the_last():
    paths = [f"a/{name}.safetensors" for name in ("best", "early", "late", "x", "y")]
    moments = ("10/2000", "2/400", "9/1800", "", "")
    sessions = [(str(i // 3), moment) for i, moment in enumerate(moments)]
    assert find_epochs(paths, sessions) == [[1, 2, 0], [3, 4]]
    assert find_epochs(paths, sessions, [[3, 4]]) == [[1, 2, 0]]  # copies of one another are no epochs
    assert find_epochs(paths, sessions, [[0, 2]]) == [[1, 2, 0], [3, 4]]
    resumed = [f"a/x-e0{i}.safetensors" for i in range(1, 5)]
    sessions = [(str(i // 2), str(i % 2)) for i in range(4)]
    assert find_epochs(resumed, sessions) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("order", [("x-000005", "x-000010", "x"), ("x-000005", "x-000010", "another")])
def test_strict_keeps_one_file_of_a_training_whose_last_epoch_is_saved_twice(order):
    paths = sorted(f"a/{name}.safetensors" for name in order)
    row = {path.split("/")[1].split(".")[0]: i for i, path in enumerate(paths)}
    twins = [sorted((row["x-000010"], row[order[2]]))]
    epochs = find_epochs(paths, [("1", "")] * 3, twins)
    at_fault = {path for notice in twin_notices(paths, ["a"] * 3, twins, epochs, strict=True) for path in notice.files}
    assert len(at_fault) == 2


def test_notices_count_and_name_the_first():
    paths, labels = [f"{name}.safetensors" for name in "abcdef"], ["x"] * 5 + ["y"]
    copied, epochs = twin_notices(paths, labels, [[0, 1, 2], [3, 4]], [[2, 5]])
    assert copied.message.startswith("3 LoRAs are copies of others (a.safetensors = b.safetensors, ...): they are kept")
    assert copied.groups == (tuple(paths[:3]), tuple(paths[3:5])) and copied.files == tuple(paths[:5])
    assert "2 LoRAs are epochs of one training, by their names (c.safetensors, f.safetensors); 1 set" in epochs.message
    (kept,) = twin_notices(paths, labels, [[0, 1]], [], keep_twins=True)
    assert kept.message.startswith("1 LoRA is a copy of another (a.safetensors = b.safetensors): as --keep-twins asks")
    strict = twin_notices(paths, labels, [[0, 1, 2]], [[2, 5]], strict=True)
    assert [notice.files for notice in strict] == [tuple(paths[1:3]), (paths[2],)]


def test_contradictory_copies_are_named_each_with_its_like():
    findings = copies.contradictions(["a/x", "a/y", "b/z"], ["a", "a", "b"], [[0, 1, 2]])
    assert [finding.files for finding in findings] == [("a/x",), ("a/y",), ("b/z",)]
    assert (
        findings[2].reason
        == "the same weights as a/x, but another label (b, a). Mend the label, or keep one and its row."
    )
    assert copies.contradictions(["a/x", "a/y"], ["a", "a"], [[0, 1]]) == []
