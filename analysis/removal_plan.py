"""The plan of removals for question 2: which units are removed, in which order, and with what that is compared.

Removing the top k costs something; what that means is known only beside what removing any as many costs, the bottom k,
all but the top k, and one after the other until none is left. What is removed are units: layers, or, for a
representation that reads whole modules, modules. Shape letters as in evidence.py, and U units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.chance import ChanceTest, f1_weights
from analysis.draws import stream
from analysis.evidence import Evidence

MOST = 10  # one in so many units is removed where that is more than the top k
WINDOW = 0.1  # share of units over which a fall is steep, and that no step of a curve exceeds


@dataclass(frozen=True)
class Order:
    """The units that are removed, most predictive first.

    Attributes:
        names: Of layers as in the files, of modules canonical.
        unit: "layer" or "module".
        layers: The layers of each unit, bool[U, L].
        roles: Of each unit; random ones are drawn with the roles of the most predictive.
        top: Number of units that are removed as the top k.
        above: Number of units that are above chance alone, family-wise; with none of them the order means nothing.
    """

    names: Sequence[str]
    unit: str
    layers: np.ndarray
    roles: Sequence[str]
    top: int
    above: int

    @classmethod
    def of_layers(cls, evidence: Evidence) -> Order:
        """Return the layers as they are ranked."""
        ranked = [evidence.layers[layer] for layer in evidence.ranking]
        above = ChanceTest.of(evidence, list(evidence.layer_predictions())).above_null
        names, roles = [layer.name for layer in ranked], [layer.role for layer in ranked]
        layers = np.eye(len(ranked), dtype=bool)[evidence.ranking]
        return cls(names, "layer", layers, roles, evidence.top_k, int(above.sum()))

    @classmethod
    def of_modules(
        cls, evidence: Evidence, members: np.ndarray, predicted: np.ndarray, log_loss: np.ndarray | None = None
    ) -> Order:
        """Return modules by what a representation recognises from each alone, on the validation LoRAs.

        Ties are broken by log-loss there, by macro-F1 where a classifier has none, then by the network's order.

        Args:
            evidence: The evidence.
            members: Positions of the two layers of each module, int[P, 2].
            predicted: Of classifiers of each module alone, int[P, R, V + T].
            log_loss: Likewise, float[P, R, V + T].
        """
        rows, size = evidence.rows["validation"], len(members)
        validated, tested = predicted[..., : len(rows)], predicted[..., len(rows) :]
        truth, correct = evidence.y[rows], validated == evidence.y[rows]
        if log_loss is None:
            weights = f1_weights(validated, truth, len(evidence.classes))
            worse = -(correct.mean(1) * weights[:, truth]).mean(1)
        else:
            worse = log_loss[..., : len(rows)].mean((1, 2))
        best_first = np.lexsort((np.arange(size), np.round(worse, 12), -correct.sum((1, 2))))
        layers = np.zeros((size, len(evidence.layers)), bool)
        np.put_along_axis(layers, members[best_first], True, 1)
        names = [evidence.layers[members[module, 0]].module for module in best_first]
        above = ChanceTest.of(evidence, list(tested)).above_null
        top = min(size, math.ceil(evidence.top_k / 2))
        return cls(names, "module", layers, ["module"] * size, top, int(above.sum()))

    @property
    def most(self) -> int:
        """The number K of units without which a concept is tested to be localized: the top k or a tenth of all."""
        return max(self.top, math.ceil(len(self.names) / MOST))


@dataclass(frozen=True)
class Conditions:
    """Conditions that controls are trained under.

    Attributes:
        names: ``all``, ``without top``, ``without most``, ``without bottom``, ``top alone``, ``without random``
            (several), ``plus <depth>`` (the top k and one more layer), and ``<order> <number>`` for the points of the
            removal curves.
        kept: The layers kept in each run, bool[K, R, L].
        order: The units, most predictive first.
    """

    names: list[str]
    kept: np.ndarray
    order: Order

    def where(self, name: str) -> np.ndarray:
        """Return the positions of the conditions of this name."""
        return np.flatnonzero([condition == name for condition in self.names])

    @property
    def trained(self) -> np.ndarray:
        """A mask of the conditions that keep a unit in each run, bool[K]; others are not trained."""
        members = self.order.layers.sum(1)
        return (self.kept @ self.order.layers.T.astype(int) == members).any(2).all(1)


def curve_points(units: int, points: int) -> list[int]:
    """Return numbers of units removed, from 0 to all with half of them between.

    At least ``points`` of them, where there are as many units, and so many that no step is wider than ``WINDOW``.
    """
    widest = max(1, int(WINDOW * units + 1e-9))
    steps = max(points - 1, math.ceil(units / widest))
    return np.unique(np.floor(np.linspace(0, units, steps + steps % 2 + 1) + 1e-9).astype(int)).tolist()


def plan_controls(
    order: Order,
    *,
    runs: int,
    draws: int,
    points: int,
    orders: int = 1,
    conditional: bool = False,
    seed: int,
) -> Conditions:
    """Return the conditions that a removal of the top k is measured against.

    Random orders of removal differ from run to run.

    Args:
        order: The units, most predictive first.
        runs: R.
        draws: Number of random draws of other units; see `_random_units`.
        points: Of each removal curve, its ends included, at least.
        orders: Random orders in each run.
        conditional: Whether to add each other layer to the top k; units are to be layers.
        seed: Of the draws.
    """
    total, top, generator = len(order.names), order.top, stream(seed, "controls")
    units = np.arange(total)
    removals = [
        ("all", units[:0]),
        ("without top", units[:top]),
        ("without most", units[: order.most]),
        ("without bottom", units[total - top :]),
        ("top alone", units[top:]),
    ]
    removals += [("without random", removed) for removed in _random_units(order, draws, generator)]
    removals += _curve_removals(order, runs, curve_points(total, points)[1:-1], orders, generator)
    if conditional:
        depths = order.layers.argmax(1)
        removals += [(f"plus {depths[unit]}", np.setdiff1d(units[top:], unit)) for unit in units[top:]]
    kept = np.ones((len(removals), runs, order.layers.shape[1]), bool)
    for mask, (_, removed) in zip(kept, removals, strict=True):
        mask[:] = ~order.layers[np.broadcast_to(removed, (runs, removed.shape[-1]))].any(1)
    return Conditions([name for name, _ in removals], kept, order)


def _curve_removals(
    order: Order, runs: int, numbers: list[int], orders: int, generator: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and removed units, int[k] or int[R, k], of the points of the removal curves but their ends.

    The curve with the most predictive first has 1, 2, 4, ... too, up to its first point, as few units may hold
    everything, and the numbers that are compared by name.
    """
    units = len(order.names)
    ordered = np.arange(units)
    doubled = [2**i for i in range(numbers[0].bit_length())] if numbers else []
    for number in sorted({*doubled, *numbers, order.top, order.most} - {units}):
        yield f"most first {number}", ordered[:number]
    for number in numbers:
        yield f"least first {number}", ordered[units - number :]
    for _ in range(orders):
        random = np.stack([generator.permutation(units) for _ in range(runs)])
        for number in numbers:
            yield f"random order {number}", random[:, :number]


def _random_units(order: Order, draws: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield K units that are not among the K most predictive, int[K] each; nothing where there are fewer.

    They have the roles of the K as far as there are others of these roles. No draw comes twice; where too few have the
    same roles, draws of any role follow, so there are fewer than ``draws`` only where no more are possible.
    """
    role_of, most = np.asarray(order.roles), order.most
    others = np.arange(most, len(role_of))
    if len(others) < most:
        return
    wanted = sorted(Counter(role_of[:most].tolist()).items())
    possible = min(draws, math.comb(len(others), most))
    seen: set[tuple[int, ...]] = set()
    for roles in (wanted, []):
        for _ in range(10 * draws):
            if len(seen) == possible:
                return
            drawn = others[:0]
            for role, number in roles:
                pool = others[role_of[others] == role]
                drawn = np.append(drawn, generator.choice(pool, min(number, len(pool)), replace=False))
            rest = np.setdiff1d(others, drawn)
            drawn = np.sort(np.append(drawn, generator.choice(rest, most - len(drawn), replace=False)))
            if tuple(drawn.tolist()) not in seen:
                seen.add(tuple(drawn.tolist()))
                yield drawn
