"""Temperature, and what is unlike anything in training: hand-computed values and planted truth."""

import numpy as np
import pytest

from analysis.calibration import (
    Norms,
    Usual,
    evenly,
    fit_temperature,
    log_loss,
    mean_probabilities,
    most_train_rows,
    rows_of_bound,
)


def test_probabilities_are_the_mean_over_runs():
    scores = np.log([[[1.0, 3.0]], [[1.0, 1.0]]])  # two runs, one LoRA
    assert mean_probabilities(scores, 1.0) == pytest.approx(np.array([[0.375, 0.625]]))
    assert log_loss(scores, np.array([1]), 1.0) == pytest.approx(-np.log(0.625))
    assert mean_probabilities(scores, 0.5) == pytest.approx(np.array([[0.3, 0.7]]))


def test_the_temperature_is_found_that_scores_were_multiplied_by():
    generator = np.random.default_rng(0)
    right = generator.normal(size=(1, 4000, 3))
    chances = mean_probabilities(right, 1.0)
    y = (generator.random((4000, 1)) > chances.cumsum(1)).sum(1)
    assert fit_temperature(right, y) == pytest.approx(1, abs=0.1)
    assert fit_temperature(right * 5, y) == pytest.approx(5, abs=0.5)


def test_few_rows_that_are_all_right_do_not_make_it_sure():
    scores = np.array([[[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]])
    y = np.array([0, 1, 0])
    probability = mean_probabilities(scores, fit_temperature(scores, y))[0, 0]
    assert probability == pytest.approx(1 - 0.1 / (3 + 2), abs=1e-4)  # the smoothed truth


def test_a_norm_is_surprising_by_its_deviation_in_logarithms():
    norms = Norms.of(np.exp([[0.0, 1.0], [2.0, 1.0]]))
    assert norms.mean.tolist() == [1.0, 1.0]
    assert norms.spread == pytest.approx([1.0, 0.01])  # the least
    assert norms.surprise(np.exp([[4.0, 1.0], [1.0, 1.02]])) == pytest.approx([3.0, 2.0])


def test_no_update_is_surprising_but_where_train_loras_have_none():
    norms = Norms.of(np.array([[1.0, 0.0], [1.1, 1.0]]))
    surprise = norms.surprise(np.array([[0.0, 1.0], [1.05, 0.0]]))
    assert surprise[0] > 100 and surprise[1] < 1


def test_the_temperature_is_the_best_of_several_minima():
    generator = np.random.default_rng(3)
    for _ in range(25):
        runs, n, classes = generator.integers(1, 11), generator.integers(3, 40), generator.integers(2, 10)
        y = generator.integers(0, classes, n)
        scores = generator.normal(size=(runs, n, classes)) * 10 ** generator.uniform(-3, 5)
        scores += (np.arange(classes) == y[:, None]) * scores.std() * generator.uniform(0, 4)
        smoothing = 0.1 / (n + 2)
        least = min(log_loss(scores, y, float(np.exp(log)), smoothing) for log in np.linspace(-12, 12, 97))
        assert log_loss(scores, y, fit_temperature(scores, y), smoothing) < least + 1e-3


def test_a_score_is_the_largest_measure_in_spreads_and_few_are_above_the_bound():
    measures = np.stack([np.arange(101.0), np.full(101, 2.0)], axis=1)
    usual = Usual.of(measures)
    assert usual.medians == (50, 2) and usual.spreads == pytest.approx((40, 0.002))  # the least
    assert usual.scores(np.array([[130.0, 2.0], [50.0, 2.006]])) == pytest.approx([2, 3])
    # The 97th of 101, 96, by median and spread of the other 100.
    assert usual.bound == pytest.approx((96 - 49.5) / (89.1 - 49.5))
    assert usual.is_unlike(usual.scores(measures)).sum() == 4
    assert not Usual.of(np.zeros((50, 1))).is_unlike(np.zeros(5)).any()


def test_of_fewer_than_19_rows_nothing_is_flagged():
    measures = np.random.default_rng(0).random((19, 2))
    assert Usual.of(measures).bound is not None
    few = Usual.of(measures[:18], "held-out")
    assert few.bound is None and (few.measured_on, few.rows) == ("held-out", 18)
    assert not few.is_unlike(few.scores(np.array([[1e9, 1e9]]))).any()
    assert Usual.of(measures[:1]).bound is None


@pytest.mark.parametrize("n", [19, 20, 30, 39, 100])
def test_one_in_twenty_of_loras_like_them_is_flagged_at_most(n):
    def drawn(count: int) -> np.ndarray:
        largest = np.abs(generator.normal(size=(count, 20))).max(1)
        return np.column_stack([100 + generator.normal(size=count), generator.random(count) ** 3, largest])

    generator, shares = np.random.default_rng(n), []
    for _ in range(40 if n == 100 else 100):
        usual = Usual.of(drawn(n))
        shares.append(usual.is_unlike(usual.scores(drawn(200))).mean())
    assert 0.01 < np.mean(shares) < 0.05 + 2 * np.std(shares) / len(shares) ** 0.5


def test_a_bound_is_measured_on_validation_rows_where_they_are_enough():
    rows, name = rows_of_bound(19, 40)
    assert rows.tolist() == list(range(19)) and name == "validation"
    rows, name = rows_of_bound(18, 40)
    assert rows.tolist() == list(range(58)) and name == "held-out"
    rows, _ = rows_of_bound(30_000, 5)
    assert len(set(rows.tolist())) == 2000 and rows[0] == 0 and rows[-1] == 29_999


def test_what_is_a_little_farther_than_all_is_flagged_where_distances_hardly_differ():
    generator = np.random.default_rng(0)
    usual = Usual.of(np.stack([100 + generator.normal(size=200), 5 * generator.random(200)], axis=1))
    assert usual.is_unlike(usual.scores(np.array([[105.0, 2.0], [100.0, 4.0]]))).tolist() == [True, False]


def test_kept_rows_are_even_over_the_classes():
    y = np.array([0] * 10 + [1] * 3 + [2] * 2)
    chosen = y[evenly(y, 7)]
    assert np.bincount(chosen).tolist() == [3, 2, 2]
    assert len(evenly(y, 100)) == len(y)
    assert most_train_rows(64) == 2000 and most_train_rows(2**20) == 64
