"""Attention over modules: which ones a trained classifier gives it to, and how far that matters for predictions.

Attention is no explanation by itself: other weights may give the same predictions (Jain & Wallace, "Attention is not
explanation", NAACL 2019), and how far it matters is to be tested (Wiegreffe & Pinter, "Attention is not not
explanation", EMNLP 2019). So beside it stand what each module adds to a LoRA's own class, accuracies with modules
masked in its order, and the attention of trainings on permuted labels.

Shape letters as in evidence.py; here T are the test LoRAs that attention was read of, and K numbers of masked modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import expit, logit, xlogy

from analysis.draws import ALPHA, ROUNDING, Draws, exceedance, means
from analysis.evidence import Evidence
from analysis.layers import LEAST_RANKED, kendall_w
from analysis.removal import area_weights

LEAST_TRAININGS = 19  # on permuted labels, and random orders, below which none as extreme is no evidence: p = 1 / 20
TAU_DRAWS = 200  # for the error of a rank correlation, which each draw takes long to compute
DIGITS = 6  # of the many numbers by class and module
ATTENTION, LAYERS, RANDOM = "attention", "layers", "random"  # orders of masking; random ones are numbered


@dataclass(frozen=True)
class Attended:
    """Attention of the R trained models over P modules, and their predictions with modules masked.

    Attributes:
        modules: Canonical ids, in the network's order.
        blocks: Block of each module, empty where unknown.
        projections: Projection of each module, empty where unknown.
        tested: Positions among the test LoRAs of those that attention was read of, int[T].
        attention: Of each model for each LoRA, float[R, T, P]; sums to 1 over modules.
        contribution: What a module adds to the logit of the LoRA's own class, less what it adds to all classes on
            average, float[R, T, P].
        gradients: Share of each module in gradient times input, float[R, P]; sums to 1, or all are 0.
        ranks_of_ranking: The modules by the ranking of the layers, each at the better of its layers, the best first,
            int[P].
        deletion: By order of masking (``attention``, ``layers``, ``random 1``, ...), the LoRAs that are recognised,
            bool[R, K, T].
        counts: Modules that are masked, ascending, int[K].
        permuted: Mean attention over LoRAs of trainings on permuted labels, one run each, float[trainings, P]; None
            without any.
    """

    modules: Sequence[str]
    blocks: Sequence[str]
    projections: Sequence[str]
    tested: np.ndarray
    attention: np.ndarray
    contribution: np.ndarray
    gradients: np.ndarray
    ranks_of_ranking: np.ndarray
    deletion: dict[str, np.ndarray]
    counts: np.ndarray
    permuted: np.ndarray | None


@dataclass(frozen=True)
class Shares:
    """Attention and contribution of U units, modules or sums of several, and the groups of the LoRAs.

    Attributes:
        attention: float64[U, R, T].
        contribution: float64[U, R, T].
        groups: int[T].
    """

    attention: np.ndarray
    contribution: np.ndarray
    groups: np.ndarray

    def record(self) -> dict[str, np.ndarray]:
        """Return means and intervals by unit: float[U] and float[U, 2], NaN where a single group shows none."""
        mean, bounds = means(self.attention, self.groups)
        added, added_bounds = means(self.contribution, self.groups)
        return {
            "attention": mean,
            "interval": _of_share(mean, bounds),
            "contribution": added,
            "contribution_interval": added_bounds,
        }

    def summed(self, units: np.ndarray) -> Shares:
        """Return the sums over units, bool[V, U]."""
        summed = [np.einsum("vu,urt->vrt", units, array) for array in (self.attention, self.contribution)]
        return Shares(*summed, self.groups)

    def of(self, loras: np.ndarray) -> Shares:
        """Return those of some LoRAs, bool[T]."""
        return Shares(self.attention[..., loras], self.contribution[..., loras], self.groups[loras])


def _of_share(mean: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return intervals of shares float[U], given those that are symmetric, float[U, 2]: symmetric on the logit's scale.

    Attention is skewed, as a few LoRAs or runs give it to a module and most do not: a symmetric interval would reach
    below 0 and not far enough above.
    """
    inside = (mean > ROUNDING) & (mean < 1 - ROUNDING)
    middle = np.where(inside, mean, 0.5)
    half = (bounds[:, 1] - mean) / (middle * (1 - middle))
    on_scale = expit(logit(middle)[:, None] + np.array([-1, 1]) * half[:, None])
    return np.where(inside[:, None], on_scale, np.clip(bounds, 0, 1))


def attention(evidence: Evidence, attended: Attended) -> dict:
    """Return which modules get attention, what each of them adds, and what masking in that order costs.

    Args:
        evidence: The evidence.
        attended: Of the models.
    """
    by_module = (np.moveaxis(array.astype(float), -1, 0) for array in (attended.attention, attended.contribution))
    shares = Shares(*by_module, evidence.test_groups[attended.tested])
    order = np.empty(len(attended.modules))
    order[attended.ranks_of_ranking] = -np.arange(len(order))
    draws = Draws(shares.groups, evidence.resamples, evidence.seed)
    permuted = above_permuted(attended)
    return {
        "runs": shares.attention.shape[1],
        "loras": len(attended.tested),
        "modules": list(_modules(shares, attended, permuted)),
        "blocks": list(_sums("block", attended.blocks, shares)),
        "projections": list(_sums("projection", attended.projections, shares)),
        "classes": list(_classes(evidence, attended, shares)),
        "effective_number": effective_number(shares),
        "stability": {"kendall_w": kendall_w(attended.attention.mean(1, dtype=float).T)},
        "agreement": {
            "ranking": _agreement(evidence, shares, order),
            "gradients": _agreement(evidence, shares, attended.gradients.mean(0)),
        },
        "deletion": deletion_curves(draws, attended),
        "permuted": {name: value for name, value in permuted.items() if name != "p"} if permuted else None,
    }


def _modules(shares: Shares, attended: Attended, permuted: dict | None) -> Iterator[dict]:
    """Yield the record of each module, in the network's order, given what `above_permuted` returns."""
    p = [None] * len(attended.modules) if permuted is None else permuted["p"]
    decided = permuted is not None and permuted["decided"]
    columns = _plain(shares.record())
    gradients = attended.gradients.mean(0)
    for i, module in enumerate(attended.modules):
        yield {
            "module": module,
            "block": attended.blocks[i] or None,
            "projection": attended.projections[i] or None,
            **{name: column[i] for name, column in columns.items()},
            "gradient": gradients[i],
            "p_permuted": p[i],
            "above_permuted": p[i] <= ALPHA + ROUNDING if decided else None,
        }


def _plain(columns: dict[str, np.ndarray]) -> dict[str, list]:
    """Return columns as lists, an interval that is not known as None."""
    return {
        name: [None if np.isnan(value).any() else value for value in column] if column.ndim > 1 else list(column)
        for name, column in columns.items()
    }


def _sums(noun: str, names: Sequence[str], shares: Shares) -> Iterator[dict]:
    """Yield the sums over the modules of each block or projection, in the network's order, but for unknown ones."""
    kinds = [name for name in dict.fromkeys(names) if name]
    if not kinds:
        return
    members = np.array([[name == kind for name in names] for kind in kinds])
    columns = _plain(shares.summed(members).record())
    for i, kind in enumerate(kinds):
        yield {noun: kind, "modules": int(members[i].sum()), **{name: column[i] for name, column in columns.items()}}


def _classes(evidence: Evidence, attended: Attended, shares: Shares) -> Iterator[dict]:
    """Yield attention and contribution by module for the LoRAs of each class; None of a class without any."""
    truth = evidence.truth[attended.tested]
    for label, name in enumerate(evidence.classes):
        loras = truth == label
        record: dict = {"class": name, "loras": int(loras.sum())}
        fields = ("attention", "low", "high", "contribution", "contribution_low", "contribution_high")
        if not loras.any():
            yield record | dict.fromkeys(fields)
            continue
        columns = shares.of(loras).record()
        bounds, added_bounds = columns["interval"], columns["contribution_interval"]
        lists = (columns["attention"], *bounds.T, columns["contribution"], *added_bounds.T)
        for field, values in zip(fields, lists, strict=True):
            record[field] = None if np.isnan(values).any() else values.round(DIGITS)
        yield record


def effective_number(shares: Shares) -> dict:
    """Return the exponentiated entropy of a run's attention, its mean and range over runs.

    The number of equally attended modules that would be as spread. Of the attention averaged over LoRAs: 1 for one
    module, P for all alike. Each run has one of its own, as the mean attention of runs that choose other modules would
    be spread over the modules of all.
    """
    of_run = shares.attention.mean(2)  # (U, R)
    numbers = np.exp(-xlogy(of_run, of_run).sum(0))
    return {"number": numbers.mean(), "min": numbers.min(), "max": numbers.max()}


def _agreement(evidence: Evidence, shares: Shares, scores: np.ndarray) -> dict:
    """Return Kendall's tau-b of the mean attention and other scores float[P] of the modules, and its interval.

    Student's t interval with the error over draws of LoRAs and runs. It is of these modules, whose scores are fixed.
    """
    missing = {"kendall_tau": None, "interval": None}
    mean, scores = shares.attention.mean((1, 2)).round(12), np.round(scores, 12)
    if len(scores) < LEAST_RANKED or np.ptp(scores) == 0 or np.ptp(mean) == 0:
        return missing
    draws = Draws(shares.groups, min(TAU_DRAWS, evidence.resamples), evidence.seed)
    drawn = draws.accuracies(list(shares.attention)).round(12)  # (P, B)
    taus = np.array([stats.kendalltau(column, scores, method="asymptotic").statistic for column in drawn.T])
    tau = stats.kendalltau(mean, scores).statistic
    if draws.units == 1 or not np.isfinite(taus).all():
        return missing | {"kendall_tau": tau}
    half = draws.quantile(1 - ALPHA / 2) * taus.std() * np.sqrt(draws.inflation)
    return {"kendall_tau": tau, "interval": np.clip([tau - half, tau + half], -1, 1)}


def deletion_curves(draws: Draws, attended: Attended) -> dict:
    """Compare accuracies of trained models with modules masked: by attention, by layers, at random.

    By layers is by the better of a module's two layers' accuracy alone.

    The area under a curve is its mean height; a smaller one says that removal hurts more. ``hurts_more`` than random
    needs both: the mean of the random orders differs by an interval over LoRAs and runs, and of these orders, at least
    19, at most a twentieth costs as much. Two or three modules have fewer orders, which decide nothing.
    """
    curves = {name: runs for name, runs in attended.deletion.items() if not name.startswith(RANDOM)}
    random = [runs for name, runs in attended.deletion.items() if name.startswith(RANDOM)]
    weights = _height_weights(attended.counts)
    areas = {name: np.einsum("k,rkt->rt", weights, runs.astype(float)) for name, runs in curves.items()}
    of_random = [np.einsum("k,rkt->rt", weights, runs.astype(float)) for runs in random]
    own = areas[ATTENTION]
    others = {RANDOM: np.mean(of_random, axis=0)} if random else {}
    others |= {LAYERS: areas[LAYERS]} if LAYERS in areas else {}
    compared = dict(zip(others, draws.differences([(other, own) for other in others.values()]), strict=True))
    for section in compared.values():
        section["hurts_more"] = bool(section["significant"] and section["difference"] > 0)
    if RANDOM in compared:
        as_costly = sum(area.mean() <= own.mean() + ROUNDING for area in of_random)
        _decide_by_orders(compared[RANDOM], len(random), as_costly, len(attended.modules))
    return {
        "masked": attended.counts,
        "curves": {name: _curve(draws, runs) | {"area": areas[name].mean()} for name, runs in curves.items()},
        "random": _random_curve(random, of_random) if random else None,
        "against_random": compared.get(RANDOM),
        "against_layers": compared.get(LAYERS),
    }


def _decide_by_orders(section: dict, orders: int, as_costly: int, modules: int):
    """Add to a comparison how many random orders of the modules cost as much, and let these decide as well."""
    enough = min(orders, math.factorial(modules)) >= LEAST_TRAININGS
    p = (1 + as_costly) / (1 + orders) if enough else None
    more = section["hurts_more"] and p <= ALPHA + ROUNDING if enough else None
    section |= {"orders": orders, "as_costly": as_costly, "p_orders": p, "hurts_more": more}


def _height_weights(counts: np.ndarray) -> np.ndarray:
    """Return the weights of points at ascending counts in the mean height of the line through them, float[K]."""
    if len(counts) == 1:
        return np.ones(1)
    return area_weights((counts - counts[0]) / (counts[-1] - counts[0]))


def _curve(draws: Draws, correct: np.ndarray) -> dict:
    """Return accuracies float[K] of bool[R, K, T], with their intervals."""
    points = list(correct.swapaxes(0, 1))
    accuracy = correct.mean((0, 2))
    bounds = draws.intervals(accuracy, draws.accuracies(points))
    return {"accuracy": accuracy, "low": bounds[:, 0], "high": bounds[:, 1]}


def _random_curve(random: Sequence[np.ndarray], areas: Sequence[np.ndarray]) -> dict:
    """Return the mean, lowest and highest accuracy of the random orders at each number of masked modules."""
    accuracy = np.stack([runs.mean((0, 2)) for runs in random])  # (orders, K)
    area = np.mean([order.mean() for order in areas])
    band = {"accuracy": accuracy.mean(0), "low": accuracy.min(0), "high": accuracy.max(0)}
    return {"orders": len(random), **band, "area": area}


def above_permuted(attended: Attended) -> dict | None:
    """Compare attention with the largest of each training on permuted labels, by its least run; None without any.

    Family-wise: each module is compared with the largest over all modules, so p at most 0.05 of any module is as rare
    as that of the largest one. A module is above where it is in every run: runs differ in the modules that they choose.
    Of fewer than 19 trainings nothing is decided.
    """
    if attended.permuted is None or len(attended.permuted) == 0:
        return None
    largest, least = attended.permuted.max(1), attended.attention.mean(1).min(0)
    p = exceedance(least, largest[:, None])
    decided = len(largest) >= LEAST_TRAININGS
    above = p <= ALPHA + ROUNDING
    return {
        "trainings": len(largest),
        "largest": largest,
        "least": least,
        "p": p,
        "decided": decided,
        "above": [module for module, is_above in zip(attended.modules, above, strict=True) if is_above and decided],
    }
