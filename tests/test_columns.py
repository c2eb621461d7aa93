"""Columns left out: what is trained and read of it is what would be with them, and what no model can learn from."""

import numpy as np
import pytest
import torch
from making import recorded
from test_classifier import CLASSES, HIDDEN, grid, problem

from training.classifier import ClassifierStack, Models, attribution, initial_weights, predict_logits, train_classifiers
from training.columns import Held, without_constant, without_masked
from training.stacks import Schedule, Stored, standardise, stream, train

FEATURES = 16
SCHEDULE = Schedule(max_epochs=30, patience=4, lr=1e-2, lr_patience=1, hidden=HIDDEN)
Recorded = recorded(ClassifierStack)


def inputs(sources: int) -> tuple:
    """Return standardised inputs, classes, split, and the columns that are constant on the train rows of all sources.

    Of several sources column 6 is constant in the first one only.
    """
    x, y, split = problem(features=FEATURES, sources=sources)
    constant = [4, 5, 7, 12, 13, 14, 15]
    for column in constant:
        x[:, split.train, column] = 3
    x[0, split.train, 6] = -1
    return standardise(x, split.train), y, split, sorted([*constant, 6]) if sources == 1 else constant


def masked(models: Models) -> Models:
    """Models none of which sees columns 0, 1 and 13; the others they see are not the same."""
    live = torch.rand(len(models.run), FEATURES, generator=torch.Generator().manual_seed(5)) < 0.8
    live[:, [0, 1, 13]], live[0, 2:13] = False, True
    return Models(models.source, models.run, live)


def test_constant_columns_are_those_that_are_0_in_all_sources():
    for sources in (1, 3):
        x, _, _, constant = inputs(sources)
        held = without_constant(x)
        assert (~held.columns).nonzero().squeeze(1).tolist() == constant
        assert torch.equal(held.x, x[:, :, held.columns]) and held.x.is_contiguous()
        assert held.shape == x.shape and held.nbytes == held.x.nbytes < x.nbytes
    assert not (x[1:] == 0).all((0, 1))[6] and (x[0] == 0).all(0)[6]


def test_few_columns_are_not_worth_it_and_never_all():
    x = torch.ones(2, 9, FEATURES)
    x[:, :, :1] = 0
    held = without_constant(x)
    assert held.x is x and held.columns is None
    x[:, :, :2] = 0
    assert without_constant(x).x.shape == (2, 9, 14)
    assert without_constant(torch.zeros(2, 9, FEATURES)).columns is None


def test_masked_columns_go_too_unless_they_are_stored():
    x, _, split, constant = inputs(1)
    live = masked(grid(1, 4)).live
    assert without_masked(x, None) == Held(x)
    held = without_masked(without_constant(x), live)
    assert (~held.columns).nonzero().squeeze(1).tolist() == sorted({0, 1, *constant})
    assert torch.equal(held.x, x[:, :, held.columns])
    stored = Stored(lambda rows: x[0].numpy()[rows], x.shape[1:], split.train, None)
    assert without_masked(stored, live) == Held(stored)


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("sources", [1, 3])
def test_models_are_the_same_without_columns_that_say_nothing(sources, hide):
    x, y, split, constant = inputs(sources)
    models = masked(grid(sources, 2)) if hide else grid(sources, 2)
    held = without_masked(without_constant(x), models.live)
    kept, source, rows = held.columns, models.source, split.test
    assert (~kept).sum() == len(constant) + (2 if hide else 0)

    stack = Recorded(x, y, split, models, CLASSES, seed=7, hidden=HIDDEN)
    narrow = Recorded(held.x, y, split, models, CLASSES, seed=7, hidden=HIDDEN, columns=kept)
    first = {name: parameter.clone() for name, parameter in stack.params.items()}
    for name, parameter in narrow.params.items():
        assert torch.equal(parameter, first[name][:, kept] if name == "weight0" else first[name])

    expected, trained = train(stack, SCHEDULE), train(narrow, SCHEDULE)
    assert torch.equal(expected.state["weight0"][:, ~kept], first["weight0"][:, ~kept])  # these never move
    assert len(set(trained.epochs.tolist())) > 1  # models left the stack
    assert torch.equal(trained.epochs, expected.epochs) and torch.equal(trained.best_epoch, expected.best_epoch)
    for losses, of_all in zip(narrow.seen, stack.seen, strict=True):
        torch.testing.assert_close(losses, of_all, rtol=1e-9, atol=0)

    scores = predict_logits(trained.state, held.x, source, rows)
    torch.testing.assert_close(scores, predict_logits(expected.state, x, source, rows), rtol=1e-9, atol=1e-9)
    shares = attribution(trained.state, held.x, source, rows, 4, kept)
    torch.testing.assert_close(shares, attribution(expected.state, x, source, rows, 4), rtol=1e-9, atol=1e-9)
    assert (shares[:, 0] > 0).all() and (shares[:, 3] == 0).all()  # the last block is constant, and keeps its place
    sliced = attribution(trained.state, held.x, source, rows, 4, kept, numbers_at_once=100)
    torch.testing.assert_close(sliced, shares, rtol=1e-12, atol=0)


@pytest.mark.parametrize("hide", [False, True])
def test_results_are_the_same_whether_constant_columns_are_held_or_not(hide):
    x, y, split, _ = inputs(1)
    models = masked(grid(1, 3)) if hide else grid(1, 3)
    whole, narrow = (
        train_classifiers(numbers, y, split, models, CLASSES, schedule=SCHEDULE, seed=3, block=4)
        for numbers in (x, without_constant(x))
    )
    assert narrow["attribution"].shape == (3, 4)
    for name, array in narrow.items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-6, err_msg=name)


def drawn_run_by_run(models: Models, features: int, widths: tuple[int, ...], seed: int, dtype: torch.dtype) -> dict:
    """As weights were drawn before they were drawn where they are trained: all runs on the host, then gathered."""
    drawn, runs = {}, models.run.unique().tolist()
    for run in runs:
        first, hidden = stream(seed, run, "first layer"), stream(seed, run, "hidden init")
        for layer, (fan_in, fan_out) in enumerate(zip((features, *widths), widths, strict=False)):
            for name, rows, generator in (
                (f"weight{layer}", fan_in, hidden if layer else first),
                (f"bias{layer}", 1, hidden),
            ):
                draw = torch.rand(rows, fan_out, generator=generator, dtype=dtype) * 2 - 1
                drawn.setdefault(name, []).append(draw * (fan_in**-0.5 if layer else 1.0))
    position = torch.tensor([runs.index(run) for run in models.run.tolist()])
    params = {name: torch.stack(draws)[position] for name, draws in drawn.items()}
    live = (torch.ones(len(position), features) if models.live is None else models.live).to(dtype)
    scale = live.sum(1).rsqrt()[:, None, None]
    return params | {"weight0": params["weight0"] * (live[:, :, None] * scale), "bias0": params["bias0"] * scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initial_weights_are_the_same_bits_as_drawn_run_by_run(dtype):
    models = masked(Models(torch.zeros(5, dtype=torch.long), torch.tensor([4, 0, 4, 2, 0])))
    for each in (models, Models(models.source, models.run)):
        weights = initial_weights(each, FEATURES, (*HIDDEN, CLASSES), 5, like=torch.zeros(1, dtype=dtype))
        expected = drawn_run_by_run(each, FEATURES, (*HIDDEN, CLASSES), 5, dtype)
        assert list(weights) == list(expected)
        assert all(torch.equal(weights[name], parameter) for name, parameter in expected.items())
