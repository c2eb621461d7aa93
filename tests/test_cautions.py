"""Warnings beside the answers, and the outcome of the controls: the right ones, with the numbers of results.json.

Wording is not tested here, but numbers and which of several sentences is taken.
"""

import re

import pytest
from result_making import LAYERS, faults, made, unwrapped, without_pairs

from report import cautions, page, text, wording


def warned(results: dict, word: str = "") -> list[str]:
    return [caution.text for caution in cautions.warnings(results) if word in caution.text]


def checked(results: dict, word: str = "") -> list[str]:
    return [line for line in cautions.checks(results) if word in line]


def test_the_end_of_every_sentence_and_nothing_missing_in_it():
    results = made(answerable=False)
    results["config"]["quick"] = True
    results["analysis"] |= {"few_test_loras": True, "controls_not_run": {"stats": "training diverged."}}
    lines = warned(results) + cautions.checks(results)
    assert all(line.endswith(".") and not line.endswith("..") and not faults(line) for line in lines)


@pytest.mark.parametrize("quick", [True, False])
def test_without_an_analysis_it_is_said_why(quick):
    results = made()
    results |= {"analysis": None, "not_done": {"analysis": "out of memory"}}
    results["config"]["quick"] = quick
    assert warned(results)[0] == "Analysis missing: out of memory." and len(warned(results)) == 1 + quick
    assert cautions.checks(results) == []


def test_where_nothing_further_was_trained_it_is_said_with_the_flag_that_does_it():
    results = made()
    assert not checked(results, "--controls=none")
    results["analysis"] |= {"controls": "none"}
    results["analysis"]["groups"] |= {"representation": None, "may_be_groups": None, "why": "none was tried"}
    (line,) = checked(results, "--controls=none")
    assert line.startswith("Nothing but the ranking on shuffled labels was trained") and "--controls=basic" in line
    (line,) = warned(results, "may name some")
    assert "--controls=basic tries a split" in line and "--group-column=artist" in line and "could be tried" not in line
    results["analysis"]["null_shuffles"] = None
    assert len(checked(results, "Nothing was trained to compare with")) == 1


def test_a_quick_run_is_the_first_warning():
    results = made()
    assert not warned(results, "--quick")
    results["config"]["quick"] = True
    assert warned(results, "--quick") == warned(results)[:1] and "3 runs" in warned(results)[0]
    assert "30 " in warned(results)[0]  # epochs


def first(results: dict) -> list[str]:
    return cautions.first_lines(cautions.warnings(results))


def test_what_decides_how_the_rest_is_read_comes_first_in_at_most_four_lines():
    results = made("distributed")
    results["analysis"]["groups"]["may_be_groups"] = False
    assert first(results) == []  # what is left are lesser cautions
    results["config"] |= {"quick": True, "keep_twins": True}
    kinds = [
        {"kind": kind, "message": f"2 LoRAs are {kind}"} for kind in ("copies", "epochs", "outlier", "similar labels")
    ]
    results["dataset"]["findings"] = kinds
    results["not_done"] = dict.fromkeys(("figure a", "figure b", "figure c", "figure d"), "out of memory")
    results["analysis"] |= {"few_test_loras": True, "units": 12}
    results["analysis"]["groups"]["may_be_groups"] = True
    cheap = {"accuracy": 0.9, "interval": [0.8, 1.0], "advantage_of_weights": [-0.1, 0.1], "weights_worse": False}
    names = ["norms", "recipe", "metadata"]
    results["analysis"]["cheap"] = {"compared_with": "stats", "as_good": names, **dict.fromkeys(names, cheap)}
    lines = first(results)
    assert len(lines) == 4 and all(line.endswith(".") and not faults(line) for line in lines)
    whole, quick, few, concept = lines
    assert "figure a, figure b, figure c and 1 more" in whole and "--quick" in quick and "12 test LoRAs" in few
    for part in ("copies", "epochs", "spelling", "the artist", "trainer's file", "numbers beside the weights"):
        assert part in concept
    assert "norms" not in concept  # which are of the weights: that is a lesser caution
    assert warned(results, "2 LoRAs are similar labels")
    deciding = [caution for caution in cautions.warnings(results) if caution.decides]
    assert len(deciding) == 9 and all(caution.subject and caution.brief for caution in deciding)
    results["config"]["keep_twins"] = False  # then copies are on one side
    assert "copies" not in first(results)[-1] and not warned(results, "2 LoRAs are copies")


def test_how_wide_intervals_are_is_said_of_few_test_loras_or_that_nothing_can_be_shown():
    results = made("distributed")
    results["analysis"]["few_test_loras"], section = True, results["analysis"]["layers"]
    section["records"][3]["interval"] = [0.1, 0.52]
    assert "up to 42 points" in first(results)[0]
    section["needed"] = 1.0
    assert "even 100 %" in first(results)[0] and "points" not in first(results)[0]


@pytest.mark.parametrize("quick", [True, False])
def test_what_decides_stands_before_all_else(quick):
    results = made()
    results["config"]["quick"], results["analysis"]["groups"]["may_be_groups"] = quick, False
    results["analysis"]["cheap"]["as_good"] = ["norms"]
    rendered, html = text.render_text(results), page.render_page(results, {}).decode()
    assert (f"\n\n{text.BEAR_IN_MIND}\n" in rendered) == (f">{text.BEAR_IN_MIND}</h2>" in html) == quick
    html = re.sub("</?span[^>]*>", "", html)
    for line in first(results):
        assert unwrapped(rendered).index(line) < unwrapped(rendered).index(" data ")
        assert html.index(line) < html.index('<dl class="run">') < html.index('id="answers"')


@pytest.mark.parametrize(("permuted", "noun"), [("LoRAs", "test LoRAs"), ("groups", "groups of test LoRAs")])
def test_few_test_loras_are_warned_of(permuted, noun):
    results = made()
    results["analysis"] |= {"few_test_loras": True, "units": 49, "permuted": permuted}
    needed = wording.percent(results["analysis"]["layers"]["needed"])
    assert len(warned(results, f"49 {noun}")) == 1 and f"{needed} %" in warned(results, f"49 {noun}")[0]
    assert ("groups moved" in checked(results, "permutations")[0]) == (permuted == "groups")
    results["analysis"]["few_test_loras"] = False
    assert not warned(results, f"49 {noun}")


@pytest.mark.parametrize(
    ("known", "shown"), [(0, None), (3, "9 of 12 layers are"), (11, "1 of 12 layers is"), (12, None)]
)
def test_layers_that_are_at_chance_are_counted(known, shown):
    results = made()
    results["analysis"]["layers"]["num_above_null"] = known
    assert len(warned(results, f"of {LAYERS} layers")) == bool(shown)
    assert not shown or warned(results, shown)


@pytest.mark.parametrize("k", [1, 2])
def test_that_the_test_loras_chose_the_layers_is_told_with_what_to_do(k):
    results = made(top_k=k)
    crossed = results["analysis"]["cross_fitted"]
    (line,) = warned(results, "chosen by the same test LoRAs")
    assert ("layer was" in line) == (k == 1) and ("2 layers were" in line) == (k == 2)
    assert "--rank-by=val" not in line and "--controls" not in line  # as the honest figures stand beside
    crossed["drops"] = {}
    (line,) = warned(results, "chosen by the same test LoRAs")
    assert "--controls=basic" in line and "--rank-by=val" in line
    crossed["why"] = "fewer than ten of them"
    (line,) = warned(results, "chosen by the same test LoRAs")
    assert "fewer than ten of them" in line and "--rank-by=val" in line and "--controls" not in line
    results["config"]["rank_by"] = "val"
    assert not warned(results, "chosen by the same")


def test_a_cheap_explanation_that_does_as_well_is_on_the_first_page():
    results = made()
    cheap = results["analysis"]["cheap"]
    assert cheap["as_good"] == ["metadata"]  # which holds the label
    first_page = unwrapped(text.render_text(results).split("\n1. Which layers predict? Each of")[0])
    (line,) = warned(results, cautions.CHEAP["metadata"])
    assert line in first_page and wording.accuracy_text(cheap["metadata"]) in line
    assert f"than stats (whose advantage is {wording.bounds(cheap['metadata']['advantage_of_weights'])} points" in line
    assert "better than" in line and "the concept" in line
    cheap["metadata"] |= {"advantage_of_weights": [-0.01, 0.02], "weights_worse": False}
    cheap["compared_with"] = "ensemble"  # the best by validation
    (line,) = warned(results, cautions.CHEAP["metadata"])
    assert "not significantly worse than ensemble" in line and "-1.0 to 2.0 points" in line
    lines = checked(results, "Cheap explanation")
    assert len(lines) == 3 and sum("advantage of ensemble is" in line for line in lines) == 2
    assert sum("not available" in line for line in lines) == 1
    norms = next(line for line in lines if cautions.CHEAP["norms"] in line)
    assert wording.accuracy_text(cheap["norms"]) in norms and wording.p_text(cheap["norms"]["p"]) in norms
    assert cheap["norms"]["classifier"] in norms
    cheap["compared_with"] = None  # no representation was run
    assert "the best single layer" in warned(results, cautions.CHEAP["metadata"])[0]
    cheap |= {"recipe": cheap["metadata"], "as_good": ["recipe"]}
    assert "trainer" in warned(results, "Cheap")[0] and len(warned(results, "Cheap")) == 1
    cheap["as_good"] = []
    assert not warned(results, "Cheap")
    results["analysis"]["cheap"] = None
    assert len(checked(results, "Cheap")) == 1 and "not tried" in checked(results, "Cheap")[0]


def test_groups_that_were_not_used():
    results = made()
    groups = results["analysis"]["groups"]
    assert groups["may_be_groups"]
    (line,) = warned(results, "artist")
    assert (line,) == tuple(checked(results, "artist"))
    assert f"stats reaches {wording.percent(groups['grouped_split'])} % ({wording.bounds(groups['interval'])}" in line
    assert f"{wording.percent(groups['random_split'])} %" in line and f"{wording.percent(groups['chance'])} %" in line
    assert "--group-column=artist" in line and "the column artist" in line and "and not the concept" in line
    groups |= {"unused": ["artist", "set"], "column": "set", "may_be_groups": False}
    (line,) = warned(results, "artist")
    assert "the columns artist and set" in line and "--group-column=set" in line and "concept" not in line


def test_groups_of_which_no_split_was_made():
    results = made()
    groups = results["analysis"]["groups"]
    missing = ("representation", "column", "random_split", "grouped_split", "interval", "chance", "may_be_groups")
    groups |= dict.fromkeys(missing) | {"why": "these groups allow no split"}
    for lines in (warned(results, "artist"), checked(results, "artist")):
        (line,) = lines
        assert line.endswith("these groups allow no split.") and not faults(line)
    results["analysis"]["controls_not_run"] = {"grouped split": "training diverged"}  # which is why, then
    (line,) = warned(results, "split")
    assert line.endswith("training diverged.") and "allow no" not in line


def test_controls_that_were_not_run_are_named_with_the_reason():
    results = made()
    assert not warned(results, "not run")
    results["analysis"] |= {"groups": None, "null_shuffles": None, "controls_not_run": {
        "stats": "training diverged.", "null shuffles": "the layers cannot be ranked: it diverged",
        "grouped split": "out of memory"}}  # fmt: skip
    expected = ["Controls of stats not run: training diverged.",
                "Null shuffles not run: the layers cannot be ranked: it diverged.",
                "Grouped split not run: out of memory."]  # fmt: skip
    assert warned(results, "not run") == checked(results, "not run") == expected


@pytest.mark.parametrize(
    ("shuffles", "p", "significant"), [(1, None, None), (4, None, None), (100, 0.02, True), (100, 1.0, False)]
)
def test_rankings_on_shuffled_labels(shuffles, p, significant):
    results = made()
    null = results["analysis"]["null_shuffles"]
    null |= {"shuffles": shuffles, "largest": [0.123, 0.345], "observed": 0.789, "p": p, "significant": significant}
    for lines in (warned(results, "shuffled labels"), checked(results, "shuffled labels")):
        (line,) = lines
        assert "34.5 %" in line and "78.9 %" in line and not faults(line)
        assert ("p = " in line) == (p is not None) and ("once" in line) == (shuffles == 1)
        assert p is None or wording.p_text(p) in line
        assert ("indistinguishable" in line) == (significant is False) and ("more than" in line) == bool(significant)
    results["analysis"]["null_shuffles"] = None
    assert not warned(results, "shuffled") and not checked(results, "shuffled")


def test_planted_layers_are_ahead_of_shuffled_labels():
    null = made()["analysis"]["null_shuffles"]
    assert null["significant"] and null["shuffles"] == 19 and null["observed"] > max(null["largest"])


def test_features_that_coincide_or_never_vary():
    assert not checked(made(), "features of")
    results = made(answerable=False)
    assert len(checked(results, "At this rank features of spectral")) == 2
    assert len(checked(results, "sigma_1 = gap_1.")) == len(checked(results, "sigma_2, sigma_3.")) == 1
    structure = results["analysis"]["rank_structure"]
    structure["constant"]["spectral"] = ["mean", "gap_2", "gap_3", "gap_4", "gap_9"]
    assert checked(results, "mean, gap_2 to gap_4, gap_9.")
    structure["answerable"] = True
    assert len(checked(results, "In these LoRAs features of spectral")) == 2 and not checked(results, "At this rank")
    results = without_pairs()  # of no update is anything known
    results["analysis"]["rank_structure"]["constant"] = {"spectral": ["gap_2"]}
    assert len(checked(results, "In these LoRAs features of spectral")) == 1


def test_chance_and_attribution_are_among_the_checks():
    results = made()
    layers, gradients = results["analysis"]["layers"], results["analysis"]["attribution"]
    (chance,) = checked(results, "permutations of the test labels")
    assert f"{results['analysis']['permutations']} permutations" in chance and "LoRAs moved" in chance
    assert wording.bounds(layers["null_band"]) in chance and f"{wording.percent(layers['needed'])} %" in chance
    (line,) = checked(results, "attribution")
    assert f"{wording.number(gradients['spearman'])} ({wording.bounds(gradients['interval'], wording.number)})" in line
    assert f"{gradients['same_top_k']} of the top 2" in line
    gradients |= {"spearman": None, "interval": None, "p": None}
    assert "not measured" in checked(results, "attribution")[0]
    results["analysis"]["attribution"] = None
    assert not checked(results, "attribution")


@pytest.mark.parametrize(
    ("column", "mend"),
    [
        ("artist", "--group-column=artist uses it."),
        ("header: ss_set", "A table (--labels) with that field as a column, and --group-column, use it."),
    ],
)
def test_groups_that_were_not_used_are_named_with_what_uses_them(column, mend):
    results = made()
    results["analysis"]["groups"] |= {"unused": [column], "column": column, "representation": "stats"}
    (line,) = warned(results, column)
    assert line.endswith(mend)


def test_a_column_in_a_command_is_quoted():
    assert cautions.use_of("the artist; x") == "--group-column='the artist; x' uses it."
