"""Representations against each other and against chance, cheap explanations, groups and shuffled labels."""

from dataclasses import replace

import numpy as np
import pytest
from planting import all_predictions, analysed, evidence_of, held_out, outcome, plant, share

from analysis.chance import null_of
from analysis.comparison import (
    best_on_validation,
    cheap_explanations,
    compare_representations,
    grouped_split,
    norms,
    null_shuffles,
)
from analysis.draws import exceedance
from analysis.questions import Controls


def says_at_test(evidence, predicted):
    """Return predictions of the held-out rows: of the validation rows the truth, of the test rows these."""
    return np.concatenate([evidence.y[evidence.rows["validation"]], predicted]).astype(np.int32)


def test_the_best_of_several_is_compared_with_the_best_that_chance_gives():
    evidence = evidence_of(names=[f"guess {i}" for i in range(15)], runs=1)
    guesses = [evidence.predicted("baseline", f"guess {i}") for i in range(15)]
    accuracies = np.array([(guess == evidence.truth).mean() for guess in guesses])
    result = analysed(evidence)["representations"]["conditions"]["baseline"]
    # One is above chance by itself; not where fourteen others guess too, and then none is best.
    assert (exceedance(accuracies, null_of(evidence, np.stack(guesses))) < 0.05).any()
    assert min(result["p_family"].values()) > 0.05 and result["above_null"] == [] and result["comparisons"] == []
    assert result["best"] is None and result["best_by_test"] is None and result["best_above_chance"] is False


def test_more_than_permuted_labels_but_less_than_the_largest_class_is_not_above_chance():
    evidence = evidence_of(classes=2, each=60, names=("stats", "spectral"), runs=1)
    few = np.concatenate([evidence.rows["test"][evidence.truth == 0], evidence.rows["test"][evidence.truth == 1][:5]])
    evidence = replace(evidence, rows=evidence.rows | {"test": few})  # 20 of one class and 5 of the other
    for arrays in all_predictions(evidence):
        arrays["predicted"] = says_at_test(evidence, np.repeat([1, 0, 1], [6, 14, 5]))[None]  # 19 of 25 are right
    result = compare_representations(evidence, ["stats", "spectral"])["conditions"]["baseline"]
    assert result["p_family"]["stats"] < 0.05 and evidence.chance == 0.8 and not result["best_above_chance"]
    assert result["above_null"] == ["stats", "spectral"] and result["above_chance"] == []
    assert result["p_f1"]["stats"] < 0.05 and result["ties"] == ["spectral"]


def test_the_best_is_chosen_on_validation_rows_and_the_best_by_test_is_named_beside_it():
    evidence = evidence_of(names=("stats", "spectral", "ensemble"))
    validation = np.arange(len(held_out(evidence))) < len(evidence.rows["validation"])
    plant(evidence, np.where(validation, True, share(evidence, 0.6)), "baseline", "spectral")
    plant(evidence, np.where(validation, False, share(evidence, 0.9)), "baseline", "ensemble")
    result = analysed(evidence)["representations"]["conditions"]["baseline"]
    assert result["best"] == "spectral" and result["best_by_test"] == "ensemble"
    assert {(pair["a"], pair["b"]) for pair in result["comparisons"]} == {
        ("spectral", "stats"), ("spectral", "ensemble"), ("ensemble", "stats")}  # fmt: skip
    assert "ensemble" in result["not_worse"] and "stats" not in result["not_worse"] and result["ties"] == []


def test_equal_validation_accuracies_are_ordered_by_macro_f1_then_by_the_table():
    evidence = evidence_of(classes=3, names=("first", "second", "third"), runs=1)
    truth = evidence.y[evidence.rows["validation"]]  # 5 of each class
    for name, says in (("first", np.zeros(15)), ("second", (truth + (np.arange(15) >= 5)) % 3), ("third", None)):
        arrays = evidence.predictions.conditions["baseline"][name]
        says = evidence.validation_predictions("baseline", "second")[0] if says is None else says
        arrays["predicted"] = np.concatenate([says, evidence.truth])[None].astype(np.int32)
    assert (evidence.validated("baseline", "first").mean() == evidence.validated("baseline", "second").mean()) == 1
    assert best_on_validation(evidence, "baseline", ["first", "second", "third"]) == "second"
    assert best_on_validation(evidence, "baseline", ["third", "second"]) == "third"
    compared = analysed(evidence)["representations"]["conditions"]["baseline"]
    assert compared["chosen"] == "second" and compared["tied_on_validation"] == ["first", "third"]
    evidence.predictions.conditions["baseline"]["first"]["predicted"][0, 0] += 1
    assert analysed(evidence)["representations"]["conditions"]["baseline"]["tied_on_validation"] == ["third"]
    assert best_on_validation(evidence, "baseline", []) is None


def test_representations_are_compared_with_the_best():
    evidence = evidence_of(names=("stats", "spectral", "ensemble", "flat_vec"))
    for name, known in (("stats", 0.5), ("spectral", 0.5), ("ensemble", 0.95)):
        plant(evidence, share(evidence, known), "baseline", name)
        plant(evidence, share(evidence, known if name != "stats" else 0.1), "ablation", name)
    result = analysed(evidence)
    compared, drops = result["representations"]["conditions"]["baseline"], result["representations"]["drops"]
    assert compared["best"] == compared["best_by_test"] == "ensemble" and compared["not_worse"] == []
    assert compared["best_above_chance"] and compared["above_chance"] == ["stats", "spectral", "ensemble"]
    assert compared["p_family"]["ensemble"] == pytest.approx(1 / 2001) and compared["p_family"]["flat_vec"] > 0.05
    pairs = {(pair["a"], pair["b"]): pair for pair in compared["comparisons"]}
    assert list(pairs) == [("ensemble", "stats"), ("ensemble", "spectral"), ("ensemble", "flat_vec"),
                           ("spectral", "stats")]  # fmt: skip
    low, high = pairs["ensemble", "stats"]["interval"]
    assert 0 < low < pairs["ensemble", "stats"]["difference"] < high and pairs["ensemble", "stats"]["p"] < 0.05
    assert not pairs["spectral", "stats"]["significant"]
    assert drops["stats"]["interval"][0] > 0.1 and drops["stats"]["p"] < 0.05 and drops["ensemble"]["p"] > 0.05
    assert np.mean(result["concepts"]["drop"]["stats"]) == pytest.approx(drops["stats"]["drop"])
    record = outcome(result, "outperforms stats")
    assert record["outcome"] == "confirmed" and "ensemble" in record["why"] and record["interval"] == [low, high]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"stats": 0.9, "spectral": 0.3, "ensemble": 0.4}, "refuted"),
        ({"stats": 0.9, "spectral": 0.3, "ensemble": 0.9}, "undecided"),
        ({"stats": 0.9, "spectral": 0.3}, "undecided"),  # nobody asked the ensemble
        ({"stats": 0.9}, "not answerable"),
    ],
)
def test_ensemble_or_spectral_beats_stats(known, expected):
    evidence = evidence_of(names=tuple(known))
    for name, of in known.items():
        plant(evidence, share(evidence, of), "baseline", name)
    assert outcome(analysed(evidence), "outperforms stats")["outcome"] == expected


def test_one_card_says_of_a_pair_what_the_other_says():
    """Decide the third hypothesis by the very comparison that question 3 shows, whatever the accuracies are."""
    decided = set()
    for known in (0.5, 0.75, 0.9):
        evidence = evidence_of(tested=10, names=("stats", "spectral", "ensemble", "flat_vec"))
        for name, of in (("stats", 0.5), ("spectral", known), ("ensemble", 0.3)):
            plant(evidence, share(evidence, of), "baseline", name)
        result = analysed(evidence)
        compared = result["representations"]["conditions"]["baseline"]["comparisons"]
        (pair,) = (pair for pair in compared if {pair["a"], pair["b"]} == {"spectral", "stats"})
        confirmed = outcome(result, "outperforms stats")["outcome"] == "confirmed"
        assert confirmed == (pair["significant"] and pair["difference"] * (1 if pair["a"] == "spectral" else -1) > 0)
        decided.add(confirmed)
    assert decided == {True, False}


def test_three_wins_out_of_three_are_no_proof():
    evidence = evidence_of(classes=3, tested=1, each=6)
    plant(evidence, np.True_, "baseline")
    plant(evidence, np.True_, "baseline", "spectral", (held_out(evidence) + 1) % 3)
    result = analysed(evidence)["representations"]["conditions"]["baseline"]
    assert result["best"] is None and result["comparisons"][0]["difference"] == -1
    assert not result["comparisons"][0]["significant"]


def test_a_representation_of_one_run_beside_others_of_several():
    evidence = evidence_of(names=("stats", "update_kernel"), runs=3)
    for condition in ("baseline", "ablation"):
        evidence.predictions.conditions[condition]["update_kernel"]["predicted"] = held_out(evidence)[None]
    result = analysed(evidence)["representations"]
    compared, drop = result["conditions"]["baseline"], result["drops"]["update_kernel"]
    assert compared["best"] == "update_kernel" and compared["not_worse"] == []
    low, high = compared["intervals"]["update_kernel"]
    assert 0.9 < low < high == 1  # all of 120 are right, and yet not all LoRAs are known to be
    assert compared["p_family"]["update_kernel"] < 0.05 < compared["p_family"]["stats"]
    assert drop["drop"] == 0 and drop["p"] == 1 and not drop["significant"]
    assert drop["interval"][0] == pytest.approx(-drop["interval"][1]) and 0 < drop["interval"][1] < 0.05


@pytest.mark.parametrize(("known", "as_good"), [(0.2, ["metadata"]), (1.0, [])])
def test_a_cheap_explanation_as_good_as_the_weights_is_named(known, as_good):
    evidence = evidence_of()
    plant(evidence, share(evidence, known), "baseline")
    generator = np.random.default_rng(0)
    tells = np.where(generator.random(len(evidence.y)) < 0.7, evidence.y, generator.integers(0, 6, len(evidence.y)))
    cheap = {
        "metadata": np.eye(6)[tells],
        "norms": generator.normal(size=(len(evidence.y), 4)),
        "ranks and shapes": None,
    }
    result = analysed(evidence, Controls("basic", cheap=cheap))["cheap"]
    assert result["as_good"] == as_good and result["ranks and shapes"] is None
    for name in ("metadata", "norms"):
        assert result[name]["weights_worse"] == (result[name]["advantage_of_weights"][1] < 0)
    assert result["metadata"]["weights_worse"] == (known == 0.2)
    assert result["metadata"]["p"] < 0.001 < 0.05 < result["norms"]["p"]
    assert result["metadata"]["accuracy"] == pytest.approx(0.75, abs=0.1)


def test_a_leak_through_groups_shows_in_the_grouped_split():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.95), "baseline")
    grouped = (
        "artist",
        "stats",
        evidence.truth,
        np.arange(120) // 10,
        np.random.default_rng(0).integers(0, 6, (2, 120)),
    )
    result = analysed(evidence, Controls("basic", unused=["artist"], grouped=grouped))["groups"]
    assert result["random_split"] > 0.9 and result["interval"][1] < 0.4 and result["unused"] == ["artist"]


def test_a_grouped_split_at_chance_or_below_the_random_one_may_be_the_groups():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.6), "baseline")
    groups = np.arange(120) // 3
    for known, may_be in ((0.1, True), (0.35, True), (0.6, False)):
        right = np.arange(120) // 6 % 20 < 20 * known
        predicted = np.tile(np.where(right, evidence.truth, (evidence.truth + 1) % 6), (2, 1))
        grouped = ("artist", "stats", evidence.truth, groups, predicted)
        result = grouped_split(evidence, ["artist"], grouped)
        assert result["may_be_groups"] == may_be
    guessed = ("artist", "stats", evidence.truth, groups, predicted)
    nothing = analysed(evidence_of(), Controls("basic", unused=["artist"], grouped=guessed))["groups"]
    assert not nothing["may_be_groups"]  # what knows nothing does not know the groups
    none = grouped_split(evidence, ["artist"], None)
    assert none["may_be_groups"] is None and none["why"]


def test_nineteen_shuffles_decide_and_fewer_do_not():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.5 * (np.arange(12) == 3)[:, None]))
    for shuffles, larger, p, significant in (
        (19, 0, 1 / 20, True),
        (19, 1, 2 / 20, False),
        (40, 1, 2 / 41, True),
        (18, 0, None, None),
        (1, 0, None, None),
    ):
        shuffled = np.full((shuffles, 12), 0.2)
        shuffled[:larger] = 1
        result = null_shuffles(evidence, shuffled)
        assert result["shuffles"] == shuffles and result["observed"] > 0.5 and max(result["largest"]) == shuffled.max()
        assert result["p"] == (p and pytest.approx(p)) and result["significant"] == significant


def test_norms_are_those_of_the_factors_and_the_updates():
    weights = np.random.default_rng(0).normal(1, 2, (4, 3, 50))
    described = np.stack([weights.mean(2), weights.std(2)], axis=-1)
    result = norms(described, np.full((4, 1, 2), 7.0))
    np.testing.assert_allclose(result[:, :3], np.linalg.norm(weights, axis=2) / np.sqrt(50))
    assert result.shape == (4, 4) and (result[:, 3] == 7).all()


def test_significance_interval_and_p_say_the_same():
    evidence = evidence_of(names=("stats", "spectral", "ensemble"))
    for name, with_all, without in (("stats", 0.9, 0.2), ("spectral", 0.2, 0.9), ("ensemble", 0.5, 0.5)):
        plant(evidence, share(evidence, with_all), "baseline", name)
        plant(evidence, share(evidence, without), "ablation", name)
    result = analysed(evidence)
    compared, alpha = result["representations"], result["alpha"]
    assert compared["significant_losses"] == ["stats"]  # spectral gains, which is significant and no loss
    assert compared["drops"]["spectral"]["significant"] and not compared["drops"]["ensemble"]["significant"]
    comparisons = [pair for condition in compared["conditions"].values() for pair in condition["comparisons"]]
    for record in (*compared["drops"].values(), *comparisons):
        low, high = record["interval"]
        assert record["significant"] == (record["p"] < alpha) == (low > 0 or high < 0)


def test_a_best_is_said_to_be_above_chance_in_no_more_than_a_twentieth_of_guesses():
    called, trials = 0, 25
    for seed in range(trials):
        evidence = replace(evidence_of(tested=10, names=[f"guess {i}" for i in range(8)], seed=seed), permutations=199)
        generator = np.random.default_rng(seed)
        for arrays in all_predictions(evidence):
            arrays["predicted"] = generator.integers(0, 6, arrays["predicted"].shape, np.int32)
        called += compare_representations(replace(evidence, resamples=100), list(
            evidence.predictions.conditions["baseline"]))["conditions"]["baseline"]["best_above_chance"]  # fmt: skip
    assert called / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_groups_that_explain_nothing_are_suspected_in_no_more_than_a_twentieth():
    """A concept that is known as well on either split: both accuracies err, not one of them alone."""
    generator, suspected, trials = np.random.default_rng(0), 0, 100
    evidence = replace(evidence_of(runs=1), resamples=300, permutations=200)
    wrong = (evidence.truth + 1) % 6
    for _ in range(trials):
        own, other = (np.where(generator.random(120) < 0.7, evidence.truth, wrong) for _ in range(2))
        arrays = {"predicted": says_at_test(evidence, own)[None]}
        evidence.predictions.conditions["baseline"]["stats"] = arrays
        grouped = ("artist", "stats", evidence.truth, np.arange(120), other[None])
        suspected += grouped_split(evidence, ["artist"], grouped)["may_be_groups"]
    assert suspected <= trials * (0.05 + 3 * np.sqrt(0.05 * 0.95 / trials))


def test_explanations_are_tested_as_one_family():
    evidence, generator = evidence_of(), np.random.default_rng(0)
    cheap = {name: generator.normal(size=(len(evidence.y), 2)) for name in ("norms", "recipe")}
    best = evidence.predicted("baseline", "stats")
    together = cheap_explanations(evidence, cheap, best)
    for name, features in cheap.items():
        alone = cheap_explanations(evidence, {name: features}, best)
        assert together[name]["accuracy"] == alone[name]["accuracy"] and together[name]["p"] >= alone[name]["p"]
        low, high = alone[name]["advantage_of_weights"]
        assert together[name]["advantage_of_weights"][0] < low and high < together[name]["advantage_of_weights"][1]
