"""Bootstrap and permutation draws against scipy, by hand, and on predictions that know nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.evidence import (
    BLOCK,
    Draws,
    Predictions,
    exceedance,
    holm,
    interval,
    null_accuracies,
    permuted,
    sign_p,
    spearman,
    stream,
)


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
    assert set(draws.accuracies([correct], resample_runs=False)[0].tolist()) == {0.5}


def test_draws_do_not_depend_on_how_much_is_worked_on_at_a_time():
    correct = [np.random.default_rng(0).random((2, 30)) < 0.5]
    small = Draws(np.arange(30), 250, 0, block=3000).accuracies(correct)
    assert small.shape == (1, 250) and abs(small.mean() - correct[0].mean()) < 0.02


@pytest.mark.parametrize("runs", [True, False])
def test_many_classifiers_in_small_blocks_are_drawn_as_in_one(runs):
    correct = [np.random.default_rng(i).random((1 + i % 3, 30)) < 0.5 for i in range(20)]
    whole = Draws(np.arange(30), 40, 0).accuracies(correct, resample_runs=runs)
    small = Draws(np.arange(30), 40, 0, block=4 * 30 * 40)  # all draws still in one block
    np.testing.assert_array_equal(small.accuracies(correct, resample_runs=runs), whole)


def test_classifiers_of_different_numbers_of_runs_share_the_loras_drawn():
    right = np.random.default_rng(0).random(60) < 0.5
    once, often = Draws(np.arange(60), 300, 0).accuracies([right[None], np.tile(right, (10, 1))])
    np.testing.assert_allclose(once, often, rtol=1e-12)  # equal on every LoRA in every run: no difference in any draw


def test_the_least_p_of_a_difference_is_an_exact_tests():
    wins = np.array([[True] * 5 + [False] * 15])
    draws = Draws(np.arange(20), 100, 0)
    assert draws.least_p(wins, ~wins) == 2.0**-19 and draws.least_p(wins, wins) == 1
    assert draws.least_p(wins, np.zeros((3, 20), bool)) == stats.binomtest(5, 5).pvalue
    assert Draws(np.arange(20) // 5, 100, 0).least_p(wins, np.zeros((1, 20), bool)) == 1  # all in one group


def test_any_seed_will_do_and_another_purpose_draws_other_numbers():
    first, same, other = (stream(-7, key, 1).random(4) for key in ("rows", "rows", "runs"))
    assert (first == same).all() and (first != other).all()


def test_the_draws_of_a_key_stay_what_they_are():
    """Keep the seeds: with others, every interval and p of finished results would change."""
    raw = stream(42, "runs", 0).bit_generator.random_raw(3)
    assert raw.tolist() == [9343276227593724650, 17517053512317570413, 15476819913495353059]
    assert stream(42, "runs", 0).integers(1000, size=4).tolist() == [906, 506, 192, 949]


def test_sign_p_counts_draws_beyond_zero():
    assert sign_p(np.array([1.0] * 98 + [-1.0])) == pytest.approx(2 * 2 / 100)
    assert sign_p(np.zeros(99)) == 1


def test_predictions_are_named_as_in_predictions_npz():
    held_out = np.arange(4)
    predictions = Predictions(held_out, held_out % 2)
    predictions.controls["stats"] = {"names": np.array(["all"]), "kept": np.ones((1, 1, 2)), "predicted": np.zeros(4)}
    predictions.conditions["ablation"] = {"spectral": {"predicted": np.ones(4), "epochs": np.ones(1)}}
    predictions.conditions["baseline"] = {"stats": {"predicted": np.ones(4)}, "spectral": {"predicted": np.zeros(4)}}
    predictions.layers |= {"predicted": np.zeros((2, 1, 4)), "log_loss": np.ones((2, 1, 4))}
    arrays = predictions.arrays()
    assert list(arrays) == [
        "rows",
        "y",
        "layers/predicted",
        "layers/log_loss",
        "ablation/spectral/predicted",
        "ablation/spectral/epochs",
        "baseline/stats/predicted",
        "baseline/spectral/predicted",
        "controls/stats/names",
        "controls/stats/kept",
        "controls/stats/predicted",
    ]
    assert arrays["controls/stats/kept"] is predictions.controls["stats"]["kept"] and arrays["rows"] is held_out


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_textbooks_step_down(p):
    adjusted = holm(p)
    for i, value in enumerate(p):
        smaller = [(sum(other < q or (other == q and k < j) for k, other in enumerate(p)), q) for j, q in enumerate(p)]
        expected = max(min(1.0, (len(p) - rank) * q) for rank, q in smaller if q <= value)
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


def test_permuted_groups_of_different_sizes_stay_whole_too():
    groups, y = np.array([0, 0, 0, 1, 2, 2]), np.array([5, 5, 5, 6, 7, 7])
    drawn = permuted(y, groups, 200, np.random.default_rng(0))
    for group in range(3):
        assert (np.ptp(drawn[:, groups == group], axis=1) == 0).all()
    assert len(np.unique(drawn, axis=0)) == 6


def test_labels_that_differ_within_groups_change_places_there():
    groups, y = np.repeat([0, 1, 2], [4, 4, 2]), np.array([0, 1, 2, 3] * 2 + [8, 9])
    drawn = permuted(y, groups, 600, np.random.default_rng(0))
    for labels in drawn:
        for group in range(3):
            has = sorted(labels[groups == group].tolist())
            assert has in ([8, 8, 9, 9], [8, 9], [0, 1, 2, 3]) or (group == 2 and len(set(has)) == 2)
    crossed = permuted(np.tile([0, 1], 6), np.arange(12) // 2, 100, np.random.default_rng(0))
    assert len(np.unique(crossed, axis=0)) > 30  # each group has both labels, and yet there is much to permute


@pytest.mark.parametrize("block", [BLOCK, 500])
def test_null_accuracies_are_those_of_a_loop(block):
    generator = np.random.default_rng(3)
    predicted, y = generator.integers(0, 4, (5, 2, 30)), generator.integers(0, 4, 30)
    fast = null_accuracies(predicted, y, np.arange(30), 4, 40, seed=1, block=block)
    same, draws = stream(1, "permutations", 30), max(1, block // 120)
    labels = np.concatenate([permuted(y, np.arange(30), min(draws, 40 - start), same) for start in range(0, 40, draws)])
    slow = [[(of_layer == of_draw).mean() for of_layer in predicted] for of_draw in labels]
    np.testing.assert_allclose(fast, slow, rtol=1e-12)


def test_guessing_the_largest_class_is_never_above_the_null():
    y = np.repeat([0, 1], [15, 5])
    predicted = np.zeros((1, 1, 20), int)
    null = null_accuracies(predicted, y, np.arange(20), 2, 100, 0)
    assert (null == 0.75).all()
    assert exceedance(np.array([0.75]), null) == 1


def test_guessing_one_class_is_chance_where_groups_differ_in_size():
    groups, y = np.repeat(np.arange(6), [10, 8, 2, 2, 2, 2]), np.repeat([0, 0, 1, 1, 1, 1], [10, 8, 2, 2, 2, 2])
    null = null_accuracies(np.zeros((1, 2, 26), int), y, groups, 2, 200, 0)
    np.testing.assert_allclose(null, 18 / 26, rtol=1e-12)


@pytest.mark.parametrize("equal", [True, False])
def test_groups_that_are_recognised_as_such_are_no_signal(equal):
    """Test predictions that are the same within a group, and know nothing: permuting single LoRAs is fooled."""
    generator, trials = np.random.default_rng(0), 300
    called = np.zeros(2)
    for trial in range(trials):
        sizes = np.full(12, 6) if equal else generator.integers(2, 11, 12)
        groups = np.repeat(np.arange(12), sizes)
        y, predicted = generator.permutation(np.arange(12) % 2)[groups], generator.integers(0, 2, 12)[groups]
        observed = np.array([(y == predicted).mean()])
        for i, of in enumerate((groups, np.arange(len(y)))):
            called[i] += exceedance(observed, null_accuracies(predicted[None, None], y, of, 2, 199, trial))[0] <= 0.05
    whole, one_by_one = called / trials
    assert whole <= 0.05 + 2 * (0.05 * 0.95 / trials) ** 0.5 and one_by_one > 0.15


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
    result = spearman(a, b)
    assert result["r"] == pytest.approx(stats.spearmanr(a, b).statistic)
    half = 1.959964 * np.sqrt((1 + result["r"] ** 2 / 2) / 3)  # Bonett & Wright, n - 3
    assert result["interval"] == pytest.approx(np.tanh(np.arctanh(result["r"]) + np.array([-half, half])))
    exact = stats.permutation_test(
        (a,), lambda x: stats.spearmanr(x, b).statistic, permutation_type="pairings", n_resamples=1000
    )
    assert result["p"] == pytest.approx(exact.pvalue)
    many = np.random.default_rng(0).normal(size=(2, 30))
    assert spearman(*many)["p"] == pytest.approx(stats.spearmanr(*many).pvalue)
    assert spearman(a[:4], a[:4])["p"] == pytest.approx(2 / 24) and spearman(a, -a)["interval"][1] < -0.99
    assert spearman(a[:3], b[:3]) is None and spearman(a, np.ones(6)) is None
