"""Several splits of one collection: intervals that cover the truth, agreement of rankings, and what is left out."""

import numpy as np
import pytest

from analysis.across_splits import SHARES, SplitOutcome, across_splits, summary
from training.splits import split_rows


def centroid_accuracy(x: np.ndarray, y: np.ndarray, rows: dict[str, np.ndarray], on: tuple | None = None) -> float:
    """Accuracy of the nearest class mean of the train rows, on the test rows or on another sample."""
    train = rows["train"]
    means = np.stack([x[train][y[train] == label].mean(0) for label in np.unique(y)])
    tested, truth = (x[rows["test"]], y[rows["test"]]) if on is None else on
    return float((np.square(tested[:, None] - means).sum(2).argmin(1) == truth).mean())


def sample(per_class: int, shift: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian features float[n, 5] of four classes whose means are a shift apart."""
    y = np.tile(np.arange(4), per_class)
    return generator.normal(size=(len(y), 5)) + shift * np.eye(4, 5)[y], y


@pytest.mark.parametrize("splits", [5, 10])
def test_intervals_cover_what_the_classifier_reaches_on_new_loras(splits):
    generator, covered, means, truths = np.random.default_rng(splits), [], [], []
    population = sample(1000, 1.5, generator)
    for draw in range(120):
        x, y = sample(25, 1.5, generator)
        parts = [split_rows(y, 1000 * draw + split) for split in range(splits)]
        ratio = len(parts[0]["test"]) / len(parts[0]["train"])
        result = summary(np.array([centroid_accuracy(x, y, rows) for rows in parts]), ratio, SHARES)
        truths.append(centroid_accuracy(x, y, parts[0], population))
        covered.append(result["interval"])
        means.append(result["mean"])
    truth = np.mean(truths)
    assert abs(np.mean(means) - truth) < 3 * np.std(means) / np.sqrt(120)
    inside = [low <= truth <= high for low, high in covered]
    assert np.mean(inside) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 120)
