import csv
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from making import FILE_NAME, NARROW, planted_collection, quick_runs, write_collection
from safetensors.torch import load_file, save_file
from test_house import check_schema, undocumented_arrays

import ablation_experiment
import autoencoders
from ablation_experiment import RESULT_FILES, main
from experiment import extraction, header, inputs, plans, settings
from experiment.engine import Engine
from experiment.settings import Networks
from loras import digits_zoo, memory
from report import figures, text
from representations import OF_WEIGHTS, REPRESENTATIONS
from training.stacks import Stored

ROOT = Path(ablation_experiment.__file__).parent


# Hidden layers a quarter as wide: the same program, in a fraction of the time.
NETWORKS = Networks(classifier=(128, 128, 128), autoencoder=(64, 32), attention=(16,), projection=(32, 32, 32))


def run(tmp_path, dataset, *flags, out="out", expected=0, networks=NETWORKS):
    """Run the program on a folder; its results.json, or None where it is expected to fail."""
    folder = tmp_path / out
    assert main(["--dataset", str(dataset), "--output-dir", str(folder), "--device=cpu", *flags], networks) == expected
    if expected == 2:
        return None
    results = json.loads((folder / f"ablation_{Path(dataset).name}" / "results.json").read_text())
    assert check_schema(results) == []
    return results


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """180 LoRAs of 3 classes and 8 layers, three of which carry the class; and their names."""
    root = tmp_path_factory.mktemp("collections") / "planted"
    return root, planted_collection(root, per_class=60)


@pytest.fixture(scope="module")
def everything(planted, tmp_path_factory):
    """All representations on the planted collection, run once for all tests that look at the results."""
    out = tmp_path_factory.mktemp("everything")
    with quick_runs():
        return out / "out" / "ablation_planted", run(out, planted[0], "--top-k=3", "--quick")


# -- what the experiment finds --------------------------------------------------------------------------


def test_planted_layers_are_ranked_first_and_stats_fall_to_chance_without_them(planted, everything):
    _, results = everything
    assert sorted(results["top_layers"]) == sorted(planted[1])
    ranking = results["layer_ranking"]
    assert min(layer["accuracy"] for layer in ranking[:3]) > 0.8
    tolerance = 3 * (1 / 3 * 2 / 3 / 36) ** 0.5  # three standard errors of chance on 36 test rows
    assert max(layer["accuracy"] for layer in ranking[3:]) < 1 / 3 + tolerance
    assert results["baseline_results"]["stats"]["test_accuracy"]["mean"] > 0.9
    assert abs(results["ablation_results"]["stats"]["test_accuracy"]["mean"] - 1 / 3) < tolerance


def test_shuffled_labels_give_chance(tmp_path):
    planted_collection(tmp_path / "shuffled", per_class=60, shuffle=True)
    results = run(tmp_path, tmp_path / "shuffled", "--top-k=3", "--quick", "--representations=stats,update_sketch")
    accuracies = [layer["accuracy"] for layer in results["layer_ranking"]]
    assert abs(np.mean(accuracies) - 1 / 3) < 0.1
    for name in ("stats", "update_sketch"):
        assert abs(results["baseline_results"][name]["test_accuracy"]["mean"] - 1 / 3) < 0.25


OF_EACH_KIND = [
    *("flat_vec", "stats", "pca", "coupling", "vae", "update_kernel", "update_sketch"),
    *(name for name, row in REPRESENTATIONS.items() if row.made == "trained"),
]


@pytest.mark.parametrize("names", [OF_EACH_KIND, pytest.param([*OF_WEIGHTS], marks=pytest.mark.slow)])
def test_changing_the_test_files_leaves_every_train_and_validation_figure_unchanged(planted, tmp_path, names):
    root, flags = tmp_path / "planted", ("--top-k=3", "--quick", "--rank-by=val", "--num-runs=1")
    flags += (f"--representations={','.join(names)}",)
    shutil.copytree(planted[0], root)
    before = run(tmp_path, root, *flags, out="before", networks=NARROW)
    table = csv.DictReader((tmp_path / "before" / "ablation_planted" / "samples.csv").open())
    generator = torch.Generator().manual_seed(0)
    for row in table:
        if row["split"] == "test":
            tensors = load_file(root / row["file"])
            noise = {name: 3 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
            save_file(noise, root / row["file"])
    after = run(tmp_path, root, *flags, out="after", networks=NARROW)
    assert before["dataset"]["fingerprint"] != after["dataset"]["fingerprint"]
    assert before["top_layers"] == after["top_layers"]
    for condition in ("baseline_results", "ablation_results"):
        assert before[condition].keys() == set(names)
        for name in names:
            for metric in ("train_accuracy", "val_accuracy", "train_f1", "val_f1"):
                assert before[condition][name][metric] == after[condition][name][metric], (name, metric)
    for was, now in zip(before["layer_ranking"], after["layer_ranking"], strict=True):
        assert was["val_accuracy"] == now["val_accuracy"]
    stats = "baseline_results", "stats", "test_accuracy", "mean"
    assert value(before, *stats) > 0.75 > value(after, *stats)


def value(results, *path):
    for key in path:
        results = results[key]
    return results


def test_rank_by_names_the_accuracy_that_ranks(everything, planted, tmp_path):
    by_test = everything[1]["layer_ranking"]
    flags = ("--top-k=3", "--quick", "--rank-by=val", "--representations=stats")
    by_val = run(tmp_path, planted[0], *flags)["layer_ranking"]
    assert [layer["accuracy"] for layer in by_test] == sorted((layer["accuracy"] for layer in by_test), reverse=True)
    assert [layer["val_accuracy"] for layer in by_val] == sorted(
        (layer["val_accuracy"] for layer in by_val), reverse=True
    )
    assert {layer["layer"]: layer for layer in by_val} == {layer["layer"]: layer for layer in by_test}


def test_a_layer_is_removed_with_its_columns_and_a_pair_with_either_of_its_layers(planted, everything):
    _, results = everything
    baseline, ablation = results["baseline_results"], results["ablation_results"]
    # Depths 1, 4 and 6 of 8 belong to modules 0, 2 and 3 of 4: one pair is left.
    for name, representation in ((name, REPRESENTATIONS[name]) for name in OF_WEIGHTS):
        if representation.unit == "pair":  # a kernel is counted once a pair
            assert baseline[name]["num_features"] == 4 * max(1, len(representation.feature_names))
            assert ablation[name]["num_features"] == max(1, len(representation.feature_names))
            assert (baseline[name]["num_layers"], ablation[name]["num_layers"]) == (8, 2)
        else:
            assert (baseline[name]["num_layers"], ablation[name]["num_layers"]) == (8, 5)
        if (representation.unit, representation.made) == ("layer", "computed"):
            assert ablation[name]["num_features"] == 5 * len(representation.feature_names)
    assert baseline["flat_vec"]["num_features"] == 8 * 16 and ablation["flat_vec"]["num_features"] == 5 * 16
    assert baseline["pca"]["num_features"] == 100 and ablation["pca"]["num_features"] == 5 * 16
    assert baseline["vae"]["num_features"] == 8 * 2 and ablation["contrastive"]["num_features"] == 5 * 4


def test_layers_that_do_not_match_play_no_part(planted, everything, tmp_path):
    """Modules 1 and 2 of 4, of whose layers depth 4 is planted; the others are neither ranked nor read by any."""
    names = [name for name, row in REPRESENTATIONS.items() if row.made in ("computed", "flat", "pca")] + ["vae"]
    flags = ("--top-k=1", "--quick", "--layers=attentions.1,attentions_2", f"--representations={','.join(names)}")
    results = run(tmp_path, planted[0], *flags)
    assert len(results["layer_ranking"]) == 4 == results["dataset"]["num_layers_selected"]
    assert results["top_layers"] == [planted[1][1]]
    of_all = {layer["layer"]: layer["accuracy"] for layer in everything[1]["layer_ranking"]}
    for layer in results["layer_ranking"]:  # it does not matter what a layer is stacked with
        assert layer["accuracy"] == pytest.approx(of_all[layer["layer"]], abs=0.03)
    baseline, ablation = results["baseline_results"], results["ablation_results"]
    for name, representation in REPRESENTATIONS.items():
        count = len(representation.feature_names)
        if representation.made != "computed":
            continue
        if representation.unit == "pair":
            assert (baseline[name]["num_features"], ablation[name]["num_features"]) == (2 * count, count)
        else:
            assert (baseline[name]["num_features"], ablation[name]["num_features"]) == (4 * count, 3 * count)
    assert (baseline["flat_vec"]["num_features"], ablation["flat_vec"]["num_features"]) == (4 * 16, 3 * 16)
    assert (baseline["pca"]["num_features"], ablation["vae"]["num_features"]) == (4 * 16, 3 * 2)
    assert baseline["stats"]["test_accuracy"]["mean"] > 0.7 > 0.6 > ablation["stats"]["test_accuracy"]["mean"]
    text = (tmp_path / "out" / "ablation_planted" / "results.txt").read_text()
    assert (
        "4 of them match attentions.1,attentions_2" in text and "with all 4 layers" in text and "1 of 2 pairs" in text
    )


def test_layers_without_a_whole_pair_leave_out_what_needs_one(tmp_path):
    root = write_collection(tmp_path / "small", classes=2, per_class=6)
    flags = ("--top-k=1", "--quick", "--layers=.down.weight", "--representations=stats,coupling", "--controls=basic")
    results = run(tmp_path, root, *flags, expected=3)
    assert results["analysis"]["rank_structure"]["tested"] is None
    assert results["representations_not_run"] == [
        {"representation": "coupling", "reason": "--layers leaves no pair whole"}
    ]
    assert {layer["role"] for layer in results["layer_ranking"]} == {"down"}


# -- the files ------------------------------------------------------------------------------------------


def test_results_hold_what_the_design_names(everything):
    folder, results = everything
    assert sorted(RESULT_FILES) == sorted(settings.RESULT_NAMES)
    assert {path.name for path in folder.iterdir()} == {*RESULT_FILES, settings.MODEL_FOLDER}
    assert {"schema_version", "dataset", "config", "layer_ranking", "top_layers", "ablation_results",
            "baseline_results", "environment", "timing", "representations_not_run"} <= results.keys()  # fmt: skip
    assert {"name", "source", "path", "num_samples", "num_classes", "classes", "class_counts", "split_sizes",
            "num_layers", "fingerprint", "skipped"} <= results["dataset"].keys()  # fmt: skip
    assert list(results["timing"]) == [*ablation_experiment.Stopwatch.PHASES, "total"]
    assert list(results["timing"])[:6] == ["index", "features", "ranking", "autoencoders", "ablation", "baseline"]
    assert results["analysis"]["controls"] == results["config"]["controls"] == "none"  # --quick
    assert results["analysis"]["robustness"] == {} and results["not_done"] == {}
    assert results["dataset"]["source"] == "files" and results["config"]["quick"] and results["config"]["num_runs"] == 3
    top = json.loads((folder / "top_layers.json").read_text())
    assert top == results["layer_ranking"][:3] and len(results["layer_ranking"]) == 8
    assert list(top[0]) == ["layer", "accuracy", "accuracy_std", "val_accuracy", "module", "role", "block"]
    entry = results["baseline_results"]["stats"]
    assert list(entry) == ["num_layers", "num_features", "train_accuracy", "val_accuracy", "test_accuracy", "train_f1",
                           "val_f1", "test_f1"]  # fmt: skip
    for metric in list(entry)[2:]:
        assert entry[metric]["mean"] == pytest.approx(np.mean(entry[metric]["runs"]))
        assert entry[metric]["std"] == pytest.approx(np.std(entry[metric]["runs"], ddof=1))


def test_samples_and_predictions_belong_to_the_figures(everything, planted):
    folder, results = everything
    rows = list(csv.DictReader((folder / "samples.csv").open()))
    assert len(rows) == 180 and all((planted[0] / row["file"]).exists() for row in rows)
    assert [sum(row["split"] == part for row in rows) for part in ("train", "val", "test")] == [126, 18, 36]
    predictions = np.load(folder / "predictions.npz")
    labels = [rows[i]["label"] for i in predictions["rows"]]
    assert [results["dataset"]["classes"][c] for c in predictions["y"]] == labels
    assert [rows[i]["split"] for i in predictions["rows"]] == ["val"] * 18 + ["test"] * 36
    right = (predictions["ablation/spectral/predicted"] == predictions["y"])[:, 18:].mean(1)
    assert right.tolist() == results["ablation_results"]["spectral"]["test_accuracy"]["runs"]
    assert predictions["layers/predicted"].shape == (8, 3, 54) and predictions["layers/epochs"].max() <= 30


def test_results_txt_tells_what_was_run_and_chance(everything):
    text = (everything[0] / "results.txt").read_text()
    for expected in ("--quick", "180 LoRAs of 8 layers", "126 train, 18 validation, 36 test", "accuracy 33.3",
                     "3 of 4 pairs", "18 validation LoRAs", "--rank-by=val"):  # fmt: skip
        assert expected in text
    assert all(f"\n{name} " in text for name in OF_WEIGHTS)
    assert max(len(line) for line in text.splitlines() if "_blocks" not in line) <= 120  # their names are never cut
    assert max(map(len, text.splitlines())) <= 150


def test_results_txt_is_rendered_from_results_json_alone(everything):
    folder, results = everything
    assert text.render_text(results) == (folder / "results.txt").read_text()
    results = json.loads(json.dumps(results))
    results["config"]["rank_by"], results["config"]["quick"] = "val", False
    results["dataset"]["split_sizes"]["validation"] = 50
    rendered = text.render_text(results)
    assert "ranked by validation accuracy" in rendered
    assert not any(words in rendered for words in ("--rank-by=val", "--quick", "Early stopping"))


@pytest.mark.slow
def test_two_runs_with_separate_caches_give_the_same_bytes(everything, planted, tmp_path):
    folder, _ = everything
    run(tmp_path, planted[0], "--top-k=3", "--quick")
    again = tmp_path / "out" / "ablation_planted"
    for name in RESULT_FILES:
        first, second = (folder / name).read_bytes(), (again / name).read_bytes()
        if name == "results.json":
            first, second = json.loads(first), json.loads(second)
            for results in (first, second):
                del results["environment"], results["timing"]
        assert first == second, name


# -- the analysis ---------------------------------------------------------------------------------------

ANALYSED = ("--top-k=3", "--quick", "--controls=basic", "--representations=stats,spectral,update_sketch")


def files_in(folder):
    """Bytes of every file, by path in the folder; results.json without what differs from run to run."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    results = json.loads(found["results.json"])
    return found | {"results.json": {key: results[key] for key in results if key not in ("environment", "timing")}}


@pytest.fixture(scope="module")
def analysed(planted, tmp_path_factory):
    """The planted collection with controls."""
    out = tmp_path_factory.mktemp("analysed")
    return out / "out" / "ablation_planted", run(out, planted[0], *ANALYSED, networks=NARROW)


def test_the_analysis_says_what_was_planted(analysed, planted):
    folder, results = analysed
    found = results["analysis"]
    above = [record["layer"] for record in found["layers"]["records"] if record["above_null"]]
    assert sorted(above) == sorted(planted[1])
    robust = found["robustness"]["stats"]  # of five other layers there are ten choices of three
    assert robust["verdict"] == "undecided" and "too few others" in robust["why"] and robust["half_gone"] <= 3
    assert len(found["hypotheses"]) == 5 and "norms" in found["cheap"]["as_good"]
    assert found["representations"]["drops"]["stats"]["interval"][0] > 0.3
    written = (folder / "results.txt").read_text()
    assert text.render_text(results) == written and "undecided" in written.lower()
    predictions = np.load(folder / "predictions.npz")
    conditions = predictions["controls/stats/names"].tolist()
    right = predictions["controls/stats/predicted"][conditions.index("top alone")] == predictions["y"]
    assert right[:, 18:].mean() == pytest.approx(found["robustness"]["stats"]["top_alone"]["accuracy"])


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """A run with all controls: six classes, groups that no flag names, ignored tensors, a file left out."""
    out = tmp_path_factory.mktemp("eventful")
    planted_collection(out / "planted", classes=6, per_class=20, modules=2, informative=(1,))
    for i, path in enumerate(sorted((out / "planted").rglob("*.safetensors"))):
        facts = json.loads((path.parent / "metadata.json").read_text())
        (path.parent / "metadata.json").write_text(json.dumps({**facts, "artist": f"artist {i // 4}"}))
        module = next(iter(load_file(path))).split(".lora.")[0]
        save_file(load_file(path) | {f"{module}.dora_scale": torch.ones(3)}, path)
    (out / "planted" / "class_0" / "bad.safetensors").write_bytes(b"bad")
    flags = ("--top-k=1", "--quick", "--num-runs=1", "--controls=all", "--null-shuffles=1", "--skip-bad")
    with quick_runs():
        results = run(out, out / "planted", *flags, "--representations=stats,update_kernel", networks=NARROW)
    return out / "out" / "ablation_planted", results


def test_the_files_hold_what_the_documents_say(everything, analysed, eventful):
    for folder, _ in (everything, analysed, eventful):  # `run` checks results.json
        assert check_schema(json.loads((folder / "top_layers.json").read_text()), "top_layers.json") == []
        arrays = np.load(folder / "predictions.npz")
        assert undocumented_arrays({name: (array.dtype.kind, array.ndim) for name, array in arrays.items()}) == []


def test_figures_and_a_page_lie_beside_the_results(analysed):
    folder, _ = analysed
    first = files_in(folder)
    pictures = {Path(name).stem for name in first if name.endswith(".png")}
    assert {"layer_importance", "ablation_curves", "representations", "concept_layer_map"} <= pictures
    assert all(f"figures/{name}.svg" in first for name in pictures) and "report.html" in first


@pytest.mark.whole
@pytest.mark.parametrize("count", [1, pytest.param(99, marks=pytest.mark.slow)])
def test_another_style_draws_finished_results_anew_and_trains_nothing(
    analysed, planted, tmp_path, capsys, monkeypatch, count
):
    """With the first figures of all."""
    monkeypatch.setattr(figures, "FIGURES", figures.FIGURES[:count])
    folder, before = analysed
    shutil.copytree(folder.parent, tmp_path / "out")
    here, first = tmp_path / "out" / "ablation_planted", files_in(folder)
    styles = [("paper", "")] if count == 1 else [("paper", ""), ("report", ""), ("report", "abc")]
    for style, letters in styles:  # a font for the letters has been installed since
        path = here / "results.json"
        path.write_text(path.read_text().replace('"letters_without_font": ""', f'"letters_without_font": "{letters}"'))
        results = run(tmp_path, planted[0], *ANALYSED, f"--figure-style={style}", networks=NARROW)
        told = capsys.readouterr().out
        assert f"Drawn anew: {here / 'figures'}. Else nothing to do" in told and "Phase" not in told
        assert results == before | {"figures": {"style": style, "letters_without_font": ""}}
        found = files_in(here)
        columns = {name for name in found if "_column." in name}
        assert bool(columns) == (style == "paper") and not (here / "previous").exists()
        changed = {name for name in first if found.get(name) != first[name]}
        pictures = {name for name in first if name.startswith("figures/")}
        assert changed == (pictures | {"report.html", "results.json"} if style == "paper" else set())
    run(tmp_path, planted[0], *ANALYSED, f"--figure-style={style}", networks=NARROW)
    assert "Drawn anew" not in capsys.readouterr().out and files_in(here) == found


@pytest.mark.slow
@pytest.mark.whole
def test_two_runs_with_controls_give_the_same_bytes(analysed, planted, tmp_path):
    run(tmp_path, planted[0], *ANALYSED, networks=NARROW)
    assert files_in(tmp_path / "out" / "ablation_planted") == files_in(analysed[0])


@pytest.mark.slow
@pytest.mark.whole
def test_figures_go_to_previous_with_the_results_that_they_are_of(analysed, planted, tmp_path):
    folder, _ = analysed
    shutil.copytree(folder.parent, tmp_path / "out")
    run(tmp_path, planted[0], "--top-k=3", "--quick", "--representations=stats")
    here = tmp_path / "out" / "ablation_planted"
    assert files_in(here / "previous" / "1") == files_in(folder)
    gone = {f"figures/ablation_curves.{kind}" for kind in ("png", "svg", "pdf")}  # nothing is removed without controls
    assert {name for name in files_in(here) if "previous" not in name} == files_in(folder).keys() - gone
    run(tmp_path, planted[0], *ANALYSED, networks=NARROW)
    assert {name for name in files_in(here) if "previous" not in name} == files_in(folder).keys()


@pytest.mark.slow
@pytest.mark.whole
def test_a_lost_page_is_made_again_and_nothing_is_trained(analysed, planted, tmp_path, monkeypatch):
    folder, _ = analysed
    shutil.copytree(folder.parent, tmp_path / "out")
    page = tmp_path / "out" / "ablation_planted" / "report.html"
    page.unlink()
    monkeypatch.setattr(Engine, "_outcomes", lambda _, units: (not_again() for _ in units))
    run(tmp_path, planted[0], *ANALYSED, networks=NARROW)
    assert page.read_bytes() == (folder / "report.html").read_bytes()


def test_what_is_told_beside_the_weights_is_part_of_the_results(tmp_path, capsys):
    root = tmp_path / "planted"
    planted_collection(root, per_class=15, modules=2, informative=(1,))
    flags = ("--top-k=1", "--quick", "--controls=basic", "--representations=stats", "--num-runs=1")
    assert run(tmp_path, root, *flags, networks=NARROW)["analysis"]["cheap"]["metadata"] is None
    for i, path in enumerate(root.rglob("metadata.json")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "steps": i % 7}))
    assert run(tmp_path, root, *flags, networks=NARROW)["analysis"]["cheap"]["metadata"] is not None
    assert "Nothing to do" not in capsys.readouterr().out
    run(tmp_path, root, *flags, networks=NARROW)
    assert "Nothing to do" in capsys.readouterr().out


def test_shuffled_labels_can_be_trained_without_other_controls(planted, tmp_path):
    results = run(
        tmp_path, planted[0], "--top-k=3", "--quick", "--representations=stats", "--null-shuffles=2", networks=NARROW
    )
    assert results["config"]["controls"] == "none" and results["analysis"]["null_shuffles"]["shuffles"] == 2
    assert max(results["analysis"]["null_shuffles"]["largest"]) < results["analysis"]["null_shuffles"]["observed"]
    assert results["analysis"]["robustness"] == {}


# -- doing things once ----------------------------------------------------------------------------------


QUICK = ("--quick", "--representations=stats,vae")


def not_again(*_, **__):
    raise AssertionError("trained again")


def test_a_rerun_does_nothing_and_other_settings_keep_the_old_results(one_core, tmp_path, monkeypatch, capsys):
    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    first = run(tmp_path, root, "--top-k=1", *QUICK)
    folder = tmp_path / "out" / "ablation_small"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    monkeypatch.setattr(plans, "train_classifiers", not_again)
    monkeypatch.setattr(autoencoders, "fit_transform", not_again)
    capsys.readouterr()
    assert run(tmp_path, root, "--top-k=1", *QUICK) == first
    said = capsys.readouterr().out
    assert "Nothing to do" in said and "Short answers of a --quick run" in said
    assert said.splitlines()[-2:] == [f"  {folder / 'report.html'}", f"next: {text.next_step(first)}"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    # A lost results file is written again from finished units alone.
    (folder / "results.json").unlink()
    again = run(tmp_path, root, "--top-k=1", *QUICK)
    same = [key for key in first if key not in ("environment", "timing")]
    assert {key: first[key] for key in same} == {key: again[key] for key in same}
    monkeypatch.undo()

    other = run(tmp_path, root, "--top-k=2", *QUICK)
    assert other["config"]["top_k"] == 2
    (kept,) = folder.glob("previous/*/results.json")
    assert json.loads(kept.read_text())["config"]["top_k"] == 1
    assert other["layer_ranking"] == first["layer_ranking"] and other["baseline_results"] == first["baseline_results"]


def test_a_path_spelled_otherwise_is_the_same_collection(tmp_path, monkeypatch, capsys):
    root = write_collection(tmp_path / "small", classes=2, per_class=5)
    run(tmp_path, root, "--top-k=1", *QUICK)
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "small/", "--top-k=1", *QUICK)
    assert "Nothing to do" in capsys.readouterr().out


def test_results_that_cannot_be_read_are_kept_and_written_anew(tmp_path):
    root = write_collection(tmp_path / "small", classes=2, per_class=5)
    run(tmp_path, root, "--top-k=1", *QUICK)
    path = tmp_path / "out" / "ablation_small" / "results.json"
    path.write_text("{broken")
    assert run(tmp_path, root, "--top-k=1", *QUICK)["config"]["top_k"] == 1
    assert (path.parent / "previous" / "1" / "results.json").read_text() == "{broken"


@pytest.mark.parametrize(("key", "value"), [("schema_version", 1), ("code", "0123456789abcdef")])
def test_results_of_an_older_schema_or_of_other_code_are_kept_and_written_anew(
    one_core, tmp_path, monkeypatch, key, value
):
    root = write_collection(tmp_path / "small", classes=2, per_class=5)
    flags = ("--top-k=1", "--quick", "--num-runs=1", "--representations=stats")
    first = run(tmp_path, root, *flags)
    folder = tmp_path / "out" / "ablation_small"
    edited = json.loads((folder / "results.json").read_text())
    section = edited if key in edited else edited["environment"]
    assert section[key] != value
    section[key] = value
    (folder / "results.json").write_text(json.dumps(edited))
    before = {name: (folder / name).read_bytes() for name in RESULT_FILES}

    monkeypatch.setattr(plans, "train_classifiers", not_again)
    again = run(tmp_path, root, *flags)
    kept = folder / "previous" / "1"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert sorted(path.name for path in folder.iterdir()) == sorted([*RESULT_FILES, "previous"])
    assert all((folder / name).read_bytes() == before[name] for name in RESULT_FILES if name != "results.json")
    assert all(again[part] == first[part] for part in first if part not in ("environment", "timing"))
    assert again["environment"]["code"] == first["environment"]["code"]
    run(tmp_path, root, *flags)
    assert [path.name for path in kept.parent.iterdir()] == ["1"]  # the new ones are found whole


def test_finished_units_are_trusted_only_for_the_very_inputs_and_network(one_core, tmp_path, monkeypatch):
    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    flags = ("--top-k=1", "--quick", "--representations=pca")

    def units():
        return {path.name for path in (tmp_path / "out").rglob("classifier-*.npz")}

    first, before = run(tmp_path, root, *flags), units()
    monkeypatch.setattr(inputs, "PCA_COMPONENTS", 3)
    for networks in (NETWORKS, NARROW):
        shutil.rmtree(tmp_path / "out" / "ablation_small")
        results = run(tmp_path, root, *flags, networks=networks)
        assert units() > before, networks
        before = units()
    assert first["baseline_results"]["pca"]["num_features"] == 13
    assert results["baseline_results"]["pca"]["num_features"] == 3
    run(tmp_path, root, *flags, "--seed=1")
    assert len(units() - before) >= 3  # another split, other streams: nothing is shared


def test_a_cache_folder_of_ones_own_serves_another_output_folder(one_core, tmp_path, monkeypatch):
    root = write_collection(tmp_path / "small", classes=2, per_class=5)
    cache = f"--cache-dir={tmp_path / 'cache'}"
    first = run(tmp_path, root, "--top-k=1", cache, *QUICK, out="one")
    monkeypatch.setattr(plans, "train_classifiers", not_again)
    monkeypatch.setattr(autoencoders, "fit_transform", not_again)
    second = run(tmp_path, root, "--top-k=1", cache, *QUICK, out="two")
    assert first["baseline_results"] == second["baseline_results"]
    assert not (tmp_path / "one" / ".cache").exists() and (tmp_path / "cache").exists()


@pytest.mark.slow  # test_faults.py kills runs at every moment, in less time
def test_a_killed_run_loses_nothing_that_was_finished(tmp_path):
    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    command = [sys.executable, ROOT / "ablation_experiment.py", "--dataset", root, "--output-dir", tmp_path / "out"]
    command = [*map(str, command), "--top-k=1", "--num-runs=10", "--quick", "--representations=stats"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert any(line.startswith("Phase 1") for line in running.stdout)  # reads on until it is there
        while not glob.glob("out/.cache/*/units/classifier-*.npz", root_dir=tmp_path):  # a folder may go meanwhile
            assert running.poll() is None
        running.kill()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("classifier-*.npz")}
    assert not (tmp_path / "out" / "ablation_small").exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list((tmp_path / "out").rglob("classifier-*.npz"))) > len(finished)


def test_an_interrupted_run_continues_where_it_stopped(one_core, tmp_path, monkeypatch, capsys):
    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    whole = run(tmp_path, root, "--top-k=1", *QUICK, out="whole")
    trained, real = [], plans.train_classifiers

    def stop_at_third(*args, **kwargs):
        if len(trained) == 2:
            while len(list((tmp_path / "out" / ".cache").rglob("classifier-*.npz"))) < 2:  # the main thread writes them
                time.sleep(0.01)
            raise KeyboardInterrupt
        trained.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(plans, "train_classifiers", stop_at_third)
    assert main(["--dataset", str(root), "--output-dir", str(tmp_path / "out"), "--top-k=1", *QUICK], NETWORKS) == 130
    assert "continues" in capsys.readouterr().err
    assert not (tmp_path / "out" / "ablation_small").exists()
    finished = []
    monkeypatch.setattr(plans, "train_classifiers", lambda *a, **k: finished.append(1) or real(*a, **k))
    results = run(tmp_path, root, "--top-k=1", *QUICK)
    units = len(list((tmp_path / "out" / ".cache").rglob("classifier-*.npz")))
    assert len(finished) == units - 2
    for name in list(RESULT_FILES)[:-1]:
        one, other = (tmp_path / out / "ablation_small" / name for out in ("out", "whole"))
        assert one.read_bytes() == other.read_bytes()
    assert results["layer_ranking"] == whole["layer_ranking"]


def test_a_higher_top_k_and_more_runs_train_only_what_is_new(one_core, tmp_path, monkeypatch):
    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    seen, real = [], plans.train_classifiers

    def counted(x, y, split, models, *args, **kwargs):
        seen.extend(zip(models.source.tolist(), models.run.tolist(), strict=True))
        return real(x, y, split, models, *args, **kwargs)

    monkeypatch.setattr(plans, "train_classifiers", counted)
    flags = ("--quick", "--num-runs=2", "--representations=stats,flat_vec")
    # So small that a stack of the ranking holds one run of the four layers; one of a representation holds one run.
    monkeypatch.setitem(settings.STACK_PARAMETERS, "cpu", 160_000)
    run(tmp_path, root, "--top-k=1", *flags)
    assert len(seen) == 4 * 2 + 2 * 2 * 2
    seen.clear()
    run(tmp_path, root, "--top-k=2", *flags)
    assert sorted(seen) == [(0, 0), (0, 0), (0, 1), (0, 1)]  # both representations without another layer
    seen.clear()
    more = run(tmp_path, root, "--top-k=2", *flags, "--num-runs=3")
    assert len(seen) == 4 + 2 * 2 and {run for _, run in seen} == {2}
    monkeypatch.setattr(plans, "train_classifiers", real)
    fresh = run(tmp_path, root, "--top-k=2", *flags, "--num-runs=3", out="fresh")
    assert fresh["layer_ranking"] == more["layer_ranking"] and fresh["baseline_results"] == more["baseline_results"]


def test_a_stack_that_does_not_fit_memory_is_made_smaller_and_told(one_core, tmp_path, monkeypatch, capfd):
    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    flags = ("--top-k=1", "--quick", "--representations=stats,vae")
    whole, real, learn = run(tmp_path, root, *flags), plans.train_classifiers, autoencoders.fit_transform

    def train_two(x, y, split, models, *args, **kwargs):
        if len(models.run) > 2:
            raise torch.OutOfMemoryError("Tried to allocate a lot.")
        return real(x, y, split, models, *args, **kwargs)

    def learn_one(name, x, *args, **kwargs):
        if len(x) > 1:
            raise torch.OutOfMemoryError("Tried to allocate a lot.")
        return learn(name, x, *args, **kwargs)

    monkeypatch.setattr(plans, "train_classifiers", train_two)
    monkeypatch.setattr(autoencoders, "fit_transform", learn_one)
    smaller = run(tmp_path, root, *flags, out="smaller")
    made = smaller["config"]["stack"]["smaller"]
    assert made["fitting vae, 16 weights a layer"] == 1 and made["ranking"] <= 2
    assert f"  ranking: 12 models do not fit the memory: {made['ranking']} at once\n" in capfd.readouterr().out
    for name in ("stats", "vae"):  # as far as a matrix product does not depend on how many are done at once
        metrics = [value(results, "baseline_results", name, "train_accuracy", "mean") for results in (whole, smaller)]
        assert metrics[0] == pytest.approx(metrics[1], abs=0.1)
    assert run(tmp_path, root, *flags, out="smaller") == smaller  # nothing to do
    assert "Nothing to do" in capfd.readouterr().out

    monkeypatch.setattr(autoencoders, "fit_transform", out_of_memory)
    left = run(tmp_path, root, *flags, "--seed=1", out="without", expected=3)
    assert list(left["baseline_results"]) == ["stats"]
    assert "2.00 GiB" in left["representations_not_run"][0]["reason"]
    monkeypatch.setattr(plans, "train_classifiers", out_of_memory)
    run(tmp_path, root, *flags, "--seed=2", out="never", expected=2)
    told = "error: the layers cannot be ranked: out of memory with one model at a time: Tried to allocate 2.00 GiB. Try"
    assert capfd.readouterr().err.startswith(told)


def test_weights_that_memory_does_not_hold_leave_one_representation_out(one_core, tmp_path, monkeypatch):
    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    monkeypatch.setattr(Stored, "_raw", out_of_memory)
    left = run(tmp_path, root, "--top-k=1", "--quick", "--representations=stats,flat_vec", expected=3)
    assert list(left["baseline_results"]) == ["stats"]
    assert "2.00 GiB" in left["representations_not_run"][0]["reason"]


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")


def test_weights_that_do_not_fit_the_device_are_streamed_and_give_the_same(one_core, tmp_path, monkeypatch):
    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    flags = ("--top-k=1", "--quick", "--representations=flat_vec")
    resident = run(tmp_path, root, *flags)
    monkeypatch.setattr(inputs, "memory_of", lambda _: 1000)
    held = []
    monkeypatch.setattr(inputs, "Stored", lambda *args, hold: held.append(hold) or Stored(*args, hold))
    streamed = run(tmp_path, root, *flags, out="streamed")
    assert held == [None]
    for key in ("layer_ranking", "baseline_results", "ablation_results"):
        assert resident[key] == streamed[key]


# -- what cannot be run, and what is refused --------------------------------------------------------------


def test_mixed_ranks_leave_out_what_needs_equal_shapes_and_exit_with_3(tmp_path, capsys):
    root = write_collection(tmp_path / "mixed", classes=2, per_class=8, rank=2)
    write_collection(tmp_path / "other", classes=2, per_class=2, rank=4)
    for path in sorted((tmp_path / "other").glob("*/*")):
        shutil.move(path, root / path.parent.name / f"rank4-{path.name}")
    results = run(tmp_path, root, "--top-k=1", "--quick", expected=3)
    left_out = [entry["representation"] for entry in results["representations_not_run"]]
    assert left_out == [name for name, row in REPRESENTATIONS.items() if row.made in ("flat", "pca", "autoencoder")]
    assert {"flat_vec", "pca", "vae", "contrastive", "denoising"} <= set(left_out)
    assert all("ranks differ" in entry["reason"] for entry in results["representations_not_run"])
    assert list(results["baseline_results"]) == [name for name in OF_WEIGHTS if name not in left_out]
    text = (tmp_path / "out" / "ablation_mixed" / "results.txt").read_text()
    assert "Not run" in text and "ranks differ" in text
    run(tmp_path, root, "--top-k=1", "--quick", expected=3)
    assert "Nothing to do" in capsys.readouterr().out


def test_pairs_need_a_pair_that_is_left_whole(tmp_path):
    root = write_collection(tmp_path / "single", classes=2, per_class=6, modules=1)
    flags = ("--top-k=1", "--quick", "--representations=stats,coupling,update_sketch")
    results = run(tmp_path, root, *flags, expected=3)
    reason = "without the top layer no pair is whole"
    left_out = [{"representation": name, "reason": reason} for name in ("coupling", "update_sketch")]
    assert results["representations_not_run"] == left_out
    assert list(results["baseline_results"]) == list(results["ablation_results"]) == ["stats"]
    assert run(tmp_path, root, *flags, expected=3) == results


def test_a_diverging_representation_is_named_and_the_others_go_on(one_core, tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise FloatingPointError("training diverged")

    root = write_collection(tmp_path / "small", classes=2, per_class=6)
    monkeypatch.setattr(autoencoders, "fit_transform", diverge)
    results = run(tmp_path, root, "--top-k=1", *QUICK, expected=3)
    assert results["representations_not_run"] == [{"representation": "vae", "reason": "training diverged"}]
    assert list(results["baseline_results"]) == list(results["ablation_results"]) == ["stats"]


def test_ties_by_validation_never_look_at_the_test_rows(one_core, tmp_path, monkeypatch):
    root = write_collection(tmp_path / "small", classes=2, per_class=5)

    def trained(x, y, split, models, num_classes, **_):
        count, held_out = len(models.run), torch.cat([split.validation, split.test])
        predicted = np.tile(y[held_out].numpy(), (count, 1))
        predicted[:, len(split.validation) :] = 0  # half of the test rows are wrong
        predicted[1:2] = y[held_out]  # but in the second layer, as good in validation
        loss = np.array([0.1, 0.2, 0.2, 0.3])[models.source.numpy()]
        return {"predicted": predicted, "log_loss": np.zeros(predicted.shape), "train_accuracy": np.ones(count),
                "train_f1": np.ones(count), "epochs": np.ones(count), "best_epoch": np.ones(count),
                "validation_loss": loss}  # fmt: skip

    monkeypatch.setattr(plans, "train_classifiers", trained)
    flags = ("--top-k=1", "--quick", "--num-runs=1", "--representations=stats")
    by_test = run(tmp_path, root, *flags, out="test")["layer_ranking"]
    by_val = run(tmp_path, root, *flags, "--rank-by=val", out="val")["layer_ranking"]
    names = [layer["layer"] for layer in by_val]  # by loss, then depth
    assert [layer["layer"] for layer in by_test] == [names[1], names[0], names[2], names[3]]
    assert by_val[1]["accuracy"] > by_val[0]["accuracy"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top-k=0"], "--top-k 0"),
        (["--top-k=4"], "--top-k 4: these LoRAs have 4 layers"),
        (["--num-runs=0"], "--num-runs 0"),
        (["--representations=stats,astrology"], "astrology: not known. Choose from flat_vec"),
        (["--device=cuda:99"], "--device cuda:99: th"),
        (["--device=quantum"], "--device quantum: not a device"),
        (["--device=mps"], "--device mps: not supported"),
        (["--dataset="], "--dataset: empty"),
        (["--cache-dir=/dev/null/cache"], "--cache-dir /dev/null/cache: /dev/null is not a folder"),
    ],
)
def test_flags_are_refused_in_one_line(tmp_path, capsys, flags, words):
    root = write_collection(tmp_path / "small", classes=2, per_class=3)
    assert main(["--dataset", str(root), "--output-dir", str(tmp_path / "out"), *flags], NETWORKS) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_all_gpus_that_are_visible_work_or_the_one_of_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for variable in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # as torchrun sets them
        monkeypatch.setenv(variable, "3")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert settings.resolve_devices("cpu") == (torch.device("cpu"),) and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    both = torch.device("cuda", 0), torch.device("cuda", 1)
    for name in ("auto", "cuda"):
        assert settings.resolve_devices(name) == both
    assert settings.resolve_devices("cuda:1") == both[1:]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(ablation_experiment.UsageError, match="--device cuda:2: there are 2 GPUs here"):
        settings.resolve_devices("cuda:2")


@pytest.mark.parametrize(
    "error", [MemoryError("512 MiB for an array"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_cpu_that_is_out_of_memory_tries_smaller_stacks_and_tells(one_core, tmp_path, monkeypatch, capfd, error):
    def too_much(*_, **__):
        raise error

    root = write_collection(tmp_path / "small", classes=2, per_class=10)
    flags = ("--top-k=1", "--quick", "--representations=stats,vae")
    monkeypatch.setattr(autoencoders, "fit_transform", too_much)
    left = run(tmp_path, root, *flags, expected=3)
    reason = f"out of memory with one model at a time: {error}"
    assert left["representations_not_run"] == [{"representation": "vae", "reason": reason}]
    capfd.readouterr()
    monkeypatch.setattr(ablation_experiment, "extract", too_much)
    run(tmp_path, root, *flags, "--seed=1", expected=2)
    assert capfd.readouterr().err.startswith(f"error: out of memory: {error}. Try another --device")


def test_memory_is_what_the_groups_of_the_process_and_its_slurm_job_allow(tmp_path, monkeypatch):
    cpu, megabyte = torch.device("cpu"), 2**20
    for variable in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # means nothing
    whole = settings.memory_of(cpu)
    assert 512 * megabyte < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert settings.memory_of(cpu) == 300 * megabyte
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "200")
    assert settings.memory_of(cpu) == 200 * megabyte
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all that the node has
    monkeypatch.delenv("SLURM_MEM_PER_CPU")
    assert settings.memory_of(cpu) == whole

    root, table, group = tmp_path / "sys/fs/cgroup", tmp_path / "proc/self/cgroup", "slurm/job_1/step_0"
    table.parent.mkdir(parents=True)
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    for line, folder, name in (
        (f"0::/{group}", root, "memory.max"),
        (f"4:memory:/{group}", root / "memory", "memory.limit_in_bytes"),
    ):
        table.write_text(f"12:cpuset:/elsewhere\n{line}\n")
        (folder / group).mkdir(parents=True)
        (folder / group / name).write_text("max\n")
        (folder / group).parent.joinpath(name).write_text(f"{50 * megabyte}\n")  # of the job, not of its step
        assert settings.memory_of(cpu) == 50 * megabyte
    table.unlink()  # another system than Linux
    assert settings.memory_of(cpu) == whole or whole < settings.memory_of(cpu)


def test_flags_are_checked_before_the_collection_is_touched(tmp_path, capsys):
    assert main(["--dataset", str(tmp_path / "nowhere"), "--num-runs=-1"], NETWORKS) == 2
    assert "--num-runs" in capsys.readouterr().err
    assert main(["--dataset", str(tmp_path / "nowhere"), "--null-shuffles=-1"], NETWORKS) == 2
    assert "--null-shuffles" in capsys.readouterr().err


def test_a_refused_collection_leaves_the_output_folder_as_it_was(tmp_path, capsys):
    root = write_collection(tmp_path / "bad", classes=2, per_class=4)
    path = root / "class_1" / "0002" / FILE_NAME
    tensors = load_file(path)
    name = sorted(tensors)[1]
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path)
    flags = ["--dataset", str(root), "--output-dir", str(tmp_path / "out" / "deep"), "--top-k=1", *QUICK]
    assert main(flags, NETWORKS) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and "NaN" in error and name in error
    assert not (tmp_path / "out").exists()
    out = tmp_path / "out" / "deep"
    (out / ".cache").mkdir(parents=True)
    (out / "mine.txt").write_text("kept")
    assert main(flags, NETWORKS) == 2
    assert sorted(p.name for p in out.rglob("*")) == [".cache", "mine.txt"]


def test_results_are_of_all_modules_of_the_program():
    modules = {path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py")}
    folders = ("tests/", "benchmarks/", ".", "predict", "compare")  # programs that read results
    covered = {name for name in modules for part in header.PROGRAM if f"{name}/".startswith(f"{part}/")}
    others = {name for name in modules - covered if not name.startswith(folders)}
    assert not others


def test_skip_bad_leaves_out_files_in_which_the_pass_finds_nan(tmp_path, capsys, monkeypatch):
    root = write_collection(tmp_path / "bad", classes=2, per_class=6)
    path = root / "class_1" / "0002" / FILE_NAME
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)
    (root / "class_0" / "0001" / FILE_NAME).write_bytes(b"short")
    flags = ("--top-k=1", "--skip-bad", *QUICK)
    results = run(tmp_path, root, *flags)
    assert results["dataset"]["num_samples"] == 10 and results["dataset"]["class_counts"] == {
        "class_0": 5,
        "class_1": 5,
    }
    skipped = {entry["path"]: entry["reason"] for entry in results["dataset"]["skipped"]}
    assert sorted(skipped) == [f"class_0/0001/{FILE_NAME}", f"class_1/0002/{FILE_NAME}"]
    assert (
        "incomplete download" in skipped[f"class_0/0001/{FILE_NAME}"] and "NaN" in skipped[f"class_1/0002/{FILE_NAME}"]
    )
    printed = capsys.readouterr().out
    assert f"skipped   1 file left out, found on reading the weights\n{'':<10}class_1/0002/{FILE_NAME}: " in printed
    assert (
        f"skipped   1 file left out, as --skip-bad asks; results.json lists them and why\n{'':<10}class_0/0001/"
        in printed
    )
    assert run(tmp_path, root, *flags) == results
    assert "Nothing to do" in capsys.readouterr().out
    # Without the flag the same collection is refused, and a disk that fails is no fault of the file.
    run(tmp_path, root, "--top-k=1", *QUICK, expected=2)

    def fail(*_):
        raise OSError("Input/output error")

    monkeypatch.setattr(extraction, "read_file", fail)
    run(tmp_path, root, *flags, out="other", expected=2)
    assert "Input/output error" in capsys.readouterr().err and not (tmp_path / "other").exists()


# -- named and built-in collections -----------------------------------------------------------------------


@pytest.fixture
def quick_zoo(tmp_path, monkeypatch):
    """An empty working folder, and a built-in collection that trains in a moment."""
    monkeypatch.chdir(tmp_path)
    built = []

    def build(out, count, **_):
        if not out.exists():
            built.append((out, count))
            write_collection(out, classes=2, per_class=5)
            (out / "recipe.json").write_text(json.dumps({"built_by": "digits_zoo"}))

    monkeypatch.setattr(digits_zoo, "build", build)
    return built


def test_the_built_in_collection_is_announced_trained_once_and_named_everywhere(quick_zoo, capsys):
    flags = ["--dataset=small", "--top-k=1", "--quick", "--representations=stats"]
    assert main(flags, NETWORKS) == 0
    out = capsys.readouterr().out
    assert quick_zoo == [(Path("data/built-in-digits/small"), 100)]
    assert "training the built-in digits, 100 LoRAs" in out and "MiB" in out and "BUILT-IN DIGITS" in out
    results = json.loads(Path("ablation-results/ablation_small/results.json").read_text())
    assert results["dataset"]["source"] == "built-in digits" and results["dataset"]["name"] == "small"
    assert "BUILT-IN DIGITS" in Path("ablation-results/ablation_small/results.txt").read_text()
    assert main(flags, NETWORKS) == 0 and len(quick_zoo) == 1


def test_the_built_in_collection_is_known_by_its_path_too_and_no_other_by_its_claim(quick_zoo, capsys):
    for place, source in (("data/built-in-digits/small", "built-in digits"), ("elsewhere/small", "files")):
        root = write_collection(Path(place), classes=2, per_class=5)
        (root / "recipe.json").write_text(json.dumps({"built_by": "digits_zoo"}))
        assert main(["--dataset", place, "--top-k=1", "--quick", "--representations=stats"], NETWORKS) == 0
        results = json.loads(Path("ablation-results/ablation_small/results.json").read_text())
        assert results["dataset"]["source"] == source
        assert ("BUILT-IN" in capsys.readouterr().out) == (source != "files")
    root.rename("elsewhere/small.partial")
    assert main(["--dataset=elsewhere/small.partial", "--top-k=1"], NETWORKS) == 2
    assert "half-built" in capsys.readouterr().err


def test_a_link_to_nowhere_is_no_reason_to_train_digits(quick_zoo, capsys):
    Path("data").mkdir()
    Path("data/small").symlink_to("scratch/that/is/not/mounted")
    assert main(["--dataset=small"], NETWORKS) == 2
    assert "data/small: no such folder" in capsys.readouterr().err and quick_zoo == []


def test_a_collection_of_ones_own_comes_before_the_built_in_one(quick_zoo):
    write_collection(Path("data/1k"), classes=2, per_class=4)
    assert main(["--top-k=1", "--quick", "--representations=stats"], NETWORKS) == 0  # --dataset=1k is the default
    results = json.loads(Path("ablation-results/ablation_1k/results.json").read_text())
    assert quick_zoo == [] and results["dataset"]["source"] == "files" and results["dataset"]["path"] == "data/1k"


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset=50k"],
        ["--dataset=100k"],
        ["--dataset=1k", "--data-dir=data"],
        ["--dataset=small", "--data-dir=elsewhere"],
        ["--dataset=no/such/folder"],
    ],
)
def test_nobody_ends_up_on_built_in_data_unnoticed(quick_zoo, capsys, flags):
    assert main(flags, NETWORKS) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no such folder" in error and quick_zoo == []


# -- the command line -------------------------------------------------------------------------------------


def test_quick_gives_way_to_an_explicit_flag():
    def resolved(*flags):
        return settings.resolve(ablation_experiment.parse_arguments([*flags, "--device=cpu"]))

    quick, full = resolved("--quick"), resolved()
    assert (quick.num_runs, quick.classifier.patience, quick.classifier.max_epochs) == (3, 5, 30)
    assert (quick.autoencoder.patience, quick.autoencoder.max_epochs) == (5, 8)
    assert (full.num_runs, full.classifier.patience, full.classifier.max_epochs) == (10, 20, 1000)
    assert (full.autoencoder.patience, full.autoencoder.max_epochs) == (15, 100)
    assert full.classifier.lr == 1e-3 and full.classifier.lr_patience == 10 and full.autoencoder.lr_patience is None
    assert resolved("--quick", "--num-runs=7").num_runs == 7
    assert (quick.controls, full.controls) == ("none", "basic")
    assert resolved("--quick", "--controls=all").controls == "all"


def test_a_log_file_gets_plain_lines(tmp_path, capfd):
    run(tmp_path, write_collection(tmp_path / "small", classes=2, per_class=5), "--top-k=1", "--num-runs=1", *QUICK)
    out, err = capfd.readouterr()
    assert err == "" and "\r" not in out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["settings", "at", "device", "data", "classes", "split"]
    rows = [line for line in lines if line.startswith(("stats ", "vae "))]
    points = {tuple(match.start() for match in re.finditer(r"\.", line)) for line in rows}
    assert len(rows) == 4 and len(points) == 1 and "±" not in out  # of one run
    *_, written, page, step = lines
    assert written.startswith(f"Written to {tmp_path / 'out' / 'ablation_small'} (") and Path(page.strip()).exists()
    assert step.startswith("next: ") and 20 < lines.index(written) - lines.index(rows[-1]) < 45


@pytest.mark.slow
def test_the_program_finds_its_modules_through_a_link_and_so_do_its_workers(tmp_path):
    root, link = write_collection(tmp_path / "small", classes=2, per_class=5), tmp_path / "linked.py"
    link.symlink_to(ablation_experiment.__file__)
    command = [sys.executable, link, "--dataset", root, "--output-dir", tmp_path / "out", "--top-k=1", "--num-runs=1"]
    done = subprocess.run([*map(str, command), *QUICK], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and "\r" not in done.stdout


@pytest.mark.parametrize(
    "place", ["/proc/x", "/proc", "/sys/x", "file/x", "file", "link", "a/b/" + 300 * "x", "a/\0/b"]
)
@pytest.mark.parametrize("flag", ["--output-dir", "--cache-dir"])
def test_a_folder_that_nothing_can_be_written_to_is_refused_and_nothing_is_left_of_it(tmp_path, capsys, flag, place):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert main([f"{flag}={tmp_path / place}", f"--dataset={tmp_path}"], NETWORKS) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag} ") and error.endswith(" Give another.\n") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["previous", "figures", "", "results.json", "report.html"])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_lies_in_the_place_of_results_is_refused_before_the_work(tmp_path, capsys, name, kind):
    if (kind == "folder") == ("." not in name) or (name, kind) == ("", "link"):
        return  # as it is to be
    root, target = write_collection(tmp_path / "small", classes=2, per_class=5), tmp_path / "out" / "ablation_small"
    place = target / name
    place.parent.mkdir(parents=True)
    if kind == "link" and "." in name:
        return  # which a file replaces
    {"file": place.touch, "link": lambda: place.symlink_to(tmp_path), "folder": place.mkdir}[kind]()
    run(tmp_path, root, "--quick", expected=2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {place}: a {kind} in the place of a f") and error.count("\n") == 1
    assert list((tmp_path / "out").rglob("*")) == ([target, place] if name else [target])


def test_a_collection_whose_name_leaves_no_room_for_a_folder_of_results_is_refused(tmp_path, capsys):
    root = write_collection(tmp_path / (248 * "n"), classes=2, per_class=5)
    run(tmp_path, root, "--quick", expected=2)
    assert "File name too long. Give another" in capsys.readouterr().err and not (tmp_path / "out").exists()
