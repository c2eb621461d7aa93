"""The figures of attention over modules and of the collection in the plane; figures.py holds their rows in its table.

Shape letters: P modules in the network's order, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from report.drawing import (
    BLUE,
    FAINT,
    GROUND,
    INK,
    ORANGE,
    SIZE,
    SMALL,
    WIDTH,
    cut,
    cut_labels,
    mark_blocks,
    place,
    set_height,
    write_numbers,
)
from report.wording import bounds, number, percent, signed

NAMED_POINTS = 12  # concepts that are named in a plane at most
# Concept i has shape i % 11 and filling i % 5, which no two of 55 share: each also differs without colour.
SHAPES = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*", "d")
FILLINGS = (INK, GROUND, ORANGE, BLUE, FAINT)
MARKS = len(SHAPES) * len(FILLINGS)
LEGEND_ROW = 0.14  # inches


# ----------------------------------------------------------------------------------------------------------------------
# Attention over modules
# ----------------------------------------------------------------------------------------------------------------------


def attention_finding(results: dict) -> str:
    """Return how many modules the attention is on, which has most, and what masking in its order costs."""
    section = results["analysis"]["attention"]
    modules, effective = section["modules"], section["effective_number"]
    first = max(modules, key=lambda record: record["attention"])
    if len(modules) == 1:
        return f"All attention is on the only module, {cut(first['module'], 3)}"
    around = f" ({bounds(effective['interval'], number)})" if effective["interval"] else ""
    finding = (
        f"Attention is on {number(effective['number'])}{around} of {len(modules)} modules, most on "
        f"{cut(first['module'], 2.5)} ({percent(first['attention'])} %)"
    )
    compared = section["deletion"]["against_random"]
    if not compared:
        return finding
    cost = "costs more than" if compared["hurts_more"] else "does not clearly cost more than"
    return f"{finding}; masking in its order {cost} at random ({signed(compared['difference'])} points)"


def attention(results: dict, figure: Figure) -> None:
    """Draw the attention of each module as bars, above what it adds to the own class of the LoRAs of each class."""
    analysis = results["analysis"]
    section, modules = analysis["attention"], analysis["attention"]["modules"]
    classes = [record for record in section["classes"] if record["contribution"]]
    added = np.array([record["contribution"] for record in classes])  # (C, P)
    order = np.lexsort((-added.max(1), added.argmax(1)))  # concepts of the same module stand together
    height, width = min(0.24, 9 / len(classes)), WIDTH - 1.9  # of a row and of the axes, in inches
    set_height(figure, 2.15 + height * len(classes))
    bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, height * len(classes)])
    _attention_bars(bars, modules)
    mark_blocks(bars, [record["block"] for record in modules], width)
    largest = max(float(added.max()), 1e-9)
    image = cells.imshow(added[order], cmap="YlGnBu", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    write_numbers(cells, added[order], largest, height, width / len(modules), digits=1)
    mark_blocks(cells, [record["block"] for record in modules], width, named=False)
    top = set(results["top_layers"])
    of_top = {record["module"] for record in analysis["layers"]["records"] if record["layer"] in top}
    marked = [x for x, record in enumerate(modules) if record["module"] in of_top]
    if marked:
        cells.plot(marked, np.full(len(marked), len(classes) - 0.5), "^", color=INK, ms=4, clip_on=False)
    step, size = math.ceil(0.1 / height), min(SIZE, 55 * height)
    labels = cut_labels([classes[c]["class"] for c in order], 1.4, size)
    cells.set_yticks(range(0, len(order), step), labels[::step], fontsize=size)
    cells.tick_params(length=0)
    cells.set_xticks([])
    cells.set_xlabel(f"modules by depth (▲ modules of the top {len(top)})")
    figure.legend(handles=_attention_legend(modules, image), loc="outside lower center", ncols=4)


def _attention_bars(ax: Axes, modules: Sequence[dict]) -> None:
    """Draw attention by module with its intervals, filled where it is above that of permuted labels."""
    positions = np.arange(len(modules))
    share = 100 * np.array([record["attention"] for record in modules])
    above = np.array([record["above_permuted"] is not False for record in modules])
    edge = {"ec": INK, "lw": min(0.5, 20 / len(modules))}
    ax.bar(positions[above], share[above], 0.8, fc=BLUE, **edge)
    ax.bar(positions[~above], share[~above], 0.8, fc=GROUND, **edge)
    known = [x for x in positions if modules[x]["interval"]]
    highest = share.max()
    if known:
        low, high = 100 * np.array([modules[x]["interval"] for x in known]).T
        ax.vlines(known, low, high, color=INK, lw=float(np.clip(60 / len(modules), 0.3, 1)))
        highest = max(highest, min(high.max(), 2 * highest))  # those of few runs reach far: they are cut off
    ax.axhline(100 / len(modules), color=INK, lw=0.8, ls=(0, (4, 2)))
    ax.set_ylim(0, 1.08 * highest)
    ax.set_ylabel("attention, %,\n95 % interval")
    ax.tick_params(axis="x", length=0)


def _attention_legend(modules: Sequence[dict], image: AxesImage) -> list:
    """Return what bars and colours mean."""
    decided = any(record["above_permuted"] is not None for record in modules)
    filled = "above the largest of permuted labels" if decided else "attention"
    bars = [Patch(fc=BLUE, ec=INK, lw=0.5, label=filled)]
    if decided:
        bars.append(Patch(fc=GROUND, ec=INK, lw=0.5, label="not above it"))
    bars.append(Line2D([], [], color=INK, lw=0.8, ls=(0, (4, 2)), label="all modules alike"))
    steps = np.linspace(0, image.norm.vmax, 4)
    cells = [Patch(fc=image.cmap(image.norm(step)), ec=INK, lw=0.5, label=f"{step:.2g}") for step in steps]
    cells[0].set_label("0 or less")
    cells[-1].set_label(f"{steps[-1]:.2g} added, logits")
    return [*bars, *cells]


# ----------------------------------------------------------------------------------------------------------------------
# The collection in the plane
# ----------------------------------------------------------------------------------------------------------------------


def collection_map_finding(results: dict) -> str:
    """Return how many test LoRAs lie nearest to their own concept by all layers, and by the best module alone."""
    whole, *alone = results["analysis"]["collection_map"]["panels"]
    section = whole["separates"]
    finding = (
        f"In the plane of {_subject(whole, 2.5)} {percent(section['accuracy'])} % of the test LoRAs lie nearest to the "
        f"mean of their concept (guessing {percent(section['chance'])} %)"
    )
    if not alone:
        return finding
    best = max(alone, key=lambda panel: panel["separates"]["accuracy"])
    return f"{finding}, in that of {_subject(best, 2.5)} {percent(best['separates']['accuracy'])} %"


def _subject(panel: dict, inches: float) -> str:
    return "all layers" if panel["layers"] == "all" else f"{cut(panel['layers'], inches)} alone"


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
    for ax, panel in zip(axes, panels, strict=False):
        _plane(ax, section, panel)
    names = cut_labels(classes[:entries], WIDTH / across - 0.45, SMALL)
    looks = {"ls": "none", "ms": 4.5, "mec": INK, "mew": 0.6}
    handles = [Line2D([], [], marker=_shape(c), mfc=_filling(c), **looks, label=name) for c, name in enumerate(names)]
    if len(classes) > MARKS:
        handles.append(Line2D([], [], ls="none", label=f"marks repeat for {len(classes) - MARKS} others"))
    faint = {"marker": "o", "ls": "none", "mfc": INK, "mec": INK, "ms": 3, "mew": 0.2, "alpha": 0.3}
    handles.append(Line2D([], [], **faint, label="faint: train LoRAs"))
    figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=SMALL, handletextpad=0.3)
    figure.get_layout_engine().execute(figure)
    for ax, panel in zip(axes, panels, strict=False):
        _name_distinct(ax, section, panel)


def _shape(label: int) -> str:
    return SHAPES[label % len(SHAPES)]


def _filling(label: int) -> str:
    return FILLINGS[label % len(FILLINGS)]


def _plane(ax: Axes, section: dict, panel: dict) -> None:
    """Draw the LoRAs of a panel, those of each class in its mark."""
    points, labels = np.array(panel["points"], float).reshape(-1, 2), np.array(section["labels"])
    tested = np.array(section["parts"]) == "test"
    size = float(np.clip(40 / math.sqrt(max(1, tested.sum())), 2.6, 5))
    for label in np.unique(labels).tolist():
        mark = {"ls": "none", "marker": _shape(label), "mfc": _filling(label), "mec": INK}
        train, test = points[(labels == label) & ~tested], points[(labels == label) & tested]
        ax.plot(*train.T, **mark, ms=0.6 * size, mew=0.2, alpha=0.3, zorder=1)
        ax.plot(*test.T, **mark, ms=size, mew=0.5, zorder=2)
    separates = panel["separates"]
    x, y = (percent(share) for share in panel["explained"])
    reached = f"{percent(separates['accuracy'])} % ({bounds(separates['interval'])}) nearest to their own mean"
    first = _subject(panel, 2.2)
    ax.set_title(f"{first}\n{reached}", fontsize=SMALL + 0.5)
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
