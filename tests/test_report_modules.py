"""Attention over modules and the plane in sentences and tables: whole, with the numbers of results.json."""

import copy
import re

import numpy as np
import pytest
from result_making import faults, made
from test_sentences import numbers

from report import figures, modules, page, tables, text, wording

SECTIONS = ("attention", "collection_map")


def said(results: dict) -> str:
    return " ".join(modules.module_lines(results))


def without_permuted(section: dict) -> None:
    section["permuted"] = None
    for record in section["modules"]:
        record |= {"above_permuted": None, "p_permuted": None}


def none_above(section: dict) -> None:
    section["permuted"] |= {"above": []}


def undecided(section: dict) -> None:
    section["permuted"] |= {"decided": False, "above": [], "trainings": 1}


def without_other_orders(section: dict) -> None:
    section["deletion"] |= {"random": None, "against_random": None, "against_ranking": None}
    del section["deletion"]["curves"]["ranking"]


def a_single_lora(section: dict) -> None:
    for record in (*section["modules"], *section["blocks"], *section["projections"]):
        record |= {"interval": None, "contribution_interval": None}
    section["effective_number"]["interval"] = None
    for tau in section["agreement"].values():
        tau["interval"] = None


def a_single_module(section: dict) -> None:
    section["modules"], section["blocks"], section["projections"] = section["modules"][:1], section["blocks"][:1], []
    for record in section["classes"]:
        for name in ("attention", "low", "high", "contribution", "contribution_low", "contribution_high"):
            record[name] = record[name][:1]
    section["agreement"] = {name: {"kendall_tau": None, "interval": None} for name in section["agreement"]}
    section["deletion"]["masked"] = [0]


def a_class_without_loras(section: dict) -> None:
    section["classes"][1] |= dict.fromkeys(section["classes"][1]) | {"class": "dog", "loras": 0}


CHANGES = (
    *(without_permuted, none_above, undecided, without_other_orders, a_single_lora, a_single_module),
    a_class_without_loras,
)


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_every_line_is_whole_and_every_number_is_one_of_the_results(change):
    results = made()
    if change:
        change(results["analysis"]["attention"])
    before = copy.deepcopy(results)
    lines = modules.module_lines(results)
    assert results == before and len(lines) >= (4 if change is a_single_module else 8)
    values = [n for name in SECTIONS for n in numbers(results["analysis"][name])]
    values += [sum(panel["explained"]) for panel in results["analysis"]["collection_map"]["panels"]]
    values += [1 / len(results["analysis"]["attention"]["modules"])]
    shown = {f"{scale * value + 0.0:.{digits}f}" for value in values for scale, digits in ((100, 1), (1, 2))}
    shown |= {f"{value:.2g}" for value in values} | {"0.05", "0.0001"}
    for line in lines:
        assert line.endswith(".") and not line.endswith("..") and "  " not in line and not faults(line), line
        for cell in re.findall(r"-?\d+\.\d+", line):
            assert cell in shown or cell in ("0.0", "0.00"), (cell, line)
    assert not faults(text.render_text(results))
    for name in SECTIONS:
        assert not faults(figures.findings(results)[name])
    (figure,) = (f for name, _, f in figures.finished_figures(results) if name == "attention")
    rows = [record for record in results["analysis"]["attention"]["classes"] if record["contribution"]]
    added = np.sort(np.ravel([record["contribution"] for record in rows]))
    np.testing.assert_allclose(np.sort(np.ravel(figure.axes[1].images[0].get_array())), added)


def test_what_masking_costs_is_said_as_it_was_decided():
    results = made()
    compared = results["analysis"]["attention"]["deletion"]["against_random"]
    compared |= {"hurts_more": True}
    assert "costs more than random orders" in said(results)
    assert "costs more than at random" in figures.findings(results)["attention"]
    compared |= {"hurts_more": False, "as_costly": 0}
    assert "costs not clearly more than random orders" in said(results) and "none of 20 orders cost as much" in said(
        results
    )
    compared |= {"significant": True, "difference": -0.1}
    assert "costs less than random orders" in said(results)


def test_permuted_labels_decide_only_where_there_are_enough():
    results = made()
    section = results["analysis"]["attention"]
    assert len(section["permuted"]["above"]) == 2 and "2 of 6 modules get more attention" in said(results)
    undecided(section)
    assert "too few to decide by" in said(results) and "get more attention" not in said(results)
    none_above(section)
    section["permuted"]["decided"] = True
    assert "No module gets more attention" in said(results)


def test_concepts_that_stand_apart_or_are_merged_are_named_where_they_are_few():
    results = made()
    (first, *_) = results["analysis"]["collection_map"]["panels"]
    first["separates"] |= {"distinct": ["cat"], "merged": [["dog", "a & b"]], "above_null": False}
    line = modules.module_lines(results)[-3]
    assert "cat stands apart" in line and "merged are dog and a & b." in line and "indistinguishable" in line
    first["separates"] |= {"distinct": [str(i) for i in range(9)], "merged": []}
    assert "9 concepts stand apart" in said(results) and "none are merged" in said(results)
    first["separates"] |= {"merged": [["x", str(i)] for i in range(5)]}
    assert "2 more groups" in said(results)


def test_the_attention_table_holds_every_module_most_attention_first():
    results = made()
    table = tables.tables(results)["attention"]
    records = sorted(results["analysis"]["attention"]["modules"], key=lambda record: -record["attention"])
    assert [row[-1] for row in table.rows] == [record["module"] for record in records]
    for row, record in zip(table.rows, records, strict=True):
        assert row[:2] == [wording.percent(record["attention"]), wording.bounds(record["interval"])]
    sums = tables.tables(results)["attention sums"]
    assert [row[-2:] for row in sums.rows] == [
        ["block", "block 0"], ["block", "block 1"], ["projection", "to_v"], ["projection", "to_q"]
    ]  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_each_section_may_be_missing(name):
    results = made()
    results["analysis"][name] = None
    assert modules.module_lines(results) and text.MODULES_HEADING in text.render_text(results)
    assert name not in figures.findings(results) and not faults(text.render_text(results))


@pytest.mark.parametrize("absent", [True, False])
def test_without_both_nothing_is_said_of_them(absent):
    results = made()
    for name in SECTIONS:
        results["analysis"][name] = None
        if absent:
            del results["analysis"][name]
    assert modules.module_lines(results) == [] and not {*SECTIONS} & {*figures.findings(results)}
    assert text.MODULES_HEADING not in text.render_text(results)
    shown = page.render_page(results, {}).decode()
    assert 'id="modules"' not in shown and text.MODULES_HEADING not in shown
    assert "attention" not in tables.tables(results)
