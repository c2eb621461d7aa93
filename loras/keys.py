"""Keys of LoRA files -> modules and roles, whatever wrote the file; what else lies in one.

Every trainer names the factors of an update in its own style. A style is one row of `KEY_FAMILIES`: a pattern that
gives the module, its role, and the adapter where a file can hold several. In every style a module has the same id.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from loras.names import one_line

# Style -> pattern of its keys. Groups: m, the module; r, the role (down or A, up or B, mid; of LoHa and LoKr a tensor);
# and in some styles a, the adapter, and p, the attention projection that ends the module.
KEY_FAMILIES = {
    "numbered": r"^lora\.(?P<r>down|up)\.weight\.(?P<m>\d+)$",
    "diffusers": r"^(?P<m>.+)\.lora\.(?P<r>down|up)\.weight$",
    "diffusers text encoder": r"^(?P<m>.+)\.lora_linear_layer\.(?P<r>down|up)\.weight$",
    "diffusers legacy": r"^(?P<m>.+?)(?:\.processor)?\.to_(?P<p>q|k|v|out)_lora\.(?P<r>down|up)\.weight$",
    "PEFT": r"^(?P<m>.+)\.lora_(?P<r>A|B)\.weight$",
    "PEFT with adapter name": r"^(?P<m>.+)\.lora_(?P<r>A|B)\.(?P<a>[^.]+)\.weight$",
    "PEFT bare": r"^(?P<m>.+)\.lora_(?P<r>A|B)$",
    "kohya": r"^(?P<m>.+)\.lora_(?P<r>down|up|mid)\.weight$",
    "kohya with adapter name": r"^(?P<m>.+)\.lora_(?P<r>down|up|mid)\.(?P<a>[^.]+)\.weight$",
    "XLabs": r"^(?P<m>.+\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<r>down|up)\.weight$",
    "cloneofsimo": r"^(?P<m>(?:unet|text_encoder):\d+):(?P<r>down|up)$",
    "MLX": r"^(?P<m>.+)\.lora_(?P<r>a|b)$",
    "torchtune": r"^(?P<m>.+)\.lora_(?P<r>a|b)\.weight$",
    "PEFT embedding": r"^(?P<m>.+)\.lora_embedding_(?P<r>A|B)(?:\.(?P<a>[^.]+))?$",
    "LoHa": r"^(?P<m>.+)\.(?P<r>hada_(?:w[12]_[ab]|t[12]))(?:\.(?P<a>[^.]+))?$",
    "LoKr": r"^(?P<m>.+)\.(?P<r>lokr_(?:w[12](?:_[ab])?|t[12]))(?:\.(?P<a>[^.]+))?$",
}
# An alpha is of a module, and named by it or beside its factors.
SCALE = (
    r"^(?P<m>.+?)(?:(?:\.processor)?\.to_(?P<p>q|k|v|out)_lora(?:\.(?:down|up))?)?"
    r"(?:\.lora(?:_linear_layer)?(?:[._](?:down|up|mid|A|B))?)?(?:\.weight|\.default)?\.alpha$"
)
_STYLES = {style: re.compile(pattern) for style, pattern in KEY_FAMILIES.items()}
_SCALE = re.compile(SCALE)
ROLES = {"A": "down", "B": "up", "a": "down", "b": "up"}
# Adapters of modules that cannot be read -> parts of their keys. One such key refuses the file: its modules would be
# missing from what is read, in silence.
REFUSED_FAMILIES = {
    "an OFT": "oft_R oft_diag",
    "a BOFT": "boft_R boft_s",
    "a GLoRA": "glora_A glora_B glora_C glora_D glora_E",
    "an AdaLoRA": "lora_E",
    "an IA3": "ia3_l",
    "a VeRA": "vera_lambda_b vera_lambda_d vera_A vera_B",
    "a PVeRA": "pvera_lambda_b pvera_lambda_d pvera_A pvera_B",
    "a VB-LoRA": "vblora_logits_A vblora_logits_B vblora_vector_bank",
    "a RandLoRA": "randlora_lambda randlora_gamma randlora_A randlora_B",
    "a FourierFT": "fourierft_spectrum",
    "a WaveFT": "waveft_spectrum",
    "a Householder (HRA)": "hra_u",
    "a circulant (C3A)": "c3a_kernel",
    "a GraLoRA": "gralora_A gralora_B",
    "a HiRA": "hira_A hira_B hira_embedding_A hira_embedding_B",
    "a DeLoRA": "delora_A delora_B delora_lambda delora_w_norm",
    "a DEFT": "deft_P deft_R",
    "a Lily": "lily_A lily_B lily_router",
    "a PEANuT": "peanut_A peanut_B peanut_encoders peanut_decoders",
    "a Poly": "poly_lora_A poly_lora_B poly_router",
    "a PSOFT": "psoft_R",
    "a TinyLoRA": "tinylora_A tinylora_B tinylora_P tinylora_v",
    "a Uni-LoRA": "unilora_theta_d",
    "a FRoD": "frod_V frod_s_indices frod_s_size frod_lambda_l frod_lambda_s_values",
    "a SHiRA": "shira_weight shira_indices",
    "a SuperTuning": "supertuning_indices supertuning_values",
    "a RoAd": "road_theta road_alpha",
    "a MiSS": "miss_block bone_block",
    "an AdaMSS": "adamss_A adamss_B",
    "an OSF": "osf_svd_params",
    "a ShadowPEFT": "shadow_down shadow_up shadow_update_gate shadow_update_transform",
    "an X-LoRA": "xlora_classifier",
    "a KaSA": "lora_diag",
}
_FAMILY_OF = {part: family for family, parts in REFUSED_FAMILIES.items() for part in parts.split()}
_MANGLED = re.compile(r"lora_(unet|te\d?)_.+_lora_(down|up)\.weight")
# The same where only all these names of one module together say so.
REFUSED_TOGETHER = {
    "a GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    "a T-LoRA": (".q_layer.weight", ".p_layer.weight", ".lambda_layer"),
    "an IA3": (".on_input", ".weight"),
}
# What may lie beside the pairs; the first row that fits counts.
IGNORED = {
    "*.dora_scale": r"\.dora_scale$",
    "*.lora_magnitude_vector": r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$",
    "*.m": r"\.m$",  # MLX's magnitudes of DoRA
    "*.lora_A.bias, *.lora_B.bias": r"\.lora_[AB](\.[^.]+)?\.bias$",
    "embeddings <...>": r"^<.+>$",
    "embeddings bundle_emb.*": r"^bundle_emb\.",
    "embeddings of tokens": r"^(emb_params|clip_[lg]|t5xxl)$|^string_to_param\.|\.trainable_tokens_",
    "prompts": r"^(prompt_embeddings|prefix_task_(cols|rows))$",
    "*.modules_to_save.*": r"\.modules_to_save\.",
    "*.base_layer.*": r"\.base_layer\.",
    "differences of biases and norms": r"\.(diff|diff_b|w_norm|b_norm|beft_bias)$|\.ln_tuning_layers\.",
}
_IGNORED = {name: re.compile(pattern) for name, pattern in IGNORED.items()}
FULL_DIFFERENCES = "full differences (*.diff)"  # of matrices and convolutions
OTHERS = "tensors that are no LoRA"
# Whole parts of a key that name a factor, whatever its writer calls it; "lora" inside a name says nothing.
_FACTOR = re.compile(
    r"(?:^|\.)lora(?:_linear_layer)?[._](?:[a-zA-Z0-9]|down|up|mid|left|right|embedding_[a-zA-Z])(?=\.|$)"
)


class LoraFileError(ValueError):
    """A file that cannot be used; the message says what is wrong and what to do.

    Names in it come from files that anyone may have written: the message is one line of printable characters, and cut
    in the middle where it is too long.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


# ----------------------------------------------------------------------------------------------------------------------
# Modules
# ----------------------------------------------------------------------------------------------------------------------

# What programs put into paths (torch.compile, FSDP, checkpointing; early diffusers), with the joint before or behind.
_INSERTED = re.compile(
    r"[._](?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=[._]|$)"
    r"|^(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]|\.processor(?=\.|$)"
)
# What stands in front of a network's own names, nested in any order. Group te: a text encoder, which remains.
_OF_COMFYUI = r"(?:text_encoders[._])?(?:clip_l|clip_g|t5xxl)|text_encoders\.\w*t5\w*"
_TEXT_ENCODER = rf"(?P<te>(?:lora|lycoris)_te[1-4]?|text_encoder(?:_[2-9])?|{_OF_COMFYUI})[._](?=[^\d.])"
_NETWORK = "diffusion_model|module|model|language_model|unet|bert|roberta|distilbert|deberta|electra|gpt_neox"
_FRONT_OF_PATH = re.compile(
    rf"(?:base_model\.model|transformer|{_NETWORK})\.(?=[^\d.])"
    rf"|(?:lora_unet|lora_transformer|lycoris)[._]|{_TEXT_ENCODER}"
)
_FRONT_OF_NAME = re.compile(  # whose joints are underscores
    rf"(?:base_model_model|transformer(?!_blocks_|_in_)|{_NETWORK})_(?=[^\d_])"
    rf"|(?:lora_unet|lora(?=_(?:transformer|text_encoder)_)|lycoris)_|{_TEXT_ENCODER}"
)
_TEXT_ENCODERS = {  # every name -> the one of diffusers
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
    "te4": "text_encoder_4",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5xxl": "text_encoder_3",
}
# Names with which a network begins, and what then stands in front, whatever a file has there: what most files have.
_HOMES = (
    (
        r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|add_embedding|encoder_hid_proj"
        r"|input_blocks|middle_block|output_blocks)(?=_|$)",
        "unet_",
    ),
    (r"(?:single_|joint_)?transformer_blocks_\d|norm_out_linear|time_text_embed_|h_\d", "transformer_"),
    (r"layers_\d+_|embed_tokens$|(?:en|de)coder_layers_\d", "model_"),
    (r"text_model_(?:encoder_layers|embeddings|final_layer_norm)_", "text_encoder_"),
)
_T5 = re.compile(r"shared$|encoder_(?:block_|embed_tokens$)")  # the second or third text encoder, or the only one
_CLIP = re.compile(r"(?:encoder_layers|embeddings|final_layer_norm)_")  # of a text encoder; without text_model lately
# Stable Diffusion's original code -> diffusers: modules before and after the blocks, and those of a ResNet block.
_ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
# Attention of Flux in XLabs' names -> original; qkv_lora of a single block is of a part of its linear1.
_XLABS = re.compile(r"(?:double|single)_blocks_\d+_(?P<end>(?:qkv|proj)_lora[12]?)")
_XLABS_ENDS = {
    "qkv_lora1": "img_attn_qkv",
    "qkv_lora2": "txt_attn_qkv",
    "proj_lora1": "img_attn_proj",
    "proj_lora2": "txt_attn_proj",
    "proj_lora": "linear2",
}
_ORIGINAL_BLOCK = re.compile(
    r"(?:input_blocks_(?P<down>[1-9]|1[01])_(?P<place>[01])|middle_block_(?P<middle>[012])"
    r"|output_blocks_(?P<up>[0-9]|1[01])_(?P<place_up>[012]))_(?P<within>.+)"
)


@lru_cache(maxsize=2**16)
def canonical_module(raw: str) -> str:
    """Return the one id that a module has in every style of naming.

    Wrappers (``base_model.model.``, ``_orig_mod.``), the network's component (``unet.``, ``lora_unet_``) and
    ``.processor`` are dropped, dots (and cloneofsimo's colon) become underscores, and Stable Diffusion's original names
    those of diffusers. Some names then have in front what most files have there: ``unet_`` those of a UNet; and a text
    encoder keeps its component; but a T5 has that of SD3's, text_encoder_3. The inverse is ambiguous.

    Example:
        >>> canonical_module("mid_block.attentions.0.proj_in"), canonical_module("lora_unet_middle_block_1_proj_in")
        ('unet_mid_block_attentions_0_proj_in', 'unet_mid_block_attentions_0_proj_in')
        >>> canonical_module("diffusion_model.double_blocks.0.img_attn.qkv")
        'double_blocks_0_img_attn_qkv'
    """
    component = ""
    rest = _INSERTED.sub("", raw)
    while match := (_FRONT_OF_PATH if "." in rest else _FRONT_OF_NAME).match(rest):
        if (encoder := match["te"]) and not component:
            name = re.sub(r"^(lora_|lycoris_|text_encoders[._])", "", encoder)
            component = _TEXT_ENCODERS.get(name, name)
        rest = rest[match.end() :]
    rest = rest.replace(".", "_").replace(":", "_").replace("vision_tower_vision_model_", "vision_tower_")
    if component:
        if _T5.match(rest):
            component = "text_encoder_3"
        return f"{component}_text_model_{rest}" if _CLIP.match(rest) else f"{component}_{rest}"
    if match := _XLABS.fullmatch(rest):
        return rest[: match.start("end")] + _XLABS_ENDS.get(match["end"], match["end"])
    rest = _name_of_diffusers(rest)
    return next((front for names, front in _HOMES if re.match(names, rest)), "") + rest


def _name_of_diffusers(name: str) -> str:
    """Return what diffusers calls a module of Stable Diffusion's original UNet; other names as they are.

    A level has two blocks and a downsampler on the way down, after the first convolution, and three blocks on the way
    up, the last of which holds the upsampler.
    """
    match = _ORIGINAL_BLOCK.fullmatch(name)
    if name in _ORIGINAL or not match:
        return _ORIGINAL.get(name, name)
    within = match["within"]
    if match["middle"]:
        side, position, attention = "mid_block", int(match["middle"]) // 2, match["middle"] == "1"
    elif match["down"]:
        level, position = divmod(int(match["down"]) - 1, 3)
        side, attention = f"down_blocks_{level}", match["place"] == "1"
        if position == 2:
            return f"{side}_downsamplers_0_conv" if within == "op" and not attention else name
    else:
        level, position = divmod(int(match["up"]), 3)
        side, attention = f"up_blocks_{level}", match["place_up"] == "1"
        if position == 2 and match["place_up"] != "0" and within == "conv":
            return f"{side}_upsamplers_0_conv"
        if match["place_up"] == "2":
            return name
    if attention:
        known = within.startswith(("transformer_blocks_", "proj_in", "proj_out"))
        return f"{side}_attentions_{position}_{within}" if known else name
    return f"{side}_resnets_{position}_{_RESNET[within]}" if within in _RESNET else name


# ----------------------------------------------------------------------------------------------------------------------
# Keys
# ----------------------------------------------------------------------------------------------------------------------


class _Key(NamedTuple):
    """A parsed key: canonical module, role, the adapter that it belongs to, and the style: a row of `KEY_FAMILIES`."""

    module: str
    role: str
    adapter: str
    style: str


@lru_cache(maxsize=2**16)  # headers differ more than keys do
def parse_key(key: str) -> _Key | None:
    """Return module, role, adapter and style of a weight's key; None for a key that is no LoRA weight.

    Raises:
        LoraFileError: The key belongs to a family that is refused.
    """
    parts = key.split(".")
    if not _FAMILY_OF.keys().isdisjoint(parts):
        raise _refused(next(_FAMILY_OF[part] for part in parts if part in _FAMILY_OF), key)
    if not any(word in key for word in ("lora", "hada_", "lokr_", ":down", ":up")):  # one of every style's; for speed
        return None
    if _MANGLED.fullmatch(key):
        raise _refused("a mangled kohya", key)
    for style, pattern in _STYLES.items():
        if match := pattern.match(key):
            groups = match.groupdict()
            return _Key(_module_of(groups), ROLES.get(groups["r"], groups["r"]), groups.get("a") or "", style)
    return None


@lru_cache(maxsize=2**16)
def parse_alpha(key: str) -> str | None:
    """Return the canonical module of an alpha's key, see `SCALE`; None for another key."""
    match = _SCALE.match(key) if key.endswith(".alpha") else None
    return _module_of(match.groupdict()) if match else None


def _module_of(parts: dict[str, str | None]) -> str:
    """Return the canonical module of a key's groups; a text encoder has names of its own for the projections."""
    module, projection = parts["m"], parts.get("p")
    if not projection:
        return canonical_module(module)
    if (name := canonical_module(f"{module}.{projection}_proj")).startswith("text_encoder"):
        return name
    return canonical_module(f"{module}.to_out.0" if projection == "out" else f"{module}.to_{projection}")


def count_ignored(shapes: Mapping[str, Sequence[int]], modules: Collection[str]) -> Counter:
    """Count the tensors of a file that are no LoRA weights, by rows of `IGNORED`.

    What lies beside the pairs is no reason to refuse them, unless it is a module's adapter, which would be missing.

    Args:
        shapes: The shape of each such tensor.
        modules: Canonical modules that have a factor of a pair.

    Raises:
        LoraFileError: The tensors are of a family that is refused, or a factor in an unknown form.
    """
    for name, leaves in REFUSED_TOGETHER.items():
        for key in shapes:
            module = key.removesuffix(leaves[0])
            if module != key and all(module + leaf in shapes for leaf in leaves):
                raise _refused(name, key)
    for key, shape in shapes.items():
        if key.endswith(".oft_blocks"):  # LyCORIS has one name for both
            raise _refused("a BOFT" if len(shape) == 4 else "an OFT", key)
    return Counter(_ignored_as(key, shape, modules) for key, shape in shapes.items())


def _ignored_as(key: str, shape: Sequence[int], modules: Collection[str]) -> str:
    if key.endswith(".diff") and len(shape) > 1:
        return FULL_DIFFERENCES
    for name, pattern in _IGNORED.items():
        if pattern.search(key):
            return name
    factor = _FACTOR.search(key)
    if factor and canonical_module(key[: factor.start()]) not in modules:
        raise LoraFileError(f"{key} names a factor of a LoRA in an unknown way. Convert it or leave the file out.")
    return OTHERS


def without_pairs(keys: Sequence[str], ignored: Collection[str]) -> LoraFileError:
    """Return the error of a file that holds no pair, by the name of what it holds instead."""
    if FULL_DIFFERENCES in ignored:
        return _refused("a full-difference", next(key for key in keys if key.endswith(".diff")))
    held = [name for name in ignored if name != OTHERS]
    holds = f"; it holds {', '.join(held)}" if held else ""
    return LoraFileError(f"no LoRA pair{holds}; the first keys are {', '.join(keys[:3]) or 'none'}. Is it a LoRA?")


def _refused(family: str, key: str) -> LoraFileError:
    return LoraFileError(f"{family} adapter ({key}), which cannot be read. Convert it or leave it out.")
