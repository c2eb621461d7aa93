"""Results of finished runs -> what is compared of them, by compare.py.

Anyone may have sent the results: what is read is checked for its type and size, names are ones that can be shown, and
anything else is refused in words. Nothing is read but results.json and, to see which LoRAs runs share, samples.csv.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from analysis.questions import plain as as_json
from analysis.side_by_side import Run, Score, compare, has_size
from data import CollectionError
from experiment import store
from experiment.header import SCHEMA_VERSION
from experiment.settings import FIGURE_FOLDER, UsageError
from loras import building, names, small_files

RESULTS, SAMPLES = "results.json", "samples.csv"
MOST_RUNS = 20
UNNAMED = "unnamed"  # a collection in the root folder of a disk has no name
LONGEST = 200  # characters of a setting that is shown
# Settings beside those that decide what an accuracy means: who computes, which representations and questions are asked
# for. Any other setting, also one that does not exist yet, makes runs incomparable where it differs.
BESIDE = {"device", "stack", "representations", "left_out", "save_models", "activations"} | {
    *("controls", "null_shuffles", "splits", "also", "holdout")
}
OF_INPUTS = "update_response"  # the representation that reads inputs recorded from the base model
MACHINE = ("code", "device", "torch", "numpy", "python")  # of the environment, beside the source of what trains
OF_DATASET = ("source", "step", "label_column", "group_column")  # settings that the collection stands under
FIRST, LAST = "comparison.html", "comparison.json"  # in the order of writing: where the last is, all are there
WRITTEN = {FIRST, "comparison.txt", LAST, FIGURE_FOLDER, store.PREVIOUS}
MEND = "Give the folder of results of a run, as ablation_experiment.py writes it."


class _FaultError(ValueError):
    """A value of a file that is not what this program writes there."""


class _Value:
    """A value of results.json, and its place in it; each way to read it raises `_FaultError` where it is another."""

    def __init__(self, value: object, place: str = ""):
        self.value, self.place = value, place

    def __getitem__(self, key: str) -> _Value:
        fields = self.fields()
        if key not in fields:
            raise _FaultError(f"{self._inside(key)} is missing")
        return fields[key]

    def _inside(self, key: str) -> str:
        return f"{self.place}.{key}".lstrip(".")

    def _refuse(self, what: str) -> _FaultError:
        return _FaultError(f"{self.place or 'the whole'} is not {what}")

    def fields(self) -> dict[str, _Value]:
        """Return the values of an object by name."""
        if not isinstance(self.value, dict):
            raise self._refuse("an object")
        return {key: _Value(item, self._inside(key)) for key, item in self.value.items()}

    def named(self) -> dict[str, _Value]:
        """Return the values of an object whose keys are names."""
        fields = self.fields()
        for key in fields:
            if fault := names.fault(key):
                raise _FaultError(f"{self.place}: {fault}")
            if not key:
                raise _FaultError(f"{self.place}: a name in it is empty")
        return fields

    def items(self) -> Iterator[_Value]:
        """Yield the values of a list."""
        if not isinstance(self.value, list):
            raise self._refuse("a list")
        for i, item in enumerate(self.value):
            yield _Value(item, f"{self.place}[{i}]")

    def text(self) -> str:
        """Return a text of any letters, for `loras.names.plain`."""
        if not isinstance(self.value, str):
            raise self._refuse("text")
        return self.value

    def reason(self) -> str:
        """Return a text that says something, in one line."""
        if not self.text().strip():
            raise _FaultError(f"{self.place} is empty")
        return names.one_line(self.value)

    def name(self) -> str:
        """Return a name that can be shown."""
        if fault := names.fault(self.text()):
            raise _FaultError(f"{self.place}: {fault}")
        return self.value

    def flag(self) -> bool:
        """Return true or false."""
        if not isinstance(self.value, bool):
            raise self._refuse("true or false")
        return self.value

    def count(self, least: int = 0, most: int = 2**64) -> int:
        """Return a number of things."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not least <= self.value <= most:
            raise self._refuse(f"a whole number from {least}{f' to {most}' if most < 2**64 else ''}")
        return self.value

    def share(self) -> float:
        """Return a number from 0 to 1."""
        if not isinstance(self.value, int | float) or isinstance(self.value, bool) or not 0 <= self.value <= 1:
            raise self._refuse("a share from 0 to 1")  # NaN neither
        return float(self.value)

    def interval(self, accuracy: float) -> tuple[float, float]:
        """Return the interval of an accuracy."""
        bounds = [item.share() for item in self.items()]
        around = len(bounds) == 2 and bounds[0] - 1e-6 <= accuracy <= bounds[1] + 1e-6
        if not around:
            raise self._refuse(f"an interval around {accuracy:g}")
        return bounds[0], bounds[1]


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def compared(paths: Sequence[Path]) -> dict:
    """Return the content of comparison.json of these results, with the types of JSON.

    Raises:
        UsageError: There are too few or too many, or one is there twice.
        CollectionError: One cannot be read, or is something else.
    """
    if not 2 <= len(paths) <= MOST_RUNS:
        raise UsageError(f"RESULTS: {len(paths)} given. Give from 2 to {MOST_RUNS} folders of results.")
    return as_json(compare(read_runs(paths)))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs whose results lie in these folders, or files; see `compared`."""
    files = [path / RESULTS if path.is_dir() else path for path in paths]
    seen: dict[str, Path] = {}
    runs = []
    for path in files:
        content = _read(path)
        for mark in (os.path.realpath(path), hashlib.sha256(content).hexdigest()):
            if mark in seen:
                raise UsageError(f"{_shown(path)}: the same results as {_shown(seen[mark])}. Give each run once.")
            seen[mark] = path
        runs.append(_run_of(path, content))
    times = Counter(run.facts["name"] for run in runs)
    for i, run in enumerate(runs, 1):
        if times[run.facts["name"]] > 1:
            run.facts["name"] = f"{run.facts['name']} (run {i})"
    return runs


def _shown(path: Path) -> str:
    return names.plain(os.fspath(path))


def _read(path: Path, most: int = building.MAX_RECORD_BYTES) -> bytes:
    """Return the content of a file.

    Raises:
        CollectionError: It cannot be read, or is too large.
    """
    try:
        return small_files.read_bytes(path, most)
    except FileNotFoundError:
        raise CollectionError([f"{_shown(path)}: no such file. {MEND}"]) from None
    except OSError as error:
        raise CollectionError([f"{building.fault_of(error)}. {MEND}"]) from None
    except ValueError as error:
        raise CollectionError([f"{_shown(path)}: {error}. {MEND}"]) from None


def _run_of(path: Path, content: bytes) -> Run:
    """Return a run from the content of its results.json."""
    try:
        results = _Value(small_files.parse_object(small_files.open_text(content).read()))
        version = results["schema_version"].count()
        if version != SCHEMA_VERSION:
            fault = f"results of schema version {version}, where this program reads {SCHEMA_VERSION}"
            raise CollectionError([f"{_shown(path)}: {fault}. Run the experiment again with this program."])
        return _run(path, results)
    except CollectionError:
        raise
    except ValueError as error:
        message = names.one_line(str(error))
        raise CollectionError([f"{_shown(path)}: not results of this program: {message}. {MEND}"]) from None


# ----------------------------------------------------------------------------------------------------------------------
# The content of results.json
# ----------------------------------------------------------------------------------------------------------------------


def _run(path: Path, results: _Value) -> Run:
    dataset, analysis = results["dataset"], results["analysis"]
    classes = [item.name() for item in dataset["classes"].items()]
    counts = {name: value.count(1) for name, value in dataset["class_counts"].named().items()}
    if len(classes) < 2 or sorted(classes) != sorted(counts):
        raise _FaultError("dataset.classes and dataset.class_counts are not of the same two classes or more")
    decides, beside = _settings(results)
    fingerprint = dataset["fingerprint"].name() if "fingerprint" in dataset.fields() else ""
    scores, unsized = _scores(results)
    layers = _layers(results["layer_ranking"])
    return Run(
        facts=_facts(path, results, len(layers)) | {"unsized": unsized},
        units=1 if analysis.value is None else analysis["units"].count(1),
        decides=decides,
        beside=beside,
        classes=counts,
        layers=layers,
        scores=scores,
        fingerprint=fingerprint,
        samples=_samples(path.parent / SAMPLES),
    )


def _facts(path: Path, results: _Value, layers: int) -> dict:
    """Return what comparison.json says of a run of so many layers."""
    dataset, config, parts = results["dataset"], results["config"], results["dataset"]["split_sizes"]
    best = None
    if results["analysis"].value is not None:
        best = results["analysis"]["representations"]["conditions"]["baseline"]["best"]
    not_run = {item["representation"].name(): item["reason"] for item in results["representations_not_run"].items()}
    not_done = results["not_done"].named()
    return {
        "name": names.plain(dataset["name"].text()).strip()[: names.MAX_LENGTH] or UNNAMED,
        "path": _shown(path.parent),
        "loras": dataset["num_samples"].count(1),
        "train": parts["train"].count(1),
        "validation": parts["validation"].count(1),
        "test": parts["test"].count(1),
        "classes": len(list(dataset["classes"].items())),
        "layers": layers,
        "chance": results["chance"]["accuracy"].share(),
        "top_k": config["top_k"].count(1, layers),
        "num_runs": config["num_runs"].count(1),
        "seed": config["seed"].count(-(2**64)),
        "splits": config["splits"].count(1),
        "quick": config["quick"].flag(),
        "controls": config["controls"].name(),
        "analysed": results["analysis"].value is not None,
        "best": None if best is None or best.value is None else best.name(),
        "not_run": {name: reason.reason() for name, reason in not_run.items()},
        "not_done": {name: reason.reason() for name, reason in not_done.items()},
    }


def _settings(results: _Value) -> tuple[dict[str, str], dict[str, str]]:
    """Return the settings that decide what an accuracy means, and the others, as text by key."""
    decides: dict[str, str] = {}
    beside: dict[str, str] = {}
    for key, value in _flat(results["config"], ""):
        of = beside if key.split(".")[0] in BESIDE else decides
        of[f"config.{key}"] = _short(value)
    for key in OF_DATASET:
        decides[f"dataset.{key}"] = _short(results["dataset"][key].value)
    decides["environment.training_code"] = _short(results["environment"]["training_code"].value)
    for key in MACHINE:
        beside[f"environment.{key}"] = _short(results["environment"][key].value)
    return decides, beside


def _flat(value: _Value, prefix: str) -> Iterator[tuple[str, object]]:
    """Yield the values of nested objects, their names joined by points."""
    for name, item in value.named().items():
        if isinstance(item.value, dict) and item.value:
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item.value


def _short(value: object) -> str:
    """Return a setting as text that can be shown; of a long one the beginning, and the digest that tells it apart."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    text = names.plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _layers(ranking: _Value) -> dict[tuple[str, str], float]:
    """Return the accuracy of each layer by module and role, in the order of the ranking."""
    layers: dict[tuple[str, str], float] = {}
    for record in ranking.items():
        layer = record["module"].name(), record["role"].name()
        if layer in layers:
            raise _FaultError(f"{record.place}: {layer[0]}, {layer[1]} is there twice")
        layers[layer] = record["accuracy"].share()
    if not layers:
        raise _FaultError("layer_ranking is empty")
    return layers


def _scores(results: _Value) -> tuple[dict[str, Score], list[str]]:
    """Return what is known of each representation, and those of which an interval is left out.

    Of one without an ablation less is known. An interval is left out where it is of no number of LoRAs.
    """
    without, found, unsized = results["ablation_results"].named(), {}, []
    conditions, verdicts = {}, {}
    if results["analysis"].value is not None:
        conditions = results["analysis"]["representations"]["conditions"].fields()
        verdicts = results["analysis"]["robustness"].named()
    above = {item.name() for item in conditions["baseline"]["above_null"].items()} if conditions else set()
    for name, entry in results["baseline_results"].named().items():
        accuracy = entry["test_accuracy"]["mean"].share()
        left = without[name]["test_accuracy"]["mean"].share() if name in without else None
        shown = _interval(conditions, "baseline", name, accuracy)
        shown_left = None if left is None else _interval(conditions, "ablation", name, left)
        interval = shown if shown and has_size(accuracy, shown) else None
        interval_left = shown_left if shown_left and has_size(left, shown_left) else None
        if (interval, interval_left) != (shown, shown_left):
            unsized.append(name)
        found[_of_inputs(name, results)] = Score(
            accuracy=accuracy,
            validation=entry["val_accuracy"]["mean"].share(),
            interval=interval,
            above_null=None if shown is None else name in above,
            without_top=left,
            without_top_interval=interval_left,
            verdict=verdicts[name]["verdict"].name() if name in verdicts else None,
        )
    return found, unsized


def _of_inputs(name: str, results: _Value) -> str:
    """Return a representation's name; of one that reads recorded inputs with their digest, as others are another."""
    if name != OF_INPUTS:
        return name
    return f"{name} ({names.plain(str(results['config']['activations'].value))[:8]})"


def _interval(conditions: dict, condition: str, name: str, accuracy: float) -> tuple[float, float] | None:
    """Return the interval of an accuracy under a condition; None where the analysis has none."""
    intervals = conditions[condition]["intervals"].fields() if conditions else {}
    return intervals[name].interval(accuracy) if name in intervals else None


def _samples(path: Path) -> dict[str, tuple[str, str]] | None:
    """Return label and part of the split of each file of samples.csv; None where there is no such file.

    Raises:
        CollectionError: It cannot be read.
    """
    if not os.path.lexists(path):
        return None
    content = _read(path)
    try:
        rows = csv.DictReader(small_files.open_text(content), strict=True)
        samples = {}
        for row in rows:
            if None in row or None in row.values():  # as csv tells of rows of other lengths
                raise ValueError(f"line {rows.line_num} has more or fewer cells than the first")
            samples[row["file"]] = row["label"], row["split"]
        return samples
    except (ValueError, LookupError, csv.Error) as error:
        fault = names.one_line(str(error))
        raise CollectionError([f"{_shown(path)}: not a table of samples: {fault}. Remove it, or run again."]) from None


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------


def checked_folder(folder: Path) -> Path:
    """Return a folder for a comparison: a new one, an empty one, or one that holds nothing but a comparison.

    Raises:
        UsageError: It is something else, or cannot be written.
    """
    shown = f"--out {_shown(folder)}"
    if folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()):
        raise UsageError(f"{shown}: not a folder. Give another.")
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if path.name not in WRITTEN)
        others = [name for name in others if not building.TEMPORARY.search(name)]
        if not others and not _holds_comparison(folder):  # figures/ and previous/ may be anyone's
            others = sorted(path.name for path in folder.iterdir())
        if others:
            raise UsageError(f"{shown}: holds something else ({names.plain(others[0])}). Give another folder.")
    return folder


def _holds_comparison(folder: Path) -> bool:
    """Return whether a folder holds a comparison, or what is left of one where a process was killed at any time."""
    begun = (path.name for path in folder.glob(f".{FIRST}.*"))
    return (
        any((folder / name).is_file() for name in (FIRST, LAST))
        or any(map(building.TEMPORARY.search, begun))
        or any((folder / store.PREVIOUS).glob(f"[0-9]*/{LAST}"))
    )


def _lock_of(folder: Path) -> Path:
    whole = Path(os.path.abspath(folder))  # "." has no name
    return whole.with_name(f".{whole.name}.lock")


def write(folder: Path, comparison: dict, text: str, page: bytes, drawn: dict[str, bytes]) -> str:
    """Write the files of a comparison, and move another one that is there to previous/; return what was done.

    Files of any other name, as a user's in figures/, stay where they are.

    Raises:
        UsageError: Another process is at work in the folder.
        OSError: It cannot be written.
    """
    contents = {FIRST: page, "comparison.txt": text.encode(errors="backslashreplace")}
    contents |= {f"{FIGURE_FOLDER}/{name}": content for name, content in drawn.items() if "/" not in name}
    contents[LAST] = building.canonical_json(comparison, indent=2)
    try:
        with building.locked(_lock_of(folder)):
            if all((folder / name).is_file() and (folder / name).read_bytes() == contents[name] for name in contents):
                return f"Nothing to do: {_shown(folder)} holds this comparison."
            store.replace_all(folder, contents)
    except building.LockedError as error:
        raise UsageError(f"--out {_shown(folder)}: {error} is at work in it. Wait, or give another.") from None
    return f"Written to {_shown(folder)}\n  {_shown(folder / 'comparison.html')}"
