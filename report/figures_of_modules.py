"""The figures of clusters of layers, attention over modules and the collection; figures.py has their rows in its table.

Shape letters: P modules in the network's order, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from report.drawing import (
    BLUE,
    GROUND,
    INK,
    MARKERS,
    ORANGE,
    SIZE,
    SMALL,
    SOFT,
    WIDTH,
    cut,
    cut_labels,
    draw_kinds,
    draw_tree,
    kinds_of,
    map_legend,
    mark_blocks,
    place,
    set_height,
    width_of,
    write_numbers,
)
from report.modules import full_names, is_settled, short_names
from report.wording import bounds, counted, number, percent, signed

NAMED_MODULES = 40  # under the bars, at most: of more the highest are numbered
NUMBERED = 5
ARROW = {"ls": "none", "marker": "^", "mfc": GROUND, "mec": INK, "ms": 4, "mew": 0.6}  # of an interval that is cut
FEW = 5  # test LoRAs of a concept, below which its contributions are marked
LEAST_SHOWN = 0.1  # of the largest contribution, below which cells have no number
NAMED_POINTS = 12  # concepts that are named in a plane at most
# Concept i has shape i % 11 and filling i % 5, which no two of 55 share: each also differs without colour.
SHAPES = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*", "d")
FILLINGS = (  # colour, filled half or all, and colour of the other half
    (INK, "full", GROUND),
    (GROUND, "full", GROUND),
    (ORANGE, "full", GROUND),
    (BLUE, "left", GROUND),
    (INK, "bottom", GROUND),
)
MARKS = len(SHAPES) * len(FILLINGS)
LEGEND_ROW = 0.14  # inches
CLUSTERS = 12  # of layers that have a row, the largest


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
    """Draw the tree of the layers by the distance of their features, above what and where they are."""
    if "num_layers_shown" in results:
        _clusters_of_blocks(results, figure)
        return
    records = results["analysis"]["layers"]["records"]
    clusters = results["analysis"]["layer_information"]["clusters"]
    ordered = [records[layer] for layer in clusters["order"]]
    kinds = kinds_of(ordered)
    set_height(figure, 4.1 + 0.13 * len(kinds))
    tree, rows, depth = figure.subplots(3, 1, sharex=True, height_ratios=[2.0, 0.13 * len(kinds) + 0.05, 1.0])
    draw_tree(tree, clusters["linkage"], clusters["order"], clusters["threshold"])
    tree.set_ylabel("distance, 1 - CKA")
    tree.set_title("bold: links within a cluster; dashed: the distance at which clusters are cut")
    draw_kinds(rows, kinds)
    _depths(depth, ordered, set(results["top_layers"]))
    legend = figure.legend(*depth.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for handle in legend.legend_handles:
        handle.set_markersize(5)


def _depths(ax: Axes, ordered: Sequence[dict], top: set[str]) -> None:
    """Draw the depth of each layer, the top layers in rings."""
    size = float(np.clip(250 / len(ordered), 1.5, 4.5))
    depth = np.array([record["depth"] for record in ordered])
    roles = np.array([record["role"] for record in ordered])
    for role in dict.fromkeys(roles[np.argsort(depth)].tolist()):
        positions, color = np.flatnonzero(roles == role), {"down": GROUND, "up": BLUE}.get(role, ORANGE)
        looks = {"color": color, "mec": INK, "mew": 0.5, "ms": size, "label": role}
        ax.plot(positions, depth[positions], MARKERS.get(role, "o"), **looks)
    ringed = np.flatnonzero([record["layer"] in top for record in ordered])
    ring = {"color": "none", "mec": INK, "mew": 1, "ms": size + 4, "label": f"top {len(top)}"}
    ax.plot(ringed, depth[ringed], "o", **ring)
    ax.set_ylabel("depth")
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    ax.set_xlim(-0.5 - 0.01 * len(ordered), 1.01 * len(ordered) - 0.5)
    ax.set_xticks([])
    ax.set_xlabel(f"{len(ordered)} layers, similar ones side by side")
    ax.margins(y=0.12)


def _clusters_of_blocks(results: dict, figure: Figure) -> None:
    """Draw which share of the layers of each block is in each cluster of similar features, the largest clusters."""
    blocks, section = results["blocks_shown"], results["analysis"]["layer_information"]["clusters"]
    cluster_of = np.array(section["of_layer"])
    sizes = np.bincount(cluster_of)
    largest = np.argsort(-sizes, kind="stable")[: min(CLUSTERS, section["count"])]
    members = [cluster_of[list(block.members)] for block in blocks]
    shares = np.array([[100 * (of_block == cluster).mean() for of_block in members] for cluster in largest])
    labels = [f"{cluster}: {counted(int(sizes[cluster]), 'layer')}" for cluster in largest.tolist()]
    if section["count"] > len(largest):
        shares = np.vstack([shares, 100 - shares.sum(0)])
        labels.append(f"{section['count'] - len(largest)} others")
    set_height(figure, 1.1 + 0.24 * len(shares))
    ax = figure.subplots()
    image = ax.imshow(shares, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    write_numbers(ax, shares, 100, 0.24, (WIDTH - 1.7) / len(blocks))
    mark_blocks(ax, [block.name for block in blocks], WIDTH - 1.7)
    ax.set_yticks(range(len(labels)), labels, fontsize=SMALL)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.set_ylabel("cluster")
    ax.set_xlabel("blocks by depth")
    figure.legend(handles=map_legend(image, "of the block's layers"), loc="outside lower center", ncols=6)


# ----------------------------------------------------------------------------------------------------------------------
# Attention over modules
# ----------------------------------------------------------------------------------------------------------------------


def attention_finding(results: dict) -> str | None:
    """Return how many modules the attention is on, which has most, and what masking costs; None for one module."""
    analysis, section = results["analysis"], results["analysis"]["attention"]
    modules, effective = section["modules"], section["effective_number"]
    if len(modules) == 1:
        return None
    first = modules[_highest(modules)[0]]
    around = f" ({effective['min']:.1f} to {effective['max']:.1f} over runs)" if section["runs"] > 1 else ""
    most = "but which has most is not settled"
    if is_settled(section, 1):
        name = full_names(analysis)[first["module"]]
        most = f"most on {cut(name, 2.5)} ({percent(first['attention'])} %)"
    finding = (
        f"Attention is spread over an effective number of {effective['number']:.1f}{around} of {len(modules)} modules, "
        f"{most}"
    )
    compared = section["deletion"]["against_random"]
    if not compared or compared["hurts_more"] is None:
        return finding
    cost = "costs more than" if compared["hurts_more"] else "does not cost significantly more than"
    return f"{finding}; masking in its order {cost} in random ones ({signed(compared['difference'])} points)"


def attention(results: dict, figure: Figure) -> None:
    """Draw the attention of each module as bars, above what it adds to the own class of the LoRAs of each class."""
    analysis = results["analysis"]
    section, modules = analysis["attention"], analysis["attention"]["modules"]
    classes = [record for record in section["classes"] if record["contribution"]]
    added = np.array([record["contribution"] for record in classes])  # (C, P)
    classes = [classes[c] for c in np.lexsort((-added.max(1), added.argmax(1)))]  # of the same module together
    names = []
    if len(modules) <= NAMED_MODULES:
        short = short_names(analysis)
        names = [cut(short[record["module"]], 0.9, SMALL) for record in modules]
    room = max((width_of(name, SMALL) for name in names), default=0.0)
    height = min(max(0.24, 0.7 / len(classes)), 9 / len(classes))  # of a row, in inches
    width = WIDTH - 1.9  # of the axes
    entries = _attention_entries(section)
    if not names:
        entries += _numbered(analysis)
    set_height(figure, 2.3 + 0.16 * math.ceil((len(entries) + 7) / 3) + room + height * len(classes))
    bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, height * len(classes)])
    _attention_bars(bars, modules)
    blocks = [record["block"] for record in modules]
    _head_blocks(bars, blocks, width)
    image = _contributions(cells, classes, section["runs"], height, width)
    mark_blocks(cells, blocks, width, named=False)
    top = set(results["top_layers"])
    of_top = {record["module"] for record in analysis["layers"]["records"] if record["layer"] in top}
    marked = [x for x, record in enumerate(modules) if record["module"] in of_top]
    if marked:
        cells.plot(marked, np.full(len(marked), len(classes) - 0.5), "^", color=INK, ms=4, clip_on=False)
    cells.set_xticks(range(len(names)), names, rotation=90, fontsize=SMALL)
    cells.tick_params(axis="x", length=0, pad=5)
    noun = "blocks" if "num_layers_shown" in results else "modules"
    cells.set_xlabel(f"{noun} by depth (▲ {noun} of the top {len(top)})")
    figure.legend(
        handles=[*entries, *_contribution_entries(classes, image)], loc="outside lower center", ncols=3, fontsize=SMALL
    )
    if not names:
        figure.get_layout_engine().execute(figure)
        points = [(x, 100 * modules[x]["attention"]) for x in _highest(modules)]
        place(bars, points, [str(i + 1) for i in range(len(points))], SMALL, beside=False)


def _head_blocks(ax: Axes, blocks: Sequence[str | None], inches: float) -> None:
    """Mark blocks with their whole names above axes of so many inches, if all fit, else with numbers in short."""
    runs = [(block, len(list(members))) for block, members in groupby(blocks)]
    column = inches / len(blocks)
    fit = all(not block or width_of(block, SMALL) + 0.06 <= column * count for block, count in runs)
    mark_blocks(ax, blocks, inches, named=not fit)
    if not fit:
        return
    ends = np.cumsum([count for _, count in runs])
    heads = [(end - (count + 1) / 2, block) for end, (block, count) in zip(ends, runs, strict=True) if block]
    top = ax.secondary_xaxis("top")
    top.set_xticks([x for x, _ in heads], [block for _, block in heads], fontsize=SMALL, color=SOFT)
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)


def _highest(modules: Sequence[dict]) -> list[int]:
    """Return positions of the modules with the most attention."""
    return sorted(range(len(modules)), key=lambda x: -modules[x]["attention"])[:NUMBERED]


def _limit(modules: Sequence[dict]) -> float:
    """Return the upper end of the axis of attention, in percent: intervals of few runs reach far, and are cut there."""
    share = max(record["attention"] for record in modules)
    high = max((record["interval"][1] for record in modules if record["interval"]), default=0.0)
    return 108 * max(share, min(high, 2 * share), 1e-6)


def _attention_bars(ax: Axes, modules: Sequence[dict]) -> None:
    """Draw attention by module with its intervals, filled where it is above that of permuted labels in every run."""
    positions = np.arange(len(modules))
    share = 100 * np.array([record["attention"] for record in modules])
    above = np.array([record["above_permuted"] is True for record in modules])
    edge = {"ec": INK, "lw": min(0.5, 20 / len(modules))}
    ax.bar(positions[above], share[above], 0.8, fc=BLUE, **edge)
    ax.bar(positions[~above], share[~above], 0.8, fc=GROUND, **edge)
    known, limit = [x for x in positions if modules[x]["interval"]], _limit(modules)
    if known:
        low, high = 100 * np.array([modules[x]["interval"] for x in known]).T
        ax.vlines(known, low, high, color=INK, lw=float(np.clip(60 / len(modules), 0.3, 1)))
        beyond = np.array(known)[high > limit]
        if len(beyond):  # an empty line that is not clipped takes room at the figure's corner
            ax.plot(beyond, np.full(len(beyond), limit), **ARROW, clip_on=False)
    if "even" in modules[0]:  # of blocks, which are of several modules
        ax.step(positions, [100 * record["even"] for record in modules], where="mid", color=INK, lw=0.8, ls=(0, (4, 2)))
    else:
        ax.axhline(100 / len(modules), color=INK, lw=0.8, ls=(0, (4, 2)))
    ax.set_ylim(0, limit)
    ax.set_ylabel("attention, %,\n95 % interval")
    ax.tick_params(axis="x", length=0, labelbottom=False)


def _contributions(ax: Axes, classes: Sequence[dict], runs: int, height: float, width: float) -> AxesImage:
    """Draw what each module adds to each class, mean of so many runs, in rows and columns of so many inches."""
    added = np.array([record["contribution"] for record in classes])  # (C, P)
    largest = max(float(added.max()), 1e-9)
    image = ax.imshow(added, cmap="YlGnBu", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    column = width / added.shape[1]
    digits = int(np.clip(1 - math.floor(math.log10(largest)), 0, 3))
    shown = np.where(added < LEAST_SHOWN * largest, np.nan, added)
    write_numbers(ax, shown, largest, height, column, digits)
    step, size = math.ceil(0.1 / height), min(SIZE, 55 * height)
    labels = cut_labels([record["class"] for record in classes], 1.4, size)
    labels = [f"{'* ' if record['loras'] < FEW else ''}{label}" for label, record in zip(labels, classes, strict=True)]
    ax.set_yticks(range(0, len(classes), step), labels[::step], fontsize=size)
    ax.tick_params(length=0)
    ax.set_ylabel("concept\n(rows by their\nstrongest module)", fontsize=SMALL)
    means = f"means of {counted(runs, 'run')}; intervals are in results.json"
    ax.set_title(f"Contribution: added to the score (logit) of the own class, less the mean over classes\n({means})")
    return image


def _attention_entries(section: dict) -> list:
    """Return what bars and their lines mean."""
    modules = section["modules"]
    decided = any(record["above_permuted"] is not None for record in modules)
    above = f"above permuted labels{' in every run' if section['runs'] > 1 else ''}"
    above = f"a module {above}" if "even" in modules[0] else above
    entries = [Patch(fc=GROUND, ec=INK, lw=0.5, label="not above these" if decided else "attention")]
    if decided:
        entries.insert(0, Patch(fc=BLUE, ec=INK, lw=0.5, label=above))
    entries.append(Line2D([], [], color=INK, lw=0.8, ls=(0, (4, 2)), label="evenly"))
    if any(record["interval"] and 100 * record["interval"][1] > _limit(modules) for record in modules):
        entries.append(Line2D([], [], **ARROW, label="the interval reaches further"))
    return entries


def _numbered(analysis: dict) -> list[Line2D]:
    """Return the names of the highest bars, which are numbered where there is no room for the names of all."""
    names, modules = full_names(analysis), analysis["attention"]["modules"]
    highest = [names[modules[x]["module"]] for x in _highest(modules)]
    labels = [f"{i}: {cut(name, 1.7, SMALL)}" for i, name in enumerate(highest, 1)]
    return [Line2D([], [], ls="none", label=label) for label in labels]


def _contribution_entries(classes: Sequence[dict], image: AxesImage) -> list:
    """Return what colours of the cells mean."""
    steps = np.linspace(0, image.norm.vmax, 4)
    cells = [Patch(fc=image.cmap(image.norm(step)), ec=INK, lw=0.5, label=f"{step:.2g}") for step in steps]
    cells[0].set_label("adds 0 or less")
    cells[-1].set_label(f"{steps[-1]:.2g} added")
    if any(record["loras"] < FEW for record in classes):
        cells.append(Line2D([], [], ls="none", label=f"* fewer than {FEW} test LoRAs"))
    return cells


# ----------------------------------------------------------------------------------------------------------------------
# The collection in the plane
# ----------------------------------------------------------------------------------------------------------------------


def collection_map_finding(results: dict) -> str:
    """Return how many test LoRAs lie nearest to their own concept in the first plane, that of all layers."""
    whole = results["analysis"]["collection_map"]["panels"][0]
    section = whole["separates"]
    subject, reached = _subject(whole, full_names(results["analysis"]), 2.5), percent(section["accuracy"])
    finding = (
        f"In the plane of {subject} {reached} % of the test LoRAs lie nearest to the mean of the train LoRAs of their "
        f"own concept (guessing {percent(section['chance'])} %)"
    )
    return finding if section["above_null"] else f"{finding}, indistinguishable from chance"


def _subject(panel: dict, names: dict[str, str], inches: float) -> str:
    """Return what a panel is of: all layers, or the name of a module."""
    if panel["layers"] == "all":
        return "all layers"
    return f"{cut(names.get(panel['layers'], panel['layers']), inches)} alone"


def collection_map(results: dict, figure: Figure) -> None:
    """Draw the LoRAs in the plane of each kernel, train LoRAs faint."""
    section = results["analysis"]["collection_map"]
    classes, panels = section["classes"], section["panels"]
    columns = min(2, len(panels))
    rows, entries = math.ceil(len(panels) / columns), min(len(classes), MARKS)
    across = min(5, max(2, entries))
    set_height(figure, 0.5 + 2.7 * rows + LEGEND_ROW * math.ceil((entries + 2) / across))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    names_of_modules = full_names(results["analysis"])
    for ax, panel in zip(axes, panels, strict=False):
        _plane(ax, section, panel, names_of_modules)
    names = cut_labels(classes[:entries], WIDTH / across - 0.45, SMALL)
    looks = {"ls": "none", "ms": 4.5, "mew": 0.6}
    handles = [Line2D([], [], **_mark(c), **looks, label=name) for c, name in enumerate(names)]
    if len(classes) > MARKS:
        handles.append(Line2D([], [], ls="none", label=f"marks repeat for {len(classes) - MARKS} others"))
    faint = {"marker": "o", "ls": "none", "mfc": INK, "mec": INK, "ms": 3, "mew": 0.2, "alpha": 0.3}
    handles.append(Line2D([], [], **faint, label="faint: train LoRAs"))
    figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=SMALL, handletextpad=0.3)
    figure.get_layout_engine().execute(figure)
    for ax, panel in zip(axes, panels, strict=False):
        _name_distinct(ax, section, panel)


def _mark(label: int) -> dict:
    """Return shape and filling of a concept's points."""
    color, half, other = FILLINGS[label % len(FILLINGS)]
    shape = SHAPES[label % len(SHAPES)]
    return {"marker": shape, "mfc": color, "fillstyle": half, "markerfacecoloralt": other, "mec": INK}


def _plane(ax: Axes, section: dict, panel: dict, names: dict[str, str]) -> None:
    """Draw the LoRAs of a panel, those of each class in its mark, under the name of its module."""
    points, labels = np.array(panel["points"], float).reshape(-1, 2), np.array(section["labels"])
    tested = np.array(section["parts"]) == "test"
    size = float(np.clip(40 / math.sqrt(max(1, tested.sum())), 2.6, 5))
    for label in np.unique(labels).tolist():
        mark = {"ls": "none", **_mark(label)}
        train, test = points[(labels == label) & ~tested], points[(labels == label) & tested]
        ax.plot(*train.T, **mark, ms=0.6 * size, mew=0.2, alpha=0.3, zorder=1)
        ax.plot(*test.T, **mark, ms=size, mew=0.5, zorder=2)
    separates = panel["separates"]
    x, y = (percent(share) for share in panel["explained"])
    reached = f"{percent(separates['accuracy'])} % ({bounds(separates['interval'])}) nearest to their own mean"
    first = _subject(panel, names, 2.2 if separates["above_null"] else 1.6)
    known = "" if separates["above_null"] else ": indistinguishable from chance"
    ax.set_title(f"{first}{known}\n{reached}", fontsize=SMALL + 0.5)
    ax.set_xlabel(f"component 1, {x} % of the variance", fontsize=SMALL)
    ax.set_ylabel(f"component 2, {y} %", fontsize=SMALL)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.margins(0.06)


def _name_distinct(ax: Axes, section: dict, panel: dict) -> None:
    """Write the names of concepts that stand apart from all others at the mean of their test LoRAs, where room is."""
    points, labels = np.array(panel["points"], float).reshape(-1, 2), np.array(section["labels"])
    tested = np.array(section["parts"]) == "test"
    means, names = [], []
    for name in panel["separates"]["distinct"][:NAMED_POINTS]:
        members = tested & (labels == section["classes"].index(name))
        if members.any():
            means.append(points[members].mean(0))
            names.append(cut(name, 0.8, SMALL))
    if means:
        place(ax, [*means, *points[tested]], names, SMALL, beside=True)
