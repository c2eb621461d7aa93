"""Files whose layers differ: the layers that all of them have, what is said of the others, and which cache is whose."""

import json

import numpy as np
import pytest
import torch
from making import NARROW, lora, module_names, write_lora
from safetensors.torch import load_file

import data
from ablation_experiment import main
from data import CollectionError, index_collection
from experiment import extraction
from loras import layer_sets

IDS = [name.replace(".", "_") for name in module_names(4)]
CPU = torch.device("cpu")


def mixed(root, sets=({0, 1, 2}, {0, 1}, {1, 2, 0, 3}), each=6, seed=0):
    """Two classes of ``each`` LoRAs that hold the modules of each set in turn."""
    names = module_names(4)
    for c in range(2):
        for i in range(each):
            whole = lora(4, seed=seed + 100 * c + i)
            held = {names[m] for m in sets[i % len(sets)]}
            tensors = {key: tensor for key, tensor in whole.items() if key.split(".lora.")[0] in held}
            write_lora(root / f"class_{c}" / f"{i}.safetensors", tensors)
    return root


def refused(root, **flags) -> list[str]:
    with pytest.raises(CollectionError) as error:
        index_collection(root, **flags)
    return error.value.findings


def test_files_that_differ_are_refused_with_the_flag_that_helps(tmp_path):
    for finding in refused(mixed(tmp_path)):
        assert finding.endswith(
            "Keep LoRAs of the same layers to a collection, or compare those that all files have: --common-layers."
        )


def test_the_layers_that_all_files_have_are_kept_and_the_others_counted(tmp_path):
    collection = index_collection(mixed(tmp_path), common_layers=True)
    assert collection.modules == IDS[:2] and len(collection.layers) == 4 and len(collection.files) == 12
    assert collection.common_layers == {
        "modules": 2,
        "others": [{"module": IDS[2], "files": 8}, {"module": IDS[3], "files": 4}],
    }
    (notice,) = collection.notices
    assert notice.message == (
        "--common-layers keeps the 4 layers (2 modules) that all 12 LoRAs have and leaves out 2 modules "
        f"({IDS[2]} in 8, {IDS[3]} in 4). What these know is not in the results."
    )
    for file in collection.files:
        weights = data.lora_files.read_weights(tmp_path / file.path, file.header).weights
        tensors = load_file(tmp_path / file.path)
        expected = torch.cat([tensors[layer.name].ravel() for layer in file.layout.layers])
        np.testing.assert_array_equal(weights, expected.numpy())


def test_the_flag_changes_nothing_where_all_files_have_the_same_layers(tmp_path):
    root = mixed(tmp_path, ({0, 1},))
    plain, flagged = (index_collection(root, common_layers=flag) for flag in (False, True))
    assert flagged.common_layers is None and not flagged.notices and plain.modules == flagged.modules
    assert extraction.identity(plain) == extraction.identity(flagged)


def test_widths_that_differ_are_refused_all_the_same(tmp_path):
    root = mixed(tmp_path)
    write_lora(root / "class_0" / "0.safetensors", lora(3, width=12))
    (finding,) = refused(root, common_layers=True)
    assert finding == (
        f"{root}/class_0/0.safetensors: {IDS[0]} down is 12 wide, but 8 in 11 files: mixed base models. "
        "Keep one base model to a collection."
    )
    collection = index_collection(root, common_layers=True, skip_bad=True)
    assert len(collection.files) == 11 and collection.modules == IDS[:2]


def test_where_no_layer_is_common_the_files_are_named_that_have_least_in_common(tmp_path):
    root = mixed(tmp_path, ({0, 1, 2}, {0, 1}, {0, 2}, {0, 1, 2}, {1, 3}, {3}))
    told = sorted(refused(root, common_layers=True))
    for finding, number, modules in zip(told, (4, 5), (2, 1), strict=True):
        assert finding == (
            f"{root}/class_0/{number}.safetensors and 1 more: no layer is common to all 12 files: 0 of its {modules} "
            f"modules are among the 1 that 8 other files have in common ({IDS[0]} ...). Keep LoRAs of one network to a "
            "collection, or leave it out."
        )
    collection = index_collection(root, common_layers=True, skip_bad=True)
    assert collection.modules == IDS[:1] and len(collection.files) == 8 and len(collection.skipped) == 4
    assert refused(mixed(tmp_path / "two", ({0}, {1})), common_layers=True)


def test_a_bad_file_has_no_say_in_what_is_common(tmp_path):
    root = mixed(tmp_path, ({0, 1},))
    write_lora(root / "class_0" / "0.safetensors", {"a.hada_w9": torch.ones(2, 2)})
    collection = index_collection(root, common_layers=True, skip_bad=True)
    assert collection.modules == IDS[:2] and len(collection.files) == 11 and collection.common_layers is None


def test_features_of_all_layers_and_of_the_common_ones_are_never_confused(tmp_path):
    """The same files with other layers kept, as by another file that came and went: other features, other folders."""
    root = mixed(tmp_path / "zoo", ({0, 1, 2},))
    everything = index_collection(root, common_layers=True)
    names = [extraction.RANKING, extraction.WEIGHTS]
    whole = extraction.extract(everything, names, tmp_path / "cache", CPU)
    odd = write_lora(root / "class_0" / "9.safetensors", lora(1, seed=7))
    common = index_collection(root, common_layers=True)
    odd.unlink()
    files = tuple(file for file in common.files if not file.path.endswith("9.safetensors"))
    less = data.replace(common, files=files)
    few = extraction.extract(less, names, tmp_path / "cache", CPU)
    assert extraction.identity(less) != extraction.identity(everything) and few.fingerprint != whole.fingerprint
    assert few.load(extraction.RANKING).shape[1] == 2 and whole.load(extraction.RANKING).shape[1] == 6
    np.testing.assert_array_equal(few.load(extraction.RANKING), whole.load(extraction.RANKING)[:, :2])
    again = extraction.extract(everything, names, tmp_path / "cache", CPU)
    assert again.fingerprint == whole.fingerprint and again.load(extraction.RANKING).shape[1] == 6


@pytest.mark.parametrize(
    ("pattern", "modules"),
    [
        ("!attentions.1", [0, 2, 3]),
        ("!*attentions.1*", [0, 2, 3]),
        ("attentions.1,attentions.2, !attentions.2", [1]),
        ("!attentions.0,*.attn1.*,!attentions.3", [1, 2]),
    ],
)
def test_a_pattern_may_say_what_to_leave_out(tmp_path, pattern, modules):
    layers = index_collection(mixed(tmp_path, ({0, 1, 2, 3},), each=3)).layers
    selected = layer_sets.matching(layers, pattern)
    assert [IDS.index(layer.module) for layer, kept in zip(layers[::2], selected[::2], strict=True) if kept] == modules
    for none, words in (("!attn7", "'!attn7' matches none"), ("!attentions", "leaves none of 8 layers")):
        with pytest.raises(ValueError, match=words):
            layer_sets.matching(layers, none)


def test_inspect_and_the_experiment_say_what_was_left_out(tmp_path, capsys):
    root = mixed(tmp_path / "zoo")
    assert (
        data.main(["inspect", str(root), "--top-k=1", "--headers-only", "--json", "--common-layers", "--strict"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["common_layers"]["others"][1] == {"module": IDS[3], "files": 4} and len(found["layers"]) == 4
    assert data.main(["inspect", str(root), "--top-k=1", "--common-layers"]) == 0
    note = (
        f"--common-layers keeps the 4 layers (2 modules) that all 12 LoRAs have and leaves out 2 modules ({IDS[2]} in 8"
    )
    assert f"note: {note}" in capsys.readouterr().out
    flags = ["--dataset", str(root), "--output-dir", str(tmp_path / "out"), "--top-k=1", "--quick", "--device=cpu"]
    flags += ["--representations=stats,flat_vec", "--num-runs=1", "--common-layers"]
    assert main(flags, NARROW) == 0
    assert note in capsys.readouterr().out
    folder = tmp_path / "out" / "ablation_zoo"
    results = json.loads((folder / "results.json").read_text())
    assert results["dataset"]["common_layers"]["modules"] == 2 and results["dataset"]["num_layers"] == 4
    assert [finding["kind"] for finding in results["dataset"]["findings"]] == ["common layers"]
    assert "--common-layers keeps the 4 layers" in " ".join((folder / "results.txt").read_text().split())
    assert main(flags, NARROW) == 0
    assert "Nothing to do" in capsys.readouterr().out
