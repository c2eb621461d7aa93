"""The planned removals, and the conclusions from predictions whose truth is planted."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import trapezoid

from analysis.draws import interval
from analysis.evidence import Evidence, Predictions
from analysis.removal import (
    CURVES,
    Measured,
    conditional_importance,
    half_gone,
    robustness,
    settle,
    steepest,
    verdict,
)
from analysis.removal_plan import WINDOW, Order, curve_points, plan_controls
from loras.lora_files import Layer

LAYERS, TOP_K = 16, 2


def evidence_of(ranking=None, layers=LAYERS, test_rows=120, classes=4, seed=0, top_k=TOP_K, alone=None, more=20):
    """Return evidence of layers alone that are right where ``alone`` bool[L, R, V + T] is, else guess."""
    y = np.arange(more + test_rows) % classes
    rows = {"train": np.arange(0), "validation": np.arange(more), "test": np.arange(more, len(y))}
    described = [Layer(f"layer {d}", f"module_{d // 2}", ("down", "up")[d % 2], (1, 4), "F32") for d in range(layers)]
    alone = np.ones((layers, 1, len(y)), bool) if alone is None else alone
    predicted = np.where(alone, y, np.random.default_rng(seed).integers(0, classes, alone.shape))
    single = {"predicted": predicted, "log_loss": np.zeros(alone.shape)}
    ranking = np.arange(layers) if ranking is None else np.asarray(ranking)
    predictions = Predictions(np.arange(len(y)), y, single)
    names = [str(c) for c in range(classes)]
    return Evidence(described, names, y, rows, None, ranking, top_k, predictions, seed, 500, 500)


def planned(evidence: Evidence, order=None, **more):
    order = Order.of_layers(evidence) if order is None else order
    return plan_controls(order, **({"runs": 2, "draws": 39, "points": 11, "seed": 0} | more))


def guesses(evidence: Evidence, conditions, recognised) -> np.ndarray:
    """Return predictions that are right for a share ``recognised(kept)`` of the test LoRAs, guessed for the others."""
    generator = np.random.default_rng(1)
    shape = (*conditions.kept.shape[:2], len(evidence.truth))
    share = np.array([[recognised(kept) for kept in of_runs] for of_runs in conditions.kept])
    knows = np.arange(len(evidence.truth)) % 20 < 20 * share[:, :, None]  # of each class the same share
    return np.where(knows, evidence.truth, generator.integers(0, len(evidence.classes), shape))


# ----------------------------------------------------------------------------------------------------------------------
# The plan
# ----------------------------------------------------------------------------------------------------------------------


def test_the_planned_conditions_remove_what_they_say():
    evidence = evidence_of(ranking=np.random.default_rng(0).permutation(LAYERS))
    conditions = planned(evidence)
    removed = {
        name: [set(np.flatnonzero(~kept)) for kept in conditions.kept[conditions.where(name)][0]]
        for name in conditions.names
    }
    order = evidence.ranking.tolist()
    assert removed["all"] == [set()] * 2
    assert removed["without top"] == removed["without most"] == removed["most first 2"] == [set(order[:2])] * 2
    assert removed["without bottom"] == [set(order[-2:])] * 2
    assert removed["top alone"] == [set(order[2:])] * 2
    assert removed["most first 8"] == [set(order[:8])] * 2 and removed["least first 8"] == [set(order[8:])] * 2
    in_random_order = removed["random order 8"]
    assert all(len(layers) == 8 for layers in in_random_order) and len(set(map(frozenset, in_random_order))) == 2
    assert all(a < b for a, b in zip(removed["random order 8"], removed["random order 9"], strict=True))
    assert conditions.trained.all()


def test_a_tenth_of_the_layers_is_removed_where_that_is_more_than_the_top_k():
    evidence = evidence_of(layers=64, top_k=5)
    conditions = planned(evidence)
    removed = (~conditions.kept).sum(2)
    for name, number, draws in (("without most", 7, 1), ("without top", 5, 1), ("without random", 7, 39)):
        where = conditions.where(name)
        assert len(where) == draws and (removed[where] == number).all()


def test_the_most_predictive_units_are_removed_in_smaller_steps():
    names = planned(evidence_of(layers=64, top_k=3)).names
    first = [int(name.split()[-1]) for name in names if name.startswith("most first")]
    assert first[:7] == [1, 2, 3, 4, 5, 7, 10] and f"least first {first[5]}" not in names


def test_modules_are_ordered_by_what_each_shows_alone_on_validation_rows_and_removed_whole():
    evidence = evidence_of(layers=9, top_k=3)  # the last layer's module is not whole
    members, size = np.arange(8).reshape(4, 2), len(evidence.y)
    right = np.zeros((4, 1, size), bool)
    right[0, :, 20:] = True  # perfect on test rows, which must not matter
    right[2, :, :20] = True
    right[[1, 3], :, :10] = True
    predicted = np.where(right, evidence.y, (evidence.y + 1) % 4)
    losses = np.ones(right.shape)
    losses[3] = 0.5
    order = Order.of_modules(evidence, members, predicted, losses)
    assert order.names == ["module_2", "module_3", "module_1", "module_0"] and order.unit == "module"
    assert order.top == order.most == 2 and order.above == 1
    conditions = planned(evidence, order)
    without_top = conditions.kept[conditions.where("without top")[0], 0]
    assert np.flatnonzero(~without_top).tolist() == [4, 5, 6, 7]
    even = (conditions.kept[..., :8:2] == conditions.kept[..., 1:8:2]).all()
    assert even and conditions.kept[..., 8].all() and len(conditions.where("without random")) == 1


def test_modules_of_equal_accuracy_without_losses_are_ordered_by_macro_f1_then_depth():
    evidence = evidence_of(layers=6)
    y = evidence.y
    one_class = np.where(y % 4 == 0, y, 0)  # right on a quarter
    spread = np.where(np.arange(len(y)) // 4 % 4 == 0, y, (y + 1) % 4)  # likewise, but some of each class
    validated = [(predicted[:20] == y[:20]).sum() for predicted in (one_class, spread)]
    spread[np.flatnonzero(spread[:20] == y[:20])[: validated[1] - validated[0]]] = 3
    predicted = np.stack([one_class, one_class, spread])[:, None]
    order = Order.of_modules(evidence, np.arange(6).reshape(3, 2), predicted)
    assert order.names == ["module_2", "module_0", "module_1"] and order.above == 0


def test_random_layers_are_never_among_the_most_predictive_and_of_their_roles_as_far_as_there_are_any():
    evidence = evidence_of(ranking=[1, 3, *[d for d in range(LAYERS) if d not in (1, 3)]])  # two ups
    conditions = planned(evidence)
    removed = [np.flatnonzero(~conditions.kept[i, 0]) for i in conditions.where("without random")]
    assert len(removed) == 39 and len({tuple(layers) for layers in removed}) == 39
    assert all(len(layers) == 2 and not set(layers) & {1, 3} for layers in removed)
    assert all((layers % 2 == 1).all() for layers in removed[:15])  # 6 ups are left: no more than 15 pairs of them
    few = planned(evidence, draws=10)
    assert not few.kept[few.where("without random")][..., 1::2].all(2).any()


def test_where_there_are_few_others_all_choices_are_drawn_and_where_there_are_fewer_none_is():
    assert len(planned(evidence_of(layers=6)).where("without random")) == 6  # of 4 others 2
    assert len(planned(evidence_of(layers=4)).where("without random")) == 1
    assert len(planned(evidence_of(layers=3)).where("without random")) == 0


@pytest.mark.parametrize("units", [1, 2, 5, 12, 19, 64, 128, 723])
def test_a_step_of_a_curve_is_no_wider_than_the_window_and_half_of_the_units_is_a_point(units):
    for at_least in (11, 12, 32):
        points = curve_points(units, at_least)
        assert points[0] == 0 and points[-1] == units and units // 2 in points
        assert len(points) >= min(at_least, units + 1) and max(np.diff(points)) <= max(1, WINDOW * units)


# ----------------------------------------------------------------------------------------------------------------------
# Planted structures
# ----------------------------------------------------------------------------------------------------------------------


def structure(where: str, units: int, generator: np.random.Generator):
    """Return the share of LoRAs that each unit alone recognises, and that of those that are kept together."""
    if where == "a little in each":
        return np.full(units, 0.15), lambda kept: 0.9 * kept.mean()
    number = {"nothing": 0, "all in each": units}.get(where)
    holders = np.isin(np.arange(units), generator.permutation(units)[: int(where) if number is None else number])
    return 0.9 * holders, lambda kept: 0.9 * (kept & holders).any()


def simulated(where: str, units: int, seed: int, *, modules=False, top_k=5, test_rows=100, points=12, runs=1):
    """Return evidence, conditions and predictions where so many units hold everything, or as ``where`` says.

    A LoRA that is hard to recognise is so under every condition; 2 % of all predictions are guessed anew.
    """
    generator, layers = np.random.default_rng([seed, 17]), units * (2 if modules else 1)
    size = 40 + test_rows
    alone, together = structure(where, units, generator)
    difficulty = generator.random(size)

    def known(share: np.ndarray, hard: np.ndarray) -> np.ndarray:
        mask = hard < share[..., None]
        return mask & (generator.random(mask.shape) > 0.02)

    each = generator.random((units, 1, size)) if where == "a little in each" else difficulty
    right = known(np.repeat(alone[:, None], runs, axis=1), each)
    shown = np.zeros((layers, runs, size), bool) if modules else right
    evidence = evidence_of(layers=layers, test_rows=test_rows, seed=seed, top_k=top_k, alone=shown, more=40)
    evidence = replace(evidence, ranking=np.argsort(-(evidence.layer_predictions() == evidence.truth).mean((1, 2))))
    order = Order.of_layers(evidence)
    if modules:
        predicted = np.where(right, evidence.y, generator.integers(0, 4, right.shape))
        order = Order.of_modules(evidence, np.arange(layers).reshape(-1, 2), predicted)
    conditions = planned(evidence, order, runs=runs, points=points, seed=seed)
    kept = conditions.kept[..., :: 2 if modules else 1]
    share, position = np.unique([[together(mask) for mask in masks] for masks in kept], return_inverse=True)
    right = known(np.repeat(share[:, None], runs, axis=1), difficulty)[..., 40:]  # equal conditions are trained once
    right = right[position.reshape(kept.shape[:2]), np.arange(runs)]
    return evidence, conditions, np.where(right, evidence.truth, generator.integers(0, 4, right.shape))


def outcome(section: dict) -> str:
    """Return what becomes of the hypothesis that degradation is graceful."""
    low, high = section["steepest"]["interval"]
    return "confirmed" if high <= 0.5 else "refuted" if low > 0.5 else "undecided"


STRUCTURES = [  # what is planted in how many units, k, the verdict, and what degradation is not
    ("1", 64, 5, False, "localized", "confirmed"),
    ("6", 64, 5, False, "localized", "confirmed"),
    ("10", 64, 5, False, "distributed", "confirmed"),
    ("10", 12, 5, False, "redundant", "refuted"),
    ("a little in each", 64, 5, False, "distributed", "refuted"),
    ("all in each", 64, 5, False, "redundant", "refuted"),
    ("nothing", 64, 5, False, "no signal", None),
    ("2", 8, 4, True, "undecided", "confirmed"),  # no more than 15 choices of two others
    ("2", 10, 4, True, "localized", "confirmed"),
    ("2", 32, 5, True, "localized", "confirmed"),
]


def verdicts(seeds, where, units, top_k, modules, not_outcome, **more) -> Counter:
    """Return how often each verdict is given to a planted structure."""
    given = Counter()
    for seed in seeds:
        section = robustness(*simulated(where, units, seed, modules=modules, top_k=top_k, **more))
        given[section["verdict"]] += 1
        assert section["steepest"] is None or outcome(section) != not_outcome
    return given


@pytest.mark.parametrize(("where", "units", "top_k", "modules", "expected", "not_outcome"), STRUCTURES)
def test_what_is_planted_gets_its_verdict(where, units, top_k, modules, expected, not_outcome):
    given = verdicts(range(2), where, units, top_k, modules, not_outcome)
    assert set(given) <= {expected, "undecided"} and given[expected] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("test_rows", [40, 100, 300])
@pytest.mark.parametrize(("where", "units", "top_k", "modules", "expected", "not_outcome"), STRUCTURES)
def test_what_is_planted_never_gets_another_verdict(where, units, top_k, modules, expected, not_outcome, test_rows):
    given = verdicts(range(20), where, units, top_k, modules, not_outcome, test_rows=test_rows, runs=2)
    assert given[expected] + given["undecided"] >= 19
    enough = {"redundant": 300, "distributed": 100, "no signal": 1000}.get(expected, 40)  # p < 0.05 in one of 20
    assert given[expected] >= 19 or test_rows < enough


@pytest.mark.parametrize("where", ["1", "10", "all in each", "a little in each"])
def test_the_outcome_does_not_depend_on_the_points_of_the_curve(where):
    sections = [robustness(*simulated(where, 64, 1, points=points, test_rows=300)) for points in (12, 32)]
    assert len({(section["verdict"], outcome(section)) for section in sections}) == 1
    assert abs(sections[0]["steepest"]["share"] - sections[1]["steepest"]["share"]) < 0.15
    assert abs(sections[0]["concentration"]["index"] - sections[1]["concentration"]["index"]) < 0.15


def test_equal_predictions_of_few_loras_do_not_make_it_certain_that_nothing_is_lost():
    for test_rows, expected in ((20, "undecided"), (200, "redundant")):
        evidence = evidence_of(test_rows=test_rows)
        conditions = planned(evidence)
        truth = np.broadcast_to(evidence.truth, (*conditions.kept.shape[:2], test_rows))
        result = robustness(evidence, conditions, truth)
        low, high = result["survives_most"]["interval"]
        assert result["survives_most"]["share"] == 1 and low < 1 < high and result["verdict"] == expected
        low, high = result["steepest"]["interval"]
        assert result["steepest"]["share"] == 0 and low < 0 < high and outcome(result) == "confirmed"


def curve_of(evidence: Evidence, order: Order, left: np.ndarray, generator: np.random.Generator) -> Measured:
    """Return predictions along the most-first curve that are right with ``left``, of what all layers know, 95 %."""
    conditions = planned(evidence, order, draws=0)
    removed = (~conditions.kept).sum(2)[:, :1, None]
    accuracy = 0.25 + 0.7 * np.interp(removed, np.arange(len(left)), left)
    shape = (*conditions.kept.shape[:2], len(evidence.truth))
    hard = np.broadcast_to(generator.random(len(evidence.truth)), shape)
    hard = np.where(generator.random(shape) < 0.05, generator.random(shape), hard)
    predicted = np.where(hard < accuracy, evidence.truth, (evidence.truth + 1) % 4)
    return Measured.under(evidence, conditions, predicted)


@pytest.mark.parametrize(
    ("test_rows", "level", "tries"),
    [
        (20, 1.0, 25),
        (20, 0.5, 25),
        *(pytest.param(rows, level, 200, marks=pytest.mark.slow) for rows in (20, 100) for level in (1, 0.8, 0.4, 0)),
    ],
)
def test_shares_and_the_steepest_fall_hold_their_truth(test_rows, level, tries):
    generator, covered = np.random.default_rng(3), np.zeros(3)
    evidence = evidence_of(test_rows=test_rows, layers=10, top_k=1)
    order, left = Order.of_layers(evidence), np.where(np.arange(11) == 0, 1.0, level)
    left[-1] = 0
    for _ in range(tries):
        measured = curve_of(evidence, order, left, generator)
        removed, weights = measured.curve("most first")
        area = (np.append(np.diff(removed), 0) + np.append(0, np.diff(removed))) / 2 / 10
        figures = [measured.share(weights[1])["interval"], steepest(measured)["interval"]]
        figures.append(interval(measured.shares((area @ weights)[None])[1][0]))
        truths = (level, 1 - level, trapezoid(left) / 10)
        covered += [low - 1e-9 <= truth <= high + 1e-9 for (low, high), truth in zip(figures, truths, strict=True)]
    assert (covered / tries > 0.9 - 3 * (0.9 * 0.1 / tries) ** 0.5).all()


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_planted_removal():
    evidence = evidence_of()
    conditions = planned(evidence)
    result = robustness(evidence, conditions, guesses(evidence, conditions, lambda kept: kept[0] * 1.0))
    assert result["order"] == [f"layer {d}" for d in range(LAYERS)] and result["unit"] == "layer"
    assert (result["units"], result["removed"], result["most"]) == (LAYERS, 2, 2)
    assert result["all"]["accuracy"] == 1 and result["top_alone"]["accuracy"] == 1
    assert abs(result["survives"]["share"]) < 0.1 and abs(result["survives_most"]["share"]) < 0.1
    assert result["survives"]["interval"][0] < 0.1 and result["survives"]["interval"][1] < 0.5
    random = result["without_random"]
    assert (random["draws"], random["at_or_below"], random["min"]) == (39, 0, 1) and random["p"] == 1 / 40
    most, least = result["curves"]["most_first"], result["curves"]["least_first"]
    assert most["removed"] == curve_points(LAYERS, 11) and most["accuracy"][-1] == evidence.chance
    assert most["low"][-1] is None and most["high"][-1] is None and None not in most["low"][:-1]
    assert least["accuracy"][:-1] == [1.0] * (len(least["removed"]) - 1) and least["low"][0] < 1
    assert least["area_interval"][0] <= least["area"] <= least["area_interval"][1]
    assert least["area"] == pytest.approx(trapezoid(least["accuracy"], np.array(least["removed"]) / LAYERS))
    assert most["area"] < result["curves"]["random_order"]["area"] < least["area"]
    assert result["steepest"]["share"] > 0.8 and result["steepest"]["width"] == WINDOW
    assert result["half_gone"] == 1 and result["concentration"]["index"] > 0.7
    assert result["left_without_least"]["removed"] == LAYERS - 1 and result["left_without_least"]["share"] == 1
    assert set(result["curves"]) == {curve.replace(" ", "_") for curve in CURVES}


def test_the_steepest_fall_of_a_straight_curve_is_its_width_and_its_concentration_none():
    evidence = evidence_of(layers=20, test_rows=400)
    conditions = planned(evidence)
    result = robustness(evidence, conditions, guesses(evidence, conditions, lambda kept: kept.mean()))
    assert result["steepest"]["share"] == pytest.approx(0.1, abs=0.06) and result["steepest"]["interval"][1] < 0.25
    low, high = result["concentration"]["interval"]
    assert low < 0 < high and high - low < 0.2
    assert result["half_gone"] in (9, 10, 11)
    assert result["left_without_least"]["removed"] in (1, 2, 3)


def test_half_is_gone_between_points_or_never():
    shares = np.array([1.0, 0.8, 0.4, 0.0])
    assert half_gone([0, 4, 12, 16], shares, np.array([True, True, True, False])) == 10
    assert half_gone([0, 4, 12, 16], shares + 0.2, np.array([True, True, True, False])) is None
    assert half_gone([0, 1], np.array([1.0, 0.0]), np.array([True, False])) is None


def test_no_fall_is_steep_among_fewer_than_eight_units():
    for layers, answered in ((7, False), (8, True)):
        evidence = evidence_of(layers=layers)
        conditions = planned(evidence)
        result = robustness(evidence, conditions, guesses(evidence, conditions, lambda kept: 0.9 * kept.mean()))
        assert (result["steepest"] is not None) == answered and result["concentration"] is not None


def test_without_any_unit_above_chance_there_is_no_order_and_no_verdict():
    evidence = evidence_of(alone=np.zeros((LAYERS, 1, 140), bool))
    conditions = planned(evidence)
    result = robustness(evidence, conditions, guesses(evidence, conditions, lambda kept: 0.9 * kept.any()))
    assert (result["verdict"], result["why"]) == (
        "undecided",
        "no single layer is above chance, so no order of removal is known",
    )
    assert result["units_above"] == 0 and result["survives"]["share"] > 0.9
    assert result["steepest"] is None and result["half_gone"] is None


def test_the_only_layer_leaves_nothing():
    evidence = evidence_of(layers=1, top_k=1)
    conditions = planned(evidence)
    assert not conditions.trained[conditions.where("without top")[0]]
    predicted = np.broadcast_to(evidence.truth, (*conditions.kept.shape[:2], 120)).copy()
    predicted[conditions.where("without top")[0]] = 0
    result = robustness(evidence, conditions, predicted)
    assert result["verdict"] == "undecided" and "only layer" in result["why"]
    assert result["without_top"] == {"accuracy": 0.25, "interval": None} and result["survives"]["interval"] is None
    assert result["survives_half"] is None and result["left_without_least"] is None


def test_worse_than_guessing_the_largest_class_is_no_share_of_anything():
    evidence = evidence_of()
    y = evidence.y.copy()
    y[evidence.rows["test"]] = np.where(np.arange(120) < 96, 0, evidence.truth)  # four fifths are of one class
    evidence = replace(evidence, y=y)
    conditions = planned(evidence)
    some = np.arange(120) % 2 == 0
    predicted = np.where(some, evidence.truth, (evidence.truth + 1) % 4)
    result = robustness(evidence, conditions, np.broadcast_to(predicted, (len(conditions.names), 2, 120)))
    assert result["all"]["accuracy"] < evidence.chance and result["survives"] is None
    assert result["verdict"] in ("undecided", "no signal")


def test_shares_of_what_may_be_nothing_are_no_verdict():
    evidence = evidence_of(test_rows=400)
    conditions = planned(evidence)
    right = np.arange(400) // 4 % 100 < 29  # of each class 29 in a hundred: four points above chance
    predicted = np.where(right, evidence.truth, (evidence.truth + 1) % 4)
    result = robustness(evidence, conditions, np.broadcast_to(predicted, (len(conditions.names), 2, 400)))
    assert result["all"]["p"] < 0.05 and result["all"]["accuracy"] > evidence.chance
    assert result["verdict"] == "undecided" and result["survives"] is None and "not clearly above" in result["why"]


def test_conditional_importance_finds_the_layer_that_adds_something():
    evidence = evidence_of()
    conditions = planned(evidence, conditional=True)
    predicted = guesses(evidence, conditions, lambda kept: 0.4 * kept[0] + 0.4 * kept[9])
    result = conditional_importance(evidence, conditions, predicted)
    assert len(result) == LAYERS - TOP_K and result[0]["layer"] == "layer 9"
    assert result[0]["interval"][0] > 0.1 and result[1]["interval"][0] < 0


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts
# ----------------------------------------------------------------------------------------------------------------------


def shares(share, low, high):
    return {"share": share, "interval": [low, high], "removed": 8}


def drawn(draws=39, below=0):
    return {"draws": draws, "p": (1 + below) / (1 + draws) if draws else None}


def order_of(units: int, most: int, unit="layer") -> Order:
    names = [f"{unit} {i}" for i in range(units)]
    return Order(names, unit, np.eye(units, dtype=bool), ["down"] * units, most, 1)


LITTLE, LOW = shares(0.2, 0.1, 0.3), shares(0.1, 0.0, 0.2)


@pytest.mark.parametrize(
    ("survives", "random", "half", "expected"),
    [
        (LITTLE, drawn(), LOW, "localized"),
        (LITTLE, drawn(39, 1), LOW, "localized"),
        (LITTLE, drawn(39, 2), LOW, "undecided"),  # random others cost as much too often
        (LITTLE, drawn(18), LOW, "undecided"),
        (LITTLE, drawn(0), LOW, "undecided"),
        (shares(0.4, 0.3, 0.6), drawn(), LOW, "undecided"),
        (shares(0.6, 0.4, 0.8), drawn(), LOW, "undecided"),
        (shares(0.8, 0.7, 0.9), drawn(0), shares(0.5, 0.4, 0.6), "distributed"),
        (shares(0.8, 0.7, 0.9), drawn(), shares(0.5, 0.4, 0.6), "distributed"),
        (shares(0.8, 0.7, 0.9), drawn(), shares(0.85, 0.75, 0.95), "undecided"),
        (shares(1.0, 0.9, 1.1), drawn(39, 39), shares(0.95, 0.92, 0.98), "redundant"),
        (shares(1.0, 0.9, 1.1), drawn(39, 39), shares(0.95, 0.85, 1.05), "undecided"),
    ],
)
def test_verdicts_by_their_boundaries(survives, random, half, expected):
    assert verdict(survives, random, half, order_of(16, 4))["verdict"] == expected


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            (LITTLE, drawn(), LOW, order_of(16, 4)),
            "without the 4 most predictive layers 20 % (10 to 30) of the accuracy above chance is left, and random "
            "others cost less (p = 0.025 from 39 draws)",
        ),
        (
            (shares(-0.08, -0.15, 0.04), drawn(1), LOW, order_of(2, 1)),
            "without the most predictive layer none of the accuracy above chance is left (at most 4 %), but there are "
            "too few others to remove instead (p = 0.5 from 1 draw)",
        ),
        (
            (LITTLE, drawn(0), LOW, order_of(5, 3, "module")),
            "without the 3 most predictive modules 20 % (10 to 30) of the accuracy above chance is left, but there are "
            "fewer than 3 others to remove instead",
        ),
        (
            (shares(0.8, 0.7, 0.9), drawn(), shares(0.5, 0.4, 0.6), order_of(16, 4)),
            "without the 4 most predictive layers 80 % (70 to 90) of the accuracy above chance is left, but 50 % (40 "
            "to 60) of the accuracy above chance is left without 8 layers, the lowest point until half are removed",
        ),
        (
            (shares(1.0, 0.9, 1.1), drawn(), shares(0.95, 0.85, 1.05) | {"removed": 1}, order_of(16, 4)),
            "95 % (85 to 105) of the accuracy above chance is left without 1 layer, the lowest point until half are "
            "removed: the interval includes 90 %, the bound between distributed and redundant",
        ),
    ],
)
def test_a_verdict_says_why(arguments, why):
    assert verdict(*arguments)["why"] == why


def section(verdict="no signal", high=0.3, survives=None):
    return {"verdict": verdict, "why": "?", "top_k": 5, "survives": survives, "all": {"interval": [0.2, high]}}


ALONE = {"accuracy": 1.0, "interval": [0.9, 1.0], "p": 0.001}


@pytest.mark.parametrize(
    ("before", "alone", "any_above", "expected", "why"),
    [
        (section(), None, False, "no signal", "the top 5 layers alone, chosen by the same test LoRAs, could not be"),
        (section(), ALONE | {"p": 0.3}, False, "no signal", "neither"),
        (
            section(),
            ALONE,
            False,
            "unseen",
            "with all layers stats is indistinguishable from chance, while the top 5 layers",
        ),
        (section(), ALONE | {"p": 0.3}, True, "unseen", "while other representations are not"),
        (
            section("undecided"),
            ALONE,
            True,
            "unseen",
            "with all layers stats is not clearly above chance, while the top 5",
        ),
        (section("undecided", high=0.95), ALONE, True, "undecided", "?"),
        (section("localized", survives=LITTLE), ALONE, True, "localized", "?"),
    ],
)
def test_what_a_representation_does_not_see_is_no_absence_of_a_signal(before, alone, any_above, expected, why):
    settled = settle({"stats": before}, alone, any_above, "other test LoRAs")["stats"]
    assert settled["verdict"] == expected and why in settled["why"]
    assert {key: value for key, value in settled.items() if key not in ("verdict", "why")} == {
        key: value for key, value in before.items() if key not in ("verdict", "why")
    }
