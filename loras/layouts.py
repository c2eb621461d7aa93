"""Layers of a LoRA and their layout: which there are, in the network's order, and where each lies in flat weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod

from loras.blocks import attention_of, projection_of


@dataclass(frozen=True)
class Layer:
    """One matrix of a LoRA: the down or the up factor of a module.

    ``name`` is the key in the file, of one of several stacked experts with its number, ``module`` the canonical module,
    ``role`` "down" or "up"; ``shape`` (rows, cols) with a convolution's kernel folded into the columns; ``dtype`` as
    safetensors writes it; ``block`` the name of its block (see blocks.py), "" where it is in none; ``style`` the row of
    `keys.KEY_FAMILIES`.
    """

    name: str
    module: str
    role: str
    shape: tuple[int, int]
    dtype: str
    block: str = ""
    style: str = ""

    @property
    def projection(self) -> str:
        """The function of its module in the block, such as "q"; "" where the name does not say."""
        return projection_of(self.module)

    @property
    def attention(self) -> str:
        """The attention that its module is of, such as "attn2"; "" for none."""
        return attention_of(self.module)

    @property
    def rank(self) -> int:
        """The side that the two factors of a module share."""
        return self.shape[0] if self.role == "down" else self.shape[1]

    @property
    def free_side(self) -> int:
        """The other side, which the base model fixes: in for down, out for up."""
        return self.shape[1] if self.role == "down" else self.shape[0]


@dataclass(frozen=True, eq=False)  # compared by identity: equal layouts are mostly one object
class Layout:
    """Layers that a header promises, in the network's order, the key of each module's alpha, and what is ignored.

    ``ranks`` are those of modules whose pair is a product of factors of a smaller rank, as LoHa and LoKr have it: the
    rank that their writer means, 0 where the file does not tell.
    """

    layers: tuple[Layer, ...]
    alphas: dict[str, str] = field(default_factory=dict)
    ignored: Counter = field(default_factory=Counter)
    ranks: dict[str, int] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """Canonical ids of the modules, in the network's order; each has a down and an up."""
        return [layer.module for layer in self.layers if layer.role == "down"]

    @property
    def columns(self) -> tuple[slice, ...]:
        """The columns of each layer in the flattened weights."""
        ends = accumulate((prod(layer.shape) for layer in self.layers), initial=0)
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @cached_property
    def width(self) -> int:
        """The number of weights."""
        return sum(prod(layer.shape) for layer in self.layers)


def by_layout(layouts: Iterable[Layout]) -> list[list[int]]:
    """Return the positions of each distinct layout; equal ones are mostly one object, so there are few."""
    positions = defaultdict(list)
    for position, layout in enumerate(layouts):
        positions[id(layout)].append(position)
    return list(positions.values())


def packed_layout(layouts: Sequence[Layout]) -> Layout:
    """Return the layout of weights that are packed to one width: each layer is padded to its largest rank.

    The layouts differ in nothing but ranks. Where these are equal too, the first layout is returned itself.
    """
    first = layouts[0]
    layers_of_files = list(zip(*(layout.layers for layout in layouts), strict=True))
    if all(layer.shape == layers[0].shape for layers in layers_of_files for layer in layers):
        return first
    padded = []
    for layers in layers_of_files:
        rank, side = max(layer.rank for layer in layers), layers[0].free_side
        padded.append(replace(layers[0], shape=(rank, side) if layers[0].role == "down" else (side, rank)))
    return Layout(tuple(padded))
