"""Tables are rectangular and hold what results.json holds."""

import pytest
from result_making import CLASS_NAMES, KNOWN, LAYERS, made

from report import tables, text, wording


def cells_of(results: dict, name: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    return {row[0]: list(row[1:]) for row in tables.tables(results)[name].rows}


@pytest.mark.parametrize("kind", KNOWN)
def test_tables_are_rectangular_and_of_text(kind):
    made_tables = tables.tables(made(kind))
    assert {"ranking", "metrics", "places", "conditional", "controls", "differences", "drops", "disagreement",
            "modules", "concepts"} <= made_tables.keys()  # fmt: skip
    for table in made_tables.values():
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
        assert 0 <= table.head < len(table.columns)


def test_the_ranking_holds_every_layer_with_its_numbers():
    results = made()
    ranking = tables.tables(results)["ranking"]
    assert [row[-1] for row in ranking.rows] == [record["layer"] for record in results["layer_ranking"]]
    for row, record in zip(ranking.rows, results["analysis"]["layers"]["records"], strict=True):
        assert row[1].startswith(f"{wording.percent(record['accuracy'])} ± ")
        assert row[2:5] == [
            wording.bounds(record["interval"]),
            wording.p_cell(record["p_family"]),
            f"{100 * record['top_k_share']:.0f}",
        ]


def test_the_most_accurate_blocks_stand_first_with_their_sums():
    results = made()
    blocks, table = results["analysis"]["layers"]["groups"]["block"], tables.tables(results)["blocks"]
    assert {row[0] for row in table.rows} == set(blocks) == {f"down {i}" for i in range(LAYERS // 2)}
    means = [blocks[row[0]]["mean"] for row in table.rows]
    assert means == sorted(means, reverse=True)
    for name, layers, above, mean, interval in table.rows:
        block = blocks[name]
        assert [int(layers), int(above)] == [block["layers"], block["above_null"]]
        assert (mean, interval) == (wording.percent(block["mean"]), wording.bounds(block["interval"]))
    assert "block" not in {row[0] for row in tables.tables(results)["places"].rows}


def test_the_ranking_shows_blocks_unless_no_layer_is_in_one():
    results = made()
    ranking = tables.tables(results)["ranking"]
    assert [row[-2] for row in ranking.rows] == [record["block"] for record in results["layer_ranking"]]
    assert ranking.columns[-2] == "block" and len(ranking.columns) - 2 in ranking.words
    results["layer_ranking"][0]["block"] = None
    assert tables.tables(results)["ranking"].rows[0][-2] == ""
    for record in results["layer_ranking"]:
        record["block"] = None
    for blocks in ({}, {"MID": results["analysis"]["layers"]["groups"]["block"]["down 0"]}):
        results["analysis"]["layers"]["groups"]["block"] = blocks
        made_tables = tables.tables(results)
        assert "blocks" not in made_tables and "block" not in made_tables["ranking"].columns
        assert made_tables["ranking"].rows[0][-2] in ("down", "up")


def test_concepts_that_lose_most_stand_first():
    results = made()
    concepts, drop = tables.tables(results)["concepts"], results["analysis"]["concepts"]["drop"]["stats"]
    assert sorted(row[0] for row in concepts.rows) == sorted(CLASS_NAMES)
    assert [row[2] for row in concepts.rows] == [wording.percent(value) for value in sorted(drop, reverse=True)]
    none_best = made("no signal")
    assert [row[0] for row in tables.tables(none_best)["concepts"].rows] == CLASS_NAMES
    assert "recall" not in tables.tables(none_best)["concepts"].columns
    assert "norm" in tables.tables(made(answerable=False))["concepts"].columns


def test_removals_are_those_of_results():
    results = made("distributed", top_k=1)
    section, rows = results["analysis"]["robustness"]["stats"], cells_of(results, "controls")
    assert (section["removed"], section["most"]) == (1, 2)
    cells = [cell for (cell,) in rows.values()]
    for estimate in ("all", "without_bottom", "top_alone"):
        assert wording.left_text(section[estimate]).replace(" %", "") in cells
    for estimate, removed in (("without_top", 1), ("without_most", 2)):
        assert f"{wording.left_text(section[estimate]).replace(' %', '')}, {removed} removed" in cells
    for share in ("survives", "survives_most", "steepest"):
        assert f"{wording.percent(section[share]['share'])} ({wording.bounds(section[share]['interval'])})" in cells
    half, random, index = section["survives_half"], section["without_random"], section["concentration"]
    assert f"{wording.percent(half['share'])} ({wording.bounds(half['interval'])}), {half['removed']} removed" in cells
    assert f"{wording.percent(random['mean'])}, {wording.bounds((random['min'], random['max']))}" in cells
    assert f"{random['at_or_below']}, {wording.p_text(random['p'])}" in cells
    assert f"{wording.number(index['index'])} ({wording.bounds(index['interval'], wording.number)})" in cells
    for curve in section["curves"].values():
        assert wording.number(curve["area"]) in cells
    assert rows["verdict"] == ["distributed"] and rows["removed from"] == [f"{LAYERS} layers"]


def test_shares_that_are_not_known_or_of_nothing():
    results = made("no signal")
    unknown = [line for line, cells in cells_of(results, "controls").items() if cells == ["not known"]]
    assert len(unknown) == 4  # two shares, the fall, and the concentration
    section = results["analysis"]["robustness"]["stats"]
    section |= {"survives_most": {"share": 0.0, "interval": None}, "without_most": {"accuracy": 0.2, "interval": None}}
    section["most"] = 3  # with as many as the top, they have no lines of their own
    cells = [cell for (cell,) in cells_of(results, "controls").values()]
    assert cells.count("not known") == 4 and "nothing left" in cells
    assert "nothing is left (20.0, chance), 3 removed" in cells


def test_names_of_the_lines_of_removals_are_never_cut():
    assert all(len(line) <= text.WORD_WIDTH for line in cells_of(made(), "controls"))


def test_differences_hold_intervals_and_distances():
    results = made()
    analysis, rows = results["analysis"]["representations"], cells_of(results, "differences")
    for name, cells in rows.items():
        intervals = [condition["intervals"][name] for condition in analysis["conditions"].values()]
        assert cells[:2] == [wording.bounds(interval) for interval in intervals]
    assert rows["stats"][2:] == ["", ""] and tables.tables(results)["differences"].columns[3] == "behind stats"
    for record in analysis["conditions"]["baseline"]["comparisons"]:
        distance = f"{wording.percent(record['difference'])} ({wording.bounds(record['interval'])})"
        assert rows[record["b"]][2:] == [distance, wording.p_cell(record["p"])]
    assert len(tables.tables(made("no signal"))["differences"].columns) == 3  # behind none
    assert len(tables.tables(made(names=("stats",)))["differences"].columns) == 3


def test_drops_stand_beside_those_where_others_choose():
    results = made("localized")
    analysis, crossed = results["analysis"]["representations"], results["analysis"]["cross_fitted"]
    del crossed["drops"]["ensemble"]  # which could not be trained
    rows = cells_of(results, "drops")
    for name, cells in rows.items():
        drop, chosen = analysis["drops"][name], crossed["drops"].get(name)
        expected = [f"{wording.percent(drop['drop'])} ({wording.bounds(drop['interval'])})", wording.p_cell(drop["p"])]
        honest = ["", ""]
        if chosen:
            honest = [f"{wording.percent(chosen['drop_cf'])} ({wording.bounds(chosen['interval'])})"]
            honest.append(wording.p_cell(chosen["p"]))
        assert cells == expected + honest
    assert "five folds" in tables.tables(results)["drops"].note
    crossed["drops"] = {}
    table = tables.tables(results)["drops"]
    assert len(table.columns) == 3 and "five folds" not in table.note
    results["analysis"]["representations"] = None
    assert not {"drops", "differences"} & tables.tables(results).keys()


def test_tables_of_the_top_layers_only_where_there_are_several():
    results = made()
    information = results["analysis"]["layer_information"]
    cell = tables.tables(results)["disagreement"].rows[0][2]
    disagreement, kappa = (information[key]["top_k"][0][1] for key in ("disagreement", "kappa"))
    assert cell == f"{wording.percent(disagreement)} ({wording.number(kappa)})"
    assert "disagreement" not in tables.tables(made(top_k=1))
    del results["analysis"]["conditional"]
    assert "conditional" not in tables.tables(results)


def test_clusters_of_one_layer_are_left_out():
    results = made()
    members = [{"cluster": 1, "layers": 1, "roles": {"up": 1}, "projections": {}},
               {"cluster": 2, "layers": 3, "roles": {"down": 1, "up": 2}, "projections": {"to_q": 3}}]  # fmt: skip
    results["analysis"]["layer_information"]["clusters"]["members"] = members
    assert [list(row) for row in tables.tables(results)["clusters"].rows] == [["2", "3", "down 1, up 2", "to_q 3"]]
    results["analysis"]["layer_information"]["clusters"]["members"] = members[:1]
    assert "clusters" not in tables.tables(results)


def test_p_of_kruskal_and_wallis_have_another_floor_than_those_of_draws():
    results = made()
    results["analysis"]["rank_structure"]["modules"][0]["p_fdr"] = 0.0
    assert tables.tables(results)["modules"].rows[0][1] == "< 1e-9"
    assert "< 1e-9" not in [row[3] for row in tables.tables(results)["ranking"].rows]


def test_several_splits_have_tables_of_their_own_without_an_analysis_too():
    results = made(splits=5)
    made_tables = tables.tables(results)
    row = next(row for row in made_tables["splits"].rows if row[0] == "stats")
    record = results["splits"]["representations"]["stats"]
    shown = wording.bounds(record["drop"]["interval"])
    assert row[3] == f"{wording.percent(record['drop']['mean'])} ({shown})"
    shares = [float(row[0]) for row in made_tables["split layers"].rows]
    assert shares == sorted(shares, reverse=True) and len(shares) == len(results["layer_ranking"])
    assert sum(shares) == pytest.approx(100 * results["config"]["top_k"])
    results["analysis"] = None
    assert "Over 5 splits" in text.render_text(results) and "splits" in tables.tables(results)
    assert "splits" not in tables.tables(made())
