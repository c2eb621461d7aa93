"""Attention over modules: where a trained classifier looks, and what that is worth to its predictions.

Attention is no explanation by itself: other weights may give the same predictions (Jain & Wallace, "Attention is not
explanation", NAACL 2019), and what it is worth is to be tested (Wiegreffe & Pinter, "Attention is not not
explanation", EMNLP 2019). So beside it stand what each module adds to a LoRA's own class, accuracies with modules
masked in its order, and the attention of trainings on permuted labels.

Shape letters as in evidence.py; here T are the test LoRAs that were looked at, and K numbers of masked modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import expit, logit, xlogy

from analysis.draws import ALPHA, ROUNDING, Draws, exceedance, means
from analysis.evidence import Evidence
from analysis.layers import LEAST_RANKED
from analysis.removal import area_weights

LEAST_TRAININGS = 19  # on permuted labels, and random orders, below which none as extreme is no evidence: p = 1 / 20
TAU_DRAWS = 200  # for the error of a rank correlation, which each draw takes long to compute
DIGITS = 6  # of the many numbers by class and module
ATTENTION, RANKING, RANDOM = "attention", "ranking", "random"  # orders of masking; random ones are numbered


@dataclass(frozen=True)
class Attended:
    """Attention of the R trained models over P modules, and their predictions with modules masked.

    Attributes:
        modules: Canonical ids, in the network's order.
        blocks: Block of each module, empty where unknown.
        projections: Projection of each module, empty where unknown.
        tested: Positions among the test LoRAs of those that were looked at, int[T].
        attention: Of each model for each LoRA, float[R, T, P]; sums to 1 over modules.
        contribution: What a module adds to the logit of the LoRA's own class, less what it adds to all classes on
            average, float[R, T, P].
        gradients: Share of each module in gradient times input, float[R, P].
        ranks_of_ranking: The modules by the ranking of the layers, each at the better of its layers, the best first,
            int[P].
        deletion: By order of masking (``attention``, ``ranking``, ``random 1``, ...), the LoRAs that are recognised,
            bool[R, K, T].
        counts: Modules that are masked, ascending, int[K].
        permuted: Mean attention over LoRAs of trainings on permuted labels, one run each, float[trainings, P]; None
            without any.
        observed_once: The same of the first run on the true labels, float[P].
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
    observed_once: np.ndarray


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

    Attention is skewed, as a few LoRAs or runs look at a module and most do not: a symmetric interval would reach below
    0 and not far enough above.
    """
    inside = (mean > ROUNDING) & (mean < 1 - ROUNDING)
    middle = np.where(inside, mean, 0.5)
    half = (bounds[:, 1] - mean) / (middle * (1 - middle))
    on_scale = expit(logit(middle)[:, None] + np.array([-1, 1]) * half[:, None])
    return np.where(inside[:, None], on_scale, np.clip(bounds, 0, 1))


def attention(evidence: Evidence, attended: Attended) -> dict:
    """Return where the models look, what each module adds, and what masking in that order costs.

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
    """Return the exponentiated entropy of the mean attention, and its interval: 1 for one module, P for all alike.

    The entropy is the mean of ``-sum_m a_m log ā_m`` over runs and LoRAs, ā the mean attention. Its error is that of
    this mean with ā fixed, as the entropy's derivative by ā has no other part (attention sums to 1).
    """
    mean = shares.attention.mean((1, 2))
    logarithm = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
    _, bounds = means(-np.einsum("u,urt->rt", logarithm, shares.attention), shares.groups)
    entropy = -xlogy(mean, mean).sum()
    interval = None if np.isnan(bounds).any() else np.clip(np.exp(bounds), 1, len(mean))
    return {"number": np.exp(entropy), "interval": interval}


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
    """Compare accuracies of trained models with modules masked: in the order of attention, of the ranking, at random.

    The area under a curve is its mean height; a smaller one says that removal hurts more. ``hurts_more`` than random
    needs both: the mean of the random orders differs by an interval over LoRAs and runs, and of these orders, at least
    19, at most a twentieth costs as much.
    """
    curves = {name: runs for name, runs in attended.deletion.items() if not name.startswith(RANDOM)}
    random = [runs for name, runs in attended.deletion.items() if name.startswith(RANDOM)]
    weights = _height_weights(attended.counts)
    areas = {name: np.einsum("k,rkt->rt", weights, runs.astype(float)) for name, runs in curves.items()}
    of_random = [np.einsum("k,rkt->rt", weights, runs.astype(float)) for runs in random]
    own = areas[ATTENTION]
    others = {"random": np.mean(of_random, axis=0)} if random else {}
    others |= {"ranking": areas[RANKING]} if RANKING in areas else {}
    compared = dict(zip(others, draws.differences([(other, own) for other in others.values()]), strict=True))
    below = sum(area.mean() <= own.mean() + ROUNDING for area in of_random)
    p_orders = (1 + below) / (1 + len(random)) if random else None
    against_random = compared.get("random")
    if against_random:
        more = against_random["significant"] and against_random["difference"] > 0
        enough = len(random) >= LEAST_TRAININGS and p_orders <= ALPHA + ROUNDING
        against_random |= {
            "orders": len(random),
            "as_costly": below,
            "p_orders": p_orders,
            "hurts_more": bool(more and enough),
        }
    against_ranking = compared.get("ranking")
    if against_ranking:
        more = against_ranking["significant"] and against_ranking["difference"] > 0
        against_ranking |= {"hurts_more": bool(more)}
    return {
        "masked": attended.counts,
        "curves": {name: _curve(draws, runs) | {"area": areas[name].mean()} for name, runs in curves.items()},
        "random": _random_curve(random, of_random) if random else None,
        "against_random": against_random,
        "against_ranking": against_ranking,
    }


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
    """Compare the attention of the first run with the largest of each training on permuted labels; None without any.

    Family-wise: each module is compared with the largest over all modules, so p at most 0.05 of any module is as rare
    as that of the largest one. Of fewer than 19 trainings nothing is decided.
    """
    if attended.permuted is None or len(attended.permuted) == 0:
        return None
    largest, observed = attended.permuted.max(1), attended.observed_once
    p = exceedance(observed, largest[:, None])
    decided = len(largest) >= LEAST_TRAININGS
    above = p <= ALPHA + ROUNDING
    return {
        "trainings": len(largest),
        "largest": largest,
        "observed": observed,
        "p": p,
        "decided": decided,
        "above": [module for module, is_above in zip(attended.modules, above, strict=True) if is_above and decided],
    }
