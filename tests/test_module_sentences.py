"""Sentences on attention and on the map: what is decided, what is not settled, and no more than that."""

import re

import numpy as np
import planting
import pytest
from matplotlib.figure import Figure
from result_making import faults, made
from scipy import stats

from analysis.attention import attention
from analysis.questions import plain
from report import modules
from report.drawing import head_blocks
from report.figures_of_modules import (
    FILLINGS,
    MARKED,
    SHAPES,
    _mark,
    attention_finding,
    collection_map_finding,
)
from report.figures_of_modules import (
    attention as attention_figure,
)
from report.modules import _tau_by_chance
from report.names import full_names, short_names
from report.text import render_text


@pytest.fixture
def results() -> dict:
    return made()


def said(results: dict) -> str:
    return " ".join(modules.module_lines(results))


def attended(results: dict) -> dict:
    return results["analysis"]["attention"]


def of_attention(count: int, **shape) -> dict:
    """Results with nothing but the attention of so many modules, of four classes."""
    evidence = planting.all_tested(np.arange(40) % 4)
    section = attention(evidence, planting.attended_of(4, evidence.truth, [f"m{i}" for i in range(count)], **shape))
    return {"analysis": {"attention": plain(section)}}


def test_every_line_is_whole(results):
    for line in modules.module_lines(results):
        assert line.endswith(".") and not line.endswith("..") and "  " not in line and not faults(line), line


def test_the_caution_is_first_and_attention_has_the_range_of_runs(results):
    section = attended(results)
    number = section["effective_number"]
    assert modules.module_lines(results)[0] == modules.CAUTION
    assert said(results).count("(the number of equally attended modules that would be as spread)") == 1
    assert f"({number['min']:.1f} to {number['max']:.1f} over runs; {len(section['modules'])} if" in said(results)
    assert "Kendall's W" in said(results)


@pytest.mark.parametrize(
    ("agreement", "words"),
    [
        (0.32, "The 3 runs do not agree on which modules get attention (Kendall's W 0.32, about 0.33 at random): read"),
        (0.49, "The 3 runs partly agree on which modules get attention (Kendall's W 0.49, about 0.33 at random)."),
        (0.7, "The 3 runs partly agree on"),
        (0.71, "The 3 runs agree on"),
    ],
)
def test_how_far_runs_agree_is_said_before_any_module_is_named(results, agreement, words):
    attended(results).update(runs=3, stability={"kendall_w": agreement})
    assert modules.module_lines(results)[1].startswith(words)


def test_of_one_run_intervals_are_of_one_classifier():
    text = said(of_attention(6, planted=(0,), runs=1))
    assert "of one trained classifier; another run may" in text
    assert "over runs" not in text and "Kendall's W" not in text and "In the only run 1 of 6" in text


@pytest.mark.parametrize(("low", "settled"), [(0.01, False), (0.5, True)])
def test_which_module_has_most_is_named_first_only_where_an_interval_excludes_the_even_share(results, low, settled):
    for record in attended(results)["modules"]:
        record["interval"] = [low, 0.9]
    assert ("Which module has most is not settled" in said(results)) != settled
    assert ("but which has most is not settled" in attention_finding(results)) != settled


def test_contributions_are_chosen_before_their_intervals_are_looked_at(results):
    section = attended(results)
    for i, record in enumerate(section["modules"]):
        record |= {"contribution": float(i), "contribution_interval": [-1.0 if i % 2 else 0.5, 9.0]}
    last = full_names(results["analysis"])[section["modules"][-1]["module"]]
    count = (len(section["modules"]) + 1) // 2
    assert f"most is added by {last} (" in said(results)
    assert f"{count} of {len(section['modules'])} intervals are above 0 (each holds alone: fewer than 1" in said(
        results
    )


def contributions(results: dict, above: set[int]) -> str:
    """Return the sentence where the modules add 0, 1, 2, ... and these positions have an interval above 0."""
    for i, record in enumerate(attended(results)["modules"]):
        record |= {"contribution": -float(i), "contribution_interval": [0.25 if i in above else -9.0, 9.0]}
    return next(line for line in modules.module_lines(results) if line.startswith("To the score"))


def test_contributions_above_0_are_named_where_none_of_the_first_is():
    results = of_attention(10, planted=(0,))
    names = [full_names(results["analysis"])[record["module"]] for record in attended(results)["modules"]]
    fourth, fifth = (f"{names[i]} (-{i}.00, 0.25 to 9.00)" for i in (4, 5))
    assert contributions(results, {4}).endswith(f"would by chance): not those just named, but that of {fourth}.")
    assert f"not those just named, but those of {fourth} and {fifth}." in contributions(results, {4, 5})
    assert contributions(results, {4, 5, 6, 7, 8}).endswith(" and 2 more.")
    for above in (set(), {1, 5}):
        assert contributions(results, above).endswith("would by chance).")


def test_contributions_have_their_intervals_in_both_tables_of_results_txt(results):
    text = render_text(results)
    record = max(attended(results)["modules"], key=lambda record: record["attention"])
    low, high = record["contribution_interval"]
    assert f"{record['contribution']:.2f}" in text and f"  {low:.2f} to {high:.2f}  " in text
    assert len(re.findall(r"95 % interval +contribution +95 % interval", text)) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hurts_more": True}, "costs significantly more than in random orders: 1.9 points"),
        ({"hurts_more": False}, "does not cost significantly more than in random orders: 1.9 points"),
        ({"hurts_more": False, "significant": True, "difference": -0.02}, "costs significantly less than in random"),
        ({"hurts_more": None, "p_orders": None}, "of so few orders nothing is decided"),
    ],
)
def test_masking_has_one_decision(results, change, words):
    compared = {"difference": 0.019, "interval": [-0.044, 0.078], "significant": False, "orders": 20, "as_costly": 4}
    attended(results)["deletion"]["against_random"] |= compared | change
    assert words in said(results)
    assert ("4 of 20 random orders cost at least as much" in said(results)) == (change["hurts_more"] is not None)


@pytest.mark.parametrize(
    ("tau", "interval", "words"),
    [
        (0.9, [0.8, 1.0], "agrees with that"),
        (0.2, [0.1, 0.3], "does not clearly"),  # of eight modules chance alone gives ±0.55
        (-0.9, [-1.0, -0.8], "is rather the reverse of that"),
        (0.9, [-0.1, 1.0], "does not clearly"),
    ],
)
def test_a_tau_is_in_words_by_its_interval_and_by_what_chance_gives(results, tau, interval, words):
    results["analysis"]["layers"]["num_above_null"] = 1
    attended(results)["agreement"] = {
        "ranking": {"kendall_tau": tau, "interval": interval},
        "gradients": {"kendall_tau": None, "interval": None},
    }
    assert f"by attention {words}" in said(results) and "gradient" not in said(results)
    assert f"(about ±{_tau_by_chance(len(attended(results)['modules'])):.2f} would occur by chance)" in said(results)


def test_a_tau_of_random_orders_is_as_large_as_said_in_a_twentieth():
    generator, order = np.random.default_rng(0), np.arange(24)
    taus = [stats.kendalltau(order, generator.permutation(24)).statistic for _ in range(2000)]
    assert np.mean(np.abs(taus) > _tau_by_chance(24)) == pytest.approx(0.05, abs=0.015)


def test_a_ranking_of_layers_that_may_be_chance_is_not_compared(results):
    results["analysis"]["layers"]["num_above_null"] = 0
    assert "not compared with the ranking of the layers: no single layer is" in said(results)
    assert "that by the ranking" not in said(results)


@pytest.mark.parametrize(("interval", "settled"), [([0.127, 0.63], False), ([0.3, 0.63], True), (None, True)])
@pytest.mark.parametrize("noun", ["block", "projection"])
def test_a_block_or_projection_has_most_only_where_its_interval_excludes_the_even_share(
    results, noun, interval, settled
):
    rest = {"modules": 8, "attention": 0.2, "interval": None}
    first = {noun: "first", "modules": 8, "attention": 0.332, "interval": interval}
    attended(results)[f"{noun}s"] = [first, *({noun: f"other {i}"} | rest for i in range(3))]
    unsettled = f"Which {noun} has most is not settled: evenly first would have 25.0 %, which its interval does not"
    assert (unsettled in said(results)) != settled
    assert ("exclude (33.2 %, 12.7 to 63.0)." in said(results)) != settled
    assert (f"The {noun} with most attention is first (33.2 %" in said(results)) == settled


def test_of_one_module_there_is_a_sentence_and_no_figure():
    results = of_attention(1)
    assert modules.module_lines(results) == ["There is only one module to give attention to, block 0 v."]
    assert attention_finding(results) is None


def test_modules_have_short_names_that_differ_within_their_block():
    places = [("IN01", "q", "m0"), ("IN01", "q", "m1"), ("IN01", "k", "m2"), ("IN02", "q", "m3"), (None, None, "m4")]
    records = [{"block": block, "projection": kind, "module": module} for block, kind, module in places]
    layers = [
        {"module": module, "layer": module, "attention": "attn1" if module < "m3" else None} for *_, module in places
    ]
    analysis = {"attention": {"modules": records}, "layers": {"records": layers}}
    assert list(short_names(analysis).values()) == ["attn1 q (1)", "attn1 q (2)", "attn1 k", "q", "m4"]
    assert list(full_names(analysis).values()) == [
        "IN01 attn1 q (1)",
        "IN01 attn1 q (2)",
        "IN01 attn1 k",
        "IN02 q",
        "m4",
    ]


def test_modules_whose_names_would_be_the_same_have_their_ids():
    places = [("a", "b c", "m0"), ("a b", "c", "m1"), ("a", "c", "m2")]
    records = [{"block": block, "projection": kind, "module": module} for block, kind, module in places]
    assert full_names({"attention": {"modules": records}}) == {"m0": "m0", "m1": "m1", "m2": "a c"}


def test_sentences_have_names_of_modules_and_no_ids(results):
    names = full_names(results["analysis"])
    assert len({*names.values()}) == len(names) and not {*names} & {*names.values()}
    assert not [module for module in names if module in said(results)]
    assert any(name in said(results) for name in names.values())


# ----------------------------------------------------------------------------------------------------------------------
# The map
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_by", ["test", "val"])
def test_modules_that_test_loras_chose_are_said_to_be_so(results, rank_by):
    results["config"]["rank_by"] = rank_by
    assert (modules.CHOSEN in said(results)) == (rank_by == "test")


def test_a_plane_that_may_be_chance_tells_nothing_apart(results):
    for panel in results["analysis"]["collection_map"]["panels"]:
        panel["separates"] |= {"above_null": False, "distinct": [], "merged": []}
    assert "told apart from" not in said(results) and said(results).count("indistinguishable from chance") == 3
    assert collection_map_finding(results).endswith("indistinguishable from chance")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"distinct": ["a", "b"], "merged": [["c", "d"]]}, "those of a and b are told apart from every other concept"),
        ({"distinct": ["a", "b"], "merged": [["c", "d"]]}, "not told apart (below 75 %): c and d."),
        ({"distinct": [], "merged": []}, "none is told apart from every other concept"),
        ({"distinct": list("abcdef"), "merged": []}, "; every two concepts are told apart (at least 90 % of the"),
        ({"distinct": ["a" * 40, "b" * 40], "merged": []}, "those of 2 concepts are"),
    ],
)
def test_what_a_plane_tells_apart(results, section, words):
    section_of_map = results["analysis"]["collection_map"]
    panel = section_of_map["panels"][0]
    section_of_map["panels"] = [panel]
    panel["separates"] |= {"above_null": True, "compared": 6} | section
    assert words in said(results)
    panel["separates"]["compared"] = 0
    assert words not in said(results)


@pytest.mark.parametrize(
    ("compared", "words"), [(0, "none has 5"), (1, "only one has 5"), (2, "Two concepts are told")]
)
def test_concepts_that_are_not_compared_are_said_to_be_so(results, compared, words):
    for panel in results["analysis"]["collection_map"]["panels"]:
        panel["separates"] |= {"compared": compared, "distinct": [], "merged": []}
    assert words in said(results)
    assert ("No concepts are compared with each other: " in said(results)) == (compared < 2)
    assert (modules.COUNTED in said(results)) == (compared > 1)


def test_no_two_concepts_have_the_same_mark():
    marks = {(mark["marker"], mark["mfc"], mark["fillstyle"]) for mark in map(_mark, range(MARKED))}
    assert len(marks) == MARKED <= len(SHAPES) * len(FILLINGS)


# ----------------------------------------------------------------------------------------------------------------------
# The figure of attention
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "heads"), [(["IN01"] * 3 + ["IN04"] * 3, ["IN01", "IN04"]), (["IN01", "IN04"] * 30, None)]
)
def test_blocks_have_their_whole_names_where_all_fit(blocks, heads):
    ax = Figure().subplots()
    head_blocks(ax, blocks, 5)
    (top,) = ax.child_axes
    written = [label.get_text() for label in top.get_xticklabels()]
    assert (written == heads) == (heads is not None)
    assert heads is not None or written[0] == "IN01"


def test_the_heading_of_contributions_says_what_they_are_means_of(results):
    figure = Figure(layout="constrained")
    attention_figure(results, figure)
    cells = figure.axes[1]
    runs = attended(results)["runs"]
    assert f"(means of {runs} runs; intervals are in results.json)" in cells.get_title()
    assert "rows by their" in cells.get_ylabel()
    assert len(cells.lines) <= 1  # of the top modules: none in the cells
