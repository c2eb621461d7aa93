"""Contents of a folder of LoRAs, and the cost of an experiment on it: as a JSON object, and as lines.

Shape letters: N LoRAs, L layers.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from data import Collection
from experiment import forecast
from experiment.checks import Choice, group_columns
from experiment.estimates import Speed, sized
from experiment.settings import Settings
from loras import labels as labelling
from loras.building import duration
from loras.layouts import Layer, by_layout
from loras.names import plain, quoted
from loras.recipe import scale_records

MAX_CLASSES = 24  # that are listed, unless all are asked for
MAX_ENDS = 3  # classes that are named as the smallest, and as the largest
MAX_LISTED = 12  # scales, ranks, columns, shapes of a block
WIDTH = 110  # of lines that are wrapped


# ----------------------------------------------------------------------------------------------------------------------
# As a JSON object
# ----------------------------------------------------------------------------------------------------------------------


def contents_of(collection: Collection, selected: np.ndarray) -> dict:
    """Return what the headers of a collection show; ``selected`` are the layers that --layers keeps, bool[L]."""
    files = collection.files
    layouts = {positions[0]: len(positions) for positions in by_layout(file.layout for file in files)}
    dtypes, ranks, widths = Counter(), Counter(), Counter()
    for first, count in layouts.items():
        layout = files[first].layout
        for layer in layout.layers:
            dtypes[layer.dtype] += count
        ranks[tuple(sorted({layer.rank for layer in layout.layers}))] += count
        widths[layout.width] += count
    values = labelling.column_values(collection.root, [file.path for file in files], collection.table)
    fitting = labelling.would_make_classes(values, len(files))
    counts = collection.class_counts
    return {
        "num_samples": len(files),
        "classes": {label: counts[label] for label in in_order(counts)},
        "near_duplicates": labelling.near_duplicates(collection.classes),
        "layers": [
            {"name": layer.name, "module": layer.module, "role": layer.role, "shape": list(layer.shape)}
            for layer in collection.layers
        ],
        "layers_selected": np.flatnonzero(selected).tolist(),
        "blocks": blocks_of([layer for layer, kept in zip(collection.layers, selected, strict=True) if kept]),
        "ranks": [{"ranks": list(key), "files": ranks[key]} for key in sorted(ranks)],
        "dtypes": dict(dtypes),
        "scales": scale_records([file.scales for file in files]),
        "weights": {
            "least": min(widths),
            "most": max(widths),
            "total": sum(width * count for width, count in widths.items()),
        },
        "common_layers": collection.common_layers,
        "step": collection.choice.step,
        "label_source": collection.label_source,
        "label_column": collection.label_column,
        "group_column": collection.group_column,
        "num_groups": None if collection.groups is None else len(np.unique(collection.groups)),
        "columns": {name: len(counts) for name, counts in values.items()},
        "label_columns": [name for name in fitting if name != collection.label_column],
        "group_columns": {name: len(set(of_file.values())) for name, of_file in group_columns(collection).items()},
        "products": len(files[0].layout.ranks),
        "mixed_ranks": bool(collection.mixed_ranks),
        "ignored": dict(collection.ignored),
        "skipped": collection.skipped_records,
        "notices": [notice.record() for notice in collection.notices],
    }


def in_order(labels: Iterable[str]) -> list[str]:
    """Return labels in alphabetical order, numbers in them by their value.

    Example:
        >>> in_order(["step 10", "step 2", "10", "2.5", "-1"])
        ['-1', '2.5', '10', 'step 2', 'step 10']
    """

    def key(label: str) -> tuple:
        if re.fullmatch(r"[-+]?[0-9]+(?:[.][0-9]+)?", label):
            return (0, float(label), label)
        parts = re.split(r"([0-9]+)", label)
        return (1, [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], label)

    return sorted(labels, key=key)


def blocks_of(layers: Sequence[Layer]) -> list[dict]:
    """Return the blocks of layers, in the network's order, each with its projections and the shapes of its modules.

    A shape is out, rank, in: of an up [out, rank] and a down [rank, in]. A projection is of an attention, which stands
    before it, or where its name is not known the end of the module's.
    """
    by_block: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        by_block[layer.block].append(layer)
    records = []
    for block, members in by_block.items():
        shapes, sides = {}, defaultdict(dict)
        for layer in members:
            sides[layer.module][layer.role] = layer
        for roles in sides.values():
            sizes = roles.get("up") and roles["up"].free_side, next(iter(roles.values())).rank
            shapes[(*sizes, roles.get("down") and roles["down"].free_side)] = None
        projections = dict.fromkeys((layer.attention, layer.projection or _end(layer)) for layer in members)
        records.append(
            {
                "block": block,
                "layers": len(members),
                "projections": [" ".join(filter(None, names)) for names in projections],
                "shapes": [list(shape) for shape in shapes],
            }
        )
    return records


def _end(layer: Layer) -> str:
    """Return the end of a module's name behind the last number, such as ``img_mod_lin``."""
    return re.split(r"_[0-9]+_", layer.module)[-1]


def costs_of(settings: Settings, choice: Choice, workers: int) -> dict:
    """Return what each representation that can run takes, about, and why the others are not run."""
    speed = Speed.measure(settings.device)
    steps = {"reading weights": choice.costs.reading(), "ranking": choice.costs.ranking()}
    steps |= {name: choice.costs.of(name) for name in choice.chosen}
    seconds = {name: estimate.seconds(speed, workers) for name, estimate in steps.items()}
    return {
        "estimates": [
            {"step": name, "memory": estimate.memory, "seconds": round(seconds[name], 3)}
            for name, estimate in steps.items()
        ],
        "seconds": round(forecast.total_seconds(choice.costs, choice.chosen, speed, workers), 3),
        "workers": workers,
        "not_run": choice.not_run,
        "left_out": choice.left_out,
    }


# ----------------------------------------------------------------------------------------------------------------------
# As lines
# ----------------------------------------------------------------------------------------------------------------------


def content_lines(path: str, contents: dict, everything: bool = False) -> list[str]:
    """Return what `contents_of` says of a folder; ``everything``: each layer and class."""
    count, kept = len(contents["layers"]), len(contents["layers_selected"])
    selected = f", {kept} of them chosen by --layers" if kept < count else ""
    lines = [
        f"{plain(path)}: {contents['num_samples']} LoRAs of {count} layers{selected}; labels from "
        f"{contents['label_source']}",
        *_class_lines(contents["classes"], everything),
        *_group_line(contents),
        *_column_lines(contents),
        "ranks:   " + _ranks(contents["ranks"]),
        "dtypes:  " + _listed(contents["dtypes"]),
        "scales:  " + _scales(contents["scales"]),
        "numbers: " + _numbers(contents),
        "ignored: " + _listed(contents["ignored"]),
        *skipped_lines(contents["skipped"]),
    ]
    if contents["products"]:
        products = _counted(contents["products"], "module")
        lines.append(
            f"{products} of LoHa or LoKr: read as pairs of a larger rank, each factor shown under the name of one of "
            "the tensors that it is made of"
        )
    return lines + (_layer_lines(contents) if everything else _block_lines(contents["blocks"]))


def _class_lines(classes: dict[str, int], everything: bool) -> list[str]:
    classes = {quoted(label): count for label, count in classes.items()}
    if everything or len(classes) <= MAX_CLASSES:
        return _wrapped("classes:", [f"{label} ({count})" for label, count in classes.items()])
    sizes = sorted(set(classes.values()))
    first, last = (", ".join(names) for names in (list(classes)[:MAX_ENDS], list(classes)[-1:]))
    if len(sizes) == 1:
        return [f"classes: {len(classes)} of {_counted(sizes[0], 'LoRA')} each: {first}, ..., {last} (all: --all)"]
    ranked = sorted(classes.items(), key=lambda entry: entry[1])
    smallest, largest = ranked[:MAX_ENDS], ranked[: -MAX_ENDS - 1 : -1]
    return [
        f"classes: {len(classes)} of {sizes[0]} to {sizes[-1]} LoRAs: {first}, ..., {last} (all: --all)",
        f"{'':9}the smallest: {_listed(dict(smallest))}; the largest: {_listed(dict(largest))}",
    ]


def _group_line(contents: dict) -> list[str]:
    if contents["num_groups"] is None:
        return []
    return [f"groups:  {contents['num_groups']} by {contents['group_column'] or 'LoRA, with its checkpoints'}"]


def _column_lines(contents: dict) -> list[str]:
    """Return the columns with their numbers of values, and those that could be labels or groups."""
    columns, groups = contents["columns"], contents["group_columns"]
    if not columns and not groups:
        return ["columns: none"]
    entries = [f"{plain(name)} ({count})" for name, count in columns.items()]
    lines = _wrapped("columns:", _first(entries, 3 * MAX_LISTED), end=" (number of values)")
    for flag, could_be, names in (
        ("--label-column", "would make classes", contents["label_columns"]),
        ("--group-column", "looks like a group", list(groups)),
    ):
        if names:
            shown = _first([plain(name) for name in names], MAX_LISTED)
            lines += _wrapped("", [f"{could_be} ({flag}): {shown[0]}", *shown[1:]])
    return lines


def _ranks(records: list[dict]) -> str:
    def rank(ranks: list[int]) -> str:
        return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]} within a LoRA"

    entries = [f"{rank(record['ranks'])} ({_counted(record['files'], 'LoRA')})" for record in records]
    return ", ".join(_first(entries, MAX_LISTED))


def _scales(records: list[dict]) -> str:
    shown = [
        f"{'not readable' if record['scale'] is None else format(record['scale'], 'g')} ({record['source']}, "
        f"{_counted(record['modules'], 'module')} of {_counted(record['files'], 'LoRA')})"
        for record in records
    ]
    return ", ".join(_first(shown, MAX_LISTED))


def _numbers(contents: dict) -> str:
    weights = contents["weights"]
    each = f"{weights['least']:,}" + (f" to {weights['most']:,}" if weights["most"] > weights["least"] else "")
    return f"{each} a LoRA, {weights['total']:,} in all ({sized(4 * weights['total'])} as float32)"


def _block_lines(blocks: list[dict]) -> list[str]:
    """Return a line for each block."""
    rows = [("block", "layers", "out x rank x in", "projections")]
    for record in blocks:
        shapes = ["x".join("-" if side is None else str(side) for side in shape) for shape in record["shapes"]]
        projections = ", ".join(_first(_by_attention(record["projections"]), MAX_LISTED))
        rows.append((record["block"] or "none", str(record["layers"]), ", ".join(_first(shapes, 4)), projections))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{block:<{widths[0]}}  {layers:>{widths[1]}}  {shapes:<{widths[2]}}  {projections}"
        for block, layers, shapes, projections in rows
    ]
    if any(not record["block"] for record in blocks) and len(blocks) > 1:
        lines.append("none: in no block of the network, or in one of an unknown name")
    return lines


def _by_attention(projections: list[str]) -> list[str]:
    """Return projections as "attn1 q k v": those of one attention behind its name."""
    shown: dict[str, list[str]] = {}
    for name in projections:
        attention, _, rest = name.partition(" ")
        if "attn" in attention.lower() and rest:
            shown.setdefault(attention, [attention]).append(rest.replace(" ", "-"))
        else:
            shown[name] = [name]
    return [" ".join(names) for names in shown.values()]


def _layer_lines(contents: dict) -> list[str]:
    layers = {depth: contents["layers"][depth] for depth in contents["layers_selected"]}
    width = max(len(layer["name"]) for layer in layers.values())
    lines = ["ranks differ between LoRAs: the shapes are those of the first file"] if contents["mixed_ranks"] else []
    lines.append(f"{'depth':>5}  {'role':4}  {'shape':>12}  {'layer':{width}}  module")
    for depth, layer in layers.items():
        shape = "x".join(map(str, layer["shape"]))
        lines.append(f"{depth:5}  {layer['role']:4}  {shape:>12}  {layer['name']:{width}}  {layer['module']}")
    return lines


def cost_lines(costs: dict) -> list[str]:
    """Return what `costs_of` says."""
    workers = _counted(costs["workers"], "worker")
    total = f"{duration(max(1, costs['seconds']))} on this machine ({workers}), controls and further splits among them"
    width = max(len(entry["step"]) for entry in costs["estimates"])
    lines = [f"takes:   {total}", f"{'':9}{'step':<{width}}  {'memory':>10}  time"]
    for entry in costs["estimates"]:
        lines.append(f"{'':9}{entry['step']:<{width}}  {sized(entry['memory']):>10}  {duration(entry['seconds'])}")
    for reasons, kind in ((costs["not_run"], "not run"), (costs["left_out"], "not run unless named")):
        by_reason = defaultdict(list)
        for name, reason in reasons.items():
            by_reason[reason].append(name)
        lines += [f"{kind}: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return lines


def skipped_lines(skipped: list[dict[str, str]]) -> list[str]:
    """Return a line for each file left out."""
    return [f"skipped: {entry['path']}: {entry['reason']}" for entry in skipped]


def left_line(class_counts: dict[str, int]) -> str:
    """Return the numbers of what is left where files were left out for their weights."""
    classes = {label: class_counts[label] for label in in_order(class_counts)}
    shown = _first([f"{label} ({count})" for label, count in classes.items()], MAX_CLASSES)
    return f"left:    {_counted(sum(class_counts.values()), 'LoRA')}; classes: {', '.join(shown)}"


def notice_lines(notices: list[dict]) -> list[str]:
    """Return a line for each notice."""
    return [f"note: {plain(notice['message'])}" for notice in notices]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "nothing"


def _first(entries: list[str], count: int) -> list[str]:
    """Return the first entries, and how many more there are."""
    return entries if len(entries) <= count else [*entries[:count], f"and {len(entries) - count} more"]


def _wrapped(word: str, entries: list[str], end: str = "") -> list[str]:
    """Return entries behind a word, in lines that break between them."""
    lines, line = [], ""
    for entry in [f"{entry}," for entry in entries[:-1]] + [f"{entries[-1]}{end}"]:
        if line and len(line) + 1 + len(entry) > WIDTH - 9:
            lines.append(line)
            line = ""
        line += f" {entry}" if line else entry
    return textwrap.indent("\n".join([*lines, line]), " " * 9).replace(" " * 9, f"{word:<9}", 1).splitlines()


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
