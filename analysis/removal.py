"""Question 2, whether prediction survives the removal of the top layers: what is left, curves, the verdict.

The plan of removals stands in removal_plan.py. Shape letters as in evidence.py, and U units that are removed, layers or
modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.chance import ChanceTest
from analysis.draws import ALPHA, FEW_SEPARATING, LEVEL, interval, stream
from analysis.evidence import Evidence
from analysis.removal_plan import WINDOW, Conditions, Order

LOCALIZED, REDUNDANT = 0.5, 0.9  # shares of the accuracy above chance at which the verdict changes
LEAST_DRAWS = 19  # of other units, below which none of them as costly is no evidence: p = 1 / 20
LEAST_UNITS = 8  # below which a single one is so large a part that any fall is steep
NO_SIGNAL, UNSEEN, UNDECIDED = "no signal", "unseen", "undecided"
COMPARED = ("all", "without top", "without most", "without bottom", "top alone")  # conditions that are given by name
CURVES = ("most first", "least first", "random order")


# ----------------------------------------------------------------------------------------------------------------------
# What is left
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Accuracies under conditions, and the shares of the accuracy above chance that they leave.

    A share is (accuracy - chance) / (accuracy of all layers - chance). Accuracies between conditions, and areas under
    curves, are means of those of conditions, given by weights float[..., K]; what they miss of 1 is of nothing left.

    Attributes:
        evidence: The evidence.
        conditions: The conditions, those of `conditional_importance` left out.
        correct: The test LoRAs that are recognised, bool[K, R, T].
    """

    evidence: Evidence
    conditions: Conditions
    correct: np.ndarray

    @classmethod
    def under(cls, evidence: Evidence, conditions: Conditions, predicted: np.ndarray) -> Measured:
        """Measure predictions of the test LoRAs int[K, R, T]."""
        kept = [i for i, name in enumerate(conditions.names) if not name.startswith("plus ")]
        names = [conditions.names[i] for i in kept]
        rest = Conditions(names, conditions.kept[kept], conditions.order)
        return cls(evidence, rest, predicted[kept] == evidence.truth)

    @cached_property
    def accuracy(self) -> np.ndarray:
        """The accuracy under each condition, float[K]."""
        return self.correct.mean((1, 2))

    @cached_property
    def drawn(self) -> np.ndarray:
        """The accuracy under each condition in each bootstrap draw, float[K, B]."""
        return self.evidence.draws.accuracies(list(self.correct))

    @cached_property
    def trained(self) -> np.ndarray:
        """A mask of the conditions that keep something, bool[K]; the others are chance, without any interval."""
        return self.conditions.trained

    @cached_property
    def win_and_defeat(self) -> np.ndarray:
        """Counts, in each draw, of a LoRA that only all layers recognise and of one that only the condition does.

        Both are added to the G that are drawn from, so that these draws are of G + 2: float[2, B].
        """
        units, count = self.evidence.draws.units + 2, self.evidence.draws.count
        chances = np.array([1, 1, units - 2]) / units
        return (
            stream(self.evidence.seed, "win and defeat", units).multinomial(units, chances, count).T[:2].astype(float)
        )

    def at(self, name: str) -> int:
        """Return the position of the first condition of this name."""
        return int(self.conditions.where(name)[0])

    def weights(self, name: str) -> np.ndarray:
        """Return the weights of the mean of the conditions of this name, float[K]; of nothing left they are 0."""
        weights = np.zeros(len(self.conditions.names))
        where = self.conditions.where(name)
        weights[where] = self.trained[where] / len(where)
        return weights

    def estimate(self, name: str) -> dict:
        """Return the accuracy under a condition and its interval; None where nothing is left, which is not trained."""
        accuracy, drawn = self.mean(self.weights(name))
        known = self.trained[self.at(name)]
        return {"accuracy": accuracy, "interval": self.evidence.draws.intervals(accuracy, drawn) if known else None}

    def mean(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return accuracies of weights float[..., K]: float[...], and in each draw float[..., B]."""
        rest = (1 - weights.sum(-1)) * self.evidence.chance
        return weights @ self.accuracy + rest, weights @ self.drawn + rest[..., None]

    def share(self, weights: np.ndarray) -> dict:
        """Return the share left under a mean of conditions and its interval; None where nothing is left."""
        share, drawn = self.shares(weights[None])
        return {"share": share[0], "interval": interval(drawn[0]).tolist() if weights.any() else None}

    def shares(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shares of weights float[m, K]: float[m], and in each draw float[m, B].

        Weights of a sum of 0 give the difference of two shares.

        Draws know nothing of LoRAs that tell two conditions apart if there are none among the test LoRAs: accuracies
        of equal predictions are equal in all draws. So where fewer than ten LoRAs (groups) tell those that are compared
        apart, draws are of two LoRAs more, one win and one defeat, as in `Draws.family`.
        """
        draws, chance = self.evidence.draws, self.evidence.chance
        whole, total = self.weights("all"), weights.sum(1)
        compared = weights - total[:, None] * whole  # with all layers, or with one another
        by_lora = compared @ self.correct.mean(1)  # (m, T)
        few = draws.separating(by_lora) < FEW_SEPARATING
        wins, defeats = self.win_and_defeat
        size = draws.units + 2
        drawn = compared @ self.drawn  # (m, B)
        above = np.broadcast_to(whole @ self.drawn, drawn.shape).copy()
        old = (size - wins - defeats) / size  # the share of a draw that is of test LoRAs
        drawn[few] = drawn[few] * old + (defeats - wins) / size
        above[few] = above[few] * old + wins / size
        above = np.maximum(above - chance, 1 / len(draws.group))  # of one LoRA at least
        return total + compared @ self.accuracy / (whole @ self.accuracy - chance), total[:, None] + drawn / above

    def curve(self, curve: str) -> tuple[list[int], np.ndarray]:
        """Return numbers of units removed, from 0 to all, and the weights of the curve's points, float[points, K]."""
        names = self.conditions.names
        numbers = sorted({int(name.rsplit(" ", 1)[1]) for name in names if name.startswith(curve)})
        rows = [self.weights("all"), *(self.weights(f"{curve} {number}") for number in numbers)]
        return [0, *numbers, self.units], np.stack([*rows, np.zeros(len(names))])

    @property
    def units(self) -> int:
        """The number U of units."""
        return len(self.conditions.order.names)


def robustness(evidence: Evidence, conditions: Conditions, predicted: np.ndarray) -> dict:
    """Compare the removal of the top k with controls and along the removal curves, and give a verdict.

    Args:
        evidence: The evidence.
        conditions: Of `plan_controls`.
        predicted: Classes of the test LoRAs under each condition, int[K, R, T].
    """
    order, whole = conditions.order, predicted[conditions.where("all")[0]]
    measured = Measured.under(evidence, conditions, predicted)
    estimates = {name.replace(" ", "_"): measured.estimate(name) for name in COMPARED}
    estimates["all"]["p"] = p = float(ChanceTest.of(evidence, [whole]).p_family[0])
    without_most = measured.accuracy[measured.at("without most")]
    random = _random_removals(measured.accuracy[measured.conditions.where("without random")], without_most)
    result = {
        "runs": predicted.shape[1],
        "top_k": evidence.top_k,
        "unit": order.unit,
        "units": len(order.names),
        "removed": order.top,
        "most": order.most,
        "order": list(order.names),
        "units_above": order.above,
        **estimates,
        "without_random": random,
        "curves": {curve.replace(" ", "_"): removal_curve(curve, measured) for curve in CURVES},
        **dict.fromkeys(("survives", "survives_most", "survives_half", "half_gone", "left_without_least")),
        **dict.fromkeys(("steepest", "concentration")),
    }
    if p >= ALPHA:
        why = f"with all layers the accuracy is indistinguishable from chance (p = {p:.2g} against permuted labels)"
        return result | {"verdict": NO_SIGNAL, "why": why}
    if evidence.draws.differences([(whole == evidence.truth, evidence.guess)])[0]["interval"][0] <= 0:
        # Shares of an accuracy above chance that may be nothing are unbounded (Fieller, 1954).
        guess = f"always guessing the largest class ({100 * evidence.chance:.0f} %)"
        above = f"above permuted labels (p = {p:.2g}, this representation alone)"
        why = f"with all layers the accuracy is {above}, but not clearly above {guess}"
        return result | {"verdict": UNDECIDED, "why": why}
    result |= {
        "survives": measured.share(measured.weights("without top")),
        "survives_most": measured.share(measured.weights("without most")),
    }
    if not order.above:
        return result | {
            "verdict": UNDECIDED,
            "why": f"no single {order.unit} is above chance, so no order of removal is known",
        }
    result |= _along_the_order(measured)
    return result | verdict(result["survives_most"], random, result["survives_half"], order)


def _random_removals(random: np.ndarray, without_most: float) -> dict:
    """Compare accuracies without K random units with that without the K most predictive; None without any draw."""
    result = {"draws": len(random), "accuracies": random}
    if len(random) == 0:
        return result | dict.fromkeys(("mean", "min", "max", "at_or_below", "p"))
    below = int((random <= without_most).sum())
    p = (1 + below) / (1 + len(random))
    return result | {"mean": random.mean(), "min": random.min(), "max": random.max(), "at_or_below": below, "p": p}


def removal_curve(curve: str, measured: Measured) -> dict:
    """Return accuracy against the number of units removed, down to none, which is chance and not trained.

    Args:
        curve: One of ``CURVES``.
        measured: Accuracies under all conditions.

    Returns:
        The curve, its band, None where nothing is left, and the area under it, 1 for a curve that stays at 1.
    """
    removed, weights = measured.curve(curve)
    draws = measured.evidence.draws
    accuracy, drawn = measured.mean(weights)
    bounds = draws.intervals(accuracy, drawn)
    low, high = (
        [float(bound) if known else None for bound, known in zip(side, weights.any(1), strict=True)]
        for side in bounds.T
    )
    area, drawn_area = measured.mean(area_weights(np.array(removed) / measured.units) @ weights)
    record = {"removed": removed, "accuracy": accuracy.tolist(), "low": low, "high": high}
    return record | {"area": float(area), "area_interval": draws.intervals(area, drawn_area)}


def area_weights(x: np.ndarray) -> np.ndarray:
    """Return the weights of points at ascending x from 0 to 1 in the area under them (trapezoids), float[points]."""
    steps = np.diff(x) / 2
    return np.append(steps, 0) + np.append(0, steps)


# ----------------------------------------------------------------------------------------------------------------------
# Conclusions
# ----------------------------------------------------------------------------------------------------------------------


def _along_the_order(measured: Measured) -> dict:
    """Return what the curves say of units in their order, where all layers are above chance."""
    removed, weights = measured.curve("most first")
    share = measured.shares(weights)[0]
    until_half = sum(number <= measured.units / 2 for number in removed)
    half = None
    if until_half > 1:
        lowest = until_half - 1 - int(np.argmin(share[until_half - 1 : 0 : -1]))  # the last of equal ones
        half = measured.share(weights[lowest]) | {"removed": removed[lowest]}
    area, drawn = measured.shares((area_weights(np.array(removed) / measured.units) @ weights)[None])
    return {
        "survives_half": half,
        "half_gone": half_gone(removed, share, weights.any(1)),
        "left_without_least": _left_without_least(measured),
        "steepest": steepest(measured),
        "concentration": {"index": 1 - 2 * area[0], "interval": interval(1 - 2 * drawn[0])},
    }


def half_gone(removed: Sequence[int], share: np.ndarray, trained: np.ndarray) -> int | None:
    """Return the least number of units, most predictive first, without which at most half is left.

    Between points of the curve by linear interpolation, rounded up; None where more is left as long as anything is.
    """
    for i in np.flatnonzero((share <= LOCALIZED) & trained).tolist():
        part = (share[i - 1] - LOCALIZED) / (share[i - 1] - share[i])
        return math.ceil(removed[i - 1] + part * (removed[i] - removed[i - 1]) - 1e-9)
    return None


def _left_without_least(measured: Measured) -> dict | None:
    """Return what is left without the least predictive units: with the most of them gone that leave nine tenths.

    With half of the units gone, where no point of the curve leaves as much; None where the curve has no points but its
    ends. More may be left than with all units, where those that know nothing were in the way.
    """
    removed, weights = measured.curve("least first")
    if len(removed) < 3:
        return None
    share = measured.shares(weights)[0]
    enough = np.flatnonzero((share >= REDUNDANT) & weights.any(1))
    point = int(enough[-1])
    if point == 0:
        point = max(1, sum(number <= measured.units / 2 for number in removed) - 1)
    return {"removed": removed[point]} | measured.share(weights[point])


def steepest(measured: Measured) -> dict | None:
    """Return the largest fall of the share left over a window of removed units, before half of the units are removed.

    ``D = max over f <= 0.5 - w of s(f) - s(f + w)``, s the share left, by linear interpolation, when the share f of the
    units is removed, most predictive first, and ``w = max(0.1, 1 / U)``. It does not depend on the points of the
    curve, whose steps are at most w. None for fewer than eight units, of which one is a large part.

    The largest of many falls is too large by chance, and that of a draw still more. So the lower bound is D less the
    97.5 % quantile over draws of the largest amount by which any fall is above what it is itself. The upper bound is
    the largest of those of single falls, as D is one of them.
    """
    units = measured.units
    if units < LEAST_UNITS:
        return None
    width = max(WINDOW, 1 / units)
    removed, weights = measured.curve("most first")
    x = np.array(removed) / units
    starts = np.unique(np.concatenate([x, x - width, [0, 0.5 - width]]).round(12))  # a piecewise linear fall turns here
    starts = starts[(starts >= 0) & (starts <= 0.5 - width + 1e-9)]
    ends = np.eye(len(x))
    before, after = (np.stack([np.interp(at, x, end) for end in ends], axis=1) for at in (starts, starts + width))
    falls, drawn = measured.shares((before - after) @ weights)
    largest, excess = falls.max(), (drawn - falls[:, None]).max(0)
    low = largest - np.quantile(excess, (1 + LEVEL) / 2)
    return {"share": largest, "interval": [low, interval(drawn)[:, 1].max()], "width": width}


def verdict(survives: dict, random: dict, half: dict | None, order: Order) -> dict:
    """Decide where a concept lies that is predicted above chance, and why.

    ``localized``: less than half of the accuracy above chance is left without the K most predictive units, which cost
    more than K random others, p <= 0.05 among at least 19 draws. ``redundant``: nine tenths are left until half of the
    units are removed, most predictive first, at the lowest accuracy until then. ``distributed``: more than half is left
    without the K, and less than nine tenths at that lowest accuracy. ``undecided``: otherwise.

    Args:
        survives: Share without the K most predictive units, and its interval; None where nothing is left.
        random: Of `_random_removals`.
        half: The least share until half of the units are removed, its interval, and the number ``removed`` there.
        order: The units.
    """
    most = "most predictive " + (order.unit if order.most == 1 else f"{order.unit}s")
    left = f"without the {most if order.most == 1 else f'{order.most} {most}'} {_share_text(survives)}"
    low, high = survives["interval"] or (0.0, 0.0)
    if high < LOCALIZED and random["draws"] >= LEAST_DRAWS and random["p"] <= ALPHA:
        return {"verdict": "localized", "why": f"{left}, and random others cost less ({_draws_text(random)})"}
    if half is None:
        return {"verdict": UNDECIDED, "why": f"nothing is left without the only {order.unit}"}
    removed = f"{half['removed']} {order.unit if half['removed'] == 1 else f'{order.unit}s'}"
    text = f"{_share_text(half)} without {removed}, the lowest point until half are removed"
    half_low, half_high = half["interval"]
    if half_low >= REDUNDANT:
        return {"verdict": "redundant", "why": text}
    if low >= LOCALIZED and half_high < REDUNDANT:
        return {"verdict": "distributed", "why": f"{left}, but {text}"}
    if low >= LOCALIZED:
        why = f"{text}: the interval includes {100 * REDUNDANT:.0f} %, the bound between distributed and redundant"
    elif high >= LOCALIZED:
        why = f"{left}: the interval includes {100 * LOCALIZED:.0f} %, the bound between localized and distributed"
    elif len(order.names) < 2 * order.most:
        why = f"{left}, but there are fewer than {order.most} others to remove instead"
    elif random["draws"] < LEAST_DRAWS:
        why = f"{left}, but there are too few others to remove instead ({_draws_text(random)})"
    else:
        why = f"{left}, but random others can cost as much ({_draws_text(random)})"
    return {"verdict": UNDECIDED, "why": why}


def _draws_text(random: dict) -> str:
    """Return p of random draws and their number, in words."""
    if random["draws"] == 0:
        return "none"
    return f"p = {random['p']:.2g} from {random['draws']} {'draw' if random['draws'] == 1 else 'draws'}"


def _share_text(record: dict) -> str:
    """Return a share of the accuracy above chance with its interval, in percent; none where it is not above 0."""
    share, (low, high) = record["share"], record["interval"] or (0.0, 0.0)
    if record["interval"] is None:
        return "nothing is left"
    if 100 * share < 0.5:
        return f"none of the accuracy above chance is left (at most {max(0.0, 100 * high):.0f} %)"
    return f"{100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f}) of the accuracy above chance is left"


def settle(sections: dict[str, dict], top_alone: dict | None, any_above: bool, chosen_by: str) -> dict[str, dict]:
    """Return sections of `robustness` that say no more than what all representations show together.

    A verdict is of one representation. One that shows nothing with all layers has not seen that there is nothing where
    the top k alone, or other representations, show something: its verdict is then ``unseen``, not ``no signal``.

    Args:
        sections: Of `robustness`, by representation.
        top_alone: ``accuracy``, ``interval`` and ``p`` of the top k alone by the ranking representation, the top k
            chosen on other LoRAs; None where it is not known.
        any_above: Whether any representation is above chance with all layers.
        chosen_by: The LoRAs that chose the top k, in words.
    """
    settled = {}
    for name, section in sections.items():
        silent, shown = section["verdict"] == NO_SIGNAL, top_alone is not None and top_alone["p"] < ALPHA
        # An accuracy that is above permuted labels, and not clearly above guessing, has no shares.
        lost = section["survives"] is None and shown and top_alone["interval"][0] > section["all"]["interval"][1]
        top, verb = ("top layer", "is") if section["top_k"] == 1 else (f"top {section['top_k']} layers", "are")
        why = None
        if shown and (silent or lost):
            alone = f"the {top} alone by stats, chosen by {chosen_by}, {verb} distinguishable from it"
            reached = f"{100 * top_alone['accuracy']:.1f} %, p = {top_alone['p']:.2g} against permuted labels"
            all_layers = "indistinguishable from chance" if silent else "not clearly above chance"
            why = f"with all layers {name} is {all_layers}, while {alone} ({reached})"
        elif silent and any_above:
            why = f"with all layers {name} is indistinguishable from chance, while other representations are not"
        elif silent and top_alone:
            why = f"neither all layers, nor the {top} alone, nor any representation is distinguishable from chance"
        elif silent:
            why = "neither all layers nor any representation is distinguishable from chance"
            why += f"; the {top} alone, chosen by the same test LoRAs, could not be tested"
        settled[name] = section
        if why:
            settled[name] = section | {"verdict": UNSEEN if shown or any_above else NO_SIGNAL, "why": why}
    return settled


def conditional_importance(evidence: Evidence, conditions: Conditions, predicted: np.ndarray) -> list[dict]:
    """Return the accuracy that each other layer adds to the top k, most first."""
    plus = {i: int(name.removeprefix("plus ")) for i, name in enumerate(conditions.names) if name.startswith("plus ")}
    alone = predicted[int(conditions.where("top alone")[0])] == evidence.truth
    gains = evidence.draws.differences([(predicted[i] == evidence.truth, alone) for i in plus])
    records = [
        {"layer": evidence.layers[layer].name, "adds": gain["difference"], "interval": gain["interval"]}
        for layer, gain in zip(plus.values(), gains, strict=True)
    ]
    return sorted(records, key=lambda record: -record["adds"])
