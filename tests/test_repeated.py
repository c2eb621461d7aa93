"""The phases on further splits: rows, what is trained again and what not, and what is left out."""

import json

import numpy as np
import pytest
from making import NARROW, planted_collection
from test_controls import describe_files, experiment_on
from test_house import check_schema

from ablation_experiment import main
from experiment import plans
from experiment.repeated import repeat

FLAGS = ("--top-k=3", "--quick", "--num-runs=2", "--representations=stats,update_sketch,pca")


def run(tmp_path, dataset, *flags: str) -> dict:
    """Results of the program on a folder."""
    arguments = ["--dataset", str(dataset), "--output-dir", str(tmp_path / "out"), "--device=cpu", *FLAGS, *flags]
    assert main(arguments, NARROW) == 0
    results = json.loads((tmp_path / "out" / f"ablation_{dataset.name}" / "results.json").read_text())
    assert not [fault for fault in check_schema(results) if fault.startswith(("splits", "config.splits", "timing"))]
    return results


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """60 LoRAs of 3 classes and 8 layers of which three carry the class."""
    root = tmp_path_factory.mktemp("collections") / "planted"
    planted_collection(root, per_class=20)
    return root


def test_each_split_is_trained_once_and_the_first_is_the_ordinary_one(planted, tmp_path, monkeypatch, capsys):
    one = run(tmp_path, planted)
    assert one["splits"] is None and one["config"]["splits"] == 1
    trained: list[int] = []
    train = plans.train_classifiers

    def counted(*arguments, **more):
        trained.append(len(arguments[3].run))
        return train(*arguments, **more)

    monkeypatch.setattr(plans, "train_classifiers", counted)
    three = run(tmp_path, planted, "--splits=3")
    for_two = len(trained)
    same = [key for key in one if key not in ("environment", "timing", "config", "splits")]
    assert {key: one[key] for key in same} == {key: three[key] for key in same}
    found = three["splits"]
    assert (
        found["splits"] == 3
        and found["not_run"] == {}
        and list(found["representations"]) == list(three["baseline_results"])
    )
    for name, record in found["representations"].items():
        assert record["baseline"]["values"][0] == pytest.approx(one["baseline_results"][name]["test_accuracy"]["mean"])
        assert record["ablation"]["values"][0] == pytest.approx(one["ablation_results"][name]["test_accuracy"]["mean"])
        assert record["drop"]["interval"] is None
    assert {layer["layer"] for layer in found["layers"] if layer["in_top_k"] > 0.6} == set(one["top_layers"])
    assert found["same_top_k"] == 3 and found["first"]["layer"] == one["top_layers"][0]
    capsys.readouterr()
    assert run(tmp_path, planted, "--splits=3") == three and "Nothing to do" in capsys.readouterr().out
    five = run(tmp_path, planted, "--splits=5")
    assert len(trained) == 2 * for_two  # two more splits
    assert five["splits"]["representations"]["stats"]["baseline"]["interval"] is not None
    assert (
        five["splits"]["representations"]["stats"]["baseline"]["values"][:3]
        == found["representations"]["stats"]["baseline"]["values"]
    )
    assert "split 5 of 5: first " in capsys.readouterr().out


def test_a_representation_that_one_split_cannot_do_is_left_out(planted, tmp_path, monkeypatch):
    experiment = experiment_on(planted, tmp_path, *FLAGS[:1], "--splits=3", "--representations=stats,spectral")
    train = plans.train_classifiers

    def diverging(x, y, split, *arguments, **more):
        if x.shape[0] == 1 and x.shape[2] > 7 * 8 and split.test.tolist() != experiment.rows["test"].tolist():
            raise FloatingPointError("training diverged")  # spectral, on another split
        return train(x, y, split, *arguments, **more)

    monkeypatch.setattr(plans, "train_classifiers", diverging)
    lines: list[str] = []
    found = repeat(experiment, ["stats", "spectral"], lines.append)
    assert found["not_run"] == {"spectral": "split 2: training diverged"} and list(found["representations"]) == [
        "stats"
    ]
    assert found["splits"] == 3 and any("spectral" in line for line in lines)

    def never(*_, **__):
        raise FloatingPointError("training diverged")

    monkeypatch.setattr(plans, "train_classifiers", never)
    experiment.extracted.folder.joinpath("units").rename(experiment.extracted.folder / "elsewhere")
    found = repeat(experiment, ["stats"], lines.append)
    assert found["splits"] == 1 and list(found["splits_not_run"]) == ["2", "3"]
    assert "cannot be ranked" in found["splits_not_run"]["2"]


def test_groups_stay_together_and_equal_splits_count_once(planted, tmp_path):
    describe_files(planted, lambda i: {"artist": f"artist {i // 6}"})  # ten, of which some of two classes
    flags = (*FLAGS[:1], "--splits=6", "--representations=stats", "--group-column=artist")
    experiment = experiment_on(planted, tmp_path, *flags)
    rows: list[dict[str, np.ndarray]] = [experiment.rows]
    again = experiment.again

    def noted(collection, parts, runs):
        rows.append(parts)
        return again(collection, parts, runs)

    experiment.again = noted
    found = repeat(experiment, ["stats"], print)
    groups = experiment.collection.groups
    for parts in rows:
        assert sum(len(np.unique(groups[part])) for part in parts.values()) == len(np.unique(groups))
    distinct = {tuple(parts["test"].tolist() + parts["train"].tolist()) for parts in rows}
    assert len(rows) == 6 and found["splits"] == len(distinct) == 6 - len(found["splits_not_run"])
    assert all("same LoRAs" in reason for reason in found["splits_not_run"].values())
