"""Inputs: what classifiers read under a choice of layers, and what is learned from the weights for them.

Everything learned is fitted on train rows only.

Shape letters: N LoRAs, L layers, P pairs (modules of which both layers are there), F features, S input sources.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch

import autoencoders
from experiment import store
from experiment.arrays import FLAT, widths_of
from experiment.extraction import Extracted
from experiment.modules import Modules, whole_pairs
from experiment.networks import NETWORKS
from experiment.resident import Latest, Once, Raw
from experiment.samples import Samples
from experiment.settings import AUTOENCODER_PARAMETERS, STREAMS, Settings, memory_of
from experiment.units import Unit, Units
from representations import COMPUTED, FEATURES, RANKING, REPRESENTATIONS
from training.columns import Held, without_constant
from training.pca import PCA, num_components
from training.stacks import Split, Stored, filled, standardise, wait_for_stream

MEMORY_SHARE = 0.6  # of the device's memory that resident weights may take
DISK_SHARE = 0.5  # of the free space that they may take in a file
KEPT_SOURCES = {"cpu": 2, "cuda": STREAMS + 1}  # the latest ones: those of threads that share a GPU, and one more
SOURCES_SHARE = 0.2  # of the device's memory that those before the latest may take
PCA_COMPONENTS = 100


@dataclass(frozen=True)
class Source:
    """Inputs that classifiers read: a representation of all layers side by side, float32[1, N, F].

    ``each_layer``: instead of that, of each layer alone, float32[L, N, F], or of each pair alone, float32[P, N, F].
    ``fitted_to``: the layers that components were fitted to, by position; None for a representation that is the same
    whatever layers are kept.
    """

    name: str
    each_layer: bool = False
    fitted_to: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StoredRows:
    """Rows of the raw weights, and of their columns those in ``spans`` (first, end): what PCA asks of a matrix."""

    raw: Raw
    rows: np.ndarray
    spans: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), sum(end - first for first, end in self.spans)

    def split(self, length: int, dim: int = 0) -> Iterator[torch.Tensor]:
        """Yield blocks of rows float32[length, F], or of columns float32[N, length], on the device; or shorter."""
        if dim == 0:
            for start in range(0, len(self.rows), length):
                rows = self.rows[start : start + length]
                yield torch.cat([self._block(rows, first, end) for first, end in self.spans], dim=1)
            return
        for first, end in self.spans:
            for start in range(first, end, length):
                yield self._block(self.rows, start, min(start + length, end))

    def _block(self, rows: np.ndarray, first: int, end: int) -> torch.Tensor:
        return self.raw.read(rows, slice(first, end))


class Weights:
    """The layers that an experiment is about, and the weights of these among the packed ones.

    Args:
        samples: The LoRAs.
        selected: The layers, bool[L of the files].
        extracted: Features and packed weights.
        sketched: Whether a layer's weights are its sketch.

    Attributes:
        depths: Positions of the L layers among those of the files, int64[L].
        layers: The L layers.
        widths: Number of weights of each, int64[L].
    """

    def __init__(self, samples: Samples, selected: np.ndarray, extracted: Extracted, sketched: bool = False):
        self.extracted, self.sketched = extracted, sketched
        self.num_samples = samples.count
        self.weights_per_layer = np.array(widths_of(samples.packed_layout, sketched))
        self.depths = np.flatnonzero(selected)
        self.layers = [samples.layers[depth] for depth in self.depths]
        self.widths = self.weights_per_layer[self.depths]

    def without(self, removed: list[int]) -> np.ndarray:
        """Return the layers that are kept, bool[L], given the positions of those removed."""
        kept = np.ones(len(self.layers), bool)
        kept[removed] = False
        return kept

    def columns(self, kept: np.ndarray) -> np.ndarray:
        """Return where the weights of layers ``kept`` bool[L] lie among those of a file, int64[W]."""
        in_files = np.zeros(len(self.weights_per_layer), bool)
        in_files[self.depths[kept]] = True
        return np.flatnonzero(np.repeat(in_files, self.weights_per_layer))

    def spans(self, kept: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Return the same as `columns` as runs (first, end): as many as gaps leave, whatever the width."""
        ends = np.cumsum(self.weights_per_layer)[self.depths[kept]]
        firsts = ends - self.widths[kept]
        runs: list[tuple[int, int]] = []
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
            if runs and runs[-1][1] == first:
                first = runs.pop()[0]
            runs.append((first, end))
        return tuple(runs)

    def packed(self) -> store.Shards:
        """Return the packed weights of all layers of the files, or their sketches."""
        return self.extracted.weights(self.sketched)

    def columns_of(self, layer: int) -> slice:
        """Return where the weights of one layer lie among those of a file."""
        end = int(self.weights_per_layer[: self.depths[layer] + 1].sum())
        return slice(end - int(self.widths[layer]), end)


@dataclass(frozen=True, eq=False)
class Description:
    """All that inputs are opened from, small and picklable; the rest lies in the cache folder.

    Attributes:
        settings: Schedule of autoencoders, seed, kind of device.
        samples: The LoRAs.
        selected: The layers that the experiment is about, bool[L of the files].
        rows: Row indices of ``train``, ``validation`` and ``test``.
        extracted: Features and packed weights.
        units: Where what is learned lies.
        folder: Of the run, in which workers on CPUs share large arrays, mapped; None: each process holds its own.
    """

    settings: Settings
    samples: Samples
    selected: np.ndarray
    rows: dict[str, np.ndarray]
    extracted: Extracted
    units: Units
    folder: Path | None = None

    @cached_property
    def digest(self) -> str:
        """Digits that equal descriptions share."""
        how = [self.settings.autoencoder, self.settings.attention, self.settings.projection]
        what = [str(self.extracted.folder), self.extracted.activations, self.settings.sketch_flat]
        return store.digest([*what, self.units.common, [asdict(schedule) for schedule in how]])

    def open(self, device: torch.device) -> Inputs:
        """Return the inputs on a device: those of an experiment of this process, or the latest opened here."""
        key = self.digest, device
        with _opening:
            inputs = _in_use.get(key)
            if inputs is None:
                _latest.pop(device, None)  # memory, for the new ones
                inputs = _latest[device] = _in_use[key] = Inputs(self, device, in_worker=True)
            return inputs

    def forget(self, device: torch.device) -> None:
        """Give back what inputs of this process, of any description, hold on a device where no unit is at work."""
        with _opening:
            opened = list(_in_use.values())
        for inputs in opened:
            if inputs.device == device:
                inputs.forget()

    def shared(self, name: str) -> Path | None:
        """Return the file of an array that the workers of a machine share."""
        return self.folder and self.folder / f"{name}-{self.digest}.npy"


_opening = threading.Lock()
_in_use: WeakValueDictionary[tuple[str, torch.device], Inputs] = WeakValueDictionary()
_latest: dict[torch.device, Inputs] = {}


class Inputs:
    """The inputs of all classifiers of an experiment, from features and weights in the cache.

    Args:
        description: Of these inputs.
        device: Where they are read to.
        in_worker: Whether a worker reads them, on a CPU one unit after the other. It maps what workers share, and keeps
            one source in memory, not two.

    Threads share them, see `experiment.resident`.
    """

    def __init__(self, description: Description, device: torch.device, in_worker: bool = False):
        self.description, self.device = description, device
        self.samples, self.rows, self.extracted = description.samples, description.rows, description.extracted
        self.weights = Weights(self.samples, description.selected, self.extracted, description.settings.sketch_flat)
        self.depths, self.layers, self.widths = self.weights.depths, self.weights.layers, self.weights.widths
        self.pair_of_layer = self.samples.pair_of_layer[self.depths]
        self.pairs = whole_pairs(self.pair_of_layer)
        members = [np.flatnonzero(self.pair_of_layer == pair) for pair in self.pairs]
        self.members = np.array(members, int).reshape(-1, 2)  # positions of the two layers of each pair
        self.split = Split(*(torch.from_numpy(self.rows[part]) for part in ("train", "validation", "test"))).to(device)
        wait_for_stream(device)
        self.raw = Raw(self.weights.packed, device)
        self.learned = Learned(description, self.weights, self.split, self.raw)
        read_packed = None if self.weights.sketched else self.raw.read
        self.modules = Modules(description, self.pairs, device, mapped=in_worker, read_packed=read_packed)
        kept = 1 if in_worker and device.type == "cpu" else KEPT_SOURCES[device.type]
        self._sources = Latest(device, kept, SOURCES_SHARE * memory_of(device))
        self._flat_weights = Once(device)
        _in_use.setdefault((description.digest, device), self)

    # -- which columns are of which layers ----------------------------------------------------------------------------

    def whole_pairs(self, kept: np.ndarray) -> np.ndarray:
        """Return the pairs that have both layers among those kept, bool[..., L] -> bool[..., P]."""
        return kept[..., self.members].all(-1)

    def kept_units(self, name: str, kept: np.ndarray) -> np.ndarray:
        """Return the units of a representation of layers kept: those layers, or the whole pairs among them."""
        return self.whole_pairs(kept) if REPRESENTATIONS[name].unit == "pair" else kept

    def live(self, name: str, kept: np.ndarray) -> np.ndarray:
        """Return the inputs of a representation that are of layers kept, bool[..., L] -> bool[..., F].

        Those of a kernel, and of a network that reads whole modules, are the pairs. Of components all are, as they are
        fitted to the layers kept; their number depends on these, so ``kept`` is one choice of layers, bool[L].
        """
        if REPRESENTATIONS[name].made == "pca":
            return np.ones(num_components(PCA_COMPONENTS, len(self.rows["train"]), int(self.widths[kept].sum())), bool)
        return np.repeat(self.kept_units(name, kept), self._columns_per_unit(name), axis=-1)

    def _columns_per_unit(self, name: str) -> int | list[int]:
        made = REPRESENTATIONS[name].made
        if made in ("kernel", "trained"):
            return 1
        if made in COMPUTED:
            return len(REPRESENTATIONS[name].feature_names)
        if made == "flat":
            return self.widths.tolist()
        return [autoencoders.latent_width(name, width) for width in self.widths.tolist()]

    def sketches(self, name: str) -> bool:
        """Return whether a representation is made of sketches of the layers."""
        return self.weights.sketched and REPRESENTATIONS[name].made in FLAT

    def depends_on(self, name: str) -> dict:
        """Return what classifiers of a representation depend on beside their own key."""
        key = {"sketched": True} if self.sketches(name) else {}
        if REPRESENTATIONS[name].made == "response":
            key["activations"] = self.extracted.activations
        return key | (self.learned.key() if REPRESENTATIONS[name].made == "autoencoder" else {})

    def count_features(self, name: str, kept: np.ndarray) -> int:
        """Return how many numbers of each LoRA a representation consists of where the layers ``kept`` bool[L] are."""
        numbers = int(self.live(name, kept).sum())
        return numbers * len(REPRESENTATIONS[name].feature_names) if name in NETWORKS else numbers

    def count_layers(self, name: str, kept: np.ndarray) -> int:
        """Return how many of the layers kept a representation reads."""
        units = int(self.kept_units(name, kept).sum())
        return 2 * units if REPRESENTATIONS[name].unit == "pair" else units

    def describe(self, name: str, kept: np.ndarray) -> dict:
        """Return what results.json says of the inputs of a representation of layers kept."""
        counts = {"num_layers": self.count_layers(name, kept), "num_features": self.count_features(name, kept)}
        return counts | ({"sketched": True} if self.sketches(name) else {})

    def source(self, name: str, kept: np.ndarray) -> Source:
        """Return what classifiers of a representation read where the layers ``kept`` bool[L] are kept."""
        fitted = REPRESENTATIONS[name].made == "pca"  # components of what is left, not what is left of the components
        return Source(name, fitted_to=tuple(np.flatnonzero(kept).tolist()) if fitted else None)

    def fitting_units(self, name: str, conditions: list[list[int]]) -> list[Unit]:
        """Return the work that must be done before classifiers of a representation are trained; often none.

        Args:
            name: The representation.
            conditions: Lists of removed layers, under each of which components are fitted.
        """
        if name in NETWORKS:
            return self.modules.token_units() if NETWORKS[name].reads == "tokens" else []
        return self.learned.fitting_units(name, conditions)

    # -- reading ------------------------------------------------------------------------------------------------------

    def features(self, name: str) -> torch.Tensor:
        """Return cached features on the device, float32[N, L or P, F]."""
        units = self.pairs if FEATURES[name].unit == "pair" else self.depths
        return torch.from_numpy(self.extracted.load(name)[:, units]).to(self.device)

    def read(self, source: Source) -> torch.Tensor | Stored | Held:
        """Return what classifiers read, standardised, float32[S, N, F]; the latest sources are kept."""
        return self._sources.get(source, partial(self._read, source))

    def _read(self, source: Source) -> torch.Tensor | Stored | Held:
        made = REPRESENTATIONS[source.name].made
        if source.name in NETWORKS:
            return self.modules.read(NETWORKS[source.name].reads)
        if source.each_layer:
            return standardise(self.features(source.name).transpose(0, 1).contiguous(), self.split.train)  # (L, N, F)
        if made == "flat":
            return self._flat_weights.get(self._store_flat_weights)
        if made == "pca":
            x = torch.from_numpy(self.learned.scores(source.fitted_to))
        elif made == "autoencoder":
            x = torch.from_numpy(np.concatenate(self.learned.encoded(source.name), axis=1))
        else:
            x = self.features(source.name).flatten(1)
        return without_constant(standardise(x.to(self.device), self.split.train)[None])

    def forget(self) -> None:
        """Give back the device's memory of what was read, where no unit is at work; it is read again if asked for."""
        for part in (self._sources, self._flat_weights):
            part.clear()
        for part in (self.raw, self.modules):
            part.forget()

    def release(self) -> None:
        """Give back all memory, where no unit is at work."""
        self.forget()
        self.modules.release()
        _latest.clear()  # those of further GPUs

    def _store_flat_weights(self) -> Stored:
        """Return the weights, read only if a stack is to be trained; where they fit the memory, held as a whole.

        Where workers share a folder they are then held in a file, mapped, once for all of a machine. On a GPU they are
        held standardised beside the raw ones: to standardise each minibatch would move three times its numbers more.
        """
        raw, columns = self.raw, self.weights.columns(self.weights.without([]))
        shape = raw.shape[0], len(columns)
        read = raw.read if shape == raw.shape else partial(raw.read, columns=columns)
        size, path = 4 * math.prod(shape), self.description.shared("flat")
        fits = size < MEMORY_SHARE * memory_of(self.device)
        hold = partial(filled, device=self.device)
        if path is not None:
            hold = partial(_mapped, path)
            fits &= path.exists() or size < DISK_SHARE * shutil.disk_usage(path.parent).free
        return Stored(read, shape, self.split.train, hold=hold if fits else None)

    def prepare(self, source: Source) -> None:
        """Write what the workers of a machine share of a source, if it is large and not there."""
        if REPRESENTATIONS[source.name].made == "flat":
            self._flat_weights.get(self._store_flat_weights).ready()
        elif source.name in NETWORKS:
            self.modules.prepare(NETWORKS[source.name].reads)

    def ranking_source(self) -> Source:
        """Return what the classifiers of the ranking read: each layer alone."""
        return Source(RANKING, each_layer=True)


def _mapped(path: Path, shape: tuple[int, int], blocks: Callable[[], Iterator[torch.Tensor]]) -> torch.Tensor:
    """Return the blocks of a matrix in a mapped file, which is written where it is not there."""
    return torch.from_numpy(store.shared_rows(path, shape, lambda: (block.numpy() for block in blocks())))


class Learned:
    """Features that are learned from the weights, each fit a unit of work.

    Args:
        description: Of the inputs that they belong to.
        weights: Of the layers that the experiment is about.
        split: Rows of each part, on the device.
        raw: The weights, or their sketches.
    """

    def __init__(self, description: Description, weights: Weights, split: Split, raw: Raw):
        self.description, self.weights, self.split, self.raw = description, weights, split, raw
        self.rows, self.units, self.device = description.rows, description.units, split.train.device
        self.schedule, self.seed = description.settings.autoencoder, description.settings.seed

    def fitting_units(self, name: str, conditions: list[list[int]]) -> list[Unit]:
        """Return the work that fits a representation; none for one that is not learned.

        Args:
            name: The representation.
            conditions: Lists of removed layers, under each of which components are fitted.
        """
        if REPRESENTATIONS[name].made == "pca":
            return [self._pca_unit(self.weights.without(removed)) for removed in conditions]
        if REPRESENTATIONS[name].made == "autoencoder":
            fit = partial(_fit_autoencoders, name=name)
            return [
                self.units.unit(key, self.description, fit, stack, label)
                for key, stack, label in self.autoencoder_stacks(name)
            ]
        return []

    def scores(self, fitted_to: tuple[int, ...]) -> np.ndarray:
        """Return the scores float32[N, k] of components that were fitted to these layers."""
        return self.units.load(self._pca_key(fitted_to))["scores"]

    def _pca_key(self, fitted_to: tuple[int, ...]) -> dict:
        key = {"kind": "pca", "fitted to": fitted_to, "components": PCA_COMPONENTS}
        return key | ({"sketched": True} if self.weights.sketched else {})

    def _pca_unit(self, kept: np.ndarray) -> Unit:
        """Return the work of the scores float32[N, k] of layers ``kept`` bool[L]."""
        key = self._pca_key(tuple(np.flatnonzero(kept).tolist()))
        return self.units.unit(key, self.description, partial(_fit_pca, kept=kept), [0], "pca")

    def fit_pca(self, kept: np.ndarray) -> dict[str, np.ndarray]:
        """Return the ``scores`` float32[N, k] of components fitted to layers ``kept`` bool[L]."""
        spans = self.weights.spans(kept)
        train = StoredRows(self.raw, self.rows["train"], spans)
        rows = StoredRows(self.raw, np.arange(self.raw.shape[0]), spans)
        return {"scores": PCA(PCA_COMPONENTS).fit(train).transform(rows).cpu().numpy()}

    def autoencoder_stacks(self, name: str) -> list[tuple[dict, list[int], str]]:
        """Return the stacks of a representation: key, layers, and label; one autoencoder for each layer."""
        key = {"kind": "autoencoder", "name": name} | self.key()
        stacks: list[tuple[dict, list[int], str]] = []
        for width in np.unique(self.weights.widths).tolist():
            layers = np.flatnonzero(self.weights.widths == width).tolist()
            # A parameter is held five times: itself, its gradient, two moments, the best so far; a weight once.
            parameters = autoencoders.num_parameters(name, width, self.schedule.hidden)
            parameters += self.weights.num_samples * width // 5
            count = math.ceil(len(layers) * parameters / AUTOENCODER_PARAMETERS[self.device.type])
            at_once = math.ceil(len(layers) / min(count, len(layers)))  # stacks of about equal size
            for start in range(0, len(layers), at_once):
                stack = layers[start : start + at_once]
                stacks.append(({**key, "models": stack}, stack, f"fitting {name}, {width} weights a layer"))
        return stacks

    def key(self) -> dict:
        """Return what autoencoders depend on: their source and schedule."""
        return {
            "autoencoders": store.code_digest("autoencoders"),
            "fitted by": asdict(self.schedule),
            **({"sketched": True} if self.weights.sketched else {}),
        }

    def fit_autoencoders(self, name: str, layers: list[int]) -> dict[str, np.ndarray]:
        """Return the features of layers of one width, as `autoencoders.fit_transform` does."""
        x = torch.empty(len(layers), self.raw.shape[0], self.weights.widths[layers[0]], device=self.device)
        for m, layer in enumerate(layers):
            x[m] = standardise(self.raw.read(columns=self.weights.columns_of(layer)), self.split.train)
        return autoencoders.fit_transform(name, x, self.split, schedule=self.schedule, seed=self.seed)

    def encoded(self, name: str) -> list[np.ndarray]:
        """Return features float32[N, latent] of each layer from its finished autoencoder."""
        by_layer: dict[int, np.ndarray] = {}
        for key, layers, _ in self.autoencoder_stacks(name):
            by_layer |= zip(layers, self.units.load(key, ["features"])["features"], strict=True)
        return [by_layer[layer] for layer in range(len(by_layer))]


def _fit_autoencoders(inputs: Inputs, layers: list[int], name: str) -> dict[str, np.ndarray]:
    return inputs.learned.fit_autoencoders(name, layers)


def _fit_pca(inputs: Inputs, _: list[int], kept: np.ndarray) -> dict[str, np.ndarray]:
    return inputs.learned.fit_pca(kept)
