"""The figures of layers: how well each predicts alone, and which concepts it recognises; figures.py has their rows.

Shape letters: L layers in the network's order, C classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

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
    map_legend,
    mark_blocks,
    place,
    set_height,
    width_of,
    write_numbers,
)
from report.names import full_names, short_names
from report.wording import bounds, correlation_text, percent

MOST_INTERVALS = 100  # layers of a network that have an interval each: of more the top ones have, the others a band
FEW = 20  # layers that know something, up to which these have an interval each in any network
NAMED_MODULES = 40  # below the axis, at most
NAME = 1.6  # inches of a layer's name at most
MOST_LISTED = 24  # names below the figure, where there is no room beside the marks
LEGEND_ROW = 0.15  # inches

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
    roles, names = list(dict.fromkeys(record["role"] for record in records)), _names_below(results)
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
    _finish(figure, axes, results, sorted(top, key=lambda record: rank_of[record["layer"]]))


def _finish(figure: Figure, axes: Sequence[Axes], results: dict, top: Sequence[dict]) -> None:
    """Write the names of the top layers beside their marks; where one has no room ranks, and names in the legend."""
    names = results.get("names_shown") or full_names(results["analysis"])
    labels = cut_labels([names[record["module"]] for record in top], NAME, SMALL)
    labels = [f"{rank}: {label}" for rank, label in enumerate(labels, 1)]
    ranks, entries = [str(rank) for rank in range(1, len(top) + 1)], _layer_legend(results)
    roles = list(dict.fromkeys(record["role"] for record in results["analysis"]["layers"]["records"]))
    for beside in (True, False):
        listed = [] if beside else [Line2D([], [], ls="none", label=label) for label in labels[:MOST_LISTED]]
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * math.ceil(len(listed) / 3))
        legend = figure.legend(handles=[*entries, *listed], loc="outside lower center", ncols=3)
        figure.get_layout_engine().execute(figure)
        written = []
        for ax, role in zip(axes, roles, strict=True):
            members = [i for i, record in enumerate(top) if record["role"] == role]
            marks = [(top[i]["depth"], 100 * top[i]["accuracy"]) for i in members]
            texts = [(labels if beside else ranks)[i] for i in members]
            written += place(ax, [*marks, *_drawn(results, role)], texts, SMALL, beside=True, gap=0.1)
        if len(written) == len(top):
            return
        if beside:
            legend.remove()
            for text in [text for ax in axes for text in ax.texts]:
                text.remove()


def _drawn(results: dict, role: str) -> Iterator[tuple[float, float]]:
    """Yield the points that no name may cover: marks, and along the intervals that are drawn."""
    records = [record for record in results["analysis"]["layers"]["records"] if record["role"] == role]
    for record, single in zip(records, _has_interval(results, records), strict=True):
        yield record["depth"], 100 * record["accuracy"]
        for bound in np.linspace(*record["interval"], 12) if single else ():
            yield record["depth"], 100 * float(bound)


def _names_below(results: dict) -> dict[float, str]:
    """Return names of modules within their blocks by the middle of their layers; none of blocks, or of many modules."""
    depths = defaultdict(list)
    for record in results["analysis"]["layers"]["records"]:
        depths[record["module"]].append(record["depth"])
    if "num_layers_shown" in results or len(depths) > NAMED_MODULES:
        return {}
    short = short_names(results["analysis"])
    labels = cut_labels([short[module] for module in depths], 0.9, SMALL)
    return {sum(of_module) / len(of_module): label for of_module, label in zip(depths.values(), labels, strict=True)}


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
    looks = {"size": size, "marker": MARKERS.get(role, "o"), "width": float(np.clip(60 / len(records), 0.5, 1))}
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
    limit = f"needed among {total}: {percent(section['needed'])} %"
    if section["needed"] > 1:
        limit = f"needed among {total}: more than 100 %"
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
    high, low = int(np.nanargmax(best)), int(np.nanargmin(best))
    if best[high] == best[low]:
        return f"The best single layer for each concept recognises {percent(best[high])} % of it"
    names = cut_labels([section["classes"][c] for c in (high, low)], 1.8, SIZE)
    return (
        f"Single layers recognise {names[0]} best (up to {percent(best[high])} % of it) "
        f"and {names[1]} worst (up to {percent(best[low])} %)"
    )


def concept_layer_map(results: dict, figure: Figure) -> None:
    """Draw recall of each concept from each layer alone, and by the best representation; of many concepts both ends."""
    analysis = results["analysis"]
    section, records = analysis["concepts"], analysis["layers"]["records"]
    recall = 100 * np.array(section["recall"], float).T  # (C, L)
    clusters = (analysis.get("layer_information") or {}).get("concept_clusters")
    cluster = np.array(clusters["of_class"] if clusters else np.zeros(len(recall)))
    rows = Rows.of(recall.max(1), np.lexsort((-recall.mean(1), cluster)))  # by the best layer, as the finding is
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
        low, high = (recall.max(1)[list(rows.others)].min(), recall.max(1)[list(rows.others)].max())
        axes[0].set_ylabel(f"best and worst by their best layer; others' best {bounds((low / 100, high / 100))} %")
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
    noun = "blocks by depth, means of layers" if "num_layers_shown" in results else "layers by depth"
    ax.set_xlabel(f"{noun} (▲ top {len(top)})")


def _recall_with_all_layers(ax: Axes, results: dict, rows: Rows, looks: dict, height: float) -> None:
    """Draw recall by the best representation, with all layers and without the top k."""
    analysis = results["analysis"]
    section, best = analysis["concepts"], analysis["representations"]["conditions"]["baseline"]["best"]
    whole, drop = (100 * np.array(section[key][best], float) for key in ("baseline", "drop"))
    both = rows.values(np.stack([whole, whole - drop], axis=1))
    ax.imshow(both, **looks, interpolation="nearest")
    write_numbers(ax, both, looks["vmax"], height, 0.4)
    ax.set_xticks([0, 1], ["all", f"no top {results['config']['top_k']}"], fontsize=SMALL)
    ax.set_title(cut(best, 0.85, SMALL), fontsize=SMALL)
