import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from making import FILE_NAME, lora, module_names, write_collection, write_lora
from safetensors.torch import load_file, save_file

import data
from data import CollectionError, check_classes, index_collection
from loras.weight_files import PICKLE_SUFFIXES


def findings(root) -> list[str]:
    with pytest.raises(CollectionError) as error:
        index_collection(root)
    return error.value.findings


def files_in(root) -> list:
    return sorted(root.rglob("*.safetensors"))


# ----------------------------------------------------------------------------------------------------------------------
# Labels and layouts
# ----------------------------------------------------------------------------------------------------------------------


def test_labels_from_folders_of_folders(tmp_path):
    collection = index_collection(write_collection(tmp_path / "zoo", classes=2, per_class=3))
    assert collection.class_counts == {"class_0": 3, "class_1": 3}
    assert collection.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert collection.label_source == "the folder names"
    assert collection.name == "zoo"
    assert collection.files[4].path == f"class_1/0001/{FILE_NAME}"


def test_labels_from_folders_of_files(tmp_path):
    for label in ("b", "a"):
        for i in range(3):
            write_lora(tmp_path / label / f"{i}.safetensors", lora(seed=i))
    collection = index_collection(tmp_path)
    assert [file.path for file in collection.files] == [f"{label}/{i}.safetensors" for label in "ab" for i in range(3)]
    assert [file.label for file in collection.files] == ["a"] * 3 + ["b"] * 3
    assert collection.classes == ["a", "b"]


def test_labels_from_metadata_win_over_folders(tmp_path):
    for i, label in enumerate(["cat", "dog", 3, 3]):
        write_lora(tmp_path / f"{i}" / FILE_NAME, lora(), {"category_label": label, "rank": 2})
    collection = index_collection(tmp_path)
    assert [file.label for file in collection.files] == ["cat", "dog", "3", "3"]
    assert collection.label_source == "category_label in metadata.json"


def test_metadata_without_the_field_leaves_the_folders(tmp_path):
    write_lora(tmp_path / "a" / "0" / FILE_NAME, lora(), {"rank": 2, "loss": float("nan")})
    write_lora(tmp_path / "b" / "0" / FILE_NAME, lora())
    assert [file.label for file in index_collection(tmp_path).files] == ["a", "b"]


@pytest.mark.parametrize(
    "metadata", [None, {}, {"category_label": ""}, {"category_label": None}, {"category_label": [1]}]
)
def test_a_missing_label_is_named(tmp_path, metadata):
    write_lora(tmp_path / "a" / FILE_NAME, lora(), {"category_label": "cat"})
    bad = write_lora(tmp_path / "b" / FILE_NAME, lora(), metadata)
    assert [finding.split(": no label: no category_label")[0] for finding in findings(tmp_path)] == [str(bad)]


@pytest.mark.parametrize("place", ["x.safetensors", "a/b/c/x.safetensors"])
def test_a_file_at_another_depth_has_no_label(tmp_path, place):
    write_collection(tmp_path)
    write_lora(tmp_path / place, lora())
    (finding,) = findings(tmp_path)
    assert finding.startswith(f"{tmp_path / place}: no label")
    assert "<class>/<lora>/" in finding


@pytest.mark.parametrize("content", ["{", "[1]", '"x"', "\xff", "[" * 100_000])
def test_unreadable_metadata_is_told_once(tmp_path, content):
    for i in range(3):
        write_lora(tmp_path / "a" / f"{i}.safetensors", lora())
    (tmp_path / "a" / "metadata.json").write_bytes(content.encode("latin-1"))
    (finding,) = findings(tmp_path)
    assert finding.startswith(f"{tmp_path / 'a' / 'metadata.json'}: metadata.json")


def test_metadata_that_is_a_folder_is_a_finding(tmp_path):
    path = write_lora(tmp_path / "a" / "0" / FILE_NAME, lora())
    (path.parent / "metadata.json").mkdir()
    assert "metadata.json is not readable" in findings(tmp_path)[0]


def test_the_preferred_file_wins_and_the_rest_is_counted(tmp_path):
    write_collection(tmp_path, classes=2, per_class=3)
    folder = tmp_path / "class_0" / "0000"
    for name in ("adapter_model.safetensors", "epoch-1.safetensors"):
        write_lora(folder / name, lora(3))
    (folder / "optimizer.bin").write_bytes(b"x")
    (folder / "._x.safetensors").write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.safetensors").write_bytes(b"x")
    write_lora(tmp_path / "class_1" / "0000" / FILE_NAME, lora() | {"a.dora_scale": torch.ones(2)})
    collection = index_collection(tmp_path)
    assert [file.path for file in collection.files if "0000" in file.path] == [
        f"class_{c}/0000/{FILE_NAME}" for c in (0, 1)
    ]
    assert collection.ignored == {
        f"*.safetensors beside {FILE_NAME}": 2,
        "pickles beside *.safetensors": 1,
        "hidden folders": 1,
        "*.dora_scale": 1,
    }


def test_linked_folders_are_counted_and_linked_files_read(tmp_path):
    root = write_collection(tmp_path / "zoo")
    (root / "linked").symlink_to(root / "class_0")
    link = root / "class_1" / "0009" / FILE_NAME
    link.parent.mkdir()
    link.symlink_to(root / "class_0" / "0000" / FILE_NAME)
    collection = index_collection(root)
    assert collection.class_counts == {"class_0": 3, "class_1": 4}
    assert collection.ignored == {"linked folders": 1}


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
def test_pickles_are_never_loaded(tmp_path, suffix):
    write_collection(tmp_path)
    path = tmp_path / "class_0" / "0009" / f"pytorch_lora_weights{suffix}"
    path.parent.mkdir()
    path.write_bytes(b"\x80\x04.")
    (finding,) = findings(tmp_path)
    assert finding == f"{path}: a pickle checkpoint: never loaded. Convert it to safetensors."


def test_nothing_there(tmp_path):
    assert "no such folder" in findings(tmp_path / "nowhere")[0]
    assert "no *.safetensors file" in findings(tmp_path)[0]
    (tmp_path / "file").write_text("")
    assert "a file, not a folder" in findings(tmp_path / "file")[0]


def test_a_folder_that_cannot_be_listed_is_a_finding(tmp_path, monkeypatch):
    write_collection(tmp_path)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("class_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (finding,) = findings(tmp_path)
    assert finding.startswith(f"{tmp_path / 'class_1'}: ")
    assert "Permission denied" in finding


# ----------------------------------------------------------------------------------------------------------------------
# Findings over the whole collection
# ----------------------------------------------------------------------------------------------------------------------


def test_faults_of_several_files_are_told_together(tmp_path):
    paths = files_in(write_collection(tmp_path, classes=2, per_class=4))
    paths[0].write_bytes(paths[0].read_bytes()[:-4])
    paths[2].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    save_file({"model.weight": torch.ones(2, 2)}, paths[5])
    (paths[6].parent / "adapter_config.json").write_text("{")
    told = findings(tmp_path)
    assert [finding.split(": ")[0] for finding in told] == [str(paths[i]) for i in (0, 2, 5, 6)]
    words = ["incomplete download", "Git LFS", "no LoRA pair", "adapter_config.json is not readable"]
    assert all(word in finding for word, finding in zip(words, told, strict=True))


@pytest.mark.parametrize("config", [{"lora_alpha": "x"}, {"lora_alpha": float("nan")}, {"alpha_pattern": {"(": 1}}])
def test_an_unusable_adapter_config_is_found_before_the_weights_are_read(tmp_path, config):
    path = files_in(write_collection(tmp_path))[1]
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    (finding,) = findings(tmp_path)
    assert finding.startswith(f"{path}: ")
    assert "alpha" in finding


def test_at_most_twenty_findings_are_shown_with_the_count_of_the_rest():
    error = CollectionError([f"{i}.safetensors: fault {i}. Mend it." for i in range(26)])
    lines = error.shown().splitlines()
    assert len(lines) == data.MAX_FINDINGS + 1
    assert all(line.startswith("error: ") for line in lines)
    assert "6 more" in lines[-1]
    assert len(CollectionError([f"x: y{i}" for i in range(20)]).shown().splitlines()) == 20


def test_what_is_wrong_with_many_files_is_said_once_with_their_number(tmp_path):
    root = write_collection(tmp_path / "zoo: mine", per_class=15)
    for path in files_in(root):
        path.write_bytes(b"")
    (root / "class_1" / "3: x.safetensors").write_bytes(b"")
    (root / "class_1" / "4: x.safetensors").write_bytes(b"1234")
    with pytest.raises(CollectionError) as error:
        index_collection(root)
    empty, short = error.value.shown().splitlines()
    assert len(error.value.findings) == 32
    first = root / "class_0" / "0000" / FILE_NAME
    assert empty.startswith(f"error: {first} and 30 more: incomplete download: has 0 bytes")
    assert short.startswith(f"error: {root}/class_1/4: x.safetensors: incomplete download: has 4 bytes")


def test_files_that_lack_or_add_layers(tmp_path):
    paths = files_in(write_collection(tmp_path, classes=2, per_class=4, modules=3))
    for path in paths[:2]:
        write_lora(path, lora(2))
    write_lora(paths[5], lora(4))
    lacks, adds = findings(tmp_path)
    missing, extra = (module_names(4)[i].replace(".", "_") for i in (2, 3))
    assert lacks.startswith(f"{paths[0]} and 1 more: lacks 2 layers ({missing} down ...) compared with 5 files.")
    assert adds.startswith(f"{paths[5]}: adds 2 layers ({extra} down ...) compared with 5 files.")


def test_mixed_base_models(tmp_path):
    paths = files_in(write_collection(tmp_path, classes=2, per_class=4, width=8))
    write_lora(paths[3], lora(width=12))
    (finding,) = findings(tmp_path)
    assert finding.startswith(f"{paths[3]}: ")
    assert "is 12 wide, but 8 in 7 files: mixed base models" in finding


def test_mixed_ranks_are_accepted_and_said(tmp_path):
    root = write_collection(tmp_path)
    assert index_collection(root).mixed_ranks == ""
    write_lora(files_in(root)[4], lora(rank=3))
    collection = index_collection(root)
    assert "has 2, and 3 in class_1/0001/" in collection.mixed_ranks
    assert [layer.rank for layer in collection.files[4].layout.layers] == [3] * 4


def test_ranks_that_differ_between_modules_alone_are_not_mixed(tmp_path):
    tensors = lora(1, rank=2) | {f"x.{key}": tensor for key, tensor in lora(1, rank=5).items()}
    for i in range(3):
        write_lora(tmp_path / "a" / f"{i}.safetensors", tensors)
    assert index_collection(tmp_path).mixed_ranks == ""


def test_one_network_in_two_styles_is_one_collection(tmp_path):
    root = write_collection(tmp_path, modules=12)
    modules = [f"lora_{name.replace('.', '_')}" for name in module_names(12)]
    renamed = {
        f"{module}.lora_{role}.weight": torch.ones(2, 8) if role == "down" else torch.ones(8, 2)
        for module in modules
        for role in ("up", "down")
    }
    write_lora(files_in(root)[2], renamed)
    collection = index_collection(root)
    assert [layer.name for layer in collection.layers] == list(lora(12))
    for file in collection.files:
        assert [layer.module for layer in file.layout.layers[::2]] == collection.modules
    assert collection.pair_of_layer.tolist() == [m for m in range(12) for _ in range(2)]
    assert collection.weights_per_layer == [16] * 24


def test_files_share_what_is_equal_in_them(tmp_path):
    """Tens of thousands of files whose headers differ in the metadata of their trainings hold one layout."""
    for i in range(6):
        path = write_lora(tmp_path / "a" / f"{i}" / FILE_NAME, lora(seed=i))
        save_file(load_file(path), path, metadata={"training": "x" * i})
        (path.parent / "adapter_config.json").write_text('{"lora_alpha": 8}')
    files = index_collection(tmp_path).files
    assert len({id(file.layout) for file in files}) == len({id(file.adapter_config) for file in files}) == 1


def counts(tmp_path, **per_class) -> data.Collection:
    for label, count in per_class.items():
        for i in range(count):
            write_lora(tmp_path / label / f"{i}.safetensors", lora(1))
    return index_collection(tmp_path)


@pytest.mark.parametrize(
    ("per_class", "words"),
    [
        ({"a": 5}, "fewer than two classes (a: 5)"),
        ({"a": 5, "b": 2}, "fewer than three LoRAs (b: 2, a: 5)"),
        ({"a": 3, "b": 3} | {f"c{i}": 3 for i in range(12)} | {"z": 1}, "fewer than three LoRAs (z: 1, a: 3"),
        ({"a": 1, "b": 1, "c": 1}, "as many labels as LoRAs (3): looks like an id"),
    ],
)
def test_labels_that_make_no_task(tmp_path, per_class, words):
    with pytest.raises(CollectionError, match=re.escape(words)):
        check_classes(counts(tmp_path, **per_class))


def test_two_classes_of_three_are_enough(tmp_path):
    check_classes(counts(tmp_path, a=3, b=3))


# ----------------------------------------------------------------------------------------------------------------------
# inspect
# ----------------------------------------------------------------------------------------------------------------------


def test_inspect_as_json(tmp_path, capsys):
    root = write_collection(tmp_path, classes=2, per_class=3)
    write_lora(files_in(root)[0], lora() | {"a.dora_scale": torch.ones(2)})
    assert data.main(["inspect", str(root), "--top-k=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_samples"] == 6
    assert found["classes"] == {"class_0": 3, "class_1": 3}
    assert found["ignored"] == {"*.dora_scale": 1}
    first, second, *_ = found["layers"]
    name = module_names(1)[0]
    expected = {"module": name.replace(".", "_"), "role": "down", "shape": [2, 8]}
    assert first == {"name": f"{name}.lora.down.weight"} | expected
    assert second == {"name": f"{name}.lora.up.weight"} | expected | {"role": "up", "shape": [8, 2]}
    assert len(found["layers"]) == 4


def test_inspect_as_text(tmp_path, capsys):
    root = write_collection(tmp_path, modules=1)
    assert data.main(["inspect", str(root), "--top-k=1"]) == 0
    out = capsys.readouterr().out
    assert "6 LoRAs of 2 layers; labels from the folder names" in out
    assert "class_0 (3), class_1 (3)" in out
    assert "F32 (12)" in out
    assert "\nranks:   2 (6 LoRAs)\n" in out
    assert "\nnumbers: 32 a LoRA, 192 in all" in out
    assert "ignored: nothing" in out
    assert "\nblock  layers  out x rank x in  projections\nIN01        2  8x2x8            attn1 q\n" in out
    name = module_names(1)[0]
    assert name not in out
    assert data.main(["inspect", str(root), "--top-k=1", "--all"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"\n +0  down +2x8  {re.escape(name)}\.lora\.down\.weight +{name.replace('.', '_')}\n", out)


@pytest.mark.parametrize("through_a_link", [pytest.param(False, marks=pytest.mark.slow), True])
def test_both_commands_work_from_any_folder_and_through_a_link(tmp_path, through_a_link):
    write_collection(tmp_path / "zoo", modules=1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = Path(data.__file__).resolve()
    if through_a_link:
        (elsewhere / "look.py").symlink_to(program)
        program = "look.py"
    for arguments, code, out, error in (
        (["inspect", "../zoo", "--top-k=1"], 0, "../zoo: 6 LoRAs of 2 layers", ""),
        (["import", "nowhere.parquet", "made"], 2, "", "error: nowhere.parquet: no such file or folder. "),
    ):
        done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, cwd=elsewhere)
        assert done.returncode == code and done.stdout.startswith(out) and done.stderr.startswith(error), done


def test_inspect_of_a_faulty_folder(tmp_path, capsys):
    assert data.main(["inspect", str(tmp_path / "nowhere"), "--top-k=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("next:    mend what the errors say, then look again: python ")
    assert captured.err.startswith(f"error: {tmp_path / 'nowhere'}: no such folder. Give a folder of LoRAs, or 1k, ")


def test_an_interrupted_inspection_says_so(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "index_collection", interrupted)
    assert data.main(["inspect", str(tmp_path), "--top-k=1"]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_inspect_counts_scales_with_their_source(tmp_path, capsys):
    root = write_collection(tmp_path, per_class=3)
    alphas = {f"{module}.alpha": torch.tensor(float(m)) for m, module in enumerate(module_names(2))}
    write_lora(files_in(root)[0], lora() | alphas)
    (files_in(root)[1].parent / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 2}')
    assert data.main(["inspect", str(root), "--top-k=1", "--json", "--headers-only"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scales"] == [
        {"scale": 1.0, "source": "none", "modules": 2, "files": 4},
        {"scale": 4.0, "source": "adapter_config.json", "modules": 2, "files": 1},
        {"scale": 0.5, "source": "alpha tensors", "modules": 1, "files": 1},
        {"scale": 1.0, "source": "alpha tensors", "modules": 1, "files": 1},
    ]
    assert [(notice["kind"], notice["count"]) for notice in found["notices"]] == [("scales", 2)]
    assert found["weights_checked"] is False
    assert data.main(["inspect", str(root), "--top-k=1"]) == 0
    out = capsys.readouterr().out
    assert "\nscales:  1 (none, 2 modules of 4 LoRAs), 4 (adapter_config.json, 2 modules of 1 LoRA), 0.5 (" in out
    assert "\nnote: scales of updates are not stated alike: by nothing in 4 LoRAs (class_0/0002/" in out


def test_inspect_of_headers_only_says_what_was_not_checked(tmp_path, capsys):
    write_lora(write_collection(tmp_path) / "class_0" / "0000" / FILE_NAME, spoiled(float("nan")))
    assert data.main(["inspect", str(tmp_path), "--top-k=1", "--headers-only"]) == 0
    *_, last, _ = capsys.readouterr().out.splitlines()
    assert last == "weights: not read; NaN, copies, epochs, untrained LoRAs and outliers were not checked"


def spoiled(value: float) -> dict:
    """A LoRA with a number that is none."""
    tensors = lora(seed=9)
    tensors[f"{module_names(2)[1]}.lora.up.weight"][0, 0] = value
    return tensors


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_inspect_finds_what_the_run_would_refuse(tmp_path, capsys, value, flags):
    path = write_lora(write_collection(tmp_path, per_class=4) / "class_0" / "0000" / FILE_NAME, spoiled(value))
    assert data.main(["inspect", str(tmp_path), "--top-k=1", *flags]) == 2
    name = f"{module_names(2)[1]}.lora.up.weight"
    fault = f"NaN or infinity in 1 tensors, first in {name}. Train again or leave it out."
    assert capsys.readouterr().err == f"error: {path}: {fault}\n"
    assert data.main(["inspect", str(tmp_path), "--top-k=1", "--skip-bad", *flags]) == 0
    captured = capsys.readouterr()
    skipped = {"path": f"class_0/0000/{FILE_NAME}", "reason": fault}
    if flags:
        found = json.loads(captured.out)
        assert found["skipped"] == [skipped] and found["num_samples"] == 7 and found["weights_checked"]
    else:
        assert f"skipped: {skipped['path']}: {fault}" in captured.out.splitlines()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_inspect_refuses_an_alpha_that_is_no_number(tmp_path, capsys, alpha):
    module = module_names(1)[0]
    bad = lora() | {f"{module}.alpha": torch.tensor(alpha)}
    path = write_lora(write_collection(tmp_path) / "class_0" / "0000" / FILE_NAME, bad)
    assert data.main(["inspect", str(tmp_path), "--top-k=1", "--headers-only"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: alpha of module {module.replace('.', '_')} is ")


def test_inspect_reports_copies_and_untrained_loras(tmp_path, capsys):
    root = write_collection(tmp_path, per_class=4)
    paths = files_in(root)
    write_lora(paths[1], load_file(paths[0]))
    untrained = {key: tensor * (".lora.down." in key) for key, tensor in lora(seed=50).items()}
    write_lora(paths[7], untrained)
    assert data.main(["inspect", str(root), "--top-k=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = {notice["kind"]: notice["files"] for notice in found["notices"]}
    names = [path.relative_to(root).as_posix() for path in paths]
    assert kinds["copies"] == names[:2] and kinds["untrained"] == names[7:]
    assert data.main(["inspect", str(root), "--top-k=1", "--strict"]) == 2
    assert {line.split(": ")[1] for line in capsys.readouterr().err.splitlines()} == {str(paths[i]) for i in (1, 7)}
    assert data.main(["inspect", str(root), "--top-k=1", "--strict", "--skip-bad", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [record["path"] for record in found["skipped"]] == [names[1], names[7]] and found["notices"] == []


def test_inspect_refuses_copies_of_two_classes(tmp_path, capsys):
    paths = files_in(write_collection(tmp_path, per_class=4))
    write_lora(paths[4], load_file(paths[0]))
    assert data.main(["inspect", str(tmp_path), "--top-k=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [str(paths[0]), str(paths[4])]
    assert all("class_0" in line and "class_1" in line for line in lines)
    assert data.main(["inspect", str(tmp_path), "--top-k=1", "--skip-bad"]) == 0
