"""Scales: the factor s of each module's update s·up·down, and the source that states it.

The sources, in this order: alpha tensors of the file; adapter_config.json beside it (PEFT's or MLX's); the header's
``lora_adapter_metadata``, which diffusers writes by component; a plain alpha and rank in the header. Where none states
it, s is 1. All of them are texts of strangers: what cannot be used is refused in words, but plain fields of a header,
which may mean anything, are not used where they do not fit the tensors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from loras.headers import ADAPTER_METADATA, ALPHA_FIELDS, CONFIG, RANK_FIELDS, Header
from loras.keys import LoraFileError
from loras.layouts import Layer, Layout
from loras.patterns import in_words, number, parameter_paths, path_of, rule_of

TENSORS, FIELDS, NONE = "alpha tensors", "header metadata", "none"
FLOAT32_MIN, FLOAT32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_MISSING = ("", "None", "null")  # a value that is none, as trainers write it
# The component that a path or a module names; ids of modules keep that of a text encoder alone.
_COMPONENT = re.compile(r"(text_encoder(?:_[2-9])?|unet|transformer(?:_[2-9])?)\.|(text_encoder(?:_[2-9])?)_")
# Forms of a truth value, also where a writer made a text of it.
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "none", "null", "")
# The name of alpha in PEFT's configuration of an adapter, where it is not lora_alpha.
_ALPHA_OF_TYPE = {"LOHA": "alpha", "LOKR": "alpha"}


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
        LoraFileError: An alpha is no finite number, a pattern no regular expression, or a rank not the file's; of a
            tensor or a configuration.
    """
    sources = list(_sources(header, adapter_config))
    scales = {}
    for layer in header.layout.layers[::2]:  # a module's down stands before its up
        if layer.module in alphas:
            alpha, rank = alphas[layer.module], _writers_rank(header.layout, layer)
            # A LoKr of two whole factors has no rank to divide by: LyCORIS gives it the scale 1.
            value = None if alpha is None else _checked(alpha, layer) / (rank or alpha or 1.0) or 1.0
            scale = Scale(value, TENSORS)
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
        scale_of = _scale_by(CONFIG, adapter_config, layout)
        for layer in layout.layers[::2]:
            scale_of(layer)
    modules = len(layout.layers) // 2
    if alphas is None and not adapter_config and (len(tensors) == modules or not list(_sources(header, None))):
        counts = +Counter({Scale(None, TENSORS): len(tensors), _UNSTATED: modules - len(tensors)})
    else:
        counts = Counter(module_scales(header, tensors, adapter_config).values())
    return _shared(tuple(ScaleCount(scale, modules) for scale, modules in counts.items()))


def _checked(value: float, layer: Layer, name: str = "alpha") -> float:
    """Return an alpha or a scale; refuse one that is not finite, or lost in float32, in which updates are computed."""
    if not (value == 0 or FLOAT32_MIN <= abs(value) <= FLOAT32_MAX):  # so that NaN does not pass
        raise LoraFileError(f"{name} of module {layer.module} is {value}. Mend it or leave the file out.")
    return value


def _writers_rank(layout: Layout, layer: Layer) -> int:
    """Return the rank by which the writer divides alpha: the pair's, or that of the factors which it is made of."""
    return layout.ranks.get(layer.module, layer.rank)


# ----------------------------------------------------------------------------------------------------------------------
# Configurations, beside the file and in its header
# ----------------------------------------------------------------------------------------------------------------------


def _sources(header: Header, adapter_config: dict | None) -> Iterator[tuple[str, Callable[[Layer], float]]]:
    """Yield name and function of each configuration; a function returns a module's scale, 0 where none is stated."""
    if adapter_config:
        yield CONFIG, _scale_by(CONFIG, adapter_config, header.layout)
    if header.adapter_configs:
        by_component = {
            component: _scale_by(ADAPTER_METADATA, config, header.layout, component)
            for component, config in header.adapter_configs.items()
        }
        yield ADAPTER_METADATA, lambda layer: _of_component(by_component, layer)
    if plain := _plain_fields(header):
        yield FIELDS, _scale_by_fields(plain, header.layout)


def _of_component(by_component: dict[str, Callable[[Layer], float]], layer: Layer) -> float:
    """Return the scale of a module by the configuration of its component, else by the one of no component.

    A file whose keys name no component is of the one that is no text encoder, if there is one such.
    """
    match = _COMPONENT.match(_path(layer, "")) or _COMPONENT.match(layer.module)
    component = (match[1] or match[2]) if match else ""
    others = [name for name in by_component if not name.startswith("text_encoder")]
    for name in (component, "", *(others if len(others) == 1 and not match else ())):
        if name in by_component:
            return by_component[name](layer)
    return 0.0


def has_unused_fields(header: Header, scales: Iterable[Scale]) -> bool:
    """Return whether plain fields of a header state a scale that no source gives to some of the modules."""
    plain = _plain_fields(header) if any(scale.source == NONE for scale in scales) else None
    return plain is not None and plain[0] != 0


def _plain_fields(header: Header) -> tuple[float, float, float] | None:
    """Return alpha, rank (0 for none) and the rank's exponent by a header's plain fields; None where it has no alpha.

    A field that is called alpha and nothing else may be anything where there is no rank. Fields that hold no numbers
    make an alpha that is NaN.
    """
    fields = header.fields
    alphas = [name for name in ALPHA_FIELDS if fields.get(name, "") not in _MISSING]
    ranks = [name for name in RANK_FIELDS if fields.get(name, "") not in _MISSING]
    if not alphas or (alphas == ["alpha"] and not ranks):
        return None
    try:
        rank = number(fields[ranks[0]]) if ranks else 0.0
        return number(fields[alphas[0]]), rank, 0.5 if _truth(fields, "use_rslora") else 1.0
    except ValueError:
        return math.nan, 0.0, 1.0


def _scale_by_fields(plain: tuple[float, float, float], layout: Layout) -> Callable[[Layer], float]:
    """Return the function from a module to the scale of a header's plain fields, 0 where they do not fit it.

    They may be of anything: what is no number, or the rank of other modules, states nothing and refuses no file.
    """
    alpha, rank, exponent = plain

    def scale(layer: Layer) -> float:
        files_rank = _writers_rank(layout, layer)
        divisor = files_rank or rank
        if not divisor > 0 or (rank and rank != divisor):
            return 0.0
        value = alpha / divisor**exponent
        return value if FLOAT32_MIN <= abs(value) <= FLOAT32_MAX else 0.0

    return scale


def _scale_by(source: str, config: dict, layout: Layout, component: str = "") -> Callable[[Layer], float]:
    """Return the function from a module to the scale that a configuration of an adapter states, 0 for none."""
    if isinstance(config.get("lora_parameters"), dict) and "lora_alpha" not in config:
        return _scale_by_mlx(source, config["lora_parameters"])
    with in_words(source):
        alphas = rule_of(
            config, "alpha_pattern", _ALPHA_OF_TYPE.get(str(config.get("peft_type")).upper(), "lora_alpha")
        )
        ranks = rule_of(config, "rank_pattern", "r")
        exponent = 0.5 if _truth(config, "use_rslora") else 1.0
        if alphas.expressions or ranks.expressions:
            paths = [_path(layer, component) for layer in layout.layers[::2]]
            alphas.check(paths)
            ranks.check(paths)

    def scale(layer: Layer) -> float:
        path = _path(layer, component)
        with in_words(source):
            # Stacked experts are parameters, of which the file does not tell which is which.
            paths = parameter_paths(path, config) or (path,)
            stated = {(alphas.value(name), ranks.value(name)) for name in paths}
            if len(stated) > 1:
                raise ValueError(f"several for the parameters of {path}")
            alpha, rank = stated.pop()
        files_rank = _writers_rank(layout, layer)
        if rank and files_rank and rank != files_rank:
            fault = f"{source} says rank {rank:g} for {path}, where the file has {files_rank}"
            raise LoraFileError(f"{fault}. Mend or remove it.")
        if not (divisor := files_rank or rank):
            return 0.0
        return _checked(_checked(alpha, layer) / divisor**exponent, layer, "scale")

    return scale


def _path(layer: Layer, component: str) -> str:
    return path_of(layer.name).removeprefix(f"{component}.")


def _truth(config: dict, name: str) -> bool:
    """Return a truth value.

    Raises:
        ValueError: It is neither true nor false.
    """
    text = str(config.get(name)).strip().lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(f"{name} is {text}, neither true nor false")
    return text in _TRUE


def _scale_by_mlx(source: str, parameters: dict) -> Callable[[Layer], float]:
    """Return the function from a module to the scale, which MLX states with the rank; 0 for none.

    Older versions state an alpha too, and multiply by scale · alpha / rank.
    """
    with in_words(source):
        value, rank = number(parameters.get("scale")), number(parameters.get("rank"))
        alpha = None if parameters.get("alpha") in (None, "") else number(parameters["alpha"])

    def scale(layer: Layer) -> float:
        if rank and rank != layer.rank:
            fault = f"{source} says rank {rank:g}, where {layer.name} has {layer.rank}"
            raise LoraFileError(f"{fault}. Mend or remove it.")
        if alpha is None:
            return _checked(value, layer, "scale")
        return _checked(_checked(value, layer, "scale") * _checked(alpha, layer) / layer.rank, layer, "scale")

    return scale
