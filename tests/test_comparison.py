"""Representations against each other and against chance, cheap explanations, groups and shuffled labels."""

from dataclasses import replace

import numpy as np
import pytest
from planting import all_predictions, analysed, evidence_of, held_out, outcome, plant, share

from analysis.comparison import best_by_chance, compare_representations, norms
from analysis.evidence import exceedance
from analysis.questions import Controls


def test_the_best_of_several_is_compared_with_the_best_that_chance_gives():
    evidence = evidence_of(names=[f"guess {i}" for i in range(15)], runs=3)
    guesses = [evidence.predicted("baseline", f"guess {i}") for i in range(15)]
    null = evidence.null(np.stack(guesses))
    np.testing.assert_array_equal(best_by_chance(evidence, guesses), null.max(1))
    fewer = best_by_chance(evidence, [guesses[0], guesses[1][:1]])
    np.testing.assert_array_equal(fewer, np.maximum(null[:, 0], evidence.null(guesses[1][None, :1])[:, 0]))
    accuracies = np.array([(guess == evidence.truth).mean() for guess in guesses])
    result = analysed(evidence)["representations"]
    assert (exceedance(accuracies, null) < 0.05).any()  # by itself; not where fourteen others guess too
    assert min(result["p_family"].values()) > 0.05 and result["best_above_chance"] is False


def test_more_than_permuted_labels_but_less_than_the_largest_class_is_not_above_chance():
    evidence = evidence_of(classes=2, each=60, names=("stats", "spectral"), runs=1)
    few = np.concatenate([evidence.rows["test"][evidence.truth == 0], evidence.rows["test"][evidence.truth == 1][:5]])
    evidence = replace(evidence, rows=evidence.rows | {"test": few})  # 20 of one class and 5 of the other
    says = np.concatenate([evidence.y[evidence.rows["validation"]], np.ones(6), np.zeros(14), np.ones(5)]).astype(
        np.int32
    )
    for arrays in all_predictions(evidence):
        arrays["predicted"] = says[None]  # 19 of 25 are right
    result = compare_representations(evidence, ["stats", "spectral"])
    assert result["p_family"]["stats"] < 0.05 and evidence.chance == 0.8 and not result["best_above_chance"]


def test_representations_are_compared_in_pairs():
    evidence = evidence_of(names=("stats", "spectral", "ensemble", "flat_vec"))
    for name, known in (("stats", 0.5), ("spectral", 0.5), ("ensemble", 0.95)):
        plant(evidence, share(evidence, known), "baseline", name)
        plant(evidence, share(evidence, known if name != "stats" else 0.1), "ablation", name)
    result = analysed(evidence)
    compared = result["representations"]
    assert compared["best"] == "ensemble" and compared["indistinguishable_from_best"] == []
    assert compared["p_family"]["ensemble"] == pytest.approx(1 / 2001) and compared["p_family"]["flat_vec"] > 0.05
    pairs = {(pair["a"], pair["b"]): pair for pair in compared["pairs"]["baseline"]}
    assert len(pairs) == 6 and pairs["stats", "spectral"]["p_holm"] > 0.5
    low, high = pairs["stats", "ensemble"]["interval"]
    assert low < pairs["stats", "ensemble"]["difference"] < high < 0 and pairs["stats", "ensemble"]["p_holm"] < 0.05
    assert compared["drops"]["stats"]["interval"][0] > 0.2 and compared["drops"]["stats"]["p_holm"] < 0.05
    assert compared["drops"]["ensemble"]["p_holm"] > 0.05
    assert np.mean(result["concepts"]["drop"]["stats"]) == pytest.approx(compared["drops"]["stats"]["drop"])
    record = outcome(result, "outperforms stats")
    assert record["outcome"] == "confirmed" and "ensemble" in record["why"] and record["interval"] == [-high, -low]


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


def test_three_wins_out_of_three_are_no_proof():
    evidence = evidence_of(classes=3, tested=1, each=6)
    plant(evidence, np.True_, "baseline")
    plant(evidence, np.True_, "baseline", "spectral", (held_out(evidence) + 1) % 3)
    (pair,) = analysed(evidence)["representations"]["pairs"]["baseline"]
    assert pair["difference"] == 1 and pair["p"] == 0.25  # of the 8 ways to exchange the two, 2 are as extreme


def test_a_representation_of_one_run_beside_others_of_several():
    evidence = evidence_of(names=("stats", "update_kernel"), runs=3)
    for condition in ("baseline", "ablation"):
        evidence.predictions.conditions[condition]["update_kernel"]["predicted"] = held_out(evidence)[None]
    result = analysed(evidence)["representations"]
    assert result["best"] == "update_kernel" and result["indistinguishable_from_best"] == []
    assert result["intervals"]["baseline"]["update_kernel"] == [1, 1]
    assert result["p_family"]["update_kernel"] < 0.05 < result["p_family"]["stats"]
    assert result["drops"]["update_kernel"] == {
        "drop": 0, "interval": [0, 0], "p": 1, "p_holm": 1, "significant": False}  # fmt: skip


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


def test_shuffled_labels_against_the_best_layer():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.5 * (np.arange(12) == 3)[:, None]))
    result = analysed(evidence, Controls("basic", shuffled=np.full((19, 12), 0.2)))["null_shuffles"]
    assert result["p"] == 1 / 20 and result["observed"] > 0.5 and result["largest"] == [0.2] * 19


def test_norms_are_those_of_the_factors_and_the_updates():
    weights = np.random.default_rng(0).normal(1, 2, (4, 3, 50))
    described = np.stack([weights.mean(2), weights.std(2)], axis=-1)
    result = norms(described, np.full((4, 1, 2), 7.0))
    np.testing.assert_allclose(result[:, :3], np.linalg.norm(weights, axis=2) / np.sqrt(50))
    assert result.shape == (4, 4) and (result[:, 3] == 7).all()


def test_significance_is_that_of_the_adjusted_p():
    evidence = evidence_of(names=("stats", "spectral", "ensemble"))
    for name, with_all, without in (("stats", 0.9, 0.2), ("spectral", 0.2, 0.9), ("ensemble", 0.5, 0.5)):
        plant(evidence, share(evidence, with_all), "baseline", name)
        plant(evidence, share(evidence, without), "ablation", name)
    result = analysed(evidence)
    compared, alpha = result["representations"], result["alpha"]
    assert compared["significant_losses"] == ["stats"]  # spectral gains, which is significant and no loss
    assert compared["drops"]["spectral"]["significant"] and not compared["drops"]["ensemble"]["significant"]
    for record in (*compared["drops"].values(), *compared["pairs"]["baseline"], *compared["pairs"]["ablation"]):
        assert record["significant"] == (record["p_holm"] < alpha)


def test_shuffles_that_the_true_labels_are_not_ahead_of():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.5 * (np.arange(12) == 3)[:, None]))
    for shuffles, larger, significant, ahead in (
        (40, 0, True, True),
        (40, 1, True, False),
        (4, 0, False, True),
        (4, 1, False, False),
    ):
        shuffled = np.full((shuffles, 12), 0.2)
        shuffled[:larger] = 1
        result = analysed(evidence, Controls("basic", shuffled=shuffled))["null_shuffles"]
        assert result["p"] == pytest.approx((1 + larger) / (1 + shuffles))
        assert (result["significant"], result["ahead_of_all"]) == (significant, ahead)
        assert result["as_expected"] == (significant or ahead)
