"""What is kept: tensors in files, factors in float16, support vector machines without their train rows."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.svm import SVC

from experiment.model_files import Made, write_tensors, written_whole
from experiment.models import choose
from experiment.predictors import by_pairs, nearest, packed_factors


def test_a_file_of_tensors_is_read_by_the_library(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1.5], np.float16),
        "none": np.zeros(0, np.int64),
        "c": np.array([True, False]),
        "d": np.array(2.5),
    }
    digest, size = write_tensors(tmp_path / "x.safetensors", {name: Made.of(array) for name, array in arrays.items()})
    read = load_file(tmp_path / "x.safetensors")
    assert {name: (tensor.numpy().dtype, tensor.numpy().tolist()) for name, tensor in read.items()} == {
        name: (array.dtype, array.tolist()) for name, array in arrays.items()
    }
    assert len(digest) == 64 and size == (tmp_path / "x.safetensors").stat().st_size


def test_the_folder_is_written_whole_or_not_at_all(tmp_path):
    with written_whole(tmp_path) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(OSError), written_whole(tmp_path) as folder:
        (folder / "a").write_text("second")
        raise OSError("no space")
    assert (tmp_path / "model" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4, 1e-38])
def test_factors_that_were_float16_lose_nothing(size):
    generator = torch.Generator().manual_seed(0)
    down = (torch.randn(3, 2, 5, generator=generator) * size).half().float()
    up = torch.randn(3, 4, 2, generator=generator).half().float()
    down[1] = 0
    scale = torch.tensor([1.0, 0.5, -2.0])
    packed = packed_factors(down, up, scale, torch.float16)
    assert packed[0].dtype == torch.float16 and packed[0].isfinite().all()
    before = scale.double()[:, None, None] * (up.double() @ down.double())
    after = packed[2][:, None, None] * (packed[1].double() @ packed[0].double())
    assert torch.equal(before, after)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_votes_are_those_of_the_library(classes):
    generator = np.random.default_rng(classes)
    x, y = generator.normal(size=(60, 8)), np.arange(60) % classes
    x[:, 0] += y
    kernel = x @ x.T
    svm = SVC(kernel="precomputed", C=1.0).fit(kernel[:40, :40], y[:40])
    sign = -1 if classes == 2 else 1
    scores, voted = by_pairs(kernel[40:][:, svm.support_], sign * svm.dual_coef_, svm.n_support_, sign * svm.intercept_)
    assert voted.tolist() == svm.predict(kernel[40:, :40]).tolist()
    decisions = svm.decision_function(kernel[40:, :40])
    if classes == 2:
        assert scores == pytest.approx(np.stack([-decisions, decisions], axis=1))
    assert scores.sum(1) == pytest.approx(np.zeros(20))


def test_a_row_is_at_distance_0_from_itself():
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)).half().float()
    assert nearest(x, x[:50].half())[:50, 0].tolist() == [0.0] * 50
    distance, cosine = nearest(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]]))[0]
    assert distance == pytest.approx(10**0.5) and cosine == pytest.approx(1 - 0.8)


def entry(accuracy: float) -> dict:
    return {"val_accuracy": {"mean": accuracy}}


def test_the_best_are_kept_and_the_best_of_these_is_first():
    entries = {
        "update_sketch": entry(0.8),
        "update_spectrum": entry(0.7),
        "update_views": entry(0.9),
        "stats": entry(1),
    }
    assert choose(None, entries) == (["update_views", "update_sketch"], [])
    entries["update_spectrum"] = entry(0.95)
    assert choose(None, entries) == (["update_spectrum", "update_views"], [])
    names, missing = choose(("update_sketch", "update_kernel"), entries)
    assert names == ["update_sketch"]
    assert missing == [{"representation": "update_kernel", "reason": "it was not run with all layers"}]
    names, missing = choose(None, {"stats": entry(1)})
    assert names == [] and json.dumps(missing).startswith('[{"representation": null')
