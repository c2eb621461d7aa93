"""The learned representations: one autoencoder per layer, fitted on train rows, then applied to every row.

Autoencoders of layers of equal width are one stack (see training/stacks.py): every parameter has a leading model
axis, and all models of a stack share their initial weights, minibatches, noise and dropout masks.

A hidden block is a linear map, batch norm, ReLU and, where the kind has it, dropout. Widths, with ``in`` the number of
weights of the layer and ``latent`` as in `latent_width`:

    vae          in - 512 - 256 - (mean, log variance: latent) - 256 - 512 - in
    contrastive  in - 512 - 512 - latent - 512 - 512 - in;  projection head  latent - 64 - 64
    denoising    in - 512 - 256 - latent - 256 - 512 - in;  a skip over the second hidden block of either side

Another kind is a row of `AUTOENCODERS` and a loss function.

Shape letters: M models, N samples, B minibatch, D latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.stacks import (
    Minibatches,
    Schedule,
    Split,
    dropout_masks,
    gather,
    random_bits,
    rows_at_once,
    seed_of,
    stream,
    train,
)

KL_WEIGHT = 0.1
TEMPERATURE = 0.5
HEAD = 64
NORM_MOMENTUM, NORM_EPS = 0.1, 1e-5  # torch's defaults

# Layers that every kind has, and the named widths that they lead from and to; see `parameter_shapes`.
BLOCKS = {
    "encode0": ("in", "outer"),
    "encode1": ("outer", "inner"),
    "decode0": ("latent", "inner"),
    "decode1": ("inner", "outer"),
}
LINEAR = {"reconstruct": ("outer", "in"), "latent": ("inner", "latent")}


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Autoencoder:
    """One row of the table.

    Attributes:
        hidden: Widths of the outer and the inner hidden block of either side.
        latent: Features per layer, of the number of weights.
        loss: Losses float[M] of clean inputs; see `vae_loss`.
        dropout: Probability of dropping a hidden activation of encoder and decoder.
        blocks: Further hidden blocks, as in ``BLOCKS``.
        linear: Further linear maps, as in ``LINEAR``.
        skips: Hidden blocks with a linear map from their input to their output.
        noise: Standard deviation of the noise that is drawn in training, in units of the standardised inputs.
        views: Draws of noise for each row; 0: no noise.
        validation_noise: Whether validation losses are of fixed noise, in batches as in training; else of clean inputs.
    """

    hidden: tuple[int, int]
    latent: Callable[[int], int]
    loss: Callable[[AutoencoderStack, Tensor, Tensor | None, Draws | None], Tensor]
    dropout: float = 0.0
    blocks: dict[str, tuple[str, str]] = field(default_factory=dict)
    linear: dict[str, tuple[str, str]] = field(default_factory=dict)
    skips: tuple[str, ...] = ()
    noise: float = 0.0
    views: int = 0
    validation_noise: bool = False


def latent_tenth(inputs: int) -> int:
    """Return a tenth of the inputs, between 2 and 64."""
    return min(64, max(2, inputs // 10))


def latent_fifth(inputs: int) -> int:
    """Return a fifth of the inputs, between 4 and 128."""
    return min(128, max(4, inputs // 5))


def vae_loss(stack: AutoencoderStack, clean: Tensor, noise: Tensor | None, draws: Draws | None) -> Tensor:
    """Compute squared error summed over inputs + 0.1 KL(q(z|x) || N(0, 1)), averaged over rows.

    "Auto-Encoding Variational Bayes" (Kingma & Welling, 2014); in evaluation mode z is the mean.

    Args:
        stack: The networks.
        clean: Inputs, float[M, B, in].
        noise: Noise to add to the inputs, float[views, B, in]; None for kinds without, and in validation without.
        draws: Random numbers of the epoch; None in evaluation mode.

    Returns:
        float[M].
    """
    hidden = stack.encode_hidden(clean, draws)
    mean, log_variance = stack.linear("latent", hidden), stack.linear("log_variance", hidden)  # (M, B, D) each
    z = mean
    if draws is not None:
        z = mean + torch.exp(0.5 * log_variance) * draws.normal("latent", *mean.shape[1:])
    divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(2)  # (M, B)
    return ((stack.decode(z, draws) - clean).square().sum(2) + KL_WEIGHT * divergence).mean(1)


def contrastive_loss(stack: AutoencoderStack, clean: Tensor, noise: Tensor | None, draws: Draws | None) -> Tensor:
    """Compute the mean squared error to the clean input + NT-Xent (see `nt_xent`) between two noisy views."""
    views = (clean[:, None] + noise).flatten(1, 2)  # (M, 2B, in): all first views, then all second
    z = stack.linear("latent", stack.encode_hidden(views, draws))  # (M, 2B, D)
    projected = stack.linear("head1", stack.block("head0", z, draws))  # (M, 2B, HEAD)
    error = (stack.decode(z, draws) - clean.repeat(1, 2, 1)).square().mean((1, 2))
    count = projected.shape[1]
    if count not in stack.pairs:
        stack.pairs[count] = pairs_of_views(count, projected.device)
    return error + nt_xent(projected, *stack.pairs[count])


def denoising_loss(stack: AutoencoderStack, clean: Tensor, noise: Tensor | None, draws: Draws | None) -> Tensor:
    """Compute the mean squared error to the clean input, from a noisy input in training (Vincent et al., 2008)."""
    noisy = clean if noise is None else clean + noise[0]
    z = stack.linear("latent", stack.encode_hidden(noisy, draws))  # (M, B, D)
    return (stack.decode(z, draws) - clean).square().mean((1, 2))


def pairs_of_views(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, of 2B views, the pairs of a view and itself, bool[2B, 2B], and each view's partner, int64[2B]."""
    partner = torch.arange(count, device=device).roll(count // 2)
    return torch.eye(count, dtype=torch.bool, device=device), partner


def nt_xent(projected: Tensor, itself: Tensor, partner: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Compute the normalised temperature-scaled cross-entropy between two views (SimCLR; Chen et al., 2020).

    The mean over all 2B views i of ``-log(exp(s_ij / t) / sum_{k != i} exp(s_ik / t))``, with s the cosine similarity
    and j the other view of the same sample; never of a view with itself. 0 for a single sample, which has no negatives.

    Args:
        projected: First views of B samples, then their second views in the same order, float[M, 2B, d].
        itself: Pairs of a view and itself, bool[2B, 2B]; see `pairs_of_views`.
        partner: The other view of the same sample, int64[2B].
        temperature: t, dimensionless.

    Returns:
        float[M].
    """
    views = functional.normalize(projected, dim=2)
    similarity = views @ views.mT / temperature  # (M, 2B, 2B)
    scores = similarity.masked_fill(itself, -torch.inf).log_softmax(2)
    return -scores.gather(2, partner[:, None].expand(len(scores), -1, 1)).squeeze(2).mean(1)


AUTOENCODERS: dict[str, Autoencoder] = {
    "vae": Autoencoder((512, 256), latent_tenth, vae_loss, linear={"log_variance": ("inner", "latent")}),
    "contrastive": Autoencoder(
        (512, 512),
        latent_fifth,
        contrastive_loss,
        dropout=0.2,
        blocks={"head0": ("latent", "head")},
        linear={"head1": ("head", "head")},
        noise=0.2,
        views=2,
        validation_noise=True,
    ),
    "denoising": Autoencoder(
        (512, 256), latent_tenth, denoising_loss, dropout=0.2, skips=("encode1", "decode1"), noise=0.2, views=1
    ),
}


def latent_width(name: str, inputs: int) -> int:
    """Return the features per layer."""
    return AUTOENCODERS[name].latent(inputs)


def parameter_shapes(name: str, inputs: int, hidden: tuple[int, ...] | None = None) -> dict[str, tuple[int, int]]:
    """Return shapes of one autoencoder's parameters, by name, in the order in which they are drawn.

    Biases and batch norm's scale and shift are (1, out).
    """
    kind = AUTOENCODERS[name]
    outer, inner = hidden or kind.hidden
    widths = {"in": inputs, "outer": outer, "inner": inner, "latent": kind.latent(inputs), "head": HEAD}
    blocks = BLOCKS | kind.blocks
    shapes = {}
    for layer, (before, after) in (blocks | LINEAR | kind.linear).items():
        shapes |= {f"{layer}.weight": (widths[before], widths[after]), f"{layer}.bias": (1, widths[after])}
        if layer in blocks:
            shapes |= {f"{layer}.scale": (1, widths[after]), f"{layer}.shift": (1, widths[after])}
    for layer in kind.skips:
        shapes[f"{layer}.skip"] = shapes[f"{layer}.weight"]
    return shapes


def num_parameters(name: str, inputs: int, hidden: tuple[int, ...] | None = None) -> int:
    """Return the number of parameters of one autoencoder."""
    return sum(rows * columns for rows, columns in parameter_shapes(name, inputs, hidden).values())


# ----------------------------------------------------------------------------------------------------------------------
# The stack
# ----------------------------------------------------------------------------------------------------------------------


class Draws:
    """The random numbers of an epoch, each kind from a stream of its own, the same for all models of a stack.

    The generators stay the same objects, so that a step that draws from them can be recorded.
    """

    def __init__(self, seed: int, name: str, like: Tensor):
        self.seed, self.name, self.like = seed, name, like
        self.generators = {
            purpose: stream(seed, name, purpose, device=like.device) for purpose in ("noise", "latent", "dropout")
        }

    def begin(self, epoch: int) -> None:
        """Begin the streams of an epoch."""
        for purpose, generator in self.generators.items():
            generator.manual_seed(seed_of(self.seed, self.name, purpose, epoch) % 2**64)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        generator = self.generators[purpose]
        return torch.randn(shape, generator=generator, dtype=self.like.dtype, device=self.like.device)

    def dropout_mask(self, rate: float, *shape: int) -> Tensor | None:
        """Draw zeros at a rate, else 1 / (1 - rate); None for rate 0."""
        if not rate:
            return None
        bits = random_bits(math.prod(shape), [self.generators["dropout"]], self.like.device)
        return dropout_masks(rate, bits.view(shape), self.like.dtype)


class StackedLinear(torch.autograd.Function):
    """``added + x @ weight`` of every model, the weights' gradient written over that of the step before.

    A fresh gradient as large as the weights is memory that the system hands out anew at every step, which on a CPU
    takes longer than the product. The price: a weight may stand only once in a graph.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, added: Tensor, gradient: Tensor) -> Tensor:
        """Map ``x`` float[M, B, in]; ``weight`` and ``gradient`` float[M, in, out], ``added`` float[M, 1 or B, out]."""
        ctx.save_for_backward(x, weight)
        ctx.gradient, ctx.added_shape = gradient, added.shape
        return torch.baddbmm(added, x, weight)

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Return gradients of x (where it has one), weight and what was added."""
        x, weight = ctx.saved_tensors
        below = torch.bmm(above, weight.mT) if ctx.needs_input_grad[0] else None
        torch.bmm(x.mT, above, out=ctx.gradient)
        return below, ctx.gradient, above.sum_to_size(ctx.added_shape), None


class HiddenBlock(torch.autograd.Function):
    """A hidden block in training: linear map, batch norm over the minibatch (Ioffe & Szegedy, 2015), ReLU, dropout.

    One step of the graph instead of a dozen, with the weights' gradient kept as in `StackedLinear`. The bias before a
    batch norm changes nothing, so its gradient is 0; autograd would give rounding, of which Adam makes whole steps.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, mask: Tensor | None, gradient: Tensor, zero: Tensor):
        """Map ``x`` float[M, B, in] with ``mask`` float[B, out]; return the output, batch mean and variance.

        ``gradient`` and ``zero`` are memory for the gradient of the weight, and that of the bias.
        """
        normal = torch.baddbmm(bias, x, weight)  # (M, B, out)
        mean = normal.mean(1, keepdim=True)
        normal -= mean
        variance = normal.square().mean(1, keepdim=True)
        inverse = (variance + NORM_EPS).rsqrt()
        normal *= inverse
        out = torch.addcmul(shift, normal, scale).relu_()
        if mask is not None:
            out *= mask
        ctx.save_for_backward(x, weight, normal, inverse, scale, out)
        ctx.mask, ctx.gradient, ctx.zero = mask, gradient, zero
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)  # no zeros in place of their gradients
        return out, mean, variance

    @staticmethod
    def backward(ctx, above: Tensor, *_):
        """Return gradients of x (where it has one), weight, bias, scale and shift."""
        x, weight, normal, inverse, scale, out = ctx.saved_tensors
        error = torch.ops.aten.threshold_backward(above, out, 0)  # (M, B, out)
        if ctx.mask is not None:
            error *= ctx.mask
        for_shift, for_scale = error.sum(1, keepdim=True), (error * normal).sum(1, keepdim=True)  # (M, 1, out)
        rows = normal.shape[1]
        error.sub_(for_shift / rows).addcmul_(normal, for_scale / -rows).mul_(scale * inverse)
        below = torch.bmm(error, weight.mT) if ctx.needs_input_grad[0] else None
        torch.bmm(x.mT, error, out=ctx.gradient)
        return below, ctx.gradient, ctx.zero, for_scale, for_shift, None, None, None


class AutoencoderStack:
    """M autoencoders of one kind, each for one layer's weights; trained by `training.stacks.train`.

    Args:
        name: A row of ``AUTOENCODERS``.
        x: Weights of each layer, standardised on the train rows, float[M, N, in].
        split: Train and validation rows; the test rows are not read.
        seed: Of all streams.
        batch_size: Rows of a minibatch. A last minibatch of one row is left out that epoch: batch norm needs two.
        hidden: Widths in place of the row's.
    """

    def __init__(
        self,
        name: str,
        x: Tensor,
        split: Split,
        seed: int,
        batch_size: int = 32,
        hidden: tuple[int, ...] | None = None,
    ):
        self.name, self.kind, self.hidden = name, AUTOENCODERS[name], hidden
        self.x, self.split = x, split
        self.seed, self.batch_size = seed, batch_size
        self.model = torch.arange(len(x), device=x.device)  # the model at each position
        self.draws = Draws(seed, name, x)
        self.generators = tuple(self.draws.generators.values())
        self.minibatches = Minibatches(split.train, batch_size, seed, [name], {})
        self.batch_statistics: list[tuple[Tensor, Tensor, float]] = []  # each: running, the minibatch's, its factor
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of views, see `pairs_of_views`
        self._draw_parameters()
        self.validation_noise = self._fixed_noise() if self.kind.validation_noise else None
        self._place()

    def _draw_parameters(self) -> None:
        """Draw the initial parameters, the same for all models, and set batch norm's running statistics."""
        x, models = self.x, len(self.x)
        generator = stream(self.seed, self.name, "init", device=x.device)
        shapes = parameter_shapes(self.name, x.shape[2], self.hidden)
        self.params: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        for key, shape in shapes.items():
            layer, part = key.split(".")
            if part in ("scale", "shift"):
                value = x.new_full(shape, float(part == "scale"))
            else:  # torch's default for a linear layer
                fan_in = shapes[f"{layer}.weight"][0]
                value = torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
                value = (value * 2 - 1) * fan_in**-0.5
            self.params[key] = value.repeat(models, 1, 1).requires_grad_()
            if part == "scale":
                self.buffers[f"{layer}.mean"] = x.new_zeros(models, *shape)
                self.buffers[f"{layer}.variance"] = x.new_ones(models, *shape)

    def _fixed_noise(self) -> Tensor:
        """Draw the noise of the validation rows, float[views, V, in]."""
        shape = (self.kind.views, len(self.split.validation), self.x.shape[2])
        device = self.x.device
        generator = stream(self.seed, self.name, "validation views", device=device)
        return self.kind.noise * torch.randn(shape, generator=generator, dtype=self.x.dtype, device=device)

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        index = index.to(self.model.device)
        self.model = self.model[index]
        self.params = {key: parameter.detach()[index].requires_grad_() for key, parameter in self.params.items()}
        self.buffers = {key: buffer[index] for key, buffer in self.buffers.items()}
        self._place()

    def _place(self) -> None:
        """Make room for the gradients of matrices, and zeros for those of biases before a batch norm."""
        keys = [key for key in self.params if key.endswith((".weight", ".skip", ".bias"))]
        self.kept_gradients = {key: torch.zeros_like(self.params[key]) for key in keys}

    # -- the network -------------------------------------------------------------------------------------

    def linear(self, layer: str, x: Tensor) -> Tensor:
        """Apply a linear map, float[M, B, in] -> float[M, B, out]."""
        weight = f"{layer}.weight"
        return StackedLinear.apply(x, self.params[weight], self.params[f"{layer}.bias"], self.kept_gradients[weight])

    def block(self, layer: str, x: Tensor, draws: Draws | None, dropout: float = 0.0) -> Tensor:
        """Apply a hidden block, float[M, B, in] -> float[M, B, out]; without draws in evaluation mode.

        Batch norm's running statistics are kept as torch keeps them.
        """
        weight, bias = self.params[f"{layer}.weight"], self.params[f"{layer}.bias"]
        scale, shift = self.params[f"{layer}.scale"], self.params[f"{layer}.shift"]
        mean, variance = self.buffers[f"{layer}.mean"], self.buffers[f"{layer}.variance"]
        if draws is None:
            scale = scale * (variance + NORM_EPS).rsqrt()
            out = torch.addcmul(shift, torch.baddbmm(bias - mean, x, weight), scale).relu_()
        else:
            rows = x.shape[1]
            mask = draws.dropout_mask(dropout, rows, weight.shape[2])
            kept = self.kept_gradients[f"{layer}.weight"], self.kept_gradients[f"{layer}.bias"]
            out, batch_mean, batch_variance = HiddenBlock.apply(x, weight, bias, scale, shift, mask, *kept)
            self.batch_statistics += [(mean, batch_mean, 1.0), (variance, batch_variance, rows / (rows - 1))]
        skip = f"{layer}.skip"
        return StackedLinear.apply(x, self.params[skip], out, self.kept_gradients[skip]) if skip in self.params else out

    def encode_hidden(self, x: Tensor, draws: Draws | None) -> Tensor:
        """Apply the encoder's hidden blocks, float[M, B, in] -> float[M, B, inner]."""
        hidden = self.block("encode0", x, draws, self.kind.dropout)
        return self.block("encode1", hidden, draws, self.kind.dropout)

    def decode(self, z: Tensor, draws: Draws | None) -> Tensor:
        """Reconstruct inputs, float[M, B, D] -> float[M, B, in]."""
        hidden = self.block("decode0", z, draws, self.kind.dropout)
        return self.linear("reconstruct", self.block("decode1", hidden, draws, self.kind.dropout))

    def encode(self, x: Tensor) -> Tensor:
        """Compute features in evaluation mode, float[M, B, in] -> float[M, B, D]; of the VAE, the means."""
        return self.linear("latent", self.encode_hidden(x, None))

    # -- what `train` asks for -----------------------------------------------------------------------------

    def begin(self, epoch: int) -> Iterator[list[int]]:
        """Draw an epoch; see `Minibatches.begin`."""
        self.draws.begin(epoch)
        for sizes in self.minibatches.begin(epoch):
            yield [size for size in sizes if size > 1]

    def gradients(self, size: int) -> tuple[Tensor, ...]:
        """Return gradients of the models' losses over the next minibatch."""
        return torch.autograd.grad(self.minibatch_losses(size).sum(), list(self.params.values()))

    def minibatch_losses(self, size: int) -> Tensor:
        """Return training losses [M] of the next minibatch."""
        self.batch_statistics.clear()  # of a recording that broke off
        rows, _ = self.minibatches.next(size)  # (1, B)
        clean = gather(self.x, self.model, rows)  # (M, B, in)
        noise = None
        if self.kind.views:
            noise = self.kind.noise * self.draws.normal("noise", self.kind.views, *clean.shape[1:])  # (views, B, in)
        losses = self.kind.loss(self, clean, noise, self.draws)
        running, statistics, factors = (list(column) for column in zip(*self.batch_statistics, strict=True))
        torch._foreach_lerp_(running, torch._foreach_mul(statistics, factors), NORM_MOMENTUM)
        self.batch_statistics.clear()
        return losses

    def validation_losses(self) -> Tensor:
        """Return losses [M] over the validation rows, clean or with fixed noise."""
        rows = self.split.validation
        if self.validation_noise is None:
            return self.kind.loss(self, gather(self.x, self.model, rows[None]), None, None)
        # In batches as in training, since NT-Xent grows with the number of negatives.
        total = 0.0
        for part in _batches(len(rows), self.batch_size):
            clean = gather(self.x, self.model, rows[part][None])  # (M, B, in)
            total = total + self.kind.loss(self, clean, self.validation_noise[:, part], None) * clean.shape[1]
        return total / len(rows)


def _batches(rows: int, size: int) -> list[slice]:
    """Return slices of about ``size`` rows, as equal as can be, so that none holds a single row."""
    count = max(1, round(rows / size))
    ends = [round(i * rows / count) for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def fit_transform(name: str, x: Tensor, split: Split, *, schedule: Schedule, seed: int) -> dict[str, np.ndarray]:
    """Fit an autoencoder to each layer's train rows and describe every row.

    Args:
        name: A row of ``AUTOENCODERS``.
        x: Weights of each layer, standardised on the train rows, float[M, N, in].
        split: Train rows to fit, validation rows to stop early by.
        schedule: Hidden widths (None: the row's), epochs, patience, learning rate.
        seed: Of all random streams.

    Returns:
        ``features`` float32[M, N, D] of clean inputs in evaluation mode at the best epoch; ``epochs``, ``best_epoch``
        int64[M]; ``validation_loss`` float64[M].
    """
    stack = AutoencoderStack(name, x, split, seed, schedule.batch_size, schedule.hidden)
    trained = train(stack, schedule)
    stack.params = {key: trained.state[key] for key in stack.params}
    stack.buffers = {key: trained.state[key] for key in stack.buffers}
    with torch.no_grad():
        widest = max(x.shape[2], *(schedule.hidden or AUTOENCODERS[name].hidden))
        length = rows_at_once(len(x) * widest, device=x.device)
        features = torch.cat([stack.encode(part) for part in x.split(length, dim=1)], dim=1)
    return {
        "features": features.float().cpu().numpy(),
        "epochs": trained.epochs.numpy(),
        "best_epoch": trained.best_epoch.numpy(),
        "validation_loss": trained.best_loss.numpy(),
    }
