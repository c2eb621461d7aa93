"""Runs side by side in words, from the content of comparison.json: sentences, one table, comparison.txt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from report.names import shortened
from report.tables import MOST_IN_TEXT, Table
from report.text import WIDTH, table_lines
from report.wording import bounds, counted, listed, number, percent, sentence, signed, wrapped

TITLE = "LoRA layer ablation: runs side by side"
SOURCE = "comparison.json"
NAMED = 5  # representations in a sentence at most
MOST_DIFFERENCES = 30  # that are shown
LONGEST = 40  # characters of a name in a sentence
CODE = "environment.code"  # digest of the whole program
UNLIKE = 0.05  # distance of shares of classes from which it is told
HEADINGS = {"runs": "Runs", "differs": "What differs", "accuracy": "Accuracy", "shows": "What this shows"}
ONE_SPLIT = (
    "Intervals are over the test LoRAs and the runs of the training. Each run is one split of one set of LoRAs: what "
    "another set of as many would give, they do not say."
)
TAU = (
    "Tau is Kendall's tau-b of the layers' test accuracies. It describes: layers of a network are not independent, so "
    "no test is made."
)


@dataclass(frozen=True)
class Content:
    """Sentences and tables that comparison.txt and comparison.html share.

    Attributes:
        runs: Name of each run and what it is, in words.
        differs: Sentences on what differs, and on which runs are comparable.
        table: Accuracies of each representation in each run.
        shows: Sentences on what the comparison shows.
        rankings: Agreement of the rankings of more than two runs.
    """

    runs: list[tuple[str, str]]
    differs: list[str]
    table: Table
    shows: list[str]
    rankings: Table | None


def content_of(comparison: dict) -> Content:
    """Return the sentences and tables of a comparison."""
    shows = [
        *_changes(comparison),
        *_best(comparison),
        *_verdicts(comparison),
        *_rankings(comparison),
        *_shared(comparison),
        *_missing(comparison),
    ]
    runs = [(name_of(comparison, i), _facts(run)) for i, run in enumerate(comparison["runs"])]
    return Content(runs, list(_differs(comparison)), _table(comparison), shows, _rankings_table(comparison))


def render_text(content: Content) -> str:
    """Return comparison.txt."""
    lines = [TITLE, "", HEADINGS["runs"]]
    lines += [line for name, fact in content.runs for line in wrapped(f"{name}: {fact}", WIDTH, "  ", "    ")]
    lines += ["", HEADINGS["differs"], *_bullets(content.differs)]
    for table in filter(None, (content.table, content.rankings)):
        lines += ["", table.title, *table_lines(table, source=SOURCE)]
    return "\n".join([*lines, "", HEADINGS["shows"], *_bullets(content.shows), ""])


def _bullets(sentences: Sequence[str]) -> list[str]:
    return [line for words in sentences for line in wrapped(words, WIDTH, "- ", "  ")]


# ----------------------------------------------------------------------------------------------------------------------
# Runs, and what differs
# ----------------------------------------------------------------------------------------------------------------------


def name_of(comparison: dict, run: int) -> str:
    """Return the name of a run, the middle of a long one left out."""
    return shortened(comparison["runs"][run]["name"], lambda text: len(text) <= LONGEST)


def _named(comparison: dict, runs: Sequence[int]) -> str:
    return listed([name_of(comparison, i) for i in runs])


def _few(names: Sequence[str], noun: str) -> str:
    """Return names in a row, or how many there are."""
    return listed(names) if len(names) <= NAMED else f"{len(names)} {noun}"


def _facts(run: dict) -> str:
    parts = [
        f"{run['loras']:,} LoRAs of {run['classes']} classes and {counted(run['layers'], 'layer')}",
        f"{run['train']:,} train, {run['validation']:,} validation, {run['test']:,} test",
        f"chance {percent(run['chance'])} %",
        f"top {run['top_k']}, {counted(run['num_runs'], 'run')}, seed {run['seed']}, controls {run['controls']}",
    ]
    parts += [counted(run["splits"], "split")] if run["splits"] > 1 else []
    parts += ["a --quick run"] if run["quick"] else []
    return f"{'; '.join(parts)}; from {run['path']}"


def _differs(comparison: dict) -> Iterator[str]:
    """Yield which runs are comparable, and what differs, key by key."""
    groups = [group["runs"] for group in comparison["groups"]]
    same = {(pair["a"], pair["b"]) for pair in comparison["pairs"] if pair["same_files"]}
    for group in (group for group in groups if len(group) > 1):
        why = "as of what decides an accuracy only their LoRAs differ"
        if all((min(pair), max(pair)) in same for pair in combinations(group, 2)):
            why = "and of the same LoRAs"
        elif any((min(pair), max(pair)) in same for pair in combinations(group, 2)):
            why = "as of what decides an accuracy at most their LoRAs differ"
        yield f"Comparable, {why}: {_named(comparison, group)}."
    if alone := [group[0] for group in groups if len(group) == 1]:
        yield f"Comparable with no other run, so that accuracies only stand beside others: {_named(comparison, alone)}."
    differences = comparison["differences"]
    for record in differences[:MOST_DIFFERENCES]:
        runs_of: dict[str, list[int]] = {}
        for i, value in enumerate(record["values"]):
            runs_of.setdefault("missing" if value is None else value, []).append(i)
        told = "; ".join(f"{value} in {_named(comparison, runs)}" for value, runs in runs_of.items())
        kind = "Decides what an accuracy means" if record["decides"] else "Does not make runs incomparable"
        yield f"{kind}: {record['key']}, {told}."
    if any(record["key"] == CODE for record in differences):
        yield f"Programs differ ({CODE}), so that intervals and verdicts of these runs may be of different methods."
    if len(differences) > MOST_DIFFERENCES:
        yield f"{len(differences) - MOST_DIFFERENCES} more settings differ, see {SOURCE}."
    for pair in comparison["pairs"]:
        for what in ("classes", "layers"):
            sizes = [comparison["runs"][pair[side]][what] for side in ("a", "b")]
            if max(sizes) > pair[what]:
                first, second = (name_of(comparison, pair[side]) for side in ("a", "b"))
                common = pair[what] or "none"
                yield f"Other {what}: {sizes[0]} in {first} and {sizes[1]} in {second}, {common} in common."


# ----------------------------------------------------------------------------------------------------------------------
# What the comparison shows
# ----------------------------------------------------------------------------------------------------------------------


def _changes(comparison: dict) -> Iterator[str]:
    """Yield the differences between comparable runs, of each pair in one sentence."""
    changes, groups = comparison["changes"], comparison["groups"]
    if not changes:
        if all(len(group["runs"]) == 1 for group in groups):
            yield "No two runs are comparable, so that no difference of accuracies is given."
        else:
            yield "Comparable runs have no representation with intervals in common, on other LoRAs: none is compared."
        return
    shares_of = {frozenset((pair["a"], pair["b"])): pair["class_shares"] for pair in comparison["pairs"]}
    for a, b in dict.fromkeys((record["a"], record["b"]) for record in changes):
        yield _step(comparison, a, b, [record for record in changes if (record["a"], record["b"]) == (a, b)])
        if (shares := shares_of[frozenset((a, b))]) > UNLIKE:
            names = _named(comparison, (a, b))
            points = f"{percent(shares)} points in all"
            yield f"Shares of classes differ between {names}, by {points}, which may be the reason of a difference."
    one = len(changes) == 1
    together = "The interval of the difference has" if one else f"Intervals of all {len(changes)} differences have"
    level = f"{100 * comparison['level']:.0f} %{'' if one else ' together'}"
    yield f"{together} a level of {level} (Newcombe's, of independent test LoRAs). {ONE_SPLIT}"


def _step(comparison: dict, a: int, b: int, changes: Sequence[dict]) -> str:
    """Return what changes from one run to another."""
    first, second = changes[0]["train"]
    place = f"From {name_of(comparison, a)} ({first:,} train LoRAs) to {name_of(comparison, b)} ({second:,})"
    if first == second:
        place = f"From {name_of(comparison, a)} to {name_of(comparison, b)}, both of {first:,} train LoRAs"
    parts = []
    for verb, sign in (("gains", 1), ("loses", -1)):
        found = [record for record in changes if record["significant"] and sign * record["difference"] > 0]
        found.sort(key=lambda record: -abs(record["difference"]))
        told = [f"{record['representation']} {verb} {_points(record, sign)}" for record in found[:NAMED]]
        if len(found) > NAMED:
            told.append(f"{len(found) - NAMED} more representations {verb.removesuffix('s')} less")
        parts += [listed(told)] if told else []
    open_ones = [record["representation"] for record in changes if not record["significant"]]
    if open_ones and not parts:
        among = "the one representation" if len(open_ones) == 1 else f"any of {len(open_ones)} representations"
        parts.append(f"neither gain nor loss is shown for {among} of both")
    elif open_ones:
        parts.append(f"no change is shown for {_few(open_ones, 'others')}")
    return sentence(f"{place}, with all layers {'; '.join(parts)}")


def _points(record: dict, sign: int) -> str:
    interval = sorted(sign * bound for bound in record["interval"])
    return f"{percent(sign * record['difference'])} points ({bounds(interval)})"


def _best(comparison: dict) -> Iterator[str]:
    """Yield the best representation of each run, as the run decided on validation LoRAs."""
    parts = []
    for i, run in enumerate(comparison["runs"]):
        scores = {record["run"]: record for record in comparison["representations"].get(run["best"], [])}
        if i in scores:
            interval = f" ({bounds(scores[i]['interval'])})" if scores[i]["interval"] else ""
            reached = f"{percent(scores[i]['accuracy'])} %{interval}"
            parts.append(f"{run['best']} in {name_of(comparison, i)}, {reached}")
        elif run["best"] is None and run["analysed"]:
            parts.append(f"none in {name_of(comparison, i)}")
    if parts:
        yield f"Best with all layers, chosen on validation LoRAs: {'; '.join(parts)}."


def _verdicts(comparison: dict) -> Iterator[str]:
    """Yield each run's verdict on the removal of layers, by representation."""
    for name, scores in comparison["representations"].items():
        runs_of: dict[str, list[int]] = {}
        for record in scores:
            if record["verdict"]:
                runs_of.setdefault(record["verdict"], []).append(record["run"])
        if runs_of:
            told = "; ".join(f"{verdict} in {_named(comparison, runs)}" for verdict, runs in runs_of.items())
            yield f"Without its most predictive layers, {name} is {told}."


def _rankings(comparison: dict) -> Iterator[str]:
    """Yield how far the rankings of the layers agree."""
    told = False
    for pair in comparison["pairs"]:
        names, tau = _named(comparison, (pair["a"], pair["b"])), pair["kendall_tau"]
        if not pair["layers"]:
            yield f"Rankings cannot be compared, as no layer is in both: {names}."
        elif tau is None:
            why = f"{counted(pair['layers'], 'layer')} in common, or all of one run equal"
            yield f"Rankings cannot be compared ({why}): {names}."
        elif len(comparison["runs"]) == 2:
            top = f"{pair['same_top_k']} of the top {pair['top_k']} are the same"
            chance = "" if pair["by_chance"] is None else f" ({number(pair['by_chance'])} by chance)"
            over = counted(pair["layers"], "layer")
            yield f"The rankings of {names} agree over {over} with a tau of {number(tau)}; {top}{chance}."
        told = told or tau is not None
    if told:
        yield TAU


def _shared(comparison: dict) -> Iterator[str]:
    """Yield which runs are of the same LoRAs, and which of those that are compared share some."""
    pairs_of: dict[str, list[str]] = {}
    together = {(record["a"], record["b"]) for record in comparison["changes"]}
    for pair in comparison["pairs"]:
        if not pair["same_files"] and not {(pair["a"], pair["b"]), (pair["b"], pair["a"])} & together:
            continue
        if pair["same_files"]:
            told = "Of the same LoRAs, so that their accuracies are not independent"
        elif pair["shared"]:
            tested = f"{pair['shared_test']:,} of them test LoRAs of both"
            so = ", and accuracies not independent" if pair["shared_test"] else ""
            loras = f"{pair['shared']:,} LoRAs" if pair["shared"] > 1 else "1 LoRA"
            told = f"By path and label {loras} may be the same, {tested}{so}"
        elif pair["shared"] is None:
            told = "Whether LoRAs are the same is not known, without samples.csv of both"
        else:
            continue
        pairs_of.setdefault(told, []).append(_named(comparison, (pair["a"], pair["b"])))
    for told, pairs in pairs_of.items():
        yield f"{told}: {'; '.join(pairs)}."


def _missing(comparison: dict) -> Iterator[str]:
    """Yield what runs have not done."""
    for i, run in enumerate(comparison["runs"]):
        name = name_of(comparison, i)
        if not run["analysed"]:
            yield f"No analysis is in {name}: its accuracies stand without intervals."
        if run["unsized"]:
            why = "as they are of no number of independent test LoRAs, as where all are one group"
            yield f"Intervals in {name} are left out, {why}: {_few(run['unsized'], 'representations')}."
        for what, reason in (*run["not_run"].items(), *run["not_done"].items()):
            yield sentence(f"Missing in {name}: {what} ({reason.rstrip('.')})")


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def ordered(comparison: dict) -> list[str]:
    """Return the representations, that of the highest validation accuracy in any run first."""
    scores = comparison["representations"]
    return sorted(scores, key=lambda name: -max(record["validation"] for record in scores[name]))


def _table(comparison: dict) -> Table:
    """Return a row for each representation of each run, comparable runs below each other."""
    place = {i: n for n, i in enumerate(i for group in comparison["groups"] for i in group["runs"])}
    change_of: dict[tuple[str, int], dict] = {}
    for record in comparison["changes"]:
        change_of.setdefault((record["representation"], record["b"]), record)  # neighbours come before first and last
    rows = []
    for name in ordered(comparison):
        for record in sorted(comparison["representations"][name], key=lambda record: place[record["run"]]):
            run, change = comparison["runs"][record["run"]], change_of.get((name, record["run"]))
            rows.append(
                [
                    name,
                    name_of(comparison, record["run"]),
                    f"{run['train']:,}",
                    _accuracy(record["accuracy"], record["interval"]),
                    {True: "yes", False: "no", None: ""}[record["above_null"]],
                    _accuracy(record["without_top"], record["without_top_interval"]),
                    record["verdict"] or "",
                    _change(change) if change else "",
                ]
            )
    columns = ["representation", "run", "train LoRAs", "all layers, %", "above chance", "without the top, %"]
    columns += ["verdict", "change, points"]
    note = (
        "In brackets 95 % intervals. above chance: of permuted labels, as each run decides. without the top: without "
        "its own top k layers."
    )
    if comparison["changes"]:
        note += (
            " change: from the comparable run before it, of fewer or as many train LoRAs, with an interval that holds "
            "for all changes together; *: it excludes 0."
        )
    title = "Test accuracy of each representation in each run"
    return Table("accuracy", title, columns, rows, (0, 1, 4, 6), MOST_IN_TEXT, note)


def _accuracy(accuracy: float | None, interval: list | None) -> str:
    if accuracy is None:
        return ""
    return f"{percent(accuracy)} ({bounds(interval)})" if interval else percent(accuracy)


def _change(record: dict) -> str:
    low, high = map(signed, record["interval"])
    return f"{signed(record['difference'])} ({low} to {high}){' *' if record['significant'] else ''}"


def _rankings_table(comparison: dict) -> Table | None:
    """Return tau of all pairs of more than two runs, and how many of their top layers are the same."""
    count = len(comparison["runs"])
    if count < 3:
        return None
    cells = [["" for _ in range(count)] for _ in range(count)]
    for pair in comparison["pairs"]:
        if pair["kendall_tau"] is not None:
            cells[pair["b"]][pair["a"]] = number(pair["kendall_tau"])
        if pair["same_top_k"] is not None:
            cells[pair["a"]][pair["b"]] = f"{pair['same_top_k']} of {pair['top_k']}"
    names = [name_of(comparison, i) for i in range(count)]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    title = "Rankings of the layers: below the diagonal Kendall's tau-b, above it the top layers that are the same"
    return Table("shows", title, ["run", *names], rows, sortable=False)
