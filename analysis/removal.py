"""Question 2, whether prediction survives the removal of the top layers: the plan of removals, curves, the verdict.

Removing the top k costs something; what that means is known only beside what removing any k costs, the bottom k, all
but the top k, and one layer after the other until none is left. Shape letters as in evidence.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.integrate import trapezoid

from analysis.chance import null_of
from analysis.draws import ALPHA, exceedance, interval, stream
from analysis.evidence import Evidence

LOCALIZED, REDUNDANT = 0.5, 0.9  # shares of the accuracy above chance at which the verdict changes
LEAST_STEPS = 4  # of a removal curve, below which the largest one says nothing: of two, one is always half
COMPARED = ("all", "without top", "without bottom", "top alone")  # conditions whose accuracies are given by name
CURVES = ("most first", "least first", "random order")


@dataclass(frozen=True)
class Conditions:
    """Conditions that controls are trained under: their names, and the layers kept in each run, bool[K, R, L].

    Names are ``all``, ``without top``, ``without bottom``, ``top alone``, ``without random`` (several), ``plus
    <depth>`` (the top k and one more), and ``<order> <number>`` for the points of the removal curves.
    """

    names: list[str]
    kept: np.ndarray

    def where(self, name: str) -> np.ndarray:
        """Return the positions of the conditions of this name."""
        return np.flatnonzero([condition == name for condition in self.names])


def curve_points(layers: int, points: int) -> list[int]:
    """Return numbers of layers removed, from 0 to all with half of them between: ``points`` at most, an odd number."""
    if points % 2 == 0:
        points -= 1
    return np.unique(np.floor(np.linspace(0, layers, points) + 1e-9).astype(int)).tolist()


def plan_controls(
    ranking: np.ndarray,
    roles: Sequence[str],
    top_k: int,
    *,
    runs: int,
    draws: int,
    points: int,
    orders: int = 1,
    conditional: bool = False,
    seed: int,
) -> Conditions:
    """Return the conditions that a removal of the top k layers is measured against.

    Random layers are drawn from those that are not among the top k, as many of each role as these have; from all of the
    role where too few are left. No draw comes twice and none is the top k, so there are fewer than ``draws``, or none,
    where few are possible. Random orders of removal differ from run to run.

    Args:
        ranking: Layers, most predictive first, int[L].
        roles: Of each layer.
        top_k: Number of layers removed.
        runs: R.
        draws: Number of random draws.
        points: Of each removal curve, its ends included.
        orders: Random orders in each run.
        conditional: Whether to add each other layer to the top k.
        seed: Of the draws.
    """
    layers, generator = len(ranking), stream(seed, "controls")
    top, others = ranking[:top_k], ranking[top_k:]
    removals = [
        ("all", ranking[:0]),
        ("without top", top),
        ("without bottom", ranking[layers - top_k :]),
        ("top alone", others),
    ]
    random_layers = _random_layers(top, np.asarray(roles), draws, generator)
    removals += [("without random", removed) for removed in random_layers]
    removals += _curve_removals(ranking, runs, curve_points(layers, points)[1:-1], orders, generator)
    if conditional:
        removals += [(f"plus {layer}", np.setdiff1d(others, layer)) for layer in others.tolist()]
    kept = np.ones((len(removals), runs, layers), bool)
    for mask, (_, removed) in zip(kept, removals, strict=True):
        np.put_along_axis(mask, np.broadcast_to(removed, (runs, removed.shape[-1])), False, 1)
    return Conditions([name for name, _ in removals], kept)


def _curve_removals(
    ranking: np.ndarray, runs: int, numbers: list[int], orders: int, generator: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and removed layers, int[k] or int[R, k], of the points of the removal curves but their ends."""
    layers = len(ranking)
    for number in numbers:
        yield f"most first {number}", ranking[:number]
        yield f"least first {number}", ranking[layers - number :]
    for _ in range(orders):
        order = np.stack([generator.permutation(layers) for _ in range(runs)])
        for number in numbers:
            yield f"random order {number}", order[:, :number]


def _random_layers(
    top: np.ndarray, role_of: np.ndarray, draws: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield layers of the roles that the top ones have, int[k] each, no draw twice and none the top ones themselves."""
    seen = {frozenset(top.tolist())}
    for _ in range(10 * draws):
        if len(seen) > draws:
            break
        drawn = []
        for role, number in sorted(Counter(role_of[top].tolist()).items()):
            others = np.setdiff1d(np.flatnonzero(role_of == role), top)
            pool = others if len(others) >= number else np.flatnonzero(role_of == role)
            drawn.append(np.sort(generator.choice(pool, number, replace=False)))
        layers = np.concatenate(drawn)
        if (chosen := frozenset(layers.tolist())) not in seen:
            seen.add(chosen)
            yield layers


@dataclass(frozen=True)
class Measured:
    """Accuracies under conditions.

    Attributes:
        conditions: The conditions, those of `conditional_importance` left out.
        accuracy: Of each, float[K].
        drawn: Of each in each bootstrap draw, float[K, B].
        chance: Accuracy without any layer.
        least: The least difference of accuracies that is not zero, of one test LoRA.
    """

    conditions: Conditions
    accuracy: np.ndarray
    drawn: np.ndarray
    chance: float
    least: float

    def at(self, name: str) -> int:
        """Return the position of the first condition of this name."""
        return int(self.conditions.where(name)[0])

    def share(self, accuracy: float, drawn: np.ndarray) -> dict:
        """Return the share that an accuracy, and its draws float[B], has of the accuracy above chance of all layers."""
        whole = self.at("all")
        above = np.maximum(self.drawn[whole] - self.chance, self.least)
        share = (accuracy - self.chance) / (self.accuracy[whole] - self.chance)
        return {"share": share, "interval": interval((drawn - self.chance) / above)}


def robustness(evidence: Evidence, conditions: Conditions, predicted: np.ndarray) -> dict:
    """Compare the removal of the top k with controls and along the removal curves, and give a verdict.

    Args:
        evidence: The evidence.
        conditions: Of `plan_controls`.
        predicted: Classes of the test LoRAs under each condition, int[K, R, T].
    """
    conditions, predicted = _without_plus(conditions, predicted)
    correct = predicted == evidence.truth
    accuracy, drawn = correct.mean((1, 2)), evidence.draws.accuracies(list(correct))  # (K,), (K, B)
    measured = Measured(conditions, accuracy, drawn, evidence.chance, 1 / len(evidence.truth))
    at = {name: measured.at(name) for name in COMPARED}
    p = float(exceedance(accuracy[at["all"]], null_of(evidence, predicted[at["all"]][None]))[0])
    estimates = {name.replace(" ", "_"): evidence.draws.estimate(correct[i], drawn[i]) for name, i in at.items()}
    estimates["all"]["p"] = p
    without_random = _random_removals(accuracy[conditions.where("without random")], accuracy[at["without top"]])
    curves = {curve: removal_curve(curve, measured) for curve in CURVES}
    result = {
        "runs": correct.shape[1],
        "top_k": evidence.top_k,
        **estimates,
        "without_random": without_random,
        "curves": {curve.replace(" ", "_"): record for curve, (record, _) in curves.items()},
        "survives": None,
        "survives_half": None,
        "largest_step": None,
    }
    if p >= ALPHA:
        why = f"with all layers the accuracy is indistinguishable from chance (p = {p:.2g} against permuted labels)"
        return result | {"verdict": "no signal", "why": why}
    if estimates["all"]["interval"][0] <= evidence.chance:
        # Shares of an accuracy above chance that may be nothing are unbounded (Fieller, 1954).
        chance = f"chance ({100 * evidence.chance:.0f} %, always guessing the largest class)"
        why = f"with all layers the accuracy is above permuted labels, but its interval is not all above {chance}"
        return result | {"verdict": "undecided", "why": why}
    result |= _surviving(measured, *curves["most first"])
    below_random = accuracy[at["without top"]] < without_random["min"] if without_random["draws"] else None
    return result | verdict(result["survives"], below_random, result["survives_half"])


def _without_plus(conditions: Conditions, predicted: np.ndarray) -> tuple[Conditions, np.ndarray]:
    """Leave out the conditions that only `conditional_importance` reads."""
    kept = [i for i, name in enumerate(conditions.names) if not name.startswith("plus ")]
    return Conditions([conditions.names[i] for i in kept], conditions.kept[kept]), predicted[kept]


def _surviving(measured: Measured, curve: dict, points: np.ndarray) -> dict:
    """Return the shares that survive the removal of the top k and of half of the layers, and the curve's largest step.

    Args:
        measured: Accuracies, of all layers above chance.
        curve: The removal curve, most predictive layers first.
        points: Its points in each draw, float[points, B].
    """
    removed, accuracy = curve["removed"], curve["accuracy"]
    without_top = measured.at("without top")
    until_half = sum(number <= measured.conditions.kept.shape[2] / 2 for number in removed)
    lowest = 0
    if until_half > 1:
        lowest = int(np.argmin(accuracy[1:until_half])) + 1
    largest_step = None
    if len(points) > LEAST_STEPS:
        steps, drawn_steps = -np.diff(accuracy), -np.diff(points, axis=0)
        largest = int(np.argmax(steps))
        span = np.maximum(np.ptp(points, axis=0), measured.least)
        largest_step = {
            "share": steps[largest] / np.ptp(accuracy),
            "interval": interval(drawn_steps[largest] / span),  # of this step: each draw's largest is always larger
        }
    return {
        "survives": measured.share(measured.accuracy[without_top], measured.drawn[without_top]),
        "survives_half": measured.share(accuracy[lowest], points[lowest]) | {"removed": removed[lowest]},
        "largest_step": largest_step,
    }


def _random_removals(random: np.ndarray, without_top: float) -> dict:
    """Compare accuracies without random layers with that without the top ones; None where nothing could be drawn."""
    result = {"draws": len(random), "accuracies": random}
    if len(random) == 0:
        return result | dict.fromkeys(("mean", "min", "max", "share_below_top_removed", "p"))
    below = random <= without_top
    return result | {
        "mean": random.mean(),
        "min": random.min(),
        "max": random.max(),
        "share_below_top_removed": below.mean(),
        "p": (1 + below.sum()) / (1 + len(random)),
    }


def removal_curve(curve: str, measured: Measured) -> tuple[dict, np.ndarray]:
    """Return accuracy against the number of layers removed, down to none, which is chance and not trained.

    Args:
        curve: One of ``CURVES``.
        measured: Accuracies under all conditions.

    Returns:
        The curve with its band and the area under it (1 for a curve that stays at 1), and its points in each draw,
        float[points, B].
    """
    conditions, drawn, chance = measured.conditions, measured.drawn, measured.chance
    layers = conditions.kept.shape[2]
    numbers = sorted({int(name.rsplit(" ", 1)[1]) for name in conditions.names if name.startswith(curve)})
    positions = [conditions.where("all"), *(conditions.where(f"{curve} {number}") for number in numbers)]
    means = [*(float(measured.accuracy[i].mean()) for i in positions), chance]
    points = np.stack([*(drawn[i].mean(0) for i in positions), np.full(drawn.shape[1], chance)])
    removed = [0, *numbers, layers]
    low, high = interval(points).T
    area, drawn_area = (trapezoid(values, np.array(removed) / layers, axis=0) for values in (np.array(means), points))
    record = {"removed": removed, "accuracy": means, "low": low, "high": high}
    return record | {"area": area, "area_interval": interval(drawn_area)}, points


def verdict(survives: dict, below_random: bool | None, half: dict) -> dict:
    """Decide where a concept lies that is predicted above chance, and why.

    ``localized``: less than half of the accuracy above chance survives the removal of the top k, which costs more than
    any removal of random layers. ``redundant``: nine tenths survive until half of the layers are removed, most
    predictive first, at the lowest accuracy until then. ``distributed``: otherwise. ``undecided``: an interval includes
    such a boundary, or less than half may survive and no other layers can be removed to compare with. (And ``no
    signal`` where the accuracy of all layers is indistinguishable from chance: then nothing can survive.)

    Args:
        survives: Share without the top k, and its interval.
        below_random: Whether the top k cost more than each random draw; None where nothing could be drawn.
        half: The least share until half of the layers are removed, its interval, and the number ``removed`` there.
    """
    low, high = survives["interval"]
    text = f"{_share_text(survives)} survives the removal of the top layers"
    if below_random is None and low < LOCALIZED:
        why = f"{text}, and there are no other layers of the same roles to compare with"
        return {"verdict": "undecided", "why": why}
    if below_random and high < LOCALIZED:
        return {"verdict": "localized", "why": f"{text}, and removing random layers costs less"}
    if below_random and low < LOCALIZED:
        return {"verdict": "undecided", "why": f"{text}: the interval includes {100 * LOCALIZED:.0f} %"}
    low, high = half["interval"]
    removed = f"{half['removed']} {'layer' if half['removed'] == 1 else 'layers'} removed"
    until = f"until half of the layers are removed, most predictive first ({removed})"
    text = f"{_share_text(half)} remains at the lowest accuracy {until}"
    if low >= REDUNDANT:
        return {"verdict": "redundant", "why": text}
    if high < REDUNDANT:
        return {"verdict": "distributed", "why": text}
    return {"verdict": "undecided", "why": f"{text}: the interval includes {100 * REDUNDANT:.0f} %"}


def _share_text(record: dict) -> str:
    """Return a share of the accuracy above chance with its interval, in percent."""
    share, low, high = (100 * value for value in (record["share"], *record["interval"]))
    return f"{share:.0f} % ({low:.0f} to {high:.0f}) of the accuracy above chance"


def conditional_importance(evidence: Evidence, conditions: Conditions, predicted: np.ndarray) -> list[dict]:
    """Return the accuracy that each other layer adds to the top k, most first."""
    plus = {i: int(name.removeprefix("plus ")) for i, name in enumerate(conditions.names) if name.startswith("plus ")}
    correct = predicted[[int(conditions.where("top alone")[0]), *plus]] == evidence.truth
    accuracy, drawn = correct.mean((1, 2)), evidence.draws.accuracies(list(correct))
    records = [
        {
            "layer": evidence.layers[layer].name,
            "adds": accuracy[i] - accuracy[0],
            "interval": interval(drawn[i] - drawn[0]),
        }
        for i, layer in enumerate(plus.values(), 1)
    ]
    return sorted(records, key=lambda record: -record["adds"])
