"""results.txt: order, widths, and all that it must say once."""

import copy
import re
from dataclasses import replace

import pytest
from result_making import CLASSES, KNOWN, made, unwrapped

from report import cautions, figures, page, sentences, tables, text


def test_that_the_top_was_chosen_on_the_test_loras_is_on_the_first_page_once():
    results = made()
    (chosen,) = (one.text for one in cautions.warnings(results) if one.text.startswith("The top 2 layers were chosen"))
    assert unwrapped(text.render_text(results)).count(chosen) == 1
    results["config"]["rank_by"] = "val"
    assert "--rank-by" not in text.render_text(results)


@pytest.mark.parametrize("kind", KNOWN)
def test_results_txt_has_the_answers_first_and_short_lines(kind):
    results = made(kind, answerable=False)
    results["representations_not_run"] = [{"representation": "pca", "reason": "ranks differ"}]
    before = copy.deepcopy(results)
    rendered = text.render_text(results)
    assert results == before
    lines = rendered.splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) < 260 and rendered.endswith("\n")
    heads = ["chance  ", "Short answers", "Cautions", "1. Which layers predict? Each of 12", "2 and 3. Every",
             "\n95 % intervals", "What removing the top 2 layers costs",
             "Removing the top, and", "Not run", "Accuracies and macro-F1"]  # fmt: skip
    positions = [rendered.index(head) for head in heads]
    assert positions == sorted(positions)
    for i, question in enumerate(sentences.QUESTIONS, 1):
        assert f"\n{i}. {question.text}\n" in rendered
    words = unwrapped(rendered)
    for one in sentences.answers(results):
        assert all(sentence in words for sentence in one.sentences) and one.evidence in words
    assert all(warning.text in words for warning in cautions.warnings(results))
    assert all(words.count(check) == 1 for check in cautions.checks(results))
    assert f"note      {results['dataset']['findings'][0]['message']}\n" in rendered


@pytest.mark.parametrize("analysed", [True, False])
def test_content_that_is_made_already_gives_the_same_files(analysed):
    results = made()
    if not analysed:
        results["analysis"] = None
    content = text.content_of(results)
    assert content == text.Content(
        sentences.answers(results),
        cautions.warnings(results),
        cautions.checks(results),
        tables.tables(results),
        figures.findings(results),
    )
    assert text.render_text(results, content) == text.render_text(results)
    assert bool(text.answer_lines(results, content.answers)) == analysed
    assert page.render_page(results, {}, content) == page.render_page(results, {})


def test_content_that_is_given_is_what_the_files_hold():
    results = made()
    content = replace(text.content_of(results), warnings=[cautions.Caution("A warning of the caller.")])
    assert "- A warning of the caller.\n" in text.render_text(results, content)
    assert b"A warning of the caller." in page.render_page(results, {}, content)
    first = replace(content.answers[0], question="A question of the caller?")
    content = replace(content, answers=[first], findings={"layer_importance": "A finding of the caller"})
    assert text.answer_lines(results, content.answers)[2] == "1. A question of the caller?"
    drawn = figures.draw(results, content.findings)
    assert list(drawn) == ["layer_importance.png", "layer_importance.svg"]
    assert b"A finding of the caller" in drawn["layer_importance.svg"]
    assert b"A finding of the caller." in page.render_page(results, drawn, content)


@pytest.mark.parametrize("absent", [True, False])
def test_without_an_analysis_one_line_says_which_flag_makes_it(absent):
    results = made()
    if absent:
        del results["analysis"]
    else:
        results["analysis"] = None
    assert sentences.answers(results) == [] and cautions.checks(results) == []
    rendered = text.render_text(results)
    assert rendered.count("--rank-by=val avoids that") == 1
    assert (
        rendered.count("--controls=basic") == 1 and "Short answers" not in rendered and len(cautions.NO_CONTROLS) <= 120
    )
    assert (
        f"\n{text.LAYER_HEADER}\n" in rendered and f"\n{text.layer_row(1, results['layer_ranking'][0])}\n" in rendered
    )
    assert list(tables.tables(results)) == ["ranking", "metrics"]


def test_blocks_stand_beside_their_layers_and_of_very_many_the_most_accurate_are_shown():
    results = made()
    ranking, blocks = results["layer_ranking"], results["analysis"]["layers"]["groups"]["block"]
    rendered = text.render_text(results)
    for record in ranking[: results["config"]["top_k"]]:
        assert re.search(rf"  {record['block']}  {re.escape(record['layer'])}\n", rendered)
        assert f"  {record['role']:4}  {record['block']:<12}  {record['layer']}" in text.layer_row(1, record)
    assert text.layer_row(1, ranking[0] | {"block": None}).index(ranking[0]["layer"]) == text.LAYER_HEADER.index(
        "layer"
    )
    some = blocks["down 0"]
    results["analysis"]["layers"]["groups"]["block"] = {
        f"a long name of a part of it, layer {i}": some | {"mean": i / 100} for i in range(80)
    }
    shown = text.render_text(results).split("most accurate blocks first\n")[1].split("\n\n")[0].splitlines()
    assert len(shown) == 22 and shown[-1] == "(60 more in results.json)"
    assert [line.split("  ")[0][-2:] for line in shown[1:-1]] == [str(i) for i in range(79, 59, -1)]
    assert max(map(len, shown)) <= text.WIDTH


def test_many_and_long_names_stay_within_the_page():
    results = made()
    for section in (results["analysis"]["concepts"]["classes"], results["dataset"]["classes"]):
        section[:] = ["a very long name of a concept " * 5 + str(c) for c in range(CLASSES)]
    lines = text.render_text(results).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Each concept"))
    assert all(len(line) <= 120 and "..." in line for line in lines[at + 2 : at + 7])
