"""results.json -> what each picture shows, the finding that stands above it: a sentence with its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from analysis.evidence import ALPHA
from report.drawing import cut
from report.sentences import NO_OTHERS, bounds, capital, correlation_text, listed, percent, runs_text

NAMED = 2  # representations that a caption names at most; of more it says how many


def captions(results: dict) -> dict[str, str]:
    """The finding of each picture that can be drawn, one sentence with its numbers; empty without an analysis."""
    analysis = results.get("analysis") or {}
    found = {name: finding(results) for name, (finding, needs) in FINDINGS.items() if all(map(analysis.get, needs))}
    return {name: sentence for name, sentence in found.items() if sentence}


def _top(k: int) -> str:
    return "the top layer" if k == 1 else f"the top {k} layers"


def _random(k: int) -> str:
    return "a random one" if k == 1 else f"{k} random ones"


def _layer_importance(results: dict) -> str:
    section = results["analysis"]["layers"]
    above, total = section["num_above_null"], len(section["records"])
    told = (
        f"{above} of {total} layers predict above chance" if above else f"None of {total} layers predicts above chance"
    )
    roles = sorted(section["groups"]["role"].items(), key=lambda item: -item[1]["mean"])
    if len(roles) != 2:
        return told
    (high, a), (low, b) = roles
    compared = f"{high} factors more than {low}" if a["interval"][0] > b["interval"][1] else f"{high} and {low} factors"
    return f"{told}; {compared} ({percent(a['mean'])} and {percent(b['mean'])} %)"


def _ablation_curves(results: dict) -> str:
    sections = results["analysis"]["robustness"]
    name, one = next(iter(sections.items()))
    k, random = one["top_k"], one["without_random"]
    among = f"without {_random(k)} {bounds((random['min'], random['max']))} %" if random["draws"] else NO_OTHERS
    runs = runs_text(results, name)
    told = f"Without {_top(k)} {cut(name, 1.5)} reaches {percent(one['without_top']['accuracy'])} %"
    told += f" in {runs}" if runs else ""
    told = f"{told} (with all {percent(one['all']['accuracy'])} %, {among}): {one['verdict']}"
    others = [(name, section["verdict"]) for name, section in sections.items()][1:]
    if len(others) > NAMED:
        others = [(str(count), verdict) for verdict, count in Counter(verdict for _, verdict in others).items()]
    return "; ".join([told, ", ".join(f"{cut(who, 1.5)} {verdict}" for who, verdict in others)] if others else [told])


def accuracies(results: dict, name: str) -> tuple[float, float]:
    """Of a representation with all layers, and without the top k."""
    return tuple(results[kind][name]["test_accuracy"]["mean"] for kind in ("baseline_results", "ablation_results"))


def _representations(results: dict) -> str:
    section, k = results["analysis"]["representations"], results["config"]["top_k"]
    best, names, near = section["best"], list(section["drops"]), section["indistinguishable_from_best"]
    whole, left = accuracies(results, best)
    told = f"{percent(whole)} % with all layers, {percent(left)} % without {_top(k)}"
    if not section["best_above_chance"]:
        if len(names) == 1:
            return f"{best} cannot be told from chance: {told}"
        return f"No representation can be told from chance; {best} gives most: {told}"
    costs = sum(one["p_holm"] < ALPHA and one["drop"] > 0 for one in section["drops"].values())
    if len(names) == 1:
        return f"{best}: {told}, {'a' if costs else 'no'} clear loss"
    others = listed([cut(name, 1.5) for name in near]) if 0 < len(near) <= NAMED else f"{len(near)} others"
    alone = f" ({others} not distinguishable)" if near else ""
    removing = "removing it" if k == 1 else "removing them"
    return f"{best} is best{alone}: {told}; {removing} clearly costs {costs} of {len(names)} representations"


def _concept_layer_map(results: dict) -> str:
    section = results["analysis"]["concepts"]
    best = np.array(section["recall"], float).max(0)  # (C,), NaN of a concept without a test LoRA
    high, low = int(np.nanargmax(best)), int(np.nanargmin(best))
    if best[high] == best[low]:
        return f"The best single layer for each concept recognises {percent(best[high])} % of it"
    names = [cut(section["classes"][c], 1.8) for c in (high, low)]
    return (
        f"Single layers recognise {names[0]} best (up to {percent(best[high])} % of it) "
        f"and {names[1]} worst (up to {percent(best[low])} %)"
    )


def _layer_clusters(results: dict) -> str | None:
    section = results["analysis"]["layer_information"]
    clusters, union, k = section["clusters"], section["union"], len(section["kappa"]["top_k"])
    if not clusters["linkage"]:
        return None
    total, count = len(clusters["order"]), clusters["count"]
    noun = "cluster" if count == 1 else "clusters"
    told = f"{total} layers fall into {count} {noun} of like features (1 - CKA below {clusters['threshold']:g})"
    if count == total:
        told = f"No two of {total} layers have like features (1 - CKA below {clusters['threshold']:g})"
    if k < 2:
        return told
    known = f"{percent(union['any_of_top_k'])} % of LoRAs, the first alone on {percent(union['best_alone'])} %"
    return f"{told}; one or more of the top {k} are right on {known}"


def _rank_structure(results: dict) -> str | None:
    section = results["analysis"]["rank_structure"]
    if section["tested"] is None:
        return None
    differs = f"differs by concept in {section['num_significant']} of {len(section['modules'])} modules"
    if not section["answerable"]:
        return f"{capital(section['why'])}; the {section['tested']} {differs}"
    found = section["complexity"]["spearman_spread"]
    goes = f"; its correlation with spread is {correlation_text(found)}" if found else ""
    return f"{capital(section['tested'])} {differs}{goes}"


FINDINGS: dict[str, tuple[Callable[[dict], str | None], tuple[str, ...]]] = {
    "layer_importance": (_layer_importance, ("layers",)),
    "ablation_curves": (_ablation_curves, ("layers", "robustness")),
    "representations": (_representations, ("layers", "representations")),
    "concept_layer_map": (_concept_layer_map, ("layers", "concepts")),
    "layer_clusters": (_layer_clusters, ("layers", "layer_information")),
    "rank_structure": (_rank_structure, ("rank_structure",)),
}  # finding, and the sections of the analysis that it and the picture need
