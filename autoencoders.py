"""The learned representations: one autoencoder per layer, fitted on train rows, then applied to every row.

Autoencoders of layers of equal width are one stack (see stacked_training.py): every parameter has a leading model
axis, and all models of a stack share their initial weights, minibatches, noise and dropout masks.

A hidden block is a linear map, batch norm, ReLU and, where the kind has it, dropout. Widths, with ``in`` the number of
weights of the layer and ``latent`` as in `latent_width`:

    vae          in - 512 - 256 - (mean, log variance: latent) - 256 - 512 - in
    contrastive  in - 512 - 512 - latent - 512 - 512 - in;  projection head  latent - 64 - 64
    denoising    in - 512 - 256 - latent - 256 - 512 - in;  a skip over the second hidden block of either side

Shape letters: M models, N samples, B minibatch, D latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.stacks import Schedule, Split, dropout_masks, gather, rows_at_once, stream, train

KL_WEIGHT = 0.1
TEMPERATURE = 0.5
NOISE = 0.2  # standard deviation of input noise, in units of the standardised inputs
HEAD = 64
HIDDEN = {"vae": (512, 256), "contrastive": (512, 512), "denoising": (512, 256)}
DROPOUT = {"vae": 0.0, "contrastive": 0.2, "denoising": 0.2}
NORM_MOMENTUM, NORM_EPS = 0.1, 1e-5  # torch's defaults


def latent_width(name: str, inputs: int) -> int:
    """Features per layer: min(128, max(4, in // 5)) for contrastive, else min(64, max(2, in // 10))."""
    return min(128, max(4, inputs // 5)) if name == "contrastive" else min(64, max(2, inputs // 10))


def parameter_shapes(name: str, inputs: int) -> dict[str, tuple[int, int]]:
    """Shapes of one autoencoder's parameters, by name; biases and batch norm's scale and shift are (1, out)."""
    outer, inner = HIDDEN[name]
    latent = latent_width(name, inputs)
    hidden = {
        "encode0": (inputs, outer),
        "encode1": (outer, inner),
        "decode0": (latent, inner),
        "decode1": (inner, outer),
    }
    plain = {"reconstruct": (outer, inputs), "latent": (inner, latent)}
    if name == "vae":
        plain["log_variance"] = (inner, latent)
    if name == "contrastive":
        hidden["head0"], plain["head1"] = (latent, HEAD), (HEAD, HEAD)
    shapes = {}
    for layer, (fan_in, fan_out) in (hidden | plain).items():
        shapes |= {f"{layer}.weight": (fan_in, fan_out), f"{layer}.bias": (1, fan_out)}
        if layer in hidden:
            shapes |= {f"{layer}.scale": (1, fan_out), f"{layer}.shift": (1, fan_out)}
    if name == "denoising":
        shapes |= {"encode1.skip": (outer, inner), "decode1.skip": (inner, outer)}
    return shapes


def num_parameters(name: str, inputs: int) -> int:
    """Number of parameters of one autoencoder."""
    return sum(rows * columns for rows, columns in parameter_shapes(name, inputs).values())


class Draws:
    """The random numbers of one epoch, each kind from a stream of its own, the same for all models of a stack."""

    def __init__(self, seed: int, name: str, epoch: int, like: Tensor):
        self.order_generator = stream(seed, name, "order", epoch)
        self.generators = {
            purpose: stream(seed, name, purpose, epoch, device=like.device)
            for purpose in ("noise", "latent", "dropout")
        }
        self.like = like

    def order(self, rows: Tensor) -> Tensor:
        """The rows in this epoch's order."""
        return rows[torch.randperm(len(rows), generator=self.order_generator).to(rows.device)]

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers."""
        generator = self.generators[purpose]
        return torch.randn(shape, generator=generator, dtype=self.like.dtype, device=self.like.device)

    def dropout_mask(self, rate: float, *shape: int) -> Tensor | None:
        """Zeros at a rate, else 1 / (1 - rate); None for rate 0."""
        return dropout_masks(rate, shape, [self.generators["dropout"]], self.like.dtype)[0] if rate else None


class StackedLinear(torch.autograd.Function):
    """``added + x @ weight`` of every model, the weights' gradient written over that of the step before.

    A fresh gradient as large as the weights is memory that the system hands out anew at every step, which on a CPU
    takes longer than the product. The price: a weight may stand only once in a graph.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, added: Tensor, gradient: Tensor) -> Tensor:
        """``x`` float[M, B, in], ``weight`` and ``gradient`` float[M, in, out], ``added`` float[M, 1 or B, out]."""
        ctx.save_for_backward(x, weight)
        ctx.gradient, ctx.added_shape = gradient, added.shape
        return torch.baddbmm(added, x, weight)

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Gradients of x (where it has one), weight and what was added."""
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
    def forward(ctx, x, weight, bias, scale, shift, mask: Tensor | None, gradient: Tensor):
        """``x`` float[M, B, in], ``mask`` float[B, out]; returns the block's output, batch mean and variance."""
        h = torch.baddbmm(bias, x, weight)  # (M, B, out)
        mean = h.mean(1, keepdim=True)
        h -= mean
        variance = h.square().mean(1, keepdim=True)
        inverse = (variance + NORM_EPS).rsqrt()
        h *= inverse
        out = torch.addcmul(shift, h, scale).relu_()
        if mask is not None:
            out *= mask
        ctx.save_for_backward(x, weight, h, inverse, scale, out)
        ctx.mask, ctx.gradient = mask, gradient
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx, above: Tensor, *_):
        """Gradients of x (where it has one), weight, bias, scale and shift."""
        x, weight, h, inverse, scale, out = ctx.saved_tensors
        error = above * out.sign()
        if ctx.mask is not None:
            error *= ctx.mask
        for_shift, for_scale = error.sum(1, keepdim=True), (error * h).sum(1, keepdim=True)
        error.sub_(for_shift / h.shape[1]).addcmul_(h, for_scale / -h.shape[1]).mul_(scale * inverse)
        below = torch.bmm(error, weight.mT) if ctx.needs_input_grad[0] else None
        torch.bmm(x.mT, error, out=ctx.gradient)
        return below, ctx.gradient, torch.zeros_like(for_shift), for_scale, for_shift, None, None


class AutoencoderStack:
    """M autoencoders of one kind, each for one layer's weights; trains under `stacked_training.train`.

    Args:
        name: "vae", "contrastive" or "denoising".
        x: Weights of each layer, standardised on the train rows, float[M, N, in].
        split: Train and validation rows; the test rows are not read.
        seed: Of all streams.
        batch_size: Rows of a minibatch. A last minibatch of one row is left out that epoch: batch norm needs two.
    """

    def __init__(self, name: str, x: Tensor, split: Split, seed: int, batch_size: int = 32):
        self.name, self.x, self.split, self.seed, self.batch_size = name, x, split, seed, batch_size
        self.model = torch.arange(len(x), device=x.device)  # which model stands at each position
        self.dropout = DROPOUT[name]
        generator = stream(seed, name, "init")
        self.params, self.buffers = {}, {}
        for key, shape in parameter_shapes(name, x.shape[2]).items():
            fan_in = parameter_shapes(name, x.shape[2])[key.split(".")[0] + ".weight"][0]
            if key.endswith((".scale", ".shift")):
                value = torch.full(shape, float(key.endswith(".scale")), dtype=x.dtype)
            else:  # torch's default for a linear layer
                value = (torch.rand(shape, generator=generator, dtype=x.dtype) * 2 - 1) * fan_in**-0.5
            self.params[key] = value.to(x.device).repeat(len(x), 1, 1).requires_grad_()
            if key.endswith(".scale"):
                layer = key.removesuffix(".scale")
                self.buffers[f"{layer}.mean"] = x.new_zeros(len(x), *shape)
                self.buffers[f"{layer}.variance"] = x.new_ones(len(x), *shape)
        views = stream(seed, name, "validation views")
        shape = (2, len(split.validation), x.shape[2])
        self.validation_noise = (
            torch.randn(shape, generator=views, dtype=x.dtype).to(x.device) if name == "contrastive" else None
        )

        self._place()

    def take(self, index: Tensor) -> None:
        """Keep the models at these positions, in this order."""
        self.model = self.model[index.to(self.model.device)]
        self.params = {key: p.detach()[index].requires_grad_() for key, p in self.params.items()}
        self.buffers = {key: b[index] for key, b in self.buffers.items()}
        self._place()

    def _place(self) -> None:
        """Make room for the gradients of the matrices."""
        self.kept = {k: torch.empty_like(p) for k, p in self.params.items() if k.endswith((".weight", ".skip"))}

    # -- the network -------------------------------------------------------------------------------------

    def _linear(self, layer: str, h: Tensor) -> Tensor:
        weight = f"{layer}.weight"
        return StackedLinear.apply(h, self.params[weight], self.params[f"{layer}.bias"], self.kept[weight])

    def _hidden(self, layer: str, x: Tensor, draws: Draws | None, dropout: float) -> Tensor:
        """A hidden block, float[M, B, in] -> float[M, B, out]; without draws in evaluation mode.

        Batch norm's running statistics are kept as torch keeps them.
        """
        weight, bias, scale, shift = (self.params[f"{layer}.{part}"] for part in ("weight", "bias", "scale", "shift"))
        mean, variance = self.buffers[f"{layer}.mean"], self.buffers[f"{layer}.variance"]
        if draws is None:
            scale = scale * (variance + NORM_EPS).rsqrt()
            h = torch.addcmul(shift, torch.baddbmm(bias - mean, x, weight), scale).relu_()
        else:
            rows = x.shape[1]
            mask = draws.dropout_mask(dropout, rows, weight.shape[2])
            kept = self.kept[f"{layer}.weight"]
            h, batch_mean, batch_variance = HiddenBlock.apply(x, weight, bias, scale, shift, mask, kept)
            mean.lerp_(batch_mean, NORM_MOMENTUM)
            variance.lerp_(batch_variance * (rows / (rows - 1)), NORM_MOMENTUM)
        skip = f"{layer}.skip"
        return StackedLinear.apply(x, self.params[skip], h, self.kept[skip]) if skip in self.params else h

    def _encode_hidden(self, x: Tensor, draws: Draws | None) -> Tensor:
        return self._hidden("encode1", self._hidden("encode0", x, draws, self.dropout), draws, self.dropout)

    def _decode(self, z: Tensor, draws: Draws | None) -> Tensor:
        h = self._hidden("decode1", self._hidden("decode0", z, draws, self.dropout), draws, self.dropout)
        return self._linear("reconstruct", h)

    def encode(self, x: Tensor) -> Tensor:
        """Features in evaluation mode, float[M, B, in] -> float[M, B, D]; of the VAE, the means."""
        return self._linear("latent", self._encode_hidden(x, None))

    # -- the losses, float[M] each, of clean inputs float[M, B, in] ----------------------------------------

    def _vae_losses(self, clean: Tensor, draws: Draws | None) -> Tensor:
        """Squared error summed over inputs + 0.1 KL(q(z|x) || N(0, 1)), averaged over rows (Kingma & Welling, 2014)."""
        h = self._encode_hidden(clean, draws)
        mean, log_variance = self._linear("latent", h), self._linear("log_variance", h)
        z = mean
        if draws is not None:
            z = mean + torch.exp(0.5 * log_variance) * draws.normal("latent", *mean.shape[1:])
        divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(2)
        return ((self._decode(z, draws) - clean).square().sum(2) + KL_WEIGHT * divergence).mean(1)

    def _contrastive_losses(self, clean: Tensor, noise: Tensor, draws: Draws | None) -> Tensor:
        """Mean squared error to the clean input + NT-Xent between two noisy views, ``noise`` float[2, B, in]."""
        views = (clean[:, None] + NOISE * noise).flatten(1, 2)  # (M, 2B, in): all first views, then all second
        z = self._linear("latent", self._encode_hidden(views, draws))
        projected = self._linear("head1", self._hidden("head0", z, draws, dropout=0.0))
        error = (self._decode(z, draws) - clean.repeat(1, 2, 1)).square().mean((1, 2))
        return error + nt_xent(projected)

    def _denoising_losses(self, clean: Tensor, draws: Draws | None) -> Tensor:
        """Mean squared error to the clean input, from a noisy one in training (Vincent et al., 2008)."""
        noisy = clean if draws is None else clean + NOISE * draws.normal("noise", *clean.shape[1:])
        z = self._linear("latent", self._encode_hidden(noisy, draws))
        return (self._decode(z, draws) - clean).square().mean((1, 2))

    # -- what `train` asks for -----------------------------------------------------------------------------

    def gradients(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """Gradients of the models' losses over each minibatch."""
        for losses in self.minibatch_losses(epoch):
            yield torch.autograd.grad(losses.sum(), list(self.params.values()))

    def minibatch_losses(self, epoch: int) -> Iterator[Tensor]:
        """Training losses [M] of each minibatch of an epoch."""
        draws = Draws(self.seed, self.name, epoch, self.x)
        for rows in draws.order(self.split.train).split(self.batch_size):
            if len(rows) < 2:
                continue
            clean = gather(self.x, self.model, rows[None])  # (M, B, in)
            if self.name == "contrastive":
                yield self._contrastive_losses(clean, draws.normal("noise", 2, *clean.shape[1:]), draws)
            elif self.name == "vae":
                yield self._vae_losses(clean, draws)
            else:
                yield self._denoising_losses(clean, draws)

    def validation_losses(self) -> Tensor:
        """Losses [M] over the validation rows: VAE at z = mean, contrastive on fixed views, denoising from clean."""
        rows = self.split.validation
        if self.name == "vae":
            return self._vae_losses(gather(self.x, self.model, rows[None]), None)
        if self.name == "denoising":
            return self._denoising_losses(gather(self.x, self.model, rows[None]), None)
        # In batches as in training, since NT-Xent grows with the number of negatives.
        total = 0.0
        for part in _batches(len(rows), self.batch_size):
            clean = gather(self.x, self.model, rows[part][None])
            total = total + self._contrastive_losses(clean, self.validation_noise[:, part], None) * clean.shape[1]
        return total / len(rows)


def _batches(rows: int, size: int) -> list[slice]:
    """Slices of about ``size`` rows, as equal as can be, so that none holds a single row."""
    count = max(1, round(rows / size))
    ends = [round(i * rows / count) for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def nt_xent(projected: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Normalised temperature-scaled cross-entropy between two views (SimCLR; Chen et al., 2020).

    The mean over all 2B views i of ``-log(exp(s_ij / t) / sum_{k != i} exp(s_ik / t))``, with s the cosine similarity
    and j the other view of the same sample; never of a view with itself. 0 for a single sample, which has no negatives.

    Args:
        projected: First views of B samples, then their second views in the same order, float[M, 2B, d].
        temperature: t, dimensionless.

    Returns:
        float[M].
    """
    views = functional.normalize(projected, dim=2)
    similarity = views @ views.mT / temperature  # (M, 2B, 2B)
    count = views.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=views.device)
    partner = torch.arange(count, device=views.device).roll(count // 2)
    scores = similarity.masked_fill(itself, -torch.inf).log_softmax(2)
    return -scores[:, torch.arange(count, device=views.device), partner].mean(1)


def fit_transform(name: str, x: Tensor, split: Split, *, schedule: Schedule, seed: int) -> dict[str, np.ndarray]:
    """Fit an autoencoder to each layer's train rows and describe every row.

    Args:
        name: "vae", "contrastive" or "denoising".
        x: Weights of each layer, standardised on the train rows, float[M, N, in].
        split: Train rows to fit, validation rows to stop early by.
        schedule: Epochs, patience, learning rate.
        seed: Of all random streams.

    Returns:
        ``features`` float32[M, N, D] of clean inputs in evaluation mode at the best epoch; ``epochs``, ``best_epoch``
        int64[M]; ``validation_loss`` float64[M].
    """
    stack = AutoencoderStack(name, x, split, seed, schedule.batch_size)
    trained = train(stack, schedule)
    stack.params = {key: trained.state[key] for key in stack.params}
    stack.buffers = {key: trained.state[key] for key in stack.buffers}
    with torch.no_grad():
        at_once = rows_at_once(len(x) * max(x.shape[2], *HIDDEN[name]))
        features = torch.cat([stack.encode(part) for part in x.split(at_once, dim=1)], dim=1)
    return {
        "features": features.float().cpu().numpy(),
        "epochs": trained.epochs.numpy(),
        "best_epoch": trained.best_epoch.numpy(),
        "validation_loss": trained.best_loss.numpy(),
    }
