"""Bootstrap and permutation draws against scipy, by hand, and on predictions that know nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import evidence
from evidence import Draws, exceedance, holm, interval, null_accuracies, permuted, sign_p, spearman


def test_a_classifier_that_is_always_right_is_right_in_every_draw():
    drawn = Draws(np.arange(7), 100, 0).accuracies([np.ones((3, 7), bool), np.zeros((3, 7), bool)])
    assert (drawn[0] == 1).all() and (drawn[1] == 0).all()


def test_draws_spread_as_scipys_bootstrap_does():
    correct = np.random.default_rng(0).random(150) < 0.7
    drawn = Draws(np.arange(150), 5000, 1).accuracies([correct[None]])[0]
    reference = stats.bootstrap((correct,), np.mean, n_resamples=5000, method="percentile", random_state=2)
    np.testing.assert_allclose(drawn.std(), reference.standard_error, rtol=0.05)
    np.testing.assert_allclose(interval(drawn), reference.confidence_interval, atol=0.015)


def test_equal_predictions_give_equal_draws_whatever_stands_beside_them():
    correct = np.random.default_rng(0).random((4, 3, 50)) < 0.5
    draws = Draws(np.arange(50), 200, 0)
    together, alone = draws.accuracies([*correct, correct[0]]), draws.accuracies([correct[0]])
    np.testing.assert_array_equal(together[0], together[4])
    np.testing.assert_array_equal(together[0], alone[0])


def test_a_group_is_drawn_as_a_whole():
    groups = np.repeat([5, 9], [10, 10])
    drawn = Draws(groups, 400, 0).accuracies([(groups == 5)[None]])[0]
    assert set(drawn.tolist()) == {0.0, 0.5, 1.0}  # twice the one, each once, twice the other


def test_runs_are_drawn_only_where_asked():
    correct = np.repeat([[True], [False]], 8, axis=1)  # one run right, one wrong, on every LoRA
    draws = Draws(np.arange(8), 300, 0)
    assert set(draws.accuracies([correct])[0].tolist()) == {0.0, 0.5, 1.0}
    assert set(draws.accuracies([correct], runs=False)[0].tolist()) == {0.5}


def test_draws_do_not_depend_on_how_much_is_worked_on_at_a_time(monkeypatch):
    correct = [np.random.default_rng(0).random((2, 30)) < 0.5]
    monkeypatch.setattr(evidence, "BLOCK", 3000)
    small = Draws(np.arange(30), 250, 0).accuracies(correct)
    assert small.shape == (1, 250) and abs(small.mean() - correct[0].mean()) < 0.02


def test_sign_p_counts_draws_beyond_zero():
    assert sign_p(np.array([1.0] * 98 + [-1.0])) == pytest.approx(2 * 2 / 100)
    assert sign_p(np.zeros(99)) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_textbooks_step_down(p):
    adjusted = holm(p)
    for i, one in enumerate(p):
        smaller = [(sum(other < q or (other == q and k < j) for k, other in enumerate(p)), q) for j, q in enumerate(p)]
        expected = max(min(1.0, (len(p) - rank) * q) for rank, q in smaller if q <= one)
        assert adjusted[i] == pytest.approx(expected)


def test_permuted_labels_keep_their_counts_and_are_uniform():
    y = np.array([0, 0, 0, 1, 1, 2])
    drawn = permuted(y, np.arange(6), 6000, np.random.default_rng(0))
    assert (np.sort(drawn, axis=1) == y).all()
    np.testing.assert_allclose((drawn == 2).mean(0), 1 / 6, atol=0.02)


def test_permuted_groups_of_one_size_stay_whole():
    groups = np.array([2, 0, 1, 0, 2, 1])
    y = np.array([7, 5, 6, 5, 7, 6])
    drawn = permuted(y, groups, 500, np.random.default_rng(0))
    for group in range(3):
        assert (np.ptp(drawn[:, groups == group], axis=1) == 0).all()
    assert len(np.unique(drawn, axis=0)) == 6  # all orders of three groups


def test_permuted_groups_of_different_sizes_keep_the_counts():
    groups, y = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 0])
    drawn = permuted(y, groups, 200, np.random.default_rng(0))
    assert (np.sort(drawn, axis=1) == np.sort(y)).all() and len(np.unique(drawn, axis=0)) > 2


@pytest.mark.parametrize("block", [evidence.BLOCK, 500])
def test_null_accuracies_are_those_of_a_loop(monkeypatch, block):
    monkeypatch.setattr(evidence, "BLOCK", block)
    generator = np.random.default_rng(3)
    predicted, y = generator.integers(0, 4, (5, 2, 30)), generator.integers(0, 4, 30)
    fast = null_accuracies(predicted, y, np.arange(30), 4, 40, seed=1)
    same, draws = np.random.default_rng([1, 30]), max(1, block // 120)
    labels = np.concatenate([permuted(y, np.arange(30), min(draws, 40 - start), same) for start in range(0, 40, draws)])
    slow = [[(of_layer == of_draw).mean() for of_layer in predicted] for of_draw in labels]
    np.testing.assert_allclose(fast, slow, rtol=1e-12)


def test_guessing_the_largest_class_is_never_above_the_null():
    y = np.repeat([0, 1], [15, 5])
    predicted = np.zeros((1, 1, 20), int)
    null = null_accuracies(predicted, y, np.arange(20), 2, 100, 0)
    assert (null == 0.75).all()
    assert exceedance(np.array([0.75]), null) == 1


def test_the_best_of_many_that_know_nothing_is_called_predictive_one_time_in_twenty():
    generator, called, trials = np.random.default_rng(0), 0, 300
    for trial in range(trials):
        y, predicted = generator.permutation(np.arange(40) % 4), generator.integers(0, 4, (20, 3, 40))
        null = null_accuracies(predicted, y, np.arange(40), 4, 199, trial)
        called += exceedance((predicted == y).mean((1, 2)).max(keepdims=True), null.max(1, keepdims=True))[0] <= 0.05
    assert called / trials <= 0.05 + 2 * (0.05 * 0.95 / trials) ** 0.5


def test_exceedance_counts_ties_and_never_gives_zero():
    np.testing.assert_allclose(exceedance(np.array([0.5, 0.9]), np.array([[0.5], [0.4], [0.6]])), [3 / 4, 1 / 4])


def test_spearman_is_scipys_and_knows_its_limits():
    a, b = np.array([1.0, 2, 3, 4, 5, 6]), np.array([2.0, 1, 4, 3, 6, 5])
    found = spearman(a, b)
    assert found["r"] == pytest.approx(stats.spearmanr(a, b).statistic)
    half = stats.norm.ppf(0.975) / np.sqrt(3)  # Fisher's transformation, n - 3
    assert found["interval"] == pytest.approx(np.tanh(np.arctanh(found["r"]) + np.array([-half, half])))
    assert spearman(a[:3], b[:3]) is None and spearman(a, np.ones(6)) is None
