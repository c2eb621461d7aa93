"""A folder of LoRA files -> layers, labels, splits, features and packed weights.

``python data.py inspect PATH [--json]`` tells what a folder holds; ``python data.py import SOURCE OUT`` makes one of a
published collection (see published.py).

Indexing reads safetensors headers only and finds every fault that a header can show. One pass then reads each file
once: it hashes the contents, refuses NaN and infinity, computes all hand-crafted features and packs the flattened
weights, into files of a cache folder that is named by the contents.

Shape letters: N LoRAs, L layers, P modules (pairs of a down and an up), F features, C classes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold

import labels as labelling
import lora_files
import representations
import store
from crew import Crew, Task
from labels import Finding
from lora_files import Layer, Layout, LoraFileError, NotFiniteError
from representations import MEASURES, REPRESENTATIONS, matrix_features, pair_features

CHUNK_NUMBERS = 2**22  # weights worked on at once on the pass, 16 MiB
SHARD_NUMBERS = 2**24  # features and packed weights of files, held and then written together: 64 MiB
PASS_THREADS = 8  # threads on the pass at most, each with a shard in memory
PREFERRED_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_FINDINGS = 20


class CollectionError(ValueError):
    """A collection cannot be used; each finding reads ``<path>: what is wrong. what to do.``.

    ``files`` are path and reason of those without which it could be.
    """

    def __init__(self, findings: list[str], files: Sequence[tuple[str, str]] = ()):
        super().__init__("\n".join(findings))
        self.findings, self.files = findings, files

    def shown(self) -> str:
        """The first findings as lines of standard error, and how many more there are."""
        shown, rest = self.findings[:MAX_FINDINGS], len(self.findings) - MAX_FINDINGS
        return "\n".join(f"error: {line}" for line in shown + ([f"and {rest} more like these."] if rest > 0 else []))


@dataclass(frozen=True)
class LoraFile:
    """One indexed file: its path relative to the collection, label, layout, and what says that it is unchanged."""

    path: str
    label: str
    layout: Layout
    stat: tuple[int, int, int]  # size, mtime in ns, inode
    adapter_config: dict | None
    group: str | None = None


@dataclass(frozen=True)
class Collection:
    """An indexed collection: N files that hold the same L layers of P modules; a class is a distinct label.

    Layers stand in the network's order, under the names that the first file gives them. ``label_column`` is None where
    folders are the labels, ``table`` where no table is; ``skipped`` are path and reason of the files left out.
    """

    name: str
    root: Path
    files: tuple[LoraFile, ...]
    label_source: str
    ignored: Counter = field(default_factory=Counter)
    label_column: str | None = None
    group_column: str | None = None
    table: Path | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The L matrices of a LoRA; shapes are the first file's (ranks may differ between files)."""
        return self.files[0].layout.layers

    @cached_property
    def modules(self) -> list[str]:
        """Canonical ids of the P modules, in order; each has a down and an up."""
        return [layer.module for layer in self.layers if layer.role == "down"]

    @cached_property
    def pair_of_layer(self) -> np.ndarray:
        """The position in `modules` of each layer's module, int64[L]."""
        position = {module: p for p, module in enumerate(self.modules)}
        return np.array([position[layer.module] for layer in self.layers])

    @cached_property
    def classes(self) -> list[str]:
        """The distinct labels, sorted."""
        return sorted({file.label for file in self.files})

    @cached_property
    def y(self) -> np.ndarray:
        """Class of each file, int64[N]."""
        position = {label: c for c, label in enumerate(self.classes)}
        return np.array([position[file.label] for file in self.files])

    @cached_property
    def groups(self) -> np.ndarray | None:
        """Group of each file, int64[N]; None without a group column."""
        if self.group_column is None:
            return None
        position = {group: g for g, group in enumerate(sorted({file.group for file in self.files}))}
        return np.array([position[file.group] for file in self.files])

    @cached_property
    def columns(self) -> dict[str, dict[str, str]]:
        """The values of each column of the table and field of the metadata.json files, by path; read when asked for."""
        return labelling.values_by_file(self.root, [file.path for file in self.files], self.table)

    @property
    def skipped_records(self) -> list[dict[str, str]]:
        """The files left out, as results.json lists them."""
        return [{"path": path, "reason": reason} for path, reason in self.skipped]

    @cached_property
    def class_counts(self) -> dict[str, int]:
        """Number of LoRAs of each class."""
        return dict(zip(self.classes, np.bincount(self.y).tolist(), strict=True))

    @cached_property
    def mixed_ranks(self) -> str:
        """Why weights cannot be flattened to one width, in words; empty where they can."""
        for file in (self.files[positions[0]] for positions in _by_layout(self.files)):
            for first, layer in zip(self.layers, file.layout.layers, strict=True):
                if layer.shape != first.shape:
                    return f"ranks differ between LoRAs: {first.name} has {first.rank}, and {layer.rank} in {file.path}"
        return ""

    @cached_property
    def packed_layout(self) -> Layout:
        """How packed weights lie: shape and columns of each layer, padded to its largest rank where ranks differ."""
        layout = self.files[0].layout
        if not self.mixed_ranks:
            return layout
        layouts = [self.files[positions[0]].layout for positions in _by_layout(self.files)]
        ranks = [max(layer.rank for layer in of_files) for of_files in zip(*(x.layers for x in layouts), strict=True)]
        return Layout(tuple(_of_rank(layer, rank) for layer, rank in zip(layout.layers, ranks, strict=True)))

    @property
    def weights_per_layer(self) -> list[int]:
        """Width of each layer among the packed weights."""
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
    skip_bad: bool = False,
) -> Collection:
    """Read all headers and labels of a folder; nothing of the weights is read.

    Args:
        root: The folder.
        name: Of the collection; the folder's, if none is given.
        progress: Wraps the iteration over files.
        labels: A table of labels, see `labels.read_labels`.
        label_column: Its column, or field of the metadata.json files, that is the label.
        group_column: The one that is the group.
        skip_bad: Leave out files that cannot be used, instead of refusing the collection.

    Raises:
        CollectionError: No LoRA is there, or files are faulty, unlabelled, or disagree about the layers.
    """
    if not root.is_dir():
        raise CollectionError([f"{root}: no such folder. give a folder of LoRAs."])
    ignored: Counter = Counter()
    paths, bad = _find_weight_files(root, ignored)
    labelled = labelling.read_labels(root, paths, labels, label_column, group_column)
    bad += labelled.findings
    files = []
    for path in progress(paths, "index"):
        try:
            file = _index_file(root, path, labelled)
        except (LoraFileError, OSError) as error:
            bad.append(Finding((path,), str(error)))
            continue
        files.append(file)
    if skip_bad:  # what is left out has no say in which layers are the commonest
        files = _less(files, bad)
    bad += _layer_differences(root, files)
    told = labelled.faults + ([] if skip_bad and files else [finding.told(root) for finding in bad])
    if not files and not told:
        links = f" ({ignored['linked folders']} linked folders are not followed)" if ignored["linked folders"] else ""
        told.append(f"{root}: no *.safetensors file in it{links}. lay them out as <class>/<lora>.safetensors.")
    if told:
        raise CollectionError(list(dict.fromkeys(told)))
    files = _less(files, bad)
    for file in files:
        ignored.update(file.layout.ignored)
    collection = Collection(
        name or root.resolve().name,
        root,
        tuple(files),
        labelled.source,
        +ignored,
        labelled.column,
        group_column,
        labelled.table,
    )
    return without(collection, [(path, finding.reason) for finding in bad for path in finding.files])


def _index_file(root: Path, path: str, labelled: labelling.Labels) -> LoraFile:
    """What the header of a file and the files beside it tell.

    Raises:
        LoraFileError: It cannot be used.
        OSError: It cannot be read.
    """
    full = os.path.join(root, path)
    stat = _stat(full)
    layout = lora_files.parse_layout(lora_files.read_header(full))
    adapter_config = labelling.read_json(os.path.join(os.path.dirname(full), "adapter_config.json"))
    if adapter_config:
        lora_files.update_scales(layout, {}, adapter_config)  # refuses what cannot be used
    label, group = labelled.label.get(path, ""), labelled.group.get(path)
    if labelling.NOT_TEXT.search(path + label + (group or "")):
        raise LoraFileError(f"its name {path!a}, label {label!a} or group {group!a} is not plain text. rename it.")
    return LoraFile(path, label, layout, stat, adapter_config, group)


def _less(files: list[LoraFile], findings: list[Finding]) -> list[LoraFile]:
    """The files of which nothing was found."""
    bad = {path for finding in findings for path in finding.files}
    return [file for file in files if file.path not in bad]


def without(collection: Collection, findings: Iterable[tuple[str, str]]) -> Collection:
    """A collection less some files, which are added to those left out before; its classes are to be checked again.

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
        raise CollectionError([Finding((path,), reason).told(collection.root) for path, reason in reasons.items()])
    skipped = sorted((labelling.plain(path), labelling.plain(reason)) for path, reason in reasons.items())
    return replace(collection, files=files, skipped=(*collection.skipped, *skipped))


def _stat(path: Path | str) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _find_weight_files(root: Path, ignored: Counter) -> tuple[list[str], list[Finding]]:
    """Weight files below a folder, as sorted paths relative to it, and what is wrong with the folders."""
    paths, findings = [], []
    errors: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=errors.append):
        ignored["hidden folders"] += sum(sub.startswith(".") for sub in subfolders)
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        ignored["linked folders"] += sum(os.path.islink(os.path.join(folder, sub)) for sub in subfolders)
        weights = [name for name in names if name.lower().endswith(".safetensors") and not name.startswith(".")]
        preferred = [name for name in PREFERRED_FILES if name in weights][:1]
        if preferred:
            ignored[f"*.safetensors beside {preferred[0]}"] += len(weights) - 1
        inside = folder[len(os.fspath(root)) :].lstrip(os.sep)
        paths += [os.path.join(inside, name) for name in preferred or weights]
        pickles = sorted(os.path.join(inside, name) for name in names if name.lower().endswith(PICKLE_SUFFIXES))
        if weights:
            ignored["pickles beside *.safetensors"] += len(pickles)
        else:
            told = "a pickle checkpoint: never loaded. convert it to safetensors."
            findings += [Finding((path,), told) for path in pickles]
    for error in errors:
        folder = os.path.relpath(error.filename, root)
        findings.append(Finding((folder,), f"cannot be listed ({error.strerror}). mend its permissions."))
    return sorted(paths), findings


def _by_layout(files: Sequence[LoraFile]) -> list[list[int]]:
    """Positions of the files that share a layout, for each layout; there are far fewer of them than files."""
    positions = defaultdict(list)
    for i, file in enumerate(files):
        positions[id(file.layout)].append(i)
    return list(positions.values())


def _of_rank(layer: Layer, rank: int) -> Layer:
    """The layer with another rank."""
    return replace(layer, shape=(rank, layer.free_side) if layer.role == "down" else (layer.free_side, rank))


def _layer_differences(root: Path, files: list[LoraFile]) -> list[Finding]:
    """Where files differ in their layers, or in more than the rank, in words; the commonest layers are the measure."""
    holders = defaultdict(list)
    for positions in _by_layout(files):
        layout = files[positions[0]].layout
        layers = tuple((f"{layer.module} {layer.role}", layer.free_side) for layer in layout.layers)
        holders[layers] += [files[i].path for i in positions]
    common = max(holders, key=lambda layers: len(holders[layers]), default=())
    widths, findings = dict(common), []
    for layers, paths in holders.items():
        found = dict(layers)
        others = f"{len(holders[common])} files" if len(holders[common]) > 1 else min(holders[common])
        where = f"{root / min(paths)}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        lacking = [layer for layer in widths if layer not in found]
        extra = [layer for layer in found if layer not in widths]
        if lacking or extra:
            told = [f"lacks {len(lacking)} layers ({lacking[0]} ...)"] if lacking else []
            told += [f"adds {len(extra)} layers ({extra[0]} ...)"] if extra else []
            told = f"{' and '.join(told)} compared with {others}. keep LoRAs of the same layers to a collection."
            findings.append(Finding(tuple(paths), told, where))
        elif other := next((layer for layer in found if found[layer] != widths[layer]), None):
            told = f"{other} is {found[other]} wide, but {widths[other]} in {others}: mixed base models"
            findings.append(Finding(tuple(paths), f"{told}. keep one base model to a collection.", where))
    return findings


def check_classes(collection: Collection) -> None:
    """Refuse labels that make no classification task, and groups that leave a part of the split without a class.

    Raises:
        CollectionError: Fewer than two classes, a class of fewer than three LoRAs or groups, or a label for each LoRA.
    """
    counts = collection.class_counts
    if len(counts) < 2:
        fault = f"fewer than two classes ({_rarest(counts)}). at least two concepts are needed."
    elif len(counts) == len(collection.files):
        fault = f"as many labels as LoRAs ({len(counts)}): looks like an id; {_columns_for_classes(collection)}"
    elif min(counts.values()) < 3:
        fault = f"a class with fewer than three LoRAs ({_rarest(counts)}). train, validation and test need one each."
    else:
        _check_groups(collection)
        return
    left_out = f" after {len(collection.skipped)} files were left out" if collection.skipped else ""
    raise CollectionError([f"{collection.root}: labels from {collection.label_source} give{left_out} {fault}"])


def _rarest(counts: dict[str, int]) -> str:
    """Counts in words, the smallest first."""
    rarest = [f"{label}: {counts[label]}" for label in sorted(counts, key=counts.get)]
    return ", ".join(rarest[:12]) + (", ..." if len(rarest) > 12 else "")


def _columns_for_classes(collection: Collection) -> str:
    """Which columns could be the label instead, in words."""
    values = labelling.column_values(collection.root, [file.path for file in collection.files], collection.table)
    if fitting := labelling.would_make_classes(values, len(collection.files)):
        return f"columns that would make classes: {labelling.counted(fitting)}. choose one with --label-column."
    return "no other column would make classes. choose labels that repeat."


def _check_groups(collection: Collection) -> None:
    """Refuse a class whose groups are too few for three parts."""
    if collection.groups is None:
        return
    pairs = np.unique(np.stack([collection.y, collection.groups]), axis=1)  # (class, group) of at least one LoRA
    counts = dict(zip(collection.classes, np.bincount(pairs[0]).tolist(), strict=True))
    if min(counts.values()) < 3:
        where = f"{collection.root}: {collection.group_column} gives a class with fewer than three groups"
        raise CollectionError(
            [f"{where} ({_rarest(counts)}). train, validation and test need one each: group by another column."]
        )


# ----------------------------------------------------------------------------------------------------------------------
# Choice of layers
# ----------------------------------------------------------------------------------------------------------------------


def select_layers(collection: Collection, pattern: str | None) -> np.ndarray:
    """Which layers --layers keeps, bool[L]; None keeps all.

    ``pattern`` is a comma list. One with ``*``, ``?`` or ``[`` is to match the whole of a layer's shown name, of its
    canonical module, or of that with its role (``..._attn1_to_v_up``); any other may stand anywhere in one of them.
    In canonical names a dot is an underscore: ``*.to_v.*`` finds the same layers whatever wrote the files.

    Raises:
        CollectionError: One of the list matches no layer.
    """
    if pattern is None:
        return np.ones(len(collection.layers), bool)
    selected = np.zeros(len(collection.layers), bool)
    for single in pattern.split(","):
        matching = [_matches(layer, single.strip()) for layer in collection.layers]
        if not any(matching):
            names = ", ".join(layer.name for layer in collection.layers[:3])
            fault = f"{single.strip()!r} matches none of {len(collection.layers)} layers. the first ones are {names}."
            raise CollectionError([f"--layers {pattern}: {fault}"])
        selected |= matching
    return selected


def _matches(layer: Layer, pattern: str) -> bool:
    whole = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    canonical = layer.module, f"{layer.module}_{layer.role}"
    return fnmatchcase(layer.name, whole) or any(fnmatchcase(name, whole.replace(".", "_")) for name in canonical)


# ----------------------------------------------------------------------------------------------------------------------
# Split
# ----------------------------------------------------------------------------------------------------------------------

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
NEAR = 0.02  # of a class on the wrong side of the shares, on average: other folds are not tried
FOLDS = 10


def split_collection(collection: Collection, seed: int) -> dict[str, np.ndarray]:
    """`split_rows` of a collection's labels and groups.

    Raises:
        CollectionError: No split was found that keeps groups apart.
    """
    try:
        return split_rows(collection.y, seed, collection.groups)
    except ValueError as error:
        where = f"{collection.root}: groups by {collection.group_column}"
        raise CollectionError([f"{where}: {error}. group by another column, or leave out --group-column."]) from error


def split_rows(y: np.ndarray, seed: int, groups: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Stratified rows for ``train``, ``validation`` and ``test`` (70/10/20), fixed by labels, groups and seed alone.

    Validation has max(round(0.1 N), C) rows and test max(round(0.2 N), C); every class has a row in each part.
    (scikit-learn's stratified splitters can leave a rare class out of one, which is why rows are allotted here.)
    With groups, all rows of one are in one part, and sizes are as near to these shares as groups allow.

    Args:
        y: Class of each sample, every class at least three times, int64[N].
        seed: Of the draw.
        groups: Group of each sample, int64[N]; None: each sample is its own.

    Returns:
        Sorted row indices of each part.

    Raises:
        ValueError: No split of these groups has every class in each part.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/split".encode()).digest(), "little")
    if groups is not None and len(np.unique(groups)) < len(y):
        part = _split_groups(y, groups, key % 2**32)
        return {name: np.flatnonzero(part == p) for p, name in enumerate(SHARES)}
    sizes = np.bincount(y)
    test = _allot(max(round(SHARES["test"] * len(y)), len(sizes)), sizes, most=sizes - 2)
    validation = _allot(max(round(SHARES["validation"] * len(y)), len(sizes)), sizes, most=sizes - test - 1)
    generator = np.random.default_rng(key)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SHARES}
    for c in range(len(sizes)):
        rows = generator.permutation(np.flatnonzero(y == c))
        ends = np.cumsum([test[c], validation[c]])
        for name, part in zip(("test", "validation", "train"), np.split(rows, ends), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def _split_groups(y: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Part (position in ``SHARES``) of each row, int64[N], the same for all rows of a group.

    scikit-learn deals the groups into ten stratified folds, of which those sets are taken as parts that are nearest to
    the shares, among all that have every class in each part. Rare classes may need fewer folds; up to ten groups are a
    fold each, and so all ways to part them are tried.
    """
    group = np.unique(groups, return_inverse=True)[1]
    count, best, nearest = group.max() + 1, None, math.inf
    for folds in range(min(FOLDS, np.bincount(y).max()), 2, -1):
        if count <= FOLDS:
            fold = np.random.default_rng(seed).permutation(count)[group]
        else:
            fold = _stratified_folds(y, group, folds, seed)
        per_fold = np.zeros((fold.max() + 1, y.max() + 1), np.int64)
        np.add.at(per_fold, (fold, y), 1)
        part_of_fold, distance = _nearest_parts(per_fold)
        if distance < nearest:
            best, nearest = part_of_fold[fold], distance
        if nearest < NEAR or count <= FOLDS:
            break
    if best is None:
        raise ValueError(f"no split of the {count} groups was found that has every class in each part")
    return best


def _stratified_folds(y: np.ndarray, group: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each row, int64[N], by scikit-learn's `StratifiedGroupKFold`."""
    fold = np.empty(len(y), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer members than folds
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for number, (_, rows) in enumerate(splitter.split(y, y, group)):
            fold[rows] = number
    return fold


def _nearest_parts(per_fold: np.ndarray) -> tuple[np.ndarray | None, float]:
    """The way to part folds that is nearest to the shares in every class, and by how much of a class it misses them.

    Args:
        per_fold: Samples of each fold and class, int64[folds, C].

    Returns:
        Part of each fold, int64[folds], and the distance; None and infinity where each leaves a part without a class.
    """
    ideal = np.array(list(SHARES.values()))[:, None]  # (3, 1)
    ways = product(range(len(SHARES)), repeat=len(per_fold))
    at_once = max(1, 2**20 // per_fold.shape[1])
    best, nearest = None, math.inf
    while block := list(islice(ways, at_once)):
        parts = np.array(block)  # (ways, folds)
        counts = np.stack([(parts == p) @ per_fold for p in range(len(SHARES))], axis=1)  # (ways, 3, C)
        distance = np.abs(counts / per_fold.sum(0) - ideal).sum(1).mean(1) / 2
        distance[(counts == 0).any((1, 2))] = np.inf
        first = int(distance.argmin())
        if distance[first] < nearest:
            best, nearest = parts[first], float(distance[first])
    return best, nearest


def _allot(total: int, sizes: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Share ``total`` among classes in proportion to their sizes, each between 1 and ``most``, by largest remainder."""
    ideal = total * sizes / sizes.sum()
    shares = np.clip(np.floor(ideal).astype(int), 1, most)
    while shares.sum() != total:
        step = 1 if shares.sum() < total else -1
        movable = shares < most if step == 1 else shares > 1
        need = np.where(movable, step * (ideal - shares), -np.inf)
        shares[np.argmax(need)] += step
    return shares


# ----------------------------------------------------------------------------------------------------------------------
# The one pass over the weights
# ----------------------------------------------------------------------------------------------------------------------

WEIGHTS = "weights"  # the name under which the packed weights are kept, beside the features
FEATURES = REPRESENTATIONS | MEASURES  # what is computed of a matrix or a pair


@dataclass(frozen=True)
class Extracted:
    """Features and packed weights of a collection, in a cache folder named by the fingerprint of its contents."""

    fingerprint: str
    folder: Path
    suffix: str

    def load(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Features of all LoRAs, float32[N, L or P, F], memory-mapped where they are one shard; or of some rows."""
        shards = store.map_shards(self.path(name))
        if rows is not None:
            starts = np.cumsum([0, *map(len, shards)])
            shard = np.searchsorted(starts, rows, "right") - 1
            return np.stack([shards[s][row - starts[s]] for s, row in zip(shard, rows, strict=True)])
        return shards[0] if len(shards) == 1 else np.concatenate(shards)

    def weights(self) -> store.Shards:
        """The packed weights, float32[N, W], which no memory need hold whole; see `Collection.packed_layout`."""
        return store.Shards(self.path(WEIGHTS))

    def factor_reader(self, collection: Collection) -> Callable[[int, np.ndarray | None], tuple[torch.Tensor, ...]]:
        """Reads updates of a module: from its position and row indices int64[n] (None: all) to their factors.

        These are down float32[n, r, in], up float32[n, out, r] and scale float32[n]. Where ranks differ, r is the
        largest, and missing rows and columns are 0. ``WEIGHTS`` and "updates" are to have been extracted.
        """
        packed, scales, layout = self.weights(), self.load("updates")[..., 2].copy(), collection.packed_layout
        shapes, columns = [layer.shape for layer in layout.layers], layout.columns

        def read(module: int, rows: np.ndarray | None = None) -> tuple[torch.Tensor, ...]:
            pair = 2 * module, 2 * module + 1  # in the network's order a module's up follows its down
            flat = (torch.from_numpy(packed.read(rows, columns[layer])) for layer in pair)
            down, up = (x.unflatten(1, shapes[layer]) for x, layer in zip(flat, pair, strict=True))
            return down, up, torch.from_numpy(scales[slice(None) if rows is None else rows, module])

        return read

    def path(self, name: str) -> Path:
        """The folder in which the shards of this name lie."""
        return self.folder / "features" / f"{name}-{self.suffix}"


def extract(
    collection: Collection,
    names: Iterable[str],
    cache: Path,
    device: torch.device,
    crew: Crew | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    keep_findings: bool = False,
) -> Extracted:
    """Compute, or find in the cache, the named arrays of a collection.

    The pass goes by shards of consecutive files, shared among the crew; a shard that is finished is not read again by
    a pass that takes up where one was killed.

    Args:
        collection: What to read.
        names: Matrix-wise and pair-wise representations and measures, and ``WEIGHTS`` for the packed weights.
        cache: Folder that holds a folder for each fingerprint.
        device: Where features are computed.
        crew: Who computes; None: one thread.
        progress: Told the stage, how many shards are finished, and of how many.
        keep_findings: Whether to remember which weights are not finite, for a caller that goes on without them; else
            nothing is left of a collection that is refused.

    Raises:
        CollectionError: Weights are NaN or infinite, or files have changed since they were indexed.
    """
    crew, names = crew or Crew(), list(names)
    passed = _Pass(collection, cache, device)
    if bad := crew.agree(lambda: passed.read_known().get("findings", [])):
        raise _bad_weights(collection, bad)
    if found := crew.agree(lambda: [] if passed.missing(names) else [passed.known_fingerprint()]):
        return passed.extracted(*found)
    with ExitStack() as held:
        if crew.rank == 0:
            held.enter_context(store.made(cache))
            held.enter_context(store.locked(passed.folder.with_suffix(".lock"), _tell_of_waiting))
        missing = crew.agree(partial(passed.begin, names))
        shards = passed.shards if missing else []
        tasks = [Task(partial(passed.finished, rows, missing), partial(passed.run, rows, missing)) for rows in shards]
        threads = min(crew.threads, PASS_THREADS) if device.type == "cpu" else PASS_THREADS  # a GPU waits for readers
        for done, _ in enumerate(crew.do(tasks, threads), 1):
            progress("features", done, len(tasks))
        crew.wait()  # until nobody looks for shards where rank 0 will now take them away
        outcome = crew.agree(partial(passed.end, names, missing, keep_findings))
    if "findings" in outcome:
        raise _bad_weights(collection, outcome["findings"])
    if outcome["missing"]:  # the contents are others than when the rest was computed, though nothing told so
        return extract(collection, names, cache, device, crew, progress, keep_findings)
    return passed.extracted(outcome["fingerprint"])


def _bad_weights(collection: Collection, findings: list) -> CollectionError:
    """What a pass has found: path, reason, and whether the file itself is at fault and not its reading."""
    told = [Finding((path,), reason).told(collection.root) for path, reason, _ in findings]
    without = [(path, reason) for path, reason, _ in findings] if all(at_fault for *_, at_fault in findings) else []
    return CollectionError(told, without)


def _tell_of_waiting(holder: str) -> None:
    print(f"waiting for {holder}, which reads the same collection", flush=True)


class _Pass:
    """One pass over the weights of a collection, in shards of consecutive files.

    Shards lie in ``passes/<collection>/`` of the cache until all are finished: arrays by name, and a document for each
    shard with the digests of its files, from which the fingerprint is made. Then each name's folder is renamed into the
    folder of the fingerprint.
    """

    def __init__(self, collection: Collection, cache: Path, device: torch.device):
        self.collection, self.cache, self.device = collection, cache, device
        self.identity = identity(collection)
        self.folder = cache / "passes" / store.digest(str(collection.root.resolve()))
        code = store.code_digest(representations, lora_files, store, sys.modules[__name__])
        self.suffix = f"{store.digest([code, torch.__version__])[:8]}-{device.type}"
        count = len(collection.files)
        per_shard = min(count, max(1, SHARD_NUMBERS // _numbers_of_a_lora(collection)))
        self.shards = [range(first, min(first + per_shard, count)) for first in range(0, count, per_shard)]

    def extracted(self, fingerprint: str) -> Extracted:
        """Where arrays of these contents lie, whether they are there or not."""
        return Extracted(fingerprint, self.cache / fingerprint, self.suffix)

    @property
    def known(self) -> Path:
        """The file that tells the fingerprint of unchanged files."""
        return self.cache / "collections" / f"{self.identity}-{self.suffix}.json"

    def read_known(self) -> dict:
        """``fingerprint`` or ``findings`` of these very files, if they have been read before; else empty."""
        return _read_object(self.known)

    def known_fingerprint(self) -> str | None:
        """The fingerprint, if these very files have been read before."""
        return self.read_known().get("fingerprint")

    # -- rank 0, before and after -------------------------------------------------------------------------------------

    def missing(self, names: list[str]) -> list[str]:
        """The names whose arrays are still to be computed."""
        fingerprint = self.known_fingerprint()
        return [name for name in names if not (fingerprint and self.extracted(fingerprint).path(name).exists())]

    def begin(self, names: list[str]) -> list[str]:
        """What is `missing`; makes ready for it."""
        names = self.missing(names)
        if names:
            self._clear_unless_mine()
        return names

    def end(self, names: list[str], computed: list[str], keep_findings: bool) -> dict:
        """``fingerprint`` of the contents, arrays in their places; or ``findings``, nothing left of the pass."""
        if not computed:
            return {"fingerprint": self.known_fingerprint(), "missing": []}
        documents = [_read_object(self._document(rows)) for rows in self.shards]
        if findings := [finding for document in documents for finding in document["findings"]]:
            if keep_findings and all(at_fault for *_, at_fault in findings):
                store.write_atomically(self.known, store.canonical_json({"findings": findings}))
            self._remove()
            return {"findings": findings}
        contents = [line for document in documents for line in document["contents"]]
        fingerprint = store.digest(contents)
        # First the fingerprint: if killed among the renames, the next pass finds what is in its place and what is not.
        store.write_atomically(self.known, store.canonical_json({"fingerprint": fingerprint}))
        done = self.extracted(fingerprint)
        (done.folder / "features").mkdir(parents=True, exist_ok=True)
        for name in computed:
            if not done.path(name).exists():  # else files of the same contents were read from elsewhere
                self._arrays(name).rename(done.path(name))
        self._remove()
        return {"fingerprint": fingerprint, "missing": self.missing(names)}

    def _clear_unless_mine(self) -> None:
        """Remove what a killed pass over other files of this folder, or another version of it, has left."""
        owner = self.folder / "owner"
        mine = f"{self.identity} {self.suffix}"
        if not (owner.exists() and owner.read_text() == mine):
            self._remove()
            store.write_atomically(owner, mine.encode())

    def _remove(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)

    # -- whoever computes ---------------------------------------------------------------------------------------------

    def _arrays(self, name: str) -> Path:
        return self.folder / name

    def _document(self, rows: range) -> Path:
        return self.folder / f"{rows.start:08}.json"

    def finished(self, rows: range, names: list[str]) -> bool:
        """Whether a shard needs no work: its arrays are there, or what is wrong with its files."""
        document = _read_object(self._document(rows))
        there = all(store.shard_path(self._arrays(name), rows.start).exists() for name in names)
        return bool(document) and (there or bool(document["findings"]))

    def run(self, rows: range, names: list[str]) -> None:
        """Read each file of a shard once; write its arrays and then its document."""
        arrays = _allocate(self.collection, names, len(rows))
        contents: list[str] = []
        findings: list[tuple[str, str, bool]] = []
        per_chunk = max(1, CHUNK_NUMBERS // max(file.layout.width for file in self.collection.files))
        for start in range(rows.start, rows.stop, per_chunk):
            chunk = range(start, min(start + per_chunk, rows.stop))
            weights, scales = [], []
            for file in self.collection.files[chunk.start : chunk.stop]:
                try:
                    flat, scale, digest = _read_file(self.collection.root, file)
                except (LoraFileError, OSError) as error:
                    findings.append((file.path, str(error), isinstance(error, NotFiniteError)))
                    continue
                weights.append(flat)
                scales.append(scale)
                contents.append(store.digest([file.path, digest, str(file.adapter_config)]))
            if not findings:  # else go on reading, to tell of every fault at once
                part = {name: a[chunk.start - rows.start : chunk.stop - rows.start] for name, a in arrays.items()}
                _fill(part, self.collection, chunk, weights, scales, self.device)
        if not findings:
            for name, array in arrays.items():
                store.save_array(store.shard_path(self._arrays(name), rows.start), array)
        document = {"contents": contents, "findings": findings}
        store.write_atomically(self._document(rows), store.canonical_json(document))


def _numbers_of_a_lora(collection: Collection) -> int:
    """Weights and all features of one: what a shard holds of it at most, whatever is asked for."""
    items = {"matrix": len(collection.layers), "pair": len(collection.modules)}
    features = sum(len(row.feature_names) * items[row.kind] for row in FEATURES.values() if row.kind in items)
    return features + collection.packed_layout.width


def _read_object(path: Path) -> dict:
    """A JSON object of the cache; empty where there is none, or it is damaged: it is then made again."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def identity(collection: Collection) -> str:
    """Stands for the files as the file system tells them apart; a cache is trusted on this."""
    return store.digest(
        [str(collection.root.resolve())]
        + [[file.path, *file.stat, str(file.adapter_config)] for file in collection.files]
    )


def _allocate(collection: Collection, names: list[str], rows: int) -> dict[str, np.ndarray]:
    """An array for a shard of each name: features [rows, L or P, F], or packed weights [rows, W]."""
    shapes = {}
    for name in names:
        if name == WEIGHTS:
            shapes[name] = (rows, collection.packed_layout.width)
        else:
            items = collection.layers if FEATURES[name].kind == "matrix" else collection.modules
            shapes[name] = (rows, len(items), len(FEATURES[name].feature_names))
    return {name: np.empty(shape, np.float32) for name, shape in shapes.items()}


def _read_file(root: Path, file: LoraFile) -> tuple[np.ndarray, dict[str, float], str]:
    """Weights float32[W], scale of each module's update, and a digest of the contents.

    Refuses what changed or is not finite.
    """
    path = root / file.path
    data = np.fromfile(path, np.uint8)
    if _stat(path) != file.stat:
        raise LoraFileError("changed since it was indexed. start again.")
    weights, alphas = lora_files.load_weights(data, file.layout)
    lora_files.check_finite(weights, file.layout)
    scales = lora_files.update_scales(file.layout, alphas, file.adapter_config)
    return weights, scales, hashlib.sha256(data).hexdigest()


def _fill(
    arrays: dict, collection: Collection, rows: range, weights: list[np.ndarray], scales: list[dict], device
) -> None:
    """Compute or copy the rows of some consecutive files, into arrays of just these."""
    files = collection.files[rows.start : rows.stop]
    # Matrices [n, rows, cols] of each layer, with the n rows of the arrays that they are of.
    matrices: list[list[tuple[list[int], torch.Tensor]]] = [[] for _ in collection.layers]
    for members in _by_layout(files):
        layout = files[members[0]].layout
        flat = np.stack([weights[i] for i in members])
        if WEIGHTS in arrays:
            arrays[WEIGHTS][members] = _packed(flat, layout, collection.packed_layout)
        on_device = torch.from_numpy(flat).to(device)
        for depth, (layer, columns) in enumerate(zip(layout.layers, layout.columns, strict=True)):
            matrices[depth].append((members, on_device[:, columns].unflatten(1, layer.shape)))
    _fill_matrix_features(arrays, matrices)
    _fill_pair_features(arrays, collection, matrices, scales)


def _packed(flat: np.ndarray, layout: Layout, packed: Layout) -> np.ndarray:
    """Flattened weights of some files of one layout as they are packed: zeros where a rank falls short.

    float32[n, W of the layout] -> float32[n, W of the packed layout]. A down is given rows of zeros, an up columns, so
    that their product stays what it was.
    """
    if [layer.shape for layer in layout.layers] == [layer.shape for layer in packed.layers]:
        return flat
    padded = np.zeros((len(flat), packed.width), np.float32)
    places = zip(layout.layers, layout.columns, packed.layers, packed.columns, strict=True)
    for layer, columns, wide, wide_columns in places:
        (rows, cols), to = layer.shape, padded[:, wide_columns].reshape(-1, *wide.shape)  # a view
        to[:, :rows, :cols] = flat[:, columns].reshape(-1, rows, cols)
    return padded


def _fill_matrix_features(arrays: dict, matrices: list) -> None:
    """Matrix-wise features of a chunk of files; all matrices of one shape, whatever file and layer, at once."""
    names = [name for name in arrays if name != WEIGHTS and FEATURES[name].kind == "matrix"]
    groups = defaultdict(list)
    for depth, of_layer in enumerate(matrices):
        for members, batch in of_layer:
            groups[batch.shape[1:]].append((members, depth, batch))
    for group in groups.values() if names else ():
        row = [i for members, _, _ in group for i in members]
        depths = [depth for members, depth, _ in group for _ in members]
        features = matrix_features(torch.cat([batch for _, _, batch in group]), names)
        for name in names:
            arrays[name][row, depths] = features[name].cpu().numpy()


def _fill_pair_features(arrays: dict, collection: Collection, matrices: list, scales: list[dict]) -> None:
    """Pair-wise features of a chunk of files; all pairs of one shape, whatever file and module, at once."""
    names = [name for name in arrays if name != WEIGHTS and FEATURES[name].kind == "pair"]
    groups = defaultdict(list)
    for p, module in enumerate(collection.modules):
        # In the network's order a module's up follows its down.
        for (members, downs), (_, ups) in zip(matrices[2 * p], matrices[2 * p + 1], strict=True):
            groups[downs.shape[1:], ups.shape[1:]].append((members, p, module, downs, ups))
    for group in groups.values() if names else ():
        row = [i for members, *_ in group for i in members]
        position, module = zip(*((p, module) for members, p, module, *_ in group for _ in members), strict=True)
        downs, ups = (torch.cat([entry[k] for entry in group]) for k in (3, 4))
        scale = torch.tensor([scales[i][m] for i, m in zip(row, module, strict=True)], device=downs.device)
        features = pair_features(downs, ups, module, scale, names)
        for name in names:
            arrays[name][row, position] = features[name].cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# python data.py inspect
# ----------------------------------------------------------------------------------------------------------------------


def inspection(collection: Collection, layers: str | None = None) -> dict:
    """What ``inspect --json`` prints; ``layers`` is a pattern, see `select_layers`."""
    dtypes: Counter = Counter()
    for positions in _by_layout(collection.files):
        for layer in collection.files[positions[0]].layout.layers:
            dtypes[layer.dtype] += len(positions)
    paths = [file.path for file in collection.files]
    columns = labelling.column_values(collection.root, paths, collection.table)
    return {
        "num_samples": len(collection.files),
        "classes": collection.class_counts,
        "layers": [
            {"name": layer.name, "module": layer.module, "role": layer.role, "shape": list(layer.shape)}
            for layer in collection.layers
        ],
        "layers_selected": np.flatnonzero(select_layers(collection, layers)).tolist(),
        "dtypes": dict(dtypes),
        "label_source": collection.label_source,
        "label_column": collection.label_column,
        "columns": {name: len(values) for name, values in columns.items()},
        "mixed_ranks": bool(collection.mixed_ranks),
        "ignored": dict(collection.ignored),
        "skipped": collection.skipped_records,
    }


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "nothing"


def add_label_flags(add: Callable) -> None:
    """Add the flags that say how a collection is read; ``add`` is a parser's ``add_argument``."""
    add("--labels", type=Path, metavar="FILE", help="csv or jsonl with the columns file_name and label (none)")
    add(
        "--label-column",
        metavar="NAME",
        help="column of the table, or field of the metadata.json files, that is the label (category_label; in a table "
        "else label, else its only column)",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out files that cannot be used, and list them, instead of refusing",
    )
    add(
        "--layers",
        metavar="PATTERN",
        help="only layers whose name or canonical module matches: attn2, '*.to_v.*', or a comma list (all)",
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Look at a folder of LoRAs before an experiment, or make one.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="tell what a folder of LoRAs holds; only headers are read")
    inspect.add_argument("path", type=Path, help="folder of LoRAs")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_label_flags(inspect.add_argument)
    publish = commands.add_parser("import", help="turn a published parquet collection into a folder of LoRAs")
    publish.add_argument("source", help="a parquet file, a folder of them, or owner/name of a data set of the hub")
    publish.add_argument("out", type=Path, help="folder to make; it may be there from the same import")
    publish.add_argument(
        "--rank", type=int, help="rank of the LoRAs, where cells are flat lists (the column rank, or 1)"
    )
    publish.add_argument(
        "--skip-bad", action="store_true", help="leave out rows with NaN or a missing cell, and say how many"
    )
    publish.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out columns, by name or with * (none)",
    )
    publish.add_argument("--subset", help="of a data set of the hub that has several (none)")
    publish.add_argument("--split", help="of a data set of the hub that has several (the only one)")
    args = parser.parse_args(arguments)
    if args.command == "import":
        import published  # needs libraries that nothing else does

        return published.run(args)
    try:
        collection = index_collection(
            args.path, labels=args.labels, label_column=args.label_column, skip_bad=args.skip_bad
        )
        found = inspection(collection, args.layers)
    except CollectionError as error:
        print(error.shown(), file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_inspection_lines(args.path, found)))
    return 0


def _inspection_lines(path: Path, found: dict) -> list[str]:
    """What ``inspect`` prints."""
    layers = {depth: found["layers"][depth] for depth in found["layers_selected"]}
    listed = f", {len(layers)} of them listed" if len(layers) < len(found["layers"]) else ""
    wide = max(len(layer["name"]) for layer in layers.values())
    lines = [
        f"{path}: {found['num_samples']} LoRAs of {len(found['layers'])} layers{listed}; "
        f"labels from {found['label_source']}",
        *["ranks differ between LoRAs: the shapes are those of the first file"] * found["mixed_ranks"],
        "dtypes:  " + _counted(found["dtypes"]),
        "classes: " + _counted(found["classes"]),
        "columns: "
        + _counted(found["columns"])
        + " (number of values; --label-column chooses)" * bool(found["columns"]),
        "ignored: " + _counted(found["ignored"]),
        *[f"skipped: {entry['path']}: {entry['reason']}" for entry in found["skipped"]],
        f"{'depth':>5}  {'role':4}  {'shape':>12}  {'layer':{wide}}  module",
    ]
    for depth, layer in layers.items():
        shape = "x".join(map(str, layer["shape"]))
        lines.append(f"{depth:5}  {layer['role']:4}  {shape:>12}  {layer['name']:{wide}}  {layer['module']}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
