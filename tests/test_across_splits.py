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


@pytest.mark.parametrize(("splits", "draws"), [(5, 100), (10, 70)])
def test_intervals_cover_what_the_classifier_reaches_on_new_loras(splits, draws):
    generator, covered, means, truths = np.random.default_rng(splits), [], [], []
    population = sample(1000, 1.5, generator)
    for draw in range(draws):
        x, y = sample(25, 1.5, generator)
        parts = [split_rows(y, 1000 * draw + split) for split in range(splits)]
        ratio = len(parts[0]["test"]) / len(parts[0]["train"])
        result = summary(np.array([centroid_accuracy(x, y, rows) for rows in parts]), ratio, SHARES)
        truths.append(centroid_accuracy(x, y, parts[0], population))
        covered.append(result["interval"])
        means.append(result["mean"])
    truth = np.mean(truths)
    assert abs(np.mean(means) - truth) < 3 * np.std(means) / np.sqrt(draws)
    inside = [low <= truth <= high for low, high in covered]
    assert np.mean(inside) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / draws)


def test_below_five_splits_and_without_variation_there_is_a_range_only():
    few = summary(np.array([0.2, 0.4, 0.3, 0.5]), 0.3, SHARES)
    assert few["interval"] is None and (few["min"], few["max"]) == (0.2, 0.5) and few["mean"] == pytest.approx(0.35)
    assert summary(np.array([0.5]), 0.3, SHARES)["sd"] is None
    assert summary(np.full(8, 1.0), 0.3, SHARES)["interval"] is None
    low, high = summary(np.array([0.99, 0.95, 1, 0.97, 0.6]), 0.3, SHARES)["interval"]
    assert 0 <= low < high == 1


def test_the_interval_is_the_corrected_resampled_t():
    values = np.array([0.5, 0.6, 0.4, 0.55, 0.45])
    half = 2.776445 * np.sqrt(1 / 5 + 0.25) * values.std(ddof=1)  # t of 4 degrees
    np.testing.assert_allclose(summary(values, 0.25, SHARES)["interval"], [0.5 - half, 0.5 + half], rtol=1e-6)


def outcome(ranking: list[int], tested: range, recognised: list[float], **accuracies: float) -> SplitOutcome:
    """A split of 4 layers and of as many test LoRAs, of each of which a layer recognises the same share."""
    hits = np.repeat(np.array(recognised)[:, None] * 40, len(tested), axis=1)
    rows = np.array(tested)
    without = {name: accuracy - 0.25 for name, accuracy in accuracies.items()}
    return SplitOutcome(np.array(ranking), 70, rows, rows, hits, 40, accuracies, without, accuracies)


def test_agreement_of_splits_and_the_first_layer_on_loras_that_did_not_choose_it():
    names, scores = ["a", "b", "c", "d"], [0.5, 0.75, 0.25, 0.0]
    first = outcome([1, 0, 2, 3], range(20), scores, stats=0.5, spectral=0.75)
    first.recognised[1] = 40
    second = outcome([0, 2, 1, 3], range(10, 30), [0.75, 0.25, 0.375, 0.0], stats=0.75, spectral=1.0)
    second.recognised[1, :10] = 40  # LoRAs of both
    result = across_splits([first, second], names, 2, {}, {})
    assert result["best"] == "spectral" and result["representations"]["spectral"]["behind_best"] is None
    stats = result["representations"]["stats"]
    assert stats["behind_best"]["values"].tolist() == [0.25, 0.25] and stats["drop"]["mean"] == 0.25
    assert stats["baseline"]["interval"] is None and stats["baseline"]["mean"] == 0.625
    assert result["first"]["layer"] == "b" and result["first"]["values"].tolist() == [0.25]
    assert result["same_top_k"] == 1 and [layer["in_top_k"] for layer in result["layers"]] == [1, 0.5, 0.5, 0]
    assert result["layers"][1]["mean_accuracy"] == pytest.approx((1 + 0.625) / 2)
    assert -1 < result["kendall_tau"] < 1 and 0 < result["kendall_w"] < 1


def test_rankings_that_agree_and_layers_that_do_not_differ():
    same = [outcome([3, 2, 1, 0], range(10 * i, 10 * i + 20), [0.1, 0.2, 0.3, 0.4]) for i in range(3)]
    result = across_splits(same, ["a", "b", "c", "d"], 1, {"pca": "split 2: diverged"}, {})
    assert result["kendall_w"] == pytest.approx(1) and result["kendall_tau"] == pytest.approx(1)
    assert result["same_top_k"] == 1 and result["best"] is None and result["not_run"] == {"pca": "split 2: diverged"}
    alike = [outcome([0, 1, 2, 3], range(20), [0.5, 0.5, 0.5, 0.5]) for _ in range(2)]
    result = across_splits(alike, ["a", "b", "c", "d"], 1, {}, {})
    assert result["kendall_w"] is None and result["kendall_tau"] is None and result["first"] is None
    alone = across_splits(alike[:1], ["a", "b", "c", "d"], 1, {}, {"2": "the same LoRAs"})
    assert alone["splits"] == 1 and alone["same_top_k"] is None and alone["layers"][0]["sd"] is None
