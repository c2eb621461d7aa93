"""What pictures are made of: style, text that fits, blocks and trees of layers, and files.

Things are told apart by marker, line style, hatch or lightness, so the pictures can be printed in black and white; the
colours are some of Okabe and Ito's, which the colour-blind tell apart.

Text in the SVGs is drawn as outlines, not as text: an SVG carries no font, another font's letters are wider or
narrower than those that the layout was made for, and labels would then overlap. What the pictures say can be searched
as text in the title that each file holds, and in the report.
"""

from __future__ import annotations

import io
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from report.sentences import wrapped

WIDTH, DPI = 7.2, 150  # inches, as wide as a page of two columns; dots per inch
FONT, SIZE, SMALL, TITLE = "DejaVu Sans", 8, 6.5, 9.5  # the font comes with matplotlib; sizes in points
DARK, BLUE, ORANGE, GREY = "#1a1a1a", "#0072b2", "#e69f00", "#8c8c8c"  # in print: black, dark, light, middle
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


@contextmanager
def new_figure(name: str, title: str) -> Iterator[Figure]:
    """A figure under its title, to be drawn on and saved while matplotlib's settings are ours.

    Args:
        name: From which the SVG makes its identifiers.
        title: Wrapped to the width of the figure.
    """
    with _LOCK, style.context(STYLE | {"svg.hashsalt": name}, after_reset=True):
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        figure.suptitle(in_lines(title), x=0.01, ha="left", fontsize=TITLE)
        yield figure


def saved(figure: Figure, kind: str, title: str) -> bytes:
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


# ----------------------------------------------------------------------------------------------------------------------
# Names and texts that fit
# ----------------------------------------------------------------------------------------------------------------------


def width_of(text: str, size: float) -> float:
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


def cut(name: str, inches: float, size: float = SIZE) -> str:
    """A name on one line, its middle left out where it is too long; □ for what the font has no letter for."""
    name = "".join(letter if ord(letter) in _drawable() else "□" for letter in " ".join(str(name).split()))
    kept, whole, wide = len(name), name, width_of(name, size)
    if wide > 2 * inches:
        kept = int(len(name) * 2 * inches / wide)  # still too long, but near it
    while kept > 2 and width_of(name, size) > inches:
        kept -= 1
        name = f"{whole[: kept - kept // 3]}…{whole[len(whole) - kept // 3 :]}"
    return name


def cut_labels(names: Sequence[str], inches: float, size: float) -> list[str]:
    """Names cut to a width; those that would then look the same get their number in front."""
    labels = [cut(name, inches, size) for name in names]
    times = Counter(labels)
    if len(times) == len(labels):
        return labels
    numbered = (f"{i}: {name}" for i, name in enumerate(names, 1))
    return [
        cut(other, inches, size) if times[label] > 1 else label for label, other in zip(labels, numbered, strict=True)
    ]


def in_lines(text: str, inches: float = WIDTH - 0.2, size: float = TITLE) -> str:
    """A text in lines no wider than so many inches."""
    for width in range(140, 20, -4):
        lines = wrapped(text, width)
        if max(width_of(line, size) for line in lines) <= inches:
            break
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Parts of pictures
# ----------------------------------------------------------------------------------------------------------------------


def make_high(figure: Figure, inches: float) -> None:
    """Set a figure's height, to which that of its title is added."""
    figure.set_figheight(inches + 0.18 * (1 + figure.get_suptitle().count("\n")))


def _runs(blocks: Sequence[str | None]) -> list[tuple[str | None, int, int]]:
    """Neighbours of the same block: its name, first and last position."""
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    return [(blocks[a], a, b - 1) for a, b in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def block_words(block: str) -> tuple[str, str]:
    """Kind and number of a block: of ``down_blocks_0`` down and 0, of ``transformer_blocks_3`` block and 3."""
    kind, number = re.fullmatch(r"(.*?)_?(\d*)", block, re.DOTALL).groups()
    words = [word for word in kind.split("_") if word not in ("transformer", "blocks", "block")]
    return " ".join(words) or "block", number


def mark_blocks(ax: Axes, positions: Sequence[float], blocks: Sequence[str | None], inches: float, name: bool) -> None:
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
        kind, number = block_words(block) if block else ("", "")
        centre = (positions[a] + positions[b]) / 2
        label = number if kind == last and number else f"{kind} {number}".strip()
        label = cut(label, 1.2, SMALL)
        wide, at = width_of(label, SMALL), centre / span * inches
        if label and at - wide / 2 > free:
            ticks.append(centre)
            labels.append(label)
            free, last = at + wide / 2 + 0.06, kind
    top = ax.secondary_xaxis("top")
    top.set_xticks(ticks, labels, fontsize=SMALL, color="#505050")
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)


def place(ax: Axes, points: Sequence, texts: Sequence[str], size: float, beside: bool) -> None:
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
        wide, high = width_of(text, size), 1.15 * size / 72
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


def write_numbers(ax: Axes, values: np.ndarray, largest: float, high: float, wide: float) -> None:
    """The numbers in the cells of a map, where cells of so many inches have room for them."""
    if high < 0.12 or wide < 0.25:
        return
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.5 * largest else DARK
        ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=SMALL, color=color)


def tree_lines(linkage: Sequence, order: Sequence[int]) -> np.ndarray:
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


def kinds_of(records: Sequence[dict]) -> list[tuple[str, np.ndarray]]:
    """Roles, kinds of attention and projections that occur, the 8 most frequent of each, and which layers have them."""
    rows = []
    for field in ("role", "attention", "projection"):
        values = [record[field] for record in records]
        common = {value for value, _ in Counter(value for value in values if value).most_common(8)}
        present = dict.fromkeys(record[field] for record in sorted(records, key=lambda record: record["depth"]))
        rows += [(value, np.array([one == value for one in values])) for value in present if value in common]
    return rows
