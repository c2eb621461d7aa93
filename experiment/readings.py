"""Readings of finished networks and kernels beside their predictions: attention over modules, LoRAs in the plane.

Shape letters: N LoRAs, R runs, T test LoRAs, P modules, K numbers of removed modules, O orders of removal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from analysis.attention import ATTENTION, LAYERS, RANDOM, Attended
from analysis.collection_map import Mapped
from analysis.draws import stream
from analysis.layers import order_of
from experiment.networks import NETWORKS
from experiment.phases import Experiment, on_permuted_labels
from experiment.plans import Plan, TrainingError
from representations import MAPPED
from training import attention
from training.exact import exact_dtype

TESTED = 1_000  # test LoRAs whose attention is read at most
RANDOM_ORDERS = 20
POINTS = 17  # of a deletion curve at most
PANELS = 3  # modules that the LoRAs are drawn by, each alone
PERMUTED = 19  # trainings on permuted labels, of which the largest of 20 has p = 0.05


def attended(experiment: Experiment, names: Sequence[str], with_permuted: bool) -> Attended | None:
    """Return the attention to modules of the networks trained on all layers; None where none was trained.

    Args:
        experiment: All phases done.
        names: The representations that were run.
        with_permuted: Whether networks are also trained on permuted labels.

    Raises:
        TrainingError: A training diverged, or memory ran out.
    """
    name = next((name for name in names if name in NETWORKS and NETWORKS[name].reads == "tokens"), None)
    if name is None:
        return None
    plan = experiment.plan(name, [], "baseline")
    experiment.planner.carry_out(plan, experiment.progress)  # they are trained already, but where units were lost
    permuted = _trained_on_permuted_labels(experiment, name) if with_permuted else None
    return experiment.engine.call(lambda: _attended(experiment, name, plan, permuted))


def _attended(
    experiment: Experiment, name: str, plan: Plan, permuted: list[tuple[Experiment, Plan]] | None
) -> Attended:
    """Return what `attended` does, given what has been trained."""
    network = _Attending(experiment, name, experiment.planner.load_scores(plan))
    tested = _sample(experiment)
    rows = experiment.rows["test"][tested]
    read = network.read_out(rows)
    before = network.read_out(experiment.rows["validation"])["attention"]
    modules = len(experiment.inputs.pairs)
    orders = {
        ATTENTION: np.argsort(-before.mean((0, 1)), kind="stable"),
        LAYERS: by_validation(experiment),
    }
    for number in range(1, RANDOM_ORDERS + 1):
        orders[f"{RANDOM} {number}"] = stream(experiment.settings.seed, "deletion", number).permutation(modules)
    counts = np.unique(np.linspace(0, modules - 1, min(POINTS, modules)).round().astype(int))
    predicted = network.deletion(rows, np.stack(list(orders.values())), counts)  # (R, O, K, T)
    correct = predicted == experiment.collection.y[rows]
    layers = [experiment.layers[first] for first, _ in experiment.inputs.members]
    return Attended(
        modules=[layer.module for layer in layers],
        blocks=[layer.block for layer in layers],
        projections=[layer.projection for layer in layers],
        tested=tested,
        attention=read["attention"],
        contribution=read["contribution"],
        gradients=shares(read["gradients"]),
        ranks_of_ranking=by_ranking(experiment),
        deletion={order: correct[:, place] for place, order in enumerate(orders)},
        counts=counts,
        permuted=None if permuted is None else _mean_attention(permuted, name, rows),
    )


def _trained_on_permuted_labels(experiment: Experiment, name: str) -> list[tuple[Experiment, Plan]]:
    """Train networks on permuted labels, one run each and all at once; return where they are.

    Raises:
        TrainingError: A training diverged, or memory ran out.
    """
    trained = []
    for again in on_permuted_labels(experiment, PERMUTED, "permuted attention"):
        again.inputs = again.planner.inputs = experiment.inputs  # tokens know no labels
        trained.append((again, again.plan(name, [], "baseline")))
    units = [unit for _, plan in trained for unit in plan.todo]
    for done, reason in enumerate(experiment.engine.do(units), 1):
        experiment.progress("attention on permuted labels", done, len(units))
        if reason:
            raise TrainingError(reason)
    return trained


def _mean_attention(trained: list[tuple[Experiment, Plan]], name: str, rows: np.ndarray) -> np.ndarray:
    """Return the mean attention to each module of networks over these rows, float[networks, P]."""
    networks = [_Attending(again, name, again.planner.load_scores(plan)) for again, plan in trained]
    return np.stack([network.read_out(rows)["attention"].mean((0, 1)) for network in networks])


class _Attending:
    """Trained networks of a representation that gives attention to modules, and what they read.

    Args:
        experiment: The experiment that they are of.
        name: The representation.
        arrays: Of the finished units.
    """

    def __init__(self, experiment: Experiment, name: str, arrays: dict[str, np.ndarray]):
        inputs = experiment.inputs
        self.parameters = attention.parameters_of(arrays)
        x = inputs.read(inputs.source(name, inputs.weights.without([])))
        self.x = x.to(dtype=exact_dtype(x.device))  # contributions sum to scores, on a GPU too
        self.y = torch.from_numpy(experiment.collection.y).to(self.x.device)

    def read_out(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return attention, contributions and gradients for the LoRAs of these rows, see `attention.read_out`."""
        return attention.read_out(self.parameters, self.x, torch.from_numpy(rows).to(self.x.device), self.y)

    def deletion(self, rows: np.ndarray, orders: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return what the networks predict with modules masked, see `attention.deletion`."""
        return attention.deletion(self.parameters, self.x, torch.from_numpy(rows).to(self.x.device), orders, counts)


def _sample(experiment: Experiment) -> np.ndarray:
    """Return positions of test LoRAs, all or evenly many of them, int64[T]."""
    count = len(experiment.rows["test"])
    if count <= TESTED:
        return np.arange(count)
    return np.sort(stream(experiment.settings.seed, "attention").permutation(count)[:TESTED])


def by_ranking(experiment: Experiment) -> np.ndarray:
    """Return the modules in the order in which the ranking comes to the first of their layers, int64[P]."""
    return _by_first_layer(experiment, experiment.ranking)


def by_validation(experiment: Experiment) -> np.ndarray:
    """Return the modules by the validation accuracy of the better of their layers alone, the best first, int64[P]."""
    layers, validation = experiment.predictions.layers, experiment.rows["validation"]
    right = layers["predicted"][..., : len(validation)] == experiment.collection.y[validation]
    loss = layers["log_loss"][..., : len(validation)].mean((1, 2))
    return _by_first_layer(experiment, order_of(right.mean((1, 2)), -loss))


def _by_first_layer(experiment: Experiment, order: np.ndarray) -> np.ndarray:
    """Return the modules in the order in which an order of the layers, int[L], comes to the first of theirs."""
    place = np.empty(len(order), int)
    place[order] = np.arange(len(place))
    return np.argsort(place[experiment.inputs.members].min(1), kind="stable")


def shares(values: np.ndarray) -> np.ndarray:
    """Return values float[R, P] as shares of their sum in each run; 0 where all are 0."""
    total = values.sum(1, keepdims=True, dtype=float)
    return np.divide(values, total, out=np.zeros(values.shape), where=total > 0)


def mapped(experiment: Experiment, names: Sequence[str], order: Sequence[str] | None) -> list[Mapped]:
    """Return the kernels by which LoRAs are drawn in the plane: of all layers, and of the best modules, each alone.

    They know no labels but those by which the modules were put in order.

    Args:
        experiment: All phases done.
        names: The representations that were run.
        order: The modules by their kernels alone, on validation LoRAs; None: as the ranking comes to their layers.
    """
    if MAPPED not in names:
        return []
    return experiment.engine.call(lambda: _mapped(experiment, order))


def _mapped(experiment: Experiment, order: Sequence[str] | None) -> list[Mapped]:
    kernels, modules = experiment.inputs.modules.unlabelled, len(experiment.inputs.pairs)
    (whole,) = kernels.sums(np.ones((1, modules), bool))
    panels = [Mapped("all", "", whole, kernels.columns)]
    place = {module.name: position for position, module in enumerate(experiment.inputs.modules.shapes)}
    best = by_ranking(experiment).tolist() if order is None else [place[name] for name in order]
    for module in best[:PANELS]:
        layer = experiment.layers[experiment.inputs.members[module, 0]]
        panels.append(Mapped(layer.module, layer.block, kernels.module(module), kernels.columns))
    return panels
