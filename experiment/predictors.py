"""Predictions of classifiers that were kept, for LoRAs that they may never have seen.

A classifier is a record (``kind`` and numbers) and tensors by name, whether these come from the files of `model_files`
or straight from an experiment; LoRAs are `Rows`, read from new files or from an experiment. So what is written is tried
on the experiment's own rows before, and by the same functions.

Shape letters: n LoRAs, R runs, C classes, P modules, F features, K of them that are not constant, m columns (LoRAs that
others are compared with), r rank, W views, D decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.calibration import mean_probabilities
from training import attention
from training.classifier import predict_logits
from training.kernels import KERNELS, LARGEST, Updates, cosines
from training.stacks import scaled

PARAMETERS = "parameters."  # before the names of parameters among tensors
TOP_EXPONENT = 14  # of the largest number of a factor in float16, which ends at 2^16
UNLABELLED = "update_views"  # the kernel whose components tokens are
SMALLEST = 1e-12  # product of norms that a cosine is divided by
CANDIDATES = 8  # nearest rows by products, whose distances are then taken exactly

Get = Callable[[str], Tensor]  # from the name of a tensor to it
# From the position of a module and rows int64[n] (None: all) to down float[n, r, in], up float[n, out, r], scale [n].
ReadModule = Callable[[int, "np.ndarray | None"], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Rows:
    """LoRAs to predict.

    Attributes:
        norms: Of the update of each module, float[n, P].
        features: Of a representation that is computed, float32[n, F]; None for the others.
        read: Reads the factors of a module; None where nothing needs them.
        at_once: LoRAs whose factors of a module are read at a time; None: all, for which ``read`` is then asked.
    """

    norms: np.ndarray
    features: np.ndarray | None = None
    read: ReadModule | None = None
    at_once: int | None = None

    def parts(self) -> list[np.ndarray | None]:
        """Return the rows int64[n] whose factors of a module are read at a time; None stands for all."""
        if self.at_once is None or len(self.norms) <= self.at_once:
            return [None]
        return np.split(np.arange(len(self.norms)), range(self.at_once, len(self.norms), self.at_once))


class Predicted(NamedTuple):
    """Scores float64[R, n, C], classes int64[R, n] of each run, distances to the nearest train LoRA float64[n, 1 or 2].

    ``contribution`` float32[n, P] is what each module adds to the score of the label, less what it adds to the mean of
    all classes, on average over the runs; None where modules do not add up.
    """

    scores: np.ndarray
    classes: np.ndarray
    distance: np.ndarray
    contribution: np.ndarray | None = None


def predict(record: dict, get: Get, rows: Rows) -> Predicted:
    """Predict LoRAs by a classifier that was kept."""
    return {"layers": _by_layers, "pairs": _by_kernel, "rest": _by_kernel, "attention": _by_attention}[record["kind"]](
        record, get, rows
    )


def joined(parts: list[Predicted]) -> Predicted:
    """Return predictions of LoRAs one after another."""
    scores, classes, distance, contribution = zip(*parts, strict=True)
    whole = None if contribution[0] is None else np.concatenate(contribution)
    return Predicted(np.concatenate(scores, axis=1), np.concatenate(classes, axis=1), np.concatenate(distance), whole)


# ----------------------------------------------------------------------------------------------------------------------
# Multilayer perceptrons
# ----------------------------------------------------------------------------------------------------------------------


def _by_layers(record: dict, get: Get, rows: Rows) -> Predicted:
    columns = get("columns").bool()
    x = scaled(torch.from_numpy(rows.features)[:, columns], get("mean"), get("scale"))  # (n, K)
    names = [f"{kind}{layer}" for layer in range(record["layers"]) for kind in ("weight", "bias")]
    parameters = {name: get(PARAMETERS + name) for name in names}
    runs = len(parameters["weight0"])
    scores = predict_logits(parameters, x[None], torch.zeros(runs, dtype=torch.int64), torch.arange(len(x)))
    return Predicted(scores.double().numpy(), scores.argmax(2).numpy(), nearest(x, get("train")))


def nearest(x: Tensor, others: Tensor) -> np.ndarray:
    """Return the distance of each row to the nearest of others, and 1 less the largest cosine with one of them.

    Among many features noise is no farther than a LoRA, but has no direction of theirs; among few it is. The nearest
    are found by products, and their distances taken by differences: products would leave rounding of a row's own
    distance to itself.

    Shapes: x float[n, K] and others float[m, K] -> float64[n, 2].
    """
    others = others.to(x.dtype)
    norms, found = others.norm(dim=1), []
    for part in x.split(256):
        product = part @ others.mT  # (n, m)
        near = (norms.square() - 2 * product).topk(min(CANDIDATES, len(others)), dim=1, largest=False).indices
        distance = torch.stack([(part - others[column]).norm(dim=1) for column in near.T]).amin(0)
        cosine = (product / (part.norm(dim=1, keepdim=True) * norms).clamp(min=SMALLEST)).amax(1)
        found.append(torch.stack([distance, 1 - cosine], dim=1))
    return torch.cat(found).double().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Factors, and kernels of new LoRAs with those that were kept
# ----------------------------------------------------------------------------------------------------------------------


def packed_factors(down: Tensor, up: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors in a dtype, and the scale float64[n] that goes with them.

    In float16 each factor is multiplied by a power of 2 that brings its largest number below 2^15: factors that were
    float16 before lose nothing, and others nothing to a range that starts at 6e-8.

    Shapes: down float32[n, r, in], up float32[n, out, r], scale float[n].
    """
    scale = scale.double()
    if dtype != torch.float16:
        return down, up, scale
    packed = []
    for factor in (down, up):
        largest = factor.abs().amax((1, 2)).double()
        exponent = torch.where(largest > 0, TOP_EXPONENT + 1 - torch.frexp(largest).exponent, 0).double()
        packed.append(torch.ldexp(factor.double(), exponent[:, None, None]).to(dtype))
        scale = torch.ldexp(scale, -exponent)
    return packed[0], packed[1], scale


class Similar(NamedTuple):
    """Kernel float64[n, m] of LoRAs with the columns, and of each with itself, float64[n]."""

    kernel: np.ndarray
    own: np.ndarray


def similarities(name: str, get: Get, rows: Rows) -> Similar:
    """Return the sum of the kernels of modules, see `training.kernels`, of LoRAs with the columns that were kept."""
    weights, sizes = get("weights").numpy(), get("sizes").numpy()
    count, columns = len(rows.norms), len(get("own"))
    kernel, own = np.zeros((count, columns)), np.zeros(count)
    for module in np.flatnonzero(weights.any(1) & (sizes > 0)).tolist():
        product, norm = _module_kernel(name, get, rows, module, weights[module], float(sizes[module]))
        kernel += product
        own += weights[module].sum() * np.square(norm)
    return Similar(kernel, own)


def _module_kernel(
    name: str, get: Get, rows: Rows, module: int, weights: np.ndarray, size: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel of a module float64[n, m], and the norms float64[n] of the LoRAs' updates as it counts them."""
    kind = KERNELS[name]
    several = kind.views > 1
    down, up, scale = (get(f"{part}.{module}") for part in ("down", "up", "size"))
    columns = Updates.from_factors(down.float(), up.float(), scale, orthogonal=several)
    products, found = [], []
    for part in rows.parts():
        updates = Updates.from_factors(*(factor.cpu() for factor in rows.read(module, part)), orthogonal=several)
        products.append(np.tensordot(weights, cosines(updates, columns, views=kind.views).numpy(), 1))
        found.append(updates.norm.numpy())
    norms = [np.concatenate(found), columns.norm.numpy()]
    norms = [np.minimum(norm / size, LARGEST) if kind.sized else (norm > 0) / size for norm in norms]
    return np.concatenate(products) * norms[0][:, None] * norms[1], norms[0]


def _by_kernel(record: dict, get: Get, rows: Rows) -> Predicted:
    kernel, own = similarities(record["representation"], get, rows)
    coefficients, intercept = get("coefficients").numpy(), get("intercept").numpy()
    if record["kind"] == "pairs":
        scores, classes = by_pairs(kernel, coefficients, get("counts").numpy(), intercept)
    else:
        decisions = kernel @ coefficients.T + intercept  # (n, D)
        scores = decisions if decisions.shape[1] > 1 else np.concatenate([-decisions, decisions], axis=1)
        classes = scores.argmax(1)
    square = own[:, None] + get("own").numpy() - 2 * kernel
    return Predicted(scores[None], classes[None], np.sqrt(np.maximum(square.min(1, keepdims=True), 0)))


def by_pairs(
    kernel: np.ndarray, coefficients: np.ndarray, counts: np.ndarray, intercept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores and the classes of a support vector machine for each pair of classes, as libsvm votes.

    The score of a class is the mean of its decisions against each other class. The class is that with the most
    decisions won, the first of equals.

    Args:
        kernel: With the support vectors, in the order of their classes, float64[n, m].
        coefficients: Of each support vector against each other class, float64[C - 1, m].
        counts: Support vectors of each class, int[C].
        intercept: Of the pairs (0, 1), (0, 2), ..., (1, 2), ..., float64[C(C - 1)/2].
    """
    margins, votes = np.zeros((len(kernel), len(counts))), np.zeros((len(kernel), len(counts)), int)
    for (i, j, decision), constant in zip(decisions_of_pairs(kernel, coefficients, counts), intercept, strict=True):
        decision = decision + constant
        margins[:, i] += decision
        margins[:, j] -= decision
        votes[:, i] += decision > 0
        votes[:, j] += decision <= 0
    return margins / (len(counts) - 1), votes.argmax(1)


def decisions_of_pairs(
    kernel: np.ndarray, coefficients: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield each pair of classes, and its decisions without the intercept, float64[n]; see `by_pairs`."""
    ends = np.cumsum(counts)
    of_class = [slice(end - count, end) for end, count in zip(ends.tolist(), counts.tolist(), strict=True)]
    for i in range(len(counts)):
        mine = kernel[:, of_class[i]] @ coefficients[:, of_class[i]].T  # (n, C - 1)
        for j in range(i + 1, len(counts)):
            yield i, j, mine[:, j - 1] + kernel[:, of_class[j]] @ coefficients[i, of_class[j]]


# ----------------------------------------------------------------------------------------------------------------------
# Attention over modules
# ----------------------------------------------------------------------------------------------------------------------


def _by_attention(record: dict, get: Get, rows: Rows) -> Predicted:
    x = tokens(get, rows)
    names = attention.parameter_shapes(1, 1)
    parameters = {name: get(PARAMETERS + name) for name in names}
    runs, index = len(parameters["class_bias"]), torch.arange(len(rows.norms))
    scores = attention.predict_logits(parameters, x[None], torch.zeros(runs, dtype=torch.int64), index)
    classes = scores.argmax(2).numpy()
    # Before the temperature is fitted nobody asks for contributions.
    label = torch.from_numpy(mean_probabilities(scores.double().numpy(), record.get("temperature", 1.0)).argmax(1))
    read = attention.read_out({name: value.numpy() for name, value in parameters.items()}, x[None], index, label)
    distance = nearest(x, get("train"))
    return Predicted(scores.double().numpy(), classes, distance, read["contribution"].mean(0))


def tokens(get: Get, rows: Rows) -> Tensor:
    """Return the tokens of LoRAs side by side, float32[n, P · 33]; see `training.attention.module_tokens`."""
    weights, sizes = get("weights").numpy(), get("sizes").numpy()
    found = np.zeros((*rows.norms.shape, attention.TOKEN))
    for module in np.flatnonzero(sizes > 0).tolist():
        kernel, _ = _module_kernel(UNLABELLED, get, rows, module, weights[module], float(sizes[module]))
        norm = rows.norms[:, module].astype(np.float64)
        token = found[:, module]  # a view
        token[:, : attention.COORDINATES] = kernel @ get(f"map.{module}").numpy() + get(f"shift.{module}").numpy()
        token[:, attention.COORDINATES] = np.log(np.where(norm > 0, norm, 1))
        token[:] = scaled(torch.from_numpy(token), get(f"mean.{module}"), get(f"scale.{module}")).numpy()
        token[norm == 0] = 0
    return torch.from_numpy(found.astype(np.float32)).flatten(1)
