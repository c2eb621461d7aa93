"""Kernels of the updates of whole modules, tokens and factors, for classifiers that read modules.

A module counts where both its layers are among those of the experiment. Everything fitted is fitted on train rows only.

Shape letters: N LoRAs, P modules, r rank, W numbers of all factors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import torch

from data import Collection
from experiment import networks, store
from experiment.networks import Module
from experiment.resident import Once
from experiment.samples import Samples
from experiment.units import Unit
from representations import FEATURES, UPDATES
from training.attention import EXACT, LANDMARKS, TOKEN, module_tokens
from training.kernels import Limits, UpdateKernels, Updates

if TYPE_CHECKING:
    from experiment.inputs import Description, Inputs

UNLABELLED = "update_views"  # the kernel whose components tokens are
MODULES_IN_UNIT = 4  # whose tokens one unit of work holds


class Modules:
    """The whole modules of an experiment.

    Args:
        description: Of the inputs that they belong to.
        pairs: Positions of the P modules among those of the files, int64[P].
        device: Where they are computed.
        mapped: Whether what workers share is mapped, as workers do, or read.
        read_packed: Reads the packed weights, see `Extracted.factor_reader`.

    Threads share them, see `experiment.resident`.
    """

    def __init__(
        self,
        description: Description,
        pairs: np.ndarray,
        device: torch.device,
        mapped: bool = False,
        read_packed: Callable[..., np.ndarray | torch.Tensor] | None = None,
    ):
        self.description, self.pairs, self.device = description, pairs.tolist(), device
        self.mapped, self.read_packed = mapped, read_packed
        self.samples, self.rows = description.samples, description.rows
        self.extracted, self.units, self.seed = description.extracted, description.units, description.settings.seed
        self._kernels: dict[str, UpdateKernels] = {}
        self._read = {what: Once(device) for what in ("tokens", "factors")}
        self._lock = threading.Lock()

    @property
    def shapes(self) -> list[Module]:
        """Name and sides of each module, in the network's order."""
        return module_shapes(self.samples, self.pairs)

    def kernels(self, name: str) -> UpdateKernels:
        """Return the kernels that classifiers of a representation read; nothing is read before the first is asked for.

        Where there are several views of a module, labels of train rows weight them.
        """
        with self._lock:
            if name not in self._kernels:
                self._kernels[name] = self.kernels_of(name, self.samples.y[self.rows["train"]], Limits())
            return self._kernels[name]

    @cached_property
    def unlabelled(self) -> UpdateKernels:
        """Kernels that know no labels, for tokens and pictures; none is kept in memory."""
        return self.kernels_of(UNLABELLED, None, Limits(kept=0, exact=EXACT, landmarks=LANDMARKS))

    def kernels_of(self, name: str, labels: np.ndarray | None, limits: Limits) -> UpdateKernels:
        """Return kernels of a representation within limits, their views weighted by labels of train rows, if any."""
        pairs = self.pairs
        read = self.extracted.factor_reader(self.samples, self.read_packed)  # no reference to this object
        return UpdateKernels(
            lambda p, rows: read(pairs[p], rows),
            len(pairs),
            self.rows["train"],
            self.samples.count,
            kind=name,
            labels=labels,
            seed=self.seed,
            device=self.device,
            limits=limits,
        )

    def read(self, what: str) -> torch.Tensor:
        """Return "tokens" or "factors", which are held for all networks that read them."""
        return self._read[what].get(partial(self._open, what))

    def prepare(self, what: str) -> None:
        """Write what the workers of a machine share, if it is not there; it is mapped to see that, and not kept."""
        with self._lock:
            self._shared(what, mapped=True)

    def _shared(self, what: str, mapped: bool) -> np.ndarray:
        numbers = {"tokens": TOKEN * len(self.pairs), "factors": sum(module.numbers for module in self.shapes)}
        shape, path = (1, self.samples.count, numbers[what]), self.description.shared(what)
        return store.shared_rows(path, shape, lambda: [self._make(what).numpy()], mapped)

    def _open(self, what: str) -> torch.Tensor:
        if self.description.shared(what) is None:
            return self._make(what)
        return torch.from_numpy(self._shared(what, self.mapped))  # in a file, once for all workers of a machine

    def _make(self, what: str) -> torch.Tensor:
        return self.tokens() if what == "tokens" else self.factors()

    def forget(self) -> None:
        """Give back the memory of tokens and factors, where no unit is at work; they are made again."""
        for once in self._read.values():
            once.clear()

    def release(self) -> None:
        """Give back the memory of kernels, likewise."""
        with self._lock:
            self._kernels.clear()
            self.__dict__.pop("unlabelled", None)  # a cached property

    # -- tokens -------------------------------------------------------------------------------------------------------

    def token_units(self) -> list[Unit]:
        """Return the work that computes tokens."""
        return [
            self.units.unit(key, self.description, _compute_tokens, key["models"], "tokens of modules")
            for key in self._token_keys()
        ]

    def tokens(self) -> torch.Tensor:
        """Return finished tokens of all modules side by side, float32[1, N, P · 33]."""
        tokens = torch.empty(1, self.samples.count, len(self.pairs), TOKEN, device=self.device)
        for key in self._token_keys():
            of_modules = torch.from_numpy(self.units.load(key, ["tokens"])["tokens"])  # (m, N, 33)
            tokens[0, :, key["models"]] = of_modules.transpose(0, 1).to(self.device)
        return tokens.flatten(2)

    def _token_keys(self) -> list[dict]:
        positions = list(range(len(self.pairs)))
        parts = [positions[start : start + MODULES_IN_UNIT] for start in range(0, len(positions), MODULES_IN_UNIT)]
        return [
            {"kind": "tokens", "of": UNLABELLED, "sklearn": version("scikit-learn"), "models": part} for part in parts
        ]

    def compute_tokens(self, modules: list[int]) -> dict[str, np.ndarray]:
        """Return the ``tokens`` float32[m, N, 33] of modules."""
        kernels, train = self.unlabelled, self.rows["train"]
        norms = self.extracted.load(UPDATES)[..., FEATURES[UPDATES].feature_names.index("norm")]
        tokens = [module_tokens(kernels.module(p), train, kernels.columns, norms[:, self.pairs[p]]) for p in modules]
        return {"tokens": np.stack(tokens)}

    # -- factors ------------------------------------------------------------------------------------------------------

    def factors(self) -> torch.Tensor:
        """Return the factors of all updates, each of norm 1: float32[1, N, W], of each module down, then up.

        What is told of a module does not depend on how its update is factorised, nor on its size; zero updates are 0.
        """
        read = self.extracted.factor_reader(self.samples, self.read_packed)
        width = sum(module.numbers for module in self.shapes)
        factors = torch.zeros(self.samples.count, width, device=self.device)
        end = 0
        for pair in self.pairs:
            updates = Updates.from_factors(*(x.to(self.device) for x in read(pair, None)))
            for factor in (updates.down, updates.up):
                start, end = end, end + factor[0].numel()
                factors[:, start:end] = factor.flatten(1)
        return factors[None]


def _compute_tokens(inputs: Inputs, modules: list[int]) -> dict[str, np.ndarray]:
    return inputs.modules.compute_tokens(modules)


def left_by_default(collection: Collection, selected: np.ndarray, device: torch.device) -> dict[str, str]:
    """Return the networks that are not trained unless their names are asked for, and why.

    Args:
        collection: The LoRAs.
        selected: The layers that the experiment is about, bool[L of the files].
        device: Where they would be trained.
    """
    modules = module_shapes(collection, whole_pairs(collection.pair_of_layer[selected]).tolist())
    return networks.left_by_default(modules, len(collection.files), device)


def whole_pairs(pair_of_layer: np.ndarray) -> np.ndarray:
    """Return the pairs of which both layers are there, given the pair of each layer: int64[L] -> int64[P]."""
    return np.flatnonzero(np.bincount(pair_of_layer) == 2)


def module_shapes(collection: Collection | Samples, pairs: list[int]) -> list[Module]:
    """Return name and sides of modules, given their positions among those of the files.

    Orthonormal rows of a down are at most as many as it is wide, so that the rank is the lesser of the two.
    """
    layers = collection.packed_layout.layers  # in the network's order a module's up follows its down
    modules = []
    for pair in pairs:
        down, up = layers[2 * pair], layers[2 * pair + 1]
        modules.append(Module(down.module, min(down.shape), down.shape[1], up.shape[0]))
    return modules
