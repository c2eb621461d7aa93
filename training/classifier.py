"""The MLP classifier, many at once: initial weights, the stack that trains, predictions, attribution and metrics.

In run r all classifiers of equal width start from the same weights, and see the same minibatches and dropout masks.

Shape letters: M models, R distinct runs, S input sources, N samples, B minibatch, F features, H hidden, C classes,
V and T validation and test rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.columns import Held, without_masked
from training.stacks import (
    NUMBERS_AT_ONCE,
    Minibatches,
    Schedule,
    Split,
    Stored,
    dropout_masks,
    gather,
    rows_at_once,
    stream,
    train,
)

HIDDEN = (512, 512, 512)
DROPOUT = 0.3
FEW_COLUMNS = 16  # a product with fewer columns takes a CPU longer than its transpose and a copy


@dataclass(frozen=True)
class Models:
    """The classifiers of a stack: model m reads columns ``live[m]`` of ``source[m]`` in run ``run[m]``.

    ``source`` int64[M] and ``run`` int64[M]; ``live`` bool[M, F], None for all columns.
    """

    source: Tensor
    run: Tensor
    live: Tensor | None = None

    def take(self, index: Tensor) -> Models:
        """Return the models at these positions, in this order."""
        return Models(self.source[index], self.run[index], None if self.live is None else self.live[index])


def initial_weights(
    models: Models,
    features: int,
    widths: tuple[int, ...],
    seed: int,
    like: Tensor,
    columns: Tensor | None = None,
) -> dict[str, Tensor]:
    """Draw the initial parameters of a stack: torch's default for a linear layer, U(-1/sqrt(in), 1/sqrt(in)).

    ``in`` of the first layer is the number of *live* inputs, and feature j takes the j-th draw of its own stream: a
    masked input and a left-out column then give the same model, whose hidden layers do not depend on the width.
    Numbers are drawn on the device, which holds the draw of one run beside the parameters.

    Args:
        models: The runs and live columns, of all inputs.
        features: F.
        widths: Of the layers, the output layer too.
        seed: Of all streams.
        like: Has the device and the type of the parameters.
        columns: Inputs that are not left out, K of them, bool[F]; None: all. See `training.columns`.

    Returns:
        ``weight0`` float[M, K, H], ``bias0`` float[M, 1, H], and so on up to the output layer.
    """
    how = {"device": like.device, "dtype": like.dtype}
    runs, position = torch.unique(models.run, return_inverse=True)
    params: dict[str, Tensor] = {}
    for number, run in enumerate(runs.tolist()):
        first, hidden = (stream(seed, run, purpose, device=like.device) for purpose in ("first layer", "hidden init"))
        members = (position == number).nonzero().squeeze(1).to(like.device)
        for layer, (fan_in, fan_out) in enumerate(zip((features, *widths), widths, strict=False)):
            for name, generator, rows in (
                (f"weight{layer}", hidden if layer else first, fan_in),
                (f"bias{layer}", hidden, 1),
            ):
                draw = torch.empty(rows, fan_out, **how).uniform_(-1, 1, generator=generator)
                if layer:
                    draw *= fan_in**-0.5
                elif name == "weight0" and columns is not None:
                    draw = draw[columns]
                if name not in params:
                    params[name] = torch.empty(len(position), *draw.shape, **how)
                params[name][members] = draw
    live = torch.ones(len(position), features, **how) if models.live is None else models.live.to(**how)
    scale = live.sum(1).rsqrt()[:, None, None]  # (M, 1, 1)
    params["weight0"] *= (live if columns is None else live[:, columns])[:, :, None] * scale
    params["bias0"] *= scale
    return params


def logits(params: dict[str, Tensor], x: Tensor, masks: Tensor | None = None) -> Tensor:
    """Apply the ReLU MLP of every model: x float[M, B, F] -> float[M, B, C].

    In training, ``masks`` float[layers, M or 1, B, H] multiplies the hidden activations (inverted dropout).
    """
    layers, activation = len(params) // 2, x
    for layer in range(layers):
        activation = torch.baddbmm(params[f"bias{layer}"], activation, params[f"weight{layer}"])  # (M, B, H or C)
        if layer < layers - 1:
            activation = activation.relu_()
            if masks is not None:
                activation = activation * masks[layer]
    return activation


class ClassifierStack:
    """M multilayer perceptrons on rows of shared inputs: hidden ReLU layers with dropout, softmax, cross-entropy.

    Args:
        x: Standardised inputs, float[S, N, K], or `Stored`.
        y: Class of each sample, int64[N].
        split: Train and validation rows; the test rows are not read.
        models: The inputs and the run of each model.
        num_classes: C.
        seed: Of all streams.
        hidden: Widths of the hidden layers, all equal.
        dropout: Probability of dropping a hidden activation.
        batch_size: Rows in a minibatch; the last one of an epoch may be smaller.
        columns: Those of the F inputs that are columns of x, bool[F]; None: all. See `training.columns`.
        few_columns: Columns of a weight gradient below which a CPU computes its transpose, and copies it.
    """

    def __init__(
        self,
        x: Tensor | Stored,
        y: Tensor,
        split: Split,
        models: Models,
        num_classes: int,
        *,
        seed: int,
        hidden: tuple[int, ...] = HIDDEN,
        dropout: float = DROPOUT,
        batch_size: int = 32,
        columns: Tensor | None = None,
        few_columns: int = FEW_COLUMNS,
    ):
        self.x, self.y, self.split = x, y, split
        self.num_classes, self.seed = num_classes, seed
        self.hidden, self.dropout = hidden, dropout
        self.batch_size = batch_size
        self.few_columns = few_columns if x.device.type == "cpu" else 0
        features = x.shape[2] if columns is None else len(columns)
        self.params = initial_weights(models, features, (*hidden, num_classes), seed, x, columns)
        if columns is not None and models.live is not None:
            models = replace(models, live=models.live[:, columns.to(models.live.device)])
        self.models = models
        self.buffers: dict[str, Tensor] = {}
        self.generators: tuple[torch.Generator, ...] = ()
        self._place()

    def _place(self) -> None:
        """Put what each step needs on the device: sources, live columns, positions of runs, memory for gradients."""
        device = self.x.device
        self.runs, position = torch.unique(self.models.run, return_inverse=True)
        self.position, self.source = position.to(device), self.models.source.to(device)
        self.kept_gradients = {name: torch.empty_like(parameter) for name, parameter in self.params.items()}
        self.kept_layers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # by rows of a minibatch
        numbers = len(self.hidden) * self.hidden[0]
        bits = {"dropout": lambda rows: rows * numbers} if self.dropout else {}
        self.minibatches = Minibatches(self.split.train, self.batch_size, self.seed, self.runs.tolist(), bits)
        live = self.models.live
        self.live = None if live is None or live.all() else live.to(device, self.x.dtype)[:, None]  # (M, 1, F)

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        self.models = self.models.take(index)
        index = index.to(self.x.device)
        self.params = {name: parameter[index] for name, parameter in self.params.items()}
        self._place()

    def begin(self, epoch: int) -> Iterator[list[int]]:
        """Draw an epoch; see `Minibatches.begin`."""
        return self.minibatches.begin(epoch)

    def gradients(self, size: int) -> list[Tensor]:
        """Return gradients of the models' mean cross-entropy over the next minibatch, in the order of each run."""
        return self.backpropagate(*self.minibatch(size))

    def minibatch(self, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the next one: inputs float[M, B, F], classes int64[M, B] and masks float[layers, M or 1, B, H]."""
        rows, bits = self.minibatches.next(size)
        masks = None
        if self.dropout:
            drawn = bits["dropout"].unflatten(1, (len(self.hidden), size, self.hidden[0]))
            masks = dropout_masks(self.dropout, drawn, self.x.dtype)
            masks = masks.transpose(0, 1)  # (layers, R, B, H)
            masks = masks if len(self.runs) == 1 else masks[:, self.position]
        rows = rows[self.position]  # (M, B)
        return self.inputs(rows), self.y[rows], masks

    def inputs(self, rows: Tensor) -> Tensor:
        """Return what each model reads of its rows, int64[M, B] -> float[M, B, F]."""
        x = gather(self.x, self.source, rows)
        return x if self.live is None else x * self.live

    def backpropagate(self, x: Tensor, y: Tensor, masks: Tensor | None) -> list[Tensor]:
        """Compute the gradient of the sum of the models' mean cross-entropies, for each of ``params``.

        The same as autograd's for `logits`, by hand, so that gradients, activations and errors are written where the
        step before left its own: memory handed out anew at each step takes a CPU longer to map than to fill, but for
        the little of a layer with few columns.
        """
        weights = [self.params[f"weight{layer}"] for layer in range(len(self.hidden) + 1)]
        outputs, errors = self._memory_for(x.shape[1])
        gradients = self.kept_gradients
        inputs = [x]
        for layer, (weight, out) in enumerate(zip(weights, outputs, strict=True)):
            activation = torch.baddbmm(self.params[f"bias{layer}"], inputs[layer], weight, out=out)  # (M, B, H or C)
            if layer < len(self.hidden):
                activation.relu_()
                if masks is not None:
                    activation.mul_(masks[layer])
                inputs.append(activation)
        error = torch.softmax(activation, 2)  # (M, B, C)
        error.scatter_add_(2, y[:, :, None], error.new_full((1, 1, 1), -1.0).expand(*y.shape, 1)).div_(x.shape[1])
        for layer in reversed(range(len(weights))):
            if weights[layer].shape[2] < self.few_columns:
                gradients[f"weight{layer}"].copy_(torch.bmm(error.mT, inputs[layer]).mT)
            else:
                torch.bmm(inputs[layer].mT, error, out=gradients[f"weight{layer}"])
            torch.sum(error, 1, keepdim=True, out=gradients[f"bias{layer}"])
            if layer > 0:
                error = torch.bmm(error, weights[layer].mT, out=errors[layer - 1])  # (M, B, H)
                passed = inputs[layer].sign_()  # the activation is used up: its sign is what ReLU and dropout let pass
                error.mul_(passed if masks is None else passed.mul_(masks[layer - 1]))
        return list(gradients.values())

    def _memory_for(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return memory for each layer's output float[M, rows, H or C] and the errors below, float[M, rows, H]."""
        if rows not in self.kept_layers:
            models, like = len(self.source), self.params["weight0"]
            outputs = [like.new_empty(models, rows, width) for width in (*self.hidden, self.num_classes)]
            self.kept_layers[rows] = outputs, [like.new_empty(models, rows, width) for width in self.hidden]
        return self.kept_layers[rows]

    def validation_losses(self) -> Tensor:
        """Return the mean cross-entropy over the validation rows, [M]."""
        rows = self.split.validation
        scores = predict_logits(self.params, self.x, self.source, rows)  # (M, V, C)
        return log_losses(scores, self.y[rows]).mean(1)


def log_losses(scores: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each model and row: scores float[M, n, C], classes int64[n] -> float[M, n]."""
    truth = y.expand(len(scores), -1)
    return functional.cross_entropy(scores.flatten(0, 1), truth.flatten(), reduction="none").view(truth.shape)


def predict_logits(
    params: dict[str, Tensor],
    x: Tensor | Stored,
    source: Tensor,
    rows: Tensor,
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> Tensor:
    """Compute scores float[M, n, C] of the given rows, in evaluation mode.

    Dead columns need no mask here: their first-layer weights are 0 from the start and never move. The rows go through
    in slices of ``numbers_at_once``, so that the copies of a wide input stay small.
    """
    length = rows_at_once(len(source) * max(x.shape[2], params["weight0"].shape[2]), numbers_at_once, x.device)
    return torch.cat([logits(params, gather(x, source, part[None])) for part in rows.split(length)], dim=1)


def attribution(
    params: dict[str, Tensor],
    x: Tensor | Stored,
    source: Tensor,
    rows: Tensor,
    block: int,
    columns: Tensor | None = None,
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> Tensor:
    """Compute how much each block of inputs moves the score of the predicted class: gradient times input, summed.

    ``mean over rows of |sum over the block of x_j · d score / d x_j|`` (gradient x input: Shrikumar et al., 2016), in
    evaluation mode. Masked inputs have weight 0, and so no share; nor have inputs that are left out.

    Args:
        params: Of the stack, see `logits`.
        x: Standardised inputs, float[S, N, K], or `Stored`.
        source: Of each model, int64[M].
        rows: Row indices, int64[n].
        block: Consecutive inputs that belong together; F is a multiple of it.
        columns: Those of the F inputs that are columns of x, bool[F]; None: all.
        numbers_at_once: Numbers of the inputs or of a layer to work on at a time.

    Returns:
        float[M, F / block].
    """
    total, features = 0.0, x.shape[2] if columns is None else len(columns)
    length = rows_at_once(len(source) * max(features, params["weight0"].shape[2]), numbers_at_once, x.device)
    for part in rows.split(length):
        inputs = gather(x, source, part[None]).requires_grad_()  # (M, n, K)
        (gradient,) = torch.autograd.grad(logits(params, inputs).amax(2).sum(), inputs)
        product = (gradient * inputs).detach()
        if columns is not None:
            whole = product.new_zeros(*product.shape[:2], features)
            whole[:, :, columns] = product
            product = whole
        total = total + product.unflatten(2, (-1, block)).sum(3).abs().sum(1)
    return total / len(rows)


def train_classifiers(
    x: Tensor | Stored | Held,
    y: Tensor,
    split: Split,
    models: Models,
    num_classes: int,
    *,
    schedule: Schedule,
    seed: int,
    block: int | None = None,
    dropout: float = DROPOUT,
) -> dict[str, np.ndarray]:
    """Train a stack of classifiers and return what each of them predicts.

    Args:
        x: Standardised inputs on the training device, float[S, N, F], `Stored`, or `Held` in part. Columns that no
            model sees are left out.
        y: Class of each sample, same device, int64[N].
        split: Rows to train on, to stop early by, and to test on; same device.
        models: The inputs and the run of each model.
        num_classes: C.
        schedule: Hidden widths (None: `HIDDEN`), epochs, patience, learning rate.
        seed: Of all random streams.
        block: Inputs of a layer, for each layer's `attribution` on the test rows; None: no attribution.
        dropout: Probability of dropping a hidden activation.

    Returns:
        Arrays by name. ``predicted`` int32[M, V + T] and ``log_loss`` float32[M, V + T] of the validation rows, then
        the test rows; ``train_accuracy``, ``train_f1`` float64[M]; ``epochs``, ``best_epoch`` int64[M];
        ``validation_loss`` float64[M] at the best epoch; with ``block``, ``attribution`` float32[M, F / block].
    """
    hidden = schedule.hidden or HIDDEN
    x, columns = without_masked(x, models.live)
    network = {"hidden": hidden, "dropout": dropout, "batch_size": schedule.batch_size, "columns": columns}
    trained = train(ClassifierStack(x, y, split, models, num_classes, seed=seed, **network), schedule)
    arrays = {
        "epochs": trained.epochs.numpy(),
        "best_epoch": trained.best_epoch.numpy(),
        "validation_loss": trained.best_loss.numpy(),
    }
    arrays |= predictions(trained.state, x, y, split, models.source.to(x.device))
    if block is not None:
        shares = attribution(trained.state, x, models.source.to(x.device), split.test, block, columns)
        arrays["attribution"] = shares.float().cpu().numpy()
    return arrays


def predictions(
    params: dict[str, Tensor],
    x: Tensor | Stored,
    y: Tensor,
    split: Split,
    source: Tensor,
    predict: Callable[[dict[str, Tensor], Tensor | Stored, Tensor, Tensor], Tensor] = predict_logits,
) -> dict[str, np.ndarray]:
    """Predict all rows: classes and log-losses of rows held out, metrics of train rows; see `train_classifiers`.

    ``predict`` is `predict_logits`, or what takes its place for another network.
    """
    held_out = torch.cat([split.validation, split.test])
    scores = predict(params, x, source, held_out)  # (M, V + T, C)
    fitted = predict(params, x, source, split.train)  # (M, n, C)
    truth = y[split.train].cpu().numpy()
    train_accuracy, train_f1 = scored(truth, fitted.argmax(2).cpu().numpy(), num_classes=fitted.shape[2])
    return {
        "predicted": scores.argmax(2).int().cpu().numpy(),
        "log_loss": log_losses(scores, y[held_out]).float().cpu().numpy(),
        "train_accuracy": train_accuracy,
        "train_f1": train_f1,
    }


def scored(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute accuracy and macro-F1, float64[M] each, of predicted classes int[M, n] against the truth int[n].

    F1 of a class is 2·hits / (present + predicted), macro-F1 its mean over all classes; a class that is neither present
    nor predicted counts as 0. As scikit-learn's `accuracy_score` and `f1_score`, for all models at once: one by one
    they take longer than a GPU takes to train the models.
    """

    def counts(chosen: np.ndarray, classes: np.ndarray) -> np.ndarray:
        cell = np.arange(len(predicted))[:, None] * num_classes + classes  # (M, n)
        return np.bincount(cell[chosen], minlength=len(predicted) * num_classes).reshape(-1, num_classes)  # (M, C)

    right, all_rows = predicted == truth, np.ones(predicted.shape, bool)
    hits = counts(right, predicted)
    present_or_predicted = counts(all_rows, predicted) + np.bincount(truth, minlength=num_classes)
    return right.mean(1), (2 * hits / np.maximum(present_or_predicted, 1)).mean(1)
