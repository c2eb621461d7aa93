"""Steps of the training: which files are which, from which step on a planted class is there, and in which form."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from making import FILE_NAME, NARROW, lora, module_names, write_lora
from test_checkpoints import PEFT, trainers_folders
from test_house import check_schema, undocumented_arrays

import ablation_experiment
from ablation_experiment import main
from analysis import dynamics
from analysis.dynamics import Curve, Followed, Modules, analyse_steps, onset, rise
from analysis.questions import plain
from data import index_as_asked, index_collection
from experiment import datasets
from experiment.dynamics import FINAL, UnfollowedError, choose_steps, follow_steps, places_of, trainings_of
from experiment.engine import Engine
from experiment.extraction import extract
from experiment.phases import Experiment
from experiment.settings import resolve
from loras import digits_zoo
from loras.flags import OF_INDEX
from report import figures
from report.dynamics import finding, lines, tables

CLASSES, STEPS = 3, (1, 2, 4, 8)


def planted_steps(root, *, told=lambda step, label: label, steps=STEPS, each=20, modules=2, lacking=()):
    """<class>/<lora>/checkpoint-<step>: module 1 has the update of the class ``told`` beside noise, None for none."""
    names = module_names(modules)
    of_class = [lora(modules, rank=1, seed=900 + c) for c in range(CLASSES)]
    for c in range(CLASSES):
        for i in range(each):
            for s, step in enumerate(steps):
                if (c, i, step) in lacking:
                    continue
                tensors = lora(modules, seed=10_000 * c + 100 * i + s)
                shown = told(step, c)
                for role in ("down", "up") if shown is not None else ():
                    key, axis = f"{names[1]}.lora.{role}.weight", 0 if role == "down" else 1
                    tensors[key] = torch.cat([0.3 * tensors[key], 3 * of_class[shown][key]], axis)
                for key in tensors:  # ranks are alike
                    axis = 0 if ".down." in key else 1
                    if tensors[key].shape[axis] == 2:
                        tensors[key] = torch.cat([tensors[key], 0 * tensors[key].narrow(axis, 0, 1)], axis)
                write_lora(root / f"class_{c}" / f"{i:02}" / f"checkpoint-{step}" / FILE_NAME, tensors)
    return root


def experiment_on(root, cache, *flags):
    """An experiment of which no phase is done."""
    args = ablation_experiment.parse_arguments(
        [
            "--dataset",
            str(root),
            "--device=cpu",
            "--quick",
            "--num-runs=1",
            "--representations=stats,update_views",
            "--top-k=1",
            *flags,
        ]
    )
    settings, progress = resolve(args, NARROW), ablation_experiment.Progress(False)
    collection = index_as_asked(args, root, root.name, progress)
    engine = Engine(settings.devices)
    plan = ablation_experiment.make_plan(settings, collection, engine, cache)
    extracted = extract(collection, plan.needed, cache, settings.device)
    return Experiment(settings, collection, plan.selected, plan.rows, extracted, engine, progress)


def followed(root, *flags, names=("stats", "update_views")) -> dict:
    """The section of results.json, which strict JSON gives back as it is."""
    section = plain(follow_steps(experiment_on(root, root.parent / "cache", *flags), names))
    assert json.loads(json.dumps(section, allow_nan=False)) == section
    return section


def onsets(section: dict, how: str = "each") -> list[str | None]:
    return [record[how]["onset"] for record in section["modules"]["records"]]


# ----------------------------------------------------------------------------------------------------------------------
# What is found
# ----------------------------------------------------------------------------------------------------------------------


def test_a_class_that_one_module_has_from_a_step_on_is_found_there(tmp_path):
    root = planted_steps(tmp_path / "zoo", told=lambda step, label: label if step >= 4 else None)
    section = followed(root, "--step=all")
    assert section["steps"] == ["1", "2", "4", "8"] and section["places"] == [0, 1, 2, 3]
    assert section["loras"] == {"followed": 60, "left_out": 0, "trained": 42, "tested": 12}
    views = section["representations"]["update_views"]
    assert views["each"]["onset"] == views["last"]["onset"] == "4"
    assert [point["above"] for point in views["each"]["points"]] == [False, False, True, True]
    assert onsets(section) == onsets(section, "last") == [None, "4"]
    assert section["modules"]["each"]["above"] == [0, 0, 1, 1]
    assert section["modules"]["earliest"]["step"] == "4" and len(section["modules"]["earliest"]["modules"]) == 1


def test_without_a_class_there_is_no_onset(tmp_path):
    section = followed(planted_steps(tmp_path / "zoo", told=lambda *_: None), "--step=all")
    curves = [curve[how] for curve in section["representations"].values() for how in ("each", "last")]
    assert [curve["onset"] for curve in curves] == 4 * [None] and onsets(section) == [None, None]
    assert section["modules"]["earliest"] is None
    assert [contrast["earlier"] for contrast in section["modules"]["contrasts"]] == [None]
    told = " ".join(lines(of_results(section)))
    assert "By update_views the concept is indistinguishable from permuted labels at step 8" in told
    assert "Which rise earlier is undecided of" in told


def test_a_class_that_looks_otherwise_at_first_is_there_in_another_form(tmp_path):
    root = planted_steps(tmp_path / "zoo", told=lambda step, label: (label + (step < 4)) % CLASSES)
    section = followed(root, "--step=all")
    views = section["representations"]["update_views"]
    assert views["each"]["onset"] == "1" and views["last"]["onset"] == "4"
    assert max(point["accuracy"] for point in views["last"]["points"][:2]) < 0.2
    found = {record["step"]: record["significant"] for record in views["form"]}
    assert found == {"1": True, "2": True, "4": False}
    assert "significantly more at steps 1 and 2" in " ".join(lines(of_results(section)))


def test_loras_that_lack_a_step_are_left_out(tmp_path):
    lacking = {(c, i, 2) for c in range(CLASSES) for i in range(3)} | {(0, i, 1) for i in range(2)}
    section = followed(planted_steps(tmp_path / "zoo", steps=(1, 2), lacking=lacking), "--step=all")
    assert section["steps"] == ["1", "2"]
    assert section["loras"]["followed"] == 51 and section["loras"]["left_out"] == 7  # two have neither step


def test_a_collection_without_steps_gives_nothing_and_costs_nothing(tmp_path, monkeypatch):
    root = planted_steps(tmp_path / "zoo", each=4)
    experiment = experiment_on(root, tmp_path / "cache")  # --step final
    monkeypatch.setattr(experiment, "again", None)
    monkeypatch.setattr(experiment.inputs, "release", None)
    assert follow_steps(experiment, ["stats"]) is None
    assert lines({"analysis": {"dynamics": None}}) == [] and tables({"analysis": {"dynamics": None}}) == {}


def test_the_same_seed_gives_the_same_and_a_kernel_that_was_not_run_is_not_trained(tmp_path):
    root = planted_steps(tmp_path / "zoo", steps=(1, 2), each=8)
    assert followed(root, "--step=all") == followed(root, "--step=all")
    section = followed(root, "--step=all", names=["stats"])
    assert list(section["representations"]) == ["stats"] and section["modules"] is None
    assert section["modules_why"] == "neither update_views nor update_kernel was run"


def test_validation_loras_without_a_class_and_no_kernel_are_told_in_words(tmp_path):
    root = planted_steps(tmp_path / "zoo", told=lambda step, label: label if step > 1 else None, steps=(1, 2), each=10)
    experiment = experiment_on(root, tmp_path / "cache", "--step=all")
    y, validation = experiment.collection.y, experiment.rows["validation"]
    experiment.rows["validation"] = validation[y[validation] > 0]
    section = plain(follow_steps(experiment, ["stats", "update_views"]))
    assert section["answerable"] and section["representations"]["update_views"]["each"]["onset"] == "2"
    section = plain(follow_steps(experiment, ["stats"]))
    assert "Single modules were not trained: neither update_views nor update_kernel was run." in lines(
        of_results(section)
    )
    assert list(tables(of_results(section))) == ["dynamics"] and finding(of_results(section)).startswith(
        "stats is above chance "
    )
    shown = figures.finished_figures(of_results(section), {"dynamics": finding(of_results(section))})
    assert [name for name, *_ in shown] == ["dynamics"]


# ----------------------------------------------------------------------------------------------------------------------
# Which files are which steps
# ----------------------------------------------------------------------------------------------------------------------


def test_the_steps_that_are_compared():
    whole = {str(i): dict.fromkeys((1, 2, 4), 0) for i in range(4)}
    assert choose_steps(whole) == [1, 2, 4]
    assert choose_steps(whole | {"4": {3: 0}}) == [1, 2, 4]  # 3 is of one in five
    halves = {str(i): dict.fromkeys((1, 2, 4) if i % 2 else (1, 3, 4), 0) for i in range(4)}
    assert choose_steps(halves) == [1, 3, 4]  # no LoRA has both 2 and 3
    many = {str(i): dict.fromkeys(range(100, 10_001, 100), 0) for i in range(3)}
    steps = choose_steps(many)
    assert len(steps) <= 12 and (steps[0], steps[-1]) == (100, 10_000)
    assert np.diff(places_of(steps)).max() < 1.1


def test_places_of_steps_without_a_number_or_logarithm():
    assert places_of([0, 2, 8]).tolist() == [0, 1, 3]
    assert places_of([4, FINAL]).tolist() == [2, 3]
    assert places_of([0, FINAL]).tolist() == [0, 1]


def test_folders_of_checkpoints_and_a_final_adapter(tmp_path):
    root = trainers_folders(tmp_path / "own", "checkpoint-9", "checkpoint-10", each=2)
    trainings = trainings_of(index_collection(root, step="all"))
    assert list(trainings) == ["cat/00", "cat/01", "dog/00", "dog/01"]
    paths = [file.path for file in index_collection(root, step="all").files]
    named = {step: paths[row].removeprefix("cat/00/") for step, row in trainings["cat/00"].items()}
    assert named == {9: f"checkpoint-9/{PEFT}", 10: f"checkpoint-10/{PEFT}", FINAL: PEFT}
    assert trainings_of(index_collection(root)) == {}


def flat_table(root, *columns, split=False, steps=(10, 20)):
    """Files in one folder a LoRA, or in one for each class, and a table with their steps."""
    root.mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for c in range(CLASSES):
        for i in range(8):
            for step in steps:
                name = (
                    f"{'abc'[c]}/{generator.integers(10**9)}.safetensors" if split else f"l{c}_{i}/at{step}.safetensors"
                )
                write_lora(root / name, lora(2, seed=1000 * c + 10 * i + step))
                rows.append({"file_name": name, "label": "abc"[c], "step": step, "lora": f"{c}-{i}"})
    with open(root / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "label", "step", *columns], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return root


def test_files_that_a_table_tells_apart(tmp_path):
    of_folders = flat_table(tmp_path / "folders")
    experiment = experiment_on(of_folders, tmp_path / "cache", "--representations=stats")
    trainings = trainings_of(experiment.collection)
    assert len(trainings) == 24 and {tuple(rows) for rows in trainings.values()} == {(10, 20)}
    together = flat_table(tmp_path / "together", "lora", split=True)
    flags = ("--representations=stats", "--group-column=lora")
    section = plain(follow_steps(experiment_on(together, tmp_path / "cache", *flags), ["stats"]))
    assert section["answerable"] and section["steps"] == ["10", "20"] and section["loras"]["followed"] == 24


def test_steps_that_cannot_be_compared_are_said_to_be_so(tmp_path):
    apart = flat_table(tmp_path / "apart", "lora", split=True)
    section = plain(follow_steps(experiment_on(apart, tmp_path / "cache", "--representations=stats"), ["stats"]))
    assert not section["answerable"] and "several sides of the split" in section["why"]
    (line,) = lines(of_results(section))
    assert line.endswith("Keep those of a LoRA together: --group-column names its column.")
    assert finding(of_results(section)) is None and tables(of_results(section)) == {}
    unknown = flat_table(tmp_path / "unknown", split=True)
    section = plain(follow_steps(experiment_on(unknown, tmp_path / "cache", "--representations=stats"), ["stats"]))
    assert not section["answerable"] and " of one LoRA. Name each file's LoRA in a column lora" in section["why"]
    assert section["why"].startswith("a holds all files of the class a, ")
    same = flat_table(tmp_path / "same", split=True, steps=(20,))  # of how many steps each LoRA is, and no more
    assert follow_steps(experiment_on(same, tmp_path / "cache", "--representations=stats"), ["stats"]) is None


def listed_files(**steps_of):
    """A collection as `trainings_of` reads it: files by path with their label, and columns of its table."""
    files = [SimpleNamespace(path=path, label=label) for path, (label, _) in steps_of["files"].items()]
    classes = sorted({file.label for file in files})
    steps = {path: step for path, (_, step) in steps_of["files"].items()}
    return SimpleNamespace(
        choice=SimpleNamespace(groups={}),
        table=SimpleNamespace(columns=["step"]),
        columns={"step": steps} | steps_of.get("columns", {}),
        files=files,
        classes=classes,
        y=np.array([classes.index(file.label) for file in files]),
    )


def test_a_folder_of_a_class_is_not_one_lora():
    """Steps that never occur twice in a folder do not make its files steps of one training."""
    flat = {f"{label}/{i}.safetensors": (label, str(100 * i)) for label in "ab" for i in range(1, 5)}
    with pytest.raises(UnfollowedError, match=r"^a holds all files of the class a, .* in a column lora of the table"):
        trainings_of(listed_files(files=flat))
    together = {f"{label}{i}.safetensors": (label, str(i + 10 * (label == "b"))) for label in "ab" for i in (1, 2)}
    with pytest.raises(UnfollowedError, match=r"^the collection's own folder holds files of several labels, "):
        trainings_of(listed_files(files=together))
    named = {"lora": {path: path[:3] if path[2] in "12" else f"{path[0]}/x" for path in flat}}
    assert list(trainings_of(listed_files(files=flat, columns=named))) == ["a/1", "a/2", "a/x", "b/1", "b/2", "b/x"]
    own = {f"{label}/{i}/{s}.safetensors": (label, str(s)) for label in "ab" for i in (1, 2) for s in (5, 10)}
    assert {tuple(steps) for steps in trainings_of(listed_files(files=own)).values()} == {(5, 10)}


# ----------------------------------------------------------------------------------------------------------------------
# The numbers
# ----------------------------------------------------------------------------------------------------------------------


def test_onsets_and_rises_by_hand():
    steps = ["1", "2", "4"]
    above = [[True, True, True], [False, True, True], [True, False, True], [True, True, False]]
    assert [onset(steps, np.array(of_module)) for of_module in above] == ["1", "2", "4", None]
    assert rise(np.array([[0.0, 0.0, 0.8], [0.8, 0.8, 0.8]]), np.array([0.0, 1.0, 3.0])).tolist() == [2, 0]


def planted_modules(early: float, late: float, seed: int = 0, tested: int = 80) -> Followed:
    """Eight modules of two attentions, which recognise half as much again at the first of three steps as planted."""
    generator = np.random.default_rng(seed)
    truth, shares = np.arange(tested) % 4, np.repeat([early, late], 4)
    right = np.stack([shares, (shares + 0.8) / 2, np.full(8, 0.8)])  # (S, P)
    known = generator.random((3, 8, tested)) < right[..., None]
    predicted = np.where(known, truth, generator.integers(0, 4, known.shape))
    attentions = [*4 * ["attn1"], *4 * ["attn2"]]
    projections = 2 * [*2 * ["k"], *2 * ["q"]]
    modules = Modules(
        "update_views", [f"m{p}" for p in range(8)], 8 * [""], attentions, projections, Curve(predicted, predicted)
    )
    whole = Curve(predicted[:, :2], predicted[:, :2])
    counts = {"followed": 400, "left_out": 0, "trained": 280, "tested": tested}
    how = {
        "steps": ["1", "2", "4"],
        "places": np.arange(3.0),
        "left_out": [],
        "counts": counts,
        "classes": list("abcd"),
    }
    return Followed(**how, truth=truth, groups=np.arange(tested), curves={"stats": whole}, modules=modules)


@pytest.fixture
def fewer_draws(monkeypatch):
    monkeypatch.setattr(dynamics, "RESAMPLES", 2000)
    monkeypatch.setattr(dynamics, "PERMUTATIONS", 2000)


def test_a_group_of_modules_that_rises_earlier_is_found_and_none_where_they_rise_alike(fewer_draws):
    found = analyse_steps(planted_modules(0.6, 0.1), 0)["modules"]["contrasts"]
    assert [contrast["of"] for contrast in found] == ["attention", "depth", "projection"]
    assert [contrast["earlier"] for contrast in found] == ["attn1", "the first modules", None]
    low, high = found[0]["interval"]
    assert low < -0.5 / 0.8 < high  # of the difference of shares half counts at the first step, all of half at the next
    alike = analyse_steps(planted_modules(0.3, 0.3), 0)["modules"]["contrasts"]
    assert [contrast["earlier"] for contrast in alike] == [None, None, None]


@pytest.mark.parametrize(
    ("tested", "late", "why"),
    [(9, 2, "only 9 test LoRAs or groups of them"), (20, 1, "all test LoRAs are alike"), (20, 0, "all test LoRAs are")],
)
def test_no_interval_of_rises_where_draws_know_none(tested, late, why):
    """The first modules know every LoRA from the first step on, the second ones from the step ``late`` on."""
    known = np.arange(3)[:, None, None] >= np.repeat([0, late], 2)[:, None]
    followed = planted_modules(0.6, 0.1, tested=tested)
    predicted = np.where(np.broadcast_to(known, (3, 4, tested)), followed.truth, (followed.truth + 1) % 4)
    modules = Modules("update_views", list("klmn"), 4 * [""], 4 * [""], 4 * [""], Curve(predicted, predicted))
    section = plain(analyse_steps(replace(followed, modules=modules), 0))
    (contrast,) = section["modules"]["contrasts"]
    assert contrast["interval"] is None and contrast["earlier"] is None and not contrast["significant"]
    assert contrast["why"].startswith(why) and contrast["difference"] is not None
    assert f"the first modules and the last modules ({why}" in " ".join(lines(of_results(section)))


def test_intervals_of_rises_hold(fewer_draws, monkeypatch):
    monkeypatch.setattr(dynamics, "RESAMPLES", 500)
    monkeypatch.setattr(dynamics, "PERMUTATIONS", 100)
    monkeypatch.setattr(dynamics, "LEAST_DRAWS", 100)
    wrong = 0
    for seed in range(60):
        wrong += any(
            c["significant"] for c in analyse_steps(planted_modules(0.3, 0.3, seed, 40), seed)["modules"]["contrasts"]
        )
    assert wrong <= 8  # of 60, where 5 % are 3


# ----------------------------------------------------------------------------------------------------------------------
# The program, the figure and the digits
# ----------------------------------------------------------------------------------------------------------------------


def of_results(section: dict) -> dict:
    """The least of results.json that the report reads."""
    config = {"quick": False}
    return {"analysis": {"dynamics": section}, "config": config, "figures": {"style": "report"}, "top_layers": []}


def test_the_program_writes_what_the_documents_say(tmp_path, capsys, one_core):
    planted_steps(tmp_path / "zoo", told=lambda step, label: label if step >= 2 else None, steps=(1, 2), each=10)
    flags = [
        "--step=all",
        "--quick",
        "--num-runs=1",
        "--top-k=1",
        "--representations=stats,update_views",
        "--device=cpu",
    ]
    assert main(["--dataset", str(tmp_path / "zoo"), "--output-dir", str(tmp_path / "out"), *flags], NARROW) == 0
    folder = tmp_path / "out" / "ablation_zoo"
    results = json.loads((folder / "results.json").read_text())
    assert check_schema(results) == [] and results["analysis"]["controls_not_run"] == {}
    arrays = np.load(folder / "predictions.npz")
    assert undocumented_arrays({name: (array.dtype.kind, array.ndim) for name, array in arrays.items()}) == []
    section = results["analysis"]["dynamics"]
    hits = arrays["dynamics/update_views/each"] == results_truth(folder, results, arrays["dynamics/rows"])[:, None]
    points = section["representations"]["update_views"]["each"]["points"]
    assert [point["accuracy"] for point in points] == pytest.approx(hits.mean((1, 2)).tolist())
    assert lines(results)[0] in " ".join(capsys.readouterr().out.split())
    assert "Accuracy by step of the training" in (folder / "results.txt").read_text()
    assert "Modules by their onset" in (folder / "report.html").read_text()
    for style in ("report", "paper"):
        shown = results | {"figures": {"style": style}}
        drawn = [figure for _, _, figure in figures.finished_figures(shown, {"dynamics": finding(results)})]
        assert len(drawn) == 1 and len(drawn[0].axes) >= 3


def results_truth(folder, results: dict, rows: np.ndarray) -> np.ndarray:
    """The classes of rows of samples.csv."""
    with open(folder / "samples.csv", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    return np.array([results["dataset"]["classes"].index(label) for label in labels])[rows]


@pytest.fixture
def short(monkeypatch):
    """The digits with fewer steps and smaller stacks."""
    settings = {"BASE_STEPS": 4, "BASE_BATCH": 16, "LORA_STEPS": 3, "LORA_BATCH": 3, "STACK": 4, "PROGRESS_EVERY": 3}
    for name, value in settings.items():
        monkeypatch.setattr(digits_zoo, name, value)


def test_the_digits_at_the_last_step_are_those_without_steps(short, tmp_path):
    threads = torch.get_num_threads()
    digits_zoo.build(tmp_path / "plain", 5)
    digits_zoo.build(tmp_path / "steps", 5, steps=(1, 3))
    assert torch.get_num_threads() == threads
    for path in (tmp_path / "plain").glob(f"*/*/{FILE_NAME}"):
        own = tmp_path / "steps" / path.parent.relative_to(tmp_path / "plain")
        assert (own / "checkpoint-3" / FILE_NAME).read_bytes() == path.read_bytes()
        assert (own / "checkpoint-1" / FILE_NAME).read_bytes() != path.read_bytes()
    digits_zoo.build(tmp_path / "steps", 5, steps=(1, 3))  # whole: nothing to do
    with pytest.raises(FileExistsError, match="was built with"):
        digits_zoo.build(tmp_path / "steps", 5, steps=(2, 3))
    with pytest.raises(ValueError, match="steps must ascend"):
        digits_zoo.build(tmp_path / "none", 5, steps=(3, 4))


def test_digits_with_steps_are_continued_and_are_samples_without_a_flag(short, tmp_path, monkeypatch, capsys):
    digits_zoo.build(tmp_path / "whole", 5, steps=(1, 3))

    def stop(stage, done, total, share=None):
        if stage == "LoRAs" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits_zoo.build(tmp_path / "again", 5, steps=(1, 3), progress=stop)
    assert (tmp_path / "again.partial").is_dir() and not (tmp_path / "again").exists()
    digits_zoo.build(tmp_path / "again", 5, steps=(1, 3))
    files = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in tmp_path.glob("[aw]*")
    ]
    assert files[0] == files[1]
    flags = dict.fromkeys(OF_INDEX)
    collection = index_as_asked(SimpleNamespace(**flags), tmp_path / "whole", None, ablation_experiment.Progress(False))
    assert collection.choice.step == "all" and len(collection.files) == 10 and len(np.unique(collection.groups)) == 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(datasets.BUILT_IN_SIZES, "dynamics", 5)
    monkeypatch.setitem(datasets.BUILT_IN_STEPS, "dynamics", (1, 3))
    name, folder = datasets.locate("dynamics", None, ablation_experiment.Progress(False))
    assert "training the built-in digits, 5 LoRAs at 2 steps each, into" in capsys.readouterr().out
    assert name == "dynamics" and (folder / "metadata.csv").is_file() and datasets.is_built_in(folder)
    assert {file.label for file in collection.files} == {"0", "1", "2", "3", "4"}
    assert {tuple(rows) for rows in trainings_of(collection).values()} == {(1, 3)}
