"""Predictions of new LoRAs as a table, csv or JSON; and what a run says of the classifiers that it has kept."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from report.wording import counted, listed

SPOKEN = 3  # modules that are named
WIDEST = 60  # letters of a file's name in the table, its end


def model_lines(results: dict, folder: Path) -> list[str]:
    """Return what was kept of a run in ``model/`` of its folder, and how it is used; nothing where nothing was."""
    model = results.get("model")
    if not model:
        return []
    others = [entry for entry in model["not_kept"] if entry["representation"]]
    lines = [f"  model/ is without {entry['representation']}: {entry['reason']}" for entry in others]
    if not model["kept"]:
        return lines
    names = listed([record["representation"] for record in model["kept"]])
    command = f"python predict.py {shlex.quote(str(folder))} FILE_OR_FOLDER"
    return [f"  model/ keeps {names} ({model['bytes'] / 2**20:.1f} MiB): {command}", *lines]


def heading(record: dict, classes: Sequence[str], name: str) -> str:
    """Return what predicts, in a line, given its record in the manifest, the classes and the name of the dataset."""
    runs = counted(record["runs"], "run") if record["kind"] in ("layers", "attention") else "support vector machine"
    right, validation = f"{100 * record['validation_accuracy']:.1f} %", record["validation"]
    chance = f"{100 * validation['chance']:.1f} %"
    return (
        f"{record['representation']} ({runs}) of {name}, {len(classes)} classes; right on {right} of "
        f"{counted(validation['loras'], 'validation LoRA')}, where the largest class has {chance}"
    )


def table(files: Sequence[dict], skipped: Sequence[dict]) -> str:
    """Return a line for each file, and one for each that was left out."""
    rows = [("file", "label", "probability", "agreement", "unlike")]
    for record in files:
        unlike = record["unlike"]
        said = "not measurable: too few held-out LoRAs" if unlike["bound"] is None else ""
        if unlike["flagged"]:
            said = f"unlike anything in training ({unlike['score']:.1f}, usual up to {unlike['bound']:.1f})"
        agreement = f"{100 * record['agreement']:.0f} %" if len(record["runs"]) > 1 else "-"
        shares = f"{100 * record['probability']:.1f} %", agreement
        rows.append((_end_of(record["file"]), record["label"], *shares, said))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for number, (file, label, probability, agreement, said) in enumerate(rows):
        line = (
            f"{file:<{widths[0]}}  {label:<{widths[1]}}  {probability:>{widths[2]}}  {agreement:>{widths[3]}}  {said}"
        )
        lines.append(line.rstrip())
        modules = (files[number - 1]["modules"] if number else None) or []
        if speaking := [entry["module"] for entry in modules[:SPOKEN] if entry["contribution"] > 0]:
            lines.append(f"  most for it: {', '.join(speaking)}")
    lines += [f"left out: {record['file']}: {record['reason']}" for record in skipped]
    return "\n".join(lines)


def _end_of(name: str) -> str:
    """Return a file's name, or its end behind three dots."""
    return name if len(name) <= WIDEST else f"...{name[3 - WIDEST :]}"


def as_csv(files: Sequence[dict], cell: Callable[[str], str]) -> str:
    """Return a line for each file under a heading; ``cell`` makes a text one that no spreadsheet computes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "label", "probability", "agreement", "unlike", "unlike_score", "unlike_bound"])
    for record in files:
        unlike = record["unlike"]
        shown = f"{record['probability']:.6f}", f"{record['agreement']:.6f}", str(unlike["flagged"]).lower()
        scores = f"{unlike['score']:.6g}", "" if unlike["bound"] is None else f"{unlike['bound']:.6g}"
        writer.writerow([cell(record["file"]), cell(record["label"]), *shown, *scores])
    return text.getvalue().rstrip("\n")


def as_json(record: dict, classes: Sequence[str], files: Sequence[dict], skipped: Sequence[dict]) -> str:
    """Return strict JSON: what predicts, a record of each file, and the files that were left out.

    What is not printable is escaped, as in the table; it reads as the same text.
    """
    by = {key: record[key] for key in ("representation", "runs", "temperature", "validation_accuracy", "landmarks")}
    content = {"model": by, "classes": list(classes), "files": list(files), "skipped": list(skipped)}
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)
