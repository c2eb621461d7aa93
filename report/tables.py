"""The tables of the results, from the content of results.json: cells as text, for results.txt and report.html alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from report.wording import (
    NO_OTHERS,
    ROUNDED_P,
    bounds,
    capital,
    counted,
    left_text,
    mean_text,
    metric,
    number,
    p_cell,
    p_text,
    percent,
    runs_text,
    signed,
    spread_text,
    top_layers,
)

MOST_IN_TEXT, MOST_ON_PAGE = 100, 300  # rows of any table that results.txt and report.html show
TOGETHER = (  # note below a table of differences
    "Intervals and p of a column of differences hold for all of it together (single-step, 95 %); all are over the same "
    "test LoRAs and runs, and few runs that differ make them wide."
)

SKETCH_NOTE = (
    "Sketched: in place of the weights of a layer, at most 256 numbers are read, a fixed sparse random projection."
)

# Columns of attention and contribution, each with its interval to the right of it.
SHARES = ("attention, %", "95 % interval", "contribution", "95 % interval")


@dataclass(frozen=True)
class Table:
    """Cells as text, for results.txt and report.html alike.

    Attributes:
        anchor: Name of the section of report.html that shows it.
        title: Line above it.
        columns: Heads of the columns.
        rows: Cells; rows are as long as ``columns``.
        words: Positions of the columns that hold words and are aligned left.
        shown: Number of rows that results.txt shows.
        note: Line below it.
        on_page: Number of rows that report.html shows.
        sortable: Whether the rows of report.html can be put in another order.
    """

    anchor: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = field(default=(0,))
    shown: int = 20
    note: str = ""
    on_page: int = MOST_ON_PAGE
    sortable: bool = True

    @property
    def head(self) -> int:
        """Position of the column that names its row: the first of words, or the last where only that holds words."""
        last = len(self.columns) - 1
        return last if last in self.words and 0 not in self.words else 0


def tables(results: dict) -> dict[str, Table]:
    """Return all tables by name, from the content of results.json, without those that have no rows."""
    made = {"ranking": _ranking_table(results), "metrics": _metrics_table(results)}
    if results["splits"]:
        made |= {"splits": _splits_table(results), "split layers": _split_layers_table(results)}
    if analysis := results.get("analysis"):
        made |= {
            "blocks": _blocks_table(analysis["layers"]["groups"]["block"]),
            "places": _places_table(analysis["layers"]["groups"]),
            "conditional": _conditional_table(analysis.get("conditional"), results["config"]["top_k"]),
            "controls": _controls_table(results),
            "differences": _differences_table(results),
            "drops": _drops_table(results),
            "disagreement": _disagreement_table(results),
            "clusters": _clusters_table(analysis["layer_information"]["clusters"]["members"]),
            "modules": _modules_table(analysis["rank_structure"]),
            "concepts": _concepts_table(analysis),
            "attention": _attention_table(analysis.get("attention")),
            "attention sums": _attention_sums_table(analysis.get("attention")),
        }
    return {name: table for name, table in made.items() if table is not None and table.rows}


# ----------------------------------------------------------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------------------------------------------------------


def _ranking_table(results: dict) -> Table:
    """Return the table of all layers, of which results.txt shows the top ones."""
    config, analysis = results["config"], results.get("analysis")
    columns = ["rank", "test accuracy", "validation", "role", "block", "layer"]
    rows = [
        [
            str(rank),
            mean_text(record["accuracy"], record["accuracy_std"], config["num_runs"]).strip(),
            percent(record["val_accuracy"]),
            record["role"],
            record["block"] or "",
            record["layer"],
        ]
        for rank, record in enumerate(results["layer_ranking"], 1)
    ]
    note = ""
    if analysis:
        record_of = {record["layer"]: record for record in analysis["layers"]["records"]}
        columns[2:2] = ["95 % interval", "p", f"in top {config['top_k']}, % of redraws"]
        for row in rows:
            record = record_of[row[-1]]
            row[2:2] = [bounds(record["interval"]), p_cell(record["p_family"]), f"{100 * record['top_k_share']:.0f}"]
        note = "p is family-wise: it is corrected for the choice of the best among all layers."
    if not any(record["block"] for record in results["layer_ranking"]):
        for row in (columns, *rows):
            del row[-2]
    words = tuple(range(columns.index("role"), len(columns)))
    return Table(
        "layers", "Each layer alone, on 7 statistics", columns, rows, words, min(config["top_k"], MOST_IN_TEXT), note
    )


def _blocks_table(blocks: dict) -> Table | None:
    """Return mean accuracies of the layers of each block, the most accurate first, where there are several blocks."""
    if len(blocks) < 2:
        return None
    ordered = sorted(blocks.items(), key=lambda item: -item[1]["mean"])
    rows = [
        [name, str(block["layers"]), str(block["above_null"]), percent(block["mean"]), bounds(block["interval"])]
        for name, block in ordered
    ]
    columns = ["block", "layers", "distinguishable from chance", "mean accuracy", "95 % interval"]
    return Table("layers", "Layers by block, the most accurate blocks first", columns, rows)


def _places_table(groups: dict) -> Table:
    """Return mean accuracies of the layers of each role, projection and kind of attention."""
    rows = [
        [kind, value, str(group["layers"]), percent(group["mean"]), bounds(group["interval"])]
        for kind, values in groups.items()
        if kind != "block" and len(values) > 1  # else it is the mean of all
        for value, group in values.items()
    ]
    columns = ["by", "value", "layers", "mean accuracy", "95 % interval"]
    return Table("layers", "Where in the network layers predict", columns, rows, (0, 1), 16)


def _conditional_table(records: list[dict] | None, k: int) -> Table | None:
    if not records:
        return None
    rows = [[percent(record["adds"]), bounds(record["interval"]), record["layer"]] for record in records]
    title = f"What one more layer adds to the top {k}, in points"
    return Table("layers", title, ["adds", "95 % interval", "layer"], rows, (2,), 3)


def _disagreement_table(results: dict) -> Table | None:
    """Return disagreement and kappa between the top layers, where they are few."""
    section = results["analysis"]["layer_information"]
    disagreement, kappa = section["disagreement"]["top_k"], section["kappa"]["top_k"]
    k = len(disagreement)
    if not 1 < k <= 12:
        return None
    rows = []
    for i, record in enumerate(results["layer_ranking"][:k]):
        cells = [f"{percent(disagreement[i][j])} ({number(kappa[i][j])})" for j in range(k)]
        cells[i] = ""
        rows.append([f"{i + 1}. {record['layer']}", *cells])
    title = f"Test LoRAs for which two of the top {k} predict different classes, in percent (kappa)"
    return Table("information", title, ["layer", *(f"{j + 1}." for j in range(k))], rows, sortable=False)


def _clusters_table(members: list[dict]) -> Table:
    """Return clusters of two or more layers."""
    rows = []
    for cluster in members:
        if cluster["layers"] > 1:
            kinds = (
                ", ".join(f"{name} {count}" for name, count in cluster[kind].items())
                for kind in ("roles", "projections")
            )
            rows.append([str(cluster["cluster"]), str(cluster["layers"]), *kinds])
    columns = ["cluster", "layers", "roles", "projections"]
    return Table("information", "Clusters of two or more layers", columns, rows, (2, 3))


def _modules_table(section: dict) -> Table | None:
    """Return the Kruskal-Wallis test of each module, the most significant first."""
    if section["tested"] is None:
        return None
    ordered = sorted(section["modules"], key=lambda record: (record["p_fdr"], -record["statistic"]))
    rows = [[f"{record['statistic']:.1f}", p_cell(record["p_fdr"], ROUNDED_P), record["module"]] for record in ordered]
    title = f"{capital(section['tested'])} by concept (Kruskal-Wallis), module by module"
    return Table("rank", title, ["H", "p (false discovery rate)", "module"], rows, (2,), 3)


# ----------------------------------------------------------------------------------------------------------------------
# Removal of layers
# ----------------------------------------------------------------------------------------------------------------------


def _controls_table(results: dict) -> Table | None:
    """Return accuracies without the top layers, and without others; a column for each representation."""
    sections = results["analysis"]["robustness"]
    if not sections:
        return None
    cells_of: dict[str, Callable[[dict], str]] = {
        "removed from": lambda section: counted(section["units"], section["unit"]),
        "all": lambda section: _left(section["all"]),
        "without the top": lambda section: f"{_left(section['without_top'])}, {section['removed']} removed",
        "without the most predictive": lambda section: f"{_left(section['without_most'])}, {section['most']} removed",
        "as many random others (mean, range)": lambda section: _range(section["without_random"]),
        "random draws": lambda section: str(section["without_random"]["draws"]),
        "of these, draws that cost as much": lambda section: _at_or_below(section["without_random"]),
        "without the bottom": lambda section: _left(section["without_bottom"]),
        "the top alone": lambda section: _left(section["top_alone"]),
        "share left without the top": lambda section: _surviving(section["survives"]),
        "share left without the most predictive": lambda section: _surviving(section["survives_most"]),
        "lowest share until half are removed": lambda section: _surviving(section["survives_half"]),
        "largest fall of the share by a tenth": lambda section: _surviving(section["steepest"]),
        "concentration": lambda section: _concentration(section["concentration"]),
        "area under the curve, most first": lambda section: _area(section, "most_first"),
        "area under the curve, least first": lambda section: _area(section, "least_first"),
        "area under the curve, random order": lambda section: _area(section, "random_order"),
    }
    if all(section["most"] == section["removed"] for section in sections.values()):
        for line in ("without the most predictive", "share left without the most predictive"):
            del cells_of[line]  # which are the top
    rows = [[line, *map(cell, sections.values())] for line, cell in cells_of.items()]
    rows.append(["runs", *(_runs(results, name) for name in sections)])
    rows.append(["verdict", *(section["verdict"] for section in sections.values())])
    note = (
        "In percent. Top: the first in the order of removal, most predictive first. Share left: of the accuracy above "
        "chance; below 0 the accuracy is below chance. Concentration: 1 - 2 times the area under that share as the "
        "most predictive are removed first, 0 where all are equal and 1 where one holds all, more where the others "
        "fall below chance. Area: under the accuracy from all to none, 1 at most."
    )
    return Table(
        "robustness",
        "Removing the top, and what else could be removed",
        ["", *sections],
        rows,
        note=note,
        sortable=False,
    )


def _left(estimate: dict) -> str:
    return left_text(estimate).replace(" %", "")


def _concentration(record: dict | None) -> str:
    return "not known" if record is None else f"{number(record['index'])} ({bounds(record['interval'], number)})"


def _range(random: dict) -> str:
    if not random["draws"]:
        return NO_OTHERS
    return f"{percent(random['mean'])}, {percent(random['min'])} to {percent(random['max'])}"


def _at_or_below(random: dict) -> str:
    return f"{random['at_or_below']}, {p_text(random['p'])}" if random["draws"] else "none drawn"


def _surviving(left: dict | None) -> str:
    """Return a share with its interval and, of a curve, the number of units removed at that point."""
    if left is None:
        return "not known"
    removed = f", {left['removed']} removed" if "removed" in left else ""
    if left["interval"] is None:
        return f"nothing left{removed}"
    return f"{percent(left['share'])} ({bounds(left['interval'])}){removed}"


def _area(section: dict, curve: str) -> str:
    return number(section["curves"][curve]["area"])


def _runs(results: dict, name: str) -> str:
    runs = results["analysis"]["robustness"][name]["runs"]
    return runs_text(results, name).replace("the ", "") or str(runs)


# ----------------------------------------------------------------------------------------------------------------------
# Representations and concepts
# ----------------------------------------------------------------------------------------------------------------------


def _best_first(results: dict) -> list[str]:
    accuracy = {name: entry["test_accuracy"]["mean"] for name, entry in results["baseline_results"].items()}
    return sorted(accuracy, key=lambda name: -accuracy[name])


def _metrics_table(results: dict) -> Table:
    """Return the metrics of every representation with and without the top layers."""
    k = results["config"]["top_k"]
    columns = ["representation", "features", "test accuracy", "test F1"]
    columns += [f"features without top {k}", f"test accuracy without top {k}", f"test F1 without top {k}", "change"]
    rows = []
    for name in _best_first(results):
        row, accuracies = [f"{name} (sketched)" if results["baseline_results"][name].get("sketched") else name], []
        for condition in ("baseline_results", "ablation_results"):
            entry = results[condition][name]
            row += [
                str(entry["num_features"]),
                metric(entry["test_accuracy"]).strip(),
                metric(entry["test_f1"]).strip(),
            ]
            accuracies.append(entry["test_accuracy"]["mean"])
        rows.append([*row, signed(accuracies[1] - accuracies[0])])
    title = f"Every representation with all layers and without {top_layers(k)}"
    note = SKETCH_NOTE if any("sketched" in entry for entry in results["baseline_results"].values()) else ""
    return Table("representations", title, columns, rows, note=note)


def _differences_table(results: dict) -> Table | None:
    """Return intervals of the accuracies, and distances behind the best."""
    section, k = results["analysis"]["representations"], results["config"]["top_k"]
    if not section:
        return None
    baseline = section["conditions"]["baseline"]
    behind = {record["b"]: record for record in baseline["comparisons"] if record["a"] == baseline["best"]}
    columns, title = ["representation", "all layers", f"without top {k}"], "95 % intervals of test accuracies"
    rows = [
        [name, *(bounds(condition["intervals"][name]) for condition in section["conditions"].values())]
        for name in _best_first(results)
    ]
    if not behind:
        return Table("representations", title, columns, rows)
    columns += [f"behind {baseline['best']}", "p"]
    for row in rows:
        row += _difference(behind.get(row[0]), "difference")
    return Table("representations", f"{title}, and distances in points", columns, rows, note=TOGETHER)


def _drops_table(results: dict) -> Table | None:
    """Return what the removal of the top layers costs, chosen by the same test LoRAs and by others."""
    section, k = results["analysis"]["representations"], results["config"]["top_k"]
    if not section:
        return None
    crossed = results["analysis"]["cross_fitted"]["drops"] or {}
    columns, note = ["representation", "drop", "p"], TOGETHER
    rows = [[name, *_difference(section["drops"][name], "drop")] for name in _best_first(results)]
    if crossed:
        columns += ["drop, others choose", "p"]
        note += " Others choose: the layers that are removed are chosen by other test LoRAs, in five folds."
        for row in rows:
            row += _difference(crossed.get(row[0]), "drop_cf")
    return Table("representations", f"What removing {top_layers(k)} costs, in points", columns, rows, note=note)


def _difference(record: dict | None, key: str) -> list[str]:
    """Return the cells of a difference with its interval, and of its p; empty ones where there is none."""
    if record is None:
        return ["", ""]
    return [f"{percent(record[key])} ({bounds(record['interval'])})", p_cell(record["p"])]


def _concepts_table(analysis: dict) -> Table:
    """Return what is known of each concept, those that lose most by the ablation first."""
    section, compared, structure = analysis["concepts"], analysis["representations"], analysis["rank_structure"]
    columns, rows = ["concept"], [[str(name)] for name in section["classes"]]
    title = "Each concept"
    note = (
        "best layer: highest recall by one layer alone, too high as the same test LoRAs choose the layer; spread: of "
        "the features about the concept's mean"
    )
    best = compared["conditions"]["baseline"]["best"] if compared else None
    if best:
        columns += ["recall", "drop"]
        title = f"Each concept: recall by {best} with all layers, and what removing the top takes from it (points)"
        for row, recall, drop in zip(rows, section["baseline"][best], section["drop"][best], strict=True):
            row += [_known(recall), _known(drop)]
    columns += ["best layer", "spread"]
    by_class = structure["complexity"]["by_class"]
    for row, recalls, record in zip(rows, zip(*section["recall"], strict=True), by_class, strict=True):
        highest = None if None in recalls else max(recalls)
        row += [_known(highest), _known(record["spread"], number)]
    if structure["tested"] is not None:
        measure = "effective_rank" if structure["answerable"] else "norm"
        columns.append(measure.replace("_", " "))
        note += f"; {columns[-1]}: mean of the updates"
        for row, record in zip(rows, by_class, strict=True):
            row.append(f"{record[measure]:#.3g}".rstrip("."))
    if best:
        drops = [-math.inf if drop is None else drop for drop in section["drop"][best]]
        rows = [rows[c] for c in sorted(range(len(rows)), key=lambda c: -drops[c])]
    return Table("concepts", title, columns, rows, shown=10, note=f"{note}.")


def _known(value: float | None, shown: Callable[[float], str] = percent) -> str:
    """Return a number of a concept, which without test LoRAs has not all of them."""
    return "unknown" if value is None else shown(value)


# ----------------------------------------------------------------------------------------------------------------------
# Several splits
# ----------------------------------------------------------------------------------------------------------------------


def _splits_table(results: dict) -> Table:
    """Return means over splits of what each representation reaches and loses."""
    splits, k = results["splits"], results["config"]["top_k"]
    records = splits["representations"]
    rows = [
        [name, *(_over_splits(records[name][part]) for part in ("baseline", "ablation", "drop", "behind_best"))]
        for name in sorted(records, key=lambda name: -records[name]["baseline"]["mean"])
    ]
    columns = ["representation", "all layers", f"without top {k} of each", "drop", f"behind {splits['best']}"]
    note = (
        "Means over splits, in percent and points. In brackets 95 % intervals, which account for the LoRAs that splits "
        "share (Nadeau and Bengio); ranges of fewer than five splits or of equal values."
    )
    return Table("representations", f"Over {counted(splits['splits'], 'split')}", columns, rows, note=note)


def _over_splits(values: dict | None) -> str:
    return "" if values is None else spread_text(values, "").replace("  ", " ")


def _split_layers_table(results: dict) -> Table:
    """Return how often each layer is among the top k of a split, those first that most often are."""
    splits, k = results["splits"], results["config"]["top_k"]
    ordered = sorted(splits["layers"], key=lambda record: (-record["in_top_k"], -record["mean_accuracy"]))
    rows = [
        [
            f"{100 * record['in_top_k']:.0f}",
            percent(record["mean_accuracy"]),
            percent(record["sd"] or 0),
            record["layer"],
        ]
        for record in ordered
    ]
    title, columns = f"Layers over {counted(splits['splits'], 'split')}", [f"in top {k}, % of splits", "mean accuracy"]
    shown = min(MOST_IN_TEXT, sum(record["in_top_k"] > 0 for record in ordered))
    return Table("layers", title, [*columns, "sd", "layer"], rows, (3,), shown)


# ----------------------------------------------------------------------------------------------------------------------
# Attention over modules
# ----------------------------------------------------------------------------------------------------------------------


def _attention_table(section: dict | None) -> Table | None:
    """Return attention and contribution of each module, those with most attention first."""
    if not section:
        return None
    columns = [*SHARES, "gradient, %", "above permuted", "block", "projection", "module"]
    rows = [
        [
            *_shares_cells(record),
            percent(record["gradient"]),
            {None: "not tested", True: "yes", False: "no"}[record["above_permuted"]],
            record["block"] or "",
            record["projection"] or "",
            record["module"],
        ]
        for record in sorted(section["modules"], key=lambda record: -record["attention"])
    ]
    note = (
        "Contribution: what a module adds to the score (logit) of a LoRA's own class, less what it adds to all classes "
        "on average. Each interval holds alone."
    )
    return Table("modules", "Attention by module", columns, rows, (5, 6, 7, 8), 10, note)


def _attention_sums_table(section: dict | None) -> Table | None:
    """Return the sums of attention and contribution over the modules of each block, and of each projection."""
    if not section:
        return None
    rows = [
        [*_shares_cells(record), str(record["modules"]), noun, record[noun]]
        for noun in ("block", "projection")
        for record in section[f"{noun}s"]
    ]
    columns = [*SHARES, "modules", "summed by", "place"]
    return Table("modules", "Attention by block and by projection", columns, rows, (5, 6), 12)


def _shares_cells(record: dict) -> list[str]:
    around, added_around = record["interval"], record["contribution_interval"]
    return [
        percent(record["attention"]),
        bounds(around) if around else "unknown",
        number(record["contribution"]),
        bounds(added_around, number) if added_around else "unknown",
    ]
