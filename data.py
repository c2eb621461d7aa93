"""A folder of LoRA files -> a collection of labelled LoRAs with the same layers.

    python data.py inspect FOLDER [flags]    says what an experiment on a folder would do, see experiment/preflight.py
    python data.py import SOURCE OUT         makes a folder of a published collection, see loras/published.py
    python data.py label FOLDER [--out FILE] writes a table of labels to fill in, see loras/label_writing.py

All work from any folder, and through a link to this file. Indexing reads safetensors headers only, and finds every
fault and notice that a header can show. An experiment reads the weights in one pass (experiment/extraction.py);
training/splits.py chooses train, validation and test rows.

Shape letters: N LoRAs, L layers, P modules (pairs of a down and an up).
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # only hands over, before imports that take a second and more: see `main`
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `end_at_signals`; Python would show where it was interrupted
    from experiment.command import run_as_program

    sys.exit(run_as_program())

import argparse
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from loras import checkpoints, layer_sets, lora_files, names
from loras import inspection as inspecting
from loras import label_bins as binning
from loras import labels as labelling
from loras.building import Progress
from loras.checkpoints import Choice
from loras.copies import common_names
from loras.flags import OF_INDEX
from loras.layer_sets import and_more, layer_differences
from loras.lora_files import Header, Layer, Layout, LoraFileError, by_layout, file_stat
from loras.names import plain, quoted
from loras.notices import Finding, Notice, grouped, unreadable
from loras.recipe import header_notices
from loras.scales import ScaleCount, count_scales
from loras.weight_files import find_weight_files

MAX_FINDINGS = 20


class CollectionError(ValueError):
    """A collection that cannot be used; each finding reads ``<path>: what is wrong. What to do.``.

    ``files`` are path and reason of the files without which it can be used.
    """

    def __init__(self, findings: list[str], files: Sequence[tuple[str, str]] = ()):
        super().__init__("\n".join(findings))
        self.findings, self.files = findings, files

    def shown(self) -> str:
        """Return the first findings as lines for standard error, equal ones as one, and the number of the others."""
        lines = grouped(self.findings)
        shown, rest = lines[:MAX_FINDINGS], len(lines) - MAX_FINDINGS
        return "\n".join(
            f"error: {plain(line)}" for line in shown + ([f"and {rest} more like these."] if rest > 0 else [])
        )


@dataclass(frozen=True)
class LoraFile:
    """One indexed file: path relative to the collection, label, parsed header, and what shows that it is unchanged.

    ``scales`` are those of its modules, as far as no weight has to be read for them.
    """

    path: str
    label: str
    header: Header
    stat: tuple[int, int, int, int]  # size, mtime in ns, ctime in ns, inode
    adapter_config: dict | None
    group: str | None = None
    scales: tuple[ScaleCount, ...] = ()

    @property
    def layout(self) -> Layout:
        """The layers of the file, in the network's order."""
        return self.header.layout


@dataclass(frozen=True)
class Collection:
    """An indexed collection: N files that hold the same L layers of P modules; a class is a distinct label.

    Layers stand in the network's order, under the names that the first file gives them. ``label_column`` is None where
    folders are the labels, ``table`` where no table is; ``skipped`` are path and reason of the files left out;
    ``notices`` is what is reported of files that are used, ``together`` whether groups keep copies and epochs together;
    ``choice`` are the files that --step chose of trainers' folders, ``left_out_layers`` the modules that
    --common-layers leaves out, with the number of files that have each.
    """

    name: str
    root: Path
    files: tuple[LoraFile, ...]
    label_source: str
    ignored: Counter = field(default_factory=Counter)
    label_column: str | None = None
    group_column: str | None = None
    table: labelling.Table | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    notices: tuple[Notice, ...] = ()
    together: bool = False
    choice: Choice = field(default_factory=lambda: Choice(checkpoints.FINAL))
    left_out_layers: dict[str, int] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The L matrices of a LoRA; shapes are the first file's (ranks may differ between files)."""
        return self.files[0].layout.layers

    @cached_property
    def modules(self) -> list[str]:
        """Canonical ids of the P modules, in order; each has a down and an up."""
        return self.files[0].layout.modules

    @cached_property
    def pair_of_layer(self) -> np.ndarray:
        """The position in `modules` of each layer's module, int64[L]."""
        position = {module: p for p, module in enumerate(self.modules)}
        return np.array([position[layer.module] for layer in self.layers])

    @cached_property
    def classes(self) -> list[str]:
        """The distinct labels, sorted, bins by their numbers."""
        return binning.in_order(file.label for file in self.files)

    @cached_property
    def y(self) -> np.ndarray:
        """Class of each file, int64[N]."""
        position = {label: c for c, label in enumerate(self.classes)}
        return np.array([position[file.label] for file in self.files])

    @cached_property
    def groups(self) -> np.ndarray | None:
        """Group of each file, int64[N]; None where neither a column nor copies make groups."""
        if self.group_column is None and not self.together:
            return None
        position = {group: g for g, group in enumerate(sorted({file.group for file in self.files}))}
        return np.array([position[file.group] for file in self.files])

    @property
    def rows_of_groups(self) -> list[list[int]]:
        """The rows of each group; none without groups."""
        rows = defaultdict(list)
        for row, group in enumerate([] if self.groups is None else self.groups.tolist()):
            rows[group].append(row)
        return list(rows.values())

    @property
    def group_words(self) -> tuple[str, str]:
        """The origin of the groups, and what helps where they allow no split, in words."""
        if not self.together:
            return f"groups by {self.group_column}", "Group by another column, or leave out --group-column."
        by = "copies and epochs" if self.group_column is None else f"groups by {self.group_column}, copies and epochs"
        if self.choice.step == checkpoints.ALL:
            return f"{by}, checkpoints of a LoRA among them", "Add LoRAs of other trainings, or leave out --step all."
        return by, "Add LoRAs of other trainings, or --keep-twins leaves copies and epochs where they fall."

    @cached_property
    def columns(self) -> dict[str, dict[str, str]]:
        """The values of each column of the table and field of the metadata.json files, by path; read when asked for.

        Reading counts in ``ignored`` the files that cannot be read.
        """
        paths = [file.path for file in self.files]
        return labelling.values_by_file(self.root, paths, self.table, self.ignored, self.choice)

    def _by_layout(self) -> list[list[int]]:
        return by_layout(file.layout for file in self.files)

    @property
    def skipped_records(self) -> list[dict[str, str]]:
        """The files left out, as results.json lists them."""
        return [{"path": path, "reason": reason} for path, reason in self.skipped]

    @cached_property
    def class_counts(self) -> dict[str, int]:
        """The number of LoRAs of each class."""
        return dict(zip(self.classes, np.bincount(self.y).tolist(), strict=True))

    @cached_property
    def mixed_ranks(self) -> str:
        """The reason why weights cannot be flattened to one width, in words; empty where they can."""
        for file in (self.files[positions[0]] for positions in self._by_layout()):
            for first, layer in zip(self.layers, file.layout.layers, strict=True):
                if layer.shape != first.shape:
                    return f"ranks differ between LoRAs: {first.name} has {first.rank}, and {layer.rank} in {file.path}"
        return ""

    @cached_property
    def packed_layout(self) -> Layout:
        """The layout of packed weights: each layer is padded to its largest rank where ranks differ."""
        return lora_files.packed_layout([self.files[positions[0]].layout for positions in self._by_layout()])

    @property
    def kept_modules(self) -> list[str]:
        """The modules, where --common-layers leaves out others; a part of what identifies features."""
        return self.modules if self.left_out_layers else []

    @property
    def common_layers(self) -> dict | None:
        """The effect of --common-layers, as results.json holds it; None where all layers are read."""
        if not self.left_out_layers:
            return None
        others = [{"module": module, "files": count} for module, count in self.left_out_layers.items()]
        return {"modules": len(self.modules), "others": others}

    @property
    def weights_per_layer(self) -> list[int]:
        """The width of each layer in the packed weights."""
        return [math.prod(layer.shape) for layer in self.packed_layout.layers]


# ----------------------------------------------------------------------------------------------------------------------
# Index: headers and labels
# ----------------------------------------------------------------------------------------------------------------------


def index_collection(
    root: Path,
    name: str | None = None,
    progress: Callable[[Iterable, str], Iterable] = lambda items, _: items,
    *,
    labels: Path | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    label_bins: int | None = None,
    step: str | None = None,
    common_layers: bool = False,
    skip_bad: bool = False,
    strict: bool = False,
    unlabelled: bool = False,
) -> Collection:
    """Read all headers and labels of a folder, and nothing of the weights.

    Args:
        root: The folder.
        name: Of the collection; None: the folder's.
        progress: Wraps the iteration over files.
        labels: A table of labels, see `labels.read_labels`.
        label_column: Its column, or field of the metadata.json files, that is the label; likewise
        group_column: the group.
        label_bins: Quantile bins of labels that are numbers; None: labels are classes as they are.
        step: What is read of folders with checkpoints, see `labels.read_labels`.
        common_layers: Keep the layers that all files have, instead of refusing files that differ.
        skip_bad: Leave out files that cannot be used, instead of refusing the collection.
        strict: Refuse, or with ``skip_bad`` leave out, what is otherwise only reported.
        unlabelled: Pass labels over: all LoRAs are of one class, to be looked at and not to be trained on.

    Raises:
        CollectionError: No LoRA is there, or files are faulty, unlabelled, or differ in their layers.
    """
    _check_root(root)
    paths, bad, ignored = find_weight_files(root)
    labelled = labelling.read_labels(root, paths, labels, label_column, group_column, step)
    labelled, bins = (labelling.without_labels(labelled), None) if unlabelled else (labelled, label_bins)
    files, faulty = index_files(root, progress(labelled.choice.paths, "index"), labelled)
    bad += labelled.findings + faulty + (binning.not_numbers(files) if bins else [])
    files = _less(files, bad) if skip_bad else files  # what is left out has no say in which layers are the commonest
    files, left_out_layers, unlike = _alike(root, files, bad, common_layers)
    bad += unlike
    faults = labelled.faults + ([] if skip_bad and files else [finding.line(root) for finding in bad])
    if faults or not files:
        raise CollectionError(list(dict.fromkeys(faults)) or [_no_file(root, ignored["linked folders"])])
    collection = _collection(name or root.resolve().name, root, _less(files, bad), labelled, left_out_layers)
    collection = replace(_with_bins(collection, bins), ignored=collection.ignored + ignored, group_column=group_column)
    collection = without(collection, [(path, finding.reason) for finding in bad for path in finding.files])
    return _with_choices(noted(collection, _notices(collection, labelled.source), strict, skip_bad))


def _notices(collection: Collection, source: str) -> list[Notice]:
    """Return what headers and labels show of files that are used, given where the labels come from."""
    return [*labelling.similar_labels(collection.files, source), *header_notices(collection.files)]


def _collection(
    name: str, root: Path, files: list[LoraFile], labelled: labelling.Labels, left_out_layers: dict[str, int]
) -> Collection:
    return Collection(
        name=name,
        root=root,
        files=tuple(files),
        label_source=labelled.source,
        ignored=sum((file.layout.ignored for file in files), Counter()),
        label_column=labelled.column,
        table=labelled.table,
        choice=labelled.choice,
        left_out_layers=left_out_layers,
    )


def _with_bins(collection: Collection, count: int | None) -> Collection:
    """Return the collection with its labels, which are numbers, in so many bins; None: with its labels as they are.

    Raises:
        CollectionError: There are fewer distinct numbers than bins.
    """
    if count is None:
        return collection
    source = collection.label_source
    try:
        labels = binning.bins_of([file.label for file in collection.files], count)
    except ValueError as error:
        fault = f"labels from {source} are {error}, too few for --label-bins={count}. Give fewer bins."
        raise CollectionError([f"{collection.root}: {fault}"]) from error
    files = [replace(file, label=label) for file, label in zip(collection.files, labels, strict=True)]
    return replace(collection, files=tuple(files), label_source=f"{source}, in {count} bins")


def _check_root(root: Path) -> None:
    """Refuse what is no folder, or has a name that no result can hold."""
    if not os.path.isdir(root):
        fault = "a file, not a folder" if os.path.lexists(root) else "no such folder"
        raise CollectionError([f"{root}: {fault}. Give a folder of LoRAs."])
    if not (os.fspath(root) + root.resolve().name).isprintable():
        raise CollectionError([f"{root}: a name that is not printable text. Rename the folder."])


def _alike(
    root: Path, files: list[LoraFile], bad: list[Finding], common_layers: bool
) -> tuple[list[LoraFile], dict[str, int], list[Finding]]:
    """Return files, with ``common_layers`` less what not all have, which is counted; and those that differ still."""
    if not common_layers:
        return files, {}, layer_differences(root, files)
    strangers = layer_sets.strangers(root, _less(files, bad))
    files, left_out = layer_sets.keep_common(_less(files, [*bad, *strangers]))
    return files, left_out, [*strangers, *layer_differences(root, files)]


def _with_choices(collection: Collection) -> Collection:
    """Return a collection with notices of what its flags leave out, and the checkpoints of a LoRA in one group."""
    notices = [collection.choice.notice] if collection.choice.notice else []
    if collection.left_out_layers:
        notices.append(layer_sets.common_notice(collection.files, collection.left_out_layers))
    row = {file.path: row for row, file in enumerate(collection.files)}
    groups = [[row[path] for path in paths if path in row] for paths in collection.choice.groups.values()]
    collection = keep_together(collection, [rows for rows in groups if len(rows) > 1])
    return replace(collection, notices=(*collection.notices, *notices))


def _no_file(root: Path, linked: int) -> str:
    links = f" ({linked} linked folders are not followed)" if linked else ""
    return f"{root}: no *.safetensors file in it{links}. Lay them out as <class>/<lora>.safetensors."


def index_files(root: Path, paths: Iterable[str], labelled: labelling.Labels) -> tuple[list[LoraFile], list[Finding]]:
    """Return the files that can be used, and what is wrong with the others."""
    files, findings = [], []
    for path in paths:
        try:
            files.append(index_file(root, path, labelled))
        except LoraFileError as error:
            findings.append(Finding((path,), str(error)))
        except OSError as error:
            findings.append(Finding((path,), unreadable(error)))
    return files, findings


def index_file(root: Path, path: str, labelled: labelling.Labels) -> LoraFile:
    """Index one file: its header, and the configuration beside it.

    Raises:
        LoraFileError: It cannot be used.
        OSError: It cannot be read.
    """
    full = os.path.join(root, path)
    stat = file_stat(full)
    text = lora_files.read_header(full)
    configs = (os.path.join(root, folder, "adapter_config.json") for folder in checkpoints.folders_of(path))
    adapter_config = next((config for config in map(labelling.read_json, configs) if config is not None), None)
    header = lora_files.parse_header(text, adapter_config)
    scales = count_scales(header, adapter_config)
    label, group = labelled.label.get(path, ""), labelled.group.get(path)
    for kind, name in (("name", path), ("label", label), ("group", group or "")):
        if fault := names.fault(name):
            raise LoraFileError(f"its {kind} {fault}. Rename it, or leave it out.")
    return LoraFile(path, label, header, stat, adapter_config, group, scales)


def _less(files: list[LoraFile], findings: list[Finding]) -> list[LoraFile]:
    """Return the files without a finding."""
    bad = {path for finding in findings for path in finding.files}
    return [file for file in files if file.path not in bad]


def without(collection: Collection, findings: Iterable[tuple[str, str]]) -> Collection:
    """Return the collection less some files, which join those left out before; its classes are to be checked again.

    Args:
        collection: The collection.
        findings: Path, relative to the root, and reason of each; of several reasons for a path the first one counts.

    Raises:
        CollectionError: No file is left.
    """
    reasons: dict[str, str] = {}
    for path, reason in findings:
        reasons.setdefault(path, reason)
    files = tuple(file for file in collection.files if file.path not in reasons)
    if not files:
        raise CollectionError([Finding((path,), reason).line(collection.root) for path, reason in reasons.items()])
    skipped = sorted((plain(path), plain(reason)) for path, reason in reasons.items())
    return replace(collection, files=files, skipped=(*collection.skipped, *skipped))


def noted(collection: Collection, notices: Sequence[Notice], strict: bool, skip_bad: bool) -> Collection:
    """Return the collection with more notices; with ``strict`` these are faults of their files.

    Args:
        collection: The collection; the files of a notice are among its own.
        notices: Those found of it since it was indexed, or while it was.
        strict: Refuse the collection for them.
        skip_bad: With ``strict``: leave out their files instead; its classes are then to be checked again.

    Raises:
        CollectionError: With ``strict``: there is a notice; with ``skip_bad`` too, one that no file can be left out
            for, or no file is left.
    """
    if not strict:
        return replace(collection, notices=(*collection.notices, *notices))
    faults = [notice for notice in notices if not (skip_bad and notice.files)]
    if faults:
        raise CollectionError([_finding_of(notice, collection.root).line(collection.root) for notice in faults])
    reasons = [(path, notice.reason) for notice in notices for path in notice.files]
    return without(collection, reasons) if reasons else collection


def _finding_of(notice: Notice, root: Path) -> Finding:
    """Return a notice as a fault of its files, or of the whole collection."""
    place = f"{root / notice.files[0]}" if notice.files else f"{root}"
    return Finding(notice.files, notice.message, place + and_more(len(notice.files)))


def keep_together(collection: Collection, groups: Sequence[Sequence[int]]) -> Collection:
    """Return the collection with each group of rows in one group of files, beside the groups that it has.

    Groups that share a file become one, under the first of their names; a file without a group is its own.
    """
    if not groups:
        return collection
    own = [file.path if collection.groups is None else file.group for file in collection.files]
    names = common_names(own, [*groups, *collection.rows_of_groups])
    files = [replace(file, group=name) for file, name in zip(collection.files, names, strict=True)]
    return replace(collection, files=tuple(files), together=True)


def check_classes(collection: Collection) -> None:
    """Refuse labels that make no classification task, and groups that leave a part of the split without a class.

    Raises:
        CollectionError: Fewer than two classes, a class of fewer than three LoRAs or groups, or a label for each LoRA.
    """
    counts = collection.class_counts
    if len(counts) < 2:
        fault = f"fewer than two classes ({_rarest(counts)}). At least two concepts are needed."
        fault += labelling.instead_of(collection.label_source, collection.root)
    elif len(counts) == len(collection.files):
        fault = f"as many labels as LoRAs ({len(counts)}): looks like an id; {_columns_for_classes(collection)}"
        fault += labelling.instead_of(collection.label_source, collection.root)
    elif min(counts.values()) < 3:
        fault = f"a class with fewer than three LoRAs ({_rarest(counts)}). Train, validation and test need one each."
        fault += labelling.may_be_one(counts)
    else:
        _check_groups(collection)
        return
    count = len(collection.skipped)
    left_out = f" after {count} file{' was' if count == 1 else 's were'} left out" if count else ""
    raise CollectionError([f"{collection.root}: labels from {collection.label_source} give{left_out} {fault}"])


def _rarest(counts: dict[str, int]) -> str:
    """Return counts in words, the smallest first."""
    rarest = [f"{quoted(label)}: {counts[label]}" for label in sorted(counts, key=counts.get)]
    return ", ".join(rarest[:12]) + (", ..." if len(rarest) > 12 else "")


def _columns_for_classes(collection: Collection) -> str:
    """Name the columns that could be the label instead."""
    values = labelling.column_values(collection.root, [file.path for file in collection.files], collection.table)
    if fitting := labelling.would_make_classes(values, len(collection.files)):
        return f"columns that would make classes: {labelling.counted(fitting)}. Choose one with --label-column."
    return "no other column would make classes. Choose labels that repeat."


def _check_groups(collection: Collection) -> None:
    """Refuse a class whose groups are too few for three parts."""
    if collection.groups is None:
        return
    pairs = np.unique(np.stack([collection.y, collection.groups]), axis=1)  # (class, group) of at least one LoRA
    counts = dict(zip(collection.classes, np.bincount(pairs[0]).tolist(), strict=True))
    if min(counts.values()) < 3:
        few = f"a class with fewer than three groups ({_rarest(counts)})"
        need = "Train, validation and test need one each"
        fault = f"{collection.group_column} gives {few}. {need}: group by another column."
        if collection.together:
            by, mend = collection.group_words
            fault = f"{by}, kept together, leave {few}. {need}. {mend}"
        raise CollectionError([f"{collection.root}: {fault}"])


# ----------------------------------------------------------------------------------------------------------------------
# Choice of layers
# ----------------------------------------------------------------------------------------------------------------------


def select_layers(collection: Collection, pattern: str | None) -> np.ndarray:
    """Return the layers that --layers keeps, bool[L]; see `layer_sets.matching`.

    Raises:
        CollectionError: A pattern of the list matches no layer.
    """
    try:
        return layer_sets.matching(collection.layers, pattern)
    except ValueError as error:
        raise CollectionError([f"--layers {pattern}: {error}"]) from error


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def index_as_asked(
    args: argparse.Namespace, root: Path, name: str | None, progress: Progress, unlabelled: bool = False
) -> Collection:
    """Index a folder as the flags of `add_collection_flags` describe it; see `index_collection`.

    With --skip-bad files are left out too whose alphas cannot be used, which no header shows.
    """
    flags = {flag: getattr(args, flag) for flag in OF_INDEX}
    collection = index_collection(root, name, progress.track, **flags, unlabelled=unlabelled)
    if not args.skip_bad:
        return collection
    faults = inspecting.with_scales(root, collection.files)[1]
    return without(collection, [(path, finding.reason) for finding in faults for path in finding.files])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line of this module; see `experiment.command`.

    As a program this file hands over to that before anything else, so that its classes are there once, as those of the
    module ``data``, which the experiment imports.
    """
    from experiment.command import main as run

    return run(arguments)
