"""The figures of attention over modules and of the collection; figures.py has their rows in its table.

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
from scipy.spatial.distance import cdist

from report.by_class import Rows
from report.drawing import (
    BLUE,
    GREY,
    GROUND,
    INK,
    ON_CELLS,
    ORANGE,
    SIZE,
    SMALL,
    WIDTH,
    cut,
    cut_labels,
    head_blocks,
    mark_blocks,
    place,
    set_height,
    width_of,
    write_numbers,
)
from report.modules import is_settled
from report.names import full_names, short_names
from report.wording import bounds, counted, percent, signed

NAMED_MODULES = 40  # under the bars, at most: of more the highest are numbered
NUMBERED = 5
ARROW = {"ls": "none", "marker": "^", "mfc": GROUND, "mec": INK, "ms": 4, "mew": 0.6}  # of an interval that is cut
FEW = 5  # test LoRAs of a concept, below which its contributions are marked
LEAST_ADDED = 1e-9  # logits, below which nothing is
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
MARKED = 30  # classes that have a mark each
ENDS = "first the concepts of which most test LoRAs lie nearest to their own mean in the first plane, last the fewest"
OTHER = {"marker": ".", "mfc": GREY, "mec": GREY}  # of the others
LEGEND_ROW = 0.14  # inches


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
    rows = _rows_of_classes(section["classes"])
    added = np.array([record["contribution"] or [np.nan] * len(modules) for record in section["classes"]])
    added = rows.values(added)  # (rows, P)
    names = []
    if len(modules) <= NAMED_MODULES * figure.get_figwidth() / WIDTH:
        short = short_names(analysis)
        names = [cut(short[record["module"]], 0.9, SMALL) for record in modules]
    room = max((width_of(name, SMALL) for name in names), default=0.0)
    height = max(0.24 if len(rows) < 30 else 0.2, 0.7 / len(rows))  # of a row, in inches
    width = WIDTH - 1.9  # of the axes
    entries = _attention_entries(section)
    if not names:
        entries += _numbered(analysis)
    set_height(figure, 2.3 + 0.16 * math.ceil((len(entries) + 7) / 3) + room + height * len(rows))
    bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, height * len(rows)])
    _attention_bars(bars, modules)
    blocks = [record["block"] for record in modules]
    head_blocks(bars, blocks, width)
    image = _contributions(cells, section, rows, added, height, width)
    mark_blocks(cells, blocks, width, named=False)
    top = set(results["top_layers"])
    of_top = {record["module"] for record in analysis["layers"]["records"] if record["layer"] in top}
    marked = [x for x, record in enumerate(modules) if record["module"] in of_top]
    if marked:
        cells.plot(marked, np.full(len(marked), len(rows) - 0.5), "^", color=INK, ms=4, clip_on=False)
    cells.set_xticks(range(len(names)), names, rotation=90, fontsize=SMALL)
    cells.tick_params(axis="x", length=0, pad=5)
    noun = "blocks" if "num_layers_shown" in results else "modules"
    cells.set_xlabel(f"{noun} in order (▲ of the top {len(top)})")
    figure.legend(
        handles=[*entries, *_contribution_entries(section, rows, image)],
        loc="outside lower center",
        ncols=3,
        fontsize=SMALL,
    )
    if not names:
        figure.get_layout_engine().execute(figure)
        points = [(x, 100 * modules[x]["attention"]) for x in _highest(modules)]
        lines = [
            (x, 100 * end)
            for x, record in enumerate(modules)
            for end in np.linspace(*(record["interval"] or (0, 0)), 12).tolist()
        ]
        texts = [str(i + 1) for i in range(len(points))]
        place(bars, [*points, *lines], texts, SMALL, beside=True)


def _rows_of_classes(classes: Sequence[dict]) -> Rows:
    """Return the rows of classes: those of the same module together; of many both ends of what is added to them."""
    most = [max(record["contribution"]) if record["contribution"] else math.nan for record in classes]
    strongest = [int(np.argmax(record["contribution"])) if record["contribution"] else 0 for record in classes]
    return Rows.of(most, np.lexsort((-np.array(most), strongest)))


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


def _contributions(ax: Axes, section: dict, rows: Rows, added: np.ndarray, height: float, width: float) -> AxesImage:
    """Draw what each module adds to each class, float[rows, P], in rows of this height and axes of this width."""
    largest = max(float(added.max()), LEAST_ADDED)
    image = ax.imshow(added, cmap="YlGnBu", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    column = width / added.shape[1]
    digits = int(np.clip(1 - math.floor(math.log10(largest)), 0, 3))
    shown = np.where(added < LEAST_SHOWN * largest, np.nan, added)
    write_numbers(ax, shown, largest, height, column, digits)
    classes = [section["classes"][c] for c in rows.named]
    labels = cut_labels([record["class"] for record in classes], _room(ax), SIZE)
    labels = [f"{'* ' if record['loras'] < FEW else ''}{label}" for label, record in zip(labels, classes, strict=True)]
    ax.set_yticks(range(len(rows)), rows.labels(labels), fontsize=SIZE)
    ax.hlines(rows.edges, *ax.get_xlim(), color=ON_CELLS[0], lw=0.8)
    ax.tick_params(length=0)
    noun = "block" if "even" in section["modules"][0] else "module"
    by = f"first and last by\ntheir strongest {noun}" if rows.others else f"rows by their\nstrongest {noun}"
    ax.set_ylabel(f"concept\n({by})", fontsize=SMALL)
    means = f"means of {counted(section['runs'], 'run')}; intervals are in results.json"
    ax.set_title(f"Contribution: added to the score (logit) of the own class, less the mean over classes\n({means})")
    return image


def _room(ax: Axes) -> float:
    """Return the inches that names of concepts have beside axes: fewer in a figure of one column."""
    return max(0.9, 1.4 * ax.get_figure().get_figwidth() / WIDTH)


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


def _contribution_entries(section: dict, rows: Rows, image: AxesImage) -> list:
    """Return what colours of the cells mean."""
    most = image.norm.vmax
    steps = np.linspace(0, most, 4) if most > LEAST_ADDED else [0]
    cells = [Patch(fc=image.cmap(image.norm(step)), ec=INK, lw=0.5, label=f"{step:.2g}") for step in steps]
    cells[-1].set_label(f"{most:.2g} added")
    cells[0].set_label("adds 0 or less")
    if any(section["classes"][c]["loras"] < FEW for c in rows.named):
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
    panels = section["panels"]
    columns = min(2, len(panels))
    rows, marked = math.ceil(len(panels) / columns), _marked(section)
    across = min(5, max(2, len(marked)))
    set_height(
        figure,
        0.5
        + 2.7 * rows
        + LEGEND_ROW * (math.ceil((len(marked) + 2) / across) + (len(marked) < len(section["classes"]))),
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    names_of_modules = full_names(results["analysis"])
    for ax, panel in zip(axes, panels, strict=False):
        _plane(ax, section, panel, names_of_modules, marked)
    handles = _plane_entries(section, marked, across)
    figure.legend(
        handles=handles,
        title=ENDS if len(marked) < len(section["classes"]) else None,
        loc="outside lower center",
        ncols=across,
        fontsize=SMALL,
        title_fontsize=SMALL,
        handletextpad=0.3,
    )
    figure.get_layout_engine().execute(figure)
    for ax, panel in zip(axes, panels, strict=False):
        _name_distinct(ax, section, panel)


def _marked(section: dict) -> list[int]:
    """Return the classes that have a mark of their own: all, or those at both ends.

    The ends of the share of their test LoRAs that lie nearest to the mean of their own train LoRAs in the first plane.
    """
    labels, tested = np.array(section["labels"]), np.array(section["parts"]) == "test"
    if len(section["classes"]) <= MARKED:
        return list(range(len(section["classes"])))
    points = np.array(section["panels"][0]["points"], float).reshape(-1, 2)
    means = np.full((len(section["classes"]), 2), np.inf)
    for label in np.unique(labels[~tested]).tolist():
        means[label] = points[(labels == label) & ~tested].mean(0)
    nearest = cdist(points[tested], means).argmin(1) if np.isfinite(means).any() else labels[tested]
    right = np.bincount(labels[tested], nearest == labels[tested], len(means))
    count = np.bincount(labels[tested], minlength=len(means))
    shares = [right[c] / count[c] if count[c] else math.nan for c in range(len(means))]
    return Rows.of(shares, most=MARKED).named


def _plane_entries(section: dict, marked: Sequence[int], across: int) -> list[Line2D]:
    """Return what points mean."""
    names = cut_labels([section["classes"][c] for c in marked], WIDTH / across - 0.45, SMALL)
    looks = {"ls": "none", "ms": 4.5, "mew": 0.6}
    handles = [Line2D([], [], **_mark(i), **looks, label=name) for i, name in enumerate(names)]
    others = len(section["classes"]) - len(marked)
    if others:
        handles.append(Line2D([], [], **OTHER, ls="none", ms=3, label=f"{others} others"))
    faint = {"marker": "o", "ls": "none", "mfc": INK, "mec": INK, "ms": 3, "mew": 0.2, "alpha": 0.3}
    return [*handles, Line2D([], [], **faint, label="faint: train LoRAs")]


def _mark(label: int) -> dict:
    """Return shape and filling of a concept's points."""
    color, half, other = FILLINGS[label % len(FILLINGS)]
    shape = SHAPES[label % len(SHAPES)]
    return {"marker": shape, "mfc": color, "fillstyle": half, "markerfacecoloralt": other, "mec": INK}


def _plane(ax: Axes, section: dict, panel: dict, names: dict[str, str], marked: Sequence[int]) -> None:
    """Draw the LoRAs of a panel, those of each marked class in its mark, under the name of its module."""
    points, labels = np.array(panel["points"], float).reshape(-1, 2), np.array(section["labels"])
    tested = np.array(section["parts"]) == "test"
    size = float(np.clip(40 / math.sqrt(max(1, tested.sum())), 2.6, 5))
    mark_of = {label: _mark(i) for i, label in enumerate(marked)}
    for label in sorted(np.unique(labels).tolist(), key=lambda label: label in mark_of):
        mark = {"ls": "none", **mark_of.get(label, OTHER)}
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
