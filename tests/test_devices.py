"""Where no GPU is at hand: the "meta" device stands in for one, and no operation may mix it with the CPU.

Tensors there have shapes and no contents, so this tells of every step of training but not of its numbers.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autoencoders
import stacked_training
from stacked_training import Adam, ClassifierStack, Models, Split, attribution, predict_logits, standardise

META = torch.device("meta")
ops = torch.ops.aten
# Copies, and what a GPU lets indices on the CPU choose.
MAY_MIX = {ops.copy_.default, ops._to_copy.default, ops.index.Tensor}


class OneDevice(TorchDispatchMode):
    """Fails at an operation that takes tensors of two devices, as a GPU would; numbers (no dimensions) may differ."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()}
        assert len(devices) < 2 or func in MAY_MIX, f"{func} takes tensors of {devices}"
        return func(*args, **kwargs)


@pytest.fixture
def meta_draws(monkeypatch):
    """There is no generator on the meta device: ones for what is drawn there."""
    monkeypatch.setattr(
        stacked_training,
        "stream",
        lambda *key, device="cpu": torch.Generator() if torch.device(device).type == "cpu" else device,
    )
    for module in (stacked_training, autoencoders):
        monkeypatch.setattr(
            module,
            "dropout_masks",
            lambda rate, shape, of, dtype: torch.ones(len(of), *shape, dtype=dtype, device=META),
        )
    monkeypatch.setattr(autoencoders, "stream", stacked_training.stream)
    monkeypatch.setattr(
        autoencoders.Draws, "normal", lambda self, purpose, *shape: torch.ones(shape, device=self.like.device)
    )


SPLIT = Split(torch.arange(70), torch.arange(70, 80), torch.arange(80, 100)).to(META)


def check_steps(stack) -> None:
    """All of an epoch's steps on the device, models of two rates, and then with some models gone."""
    optimiser = Adam(stack.params)
    rates = torch.tensor([1e-3] * 2 + [1e-4] * 2, dtype=torch.float64)
    for left in ([0, 1, 2, 3], [2, 0]):
        index = torch.tensor(left)
        stack.take(index)
        optimiser.take(index)
        for gradients in stack.gradients(1):
            assert {gradient.device for gradient in gradients} == {META}
            optimiser.step(stack.params, gradients, rates[: len(left)])
        assert stack.validation_losses().device == META


@pytest.mark.parametrize("masked", [False, True])
def test_a_classifiers_step_stays_on_its_device(meta_draws, masked):
    with OneDevice():
        x = standardise(torch.zeros(3, 100, 7, device=META), SPLIT.train)
        y = torch.zeros(100, dtype=torch.int64, device=META)
        live = torch.arange(28).view(4, 7) > 2 if masked else None
        stack = ClassifierStack(x, y, SPLIT, Models(torch.tensor([0, 2, 1, 0]), torch.arange(4) // 2, live), 5, seed=0)
        check_steps(stack)
        assert predict_logits(stack.params, x, stack.source, SPLIT.test).shape == (2, 20, 5)
        assert attribution(stack.params, x, stack.source, SPLIT.test, 7).shape == (2, 1)


@pytest.mark.parametrize("name", autoencoders.HIDDEN)
def test_an_autoencoders_step_stays_on_its_device(meta_draws, name):
    with OneDevice():
        stack = autoencoders.AutoencoderStack(name, torch.zeros(4, 100, 16, device=META), SPLIT, 0)
        check_steps(stack)
        assert stack.encode(stack.x[stack.model]).shape == (2, 100, autoencoders.latent_width(name, 16))


def test_mixing_is_found():
    for mixed in (lambda a, b: torch.bmm(a, b), lambda a, b: a.mul_(b), lambda a, b: a + b):
        with OneDevice(), pytest.raises(AssertionError, match="takes tensors of"):
            mixed(torch.zeros(1, 3, 3, device=META), torch.zeros(1, 3, 3))
