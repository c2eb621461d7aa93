"""The order of modules is the network's, whatever the file's order and the writer's names.

tests/networks/ holds the modules of networks in the order in which they are first called, as diffusers 0.42 and
transformers 5.24 call them: a hook on each Linear, Conv, Embedding and Conv1D of a tiny random network notes its name.

    def record(network, *inputs):
        called = []
        for name, module in network.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Conv1D)):
                module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        network(*inputs)
        return list(dict.fromkeys(called))

Where branches are parallel the lists follow one convention, which the library need not: the image is embedded before
the time, the guidance, the pooled text and the text (CogVideoX, HunyuanVideo, Lumina 2 and Qwen-Image call some of them
in another order), and refined before the text (not so in Lumina 2); attention before a feed-forward beside it (proj_mlp
of Flux and HunyuanVideo); to_out before to_add_out (the last block of SD3); towers before the language model's
embed_tokens (LLaVA, Qwen2-VL); and norm_out, which gates a refiner block of HunyuanVideo, after the block.
"""

import json
import random
from pathlib import Path

import pytest

from loras.keys import canonical_module
from loras.lora_files import parse_header
from loras.order import ROWS, depth_key, in_network_order

NETWORKS = {path.stem: path.read_text().split() for path in sorted((Path(__file__).parent / "networks").glob("*.txt"))}
PREFIXES = {
    "bare": "{}",
    "PEFT": "base_model.model.{}",
    "compiled": "base_model.model._orig_mod.{}",
    "DDP": "module.{}",
    "ComfyUI": "model.diffusion_model.{}",
    "kohya": "lora_unet_{}",
    "LyCORIS": "lycoris_{}",
}


def ordered(modules: list[str], seed: int = 0) -> list[str]:
    """Return modules in the network's order, given them in any."""
    module_of = {canonical_module(module): module for module in modules}
    assert len(module_of) == len(modules)
    shuffled = random.Random(seed).sample(list(module_of), len(module_of))
    return [module_of[name] for name in in_network_order(dict.fromkeys(shuffled, (1, 2)))]


def test_there_are_lists_of_networks():
    assert len(NETWORKS) > 30
    assert len(NETWORKS["stable_diffusion_1"]) == 282


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("network", NETWORKS)
def test_modules_stand_in_the_order_of_the_network(network, prefix):
    modules = NETWORKS[network]
    if prefix in ("kohya", "LyCORIS"):
        modules = [module.replace(".", "_") for module in modules]
    named = [PREFIXES[prefix].format(module) for module in modules]
    assert ordered(named) == named
    assert list(map(canonical_module, named)) == list(map(canonical_module, NETWORKS[network]))


# The same networks in the names of their first authors, and networks of other versions of the libraries.
SAME_ORDER = {
    "Flux, original": """
        img_in time_in.in_layer time_in.out_layer guidance_in.in_layer vector_in.in_layer txt_in
        double_blocks.0.img_mod.lin double_blocks.0.txt_mod.lin
        double_blocks.0.img_attn.qkv double_blocks.0.txt_attn.qkv
        double_blocks.0.img_attn.proj double_blocks.0.txt_attn.proj double_blocks.0.img_mlp.0 double_blocks.0.img_mlp.2
        double_blocks.0.txt_mlp.0 double_blocks.0.txt_mlp.2 double_blocks.10.img_mod.lin
        single_blocks.0.modulation.lin single_blocks.0.linear1 single_blocks.0.linear2 single_blocks.2.linear1
        final_layer.adaLN_modulation.1 final_layer.linear""",
    "SD3, original": """
        x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 y_embedder.mlp.0 context_embedder
        joint_blocks.0.x_block.adaLN_modulation.1 joint_blocks.0.context_block.adaLN_modulation.1
        joint_blocks.0.x_block.attn.qkv joint_blocks.0.context_block.attn.qkv joint_blocks.0.x_block.attn.proj
        joint_blocks.0.context_block.attn.proj joint_blocks.0.x_block.mlp.fc1 joint_blocks.0.x_block.mlp.fc2
        joint_blocks.0.context_block.mlp.fc1 joint_blocks.0.context_block.mlp.fc2 joint_blocks.1.x_block.attn.qkv
        final_layer.adaLN_modulation.1 final_layer.linear""",
    "Wan, original": """
        patch_embedding time_embedding.0 time_embedding.2 time_projection.1 text_embedding.0 text_embedding.2
        img_emb.proj.1 img_emb.proj.3
        blocks.0.self_attn.q blocks.0.self_attn.k blocks.0.self_attn.v blocks.0.self_attn.o
        blocks.0.cross_attn.q blocks.0.cross_attn.k blocks.0.cross_attn.v blocks.0.cross_attn.k_img
        blocks.0.cross_attn.v_img blocks.0.cross_attn.o blocks.0.ffn.0 blocks.0.ffn.2 blocks.1.self_attn.q
        blocks.10.self_attn.q head.head""",
    "Mixtral": """
        model.embed_tokens model.layers.0.self_attn.q_proj model.layers.0.self_attn.o_proj
        model.layers.0.block_sparse_moe.gate model.layers.0.block_sparse_moe.experts.0.w1
        model.layers.0.block_sparse_moe.experts.0.w3 model.layers.0.block_sparse_moe.experts.0.w2
        model.layers.0.block_sparse_moe.experts.7.w1 model.layers.1.self_attn.q_proj lm_head""",
    "AnimateDiff": """
        unet.down_blocks.0.resnets.0.conv1 unet.down_blocks.0.attentions.0.proj_in
        unet.down_blocks.0.motion_modules.0.proj_in unet.down_blocks.0.resnets.1.conv1
        unet.down_blocks.0.motion_modules.1.proj_in unet.down_blocks.0.downsamplers.0.conv
        unet.mid_block.resnets.0.conv1 unet.mid_block.attentions.0.proj_in unet.mid_block.resnets.1.conv1""",
    "LLaVA, before": """
        vision_tower.vision_model.encoder.layers.0.self_attn.q_proj vision_tower.vision_model.encoder.layers.0.mlp.fc1
        multi_modal_projector.linear_1 language_model.model.layers.0.self_attn.q_proj
        language_model.model.layers.0.mlp.down_proj language_model.lm_head""",
    "Text encoders beside a network": """
        text_encoder.text_model.encoder.layers.0.self_attn.q_proj text_encoder.text_model.encoder.layers.2.mlp.fc1
        text_encoder.text_model.encoder.layers.10.mlp.fc1 text_encoder_2.text_model.encoder.layers.0.mlp.fc1
        lora_te3_encoder_block_0_layer_0_SelfAttention_q transformer.x_embedder
        transformer.transformer_blocks.0.attn.to_q transformer.norm_out.linear""",
    "T5 with its one embedding": """
        shared encoder.block.0.layer.0.SelfAttention.q decoder.block.0.layer.0.SelfAttention.q lm_head""",
    "Two transformers in one file": """
        transformer.x_embedder transformer.blocks.0.attn1.to_q transformer.proj_out
        transformer_2.x_embedder transformer_2.blocks.0.attn1.to_q transformer_2.proj_out""",
    "OPT": """
        model.decoder.embed_tokens model.decoder.embed_positions model.decoder.project_in
        model.decoder.layers.0.self_attn.q_proj model.decoder.layers.0.self_attn.k_proj
        model.decoder.layers.0.self_attn.v_proj model.decoder.layers.0.self_attn.out_proj model.decoder.layers.0.fc1
        model.decoder.layers.0.fc2 model.decoder.project_out lm_head""",
    "wav2vec 2": """
        wav2vec2.feature_extractor.conv_layers.0.conv wav2vec2.feature_projection.projection
        wav2vec2.encoder.pos_conv_embed.conv wav2vec2.encoder.layers.0.attention.q_proj
        wav2vec2.encoder.layers.0.attention.k_proj wav2vec2.encoder.layers.0.attention.v_proj
        wav2vec2.encoder.layers.0.attention.out_proj wav2vec2.encoder.layers.0.feed_forward.intermediate_dense
        wav2vec2.encoder.layers.0.feed_forward.output_dense wav2vec2.encoder.layers.1.attention.q_proj lm_head""",
    "SAM": """
        vision_encoder.patch_embed.projection vision_encoder.layers.0.attn.qkv vision_encoder.layers.0.attn.proj
        vision_encoder.layers.0.mlp.lin1 vision_encoder.layers.0.mlp.lin2 vision_encoder.neck.conv1
        prompt_encoder.mask_embed.conv1 mask_decoder.transformer.layers.0.self_attn.q_proj
        mask_decoder.transformer.layers.0.self_attn.out_proj mask_decoder.transformer.layers.0.mlp.lin1
        mask_decoder.transformer.final_attn_token_to_image.q_proj mask_decoder.upscale_conv1""",
    "Z-Image": """
        all_x_embedder.2-1 t_embedder.mlp.0 cap_embedder.1 noise_refiner.0.attention.to_q
        context_refiner.0.attention.to_q layers.0.attention.to_q layers.0.attention.to_k layers.0.attention.to_v
        layers.0.attention.to_out.0 layers.0.feed_forward.w1 layers.0.feed_forward.w3 layers.0.feed_forward.w2
        layers.1.attention.to_q all_final_layer.2-1.linear""",
    "LTX": """
        transformer.proj_in transformer.adaln_single.linear transformer.caption_projection.linear_1
        transformer.transformer_blocks.0.attn1.to_q transformer.transformer_blocks.0.attn1.to_out.0
        transformer.transformer_blocks.0.attn2.to_q transformer.transformer_blocks.0.ff.net.0.proj
        transformer.transformer_blocks.0.ff.net.2 transformer.transformer_blocks.1.attn1.to_q transformer.proj_out""",
    "SegFormer": """
        segformer.encoder.patch_embeddings.0.proj segformer.encoder.block.0.0.attention.self.query
        segformer.encoder.block.0.0.attention.self.sr segformer.encoder.block.0.0.attention.output.dense
        segformer.encoder.block.0.0.mlp.dense1 segformer.encoder.block.0.0.mlp.dwconv.dwconv
        segformer.encoder.block.0.0.mlp.dense2 segformer.encoder.block.0.1.attention.self.query
        segformer.encoder.block.1.0.attention.self.query decode_head.linear_c.0.proj decode_head.classifier""",
    "XLNet": """
        transformer.word_embedding transformer.layer.0.rel_attn.q transformer.layer.0.ff.layer_1
        transformer.layer.0.ff.layer_2 transformer.layer.1.rel_attn.q""",
    "Stable Cascade": """
        prior.embedding prior.down_blocks.0.0.channelwise.0 prior.down_blocks.0.2.attention.attn.to_q
        prior.up_blocks.0.0.channelwise.0 prior.clf.1""",
    "Qwen3-Next": """
        model.layers.0.linear_attn.in_proj_qkvz model.layers.0.linear_attn.in_proj_ba
        model.layers.0.linear_attn.out_proj model.layers.0.mlp.gate model.layers.0.mlp.experts.0.gate_proj
        model.layers.0.mlp.shared_expert.gate_proj model.layers.1.self_attn.q_proj model.layers.1.mlp.gate""",
    "Jamba": """
        model.layers.0.mamba.in_proj model.layers.0.mamba.x_proj model.layers.0.mamba.out_proj
        model.layers.0.feed_forward.gate_proj model.layers.0.feed_forward.down_proj model.layers.1.self_attn.q_proj""",
    "Granite 4": """
        model.layers.0.mamba.in_proj model.layers.0.mamba.out_proj model.layers.0.shared_mlp.input_linear
        model.layers.0.shared_mlp.output_linear model.layers.1.self_attn.q_proj""",
    "ChatGLM": """
        transformer.embedding.word_embeddings transformer.encoder.layers.0.self_attention.query_key_value
        transformer.encoder.layers.0.self_attention.dense transformer.encoder.layers.0.mlp.dense_h_to_4h
        transformer.encoder.layers.0.mlp.dense_4h_to_h transformer.encoder.layers.1.self_attention.query_key_value
        transformer.output_layer""",
    "A text encoder of ComfyUI's name": """
        text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj diffusion_model.img_in
        diffusion_model.transformer_blocks.0.attn.to_q diffusion_model.transformer_blocks.0.img_mlp.net.0.proj
        diffusion_model.proj_out""",
    "Kandinsky 5": """
        transformer.text_embeddings.in_layer transformer.text_transformer_blocks.0.self_attention.to_query
        transformer.visual_transformer_blocks.0.self_attention.to_query
        transformer.visual_transformer_blocks.0.cross_attention.to_query
        transformer.visual_transformer_blocks.0.feed_forward.in_layer
        transformer.visual_transformer_blocks.0.feed_forward.out_layer transformer.out_layer.out_layer""",
    "HiDream": """
        transformer.x_embedder.proj transformer.t_embedder.timestep_embedder.linear_1
        transformer.p_embedder.pooled_embedder.linear_1 transformer.double_stream_blocks.0.block.attn1.to_q
        transformer.double_stream_blocks.0.block.ff_i.gate transformer.single_stream_blocks.0.block.attn1.to_q
        transformer.final_layer.linear""",
    "InternVL": """
        vision_model.embeddings.patch_embedding vision_model.encoder.layers.0.attn.qkv
        vision_model.encoder.layers.0.attn.proj vision_model.encoder.layers.0.mlp.fc1
        vision_model.encoder.layers.0.mlp.fc2 mlp1.1 mlp1.3 language_model.model.layers.0.self_attn.q_proj
        language_model.lm_head""",
    "LTX-2": """
        transformer.transformer_blocks.0.attn1.to_q transformer.transformer_blocks.0.audio_attn1.to_q
        transformer.transformer_blocks.0.attn2.to_q transformer.transformer_blocks.0.audio_attn2.to_q
        transformer.transformer_blocks.0.audio_to_video_attn.to_q
        transformer.transformer_blocks.0.video_to_audio_attn.to_q transformer.transformer_blocks.0.ff.net.0.proj
        transformer.transformer_blocks.0.audio_ff.net.0.proj""",
    "Florence-2, a stage": """
        vision_tower.blocks.0.0.spatial_block.window_attn.fn.qkv
        vision_tower.blocks.0.0.spatial_block.window_attn.fn.proj
        vision_tower.blocks.0.0.spatial_block.ffn.fn.net.fc1
        vision_tower.blocks.0.0.channel_block.channel_attn.fn.qkv
        vision_tower.blocks.0.0.channel_block.ffn.fn.net.fc1""",
    "UNet3D": """
        unet.conv_in unet.transformer_in.transformer_blocks.0.attn1.to_q unet.down_blocks.0.temp_convs.0.conv1.2""",
    "SD3.5 medium, original": """
        joint_blocks.0.x_block.attn.qkv joint_blocks.0.context_block.attn.qkv joint_blocks.0.x_block.attn.proj
        joint_blocks.0.x_block.attn2.qkv joint_blocks.0.x_block.mlp.fc1""",
    "Words of no row, by their ends": """
        piece_embedding layers.0.sparse_attn.q_proj layers.0.token_mixer.in_proj
        layers.0.mlp.fc1""",
    "A network that no row names": "blobs.2.xx.aa blobs.2.xx.bb blobs.10.xx.aa zz.1 zz.2 proj_out",
}  # fmt: skip


@pytest.mark.parametrize("network", SAME_ORDER)
@pytest.mark.parametrize("seed", range(3))
def test_other_names_of_networks_have_the_same_order(network, seed):
    modules = SAME_ORDER[network].split()
    assert ordered(modules, seed) == modules
    flat = [f"lycoris_{module.replace('.', '_')}" for module in modules if "lora_" not in module]
    assert ordered(flat, seed) == flat


@pytest.mark.parametrize("network", ["stable_diffusion_1", "stable_diffusion_xl"])
def test_a_unet_by_its_original_names_is_the_same_network(network):
    modules = NETWORKS[network]
    originals = [original_name(module, modules) for module in modules]
    assert len(set(originals)) == len(modules)
    for joint, front in ((".", "diffusion_model."), ("_", "lora_unet_")):
        named = [front + name.replace(".", joint) for name in originals]
        assert list(map(canonical_module, named)) == list(map(canonical_module, modules))


def original_name(module: str, modules: list[str]) -> str:
    """Return the name in Stable Diffusion's original code; diffusers' convert_ldm_unet_checkpoint leads back."""
    beside = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    if module in beside:
        return beside[module]
    block, *path = module.split(".")
    level = 0 if block == "mid_block" else int(path.pop(0))
    kind, position, *rest = path
    within = ".".join(rest)
    for ours, theirs in (
        ("conv1", "in_layers.2"),
        ("time_emb_proj", "emb_layers.1"),
        ("conv2", "out_layers.3"),
        ("conv_shortcut", "skip_connection"),
    ):
        within = theirs if within == ours else within
    if block == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(position)}.{within}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op"
    if kind == "upsamplers":
        attentions = any(name.startswith(f"up_blocks.{level}.attentions") for name in modules)
        return f"output_blocks.{3 * level + 2}.{2 if attentions else 1}.conv"
    side, number = ("input", 3 * level + 1) if block == "down_blocks" else ("output", 3 * level)
    return f"{side}_blocks.{number + int(position)}.{int(kind == 'attentions')}.{within}"


# ----------------------------------------------------------------------------------------------------------------------
# Modules that are counted
# ----------------------------------------------------------------------------------------------------------------------


def block_of(width: int, projections: str = "qkvo", depth: int = 1) -> list[tuple[int, int]]:
    """Return the sides of a block's modules as cloneofsimo counts them: self attention, GEGLU, cross attention."""
    text = 768
    crossed = {"q": width, "k": text, "v": text, "o": width}
    block = [(width, width) for _ in projections]
    geglu = [(width, 8 * width)] if projections == "qkvo" else []
    return depth * [*block, *geglu, *((crossed[name], width) for name in projections)]


def unet(projections: str, levels: list[tuple[int, int]]) -> tuple[list, list, list]:
    """Return the sides of the modules of a UNet's way down, mid block and way up."""
    down = [sides for width, depth in levels for sides in 2 * block_of(width, projections, depth)]
    up = [sides for width, depth in reversed(levels) for sides in 3 * block_of(width, projections, depth)]
    return down, block_of(*(levels[-1][0], projections, levels[-1][1])), up


SD1, SDXL = [(320, 1), (640, 1), (1280, 1)], [(640, 2), (1280, 10)]


@pytest.mark.parametrize("projections", ["qkvo", "qv", "q"])
@pytest.mark.parametrize("levels", [SD1, SDXL])
@pytest.mark.parametrize("name", ["unet_{}", "{}"])
def test_a_mid_block_that_is_counted_last_stands_between_down_and_up(name, levels, projections):
    down, middle, up = unet(projections, levels)
    sides = {name.format(i): side for i, side in enumerate(down + up + middle)}
    numbers = list(map(name.format, range(len(sides))))
    start, last = len(down), len(down) + len(up)
    assert in_network_order(sides) == numbers[:start] + numbers[last:] + numbers[start:last]


@pytest.mark.parametrize("projections", ["qkvo", "qv"])
@pytest.mark.parametrize("levels", [SD1, SDXL])
def test_a_unet_that_is_counted_in_its_order_stays_so(levels, projections):
    down, middle, up = unet(projections, levels)
    sides = {f"unet_{i}": side for i, side in enumerate(down + middle + up)}
    assert in_network_order(sides) == list(sides)


@pytest.mark.parametrize(
    "sides",
    [
        [(4, 4)] * 12,
        [(4, 4)] * 4 + [(8, 8)] * 4,
        [(320, 320)] * 4 + [(640, 640)] * 9 + [(320, 320)] * 6 + [(640, 640)] * 2,
        [(320, 320), (640, 640), (320, 320), (1280, 1280)],
        [(320, 768)] * 7,
        [],
    ],
)
def test_where_widths_show_no_mid_block_the_count_stands(sides):
    counted = {f"unet_{i}": side for i, side in enumerate(sides)}
    assert in_network_order(counted) == list(counted)


def test_counted_modules_of_a_file_keep_to_their_component():
    down, middle, up = unet("q", SD1)
    sides = {f"text_encoder_{i}": (768, 768) for i in range(12)}
    sides |= {f"unet_{i}": side for i, side in enumerate(down + up + middle)}
    names = in_network_order(sides)
    assert names[:12] == list(sides)[:12]
    assert names[12:26] == [*(f"unet_{i}" for i in range(12)), "unet_30", "unet_31"]


def test_depths_of_a_file_of_cloneofsimo_are_those_of_the_network():
    down, middle, up = unet("qkvo", SD1)
    entries = {}
    for i, (wide, high) in enumerate(down + up + middle):
        entries[f"unet:{i}:down"] = {"dtype": "F32", "shape": [4, wide], "data_offsets": [0, 0]}
        entries[f"unet:{i}:up"] = {"dtype": "F32", "shape": [high, 4], "data_offsets": [0, 0]}
    layers = parse_header(json.dumps(entries).encode()).layout.layers
    assert [layer.name for layer in layers[2 * 54 : 2 * 54 + 2]] == ["unet:135:down", "unet:135:up"]
    assert layers[-1].name == "unet:134:up"


# ----------------------------------------------------------------------------------------------------------------------
# Any names
# ----------------------------------------------------------------------------------------------------------------------


def test_a_word_has_one_row():
    words = " ".join(ROWS).split()
    assert len(set(words)) == len(words)


def test_the_order_of_equal_looking_modules_is_one():
    modules = ["unet_1_a", "unet_01_a", "unet__1_a"]
    assert len(set(map(str, map(depth_key, modules)))) == 3


@pytest.mark.parametrize("module", ["unet_²", "unet_" + "9" * 5000, "", "_", "\n", "resnets_٣", "resnets_resnets_1"])
def test_any_module_has_a_place(module):
    assert set(in_network_order({module: (1, 1), "a": (1, 1), "attentions_0": (1, 1)})) == {module, "a", "attentions_0"}
