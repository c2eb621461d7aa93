"""Inputs that the base model sees: the file of --activations, what is computed of it, and what is said of that."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from making import FILE_NAME, NARROW, module_names, quick_runs, write_collection, write_lora
from safetensors.torch import load_file, save_file
from test_house import ROOT, check_schema

import ablation_experiment
import data
from data import CollectionError, index_collection
from experiment import activations, datasets
from experiment.extraction import extract
from experiment.settings import UsageError, resolve
from loras import digits_activations, digits_zoo
from loras.building import Progress
from loras.keys import canonical_module
from report.paired import paired_sentences
from representations import OF_WEIGHTS, REPRESENTATIONS, pair_features, projection, update_response, update_sketch

CPU = torch.device("cpu")
WIDTH, SEEN = 32, 4  # inputs of a module of the planted collection, and dimensions of them that the network sees


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, expected, **how):
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, **{"rtol": 1e-5, "atol": 1e-6} | how)


# -- the function -----------------------------------------------------------------------------------------


def test_by_hand_of_identity_factors():
    a, eye = gaussian(8, 5), torch.eye(5, dtype=torch.float64)[None]
    response = update_response(eye, eye, "m", torch.tensor([3.0]), {"m": a})
    assert response.dtype == torch.float32 and response.shape == (1, 64)
    close(response[0].reshape(8, 8), 3 * projection("m", "P", 5).T @ a.T)  # ΔW is 3 times the identity
    names = REPRESENTATIONS["update_response"].feature_names
    assert names[:2] == ("response_1_to_1", "response_1_to_2") and len(names) == 64
    first = float(3 * projection("m", "P", 5)[:, 0] @ a[1])  # what the first projection sees of the second input
    close(response[0, names.index("response_1_to_2")], first)


def test_it_is_that_of_the_whole_update_linear_and_the_same_however_it_is_factorised():
    down, up, scale, a = (
        gaussian(6, 3, 20),
        gaussian(6, 11, 3, seed=1),
        torch.linspace(-1, 2, 6),
        gaussian(8, 20, seed=2),
    )
    response = update_response(down, up, "m", scale, {"m": a})
    dense = scale[:, None, None] * (up @ down)
    close(response.reshape(6, 8, 8), projection("m", "P", 11).T @ dense @ a.T)
    g = gaussian(3, 3, seed=3)
    close(update_response(g @ down, up @ torch.linalg.inv(g), "m", scale, {"m": a}), response, rtol=1e-4)
    other = gaussian(6, 3, 20, seed=4), gaussian(6, 11, 3, seed=5)
    sums = torch.cat([down, other[0]], dim=1), torch.cat([up, other[1]], dim=2)
    ones = torch.ones(6)
    parts = [update_response(*factors, "m", ones, {"m": a}) for factors in ((down, up), other)]
    close(update_response(*sums, "m", ones, {"m": a}), parts[0] + parts[1])
    assert (update_response(down, torch.zeros(6, 11, 3), "m", None, {"m": a}) == 0).all()


def test_with_the_random_directions_as_inputs_it_is_the_sketch():
    down, up = gaussian(4, 2, 20).float(), gaussian(4, 11, 2, seed=1).float()
    directions = {name: projection(name, "Q", 20).mT for name in ("m", "n")}
    names = ["m", "n", "n", "m"]
    assert torch.equal(update_response(down, up, names, None, directions), update_sketch(down, up, names))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"inputs of m must be float\[8, 20\], got none; record them again"),
        ({"m": torch.ones(8, 19)}, r"got \[8, 19\]"),
        ({"m": torch.ones(7, 20)}, r"got \[7, 20\]"),
        ({"m": torch.full((8, 20), torch.nan)}, "inputs of m: 160 of 160 values are NaN"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_words(inputs, message):
    with pytest.raises(ValueError, match=message):
        pair_features(gaussian(1, 2, 20), gaussian(1, 11, 2), "m", None, ["update_response"], inputs=inputs)


# -- the flag ---------------------------------------------------------------------------------------------


def settings_of(*flags):
    return resolve(ablation_experiment.parse_arguments(["--device=cpu", *flags]))


def test_all_has_it_only_with_the_flag(tmp_path):
    save_file({"m": torch.ones(8, 4)}, tmp_path / "inputs.safetensors")
    with_file = settings_of(f"--activations={tmp_path / 'inputs.safetensors'}")
    assert settings_of().representations == OF_WEIGHTS and "update_response" not in OF_WEIGHTS
    assert with_file.representations == (*OF_WEIGHTS, "update_response") == tuple(REPRESENTATIONS)
    assert settings_of().config()["activations"] is None


def test_it_needs_the_flag_and_the_flag_needs_it(tmp_path):
    save_file({"m": torch.ones(8, 4)}, tmp_path / "inputs.safetensors")
    with pytest.raises(UsageError, match=r"--representations update_response: it reads inputs.+Give --activations"):
        settings_of("--representations=stats,update_response")
    with pytest.raises(UsageError, match=r"--activations .+: no representation reads it. Add update_response"):
        settings_of("--representations=stats", f"--activations={tmp_path / 'inputs.safetensors'}")
    with pytest.raises(UsageError) as unknown:
        settings_of("--representations=nothing")
    assert "update_response" not in str(unknown.value)


def a_pickle(path):
    torch.save({"m": torch.ones(8, 4)}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (a_pickle, "a pickle checkpoint: never loaded"),
        (lambda path: path.write_text("PK"), "incomplete download: has 2 bytes"),
        (lambda path: path.write_bytes(bytes(100)), "not a readable safetensors file"),
        (lambda path: path.mkdir(), "a pipe or a device|Is a directory"),
        (lambda path: None, "No such file or directory"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_before_anything_is_read(tmp_path, write, message):
    write(tmp_path / "inputs")
    with pytest.raises(UsageError, match=rf"--activations .+inputs: .*({message})"):
        settings_of(f"--activations={tmp_path / 'inputs'}")
    assert settings_of(f"--activations={tmp_path / digits_activations.NAME}").activations  # it may be written yet


# -- the file ---------------------------------------------------------------------------------------------

MODULES = module_names(2)
IDS = [canonical_module(name) for name in MODULES]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return index_collection(write_collection(tmp_path_factory.mktemp("collections") / "small"))


def written(folder: Path, tensors: dict) -> Path:
    save_file(tensors, folder / "inputs.safetensors")
    return folder / "inputs.safetensors"


def inputs_of(rows=20, width=8, dtype=torch.float32, names=IDS, seed=0):
    return {name: gaussian(rows, width, seed=seed + i).to(dtype) for i, name in enumerate(names)}


def test_eight_rows_are_read_evenly_spaced(tmp_path, collection):
    tensors = inputs_of(rows=22)
    found = activations.read(written(tmp_path, tensors), collection)
    for module in IDS:
        assert found.inputs[module].dtype == np.float32
        assert np.array_equal(found.inputs[module], tensors[module][[0, 3, 6, 9, 12, 15, 18, 21]])
    eight = inputs_of(rows=8)
    assert np.array_equal(activations.read(written(tmp_path, eight), collection).inputs[IDS[0]], eight[IDS[0]])


def test_the_digest_is_of_what_is_read(tmp_path, collection):
    tensors = inputs_of(rows=22)
    first = activations.read(written(tmp_path, tensors), collection).digest
    tensors["another.to_q"] = torch.ones(1)
    tensors[IDS[0]][1] = torch.nan  # not read
    assert activations.read(written(tmp_path, tensors), collection).digest == first
    tensors[IDS[0]][3, 0] += 1
    assert activations.read(written(tmp_path, tensors), collection).digest != first


@pytest.mark.parametrize("name", [lambda name: name, lambda name: name.removeprefix("unet."),
                                  lambda name: f"lora_{name.replace('.', '_')}"])  # fmt: skip
def test_names_of_other_styles_stand_for_the_modules(tmp_path, collection, name):
    expected = activations.read(written(tmp_path, inputs_of()), collection).digest
    assert activations.read(written(tmp_path, inputs_of(names=map(name, MODULES))), collection).digest == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_numbers_of_other_types_are_read_as_float32(tmp_path, collection, dtype):
    tensors = inputs_of(rows=8, dtype=dtype)
    found = activations.read(written(tmp_path, tensors), collection).inputs[IDS[1]]
    assert np.array_equal(found, tensors[IDS[1]].float())


def without(name):
    return lambda tensors: tensors.pop(name)


def changed(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (without(IDS[1]), [f"has no inputs of {IDS[1]}. docs/activations.md says how"]),
        (changed(MODULES[0], torch.ones(9, 8)), [f"inputs of {IDS[0]} more than once: "]),
        (changed(IDS[0], torch.ones(9, 7)), [rf"{IDS[0]} has shape \[9, 7\], .+ inputs of 8: \[n, 8\]"]),
        (changed(IDS[0], torch.ones(9, 1, 8)), [rf"{IDS[0]} has shape \[9, 1, 8\]"]),
        (changed(IDS[0], torch.ones(7, 8)), [f"{IDS[0]} has 7 inputs, and 8 are needed. Record more"]),
        (changed(IDS[0], torch.ones(9, 8).int()), [f"{IDS[0]} is of I32. Give one of F64, F32"]),
        (changed(IDS[0], torch.full((9, 8), torch.inf)), [f"{IDS[0]}: NaN, infinity .+ in input 0"]),
        (changed(IDS[0], torch.zeros(9, 8)), [f"{IDS[0]}: the 8 inputs that are read are 0"]),
        (changed(IDS[0], torch.full((9, 8), 1e300, dtype=torch.float64)), ["beyond float32"]),
        (lambda tensors: tensors.clear() or tensors.update(x=torch.ones(8, 8)), ["of no module .+ first keys are x"]),
        (
            lambda tensors: tensors.update({IDS[0]: torch.ones(7, 8), IDS[1]: torch.full((9, 8), torch.nan)}),
            [f"{IDS[0]} has 7 inputs", f"{IDS[1]}: NaN"],  # all of them at once
        ),
    ],
)
def test_faults_name_the_module(tmp_path, collection, change, messages):
    tensors = inputs_of()
    change(tensors)
    with pytest.raises(CollectionError) as refused:
        activations.read(written(tmp_path, tensors), collection)
    findings = refused.value.findings
    assert len(findings) == len(messages) and findings == activations.faults(
        tmp_path / "inputs.safetensors", collection
    )
    for finding, message in zip(findings, messages, strict=True):
        assert finding.startswith("--activations ") and re.search(message, finding)


def test_the_pass_computes_anew_what_reads_another_file_and_nothing_else(tmp_path, collection):
    names, cache = ["stats", "update_sketch", "update_response"], tmp_path / "cache"
    plain = extract(collection, names[:2], cache, CPU)
    given = [activations.read(written(tmp_path, inputs_of(seed=seed)), collection) for seed in (0, 5)]
    first, second = (extract(collection, names, cache, CPU, activations=one) for one in given)
    folders = {path.name.rsplit("-", 2)[0] for path in (plain.folder / "features").iterdir()}
    assert folders == {"stats", "update_sketch", *(f"update_response-{one.digest}" for one in given)}
    assert plain.place("update_sketch") == first.place("update_sketch") == second.place("update_sketch")
    tensors = load_file(collection.root / collection.files[3].path)
    for found, one in ((first, given[0]), (second, given[1])):
        inputs = {module: torch.from_numpy(rows) for module, rows in one.inputs.items()}
        for p, (down, up) in enumerate(zip(collection.layers[::2], collection.layers[1::2], strict=True)):
            factors = tensors[down.name][None], tensors[up.name][None]
            close(found.load("update_response")[3, p], update_response(*factors, down.module, None, inputs)[0])
    assert np.array_equal(first.load("update_sketch"), plain.load("update_sketch"))


# -- a run ------------------------------------------------------------------------------------------------


def planted(root: Path, classes=3, per_class=40, noise=6.0) -> dict[str, torch.Tensor]:
    """Write LoRAs whose concept is what they do to inputs that the network sees, and return such inputs by module.

    These lie in a few dimensions of many; in all others the updates are large and differ from LoRA to LoRA.
    """
    basis = torch.linalg.qr(gaussian(WIDTH, WIDTH, seed=11)).Q.mT  # orthonormal rows
    read, blind = basis[:SEEN], basis[SEEN:]
    concepts = gaussian(classes, len(MODULES), WIDTH, SEEN, seed=12)
    for c in range(classes):
        for i in range(per_class):
            tensors, seed = {}, 100 + 1000 * c + i
            for m, module in enumerate(MODULES):
                up = torch.cat([concepts[c, m], gaussian(WIDTH, SEEN, seed=seed + 7 * m)], dim=1)
                other = noise * gaussian(SEEN, len(blind), seed=seed + 500) @ blind
                g = gaussian(2 * SEEN, 2 * SEEN, seed=seed + 600)  # another factorisation in each
                tensors[f"{module}.lora.down.weight"] = (g @ torch.cat([read, other])).float()
                tensors[f"{module}.lora.up.weight"] = (up @ torch.linalg.inv(g)).float()
            write_lora(root / f"class_{c}" / f"{i:04}" / FILE_NAME, tensors)
    return {f"lora_{name.replace('.', '_')}": (gaussian(16, SEEN, seed=13) @ read).float() for name in MODULES}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on planted LoRAs with inputs that the network sees, the folder, and what the program said."""
    folder = tmp_path_factory.mktemp("planted")
    save_file(planted(folder / "zoo"), folder / "seen.safetensors")
    return folder, results_of(folder, "--activations", str(folder / "seen.safetensors"))


def results_of(folder, *flags, names="stats,update_sketch,update_response", out="out"):
    arguments = [f"--dataset={folder / 'zoo'}", f"--output-dir={folder / out}", f"--cache-dir={folder / 'cache'}"]
    arguments += ["--quick", "--top-k=1", "--num-runs=1", "--device=cpu", f"--representations={names}", *flags]
    with quick_runs():
        assert ablation_experiment.main(arguments, NARROW) == 0
    results = json.loads((folder / out / "ablation_zoo" / "results.json").read_text())
    assert check_schema(results) == []
    return results


def accuracy(results, name):
    return results["baseline_results"][name]["test_accuracy"]["mean"]


def test_what_updates_do_to_inputs_that_are_seen_is_found_by_these_and_not_by_random_directions(run):
    folder, results = run
    assert accuracy(results, "update_response") > 0.9 and accuracy(results, "update_sketch") < 0.7
    (record,) = (r for r in results["analysis"]["representations"]["conditions"]["baseline"]["comparisons"]
                 if {r["a"], r["b"]} == {"update_response", "update_sketch"})  # fmt: skip
    assert record["significant"]
    text = " ".join((folder / "out" / "ablation_zoo" / "results.txt").read_text().split())
    assert re.search(
        r"With inputs that the base model sees \(update_response\) in place of random directions \(update_sketch\) "
        r"accuracy changes by \+\d+\.\d points \(\d.+?\): the recorded inputs tell more\.",
        text,
    )
    assert len(results["config"]["activations"]) == 16


def test_inputs_that_the_concept_does_not_act_on_are_no_better(run):
    folder, first = run
    shutil.copytree(folder / "out", folder / "other")
    keys = load_file(folder / "seen.safetensors")
    save_file({key: gaussian(16, WIDTH, seed=14).float() for key in keys}, folder / "random.safetensors")
    known = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*") if path.suffix in (".npy", ".npz")}
    results = results_of(folder, "--activations", str(folder / "random.safetensors"), out="other")
    assert abs(accuracy(results, "update_response") - accuracy(results, "update_sketch")) < 0.35
    assert results["config"]["activations"] != first["config"]["activations"]
    for name in ("stats", "update_sketch"):
        assert results["baseline_results"][name] == first["baseline_results"][name]
    now = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*") if path.suffix in (".npy", ".npz")}
    assert all(now[path] == was for path, was in known.items())
    new = sorted(path.parent.name.split("-")[0] for path in now.keys() - known.keys())
    assert new == ["units", "units", "update_response"]  # of one representation, with and without the top layer


def test_the_same_inputs_are_the_same_run_and_without_them_the_others_stay(run, capsys):
    folder, first = run
    flags = "--activations", str(folder / "copy.safetensors")
    shutil.copy(folder / "seen.safetensors", folder / "copy.safetensors")
    results_of(folder, *flags)
    shown = capsys.readouterr().out
    assert "Nothing to do" in shown and f"inputs    8 of each of 2 modules, of {flags[1]}\n" in shown
    without = results_of(folder, names="stats,update_sketch", out="without")
    assert without["config"]["activations"] is None
    shown = capsys.readouterr().out.replace(str(folder), "")
    assert "update_response" not in shown and "activations" not in shown
    for name in ("stats", "update_sketch"):
        assert without["baseline_results"][name] == first["baseline_results"][name]


def test_a_run_and_inspect_refuse_the_same(run, tmp_path, capsys):
    folder, _ = run
    path = written(tmp_path, {MODULES[0]: torch.ones(3, WIDTH)})
    flags = [f"--activations={path}", "--device=cpu", "--top-k=1", f"--output-dir={tmp_path / 'out'}"]
    errors = []
    for program, arguments in ((ablation_experiment.main, [f"--dataset={folder / 'zoo'}"]),
                               (data.main, ["inspect", str(folder / "zoo")])):  # fmt: skip
        assert program([*arguments, *flags]) == 2
        errors.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")])
    assert errors[0] == errors[1] and len(errors[0]) == 2
    assert f"{MODULES[0]} has 3 inputs, and 8 are needed" in errors[0][0] and f"no inputs of {IDS[1]}" in errors[0][1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("difference", "significant", "outcome"),
    [
        (0.2, True, r"\+20.0 points \(10.0 to 30.0.+: the recorded inputs tell more\."),
        (-0.2, True, r"-20.0 points \(-30.0 to -10.0.+: the random directions tell more\."),
        (0.2, False, "neither is shown to be better"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_sentence_tells_the_sign_whichever_stands_first(difference, significant, outcome, swapped):
    names, sign = ["update_response", "update_sketch"], -1 if swapped else 1
    interval = sorted(sign * (difference + d) for d in (-0.1, 0.1))
    record = {"difference": sign * difference, "interval": interval, "significant": significant, "p": 0.01}
    record |= dict(zip("ab", names[::sign], strict=True))
    baseline = {"baseline": {"comparisons": [record]}}
    (line,) = paired_sentences({"analysis": {"representations": {"conditions": baseline}}})
    assert re.search(outcome, line)


# -- the built-in digits ----------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """A folder with a base model that was never trained."""
    weights = digits_zoo.init_base(0)
    save_file(weights, tmp_path / digits_activations.BASE_NAME, {"recipe": "untrained"})
    return tmp_path, weights


def test_the_digits_inputs_are_those_of_their_base_model(base):
    folder, weights = base
    path = digits_activations.write_beside(folder)
    inputs = load_file(path)
    assert path == folder / "activations-seed0.safetensors" and len(inputs) == 32
    assert {tuple(rows.shape) for rows in inputs.values()} == {(64, 64)}
    words = weights["words"][:4] + weights["word_position"]  # a picture of concept
    block = "transformer_transformer_blocks_0"
    close(inputs[f"{block}_attn2_to_k"], words.repeat(16, 1))
    assert torch.equal(inputs[f"{block}_attn2_to_k"], inputs["transformer_transformer_blocks_3_attn2_to_v"])
    normed = inputs[f"{block}_attn1_to_q"]  # layer norm comes before, and the three projections read the same
    close(normed.mean(1), 0, atol=1e-5)
    close(normed.square().mean(1), 1, atol=1e-3)
    assert torch.equal(normed, inputs[f"{block}_attn1_to_v"])
    assert len(normed.unique(dim=0)) == 64


def test_they_are_written_once_to_the_same_bytes_and_again_for_another_base(base):
    folder, weights = base
    path = digits_activations.write_beside(folder)
    before = path.read_bytes()
    assert digits_activations.write_beside(folder) is None
    path.unlink()
    assert digits_activations.write_beside(folder) == path and path.read_bytes() == before
    save_file(weights, folder / digits_activations.BASE_NAME, {"recipe": "another"})
    assert digits_activations.write_beside(folder) == path
    (folder / digits_activations.BASE_NAME).unlink()
    assert digits_activations.write_beside(folder) is None


def test_a_line_says_where_they_are_or_why_not(base, monkeypatch, capsys):
    folder, _ = base
    monkeypatch.setattr(datasets, "BUILT_IN", folder)
    datasets._record_activations(Progress())
    datasets._record_activations(Progress())
    assert capsys.readouterr().out == f"{folder}/activations-seed0.safetensors: {datasets.RECORDED}\n"

    def full(*_):
        raise OSError(28, "No space left on device")

    datasets._record_activations(Progress(log=sys.stderr))  # as inspect does, whose output may be JSON
    (folder / digits_activations.NAME).unlink()
    datasets._record_activations(Progress(log=sys.stderr))
    shown = capsys.readouterr()
    assert datasets.RECORDED in shown.err and not shown.out
    monkeypatch.setattr(digits_activations, "write_beside", full)
    datasets._record_activations(Progress())
    assert "cannot be written (No space left on device)" in capsys.readouterr().out


# -- the recorder of the document -------------------------------------------------------------------------


def tiny_pipeline(folder: Path):
    """A Stable Diffusion pipeline of random weights, a few numbers wide; its tokens are letters."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
        text_encoder=transformers.CLIPTextModel(config), tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDPMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def documented_recorder() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "activations.md").read_text("utf-8"), re.DOTALL)
    return block


def test_the_documented_recorder_compiles():
    compile(documented_recorder(), "docs/activations.md", "exec")


@pytest.mark.parametrize("ends", [None, ("to_q", "q_proj", "proj_in", "conv1")])
def test_what_the_documented_recorder_writes_is_read(tmp_path, monkeypatch, ends):
    pipe, block = tiny_pipeline(tmp_path), documented_recorder()
    monkeypatch.chdir(tmp_path)
    if ends:
        block = re.sub(r"ENDS = .*", f"ENDS = {ends}", block)
    exec(block, {"pipe": pipe})
    recorded = load_file("activations.safetensors")
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    modules = {f"{p}.{name}": module for p, part in parts.items() for name, module in part.named_modules()}
    for name in recorded:  # LoRAs of all the modules that were recorded
        weight = modules[name].weight
        for i in range(6):
            path = tmp_path / "zoo" / f"class_{i % 2}" / f"{i:04}" / FILE_NAME
            known = load_file(path) if path.exists() else {}
            known[f"{name}.lora_A.weight"] = torch.randn(2, *weight.shape[1:])
            known[f"{name}.lora_B.weight"] = torch.randn(len(weight), 2, *(1,) * (weight.ndim - 2))
            write_lora(path, known)
    collection = index_collection(tmp_path / "zoo")
    found = activations.read(tmp_path / "activations.safetensors", collection)
    assert len(found.inputs) == len(recorded) >= 16 and all(np.ptp(rows) > 0 for rows in found.inputs.values())
    if ends:
        assert any(rows.shape[1] == 8 * 3 * 3 for rows in found.inputs.values())  # patches of a convolution
        assert any(module.startswith("text_encoder") for module in found.inputs)
