"""Whether prediction survives the removal of the top layers: what to compare it with, curves, and the verdict.

Removing the top k costs something; what that means is known only beside what removing any k costs, the bottom k, all
but the top k, and one layer after the other until none is left.

Shape letters: n test LoRAs, L layers, R runs, K conditions, B draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.integrate import trapezoid

from analysis.evidence import ALPHA, Evidence, estimate, exceedance, interval, stream

LOCALIZED, REDUNDANT = 0.5, 0.9  # shares of what is above chance at which the verdict changes
LEAST_STEPS = 4  # of a removal curve, below which the largest one says nothing: of two, one is always half
CURVES = ("most first", "least first", "random order")


@dataclass(frozen=True)
class Conditions:
    """What controls are trained on: the name of each condition, and the layers it keeps in each run, bool[K, R, L].

    Names are ``all``, ``without top``, ``without bottom``, ``top alone``, ``without random`` (several), ``plus
    <depth>`` (the top k and one more), and ``<order> <number>`` for the points of the removal curves.
    """

    names: list[str]
    kept: np.ndarray

    def where(self, name: str) -> np.ndarray:
        """Positions of the conditions of this name."""
        return np.flatnonzero([one == name for one in self.names])


def curve_points(layers: int, points: int) -> list[int]:
    """Numbers of layers removed, from 0 to all, half of them among them: ``points`` at most, an odd number."""
    points -= 1 - points % 2
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
    """The conditions that a removal of the top k layers is measured against.

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
    top, role_of = ranking[:top_k], np.asarray(roles)
    names: list[str] = []
    kept: list[np.ndarray] = []

    def add(name: str, removed: np.ndarray) -> None:
        """Removed layers of every run, or int[R, k] of each."""
        mask = np.ones((runs, layers), bool)
        np.put_along_axis(mask, np.broadcast_to(removed, (runs, removed.shape[-1])), False, 1)
        names.append(name)
        kept.append(mask)

    add("all", ranking[:0])
    add("without top", top)
    add("without bottom", ranking[layers - top_k :])
    add("top alone", ranking[top_k:])
    for drawn in _random_layers(top, role_of, draws, generator):
        add("without random", drawn)
    for number in curve_points(layers, points)[1:-1]:
        add(f"most first {number}", ranking[:number])
        add(f"least first {number}", ranking[layers - number :])
    for _ in range(orders):
        order = np.stack([generator.permutation(layers) for _ in range(runs)])
        for number in curve_points(layers, points)[1:-1]:
            add(f"random order {number}", order[:, :number])
    for layer in ranking[top_k:].tolist() if conditional else ():
        add(f"plus {layer}", np.setdiff1d(ranking[top_k:], layer))
    return Conditions(names, np.stack(kept))


def _random_layers(
    top: np.ndarray, role_of: np.ndarray, draws: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Layers of the roles that the top ones have, int[k] each, no draw twice and none the top ones themselves."""
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


def robustness(e: Evidence, conditions: Conditions, predicted: np.ndarray) -> dict:
    """What removing the top k costs, against controls and along the removal curves.

    Args:
        e: The evidence.
        conditions: Of `plan_controls`.
        predicted: Classes of the test LoRAs under each condition, int[K, R, n].
    """
    conditions, predicted = _without_plus(conditions, predicted)
    correct = predicted == e.truth
    accuracy, drawn = correct.mean((1, 2)), e.draws.accuracies(list(correct))  # (K,), (K, B)
    at = {name: int(conditions.where(name)[0]) for name in ("all", "without top", "without bottom", "top alone")}
    whole, without_top = accuracy[at["all"]], accuracy[at["without top"]]
    random = accuracy[conditions.where("without random")]
    p = float(exceedance(whole, e.null(predicted[at["all"]][None]))[0])
    estimates = {name.replace(" ", "_"): estimate(correct[i], drawn[i]) for name, i in at.items()}
    estimates["all"]["p"] = p
    curves = {curve: removal_curve(curve, conditions, accuracy, drawn, e.chance) for curve in CURVES}
    found = {
        "runs": correct.shape[1],
        "top_k": e.top_k,
        **estimates,
        "without_random": _random_removals(random, without_top),
        "curves": {curve.replace(" ", "_"): told for curve, (told, _) in curves.items()},
        "survives": None,
        "survives_half": None,
        "largest_step": None,
    }
    if p >= ALPHA:
        return found | {"verdict": "no signal", "why": f"with all layers not above permuted labels (p = {p:.2g})"}
    if interval(drawn[at["all"]])[0] <= e.chance:  # shares of what may be nothing have no bounds (Fieller, 1954)
        told = f"its interval reaches {100 * e.chance:.0f} %, what guessing the largest class gives"
        return found | {"verdict": "undecided", "why": f"with all layers above permuted labels, but {told}"}

    def share(left: float, of_draws: np.ndarray) -> dict:
        """What is left of the accuracy above chance."""
        above = np.maximum(drawn[at["all"]] - e.chance, 1 / len(e.truth))
        return {"share": (left - e.chance) / (whole - e.chance), "interval": interval((of_draws - e.chance) / above)}

    curve, points = curves["most first"]
    found["survives"] = share(without_top, drawn[at["without top"]])
    half = sum(number <= conditions.kept.shape[2] / 2 for number in curve["removed"])  # points until half are gone
    least = int(np.argmin(curve["accuracy"][1:half])) + 1 if half > 1 else 0
    found["survives_half"] = share(curve["accuracy"][least], points[least]) | {"removed": curve["removed"][least]}
    if len(points) > LEAST_STEPS:
        steps = -np.diff(points, axis=0)
        largest = int(np.argmax(-np.diff(curve["accuracy"])))
        span = np.maximum(np.ptp(points, axis=0), 1 / len(e.truth))
        found["largest_step"] = {
            "share": -np.diff(curve["accuracy"])[largest] / np.ptp(curve["accuracy"]),
            "interval": interval(steps[largest] / span),  # of this step: the largest of each draw is always larger
        }
    below_random = bool(without_top < random.min()) if len(random) else None
    return found | verdict(found["survives"], below_random, found["survives_half"])


def _without_plus(conditions: Conditions, predicted: np.ndarray) -> tuple[Conditions, np.ndarray]:
    """Without the conditions that only `conditional_importance` looks at."""
    kept = [i for i, name in enumerate(conditions.names) if not name.startswith("plus ")]
    return Conditions([conditions.names[i] for i in kept], conditions.kept[kept]), predicted[kept]


def _random_removals(random: np.ndarray, without_top: float) -> dict:
    """Accuracies without random layers, beside that without the top ones; nulls where nothing could be drawn."""
    found = {"draws": len(random), "accuracies": random}
    if len(random) == 0:
        return found | dict.fromkeys(("mean", "min", "max", "share_below_top_removed", "p"))
    below = random <= without_top
    return found | {
        "mean": random.mean(),
        "min": random.min(),
        "max": random.max(),
        "share_below_top_removed": below.mean(),
        "p": (1 + below.sum()) / (1 + len(random)),
    }


def removal_curve(
    curve: str, conditions: Conditions, accuracy: np.ndarray, drawn: np.ndarray, chance: float
) -> tuple[dict, np.ndarray]:
    """Accuracy against the number of layers removed, down to none, which is chance and not trained.

    Args:
        curve: One of ``CURVES``.
        conditions: All of them.
        accuracy: Of each condition, float[K].
        drawn: Of each condition in each draw, float[K, B].
        chance: Without any layer.

    Returns:
        The curve with its band and the area under it (1 for a curve that stays at 1), and its points in each draw,
        float[points, B].
    """
    layers = conditions.kept.shape[2]
    numbers = sorted({int(name.rsplit(" ", 1)[1]) for name in conditions.names if name.startswith(curve)})
    positions = [conditions.where("all"), *(conditions.where(f"{curve} {number}") for number in numbers)]
    means = [*(float(accuracy[i].mean()) for i in positions), chance]
    points = np.stack([*(drawn[i].mean(0) for i in positions), np.full(drawn.shape[1], chance)])
    removed = [0, *numbers, layers]
    low, high = interval(points).T
    areas = [trapezoid(values, np.array(removed) / layers, axis=0) for values in (np.array(means), points)]
    told = {"removed": removed, "accuracy": means, "low": low, "high": high}
    return told | {"area": areas[0], "area_interval": interval(areas[1])}, points


def verdict(survives: dict, below_random: bool | None, half: dict) -> dict:
    """Where a concept lies that can be told at all, and why.

    ``localized``: less than half of what is above chance survives the removal of the top k, which costs more than any
    removal of random layers. ``redundant``: nine tenths survive until half of the layers are gone, most predictive
    first, at the worst point of the curve until then. ``distributed``: otherwise. ``undecided``: an interval lies on
    both sides of such a boundary, or less than half may survive and nothing tells what other layers would cost. (And
    ``no signal`` where all layers together are not above permuted labels: then nothing can survive.)

    Args:
        survives: Share without the top k, and its interval.
        below_random: Whether the top k cost more than each random draw; None where nothing could be drawn.
        half: The least share until half of the layers are gone, its interval, and how many are ``removed`` there.
    """
    share, (low, high) = survives["share"], survives["interval"]
    told = f"{_share(share, low, high)} of what is above chance survives the removal"
    if below_random is None and low < LOCALIZED:
        return {"verdict": "undecided", "why": f"{told}, and there are no other layers of these roles to remove"}
    if below_random and high < LOCALIZED:
        return {"verdict": "localized", "why": f"{told}, and random layers cost less"}
    if below_random and low < LOCALIZED:
        return {"verdict": "undecided", "why": f"{told}: on both sides of a half"}
    share, (low, high) = half["share"], half["interval"]
    until = f"at worst until half of the layers are gone, most predictive first ({half['removed']} of them)"
    told = f"{_share(share, low, high)} is left {until}"
    if low >= REDUNDANT:
        return {"verdict": "redundant", "why": told}
    if high < REDUNDANT:
        return {"verdict": "distributed", "why": told}
    return {"verdict": "undecided", "why": f"{told}: on both sides of nine tenths"}


def _share(share: float, low: float, high: float) -> str:
    return f"{100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def conditional_importance(e: Evidence, conditions: Conditions, predicted: np.ndarray) -> list[dict]:
    """What each other layer adds to the top k, most first."""
    plus = {i: int(name.removeprefix("plus ")) for i, name in enumerate(conditions.names) if name.startswith("plus ")}
    correct = predicted[[int(conditions.where("top alone")[0]), *plus]] == e.truth
    accuracy, drawn = correct.mean((1, 2)), e.draws.accuracies(list(correct))
    found = [
        {
            "layer": e.layers[layer].name,
            "adds": accuracy[i] - accuracy[0],
            "interval": interval(drawn[i] - drawn[0]),
        }
        for i, layer in enumerate(plus.values(), 1)
    ]
    return sorted(found, key=lambda record: -record["adds"])
