"""The content of results.json with blocks in place of layers, for figures of networks of very many layers.

Layers that are in no block are taken together with their neighbours in depth.

Shape letters: L layers in the network's order, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from report.names import full_names

MOST_LAYERS = 300  # that figures show each
MOST_BLOCKS = 100  # that they show else; of more, neighbours are taken together
FEWEST = 4  # layers without a block that are taken together, at least: two modules


@dataclass(frozen=True)
class Block:
    """A block: its name, empty for neighbours that are in none, and positions of its layers.

    Of several that are taken together ``name`` is that of the first, and ``last`` of the last.
    """

    name: str
    members: tuple[int, ...]
    last: str = ""

    @property
    def title(self) -> str:
        """Its whole name, or the depths of its layers."""
        if not self.name:
            return f"layers {self.members[0]} to {self.members[-1]}"
        return f"{self.name} to {self.last}" if self.last else self.name


def blocks_of(names: Sequence[str | None], most: int = MOST_BLOCKS) -> list[Block]:
    """Return the blocks of layers in the network's order, at most ``most``, by the first of their layers.

    Args:
        names: The name of each layer's block; None or empty where it is in none.
        most: Blocks at most.

    Example:
        >>> [block.title for block in blocks_of(["a", "a", "b", None, None, None, None, None])]
        ['a', 'b', 'layers 3 to 6', 'layers 7 to 7']
    """
    named = {name: [] for name in names if name}
    alone = sum(not name for name in names)
    size = max(FEWEST, 2 * math.ceil(alone / max(1, most - len(named)) / 2))  # even: the layers of a module are two
    runs: list[list[int]] = []
    for layer, name in enumerate(names):
        if name:
            named[name].append(layer)
        elif runs and runs[-1][-1] == layer - 1 and len(runs[-1]) < size:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    blocks = [Block(name, tuple(members)) for name, members in named.items()]
    blocks += [Block("", tuple(run)) for run in runs]
    blocks.sort(key=lambda block: block.members[0])
    step = math.ceil(len(blocks) / most)
    return [_together(blocks[start : start + step]) for start in range(0, len(blocks), step)]


def _together(blocks: Sequence[Block]) -> Block:
    names = [block.name for block in blocks if block.name] or [""]
    last = names[-1] if len(names) > 1 else ""
    return Block(names[0], tuple(sorted(layer for block in blocks for layer in block.members)), last)


def in_blocks(results: dict) -> dict:
    """Return results whose records of layers and of modules are those of blocks; the content given is not changed.

    A record is of the layers of one factor. Its accuracy is their mean, its interval from the lowest to the highest, it
    has the name of the best ranked of them, and knows something of the concept where one of them does. Attention is
    summed over the modules of a block, what concepts explain is the mean; `best_layer` is the recall by the best layer.
    ``num_layers_shown`` is L, ``members_shown`` has the positions of the layers of each record, ``top_shown`` the
    records of the top layers, each at its block, ``records_of_layers`` those of all, ``names_shown`` names of modules.
    """
    analysis, rank_of = results["analysis"], {name: rank for rank, name in enumerate(results["top_layers"])}
    records = analysis["layers"]["records"]
    blocks = blocks_of([record["block"] for record in records])
    shown, members = [], []
    for number, block in enumerate(blocks):
        for role in dict.fromkeys(records[layer]["role"] for layer in block.members):
            layers = [layer for layer in block.members if records[layer]["role"] == role]
            shown.append(_of_layers([records[layer] for layer in layers], number, block, rank_of))
            members.append(layers)
    sections = {"layers": analysis["layers"] | {"records": shown}}
    if concepts := analysis.get("concepts"):
        recall = np.array(concepts["recall"], float)  # (L, C)
        means = [recall[layers].mean(0).tolist() for layers in members]
        sections["concepts"] = concepts | {"recall": means, "best_layer": recall.max(0).tolist()}
    place_of = {records[layer]["module"]: i for i, block in enumerate(blocks) for layer in block.members[::-1]}
    if structure := analysis.get("rank_structure"):
        sections["rank_structure"] = structure | {"modules": _explained(structure["modules"], blocks, place_of)}
    if attention := analysis.get("attention"):
        sections["attention"] = _attention(attention, blocks, place_of)
    number_of = {layer: number for number, block in enumerate(blocks) for layer in block.members}
    top = [record | {"depth": number_of[i]} for i, record in enumerate(records) if record["layer"] in rank_of]
    return results | {
        "analysis": analysis | sections,
        "num_layers_shown": len(records),
        "members_shown": members,
        "top_shown": top,
        "records_of_layers": records,
        "names_shown": full_names(analysis),
        "blocks_shown": blocks,
    }


def _of_layers(records: Sequence[dict], number: int, block: Block, rank_of: dict[str, int]) -> dict:
    """Return the record of a block's layers of one factor."""
    accuracies = [record["accuracy"] for record in records]
    first = min(records, key=lambda record: rank_of.get(record["layer"], math.inf))
    knows = {name: any(record[name] for record in records) for name in ("above_null", "above_chance")}
    return first | {
        "depth": number,
        "block": block.name or None,
        "module": block.title,
        "projection": None,
        "attention": None,
        "accuracy": sum(accuracies) / len(accuracies),
        "interval": [min(accuracies), max(accuracies)],
        **knows,
    }


def _by_block(modules: Sequence[dict], place_of: dict[str, int]) -> dict[int, list[int]]:
    """Return positions of modules by the position of their block, in the network's order."""
    inside: dict[int, list[int]] = {}
    for position, record in enumerate(modules):
        inside.setdefault(place_of[record["module"]], []).append(position)
    return dict(sorted(inside.items()))


def _explained(modules: Sequence[dict], blocks: Sequence[Block], place_of: dict[str, int]) -> list[dict]:
    """Return what concepts explain of the modules of each block, on average, and whether they do of any."""
    return [
        {
            "module": blocks[place].title,
            "effect": sum(min(1, modules[i]["effect"]) for i in positions) / len(positions),
            "significant": any(modules[i]["significant"] for i in positions),
        }
        for place, positions in _by_block(modules, place_of).items()
    ]


def _attention(section: dict, blocks: Sequence[Block], place_of: dict[str, int]) -> dict:
    """Return attention and contributions summed over the modules of each block; intervals where they are known."""
    modules = section["modules"]
    inside = _by_block(modules, place_of)
    known = {record["block"]: record for record in section["blocks"]}
    shown = []
    for place, positions in inside.items():
        block, above = blocks[place], [modules[i]["above_permuted"] for i in positions]
        whole = known.get(block.name)
        whole = whole if whole and not block.last and whole["modules"] == len(positions) else {}
        sums = {name: sum(modules[i][name] for i in positions) for name in ("attention", "contribution", "gradient")}
        shown.append(
            {
                "module": block.title,
                "block": block.name or None,
                "projection": None,
                **sums,
                "interval": whole.get("interval"),
                "contribution_interval": whole.get("contribution_interval"),
                "above_permuted": None if None in above else any(above),
                "even": len(positions) / len(modules),
            }
        )
    classes = [record | {"contribution": _sums(record["contribution"], inside)} for record in section["classes"]]
    return section | {"modules": shown, "classes": classes}


def _sums(values: Sequence[float] | None, inside: dict[int, list[int]]) -> list[float] | None:
    return values and [sum(values[i] for i in positions) for positions in inside.values()]
