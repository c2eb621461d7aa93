"""Where no GPU is at hand: the "meta" device stands in for one, and no operation may mix it with the CPU.

Tensors there have shapes and no contents, so this tells of the steps of training but not of numbers, and not of what
looks at numbers: which models have stopped, and which weights are their best.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autoencoders
from training import attention, classifier, stacks
from training.attention import TOKEN, AttentionStack
from training.classifier import ClassifierStack, Models, attribution, predict_logits
from training.projections import Blocks, ProjectionStack
from training.stacks import Adam, Split, standardise

META = torch.device("meta")
ops = torch.ops.aten
CPU = torch.device("cpu")


class OneDevice(TorchDispatchMode):
    """Fails at an operation that takes tensors of two devices where a GPU would.

    Allowed are copies, indices on the CPU into what lies on the device, and numbers (of no dimension) on the CPU, but
    not in the fused Adam, whose kernel reads the count of steps where the weights are.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, looked_at = kwargs or {}, (args, kwargs)
        if func is ops.copy_.default or (func is ops.index.Tensor and args[0].device == META):
            looked_at = ()
        leaves = [leaf for leaf in tree_leaves(looked_at) if isinstance(leaf, Tensor)]
        if func is not ops._fused_adam_.default:
            leaves = [leaf for leaf in leaves if leaf.dim() or leaf.device != CPU]
        devices = {leaf.device for leaf in leaves}
        assert len(devices) < 2, f"{func} takes tensors of {devices}"
        return func(*args, **kwargs)


class Recording(TorchDispatchMode):
    """Fails at an operation that takes or makes a tensor that is not on the device: a recording cannot wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        assert devices <= {META}, f"{func} takes or makes tensors of {devices}"
        return result


@pytest.fixture
def meta_draws(monkeypatch):
    """There is no generator on the meta device; what is drawn there has no contents, from whatever generator."""
    for module in (stacks, classifier, attention, autoencoders):
        monkeypatch.setattr(module, "stream", lambda *key, device="cpu": torch.Generator())


FUSED = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0, "eps": 1e-8, "amsgrad": False, "maximize": False}
SPLIT = Split(torch.arange(70), torch.arange(70, 80), torch.arange(80, 100)).to(META)


def check_steps(stack) -> None:
    """Steps of models of two rates, and then with some models gone: what is recorded is on the device only."""
    optimiser = Adam(stack.params)
    rates = torch.tensor([1e-3] * 2 + [1e-4] * 2, dtype=torch.float64)
    for left in ([0, 1, 2, 3], [2, 0]):
        index = torch.tensor(left)
        stack.take(index)
        optimiser.take(index)
        optimiser.begin(rates[: len(left)], steps=7)
        assert {count.device for _, _, counts in optimiser.slices for count in counts} == {META}
        assert list(stack.begin(1)) == [[32, 32, 6]]
        for size in (32, 6):
            with Recording():
                gradients = stack.gradients(size)
                optimiser.step(stack.params, gradients)
            assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in stack.params.values()]
        with Recording(), torch.no_grad():
            assert stack.validation_losses().shape == (len(left),)


def models_of(columns: int, masked: bool) -> Models:
    """Two models of either of two runs."""
    live = torch.arange(4 * columns).view(4, columns) > 2 if masked else None
    return Models(torch.zeros(4, dtype=torch.int64), torch.arange(4) // 2, live)


def labels() -> Tensor:
    """The classes of the samples."""
    return torch.zeros(100, dtype=torch.int64, device=META)


@pytest.mark.parametrize("masked", [False, True])
def test_a_classifiers_step_stays_on_its_device(meta_draws, masked):
    with OneDevice():
        x = standardise(torch.zeros(3, 100, 7, device=META), SPLIT.train)
        models = models_of(7, masked)
        models = Models(torch.tensor([0, 2, 1, 0]), models.run, models.live)
        stack = ClassifierStack(x, labels(), SPLIT, models, 5, seed=0)
        check_steps(stack)
        assert predict_logits(stack.params, x, stack.source, SPLIT.test).shape == (2, 20, 5)
        assert attribution(stack.params, x, stack.source, SPLIT.test, 7).shape == (2, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_of_attention_stays_on_its_device(meta_draws, masked):
    with OneDevice():
        x = torch.zeros(1, 100, 6 * TOKEN, device=META)
        check_steps(AttentionStack(x, labels(), SPLIT, models_of(6, masked), 5, seed=0))


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_of_projections_stays_on_its_device(meta_draws, masked):
    shapes = [(2, 10, 12), (1, 8, 6), (2, 10, 12)]
    start = [torch.ones(12, 3), torch.ones(6, 3), torch.ones(12, 3)], [torch.ones(wide, 3) for wide in (10, 8, 10)]
    with OneDevice():
        x = torch.zeros(1, 100, sum(rank * (wide + high) for rank, wide, high in shapes), device=META)
        blocks = Blocks(x, shapes, start, SPLIT.train)
        check_steps(ProjectionStack(blocks, labels(), SPLIT, models_of(27, masked), 5, seed=0))


@pytest.mark.parametrize("name", autoencoders.AUTOENCODERS)
def test_an_autoencoders_step_stays_on_its_device(meta_draws, name):
    with OneDevice():
        stack = autoencoders.AutoencoderStack(name, torch.zeros(4, 100, 16, device=META), SPLIT, 0)
        check_steps(stack)
        assert stack.encode(stack.x[stack.model]).shape == (2, 100, autoencoders.latent_width(name, 16))


def test_mixed_devices_are_noticed():
    on_meta, on_cpu, number = torch.zeros(1, 3, 3, device=META), torch.zeros(1, 3, 3), torch.zeros((), device=META)
    index, adam = torch.zeros(2, dtype=torch.int64), Adam({"weight": on_meta})
    adam.begin(torch.ones(1, dtype=torch.float64), 0)
    with OneDevice():
        assert on_meta[index].shape == (2, 3, 3)
        for mixed in (
            lambda: torch.bmm(on_meta, on_cpu),
            lambda: on_meta.mul_(on_cpu),
            lambda: on_cpu + number,
            lambda: on_cpu[index.to(META)],
            lambda: adam.step({"weight": on_meta}, [on_cpu]),
            lambda: torch._fused_adam_(*[[on_meta]] * 4, [], [torch.ones(())], lr=1, **FUSED),
        ):
            with pytest.raises(AssertionError, match="takes tensors of"):
                mixed()
    for mixed in (
        lambda: on_meta[index],
        lambda: on_meta + torch.ones(()),
        lambda: torch.zeros(1, 3, 3).to(META),
        lambda: torch.empty_like(on_meta).copy_(on_cpu),
    ):
        with pytest.raises(AssertionError, match="takes or makes tensors of"), Recording():
            mixed()
