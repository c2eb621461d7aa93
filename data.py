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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import lora_files
import representations
import store
from lora_files import Layer, Layout, LoraFileError
from representations import REPRESENTATIONS, matrix_features, pair_features

CHUNK_NUMBERS = 2**22  # weights held at once on the pass; their float64 copies take ten times 32 MiB
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
        for file in self.files:
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
        try:
            stat = _stat(path)
            layout = lora_files.parse_layout(lora_files.read_header(path))
            adapter_config = _read_json(path.parent / "adapter_config.json")
            if adapter_config:
                lora_files.update_scales(layout, {}, adapter_config)  # refuses what cannot be used
        except (LoraFileError, OSError) as error:
            findings.append(f"{path}: {error}")
            continue
        ignored.update(layout.ignored)
        relative, label = path.relative_to(root).as_posix(), labels.get(path, "")
        if any("\ud800" <= character <= "\udfff" for character in relative + label):
            findings.append(f"{str(path)!a}: its name or label {label!a} is not plain Unicode text. rename it.")
            continue
        files.append(LoraFile(relative, label, layout, stat, adapter_config))
    findings += _layer_differences(root, files)
    if not files and not findings:
        links = f" ({ignored['linked folders']} linked folders are not followed)" if ignored["linked folders"] else ""
        findings.append(f"{root}: no *.safetensors file in it{links}. lay them out as <class>/<lora>.safetensors.")
    if findings:
        raise CollectionError(list(dict.fromkeys(findings)))  # files of a folder share its metadata and its faults
    return Collection(name or root.resolve().name, root, tuple(files), label_source, +ignored)


def _stat(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _find_weight_files(root: Path, ignored: Counter) -> tuple[list[Path], list[str]]:
    """Weight files below a folder in the order of their paths, and what is wrong with the folders."""
    paths, findings = [], []
    for table in ("metadata.csv", "metadata.jsonl"):
        if (root / table).exists():
            mend = "remove it and label by folders or by metadata.json beside each file"
            findings.append(f"{root / table}: tables of labels cannot be read yet. {mend}.")
    errors: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=errors.append):
        ignored["hidden folders"] += sum(sub.startswith(".") for sub in subfolders)
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        ignored["linked folders"] += sum(Path(folder, sub).is_symlink() for sub in subfolders)
        weights = [name for name in names if name.lower().endswith(".safetensors") and not name.startswith(".")]
        preferred = [name for name in PREFERRED_FILES if name in weights][:1]
        if preferred:
            ignored[f"*.safetensors beside {preferred[0]}"] += len(weights) - 1
        paths += [Path(folder, name) for name in preferred or weights]
        pickles = sorted(Path(folder, name) for name in names if name.endswith(PICKLE_SUFFIXES))
        if weights:
            ignored["pickles beside *.safetensors"] += len(pickles)
        else:
            findings += [f"{path}: a pickle checkpoint: never loaded. convert it to safetensors." for path in pickles]
    findings += [f"{error.filename}: cannot be listed ({error.strerror}). mend its permissions." for error in errors]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix()), findings


def _read_labels(root: Path, paths: list[Path], findings: list[str]) -> tuple[dict[Path, str], str]:
    """Label of each weight file, and where labels come from; files without one are added to the findings."""
    documents = {}
    for path in paths:
        try:
            documents[path] = _read_json(path.parent / "metadata.json") or {}
        except LoraFileError as error:
            findings.append(f"{path.parent / 'metadata.json'}: {error}")
    if any("category_label" in document for document in documents.values()):
        source = "category_label in metadata.json"
        labels = {path: document.get("category_label") for path, document in documents.items()}
        usable = {path: str(label) for path, label in labels.items() if isinstance(label, str | int) and label != ""}
        missing = "no category_label (a text or a whole number) in metadata.json beside it, as other files here have"
    else:
        source = "the folder names"
        parts = {path: path.relative_to(root).parts for path in paths}
        usable = {path: folders[0] for path, folders in parts.items() if len(folders) in (2, 3)}
        missing = "no metadata.json beside it, and it does not lie in <class>/ or <class>/<lora>/"
    findings += [f"{path}: no label: {missing}. label it or leave it out." for path in documents if path not in usable]
    return usable, source


def _read_json(path: Path) -> dict | None:
    """A JSON object, or None where there is no such file."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoraFileError(f"{path.name} is not readable as JSON ({error}). mend or remove it.") from error
    if not isinstance(value, dict):
        raise LoraFileError(f"{path.name} holds no JSON object. mend or remove it.")
    return value


def _layer_differences(root: Path, files: list[LoraFile]) -> list[str]:
    """Where files differ in their layers, or in more than the rank, in words; the commonest layers are the measure."""
    holders = defaultdict(list)
    for file in files:
        layers = tuple((f"{layer.module} {layer.role}", layer.free_side) for layer in file.layout.layers)
        holders[layers].append(file.path)
    common = max(holders, key=lambda layers: len(holders[layers]), default=())
    widths, findings = dict(common), []
    for layers, paths in holders.items():
        found = dict(layers)
        others = f"{len(holders[common])} files" if len(holders[common]) > 1 else holders[common][0]
        where = f"{root / paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
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
        """Features float32[N, L or P, F], or the packed weights float32[N, sum of widths]; memory-mapped."""
        return np.load(self.path(name), mmap_mode="r")

    def path(self, name: str) -> Path:
        """Where the array of this name lies."""
        return self.folder / "features" / f"{name}-{self.suffix}.npy"


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
    code = store.code_digest(representations, lora_files, sys.modules[__name__])
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
        arrays = _allocate(collection, missing, scratch)
        fingerprint = _pass_over_weights(collection, arrays, device, progress)
        done = Extracted(fingerprint, cache / fingerprint, suffix)
        (done.folder / "features").mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            array.flush()
            os.replace(scratch / f"{name}.npy", done.path(name))
    if not all(done.path(name).exists() for name in names):  # other contents than those found before
        known.unlink()
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


def _allocate(collection: Collection, names: list[str], folder: Path) -> dict[str, np.memmap]:
    """An array on disk for each name."""
    arrays = {}
    for name in names:
        if name == WEIGHTS:
            shape: tuple[int, ...] = (len(collection.files), sum(collection.weights_per_layer))
        else:
            representation = REPRESENTATIONS[name]
            items = collection.layers if representation.kind == "matrix" else collection.modules
            shape = (len(collection.files), len(items), len(representation.feature_names))
        arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
    return arrays


def _pass_over_weights(collection: Collection, arrays: dict, device: torch.device, progress: Callable) -> str:
    """Read each file once, fill the arrays, and return the fingerprint of the contents."""
    matrix_names = [name for name in arrays if name != WEIGHTS and REPRESENTATIONS[name].kind == "matrix"]
    pair_names = [name for name in arrays if name != WEIGHTS and REPRESENTATIONS[name].kind == "pair"]
    fingerprint = hashlib.sha256()
    findings: list[str] = []
    per_chunk = max(1, CHUNK_NUMBERS // sum(collection.weights_per_layer))
    starts = range(0, len(collection.files), per_chunk)
    chunks = [range(start, min(start + per_chunk, len(collection.files))) for start in starts]
    for rows in progress(chunks, "features"):
        weights, scales = [], []
        for row in rows:
            file = collection.files[row]
            try:
                matrices, scale, contents = _read_file(collection.root / file.path, file)
            except (LoraFileError, OSError) as error:
                findings.append(f"{collection.root / file.path}: {error}")
                continue
            weights.append(matrices)
            scales.append(scale)
            fingerprint.update(store.digest([file.path, file.label, contents, str(file.adapter_config)]).encode())
        if findings:
            continue  # go on reading, to tell of every fault at once
        if WEIGHTS in arrays:
            for row, matrices in zip(rows, weights, strict=True):
                arrays[WEIGHTS][row] = torch.cat([matrix.flatten() for matrix in matrices]).numpy()
        _fill_matrix_features(matrix_names, arrays, rows, weights, device)
        _fill_pair_features(pair_names, arrays, rows, weights, scales, collection, device)
    if findings:
        raise CollectionError(findings)
    return fingerprint.hexdigest()[:16]


def _read_file(path: Path, file: LoraFile) -> tuple[list[torch.Tensor], dict[str, float], str]:
    """Matrices, scale of each module's update, and a digest of the contents; refuses what changed or is not finite."""
    data = path.read_bytes()
    if _stat(path) != file.stat:
        raise LoraFileError("changed since it was indexed. start again.")
    matrices, alphas = lora_files.load_matrices(data, file.layout)
    # The sum of magnitudes is finite only if all are; a float64 sum of float32 numbers cannot overflow.
    sums = [matrix.abs().sum(dtype=torch.float64) for matrix in matrices]
    bad = [layer.name for layer, total in zip(file.layout.layers, sums, strict=True) if not math.isfinite(total)]
    if bad:
        raise LoraFileError(f"NaN or infinity in {len(bad)} tensors, first in {bad[0]}. train again or leave it out.")
    scales = lora_files.update_scales(file.layout, alphas, file.adapter_config)
    return matrices, scales, hashlib.sha256(data).hexdigest()


def _fill_matrix_features(names: list[str], arrays: dict, rows: range, weights: list, device: torch.device) -> None:
    """Matrix-wise features of a chunk of files; all matrices of one shape, whatever file and layer, at once."""
    if not names:
        return
    places = defaultdict(list)
    for row, matrices in zip(rows, weights, strict=True):
        for layer, matrix in enumerate(matrices):
            places[tuple(matrix.shape)].append((row, layer, matrix))
    for group in places.values():
        row, layer, matrices = zip(*group, strict=True)
        features = matrix_features(torch.stack(matrices).to(device), names)
        for name in names:
            arrays[name][list(row), list(layer)] = features[name].cpu().numpy()


def _fill_pair_features(
    names: list, arrays: dict, rows: range, weights: list, scales: list, collection: Collection, device: torch.device
) -> None:
    """Pair-wise features of a chunk of files; all pairs of one shape, whatever file and module, at once."""
    if not names:
        return
    position = {(layer.module, layer.role): depth for depth, layer in enumerate(collection.layers)}
    places = defaultdict(list)
    for row, matrices, scale in zip(rows, weights, scales, strict=True):
        for pair, module in enumerate(collection.modules):
            down, up = (matrices[position[module, role]] for role in ("down", "up"))
            places[tuple(down.shape), tuple(up.shape)].append((row, pair, down, up, module, scale[module]))
    for group in places.values():
        row, pair, down, up, module, scale = zip(*group, strict=True)
        factors = (torch.stack(down).to(device), torch.stack(up).to(device))
        features = pair_features(*factors, module, torch.tensor(scale, device=device), names)
        for name in names:
            arrays[name][list(row), list(pair)] = features[name].cpu().numpy()


def layer_columns(collection: Collection) -> list[slice]:
    """The columns of each layer in the packed weights."""
    ends = np.cumsum([0, *collection.weights_per_layer]).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


# ----------------------------------------------------------------------------------------------------------------------
# python data.py inspect
# ----------------------------------------------------------------------------------------------------------------------


def inspection(collection: Collection) -> dict:
    """What ``inspect --json`` prints."""
    return {
        "num_samples": len(collection.files),
        "classes": collection.class_counts,
        "layers": [
            {"name": layer.name, "module": layer.module, "role": layer.role, "shape": list(layer.shape)}
            for layer in collection.layers
        ],
        "dtypes": dict(Counter(layer.dtype for file in collection.files for layer in file.layout.layers)),
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
