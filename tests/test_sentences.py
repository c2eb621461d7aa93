"""Each outcome of an analysis becomes the sentence it should, with the numbers of results.json and no others."""

import copy
import re

import numpy as np
import pytest
from result_making import KNOWN, LAYERS, made, unwrapped, without_pairs

from analysis import questions
from analysis.evidence import Evidence, Predictions
from loras.lora_files import Layer
from report import figures, sentences, tables, text, wording


def answer(results: dict, anchor: str) -> sentences.Answer:
    return next(one for one in sentences.answers(results) if one.anchor == anchor)


def told(results: dict, anchor: str) -> str:
    return " ".join(answer(results, anchor).sentences)


def numbers(value) -> list[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize("kind", KNOWN)
def test_each_verdict_is_told_with_its_meaning_and_numbers(kind):
    results = made(kind)
    found = results["analysis"]["robustness"]["stats"]
    assert found["verdict"] == kind  # what was planted
    text = told(results, "robustness")
    assert text.startswith(f"{kind[0].upper()}{kind[1:]} by stats: {sentences.VERDICTS[kind]}.")
    whole, left, random = (found[key] for key in ("all", "without_top", "without_random"))
    assert f"With all 12 layers {100 * whole['accuracy']:.1f} % ({100 * whole['interval'][0]:.1f} to " in text
    assert f"without the top 2 {100 * left['accuracy']:.1f} %" in text and found["why"] in text
    assert f"without 2 random ones {100 * random['mean']:.1f} % (mean of 20 draws" in text


def test_undecided_and_several_representations_each_say_their_verdict():
    results = made("redundant")
    robustness = results["analysis"]["robustness"]
    robustness["ensemble"] = robustness["stats"] | {"verdict": "undecided", "why": "on both sides of a half"}
    robustness["update_sketch"] = robustness["stats"]
    text = told(results, "robustness")
    assert "Redundant by stats and update_sketch: the same information" in text
    assert "Undecided by ensemble: " in text and "ensemble: on both sides of a half. With all" in text
    assert tables.tables(results)["controls"].columns == ["layers", "stats", "ensemble", "update_sketch"]


def test_without_robustness_there_is_no_verdict_but_the_drop():
    results = made()
    results["analysis"]["robustness"] = {}
    drop = results["analysis"]["representations"]["drops"]["stats"]
    written = told(results, "robustness")
    assert written.startswith("No verdict: no representation was trained with other layers removed")
    assert f"Without the top 2 of 12 layers stats loses {wording.percent(drop['drop'])} points" in written
    results["analysis"]["representations"] = None
    assert told(results, "robustness").startswith("No verdict: ")
    assert told(results, "representations") == "No representation was run."
    assert "controls" not in tables.tables(results) and text.render_text(results)


def test_layers_above_chance_and_none():
    results = made()
    found = results["analysis"]["layers"]
    above, first = found["num_above_null"], found["records"][0]
    text = told(results, "layers")
    assert 0 < above < LAYERS and text.startswith(f"{above} of 12 layers are above chance (20.0 %; p < 0.05")
    low, high = (100 * bound for bound in first["interval"])
    reached = f"{first['layer']}, reaches {100 * first['accuracy']:.1f} % ({low:.1f} to {high:.1f}, p < 0.0001)"
    assert reached in text and f"W over 3 runs is {found['stability']['kendall_w']:.2f}" in text
    assert f"their top 2 have {found['rankings']['same_top_k']} in common" in text
    assert f"{LAYERS - above} of 12 layers are indistinguishable from chance" in " ".join(sentences.warnings(results))
    silent = made("no signal")
    assert told(silent, "layers").startswith("Each of the 12 layers is indistinguishable from chance (20.0 %).")
    limit = silent["analysis"]["layers"]["null_max"]
    assert f"the best of so many layers reaches no more than {100 * limit:.1f} %" in told(silent, "layers")
    warned = " ".join(sentences.warnings(silent))
    assert "12 of 12 layers are indistinguishable" in warned
    assert "With all layers stats, spectral and ensemble are" not in warned  # the controls are of stats alone
    assert "With all layers stats is indistinguishable from chance" in warned


def test_stability_leaves_out_what_was_not_measured():
    results = made()
    results["analysis"]["layers"]["stability"]["kendall_w"] = None
    results["analysis"]["layers"]["rankings"]["kendall_tau"] = None
    assert "Stability: their top 2 have" in told(results, "layers")


def test_the_best_representation_alone_near_others_and_ahead():
    results = made()
    compared = results["analysis"]["representations"]
    assert compared["best"] == "stats" and compared["indistinguishable_from_best"] == []
    text = told(results, "representations")
    ahead = next(one for one in compared["pairs"]["baseline"] if (one["a"], one["b"]) == ("stats", "spectral"))
    assert f"spectral, by {wording.percent(ahead['difference'])} points ({wording.bounds(ahead['interval'])}" in text
    assert "; it is significantly better than every other." in text and "Significant losses: 0 of 3" in text
    compared["indistinguishable_from_best"] = ["spectral"]
    text = told(results, "representations")
    assert "Not significantly worse than stats (Holm-corrected): spectral." in text
    assert "significantly better" not in text
    alone = made(names=("stats",))
    text = told(alone, "representations")
    assert text.startswith("stats, with ") and "the only representation that was run" in text
    assert answer(alone, "representations").outcome == "not answerable"


def test_a_best_representation_that_is_indistinguishable_from_chance():
    several, alone = made(), made(names=("stats",))
    for results in (several, alone):
        results["analysis"]["representations"] |= {"p_family": {"stats": 0.2}, "best_above_chance": False}
    assert told(several, "representations").startswith("All 3 representations are indistinguishable from chance (")
    assert "with all layers: the first, stats, reaches" in told(several, "representations")
    assert "It is ahead" not in told(several, "representations")
    assert told(alone, "representations").startswith("stats is indistinguishable from chance (")


def test_a_difference_is_told_from_the_best_ones_side():
    """The best may stand on either side of a pair."""
    turned = made(names=("ensemble", "stats"))
    one = turned["analysis"]["representations"]["pairs"]["baseline"][0]
    before = told(turned, "representations")
    low, high = one["interval"]
    one |= {"a": "stats", "b": "ensemble", "difference": -one["difference"], "interval": [-high, -low]}
    assert told(turned, "representations") == before
    row = next(row for row in tables.tables(turned)["differences"].rows if row[0] == "stats")
    assert row[-2] == f"{wording.percent(-one['difference'])} ({wording.bounds((low, high))})"


def test_different_information_a_vote_and_what_chance_would_give():
    results = made()
    found = results["analysis"]["layer_information"]
    text = told(results, "information")
    assert f"for {wording.percent(found['disagreement']['mean'])} % of the test LoRAs" in text
    assert f"with labels drawn at random it would be {wording.percent(found['union']['any_by_chance'])} %" in text
    assert f"a difference of {wording.signed(found['union']['vote_gain'])} points" in text
    found["clusters"]["count"] = LAYERS
    assert "form 12 clusters, each a single layer." in told(results, "information")
    found["clusters"]["count"] = 1
    assert told(results, "information").endswith("form 1 cluster.")


def test_rank_structure_answerable_and_not():
    results = made()
    found = results["analysis"]["rank_structure"]
    expected = f"The effective rank differs between concepts in {found['num_significant']} of 6 modules"
    assert told(results, "rank").startswith(expected) and found["num_significant"] > 0
    assert "coincide" not in " ".join(sentences.warnings(results))
    rank_one = made(answerable=False)
    text = told(rank_one, "rank")
    assert text.startswith(
        "Not answerable at rank 1: the effective rank never varies; the norm of the update is tested"
    )
    assert answer(rank_one, "rank").outcome == "not answerable"
    warned = sentences.warnings(rank_one)
    assert "At this rank features of spectral coincide: sigma_1 = gap_1." in warned
    assert "At this rank features of spectral never vary: sigma_2, sigma_3." in warned
    rank_one["analysis"]["rank_structure"]["constant"]["spectral"] = ["mean", "gap_2", "gap_3", "gap_4", "gap_9"]
    assert "never vary: mean, gap_2 to gap_4, gap_9." in " ".join(sentences.warnings(rank_one))
    rank_one["analysis"]["rank_structure"]["complexity"]["spearman_spread"] = None
    assert "features is not measured (too few, or constant)" in told(rank_one, "rank")


def test_hypotheses_keep_their_outcome_number_and_interval():
    results = made()
    for outcome in ("confirmed", "refuted", "undecided"):
        for one in results["analysis"]["hypotheses"]:
            one |= {"outcome": outcome, "number": 0.1234, "interval": [-0.00001, 0.5678], "why": "because"}
        told_ones = sentences.answers(results)
        assert [one.outcome for one in told_ones] == [outcome] * 5
        assert [one.hypothesis.lower() for one in told_ones] == [
            one["hypothesis"].lower() for one in results["analysis"]["hypotheses"]
        ]
        plain, share, points = (told_ones[i].evidence for i in (0, 1, 2))
        assert plain.endswith(" 0.12 (0.00 to 0.57); because.")
        assert share.endswith(" 12.3 % (0.0 to 56.8); because.")
        assert points.endswith(" 12.3 points (0.0 to 56.8); because.")
        assert unwrapped(text.render_text(results)).count(f": {outcome.upper()}. ") == 5


def test_every_number_of_the_answers_is_one_of_results():
    results = made()
    known = numbers(results["analysis"]) + numbers(results["layer_ranking"]) + numbers(results["baseline_results"])
    known += [*numbers(results["ablation_results"]), results["chance"]["accuracy"]]
    shown = {f"{scale * value:.{digits}f}" for value in known for scale, digits in ((100, 1), (1, 2), (-100, 1))}
    shown |= {f"{value:.2g}" for value in known} | {"0.05", "0.0001", "0.50"}
    for one in sentences.answers(results):
        for sentence in [*one.sentences, one.evidence]:
            text = sentence.replace(results["layer_ranking"][0]["layer"], "")
            for cell in re.findall(r"-?\d+\.\d+", text):
                assert cell in shown, sentence


def test_without_whole_pairs_the_fifth_answer_is_why():
    results = without_pairs()
    assert answer(results, "rank").sentences == ["No module has both of its layers among those looked at."]
    made_tables = tables.tables(results)
    assert "modules" not in made_tables
    assert made_tables["concepts"].columns == ["concept", "recall", "drop", "best layer", "spread"]
    assert "mean last" not in made_tables["concepts"].note
    assert "rank_structure" not in figures.findings(results) and len(figures.findings(results)) == 5
    assert "None" not in text.render_text(results)


def test_the_columns_of_the_analysis_of_a_run_without_whole_pairs_are_those():
    """`without_pairs` is what the analysis makes of it."""
    y = np.arange(60) % 3
    rows = {"train": np.arange(30), "validation": np.arange(30, 40), "test": np.arange(40, 60)}
    layers = [Layer(f"m{d}.down.weight", f"m{d}", "down", (1, 4), "F32") for d in range(4)]
    predictions = Predictions(np.arange(30, 60), y[30:], {"predicted": np.tile(y[30:], (4, 1, 1))})
    e = Evidence(layers, list("abc"), y, rows, None, np.arange(4), 1, predictions, 0)
    features = np.random.default_rng(0).random((60, 4, 7))
    found = questions.analyse(e, [], features, np.ones((60, 0, 3)), {}, questions.Controls("none"))["rank_structure"]
    expected = without_pairs()["analysis"]["rank_structure"]
    assert found.keys() == expected.keys()
    for key in ("answerable", "tested", "modules", "num_significant", "why"):
        assert found[key] == expected[key]
    assert {one["norm"] for one in found["complexity"]["by_class"]} == {None}


def test_no_other_layers_of_the_same_roles():
    results = made()
    random = results["analysis"]["robustness"]["stats"]["without_random"]
    random |= {"draws": 0, "accuracies": []}
    random |= dict.fromkeys(("mean", "min", "max", "p", "share_below_top_removed"))
    written = told(results, "robustness")
    assert "no other layers of the same roles can be removed instead, with the top 2 alone" in written
    assert "random ones" not in written
    rows = {row[0]: row[1] for row in tables.tables(results)["controls"].rows}
    assert rows["without 2 random ones (mean, range)"] == "no other layers of the same roles"
    assert rows["random draws"] == "0" and rows["random draws at or below the top's"] == "none drawn"
    assert "no other layers of the same roles): redundant" in figures.findings(results)["ablation_curves"]
    assert "None" not in text.render_text(results)


def test_groups_of_which_no_split_was_made():
    results = made()
    groups = results["analysis"]["groups"]
    groups |= dict.fromkeys(("representation", "random_split", "grouped_split", "interval"))
    groups["why"] = "these groups allow no split"
    for lines in (sentences.warnings(results), sentences.checks(results)):
        line = next(line for line in lines if "artist" in line)
        assert line.startswith("Groups were not used, although the column artist may name some. No split ")
        assert line.endswith("could be tried: these groups allow no split.") and "None" not in line
    results["analysis"]["controls_not_run"] = {"grouped split": "training diverged"}  # which is why, then
    lines = [line for line in sentences.warnings(results) if "split" in line]
    assert len(lines) == 1 and lines[0].endswith("could be tried: training diverged.")
    groups |= {"unused": ["artist", "set"], "representation": "stats", "random_split": 0.9, "grouped_split": 0.5,
               "interval": [0.4, 0.6], "column": "set"}  # fmt: skip
    text = " ".join(sentences.warnings(results))
    assert "the columns artist and set may name some. A split that keeps the groups of set together gives" in text
    assert "--group-column=set uses it." in text


def test_controls_that_were_not_run_are_named_with_the_reason():
    results = made()
    analysed = results["analysis"]
    assert "not run" not in " ".join(sentences.warnings(results))
    analysed |= {"groups": None, "null_shuffles": None, "controls_not_run": {
        "stats": "training diverged.", "null shuffles": "the layers cannot be ranked: it diverged",
        "grouped split": "out of memory"}}  # fmt: skip
    expected = ["Controls of stats not run: training diverged.",
                "Null shuffles not run: the layers cannot be ranked: it diverged.",
                "Grouped split not run: out of memory."]  # fmt: skip
    for lines in (sentences.warnings(results), sentences.checks(results)):
        assert [line for line in lines if "not run" in line] == expected
    analysed["robustness"] = {}
    text = told(results, "robustness")
    assert text.startswith("No verdict: the controls of stats, on which it would rest, could not be run. Without ")
    assert "no representation was trained" not in text
    del analysed["controls_not_run"]["stats"]  # the others are not what a verdict rests on
    assert told(results, "robustness").startswith("No verdict: no representation was trained")


def test_concepts_without_a_test_lora_are_told_as_unknown_and_claimed_nothing_of():
    results = made()
    analysed = results["analysis"]
    found = analysed["concepts"]
    for of in (*found["recall"], *found["baseline"].values(), *found["drop"].values()):
        of[1] = None
    analysed["rank_structure"]["complexity"]["by_class"][1] |= {"recall": None, "spread": None}
    assert "dog" not in " ".join(sentences.concept_lines(results))
    assert "recall of the concept by stats, over the 4 with test LoRAs, " in told(results, "rank")
    row = tables.tables(results)["concepts"].rows[-1]
    assert list(row[:5]) == ["dog", "unknown", "unknown", "unknown", "unknown"]
    assert "dog" not in figures.findings(results)["concept_layer_map"]
    assert "nan" not in text.render_text(results)


def test_what_fewer_runs_than_the_tables_rest_on_is_told():
    results = made()
    assert "runs)" not in told(results, "robustness")
    results["baseline_results"]["stats"]["test_accuracy"]["runs"] = [0.9] * 10
    results["baseline_results"]["spectral"]["test_accuracy"]["runs"] = [0.9]  # as of a kernel
    results["config"]["num_runs"] = 10
    found = results["analysis"]["robustness"]
    one = found["stats"]
    found |= {"ensemble": copy.deepcopy(one), "spectral": one | {"runs": 1}, "not run": copy.deepcopy(one)}
    text = told(results, "robustness")
    assert f"stats (in 3 of the 10 runs): {one['why']}" in text  # and of what only controls are trained on
    assert f"not run (in 3 of the 10 runs): {one['why']}" in text
    assert f"ensemble: {one['why']}" in text and f"spectral: {one['why']}" in text
    rows = {row[0]: row[1:] for row in tables.tables(results)["controls"].rows}
    assert rows["runs"] == ["3 of 10 runs", "all 3", "all 1", "3 of 10 runs"]
    assert " % in 3 of the 10 runs (with all" in figures.findings(results)["ablation_curves"]


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
    results["analysis"]["representations"]["drops"]["stats"] = {"drop": drop, "interval": interval, "p_holm": 0.03}
    assert f"Without the top 2 it {expected}." in told(results, "representations")
    results["analysis"]["robustness"] = {}
    assert f"12 layers stats {expected}." in told(results, "robustness")


def test_features_coincide_at_this_rank_only_where_all_updates_have_one():
    results = made(answerable=False)
    results["analysis"]["rank_structure"]["answerable"] = True
    warned = sentences.warnings(results)
    assert "In these LoRAs features of spectral coincide: sigma_1 = gap_1." in warned
    assert "In these LoRAs features of spectral never vary: sigma_2, sigma_3." in warned
    results = without_pairs()  # of no update is anything known
    results["analysis"]["rank_structure"]["constant"] = {"spectral": ["gap_2"]}
    assert "In these LoRAs features of spectral never vary: gap_2." in sentences.warnings(results)


def test_whose_recall_it_is_that_effective_rank_goes_with():
    results = made()
    complexity = results["analysis"]["rank_structure"]["complexity"]
    assert complexity["recall_by"] == "stats" and "recall of the concept by stats " in told(results, "rank")
    complexity["recall_by"] = None
    assert "recall of the concept by the best single layer " in told(results, "rank")


def test_a_cheap_explanation_that_does_as_well_is_on_the_first_page():
    results = made("distributed")
    assert results["analysis"]["cheap"]["as_good"] == ["metadata"]  # which holds the label
    first_page = unwrapped(text.render_text(results).split("\n1. Which layers predict? Each of")[0])
    cheap = results["analysis"]["cheap"]["metadata"]
    assert f"metadata alone give {100 * cheap['accuracy']:.1f} %" in first_page
    assert f"and stats is worse: its advantage is {wording.bounds(cheap['advantage_of_weights'])} points." in first_page
    said = " ".join(sentences.checks(results))
    assert "by ranks and shapes: not available, or the same in every LoRA." in said and "by norms: " in said
    cheap |= {"advantage_of_weights": [-0.01, 0.02], "weights_worse": False}
    results["analysis"]["cheap"]["compared_with"] = "ensemble"  # the best by validation
    said = " ".join(sentences.warnings(results) + sentences.checks(results))
    assert "and ensemble is not significantly better: its advantage is -1.0 to 2.0 points." in said
    assert said.count("the advantage of ensemble is ") == 2 and "the advantage of stats" not in said
    results["analysis"]["cheap"]["compared_with"] = None  # no representation was run
    assert "and the best single layer is not significantly better" in " ".join(sentences.warnings(results))
    results["analysis"]["cheap"]["as_good"] = []
    assert "Cheap explanation" not in " ".join(sentences.warnings(results))
    results["analysis"]["cheap"] = None
    assert "were not tried" in " ".join(sentences.checks(results))


def test_a_hypothesis_belongs_to_its_question_by_key_whatever_the_order():
    results = made()
    expected, records = sentences.answers(results), results["analysis"]["hypotheses"]
    assert [answer.anchor for answer in expected] == [question.anchor for question in sentences.QUESTIONS]
    for order in (records[::-1], records[2:] + records[:2]):
        results["analysis"]["hypotheses"] = order
        assert sentences.answers(results) == expected
    hypothesis_of = {record["question"]: record["hypothesis"].lower() for record in records}
    for question, answer in zip(sentences.QUESTIONS, expected, strict=True):
        assert answer.hypothesis.lower() == hypothesis_of[question.key] and question.key in results["analysis"]


def test_both_tables_of_questions_have_the_same_keys():
    keys = [question.key for question in sentences.QUESTIONS]
    assert len(set(keys)) == 5 and set(keys) == {question.key for question in questions.QUESTIONS}


def test_unused_groups_shuffles_and_quick():
    results = made()
    text = " ".join(sentences.warnings(results))
    groups = results["analysis"]["groups"]
    assert "artist" in text and f"gives stats {100 * groups['grouped_split']:.1f} %" in text
    assert f"this one {100 * groups['random_split']:.1f} %" in text and "--group-column=artist" in text
    shuffled = results["analysis"]["null_shuffles"]
    assert f"(4 times, one run each), the best layer reaches at most {100 * max(shuffled['largest']):.1f} %" in text
    assert "p = 0.2, the smallest that 4 can give): as expected." in text and "--quick" not in text
    shuffled |= {"largest": [0.9] * 4, "p": 1.0, "significant": False, "ahead_of_all": False, "as_expected": False}
    assert "(p = 1): indistinguishable from chance." in " ".join(sentences.warnings(results))
    shuffled |= {
        "shuffles": 100,
        "p": 2 / 101,
        "significant": True,
        "as_expected": True,
    }  # one of a hundred is ahead of the true ones
    assert "(p = 0.02): as expected." in " ".join(sentences.warnings(results))
    results["analysis"] |= {"groups": None, "null_shuffles": None}
    results["config"]["quick"] = True
    text = " ".join(sentences.warnings(results))
    assert "artist" not in text and "shuffled" not in text and "rest on --quick (3 runs, at most 30 classifier" in text


def test_attribution_with_and_without_a_correlation():
    results = made()
    found = results["analysis"]["attribution"]
    assert f"Spearman correlation {wording.number(found['spearman'])} (" in " ".join(sentences.checks(results))
    found |= {"spearman": None, "interval": None, "p": None}
    assert "Spearman correlation not measured" in " ".join(sentences.checks(results))


def test_concepts_best_and_worst_with_and_without_representations():
    results = made()
    found = results["analysis"]["concepts"]
    found["recall"] = [[0.1, 0.9, 0.3, 0.3, 0.3], [0.2, 0.8, 0.3, 0.3, 0.3]]
    found["baseline"]["stats"], found["drop"]["stats"] = [1.0, 0.5, 0.9, 0.9, 0.9], [0.0, 0.1, 0.25, 0.0, -0.1]
    assert sentences.concept_lines(results) == [
        "The best single layer for each concept recognises dog best (90.0 %) and cat worst (20.0 %).",
        "With all layers stats recognises cat best (100.0 %) and dog worst (50.0 %); removing the top 2 takes most "
        "from <script>alert(1)</script> (25.0 points).",
    ]
    found["recall"], found["drop"]["stats"] = [[0.5] * 5] * 2, [-0.1, 0.0, 0.0, 0.0, 0.0]
    first, second = sentences.concept_lines(results)
    assert first.endswith("recognises all equally well (50.0 %).") and second.endswith("the top 2 costs none of them.")
    results["analysis"]["representations"] = None
    assert len(sentences.concept_lines(results)) == 1
    results["analysis"] = None
    assert sentences.concept_lines(results) == []


def test_few_test_loras_are_warned_of():
    results = made()
    results["dataset"]["split_sizes"]["test"], results["analysis"]["few_test_loras"] = 49, True
    assert any(line.startswith("Only 49 test LoRAs") for line in sentences.warnings(results))
    results["analysis"]["few_test_loras"] = False
    assert not any("test LoRAs: intervals" in line for line in sentences.warnings(results))
