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

FLAGS = ("--top-k=3", "--quick", "--num-runs=1", "--representations=stats,pca")


def run(tmp_path, dataset, *flags: str) -> dict:
    """Results of the program on a folder."""
    arguments = ["--dataset", str(dataset), "--output-dir", str(tmp_path / "out"), "--device=cpu", *FLAGS, *flags]
    assert main(arguments, NARROW) == 0
    results = json.loads((tmp_path / "out" / f"ablation_{dataset.name}" / "results.json").read_text())
    assert not [fault for fault in check_schema(results) if fault.startswith(("splits", "config.splits", "timing"))]
    return results


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """30 LoRAs of 3 classes and 8 layers of which three carry the class."""
    root = tmp_path_factory.mktemp("collections") / "planted"
    planted_collection(root, per_class=10)
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
    two = run(tmp_path, planted, "--splits=2")
    for_one = len(trained)
    same = [key for key in one if key not in ("environment", "timing", "config", "splits")]
    assert {key: one[key] for key in same} == {key: two[key] for key in same}
    found = two["splits"]
    assert found["splits"] == 2 and found["not_run"] == {}
    assert list(found["representations"]) == list(two["baseline_results"])
    for name, record in found["representations"].items():
        for condition in ("baseline", "ablation"):
            ordinary = one[f"{condition}_results"][name]["test_accuracy"]["mean"]
            assert record[condition]["values"][0] == pytest.approx(ordinary)
        assert record["drop"]["interval"] is None
    assert sum(layer["in_top_k"] for layer in found["layers"]) == pytest.approx(3)
    assert found["first"]["layer"] == one["top_layers"][0]
    capsys.readouterr()
    assert run(tmp_path, planted, "--splits=2") == two and "Nothing to do" in capsys.readouterr().out
    three = run(tmp_path, planted, "--splits=3")["splits"]
    assert len(trained) == 2 * for_one  # the third alone
    stats = three["representations"]["stats"]["baseline"]["values"]
    assert stats[:2] == found["representations"]["stats"]["baseline"]["values"]
    assert "split 3 of 3: first " in capsys.readouterr().out


def test_a_representation_that_one_split_cannot_do_is_left_out(planted, tmp_path, monkeypatch):
    experiment = experiment_on(
        planted, tmp_path, *FLAGS[:1], "--splits=3", "--num-runs=1", "--representations=stats,spectral"
    )
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
    describe_files(planted, lambda i: {"artist": f"artist {i // 3}"})  # ten, of which some of two classes
    flags = (*FLAGS[:1], "--splits=3", "--num-runs=1", "--representations=stats", "--group-column=artist")
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
    assert len(rows) == 3 and found["splits"] == len(distinct) == 3 - len(found["splits_not_run"])
    assert all("same LoRAs" in reason for reason in found["splits_not_run"].values())
