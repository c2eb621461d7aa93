"""What finished networks and kernels show beside their predictions: attention over modules, and LoRAs in the plane.

Shape letters: N LoRAs, R runs, T test LoRAs, P modules, K numbers of removed modules, O orders of removal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from analysis.attention import Attended
from analysis.chance import permuted
from analysis.draws import stream
from experiment.networks import NETWORKS
from experiment.phases import Experiment
from representations import MAPPED
from training import attention

TESTED = 1_000  # test LoRAs whose attention is read at most
RANDOM_ORDERS = 20
POINTS = 17  # of a deletion curve at most
PERMUTED = 19  # trainings on permuted labels, of which the largest of 20 has p = 0.05


def attended(experiment: Experiment, names: Sequence[str], with_permuted: bool) -> Attended | None:
    """Return what the networks that attend to modules, trained on all layers, have looked at; None without any.

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
    parameters, x = _trained(experiment, name), experiment.inputs.read(experiment.inputs.source(name, _all(experiment)))
    y = torch.from_numpy(experiment.collection.y).to(x.device)
    tested = _sample(experiment)
    rows = torch.from_numpy(experiment.rows["test"][tested]).to(x.device)
    shares, contribution, gradients = (part.cpu().numpy() for part in attention.read_out(parameters, x, rows, y))
    validation = torch.from_numpy(experiment.rows["validation"]).to(x.device)
    by_attention = np.argsort(-attention.read_out(parameters, x, validation, y)[0].mean((0, 1)).cpu().numpy(), kind="stable")
    orders = {"attention": by_attention, "ranking": by_ranking(experiment)} | {
        f"random {number}": stream(experiment.settings.seed, "deletion", number).permutation(len(by_attention))
        for number in range(1, RANDOM_ORDERS + 1)
    }
    counts = np.unique(np.linspace(0, len(by_attention) - 1, min(POINTS, len(by_attention))).round().astype(int))
    predicted = attention.deletion(parameters, x, rows, np.stack(list(orders.values())), counts)  # (R, O, K, T)
    correct = predicted == experiment.collection.y[experiment.rows["test"][tested]]
    modules = experiment.inputs.modules.shapes
    return Attended(
        modules=[module.name for module in modules],
        tested=tested,
        attention=shares,
        contribution=contribution,
        gradients=gradients,
        by_ranking=orders["ranking"],
        counts=counts,
        deletion={order: correct[:, place] for place, order in enumerate(orders)},
        permuted=_permuted(experiment, name, tested) if with_permuted else None,
    )


def _all(experiment: Experiment) -> np.ndarray:
    return experiment.inputs.weights.without([])


def _trained(experiment: Experiment, name: str) -> dict[str, torch.Tensor]:
    """Return the parameters of a representation's networks on all layers, trained where they are not yet."""
    scores = experiment.planner.carry_out(experiment.plan(name, [], "baseline"), experiment.progress)
    prefix = attention.PARAMETERS
    parameters = {key.removeprefix(prefix): array for key, array in scores.items() if key.startswith(prefix)}
    return {key: torch.from_numpy(array).to(experiment.settings.device) for key, array in parameters.items()}


def _sample(experiment: Experiment) -> np.ndarray:
    """Return positions of test LoRAs, all or evenly many of them, int64[T]."""
    count = len(experiment.rows["test"])
    if count <= TESTED:
        return np.arange(count)
    return np.sort(stream(experiment.settings.seed, "attention").permutation(count)[:TESTED])


def by_ranking(experiment: Experiment) -> np.ndarray:
    """Return the modules in the order in which the ranking comes to the first of their layers, int64[P]."""
    place = np.empty(len(experiment.ranking), int)
    place[experiment.ranking] = np.arange(len(place))
    return np.argsort(place[experiment.inputs.members].min(1), kind="stable")


def _permuted(experiment: Experiment, name: str, tested: np.ndarray) -> np.ndarray:
    """Return the mean attention of networks trained on permuted labels, one run each, float[19, P]."""
    found = []
    for again in experiment.on_permuted_labels(PERMUTED, "permuted attention"):
        again.inputs = again.planner.inputs = experiment.inputs  # tokens know no labels
        parameters, x = _trained(again, name), again.inputs.read(again.inputs.source(name, _all(experiment)))
        rows = torch.from_numpy(experiment.rows["test"][tested]).to(x.device)
        y = torch.from_numpy(again.collection.y).to(x.device)
        found.append(attention.read_out(parameters, x, rows, y)[0].mean((0, 1)).cpu().numpy())
    return np.stack(found)
