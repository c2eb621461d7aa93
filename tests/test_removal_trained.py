"""Classifiers that are trained on planted features, under the planned removals, come to the planted verdict."""

import numpy as np
import pytest
import torch

from analysis.evidence import Evidence, Predictions
from analysis.removal import plan_controls, robustness
from loras.lora_files import Layer
from training.classifier import Models, train_classifiers
from training.stacks import Schedule, Split, standardise

LAYERS, CLASSES, LORAS, RUNS, TOP_K = 12, 4, 280, 2, 2
SCHEDULE = Schedule(max_epochs=30, patience=10, hidden=(32, 32, 32))


@pytest.fixture
def one_thread():
    """Train on one thread, as the program does; on many small products several threads may take far longer than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def planted(where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return statistics float32[N, L, 7] of layers that know the class: one, each a little, each all of it, or none."""
    generator = np.random.default_rng(7)
    y, x = np.arange(LORAS) % CLASSES, generator.normal(size=(LORAS, LAYERS, 7))
    means = generator.normal(size=(CLASSES, LAYERS, 7))
    means /= np.linalg.norm(means, axis=2, keepdims=True)
    strength = {
        "one layer": 8.0 * (np.arange(LAYERS) == 4),
        "a little in each": np.full(LAYERS, 0.9),
        "all in each": np.full(LAYERS, 8.0),
        "none": np.zeros(LAYERS),
    }[where]
    return (x + strength[:, None] * means[y]).astype(np.float32), y


def trained_robustness(where: str) -> dict:
    """Rank the layers, plan and train the conditions as one stack each, and return the conclusions."""
    x, y = planted(where)
    part = np.arange(LORAS) // CLASSES % 7  # 3 of 7 to train on, 1 to stop by, 3 to test on
    rows = {
        name: np.flatnonzero(np.isin(part, sevenths)) for name, sevenths in (("train", (0, 2, 4)), ("validation", (6,)))
    }
    rows["test"] = np.flatnonzero(np.isin(part, (1, 3, 5)))
    split, labels = Split(*(torch.from_numpy(indices) for indices in rows.values())), torch.from_numpy(y)

    def train(features: np.ndarray, models: Models) -> np.ndarray:
        read = standardise(torch.from_numpy(features), split.train)
        trained = train_classifiers(read, labels, split, models, CLASSES, schedule=SCHEDULE, seed=0, dropout=0.1)
        return trained["predicted"].reshape(-1, RUNS, len(rows["validation"]) + len(rows["test"]))

    source, run = (torch.from_numpy(index.ravel()) for index in np.indices((LAYERS, RUNS)))
    alone = train(np.ascontiguousarray(x.swapaxes(0, 1)), Models(source, run))
    validation = alone[..., : len(rows["validation"])] == y[rows["validation"]]
    ranking = np.argsort(-validation.mean((1, 2)), kind="stable")
    layers = [Layer(f"layer {d}", f"m_{d // 2}", ("down", "up")[d % 2], (1, 4), "F32") for d in range(LAYERS)]
    roles = [layer.role for layer in layers]
    planned = plan_controls(ranking, roles, TOP_K, runs=RUNS, draws=20, points=11, seed=0)
    live = torch.from_numpy(planned.kept.reshape(-1, LAYERS)).repeat_interleave(7, dim=1)
    run = torch.arange(RUNS).repeat(len(planned.names))
    predicted = train(x.reshape(1, LORAS, -1), Models(torch.zeros_like(run), run, live))
    held_out = np.concatenate([rows["validation"], rows["test"]])
    evidence = Evidence(
        layers, list("abcd"), y, rows, None, ranking, TOP_K, Predictions(held_out, y[held_out]), 0, 2000, 2000
    )
    return robustness(evidence, planned, predicted[..., len(rows["validation"]) :])


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("one layer", "localized"),
        ("a little in each", "distributed"),
        ("all in each", "redundant"),
        ("none", "no signal"),
    ],
)
def test_classifiers_trained_on_what_is_planted_come_to_its_verdict(one_thread, where, expected):
    result = trained_robustness(where)
    assert result["verdict"] == expected, result
