"""Adapters whose update is another product than up·down: read as exact pairs, with the norms of the genuine libraries.

The shapes and norms were written down from LyCORIS 4.1.3 and PEFT 0.21.2, whose modules were given the numbers of
`values`. The norms are those of the change that a module's forward pass makes.
"""

import json
import re

import numpy as np
import pytest
import torch
from headers import header_of, layout_of, load_weights, pair, refusal
from safetensors.torch import save

from loras import pairs
from loras.keys import LoraFileError
from loras.lora_files import parse_header
from loras.scales import ADAPTER_METADATA, CONFIG, NONE, TENSORS, count_scales, module_scales

# Name, shapes of the tensors, alpha as LyCORIS writes it, norm of the update.
LYCORIS = [
    ("LoHa", "w1_a=18x4 w1_b=4x12 w2_a=18x4 w2_b=4x12", 2.0, 1.99182128),
    ("LoHa, rank-stabilised", "w1_a=18x4 w1_b=4x12 w2_a=18x4 w2_b=4x12", 4.0, 3.98364256),
    ("LoHa of a convolution", "w1_a=12x3 w1_b=3x72 w2_a=12x3 w2_b=3x72", 1.0, 1.54799730),
    ("LoHa, Tucker", "w1_a=3x12 w1_b=3x8 w2_a=3x12 w2_b=3x8 t1=3x3x3x3 t2=3x3x3x3", 1.0, 2.00941640),
    ("LoHa, Tucker, 1-d", "w1_a=3x12 w1_b=3x8 w2_a=3x12 w2_b=3x8 t1=3x3x3 t2=3x3x3", 1.0, 0.60926280),
    ("LoHa, Tucker, 3-d", "w1_a=2x6 w1_b=2x4 w2_a=2x6 w2_b=2x4 t1=2x2x3x3x3 t2=2x2x3x3x3", 1.0, 1.23654347),
    ("LoHa of a convolution in groups", "w1_a=12x2 w1_b=2x36 w2_a=12x2 w2_b=2x36", 1.0, 1.11903363),
    ("LoKr", "w1=3x3 w2_a=6x2 w2_b=2x4", 1.0, 0.60199843),
    ("LoKr, both decomposed", "w1_a=3x1 w1_b=1x3 w2_a=6x1 w2_b=1x4", 3.0, 0.50620787),
    ("LoKr, full matrix", "w1=3x3 w2=6x4", 4.0, 2.06506958),
    ("LoKr, factor 2", "w1=2x2 w2_a=9x3 w2_b=3x6", 1.0, 0.38195276),
    ("LoKr, unbalanced", "w1=9x2 w2_a=2x2 w2_b=2x6", 1.0, 0.51515166),
    ("LoKr, whole as its dimension is large", "w1=3x3 w2=6x4", 100.0, 2.06506958),
    ("LoKr of a convolution", "w1=3x2 w2_a=4x1 w2_b=1x36", 2.0, 2.57071545),
    ("LoKr of a convolution, whole", "w1=3x2 w2=4x4x3x3", 8.0, 2.73834669),
    ("LoKr, Tucker", "w1=2x2 w2_a=1x6 w2_b=1x4 t2=1x1x3x3", 2.0, 2.05576016),
    ("LoKr, Tucker, both decomposed", "w1_a=3x1 w1_b=1x2 w2_a=1x4 w2_b=1x4 t2=1x1x3x3", 2.0, 1.14558082),
    ("LoKr, 1-d", "w1=2x2 w2_a=6x1 w2_b=1x12", 2.0, 1.29031452),
    ("LoKr, Tucker, 3-d", "w1=2x2 w2_a=1x3 w2_b=1x2 t2=1x1x3x3x3", 2.0, 0.19827643),
]  # fmt: skip
PATTERNS = {"r": 8, "alpha": 2, "rank_pattern": {"x": 3}, "alpha_pattern": {"x": 12}}
# Name, shapes of the tensors, the scale in PEFT's adapter_config.json, norm of the update.
PEFT = [
    ("LoHa", "w1_a=18x4 w1_b=4x12 w2_a=18x4 w2_b=4x12", {"r": 4, "alpha": 2}, 1.99182128),
    ("LoHa, patterns", "w1_a=18x3 w1_b=3x12 w2_a=18x3 w2_b=3x12", PATTERNS, 11.46235679),
    ("LoHa, Tucker", "w1_a=3x12 w1_b=3x8 w2_a=3x12 w2_b=3x8 t1=3x3x3x3 t2=3x3x3x3", {"r": 3, "alpha": 1}, 2.00941640),
    ("LoHa, 1-d", "w1_a=3x12 w1_b=3x8 w2_a=3x12 w2_b=3x8 t1=3x3x3x1 t2=3x3x3x1", {"r": 3, "alpha": 1}, 0.60926280),
    ("LoHa of a convolution", "w1_a=12x3 w1_b=3x72 w2_a=12x3 w2_b=3x72", {"r": 3, "alpha": 1}, 1.54799730),
    ("LoKr", "w1=3x3 w2_a=6x2 w2_b=2x4", {"r": 2, "alpha": 1}, 0.60199843),
    ("LoKr, both decomposed", "w1_a=3x1 w1_b=1x3 w2_a=6x1 w2_b=1x4", {"r": 1, "alpha": 3}, 0.50620787),
    ("LoKr, whole", "w1=3x3 w2=6x4", {"r": 16, "alpha": 4}, 0.51626739),
    ("LoKr, factor 2", "w1=2x2 w2_a=9x3 w2_b=3x6", {"r": 3, "alpha": 1}, 0.38195276),
    ("LoKr, Tucker", "w1_a=3x1 w1_b=1x2 w2_a=1x4 w2_b=1x4 t2=1x1x3x3", {"r": 1, "alpha": 2}, 1.14558082),
    ("LoKr of a convolution", "w1=3x2 w2_a=4x1 w2_b=1x36", {"r": 1, "alpha": 2}, 2.57071545),
]  # fmt: skip


def values(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(0)
    return {
        key: torch.from_numpy((draw.standard_normal(shape) * 0.5).astype(np.float32))
        for key, shape in sorted(shapes.items())
    }


def tensors_of(name: str, described: str) -> dict[str, torch.Tensor]:
    prefix = {"LoHa": "hada_", "LoKr": "lokr_"}[name[:4]]
    shapes = (part.split("=") for part in described.split())
    return values({prefix + key: tuple(map(int, shape.split("x"))) for key, shape in shapes})


def read(tensors: dict, config: dict | None = None) -> tuple:
    """Layout, matrices of the layers, and scales by module."""
    data = save(tensors)
    header = parse_header(header_of(data), config)
    weights, alphas = load_weights(data, header)
    layout = header.layout
    matrices = [weights[c].reshape(x.shape) for x, c in zip(layout.layers, layout.columns, strict=True)]
    assert sum(modules for _, modules in count_scales(header, config, alphas)) == len(layout.modules)
    return layout, matrices, module_scales(header, alphas, config)


def norms(tensors: dict, config: dict | None = None) -> tuple[dict[str, float], set[str]]:
    """Norm of the update of each module, and the sources of the scales."""
    layout, matrices, scales = read(tensors, config)
    products = [up.astype(np.float64) @ down for down, up in zip(matrices[::2], matrices[1::2], strict=True)]
    found = zip(layout.modules, products, strict=True)
    return {m: abs(scales[m].value) * np.linalg.norm(p) for m, p in found}, {s.source for s in scales.values()}


# ----------------------------------------------------------------------------------------------------------------------
# LoHa and LoKr
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shapes", "alpha", "norm"), LYCORIS, ids=[row[0] for row in LYCORIS])
def test_the_norm_of_an_update_is_that_of_lycoris(name, shapes, alpha, norm):
    tensors = {f"lora_unet_x.{key}": tensor for key, tensor in tensors_of(name, shapes).items()}
    found, sources = norms(tensors | {"lora_unet_x.alpha": torch.tensor(alpha)})
    assert found == {"x": pytest.approx(norm, rel=2e-6)} and sources == {TENSORS}


@pytest.mark.parametrize(("name", "shapes", "config", "norm"), PEFT, ids=[row[0] for row in PEFT])
def test_the_norm_of_an_update_is_that_of_peft(name, shapes, config, norm):
    tensors = {f"base_model.model.m.x.{key}": tensor for key, tensor in tensors_of(name, shapes).items()}
    found, sources = norms(tensors, config | {"peft_type": name[:4].upper()})
    assert found == {"m_x": pytest.approx(norm, rel=2e-6)} and sources == {CONFIG}


def test_a_layer_is_shown_under_a_key_of_its_module():
    for name, shapes, _, _ in LYCORIS:
        tensors = {f"lora_unet_x.{key}": tensor for key, tensor in tensors_of(name, shapes).items()}
        layout, matrices, scales = read(tensors | pair("lora_unet_y", 2, "lora_down", "lora_up"))
        names = [layer.name for layer in layout.layers]
        assert len(set(names)) == 4 and set(names) <= {*tensors, *pair("lora_unet_y", 2, "lora_down", "lora_up")}
        assert [layer.role for layer in layout.layers] == ["down", "up"] * 2
        assert {layer.style for layer in layout.layers} == {name[:4], "kohya"}
        assert {scale.source for scale in scales.values()} == {NONE}
        assert matrices[2].tolist() == torch.ones(2, 6).tolist()


def test_products_are_exact_whatever_the_type():
    tensors = {f"lora_unet_x.{k}": t.half() for k, t in tensors_of(*LYCORIS[0][:2]).items()}
    _, (down, up), _ = read(tensors)
    a1, b1, a2, b2 = (t.double().numpy() for t in tensors.values())
    np.testing.assert_allclose(up.astype(np.float64) @ down, (a1 @ b1) * (a2 @ b2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [16, 17])
def test_a_rank_is_read_up_to_256(rank):
    shapes = {
        f"lora_unet_x.hada_w{n}_{side}": (32, rank) if side == "a" else (rank, 24) for n in (1, 2) for side in "ab"
    }
    if rank == 16:
        assert layout_of(values(shapes)).layers[0].shape == (256, 24)
    else:
        message = refusal(values(shapes))
        assert message.startswith("a LoHa adapter (lora_unet_x.hada_w1_a) whose module x is a pair of rank 289")


def test_a_lokr_of_two_large_factors_is_refused_with_its_rank():
    message = refusal(values({"lora_unet_x.lokr_w1": (20, 32), "lora_unet_x.lokr_w2": (16, 14)}))
    assert message.startswith("a LoKr adapter (lora_unet_x.lokr_w1) whose module x is a pair of rank 280")


WHOLE = {"w1": (3, 3), "w2": (6, 4)}
PARTS = {"w1": (3, 3), "w2_a": (6, 2), "w2_b": (2, 4)}
CORED = {"w1": (2, 2), "w2_a": (1, 6), "w2_b": (1, 4), "t2": (1, 1, 3, 3)}
CP = {"w1_a": (4, 18), "w1_b": (4, 12), "w2_a": (4, 18), "w2_b": (4, 12), "t1": (4, 4, 3, 5), "t2": (4, 4, 3, 5)}
LOHA = {"w1_a": (18, 4), "w1_b": (4, 12), "w2_a": (18, 4), "w2_b": (4, 12)}


@pytest.mark.parametrize(
    ("prefix", "shapes", "words"),
    [
        ("lokr", PARTS | {"w2_a": None}, "has no lokr_w2_a. Save all"),
        ("lokr", PARTS | {"w1": None}, "has no lokr_w1_a, lokr_w1_b"),
        ("lokr", PARTS | {"w1_a": (3, 1)}, "has lokr_w1_a beside lokr_w1, lokr_w2_a, lokr_w2_b"),
        ("lokr", WHOLE | {"t2": (1, 1, 3, 3)}, "has lokr_t2 beside"),
        ("lokr", CORED | {"t1": (1, 1, 3, 3)}, "has lokr_t1 beside"),
        ("lokr", PARTS | {"w2_a": (6, 3)}, r"shapes do not match in module x: lokr_w1 \[3, 3\], lokr_w2_a"),
        ("lokr", PARTS | {"w2_a": (6, 2, 1)}, "shapes do not match"),
        ("lokr", CORED | {"t2": (1, 2, 3, 3)}, "shapes do not match"),
        ("lokr", CORED | {"t2": (1, 1)}, "shapes do not match"),
        ("lokr", CORED | {"w2_a": (6, 2)}, "shapes do not match"),
        ("lokr", WHOLE | {"w1": (3,)}, "shapes do not match"),
        ("lokr", WHOLE | {"w2": (6, 0)}, "shapes do not match"),
        ("lokr", {"w1_a": (3, 1), "w1_b": (1, 3), "w2_a": (6, 2), "w2_b": (2, 4)}, "shapes do not match"),
        ("hada", LOHA | {"w1_b": None}, "a LoHa adapter .* whose module x has no hada_w1_b"),
        ("hada", LOHA | {"t1": (4, 4, 3, 3)}, "has no hada_t2"),
        ("hada", LOHA | {"w2_a": (17, 4)}, "shapes do not match"),
        ("hada", LOHA | {"w2_a": (18, 3), "w2_b": (3, 12)}, "shapes do not match"),
        ("hada", LOHA | {"w2_b": (4, 11)}, "shapes do not match"),
        ("hada", LOHA | {"w1_a": (18, 0)}, "shapes do not match"),
        ("hada", CP | {"t2": (4, 4, 5, 3)}, "shapes do not match"),
        ("hada", LOHA | {"w1_b": (4, 12, 1)}, "shapes do not match"),
        ("lokr", PARTS | {"w1": (3, 3, 1)}, "shapes do not match"),
    ],
)
def test_what_does_not_make_a_product_is_refused(prefix, shapes, words):
    tensors = values({f"lora_unet_x.{prefix}_{key}": shape for key, shape in shapes.items() if shape is not None})
    message = refusal(tensors)
    assert re.search(words, message) and "x" in message and message.endswith(".")


def test_a_module_is_of_one_family():
    tensors = values({f"lora_unet_x.lokr_{key}": shape for key, shape in WHOLE.items()})
    assert "module x is two adapters (" in refusal(tensors | pair("lora_unet_x", 2, "lora_down", "lora_up"))


def test_a_small_header_makes_no_large_matrices():
    """Outer products of two long columns would be 1e10 numbers, of which the file has 2e5."""
    entry = {"dtype": "F32", "data_offsets": [0, 4 * 10**5]}
    tall = {f"x.lokr_{name}": entry | {"shape": [10**5, 1]} for name in ("w1", "w2")}
    with pytest.raises(LoraFileError, match="numbers, more than any LoRA has"):
        parse_header(json.dumps(tall).encode())


def test_pairs_that_memory_cannot_hold_are_refused(monkeypatch):
    monkeypatch.setattr(pairs, "host_memory", lambda: 2**20)
    entry = {"dtype": "F32", "data_offsets": [0, 4 * 50_000], "shape": [10, 5000]}
    entries = {"a.lora_A.weight": entry, "a.lora_B.weight": entry | {"shape": [5000, 10]}}
    with pytest.raises(
        LoraFileError, match=r"100000 numbers: 0.0 GiB of memory are needed to read them, there are 0.0"
    ):
        parse_header(json.dumps(entries).encode())


# ----------------------------------------------------------------------------------------------------------------------
# MLX, embeddings, convolutions, experts
# ----------------------------------------------------------------------------------------------------------------------

MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}


def test_mlx_is_transposed_and_states_the_scale_itself():
    tensors = values({"model.layers.0.q_proj.lora_a": (12, 4), "model.layers.0.q_proj.lora_b": (4, 16)})
    layout, (down, up), scales = read(tensors, MLX)
    a, b = tensors.values()
    assert [layer.shape for layer in layout.layers] == [(4, 12), (16, 4)]
    assert down.tolist() == a.T.tolist() and up.tolist() == b.T.tolist()
    assert [tuple(scale) for scale in scales.values()] == [(20.0, CONFIG)]


def test_older_configurations_of_mlx_state_an_alpha_too():
    tensors = values({"m.lora_a": (12, 4), "m.lora_b": (4, 16)})
    for parameters, scale in (
        ({"rank": 4, "alpha": 16, "scale": 10.0}, 40.0),
        ({"rank": 4, "alpha": 4.0, "scale": 10.0}, 10.0),
        ({"rank": 4, "alpha": None, "scale": 10.0}, 10.0),
    ):
        assert read(tensors, {"lora_parameters": parameters})[2]["m"] == (scale, CONFIG)


def test_mlx_experts_are_modules_each():
    tensors = values({"mlp.gate_proj.lora_a": (3, 4, 12), "mlp.gate_proj.lora_b": (3, 16, 4)})
    a, b = (tensor.numpy() for tensor in tensors.values())
    for first in (a, a.reshape(12, 12)):  # as older versions write it
        tensors["mlp.gate_proj.lora_a"] = torch.from_numpy(first.copy())
        layout, matrices, scales = read(tensors, MLX)
        assert layout.modules == [f"mlp_gate_proj_{number}" for number in range(3)]
        assert layout.layers[4].name == "mlp.gate_proj.lora_a[2]"
        for number in range(3):
            assert matrices[2 * number].tolist() == a[number].tolist()
            assert matrices[2 * number + 1].tolist() == b[number].tolist()
        assert {scale.value for scale in scales.values()} == {20.0}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_parameters": {"rank": 8, "scale": 20.0}}, "says rank 8, where m.lora_a has 4"),
        ({"lora_parameters": {"scale": "much"}}, "unusable alpha or rank"),
        ({"lora_parameters": {"scale": 1e300}}, "scale of module m is 1e[+]300"),
        ({"lora_parameters": {"scale": [1]}}, "unusable alpha or rank"),
        ({"lora_parameters": {"scale": 2.0, "alpha": "much"}}, "unusable alpha or rank"),
        ({"lora_parameters": {"scale": 1e30, "alpha": 1e30}}, "scale of module m is 2[.]5.*e[+]59"),
    ],
)
def test_a_configuration_of_mlx_that_cannot_be_used_is_refused(config, words):
    with pytest.raises(LoraFileError, match=words):
        read(values({"m.lora_a": (12, 4), "m.lora_b": (4, 16)}), config)


@pytest.mark.parametrize("shapes", [((12, 4), (3, 16)), ((12, 4), (4,)), ((3, 4, 12), (2, 16, 4)), ((0, 4), (4, 16))])
def test_shapes_that_are_not_of_mlx_are_refused(shapes):
    message = refusal(values(dict(zip(("m.lora_a", "m.lora_b"), shapes, strict=True))))
    assert message.startswith("shapes do not match in module m: down [")


@pytest.mark.parametrize("end", ["", ".default"])
def test_embeddings_are_pairs_as_they_are(end):
    names = [f"base_model.model.model.embed_tokens.lora_embedding_{side}{end}" for side in "AB"]
    tensors = values(dict(zip(names, ((4, 40), (12, 4)), strict=True)))
    layout, matrices, scales = read(tensors, {"r": 4, "lora_alpha": 8})
    assert layout.modules == ["model_embed_tokens"] and scales["model_embed_tokens"].value == 2.0
    assert [matrix.tolist() for matrix in matrices] == [tensor.tolist() for tensor in tensors.values()]


@pytest.mark.parametrize("kernel", [(3,), (3, 5), (3, 1, 2)])
def test_convolutions_of_every_dimension_are_matrices(kernel):
    ones = (1,) * len(kernel)
    tensors = values({"m.c.lora_A.weight": (4, 8, *kernel), "m.c.lora_B.weight": (12, 4, *ones)})
    layout, (down, up), _ = read(tensors)
    assert [layer.shape for layer in layout.layers] == [(4, 8 * int(np.prod(kernel))), (12, 4)]
    conv = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[len(kernel)]
    a, b = tensors.values()
    inputs = torch.randn(2, 8, *(6,) * len(kernel))
    direct = conv(inputs, torch.from_numpy(up @ down).reshape(12, 8, *kernel))
    torch.testing.assert_close(conv(conv(inputs, a), b), direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("groups", "kernel"), [(2, (3, 3)), (4, (3,)), (4, (1, 1))])
def test_a_convolution_in_groups_has_a_block_diagonal_up(groups, kernel):
    """PEFT gives the up the groups, [out, r / groups ...], and the down none."""
    ones = (1,) * len(kernel)
    tensors = values({"m.c.lora_A.weight": (4, 8, *kernel), "m.c.lora_B.weight": (12, 4 // groups, *ones)})
    layout, (down, up), scales = read(tensors, {"r": 4, "lora_alpha": 8})
    assert [layer.shape for layer in layout.layers] == [(4, 8 * int(np.prod(kernel))), (12, 4)]
    conv = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d}[len(kernel)]
    a, b = tensors.values()
    inputs = torch.randn(2, 8, *(6,) * len(kernel))
    direct = conv(inputs, torch.from_numpy(up @ down).reshape(12, 8, *kernel))
    torch.testing.assert_close(conv(conv(inputs, a), b, groups=groups), direct, rtol=1e-4, atol=1e-4)
    assert scales["m_c"].value == 2.0


@pytest.mark.parametrize(
    ("names", "up"),
    [(("lora_A", "lora_B"), (12, 3, 1)), (("lora_A", "lora_B"), (9, 2, 1)), (("lora_down", "lora_up"), (12, 2, 1))],
)
def test_other_ranks_of_a_convolution_that_differ_are_refused(names, up):
    tensors = values({f"m.c.{names[0]}.weight": (4, 8, 3), f"m.c.{names[1]}.weight": up})
    assert "ranks differ in module m_c: down [4, 24], up" in refusal(tensors)


EXPERTS = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
# Of 4 experts with parameters [4, 16, 12] and [4, 12, 8], as PEFT nests them.
STACKED = {
    "base_model.model.mlp.experts.base_layer.lora_A.weight": (8, 12),
    "base_model.model.mlp.experts.base_layer.lora_B.weight": (16, 8),
    "base_model.model.mlp.experts.lora_A.weight": (8, 8),
    "base_model.model.mlp.experts.lora_B.weight": (12, 8),
}
NORMS = {
    "mlp_experts": (15.4230846, 12.7088356, 14.0970281, 17.9313763),
    "mlp_experts_base_layer": (15.894251, 15.3039946, 19.5750125, 24.7266354),
}


def test_the_experts_that_peft_stacks_are_modules_each():
    found, _ = norms(values(STACKED), EXPERTS | {"target_parameters": TARGETS})
    assert found == {
        f"{module}_{number}": pytest.approx(norm, rel=2e-6)
        for module, of_experts in NORMS.items()
        for number, norm in enumerate(of_experts)
    }


def test_only_experts_are_split():
    tensors = values(STACKED) | pair("base_model.model.mlp.gate", 2, "lora_A", "lora_B")
    layout, _, scales = read(tensors, EXPERTS | {"target_parameters": TARGETS})
    assert len(layout.modules) == 9 and "mlp_gate" in layout.modules
    assert {scale.value for scale in scales.values()} == {4.0}
    kept = parse_header(header_of(save(tensors)), EXPERTS | {"target_parameters": TARGETS}).keeping(
        frozenset({"mlp_experts_2", "mlp_gate"})
    )
    weights, _ = load_weights(save(tensors), kept)
    down = tensors["base_model.model.mlp.experts.lora_A.weight"].reshape(4, 2, 8)[2]
    up = tensors["base_model.model.mlp.experts.lora_B.weight"].reshape(12, 2, 4)[:, :, 2]
    at = kept.layout.modules.index("mlp_experts_2") * 2
    assert weights[kept.layout.columns[at]].tolist() == down.flatten().tolist()
    assert weights[kept.layout.columns[at + 1]].tolist() == up.flatten().tolist()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EXPERTS, "has stacked experts, whose number"),
        (EXPERTS | {"target_parameters": ["gate.weight"]}, "has stacked experts, whose number"),
        ({"lora_alpha": 8, "target_parameters": TARGETS}, "has stacked experts, whose number"),
        (EXPERTS | {"target_parameters": ["experts.other"], "r": 3}, "says rank 3 for mlp.experts"),
        (
            EXPERTS | {"target_parameters": TARGETS, "rank_pattern": {"down_proj": 4}},
            "several ranks for the parameters",
        ),
        (EXPERTS | {"target_parameters": TARGETS, "alpha_pattern": {"down_proj": 4}}, "several for the parameters"),
        (EXPERTS | {"target_parameters": TARGETS, "r": 4}, "gives the parameters of mlp.experts unequal numbers"),
        (EXPERTS | {"target_parameters": ["a"] * 2000}, "target_parameters has 2000 names"),
    ],
)
def test_experts_of_which_the_number_is_not_known_are_refused(config, words):
    shapes = {
        key: tuple(12 if side == 8 and "base_layer" in key else side for side in shape)
        for key, shape in STACKED.items()
    }
    with pytest.raises(LoraFileError, match=words):
        read(values(shapes if config.get("r") == 4 else STACKED), config)


def test_a_rank_above_both_other_sides_is_refused():
    tensors = values({"m.a.lora_A.weight": (24, 12), "m.a.lora_B.weight": (16, 24)})
    message = refusal(tensors)
    assert message.startswith("module m_a has rank 24, above both other sides: down [24, 12], up [16, 24]. ")
    assert layout_of(values({"m.a.lora_A.weight": (14, 12), "m.a.lora_B.weight": (16, 14)})).layers[0].rank == 14


def test_a_stack_whose_rank_is_above_both_sides_is_read_with_its_configuration():
    shapes = {"m.experts.lora_A.weight": (48, 12), "m.experts.lora_B.weight": (16, 48)}
    layout, _, _ = read(values(shapes), {"r": 4, "lora_alpha": 4, "target_parameters": ["experts.weight"]})
    assert len(layout.modules) == 12


@pytest.mark.parametrize(
    "module",
    ["mlp.experts", "base_model.model.m.experts.base_layer.base_layer", "experts", "m.block_sparse_moe.input_linear"],
)
def test_stacked_experts_without_their_configuration_are_refused(module):
    tensors = values({f"{module}.lora_A.weight": (8, 64), f"{module}.lora_B.weight": (48, 8)})
    message = refusal(tensors)
    assert message.startswith(f"{module}.lora_A.weight has stacked experts") and "target_parameters" in message
    names = ("mlp.experts.0", "mlp.shared_experts", "mlp.router")  # modules of one matrix
    for name in names if module == "mlp.experts" else ():
        assert len(layout_of(pair(name, 4, "lora_A", "lora_B")).modules) == 1


@pytest.mark.parametrize("component", ["", "transformer"])
def test_the_header_too_may_tell_experts_apart(component):
    front = f"{component}." if component else ""
    config = {"r": 2, "lora_alpha": 8, "rank_pattern": {"^mlp.gate": 4}, "target_parameters": TARGETS}
    fields = {ADAPTER_METADATA: json.dumps({front + name: value for name, value in config.items()})}
    tensors = {key.replace("base_model.model.", front): tensor for key, tensor in values(STACKED).items()}
    header = parse_header(header_of(save(tensors, fields)))
    assert len(header.layout.modules) == 8
    assert {tuple(scale) for scale in module_scales(header, {}, None).values()} == {(4.0, ADAPTER_METADATA)}


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"use_qalora": True, "qalora_group_size": 4}, "a QA-LoRA adapter"),
        ({"use_qalora": "true"}, "a QA-LoRA adapter"),
        ({"use_bdlora": {"nblocks": 2}}, "a BD-LoRA adapter"),
        ({"kasa_config": {"beta": 1e-4}}, "a KaSA adapter"),
    ],
)
def test_variants_of_a_lora_that_are_no_pair_are_refused(config, family):
    tensors = pair("m.a", 4, "lora_A", "lora_B")
    with pytest.raises(LoraFileError, match=family):
        read(tensors, {"r": 4, "lora_alpha": 8} | config)
    fields = {ADAPTER_METADATA: json.dumps({f"unet.{name}": value for name, value in config.items()})}
    with pytest.raises(LoraFileError, match=f"{family}.*lora_adapter_metadata"):
        parse_header(header_of(save(tensors, fields)))
    read(tensors, {"r": 4, "lora_alpha": 8} | dict.fromkeys(config, None))
    read(tensors, {"r": 4, "lora_alpha": 8} | dict.fromkeys(config, False))
