"""Each outcome of an analysis becomes the sentence it should, with the numbers of results.json and no others.

Wording is not tested here, but numbers, which of several sentences is taken, and that all are whole.
"""

import re

import numpy as np
import pytest
from result_making import CLASS_NAMES, KNOWN, LAYERS, TOP_K, faults, made, unwrapped, without_pairs

from analysis import questions
from analysis.evidence import Evidence, Predictions
from loras.lora_files import Layer
from report import cautions, figures, modules, sentences, tables, text, wording
from report.text import render_text as text_of


def answer(results: dict, anchor: str) -> sentences.Answer:
    return next(given for given in sentences.answers(results) if given.anchor == anchor)


def said(results: dict, anchor: str) -> str:
    return " ".join(answer(results, anchor).sentences)


def baseline(results: dict) -> dict:
    return results["analysis"]["representations"]["conditions"]["baseline"]


def numbers(value) -> list[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


# ----------------------------------------------------------------------------------------------------------------------
# All answers
# ----------------------------------------------------------------------------------------------------------------------


def without_representations(results: dict) -> None:
    results["analysis"] |= {"representations": None, "robustness": {}}
    results["analysis"]["cross_fitted"]["drops"] = {}
    results["analysis"]["rank_structure"]["complexity"]["recall_by"] = None


def by_validation(results: dict) -> None:
    results["config"]["rank_by"] = "val"
    crossed = results["analysis"]["cross_fitted"]
    crossed |= dict.fromkeys(crossed) | {"why": "the layers are ranked by validation", "drops": {}, "not_run": {}}


def of_modules(results: dict) -> None:
    robustness = results["analysis"]["robustness"]
    robustness["pairs"] = robustness["stats"] | {"unit": "module", "units": 6, "removed": 1, "most": 1}


def gradients_unknown(results: dict) -> None:
    results["analysis"]["attribution"] |= {"spearman": None, "interval": None, "p": None}


CASES = {
    **{kind: ({"kind": kind, "splits": 3}, None) for kind in KNOWN},
    "one layer removed": ({"top_k": 1, "splits": 5}, None),
    "one layer removed, localized": ({"kind": "localized", "top_k": 1}, None),
    "one representation": ({"names": ("stats",), "splits": 2}, None),
    "one representation, no signal": ({"names": ("stats",), "kind": "no signal"}, None),
    "rank one": ({"answerable": False}, None),
    "no representation": ({}, without_representations),
    "ranked by validation": ({}, by_validation),
    "modules": ({}, of_modules),
    "no attribution": ({}, gradients_unknown),
}


@pytest.mark.parametrize(("shape", "change"), CASES.values(), ids=CASES)
def test_every_sentence_is_whole_and_has_no_missing_number(shape, change):
    results = made(**shape)
    if change:
        change(results)
    answers = sentences.answers(results)
    written = [line for given in answers for line in (*given.sentences, given.evidence, given.hypothesis + ".")]
    warned = cautions.warnings(results)
    written += [caution.text for caution in warned] + cautions.first_lines(warned) + cautions.checks(results)
    written += sentences.concept_lines(results)
    written += modules.module_lines(results)
    assert len(answers) == 5 and all(given.sentences for given in answers)
    for line in written:
        assert line.endswith(".") and not line.endswith("..") and "  " not in line and not faults(line), line
    for line in figures.findings(results).values():
        assert not line.endswith(".") and "  " not in line and not faults(line), line
    for table in tables.tables(results).values():
        assert not any(faults(cell) for row in (table.columns, *table.rows, [table.note]) for cell in row)
    assert not faults(text.render_text(results))


@pytest.mark.parametrize("shape", [{"splits": 5}, {"kind": "unseen", "splits": 3}, {"kind": "localized", "top_k": 1}])
def test_every_number_of_the_answers_is_one_of_results(shape):
    results = made(**shape)
    known = [n for part in ("analysis", "splits", "layer_ranking", "baseline_results", "ablation_results", "chance")
             for n in numbers(results[part])]  # fmt: skip
    known += [1 - results["analysis"]["layer_information"]["clusters"]["threshold"]]
    shown = {f"{scale * value + 0.0:.{digits}f}" for value in known for scale, digits in ((100, 1), (1, 2), (-100, 1))}
    shown |= {f"{value:.1f}" for value in known} | {f"{value:.2g}" for value in known}
    shown |= {"0.05", "0.0001"}  # the level of significance, and the least p that is written
    for given in sentences.answers(results):
        for line in [*given.sentences, given.evidence]:
            for cell in re.findall(r"-?\d+\.\d+", line.replace(results["layer_ranking"][0]["layer"], "")):
                assert cell in shown or cell.removeprefix("-") in ("0.0", "0.00"), line


def test_hypotheses_keep_their_outcome_number_and_interval():
    results = made()
    records = results["analysis"]["hypotheses"]
    for outcome in ("confirmed", "refuted", "undecided"):
        for record in records:
            record |= {"outcome": outcome, "number": 0.1234, "interval": [-0.00001, 0.5678], "why": "because"}
        given = sentences.answers(results)
        assert [answer.outcome for answer in given] == [outcome] * 5
        assert [answer.hypothesis.lower() for answer in given] == [record["hypothesis"].lower() for record in records]
        plain, share, points = (given[i].evidence for i in (0, 1, 2))
        assert plain.endswith(" 0.12 (0.00 to 0.57); because.")
        assert share.endswith(" 12.3 % (0.0 to 56.8); because.")
        assert points.endswith(" 12.3 points (0.0 to 56.8); because.")
        assert all(record["measure"].lower() in given[i].evidence.lower() for i, record in enumerate(records))
        assert text.render_text(results).count(outcome.upper()) == 5
    records[0] |= {"number": None, "interval": None, "why": "nothing varies."}
    records[1]["why"] = ""
    assert answer(results, "layers").evidence == "Nothing varies."
    assert answer(results, "robustness").evidence.endswith("(0.0 to 56.8).")


def test_a_hypothesis_belongs_to_its_question_by_key_whatever_the_order():
    results = made()
    expected, records = sentences.answers(results), results["analysis"]["hypotheses"]
    assert [answer.anchor for answer in expected] == [question.anchor for question in sentences.QUESTIONS]
    for order in (records[::-1], records[2:] + records[:2]):
        results["analysis"]["hypotheses"] = order
        assert sentences.answers(results) == expected
    hypothesis_of = {record["question"]: record["hypothesis"].lower() for record in records}
    for question, given in zip(sentences.QUESTIONS, expected, strict=True):
        assert given.hypothesis.lower() == hypothesis_of[question.key] and question.key in results["analysis"]


def test_both_tables_of_questions_have_the_same_keys():
    keys = [question.key for question in sentences.QUESTIONS]
    assert len(set(keys)) == 5 and set(keys) == {question.key for question in questions.QUESTIONS}


@pytest.mark.parametrize("absent", [{}, {"analysis": None}])
def test_without_an_analysis_there_is_no_answer(absent):
    results = made()
    del results["analysis"]
    assert sentences.answers(results | absent) == [] and sentences.concept_lines(results | absent) == []


# ----------------------------------------------------------------------------------------------------------------------
# 1. Which layers predict?
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "above", "expected"),
    [
        (12, 12, "12 of 12 layers are "),
        (1, 1, "1 of 12 layers is "),
        (5, 3, "5 of 12 layers are "),
        (1, 0, "1 of 12 layers is "),
        (0, 0, "No "),
    ],
)
def test_layers_above_chance_those_that_know_something_and_none(known, above, expected):
    results = made()
    section = results["analysis"]["layers"]
    section |= {"num_above_null": known, "num_above_chance": above}
    first = answer(results, "layers").sentences[0]
    assert first.startswith(expected) and "20.0 %" in first
    assert (f" {above} of them " in first) == (0 < above < known)
    assert known == 0 or bool(re.search(r"\b(none|not)\b", first)) == (above == 0)
    assert (f"{wording.percent(section['needed'])} %" in first) == (known == 0)


def test_layers_by_macro_f1_are_told_where_classes_are_unequal():
    results = made()
    before = answer(results, "layers").sentences[0]
    results["analysis"]["layers"]["num_above_null_f1"] = 7
    first = answer(results, "layers").sentences[0]
    assert first.startswith(before) and " 7 of 12 " in first.removeprefix(before)


def test_planted_layers_are_counted():
    section = made()["analysis"]["layers"]
    assert 0 < section["num_above_chance"] == section["num_above_null"] < LAYERS
    silent = made("no signal")["analysis"]["layers"]
    assert silent["num_above_null"] == 0 and silent["needed"] > silent["chance"]


def test_the_first_layer_is_given_with_what_others_choose_beside_it():
    results = made()
    first, crossed = results["analysis"]["layers"]["records"][0], results["analysis"]["cross_fitted"]
    crossed["first"] |= {"accuracy": 0.512, "interval": [0.4, 0.6]}
    line = next(line for line in answer(results, "layers").sentences if first["layer"] in line)
    assert wording.accuracy_text(first)[:-1] in line and wording.p_text(first["p_family"]) in line
    assert "51.2 % (40.0 to 60.0)" in line
    crossed["why"] = "too few"
    without = next(line for line in answer(results, "layers").sentences if first["layer"] in line)
    assert "51.2" not in without and wording.accuracy_text(first)[:-1] in without
    results["config"]["rank_by"] = "val"
    by_validation = next(line for line in answer(results, "layers").sentences if first["layer"] in line)
    assert len(by_validation) < len(without) and without.startswith(by_validation[:-1])


def test_means_of_roles_only_where_there_are_two():
    results = made()
    roles = results["analysis"]["layers"]["groups"]["role"]
    for group in roles.values():
        assert f"{wording.percent(group['mean'])} % ({wording.bounds(group['interval'])})" in said(results, "layers")
    results["analysis"]["layers"]["groups"]["role"] = {"up": roles["up"]}
    assert "up factors" not in said(results, "layers")


def test_stability_leaves_out_what_was_not_measured():
    results = made()
    section = results["analysis"]["layers"]
    assert f" {section['stability']['kendall_w']:.2f}" in said(results, "layers")
    assert f" {section['rankings']['kendall_tau']:.2f}" in said(results, "layers")
    assert f"top 2 have {section['rankings']['same_top_k']} in common" in said(results, "layers")
    section["stability"]["kendall_w"] = section["rankings"]["kendall_tau"] = None
    assert "Kendall" not in said(results, "layers") and "top 2 have" in said(results, "layers")
    for record, share in zip(section["records"], (0.75, 0.5), strict=False):
        record["top_k_share"] = share
    assert "50.0 to 75.0 %" in said(results, "layers")
    section["records"][1]["top_k_share"] = 0.75
    assert "75.0 %" in said(results, "layers") and "75.0 to" not in said(results, "layers")


@pytest.mark.parametrize("same", [0, 1])
def test_of_one_top_layer_it_is_said_whether_both_rankings_put_it_first(same):
    results = made(top_k=1)
    rankings = results["analysis"]["layers"]["rankings"]
    rankings["same_top_k"] = same
    text = said(results, "layers")
    assert ("the same first layer" in text) == bool(same) and "top 1" not in text and "in common" not in text


def test_agreement_of_several_splits():
    results = made(splits=5)
    splits = results["splits"]
    added = [line for line in answer(results, "layers").sentences if line not in answer(made(), "layers").sentences]
    assert len(added) == 1
    for number in (splits["kendall_w"], splits["kendall_tau"]):
        assert wording.number(number) in added[0]
    assert "5 splits" in added[0] and f" {splits['same_top_k']:.1f} " in added[0]
    assert wording.spread_text(splits["first"]) in added[0]
    splits |= {"kendall_w": None, "kendall_tau": None}
    line = next(line for line in answer(results, "layers").sentences if "5 splits" in line)
    assert "Kendall" not in line and f" {splits['same_top_k']:.1f} " in line
    splits["first"] = None  # the same LoRAs on all splits
    line = next(line for line in answer(results, "layers").sentences if "5 splits" in line)
    assert " % " not in line and f" {splits['same_top_k']:.1f} " in line
    splits["same_top_k"] = None  # one split could be done
    assert not any("5 splits" in line for line in answer(results, "layers").sentences)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Is prediction robust to removing them?
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KNOWN)
def test_each_verdict_is_told_with_its_meaning_and_numbers(kind):
    results = made(kind)
    section = results["analysis"]["robustness"]["stats"]
    assert section["verdict"] == kind  # what was planted
    text = said(results, "robustness")
    assert text.startswith(f"{kind[0].upper()}{kind[1:]} by stats: {section['why'].rstrip('.')}. ")
    assert f"stats: with all {LAYERS} layers" in text
    meaning = f"{kind[0].upper()}{kind[1:]}: {sentences.VERDICTS[kind]}."
    assert meaning in unwrapped(text_of(results))
    for removal in ("all", "without_top", "top_alone"):
        assert wording.left_text(section[removal]) in text
    random = section["without_random"]
    assert f"{wording.percent(random['mean'])} % (mean of 39 draws" in text
    assert wording.bounds((random["min"], random["max"])) in text


def test_the_most_predictive_are_told_beside_the_top_where_they_are_more():
    results = made("localized", top_k=1)
    section = results["analysis"]["robustness"]["stats"]
    assert (section["removed"], section["most"], section["verdict"]) == (1, 2, "localized")
    text = said(results, "robustness")
    assert f"the most predictive layer {wording.left_text(section['without_top'])}" in text
    assert f"the 2 most predictive layers {wording.left_text(section['without_most'])}" in text
    assert said(made("localized"), "robustness").count(", without the ") == 1  # where they are as many


def test_several_representations_each_say_their_verdict():
    results = made()
    robustness = results["analysis"]["robustness"]
    robustness["ensemble"] = robustness["stats"] | {"verdict": "undecided", "why": "on both sides of a half"}
    robustness["sketch"] = robustness["stats"] | {"unit": "module", "units": 6, "removed": 1, "most": 1}
    text = said(results, "robustness")
    assert f"Redundant by stats and sketch: {robustness['stats']['why'].rstrip('.')}." in text
    assert "Undecided by ensemble: on both sides of a half. " in text
    assert "all 6 modules" in text and "most predictive module " in text
    assert tables.tables(results)["controls"].columns == ["", "stats", "ensemble", "sketch"]


@pytest.mark.parametrize("draws", [0, 1])
def test_no_other_layers_or_one_draw_of_them(draws):
    results = made()
    random = results["analysis"]["robustness"]["stats"]["without_random"]
    known = {"accuracies": [0.654], "mean": 0.654, "min": 0.654, "max": 0.654, "at_or_below": 0, "p": 0.5}
    none = {"accuracies": [], **dict.fromkeys(("mean", "min", "max", "at_or_below", "p"))}
    random |= {"draws": draws} | (known if draws else none)
    line = said(results, "robustness")
    assert "mean of" not in line and ("65.4 %" in line) == bool(draws)
    cells = {row[0]: row[1] for row in tables.tables(results)["controls"].rows}
    assert cells["random draws"] == str(draws) and (wording.NO_OTHERS in cells.values()) == (draws == 0)
    assert (wording.NO_OTHERS in figures.findings(results)["ablation_curves"]) == (draws == 0)
    assert not faults(text.render_text(results)) and not faults(line)


def test_of_nothing_that_is_left_there_is_no_interval():
    results = made()
    section = results["analysis"]["robustness"]["stats"]
    nothing = {"accuracy": 0.2, "interval": None}
    section |= {"most": LAYERS, "without_most": nothing, "survives_most": {"share": 0.0, "interval": None}}
    assert f"the {LAYERS} most predictive layers {wording.left_text(nothing)}" in said(results, "robustness")
    assert not faults(text.render_text(results)) and "20.0 %" in figures.findings(results)["ablation_curves"]


def test_how_few_layers_hold_half_and_how_many_can_go():
    results = made("distributed")
    section = results["analysis"]["robustness"]["stats"]
    least = section["left_without_least"]
    assert 1 < section["half_gone"] < LAYERS and 1 <= least["removed"] < LAYERS
    line = answer(results, "robustness").sentences[-1]
    assert f" {section['half_gone']} most predictive layers of {LAYERS}" in line
    assert f"{wording.percent(least['share'])} % ({wording.bounds(least['interval'])})" in line
    section["half_gone"], least["removed"] = 1, 1
    line = answer(results, "robustness").sentences[-1]
    assert " 1 " not in line and "most predictive layer " in line and "least predictive layer " in line
    section["half_gone"] = None
    assert f"of {LAYERS}" not in answer(results, "robustness").sentences[-1]
    for unknown in (None, least | {"interval": None}):
        section["left_without_least"] = unknown
        assert "least predictive" not in said(results, "robustness")


def test_that_few_layers_beat_all_is_told_where_their_interval_says_so():
    results = made("unseen")
    records = results["analysis"]["cross_fitted"]["beats_all"]
    for record in records.values():
        assert f"{wording.percent(record['difference'])} points ({wording.bounds(record['interval'])}" in (
            said(results, "robustness")
        )
    for known, told in ((dict(records), 2), (records | {"top_alone": None}, 1), (None, 0)):
        results["analysis"]["cross_fitted"]["beats_all"] = known
        lines = answer(results, "robustness").sentences
        assert lines[0].startswith("Unseen by") and sum(" points (" in line for line in lines[1:3]) == told
    assert " points (" not in said(made(), "robustness")  # they are not better
    assert said(made("unseen", top_k=1), "robustness").count(" points (") == 1  # the top layer alone is the first


def test_modules_that_are_above_chance_are_named():
    results = made()
    of_modules(results)
    section = results["analysis"]["robustness"]["pairs"]
    section |= {"order": ["a", "b", "c", "d", "e", "f"], "units_above": 2}
    assert "2 of 6 modules are above chance alone; the first by validation are a and b." in said(results, "robustness")
    section["units_above"] = 1
    assert "1 of 6 modules is above chance alone; the first by validation is a." in said(results, "robustness")
    section["units_above"] = 0
    assert "above chance alone" not in said(results, "robustness")


def test_without_robustness_there_is_no_verdict_but_the_drop():
    results = made()
    results["analysis"]["robustness"] = {}
    drop = results["analysis"]["representations"]["drops"]["stats"]
    first, second = answer(results, "robustness").sentences
    assert wording.change_text(drop) in first and second.startswith("No verdict: ") and "--controls=basic" in second
    assert wording.change_text(drop) not in said(results, "representations")  # it is said once
    baseline(results)["best"] = "ensemble"
    drops = results["analysis"]["representations"]["drops"]
    both = f"ensemble {wording.change_text(drops['ensemble'])} and stats {wording.change_text(drop)}."
    assert both in next(sentences._no_verdict(results))
    baseline(results)["best"] = "stats"
    results["analysis"]["controls_not_run"] = {"stats": "training diverged.", "null shuffles": "it diverged"}
    assert "stats" in answer(results, "robustness").sentences[1] and "null" not in said(results, "robustness")
    baseline(results)["best"] = None
    assert wording.change_text(drop) in answer(results, "robustness").sentences[0]
    baseline(results)["above_null"] = []
    assert answer(results, "robustness").sentences[0].startswith("With all layers no representation is disting")
    results["analysis"]["representations"] = None
    assert said(results, "robustness").startswith("No verdict: ")
    assert "controls" not in tables.tables(results)


def test_what_fewer_runs_than_the_tables_rest_on_is_told():
    results = made()
    assert " runs)" not in said(results, "robustness")
    results["baseline_results"]["stats"]["test_accuracy"]["runs"] = [0.9] * 10
    results["baseline_results"]["spectral"]["test_accuracy"]["runs"] = [0.9]  # as of a kernel
    results["config"]["num_runs"] = 10
    robustness = results["analysis"]["robustness"]
    section = robustness["stats"]
    robustness |= {"ensemble": dict(section), "spectral": section | {"runs": 1}, "not run": dict(section)}
    text = said(results, "robustness")
    # "not run": of what only controls are trained on
    names = "stats (in 3 of the 10 runs), ensemble, spectral and not run (in 3 of the 10 runs)"
    assert f"{names}: {section['why']}" in text
    rows = {row[0]: row[1:] for row in tables.tables(results)["controls"].rows}
    assert rows["runs"] == ["3 of 10 runs", "3", "1", "3 of 10 runs"]
    assert " % in 3 of the 10 runs (with all" in figures.findings(results)["ablation_curves"]


# ----------------------------------------------------------------------------------------------------------------------
# 3. Which representation is best?
# ----------------------------------------------------------------------------------------------------------------------


def test_the_best_representation_is_far_ahead_near_others_or_tied():
    results = made()
    section = baseline(results)
    section["tied_on_validation"] = []
    assert section["best"] == "stats" and section["not_worse"] == [] and section["ties"] == []
    accuracy, interval = results["baseline_results"]["stats"]["test_accuracy"]["mean"], section["intervals"]["stats"]
    first, second, *_ = answer(results, "representations").sentences
    assert f"stats: {wording.percent(accuracy)} % ({wording.bounds(interval)})" in first and "20.0 %" in first
    assert "better than spectral and ensemble" in second
    record = next(record for record in section["comparisons"] if (record["a"], record["b"]) == ("stats", "spectral"))
    ahead = f"ahead of spectral by {wording.percent(record['difference'])} points ({wording.bounds(record['interval'])}"
    assert ahead in said(results, "representations")
    section["not_worse"] = ["spectral"]
    assert "better than ensemble; not significantly worse than it is spectral." in said(results, "representations")
    section |= {"not_worse": ["spectral", "ensemble"], "ties": ["spectral"]}
    text = said(results, "representations")
    assert "better than" not in text and "stats and spectral are right on equally many" in text
    assert "ahead of" not in text


def test_another_that_is_better_by_test_is_named_and_how_far_it_is_ahead():
    results = made()
    section = baseline(results)
    record = next(record for record in section["comparisons"] if (record["a"], record["b"]) == ("stats", "spectral"))
    record |= {"difference": -0.012, "interval": [-0.05, 0.02], "p": 0.4, "significant": False}
    section |= {"best_by_test": "spectral", "not_worse": ["spectral"]}
    accuracy = results["baseline_results"]["spectral"]["test_accuracy"]
    accuracy["mean"] = results["baseline_results"]["stats"]["test_accuracy"]["mean"] + 0.012
    text = said(results, "representations")
    assert f"spectral, with {wording.percent(accuracy['mean'])} %" in text
    assert "behind spectral by 1.2 points (-2.0 to 5.0, p = 0.4" in text


def test_of_many_others_the_number_is_told():
    results = made()
    section, analysis = baseline(results), results["analysis"]["representations"]
    for i in range(6):
        name = f"another_{i}"
        for part in ("baseline_results", "ablation_results"):
            results[part][name] = results[part]["ensemble"]
        for condition in analysis["conditions"].values():
            condition["intervals"][name] = [0.1, 0.2]
        analysis["drops"][name] = analysis["drops"]["ensemble"]
    assert "all 8 others" in said(results, "representations")
    section["not_worse"] = [name for name in analysis["drops"] if name != "stats"]
    assert "all 8 others" in said(results, "representations")


def test_the_only_representation():
    results = made(names=("stats",))
    text = said(results, "representations")
    assert "The only representation that was run is stats" in text and "ahead" not in text and "Without" in text
    assert "1 representation" not in text and answer(results, "representations").outcome == "not answerable"
    silent = made("no signal", names=("stats",))
    (line,) = answer(silent, "representations").sentences
    assert line.startswith("stats is indistinguishable from chance")
    assert f"{wording.percent(baseline(silent)['needed'])} %" in line


def test_none_is_best_where_validation_chooses_one_that_knows_nothing():
    results = made("no signal")
    section = baseline(results)
    chosen, accuracy = section["chosen"], results["baseline_results"][section["chosen"]]["test_accuracy"]["mean"]
    assert section["best"] is None and section["above_null"] == []
    (line,) = answer(results, "representations").sentences
    assert line.startswith("None of 3 representations")
    for part in (f"{chosen}", f"{wording.percent(accuracy)} % ({wording.bounds(section['intervals'][chosen])})",
                 f"{wording.percent(section['needed'])} %"):  # fmt: skip
        assert part in line
    other, third = (name for name in ("stats", "spectral", "ensemble") if name != chosen)
    section["above_null"] = [other]
    (line,) = answer(results, "representations").sentences
    assert f"Distinguishable from chance is {other}" in line and f"{wording.percent(section['needed'])} %" in line
    section["above_null"] = [other, third]
    (line,) = answer(results, "representations").sentences
    assert f"Distinguishable from chance are {other} and {third}" in line


def test_what_else_the_best_may_know_is_told_with_it():
    results = made()
    section = baseline(results)
    assert "artist" in answer(results, "representations").sentences[0]
    section |= {"best_above_chance": False}
    assert wording.p_text(section["p_family"]["stats"]) in answer(results, "representations").sentences[0]
    results["analysis"]["groups"]["may_be_groups"] = False
    assert "artist" not in said(results, "representations")
    results["analysis"]["groups"] = None
    assert "artist" not in said(results, "representations")


@pytest.mark.parametrize(
    ("drop", "interval", "expected"),
    [
        (0.0123, [0.001, 0.02], "loses 1.2 points (0.1 to 2.0, p = 0.03)"),
        (-0.022, [-0.05, 0.01], "gains 2.2 points (-1.0 to 5.0, p = 0.03)"),
        (-0.0004, [-0.01, 0.02], "loses 0.0 points (-1.0 to 2.0, p = 0.03)"),
    ],
)
def test_a_negative_loss_is_a_gain(drop, interval, expected):
    results = made()
    record = {"drop": drop, "interval": interval, "p": 0.03}
    results["analysis"]["representations"]["drops"]["stats"] = record
    assert f"stats {expected}" in said(results, "representations")
    results["analysis"]["robustness"] = {}
    assert f"stats {expected}." in said(results, "robustness")


@pytest.mark.parametrize(
    ("drop", "interval", "expected"),
    [
        (0.0123, [0.001, 0.02], "loses 1.2 points (0.1 to 2.0, p = 0.03)"),
        (-0.022, [-0.05, 0.01], "gains 2.2 points (-1.0 to 5.0, p = 0.03)"),
    ],
)
def test_the_drop_where_other_test_loras_choose_stands_beside_the_ordinary_one(drop, interval, expected):
    results = made()
    crossed = results["analysis"]["cross_fitted"]
    ordinary = wording.change_text(results["analysis"]["representations"]["drops"]["stats"])
    crossed["drops"]["stats"] |= {"drop_cf": drop, "interval": interval, "p": 0.03}
    text = said(results, "representations")
    assert f"stats {ordinary}" in text and f"it {expected}" in text
    crossed["drops"] = {}
    text = said(results, "representations")
    assert f"stats {ordinary}." in text and expected not in text


def test_ties_on_the_validation_loras_are_named_or_counted_wherever_these_choose():
    results = made()
    section = baseline(results)
    for tied, told in (
        ([], "stats: "),
        (["spectral"], "stats (equal there: spectral): "),
        ([f"r{i}" for i in range(5)], "stats (equal there: r0, r1, r2, r3 and r4): "),
        ([f"r{i}" for i in range(7)], "stats (equal there: 7 others): "),
    ):
        section["tied_on_validation"] = tied
        assert f"Best by validation accuracy is {told}" in answer(results, "representations").sentences[0]
    section |= {"best": None, "above_null": ["ensemble"], "tied_on_validation": ["ensemble"]}
    assert "first by validation accuracy, stats (equal there: ensemble), is ind" in said(results, "representations")
    section["above_null"] = []
    assert "first by validation accuracy, stats (equal there: ensemble), reaches" in said(results, "representations")


def test_the_best_without_the_top_layers_and_how_many_lose():
    results = made("localized")
    analysis = results["analysis"]["representations"]
    losses = len(analysis["significant_losses"])
    assert losses > 0 and f"Of 3 representations {losses} lose" in said(results, "representations")
    section = made()["analysis"]["representations"]["conditions"]["ablation"]
    text = said(made(), "representations")
    accuracy = made()["ablation_results"][section["best"]]["test_accuracy"]["mean"]
    reached = f"{wording.percent(accuracy)} % ({wording.bounds(section['intervals']['stats'])})"
    assert f"{section['best']} (equal there: {wording.listed(section['tied_on_validation'])}), with {reached}" in text
    left = analysis["conditions"]["ablation"]
    left |= {"best": None, "chosen": "ensemble", "above_null": ["stats", "spectral"]}
    line = answer(results, "representations").sentences[-1]
    assert "stats and spectral are " in line and line.endswith("ensemble, is not.") and "%" not in line
    left["above_null"] = []
    line = answer(results, "representations").sentences[-1]
    assert "no representation " in line and "stats" not in line


@pytest.mark.parametrize("count", [3, 5])
def test_what_the_best_reaches_on_several_splits(count):
    results = made(splits=count)
    record = results["splits"]["representations"]["stats"]
    assert (record["baseline"]["interval"] is None) == (count < 5)
    line = answer(results, "representations").sentences[-1]
    assert f"{count} splits" in line
    for part in ("baseline", "ablation"):
        assert wording.spread_text(record[part]) in line
    assert f"{wording.percent(abs(record['drop']['mean']))} points (" in line
    del results["splits"]["representations"]["stats"]  # which a split could not do
    assert "splits" not in said(results, "representations")
    assert "splits" not in said(made("no signal", splits=3), "representations")


# ----------------------------------------------------------------------------------------------------------------------
# 4. Do layers carry different information?  5. Does rank structure matter?
# ----------------------------------------------------------------------------------------------------------------------


def test_different_information_and_what_the_top_layers_know_together():
    results = made()
    section, crossed = results["analysis"]["layer_information"], results["analysis"]["cross_fitted"]
    text, union = said(results, "information"), section["union"]
    assert f"{wording.percent(section['disagreement']['mean'])} % of the test LoRAs" in text
    assert wording.number(section["kappa"]["mean"]) in text
    assert f"{wording.signed(union['vote_gain'])} points ({wording.bounds(union['vote_interval'])})" in text
    for part in ("vote", "first", "union"):
        assert wording.accuracy_text(crossed[part]) in text
    assert f"{wording.percent(crossed['union']['by_chance'])} %" in text
    crossed["why"] = "too few"
    assert f"{wording.percent(union['any_of_top_k'])} %" in said(results, "information")
    assert wording.accuracy_text(crossed["union"]) not in said(results, "information")
    assert "vote" not in said(made(top_k=1), "information")


@pytest.mark.parametrize(("count", "end"), [(LAYERS, "(linear CKA of at least 0.50)."), (1, "1 cluster.")])
def test_clusters_of_layers(count, end):
    results = made()
    results["analysis"]["layer_information"]["clusters"]["count"] = count
    assert said(results, "information").endswith(end)


def test_rank_structure_answerable_and_not():
    results = made()
    section = results["analysis"]["rank_structure"]
    complexity = section["complexity"]
    assert f" {section['num_significant']} of 6 modules" in said(results, "rank") and section["num_significant"] > 0
    for key in ("spearman_spread", "spearman_recall"):
        assert wording.correlation_text(complexity[key]) in said(results, "rank")
    assert complexity["recall_by"] == "stats" and "by stats " in said(results, "rank")
    complexity["recall_by"] = None
    assert "by the best single layer " in said(results, "rank")
    rank_one = made(answerable=False)
    first = answer(rank_one, "rank").sentences[0]
    assert first.startswith("Not answerable at rank 1") and rank_one["analysis"]["rank_structure"]["tested"] in first
    assert answer(rank_one, "rank").outcome == "not answerable"
    rank_one["analysis"]["rank_structure"]["complexity"]["spearman_spread"] = None
    assert "not measured" in said(rank_one, "rank")


def test_without_whole_pairs_the_fifth_answer_is_why():
    results = without_pairs()
    assert answer(results, "rank").sentences == ["No module has both of its layers among those looked at."]
    made_tables = tables.tables(results)
    assert "modules" not in made_tables
    assert made_tables["concepts"].columns == ["concept", "recall", "drop", "best layer", "spread"]
    assert "mean of the updates" not in made_tables["concepts"].note
    assert "rank_structure" not in figures.findings(results) and len(figures.findings(results)) == 7
    assert not faults(text.render_text(results))


def test_the_columns_of_the_analysis_of_a_run_without_whole_pairs_are_those():
    """`without_pairs` is what the analysis makes of it."""
    y = np.arange(60) % 3
    rows = {"train": np.arange(30), "validation": np.arange(30, 40), "test": np.arange(40, 60)}
    layers = [Layer(f"m{d}.down.weight", f"m{d}", "down", (1, 4), "F32") for d in range(4)]
    alone = {"predicted": np.tile(y[30:], (4, 1, 1)), "log_loss": np.zeros((4, 1, 30), np.float32)}
    predictions = Predictions(np.arange(30, 60), y[30:], alone)
    e = Evidence(layers, list("abc"), y, rows, None, np.arange(4), 1, predictions, 0, 100, 100)
    features = np.random.default_rng(0).random((60, 4, 7))
    analysis = questions.analyse(e, [], features, np.ones((60, 0, 3)), {}, questions.Controls("none"))
    section, expected = analysis["rank_structure"], without_pairs()["analysis"]["rank_structure"]
    assert section.keys() == expected.keys()
    for key in ("answerable", "tested", "modules", "num_significant", "why"):
        assert section[key] == expected[key]
    assert {record["norm"] for record in section["complexity"]["by_class"]} == {None}


# ----------------------------------------------------------------------------------------------------------------------
# Concepts
# ----------------------------------------------------------------------------------------------------------------------


def test_concepts_best_and_worst_with_and_without_representations():
    results = made()
    section = results["analysis"]["concepts"]
    section["recall"] = [[0.1, 0.9, 0.3, 0.3, 0.3], [0.2, 0.8, 0.3, 0.3, 0.3]]
    section["baseline"]["stats"], section["drop"]["stats"] = [1.0, 0.5, 0.9, 0.9, 0.9], [0.0, 0.1, 0.25, 0.0, -0.1]
    first, second = sentences.concept_lines(results)
    assert "dog best (90.0 %) and cat worst (20.0 %)" in first
    assert "cat best (100.0 %) and dog worst (50.0 %)" in second and f"{CLASS_NAMES[2]} (25.0 points)" in second
    section["recall"], section["drop"]["stats"] = [[0.5] * 5] * 2, [-0.1, 0.0, 0.0, 0.0, 0.0]
    first, second = sentences.concept_lines(results)
    assert "(50.0 %)" in first and "best (" not in first and "points" not in second
    assert len(sentences.concept_lines(made("no signal"))) == 1  # none is best
    results["analysis"]["representations"] = None
    assert len(sentences.concept_lines(results)) == 1


def test_concepts_without_a_test_lora_are_told_as_unknown_and_claimed_nothing_of():
    results = made()
    section = results["analysis"]["concepts"]
    for recalls in (*section["recall"], *section["baseline"].values(), *section["drop"].values()):
        recalls[1] = None
    results["analysis"]["rank_structure"]["complexity"]["by_class"][1] |= {"recall": None, "spread": None}
    assert "dog" not in " ".join(sentences.concept_lines(results))
    assert " 4 with test LoRAs" in said(results, "rank")
    row = tables.tables(results)["concepts"].rows[-1]
    assert list(row[:5]) == ["dog", "unknown", "unknown", "unknown", "unknown"]
    assert "dog" not in figures.findings(results)["concept_layer_map"]
    assert not faults(text.render_text(results))


def test_top_k_is_that_of_the_results():
    assert made()["config"]["top_k"] == TOP_K and made(top_k=1)["top_layers"] == made()["top_layers"][:1]
