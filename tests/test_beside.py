"""What lies beside the pairs is counted, and other families of adapters are refused by name.

Keys are those that peft 0.21 and lycoris 4.1 write for one linear module.
"""

import pytest
import torch
from headers import Q, layout_of, pair, refusal

from loras.keys import IGNORED, REFUSED_FAMILIES, REFUSED_TOGETHER

P = "base_model.model.model.layers.0.self_attn.q_proj"
L = "lycoris_proj"
FAMILIES = {
    "an OFT": [f"{P}.oft_R.weight"],
    "an OFT (LyCORIS)": [f"{L}.oft_blocks", f"{L}.rescale", f"{L}.alpha"],
    "a BOFT": [f"{P}.boft_R", f"{P}.boft_s"],
    "a GLoRA": [f"{L}.a1.weight", f"{L}.a2.weight", f"{L}.b1.weight", f"{L}.b2.weight", f"{L}.alpha"],
    "a GLoRA (PEFT)": [f"{P}.glora_A.Xd", f"{P}.glora_A.Xu", f"{P}.glora_C.zeros", f"{P}.glora_E.zeros"],
    "an AdaLoRA": [f"{P}.lora_A", f"{P}.lora_B", f"{P}.lora_E"],
    "a KaSA": [f"{P}.lora_A.weight", f"{P}.lora_B.weight", f"{P}.lora_diag"],
    "an IA3": [f"{P}.ia3_l"],
    "an IA3 (LyCORIS)": [f"{L}.weight", f"{L}.on_input"],
    "a VeRA": [f"{P}.vera_lambda_b", f"{P}.vera_lambda_d", "base_model.vera_A", "base_model.vera_B"],
    "a PVeRA": [f"{P}.pvera_lambda_b", f"{P}.pvera_lambda_d", "base_model.pvera_A", "base_model.pvera_B"],
    "a VB-LoRA": [f"{P}.vblora_logits_A", f"{P}.vblora_logits_B", "base_model.vblora_vector_bank"],
    "a RandLoRA": [f"{P}.randlora_A", f"{P}.randlora_gamma", f"{P}.randlora_lambda", "base_model.randlora_A"],
    "a FourierFT": [f"{P}.fourierft_spectrum"],
    "a WaveFT": [f"{P}.waveft_spectrum"],
    "a T-LoRA": [f"{L}.q_layer.weight", f"{L}.p_layer.weight", f"{L}.lambda_layer", f"{L}.alpha"],
    "a Householder (HRA)": [f"{P}.hra_u"],
    "a circulant (C3A)": [f"{P}.c3a_kernel"],
    "a GraLoRA": [f"{P}.gralora_A", f"{P}.gralora_B"],
    "a HiRA": [f"{P}.hira_A", f"{P}.hira_B"],
    "a DeLoRA": [f"{P}.delora_A", f"{P}.delora_B", f"{P}.delora_lambda", f"{P}.delora_w_norm"],
    "a DEFT": [f"{P}.deft_P", f"{P}.deft_R"],
    "a Lily": [f"{P}.lily_A.weight", f"{P}.lily_B.weight", f"{P}.lily_router.weight"],
    "a PEANuT": [f"{P}.peanut_A.weight", f"{P}.peanut_B.weight"],
    "a Poly": [f"{P}.poly_lora_A", f"{P}.poly_lora_B", f"{P}.poly_router.module_logits"],
    "a PSOFT": [f"{P}.psoft_R"],
    "a TinyLoRA": [f"{P}.tinylora_A", f"{P}.tinylora_B", f"{P}.tinylora_P", "base_model.tinylora_v.0"],
    "a Uni-LoRA": ["base_model.unilora_theta_d"],
    "a FRoD": ["base_model.frod_V.self_attn_q_proj", f"{P}.frod_lambda_l", f"{P}.frod_lambda_s_values"],
    "a SHiRA": [f"{P}.shira_indices", f"{P}.shira_weight"],
    "a SuperTuning": [f"{P}.supertuning_indices", f"{P}.supertuning_values"],
    "a RoAd": [f"{P}.road_theta", f"{P}.road_alpha"],
    "a MiSS": [f"{P}.miss_block"],
    "an AdaMSS": [f"{P}.adamss_A", f"{P}.adamss_B"],
    "an OSF": [f"{P}.osf_svd_params.S_low", f"{P}.osf_svd_params.U_low", f"{P}.osf_svd_params.V_low"],
    "a ShadowPEFT": [f"{P}.shadow_down.default.weight", f"{P}.shadow_up.default.weight"],
    "an X-LoRA": ["xlora_classifier.layers.0.weight"],
    "a mangled kohya": ["lora_unet_a_lora_down.weight", "lora_unet_a_lora_up.weight"],
}


def some(keys: list[str]) -> dict:
    return {key: torch.ones(()) if key.endswith(".alpha") else torch.ones(2, 2) for key in keys}


def test_every_family_has_examples():
    named = {family.split(" (PEFT")[0].split(" (LyC")[0] for family in FAMILIES}
    assert named == {*REFUSED_FAMILIES, *REFUSED_TOGETHER, "a mangled kohya"} - {"a LoHa", "a LoKr"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_refused_by_name_also_beside_pairs(family):
    """Its modules would be missing from what is read, and nobody would know."""
    name = family.split(" (PEFT")[0].split(" (LyC")[0]
    for beside in ({}, pair()):
        message = refusal(some(FAMILIES[family]) | beside)
        assert message.startswith(f"{name} adapter (")
        assert message.endswith("which cannot be read. Convert it or leave it out.")
        assert "ename" not in message


def test_one_name_of_lycoris_is_two_families():
    assert refusal(pair() | {f"{L}.oft_blocks": torch.ones(3, 4, 4, 4)}).startswith("a BOFT adapter (")
    assert refusal(pair() | {f"{L}.oft_blocks": torch.ones(4, 4, 4)}).startswith("an OFT adapter (")


def test_one_module_of_a_family_in_a_file_of_pairs_is_enough():
    assert "an OFT adapter (unet.conv_in.oft_R.weight)" in refusal(pair() | some(["unet.conv_in.oft_R.weight"]))


BESIDE = {
    "*.dora_scale": ["lora_unet_a.dora_scale"],
    "*.m": ["model.layers.0.self_attn.q_proj.m"],
    "*.lora_magnitude_vector": [f"{P}.lora_magnitude_vector", f"{P}.lora_magnitude_vector.default.weight"],
    "*.lora_A.bias, *.lora_B.bias": [f"{P}.lora_B.bias", f"{P}.lora_B.default.bias"],
    "embeddings <...>": ["<concept>"],
    "embeddings bundle_emb.*": ["bundle_emb.style.clip_l", "bundle_emb.lora.string_to_param.*"],
    "embeddings of tokens": ["emb_params", "clip_l", "clip_g", "string_to_param.*",
                             f"{P[:22]}.embed_tokens.token_adapter.trainable_tokens_delta"],
    "prompts": ["prompt_embeddings", "prefix_task_cols"],
    "*.modules_to_save.*": ["base_model.model.classifier.modules_to_save.default.weight",
                            "base_model.model.lora_head.modules_to_save.bias"],
    "*.base_layer.*": ["base_model.model.model.embed_tokens.base_layer.weight"],
    "differences of biases and norms": ["diffusion_model.blocks.0.self_attn.q.diff_b", "lora_unet_norm.w_norm",
                                        "lora_unet_norm.b_norm", "lycoris_gn.w_norm", f"{P}.beft_bias",
                                        f"{P}.ln_tuning_layers.weight"],
    "tensors that are no LoRA": f"""
        base_model.model.classifier.weight base_model.model.lora_head.weight explorations.0.weight colora_net.weight
        lora.weight_decay flora.weight lora_net.weight model.lora_encoder.0.weight optimizer.state.0.exp_avg
        {Q}.lora_scale {Q}.lora.rank {Q}.lora_A.scale lora_unet_conv.scale_weight net.b1.weight net.a1.weight
        xa1.weight xa2.weight xb1.weight xb2.weight net.lambda_layer net.on_input net.on_input.weight
        diffusion_model.img_in.reshape_weight""".split(),
}  # fmt: skip


def test_every_row_has_examples():
    assert set(BESIDE) == {*IGNORED, "tensors that are no LoRA"}


@pytest.mark.parametrize("row", BESIDE)
def test_what_lies_beside_the_pairs_is_counted_and_no_reason_to_refuse_them(row):
    layout = layout_of(pair() | {key: torch.ones(2) for key in BESIDE[row]})
    assert [layer.name for layer in layout.layers] == list(pair())
    assert layout.ignored == {row: len(BESIDE[row])}


def test_an_alpha_that_is_of_no_pair_may_be_anything():
    tensors = {"vocoder.activation.alpha": torch.ones(1, 6, 1), "vocoder.other.alpha": torch.tensor(True)}
    assert layout_of(pair() | tensors).ignored == {"*.alpha without its module": 2}


def test_full_differences_beside_pairs_have_a_name_of_their_own():
    tensors = {
        "diffusion_model.norm3.diff": torch.ones(3),
        "diffusion_model.a.diff": torch.ones(2, 2),
        "diffusion_model.c.diff": torch.ones(2, 2, 3, 3),
        "diffusion_model.a.diff_b": torch.ones(2),
    }
    counts = {"full differences (*.diff)": 2, "differences of biases and norms": 2}
    assert layout_of(pair() | tensors).ignored == counts
    message = refusal(tensors)
    assert message.startswith("a full-difference adapter (diffusion_model.a.diff), which cannot be read.")


def test_a_file_without_a_pair_is_refused_by_what_it_holds():
    message = refusal({"lora_unet_a.w_norm": torch.ones(2), "bundle_emb.x.clip_l": torch.ones(2)})
    assert message.startswith(
        "no LoRA pair; it holds embeddings bundle_emb.*, differences of biases and norms; the first"
    )
    assert refusal({"a.weight": torch.ones(2)}) == "no LoRA pair; the first keys are a.weight. Is it a LoRA?"


@pytest.mark.parametrize(
    "key",
    ["unet.conv.lora_left.weight", "unet.conv.lora_U", "a.lora.down.weight.more", "lora_A.weight", "unet.conv.lora.0"],
)
def test_a_factor_in_an_unknown_form_is_refused_where_its_module_has_no_pair(key):
    message = refusal(pair() | {key: torch.ones(2, 6)})
    assert message == f"{key} names a factor of a LoRA in an unknown way. Convert it or leave the file out."
