"""results.txt: order, widths, and all that it must say once."""

import copy
import re
from dataclasses import replace
from pathlib import Path

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
        {},
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
    assert list(drawn) == [f"layer_importance.{kind}" for kind in ("png", "svg", "pdf")]
    assert b"A finding of the caller" in drawn["layer_importance.svg"]
    assert b"A finding of the caller." in page.render_page(results, drawn, content)


@pytest.mark.parametrize("absent", [True, False])
def test_without_an_analysis_it_is_said_why_and_the_tables_of_the_phases_are_there(absent):
    results = made() | {"not_done": {"analysis": "out of memory"}}
    if absent:
        del results["analysis"]
    else:
        results["analysis"] = None
    assert sentences.answers(results) == [] and cautions.checks(results) == []
    assert text.short_lines(results, []) == []
    rendered = text.render_text(results)
    assert rendered.count("--rank-by=val avoids that") == rendered.count("\nAnalysis missing: out of memory.\n") == 1
    assert "Short answers" not in rendered
    row = text.layer_row(1, results["layer_ranking"][0], 3)
    assert f"\n{text.LAYER_HEADER}\n" in rendered and f"\n{row}\n" in rendered
    assert list(tables.tables(results)) == ["ranking", "metrics"]


def test_blocks_stand_beside_their_layers_and_of_very_many_the_most_accurate_are_shown():
    results = made()
    ranking, blocks = results["layer_ranking"], results["analysis"]["layers"]["groups"]["block"]
    rendered = text.render_text(results)
    for record in ranking[: results["config"]["top_k"]]:
        assert re.search(rf"  {record['block']}  {re.escape(record['layer'])}\n", rendered)
        assert f"  {record['role']:4}  {record['block']:<12}  {record['layer']}" in text.layer_row(1, record, 3)
    assert text.layer_row(1, ranking[0] | {"block": None}, 3).index(ranking[0]["layer"]) == text.LAYER_HEADER.index(
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


def test_files_that_are_skipped_are_named_and_of_very_many_the_rest_is_counted():
    skipped = [{"path": f"a/{i}.safetensors", "reason": "cut short. " + 500 * "x"} for i in range(13)]
    lines = text.skipped_lines(skipped, "left out").splitlines()
    assert lines[0] == "skipped   13 files left out" and lines[-1] == "          and 3 more" and len(lines) == 12
    assert lines[1].startswith("          a/0.safetensors: cut short. ") and max(map(len, lines)) <= 250
    assert text.skipped_lines(skipped[:1], "left out").count("\n") == 1


# -- one run ----------------------------------------------------------------------------------------------------------


def test_of_one_run_there_is_no_deviation_and_columns_stay_aligned():
    results = made()
    results["config"]["num_runs"] = 1
    for condition in ("baseline_results", "ablation_results"):
        for entry in results[condition].values():
            for of in (entry["test_accuracy"], entry["test_f1"]):
                of.update(runs=of["runs"][:1], std=0.0)
    for record in results["layer_ranking"]:
        record["accuracy_std"] = 0.0
    content = text.content_of(results)
    written = (
        text.render_text(results, content),
        page.render_page(results, {}, content).decode().replace(page.SCRIPT, ""),
    )
    assert "of a single run" in written[0] and not any(re.search(r"\d +± ?\d", of) for of in written)
    assert {word for of in written for word in re.findall(r"\S*±", of)} == {"±"}  # that of what chance would give
    assert not any("±" in title for title in content.findings.values())
    entry, record = results["baseline_results"]["stats"], results["layer_ranking"][0]
    several = entry | {"test_accuracy": entry["test_accuracy"] | {"runs": [0.9, 0.9]}}
    rows = text.result_row("stats", entry), text.result_row("stats", several)
    assert rows[0].rindex(".") == rows[1].rindex(".") and "±" not in rows[0] and " ± 0.0 " in rows[1]  # they agree
    assert text.layer_row(1, record, 1).index(record["layer"]) == text.layer_row(1, record, 3).index(record["layer"])


def test_what_has_one_run_has_no_deviation_among_others_that_have():
    results = made()
    for condition in ("baseline_results", "ablation_results"):
        one = results[condition]["spectral"]
        one |= {name: one[name] | {"runs": one[name]["runs"][:1], "std": 0.0} for name in ("test_accuracy", "test_f1")}
    table = text.render_text(results).split("2 and 3. Every")[1].split("\n\n")[0].splitlines()
    rows = {line.split()[0]: line for line in table}
    assert rows["stats"].count(" ± ") == 4 and "±" not in rows["spectral"]
    points = [[match.start() for match in re.finditer(r"\.\d", rows[name])] for name in ("stats", "spectral")]
    assert points[1] == points[0][::2][:4] + points[0][-1:]  # means stand below means


# -- the end of a run -------------------------------------------------------------------------------------------------


def of_run(change: str, value: object, **config: object) -> dict:
    """Return results in which one thing is other than in those of a full run that decides everything."""
    results = made() | {"not_done": {}}
    analysis = results["analysis"]
    analysis |= {"few_test_loras": False, "controls": "basic"}
    analysis["groups"]["may_be_groups"] = False
    for record in analysis["hypotheses"]:
        record["outcome"] = "confirmed"
    results["config"] |= {"controls": "basic"} | config
    *path, last = change.split(".")
    section = results
    for key in path:
        section = section[key]
    section[last] = value
    return results


@pytest.mark.parametrize(
    ("change", "value", "config", "step"),
    [
        ("dataset.source", "built-in digits", {"quick": True}, "python data.py inspect FOLDER"),
        ("dataset.source", "built-in digits", {}, "python data.py inspect FOLDER"),
        (
            "not_done",
            {"analysis": "out of memory"},
            {"quick": True},
            "same command again does what is missing: analysis",
        ),
        (
            "config.quick",
            True,
            {"controls": "none"},
            "without --quick trains in more runs and epochs, and removes other",
        ),
        ("config.quick", True, {}, "without --quick trains in more runs and epochs"),
        ("config.controls", "none", {}, "--controls=basic"),
        ("analysis.groups.may_be_groups", True, {"quick": True}, "--group-column=artist uses it"),
        (
            "analysis.representations.conditions.baseline.above_null",
            [],
            {},
            "more LoRAs of each class, or other labels",
        ),
        (
            "analysis.few_test_loras",
            True,
            {},
            "--splits=5 shows how far the answers depend on the split, and more LoRAs",
        ),
        ("analysis.few_test_loras", True, {"splits": 5}, "more LoRAs of each class: with these some"),
        ("analysis.robustness.stats.verdict", "undecided", {"splits": 5}, "more LoRAs of each class: with these some"),
        ("config.splits", 1, {}, "--splits=5 shows how far the answers depend on the split"),
        ("config.splits", 5, {}, "docs/method.md"),
    ],
)
def test_the_next_step_fits_the_run(change, value, config, step):
    results = of_run(change, value, **config)
    told = text.next_step(results)
    assert step in told and len(told) <= text.WIDTH
    assert ("--quick" in told) == (change == "config.quick") and ("more LoRAs decide" in told) == ("and more" in step)


def test_a_run_without_an_analysis_has_a_next_step_too():
    results = of_run("not_done", {"analysis": "out of memory", "figure attention": "no font"})
    results["analysis"] = None
    lines = text.end_lines(results, Path("out") / "ablation_zoo", "Written to out")
    assert lines == ["", "Written to out", "  out/ablation_zoo/report.html", f"next: {text.next_step(results)}"]
    assert lines[-1].endswith("does what is missing: analysis and figure attention")


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("quick", [False, True])
def test_the_short_answers_are_the_beginning_of_the_long_ones_and_fit_a_screen(kind, quick):
    results = made(kind)
    results["config"]["quick"] = quick
    answered = sentences.answers(results)
    lines = text.short_lines(results, answered)
    words = " ".join(" ".join(lines).split())
    assert len(lines) <= 40 and max(map(len, lines)) <= text.WIDTH and ("of a --quick run" in words) == quick
    assert all(
        f"{i}. {answer.question} {' '.join(answer.sentences[:2])}" in words for i, answer in enumerate(answered, 1)
    )
    for answer in answered:
        (listed,) = re.findall(f" {answer.outcome}: (.*?)(?: undecided: | not answerable: | refuted: |$)", words)
        assert answer.hypothesis in listed
    assert f"{len(cautions.warnings(results))} cautions and the other sentences" in lines[-1]


def test_what_was_not_asked_for_is_not_listed():
    config = {"top_k": 5, "num_runs": 3, "rank_by": "test", "seed": 42, "controls": "none", "splits": 1}
    config |= {"null_shuffles": 0, "quick": False}
    config |= {name: {"max_epochs": 30, "patience": 5} for name in ("classifier", "autoencoder")}
    environment = {"workers": 2, "job": None, "device": "CPU", "host": "n"}
    lines = text.settings_lines(config, environment, "out", with_autoencoders=False)
    assert "autoencoders" not in lines and "splits" not in lines and "shuffles" not in lines and "quick" not in lines
    config |= {"splits": 5, "null_shuffles": 19, "quick": True}
    lines = text.settings_lines(config, environment, "out")
    assert "; autoencoders 30 and 5" in lines and ", splits 5, null_shuffles 19, quick True, output_dir out" in lines
