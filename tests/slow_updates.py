"""The updates of a LoRA file by a slow transcription of what its writers mean, for tests.

Nothing of the program is used: keys are read by the documented patterns, tensors by the safetensors library, and each
update s·up·down is formed as a whole, in float64.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

PATTERNS = [
    r"lora\.(?P<r>down|up)\.weight\.(?P<m>\d+)",
    r"(?P<m>.+)\.lora\.(?P<r>down|up)\.weight",
    r"(?P<m>.+)\.lora_linear_layer\.(?P<r>down|up)\.weight",
    r"(?P<m>.+?)(?:\.processor)?\.(?P<p>to_(q|k|v|out))_lora\.(?P<r>down|up)\.weight",
    r"(?P<m>.+)\.lora_(?P<r>A|B)(\.weight|\.[^.]+\.weight)?",
    r"(?P<m>.+)\.lora_(?P<r>down|up|mid)\.weight",
    r"(?P<m>.+\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<r>down|up)\.weight",
    r"(?P<m>(?:unet|text_encoder):\d+):(?P<r>down|up)",
    r"(?P<m>.+)\.lora_(?P<r>a|b)",
    r"(?P<m>.+)\.lora_embedding_(?P<r>A|B)(?:\.[^.]+)?",
    r"(?P<m>.+)\.(?P<r>hada_(w[12]_[ab]|t[12]))",
    r"(?P<m>.+)\.(?P<r>lokr_(w[12](_[ab])?|t2))",
    r"(?P<m>.+?)(\.lora(_linear_layer|_down|_up|_A|_B)?)?\.(?P<r>alpha)",
]
PREFIXES = r"^(base_model\.model\.|diffusion_model\.|_orig_mod\.|module\.|language_model\.|lora_unet_|unet[._:])"
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Update:
    """Norm of up·down, the product of the factors' norms, and the scale, None where it is not said here."""

    norm: float
    bound: float
    scale: float | None


def slow_updates(path: Path, config: bytes | None) -> tuple[list[Update], int]:
    """The updates of a file, and how many of its keys they come from."""
    modules: dict[str, Parts] = defaultdict(dict)
    paths, used = {}, 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118
            found = next((m for pattern in PATTERNS if (m := re.fullmatch(pattern, key))), None)
            if found:
                name, part = found["m"], {"A": "down", "B": "up"}.get(found["r"], found["r"])
                if projection := found.groupdict().get("p"):
                    name += ".to_out.0" if projection == "to_out" else f".{projection}"
                if part == "alpha" and math.prod(file.get_slice(key).get_shape()) != 1:
                    continue  # of a module without a pair, else the file would have been refused
                module = squashed(name)
                assert part not in modules[module], f"{key} is a {part} twice"
                modules[module][part] = file.get_tensor(key).double()
                if part != "alpha":
                    paths[module] = name
    updates = []
    for module, parts in modules.items():
        if set(parts) == {"alpha"}:
            continue
        used += len(parts)
        matrix, bound, rank = update(parts)
        updates.append(Update(float(matrix.norm()), bound, scale_of(paths[module], parts, rank, config, metadata)))
    return updates, used


def squashed(module: str) -> str:
    while (stripped := re.sub(PREFIXES, "", module)) != module:
        module = stripped
    return re.sub(r"[.:]", "_", module.replace(".processor", ""))


# ----------------------------------------------------------------------------------------------------------------------
# The update itself
# ----------------------------------------------------------------------------------------------------------------------


def update(parts: Parts) -> tuple[torch.Tensor, float, int]:
    """up·down, the product of the norms of its factors, and the rank that alpha is divided by; 0 where s is 1."""
    parts = {part: tensor for part, tensor in parts.items() if part != "alpha"}
    bound = math.prod(float(tensor.norm()) for tensor in parts.values())
    family = {part.split("_")[0] for part in parts}
    if family == {"hada"}:
        of = {part.removeprefix("hada_"): tensor for part, tensor in parts.items()}
        first, second = (product(of[f"w{n}_a"], of[f"w{n}_b"], of.get(f"t{n}")) for n in "12")
        return first * second, bound, len(of["w1_b"])
    if family == {"lokr"}:
        of = {part.removeprefix("lokr_"): tensor for part, tensor in parts.items()}
        first = of["w1"] if "w1" in of else product(of["w1_a"], of["w1_b"])
        second = of["w2"] if "w2" in of else product(of["w2_a"], of["w2_b"], of.get("t2"))
        ranks = [len(of[part]) for part in ("w1_b", "w2_b") if part in of]
        return torch.kron(first, second.flatten(1)), bound, ranks[0] if ranks else 0
    if family == {"a", "b"}:
        return (parts["a"] @ parts["b"]).T, bound, parts["a"].shape[1]
    assert parts.keys() <= {"down", "up", "mid"}, "factors of two families"
    return pair(**parts), bound, len(parts["down"])


def product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None = None) -> torch.Tensor:
    """a·b; LyCORIS writes a convolution's with a core between them, and a the other way round."""
    if core is None:
        return a.flatten(1) @ b.flatten(1)
    return torch.einsum("ijkl,io,jn->onkl", core, a, b)


def pair(down: torch.Tensor, up: torch.Tensor, mid: torch.Tensor | None = None) -> torch.Tensor:
    if mid is not None:
        return torch.einsum("or,rj...,ji->oi...", up.flatten(1), mid, down.flatten(1))
    down, up = down.flatten(1), up.flatten(1)
    if up.shape[1] != len(down):  # a convolution in groups: each reads its own part of the down
        groups = len(down) // up.shape[1]
        return torch.cat([u @ d for u, d in zip(up.chunk(groups), down.chunk(groups), strict=True)])
    return up @ down


# ----------------------------------------------------------------------------------------------------------------------
# Its scale
# ----------------------------------------------------------------------------------------------------------------------


def scale_of(path: str, parts: Parts, rank: int, config: bytes | None, metadata: dict[str, str]) -> float | None:
    """The scale by the first source that states one, 1 for none; None where a source is not as writers write it."""
    if "alpha" in parts:
        alpha = float(parts["alpha"])
        return (alpha / rank if rank else 1.0) if alpha else 1.0
    if config is not None:
        document = parsed(config.decode("utf-8", "replace"))
        if "a" in parts and isinstance(document, dict) and isinstance(document.get("lora_parameters"), dict):
            return number(document["lora_parameters"].get("scale"))
        return of_config(document, path, rank)
    if "lora_adapter_metadata" in metadata:
        document = parsed(metadata["lora_adapter_metadata"])
        if not isinstance(document, dict):
            return None
        if any(name.startswith("unet.") for name in document):
            if path.startswith("text_encoder"):
                return None
            document = {name.removeprefix("unet."): value for name, value in document.items()}
            path = path.removeprefix("unet.")
        return of_config(document, path, rank)
    stated = {name: text for name, text in metadata.items() if "alpha" in name or name in ("r", "rank", "lora_rank")}
    if not stated:
        return 1.0
    texts = stated.get("ss_network_alpha", ""), metadata.get("ss_network_dim", "")
    if len(stated) > 1 or not all(re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,5})?", text) for text in texts):
        return None
    if float(texts[1]) != rank:
        return 1.0  # it may be of anything
    return float(texts[0]) / rank or 1.0


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def number(value: object) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and 1e-6 < value < 1e6
    return float(value) if known else None


def of_config(document: object, path: str, rank: int) -> float | None:
    """PEFT's rule: lora_alpha / r, or / sqrt(r) with use_rslora, and alpha_pattern for modules that it names."""
    known = {"peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "target_modules", "bias"}
    if not isinstance(document, dict) or not document.keys() <= known or document.get("peft_type") != "LORA":
        return None
    alpha, r, rslora = number(document.get("lora_alpha")), number(document.get("r")), document.get("use_rslora", False)
    patterns = document.get("alpha_pattern", {})
    if alpha is None or r is None or not isinstance(rslora, bool) or not isinstance(patterns, dict):
        return None
    for pattern, value in patterns.items():
        if not re.fullmatch(r"[a-z_0-9.]+", pattern) or number(value) is None:
            return None
        if f".{path}".endswith(f".{pattern}"):
            alpha = number(value)
    assert r == rank, "another rank is stated"
    return alpha / math.sqrt(r) if rslora else alpha / r
