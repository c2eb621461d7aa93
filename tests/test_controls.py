"""What is trained and read to compare with: controls, groups, metadata, shuffled labels."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from making import NARROW, planted_collection, write_collection
from safetensors.torch import load_file, save_file

import ablation_experiment
from analysis.comparison import grouped_split
from analysis.cross_fitting import cross_fitted
from analysis.removal_plan import Order
from data import index_as_asked, index_collection
from experiment import controls, phases, plans
from experiment.engine import Engine
from experiment.extraction import extract
from experiment.phases import Experiment
from experiment.settings import resolve


def experiment_on(root: Path, cache: Path, *flags: str) -> Experiment:
    """An experiment whose phases are done."""
    args = ablation_experiment.parse_arguments(["--dataset", str(root), "--device=cpu", "--quick", *flags])
    settings, progress = resolve(args, NARROW), ablation_experiment.Progress(False)
    collection = index_as_asked(args, root, root.name, progress)
    engine = Engine(settings.devices)
    plan = ablation_experiment.make_plan(settings, collection, engine, cache)
    extracted = extract(collection, plan.needed, cache, settings.device)
    experiment = Experiment(settings, collection, plan.selected, plan.rows, extracted, engine, progress)
    ablation_experiment.run_phases(experiment, plan.chosen, {}, ablation_experiment.Stopwatch())
    return experiment


def describe_files(root: Path, fields) -> None:
    """Give the metadata.json beside the i-th weight file ``fields(i)`` more."""
    for i, folder in enumerate(sorted(path.parent for path in root.rglob("*.safetensors"))):
        path = folder / "metadata.json"
        there = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(there | fields(i)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """90 LoRAs of 3 classes and 8 layers of which three carry the class, in groups of three, with numbers beside."""
    root = tmp_path_factory.mktemp("collections") / "planted"
    planted_collection(root, per_class=30)
    generator = np.random.default_rng(0)
    describe_files(
        root,
        lambda i: {
            "artist": f"artist {i // 3}",
            "class_id": i // 30,
            "images": int(generator.integers(5, 9)),
            "seed": i,
            "note": "x",
        },
    )
    return experiment_on(root, root.parent / "cache", "--top-k=3", "--representations=stats,update_sketch")


NAMES = ["stats", "update_sketch"]


def asked(experiment: Experiment, level: str, shuffles: int = 0):
    """The analysis of an experiment whose flags ask for these controls."""
    with pytest.MonkeyPatch.context() as patch:
        settings = replace(experiment.settings, controls=level, null_shuffles=shuffles)
        patch.setattr(experiment, "settings", settings)
        return controls.analyse(experiment, NAMES, print)


def test_equal_conditions_are_trained_once_and_those_of_the_phases_not_again(planted, monkeypatch):
    trained = []
    train = plans.train_classifiers

    def counted(*arguments, **more):
        trained.append(len(arguments[3].run))
        return train(*arguments, **more)

    monkeypatch.setattr(plans, "train_classifiers", counted)
    kept = np.ones((4, 2, 8), bool)
    kept[1, :, planted.ranking[:3]] = False  # as in the ablation
    kept[2:, :, 0] = False
    found = planted.train_under("stats", kept)
    assert found["predicted"].shape == (4, 2, 9 + 18) and found["attribution"].shape == (4, 2, 8)
    assert sum(trained) == 2  # the first two were trained by the phases, the last is the third
    for position, condition in enumerate(("baseline", "ablation")):
        predicted = planted.predictions.conditions[condition]["stats"]["predicted"]
        np.testing.assert_array_equal(found["predicted"][position], predicted[:2])
    np.testing.assert_array_equal(found["predicted"][2], found["predicted"][3])


def test_conditions_without_an_input_are_chance_and_not_trained(planted):
    kept = np.zeros((2, 1, 8), bool)
    kept[1, 0, [0, 2, 4, 6]] = True  # the downs alone: no pair is whole
    found = planted.train_under("update_sketch", kept)
    assert "attribution" not in found and len(np.unique(found["predicted"])) == 1
    truth = planted.collection.y[planted.rows["test"]]
    assert (found["predicted"][0, 0, 9:] == truth).mean() == pytest.approx(1 / 3)


def test_representations_that_read_whole_modules_are_ordered_and_removed_by_modules(planted):
    alone = controls.train_modules(planted, "update_sketch", 2)
    assert alone["predicted"].shape == alone["log_loss"].shape == (4, 2, 9 + 18)
    order = Order.of_modules(controls.evidence_of(planted), planted.inputs.members, **alone)
    assert (order.unit, order.top, len(order.names)) == ("module", 2, 4)
    validated = (alone["predicted"][..., :9] == planted.collection.y[planted.rows["validation"]]).mean((1, 2))
    first = [layer.module for layer in planted.layers[::2]].index(order.names[0])
    assert validated[first] == validated.max()
    plan = controls.plan_of(planted, order, "update_sketch", "all")
    assert (plan.kept[..., ::2] == plan.kept[..., 1::2]).all() and plan.kept.shape[1] == 3


def test_kernels_are_trained_on_each_module_alone(planted, tmp_path):
    flags = ("--top-k=3", "--representations=update_kernel")
    experiment = experiment_on(planted.collection.root, tmp_path / "cache", *flags)
    evidence = controls.evidence_of(experiment)
    plan, arrays = controls.train_conditions(experiment, evidence, "update_kernel", "basic", None)
    assert arrays["modules"].shape == (4, 1, 9 + 18) and plan.order.unit == "module"
    alone = plan.kept[:, 0, ::2].sum(1) == 1
    trained = {int(kept.argmax()) // 2: i for i, kept in enumerate(plan.kept[:, 0]) if alone[i]}
    for module, condition in trained.items():
        np.testing.assert_array_equal(arrays["modules"][module], arrays["predicted"][condition])


def test_attribution_finds_the_layers_that_carry_the_class_and_no_removed_one(planted):
    kept = np.ones((2, 3, 8), bool)
    kept[1, :, 1] = False
    shares = planted.train_under("stats", kept)["attribution"].mean(1)
    assert set(np.argsort(-shares[0])[:3].tolist()) == {1, 4, 6} and shares[1, 1] == 0 < shares[0, 1]


def test_metadata_are_numbers_that_are_neither_the_label_nor_ids(planted):
    numbers = controls.metadata(planted)
    assert numbers.shape == (90, 1) and set(numbers.ravel().tolist()) == {5, 6, 7, 8}
    assert controls.ranks(planted) is None


def test_the_recipe_is_one_hot_and_none_where_all_files_are_alike(planted, tmp_path):
    updates = np.ones((90, 4, 3), np.float32)
    assert controls.recipe(planted, updates) is None
    headers_by_class(tmp_path, lambda c, i: {"ss_base": f"base {c}", "ss_seed": 4 * c + i, "ss_steps": i % 2})
    files = SimpleNamespace(collection=index_collection(tmp_path))
    found = controls.recipe(files, np.ones((8, 2, 3), np.float32))
    bases, steps = [[1, 0]] * 4 + [[0, 1]] * 4, [[1, 0], [0, 1]] * 4
    assert found.tolist() == [base + step for base, step in zip(bases, steps, strict=True)]
    of_scales = controls.recipe(files, np.repeat([1.0, 2.0], 4)[:, None, None] * np.ones((8, 2, 3)))
    assert of_scales.shape == (8, 6)


def test_groups_that_headers_name_are_found(tmp_path):
    headers_by_class(
        tmp_path, lambda c, i: {"ss_session_id": f"{c} {i // 2}", "ss_base": f"base {c}", "ss_steps": i % 2}
    )
    collection = index_collection(tmp_path)
    columns = controls.group_columns(collection)
    assert list(columns) == ["header: ss_session_id"]  # a base is that of a class, and steps are of several
    values = [columns["header: ss_session_id"][file.path] for file in collection.files]
    assert values == [f"{c} {i}" for c in range(2) for i in (0, 0, 1, 1)]


def headers_by_class(root: Path, fields) -> None:
    """Two classes of four LoRAs, the header of each with ``fields(class, number)``."""
    write_collection(root, per_class=4)
    for position, path in enumerate(sorted(root.rglob("*.safetensors"))):
        texts = {name: str(value) for name, value in fields(position // 4, position % 4).items()}
        save_file(load_file(path), path, texts)


def test_ranks_are_told_where_they_differ(tmp_path):
    write_collection(tmp_path / "mixed", per_class=5)
    write_collection(tmp_path / "other", per_class=5, rank=4)
    for c in range(2):
        (tmp_path / "other" / f"class_{c}").rename(tmp_path / "mixed" / f"class_{c}" / "more")
    for path in (tmp_path / "mixed").glob("class_*/more/*"):
        path.rename(path.parents[1] / f"more_{path.name}")
    experiment = experiment_on(tmp_path / "mixed", tmp_path / "cache", "--top-k=1", "--representations=stats")
    assert controls.ranks(experiment).shape == (20, 4)
    assert set(controls.ranks(experiment).ravel().tolist()) == {2, 4}


def test_a_column_whose_values_lie_within_classes_looks_like_groups(planted):
    assert list(controls.group_columns(planted.collection)) == ["artist"]


def test_an_unused_group_column_is_split_by_and_the_best_representation_trained_again(planted):
    e = controls.evidence_of(planted)
    columns = controls.group_columns(planted.collection)
    column, best, truth, groups, predicted = controls.grouped(planted, e, NAMES, columns)
    assert column == "artist" and best in NAMES
    assert predicted.shape == (3, len(truth)) and len(np.unique(groups)) == len(truth) / 3
    assert (predicted == truth).mean() > 1 / 3 + 2 * (1 / 3 * 2 / 3 / len(truth)) ** 0.5


def test_a_group_column_in_use_is_not_told_of(tmp_path, planted):
    root = planted.collection.root
    flags = ("--top-k=3", "--representations=stats", "--group-column=artist")
    experiment = experiment_on(root, tmp_path / "cache", *flags)
    assert controls.group_columns(experiment.collection) == {}


def test_groups_that_allow_no_split_are_told_of_and_not_trained(planted):
    e, files = controls.evidence_of(planted), planted.collection.files
    too_few = {"artist": {file.path: f"{file.label} by one of {i % 2}" for i, file in enumerate(files)}}
    assert controls.grouped(planted, e, NAMES, too_few) is None
    assert controls.grouped(planted, e, [], controls.group_columns(planted.collection)) is None
    found = grouped_split(e, ["artist"], None)
    assert found["unused"] == ["artist"] and found["representation"] is None and "no split" in found["why"]


def test_rankings_of_shuffled_labels_are_at_chance(planted):
    found = controls.shuffled(planted, 3)
    assert found.shape == (3, 8) and abs(found.mean() - 1 / 3) < 0.15
    assert len(np.unique(found, axis=0)) == 3


def test_without_controls_what_needs_no_training_is_analysed_and_nothing_is_trained(planted, monkeypatch):
    monkeypatch.setattr(planted.engine, "do", None)
    found = asked(planted, "none")
    assert found["controls"] == "none" and found["controls_not_run"] == {}
    assert {record["depth"] for record in found["layers"]["records"] if record["above_null"]} == {1, 4, 6}
    assert found["robustness"] == {} and found["attribution"] is None and found["null_shuffles"] is None
    assert found["cross_fitted"]["drops"] == {} and found["cross_fitted"]["first"]["above_null"]
    assert found["representations"]["drops"]["stats"]["drop"] > 0.3
    assert found["groups"]["unused"] == ["artist"] and found["groups"]["column"] is None
    assert found["groups"]["why"] == "no other split was tried (--controls=none)"
    assert "norms" in found["cheap"]["as_good"]
    assert [record["outcome"] for record in found["hypotheses"]][1] == "not answerable"


def test_planted_layers_are_found(planted):
    found = asked(planted, "basic")
    above = {record["depth"] for record in found["layers"]["records"] if record["above_null"]}
    assert above == {1, 4, 6}
    assert list(found["robustness"]) == ["stats"] and found["robustness"]["stats"]["verdict"] == "undecided"
    assert "too few others to remove instead (p = 0.091 from 10 draws)" in found["robustness"]["stats"]["why"]
    assert found["groups"]["unused"] == ["artist"] and found["attribution"]["same_top_k"] == 3
    assert found["cheap"]["metadata"]["p"] > 0.05 and "norms" in found["cheap"]["as_good"]  # only scales are planted
    assert found["controls_not_run"] == {}
    json.dumps(found, allow_nan=False)


def test_what_each_fold_chose_is_removed_and_the_ranking_not_trained_again(planted, monkeypatch):
    monkeypatch.setattr(planted, "rank", None)
    evidence = replace(controls.evidence_of(planted), resamples=200, permutations=200)
    found = cross_fitted(evidence, controls.cross_fitted(planted, evidence, NAMES, "basic"))
    assert found["why"] is None and found["sets"] == 1 and found["runs"] == 3  # three layers stand out in every fold
    for name, record in found["drops"].items():
        assert name in NAMES and record["drop"] == pytest.approx(record["drop_cf"])
        assert record["optimism"] == pytest.approx(0)
    assert found["drops"]["stats"]["significant"] and found["drops"]["stats"]["drop_cf"] > 0.3
    assert found["top_alone"]["p"] < 0.01 and found["beats_all"].keys() == {"first", "top_alone"}
    kept = planted.predictions.conditions.pop("cross_fitted")
    assert kept.keys() == {*NAMES, "top layers alone"} and kept["stats"]["predicted"].shape == (1, 3, 9 + 18)


def test_the_same_rows_are_trained_on_again_and_no_more_loras_taken_out_as_too_large(planted, monkeypatch):
    def second(*_):
        raise AssertionError("rows that are less what is too large already")

    monkeypatch.setattr(phases, "without_oversized", second)
    evidence = controls.evidence_of(planted)
    assert set(controls.cross_fitted(planted, evidence, NAMES, "basic").removed) == {*NAMES}
    assert next(phases.on_permuted_labels(planted, 1, "test")).rows is planted.rows


def test_nothing_is_cross_fitted_where_validation_ranks_and_trained_where_no_controls_are(planted, monkeypatch):
    evidence = controls.evidence_of(planted)
    monkeypatch.setattr(planted, "again", None)
    without = controls.cross_fitted(planted, evidence, NAMES, "none")
    assert without.removed == {} and without.why is None and without.all_layers.shape == (3, 18)
    monkeypatch.setattr(planted, "settings", replace(planted.settings, rank_by="val"))
    assert "validation" in controls.cross_fitted(planted, evidence, NAMES, "basic").why


def test_controls_that_diverge_are_named_and_the_rest_goes_on(planted, monkeypatch):
    def diverge(*_):
        raise plans.TrainingError("training diverged")

    monkeypatch.setattr(planted, "train_under", diverge)
    monkeypatch.setattr(controls, "shuffled", diverge)
    found = asked(planted, "basic", 2)
    assert found["controls_not_run"] == dict.fromkeys(("stats", "null shuffles"), "training diverged")
    assert found["robustness"] == {} and found["null_shuffles"] is None and found["layers"]["num_above_null"] == 3


def test_stacks_that_memory_made_smaller_are_noted_in_repeated_experiments_too(planted, monkeypatch):
    noted: dict[str, int] = {"ranking": 3}
    monkeypatch.setattr(planted.planner, "smaller_stacks", noted)
    planner = planted.again(planted.collection, planted.rows, 1).planner
    for size in (2, 4, None):
        monkeypatch.setattr(planner.units, "smaller_stack", lambda _, size=size: size)
        planner.note_smaller([], "ranking")
    planner.note_smaller([], "grouped: stats")
    assert noted == {"ranking": 2}


def test_an_experiment_that_nobody_needs_is_gone_at_once(planted):
    """Else what it has read would stay on a device until Python looks for cycles."""
    again = planted.again(planted.collection, planted.rows, 1)
    again.rank()
    seen = weakref.ref(again), weakref.ref(again.inputs), weakref.ref(again.inputs.learned)
    gc.disable()
    try:
        del again
        assert [reference() for reference in seen] == [None, None, None]
    finally:
        gc.enable()
