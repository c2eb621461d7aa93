"""Runs side by side: known differences are found, other runs only listed, and nothing hostile comes through."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from making import NARROW, planted_collection
from result_making import TOP_K, made
from test_command_line import HEAVY, imported
from test_house import check_schema
from test_page import Reader

import ablation_experiment
import compare
from analysis.draws import Draws
from analysis.side_by_side import Run, Score, difference, effective_size, has_size, wilson
from analysis.side_by_side import compare as compared_runs
from experiment import store
from experiment.header import SCHEMA_VERSION
from report import side_by_side, side_by_side_figure, side_by_side_page
from report.rendering import is_readable

EVIL = '</table><img src="https://x.test/a.png" onerror="alert(1)">'
MANY = 10**9  # units of which Student's t is normal


def results_of(name: str = "zoo", train: int = 60, **config: object) -> dict:
    """Results as results.json holds them, of so many train LoRAs."""
    results = made("redundant", ("stats", "spectral"), answerable=False)
    for section in ("baseline_results", "ablation_results"):
        for entry in results[section].values():
            entry["val_accuracy"] = entry["test_accuracy"]
    results["dataset"] |= {"name": name, "step": "final", "label_column": None, "fingerprint": f"{name} {train}"}
    results["dataset"]["split_sizes"]["train"] = train
    results["config"] |= {"controls": "all", **config}
    results["environment"] |= {"code": "abcd", "training_code": "abc", "numpy": "2", "python": "3"}
    return results | {"schema_version": SCHEMA_VERSION, "not_done": {}}


def write(folder: Path, results: dict, samples: str = "") -> Path:
    """A folder of results."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if samples:
        (folder / "samples.csv").write_text(f"file,label,split\n{samples}", encoding="utf-8")
    return folder


def side_by_side_of(tmp_path: Path, *results: dict) -> tuple[dict, str]:
    """The comparison of results, and its text."""
    folders = [write(tmp_path / f"ablation_{i}", of) for i, of in enumerate(results)]
    comparison = json.loads(json.dumps(compare_folders(folders)))
    assert check_schema(comparison, "comparison.json", "compare.md") == []
    return comparison, " ".join(side_by_side.render_text(side_by_side.content_of(comparison)).split())


def compare_folders(folders: list[Path]) -> dict:
    from experiment.compared import compared

    return compared(folders)


def refused(capsys, *arguments: object) -> str:
    """The one line by which the program refuses."""
    assert compare.main([*map(str, arguments), "--out=none"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def plain_run(scores: dict[str, Score], train: int, test: int, **changed: object) -> Run:
    """A run of three layers and two classes."""
    facts = {"name": f"of {train}", "train": train, "top_k": 1}
    layers = {(f"m_{i}", "up"): accuracy for i, accuracy in enumerate((0.5, 0.4, 0.3))}
    return Run(**{"facts": facts, "units": test, "decides": {}, "beside": {}, "classes": {"a": 5, "b": 5},
                  "layers": layers, "scores": scores} | changed)  # fmt: skip


def test_recorded_inputs_part_only_what_reads_them(tmp_path):
    """Runs with other recorded inputs are comparable, but for the representation of these."""
    results = [results_of("zoo", 60, activations="a" * 16), results_of("zoo", 120, activations="b" * 16)]
    for of in results:
        for section in ("baseline_results", "ablation_results"):
            of[section]["update_response"] = of[section]["spectral"]
    comparison, text = side_by_side_of(tmp_path, *results)
    assert {record["representation"] for record in comparison["changes"]} == {"stats", "spectral"}
    assert {"update_response (aaaaaaaa)", "update_response (bbbbbbbb)"} < set(comparison["representations"])
    assert "differences of accuracies" not in text


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


def test_an_interval_is_that_of_the_paper():
    """Newcombe 1998, table II: 56 of 70 less 48 of 80 by his method 10, the score intervals without correction."""
    first, second = (Score(k / n, 0.5, wilson(k / n, n, 1.959964)) for k, n in ((48, 80), (56, 70)))
    found, interval = difference(first, second, (MANY, MANY), family=1)
    assert found == pytest.approx(0.2)
    assert interval == pytest.approx((0.0524, 0.3339), abs=5e-5)
    wider = difference(first, second, (MANY, MANY), family=20)[1]
    assert wider[0] < 0 < 0.3339 < wider[1]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.93, 1.0])
def test_the_effective_size_is_that_which_the_interval_was_made_of(share):
    """Of intervals as results.json holds them, rounded to nine decimals."""
    generator, draws = np.random.default_rng(3), Draws(np.arange(120), 2000, 0)
    correct = np.tile(generator.permutation(120) < round(120 * share), (1, 1))
    accuracy, drawn = correct.mean(), draws.accuracies([correct])[0]
    interval = tuple(np.round(draws.intervals(accuracy, drawn), 9))
    size = effective_size(accuracy, interval, 120)
    assert size == pytest.approx(120, rel=0.1) and size < 120.01
    assert wilson(accuracy, size, draws.quantile(0.975)) == pytest.approx(interval, abs=1e-7)


@pytest.mark.parametrize(
    ("shares", "tests"), [((0.6, 0.9), (20, 200)), ((0.95, 0.99), (40, 400)), ((0.3, 0.3), (30, 60))]
)
def test_intervals_of_a_family_hold_together(shares, tests):
    generator, families, size, held = np.random.default_rng(4), 300, 5, 0
    for _ in range(families):
        inside = True
        for hits in generator.binomial(tests, shares, (size, 2)) / tests:
            scores = [
                Score(hit, 0.5, wilson(hit, of, Draws(np.arange(of), 1, 0).quantile(0.975)))
                for hit, of in zip(hits, tests, strict=True)
            ]
            low, high = difference(*scores, tests, family=size)[1]
            inside &= low <= shares[1] - shares[0] <= high
        held += inside
    assert held / families >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / families)


def test_a_gain_is_found_where_it_is_and_not_where_it_is_not():
    def of(accuracy: float, test: int) -> Score:
        return Score(accuracy, accuracy, wilson(accuracy, test, Draws(np.arange(test), 1, 0).quantile(0.975)), True)

    small = plain_run({"gains": of(0.5, 100), "stays": of(0.7, 100), "only here": of(0.9, 100)}, 350, 100)
    middle = plain_run({"gains": of(0.7, 200), "stays": of(0.71, 200)}, 700, 200)
    large = plain_run({"gains": of(0.9, 1000), "stays": of(0.7, 1000)}, 3500, 1000)
    comparison = compared_runs([large, small, middle])
    assert comparison["groups"] == [{"runs": [1, 2, 0], "grows": True}]
    found = {(of["representation"], *of["train"]): of["significant"] for of in comparison["changes"]}
    assert found == {
        ("gains", 350, 700): True,
        ("gains", 700, 3500): True,
        ("gains", 350, 3500): True,
        ("stays", 350, 700): False,
        ("stays", 700, 3500): False,
        ("stays", 350, 3500): False,
    }
    by_hand = difference(of(0.5, 100), of(0.7, 200), (100, 200), family=6)
    assert (comparison["changes"][0]["difference"], comparison["changes"][0]["interval"]) == by_hand


@pytest.mark.parametrize(
    "changed",
    [
        {"decides": {"config.quick": "true"}},
        {"classes": {"a": 5, "c": 5}},
        {"layers": {("m_0", "up"): 0.5, ("m_9", "up"): 0.4}},
    ],
)
def test_runs_that_differ_in_more_than_their_loras_are_not_compared(changed):
    score = {"stats": Score(0.5, 0.5, (0.4, 0.6), True)}
    comparison = compared_runs([plain_run(score, 70, 100), plain_run(score, 700, 100, **changed)])
    assert [group["runs"] for group in comparison["groups"]] == [[0], [1]]
    assert comparison["changes"] == []


def test_runs_on_the_same_loras_are_not_independent_and_classes_of_other_shares_are_told():
    score = {"stats": Score(0.5, 0.5, (0.4, 0.6), True)}
    one, again = (plain_run(score, 70, 100, fingerprint="f", beside={"config.device": of}) for of in ("cpu", "cuda"))
    other = plain_run(score, 700, 100, fingerprint="g", classes={"a": 8, "b": 2})
    comparison = compared_runs([one, again, other])
    assert [(of["a"], of["b"]) for of in comparison["changes"]] == [(0, 2)]
    assert [pair["class_shares"] for pair in comparison["pairs"]] == pytest.approx([0, 0.3, 0.3])
    assert [pair["same_files"] for pair in comparison["pairs"]] == [True, False, False]
    assert comparison["differences"] == [
        {"key": "config.device", "values": ["cpu", "cuda", None], "decides": False}
    ]  # fmt: skip


def test_other_shares_of_classes_are_told_of_the_pairs_that_have_them(tmp_path):
    """And a change between runs of as many LoRAs is not said to be one from fewer."""
    results = [results_of("a"), results_of("b", 120), results_of("c", 120)]
    counts = results[2]["dataset"]["class_counts"]
    counts["cat"] += sum(counts.values())  # of a share of a fifth, three fifths
    comparison, text = side_by_side_of(tmp_path, *results)
    assert [pair["class_shares"] for pair in comparison["pairs"]] == pytest.approx([0, 0.4, 0.4])
    assert re.findall(r"Shares of classes differ between (\w) and (\w), by 40.0 points", text) == [
        ("b", "c"),
        ("a", "c"),
    ]
    assert "change: from the comparable run before it, of fewer or as many train LoRAs," in text
    other = plain_run({}, 70, 100, classes={"b": 5, "c": 5})
    assert compared_runs([plain_run({}, 70, 100), other])["pairs"][0]["class_shares"] == 0.5


def test_rankings_agree_as_far_as_they_do():
    score = {"stats": Score(0.5, 0.5)}
    layers = {(f"m_{i}", "up"): 1 - i / 10 for i in range(6)}
    reverse = {layer: 1 - layers[layer] for layer in reversed(layers)}
    runs = [plain_run(score, 70, 100, layers=of) for of in (layers, reverse, {("x", "up"): 0.5})]
    with_itself = compared_runs([runs[0], runs[0]])["pairs"][0]
    assert (with_itself["kendall_tau"], with_itself["same_top_k"]) == (pytest.approx(1), 1)
    pairs = compared_runs(runs)["pairs"]
    assert [(pair["layers"], pair["kendall_tau"], pair["same_top_k"]) for pair in pairs] == [
        (6, pytest.approx(-1), 0),
        (0, None, None),
        (0, None, None),
    ]
    assert pairs[0]["by_chance"] == pytest.approx(1 / 6)


# ----------------------------------------------------------------------------------------------------------------------
# Results on disk
# ----------------------------------------------------------------------------------------------------------------------


def test_settings_that_differ_are_listed_and_nothing_is_averaged(tmp_path):
    comparison, text = side_by_side_of(tmp_path, results_of("a"), results_of("b", 600, quick=True, seed=7))
    assert [(of["key"], of["values"], of["decides"]) for of in comparison["differences"]] == [
        ("config.seed", ["0", "7"], True),
        ("config.quick", ["false", "true"], True),
    ]
    assert comparison["changes"] == [] and "No two runs are comparable" in text
    assert "Decides what an accuracy means: config.quick, false in a; true in b." in text
    accuracy = results_of()["baseline_results"]["stats"]["test_accuracy"]["mean"]
    assert [of["accuracy"] for of in comparison["representations"]["stats"]] == pytest.approx([accuracy, accuracy])


@pytest.mark.parametrize(("key", "told"), [("code", True), ("torch", False)])
def test_another_program_or_machine_is_told_and_compared(tmp_path, key, told):
    few, more = results_of("few"), results_of("more", 600)
    more["environment"][key] = "other"
    comparison, text = side_by_side_of(tmp_path, few, more)
    assert [group["runs"] for group in comparison["groups"]] == [[0, 1]] and comparison["changes"]
    assert [(of["key"], of["decides"]) for of in comparison["differences"]] == [(f"environment.{key}", False)]
    assert f"Does not make runs incomparable: environment.{key}, " in text and "Decides no accuracy" not in text
    methods = "Programs differ (environment.code), so that intervals and verdicts of these runs may be of different"
    assert (methods in text) == told


def test_runs_on_the_same_files_are_not_said_to_differ_in_their_loras(tmp_path):
    results = [results_of("a"), results_of("b", controls="none"), results_of("c", 600)]
    results[1]["dataset"]["fingerprint"] = results[0]["dataset"]["fingerprint"]
    two = side_by_side_of(tmp_path / "two", *results[:2])[1]
    assert "Comparable, and of the same LoRAs: a and b." in two and "their LoRAs differ" not in two
    three = side_by_side_of(tmp_path / "three", *results)[1]
    assert "Comparable, as of what decides an accuracy at most their LoRAs differ: a, b and c." in three
    assert "Of the same LoRAs, so that their accuracies are not independent: a and b." in three
    others = side_by_side_of(tmp_path / "others", *results[1:])[1]
    assert "Comparable, as of what decides an accuracy only their LoRAs differ: b and c." in others


def test_other_classes_and_layers_are_told(tmp_path):
    first, second, third = results_of("a"), results_of("b"), results_of("c")
    for name in (*second["dataset"]["classes"][1:], "new"):
        second["dataset"]["class_counts"][name] = 9
    del second["dataset"]["class_counts"]["cat"]
    second["dataset"]["classes"] = sorted(second["dataset"]["class_counts"])
    for record in third["layer_ranking"]:
        record["module"] += "_elsewhere"
    comparison, text = side_by_side_of(tmp_path, first, second, third)
    assert [group["runs"] for group in comparison["groups"]] == [[0], [1], [2]]
    assert "Other classes: 5 in a and 5 in b, 4 in common." in text
    assert "Other layers: 12 in a and 12 in c, none in common." in text
    assert "Rankings cannot be compared, as no layer is in both: a and c." in text


def test_runs_of_two_sizes_are_compared_and_what_is_missing_is_told(tmp_path):
    small, large = results_of("small"), results_of("large", 600)
    small["representations_not_run"] = [{"representation": "pca", "reason": "out of memory."}]
    small["not_done"] = {"figure attention": "no room"}
    comparison, text = side_by_side_of(tmp_path, small, large)
    assert [of["train"] for of in comparison["changes"]] == [[60, 600], [60, 600]]
    assert "neither gain nor loss is shown for any of 2 representations of both" in text
    assert "Missing in small: pca (out of memory)." in text and "Missing in small: figure attention (no room)." in text
    assert "tau of 1.00; 2 of the top 2 are the same (0.33 by chance)" in text
    assert "Whether LoRAs are the same is not known, without samples.csv of both: small and large." in text
    verdict = small["analysis"]["robustness"]["stats"]["verdict"]
    assert f"Without its most predictive layers, stats is {verdict} in small and large." in text


def test_a_planted_gain_is_told(tmp_path):
    small, large = results_of("small"), results_of("large", 600)
    for of, interval in ((small, [0.2, 0.3]), (large, [0.85, 0.95])):
        mean = sum(interval) / 2
        of["baseline_results"]["stats"]["test_accuracy"] = {"mean": mean}
        intervals_of(of)["stats"] = interval
    comparison, text = side_by_side_of(tmp_path, small, large)
    (gain,) = (of for of in comparison["changes"] if of["significant"])
    assert gain["representation"] == "stats" and gain["difference"] == pytest.approx(0.65)
    assert "From small (60 train LoRAs) to large (600), with all layers stats gains 65.0 points (" in text
    assert side_by_side_figure.finding(comparison).startswith("The largest gain by more LoRAs: stats, 65.0 points (")


@pytest.mark.parametrize(
    ("accuracy", "interval", "has"),
    [
        *((0.75, [0.0, 1.0], False), (0.75, [1e-09, 1.0], False), (0.25, [0.0, 0.999999999], False)),
        *((0.0, [0.0, 5e-324], False), (0.5, [0.5, 0.5], False), (0.9, [0.9, 0.900000001], False)),
        *((0.0, [0.0, 1e-6], True), (0.75, [0.002, 1.0], True), (1.0, [0.98, 1.0], True)),
    ],
)
def test_an_interval_of_no_number_of_loras_is_left_out_and_told(tmp_path, accuracy, interval, has):
    few, more = results_of("few"), results_of("more", 600)
    few["baseline_results"]["stats"]["test_accuracy"] = {"mean": accuracy}
    intervals_of(few)["stats"] = interval
    comparison, text = side_by_side_of(tmp_path, few, more)
    assert has_size(accuracy, interval) == has
    assert comparison["representations"]["stats"][0]["interval"] == (interval if has else None)
    assert comparison["representations"]["stats"][0]["above_null"] is not None
    assert [run["unsized"] for run in comparison["runs"]] == [[] if has else ["stats"], []]
    assert ("stats" in {of["representation"] for of in comparison["changes"]}) == has
    left_out = "Intervals in few are left out, as they are of no number of independent test LoRAs, as where all are one"
    assert (f"{left_out} group: stats." in text) != has
    assert all(-1 <= bound <= 1 for of in comparison["changes"] for bound in of["interval"])
    best = f"stats in few, {100 * accuracy:.1f} %"
    assert (f"{best};" in text, f"{best} (" in text) == (not has, has)


def test_intervals_of_one_group_are_read(tmp_path):
    """As `Draws.intervals` makes them where all test LoRAs are one group, and runs of the training differ."""
    correct = np.random.default_rng(0).random((3, 20)) < 0.7
    draws = Draws(np.zeros(20, int), 500, 0)
    accuracy = float(correct.mean())
    interval = np.round(draws.intervals(accuracy, draws.accuracies([correct])[0]), 9).tolist()
    few, more = results_of("few"), results_of("more", 600)
    few["baseline_results"]["stats"]["test_accuracy"] = {"mean": accuracy}
    intervals_of(few)["stats"] = interval
    few["analysis"]["units"] = 1
    comparison, _ = side_by_side_of(tmp_path, few, more)
    assert not any(of["significant"] for of in comparison["changes"] if of["representation"] == "stats")


def test_a_run_without_analysis_is_used_for_what_it_has(tmp_path):
    unfinished = results_of("b", 600) | {"analysis": None, "not_done": {"analysis": "out of memory"}}
    comparison, text = side_by_side_of(tmp_path, results_of("a"), unfinished)
    assert comparison["changes"] == [] and comparison["representations"]["stats"][1]["interval"] is None
    assert "No analysis is in b: its accuracies stand without intervals." in text and "none is compared" in text


def test_loras_that_runs_share_are_counted(tmp_path):
    first = write(tmp_path / "a", results_of("a"), "1,cat,train\n2,cat,test\n3,dog,test\n4,dog,val\n")
    second = write(tmp_path / "b", results_of("b", 600), "1,cat,test\n2,cat,test\n3,cat,test\n9,dog,val\n")
    comparison = compare_folders([first, second])
    assert (comparison["pairs"][0]["shared"], comparison["pairs"][0]["shared_test"]) == (2, 1)
    sentences = side_by_side.content_of(comparison).shows
    wanted = "By path and label 2 LoRAs may be the same, 1 of them test LoRAs of both, and accuracies not independent"
    assert any(line.startswith(wanted) for line in sentences)


def test_a_collection_without_a_name_is_called_so(tmp_path):
    comparison, _ = side_by_side_of(tmp_path, results_of(""), results_of("b", 600))
    assert [run["name"] for run in comparison["runs"]] == ["unnamed", "b"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    comparison, _ = side_by_side_of(tmp_path, results_of(), results_of(train=600))
    assert [run["name"] for run in comparison["runs"]] == ["zoo (run 1)", "zoo (run 2)"]


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


def deep(levels: int) -> dict:
    value: dict = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def intervals_of(results: dict) -> dict:
    return results["analysis"]["representations"]["conditions"]["baseline"]["intervals"]


HOSTILE = {  # what the message says -> the change
    f"results of schema version {SCHEMA_VERSION - 1}, where": lambda r: r.update(schema_version=SCHEMA_VERSION - 1),
    "schema_version is missing": lambda r: r.pop("schema_version"),
    "dataset.split_sizes.train is not a whole number": lambda r: r["dataset"]["split_sizes"].update(train="\x1b[31m"),
    "dataset.split_sizes.test is missing": lambda r: r["dataset"]["split_sizes"].pop("test"),
    "config.quick is not true or false": lambda r: r["config"].update(quick=1),
    "chance.accuracy is not a share": lambda r: r["chance"].update(accuracy=float("nan")),
    "stats.test_accuracy.mean is not a share": lambda r: r["baseline_results"]["stats"]["test_accuracy"].update(mean=7),
    "stats.test_accuracy is not an object": lambda r: r["baseline_results"]["stats"].update(test_accuracy=[1]),
    "is not printable text": lambda r: r["baseline_results"].update({"\u202estats": r["baseline_results"]["stats"]}),
    "has 5000 characters": lambda r: r["dataset"]["classes"].append("x" * 5000),
    "are not of the same two classes": lambda r: r["dataset"]["classes"].append("another"),
    "layer_ranking is empty": lambda r: r.update(layer_ranking=[]),
    "is there twice": lambda r: r["layer_ranking"].append(r["layer_ranking"][0]),
    "nested too deeply": lambda r: r["config"].update(deep=deep(500)),
    "is not an interval around": lambda r: intervals_of(r).update(stats=[0.0, 0.01]),
    "not_done: a name in it is empty": lambda r: r.update(not_done={"": "no room"}),
    "not_done.figure is empty": lambda r: r.update(not_done={"figure": ""}),
    "config.top_k is not a whole number from 1 to 12": lambda r: r["config"].update(top_k=2**63),
    "analysis.units is not a whole number from 1": lambda r: r["analysis"].update(units=0),
}


@pytest.mark.parametrize("words", HOSTILE)
def test_a_file_that_is_something_else_is_refused_in_words(tmp_path, capsys, words):
    results = results_of("b")
    HOSTILE[words](results)
    error = refused(capsys, write(tmp_path / "a", results_of("a")), write(tmp_path / "b", results))
    assert words in error
    assert str(tmp_path / "b" / "results.json") in error and error.isascii() and len(error) < 1500


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": 1e999}', b"null"])
def test_a_file_that_holds_no_results_is_refused(tmp_path, capsys, content):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").write_bytes(content)
    assert "not results of this program" in refused(capsys, write(tmp_path / "a", results_of("a")), tmp_path / "b")


def test_names_are_refused_or_escaped_and_markup_stays_text(tmp_path):
    results = results_of("b", 600)
    results["dataset"]["name"] = f"{EVIL}\x1b[31m\u202e"
    results["representations_not_run"] = [{"representation": EVIL, "reason": f"{EVIL}\n\x1b[2J"}]
    for section in ("baseline_results", "ablation_results"):
        results[section][EVIL] = copy.deepcopy(results[section]["stats"])
    results["config"][EVIL] = [EVIL] * 10_000
    comparison, text = side_by_side_of(tmp_path, results_of("a"), results)
    content = side_by_side.content_of(comparison)
    page = side_by_side_page.render_page(content, side_by_side_figure.finding(comparison), {})
    reader = Reader(page)
    assert "\x1b" not in text and "\u202e" not in text and b"\x1b" not in page and len(text) < 20_000
    assert [image for image in reader.of("img") if image["src"]] == [] and len(reader.of("script")) == 1
    assert EVIL in reader.text["accuracy"]


@pytest.mark.parametrize("how", ["again", "link", "copy"])
def test_the_same_results_twice_are_refused(tmp_path, capsys, how):
    folder = write(tmp_path / "a", results_of("a"))
    second = folder
    if how == "link":
        (second := tmp_path / "b").symlink_to(folder)
    elif how == "copy":
        second = Path(shutil.copytree(folder, tmp_path / "b"))
    assert "the same results as" in refused(capsys, folder, second)


def test_too_few_and_no_files_are_refused(tmp_path, capsys):
    folder = write(tmp_path / "a", results_of("a"))
    assert "1 given. Give from 2 to 20" in refused(capsys, folder)
    assert f"{tmp_path / 'b'}: no such file" in refused(capsys, folder, tmp_path / "b")
    (tmp_path / "c").mkdir()
    assert f"{tmp_path / 'c' / 'results.json'}: no such file" in refused(capsys, folder, tmp_path / "c")
    other = write(tmp_path / "d", results_of("d"))
    (other / "samples.csv").write_text("name\n1\n")
    assert "not a table of samples" in refused(capsys, folder, other)
    for row in ("1,cat", "1,cat,test,more"):
        (other / "samples.csv").write_text(f"file,label,split\n0,cat,test\n{row}\n")
        assert "not a table of samples: line 3 has more or fewer cells" in refused(capsys, folder, other)


# ----------------------------------------------------------------------------------------------------------------------
# The program
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["--help"], 0, ""),
        (["a", "b", "--uot=x"], 2, "error: --uot: no such flag. Did you mean --out?\n"),
    ],
)
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(arguments, code, error):
    done, _, errors, names = imported("compare.py", *arguments)
    assert (done, errors) == (code, error) and "argparse" in names and not names & HEAVY


def test_files_are_the_same_bytes_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, train in (("a", 60), ("b", 600), ("c", 6000)):
        write(tmp_path / name, results_of(name, train))
    assert compare.main(["a", "b"]) == 0 == compare.main(["a", "b", "--out", "again"])
    files = sorted(path.relative_to("comparison") for path in Path("comparison").rglob("*") if path.is_file())
    assert [str(path) for path in files] == [
        *("comparison.html", "comparison.json", "comparison.txt"),
        *(f"figures/accuracy.{kind}" for kind in ("pdf", "png", "svg")),
    ]
    before = {path: (Path("comparison") / path).read_bytes() for path in files}
    assert before == {path: (Path("again") / path).read_bytes() for path in files}
    assert capsys.readouterr().out.replace("Written to again", "").count("Written to comparison") == 1
    assert compare.main(["a", "b"]) == 0
    assert "Nothing to do" in capsys.readouterr().out and not Path("comparison/previous").exists()
    assert compare.main(["a", "b", "c"]) == 0
    assert before == {path: (Path("comparison/previous/1") / path).read_bytes() for path in files}
    page = Reader(Path("comparison/comparison.html").read_bytes())
    assert [section["id"] for section in page.of("section")] == ["differs", "accuracy", "shows"]
    assert page.of("img")[0]["src"].startswith("data:image/svg+xml;base64,")
    assert "below the diagonal Kendall's tau-b" in page.text["shows"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, capsys):
    folders = [write(tmp_path / name, results_of(name)) for name in ("a", "b")]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    for out, words in ((mine, "holds something else (thesis.tex)"), (mine / "thesis.tex", "not a folder")):
        assert compare.main([*map(str, folders), f"--out={out}"]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "mine", ["figures/photo.png", "figures/accuracy.png", "previous/1/thesis.tex", "previous/mine"]
)
def test_a_folder_of_ones_own_figures_or_earlier_work_is_no_comparison(tmp_path, capsys, mine):
    folders = [write(tmp_path / name, results_of(name)) for name in ("a", "b")]
    (path := tmp_path / "paper" / mine).parent.mkdir(parents=True)
    path.write_text("x")
    assert compare.main([*map(str, folders), f"--out={tmp_path / 'paper'}"]) == 2
    assert f"holds something else ({mine.split('/')[0]}). Give another folder." in capsys.readouterr().err
    assert files_in(tmp_path / "paper") == {mine: b"x"}


def test_a_file_of_ones_own_beside_figures_stays(tmp_path, monkeypatch):
    folders = [
        str(write(tmp_path / name, results_of(name, train))) for name, train in (("a", 6), ("b", 60), ("c", 600))
    ]
    monkeypatch.setattr(side_by_side_figure, "draw", lambda _: {"accuracy.svg": b"<svg/>"})
    out = tmp_path / "comparison"
    assert compare.main([*folders[:2], f"--out={out}"]) == 0
    (out / "figures" / "photo.png").write_text("mine")
    before = files_in(out)
    assert compare.main([*folders, f"--out={out}"]) == 0
    after = files_in(out)
    assert after["figures/photo.png"] == b"mine" and "previous/1/figures/photo.png" not in after
    assert all(after[f"previous/1/{name}"] == content for name, content in before.items() if "photo" not in name)


@pytest.mark.parametrize("earlier", [False, True])
def test_what_a_killed_process_left_is_finished(tmp_path, monkeypatch, earlier):
    """Killed before each file is moved or written, also with a file half written."""
    folders = [
        str(write(tmp_path / name, results_of(name, train))) for name, train in (("a", 6), ("b", 60), ("c", 600))
    ]
    monkeypatch.setattr(side_by_side_figure, "draw", lambda _: {"accuracy.svg": b"<svg/>"})
    for arguments in ([*folders[:2]] * earlier, folders):
        assert not arguments or compare.main([*arguments, f"--out={tmp_path / 'wanted'}"]) == 0

    class Killed(BaseException):
        pass

    for steps in range(4 + 4 * earlier):
        out, left = tmp_path / f"killed {steps}", iter(range(steps))
        assert not earlier or compare.main([*folders[:2], f"--out={out}"]) == 0

        def killed(path: Path, *arguments: object, then, left=left) -> None:
            if next(left, None) is None:
                if path.suffix != ".json":  # of a file that is written
                    path.parent.mkdir(exist_ok=True)
                    path.with_name(f".{path.name}.0123abcd").write_bytes(b"half")
                raise Killed
            then(path, *arguments)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            rename, writes = Path.rename, store.write_atomically
            patch.setattr(Path, "rename", lambda path, to, then=rename: killed(path, to, then=then))
            patch.setattr(store, "write_atomically", lambda path, data, then=writes: killed(path, data, then=then))
            compare.main([*folders, f"--out={out}"])
        assert compare.main([*folders, f"--out={out}"]) == 0
        assert files_in(out) == files_in(tmp_path / "wanted"), steps


def test_the_working_folder_may_be_written_to_and_earlier_results_be_read(tmp_path, monkeypatch, capsys):
    folders = [write(tmp_path / "a" / "previous" / "1", results_of("a", 30)), write(tmp_path / "b", results_of("b"))]
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(side_by_side_figure, "draw", lambda _: {"accuracy.svg": b"<svg/>"})
    assert compare.main([*map(str, folders), "--out=."]) == 0
    assert sorted(path.name for path in here.iterdir()) == [
        *("comparison.html", "comparison.json", "comparison.txt", "figures")
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".lock")] == []


@pytest.mark.parametrize("names", [("a", "b"), ("a name that is " + "very " * 20 + "long", "b" * 200)])
@pytest.mark.parametrize("grows", [True, False])
def test_the_figure_is_readable(tmp_path, monkeypatch, names, grows):
    results = [results_of(name, 60 * 10 ** (i * grows), seed=i * (not grows)) for i, name in enumerate(names)]
    for section in ("baseline_results", "ablation_results"):
        for i in range(12):
            results[1][section][f"another representation {i}"] = results[1][section]["stats"]
    comparison, _ = side_by_side_of(tmp_path, *results)
    seen = []
    monkeypatch.setattr(side_by_side_figure, "files_of", lambda figure, *_: seen.append(is_readable(figure)) or {})
    side_by_side_figure.draw(comparison)
    assert seen == [True] and bool(side_by_side_figure.growing(comparison)) == grows


def test_results_that_the_program_has_written_are_compared(tmp_path, capsys):
    """Two small collections, and the second again with other settings."""
    flags = ("--top-k=2", "--quick", "--num-runs=1", "--representations=stats", "--device=cpu", "--output-dir")
    for name, per_class in (("few", 10), ("more", 16)):
        planted_collection(tmp_path / name, per_class=per_class, modules=2, informative=(1, 2))
    for name, out, more in (("few", "a", ()), ("more", "a", ()), ("more", "b", ("--seed=7",))):
        arguments = ["--dataset", str(tmp_path / name), *flags, str(tmp_path / out), *more]
        assert ablation_experiment.main(arguments, NARROW) == 0
    folders = [tmp_path / "a" / "ablation_few", tmp_path / "a" / "ablation_more", tmp_path / "b" / "ablation_more"]
    capsys.readouterr()
    assert compare.main([*map(str, folders), f"--out={tmp_path / 'side by side'}"]) == 0
    comparison = json.loads((tmp_path / "side by side" / "comparison.json").read_text())
    assert check_schema(comparison, "comparison.json", "compare.md") == []
    assert [group["runs"] for group in comparison["groups"]] == [[0, 1], [2]]
    (change,) = comparison["changes"]
    assert change["train"] == [run["train"] for run in comparison["runs"][:2]]
    assert [(of["key"], of["decides"]) for of in comparison["differences"]] == [("config.seed", True)]
    assert comparison["pairs"][2]["same_files"] and comparison["runs"][0]["top_k"] == TOP_K
    assert re.search(r"^Written to .*side by side$", capsys.readouterr().out, re.M)
