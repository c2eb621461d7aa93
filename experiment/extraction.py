"""The one pass over the weights: features and packed weights of a collection, in a cache named by its contents.

Each file is read once. The pass hashes the contents, refuses NaN and infinity, computes all hand-crafted features and
packs the flattened weights, in shards of consecutive files that are shared among a crew. What is finished is found
again: a killed pass goes on where it was, and nothing is computed twice for the same contents.

Shape letters: N LoRAs, L layers, P modules (pairs of a down and an up), F features, W weights of a LoRA.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import Collection, CollectionError, LoraFile
from experiment import store
from experiment.workers import Crew, Task
from loras import building, lora_files
from loras.labels import Finding
from loras.lora_files import Layout, LoraFileError, NotFiniteError, by_layout, file_stat
from representations import MEASURES, REPRESENTATIONS, matrix_features, pair_features

CHUNK_NUMBERS = 2**22  # weights worked on at once, 16 MiB
SHARD_NUMBERS = 2**24  # features and packed weights of files, held and then written together: 64 MiB
PASS_THREADS = 8  # threads at most, each with a shard in memory
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
            held.enter_context(building.made(cache))
            held.enter_context(building.locked(passed.folder.with_suffix(".lock"), _tell_of_waiting))
        missing = crew.agree(partial(passed.begin, names))
        shards = passed.shards if missing else []
        tasks = [
            Task(partial(passed.finished, rows, missing), partial(passed.run, rows, missing), here=True)
            for rows in shards
        ]
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
    told = [Finding((path,), reason).line(collection.root) for path, reason, _ in findings]
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
        code = store.code_digest(
            "representations", "loras/keys", "loras/lora_files", "experiment/extraction", "experiment/store"
        )
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
                building.write_atomically(self.known, building.canonical_json({"findings": findings}))
            self._remove()
            return {"findings": findings}
        contents = [line for document in documents for line in document["contents"]]
        fingerprint = store.digest(contents)
        # First the fingerprint: if killed among the renames, the next pass finds what is in its place and what is not.
        building.write_atomically(self.known, building.canonical_json({"fingerprint": fingerprint}))
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
            building.write_atomically(owner, mine.encode())

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
        building.write_atomically(self._document(rows), building.canonical_json(document))


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
    content = np.fromfile(path, np.uint8)
    if file_stat(path) != file.stat:
        raise LoraFileError("changed since it was indexed. Start again.")
    weights, alphas = lora_files.load_weights(content, file.header)
    lora_files.check_finite(weights, file.layout)
    scales = lora_files.update_scales(file.layout, alphas, file.adapter_config)
    return weights, scales, hashlib.sha256(content).hexdigest()


def _fill(
    arrays: dict, collection: Collection, rows: range, weights: list[np.ndarray], scales: list[dict], device
) -> None:
    """Compute or copy the rows of some consecutive files, into arrays of just these."""
    files = collection.files[rows.start : rows.stop]
    # Matrices [n, rows, cols] of each layer, with the n rows of the arrays that they are of.
    matrices: list[list[tuple[list[int], torch.Tensor]]] = [[] for _ in collection.layers]
    for members in by_layout(file.layout for file in files):
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
