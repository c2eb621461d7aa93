"""Depth: the order in which a network computes its modules, of their canonical ids (see keys.py).

A file's own order is alphabetical and means nothing. The order is one table, `ROWS`: names of one row stand at the
same place in different networks, a row before the next. Parts of a path are compared one by one; parts that no row
names stand in the middle, words by the alphabet and numbers as numbers; but attentions and embeddings that no row
names stand with those that one does. Where branches are parallel the order is a convention: q, k, v, then out; image
before text; embeddings of the image, the time, the guidance, the pooled text, the text; attention before the
feed-forward that runs beside it; vision towers before language models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby

_MIDDLE = "..."  # where parts stand that no row names
_NUMBERED_TOGETHER = (
    "resnets temp_convs attentions temp_attentions motion_modules"  # resnets.0, attentions.0, resnets.1
)
ROWS = (
    # Components
    "vision_tower vision_model vision_backbone vision_encoder visual image_encoder audio_tower audio_encoder",
    "multi_modal_projector mm_projector connector visual_projection aligner",
    "text_encoder text_encoders clip_l",
    "text_encoder_2 clip_g",
    "text_encoder_3 t5xxl",
    "text_encoder_4",
    "text_model language_model",
    # Embeddings
    "img_in x_embedder all_x_embedder patchify_proj patch_embed patch_embedding pos_embed visual_embeddings ^proj_in",
    "time_in time_embedding time_embed time_embedder timestep_embedder t_embedder time_text_embed time_caption_embed"
    " time_step_proj condition_embedder adaln_single emb time_embeddings time_guidance_embed",
    "time_projection time_proj",
    "guidance_in guidance_embedder distilled_guidance_layer",
    "vector_in text_embedder add_embedding label_emb class_embedding y_embedder p_embedder pooled_text_embeddings",
    "txt_in context_embedder caption_projection caption_embedder cap_embedder text_embedding text_proj"
    " encoder_hid_proj text_embeddings",
    "img_emb image_embedder",
    "conv_in",
    "transformer_in",
    "shared embeddings embedding feature_extractor",
    "embed_tokens tok_embeddings token_embedding word_embeddings word_embedding wte embed_in patch_embeddings",
    "token_type_embeddings",
    "feature_projection",
    "conv1",
    "time_emb_proj",
    "conv2",
    "conv_shortcut",
    "embed_positions position_embedding position_embeddings wpe",
    "proj_in project_in",
    "noise_refiner",
    "context_refiner",
    # Modulation, of the image and of the text
    "norm norm1 adaLN_modulation modulation img_mod x_block_adaLN_modulation",
    "norm1_context txt_mod context_block_adaLN_modulation",
    # Attention
    "attn attn1 self_attn self_attention SelfAttention attention self mamba mixer",
    "attn2 cross_attn cross_attention crossattention encoder_attn EncDecAttention",
    "to_q q_proj q_lin query wq q Q query_proj q_a_proj receptance",
    "q_b_proj",
    "to_k k_proj k_lin key wk k K key_proj kv_a_proj_with_mqa",
    "kv_b_proj",
    "to_v v_proj v_lin value wv v V value_proj",
    "to_qkv to_qkv_mlp_proj qkv qkv_proj Wqkv c_attn query_key_value in_proj in_proj_qkvz img_attn_qkv x_block_attn_qkv"
    " qkv_lora qkv_lora1",
    "in_proj_ba",
    "add_q_proj",
    "add_k_proj k_img",
    "add_v_proj v_img",
    "txt_attn_qkv to_added_qkv context_block_attn_qkv qkv_lora2",
    "relative_attention_bias",
    "conv1d",
    "x_proj",
    "dt_proj",
    "to_out out_proj o_proj out_lin o O img_attn_proj x_block_attn_proj proj_lora proj_lora1",
    "to_add_out txt_attn_proj context_block_attn_proj proj_lora2",
    "x_block_attn2",
    # Feed-forward
    "norm2",
    "linear1 proj_mlp",
    "mlp ff ffn feed_forward feedforward DenseReluDense intermediate block_sparse_moe img_mlp x_block_mlp shared_mlp",
    "ff_context txt_mlp context_block_mlp",
    "gate router",
    "experts",
    "shared_expert_gate_proj shared_experts_gate_proj",
    "shared_expert shared_experts",
    "shared_expert_gate",
    "gate_proj gate_up_proj w1 wi_0 feed_forward_linear_1 conv_inverted",
    "up_proj w3 wi Wi wi_1 fc1 c_fc lin1 dense_h_to_4h feed_forward_linear_3 conv_depth dense1",
    "dwconv",
    "down_proj w2 fc2 lin2 dense_4h_to_h feed_forward_linear_2 conv_point dense2",
    "linear2",
    # Blocks
    "encoder prompt_encoder",
    "down_blocks input_blocks",
    "mid_block middle_block",
    "up_blocks output_blocks",
    _NUMBERED_TOGETHER,
    "text_transformer_blocks",
    "transformer_blocks visual_transformer_blocks joint_transformer_blocks"
    " joint_blocks double_blocks double_stream_blocks double_layers",
    "spatial_block",
    "channel_block",
    _MIDDLE,
    "final_attn_token_to_image",
    "single_transformer_blocks single_blocks single_stream_blocks single_layers",
    "decoder mask_decoder",
    "downsamplers upsamplers",
    # Outputs, of a part and of the network
    "proj dense output c_proj wo Wo out out_projection",
    "merger",
    "pooler text_projection",
    "norm_out conv_norm_out final_layer all_final_layer",
    "proj_out conv_out head decode_head project_out",
    "pre_classifier cls",
    "lm_head embed_out output_layer score classifier qa_outputs",
    "transformer_2",
)
_ROW_OF = {word: i for i, row in enumerate(ROWS) for word in row.split()}
_INDEX_TOGETHER = {word: i for i, word in enumerate(_NUMBERED_TOGETHER.split())}
_LONGEST: dict[str, int] = {}  # first part of a name -> the parts of the longest name that begins so
for _word in _ROW_OF:
    _first, *_others = _word.lstrip("^").split("_")
    _LONGEST[_first] = max(_LONGEST.get(_first, 0), 1 + len(_others))
_PIECE = re.compile(r"[^\W\d_]+|\d{1,18}")  # of a part that no row names
# Ends of words, as rel_attn and pos_conv_embed, that stand with their kind; and parts that begin no such word.
_ATTENTION = re.compile(r"[^\W\d_]*(?:attn|[aA]ttention)\d?|mamba\d?|mixer")
_EMBEDDING = re.compile(r"embed(?:s|dings?|ders?)?")
_CONTAINERS = {"block", "blocks", "layer", "layers", "transformer", "model", "module", "net", "backbone", "stages"}

_FRONT = re.compile(r"^(?:unet|transformer(?!_in_)|model)_(?=\D)")  # of some modules of a network and not of others


@lru_cache(maxsize=2**16)  # headers differ more than modules do
def depth_key(module: str) -> tuple:
    """Return a sort key for the network's order.

    Example:
        >>> sorted(["lm_head", "layers_10_mlp_up_proj", "layers_9_mlp_up_proj", "embed_tokens"], key=depth_key)
        ['embed_tokens', 'layers_9_mlp_up_proj', 'layers_10_mlp_up_proj', 'lm_head']
    """
    places = []
    together = None  # a word whose number comes first
    for part, place in _placed_words(_FRONT.sub("", module)):
        if not part.isdecimal():
            together = part if part in _INDEX_TOGETHER else None
            places.append((place, 0, 0, part))
        elif together:
            places[-1] = (_ROW_OF[together], int(part), _INDEX_TOGETHER[together], "")
            together = None
        else:
            places.append((place, 1, int(part), ""))  # numbers after words
    return (places, module)


def _placed_words(module: str) -> list[tuple[str, int]]:
    """Return the words and numbers of a module, each with its row."""
    parts = module.split("_")
    words: list[tuple[str, int]] = []
    loose = i = 0  # loose: how many of the last words may be of a kind's, as "rel" is of "rel_attn"
    while i < len(parts):
        length, row = _longest_name(parts, i)
        word = "_".join(parts[i : i + length])
        kind, pieces, begins = _of_part(parts[i + length - 1])
        if kind is not None:
            start = len(words) - loose
            before = [begin for begin, _ in words[start:]]
            crossed = "to" in before and _ATTENTION.fullmatch(word)  # audio_to_video_attn
            row = _ROW_OF["attn2"] if crossed else kind if row is None else row
            words[start:] = [("_".join([*before, word]), row)]
            loose = 0
        elif row is not None:
            words.append((word, row))
            loose = 0
        else:
            words += pieces
            loose = loose + 1 if begins else 0
        i += length
    return words


def _longest_name(parts: list[str], start: int) -> tuple[int, int | None]:
    """Return how many parts make the longest name that a row has, and the row; 1 and None where no row has one."""
    for length in range(min(_LONGEST.get(parts[start], 0), len(parts) - start), 0, -1):
        name = "_".join(parts[start : start + length])
        if start == 0 and f"^{name}" in _ROW_OF:
            return length, _ROW_OF[f"^{name}"]
        counted = length == len(parts) and name.startswith("text_encoder_")  # by cloneofsimo
        if name in _ROW_OF and not counted:
            return length, _ROW_OF[name]
    return 1, None


@lru_cache(maxsize=2**12)
def _of_part(part: str) -> tuple[int | None, list[tuple[str, int]], bool]:
    """Return the row of words of a kind that end so; and, of no kind, its words with rows, and if one may begin so."""
    pieces = [(piece, _ROW_OF.get(piece, _ROW_OF[_MIDDLE])) for piece in _PIECE.findall(part)]
    kind = None
    if _ATTENTION.fullmatch(part):
        kind = _ROW_OF["attn2" if part.endswith("attn2") else "attn"]
    elif _EMBEDDING.fullmatch(part):
        kind = _ROW_OF["embed_tokens"]
    return kind, pieces, part.isalpha() and part not in _CONTAINERS


def in_network_order(sides: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return the modules of a file in the network's order.

    Args:
        sides: The sides in and out of each module's weight matrix; a convolution's kernel is part of the in.
    """
    ordered = sorted(sides, key=depth_key)
    for counted in (r"unet_\d+", r"\d+"):  # files of cloneofsimo, and of numbers alone
        numbered = [module for module in ordered if re.fullmatch(counted, module)]
        moved = iter(_with_middle_between(numbered, sides))
        ordered = [next(moved) if re.fullmatch(counted, module) else module for module in ordered]
    return ordered


def _with_middle_between(modules: list[str], sides: Mapping[str, tuple[int, int]]) -> list[str]:
    """Put the mid block of a UNet whose modules are counted down, up, mid between down and up, if widths show it.

    Diffusers registers a UNet's mid_block last, and files that count modules have it last. Widths of the square
    matrices rise on the way down, fall on the way up, and the mid block has the largest: 320, 640, 1280, 640, 320, 1280
    in Stable Diffusion 1, with 2 blocks a level down and 3 up. The ways' shares of the largest width are as those of
    the other levels. Where the widths are any others, the order stays as it was counted.
    """
    runs: list[tuple[int, list[str]]] = []  # width, modules; a matrix that is not square is of the block before it
    for width, group in groupby(modules, key=lambda module: sides[module][0] if len({*sides[module]}) == 1 else None):
        if runs and width in (None, runs[-1][0]):
            runs[-1][1].extend(group)
        else:
            runs.append((width or 0, list(group)))
    widths, lengths = [width for width, _ in runs], [len(group) for _, group in runs]
    levels = len(runs) // 2
    if levels < 2 or widths != [
        *sorted(widths[:levels]),
        *sorted(widths[: levels - 1], reverse=True),
        widths[levels - 1],
    ]:
        return modules
    down, up = sum(lengths[: levels - 1]), sum(lengths[levels:-1])
    first, rest = divmod(lengths[levels - 1] * down, down + up)
    if rest or lengths[levels - 1] % lengths[-1] or first % lengths[-1]:
        return modules
    start = down + first
    middle = runs[-1][1]
    return modules[:start] + middle + modules[start : -len(middle)]
