"""The figures of the results, each as PNG, SVG and PDF: the finding above it, its drawing, its place on the page.

A new figure is a row of ``FIGURES`` at the end, and the functions that it names. Nothing but the content of
results.json is read, and the same content gives the same bytes.

Shape letters: L layers in the network's order, P modules, C classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from report import dynamics as steps_of_training
from report import fonts
from report.by_block import MOST_LAYERS, in_blocks
from report.drawing import (
    BLUE,
    COLUMN,
    FAINT,
    GREY,
    GROUND,
    INK,
    ORANGE,
    PALE,
    SIZE,
    SMALL,
    WIDTH,
    cut,
    cut_labels,
    head_blocks,
    in_one_column,
    lay_out,
    new_figure,
    place,
    set_height,
)
from report.figures_of_holdout import holdout_figure, holdout_finding
from report.figures_of_layers import (
    concept_layer_map,
    concept_layer_map_finding,
    layer_clusters,
    layer_clusters_finding,
    layer_importance,
    layer_importance_finding,
)
from report.figures_of_modules import (
    attention,
    attention_finding,
    collection_map,
    collection_map_finding,
)
from report.figures_of_steps import dynamics
from report.names import full_names
from report.rendering import files_of, is_readable
from report.wording import (
    NO_OTHERS,
    bounds,
    capital,
    classifier_name,
    correlation_text,
    first_removed,
    gain_text,
    listed,
    percent,
    runs_text,
    top_layers,
    whole_percent,
)

WIDTHS = {"report": {"": WIDTH}, "paper": {"": WIDTH, "_column": COLUMN}}  # by style: inches by the end of a name
NAMED = 2  # representations that a finding names at most; of more it says how many
NAMED_MODULES = 5  # of which concepts explain most, that are named
ALIKE = 1e-3  # spread of values by their size, below which they are all but the same
LEAST_ROOM = 0.1  # of that size, beside these
NAMED_POINTS = 12  # concepts that are named in a cloud of points at most
CHANCE = {"color": GREY, "lw": 0.9, "ls": (0, (6, 2, 1, 2))}  # the line at chance


@dataclass(frozen=True)
class FigureRow:
    """A figure, a row of ``FIGURES``.

    Attributes:
        name: Name of its files, without ending.
        section: Anchor of its section in report.html.
        needs: Sections of the analysis without which it cannot be drawn.
        finding: Function of the results that returns its finding, a sentence with its numbers; None where there is
            nothing to draw.
        draw: Function of the results and an empty figure, which draws on it.
        shows: Its content in words, for those who do not see it.
        of_layers: Whether each layer, or module, has a mark of its own: of more than 300 layers, blocks have.
    """

    name: str
    section: str
    needs: tuple[str, ...]
    finding: Callable[[dict], str | None]
    draw: Callable[[dict, Figure], None]
    shows: str
    of_layers: bool = False


def draw(
    results: dict,
    finding_of: dict[str, str] | None = None,
    attempt: Callable[[str, Callable], object] = lambda _, draw: draw(),
) -> dict[str, bytes]:
    """Draw all figures that the results have the data for, in the style that they name.

    Args:
        results: The content of results.json; it is not changed.
        finding_of: Its `findings`, where they are made already.
        attempt: Of a figure's name and a function that draws it: calls that, and notes where it fails.

    Returns:
        Content by file name, such as ``layer_importance.png``; empty without an analysis. A figure of a paper that
        can be read in one column is there again, such as ``layer_importance_column.pdf``. Names that begin with
        ``rendering.PAGE`` are no files: the page has them in place of an SVG that is too large for it.
    """
    files: dict[str, bytes] = {}
    style = style_of(results)

    def draw_one(name: str, finding: str) -> None:
        for suffix, width in WIDTHS[style].items():
            for _, _, figure in finished_figures(results, {name: finding}, width):
                if not suffix or is_readable(figure):
                    files.update(files_of(figure, f"{name}{suffix}", finding))

    for name, finding in (findings(results) if finding_of is None else finding_of).items():
        attempt(name, partial(draw_one, name, finding))
    return files


def style_of(results: dict) -> str:
    """Return the style that figures are asked for in."""
    return results.get("figures", {}).get("style", "report")


def without_font(results: dict) -> str:
    """Return the letters of names and sentences, sorted, that no font of this machine has."""
    return fonts.without_font(fonts.letters_in(results["analysis"]))


def findings(results: dict) -> dict[str, str]:
    """Return the finding of each figure that can be drawn; none without an analysis."""
    analysis = results.get("analysis") or {}
    sentences = {row.name: row.finding(results) for row in FIGURES if all(map(analysis.get, row.needs))}
    return {name: sentence for name, sentence in sentences.items() if sentence}


def finished_figures(
    results: dict, finding_of: dict[str, str] | None = None, width: float = WIDTH
) -> Iterator[tuple[str, str, Figure]]:
    """Yield name, finding and figure of all that can be drawn; a figure must be saved before the next is asked for."""
    finding_of, letters = findings(results) if finding_of is None else finding_of, fonts.letters_in(results["analysis"])
    for row in FIGURES:
        if row.name not in finding_of:
            continue
        shown, notes = results, ["[a --quick run]"] if results["config"]["quick"] else []
        if row.of_layers and (layers := _num_layers(results)) > MOST_LAYERS:
            shown, notes = in_blocks(results), [f"[blocks are shown, of {layers:,} layers]", *notes]
        title = " ".join([finding_of[row.name], *notes] if style_of(results) == "report" else notes)
        with new_figure(row.name, title, letters, style_of(results), width) as figure:
            row.draw(shown, figure)
            lay_out(figure)
            yield row.name, finding_of[row.name], figure


def _num_layers(results: dict) -> int:
    return len((results["analysis"].get("layers") or {"records": ()})["records"])


# ----------------------------------------------------------------------------------------------------------------------
# 2. Is prediction robust?
# ----------------------------------------------------------------------------------------------------------------------

CURVES = {  # of analysis.robustness: label and looks
    "most_first": ("most predictive first", {"color": INK, "marker": "o", "mfc": INK, "ls": "-"}),
    "least_first": ("least predictive first", {"color": BLUE, "marker": "s", "mfc": GROUND, "ls": (0, (5, 1.5))}),
    "random_order": ("random order", {"color": ORANGE, "marker": "^", "mfc": GROUND, "ls": (0, (1, 1))}),
}


def _ablation_curves_finding(results: dict) -> str:
    sections = results["analysis"]["robustness"]
    name, section = next(iter(sections.items()))
    random, runs = section["without_random"], runs_text(results, name)
    others = NO_OTHERS
    if random["draws"]:
        drawn = "a random other" if section["most"] == 1 else f"{section['most']} random others"
        reached = percent(random["mean"]) if random["draws"] == 1 else bounds((random["min"], random["max"]))
        others = f"without {drawn} {reached} %"
    in_runs = f" in {runs}" if runs else ""
    first, left = first_removed(section["most"], section), percent(section["without_most"]["accuracy"])
    finding = (
        f"Without the {first} {cut(name, 1.5)} reaches {left} %{in_runs} "
        f"(with all {percent(section['all']['accuracy'])} %, {others}): {section['verdict']}"
    )
    verdicts = {name: section["verdict"] for name, section in sections.items()}
    del verdicts[name]
    if not verdicts:
        return finding
    counts = Counter(verdicts.values())
    parts = [f"{count} {verdict}" for verdict, count in counts.items()]
    if len(verdicts) <= NAMED:
        parts = [f"{cut(other, 1.5)} {verdict}" for other, verdict in verdicts.items()]
    return f"{finding}; {', '.join(parts)}"


def _ablation_curves(results: dict, figure: Figure) -> None:
    sections, chance = results["analysis"]["robustness"], 100 * results["analysis"]["layers"]["chance"]
    columns = 1 if in_one_column(figure) else 2 if len(sections) == 4 else min(3, len(sections))
    rows = math.ceil(len(sections) / columns)
    set_height(figure, 1.0 + 2.3 * rows)
    grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[3, {1: 0.8, 2: 1.1, 3: 1.6}[columns]] * columns)
    first, units = None, [section["unit"] for section in sections.values()]
    for i, (name, section) in enumerate(sections.items()):
        row, column = divmod(i, columns)
        ax = figure.add_subplot(grid[row, 2 * column], sharey=first)
        first = first or ax
        beside = figure.add_subplot(grid[row, 2 * column + 1], sharey=first)
        lowest = i + columns >= len(sections)
        _curves(ax, name, section)
        _removals(beside, section, named=lowest)
        for either in (ax, beside):
            either.axhline(chance, **CHANCE, zorder=0.5)
        if column == 0:
            ax.set_ylabel("accuracy, %")
        if lowest or units[i + columns] != units[i]:
            ax.set_xlabel(f"{section['unit']}s removed")
    first.set_ylim(0, 104)
    lines = [Line2D([], [], **looks, ms=4, label=label) for label, looks in CURVES.values()]
    if any(section["without_random"]["draws"] for section in sections.values()):
        lines.append(Line2D([], [], ls="none", marker="_", ms=8, color=ORANGE, label="one random draw"))
    lines.append(Line2D([], [], **CHANCE, label=f"chance, {chance:.1f} %"))
    figure.legend(handles=lines, loc="outside lower center", ncols=5, columnspacing=1.2)


def _curves(ax: Axes, name: str, section: dict) -> None:
    """Draw accuracies against the number of units removed, in each order."""
    for curve, (_, looks) in CURVES.items():
        values = section["curves"][curve]
        low, high, accuracy = (100 * np.array(values[key], float) for key in ("low", "high", "accuracy"))
        ax.fill_between(values["removed"], low, high, color=looks["color"], alpha=0.15, lw=0)
        ax.plot(values["removed"], accuracy, **looks, ms=3.6, mew=0.8)
    lines, left = [f"{cut(name, 1.3)}: {section['verdict']}"], section["survives_most"]
    if left and left["interval"]:
        share = f"{whole_percent(left['share'])} % ({bounds(left['interval'], whole_percent)})"
        lines.append(f"{share} left without {section['most']}")
    lowest = section["survives_half"]
    if lowest and lowest["interval"] and lowest["removed"] != section["most"]:
        share = f"{whole_percent(lowest['share'])} % ({bounds(lowest['interval'], whole_percent)})"
        lines.append(f"{share} left without {lowest['removed']}")
    ax.set_title("\n".join(lines), fontsize=SMALL + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _removals(ax: Axes, section: dict, named: bool) -> None:
    """Draw the removal of the most predictive units beside its controls; random draws are dashes, with their mean."""
    labels = ["all", "no top", "no most", "no random", "no bottom", "top only"]
    kinds = {0: "all", 1: "without_top", 2: "without_most", 4: "without_bottom", 5: "top_alone"}
    for x, kind in kinds.items():
        if interval := section[kind]["interval"]:
            ax.vlines(x, 100 * interval[0], 100 * interval[1], color=INK, lw=1)
        filling = INK if kind == "without_most" else GROUND
        ax.plot(x, 100 * section[kind]["accuracy"], "o", color=filling, mec=INK, ms=4)
    if section["without_random"]["draws"]:
        ax.hlines(100 * np.array(section["without_random"]["accuracies"]), 2.5, 3.5, color=ORANGE, lw=0.8)
        ax.plot(3, 100 * section["without_random"]["mean"], "^", color=GROUND, mec=INK, ms=3.5)
    else:
        centred = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "center", "rotation": 90}
        ax.text(3, 0.5, NO_OTHERS, **centred, fontsize=SMALL, bbox={"fc": GROUND, "ec": "none", "pad": 1})
    ax.set_xticks(range(len(labels)), labels if named else [], rotation=90, fontsize=SMALL)
    ax.set_xlim(-0.6, len(labels) - 0.4)
    ax.tick_params(labelleft=False)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Which representation is best?
# ----------------------------------------------------------------------------------------------------------------------


def _accuracies(results: dict, name: str) -> tuple[float, float]:
    """Return the accuracies of a representation with all layers, and without the top k."""
    return tuple(results[kind][name]["test_accuracy"]["mean"] for kind in ("baseline_results", "ablation_results"))


def _representations_finding(results: dict) -> str:
    section, k = results["analysis"]["representations"], results["config"]["top_k"]
    compared, total = section["conditions"]["baseline"], len(section["drops"])
    best, similar = compared["best"], compared["not_worse"]
    if best is None:
        if total == 1:
            return f"{next(iter(section['drops']))} is indistinguishable from chance with all layers"
        if compared["above_null"]:
            chosen = cut(compared["chosen"], 1.5)
            return f"None is best: the first by validation accuracy, {chosen}, is indistinguishable from chance"
        return f"None of {total} representations is distinguishable from chance with all layers"
    whole, left = _accuracies(results, best)
    reached = f"{percent(whole)} % with all layers, {percent(left)} % without {top_layers(k)}"
    losses = len(section["significant_losses"])
    if total == 1:
        return f"{best}: {reached}, {'a' if losses else 'no'} significant loss"
    names = listed([cut(name, 1.5) for name in similar]) if 0 < len(similar) <= NAMED else f"{len(similar)} others"
    equal = len({*compared["tied_on_validation"]} & {*similar})
    tied = f", {equal} of them equal on validation" if equal and len(similar) > 1 else ""
    others = f" ({names} not significantly worse{tied})" if similar else ""
    removed = "it" if k == 1 else "them"
    return (
        f"{best} is best by validation{others}: {reached}; removing {removed} lowers {losses} of {total} "
        "representations significantly"
    )


def _representations(results: dict, figure: Figure) -> None:
    section, k = results["analysis"]["representations"], results["config"]["top_k"]
    compared = section["conditions"]["baseline"]
    best = compared["best"]
    order = list(section["drops"])  # of equals the best stands first, then as in the tables
    names = sorted(order, key=lambda name: (_accuracies(results, name), name == best, -order.index(name)))
    set_height(figure, 1.45 + 0.24 * len(names))
    ax = figure.subplots()
    ax.hlines(range(len(names)), 0, 1, transform=ax.get_yaxis_transform(), color=PALE, lw=0.5, zorder=0)
    conditions = (  # position, colour, marker, its filling, label
        ("baseline", 0.14, INK, "o", INK, "all layers"),
        ("ablation", -0.14, ORANGE, "D", GROUND, f"without the top {k}"),
    )
    for i, (condition, up, color, marker, filling, label) in enumerate(conditions):
        heights = np.arange(len(names)) + up
        accuracy = [100 * _accuracies(results, name)[i] for name in names]
        intervals = 100 * np.array([section["conditions"][condition]["intervals"][name] for name in names])
        ax.hlines(heights, *intervals.T, color=color, lw=1.3)
        ax.plot(
            accuracy,
            heights,
            ls="none",
            marker=marker,
            mfc=filling,
            mec=INK,
            ms=4.2,
            mew=0.9,
            label=label,
            clip_on=False,
        )
    chance = 100 * results["analysis"]["layers"]["chance"]
    ax.axvline(chance, **CHANCE, zorder=0.5, label=f"chance, {chance:.1f} %")
    ax.set_yticks(range(len(names)), cut_labels(names, 1.6, SIZE), fontsize=SIZE)
    for name, label in zip(names, ax.get_yticklabels(), strict=True):
        if name in {best, *compared["not_worse"]} & {*compared["above_null"]} and len(names) > 1:
            label.set_fontweight("bold")
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlim(-1, 101)
    ax.set_xlabel("test accuracy, %, with 95 % intervals")
    alpha = results["analysis"]["alpha"]
    ax.set_title(f"change in points; * p < {alpha} (all together)", loc="right", fontsize=SMALL + 0.5)
    if best and len(names) > 1:
        ax.set_title("bold: best, or not significantly worse", loc="left", fontsize=SMALL + 0.5)
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(len(names)), [gain_text(section["drops"][name]) for name in names])
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Does rank structure matter?
# ----------------------------------------------------------------------------------------------------------------------


def _rank_structure_finding(results: dict) -> str | None:
    section = results["analysis"]["rank_structure"]
    if section["tested"] is None:
        return None
    differs = f"differs by concept in {section['num_significant']} of {len(section['modules'])} modules"
    if not section["answerable"]:
        return f"{capital(section['why']).rstrip('.')}; the {section['tested']} {differs}"
    spread = section["complexity"]["spearman_spread"]
    correlated = f"; its correlation with spread is {correlation_text(spread)}" if spread else ""
    return f"{capital(section['tested'])} {differs}{correlated}"


def _rank_structure(results: dict, figure: Figure) -> None:
    section = results["analysis"]["rank_structure"]
    classes = section["complexity"]["by_class"]
    set_height(figure, 5.2)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
    field = "effective_rank" if section["answerable"] else "norm"
    measured = [record[field] for record in classes]
    source = cut(classifier_name(section["complexity"]["recall_by"]), min(1.3, 0.18 * figure.get_figwidth()))
    plotted = (("spread", 1, "spread of the concept's features"), ("recall", 100, f"recall by {source}, %"))
    scatters, first = [], None
    for column, (key, scale, label) in enumerate(plotted):
        ax = figure.add_subplot(grid[0, column], sharey=first)
        first = first or ax
        x = scale * np.array([record[key] for record in classes], float)  # NaN, not drawn, without a test LoRA
        size = float(np.clip(40 / math.sqrt(len(x)), 2.5, 4.5))
        ax.plot(x, measured, "o", color=BLUE, mec=INK, mew=0.5, ms=size)
        correlation = section["complexity"][f"spearman_{key}"]
        measured_text = correlation_text(correlation) if correlation else "not measured"
        ax.set_title(f"Spearman correlation {measured_text}")
        ax.set_xlabel(label)
        ax.set_xlim(*((-8, 108) if key == "recall" else _limits(x)))
        scatters.append((ax, x))
    first.set_ylabel(f"{section['tested']}, mean")
    first.set_ylim(*_limits(measured))
    _modules(results, figure.add_subplot(grid[1, :]))
    labels, middle = cut_labels([record["class"] for record in classes], 0.9, SMALL), np.median(measured)
    order = sorted(range(len(classes)), key=lambda c: (-abs(measured[c] - middle), c))  # the extremes are named first
    for ax, x in scatters:
        place(ax, [(x[c], measured[c]) for c in order], [labels[c] for c in order[:NAMED_POINTS]], SMALL, beside=True)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return limits of an axis around values; of values that are all but the same those of their size, not of noise."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    if not len(known):
        return 0, 1
    low, high = float(known.min()), float(known.max())
    size, room = max(abs(low), abs(high)), 0.12 * (high - low)
    if high - low < ALIKE * size:
        room = LEAST_ROOM * size
    return (low - room, high + room) if room else (-0.08, 1.08)


def _modules(results: dict, ax: Axes) -> None:
    """Draw how much concepts explain of each module's measure: ε² of the Kruskal-Wallis test."""
    modules, alpha = results["analysis"]["rank_structure"]["modules"], results["analysis"]["alpha"]
    records = {record["module"]: record for record in (results["analysis"].get("layers") or {}).get("records", ())}
    places = [records.get(module["module"], {}) for module in modules]
    explained = np.array([100 * min(1, module["effect"]) for module in modules])
    differs = np.array([module["significant"] for module in modules])
    positions = np.arange(len(modules))
    ax.vlines(positions, 0, explained, color=FAINT, lw=min(1, 60 / len(modules)))
    looks = {"mec": INK, "mew": 0.5, "ms": float(np.clip(250 / len(modules), 2.5, 5))}
    in_blocks = "num_layers_shown" in results
    label = f"{'a module ' if in_blocks else ''}differs by concept (FDR {100 * alpha:.0f} %): {differs.sum()}"
    ax.plot(positions[differs], explained[differs], "o", color=BLUE, **looks, label=label)
    ax.plot(
        positions[~differs], explained[~differs], "o", color=GROUND, **looks, label=f"not shown to: {(~differs).sum()}"
    )
    highest = max(1, 1.2 * explained.max())
    ax.set_ylim(-0.04 * highest, highest)
    ax.set_xlim(-0.5 - 0.01 * len(modules), 1.01 * len(modules) - 0.5)
    ax.set_ylabel("explained by\nconcept, % (ε²)")
    ax.set_xlabel("blocks in the network's order, means of modules" if in_blocks else "modules in the network's order")
    blocks = [record.get("block") for record in places]
    head_blocks(ax, blocks, WIDTH - 0.7)
    ax.xaxis.set_major_locator(NullLocator() if all(blocks) else MaxNLocator(integer=True, min_n_ticks=1))
    figure = ax.get_figure()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    most = sorted(range(len(modules)), key=lambda i: (-explained[i], i))
    names = full_names(results["analysis"])
    texts = cut_labels(
        [names.get(modules[i]["module"], modules[i]["module"]) for i in most[:NAMED_MODULES]], 1.2, SMALL
    )
    figure.get_layout_engine().execute(figure)
    stems = [(i, height) for i in positions for height in np.linspace(0, explained[i], 8)]
    place(ax, [*((i, explained[i]) for i in most), *stems], texts, SMALL, beside=True, gap=0.09)


# fmt: off
FIGURES = (
    FigureRow("layer_importance", "layers", ("layers",), layer_importance_finding, layer_importance,
              "Accuracy of each layer alone by its depth in the network, against chance", True),
    FigureRow("ablation_curves", "robustness", ("layers", "robustness"), _ablation_curves_finding, _ablation_curves,
              "Accuracy as layers are removed, in three orders"),
    FigureRow("representations", "representations", ("layers", "representations"), _representations_finding,
              _representations, "Accuracy of each representation with all layers and without the top ones"),
    FigureRow("concept_layer_map", "concepts", ("layers", "concepts"), concept_layer_map_finding, concept_layer_map,
              "Recall of each concept from each layer alone", True),
    FigureRow("layer_clusters", "information", ("layers", "layer_information"), layer_clusters_finding,
              layer_clusters, "Layers by the similarity of their features", True),
    FigureRow("rank_structure", "rank", ("rank_structure",), _rank_structure_finding, _rank_structure,
              "Effective rank, or norm, of the updates by concept", True),
    FigureRow("attention", "modules", ("layers", "attention"), attention_finding, attention,
              "Attention to each module, and what it adds to each concept", True),
    FigureRow("collection_map", "modules", ("collection_map",), collection_map_finding, collection_map,
              "The LoRAs in the plane, by all layers and by single modules"),
    FigureRow("holdout", "holdout", ("holdout",), holdout_finding, holdout_figure,
              "Accuracy on each value that was held out, beside the ordinary split's"),
    FigureRow("dynamics", "dynamics", ("dynamics",), steps_of_training.finding, dynamics,
              "Accuracy by step of the training, of representations and of each module alone"),
)
# fmt: on
