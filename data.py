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
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch

import lora_files
import representations
import store
from lora_files import Layer, Layout, LoraFileError
from representations import REPRESENTATIONS, matrix_features, pair_features

CHUNK_NUMBERS = 2**22  # weights worked on at once on the pass, 16 MiB
SHARD_NUMBERS = 2**26  # weights of the files whose features, and packed weights, are held and then written: 256 MiB
READERS = 2  # threads that read and hash
READ_AHEAD = 32  # files, fewer where they are large
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
        pickles = sorted(os.path.join(folder, name) for name in names if name.lower().endswith(PICKLE_SUFFIXES))
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
    progress: Callable[[Iterable, str], Iterable] = lambda items, _: items,
) -> Extracted:
    """Compute, or find in the cache, the named arrays of a collection.

    Args:
        collection: What to read.
        names: Matrix-wise and pair-wise representations, and ``WEIGHTS`` for the packed weights.
        cache: Folder that holds a folder for each fingerprint.
        device: Where features are computed.
        progress: Wraps the iteration over chunks of files; is given the number of files in each.

    Raises:
        CollectionError: Weights are NaN or infinite, or files have changed since they were indexed. Nothing is left.
    """
    names = list(names)
    code = store.code_digest(representations, lora_files, store, sys.modules[__name__])
    suffix = f"{store.digest([code, torch.__version__])[:8]}-{device.type}"
    known = cache / "collections" / f"{_identity(collection)}.json"
    missing = names
    if known.exists():
        fingerprint = json.loads(known.read_text())["fingerprint"]
        found = Extracted(fingerprint, cache / fingerprint, suffix)
        missing = [name for name in names if not found.path(name).exists()]
        if not missing:
            return found
    with _scratch_folder(cache) as scratch:
        fingerprint = _pass_over_weights(collection, missing, scratch, device, progress)
        done = Extracted(fingerprint, cache / fingerprint, suffix)
        (done.folder / "features").mkdir(parents=True, exist_ok=True)
        for name in missing:
            try:
                (scratch / name).rename(done.path(name))
            except OSError:
                if not done.path(name).exists():  # else another process has finished the same
                    raise
    if not all(done.path(name).exists() for name in names):  # other contents than those found before
        known.unlink(missing_ok=True)
        return extract(collection, names, cache, device, progress)
    store.write_atomically(known, store.canonical_json({"fingerprint": fingerprint}))
    return done


def _identity(collection: Collection) -> str:
    """Stands for the files as the file system tells them apart; a cache is trusted on this."""
    return store.digest(
        [str(collection.root.resolve())]
        + [[file.path, file.label, *file.stat, str(file.adapter_config)] for file in collection.files]
    )


@contextmanager
def _scratch_folder(cache: Path) -> Iterator[Path]:
    """A folder on the cache's file system; it is removed afterwards, and so on failure is every parent made for it."""
    made = [folder for folder in (cache, *cache.absolute().parents) if not folder.exists()]
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix="pass-"))
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch)
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
    shutil.rmtree(scratch)


def _pass_over_weights(
    collection: Collection, names: list[str], folder: Path, device: torch.device, progress: Callable
) -> str:
    """Read each file once, write the shards of each array as they are finished, and return the fingerprint."""
    count, width = len(collection.files), max(file.layout.width for file in collection.files)
    per_shard = min(count, max(1, SHARD_NUMBERS // width))
    per_chunk = max(1, CHUNK_NUMBERS // width)
    chunks = [
        range(start, min(start + per_chunk, first + per_shard, count))
        for first in range(0, count, per_shard)
        for start in range(first, min(first + per_shard, count), per_chunk)
    ]
    arrays = _allocate(collection, names, per_shard)
    fingerprint = hashlib.sha256()
    findings: list[str] = []
    ahead = min(READ_AHEAD, max(READERS, per_chunk))
    read = _in_threads(partial(_read_file, collection.root), collection.files, ahead)
    for rows in progress(chunks, "features"):
        weights, scales = [], []
        for file in collection.files[rows.start : rows.stop]:
            try:
                flat, scale, contents = next(read).result()
            except (LoraFileError, OSError) as error:
                findings.append(f"{collection.root / file.path}: {error}")
                continue
            weights.append(flat)
            scales.append(scale)
            fingerprint.update(store.digest([file.path, file.label, contents, str(file.adapter_config)]).encode())
        if findings:
            continue  # go on reading, to tell of every fault at once
        first = rows.start // per_shard * per_shard
        chunk = {name: array[rows.start - first : rows.stop - first] for name, array in arrays.items()}
        _fill(chunk, collection, rows, weights, scales, device)
        if rows.stop in (first + per_shard, count):
            for name, array in arrays.items():
                store.save_array(store.shard_path(folder / name, first), array[: rows.stop - first])
    if findings:
        raise CollectionError(findings)
    return fingerprint.hexdigest()[:16]


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


def _in_threads(work: Callable, items: Iterable, ahead: int) -> Iterator[Future]:
    """The outcome of ``work(item)`` for each item, in order; threads are at most ``ahead`` items ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def _read_file(root: Path, file: LoraFile) -> tuple[np.ndarray, dict[str, float], str]:
    """Weights float32[W], scale of each module's update, and a digest of the contents.

    Refuses what changed or is not finite. Only numpy and hashlib work here: in several threads torch would start
    several teams of threads.
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
