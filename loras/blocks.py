"""Modules -> the block of the network that each is in, and what it does there, under the names that people use.

The UNet of Stable Diffusion is numbered as in its original code, which is what tools that weight a LoRA block by block
show: IN00 to IN11, MID, OUT00 to OUT11. Files of diffusers have levels and positions within them instead.
Transformers keep their own numbers: double 0 and single 12 (Flux), block 7 (SD3, PixArt, T5), layer 0 (language models,
CLIP); blocks of text encoders have TE, TE2 or TE3 in front.

All names are of canonical modules (see keys.py). A module outside of all blocks, or of an unknown network, has "".
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from itertools import count
from typing import NamedTuple

# ----------------------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------------------

_TEXT_ENCODERS = {  # the first that matches counts
    **{f"TE{number}": re.compile(rf"(?:^|_)text_encoder_{number}_") for number in (2, 3, 4)},
    "TE": re.compile(r"(?:^|_)text_encoders?_"),
}
_UNET = re.compile(
    r"(?:^|_)(?:(?P<middle>mid_block|middle_block)|(?P<first>conv_in$)"
    r"|(?P<side>input|output)_blocks_(?P<number>[0-9]{1,2})"
    r"|(?P<way>down|up)_blocks_(?P<level>[0-9]{1,2})"
    r"(?:_(?P<part>attentions|resnets|motion_modules|temp_attentions|temp_convs|downsamplers|upsamplers)"
    r"_(?P<position>[0-9]{1,2}))?)(?=_|$)"
)
_POSITIONS = {"down": 2, "up": 3}  # in a level of Stable Diffusion's UNet
_NUMBERED = re.compile(
    r"(?:^|_)(?:(?P<kind>double|single|joint)_(?:stream_)?)?(?P<transformer>transformer_)?"
    r"(?P<noun>refiner_blocks|refiner|resblocks|blocks?|layers?|h)_(?P<number>[0-9]{1,6})(?=_|$)"
)
_NOUNS = {"refiner_blocks": "refiner", "resblocks": "block", "blocks": "block", "layers": "layer", "h": "layer"}


class _Place(NamedTuple):
    """A block with its number, the text encoder that it is of, and what stands before it in a module's name."""

    block: str
    encoder: str = ""
    part: str | None = None


@lru_cache(maxsize=2**6)  # files of one collection mostly have the same modules
def blocks_of(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return the name of each module's block, "" where it is in none.

    Args:
        modules: All modules of a file: that transformer_blocks are the double ones of Flux is seen by single ones
            beside them; and blocks of several parts, as of an encoder and a decoder, have the part's name in front.

    Example:
        >>> blocks_of(("unet_down_blocks_1_attentions_0_proj_in", "text_encoder_layers_3_mlp_fc1", "unet_conv_out"))
        ('IN04', 'TE layer 3', '')
    """
    other_unet = any(_is_of_other_unet(module) for module in modules)
    double = any((match := _NUMBERED.search(module)) and match["kind"] == "single" for module in modules)
    places = [_unet_place(module, other_unet) or _numbered_place(module, double) for module in modules]
    parts = defaultdict(dict)  # text encoder, "" for the network itself -> its parts that have numbered blocks
    for place in places:
        if place.part is not None:
            parts[place.encoder][place.part] = None
    words = {encoder: _words_of(list(of_encoder)) for encoder, of_encoder in parts.items()}
    return tuple(
        " ".join(filter(None, (place.encoder, words.get(place.encoder, {}).get(place.part), place.block)))
        for place in places
    )


def _is_of_other_unet(module: str) -> bool:
    """Return whether a level has more positions than in Stable Diffusion, whose numbers then mean nothing."""
    match = _UNET.search(module)
    return bool(match and match["position"] and int(match["position"]) >= _POSITIONS[match["way"]])


def _unet_place(module: str, other_unet: bool) -> _Place | None:
    """Return the block of a UNet that a module is in; None where it is in none.

    A level of Stable Diffusion's UNet has two blocks and a downsampler on the way down, after the first convolution,
    and three blocks on the way up, the last of which holds the upsampler.
    """
    match = _UNET.search(module)
    if not match:
        return None
    if match["middle"]:
        return _Place("MID")
    if match["first"]:
        return _Place("IN00")
    if match["number"]:
        return _Place(f"{'IN' if match['side'] == 'input' else 'OUT'}{int(match['number']):02}")
    way, level, part = match["way"], int(match["level"]), match["part"]
    if other_unet or not part:
        return _Place(f"{way} {level}")
    position = int(match["position"])
    if way == "down":
        return _Place(f"IN{3 * level + (3 if part == 'downsamplers' else 1 + position):02}")
    return _Place(f"OUT{3 * level + (2 if part == 'upsamplers' else position):02}")


def _numbered_place(module: str, double: bool) -> _Place:
    """Return the block of a transformer that a module is in; ``double``: it has single blocks too."""
    match = _NUMBERED.search(module)
    if not match:
        return _Place("")
    encoder, start = "", 0
    for name, pattern in _TEXT_ENCODERS.items():
        if text := pattern.search(module[: match.start() + 1]):
            encoder, start = name, text.end()
            break
    kind = _NOUNS.get(match["noun"], match["noun"])
    if match["kind"] in ("double", "single"):
        kind = match["kind"]
    elif double and not encoder and kind == "block" and (match["kind"] or match["transformer"]):
        kind = "double"
    part = module[start : match.start()]
    return _Place(f"{kind} {int(match['number'])}", encoder, "" if part in ("transformer", "model") else part)


def _words_of(parts: list[str]) -> dict[str, str]:
    """Return what distinguishes parts of a network from each other: one word of each, or all but those in common."""
    if len(parts) == 1:
        return {parts[0]: ""}
    words = [part.split("_") if part else [] for part in parts]
    common = next(i for i in count() if len({tuple(of_part[i : i + 1]) for of_part in words}) > 1)
    first = [" ".join(of_part[common : common + 1]) for of_part in words]
    whole = [" ".join(of_part[common:]) for of_part in words]
    return dict(zip(parts, first if len(set(first)) == len(parts) else whole, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Within a block
# ----------------------------------------------------------------------------------------------------------------------

_PROJECTIONS = {  # name -> ends of modules; the first that matches counts
    "qkv": r"to_qkv|qkv|qkv_proj|qkv_lora[12]?|attn\d?_in_proj|c_attn|query_key_value|[Ww]qkv",
    "qkv, ff in": r"to_qkv_mlp_proj",
    "q": r"to_q|q_proj|add_q_proj|[qQ]|query|q_lin|wq",
    "k": r"to_k|k_proj|add_k_proj|[kK]|key|k_lin|wk",
    "v": r"to_v|v_proj|add_v_proj|[vV]|value|v_lin|wv",
    "o": r"self_attn_o_proj",  # the words that those use who train language models
    "mlp gate": r"mlp_gate_proj",
    "mlp gate, up": r"mlp_gate_up_proj",
    "mlp up": r"mlp_up_proj",
    "mlp down": r"mlp_down_proj",
    "out": r"to_out(?:_0)?|to_add_out|out_proj|o_proj|[oO]|out_lin|attn\d?_(?:proj|c_proj|out)|proj_lora[12]?"
    r"|attention_(?:output_)?dense|attn_dense|attention_wo",
    "ff gate": r"gate_proj|w1|wi_0",
    "ff gate, in": r"gate_(?:and_)?up_proj",
    "ff in": r"ffn?(?:_context)?_(?:net_0_proj|linear_in)|ffn?_0|mlp_(?:0|net_0_proj|fc1)|fc1|up_proj|w3|wi(?:_1)?|c_fc"
    r"|proj_mlp|lin1|intermediate_dense|dense_h_to_4h",
    "ff out": r"ffn?(?:_context)?_(?:net_2|linear_out)|ffn?_2|mlp_(?:2|net_2|fc2|c_proj)|fc2|down_proj|w2|wo"
    r"|output_dense|dense_4h_to_h|lin2",
    "in": r"in_proj",
    "proj in": r"proj_in",
    "proj out": r"proj_out",
    "time": r"time_emb_proj|emb_layers_1",
    "linear1": r"linear1",
    "linear2": r"linear2",
    "conv": r"conv\d?(?:_in|_out|_shortcut)?(?:_\d+)?|in_layers_2|out_layers_3|op|skip_connection",
    "mod": r"norm\d?(?:_context)?_linear|(?:img_|txt_)?mod_lin|(?:img|txt)_mod_1|modulation_lin|adaLN_modulation_1",
}
_ENDS = {name: re.compile(rf"(?:^|_)(?:{ends})$") for name, ends in _PROJECTIONS.items()}
# Of the text beside the image, in blocks that read both.
_CONTEXT = re.compile(
    r"add_[qkv]_proj$|to_add_out$|ff_context_|norm1_context_|(?:^|_)txt_(?:attn|mlp|mod)_|context_block_|_lora2$"
)
_ATTENTION = re.compile(r"_(attn\d?|self_attn|cross_attn|img_attn|txt_attn|SelfAttention|EncDecAttention)(?:_|$)")


def projection_of(module: str) -> str:
    """Return what a module does in its block, by its name's end: "q", "out", "ff in", "context q"; "" if unknown.

    Example:
        >>> projection_of("transformer_blocks_0_attn_to_out_0"), projection_of("layers_0_mlp_gate_proj")
        ('out', 'mlp gate')
    """
    name = next((name for name, ends in _ENDS.items() if ends.search(module)), "")
    return f"context {name}" if name and _CONTEXT.search(module) else name


def attention_of(module: str) -> str:
    """Return the attention that a module is of, by the name that the network gives it, such as attn2; "" for none."""
    match = _ATTENTION.search(module)
    return match[1] if match else ""
