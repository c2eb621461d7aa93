"""Many small networks trained as one tensor program, and the MLP classifier.

A stack holds M networks of one architecture. Every parameter is one tensor with a leading model axis,
``[M, in, out]``, so a training step of the whole stack is a handful of batched products. The models stay
independent: losses are summed over models (an average would rescale gradients), and each model has its own
learning rate, early stopping and best weights. A model that has stopped leaves the stack.

Randomness belongs to the *run*, not to the model: in run r every model starts from the same hidden weights and sees
the same minibatches and dropout masks, each from a generator of its own (`stream`). So a model's result does not
depend on what it was stacked with.

Shape letters: M models, R distinct runs, S input sources, N samples, B minibatch, F features, H hidden, C classes.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adam import adam

HIDDEN = (512, 512, 512)  # the classifier's hidden layers
DROPOUT = 0.3
NUMBERS_AT_ONCE = 2**24  # worked on at a time where there may be many: 64 MiB in float32
FEW_COLUMNS = 16  # a product with fewer than so many takes a CPU longer than its transpose and a copy
CLIP = 10.0  # standardised inputs beyond ten standard deviations are outliers of a heavy tail, not information


def stream(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the SHA-256 of its key, such as ``(seed, run, "order", epoch)``.

    Streams with different keys are independent, so that adding a purpose never shifts another one. Numbers from a
    CPU generator are the same whatever device trains; those drawn at every step (dropout, noise) come from the device
    itself, which would else wait for them.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))


def dropout_masks(
    rate: float, shape: tuple[int, ...], generators: Sequence[torch.Generator], dtype: torch.dtype
) -> Tensor:
    """Inverted dropout: 0 with probability ``rate``, else 1 / (1 - rate), the rate in steps of 1/65536.

    Sixteen random bits decide each entry; on a CPU that takes a tenth of the time of a Bernoulli draw for each.

    Returns:
        A mask from each generator, [generators, *shape].
    """
    kept, count = round((1 - rate) * 2**16), math.prod(shape)
    bits = torch.empty(len(generators), -(-count // 4), dtype=torch.int64, device=generators[0].device)
    for row, generator in zip(bits, generators, strict=True):
        row.random_(-(2**63), None, generator=generator)
    numbers = bits.view(torch.int16)[:, :count].reshape(-1, *shape)
    masks = torch.empty(numbers.shape, dtype=dtype, device=bits.device)
    return torch.le(numbers, kept - 1 - 2**15, out=masks).mul_(2**16 / kept)


def standardise(x: Tensor, train_rows: Tensor) -> Tensor:
    """Scale each column to mean 0 and standard deviation 1 over the train rows, then clip to ±10.

    Args:
        x: float32[..., N, F].
        train_rows: Row indices to learn mean and scale from, int64[n].

    Returns:
        A new tensor, float32[..., N, F].
    """
    at_once = rows_at_once(x.numel() // x.shape[-2])
    return scaled(x, *mean_and_scale(x[..., rows, :] for rows in train_rows.split(at_once)))


def rows_at_once(numbers_in_a_row: int) -> int:
    """How many rows to work on at a time, so that copies of them stay small."""
    return max(1, NUMBERS_AT_ONCE // numbers_in_a_row)


def mean_and_scale(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each column, in one pass (Chan, Golub & LeVeque, 1979).

    A column whose standard deviation is at most 1e-6 of its largest magnitude, or too small a number to divide by,
    carries nothing but rounding: its scale is 0.

    Args:
        blocks: Rows in blocks, float[..., n, F] each.

    Returns:
        Mean and scale, float64[..., 1, F].
    """
    count, mean, squares, largest = 0, 0.0, 0.0, 0.0
    for block in blocks:
        block = block.double()
        rows, block_mean = block.shape[-2], block.mean(-2, keepdim=True)
        apart = block_mean - mean
        mean = mean + apart * (rows / (count + rows))
        squares = squares + (block - block_mean).square().sum(-2, keepdim=True)
        squares = squares + apart.square() * (rows * count / (count + rows))
        largest = block.abs().amax(-2, keepdim=True).clamp(min=largest)
        count += rows
    std = (squares / count).sqrt()
    constant = std <= (1e-6 * largest).clamp(min=torch.finfo(torch.float32).tiny)
    return mean, torch.where(constant, 0.0, 1.0 / torch.where(constant, 1.0, std))


def scaled(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """``(x - mean) * scale``, clipped to ±10: a new tensor."""
    return x.sub(mean.to(x.dtype)).mul_(scale.to(x.dtype)).clamp_(-CLIP, CLIP)


class Stored:
    """Standardised rows of a matrix in storage, of which nothing is read until the first is asked for.

    Stands for a tensor float32[1, N, F] of classifier inputs; see `gather`. The matrix is then held on the device as a
    whole, or, where it is too large for that, each minibatch is read as it comes: the numbers are the same.

    Args:
        read: From row indices int64[n] to those rows, float32[n, F].
        shape: (N, F).
        train_rows: Row indices to learn mean and scale from, int64[n], on the device.
        hold: Whether to hold it, as far as the device's memory then does.
    """

    dtype = torch.float32

    def __init__(
        self, read: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int], train_rows: Tensor, hold: bool
    ):
        self.read, self.shape, self.train_rows, self.hold = read, (1, *shape), train_rows, hold
        self.device = train_rows.device
        self._one_reads = threading.Lock()  # the others then find it held

    def rows(self, rows: Tensor) -> Tensor:
        """Standardised rows, int64[..., n] -> float32[..., n, F]."""
        held = self.ready()
        return self._read(rows) if held is None else functional.embedding(rows, held)

    def ready(self) -> Tensor | None:
        """Read what is to be read before the first rows are given out: the matrix as a whole, if it is held."""
        with self._one_reads:
            self._mean_and_scale  # noqa: B018
            return self._held

    @cached_property
    def _held(self) -> Tensor | None:
        if not self.hold:
            return None
        try:
            x = torch.empty(self.shape[1:], device=self.device)
        except torch.OutOfMemoryError:  # others may use the device too
            return None
        for rows in torch.arange(len(x)).split(rows_at_once(x.shape[1])):
            x[rows] = self._read(rows)
        return x

    @cached_property
    def _mean_and_scale(self) -> tuple[Tensor, Tensor]:
        return mean_and_scale(self._raw(rows) for rows in self.train_rows.split(rows_at_once(self.shape[2])))

    def _read(self, rows: Tensor) -> Tensor:
        return scaled(self._raw(rows.flatten()), *self._mean_and_scale).view(*rows.shape, -1)

    def _raw(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.read(rows.cpu().numpy())).to(self.device)


def gather(x: Tensor | Stored, source: Tensor, rows: Tensor) -> Tensor:
    """Rows of each model's source: x float[S, N, F], source int64[M], rows int64[M or 1, B] -> float[M, B, F]."""
    if isinstance(x, Stored):
        return x.rows(rows).expand(len(source), -1, -1)
    # On a CPU the lookup of an embedding copies whole rows, three to five times as fast as indexing.
    return functional.embedding(source[:, None] * x.shape[1] + rows, x.view(-1, x.shape[2]))


# ----------------------------------------------------------------------------------------------------------------------
# The training loop: what every stack has in common
# ----------------------------------------------------------------------------------------------------------------------


class Adam:
    """Adam (Kingma & Ba, 2015) over stacked parameters, with a learning rate for each model.

    The fused kernel reads and writes seven floats per parameter and step, which is the floor, but takes one
    learning rate. Models therefore stand in order of their rates, and each distinct rate is one call on a slice.
    """

    def __init__(self, params: dict[str, Tensor]):
        self.mean = {name: torch.zeros_like(p) for name, p in params.items()}
        self.square = {name: torch.zeros_like(p) for name, p in params.items()}
        self.steps = 0

    def step(self, params: dict[str, Tensor], gradients: Sequence[Tensor], rates: Tensor) -> None:
        """One update in place; ``rates`` float64[M] must be sorted so that equal rates are neighbours."""
        values, counts = torch.unique_consecutive(rates, return_counts=True)
        tensors = [list(of) for of in (params.values(), gradients, self.mean.values(), self.square.values())]
        end = 0
        for rate, count in zip(values.tolist(), counts.tolist(), strict=True):
            start, end = end, end + count
            done = torch.full((), float(self.steps), device=gradients[0].device)
            parts = tensors if count == len(rates) else [[t[start:end] for t in of] for of in tensors]
            with torch.no_grad():
                adam(
                    *parts,
                    [],  # no running maxima: not AMSGrad
                    [done.clone() for _ in params],
                    fused=True,
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=rate,
                    weight_decay=0.0,
                    eps=1e-8,
                    maximize=False,
                )
        self.steps += 1

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        self.mean = {name: m[index] for name, m in self.mean.items()}
        self.square = {name: v[index] for name, v in self.square.items()}


class Plateau:
    """torch's ReduceLROnPlateau (mode min, relative threshold 1e-4) for M models at once.

    After more than ``patience`` epochs without an improvement a model's rate is multiplied by ``factor``.
    """

    def __init__(self, models: int, lr: float, patience: int | None, factor: float = 0.5):
        self.rates = torch.full((models,), lr, dtype=torch.float64)
        self.best = torch.full((models,), math.inf, dtype=torch.float64)
        self.bad_epochs = torch.zeros(models, dtype=torch.int64)
        self.patience, self.factor = patience, factor

    def update(self, losses: Tensor) -> None:
        """Take in the validation losses of an epoch, float64[M]."""
        if self.patience is None:
            return
        better = losses < self.best * (1 - 1e-4)
        self.best = torch.where(better, losses, self.best)
        self.bad_epochs = torch.where(better, 0, self.bad_epochs + 1)
        reduced = torch.where(self.bad_epochs > self.patience, self.rates * self.factor, self.rates)
        self.bad_epochs[self.bad_epochs > self.patience] = 0
        # torch leaves a rate alone once a reduction would change it by no more than 1e-8.
        self.rates = torch.where(self.rates - reduced > 1e-8, reduced, self.rates)

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        self.rates, self.best, self.bad_epochs = self.rates[index], self.best[index], self.bad_epochs[index]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; one value for all models of a stack.

    ``lr_patience`` None keeps the learning rate constant.
    """

    max_epochs: int
    patience: int
    batch_size: int = 32
    lr: float = 1e-3
    lr_patience: int | None = None
    lr_factor: float = 0.5


@dataclass
class Trained:
    """What training leaves: each model's best state and when it came.

    ``state`` maps names to tensors [M, ...] (parameters and buffers); ``epochs`` int64[M] is how many epochs a
    model was trained, ``best_epoch`` int64[M] the one its state is from, ``best_loss`` float64[M] the validation
    loss there.
    """

    state: dict[str, Tensor]
    epochs: Tensor
    best_epoch: Tensor
    best_loss: Tensor


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """On a GPU, products of float32 matrices in TF32: ten bits of mantissa, as is usual in training."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def train(network, schedule: Schedule) -> Trained:
    """Train a stack until each model has stopped early or ``max_epochs`` is reached.

    A model stops after ``patience`` epochs without any improvement of its validation loss; its state at the
    best epoch is copied then and there, never referenced.

    Args:
        network: An object with ``params`` and ``buffers`` (dicts of tensors [M, ...]), ``gradients(epoch)`` (yields
            the gradient of each minibatch's training losses, a tensor for each of ``params``; it may be written over
            by the next), ``validation_losses()`` ([M]) and ``take(index)`` (keeps the models at these positions, in
            this order).
        schedule: Epochs, patience, learning rate and its decay.

    Raises:
        FloatingPointError: A validation loss is not finite; training has diverged.
    """
    best = {name: t.detach().clone() for name, t in (network.params | network.buffers).items()}
    models = len(next(iter(best.values())))
    best_loss = torch.full((models,), math.inf, dtype=torch.float64)
    best_epoch, epochs = torch.zeros(models, dtype=torch.int64), torch.zeros(models, dtype=torch.int64)
    alive = torch.arange(models)  # which model stands at each position of the network
    optimiser, plateau = (
        Adam(network.params),
        Plateau(models, schedule.lr, schedule.lr_patience, schedule.lr_factor),
    )

    for epoch in range(1, schedule.max_epochs + 1):
        with fast_products(next(iter(best.values())).device):
            for gradients in network.gradients(epoch):
                optimiser.step(network.params, gradients, plateau.rates)
        with torch.no_grad():
            losses = network.validation_losses().double().cpu()
        if not torch.isfinite(losses).all():
            raise FloatingPointError(f"training diverged: a validation loss of epoch {epoch} is not finite")

        improved = losses < best_loss[alive]
        here, there = improved.nonzero().squeeze(1), alive[improved]
        for name, t in (network.params | network.buffers).items():
            if torch.equal(there, torch.arange(models)):  # all of them, in their first order: no copy on the way
                best[name].copy_(t.detach())
            else:
                best[name][there] = t.detach()[here]
        best_loss[there], best_epoch[there] = losses[improved], epoch
        epochs[alive] = epoch
        plateau.update(losses)

        going = (epoch - best_epoch[alive] < schedule.patience).nonzero().squeeze(1)
        if len(going) == 0:
            break
        order = going[torch.argsort(plateau.rates[going], stable=True)]
        if not torch.equal(order, torch.arange(len(alive))):
            alive = alive[order]
            for part in (network, optimiser, plateau):
                part.take(order)
    return Trained(best, epochs, best_epoch, best_loss)


# ----------------------------------------------------------------------------------------------------------------------
# The classifier
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Row indices of the three parts of a collection, int64 each, disjoint."""

    train: Tensor
    validation: Tensor
    test: Tensor

    def to(self, device: torch.device) -> Split:
        """The same indices on a device."""
        return Split(self.train.to(device), self.validation.to(device), self.test.to(device))


@dataclass(frozen=True)
class Models:
    """Which classifiers a stack holds: model m reads columns ``live[m]`` of ``source[m]`` in run ``run[m]``.

    ``source`` int64[M] and ``run`` int64[M]; ``live`` bool[M, F], None for all columns.
    """

    source: Tensor
    run: Tensor
    live: Tensor | None = None


def initial_weights(models: Models, features: int, widths: tuple[int, ...], seed: int, like: Tensor) -> dict:
    """Initial parameters of a stack: torch's default for a linear layer, U(-1/sqrt(in), 1/sqrt(in)).

    ``in`` of the first layer is the number of *live* inputs, and feature j takes the j-th draw of its own stream: a
    masked input and a left-out column then give the same model, whose hidden layers do not depend on the width.

    Returns:
        ``weight0`` float[M, F, H], ``bias0`` float[M, 1, H], and so on up to the output layer.
    """
    runs, position = torch.unique(models.run, return_inverse=True)
    live = models.live if models.live is not None else torch.ones(len(models.run), features, dtype=torch.bool)
    live = live.to(like.device, like.dtype)
    drawn: dict[str, list[Tensor]] = {}
    for run in runs.tolist():
        first, hidden = stream(seed, run, "first layer"), stream(seed, run, "hidden init")
        for i, (fan_in, fan_out) in enumerate(zip((features, *widths), widths, strict=False)):
            generator, scale = (first, 1.0) if i == 0 else (hidden, fan_in**-0.5)
            for name, shape, source in (
                (f"weight{i}", (fan_in, fan_out), generator),
                (f"bias{i}", (1, fan_out), hidden),
            ):
                draw = torch.rand(shape, generator=source, dtype=like.dtype) * 2 - 1
                drawn.setdefault(name, []).append(draw * scale)
    params = {name: torch.stack(draws).to(like.device)[position] for name, draws in drawn.items()}
    scale = live.sum(1).rsqrt()[:, None, None]  # (M, 1, 1)
    params["weight0"] = params["weight0"] * (live[:, :, None] * scale)
    params["bias0"] = params["bias0"] * scale
    return params


def logits(params: dict[str, Tensor], x: Tensor, masks: Tensor | None = None) -> Tensor:
    """ReLU MLP of every model: x float[M, B, F] -> float[M, B, C].

    In training, ``masks`` float[layers, M or 1, B, H] multiplies the hidden activations (inverted dropout).
    """
    layers, h = len(params) // 2, x
    for i in range(layers):
        h = torch.baddbmm(params[f"bias{i}"], h, params[f"weight{i}"])
        if i < layers - 1:
            h = h.relu_()
            if masks is not None:
                h = h * masks[i]
    return h


class ClassifierStack:
    """M multilayer perceptrons on rows of shared inputs: hidden ReLU layers with dropout, softmax, cross-entropy.

    Args:
        x: Standardised inputs, float[S, N, F], or `Stored`.
        y: Class of each sample, int64[N].
        split: Train and validation rows; the test rows are not read.
        models: What each model reads and its run.
        num_classes: C.
        seed: Of all streams.
        hidden: Widths of the hidden layers, all equal.
        dropout: Probability of dropping a hidden activation.
        batch_size: Rows in a minibatch; the last one of an epoch may be smaller.
    """

    def __init__(self, x, y, split, models, num_classes, *, seed, hidden=HIDDEN, dropout=DROPOUT, batch_size=32):
        self.x, self.y, self.split, self.models, self.seed = x, y, split, models, seed
        self.hidden, self.dropout, self.batch_size, self.num_classes = hidden, dropout, batch_size, num_classes
        self.params = initial_weights(models, x.shape[2], (*hidden, num_classes), seed, like=x)
        self.buffers: dict[str, Tensor] = {}
        self._place()

    def _place(self) -> None:
        """Put what each step needs on the device: sources, live columns, positions of runs, memory for gradients."""
        device = self.x.device
        self.runs, position = torch.unique(self.models.run, return_inverse=True)
        self.position, self.source = position.to(device), self.models.source.to(device)
        self.kept_gradients = {name: torch.empty_like(p) for name, p in self.params.items()}
        self.kept_layers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # by rows of a minibatch
        live = self.models.live
        self.live = None if live is None or live.all() else live.to(device, self.x.dtype)[:, None]  # (M, 1, F)

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        live = self.models.live
        self.models = Models(self.models.source[index], self.models.run[index], None if live is None else live[index])
        self.params = {name: p[index] for name, p in self.params.items()}
        self._place()

    def gradients(self, epoch: int) -> Iterator[list[Tensor]]:
        """Gradients of the models' mean cross-entropy over each minibatch, in the order of each model's run."""
        for x, y, masks in self.minibatches(epoch):
            yield self.backpropagate(x, y, masks)

    def minibatches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Inputs float[M, B, F], classes int64[M, B] and dropout masks float[layers, M or 1, B, H]."""
        train, runs = self.split.train, self.runs.tolist()
        order = torch.stack(
            [torch.randperm(len(train), generator=stream(self.seed, run, "order", epoch)) for run in runs]
        ).to(train.device)  # (R, n)
        dropout = [stream(self.seed, run, "dropout", epoch, device=self.x.device) for run in runs]
        for start in range(0, len(train), self.batch_size):
            rows = train[order[:, start : start + self.batch_size]]  # (R, B)
            masks = self._dropout_masks(dropout, rows.shape[1])  # (layers, M or 1, B, H)
            rows = rows[self.position]  # (M, B)
            x = gather(self.x, self.source, rows)  # (M, B, F)
            yield x if self.live is None else x * self.live, self.y[rows], masks

    def backpropagate(self, x: Tensor, y: Tensor, masks: Tensor | None) -> list[Tensor]:
        """Gradient of the sum of the models' mean cross-entropies, for each of ``params``.

        What autograd gives for `logits`, by hand, so that gradients, activations and errors are written where the
        step before left its own: memory handed out anew at each step takes a CPU longer to map than to fill, but for
        the little of a layer with few columns.
        """
        weights = [self.params[f"weight{i}"] for i in range(len(self.hidden) + 1)]
        outputs, errors = self._layers_of(x.shape[1])
        gradients = self.kept_gradients
        inputs = [x]
        for i, (weight, out) in enumerate(zip(weights, outputs, strict=True)):
            h = torch.baddbmm(self.params[f"bias{i}"], inputs[i], weight, out=out)
            if i < len(self.hidden):
                h.relu_()
                if masks is not None:
                    h.mul_(masks[i])
                inputs.append(h)
        error = torch.softmax(h, 2)  # (M, B, C)
        error.scatter_add_(2, y[:, :, None], error.new_full((1, 1, 1), -1.0).expand(*y.shape, 1)).div_(x.shape[1])
        for i in reversed(range(len(weights))):
            if weights[i].shape[2] < FEW_COLUMNS:
                gradients[f"weight{i}"].copy_(torch.bmm(error.mT, inputs[i]).mT)
            else:
                torch.bmm(inputs[i].mT, error, out=gradients[f"weight{i}"])
            torch.sum(error, 1, keepdim=True, out=gradients[f"bias{i}"])
            if i > 0:
                error = torch.bmm(error, weights[i].mT, out=errors[i - 1])
                passed = inputs[i].sign_()  # the activation has served: its sign is what ReLU and dropout let pass
                error.mul_(passed if masks is None else passed.mul_(masks[i - 1]))
        return list(gradients.values())

    def _layers_of(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """Memory for each layer's output float[M, rows, H or C] and for the errors below, float[M, rows, H]."""
        if rows not in self.kept_layers:
            models, like = len(self.source), self.params["weight0"]
            outputs = [like.new_empty(models, rows, width) for width in (*self.hidden, self.num_classes)]
            self.kept_layers[rows] = outputs, [like.new_empty(models, rows, width) for width in self.hidden]
        return self.kept_layers[rows]

    def validation_losses(self) -> Tensor:
        """Mean cross-entropy [M] over the validation rows."""
        rows = self.split.validation
        return self._losses(
            predict_logits(self.params, self.x, self.source, rows), self.y[rows].expand(len(self.source), -1)
        )

    @staticmethod
    def _losses(scores: Tensor, y: Tensor) -> Tensor:
        losses = functional.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="none")
        return losses.view(y.shape).mean(1)

    def _dropout_masks(self, generators: list[torch.Generator], rows: int) -> Tensor | None:
        if self.dropout == 0:
            return None
        shape = (len(self.hidden), rows, self.hidden[0])
        masks = dropout_masks(self.dropout, shape, generators, self.x.dtype).transpose(0, 1)  # (layers, R, B, H)
        return masks if len(generators) == 1 else masks[:, self.position]


def predict_logits(params: dict[str, Tensor], x: Tensor | Stored, source: Tensor, rows: Tensor) -> Tensor:
    """Scores float[M, n, C] of the given rows, in evaluation mode.

    Dead columns need no mask here: their first-layer weights are 0 from the start and never move. The rows go through
    in slices, so that the copies of a wide input stay small.
    """
    at_once = rows_at_once(len(source) * max(x.shape[2], params["weight0"].shape[2]))
    return torch.cat([logits(params, gather(x, source, part[None])) for part in rows.split(at_once)], dim=1)


def attribution(params: dict[str, Tensor], x: Tensor, source: Tensor, rows: Tensor, block: int) -> Tensor:
    """How much each block of inputs moves the score of the predicted class: gradient times input, summed.

    ``mean over rows of |sum over the block of x_j · d score / d x_j|`` (gradient x input: Shrikumar et al., 2016), in
    evaluation mode. Masked inputs have weight 0, and so no share.

    Args:
        params: Of the stack, see `logits`.
        x: Standardised inputs, float[S, N, F].
        source: Of each model, int64[M].
        rows: Row indices, int64[n].
        block: Consecutive inputs that belong together; F is a multiple of it.

    Returns:
        float[M, F / block].
    """
    total = 0.0
    for part in rows.split(rows_at_once(len(source) * max(x.shape[2], params["weight0"].shape[2]))):
        inputs = gather(x, source, part[None]).requires_grad_()
        (gradient,) = torch.autograd.grad(logits(params, inputs).amax(2).sum(), inputs)
        total = total + (gradient * inputs).detach().unflatten(2, (-1, block)).sum(3).abs().sum(1)
    return total / len(rows)


def train_classifiers(
    x: Tensor | Stored,
    y: Tensor,
    split: Split,
    models: Models,
    num_classes: int,
    *,
    schedule: Schedule,
    seed: int,
    block: int | None = None,
    **network,
) -> dict[str, np.ndarray]:
    """Train a stack of classifiers and tell what each of them predicts.

    Args:
        x: Standardised inputs on the training device, float[S, N, F], or `Stored`.
        y: Class of each sample, same device, int64[N].
        split: Rows to train on, to stop early by, and to test on; same device.
        models: What each model reads and its run.
        num_classes: C.
        schedule: Epochs, patience, learning rate.
        seed: Of all random streams.
        block: Inputs of a layer, to tell each layer's `attribution` on the test rows; None: do not.
        **network: ``hidden`` and ``dropout`` of `ClassifierStack`.

    Returns:
        Arrays by name. ``predicted`` int32[M, V + T] and ``log_loss`` float32[M, V + T] of the validation rows, then
        the test rows; ``train_accuracy``, ``train_f1`` float64[M]; ``epochs``, ``best_epoch`` int64[M];
        ``validation_loss`` float64[M] at the best epoch; with ``block``, ``attribution`` float32[M, F / block].
    """
    stack = ClassifierStack(x, y, split, models, num_classes, seed=seed, batch_size=schedule.batch_size, **network)
    trained = train(stack, schedule)
    source = models.source.to(x.device)
    held_out = torch.cat([split.validation, split.test])
    scores = predict_logits(trained.state, x, source, held_out)  # (M, V + T, C)
    truth = y[held_out].expand(len(source), -1)
    log_loss = functional.cross_entropy(scores.flatten(0, 1), truth.flatten(), reduction="none").view(truth.shape)
    fitted = predict_logits(trained.state, x, source, split.train).argmax(2).cpu().numpy()
    accuracy, f1 = scored(y[split.train].cpu().numpy(), fitted, num_classes)
    shares = {}
    if block is not None:
        told = attribution(trained.state, x, source, split.test, block)
        shares = {"attribution": told.float().cpu().numpy()}
    return shares | {
        "predicted": scores.argmax(2).int().cpu().numpy(),
        "log_loss": log_loss.float().cpu().numpy(),
        "train_accuracy": accuracy,
        "train_f1": f1,
        "epochs": trained.epochs.numpy(),
        "best_epoch": trained.best_epoch.numpy(),
        "validation_loss": trained.best_loss.numpy(),
    }


def scored(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and macro-F1, float64[M] each, of predicted classes int[M, n] against the truth int[n].

    F1 of a class is 2·hits / (present + predicted), macro-F1 its mean over all classes; a class that is neither present
    nor predicted counts as 0. As scikit-learn's `accuracy_score` and `f1_score`, for all models at once: one by one
    they take longer than a GPU takes to train the models.
    """

    def counts(chosen: np.ndarray, classes: np.ndarray) -> np.ndarray:
        cell = np.arange(len(predicted))[:, None] * num_classes + classes
        return np.bincount(cell[chosen], minlength=len(predicted) * num_classes).reshape(-1, num_classes)  # (M, C)

    right, all_rows = predicted == truth, np.ones(predicted.shape, bool)
    hits = counts(right, predicted)
    present_or_predicted = counts(all_rows, predicted) + np.bincount(truth, minlength=num_classes)
    return right.mean(1), (2 * hits / np.maximum(present_or_predicted, 1)).mean(1)
