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
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn import functional
from torch.optim.adam import adam

HIDDEN = (512, 512, 512)  # the classifier's hidden layers
DROPOUT = 0.3
EVALUATED_AT_ONCE = 2**24  # floats of inputs or activations, 64 MiB
CLIP = 10.0  # standardised inputs beyond ten standard deviations are outliers of a heavy tail, not information


def stream(*key: object) -> torch.Generator:
    """A CPU generator seeded by the SHA-256 of its key, such as ``(seed, run, "order", epoch)``.

    Streams with different keys are independent, so that adding a purpose never shifts another one, and
    the numbers are the same whatever device trains.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def standardise(x: Tensor, train_rows: Tensor) -> Tensor:
    """Scale each column to mean 0 and standard deviation 1 over the train rows, then clip to ±10.

    A column whose train standard deviation is at most 1e-6 of its largest train magnitude, or too small a number to
    divide by, carries nothing but rounding: it is 0 everywhere, in all rows.

    Args:
        x: float32[..., N, F].
        train_rows: Row indices to learn mean and scale from, int64[n].

    Returns:
        A new tensor, float32[..., N, F].
    """
    train = x[..., train_rows, :].double()
    std, mean = torch.std_mean(train, dim=-2, correction=0, keepdim=True)
    smallest = torch.finfo(torch.float32).tiny
    constant = std <= (1e-6 * train.abs().amax(-2, keepdim=True)).clamp(min=smallest)
    scale = torch.where(constant, 0.0, 1.0 / torch.where(constant, 1.0, std))
    return ((x - mean.to(x.dtype)) * scale.to(x.dtype)).clamp_(-CLIP, CLIP)


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

    def step(self, params: dict[str, Tensor], grads: tuple[Tensor, ...], rates: Tensor) -> None:
        """One update in place; ``rates`` float64[M] must be sorted so that equal rates are neighbours."""
        values, counts = torch.unique_consecutive(rates, return_counts=True)
        end = 0
        for rate, count in zip(values.tolist(), counts.tolist(), strict=True):
            part = slice(end, end := end + count)
            done = torch.full((len(params),), float(self.steps), device=grads[0].device)
            with torch.no_grad():
                adam(
                    [p[part] for p in params.values()],
                    [g[part] for g in grads],
                    [m[part] for m in self.mean.values()],
                    [v[part] for v in self.square.values()],
                    [],  # no running maxima: not AMSGrad
                    list(done.unbind()),
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


def train(network, schedule: Schedule) -> Trained:
    """Train a stack until each model has stopped early or ``max_epochs`` is reached.

    A model stops after ``patience`` epochs without any improvement of its validation loss; its state at the
    best epoch is copied then and there, never referenced.

    Args:
        network: An object with ``params`` and ``buffers`` (dicts of tensors [M, ...]), ``minibatch_losses(epoch)``
            (yields the training losses [M] of each minibatch, differentiable), ``validation_losses()`` ([M]) and
            ``take(index)`` (keeps the models at these positions, in this order).
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
        for losses in network.minibatch_losses(epoch):
            grads = torch.autograd.grad(losses.sum(), list(network.params.values()))
            optimiser.step(network.params, grads, plateau.rates)
        with torch.no_grad():
            losses = network.validation_losses().double().cpu()
        if not torch.isfinite(losses).all():
            raise FloatingPointError(f"training diverged: a validation loss of epoch {epoch} is not finite")

        improved = losses < best_loss[alive]
        here, there = improved.nonzero().squeeze(1), alive[improved]
        for name, t in (network.params | network.buffers).items():
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
    return {name: p.requires_grad_() for name, p in params.items()}


class StackedLinear(torch.autograd.Function):
    """``x @ weight + bias`` of every model, the weights' gradient written over that of the step before.

    A fresh gradient as large as the weights is memory that the system hands out anew at every step, which on a CPU
    takes longer than the product. The price: a weight may stand only once in a graph.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> Tensor:
        """``x`` float[M, B, in], ``weight`` and ``gradient`` float[M, in, out], ``bias`` float[M, 1, out]."""
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return torch.baddbmm(bias, x, weight)

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Gradients of x (where it has one), weight and bias."""
        x, weight = ctx.saved_tensors
        below = torch.bmm(above, weight.mT) if ctx.needs_input_grad[0] else None
        torch.bmm(x.mT, above, out=ctx.gradient)
        return below, ctx.gradient, above.sum(1, keepdim=True), None


def logits(
    params: dict[str, Tensor], x: Tensor, masks: Tensor | None = None, gradients: list[Tensor] | None = None
) -> Tensor:
    """ReLU MLP of every model: x float[M, B, F] -> float[M, B, C].

    In training, ``masks`` float[layers, M or 1, B, H] multiplies the hidden activations (inverted dropout) and
    ``gradients`` holds memory for the gradient of each weight.
    """
    layers = len(params) // 2
    h = x
    for i in range(layers):
        weight, bias = params[f"weight{i}"], params[f"bias{i}"]
        h = torch.baddbmm(bias, h, weight) if gradients is None else StackedLinear.apply(h, weight, bias, gradients[i])
        if i < layers - 1:
            h = functional.relu(h)
            if masks is not None:
                h = h * masks[i]
    return h


class ClassifierStack:
    """M multilayer perceptrons on rows of shared inputs: hidden ReLU layers with dropout, softmax, cross-entropy.

    Args:
        x: Standardised inputs, float[S, N, F].
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
        self.hidden, self.dropout, self.batch_size = hidden, dropout, batch_size
        self.params = initial_weights(models, x.shape[2], (*hidden, num_classes), seed, like=x)
        self.buffers: dict[str, Tensor] = {}
        self._place()

    def _place(self) -> None:
        """Put what each step needs on the device: sources, live columns, positions of runs, memory for gradients."""
        device = self.x.device
        self.runs, position = torch.unique(self.models.run, return_inverse=True)
        self.position, self.source = position.to(device), self.models.source.to(device)
        self.gradients = [torch.empty_like(p) for name, p in self.params.items() if name.startswith("weight")]
        live = self.models.live
        self.live = None if live is None or live.all() else live.to(device, self.x.dtype)[:, None]  # (M, 1, F)

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        live = self.models.live
        self.models = Models(self.models.source[index], self.models.run[index], None if live is None else live[index])
        self.params = {name: p.detach()[index].requires_grad_() for name, p in self.params.items()}
        self._place()

    def minibatch_losses(self, epoch: int) -> Iterator[Tensor]:
        """Mean cross-entropy [M] of each minibatch of an epoch, in the order of each model's run."""
        train, runs = self.split.train, self.runs.tolist()
        order = torch.stack(
            [torch.randperm(len(train), generator=stream(self.seed, run, "order", epoch)) for run in runs]
        ).to(train.device)  # (R, n)
        dropout = [stream(self.seed, run, "dropout", epoch) for run in runs]
        for start in range(0, len(train), self.batch_size):
            rows = train[order[:, start : start + self.batch_size]]  # (R, B)
            masks = self._dropout_masks(dropout, rows.shape[1])  # (layers, M or 1, B, H)
            rows = rows[self.position]  # (M, B)
            x = self.x[self.source[:, None], rows]  # (M, B, F)
            if self.live is not None:
                x = x * self.live
            yield self._losses(logits(self.params, x, masks, self.gradients), self.y[rows])

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
        keep, shape = 1 - self.dropout, (len(self.hidden), rows, self.hidden[0])
        masks = torch.stack(
            [torch.empty(shape, dtype=self.x.dtype).bernoulli_(keep, generator=g).div_(keep) for g in generators],
            dim=1,
        ).to(self.x.device)  # (layers, R, B, H)
        return masks if len(generators) == 1 else masks[:, self.position]


def predict_logits(params: dict[str, Tensor], x: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """Scores float[M, n, C] of the given rows, in evaluation mode.

    Dead columns need no mask here: their first-layer weights are 0 from the start and never move. The rows go through
    in slices, so that the copies of a wide input stay small.
    """
    widest = max(x.shape[2], params["weight0"].shape[2])
    at_once = max(1, EVALUATED_AT_ONCE // (len(source) * widest))
    with torch.no_grad():
        return torch.cat([logits(params, x[source[:, None], part]) for part in rows.split(at_once)], dim=1)


def train_classifiers(
    x: Tensor,
    y: Tensor,
    split: Split,
    models: Models,
    num_classes: int,
    *,
    schedule: Schedule,
    seed: int,
    **network,
) -> dict[str, np.ndarray]:
    """Train a stack of classifiers and tell what each of them predicts.

    Args:
        x: Standardised inputs on the training device, float[S, N, F].
        y: Class of each sample, same device, int64[N].
        split: Rows to train on, to stop early by, and to test on; same device.
        models: What each model reads and its run.
        num_classes: C.
        schedule: Epochs, patience, learning rate.
        seed: Of all random streams.
        **network: ``hidden`` and ``dropout`` of `ClassifierStack`.

    Returns:
        Arrays by name. ``predicted`` int32[M, V + T] and ``log_loss`` float32[M, V + T] of the validation rows, then
        the test rows; ``train_accuracy``, ``train_f1`` float64[M]; ``epochs``, ``best_epoch`` int64[M];
        ``validation_loss`` float64[M] at the best epoch.
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
    return {
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

    A class that is neither present nor predicted counts as F1 0.
    """
    classes = np.arange(num_classes)
    accuracy = [accuracy_score(truth, row) for row in predicted]
    f1 = [f1_score(truth, row, labels=classes, average="macro", zero_division=0) for row in predicted]
    return np.array(accuracy), np.array(f1)
