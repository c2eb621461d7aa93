"""Values of a column that were held out: sentences and table. Their figure: figures_of_holdout.py."""

from __future__ import annotations

from report.names import shortened
from report.tables import Table
from report.wording import bounds, capital, counted, gain_text, listed, p_cell, percent, whole_percent

NAMED = 5  # values of one reason that are named at most
LETTERS = 40  # of a value that are shown at most


def lines(results: dict) -> list[str]:
    """Return the sentences; none where the section is not there."""
    section = (results.get("analysis") or {}).get("holdout")
    if not section:
        return []
    if section["why"]:
        return [f"Not measured for {section['column']}: {section['why']}.", *_left_out(section)]
    return [
        headline(section),
        *_others(section),
        _values(section),
        *_losing(section),
        _sizes(section),
        *_left_out(section),
    ]


def headline(section: dict) -> str:
    """Return the verdict with its numbers, of the representation of the highest ordinary validation accuracy."""
    name, record = section["best"], section["representations"][section["best"]]
    held = record["held_out"]
    reached = (
        f"{name} recognises {percent(held['accuracy'])} % ({bounds(held['interval'])}) of the LoRAs of a value of "
        f"{section['column']} that no training saw, on average over {counted(len(section['values']), 'value')}"
    )
    if record["loss"]:
        loss = record["loss"]
        reached += f"; {_loss_words(loss)} on the {counted(loss['loras'], 'LoRA')} that the ordinary split tests too"
        reached += f" ({percent(loss['held_out'])} % where it reaches {percent(loss['ordinary'])} %)"
    why = f". {capital(record['why'])}" if record["why"] else ""
    return f"{capital(record['verdict'])}: {reached}{why}."


def _loss_words(loss: dict) -> str:
    """Return the average loss, or gain, in points with its interval."""
    verb, sign = ("gains", -1) if percent(loss["mean"]).startswith("-") else ("loses", 1)
    interval = sorted(sign * bound for bound in loss["interval"])
    return f"it {verb} {percent(sign * loss['mean'])} points ({bounds(interval)})"


def _others(section: dict) -> list[str]:
    """Return the verdicts of the other representations in one sentence."""
    parts = []
    for name, record in section["representations"].items():
        if name != section["best"]:
            lost = f", {_loss_words(record['loss']).removeprefix('it ')}" if record["loss"] else ""
            parts.append(f"{name} {percent(record['held_out']['accuracy'])} %{lost}: {record['verdict']}")
    return [f"Likewise {'; '.join(parts)}. Intervals of losses hold for all together."] if parts else []


def _values(section: dict) -> str:
    """Return the worst value, and how many are above chance, of the best representation."""
    name, record = section["best"], section["representations"][section["best"]]
    place = next(i for i, value in enumerate(section["values"]) if value["value"] == record["worst"])
    value, found = section["values"][place], record["values"][place]
    text = f"Each value reaches {percent(found['accuracy'])} %. "
    if len({percent(of_value["accuracy"]) for of_value in record["values"]}) > 1:
        text = (
            f"The worst value is {_cut(value['value'])}: {name} recognises {percent(found['accuracy'])} % "
            f"({bounds(found['interval'])}) of its {counted(value['loras'], 'LoRA')}{_in_groups(value)}, where always "
            f"guessing the largest class of the others is right on {percent(value['chance'])} %. "
        )
    if not record["tested"]:
        return f"{text}The LoRAs of each value are of one class, so that no chance can be tested."
    of_one = len(section["values"]) - record["tested"]
    untested = f"; {of_one} of one class not tested" if of_one else ""
    above = f"{_number(record['above_chance'])} of {counted(record['tested'], 'value')}"
    return f"{text}{above} {'are' if record['above_chance'] > 1 else 'is'} above chance{untested}."


def _losing(section: dict) -> list[str]:
    """Return how many values lose significantly, of those that could, and how many others may."""
    record = section["representations"][section["best"]]
    compared, detectable = sum(found["loss"] is not None for found in record["values"]), record["detectable"]
    if not compared:
        return []
    few = "the ordinary classifier recognises too few of the compared LoRAs"
    if not detectable:
        return [f"Whether a value loses cannot be told: of none would a total loss be significant, as {few}."]
    losing = f"{'lose' if record['losing'] > 1 else 'loses'} significantly"
    may = f"that are not here up to {whole_percent(record['losing_at_most'])} % may (upper bound of 95 %)"
    if detectable == compared:
        return [f"{_number(record['losing'])} of {counted(compared, 'value')} {losing}; of values {may}."]
    others = f"Of the other {compared - detectable}" if compared - detectable > 1 else "Of the other one"
    those = f"{counted(detectable, 'value')} of which a total loss would be significant"
    return [f"{_number(record['losing'])} of {those} {losing}; of such values {may}. {others} it would not be: {few}."]


def _cut(value: str) -> str:
    """Return a value, its middle left out where it is long."""
    return shortened(value, lambda text: len(text) <= LETTERS)


def _in_groups(value: dict) -> str:
    """Return in how many groups the LoRAs of a value are, where these are fewer; else nothing."""
    return f" in {counted(value['groups'], 'group')}" if value["groups"] < value["loras"] else ""


def _number(count: int) -> str:
    return str(count) if count else "None"


def _sizes(section: dict) -> str:
    """Return how many LoRAs the trainings had."""
    sizes = sorted({value["trained"] for value in section["values"]})
    reach = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    fewer, usual = sizes[0] < section["trained"], section["trained"]
    note = "; fewer LoRAs alone may lose something" if fewer else ""
    return f"Trainings without a value had {reach} LoRAs, those of the ordinary split {usual}{note}."


def _left_out(section: dict) -> list[str]:
    """Return the values and representations that are left out, with the reasons."""
    sentences = []
    if section["without_value"]:
        verbs = ("has", "is") if section["without_value"] == 1 else ("have", "are")
        sentences.append(
            "{} {} no value, and {} never tested.".format(counted(section["without_value"], "LoRA"), *verbs)
        )
    for entry in section["left_out"]:
        named = [f"{_cut(value['value'])} ({value['loras']}{_in_groups(value)})" for value in entry["named"][:NAMED]]
        named += [f"{entry['count'] - len(named):,} more"] if entry["count"] > len(named) else []
        sentences.append(f"Left out: {listed(named)}: {entry['reason']}.")
    sentences += [f"Not run is {name}: {reason}." for name, reason in section["not_run"].items()]
    return sentences


def tables(results: dict) -> dict[str, Table]:
    """Return the tables by name; none where nothing was measured."""
    section = (results.get("analysis") or {}).get("holdout")
    if not section or section["why"]:
        return {}
    rows = []
    for name, record in section["representations"].items():
        for value, found in zip(section["values"], record["values"], strict=True):
            usual, loss = found["ordinary"], found["loss"]
            rows.append(
                [
                    name,
                    _cut(value["value"]),
                    f"{value['loras']}{_in_groups(value)}",
                    percent(found["accuracy"]),
                    bounds(found["interval"]),
                    "" if found["p"] is None else p_cell(found["p"]),
                    percent(value["chance"]),
                    str(value["compared"]),
                    percent(usual["accuracy"]) if usual else "",
                    gain_text(loss | {"drop": loss["difference"]}) if loss else "",
                ]
            )
    columns = ["representation", "value", "LoRAs", "held out, %", "95 % interval", "p", "chance, %", "compared"]
    columns += ["ordinary, those, %", "change, those"]
    note = (
        "Chance: the largest class of the train LoRAs. Compared: LoRAs that the ordinary split tests too, of which "
        "alone are the accuracy there and the change, in points. p, and intervals of changes, hold for all values "
        "together, and few runs that differ make them wide; "
        f"* p < {results['analysis']['alpha']}."
    )
    title = f"Values of {section['column']} that were held out"
    return {"holdout": Table("holdout", title, columns, rows, (0, 1), len(rows), note)}
