"""The tables of the results, from the content of results.json: cells as text, for results.txt and report.html alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from report.sentences import (
    NO_OTHERS,
    ROUNDED_P,
    bounds,
    capital,
    metric,
    number,
    p_cell,
    percent,
    runs_text,
    signed,
)


@dataclass(frozen=True)
class Table:
    """Cells as text, for results.txt and report.html alike.

    Attributes:
        anchor: Of the section of report.html that shows it.
        title: What the table holds.
        columns: Heads of the columns.
        rows: Cells; rows are as long as ``columns``.
        words: Positions of the columns that hold words and are aligned left.
        shown: Number of rows that results.txt shows.
        note: A line below it.
    """

    anchor: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = field(default=(0,))
    shown: int = 20
    note: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def tables(results: dict) -> dict[str, Table]:
    """All tables by name, from the content of results.json; those whose numbers are not there are left out."""
    made = {"ranking": _ranking_table(results), "metrics": _metrics_table(results)}
    if found := results.get("analysis"):
        made |= {
            "places": _places_table(found["layers"]["groups"]),
            "conditional": _conditional_table(found.get("conditional"), results["config"]["top_k"]),
            "controls": _controls_table(results, found["robustness"]),
            "differences": _differences_table(results, found["representations"]),
            "disagreement": _disagreement_table(results, found["layer_information"]),
            "clusters": _clusters_table(found["layer_information"]["clusters"]["members"]),
            "modules": _modules_table(found["rank_structure"]),
            "concepts": _concepts_table(found),
        }
    return {name: table for name, table in made.items() if table is not None and table.rows}


def _ranking_table(results: dict) -> Table:
    """All layers; results.txt shows the top ones."""
    config, found = results["config"], results.get("analysis")
    columns = ["rank", "test accuracy", "validation", "role", "layer"]
    rows = [
        [
            str(rank),
            f"{percent(record['accuracy'])} ± {percent(record['accuracy_std'])}",
            percent(record["val_accuracy"]),
            record["role"],
            record["layer"],
        ]
        for rank, record in enumerate(results["layer_ranking"], 1)
    ]
    note = ""
    if found:
        record_of = {record["layer"]: record for record in found["layers"]["records"]}
        columns[2:2] = ["95 % interval", "p", f"in top {config['top_k']}, % of redraws"]
        for row in rows:
            of = record_of[row[-1]]
            row[2:2] = [bounds(of["interval"]), p_cell(of["p_family"]), f"{100 * of['top_k_share']:.0f}"]
        note = "p is family-wise: the choice of the best among all layers is counted in."
    words = (len(columns) - 2, len(columns) - 1)
    return Table("layers", "Each layer alone, on 7 statistics", columns, rows, words, config["top_k"], note)


def _metrics_table(results: dict) -> Table:
    """Every representation with and without the top layers."""
    k, ablation = results["config"]["top_k"], results["ablation_results"]
    columns = ["representation", "features", "test accuracy", "test F1"]
    columns += [f"features without top {k}", f"test accuracy without top {k}", f"test F1 without top {k}", "change"]
    rows = []
    for name, entry in _best_first(results):
        left = ablation[name]
        change = left["test_accuracy"]["mean"] - entry["test_accuracy"]["mean"]
        cells = [
            [str(one["num_features"]), metric(one["test_accuracy"]).strip(), metric(one["test_f1"]).strip()]
            for one in (entry, left)
        ]
        rows.append([name, *cells[0], *cells[1], signed(change)])
    return Table("representations", f"Every representation with all layers and without the top {k}", columns, rows)


def _best_first(results: dict) -> list[tuple[str, dict]]:
    return sorted(results["baseline_results"].items(), key=lambda item: -item[1]["test_accuracy"]["mean"])


def _places_table(groups: dict) -> Table:
    """Mean accuracy of the layers of each role, projection, kind of attention and block."""
    rows = [
        [kind, value, str(of["layers"]), percent(of["mean"]), bounds(of["interval"])]
        for kind, values in groups.items()
        for value, of in values.items()
    ]
    columns = ["by", "value", "layers", "mean accuracy", "95 % interval"]
    return Table("layers", "Where in the network layers predict", columns, rows, (0, 1), 16)


def _conditional_table(found: list[dict] | None, k: int) -> Table | None:
    if not found:
        return None
    rows = [[percent(one["adds"]), bounds(one["interval"]), one["layer"]] for one in found]
    title = f"What one more layer adds to the top {k}, in points"
    return Table("layers", title, ["adds", "95 % interval", "layer"], rows, (2,), 3)


def _controls_table(results: dict, found: dict) -> Table | None:
    """What is left when the top layers go, beside what is left when others do; a column for each representation."""
    if not found:
        return None
    k, total = results["config"]["top_k"], len(results["layer_ranking"])
    lines: dict[str, Callable[[dict], str]] = {
        f"all {total} layers": lambda one: _plain(one["all"]),
        f"without the top {k}": lambda one: _plain(one["without_top"]),
        f"without {k} random ones (mean, range)": lambda one: _range(one["without_random"]),
        "random draws": lambda one: str(one["without_random"]["draws"]),
        "random draws at or below the top's": lambda one: _share_below(one["without_random"]),
        f"without the bottom {k}": lambda one: _plain(one["without_bottom"]),
        f"the top {k} alone": lambda one: _plain(one["top_alone"]),
        f"survives without the top {k}": lambda one: _surviving(one["survives"]),
        "least left until half of them are gone": lambda one: _surviving(one["survives_half"]),
        "area under the curve, most first": lambda one: number(one["curves"]["most_first"]["area"]),
        "area under the curve, least first": lambda one: number(one["curves"]["least_first"]["area"]),
        "area under the curve, random order": lambda one: number(one["curves"]["random_order"]["area"]),
        "verdict": lambda one: one["verdict"],
    }
    rows = [[line, *map(tell, found.values())] for line, tell in lines.items()]
    runs = [runs_text(results, name).replace("the ", "") or f"all {one['runs']}" for name, one in found.items()]
    rows.insert(-1, ["runs", *runs])
    title = f"Removing the top {k}, and what else could be removed"
    note = (
        "In percent. Survives: of the accuracy above chance, when the most predictive layers are gone. Area: under the "
        "accuracy from all layers to none, 1 at most."
    )
    return Table("robustness", title, ["layers", *found], rows, note=note)


def _plain(found: dict) -> str:
    return f"{percent(found['accuracy'])} ({bounds(found['interval'])})"


def _range(found: dict) -> str:
    if not found["draws"]:
        return NO_OTHERS
    return f"{percent(found['mean'])}, {percent(found['min'])} to {percent(found['max'])}"


def _share_below(found: dict) -> str:
    return percent(found["share_below_top_removed"]) if found["draws"] else "none drawn"


def _surviving(found: dict | None) -> str:
    """A share with its interval and, of a curve, how many layers are gone there."""
    if found is None:
        return "too near chance"
    gone = f", {found['removed']} gone" if "removed" in found else ""
    return f"{percent(found['share'])} ({bounds(found['interval'])}){gone}"


def _differences_table(results: dict, found: dict | None) -> Table | None:
    """Intervals of the accuracies, what the ablation costs, and how far each is behind the best."""
    if not found:
        return None
    best, k = found["best"], results["config"]["top_k"]
    behind = {}
    for one in found["pairs"]["baseline"]:
        if best in (one["a"], one["b"]):
            sign = 1 if one["a"] == best else -1
            low, high = sorted(sign * bound for bound in one["interval"])
            told = f"{percent(sign * one['difference'])} ({bounds((low, high))})"
            behind[one["b"] if sign > 0 else one["a"]] = (told, p_cell(one["p_holm"]))
    rows = []
    for name, _ in _best_first(results):
        drop = found["drops"][name]
        intervals = [bounds(found["intervals"][condition][name]) for condition in ("baseline", "ablation")]
        lost = f"{percent(drop['drop'])} ({bounds(drop['interval'])})"
        rows.append([name, *intervals, lost, p_cell(drop["p_holm"]), *behind.get(name, ("", ""))])
    columns = ["representation", "all layers", f"without top {k}", "drop", "p", "behind the best", "p"]
    note = "p is corrected for the number of comparisons (Holm); all differences are over the same test LoRAs and runs."
    return Table("representations", "95 % intervals, drops and distances, in points", columns, rows, note=note)


def _disagreement_table(results: dict, found: dict) -> Table | None:
    """Disagreement and kappa between the top layers, where they are few."""
    apart, kappa = found["disagreement"]["top_k"], found["kappa"]["top_k"]
    k = len(apart)
    if not 1 < k <= 12:
        return None
    rows = [
        [f"{i + 1}. {results['layer_ranking'][i]['layer']}"]
        + ["" if i == j else f"{percent(apart[i][j])} ({number(kappa[i][j])})" for j in range(k)]
        for i in range(k)
    ]
    title = f"Test LoRAs on which two of the top {k} disagree, in percent (kappa)"
    return Table("information", title, ["layer", *(f"{j + 1}." for j in range(k))], rows)


def _clusters_table(members: list[dict]) -> Table:
    """Clusters of two or more layers."""
    rows = [
        [str(one["cluster"]), str(one["layers"])]
        + [", ".join(f"{name} {count}" for name, count in one[kind].items()) for kind in ("roles", "projections")]
        for one in members
        if one["layers"] > 1
    ]
    columns = ["cluster", "layers", "roles", "projections"]
    return Table("information", "Clusters of two or more layers", columns, rows, (2, 3))


def _modules_table(found: dict) -> Table | None:
    """Kruskal-Wallis test of each module, the clearest first."""
    if found["tested"] is None:
        return None
    ordered = sorted(found["modules"], key=lambda one: (one["p_fdr"], -one["statistic"]))
    rows = [[f"{one['statistic']:.1f}", p_cell(one["p_fdr"], ROUNDED_P), one["module"]] for one in ordered]
    title = f"{capital(found['tested'])} by concept (Kruskal-Wallis), module by module"
    return Table("rank", title, ["H", "p (false discovery rate)", "module"], rows, (2,), 3)


def _concepts_table(a: dict) -> Table:
    """What is known of each concept, those that lose most by the ablation first."""
    found, compared, structure = a["concepts"], a["representations"], a["rank_structure"]
    columns, rows = ["concept"], [[str(name)] for name in found["classes"]]
    title, last = "Each concept", "."
    if compared:
        best = compared["best"]
        columns += ["recall", "drop"]
        title = f"Each concept: recall by {best} with all layers, what the ablation takes from it (points)"
        for row, recall, drop in zip(rows, found["baseline"][best], found["drop"][best], strict=True):
            row += [_known(recall), _known(drop)]
    columns += ["best layer", "spread"]
    alone = zip(*found["recall"], strict=True)
    for row, of, one in zip(rows, alone, structure["complexity"]["by_class"], strict=True):
        row += [_known(None if None in of else max(of)), _known(one["spread"], number)]
    if structure["tested"] is not None:
        measured, last = "effective_rank" if structure["answerable"] else "norm", "; updates' mean last."
        columns.append(measured.replace("_", " "))
        for row, one in zip(rows, structure["complexity"]["by_class"], strict=True):
            row.append(f"{one[measured]:.3g}")
    if compared:
        drops = [-math.inf if drop is None else drop for drop in found["drop"][best]]
        rows = [rows[c] for c in sorted(range(len(rows)), key=lambda c: -drops[c])]
    note = f"best layer: highest recall by one layer alone; spread: of the concept's features{last}"
    return Table("concepts", title, columns, rows, shown=10, note=note)


def _known(value: float | None, shown: Callable[[float], str] = percent) -> str:
    """A number of a concept, which without test LoRAs has some not."""
    return "unknown" if value is None else shown(value)
