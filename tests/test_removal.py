"""Which conditions are trained, and what is concluded from predictions that are planted under them."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import trapezoid

from analysis.evidence import Evidence
from analysis.removal import CURVES, conditional_importance, curve_points, plan_controls, robustness, verdict
from loras.lora_files import Layer

LAYERS, TOP_K = 16, 2


def evidence_of(ranking=None, layers=LAYERS, test_rows=120, classes=4, seed=0) -> Evidence:
    """Evidence without any prediction; the last rows are the test rows."""
    y = np.arange(2 * test_rows) % classes
    rows = {"train": np.arange(10), "validation": np.arange(10, 20), "test": np.arange(test_rows, 2 * test_rows)}
    described = [Layer(f"layer {d}", f"module_{d // 2}", ("down", "up")[d % 2], (1, 4), "F32") for d in range(layers)]
    ranking = np.arange(layers) if ranking is None else np.asarray(ranking)
    return Evidence(described, [str(c) for c in range(classes)], y, rows, None, ranking, TOP_K, {}, seed)


def planned(e: Evidence, **more):
    roles = [layer.role for layer in e.layers]
    settings = {"runs": 3, "draws": 20, "points": 11, "seed": 0} | more
    return plan_controls(e.ranking, roles, e.top_k, **settings)


def guesses(e: Evidence, conditions, recognised) -> np.ndarray:
    """Predictions that are right for a share ``recognised(kept)`` of the test LoRAs, and guessed for the others."""
    generator = np.random.default_rng(1)
    shape = (*conditions.kept.shape[:2], len(e.truth))
    share = np.array([[recognised(kept) for kept in of_runs] for of_runs in conditions.kept])
    knows = np.arange(len(e.truth)) % 20 < 20 * share[:, :, None]  # of each class the same share
    return np.where(knows, e.truth, generator.integers(0, len(e.classes), shape))


def test_the_planned_conditions_remove_what_they_say():
    e = evidence_of(ranking=np.random.default_rng(0).permutation(LAYERS))
    conditions = planned(e)
    removed = {
        name: [set(np.flatnonzero(~kept)) for kept in conditions.kept[conditions.where(name)][0]]
        for name in conditions.names
    }
    order = e.ranking.tolist()
    assert removed["all"] == [set()] * 3
    assert removed["without top"] == [set(order[:2])] * 3
    assert removed["without bottom"] == [set(order[-2:])] * 3
    assert removed["top alone"] == [set(order[2:])] * 3
    assert removed["most first 8"] == [set(order[:8])] * 3 and removed["least first 8"] == [set(order[8:])] * 3
    in_random_order = removed["random order 8"]
    assert all(len(one) == 8 for one in in_random_order) and len(set(map(frozenset, in_random_order))) == 3
    assert all(a < b for a, b in zip(removed["random order 8"], removed["random order 9"], strict=True))


def test_random_layers_are_of_the_top_layers_roles_and_not_among_them():
    e = evidence_of(ranking=[1, 3, *[d for d in range(LAYERS) if d not in (1, 3)]])  # two ups
    conditions = planned(e)
    random = conditions.where("without random")
    assert len(random) == 15  # 6 ups are left: no more than 15 pairs of them
    for i in random:
        removed = np.flatnonzero(~conditions.kept[i, 0])
        assert len(removed) == 2 and (removed % 2 == 1).all() and not set(removed) & {1, 3}
    assert len({conditions.kept[i].tobytes() for i in random}) == 15


def test_random_layers_are_of_the_whole_role_where_few_are_left():
    conditions = planned(evidence_of(ranking=[1, 3, 0, 2, 4, 5], layers=6))
    removed = {tuple(np.flatnonzero(~conditions.kept[i, 0])) for i in conditions.where("without random")}
    assert removed == {(1, 5), (3, 5)}  # and never the top two themselves


def test_where_the_top_layers_are_a_whole_role_nothing_is_drawn_and_nothing_is_localized():
    e = evidence_of(ranking=[1, 3, 0, 2], layers=4)
    conditions = planned(e)
    assert len(conditions.where("without random")) == 0
    found = robustness(e, conditions, guesses(e, conditions, lambda kept: 0.9 * kept[1]))
    assert found["without_random"] == {"draws": 0, "accuracies": pytest.approx([]), **dict.fromkeys(
        ("mean", "min", "max", "share_below_top_removed", "p"))}  # fmt: skip
    assert found["survives"]["share"] < 0.2 and found["verdict"] == "undecided"


@pytest.mark.parametrize("layers", [2, 5, 64, 128])
def test_a_curve_has_at_most_as_many_points_as_asked_and_half_of_the_layers_is_one(layers):
    for at_most in (11, 12, 32):
        points = curve_points(layers, at_most)
        assert points[0] == 0 and points[-1] == layers and layers // 2 in points and len(points) <= at_most


def test_conditional_importance_finds_the_layer_that_adds_something():
    e = evidence_of()
    conditions = planned(e, conditional=True)
    predicted = guesses(e, conditions, lambda kept: 0.4 * kept[0] + 0.4 * kept[9])
    found = conditional_importance(e, conditions, predicted)
    assert len(found) == LAYERS - TOP_K and found[0]["layer"] == "layer 9"
    assert found[0]["interval"][0] > 0.1 and found[1]["interval"][0] < 0


@pytest.mark.parametrize(
    ("recognised", "expected"),
    [
        (lambda kept: 0.9 * kept[0], "localized"),
        (lambda kept: 0.9 * kept.mean(), "distributed"),
        (lambda kept: 0.9 * kept.any(), "redundant"),
        (lambda kept: 0.0, "no signal"),
    ],
)
def test_the_verdict_names_what_was_planted(recognised, expected):
    e = evidence_of()
    conditions = planned(e)
    assert robustness(e, conditions, guesses(e, conditions, recognised))["verdict"] == expected


def test_the_numbers_of_a_planted_removal():
    e = evidence_of()
    conditions = planned(e)
    found = robustness(e, conditions, guesses(e, conditions, lambda kept: kept[0] * 1.0))
    assert found["all"]["accuracy"] == 1 and found["top_alone"]["accuracy"] == 1
    assert abs(found["survives"]["share"]) < 0.1 and found["without_random"]["min"] == 1
    assert found["survives"]["interval"][0] < 0.1 and found["survives"]["interval"][1] < 0.5
    most, least = found["curves"]["most_first"], found["curves"]["least_first"]
    assert most["removed"] == curve_points(LAYERS, 11) and most["accuracy"][-1] == e.chance
    assert least["accuracy"][:-1] == [1.0] * (len(least["removed"]) - 1)
    assert least["area_interval"][0] <= least["area"] <= least["area_interval"][1]
    assert least["area"] == pytest.approx(trapezoid(least["accuracy"], np.array(least["removed"]) / LAYERS))
    assert most["area"] < found["curves"]["random_order"]["area"] < least["area"]
    assert found["largest_step"]["share"] > 0.9
    assert set(found["curves"]) == {curve.replace(" ", "_") for curve in CURVES}


def test_worse_than_guessing_the_largest_class_is_no_share_of_anything():
    e = evidence_of()
    y = e.y.copy()
    y[e.rows["test"]] = np.where(np.arange(120) < 96, 0, e.truth)  # four fifths are of one class
    e = Evidence(e.layers, e.classes, y, e.rows, None, e.ranking, TOP_K, {}, 0)
    conditions = planned(e)
    some = np.arange(120) % 2 == 0
    predicted = np.broadcast_to(np.where(some, e.truth, (e.truth + 1) % 4), (len(conditions.names), 3, 120))
    found = robustness(e, conditions, predicted)
    assert found["all"]["accuracy"] < e.chance and found["survives"] is None
    assert found["verdict"] in ("undecided", "no signal")


def test_shares_of_what_may_be_nothing_are_no_verdict():
    e = evidence_of(test_rows=400)
    conditions = planned(e)
    right = np.arange(400) // 4 % 100 < 29  # of each class 29 in a hundred: four points above chance
    predicted = np.where(right, e.truth, (e.truth + 1) % 4)
    found = robustness(e, conditions, np.broadcast_to(predicted, (len(conditions.names), 3, 400)))
    assert found["all"]["p"] < 0.05 and found["all"]["interval"][0] <= e.chance < found["all"]["accuracy"]
    assert found["verdict"] == "undecided" and found["survives"] is None


def test_of_two_steps_one_is_always_half():
    e = replace(evidence_of(layers=2), top_k=1)
    conditions = planned(e)
    found = robustness(e, conditions, guesses(e, conditions, lambda kept: 0.9 * kept.mean()))
    assert found["largest_step"] is None and found["survives"]["share"] == pytest.approx(0.5, abs=0.1)


def test_how_rare_so_costly_a_removal_is_among_random_ones():
    e = evidence_of()
    conditions = planned(e)
    found = robustness(e, conditions, guesses(e, conditions, lambda kept: 0.9 * kept[0]))["without_random"]
    assert found["draws"] == 20 and found["p"] == pytest.approx(1 / 21) and found["share_below_top_removed"] == 0


def shares(share, low, high):
    return {"share": share, "interval": [low, high], "removed": 8}


@pytest.mark.parametrize(
    ("survives", "below_random", "half", "expected"),
    [
        (shares(0.2, 0.1, 0.3), True, shares(0.1, 0.0, 0.2), "localized"),
        (shares(0.4, 0.3, 0.6), True, shares(0.1, 0.0, 0.2), "undecided"),
        (shares(0.6, 0.4, 0.8), True, shares(0.1, 0.0, 0.2), "undecided"),
        (shares(0.2, 0.1, 0.3), None, shares(0.1, 0.0, 0.2), "undecided"),  # nothing could be drawn
        (shares(0.8, 0.7, 0.9), None, shares(0.5, 0.4, 0.6), "distributed"),
        (shares(0.2, 0.1, 0.3), False, shares(0.1, 0.0, 0.2), "distributed"),  # any layers cost as much
        (shares(0.8, 0.7, 0.9), True, shares(0.5, 0.4, 0.6), "distributed"),
        (shares(1.0, 0.9, 1.1), False, shares(0.95, 0.92, 0.98), "redundant"),
        (shares(1.0, 0.9, 1.1), False, shares(0.95, 0.85, 1.05), "undecided"),
    ],
)
def test_verdicts_by_their_boundaries(survives, below_random, half, expected):
    assert verdict(survives, below_random, half)["verdict"] == expected
