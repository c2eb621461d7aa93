"""Other columns that the weights tell: planted ones are found, permuted ones not, nothing learned is fitted again."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from making import FILE_NAME, NARROW, lora, quick_runs, write_lora
from result_making import faults, unwrapped
from sklearn.svm import SVC
from test_controls import experiment_on
from test_house import Key, _differences, check_schema, documented, undocumented_arrays

import ablation_experiment
import analysis.probes
from analysis.probes import BEYOND, CHANCE, THROUGH, Probed, tell
from analysis.questions import plain
from experiment import probes
from experiment.settings import resolve
from report import probes as told
from training.stacks import standardise

NAMES = ["flat_vec", "stats", "vae", "update_kernel", "update_spectrum", "update_views", "update_attention"]


# ----------------------------------------------------------------------------------------------------------------------
# Predictions that are made
# ----------------------------------------------------------------------------------------------------------------------


def probed(y, predicted, concept=None, groups=None, name="column", parts=(0.5, 0.1), values=None) -> Probed:
    """A column of which the first half of the LoRAs are trained on; ``predicted`` int[N] of all, by representation."""
    y, count = np.asarray(y), len(y)
    train, validation = int(parts[0] * count), int(sum(parts) * count)
    rows = {"train": np.arange(train), "validation": np.arange(train, validation), "test": np.arange(validation, count)}
    rows = {part: of_part[y[of_part] >= 0] for part, of_part in rows.items()}
    held_out = np.concatenate([rows["validation"], rows["test"]])
    return Probed(
        name=name,
        values=values or [f"value {i}" for i in range(y.max() + 1)],
        y=y,
        concept=np.zeros(count, int) if concept is None else np.asarray(concept),
        rows=rows,
        groups=np.arange(count) if groups is None else groups,
        trained_on=len(rows["train"]),
        bins=None,
        predicted={name: np.asarray(of_all)[held_out] for name, of_all in predicted.items()},
    )


def analysed(*columns: Probed, draws: int = 300) -> list[dict]:
    """The records, which strict JSON must give back as they are and docs/results.md must describe."""
    records = plain(tell(columns, 0, draws, draws))
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    tree = Key(below={"[]": documented("results.json").below["analysis"].below["also"].below["columns"].below["[]"]})
    assert list(_differences(records, tree, "columns")) == []
    return records


def test_what_the_concept_alone_gives_is_the_commonest_value_of_its_train_loras():
    concept = [0, 0, 0, 1, 1, 2, 0, 1, 3, 2]
    y = np.array([1, 1, 0, 0, 0, 1, 1, 1, 1, 0])
    column = replace(probed(y, {}, concept), rows={"train": np.arange(6), "test": np.arange(6, 10)})
    assert column.commonest == 0  # of three and three the first
    assert column.from_concept().tolist() == [True, False, False, False]  # says 1, 0, 0 (nothing known), 1


def test_numbers_of_a_column_are_those_computed_by_hand():
    y = np.tile([0, 0, 1], 20)  # 30 train, 6 validation, 24 test LoRAs
    wrong = y.copy()
    wrong[[36, 39]] = 1  # two test LoRAs
    (record,) = analysed(probed(y, {"a": np.zeros(60, int), "b": wrong, "c": y}))
    accuracy = {entry["representation"]: entry["accuracy"] for entry in record["representations"]}
    assert accuracy == {"a": pytest.approx(16 / 24), "b": pytest.approx(22 / 24), "c": 1}
    assert record["chance"] == record["from_concept"]["accuracy"] == pytest.approx(16 / 24)
    assert record["best"] == "b"  # of equal validation accuracy the first
    a, b, c = record["representations"]
    assert a["p_family"] == 1 and not a["significant"]  # always guessing is never above permuted values
    assert b["significant"] and c["significant"] and c["p_family"] == pytest.approx(1 / 301)
    own = 14 / 24 * 16 / 24 + 10 / 24 * 8 / 24  # of one concept: says 14 times 0, and 10 times 1
    assert record["beyond_concept"]["permuted"] == pytest.approx(own)
    assert record["beyond_concept"]["difference"] == pytest.approx(22 / 24 - own)
    assert [value["loras"] for value in record["values"]] == [40, 20]


def test_p_are_times_the_number_of_columns():
    y = np.tile([0, 1], 30)
    column = probed(y, {"a": y})
    alone, together = analysed(column)[0], analysed(column, column, column)[0]
    assert together["representations"][0]["p_family"] == pytest.approx(3 * alone["representations"][0]["p_family"])
    assert together["beyond_concept"]["p_family"] == pytest.approx(min(1, 3 * alone["beyond_concept"]["p"]))
    assert together["needed"] >= alone["needed"]


def section_of(records: list[dict], left_out: dict[str, str] | None = None) -> dict:
    return {"columns": records, **probes.listed(left_out or {}), "not_probed": [], "most_train": 2000}


def test_many_columns_have_permutations_enough(monkeypatch):
    """Of 501 columns and 10,000 permutations the least p would be 0.0501."""
    told_column, y = analysis.probes._told, np.tile([0, 1], 60)
    columns, done = [probed(y, {"a": y})] * 501, []
    monkeypatch.setattr(analysis.probes, "_told", lambda *given: given)
    given = tell(columns, 0, 100, progress=lambda *at: done.append(at))
    assert {of_column[1:] for of_column in given} == {(501, 0, 100, 20_040)}
    assert done[0] == (1, 501) and done[-1] == (501, 501) and len(done) == 501
    assert {of_column[-1] for of_column in tell(columns[:250], 0, 100)} == {10_000}
    record = plain(told_column(*given[0]))
    assert record["outcome"] == BEYOND and record["needed"] < 1 and not record["too_few_permutations"]


def test_too_many_columns_are_told_as_the_cause(monkeypatch):
    monkeypatch.setattr(analysis.probes, "MOST_PERMUTATIONS", 100)
    y = np.tile([0, 1], 60)
    records = analysed(*[probed(y, {"a": y})] * 7, draws=99)
    assert records[0]["too_few_permutations"] and records[0]["permutations"] == 100
    assert records[0]["outcome"] == CHANCE
    lines = told.lines({"analysis": {"also": section_of(records)}})
    assert (
        "For 7 columns together no accuracy can be significant by 100 permutations: name fewer columns." in lines
        and "test LoRAs" not in " ".join(lines)
        and faults(" ".join(lines)) == []
    )


def test_few_test_loras_and_many_columns_are_both_told_as_the_cause():
    y = np.tile([0, 1], 20)  # of eight test LoRAs all are right in one of 70 permutations
    few = probed(y, {"a": y}, parts=(0.6, 0.2))
    (alone,), together = tell([few], 0, 300, 2000), tell([few] * 5, 0, 300, 2000)
    assert alone["outcome"] != CHANCE and together[0]["outcome"] == CHANCE
    said = " ".join(told.lines({"analysis": {"also": section_of(together)}}))
    assert "(100.0 %; by 8 test LoRAs for 5 columns together even 100 % would be)" in said


def test_of_one_reason_twenty_columns_are_listed_and_the_others_counted():
    left_out = {f"c{i}": "one value" for i in range(30)} | {f"d{i}": f"{i + 51} values" for i in range(40)}
    section = section_of([], left_out)
    assert len(section["left_out"]) == 60 and section["left_out_more"] == [{"reason": "one value", "columns": 10}]
    said = told.lines({"analysis": {"also": section}})[-1]
    assert said.startswith("Left out: c0, c1, ") and " and 22 more (one value); d0 (51 values); " in said
    assert said.endswith("; 29 more for other reasons.")


def test_a_column_that_the_concept_tells_is_not_beyond_it():
    concept = np.tile([0, 1, 2, 3], 50)
    y, other = concept // 2, np.tile([0, 0, 0, 0, 1, 1, 1, 1], 25)
    through, beyond = analysed(probed(y, {"a": y}, concept), probed(other, {"a": other}, concept))
    assert (through["outcome"], beyond["outcome"]) == (THROUGH, BEYOND)
    assert through["from_concept"]["accuracy"] == 1 and through["beyond_concept"]["difference"] == 0
    assert beyond["beyond_concept"]["significant"]


def test_a_guess_among_the_values_of_the_concept_is_not_beyond_it():
    """Of values of equal numbers the commonest of the train LoRAs is the rarest of the test LoRAs."""
    generator, claimed, surpassed = np.random.default_rng(4), 0, 0
    for simulation in range(40):
        y = generator.permutation(np.repeat(np.arange(20), 10))  # five values of each of four concepts
        concept = y // 5
        column = probed(y, {f"r{i}": 5 * concept + generator.integers(0, 5, 200) for i in range(3)}, concept)
        (record,) = tell([column], simulation, 50, 199)
        claimed += record["outcome"] == BEYOND
        best = max(entry["accuracy"] for entry in record["representations"])
        surpassed += best > record["from_concept"]["accuracy"]
    assert surpassed > 30 and claimed <= 7  # of 40 at 5 % more than 7 have a probability below 0.001


def test_nothing_beyond_the_concept_is_claimed_of_groups_that_several_concepts_share():
    y = np.tile([0, 0, 1, 1], 50)
    column = probed(y, {"a": y}, np.tile([0, 1], 100), groups=np.arange(200) // 2)
    (record,) = analysed(column)
    assert record["outcome"] == THROUGH and record["beyond_concept"] is None
    section = {"columns": [record], "left_out": [], "left_out_more": [], "not_probed": [], "most_train": 2000}
    said = " ".join(told.lines({"analysis": {"also": section}}))
    assert "column (not tested, as groups have LoRAs of several concepts)" in said


def test_values_of_whole_groups_are_permuted_with_their_groups():
    generator, groups = np.random.default_rng(0), np.arange(400) // 40  # ten groups, of which four are tested
    y = (groups % 2).astype(int)
    said = np.where(generator.random(400) < 0.95, y, 1 - y)
    (apart,), (whole,) = analysed(probed(y, {"a": said})), analysed(probed(y, {"a": said}, groups=groups))
    assert apart["outcome"] == BEYOND and whole["outcome"] == CHANCE and whole["units"] == 4
    assert whole["needed"] >= whole["representations"][0]["accuracy"] - 1e-9  # it is what had to be exceeded


def simulated(generator, columns: int, loras: int = 120, representations: int = 5) -> list[Probed]:
    """Columns of two or three values, of unequal sizes, and predictions that know nothing of them but are alike."""
    made = []
    for i in range(columns):
        shares = [0.7, 0.3] if i % 2 else [0.5, 0.3, 0.2]
        y = generator.choice(len(shares), loras, p=shares)
        said = generator.choice(len(shares), loras, p=shares)
        predicted = {
            f"r{r}": np.where(generator.random(loras) < 0.7, said, generator.choice(len(shares), loras))
            for r in range(representations)
        }
        made.append(probed(y, predicted, generator.integers(0, 4, loras), name=f"c{i}", values=["x", "y", "z"]))
    return made


def told_by_chance(simulations: int, columns: int, seed: int) -> int:
    generator = np.random.default_rng(seed)
    drawn = (tell(simulated(generator, columns), i, 50, 199) for i in range(simulations))
    return sum(any(record["outcome"] != CHANCE for record in records) for records in drawn)


def test_columns_of_which_nothing_is_known_are_hardly_ever_told():
    assert told_by_chance(40, columns=2, seed=1) <= 7  # of 40 at 5 % more than 7 have a probability below 0.001


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 4])
def test_columns_are_told_by_chance_in_one_of_twenty_simulations_at_most(columns):
    assert told_by_chance(200, columns, seed=2) <= 21  # of 200 at 5 % more than 21 have a probability below 0.001


# ----------------------------------------------------------------------------------------------------------------------
# A collection in which columns are planted
# ----------------------------------------------------------------------------------------------------------------------


def write_planted(root, per_class: int = 40) -> None:
    """Three classes in the size of one layer, and beside them a column that only singular values tell.

    ``steps``: "many" where the second singular value of each update is a hundredth of the first, at the same norm, and
    as large where "few". ``noise`` is drawn, ``family`` a function of the class, ``loss`` a number of its own.
    """
    generator = np.random.default_rng(0)
    for i in range(3 * per_class):
        tensors, many = lora(modules=2, seed=1000 + i), bool(generator.integers(2))
        names = list(tensors)
        for down, up in zip(names[::2], names[1::2], strict=True):
            for name in (down, up):
                wide = tensors[name] if name == down else tensors[name].T
                q = torch.linalg.qr(wide.T)[0].T  # orthonormal rows
                sigma = torch.tensor([2.0, 0.02] if many else [2**0.5, 2**0.5])
                turned = q * sigma[:, None] if name == up else q
                tensors[name] = turned if name == down else turned.T.contiguous()
        tensors[names[3]] *= 2.0 ** (i % 3)
        fields = {"category_label": f"class {i % 3}", "steps": "many" if many else "few", "index": i}
        fields |= {"noise": int(generator.integers(3)), "family": "a" if i % 3 else "b", "steps_again": int(many)}
        fields |= {"constant": 1, "loss": float(generator.normal()), "concept": 10 * (i % 3)}
        fields |= {"rare": "yes" if i == 1 else "no"} if i % 3 else {}
        write_lora(root / f"{i:03}" / FILE_NAME, tensors, fields)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("collections") / "planted"
    write_planted(root)
    return experiment_on(root, root.parent / "cache", "--top-k=1", f"--representations={','.join(NAMES)}")


def asked(planted, *also, names=NAMES, **changed) -> dict:
    """The section of an experiment whose flags ask for these columns; all without any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "settings", replace(planted.settings, also=also or None, **changed))
        planted.predictions.further.clear()
        return plain(probes.probe_columns(planted, names))


def units_of(planted) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in planted.inputs.description.units.folder.glob("*.npz")}


def test_planted_columns_are_told_and_others_not(planted):
    before = units_of(planted)
    section = asked(planted)
    record = {column["column"]: column for column in section["columns"]}
    assert set(record) == {"steps", "noise", "family"}
    assert {name: column["outcome"] for name, column in record.items()} == {
        "steps": BEYOND, "noise": CHANCE, "family": THROUGH,
    }  # fmt: skip
    by = {entry["representation"]: entry for entry in record["steps"]["representations"]}
    assert list(by) == NAMES and by["update_spectrum"]["accuracy"] == 1 and by["update_spectrum"]["significant"]
    assert by["update_kernel"]["accuracy"] < 0.8 and section["not_probed"] == []
    reasons = {entry["column"]: entry["reason"] for entry in section["left_out"]}
    assert reasons == {
        "category_label": probes.LABEL,
        "concept": probes.LABEL,
        "constant": "one value",
        "rank": "one value",
        "index": "120 values, more than 50",
        "loss": "120 values, more than 50",
        "steps_again": "divided as steps",
        "rare": "fewer than two of its values are among train LoRAs and among test LoRAs",
    }
    # Nothing learned was fitted again: the units there were are untouched, and only probes have joined them.
    after = units_of(planted)
    assert {name: after[name] for name in before} == before
    assert Counter(name.partition("-")[0] for name in after.keys() - before.keys()) == {"probe": len(NAMES)}
    assert any(name.startswith("autoencoder") for name in before)


def test_a_rerun_finds_all_probes_finished(planted, monkeypatch):
    first, before = asked(planted), units_of(planted)
    monkeypatch.setattr(probes, "probe", lambda *_, **__: pytest.fail("trained again"))
    assert asked(planted) == first and units_of(planted) == before


@pytest.mark.parametrize("name", ["flat_vec", "stats", "update_spectrum"])
def test_a_probe_is_the_linear_machine_of_scikit_learn(planted, name):
    inputs, rows = planted.inputs, planted.rows
    (column,) = asked_columns(planted, "noise")
    found = probes.probe(inputs, [0], name, [(column.y, column.train)])
    if name == "flat_vec":
        raw = inputs.extracted.weights(False).read()
        x = standardise(torch.from_numpy(raw), inputs.split.train).numpy()
    else:
        x = standardise(inputs.features(name).flatten(1), inputs.split.train).numpy()
    x = x.astype(np.float64) / np.sqrt(np.square(x[column.train].astype(np.float64)).sum(1).mean())
    machine = SVC(kernel="linear", C=found["c"][0]).fit(x[column.train], column.y[column.train])
    held_out = np.concatenate([rows["validation"], rows["test"]])
    np.testing.assert_array_equal(found["predicted"][0], machine.predict(x[held_out]))


def asked_columns(planted, *names, **changed):
    settings = replace(planted.settings, also=names, **changed)
    like = SimpleNamespace(collection=planted.collection, rows=planted.rows, settings=settings)
    return probes.choose_columns(like)[0]


@pytest.mark.parametrize("name", ["flat_vec", "stats", "vae", "update_attention"])
def test_kernels_are_the_same_in_blocks_of_columns(planted, monkeypatch, name):
    rows = np.concatenate([planted.rows["validation"], planted.rows["test"]])
    train = planted.rows["train"][::2]
    whole = probes.linear_kernel(planted.inputs, name, train, rows)
    assert whole.shape == (len(train) + len(rows), len(train))
    assert np.trace(whole[: len(train)]) / len(train) == pytest.approx(1, rel=1e-5)
    monkeypatch.setattr(probes, "NUMBERS_AT_ONCE", 3 * 120)
    np.testing.assert_allclose(probes.linear_kernel(planted.inputs, name, train, rows), whole, atol=1e-5)


def test_kernels_of_updates_know_no_concept(planted):
    """The kernel of views is not the one that the concept has weighted."""
    train, rows = planted.rows["train"], planted.rows["test"]
    x = next(planted.inputs.modules.kernels("update_views").inputs(np.ones((1, 2), bool)))
    kernel = probes.linear_kernel(planted.inputs, "update_views", train, rows)
    assert np.abs(kernel - np.concatenate([x[train], x[rows]])).max() > 0.01
    x = next(planted.inputs.modules.kernels("update_kernel").inputs(np.ones((1, 2), bool)))
    kernel = probes.linear_kernel(planted.inputs, "update_kernel", train, rows)
    np.testing.assert_allclose(kernel, np.concatenate([x[train], x[rows]]), rtol=1e-6, atol=1e-9)


def test_loras_without_a_value_take_no_part(planted, monkeypatch):
    held_out = planted.planner.held_out
    y = np.where(np.arange(120) % 4 == 0, -1, np.arange(120) % 2).astype(np.int16)
    train = planted.rows["train"][y[planted.rows["train"]] >= 0].astype(np.int32)
    found = probes.probe(planted.inputs, [0, 1], "stats", [(y, train), (np.abs(y), planted.rows["train"])])
    np.testing.assert_array_equal(found["predicted"][0] < 0, y[held_out] < 0)
    assert (found["predicted"][1] >= 0).all() and found["c"].shape == (2,)


def test_many_train_loras_are_taken_evenly_over_the_values(planted, monkeypatch):
    monkeypatch.setattr(probes, "MOST_TRAIN", 31)
    (column,) = asked_columns(planted, "family")
    assert len(column.train) == 31 and np.isin(column.train, planted.rows["train"]).all()
    assert sorted(np.bincount(column.y[column.train])) == [15, 16]
    section = asked(planted, "family", names=["stats"])
    assert section["columns"][0]["trained_on"] == 31 < section["columns"][0]["split_sizes"]["train"]
    assert "on 31 train LoRAs" in " ".join(told.lines({"analysis": {"also": section}}))


def test_many_numbers_are_binned_where_they_are_named(planted):
    (named,) = asked_columns(planted, "loss")
    assert named.bins == 4 and np.ptp(np.bincount(named.y)) <= 1
    (column,) = asked_columns(planted, "loss", label_bins=3)
    assert column.bins == len(column.values) == 3 and np.ptp(np.bincount(column.y)) <= 1
    (steps,) = asked_columns(planted, "steps", label_bins=3)  # few values stay as they are
    assert steps.bins is None and steps.values == ("few", "many")


def test_a_representation_that_fails_loses_no_others(planted, monkeypatch):
    read = probes.features

    def failing(inputs, name):
        if name == "stats":
            raise FloatingPointError("a machine has not converged")
        return read(inputs, name)

    monkeypatch.setattr(probes, "features", failing)
    section = asked(planted, "noise", "steps", names=["stats", "update_spectrum", "update_learned"])
    assert [entry["representation"] for entry in section["columns"][0]["representations"]] == ["update_spectrum"]
    assert {entry["representation"]: entry["reason"] for entry in section["not_probed"]} == {
        "update_learned": "learned from the concept",
        "stats": "a machine has not converged",
    }


def test_columns_beyond_the_hundred_are_left_out_unless_they_are_named(planted, monkeypatch):
    monkeypatch.setattr(probes, "MOST_COLUMNS", 2)
    section = asked(planted, names=["stats"])
    assert [column["column"] for column in section["columns"]] == ["family", "steps"]  # of two values; noise has three
    reasons = {entry["column"]: entry["reason"] for entry in section["left_out"]}
    assert reasons["noise"] == "only 2 of 3 columns are probed unless they are named"
    assert len(asked(planted, "noise", "steps", "family", names=["stats"])["columns"]) == 3
    columns = probes.columns_of(planted.collection)
    own = {"noise": columns["noise"]}  # of a table, and the others of the recipe
    monkeypatch.setattr(probes, "columns_of", lambda collection: columns)
    monkeypatch.setitem(planted.collection.__dict__, "columns", own)
    assert [column["column"] for column in asked(planted, names=["stats"])["columns"]] == ["family", "noise"]


def test_a_probe_that_fails_loses_no_other_columns(planted, monkeypatch):
    classify = probes.classify

    def failing(kernel, y, rows, num_classes):
        if num_classes == 3:  # noise
            raise FloatingPointError("a support vector machine has not converged in 5 iterations")
        return classify(kernel, y, rows, num_classes)

    def failing_by_stats(inputs, name, train, others):
        monkeypatch.setattr(probes, "classify", failing if name == "stats" or everywhere else classify)
        return kernel_of(inputs, name, train, others)

    kernel_of, everywhere = probes.linear_kernel, False
    monkeypatch.setattr(probes, "linear_kernel", failing_by_stats)
    monkeypatch.setattr(planted.inputs.description.units, "common", {"failing": 1})
    section = asked(planted, "noise", "steps", names=["stats", "update_spectrum"])
    noise, steps = section["columns"]
    reason = "a support vector machine has not converged in 5 iterations"
    assert noise["failed"] == [{"representation": "stats", "reason": reason}] and steps["failed"] == []
    assert [entry["representation"] for entry in noise["representations"]] == ["update_spectrum"]
    assert [entry["representation"] for entry in steps["representations"]] == ["stats", "update_spectrum"]
    results = {"analysis": {"also": section}}
    assert f"Without a probe: stats of noise ({reason})." in told.lines(results)
    assert told.tables(results)["other columns by representation 1"].rows[-3][1] == ""  # stats, met second
    everywhere = True
    monkeypatch.setattr(planted.inputs.description.units, "common", {"failing": 2})
    section = asked(planted, "noise", "steps", names=["stats", "update_spectrum"])
    assert [column["column"] for column in section["columns"]] == ["steps"]
    assert section["left_out"] == [{"column": "noise", "reason": "no representation could be probed"}]
    section = asked(planted, "noise", names=["stats", "update_spectrum"])
    assert {entry["representation"]: entry["reason"] for entry in section["not_probed"]} == {
        "stats": reason,
        "update_spectrum": reason,
    }


def test_columns_are_left_out_where_no_representation_is_probed(planted):
    section = asked(planted, "noise", names=["update_learned"])
    assert section["columns"] == [] and section["not_probed"][0]["representation"] == "update_learned"
    assert section["left_out"] == [{"column": "noise", "reason": "no representation could be probed"}]


def test_predictions_are_kept_with_their_rows(planted):
    section = asked(planted, "steps", "family")
    further = planted.predictions.further
    assert undocumented_arrays({name: (array.dtype.kind, array.ndim) for name, array in further.items()}) == []
    for i, column in enumerate(section["columns"]):
        rows, y = further[f"also/{i}/rows"], further[f"also/{i}/y"]
        test = np.isin(rows, planted.rows["test"])
        assert len(rows) == column["split_sizes"]["validation"] + column["split_sizes"]["test"]
        for entry in column["representations"]:
            predicted = further[f"also/{i}/{entry['representation']}/predicted"]
            assert (predicted == y)[test].mean() == pytest.approx(entry["accuracy"])


# ----------------------------------------------------------------------------------------------------------------------
# Flags, sentences, a whole run
# ----------------------------------------------------------------------------------------------------------------------


def test_all_columns_are_probed_by_default_with_all_controls_alone():
    def also(*flags):
        return resolve(ablation_experiment.parse_arguments([*flags, "--device=cpu"]), NARROW).also

    assert also("--controls=all") is None and also() == also("--controls=basic") == ()
    assert also("--also=all") is None and also("--controls=all", "--also=none") == ()
    assert also("--also=b,a,b") == ("b", "a")


def test_nothing_is_said_where_it_is_not_asked_for(planted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "settings", replace(planted.settings, also=()))
        assert probes.probe_columns(planted, NAMES) is None
    for results in ({}, {"analysis": None}, {"analysis": {"also": None}}):
        assert told.lines(results) == [] and told.tables(results) == {}


def test_sentences_tell_each_outcome_and_what_is_left_out(planted):
    results = {"analysis": {"also": asked(planted, names=[*NAMES, "update_frozen"])}}
    lines = told.lines(results)
    said = unwrapped(" ".join(lines))
    assert (
        lines[0].startswith("The weights tell 2 of the 3 other columns tried: steps by ") and "; family by " in lines[0]
    )
    assert "Perhaps known only through the concept: family (" in said
    assert " % with values permuted within each concept, p = " in said
    assert "Indistinguishable from permuted values: noise (" in said and " % would not be)." in said
    assert "Left out: " in said and "loss (120 values, more than 50)" in said
    assert "Without a probe: update_frozen (reads the features of update_sketch)." in said
    assert all(line[0].isupper() and line.endswith(".") for line in lines) and faults(said) == []
    summary, wide = told.tables(results).values()
    assert [row[0] for row in summary.rows] == wide.columns[1:] and len(wide.rows) == len(NAMES) + 2
    assert all(len(row) == len(table.columns) for table in (summary, wide) for row in table.rows)


def test_columns_that_are_not_told_are_named_with_what_they_would_need(planted):
    lines = told.lines({"analysis": {"also": asked(planted, "noise")}})
    assert lines[0] == "The weights tell none of the other columns that were tried: noise."
    (line, *_) = told.lines({"analysis": {"also": asked(planted, "family")}})
    assert line.startswith("The weights tell family by ") and line.endswith("by always guessing its commonest value.")
    few = analysed(probed(np.tile([0, 1], 10), {"a": np.tile([0, 1], 10)}, parts=(0.6, 0.2)))
    section = {"columns": few, "left_out": [], "left_out_more": [], "not_probed": [], "most_train": 2000}
    said = " ".join(told.lines({"analysis": {"also": section}}))
    assert few[0]["outcome"] == CHANCE and few[0]["needed"] >= 1
    assert "column (100.0 %; by 4 test LoRAs even 100 % would be)" in said


def test_nothing_can_be_said_of_columns_that_divide_nothing(planted):
    section = asked(planted, "constant")
    assert section["columns"] == [] and told.tables({"analysis": {"also": section}}) == {}
    lines = told.lines({"analysis": {"also": section}})
    assert lines[0] == "No other column of these LoRAs was tried." and len(lines) == 2


def test_a_whole_run_probes_and_its_rerun_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # no worker processes
    write_planted(tmp_path / "loras", per_class=20)
    flags = [f"--dataset={tmp_path / 'loras'}", f"--output-dir={tmp_path / 'out'}", "--quick", "--device=cpu"]
    flags += ["--top-k=1", "--representations=stats,update_kernel", "--also=noise,steps"]
    with quick_runs():
        assert ablation_experiment.main(flags, NARROW) == 0
    printed = capsys.readouterr().out
    assert "Further questions" in printed and "The weights tell " in printed
    folder = tmp_path / "out" / "ablation_loras"
    results = json.loads((folder / "results.json").read_text())
    assert check_schema(results) == [] and results["config"]["also"] == ["noise", "steps"]
    assert [column["column"] for column in results["analysis"]["also"]["columns"]] == ["noise", "steps"]
    with np.load(folder / "predictions.npz") as arrays:
        assert undocumented_arrays({name: (arrays[name].dtype.kind, arrays[name].ndim) for name in arrays}) == []
        assert "also/1/stats/predicted" in arrays
    assert "What else the weights tell" in (folder / "results.txt").read_text()
    assert "What else the weights tell" in (folder / "report.html").read_text()
    assert ablation_experiment.main(flags, NARROW) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert ablation_experiment.main([*flags[:-1], "--also=nosie"], NARROW) == 2
    assert "error: --also nosie: no LoRA has such a column." in capsys.readouterr().err
