"""Attention over modules and the map of the collection in sentences, from the content of results.json.

Written once for results.txt (text.py) and report.html (page.py). Both sections of the analysis may be missing: these
are no answers to the five questions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from report.names import full_names
from report.wording import bounds, counted, listed, number, percent

NAMED = 3  # modules, blocks or groups of classes in a sentence, at most
LONGEST = 60  # characters of the names of classes in a sentence, of more their number is given
BEYOND_RANDOM = 0.15  # of Kendall's W above that of random orders, below which runs do not agree
AGREED = 0.7  # Kendall's W up to which runs agree in part
OUTSIDE = 0.025  # share of 95 % intervals that lie above the truth by chance
CAUTION = (
    "Attention is no explanation by itself: other weights may give the same predictions (Jain & Wallace, 2019; "
    "Wiegreffe & Pinter, 2019). How far it matters for the predictions is shown by the contributions and by the "
    "accuracies with modules masked."
)
ATTENDING = "update_attention"  # the representation whose classifier gives attention
MAPPED = "update_views"  # the representation whose kernels LoRAs are drawn by
PROJECTED = "Components are fitted on train LoRAs; test LoRAs are projected and lie nearer to the centre."
CHOSEN = (
    "The modules shown are those of the first layers in the ranking, which these test LoRAs chose: their percentages "
    "tend to be too high."
)
COUNTED = (
    "Two concepts are told apart by the share of their test LoRAs that lie nearer to the mean of their own; concepts "
    "of fewer than 5 test LoRAs are not compared. These are counts, without intervals."
)


def module_lines(results: dict) -> list[str]:
    """Return which modules a classifier gives attention to, how far that matters, and what the map separates.

    None without these sections of the analysis.
    """
    analysis = results.get("analysis") or {}
    lines = []
    if section := analysis.get("attention"):
        lines += _of_attention(analysis)
    if section := analysis.get("collection_map"):
        by_ranking = MAPPED not in analysis["robustness"]  # else its own modules alone were, on validation LoRAs
        chosen = by_ranking and results["config"]["rank_by"] == "test" and len(section["panels"]) > 1
        lines += [PROJECTED, *([CHOSEN] if chosen else []), _compared(section["panels"])]
        names = full_names(analysis)
        lines += [_panel(panel, names) for panel in section["panels"]]
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


def most_attended(section: dict, count: int = NAMED) -> list[dict]:
    """Return the records of the modules with the most attention."""
    return sorted(section["modules"], key=lambda record: -record["attention"])[:count]


def _with_names(analysis: dict) -> dict:
    """Return the section of attention with the names of modules in place of their ids."""
    names, section = full_names(analysis), analysis["attention"]
    permuted = section["permuted"]
    if permuted:
        permuted = permuted | {"above": [names[module] for module in permuted["above"]]}
    modules = [record | {"module": names[record["module"]]} for record in section["modules"]]
    return section | {"modules": modules, "permuted": permuted}


def runs_agree(section: dict) -> bool:
    """Return whether runs give attention to the same modules, at least in part; a single one has none to agree with."""
    agreement = section["stability"]["kendall_w"]
    return section["runs"] == 1 or agreement is None or agreement >= 1 / section["runs"] + BEYOND_RANDOM


def is_settled(section: dict, count: int = NAMED) -> bool:
    """Return whether runs agree, and the interval of one of the first modules excludes its even share."""
    if not runs_agree(section):
        return False
    even = 1 / len(section["modules"])
    return any(record["interval"] and record["interval"][0] > even for record in most_attended(section, count))


def _of_attention(analysis: dict) -> Iterator[str]:
    section = _with_names(analysis)
    if len(section["modules"]) == 1:
        yield f"There is only one module to give attention to, {section['modules'][0]['module']}."
        return
    yield CAUTION
    yield from _at_chance(analysis)
    yield from _over_runs(section)
    yield from _most(section)
    yield from _permuted(section)
    yield from _adding(section)
    yield from _deletion(section)
    yield from _agreement(analysis)


def _at_chance(analysis: dict) -> Iterator[str]:
    """Yield that the classifier whose attention this is predicts nothing, where it is not above chance."""
    compared = analysis.get("representations")
    known = compared["conditions"]["baseline"] if compared else {"intervals": ()}
    if ATTENDING in known["intervals"] and ATTENDING not in known["above_null"]:
        yield (
            f"The classifier that gives this attention, {ATTENDING}, is indistinguishable from chance: read nothing "
            "into its modules."
        )


def _over_runs(section: dict) -> Iterator[str]:
    """Yield how far the runs agree on the modules: what single modules say depends on it."""
    runs, agreement = section["runs"], section["stability"]["kendall_w"]
    if runs == 1:
        yield (
            "Intervals are over LoRAs only, of one trained classifier; another run may give attention to other modules."
        )
    if runs == 1 or agreement is None:
        return
    at_random = 1 / runs
    verb, advice = "agree", ""
    if not runs_agree(section):
        verb, advice = "do not agree", ": read nothing into single modules"
    elif agreement <= AGREED:
        verb = "partly agree"
    yield (
        f"The {runs} runs {verb} on which modules get attention (Kendall's W {number(agreement)}, about "
        f"{number(at_random)} at random){advice}."
    )


def _most(section: dict) -> Iterator[str]:
    """Yield how many modules the attention is on, and which modules, blocks and projections these are."""
    total, runs, effective = len(section["modules"]), section["runs"], section["effective_number"]
    alike = f"{total} if all had the same"
    if runs > 1:
        subject, across = f"Each of {runs} trained classifiers spreads", " on average"
        alike = f"{bounds((effective['min'], effective['max']), _tenths)} over runs; {alike}"
    else:
        subject, across = "The trained classifier spreads", ""
    yield (
        f"{subject} its attention over an effective number (the number of equally attended modules that would be as "
        f"spread) of {_tenths(effective['number'])} modules{across} ({alike})."
    )
    names, even = _shares(most_attended(section), "module"), f"evenly each would have {percent(1 / total)} %"
    if is_settled(section):
        yield f"Most attention is given to {names}; {even}."
    elif runs_agree(section):
        yield f"Which module has most is not settled: {even}, which no interval of the first ones excludes: {names}."
    else:
        yield f"Which module has most is not settled, as runs do not agree: on average the first are {names}; {even}."
    sums = [_largest(section[f"{noun}s"], noun) for noun in ("block", "projection") if len(section[f"{noun}s"]) > 1]
    yield from sums


def _tenths(value: float) -> str:
    return f"{value:.1f}"


def _shares(records: Sequence[dict], noun: str) -> str:
    """Return names with their attention and its interval."""
    texts = []
    for record in records:
        around = f", {bounds(record['interval'])}" if record["interval"] else ""
        texts.append(f"{record[noun]} ({percent(record['attention'])} %{around})")
    return listed(texts)


def _largest(records: Sequence[dict], noun: str) -> str:
    """Return the block or projection with the most attention, unless its interval includes its even share."""
    largest, total = max(records, key=lambda record: record["attention"]), sum(record["modules"] for record in records)
    share, interval = largest["modules"] / total, largest["interval"]
    even = percent(share)
    if interval and interval[0] <= share <= interval[1]:
        return (
            f"Which {noun} has most is not settled: evenly {largest[noun]} would have {even} %, which its interval "
            f"does not exclude ({percent(largest['attention'])} %, {bounds(interval)})."
        )
    among = f"{largest['modules']} of {total} modules (evenly {even} %)"
    return f"The {noun} with most attention is {_shares([largest], noun)}, in {among}."


def _adding(section: dict) -> Iterator[str]:
    """Yield which modules add most to the own class, and which intervals are above 0.

    The modules are chosen among all before their intervals are looked at.
    """
    ordered = sorted(section["modules"], key=lambda record: -record["contribution"])
    count = ""
    if all(record["contribution_interval"] for record in ordered):
        above = [record for record in ordered if record["contribution_interval"][0] > 0]
        expected = round(OUTSIDE * len(ordered))
        by_chance = f"about {expected}" if expected else "fewer than 1"
        verb = "is" if len(above) == 1 else "are"
        count = (
            f"; {len(above)} of {len(ordered)} intervals {verb} above 0 (each holds alone: {by_chance} would by chance)"
            f"{_others_above(ordered, above)}"
        )
    yield (
        "To the score (logit) of a LoRA's own class, less what is added to all classes on average, most is added by "
        f"{listed([_added(record) for record in ordered[:NAMED]])}{count}."
    )


def _others_above(ordered: Sequence[dict], above: Sequence[dict]) -> str:
    """Return which intervals are above 0 where none of the modules named before is among them."""
    if not above or any(record in above for record in ordered[:NAMED]):
        return ""
    names = [_added(record) for record in above[:NAMED]]
    if len(above) > NAMED:
        names.append(f"{len(above) - NAMED} more")
    return f": not those just named, but {'that' if len(above) == 1 else 'those'} of {listed(names)}"


def _added(record: dict) -> str:
    """Return a module with its contribution and its interval."""
    around = record["contribution_interval"]
    return f"{record['module']} ({number(record['contribution'])}{f', {bounds(around, number)}' if around else ''})"


def _deletion(section: dict) -> Iterator[str]:
    """Yield what masking modules in the order of attention costs, against random orders and that of single layers."""
    deletion = section["deletion"]
    curves, masked = deletion["curves"], deletion["masked"]
    if len(masked) < 2:
        return
    point = len(masked) // 2
    ends = [f"in the order of attention {percent(curves['attention']['accuracy'][point])} %"]
    if deletion["random"]:
        ends.append(f"in random orders {percent(deletion['random']['accuracy'][point])} %")
    if "layers" in curves:
        reached = percent(curves["layers"]["accuracy"][point])
        ends.append(f"in the order of the better of their two layers' accuracy alone {reached} %")
    start = "with all modules" if masked[0] == 0 else f"with {masked[0]} masked"
    yield (
        "A masked module is left out of a trained classifier without training it again. It reaches "
        f"{percent(curves['attention']['accuracy'][0])} % {start}; with {masked[point]} masked {', '.join(ends)} (both "
        "attention and layers by validation LoRAs)."
    )
    if compared := deletion["against_random"]:
        yield _against_random(compared)
    if compared := deletion["against_layers"]:
        yield f"It {_costs(compared)} in the order of the better layers' accuracy alone: {_difference(compared)}."


def _against_random(compared: dict) -> str:
    """Return what masking by attention costs beside random orders, and whether it is more."""
    if compared["hurts_more"] is None:
        return (
            "Masking modules in the order of attention costs, beside random orders, "
            f"{_difference(compared)}; of so few orders nothing is decided."
        )
    verb = "costs" if compared["as_costly"] < 2 else "cost"
    orders = f"{compared['as_costly'] or 'none'} of {compared['orders']} random orders {verb}"
    return (
        f"Masking modules in the order of attention {_costs(compared)} in random orders: {_difference(compared)}; "
        f"{orders} at least as much."
    )


def _costs(compared: dict) -> str:
    if compared["hurts_more"]:
        return "costs significantly more than"
    if compared["significant"] and compared["difference"] < 0:
        return "costs significantly less than"
    return "does not cost significantly more than"


def _difference(compared: dict) -> str:
    """Return the difference of mean accuracies along two curves with its interval."""
    points = percent(compared["difference"])
    return f"{points} points of accuracy, averaged over the numbers masked ({bounds(compared['interval'])})"


def _permuted(section: dict) -> Iterator[str]:
    """Yield which modules get more attention than any module does in trainings on permuted labels."""
    permuted, total = section["permuted"], len(section["modules"])
    if not permuted:
        return
    trainings = f"{counted(permuted['trainings'], 'training')} on permuted labels"
    if not permuted["decided"]:
        yield f"Of {trainings}, the largest attention is known, but these are too few to decide by."
        return
    above = permuted["above"]
    every = "In every run" if section["runs"] > 1 else "In the only run"
    most = f"more attention than any gets in {trainings} (up to {percent(max(permuted['largest']))} %)"
    if not above:
        yield f"No module gets, {every[0].lower()}{every[1:]}, {most}."
        return
    names = f": {listed(above)}" if len(above) <= NAMED else ""
    verb = "gets" if len(above) == 1 else "get"
    yield (
        f"{every} {len(above)} of {total} modules {verb} {most}{names}. Those trainings stop early, so "
        "this shows that something was learned, not that only these modules hold it."
    )


def _agreement(analysis: dict) -> Iterator[str]:
    """Yield how far other orders of the modules are that of attention; a ranking that may be chance is none."""
    section, layers = analysis["attention"], analysis.get("layers")
    words = {
        "ranking": "the ranking of the layers",
        "gradients": "gradient times input (how far the score of the predicted class follows small changes in "
        "proportion to a module's numbers)",
    }
    if layers and layers["num_above_null"] == 0:
        del words["ranking"]
        yield (
            "The order is not compared with the ranking of the layers: no single layer is distinguishable from chance."
        )
    by_chance, parts = _tau_by_chance(len(section["modules"])), []
    for name, described in words.items():
        tau = section["agreement"][name]
        if tau["kendall_tau"] is not None:
            around = f", {bounds(tau['interval'], number)}" if tau["interval"] else ", without an interval"
            value = f"Kendall's tau {number(tau['kendall_tau'])}{around}"
            parts.append(f"{_agrees(tau, by_chance)} that by {described}: {value}")
    if parts:
        chance = f"(about ±{number(by_chance)} would occur by chance)"
        yield f"The order of modules by attention {'; it '.join(parts)} {chance}."


def _tau_by_chance(modules: int) -> float:
    """Return the size of Kendall's tau that 95 % of random orders of so many modules stay below.

    The interval of tau is of these modules alone, over LoRAs and runs: that the order of P modules is itself a draw is
    not in it. Of unrelated orders the variance is 2 (2P + 5) / (9P (P - 1)).
    """
    return 1.96 * math.sqrt(2 * (2 * modules + 5) / (9 * modules * (modules - 1)))


def _agrees(tau: dict, by_chance: float) -> str:
    interval = tau["interval"]
    if interval and abs(tau["kendall_tau"]) > by_chance:
        if interval[0] > 0:
            return "agrees with"
        if interval[1] < 0:
            return "is rather the reverse of"
    return "does not clearly agree with"


# ----------------------------------------------------------------------------------------------------------------------
# The map of the collection
# ----------------------------------------------------------------------------------------------------------------------


def _panel(panel: dict, names: dict[str, str]) -> str:
    """Return what the plane of all layers, or of a module alone, separates."""
    module = panel["layers"]
    subject = "all layers" if module == "all" else f"{names.get(module, module)} alone"
    held = percent(sum(panel["explained"]))
    section = panel["separates"]
    reached = f"{percent(section['accuracy'])} % ({bounds(section['interval'])})"
    ends = _told_apart(section) if section["above_null"] else ", indistinguishable from chance"
    return (
        f"In the plane of {subject}, which holds {held} % of the variance, {reached} of the test LoRAs lie nearest to "
        f"the mean of the train LoRAs of their own concept (guessing {percent(section['chance'])} %){ends}."
    )


def _compared(panels: Sequence[dict]) -> str:
    """Return how concepts are compared with each other, or that they are not."""
    compared = max(panel["separates"]["compared"] for panel in panels)
    if compared > 1:
        return COUNTED
    enough = "only one has" if compared else "none has"
    return f"No concepts are compared with each other: {enough} 5 test LoRAs."


def _told_apart(section: dict) -> str:
    """Return which concepts are told apart from all others by these test LoRAs, and which are not from each other."""
    distinct, merged = section["distinct"], section["merged"]
    if section["compared"] < 2:
        return ""
    apart = "of the concepts, none is told apart from every other concept (at least 90 %)"
    if len(distinct) == section["compared"]:
        share = "at least 90 % of the test LoRAs of both lie nearer to their own mean"
        apart = f"every two concepts are told apart ({share})"
    elif distinct:
        those, verb = ("that", "is") if len(distinct) == 1 else ("those", "are")
        apart = f"{those} of {_named(distinct)} {verb} told apart from every other concept (at least 90 %)"
        apart = f"of these test LoRAs, {apart}"
    parts = [f"; {apart}"]
    if merged:
        groups = [_named(group) for group in sorted(merged, key=len, reverse=True)[:NAMED]]
        more = f", and {counted(len(merged) - NAMED, 'more group')}" if len(merged) > NAMED else ""
        parts.append(f"not told apart (below 75 %): {'; '.join(groups)}{more}")
    return "; ".join(parts)


def _named(names: Sequence[str]) -> str:
    """Return names, or how many there are where they are many or long."""
    few = len(names) <= NAMED + 1 and len(listed(names)) <= LONGEST
    return listed(names) if few else f"{len(names)} concepts"
