"""results.json -> pictures: six, each as PNG (150 dpi) and SVG, under the finding of captions.py.

Nothing but the content of results.json is read, and the same content gives the same bytes.

Shape letters: L layers in the network's order, P modules, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.evidence import ALPHA
from report.captions import accuracies, captions
from report.drawing import (
    BLUE,
    DARK,
    GREY,
    ORANGE,
    SIZE,
    SMALL,
    WIDTH,
    cut,
    cut_labels,
    kinds_of,
    make_high,
    mark_blocks,
    new_figure,
    place,
    saved,
    tree_lines,
    write_numbers,
)
from report.sentences import NO_OTHERS, bounds, by_whom, correlation_text, percent, signed

NAMED = 12  # concepts at most that are named in a cloud of points
MARKERS = {"down": "v", "up": "^"}


def draw(results: dict) -> dict[str, bytes]:
    """All pictures that the results have the data for.

    Args:
        results: The content of results.json; it is not changed.

    Returns:
        Content by file name, such as ``layer_importance.png`` and ``layer_importance.svg``; empty without an analysis.
    """
    files: dict[str, bytes] = {}
    for name, caption in captions(results).items():
        with new_figure(name, caption + " [a --quick run]" * bool(results["config"]["quick"])) as figure:
            PICTURES[name](results, figure)
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine("none")  # the layout is done, and both files have the same
            for kind in ("png", "svg"):
                files[f"{name}.{kind}"] = saved(figure, kind, caption)
    return files


# ----------------------------------------------------------------------------------------------------------------------
# 1. Which layers predict?
# ----------------------------------------------------------------------------------------------------------------------


def _layer_importance(results: dict, figure: Figure) -> None:
    section, ranks = results["analysis"]["layers"], {name: i for i, name in enumerate(results["top_layers"], 1)}
    records = section["records"]
    roles = list(dict.fromkeys(record["role"] for record in records))
    make_high(figure, 1.3 + 1.7 * len(roles))
    axes = figure.subplots(len(roles), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    size = float(np.clip(5.5 - len(records) / 120, 2.2, 5))
    low, high = (100 * bound for bound in section["null_band"])
    highest = max(section["null_max"], *(record["interval"][1] for record in records))
    axes[0].set_ylim(0, 115 * highest + 2)  # room for ranks above the intervals
    mark_blocks(axes[0], range(len(records)), [record["block"] for record in records], WIDTH - 0.7, name=True)
    for ax, role in zip(axes, roles, strict=True):
        inside = [record for record in records if record["role"] == role]
        depth, marker = np.array([record["depth"] for record in inside]), MARKERS.get(role, "o")
        ax.axhspan(low, high, fc="#e4e4e4", ec="#bdbdbd", hatch="////", lw=0, zorder=0.5)
        ax.axhline(100 * section["chance"], color=DARK, lw=0.8)
        ax.axhline(100 * section["null_max"], color=DARK, lw=0.8, ls=(0, (4, 2)))
        intervals = 100 * np.array([record["interval"] for record in inside])
        ax.vlines(depth, *intervals.T, color=BLUE, lw=float(np.clip(60 / len(inside), 0.5, 1)), alpha=0.75)
        accuracy = 100 * np.array([record["accuracy"] for record in inside])
        above = np.array([record["above_null"] for record in inside])
        ax.plot(depth[above], accuracy[above], marker, color=BLUE, ms=size, mec=DARK, mew=0.4)
        ax.plot(depth[~above], accuracy[~above], marker, color="white", ms=size, mec=DARK, mew=0.6)
        of_role = section["groups"]["role"][role]
        ax.set_title(f"{role} factors: mean {percent(of_role['mean'])} % ({bounds(of_role['interval'])})")
        top = np.array([record["layer"] in ranks for record in inside])
        ax.plot(depth[top], accuracy[top], "o", color="none", mec=DARK, mew=1, ms=size + 4.5)
        ax.set_ylabel("accuracy, %")
    for ax in axes[1:]:
        mark_blocks(ax, range(len(records)), [record["block"] for record in records], WIDTH - 0.7, name=False)
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if tick <= min(100, axes[0].get_ylim()[1])])
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    r = section["depth"]
    how = f"; Spearman correlation with accuracy {correlation_text(r)}" if r else ""
    axes[-1].set_xlabel(f"depth: position of the layer in the network{how}")
    figure.legend(handles=_layer_legend(section, len(ranks)), loc="outside lower center", ncols=3)
    figure.get_layout_engine().execute(figure)
    for ax, role in zip(axes, roles, strict=True):
        inside = sorted(
            (record for record in records if record["role"] == role), key=lambda one: ranks.get(one["layer"], math.inf)
        )
        points = [(record["depth"], 100 * record["interval"][1]) for record in inside]
        place(ax, points, [str(ranks[record["layer"]]) for record in inside if record["layer"] in ranks], SMALL, False)


def _layer_legend(section: dict, top_k: int) -> list:
    above, total = section["num_above_null"], len(section["records"])
    limit = f"5 % limit, best of {total}: {percent(section['null_max'])} %"
    marker = {"marker": "^", "ls": "none", "mec": DARK, "ms": 5}
    return [
        Line2D([], [], color=BLUE, **marker, label=f"above the limit ({above}), with 95 % interval"),
        Line2D([], [], color="white", **marker, label=f"not above it ({total - above})"),
        Line2D([], [], ls="none", marker="o", color="none", mec=DARK, ms=9, label=f"top {top_k}, with its rank"),
        Line2D([], [], color=DARK, lw=0.8, label=f"chance, {percent(section['chance'])} %"),
        Patch(fc="#e4e4e4", ec="#bdbdbd", hatch="////", lw=0, label="95 % of permuted labels"),
        Line2D([], [], color=DARK, lw=0.8, ls=(0, (4, 2)), label=limit),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# 2. Is prediction robust?
# ----------------------------------------------------------------------------------------------------------------------

CURVES = {  # of analysis.robustness: label, colour, marker, line style
    "most_first": ("most predictive first", DARK, "o", "-"),
    "least_first": ("least predictive first", BLUE, "s", (0, (5, 1.5))),
    "random_order": ("random order", ORANGE, "^", (0, (1, 1))),
}


def _ablation_curves(results: dict, figure: Figure) -> None:
    sections, chance = results["analysis"]["robustness"], 100 * results["analysis"]["layers"]["chance"]
    columns = 2 if len(sections) == 4 else min(3, len(sections))
    rows = math.ceil(len(sections) / columns)
    make_high(figure, 1.0 + 2.3 * rows)
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
    if any(section["without_random"]["draws"] for section in sections.values()):
        lines.append(Line2D([], [], ls="none", marker="_", ms=8, color=ORANGE, label="one random draw"))
    lines.append(Line2D([], [], color=GREY, lw=0.9, ls=(0, (6, 2, 1, 2)), label=f"chance, {chance:.1f} %"))
    figure.legend(handles=lines, loc="outside lower center", ncols=5, columnspacing=1.2)


def _curves_title(name: str, section: dict) -> str:
    """Representation and verdict; what survives the removal of the top k; areas in the order of ``CURVES``."""
    lines, survives = [f"{cut(name, 1.3)}: {section['verdict']}"], section["survives"]
    if survives:
        lines.append(f"{_whole(survives['share'])} % ({bounds(survives['interval'], _whole)}) survives")
    areas = ", ".join(f"{section['curves'][curve]['area']:.2f}" for curve in CURVES)
    return "\n".join([*lines, f"areas {areas}"])


def _whole(share: float) -> str:
    """A share in whole percent, which a narrow picture has room for."""
    return str(round(100 * share))


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
    if section["without_random"]["draws"]:
        ax.hlines(100 * np.array(section["without_random"]["accuracies"]), 1.5, 2.5, color=ORANGE, lw=0.8)
        ax.plot(2, 100 * section["without_random"]["mean"], "^", color="white", mec=DARK, ms=3.5)
    else:
        where = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "center", "rotation": 90}
        ax.text(2, 0.5, NO_OTHERS, **where, fontsize=SMALL, bbox={"fc": "white", "ec": "none", "pad": 1})
    labels = ["all", kinds["without_top"], f"no random {k}", kinds["without_bottom"], kinds["top_alone"]]
    ax.set_xticks(range(5), labels if named else [], rotation=90, fontsize=SMALL)
    ax.set_xlim(-0.6, 4.6)
    ax.tick_params(labelleft=False)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Which representation is best?
# ----------------------------------------------------------------------------------------------------------------------


def _representations(results: dict, figure: Figure) -> None:
    section, k = results["analysis"]["representations"], results["config"]["top_k"]
    names = sorted(section["drops"], key=lambda name: (accuracies(results, name), name))  # the best on top
    make_high(figure, 1.45 + 0.24 * len(names))
    ax = figure.subplots()
    ax.hlines(range(len(names)), 0, 1, transform=ax.get_yaxis_transform(), color="#e2e2e2", lw=0.5, zorder=0)
    for condition, up, looks in (("baseline", 0.14, {"color": DARK}), ("ablation", -0.14, {"color": ORANGE})):
        at = np.arange(len(names)) + up
        accuracy = [100 * accuracies(results, name)[condition == "ablation"] for name in names]
        intervals = 100 * np.array([section["intervals"][condition][name] for name in names])
        ax.hlines(at, *intervals.T, **looks, lw=1.3)
        marker = {"baseline": {"marker": "o", "mfc": DARK}, "ablation": {"marker": "D", "mfc": "white"}}[condition]
        label = {"baseline": "all layers", "ablation": f"without the top {k}"}[condition]
        ax.plot(accuracy, at, ls="none", **marker, mec=DARK, ms=4.2, mew=0.9, label=label)
    chance = 100 * results["analysis"]["layers"]["chance"]
    ax.axvline(chance, color=GREY, lw=0.9, ls=(0, (6, 2, 1, 2)), zorder=0.5, label=f"chance, {chance:.1f} %")
    ax.set_yticks(range(len(names)), cut_labels(names, 1.6, SIZE), fontsize=SIZE)
    for name, label in zip(names, ax.get_yticklabels(), strict=True):
        if name in (section["best"], *section["indistinguishable_from_best"]) and len(names) > 1:
            label.set_fontweight("bold")
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlim(-1, 101)
    ax.set_xlabel("test accuracy, %, with 95 % intervals")
    right = ax.secondary_yaxis("right")
    drops = [section["drops"][name] for name in names]
    changes = [
        f"{signed(-one['drop'])} ({signed(-one['interval'][1])} to {signed(-one['interval'][0])})"
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


def _concept_layer_map(results: dict, figure: Figure) -> None:
    analysis, top = results["analysis"], set(results["top_layers"])
    section, records = analysis["concepts"], analysis["layers"]["records"]
    recall = 100 * np.array(section["recall"], float).T  # (C, L)
    clusters = (analysis.get("layer_information") or {}).get("concept_clusters")
    cluster = np.array(clusters["of_class"] if clusters else np.zeros(len(recall)))
    order = np.lexsort((-recall.mean(1), cluster))
    order = order[~np.isnan(recall[order]).any(1)]  # without a test LoRA there is nothing to show
    row = min(0.24, 9 / len(order))  # inches, as all that follow
    make_high(figure, 1.05 + row * len(order))
    roles = list(dict.fromkeys(record["role"] for record in records))
    of_roles = [np.array([i for i, record in enumerate(records) if record["role"] == role]) for role in roles]
    best = (analysis.get("representations") or {}).get("best")
    widths = [4.7 * len(of_role) / len(records) for of_role in of_roles] + [0.9] * (best is not None)
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    looks = {"cmap": "YlGnBu", "vmin": 0, "vmax": max(20, 20 * math.ceil(recall[order].max() / 20)), "aspect": "auto"}
    for ax, role, of_role, width in zip(axes, roles, of_roles, widths, strict=False):
        image = ax.imshow(recall[np.ix_(order, of_role)], **looks, interpolation="nearest")
        write_numbers(ax, recall[np.ix_(order, of_role)], looks["vmax"], row, width / len(of_role))
        mark_blocks(ax, range(len(of_role)), [records[i]["block"] for i in of_role], width, name=True)
        marked = [i for i, layer in enumerate(of_role) if records[layer]["layer"] in top]
        if marked:
            ax.plot(marked, np.full(len(marked), len(order) - 0.5), "^", color=DARK, ms=4, clip_on=False)
        ax.set_title(f"{role} factors")
        ax.set_xticks([])
        ax.set_xlabel(f"layers by depth (▲ top {len(top)})")
    if best is not None:
        whole, drop = (100 * np.array(section[key][best], float) for key in ("baseline", "drop"))
        both = np.stack([whole, whole - drop], axis=1)[order]
        axes[-1].imshow(both, **looks, interpolation="nearest")
        write_numbers(axes[-1], both, looks["vmax"], row, 0.4)
        axes[-1].set_xticks([0, 1], ["all", f"no top {results['config']['top_k']}"], fontsize=SMALL)
        axes[-1].set_title(cut(best, 0.85, SMALL), fontsize=SMALL)
    for ax in axes:
        ax.hlines(np.flatnonzero(np.diff(cluster[order])) + 0.5, *ax.get_xlim(), color=DARK, lw=0.8)
        ax.tick_params(length=0)
    step = math.ceil(0.1 / row)  # of more classes than there is room for names, every second one is named
    labels = cut_labels([section["classes"][c] for c in order], 1.4, size := min(SIZE, 55 * row))
    axes[0].set_yticks(range(0, len(order), step), labels[::step], fontsize=size)
    steps = np.linspace(0, looks["vmax"], 6)  # a legend, as constrained layout has no good place for a bar of colours
    patches = [Patch(fc=image.cmap(image.norm(step)), ec=DARK, lw=0.5, label=f"{step:.0f} %") for step in steps]
    patches[-1].set_label(f"{looks['vmax']} % recall" + " or more" * (looks["vmax"] < 100))
    figure.legend(handles=patches, loc="outside lower center", ncols=6)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Do layers carry different information?
# ----------------------------------------------------------------------------------------------------------------------


def _layer_clusters(results: dict, figure: Figure) -> None:
    records, ranks = results["analysis"]["layers"]["records"], set(results["top_layers"])
    clusters = results["analysis"]["layer_information"]["clusters"]
    ordered = [records[i] for i in clusters["order"]]
    rows = kinds_of(ordered)
    make_high(figure, 4.1 + 0.13 * len(rows))
    tree, kinds, depth = figure.subplots(3, 1, sharex=True, height_ratios=[2.0, 0.13 * len(rows) + 0.05, 1.0])
    links = tree_lines(clusters["linkage"], clusters["order"])
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
    kinds.set_yticks(range(len(rows)), cut_labels([name for name, _ in rows], 1.0, SMALL), fontsize=SMALL)
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


# ----------------------------------------------------------------------------------------------------------------------
# 5. Does rank structure matter?
# ----------------------------------------------------------------------------------------------------------------------


def _rank_structure(results: dict, figure: Figure) -> None:
    section = results["analysis"]["rank_structure"]
    classes = section["complexity"]["by_class"]
    make_high(figure, 5.2)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
    field = "effective_rank" if section["answerable"] else "norm"
    measured = [one[field] for one in classes]
    labels, first, scatters = cut_labels([one["class"] for one in classes], 0.9, SMALL), None, []
    recall_by = cut(by_whom(section["complexity"]["recall_by"]), 1.3)
    looked_at = (("spread", 1, "spread of the concept's features"), ("recall", 100, f"recall by {recall_by}, %"))
    for column, (of, scale, words) in enumerate(looked_at):
        ax = figure.add_subplot(grid[0, column], sharey=first)
        first = first or ax
        x = scale * np.array([one[of] for one in classes], float)  # NaN, which is not drawn, without a test LoRA
        ax.plot(x, measured, "o", color=BLUE, mec=DARK, mew=0.5, ms=4.5)
        found = section["complexity"][f"spearman_{of}"]
        ax.set_title(f"Spearman correlation {correlation_text(found)}" if found else "no correlation to tell")
        ax.set_xlabel(words)
        ax.margins(0.12)
        scatters.append((ax, x))
    first.set_ylabel(f"{section['tested']}, mean")
    _modules(results, figure.add_subplot(grid[1, :]))
    middle = np.median(measured)
    order = sorted(range(len(classes)), key=lambda c: (-abs(measured[c] - middle), c))  # the extremes are named first
    for ax, x in scatters:
        place(ax, [(x[c], measured[c]) for c in order], [labels[c] for c in order[:NAMED]], SMALL, beside=True)


def _modules(results: dict, ax: Axes) -> None:
    """How much concepts explain of each module's measure: ε² of the Kruskal-Wallis test."""
    section = results["analysis"]["rank_structure"]
    modules = section["modules"]
    layers = {record["module"]: record for record in (results["analysis"].get("layers") or {}).get("records", ())}
    explained = np.array([100 * min(1, module["effect"]) for module in modules])
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
    mark_blocks(ax, at, [of.get("block") for of in places], WIDTH - 0.7, name=True)
    ax.get_figure().legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    most = sorted(at, key=lambda i: (-explained[i], i))
    names = [" ".join(filter(None, (places[i].get("attention"), places[i].get("projection")))) for i in most[:5]]
    texts = [cut(name or modules[i]["module"], 1.2) for i, name in zip(most, names, strict=False)]
    ax.get_figure().get_layout_engine().execute(ax.get_figure())
    place(ax, [(i, explained[i]) for i in most], texts, SMALL, beside=False)


PICTURES: dict[str, Callable[[dict, Figure], None]] = {
    "layer_importance": _layer_importance,
    "ablation_curves": _ablation_curves,
    "representations": _representations,
    "concept_layer_map": _concept_layer_map,
    "layer_clusters": _layer_clusters,
    "rank_structure": _rank_structure,
}
