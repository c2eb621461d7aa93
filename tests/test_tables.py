"""Tables are rectangular and hold what results.json holds."""

from result_making import CLASS_NAMES, made

from report import tables, wording


def test_tables_are_rectangular_and_hold_what_results_hold():
    results = made()
    made_tables = tables.tables(results)
    assert {"ranking", "metrics", "places", "conditional", "controls", "differences", "disagreement", "modules",
            "concepts"} <= made_tables.keys()  # fmt: skip
    for table in made_tables.values():
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    ranking = made_tables["ranking"]
    assert [row[-1] for row in ranking.rows] == [record["layer"] for record in results["layer_ranking"]]
    record = results["analysis"]["layers"]["records"][0]
    assert ranking.rows[0][2:5] == [
        wording.bounds(record["interval"]),
        "< 0.0001",
        f"{100 * record['top_k_share']:.0f}",
    ]
    concepts, drop = made_tables["concepts"], results["analysis"]["concepts"]["drop"]["stats"]
    assert sorted(row[0] for row in concepts.rows) == sorted(CLASS_NAMES)
    assert concepts.rows[0][2] == wording.percent(max(drop))
    area = results["analysis"]["robustness"]["stats"]["curves"]["most_first"]["area"]
    assert ["area under the curve, most first", f"{area:.2f}"] in [list(row) for row in made_tables["controls"].rows]


def test_the_row_of_the_curve_is_named_by_what_it_is():
    results = made()
    found = results["analysis"]["robustness"]["stats"]
    rows = {row[0]: row[1] for row in tables.tables(results)["controls"].rows}
    half = found["survives_half"]
    told_half = f"{wording.percent(half['share'])} ({wording.bounds(half['interval'])}), {half['removed']} removed"
    assert rows["lowest share until half are removed"] == told_half
    found |= {"survives": None, "survives_half": None, "verdict": "undecided"}
    rows = {row[0]: row[1] for row in tables.tables(results)["controls"].rows}
    assert rows["survives without the top 2"] == "too near chance"


def test_p_of_kruskal_and_wallis_have_another_floor_than_those_of_draws():
    results = made()
    results["analysis"]["rank_structure"]["modules"][0]["p_fdr"] = 0.0
    assert tables.tables(results)["modules"].rows[0][1] == "< 1e-9"
    assert "< 1e-9" not in [row[3] for row in tables.tables(results)["ranking"].rows]
