"""Blocks of networks that people train LoRAs of: the same in every style of names, and never one name for two."""

import json
import random

import pytest
from making import STYLES

from loras.blocks import attention_of, blocks_of, projection_of
from loras.digits_zoo import LORA_MODULES
from loras.keys import canonical_module
from loras.lora_files import parse_header


def named(*modules: str) -> dict[str, str]:
    """Return the block of each module, as it stands in a file."""
    return dict(zip(modules, blocks_of(tuple(map(canonical_module, modules))), strict=True))


def distinct(blocks: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(blocks.values()))


# ----------------------------------------------------------------------------------------------------------------------
# Stable Diffusion
# ----------------------------------------------------------------------------------------------------------------------

# Blocks with attention, as those who weight a LoRA block by block know them.
SD15 = ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{i:02}" for i in range(3, 12))]
SDXL = ["IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{i:02}" for i in range(6))]
WITHIN = ("proj_in", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_out.0", "proj_out",
          "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.1.ff.net.2")  # fmt: skip


def diffusers_attentions(down: range, up: range) -> list[str]:
    """Return paths of the blocks with attention, by levels."""
    paths = [f"unet.down_blocks.{i}.attentions.{j}" for i in down for j in range(2)]
    return [
        *paths,
        "unet.mid_block.attentions.0",
        *(f"unet.up_blocks.{i}.attentions.{j}" for i in up for j in range(3)),
    ]


NETWORKS = {"SD 1.5": (diffusers_attentions(range(3), range(1, 4)), SD15),
            "SDXL": (diffusers_attentions(range(1, 3), range(2)), SDXL)}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("network", NETWORKS)
def test_attentions_of_stable_diffusion_have_their_numbers_in_every_style_of_files(network, style):
    paths, expected = NETWORKS[network]
    modules = [f"{path}.{module}" for path in paths for module in WITHIN]
    if style == "diffusers legacy":
        modules = [f"{path}.transformer_blocks.0.attn1.to_q" for path in paths]
    keys = [STYLES[style](module, role) for module in modules for role in ("down", "up")]
    entries = {key: {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 0]} for key in keys}
    layers = parse_header(json.dumps(entries).encode()).layout.layers
    assert list(dict.fromkeys(layer.block for layer in layers)) == expected
    assert {layer.block for layer in layers if "mid_block" in layer.name} == {"MID"}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_original_names_hold_the_same_numbers(network):
    blocks = NETWORKS[network][1]
    sides = {"IN": "input_blocks", "OUT": "output_blocks"}
    paths = [f"{sides[block[:-2]]}_{int(block[-2:])}_1" if block != "MID" else "middle_block_1" for block in blocks]
    for prefix in ("lora_unet_", "diffusion_model."):
        modules = [f"{prefix}{path}_transformer_blocks_0_attn2_to_k" for path in paths]
        assert list(named(*modules).values()) == blocks


CONVOLUTIONS = {  # diffusers -> original, of SD 1.5
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.2.resnets.1.time_emb_proj": "input_blocks.8.0.emb_layers.1",
    "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
    "down_blocks.3.resnets.1.conv2": "input_blocks.11.0.out_layers.3",
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "up_blocks.0.resnets.0.conv_shortcut": "output_blocks.0.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.3.resnets.2.conv2": "output_blocks.11.0.out_layers.3",
}


def test_convolutions_are_in_the_block_that_holds_them_in_the_original():
    ours, originals = ([f"unet.{name}" for name in names] for names in (CONVOLUTIONS, CONVOLUTIONS.values()))
    blocks = list(named(*ours).values())
    assert blocks == list(named(*originals).values())
    assert blocks == ["IN00", "IN01", "IN03", "IN08", "IN09", "IN11", "MID", "OUT00", "OUT02", "OUT05", "OUT11"]
    assert named("unet.conv_out", "unet.time_embedding.linear_1") == {
        "unet.conv_out": "", "unet.time_embedding.linear_1": ""}  # fmt: skip


def test_motion_modules_are_in_the_block_of_their_position():
    ends = ("down_blocks.3.motion_modules.1", "up_blocks.0.motion_modules.2")
    modules = [f"unet.{end}.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q" for end in ends]
    assert list(named(*modules).values()) == ["IN11", "OUT02"]


def test_levels_of_other_unets_are_not_numbered_as_stable_diffusions():
    three = [f"unet.down_blocks.1.attentions.{j}.to_q" for j in range(3)]
    assert distinct(named(*three, "unet.mid_block.attentions.0.to_q", "unet.up_blocks.0.attentions.2.to_q")) == [
        "down 1", "MID", "up 0"]  # fmt: skip
    assert distinct(named("unet.down_blocks.2.to_q", "unet.up_blocks.0.3.to_q")) == ["down 2", "up 0"]


# ----------------------------------------------------------------------------------------------------------------------
# Transformers
# ----------------------------------------------------------------------------------------------------------------------


def of_numbers(*patterns: str, count: int = 3) -> list[str]:
    return [pattern.replace("#", str(number)) for pattern in patterns for number in range(count)]


CLIP = "text_model.encoder.layers.#.self_attn.q_proj"
T5 = "encoder.block.#.layer.0.SelfAttention.q"
FLUX = [f"{kind} {i}" for kind in ("double", "single") for i in range(3)]
BLOCKS, LAYERS = ([f"{kind} {i}" for i in range(3)] for kind in ("block", "layer"))
TRANSFORMERS = {
    "Flux, diffusers": (of_numbers("transformer.transformer_blocks.#.attn.add_q_proj",
                                   "transformer.single_transformer_blocks.#.proj_mlp"), FLUX),
    "Flux, kohya": (of_numbers("lora_unet_double_blocks_#_img_attn_qkv", "lora_unet_single_blocks_#_linear1"), FLUX),
    "Flux, original": (of_numbers("diffusion_model.double_blocks.#.txt_mlp.0",
                                  "diffusion_model.single_blocks.#.modulation.lin"), FLUX),
    "Flux, XLabs": (of_numbers("double_blocks.#.processor.qkv_lora1", "single_blocks.#.processor.proj_lora"), FLUX),
    "HiDream": (of_numbers("transformer.double_stream_blocks.#.block.attn1.to_q",
                           "transformer.single_stream_blocks.#.block.attn1.to_q"), FLUX),
    "AuraFlow, diffusers": (of_numbers("transformer.joint_transformer_blocks.#.attn.to_q",
                                       "transformer.single_transformer_blocks.#.attn.to_q"), FLUX),
    "AuraFlow, original": (of_numbers("double_layers.#.attn.w1q", "single_layers.#.attn.w1q"), FLUX),
    "HunyuanVideo": (of_numbers("transformer.transformer_blocks.#.attn.to_q",
                                "transformer.single_transformer_blocks.#.attn.to_q",
                                "transformer.context_embedder.token_refiner.refiner_blocks.#.attn.to_q"),
                     [*FLUX, *(f"context refiner {i}" for i in range(3))]),
    "SD3, diffusers": (of_numbers("transformer.transformer_blocks.#.attn.add_k_proj"), BLOCKS),
    "SD3, original": (of_numbers("diffusion_model.joint_blocks.#.context_block.attn.qkv"), BLOCKS),
    "PixArt": (of_numbers("transformer.transformer_blocks.#.ff.net.2"), BLOCKS),
    "PixArt, kohya": (of_numbers("lora_transformer_transformer_blocks_#_attn1_to_q"), BLOCKS),
    "Wan": (of_numbers("diffusion_model.blocks.#.self_attn.q"), BLOCKS),
    "Lumina 2": (of_numbers("noise_refiner.#.attention.qkv", "context_refiner.#.attention.qkv",
                            "layers.#.attention.qkv"),
                 [f"{part} {i}" for part in ("noise refiner", "context refiner", "layer") for i in range(3)]),
    "Llama": (of_numbers("base_model.model.model.layers.#.self_attn.q_proj",
                         "base_model.model.model.layers.#.mlp.down_proj"), 2 * LAYERS),
    "Mixtral": (of_numbers("base_model.model.model.layers.#.block_sparse_moe.experts.7.w1"), LAYERS),
    "GPT-2": (of_numbers("base_model.model.transformer.h.#.attn.c_attn"), LAYERS),
    "GPT-NeoX": (of_numbers("base_model.model.gpt_neox.layers.#.attention.query_key_value"), LAYERS),
    "BERT": (of_numbers("base_model.model.bert.encoder.layer.#.attention.self.query"), LAYERS),
    "CLIP": (of_numbers(CLIP), [f"TE layer {i}" for i in range(3)]),
    "T5": (of_numbers(f"base_model.model.{T5}", "base_model.model.decoder.block.#.layer.1.EncDecAttention.q"),
           [f"{part} block {i}" for part in ("encoder", "decoder") for i in range(3)]),
    "Whisper": (of_numbers("base_model.model.model.encoder.layers.#.fc1",
                           "base_model.model.model.decoder.layers.#.fc1"),
                [f"{part} layer {i}" for part in ("encoder", "decoder") for i in range(3)]),
    "Qwen2-VL": (of_numbers("base_model.model.model.visual.blocks.#.attn.qkv",
                            "base_model.model.model.layers.#.self_attn.q_proj"),
                 [*(f"visual {block}" for block in BLOCKS), *LAYERS]),
    "LLaVA": (of_numbers("base_model.model.vision_tower.vision_model.encoder.layers.#.self_attn.q_proj",
                         "base_model.model.language_model.model.layers.#.self_attn.q_proj"),
              [*(f"vision {layer}" for layer in LAYERS), *LAYERS]),
    "built-in digits": (LORA_MODULES, [f"block {i}" for i in range(4) for _ in range(8)]),
}  # fmt: skip


@pytest.mark.parametrize("network", TRANSFORMERS)
def test_blocks_of_transformers_keep_their_numbers(network):
    modules, expected = TRANSFORMERS[network]
    assert list(named(*modules).values()) == expected


ENCODERS = {
    "diffusers": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "kohya": ("lora_te1", "lora_te2", "lora_te3"),
    "ComfyUI": tuple(f"text_encoders.{name}.transformer" for name in ("clip_l", "clip_g", "t5xxl")),
}  # fmt: skip


@pytest.mark.parametrize("style", ENCODERS)
@pytest.mark.parametrize("network", ["SD3, diffusers", "Flux, kohya"])
def test_text_encoders_beside_a_network_have_blocks_of_their_own(style, network):
    beside, expected = TRANSFORMERS[network]
    first, second, third = ENCODERS[style]
    joint = "_" if style == "kohya" else "."
    modules = of_numbers(f"{first}{joint}{CLIP}", f"{second}{joint}{CLIP}", f"{third}{joint}{T5}")
    blocks = [f"{name} {i}" for name in ("TE layer", "TE2 layer", "TE3 block") for i in range(3)]
    assert list(named(*modules, *beside).values()) == blocks + expected


def test_a_text_encoder_whose_number_is_unknown_is_te():
    modules = ("text_encoders.qwen25_7b.transformer.model.layers.3.self_attn.q_proj", "diffusion_model.blocks.0.to_q")
    assert list(named(*modules).values()) == ["TE layer 3", "block 0"]


def test_the_text_encoder_of_stable_diffusion_1_is_te():
    unet = [f"lora_unet_{path}".replace(".", "_") for path in NETWORKS["SD 1.5"][0]]
    blocks = named("lora_te_text_model_encoder_layers_11_mlp_fc1", *unet)
    assert list(blocks.values()) == ["TE layer 11", *SD15]


# ----------------------------------------------------------------------------------------------------------------------
# Any names
# ----------------------------------------------------------------------------------------------------------------------

ALL = {name: modules for name, (modules, _) in {**TRANSFORMERS, **NETWORKS}.items()}


@pytest.mark.parametrize("name", ALL)
def test_blocks_depend_neither_on_the_order_of_modules_nor_on_wrappers(name):
    modules = list(ALL[name])
    expected, mixed = named(*modules), random.Random(0).sample(modules, len(modules))
    assert named(*mixed) == expected
    assert list(named(*(f"base_model.model.{module}" for module in modules)).values()) == list(expected.values())


@pytest.mark.parametrize(
    "module", ["unet_3", "text_encoder_11", "17", "", "_", "lm_head", "layers", "block_", "unet_blöcke_3", "layers_²",
               "layers_٣", "layers_" + "9" * 900, "unet_" + "9" * 900, "down_blocks_x", "h" * 900]
)  # fmt: skip
def test_what_is_not_recognised_is_in_no_block(module):
    assert blocks_of((module,)) == ("",)


def test_parts_that_one_word_does_not_distinguish_have_all_their_words():
    modules = ("a_left_layers_0_to_q", "a_right_layers_0_to_q", "b_layers_0_to_q")
    assert blocks_of(modules) == ("a left layer 0", "a right layer 0", "b layer 0")


def test_modules_beside_the_blocks_are_no_part_with_blocks():
    assert list(named("model.layers.0.mlp.up_proj", "lm_head", "model.embed_tokens").values()) == ["layer 0", "", ""]


@pytest.mark.parametrize(
    ("expected", "ends"),
    [
        ("q", "attn1.to_q self_attn.q_proj layer.0.SelfAttention.q attention.self.query"),
        ("k", "attn2.to_k self_attn.k_proj EncDecAttention.k attention.self.key"),
        ("v", "attn.to_v self_attn.v_proj SelfAttention.v attention.self.value"),
        ("qkv", "img_attn.qkv attn.c_attn attention.query_key_value self_attn.qkv_proj x_block.attn.qkv qkv_lora1 "
                "resblocks.0.attn.in_proj attention.Wqkv"),
        ("qkv, ff in", "single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
        ("in", "layers.0.mixer.in_proj mamba.in_proj"),
        ("o", "self_attn.o_proj"),
        ("mlp gate", "mlp.gate_proj"),
        ("mlp up", "mlp.up_proj"),
        ("mlp down", "mlp.down_proj"),
        ("mlp gate, up", "mlp.gate_up_proj"),
        ("out", "attn1.to_out.0 attention.o_proj self_attn.out_proj SelfAttention.o img_attn.proj attn.c_proj "
                "attention.output.dense attention.dense self_attn.dense proj_lora1"),
        ("ff in", "ff.net.0.proj mlp.fc1 ffn.net.0.proj img_mlp.0 DenseReluDense.wi_1 ffn.0 "
                  "intermediate.dense mlp.c_fc img_mlp.net.0.proj ff.linear_in"),
        ("ff gate, in", "gate_up_proj"),
        ("ff gate", "DenseReluDense.wi_0 experts.0.w1"),
        ("ff out", "ff.net.2 mlp.fc2 ffn.net.2 img_mlp.2 DenseReluDense.wo ffn.2 output.dense mlp.c_proj "
                   "img_mlp.net.2 ff.linear_out"),
        ("proj in", "attentions.0.proj_in"),
        ("proj out", "attentions.0.proj_out"),
        ("conv", "resnets.0.conv1 resnets.1.conv2 resnets.0.conv_shortcut downsamplers.0.conv conv_in op in_layers.2"),
        ("time", "resnets.0.time_emb_proj emb_layers.1"),
        ("linear1", "single_blocks.0.linear1"),
        ("mod", "norm1.linear img_mod.lin img_mod.1 modulation.lin"),
        ("context q", "attn.add_q_proj"),
        ("context out", "attn.to_add_out txt_attn.proj proj_lora2"),
        ("context qkv", "context_block.attn.qkv txt_attn.qkv qkv_lora2"),
        ("context ff in", "ff_context.net.0.proj txt_mlp.0 txt_mlp.net.0.proj context_block.mlp.fc1"),
        ("context ff out", "ff_context.net.2 txt_mlp.net.2 ff_context.linear_out"),
        ("context mod", "norm1_context.linear txt_mod.lin txt_mod.1"),
        ("", "m_0 lm_head linear_1 attn"),
    ],
)  # fmt: skip
def test_modules_that_do_the_same_have_one_name(expected, ends):
    for end in ends.split():
        module = canonical_module(f"net.{end}")
        assert projection_of(module) == expected, module


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "attn1"),
        ("transformer_single_transformer_blocks_7_attn_to_k", "attn"),
        ("model_layers_12_self_attn_q_proj", "self_attn"),
        ("encoder_block_0_layer_0_SelfAttention_q", "SelfAttention"),
        ("unet_up_blocks_1_resnets_0_conv1", ""),
    ],
)
def test_the_attention_of_a_module(module, expected):
    assert attention_of(module) == expected
