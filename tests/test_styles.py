"""The same weights under the names of seven writers and in three types are the same experiment; ranks may differ."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from making import FILE_NAME, STYLES, planted_collection, write_lora
from safetensors.torch import load_file

from ablation_experiment import main
from data import index_collection
from experiment.arrays import WEIGHTS
from experiment.extraction import extract
from experiment.settings import Networks
from representations import OF_WEIGHTS, REPRESENTATIONS

NETWORKS = Networks(classifier=(128, 128, 128))

CPU = torch.device("cpu")
HAND_CRAFTED = [name for name, row in REPRESENTATIONS.items() if row.made == "computed"]
FLATTENED = [name for name, row in REPRESENTATIONS.items() if row.made in ("flat", "pca", "autoencoder")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# In the network's order, which is not the alphabet's: 2 before 10, down before mid before up, q k v out.
MODULES = [
    f"unet.{block}.transformer_blocks.0.attn1.{projection}"
    for block in ("down_blocks.2.attentions.0", "down_blocks.10.attentions.0", "mid_block.attentions.0", "up_blocks.1")
    for projection in ("to_q", "to_v", "to_out.0")
]
RANK = 2


def factors(seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """The factors of a LoRA by module and role, with a scale that tells the class, seed % 2, in two layers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module in MODULES:
        found[module, "down"] = torch.randn(RANK, 6, generator=generator)
        found[module, "up"] = torch.randn(5, RANK, generator=generator)
    found[MODULES[1], "up"] *= 1 + 2 * (seed % 2)
    found[MODULES[7], "down"] *= 2 - seed % 2
    return found


def write_in_style(root: Path, style: str, dtype: torch.dtype) -> Path:
    """Twelve LoRAs of two classes under a writer's names; kohya says its alpha, which makes the scale 1."""
    for seed in range(12):
        tensors = {STYLES[style](module, role): t.to(dtype) for (module, role), t in factors(seed).items()}
        if style == "kohya":
            tensors |= {f"lora_{module.replace('.', '_')}.alpha": torch.tensor(float(RANK)) for module in MODULES}
        write_lora(root / f"class_{seed % 2}" / f"{seed:02}" / FILE_NAME, tensors)
        if style.startswith("PEFT with"):
            config = {"r": RANK, "lora_alpha": RANK}
            (root / f"class_{seed % 2}" / f"{seed:02}" / "adapter_config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
def test_every_style_and_type_is_the_same_network_in_the_same_order(tmp_path, style, dtype):
    collection = index_collection(write_in_style(tmp_path / "zoo", style, dtype))
    assert collection.modules == [module.replace(".", "_") for module in MODULES]
    names = [STYLES[style](module, role) for module in MODULES for role in ("down", "up")]
    assert [layer.name for layer in collection.layers] == names
    packed = extract(collection, [WEIGHTS], tmp_path / "cache", CPU).weights().read()
    for row, file in enumerate(collection.files):
        expected = [tensor.to(dtype).float().flatten() for tensor in factors(int(Path(file.path).parts[1])).values()]
        np.testing.assert_array_equal(packed[row], torch.cat(expected))


@pytest.fixture(scope="module")
def in_every_style(tmp_path_factory):
    """Folder of the float32 collection of each style."""
    root = tmp_path_factory.mktemp("styles")
    return {style: write_in_style(root / style / "zoo", style, torch.float32) for style in STYLES}


def test_features_do_not_depend_on_the_style(in_every_style, tmp_path):
    assert len(in_every_style) >= 6
    found = {
        style: extract(index_collection(root), HAND_CRAFTED, tmp_path / style, CPU)
        for style, root in in_every_style.items()
    }
    for name in HAND_CRAFTED:
        expected = found["diffusers"].load(name)
        assert np.isfinite(expected).all() and np.ptp(expected) > 0
        for style in STYLES:
            np.testing.assert_array_equal(found[style].load(name), expected, err_msg=f"{name}, {style}")


@pytest.mark.slow
def test_top_layers_are_the_same_apart_from_the_shown_names(in_every_style, tmp_path):
    flags = ("--top-k=5", "--quick", "--num-runs=1", "--representations=stats,update_sketch", "--device=cpu")
    found, shown = {}, {}
    for style, root in in_every_style.items():
        assert main(["--dataset", str(root), "--output-dir", str(tmp_path / style), *flags], NETWORKS) == 0
        top = json.loads((tmp_path / style / "ablation_zoo" / "top_layers.json").read_text())
        shown[style] = [layer.pop("layer") for layer in top]
        results = json.loads((tmp_path / style / "ablation_zoo" / "results.json").read_text())
        found[style] = top, results["ablation_results"], results["baseline_results"]
    spelled = {module.replace(".", "_"): module for module in MODULES}
    for style in STYLES:
        assert found[style] == found["diffusers"], style
        assert shown[style] == [STYLES[style](spelled[x["module"]], x["role"]) for x in found[style][0]]
    assert len({tuple(names) for names in shown.values()}) == len(STYLES)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks that differ
# ----------------------------------------------------------------------------------------------------------------------


def pad(path: Path, rank: int) -> None:
    """Write a LoRA again at a larger rank: new rows of its downs are noise, which new columns of zeros never use."""
    generator = torch.Generator().manual_seed(rank)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".down." in name:
            noise = torch.randn(rank - tensor.shape[0], tensor.shape[1], generator=generator)
            tensors[name] = torch.cat([tensor, noise])
        else:
            tensors[name] = torch.cat([tensor, torch.zeros(len(tensor), rank - tensor.shape[1])], dim=1)
    write_lora(path, tensors)


@pytest.fixture
def mixed(tmp_path):
    """A collection with planted layers, two thirds of its LoRAs written at the ranks 3 and 5; and all of them at 2."""
    for name in ("zoo", "even"):
        planted_collection(tmp_path / name, per_class=20)
    for i, path in enumerate(sorted((tmp_path / "zoo").rglob("*.safetensors"))):
        if i % 3:
            pad(path, (3, 5)[i % 3 - 1])
    return tmp_path / "zoo", tmp_path / "even"


def test_the_update_is_the_same_at_any_rank(mixed, tmp_path):
    padded, even = (extract(index_collection(root), HAND_CRAFTED, tmp_path / "cache", CPU) for root in mixed)
    for name in HAND_CRAFTED:
        assert np.isfinite(padded.load(name)).all()
        assert padded.load(name).shape == even.load(name).shape
    np.testing.assert_allclose(padded.load("update_sketch"), even.load("update_sketch"), rtol=1e-4, atol=1e-5)
    assert not np.allclose(padded.load("stats"), even.load("stats"), rtol=0.1)


@pytest.mark.slow
def test_flattened_weights_are_left_out_with_the_reason_and_the_rest_goes_on(mixed, tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = ["--dataset", str(mixed[0]), "--output-dir", str(folder), "--device=cpu", "--top-k=3", "--quick"]
    assert main([*arguments, "--num-runs=1"], NETWORKS) == 3
    shown = capsys.readouterr()
    assert shown.err == ""
    results = json.loads((folder / "ablation_zoo" / "results.json").read_text())
    left_out = {entry["representation"]: entry["reason"] for entry in results["representations_not_run"]}
    assert list(left_out) == FLATTENED and {"flat_vec", "pca", "vae", "contrastive", "denoising"} <= set(FLATTENED)
    first = index_collection(mixed[0])
    told = f"ranks differ between LoRAs: {first.layers[0].name} has 2, and 3 in {first.files[1].path}"
    assert set(left_out.values()) == {told}
    text = (folder / "ablation_zoo" / "results.txt").read_text()
    for name in FLATTENED:
        assert name in text and name in shown.out and told in text and told in shown.out
    for condition in ("baseline_results", "ablation_results"):
        assert list(results[condition]) == [name for name in OF_WEIGHTS if name not in FLATTENED]
    assert sorted(results["top_layers"]) == sorted(first.layers[depth].name for depth in (1, 4, 6))  # the planted ones
    for name in ("stats", "coupling"):
        assert results["baseline_results"][name]["test_accuracy"]["mean"] > 0.7
    assert results["baseline_results"]["update_kernel"]["num_features"] == 4  # padded weights do


def test_a_run_of_flattened_weights_alone_still_ranks_the_layers(mixed, tmp_path):
    flags = ("--top-k=3", "--quick", "--num-runs=1", "--representations=flat_vec,pca", "--device=cpu")
    assert main(["--dataset", str(mixed[0]), "--output-dir", str(tmp_path / "out"), *flags], NETWORKS) == 3
    results = json.loads((tmp_path / "out" / "ablation_zoo" / "results.json").read_text())
    assert len(results["layer_ranking"]) == 8 and results["baseline_results"] == {} == results["ablation_results"]
    assert not list((tmp_path / "out" / ".cache").rglob("weights-*"))  # nothing was packed in vain
