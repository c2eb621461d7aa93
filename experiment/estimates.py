"""Estimates, before anything is trained: parameters, memory and time of each representation, and what cannot fit.

Memory and parameters follow from shapes alone. Time is operations over the speed of one core or GPU, which a product
and a copy of a moment show, on a GPU also the kernels of all steps; how many epochs a network takes is a guess, so
times are about right and decide nothing.

Shape letters: N LoRAs, F inputs of a classifier, W weights of a LoRA.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import autoencoders
from data import Collection
from experiment.arrays import FLAT, widths_of
from experiment.extraction import PASS_BYTES, SHARD_NUMBERS, bytes_to_pack
from experiment.inputs import PCA_COMPONENTS
from experiment.modules import module_shapes, whole_pairs
from experiment.networks import NETWORKS
from experiment.settings import AUTOENCODER_PARAMETERS, RUNS_IN_STACK, STACK_PARAMETERS, Settings, memory_of, nearest_of
from representations import COMPUTED, RANKING, REPRESENTATIONS
from training.kernels import KERNELS, Limits
from training.pca import GRAM_SIDE, NUMBERS_AT_ONCE, num_components
from training.stacks import Schedule, wait_for_stream

PASS_SHARE = 0.5  # of memory, that the pass over the weights may take
SHARE = 0.8  # of memory, and of free space on disk, that may be taken
# Parameters of one representation's autoencoders that a CPU trains unless told to: above, hours.
AUTOENCODER_LIMIT = 2**31
UNIT_SECONDS = 0.04  # that a unit takes however small it is: it is laid out, its few epochs are stepped, it is written
START_SECONDS = 2.5  # until processes of workers have begun, or the libraries of a GPU
# Of products alone, what autoencoders take: they are small, their losses and noise are as large as their rows.
AUTOENCODER_SHARE = 1.7
LEARNED_STEPS = 30  # that a network takes at least until it is at its best, however few an epoch has
# Kernels of a step, and seconds that one takes on a GPU however little it does, in recorded steps: on an H100 a step of
# small classifiers takes 0.28 ms, of autoencoders 0.8 to 1.2. Units side by side on a GPU do not make that less.
PERCEPTRON_KERNELS, NETWORK_KERNELS = 70, 200
KERNEL_SECONDS = 4e-6
PASS_COPIES = {"cpu": 1_000, "cuda": 100_000}  # bytes that could be copied while the pass is at one weight
MACHINE_COPIES = 400  # bytes that could be copied while a support vector machine is fitted, by numbers of its kernel
COPIES = 5  # in which a parameter is held: itself, its gradient, two moments, the best so far
GIB = 2**30


@dataclass(frozen=True)
class Speed:
    """The speed of one core or GPU.

    Attributes:
        operations: Of products with 32 rows, in a second.
        copied: Bytes in a second.
        kernel: Seconds that a kernel of a step takes beside these; 0 on a CPU.
    """

    operations: float
    copied: float
    kernel: float = 0.0

    @classmethod
    def usual(cls, device: torch.device) -> Speed:
        """Return the speed of a core of a server or of an H100, where only ratios of times matter."""
        return cls(8e10, 2.5e10) if device.type == "cpu" else cls(4e13, 3e12, KERNEL_SECONDS)

    @classmethod
    def measure(cls, device: torch.device) -> Speed:
        """Time a product and a copy as large as those of a stack there, in some hundredths of a second."""
        models, count, calls = (4, 2**24, 1) if device.type == "cpu" else (128, 2**25, 10)
        x, w = torch.ones(models, 32, 512, device=device), torch.ones(models, 512, 512, device=device)
        numbers = torch.ones(count, device=device)
        into = torch.empty_like(numbers)
        product = _seconds(lambda: torch.bmm(x, w), device, calls)
        copy = _seconds(lambda: into.copy_(numbers), device, calls)
        kernel = 0.0 if device.type == "cpu" else KERNEL_SECONDS
        return cls(2 * x.numel() * 512 / product, 2 * 4 * count / copy, kernel)


def _seconds(function: Callable[[], object], device: torch.device, calls: int, times: int = 5) -> float:
    """Return the seconds of a call, on average over some without a wait between them; the shortest of several times."""
    shortest = math.inf
    for _ in range(times):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait_for_stream(device)
        shortest = min(shortest, time.perf_counter() - start)
    return shortest / calls


@dataclass(frozen=True)
class Estimate:
    """The cost of a representation, or of another step.

    Attributes:
        parameters: Of a classifier and, where there are any, of all autoencoders; 0 where nothing is trained by steps.
        memory: Bytes that a worker takes at most.
        operations: Operations of products.
        copied: Bytes read or written.
        units: Units of work, which workers share.
        kernels: Of all steps.
    """

    parameters: int
    memory: int
    operations: float
    copied: float
    units: int
    kernels: int = 0

    def seconds(self, speed: Speed, workers: int) -> float:
        """Return how long so many cores or GPUs take."""
        alone = self.operations / speed.operations + self.copied / speed.copied + self.kernels * speed.kernel
        alone += UNIT_SECONDS * self.units
        return alone / max(1, min(workers, self.units))

    def then(self, other: Estimate) -> Estimate:
        """Return the cost of both, one after the other."""
        return Estimate(
            self.parameters + other.parameters,
            max(self.memory, other.memory),
            self.operations + other.operations,
            self.copied + other.copied,
            max(self.units, other.units),
            self.kernels + other.kernels,
        )

    def times(self, factor: float) -> Estimate:
        """Return the cost of so many times as much of the same, in as much memory."""
        units, kernels = math.ceil(factor * self.units), math.ceil(factor * self.kernels)
        return Estimate(self.parameters, self.memory, factor * self.operations, factor * self.copied, units, kernels)


NOTHING = Estimate(0, 0, 0.0, 0.0, 0)


class Estimates:
    """Estimates of an experiment on a collection.

    Args:
        settings: What is asked for.
        collection: The LoRAs.
        selected: The layers that the experiment is about, bool[L of the files].
        rows: Row indices of ``train``, ``validation`` and ``test``.
    """

    def __init__(self, settings: Settings, collection: Collection, selected: np.ndarray, rows: dict[str, np.ndarray]):
        self.settings, self.collection, self.device = settings, collection, settings.device
        self.count, self.train = len(collection.files), len(rows["train"])
        self.held_out = len(rows["validation"])
        self.num_classes = len(collection.classes)
        layout = collection.packed_layout
        self.all_weights = layout.width
        self.widths = np.array(widths_of(layout, settings.sketch_flat))[selected].tolist()
        self.modules = module_shapes(collection, whole_pairs(collection.pair_of_layer[selected]).tolist())

    def of(self, name: str) -> Estimate:
        """Return the cost of a representation with and without the top layers, but for the pass over the weights."""
        return self.fitting(name).then(self.training(name))

    def fitting(self, name: str) -> Estimate:
        """Return the cost of what is fitted, or computed, before classifiers of a representation are trained."""
        made = REPRESENTATIONS[name].made
        if made == "pca":
            return self._pca()
        if made == "autoencoder":
            return self.autoencoders(name)
        return self._tokens() if made == "trained" and NETWORKS[name].reads == "tokens" else NOTHING

    def training(self, name: str) -> Estimate:
        """Return the cost of a representation's classifiers with and without the top layers."""
        row = REPRESENTATIONS[name]
        if row.made == "kernel":
            return self._kernels(KERNELS[name].views)
        if row.made == "trained":
            return self._network(name)
        if row.made == "flat":
            return self._classifier(sum(self.widths), held=False)
        return self._classifier(self.columns(name))

    @property
    def pairs(self) -> int:
        """Number of whole pairs."""
        return len(self.modules)

    def ranking(self) -> Estimate:
        """Return the cost of the ranking."""
        columns = len(REPRESENTATIONS[RANKING].feature_names)
        return self._classifier(columns, ranked=self.settings.num_runs * len(self.widths))

    def reading(self) -> Estimate:
        """Return the cost of the pass over the weights, in bytes copied, that gives all features."""
        copied = PASS_COPIES[self.device.type] * self.count * self.all_weights
        if self.settings.sketch_flat:  # a projection is drawn in some hundredths of a second, one after the other
            copied += 6e5 * PASS_COPIES[self.device.type] * len(self.widths)
        shards = math.ceil(self.count * self.all_weights / SHARD_NUMBERS)
        return Estimate(0, PASS_BYTES * self.all_weights, 0, copied, shards)

    # -- by kind ------------------------------------------------------------------------------------------------------

    def _classifier(self, columns: int, held: bool = True, ranked: int = 0) -> Estimate:
        """Return the cost of multilayer perceptrons on so many columns, held in memory or read by minibatches.

        They are those of a representation with and without the top layers, or as many as are to be ``ranked``.
        """
        schedule = self.settings.classifier
        parameters = sum((a + 1) * b for a, b in pairwise((columns, *schedule.hidden, self.num_classes)))
        at_once, units = self._stacks(parameters, ranked)
        models, epochs = ranked or 2 * self.settings.num_runs, self._epochs(schedule)
        inputs = 2 * 4 * columns * (self.count if held else 3 * schedule.batch_size)
        memory = inputs + 4 * COPIES * parameters * at_once
        kernels = units * epochs * self._steps(schedule) * PERCEPTRON_KERNELS
        return Estimate(parameters, memory, *self._trained(parameters, models, schedule, epochs), units, kernels)

    def _stacks(self, parameters: int, ranked: int = 0) -> tuple[int, int]:
        """Return how many models of so many parameters are in a stack, and how many stacks there are; see above."""
        device, runs = self.device.type, self.settings.num_runs
        at_once = min(STACK_PARAMETERS[device] // parameters, ranked or min(runs, RUNS_IN_STACK[device]))
        at_once = max(1, at_once)
        return at_once, math.ceil(ranked / at_once) if ranked else 2 * math.ceil(runs / at_once)

    def _steps(self, schedule: Schedule) -> int:
        """Return the steps of an epoch."""
        return math.ceil(self.train / schedule.batch_size)

    def _epochs(self, schedule: Schedule) -> int:
        """Return about how many epochs a network trains that learns fast, of few LoRAs more than of many."""
        best = max(5, math.ceil(LEARNED_STEPS / self._steps(schedule)))
        return min(schedule.max_epochs, schedule.patience + best)

    def _trained(self, parameters: int, models: float, schedule: Schedule, epochs: int) -> tuple[float, float]:
        """Return operations and bytes of training models for so many epochs.

        Forward and backward take six operations a row, Adam moves 28 bytes a step; the best state is copied, and all
        is drawn and laid out once.
        """
        operations = 2 * epochs * (3 * self.train + self.held_out) * parameters
        copied = (epochs * (28 * self._steps(schedule) + 8) + 64) * parameters
        return models * operations, models * copied

    def autoencoders(self, name: str) -> Estimate:
        """Return the cost of the autoencoders of a representation, one for each layer."""
        schedule = self.settings.autoencoder
        each = [autoencoders.num_parameters(name, width, schedule.hidden) for width in self.widths]
        widest = 4 * (COPIES * max(each) + 3 * self.count * max(self.widths))
        epochs = min(schedule.max_epochs, 2 * schedule.patience)
        units = sum(
            math.ceil(layers * parameters / AUTOENCODER_PARAMETERS[self.device.type])
            for parameters, layers in Counter(each).items()
        )
        kernels = units * epochs * self._steps(schedule) * NETWORK_KERNELS
        trained = self._trained(sum(each), AUTOENCODER_SHARE, schedule, epochs)
        return Estimate(sum(each), widest, *trained, units, kernels)

    def _pca(self) -> Estimate:
        """Return the cost of components, fitted twice: a Gram matrix, or a dozen products; float64 counts twice."""
        width, k = sum(self.widths), PCA_COMPONENTS
        columns = 2 * self.train if self.train > GRAM_SIDE else min(self.train, width)
        products = 2 * self.train * columns if self.train <= GRAM_SIDE else 12 * 4 * self.train * k
        operations = 2 * 2 * width * (products + 4 * k * self.count)
        passes = 2 if self.train <= GRAM_SIDE else 14
        blocks = 5 * 8 * min(NUMBERS_AT_ONCE, self.count * width)
        memory = blocks + 4 * 8 * min(self.train, GRAM_SIDE) ** 2
        return Estimate(0, memory, operations, 2 * passes * 12 * 4 * self.count * width, 2)

    def _kernels(self, views: int) -> Estimate:
        """Return the cost of inner products of updates, by pairs of columns, a quarter as fast as large products."""
        kernel = self._kernel_numbers
        operations = sum(8 * m.rank**2 * kernel * (m.inputs + m.outputs) for m in self.modules)
        copied = 200 * self.count * sum(m.numbers for m in self.modules)
        memory = 4 * self.pairs * kernel if self.keeps_kernels else 8 * Limits().summed
        memory += 3 * 8 * kernel + 12 * self.count * self._largest_module
        return Estimate(0, memory, operations * (1 + views) / 2, copied, 1)

    def _network(self, name: str) -> Estimate:
        """Return the cost of networks that read modules: tokens, which kernels give, or all factors."""
        network, runs = NETWORKS[name], 2 * self.settings.num_runs
        schedule, of_tokens = network.schedule(self.settings), network.reads == "tokens"
        parameters = network.parameters(self.modules, self.num_classes, schedule)
        numbers = sum(m.numbers for m in self.modules)
        columns = len(REPRESENTATIONS[name].feature_names) * self.pairs if of_tokens else numbers
        largest = 12 * self.count * self._largest_module
        made = NOTHING if of_tokens else Estimate(0, largest, 0, 100 * self.count * numbers, self.pairs)
        (_, units), epochs = self._stacks(parameters), self._epochs(schedule)
        operations, copied = self._trained(parameters, runs, schedule, epochs)
        copied += runs * epochs * 3 * 4 * self.count * columns
        kernels = units * epochs * self._steps(schedule) * NETWORK_KERNELS
        memory = 4 * self.count * columns + 4 * COPIES * parameters
        return made.then(Estimate(parameters, memory, operations, copied, units, kernels))

    @property
    def keeps_kernels(self) -> bool:
        """The kernels of all modules are kept, so that each choice of modules is a sum of these."""
        limits, kept = Limits(), self.pairs * self._kernel_numbers
        return self.count <= limits.kept and kept <= limits.kept_numbers

    @property
    def _kernel_numbers(self) -> int:
        limits = Limits()
        return self.count * (self.train if self.count <= limits.exact else limits.landmarks)

    def machine(self, name: str) -> Estimate:
        """Return the cost of a support vector machine of a kernel, under one choice of modules."""
        if not self.keeps_kernels:
            return replace(self._kernels(KERNELS[name].views), units=1)
        copied = (4 * self.pairs + MACHINE_COPIES) * self._kernel_numbers
        return Estimate(0, 4 * self.pairs * self._kernel_numbers, 0, copied, 1)

    def each_unit(self, name: str, models: int) -> Estimate:
        """Return the cost of so many classifiers, each of one layer or pair of a representation."""
        return self._classifier(len(REPRESENTATIONS[name].feature_names), ranked=models)

    def columns(self, name: str) -> int:
        """Return how many numbers of each LoRA the classifiers of a representation read, but for packed weights."""
        row = REPRESENTATIONS[name]
        if row.made == "pca":
            return num_components(PCA_COMPONENTS, self.train, sum(self.widths))
        if row.made == "autoencoder":
            return sum(autoencoders.latent_width(name, width) for width in self.widths)
        if row.made in ("flat", "kernel") or not row.feature_names:
            return 0
        return len(row.feature_names) * (len(self.widths) if row.unit == "layer" else self.pairs)

    def _tokens(self) -> Estimate:
        """Return the cost of the tokens of all modules, which their kernels give."""
        return replace(self._kernels(views=3), memory=12 * self.count * self._largest_module, units=self.pairs)

    @property
    def _largest_module(self) -> int:
        return max((m.numbers for m in self.modules), default=0)


# ----------------------------------------------------------------------------------------------------------------------
# What cannot fit
# ----------------------------------------------------------------------------------------------------------------------


def unfit(
    estimates: Estimates,
    names: list[str],
    memory: int | None = None,
    parameters: int = AUTOENCODER_LIMIT,
) -> dict[str, str]:
    """Return the representations that do not fit the memory, or would be trained for hours unasked, and why.

    A single worker counts: it does not depend on who works. Where several do not fit, fewer are tried by themselves.

    Args:
        estimates: Of the experiment.
        names: The representations.
        memory: Bytes of the device; None: those that it has.
        parameters: Of autoencoders of a representation that was not asked for by name, at most, on a CPU.
    """
    settings = estimates.settings
    memory = memory_of(settings.device) if memory is None else memory
    of_what = "GPU" if settings.device.type == "cuda" else "machine"
    reasons = {}
    for name in names:
        estimate = estimates.of(name)
        mend = "" if REPRESENTATIONS[name].made not in FLAT or settings.sketch_flat else _MEND
        if estimate.memory > SHARE * memory:
            trained = f"to train {in_words(estimate.parameters)} parameters " if estimate.parameters else "it "
            reasons[name] = f"{trained}takes {sized(estimate.memory)}, and this {of_what} has {sized(memory)}{mend}"
        elif (
            REPRESENTATIONS[name].made == "autoencoder"
            and settings.all_representations
            and settings.device.type == "cpu"
            and (count := estimates.autoencoders(name).parameters) > parameters
        ):
            size = f"its autoencoders have {in_words(count)} parameters"
            reasons[name] = f"{size}; a CPU trains at most {in_words(parameters)} unless asked for them by name{mend}"
    return reasons


_MEND = "; --sketch-flat reads at most 256 numbers of each layer instead"


def without_room(
    settings: Settings, collection: Collection, names: list[str], cache: Path, free: int | None = None
) -> dict[str, str]:
    """Return the representations whose packed weights would leave too little room in the cache folder, and why.

    What is packed already takes no more.

    Args:
        settings: What is asked for.
        collection: The LoRAs.
        names: The representations.
        cache: The folder.
        free: Bytes that are free there; None: as the system says.
    """
    of_weights = [name for name in names if reads_packed(name, settings.sketch_flat)]
    needed = bytes_of_packed(settings, collection, names, cache)
    if free is None:
        free = shutil.disk_usage(nearest_of(cache)).free
    if needed <= SHARE * free:
        return {}
    reason = f"the weights of all LoRAs, packed, take {sized(needed)}, more than {cache} has to spare"
    return dict.fromkeys(of_weights, f"{reason}. Give a --cache-dir with more room")


def bytes_of_packed(settings: Settings, collection: Collection, names: list[str], cache: Path) -> int:
    """Return the bytes of packed weights that representations read and that are not in the cache yet."""
    needed = any(reads_packed(name, settings.sketch_flat) for name in names)
    return bytes_to_pack(collection, cache, settings.device) if needed else 0


def reads_packed(name: str, sketch_flat: bool) -> bool:
    """Return whether a representation reads the packed weights of all layers, as those that are not computed do."""
    made = REPRESENTATIONS[name].made
    return made not in COMPUTED and not (made in FLAT and sketch_flat)


# ----------------------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------------------


def sized(size: float) -> str:
    """Return bytes in GiB, or MiB where they are fewer than that."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def in_words(count: int) -> str:
    """Return a count in thousands, millions or billions."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:,.1f} {word}"
    return str(count)
