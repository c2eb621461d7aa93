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
from representations import MAPPED
from training import attention

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
    network = _Attending(experiment, name)
    tested = _sample(experiment)
    rows = experiment.rows["test"][tested]
    read = network.read_out(rows)
    before = network.read_out(experiment.rows["validation"])["attention"]
    orders = {
        ATTENTION: np.argsort(-before.mean((0, 1)), kind="stable"),
        LAYERS: by_validation(experiment),
        **{f"{RANDOM} {number}": network.random_order(number) for number in range(1, RANDOM_ORDERS + 1)},
    }
    modules = len(experiment.inputs.pairs)
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
        permuted=_permuted(experiment, name, rows) if with_permuted else None,
    )


class _Attending:
    """Trained networks of a representation that gives attention to modules, and what they read.

    Args:
        experiment: The experiment; where its networks are not trained yet, they are.
        name: The representation.
    """

    def __init__(self, experiment: Experiment, name: str):
        inputs, self.seed = experiment.inputs, experiment.settings.seed
        scores = experiment.planner.carry_out(experiment.plan(name, [], "baseline"), experiment.progress)
        self.parameters = attention.parameters_of(scores)
        self.x = inputs.read(inputs.source(name, inputs.weights.without([])))
        self.y = torch.from_numpy(experiment.collection.y).to(self.x.device)
        self.modules = len(inputs.pairs)

    def read_out(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return attention, contributions and gradients for the LoRAs of these rows, see `attention.read_out`."""
        return attention.read_out(self.parameters, self.x, torch.from_numpy(rows).to(self.x.device), self.y)

    def deletion(self, rows: np.ndarray, orders: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return what the networks predict with modules masked, see `attention.deletion`."""
        return attention.deletion(self.parameters, self.x, torch.from_numpy(rows).to(self.x.device), orders, counts)

    def random_order(self, number: int) -> np.ndarray:
        """Draw an order of the modules, int64[P]."""
        return stream(self.seed, "deletion", number).permutation(self.modules)


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


def _permuted(experiment: Experiment, name: str, rows: np.ndarray) -> np.ndarray:
    """Return the mean attention of networks trained on permuted labels, one run each, float[19, P]."""
    found = []
    for again in on_permuted_labels(experiment, PERMUTED, "permuted attention"):
        again.inputs = again.planner.inputs = experiment.inputs  # tokens know no labels
        found.append(_Attending(again, name).read_out(rows)["attention"].mean((0, 1)))
    return np.stack(found)


def mapped(experiment: Experiment, names: Sequence[str]) -> list[Mapped]:
    """Return the kernels by which LoRAs are drawn in the plane: of all layers, and of the best modules, each alone.

    They know no labels but those by which the layers were ranked.

    Args:
        experiment: All phases done.
        names: The representations that were run.
    """
    if MAPPED not in names:
        return []
    kernels, modules = experiment.inputs.modules.unlabelled, len(experiment.inputs.pairs)
    (whole,) = kernels.sums(np.ones((1, modules), bool))
    found = [Mapped("all", "", whole, kernels.columns)]
    for module in by_ranking(experiment)[:PANELS].tolist():
        layer = experiment.layers[experiment.inputs.members[module, 0]]
        found.append(Mapped(layer.module, layer.block, kernels.module(module), kernels.columns))
    return found
