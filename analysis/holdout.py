"""Values of a column that were held out: what classifiers know of LoRAs of a value that none was trained on.

A claim about another value, say another artist, needs values as units: many LoRAs of few artists tell little of others.

Shape letters as in evidence.py, and W values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from analysis.chance import ChanceTest
from analysis.draws import ALPHA, Draws
from analysis.evidence import Evidence

MARGIN = 0.1  # share that may be lost on average where prediction holds
HELD_SHARE = 0.5  # of what is above chance, that may be lost at most there
HOLDS, FALLS, UNDECIDED = "holds", "falls", "undecided"
LEAST_VALUES = 2  # that an average is of


@dataclass(frozen=True)
class Fit:
    """Trainings without the LoRAs of a value.

    Attributes:
        value: The value.
        rows: Its LoRAs, int[n].
        trained: Number of train LoRAs.
        largest: The largest class of these.
        predicted: Predicted classes of its LoRAs by representation, int[R, n].
    """

    value: str
    rows: np.ndarray
    trained: int
    largest: int
    predicted: dict[str, np.ndarray]


@dataclass(frozen=True)
class Ordinary:
    """Trainings on the ordinary split.

    Attributes:
        seen: Mask of the test LoRAs whose value train LoRAs have too, bool[T].
        predicted: Predicted classes of the test LoRAs by representation, int[R, T]; R may be another.
        validated: Validation accuracy by representation.
    """

    seen: np.ndarray
    predicted: dict[str, np.ndarray]
    validated: dict[str, float]


def held_out(fits: Sequence[Fit], ordinary: Ordinary, evidence: Evidence) -> dict:
    """Return what was measured of ``analysis.holdout`` of results.json.

    Accuracies by value are those of all its LoRAs. The loss is paired: the same LoRAs of the ordinary test set, as
    recognised by the ordinary classifier, less as recognised by the one that never saw their value. By value LoRAs (or
    groups) are the units, and intervals and p hold for all representations and values together; on average values are,
    and intervals hold for all representations together. See `over_values`.

    Args:
        fits: Of two values at least, all with the same representations.
        ordinary: The ordinary ones, with these representations.
        evidence: Labels, groups, split and seed of the collection.
    """
    names = list(fits[0].predicted)
    compared = [_compared(fit, ordinary, evidence) for fit in fits]  # (rows of the fit, rows of the ordinary test)
    by_value = [
        _of_value(fit, pair, ordinary, evidence, len(fits), sum(len(own) > 0 for own, _ in compared))
        for fit, pair in zip(fits, compared, strict=True)
    ]
    records = [
        {
            "value": fit.value,
            "loras": len(fit.rows),
            "groups": len(fit.rows) if evidence.groups is None else len(np.unique(evidence.groups[fit.rows])),
            "classes": len(np.unique(evidence.y[fit.rows])),
            "trained": fit.trained,
            "chance": (evidence.y[fit.rows] == fit.largest).mean(),
            "compared": len(own),
        }
        for fit, (own, _) in zip(fits, compared, strict=True)
    ]
    averages = _averages(fits, compared, ordinary, evidence)
    return {
        "best": max(names, key=lambda name: ordinary.validated[name]),
        "trained": len(evidence.rows["train"]),
        "values": records,
        "representations": {
            name: averages[name]
            | _summary([of_value[name] for of_value in by_value], fits)
            | {"values": [of_value[name] for of_value in by_value]}
            for name in names
        },
    }


def _compared(fit: Fit, ordinary: Ordinary, evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Return the LoRAs that both sides predict: positions among those of the value, and among the test LoRAs."""
    tested = evidence.rows["test"]
    _, own, others = np.intersect1d(fit.rows, np.where(ordinary.seen, tested, -1), return_indices=True)
    return own, others


def _only(evidence: Evidence, rows: np.ndarray) -> Evidence:
    """Return the evidence with these test rows, to test predictions of them."""
    none = np.arange(0)
    return replace(evidence, rows={"train": none, "validation": none, "test": rows})


def _together(evidence: Evidence, values: int) -> Draws:
    """Return the draws of differences that are to hold for so many values together."""
    return Draws(evidence.test_groups, evidence.resamples, evidence.seed, families=values)


def _of_value(
    fit: Fit,
    compared: tuple[np.ndarray, np.ndarray],
    ordinary: Ordinary,
    evidence: Evidence,
    num_values: int,
    num_compared: int,
) -> dict[str, dict]:
    """Return by representation what it knows of the LoRAs of a value; p is by Bonferroni over values."""
    names, own = list(fit.predicted), _only(evidence, fit.rows)
    correct = [fit.predicted[name] == own.truth for name in names]
    drawn = own.draws.accuracies(correct)
    found = {name: own.draws.estimate(correct[i], drawn[i]) for i, name in enumerate(names)}
    guess = (own.truth == fit.largest)[None]
    above_guess = _together(own, num_values).differences([(runs, guess) for runs in correct])
    several = len(np.unique(own.truth)) > 1
    p = ChanceTest.of(own, [fit.predicted[name] for name in names]).p_family * num_values
    for i, name in enumerate(names):
        above = bool(p[i] < ALPHA and above_guess[i]["interval"][0] > 0)
        found[name] |= {
            "p": min(1.0, p[i]) if several else None,
            "above_chance": above if several else None,
            "ordinary": None,
            "loss": None,
        }
    if not len(compared[0]):
        return found
    both = _only(evidence, fit.rows[compared[0]])
    pairs = [
        (ordinary.predicted[name][:, compared[1]] == both.truth, correct[i][:, compared[0]])
        for i, name in enumerate(names)
    ]
    drawn = both.draws.accuracies([usual for usual, _ in pairs])
    together = _together(both, num_compared)
    losses = together.differences(pairs)
    largest = together.differences([(usual, np.zeros_like(usual)) for usual, _ in pairs])
    for i, name in enumerate(names):
        losing = losses[i]["significant"] and losses[i]["difference"] > 0
        detectable = {"detectable": bool(losing or largest[i]["significant"])}
        found[name] |= {"ordinary": both.draws.estimate(pairs[i][0], drawn[i]), "loss": losses[i] | detectable}
    return found


def _averages(
    fits: Sequence[Fit], compared: Sequence[tuple[np.ndarray, np.ndarray]], ordinary: Ordinary, evidence: Evidence
) -> dict[str, dict]:
    """Return by representation the accuracy on average over values, the loss, and the verdict."""
    names, every = list(fits[0].predicted), _only(evidence, np.concatenate([fit.rows for fit in fits]))
    correct = [np.concatenate([fit.predicted[name] for fit in fits], axis=1) == every.truth for name in names]
    drawn = every.draws.accuracies(correct)
    value = np.repeat(np.arange(len(fits)), [len(fit.rows) for fit in fits])
    losses = _losses(fits, compared, ordinary, evidence)
    found = {}
    for i, name in enumerate(names):
        of_loras = every.draws.estimate(correct[i], drawn[i])["interval"]
        mean, interval = over_values(_means(correct[i], value), of_loras, (0.0, 1.0))
        verdict, why = _verdict(losses.get(name))
        found[name] = {
            "verdict": verdict,
            "why": why,
            "held_out": {"accuracy": mean, "interval": interval},
            "loss": losses.get(name),
        }
    return found


def _losses(
    fits: Sequence[Fit], compared: Sequence[tuple[np.ndarray, np.ndarray]], ordinary: Ordinary, evidence: Evidence
) -> dict[str, dict]:
    """Return the mean over values of the paired loss by representation; none where fewer than two are compared."""
    used = [(fit, *pair) for fit, pair in zip(fits, compared, strict=True) if len(pair[0])]
    if len(used) < LEAST_VALUES:
        return {}
    names, both = list(fits[0].predicted), _only(evidence, np.concatenate([fit.rows[own] for fit, own, _ in used]))
    value = np.repeat(np.arange(len(used)), [len(own) for _, own, _ in used])
    others = np.concatenate([test for *_, test in used])
    usual = [ordinary.predicted[name][:, others] for name in names]
    knows = ChanceTest.of(both, usual).above_chance
    pairs = [
        (
            usual[i] == both.truth,
            np.concatenate([fit.predicted[name][:, own] for fit, own, _ in used], axis=1) == both.truth,
        )
        for i, name in enumerate(names)
    ]
    of_loras = both.draws.differences(pairs)
    losses = {}
    for i, name in enumerate(names):
        before, after = (_means(correct, value) for correct in pairs[i])
        mean, interval = over_values(before - after, of_loras[i]["interval"], (-1.0, 1.0), len(names))
        losses[name] = {
            "mean": mean,
            "interval": interval,
            "ordinary": before.mean(),
            "held_out": after.mean(),
            "values": len(used),
            "loras": len(value),
            "margin": max(0.0, min(MARGIN, HELD_SHARE * (before.mean() - both.chance))),
            "known": bool(knows[i]),
        }
    return losses


def _means(correct: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the accuracy of each value, mean over runs and its LoRAs, bool[R, T], int[T] -> float[W]."""
    return np.bincount(value, correct.mean(0)) / np.bincount(value)


def over_values(
    by_value: np.ndarray, of_loras: np.ndarray, bounds: tuple[float, float], count: int = 1
) -> tuple[float, np.ndarray]:
    """Return the mean over values float[W], each counting the same, and its interval float[2].

    Student's t of W - 1 with values as units, as of a meta-analysis of equal weights: what LoRAs and trainings add is
    in the spread of values. Few values may be alike by chance, and all classifiers of the ordinary split share their
    runs: where the interval with LoRAs as units reaches further, its bound is taken. It does not hold where few values
    differ much from all others and none of these was seen; see `_summary`.

    Args:
        by_value: Result of each value.
        of_loras: Interval of the mean with LoRAs (groups) as units, float[2].
        bounds: The least and the largest possible value.
        count: Of intervals that hold together, by Bonferroni.

    Source:
        IntHout, Ioannidis & Borm, "The Hartung-Knapp-Sidik-Jonkman method for random effects meta-analysis", BMC
        Medical Research Methodology 2014.
    """
    mean, size = by_value.mean(), len(by_value)
    half = stats.t.isf(ALPHA / 2 / count, size - 1) * by_value.std(ddof=1) / np.sqrt(size)
    low, high = min(mean - half, of_loras[0]), max(mean + half, of_loras[1])
    return float(mean), np.clip([low, high], *bounds)


def _verdict(loss: dict | None) -> tuple[str, str | None]:
    """Return the verdict on the average loss, and why it is undecided in words; else None.

    It falls where the interval is above 0. It holds where the interval is at most ``margin``: a tenth, or half of what
    the ordinary classifier has above chance where that is less.
    """
    if loss is None:
        return UNDECIDED, (
            f"fewer than {LEAST_VALUES} values have LoRAs in the ordinary test set whose value its train LoRAs have too"
        )
    low, high = loss["interval"]
    if low > 0:
        return FALLS, None
    if not loss["known"]:
        return UNDECIDED, "on these LoRAs the ordinary classifier is indistinguishable from chance"
    if high <= loss["margin"]:
        return HOLDS, None
    return UNDECIDED, f"the interval, of {loss['values']} values, includes no loss and a large one"


def _summary(of_values: Sequence[dict], fits: Sequence[Fit]) -> dict:
    """Return the worst value of a representation, how many are above chance, and how many lose.

    ``detectable`` counts the values of which a loss could have been significant: it would be if none of the compared
    LoRAs was recognised any more. ``losing_at_most`` is the upper bound of the share of such values that would lose
    significantly, given those that do: Clopper and Pearson's, one-sided, of 95 %. Values of which no loss could be
    significant say nothing of it.
    """
    tested = [record["above_chance"] for record in of_values if record["above_chance"] is not None]
    losses = [record["loss"] for record in of_values if record["loss"] and record["loss"]["detectable"]]
    losing = sum(loss["significant"] and loss["difference"] > 0 for loss in losses)
    at_most = stats.binomtest(losing, len(losses), alternative="less").proportion_ci(1 - ALPHA).high if losses else None
    accuracies = [round(float(record["accuracy"]), 12) for record in of_values]
    return {
        "worst": fits[int(np.argmin(accuracies))].value,
        "above_chance": sum(tested),
        "tested": len(tested),
        "losing": losing,
        "detectable": len(losses),
        "losing_at_most": at_most,
    }
