"""The planned removals, and the conclusions from predictions that are planted under them."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import trapezoid

from analysis.evidence import Evidence, Predictions
from analysis.removal import CURVES, conditional_importance, curve_points, plan_controls, robustness, verdict
from loras.lora_files import Layer

LAYERS, TOP_K = 16, 2


def evidence_of(ranking=None, layers=LAYERS, test_rows=120, classes=4, seed=0) -> Evidence:
    """Return evidence without any prediction; the last rows are the test rows."""
    y = np.arange(2 * test_rows) % classes
    rows = {"train": np.arange(10), "validation": np.arange(10, 20), "test": np.arange(test_rows, 2 * test_rows)}
    described = [Layer(f"layer {d}", f"module_{d // 2}", ("down", "up")[d % 2], (1, 4), "F32") for d in range(layers)]
    ranking = np.arange(layers) if ranking is None else np.asarray(ranking)
    held_out = np.concatenate([rows["validation"], rows["test"]])
    predictions = Predictions(held_out, y[held_out])
    return Evidence(described, [str(c) for c in range(classes)], y, rows, None, ranking, TOP_K, predictions, seed)


def planned(evidence: Evidence, **more):
    roles = [layer.role for layer in evidence.layers]
    settings = {"runs": 3, "draws": 20, "points": 11, "seed": 0} | more
    return plan_controls(evidence.ranking, roles, evidence.top_k, **settings)


def guesses(evidence: Evidence, conditions, recognised) -> np.ndarray:
    """Return predictions that are right for a share ``recognised(kept)`` of the test LoRAs, guessed for the others."""
    generator = np.random.default_rng(1)
    shape = (*conditions.kept.shape[:2], len(evidence.truth))
    share = np.array([[recognised(kept) for kept in of_runs] for of_runs in conditions.kept])
    knows = np.arange(len(evidence.truth)) % 20 < 20 * share[:, :, None]  # of each class the same share
    return np.where(knows, evidence.truth, generator.integers(0, len(evidence.classes), shape))


def test_the_planned_conditions_remove_what_they_say():
    evidence = evidence_of(ranking=np.random.default_rng(0).permutation(LAYERS))
    conditions = planned(evidence)
    removed = {
        name: [set(np.flatnonzero(~kept)) for kept in conditions.kept[conditions.where(name)][0]]
        for name in conditions.names
    }
    order = evidence.ranking.tolist()
    assert removed["all"] == [set()] * 3
    assert removed["without top"] == [set(order[:2])] * 3
    assert removed["without bottom"] == [set(order[-2:])] * 3
    assert removed["top alone"] == [set(order[2:])] * 3
    assert removed["most first 8"] == [set(order[:8])] * 3 and removed["least first 8"] == [set(order[8:])] * 3
    in_random_order = removed["random order 8"]
    assert all(len(layers) == 8 for layers in in_random_order) and len(set(map(frozenset, in_random_order))) == 3
    assert all(a < b for a, b in zip(removed["random order 8"], removed["random order 9"], strict=True))


def test_random_layers_are_of_the_top_layers_roles_and_not_among_them():
    evidence = evidence_of(ranking=[1, 3, *[d for d in range(LAYERS) if d not in (1, 3)]])  # two ups
    conditions = planned(evidence)
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
    evidence = evidence_of(ranking=[1, 3, 0, 2], layers=4)
    conditions = planned(evidence)
    assert len(conditions.where("without random")) == 0
    result = robustness(evidence, conditions, guesses(evidence, conditions, lambda kept: 0.9 * kept[1]))
    assert result["without_random"] == {"draws": 0, "accuracies": pytest.approx([]), **dict.fromkeys(
        ("mean", "min", "max", "share_below_top_removed", "p"))}  # fmt: skip
    assert result["survives"]["share"] < 0.2 and result["verdict"] == "undecided"


@pytest.mark.parametrize("layers", [2, 5, 64, 128])
def test_a_curve_has_at_most_as_many_points_as_asked_and_half_of_the_layers_is_one(layers):
    for at_most in (11, 12, 32):
        points = curve_points(layers, at_most)
        assert points[0] == 0 and points[-1] == layers and layers // 2 in points and len(points) <= at_most


def test_conditional_importance_finds_the_layer_that_adds_something():
    evidence = evidence_of()
    conditions = planned(evidence, conditional=True)
    predicted = guesses(evidence, conditions, lambda kept: 0.4 * kept[0] + 0.4 * kept[9])
    result = conditional_importance(evidence, conditions, predicted)
    assert len(result) == LAYERS - TOP_K and result[0]["layer"] == "layer 9"
    assert result[0]["interval"][0] > 0.1 and result[1]["interval"][0] < 0


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
    evidence = evidence_of()
    conditions = planned(evidence)
    assert robustness(evidence, conditions, guesses(evidence, conditions, recognised))["verdict"] == expected


def test_the_numbers_of_a_planted_removal():
    evidence = evidence_of()
    conditions = planned(evidence)
    result = robustness(evidence, conditions, guesses(evidence, conditions, lambda kept: kept[0] * 1.0))
    assert result["all"]["accuracy"] == 1 and result["top_alone"]["accuracy"] == 1
    assert abs(result["survives"]["share"]) < 0.1 and result["without_random"]["min"] == 1
    assert result["survives"]["interval"][0] < 0.1 and result["survives"]["interval"][1] < 0.5
    most, least = result["curves"]["most_first"], result["curves"]["least_first"]
    assert most["removed"] == curve_points(LAYERS, 11) and most["accuracy"][-1] == evidence.chance
    assert least["accuracy"][:-1] == [1.0] * (len(least["removed"]) - 1)
    assert least["area_interval"][0] <= least["area"] <= least["area_interval"][1]
    assert least["area"] == pytest.approx(trapezoid(least["accuracy"], np.array(least["removed"]) / LAYERS))
    assert most["area"] < result["curves"]["random_order"]["area"] < least["area"]
    assert result["largest_step"]["share"] > 0.9
    assert set(result["curves"]) == {curve.replace(" ", "_") for curve in CURVES}


def test_worse_than_guessing_the_largest_class_is_no_share_of_anything():
    evidence = evidence_of()
    y = evidence.y.copy()
    y[evidence.rows["test"]] = np.where(np.arange(120) < 96, 0, evidence.truth)  # four fifths are of one class
    evidence = replace(evidence, y=y)
    conditions = planned(evidence)
    some = np.arange(120) % 2 == 0
    predicted = np.broadcast_to(
        np.where(some, evidence.truth, (evidence.truth + 1) % 4), (len(conditions.names), 3, 120)
    )
    result = robustness(evidence, conditions, predicted)
    assert result["all"]["accuracy"] < evidence.chance and result["survives"] is None
    assert result["verdict"] in ("undecided", "no signal")


def test_shares_of_what_may_be_nothing_are_no_verdict():
    evidence = evidence_of(test_rows=400)
    conditions = planned(evidence)
    right = np.arange(400) // 4 % 100 < 29  # of each class 29 in a hundred: four points above chance
    predicted = np.where(right, evidence.truth, (evidence.truth + 1) % 4)
    result = robustness(evidence, conditions, np.broadcast_to(predicted, (len(conditions.names), 3, 400)))
    assert result["all"]["p"] < 0.05 and result["all"]["interval"][0] <= evidence.chance < result["all"]["accuracy"]
    assert result["verdict"] == "undecided" and result["survives"] is None


def test_of_two_steps_one_is_always_half():
    evidence = replace(evidence_of(layers=2), top_k=1)
    conditions = planned(evidence)
    result = robustness(evidence, conditions, guesses(evidence, conditions, lambda kept: 0.9 * kept.mean()))
    assert result["largest_step"] is None and result["survives"]["share"] == pytest.approx(0.5, abs=0.1)


def test_how_rare_so_costly_a_removal_is_among_random_ones():
    evidence = evidence_of()
    conditions = planned(evidence)
    result = robustness(evidence, conditions, guesses(evidence, conditions, lambda kept: 0.9 * kept[0]))[
        "without_random"
    ]
    assert result["draws"] == 20 and result["p"] == pytest.approx(1 / 21) and result["share_below_top_removed"] == 0


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


@pytest.mark.parametrize(
    ("survives", "below_random", "half", "why"),
    [
        (
            shares(0.2, 0.1, 0.3),
            True,
            shares(0.1, 0.0, 0.2),
            "20 % (10 to 30) of the accuracy above chance survives the removal of the top layers, and removing random "
            "layers costs less",
        ),
        (
            shares(0.8, 0.7, 0.9),
            True,
            shares(0.5, 0.4, 0.6),
            "50 % (40 to 60) of the accuracy above chance remains at the lowest accuracy until half of the layers are "
            "removed, most predictive first (8 layers removed)",
        ),
        (
            shares(1.0, 0.9, 1.1),
            True,
            shares(0.95, 0.85, 1.05) | {"removed": 1},
            "95 % (85 to 105) of the accuracy above chance remains at the lowest accuracy until half of the layers are "
            "removed, most predictive first (1 layer removed): the interval includes 90 %",
        ),
    ],
)
def test_a_verdict_says_why(survives, below_random, half, why):
    assert verdict(survives, below_random, half)["why"] == why
