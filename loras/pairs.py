"""Tensors of a header -> pairs: the down and the up of each module, and the places of what they are made of.

A header is the text of a stranger: each of its entries is checked before it is used, whoever has looked at it before.

Shape letters: r rank, see products.py.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from math import prod
from typing import NamedTuple

from loras.blocks import blocks_of
from loras.keys import LoraFileError, count_ignored, parse_alpha, parse_key, without_pairs
from loras.layouts import Layer, Layout
from loras.memory import host_memory
from loras.order import in_network_order
from loras.patterns import path_of
from loras.products import BYTES_OF_TYPE, FLOAT_TYPES, IDENTITY, INTEGER_TYPES, Factor, Places, Product, Run

MAX_KEY_LENGTH = 300
MAX_PRODUCT_RANK = 256  # of the pair that a LoHa or LoKr is
MAX_LAYERS = 40_000  # stacked experts are modules each
MAX_NUMBERS = 2**31  # of a file's pairs: 8 GiB as float32; a Flux LoRA of rank 256 has 1.4e9
COPIES = 6  # of a file's numbers that may be in memory at once, as float32: as read, packed, on the device, by shape


class Entry(NamedTuple):
    """A tensor of a header: its type, its shape, and its first byte in the data."""

    dtype: str
    shape: tuple[int, ...]
    byte: int


class Piece(NamedTuple):
    """A layer and its source: a run or a product, of which the columns are counted from 0."""

    layer: Layer
    source: Run | Product


# ----------------------------------------------------------------------------------------------------------------------
# Entries and keys
# ----------------------------------------------------------------------------------------------------------------------


def checked_entries(entries: dict) -> dict[str, Entry]:
    """Return the tensors of a parsed header.

    Raises:
        LoraFileError: An entry has no type, shape and place in the data. That these fit each other the library checks.
    """
    checked = {}
    for key, entry in entries.items():
        if len(key) > MAX_KEY_LENGTH:
            raise LoraFileError(f"a key of {len(key)} characters, {key}. Is it a LoRA?")
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (fields.get(name) for name in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise LoraFileError(f"its header has no type, shape and place for {key}. Download it again.")
        checked[key] = Entry(dtype, tuple(shape), offsets[0])
    return checked


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def parse_pairs(entries: dict[str, Entry]) -> Places:
    """Return the layout of a file, and the places of its numbers.

    Raises:
        LoraFileError: No LoRA pair, a missing partner, shapes that do not match, two adapters, or a family that is
            refused.
    """
    factors, alphas, ignored = _sort_keys(entries)
    if not factors:
        raise without_pairs(list(entries), ignored)
    for key in factors.values():
        if entries[key].dtype not in FLOAT_TYPES:
            raise LoraFileError(f"{key} is of type {entries[key].dtype}. Save it as one of {', '.join(FLOAT_TYPES)}.")
    by_module: dict[str, dict[str, str]] = defaultdict(dict)
    for (module, role), key in factors.items():
        by_module[module][role] = key
    pieces: list[Piece] = []
    ranks = {}
    for module, keys in by_module.items():
        families = {role.partition("_")[0] if "_" in role else "lora" for role in keys}
        if len(families) > 1:
            raise LoraFileError(f"module {module} is two adapters ({', '.join(keys.values())}). Keep one.")
        pair, rank = _READERS[families.pop()](_Module(module, keys, entries))
        pieces += pair
        if rank is not None:
            ranks[module] = rank
    return _placed(pieces, _alpha_places(alphas, entries), alphas, ignored, ranks)


def _sort_keys(entries: dict[str, Entry]) -> tuple[dict[tuple[str, str], str], dict[str, str], Counter]:
    """Return the keys of factors by module and role, those of alphas by module, and how many are neither."""
    factors: dict[tuple[str, str], str] = {}
    alphas: dict[str, str] = {}
    others: dict[str, tuple[int, ...]] = {}
    adapters: dict[str, str] = {}
    for key, entry in entries.items():
        if parsed := parse_key(key):
            _check_printable(key)
            if parsed.adapter:
                adapters.setdefault(parsed.adapter, key)
            if len(adapters) > 1:
                raise LoraFileError(f"holds several adapters ({', '.join(adapters.values())}). Save one to a file.")
            first = factors.setdefault((parsed.module, parsed.role), key)
            if first != key:
                fault = f"two tensors are the {parsed.role} of module {parsed.module}: {first} and {key}"
                raise LoraFileError(f"{fault}. Keep one.")
        elif (module := parse_alpha(key)) is not None:
            _check_printable(key)
            first = alphas.setdefault(sys.intern(module), sys.intern(key))
            if first != key:
                raise LoraFileError(f"two tensors are the alpha of module {module}: {first} and {key}. Keep one.")
        else:
            others[key] = entry.shape
    modules = {module for module, _ in factors}
    ignored = count_ignored(others, modules)
    for module in alphas.keys() - modules:
        ignored["*.alpha without its module"] += 1
        del alphas[module]
    for key in alphas.values():
        _check_alpha(key, entries[key])
    return factors, alphas, ignored


def _check_printable(key: str) -> None:
    if not key.isprintable():
        raise LoraFileError(f"the key {key!a} is not plain text. Rename it or leave the file out.")


def _check_alpha(key: str, entry: Entry) -> None:
    if prod(entry.shape) != 1:
        raise LoraFileError(f"{key} has shape {list(entry.shape)}, not that of a number. Save alpha as one.")
    if entry.dtype not in FLOAT_TYPES + INTEGER_TYPES:
        raise LoraFileError(f"{key} is of type {entry.dtype}. Save it as one of {', '.join(FLOAT_TYPES)}.")


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of a module, by family
# ----------------------------------------------------------------------------------------------------------------------


class _Module:
    """The tensors of a module, by role."""

    def __init__(self, name: str, keys: dict[str, str], entries: dict[str, Entry]):
        self.name, self.keys, self.entries = name, keys, entries

    def __contains__(self, role: str) -> bool:
        return role in self.keys

    def entry(self, role: str) -> Entry:
        return self.entries[self.keys[role]]

    def shape(self, role: str) -> tuple[int, ...]:
        return self.entry(role).shape

    def flat(self, role: str) -> tuple[int, int]:
        """Return the shape of a factor with its kernel folded into its columns."""
        shape = self.shape(role)
        return shape[0], prod(shape[1:])

    def style(self, role: str) -> str:
        return parse_key(self.keys[role]).style

    def factor(self, role: str, transposed: bool = False) -> Factor:
        entry = self.entry(role)
        return Factor(entry.dtype, entry.byte, entry.shape, transposed)

    def shapes(self) -> str:
        """Return the roles with their shapes, in words."""
        return ", ".join(f"{role} {list(self.shape(role))}" for role in sorted(self.keys))

    def layer(self, key_role: str, role: str, shape: tuple[int, int], number: int | None = None) -> Layer:
        """Return a layer that is shown under the key of one of its tensors; ``number`` is an expert's."""
        key, module = self.keys[key_role], self.name
        if number is not None:
            key, module = f"{key}[{number}]", f"{module}_{number}"
        return _layer(key, module, role, shape, self.entry(key_role).dtype, "", self.style(key_role))

    def run(self, key_role: str, shape: tuple[int, int], number: int = 0) -> Run:
        """Return the place of a matrix that lies in a tensor as it is, behind ``number`` others."""
        entry, size = self.entry(key_role), prod(shape)
        return Run(entry.dtype, entry.byte + number * size * BYTES_OF_TYPE[entry.dtype], 0, size)

    def product(
        self, key_role: str, role: str, shape: tuple[int, int], kind: str, factors: Iterable[Factor], *arguments: int
    ) -> Piece:
        """Return a layer that is made of tensors."""
        source = Product(kind, tuple(factors), 0, prod(shape), arguments)
        return Piece(self.layer(key_role, role, shape), source)


_Pair = tuple[list[Piece], int | None]  # the pieces, and the rank that the writer means where the pair's is another


def _plain_pair(module: _Module) -> _Pair:
    """Return a down and an up that lie in the file as they are, or nearly so."""
    for role in module.keys:
        if role != "mid" and module.style(role) not in _TRANSPOSED:
            _check_factor(module, role)
    for role, other in (("mid", "down"), ("down", "up"), ("up", "down")):
        if role in module and other not in module:
            raise LoraFileError(
                f"module {module.name} has a {role} {list(module.shape(role))} but no {other}. Save both factors."
            )
    transposed = [module.style(role) in _TRANSPOSED for role in ("down", "up")]
    if any(transposed) and not all(transposed):
        keys = f"{module.keys['down']}, {module.keys['up']}"
        raise LoraFileError(f"one factor of module {module.name} is MLX's, the other is not ({keys}). Save both alike.")
    if all(transposed):
        return _transposed_pair(module), None
    down, up = module.flat("down"), module.flat("up")
    if "mid" in module:
        down = _tucker_shape(module)
    pieces = [Piece(module.layer(role, role, shape), module.run(role, shape)) for role, shape in _roles(down, up)]
    if "mid" in module:
        pieces[0] = module.product("down", "down", down, "tucker", [module.factor("down"), module.factor("mid")])
    if down[0] != up[1]:
        groups = _groups(module, down[0], up[1])
        wide = (up[0], down[0])
        pieces[1] = module.product("up", "up", wide, "block diagonal", [module.factor("up")], groups)
    return pieces, None


def _roles(down: tuple[int, int], up: tuple[int, int]) -> tuple[tuple[str, tuple[int, int]], ...]:
    return ("down", down), ("up", up)


def _check_factor(module: _Module, role: str) -> None:
    """Refuse a tensor that is no matrix and no factor of a convolution; a kernel is of the down alone."""
    shape = module.shape(role)
    right = 2 <= len(shape) <= 5 and prod(shape) > 0 and (role == "down" or set(shape[2:]) <= {1})
    other = {"down": "up", "up": "down"}[role]
    if len(shape) in (3, 5) and other in module:
        right &= len(module.shape(other)) == len(shape)
    if not right:
        fault = f"{module.keys[role]} has shape {list(shape)}: neither a matrix nor a convolution's factor"
        raise LoraFileError(f"{fault}. Is it a LoRA?")


def _tucker_shape(module: _Module) -> tuple[int, int]:
    """Return the shape of the down of a LoCon in Tucker form, multiplied by its mid: the kernel is the mid's."""
    thin, mid = module.shape("down"), module.shape("mid")
    rank = thin[0]
    dimensions = len(thin) if len(thin) > 2 else 4
    if len(mid) != dimensions or prod(mid) == 0 or mid[:2] != (rank, rank) or prod(thin[2:]) != 1:
        shapes = f"down {list(thin)}, mid {list(mid)}"
        raise LoraFileError(f"ranks differ in module {module.name}: {shapes}. Save all factors of one LoRA.")
    return rank, prod(thin[1:]) * prod(mid[2:])


def _groups(module: _Module, rank: int, narrow: int) -> int:
    """Return the groups of a convolution whose up has the rank of one group, as PEFT writes it."""
    outputs = module.shape("up")[0]
    grouped = module.style("up").startswith("PEFT") and len(module.shape("up")) == len(module.shape("down")) > 2
    if not grouped or "mid" in module or rank % narrow or outputs % (rank // narrow):
        shapes = f"down {list(module.flat('down'))}, up {list(module.flat('up'))}"
        raise LoraFileError(f"ranks differ in module {module.name}: {shapes}. Save both factors of one LoRA.")
    return rank // narrow


def _transposed_pair(module: _Module) -> list[Piece]:
    """Return the pair of MLX: a [in, r] and b [r, out]; of stacked experts a [experts, r, in], b [experts, out, r]."""
    down, up = module.shape("down"), module.shape("up")
    if len(up) == 3 and len(down) > 1 and prod(up) and prod(down) == up[0] * up[2] * down[-1]:
        experts, outputs, rank = up
        _check_count(module.name, experts)
        shapes = {"down": (rank, down[-1]), "up": (outputs, rank)}
        return [
            Piece(module.layer(role, role, shapes[role], number), module.run(role, shapes[role], number))
            for number in range(experts)
            for role in ("down", "up")
        ]
    if len(down) != 2 or len(up) != 2 or not prod(down) * prod(up) or down[1] != up[0]:
        fault = f"shapes do not match in module {module.name}: {module.shapes()}, where MLX has [in, r] and [r, out]"
        raise LoraFileError(f"{fault}. Save both factors of one LoRA.")
    return [
        module.product(role, role, module.shape(role)[::-1], "matrix", [module.factor(role, True)])
        for role in ("down", "up")
    ]


def _check_count(module: str, experts: int) -> None:
    if 2 * experts > MAX_LAYERS:
        raise LoraFileError(f"module {module} has {experts} experts, more than any network. Is it a LoRA?")


def _loha_pair(module: _Module) -> _Pair:
    """Return the pair that a LoHa is: (a1·b1) * (a2·b2), entry by entry."""
    cores = [role for role in ("hada_t1", "hada_t2") if role in module]
    wanted = {f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"} | ({"hada_t1", "hada_t2"} if cores else set())
    _check_roles(module, "LoHa", wanted)
    parts = [_decomposed(module, f"hada_w{n}", f"hada_t{n}") for n in (1, 2)]
    if parts[0][:3] != parts[1][:3] or len({module.shape(core)[2:] for core in cores}) > 1:
        raise _unmatched(module)
    outputs, rank, columns, _ = parts[0]
    _check_product_rank(module, "LoHa", rank * rank)
    ups = [module.factor(f"hada_w{n}_a", bool(cores)) for n in (1, 2)]
    downs = [factor for part in parts for factor in part[3]]
    return [
        module.product("hada_w1_b", "down", (rank * rank, columns), "khatri-rao columns", downs),
        module.product("hada_w1_a", "up", (outputs, rank * rank), "khatri-rao rows", ups),
    ], rank


def _lokr_pair(module: _Module) -> _Pair:
    """Return the pair that a LoKr is: the Kronecker product of w1 and w2, of which each may be whole or a pair."""
    wanted = set()
    for name in ("lokr_w1", "lokr_w2"):
        wanted |= {name} if name in module else {f"{name}_a", f"{name}_b"}
    if "lokr_t2" in module and "lokr_w2" not in module:
        wanted.add("lokr_t2")
    _check_roles(module, "LoKr", wanted)
    ups, downs, outer, inner, ranks = [], [], [], [], []
    for name, core in (("lokr_w1", None), ("lokr_w2", "lokr_t2")):
        if name in module:
            up, down, (outputs, columns) = _whole(module, name)
            rank = min(outputs, columns)
        else:
            outputs, rank, columns, down = _decomposed(module, name, core)
            up = [module.factor(f"{name}_a", core in module)]
            ranks.append(rank)
        ups, downs = [*ups, *up], [*downs, *down]
        outer.append((outputs, columns))
        inner.append(rank)
    if len(set(ranks)) > 1 or prod(side for sides in outer for side in sides) == 0:
        raise _unmatched(module)
    _check_product_rank(module, "LoKr", prod(inner))
    outputs, columns = (prod(sides) for sides in zip(*outer, strict=True))
    key_up, key_down = (
        ("lokr_w1" if "lokr_w1" in module else "lokr_w1_a"),
        ("lokr_w2" if "lokr_w2" in module else "lokr_w2_b"),
    )
    return [
        module.product(key_down, "down", (prod(inner), columns), "kronecker", downs),
        module.product(key_up, "up", (outputs, prod(inner)), "kronecker", ups),
    ], (ranks or [0])[0]


def _whole(module: _Module, role: str) -> tuple[list[Factor], list[Factor], tuple[int, int]]:
    """Return a whole factor as an up and a down, of which one is an identity of the narrow side; and its shape."""
    if not _has_sides(module, role):
        raise _unmatched(module)
    outputs, columns = module.flat(role)
    narrow = min(outputs, columns)
    identity, itself = [Factor(IDENTITY, 0, (narrow, narrow))], [module.factor(role)]
    return (identity, itself, (outputs, columns)) if outputs == narrow else (itself, identity, (outputs, columns))


def _decomposed(module: _Module, name: str, core: str | None) -> tuple[int, int, int, list[Factor]]:
    """Return rows, rank and columns of a·b, and what its down is made of: with a core, a is [r, rows]."""
    first, second = module.shape(f"{name}_a"), module.shape(f"{name}_b")
    if len(first) != 2 or not _has_sides(module, f"{name}_b") or prod(first) * prod(second) == 0:
        raise _unmatched(module)
    factors, (rank, columns) = [module.factor(f"{name}_b")], module.flat(f"{name}_b")
    if core in module:
        first = first[::-1]
        shape = module.shape(core)
        if not 3 <= len(shape) <= 5 or shape[:2] != (rank, rank) or len(second) != 2 or prod(shape) == 0:
            raise _unmatched(module)
        factors.append(module.factor(core))
        columns *= prod(shape[2:])
    if first[1] != rank:
        raise _unmatched(module)
    return first[0], rank, columns, factors


def _named(module: _Module, family: str) -> str:
    """Return the words for a module of another family."""
    return f"a {family} adapter ({module.keys[min(module.keys)]}) whose module {module.name}"


def _has_sides(module: _Module, role: str) -> bool:
    """Return whether a tensor is a matrix; that of a LoKr which holds the kernel may have its sides behind."""
    return 2 <= len(module.shape(role)) <= (5 if role.startswith("lokr_w2") else 2)


def _check_roles(module: _Module, family: str, wanted: set[str]) -> None:
    """Refuse a module that lacks tensors of its family, or has too many."""
    if lacking := sorted(wanted - set(module.keys)):
        raise LoraFileError(f"{_named(module, family)} has no {', '.join(lacking)}. Save all of its tensors.")
    if spare := sorted(set(module.keys) - wanted):
        fault = f"{_named(module, family)} has {', '.join(spare)} beside {', '.join(sorted(wanted))}"
        raise LoraFileError(f"{fault}. Save the tensors of one {family}.")


def _unmatched(module: _Module) -> LoraFileError:
    fault = f"shapes do not match in module {module.name}: {module.shapes()}"
    return LoraFileError(f"{fault}. Save all factors of one adapter.")


def _check_product_rank(module: _Module, family: str, rank: int) -> None:
    if rank > MAX_PRODUCT_RANK:
        fault = f"{_named(module, family)} is a pair of rank {rank}; at most {MAX_PRODUCT_RANK} can be read"
        raise LoraFileError(f"{fault}. Train with a smaller dimension, or leave the file out.")


_TRANSPOSED = {"MLX"}  # styles of `keys.KEY_FAMILIES`
_READERS: dict[str, Callable[[_Module], _Pair]] = {"lora": _plain_pair, "hada": _loha_pair, "lokr": _lokr_pair}


# ----------------------------------------------------------------------------------------------------------------------
# Places
# ----------------------------------------------------------------------------------------------------------------------

# Of tens of thousands of files each layer, and mostly each layout and its places, are held once.
_layer = lru_cache(maxsize=2**16)(Layer)
_shared_places = lru_cache(maxsize=2**10)(Places)


@lru_cache(maxsize=2**10)
def _layout(layers: tuple, alphas: tuple, ignored: tuple, ranks: tuple) -> Layout:
    return Layout(layers, dict(alphas), Counter(dict(ignored)), dict(ranks))


def _alpha_places(alphas: dict[str, str], entries: dict[str, Entry]) -> list[tuple[str, str, int]]:
    return [(module, entries[key].dtype, entries[key].byte) for module, key in sorted(alphas.items())]


def _placed(
    pieces: list[Piece],
    alpha_places: list[tuple[str, str, int]],
    alphas: dict[str, str],
    ignored: Counter,
    ranks: dict[str, int],
) -> Places:
    """Put layers into the network's order, in named blocks; neighbours in both data and layout are one run."""
    if len(pieces) > MAX_LAYERS:
        raise LoraFileError(f"has {len(pieces)} layers, more than any network. Is it a LoRA?")
    modules = tuple(sorted({piece.layer.module for piece in pieces}))
    if 2 * len(modules) != len(pieces):
        double, _ = Counter(piece.layer.module for piece in pieces).most_common(1)[0]
        raise LoraFileError(f"several tensors are module {double}. Keep one adapter to a module.")
    block_of = dict(zip(modules, blocks_of(modules), strict=True))
    sources, layer_of = {}, {}
    for layer, source in pieces:
        named = _layer(*_fields(layer)[:5], block_of[layer.module], layer.style)
        sources[named] = source
        layer_of[layer.module, layer.role] = named
    sides = {module: (layer_of[module, "down"].free_side, layer_of[module, "up"].free_side) for module in modules}
    layers = [layer_of[module, role] for module in in_network_order(sides) for role in ("down", "up")]
    return _joined(
        _layout(tuple(layers), *(tuple(sorted(part.items())) for part in (alphas, ignored, ranks))),
        [sources[layer] for layer in layers],
        alpha_places,
    )


def _fields(layer: Layer) -> tuple:
    return layer.name, layer.module, layer.role, layer.shape, layer.dtype, layer.block, layer.style


def _joined(layout: Layout, sources: Iterable[Run | Product], alpha_places: Iterable) -> Places:
    """Return the places of a layout whose layers have these sources."""
    runs: list[Run] = []
    products = []
    for source, columns in zip(sources, layout.columns, strict=True):
        moved = source._replace(start=columns.start, stop=columns.stop)
        if isinstance(moved, Product):
            products.append(moved)
        elif runs and (moved.dtype, moved.byte, moved.start) == (runs[-1].dtype, _end(runs[-1]), runs[-1].stop):
            runs[-1] = runs[-1]._replace(stop=moved.stop)
        else:
            runs.append(moved)
    places = _shared_places(layout, tuple(runs), tuple(alpha_places), tuple(products))
    _check_size(places)
    return places


def _end(run: Run) -> int:
    return run.byte + (run.stop - run.start) * BYTES_OF_TYPE[run.dtype]


def _check_size(places: Places) -> None:
    """Refuse pairs that memory cannot hold, whatever the file takes on disk."""
    numbers, memory = places.numbers, host_memory()
    if numbers > MAX_NUMBERS:
        raise LoraFileError(f"its pairs are {numbers} numbers, more than any LoRA has. Is it one?")
    if 4 * COPIES * numbers > memory:
        fault = f"its pairs are {numbers} numbers: {4 * COPIES * numbers / 2**30:.1f} GiB of memory are needed to read"
        raise LoraFileError(f"{fault} them, there are {memory / 2**30:.1f}. Leave it out, or take a larger machine.")


def _sources(places: Places) -> list[Run | Product]:
    """Return the source of each layer."""
    products = {product.start: product for product in places.products}
    starts, sources = [run.start for run in places.runs], []
    for columns in places.layout.columns:
        if columns.start in products:
            sources.append(products[columns.start])
        else:
            run = places.runs[bisect_right(starts, columns.start) - 1]
            byte = run.byte + (columns.start - run.start) * BYTES_OF_TYPE[run.dtype]
            sources.append(Run(run.dtype, byte, columns.start, columns.stop))
    return sources


@lru_cache(maxsize=2**10)
def kept_places(places: Places, modules: frozenset[str]) -> Places:
    """Return the places of only some modules; those of equal tensors stay one object."""
    layout = places.layout
    kept = [(layer, source) for layer, source in zip(layout.layers, _sources(places), strict=True)]
    kept = [(layer, source) for layer, source in kept if layer.module in modules]
    alphas, ranks = (
        tuple((module, value) for module, value in sorted(part.items()) if module in modules)
        for part in (layout.alphas, layout.ranks)
    )
    return _joined(
        _layout(tuple(layer for layer, _ in kept), alphas, tuple(sorted(layout.ignored.items())), ranks),
        [source for _, source in kept],
        [place for place in places.alphas if place[0] in modules],
    )


# Modules whose parameters are of all experts at once; those of an expert each have its number behind.
_STACKED = re.compile(r"(?:^|\.)(?:experts|block_sparse_moe\.(?:in|out)put_linear)(?:\.base_layer)*$")


@lru_cache(maxsize=2**10)
def stacked_layers(layout: Layout) -> tuple[Layer, ...]:
    """Return the downs that by their names are of experts which PEFT has stacked; of rank 1 there is only one."""
    return tuple(
        layer
        for layer in layout.layers[::2]
        if layer.style.startswith("PEFT") and layer.rank > 1 and _STACKED.search(path_of(layer.name))
    )


@lru_cache(maxsize=2**8)
def split_experts(places: Places, ranks: tuple[tuple[str, int], ...]) -> Places:
    """Return places in which each expert of some modules is a module of its own.

    PEFT stacks the experts of a parameter in one pair: down [experts · r, in], a block for each expert, and up
    [out, r · experts], in which the columns of an expert are apart by the number of experts.

    Args:
        places: Of the file.
        ranks: Modules, and the rank r of each of their experts.
    """
    rank_of, pieces = dict(ranks), []
    layout = places.layout
    sources = _sources(places)
    for layer, source in zip(layout.layers, sources, strict=True):
        if isinstance(source, Product):  # a convolution in groups, which is no parameter
            rank_of.pop(layer.module, None)
    for layer, source in zip(layout.layers, sources, strict=True):
        experts = layer.rank // rank_of.get(layer.module, layer.rank)
        if experts == 1:
            pieces.append(Piece(layer, source))
            continue
        _check_count(layer.module, experts)
        rank = rank_of[layer.module]
        shape = (rank, layer.free_side) if layer.role == "down" else (layer.free_side, rank)
        stacked = Factor(source.dtype, source.byte, layer.shape)
        for number in range(experts):
            part = _layer(
                f"{layer.name}[{number}]", f"{layer.module}_{number}", layer.role, shape, layer.dtype, "", layer.style
            )
            start = source.byte + number * prod(shape) * BYTES_OF_TYPE[source.dtype]
            place = Run(source.dtype, start, 0, prod(shape))
            if layer.role == "up":
                place = Product("expert", (stacked,), 0, prod(shape), (experts, number))
            pieces.append(Piece(part, place))
    return _placed(pieces, list(places.alphas), layout.alphas, layout.ignored, layout.ranks)


@lru_cache(maxsize=2**10)
def check_ranks(layout: Layout) -> None:
    """Refuse a pair whose rank is above both other sides: it would be larger than the update that it stands for.

    Raises:
        LoraFileError: There is one. Exact pairs of other adapters may have such a rank.
    """
    for down, up in zip(layout.layers[::2], layout.layers[1::2], strict=True):
        if down.rank > max(down.free_side, up.free_side) and down.module not in layout.ranks:
            fault = f"module {down.module} has rank {down.rank}, above both other sides: down {list(down.shape)}, "
            raise LoraFileError(
                f"{fault}up {list(up.shape)}. Is it a LoRA, and does its adapter_config.json stand beside it?"
            )
