"""The parts of figures: styles, text that fits, blocks and trees of layers.

Groups are distinguished by marker, line style or hatch. Their colours, close to Okabe and Ito's, differ in lightness,
for all kinds of colour vision, so in grey too. rendering.py makes files of figures.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from matplotlib import style as matplotlib_style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.text import Text

from report.fonts import BOX, FONT, families_of, family_of, quietly, shown, width_of
from report.names import shortened
from report.wording import wrapped

WIDTH, COLUMN = 6.9, 3.3  # inches, of two columns and of one column of a paper
DPI = 300  # dots per inch of a PNG
SIZE, SMALL, TITLE = 8, 7, 9.5  # points
GROUND, INK = "#ffffff", "#1a1a1a"
BLUE, ORANGE, GREY = "#005b96", "#d08000", "#868686"  # in print: dark, light, middle
SOFT, FAINT, PALE = "#505050", "#bdbdbd", "#e4e4e4"  # minor text, minor lines, areas
ON_DARK = {  # colour of a figure -> the same on a dark screen; rendering.py has those of maps
    GROUND: "#14181d",
    INK: "#e3e8ee",
    BLUE: "#2f86c8",
    ORANGE: "#f0ad3d",
    GREY: "#97a1ac",
    SOFT: "#a9b3be",
    FAINT: "#4d5763",
    PALE: "#2b323a",
}
ON_CELLS = ("#0a0a0a", "#fafafa")  # text on light and on dark cells of a map: on a dark screen the other way round
STYLE = {
    "axes.edgecolor": INK,
    "axes.formatter.useoffset": False,
    "axes.grid": False,
    "axes.labelcolor": INK,
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
    "pdf.fonttype": 42,  # text, and the letters that it needs as a font
    "svg.fonttype": "none",  # text
    "text.color": INK,
    "text.parse_math": False,  # names may hold a $
    "xtick.color": INK,
    "xtick.labelsize": SMALL + 0.5,
    "xtick.major.width": 0.6,
    "ytick.color": INK,
    "ytick.labelsize": SMALL + 0.5,
    "ytick.major.width": 0.6,
}
STYLES = {  # --figure-style -> settings beside those above
    "report": {"figure.titlesize": TITLE},
    "paper": {  # on the ground of the paper
        "axes.facecolor": "none",
        "axes.linewidth": 0.5,
        "figure.facecolor": "none",
        "figure.titlesize": SMALL,
        "lines.linewidth": 1,
        "xtick.major.width": 0.5,
        "ytick.major.width": 0.5,
    },
}
MAP, TURN = "YlGnBu", 0.68  # colours of maps; where black and white contrast alike with them
MARKERS = {"down": "v", "up": "^"}  # of layers, by role
LEGEND_ROW = 0.15  # inches
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # of the blocks that are named, where not all are
_LOCK = threading.Lock()  # matplotlib's settings are those of all threads


# ----------------------------------------------------------------------------------------------------------------------
# Figures and files
# ----------------------------------------------------------------------------------------------------------------------


class _Figure(Figure):
    """A figure whose legend has no more columns than there is room for."""

    def legend(self, *args: object, ncols: int = 1, **options: object) -> Legend:
        """Add a legend of at most so many columns; rows that this adds make the figure higher."""
        legend, rows = super().legend(*args, ncols=ncols, **options), 0
        renderer, entries = FigureCanvasAgg(self).get_renderer(), len(legend.get_texts())
        while ncols > 1 and legend.get_window_extent(renderer).width > self.bbox.width:
            legend.remove()
            rows -= -(-entries // ncols)
            ncols -= 1
            rows += -(-entries // ncols)
            legend = super().legend(*args, ncols=ncols, **options)
        self.set_figheight(self.get_figheight() + LEGEND_ROW * rows)
        return legend


@contextmanager
def new_figure(
    name: str, title: str, letters: Iterable[str] = (), style: str = "report", width: float = WIDTH
) -> Iterator[Figure]:
    """Yield a figure under its title, to be drawn on and saved while matplotlib's settings are ours.

    Args:
        name: Seed of the identifiers in the SVG.
        title: Text above, which is wrapped to the width of the figure; empty for none.
        letters: Letters that names in it have, in any script: fonts that have them are added.
        style: Name of one of ``STYLES``.
        width: Width in inches.
    """
    settings = STYLE | STYLES[style] | {"svg.hashsalt": name, "font.family": list(families_of({*letters, *title}))}
    with _LOCK, quietly(), matplotlib_style.context(settings, after_reset=True):
        if width < WIDTH:  # where there is no room: `is_readable` finds it
            warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        figure = _Figure(figsize=(width, 4.0), layout="constrained")
        if title:
            size = STYLES[style]["figure.titlesize"]
            figure.suptitle(in_lines(title, width - 0.2, size), x=0.01, ha="left")
        yield figure


def set_height(figure: Figure, inches: float) -> None:
    """Set a figure's height, to which that of its title is added."""
    title = figure.get_suptitle()
    figure.set_figheight(inches + (0.18 * (1 + title.count("\n")) if title else 0))


def lay_out(figure: Figure) -> None:
    """Decide where everything is, for all files of a figure; what is too wide above or below axes is broken into lines.

    Titles are, and stacked where they stood side by side, in a figure of one column.
    """
    engine = figure.get_layout_engine()
    engine.execute(figure)
    box_of = {ax: ax.get_window_extent() for ax in figure.axes}
    changed = [_wrap(ax.xaxis.label, box.width / figure.dpi) for ax, box in box_of.items()]
    if figure.get_figwidth() < WIDTH:
        titles_of = {ax: list(filter(None, map(ax.get_title, ("left", "center", "right")))) for ax in box_of}
        for ax, box in box_of.items():
            beside = [other.x0 for of, other in box_of.items() if titles_of[of] and other.x0 >= box.x1]
            _stack_titles(ax, titles_of[ax], (min(beside, default=figure.bbox.width) - box.x0) / figure.dpi - 0.05)
            changed.append(bool(titles_of[ax]))
    if any(changed):
        engine.execute(figure)
    figure.set_layout_engine("none")


def _stack_titles(ax: Axes, titles: Sequence[str], inches: float) -> None:
    texts = [text for text in ax.get_children() if isinstance(text, Text) and text.get_text() in titles]
    for text in texts[1:]:
        text.set_text("")
    for text in texts[:1]:
        text.set(text="\n".join(titles), x=0, ha="left")
        _wrap(text, inches)


def _wrap(text: Text, inches: float) -> bool:
    """Break a text into lines no wider than that; return whether it has changed."""
    before = text.get_text()
    text.set_text("\n".join(in_lines(line, inches, text.get_fontsize()) for line in before.split("\n")))
    return text.get_text() != before


def in_one_column(figure: Figure) -> bool:
    """Return whether a figure is so narrow as a column of a paper."""
    return figure.get_figwidth() < WIDTH / 1.5


def _share_of_width(ax: Axes) -> float:
    """Return the width of the figure as a share of that which figures are laid out for."""
    return ax.get_figure().get_figwidth() / WIDTH


# ----------------------------------------------------------------------------------------------------------------------
# Names and texts that fit
# ----------------------------------------------------------------------------------------------------------------------


def cut(name: str, inches: float, size: float = SIZE) -> str:
    """Return a name on one line, its middle left out where it is too long."""
    return shortened(shown(name), lambda text: width_of(text, size) <= inches)


def cut_labels(names: Sequence[str], inches: float, size: float) -> list[str]:
    """Return names cut to a width; those that would then look alike, also as boxes, get their number in front."""
    labels = [cut(name, inches, size) for name in names]
    looks = ["".join(letter if family_of(letter) else BOX for letter in label) for label in labels]
    times = Counter(looks)
    for i, name in enumerate(names):
        if times[looks[i]] > 1:
            labels[i] = cut(f"{i + 1}: {name}", inches, size)
    return labels


def in_lines(text: str, inches: float = WIDTH - 0.2, size: float = TITLE) -> str:
    """Return a text in lines no wider than so many inches, where its words are not."""
    for width in range(140, 8, -4):
        lines = wrapped(text, width)
        if max((width_of(line, size) for line in lines), default=0) <= inches:
            break
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks, labels and maps
# ----------------------------------------------------------------------------------------------------------------------


def _runs(blocks: Sequence[str | None]) -> list[tuple[str | None, int, int]]:
    """Return the neighbours of the same block: its name, first and last position."""
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    return [(blocks[first], first, end - 1) for first, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def mark_blocks(ax: Axes, blocks: Sequence[str | None], inches: float, named: bool = True) -> None:
    """Draw lines between the blocks of layers at 0, 1, ..., unless these are too many, and write their names above.

    Args:
        ax: The axes.
        blocks: The block of each layer.
        inches: Width of the axes in a figure of two columns, which has room for as many names.
        named: Whether to write names.
    """
    runs, inches = _runs(blocks), inches * _share_of_width(ax)
    if len(runs) <= 80:
        edges, layer = [first - 0.5 for _, first, _ in runs[1:]], 2 if ax.images else 0
        ax.vlines(edges, 0, 1, transform=ax.get_xaxis_transform(), color=FAINT, lw=0.5, zorder=layer)
    if not named:
        return
    _write_above(ax, _block_labels(runs, inches / len(blocks)))


def head_blocks(ax: Axes, blocks: Sequence[str | None], inches: float, lines: bool = True) -> None:
    """Mark blocks with their whole names above axes, if all fit, else with numbers in short.

    The axes are so many inches wide in a figure of two columns.
    """
    runs, column = _runs(blocks), inches * ax.get_figure().get_figwidth() / WIDTH / len(blocks)
    fit = all(not block or width_of(block, SMALL) + 0.06 <= column * (last + 1 - first) for block, first, last in runs)
    if lines:
        mark_blocks(ax, blocks, inches, named=False)
    labels = {(first + last) / 2: block for block, first, last in runs if block}
    _write_above(ax, labels if fit else _block_labels(runs, column))


def _write_above(ax: Axes, labels: dict[float, str]) -> None:
    top = ax.secondary_xaxis("top")
    top.set_xticks(list(labels), list(labels.values()), fontsize=SMALL, color=SOFT)
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)


def _block_labels(runs: Sequence[tuple[str | None, int, int]], inches: float) -> dict[float, str]:
    """Return the names of blocks that there is room for, by position, where a layer takes so many inches.

    Of neighbours that differ in their number alone the first has its whole name, those after it their numbers: all, or
    every second, fifth, tenth ...
    """
    taken: list[tuple[float, float]] = []
    label_of: dict[float, str] = {}

    def added(run: tuple, label: str) -> bool:
        """Add a label above a run unless it would lie on another one; return whether it is there."""
        centre, half = (run[1] + run[2]) / 2, width_of(label, SMALL) / 2 + 0.03
        left, right = inches * centre - half, inches * centre + half
        free = all(right <= start or end <= left for start, end in taken)
        if free:
            taken.append((left, right))
            label_of[centre] = label
        return free

    kinds = [members for members in _of_one_kind(runs) if _kind_and_number(members[0][0])[0]]
    firsts = [
        next((i for i, run in enumerate(members) if added(run, cut(run[0], 1.2, SMALL))), len(members))
        for members in kinds
    ]
    for members, first in zip(kinds, firsts, strict=True):
        numbers = [(run, _kind_and_number(run[0])[1]) for run in members]
        room = max(width_of(number, SMALL) for _, number in numbers) + 0.06
        width = inches * (members[-1][2] + 1 - members[0][1]) / len(members)  # of a block
        step = next((step for step in STEPS if step * width >= room), len(members))
        for run, number in numbers[(first // step + 1) * step :: step]:
            added(run, number)
    return dict(sorted(label_of.items()))


def _of_one_kind(runs: Sequence[tuple]) -> list[list[tuple]]:
    """Return neighbours that differ in their number alone; where numbers begin anew, so do they."""
    kinds: list[list[tuple]] = []
    for run in runs:
        kind, number = _kind_and_number(run[0])
        if kinds and _kind_and_number(kinds[-1][-1][0])[0] == kind:
            last = _kind_and_number(kinds[-1][-1][0])[1]
            if int(number or 0) >= int(last or 0):
                kinds[-1].append(run)
                continue
        kinds.append([run])
    return kinds


def _kind_and_number(block: str | None) -> tuple[str, str]:
    """Return the words of a block's name and the number at its end, which may be empty."""
    return re.fullmatch(r"(.*?)(\d*)", block or "", re.DOTALL).groups()


def place(ax: Axes, points: Sequence, texts: Sequence[str], size: float, beside: bool, gap: float = 0.07) -> list[str]:
    """Write texts above or beside the first points, in this order, but none that would lie on another text or point.

    Args:
        ax: The axes, otherwise finished, of a figure whose layout is done, as that decides what lies on what.
        points: Points that no text may cover, float[., 2]; the first are the texts' own.
        texts: Texts of the first points.
        size: Size of the font.
        beside: Whether to try right, left, above and below; else only above.
        gap: Inches between a point and a text beside it.

    Returns:
        The texts that are written.
    """
    axes = ax.get_window_extent().extents / DPI  # in inches, as all that follows
    centres = ax.transData.transform(np.asarray(points, float).reshape(-1, 2)) / DPI
    taken = [(x - 0.05, y - 0.05, x + 0.05, y + 0.05) for x, y in centres]
    height, written = 1.15 * size / 72, []
    for (x, y), point, text in zip(centres, points, texts, strict=False):
        width = width_of(text, size)
        for dx, dy in _corners(width, height, gap if beside else None):
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            if _inside(box, axes) and not any(_overlap(box, other) for other in taken):
                offset = ((dx + width / 2) * 72, (dy + height / 2) * 72)
                centred = {"textcoords": "offset points", "ha": "center", "va": "center"}
                ax.annotate(text, point, offset, fontsize=size, **centred).set_in_layout(False)
                taken.append((box[0] - 0.04, box[1], box[2] + 0.04, box[3]))
                written.append(text)
                break
    return written


def _corners(width: float, height: float, gap: float | None) -> list[tuple[float, float]]:
    """Return where the lower left corner of a text may be, from its point, the best first; without a gap only above."""
    if gap is None:
        return [(-width / 2, 0.06)]
    above = [(-width / 2, gap - 0.01), (-gap, gap - 0.01), (gap - width, gap - 0.01)]  # also near edges
    slanting = [(0.7 * gap, 0.7 * gap), (-0.7 * gap - width, 0.7 * gap)]
    slanting += [(x, -0.7 * gap - height) for x, _ in slanting]
    beside = [(gap, -height / 2), (-gap - width, -height / 2)]
    return [*beside, *above, (-width / 2, 0.01 - gap - height), *slanting]


def _inside(box: Sequence[float], outer: Sequence[float]) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def _overlap(box: Sequence[float], other: Sequence[float]) -> bool:
    return other[0] < box[2] and box[0] < other[2] and other[1] < box[3] and box[1] < other[3]


def write_numbers(ax: Axes, values: np.ndarray, largest: float, height: float, width: float, digits: int = 0) -> bool:
    """Write the numbers in the cells of a map but NaN; return whether cells of so many inches have room for them.

    The width is that in a figure of two columns.
    """
    if height < 0.12 or width * _share_of_width(ax) < 0.25:
        return False
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        color = ON_CELLS[1] if value > TURN * largest else ON_CELLS[0]
        ax.text(
            column,
            row,
            f"{round(value, digits) + 0.0:.{digits}f}",
            ha="center",
            va="center",
            fontsize=SMALL,
            color=color,
        )
    return True


def map_legend(image: AxesImage, noun: str) -> list[Patch]:
    """Return patches of six steps of a map in percent: a bar of colours has no good place in a constrained layout."""
    most = image.norm.vmax
    steps = np.linspace(0, most, 6)
    patches = [Patch(fc=image.cmap(image.norm(step)), ec=INK, lw=0.5, label=f"{step:.0f} %") for step in steps]
    patches[-1].set_label(f"{most:.0f} % {noun}" if most >= 100 else f"{most:.0f} % {noun} or more")
    return patches
