"""The answers to the experiment's questions in sentences, from the content of results.json.

Written once for results.txt (text.py) and report.html (page.py). What belongs beside them stands in cautions.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from report.cautions import BEYOND_REMOVAL
from report.paired import paired_sentences
from report.sentences_of_structure import different_information, rank_matters
from report.wording import (
    accuracy_text,
    bounds,
    capital,
    change_text,
    counted,
    first_removed,
    left_text,
    listed,
    needed_text,
    number,
    p_text,
    percent,
    runs_text,
    sentence,
    spread_text,
    top_layers,
)

VERDICTS = {
    "localized": "less than half of the accuracy above chance is left without the most predictive (the top k, or a "
    "tenth of all where that is more), and removing as many random others costs less",
    "distributed": "more than half of the accuracy above chance is left without the most predictive (the top k, or a "
    "tenth of all where that is more), but less than nine tenths at some point until half of all are removed",
    "redundant": "nine tenths or more of the accuracy above chance are left until the most predictive half is removed",
    "no signal": "nothing that was tested is distinguishable from chance, so what a removal takes cannot be judged",
    "unseen": "this representation shows less with all layers than other representations or the top layers alone "
    "do, so its removals cannot be judged",
    "undecided": "none of the other verdicts is shown",
}
RANKED_BY = "stats"  # the representation by which layers are ranked
MANY = 6  # names in a sentence, from which on they are counted
NAMED_MODULES = 3  # names of modules in a sentence, at most


@dataclass(frozen=True)
class Question:
    """A question of the experiment, a row of ``QUESTIONS``.

    Attributes:
        key: Name of its section in ``analysis``, which its hypothesis names too.
        anchor: Name of its section in report.html.
        text: The question.
        sentences: Function of the results that yields the answer; its first two sentences say what matters most.
        unit: Unit of the number that its hypothesis rests on: ``%``, ``points`` or none.
    """

    key: str
    anchor: str
    text: str
    sentences: Callable[[dict], Iterator[str]]
    unit: str


@dataclass(frozen=True)
class Answer:
    """The answer to a question, and the outcome of its hypothesis.

    Attributes:
        anchor: Name of its section in report.html.
        question: The question.
        sentences: The answer, with its numbers; the first two say what matters most.
        hypothesis: What was expected.
        outcome: confirmed, refuted, undecided or not answerable.
        evidence: The number and interval that the outcome rests on, or why there is none.
    """

    anchor: str
    question: str
    sentences: list[str]
    hypothesis: str
    outcome: str
    evidence: str


def answers(results: dict) -> list[Answer]:
    """Return an answer to each of ``QUESTIONS``, in their order; none where no analysis was made."""
    if not (analysis := results.get("analysis")):
        return []
    hypothesis_of = {hypothesis["question"]: hypothesis for hypothesis in analysis["hypotheses"]}
    return [_answer(results, question, hypothesis_of[question.key]) for question in QUESTIONS]


def _answer(results: dict, question: Question, hypothesis: dict) -> Answer:
    return Answer(
        anchor=question.anchor,
        question=question.text,
        sentences=list(question.sentences(results)),
        hypothesis=capital(hypothesis["hypothesis"]),
        outcome=hypothesis["outcome"],
        evidence=_evidence(hypothesis, question.unit),
    )


def _evidence(hypothesis: dict, unit: str) -> str:
    why = hypothesis["why"].rstrip(".")
    if hypothesis["number"] is None:
        return sentence(why)
    shown = percent if unit else number
    value = f"{shown(hypothesis['number'])} {unit}".rstrip()
    evidence = f"{hypothesis['measure']}: {value} ({bounds(hypothesis['interval'], shown)})"
    return sentence(f"{evidence}; {why}" if why else evidence)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Which layers predict?
# ----------------------------------------------------------------------------------------------------------------------


def _which_layers(results: dict) -> Iterator[str]:
    section, ranking, k = results["analysis"]["layers"], results["layer_ranking"], results["config"]["top_k"]
    known = section["num_above_null"]
    record_of = {record["layer"]: record for record in section["records"]}
    first = record_of[ranking[0]["layer"]]
    yield _layers_above(results)
    yield f"The first of the ranking, {first['layer']}, reaches {_reached(results, first)}."
    roles = section["groups"].get("role", {})
    if len(roles) == 2:
        means = [
            f"{role} factors reach {percent(group['mean'])} % ({bounds(group['interval'])})"
            for role, group in roles.items()
        ]
        yield f"On average, {listed(means)}."
    shares = [record_of[record["layer"]]["top_k_share"] for record in ranking[:k]]
    redrawn = " to ".join(dict.fromkeys((percent(min(shares)), percent(max(shares)))))
    top = "the first layer stays first" if k == 1 else f"each of the top {k} stays among the top {k}"
    subject = "Stability on this split" if known else "Stability on this split, of an order that may be chance"
    yield f"{subject}: {_stability(section, k)}; with the test LoRAs resampled, {top} in {redrawn} % of the draws."
    yield from _tied_at_the_end(results)
    yield from over_splits(results)


def _tied_at_the_end(results: dict) -> Iterator[str]:
    """Yield that the last of the top k and the next are equal, where they are."""
    ranking, k = results["layer_ranking"], results["config"]["top_k"]
    by_test = results["config"]["rank_by"] == "test"
    metric, part = ("accuracy", "test") if by_test else ("val_accuracy", "validation")
    if k < len(ranking) and ranking[k - 1][metric] == ranking[k][metric]:
        deciding = "validation accuracy, then validation loss," if by_test else "validation loss"
        yield (
            f"The layers of ranks {k} and {k + 1} have the same {part} accuracy: {deciding} decides which of them is "
            f"among {top_layers(k)}."
        )


def _layers_above(results: dict) -> str:
    """Return how many layers are distinguishable from chance, and how many are above always guessing one class."""
    analysis, total = results["analysis"], len(results["layer_ranking"])
    section, largest = analysis["layers"], percent(results["analysis"]["layers"]["chance"])
    known, above = section["num_above_null"], section["num_above_chance"]
    by_f1, by = "", ""
    if (count := section["num_above_null_f1"]) is not None:
        by_f1 = (
            f" By macro-F1, which counts every class alike, {count or 'none'} of {total} {_are(count)} distinguishable "
            "from chance."
        )
        by = " by accuracy" if count and not known else ""
    if known == 0:
        alone = f"No single layer is distinguishable from chance{by} ({largest} %)"
        return f"{alone}; among {total} the first {needed_text(section['needed'], section['chance'])}.{by_f1}"
    family = f"p < {analysis['alpha']}, corrected for the choice among all layers"
    if above == known:
        return f"{known} of {total} layers {_are(known)} above chance ({largest} %; {family}).{by_f1}"
    right = f"shown to be right more often than always guessing the largest class ({largest} %)"
    shown = f"only {above} of them {_are(above)} {right}"
    if above == 0:
        shown = f"{'none of them is' if known > 1 else 'it is not'} {right}"
    return f"{known} of {total} layers {_are(known)} distinguishable from chance ({family}), but {shown}.{by_f1}"


def _are(count: int) -> str:
    return "are" if count > 1 else "is"


def _reached(results: dict, first: dict) -> str:
    """Return the accuracy of the first layer on the test LoRAs that chose it, and the honest one beside it."""
    ordinary = f"{accuracy_text(first)[:-1]}, {p_text(first['p_family'])})"
    any_above = results["analysis"]["layers"]["num_above_null"] > 0
    if results["config"]["rank_by"] != "test":
        alone = ", itself indistinguishable from chance" if any_above and not first["above_null"] else ""
        return ordinary + alone
    crossed = results["analysis"]["cross_fitted"]
    if crossed["why"]:
        return f"{ordinary} on the test LoRAs that chose it"
    honest = accuracy_text(crossed["first"])
    if any_above and not crossed["first"]["above_null"]:
        honest += ", indistinguishable from chance: which layer is first is not settled"
    elif any_above and crossed["first"]["accuracy"] > results["chance"]["accuracy"]:
        # It may be less than the first among all layers would need: these LoRAs did not choose among any.
        honest += f", distinguishable from chance ({p_text(crossed['first']['p'])}, uncorrected)"
    others = "where other test LoRAs choose the first layer, it reaches"
    return f"{ordinary} on the test LoRAs that chose it; {others} {honest}"


def _stability(section: dict, k: int) -> str:
    concordance, rankings = section["stability"], section["rankings"]
    parts = []
    if concordance["kendall_w"] is not None:
        agreement = number(concordance["kendall_w"])
        parts.append(f"Kendall's W over {concordance['runs']} runs is {agreement} (1: the same ranking)")
    if rankings["kendall_tau"] is not None:
        parts.append(f"Kendall's tau of the rankings by test and by validation is {number(rankings['kendall_tau'])}")
    same = "they have the same first layer" if rankings["same_top_k"] else "their first layers differ"
    if k > 1:
        same = f"their top {k} have {rankings['same_top_k']} in common"
    return ", ".join([*parts, same if rankings["kendall_tau"] is not None else f"by test and by validation {same}"])


def over_splits(results: dict) -> Iterator[str]:
    """Yield how much of the ranking other splits repeat."""
    if not (splits := results["splits"]):
        return
    k, parts = results["config"]["top_k"], []
    if splits["kendall_w"] is not None:
        parts.append(f"Kendall's W is {number(splits['kendall_w'])}")
    if splits["kendall_tau"] is not None:
        parts.append(f"Kendall's tau of two splits {number(splits['kendall_tau'])} on average")
    if splits["same_top_k"] is not None:
        shared = f"{splits['same_top_k']:.1f} of their top {k}"
        if k == 1:
            shared = f"the first layer in {percent(splits['same_top_k'])} % of cases"
        parts.append(f"two splits share {shared} on average" if k > 1 else f"two splits share {shared}")
    if splits["first"]:
        reached = spread_text(splits["first"])
        parts.append(
            f"the first layer of the first split reaches {reached} on the others, on LoRAs that did not rank it"
        )
    if parts:
        yield f"Over {counted(splits['splits'], 'split')}: {'; '.join(parts)}."


# ----------------------------------------------------------------------------------------------------------------------
# 2. Is prediction robust to removing them?
# ----------------------------------------------------------------------------------------------------------------------


def _is_robust(results: dict) -> Iterator[str]:
    sections = results["analysis"]["robustness"]
    if not sections:
        yield from _no_verdict(results)
        return
    names_of: dict[tuple[str, str], list[str]] = {}
    for name, section in sections.items():
        runs = runs_text(results, name)
        verdict = (section["verdict"], section["why"].rstrip("."))
        names_of.setdefault(verdict, []).append(f"{name} (in {runs})" if runs else name)
    yield " ".join(f"{capital(verdict)} by {listed(names)}: {why}." for (verdict, why), names in names_of.items())
    yield from _beats_all(results)
    for name, section in sections.items():
        runs = runs_text(results, name)
        yield f"{name}{f', in {runs}' if runs else ''}: {_removals(section)}"
        yield from _modules_above(name, section)
        yield from _concentration(name, section)


def _beats_all(results: dict) -> Iterator[str]:
    """Yield that fewer layers are right more often than all, against which what survives is measured."""
    records, k = results["analysis"]["cross_fitted"]["beats_all"] or {}, results["config"]["top_k"]
    chosen_by = "other test" if results["config"]["rank_by"] == "test" else "validation"
    subjects = {"first": "The first layer alone is", "top_alone": f"{capital(top_layers(k))} alone are"}
    if k == 1:
        subjects["top_alone"] = ""  # it is the first layer
    for name, subject in subjects.items():
        record = records.get(name)
        if subject and record and record["interval"][0] > 0:
            yield (
                f"{subject} right more often than all layers together by {RANKED_BY}: by "
                f"{percent(record['difference'])} points ({bounds(record['interval'])}, chosen by {chosen_by} LoRAs); "
                "what a removal leaves is measured against all layers."
            )


def _removals(section: dict) -> str:
    """Return accuracies with all units, and without some.

    A single layer alone has been trained before, from other initial weights: this accuracy may be another one.
    """
    random, unit, total, removed = section["without_random"], section["unit"], section["units"], section["removed"]
    parts = [f"with all {counted(total, unit)} {accuracy_text(section['all'])}"]
    parts.append(f"without the {first_removed(removed, section)} {left_text(section['without_top'])}")
    if section["most"] > removed:
        parts.append(f"without the {first_removed(section['most'], section)} {left_text(section['without_most'])}")
    others = f"there are no {section['most']} others to remove instead"
    drawn = "a random other" if section["most"] == 1 else f"{section['most']} random others"
    if random["draws"] == 1:
        others = f"without {drawn} {percent(random['mean'])} % (one draw)"
    elif random["draws"]:
        spread = f"which range from {bounds((random['min'], random['max']))}"
        if random["min"] == random["max"]:
            spread = "all alike"
        others = f"without {drawn} {percent(random['mean'])} % (mean of {random['draws']} draws, {spread})"
    parts.append(others)
    alone = f"with the {first_removed(removed, section)} alone"
    if unit == "layer" and removed == 1:
        alone += ", trained again,"
    return f"{', '.join(parts)}; {alone} {left_text(section['top_alone'])}."


def _modules_above(name: str, section: dict) -> Iterator[str]:
    """Yield which modules are the most predictive, where some alone are above chance; layers are in the ranking."""
    if section["unit"] == "module" and (count := section["units_above"]):
        first = section["order"][: min(count, NAMED_MODULES)]
        names = f"the first by validation {_are(len(first))} {listed(first)}"
        yield f"By {name}, {count} of {section['units']} modules {_are(count)} above chance alone; {names}."


def _concentration(name: str, section: dict) -> Iterator[str]:
    """Yield how many units hold half of what is above chance, and what is left without the least predictive."""
    gone, left, unit = section["half_gone"], section["left_without_least"], section["unit"]
    if left is None or left["interval"] is None:
        return
    half = f"more than half of the accuracy above chance is left as long as any {unit} is"
    if gone is not None:
        without = f"{first_removed(gone, section)} of {section['units']}"
        half = f"half of the accuracy above chance is gone without the {without}"
    least = f"least predictive {unit}" if left["removed"] == 1 else f"{left['removed']} least predictive {unit}s"
    yield (
        f"By {name}, {half} (an estimate without an interval); without the {least} the accuracy above chance is "
        f"{percent(left['share'])} % ({bounds(left['interval'])}) of that with all."
    )


def _no_verdict(results: dict) -> Iterator[str]:
    """Yield the effect of the removal on the best representation and on that of the ranking, and why no verdict."""
    analysis = results["analysis"]
    compared, k = analysis["representations"], results["config"]["top_k"]
    baseline, drops = (compared["conditions"]["baseline"], compared["drops"]) if compared else (None, {})
    names = [name for name in dict.fromkeys((baseline and baseline["best"], RANKED_BY)) if name in drops]
    if baseline and not baseline["above_null"]:
        yield "With all layers no representation is distinguishable from chance, so there is nothing to lose."
    elif names:
        yield f"Without {top_layers(k)} {listed([f'{name} {change_text(drops[name])}' for name in names])}."
    if failed := [name for name in analysis["controls_not_run"] if name not in BEYOND_REMOVAL]:
        yield f"No verdict: the controls of {listed(failed)}, on which it would rest, could not be run."
    else:
        yield "No verdict: no other layers were removed to compare with; --controls=basic removes them."


# ----------------------------------------------------------------------------------------------------------------------
# 3. Which representation is best?
# ----------------------------------------------------------------------------------------------------------------------


def _best_representation(results: dict) -> Iterator[str]:
    compared = results["analysis"]["representations"]
    if not compared:
        yield "No representation was run."
        return
    section, chance = compared["conditions"]["baseline"], f"{percent(results['chance']['accuracy'])} %"
    best, drops = section["best"], compared["drops"]
    if best is None:
        if len(drops) == 1:
            name = next(iter(drops))
            needed = needed_text(section["needed"], results["chance"]["accuracy"])
            yield f"{name} is indistinguishable from chance ({chance}) with all layers: it {needed}."
        else:
            yield from _none_best(results)
        return
    yield _best_reached(results)
    if len(drops) > 1:
        yield from _compared_with_best(results)
    yield from paired_sentences(results)
    yield from _without_top(results)
    yield from _best_over_splits(results)


def _none_best(results: dict) -> Iterator[str]:
    """Yield why none of several representations is called the best."""
    section = results["analysis"]["representations"]["conditions"]["baseline"]
    accuracy, chance = _accuracies(results, "baseline"), percent(results["chance"]["accuracy"])
    chosen, others = section["chosen"], section["above_null"]
    reached = f"reaches {percent(accuracy[chosen])} % ({bounds(section['intervals'][chosen])})"
    needed = f"among {len(accuracy)} representations {needed_text(section['needed'], results['chance']['accuracy'])}"
    if not others:
        yield (
            f"None of {len(accuracy)} representations is distinguishable from chance ({chance} %) with all layers, so "
            f"none is best. The first by validation accuracy, {chosen}{_tied(section)}, {reached} and {needed}"
            f"{_alone(results, chosen)}."
        )
        return
    them = "it" if len(others) == 1 else "them"
    yield (
        f"None is best: the first by validation accuracy, {chosen}{_tied(section)}, is indistinguishable from chance "
        f"({chance} %) with all layers: it {reached} and {needed}{_alone(results, chosen)}. Distinguishable from "
        f"chance {_are(len(others))} {listed(others)}, but validation does not choose {them}."
    )


def _tied(section: dict) -> str:
    """Return which others have the validation accuracy of the chosen one, behind its name; a few are named."""
    if not (tied := section["tied_on_validation"]):
        return ""
    return f" (equal there: {listed(tied) if len(tied) < MANY else f'{len(tied)} others'})"


def _alone(results: dict, name: str) -> str:
    """Return that a representation would be above chance if it were the only one, as the end of a sentence."""
    section = results["analysis"]["robustness"].get(name)
    if not section or section["all"]["p"] >= results["analysis"]["alpha"]:
        return ""
    return f" (as the only one it would be, {p_text(section['all']['p'])})"


def _best_reached(results: dict) -> str:
    """Return the accuracy of the best representation, and what else may explain it."""
    compared, accuracy = results["analysis"]["representations"], _accuracies(results, "baseline")
    section, chance = compared["conditions"]["baseline"], percent(results["chance"]["accuracy"])
    best = section["best"]
    chosen = "Best by validation accuracy is" if len(accuracy) > 1 else "The only representation that was run is"
    line = f"{chosen} {best}{_tied(section)}: {percent(accuracy[best])} % ({bounds(section['intervals'][best])})"
    line += f" of the test LoRAs, where chance is {chance} %"
    if not section["best_above_chance"]:
        line += (
            f"; it is distinguishable from chance ({p_text(section['p_family'][best])}), but not shown to be right "
            "more often than always guessing the largest class"
        )
    groups = results["analysis"]["groups"]
    if groups and groups["may_be_groups"]:
        line += f"; what it predicts may be the {groups['column']} and not the concept"
    return f"{line}."


def _compared_with_best(results: dict) -> Iterator[str]:
    """Yield how far the best representation is ahead of the others."""
    section = results["analysis"]["representations"]["conditions"]["baseline"]
    accuracy, best, by_test = _accuracies(results, "baseline"), section["best"], section["best_by_test"]
    records = {record["b"]: record for record in section["comparisons"] if record["a"] == best}
    others = [name for name in accuracy if name != best]
    better = [name for name, record in records.items() if record["significant"] and record["difference"] < 0]
    not_worse = [name for name in section["not_worse"] if name not in better]
    worse = [name for name in others if name not in (*not_worse, *better)]
    if better:
        verb = "is" if len(better) == 1 else "are"
        yield f"On the test LoRAs {_all_of(better)} {verb} significantly better, which validation did not show."
    if not_worse and not worse:
        yield f"Not significantly worse than it {_are(len(not_worse))} {_all_of(not_worse)}."
    elif worse and not not_worse:
        yield f"It is significantly better than {_all_of(worse)}."
    elif worse:
        counted_worse = listed(worse) if len(worse) < MANY else f"{len(worse)} of {len(others)} others"
        yield (
            f"It is significantly better than {counted_worse}; not significantly worse than it {_are(len(not_worse))} "
            f"{listed(not_worse)}."
        )
    if section["ties"]:
        yield f"{listed([best, *section['ties']])} are right on equally many test LoRAs."
    if by_test != best and accuracy[by_test] > accuracy[best]:
        yield f"The highest test accuracy is that of {by_test}, with {percent(accuracy[by_test])} %."
    second = max(others, key=accuracy.get)
    if second not in section["ties"]:
        record = records[second]
        ahead = "ahead of" if record["difference"] > 0 else "behind"
        interval = record["interval"] if record["difference"] > 0 else [-bound for bound in record["interval"][::-1]]
        yield (
            f"By test accuracy {best} is {ahead} {second} by {percent(abs(record['difference']))} points "
            f"({bounds(interval)}, {p_text(record['p'])}; intervals and p hold for all these comparisons together)."
        )


def _all_of(names: list[str]) -> str:
    return listed(names) if len(names) < MANY else f"all {len(names)} others"


def _without_top(results: dict) -> Iterator[str]:
    """Yield what the best representation loses by the removal of the top layers, and which is best without these."""
    analysis, k = results["analysis"], results["config"]["top_k"]
    compared, best = analysis["representations"], analysis["representations"]["conditions"]["baseline"]["best"]
    drops, left = compared["drops"], _accuracies(results, "ablation")
    if analysis["robustness"]:  # else the second answer says it
        yield f"Without {top_layers(k)} {best} {change_text(drops[best])}{_crossed_drop(results, best)}."
        yield from _beside_the_verdict(results)
    if len(drops) > 1:
        losses, crossed = len(compared["significant_losses"]), analysis["cross_fitted"]["drops"]
        lost = sum(drop["significant"] and drop["drop_cf"] > 0 for drop in crossed.values())
        honest = f"; where other test LoRAs choose the layers, {lost or 'none'}" if crossed else ""
        yield (
            f"Of {len(drops)} representations {losses or 'none'} {'lose' if losses > 1 else 'loses'} significantly by "
            f"removing {top_layers(k)}{honest}."
        )
    section = compared["conditions"]["ablation"]
    if not section["above_null"]:
        yield f"Without {top_layers(k)} no representation is distinguishable from chance."
    elif section["best"] is None:
        known = section["above_null"]
        yield (
            f"Without {top_layers(k)} {listed(known)} {_are(len(known))} distinguishable from chance, but the first by "
            f"validation accuracy, {section['chosen']}{_tied(section)}, is not."
        )
    elif len(drops) > 1:
        yield (
            f"Without {top_layers(k)} the best by validation accuracy is {section['best']}{_tied(section)}, with "
            f"{percent(left[section['best']])} % ({bounds(section['intervals'][section['best']])})."
        )


def _beside_the_verdict(results: dict) -> Iterator[str]:
    """Yield how losses by the top layers go together with verdicts that seem to say otherwise."""
    analysis = results["analysis"]
    compared, robustness = analysis["representations"], analysis["robustness"]
    for name, section in robustness.items():
        loses = name in compared["significant_losses"]
        if section["verdict"] == "redundant" and loses:
            yield f"{name} loses significantly, but keeps nine tenths or more of its accuracy above chance (redundant)."
        if section["verdict"] == "localized" and name in compared["drops"] and not loses:
            yield f"{name} is localized by a test of its own; here all representations are tested together."
    if removed := next((section["removed"] for section in robustness.values() if section["unit"] == "module"), 0):
        layers_of = Counter(record["module"] for record in results["layer_ranking"])
        top = {record["module"] for record in results["layer_ranking"][: results["config"]["top_k"]]}
        taken = sum(layers_of[module] == 2 for module in top)  # the down and the up
        if taken != removed:
            those = "their first one" if removed == 1 else f"their first {removed}"
            yield (
                f"With {top_layers(results['config']['top_k'])} representations of whole modules lose "
                f"{counted(taken, 'module')}; the removals of question 2 take {those} by validation."
            )


def _crossed_drop(results: dict, name: str) -> str:
    """Return the drop where the removed layers are chosen on other test LoRAs, as the end of a sentence."""
    crossed = results["analysis"]["cross_fitted"]
    drop = (crossed["drops"] or {}).get(name)
    if drop is None:
        return ""
    changed = change_text(drop | {"drop": drop["drop_cf"]})
    return f" where the same test LoRAs choose the layers to remove; where others do, it {changed}"


def _accuracies(results: dict, condition: str) -> dict[str, float]:
    """Return the mean test accuracy of the representations that were run with and without the top layers."""
    section = results["analysis"]["representations"]["conditions"][condition]
    return {name: results[f"{condition}_results"][name]["test_accuracy"]["mean"] for name in section["intervals"]}


def _best_over_splits(results: dict) -> Iterator[str]:
    """Yield what the best representation reaches and loses over all splits."""
    splits, best = results["splits"], results["analysis"]["representations"]["conditions"]["baseline"]["best"]
    if splits and best in splits["representations"]:
        record, k = splits["representations"][best], results["config"]["top_k"]
        if splits["best"] != best:
            first = spread_text(splits["representations"][splits["best"]]["baseline"])
            yield f"Over {counted(splits['splits'], 'split')} {splits['best']} is best, with {first}."
        yield (
            f"Over {counted(splits['splits'], 'split')} {best} reaches {spread_text(record['baseline'])}, and without "
            f"{top_layers(k)} of each {spread_text(record['ablation'])}; the drop is "
            f"{spread_text(record['drop'], 'points')}."
        )


QUESTIONS = (
    Question("layers", "layers", "Which layers predict?", _which_layers, ""),
    Question("robustness", "robustness", "Is prediction robust to removing them?", _is_robust, "%"),
    Question("representations", "representations", "Which representation is best?", _best_representation, "points"),
    Question("layer_information", "information", "Do layers carry different information?", different_information, ""),
    Question("rank_structure", "rank", "Does rank structure matter?", rank_matters, ""),
)


# ----------------------------------------------------------------------------------------------------------------------
# Concepts
# ----------------------------------------------------------------------------------------------------------------------


def concept_lines(results: dict) -> list[str]:
    """Return which concepts are recognised best and worst, and which lose most; none without an analysis."""
    if not (analysis := results.get("analysis")):
        return []
    section, compared, k = analysis["concepts"], analysis["representations"], results["config"]["top_k"]
    names = section["classes"]
    alone = {  # of the concepts that have a test LoRA
        name: max(recall)
        for name, recall in zip(names, zip(*section["recall"], strict=True), strict=True)
        if None not in recall
    }
    chance = "" if analysis["layers"]["num_above_null"] else ", and though none is distinguishable from chance"
    lines = [
        f"The single layer that recognises a concept best, which the choice by these test LoRAs flatters{chance}, "
        f"recognises {_ends(alone)}."
    ]
    best = compared["conditions"]["baseline"]["best"] if compared else None
    if best:
        recall, drop = (dict(zip(names, section[key][best], strict=True)) for key in ("baseline", "drop"))
        most = max(alone, key=lambda name: drop[name])
        lost = f"takes most from {most} ({percent(drop[most])} points)" if drop[most] > 0 else "costs none of them"
        ends = _ends({name: recall[name] for name in alone})
        lines.append(f"With all layers {best} recognises {ends}; removing {top_layers(k)} {lost}.")
    return lines


def _ends(recall: dict[str, float]) -> str:
    """Return the concepts of the highest and the lowest recall."""
    best, worst = max(recall, key=recall.get), min(recall, key=recall.get)
    if recall[best] == recall[worst]:
        return f"all equally well ({percent(recall[best])} %)"
    return f"{best} best ({percent(recall[best])} %) and {worst} worst ({percent(recall[worst])} %)"
