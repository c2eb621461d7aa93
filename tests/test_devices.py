"""Where no GPU is at hand: the "meta" device stands in for one, and no operation may mix it with the CPU.

Tensors there have shapes and no contents, so this tells of the steps of training but not of numbers, and not of what
looks at numbers: which models have stopped, and which weights are their best.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autoencoders
from training import classifier
from training.classifier import ClassifierStack, Models, attribution, predict_logits
from training.stacks import Adam, Split, standardise

META = torch.device("meta")
ops = torch.ops.aten
CPU = torch.device("cpu")


class OneDevice(TorchDispatchMode):
    """Fails at an operation that takes tensors of two devices where a GPU would.

    Allowed are copies, indices on the CPU into what lies on the device, and numbers (of no dimension) on the CPU, but
    not in the fused Adam, whose kernel reads the count of steps where the weights are. Within what is ``recorded`` all
    tensors are on the device: it waits for no copy.
    """

    recorded = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, looked_at = kwargs or {}, (args, kwargs)
        if self.recorded:
            result = func(*args, **kwargs)
            devices = {leaf.device for leaf in tree_leaves((looked_at, result)) if isinstance(leaf, Tensor)}
            assert devices <= {META}, f"{func} takes tensors of {devices} within a recording"
            return result
        if func is ops.copy_.default or (func is ops.index.Tensor and args[0].device == META):
            looked_at = ()
        leaves = [leaf for leaf in tree_leaves(looked_at) if isinstance(leaf, Tensor)]
        if func is not ops._fused_adam_.default:
            leaves = [leaf for leaf in leaves if leaf.dim() or leaf.device != CPU]
        devices = {leaf.device for leaf in leaves}
        assert len(devices) < 2, f"{func} takes tensors of {devices}"
        return func(*args, **kwargs)


@pytest.fixture
def meta_draws(monkeypatch):
    """There is no generator on the meta device: what is drawn there is left as it is."""

    def stream(*key, device="cpu"):
        return torch.Generator() if torch.device(device) == CPU else SimpleNamespace(device=META)

    monkeypatch.setattr(classifier, "stream", stream)
    monkeypatch.setattr(autoencoders, "stream", stream)
    monkeypatch.setattr(Tensor, "random_", lambda self, *_, **__: self)
    monkeypatch.setattr(
        autoencoders.Draws, "normal", lambda self, purpose, *shape: torch.ones(shape, device=self.like.device)
    )


FUSED = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0, "eps": 1e-8, "amsgrad": False, "maximize": False}
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


@pytest.mark.parametrize("name", autoencoders.AUTOENCODERS)
def test_an_autoencoders_step_stays_on_its_device(meta_draws, name):
    with OneDevice():
        stack = autoencoders.AutoencoderStack(name, torch.zeros(4, 100, 16, device=META), SPLIT, 0)
        check_steps(stack)
        assert stack.encode(stack.x[stack.model]).shape == (2, 100, autoencoders.latent_width(name, 16))


def test_mixed_devices_are_noticed():
    on_meta, on_cpu, number = torch.zeros(1, 3, 3, device=META), torch.zeros(1, 3, 3), torch.zeros((), device=META)
    index, adam = torch.zeros(2, dtype=torch.int64), Adam({"weight": on_meta})
    with OneDevice():
        assert on_meta[index].shape == (2, 3, 3)
        for mixed in (
            lambda: torch.bmm(on_meta, on_cpu),
            lambda: on_meta.mul_(on_cpu),
            lambda: on_cpu + number,
            lambda: on_cpu[index.to(META)],
            lambda: adam.step({"weight": on_meta}, [on_cpu], torch.ones(1, dtype=torch.float64)),
            lambda: torch._fused_adam_(*[[on_meta]] * 4, [], [torch.ones(())], lr=1, **FUSED),
        ):
            with pytest.raises(AssertionError, match="takes tensors of"):
                mixed()
