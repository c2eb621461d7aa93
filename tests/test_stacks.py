import hashlib
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training.stacks import (
    Adam,
    Plateau,
    Stored,
    dropout_masks,
    filled,
    numpy_stream,
    random_bits,
    seed_of,
    standardise,
    start_thread,
    stream,
)


def test_dropout_keeps_as_many_as_it_should_and_their_mean():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    masks = dropout_masks(0.3, random_bits(100 * 5003, generators), torch.float64).view(2, 100, 5003)
    assert not torch.equal(masks[0], masks[1])
    again = dropout_masks(0.3, random_bits(100 * 5003, [torch.Generator().manual_seed(1)]), torch.float64)
    assert torch.equal(again.view(100, 5003), masks[1])  # whatever else is drawn at the same time
    masks = masks.flatten(0, 1)
    kept = masks != 0
    assert kept.double().mean().item() == pytest.approx(0.7, abs=3e-3)
    assert masks[kept].unique().tolist() == pytest.approx([1 / 0.7], rel=1e-5)
    # Entries are independent: neighbours, and those that share a 64-bit draw, agree as often as chance has it.
    for step in (1, 2, 3, 4):
        assert (kept[:, step:] & kept[:, :-step]).double().mean().item() == pytest.approx(0.49, abs=3e-3)


def test_what_cannot_be_held_is_read_as_it_comes(monkeypatch):
    stored = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    hold = partial(filled, device=torch.device("cpu"))
    x = Stored(lambda rows: stored[rows], stored.shape, torch.arange(10), hold)
    expected = standardise(torch.from_numpy(stored), torch.arange(10))

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    assert torch.equal(x.rows(torch.tensor([[3, 15]])), expected[[3, 15]][None])


def test_a_thread_that_trains_has_one_core_and_no_denormal_numbers():
    threads, smallest = torch.get_num_threads(), torch.tensor([1e-38])
    precision = torch.get_float32_matmul_precision()
    try:
        start_thread(torch.device("cpu"))
        assert torch.get_num_threads() == 1 and (smallest * 0.1).item() == 0
        assert torch.get_float32_matmul_precision() == precision == "highest"  # TF32 is for GPUs
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    assert (smallest * 0.1).item() > 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3), min_size=1, max_size=60), st.integers(0, 4))
def test_plateau_is_torchs_reduce_lr_on_plateau(epochs, patience):
    plateau = Plateau(3, 1e-3, patience)
    optimisers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3) for _ in range(3)]
    schedulers = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=patience) for optimiser in optimisers
    ]
    for losses in epochs:
        plateau.update(torch.tensor(losses, dtype=torch.float64), torch.ones(3, dtype=torch.bool))
        for scheduler, loss in zip(schedulers, losses, strict=True):
            scheduler.step(loss)
        assert plateau.rates.tolist() == [optimiser.param_groups[0]["lr"] for optimiser in optimisers]


def test_standardise_by_hand():
    x = torch.tensor([[0.0, 5.0, 1.0], [2.0, 5.0, 1.0 + 1e-7], [100.0, 7.0, 3.0]])
    # Column 0: mean 1, std 1 over the train rows; the test row is clipped. Columns 1, 2: constant but for rounding.
    expected = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [10.0, 0.0, 0.0]])
    assert torch.equal(standardise(x, torch.tensor([0, 1])), expected)


def test_standardise_in_blocks_is_numpys_mean_and_deviation():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    x[:, 3] = 0.1
    rows = torch.arange(40)
    train = x[:40].double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.clip((x.double().numpy() - train.mean(0)) / train.std(0), -10, 10)
    expected[:, 3] = 0
    for numbers in (7, 7 * 11, 2**24):
        np.testing.assert_allclose(standardise(x, rows, numbers), expected, atol=1e-4)


def test_standardise_gives_finite_numbers_for_the_smallest_of_weights():
    x = torch.tensor([[1e-40, 1e-38], [2e-40, 3e-38], [3e-40, 2e-38]])
    scaled = standardise(x, torch.tensor([0, 1]))
    assert (scaled[:, 0] == 0).all()  # a deviation of 5e-41 has no finite float32 reciprocal
    assert scaled.isfinite().all()


def test_standardise_does_each_source_by_itself_and_leaves_its_input_alone():
    x = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e6, 1e-6, 3.0]) + 7
    before, rows = x.clone(), torch.arange(10)
    scaled = standardise(x, rows)
    assert torch.equal(x, before)
    torch.testing.assert_close(scaled[1], standardise(x[1], rows))
    torch.testing.assert_close(scaled[:, :10, 0].mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled[:, :10, 1].std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert (scaled[:, :, 2] == 0).all()  # 1e-6 about 7 is rounding


def test_streams_differ_by_every_part_of_their_key():
    keys = [(0, 0, "order", 1), (1, 0, "order", 1), (0, 1, "order", 1), (0, 0, "dropout", 1), (0, 0, "order", 2)]
    draws = {tuple(torch.rand(3, generator=stream(*key)).tolist()) for key in keys}
    assert len(draws) == 5
    assert torch.equal(torch.rand(3, generator=stream(*keys[0])), torch.rand(3, generator=stream(*keys[0])))


def test_numpys_streams_differ_by_their_key_and_come_from_the_same_hash():
    draws = {
        tuple(numpy_stream(*key).random(3)) for key in [(0, "split"), (1, "split"), (0, "landmarks"), (-1, "split")]
    }
    assert len(draws) == 4
    digest = hashlib.sha256(b"7/3/order").digest()
    assert seed_of(7, 3, "order") == int.from_bytes(digest, "little")
    assert stream(7, 3, "order").initial_seed() == int.from_bytes(digest[:8], "little")


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.5])
def test_adam_with_weight_decay_is_torchs_adamw_for_each_models_rate(decay):
    generator = torch.Generator().manual_seed(0)
    start = {"weight": torch.randn(4, 5, 3, generator=generator), "bias": torch.randn(4, 1, 3, generator=generator)}
    params = {name: parameter.clone() for name, parameter in start.items()}
    rates = torch.tensor([1e-3, 1e-2, 1e-2, 0.1], dtype=torch.float64)
    ours = Adam(params, decay)
    ours.begin(rates, 0)
    alone = [[nn.Parameter(parameter[m].clone()) for parameter in start.values()] for m in range(4)]
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    theirs = [kind(alone[m], lr=rates[m].item(), weight_decay=decay, fused=True) for m in range(4)]
    for _ in range(5):
        gradients = [torch.randn(parameter.shape, generator=generator) for parameter in start.values()]
        ours.step(params, gradients)
        for m in range(4):
            for parameter, gradient in zip(alone[m], gradients, strict=True):
                parameter.grad = gradient[m].clone()
            theirs[m].step()
    for m in range(4):
        for name, parameter in zip(start, alone[m], strict=True):
            if decay:
                torch.testing.assert_close(params[name][m], parameter.data, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(params[name][m], parameter.data)


def test_parameters_without_a_gradient_shrink_by_rate_times_weight_decay():
    params = {"weight": torch.ones(2, 3)}
    optimiser = Adam(params, 0.1)
    optimiser.begin(torch.tensor([0.5, 1.0], dtype=torch.float64), 0)
    optimiser.step(params, [torch.zeros(2, 3)])
    torch.testing.assert_close(params["weight"], torch.tensor([[0.95] * 3, [0.9] * 3]))
