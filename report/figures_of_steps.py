"""The figure of steps of the training; figures.py has its row in its table.

Shape letters: S steps, P modules in the network's order.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from report.drawing import (
    BLUE,
    GREY,
    GROUND,
    INK,
    ORANGE,
    SMALL,
    WIDTH,
    cut,
    head_blocks,
    in_one_column,
    map_legend,
    set_height,
    width_of,
)
from report.names import short_names

NAMED_MODULES = 40  # below the map, at most
CURVES = {  # of a representation: looks
    "each": {"color": INK, "marker": "o", "mfc": INK, "ls": "-"},
    "last": {"color": ORANGE, "marker": "^", "mfc": GROUND, "ls": (0, (5, 1.5))},
}
CHANCE = {"color": GREY, "lw": 0.9, "ls": (0, (6, 2, 1, 2))}
ONSET = {"ls": "none", "marker": "o", "ms": 3.4, "mew": 0.8, "mfc": GROUND, "mec": INK}
FIRST = {"color": BLUE, "lw": 0.8, "ls": (0, (1, 1.5))}  # the line at an onset


def dynamics(results: dict, figure: Figure) -> None:
    """Draw accuracy by step of each representation, and below that of each module alone as a map."""
    section = results["analysis"]["dynamics"]
    curves, modules = section["representations"], section["modules"]
    across = 1 if in_one_column(figure) else len(curves)
    rows, names = -(-len(curves) // across), _names(results, figure)
    room = max((width_of(name, SMALL) for name in names), default=0.0)
    below = 0.9 + 0.16 * len(section["steps"]) + room if modules else 0.0
    set_height(figure, 0.9 + 1.9 * rows + below)
    heights = [1.9] * rows + ([below] if modules else [])
    grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
    first = None
    for i, name in enumerate(curves):
        ax = figure.add_subplot(grid[i // across, i % across], sharey=first)
        first = first or ax
        _curves(ax, section, name, labelled=i % across == 0)
    entries = [
        Line2D([], [], **CURVES["each"], ms=4, label="trained at each step"),
        Line2D([], [], **CURVES["last"], ms=4, label=f"trained at {_name(section['steps'][-1])} alone"),
        Line2D([], [], **CHANCE, label=f"chance, {100 * section['chance']:.1f} %"),
        Line2D([], [], **FIRST, label="onset"),
    ]
    if modules:
        image = _map(figure.add_subplot(grid[rows, :]), section, names)
        entries += [Line2D([], [], **ONSET, label="onset of a module"), *map_legend(image, "of the test LoRAs")]
    figure.legend(handles=entries, loc="outside lower center", ncols=4, fontsize=SMALL, columnspacing=1.2)


def _name(step: str) -> str:
    return "the final step" if step == "final" else f"step {step}"


def _curves(ax: Axes, section: dict, name: str, labelled: bool) -> None:
    """Draw both curves of a representation against the step, which doubles from mark to mark of the axis."""
    curve, places = section["representations"][name], section["places"]
    for how, looks in CURVES.items():
        points = curve[how]["points"]
        low, high = 100 * np.array([point["interval"] for point in points]).T
        ax.fill_between(places, low, high, color=looks["color"], alpha=0.15, lw=0)
        ax.plot(places, [100 * point["accuracy"] for point in points], **looks, ms=3.6, mew=0.8)
    ax.axhline(100 * section["chance"], **CHANCE, zorder=0.5)
    if onset := curve["each"]["onset"]:
        ax.axvline(places[section["steps"].index(onset)], **FIRST, zorder=0.4)
    ax.set_title(f"by {cut(name, 1.6)}", fontsize=SMALL + 0.5)
    shown = _apart(
        section["steps"], places, ax.get_figure().get_figwidth() / (1.2 if in_one_column(ax.figure) else 2.4)
    )
    ax.set_xticks([places[s] for s in shown], [section["steps"][s] for s in shown], fontsize=SMALL)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("step of the training")
    ax.set_ylim(0, 104)
    if labelled:
        ax.set_ylabel("accuracy, %,\n95 % interval")
    else:
        ax.tick_params(labelleft=False)


def _apart(steps: list[str], places: list[float], inches: float) -> list[int]:
    """Return the steps whose names have room below an axis of so many inches, from the last one back."""
    span, kept, edge = max(places[-1] - places[0], 1e-9), [], np.inf
    for s in reversed(range(len(steps))):
        centre, half = inches * (places[s] - places[0]) / span, width_of(steps[s], SMALL) / 2 + 0.03
        if centre + half <= edge:
            kept.append(s)
            edge = centre - half
    return kept[::-1]


def _names(results: dict, figure: Figure) -> list[str]:
    """Return the names below the map; none where there is no room."""
    modules = results["analysis"]["dynamics"]["modules"]
    if not modules or len(modules["records"]) > NAMED_MODULES * figure.get_figwidth() / WIDTH:
        return []
    short = short_names(results["analysis"])
    return [cut(short.get(record["module"], record["module"]), 0.9, SMALL) for record in modules["records"]]


def _map(ax: Axes, section: dict, names: list[str]) -> AxesImage:
    """Draw the accuracy of each module alone, trained at each step, later steps above, with its onset."""
    records, steps = section["modules"]["records"], section["steps"]
    accuracy = 100 * np.array([record["each"]["accuracy"] for record in records]).T  # (S, P)
    top = max(20.0, 10 * np.ceil(accuracy.max() / 10))
    image = ax.imshow(accuracy, cmap="YlGnBu", vmin=0, vmax=top, aspect="auto", origin="lower", interpolation="nearest")
    onsets = [(p, steps.index(record["each"]["onset"])) for p, record in enumerate(records) if record["each"]["onset"]]
    if onsets:
        size = float(np.clip(120 / len(records), 0.8, ONSET["ms"]))
        ax.plot(*np.array(onsets).T, **ONSET | {"ms": size, "mew": min(0.8, size / 4)})
    head_blocks(ax, [record["block"] for record in records], WIDTH - 0.7)
    ax.set_yticks(range(len(steps)), steps, fontsize=SMALL)
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=SMALL)
    ax.tick_params(length=0)
    ax.set_ylabel("step, trained\nand tested there")
    ax.set_xlabel("modules in order")
    return image
