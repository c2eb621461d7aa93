import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import autoencoders
from autoencoders import (
    AUTOENCODERS,
    Autoencoder,
    AutoencoderStack,
    Draws,
    fit_transform,
    latent_width,
    nt_xent,
    num_parameters,
    pairs_of_views,
    parameter_shapes,
)
from training.stacks import Schedule, Split, epoch_order, stream, train

NAMES = ("vae", "contrastive", "denoising")
# The contrastive one takes as long as the others together.
MOSTLY = [pytest.param(name, marks=pytest.mark.slow) if name == "contrastive" else name for name in NAMES]
HIDDEN = {"vae": (24, 16), "contrastive": (24, 20), "denoising": (24, 16)}  # narrow, to keep the tests short


def weights(layers=3, samples=81, width=30, dtype=torch.float64, seed=0):
    """Standardised-looking weights with structure to compress; 65 train rows leave a last minibatch of one."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(layers, samples, 3, generator=generator, dtype=dtype)
    basis = torch.randn(layers, 3, width, generator=generator, dtype=dtype)
    x = low @ basis / 3**0.5 + 0.1 * torch.randn(layers, samples, width, generator=generator, dtype=dtype)
    return x, Split(torch.arange(65), torch.arange(65, 74), torch.arange(74, samples))


class Plain(nn.Module):
    """One autoencoder in plain torch, as the issue words it; returns each kind's loss."""

    def __init__(self, name, width):
        super().__init__()
        self.name = name
        outer, inner = HIDDEN[name]
        latent = latent_width(name, width)
        hidden = {
            "encode0": (width, outer),
            "encode1": (outer, inner),
            "decode0": (latent, inner),
            "decode1": (inner, outer),
        }
        if name == "contrastive":
            hidden["head0"] = (latent, autoencoders.HEAD)
            self.head1 = nn.Linear(autoencoders.HEAD, autoencoders.HEAD)
        if name == "vae":
            self.log_variance = nn.Linear(inner, latent)
        for layer, (fan_in, fan_out) in hidden.items():
            setattr(self, layer, nn.Linear(fan_in, fan_out))
            setattr(self, f"{layer}_norm", nn.BatchNorm1d(fan_out))
        self.latent, self.reconstruct = nn.Linear(inner, latent), nn.Linear(outer, width)
        if name == "denoising":
            self.encode1_skip = nn.Linear(outer, inner, bias=False)
            self.decode1_skip = nn.Linear(inner, outer, bias=False)
        self.double()

    def load(self, params, m):
        for key, value in params.items():
            layer, kind = key.split(".")
            value = value[m].detach()
            if kind in ("scale", "shift"):
                target = getattr(getattr(self, f"{layer}_norm"), "weight" if kind == "scale" else "bias")
            elif kind == "skip":
                target = getattr(self, f"{layer}_skip").weight
            else:
                target = getattr(getattr(self, layer), kind)
            target.data = value.mT.clone() if kind in ("weight", "skip") else value[0].clone()

    def block(self, layer, x, draws, rate):
        h = functional.relu(getattr(self, f"{layer}_norm")(getattr(self, layer)(x)))
        if self.training and rate:
            h = h * draws.dropout_mask(rate, *h.shape)
        return h + getattr(self, f"{layer}_skip")(x) if hasattr(self, f"{layer}_skip") else h

    def encoded(self, x, draws):
        rate = 0.0 if self.name == "vae" else 0.2
        return self.block("encode1", self.block("encode0", x, draws, rate), draws, rate)

    def decoded(self, z, draws):
        rate = 0.0 if self.name == "vae" else 0.2
        return self.reconstruct(self.block("decode1", self.block("decode0", z, draws, rate), draws, rate))

    def loss(self, clean, draws, views=None):
        if self.name == "vae":
            h = self.encoded(clean, draws)
            mean, log_variance = self.latent(h), self.log_variance(h)
            z = mean
            if self.training:
                z = mean + torch.exp(log_variance / 2) * draws.normal("latent", *mean.shape)
            posterior = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
            divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
            error = functional.mse_loss(self.decoded(z, draws), clean, reduction="none").sum(1)
            return (error + 0.1 * divergence).mean()
        if self.name == "denoising":
            noisy = clean + 0.2 * draws.normal("noise", *clean.shape) if self.training else clean
            return functional.mse_loss(self.decoded(self.latent(self.encoded(noisy, draws)), draws), clean)
        noise = draws.normal("noise", 2, *clean.shape) if self.training else views
        both = torch.cat([clean + 0.2 * noise[0], clean + 0.2 * noise[1]])
        z = self.latent(self.encoded(both, draws))
        projected = self.head1(self.block("head0", z, draws, 0.0))
        reconstruction = functional.mse_loss(self.decoded(z, draws), torch.cat([clean, clean]))
        return reconstruction + literal_nt_xent(projected, 0.5)


def literal_nt_xent(projected, temperature):
    """Return equation 1 of SimCLR, term by term."""
    count = len(projected)
    total = 0.0
    for i in range(count):
        j = (i + count // 2) % count
        similar = functional.cosine_similarity(projected[i], projected) / temperature
        denominator = sum(torch.exp(similar[k]) for k in range(count) if k != i)
        total = total - torch.log(torch.exp(similar[j]) / denominator)
    return total / count


@pytest.mark.parametrize(
    ("dtype", "rtol", "epochs"),
    [
        (torch.float64, 1e-9, 1),
        pytest.param(torch.float64, 1e-9, 3, marks=pytest.mark.slow),
        (torch.float32, 1e-5, 1),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_every_autoencoder_of_a_stack_trains_as_plain_torch_does(name, dtype, rtol, epochs):
    x, split = weights(dtype=dtype)
    stack = AutoencoderStack(name, x, split, seed=4, hidden=HIDDEN[name])
    plain = [Plain(name, x.shape[2]).to(dtype) for _ in x]
    for m, model in enumerate(plain):
        model.load(stack.params, m)
    seen, seen_in_training = [], []

    class Recorded(AutoencoderStack):
        def minibatch_losses(self, size):
            losses = super().minibatch_losses(size)
            seen_in_training.append(losses.detach())
            return losses

        def validation_losses(self):
            seen.append(super().validation_losses())
            return seen[-1]

    train(Recorded(name, x, split, seed=4, hidden=HIDDEN[name]), Schedule(max_epochs=epochs, patience=9))
    views = torch.randn((2, 9, x.shape[2]), generator=stream(4, name, "validation views"), dtype=x.dtype)
    for m, model in enumerate(plain):
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        training, draws = [], Draws(4, name, x)
        for epoch in range(1, epochs + 1):
            model.train()
            draws.begin(epoch)
            batches = split.train[epoch_order(split.train, 4, [name], epoch)[0]].split(32)
            assert [len(rows) for rows in batches] == [32, 32, 1]
            for rows in batches[:2]:  # the last one, of a single row, is left out
                optimiser.zero_grad()
                training.append(model.loss(x[m, rows], draws))
                training[-1].backward()
                optimiser.step()
            model.eval()
            with torch.no_grad():
                loss = model.loss(x[m, split.validation], None, views)
            # A bias below a batch norm has gradient 0, of whose float32 rounding Adam makes whole steps. Training does
            # not notice them; running statistics do, and so does validation.
            if dtype == torch.float64:
                torch.testing.assert_close(seen[epoch - 1][m], loss, rtol=rtol, atol=0)
        expected = torch.stack(training).detach()
        torch.testing.assert_close(torch.stack(seen_in_training)[:, m], expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("name", MOSTLY)
def test_a_layers_features_do_not_depend_on_its_stack(name):
    x, split = weights()
    x[1] *= 0.05
    schedule = Schedule(max_epochs=60, patience=1, lr=1e-2, hidden=HIDDEN[name])
    together = fit_transform(name, x, split, schedule=schedule, seed=1)
    assert len(set(together["epochs"].tolist())) > 1  # some leave the stack before others
    for m in range(len(x)):
        alone = fit_transform(name, x[m : m + 1], split, schedule=schedule, seed=1)
        np.testing.assert_allclose(alone["features"][0], together["features"][m], rtol=1e-5, atol=1e-6)
        assert alone["epochs"][0] == together["epochs"][m]


@pytest.mark.parametrize("name", NAMES)
def test_shape_bits_seed_and_a_falling_loss(name):
    x, split = weights(dtype=torch.float32)
    schedule = Schedule(max_epochs=20, patience=20, lr=5e-3, hidden=HIDDEN[name])
    start = AutoencoderStack(name, x, split, seed=0, hidden=HIDDEN[name]).validation_losses()
    first, second, other = (fit_transform(name, x, split, schedule=schedule, seed=seed) for seed in (0, 0, 1))
    assert first["features"].shape == (3, 81, latent_width(name, 30)) and first["features"].dtype == np.float32
    assert np.isfinite(first["features"]).all()
    assert (first["validation_loss"] < 0.9 * start.detach().numpy()).all()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert not np.array_equal(first["features"], other["features"])


@pytest.mark.parametrize("name", NAMES)
def test_the_test_rows_never_touch_the_fit(name):
    x, split = weights(dtype=torch.float32)
    changed = x.clone()
    changed[:, split.test] = 9.0
    schedule = Schedule(max_epochs=3, patience=3, hidden=HIDDEN[name])
    first, second = (fit_transform(name, inputs, split, schedule=schedule, seed=0) for inputs in (x, changed))
    seen = torch.cat([split.train, split.validation])
    assert np.array_equal(first["features"][:, seen], second["features"][:, seen])
    assert not np.array_equal(first["features"][:, split.test], second["features"][:, split.test])


@pytest.mark.parametrize("name", NAMES)
def test_features_are_of_clean_input_in_evaluation_mode_at_the_best_epoch(name):
    x, split = weights()
    schedule = Schedule(max_epochs=4, patience=4, hidden=HIDDEN[name])
    features = fit_transform(name, x, split, schedule=schedule, seed=0)["features"]
    trained = train(AutoencoderStack(name, x, split, seed=0, hidden=HIDDEN[name]), schedule)
    for m in range(len(x)):
        plain = Plain(name, x.shape[2])
        plain.load({key: trained.state[key] for key in parameter_shapes(name, x.shape[2], HIDDEN[name])}, m)
        for key, value in trained.state.items():
            if key.endswith((".mean", ".variance")):
                layer, kind = key.split(".")
                norm = getattr(plain, f"{layer}_norm")
                setattr(norm, {"mean": "running_mean", "variance": "running_var"}[kind], value[m, 0])
        plain.eval()
        with torch.no_grad():
            one_by_one = torch.cat([plain.latent(plain.encoded(row[None], None)) for row in x[m]])
        np.testing.assert_allclose(features[m], one_by_one, rtol=1e-5, atol=1e-6)


def test_nt_xent_is_simclrs_and_pairs_two_views():
    def loss_of(projected):
        return nt_xent(projected, *pairs_of_views(projected.shape[1], projected.device))

    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 10, 6, generator=generator, dtype=torch.float64)
    expected = torch.stack([literal_nt_xent(views, 0.5) for views in projected])
    torch.testing.assert_close(loss_of(projected), expected)
    # By hand: two samples, views equal, the other sample orthogonal: -log(e^2 / (e^2 + 2)).
    views = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    assert loss_of(views).item() == pytest.approx(np.log(1 + 2 * np.exp(-2)))
    swapped = views[:, [0, 1, 3, 2]]  # the second views belong to the other sample
    assert loss_of(swapped) > loss_of(views) + 1
    torch.testing.assert_close(loss_of(5 * projected), loss_of(projected))  # only directions count


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [("vae", 10, 2), ("vae", 256, 25), ("denoising", 1280, 64), ("contrastive", 10, 4), ("contrastive", 256, 51),
     ("contrastive", 1280, 128)],
)  # fmt: skip
def test_latent_widths(name, inputs, expected):
    assert latent_width(name, inputs) == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_parameters_is_counted_right(name):
    plain = Plain(name, 30)
    assert num_parameters(name, 30, HIDDEN[name]) == sum(p.numel() for p in plain.parameters())
    assert len(parameter_shapes(name, 30, HIDDEN[name])) == len(list(plain.parameters()))


def test_the_widths_of_the_row_are_used_where_none_are_given():
    x, split = weights(layers=1)
    params = AutoencoderStack("vae", x, split, seed=0).params
    assert params["encode1.weight"].shape == (1, 512, 256)
    assert sum(p.numel() for p in params.values()) == num_parameters("vae", 30) != num_parameters("vae", 30, (24, 16))


def test_another_kind_is_a_row_and_a_loss(monkeypatch):
    """A plain autoencoder with a third hidden block in front of the latent layer's copy, and no noise."""

    def loss(stack, clean, noise, draws):
        assert noise is None
        z = stack.linear("latent", stack.block("more", stack.encode_hidden(clean, draws), draws))
        return (stack.decode(z, draws) - clean).square().mean((1, 2))

    row = Autoencoder((24, 16), lambda inputs: 3, loss, blocks={"more": ("inner", "inner")})
    monkeypatch.setitem(AUTOENCODERS, "plain", row)
    x, split = weights(dtype=torch.float32)
    start = AutoencoderStack("plain", x, split, seed=0).validation_losses()
    schedule = Schedule(max_epochs=20, patience=20, lr=5e-3)
    fitted = fit_transform("plain", x, split, schedule=schedule, seed=0)
    assert fitted["features"].shape == (3, 81, 3) == (3, 81, latent_width("plain", 30))
    assert (fitted["validation_loss"] < 0.9 * start.detach().numpy()).all()


def test_validation_batches_never_hold_a_single_row():
    for rows in range(2, 200):
        batches = autoencoders._batches(rows, 32)
        sizes = [part.stop - part.start for part in batches]
        assert sum(sizes) == rows and min(sizes) > 1 and max(sizes) <= 48


def test_batch_statistics_of_a_step_that_broke_off_are_forgotten(monkeypatch):
    """A recording may break off where memory runs out; the step is then done without."""
    x, split = weights()
    stack = AutoencoderStack("denoising", x, split, 0)
    size, updated = next(stack.begin(1))[0], []
    monkeypatch.setattr(stack, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stack.minibatch_losses(size)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda running, *_: updated.extend(running))
    next(stack.begin(2))
    stack.minibatch_losses(size)
    assert sorted(map(id, updated)) == sorted(map(id, stack.buffers.values()))
