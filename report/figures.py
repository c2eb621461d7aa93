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
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from report import fonts
from report.by_block import MOST_LAYERS, in_blocks
from report.drawing import (
    BLUE,
    COLUMN,
    FAINT,
    GREY,
    GROUND,
    INK,
    MARKERS,
    ON_CELLS,
    ORANGE,
    PALE,
    SIZE,
    SMALL,
    WIDTH,
    cut,
    cut_labels,
    lay_out,
    map_legend,
    mark_blocks,
    new_figure,
    place,
    set_height,
    write_numbers,
)
from report.figures_of_modules import (
    attention,
    attention_finding,
    collection_map,
    collection_map_finding,
    layer_clusters,
    layer_clusters_finding,
)
from report.rendering import files_of, is_readable
from report.wording import (
    NO_OTHERS,
    bounds,
    capital,
    classifier_name,
    correlation_text,
    gain_text,
    listed,
    percent,
    runs_text,
    top_layers,
    whole_percent,
)

WIDTHS = {"report": {"": WIDTH}, "paper": {"": WIDTH, "_column": COLUMN}}  # by style: inches by the end of a name
NAMED = 2  # representations that a finding names at most; of more it says how many
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
# 1. Which layers predict?
# ----------------------------------------------------------------------------------------------------------------------


def _layer_importance_finding(results: dict) -> str:
    section = results["analysis"]["layers"]
    known, above, total = section["num_above_null"], section["num_above_chance"], len(section["records"])
    finding = f"{above or 'None'} of {total} layers {'predict' if above > 1 else 'predicts'} above chance"
    if known > above:
        verb = "knows" if known == 1 else "know"
        finding = (
            f"{known} of {total} layers {verb} something of the concept, {above or 'none'} more than guessing does"
        )
    roles = sorted(section["groups"]["role"].items(), key=lambda item: -item[1]["mean"])
    if len(roles) != 2:
        return finding
    (high, first), (low, second) = roles
    reached = f"{percent(first['mean'])} and {percent(second['mean'])} %"
    compared = f"{high} factors reach more than {low} ({reached})"
    if not section["better_role"]:
        compared = f"{high} and {low} factors reach {reached} on average"
    return f"{finding}; {compared}"


def _layer_importance(results: dict, figure: Figure) -> None:
    section = results["analysis"]["layers"]
    records, rank_of = section["records"], {name: rank for rank, name in enumerate(results["top_layers"], 1)}
    roles = list(dict.fromkeys(record["role"] for record in records))
    set_height(figure, 1.3 + 1.7 * len(roles))
    axes = figure.subplots(len(roles), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    highest = max(min(1, section["needed"]), *(record["interval"][1] for record in records))
    axes[0].set_ylim(0, 115 * highest + 2)  # room for ranks above the intervals
    blocks = list({record["depth"]: record["block"] for record in records}.values())
    for ax, role in zip(axes, roles, strict=True):
        mark_blocks(ax, blocks, WIDTH - 0.7, named=ax is axes[0])
        _layers_of_role(ax, section, role, rank_of)
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if tick <= min(100, axes[0].get_ylim()[1])])
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    depth = section["depth"]
    correlation = f"; Spearman correlation of blocks {correlation_text(depth)}" if not depth["why"] else ""
    place_of = "block" if "num_layers_shown" in results else "layer"
    axes[-1].set_xlabel(f"depth: position of the {place_of} in the network{correlation}")
    handles = _layer_legend(section, len(rank_of), results.get("num_layers_shown"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.get_layout_engine().execute(figure)
    for ax, role in zip(axes, roles, strict=True):
        members = [record for record in records if record["role"] == role]
        members.sort(key=lambda record: rank_of.get(record["layer"], math.inf))
        points = [(record["depth"], 100 * record["interval"][1]) for record in members]
        ranks = [str(rank_of[record["layer"]]) for record in members if record["layer"] in rank_of]
        place(ax, points, ranks, SMALL, beside=False)


def _layers_of_role(ax: Axes, section: dict, role: str, rank_of: dict[str, int]) -> None:
    """Draw accuracies of the layers of a role by depth, over the band of permuted labels."""
    records = [record for record in section["records"] if record["role"] == role]
    size = float(np.clip(5.5 - len(section["records"]) / 120, 2.2, 5))
    depth, marker = np.array([record["depth"] for record in records]), MARKERS.get(role, "o")
    low, high = (100 * bound for bound in section["null_band"])
    ax.axhspan(low, high, fc=PALE, ec=FAINT, hatch="////", lw=0, zorder=0.5)
    ax.axhline(100 * section["chance"], color=INK, lw=0.8)
    ax.axhline(100 * section["needed"], color=INK, lw=0.8, ls=(0, (4, 2)))
    intervals = 100 * np.array([record["interval"] for record in records])
    ax.vlines(depth, *intervals.T, color=BLUE, lw=float(np.clip(60 / len(records), 0.5, 1)), alpha=0.75)
    accuracy = 100 * np.array([record["accuracy"] for record in records])
    above = np.array([record["above_null"] for record in records])
    ax.plot(depth[above], accuracy[above], marker, color=BLUE, ms=size, mec=INK, mew=0.4)
    ax.plot(depth[~above], accuracy[~above], marker, color=GROUND, ms=size, mec=INK, mew=0.6)
    top = np.array([record["layer"] in rank_of for record in records])
    ax.plot(depth[top], accuracy[top], "o", color="none", mec=INK, mew=1, ms=size + 4.5)
    group = section["groups"]["role"][role]
    ax.set_title(f"{role} factors: mean {percent(group['mean'])} % ({bounds(group['interval'])})")
    ax.set_ylabel("accuracy, %")


def _layer_legend(section: dict, top_k: int, layers: int | None) -> list:
    """Return what marks mean; ``layers`` is their number where blocks are shown."""
    above, total = section["num_above_null"], layers or len(section["records"])
    known = f"knows something ({above}), with 95 % interval"
    unknown, top = f"not distinguishable from chance ({total - above})", f"top {top_k}, with its rank"
    if layers:
        known, unknown = "a layer of the block knows something", "none does"
        top = f"with a layer of the top {top_k}, and its rank"
    limit = f"needed among {total}: {percent(section['needed'])} %"
    if section["needed"] > 1:
        limit = f"needed among {total}: more than 100 %"
    marker = {"marker": "^", "ls": "none", "mec": INK, "ms": 5}
    return [
        Line2D([], [], color=BLUE, **marker, label=known),
        Line2D([], [], color=GROUND, **marker, label=unknown),
        *([Line2D([], [], color=BLUE, lw=1, label="lowest to highest layer of the block")] if layers else []),
        Line2D([], [], ls="none", marker="o", color="none", mec=INK, ms=9, label=top),
        Line2D([], [], color=INK, lw=0.8, label=f"chance, {percent(section['chance'])} %"),
        Patch(fc=PALE, ec=FAINT, hatch="////", lw=0, label="95 % of permuted labels"),
        Line2D([], [], color=INK, lw=0.8, ls=(0, (4, 2)), label=limit),
    ]


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
    most = f"most predictive {section['unit']}"
    if section["most"] > 1:
        most = f"{section['most']} {most}s"
    finding = (
        f"Without the {most} {cut(name, 1.5)} reaches {percent(section['without_most']['accuracy'])} %{in_runs} "
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
    columns = 2 if len(sections) == 4 else min(3, len(sections))
    rows = math.ceil(len(sections) / columns)
    set_height(figure, 1.0 + 2.3 * rows)
    grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[3, {1: 0.8, 2: 1.1, 3: 1.6}[columns]] * columns)
    first = None
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
        if lowest:
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
    lines.append("areas " + ", ".join(f"{section['curves'][curve]['area']:.2f}" for curve in CURVES))
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
    others = f" ({names} not significantly worse)" if similar else ""
    removed = "it" if k == 1 else "them"
    return (
        f"{best} is best{others}: {reached}; removing {removed} lowers {losses} of {total} representations "
        "significantly"
    )


def _representations(results: dict, figure: Figure) -> None:
    section, k = results["analysis"]["representations"], results["config"]["top_k"]
    best = section["conditions"]["baseline"]["best"]
    names = sorted(section["drops"], key=lambda name: (_accuracies(results, name), name))  # the best on top
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
        ax.plot(accuracy, heights, ls="none", marker=marker, mfc=filling, mec=INK, ms=4.2, mew=0.9, label=label)
    chance = 100 * results["analysis"]["layers"]["chance"]
    ax.axvline(chance, **CHANCE, zorder=0.5, label=f"chance, {chance:.1f} %")
    ax.set_yticks(range(len(names)), cut_labels(names, 1.6, SIZE), fontsize=SIZE)
    for name, label in zip(names, ax.get_yticklabels(), strict=True):
        if name in (best, *section["conditions"]["baseline"]["not_worse"]) and len(names) > 1:
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
# Concepts by layer
# ----------------------------------------------------------------------------------------------------------------------


def _concept_layer_map_finding(results: dict) -> str:
    section = results["analysis"]["concepts"]
    best = np.array(section["recall"], float).max(0)  # (C,), NaN of a concept without a test LoRA
    high, low = int(np.nanargmax(best)), int(np.nanargmin(best))
    if best[high] == best[low]:
        return f"The best single layer for each concept recognises {percent(best[high])} % of it"
    names = [cut(section["classes"][c], 1.8) for c in (high, low)]
    return (
        f"Single layers recognise {names[0]} best (up to {percent(best[high])} % of it) "
        f"and {names[1]} worst (up to {percent(best[low])} %)"
    )


def _concept_layer_map(results: dict, figure: Figure) -> None:
    analysis = results["analysis"]
    section, records = analysis["concepts"], analysis["layers"]["records"]
    recall = 100 * np.array(section["recall"], float).T  # (C, L)
    clusters = (analysis.get("layer_information") or {}).get("concept_clusters")
    cluster = np.array(clusters["of_class"] if clusters else np.zeros(len(recall)))
    order = np.lexsort((-recall.mean(1), cluster))
    order = order[~np.isnan(recall[order]).any(1)]  # without a test LoRA there is nothing to show
    height = min(0.24, 9 / len(order))  # of a row, in inches
    set_height(figure, 1.05 + height * len(order))
    roles: dict[str, list[int]] = {}
    for layer, record in enumerate(records):
        roles.setdefault(record["role"], []).append(layer)
    widths = [4.7 * len(members) / len(records) for members in roles.values()]
    compared = analysis.get("representations")
    compared = compared and compared["conditions"]["baseline"]["best"]
    if compared:
        widths.append(0.9)
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    looks = {"cmap": "YlGnBu", "vmin": 0, "vmax": max(20, 20 * math.ceil(recall[order].max() / 20)), "aspect": "auto"}
    for ax, (role, members), width in zip(axes, roles.items(), widths, strict=False):
        _recall_by_layer(ax, results, members, recall[np.ix_(order, members)], looks, (height, width))
        ax.set_title(f"{role} factors")
    if compared:
        _recall_with_all_layers(axes[-1], results, order, looks, height)
    for ax in axes:
        ax.hlines(np.flatnonzero(np.diff(cluster[order])) + 0.5, *ax.get_xlim(), color=ON_CELLS[0], lw=0.8)
        ax.tick_params(length=0)
    step = math.ceil(0.1 / height)  # of more classes than there is room for names, every second is named, or fewer
    size = min(SIZE, 55 * height)
    labels = cut_labels([section["classes"][c] for c in order], 1.4, size)
    axes[0].set_yticks(range(0, len(order), step), labels[::step], fontsize=size)
    figure.legend(handles=map_legend(axes[0].images[0], "recall"), loc="outside lower center", ncols=6)


def _recall_by_layer(
    ax: Axes, results: dict, members: Sequence[int], recall: np.ndarray, looks: dict, size: tuple[float, float]
) -> None:
    """Draw recall of concepts from single layers, float[C, members], in rows and axes of this height and width."""
    height, width = size
    records = [results["analysis"]["layers"]["records"][layer] for layer in members]
    ax.imshow(recall, **looks, interpolation="nearest")
    write_numbers(ax, recall, looks["vmax"], height, width / len(members))
    mark_blocks(ax, [record["block"] for record in records], width)
    top = set(results["top_layers"])
    marked = [x for x, record in enumerate(records) if record["layer"] in top]
    if marked:
        ax.plot(marked, np.full(len(marked), len(recall) - 0.5), "^", color=INK, ms=4, clip_on=False)
    ax.set_xticks([])
    noun = "blocks by depth, means of layers" if "num_layers_shown" in results else "layers by depth"
    ax.set_xlabel(f"{noun} (▲ top {len(top)})")


def _recall_with_all_layers(ax: Axes, results: dict, order: np.ndarray, looks: dict, height: float) -> None:
    """Draw recall by the best representation, with all layers and without the top k."""
    analysis = results["analysis"]
    section, best = analysis["concepts"], analysis["representations"]["conditions"]["baseline"]["best"]
    whole, drop = (100 * np.array(section[key][best], float) for key in ("baseline", "drop"))
    both = np.stack([whole, whole - drop], axis=1)[order]
    ax.imshow(both, **looks, interpolation="nearest")
    write_numbers(ax, both, looks["vmax"], height, 0.4)
    ax.set_xticks([0, 1], ["all", f"no top {results['config']['top_k']}"], fontsize=SMALL)
    ax.set_title(cut(best, 0.85, SMALL), fontsize=SMALL)


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
    source = cut(classifier_name(section["complexity"]["recall_by"]), 1.3)
    plotted = (("spread", 1, "spread of the concept's features"), ("recall", 100, f"recall by {source}, %"))
    scatters, first = [], None
    for column, (key, scale, label) in enumerate(plotted):
        ax = figure.add_subplot(grid[0, column], sharey=first)
        first = first or ax
        x = scale * np.array([record[key] for record in classes], float)  # NaN, not drawn, without a test LoRA
        ax.plot(x, measured, "o", color=BLUE, mec=INK, mew=0.5, ms=4.5)
        correlation = section["complexity"][f"spearman_{key}"]
        measured_text = correlation_text(correlation) if correlation else "not measured"
        ax.set_title(f"Spearman correlation {measured_text}")
        ax.set_xlabel(label)
        ax.margins(0.12)
        scatters.append((ax, x))
    first.set_ylabel(f"{section['tested']}, mean")
    _modules(results, figure.add_subplot(grid[1, :]))
    labels, middle = cut_labels([record["class"] for record in classes], 0.9, SMALL), np.median(measured)
    order = sorted(range(len(classes)), key=lambda c: (-abs(measured[c] - middle), c))  # the extremes are named first
    for ax, x in scatters:
        place(ax, [(x[c], measured[c]) for c in order], [labels[c] for c in order[:NAMED_POINTS]], SMALL, beside=True)


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
    ax.plot(positions[~differs], explained[~differs], "o", color=GROUND, **looks, label=f"does not: {(~differs).sum()}")
    ax.set_ylim(0, max(1, 1.2 * explained.max()))
    ax.set_xlim(-0.5 - 0.01 * len(modules), 1.01 * len(modules) - 0.5)
    ax.set_ylabel("explained by\nconcept, % (ε²)")
    ax.set_xlabel("blocks by depth, means of modules" if in_blocks else "modules by depth")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    mark_blocks(ax, [record.get("block") for record in places], WIDTH - 0.7)
    figure = ax.get_figure()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    most = sorted(range(len(modules)), key=lambda i: (-explained[i], i))
    words = ("block", "attention", "projection")
    names = [" ".join(filter(None, map(places[i].get, words))) for i in most[:5]]
    texts = [cut(name or modules[i]["module"], 1.2) for i, name in zip(most, names, strict=False)]
    figure.get_layout_engine().execute(figure)
    place(ax, [(i, explained[i]) for i in most], texts, SMALL, beside=False)


# fmt: off
FIGURES = (
    FigureRow("layer_importance", "layers", ("layers",), _layer_importance_finding, _layer_importance,
              "Accuracy of each layer alone by its depth in the network, against chance", True),
    FigureRow("ablation_curves", "robustness", ("layers", "robustness"), _ablation_curves_finding, _ablation_curves,
              "Accuracy as layers are removed, in three orders"),
    FigureRow("representations", "representations", ("layers", "representations"), _representations_finding,
              _representations, "Accuracy of each representation with all layers and without the top ones"),
    FigureRow("concept_layer_map", "concepts", ("layers", "concepts"), _concept_layer_map_finding, _concept_layer_map,
              "Recall of each concept from each layer alone", True),
    FigureRow("layer_clusters", "information", ("layers", "layer_information"), layer_clusters_finding,
              layer_clusters, "Layers by the similarity of their features", True),
    FigureRow("rank_structure", "rank", ("rank_structure",), _rank_structure_finding, _rank_structure,
              "Effective rank, or norm, of the updates by concept", True),
    FigureRow("attention", "modules", ("layers", "attention"), attention_finding, attention,
              "Attention to each module, and what it adds to each concept", True),
    FigureRow("collection_map", "modules", ("collection_map",), collection_map_finding, collection_map,
              "The LoRAs in the plane, by all layers and by single modules"),
)
# fmt: on
