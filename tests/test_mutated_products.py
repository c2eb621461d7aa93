"""Mutated files of LoHa, LoKr, MLX, embeddings and convolutions: refused in words, or the update is the tensors'."""

import random
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from test_mutations import MUTATORS, flip

from data import CollectionError, index_collection
from experiment import extraction
from loras.keys import canonical_module, parse_key
from loras.lora_files import LoraFileError

MOST_SECONDS = 5.0
SHAPES = {
    "LoHa": {
        **{f"lora_unet_a.hada_w{n}_{side}": (6, 2) if side == "a" else (2, 5) for n in (1, 2) for side in "ab"},
        **{f"lora_unet_c.hada_w{n}_{side}": (2, 6) if side == "a" else (2, 5) for n in (1, 2) for side in "ab"},
        **{f"lora_unet_c.hada_t{n}": (2, 2, 3, 3) for n in (1, 2)},
        "lora_unet_a.alpha": (),
    },
    "LoKr": {
        "m.a.lokr_w1": (2, 2), "m.a.lokr_w2_a": (4, 1), "m.a.lokr_w2_b": (1, 6), "m.a.alpha": (),
        "m.b.lokr_w1": (3, 2), "m.b.lokr_w2": (2, 3), "m.b.alpha": (),
        "m.c.lokr_w1_a": (2, 1), "m.c.lokr_w1_b": (1, 2), "m.c.lokr_w2_a": (1, 4), "m.c.lokr_w2_b": (1, 3),
        "m.c.lokr_t2": (1, 1, 3, 3),
    },
    "MLX": {"model.q.lora_a": (5, 2), "model.q.lora_b": (2, 6), "model.e.lora_a": (3, 2, 5),
        "model.e.lora_b": (3, 6, 2)},
    "PEFT": {
        "m.e.lora_embedding_A": (2, 9), "m.e.lora_embedding_B": (5, 2),
        "m.c.lora_A.weight": (2, 4, 3), "m.c.lora_B.weight": (6, 2, 1),
        "m.g.lora_A.weight": (4, 4, 3, 3), "m.g.lora_B.weight": (6, 2, 1, 1),
    },
}  # fmt: skip
TYPES = {"LoHa": torch.float32, "LoKr": torch.bfloat16, "MLX": torch.float16, "PEFT": torch.float64}


def whole_files() -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: save({key: torch.randn(shape, generator=generator).to(TYPES[name]) for key, shape in shapes.items()})
        for name, shapes in SHAPES.items()
    }


def updates(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The update of each module, less its scale, from the definitions."""
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if parsed := parse_key(key):
            modules[parsed.module][("mlx " if parsed.style == "MLX" else "") + parsed.role] = tensor.double()
    found = {}
    for module, roles in modules.items():
        update = update_of(roles)
        for number, matrix in enumerate(update if update.ndim == 3 and "mlx down" in roles else [update]):
            name = f"{module}_{number}" if "mlx down" in roles and update.ndim == 3 else module
            found[name] = matrix.reshape(len(matrix), -1).numpy()
    return found


def update_of(roles: dict[str, torch.Tensor]) -> torch.Tensor:
    if "mlx down" in roles:
        a, b = roles["mlx down"], roles["mlx up"]
        return b @ a.reshape(len(b), -1, a.shape[-1]) if b.ndim == 3 else (a @ b).T
    if "hada_w1_a" in roles:
        first, second = (part(roles, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
        return first * second
    if "lokr_w1" in roles or "lokr_w1_a" in roles:
        first, second = part(roles, "lokr_w1", ""), part(roles, "lokr_w2", "lokr_t2")
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())
    up, down = roles["up"], roles["down"]
    blocks = [up[i].flatten() for i in range(len(up))]
    groups = down.shape[0] // up.shape[1]
    wide = torch.zeros(len(up), down.shape[0], dtype=torch.float64)
    for i, block in enumerate(blocks):
        start = i // (len(up) // groups) * up.shape[1]
        wide[i, start : start + up.shape[1]] = block
    return wide @ down.flatten(1)


def part(roles: dict[str, torch.Tensor], name: str, core: str) -> torch.Tensor:
    if name in roles:
        return roles[name].flatten(1) if roles[name].ndim == 2 else roles[name]
    a, b = roles[f"{name}_a"], roles[f"{name}_b"]
    return torch.einsum("ij...,ip,jr->pr...", roles[core], a, b) if core in roles else a @ b.flatten(1)


def read(root, path, contents: bytes) -> str:
    path.write_bytes(contents)
    start = time.perf_counter()
    try:
        (file,) = index_collection(root).files
        weights, scales, _ = extraction._read_file(root, file)
    except (CollectionError, LoraFileError) as error:
        assert str(error).isprintable() and len(str(error)) < 2000
        return "refused"
    finally:
        assert time.perf_counter() - start < MOST_SECONDS
    layout, tensors = file.layout, load_file(path)
    found = [weights[c].reshape(x.shape).astype(np.float64) for x, c in zip(layout.layers, layout.columns, strict=True)]
    wanted = updates(tensors)
    assert set(layout.modules) == set(wanted) == set(scales)
    for module, down, up in zip(layout.modules, found[::2], found[1::2], strict=True):
        close = 1e-5 * np.abs(up) @ np.abs(down) + 1e-30
        assert (np.abs(up @ down - wanted[module]) <= close).all()
    alphas = {canonical_module(key.removesuffix(".alpha")) for key in tensors if key.endswith(".alpha")}
    assert set(layout.alphas) == alphas & {key.module for key in map(parse_key, tensors) if key}
    return "accepted"


@pytest.mark.parametrize("count", [400, pytest.param(20_000, id="20,000", marks=pytest.mark.slow)])
def test_a_mutated_file_is_refused_or_its_update_is_that_of_its_tensors(tmp_path, count):
    path = tmp_path / "zoo" / "a" / "x.safetensors"
    path.parent.mkdir(parents=True)
    whole = whole_files()
    outcomes = Counter(read(tmp_path / "zoo", path, contents) for contents in whole.values())
    assert outcomes == {"accepted": len(whole)}
    draw = random.Random(count)
    for i in range(count):
        mutate = MUTATORS[i % len(MUTATORS)]
        mutant = mutate(draw, draw.choice(list(whole.values())))
        if draw.random() < 0.1:
            mutant = flip(draw, mutant or b"x", 0, len(mutant or b"x"))
        outcomes[read(tmp_path / "zoo", path, mutant)] += 1
    assert outcomes["refused"] > count // 3 and outcomes["accepted"] > count // 50
