"""One absurd file among the LoRAs of a collection: it is named, nothing is learned from it, and no number overflows."""

import csv
import json

import numpy as np
import pytest
import torch
from making import NARROW, planted_collection
from safetensors.torch import load_file, save_file

from ablation_experiment import main
from data import index_collection
from experiment.phases import split_collection
from training.kernels import UpdateKernels

FLAGS = ("--device=cpu", "--quick", "--num-runs=1", "--top-k=3")


def collection_with(root, part: str | None, change) -> str:
    """A planted collection of 60 LoRAs, one of a part of the split changed; the path of that."""
    planted_collection(root)
    collection = index_collection(root)
    path = collection.files[split_collection(collection, 42)[part or "train"][5]].path
    if part:
        save_file({name: change(tensor) for name, tensor in load_file(root / path).items()}, root / path)
    return path


def test_a_third_of_absurd_train_loras_cost_the_others_little(tmp_path, capsys):
    planted_collection(tmp_path / "zoo")
    collection = index_collection(tmp_path / "zoo")
    paths = [collection.files[row].path for row in split_collection(collection, 42)["train"][::3]]
    for path in paths:
        tensors = load_file(tmp_path / "zoo" / path)
        save_file({name: 1e14 * tensor for name, tensor in tensors.items()}, tmp_path / "zoo" / path)
    results, _ = run(tmp_path / "zoo", tmp_path / "out", "stats")
    assert results["dataset"]["not_trained_on"] == paths and results["dataset"]["split_sizes"]["train"] == 28
    assert [finding["kind"] for finding in results["dataset"]["findings"]] == ["outlier"]
    assert accuracy(results) > 0.35


def run(root, out, names):
    code = main(["--dataset", str(root), "--output-dir", str(out), *FLAGS, f"--representations={names}"], NARROW)
    assert code == 0
    folder = out / "ablation_zoo"
    return json.loads((folder / "results.json").read_text()), folder


def accuracy(results):
    """Mean test accuracy of the single layers, which all 60 LoRAs but one decide alike."""
    return np.mean([record["accuracy"] for record in results["layer_ranking"]])


def test_a_train_lora_a_thousand_times_too_large_costs_the_others_nothing(tmp_path, capsys):
    collection_with(tmp_path / "clean" / "zoo", None, None)
    path = collection_with(tmp_path / "one" / "zoo", "train", lambda tensor: 1000 * tensor)
    clean, _ = run(tmp_path / "clean" / "zoo", tmp_path / "clean" / "out", "stats")
    one, folder = run(tmp_path / "one" / "zoo", tmp_path / "one" / "out", "stats")
    assert clean["dataset"]["not_trained_on"] == [] and clean["dataset"]["split_sizes"]["train"] == 42
    assert one["dataset"]["not_trained_on"] == [path] and one["dataset"]["split_sizes"]["train"] == 41
    assert [finding["kind"] for finding in one["dataset"]["findings"]] == ["outlier"]
    assert accuracy(one) > accuracy(clean) - 0.03 and accuracy(clean) > 0.4
    rows = {row["file"]: row["split"] for row in csv.DictReader((folder / "samples.csv").open())}
    assert rows[path] == "none" and list(rows.values()).count("none") == 1
    text = (folder / "results.txt").read_text()
    assert f"; 1 more to train on left out, with weights over 100 times as large ({path})" in text
    run(tmp_path / "one" / "zoo", tmp_path / "one" / "out", "stats")
    assert "Nothing to do" in capsys.readouterr().out


ALL = (
    "flat_vec,stats,spectral,pca,coupling,vae,update_kernel,update_views,update_sketch,update_attention,update_learned"
)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("number", [1e30, 3e38, 1e-30, 1e-44])
def test_numbers_at_the_ends_of_their_range_end_no_run(tmp_path, part, number):
    path = collection_with(tmp_path / "zoo", part, lambda tensor: number * tensor.sign())
    results, folder = run(tmp_path / "zoo", tmp_path / "out", ALL)
    assert results["representations_not_run"] == [] and path in results["dataset"]["findings"][0]["files"]
    arrays = np.load(folder / "predictions.npz")
    assert all(np.isfinite(arrays[name]).all() for name in arrays if name.endswith("log_loss"))


def test_kernels_of_absurd_test_updates_are_numbers():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 2, 6, generator=generator), torch.randn(8, 5, 2, generator=generator)
    down[7], up[7] = 1e30, 1e30
    scale = torch.ones(8)

    def read(_, rows):
        return down[rows], up[rows], scale[rows]

    kernels = UpdateKernels(read, 1, np.arange(5), 8)
    assert np.isfinite(kernels.module(0)).all() and np.abs(kernels.module(0)[7]).max() > 1e14
    (inputs,) = kernels.inputs(np.ones((1, 1), bool))
    assert np.isfinite(inputs).all()
