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
from loras.keys import LoraFileError, canonical_module, parse_key
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
        (TEXT.replace("q_proj", "to_q_lora.down.weight"), TEXT.replace(".", "_"), "down"),
        ("text_encoder_2.text_model.encoder.layers.3.self_attn.to_out_lora.up.weight",
         "text_encoder_2_text_model_encoder_layers_3_self_attn_out_proj", "up"),
        ("text_model.encoder.layers.3.self_attn.to_v_lora.up.weight",
         "text_encoder_text_model_encoder_layers_3_self_attn_v_proj", "up"),
    ],
    "PEFT": [
        ("base_model.model.unet.up_blocks.0.to_k.lora_A.weight", "unet_up_blocks_0_to_k", "down"),
        ("transformer.norm_out.linear.lora_B.weight", "transformer_norm_out_linear", "up"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks_0_img_attn_qkv", "down"),
    ],
    "PEFT with adapter name": [
        ("base_model.model.down_blocks.0.to_q.lora_A.default.weight", "unet_down_blocks_0_to_q", "down"),
        ("base_model.model.down_blocks.0.to_q.lora_B.default.weight", "unet_down_blocks_0_to_q", "up"),
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
    "kohya with adapter name": [
        ("blocks.2.to_q.lora_down.default.weight", "blocks_2_to_q", "down"),
        ("lora_unet_up_blocks_2_to_q.lora_up.default.weight", "unet_up_blocks_2_to_q", "up"),
    ],
    "XLabs": [
        ("double_blocks.4.processor.qkv_lora1.down.weight", "double_blocks_4_img_attn_qkv", "down"),
        ("double_blocks.4.processor.proj_lora2.up.weight", "double_blocks_4_txt_attn_proj", "up"),
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
    "torchtune": [
        ("layers.3.attn.q_proj.lora_a.weight", "model_layers_3_attn_q_proj", "down"),
        ("layers.3.attn.q_proj.lora_b.weight", "model_layers_3_attn_q_proj", "up"),
    ],
    "PEFT embedding": [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "model_embed_tokens", "down"),
        ("base_model.model.model.embed_tokens.lora_embedding_B", "model_embed_tokens", "up"),
    ],
    "LoHa": [
        ("lora_unet_up_blocks_2_to_q.hada_w1_a", "unet_up_blocks_2_to_q", "hada_w1_a"),
        ("base_model.model.up_blocks.2.to_q.hada_t2", "unet_up_blocks_2_to_q", "hada_t2"),
    ],
    "LoKr": [
        ("lycoris_up_blocks_2_to_q.lokr_w1", "unet_up_blocks_2_to_q", "lokr_w1"),
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
    assert parsed.adapter == ("default" if family.endswith("with adapter name") else "")
    assert re.match(keys.KEY_FAMILIES[family], key)


def test_the_alpha_of_a_text_encoder_is_of_the_projection():
    alpha = TEXT.replace("q_proj", "to_out_lora.alpha")
    assert keys.parse_alpha(alpha) == TEXT.replace("q_proj", "out_proj").replace(".", "_")


def test_factors_of_torchtune_lie_as_those_of_peft():
    layers = layout_of({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 6),
                        "layers.0.attn.q_proj.lora_b.weight": torch.ones(8, 2)}).layers  # fmt: skip
    assert [(layer.role, layer.shape) for layer in layers] == [("down", (2, 6)), ("up", (8, 2))]


@pytest.mark.parametrize("key", ["unet.down_blocks.0.weight", "down.weight", "unet.up_blocks.1.up.weight", "alpha"])
def test_block_names_are_not_roles(key):
    assert parse_key(key) is None


@pytest.mark.parametrize("block", ["down_blocks", "up_blocks"])
@pytest.mark.parametrize("role", ["down", "up"])
def test_the_role_is_a_whole_path_part(block, role):
    assert parse_key(f"unet.{block}.1.attentions.0.proj.lora.{role}.weight").role == role


def test_only_a_whole_path_part_is_the_processor():
    assert canonical_module("unet.mid_block.attn1.processor.to_q") == "unet_mid_block_attn1_to_q"
    assert canonical_module("unet.mid_block.processors.0.to_q") == "unet_mid_block_processors_0_to_q"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("LoHa", "lora_unet_a.hada_w1_a"),
        ("LoHa", "lora_unet_a.hada_t2"),
        ("LoKr", "lora_unet_a.lokr_w1"),
        ("LoKr", "lora_unet_a.lokr_w2_b"),
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


def test_an_alpha_without_its_module_is_counted():
    layout = layout_of(pair() | {"b.alpha": torch.tensor(1.0)})
    assert layout.ignored == {"*.alpha without its module": 1}
    assert layout.alphas == {}


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
    assert message.startswith("two tensors are the alpha of module a: ")
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
    assert layout_of(pair("unet.блок.注意")).layers[0].module == "блок_注意"


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
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
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
    """A down before its up; for the order of modules see test_order.py."""
    tensors = {name: tensor for module in ORDER for name, tensor in pair(module).items()}
    names = list(tensors)
    keys = random.Random(seed).sample(names, len(names))
    layers = layout_of({key: tensors[key] for key in keys}).layers
    assert [layer.name for layer in layers] == names


SAME = {
    f"{BLOCK}_to_q": """
        unet.# # base_model.model.# base_model.model.unet.# unet.base_model.model.# module.# module.unet.# unet.module.#
        _orig_mod.# unet._orig_mod.# base_model.model._orig_mod.# _orig_mod.module.unet.# model.# model.unet.#
        down_blocks.0._orig_mod.attentions.1.transformer_blocks.0.attn1.to_q
        _fsdp_wrapped_module.down_blocks.0._fsdp_wrapped_module.attentions.1.transformer_blocks.0.attn1.to_q
        down_blocks.0.attentions.1.transformer_blocks.0._checkpoint_wrapped_module.attn1.to_q._orig_mod
        lora_unet_@ lycoris_@ lycoris_unet_@ lora_unet__orig_mod_@ unet_@ diffusion_model.# model.diffusion_model.#
        lora_unet_down_blocks_0__orig_mod_attentions_1_transformer_blocks_0_attn1_to_q
        lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q
        model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn1.to_q""",
    "double_blocks_0_img_attn_qkv": """
        # diffusion_model.# model.diffusion_model.# lora_unet_@ lycoris_@ lora_transformer_@ transformer.# module.#
        base_model.model.# base_model.model.diffusion_model.# transformer._orig_mod.#
        double_blocks.0._orig_mod.img_attn.qkv unet.# lora_unet__orig_mod_@ diffusion_model.module.#
        double_blocks.0.processor.qkv_lora1""",
    "single_blocks_7_linear2": "lora_unet_single_blocks_7_linear2 single_blocks.7.processor.proj_lora",
    "transformer_transformer_blocks_0_attn_to_q": """
        # transformer.# base_model.model.# base_model.model.transformer.# transformer.base_model.model.# lora_unet_@
        lora_transformer_transformer_blocks_0_attn_to_q lycoris_@ lora_@ transformer._orig_mod.# transformer.module.#
        diffusion_model.# lycoris_transformer_@ _orig_mod.#""",
    "joint_blocks_0_x_block_attn_qkv": "# lora_unet_@ diffusion_model.# model.diffusion_model.#",
    "blocks_0_self_attn_q": "# lora_unet_@ diffusion_model.# transformer.# base_model.model.#",
    "x_embedder": "# lora_unet_@ transformer.# diffusion_model.# lora_transformer_x_embedder lycoris_@",
    "model_layers_0_self_attn_q_proj": """
        # model.# base_model.model.# base_model.model.model.# language_model.model.# model.language_model.#
        base_model.model.model.language_model.# base_model.model.language_model.model.# _orig_mod.model.#
        base_model.model._orig_mod.model.# module.model.# base_model.model.module.model.# lycoris_model_@
        model.layers.0._orig_mod.self_attn.q_proj model.model.# language_model.#""",
    "model_layers_0_linear_attn_out_proj": "# model.# base_model.model.model.# lycoris_model_@ model.language_model.#",
    "transformer_in_transformer_blocks_0_attn1_to_q": "unet.# # lora_unet_@ lycoris_@",
    "transformer_h_0_attn_c_attn": "# transformer.# base_model.model.transformer.# lycoris_transformer_h_0_attn_c_attn",
    "encoder_layer_0_attention_self_query": "# bert.# base_model.model.bert.# roberta.# lycoris_bert_@",
    "text_encoder_text_model_encoder_layers_3_mlp_fc1": """
        lora_te_text_model_encoder_layers_3_mlp_fc1 lora_te1_text_model_encoder_layers_3_mlp_fc1
        text_encoder.text_model.encoder.layers.3.mlp.fc1 text_encoder.encoder.layers.3.mlp.fc1
        text_encoder.module.text_model.encoder.layers.3.mlp.fc1 text_model.encoder.layers.3.mlp.fc1
        text_encoder.base_model.model.text_model.encoder.layers.3.mlp.fc1
        base_model.model.text_model.encoder.layers.3.mlp.fc1 text_encoder._orig_mod.text_model.encoder.layers.3.mlp.fc1
        text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1 clip_l.text_model.encoder.layers.3.mlp.fc1
        clip_l.transformer.text_model.encoder.layers.3.mlp.fc1""",
    "text_encoder_2_text_model_encoder_layers_3_mlp_fc1": """
        lora_te2_text_model_encoder_layers_3_mlp_fc1 text_encoder_2.text_model.encoder.layers.3.mlp.fc1
        text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1""",
    "text_encoder_3_encoder_block_0_layer_0_SelfAttention_q": """
        lora_te3_encoder_block_0_layer_0_SelfAttention_q text_encoder_3.encoder.block.0.layer.0.SelfAttention.q
        text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q
        text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q
        text_encoder_2.encoder.block.0.layer.0.SelfAttention.q lora_te2_encoder_block_0_layer_0_SelfAttention_q
        text_encoder.encoder.block.0.layer.0.SelfAttention.q""",
    "text_encoder_3_shared": "text_encoder_2.shared text_encoders.t5xxl.transformer.shared lora_te3_shared",
    "visual_blocks_0_attn_qkv": "visual.blocks.0.attn.qkv model.visual.blocks.0.attn.qkv",
    "vision_tower_encoder_layers_0_mlp_fc1": """
        vision_tower.vision_model.encoder.layers.0.mlp.fc1 model.vision_tower.encoder.layers.0.mlp.fc1
        base_model.model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1""",
}  # fmt: skip
PLAIN = {
    f"{BLOCK}_to_q": "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "double_blocks_0_img_attn_qkv": "double_blocks.0.img_attn.qkv",
    "transformer_transformer_blocks_0_attn_to_q": "transformer_blocks.0.attn.to_q",
    "joint_blocks_0_x_block_attn_qkv": "joint_blocks.0.x_block.attn.qkv",
    "blocks_0_self_attn_q": "blocks.0.self_attn.q",
    "x_embedder": "x_embedder",
    "model_layers_0_self_attn_q_proj": "layers.0.self_attn.q_proj",
    "model_layers_0_linear_attn_out_proj": "layers.0.linear_attn.out_proj",
    "transformer_in_transformer_blocks_0_attn1_to_q": "transformer_in.transformer_blocks.0.attn1.to_q",
    "transformer_h_0_attn_c_attn": "h.0.attn.c_attn",
    "encoder_layer_0_attention_self_query": "encoder.layer.0.attention.self.query",
}


@pytest.mark.parametrize("module", SAME)
def test_one_network_has_one_name_whatever_is_around_it(module):
    """# stands for the path of the module, and @ for it with underscores."""
    plain = PLAIN.get(module, "")
    for raw in SAME[module].split():
        name = raw.replace("#", plain).replace("@", plain.replace(".", "_"))
        assert canonical_module(name) == module, name


DIFFERENT = [
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj language_model.model.layers.0.self_attn.q_proj",
    "model.visual.blocks.0.attn.qkv model.language_model.layers.0.self_attn.qkv model.blocks.0.attn.qkv",
    "text_model.encoder.layers.0.mlp.fc1 vision_model.encoder.layers.0.mlp.fc1 encoder.layers.0.mlp.fc1",
    "model.encoder.layers.0.fc1 model.decoder.layers.0.fc1 model.layers.0.fc1",
    "encoder.block.0.layer.0.SelfAttention.q decoder.block.0.layer.0.SelfAttention.q",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1 text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    "transformer.blocks.0.attn1.to_q transformer_2.blocks.0.attn1.to_q",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1 lora_te2_text_model_encoder_layers_0_mlp_fc1 lora_unet_mlp_fc1",
    "lora_transformer_blocks_0_to_q lora_unet_blocks_0_to_q lora_unet_single_transformer_blocks_0_to_q",
    "input_blocks.3.0.op input_blocks.3.1.op input_blocks.3.0.conv output_blocks.2.1.conv output_blocks.2.0.conv2",
    "vae.decoder.up_blocks.0.resnets.0.conv1 unet.up_blocks.0.resnets.0.conv1 controlnet.up_blocks.0.resnets.0.conv1",
    "single_blocks.0.processor.qkv_lora single_blocks.0.linear1 double_blocks.0.processor.proj_lora2",
    "unet:2 text_encoder:2 2",
    "model.0 model.1 module.0 unet.0",
]  # fmt: skip


@pytest.mark.parametrize("modules", DIFFERENT)
def test_different_modules_of_a_file_never_have_one_name(modules):
    names = modules.split()
    assert len(set(map(canonical_module, names))) == len(names)


def test_numbered_and_cloneofsimo_are_in_the_order_of_their_numbers():
    numbered = {f"lora.{role}.weight.{i}": torch.ones(2, 2) for i in (10, 2, 1) for role in ("up", "down")}
    layers = layout_of(numbered).layers
    assert [(layer.module, layer.role) for layer in layers][::2] == [("1", "down"), ("2", "down"), ("10", "down")]
    keys = [f"{part}:{i}:{role}" for part in ("unet", "text_encoder") for i in (10, 2) for role in ("up", "down")]
    layers = layout_of({key: torch.ones(2, 2) for key in keys}).layers
    assert [layer.module for layer in layers[::2]] == ["text_encoder_2", "text_encoder_10", "unet_2", "unet_10"]
