"""Finished runs side by side: what differs between them, what more LoRAs bring, how far their rankings agree.

Accuracies of different runs are never averaged, and differences are taken only between comparable runs: those of the
same classes, layers, settings, kind of collection and program, which differ in their LoRAs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np
from scipy import stats

from analysis.draws import ALPHA, LEVEL, ROUNDING
from analysis.layers import LEAST_RANKED

SCHEMA_VERSION = 2  # of comparison.json


@dataclass(frozen=True)
class Score:
    """Accuracies of a representation in a run, as shares; None where the run does not say.

    Attributes:
        accuracy: Test accuracy with all layers, mean over runs of the training.
        validation: Validation accuracy likewise.
        interval: Interval of ``accuracy``, of level 95 %, from `analysis.draws.Draws.intervals`; see `has_size`.
        above_null: Whether the run says that it is above permuted labels.
        without_top: Test accuracy without the top k layers.
        without_top_interval: Its interval.
        verdict: The run's verdict on the removal of layers.
    """

    accuracy: float
    validation: float
    interval: tuple[float, float] | None = None
    above_null: bool | None = None
    without_top: float | None = None
    without_top_interval: tuple[float, float] | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Run:
    """A finished run, as far as it is compared.

    Attributes:
        facts: What comparison.json says of it, with ``train`` and ``top_k``.
        units: Independent test units, of which its intervals are.
        decides: Settings that decide what an accuracy means, as text by key: comparable runs share them.
        beside: Others, such as the machine, as text by key.
        classes: LoRAs of each class.
        layers: Test accuracy of each layer alone by module and role, in the order of its ranking.
        scores: By representation.
        fingerprint: Digest of the contents of its weight files.
        samples: Label and part of the split of each file by its path; None where that is not known.
    """

    facts: dict
    units: int
    decides: dict[str, str]
    beside: dict[str, str]
    classes: dict[str, int]
    layers: dict[tuple[str, str], float]
    scores: dict[str, Score]
    fingerprint: str = ""
    samples: dict[str, tuple[str, str]] | None = field(default=None, repr=False)

    @property
    def train(self) -> int:
        """Its number of train LoRAs."""
        return self.facts["train"]


def compare(runs: Sequence[Run]) -> dict:
    """Return the content of comparison.json: see docs/compare.md."""
    groups = comparable(runs)
    names = dict.fromkeys(name for run in runs for name in run.scores)
    asked = [(a, b, name) for group in groups for name in names for a, b in _steps(runs, group, name)]
    changes = [_change(runs, a, b, name, len(asked)) for a, b, name in asked]
    return {
        "schema_version": SCHEMA_VERSION,
        "level": LEVEL,
        "runs": [run.facts for run in runs],
        "groups": [
            {
                "runs": group,
                "grows": len({runs[i].train for i in group}) > 1,
            }
            for group in groups
        ],
        "differences": list(_differences(runs)),
        "representations": {
            name: [_score(i, run.scores[name]) for i, run in enumerate(runs) if name in run.scores] for name in names
        },
        "changes": changes,
        "pairs": [_pair(runs, a, b) for a, b in combinations(range(len(runs)), 2)],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Comparable runs
# ----------------------------------------------------------------------------------------------------------------------


def comparable(runs: Sequence[Run]) -> list[list[int]]:
    """Return groups of comparable runs as their positions, those of fewer train LoRAs first."""
    found: dict[tuple, list[int]] = {}
    for i, run in enumerate(runs):
        alike = frozenset(run.decides.items()), frozenset(run.classes), frozenset(run.layers)
        found.setdefault(alike, []).append(i)
    return [sorted(group, key=lambda i: (runs[i].train, i)) for group in found.values()]


def _steps(runs: Sequence[Run], group: Sequence[int], name: str) -> list[tuple[int, int]]:
    """Return the pairs of a group that are compared in a representation: neighbours, and of more the first and last.

    Of runs on the same LoRAs, as of two machines, only the first counts: another is of no other size, nor independent.
    """
    there: list[int] = []
    for i in group:
        score = runs[i].scores.get(name)
        if score and score.interval and not any(_same_files(runs[i], runs[j]) for j in there):
            there.append(i)
    steps = list(pairwise(there))
    if len(there) > 2 and runs[there[0]].train < runs[there[-1]].train:
        steps.append((there[0], there[-1]))
    return steps


def _same_files(a: Run, b: Run) -> bool:
    return bool(a.fingerprint) and a.fingerprint == b.fingerprint


def _differences(runs: Sequence[Run]) -> list[dict]:
    """Return the settings in which runs differ: key, text of each run, whether it makes runs incomparable."""
    found = []
    for decides, settings in ((True, [run.decides for run in runs]), (False, [run.beside for run in runs])):
        for key in dict.fromkeys(key for of_run in settings for key in of_run):
            values = [of_run.get(key) for of_run in settings]
            if len(set(values)) > 1:
                found.append({"key": key, "values": values, "decides": decides})
    return found


def _score(run: int, score: Score) -> dict:
    return {"run": run, **{key: getattr(score, key) for key in Score.__dataclass_fields__}}


# ----------------------------------------------------------------------------------------------------------------------
# Differences of accuracies
# ----------------------------------------------------------------------------------------------------------------------


def has_size(accuracy: float, interval: tuple[float, float]) -> bool:
    """Return whether an interval says of how many independent LoRAs it is, see `effective_size`.

    It does not where its farther bound is, up to rounding, 0, 1 or the accuracy: as where all test LoRAs are one group.
    """
    bound = _farther(accuracy, interval)
    return min(bound, 1 - bound, abs(bound - accuracy)) > 1.5 * ROUNDING  # results.json holds nine decimals


def _farther(accuracy: float, interval: tuple[float, float]) -> float:
    return max(interval, key=lambda bound: abs(bound - accuracy))


def effective_size(accuracy: float, interval: tuple[float, float], units: int) -> float:
    """Return the number of independent LoRAs n of which an interval of `Draws.intervals` is.

    Each bound p of Wilson's interval of a share a solves ``(a - p)² = z² p (1 - p) / n``; z is the quantile of
    Student's t with ``units - 1`` degrees of freedom. The bound that is farther from a is taken: see `has_size`.
    """
    bound = _farther(accuracy, interval)
    return float(_quantile(ALPHA, units) ** 2 * bound * (1 - bound) / (accuracy - bound) ** 2)


def wilson(accuracy: float, size: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval of a share of ``size`` LoRAs, z standard errors to each side."""
    centre = (accuracy + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z * np.sqrt(accuracy * (1 - accuracy) / size + z**2 / (4 * size**2)) / (1 + z**2 / size)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def difference(a: Score, b: Score, units: tuple[int, int], family: int) -> tuple[float, tuple[float, float]]:
    """Return the accuracy of b less that of a, of other test LoRAs, and its interval.

    Square-and-add: the distances of both shares from the bounds of their Wilson intervals are added as standard errors
    are. These are of level ``1 - 0.05 / family`` (Bonferroni), from the effective sizes of the 95 % intervals.

    Args:
        a: The first.
        b: The second.
        units: Independent test units of each.
        family: Differences that are to hold together.

    Source:
        Newcombe, "Interval estimation for the difference between independent proportions: comparison of eleven
        methods", Statistics in Medicine 1998.
    """
    (low_a, high_a), (low_b, high_b) = (
        wilson(score.accuracy, effective_size(score.accuracy, score.interval, of), _quantile(ALPHA / family, of))
        for score, of in zip((a, b), units, strict=True)
    )
    found = b.accuracy - a.accuracy
    low = found - np.hypot(b.accuracy - low_b, high_a - a.accuracy)
    high = found + np.hypot(high_b - b.accuracy, a.accuracy - low_a)
    return found, (max(-1.0, float(low)), min(1.0, float(high)))


def _quantile(alpha: float, units: int) -> float:
    """Return the quantile of Student's t beyond which alpha lies on both sides together."""
    return float(stats.t.isf(alpha / 2, max(1, units - 1)))


def _change(runs: Sequence[Run], a: int, b: int, name: str, family: int) -> dict:
    """Return the difference between two comparable runs in a representation."""
    units = runs[a].units, runs[b].units
    found, interval = difference(runs[a].scores[name], runs[b].scores[name], units, family)
    return {
        "representation": name,
        "a": a,
        "b": b,
        "train": [runs[a].train, runs[b].train],
        "difference": found,
        "interval": interval,
        "significant": bool(interval[0] > 0 or interval[1] < 0),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of runs
# ----------------------------------------------------------------------------------------------------------------------


def _pair(runs: Sequence[Run], a: int, b: int) -> dict:
    """Return what two runs share, comparable or not: classes, layers, LoRAs, and how far their rankings agree."""
    first, second = runs[a], runs[b]
    common = [layer for layer in first.layers if layer in second.layers]
    top_k = min(first.facts["top_k"], second.facts["top_k"])
    tops = [set(list(run.layers)[:top_k]) for run in (first, second)]
    return {
        "a": a,
        "b": b,
        "classes": len({*first.classes} & {*second.classes}),
        "class_shares": _class_shares(first, second),
        "layers": len(common),
        "kendall_tau": _tau([first.layers[layer] for layer in common], [second.layers[layer] for layer in common]),
        "top_k": top_k,
        "same_top_k": len(tops[0] & tops[1]) if common else None,
        "by_chance": top_k**2 / len(common) if len(common) == len(first.layers) == len(second.layers) else None,
        "same_files": _same_files(first, second),
        **_shared(first.samples, second.samples),
    }


def _class_shares(first: Run, second: Run) -> float:
    """Return the total variation distance between the shares of classes: 0 of equal, 1 of none in common."""
    names = sorted({*first.classes, *second.classes})
    a, b = (np.array([run.classes.get(name, 0) for name in names], float) for run in (first, second))
    return float(np.abs(a / a.sum() - b / b.sum()).sum() / 2)


def _tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of accuracies float[L]; None of fewer than three layers, and where all are equal.

    Without a test: layers of one network are not independent of each other.
    """
    if len(a) < LEAST_RANKED or min(np.ptp(a), np.ptp(b)) == 0:
        return None
    return float(stats.kendalltau(a, b).statistic)


def _shared(first: dict | None, second: dict | None) -> dict:
    """Return how many LoRAs have the same path and label in both, and how many of these are test LoRAs of both."""
    if first is None or second is None:
        return {"shared": None, "shared_test": None}
    parts = [(first[path], second[path]) for path in first if path in second]
    alike = [(a[1], b[1]) for a, b in parts if a[0] == b[0]]
    return {"shared": len(alike), "shared_test": alike.count(("test", "test"))}
