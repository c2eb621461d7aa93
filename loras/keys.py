"""Keys of LoRA files -> modules, roles, and their order in the network, whatever wrote the file.

Every trainer names the factors of an update in its own style. A style is one row of `KEY_FAMILIES`: a pattern that
gives the module, its role, and the adapter where a file can hold several. In every style a module has the same id.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

MAX_MESSAGE_LENGTH = 1000

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
    "XLabs": r"^(?P<m>.+\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<r>down|up)\.weight$",
    "cloneofsimo": r"^(?P<m>(?:unet|text_encoder):\d+):(?P<r>down|up)$",
    "MLX": r"^(?P<m>.+)\.lora_(?P<r>a|b)$",
    "PEFT embedding": r"^(?P<m>.+)\.lora_embedding_(?P<r>A|B)(?:\.(?P<a>[^.]+))?$",
    "LoHa": r"^(?P<m>.+)\.(?P<r>hada_(?:w[12]_[ab]|t[12]))(?:\.(?P<a>[^.]+))?$",
    "LoKr": r"^(?P<m>.+)\.(?P<r>lokr_(?:w[12](?:_[ab])?|t[12]))(?:\.(?P<a>[^.]+))?$",
}
# An alpha is of a module, and named by it or beside its factors.
SCALE = (
    r"^(?P<m>.+?)(?:(?:\.processor)?\.to_(?P<p>q|k|v|out)_lora(?:\.(?:down|up))?)?"
    r"(?:\.lora(?:_linear_layer)?(?:[._](?:down|up|mid|A|B))?)?(?:\.weight|\.default)?\.alpha$"
)
ROLES = {"A": "down", "B": "up", "a": "down", "b": "up"}
REFUSED_FAMILIES = {
    "an OFT": r"\.oft_blocks$",
    "a full-difference": r"\.(diff|diff_b)$",
    "a mangled kohya": r"^lora_(unet|te\d?)_.+_lora_(down|up)\.weight$",
}
IGNORED = {
    "*.dora_scale": r"\.dora_scale$",
    "*.lora_magnitude_vector": r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$",
    "*.lora_A.bias, *.lora_B.bias": r"\.lora_[AB]\.bias$",
    "embeddings <...>": r"^<.+>$",
    "*.modules_to_save.*": r"\.modules_to_save\.",
}


class LoraFileError(ValueError):
    """A file that cannot be used; the message says what is wrong and what to do.

    Names in it come from files that anyone may have written: the message is one line of printable characters, and cut
    in the middle where it is too long.
    """

    def __init__(self, message: str):
        line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
        if len(line) > MAX_MESSAGE_LENGTH:
            line = f"{line[: MAX_MESSAGE_LENGTH // 2]} ... {line[-MAX_MESSAGE_LENGTH // 2 :]}"
        super().__init__(line)


def canonical_module(raw: str) -> str:
    """Return the one id that a module has in every style of naming.

    Wrappers (``base_model.model.``, ``diffusion_model.``) are stripped, kohya's component prefixes spelled out,
    ``.processor`` dropped and dots (and cloneofsimo's colon) become underscores. The inverse is ambiguous.

    Example:
        >>> canonical_module("unet.mid_block.attentions.0.proj_in")
        'unet_mid_block_attentions_0_proj_in'
        >>> canonical_module("lora_unet_mid_block_attentions_0_proj_in")
        'unet_mid_block_attentions_0_proj_in'
    """
    while (stripped := raw.removeprefix("base_model.model.").removeprefix("diffusion_model.")) != raw:
        raw = stripped
    for kohya, component in (
        ("lora_unet_", "unet_"),
        ("lora_transformer_", "transformer_"),
        ("lora_te_", "text_encoder_"),
        ("lora_te1_", "text_encoder_"),
        ("lora_te2_", "text_encoder_2_"),
        ("lora_te3_", "text_encoder_3_"),
    ):
        if raw.startswith(kohya):
            raw = component + raw.removeprefix(kohya)
    return re.sub(r"\.processor(?=\.|$)", "", raw).replace(".", "_").replace(":", "_")


_WORD = re.compile(r"conv_in|conv_out|single_transformer_blocks|transformer_blocks|[^\W\d_]+|\d{1,18}")
# Words of one row stand in the row's order, wherever the alphabet would put them.
_ORDERED_WORDS = (
    ("conv_in", "down", "mid", "up", "conv_out"),
    ("transformer_blocks", "single_transformer_blocks"),
    ("q", "k", "v", "out"),
)
_RANK_OF_WORD = {word: (row[0], i) for row in _ORDERED_WORDS for i, word in enumerate(row)}


@lru_cache(maxsize=2**16)
def depth_key(module: str, role: str) -> tuple:
    """Return a sort key for the network's order; a file's own order is alphabetical and means nothing.

    Natural sort of the canonical id, text encoders before unet or transformer; conv_in, down, mid, up, out;
    transformer_blocks before single_transformer_blocks; q, k, v, out; down before up.
    """
    parts = []
    for word in _WORD.findall(module):
        if word.isdecimal():
            parts.append((1, int(word), "", 0))  # numbers after words: text_encoder before text_encoder_2
        else:
            parts.append((0, 0, *_RANK_OF_WORD.get(word, (word, 0))))
    return (not module.startswith("text_encoder"), parts, module, role == "up")


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
    for name, pattern in REFUSED_FAMILIES.items():
        if re.search(pattern, key):
            raise LoraFileError(f"{name} adapter ({key}), which cannot be read. Convert it or leave it out.")
    for style, pattern in KEY_FAMILIES.items():
        if match := re.match(pattern, key):
            parts = match.groupdict()
            return _Key(_module_of(parts), ROLES.get(parts["r"], parts["r"]), parts.get("a") or "", style)
    return None


@lru_cache(maxsize=2**16)
def parse_alpha(key: str) -> str | None:
    """Return the canonical module of an alpha's key, see `SCALE`; None for another key."""
    match = re.match(SCALE, key)
    return _module_of(match.groupdict()) if match else None


def _module_of(parts: dict[str, str | None]) -> str:
    """Return the canonical module of a key's groups."""
    module = parts["m"]
    if projection := parts.get("p"):
        module += ".to_out.0" if projection == "out" else f".to_{projection}"
    return canonical_module(module)


def ignored_as(key: str) -> str:
    """Return the row of `IGNORED` under which a tensor that is no LoRA weight is counted.

    Raises:
        LoraFileError: The key names a LoRA in an unknown way.
    """
    for name, pattern in IGNORED.items():
        if re.search(pattern, key):
            return name
    if "lora" in key.lower():
        raise LoraFileError(f"{key} names a LoRA in an unknown way. Rename its keys or leave the file out.")
    return "tensors that are no LoRA"
