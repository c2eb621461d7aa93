"""The whole analysis: the same for the same inputs, an answer for small numbers, and strict JSON."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from planting import (
    all_predictions,
    analysed,
    controls_of,
    evidence_of,
    features_of,
    held_out,
    outcome,
    plant,
    share,
    updates_of,
)

from analysis.questions import CLIP, QUESTIONS, Controls, choose_rows, plain, standardised


def test_the_same_inputs_give_the_same_answers_and_stay_as_they_were():
    evidence, samples = evidence_of(), {"spectral": (np.ones((5, 3, 2)), ["a", "b"])}
    controls, features, updates = controls_of(evidence), features_of(evidence), updates_of(evidence)
    before = copy.deepcopy(
        (evidence.predictions.arrays(), evidence.rows, evidence.y, controls, features, updates, samples)
    )
    first = analysed(evidence, controls, statistics=features, updates=updates, samples=samples)
    again = analysed(evidence_of(), controls, statistics=features, updates=updates, samples=samples)
    assert json.dumps(first) == json.dumps(again)
    np.testing.assert_equal((evidence.predictions.arrays(), evidence.rows, evidence.y), before[:3])
    np.testing.assert_equal(copy.deepcopy(controls.__dict__["shuffled"]), before[3].shuffled)
    np.testing.assert_equal(controls.conditions["stats"][1], before[3].conditions["stats"][1])
    np.testing.assert_equal((features, updates, samples), before[4:])


def test_guesses_are_called_guesses_everywhere():
    evidence = evidence_of()
    result = analysed(evidence, controls_of(evidence, cheap=True))
    assert result["layers"]["num_above_null"] == 0
    assert result["robustness"]["stats"]["verdict"] == "no signal"
    for compared in result["representations"]["conditions"].values():
        assert compared["best"] is None and not compared["best_above_chance"] and compared["above_null"] == []
    assert result["rank_structure"]["num_significant"] == 0
    assert result["cheap"]["as_good"] == []
    assert {record["outcome"] for record in result["hypotheses"]} <= {"undecided", "not answerable"}


DEGENERATE = {
    "two layers": {"layers": 2, "top_k": 1},
    "top layer only": {"top_k": 1},
    "all layers but one removed": {"top_k": 11},
    "two classes": {"classes": 2},
    "one run": {"runs": 1},
    "one test LoRA of each class": {"tested": 1, "each": 6},
    "one representation": {"names": ("stats",)},
    "negative seed": {"seed": -3},
    "three layers, of which one has no partner": {"layers": 3, "top_k": 1},
}


@pytest.mark.parametrize("sizes", DEGENERATE.values(), ids=DEGENERATE)
def test_every_section_has_an_answer_for_small_numbers(sizes):
    evidence = evidence_of(**sizes)
    analysed(evidence, controls_of(evidence, cheap=evidence.seed < 0 or len(evidence.truth) < 10))


def test_no_representation_and_no_controls():
    result = analysed(evidence_of(names=()), Controls("none"))
    assert result["representations"] is None and result["robustness"] == {} and result["cheap"] is None
    assert outcome(result, "outperforms stats")["outcome"] == "not answerable"
    assert outcome(result, "graceful")["outcome"] == "not answerable"


@pytest.mark.parametrize("said", ["one class", "truth"])
def test_all_predictions_equal(said):
    evidence = evidence_of()
    for arrays in all_predictions(evidence):
        arrays["predicted"] = np.broadcast_to(held_out(evidence) if said == "truth" else 0, arrays["predicted"].shape)
    planned, predicted = controls_of(evidence).conditions["stats"]
    same = np.broadcast_to(evidence.truth if said == "truth" else 0, predicted.shape)
    result = analysed(evidence, Controls("all", {"stats": (planned, same)}, ("stats", np.zeros((2, 12)))))
    assert result["layers"]["num_above_null"] == (12 if said == "truth" else 0)
    assert result["layers"]["stability"]["kendall_w"] is None
    assert result["layers"]["depth"]["r"] is None and result["attribution"]["spearman"] is None
    assert result["layers"]["depth"]["why"] and result["layers"]["rankings"]["kendall_tau"] is None
    assert [record["top_k_share"] for record in result["layers"]["records"]] == [0.25] * 12
    assert result["layer_information"]["kappa"]["mean"] == 1
    compared = result["representations"]["conditions"]["baseline"]
    assert compared["best"] == ("stats" if said == "truth" else None)
    assert compared["ties"] == (["spectral"] if said == "truth" else [])
    assert all(pair["p"] == 1 and pair["difference"] == 0 for pair in compared["comparisons"])
    assert result["robustness"]["stats"]["verdict"] == ("redundant" if said == "truth" else "no signal")


def test_constant_features_are_no_clusters_of_anything():
    evidence = evidence_of()
    result = analysed(
        evidence, statistics=np.ones((len(evidence.y), 12, 7), np.float32), updates=np.ones((len(evidence.y), 6, 2))
    )
    assert result["layer_information"]["clusters"]["count"] == 12
    assert result["rank_structure"]["num_significant"] == 0
    assert result["rank_structure"]["complexity"]["spearman_spread"] is None


def test_a_class_without_a_test_row_has_no_recall():
    evidence = evidence_of(classes=4)
    kept = evidence.rows["test"][evidence.y[evidence.rows["test"]] != 2]
    for arrays in all_predictions(evidence):
        arrays["predicted"] = arrays["predicted"][..., :-20]
    evidence = replace(evidence, rows=evidence.rows | {"test": kept})
    result = analysed(evidence, controls_of(evidence))
    assert [recall is None for recall in result["concepts"]["recall"][0]] == [False, False, True, False]
    assert result["concepts"]["drop"]["stats"][2] is None
    assert result["rank_structure"]["complexity"]["by_class"][2]["recall"] is None


def test_a_number_that_is_not_finite_is_refused():
    assert plain({"a": np.float32(0.5), 1: [np.int64(2), None, np.bool_(True), -1e-12]}) == {
        "a": 0.5,
        "1": [2, None, True, 0.0],
    }
    with pytest.raises(ValueError, match="not finite"):
        plain([math.inf])


def test_some_rows_are_all_where_they_are_few_and_else_of_every_class():
    assert choose_rows(np.zeros(5, int), 9, 0).tolist() == [0, 1, 2, 3, 4]
    y = np.repeat([0, 1, 2], [900, 90, 3])
    few = choose_rows(y, 33, 0)
    assert (np.diff(few) > 0).all() and np.bincount(y[few]).tolist() == [15, 15, 3]
    assert few.tolist() != list(range(33))


def test_standardised_features_forget_scale_and_outliers():
    x = np.random.default_rng(0).normal(size=(500, 2, 3))
    x[0, 0, 0], x[:, 1, 1] = 1e6, 7
    result = standardised(x)
    assert np.abs(result).max() == CLIP and (result[:, 1, 1] == 0).all()
    assert result[:, 1, 0].mean() == pytest.approx(0, abs=1e-12) and result[:, 1, 0].std() == pytest.approx(1)


@pytest.mark.parametrize(("tested", "few"), [(12, True), (13, False)])
def test_fewer_than_fifty_test_loras_are_few(tested, few):
    result = analysed(evidence_of(classes=4, tested=tested))
    assert result["few_test_loras"] == few and (result["alpha"], result["level"]) == (0.05, 0.95)


def test_each_question_has_a_section_and_a_hypothesis():
    result = analysed(evidence_of())
    keys = [question.key for question in QUESTIONS]
    assert [key for key in result if key in keys] == keys and len(keys) == 5
    assert [record["question"] for record in result["hypotheses"]] == [question.key for question in QUESTIONS]
    assert all(next(iter(record)) == "question" for record in result["hypotheses"])
    by_key = {record["question"]: record["hypothesis"] for record in result["hypotheses"]}
    for key, words in (("layers", "later layers"), ("robustness", "graceful"), ("representations", "outperforms"),
                       ("layer_information", "clusters"), ("rank_structure", "effective rank")):  # fmt: skip
        assert words in by_key[key]


def test_the_curve_of_the_first_control_decides_whether_degradation_is_graceful():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.5))  # without a layer above chance there is no order
    planned, predicted = controls_of(evidence).conditions["stats"]
    kept = planned.kept.mean(2)[..., None]  # share of layers in each condition and run, (K, R, 1)
    known = np.arange(len(evidence.truth)) % 20 < 20 * kept
    gradual = np.where(np.broadcast_to(known, predicted.shape), evidence.truth, predicted)
    first = {"other": (planned, gradual), "stats": (planned, predicted)}
    for conditions, result in ((first, "confirmed"), (dict(reversed(first.items())), "not answerable")):
        record = outcome(analysed(evidence, Controls("all", conditions)), "graceful")
        assert record["outcome"] == result
