"""Other columns that the weights tell: sentences and tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from report.tables import Table
from report.wording import accuracy_text, bounds, listed, p_cell, p_text, percent

MOST_NAMED = 8  # columns in a sentence
MOST_REASONS = 12  # of columns that are left out, likewise
IN_A_TABLE, MOST_TABLES = 6, 5  # columns side by side, and tables of them
BEYOND, THROUGH = "beyond the concept", "perhaps through the concept"  # outcomes of a column that is told


def lines(results: dict) -> list[str]:
    """Return the sentences; none where the section is not there."""
    section = (results.get("analysis") or {}).get("also")
    if section is None:
        return []
    columns = section["columns"]
    by_outcome = defaultdict(list)
    for column in columns:
        by_outcome[column["outcome"]].append(column)
    told, through = by_outcome[BEYOND], by_outcome[THROUGH]
    said = [_first(columns, [*told, *through])]
    if through:
        compared = _named([f"{column['column']} ({_within(column)})" for column in through])
        said.append(f"Perhaps known only through the concept: {compared}.")
    if chance := [column for column in columns if column not in (*told, *through)]:
        shown = _named([f"{column['column']} ({_short_of(column, len(columns))})" for column in chance])
        said.append(f"Indistinguishable from permuted values: {shown}.")
    if columns:
        said.append(_how(section))
    if any(column["too_few_permutations"] for column in columns):
        said.append(
            f"For {len(columns):,} columns together no accuracy can be significant by {columns[0]['permutations']:,} "
            "permutations: name fewer columns."
        )
    more = {record["reason"]: record["columns"] for record in section["left_out_more"]}
    if reasons := _by_reason(section["left_out"], "column", more):
        said.append(f"Left out: {reasons}.")
    failed = [
        {"representation": f"{record['representation']} of {column['column']}", "reason": record["reason"]}
        for column in columns
        for record in column["failed"]
    ]
    if reasons := _by_reason([*section["not_probed"], *failed], "representation"):
        said.append(f"Without a probe: {reasons}.")
    return said


def _first(columns: Sequence[dict], told: Sequence[dict]) -> str:
    """Return the sentence on the columns that are told."""
    if not columns:
        return "No other column of these LoRAs was tried."
    if not told:
        return f"The weights tell none of the other columns that were tried: {_named([c['column'] for c in columns])}."
    shown = _named([f"{column['column']} by {_chosen(column)}, {_accuracy(column)}" for column in told], "; ")
    if len(columns) == 1:
        return f"The weights tell {shown}."
    return f"The weights tell {len(told)} of the {len(columns)} other columns tried: {shown}."


def _chosen(column: dict) -> str:
    """Return the best representation on validation LoRAs, and how many are as good there."""
    tied = len(column["tied_on_validation"])
    return column["best"] + (f" ({tied} more equal on validation LoRAs)" if tied else "")


def _accuracy(column: dict) -> str:
    best = _best(column)
    return f"{accuracy_text(best)}, against {percent(column['chance'])} % by always guessing its commonest value"


def _best(column: dict) -> dict:
    (record,) = (record for record in column["representations"] if record["representation"] == column["best"])
    return record


def _within(column: dict) -> str:
    """Return the accuracy that is left of a column where values are permuted within each concept."""
    if not (beyond := column["beyond_concept"]):
        return "not tested, as groups have LoRAs of several concepts"
    left = f"{percent(beyond['permuted'])} % with values permuted within each concept"
    return f"{left}, {p_text(beyond['p_family'])}"


def _short_of(column: dict, count: int) -> str:
    """Return the accuracy of one of ``count`` columns, which is not told, and what it would have to be."""
    reached, needed = percent(_best(column)["accuracy"]), column["needed"]
    if column["too_few_permutations"]:
        return f"{reached} %"
    if needed > 1 - 1e-9:
        together = f" for {count:,} columns together" if count > 1 else ""
        return f"{reached} %; by {column['split_sizes']['test']} test LoRAs{together} even 100 % would be"
    return f"{reached} %; more than {percent(needed)} % would not be"


def _how(section: dict) -> str:
    columns = section["columns"]
    most = section["most_train"]
    fewer = f", on {most:,} train LoRAs" if any(c["trained_on"] < c["split_sizes"]["train"] for c in columns) else ""
    together = f", and for {len(columns)} columns" if len(columns) > 1 else ""
    return (
        f"Each is predicted by linear classifiers{fewer} on features of all layers that know nothing of it. The best "
        f"is chosen by validation; p hold for all representations together{together}."
    )


def _named(names: Sequence[str], between: str = "", more: int = 0) -> str:
    """Return the first names in a row, and how many more there are, with ``more`` that have no names here."""
    more += max(0, len(names) - MOST_NAMED)
    shown = [*names[:MOST_NAMED], *([f"{more:,} more"] if more else [])]
    return between.join(shown) if between else listed(shown)


def _by_reason(records: Sequence[dict], key: str, more: Mapping[str, int] | None = None) -> str:
    """Return names with the reason of each, those of one reason together, and of ``more`` the number by reason."""
    names, more = defaultdict(list), more or {}
    for record in records:
        names[record["reason"]].append(record[key])
    shown = sorted(names, key=lambda reason: -len(names[reason]))[:MOST_REASONS]  # those of the most names
    parts = [f"{_named(names[reason], more=more.get(reason, 0))} ({reason})" for reason in names if reason in shown]
    rest = sum(len(of_reason) for reason, of_reason in names.items() if reason not in shown)
    return "; ".join([*parts, *([f"{rest:,} more for other reasons"] if rest else [])])


def tables(results: dict) -> dict[str, Table]:
    """Return the tables by name; none where the section is not there."""
    section = (results.get("analysis") or {}).get("also")
    if not section or not section["columns"]:
        return {}
    columns = section["columns"]
    made = {"other columns": _summary(columns)}
    parts = [columns[start : start + IN_A_TABLE] for start in range(0, len(columns), IN_A_TABLE)]
    for i, part in enumerate(parts[:MOST_TABLES]):
        made[f"other columns by representation {i + 1}"] = _by_representation(part)
    return made


def _summary(columns: Sequence[dict]) -> Table:
    rows = [
        [
            column["column"],
            str(len(column["values"])),
            str(column["split_sizes"]["test"]),
            column["best"],
            percent(_best(column)["accuracy"]),
            bounds(_best(column)["interval"]),
            p_cell(_best(column)["p_family"]),
            percent(column["chance"]),
            percent(column["beyond_concept"]["permuted"]) if column["beyond_concept"] else "",
            column["outcome"],
        ]
        for column in columns
    ]
    heads = ["column", "values", "test LoRAs", "best", "accuracy", "95 % interval", "p", "guessing"]
    heads += ["within concepts", "outcome"]
    note = (
        "Accuracy in percent on the test LoRAs; guessing: always the commonest value of the train LoRAs; within "
        "concepts: where values are permuted within each concept, on average."
    )
    return Table(
        "also", "Other columns, each by the best representation on validation LoRAs", heads, rows, (0, 3, 9), note=note
    )


def _by_representation(columns: Sequence[dict]) -> Table:
    """Return the table of the accuracy of each representation, columns of the collection side by side."""
    records = [{record["representation"]: record for record in column["representations"]} for column in columns]
    names = dict.fromkeys(name for of_column in records for name in of_column)
    rows = [[name, *(_cell(of_column.get(name)) for of_column in records)] for name in names]
    rows.append(["always guessing", *(percent(column["chance"]) for column in columns)])
    rows.append(["from the concept", *(percent(column["from_concept"]["accuracy"]) for column in columns)])
    heads = ["representation", *(column["column"] for column in columns)]
    note = (
        "*: above what permuted values give, for all representations and columns together. From the concept: the "
        "commonest value of the train LoRAs of its concept."
    )
    return Table("also", "Accuracy of each representation for each column, %", heads, rows, shown=len(rows), note=note)


def _cell(record: dict | None) -> str:
    if record is None:  # its probe failed
        return ""
    return percent(record["accuracy"]) + (" *" if record["significant"] else "")
