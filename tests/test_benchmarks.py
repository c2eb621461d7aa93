"""The benchmarks' own parts: the collection in Stable Diffusion 1.5's shapes, features compared, truth simulated."""

import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import NARROW
from safetensors.numpy import load_file

FOLDER = Path(__file__).parents[1] / "benchmarks"


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


zoo = module_of("sd15_zoo")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_the_zoo_has_the_layers_of_stable_diffusion(tmp_path):
    zoo.write_zoo(tmp_path / "zoo", 11)
    written = files_of(tmp_path / "zoo")
    assert sorted(written) == sorted(f"{i % 10}/{i:06}.safetensors" for i in range(11))
    layers = load_file(tmp_path / "zoo" / "3" / "000003.safetensors")
    assert len(layers) == 128 and sum(layer.size for layer in layers.values()) == 99_648
    assert {layer.dtype for layer in layers.values()} == {np.dtype(np.float32)}
    for name, shape in {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight": (1, 320),
        "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_v.lora.down.weight": (1, 768),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora.up.weight": (1280, 1),
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_q.lora.up.weight": (320, 1),
    }.items():
        assert layers[name].shape == shape
    blocks = {name.split(".transformer_blocks")[0] for name in layers}
    assert len(blocks) == 16 and not {name for name in blocks if "down_blocks.3" in name or "up_blocks.0" in name}


def test_a_file_of_the_zoo_depends_on_the_seed_and_its_number_only(tmp_path):
    for name, count, seed in (("few", 3, 0), ("more", 12, 0), ("other", 3, 1)):
        zoo.write_zoo(tmp_path / name, count, seed)
    few, more, other = (files_of(tmp_path / name) for name in ("few", "more", "other"))
    assert few.items() <= more.items() and len(set(more.values())) == 12
    assert few.keys() == other.keys() and not set(few.values()) & set(other.values())


def test_the_zoo_leaves_a_folder_with_something_in_it_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        zoo.write_zoo(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_the_zoo_plants_the_class_in_scale_and_direction_of_four_modules_only():
    first, last = ([zoo.draw(10 * i + c) for i in range(12)] for c in (0, 9))

    def deviation(loras, layer):
        return np.exp(np.mean([np.log(lora[layer].std()) for lora in loras]))

    def mean_update(loras, module):
        down, up = (np.stack([lora[f"{module}.lora.{role}.weight"] for lora in loras]) for role in ("down", "up"))
        return sum(u / u.std() @ d / d.std() for d, u in zip(down, up, strict=True)) / len(loras)

    for module in [*zoo.PLANTED, *list(zoo.MODULES)[1::16]]:
        planted = module in zoo.PLANTED
        ratio = deviation(last, f"{module}.lora.up.weight") / deviation(first, f"{module}.lora.up.weight")
        # 24 jitters of 10 %: the mean of their logarithms deviates by 0.04.
        assert math.log(ratio) == pytest.approx(9 * math.log(1.1) if planted else 0, abs=0.17)
        assert deviation(first, f"{module}.lora.down.weight") == pytest.approx(
            (3 * zoo.MODULES[module][0]) ** -0.5, rel=0.1
        )
        # u_c times v with weight 1/4 is left in the mean of 12 updates of unit variance; of the rest, a twelfth is.
        size = np.square(mean_update(first, module)).mean()
        assert size == pytest.approx(1 / 16 + 15 / 16 / 12 if planted else 1 / 12, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "modules", "numbers", "example", "shape"),
    [
        (
            "sdxl",
            722,
            2_659_840,
            "lora_unet_input_blocks_7_1_proj_out.lora_up.weight",
            (1280, 1),
        ),
        ("llama", 64, 425_984, "base_model.model.model.layers.31.self_attn.v_proj.lora_B.weight", (1024, 1)),
    ],
)
def test_the_wide_zoo_has_the_modules_of_the_networks(tmp_path, kind, modules, numbers, example, shape):
    wide = module_of("wide_zoo")
    wide.write_zoo(kind, tmp_path / "zoo", 2, rank=1)
    assert sorted(files_of(tmp_path / "zoo")) == ["concept-0/0000.safetensors", "concept-1/0001.safetensors"]
    layers = load_file(tmp_path / "zoo" / "concept-1" / "0001.safetensors")
    weights = {name: layer for name, layer in layers.items() if name.endswith(".weight")}
    assert len(weights) == 2 * modules and sum(layer.size for layer in weights.values()) == numbers
    assert weights[example].shape == shape and len({layer.dtype for layer in weights.values()}) == 1
    assert len(layers) - len(weights) == (modules if kind == "sdxl" else 0)  # alphas


@pytest.mark.slow
def test_features_are_those_of_the_plain_way_and_the_last_line_is_the_ratio():
    command = [sys.executable, FOLDER / "features.py", "--samples=1", "--repeats=1", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("figure: ") and lines[-2].endswith(" ms/LoRA")
    assert float(lines[-1].removeprefix("ratio: ")) > 1
    assert "largest relative difference" in done.stdout


def test_features_that_differ_are_noticed():
    features = module_of("features")
    theirs = {name: np.ones((1, 2, len(features.REPRESENTATIONS[name].feature_names))) for name in features.NAMES}
    for wrong, expected in ((1.5, 0.5), (math.nan, math.inf)):
        ours = {name: values.copy() for name, values in theirs.items()}
        ours["spectral"][0, 1, 3] = wrong
        assert features.largest_difference(ours, theirs) == (expected, "spectral.sigma_4")


truth = module_of("truth")
TRUTH_ROWS = [row for make in truth.ROWS for row in make()]
SIMULATED = {(row.counts.__name__, str(row.cells[0])): row for row in TRUTH_ROWS}  # rows share simulations


@pytest.mark.parametrize("row", SIMULATED.values(), ids=lambda row: row.name)
def test_a_cell_of_each_kind_of_truth_counts_successes(row):
    counted = truth.shares_of_cell(row.counts, row.cells[0], 2)
    rows = [other for other in TRUTH_ROWS if other.counts is row.counts and other.cells[0] == row.cells[0]]
    assert {row.key for row in rows} <= counted.keys()
    assert all(share in (0, 0.5, 1) and count == 2 for share, count in counted.values())


def test_planted_structures_have_the_verdict_of_their_truth():
    for name, verdict, more in (
        ("one of 64", "localized", {"steepest": 1, "concentration": 0.98}),
        ("a little in each", "distributed", {"steepest": 0.1, "concentration": 0}),
        ("two of ten pairs", "localized", {"steepest": 1, "concentration": 0.7}),
    ):
        evidence, conditions, predicted, left = truth.removal_of(truth.STRUCTURES[name], 1000, np.random.default_rng(0))
        section = truth.robustness(evidence, conditions, predicted)
        fall, concentration = truth.along_the_curve(section, conditions, left)
        assert section["verdict"] == verdict
        assert (fall, concentration) == pytest.approx((more["steepest"], more["concentration"]), abs=0.02)


@pytest.mark.parametrize(
    ("promise", "shares", "broken"),
    [
        (truth.COVERS, [0.95, 0.96], False),
        (truth.COVERS, [1.0, 1.0], True),
        (truth.COVERS, [0.99, 0.86], True),  # right on average, and one cell far below
        (truth.ON_NOTHING, [0.05, 0.06], False),
        (truth.ON_NOTHING, [0.0, 0.07], True),
        (truth.POWER, [0.5, 0.6], True),
        ({}, [0.0, 0.1], False),
    ],
)
def test_a_promise_is_broken_beyond_three_standard_errors(promise, shares, broken):
    row = truth.Row("something", None, [("first",), ("second",)], **promise)
    text, is_broken = truth.line(row, np.array(shares), np.array([2000, 2000]))
    assert is_broken == broken == ("BROKEN" in text)
    worst = shares[0] < shares[1] if row.least else shares[0] > shares[1]
    assert ("first" if worst or shares[0] == shares[1] else "second") in text


def test_the_table_of_truth_is_printed_and_its_exit_code_is_that_of_its_promises(capsys):
    truth.main(["--draws=10", "--processes=1", "--rows=any of"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["percent", "of", "collections", "promised", "measured", "SE", "cells", "worst", "in"]
    names = [row.name for row in TRUTH_ROWS if "any of" in row.name]
    assert len(names) == 3 and all(line.startswith(name) for line, name in zip(lines[2:-1], names, strict=True))
    assert lines[-1].endswith("0 of 3 promises broken by more than 3 SE")
    never = truth.Row("never", lambda cell, generator, collections: iter([False] * collections), [()], **truth.POWER)
    with pytest.raises(SystemExit) as left:
        truth.main(["--draws=10", "--processes=1"], [lambda: [never]])
    assert left.value.code == 1 and "BROKEN" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Planted collections, and what representations and published encoders see of them
# ----------------------------------------------------------------------------------------------------------------------

planted_zoo = module_of("planted_zoo")
regimes = module_of("regimes")


def planted_updates(name, numbers, **changed):
    """Return down float[N, r, width] and up float[N, width, r] of the first module, without noise."""
    planted = replace(planted_zoo.Planted.named(name), noise=0.0, **changed)
    loras, layer = [planted_zoo.draw(i, planted) for i in numbers], f"{planted_zoo.MODULES[0]}.lora"
    return tuple(np.stack([lora[f"{layer}.{role}.weight"] for lora in loras]) for role in ("down", "up"))


def rank_of(rows):
    s = np.linalg.svd(rows, compute_uv=False)
    return int((s > 1e-4 * s[0]).sum())


@pytest.mark.parametrize(("kind", "written", "own"), [("written", 32, False), ("both", 32, True), ("read", 16, True)])
def test_planted_classes_write_and_read_what_their_name_says(kind, written, own):
    numbers = [*range(0, 800, 10), *range(1, 801, 10)]
    down, up = (x.reshape(2, 80, 64) for x in planted_updates(f"{kind}-64-1", numbers))
    assert rank_of(np.concatenate(up)) == written and rank_of(up[0]) == 16
    # One linear map leads from the downs of a class to its ups.
    maps = [np.linalg.lstsq(d[:70], u[:70], rcond=None)[0] for d, u in zip(down, up, strict=True)]
    left = [np.square(d[70:] @ maps[0] - u[70:]).sum() / np.square(u[70:]).sum() for d, u in zip(down, up, strict=True)]
    basis = np.linalg.svd(maps[0])[0][:, :16]  # what the first class reads
    shared = np.square(basis.T @ maps[1]).sum() / np.square(maps[1]).sum()
    assert left[0] < 0.1 < 0.5 < left[1] and (shared < 0.6) == own and (shared > 0.8) != own


def test_planted_pairs_are_permutations_of_their_class():
    down, up = planted_updates("pairs-64-4", range(30))
    largest = np.abs(down).argmax(2), np.abs(up).argmax(1)  # where a factor's largest entry lies, and where it goes
    places: dict[tuple, set] = {}
    for concept, read, written in zip(np.repeat(np.arange(30) % 10, 4), *map(np.ravel, largest), strict=True):
        places.setdefault((concept, read), set()).add(written)
    assert all(len(targets) == 1 for targets in places.values())
    assert len({target for (_, read), targets in places.items() if read == largest[0][0, 0] for target in targets}) > 1


@pytest.mark.parametrize(("carrying", "growth"), [(16, 9 * math.log(1.2)), (0, 0)])
def test_planted_scales_grow_by_class_where_a_module_carries_it(carrying, growth):
    _, up = planted_updates("scale-64-1", range(200), carrying=carrying)
    sizes = np.log(np.linalg.norm(up[:, :, 0], axis=1)).reshape(20, 10).mean(0)
    assert sizes[9] - sizes[0] == pytest.approx(growth, abs=0.3)


def test_planted_collections_have_their_ranks_and_depend_on_name_seed_and_number_only(tmp_path):
    mixed = planted_zoo.Planted.named("both-64-mixed")
    for name, count, seed in (("few", 3, 0), ("more", 12, 0), ("other", 3, 1)):
        planted_zoo.write_zoo(tmp_path / name, count, mixed, seed)
    few, more, other = (files_of(tmp_path / name) for name in ("few", "more", "other"))
    assert few.items() <= more.items() and few.keys() == other.keys() and not set(few.values()) & set(other.values())
    layer = f"{planted_zoo.MODULES[0]}.lora.down.weight"
    assert {len(planted_zoo.draw(i, mixed)[layer]) for i in range(40)} == set(planted_zoo.MIXED)
    with pytest.raises(FileExistsError, match="not empty"):
        planted_zoo.write_zoo(tmp_path / "few", 1, mixed)
    with pytest.raises(ValueError, match="KIND-WIDTH-RANK"):
        planted_zoo.Planted.named("written-640")


def test_a_cell_is_measured_by_the_program_and_the_table_says_what_did_not_run(capsys, tmp_path):
    folder = tmp_path / "zoo"
    planted_zoo.write_zoo(folder, 60, replace(planted_zoo.Planted.named("both-64-mixed"), noise=0.1))
    flags = ["--quick", "--num-runs=1", "--representations=flat_vec,stats,update_kernel"]
    accuracies, seconds = regimes.accuracies_of(folder, flags, networks=NARROW)
    assert math.isnan(accuracies["flat_vec"]) and 0 <= accuracies["stats"] <= 100 and accuracies["update_kernel"] > 40
    assert set(seconds) == {"stats", "update_kernel"} and capsys.readouterr().out == ""
    lines = regimes.table({"both-64-mixed": accuracies, "read-640-1": {"stats": 12.5}}).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["test", "accuracy,", "%", "both", "read"],
        ["width", "64", "640"],
        ["rank", "mixed", "1"],
    ]
    assert lines[3].split() == ["flat_vec", "-", "-"] and lines[4].split()[::2] == ["stats", "12.5"]
    assert "update_kernel" in regimes.summary("both-64-mixed", accuracies, seconds)


def test_the_cells_are_names_of_planted_collections_and_digits():
    assert len(regimes.ALL) == 46 and set(regimes.DEFAULT) <= set(regimes.ALL)
    assert regimes.parse_arguments(["--cells=all"]).cells == regimes.ALL
    with pytest.raises(ValueError, match="KIND-WIDTH-RANK"):
        regimes.parse_arguments(["--cells=digits"])
    narrow, wide = (regimes.names_in(cell, ["vae", "stats"], False) for cell in ("both-64-1", "both-320-1"))
    assert (narrow, wide) == (["vae", "stats"], ["stats"])


@pytest.mark.slow
def test_digits_of_another_width_are_loras_of_rank_one_on_queries_and_values(tmp_path):
    regimes.write_digits(tmp_path, 10, width=16)
    paths = sorted(tmp_path.rglob("*.safetensors"))
    assert len(paths) == 10
    layers = load_file(paths[0])
    assert len(layers) == 32 and {layer.shape for layer in layers.values()} == {(1, 16), (16, 1)}
    assert all(("to_q" in name or "to_v" in name) and np.isfinite(layer).all() for name, layer in layers.items())
    assert any(layer.any() for name, layer in layers.items() if ".up." in name)


peers = module_of("peers")


def a_task(ranks=2, modules=2, wide=6, high=5, count=4):
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(modules, count, ranks, wide, generator=generator)
    up = torch.randn(modules, count, ranks, high, generator=generator)
    y = torch.arange(count) % 2
    return peers.Task(down, up, y, dict.fromkeys(("train", "validation", "test"), torch.arange(count)))


def test_published_encoders_are_what_their_papers_say_of_formed_updates():
    task = a_task()
    x = task.up.mT @ task.down  # (P, B, high, wide)
    torch.manual_seed(0)
    probex, mvprobe = task.made(peers.ProbeX), task.made(peers.MVProbe)
    encoding = torch.zeros(4, peers.ENCODING)
    for m in range(2):
        for probe in range(peers.PROBES):  # M_l relu(Vᵀ X u_l)
            response = (x[m] @ probex.probes[m, :, probe] @ probex.projection[m]).relu()
            encoding += response @ probex.encoder[m, probe :: peers.PROBES]
    expected = probex.head(encoding / 2**0.5)
    torch.testing.assert_close(task.scores(probex, torch.arange(4)), expected, rtol=1e-4, atol=1e-5)
    encoding = torch.zeros(4, peers.ENCODING)
    for m in range(2):
        operators = (x[m], x[m].mT, x[m] @ x[m].mT, x[m].mT @ x[m])
        features = []
        for operator, probes, projection in zip(operators, mvprobe.probes, mvprobe.projections, strict=True):
            s = operator @ probes[m]
            s = (s - s.mean((1, 2), keepdim=True)) / s.std((1, 2), correction=0, keepdim=True)
            features.append((projection[m].T @ s).relu().flatten(1))
        encoding += torch.cat(features, 1) @ mvprobe.encoder[m]
    expected = mvprobe.head(encoding / 2**0.5)
    torch.testing.assert_close(task.scores(mvprobe, torch.arange(4)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("encoder", [peers.ProbeX, peers.MVProbe, peers.GLNet])
def test_published_encoders_see_the_update_and_not_its_factorisation(encoder):
    task = a_task()
    torch.manual_seed(1)
    network, change = task.made(encoder), torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    other = replace(task, down=change @ task.down, up=torch.linalg.inv(change).T @ task.up)
    rows = torch.arange(4)
    torch.testing.assert_close(task.scores(network, rows), other.scores(network, rows), rtol=1e-3, atol=1e-4)
    swapped = replace(task, up=task.up.flip(0))
    assert (task.scores(network, rows) - swapped.scores(network, rows)).abs().max() > 1e-2


def test_both_sides_are_scored_on_one_split_and_the_bar_is_told():
    scores = peers.scores_of("both-64-1", 60, 1, ["stats", "update_kernel"], epochs=1, networks=NARROW)
    assert [score.name for score in scores[:5]] == ["stats", "update_kernel", "ProbeX", "MVProbe", "GL-net"]
    assert all(0 <= score.accuracy <= 100 and score.seconds > 0 for score in scores)
    assert all((score.parameters is None) != score.published for score in scores)
    lines = peers.lines_of("both-64-1", scores)
    assert len(lines) == len(scores) and f"{scores[2].parameters:,}" in lines[2]


@pytest.mark.parametrize(
    ("cell", "ours", "theirs", "holds"),
    [
        ("both-64-1", [(98, 1.0)], [(100, 10.0), (50, 0.1)], True),
        ("both-64-1", [(97, 1.0)], [(100, 10.0)], False),
        ("both-64-1", [(100, 2.0), (98, 1.0)], [(100, 10.0)], True),
        ("both-64-1", [(100, 2.0)], [(100, 10.0)], False),
        ("easy", [(0, 1.0)], [(90, 1.0), (100, 1.0)], True),
        ("easy", [(100, 1.0)], [(89, 1.0), (100, 1.0)], False),
    ],
)
def test_the_bar_is_two_points_at_a_tenth_of_the_time(cell, ours, theirs, holds):
    scores = [peers.Score("a", False, *values) for values in ours] + [peers.Score("b", True, *v) for v in theirs]
    said, kept = peers.kept_bar(cell, scores)
    assert kept == holds and (("MISSED" in said or "below" in said) != holds)


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU: what a CPU can show of benchmarks/gpu.py
# ----------------------------------------------------------------------------------------------------------------------

module_of("ranking")  # which gpu_networks imports
gpu_networks = module_of("gpu_networks")
gpu_numbers = module_of("gpu_numbers")
gpu_runs = module_of("gpu_runs")
gpu = module_of("gpu")
whole_run = module_of("whole_run")
CPU = torch.device("cpu")


def test_a_zoo_written_by_several_processes_is_the_same(tmp_path):
    for workers in (1, 3):
        zoo.write_zoo(tmp_path / str(workers), 25, workers=workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3") and len(files_of(tmp_path / "1")) == 25


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "count_gpus", lambda: 0)
    assert gpu.main([]) is None
    assert capsys.readouterr().out.startswith("There is no GPU here")


def test_numbers_of_the_cpu_are_its_own_and_others_are_called_wrong(monkeypatch, capsys, tmp_path):
    cases = gpu_networks.small_cases(fixed=True)
    assert len(cases) == 4 + len(gpu_networks.autoencoders.AUTOENCODERS)
    few = {name: cases[name] for name in ("vae", "projections")}
    monkeypatch.setattr(gpu_numbers, "small_cases", lambda fixed: few)
    monkeypatch.setattr(gpu_numbers, "PCA_WAYS", {"PCA by rows": gpu_numbers.PCA_WAYS["PCA by rows"]})
    before = torch.get_float32_matmul_precision()
    assert gpu_numbers.numbers(gpu_networks.Bench(CPU, tmp_path)).startswith("all within")
    assert torch.get_float32_matmul_precision() == before
    monkeypatch.setattr(gpu_numbers, "compare_training", lambda case, device: ({"gradients": 2e-4}, 0.0))
    monkeypatch.setattr(gpu_numbers, "compare_features", lambda *_: {"stats": math.nan})
    said = gpu_numbers.numbers(gpu_networks.Bench(CPU, tmp_path))
    assert said.startswith("WRONG: vae") and "gradients" in said and said.count("stats") == 2 and "PCA" not in said


@pytest.mark.parametrize(
    ("theirs", "share"),
    [([1.0, -4.0], 0), ([1.0, -4.4], 0.1), ([1.0, math.nan], math.inf)],
)
def test_a_difference_counts_by_the_largest_number(theirs, share):
    assert gpu_numbers.differs_by(torch.tensor([1.0, -4.0]), torch.tensor(theirs)) == pytest.approx(share, abs=1e-6)


def test_a_step_that_is_not_recorded_is_done_by_its_function(tmp_path):
    case, stacks = gpu_networks.small_cases(fixed=False)["classifier, masked"], gpu_numbers.training.stacks
    before = stacks.Recorded
    with gpu_numbers.not_recorded(), gpu_numbers.counted_recordings() as count:
        plain = gpu_numbers.trained(case, CPU)
    assert stacks.Recorded is before and count == [0]
    assert len(set(plain["epochs"].tolist())) > 1  # models leave at different epochs
    assert gpu_numbers.differences(plain, gpu_numbers.trained(case, CPU)) == []


def test_what_threads_get_wrong_is_named(capsys):
    calls = itertools.count()
    work = {
        "right": lambda device: {"x": torch.zeros(2)},
        "wrong": lambda device: {"x": torch.tensor([0.0, next(calls)])},
        "broken": lambda device: 1 / 0,
    }
    alone = {name: {"x": torch.zeros(2)} for name in work}
    faults = gpu_numbers.in_threads(work, CPU, alone, rounds=2)
    names = [fault.split(": ")[0].rsplit(", ", 1)[1] for fault in faults]
    assert names.count("broken") == 8 and names.count("wrong") == 7 and "right" not in names  # once it gives 0
    assert "ZeroDivisionError" in capsys.readouterr().out


def fails(bench):
    raise ValueError("of a mistake")


def hangs(bench):
    threading.Event().wait(60)


@pytest.mark.parametrize(
    ("run", "limit", "said"),
    [
        (lambda bench: "a figure", 60, "a figure"),
        (fails, 60, "FAILED: ValueError: of a mistake"),
        (hangs, 0.2, "FAILED: ended without a word, exit code 1"),
        (lambda bench: os.kill(os.getpid(), signal.SIGKILL), 60, "FAILED: ended without a word, exit code -9"),
    ],
    ids=["ends", "fails", "hangs", "crashes"],
)
def test_a_section_takes_nothing_from_the_next(tmp_path, run, limit, said):
    section = gpu.Section(run, limit, on_device=False)
    assert gpu.isolated(section, gpu_networks.Bench(CPU, tmp_path), limit) == said


def test_the_fifteen_and_the_others_are_all_representations():
    assert len(gpu_runs.FIFTEEN) == 15 and set(gpu_runs.FIFTEEN) < set(gpu_runs.OF_WEIGHTS)
    assert len(gpu_networks.program_cases()) == 14


def test_files_differ_but_for_environment_and_timing(tmp_path):
    for name, more in (("a", {"timing": 1}), ("b", {"timing": 2}), ("c", {"x": 2})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"x": 1} | more))
        (tmp_path / name / "results.txt").write_text("the same")
    assert gpu_runs.different_files(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b" / "more").touch()
    assert gpu_runs.different_files(tmp_path / "a", tmp_path / "b") == ["more"]
    assert gpu_runs.different_files(tmp_path / "a", tmp_path / "c") == ["results.json"]


def test_accuracies_are_compared_in_standard_errors():
    def results(mean, std):
        entry = {"stats": {"test_accuracy": {"mean": mean, "std": std, "runs": [mean] * 8}}}
        sizes = {"split_sizes": {"test": 200}}
        return {"dataset": sizes, "ablation_results": {}, "baseline_results": entry}

    table, compared, beyond = gpu_runs.accuracies(results(0.5, 0.02), results(0.53, 0.02))
    assert (compared, beyond) == (1, 1) and "(-3.0 SE)" in table
    assert table.splitlines()[1].split()[:3] == ["stats", "-", "50.00"]
    assert gpu_runs.accuracies(results(0.5, 0.0), results(0.504, 0.0))[1:] == (1, 0)
    assert gpu_runs.accuracies(results(0.5, 0.0), None)[1:] == (0, 0)


def test_units_are_timed_by_label(monkeypatch):
    monkeypatch.setattr(whole_run.Unit, "attempt", lambda unit, device: unit.label)
    before = whole_run.Unit.attempt
    with whole_run.TimedUnits() as units:
        for label in ("ranking", "ranking", "pca"):
            assert whole_run.Unit(Path("x"), None, None, [0], label).attempt(CPU) == label
    assert whole_run.Unit.attempt is before
    counts = {line.split()[0]: line.split()[1] for line in units.table().splitlines()}
    assert counts == {"units": "count", "ranking": "2", "pca": "1", "all": "3"}


@pytest.mark.slow
def test_every_section_runs_in_miniature(tmp_path):
    command = [sys.executable, FOLDER / "gpu.py", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OUT": str(tmp_path)})
    summary = done.stdout.split("== summary")[1]
    assert [line.split()[0] for line in summary.splitlines()[1:]] == list(gpu.SECTIONS), done.stderr
    assert "FAILED" not in summary and "WRONG" not in summary and "no time" not in summary, done.stdout
    assert (tmp_path / "gpu.txt").read_text() == done.stdout
