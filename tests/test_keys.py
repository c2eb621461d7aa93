"""Keys of every style -> module, role and place in the network; what else a file may hold."""

import json
import random
import re

import pytest
import torch
from headers import Q, header_of, layout_of, pair, refusal
from making import STYLES
from safetensors.torch import save

from loras import keys
from loras.keys import LoraFileError, canonical_module, depth_key, parse_key
from loras.lora_files import parse_header

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
    "MLX": [
        ("model.layers.3.self_attn.q_proj.lora_a", "model_layers_3_self_attn_q_proj", "down"),
        ("model.layers.3.self_attn.q_proj.lora_b", "model_layers_3_self_attn_q_proj", "up"),
    ],
    "PEFT embedding": [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "model_embed_tokens", "down"),
        ("base_model.model.model.embed_tokens.lora_embedding_B", "model_embed_tokens", "up"),
    ],
    "LoHa": [
        ("lora_unet_up_blocks_2_to_q.hada_w1_a", "unet_up_blocks_2_to_q", "hada_w1_a"),
        ("base_model.model.up_blocks.2.to_q.hada_t2", "up_blocks_2_to_q", "hada_t2"),
    ],
    "LoKr": [
        ("lycoris_up_blocks_2_to_q.lokr_w1", "lycoris_up_blocks_2_to_q", "lokr_w1"),
        ("lora_unet_up_blocks_2_to_q.lokr_w2_b", "unet_up_blocks_2_to_q", "lokr_w2_b"),
        ("lora_unet_up_blocks_2_to_q.lokr_t2", "unet_up_blocks_2_to_q", "lokr_t2"),
    ],
}  # fmt: skip


def test_every_family_has_examples():
    assert set(KEYS) == set(keys.KEY_FAMILIES)


@pytest.mark.parametrize(
    ("family", "key", "module", "role"), [(name, *example) for name, examples in KEYS.items() for example in examples]
)
def test_a_key_gives_module_and_role(family, key, module, role):
    parsed = parse_key(key)
    assert (parsed.module, parsed.role) == (module, role)
    assert parsed.adapter == ("default" if family == "PEFT with adapter name" else "")
    assert re.match(keys.KEY_FAMILIES[family], key)


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
        "unet.conv.lora_embedding_A.default.weight",
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
            parse_header(double)


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
    layers = parse_header(json.dumps(entries).encode()).layout.layers
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
