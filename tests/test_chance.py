"""Accuracies on permuted labels by hand and against a loop, and families of which nothing, or something, is known."""

from dataclasses import replace

import numpy as np
import pytest
from planting import all_tested
from sklearn.metrics import f1_score

from analysis.chance import ChanceTest, f1_weights, guessed, null_accuracies, permuted
from analysis.draws import BLOCK, exceedance, stream

TRIALS = 60
BOUND = 0.05 + 3 * (0.05 * 0.95 / TRIALS) ** 0.5  # three standard errors


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
    generator, trials = np.random.default_rng(0), 120
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
    generator, called, trials = np.random.default_rng(0), 0, 150
    for trial in range(trials):
        y, predicted = generator.permutation(np.arange(40) % 4), generator.integers(0, 4, (20, 3, 40))
        null = null_accuracies(predicted, y, np.arange(40), 4, 199, trial)
        called += exceedance((predicted == y).mean((1, 2)).max(keepdims=True), null.max(1, keepdims=True))[0] <= 0.05
    assert called / trials <= 0.05 + 2 * (0.05 * 0.95 / trials) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Families
# ----------------------------------------------------------------------------------------------------------------------


def test_a_weighted_sum_of_hits_is_scikit_learns_macro_f1_of_all_runs_together():
    generator = np.random.default_rng(0)
    y, predicted = generator.integers(0, 4, 50), generator.integers(0, 5, (3, 2, 50))  # the last class is said only
    weights = f1_weights(predicted, y, 5)
    for of_layer, weight in zip(predicted, weights, strict=True):
        expected = f1_score(np.tile(y, 2), of_layer.ravel(), labels=range(5), average="macro", zero_division=0)
        assert ((of_layer == y).mean(0) * weight[y]).mean() == pytest.approx(expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_guessed_is_the_mean_of_the_null(weighted):
    generator = np.random.default_rng(0)
    y, predicted = generator.permutation(np.repeat([0, 1, 2], [20, 8, 4])), generator.integers(0, 3, (4, 2, 32))
    weights = f1_weights(predicted, y, 3) if weighted else None
    null = null_accuracies(predicted, y, np.arange(32), 3, 4000, 0, weights=weights)
    np.testing.assert_allclose(null.mean(0), guessed(predicted, y, weights), atol=0.005)


GROUPED = {"no groups": [1] * 60, "groups of 2 to 8": [2, 8, 3, 5] * 5, "one group of 40": [40] + [1] * 20}


@pytest.mark.parametrize("sizes", GROUPED.values(), ids=GROUPED)
def test_no_layer_of_a_family_that_knows_nothing_is_called_in_more_than_a_twentieth(sizes):
    """Predict the same within groups, as what recognises groups and no concept does."""
    generator, groups, called = np.random.default_rng(1), np.repeat(np.arange(len(sizes)), sizes), 0
    for seed in range(TRIALS):
        y = generator.permutation(np.arange(len(sizes)) % 2)[groups]
        predicted = generator.integers(0, 2, (8, 1, len(sizes)))[..., groups]
        called += ChanceTest.of(all_tested(y, groups, draws=199, seed=seed), list(predicted)).above_null.any()
    assert called / TRIALS <= BOUND


def test_layers_that_say_the_largest_class_hide_no_other_and_are_not_called():
    """Test a layer that knows a quarter of what there is, among twelve that always say the class of 70 %."""
    generator, y = np.random.default_rng(2), np.repeat([0, 1, 2], [84, 24, 12])
    called, by_guessing, trials = 0, 0, 40
    for seed in range(trials):
        knows = np.where(generator.random(120) < 0.25, y, generator.choice(3, 120, p=[0.7, 0.2, 0.1]))
        test = ChanceTest.of(all_tested(y, draws=199, seed=seed), [knows[None], *np.zeros((12, 1, 120), int)])
        called += test.above_null[0]
        by_guessing += test.above_null[1:].any() or test.above_chance[1:].any()
    assert called / trials > 0.8 and by_guessing == 0


def test_unequal_classes_that_nothing_knows_are_called_in_no_more_than_a_twentieth():
    generator, y, called = np.random.default_rng(3), np.repeat([0, 1, 2], [42, 12, 6]), np.zeros(3)
    for seed in range(TRIALS):
        # Some layers say the largest class more often than others.
        predicted = [np.where(generator.random(60) < often, 0, generator.choice(3, 60))[None] for often in (0, 0.5, 1)]
        test = ChanceTest.of(all_tested(y, draws=199, seed=seed), predicted)
        called += test.above_null.any(), test.above_chance.any(), (test.p_f1 < 0.05).any()
    assert (called / TRIALS <= BOUND).all()


def test_a_layer_may_know_something_and_yet_be_right_less_often_than_guessing_is():
    y = np.repeat([0, 1], [70, 30])
    says = y.copy()
    says[:28] = 1  # knows all of the small class, and 60 % of the large one
    says[70:77] = 0
    test = ChanceTest.of(all_tested(y), [says[None]])
    assert test.accuracy[0] == 0.65 and test.above_null[0] and not test.above_chance[0] and test.p_f1[0] < 0.05
    better = ChanceTest.of(all_tested(y), [y[None]])
    assert better.above_null[0] and better.above_chance[0]


def test_right_more_often_than_guessing_is_more_than_by_chance():
    """Count collections with classes 70/20/10 whose layer is as often right as guessing: none knows more than that."""
    generator, y, called = np.random.default_rng(4), np.repeat([0, 1, 2], [70, 20, 10]), 0
    for seed in range(TRIALS):
        right = generator.random(100) < 0.7  # of any class
        called += ChanceTest.of(
            all_tested(y, draws=199, seed=seed), [np.where(right, y, (y + 1) % 3)[None]]
        ).above_chance[0]
    assert called / TRIALS <= BOUND


def test_macro_f1_is_all_testedly_where_the_largest_class_is_twice_the_smallest():
    predicted = [np.zeros((1, 30), int)]
    assert ChanceTest.of(all_tested(np.repeat([0, 1], [20, 10])), predicted).p_f1 is None
    assert ChanceTest.of(all_tested(np.repeat([0, 1], [21, 9])), predicted).p_f1 is not None


def test_classifiers_of_different_numbers_of_runs_are_one_family():
    generator, y = np.random.default_rng(5), np.arange(60) % 3
    guesses = list(generator.integers(0, 3, (6, 2, 60)))
    test = ChanceTest.of(all_tested(y), [*guesses, y[None]])
    assert test.above_null.tolist() == [False] * 6 + [True] and test.p_family[-1] == pytest.approx(1 / 301)
    np.testing.assert_allclose(test.margins, (test.null - test.guessed).max(1))
    alone = ChanceTest.of(all_tested(y), guesses[:1])
    np.testing.assert_array_equal(alone.null[:, 0], test.null[:, 0])  # the permutations are shared
    assert (test.p_family >= test.p - 1e-12).all()


def test_one_lora_or_one_group_of_one_class_shows_nothing():
    y = np.repeat([0, 1], 10)
    for rows, groups in ((np.array([3]), None), (np.arange(10), np.zeros(20, int))):
        evidence = replace(all_tested(y, groups), rows={"test": rows})
        test = ChanceTest.of(evidence, [evidence.truth[None]])
        assert not test.above_chance[0] and not test.above_null[0]


def test_a_class_that_no_test_lora_has_and_nothing_predicts_is_no_fault():
    evidence = all_tested(np.repeat([0, 1], [30, 10]))
    test = ChanceTest.of(replace(evidence, classes=["a", "b", "c"]), [evidence.truth[None]])
    assert test.above_chance.all() and test.p_f1[0] < 0.05
