"""The built-in collection: files, seeds, interruption, and stacked training against a literal reference."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from loras import digits_zoo as zoo


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def loras_of(folder):
    return {name: data for name, data in files_of(folder).items() if name != zoo.RECIPE_NAME}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and on a busy machine waiting for the second one is most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    """The same program with fewer steps and smaller stacks."""
    settings = {"BASE_STEPS": 4, "BASE_BATCH": 16, "LORA_STEPS": 3, "LORA_BATCH": 3, "STACK": 4, "PROGRESS_EVERY": 3}
    settings |= {"CHECKPOINT_EVERY": 2}
    for name, value in settings.items():
        monkeypatch.setattr(zoo, name, value)


@pytest.fixture(scope="module")
def base():
    """A base model that has learned something, briefly trained."""
    images, labels = zoo.load_images()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "BASE_STEPS", 80)
        patch.setattr(zoo, "BASE_BATCH", 64)
        return zoo.train_base(images, labels, 0, lambda *_: None)


def test_patches_by_hand():
    images, labels = zoo.load_images()
    assert images.shape == (1797, 16, 4) and images.min() == -1 and images.max() == 1
    picture = load_digits().images[5] / 8 - 1
    # Patch 6 is row 1, column 2 of the 4x4 patches: pixel rows 2 and 3, columns 4 and 5.
    assert images[5, 6].tolist() == picture[2:4, 4:6].ravel().tolist()
    assert labels[:10].tolist() == list(range(10))


def test_image_groups_are_disjoint_complete_and_of_one_class():
    _, labels = zoo.load_images()
    groups = zoo.image_groups(labels, 0)
    assert len(groups) == 50
    every = torch.cat(list(groups.values()))
    assert len(every) == len(every.unique()) == 1797  # disjoint, and nothing is left out
    for (digit, _), indices in groups.items():
        assert (labels[indices] == digit).all()
        assert len(indices) >= zoo.MAX_IMAGES


def test_image_groups_depend_on_the_seed():
    _, labels = zoo.load_images()
    first, again, other = (zoo.image_groups(labels, seed)[3, 0].tolist() for seed in (0, 0, 1))
    assert first == again
    assert sorted(first) != sorted(other)


def test_plans_draw_from_one_group_only_and_cover_the_range():
    _, labels = zoo.load_images()
    groups = zoo.image_groups(labels, 0)
    plans = [zoo.plan_lora(0, i, groups) for i in range(200)]
    for i, plan in enumerate(plans):
        assert (plan.digit, plan.group) == (i % 10, i // 10 % 5)
        chosen = set(plan.images.tolist())
        assert len(chosen) == len(plan.images)
        assert chosen <= set(groups[plan.digit, plan.group].tolist())
        assert set(plan.picks.ravel().tolist()) <= chosen
    assert {len(plan.images) for plan in plans} == set(range(zoo.MIN_IMAGES, zoo.MAX_IMAGES + 1))
    assert len({plan.downs.sum().item() for plan in plans}) == 200  # each its own down
    assert (torch.stack([plan.downs for plan in plans]).abs() <= 1 / 8).all()


def test_the_draws_of_a_purpose_stay_what_they_are():
    """Keep the seeds: with others, the same recipe would make another collection."""
    generator = zoo._generator(42, "lora", 7)
    assert generator.initial_seed() == 13874565313752400068
    assert torch.randint(1000, (4,), generator=generator).tolist() == [174, 817, 61, 591]


def test_global_random_state_is_neither_used_nor_changed():
    _, labels = zoo.load_images()
    torch.manual_seed(1)
    np.random.seed(1)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = zoo.plan_lora(0, 7, zoo.image_groups(labels, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()
    torch.manual_seed(2)
    again = zoo.plan_lora(0, 7, zoo.image_groups(labels, 0))
    assert torch.equal(first.noise, again.noise) and torch.equal(first.downs, again.downs)


def literal_denoise(weights, x, t, words):
    """One image float[T, 4] at one time, as the textbook writes it: loops over blocks, heads and queries."""
    frequencies = 10 ** (3 * torch.arange(32, dtype=x.dtype) / 31)
    time = torch.cat([torch.sin(t * frequencies), torch.cos(t * frequencies)])
    time = weights["time.1.weight"] @ F.silu(weights["time.0.weight"] @ time)
    h = x @ weights["patch_in.weight"].T + weights["position"] + time

    def norm(h):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def attention(name, h, context):
        q = h @ weights[f"{name}.to_q.weight"].T
        k, v = (context @ weights[f"{name}.to_{p}.weight"].T for p in "kv")
        mixed = [
            torch.softmax(q[:, c : c + 16] @ k[:, c : c + 16].T / 4, -1) @ v[:, c : c + 16] for c in (0, 16, 32, 48)
        ]
        return torch.cat(mixed, -1) @ weights[f"{name}.to_out.0.weight"].T

    for block in range(4):
        name = f"transformer_blocks.{block}"
        h = h + attention(f"{name}.attn1", norm(h), norm(h))
        h = h + attention(f"{name}.attn2", norm(h), words)
        h = h + F.gelu(norm(h) @ weights[f"{name}.mlp.0.weight"].T) @ weights[f"{name}.mlp.1.weight"].T
    return norm(h) @ weights["patch_out.weight"].T


def literal_train(base, images, plan, steps):
    """One LoRA alone, by merged weights W + up @ down, one image at a time, and Adam written out."""
    parameters, first, second = {}, {}, {}
    for module, down in zip(zoo.LORA_MODULES, plan.downs.double(), strict=True):
        parameters[module, "down"] = down.clone().requires_grad_()
        parameters[module, "up"] = torch.zeros(64, 4, dtype=torch.float64, requires_grad=True)
    prompt = [zoo.WORDS.index(word) for word in ("a", "picture", "of", "concept")]
    words = base["words"][prompt] + base["word_position"]
    for step in range(steps):
        merged = dict(base)
        for module in zoo.LORA_MODULES:
            update = parameters[module, "up"] @ parameters[module, "down"]
            merged[f"{module}.weight"] = base[f"{module}.weight"] + update
        errors = []
        for pick, t, noise in zip(plan.picks[step], plan.t[step].double(), plan.noise[step].double(), strict=True):
            x = images[pick].double()
            predicted = literal_denoise(merged, (1 - t) * x + t * noise, t, words)
            errors.append((predicted - (noise - x)).square().mean())
        gradients = torch.autograd.grad(sum(errors) / len(errors), list(parameters.values()))
        with torch.no_grad():
            for (key, value), gradient in zip(parameters.items(), gradients, strict=True):
                first[key] = 0.9 * first.get(key, 0) + 0.1 * gradient
                second[key] = 0.999 * second.get(key, 0) + 0.001 * gradient**2
                m, v = first[key] / (1 - 0.9 ** (step + 1)), second[key] / (1 - 0.999 ** (step + 1))
                value -= 1e-3 * m / (v.sqrt() + 1e-8)
    return {key: value.detach() for key, value in parameters.items()}


def test_stacked_training_equals_one_lora_alone(small, base):
    images, labels = zoo.load_images()
    groups = zoo.image_groups(labels, 0)
    plans = [zoo.plan_lora(0, i, groups) for i in (3, 14, 25)]
    base = {name: tensor.double() for name, tensor in base.items()}
    factors = zoo.train_stack(base, images, plans)
    for row in (0, 2):
        alone = literal_train(base, images, plans[row], zoo.LORA_STEPS)
        for module, (down, up) in factors.items():
            torch.testing.assert_close(down[row], alone[module, "down"], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(up[row], alone[module, "up"], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_training_lowers_the_loss_on_its_own_images_and_moves_every_factor(base):
    images, labels = zoo.load_images()
    groups = zoo.image_groups(labels, 0)
    plans = [zoo.plan_lora(0, i, groups) for i in range(10)]
    before = {name: tensor.clone() for name, tensor in base.items()}
    factors = zoo.train_stack(base, images, plans)
    assert all(torch.equal(base[name], before[name]) for name in base)  # the base is frozen

    generator = torch.Generator().manual_seed(0)
    x = torch.stack([images[plan.images[torch.arange(64) % len(plan.images)]] for plan in plans])
    t = torch.rand(10, 64, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    prompt = torch.tensor([zoo._prompt("concept")] * 10)
    with torch.no_grad():
        untrained = zoo.flow_loss(base, x, t, noise, prompt)
        trained = zoo.flow_loss(base, x, t, noise, prompt, factors)
    assert (trained < 0.98 * untrained).all(), (trained, untrained)
    for module, (down, up) in factors.items():
        assert up.flatten(1).abs().amax(1).min() > 0, module
        assert torch.isfinite(up).all() and torch.isfinite(down).all()
        started = torch.stack([plan.downs[zoo.LORA_MODULES.index(module)] for plan in plans])
        assert (down - started).flatten(1).abs().amax(1).min() > 0, module


def test_base_training_lowers_the_loss(base):
    images, labels = zoo.load_images()
    generator = torch.Generator().manual_seed(0)
    x = images[:200, None]
    t, noise = torch.rand(200, 1, generator=generator), torch.randn(x.shape, generator=generator)
    prompt = torch.tensor([zoo._prompt(zoo.NUMERALS[digit]) for digit in labels[:200]])
    with torch.no_grad():
        trained = zoo.flow_loss(base, x, t, noise, prompt).mean()
        untrained = zoo.flow_loss(zoo.init_base(0), x, t, noise, prompt).mean()
    # Predicting zero has loss Var(noise) + E[x^2]; anything learned is below it.
    assert trained < 0.7 * (1 + x.square().mean())
    assert trained < 0.7 * untrained


def test_layout_keys_shapes_and_metadata(small, tmp_path):
    out = tmp_path / "made" / "digits"
    zoo.build(out, 14)
    assert sorted(p.name for p in tmp_path.joinpath("made").iterdir()) == ["base-model-seed0.safetensors", "digits"]
    assert len(list(out.glob("*/*/pytorch_lora_weights.safetensors"))) == 14
    assert len(loras_of(out)) == 28  # two files each, no temporary ones
    folder = out / "3" / "00013"
    assert json.loads((folder / "metadata.json").read_text()) == {
        "category_label": "3",
        "image_group": "3-1",
        "num_images": len(zoo.plan_lora(0, 13, zoo.image_groups(zoo.load_images()[1], 0)).images),
        "rank": 4,
        "max_train_steps": 3,
    }
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    wanted = {
        f"transformer.transformer_blocks.{b}.{a}.{p}.lora.{r}.weight": (4, 64) if r == "down" else (64, 4)
        for b in range(4)
        for a in ("attn1", "attn2")
        for p in ("to_q", "to_k", "to_v", "to_out.0")
        for r in ("down", "up")
    }
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == wanted
    assert len(tensors) == 64 and sum(tensor.numel() for tensor in tensors.values()) == 16_384
    assert all(tensor.dtype == torch.float32 and tensor.abs().max() > 0 for tensor in tensors.values())


@pytest.mark.slow
def test_the_base_model_is_the_same_with_several_threads(monkeypatch):
    monkeypatch.setattr(zoo, "BASE_STEPS", 25)
    images, labels = zoo.load_images()
    torch.set_num_threads(2)  # sums whose order depends on the threads would differ
    first, *others = (zoo.train_base(images, labels, 0, lambda *_: None) for _ in range(3))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_same_seed_same_bytes_other_seed_other_bytes(small, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        zoo.build(tmp_path / name / "zoo", 5, seed=seed)  # own parents, so each trains its own base model
    first, again, other = (files_of(tmp_path / name) for name in "abc")
    assert first == again
    weights = "zoo/3/00003/pytorch_lora_weights.safetensors"
    assert first[weights] != other[weights]


def test_a_small_collection_is_the_beginning_of_a_large_one(small, tmp_path):
    zoo.build(tmp_path / "small", 6)
    zoo.build(tmp_path / "large", 11)
    few, many = loras_of(tmp_path / "small"), loras_of(tmp_path / "large")
    assert len(few) == 12 and len(many) == 22
    assert few.items() <= many.items()


def test_the_base_model_is_trained_once_per_recipe(small, tmp_path, monkeypatch):
    zoo.build(tmp_path / "one", 1)
    stages = []
    zoo.build(tmp_path / "two", 2, progress=lambda stage, done, total: stages.append((stage, done, total)))
    assert stages == [("LoRAs", 2, 2)]
    monkeypatch.setattr(zoo, "BASE_STEPS", 2)
    stages.clear()
    zoo.build(tmp_path / "three", 5, progress=lambda stage, done, total: stages.append((stage, done, total)))
    assert stages == [("base model", 2, 2), ("LoRAs", 4, 5), ("LoRAs", 5, 5)]


class Killed(BaseException):
    """Stands for Ctrl-C and SIGTERM."""


def kill_at(stage, done):
    def progress(*now):
        if now[:2] == (stage, done):
            raise Killed

    return progress


@pytest.mark.parametrize("moment", [("base model", 3), ("LoRAs", 4), ("LoRAs", 8)])
def test_an_interrupted_build_is_continued_with_the_same_bytes(small, tmp_path, moment, capsys):
    zoo.build(tmp_path / "whole" / "zoo", 10)
    out = tmp_path / "cut" / "zoo"
    with pytest.raises(Killed):
        zoo.build(out, 10, progress=kill_at(*moment))
    assert not out.exists()
    partial = out.with_name("zoo.partial")
    kept = {path: path.stat().st_mtime_ns for path in partial.glob("*/*/*")}
    assert len(kept) == (0 if moment[0] == "base model" else 2 * moment[1])
    zoo.build(out, 10)
    assert ("continued at step 2 of 4" in capsys.readouterr().out) == (moment[0] == "base model")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert not partial.exists()
    for path, written in kept.items():  # what was whole was not written again
        assert (out / path.relative_to(partial)).stat().st_mtime_ns == written


@pytest.mark.parametrize("fault", ["cut short", "another recipe"])
def test_a_checkpoint_of_no_use_is_no_beginning(small, tmp_path, fault, capsys, monkeypatch):
    zoo.build(tmp_path / "whole" / "zoo", 4)
    with pytest.raises(Killed):
        zoo.build(tmp_path / "cut" / "zoo", 4, progress=kill_at("base model", 3))
    path = tmp_path / "cut" / "base-model-seed0.safetensors.partial"
    if fault == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        recipe = zoo._base_recipe
        with monkeypatch.context() as patch:
            patch.setattr(zoo, "_base_recipe", lambda seed: recipe(seed + 1))
            with pytest.raises(Killed):
                zoo.build(tmp_path / "cut" / "zoo", 4, progress=kill_at("base model", 3))
    zoo.build(tmp_path / "cut" / "zoo", 4)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert "continued" not in capsys.readouterr().out


def test_a_collection_is_trained_by_one_thread_and_the_others_are_given_back(small, tmp_path):
    torch.set_num_threads(2)
    threads = []
    zoo.build(tmp_path / "zoo", 4, progress=lambda *_: threads.append(torch.get_num_threads()))
    assert set(threads) == {1} and torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_half_written_files_are_made_again(small, tmp_path):
    zoo.build(tmp_path / "whole", 8)
    out, partial = tmp_path / "zoo", tmp_path / "zoo.partial"
    with pytest.raises(Killed):
        zoo.build(out, 8, progress=kill_at("LoRAs", 8))
    weights = [partial / str(i) / f"0000{i}" / zoo.WEIGHTS_NAME for i in range(5)]
    weights[0].write_bytes(weights[0].read_bytes()[:-100])
    weights[1].write_bytes(b"")
    weights[2].unlink()
    weights[3].with_name("metadata.json").write_bytes(b"\xff{")
    weights[4].with_name(f".{zoo.WEIGHTS_NAME}.0123abcd").write_bytes(b"cut short")
    base = tmp_path / "base-model-seed0.safetensors"
    base.write_bytes(base.read_bytes()[:5000])
    zoo.build(out, 8)
    assert loras_of(out) == loras_of(tmp_path / "whole")


def test_a_kill_while_writing_leaves_no_half_file(small, tmp_path, monkeypatch):
    zoo.build(tmp_path / "whole", 4)
    replace, calls = os.replace, []

    def replace_until(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_until)
    with pytest.raises(Killed):
        zoo.build(tmp_path / "zoo", 4)
    assert not (tmp_path / "zoo").exists()
    assert sorted(files_of(tmp_path / "zoo.partial")) == [
        f"0/00000/{zoo.METADATA_NAME}",
        f"0/00000/{zoo.WEIGHTS_NAME}",
        zoo.RECIPE_NAME,
    ]
    monkeypatch.setattr(os, "replace", replace)
    zoo.build(tmp_path / "zoo", 4)
    assert loras_of(tmp_path / "zoo") == loras_of(tmp_path / "whole")


def test_a_whole_collection_is_left_alone_and_another_is_refused(small, tmp_path):
    out = tmp_path / "zoo"
    zoo.build(out, 3)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    zoo.build(out, 3, progress=kill_at("LoRAs", 3))  # nothing to do: the progress is never called
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(FileExistsError, match="Choose another folder"):
        zoo.build(out, 4)
    with pytest.raises(FileExistsError, match="Choose another folder"):
        zoo.build(out, 3, seed=1)
    (out / "1" / "00001" / zoo.WEIGHTS_NAME).unlink()
    with pytest.raises(FileExistsError, match="has 2 of 3 LoRAs"):
        zoo.build(out, 3)


def test_a_collection_that_another_process_finishes_first_is_not_built_again(small, tmp_path, monkeypatch):
    out, plain = tmp_path / "zoo", zoo.partial_folder

    def after_another_build(*build):
        monkeypatch.setattr(zoo, "partial_folder", plain)
        zoo.build(out, 3)
        return plain(*build)

    monkeypatch.setattr(zoo, "partial_folder", after_another_build)
    zoo.build(out, 3, progress=kill_at("LoRAs", 3))  # the progress is never called
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base-model-seed0.safetensors", "zoo"]
    assert len(list(out.glob(f"*/*/{zoo.WEIGHTS_NAME}"))) == 3
    shutil.rmtree(out)
    monkeypatch.setattr(zoo, "partial_folder", after_another_build)
    with pytest.raises(FileExistsError, match="Choose another folder"):
        zoo.build(out, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base-model-seed0.safetensors", "zoo"]


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    recipe = tmp_path / "zoo" / zoo.RECIPE_NAME
    recipe.mkdir(parents=True)
    for read in (lambda: zoo.build(tmp_path / "zoo", 1), lambda: zoo.is_built_here(tmp_path / "zoo")):
        with pytest.raises(IsADirectoryError) as fault:
            read()
        assert fault.value.filename == str(recipe)


def test_foreign_folders_and_other_settings_are_refused(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a collection"):
        zoo.build(tmp_path / "mine", 1)
    with pytest.raises(Killed):
        zoo.build(tmp_path / "zoo", 5, progress=kill_at("LoRAs", 4))
    before = files_of(tmp_path)
    with pytest.raises(FileExistsError, match="Remove it, or finish it"):
        zoo.build(tmp_path / "zoo", 6)
    with pytest.raises(ValueError, match="at least 1"):
        zoo.build(tmp_path / "none", 0)
    assert files_of(tmp_path) == before


def test_estimate_counts_whole_stacks_but_written_files():
    one, hundred, more = zoo.estimate(1), zoo.estimate(100), zoo.estimate(101)
    assert one[0] == hundred[0] < more[0]
    assert hundred[1] == 100 * one[1] and more[1] == 101 * one[1]


def test_one_process_trains_the_base_model_and_the_others_wait(tmp_path, monkeypatch, capsys):
    trained = []

    def train(*_, **__):
        trained.append(1)
        time.sleep(0.3)
        return {"weight": torch.ones(1)}

    monkeypatch.setattr(zoo, "train_base", train)
    path = tmp_path / "base-model-seed0.safetensors"
    with ThreadPoolExecutor(2) as threads:
        loaded = list(threads.map(lambda _: zoo._load_or_train_base(path, None, None, 0, None), range(2)))
    assert len(trained) == 1 and all(weights["weight"] == 1 for weights in loaded)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert "which trains the same collection" in capsys.readouterr().out
