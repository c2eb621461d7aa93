"""Names of modules and layers as figures, tables and sentences show them: by block and projection, short.

A name is ``IN07.3 attn2 k`` or ``layer 31 mlp gate``: the block, the transformer in it where it holds several, the
attention where the block may hold another, and the projection. ``full_names`` of modules and ``layer_names`` of layers
are never the same for two of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

ONLY = ("attn", "self_attn")  # attention that needs no name in blocks that hold no other
MOST_PARTS = 60  # of a name that is cut between its parts


# ----------------------------------------------------------------------------------------------------------------------
# Modules and layers
# ----------------------------------------------------------------------------------------------------------------------


def _places(analysis: dict) -> dict[str, dict]:
    """Return block, attention and projection of each module by its canonical id, in the network's order."""
    layers, attended = analysis.get("layers") or {"records": []}, analysis.get("attention") or {"modules": []}
    places: dict[str, dict] = {}
    for record in (*layers["records"], *attended["modules"]):
        place = places.setdefault(record["module"], {"block": None, "projection": None, "kind": None})
        place["block"] = record.get("block") or place["block"]
        place["projection"] = record.get("projection") or place["projection"]
        if "layer" in record:  # in records of modules "attention" is a share
            place["kind"] = record.get("attention")
    return places


def _within(analysis: dict) -> dict[str, tuple[str | None, str, str]]:
    """Return of each module its block, the number of its transformer in it or "", and its name there.

    Modules of a block that would be called the same have the numbers in front that their ids differ in, or behind them
    their number by depth where these differ in other ways. Outside of all blocks they have their ids.
    """
    places = _places(analysis)
    kinds, alike = defaultdict(set), defaultdict(list)
    for place in places.values():
        kinds[place["block"]].add(place["kind"])
    for module, place in places.items():
        several = len(kinds[place["block"]] - {None}) > 1
        kind = place["kind"] if several or place["kind"] not in ONLY else None
        name = f"{kind or ''} {place['projection']}".strip() if place["projection"] else module
        alike[place["block"], name].append(module)
    named = {}
    for (block, name), modules in alike.items():
        numbers = _numbers_of(modules) if len(modules) > 1 else [""]
        for i, module in enumerate(modules, 1):
            number = numbers[i - 1] if numbers else ""
            if number and not block:  # a number of nothing
                named[module] = (block, "", module)
            else:
                named[module] = (block, number, name if numbers else f"{name} ({i})")
    return {module: named[module] for module in places}


def _numbers_of(modules: Sequence[str]) -> list[str]:
    """Return the numbers that ids differ in, such as 0.1; nothing where they differ in something else.

    Example:
        >>> _numbers_of(["blocks_1_parts_0_to_q", "blocks_1_parts_12_to_q"]), _numbers_of(["conv1", "conv2_out"])
        (['0', '12'], [])
    """
    parts = [module.split("_") for module in modules]
    if len({len(of_module) for of_module in parts}) > 1:
        return []
    different = [column for column in zip(*parts, strict=True) if len(set(column)) > 1]
    if not all(part.isdecimal() for column in different for part in column):
        return []
    return [".".join(numbers) for numbers in zip(*different, strict=True)]


def short_names(analysis: dict) -> dict[str, str]:
    """Return names of modules within their blocks, such as ``attn2 k``: attention and projection, by canonical id.

    A module of unknown projection has its id.
    """
    return {
        module: f"{f'.{number} ' if number else ''}{name}" for module, (_, number, name) in _within(analysis).items()
    }


def full_names(analysis: dict) -> dict[str, str]:
    """Return names of modules with their block in front, where both are known, by canonical id; all are different."""
    names = {}
    for module, (block, number, name) in _within(analysis).items():
        place = f"{block}.{number}" if number else block or ""
        names[module] = name if name.startswith(module) else f"{place} {name}".strip()
    return _all_different(names)


def layer_names(analysis: dict) -> dict[str, str]:
    """Return names of layers, that of the module and its factor, such as ``IN07.3 attn2 k, up``, by their own."""
    modules = full_names(analysis)
    records = (analysis.get("layers") or {"records": []})["records"]
    return _all_different({record["layer"]: f"{modules[record['module']]}, {record['role']}" for record in records})


def _all_different(names: dict[str, str]) -> dict[str, str]:
    """Return names by id, the id itself in place of a name that another has too."""
    owners = defaultdict(list)
    for key, name in names.items():
        owners[name].append(key)
    return {key: name if len(owners[name]) == 1 else key for key, name in names.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Long names
# ----------------------------------------------------------------------------------------------------------------------


def shortened(name: str, fits: Callable[[str], bool]) -> str:
    """Return a name with its middle left out where it does not fit: whole parts between dots, else words, else letters.

    Args:
        name: The name.
        fits: Function that returns whether a text fits; what fits does so without some of its letters too.

    Example:
        >>> shortened("transformer.blocks.0.attn1.to_q.weight", lambda text: len(text) <= 24)
        'transformer…to_q.weight'
    """
    if fits(name):
        return name
    kept = _most(len(name), lambda count: fits(_without_middle(name, count)))
    by_letters = _without_middle(name, max(2, kept))
    for marks in (r"[./\\]", r"[\s_:-]"):
        by_parts = _between_parts(name, marks, fits)
        if 2 * len(by_parts) > len(by_letters):  # not where parts are so long that most is lost
            return by_parts
    return by_letters


def _without_middle(name: str, kept: int) -> str:
    """Return the first two thirds and the last third of so many letters."""
    return f"{name[: kept - kept // 3].rstrip()}…{name[len(name) - kept // 3 :].lstrip()}"


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to a count that fits, by bisection; 0 where none does."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _between_parts(name: str, marks: str, fits: Callable[[str], bool]) -> str:
    """Return the most letters of a name's first and last parts that fit; "" where it has no parts, or none do."""
    ends = [match.start() for match in re.finditer(marks, name)][:MOST_PARTS]
    starts = [match.end() for match in re.finditer(marks, name)][-MOST_PARTS:]
    pairs = [(head, tail) for head in ends for tail in starts if 0 < head < tail < len(name)]
    pairs.sort(key=lambda pair: _weight(pair[0], len(name) - pair[1]), reverse=True)
    texts = (f"{name[:head]}…{name[tail:]}" for head, tail in pairs if tail - head > 1)
    return next((text for text in texts if fits(text)), "")


def _weight(head: int, tail: int) -> int:
    """Return how good it is to keep so many letters of both ends: the more the better, and of both rather than one."""
    return head + tail + min(head, tail)
