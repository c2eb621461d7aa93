"""Bootstrap draws against scipy and by hand; intervals and families of differences on simulated known truth."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from analysis.draws import ALPHA, Draws, exceedance, interval, stream

SIZES = {"alone": [1] * 60, "in groups": [5] * 20, "one group of 40": [40] + [1] * 20, "one group": [30]}


def sizes_text(sizes):
    return f"{len(sizes)} groups of {sum(sizes)}"


def groups_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def simulated(seed, sizes, truths, trials, runs=1, shared=0.6):
    """Return the LoRAs that classifiers of known accuracies recognise, bool[trials, classifiers, runs, T].

    A share of the answers is decided by how difficult a LoRA's group is to all of them, which correlates them.
    """
    generator, (groups, of_each) = np.random.default_rng(seed), (groups_of(sizes), (trials, len(truths), runs))
    difficulty = generator.random((trials, 1, 1, len(sizes)))[..., groups]
    own = generator.random((*of_each, len(groups)))
    threshold = np.where(generator.random(own.shape) < shared, difficulty, own)
    return threshold < np.array(truths)[None, :, None, None]


def covers(bounds, truth):
    return (bounds[..., 0] <= truth + 1e-9) & (truth - 1e-9 <= bounds[..., 1])


def slack(share, trials):
    """Return three standard errors of a share that was counted in so many trials."""
    return 3 * (share * (1 - share) / trials) ** 0.5


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
    drawn = draws.accuracies([correct])[0]  # one run twice, each once, or the other twice
    assert len(np.unique(drawn)) == 3 and drawn.std() == pytest.approx(0.5, rel=0.1)  # s / sqrt(R), s² = 1/2
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


def test_any_seed_will_do_and_another_purpose_draws_other_numbers():
    first, same, other = (stream(-7, key, 1).random(4) for key in ("rows", "rows", "runs"))
    assert (first == same).all() and (first != other).all()


def test_the_draws_of_a_key_stay_what_they_are():
    """Keep the seeds: with others, every interval and p of finished results would change."""
    raw = stream(42, "runs", 0).bit_generator.random_raw(3)
    assert raw.tolist() == [9343276227593724650, 17517053512317570413, 15476819913495353059]
    assert stream(42, "runs", 0).integers(1000, size=4).tolist() == [906, 506, 192, 949]


def test_exceedance_counts_ties_and_never_gives_zero():
    np.testing.assert_allclose(exceedance(np.array([0.5, 0.9]), np.array([[0.5], [0.4], [0.6]])), [3 / 4, 1 / 4])


# ----------------------------------------------------------------------------------------------------------------------
# Intervals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("sizes", [[1] * 20, [1] * 60, [5] * 10, [5] * 40, [1, 2, 3, 8] * 8], ids=sizes_text)
def test_intervals_of_accuracies_cover_the_truth(sizes, runs):
    trials, draws, covered = 120, Draws(groups_of(sizes), 200, 0), []
    for truth in (0.1, 0.5, 0.97):
        correct = simulated(1, sizes, [truth], trials, runs)[:, 0]
        covered.append(covers(draws.intervals(correct.mean((1, 2)), draws.accuracies(list(correct))), truth).mean())
    assert min(covered) >= 0.9 - slack(0.9, trials) and np.mean(covered) >= 0.94 - slack(0.94, 3 * trials)


def test_an_accuracy_of_0_or_1_has_wilsons_interval_of_as_many_groups():
    for size in (1, 5):
        correct = np.ones((1, 50), bool)
        draws = Draws(np.arange(50) // size, 100, 0)
        low, high = draws.estimate(correct, draws.accuracies([correct])[0])["interval"]
        z = stats.t.ppf(0.975, 50 // size - 1)
        assert high == 1 and low == pytest.approx(1 / (1 + z**2 * size / 50))
        assert draws.intervals(0.0, np.zeros(100)) == pytest.approx([0, 1 - low])


def test_an_interval_is_that_of_wilson_in_the_middle_of_the_scale():
    correct = np.arange(200)[None] % 2 == 0
    draws = Draws(np.arange(200), 4000, 0)
    z = stats.t.ppf(0.975, 199)
    half = z * np.sqrt(0.25 / 200 + z**2 / (4 * 200**2)) / (1 + z**2 / 200)
    assert draws.intervals(0.5, draws.accuracies([correct])[0]) == pytest.approx([0.5 - half, 0.5 + half], abs=2e-3)


def test_one_lora_and_one_group_say_nothing():
    for groups in (np.zeros(1, int), np.zeros(30, int)):
        draws, correct = Draws(groups, 50, 0), np.arange(len(groups))[None] % 2 == 0
        low, high = draws.estimate(correct, draws.accuracies([correct])[0])["interval"]
        (record,) = draws.differences([(correct, ~correct)])
        assert high - low > 0.9 and not record["significant"] and np.ptp(record["interval"]) > 1.5


def test_draws_of_one_large_group_are_widened():
    assert Draws(groups_of([5] * 20), 1, 0).inflation == pytest.approx(20 / 19)
    equal = 60**2 / (40**2 + 20)
    assert Draws(groups_of([40] + [1] * 20), 1, 0).inflation == pytest.approx(equal / (equal - 1))


# ----------------------------------------------------------------------------------------------------------------------
# Differences
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("sizes", [[1] * 20, [1] * 100, [5] * 12, [5] * 40], ids=sizes_text)
def test_intervals_of_single_differences_cover_the_truth(sizes, runs):
    trials, draws, covered = 50, Draws(groups_of(sizes), 200, 0), []
    for truths in ((0.6, 0.5), (0.97, 0.9), (0.995, 0.05)):
        correct = simulated(2, sizes, truths, trials, runs)
        drawn, by_lora = draws.accuracies([*correct[:, 0], *correct[:, 1]]), correct.mean(2)
        differences, drawn = by_lora[:, 0] - by_lora[:, 1], drawn[:trials] - drawn[trials:]
        alone = [draws.family(differences[[i]], drawn[[i]], np.array([runs]))[0] for i in range(trials)]
        bounds = np.array([record["interval"] for record in alone])
        covered.append(covers(bounds, truths[0] - truths[1]).mean())
    assert min(covered) >= 0.9 - slack(0.9, trials) and np.mean(covered) >= 0.94 - slack(0.94, 3 * trials)


@pytest.mark.parametrize("sizes", [[1] * 60, [5] * 20], ids=sizes_text)
@pytest.mark.parametrize("truths", [[0.6] * 14, [0.95] + [0.9] * 6 + [0.4] * 7], ids=["equal", "few and many separate"])
def test_a_family_of_thirteen_is_covered_jointly(sizes, truths):
    trials, together = 60, 0
    draws, truth = Draws(groups_of(sizes), 200, 0), truths[0] - np.array(truths[1:])
    for best, *others in simulated(3, sizes, truths, trials):
        records = draws.differences([(best, other) for other in others])
        together += covers(np.array([record["interval"] for record in records]), truth).all()
    assert together / trials >= 0.93 - slack(0.93, trials)


@pytest.mark.parametrize("count", [37, 200])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_an_interval_excludes_0_exactly_where_p_is_below_a_twentieth(sizes, count):
    seen = set()
    for trial, known in enumerate(simulated(4, sizes, [0.6, 0.3, 0.5, 0.6, 0.62, 0.99, 0.01], 4, runs=2)):
        for record in Draws(groups_of(sizes), count, trial).differences(list(pairwise(known))):
            low, high = record["interval"]
            assert record["significant"] == (record["p"] < ALPHA) == (low > 0 or high < 0)
            assert low <= record["difference"] <= high and 0 < record["p"] <= 1
            seen.add(record["significant"])
    assert seen == ({False} if len(sizes) == 1 else {True, False})


@pytest.mark.parametrize("sizes", [[1] * 40, [5] * 20, [40] + [1] * 20], ids=sizes_text)
def test_a_family_without_differences_is_significant_one_time_in_twenty(sizes):
    trials, called, draws = 80, 0, Draws(groups_of(sizes), 200, 0)
    for first, *others in simulated(5, sizes, [0.7] * 6, trials):
        called += any(record["significant"] for record in draws.differences([(first, other) for other in others]))
    assert called / trials <= 0.05 + slack(0.05, trials)


def test_of_a_single_run_few_that_separate_have_the_interval_of_bonett_and_price():
    first, second = (
        np.arange(30)[None] < 25,
        (np.arange(30)[None] < 22) | (np.arange(30)[None] == 29),
    )  # 3 wins, 1 defeat
    (record,) = Draws(np.arange(30), 50, 0).differences([(first, second)])
    wins, defeats = 4 / 32, 2 / 32
    half = stats.norm.ppf(0.975) * np.sqrt((wins + defeats - (wins - defeats) ** 2) / 32)
    assert record["interval"] == pytest.approx([wins - defeats - half, wins - defeats + half])
    assert record["difference"] == pytest.approx(2 / 30) and not record["significant"]


def test_equal_predictions_do_not_differ_and_three_wins_of_three_are_no_proof():
    draws, right = Draws(np.arange(3), 100, 0), np.ones((1, 3), bool)
    same, opposite = draws.differences([(right, right.copy()), (right, ~right)])
    assert same["difference"] == 0 and same["p"] == 1 and same["interval"] == pytest.approx(-same["interval"][::-1])
    assert opposite["difference"] == 1 and opposite["p"] > 0.05 and opposite["interval"][0] < 0


def test_a_family_of_none_is_empty_and_the_order_of_a_pair_is_its_sign():
    draws = Draws(np.arange(40), 200, 0)
    (a, b), *_ = simulated(6, [1] * 40, [0.8, 0.4], 1)
    (there,), (back,) = draws.differences([(a, b)]), draws.differences([(b, a)])
    assert draws.differences([]) == [] and there["p"] == back["p"]
    np.testing.assert_allclose(there["interval"], -back["interval"][::-1])


def test_what_runs_share_counts_once():
    """Draw runs and LoRAs where neither has an effect: the variance of draws is that of the mean."""
    correct = list(np.random.default_rng(7).random((60, 4, 80)) < 0.5)
    variance = Draws(np.arange(80), 300, 0).accuracies(correct).var(1).mean()
    assert 0.9 < variance / (0.25 / 320) < 1.5
    of_runs = list(np.random.default_rng(7).random((60, 4, 1)) < np.full((4, 80), 0.5))  # right on all LoRAs or on none
    assert Draws(np.arange(80), 300, 0).accuracies(of_runs).var(1).mean() == pytest.approx(0.25 / 4, rel=0.2)


def test_few_runs_that_differ_widen_a_difference():
    """Draw three runs of each of two classifiers, whose accuracies differ from run to run by 8 points."""
    generator, trials, runs, covered = np.random.default_rng(8), 60, 3, 0
    draws = Draws(np.arange(200), 200, 0)
    knows = 0.6 + 0.08 * generator.normal(size=(trials, 2, runs, 1))
    for first, second in generator.random((trials, 2, runs, 200)) < knows:
        covered += covers(draws.differences([(first, second)])[0]["interval"], 0)
    assert covered / trials >= 0.9 - slack(0.9, trials)


def test_one_that_differs_is_seen_among_hundreds_that_do_not():
    generator, guess = np.random.default_rng(0), (np.arange(100) < 70)[None]
    knows = generator.random((1, 100)) < 0.97
    same = [(guess.copy(), guess) for _ in range(599)]
    record = Draws(np.arange(100), 2000, 0).differences([(knows, guess), *same])[0]
    assert record["significant"] and record["interval"][0] > 0 and record["p"] < 0.01


def test_one_large_group_is_one_that_separates_however_many_loras_it_has():
    draws = Draws(np.concatenate([np.zeros(40, int), np.arange(1, 21)]), 10, 0)
    np.testing.assert_allclose(
        draws.separating(np.stack([np.arange(60) < 40, np.arange(60) >= 57]).astype(float)), [1, 3]
    )


@pytest.mark.parametrize("size", [12, 200])  # one that few LoRAs separate, and one that many do
def test_families_that_hold_together_are_each_as_wide_as_its_part_of_the_5_percent(size):
    generator = np.random.default_rng(0)
    first, second = generator.random((2, size)) < 0.8, generator.random((2, size)) < 0.5
    alone, together = (
        Draws(np.arange(size), 4000, 0, families=families).differences([(first, second)])[0] for families in (1, 4)
    )
    assert together["difference"] == alone["difference"]
    assert together["p"] == pytest.approx(min(1, 4 * alone["p"]))
    assert np.diff(together["interval"]) > np.diff(alone["interval"])
    assert together["significant"] == (together["p"] < 0.05)
