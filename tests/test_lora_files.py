import io
import json
import math
import os
import pickle
import random
import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import STYLES, lora, module_names, write_lora
from safetensors.torch import save

from loras import lora_files
from loras.lora_files import (
    LoraFileError,
    canonical_module,
    depth_key,
    load_weights,
    parse_key,
    parse_layout,
    read_header,
)

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def layout_of(tensors: dict) -> lora_files.Layout:
    return parse_layout(header_of(save(tensors)))


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def file_of(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def pair(module: str = Q, rank: int = 2, down: str = "lora.down", up: str = "lora.up") -> dict:
    """A diffusers pair of a module from 6 to 8 features."""
    return {f"{module}.{down}.weight": torch.ones(rank, 6), f"{module}.{up}.weight": torch.ones(8, rank)}


def refusal(tensors: dict) -> str:
    with pytest.raises(LoraFileError) as error:
        layout_of(tensors)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Keys
# ----------------------------------------------------------------------------------------------------------------------

TEXT = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
BLOCK = "unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1"
KEYS = {
    "numbered": [
        ("lora.down.weight.7", "7", "down"),
        ("lora.up.weight.12", "12", "up"),
    ],
    "diffusers": [
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora.down.weight", f"{BLOCK}_to_q", "down"),
        ("unet.mid_block.attentions.0.to_out.0.lora.up.weight", "unet_mid_block_attentions_0_to_out_0", "up"),
        ("unet.up_blocks.1.attentions.1.proj_in.lora.down.weight", "unet_up_blocks_1_attentions_1_proj_in", "down"),
    ],
    "diffusers text encoder": [
        (f"{TEXT}.lora_linear_layer.down.weight", TEXT.replace(".", "_"), "down"),
        (f"{TEXT}.lora_linear_layer.up.weight", TEXT.replace(".", "_"), "up"),
    ],
    "diffusers legacy": [
        ("unet.mid_block.attn1.processor.to_q_lora.down.weight", "unet_mid_block_attn1_to_q", "down"),
        ("unet.mid_block.attn1.processor.to_out_lora.up.weight", "unet_mid_block_attn1_to_out_0", "up"),
        ("unet.mid_block.attn1.to_v_lora.up.weight", "unet_mid_block_attn1_to_v", "up"),
        ("unet.up_blocks.1.attn2.processor.to_k_lora.down.weight", "unet_up_blocks_1_attn2_to_k", "down"),
    ],
    "PEFT": [
        ("base_model.model.unet.up_blocks.0.to_k.lora_A.weight", "unet_up_blocks_0_to_k", "down"),
        ("transformer.norm_out.linear.lora_B.weight", "transformer_norm_out_linear", "up"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks_0_img_attn_qkv", "down"),
    ],
    "PEFT with adapter name": [
        ("base_model.model.down_blocks.0.to_q.lora_A.default.weight", "down_blocks_0_to_q", "down"),
        ("base_model.model.down_blocks.0.to_q.lora_B.default.weight", "down_blocks_0_to_q", "up"),
    ],
    "PEFT bare": [
        ("base_model.model.diffusion_model.blocks.2.to_q.lora_A", "blocks_2_to_q", "down"),
        ("blocks.2.to_q.lora_B", "blocks_2_to_q", "up"),
    ],
    "kohya": [
        ("lora_unet_up_blocks_2_to_q.lora_down.weight", "unet_up_blocks_2_to_q", "down"),
        ("lora_te_text_model_q_proj.lora_up.weight", "text_encoder_text_model_q_proj", "up"),
        ("lora_te1_text_model_q_proj.lora_down.weight", "text_encoder_text_model_q_proj", "down"),
        ("lora_te2_text_model_q_proj.lora_up.weight", "text_encoder_2_text_model_q_proj", "up"),
        ("lora_te3_encoder_block_0_q.lora_up.weight", "text_encoder_3_encoder_block_0_q", "up"),
        ("lora_unet_down_blocks_0_conv1.lora_mid.weight", "unet_down_blocks_0_conv1", "mid"),
    ],
    "XLabs": [
        ("double_blocks.4.processor.qkv_lora1.down.weight", "double_blocks_4_qkv_lora1", "down"),
        ("double_blocks.4.processor.proj_lora2.up.weight", "double_blocks_4_proj_lora2", "up"),
        ("single_blocks.4.processor.qkv_lora.up.weight", "single_blocks_4_qkv_lora", "up"),
    ],
    "cloneofsimo": [
        ("unet:3:down", "unet_3", "down"),
        ("text_encoder:11:up", "text_encoder_11", "up"),
    ],
}  # fmt: skip


def test_every_family_has_examples():
    assert set(KEYS) == set(lora_files.KEY_FAMILIES)


@pytest.mark.parametrize(
    ("family", "key", "module", "role"), [(name, *example) for name, examples in KEYS.items() for example in examples]
)
def test_a_key_gives_module_and_role(family, key, module, role):
    parsed = parse_key(key)
    assert (parsed.module, parsed.role) == (module, role)
    assert parsed.adapter == ("default" if family == "PEFT with adapter name" else "")
    assert re.match(lora_files.KEY_FAMILIES[family], key)


@pytest.mark.parametrize("key", ["unet.down_blocks.0.weight", "down.weight", "unet.up_blocks.1.up.weight", "alpha"])
def test_block_names_are_not_roles(key):
    assert parse_key(key) is None


@pytest.mark.parametrize("block", ["down_blocks", "up_blocks"])
@pytest.mark.parametrize("role", ["down", "up"])
def test_the_role_is_a_whole_path_part(block, role):
    assert parse_key(f"unet.{block}.1.attentions.0.proj.lora.{role}.weight").role == role


def test_only_a_whole_path_part_is_the_processor():
    assert canonical_module("unet.attn1.processor.to_q") == "unet_attn1_to_q"
    assert canonical_module("unet.processors.0.to_q") == "unet_processors_0_to_q"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("LoHa", "lora_unet_a.hada_w1_a"),
        ("LoHa", "lora_unet_a.hada_t2"),
        ("LoKr", "lora_unet_a.lokr_w1"),
        ("LoKr", "lora_unet_a.lokr_w2_b"),
        ("OFT", "lora_unet_a.oft_blocks"),
        ("full-difference", "diffusion_model.a.diff"),
        ("full-difference", "diffusion_model.a.diff_b"),
        ("LoHa", "lora_unet_a.hada_w2_b"),
        ("LoHa", "lora_unet_a.hada_t1"),
        ("LoKr", "lora_unet_a.lokr_w1_a"),
        ("LoKr", "lora_unet_a.lokr_t2"),
        ("mangled kohya", "lora_te_text_model_q_proj_lora_down.weight"),
        ("mangled kohya", "lora_unet_down_blocks_0_to_q_lora_down.weight"),
        ("mangled kohya", "lora_te1_text_model_q_proj_lora_up.weight"),
    ],
)
def test_other_families_are_refused_by_name(name, key):
    message = refusal(pair() | {key: torch.ones(2, 2)})
    assert name in message
    assert key in message


def test_what_is_not_a_lora_weight_is_counted():
    tensors = pair() | {
        "a.dora_scale": torch.ones(3),
        "b.dora_scale": torch.ones(3),
        "a.lora_magnitude_vector": torch.ones(3),
        "a.lora_magnitude_vector.default.weight": torch.ones(3),
        "a.lora_A.bias": torch.ones(3),
        "<concept>": torch.ones(3),
        "base_model.model.classifier.modules_to_save.default.weight": torch.ones(3),
        "base_model.model.lora_head.modules_to_save.bias": torch.ones(3),
        "base_model.model.classifier.weight": torch.ones(3),  # as PEFT saves them
        "b.alpha": torch.tensor(1.0),
    }
    layout = layout_of(tensors)
    assert len(layout.layers) == 2
    assert layout.ignored == {
        "*.dora_scale": 2,
        "*.lora_magnitude_vector": 2,
        "*.lora_A.bias, *.lora_B.bias": 1,
        "embeddings <...>": 1,
        "*.modules_to_save.*": 2,
        "tensors that are no LoRA": 1,
        "*.alpha without its module": 1,
    }
    assert layout.alphas == {}


@pytest.mark.parametrize(
    "key",
    [
        "unet.conv.lora_embedding_A.default",
        "unet.conv.lora_A.default.bias",
        "unet.conv.lora_E.weight",
        "lora_unet_conv.w_norm",
        "lora_unet_conv.scale_weight",
        "unet.conv.lora_magnitude_vectors",
        "a.lora.down.weight.more",
        "lora_A.weight",
    ],
)
def test_an_unknown_lora_key_is_refused_not_ignored(key):
    assert key in refusal(pair() | {key: torch.ones(2, 6)})


def test_one_file_may_mix_families():
    convolution = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    layout = layout_of(pair() | convolution)
    assert [layer.module for layer in layout.layers] == ["unet_conv_in", "unet_conv_in", *[canonical_module(Q)] * 2]
    assert [layer.shape for layer in layout.layers] == [(2, 36), (8, 2), (2, 6), (8, 2)]


@pytest.mark.parametrize("other", [Q, "unet.conv_in"])
def test_a_second_adapter_name_is_an_error(other):
    first = pair(down="lora_A.default", up="lora_B.default")
    message = refusal(first | pair(other, down="lora_A.style", up="lora_B.style"))
    assert "several adapters" in message
    assert "default" in message
    assert "style" in message


def test_a_key_without_adapter_name_is_no_second_adapter():
    layout = layout_of(pair(down="lora_A.default", up="lora_B.default") | pair("unet.conv_in"))
    assert len(layout.layers) == 4


def test_two_keys_of_one_module_and_role_are_an_error():
    kohya = "lora_" + Q.replace(".", "_") + ".lora_down.weight"
    message = refusal(pair() | {kohya: torch.ones(2, 6)})
    assert kohya in message
    assert f"{Q}.lora.down.weight" in message


@pytest.mark.parametrize("other", ["unet.a.alpha", "diffusion_model.unet.a.alpha"])
def test_two_alphas_of_one_module_are_an_error(other):
    alphas = {"lora_unet_a.alpha": torch.tensor(1.0), other: torch.tensor(2.0)}
    message = refusal(pair("lora_unet_a", down="lora_down", up="lora_up") | alphas)
    assert message.startswith("two tensors are the alpha of module unet_a: ")
    assert other in message


def test_a_key_that_stands_twice_is_an_error():
    """JSON allows it, and leaves open which one counts."""
    header = header_of(save(pair())).rstrip()
    entries = header[1:-1]
    for double in (b"{" + entries + b"," + entries + b"}", header.replace(b'"dtype"', b'"dtype":"F16","dtype"', 1)):
        with pytest.raises(LoraFileError, match="two tensors have the key"):
            parse_layout(double)


@pytest.mark.parametrize("odd", ["\n", "\x1b[2J", "\x7f", "\u2028", "\u202e"])
def test_a_key_that_a_terminal_would_obey_is_refused_in_plain_text(odd):
    message = refusal(pair(f"unet{odd}.a"))
    assert message.isprintable()
    assert "is not plain text" in message or "unknown way" in message
    message = refusal({f"model{odd}": torch.ones(2)})
    assert message.isprintable()
    assert message.startswith("no LoRA pair")


def test_a_message_is_short_however_long_a_key_is():
    message = refusal(pair("x" * 100_000))
    assert len(message) < 1100
    assert message.startswith("a key of 100017 characters, xxx")
    assert message.endswith("Is it a LoRA?")


def test_keys_of_other_alphabets_are_read():
    assert layout_of(pair("unet.блок.注意")).layers[0].module == "unet_блок_注意"


# ----------------------------------------------------------------------------------------------------------------------
# One network in every style; its order
# ----------------------------------------------------------------------------------------------------------------------

# Modules of a network in its order; to_q, to_k, to_v and to_out.0 are what the legacy style can write.
NETWORK = [
    f"unet.{block}.attentions.{i}.transformer_blocks.0.{attention}.{projection}"
    for block in ("down_blocks.0", "down_blocks.2", "down_blocks.10", "mid_block", "up_blocks.1", "up_blocks.11")
    for i in (0, 2, 10)
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
]


@pytest.mark.parametrize("style", STYLES)
def test_one_network_is_the_same_in_every_style(style):
    keys = [STYLES[style](module, role) for module in NETWORK for role in ("down", "up")]
    entries = {key: {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 0]} for key in sorted(keys)}
    layers = parse_layout(json.dumps(entries).encode()).layers
    assert [layer.name for layer in layers] == keys
    assert [layer.module for layer in layers[::2]] == [module.replace(".", "_") for module in NETWORK]
    assert [layer.role for layer in layers] == ["down", "up"] * len(NETWORK)


ORDER = [
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.v_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.2.mlp.fc1",
    "text_encoder.text_model.encoder.layers.10.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    "transformer.transformer_blocks.2.attn.to_q",
    "transformer.transformer_blocks.10.attn.to_q",
    "transformer.single_transformer_blocks.0.attn.to_q",
    "transformer.single_transformer_blocks.0.attn.to_k",
    "unet.conv_in",
    "unet.down_blocks.0.attentions.0.proj_in",
    "unet.down_blocks.0.attentions.0.proj_out",
    "unet.down_blocks.2.attentions.0.proj_in",
    "unet.down_blocks.10.attentions.0.proj_in",
    "unet.mid_block.attentions.0.proj_in",
    "unet.up_blocks.0.attentions.0.proj_in",
    "unet.conv_out",
]


@pytest.mark.parametrize("seed", range(3))
def test_layers_stand_in_the_network_order(seed):
    tensors = {name: tensor for module in ORDER for name, tensor in pair(module).items()}
    names = list(tensors)
    keys = random.Random(seed).sample(names, len(names))
    layers = layout_of({key: tensors[key] for key in keys}).layers
    assert [layer.name for layer in layers] == names


def test_numbered_and_cloneofsimo_are_in_the_order_of_their_numbers():
    numbered = {f"lora.{role}.weight.{i}": torch.ones(2, 2) for i in (10, 2, 1) for role in ("up", "down")}
    layers = layout_of(numbered).layers
    assert [(layer.module, layer.role) for layer in layers][::2] == [("1", "down"), ("2", "down"), ("10", "down")]
    keys = [f"{part}:{i}:{role}" for part in ("unet", "text_encoder") for i in (10, 2) for role in ("up", "down")]
    layers = layout_of({key: torch.ones(2, 2) for key in keys}).layers
    assert [layer.module for layer in layers[::2]] == ["text_encoder_2", "text_encoder_10", "unet_2", "unet_10"]


def test_equal_looking_modules_keep_their_pairs_together():
    modules = ["unet_1_a", "unet_01_a", "unet__1_a"]
    ordered = sorted(((m, r) for r in ("up", "down") for m in modules), key=lambda layer: depth_key(*layer))
    assert [role for _, role in ordered] == ["down", "up"] * 3
    assert ordered == sorted(
        ((m, r) for m in reversed(modules) for r in ("up", "down")), key=lambda layer: depth_key(*layer)
    )


@pytest.mark.parametrize("module", ["unet_²", "unet_" + "9" * 5000, "", "_", "\n"])
def test_any_module_has_a_place(module):
    assert sorted([(module, "up"), (module, "down")], key=lambda layer: depth_key(*layer))[0] == (module, "down")


# ----------------------------------------------------------------------------------------------------------------------
# Scales, shapes, dtypes
# ----------------------------------------------------------------------------------------------------------------------


def scales_of(tensors: dict, config: dict | None = None) -> dict:
    data = save(tensors)
    layout = parse_layout(header_of(data))
    _, alphas = load_weights(data, layout)
    return lora_files.update_scales(layout, alphas, config)


def peft(*modules: str, rank: int = 4) -> dict:
    return {k: v for m in modules for k, v in pair(f"base_model.model.{m}", rank, "lora_A", "lora_B").items()}


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (torch.tensor(2.0), 0.5),
        (torch.tensor([8.0]), 2.0),
        (torch.tensor(2), 0.5),
        (torch.tensor(0.0), 1.0),
        (None, 1.0),
    ],
)
def test_kohya_alpha_over_rank(alpha, scale):
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    assert scales_of(tensors if alpha is None else tensors | {"lora_unet_a.alpha": alpha}) == {"unet_a": scale}


def test_alpha_of_each_module_is_its_own_and_half_precision_is_read():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up") | pair("lora_unet_b", 2, "lora_down", "lora_up")
    tensors |= {"lora_unet_a.alpha": torch.tensor(1.0).bfloat16(), "lora_unet_b.alpha": torch.tensor(1.0).half()}
    assert scales_of(tensors) == {"unet_a": 0.25, "unet_b": 0.5}


def test_an_alpha_that_is_no_number_is_refused_from_the_header():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    assert "lora_unet_a.alpha" in refusal(tensors | {"lora_unet_a.alpha": torch.ones(2)})


def test_an_alpha_of_a_type_that_is_no_number_is_refused():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    assert "of type BOOL" in refusal(tensors | {"lora_unet_a.alpha": torch.tensor(True)})


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e300])
def test_an_alpha_that_is_not_finite_is_refused(alpha):
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    with pytest.raises(LoraFileError, match="unet_a"):
        scales_of(tensors | {"lora_unet_a.alpha": torch.tensor(alpha, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (None, 1.0),
        ({}, 1.0),
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"lora_alpha": 0, "r": 4}, 1.0),
        ({"lora_alpha": None}, 1.0),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"a.to_q": 2}}, 0.5),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"to_q": 2}, "use_rslora": True}, 1.0),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {r"^unet\.a\.to_[qk]": 2}}, 0.5),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"o_q": 2, "a": 2, "b.to_q": 2}}, 2.0),
        ({"lora_alpha": 8, "r": 16, "rank_pattern": {"to_q": 4}}, 2.0),
        ({"lora_alpha": 8, "r": 16, "rank_pattern": {r"^unet\.a\.to_[qk]": 4}, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "r": 16, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"a.to_q": 16}}, 4.0),
        ({"lora_alpha": 8, "r": 4, "rank_pattern": {"to_k": 16, "o_q": 16}, "alpha_pattern": {}}, 2.0),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"to_q": 2, "a.to_q": 16}}, 0.5),  # the first one, as in PEFT
        ({"lora_alpha": 8, "r": 4, "rank_pattern": None, "alpha_pattern": None}, 2.0),
    ],
)
def test_peft_scale(config, scale):
    assert scales_of(peft("unet.a.to_q"), config) == {"unet_a_to_q": scale}


def test_patterns_are_of_single_modules():
    tensors = peft("unet.a.to_q", rank=4) | peft("unet.b.to_q", rank=2)
    config = {"lora_alpha": 8, "r": 4, "rank_pattern": {"b.to_q": 2}, "alpha_pattern": {"b.to_q": 1}}
    assert scales_of(tensors, config) == {"unet_a_to_q": 2.0, "unet_b_to_q": 0.5}
    root = scales_of(tensors, config | {"use_rslora": True})
    assert root == {"unet_a_to_q": 4.0, "unet_b_to_q": pytest.approx(1 / math.sqrt(2))}


def test_an_alpha_in_the_file_comes_before_the_configuration():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up") | pair("lora_unet_b", 4, "lora_down", "lora_up")
    tensors |= {"lora_unet_a.alpha": torch.tensor(1.0)}
    assert scales_of(tensors, {"lora_alpha": 64, "r": 4, "use_rslora": True}) == {"unet_a": 0.25, "unet_b": 32.0}


@pytest.mark.parametrize("config", [{"r": 8}, {"r": 4, "rank_pattern": {"a.to_q": 2}}, {"r": float("nan")}])
def test_a_configuration_of_another_rank_is_of_another_file(config):
    with pytest.raises(LoraFileError, match=r"adapter_config.json says rank .* for unet.a.to_q, where the file has 4"):
        scales_of(peft("unet.a.to_q"), {"lora_alpha": 8, **config})


def test_alpha_pattern_is_of_single_modules_in_every_style():
    config = {"lora_alpha": 8, "alpha_pattern": {"b.to_q": 2}}
    assert scales_of(peft("unet.a.to_q", "unet.b.to_q"), config) == {"unet_a_to_q": 2.0, "unet_b_to_q": 0.5}
    assert scales_of(pair("unet.a.to_q", 4) | pair("unet.b.to_q", 4), config) == {
        "unet_a_to_q": 2.0,
        "unet_b_to_q": 0.5,
    }


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": "much"},
        {"lora_alpha": [1]},
        {"lora_alpha": float("nan")},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"to_q": "x"}},
        {"alpha_pattern": {"to_q": 10**400}},
        {"alpha_pattern": {"a{99999999999}": 1}},
        {"alpha_pattern": {"(" * 5000 + ")" * 5000: 1}},
        {"lora_alpha": 10**400},
        {"r": "four"},
        {"r": {}, "lora_alpha": {"a": 1}},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 1}},
    ],
)
def test_an_unusable_adapter_config_is_refused(config):
    with pytest.raises(LoraFileError, match="alpha"):
        scales_of(peft("unet.a.to_q"), config)


def test_convolutions_are_read_as_matrices():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 3, 3, 3, generator=generator), torch.randn(5, 2, 1, 1, generator=generator)
    data = save({"unet.conv_in.lora.down.weight": down, "unet.conv_in.lora.up.weight": up})
    layout = parse_layout(header_of(data))
    weights, _ = load_weights(data, layout)
    assert [layer.shape for layer in layout.layers] == [(2, 27), (5, 2)]
    assert [layer.rank for layer in layout.layers] == [2, 2]
    assert [layer.free_side for layer in layout.layers] == [27, 5]
    assert layout.columns == (slice(0, 54), slice(54, 64))
    assert weights.tolist() == torch.cat([down.flatten(), up.flatten()]).tolist()


def locon(mid: tuple[int, ...] = (2, 2, 3, 5), down: tuple[int, ...] = (2, 4, 1, 1)) -> dict:
    """A convolution from 4 to 6 channels in Tucker form."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": down, "mid": mid, "up": (6, 2, 1, 1)}
    return {f"lora_unet_c.lora_{r}.weight": torch.randn(s, generator=generator) for r, s in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("down", [(2, 4, 1, 1), (2, 4)])
def test_a_mid_is_multiplied_into_the_down(dtype, down):
    """So that up·down is the update that LyCORIS rebuilds: up, mid and down applied one after the other."""
    tensors = {key: tensor.to(dtype) for key, tensor in (locon(down=down) | pair("lora_unet_a")).items()}
    tensors["lora_unet_c.alpha"] = torch.tensor(1.0)
    data = save(tensors)
    layout = parse_layout(header_of(data))
    weights, alphas = load_weights(data, layout)
    assert [(layer.module, layer.role, layer.shape) for layer in layout.layers[2:]] == [
        ("unet_c", "down", (2, 4 * 3 * 5)),
        ("unet_c", "up", (6, 2)),
    ]
    assert lora_files.update_scales(layout, alphas, None) == {"unet_a": 1.0, "unet_c": 0.5}
    _, _, wide, up = (
        weights[columns].reshape(layer.shape) for layer, columns in zip(layout.layers, layout.columns, strict=True)
    )
    factors = {key.split(".")[1][5:]: tensor.double() for key, tensor in tensors.items() if "unet_c.lora" in key}
    update = torch.einsum("oi,ijhw,jc->ochw", factors["up"].flatten(1), factors["mid"], factors["down"].flatten(1))
    np.testing.assert_allclose(up @ wide, update.flatten(1), rtol=1e-4, atol=1e-5)
    inputs = torch.randn(1, 4, 7, 9, dtype=torch.float64)
    conv = torch.nn.functional.conv2d
    through = conv(conv(inputs, factors["down"].reshape(2, 4, 1, 1)), factors["mid"])
    direct = conv(inputs, torch.from_numpy(wide).double().reshape(2, 4, 3, 5))
    torch.testing.assert_close(through, direct, rtol=1e-4, atol=1e-5)
    assert weights[: 2 * 6].tolist() == [1.0] * 12  # its neighbours stay as they are


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (locon(mid=(3, 3, 3, 3)), r"ranks differ in module unet_c: down \[2, 4, 1, 1\], mid \[3, 3, 3, 3\]"),
        (locon(mid=(2, 3, 3, 3)), "ranks differ in module unet_c"),
        (locon(mid=(2, 2)), "ranks differ in module unet_c"),
        (locon(mid=(2, 2, 0, 3)), "ranks differ in module unet_c"),
        (locon(down=(2, 4, 3, 3)), "ranks differ in module unet_c"),
        ({k: t for k, t in locon().items() if "down" not in k}, r"has a mid \[2, 2, 3, 5\] but no down"),
        ({k: t for k, t in locon().items() if "up" not in k}, "has a down .* but no up"),
        ({k: t.int() if "mid" in k else t for k, t in locon().items()}, "mid.weight is of type I32"),
    ],
)
def test_a_mid_that_does_not_fit_is_refused(tensors, words):
    assert re.search(words, refusal(tensors))


def test_a_mid_that_is_not_finite_is_found():
    tensors = locon()
    tensors["lora_unet_c.lora_mid.weight"][1, 0, 2, 2] = torch.nan
    data = save(tensors)
    layout = parse_layout(header_of(data))
    with pytest.raises(LoraFileError, match=r"NaN or infinity in 1 tensors, first in lora_unet_c\.lora_down"):
        lora_files.check_finite(load_weights(data, layout)[0], layout)


@pytest.mark.parametrize(
    ("down", "up"),
    [((2, 6, 3), (8, 2)), ((2,), (8, 2)), ((0, 6), (8, 0)), ((2, 6), (8, 2, 3, 3)), ((2, 6, 1, 1, 1), (8, 2))],
)
def test_other_shapes_are_refused(down, up):
    message = refusal({f"{Q}.lora.down.weight": torch.ones(down), f"{Q}.lora.up.weight": torch.ones(up)})
    assert Q in message
    assert "shape" in message


FLOATS_OF_8_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32, *FLOATS_OF_8_BITS])
def test_every_float_type_is_read_as_float32(dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in lora(1).items()}
    data = save(tensors)
    layout = parse_layout(header_of(data))
    weights, _ = load_weights(data, layout)
    assert {layer.dtype for layer in layout.layers} <= set(lora_files.FLOAT_TYPES)
    assert weights.dtype == "float32"
    for layer, columns in zip(layout.layers, layout.columns, strict=True):
        assert weights[columns].tolist() == tensors[layer.name].float().flatten().tolist()


@pytest.mark.parametrize("dtype", FLOATS_OF_8_BITS)
def test_every_number_of_8_bits_is_torchs(dtype):
    bits = torch.arange(256, dtype=torch.uint8).view(dtype)
    tensors = {f"{Q}.lora.{role}.weight": bits.reshape(16, 16).clone() for role in ("down", "up")}
    weights, _ = load_weights(save(tensors), layout_of(tensors))
    np.testing.assert_array_equal(weights, bits.float().repeat(2).numpy())


def test_types_may_differ_within_a_file():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float16, torch.float32]
    tensors = {key: tensor.to(dtype) for dtype, (key, tensor) in zip(dtypes, lora(3).items(), strict=True)}
    tensors["x.alpha"] = torch.tensor(3, dtype=torch.uint8)  # nothing after it is aligned
    data = save(tensors)
    weights, _ = load_weights(data, layout_of(tensors))
    assert weights.tolist() == torch.cat([tensor.float().flatten() for tensor in list(tensors.values())[:-1]]).tolist()


def reordered(data: bytes, seed: int) -> bytes:
    """The same tensors, in another order of keys and of data, behind a header that ends at an odd byte."""
    header = header_of(data)
    entries, keys, body, moved = json.loads(header), list(json.loads(header)), b"", {}
    random.Random(seed).shuffle(keys)
    for key in keys:
        start, end = entries[key]["data_offsets"]
        moved[key] = entries[key] | {"data_offsets": [len(body), len(body) + end - start]}
        body += data[8 + len(header) + start : 8 + len(header) + end]
    new = json.dumps(moved).encode()
    return file_of(new + b" " * (len(new) % 2 == 0), body)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_keys_and_data_changes_nothing(tmp_path, seed):
    data = save(lora(12) | {f"{module_names(1)[0]}.alpha": torch.tensor(3.0)})
    layout = parse_layout(header_of(data))
    path = tmp_path / "x.safetensors"
    path.write_bytes(reordered(data, seed))
    assert parse_layout(read_header(path)) is layout  # one object, however many files
    weights, alphas = load_weights(path.read_bytes(), layout)
    assert weights.tolist() == torch.cat([tensor.flatten() for tensor in lora(12).values()]).tolist()
    assert list(alphas.values()) == [3.0]


def test_metadata_of_the_training_leaves_the_layout():
    layout = parse_layout(header_of(save(lora(2))))
    for metadata in ({"a": "1"}, {"ss": '}, "x": {', "t": "\\u007b\u00fc"}, {"long": "x" * 10_000}):
        data = save(lora(2), metadata=metadata)
        assert parse_layout(header_of(data)) is layout
        assert parse_layout(header_of(data).replace(b'{"__metadata__":', b'{ "__metadata__" : ')) is layout
        assert load_weights(data, layout)[0].tolist() == load_weights(save(lora(2)), layout)[0].tolist()
    entries = json.loads(header_of(save(lora(2))))
    assert parse_layout(json.dumps(entries | {"__metadata__": {"at": "the end"}}).encode()) is layout
    with pytest.raises(LoraFileError, match="no LoRA pair"):
        parse_layout(b'{"__metadata__":{"a":"b"}}')


@pytest.mark.parametrize("contents", [b"", b"1234567", bytes(400), file_of(b"[1]"), file_of(b'{"a":1}'), b"\xff" * 99])
def test_contents_that_are_no_lora_any_more_are_not_read(contents):
    with pytest.raises(LoraFileError, match="changed since it was indexed"):
        load_weights(contents, parse_layout(header_of(WHOLE)))
    with pytest.raises(LoraFileError, match="changed since it was indexed"):
        load_weights(WHOLE[:-1], parse_layout(header_of(WHOLE)))


def test_another_layout_is_not_read_as_this_one():
    with pytest.raises(LoraFileError, match="changed"):
        load_weights(save(lora(3)), parse_layout(header_of(save(lora(2)))))


def test_an_equal_header_is_checked_once_for_each_size(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_files, "_checked", set())
    opened, original = [], lora_files.safe_open
    monkeypatch.setattr(lora_files, "safe_open", lambda *args: opened.append(1) or original(*args))
    paths = [write_lora(tmp_path / f"{i}.safetensors", lora(seed=i)) for i in range(3)]
    for path in paths * 2:
        read_header(path)
    assert len(opened) == 1
    for spoilt in (paths[0].read_bytes() + b"x", paths[0].read_bytes()[:-1]):
        paths[0].write_bytes(spoilt)
        with pytest.raises(LoraFileError):
            read_header(paths[0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fnuz])
def test_other_types_are_refused(dtype):
    message = refusal({key: tensor.to(dtype) for key, tensor in pair().items()})
    assert Q in message
    assert "type" in message


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong with a file
# ----------------------------------------------------------------------------------------------------------------------

WHOLE = save(lora(1))


def fault(path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(LoraFileError) as error:
        parse_layout(read_header(path))
    return str(error.value)


def test_a_whole_file_is_read(tmp_path):
    layout = parse_layout(read_header(write_lora(tmp_path / "a" / "x.safetensors", lora(2))))
    assert [layer.name for layer in layout.layers] == list(lora(2))
    assert [layer.module for layer in layout.layers[::2]] == [name.replace(".", "_") for name in module_names(2)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n <!doctype HTML>", "web page"),
        (b"<html><body>404</body></html>", "web page"),
        (b"PK\x03\x04" + bytes(100), "pickle.*never loaded.*safetensors"),
        (b"", "incomplete download: has 0 bytes"),
        (b"1234567", "incomplete download: has 7 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((100).to_bytes(8, "little") + b"{}", "incomplete download: has 10 bytes, header promises 108"),
        (WHOLE[:-1], f"incomplete download: has {len(WHOLE) - 1} bytes, header promises {len(WHOLE)}"),
        (file_of(b""), "not a readable safetensors file"),
        (file_of(b"\xff\xfe garbage"), "not a readable safetensors file"),
        (file_of(b"not json"), "not a readable safetensors file"),
        (file_of(b"[1, 2]"), "not a readable safetensors file"),
        (file_of(b'{"a": 1}'), "not a readable safetensors file"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'), "not a readable safetensors file"),
        (file_of(b'{"a": {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)), "not a readable"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', bytes(4)), "not a readable"),
        (file_of(b"[" * 200_000), "not a readable safetensors file"),
        (WHOLE + b"more", "not a readable safetensors file"),
        (file_of(b"{}"), "no LoRA pair"),
    ],
)
def test_what_a_header_shows(tmp_path, data, words):
    message = fault(tmp_path / "x.safetensors", data)
    assert re.search(words, message)
    assert "\n" not in message


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    for length in range(len(WHOLE) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(LoraFileError, match="incomplete download"):
            read_header(path)


def entry(shape=(2, 8), start=0, end=64, dtype="F32") -> str:
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]})


@pytest.mark.parametrize(
    "data",
    [
        (2**60).to_bytes(8, "little") + b"{}",
        (lora_files.MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        *(
            file_of(f'{{"{Q}.lora.down.weight":{first},"{Q}.lora.up.weight":{second}}}'.encode(), bytes(128))
            for first, second in [
                (entry([2**32, 2**32]), entry(start=64, end=128)),  # 2**64 numbers are 0 of them, in 64 bits
                (entry([2**62, 4]), entry(start=64, end=128)),
                (entry([2**63, 2]), entry(start=64, end=128)),
                (entry([2**64, 1]), entry(start=64, end=128)),
                (entry([-2, -8]), entry(start=64, end=128)),
                (entry(start=-64, end=0), entry(start=64, end=128)),
                (entry(start=64, end=0), entry(start=64, end=128)),
                (entry(), entry()),  # one over the other
                (entry(), entry(start=32, end=96)),
                (entry(), entry(start=2**60, end=2**60 + 64)),
                (entry(end=2**64 - 1), entry(start=64, end=128)),
                (entry(end=10**4299), entry(start=64, end=128)),
                (entry(end=int("9" * 4300)), entry(start=64, end=128)),
                (entry(end=1e300), entry(start=64, end=128)),
                (entry(dtype="\u20ac"), entry(start=64, end=128)),
                ("[" * 200_000, entry()),
                ('{"a":' * 50_000, entry()),
            ]
        ),
        file_of(b'{"__metadata__":' + b'{"a":' * 200_000),
        file_of(b'{"__metadata__":{"a":"\\ud800"}}'),
        file_of(b'{"__metadata__":{"a":"\xff\xfe"}}'),
    ],
)
def test_no_memory_is_taken_for_what_a_header_only_promises(tmp_path, data):
    tracemalloc.start()
    try:
        message = fault(tmp_path / "x.safetensors", data)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message.isprintable()
    assert len(message) < 1100
    assert most < 2**20 + 10 * len(data)


def test_a_header_of_the_largest_size_is_read_in_time(tmp_path):
    path = tmp_path / "x.safetensors"
    body, entries = WHOLE[8 + len(header_of(WHOLE)) :], header_of(WHOLE)[1:]
    room = lora_files.MAX_HEADER_BYTES - len(entries) - 40
    texts = b",".join(b'"%06d":"\\""' % i for i in range(10**5))  # many small ones and a long one
    path.write_bytes(file_of(b'{"__metadata__":{%s,"x":"%s"},%s' % (texts, b"x" * (room - len(texts)), entries), body))
    assert path.stat().st_size > lora_files.MAX_HEADER_BYTES
    layout = parse_layout(read_header(path))
    assert layout is parse_layout(header_of(WHOLE))
    assert load_weights(path.read_bytes(), layout)[0].tolist() == load_weights(WHOLE, layout)[0].tolist()


def test_more_tensors_than_any_lora_has_are_refused_before_they_are_parsed(tmp_path):
    empty = ",".join(f'"{i:09}":{entry([0], 0, 0)}' for i in range(lora_files.MAX_TENSORS_BYTES // 60))
    assert "more than any LoRA has" in fault(tmp_path / "x.safetensors", file_of(f"{{{empty}}}".encode()))


def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "x.safetensors"
    os.mkfifo(path)
    with pytest.raises(LoraFileError, match="a pipe or a device, not a file"):
        read_header(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(LoraFileError, match="a pipe or a device, not a file"):
        read_header(path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickles(trap: Trap) -> dict[str, bytes]:
    """The trap in every form that torch has saved checkpoints in."""
    found = {f"protocol {p}": pickle.dumps(trap, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)}
    for name, zipped in (("torch", True), ("torch of old", False)):
        buffer = io.BytesIO()
        torch.save({"a": trap}, buffer, _use_new_zipfile_serialization=zipped)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.parametrize("form", list(pickles(Trap(""))))
def test_a_pickle_in_a_safetensors_file_is_never_loaded(tmp_path, form):
    data = pickles(Trap(tmp_path / "sprung"))[form]
    message = fault(tmp_path / "x.safetensors", data)
    if form not in ("protocol 0", "protocol 1"):  # plain text, and nearly so
        assert message.startswith("a pickle checkpoint: never loaded.")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickles(Trap(tmp_path / "sprung"))["protocol 2"])
    assert (tmp_path / "sprung").exists()  # the trap works


def test_a_header_that_begins_as_a_pickle_does_is_read(tmp_path):
    """640 bytes long: 80 02, as a pickle of protocol 2."""
    tensors = lora(1)
    spare = 640 - len(header_of(save(tensors, metadata={"a": ""})))
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata={"a": "x" * spare}))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert len(parse_layout(read_header(path)).layers) == 2


ENTRY = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(-1, 99), max_size=3),
)


@st.composite
def mutated_headers(draw) -> bytes:
    """The header of a whole file with a few bytes changed, or with a few of its values."""
    header = header_of(WHOLE)
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 4))):
            at, byte = draw(st.integers(0, len(header) - 1)), draw(st.binary(max_size=2))
            header = header[:at] + byte + header[at + draw(st.integers(0, 2)) :]
        return header
    entries = json.loads(header)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(entries)))
        if draw(st.booleans()) and isinstance(entries[key], dict):
            entries[key][draw(st.sampled_from([*ENTRY, "more"]))] = draw(ODD)
        else:
            entries[draw(st.one_of(st.just(key), st.text(max_size=8), st.just("__metadata__")))] = draw(ODD)
    return json.dumps(entries).encode()


@settings(deadline=None, max_examples=300)
@given(header=mutated_headers())
def test_a_mutated_header_is_refused_or_valid(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(file_of(header, WHOLE[8 + len(header_of(WHOLE)) :]))
    try:
        layout = parse_layout(read_header(path))
    except LoraFileError as error:
        assert str(error)
        return
    weights, _ = load_weights(path.read_bytes(), layout)
    assert len(weights) == layout.width == sum(rows * columns for rows, columns in (x.shape for x in layout.layers))
    assert [layer.role for layer in layout.layers] == ["down", "up"] * (len(layout.layers) // 2)


@settings(deadline=None, max_examples=200)
@given(
    keys=st.lists(
        st.text(max_size=12).flatmap(
            lambda m: st.sampled_from([f"{m}.lora.down.weight", f"{m}.lora_B.weight", f"{m}.alpha", m])
        ),
        max_size=5,
    )
)
def test_any_keys_are_refused_or_valid(keys):
    entries = {key: {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} for key in keys}
    try:
        layout = parse_layout(json.dumps(entries).encode())
    except LoraFileError:
        return
    assert layout.layers


@pytest.mark.parametrize("kept", ["down", "up"])
def test_a_missing_partner_is_named(kept):
    tensors = pair("unet.a") | {key: tensor for key, tensor in pair().items() if kept in key.split(".")}
    message = refusal(tensors)
    assert canonical_module(Q) in message
    assert f"has a {kept} {'[2, 6]' if kept == 'down' else '[8, 2]'}" in message


def test_ranks_that_differ_are_shown():
    message = refusal({f"{Q}.lora.down.weight": torch.ones(2, 6), f"{Q}.lora.up.weight": torch.ones(8, 3)})
    assert canonical_module(Q) in message
    assert "down [2, 6], up [8, 3]" in message


def test_without_a_pair_the_first_keys_are_shown():
    message = refusal({"model.a.weight": torch.ones(2, 2), "model.b.weight": torch.ones(2, 2)})
    assert "no LoRA pair" in message
    assert "model.a.weight, model.b.weight" in message
