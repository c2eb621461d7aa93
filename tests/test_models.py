"""What is kept: tensors in files, factors in float16, support vector machines without their train rows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.svm import SVC

from experiment import models, predictors
from experiment.model_files import Made, write_tensors, written_whole
from experiment.models import choose
from experiment.predictors import Predicted, Rows, by_pairs, joined, nearest, packed_factors


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


def test_the_nearest_is_found_among_many_to_rounding():
    generator = torch.Generator().manual_seed(1)
    x, others = torch.randn(40, 300, generator=generator), torch.randn(70, 300, generator=generator)
    expected = torch.cdist(x.double(), others.double()).amin(1)
    cosines = torch.nn.functional.cosine_similarity(x[:, None].double(), others[None].double(), dim=2).amax(1)
    found = nearest(x, others)
    assert found[:, 0] == pytest.approx(expected.numpy()) and found[:, 1] == pytest.approx(
        1 - cosines.numpy(), abs=1e-6
    )
    assert nearest(torch.zeros(1, 3), torch.ones(2, 3))[0] == pytest.approx([3**0.5, 1])


def test_rows_in_parts_and_predictions_joined():
    assert Rows(np.zeros((5, 1))).parts() == [None] and Rows(np.zeros((5, 1)), at_once=5).parts() == [None]
    assert [part.tolist() for part in Rows(np.zeros((5, 1)), at_once=2).parts()] == [[0, 1], [2, 3], [4]]
    parts = [Predicted(np.full((2, n, 3), n), np.full((2, n), n), np.full((n, 1), n)) for n in (1, 2)]
    whole = joined(parts)
    assert whole.classes.tolist() == [[1, 2, 2]] * 2 and whole.distance.ravel().tolist() == [1, 2, 2]
    assert whole.scores.shape == (2, 3, 3) and whole.contribution is None


def test_modules_speak_for_the_label_though_most_runs_see_another_class(monkeypatch):
    scores = torch.tensor([[[5.0, 0, 0]], [[0, 0.3, 0]], [[0, 0.3, 0]]])  # the mean probability is largest for class 0
    asked = []

    def read_out(_, __, ___, label):
        asked.append(label.tolist())
        return {"contribution": np.zeros((3, 1, 2), np.float32)}

    monkeypatch.setattr(predictors, "tokens", lambda *_: torch.zeros(1, 2))
    monkeypatch.setattr(predictors.attention, "predict_logits", lambda *_: scores)
    monkeypatch.setattr(predictors.attention, "read_out", read_out)
    for temperature in (1.0, 100.0):
        record = {"kind": "attention", "temperature": temperature}
        predictors.predict(record, lambda _: torch.ones(3, 2), Rows(np.zeros((1, 2))))
    assert asked == [[0], [0]]


def calibrated(monkeypatch, classes: np.ndarray, landmarks: int | None) -> dict:
    """Return the record of a support vector machine that predicts these classes of 20 validation and 10 test LoRAs."""
    y = np.arange(40) % 2
    rows = {"train": np.arange(10), "validation": np.arange(10, 30), "test": np.arange(30, 40)}
    experiment = SimpleNamespace(
        rows=rows,
        planner=SimpleNamespace(held_out=np.arange(10, 40)),
        collection=SimpleNamespace(y=y),
    )
    tried = Predicted(np.eye(2)[classes][None], classes[None], np.arange(30.0)[:, None])
    monkeypatch.setattr(models, "_tried", lambda *_: tried)
    monkeypatch.setattr(models, "_norms", lambda _: np.ones((40, 3)))
    record, _ = models._calibrated(experiment, {"landmarks": landmarks}, {}, y[None, 10:])
    return record


def test_what_is_kept_is_told_by_its_own_accuracy(monkeypatch):
    right = np.arange(10, 40) % 2
    classes = np.where(np.arange(30) < 5, 1 - right, right)
    record = calibrated(monkeypatch, classes, 7)
    assert record["validation_accuracy"] == 0.75 and record["same"] == 1
    # Distances of the test LoRAs are larger than those of all validation LoRAs.
    assert (record["usual"]["measured_on"], record["usual"]["rows"]) == ("validation", 20) and record["flagged"] > 0.5


def test_a_machine_on_landmarks_that_is_no_better_than_guessing_is_not_kept(monkeypatch):
    always = np.zeros(30, int)
    with pytest.raises(ValueError, match=r"fitted to 7 LoRAs.* 50.0 % of the validation LoRAs.* one class on 50.0 %"):
        calibrated(monkeypatch, always, 7)
    assert calibrated(monkeypatch, always, None)["validation_accuracy"] == 0.5  # the experiment's own is what it is


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
