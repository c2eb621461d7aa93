"""Values of a column held out: which are, which rows train, what is claimed of them, and how it is told."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from making import FILE_NAME, NARROW, lora, write_lora
from planting import all_tested
from result_making import made
from safetensors.torch import save_file
from test_controls import experiment_on
from test_house import check_schema, undocumented_arrays

import report.holdout
from ablation_experiment import main
from analysis.holdout import Fit, Ordinary, held_out, over_values
from analysis.questions import plain
from experiment import columns, phases, plans
from experiment.columns import check_columns, columns_named
from experiment.holdout import by_reason, choose_values, hold_out, rows_without, units_of
from experiment.settings import UsageError
from report import figures, page, text
from report.figures_of_holdout import holdout_finding
from report.tables import Table

# -- columns ----------------------------------------------------------------------------------------------------------

TRAINERS = ["rank", "artist", "header: ss_base_model_version", "header: ss_steps", "header: ss_max_train_steps"]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("artist", ["artist"]),
        ("Artist", ["artist"]),
        ("base", ["header: ss_base_model_version"]),
        ("base model", ["header: ss_base_model_version"]),
        ("steps", ["header: ss_steps"]),
        ("max_train_steps", ["header: ss_max_train_steps"]),
        ("header: ss_steps", ["header: ss_steps"]),
        ("ss", ["header: ss_base_model_version", "header: ss_steps", "header: ss_max_train_steps"]),
        ("step", []),
        ("", []),
        ("--", []),
    ],
)
def test_a_short_name_finds_its_column(asked, meant):
    assert columns_named(asked, TRAINERS) == meant


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("ss", "3 columns could be meant: header: ss_base"),
        ("trainer", "no LoRA has such a column"),
        ("artist", "label"),
    ],
)
def test_a_column_that_is_not_one_is_refused(monkeypatch, asked, words):
    monkeypatch.setattr(columns, "columns_of", lambda _: {name: {} for name in TRAINERS})
    collection = SimpleNamespace(label_column="artist")
    with pytest.raises(UsageError, match=words):
        check_columns(collection, SimpleNamespace(holdout=asked, also=()))
    check_columns(collection, SimpleNamespace(holdout="base", also=()))


# -- values and rows --------------------------------------------------------------------------------------------------


def collection_of(y, groups=None) -> SimpleNamespace:
    """Return the parts of a collection that the choice of values reads."""
    y = np.asarray(y)
    return SimpleNamespace(y=y, groups=groups, group_column=None, classes=[f"class {c}" for c in range(y.max() + 1)])


def values_of(*counts: tuple[str, int]) -> np.ndarray:
    return np.array([value for value, count in counts for _ in range(count)], object)


def reasons(left_out: list[dict]) -> dict[str, str]:
    return {entry["value"]: entry["reason"] for entry in left_out}


def test_the_most_frequent_values_are_held_out_and_the_others_named():
    counts = [(str(value), 30 - value) for value in range(12)] + [("few", 9), ("", 20)]
    value_of = values_of(*counts)
    rows_of, left_out = choose_values(collection_of(np.arange(len(value_of)) % 2), value_of, 0)
    assert list(rows_of) == [str(value) for value in range(10)]  # in the order of numbers, not of text
    assert reasons(left_out) == {
        "10": "beyond the 10 most frequent that can be held out",
        "11": "beyond the 10 most frequent that can be held out",
        "few": "fewer than 10 LoRAs",
    }
    for value, rows in rows_of.items():
        assert (value_of[rows["test"]] == value).all() and len(rows["test"]) == 30 - int(value)
        others = np.concatenate([rows["train"], rows["validation"]])
        assert sorted([*others, *rows["test"]]) == list(range(len(value_of)))  # those without a value train
        assert len(rows["validation"]) == round(0.1 * len(others))


def test_of_equally_frequent_values_those_are_held_out_that_the_seed_draws():
    letters = "abcdefghijkl"
    value_of = values_of(("most", 11), *[(letter, 10) for letter in letters])
    collection, chosen = collection_of(np.arange(131) % 2), []
    for seed in (0, 0, 1, 2):
        rows_of, left_out = choose_values(collection, value_of, seed)
        assert list(rows_of) == sorted(rows_of) and len(rows_of) == 10 and "most" in rows_of
        assert sorted([*rows_of, *(entry["value"] for entry in left_out)]) == sorted([*letters, "most"])
        chosen.append(tuple(rows_of))
    assert chosen[0] == chosen[1] and len({*chosen}) == 3


def test_values_whose_classes_are_not_among_the_others_are_left_out_with_the_reason():
    value_of = values_of(("a", 12), ("b", 12), ("c", 12))
    y = np.arange(36) % 2
    y[:5] = 2  # only of a
    y[12:14], y[24:26] = 3, 3  # two of b, two of c
    rows_of, left_out = choose_values(collection_of(y), value_of, 0)
    assert not rows_of
    assert reasons(left_out) == {
        "a": "no LoRA of class 2 has another value",
        "b": "fewer than 3 LoRAs of class 3 are left to train and validate on",
        "c": "fewer than 3 LoRAs of class 3 are left to train and validate on",
    }
    rows_of, left_out = choose_values(collection_of(np.repeat([0, 1, 2], 12)), value_of, 0)
    assert not rows_of and reasons(left_out)["b"] == "no LoRA of class 1 has another value"


def test_groups_that_span_values_do_not_leak():
    value_of, y = values_of(("a", 20), ("b", 20)), np.arange(40) % 2
    groups = np.arange(40)
    groups[[0, 21]] = 0  # copies of the same label? no matter: one has the value a, the other b
    groups[[2, 3, 24]] = 2
    rows = rows_without(collection_of(y, groups), np.arange(20), 0)
    learned = np.concatenate([rows["train"], rows["validation"]])
    assert not np.isin(groups[learned], groups[rows["test"]]).any()
    assert sorted(learned) == sorted({*range(20, 40)} - {21, 24})
    assert not np.isin(groups[rows["train"]], groups[rows["validation"]]).any()
    assert (value_of[rows["test"]] == "a").all()


def test_where_groups_leave_no_lora_of_a_class_that_is_the_reason():
    y, value_of = np.arange(60) % 2, values_of(("a", 30), ("b", 30))
    groups = np.arange(60)
    groups[31::2] = 1  # class 1 of b: copies of a LoRA of a
    _, left_out = choose_values(collection_of(y, groups), value_of, 0)
    assert reasons(left_out)["a"] == "all LoRAs of class 1 with another value share a group with these"
    groups[30::2] = 0
    _, left_out = choose_values(collection_of(y, groups), value_of, 0)
    assert reasons(left_out)["a"] == "all LoRAs of class 0 and class 1 with another value share a group with these"
    y[30::2] = 1  # class 0 is of a alone
    _, left_out = choose_values(collection_of(y, groups), value_of, 0)
    assert reasons(left_out)["a"] == "no LoRA of class 0 has another value"


def test_checkpoints_of_a_lora_count_as_one():
    lora = np.repeat(np.arange(40), 8)
    value_of = np.array(["rare" if i < 2 else f"common {i % 3}" for i in lora], object)
    rows_of, left_out = choose_values(collection_of(lora % 2, lora), value_of, 0)
    assert list(rows_of) == ["common 0", "common 1", "common 2"]
    reason = "fewer than 10 LoRAs, those of a group counted once"
    assert left_out == [{"value": "rare", "loras": 16, "groups": 2, "reason": reason}]


def test_of_the_group_column_itself_the_checkpoints_of_a_lora_count_as_one(monkeypatch):
    artist = np.repeat(np.arange(4), 12)  # of "a0" one LoRA with twelve checkpoints, of others twelve LoRAs
    collection = collection_of(np.arange(48) % 2, artist)
    collection.group_column = "artist"
    monkeypatch.setattr("experiment.holdout.trainings_of", lambda _: {"first": {step: step for step in range(12)}})
    units = units_of(collection, "artist")
    assert len(np.unique(units[:12])) == 1 and len(np.unique(units)) == 1 + 36
    assert units_of(collection, "trainer") is artist
    rows_of, left_out = choose_values(collection, np.array([f"a{i}" for i in artist], object), 0, units)
    assert list(rows_of) == ["a1", "a2", "a3"] and reasons(left_out) == {"a0": "fewer than 10 LoRAs"}


def test_what_only_python_reads_as_a_number_is_none_in_the_order_of_values():
    counts = [(value, 12) for value in ("1_000", "nan", "inf", "10", "2", "-1", "1e2")]
    value_of = values_of(*counts)
    rows_of, _ = choose_values(collection_of(np.arange(len(value_of)) % 2), value_of, 0)
    assert list(rows_of) == ["-1", "2", "10", "1e2", "1_000", "inf", "nan"]


def test_of_ids_the_number_is_kept_and_few_names():
    value_of = np.array([f"id {i}" for i in range(3000)] + ["pair", "pair"], object)
    _, left_out = choose_values(collection_of(np.arange(3002) % 2), value_of, 0)
    (few,) = by_reason(left_out)
    assert few["reason"] == "fewer than 10 LoRAs" and few["count"] == 3001 and len(few["named"]) == 20
    assert few["named"][0] == {"value": "pair", "loras": 2, "groups": 2}
    many = [{"value": str(i), "loras": 1, "groups": 1, "reason": f"reason {min(i, 29)}"} for i in range(60)]
    kept = by_reason(many)
    assert len(kept) == 21 and kept[0]["reason"] == "reason 29" and kept[-1]["reason"] == "other reasons"
    assert sum(entry["count"] for entry in kept) == 60 and kept[-1]["count"] == 10


def test_blanks_around_a_value_are_no_part_of_it(monkeypatch):
    files = [SimpleNamespace(path=p, layout=SimpleNamespace(layers=[SimpleNamespace(rank=4)])) for p in "abcd"]
    collection = SimpleNamespace(files=files, columns={"artist": {"a": " x", "b": "x\t", "c": "  ", "d": "y z"}})
    monkeypatch.setattr(columns, "recipe_columns", lambda files: {"steps": ["1 ", " ", "", "1"]})
    assert columns.columns_of(collection) == {
        "rank": dict.fromkeys("abcd", "4"),
        "steps": {"a": "1", "d": "1"},
        "artist": {"a": "x", "b": "x", "d": "y z"},
    }


def test_too_few_groups_for_a_split_are_a_reason():
    y, groups = np.arange(40) % 2, np.repeat(np.arange(4), 10)
    with pytest.raises(ValueError, match="no split of the 2 groups"):
        rows_without(collection_of(y, groups), np.arange(20), 0)
    y = np.repeat([0, 1], 20)
    with pytest.raises(ValueError, match="one class"):  # class 1 is one group, of which a member of class 0 is tested
        rows_without(collection_of(y, np.r_[np.arange(20), np.zeros(20, int)]), np.array([0]), 0)


# -- what is claimed --------------------------------------------------------------------------------------------------


def simulated(known: np.ndarray, unknown: np.ndarray, each: int = 20, runs: int = 3, seed: int = 0, **more) -> dict:
    """The section of values, of LoRAs that are recognised with these chances where their value was seen and not.

    ``known`` and ``unknown`` float[W]; all LoRAs are in the ordinary test set.
    """
    y = np.arange(len(known) * each) % 5
    value, generator = np.repeat(np.arange(len(known)), each), np.random.default_rng(seed)
    evidence = all_tested(y, draws=more.pop("draws", 400), seed=seed)

    def predicted(chances):
        right = generator.random((runs, len(y))) < chances[value]
        return np.where(right, y, (y + generator.integers(1, 5, right.shape)) % 5)

    names = more.pop("names", ("stats", "update_views"))
    usual, held = ({name: predicted(chances) for name in names} for chances in (known, unknown))
    fits = [
        Fit(f"artist {v}", np.flatnonzero(value == v), 80 + v, 0, {name: p[:, value == v] for name, p in held.items()})
        for v in range(len(known))
    ]
    seen = more.pop("seen", np.ones(len(y), bool))
    return plain(held_out(fits, Ordinary(seen, usual, {"stats": 0.5, "update_views": 0.9}), evidence))


def test_a_fall_is_found_and_its_absence_is_not():
    falls = simulated(np.full(6, 0.95), np.linspace(0.2, 0.6, 6))
    assert falls["best"] == "update_views"
    for record in falls["representations"].values():
        assert record["verdict"] == "falls" and record["why"] is None and record["losing"] >= 4
        assert record["loss"]["interval"][0] > 0.2 and record["loss"]["interval"][1] < 0.9
        assert record["worst"] in ("artist 0", "artist 1")
    holds = simulated(np.full(8, 0.97), np.full(8, 0.97), each=40)
    for record in holds["representations"].values():
        assert record["verdict"] == "holds" and record["losing"] == 0
        assert record["losing_at_most"] == pytest.approx(1 - 0.05 ** (1 / 8))
        assert record["loss"]["margin"] == 0.1 and record["above_chance"] == record["tested"] == 8


def test_what_cannot_be_told_is_undecided_with_the_reason():
    few = simulated(np.array([0.9, 0.9]), np.array([0.9, 0.4]))
    assert few["representations"]["stats"]["verdict"] == "undecided"
    assert "of 2 values" in few["representations"]["stats"]["why"]
    nothing = simulated(np.full(8, 0.2), np.full(8, 0.2), each=40)["representations"]["stats"]
    assert nothing["verdict"] == "undecided" and "indistinguishable from chance" in nothing["why"]
    assert nothing["above_chance"] == 0 and not nothing["loss"]["known"] and nothing["loss"]["margin"] < 0.03


def losses_of(tested: int, usual: int, held: int, values: int = 10) -> dict:
    """The record of values of ten LoRAs of two classes, of which so many are compared.

    Of these the ordinary classifier recognises the first ``usual``, and the one without the value the first ``held``.
    """
    y, value = np.arange(10 * values) % 2, np.repeat(np.arange(values), 10)
    place = np.arange(10 * values) % 10
    test = np.flatnonzero(place < tested)
    evidence = replace(all_tested(y), rows={"train": np.arange(0), "validation": np.arange(0), "test": test})
    before, after = (np.where(place < count, y, 1 - y)[None] for count in (usual, held))
    fits = [Fit(str(v), np.flatnonzero(value == v), 90, 0, {"stats": after[:, value == v]}) for v in range(values)]
    ordinary = Ordinary(np.ones(len(test), bool), {"stats": before[:, test]}, {"stats": 1.0})
    return plain(held_out(fits, ordinary, evidence))


def test_values_that_gain_significantly_do_not_lose():
    found = losses_of(tested=10, usual=1, held=10, values=4)
    record = found["representations"]["stats"]
    assert all(value["loss"]["significant"] and value["loss"]["difference"] < 0 for value in record["values"])
    assert record["losing"] == 0
    lost = losses_of(tested=10, usual=10, held=0, values=4)["representations"]["stats"]
    assert lost["losing"] == lost["detectable"] == 4 and lost["losing_at_most"] == 1


@pytest.mark.parametrize(("tested", "usual"), [(1, 1), (4, 4), (10, 3)])
def test_values_of_which_no_loss_could_be_significant_bound_no_share(tested, usual):
    section = losses_of(tested, usual, held=0)
    record = section["representations"]["stats"]
    assert all(value["loss"]["difference"] > 0 and not value["loss"]["detectable"] for value in record["values"])
    assert record["losing"] == record["detectable"] == 0 and record["losing_at_most"] is None
    (told,) = (line for line in report.holdout.lines(results_of(section)) if "total loss" in line)
    assert told.startswith("Whether a value loses cannot be told: of none would a total loss be significant")


def test_the_bound_is_of_the_values_of_which_a_loss_could_be_significant():
    y, value = np.arange(80) % 2, np.repeat(np.arange(4), 20)
    test = np.flatnonzero((value < 2) | (np.arange(80) % 20 < 2))  # of two values two LoRAs are compared
    evidence = replace(all_tested(y), rows={"train": np.arange(0), "validation": np.arange(0), "test": test})
    fits = [Fit(str(v), np.flatnonzero(value == v), 60, 0, {"stats": y[None, value == v]}) for v in range(4)]
    ordinary = Ordinary(np.ones(len(test), bool), {"stats": y[None, test]}, {"stats": 1.0})
    section = plain(held_out(fits, ordinary, evidence))
    record = section["representations"]["stats"]
    assert [of_value["loss"]["detectable"] for of_value in record["values"]] == [True, True, False, False]
    assert (record["losing"], record["detectable"]) == (0, 2)
    assert record["losing_at_most"] == pytest.approx(1 - 0.05 ** (1 / 2))
    assert (
        "None of 2 values of which a total loss would be significant loses significantly; of such values that are not "
        "here up to 78 % may (upper bound of 95 %). Of the other 2 it would not be: the ordinary classifier recognises "
        "too few of the compared LoRAs."
    ) in report.holdout.lines(results_of(section))


def test_accuracies_and_losses_are_those_of_hand():
    y = np.array([0, 0, 1, 1, 0, 1, 0, 1])
    evidence = replace(all_tested(y), rows={"train": np.arange(0), "validation": np.arange(0), "test": np.arange(1, 8)})
    usual = np.array([[0, 1, 1, 0, 1, 0, 1]])  # of LoRAs 1 to 7: all right
    fits = [
        Fit("a", np.arange(4), 30, 1, {"stats": np.array([[0, 1, 1, 1]])}),  # wrong on LoRA 1
        Fit("b", np.arange(4, 8), 31, 0, {"stats": np.array([[0, 0, 1, 0]])}),  # right on 4
    ]
    seen = np.array([1, 1, 0, 1, 1, 1, 1], bool)  # LoRA 3 is not compared
    found = plain(held_out(fits, Ordinary(seen, {"stats": usual}, {"stats": 1.0}), evidence))
    assert [(v["compared"], v["chance"], v["trained"]) for v in found["values"]] == [(2, 0.5, 30), (4, 0.5, 31)]
    record = found["representations"]["stats"]
    assert [value["accuracy"] for value in record["values"]] == [0.75, 0.25]
    assert [value["loss"]["difference"] for value in record["values"]] == [0.5, 0.75]
    assert record["held_out"]["accuracy"] == 0.5 and record["worst"] == "b"
    loss = record["loss"]
    assert (loss["mean"], loss["ordinary"], loss["held_out"], loss["loras"]) == (0.625, 1.0, 0.375, 6)


def test_where_the_ordinary_split_has_the_values_apart_there_is_no_loss():
    found = simulated(np.full(4, 0.9), np.full(4, 0.9), seen=np.zeros(80, bool))["representations"]["stats"]
    assert found["loss"] is None and found["losing_at_most"] is None and found["verdict"] == "undecided"
    assert all(value["loss"] is None and value["ordinary"] is None for value in found["values"])
    assert found["held_out"]["accuracy"] > 0.8 and found["above_chance"] == 4


def test_a_value_of_one_class_is_not_tested_against_chance():
    y = np.repeat([0, 1], 12)
    fits = [Fit(str(v), np.flatnonzero(y == v), 30, v, {"stats": y[None, y == v]}) for v in (0, 1)]
    ordinary = Ordinary(np.ones(24, bool), {"stats": y[None]}, {"stats": 1.0})
    record = plain(held_out(fits, ordinary, all_tested(y)))["representations"]["stats"]
    assert record["tested"] == record["above_chance"] == 0
    assert all(value["p"] is None and value["above_chance"] is None for value in record["values"])


def test_the_interval_over_values_is_students_and_no_narrower_than_that_of_loras():
    values, narrow = np.array([0.1, 0.2, 0.3]), np.array([0.19, 0.21])
    mean, interval = over_values(values, narrow, (-1.0, 1.0))
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert mean == pytest.approx(0.2) and interval == pytest.approx([0.2 - half, 0.2 + half])
    assert over_values(values, np.array([-0.5, 0.21]), (-1.0, 1.0))[1] == pytest.approx([-0.5, 0.2 + half])
    assert over_values(values, narrow, (0.0, 0.3))[1].tolist() == [0.0, 0.3]
    wider = over_values(values, narrow, (-1.0, 1.0), count=3)[1]
    assert np.diff(wider) > np.diff(interval)


@pytest.mark.slow
@pytest.mark.parametrize("values", [3, 5, 10])
def test_intervals_of_the_average_loss_hold_where_values_differ_about_normally(values):
    held = claimed = 0
    for seed in range(300):
        generator = np.random.default_rng((seed, values))
        lost = np.clip(generator.normal(0.3, 0.15, values), -0.1, 0.8)
        found = simulated(np.full(values, 0.85), 0.85 - lost, each=10, seed=seed, draws=200, names=("stats",))
        low, high = found["representations"]["stats"]["loss"]["interval"]
        held += low <= 0.3 <= high
        none = simulated(np.full(values, 0.85), np.full(values, 0.85), 10, seed=seed, draws=200, names=("stats",))
        claimed += none["representations"]["stats"]["verdict"] == "falls"
    assert held / 300 > 0.92 and claimed / 300 < 0.05


# -- the whole program ------------------------------------------------------------------------------------------------


def artists_collection(root: Path, shared: bool, artists: int = 4, each: int = 5, width: int = 16) -> Path:
    """LoRAs of three classes that differ in the direction of one factor, the same for all artists or not."""
    generator, names, number = np.random.default_rng(0), list(lora(2, 1, width)), 0
    common, down = generator.standard_normal((3, width)), generator.standard_normal((1, width))
    for artist in range(artists):
        directions = common if shared else generator.standard_normal((3, width))
        for label in np.repeat(range(3), each).tolist():
            tensors = lora(2, 1, width, seed=int(generator.integers(2**62)))
            noise = [0.1 * generator.standard_normal(shape) for shape in ((1, width), (width, 1))]
            tensors[names[0]] = torch.tensor(down + noise[0], dtype=torch.float32)
            tensors[names[1]] = torch.tensor(directions[label][:, None] + noise[1], dtype=torch.float32)
            about = {"category_label": f"class_{label}", "artist": f"artist {artist}"}
            write_lora(root / f"class_{label}" / f"{number:04}" / FILE_NAME, tensors, about)
            number += 1
    return root


def run(tmp_path: Path, dataset: Path, *flags: str) -> dict:
    """Results of the program on a folder."""
    how = ("--device=cpu", "--quick", "--top-k=1", "--num-runs=2", "--representations=stats")
    assert main(["--dataset", str(dataset), "--output-dir", str(tmp_path / "out"), *how, *flags], NARROW) == 0
    return json.loads((tmp_path / "out" / f"ablation_{dataset.name}" / "results.json").read_text())


def test_directions_that_each_artist_has_of_its_own_are_not_recognised_and_a_rerun_trains_nothing(
    tmp_path, monkeypatch, capsys
):
    own = run(tmp_path, artists_collection(tmp_path / "own", shared=False), "--holdout=Artist")
    assert not check_schema(own)
    section = own["analysis"]["holdout"]
    assert section["column"] == "artist" and section["best"] == "update_views" and not section["not_run"]
    record = section["representations"]["update_views"]
    assert record["verdict"] == "falls" and record["loss"]["ordinary"] > 0.9 and record["held_out"]["accuracy"] < 0.6
    with np.load(tmp_path / "out" / "ablation_own" / "predictions.npz") as arrays:
        kept = {name: arrays[name] for name in arrays.files if name.startswith("holdout/")}
    assert not undocumented_arrays({name: (array.dtype.kind, array.ndim) for name, array in kept.items()})
    assert {name: array.shape for name, array in kept.items()} == {
        "holdout/stats/predicted": (2, 60),
        "holdout/update_sketch/predicted": (2, 60),
        "holdout/update_views/predicted": (1, 60),
    }
    assert all((array >= 0).all() for array in kept.values())  # each LoRA has a value that was held out
    assert "\n   Falls: update_views recognises" in capsys.readouterr().out

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(plans, "train_classifiers", never)
    monkeypatch.setattr(plans.kernels, "classify_each", never)
    (tmp_path / "out" / "ablation_own" / "results.json").unlink()
    assert run(tmp_path, tmp_path / "own", "--holdout=artist")["analysis"]["holdout"] == section


def test_ranks_and_trainers_fields_are_held_out_where_ranks_differ(tmp_path):
    root, generator = tmp_path / "mixed", np.random.default_rng(0)
    for number in range(40):
        rank, tensors = 2 + 2 * (number // 20), None
        tensors = lora(2, rank, 8, seed=number)
        label = number % 2
        tensors = {name: tensor * 2.0**label for name, tensor in tensors.items()}
        path = root / f"class_{label}" / f"{number:04}" / FILE_NAME
        path.parent.mkdir(parents=True)
        base = {"ss_base_model_version": ("sd_v1", "sdxl")[int(generator.integers(2))]}
        save_file(tensors, path, base)
    ranks = run(tmp_path, root, "--holdout=rank", "--representations=stats,flat_vec", "--partial-ok")
    section = ranks["analysis"]["holdout"]
    assert [value["value"] for value in section["values"]] == ["2", "4"]
    assert [entry["representation"] for entry in ranks["representations_not_run"]] == ["flat_vec"]
    assert set(section["representations"]) == {"stats", "update_sketch", "update_views"}
    section = run(tmp_path, root, "--holdout=base")["analysis"]["holdout"]
    assert section["column"] == "header: ss_base_model_version"
    assert [value["value"] for value in section["values"]] == ["sd_v1", "sdxl"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An experiment on artists' LoRAs, all phases done."""
    root = artists_collection(tmp_path_factory.mktemp("held") / "artists", shared=True)
    flags = ("--top-k=1", "--num-runs=2", "--representations=stats", "--holdout=artist")
    return experiment_on(root, root.parent / "cache", *flags)


def test_directions_that_artists_share_are_recognised(experiment):
    found = plain(hold_out(experiment, ["stats"]))
    record = found["representations"]["update_views"]
    assert record["held_out"]["accuracy"] > 0.9 and record["verdict"] != "falls" and record["above_chance"] == 4
    assert found["trained"] == 42 and all(40 <= value["trained"] <= 42 for value in found["values"])


def test_the_ordinary_split_trains_on_the_rows_that_it_has(experiment, monkeypatch):
    def other(_, rows, __):
        assert not np.array_equal(rows["train"], experiment.rows["train"])  # less what is too large already
        return rows, []

    monkeypatch.setattr(phases, "without_oversized", other)
    assert not hold_out(experiment, ["stats"])["not_run"]


def test_a_value_that_fails_is_named_and_the_others_are_measured(experiment, monkeypatch):
    train = plans.train_classifiers

    def failing(x, y, split, *arguments, **more):
        if 0 in split.test.tolist():  # a LoRA of artist 0
            raise FloatingPointError("training diverged")
        return train(x, y, split, *arguments, **more)

    monkeypatch.setattr(plans, "train_classifiers", failing)
    moved = experiment.extracted.folder / "units"
    moved.rename(moved.with_name("elsewhere"))
    assert 0 not in experiment.rows["test"]  # else the ordinary split would fail too
    found = hold_out(experiment, ["stats"])
    assert [value["value"] for value in found["values"]] == ["artist 1", "artist 2", "artist 3"]
    named = [{"value": "artist 0", "loras": 15, "groups": 15}]
    assert found["left_out"] == [{"reason": "stats: training diverged", "count": 1, "named": named}]
    predicted = experiment.predictions.further["holdout/stats/predicted"]
    assert (predicted == -1).sum() == 2 * 15


def test_a_representation_that_fails_everywhere_loses_no_value(experiment, monkeypatch):
    def failing(*_, **__):
        raise FloatingPointError("the kernel is not finite")

    monkeypatch.setattr(plans.kernels, "classify_each", failing)
    moved = experiment.extracted.folder / "units"
    if moved.exists():
        moved.rename(moved.with_name("elsewhere too"))
    found = hold_out(experiment, ["stats"])
    assert found["not_run"] == {"update_views": "the kernel is not finite"}
    assert len(found["values"]) == 4 and set(found["representations"]) == {"stats", "update_sketch"}


def test_fewer_than_two_values_are_told_and_nothing_is_trained(experiment, monkeypatch):
    monkeypatch.setattr("experiment.holdout.LEAST_LORAS", 16)
    monkeypatch.setattr(plans, "train_classifiers", None)
    found = hold_out(experiment, ["stats"])
    assert found["why"] == "at least 2 values that can be held out are needed, and there is none"
    assert not found["values"] and [entry["count"] for entry in found["left_out"]] == [4]
    told = report.holdout.lines({"analysis": {"holdout": plain(found)}})
    assert told[0].startswith("Not measured for artist: ") and "artist 0 (15)" in told[1]
    assert report.holdout.tables({"analysis": {"holdout": plain(found)}}) == {}
    assert holdout_finding({"analysis": {"holdout": plain(found)}}) is None
    monkeypatch.setattr(experiment, "settings", replace(experiment.settings, holdout=None))
    assert hold_out(experiment, ["stats"]) is None


# -- how it is told ---------------------------------------------------------------------------------------------------


def results_of(section: dict, **more) -> dict:
    about = {"column": "artist", "runs": 2, "without_value": 0, "why": None, "left_out": [], "not_run": {}}
    return {"analysis": {"alpha": 0.05, "holdout": about | section | more}}


def test_sentences_and_table_have_the_numbers():
    section = simulated(np.full(6, 0.95), np.linspace(0.2, 0.6, 6))
    named = [{"value": f"value {i}", "loras": i, "groups": min(i, 6)} for i in range(7, 1, -1)]
    left_out = [{"reason": "fewer than 10 LoRAs", "count": 1008, "named": named}]
    results = results_of(section, left_out=left_out, without_value=1, not_run={"update_sketch": "no pair"})
    told, record = report.holdout.lines(results), section["representations"]["update_views"]
    assert told[0].startswith(f"Falls: update_views recognises {100 * record['held_out']['accuracy']:.1f} % (")
    assert f"it loses {100 * record['loss']['mean']:.1f} points (" in told[0] and "over 6 values" in told[0]
    assert any(line.startswith(f"The worst value is {record['worst']}: ") for line in told)
    assert told[-3:] == [
        "1 LoRA has no value, and is never tested.",
        "Left out: value 7 (7 in 6 groups), value 6 (6), value 5 (5), value 4 (4), value 3 (3) and 1,003 more: "
        "fewer than 10 LoRAs.",
        "Not run is update_sketch: no pair.",
    ]
    assert all(line.endswith(".") and line[0] == line[0].upper() for line in told)
    (table,) = report.holdout.tables(results).values()
    assert isinstance(table, Table) and len(table.rows) == 12
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert holdout_finding(results).startswith("Falls: on a value of artist that no training saw update_views reaches")


@pytest.mark.parametrize("style", ["report", "paper"])
def test_the_figure_of_ten_long_names_can_be_read_in_one_column_too(style):
    section = simulated(np.full(10, 0.9), np.linspace(0, 0.9, 10), each=10, names=("stats", "update_views"))
    for i, value in enumerate(section["values"]):
        value["value"] = f"{i} a name that is longer than there is room for, $x_1$ <b>" if i % 2 else f"{i}"
    for record in section["representations"].values():
        record["worst"] = section["values"][int(record["worst"].split()[-1])]["value"]
    section["representations"]["stats"]["values"][3] |= {"ordinary": None, "loss": None}
    results = results_of(section) | {"config": {"quick": False}, "figures": {"style": style}}
    assert all(len(row[1]) <= 40 for row in report.holdout.tables(results)["holdout"].rows)
    drawn = figures.draw(results, {"holdout": holdout_finding(results)})
    suffixes = ("", "_column") if style == "paper" else ("",)
    assert {name for name in drawn if "/" not in name} >= {f"holdout{end}.png" for end in suffixes}
    svg = drawn["holdout.svg"].decode()
    assert "update_views: falls" in svg and "ordinary split" in svg


def test_the_page_and_the_text_have_the_section_with_its_figure_and_table():
    results = made()
    results["analysis"]["holdout"] = results_of(simulated(np.full(6, 0.95), np.full(6, 0.3)))["analysis"]["holdout"]
    content = text.content_of(results)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 3"></svg>'
    section = page.render_page(results, {"holdout.svg": svg}, content).decode().split('<section id="holdout"')[1]
    section = section.split("</section>")[0]
    assert (
        "Values that were held out" in section and section.count("<tr") == 13 and content.findings["holdout"] in section
    )
    told = text.render_text(results, content)
    assert "Values that were held out" in told and "artist 5" in told
    (line,) = [line for line in text.console_lines(results, content) if line.startswith("   Falls: ")]
    assert content.further["holdout"][0].startswith(line.strip())
