"""The representation ``update_attention``: gated attention over modules, many networks at once, and their read-outs.

A token describes the update of one module by `COORDINATES` coordinates f of kernel PCA and the logarithm s of its norm,
both standardised on train rows; 0 for a zero update. The network of one model:

    h_m = Dropout(GELU(LayerNorm(f_m W_m) + g_m(s_m) + e_m))
    a = softmax over modules of w^T (tanh(V h_m) * sigmoid(U h_m))
    scores = sum_m a_m H h_m + b

so a_m H_c h_m is exactly what module m adds to the score of class c. ("Attention-based deep multiple instance
learning", Ilse, Tomczak & Welling, 2018; one head.) Each module has its own W, g (one hidden layer) and e. LayerNorm
has no parameters: e shifts, W scales.

A removed module has the score -1e9 before the softmax and so attention 0: its token has no influence, on training
either. Where all modules are removed, all attention is 0 and the scores are b: what is known without any module.

In run r all models start from the same weights and see the same minibatches and dropout masks, whatever modules are
removed. In training further modules are masked at random for each row (module dropout), but never all.

Kernel PCA is fitted on all train rows of at most `EXACT` LoRAs, beyond on `LANDMARKS` drawn from them.

Shape letters: M models, R distinct runs, N LoRAs, n rows, P modules, B minibatch, D numbers of a token, H hidden,
C classes, O orders, K counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.classifier import Models, log_losses, predictions
from training.kernels import ROUNDING
from training.stacks import (
    NUMBERS_AT_ONCE,
    Minibatches,
    Schedule,
    Split,
    dropout_masks,
    gather,
    rows_at_once,
    standardise,
    stream,
    train,
)

if TYPE_CHECKING:  # imported where it is called
    from sklearn.preprocessing import KernelCenterer

COORDINATES = 32
TOKEN = COORDINATES + 1  # and the norm
EXACT, LANDMARKS = 2_000, 1_000

HIDDEN = 64  # of the modules' vectors and of the gate
NORM_HIDDEN = 16
DROPOUT, MODULE_DROPOUT = 0.2, 0.2
LABEL_SMOOTHING = 0.05
MASKED = -1e9
PARAMETERS = "parameters."  # before the names of parameters among the arrays of `train_attention`
NORM_EPS = 1e-5  # torch's default
SCHEDULE = Schedule(max_epochs=200, patience=20, batch_size=32, lr=1e-3, weight_decay=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens
# ----------------------------------------------------------------------------------------------------------------------


def module_tokens(
    kernel: np.ndarray,
    train: np.ndarray,
    columns: np.ndarray,
    norm: np.ndarray,
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> np.ndarray:
    """Describe the update of one module in each LoRA by kernel PCA and its norm; only train rows decide how.

    Kernel PCA ("Nonlinear component analysis as a kernel eigenvalue problem", Schölkopf, Smola & Müller, 1998) on the
    LoRAs of the columns. Components that are not there, or rounding only, are 0. Zero updates are left out of all that
    is fitted, and described by zeros.

    Args:
        kernel: Of each LoRA with those of the columns, float32[N, n].
        train: Train rows, int64.
        columns: The LoRAs of the columns, all train rows or some of them, int64[n].
        norm: Of each update, float[N].
        numbers_at_once: Numbers of the kernel to work on at a time.

    Returns:
        Coordinates, then the logarithm of the norm, standardised and clipped; float32[N, 33].
    """
    tokens = np.zeros((len(kernel), TOKEN))
    updated = norm > 0
    rows, train, fitted = np.flatnonzero(updated), train[updated[train]], np.flatnonzero(updated[columns])
    if len(train) and len(fitted):
        tokens[rows, :COORDINATES] = _kernel_pca(kernel, rows, columns, fitted, numbers_at_once)
        tokens[rows, COORDINATES] = np.log(norm[rows].astype(np.float64))
        tokens[rows] = standardise(torch.from_numpy(tokens), torch.from_numpy(train)).numpy()[rows]
    return tokens.astype(np.float32)


def _kernel_pca(
    kernel: np.ndarray, rows: np.ndarray, columns: np.ndarray, fitted: np.ndarray, numbers_at_once: int
) -> np.ndarray:
    """Return the coordinates of rows int64[k] along the first components of the columns ``fitted``, float64[k, 32].

    As scikit-learn's `KernelPCA`, which would refuse a kernel whose eigenvalues are below 0 by rounding of float32.
    """
    own = kernel[np.ix_(columns[fitted], fitted)].astype(np.float64)
    centerer, vectors = components(own)
    coordinates = np.zeros((len(rows), COORDINATES))
    length = rows_at_once(len(own), numbers_at_once)
    for start in range(0, len(rows), length):
        block = kernel[np.ix_(rows[start : start + length], fitted)].astype(np.float64)
        coordinates[start : start + length, : vectors.shape[1]] = centerer.transform(block, copy=False) @ vectors
    return coordinates


def components(own: np.ndarray) -> tuple[KernelCenterer, np.ndarray]:
    """Return what centres rows of a kernel float64[n, n], and their map to coordinates, float64[n, at most 32]."""
    from scipy.linalg import eigh  # these take a second, which workers that only train networks do not need
    from sklearn.preprocessing import KernelCenterer

    centerer = KernelCenterer().fit(own)
    largest = [max(0, len(own) - COORDINATES), len(own) - 1]
    values, vectors = eigh(centerer.transform(own), subset_by_index=largest)
    # Rounding of n x n entries has eigenvalues of the order of sqrt(n).
    sound = np.flatnonzero(values > ROUNDING * math.sqrt(len(own)) * np.diag(own).mean())[::-1]
    vectors = vectors[:, sound] / np.sqrt(values[sound])
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(len(sound))])  # eigenvectors have no sign
    return centerer, vectors


# ----------------------------------------------------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------------------------------------------------


OF_MODULES = ("token_weight", "norm_weight0", "norm_bias0", "norm_weight1", "embedding")


def parameter_shapes(modules: int, num_classes: int, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one model's parameters, by name, in the order in which they are drawn."""
    return {
        "token_weight": (modules, COORDINATES, hidden),  # W
        "norm_weight0": (modules, 1, NORM_HIDDEN),  # g
        "norm_bias0": (modules, 1, NORM_HIDDEN),
        "norm_weight1": (modules, NORM_HIDDEN, hidden),
        "embedding": (modules, 1, hidden),  # e
        "gate_tanh": (hidden, hidden),  # V
        "gate_sigmoid": (hidden, hidden),  # U
        "gate_score": (hidden, 1),  # w
        "class_weight": (hidden, num_classes),  # H
        "class_bias": (1, num_classes),  # b
    }


def count_parameters(modules: int, num_classes: int, hidden: int = HIDDEN) -> int:
    """Return the number of parameters of one model."""
    return sum(math.prod(shape) for shape in parameter_shapes(modules, num_classes, hidden).values())


def initial_parameters(
    models: Models, modules: int, num_classes: int, hidden: int, seed: int, like: Tensor
) -> dict[str, Tensor]:
    """Draw the initial parameters of a stack, [M, ...]: U(-1/sqrt(in), 1/sqrt(in)), torch's default for a linear layer.

    A bias or embedding has the ``in`` of the products it is added to. Which modules are removed has no influence.
    """
    fan_in = {"norm_bias0": 1, "embedding": NORM_HIDDEN, "class_bias": hidden}
    runs, position = torch.unique(models.run, return_inverse=True)
    position = position.to(like.device)
    how = {"device": like.device, "dtype": like.dtype}
    params = {}
    for name, shape in parameter_shapes(modules, num_classes, hidden).items():
        scale = fan_in.get(name, shape[-2]) ** -0.5
        generators = [stream(seed, run, "attention init", name, device=like.device) for run in runs.tolist()]
        draws = torch.stack([torch.rand(shape, generator=generator, **how) for generator in generators])
        params[name] = draws.mul_(2).sub_(1).mul_(scale)[position]
    return params


def hidden_vectors(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute the vector h of each module, without dropout: x float[M, B, P * D] -> float[M, P, B, H]."""
    models, modules, _, hidden = params["token_weight"].shape
    tokens = x.unflatten(2, (modules, TOKEN)).transpose(1, 2).flatten(0, 1)  # (M * P, B, D)
    each = {name: params[name].flatten(0, 1) for name in OF_MODULES}  # (M * P, ...)
    projected = torch.bmm(tokens[..., :COORDINATES], each["token_weight"])  # (M * P, B, H)
    path = functional.gelu(torch.addcmul(each["norm_bias0"], tokens[..., COORDINATES:], each["norm_weight0"]))
    added = torch.baddbmm(each["embedding"], path, each["norm_weight1"])
    return functional.gelu(functional.layer_norm(projected, (hidden,), eps=NORM_EPS) + added).unflatten(
        0, (models, modules)
    )


def gate_scores(params: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Compute what the softmax over modules is taken of: hidden float[M, P, B, H] -> float[M, P, B]."""
    vectors = hidden.flatten(1, 2)  # (M, P * B, H)
    gated = torch.tanh(vectors @ params["gate_tanh"]) * torch.sigmoid(vectors @ params["gate_sigmoid"])
    return (gated @ params["gate_score"]).view(hidden.shape[:3])


def attention_of(scores: Tensor, kept: Tensor | None) -> Tensor:
    """Return the attention of each module, float[M, P, B]; of removed modules 0.

    Args:
        scores: See `gate_scores`.
        kept: Modules that are not removed, bool[M or 1, P, B or 1]; None: all.
    """
    if kept is None:
        return torch.softmax(scores, 1)
    return torch.softmax(scores.masked_fill(~kept, MASKED), 1) * kept


def logits(params: dict[str, Tensor], x: Tensor, kept: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
    """Compute the scores of the classes: x float[M, B, P * D] -> float[M, B, C].

    Args:
        params: See `parameter_shapes`, each [M, ...].
        x: Tokens, module by module.
        kept: See `attention_of`.
        masks: Of inverted dropout, float[M or 1, P, B, H]; None in evaluation mode.
    """
    hidden = hidden_vectors(params, x)
    if masks is not None:
        hidden = hidden * masks
    attention = attention_of(gate_scores(params, hidden), kept)  # (M, P, B)
    pooled = (attention[..., None] * hidden).sum(1)  # (M, B, H)
    return torch.baddbmm(params["class_bias"], pooled, params["class_weight"])


def predict_logits(
    params: dict[str, Tensor],
    x: Tensor,
    source: Tensor,
    rows: Tensor,
    live: Tensor | None = None,
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> Tensor:
    """Compute scores float[M, n, C] of rows int64[n] in evaluation mode, in blocks; live bool[M, P], None for all."""
    kept = None if live is None else live[..., None]
    parts = rows.split(_block_length(params, numbers_at_once))
    return torch.cat([logits(params, gather(x, source, part[None]), kept) for part in parts], dim=1)


def _block_length(params: dict[str, Tensor], numbers_at_once: int) -> int:
    """Return how many rows to work on at a time."""
    models, modules, _, hidden = params["token_weight"].shape
    return rows_at_once(models * modules * max(TOKEN, 2 * hidden), numbers_at_once, params["token_weight"].device)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients by hand
# ----------------------------------------------------------------------------------------------------------------------


def loss_gradients(
    params: dict[str, Tensor], x: Tensor, y: Tensor, kept: Tensor | None, masks: Tensor | None
) -> list[Tensor]:
    """Compute the gradient of the sum of the models' mean training losses, for each of ``params``.

    The same as autograd's for `logits` and cross-entropy with label smoothing, in two thirds to four fifths of the
    time on a CPU: fewer operations, many of them in place.

    Args:
        params: See `parameter_shapes`, each [M, ...].
        x: Tokens, float[M, B, P * D].
        y: Classes, int64[M, B].
        kept: See `attention_of`.
        masks: See `logits`.
    """
    models, modules, _, width = params["token_weight"].shape
    each = {name: params[name].flatten(0, 1) for name in OF_MODULES}  # (M * P, ...)
    tokens = x.unflatten(2, (modules, TOKEN)).transpose(1, 2).flatten(0, 1)  # (M * P, B, D)
    coordinates, norm = tokens[..., :COORDINATES], tokens[..., COORDINATES:]
    projected = torch.bmm(coordinates, each["token_weight"])  # (M * P, B, H)
    normal, mean, inverse = torch.native_layer_norm(projected, (width,), None, None, NORM_EPS)
    path = torch.addcmul(each["norm_bias0"], norm, each["norm_weight0"])  # (M * P, B, 16)
    active = functional.gelu(path)
    total = torch.baddbmm(normal.add_(each["embedding"]), active, each["norm_weight1"])  # (M * P, B, H)
    hidden = functional.gelu(total).unflatten(0, (models, modules))
    if masks is not None:
        hidden.mul_(masks)

    error, gradients = _pool_gradients(params, hidden, y, kept)  # (M, P, B, H)
    if masks is not None:
        error.mul_(masks)
    error = torch.ops.aten.gelu_backward(error.flatten(0, 1), total)
    gradients["embedding"] = error.sum(1, keepdim=True)
    gradients["norm_weight1"] = torch.bmm(active.mT, error)
    path_error = torch.ops.aten.gelu_backward(torch.bmm(error, each["norm_weight1"].mT), path)
    gradients["norm_bias0"] = path_error.sum(1, keepdim=True)
    gradients["norm_weight0"] = torch.bmm(norm.mT, path_error)
    error, _, _ = torch.ops.aten.native_layer_norm_backward(
        error, projected, (width,), mean, inverse, None, None, (True, False, False)
    )
    gradients["token_weight"] = torch.bmm(coordinates.mT, error)
    return [gradients[name].view_as(parameter) for name, parameter in params.items()]


def _pool_gradients(
    params: dict[str, Tensor], hidden: Tensor, y: Tensor, kept: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return gradients of the modules' vectors, float[M, P, B, H], and of the parameters of gate and classes by name.

    Args:
        params: See `parameter_shapes`.
        hidden: The modules' vectors h, float[M, P, B, H].
        y: Classes, int64[M, B].
        kept: See `attention_of`.
    """
    vectors = hidden.flatten(1, 2)  # (M, P * B, H)
    tanh = torch.bmm(vectors, params["gate_tanh"]).mul_(2).sigmoid_().mul_(2).sub_(1)  # a fourth of the time of tanh_
    sigmoid = torch.bmm(vectors, params["gate_sigmoid"]).sigmoid_()
    gate = tanh * sigmoid
    attention = attention_of(torch.bmm(gate, params["gate_score"]).view(hidden.shape[:3]), kept)  # (M, P, B)
    product = attention[..., None] * hidden
    pooled = product.sum(1)  # (M, B, H)

    error = torch.softmax(torch.baddbmm(params["class_bias"], pooled, params["class_weight"]), 2)  # (M, B, C)
    error.sub_(LABEL_SMOOTHING / error.shape[2])
    error.scatter_add_(2, y[..., None], error.new_full((1, 1, 1), LABEL_SMOOTHING - 1).expand(*y.shape, 1))
    error.div_(y.shape[1])
    gradients = {"class_weight": torch.bmm(pooled.mT, error), "class_bias": error.sum(1, keepdim=True)}
    error = torch.bmm(error, params["class_weight"].mT)[:, None]  # (M, 1, B, H)

    share = torch.mul(hidden, error, out=product).sum(3)  # (M, P, B), of the attention; below of the gate's scores
    share = share.sub_((attention * share).sum(1, keepdim=True)).mul_(attention).view(len(hidden), -1, 1)
    gradients["gate_score"] = torch.bmm(gate.mT, share)
    gate_error = share * params["gate_score"].mT  # (M, P * B, H)
    tanh_error = torch.addcmul(sigmoid, gate, tanh, value=-1).mul_(gate_error)  # sigmoid (1 - tanh^2)
    sigmoid_error = torch.addcmul(gate, gate, sigmoid, value=-1).mul_(gate_error)  # tanh sigmoid (1 - sigmoid)
    gradients["gate_tanh"] = torch.bmm(vectors.mT, tanh_error)
    gradients["gate_sigmoid"] = torch.bmm(vectors.mT, sigmoid_error)
    below = torch.mul(attention[..., None], error, out=product).flatten(1, 2)  # (M, P * B, H)
    below.baddbmm_(tanh_error, params["gate_tanh"].mT).baddbmm_(sigmoid_error, params["gate_sigmoid"].mT)
    return below.view_as(hidden), gradients


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class AttentionStack:
    """M networks on the tokens of the same LoRAs; trained by `training.stacks.train`.

    Args:
        x: Tokens, float[1, N, P * D].
        y: Class of each LoRA, int64[N].
        split: Train and validation rows; the test rows are not read.
        models: The run and the modules of each model, ``live`` bool[M, P].
        num_classes: C.
        seed: Of all streams.
        hidden: Width of the modules' vectors and of the gate.
        dropout: Probability of dropping a number of a module's vector.
        module_dropout: Probability of masking a module, for each row.
        batch_size: Rows in a minibatch; the last one of an epoch may be smaller.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        split: Split,
        models: Models,
        num_classes: int,
        *,
        seed: int,
        hidden: int = HIDDEN,
        dropout: float = DROPOUT,
        module_dropout: float = MODULE_DROPOUT,
        batch_size: int = 32,
    ):
        self.x, self.y, self.split, self.models = x, y, split, models
        self.seed, self.batch_size = seed, batch_size
        self.dropout, self.module_dropout = dropout, module_dropout
        self.modules, self.hidden = x.shape[2] // TOKEN, hidden
        self.params = initial_parameters(models, self.modules, num_classes, hidden, seed, like=x)
        self.buffers: dict[str, Tensor] = {}
        self.generators: tuple[torch.Generator, ...] = ()
        self._place()

    def _place(self) -> None:
        """Put what each step needs on the device: sources, positions of runs, live modules."""
        device, live = self.x.device, self.models.live
        self.runs, position = torch.unique(self.models.run, return_inverse=True)
        self.position, self.source = position.to(device), self.models.source.to(device)
        self.live = None if live is None or live.all() else live.to(device)  # (M, P)
        modules, hidden, bits = self.modules, self.hidden, {}  # no reference to this object: that would be a cycle
        if self.dropout:
            bits["dropout"] = lambda rows: rows * modules * hidden
        if self.module_dropout:
            bits["module dropout"] = lambda rows: rows * modules
        self.minibatches = Minibatches(self.split.train, self.batch_size, self.seed, self.runs.tolist(), bits)

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
        """Return gradients of the models' training losses over the next minibatch."""
        rows, kept, masks = self.minibatch(size)
        return loss_gradients(self.params, gather(self.x, self.source, rows), self.y[rows], kept, masks)

    def minibatch(self, size: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the next one: rows int64[M, B], modules kept bool[M or 1, P, B or 1], masks float[M or 1, P, B, H]."""
        rows, bits = self.minibatches.next(size)
        shape = (self.modules, size)
        masks = self._of_models(self.dropout, bits.get("dropout"), (*shape, self.hidden))
        drawn = self._of_models(self.module_dropout, bits.get("module dropout"), shape)
        return rows[self.position], self._kept(drawn), masks

    def _of_models(self, rate: float, bits: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """Return the dropout masks of the models, or the only ones, of bits int16[R, .]; None for rate 0."""
        if bits is None:
            return None
        masks = dropout_masks(rate, bits.unflatten(1, shape), self.x.dtype)
        return masks if len(masks) == 1 else masks[self.position]

    def _kept(self, drawn: Tensor | None) -> Tensor | None:
        """Return the modules that are live and not dropped, bool[M or 1, P, B or 1]; if none is left, the live ones."""
        live = None if self.live is None else self.live[..., None]  # (M, P, 1)
        if drawn is None:
            return live
        kept = drawn > 0 if live is None else (drawn > 0) & live
        none_left = ~kept.any(1, keepdim=True)
        return kept | (none_left if live is None else none_left & live)

    def validation_losses(self) -> Tensor:
        """Return the mean cross-entropy over the validation rows, [M], without label smoothing."""
        rows = self.split.validation
        scores = predict_logits(self.params, self.x, self.source, rows, self.live)  # (M, V, C)
        return log_losses(scores, self.y[rows]).mean(1)


def train_attention(
    x: Tensor,
    y: Tensor,
    split: Split,
    models: Models,
    num_classes: int,
    *,
    schedule: Schedule = SCHEDULE,
    seed: int,
    keep_parameters: bool = True,
) -> dict[str, np.ndarray]:
    """Train a stack of networks and return what each of them predicts.

    Args:
        x: Tokens on the training device, float[1, N, P * D].
        y: Class of each LoRA, same device, int64[N].
        split: Rows to train on, to stop early by, and to test on; same device.
        models: The run of each model and its modules, ``live`` bool[M, P]; None for all.
        num_classes: C.
        schedule: Hidden width (None: `HIDDEN`), epochs, patience, learning rate, weight decay (of all parameters).
        seed: Of all random streams.
        keep_parameters: Whether to return the parameters, for `read_out` and `deletion`.

    Returns:
        As `training.classifier.train_classifiers`: ``predicted``, ``log_loss``, ``train_accuracy``, ``train_f1``,
        ``epochs``, ``best_epoch``, ``validation_loss``; with ``keep_parameters`` also ``parameters.<name>``
        float32[M, ...] for the names of `parameter_shapes`.
    """
    (hidden,) = schedule.hidden or (HIDDEN,)
    network = {"hidden": hidden, "batch_size": schedule.batch_size}
    trained = train(AttentionStack(x, y, split, models, num_classes, seed=seed, **network), schedule)
    live = None if models.live is None else models.live.to(x.device)
    arrays = {
        "epochs": trained.epochs.numpy(),
        "best_epoch": trained.best_epoch.numpy(),
        "validation_loss": trained.best_loss.numpy(),
    }
    predict = partial(predict_logits, live=live)
    arrays |= predictions(trained.state, x, y, split, models.source.to(x.device), predict)
    if keep_parameters:
        arrays |= {f"{PARAMETERS}{name}": value.float().cpu().numpy() for name, value in trained.state.items()}
    return arrays


# ----------------------------------------------------------------------------------------------------------------------
# Read-outs
# ----------------------------------------------------------------------------------------------------------------------


def parameters_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the parameters among the arrays of `train_attention`, by the names of `parameter_shapes`."""
    named = {name: array for name, array in arrays.items() if name.startswith(PARAMETERS)}
    return {name.removeprefix(PARAMETERS): array for name, array in named.items()}


def read_out(
    parameters: dict[str, np.ndarray],
    x: Tensor,
    rows: Tensor,
    y: Tensor,
    live: Tensor | None = None,
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> dict[str, np.ndarray]:
    """Return which modules trained networks give attention to, in evaluation mode.

    Args:
        parameters: Of M models by the names of `parameter_shapes`, float[M, ...].
        x: Tokens, float[1, N, P * D].
        rows: Row indices, int64[n].
        y: Class of each LoRA, int64[N].
        live: Modules that the models were trained with, bool[M, P]; None for all.
        numbers_at_once: Numbers of the hidden layers to work on at a time.

    Returns:
        ``attention`` float32[M, n, P]; ``contribution`` float32[M, n, P], what a module adds to the score of the
        LoRA's own class less what it adds to the mean of all classes, a_m (H_y h_m - mean over c of H_c h_m);
        ``gradients`` float32[M, P], the mean over rows of |gradient of the predicted class's score x input, summed
        over the module's token| (gradient x input: Shrikumar et al., 2016).
    """
    params = _as_tensors(parameters, x)
    models, modules = params["token_weight"].shape[:2]
    kept = None if live is None else live.to(x.device)[..., None]
    centred = params["class_weight"] - params["class_weight"].mean(2, keepdim=True)  # (M, H, C)
    parts: dict[str, list[Tensor]] = {"attention": [], "contribution": []}
    gradients = 0.0
    for part in rows.split(_block_length(params, numbers_at_once)):
        inputs = gather(x, x.new_zeros(models, dtype=torch.int64), part[None]).requires_grad_()  # (M, n, P * D)
        hidden = hidden_vectors(params, inputs)  # (M, P, n, H)
        attention = attention_of(gate_scores(params, hidden), kept)  # (M, P, n)
        pooled = (attention[..., None] * hidden).sum(1)
        scores = torch.baddbmm(params["class_bias"], pooled, params["class_weight"])
        (gradient,) = torch.autograd.grad(scores.amax(2).sum(), inputs)
        share = (gradient * inputs).detach().unflatten(2, (modules, TOKEN)).sum(3)  # (M, n, P)
        gradients = gradients + share.abs().sum(1)
        own = centred.mT[:, y[part]]  # (M, n, H)
        added = attention * (hidden * own[:, None]).sum(3)  # (M, P, n)
        parts["attention"].append(attention.detach().transpose(1, 2))
        parts["contribution"].append(added.detach().transpose(1, 2))
    arrays = {name: torch.cat(blocks, dim=1).float().cpu().numpy() for name, blocks in parts.items()}
    return arrays | {"gradients": (gradients / len(rows)).float().cpu().numpy()}


@torch.no_grad()
def deletion(
    parameters: dict[str, np.ndarray],
    x: Tensor,
    rows: Tensor,
    orders: np.ndarray,
    counts: Sequence[int],
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> np.ndarray:
    """Predict with trained networks of which more and more modules are masked, in given orders.

    The one place where a network is masked that was trained with all modules: it answers what this network reads, not
    what the modules hold. Where all are masked, the network's bias predicts the same class for every LoRA.

    Args:
        parameters: As for `read_out`.
        x: Tokens, float[1, N, P * D].
        rows: Row indices, int64[n].
        orders: Modules in the order in which they are masked, int64[O, P].
        counts: How many are masked, each between 0 and P, K of them.
        numbers_at_once: Numbers of the hidden layers to work on at a time.

    Returns:
        Predicted classes, int32[M, O, K, n].
    """
    params = _as_tensors(parameters, x)
    source = x.new_zeros(len(params["class_bias"]), dtype=torch.int64)
    places = torch.as_tensor(np.asarray(orders), device=x.device).argsort(1)  # (O, P): when a module is masked
    kept = places[:, None] >= torch.as_tensor(counts, device=x.device)[:, None]  # (O, K, P)
    kept = kept.flatten(0, 1)[:, None]  # (O * K, 1, P)
    models, modules, _, hidden = params["token_weight"].shape
    widest = max(TOKEN, 2 * hidden, len(kept), params["class_bias"].shape[2])
    blocks = []
    for part in rows.split(rows_at_once(models * modules * widest, numbers_at_once, x.device)):
        vectors = hidden_vectors(params, gather(x, source, part[None]))  # (M, P, n, H)
        added = (vectors @ params["class_weight"][:, None]).transpose(1, 2)  # (M, n, P, C)
        scores = gate_scores(params, vectors).transpose(1, 2)[:, None]  # (M, 1, n, P)
        attention = torch.softmax(scores.masked_fill(~kept, MASKED), 3) * kept  # (M, O * K, n, P)
        total = attention.transpose(1, 2) @ added + params["class_bias"][:, None]  # (M, n, O * K, C)
        blocks.append(total.argmax(3).int())
    predicted = torch.cat(blocks, 1).transpose(1, 2)  # (M, O * K, n)
    return predicted.unflatten(1, (len(orders), len(counts))).cpu().numpy()


def _as_tensors(parameters: dict[str, np.ndarray], x: Tensor) -> dict[str, Tensor]:
    """Return parameters as tensors of the inputs' kind, in the order of `parameter_shapes`."""
    names = parameter_shapes(1, 1)
    return {name: torch.tensor(parameters[name], dtype=x.dtype, device=x.device) for name in names}
