"""The figure of values that were held out: accuracy by value, beside that of the ordinary split on the same value."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from report.drawing import BLUE, GREY, GROUND, INK, PALE, SIZE, SMALL, cut, cut_labels, in_one_column, set_height
from report.wording import bounds, capital, counted, percent

HELD = {"color": INK, "marker": "o", "mfc": INK}
ORDINARY = {"color": BLUE, "marker": "s", "mfc": GROUND}
ROW, STACKED_ROW = 0.24, 0.18  # inches of a value; of one where panels are stacked
APART = 0.17  # half of what the two accuracies of a value lie apart, in rows
NAME = 1.1  # inches of a value's name


def holdout_finding(results: dict) -> str | None:
    """Return what is reached and lost on average, and the worst value; None where nothing was tested."""
    section = results["analysis"]["holdout"]
    if not section["representations"]:
        return None
    name, record = section["best"], section["representations"][section["best"]]
    column, loss, worst = cut(section["column"], 1.5), record["loss"], cut(record["worst"], 1.5)
    place = [value["value"] for value in section["values"]].index(record["worst"])
    beside = ""
    if loss:
        gains = percent(loss["mean"]).startswith("-")
        interval = sorted(-bound if gains else bound for bound in loss["interval"])
        verb, points = ("gains", -loss["mean"]) if gains else ("loses", loss["mean"])
        beside = f" and {verb} {percent(points)} points ({bounds(interval)}) beside the ordinary split"
    accuracies = [percent(found["accuracy"]) for found in record["values"]]
    lowest = "; each alike" if len({*accuracies}) == 1 else f"; the worst is {worst}, {accuracies[place]} %"
    return (
        f"{capital(record['verdict'])}: on a value of {column} that no training saw {name} reaches "
        f"{percent(record['held_out']['accuracy'])} %{beside}, on average over "
        f"{counted(len(section['values']), 'value')}{lowest}"
    )


def holdout_figure(results: dict, figure: Figure) -> None:
    """Draw a panel for each representation, with a row for each value; in one column they stand below each other."""
    section = results["analysis"]["holdout"]
    records, stacked = section["representations"], in_one_column(figure)
    rows, columns = (len(records), 1) if stacked else (1, len(records))
    height = 0.45 + (STACKED_ROW if stacked else ROW) * len(section["values"])
    set_height(figure, 0.85 + rows * height)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    labels = cut_labels([value["value"] for value in section["values"]], NAME, SIZE)
    for number, (ax, (name, record)) in enumerate(zip(axes, records.items(), strict=True)):
        _panel(ax, section, record)
        if stacked or number == 0:
            ax.set_ylabel(cut(section["column"], 1.5))
        ax.set_title(f"{name}: {record['verdict']}", fontsize=SMALL + 0.5)
        ax.set_yticks(range(len(labels)), labels, fontsize=SMALL + 0.5)
        if not stacked or number == len(records) - 1:
            ax.set_xlabel("accuracy, %" if columns > 1 else "accuracy, %, with 95 % intervals")
    axes[0].set_ylim(len(labels) - 0.4, -0.6)  # the first value on top
    axes[0].set_xlim(-2, 102)
    entries = [
        Line2D([], [], **HELD, ls="-", ms=4, label=f"{cut(section['column'], NAME)} held out"),
        Line2D([], [], **ORDINARY, ls="-", ms=4, label="ordinary split"),
        Line2D([], [], color=GREY, marker="|", ls="none", ms=8, mew=1.4, label="chance"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=3)


def _panel(ax: Axes, section: dict, record: dict) -> None:
    """Draw both accuracies of each value with their intervals, and chance: the largest class of the train LoRAs."""
    heights = np.arange(len(section["values"]))
    ax.hlines(heights, 0, 1, transform=ax.get_yaxis_transform(), color=PALE, lw=0.5, zorder=0)
    chance = [100 * value["chance"] for value in section["values"]]
    ax.plot(chance, heights, "|", color=GREY, ms=9, mew=1.4, zorder=1)
    usual = [(height, found["ordinary"]) for height, found in enumerate(record["values"]) if found["ordinary"]]
    held = list(enumerate(record["values"]))
    for looks, up, estimates in ((HELD, -APART, held), (ORDINARY, APART, usual)):
        for height, estimate in estimates:
            low, high = (100 * bound for bound in estimate["interval"])
            ax.hlines(height + up, low, high, color=looks["color"], lw=1.2)
            ax.plot(
                100 * estimate["accuracy"],
                height + up,
                ls="none",
                marker=looks["marker"],
                mfc=looks["mfc"],
                mec=looks["color"],
                ms=4.2,
                mew=0.9,
                clip_on=False,
            )
