"""Names of layers and modules in figures and sentences: short, by block and projection, and never one for two."""

import pytest
from networks_of_loras import NETWORKS

from loras.blocks import attention_of, blocks_of, projection_of
from report.names import full_names, layer_names, shortened


def analysis_of(*modules):
    """The records of layers of these modules, as loras/blocks.py names them."""
    records = []
    for module, block in zip(modules, blocks_of(modules), strict=True):
        place = {"block": block or None, "projection": projection_of(module) or None}
        place |= {"attention": attention_of(module) or None, "module": module}
        records += [place | {"layer": f"{module}.{role}", "role": role} for role in ("down", "up")]
    return {"layers": {"records": records}}


@pytest.mark.parametrize(
    ("module", "beside", "expected"),
    [
        ("unet_down_blocks_2_attentions_0_transformer_blocks_3_attn2_to_k", ("_3_attn2_to_k", "_9_attn2_to_k"),
         "IN07.3 attn2 k"),
        ("unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2", (), "MID ff out"),
        ("unet_up_blocks_1_attentions_2_proj_in", (), "OUT05 proj in"),
        ("text_encoder_text_model_encoder_layers_11_self_attn_q_proj", (), "TE layer 11 q"),
        ("text_encoder_2_text_model_encoder_layers_31_mlp_fc1", (), "TE2 layer 31 ff in"),
        ("model_layers_31_self_attn_o_proj", (), "layer 31 o"),
        ("model_layers_31_mlp_gate_proj", (), "layer 31 mlp gate"),
        ("transformer_single_transformer_blocks_37_attn_to_v", (), "single 37 v"),
        ("blocks_4_cross_attn_q", ("cross_attn_q", "self_attn_q"), "block 4 cross_attn q"),
        ("lm_head", (), "lm_head"),
    ],
)  # fmt: skip
def test_layers_are_named_by_block_and_projection(module, beside, expected):
    others = (module.replace(*beside),) if beside else ()
    analysis = analysis_of(module, *others)
    assert full_names(analysis)[module] == expected
    assert layer_names(analysis)[f"{module}.up"] == f"{expected}, up"


@pytest.mark.parametrize("network", NETWORKS)
def test_all_layers_of_a_network_have_short_names_of_their_own(network):
    analysis = analysis_of(*NETWORKS[network])
    names = layer_names(analysis)
    assert len({*names.values()}) == len(names) == 2 * len(NETWORKS[network])
    assert max(map(len, names.values())) <= 30
    assert not {*full_names(analysis)} & {*full_names(analysis).values()}


def test_outside_of_all_blocks_numbers_are_those_of_nothing():
    modules = ("net_4_to_q", "net_5_to_q", "net_to_k")
    assert list(full_names(analysis_of(*modules)).values()) == ["net_4_to_q", "net_5_to_q", "k"]


@pytest.mark.parametrize(
    ("name", "letters", "expected"),
    [
        ("short", 10, "short"),
        ("transformer.blocks.0.attn1.to_q.lora.down.weight", 24, "transformer…down.weight"),
        ("folder/of/styles/a-name", 16, "folder/of…a-name"),
        ("a photograph of a very small thing", 20, "a photograph…thing"),
        ("x" * 40 + ".y", 12, "xxxxxxxx…x.y"),
        ("w" * 30, 10, "wwwwww…www"),
        ("猫" * 30, 4, "猫猫…猫"),
        ("a.b", 2, "a.…"),
    ],
)
def test_names_are_cut_between_their_parts(name, letters, expected):
    assert shortened(name, lambda text: len(text) <= letters) == expected
