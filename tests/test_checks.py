"""What a run does about copies, epochs, untrained LoRAs and outliers, through the command line."""

import csv
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from making import FILE_NAME, NARROW, STYLES, lora, module_names, write_collection, write_lora
from safetensors.torch import load_file
from test_house import check_schema

from ablation_experiment import main
from data import CollectionError, index_collection, keep_together
from data import main as data_main
from experiment import checks, controls, extraction
from experiment.extraction import CHECKED, extract
from loras.notices import Notice

CPU = torch.device("cpu")
FLAGS = ("--top-k=1", "--quick", "--num-runs=1", "--representations=stats", "--device=cpu")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("good") / "zoo", classes=2, per_class=10, modules=1)


@pytest.fixture
def zoo(good, tmp_path):
    return shutil.copytree(good, tmp_path / "zoo")


def lora_at(root: Path, label: int, number: int) -> Path:
    return root / f"class_{label}" / f"{number:04}" / FILE_NAME


def copy_lora(root: Path, source: tuple[int, int], *targets: tuple[int, int]) -> None:
    for target in targets:
        shutil.copyfile(lora_at(root, *source), lora_at(root, *target))


def run(root: Path, *flags: str, expected: int = 0) -> Path:
    """Run the experiment; return the folder of results."""
    out = root.parent / "out"
    assert main(["--dataset", str(root), "--output-dir", str(out), *FLAGS, *flags], NARROW) == expected
    return out / f"ablation_{root.name}"


def samples_in(folder: Path) -> dict[str, dict]:
    return {row["file"]: row for row in csv.DictReader((folder / "samples.csv").open())}


def results_in(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_collection_without_copies_has_no_groups(zoo, capsys):
    folder = run(zoo)
    results = results_in(folder)
    assert results["dataset"]["findings"] == [] and results["dataset"]["num_groups"] is None
    assert next(iter(samples_in(folder).values())).keys() == {"file", "label", "split"}
    assert "note " not in capsys.readouterr().out


@pytest.mark.parametrize("seed", [1, 2])
def test_copies_are_on_one_side_of_the_split_and_reported(zoo, capsys, seed):
    copy_lora(zoo, (0, 1), (0, 4), (0, 7))
    half = {name: t.half() for name, t in load_file(lora_at(zoo, 1, 2)).items()}
    kohya = {STYLES["kohya"](m, r): half[f"{m}.lora.{r}.weight"] for m in module_names(1) for r in ("down", "up")}
    write_lora(lora_at(zoo, 1, 3), kohya)
    folder = run(zoo, f"--seed={seed}")
    told, results, samples = capsys.readouterr().out, results_in(folder), samples_in(folder)
    assert check_schema(results) == []
    groups = [[f"class_0/{i:04}/{FILE_NAME}" for i in (1, 4, 7)], [f"class_1/{i:04}/{FILE_NAME}" for i in (2, 3)]]
    for group in groups:
        assert len({samples[path]["split"] for path in group}) == 1
        assert {samples[path]["group"] for path in group} == {group[0]}
    assert len({row["group"] for row in samples.values()}) == 17 == results["dataset"]["num_groups"]
    assert results["dataset"]["group_column"] is None
    (finding,) = results["dataset"]["findings"]
    assert (finding["kind"], finding["count"], finding["groups"]) == ("copies", 5, groups)
    message = f"3 LoRAs are copies of others ({groups[0][0]} = {groups[0][1]}, ...): they are kept on one side"
    assert f"note      {message}" in told and finding["message"].startswith(message)
    assert f"note      {message}" in (folder / "results.txt").read_text()
    assert "; copies, and epochs of one training, are in one part" in told


def test_a_rerun_does_nothing_and_keep_twins_is_another_experiment(zoo, capsys):
    copy_lora(zoo, (0, 1), *((0, i) for i in range(2, 8)))
    folder = run(zoo)
    assert len({samples_in(folder)[f"class_0/{i:04}/{FILE_NAME}"]["split"] for i in range(1, 8)}) == 1
    run(zoo)
    assert "Nothing to do" in capsys.readouterr().out
    results = results_in(run(zoo, "--keep-twins"))
    told, samples = capsys.readouterr().out, samples_in(folder)
    assert "Nothing to do" not in told and "as --keep-twins asks, they may be on both sides of the split" in told
    assert len({samples[f"class_0/{i:04}/{FILE_NAME}"]["split"] for i in range(1, 8)}) > 1
    assert results["config"]["keep_twins"] and results["dataset"]["num_groups"] is None
    assert results["dataset"]["findings"][0]["count"] == 7 and (folder / "previous" / "1").is_dir()


def listing(folder: Path) -> dict:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("twice", [False, True])
def test_copies_of_several_labels_are_refused_with_both_names(zoo, capsys, twice):
    """Also where their features are in the cache, as the labels were others."""
    copy_lora(zoo, (0, 1), (1, 4))
    labels = zoo.parent / "labels.csv"
    if twice:
        files = [path.relative_to(zoo).as_posix() for path in sorted(zoo.rglob("*.safetensors"))]
        rows = [
            f"{path},{i % 3 if '0/0001' not in path and '1/0004' not in path else 0}" for i, path in enumerate(files)
        ]
        labels.write_text("file_name,label\n" + "\n".join(rows))
        run(zoo, f"--labels={labels}")
        capsys.readouterr()
    mend = "Mend the label, or keep one and its row."
    for flags in ((), ("--keep-twins",)):
        before = listing(zoo.parent)
        run(zoo, *flags, expected=2)
        paths = [f"class_0/0001/{FILE_NAME}", f"class_1/0004/{FILE_NAME}"]
        assert capsys.readouterr().err.splitlines() == [
            f"error: {zoo}/{paths[0]}: the same weights as {paths[1]}, but another label (class_0, class_1). {mend}",
            f"error: {zoo}/{paths[1]}: the same weights as {paths[0]}, but another label (class_1, class_0). {mend}",
        ]
        assert listing(zoo.parent) == before


def test_skip_bad_leaves_out_all_copies_of_several_labels_and_reruns_read_nothing(zoo, capsys, monkeypatch):
    copy_lora(zoo, (0, 1), (1, 4), (0, 5))
    copy_lora(zoo, (0, 2), (0, 3))
    folder = run(zoo, "--skip-bad")
    dataset = results_in(folder)["dataset"]
    assert [entry["path"][:12] for entry in dataset["skipped"]] == ["class_0/0001", "class_0/0005", "class_1/0004"]
    assert dataset["num_samples"] == 17 and [finding["count"] for finding in dataset["findings"]] == [2]
    told = capsys.readouterr().out
    assert [told.count(f"\n{word} ") for word in ("data", "plan", "estimate", "skipped")] == [2, 1, 1, 1]
    monkeypatch.setattr(extraction._Pass, "run", lambda *_, **__: 1 / 0)
    run(zoo, "--skip-bad")
    told = capsys.readouterr().out
    assert "Nothing to do" in told and "\n\nBear in mind\n" in told


def test_nothing_is_left_where_skip_bad_leaves_too_few(tmp_path, capsys):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=3, modules=1)
    copy_lora(root, (0, 1), (1, 1))
    run(root, "--skip-bad", expected=2)
    assert "fewer than three LoRAs (class_0: 2, class_1: 2)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def test_a_class_of_copies_is_refused_and_why(zoo, capsys):
    copy_lora(zoo, (0, 1), *((0, i) for i in range(2, 10)))
    run(zoo, expected=2)
    told = capsys.readouterr().err
    assert f"error: {zoo}: copies and epochs, kept together, leave a class with fewer than three groups" in told
    assert "(class_0: 2, class_1: 10)" in told and "--keep-twins" in told
    assert not (zoo.parent / "out").exists()
    run(zoo, "--keep-twins")


def test_epochs_are_kept_together_whatever_their_labels(zoo, capsys):
    for i in range(5):
        for label in (0, 1):
            name = "x.safetensors" if i == 4 else f"x-{i + 1:06}.safetensors"
            write_lora(zoo / f"class_{label}" / name, lora(1, seed=100 + 10 * label + i))
    folder = run(zoo)
    samples, (finding,) = samples_in(folder), results_in(folder)["dataset"]["findings"]
    assert finding["kind"] == "epochs" and "10 LoRAs are epochs of 2 trainings" in finding["message"]
    for label in (0, 1):
        parts = {row["split"] for path, row in samples.items() if path.startswith(f"class_{label}/x")}
        assert len(parts) == 1


def test_groups_of_a_column_that_share_a_copy_become_one(zoo, capsys):
    for i, path in enumerate(sorted(zoo.rglob("*.safetensors"))):
        (path.parent / "metadata.json").write_text(
            json.dumps({"category_label": path.parts[-3], "artist": f"a{i // 2}"})
        )
    copy_lora(zoo, (0, 1), (0, 2))  # of artists 0 and 1
    folder = run(zoo, "--group-column=artist")
    samples, dataset = samples_in(folder), results_in(folder)["dataset"]
    assert [samples[f"class_0/{i:04}/{FILE_NAME}"]["group"] for i in range(6)] == ["a0"] * 4 + ["a2"] * 2
    assert len({samples[f"class_0/{i:04}/{FILE_NAME}"]["split"] for i in range(4)}) == 1
    assert dataset["num_groups"] == 9 and dataset["group_column"] == "artist"
    assert "9 groups by artist, each in one part" in capsys.readouterr().out
    assert results_in(run(zoo, "--group-column=artist", "--keep-twins"))["dataset"]["num_groups"] == 10


def test_strict_refuses_what_is_reported_and_leaves_nothing(zoo, capsys):
    copy_lora(zoo, (0, 1), (0, 2))
    write_lora(lora_at(zoo, 1, 1), {name: 0 * t for name, t in lora(1, seed=99).items()})
    run(zoo, "--strict", expected=2)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"error: {lora_at(zoo, 1, 1)}: 1 LoRA is untrained, as every update is zero (class_1/0001/{FILE_NAME}). "
        "Leave such files out, as --strict --skip-bad does.",
        f"error: {lora_at(zoo, 0, 2)}: 1 LoRA is a copy of another (class_0/0001/{FILE_NAME} = "
        f"class_0/0002/{FILE_NAME}). Keep one of each, as --strict --skip-bad does: of epochs the last.",
    ]
    assert not (zoo.parent / "out").exists()


def test_strict_with_skip_bad_keeps_the_first_copy_and_the_last_epoch(zoo, capsys):
    copy_lora(zoo, (0, 1), (0, 2), (0, 3))
    for name, seed in (("y-epoch9", 50), ("y-epoch10", 51)):
        write_lora(zoo / "class_1" / f"{name}.safetensors", lora(1, seed=seed))
    write_lora(lora_at(zoo, 1, 1), {name: 1000 * t for name, t in lora(1, seed=11).items()})
    dataset = results_in(run(zoo, "--strict", "--skip-bad"))["dataset"]
    assert [entry["path"] for entry in dataset["skipped"]] == [
        f"class_0/0002/{FILE_NAME}",
        f"class_0/0003/{FILE_NAME}",
        f"class_1/0001/{FILE_NAME}",
        "class_1/y-epoch9.safetensors",
    ]
    assert dataset["findings"] == [] and dataset["num_groups"] is None


def test_strict_goes_on_without_the_modules_that_are_zero(tmp_path, capsys):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=5, modules=2)
    for path in root.rglob("*.safetensors"):
        write_lora(path, {name: t * ("attentions.1" not in name) for name, t in load_file(path).items()})
    collection = index_collection(root)
    check = partial(checks.check_collection, seed=0, strict=True)
    extracted = extract(collection, CHECKED, tmp_path / "cache", CPU)
    assert "1 module is zero" in check(collection, extracted.shards)["faults"][0]
    assert check(collection, extracted.shards, layers="*attentions.0*")["notices"] == []
    assert data_main(["inspect", str(root), "--top-k=1", "--strict"]) == 2
    assert data_main(["inspect", str(root), "--top-k=1", "--strict", "--layers=*attentions.0*"]) == 0
    assert "1 module is zero in every LoRA" in capsys.readouterr().err


def test_untrained_loras_and_outliers_are_reported_and_the_run_goes_on(zoo):
    write_lora(lora_at(zoo, 1, 1), {name: 0 * t for name, t in lora(1, seed=99).items()})
    write_lora(lora_at(zoo, 0, 1), {name: 100 * t for name, t in lora(1, seed=1).items()})
    untrained, outlier = results_in(run(zoo))["dataset"]["findings"]
    assert untrained["kind"] == "untrained" and untrained["files"] == [f"class_1/0001/{FILE_NAME}"]
    assert outlier["kind"] == "outlier" and outlier["files"] == [f"class_0/0001/{FILE_NAME}"]


def test_controls_by_groups_of_a_column_keep_copies_together(zoo, tmp_path):
    for i, path in enumerate(sorted(zoo.rglob("*.safetensors"))):
        (path.parent / "metadata.json").write_text(
            json.dumps({"category_label": path.parts[-3], "group": f"a{i // 2}"})
        )
    copy_lora(zoo, (0, 1), (0, 2))
    collection = index_collection(zoo)
    collection = keep_together(collection, [[1, 2]])
    assert list(checks.group_columns(collection)) == ["group"]
    by_group = controls.grouped_by(collection, "group", checks.group_columns(collection)["group"])
    assert [file.group for file in by_group.files[:6]] == ["a0"] * 4 + ["a2"] * 2


def test_check_sees_what_the_pass_left_in_several_shards(zoo, tmp_path, monkeypatch):
    copy_lora(zoo, (0, 1), (1, 9))
    for path in sorted(zoo.rglob("*.safetensors")):
        (path.parent / "metadata.json").write_text(json.dumps({"category_label": str(int(path.parts[-2]) % 2)}))
    monkeypatch.setattr(extraction, "_numbers_of_a_lora", lambda _: 64)
    monkeypatch.setattr(extraction, "SHARD_NUMBERS", 3 * 64)
    collection = index_collection(zoo)
    check = partial(checks.check_collection, seed=0)
    first = extract(collection, CHECKED, tmp_path / "cache", CPU, check=check)
    assert first.checked["groups"] == [[1, 19]]
    assert first.load("digests").shape == (20, 32) and first.load("digests").dtype == np.uint8
    again = extract(collection, CHECKED, tmp_path / "cache", CPU, check=check)
    assert again.checked == first.checked
    assert checks.apply(collection, again.checked).rows_of_groups[1] == [1, 19]


def test_a_file_that_looks_like_a_copy_and_changes_is_refused(zoo, tmp_path):
    copy_lora(zoo, (0, 1), (0, 2))
    tensors = load_file(lora_at(zoo, 0, 2))
    write_lora(lora_at(zoo, 0, 2), {name: t.half() for name, t in tensors.items()})
    collection = index_collection(zoo)
    extracted = extract(collection, CHECKED, tmp_path / "cache", CPU)
    os.truncate(lora_at(zoo, 0, 2), 9)
    with pytest.raises(CollectionError, match="changed since it was indexed"):
        checks.check_collection(collection, extracted.shards, seed=0)


def test_a_pass_that_was_stopped_goes_on_and_is_checked(zoo, tmp_path, monkeypatch):
    copy_lora(zoo, (0, 1), (0, 2))
    monkeypatch.setattr(extraction, "_numbers_of_a_lora", lambda _: 64)
    monkeypatch.setattr(extraction, "SHARD_NUMBERS", 5 * 64)
    read, original = [], extraction._Pass.run

    def stop_in_third(*arguments, **more):
        read.append(arguments[1].start)
        if len(read) == 3:
            raise KeyboardInterrupt
        original(*arguments, **more)

    def checked():
        check = partial(checks.check_collection, seed=0)
        return extract(index_collection(zoo), CHECKED, tmp_path / "cache", CPU, check=check).checked

    monkeypatch.setattr(extraction._Pass, "run", stop_in_third)
    with pytest.raises(KeyboardInterrupt):
        checked()
    assert checked()["groups"] == [[1, 2]] and read == [0, 5, 10, 10, 15]


def test_what_strict_leaves_out_is_not_told_to_be_left_out():
    """A reason once ended in the advice to use the flags that it was given for."""
    for message in (
        "1 LoRA is untrained (a). Leave such files out, as --strict --skip-bad does.",
        "1 LoRA is far from the others (a: 9). Look at how such files were made; --strict --skip-bad leaves them out.",
        "1 LoRA is a copy of another (a = b). Keep one of each, as --strict --skip-bad does: of epochs the last.",
    ):
        reason = Notice("kind", message, ("a",)).reason
        assert "--" not in reason and reason.endswith(".") and message.startswith(reason[:30])
