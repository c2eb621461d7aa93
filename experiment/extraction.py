"""The one pass over the weights: features and packed weights of a collection, in a cache named by its contents.

Each file is read once. The pass hashes the contents, refuses NaN and infinity, computes all hand-crafted features and
packs the flattened weights, in shards of consecutive files that threads share. What is finished is found again: a
killed pass goes on where it was, and nothing is computed twice for the same contents.

Shape letters: N LoRAs, L layers, P modules (pairs of a down and an up), F features, W weights of a LoRA.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data import Collection, CollectionError, LoraFile, check_classes, without
from experiment import store
from experiment.activations import Activations
from experiment.arrays import DIGESTS, SKETCHES, WEIGHTS, allocate, fill, row_of, sketched, sketching
from experiment.engine import Engine
from loras import building, lora_files
from loras.lora_files import LoraFileError, NotFiniteError, file_stat
from loras.notices import Finding
from loras.scales import update_scales
from representations import FEATURES, RANKING, UPDATES

if TYPE_CHECKING:  # scipy is imported where it is called, with scikit-learn
    from scipy.sparse import csr_matrix

CHUNK_NUMBERS = 2**22  # weights worked on at once, 16 MiB
CHUNKS_ON_GPU = 4  # of these at once, a whole shard: kernels on fewer numbers take longer to start than to run
SHARD_NUMBERS = 2**24  # features and packed weights of files, held and then written together: 64 MiB
PASS_THREADS = 8  # threads at most, each with a shard in memory
GPU_BYTES = 2**31  # that a thread may take on a GPU
PASS_BYTES = 24  # that a thread holds for each weight of a LoRA, where one makes a shard
CHECKED = (RANKING, UPDATES, DIGESTS)  # the arrays that a check of the collection looks at
CODE = (  # that decides what an array holds
    *("representations", "loras/headers", "loras/keys", "loras/layouts", "loras/lora_files"),
    *("loras/order", "loras/pairs", "loras/patterns", "loras/products", "loras/scales"),
    *("experiment/activations", "experiment/arrays", "experiment/extraction", "experiment/store"),
    *("training/exact", "training/numerics"),
)

# A check of a collection, given each of these arrays: what it returns is a JSON object, in which ``findings`` (path,
# reason, True) and ``faults`` (lines) are why the collection is refused.
Check = Callable[[Collection, Callable[[str], store.Shards]], dict]


@dataclass(frozen=True)
class Extracted:
    """Features and packed weights of a collection, in a cache folder named by the fingerprint of its contents.

    ``checked`` is what a check of the collection has returned; None without one. ``activations`` is the digest of the
    inputs that were given.
    """

    fingerprint: str
    folder: Path
    suffix: str
    checked: dict | None = None
    activations: str | None = None

    def load(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Return features of all LoRAs, or of these rows, float32[N or n, L or P, F]."""
        shards = self.shards(name)
        return shards.whole() if rows is None else shards.read(rows)

    def weights(self, sketched: bool = False) -> store.Shards:
        """Return the packed weights, float32[N, W], which no memory need hold whole, or their sketches.

        Their columns are those of `Collection.packed_layout`, or as many for each layer as `widths_of` says.
        """
        return self.shards(SKETCHES if sketched else WEIGHTS)

    def shards(self, name: str) -> store.Shards:
        """Return the array of a name.

        Raises:
            DamagedError: It is not what was written, as far as can be seen without reading it.
        """
        return store.Shards(self.path(name), self.place(name))

    def place(self, name: str) -> str:
        """Return what the array of a name is, wherever the cache lies: of which contents, and computed by what."""
        return f"{self.fingerprint}/{labelled(name, self.activations)}-{self.suffix}"

    def factor_reader(
        self, collection: Collection, read_packed: Callable[..., np.ndarray | torch.Tensor] | None = None
    ) -> Callable[[int, np.ndarray | None], tuple[torch.Tensor, ...]]:
        """Return a reader of updates: from a module's position and row indices int64[n] (None: all) to their factors.

        These are down float32[n, r, in], up float32[n, out, r] and scale float32[n]. Where ranks differ, r is the
        largest, and missing rows and columns are 0. ``WEIGHTS`` and ``UPDATES`` are to have been extracted.

        Args:
            collection: The LoRAs.
            read_packed: Reads the packed weights, as `Shards.read` does; what it returns is not written to. None: from
                where they are stored.
        """
        scales, layout = self.load(UPDATES)[..., 2].copy(), collection.packed_layout
        read_packed = read_packed or self.weights().read
        shapes, columns = [layer.shape for layer in layout.layers], layout.columns

        def read(module: int, rows: np.ndarray | None = None) -> tuple[torch.Tensor, ...]:
            pair = 2 * module, 2 * module + 1  # in the network's order a module's up follows its down
            flat = (torch.as_tensor(read_packed(rows, columns[layer])) for layer in pair)
            down, up = (x.unflatten(1, shapes[layer]) for x, layer in zip(flat, pair, strict=True))
            return down, up, torch.from_numpy(scales[slice(None) if rows is None else rows, module])

        return read

    def path(self, name: str) -> Path:
        """Return the folder in which the shards of this name lie."""
        return self.folder / "features" / f"{labelled(name, self.activations)}-{self.suffix}"


def labelled(name: str, activations: str | None) -> str:
    """Return the name of an array in the cache: of what reads inputs of modules with the digest of these."""
    return f"{name}-{activations}" if name in FEATURES and FEATURES[name].made == "response" else name


def extract(
    collection: Collection,
    names: Iterable[str],
    cache: Path,
    device: torch.device,
    engine: Engine | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    skip_bad: bool = False,
    check: Check | None = None,
    memory: int = 2**33,
    thorough: bool = False,
    activations: Activations | None = None,
) -> Extracted:
    """Compute, or find in the cache, the named arrays of a collection; what is damaged there is computed again.

    Threads share its shards; one that is finished is not read again by a pass that continues a killed one.

    Args:
        collection: What to read.
        names: Computed representations and measures, ``WEIGHTS`` and ``SKETCHES``.
        cache: Folder that holds a folder for each fingerprint.
        device: Where features are computed.
        engine: Has the threads that compute; None: one.
        progress: Called with the stage, how many shards are finished, and of how many.
        skip_bad: Whether the caller goes on without files whose weights are not finite: they are remembered, and the
            arrays of the others kept. Else nothing is left of a collection that is refused.
        check: Done before anything is left of the pass; names are then to have all that are ``CHECKED``.
        memory: Bytes that the threads may take together, where LoRAs are so large that fewer of them are at work then.
        thorough: Whether every array is compared with its digest, which takes as long as reading it; else those that
            the check looks at.
        activations: Inputs of modules, where a representation reads them.

    Raises:
        CollectionError: Weights are NaN or infinite, files have changed since they were indexed, or the check refuses.
    """
    engine, names = engine or Engine([device]), list(names)
    weight_pass = _Pass(collection, cache, device, skip_bad, check, activations)
    weight_pass.doubted = set(names) if thorough else set(CHECKED) if check else set()
    if bad := weight_pass.read_known().get("findings", []):
        raise _bad_weights(collection, bad)
    outcome = weight_pass.known_outcome(names) or _read(weight_pass, names, engine, progress, memory)
    if "findings" in outcome:
        raise _bad_weights(collection, outcome["findings"])
    if "faults" in outcome:
        raise CollectionError(outcome["faults"])
    # The contents may be others than when the rest was computed, though no file's state said so.
    if outcome["missing"] or (check and outcome["checked"] is None):
        how = engine, progress, skip_bad, check, memory, thorough, activations
        return extract(collection, names, cache, device, *how)
    return replace(weight_pass.extracted(outcome["fingerprint"]), checked=outcome["checked"])


def _read(
    weight_pass: _Pass, names: list[str], engine: Engine, progress: Callable[[str, int, int], None], memory: int
) -> dict:
    """Read the weights, shards shared among threads; return what `_Pass.end` does."""
    with (
        building.made(weight_pass.cache),
        building.locked(weight_pass.folder.with_suffix(".lock"), _say_waiting),
    ):
        missing = weight_pass.begin(names)
        shards = weight_pass.shards if missing else []
        unread = [rows for rows in shards if not weight_pass.finished(rows, missing)]
        if unread and SKETCHES in missing:  # before threads begin, that it is done once
            layers = weight_pass.collection.packed_layout.layers
            for done, layer in enumerate(layers, 1):
                weight_pass.projections.append(sketching(layer))
                progress("projections of sketches", done, len(layers))
        threads = min(engine.threads, PASS_THREADS)
        if weight_pass.device.type == "cuda":  # which waits for them
            total = torch.cuda.get_device_properties(weight_pass.device).total_memory
            threads = min(PASS_THREADS, total // GPU_BYTES)
        held = PASS_BYTES * weight_pass.collection.packed_layout.width
        threads = max(1, min(threads, memory // held))
        for done, _ in enumerate(engine.map(partial(weight_pass.run, names=missing), unread, threads), 1):
            progress("features", len(shards) - len(unread) + done, len(shards))
        return weight_pass.end(names, missing)


def layer_sizes(statistics: store.Shards) -> np.ndarray:
    """Return the root mean square of the weights of each layer, float64[N, L], from the features of the ranking."""
    moments = _columns(statistics, RANKING, ("mean", "std"))
    return np.sqrt(np.square(moments.astype(np.float64)).sum(2))


def update_norms(measures: store.Shards) -> np.ndarray:
    """Return the Frobenius norm of each update, float32[N, P]."""
    return _columns(measures, UPDATES, ("norm",))[..., 0]


def _columns(shards: store.Shards, name: str, features: tuple[str, ...]) -> np.ndarray:
    """Return some features of all LoRAs, float32[N, L or P, len(features)]; the others stay on disk."""
    columns = [FEATURES[name].feature_names.index(feature) for feature in features]
    return np.concatenate([block[:, :, columns] for block in shards.blocks()])


def _bad_weights(collection: Collection, findings: list) -> CollectionError:
    """Return the error of findings: path, reason, and whether the file itself is at fault and not its reading."""
    messages = [Finding((path,), reason).line(collection.root) for path, reason, _ in findings]
    files = [(path, reason) for path, reason, _ in findings] if _all_at_fault(findings) else []
    return CollectionError(messages, files)


def _all_at_fault(findings: list) -> bool:
    return all(at_fault for *_, at_fault in findings)


def _say_waiting(holder: str) -> None:
    print(f"waiting for {holder}, which reads the same collection", flush=True)


def _outcome(fingerprint: str, checked: dict | None) -> dict:
    """Return the outcome of a pass that misses nothing, or why its check refuses the collection."""
    refused = {key: checked[key] for key in ("findings", "faults") if checked and checked.get(key)}
    return refused or {"fingerprint": fingerprint, "missing": [], "checked": checked}


class _Pass:
    """One pass over the weights of a collection, in shards of consecutive files.

    Shards lie in ``passes/<collection>/`` of the cache until all are finished: arrays by name, and a document for each
    shard with the digests of its files, from which the fingerprint is made, and of its arrays. Then each name's folder
    is renamed into the folder of the fingerprint.

    Attributes:
        doubted: Names of arrays that count as missing unless they have their digests.
    """

    def __init__(
        self,
        collection: Collection,
        cache: Path,
        device: torch.device,
        skip_bad: bool = False,
        check: Check | None = None,
        activations: Activations | None = None,
    ):
        self.collection, self.cache, self.device = collection, cache, device
        self.skip_bad, self.check, self.activations = skip_bad, check, activations
        self.doubted: set[str] = set()
        self.projections: list[csr_matrix | None] = []  # of each layer, where it is to be sketched
        self.identity = identity(collection)
        self.folder = cache / "passes" / store.digest(str(collection.root.resolve()))
        self._owner = self.folder / "owner.json"
        code = store.code_digest(*CODE)
        self.suffix = f"{store.digest([code, torch.__version__])[:8]}-{device.type}"
        count = len(collection.files)
        per_shard = min(count, max(1, SHARD_NUMBERS // _numbers_of_a_lora(collection)))
        self.shards = [range(first, min(first + per_shard, count)) for first in range(0, count, per_shard)]

    def extracted(self, fingerprint: str) -> Extracted:
        """Return where arrays of these contents lie, finished or not."""
        activations = self.activations and self.activations.digest
        return Extracted(fingerprint, self.cache / fingerprint, self.suffix, activations=activations)

    @property
    def known(self) -> Path:
        """The file that holds the fingerprint of unchanged files."""
        return self.cache / "collections" / f"{self.identity}-{self.suffix}.json"

    def read_known(self) -> dict:
        """Return ``fingerprint`` or ``findings`` of these very files, if they have been read before; else empty."""
        return _read_document(self.known, self.known.name) or {}

    def known_fingerprint(self) -> str | None:
        """Return the fingerprint, if these very files have been read before."""
        return self.read_known().get("fingerprint")

    # -- before and after the shards are read -------------------------------------------------------------------------

    def missing(self, names: list[str]) -> list[str]:
        """Return the names whose arrays are still to be computed; those that were damaged are thrown away."""
        fingerprint = self.known_fingerprint()
        return [name for name in names if not (fingerprint and _is_whole(self, self.extracted(fingerprint), name))]

    def known_outcome(self, names: list[str]) -> dict | None:
        """Return the outcome, as `end` does, where nothing is `missing`; else None."""
        if self.missing(names):
            return None
        done = self.extracted(self.known_fingerprint())
        return _outcome(done.fingerprint, self.check and self.check(self.collection, done.shards))

    def begin(self, names: list[str]) -> list[str]:
        """Return what is `missing`; make ready for it."""
        names = self.missing(names)
        if names:
            self._clear_unless_mine()
        return names

    def end(self, names: list[str], computed: list[str]) -> dict:
        """Put the arrays in their places, with ``skip_bad`` those of files whose weights are finite as if read alone.

        Returns:
            ``fingerprint``, what is ``missing``, and what has been ``checked``, None where that is still to be done; or
            ``findings`` or ``faults``, for which the collection is refused.
        """
        if not computed:
            return self.known_outcome(names)
        documents = [self._read(rows) for rows in self.shards]
        if None in documents:
            raise OSError(f"{self.folder}: a shard's document was removed meanwhile")
        findings = [finding for document in documents for finding in document["findings"]]
        contents = [line for document in documents for line in document["contents"]]
        if findings and not (self.skip_bad and _all_at_fault(findings)):
            self._remove()
            return {"findings": findings}
        checked = None
        if self.check and not findings and set(CHECKED) <= set(computed):
            checked = self.check(self.collection, partial(_unplaced, self, documents))
        outcome = _outcome(store.digest(contents), checked)
        if "faults" in outcome or ("findings" in outcome and not self.skip_bad):
            self._remove()
            return outcome
        try:
            good = _without(self, findings) if findings else self
            if "findings" in outcome:  # they are of labels and flags: the arrays are put in place with theirs
                _without(self, outcome["findings"])
        except CollectionError:  # those that are left will be refused: nothing is kept for them
            self._remove()
            return {"findings": findings or outcome["findings"]}
        # Weights are padded to the largest rank, which may have been that of a bad file: they are then read again.
        same = [layer.shape for layer in good.collection.packed_layout.layers] == [
            layer.shape for layer in self.collection.packed_layout.layers
        ]
        _put_in_place([name for name in computed if same or name != WEIGHTS], documents, contents, self, good)
        if findings:
            store.write_document(self.known, {"findings": findings}, self.known.name)
        self._remove()
        if findings:
            return {"findings": findings}
        return outcome if "findings" in outcome else outcome | {"missing": self.missing(names)}

    def _clear_unless_mine(self) -> None:
        """Remove what a killed pass over other files of this folder, or another version of it, has left."""
        if not self._is_mine():
            self._remove()
            store.write_document(self._owner, {}, self.known.name)

    def _is_mine(self) -> bool:
        with suppress(store.DamagedError, IsADirectoryError):
            return store.read_document(self._owner, self.known.name) is not None
        return False

    def _remove(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)

    # -- a shard ------------------------------------------------------------------------------------------------------

    def arrays(self, name: str) -> Path:
        """Return the folder in which the shards of this name lie until all are finished."""
        return self.folder / labelled(name, self.activations and self.activations.digest)

    def _document(self, rows: range) -> Path:
        return self.folder / f"{rows.start:08}.json"

    def _read(self, rows: range) -> dict | None:
        """Return the document of a shard."""
        return _read_document(self._document(rows), f"{self.identity} {self.suffix} {rows.start}")

    def finished(self, rows: range, names: list[str]) -> bool:
        """Return whether a shard needs no work: its arrays are written, or what is wrong with its files."""
        document = self._read(rows)
        if not document:
            return False
        if document["findings"] and (not self.skip_bad or not document["contents"]):
            return True
        paths = {name: store.shard_path(self.arrays(name), rows.start) for name in names}
        return all(store.has_digest(path, document["arrays"].get(name)) for name, path in paths.items())

    def run(self, rows: range, names: list[str], device: torch.device) -> None:
        """Read each file of a shard once; write its arrays, without rows of bad files, and then its document."""
        digests: dict[str, str] = {}
        arrays = allocate(self.collection, names, len(rows))
        contents: list[str] = []
        findings: list[tuple[str, str, bool]] = []
        per_chunk = _files_at_once(self.collection, device)
        for start in range(rows.start, rows.stop, per_chunk):
            files, weights, scales = [], [], []
            first = len(contents)
            for file in self.collection.files[start : min(start + per_chunk, rows.stop)]:
                try:
                    flat, scale, digest = read_file(self.collection.root, file)
                except (LoraFileError, OSError) as error:
                    findings.append((file.path, str(error), isinstance(error, NotFiniteError)))
                    continue
                files.append(file)
                weights.append(flat)
                scales.append(scale)
                kept = self.collection.kept_modules  # of some layers the features are others
                contents.append(store.digest([file.path, digest, str(file.adapter_config), *kept]))
                if DIGESTS in arrays:
                    arrays[DIGESTS][len(contents) - 1] = np.frombuffer(bytes.fromhex(digest), np.uint8)
            if files and (self.skip_bad or not findings):  # else go on reading, to report every fault at once
                part = {name: array[first : len(contents)] for name, array in arrays.items()}
                inputs = self.activations and self.activations.inputs
                fill(part, self.collection, files, weights, scales, device, inputs)
                if SKETCHES in part:  # of files of one layout: where ranks differ nothing reads sketches
                    part[SKETCHES][:] = sketched(np.stack(weights), files[0].layout, self.projections)
        if contents and (self.skip_bad or not findings):
            for name, array in arrays.items():
                path = store.shard_path(self.arrays(name), rows.start)
                digests[name] = store.save_array(path, array[: len(contents)])
        document = {"contents": contents, "findings": findings, "arrays": digests}
        store.write_document(self._document(rows), document, f"{self.identity} {self.suffix} {rows.start}")


def _files_at_once(collection: Collection, device: torch.device) -> int:
    """Return how many files of a shard to work on at a time."""
    numbers = CHUNK_NUMBERS * (CHUNKS_ON_GPU if device.type == "cuda" else 1)
    return max(1, numbers // max(file.layout.width for file in collection.files))


def _is_whole(weight_pass: _Pass, extracted: Extracted, name: str) -> bool:
    """Return whether an array of these files is there; what else is there is thrown away."""
    if not extracted.path(name).exists():
        return False
    collection = weight_pass.collection
    try:
        shards, (dtype, shape) = extracted.shards(name), row_of(collection, name)
        if (shards.dtype, shards.shape) != (dtype, (len(collection.files), *shape)):
            raise store.DamagedError(f"{extracted.path(name)} is of {shards.dtype} {shards.shape}")
        if name in weight_pass.doubted:
            shards.check()
    except (store.DamagedError, FileNotFoundError) as error:
        store.throw_away(extracted.path(name), error)
        return False
    return True


def _put_in_place(names: list[str], documents: list[dict], contents: list[str], read_by: _Pass, good: _Pass) -> None:
    """Rename arrays from where a pass has written them to the folder of their fingerprint.

    Args:
        names: Of the arrays.
        documents: Of the shards.
        contents: Of the files that are kept.
        read_by: The pass.
        good: The same, or that over the files that are kept.
    """
    fingerprint = store.digest(contents)
    # First the fingerprint: if killed among the renames, the next pass finds what is in its place and what is not.
    store.write_document(good.known, {"fingerprint": fingerprint}, good.known.name)
    done = good.extracted(fingerprint)
    (done.folder / "features").mkdir(parents=True, exist_ok=True)
    for name in names:
        if done.path(name).exists():  # files of the same contents were read from elsewhere
            continue
        if good is read_by:
            _describe(good, read_by.arrays(name), done, name, documents)
            read_by.arrays(name).rename(done.path(name))
            continue
        kept, first = read_by.folder / "kept" / name, 0  # where no shard can be taken for one of other rows
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for rows, document in zip(read_by.shards, documents, strict=True):
            if document["contents"]:  # rows left out shift those behind them
                store.shard_path(read_by.arrays(name), rows.start).rename(store.shard_path(kept, first))
                first += len(document["contents"])
        _describe(good, kept, done, name, documents)
        kept.rename(done.path(name))


def _describe(weight_pass: _Pass, folder: Path, target: Extracted, name: str, documents: list[dict]) -> None:
    """Write beside the shards of a name, which are to be renamed, what they are."""
    shards = [[len(document["contents"]), document["arrays"][name]] for document in documents if document["contents"]]
    store.describe_shards(folder, target.place(name), row_of(weight_pass.collection, name), shards)


def _unplaced(weight_pass: _Pass, documents: list[dict], name: str) -> store.Shards:
    """Return an array before it is put in its place."""
    target = weight_pass.extracted(store.digest([line for document in documents for line in document["contents"]]))
    _describe(weight_pass, weight_pass.arrays(name), target, name, documents)
    return store.Shards(weight_pass.arrays(name), target.place(name))


def _without(weight_pass: _Pass, findings: list) -> _Pass:
    """Return the pass over the files of which nothing was found.

    Raises:
        CollectionError: These make no classification task.
    """
    rest = without(weight_pass.collection, [finding[:2] for finding in findings])
    check_classes(rest)
    return _Pass(rest, weight_pass.cache, weight_pass.device, activations=weight_pass.activations)


def bytes_to_pack(collection: Collection, cache: Path, device: torch.device) -> int:
    """Return how many bytes of packed weights are still to be written into a cache, which a killed pass has begun."""
    weight_pass = _Pass(collection, cache, device)
    if not weight_pass.missing([WEIGHTS]):
        return 0
    written = sum(path.stat().st_size for path in weight_pass.folder.glob(f"{WEIGHTS}/*.npy"))
    return max(0, 4 * len(collection.files) * collection.packed_layout.width - written)


def _numbers_of_a_lora(collection: Collection) -> int:
    """Return how many weights and features a shard holds of one LoRA at most, whatever is asked for.

    What reads inputs of modules does not count, few as it is: shards are the same with --activations and without.
    """
    units = {"layer": len(collection.layers), "pair": len(collection.modules)}
    features = sum(len(row.feature_names) * units[row.unit] for row in FEATURES.values() if row.made != "response")
    return features + collection.packed_layout.width


def identity(collection: Collection) -> str:
    """Return a digest of the files as the file system tells them apart; a cache is trusted on this."""
    return store.digest(
        [str(collection.root.resolve()), *collection.kept_modules]
        + [[file.path, *file.stat, str(file.adapter_config)] for file in collection.files]
    )


def _read_document(path: Path, about: str) -> dict | None:
    """Return a document of the cache; one that was damaged is thrown away."""
    try:
        return store.read_document(path, about)
    except store.DamagedError as error:
        store.throw_away(path, error)
        return None


def read_file(root: Path, file: LoraFile) -> tuple[np.ndarray, dict[str, float], str]:
    """Return weights float32[W], the scale of each module's update, and a digest of the contents.

    Raises:
        LoraFileError: The file has changed since it was indexed, or its weights are not finite.
    """
    path = root / file.path
    weights, alphas, digest = lora_files.read_weights(path, file.header)
    if file_stat(path) != file.stat:
        raise LoraFileError("changed since it was indexed. Start again.")
    lora_files.check_finite(weights, file.layout)
    return weights, update_scales(file.header, alphas, file.adapter_config), digest
