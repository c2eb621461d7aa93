"""Steps of the training: from which on the concept can be predicted, in which form, and from which modules first.

A LoRA counts once: its accuracies at all steps are of one unit, in draws and permutations alike. An onset is the first
step from which on every later one is distinguishable from permuted labels; it depends on the number of test LoRAs. The
rise does not: it is the mean time, in doublings of the step, until what is gained at the last step is there.

Shape letters as in evidence.py, and S steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from analysis.chance import ChanceTest
from analysis.draws import ALPHA, Draws
from analysis.evidence import PERMUTATIONS, RESAMPLES, Evidence, Predictions

LEAST_DRAWS, NUMBERS = 1000, 4 * 10**7  # draws of a large family at least, and the numbers that they are kept to
MOST_PROJECTIONS = 8  # that are compared with all others
LEAST_UNITS = 10  # test LoRAs (groups) for an interval of rises, below which draws know little of others
LEAST_SPREAD = 1e-6  # doublings; draws that differ by less do not differ
LEAST_GAIN = 3  # standard errors that the gain at the last step must have for shares of it
EACH, LAST = "each", "last"


class Curve(NamedTuple):
    """Predicted classes of the test LoRAs at S steps, int[S, R, T]: trained at each, and at the last alone."""

    each: np.ndarray
    last: np.ndarray


@dataclass(frozen=True)
class Modules:
    """Modules alone, in the network's order.

    Attributes:
        representation: What reads them.
        names: Their canonical ids.
        blocks: Their blocks; empty where they are in none.
        attentions: The attention that they are of; likewise.
        projections: Their function there; likewise.
        predicted: Their `Curve`, int[S, P, T] each.
    """

    representation: str
    names: Sequence[str]
    blocks: Sequence[str]
    attentions: Sequence[str]
    projections: Sequence[str]
    predicted: Curve


@dataclass(frozen=True)
class Followed:
    """Classifiers that were trained and tested at several steps of the same LoRAs.

    Attributes:
        steps: Names of the S steps, the last one last.
        places: Binary logarithms of their numbers, float[S].
        left_out: Names of other steps.
        counts: LoRAs that were ``followed``, ``left_out``, and of the former ``trained`` and ``tested``.
        classes: Names of the C classes.
        truth: Classes of the T test LoRAs, int[T].
        groups: Their groups, int[T].
        curves: By representation.
        modules: Modules alone; None where they were not trained.
        modules_why: The reason for that.
    """

    steps: Sequence[str]
    places: np.ndarray
    left_out: Sequence[str]
    counts: dict[str, int]
    classes: Sequence[str]
    truth: np.ndarray
    groups: np.ndarray
    curves: dict[str, Curve]
    modules: Modules | None
    modules_why: str = ""


def unanswered(why: str) -> dict:
    """Return ``analysis.dynamics`` where steps are there, and cannot be compared."""
    nothing = {"steps": [], "places": [], "left_out_steps": [], "loras": None, "chance": None, "representations": {}}
    return {"answerable": False, "why": why, **nothing, "modules": None, "modules_why": None}


def analyse_steps(followed: Followed, seed: int) -> dict:
    """Return ``analysis.dynamics`` of results.json.

    Args:
        followed: What was trained.
        seed: Of all draws.
    """
    evidence = evidence_of(followed, seed)
    return {
        "answerable": True,
        "why": None,
        "steps": list(followed.steps),
        "places": followed.places,
        "left_out_steps": list(followed.left_out),
        "loras": followed.counts,
        "chance": evidence.chance,
        "representations": _representations(followed, evidence),
        "modules": _modules(followed, evidence) if followed.modules else None,
        "modules_why": followed.modules_why or None,
    }


def evidence_of(followed: Followed, seed: int) -> Evidence:
    """Return evidence that is all test LoRAs, each of them once."""
    rows, none = np.arange(len(followed.truth)), np.arange(0)
    parts, predictions = {"train": none, "validation": none, "test": rows}, Predictions(rows, followed.truth)
    of_loras = followed.classes, followed.truth, parts, followed.groups
    return Evidence([], *of_loras, none, 0, predictions, seed, RESAMPLES, PERMUTATIONS)


# ----------------------------------------------------------------------------------------------------------------------
# Representations
# ----------------------------------------------------------------------------------------------------------------------


def _representations(followed: Followed, evidence: Evidence) -> dict:
    """Return the curves of each representation, and their difference, a family of all earlier steps of all."""
    truth, earlier = evidence.truth, range(len(followed.steps) - 1)
    pairs = [(curve.each[s] == truth, curve.last[s] == truth) for curve in followed.curves.values() for s in earlier]
    records = iter(evidence.draws.differences(pairs))
    return {
        name: {
            "runs": curve.each.shape[1],
            EACH: _curve(followed, evidence, curve.each),
            LAST: _curve(followed, evidence, curve.last),
            "form": [{"step": followed.steps[s], **next(records)} for s in earlier],
        }
        for name, curve in followed.curves.items()
    }


def _curve(followed: Followed, evidence: Evidence, predicted: np.ndarray) -> dict:
    """Return accuracy by step of predictions int[S, R, T], tested as a family of all steps, and the onset."""
    test = ChanceTest.of(evidence, list(predicted))
    drawn = evidence.draws.accuracies(list(predicted == evidence.truth))
    intervals = evidence.draws.intervals(test.accuracy, drawn)
    points = [
        {
            "accuracy": test.accuracy[s],
            "interval": intervals[s],
            "p_family": test.p_family[s],
            "above": bool(test.above_null[s]),
        }
        for s in range(len(followed.steps))
    ]
    return {"points": points, "onset": onset(followed.steps, test.above_null)}


def onset(steps: Sequence[str], above: np.ndarray) -> str | None:
    """Return the first step from which on all are above permuted labels, bool[S]; None where the last is not.

    Example:
        >>> onset(["1", "2", "4", "8"], np.array([True, False, True, True]))
        '4'
    """
    below = np.flatnonzero(~above)
    first = below[-1] + 1 if len(below) else 0
    return steps[first] if first < len(steps) else None


# ----------------------------------------------------------------------------------------------------------------------
# Modules
# ----------------------------------------------------------------------------------------------------------------------


def _modules(followed: Followed, evidence: Evidence) -> dict:
    """Return what each module alone recognises at each step, and which groups of modules rise earlier."""
    modules = followed.modules
    evidence = _with_fewer_draws(evidence, modules.predicted.each.shape[0] * len(modules.names))
    records = [
        {"module": name, "block": block or None} for name, block in zip(modules.names, modules.blocks, strict=True)
    ]
    sections, above, gains = {}, {}, None
    for how, predicted in zip((EACH, LAST), modules.predicted, strict=True):
        count, of_each, tested = predicted.shape
        test = ChanceTest.of(evidence, list(predicted.reshape(count * of_each, 1, tested)))
        accuracy, over = (values.reshape(count, of_each) for values in (test.accuracy, test.above_null))
        above[how] = over
        sections[how] = {"above": over.sum(1)}
        for p, record in enumerate(records):
            told = {"accuracy": accuracy[:, p], "above": over[:, p], "onset": onset(followed.steps, over[:, p])}
            record[how] = told
        if how == EACH:  # by LoRA, above what permuted labels give
            gains = (predicted == evidence.truth) - test.guessed.reshape(count, of_each, 1)
    return {
        "representation": modules.representation,
        **sections,
        "earliest": _earliest(followed.steps, records),
        "records": records,
        "blocks": _blocks(modules.blocks, above[EACH]),
        "contrasts": _contrasts(modules, gains, followed.places, evidence.draws),
    }


def _with_fewer_draws(evidence: Evidence, family: int) -> Evidence:
    """Return evidence with as many draws and permutations as a family of this size leaves room for."""
    draws = max(LEAST_DRAWS, min(PERMUTATIONS, NUMBERS // family))
    return replace(evidence, resamples=min(RESAMPLES, draws), permutations=draws)


def _earliest(steps: Sequence[str], records: Sequence[dict]) -> dict | None:
    """Return the earliest onset of modules, trained at each step, and the modules that have it; None without any."""
    onsets = [steps.index(record[EACH]["onset"]) for record in records if record[EACH]["onset"] is not None]
    if not onsets:
        return None
    first = steps[min(onsets)]
    return {"step": first, "modules": [record["module"] for record in records if record[EACH]["onset"] == first]}


def _blocks(blocks: Sequence[str], above: np.ndarray) -> list[dict]:
    """Return how many modules of each block are above permuted labels at each step, given bool[S, P]."""
    of_block = np.array(blocks)
    return [
        {"block": block, "modules": int((of_block == block).sum()), "above": above[:, of_block == block].sum(1)}
        for block in dict.fromkeys(filter(None, blocks))
    ]


def _contrasts(modules: Modules, gains: np.ndarray, places: np.ndarray, draws: Draws) -> list[dict]:
    """Return which of two groups of modules rises earlier, of each two that `group_modules` makes.

    Args:
        modules: The modules.
        gains: What each recognises of each LoRA above permuted labels, float[S, P, T].
        places: Binary logarithms of the steps, float[S].
        draws: Of the test LoRAs.
    """
    groups, contrasts = group_modules(modules), []
    for of, named in groups:
        names = [*named, None]
        by_lora = np.stack([gains[:, members].mean(1) for members in named.values()])  # (2, S, T)
        contrast = _contrast(by_lora, places, draws, len(groups))
        contrast["earlier"] = names[contrast["earlier"]]
        contrasts.append({"of": of, "first": names[0], "second": names[1], **contrast})
    return contrasts


def group_modules(modules: Modules) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Return pairs of groups of modules: what they differ in, and positions int64[.] of both by name.

    Attentions are the two that most modules are of. Depths are the first and the last half of the blocks, or of the
    modules where some are in no block; what is in the middle is in neither. Each projection is compared with all
    others, or of two with the other.
    """
    groups = []
    attentions = [name for name, _ in Counter(filter(None, modules.attentions)).most_common(2)]
    if len(attentions) == 2:
        kinds = np.array(modules.attentions)
        groups.append(("attention", {name: np.flatnonzero(kinds == name) for name in sorted(attentions)}))
    in_blocks = all(modules.blocks) and len({*modules.blocks}) > 1
    units = modules.blocks if in_blocks else modules.names
    order = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    if half := len(order) // 2:
        places, noun = np.array([order[unit] for unit in units]), "blocks" if in_blocks else "modules"
        first, last = np.flatnonzero(places < half), np.flatnonzero(places >= len(order) - half)
        groups.append(("depth", {f"the first {noun}": first, f"the last {noun}": last}))
    projections, functions = sorted({*modules.projections} - {""}), np.array(modules.projections)
    if 2 <= len(projections) <= MOST_PROJECTIONS:
        for name in projections if len(projections) > 2 else projections[:1]:
            others = "other projections" if len(projections) > 2 else projections[1]
            own, rest = functions == name, (functions != name) & (functions != "")
            groups.append(("projection", {name: np.flatnonzero(own), others: np.flatnonzero(rest)}))
    return groups


def _contrast(by_lora: np.ndarray, places: np.ndarray, draws: Draws, count: int) -> dict:
    """Return the difference of the rises of two groups, with an interval over test LoRAs (groups).

    It is ``d ± t SE``, the error that of draws, and Student's t at ``1 - 0.05 / count`` (Bonferroni). There is none of
    fewer than ten test LoRAs (groups), nor where draws do not differ: they would claim to know what they cannot.

    Args:
        by_lora: Gain of each LoRA, mean over the modules of each group, float[2, S, T].
        places: Binary logarithms of the steps, float[S].
        draws: Of the test LoRAs.
        count: Number of contrasts.
    """
    steps = by_lora.shape[1]
    drawn = draws.accuracies([runs[None] for group in by_lora for runs in group], resample_runs=False)
    drawn = drawn.reshape(2, steps, -1)
    mean, inflation = by_lora.mean(-1), np.sqrt(draws.inflation)  # (2, S)
    error = drawn[:, -1].std(-1) * inflation
    empty = {"rise_first": None, "rise_second": None, "difference": None, "interval": None, "significant": False}
    if (mean[:, -1] <= LEAST_GAIN * error).any():
        return {**empty, "earlier": 2, "why": "too little is gained at the last step to say when it is there"}
    rises = rise(mean, places)
    of_draws = rise(np.moveaxis(drawn, 1, -1), places)  # (2, B)
    difference = float(rises[0] - rises[1])
    found = {"rise_first": rises[0], "rise_second": rises[1], "difference": difference}
    spread = (of_draws[0] - of_draws[1]).std()
    if draws.units < LEAST_UNITS or not spread > LEAST_SPREAD:
        few = f"only {draws.units} test LoRAs or groups of them, and an interval takes {LEAST_UNITS}"
        alike = "all test LoRAs are alike in this, which gives no interval"
        return {**empty, **found, "earlier": 2, "why": few if draws.units < LEAST_UNITS else alike}
    half = draws.quantile(1 - ALPHA / count / 2) * spread * inflation
    significant = bool(abs(difference) > half)
    return {
        **found,
        "interval": [difference - half, difference + half],
        "significant": significant,
        "earlier": 2 if not significant else 0 if difference < 0 else 1,
        "why": None,
    }


def rise(gains: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the mean time until the gain of the last step is there, from the first step on: float[..., S] -> [...].

    ``sum (x_{s+1} - x_s) (1 - (g_s + g_{s+1}) / 2 g_S)`` in doublings of the step, x being binary logarithms: the area
    between the curve and its end.

    Example:
        >>> rise(np.array([0.0, 0.0, 0.5, 0.5]), np.array([0.0, 1.0, 2.0, 3.0])).item()
        1.5
    """
    shares = gains / gains[..., -1:]
    return ((1 - (shares[..., 1:] + shares[..., :-1]) / 2) * np.diff(places)).sum(-1)
