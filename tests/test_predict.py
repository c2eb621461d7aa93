"""Predictions of new files: the experiment's own for its test rows, whatever wrote the files; and what is refused."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from making import FILE_NAME, NARROW, STYLES, module_names, quick_runs, write_lora
from safetensors.torch import load_file
from test_house import check_schema

import ablation_experiment
import predict
from experiment import model_files, models, prediction
from report.cautions import UNFINISHED

RUN = ("update_sketch", "update_spectrum", "update_kernel", "update_views", "update_attention")
CLASSES, EACH, MODULES, RANK, WIDTH = 3, 25, 4, 2, 8  # 23 held out: 18 tell nothing of what is unlike


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(concept: int, seed: int, modules: int = MODULES, noise: float = 0.3) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA whose updates are those of its concept, and noise; numbers that float16 holds."""
    tensors = {}
    for m, name in enumerate(module_names(modules)):
        for role, shape in (("down", (RANK, WIDTH)), ("up", (WIDTH, RANK))):
            own = drawn(*shape, seed=1000 * concept + 10 * m + len(role))
            other = drawn(*shape, seed=10**6 + 1000 * seed + 10 * m + len(role))
            tensors[f"{name}.lora.{role}.weight"] = (0.1 * (own + noise * other)).half().float()
    return tensors


def experiment(folder: Path, save: str, out: str = "out", *further: str, expected: int = 0) -> Path:
    """Run the experiment; return its folder of results."""
    names = ",".join(("stats", *RUN))
    flags = ["--dataset", str(folder / "loras"), "--output-dir", str(folder / out), "--device=cpu", "--quick"]
    flags += [f"--representations={names}", f"--save-models={save}", "--cache-dir", str(folder / "cache")]
    flags += ["--top-k=3", *further]
    with pytest.MonkeyPatch.context() as patch, quick_runs():
        patch.setenv("OMP_NUM_THREADS", "1")
        assert ablation_experiment.main(flags, NARROW) == expected
    return folder / out / "ablation_loras"


def units(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("cache/*/units/*.npz")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with a collection, results that keep nothing in ``none``, and in ``out`` results that keep all."""
    folder = tmp_path_factory.mktemp("predict")
    for i in range(CLASSES * EACH):
        write_lora(folder / "loras" / f"class_{i % CLASSES}" / f"{i:03}" / FILE_NAME, planted(i % CLASSES, i))
    experiment(folder, "none", "none")
    before = units(folder)
    experiment(folder, ",".join(RUN))
    (folder / "before.json").write_text(json.dumps(sorted(before)))
    return folder


@pytest.fixture
def copied(ran, tmp_path) -> Path:
    """The folder of results, copied, to be damaged."""
    return Path(shutil.copytree(results_of(ran), tmp_path / "results"))


def results_of(ran: Path) -> Path:
    return ran / "out" / "ablation_loras"


def predicted(capsys, results: Path, *arguments: object) -> dict:
    """Return what the program prints as JSON."""
    assert predict.main([str(results), *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, results: Path, *arguments: object) -> str:
    """Return the lines by which the program refuses."""
    assert predict.main([str(results), *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert all(line.startswith("error: ") and line.endswith(".") for line in said.err.splitlines()), said.err
    return said.err


# -- what the experiment said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUN)
def test_test_rows_are_predicted_as_by_the_experiment(ran, capsys, name):
    results = results_of(ran)
    answer = predicted(capsys, results, ran / "loras", "--representation", name)
    by_file = {os.path.relpath(record["file"], ran / "loras"): record for record in answer["files"]}
    with open(results / "samples.csv", encoding="utf-8") as file:
        samples = list(csv.DictReader(file))
    arrays = np.load(results / "predictions.npz")
    expected, classes = arrays[f"baseline/{name}/predicted"], answer["classes"]
    for position, row in enumerate(arrays["rows"]):
        record = by_file[samples[row]["file"]]
        assert record["runs"] == [classes[c] for c in expected[:, position]]
        assert sum(record["probabilities"].values()) == pytest.approx(1)
        assert record["agreement"] == np.mean([run == record["label"] for run in record["runs"]])
    told = json.loads((results / "results.json").read_text())["model"]["kept"]
    assert {record["representation"]: record["same"] for record in told}[name] == 1
    flagged = [by_file[samples[row]["file"]]["unlike"]["flagged"] for row in arrays["rows"]]
    assert sum(flagged) <= 0.05 * len(flagged)


def test_what_was_kept_is_documented_and_the_best_is_first(ran):
    results = json.loads((results_of(ran) / "results.json").read_text())
    manifest = json.loads((results_of(ran) / "model" / "manifest.json").read_text())
    assert check_schema(results) == []
    assert check_schema(manifest, "model/manifest.json") == []
    accuracies = [record["validation_accuracy"] for record in manifest["kept"]]
    assert accuracies == sorted(accuracies, reverse=True) and len(accuracies) == len(RUN)
    assert results["model"]["bytes"] == sum(p.stat().st_size for p in (results_of(ran) / "model").glob("*.safetensors"))
    assert json.loads((ran / "none" / "ablation_loras" / "results.json").read_text())["model"] is None
    assert {r["dtype"] for r in manifest["kept"] if r["kind"] == "pairs"} == {"float16"}  # the files hold no more


def test_keeping_changes_no_other_unit(ran):
    before = set(json.loads((ran / "before.json").read_text()))
    new = units(ran) - before
    assert before and not [name for name in before if name.startswith("model-")]
    assert new and all(name.startswith("model-") for name in new)


# -- the same LoRA, written otherwise ---------------------------------------------------------------------------------


def padded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fill up the rank with rows and columns of zeros."""
    return {key: torch.cat([x, torch.zeros_like(x)], dim=0 if ".down." in key else 1) for key, x in tensors.items()}


def turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factorise the same updates otherwise."""
    turn, other = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), {}
    for key, x in tensors.items():
        other[key] = turn @ x if ".down." in key else x @ torch.linalg.inv(turn)
    return other


def styled(style: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    modules = [(module, role) for module in module_names(MODULES) for role in ("down", "up")]
    names = {f"{module}.lora.{role}.weight": STYLES[style](module, role) for module, role in modules}
    return {names[key]: x for key, x in tensors.items()}


WRITTEN = {
    "kohya": partial(styled, "kohya"),
    "PEFT": partial(styled, "PEFT"),
    "float64": lambda tensors: {key: x.double() for key, x in tensors.items()},
    "float16": lambda tensors: {key: x.half() for key, x in tensors.items()},
    "reversed": lambda tensors: dict(reversed(tensors.items())),
    "padded": padded,
    "turned": turned,
}


@pytest.mark.parametrize("name", RUN)
def test_another_way_of_writing_gives_the_same_numbers(ran, tmp_path, capsys, name):
    tensors = planted(1, 10**4)
    paths = [write_lora(tmp_path / "as it is.safetensors", tensors)]
    paths += [write_lora(tmp_path / f"{way}.safetensors", write(tensors)) for way, write in WRITTEN.items()]
    first, *others = predicted(capsys, results_of(ran), *paths, "--representation", name)["files"]
    assert first["label"] == "class_1"
    for other in others:
        assert other["runs"] == first["runs"]
        assert list(other["probabilities"].values()) == pytest.approx(list(first["probabilities"].values()), abs=1e-5)
        assert other["unlike"]["score"] == pytest.approx(first["unlike"]["score"], rel=1e-4)


def test_bfloat16_is_read(ran, tmp_path, capsys):
    tensors = {key: x.bfloat16() for key, x in planted(2, 10**4).items()}
    paths = [write_lora(tmp_path / "bf16.safetensors", tensors)]
    paths += [write_lora(tmp_path / "wide.safetensors", {key: x.float() for key, x in tensors.items()})]
    one, other = predicted(capsys, results_of(ran), *paths)["files"]
    assert {**one, "file": ""} == {**other, "file": ""}


# -- what is unlike those of training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("update_sketch", "update_kernel", "update_views", "update_attention"))
def test_what_no_train_lora_is_like_is_flagged(ran, tmp_path, capsys, name):
    usual = planted(0, 10**4)
    strange = {
        "untrained": {key: x if ".down." in key else torch.zeros_like(x) for key, x in usual.items()},
        "large": {key: x if ".down." in key else 100 * x for key, x in usual.items()},
        "noise": planted(77, 10**4),  # of a concept that is none of them
    }
    paths = [write_lora(tmp_path / f"{key}.safetensors", tensors) for key, tensors in strange.items()]
    like = [write_lora(tmp_path / f"like {i}.safetensors", planted(i % 3, 10**4 + i)) for i in range(20)]
    records = predicted(capsys, results_of(ran), *paths, *like, "--representation", name)["files"]
    flagged = {Path(record["file"]).stem: record["unlike"]["flagged"] for record in records}
    assert [key for key in strange if not flagged[key]] == []
    assert sum(flagged[path.stem] for path in like) <= 5


# -- files that cannot be predicted -----------------------------------------------------------------------------------


def test_a_missing_module_is_named_or_taken_as_no_update(ran, tmp_path, capsys):
    tensors = {key: x for key, x in planted(1, 10**4).items() if "attentions.2" not in key}
    path = write_lora(tmp_path / "short.safetensors", tensors)
    said = refused(capsys, results_of(ran), path)
    assert "lacks 1 module (unet_down_blocks_0_attentions_2" in said and "--missing zero" in said
    whole = planted(1, 10**4)
    whole = {key: torch.zeros_like(x) if "attentions.2" in key and ".up." in key else x for key, x in whole.items()}
    zeros = write_lora(tmp_path / "zeros.safetensors", whole)
    for name in RUN:
        how = (path, zeros, "--missing", "zero", "--representation", name)
        one, other = predicted(capsys, results_of(ran), *how)["files"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_further_modules_are_named_or_passed_over(ran, tmp_path, capsys):
    path = write_lora(tmp_path / "more.safetensors", planted(1, 10**4, modules=MODULES + 1))
    assert "adds 1 module (unet_down_blocks_0_attentions_4" in refused(capsys, results_of(ran), path)
    plain = write_lora(tmp_path / "plain.safetensors", planted(1, 10**4))
    one, other = predicted(capsys, results_of(ran), path, plain, "--extra", "ignore")["files"]
    assert one["probabilities"] == other["probabilities"]


def test_all_that_is_faulty_is_listed_and_can_be_left_out(ran, tmp_path, capsys):
    good = write_lora(tmp_path / "a good one.safetensors", planted(2, 10**4))
    nan = {key: x.clone() for key, x in planted(1, 10**4).items()}
    next(iter(nan.values()))[0, 0] = float("nan")
    wide = {key: torch.cat([x, x], dim=1) if ".down." in key else x for key, x in planted(1, 10**4).items()}
    write_lora(tmp_path / "nan.safetensors", nan)
    write_lora(tmp_path / "wide.safetensors", wide)
    write_lora(tmp_path / "other.safetensors", {"text_model.lora_A.weight": torch.ones(2, 8)})
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-9])
    said = refused(capsys, results_of(ran), tmp_path)
    assert {word for word in ("wide.safetensors", "other.safetensors", "cut.safetensors") if word in said} == {
        "wide.safetensors",
        "other.safetensors",
        "cut.safetensors",
    }
    assert "another base model" in said
    said = refused(capsys, results_of(ran), tmp_path / "nan.safetensors", tmp_path / "not there.safetensors")
    assert "not there.safetensors: no such file or folder" in said
    assert "NaN" in refused(capsys, results_of(ran), tmp_path / "nan.safetensors")
    answer = predicted(capsys, results_of(ran), tmp_path, "--skip-bad")
    assert [record["label"] for record in answer["files"]] == ["class_2"]
    assert sorted(Path(record["file"]).stem for record in answer["skipped"]) == ["cut", "nan", "other", "wide"]
    assert "cut.safetensors" in refused(capsys, results_of(ran), tmp_path / "cut.safetensors", "--skip-bad")


def test_an_empty_folder_and_a_pickle_are_refused(ran, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no *.safetensors" in refused(capsys, results_of(ran), tmp_path / "empty")
    (tmp_path / "lora.pt").write_bytes(b"")
    assert "nothing else is read" in refused(capsys, results_of(ran), tmp_path / "lora.pt")


@pytest.mark.slow
def test_modules_that_the_experiment_left_out_are_passed_over(ran, tmp_path, capsys):
    results = experiment(ran, "update_sketch,update_views", "fewer", "--layers=!attentions.3", "--top-k=1")
    capsys.readouterr()
    tensors = planted(1, 10**4)
    short = {key: x for key, x in tensors.items() if "attentions.3" not in key}
    paths = [write_lora(tmp_path / "a.safetensors", tensors), write_lora(tmp_path / "b.safetensors", short)]
    for name in ("update_sketch", "update_views"):
        one, other = predicted(capsys, results, *paths, "--representation", name)["files"]
        assert {**one, "file": ""} == {**other, "file": ""} and one["label"] == "class_1"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2**30, 8 * 2 * MODULES * 2 * 3 * WIDTH])
def test_two_classes_of_several_ranks(tmp_path, capsys, monkeypatch, limit):
    for i in range(30):
        tensors = planted(i % 2, i)
        tensors = padded(tensors) if i % 3 == 0 else tensors
        write_lora(tmp_path / "loras" / f"class_{i % 2}" / f"{i:03}" / FILE_NAME, tensors)
    monkeypatch.setattr(models, "keep", partial(models.keep, limit=limit))
    results = experiment(tmp_path, "update_kernel,update_views")
    told = json.loads((results / "results.json").read_text())["model"]["kept"]
    assert {record["kind"] for record in told} == {"pairs" if limit == 2**30 else "rest"}
    assert [record["same"] for record in told] == [1.0, 1.0]
    capsys.readouterr()
    for record in told:
        answer = predicted(capsys, results, tmp_path / "loras", "--representation", record["representation"])
        right = [record["label"] == Path(record["file"]).parent.parent.name for record in answer["files"]]
        assert np.mean(right) > 0.9


# -- forms of output --------------------------------------------------------------------------------------------------


def test_csv_and_table(ran, tmp_path, capsys):
    path = write_lora(tmp_path / "=new, one.safetensors", planted(1, 10**4))
    assert predict.main([str(results_of(ran)), os.path.relpath(path), "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["label"] == "class_1" and 1 / 3 < float(row["probability"]) <= 1 and row["unlike"] == "false"
    assert predict.main([str(results_of(ran)), str(path), "--representation", "update_attention"]) == 0
    table = capsys.readouterr().out
    assert "update_attention (3 runs)" in table and "most for it: unet_down_blocks" in table
    assert predict.main([str(results_of(ran)), str(path), "--representation", "stats"]) == 2
    assert "not kept" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["cat/one", "cat", "."])
def test_the_last_checkpoint_of_a_training_is_read(tmp_path, monkeypatch, place):
    for step in (10, 20, 60):
        write_lora(tmp_path / "cat" / "one" / f"checkpoint-{step}" / FILE_NAME, planted(1, step))
    monkeypatch.chdir(tmp_path)
    found, findings = prediction.find([Path(place)])
    assert [new.shown for new in found] == [f"cat/one/checkpoint-60/{FILE_NAME}"] and not findings
    monkeypatch.chdir(tmp_path / "cat" / "one")
    found, _ = prediction.find([Path(".")])
    assert [new.shown for new in found] == [f"checkpoint-60/{FILE_NAME}"]


def test_contributions_of_modules_add_up_to_the_score(ran, capsys, monkeypatch):
    batches = []
    real = prediction.predict
    monkeypatch.setattr(prediction, "predict", lambda *arguments: batches.append(real(*arguments)) or batches[-1])
    answer = predicted(capsys, results_of(ran), ran / "loras", "--representation", "update_attention")
    tensors = load_file(results_of(ran) / "model" / "update_attention.safetensors")
    bias = tensors["parameters.class_bias"].flatten(1).mean(0).numpy()  # over the runs, of each class
    scores = np.concatenate([batch.scores for batch in batches], axis=1).mean(0)
    for record, score in zip(answer["files"], scores, strict=True):
        added = [entry["contribution"] for entry in record["modules"]]
        assert added == sorted(added, reverse=True) and len(added) == MODULES
        label = answer["classes"].index(record["label"])
        assert sum(added) + bias[label] - bias.mean() == pytest.approx(score[label] - score.mean(), abs=1e-5)
    assert predicted(capsys, results_of(ran), ran / "loras" / "class_1")["files"][0]["modules"] is None


def record_of(bound: float | None, *contributions: float, runs: int = 3) -> dict:
    unlike = {"score": 3.25, "bound": bound, "flagged": bound is not None and bound < 3.25}
    modules = [{"module": f"m{i}", "contribution": added} for i, added in enumerate(contributions)]
    shares = {"probability": 0.5, "agreement": 1.0, "runs": runs * ["b"]}
    return {"file": "a", "label": "b", "unlike": unlike, "modules": modules} | shares


def test_the_table_names_what_speaks_for_the_label_and_says_what_cannot_be_measured():
    table = predict.predicted.table([record_of(2.0, 0.5, 0.1, -0.2), record_of(4.0, -0.1, -0.2), record_of(None)], [])
    _, first, second, third, fourth = table.splitlines()
    assert first.endswith("unlike anything in training (3.2, usual up to 2.0)") and second == "  most for it: m0, m1"
    assert third.split() == ["a", "b", "50.0", "%", "100", "%"]
    assert fourth.endswith("not measurable: too few held-out LoRAs")
    assert predict.predicted.table([record_of(4.0, runs=1)], []).split()[-1] == "-"  # of one nothing can differ
    assert predict.predicted.as_csv([record_of(None)], str).splitlines()[1] == "a,b,0.500000,1.000000,false,3.25,"


def test_help_takes_no_time_and_a_mistake_is_a_line(ran):
    program = str(Path(predict.__file__))
    shown = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True, check=True)
    assert "--skip-bad" in shown.stdout
    wrong = subprocess.run([sys.executable, program, "a", "b", "--jsn"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "Did you mean --json?" in wrong.stderr and wrong.stderr.count("\n") == 1


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_alone_is_enough(ran, copied, tmp_path, capsys):
    moved = shutil.move(copied / "model", tmp_path / "elsewhere")
    one = predicted(capsys, Path(moved), ran / "loras" / "class_1")
    assert one == predicted(capsys, results_of(ran), ran / "loras" / "class_1")
    assert "no model/ in it" in refused(capsys, copied, ran / "loras")
    assert "no such folder" in refused(capsys, tmp_path / "nowhere" / "at all", ran / "loras")


def test_each_file_that_is_damaged_is_refused(ran, copied, capsys):
    for path in sorted((copied / "model").iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
        assert path.name in refused(capsys, copied, ran / "loras")
        path.unlink()
        assert path.name in refused(capsys, copied, ran / "loras") or path.name == "manifest.json"
        path.write_bytes(content)
    assert predict.main([str(copied), str(ran / "loras")]) == 0


def edited(folder: Path, change) -> None:
    """Edit a manifest, and seal it again."""
    path = folder / "model" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest.pop("digest", None)
    path.write_bytes(model_files.canonical_json({**manifest, "digest": model_files._digest(manifest)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format=2), "its format is not 1"),
        (lambda m: m["results"].update(config="0"), "belongs to other results"),
        (lambda m: m.pop("modules"), "no manifest of a model"),
        (lambda m: m["files"].update({"../x.safetensors": "0"}), "a file of a name"),
    ],
)
def test_another_format_results_or_paths_out_of_the_folder_are_refused(ran, copied, capsys, change, words):
    edited(copied, change)
    assert words in refused(capsys, copied, ran / "loras")


def test_results_of_something_else_beside_it_are_refused(ran, copied, capsys):
    results = json.loads((copied / "results.json").read_text())
    results["dataset"]["fingerprint"] = "0" * 16
    (copied / "results.json").write_text(json.dumps(results))
    assert "belongs to other results" in refused(capsys, copied, ran / "loras")


def test_another_version_is_noted(ran, copied, capsys):
    edited(copied, lambda manifest: manifest["versions"].update(torch="0.1"))
    assert predict.main([str(copied), str(ran / "loras")]) == 0
    assert "note: made with torch 0.1" in capsys.readouterr().err


def test_a_damaged_folder_is_made_again_and_nothing_else(ran, capsys):
    results, before = results_of(ran), units(ran)
    manifest = (results / "model" / "manifest.json").read_bytes()
    experiment(ran, ",".join(RUN))
    assert "Nothing to do" in capsys.readouterr().out
    path = next((results / "model").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    experiment(ran, ",".join(RUN))
    assert (results / "model" / "manifest.json").read_bytes() == manifest
    assert units(ran) == before and not (results / "previous").exists()
    assert json.loads((results / "results.json").read_text())["not_done"] == {}


def test_results_are_written_though_the_folder_cannot_be(ran, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(models, "write_tensors", full)
    results = experiment(ran, "best", "full", expected=3)
    assert "No space left on device" in capsys.readouterr().out
    told = json.loads((results / "results.json").read_text())
    assert told["model"] is None and "No space left" in told["not_done"]["model"] and told["analysis"]
    assert not (results / "model").exists()


def test_a_fault_while_keeping_costs_no_analysis(ran, capsys, monkeypatch):
    def faulty(*_):
        raise LookupError("a mistake of the program")

    with monkeypatch.context() as patch, pytest.raises(LookupError):
        patch.setattr(models, "keep", faulty)
        experiment(ran, "update_sketch,update_views", "faulty")
    results = ran / "faulty" / "ablation_loras"
    told = json.loads((results / "results.json").read_text())
    assert told["analysis"] and told["model"] is None and told["not_done"] == {"model": UNFINISHED}
    assert UNFINISHED in (results / "results.txt").read_text()

    real = models._done

    def flipped(*arguments):
        parts = real(*arguments)
        if "coefficients" not in parts[0]:  # not the support vector machine
            changed = parts[0]["predicted"].copy()
            changed[0, :2] = (changed[0, :2] + 1) % CLASSES
            parts[0] = {**parts[0], "predicted": changed}
        return parts

    monkeypatch.setattr(models, "_done", flipped)
    experiment(ran, "update_sketch,update_views", "faulty")
    after = json.loads((results / "results.json").read_text())
    assert after["analysis"] == told["analysis"] and after["not_done"] == {}
    assert UNFINISHED not in (results / "results.txt").read_text()
    assert [record["representation"] for record in after["model"]["kept"]] == ["update_views"]
    (left_out,) = after["model"]["not_kept"]
    held_out = 3 * sum(after["dataset"]["split_sizes"][part] for part in ("validation", "test"))
    assert f"predicts 2 of {held_out} held-out LoRAs otherwise, over 3 runs: another kind" in left_out["reason"]
    assert "model/ is without update_sketch: trained again it predicts" in capsys.readouterr().out


def test_held_out_loras_are_predicted_in_blocks(ran, monkeypatch):
    read, seen = models._reader, []

    def watched(experiment, rows):
        factors = read(experiment, rows)

        def of_module(module, part=None):
            seen.append((len(rows), part if part is None else len(part)))
            return factors(module, part)

        return of_module

    kept = "update_sketch,update_views,update_attention"
    monkeypatch.setattr(models, "NUMBERS_AT_ONCE", 1000)
    monkeypatch.setattr(models, "FACTORS_AT_ONCE", 3 * RANK * WIDTH)
    whole = json.loads((results_of(ran) / "model" / "manifest.json").read_text())["kept"]
    monkeypatch.setattr(models, "_reader", watched)
    results = experiment(ran, kept, "blocks")
    blocks = [size for size in seen if size[1]]  # factors of the columns are read without it
    assert blocks and max(part for _, part in blocks) == 3 and len({rows for rows, _ in blocks}) > 1
    expected = {record["representation"]: record for record in whole}
    for record in json.loads((results / "model" / "manifest.json").read_text())["kept"]:
        one = expected[record["representation"]]
        assert record["same"] == 1 and record["log_loss"] == pytest.approx(one["log_loss"], abs=1e-5)
        assert record["usual"]["bound"] == pytest.approx(one["usual"]["bound"], rel=1e-3)


@pytest.mark.slow
def test_a_machine_on_landmarks_is_told_by_its_own_accuracy(tmp_path, capsys, monkeypatch):
    for i in range(90):
        write_lora(tmp_path / "loras" / f"class_{i % 3}" / f"{i:03}" / FILE_NAME, planted(i % 3, i, noise=1.3))
    monkeypatch.setattr(models, "keep", partial(models.keep, limit=4 * 2 * MODULES * 2 * RANK * WIDTH))
    results = experiment(tmp_path, "update_views,update_sketch")
    told = json.loads((results / "results.json").read_text())
    capsys.readouterr()
    with open(results / "samples.csv", encoding="utf-8") as file:
        validation = {row["file"]: row["label"] for row in csv.DictReader(file) if row["split"] == "val"}
    accuracies = []
    for record in told["model"]["kept"]:
        answer = predicted(capsys, results, tmp_path / "loras", "--representation", record["representation"])
        runs = {os.path.relpath(file["file"], tmp_path / "loras"): file["runs"] for file in answer["files"]}
        right = np.mean([[run == label for run in runs[file]] for file, label in validation.items()])
        assert record["validation_accuracy"] == pytest.approx(right)
        accuracies.append(record["validation_accuracy"])
    assert accuracies == sorted(accuracies, reverse=True)
    told_of_all = told["baseline_results"]["update_views"]["val_accuracy"]["mean"]
    assert told_of_all not in [r["validation_accuracy"] for r in told["model"]["kept"] if r["kind"] == "rest"]


def test_few_landmarks_where_factors_are_too_large(ran, capsys, monkeypatch):
    monkeypatch.setattr(models, "keep", partial(models.keep, limit=20 * 2 * MODULES * 2 * RANK * WIDTH))
    results = experiment(ran, "update_views,update_sketch", "few")
    (told,) = (r for r in json.loads((results / "results.json").read_text())["model"]["kept"] if r["kind"] == "rest")
    assert 3 <= told["landmarks"] < 20 and told["same"] >= 0.9
    capsys.readouterr()
    answer = predicted(capsys, results, ran / "loras", "--representation", "update_views")
    right = [record["label"] == Path(record["file"]).parent.parent.name for record in answer["files"]]
    assert np.mean(right) > 0.9
    # Results of other settings go, with their model, where earlier results go.
    experiment(ran, "update_sketch", "few")
    assert (results / "previous" / "1" / "model" / "update_views.safetensors").exists()
    assert not (results / "model" / "update_views.safetensors").exists()


def test_the_console_says_what_is_kept_and_what_is_not():
    missing = [{"representation": "update_kernel", "reason": "it was not run"}]
    model = {"kept": [{"representation": "update_views"}], "bytes": 2**20, "not_kept": missing}
    lines = predict.predicted.model_lines({"model": model}, Path("some results"))
    assert lines == [
        "  model/ keeps update_views (1.0 MiB): python predict.py 'some results' FILE_OR_FOLDER",
        "  model/ is without update_kernel: it was not run",
    ]
    assert predict.predicted.model_lines({"model": None}, Path()) == []


def test_a_link_in_the_place_of_a_file_is_refused(ran, tmp_path, capsys):
    copy = shutil.copytree(results_of(ran), tmp_path / "results")
    path = copy / "model" / "update_views.safetensors"
    outside = tmp_path / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    assert "update_views.safetensors: missing or damaged" in refused(capsys, copy, ran / "loras")
