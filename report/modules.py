"""Attention over modules and the map of the collection in sentences, from the content of results.json.

Written once for results.txt (text.py) and report.html (page.py). Both sections of the analysis may be missing: these
are no answers to the five questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from report.wording import bounds, capital, counted, listed, number, p_text, percent

NAMED = 3  # modules, blocks or classes in a sentence, at most
CAUTION = (
    "Attention is no explanation by itself: other weights may give the same predictions (Jain & Wallace, 2019; "
    "Wiegreffe & Pinter, 2019). The contributions and the accuracies with modules masked say what it is worth."
)


def module_lines(results: dict) -> list[str]:
    """Return where a classifier with attention looks and what that is worth, and what the map of the LoRAs separates.

    None without these sections of the analysis.
    """
    analysis = results.get("analysis") or {}
    lines = []
    if section := analysis.get("attention"):
        lines += _of_attention(section)
    if section := analysis.get("collection_map"):
        lines += map(_panel, section["panels"])
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


def most_attended(section: dict, count: int = NAMED) -> list[dict]:
    """Return the records of the modules with the most attention."""
    return sorted(section["modules"], key=lambda record: -record["attention"])[:count]


def _of_attention(section: dict) -> Iterator[str]:
    if len(section["modules"]) == 1:
        yield f"There is only one module to attend to, {section['modules'][0]['module']}."
        return
    yield from _most(section)
    yield from _deletion(section["deletion"])
    yield from _permuted(section)
    yield from _agreement(section)
    yield CAUTION


def _most(section: dict) -> Iterator[str]:
    """Yield how many modules the attention is on, which these are, and which add to the own class."""
    total, effective = len(section["modules"]), section["effective_number"]
    around = f" ({bounds(effective['interval'], number)})" if effective["interval"] else ""
    yield (
        f"The classifier with attention looks at {number(effective['number'])}{around} of {total} modules (effective "
        f"number; {total} if at all alike), most at {_shares(most_attended(section), 'module')}; evenly each would "
        f"have {percent(1 / total)} %."
    )
    sums = [_largest(section[f"{noun}s"], noun) for noun in ("block", "projection") if len(section[f"{noun}s"]) > 1]
    if sums:
        yield f"{capital('; '.join(sums))}."
    adding = sorted(filter(_adds, section["modules"]), key=lambda record: -record["contribution"])[:NAMED]
    parts = [f"{record['module']} ({_logits(record)})" for record in adding]
    added = f"most is added by {listed(parts)}" if parts else "no module clearly adds anything"
    yield f"To the logit of a LoRA's own class, less what is added to all classes on average, {added}."


def _shares(records: Sequence[dict], noun: str) -> str:
    """Return names with their attention and its interval."""
    texts = []
    for record in records:
        around = f", {bounds(record['interval'])}" if record["interval"] else ""
        texts.append(f"{record[noun]} ({percent(record['attention'])} %{around})")
    return listed(texts)


def _adds(record: dict) -> bool:
    """Return whether a module adds to the own class by its interval, which holds alone."""
    return record["contribution_interval"] is not None and record["contribution_interval"][0] > 0


def _logits(record: dict) -> str:
    around = record["contribution_interval"]
    return f"{number(record['contribution'])}, {bounds(around, number)}" if around else number(record["contribution"])


def _largest(records: Sequence[dict], noun: str) -> str:
    """Return the block or projection with the most attention, in how many modules."""
    largest = max(records, key=lambda record: record["attention"])
    among = counted(largest["modules"], "module")
    return f"the {noun} with most attention is {_shares([largest], noun)}, in {among}"


def _deletion(section: dict) -> Iterator[str]:
    """Yield what masking modules in the order of attention costs, against random orders and that of the ranking."""
    curve, masked, parts = section["curves"]["attention"], section["masked"], []
    if len(masked) < 2:
        return
    whole, point = curve["accuracy"][0], len(masked) // 2
    ends = f"with {masked[point]} masked in the order of attention {percent(curve['accuracy'][point])} %"
    if section["random"]:
        ends += f", in random orders {percent(section['random']['accuracy'][point])} %"
    if "ranking" in section["curves"]:
        ends += f", in the order of the ranking {percent(section['curves']['ranking']['accuracy'][point])} %"
    start = "with all modules" if masked[0] == 0 else f"with {masked[0]} masked"
    for name, words in (("against_random", "random orders"), ("against_ranking", "the order of the ranking")):
        if compared := section[name]:
            parts.append(f"{_hurts(compared)} {words} ({_difference(compared)})")
    verdict = f" Masking by attention costs {listed(parts)}." if parts else ""
    yield f"The trained classifier reaches {percent(whole)} % {start}, {ends}.{verdict}"


def _hurts(compared: dict) -> str:
    if compared["hurts_more"]:
        return "more than"
    if compared["significant"] and compared["difference"] < 0:
        return "less than"
    return "not clearly more than"


def _difference(compared: dict) -> str:
    """Return the difference of mean accuracies along two curves, with interval and p."""
    text = f"{percent(compared['difference'])} points of mean accuracy, {bounds(compared['interval'])}"
    orders = ""
    if "orders" in compared:
        as_costly = f"{compared['as_costly'] or 'none'} of {counted(compared['orders'], 'order')}"
        orders = f"; {as_costly} cost as much, {p_text(compared['p_orders'])}"
    return f"{text}, {p_text(compared['p'])}{orders}"


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
    most = percent(max(permuted["largest"]))
    if not above:
        yield f"No module gets more attention than the largest of {trainings} gives to any (up to {most} %)."
        return
    names = f": {listed(above)}" if len(above) <= NAMED else ""
    verb = "gets" if len(above) == 1 else "get"
    yield (
        f"{len(above)} of {total} modules {verb} more attention, in the first run, than the largest of {trainings} "
        f"gives to any (up to {most} %; p at most 0.05, corrected for the choice among all modules){names}."
    )


def _agreement(section: dict) -> Iterator[str]:
    words = {"ranking": "the ranking of the layers", "gradients": "gradient times input"}
    parts = []
    for name, described in words.items():
        tau = section["agreement"][name]
        if tau["kendall_tau"] is not None:
            around = f" ({bounds(tau['interval'], number)})" if tau["interval"] else ""
            parts.append(f"{number(tau['kendall_tau'])}{around} with {described}")
    if parts:
        yield f"Kendall's tau of attention by module is {listed(parts)}."


# ----------------------------------------------------------------------------------------------------------------------
# The map of the collection
# ----------------------------------------------------------------------------------------------------------------------


def _panel(panel: dict) -> str:
    """Return what the plane of all layers, or of a module alone, separates."""
    subject = "all layers" if panel["layers"] == "all" else f"{panel['layers']} alone"
    held = percent(sum(panel["explained"]))
    section = panel["separates"]
    reached = f"{percent(section['accuracy'])} % ({bounds(section['interval'])})"
    known = "" if section["above_null"] else ", indistinguishable from chance"
    return (
        f"In the plane of {subject}, which holds {held} % of the variance, {reached} of the test LoRAs lie nearest to "
        f"the mean of their own concept (guessing {percent(section['chance'])} %){known}; {_kinds(section)}."
    )


def _kinds(section: dict) -> str:
    """Return which concepts stand apart from all others, and which are merged."""
    distinct, merged = section["distinct"], section["merged"]
    parts = ["no concept stands apart from all others"]
    if distinct:
        verb = "stands" if len(distinct) == 1 else "stand"
        parts = [f"{_named(distinct)} {verb} apart from all others"]
    if merged:
        groups = [_named(group) for group in sorted(merged, key=len, reverse=True)[:NAMED]]
        more = f", and {counted(len(merged) - NAMED, 'more group')}" if len(merged) > NAMED else ""
        parts.append(f"merged are {'; '.join(groups)}{more}")
    else:
        parts.append("none are merged")
    return "; ".join(parts)


def _named(names: Sequence[str]) -> str:
    """Return names, or how many there are where they are many."""
    return listed(names) if len(names) <= NAMED + 1 else f"{len(names)} concepts"
