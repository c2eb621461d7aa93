"""The figures of layers: how well each predicts alone, which concepts it recognises, and how alike they are.

Shape letters: L layers in the network's order, C classes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from report.by_block import blocks_of
from report.by_class import Rows
from report.drawing import (
    BLUE,
    FAINT,
    GROUND,
    INK,
    MARKERS,
    ON_CELLS,
    PALE,
    SIZE,
    SMALL,
    WIDTH,
    cut,
    cut_labels,
    head_blocks,
    in_lines,
    in_one_column,
    map_legend,
    mark_blocks,
    place,
    set_height,
    width_of,
    write_numbers,
)
from report.names import full_names, layer_names, short_names
from report.wording import bounds, correlation_text, counted, number, percent

MOST_INTERVALS = 100  # layers of a network that have an interval each: of more the top ones have, the others a band
FEW = 20  # layers that know something, up to which these have an interval each in any network
NAMED_MODULES = 40  # below the axis, at most
NAME = 1.6  # inches of a layer's name at most
MOST_BESIDE = 10  # top layers whose names stand beside their marks, where all have room
MOST_LISTED = 24  # names below the axis else
LINE = 0.15  # inches of a line of these
NO_BREAK = "\u00a0"
CLUSTERS = 8  # that are described, the largest
SIMILARITIES = 6  # in the legend
MOST_LINES = 120  # between blocks of a matrix
SIDE = 5.2  # inches of a matrix with the names beside it

# ----------------------------------------------------------------------------------------------------------------------
# The accuracy of each layer
# ----------------------------------------------------------------------------------------------------------------------


def layer_importance_finding(results: dict) -> str:
    """Return how many layers predict, and whether one of the two factors does better."""
    section = results["analysis"]["layers"]
    known, above, total = section["num_above_null"], section["num_above_chance"], len(section["records"])
    finding = f"{above or 'None'} of {total} layers {'predict' if above > 1 else 'predicts'} above chance"
    if known > above:
        verb = "knows" if known == 1 else "know"
        finding = (
            f"{known} of {total} layers {verb} something of the concept, {above or 'none'} more than guessing does"
        )
    roles = sorted(section["groups"]["role"].items(), key=lambda item: -item[1]["mean"])
    if len(roles) != 2:
        return finding
    (high, first), (low, second) = roles
    reached = f"{percent(first['mean'])} and {percent(second['mean'])} %"
    compared = f"{high} factors reach more than {low} ({reached})"
    if not section["better_role"]:
        compared = f"{high} and {low} factors reach {reached} on average"
    return f"{finding}; {compared}"


def layer_importance(results: dict, figure: Figure) -> None:
    """Draw accuracies by depth, a panel for each factor; of blocks their means, and each layer of the top k."""
    section = results["analysis"]["layers"]
    records, rank_of = section["records"], {name: rank for rank, name in enumerate(results["top_layers"], 1)}
    top = results.get("top_shown") or [record for record in records if record["layer"] in rank_of]
    roles, names = (
        list(dict.fromkeys(record["role"] for record in records)),
        _names_below(results, figure.get_figwidth()),
    )
    room = max((width_of(name, SMALL) for name in names.values()), default=0.0)
    set_height(figure, 1.3 + 1.8 * len(roles) + room)
    axes = figure.subplots(len(roles), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    highest = max(min(1, section["needed"]), *(record["interval"][1] for record in (*records, *top)))
    axes[0].set_ylim(0, 125 * highest + 2)  # room for names above the intervals
    last = max(record["depth"] for record in records)
    axes[0].set_xlim(-0.7 - 0.01 * last, 0.7 + 1.01 * last)
    blocks = list({record["depth"]: record["block"] for record in records}.values())
    for ax, role in zip(axes, roles, strict=True):
        mark_blocks(ax, blocks, WIDTH - 0.7, named=False)
        _layers_of_role(ax, results, role, [record for record in top if record["role"] == role])
    head_blocks(axes[0], blocks, WIDTH - 0.7)
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if tick <= min(100, axes[0].get_ylim()[1])])
    _name_axis(axes[-1], results, names)
    figure.legend(handles=_layer_legend(results), loc="outside lower center", ncols=3)
    _name_top(figure, axes, results, sorted(top, key=lambda record: rank_of[record["layer"]]))


def _name_top(figure: Figure, axes: Sequence[Axes], results: dict, top: Sequence[dict]) -> None:
    """Write the names of the top layers beside their marks; where one has no room ranks above, and names below."""
    names = results.get("names_shown") or full_names(results["analysis"])
    labels = _cut_alike([names[record["module"]] for record in top], NAME)
    labels = [f"{rank}: {label}" for rank, label in enumerate(labels, 1)]
    if len(labels) <= MOST_BESIDE and _written(figure, axes, results, top, labels) == len(top):
        return
    for text in [text for ax in axes for text in ax.texts]:
        text.remove()
    more = [f"and {len(labels) - MOST_LISTED} more"] if len(labels) > MOST_LISTED else []
    listed = [f"{label} ({record['role']})" for label, record in zip(labels, top, strict=True)]
    whole = [label.replace(" ", NO_BREAK) for label in listed[:MOST_LISTED]]  # a name stays on its line
    lines = in_lines("top: " + ", ".join([*whole, *more]), figure.get_figwidth() - 1, SIZE).replace(NO_BREAK, " ")
    axes[-1].set_xlabel(f"{axes[-1].get_xlabel()}\n{lines}")
    figure.set_figheight(figure.get_figheight() + LINE * (1 + lines.count("\n")))
    ranks = [str(rank) for rank in range(1, len(top) + 1)]
    _written(figure, axes, results, top, ranks, above="num_layers_shown" not in results)


def _written(
    figure: Figure,
    axes: Sequence[Axes],
    results: dict,
    top: Sequence[dict],
    texts: Sequence[str],
    above: bool = False,
) -> int:
    """Lay the figure out, write texts beside the marks of the top layers, and return for how many there is room.

    Or ``above`` their intervals.
    """
    figure.get_layout_engine().execute(figure)
    roles, count = list(dict.fromkeys(record["role"] for record in results["analysis"]["layers"]["records"])), 0
    for ax, role in zip(axes, roles, strict=True):
        members = [i for i, record in enumerate(top) if record["role"] == role]
        marks = [(top[i]["depth"], 100 * (top[i]["interval"][1] if above else top[i]["accuracy"])) for i in members]
        points = [*marks, *_drawn(results, role)]
        count += len(place(ax, points, [texts[i] for i in members], SMALL, beside=not above, gap=0.1))
    return count


def _drawn(results: dict, role: str) -> Iterator[tuple[float, float]]:
    """Yield the points that no name may cover: marks, and along the intervals that are drawn."""
    records = [record for record in results["analysis"]["layers"]["records"] if record["role"] == role]
    for record, single in zip(records, _has_interval(results, records), strict=True):
        yield record["depth"], 100 * record["accuracy"]
        for bound in np.linspace(*record["interval"], 12) if single else ():
            yield record["depth"], 100 * float(bound)


def _names_below(results: dict, width: float) -> dict[float, str]:
    """Return names of modules within their blocks by the middle of their layers; none of blocks, or where many are.

    ``width`` is that of the figure, in inches.
    """
    depths = defaultdict(list)
    for record in results["analysis"]["layers"]["records"]:
        depths[record["module"]].append(record["depth"])
    if "num_layers_shown" in results or len(depths) > NAMED_MODULES * width / WIDTH:
        return {}
    short = short_names(results["analysis"])
    labels = _cut_alike([short[module] for module in depths], 0.9)
    return {sum(of_module) / len(of_module): label for of_module, label in zip(depths.values(), labels, strict=True)}


def _cut_alike(names: Sequence[str], inches: float) -> list[str]:
    """Return names cut to a width, the same ones alike."""
    different = list(dict.fromkeys(names))
    label_of = dict(zip(different, cut_labels(different, inches, SMALL), strict=True))
    return [label_of[name] for name in names]


def _name_axis(ax: Axes, results: dict, names: dict[float, str]) -> None:
    """Write names of modules below the axis, or else what the blocks above it are of, or numbers where there are none.

    In the network's order the correlation of accuracy with depth is told.
    """
    depth, records = results["analysis"]["layers"]["depth"], results["analysis"]["layers"]["records"]
    correlation = f"; Spearman correlation of blocks with depth {correlation_text(depth)}" if not depth["why"] else ""
    shown = results.get("blocks_shown")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    noun = "blocks" if shown else "layers"
    if names:
        ax.set_xticks(list(names), list(names.values()), rotation=90, fontsize=SMALL)
        noun = "modules"
    elif all(record["block"] for record in records):
        ax.set_xticks([])
    elif shown:
        ticks = [int(tick) for tick in ax.get_xticks() if 0 <= tick < len(shown)]
        ax.set_xticks(ticks, [shown[tick].members[0] for tick in ticks])
        noun = "blocks, by the position of their first layer"
    else:
        noun = "layers, by their position"
    ax.set_xlabel(f"{noun} in the network's order{correlation}")


def _has_interval(results: dict, records: Sequence[dict]) -> np.ndarray:
    """Return which layers of a network have an interval each."""
    section, top = results["analysis"]["layers"], set(results["top_layers"])
    every = "num_layers_shown" in results or len(section["records"]) <= MOST_INTERVALS
    known = section["num_above_null"] <= FEW
    return np.array([every or record["layer"] in top or (known and record["above_null"]) for record in records])


def _layers_of_role(ax: Axes, results: dict, role: str, top: Sequence[dict]) -> None:
    """Draw accuracies of the layers of a factor by depth, those of the top in rings, over that of permuted labels."""
    section = results["analysis"]["layers"]
    records = [record for record in section["records"] if record["role"] == role]
    low, high = (100 * bound for bound in section["null_band"])
    ax.axhspan(low, high, fc=PALE, ec=FAINT, hatch="////", lw=0, zorder=0.5)
    ax.axhline(100 * section["chance"], color=INK, lw=0.8)
    ax.axhline(100 * section["needed"], color=INK, lw=0.8, ls=(0, (4, 2)))
    single = _has_interval(results, records)
    if not single.all():
        ax.fill_between(*_band(section, role), color=BLUE, alpha=0.25, lw=0, zorder=1)
    size = float(np.clip(5.5 - len(section["records"]) / 120, 2.2, 5))
    looks = {
        "size": size,
        "marker": MARKERS.get(role, "o"),
        "width": float(np.clip(60 / max(1, single.sum()), 0.5, 1.2)),
    }
    _points(ax, [record for record, alone in zip(records, single, strict=True) if not alone], looks, intervals=False)
    _points(ax, [record for record, alone in zip(records, single, strict=True) if alone], looks, intervals=True)
    if "num_layers_shown" in results:
        _points(ax, top, looks, intervals=False)
    rings = np.array([(record["depth"], 100 * record["accuracy"]) for record in top]).reshape(-1, 2)
    ax.plot(*rings.T, "o", color="none", mec=INK, mew=1, ms=size + 4.5)
    group = section["groups"]["role"][role]
    ax.set_title(f"{role} factors: mean {percent(group['mean'])} % ({bounds(group['interval'])})")
    ax.set_ylabel("accuracy, %")


def _points(ax: Axes, records: Sequence[dict], looks: dict, intervals: bool) -> None:
    """Draw accuracies by depth, filled where something is known, and their intervals."""
    depth, accuracy = np.array([(record["depth"], 100 * record["accuracy"]) for record in records]).reshape(-1, 2).T
    above = np.array([record["above_null"] for record in records], bool)
    if intervals:
        ends = 100 * np.array([record["interval"] for record in records]).reshape(-1, 2)
        ax.vlines(depth, *ends.T, color=BLUE, lw=looks["width"], alpha=0.75)
    marks = {"marker": looks["marker"], "ls": "none", "ms": looks["size"], "mec": INK}
    ax.plot(depth[above], accuracy[above], color=BLUE, mew=0.4, **marks)
    ax.plot(depth[~above], accuracy[~above], color=GROUND, mew=0.6, **marks)


def _band(section: dict, role: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return steps over the layers of each block, from the lowest to the highest bound of those of a factor, in %."""
    records = section["records"]
    ends = 100 * np.array([record["interval"] for record in records])
    ends[[record["role"] != role for record in records]] = np.nan
    low, high = np.full(len(records), np.nan), np.full(len(records), np.nan)
    for block in blocks_of([record["block"] for record in records], len(records)):
        members = list(block.members)
        if not np.isnan(ends[members]).all():
            low[members], high[members] = np.nanmin(ends[members]), np.nanmax(ends[members])
    depth = np.array([record["depth"] for record in records], float)
    return np.stack([depth - 0.5, depth + 0.5], axis=1).ravel(), np.repeat(low, 2), np.repeat(high, 2)


def _layer_legend(results: dict) -> list:
    """Return what marks mean."""
    section, layers, top_k = results["analysis"]["layers"], results.get("num_layers_shown"), len(results["top_layers"])
    above, total = section["num_above_null"], layers or len(section["records"])
    known, unknown = f"knows something ({above})", f"not distinguishable from chance ({total - above})"
    if layers:
        known, unknown = "mean of a block that has a layer which knows something", "mean of another block"
    limit = f"needed among {total}: more than {percent(min(1, section['needed']))} %"
    marker = {"marker": "^", "ls": "none", "mec": INK, "ms": 5}
    return [
        Line2D([], [], color=BLUE, **marker, label=known),
        Line2D([], [], color=GROUND, **marker, label=unknown),
        *_interval_entries(results),
        Line2D([], [], ls="none", marker="o", color="none", mec=INK, ms=9, label=f"top {top_k}, by rank"),
        Line2D([], [], color=INK, lw=0.8, label=f"chance, {percent(section['chance'])} %"),
        Patch(fc=PALE, ec=FAINT, hatch="////", lw=0, label="95 % of permuted labels"),
        Line2D([], [], color=INK, lw=0.8, ls=(0, (4, 2)), label=limit),
    ]


def _interval_entries(results: dict) -> Iterator[Line2D | Patch]:
    """Yield what bars and bands mean."""
    records = results["analysis"]["layers"]["records"]
    if "num_layers_shown" in results:
        yield Line2D([], [], color=BLUE, lw=1, label="lowest to highest layer of the block")
        return
    yield Line2D([], [], color=BLUE, lw=1, label="95 % interval")
    if not _has_interval(results, records).all():
        yield Patch(fc=BLUE, alpha=0.25, lw=0, label="from the lowest to the highest interval of a block")


# ----------------------------------------------------------------------------------------------------------------------
# Concepts by layer
# ----------------------------------------------------------------------------------------------------------------------


def concept_layer_map_finding(results: dict) -> str | None:
    """Return which concept single layers recognise best, and which worst; None without a test LoRA."""
    section = results["analysis"]["concepts"]
    best = np.array(section["recall"], float).max(0)  # (C,), NaN of a concept without a test LoRA
    if np.isnan(best).all():
        return None
    known = results["analysis"]["layers"]["num_above_null"]
    at_chance = "" if known else ", though none is distinguishable from chance"
    high, low = int(np.nanargmax(best)), int(np.nanargmin(best))
    if best[high] == best[low]:
        return f"The best single layer for each concept recognises {percent(best[high])} % of it{at_chance}"
    ends = []
    for c in (high, low):
        (name,), alike = cut_labels([section["classes"][c]], 1.8, SIZE), int((best == best[c]).sum())
        ends.append(f'"{name}"' if alike == 1 else f"{alike} concepts")
    return (
        f"Single layers recognise {ends[0]} best (up to {percent(best[high])} %) "
        f"and {ends[1]} worst (up to {percent(best[low])} %){at_chance}"
    )


def concept_layer_map(results: dict, figure: Figure) -> None:
    """Draw recall of each concept from each layer alone, and by the best representation; of many concepts both ends."""
    analysis = results["analysis"]
    section, records = analysis["concepts"], analysis["layers"]["records"]
    recall = 100 * np.array(section["recall"], float).T  # (C, L)
    clusters = (analysis.get("layer_information") or {}).get("concept_clusters")
    cluster = np.array(clusters["of_class"] if clusters else np.zeros(len(recall)))
    best = 100 * np.array(section["best_layer"]) if "best_layer" in section else recall.max(1)  # as the finding is
    rows = Rows.of(best, np.lexsort((-recall.mean(1), cluster)))
    height = 0.24 if len(rows) < 30 else 0.2  # of a row, in inches
    set_height(figure, 1.05 + height * len(rows))
    roles: dict[str, list[int]] = {}
    for layer, record in enumerate(records):
        roles.setdefault(record["role"], []).append(layer)
    widths = [4.7 * len(members) / len(records) for members in roles.values()]
    compared = analysis.get("representations")
    compared = compared and compared["conditions"]["baseline"]["best"]
    if compared:
        widths.append(0.9)
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    shown = rows.values(recall)
    looks = {"cmap": "YlGnBu", "vmin": 0, "vmax": max(20, 20 * math.ceil(shown.max() / 20)), "aspect": "auto"}
    for ax, (role, members), width in zip(axes, roles.items(), widths, strict=False):
        _recall_by_layer(ax, results, members, shown[:, members], looks, (height, width))
        ax.set_title(f"{role} factors")
    if compared:
        _recall_with_all_layers(axes[-1], results, rows, looks, height)
    edges = rows.edges or np.flatnonzero(np.diff(cluster[rows.named])) + 0.5
    for ax in axes:
        ax.hlines(edges, *ax.get_xlim(), color=ON_CELLS[0], lw=0.8)
        ax.tick_params(length=0)
    labels = rows.labels(cut_labels([section["classes"][c] for c in rows.named], 1.4, SIZE))
    axes[0].set_yticks(range(len(labels)), labels, fontsize=SIZE)
    if rows.others:
        others = best[list(rows.others)] / 100
        around = bounds((others.min(), others.max()))
        axes[0].set_ylabel(f"best and worst by their best layer; others' best {around} %")
    figure.legend(handles=map_legend(axes[0].images[0], "recall"), loc="outside lower center", ncols=6)


def _recall_by_layer(
    ax: Axes, results: dict, members: Sequence[int], recall: np.ndarray, looks: dict, size: tuple[float, float]
) -> None:
    """Draw recall of concepts from single layers, float[C, members], in rows and axes of this height and width."""
    height, width = size
    records = [results["analysis"]["layers"]["records"][layer] for layer in members]
    ax.imshow(recall, **looks, interpolation="nearest")
    write_numbers(ax, recall, looks["vmax"], height, width / len(members))
    head_blocks(ax, [record["block"] for record in records], width)
    top = set(results["top_layers"])
    marked = [x for x, record in enumerate(records) if record["layer"] in top]
    if marked:
        ax.plot(marked, np.full(len(marked), len(recall) - 0.5), "^", color=INK, ms=4, clip_on=False)
    ax.set_xticks([])
    noun = "means of blocks" if "num_layers_shown" in results else "layers in order"
    ax.set_xlabel(f"{noun} (▲ top {len(top)})")


def _recall_with_all_layers(ax: Axes, results: dict, rows: Rows, looks: dict, height: float) -> None:
    """Draw recall by the best representation, with all layers and without the top k."""
    analysis = results["analysis"]
    section, best = analysis["concepts"], analysis["representations"]["conditions"]["baseline"]["best"]
    whole, drop = (100 * np.array(section[key][best], float) for key in ("baseline", "drop"))
    both = rows.values(np.stack([whole, whole - drop], axis=1))
    ax.imshow(both, **looks, interpolation="nearest")
    write_numbers(ax, both, looks["vmax"], height, 0.4)
    turned = 90 if in_one_column(ax.get_figure()) else 0
    ax.set_xticks([0, 1], ["all", f"no top {results['config']['top_k']}"], fontsize=SMALL, rotation=turned)
    ax.set_title(cut(best, 0.85 * ax.get_figure().get_figwidth() / WIDTH, SMALL), fontsize=SMALL)


# ----------------------------------------------------------------------------------------------------------------------
# Clusters of layers
# ----------------------------------------------------------------------------------------------------------------------


def layer_clusters_finding(results: dict) -> str | None:
    """Return how many clusters the layers form, and what the top ones know together; None for a single layer."""
    section = results["analysis"]["layer_information"]
    clusters, union, k = section["clusters"], section["union"], len(section["kappa"]["top_k"])
    if not clusters["linkage"]:
        return None
    total, below = len(clusters["order"]), f"(linear CKA of at least {number(1 - clusters['threshold'])})"
    finding = f"{total} layers form {counted(clusters['count'], 'cluster')} of similar features {below}"
    if clusters["count"] == total:
        finding = f"No two of {total} layers have similar features {below}"
    if k < 2:
        return finding
    crossed = results["analysis"].get("cross_fitted") or {"union": None}
    known = f"{percent(union['any_of_top_k'])} % of LoRAs, the first alone on {percent(union['best_alone'])} %"
    if crossed["union"]:  # where the layers are not chosen by the LoRAs that they are measured on
        known = (
            f"{percent(crossed['union']['accuracy'])} % of LoRAs (on shuffled labels "
            f"{percent(crossed['union']['by_chance'])} %), the first alone on {percent(crossed['first']['accuracy'])} %"
        )
    chosen = "where other test LoRAs choose, " if crossed["union"] else ""
    return f"{finding}; {chosen}at least one of the top {k} is right on {known}"


def layer_clusters(results: dict, figure: Figure) -> None:
    """Draw how similar every two layers are, by factor and then in the network's order, beside the largest clusters.

    Of blocks means are shown. The similarity is that of the tree (average linkage): of all layers that are first joined
    where the two are, and so at least ``1 - threshold`` in the same cluster, and only there.
    """
    records = results["analysis"]["layers"]["records"]
    roles = list(dict.fromkeys(record["role"] for record in records))
    order = sorted(range(len(records)), key=lambda i: roles.index(records[i]["role"]))
    shown = _similarity(results)[np.ix_(order, order)]
    ordered = [records[i] for i in order]
    narrow = in_one_column(figure)  # which has room for the matrix alone
    names = [] if narrow else _rows_of_layers(results, ordered)
    side = figure.get_figwidth() - 0.3 if narrow else SIDE - max((width_of(name, SMALL) for name in names), default=0.0)
    set_height(figure, side + 0.7)
    if narrow:
        ax = figure.subplots()
    else:
        ax, beside = figure.subplots(1, 2, width_ratios=[side, WIDTH - SIDE - 0.2])
        _write_clusters(beside, results)
    image = ax.imshow(shown, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    edges = np.flatnonzero([a["role"] != b["role"] for a, b in pairwise(ordered)]) + 0.5
    _mark_factors(ax, ordered, edges, side * WIDTH / figure.get_figwidth())
    if names:
        ax.set_yticks(range(len(names)), names, fontsize=SMALL, rotation=0)
    top = set(results["top_layers"])
    marked = [i for i, record in enumerate(ordered) if record["layer"] in top]
    ax.plot(marked, np.full(len(marked), len(ordered) - 0.5), "^", color=INK, ms=4, clip_on=False)
    noun = "blocks" if "num_layers_shown" in results else "layers"
    ax.set_xlabel(
        f"{noun} in the network's order (▲ {'with a layer of the ' if noun == 'blocks' else ''}top {len(top)})"
    )
    steps = [
        Patch(fc=image.cmap(step), ec=INK, lw=0.5, label=f"{step:.1f}") for step in np.linspace(0, 1, SIMILARITIES)
    ]
    steps[-1].set_label("1.0 similarity (CKA, by average linkage)")
    figure.legend(handles=steps, loc="outside lower center", ncols=SIMILARITIES)


def _similarity(results: dict) -> np.ndarray:
    """Return the similarity of every two layers by the tree, or its means over the layers of blocks, float64[., .]."""
    clusters = results["analysis"]["layer_information"]["clusters"]
    similar = 1 - squareform(hierarchy.cophenet(np.array(clusters["linkage"], float)))
    groups = results.get("members_shown")
    if not groups:
        return similar
    inside = np.zeros((len(groups), len(similar)))
    for row, members in zip(inside, groups, strict=True):
        row[members] = 1
    sums, count = inside @ similar @ inside.T, inside.sum(1)
    pairs = np.outer(count, count)
    alone = np.diag_indices(len(groups))  # of a block with itself: every two of its layers
    several = count > 1
    sums[alone] = np.where(several, sums[alone] - count, 1)
    pairs[alone] = np.where(several, count * (count - 1), 1)
    return sums / pairs


def _rows_of_layers(results: dict, ordered: Sequence[dict]) -> list[str]:
    """Return the names of few layers, and none of many."""
    if len(ordered) > NAMED_MODULES or "num_layers_shown" in results:
        return []
    names = layer_names(results["analysis"])
    return cut_labels([names[record["layer"]] for record in ordered], 1.5, SMALL)


def _mark_factors(ax: Axes, ordered: Sequence[dict], edges: np.ndarray, side: float) -> None:
    """Draw lines between the blocks, in both directions, and between the factors, and name these."""
    blocks = [record["block"] for record in ordered]
    places = [(record["role"], record["block"]) for record in ordered]
    lines = np.flatnonzero([a != b for a, b in pairwise(places)]) + 0.5
    if len(lines) <= MOST_LINES:
        ax.vlines(lines, -0.5, len(ordered) - 0.5, color=GROUND, lw=0.4)
        ax.hlines(lines, -0.5, len(ordered) - 0.5, color=GROUND, lw=0.4)
    for color, width in ((GROUND, 2.5), (INK, 1)):  # to be seen on any cell
        ax.vlines(edges, -0.5, len(ordered) - 0.5, color=color, lw=width)
        ax.hlines(edges, -0.5, len(ordered) - 0.5, color=color, lw=width)
    head_blocks(ax, blocks, side, lines=False)
    ends = [-0.5, *edges, len(ordered) - 0.5]
    middles = [(low + high) / 2 for low, high in pairwise(ends)]
    ax.set_xticks([])
    ax.set_yticks(middles, [f"{ordered[int(middle)]['role']} factors" for middle in middles], rotation=90, va="center")
    ax.tick_params(length=0)


def _write_clusters(ax: Axes, results: dict) -> None:
    """Write the largest clusters, with the factors and projections that most of their layers are."""
    clusters = results["analysis"]["layer_information"]["clusters"]
    cluster_of = np.array(clusters["of_layer"])
    sizes = np.bincount(cluster_of)
    largest = [int(cluster) for cluster in np.argsort(-sizes, kind="stable") if sizes[cluster] > 1][:CLUSTERS]
    lines = [f"a cluster: similarity of at least {1 - clusters['threshold']:g}"]
    records = results.get("records_of_layers") or results["analysis"]["layers"]["records"]
    for cluster in largest:
        members = [records[layer] for layer in np.flatnonzero(cluster_of == cluster)]
        shares = []
        for field in ("role", "projection", "block"):
            common, times = Counter(record[field] for record in members).most_common(1)[0]
            if common and 2 * times > len(members):
                share = "all" if times == len(members) else f"{100 * times / len(members):.0f} %"
                shares.append(f"{share} {cut(common, 0.6, SMALL)}")
        lines += [counted(len(members), "layer"), f"  {', '.join(shares) or 'of any kind'}"]
    alone = int((sizes == 1).sum())
    if left := clusters["count"] - len(largest) - alone:
        lines.append(counted(left, "more cluster"))
    if alone:
        lines.append(f"{counted(alone, 'layer')} in none" if largest else "no two layers are in one")
    ax.text(0, 1, "\n".join(lines), va="top", transform=ax.transAxes, fontsize=SMALL, linespacing=1.25)
    ax.set_axis_off()
