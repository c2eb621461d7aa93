"""The figure of runs side by side: accuracy by the number of train LoRAs, or by run where no comparable runs grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from report.drawing import (
    BLUE,
    GREY,
    GROUND,
    INK,
    ORANGE,
    PALE,
    SIZE,
    SMALL,
    cut,
    cut_labels,
    lay_out,
    new_figure,
    set_height,
)
from report.figures import CHANCE
from report.fonts import letters_in
from report.rendering import files_of
from report.side_by_side import name_of, ordered
from report.wording import bounds, counted, listed, percent

NAME = "accuracy"
SHOWS = "Test accuracy of representations with all layers in each run, with intervals of 95 % and chance"
MOST_DRAWN, MOST_PANELS = 8, 4  # representations, and groups of comparable runs
COLORS, MARKERS, DASHES = (INK, BLUE, ORANGE, GREY), "oD^s", ("-", (0, (4, 1.5)))  # four times two
APART = 0.018  # of the axis, between intervals at the same number of LoRAs


def finding(comparison: dict) -> str:
    """Return what the figure shows in a sentence, without a full stop."""
    if not growing(comparison):
        count = counted(len(comparison["representations"]), "representation")
        return f"Test accuracy of {count} in {len(comparison['runs'])} runs"
    steps = [record for record in comparison["changes"] if record["train"][0] < record["train"][1]]
    gains = [record for record in steps if record["significant"] and record["difference"] > 0]
    if not gains:
        count = counted(len({record["representation"] for record in steps}), "representation")
        return f"No gain by more train LoRAs is shown for any of {count}" if steps else "Accuracy by train LoRAs"
    most = max(gains, key=lambda record: record["difference"])
    first, second = most["train"]
    points = f"{percent(most['difference'])} points ({bounds(most['interval'])})"
    return f"The largest gain by more LoRAs: {cut(most['representation'], 1.5)}, {points} from {first:,} to {second:,}"


def growing(comparison: dict) -> list[list[int]]:
    """Return the groups of comparable runs of different sizes, as many as are drawn."""
    return [group["runs"] for group in comparison["groups"] if group["grows"]][:MOST_PANELS]


def chosen(comparison: dict) -> list[str]:
    """Return the representations that are drawn: first those of several runs, then the best on validation LoRAs."""
    scores = comparison["representations"]
    return sorted(ordered(comparison), key=lambda name: len(scores[name]) < 2)[:MOST_DRAWN]


def draw(comparison: dict) -> dict[str, bytes]:
    """Return the files of the figure by name, as `report.rendering.files_of` does."""
    found = finding(comparison)
    quick = [run["quick"] for run in comparison["runs"]]
    note = " [--quick runs]" if all(quick) else " [some are --quick runs]" if any(quick) else ""
    with new_figure(NAME, found + note, letters_in([run["name"] for run in comparison["runs"]])) as figure:
        groups, names = growing(comparison), chosen(comparison)
        if groups:
            _panels(comparison, groups, names, figure)
        else:
            _dots(comparison, names, figure)
        lay_out(figure)
        return files_of(figure, NAME, found)


def _looks(i: int) -> dict:
    """Return color, marker and line of a representation."""
    color, second = COLORS[i % 4], i // 4
    filling = GROUND if second else color
    return {"color": color, "marker": MARKERS[i % 4], "mfc": filling, "mec": color, "ls": DASHES[second], "ms": 4}


def _legend(names: Sequence[str], comparison: dict, figure: Figure) -> None:
    labels = cut_labels(names, 1.6, SIZE)
    lines = [Line2D([], [], **_looks(i), label=label) for i, label in enumerate(labels)]
    lines.append(Line2D([], [], **CHANCE, label="chance"))
    legend = figure.legend(handles=lines, loc="outside lower center", ncols=4)
    runs = len(comparison["runs"]) - sum(map(len, growing(comparison)))
    _note_left_out(legend, len(comparison["representations"]) - len(names), runs)


def _note_left_out(legend: Legend, representations: int, runs: int) -> None:
    """Say in a legend how many representations and runs only the table has."""
    counts = [counted(count, noun) for count, noun in ((representations, "representation"), (runs, "run")) if count]
    if counts:
        best = "the best on validation LoRAs, those of several runs first; " if representations else ""
        legend.set_title(f"{best}only in the table: {listed(counts)}", {"size": SMALL})


def _panels(comparison: dict, groups: Sequence[Sequence[int]], names: Sequence[str], figure: Figure) -> None:
    """Draw accuracy by train LoRAs, comparable runs in one panel."""
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    set_height(figure, 0.8 + 2.9 * rows)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for ax, group in zip(axes, groups, strict=False):
        _growth(comparison, group, names, ax)
    for ax in axes[len(groups) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel("test accuracy, %")
    _legend(names, comparison, figure)


def _growth(comparison: dict, group: Sequence[int], names: Sequence[str], ax: Axes) -> None:
    runs = comparison["runs"]
    sizes = np.array([runs[i]["train"] for i in group], float)
    low, high = np.log10(sizes.min()), np.log10(sizes.max())
    room = 0.12 * (high - low)
    ax.set_xscale("log")
    ax.set_xlim(10 ** (low - room), 10 ** (high + room))
    for i, name in enumerate(names):
        scores = {record["run"]: record for record in comparison["representations"][name]}
        there = [run for run in group if run in scores]
        shift = 10 ** (APART * (high - low) * (i - (len(names) - 1) / 2))
        x = [shift * runs[run]["train"] for run in there]
        y, looks = [100 * scores[run]["accuracy"] for run in there], _looks(i)
        ax.plot(x, y, **looks | {"ls": "none"}, clip_on=False, zorder=2)
        for n in np.flatnonzero(np.diff(x)):  # no line from one collection to another of as many LoRAs
            ax.plot(x[n : n + 2], y[n : n + 2], color=looks["color"], ls=looks["ls"], zorder=1.5)
        for at, run in zip(x, there, strict=True):
            if interval := scores[run]["interval"]:
                ax.vlines(at, 100 * interval[0], 100 * interval[1], color=looks["color"], lw=0.9, zorder=1)
    ax.plot(sizes, [100 * runs[i]["chance"] for i in group], **CHANCE, zorder=0.5)
    ax.set_ylim(0, 102)
    distinct = sorted(set(sizes))
    ax.xaxis.set_major_locator(FixedLocator(distinct))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    labels = cut_labels([_at(comparison, group, size) for size in distinct], 2.4 / len(distinct), SMALL)
    ax.set_xticklabels([f"{size:,.0f}\n{label}" for size, label in zip(distinct, labels, strict=True)])
    ax.set_xlabel("train LoRAs (logarithmic)")


def _at(comparison: dict, group: Sequence[int], size: float) -> str:
    """Return the names of the runs of a group that have so many train LoRAs."""
    return ", ".join(name_of(comparison, i) for i in group if comparison["runs"][i]["train"] == size)


def _dots(comparison: dict, names: Sequence[str], figure: Figure) -> None:
    """Draw a row for each representation, in it a point for each run."""
    runs = comparison["runs"]
    order = [i for group in comparison["groups"] for i in group["runs"]]
    drawn = order[:MOST_DRAWN]
    set_height(figure, 1.3 + len(names) * (0.2 + 0.09 * len(drawn)))
    ax = figure.subplots()
    ax.hlines(range(len(names)), 0, 1, transform=ax.get_yaxis_transform(), color=PALE, lw=0.5, zorder=0)
    for k, run in enumerate(drawn):
        looks, up = _looks(k) | {"ls": "none"}, 0.7 * ((k + 0.5) / len(drawn) - 0.5)
        for row, name in enumerate(names):
            record = next((record for record in comparison["representations"][name] if record["run"] == run), None)
            if record is None:
                continue
            if interval := record["interval"]:
                ax.hlines(row + up, 100 * interval[0], 100 * interval[1], color=looks["color"], lw=1)
            ax.plot(100 * record["accuracy"], row + up, **looks, clip_on=False)
    chances = sorted({runs[run]["chance"] for run in drawn})
    for chance in chances:
        ax.axvline(100 * chance, **CHANCE, zorder=0.5)
    ax.set_yticks(range(len(names)), cut_labels(names, 1.6, SIZE), fontsize=SIZE)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-1, 101)
    ax.set_xlabel("test accuracy, %, with 95 % intervals")
    labels = cut_labels([f"{name_of(comparison, i)}, {runs[i]['train']:,} train LoRAs" for i in drawn], 2.6, SIZE)
    lines = [Line2D([], [], **_looks(k) | {"ls": "none"}, label=label) for k, label in enumerate(labels)]
    lines.append(Line2D([], [], **CHANCE, label=f"chance, {' and '.join(map(percent, chances))} %"))
    legend = figure.legend(handles=lines, loc="outside lower center", ncols=2)
    _note_left_out(legend, len(comparison["representations"]) - len(names), len(order) - len(drawn))
