"""The experiment's five hypotheses: each confirmed, refuted, undecided or not answerable, given the analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from analysis.evidence import ALPHA, holm
from analysis.layers import COARSE_CLASSES

STEEP = 0.5  # of the range of a removal curve, above which a step is none of a graceful degradation


def hypotheses(found: dict) -> list[dict]:
    """The experiment's five hypotheses, each confirmed, refuted or undecided, given the sections of the analysis."""
    return list(_hypotheses(found))


def _hypotheses(found: dict) -> Iterator[dict]:
    depth = found["layers"]["depth"] or {"r": None, "interval": None, "p": None}
    yield _outcome(
        "later layers predict more",
        "Spearman correlation of depth and accuracy",
        depth["r"],
        depth["interval"],
        partial(_sign, depth["p"]),
        "fewer than four layers, or all of one accuracy" if depth["r"] is None else "",
        signal=found["layers"]["num_above_null"] > 0,
    )
    curves = found.get("robustness", {}).get("stats") or next(iter(found.get("robustness", {}).values()), None)
    step = (curves or {}).get("largest_step") or {"share": None, "interval": None}
    yield _outcome(
        "degradation is graceful",
        "largest step of the removal curve, as a share of its range",
        step["share"],
        step["interval"],
        lambda low, high: "confirmed" if high <= STEEP else "refuted" if low > STEEP else "undecided",
        "" if step["interval"] is not None else "no removal curve that is above chance and has four steps or more",
    )
    yield _better_than_stats(found.get("representations"))
    coarse = found["layer_information"]["coarse"] or {"difference": None, "interval": None}
    yield _outcome(
        "top layers separate clusters of concepts, others within them",
        "coarse less fine score of the top layers, less that of the others",
        coarse["difference"],
        coarse["interval"],
        partial(_sign, 0.0),
        ""
        if coarse["interval"] is not None
        else f"no clusters of concepts ({COARSE_CLASSES} classes or more have some)",
        signal=found["layers"]["num_above_null"] > 0,
    )
    structure = found["rank_structure"]
    spread = structure["complexity"]["spearman_spread"] or {"r": None, "interval": None, "p": None}
    yield _outcome(
        "effective rank goes with the complexity of the concept",
        "Spearman correlation over concepts of effective rank and spread of features",
        spread["r"] if structure["answerable"] else None,
        spread["interval"] if structure["answerable"] else None,
        partial(_sign, spread["p"]),
        structure["why"] or ("" if spread["r"] is not None else f"fewer than {COARSE_CLASSES} classes"),
    )


def _sign(p: float, low: float, high: float) -> str:
    """Above 0, below, or neither; an interval of few numbers may be narrower than their p allows."""
    return "undecided" if p >= ALPHA or low <= 0 <= high else "confirmed" if low > 0 else "refuted"


def _outcome(
    hypothesis: str,
    measure: str,
    number: float | None,
    bounds: Sequence[float] | None,
    decide: Callable[[float, float], str],
    why_not: str,
    signal: bool = True,
) -> dict:
    """``decide(low, high)`` of an interval; undecided where no layer is above chance."""
    outcome, why = "not answerable", why_not
    if bounds is not None:
        outcome, why = decide(*bounds), ""
        if not signal:
            outcome, why = "undecided", "no layer is above chance"
    return {
        "hypothesis": hypothesis,
        "outcome": outcome,
        "measure": measure,
        "number": number,
        "interval": bounds,
        "why": why,
    }


def _better_than_stats(compared: dict | None) -> dict:
    """Ensemble or spectral beats stats: confirmed by one of them after Holm's correction for two."""
    found = []
    for one in compared["pairs"]["baseline"] if compared else ():
        if "stats" in (one["a"], one["b"]) and {one["a"], one["b"]} & {"ensemble", "spectral"}:
            sign = 1 if one["b"] == "stats" else -1
            low, high = sorted(sign * np.asarray(one["interval"]))
            found.append((sign * one["difference"], low, high, one["p"], one["b"] if sign < 0 else one["a"]))
    told = {"hypothesis": "ensemble or spectral beats stats", "measure": "difference of test accuracies"}
    if not found:
        return told | {"outcome": "not answerable", "number": None, "interval": None, "why": "they were not all run"}
    corrected = holm([p for *_, p, _ in found])
    number, low, high, _, name = max(found, key=lambda one: one[0])
    wins = any(p < ALPHA and difference > 0 for p, (difference, *_) in zip(corrected, found, strict=True))
    loses = [p < ALPHA and difference < 0 for p, (difference, *_) in zip(corrected, found, strict=True)]
    outcome = "confirmed" if wins else "refuted" if loses == [True, True] else "undecided"
    why = f"{name} less stats" + ("; the better of ensemble and spectral" if len(found) > 1 else "")
    return told | {"outcome": outcome, "number": number, "interval": [low, high], "why": why}
