"""The benchmarks' own parts: the collection in Stable Diffusion 1.5's shapes, features compared, truth simulated."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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
