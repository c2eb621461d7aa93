import copy
from functools import partial
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from making import recorded
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.nn import functional

from training.classifier import (
    ClassifierStack,
    Models,
    attribution,
    initial_weights,
    logits,
    predict_logits,
    scored,
    train_classifiers,
)
from training.stacks import Schedule, Split, Stored, dropout_masks, filled, random_bits, standardise, stream, train

CLASSES, HIDDEN = 4, (16, 16, 16)


def problem(samples=90, features=5, sources=1, dtype=torch.float64, seed=0):
    """Inputs that predict the class in their first columns, half hidden by noise, and a split of them."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % CLASSES
    x = torch.randn(sources, samples, features, generator=generator, dtype=dtype)
    x[:, torch.arange(samples), y % features] += 2
    split = Split(torch.arange(0, 61), torch.arange(61, 75), torch.arange(75, samples))
    return x, y, split


def grid(sources, runs):
    pairs = [(source, run) for run in range(runs) for source in range(sources)]
    return Models(*(torch.tensor(column) for column in zip(*pairs, strict=True)))


def alone(x, y, split, params, run, *, seed, epochs, dropout, batch_size=32):
    """The textbook loop for one model, with torch.optim.Adam and ReduceLROnPlateau; returns validation losses."""
    widths = [x.shape[1], *HIDDEN, CLASSES]
    linears = [nn.Linear(a, b, dtype=x.dtype) for a, b in pairwise(widths)]
    for i, linear in enumerate(linears):
        linear.weight.data = params[f"weight{i}"].detach().mT.clone()
        linear.bias.data = params[f"bias{i}"].detach()[0].clone()
    model = nn.ModuleList(linears)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=1)

    def forward(h, masks=None):
        for i, linear in enumerate(linears[:-1]):
            h = functional.relu(linear(h))
            if masks is not None:
                h = h * masks[i]
        return linears[-1](h)

    losses = []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(split.train), generator=stream(seed, run, "order", epoch))
        generator = stream(seed, run, "dropout", epoch)
        for rows in split.train[order].split(batch_size):
            bits = random_bits(len(HIDDEN) * HIDDEN[0] * len(rows), [generator]).view(len(HIDDEN), len(rows), HIDDEN[0])
            masks = dropout_masks(dropout, bits, x.dtype)
            optimiser.zero_grad()
            functional.cross_entropy(forward(x[rows], masks), y[rows]).backward()
            optimiser.step()
        with torch.no_grad():
            losses.append(functional.cross_entropy(forward(x[split.validation]), y[split.validation]).item())
        scheduler.step(losses[-1])
    return losses


Recorded = recorded(ClassifierStack)


@pytest.mark.parametrize(("dtype", "rtol", "epochs"), [(torch.float64, 1e-9, 8), (torch.float32, 1e-5, 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_model_of_a_stack_trains_as_plain_torch_does(dtype, rtol, epochs, dropout):
    x, y, split = problem(sources=3, dtype=dtype)
    models = grid(3, 2)
    stack = Recorded(x, y, split, models, CLASSES, seed=7, hidden=HIDDEN, dropout=dropout)
    initial = {name: p.detach().clone() for name, p in stack.params.items()}
    train(stack, Schedule(max_epochs=epochs, patience=epochs + 1, lr_patience=1))
    stacked = torch.stack(stack.seen, dim=1)  # (M, epochs)
    for m, (source, run) in enumerate(zip(models.source.tolist(), models.run.tolist(), strict=True)):
        start = {name: p[m] for name, p in initial.items()}
        losses = alone(x[source], y, split, start, run, seed=7, epochs=epochs, dropout=dropout)
        torch.testing.assert_close(stacked[m], torch.tensor(losses, dtype=dtype), rtol=rtol, atol=0)


@pytest.mark.parametrize("few", [0, 1000])  # no layer has few columns, all have
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_by_hand_are_those_of_autograd(dropout, few):
    x, y, split = problem(sources=3)
    network = {"hidden": HIDDEN, "dropout": dropout, "few_columns": few}
    stack = ClassifierStack(x, y, split, grid(3, 2), CLASSES, seed=7, **network)
    seen = 0
    for size in chain.from_iterable(stack.begin(1)):  # the last minibatch is smaller
        inputs, classes, masks = stack.minibatch(size)
        params = {name: p.clone().requires_grad_() for name, p in stack.params.items()}
        scores = logits(params, inputs, masks)
        loss = functional.cross_entropy(scores.flatten(0, 1), classes.flatten(), reduction="sum") / classes.shape[1]
        loss.backward()
        for p, gradient in zip(params.values(), stack.backpropagate(inputs, classes, masks), strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-10, atol=1e-15)
        seen += inputs.shape[1]
    assert seen == len(split.train)


def test_inputs_read_from_storage_train_as_those_in_memory_do():
    at_once = 60  # so that mean and scale come from several blocks
    x, y, split = problem(features=6, dtype=torch.float32)
    stored = (x[0] * torch.tensor([1.0, 1e3, 1e-3, 1.0, 1.0, 0.0]) + 5).numpy()
    in_memory = standardise(torch.from_numpy(stored)[None], split.train, at_once)
    schedule = Schedule(max_epochs=4, patience=9, hidden=HIDDEN)
    models = Models(torch.zeros(2, dtype=torch.long), torch.arange(2), torch.tensor([True] * 5 + [False]).repeat(2, 1))
    whole = partial(filled, device=torch.device("cpu"))
    reads = {True: 0, False: 0}
    trained = {}
    for hold in (True, False):

        def read(rows, hold=hold):
            reads[hold] += 1
            return stored[rows]

        inputs = Stored(read, stored.shape, split.train, whole if hold else None, at_once)
        assert reads[hold] == 0
        trained[hold] = train_classifiers(inputs, y, split, models, CLASSES, schedule=schedule, seed=3)
    first = train_classifiers(in_memory, y, split, models, CLASSES, schedule=schedule, seed=3)
    for second in trained.values():
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert reads[False] > reads[True]


def test_a_model_does_not_depend_on_what_it_is_stacked_with():
    x, y, split = problem(sources=4)
    x[2] *= 0.01  # learns slowly, so that models stop at different epochs and the learning rates part
    schedule = Schedule(max_epochs=60, patience=4, lr_patience=2, lr=5e-3, hidden=HIDDEN)
    together = train_classifiers(x, y, split, grid(4, 2), CLASSES, schedule=schedule, seed=3)
    assert len(set(together["epochs"].tolist())) > 2
    models = grid(4, 2)
    for m in range(8):
        single = Models(models.source[m : m + 1], models.run[m : m + 1])
        by_itself = train_classifiers(x, y, split, single, CLASSES, schedule=schedule, seed=3)
        for name, array in by_itself.items():
            np.testing.assert_allclose(array[0], together[name][m], rtol=1e-6, err_msg=name)


def test_a_masked_column_is_a_column_left_out():
    x, y, split = problem(features=7)
    live = torch.tensor([True, True, True, False, True, False, False])
    schedule = Schedule(max_epochs=6, patience=9, hidden=HIDDEN)
    single = Models(torch.tensor([0]), torch.tensor([1]))
    masked = Models(torch.tensor([0]), torch.tensor([1]), live[None])
    shown = train_classifiers(x, y, split, masked, CLASSES, schedule=schedule, seed=1)

    # Leaving out columns 5 and 6 needs no trick: the stream draws column by column.
    short = Models(torch.tensor([0]), torch.tensor([1]), live[None, :5])
    cut = train_classifiers(x[:, :, :5], y, split, short, CLASSES, schedule=schedule, seed=1)
    np.testing.assert_allclose(shown["log_loss"], cut["log_loss"], rtol=1e-6)

    # Leaving out column 3 too: the same model but for the draw that column 4 would get as the fourth.
    stack = ClassifierStack(x[:, :, live], y, split, single, CLASSES, seed=1, hidden=HIDDEN)
    whole = initial_weights(masked, 7, (*HIDDEN, CLASSES), 1, like=x)
    stack.params["weight0"] = whole["weight0"][:, live]
    trained = train(stack, schedule)
    held_out = torch.cat([split.validation, split.test])
    scores = predict_logits(trained.state, x[:, :, live], torch.tensor([0]), held_out)
    losses = functional.cross_entropy(scores[0], y[held_out], reduction="none")
    np.testing.assert_allclose(shown["log_loss"][0], losses, rtol=1e-6)

    # The mask does matter: what is masked cannot be seen, and a change there changes nothing.
    noisy = x.clone()
    noisy[:, :, ~live] += 100
    again = train_classifiers(noisy, y, split, masked, CLASSES, schedule=schedule, seed=1)
    assert np.array_equal(again["log_loss"], shown["log_loss"])
    unmasked = train_classifiers(x, y, split, single, CLASSES, schedule=schedule, seed=1)
    assert not np.allclose(unmasked["log_loss"], shown["log_loss"])


def test_masks_stay_with_their_models_when_others_stop():
    x, y, split = problem(features=6)
    live = torch.ones(4, 6, dtype=torch.bool)
    live[1, :4] = live[2, 3:] = live[3, ::2] = False
    schedule = Schedule(max_epochs=60, patience=3, lr_patience=1, lr=1e-2, hidden=HIDDEN)
    models = Models(torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 1, 2]), live)
    together = train_classifiers(x, y, split, models, CLASSES, schedule=schedule, seed=3)
    assert len(set(together["epochs"].tolist())) > 2
    for m in range(4):
        single = Models(models.source[[m]], models.run[[m]], live[[m]])
        by_itself = train_classifiers(x, y, split, single, CLASSES, schedule=schedule, seed=3)
        np.testing.assert_allclose(by_itself["log_loss"][0], together["log_loss"][m], rtol=1e-6)


def test_hidden_layers_order_and_dropout_do_not_depend_on_the_input_width():
    models = grid(1, 3)
    narrow = initial_weights(models, 3, (*HIDDEN, CLASSES), 5, like=torch.zeros(1))
    wide = initial_weights(models, 9, (*HIDDEN, CLASSES), 5, like=torch.zeros(1))
    assert torch.equal(narrow["weight2"], wide["weight2"]) and torch.equal(narrow["bias3"], wide["bias3"])
    torch.testing.assert_close(narrow["weight0"] * 3**0.5, wide["weight0"][:, :3] * 9**0.5)
    assert not torch.equal(wide["weight0"][0], wide["weight0"][1])  # runs differ


def test_initial_weights_are_torchs_default():
    weights = initial_weights(grid(1, 1), 400, (300, 300, CLASSES), 0, like=torch.zeros(1))
    for i, fan_in in enumerate((400, 300, 300)):
        for name in (f"weight{i}", f"bias{i}"):
            bound = weights[name].detach().abs().max().item() * fan_in**0.5
            assert 0.9 < bound <= 1
    reference = nn.Linear(400, 300).weight.std().item()
    assert weights["weight0"].std().item() == pytest.approx(reference, rel=0.02)


def test_best_weights_come_back_and_patience_counts_from_them():
    x, y, split = problem(samples=90, features=40, dtype=torch.float32)  # wide: overfits soon
    stack = Recorded(x, y, split, grid(1, 3), CLASSES, seed=2, hidden=HIDDEN, dropout=0.0)
    everything = copy.copy(stack)
    trained = train(stack, Schedule(max_epochs=200, patience=5, lr=1e-2))
    assert (trained.epochs - trained.best_epoch == 5).all() and (trained.epochs < 200).all()
    everything.params, everything.seen = trained.state, []
    torch.testing.assert_close(everything.validation_losses().double(), trained.best_loss, rtol=1e-5, atol=0)
    seen = [losses[0].item() for losses in stack.seen[: int(trained.epochs.min())]]
    assert len(seen) >= 6 and max(seen) > min(seen) * 1.01  # the last epochs were worse than the best


def test_training_learns_and_the_loss_falls():
    x, y, split = problem(dtype=torch.float32)
    stack = Recorded(x, y, split, grid(1, 2), CLASSES, seed=3, hidden=HIDDEN)
    train(stack, Schedule(max_epochs=40, patience=40, lr=1e-2))
    assert (stack.seen[-1] < 0.7 * stack.seen[0]).all()
    schedule = Schedule(max_epochs=40, patience=40, lr=1e-2, hidden=HIDDEN)
    trained = train_classifiers(x, y, split, grid(1, 2), CLASSES, schedule=schedule, seed=0)
    assert (trained["train_accuracy"] > 0.75).all()
    test = y[split.test].numpy()
    assert (scored(test, trained["predicted"][:, len(split.validation) :], CLASSES)[0] > 0.5).all()


def test_same_seed_same_bits_and_another_seed_other_bits():
    x, y, split = problem(dtype=torch.float32)
    schedule = Schedule(max_epochs=3, patience=3, hidden=HIDDEN)
    first, second, other = (
        train_classifiers(x, y, split, grid(1, 2), CLASSES, schedule=schedule, seed=seed) for seed in (0, 0, 1)
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["log_loss"], other["log_loss"])


def test_a_schedule_without_widths_trains_the_default_ones():
    x, y, split = problem(dtype=torch.float32)
    default, given, narrow = (
        train_classifiers(x, y, split, grid(1, 1), CLASSES, schedule=Schedule(2, 2, hidden=hidden), seed=0)
        for hidden in (None, (512, 512, 512), HIDDEN)
    )
    assert all(np.array_equal(default[name], given[name]) for name in default)
    assert not np.array_equal(default["log_loss"], narrow["log_loss"])


def test_the_test_rows_never_touch_training():
    x, y, split = problem(dtype=torch.float32)
    changed = x.clone()
    changed[:, split.test] = 1e6
    schedule = Schedule(max_epochs=3, patience=3, hidden=HIDDEN)
    first, second = (
        train_classifiers(inputs, y, split, grid(1, 2), CLASSES, schedule=schedule, seed=0) for inputs in (x, changed)
    )
    boundary = len(split.validation)
    assert np.array_equal(first["log_loss"][:, :boundary], second["log_loss"][:, :boundary])
    assert not np.array_equal(first["log_loss"][:, boundary:], second["log_loss"][:, boundary:])
    for name in ("train_accuracy", "train_f1", "epochs", "validation_loss"):
        assert np.array_equal(first[name], second[name])


def test_a_diverged_training_is_told():
    x, y, split = problem(dtype=torch.float32)
    x[:, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="diverged"):
        train_classifiers(x, y, split, grid(1, 1), CLASSES, schedule=Schedule(2, 2, hidden=HIDDEN), seed=0)


def test_scored_is_scikit_learns_accuracy_and_macro_f1():
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 5, 30), generator.integers(0, 6, (4, 30))  # class 5 is never there
    accuracy, f1 = scored(truth, predicted, num_classes=7)
    for m, row in enumerate(predicted):
        assert accuracy[m] == pytest.approx(accuracy_score(truth, row))
        reference = f1_score(truth, row, labels=np.arange(7), average="macro", zero_division=0)
        assert f1[m] == pytest.approx(reference, rel=1e-12)


def test_scored_by_hand():
    accuracy, f1 = scored(np.array([0, 0, 1, 1]), np.array([[0, 0, 1, 1], [0, 0, 0, 0]]), num_classes=3)
    assert accuracy.tolist() == [1.0, 0.5]
    # Class 2 is neither there nor predicted: F1 0. Always guessing 0: F1 of class 0 is 2/3.
    np.testing.assert_allclose(f1, [2 / 3, 2 / 9])


def test_predictions_do_not_depend_on_how_rows_are_sliced():
    x, _, split = problem(dtype=torch.float64)
    params = initial_weights(grid(1, 2), 5, (*HIDDEN, CLASSES), 0, like=x)
    source = torch.tensor([0, 0])
    whole = predict_logits(params, x, source, split.train)
    torch.testing.assert_close(predict_logits(params, x, source, split.train, 100), whole, rtol=1e-12, atol=0)


def test_attribution_is_gradient_times_input_of_the_predicted_class_by_blocks():
    x, _, split = problem(features=6)
    live = torch.tensor([[True] * 6, [True, True, False, False, True, True]])
    models = Models(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]), live)
    params = initial_weights(models, 6, (*HIDDEN, CLASSES), 0, like=x)
    shares = attribution(params, x, models.source, split.test, block=2)
    for m in range(2):
        row_shares = []
        for row in split.test.tolist():
            inputs = x[0, row].clone().requires_grad_()
            h = inputs
            for i in range(len(HIDDEN) + 1):
                h = h @ params[f"weight{i}"][m] + params[f"bias{i}"][m, 0]
                h = h.relu() if i < len(HIDDEN) else h
            h.max().backward()
            row_shares.append((inputs.grad * inputs.detach()).view(3, 2).sum(1).abs())
        torch.testing.assert_close(shares[m], torch.stack(row_shares).mean(0), rtol=1e-9, atol=1e-12)
    assert shares[1, 1] == 0 < shares[0, 1]
    sliced = attribution(params, x, models.source, split.test, block=2, numbers_at_once=100)
    torch.testing.assert_close(sliced, shares, rtol=1e-12, atol=0)
