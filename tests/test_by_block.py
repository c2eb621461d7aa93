"""Blocks in place of layers: which layers are taken together, and what figures show; long tables are bounded too."""

import copy
import time

import numpy as np
import pytest
from result_making import made
from test_figures import results_of

from report import figures, page, text
from report.by_block import MOST_BLOCKS, MOST_LAYERS, blocks_of, in_blocks
from report.figures_of_layers import _similarity
from report.names import full_names

NAMES = [f"concept {i}" for i in range(12)]


def members(names, **most):
    return [(block.name, list(block.members)) for block in blocks_of(names, **most)]


def test_a_block_has_all_its_layers_and_stands_where_the_first_of_them_does():
    assert members(["a", "a", "b", "a", "c"]) == [("a", [0, 1, 3]), ("b", [2]), ("c", [4])]


def test_layers_in_no_block_are_taken_together_with_their_neighbours():
    assert members([None] * 5 + ["a"] + [""] * 2) == [("", [0, 1, 2, 3]), ("", [4]), ("a", [5]), ("", [6, 7])]
    assert [block.title for block in blocks_of([None] * 6)] == ["layers 0 to 3", "layers 4 to 5"]


def test_of_more_blocks_than_there_is_room_for_neighbours_are_taken_together():
    assert members(list("aabbcd"), most=2) == [("a", [0, 1, 2, 3]), ("c", [4, 5])]
    assert [block.title for block in blocks_of(list("aabbcd"), most=2)] == ["a to b", "c to d"]


@pytest.mark.parametrize("blocks", [0, 1, 24, 99, 150, 722])
def test_every_layer_is_in_one_of_few_blocks(blocks):
    names = [f"block {i * blocks // 1444}" if blocks and i % 7 else None for i in range(1444)]
    found = blocks_of(names)
    assert sorted(layer for block in found for layer in block.members) == list(range(1444))
    assert len(found) <= MOST_BLOCKS + 1


@pytest.fixture(scope="module")
def results():
    return results_of(2 * MOST_LAYERS, NAMES, top_k=3, blocks=20)


def test_numbers_of_blocks_are_those_of_their_layers(results):
    before = copy.deepcopy(results)
    shown, records = in_blocks(results)["analysis"], results["analysis"]["layers"]["records"]
    assert results == before
    assert [(record["depth"], record["role"]) for record in shown["layers"]["records"][:3]] == [
        (0, "down"), (0, "up"), (1, "down"),
    ]  # fmt: skip
    inside = [i for i, record in enumerate(records) if record["block"] == "block 3" and record["role"] == "up"]
    (position,) = (i for i, r in enumerate(shown["layers"]["records"]) if (r["block"], r["role"]) == ("block 3", "up"))
    accuracy = [records[i]["accuracy"] for i in inside]
    record = shown["layers"]["records"][position]
    assert record["accuracy"] == pytest.approx(np.mean(accuracy))
    assert record["interval"] == [min(accuracy), max(accuracy)]
    recall = np.array(results["analysis"]["concepts"]["recall"])
    np.testing.assert_allclose(shown["concepts"]["recall"][position], recall[inside].mean(0))
    np.testing.assert_allclose(shown["concepts"]["best_layer"], recall.max(0))
    modules = results["analysis"]["attention"]["modules"]
    assert sum(module["attention"] for module in shown["attention"]["modules"]) == pytest.approx(1)
    assert sum(module["even"] for module in shown["attention"]["modules"]) == pytest.approx(1)
    own = {records[i]["module"] for i in inside}
    (block,) = (module for module in shown["attention"]["modules"] if module["block"] == "block 3")
    assert block["attention"] == pytest.approx(sum(m["attention"] for m in modules if m["module"] in own))
    contribution = np.array(results["analysis"]["attention"]["classes"][0]["contribution"])
    summed = shown["attention"]["classes"][0]["contribution"]
    assert sum(summed) == pytest.approx(contribution.sum())
    assert len(summed) == len(shown["attention"]["modules"]) == len(shown["rank_structure"]["modules"]) == 20


def test_a_top_layer_is_that_of_its_block(results):
    top = in_blocks(results)
    layers = {record["layer"] for record in top["analysis"]["layers"]["records"]}
    assert results["top_layers"][0] in layers


def test_top_layers_stand_at_their_blocks_with_their_own_accuracy_and_name(results):
    shown, names = in_blocks(results), full_names(results["analysis"])
    records = {record["layer"]: record for record in results["analysis"]["layers"]["records"]}
    assert {record["layer"] for record in shown["top_shown"]} == {*results["top_layers"]}
    for record in shown["top_shown"]:
        own = records[record["layer"]]
        assert record["accuracy"] == own["accuracy"]
        assert shown["blocks_shown"][record["depth"]].name == own["block"]
        assert shown["names_shown"][record["module"]] == names[own["module"]]


def test_similarity_of_blocks_is_the_mean_of_that_of_their_layers(results):
    shown = in_blocks(results)
    whole = _similarity(results)
    means = _similarity(shown)
    first, second = shown["members_shown"][:2]
    assert means[0, 1] == pytest.approx(whole[np.ix_(first, second)].mean())
    others = ~np.eye(len(first), dtype=bool)  # of a layer with itself nothing is told
    assert means[0, 0] == pytest.approx(whole[np.ix_(first, first)][others].mean())
    assert means.shape == (40, 40) and np.allclose(means, means.T)


def test_the_title_says_that_blocks_are_shown_and_the_finding_is_of_the_layers(results):
    only = results | {"analysis": {name: results["analysis"][name] for name in ("layers", "concepts")}}
    for name, finding, figure in figures.finished_figures(only):
        assert "[blocks are shown, of 600 layers]" in figure.get_suptitle().replace("\n", " ")
        assert "blocks" not in finding
        if name == "layer_importance":
            assert "of 600 layers" in finding
            assert figure.axes[0].get_xlim()[1] < 25


def test_few_layers_are_shown_each():
    shown = results_of(12, top_k=2)
    only = shown | {"analysis": {"layers": shown["analysis"]["layers"]}}
    for _, _, figure in figures.finished_figures(only):
        assert "blocks are shown" not in figure.get_suptitle()


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 25, 361])
def test_figures_of_1444_layers_take_seconds_and_stay_small(blocks):
    results, start = results_of(1444, NAMES, top_k=5, blocks=blocks), time.perf_counter()
    files = figures.draw(results)
    assert time.perf_counter() - start < 60
    assert max(map(len, files.values())) < 600_000


def of_many_layers(count: int) -> dict:
    """Made results whose ranking and tables are so long."""
    results = made()
    ranking, records = results["layer_ranking"], results["analysis"]["layers"]["records"]
    copies = range(count // len(records))
    results["layer_ranking"] = [r | {"layer": f"{r['layer']} {i}"} for i in copies for r in ranking]
    results["analysis"]["layers"]["records"] = [r | {"layer": f"{r['layer']} {i}"} for i in copies for r in records]
    return results


def test_long_tables_are_bounded_and_say_how_many_rows_are_left_out():
    results = of_many_layers(1440)
    results["config"]["top_k"] = 720
    content = text.content_of(results)
    lines = text.render_text(results, content)
    assert "(1340 more in results.json)" in lines
    assert len(lines.splitlines()) < 400
    html = page.render_page(results, {}, content).decode()
    assert "(1140 more in results.json)" in html


def test_concepts_of_blocks_are_ordered_by_their_best_layer_as_the_title_says():
    results = results_of(2 * MOST_LAYERS, [f"concept {i}" for i in range(50)], blocks=20)
    only = results | {"analysis": {name: results["analysis"][name] for name in ("layers", "concepts")}}
    ((_, title, figure),) = figures.finished_figures(
        only, {"concept_layer_map": figures.findings(only)["concept_layer_map"]}
    )
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(rows) == 25 and f'recognise "{rows[0]}" best' in title and f'and "{rows[-1]}" worst' in title
