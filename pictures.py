"""results.json -> pictures: six, each as PNG (150 dpi) and SVG, and the finding that stands above each.

Nothing but the content of results.json is read, and the same content gives the same bytes. Things are told apart by
marker, line style, hatch or lightness, so the pictures can be printed in black and white; the colours are some of Okabe
and Ito's, which the colour-blind tell apart.

Text in the SVGs is drawn as outlines, not as text: an SVG carries no font, another font's letters are wider or
narrower than those that the layout was made for, and labels would then overlap. What the pictures say can be searched
as text in the title that each file holds, and in the report.

Shape letters: L layers in the network's order, P modules, C classes.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

WIDTH, DPI = 7.2, 150  # inches, as wide as a page of two columns; dots per inch
FONT, SIZE, SMALL = "DejaVu Sans", 8, 6.5  # the font comes with matplotlib; sizes in points
ALPHA = 0.05  # of all tests, as in the analysis
DARK, BLUE, ORANGE, GREY = "#1a1a1a", "#0072b2", "#e69f00", "#8c8c8c"  # in print: black, dark, light, middle
NAMED = 12  # concepts at most that are named in a cloud of points
MARKERS = {"down": "v", "up": "^"}
STYLE = {
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": SIZE,
    "axes.unicode_minus": False,  # as the rest of the program prints
    "axes.xmargin": 0.02,
    "figure.dpi": DPI,
    "font.family": FONT,
    "font.size": SIZE,
    "hatch.linewidth": 0.5,
    "legend.fontsize": SMALL + 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "svg.fonttype": "path",
    "text.parse_math": False,  # names may hold a $
    "xtick.labelsize": SMALL + 0.5,
    "xtick.major.width": 0.6,
    "ytick.labelsize": SMALL + 0.5,
    "ytick.major.width": 0.6,
}
_LOCK = threading.Lock()  # matplotlib's settings are one for all threads


def draw(results: dict) -> dict[str, bytes]:
    """All pictures that the results have the data for.

    Args:
        results: The content of results.json; it is not changed.

    Returns:
        Content by file name, such as ``layer_importance.png`` and ``layer_importance.svg``; empty without an analysis.
    """
    files: dict[str, bytes] = {}
    for name, caption in captions(results).items():
        with _LOCK, style.context(STYLE | {"svg.hashsalt": name}, after_reset=True):
            figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
            title = caption + " [a --quick run]" * bool(results["config"].get("quick"))
            figure.suptitle(_wrapped(title), x=0.01, ha="left", fontsize=SIZE + 1.5)
            PICTURES[name][1](results, figure)
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine("none")  # the layout is done, and both files have the same
            for kind in ("png", "svg"):
                files[f"{name}.{kind}"] = _content(figure, kind, caption)
    return files


def _content(figure: Figure, kind: str, title: str) -> bytes:
    """The finished file: no date and no version in it, so that equal pictures are equal bytes."""
    buffer = io.BytesIO()
    if kind == "png":
        canvas, told = FigureCanvasAgg(figure), PngInfo()
        canvas.draw()
        told.add_itxt("Title", title)
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image = image.quantize(256, dither=Image.Dither.NONE)  # a palette, which makes a third of the bytes
        image.save(buffer, "PNG", dpi=(DPI, DPI), pnginfo=told, optimize=True)
    else:
        metadata = {"Title": title, "Date": None, "Creator": None}
        FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()


def captions(results: dict) -> dict[str, str]:
    """The finding of each picture that can be drawn, one sentence with its numbers; empty without an analysis."""
    analysis = results.get("analysis") or {}
    found = {name: finding(results) for name, (finding, _, needs) in PICTURES.items() if all(map(analysis.get, needs))}
    return {name: sentence for name, sentence in found.items() if sentence}


# ----------------------------------------------------------------------------------------------------------------------
# Words: numbers, names that fit
# ----------------------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _between(bounds: Sequence[float] | None, scale: float = 1, digits: int = 2) -> str:
    """`` (low to high)``, or nothing where there is no interval."""
    return f" ({scale * bounds[0]:.{digits}f} to {scale * bounds[1]:.{digits}f})" if bounds else ""


def _inches(text: str, size: float) -> float:
    """How wide a text is, as the sum of its letters."""
    return size * sum(map(_advance, text))


@cache
def _advance(letter: str) -> float:
    """How far a letter takes the next one, in inches at 1 point."""
    font = FontProperties(family=FONT, size=100)
    alone, between = (text_to_path.get_text_width_height_descent(f"n{x}n", font, False)[0] for x in ("", letter))
    return (between - alone) / 7200


@cache
def _drawable() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=FONT))).get_charmap())


def _cut(name: str, inches: float, size: float = SIZE) -> str:
    """A name on one line, its middle left out where it is too long; □ for what the font has no letter for."""
    name = "".join(letter if ord(letter) in _drawable() else "□" for letter in " ".join(str(name).split()))
    kept, whole, wide = len(name), name, _inches(name, size)
    if wide > 2 * inches:
        kept = int(len(name) * 2 * inches / wide)  # still too long, but near it
    while kept > 2 and _inches(name, size) > inches:
        kept -= 1
        name = f"{whole[: kept - kept // 3]}…{whole[len(whole) - kept // 3 :]}"
    return name


def _labels(names: Sequence[str], inches: float, size: float) -> list[str]:
    """Names cut to a width; those that would then look the same get their number in front."""
    labels = [_cut(name, inches, size) for name in names]
    times = Counter(labels)
    if len(times) == len(labels):
        return labels
    numbered = (f"{i}: {name}" for i, name in enumerate(names, 1))
    return [
        _cut(other, inches, size) if times[label] > 1 else label for label, other in zip(labels, numbered, strict=True)
    ]


def _wrapped(text: str, inches: float = WIDTH - 0.2, size: float = SIZE + 1.5) -> str:
    """A text in lines no wider than so many inches, its % signs on the line of their numbers."""
    for width in range(140, 20, -4):
        lines = [line.replace("\u00a0", " ") for line in textwrap.wrap(text.replace(" %", "\u00a0%"), width)]
        if max(_inches(line, size) for line in lines) <= inches:
            break
    return "\n".join(lines)


def _listed(names: Sequence[str], most: int = 2) -> str:
    """``a and b``, or how many where there are more."""
    return " and ".join(_cut(name, 1.5) for name in names) if len(names) <= most else f"{len(names)} others"


def _top(k: int) -> str:
    return "the top layer" if k == 1 else f"the top {k} layers"


def _random(k: int) -> str:
    return "a random one" if k == 1 else f"{k} random ones"


# ----------------------------------------------------------------------------------------------------------------------
# Parts of several pictures
# ----------------------------------------------------------------------------------------------------------------------


def _make_high(figure: Figure, inches: float) -> None:
    """Set a figure's height, to which that of its title is added."""
    figure.set_figheight(inches + 0.18 * (1 + figure.get_suptitle().count("\n")))


def _runs(blocks: Sequence[str | None]) -> list[tuple[str | None, int, int]]:
    """Neighbours of the same block: its name, first and last position."""
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    return [(blocks[a], a, b - 1) for a, b in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def _block_words(block: str) -> tuple[str, str]:
    """Kind and number of a block: of ``down_blocks_0`` down and 0, of ``transformer_blocks_3`` block and 3."""
    kind, number = re.fullmatch(r"(.*?)_?(\d*)", block, re.DOTALL).groups()
    words = [word for word in kind.split("_") if word not in ("transformer", "blocks", "block")]
    return " ".join(words) or "block", number


def _mark_blocks(ax: Axes, positions: Sequence[float], blocks: Sequence[str | None], inches: float, name: bool) -> None:
    """Lines between blocks and, above the axes, as many of their names as there is room for."""
    runs = _runs(blocks)
    edges = [(positions[a - 1] + positions[a]) / 2 for _, a, _ in runs[1:]]
    if len(runs) <= 80:
        ax.vlines(
            edges, 0, 1, transform=ax.get_xaxis_transform(), color="#c0c0c0", lw=0.5, zorder=2 if ax.images else 0
        )
    if not name:
        return
    span = positions[-1] - positions[0] + (positions[-1] - positions[0]) / max(1, len(positions) - 1) or 1
    ticks, labels, free, last = [], [], -math.inf, None
    for block, a, b in runs:
        kind, number = _block_words(block) if block else ("", "")
        centre = (positions[a] + positions[b]) / 2
        label = number if kind == last and number else f"{kind} {number}".strip()
        label = _cut(label, 1.2, SMALL)
        wide, at = _inches(label, SMALL), centre / span * inches
        if label and at - wide / 2 > free:
            ticks.append(centre)
            labels.append(label)
            free, last = at + wide / 2 + 0.06, kind
    top = ax.secondary_xaxis("top")
    top.set_xticks(ticks, labels, fontsize=SMALL, color="#505050")
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)


def _place(ax: Axes, points: Sequence, texts: Sequence[str], size: float, beside: bool) -> None:
    """Texts above or beside the first points, in this order; one that would lie on another text or point is left out.

    Args:
        ax: The axes, finished otherwise, of a figure whose layout is done: it decides what lies on what.
        points: Which no text may cover, float[., 2]; the first ones are the texts' own.
        texts: Of the first points.
        size: Of the font.
        beside: Whether to try right, left, above and below; else only above.
    """
    left, bottom, right, top = ax.get_window_extent().extents / DPI  # in inches
    where = ax.transData.transform(np.asarray(points, float).reshape(-1, 2)) / DPI
    taken = [(x - 0.05, y - 0.05, x + 0.05, y + 0.05) for x, y in where]
    for (x, y), point, text in zip(where, points, texts, strict=False):
        wide, high = _inches(text, size), 1.15 * size / 72
        above, below = (-wide / 2, 0.06), (-wide / 2, -0.06 - high)
        for dx, dy in [(0.07, -high / 2), (-0.07 - wide, -high / 2), above, below] if beside else [above]:
            box = (x + dx, y + dy, x + dx + wide, y + dy + high)
            fits = box[0] >= left and box[1] >= bottom and box[2] <= right and box[3] <= top
            if fits and not any(a < box[2] and box[0] < c and b < box[3] and box[1] < d for a, b, c, d in taken):
                offset = ((dx + wide / 2) * 72, (dy + high / 2) * 72)
                where_to = {"textcoords": "offset points", "ha": "center", "va": "center"}
                ax.annotate(text, point, offset, fontsize=size, **where_to).set_in_layout(False)
                taken.append(box)
                break


# ----------------------------------------------------------------------------------------------------------------------
# 1. Which layers predict?
# ----------------------------------------------------------------------------------------------------------------------


def _say_layer_importance(results: dict) -> str:
    section = results["analysis"]["layers"]
    above, total = section["num_above_null"], len(section["records"])
    told = (
        f"{above} of {total} layers predict above chance" if above else f"None of {total} layers predicts above chance"
    )
    roles = sorted(section["groups"]["role"].items(), key=lambda item: -item[1]["mean"])
    if len(roles) != 2:
        return told
    (high, a), (low, b) = roles
    compared = f"{high} factors more than {low}" if a["interval"][0] > b["interval"][1] else f"{high} and {low} factors"
    return f"{told}; {compared} ({100 * a['mean']:.1f} and {100 * b['mean']:.1f} %)"


def _draw_layer_importance(results: dict, figure: Figure) -> None:
    section, ranks = results["analysis"]["layers"], {name: i for i, name in enumerate(results["top_layers"], 1)}
    records = section["records"]
    roles = list(dict.fromkeys(record["role"] for record in records))
    _make_high(figure, 1.3 + 1.7 * len(roles))
    axes = figure.subplots(len(roles), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    size = float(np.clip(5.5 - len(records) / 120, 2.2, 5))
    low, high = (100 * bound for bound in section["null_band"])
    highest = max(section["null_max"], *(record["interval"][1] for record in records))
    axes[0].set_ylim(0, 115 * highest + 2)  # room for ranks above the intervals
    _mark_blocks(axes[0], range(len(records)), [record["block"] for record in records], WIDTH - 0.7, name=True)
    for ax, role in zip(axes, roles, strict=True):
        inside = [record for record in records if record["role"] == role]
        depth, marker = np.array([record["depth"] for record in inside]), MARKERS.get(role, "o")
        ax.axhspan(low, high, fc="#e4e4e4", ec="#bdbdbd", hatch="////", lw=0, zorder=0.5)
        ax.axhline(100 * section["chance"], color=DARK, lw=0.8)
        ax.axhline(100 * section["null_max"], color=DARK, lw=0.8, ls=(0, (4, 2)))
        bounds = 100 * np.array([record["interval"] for record in inside])
        ax.vlines(depth, *bounds.T, color=BLUE, lw=float(np.clip(60 / len(inside), 0.5, 1)), alpha=0.75)
        accuracy = 100 * np.array([record["accuracy"] for record in inside])
        above = np.array([record["above_null"] for record in inside])
        ax.plot(depth[above], accuracy[above], marker, color=BLUE, ms=size, mec=DARK, mew=0.4)
        ax.plot(depth[~above], accuracy[~above], marker, color="white", ms=size, mec=DARK, mew=0.6)
        of_role = section["groups"]["role"][role]
        mean = f"{_percent(of_role['mean'])}{_between(of_role['interval'], 100, 1)}"
        ax.set_title(f"{role} factors: mean {mean}")
        top = np.array([record["layer"] in ranks for record in inside])
        ax.plot(depth[top], accuracy[top], "o", color="none", mec=DARK, mew=1, ms=size + 4.5)
        ax.set_ylabel("accuracy, %")
    for ax in axes[1:]:
        _mark_blocks(ax, range(len(records)), [record["block"] for record in records], WIDTH - 0.7, name=False)
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if tick <= min(100, axes[0].get_ylim()[1])])
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    r = section["depth"]
    how = f"; Spearman correlation with accuracy {r['r']:.2f}{_between(r['interval'])}" if r else ""
    axes[-1].set_xlabel(f"depth: position of the layer in the network{how}")
    figure.legend(handles=_layer_legend(section, len(ranks)), loc="outside lower center", ncols=3)
    figure.get_layout_engine().execute(figure)
    for ax, role in zip(axes, roles, strict=True):
        inside = sorted(
            (record for record in records if record["role"] == role), key=lambda one: ranks.get(one["layer"], math.inf)
        )
        points = [(record["depth"], 100 * record["interval"][1]) for record in inside]
        _place(ax, points, [str(ranks[record["layer"]]) for record in inside if record["layer"] in ranks], SMALL, False)


def _layer_legend(section: dict, top_k: int) -> list:
    above, total = section["num_above_null"], len(section["records"])
    marker = {"marker": "^", "ls": "none", "mec": DARK, "ms": 5}
    return [
        Line2D([], [], color=BLUE, **marker, label=f"above the limit ({above}), with 95 % interval"),
        Line2D([], [], color="white", **marker, label=f"not above it ({total - above})"),
        Line2D([], [], ls="none", marker="o", color="none", mec=DARK, ms=9, label=f"top {top_k}, with its rank"),
        Line2D([], [], color=DARK, lw=0.8, label=f"chance, {_percent(section['chance'])}"),
        Patch(fc="#e4e4e4", ec="#bdbdbd", hatch="////", lw=0, label="95 % of permuted labels"),
        Line2D(
            [],
            [],
            color=DARK,
            lw=0.8,
            ls=(0, (4, 2)),
            label=f"5 % limit, best of {total}: {_percent(section['null_max'])}",
        ),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# 2. Is prediction robust?
# ----------------------------------------------------------------------------------------------------------------------

CURVES = {  # of analysis.robustness: label, colour, marker, line style
    "most_first": ("most predictive first", DARK, "o", "-"),
    "least_first": ("least predictive first", BLUE, "s", (0, (5, 1.5))),
    "random_order": ("random order", ORANGE, "^", (0, (1, 1))),
}


def _say_ablation_curves(results: dict) -> str:
    sections = results["analysis"]["robustness"]
    name, one = next(iter(sections.items()))
    k, random = one["top_k"], one["without_random"]
    among = f"without {_random(k)} {100 * random['min']:.1f} to {_percent(random['max'])}"
    told = f"Without {_top(k)} {_cut(name, 1.5)} reaches {_percent(one['without_top']['accuracy'])}"
    told = f"{told} (with all {_percent(one['all']['accuracy'])}, {among}): {one['verdict']}"
    others = [(name, section["verdict"]) for name, section in sections.items()][1:]
    if len(others) > 2:
        others = [(str(count), verdict) for verdict, count in Counter(verdict for _, verdict in others).items()]
    return "; ".join([told, ", ".join(f"{_cut(who, 1.5)} {verdict}" for who, verdict in others)] if others else [told])


def _draw_ablation_curves(results: dict, figure: Figure) -> None:
    sections, chance = results["analysis"]["robustness"], 100 * results["analysis"]["layers"]["chance"]
    columns = 2 if len(sections) == 4 else min(3, len(sections))
    rows = math.ceil(len(sections) / columns)
    _make_high(figure, 1.0 + 2.3 * rows)
    grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[3, {1: 0.8, 2: 1.1, 3: 1.6}[columns]] * columns)
    first = None
    for i, (name, section) in enumerate(sections.items()):
        row, column = divmod(i, columns)
        ax = figure.add_subplot(grid[row, 2 * column], sharey=first)
        first = first or ax
        beside = figure.add_subplot(grid[row, 2 * column + 1], sharey=first)
        for curve, (_, color, marker, line) in CURVES.items():
            told = section["curves"][curve]
            low, high = 100 * np.array(told["low"]), 100 * np.array(told["high"])
            ax.fill_between(told["removed"], low, high, color=color, alpha=0.15, lw=0)
            accuracy = 100 * np.array(told["accuracy"])
            looks = {"color": color, "marker": marker, "ls": line, "ms": 3.6, "mew": 0.8}
            ax.plot(told["removed"], accuracy, **looks, mfc=DARK if curve == "most_first" else "white")
        for one in (ax, beside):
            one.axhline(chance, color=GREY, lw=0.9, ls=(0, (6, 2, 1, 2)), zorder=0.5)
        ax.set_title(_curves_title(name, section), fontsize=SMALL + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        if column == 0:
            ax.set_ylabel("accuracy, %")
        if i + columns >= len(sections):
            ax.set_xlabel("layers removed")
        _removals(beside, section, i + columns >= len(sections))
    first.set_ylim(0, 104)
    lines = [
        Line2D([], [], color=color, marker=marker, ls=line, ms=4, mfc=DARK if color == DARK else "white", label=label)
        for label, color, marker, line in CURVES.values()
    ]
    lines.append(Line2D([], [], ls="none", marker="_", ms=8, color=ORANGE, label="one random draw"))
    lines.append(Line2D([], [], color=GREY, lw=0.9, ls=(0, (6, 2, 1, 2)), label=f"chance, {chance:.1f} %"))
    figure.legend(handles=lines, loc="outside lower center", ncols=5, columnspacing=1.2)


def _curves_title(name: str, section: dict) -> str:
    """Representation and verdict; what survives the removal of the top k; areas in the order of ``CURVES``."""
    lines, survives = [f"{_cut(name, 1.3)}: {section['verdict']}"], section["survives"]
    if survives:
        share = f"{100 * survives['share']:.0f} %{_between(survives['interval'], 100, 0)}"
        lines.append(f"{share} survives")
    areas = ", ".join(f"{section['curves'][curve]['area']:.2f}" for curve in CURVES)
    return "\n".join([*lines, f"areas {areas}"])


def _removals(ax: Axes, section: dict, named: bool) -> None:
    """The top k removed beside its controls: random draws (dashes, and their mean), the bottom k; the top k alone."""
    k = section["top_k"]
    kinds = {
        "all": "all",
        "without_top": f"no top {k}",
        "without_bottom": f"no bottom {k}",
        "top_alone": f"top {k} only",
    }
    for x, kind in zip((0, 1, 3, 4), kinds, strict=True):
        low, high = section[kind]["interval"]
        ax.vlines(x, 100 * low, 100 * high, color=DARK, lw=1)
        ax.plot(
            x, 100 * section[kind]["accuracy"], "o", color=DARK if kind == "without_top" else "white", mec=DARK, ms=4
        )
    draws = 100 * np.array(section["without_random"]["accuracies"])
    ax.hlines(draws, 1.5, 2.5, color=ORANGE, lw=0.8)
    ax.plot(2, 100 * section["without_random"]["mean"], "^", color="white", mec=DARK, ms=3.5)
    labels = ["all", kinds["without_top"], f"no random {k}", kinds["without_bottom"], kinds["top_alone"]]
    ax.set_xticks(range(5), labels if named else [], rotation=90, fontsize=SMALL)
    ax.set_xlim(-0.6, 4.6)
    ax.tick_params(labelleft=False)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Which representation is best?
# ----------------------------------------------------------------------------------------------------------------------


def _accuracies(results: dict, name: str) -> tuple[float, float]:
    """With all layers, and without the top k."""
    return tuple(results[kind][name]["test_accuracy"]["mean"] for kind in ("baseline_results", "ablation_results"))


def _say_representations(results: dict) -> str:
    section, k = results["analysis"]["representations"], results["config"]["top_k"]
    best, names, near = section["best"], list(section["drops"]), section["indistinguishable_from_best"]
    whole, left = _accuracies(results, best)
    told = f"{_percent(whole)} with all layers, {_percent(left)} without {_top(k)}"
    if section["intervals"]["baseline"][best][0] <= results["analysis"]["layers"]["chance"]:
        return f"No representation is clearly above chance; {best} gives most: {told}"
    costs = sum(one["p_holm"] < ALPHA and one["drop"] > 0 for one in section["drops"].values())
    if len(names) == 1:
        return f"{best}: {told}, {'a' if costs else 'no'} clear loss"
    alone = f" ({_listed(near)} not distinguishable)" if near else ""
    return f"{best} is best{alone}: {told}; removing them clearly costs {costs} of {len(names)} representations"


def _draw_representations(results: dict, figure: Figure) -> None:
    section, k = results["analysis"]["representations"], results["config"]["top_k"]
    names = sorted(section["drops"], key=lambda name: (_accuracies(results, name), name))  # the best on top
    _make_high(figure, 1.45 + 0.24 * len(names))
    ax = figure.subplots()
    ax.hlines(range(len(names)), 0, 1, transform=ax.get_yaxis_transform(), color="#e2e2e2", lw=0.5, zorder=0)
    for condition, up, looks in (("baseline", 0.14, {"color": DARK}), ("ablation", -0.14, {"color": ORANGE})):
        at = np.arange(len(names)) + up
        accuracy = [100 * _accuracies(results, name)[condition == "ablation"] for name in names]
        bounds = 100 * np.array([section["intervals"][condition][name] for name in names])
        ax.hlines(at, *bounds.T, **looks, lw=1.3)
        marker = {"baseline": {"marker": "o", "mfc": DARK}, "ablation": {"marker": "D", "mfc": "white"}}[condition]
        label = {"baseline": "all layers", "ablation": f"without the top {k}"}[condition]
        ax.plot(accuracy, at, ls="none", **marker, mec=DARK, ms=4.2, mew=0.9, label=label)
    chance = 100 * results["analysis"]["layers"]["chance"]
    ax.axvline(chance, color=GREY, lw=0.9, ls=(0, (6, 2, 1, 2)), zorder=0.5, label=f"chance, {chance:.1f} %")
    ax.set_yticks(range(len(names)), _labels(names, 1.6, SIZE), fontsize=SIZE)
    for name, label in zip(names, ax.get_yticklabels(), strict=True):
        if name in (section["best"], *section["indistinguishable_from_best"]) and len(names) > 1:
            label.set_fontweight("bold")
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlim(-1, 101)
    ax.set_xlabel("test accuracy, %, with 95 % intervals")
    right = ax.secondary_yaxis("right")
    drops = [section["drops"][name] for name in names]
    changes = [
        f"{-100 * one['drop']:+.1f} ({-100 * one['interval'][1]:+.1f} to {-100 * one['interval'][0]:+.1f})"
        + " *" * (one["p_holm"] < ALPHA)
        for one in drops
    ]
    right.set_yticks(range(len(names)), changes)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    ax.set_title("change in points; * p < 0.05 (Holm)", loc="right", fontsize=SMALL + 0.5)
    if len(names) > 1:
        ax.set_title("bold: best, or not distinguishable from it", loc="left", fontsize=SMALL + 0.5)
    figure.legend(loc="outside lower center", ncols=3)


# ----------------------------------------------------------------------------------------------------------------------
# Concepts by layer
# ----------------------------------------------------------------------------------------------------------------------


def _say_concept_layer_map(results: dict) -> str:
    section = results["analysis"]["concepts"]
    best = np.array(section["recall"]).max(0)  # (C,)
    high, low = int(best.argmax()), int(best.argmin())
    if best[high] == best[low]:
        return f"The best single layer for each concept recognises {_percent(best[high])} of it"
    names = [_cut(section["classes"][c], 1.8) for c in (high, low)]
    return (
        f"Single layers recognise {names[0]} best (up to {_percent(best[high])} of it) "
        f"and {names[1]} worst (up to {_percent(best[low])})"
    )


def _draw_concept_layer_map(results: dict, figure: Figure) -> None:
    analysis, top = results["analysis"], set(results["top_layers"])
    section, records = analysis["concepts"], analysis["layers"]["records"]
    recall = 100 * np.array(section["recall"]).T  # (C, L)
    clusters = (analysis.get("layer_information") or {}).get("concept_clusters")
    cluster = np.array(clusters["of_class"] if clusters else np.zeros(len(recall)))
    order = np.lexsort((-recall.mean(1), cluster))
    row = min(0.24, 9 / len(order))  # inches, as all that follow
    _make_high(figure, 1.05 + row * len(order))
    roles = list(dict.fromkeys(record["role"] for record in records))
    of_roles = [np.array([i for i, record in enumerate(records) if record["role"] == role]) for role in roles]
    best = (analysis.get("representations") or {}).get("best")
    widths = [4.7 * len(of_role) / len(records) for of_role in of_roles] + [0.9] * (best is not None)
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    looks = {"cmap": "YlGnBu", "vmin": 0, "vmax": max(20, 20 * math.ceil(recall.max() / 20)), "aspect": "auto"}
    for ax, role, of_role, width in zip(axes, roles, of_roles, widths, strict=False):
        image = ax.imshow(recall[np.ix_(order, of_role)], **looks, interpolation="nearest")
        _numbers(ax, recall[np.ix_(order, of_role)], looks["vmax"], row, width / len(of_role))
        _mark_blocks(ax, range(len(of_role)), [records[i]["block"] for i in of_role], width, name=True)
        marked = [i for i, layer in enumerate(of_role) if records[layer]["layer"] in top]
        if marked:
            ax.plot(marked, np.full(len(marked), len(order) - 0.5), "^", color=DARK, ms=4, clip_on=False)
        ax.set_title(f"{role} factors")
        ax.set_xticks([])
        ax.set_xlabel(f"layers by depth (▲ top {len(top)})")
    if best is not None:
        whole = 100 * np.array(section["baseline"][best])
        both = np.stack([whole, whole - 100 * np.array(section["drop"][best])], axis=1)[order]
        axes[-1].imshow(both, **looks, interpolation="nearest")
        _numbers(axes[-1], both, looks["vmax"], row, 0.4)
        axes[-1].set_xticks([0, 1], ["all", f"no top {results['config']['top_k']}"], fontsize=SMALL)
        axes[-1].set_title(_cut(best, 0.85, SMALL), fontsize=SMALL)
    for ax in axes:
        ax.hlines(np.flatnonzero(np.diff(cluster[order])) + 0.5, *ax.get_xlim(), color=DARK, lw=0.8)
        ax.tick_params(length=0)
    step = math.ceil(0.1 / row)  # of more classes than there is room for names, every second one is named
    labels = _labels([section["classes"][c] for c in order], 1.4, size := min(SIZE, 55 * row))
    axes[0].set_yticks(range(0, len(order), step), labels[::step], fontsize=size)
    steps = np.linspace(0, looks["vmax"], 6)  # a legend, as constrained layout has no good place for a bar of colours
    patches = [Patch(fc=image.cmap(image.norm(step)), ec=DARK, lw=0.5, label=f"{step:.0f} %") for step in steps]
    patches[-1].set_label(f"{looks['vmax']} % recall" + " or more" * (looks["vmax"] < 100))
    figure.legend(handles=patches, loc="outside lower center", ncols=6)


def _numbers(ax: Axes, values: np.ndarray, largest: float, high: float, wide: float) -> None:
    """The numbers in the cells of a map, where cells of so many inches have room for them."""
    if high < 0.12 or wide < 0.25:
        return
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.5 * largest else DARK
        ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=SMALL, color=color)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Do layers carry different information?
# ----------------------------------------------------------------------------------------------------------------------


def _say_layer_clusters(results: dict) -> str | None:
    section = results["analysis"]["layer_information"]
    clusters, union, k = section["clusters"], section["union"], len(section["kappa"]["top_k"])
    if not clusters["linkage"]:
        return None
    total, count = len(clusters["order"]), clusters["count"]
    noun = "cluster" if count == 1 else "clusters"
    told = f"{total} layers fall into {count} {noun} of like features (1 - CKA below {clusters['threshold']:g})"
    if count == total:
        told = f"No two of {total} layers have like features (1 - CKA below {clusters['threshold']:g})"
    if k < 2:
        return told
    known = f"{_percent(union['any_of_top_k'])} of LoRAs, the best alone {_percent(union['best_alone'])}"
    return f"{told}; between them the top {k} recognise {known}"


def _tree(linkage: Sequence, order: Sequence[int]) -> np.ndarray:
    """The links of scipy's linkage as lines of four points over the leaves in this order, float[L - 1, 4, 2].

    Not scipy's dendrogram, which calls itself for each link and so fails on a chain of more than a thousand layers.
    """
    place = {leaf: (float(x), 0.0) for x, leaf in enumerate(order)}
    links = np.empty((len(linkage), 4, 2))
    for i, (a, b, height, _) in enumerate(linkage):
        (left, low_left), (right, low_right) = sorted((place[int(a)], place[int(b)]))
        links[i] = [(left, low_left), (left, height), (right, height), (right, low_right)]
        place[len(order) + i] = ((left + right) / 2, height)
    return links


def _draw_layer_clusters(results: dict, figure: Figure) -> None:
    records, ranks = results["analysis"]["layers"]["records"], set(results["top_layers"])
    clusters = results["analysis"]["layer_information"]["clusters"]
    ordered = [records[i] for i in clusters["order"]]
    rows = _kinds(ordered)
    _make_high(figure, 4.1 + 0.13 * len(rows))
    tree, kinds, depth = figure.subplots(3, 1, sharex=True, height_ratios=[2.0, 0.13 * len(rows) + 0.05, 1.0])
    links = _tree(clusters["linkage"], clusters["order"])
    below = links[:, 1, 1] < clusters["threshold"]
    tree.add_collection(LineCollection(links[~below], color=GREY, lw=0.7))
    tree.add_collection(LineCollection(links[below], color=DARK, lw=float(np.clip(120 / len(ordered), 0.4, 1.2))))
    tree.axhline(clusters["threshold"], color=ORANGE, lw=1, ls=(0, (4, 2)))
    tree.set_ylim(0, 1.03 * max(links[..., 1].max(), clusters["threshold"]))
    tree.set_ylabel("distance, 1 - CKA")
    tree.set_title("bold: links within a cluster; dashed: the distance at which clusters are cut")
    for y, (_, members) in enumerate(rows):
        wide = 0.5 - 0.1 * (len(ordered) < 150)  # cells touch where there are many
        bars = [(x - wide, 2 * wide) for x in np.flatnonzero(members)]
        kinds.broken_barh(bars, (y - 0.38, 0.76), fc=DARK, ec="none")
    kinds.hlines(np.arange(len(rows)) + 0.5, -0.5, len(ordered) - 0.5, color="#d0d0d0", lw=0.5)
    kinds.set_yticks(range(len(rows)), _labels([name for name, _ in rows], 1.0, SMALL), fontsize=SMALL)
    kinds.set_ylim(len(rows) - 0.5, -0.5)
    kinds.tick_params(length=0)
    size = float(np.clip(250 / len(ordered), 1.5, 4.5))
    for role in dict.fromkeys(record["role"] for record in records):
        xs = [x for x, record in enumerate(ordered) if record["role"] == role]
        color = {"down": "white", "up": BLUE}.get(role, ORANGE)
        of_role = [ordered[x]["depth"] for x in xs]
        depth.plot(xs, of_role, MARKERS.get(role, "o"), color=color, mec=DARK, mew=0.5, ms=size, label=role)
    xs = [x for x, record in enumerate(ordered) if record["layer"] in ranks]
    ring = {"color": "none", "mec": DARK, "mew": 1, "ms": size + 4}
    depth.plot(xs, [ordered[x]["depth"] for x in xs], "o", **ring, label=f"top {len(ranks)}")
    depth.set_ylabel("depth")
    depth.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    depth.set_xlim(-0.5 - 0.01 * len(ordered), 1.01 * len(ordered) - 0.5)
    depth.set_xticks([])
    depth.set_xlabel(f"{len(ordered)} layers, like ones side by side")
    depth.margins(y=0.12)
    legend = figure.legend(*depth.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for handle in legend.legend_handles:
        handle.set_markersize(5)


def _kinds(records: Sequence[dict]) -> list[tuple[str, np.ndarray]]:
    """Roles, kinds of attention and projections that occur, the 8 most frequent of each, and which layers have them."""
    rows = []
    for field in ("role", "attention", "projection"):
        values = [record[field] for record in records]
        common = {value for value, _ in Counter(value for value in values if value).most_common(8)}
        present = dict.fromkeys(record[field] for record in sorted(records, key=lambda record: record["depth"]))
        rows += [(value, np.array([one == value for one in values])) for value in present if value in common]
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# 5. Does rank structure matter?
# ----------------------------------------------------------------------------------------------------------------------


def _say_rank_structure(results: dict) -> str:
    section = results["analysis"]["rank_structure"]
    count = f"{section['num_significant']} of {len(section['modules'])} modules"
    if not section["answerable"]:
        return f"{section['why'][:1].upper()}{section['why'][1:]}; the norm of the update differs by concept in {count}"
    found = section["complexity"]["spearman_spread"]
    goes = f"; its correlation with spread is {found['r']:.2f}{_between(found['interval'])}" if found else ""
    return f"Effective rank differs by concept in {count}{goes}"


def _draw_rank_structure(results: dict, figure: Figure) -> None:
    section = results["analysis"]["rank_structure"]
    classes = section["complexity"]["by_class"]
    _make_high(figure, 5.2)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
    field = "effective_rank" if section["answerable"] else "norm"
    measured = [one[field] for one in classes]
    labels, first, scatters = _labels([one["class"] for one in classes], 0.9, SMALL), None, []
    for column, (of, scale, words) in enumerate(
        (("spread", 1, "spread of the concept's features"), ("recall", 100, "recall of the concept, %"))
    ):
        ax = figure.add_subplot(grid[0, column], sharey=first)
        first = first or ax
        x = [scale * one[of] for one in classes]
        ax.plot(x, measured, "o", color=BLUE, mec=DARK, mew=0.5, ms=4.5)
        found = section["complexity"][f"spearman_{of}"]
        ax.set_title(
            f"Spearman correlation {found['r']:.2f}{_between(found['interval'])}" if found else "no correlation to tell"
        )
        ax.set_xlabel(words)
        ax.margins(0.12)
        scatters.append((ax, x))
    first.set_ylabel(f"{section['tested']}, mean")
    _draw_modules(results, figure.add_subplot(grid[1, :]))
    middle = np.median(measured)
    order = sorted(range(len(classes)), key=lambda c: (-abs(measured[c] - middle), c))  # the extremes are named first
    for ax, x in scatters:
        _place(ax, [(x[c], measured[c]) for c in order], [labels[c] for c in order[:NAMED]], SMALL, beside=True)


def _draw_modules(results: dict, ax: Axes) -> None:
    """How much concepts explain of each module's measure: ε² = H / (N - 1) of the Kruskal-Wallis statistic H."""
    section, samples = results["analysis"]["rank_structure"], results["dataset"]["num_samples"]
    modules = section["modules"]
    layers = {record["module"]: record for record in (results["analysis"].get("layers") or {}).get("records", ())}
    explained = np.array([100 * min(1, module["statistic"] / max(1, samples - 1)) for module in modules])
    differs = np.array([module["p_fdr"] < ALPHA for module in modules])
    at, size = np.arange(len(modules)), float(np.clip(250 / len(modules), 2.5, 5))
    ax.vlines(at, 0, explained, color="#b8b8b8", lw=min(1, 60 / len(modules)))
    for some, color, label in ((differs, BLUE, "differs by concept (FDR 5 %)"), (~differs, "white", "does not")):
        label = f"{label}: {some.sum()}"
        ax.plot(at[some], explained[some], "o", color=color, mec=DARK, mew=0.5, ms=size, label=label)
    ax.set_ylim(0, max(1, 1.2 * explained.max()))
    ax.set_xlim(-0.5 - 0.01 * len(at), 1.01 * len(at) - 0.5)
    ax.set_ylabel("explained by\nconcept, % (ε²)")
    ax.set_xlabel("modules by depth")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    places = [layers.get(module["module"], {}) for module in modules]
    _mark_blocks(ax, at, [place.get("block") for place in places], WIDTH - 0.7, name=True)
    ax.get_figure().legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    most = sorted(at, key=lambda i: (-explained[i], i))
    names = [" ".join(filter(None, (places[i].get("attention"), places[i].get("projection")))) for i in most[:5]]
    ax.get_figure().get_layout_engine().execute(ax.get_figure())
    points = [(i, explained[i]) for i in most]
    _place(
        ax,
        points,
        [_cut(name or modules[i]["module"], 1.2) for i, name in zip(most, names, strict=False)],
        SMALL,
        beside=False,
    )


PICTURES: dict[str, tuple[Callable[[dict], str | None], Callable[[dict, Figure], None], tuple[str, ...]]] = {
    "layer_importance": (_say_layer_importance, _draw_layer_importance, ("layers",)),
    "ablation_curves": (_say_ablation_curves, _draw_ablation_curves, ("layers", "robustness")),
    "representations": (_say_representations, _draw_representations, ("layers", "representations")),
    "concept_layer_map": (_say_concept_layer_map, _draw_concept_layer_map, ("layers", "concepts")),
    "layer_clusters": (_say_layer_clusters, _draw_layer_clusters, ("layers", "layer_information")),
    "rank_structure": (_say_rank_structure, _draw_rank_structure, ("rank_structure",)),
}  # finding, drawing, and the sections of the analysis that they need
