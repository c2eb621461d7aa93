"""Scales: the factor s of each module's update s·up·down, and the source that states it.

The sources, in this order: alpha tensors of the file; adapter_config.json beside it; the header's
``lora_adapter_metadata``, which diffusers writes by component; a plain alpha and rank in the header. Where none states
it, s is 1. All of them are texts of strangers: what cannot be used is refused in words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

from loras.keys import LoraFileError
from loras.lora_files import ADAPTER_METADATA, ALPHA_FIELDS, FLOAT32_MAX, RANK_FIELDS, UNREADABLE, Header, Layer

TENSORS, CONFIG, FIELDS, NONE = "alpha tensors", "adapter_config.json", "header metadata", "none"
_MISSING = ("", "None", "null")  # a value that is none, as trainers write it
_COMPONENT = re.compile(r"(text_encoder(?:_[2-9])?|unet|transformer(?:_[2-9])?)\.")
# Patterns of single modules are mostly paths; the others are regular expressions, of which some would take years.
_PATH = re.compile(r"[\w.\-]*")
_REPEATS = re.compile(r"(?<!\\)(?:[*+{]|(?<!\()\?)")
_MAX_EXPRESSIONS, _MAX_LENGTH, _MAX_REPEATS, _MAX_ALTERNATIVES, _MAX_PATH = 64, 200, 3, 8, 300


class Scale(NamedTuple):
    """The factor of a module's update, None where it is not yet read, and its source: one of the five above."""

    value: float | None
    source: str


class ScaleCount(NamedTuple):
    """A scale, and the number of modules of a file that have it."""

    scale: Scale
    modules: int


_UNSTATED = Scale(1.0, NONE)
_shared = lru_cache(maxsize=2**12)(lambda counts: counts)  # of tens of thousands of files equal counts are held once


def update_scales(header: Header, alphas: dict[str, float], adapter_config: dict | None) -> dict[str, float]:
    """Return the factor of each module's update, see `module_scales`."""
    return {module: scale.value for module, scale in module_scales(header, alphas, adapter_config).items()}


def module_scales(header: Header, alphas: dict[str, float | None], adapter_config: dict | None) -> dict[str, Scale]:
    """Return the factor s of each module's update s·up·down, with its source.

    kohya stores alpha in the file, s = alpha / rank. PEFT states ``lora_alpha`` in ``adapter_config.json``, and
    diffusers the same in the header: s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``; ``alpha_pattern``
    and ``rank_pattern`` override single modules. The rank is the file's own; a source that names another belongs to
    another file. A missing or zero alpha means s = 1.

    Args:
        header: The file's header.
        alphas: The alpha of each module that has a tensor of it; None where it is not read.
        adapter_config: The content of adapter_config.json beside the file, if there is one.

    Raises:
        LoraFileError: An alpha is no finite number, a pattern no regular expression, or a rank not the file's.
    """
    sources = list(_sources(header, adapter_config))
    scales = {}
    for layer in header.layout.layers[::2]:  # a module's down stands before its up
        if layer.module in alphas:
            alpha = alphas[layer.module]
            scale = Scale(None if alpha is None else _checked(alpha, layer) / layer.rank or 1.0, TENSORS)
        else:
            stated = ((name, scale_of(layer)) for name, scale_of in sources)
            scale = next((Scale(value, name) for name, value in stated if value), _UNSTATED)
        scales[layer.module] = scale
    return scales


def count_scales(header: Header, adapter_config: dict | None, alphas: dict | None = None) -> tuple[ScaleCount, ...]:
    """Count the scales of a file; without ``alphas`` those of alpha tensors are None, as no weight is read.

    Raises:
        LoraFileError: A source cannot be used; of adapter_config.json also where alpha tensors leave it unused.
    """
    layout = header.layout
    tensors = dict.fromkeys(layout.alphas) if alphas is None else alphas
    if tensors and adapter_config:
        scale_of = _scale_by(CONFIG, adapter_config)
        for layer in layout.layers[::2]:
            scale_of(layer)
    modules = len(layout.layers) // 2
    if alphas is None and not adapter_config and (len(tensors) == modules or not list(_sources(header, None))):
        counts = +Counter({Scale(None, TENSORS): len(tensors), _UNSTATED: modules - len(tensors)})
    else:
        counts = Counter(module_scales(header, tensors, adapter_config).values())
    return _shared(tuple(ScaleCount(scale, modules) for scale, modules in counts.items()))


def _checked(alpha: float, layer: Layer) -> float:
    if not abs(alpha) <= FLOAT32_MAX:  # not >, which NaN would pass
        raise LoraFileError(f"alpha of module {layer.module} is {alpha}. Mend it or leave the file out.")
    return alpha


# ----------------------------------------------------------------------------------------------------------------------
# Configurations, beside the file and in its header
# ----------------------------------------------------------------------------------------------------------------------


def _sources(header: Header, adapter_config: dict | None) -> Iterator[tuple[str, Callable[[Layer], float]]]:
    """Yield name and function of each configuration; a function returns a module's scale, 0 where none is stated."""
    if adapter_config:
        yield CONFIG, _scale_by(CONFIG, adapter_config)
    if header.adapter_configs:
        by_component = {
            component: _scale_by(ADAPTER_METADATA, config, component)
            for component, config in header.adapter_configs.items()
        }
        yield ADAPTER_METADATA, lambda layer: _of_component(by_component, layer)
    if plain := _plain_config(header):
        yield FIELDS, _scale_by(FIELDS, plain)


def _of_component(by_component: dict[str, Callable[[Layer], float]], layer: Layer) -> float:
    """Return the scale of a module by the configuration of its component, else by the one of no component.

    A file whose keys name no component is of the one that is no text encoder, if there is one such.
    """
    match = _COMPONENT.match(_path(layer.name))
    component = match[1] if match else ""
    others = [name for name in by_component if not name.startswith("text_encoder")]
    for name in (component, "", *(others if len(others) == 1 and not match else ())):
        if name in by_component:
            return by_component[name](layer)
    return 0.0


def _plain_config(header: Header) -> dict | None:
    """Return alpha and rank of a header's plain fields as a configuration; None where it has none.

    A field that is called alpha and nothing else may be anything where there is no rank.
    """
    fields = header.fields
    alphas = [name for name in ALPHA_FIELDS if fields.get(name, "") not in _MISSING]
    ranks = [name for name in RANK_FIELDS if fields.get(name, "") not in _MISSING]
    if not alphas or (alphas == ["alpha"] and not ranks):
        return None
    rank = fields[ranks[0]] if ranks else 0
    return {"lora_alpha": fields[alphas[0]], "r": rank, "use_rslora": fields.get("use_rslora")}


def _scale_by(source: str, config: dict, component: str = "") -> Callable[[Layer], float]:
    """Return the function from a module to the scale that PEFT's configuration of an adapter states, 0 for none."""
    with _in_words(source):
        alpha_of, rank_of = _rule(config, "alpha_pattern", "lora_alpha"), _rule(config, "rank_pattern", "r")
    stabilised = str(config.get("use_rslora")).lower() in ("true", "1")  # where a writer made a text of it too

    def scale(layer: Layer) -> float:
        path = _path(layer.name).removeprefix(f"{component}.")
        with _in_words(source):
            alpha, rank = alpha_of(path), rank_of(path)
        if rank and rank != layer.rank:
            fault = f"{source} says rank {rank:g} for {path}, where the file has {layer.rank}"
            raise LoraFileError(f"{fault}. Mend or remove it.")
        return _checked(alpha, layer) / layer.rank ** (0.5 if stabilised else 1.0)

    return scale


@contextmanager
def _in_words(source: str) -> Iterator[None]:
    try:
        yield
    except (*UNREADABLE, OverflowError, re.error) as error:
        raise LoraFileError(f"{source} has an unusable alpha or rank ({error}). Mend or remove it.") from error


@lru_cache(maxsize=2**16)
def _path(name: str) -> str:
    """Return the path of a module by which PEFT names it, given the key of a factor."""
    return re.split(r"\.lora[._]", name)[0].removeprefix("base_model.model.")


def _rule(config: dict, patterns: str, default: str) -> Callable[[str], float]:
    """Return the function from a module's path to its value.

    That of the first pattern that names the end of the path, else the default: PEFT's rule.
    """
    values = config.get(patterns) or {}
    if not isinstance(values, dict):
        raise TypeError(f"{patterns} is no object")
    expressions = {pattern: _compiled(pattern) for pattern in values if not _PATH.fullmatch(pattern)}
    if len(expressions) > _MAX_EXPRESSIONS:
        raise ValueError(f"{patterns} has {len(expressions)} regular expressions")

    def value(path: str) -> float:
        if not values:
            return float(config.get(default) or 0)
        if expressions and len(path) > _MAX_PATH:
            raise ValueError(f"regular expressions for a path of {len(path)} characters")
        parts = path.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        named = {end for end in ends if end in values}
        named |= {pattern for pattern, expression in expressions.items() if any(map(expression.fullmatch, ends))}
        if len(named) > 1:
            named = {next(pattern for pattern in values if pattern in named)}
        return float(values[named.pop()] if named else config.get(default) or 0)

    return value


@lru_cache(maxsize=2**10)
def _compiled(pattern: str) -> re.Pattern:
    """Compile a pattern, unless it could take longer than its use is worth: repeats of repeats, and many of both."""
    repeats, alternatives = len(_REPEATS.findall(pattern)), pattern.count("|")
    repeated_group = re.search(r"\)[*+?{]", pattern)
    if len(pattern) > _MAX_LENGTH or repeated_group or repeats > _MAX_REPEATS or alternatives > _MAX_ALTERNATIVES:
        raise ValueError(f"{pattern[:_MAX_LENGTH]} is more than a pattern of modules")
    return re.compile(pattern)
