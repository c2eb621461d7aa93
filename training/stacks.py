"""Many small networks trained as one tensor program: random streams, inputs, and the training loop.

A stack holds M networks of one architecture. Every parameter is one tensor with a leading model axis,
``[M, in, out]``, so a training step of the whole stack is a handful of batched products. The models stay
independent: losses are summed over models (an average would rescale gradients), and each model has its own
learning rate, early stopping and best weights. A model that has stopped leaves the stack, on a GPU once that saves
time: see `train`.

Randomness belongs to the *run*, not to the model: in run r every model starts from the same hidden weights and sees
the same minibatches and dropout masks, each from a generator of its own (`stream`). So a model's result does not
depend on what it was stacked with.

Shape letters: M models, S input sources, N samples, B minibatch, F features.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from training import recorded
from training.memory import is_out_of_memory
from training.recorded import Recorded, capturing

NUMBERS_AT_ONCE = 2**24  # worked on at a time where there may be many: 64 MiB in float32
DRAWN_AT_ONCE = 2**22  # random numbers of 16 bits that a GPU draws at a time for each run: 8 MiB
CPU = torch.device("cpu")
RECORDING = 6  # steps of a whole stack that an epoch without some models must save, to be recorded anew
VALIDATION = "validation"  # a step that is recorded beside those of minibatches
CLIP = 10.0  # standardised inputs beyond ten standard deviations are outliers of a heavy tail, not information


# ----------------------------------------------------------------------------------------------------------------------
# Random streams
# ----------------------------------------------------------------------------------------------------------------------


def seed_of(*key: object) -> int:
    """Return the SHA-256 of a key such as ``(seed, run, "order", epoch)``, as an integer of 256 bits.

    Seeds of different keys are independent, so that adding a purpose never shifts another one.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest(), "little")


def stream(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator seeded by its key; see `seed_of`.

    Numbers from a CPU generator are the same whatever device trains. Initial parameters, dropout and noise come from
    the device itself, which would else wait for them: a CPU and a GPU train other models, as other seeds would.
    """
    return torch.Generator(device).manual_seed(seed_of(*key) % 2**64)


def numpy_stream(*key: object) -> np.random.Generator:
    """Return a numpy generator seeded by its key; see `seed_of`."""
    return np.random.default_rng(seed_of(*key))


def epoch_order(train_rows: Tensor, seed: int, runs: Iterable[int | str], epoch: int) -> Tensor:
    """Draw the order in which each run sees the train rows in an epoch, positions int64[R, n] on their device."""
    drawn = [torch.randperm(len(train_rows), generator=stream(seed, run, "order", epoch)) for run in runs]
    return torch.stack(drawn).to(train_rows.device)


def random_bits(count: int, generators: Sequence[torch.Generator], device: torch.device = CPU) -> Tensor:
    """Draw 16 random bits ``count`` times from each generator of a device, int16[generators, count]."""
    bits = torch.empty(len(generators), -(-count // 4), dtype=torch.int64, device=device)
    for row, generator in zip(bits, generators, strict=True):
        row.random_(-(2**63), None, generator=generator)
    return bits.view(torch.int16)[:, :count]


def dropout_masks(rate: float, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return masks of inverted dropout: 0 with probability ``rate``, else 1 / (1 - rate), the rate in steps of 1/65536.

    Sixteen random bits decide each entry; on a CPU that takes a tenth of the time of a Bernoulli draw for each.

    Args:
        rate: Probability of 0.
        bits: Random bits, int16[...]; see `random_bits`.
        dtype: Of the masks.
    """
    kept = round((1 - rate) * 2**16)
    masks = torch.empty(bits.shape, dtype=dtype, device=bits.device)
    return torch.le(bits, kept - 1 - 2**15, out=masks).mul_(2**16 / kept)


def drawn_at_once(device: torch.device) -> int:
    """Return how many random numbers of a run to draw at a time: on a CPU a minibatch's, which stay in its caches."""
    return 1 if device.type == "cpu" else DRAWN_AT_ONCE


class Minibatches:
    """The minibatches of an epoch: rows and random bits of each, in tensors that stay where they are.

    A step asks for the `next` one, which it finds by a counter on the device; so a step can be repeated from a
    recording (see `training.recorded`). A GPU draws several at a time, as many whatever runs there are, since its
    numbers depend on that; a CPU's do not.

    Args:
        train_rows: Row indices, int64[n], on the device.
        batch_size: Rows in a minibatch, B; the last one of an epoch may be smaller.
        seed: Of all streams.
        runs: The R runs, or what else keys streams, each with an order and bits of its own.
        bits: By purpose, how many times 16 bits a minibatch takes, given the number of its rows.
    """

    def __init__(
        self,
        train_rows: Tensor,
        batch_size: int,
        seed: int,
        runs: Sequence[int | str],
        bits: dict[str, Callable[[int], int]],
    ):
        self.train_rows, self.seed, self.runs, self.bits = train_rows, seed, runs, bits
        count, device = len(train_rows), train_rows.device
        self.sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
        numbers = max([1, *(count_bits(self.sizes[0]) for count_bits in bits.values())])
        self.at_once = min(len(self.sizes), rows_at_once(numbers, drawn_at_once(device)))
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows = train_rows.new_empty(len(runs), self.at_once, self.sizes[0])
        self.words = {  # of 64 bits
            purpose: train_rows.new_empty(len(runs), self.at_once, self._count_words(purpose, self.sizes[0]))
            for purpose in bits
        }

    def _count_words(self, purpose: str, size: int) -> int:
        """Return how many words hold the bits of a minibatch of so many rows."""
        return -(-self.bits[purpose](size) // 4)

    def begin(self, epoch: int) -> Iterator[list[int]]:
        """Draw an epoch, as many minibatches at a time as there is room for; yield how many rows each of these has."""
        device, start = self.train_rows.device, 0
        order = self.train_rows[epoch_order(self.train_rows, self.seed, self.runs, epoch)]  # (R, n)
        generators = {
            purpose: [stream(self.seed, run, purpose, epoch, device=device) for run in self.runs]
            for purpose in self.bits
        }
        for first in range(0, len(self.sizes), self.at_once):
            sizes = self.sizes[first : first + self.at_once]
            end = start + sum(sizes)
            self.rows.flatten(1)[:, : end - start] = order[:, start:end]
            for purpose, words in self.words.items():
                used = sum(self._count_words(purpose, size) for size in sizes)
                for row, generator in zip(words.flatten(1), generators[purpose], strict=True):
                    row[:used].random_(-(2**63), None, generator=generator)
            self.place.zero_()
            start = end
            yield sizes

    def next(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return rows int64[R, size] and bits int16[R, .] by purpose of the next minibatch, which has so many rows."""
        rows = self.rows.index_select(1, self.place)[:, 0, :size]
        bits = {
            purpose: words.index_select(1, self.place)[:, 0].view(torch.int16)[:, : self.bits[purpose](size)]
            for purpose, words in self.words.items()
        }
        self.place.add_(1)
        return rows, bits


# ----------------------------------------------------------------------------------------------------------------------
# Inputs
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Row indices of the three parts of a collection, int64 each, disjoint."""

    train: Tensor
    validation: Tensor
    test: Tensor

    def to(self, device: torch.device) -> Split:
        """Return the same indices on a device."""
        return Split(self.train.to(device), self.validation.to(device), self.test.to(device))


def rows_at_once(numbers_in_a_row: int, numbers_at_once: int = NUMBERS_AT_ONCE, device: torch.device = CPU) -> int:
    """Return the number of rows to work on at a time, so that copies of them stay small; four times as many on a GPU.

    A GPU has the memory, and its kernels take time to start.
    """
    return max(1, (1 if device.type == "cpu" else 4) * numbers_at_once // numbers_in_a_row)


def standardise(x: Tensor, train_rows: Tensor, numbers_at_once: int = NUMBERS_AT_ONCE) -> Tensor:
    """Scale each column to mean 0 and standard deviation 1 over the train rows, then clip to ±10.

    Args:
        x: float32[..., N, F].
        train_rows: Row indices to learn mean and scale from, int64[n].
        numbers_at_once: Numbers of x to work on at a time.

    Returns:
        A new tensor, float32[..., N, F].
    """
    length = rows_at_once(x.numel() // x.shape[-2], numbers_at_once, x.device)
    return scaled(x, *mean_and_scale(x[..., rows, :] for rows in train_rows.split(length)))


def mean_and_scale(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute mean and reciprocal standard deviation of each column, in one pass (Chan, Golub & LeVeque, 1979).

    A column whose standard deviation is at most 1e-6 of its largest magnitude, or too small a number to divide by,
    carries nothing but rounding: its scale is 0.

    Args:
        blocks: Rows in blocks, float[..., n, F] each.

    Returns:
        Mean and scale, float64[..., 1, F].
    """
    count = 0
    mean, squares, largest = 0.0, 0.0, 0.0
    for block in blocks:
        block = block.double()
        rows, block_mean = block.shape[-2], block.mean(-2, keepdim=True)
        shift = block_mean - mean  # (..., 1, F)
        mean = mean + shift * (rows / (count + rows))
        squares = squares + (block - block_mean).square().sum(-2, keepdim=True)
        squares = squares + shift.square() * (rows * count / (count + rows))
        largest = block.abs().amax(-2, keepdim=True).clamp(min=largest)
        count += rows
    std = (squares / count).sqrt()
    constant = std <= (1e-6 * largest).clamp(min=torch.finfo(torch.float32).tiny)
    return mean, torch.where(constant, 0.0, 1.0 / torch.where(constant, 1.0, std))


def scaled(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return ``(x - mean) * scale``, clipped to ±10: a new tensor."""
    return x.sub(mean.to(x.dtype)).mul_(scale.to(x.dtype)).clamp_(-CLIP, CLIP)


# From the shape (N, F) and a function that yields blocks of rows to the whole matrix.
Hold = Callable[[tuple[int, int], Callable[[], Iterator[Tensor]]], Tensor]


def filled(shape: tuple[int, int], blocks: Callable[[], Iterator[Tensor]], device: torch.device) -> Tensor:
    """Return a matrix on a device, filled with blocks of rows."""
    # While a thread records, torch does not look for memory among what it keeps for later.
    with capturing if device.type == "cuda" else nullcontext():
        x = torch.empty(shape, device=device)
    start = 0
    for block in blocks():
        x[start : start + len(block)] = block
        start += len(block)
    return x


def wait_for_stream(device: torch.device) -> None:
    """Wait until this thread's stream has done what it was given, so that other threads may read what it has made.

    Streams of a GPU do not wait for each other. A CPU has none.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Stored:
    """Standardised rows of a matrix in storage, of which nothing is read before the first row is asked for.

    Takes the place of a tensor float32[1, N, F] of classifier inputs; see `gather`. The matrix is held on the device
    as a whole, or, where it is too large for that, each minibatch is read as it comes: the numbers are the same.

    Args:
        read: Reads the rows of these indices, int64[n] -> float32[n, F], an array or a tensor on the device.
        shape: (N, F).
        train_rows: Row indices to learn mean and scale from, int64[n], on the device.
        hold: Returns the matrix as a whole, given its shape and a function that yields its standardised blocks of
            rows; see `filled`. None: it is not held.
        numbers_at_once: Numbers to read at a time.
    """

    dtype = torch.float32

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray | Tensor],
        shape: tuple[int, int],
        train_rows: Tensor,
        hold: Hold | None,
        numbers_at_once: int = NUMBERS_AT_ONCE,
    ):
        self.read, self.hold = read, hold
        self.shape, self.train_rows = (1, *shape), train_rows
        self.device = train_rows.device
        self._length = rows_at_once(shape[1], numbers_at_once)
        self._lock = threading.Lock()  # one thread reads, and the others then find the matrix held, and complete
        self._is_ready = False

    def rows(self, rows: Tensor) -> Tensor:
        """Return standardised rows, int64[..., n] -> float32[..., n, F]."""
        held = self.ready()
        return self._read(rows) if held is None else functional.embedding(rows, held)

    def ready(self) -> Tensor | None:
        """Read ahead what every row needs: the matrix as a whole if it is to be held, else mean and scale."""
        with self._lock:
            if not self._is_ready:
                if self._held is None:
                    self._mean_and_scale  # noqa: B018
                wait_for_stream(self.device)
                self._is_ready = True
            return self._held

    @cached_property
    def _held(self) -> Tensor | None:
        if self.hold is None:
            return None
        try:
            return self.hold(self.shape[1:], self._blocks)
        except (MemoryError, RuntimeError) as error:  # others may use the device too
            if not is_out_of_memory(error):
                raise
            return None

    def _blocks(self) -> Iterator[Tensor]:
        for rows in torch.arange(self.shape[1]).split(self._length):
            yield self._read(rows)

    @cached_property
    def _mean_and_scale(self) -> tuple[Tensor, Tensor]:
        return mean_and_scale(self._raw(rows) for rows in self.train_rows.split(self._length))

    def _read(self, rows: Tensor) -> Tensor:
        return scaled(self._raw(rows.flatten()), *self._mean_and_scale).view(*rows.shape, -1)

    def _raw(self, rows: Tensor) -> Tensor:
        return torch.as_tensor(self.read(rows.cpu().numpy())).to(self.device)


def gather(x: Tensor | Stored, source: Tensor, rows: Tensor) -> Tensor:
    """Gather rows of each model's source: x float[S, N, F], source int64[M], rows int64[M or 1, B]: float[M, B, F]."""
    if isinstance(x, Stored):
        return x.rows(rows).expand(len(source), -1, -1)
    # On a CPU the lookup of an embedding copies whole rows, three to five times as fast as indexing.
    return functional.embedding(source[:, None] * x.shape[1] + rows, x.view(-1, x.shape[2]))


# ----------------------------------------------------------------------------------------------------------------------
# The training loop
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """The size of a stack's networks, and how long and how fast they train; the same for all models of a stack.

    ``lr_patience`` None keeps the learning rate constant. ``hidden`` are the widths of the hidden layers, None for
    those that the network has by default. The learning rate times ``weight_decay`` is the
    share by which parameters shrink at each step.
    """

    max_epochs: int
    patience: int
    batch_size: int = 32
    lr: float = 1e-3
    lr_patience: int | None = None
    lr_factor: float = 0.5
    hidden: tuple[int, ...] | None = None
    weight_decay: float = 0.0


class Adam:
    """Adam (Kingma & Ba, 2015) over stacked parameters, with a learning rate for each model.

    With ``weight_decay`` AdamW ("Decoupled weight decay regularization", Loshchilov & Hutter, 2019): before each step
    all parameters of a model are multiplied by 1 - its rate x ``weight_decay``.

    The fused kernel reads and writes seven floats per parameter and step, which is the floor, but takes one
    learning rate. Models therefore stand in order of their rates, and each distinct rate is one call on a slice.
    Counts of steps, by which moments are corrected, lie on the device: a recorded step counts too.
    """

    def __init__(self, params: dict[str, Tensor], weight_decay: float = 0.0):
        self.weight_decay = weight_decay
        self.mean = {name: torch.zeros_like(parameter) for name, parameter in params.items()}
        self.square = {name: torch.zeros_like(parameter) for name, parameter in params.items()}
        self.slices: list[tuple[slice, float, list[Tensor]]] = []  # models, their rate, a count for each parameter

    def begin(self, rates: Tensor, steps: int) -> None:
        """Make ready for steps of these rates, float64[M], sorted so that equal rates are neighbours.

        To be called before the first step, and whenever rates or models have changed; ``steps`` have been made.
        """
        values, counts = torch.unique_consecutive(rates, return_counts=True)
        ends = counts.cumsum(0).tolist()
        self.slices = [
            (slice(start, end), rate, [mean.new_full((), float(steps)) for mean in self.mean.values()])
            for start, end, rate in zip([0, *ends[:-1]], ends, values.tolist(), strict=True)
        ]

    def step(self, params: dict[str, Tensor], gradients: Sequence[Tensor]) -> None:
        """Make one update in place."""
        update = adamw if self.weight_decay else adam
        tensors = [list(params.values()), list(gradients), list(self.mean.values()), list(self.square.values())]
        for models, rate, counts in self.slices:
            parts = tensors
            if len(self.slices) > 1:
                parts = [[tensor[models] for tensor in group] for group in tensors]
            with torch.no_grad():
                update(
                    *parts,
                    [],  # no running maxima: not AMSGrad
                    counts,
                    fused=True,
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=rate,
                    weight_decay=self.weight_decay,
                    eps=1e-8,
                    maximize=False,
                )

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        index = index.to(next(iter(self.mean.values())).device)
        self.mean = {name: mean[index] for name, mean in self.mean.items()}
        self.square = {name: square[index] for name, square in self.square.items()}


class Plateau:
    """torch's ReduceLROnPlateau (mode min, relative threshold 1e-4) for M models at once.

    After more than ``patience`` epochs without an improvement a model's rate is multiplied by ``factor``.
    """

    def __init__(self, models: int, lr: float, patience: int | None, factor: float = 0.5):
        self.rates = torch.full((models,), lr, dtype=torch.float64)
        self.best = torch.full((models,), math.inf, dtype=torch.float64)
        self.bad_epochs = torch.zeros(models, dtype=torch.int64)
        self.patience, self.factor = patience, factor

    def update(self, losses: Tensor, going: Tensor) -> None:
        """Take in the validation losses of an epoch, float64[M]; only models that are ``going``, bool[M], count."""
        if self.patience is None:
            return
        better = losses < self.best * (1 - 1e-4)
        self.best = torch.where(better, losses, self.best)
        self.bad_epochs = torch.where(better, 0, self.bad_epochs + 1)
        reduced = torch.where(going & (self.bad_epochs > self.patience), self.rates * self.factor, self.rates)
        self.bad_epochs[self.bad_epochs > self.patience] = 0
        # torch leaves a rate alone once a reduction would change it by no more than 1e-8.
        self.rates = torch.where(self.rates - reduced > 1e-8, reduced, self.rates)

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        self.rates, self.best, self.bad_epochs = self.rates[index], self.best[index], self.bad_epochs[index]


@dataclass
class Trained:
    """The best state of each model and when it came.

    ``state`` maps names to tensors [M, ...] (parameters and buffers); ``epochs`` int64[M] is how many epochs a
    model was trained, ``best_epoch`` int64[M] the epoch of its state, ``best_loss`` float64[M] the validation
    loss there.
    """

    state: dict[str, Tensor]
    epochs: Tensor
    best_epoch: Tensor
    best_loss: Tensor

    @classmethod
    def begin(cls, network) -> Trained:
        """Return the state before the first epoch, with an infinite loss."""
        state = {name: tensor.detach().clone() for name, tensor in (network.params | network.buffers).items()}
        epochs = torch.zeros(len(next(iter(state.values()))), dtype=torch.int64)
        return cls(state, epochs, epochs.clone(), torch.full(epochs.shape, math.inf, dtype=torch.float64))

    def update(self, network, models: Tensor, losses: Tensor, epoch: int, going: Tensor) -> None:
        """Take in an epoch's losses float64[len(models)], and copy the state of the models whose loss is their lowest.

        ``models`` int64 says which model stands at each position of the network, and ``going`` bool which count.
        """
        improved = going & (losses < self.best_loss[models])
        position, model = improved.nonzero().squeeze(1), models[improved]
        all_in_order = torch.equal(model, torch.arange(len(self.epochs)))
        device = next(iter(self.state.values())).device
        taken, written = position.to(device), model.to(device)
        tensors = {name: tensor.detach() for name, tensor in (network.params | network.buffers).items()}
        if all_in_order:  # the common case in the first epochs, without the copy that indexing makes
            torch._foreach_copy_([self.state[name] for name in tensors], list(tensors.values()))
        elif len(position):
            for name, tensor in tensors.items():
                self.state[name][written] = tensor[taken]
        self.best_loss[model] = losses[improved]
        self.best_epoch[model] = epoch
        self.epochs[models[going]] = epoch


def start_thread(device: torch.device) -> None:
    """Prepare a thread that trains: it uses one core, and the process's GPU.

    Results then do not depend on the number of threads. Classifiers that are sure of their train rows are full of
    numbers below 1e-38, over which a CPU takes many times as long: they count as 0. A GPU multiplies float32 matrices
    in TF32, ten bits of mantissa, as is usual in training; what must be exact there is computed in float64.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # of the process: other threads may be at work


def train(network, schedule: Schedule) -> Trained:
    """Train a stack until each model has stopped early or ``max_epochs`` is reached.

    A model stops after ``patience`` epochs without any improvement of its validation loss; its state at the
    best epoch is copied then and there, never referenced. It leaves the stack: on a CPU at once, on a GPU, which
    records steps, and anew where models leave or rates change, when an epoch without it saves what recording takes.

    Args:
        network: An object with ``x`` (its inputs; a `Stored` that is not held keeps steps from being recorded);
            ``params`` and ``buffers`` (dicts of tensors [M, ...]); ``begin(epoch)`` (draws an epoch, a part at a time,
            and yields the numbers of rows of the part's minibatches); ``gradients(size)`` (returns gradients of the
            training losses of the next minibatch, of so many rows, for each of ``params`` a tensor that the next call
            may write over; it is recorded, see `Recorded`); ``generators`` (of the device, from which that draws);
            ``validation_losses()`` ([M]; recorded too); and ``take(index)`` (keeps the models at these positions, in
            this order).
        schedule: Epochs, patience, learning rate and its decay.

    Raises:
        FloatingPointError: A validation loss is not finite; training has diverged.
    """
    trained = Trained.begin(network)
    models = torch.arange(len(trained.epochs))  # the model at each position of the network
    plateau = Plateau(len(models), schedule.lr, schedule.lr_patience, schedule.lr_factor)
    going = torch.ones(len(models), dtype=torch.bool)  # at each position: its model has not stopped
    with closing(_Steps(network, schedule)) as steps:
        for epoch in range(1, schedule.max_epochs + 1):
            steps.make_epoch(epoch, plateau.rates)
            losses = steps.validation_losses()
            if not torch.isfinite(losses[going]).all():
                raise FloatingPointError(f"training diverged: a validation loss of epoch {epoch} is not finite")
            trained.update(network, models, losses, epoch, going)
            plateau.update(losses, going)

            going &= epoch - trained.best_epoch[models] < schedule.patience
            if not going.any():
                break
            stay = going if steps.may_leave(int((~going).sum()), plateau.rates) else torch.ones_like(going)
            stay = stay.nonzero().squeeze(1)
            order = stay[torch.argsort(plateau.rates[stay], stable=True)]  # equal rates are neighbours: see `Adam`
            if not torch.equal(order, torch.arange(len(models))):
                models, going = models[order], going[order]
                for part in (network, steps, plateau):
                    part.take(order)
    return trained


class _Steps:
    """The steps of a network's training, recorded by the rows of their minibatch while models and rates stay."""

    def __init__(self, network, schedule: Schedule):
        self.network, self.optimiser = network, Adam(network.params, schedule.weight_decay)
        like = next(iter(network.params.values()))
        self.losses = like.detach().new_empty(len(like))  # of the validation
        # What is read from storage at each step cannot be recorded.
        self.stored = isinstance(network.x, Stored) and network.x.ready() is None
        self.done, self.in_epoch, self.rates = 0, 0, None
        self.recorded: dict[int | str, Recorded] = {}  # by the rows of a minibatch, and `VALIDATION`

    def make_epoch(self, epoch: int, rates: Tensor) -> None:
        """Make the steps of an epoch at these rates, float64[M]."""
        if self.rates is None or not torch.equal(self.rates, rates):
            self.rates = rates.clone()
            self._forget([name for name in self.recorded if name != VALIDATION])
            self.optimiser.begin(rates, self.done)
        before = self.done
        for sizes in self.network.begin(epoch):
            for size in sizes:
                self._repeat(size, partial(self._step, size), self.network.generators)
            self.done += len(sizes)
        self.in_epoch = self.done - before

    def may_leave(self, stopped: int, rates: Tensor) -> bool:
        """Return whether to have so many models leave that have stopped, before an epoch at these rates.

        A GPU goes on with them, and with what it has recorded, while an epoch without them would save fewer steps than
        `RECORDING`; where rates change it records anew in any case.
        """
        if not recorded.is_recorded(self.losses.device) or self.stored or not torch.equal(self.rates, rates):
            return True
        return stopped * self.in_epoch >= RECORDING * len(self.losses)

    def validation_losses(self) -> Tensor:
        """Return the validation losses of the models, float64[M] on the CPU."""
        self._repeat(VALIDATION, self._validate)
        return self.losses.double().cpu()

    def _step(self, size: int) -> None:
        self.optimiser.step(self.network.params, self.network.gradients(size))

    @torch.no_grad()
    def _validate(self) -> None:
        self.losses.copy_(self.network.validation_losses())

    def _repeat(self, name: int | str, function: Callable[[], None], generators: Sequence = ()) -> None:
        """Do a step, recorded under a name."""
        if self.stored:
            function()
            return
        if name not in self.recorded:
            self.recorded[name] = Recorded(function, self.losses.device, generators)
        self.recorded[name]()

    def _forget(self, names: Iterable[int | str]) -> None:
        """Drop recordings; not while another thread makes one, which registers with what these register with."""
        with capturing:
            for name in names:
                del self.recorded[name]

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        self.optimiser.take(index)
        self.losses = self.losses.new_empty(len(index))
        self.rates = None
        self.close()

    def close(self) -> None:
        """Drop all recordings; they refer to these steps, which would else stay with all their tensors."""
        self._forget(list(self.recorded))
