"""What fails after the phases is noted and costs nothing that was finished; mistakes of the program show themselves."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from making import NARROW, planted_collection, quick_runs

import ablation_experiment
from ablation_experiment import attempt_figure, main
from analysis import comparison, questions
from experiment import controls, store
from experiment.plans import TrainingError
from experiment.units import FAILURES, Units
from report import figures
from report.cautions import UNFINISHED

FLAGS = ("--device=cpu", "--quick", "--num-runs=1", "--top-k=1", "--representations=stats", "--controls=basic")
FLAGS += ("--save-models=none",)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """LoRAs with numbers beside their weights that are too large to square, half surrogate pairs and endless digits."""
    root = tmp_path_factory.mktemp("collections") / "planted"
    planted_collection(root, per_class=15, modules=2, informative=(1,))
    for i, path in enumerate(sorted(root.rglob("metadata.json"))):
        fields = {"steps": i % 7, "huge": 1e300 if i == 4 else 0.5 * (i % 5), "far": 1e308 if i % 3 else -1e308}
        fields |= {"digits": 10**400 if i == 3 else i % 4, "half": f"\ud800{i % 4}", "group": f"\udfff{i // 5}"}
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return root


@pytest.fixture(scope="module")
def phases(planted, tmp_path_factory):
    """The folder of a run without controls."""
    out = tmp_path_factory.mktemp("phases")
    with quick_runs():
        assert main(["--dataset", str(planted), "--output-dir", str(out), *FLAGS, "--controls=none"], NARROW) == 0
    return out


@pytest.fixture(scope="module")
def finished(planted, tmp_path_factory):
    """The folder of a run with an analysis."""
    out = tmp_path_factory.mktemp("out")
    assert main(["--dataset", str(planted), "--output-dir", str(out), *FLAGS], NARROW) == 0
    return out


def runner(planted, cache, tmp_path):
    """Return a function that runs with finished units: exit code, results, and results.txt."""
    shutil.copytree(cache / ".cache", tmp_path / "out" / ".cache")

    def run(*flags):
        code = main(["--dataset", str(planted), "--output-dir", str(tmp_path / "out"), *FLAGS, *flags], NARROW)
        return code, *results_in(tmp_path / "out")

    return run


@pytest.fixture
def begin(planted, phases, tmp_path):
    return runner(planted, phases, tmp_path)


@pytest.fixture
def again(planted, finished, tmp_path):
    return runner(planted, finished, tmp_path)


def results_in(out):
    folder = out / "ablation_planted"
    return json.loads((folder / "results.json").read_text()), (folder / "results.txt").read_text()


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def same_results(results) -> dict:
    return {key: value for key, value in results.items() if key not in ("environment", "timing")}


@pytest.mark.slow
def test_numbers_that_cannot_be_squared_and_half_pairs_beside_the_weights_end_no_run(finished):
    results, _ = results_in(finished)
    assert results["analysis"]["controls_not_run"] == {} and results["not_done"] == {}
    assert results["analysis"]["cheap"]["metadata"]["p"] > 0.01 and results["analysis"]["groups"]["unused"] == ["group"]


@pytest.mark.parametrize("error", [AssertionError, pytest.param(ZeroDivisionError, marks=pytest.mark.slow)])
def test_a_mistake_in_the_analysis_shows_itself_and_leaves_the_phases(begin, monkeypatch, tmp_path, error):
    monkeypatch.setattr(ablation_experiment, "analyse", raising(error("mistaken")))
    with pytest.raises(error, match="mistaken"):
        begin()
    results, _ = results_in(tmp_path / "out")
    assert results["not_done"] == {"analysis": UNFINISHED} and results["baseline_results"]


def test_the_phases_are_on_disk_before_the_analysis_and_replaced_by_the_whole(
    begin, phases, monkeypatch, capsys, tmp_path
):
    """The analysis is none here, which takes no time."""
    target = tmp_path / "out" / "ablation_planted"
    monkeypatch.setattr(ablation_experiment, "analyse", raising(KeyboardInterrupt))
    code, begun, text = begin()
    assert code == 130 and begun["analysis"] is None and begun["not_done"] == {"analysis": UNFINISHED}
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert begin()[0] == 130 and {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    for part in ("layer_ranking", "top_layers", "baseline_results", "ablation_results"):
        assert begun[part] == results_in(phases)[0][part]
    assert "Analysis missing: the run ended before it was done, and the same command goes on with it." in text
    assert {path.name for path in target.iterdir()} == {*ablation_experiment.RESULT_FILES}
    monkeypatch.setattr(ablation_experiment, "analyse", lambda *_: None)
    code, done, text = begin()
    assert code == 0 and done["not_done"] == {} and "Analysis missing" not in text
    assert same_results(done) == same_results(begun) | {"not_done": {}}
    assert "Nothing to do" not in capsys.readouterr().out and not (target / "previous").exists()
    assert begin()[0] == 0 and "Nothing to do" in capsys.readouterr().out


def test_what_a_run_had_begun_is_kept_beside_results_of_other_settings(begin, monkeypatch, tmp_path):
    monkeypatch.setattr(ablation_experiment, "analyse", raising(KeyboardInterrupt))
    begin()
    monkeypatch.setattr(ablation_experiment, "analyse", lambda *_: None)
    assert begin("--controls=none")[1]["not_done"] == {}
    kept = tmp_path / "out" / "ablation_planted" / "previous"
    assert [path.name for path in kept.iterdir()] == ["1"]
    assert json.loads((kept / "1" / "results.json").read_text())["not_done"] == {"analysis": UNFINISHED}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Input X contains\ninfinity."), "Input X contains infinity."),
        pytest.param(MemoryError("no room"), "out of memory: no room", marks=pytest.mark.slow),
        pytest.param(OverflowError("big"), "big", marks=pytest.mark.slow),
    ],
)
def test_an_analysis_that_fails_is_told_and_done_again_by_the_same_command(begin, monkeypatch, capsys, error, reason):
    monkeypatch.setattr(ablation_experiment, "analyse", raising(error))
    code, results, text = begin()
    assert code == 3 and results["not_done"] == {"analysis": reason} and results["analysis"] is None
    line = f"Analysis missing: {reason.rstrip('.')}."
    assert line in text and line in capsys.readouterr().out.splitlines()
    monkeypatch.setattr(ablation_experiment, "analyse", lambda *_: None)
    assert begin()[0] == 0


@pytest.mark.slow
def test_the_whole_that_follows_a_stopped_analysis_is_that_of_a_run_to_which_nothing_happened(
    again, finished, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setattr(questions, "analyse", raising(KeyboardInterrupt))
        assert again()[0] == 130
    code, done, text = again()
    whole, whole_text = results_in(finished)
    assert code == 0 and same_results(done) == same_results(whole) and text == whole_text
    names = [{path.name for path in (out / "ablation_planted").iterdir()} for out in (tmp_path / "out", finished)]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "name", "noted"),
    [
        (comparison, "_best_of_two", "cheap explanation by norms"),
        (questions, "null_shuffles", "null shuffles"),
        (questions, "attribution", "attribution"),
        (questions, "grouped_split", "grouped split"),
        (controls, "recipe", "cheap explanation by recipe"),
        (controls, "cross_fitted", "removal of layers that other test LoRAs choose"),
        (controls, "group_columns", "columns of groups"),
        (controls, "train_conditions", "stats"),
        (controls, "samples", "features that coincide"),
    ],
)
def test_a_control_that_fails_is_noted_and_costs_no_other(again, monkeypatch, capsys, place, name, noted):
    monkeypatch.setattr(place, name, raising(np.linalg.LinAlgError("singular matrix")))
    code, results, text = again("--null-shuffles=1")
    assert code == 0 and results["analysis"]["controls_not_run"][noted] == "singular matrix"
    assert len(results["analysis"]["controls_not_run"]) == 1 or name == "_best_of_two"
    assert f"controls: {noted} not run: singular matrix" in capsys.readouterr().out.splitlines()
    assert "singular matrix" in " ".join(text.split())


@pytest.mark.slow
def test_a_mistake_in_a_control_shows_itself(again, monkeypatch):
    monkeypatch.setattr(questions, "attribution", raising(TypeError("mistaken")))
    with pytest.raises(TypeError, match="mistaken"):
        again()


def test_a_figure_that_fails_is_noted_and_costs_no_other(monkeypatch, capsys):
    def drawing(*_):
        return {"one": "first", "two": "second"}

    def finished_figures(_, finding_of, width):
        ((name, finding),) = finding_of.items()
        yield name, finding, raising(ValueError("too\nlarge")) if name == "one" else lambda: b"drawn"

    monkeypatch.setattr(figures, "findings", drawing)
    monkeypatch.setattr(figures, "finished_figures", finished_figures)
    monkeypatch.setattr(figures, "files_of", lambda figure, name, _: {f"{name}.png": figure()})
    not_done: dict[str, str] = {}
    drawn = figures.draw({}, attempt=partial(attempt_figure, not_done))
    assert drawn == {"two.png": b"drawn"} and not_done == {"figure one": "too large"}
    assert capsys.readouterr().out == "Figure one missing: too large.\n"


def test_a_logistic_regression_that_has_not_converged_says_so(monkeypatch, recwarn):
    features = np.random.default_rng(0).standard_normal((200, 30))
    y = (features.sum(1) > 0).astype(int)  # of which a forest of three trees knows little
    rows = {"train": np.arange(120), "validation": np.arange(120, 160), "test": np.arange(160, 200)}
    evidence, forest = SimpleNamespace(seed=0, rows=rows, y=y), comparison.RandomForestClassifier
    monkeypatch.setattr(comparison, "RandomForestClassifier", lambda _, **how: forest(3, **how))
    names = []
    for iterations in (1, 2000):
        monkeypatch.setattr(comparison, "ITERATIONS", iterations)
        names.append(comparison._best_of_two(evidence, features)[0])
    assert names == ["logistic regression, not converged in 1 iterations", "logistic regression"] and not recwarn.list


class Opened:
    """A description of inputs that opens to the device that they are asked for on."""

    def open(self, device):
        return device

    def forget(self, device):
        pass


@pytest.mark.parametrize(
    "error",
    [
        ValueError("The dual coefficients or intercepts are not finite."),  # of LibSVM
        torch.linalg.LinAlgError("svd did not converge"),
        OverflowError("too large"),
    ],
)
def test_a_unit_fails_by_numbers_and_not_by_mistakes(tmp_path, error):
    unit = Units(tmp_path).unit({"kind": "kernel"}, Opened(), raising(error), [1], "kernel")
    assert unit.attempt(torch.device("cpu")).failure == str(error)
    for mistake in (AssertionError("a"), TypeError("b"), store.DamagedError("c"), TrainingError("d")):
        assert not isinstance(mistake, FAILURES)
        with pytest.raises(type(mistake)):
            Units(tmp_path).unit({"kind": "a"}, Opened(), raising(mistake), [1], "a").attempt(torch.device("cpu"))


def removed_meanwhile(planted, tmp_path, monkeypatch, capsys, gone, moment, flags=FLAGS):
    command = ["--dataset", str(planted), "--output-dir", str(tmp_path / "out"), *flags]
    seen, load = [], store.load_arrays

    def removing(*args):
        seen.append(1)
        if len(seen) == moment + 1:
            for path in tmp_path.glob(gone):
                shutil.rmtree(path)
        return load(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store, "load_arrays", removing)
        code = main(command, NARROW)
    error = capsys.readouterr().err.splitlines()
    assert len(seen) > moment and code in (0, 2) and len(error) == (code == 2)
    for line in error:
        assert line.startswith(f"error: {tmp_path}") and line.endswith(
            "The same command continues where this one stopped."
        )
    assert main(command, NARROW) == 0


GONE = ("out", "out/.cache", "out/.cache/*/features", "out/.cache/*/units")


@pytest.mark.parametrize(("gone", "moment"), [("out/.cache/*/units", 3)])
def test_folders_that_are_removed_while_it_is_at_work_end_a_run_in_a_line(
    planted, tmp_path, monkeypatch, capsys, gone, moment
):
    flags = (*FLAGS, "--controls=none")
    removed_meanwhile(planted, tmp_path, monkeypatch, capsys, gone, moment, flags)


@pytest.mark.slow
@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("moment", [0, 5, 25])
def test_folders_that_are_removed_at_any_moment_end_a_run_in_a_line(
    planted, tmp_path, monkeypatch, capsys, gone, moment
):
    removed_meanwhile(planted, tmp_path, monkeypatch, capsys, gone, moment)
