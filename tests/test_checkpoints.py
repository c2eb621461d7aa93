"""Folders as trainers leave them: which files are read, what is said of the others, and where the labels stand."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from making import NARROW, lora, write_lora

import data
from ablation_experiment import main
from data import CollectionError, check_classes, index_collection
from loras.checkpoints import step_of

PEFT = "adapter_model.safetensors"
CLASSES = ("cat", "dog")


def trainers_folders(root: Path, *steps: str, own: str = "", each: int = 3, name: str = PEFT) -> Path:
    """<class>/<lora>/ with an adapter in each of some folders, and in ``own`` ("": the LoRA's folder) if not None."""
    for c, label in enumerate(CLASSES):
        for i in range(each):
            for s, step in enumerate([*steps, *([own] if own is not None else [])]):
                write_lora(root / label / f"{i:02}" / step / name, lora(1, seed=100 * c + 10 * i + s))
    return root


def read(root: Path, **flags) -> list[str]:
    """The files below cat/00 that are read, relative to that."""
    collection = index_collection(root, **flags)
    check_classes(collection)
    assert collection.classes == list(CLASSES)
    return [file.path.removeprefix("cat/00/") for file in collection.files if file.path.startswith("cat/00/")]


def refused(root: Path, **flags) -> list[str]:
    with pytest.raises(CollectionError) as error:
        check_classes(index_collection(root, **flags))
    return error.value.findings


# ----------------------------------------------------------------------------------------------------------------------
# The last adapter
# ----------------------------------------------------------------------------------------------------------------------

STYLES = [
    ("checkpoint-100", "checkpoint-1000"),
    ("checkpoint_2", "checkpoint_10"),
    ("step-5", "step-10"),
    ("step_000500", "step_001000"),
    ("epoch-3", "epoch-12"),
    ("epoch9", "epoch10"),
    ("global_step9", "global_step10"),
    ("checkpoint-epoch-9", "checkpoint-epoch-10"),
    ("iter_9", "iter_10"),
    ("checkpoints/step-9", "checkpoints/step-10"),
    ("checkpoints/9", "checkpoints/10"),
    ("ckpts/epoch=9", "ckpts/epoch=10"),
    ("epoch=9-step=300", "epoch=10-step=200"),
    ("lora-step00000100", "lora-step00001000"),
    ("save-100", "save-1000"),
    ("9", "10"),
]


@pytest.mark.parametrize(("first", "second"), STYLES)
def test_the_last_is_read_and_the_others_are_named(tmp_path, first, second):
    root = trainers_folders(tmp_path / "own", first, second)
    assert read(root) == [PEFT]
    (notice,) = index_collection(root).notices
    assert notice.message == (
        f"12 files in the folders of 6 LoRAs are left out ({first}, {second}): --step final takes the last of each. "
        "--step all makes each checkpoint a sample, --step N takes one."
    )
    assert notice.files == tuple(
        sorted(f"{label}/{i:02}/{step}/{PEFT}" for label in CLASSES for i in range(3) for step in (first, second))
    )
    assert read(trainers_folders(tmp_path / "none", first, second, own=None)) == [f"{second}/{PEFT}"]
    shutil.rmtree(root / "cat" / "00" / second)
    (root / "cat" / "00" / PEFT).unlink()
    assert read(root) == [f"{first}/{PEFT}"]  # whatever the other LoRAs have


@pytest.mark.parametrize("end", ["-step{:08}", "-{:06}", "_{:09}", "-e{}", " {}"])
def test_a_checkpoint_may_have_the_name_of_its_lora(tmp_path, end):
    root = tmp_path
    for label in CLASSES:
        for i in range(3):
            for step in (9, 10):
                path = root / label / f"x{i}" / f"x{i}{end.format(step)}" / "pytorch_lora_weights.safetensors"
                write_lora(path, lora(1, seed=step + i))
    collection = index_collection(root)
    assert len(collection.files) == 6 and len(collection.choice.left_out) == 6
    assert len(index_collection(root, step="9").files) == 6


def test_numbers_are_loras_where_the_second_folder_need_not_be_a_lora(tmp_path):
    for i in range(6):
        write_lora(tmp_path / "set" / f"{i}" / PEFT, lora(1, seed=i), {"category_label": "ab"[i % 2]})
        write_lora(tmp_path / "more" / f"lora-{i}" / PEFT, lora(1, seed=10 + i), {"category_label": "ab"[i % 2]})
    assert len(index_collection(tmp_path).files) == 12


# What trainers leave of their state, below <class>/<lora>/
STATES = [
    ("checkpoint-100/adapter_model.safetensors", "checkpoint-100/global_step100/mp_rank_00_model_states.pt"),
    ("epoch10/adapter_model.safetensors", "global_step500/mp_rank_00_model_states.pt"),
    ("20260101_10-00-00/epoch10/adapter_model.safetensors", "20260101_10-00-00/global_step500/layer_00.pt"),
    ("epoch_0/adapter_model.safetensors", "recipe_state/recipe_state.pt"),
    (PEFT, "checkpoint-100/optimizer.bin", "checkpoint-100/random_states_0.pkl", "checkpoint-100/scheduler.bin"),
    (PEFT, "logs/a/b/anything.pth"),
]


@pytest.mark.parametrize("below", ["cat", ""])
@pytest.mark.parametrize("state", STATES)
def test_a_trainings_state_is_ignored_and_counted(tmp_path, state, below):
    """The first folder may be the LoRA's, where a table has the labels."""
    weights, *pickles = state
    for i in range(6):
        folder = tmp_path / "zoo" / (f"{'ab'[i % 2]}/{i}" if below else f"{i}")
        write_lora(folder / weights, lora(1, seed=i))
        for name in pickles:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"\x80\x02}q\x00.")
    if not below:
        table(tmp_path / "zoo", [f"{i},{'ab'[i % 2]}" for i in range(6)])
    collection = index_collection(tmp_path / "zoo")
    check_classes(collection)
    assert len(collection.files) == 6 and collection.ignored == {"pickles in folders of LoRAs": 6 * len(pickles)}


def test_a_lora_of_pickles_alone_is_a_finding_beside_others(tmp_path):
    root = trainers_folders(tmp_path, "checkpoint-100")
    write_lora(root / "cat" / "flat.safetensors", lora(1))
    pickles = ["cat/09/adapter_model.bin", "cat/09/checkpoint-1/optimizer.pt", "cat/x.ckpt", "dog/09/x.pt", "old/y.pt"]
    for name in pickles:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\x80\x02}q\x00.")
    pickles.remove("cat/x.ckpt")  # beside *.safetensors
    told = refused(root)
    assert told == [f"{root}/{path}: a pickle checkpoint: never loaded. Convert it to safetensors." for path in pickles]


@pytest.mark.parametrize(
    "state", ["x{}-000001-state", "x{}-step00000100-state", "x{}-state", "last-state", "any-state"]
)
@pytest.mark.parametrize("place", ["cat", "cat/x{}", ""])
def test_state_folders_hold_no_lora(tmp_path, state, place):
    paths = [tmp_path / place.format(i) / f"x{i}.safetensors" for i in range(6)]
    for i, path in enumerate(paths):
        write_lora(path, lora(1, seed=i))
        folder = path.parent / state.format(i)
        write_lora(folder / "model.safetensors", lora(1, seed=10 + i))
        if state == "any-state":
            (folder / "optimizer.bin").write_bytes(b"\x80")
            (folder / "random_states_0.pkl").write_bytes(b"\x80")
    if not place:
        table(tmp_path, [f"{path.name},{'ab'[i % 2]}" for i, path in enumerate(paths)])
    collection = index_collection(tmp_path)
    assert [file.path for file in collection.files] == [path.relative_to(tmp_path).as_posix() for path in paths]
    folders = {path.parent / state.format(i) for i, path in enumerate(paths)}
    assert collection.ignored == {"folders of a training's state": len(folders)}


def test_a_class_or_lora_may_be_called_a_state(tmp_path):
    for label in ("solid-state", "route-66-state"):
        for i in range(3):
            write_lora(tmp_path / label / f"{i}-state" / PEFT, lora(1, seed=i))
    assert index_collection(tmp_path).class_counts == {"solid-state": 3, "route-66-state": 3}


@pytest.mark.parametrize("own", ["final", "last", "checkpoint-final", "checkpoints/latest", "my_style", "lora_model"])
def test_the_last_may_lie_in_a_folder_of_its_own(tmp_path, own):
    root = trainers_folders(tmp_path, "checkpoint-100", own=own)
    assert read(root) == [f"{own}/{PEFT}"]


def test_a_named_adapter_has_checkpoints_of_its_name(tmp_path):
    root = trainers_folders(tmp_path, "checkpoint-9/my_style", "checkpoint-10/my_style", own="my_style")
    assert read(root) == [f"my_style/{PEFT}"] and read(root, step="9") == [f"checkpoint-9/my_style/{PEFT}"]
    assert read(trainers_folders(tmp_path / "x", "a", own=None)) == [f"a/{PEFT}"]


def test_named_adapters_beside_the_own_one_are_left_out_and_several_are_refused(tmp_path):
    root = trainers_folders(tmp_path / "beside", "a", "b")
    assert read(root) == [PEFT] and "are left out (a, b): " in index_collection(root).notices[0].message
    root = trainers_folders(tmp_path / "several", "a", "b", own=None)
    faults = refused(root)
    assert faults[0] == (
        f"{root}/cat/00: several adapters (a, b), and none in the folder itself. Label each in a table (--labels), or "
        "keep one."
    )
    assert len(faults) == 6
    rows = [f"{label}/{i:02}/{name}/{PEFT},{label}" for label in CLASSES for i in range(3) for name in "ab"]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert read(root) == [f"a/{PEFT}", f"b/{PEFT}"]


def test_checkpoints_of_mlx_lie_beside_the_last(tmp_path):
    root = trainers_folders(tmp_path, name="adapters.safetensors")
    for name in ("0000100", "0000200"):
        trainers_folders(root, name=f"{name}_adapters.safetensors")
    trainers_folders(root, name="other.safetensors")
    assert read(root) == ["adapters.safetensors"] and read(root, step="100") == ["0000100_adapters.safetensors"]
    collection = index_collection(root)
    assert collection.ignored == {"*.safetensors beside adapters.safetensors": 6}
    assert (
        "12 files in the folders of 6 LoRAs are left out (0000100_adapters.safetensors, "
        in collection.notices[0].message
    )
    assert read(root, step="all") == ["0000100_adapters.safetensors", "adapters.safetensors"]  # 200 is the last
    for path in root.rglob("adapters.safetensors"):
        path.unlink()
    for path in root.rglob("other.safetensors"):
        path.unlink()
    assert read(root) == ["0000200_adapters.safetensors"]


# ----------------------------------------------------------------------------------------------------------------------
# One step, or all
# ----------------------------------------------------------------------------------------------------------------------


def test_a_step_is_read_of_each_lora_and_one_without_it_is_a_finding(tmp_path):
    root = trainers_folders(tmp_path, "checkpoint-100", "checkpoint-200", each=4)
    assert read(root, step="100") == [f"checkpoint-100/{PEFT}"]
    shutil.rmtree(root / "cat" / "00" / "checkpoint-100")
    (root / "dog" / "00" / "checkpoint-100").rename(root / "dog" / "00" / "checkpoint-300")
    shutil.rmtree(root / "dog" / "01" / "checkpoint-100")
    shutil.rmtree(root / "dog" / "01" / "checkpoint-200")
    remedy = "Give another --step, or leave it out."
    assert refused(root, step="100") == [
        f"{root}/cat/00: no checkpoint 100: there are 200, the last. {remedy}",
        f"{root}/dog/00: no checkpoint 100: there are 200, 300, the last. {remedy}",
        f"{root}/dog/01/{PEFT}: no checkpoint 100: it has none. {remedy}",
    ]
    collection = index_collection(root, step="100", skip_bad=True)
    assert len(collection.files) == 5 and {path.split("/")[1] for path, _ in collection.skipped} == {"00", "01"}


def test_all_steps_are_samples_that_stay_with_their_lora(tmp_path):
    root = trainers_folders(tmp_path, "checkpoint-100", "checkpoint-20")
    collection = index_collection(root, step="all")
    assert [file.path for file in collection.files[:3]] == [
        f"cat/00/{PEFT}",
        f"cat/00/checkpoint-100/{PEFT}",
        f"cat/00/checkpoint-20/{PEFT}",
    ]
    assert len(collection.files) == 18 and collection.groups.tolist() == [i // 3 for i in range(18)]
    assert not collection.notices
    check_classes(collection)
    shutil.rmtree(root / "dog" / "02")
    (finding,) = refused(root, step="all")
    assert (
        "copies and epochs, checkpoints of a LoRA among them, kept together, leave a class with fewer than " in finding
    )
    assert finding.endswith("Add LoRAs of other trainings, or leave out --step all.")


def test_both_folders_of_one_moment_are_one_sample(tmp_path):
    """The trainer saves the last step twice: as a checkpoint, and as the adapter."""
    root = trainers_folders(tmp_path, "checkpoint-100", "checkpoint-200", "checkpoints/step-100")
    for folder in root.glob("*/*"):
        shutil.copy(folder / PEFT, folder / "checkpoint-200" / PEFT)
    assert read(root, step="all") == [PEFT, f"checkpoint-100/{PEFT}"]
    assert "12 files in " in index_collection(root, step="all").notices[0].message
    assert read(root, step="200") == [f"checkpoint-200/{PEFT}"]


@pytest.mark.parametrize(("text", "step"), [("final", "final"), ("all", "all"), ("100", "100"), ("000500", "500")])
def test_values_of_the_flag(text, step):
    assert step_of(text) == step


@pytest.mark.parametrize("text", ["", "last", "-1", "1.5", "²", "9" * 13])
def test_other_values_are_refused(text, tmp_path, capsys):
    with pytest.raises(ValueError, match="is no step: give final, all or a number"):
        step_of(text)
    with pytest.raises(SystemExit) as end:
        data.main(["inspect", str(tmp_path), "--top-k=1", f"--step={text}"])
    assert end.value.code == 2 and "is no step: give final, all or a number" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Labels
# ----------------------------------------------------------------------------------------------------------------------


def test_folders_that_are_called_like_checkpoints_are_loras_where_loras_lie(tmp_path):
    """<class>/checkpoint-1/ to /checkpoint-6/: epochs of one training, or LoRAs. Nothing is dropped."""
    for label in CLASSES:
        for i in range(6):
            write_lora(tmp_path / label / f"checkpoint-{i}" / PEFT, lora(1, seed=i + 6 * (label == "cat")))
    collection = index_collection(tmp_path)
    check_classes(collection)
    assert len(collection.files) == 12 and not collection.notices and collection.groups is None


def test_epochs_in_the_place_of_loras_are_called_so_by_the_experiment(tmp_path, capsys):
    for label in CLASSES:
        for i in range(6):
            write_lora(tmp_path / "zoo" / label / f"checkpoint-{i}" / PEFT, lora(1, seed=i + 6 * (label == "cat")))
    assert data.main(["inspect", str(tmp_path / "zoo"), "--top-k=1"]) == 2
    assert "note: 12 LoRAs are epochs of 2 trainings, by their names (cat/checkpoint-0/" in capsys.readouterr().out
    flags = ["--quick", "--num-runs=1", "--representations=stats", "--device=cpu", "--top-k=1"]
    assert main(["--dataset", str(tmp_path / "zoo"), "--output-dir", str(tmp_path / "out"), *flags], NARROW) == 2
    told = capsys.readouterr().err
    assert "copies and epochs, kept together, leave a class with fewer than three groups (cat: 1, dog: 1)" in told
    assert "or --keep-twins leaves copies and epochs where they fall." in told


@pytest.mark.parametrize("label", ["checkpoint-1", "step-5", "final", "checkpoints"])
def test_classes_may_be_called_like_checkpoints(tmp_path, label):
    for name in (label, "other"):
        for i in range(3):
            write_lora(tmp_path / name / f"{i}" / PEFT, lora(1, seed=i))
            write_lora(tmp_path / name / f"{i}" / "checkpoint-7" / PEFT, lora(1, seed=i))
    collection = index_collection(tmp_path)
    assert collection.class_counts == {label: 3, "other": 3}


def test_a_deeper_file_that_no_trainer_leaves_there_has_no_label(tmp_path):
    trainers_folders(tmp_path, "checkpoint-1")
    write_lora(tmp_path / "cat" / "00" / "notes" / "x.safetensors", lora(1))
    write_lora(tmp_path / "cat" / "01" / "a" / "b" / PEFT, lora(1))
    assert [finding.split(": no label: ")[0] for finding in refused(tmp_path)] == [
        f"{tmp_path}/cat/00/notes/x.safetensors",
        f"{tmp_path}/cat/01/a/b/{PEFT}",
    ]


@pytest.mark.parametrize("own", ["", "my_style"])
def test_metadata_of_a_lora_is_of_its_checkpoints(tmp_path, own):
    for i in range(6):
        folder = tmp_path / "zoo" / f"{i}"
        write_lora(folder / "checkpoint-5" / own / PEFT, lora(1, seed=i))
        write_lora(folder / own / PEFT, lora(1, seed=10 + i))
        (folder / own / "metadata.json").write_text(json.dumps({"category_label": "ab"[i % 2], "artist": f"x{i}"}))
        (folder / own / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    collection = index_collection(tmp_path / "zoo", step="all")
    assert collection.class_counts == {"a": 6, "b": 6}
    assert collection.columns["artist"] == {file.path: f"x{file.path[0]}" for file in collection.files}
    assert {count.scale.value for file in collection.files for count in file.scales} == {4.0}
    assert index_collection(tmp_path / "zoo", group_column="artist", step="5").groups.tolist() == list(range(6))


def table(root: Path, rows: list[str], header: str = "file_name,label") -> Path:
    (root / "metadata.csv").write_text("\n".join([header, *rows]))
    return root


LORAS = [f"{label}/{i:02}" for label in CLASSES for i in range(3)]


@pytest.mark.parametrize("named", ["{}", "{}/", f"{{}}/{PEFT}", f"{{}}\\{PEFT}", "./{}"])
def test_a_table_may_name_the_lora_or_its_file(tmp_path, named):
    root = trainers_folders(tmp_path, "checkpoint-100", "checkpoint-200")
    table(root, [f"{named.format(lora)},{lora[:3]}" for lora in LORAS])
    assert read(root) == [PEFT] and len(index_collection(root).files) == 6
    if PEFT not in named:
        assert read(root, step="100") == [f"checkpoint-100/{PEFT}"] and len(read(root, step="all")) == 3


@pytest.mark.parametrize("named", [f"checkpoint-100/{PEFT}", "checkpoint-100", "checkpoint-100\\"])
def test_a_table_may_name_a_checkpoint(tmp_path, named):
    root = trainers_folders(tmp_path, "checkpoint-100", "checkpoint-200")
    table(root, [f"{lora}/{named},{lora[:3]}" for lora in LORAS])
    assert read(root, step="100") == [f"checkpoint-100/{PEFT}"]
    (finding, *_) = faults = refused(root)  # --step final takes others, which have no row
    assert len(faults) == 6 and finding.startswith(f"{root}/cat/00/{PEFT}: no label: no row for it in ")
    assert finding.endswith("Label it, or its folder cat/00, or choose another --step.")


def test_a_lora_without_the_step_is_one_finding_whatever_its_row_names(tmp_path):
    root = trainers_folders(tmp_path, "checkpoint-100", each=4)
    shutil.rmtree(root / "cat" / "00" / "checkpoint-100")
    (root / "dog" / "00" / "checkpoint-100").rename(root / "dog" / "00" / "checkpoint-200")
    table(root, [f"{label}/{i:02}{f'/{PEFT}' if i == 0 else ''},{label}" for label in CLASSES for i in range(4)])
    told = refused(root, step="100")
    assert [finding.split(": no checkpoint 100: ")[0] for finding in told] == [
        f"{root}/dog/00",
        f"{root}/cat/00/{PEFT}",
    ]
    assert index_collection(root, step="100", skip_bad=True).class_counts == {"cat": 3, "dog": 3}


def test_rows_of_what_is_left_out_are_passed_over(tmp_path):
    root = trainers_folders(tmp_path, "checkpoint-100", "checkpoint-200")
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.safetensors"))
    table(root, [f"{path},{path[:3]}" for path in files])
    assert read(root) == [PEFT] and read(root, step="200") == [f"checkpoint-200/{PEFT}"]
    assert len(index_collection(root, step="all").files) == 18
    assert index_collection(root).columns["label"] == {f"{lora}/{PEFT}": lora[:3] for lora in LORAS}


@pytest.mark.parametrize("form", ["files", "folders", "floats", "names"])
def test_a_column_step_makes_samples_of_what_the_table_names(tmp_path, form):
    root = trainers_folders(tmp_path, "checkpoint-100", "checkpoint-200")
    rows = []
    for lora_folder in LORAS:
        if form == "files":
            rows += [
                f"{lora_folder}/checkpoint-100/{PEFT},{lora_folder[:3]},100",
                f"{lora_folder}/{PEFT},{lora_folder[:3]},",
            ]
        else:
            steps = {"floats": ("100.0", "final"), "names": ("checkpoint-100", "last")}.get(form, ("100", "final"))
            rows += [f"{lora_folder},{lora_folder[:3]},{step}" for step in steps]
    table(root, rows, "file_name,label,step")
    collection = index_collection(root)
    assert read(root) == [PEFT, f"checkpoint-100/{PEFT}"] and collection.choice.step == "all"
    assert collection.groups.tolist() == [i // 2 for i in range(12)]
    assert collection.label_column == "label" and set(collection.columns) == {"label", "step"}
    assert "6 files in the folders of 6 LoRAs are left out (checkpoint-200): " in collection.notices[0].message
    assert len(index_collection(root, step="final").files) == 6  # the flag goes before
    table(root, [*rows[:-2], f"{LORAS[-1]},dog,300"], "file_name,label,step")
    told = "dog/02 has no checkpoint 300: there are 100, 200, the last. Mend the step, or remove the row."
    assert any(finding == f"{root}/metadata.csv: line {len(rows)}: {told}" for finding in refused(root))


def test_other_files_of_a_class_are_left_alone(tmp_path):
    """Files beside a folder of checkpoints, of which a table says the labels: LoRAs of their own, as before."""
    for i in range(4):
        write_lora(tmp_path / "set" / f"{i}.safetensors", lora(1, seed=i))
    write_lora(tmp_path / "set" / "checkpoint-3" / "x.safetensors", lora(1, seed=9))
    table(tmp_path, [f"set/{i}.safetensors,{i % 2}" for i in range(4)])
    collection = index_collection(tmp_path)
    assert len(collection.files) == 4 and len(collection.choice.left_out) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Through the programs
# ----------------------------------------------------------------------------------------------------------------------


def test_checkpoints_are_never_on_both_sides_of_the_split(tmp_path, capsys):
    root = trainers_folders(tmp_path / "zoo", "checkpoint-100", "global_step7", each=5)
    flags = ["--dataset", str(root), "--output-dir", str(tmp_path / "out"), "--top-k=1", "--quick", "--device=cpu"]
    flags += ["--representations=stats", "--num-runs=1"]
    assert main([*flags, "--step=all", "--keep-twins"], NARROW) == 0
    folder = tmp_path / "out" / "ablation_zoo"
    with open(folder / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    parts = {}
    for row in rows:
        parts.setdefault(row["file"][:6], set()).add(row["split"])
    assert len(rows) == 30 and len(parts) == 10 and all(len(split) == 1 for split in parts.values())
    assert json.loads((folder / "results.json").read_text())["dataset"]["step"] == "all"
    capsys.readouterr()
    assert main(flags, NARROW) == 0
    out = capsys.readouterr().out
    assert "Nothing to do" not in out
    assert re.search(
        r"^note +20 files in the folders of 10 LoRAs are left out \(checkpoint-100, global_step7\)", out, re.M
    )
    assert "20 files in the folders of 10 LoRAs are left out" in " ".join((folder / "results.txt").read_text().split())
    dataset = json.loads((folder / "results.json").read_text())["dataset"]
    assert (dataset["step"], dataset["num_samples"]) == ("final", 10)
    assert [(found["kind"], found["count"]) for found in dataset["findings"]] == [("checkpoints", 20)]


def test_inspect_says_what_is_left_out(tmp_path, capsys):
    root = trainers_folders(tmp_path, "checkpoint-100")
    assert data.main(["inspect", str(root), "--top-k=1", "--headers-only", "--strict"]) == 0  # nothing is wrong with it
    assert "note: 6 files in the folders of 6 LoRAs are left out (checkpoint-100)" in capsys.readouterr().out
    assert data.main(["inspect", str(root), "--top-k=1", "--headers-only", "--json", "--step=all"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["num_samples"], found["num_groups"], found["notices"]) == ("all", 12, 6, [])
    assert data.main(["inspect", str(root), "--top-k=1", "--headers-only", "--step=all"]) == 0
    assert "\ngroups:  6 by LoRA, with its checkpoints\n" in capsys.readouterr().out
