"""A folder of LoRA files -> layers, labels, splits, features and packed weights.

``python data.py inspect PATH [--json]`` tells what a folder holds.

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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch

import lora_files
import representations
import store
from crew import Crew, Task
from lora_files import Layer, Layout, LoraFileError
from representations import REPRESENTATIONS, matrix_features, pair_features

CHUNK_NUMBERS = 2**22  # weights worked on at once on the pass, 16 MiB
SHARD_NUMBERS = 2**24  # weights of the files whose features, and packed weights, are held and then written: 64 MiB
PASS_THREADS = 8  # threads on the pass at most, each with a shard in memory
PREFERRED_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_FINDINGS = 20


class CollectionError(ValueError):
    """A collection cannot be used; each finding reads ``<path>: what is wrong. what to do.``."""

    def __init__(self, findings: list[str]):
        super().__init__("\n".join(findings))
        self.findings = findings

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


@dataclass(frozen=True)
class Collection:
    """An indexed collection: N files that hold the same L layers of P modules; a class is a distinct label.

    Layers stand in the network's order, under the names that the first file gives them.
    """

    name: str
    root: Path
    files: tuple[LoraFile, ...]
    label_source: str
    ignored: Counter = field(default_factory=Counter)

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

    @property
    def weights_per_layer(self) -> list[int]:
        """Flattened width of each layer."""
        return [math.prod(layer.shape) for layer in self.layers]


# ----------------------------------------------------------------------------------------------------------------------
# Index: headers and labels
# ----------------------------------------------------------------------------------------------------------------------


def index_collection(
    root: Path, name: str | None = None, progress: Callable[[Iterable, str], Iterable] = lambda items, _: items
) -> Collection:
    """Read all headers and labels of a folder; ``progress`` wraps the iteration over files.

    Labels come from ``metadata.json`` beside each weight file (``category_label``) if any file has one, else from the
    first folder of its path. Nothing of the weights is read.

    Raises:
        CollectionError: No LoRA is there, or files are faulty, unlabelled, or disagree about the layers.
    """
    if not root.is_dir():
        raise CollectionError([f"{root}: no such folder. give a folder of LoRAs."])
    ignored: Counter = Counter()
    paths, findings = _find_weight_files(root, ignored)
    labels, label_source = _read_labels(root, paths, findings)
    files = []
    for path in progress(paths, "index"):
        full, label = os.path.join(root, path), labels.get(path, "")
        try:
            stat = _stat(full)
            layout = lora_files.parse_layout(lora_files.read_header(full))
            adapter_config = _read_json(os.path.join(os.path.dirname(full), "adapter_config.json"))
            if adapter_config:
                lora_files.update_scales(layout, {}, adapter_config)  # refuses what cannot be used
        except (LoraFileError, OSError) as error:
            findings.append(f"{full}: {error}")
            continue
        ignored.update(layout.ignored)
        if any("\ud800" <= character <= "\udfff" for character in path + label):
            findings.append(f"{full!a}: its name or label {label!a} is not plain Unicode text. rename it.")
            continue
        files.append(LoraFile(path, label, layout, stat, adapter_config))
    findings += _layer_differences(root, files)
    if not files and not findings:
        links = f" ({ignored['linked folders']} linked folders are not followed)" if ignored["linked folders"] else ""
        findings.append(f"{root}: no *.safetensors file in it{links}. lay them out as <class>/<lora>.safetensors.")
    if findings:
        raise CollectionError(list(dict.fromkeys(findings)))  # files of a folder share its metadata and its faults
    return Collection(name or root.resolve().name, root, tuple(files), label_source, +ignored)


def _stat(path: Path | str) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _find_weight_files(root: Path, ignored: Counter) -> tuple[list[str], list[str]]:
    """Weight files below a folder, as sorted paths relative to it, and what is wrong with the folders."""
    paths, findings = [], []
    for table in ("metadata.csv", "metadata.jsonl"):
        if (root / table).exists():
            mend = "remove it and label by folders or by metadata.json beside each file"
            findings.append(f"{root / table}: tables of labels cannot be read yet. {mend}.")
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
        pickles = sorted(os.path.join(folder, name) for name in names if name.endswith(PICKLE_SUFFIXES))
        if weights:
            ignored["pickles beside *.safetensors"] += len(pickles)
        else:
            findings += [f"{path}: a pickle checkpoint: never loaded. convert it to safetensors." for path in pickles]
    findings += [f"{error.filename}: cannot be listed ({error.strerror}). mend its permissions." for error in errors]
    return sorted(paths), findings


def _read_labels(root: Path, paths: list[str], findings: list[str]) -> tuple[dict[str, str], str]:
    """Label of each weight file, and where labels come from; files without one are added to the findings."""
    documents = {}
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
        path = os.path.join(root, folder, "metadata.json")
        try:
            document = _read_json(path) or {}
            documents[folder] = {key: document[key] for key in ("category_label",) if key in document}
        except LoraFileError as error:
            findings.append(f"{path}: {error}")
    paths = [path for path in paths if os.path.dirname(path) in documents]
    if any("category_label" in document for document in documents.values()):
        source = "category_label in metadata.json"
        labels = {path: documents[os.path.dirname(path)].get("category_label") for path in paths}
        usable = {path: str(label) for path, label in labels.items() if isinstance(label, str | int) and label != ""}
        missing = "no category_label (a text or a whole number) in metadata.json beside it, as other files here have"
    else:
        source = "the folder names"
        parts = {path: path.split(os.sep) for path in paths}
        usable = {path: folders[0] for path, folders in parts.items() if len(folders) in (2, 3)}
        missing = "no metadata.json beside it, and it does not lie in <class>/ or <class>/<lora>/"
    unlabelled = [root / path for path in paths if path not in usable]
    findings += [f"{path}: no label: {missing}. label it or leave it out." for path in unlabelled]
    return usable, source


def _read_json(path: str) -> dict | None:
    """A JSON object, or None where there is no such file; equal texts give the same object, not to be changed."""
    name = os.path.basename(path)
    try:
        with open(path, encoding="utf-8") as file:
            value = _parsed_json(file.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise LoraFileError(f"{name} is not readable as JSON ({error}). mend or remove it.") from error
    if not isinstance(value, dict):
        raise LoraFileError(f"{name} holds no JSON object. mend or remove it.")
    return value


_parsed_json = lru_cache(maxsize=64)(json.loads)


def _by_layout(files: Sequence[LoraFile]) -> list[list[int]]:
    """Positions of the files that share a layout, for each layout; there are far fewer of them than files."""
    positions = defaultdict(list)
    for i, file in enumerate(files):
        positions[id(file.layout)].append(i)
    return list(positions.values())


def _layer_differences(root: Path, files: list[LoraFile]) -> list[str]:
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
            findings.append(f"{where}: {told}")
        elif other := next((layer for layer in found if found[layer] != widths[layer]), None):
            told = f"{other} is {found[other]} wide, but {widths[other]} in {others}: mixed base models"
            findings.append(f"{where}: {told}. keep one base model to a collection.")
    return findings


def check_classes(collection: Collection) -> None:
    """Refuse labels that make no classification task.

    Raises:
        CollectionError: Fewer than two classes, a class of fewer than three LoRAs, or a label for each LoRA.
    """
    counts = collection.class_counts
    rarest = [f"{label}: {counts[label]}" for label in sorted(counts, key=counts.get)]
    shown = ", ".join(rarest[:12]) + (", ..." if len(rarest) > 12 else "")
    if len(counts) < 2:
        fault = f"fewer than two classes ({shown}). at least two concepts are needed."
    elif len(counts) == len(collection.files):
        fault = f"as many labels as LoRAs ({len(counts)}): looks like an id. choose labels that repeat."
    elif min(counts.values()) < 3:
        fault = f"a class with fewer than three LoRAs ({shown}). train, validation and test need one each."
    else:
        return
    raise CollectionError([f"{collection.root}: labels from {collection.label_source} give {fault}"])


# ----------------------------------------------------------------------------------------------------------------------
# Split
# ----------------------------------------------------------------------------------------------------------------------


def split_rows(y: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Stratified rows for ``train``, ``validation`` and ``test`` (70/10/20), fixed by labels and seed alone.

    Validation has max(round(0.1 N), C) rows and test max(round(0.2 N), C); every class has a row in each part.
    (scikit-learn's stratified splitters can leave a rare class out of one, which is why rows are allotted here.)

    Args:
        y: Class of each sample, every class at least three times, int64[N].
        seed: Of the draw.

    Returns:
        Sorted row indices of each part.
    """
    sizes = np.bincount(y)
    test = _allot(max(round(0.2 * len(y)), len(sizes)), sizes, most=sizes - 2)
    validation = _allot(max(round(0.1 * len(y)), len(sizes)), sizes, most=sizes - test - 1)
    key = hashlib.sha256(f"{seed}/split".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(key, "little"))
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for c in range(len(sizes)):
        rows = generator.permutation(np.flatnonzero(y == c))
        ends = np.cumsum([test[c], validation[c]])
        for name, part in zip(("test", "validation", "train"), np.split(rows, ends), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


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


@dataclass(frozen=True)
class Extracted:
    """Features and packed weights of a collection, in a cache folder named by the fingerprint of its contents."""

    fingerprint: str
    folder: Path
    suffix: str

    def load(self, name: str) -> np.ndarray:
        """Features of all LoRAs, float32[N, L or P, F]; memory-mapped where they are one shard."""
        shards = store.map_shards(self.path(name))
        return shards[0] if len(shards) == 1 else np.concatenate(shards)

    def weights(self) -> store.Shards:
        """The packed weights, float32[N, W], which no memory need hold whole; see `Layout.columns`."""
        return store.Shards(self.path(WEIGHTS))

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
) -> Extracted:
    """Compute, or find in the cache, the named arrays of a collection.

    The pass goes by shards of consecutive files, shared among the crew; a shard that is finished is not read again by
    a pass that takes up where one was killed.

    Args:
        collection: What to read.
        names: Matrix-wise and pair-wise representations, and ``WEIGHTS`` for the packed weights.
        cache: Folder that holds a folder for each fingerprint.
        device: Where features are computed.
        crew: Who computes; None: one thread.
        progress: Told the stage, how many shards are finished, and of how many.

    Raises:
        CollectionError: Weights are NaN or infinite, or files have changed since they were indexed. Nothing is left.
    """
    crew, names = crew or Crew(), list(names)
    passed = _Pass(collection, cache, device)
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
        outcome = crew.agree(partial(passed.end, names, missing))
    if "findings" in outcome:
        raise CollectionError(outcome["findings"])
    if outcome["missing"]:  # the contents are others than when the rest was computed, though nothing told so
        return extract(collection, names, cache, device, crew, progress)
    return passed.extracted(outcome["fingerprint"])


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
        self.identity = _identity(collection)
        self.folder = cache / "passes" / store.digest(str(collection.root.resolve()))
        code = store.code_digest(representations, lora_files, store, sys.modules[__name__])
        self.suffix = f"{store.digest([code, torch.__version__])[:8]}-{device.type}"
        count, width = len(collection.files), max(file.layout.width for file in collection.files)
        per_shard = min(count, max(1, SHARD_NUMBERS // width))
        self.shards = [range(first, min(first + per_shard, count)) for first in range(0, count, per_shard)]

    def extracted(self, fingerprint: str) -> Extracted:
        """Where arrays of these contents lie, whether they are there or not."""
        return Extracted(fingerprint, self.cache / fingerprint, self.suffix)

    @property
    def known(self) -> Path:
        """The file that tells the fingerprint of unchanged files."""
        return self.cache / "collections" / f"{self.identity}.json"

    # -- rank 0, before and after -------------------------------------------------------------------------------------

    def begin(self, names: list[str]) -> list[str]:
        """The names whose arrays are still to be computed; makes ready for them."""
        if self.known.exists():
            found = self.extracted(json.loads(self.known.read_text())["fingerprint"])
            names = [name for name in names if not found.path(name).exists()]
        if names:
            self._clear_unless_mine()
        return names

    def end(self, names: list[str], computed: list[str]) -> dict:
        """``fingerprint`` of the contents, arrays in their places; or ``findings``, nothing left of the pass."""
        if not computed:
            return json.loads(self.known.read_text()) | {"missing": []}
        documents = [json.loads(self._document(rows).read_text()) for rows in self.shards]
        if findings := [line for document in documents for line in document["findings"]]:
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
        return {"fingerprint": fingerprint, "missing": [name for name in names if not done.path(name).exists()]}

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
        document = self._document(rows)
        if not document.exists():
            return False
        there = all(store.shard_path(self._arrays(name), rows.start).exists() for name in names)
        return there or bool(json.loads(document.read_text())["findings"])

    def run(self, rows: range, names: list[str]) -> None:
        """Read each file of a shard once; write its arrays and then its document."""
        arrays = _allocate(self.collection, names, len(rows))
        contents: list[str] = []
        findings: list[str] = []
        per_chunk = max(1, CHUNK_NUMBERS // max(file.layout.width for file in self.collection.files))
        for start in range(rows.start, rows.stop, per_chunk):
            chunk = range(start, min(start + per_chunk, rows.stop))
            weights, scales = [], []
            for file in self.collection.files[chunk.start : chunk.stop]:
                try:
                    flat, scale, digest = _read_file(self.collection.root, file)
                except (LoraFileError, OSError) as error:
                    findings.append(f"{self.collection.root / file.path}: {error}")
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


def _identity(collection: Collection) -> str:
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
            shapes[name] = (rows, collection.files[0].layout.width)
        else:
            representation = REPRESENTATIONS[name]
            items = collection.layers if representation.kind == "matrix" else collection.modules
            shapes[name] = (rows, len(items), len(representation.feature_names))
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
            arrays[WEIGHTS][members] = flat
        on_device = torch.from_numpy(flat).to(device)
        for depth, (layer, columns) in enumerate(zip(layout.layers, layout.columns, strict=True)):
            matrices[depth].append((members, on_device[:, columns].unflatten(1, layer.shape)))
    _fill_matrix_features(arrays, matrices)
    _fill_pair_features(arrays, collection, matrices, scales)


def _fill_matrix_features(arrays: dict, matrices: list) -> None:
    """Matrix-wise features of a chunk of files; all matrices of one shape, whatever file and layer, at once."""
    names = [name for name in arrays if name != WEIGHTS and REPRESENTATIONS[name].kind == "matrix"]
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
    names = [name for name in arrays if name != WEIGHTS and REPRESENTATIONS[name].kind == "pair"]
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


def inspection(collection: Collection) -> dict:
    """What ``inspect --json`` prints."""
    dtypes: Counter = Counter()
    for positions in _by_layout(collection.files):
        for layer in collection.files[positions[0]].layout.layers:
            dtypes[layer.dtype] += len(positions)
    return {
        "num_samples": len(collection.files),
        "classes": collection.class_counts,
        "layers": [
            {"name": layer.name, "module": layer.module, "role": layer.role, "shape": list(layer.shape)}
            for layer in collection.layers
        ],
        "dtypes": dict(dtypes),
        "label_source": collection.label_source,
        "mixed_ranks": bool(collection.mixed_ranks),
        "ignored": dict(collection.ignored),
    }


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Look at a folder of LoRAs before an experiment.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="tell what a folder of LoRAs holds; only headers are read")
    inspect.add_argument("path", type=Path, help="folder of LoRAs")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(arguments)
    try:
        found = inspection(index_collection(args.path))
    except CollectionError as error:
        print(error.shown(), file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    layers, wide = found["layers"], max(len(layer["name"]) for layer in found["layers"])
    lines = [
        f"{args.path}: {found['num_samples']} LoRAs of {len(layers)} layers; labels from {found['label_source']}",
        *["ranks differ between LoRAs: the shapes are those of the first file"] * found["mixed_ranks"],
        "dtypes:  " + _counted(found["dtypes"]),
        "classes: " + _counted(found["classes"]),
        "ignored: " + (_counted(found["ignored"]) or "nothing"),
        f"{'depth':>5}  {'role':4}  {'shape':>12}  {'layer':{wide}}  module",
    ]
    for depth, layer in enumerate(layers):
        shape = "x".join(map(str, layer["shape"]))
        lines.append(f"{depth:5}  {layer['role']:4}  {shape:>12}  {layer['name']:{wide}}  {layer['module']}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
