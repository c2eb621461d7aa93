"""No sentence contradicts another, a table, or the finding of a figure, in recorded results and in made ones.

A rule is a pair of claims: it reads what a reader reads, and holds one against the other. That rules see something is
tested too, by texts that contradict themselves.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import golden_store
import pytest
from record_golden import COLLECTIONS, RESAMPLES
from result_making import KNOWN, made

from report import cautions, figures, modules, sentences, tables

NO_LAYER = r"[Nn]o single layer is distinguishable from chance"
NONE_KNOWN = r"None of \d+ representations is distinguishable|None is best|^\S+ is indistinguishable from chance"


@dataclass(frozen=True)
class Said:
    """All that is said of results, by place: the five answers, cautions, controls, concepts, modules, findings."""

    layers: str
    robustness: str
    best: str
    information: str
    rank: str
    outcomes: tuple[str, ...]
    cautions: str
    first: str
    controls: str
    concepts: str
    modules: str
    findings: dict[str, str]
    tables: dict[str, tables.Table]


def said(results: dict) -> Said:
    answers, warned = sentences.answers(results), cautions.warnings(results)
    return Said(
        *(" ".join(answer.sentences) for answer in answers),
        tuple(answer.outcome for answer in answers),
        " ".join(caution.text for caution in warned),
        " ".join(cautions.first_lines(warned)),
        " ".join(cautions.checks(results)),
        " ".join(sentences.concept_lines(results)),
        " ".join(modules.module_lines(results)),
        figures.findings(results),
        tables.tables(results),
    )


def counts(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text)]


# ----------------------------------------------------------------------------------------------------------------------
# Rules: each returns what is wrong, or nothing
# ----------------------------------------------------------------------------------------------------------------------


def known_layers(text: Said) -> int:
    return next(iter(counts(r"^(\d+) of \d+ layers (?:is|are)", text.layers)), 0)


def layers_at_chance_are_called_so_everywhere(text: Said) -> str:
    known, total = known_layers(text), len(text.tables["ranking"].rows)
    if bool(re.match(NO_LAYER, text.layers)) != (known == 0):
        return "how many layers are known"
    if known < 2 and not text.information.startswith("Not shown"):
        return "layers carry different information, though none or one is above chance"
    if known == 0 and not re.search("Stability on this split, of an order that may be chance", text.layers):
        return "an order that is chance is called stable"
    if known == 0 and "though none is distinguishable from chance" not in text.concepts:
        return "single layers recognise concepts, though none is distinguishable from chance"
    if known == 0 and "though none is distinguishable from chance" not in text.findings.get("concept_layer_map", ""):
        return "the figure of concepts has layers that recognise some"
    beside = counts(rf"(\d+) of {total} layers (?:is|are) indistinguishable", text.cautions)
    if beside and beside != [total - known]:
        return "the caution counts other layers at chance"
    return ""


def layers_of_tables_and_figures_are_those_of_sentences(text: Said) -> str:
    known, ranking = known_layers(text), text.tables["ranking"]
    p = [row[ranking.columns.index("p")] for row in ranking.rows]
    if sum(float(cell.removeprefix("< ")) < 0.05 for cell in p) != known:
        return "the table has another number of layers with p < 0.05"
    if "blocks" in text.tables and sum(int(row[2]) for row in text.tables["blocks"].rows) != known:
        return "the blocks have another number of layers"
    shown = counts(r"^(\d+) of", text.findings["layer_importance"]) or [0]
    return "" if shown[0] == known else "the figure has another number of layers"


def the_best_is_above_chance_and_the_same_everywhere(text: Said) -> str:
    best = re.findall(
        r"(?:Best by validation accuracy|The only representation that was run) is ([\w-]+)"
        r"(?: \(equal there: [^)]*\))?:",
        text.best,
    )
    none = re.search(NONE_KNOWN, text.best)
    if bool(best) == bool(none):
        return "a best one, and none above chance"
    finding = text.findings["representations"]
    if best and (not finding.startswith((f"{best[0]} is best by validation", f"{best[0]}: "))):
        return "the figure has another best"
    if none and re.search(r"\bis best\b", finding.replace("None is best", "")):
        return "the figure has a best"
    if none and "The prediction may rest" in text.cautions:
        return "a caution has a prediction where there is none"
    over = re.findall(r"Over \d+ splits ([\w-]+) is best", text.best)
    behind = text.tables["splits"].columns[-1].removeprefix("behind ") if "splits" in text.tables else ""
    if best and behind and behind not in (best[0], *over):
        return "another one is best over splits, and no sentence says so"
    return ""


def what_is_not_worse_is_not_better(text: Said) -> str:
    for names in re.findall(r"not significantly worse than it (?:is|are) ([^.]+)\.", text.best, re.IGNORECASE):
        for name in re.split(r", | and ", names):
            row = next((row for row in text.tables["differences"].rows if row[0] == name), None)
            if row and re.match(r"\d+\.\d \((?!-)(?!0\.0 )", row[-2]) and p_of(row[-1]) < 0.05:
                return f"{name} is not worse, and the table has it behind"
            if row and re.match(r"-\d+\.\d \(-[\d.]+ to -", row[-2]) and p_of(row[-1]) < 0.05:
                return f"{name} is better, and only called not worse"
    return ""


def p_of(cell: str) -> float:
    return float(cell.removeprefix("< ")) if cell else 1.0


def a_hypothesis_that_holds_is_not_denied_by_a_sentence(text: Said) -> str:
    best = re.search(r"Best by validation accuracy is (ensemble|spectral):", text.best)
    equal = re.search(r"[Nn]ot significantly worse than it (?:is|are) [^.]*\bstats\b", text.best)
    if text.outcomes[2] == "confirmed" and best and equal:
        return "better than stats, which is not significantly worse"
    if text.outcomes[0] == "confirmed" and known_layers(text) == 0:
        return "later layers are more predictive, and none is"
    if text.outcomes[3] == "confirmed" and text.information.startswith("Not shown"):
        return "layers differ, which is not shown"
    return ""


def verdicts_go_with_losses(text: Said) -> str:
    row_of = {row[0]: row for row in text.tables["drops"].rows} if "drops" in text.tables else {}
    for name, verdict in verdicts(text).items():
        row = row_of.get(name)
        if row is None or "Without the top" not in text.best:
            continue
        loses = p_of(row[2]) < 0.05 and not row[1].startswith("-")
        if verdict == "redundant" and loses and f"{name} loses significantly, but" not in text.best:
            return f"{name} is redundant and loses"
        if verdict == "localized" and not loses and f"{name} is localized by a test of its own" not in text.best:
            return f"{name} is localized and loses nothing"
    return ""


def verdicts(text: Said) -> dict[str, str]:
    if "controls" not in text.tables:
        return {}
    table = text.tables["controls"]
    (row,) = (row for row in table.rows if row[0] == "verdict")
    return dict(zip(table.columns[1:], row[1:], strict=True))


def no_signal_is_nowhere_else_a_signal(text: Said) -> str:
    verdict_of = verdicts(text)
    names = [name for name, verdict in verdict_of.items() if verdict == "no signal"]
    if names and not re.search(NONE_KNOWN, text.best):
        return "no representation is distinguishable from chance, and one is best"
    for name in names:
        if re.search(rf"\bby {name} alone|By {name}, \d+ of \d+ modules", text.robustness):
            return f"modules of {name} are above chance"
    for name, verdict in verdict_of.items():
        if verdict in ("no signal", "unseen") and re.search(rf"is {name}:", text.best):
            return f"{name} is best, and its verdict is {verdict}"
    finding = text.findings.get("ablation_curves", "")
    first = next(iter(verdict_of.values()), "")
    return "" if first in finding else "the figure has another verdict"


def what_is_called_most_predictive_predicts(text: Said) -> str:
    for name in verdicts(text):
        told = re.search(rf"(?:^| ){re.escape(name)}(?:, in [^:]*)?: (with all .*?\.)(?= [A-Za-z]|$)", text.robustness)
        unknown = re.search(rf"by {re.escape(name)}[^.:]*: no single \w+ is above chance", text.robustness)
        if told and unknown and "most predictive" in told[1]:
            return f"the most predictive units of {name}, of which none is above chance"
    return ""


def numbers_that_are_said_twice_are_the_same(text: Said) -> str:
    needed = set(
        re.findall(r"the first would have to exceed ([\d.]+) %", " ".join([text.layers, text.cautions, text.controls]))
    )
    if len(needed) > 1:
        return f"needed: {needed}"
    honest = re.findall(r"where other test LoRAs choose the first layer, it reaches ([\d.]+ % \([^)]*\))", text.layers)
    together = re.findall(r"the first alone on ([\d.]+ % \([^)]*\))", text.information)
    if honest and together and honest != together:
        return f"the first layer where others choose: {honest}, {together}"
    ordinary = re.findall(r"The first of the ranking, .*?, reaches ([\d.]+) %", text.layers)
    alone = re.findall(r"the first alone on ([\d.]+) %:", text.information)
    if ordinary and alone and ordinary != alone:
        return f"the first layer: {ordinary}, {alone}"
    finding = text.findings.get("layer_clusters", "")
    shown = re.findall(r"the first alone on ([\d.]+) %", finding)
    others = re.findall(r"where other test LoRAs choose, at least", finding)
    if shown and shown[0] != (together[0].split(" ")[0] if others else alone[0]):
        return "the figure of clusters has the first layer at another accuracy"
    cka = set(re.findall(r"CKA of at least ([\d.]+)", text.information + finding))
    if len(cka) > 1:
        return f"similar: {cka}"
    cheap = re.findall(r"Cheap explanation: norms alone reach ([\d.]+ % \([^)]*\))", text.cautions)
    if cheap and f"Cheap explanation by norms: {cheap[0]}" not in text.controls:
        return "norms reach one accuracy in the cautions and another in the controls"
    return ""


def accuracies_under_removal_are_those_of_the_tables(text: Said) -> str:
    """Of other runs than the table of metrics they may be others, which is said. Made results draw them anew."""
    metrics = {row[0].split(" ")[0]: row[2].split(" ")[0] for row in text.tables["metrics"].rows}
    for name, whole in re.findall(r"(\S+): with all \d+ \w+ ([\d.]+) %", text.robustness):
        if name in metrics and metrics[name] != whole and not re.search(rf"{name}, in \d+ of the", text.robustness):
            return f"{name} with all layers: {whole} and {metrics[name]}"
    return ""


def a_representation_above_chance_alone_is_said_to_be(text: Said) -> str:
    for name in re.findall(r"the first by validation accuracy, (\S+), is indistinguishable", text.best):
        if re.search(rf"[Bb]y {name}[^.]*: with all layers the accuracy is above permuted labels", text.robustness):
            return "" if "as the only one it would be" in text.best else f"{name} is at chance, and above it"
    return ""


def shuffled_labels_agree_with_permuted_ones(text: Said) -> str:
    shuffled = re.search(r"Ranked again on shuffled labels.*?%: (.*?)\.(?= [A-Z]|$)", text.cautions)
    if (
        shuffled
        and known_layers(text)
        and "indistinguishable" in shuffled[1]
        and "all runs together" not in shuffled[1]
    ):
        return "layers above chance are indistinguishable from shuffled labels"
    if shuffled and not known_layers(text) and "more than" in shuffled[1] and "not confirm" not in shuffled[1]:
        return "no layer is above chance, and one is above shuffled labels"
    return ""


def attention_that_means_nothing_names_no_module(text: Said) -> str:
    if "do not agree on which modules" in text.modules and "Most attention is given to" in text.modules:
        return "runs do not agree on modules, and one has most"
    if "do not agree on which modules" in text.modules and "most on" in text.findings.get("attention", ""):
        return "runs do not agree on modules, and the figure has one"
    none = re.search(NONE_KNOWN, text.best) and "update_attention" in str(text.tables["metrics"].rows)
    if (
        none
        and "No single" in text.layers
        and text.modules
        and "update_attention, is indistinguishable" not in text.modules
    ):
        return "attention of a classifier at chance"
    return ""


def what_comes_first_stands_under_cautions_too(text: Said) -> str:
    units = re.findall(r"Only (\d+) ", text.first)
    if units != re.findall(r"Only (\d+) (?:groups of )?test LoRAs", text.cautions):
        return "another number of test LoRAs comes first"
    groups = "may be the" in text.first
    return "" if groups == ("What is predicted may be the" in text.cautions) else "groups come first, or only below"


RULES: dict[str, Callable[[Said], str]] = {
    rule.__name__: rule
    for rule in (
        layers_at_chance_are_called_so_everywhere,
        layers_of_tables_and_figures_are_those_of_sentences,
        the_best_is_above_chance_and_the_same_everywhere,
        what_is_not_worse_is_not_better,
        a_hypothesis_that_holds_is_not_denied_by_a_sentence,
        verdicts_go_with_losses,
        no_signal_is_nowhere_else_a_signal,
        what_is_called_most_predictive_predicts,
        numbers_that_are_said_twice_are_the_same,
        accuracies_under_removal_are_those_of_the_tables,
        a_representation_above_chance_alone_is_said_to_be,
        shuffled_labels_agree_with_permuted_ones,
        attention_that_means_nothing_names_no_module,
        what_comes_first_stands_under_cautions_too,
    )
}


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


@cache
def recorded(name: str) -> Said:
    return said(json.loads(golden_store.recorded(name, RESAMPLES)))


def made_up() -> dict[str, Callable[[], dict]]:
    """Results with planted truth, and some of which a part says otherwise than the rest."""

    def changed(change: Callable[[dict], object], **shape) -> Callable[[], dict]:
        def make() -> dict:
            results = made(**shape)
            change(results)
            return results

        return make

    def at_shuffled(results: dict) -> None:
        results["analysis"]["null_shuffles"] |= {"p": 0.9, "significant": False}

    def above_shuffled(results: dict) -> None:
        results["analysis"]["null_shuffles"] |= {"p": 0.01, "significant": True}

    def loses(results: dict) -> None:
        compared = results["analysis"]["representations"]
        compared["drops"]["stats"] |= {"drop": 0.03, "interval": [0.01, 0.05], "p": 0.01, "significant": True}
        compared["significant_losses"] = ["stats"]

    def keeps(results: dict) -> None:
        compared = results["analysis"]["representations"]
        compared["drops"]["stats"] |= {"drop": 0.03, "interval": [-0.01, 0.05], "p": 0.3, "significant": False}
        compared["significant_losses"] = []

    def another_is_better(results: dict) -> None:
        section = results["analysis"]["representations"]["conditions"]["baseline"]
        record = next(record for record in section["comparisons"] if record["a"] == section["best"])
        record |= {"difference": -0.2, "interval": [-0.3, -0.1], "p": 0.001, "significant": True}
        section["not_worse"] = sorted({*section["not_worse"], record["b"]})

    def runs_disagree(results: dict) -> None:
        results["analysis"]["attention"]["stability"]["kendall_w"] = 1 / results["analysis"]["attention"]["runs"]

    def first_at_chance(results: dict) -> None:
        results["analysis"]["layers"]["num_above_null_f1"] = 3

    def other_best_over_splits(results: dict) -> None:
        results["splits"]["best"] = "ensemble"

    return {
        **{kind: lambda kind=kind: made(kind) for kind in KNOWN},
        "one representation": lambda: made(names=("stats",)),
        "one layer removed": lambda: made("localized", top_k=1),
        "layers at shuffled labels": changed(at_shuffled),
        "none above chance, and above shuffled labels": changed(above_shuffled, kind="no signal"),
        "redundant, and loses": changed(loses),
        "localized, and keeps": changed(keeps, kind="localized"),
        "another is better": changed(another_is_better),
        "runs disagree": changed(runs_disagree),
        "above chance by macro-F1": changed(first_at_chance, kind="no signal"),
        "another is best over splits": changed(other_best_over_splits, splits=5),
    }


MADE = made_up()


@pytest.mark.parametrize("name", COLLECTIONS)
def test_nothing_recorded_contradicts_itself(name):
    assert [f"{rule}: {fault}" for rule, of in RULES.items() if (fault := of(recorded(name)))] == []


@pytest.mark.parametrize("name", MADE)
def test_nothing_made_up_contradicts_itself(name):
    text, recorded_only = said(MADE[name]()), "accuracies_under_removal_are_those_of_the_tables"
    faults = {rule: of(text) for rule, of in RULES.items() if rule != recorded_only}
    assert not any(faults.values()), faults


# ----------------------------------------------------------------------------------------------------------------------
# That the rules see something
# ----------------------------------------------------------------------------------------------------------------------

CONTRADICTING = {  # rule -> collection, and what is said instead
    "layers_at_chance_are_called_so_everywhere": ("nothing", {"concepts": "A layer recognises cat best (90.0 %)."}),
    "layers_of_tables_and_figures_are_those_of_sentences": ("nothing", {"layers": "3 of 16 layers are above chance."}),
    "the_best_is_above_chance_and_the_same_everywhere": ("nothing", {"best": "Best by validation accuracy is pca: 3."}),
    "what_is_not_worse_is_not_better": ("one_layer", {"best": "Not significantly worse than it are vae and stats."}),
    "a_hypothesis_that_holds_is_not_denied_by_a_sentence": ("fifty_classes", {
        "best": "Best by validation accuracy is spectral: 29 %. Not significantly worse than it is stats."}),
    "no_signal_is_nowhere_else_a_signal": ("nothing", {"best": "Best by validation accuracy is pca: 30 %."}),
    "what_is_called_most_predictive_predicts": ("fifty_classes", {
        "robustness": "Undecided by stats: no single layer is above chance. stats: with all 9 %, without the most "
        "predictive layer 3 %."}),
    "numbers_that_are_said_twice_are_the_same": ("small_full", {"layers": "The first of the ranking, a, reaches 9 %."}),
    "accuracies_under_removal_are_those_of_the_tables": ("nothing", {"robustness": "stats: with all 16 layers 9.0 %."}),
    "a_representation_above_chance_alone_is_said_to_be": ("unbalanced", {
        "best": "None is best: the first by validation accuracy, stats, is indistinguishable from chance."}),
    "shuffled_labels_agree_with_permuted_ones": ("small_full", {
        "cautions": "Ranked again on shuffled labels, 9 %: indistinguishable from shuffled labels."}),
    "attention_that_means_nothing_names_no_module": ("small_full", {
        "modules": "The runs do not agree on which modules get attention. Most attention is given to a."}),
    "what_comes_first_stands_under_cautions_too": ("small_full", {"first": ""}),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_sees_a_contradiction(rule):
    if rule == "verdicts_go_with_losses":
        text = said(MADE["redundant, and loses"]())
        other = {"best": text.best.replace("stats loses significantly, but", "")}
    else:
        name, other = CONTRADICTING[rule]
        text = recorded(name)
    assert not RULES[rule](text) and RULES[rule](replace(text, **other))
