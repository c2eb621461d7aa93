"""Steps of the training: sentences and tables; figures_of_steps.py draws them.

"Trained there" is trained and tested at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence

from report.names import full_names
from report.tables import Table
from report.wording import accuracy_text, bounds, counted, listed, number, p_cell, percent, ranges, sentence, signed

NAMED = 4  # modules in a sentence, at most
STEPS_SHOWN = 8  # in the table of modules, at most
NONE = "none"
SIZELESS = ("update_views", "update_kernel")  # cosines of updates, which know nothing of their sizes


def lines(results: dict) -> list[str]:
    """Return the sentences; none where the section is not there."""
    section = (results.get("analysis") or {}).get("dynamics")
    if not section:
        return []
    if not section["answerable"]:
        return [f"Steps of the training are there, and cannot be compared: {section['why']}"]
    curves = section["representations"]
    told = [_there(section, name) for name in reversed(curves)]  # that of whole modules first, which knows most
    told += [line for name in reversed(curves) for line in _form(section, name)]
    told += _modules(results, section) if section["modules"] else []
    told += [sentence(f"single modules were not trained: {section['modules_why']}")] if section["modules_why"] else []
    return [*told, *_design(section)]


def _at(step: str) -> str:
    """Return a step as a place: ``step 60``, or ``the final step``."""
    return "the final step" if step == "final" else f"step {step}"


def _there(section: dict, name: str) -> str:
    """Return from which step on a representation tells the concept, trained there and trained at the last alone."""
    steps, curve = section["steps"], section["representations"][name]
    last, end = _at(steps[-1]), accuracy_text(curve["each"]["points"][-1])
    onset, alone = curve["each"]["onset"], curve["last"]["onset"]
    if onset is None:
        return (
            f"By {name} the concept is indistinguishable from permuted labels at {last}: {end} of "
            f"{counted(section['loras']['tested'], 'test LoRA')}, with chance at {percent(section['chance'])} %."
        )
    if onset == steps[-1]:
        only = f"Only at {last} is the concept distinguishable from permuted labels by {name} trained there"
        return f"{only}: {end}, with chance at {percent(section['chance'])} %."
    from_step = "From the first step" if onset == steps[0] else f"From {_at(onset)}"
    there = accuracy_text(curve["each"]["points"][steps.index(onset)])
    first = f"{from_step} on the concept is distinguishable from permuted labels by {name} trained there: {there}"
    first += f" at {_at(onset)}, {end} at {last}, with chance at {percent(section['chance'])} %"
    if alone in (None, steps[-1]):
        return f"{first}; trained at {last} alone it tells it only there."
    reached = percent(curve["last"]["points"][steps.index(alone)]["accuracy"])
    return f"{first}; trained at {last} alone it tells it from {_at(alone)} on ({reached} %)."


def _form(section: dict, name: str) -> list[str]:
    """Return at which steps training there tells more, or less, than training at the last; none without an onset."""
    curve, last = section["representations"][name], _at(section["steps"][-1])
    if curve["each"]["onset"] is None:
        return []
    told = []
    for more, words in ((True, "more"), (False, "less")):
        found = [record for record in curve["form"] if record["significant"] and (record["difference"] > 0) == more]
        if found:
            points = [record["difference"] for record in found]
            reach = signed(points[0]) if len(found) == 1 else f"{signed(min(points))} to {signed(max(points))}"
            noun = "step" if len(found) == 1 else "steps"
            told.append(f"{words} at {noun} {listed([record['step'] for record in found])} ({reach} points)")
    start = f"Trained there, {name} recognises significantly"
    if not told:
        return [f"{start} more than trained at {last} at no earlier step: no change of form is shown."]
    change = ""
    if told[0].startswith("more"):
        form = "form" if name in SIZELESS else "form or size"
        change = f": what tells the concept there differs in {form} from what tells it at the end"
    return [f"{start} {', and '.join(told)} than trained at {last}{change}."]


def _modules(results: dict, section: dict) -> list[str]:
    """Return how many modules alone tell the concept at each step, the earliest, and which groups rise earlier."""
    modules, steps = section["modules"], section["steps"]
    counts = [f"{count} at {step}" for step, count in zip(steps, modules["each"]["above"], strict=True)]
    total, reader = len(modules["records"]), modules["representation"]
    told = [
        f"Of {counted(total, 'module')} alone, trained there ({reader}), distinguishable from permuted labels are, by "
        f"step: {', '.join(counts)}."
    ]
    if first := modules["earliest"]:
        names = full_names(results["analysis"])
        shown = [names.get(module, module) for module in first["modules"]]
        more = len(shown) - NAMED
        words = f"{', '.join(shown[:NAMED])} and {more} more" if more > 0 else listed(shown)
        told.append(
            f"Earliest, from {_at(first['step'])} on: {words}. That others begin later is not shown by this: with more "
            "test LoRAs they may be told earlier."
        )
    return told + _contrasts(modules["contrasts"])


def _contrasts(contrasts: Sequence[dict]) -> list[str]:
    """Return which groups of modules rise earlier than others, and of which that is undecided."""
    told, undecided = [], []
    for contrast in contrasts:
        names, sign = [contrast["first"], contrast["second"]], 1
        if contrast["earlier"] is None:
            around = bounds(contrast["interval"], number) if contrast["interval"] else contrast["why"]
            undecided.append(f"{names[0]} and {names[1]} ({around})")
            continue
        if contrast["earlier"] == names[0]:
            names, sign = names[::-1], -1
        interval = sorted(sign * bound for bound in contrast["interval"])
        by = f"{number(sign * contrast['difference'])} ({bounds(interval, number)}) doublings of the step"
        told.append(f"Modules of {names[1]} rise earlier than those of {names[0]}, by {by} on average.")
    if undecided:
        told.append(f"Which rise earlier is undecided of {'; of '.join(undecided)}.")
    return told


def _design(section: dict) -> list[str]:
    """Return what was compared, and what was left out."""
    loras, steps = section["loras"], section["steps"]
    design = (
        f"Compared are {counted(loras['followed'], 'LoRA')} at {len(steps)} steps ({', '.join(steps)}), all of a LoRA "
        f"on one side of the split: {loras['trained']} train and {loras['tested']} test LoRAs."
    )
    others = []
    if loras["left_out"]:
        others.append(f"{counted(loras['left_out'], 'LoRA')} that lack one of these, or have several labels")
    if section["left_out_steps"]:
        noun = "step" if len(section["left_out_steps"]) == 1 else "steps"
        others.append(f"{noun} {ranges(section['left_out_steps'])}")
    return [design, *([f"Left out are {' and '.join(others)}."] if others else [])]


def finding(results: dict) -> str | None:
    """Return the finding of the figure; None where steps cannot be compared."""
    section = results["analysis"]["dynamics"]
    if not section["answerable"]:
        return None
    parts, steps, modules = [], section["steps"], section["modules"]
    for name in reversed(section["representations"]):
        onsets = [section["representations"][name][how]["onset"] for how in ("each", "last")]
        there, alone = (f"from {_at(onset)} on" if onset else "at no step" for onset in onsets)
        parts.append(f"{name} is above chance {there} (trained at {_at(steps[-1])} alone {alone})")
    if modules:
        counts = modules["each"]["above"]
        parts.append(
            f"{counts[0]} of {len(modules['records'])} modules do at {_at(steps[0])}, {counts[-1]} at {_at(steps[-1])}"
        )
    return "; ".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def tables(results: dict) -> dict[str, Table]:
    """Return the tables by name; none where the section is not there."""
    section = (results.get("analysis") or {}).get("dynamics")
    if not section or not section["answerable"]:
        return {}
    made = {"dynamics": _steps_table(section)}
    if section["modules"]:
        made["dynamics modules"] = _modules_table(section, full_names(results["analysis"]))
    return made


def _steps_table(section: dict) -> Table:
    last = section["steps"][-1]
    columns = ("representation", "step", "trained there, %", "95 % interval", "p")
    columns += (f"trained at {last}, %", "95 % interval", "p", "difference, points")
    rows = []
    for name, curve in section["representations"].items():
        form = [f"{signed(r['difference'])}{' *' if r['significant'] else ''}" for r in curve["form"]] + [""]
        for s, step in enumerate(section["steps"]):
            cells = [_cells(curve[how]["points"][s]) for how in ("each", "last")]
            rows.append([name, step, *cells[0], *cells[1], form[s]])
    note = (
        "p is family-wise over the steps of a column; * a significant difference of all earlier steps together. Steps "
        "are of the same test LoRAs."
    )
    return Table("dynamics", "Accuracy by step of the training", columns, rows, note=note, shown=40, sortable=False)


def _cells(point: dict) -> list[str]:
    return [percent(point["accuracy"]), bounds(point["interval"]), p_cell(point["p_family"])]


def _modules_table(section: dict, names: dict[str, str]) -> Table:
    steps, records = section["steps"], section["modules"]["records"]
    last = len(steps) - 1
    shown = sorted({round(i * last / (STEPS_SHOWN - 1)) for i in range(STEPS_SHOWN)})
    order = sorted(range(len(records)), key=lambda i: (*_rank(steps, records[i]), i))
    rows = [
        [
            names.get(records[i]["module"], records[i]["module"]),
            records[i]["each"]["onset"] or NONE,
            records[i]["last"]["onset"] or NONE,
            *(percent(records[i]["each"]["accuracy"][s]) for s in shown),
        ]
        for i in order
    ]
    columns = ("module", "onset", f"onset, trained at {steps[-1]}", *(f"% at {steps[s]}" for s in shown))
    note = (
        "Each module alone, trained there. An onset is the first step from which on all are distinguishable from "
        "permuted labels, family-wise over modules and steps."
    )
    return Table("dynamics", "Modules by their onset", columns, rows, note=note)


def _rank(steps: Sequence[str], record: dict) -> tuple[float, ...]:
    """Return what orders modules: their onset, then accuracy at the first steps."""
    onset = record["each"]["onset"]
    return (steps.index(onset) if onset else len(steps), *(-accuracy for accuracy in record["each"]["accuracy"]))
