from itertools import pairwise

import numpy as np
import pytest
import torch
from making import recorded
from torch import nn
from torch.nn import functional

from representations import projection, update_sketch
from training.classifier import Models
from training.kernels import Updates
from training.projections import Blocks, ProjectionStack, count_parameters, project, train_projections
from training.stacks import CLIP, Schedule, Split, dropout_masks, random_bits, stream, train

CLASSES, HIDDEN, SIZE = 4, (16, 16), 8
SHAPES = [(2, 12, 10), (1, 9, 11), (2, 12, 10), (3, 8, 14)]  # the first and the third are one product


def factors_of(samples=80, shapes=SHAPES, seed=0, strength=3.0):
    """Factors of updates whose first module tells the class, and the classes: (down, up) of each module."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % CLASSES
    pairs = []
    for rank, wide, high in shapes:
        down = torch.randn(samples, rank, wide, generator=generator, dtype=torch.float64)
        up = torch.randn(samples, high, rank, generator=generator, dtype=torch.float64)
        pairs.append((down, up))
    direction = torch.randn(2, CLASSES, 64, generator=generator, dtype=torch.float64)
    pairs[0][0][:, 0] += strength * direction[0, y, : shapes[0][1]]
    pairs[0][1][:, :, 0] += strength * direction[1, y, : shapes[0][2]]
    return pairs, y


def joined(pairs, dtype=torch.float64):
    """Return the factors as `train_projections` reads them, float[1, N, W]."""
    parts = []
    for down, up in pairs:
        updates = Updates.from_factors(down, up, torch.ones(len(down)))
        parts += [updates.down.flatten(1), updates.up.flatten(1)]
    return torch.cat(parts, 1)[None].to(dtype)


def gaussians(shapes=SHAPES):
    """The projections that update_sketch draws for modules m0, m1 and so on."""
    lengths = [(high, wide) for _, wide, high in shapes]
    return tuple(
        [projection(f"m{module}", side, length[number]).clone() for module, length in enumerate(lengths)]
        for number, side in enumerate("PQ")
    )


def split_of(samples=80):
    return Split(torch.arange(0, 51), torch.arange(51, 63), torch.arange(63, samples))


def models_of(runs, live=None):
    return Models(torch.zeros(len(runs), dtype=torch.long), torch.tensor(runs), live)


def trained(x, y, models, *, frozen=False, schedule=None, shapes=SHAPES, seed=3, **changes):
    schedule = schedule or Schedule(max_epochs=4, patience=9, hidden=HIDDEN)
    inputs = {"shapes": shapes, "start": gaussians(shapes), "frozen": frozen, "schedule": schedule, "seed": seed}
    return train_projections(x, y, split_of(len(y)), models, CLASSES, **inputs | changes)


LIVE = torch.tensor([[True] * 4, [True, False, True, True], [False, True, True, False]])


# ----------------------------------------------------------------------------------------------------------------------
# Against plain torch
# ----------------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The network for one model, written out: updates are formed, and projected one by one."""

    def __init__(self, pairs, live, params, train_rows):
        super().__init__()
        self.updates = [up @ down for down, up in pairs]
        self.live = live.tolist()
        self.p, self.q = (nn.ParameterList(matrices) for matrices in gaussians())
        self.layers = nn.ModuleList()
        for number, (fan_in, fan_out) in enumerate(pairwise((len(pairs) * SIZE**2, *HIDDEN, CLASSES))):
            linear = nn.Linear(fan_in, fan_out, dtype=torch.float64)
            linear.weight.data = params[f"weight{number}"].mT.clone()
            linear.bias.data = params[f"bias{number}"][0].clone()
            self.layers.append(linear)
        with torch.no_grad():
            blocks = self.blocks(train_rows)
        self.mean, self.std = blocks.mean(0), blocks.std(0, unbiased=False)

    def blocks(self, rows):
        parts = []
        for update, p, q in zip(self.updates, self.p, self.q, strict=True):
            block = (p.T @ update[rows] @ q).flatten(1)
            parts.append(SIZE * block / block.norm(dim=1, keepdim=True))
        return torch.cat(parts, 1)

    def forward(self, rows, masks=None):
        h = (self.blocks(rows) - self.mean) / self.std
        assert h.abs().max() < CLIP
        h = h * torch.tensor(self.live).repeat_interleave(SIZE**2)
        for number, linear in enumerate(self.layers[:-1]):
            h = functional.relu(linear(h))
            h = h if masks is None else h * masks[number]
        return self.layers[-1](h)


def plain_losses(network, y, split, run, seed, epochs, dropout):
    """The textbook loop; returns validation losses."""
    optimiser, losses = torch.optim.Adam(network.parameters(), lr=1e-3), []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(split.train), generator=stream(seed, run, "order", epoch))
        generator = stream(seed, run, "dropout", epoch)
        for rows in split.train[order].split(32):
            bits = random_bits(len(HIDDEN) * HIDDEN[0] * len(rows), [generator]).view(len(HIDDEN), len(rows), HIDDEN[0])
            masks = dropout_masks(dropout, bits, torch.float64)
            optimiser.zero_grad()
            functional.cross_entropy(network(rows, masks), y[rows]).backward()
            optimiser.step()
        with torch.no_grad():
            losses.append(functional.cross_entropy(network(split.validation), y[split.validation]).item())
    return losses


Recorded = recorded(ProjectionStack)


def unpacked(x, shapes=SHAPES):
    """The factors that lie side by side in x, (down, up) of each module."""
    parts = x[0].split([number for rank, wide, high in shapes for number in (rank * wide, high * rank)], dim=1)
    downs = [part.unflatten(1, shape[:2]) for part, shape in zip(parts[::2], shapes, strict=True)]
    ups = [part.unflatten(1, (shape[2], shape[0])) for part, shape in zip(parts[1::2], shapes, strict=True)]
    return list(zip(downs, ups, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_model_of_a_stack_trains_as_plain_torch_does(dropout):
    epochs, seed = 6, 7
    pairs, y = factors_of()
    x, split = joined(pairs), split_of()
    runs = [0, 1, 1]
    models = models_of(runs, LIVE.repeat_interleave(SIZE**2, 1))
    blocks = Blocks(x, SHAPES, gaussians(), split.train)
    stack = Recorded(blocks, y, split, models, CLASSES, seed=seed, hidden=HIDDEN, dropout=dropout)
    initial = {name: parameter.clone() for name, parameter in stack.params.items()}
    train(stack, Schedule(max_epochs=epochs, patience=epochs + 1))
    stacked = torch.stack(stack.seen, dim=1)  # (M, epochs)
    for model, run in enumerate(runs):
        start = {name: parameter[model] for name, parameter in initial.items()}
        network = Plain(unpacked(x), LIVE[model], start, split.train)
        losses = plain_losses(network, y, split, run, seed, epochs, dropout)
        torch.testing.assert_close(stacked[model], torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=0)


def test_the_frozen_network_is_the_learned_one_before_its_first_step():
    pairs, y = factors_of()
    x, models = joined(pairs), models_of([0, 1], LIVE[:2])
    still = Schedule(max_epochs=1, patience=2, lr=1e-12, hidden=HIDDEN)
    learned, frozen = (trained(x, y, models, frozen=frozen, schedule=still) for frozen in (False, True))
    assert learned.keys() == frozen.keys()
    for name, array in learned.items():
        np.testing.assert_allclose(array, frozen[name], rtol=1e-6, err_msg=name)
    learned, frozen = (trained(x, y, models, frozen=frozen) for frozen in (False, True))
    assert not np.allclose(learned["log_loss"], frozen["log_loss"], rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------------------


def test_blocks_at_the_start_are_normalised_sketches():
    pairs, _ = factors_of()
    x = joined(pairs)
    blocks = Blocks(x, SHAPES, gaussians(), split_of().train)
    projected = project(x, torch.arange(80)[None], blocks.groups, blocks.start)[0].unflatten(1, (len(SHAPES), -1))
    for module, (down, up) in enumerate(pairs):
        sketch = update_sketch(down, up, f"m{module}").double()
        torch.testing.assert_close(projected[:, module], SIZE * functional.normalize(sketch), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projected.square().mean(2), torch.ones(80, len(SHAPES), dtype=torch.float64))


def test_blocks_are_standardised_on_train_rows():
    pairs, _ = factors_of()
    x, split = joined(pairs), split_of()
    blocks = Blocks(x, SHAPES, gaussians(), split.train)
    inputs = blocks.all_rows(blocks.start)[0, split.train]
    torch.testing.assert_close(inputs.mean(0), torch.zeros_like(inputs[0]), atol=1e-10, rtol=0)
    torch.testing.assert_close(inputs.std(0, unbiased=False), torch.ones_like(inputs[0]))


def test_blocks_do_not_depend_on_how_rows_are_sliced():
    pairs, _ = factors_of()
    x, split = joined(pairs), split_of()
    whole, sliced = (Blocks(x, SHAPES, gaussians(), split.train, numbers) for numbers in (2**24, 1000))
    torch.testing.assert_close(whole.all_rows(whole.start), sliced.all_rows(sliced.start), rtol=1e-9, atol=1e-12)


def test_an_update_counts_and_not_its_factors_nor_its_size():
    pairs, y = factors_of()
    generator, others = torch.Generator().manual_seed(1), []
    for down, up in pairs:
        mix = torch.randn(len(down), down.shape[1], down.shape[1], generator=generator, dtype=torch.float64)
        mix = mix + 3 * torch.eye(down.shape[1])
        size = torch.rand(len(down), 1, 1, generator=generator, dtype=torch.float64) + 0.1
        others.append((mix @ down, size * up @ torch.linalg.inv(mix)))
    first, second = (trained(joined(factors), y, models_of([0])) for factors in (pairs, others))
    np.testing.assert_allclose(first["log_loss"], second["log_loss"], rtol=1e-3)
    flipped = [(down, -up) for down, up in pairs]
    assert not np.allclose(first["log_loss"], trained(joined(flipped), y, models_of([0]))["log_loss"], rtol=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# Stacks, removed modules, zero updates
# ----------------------------------------------------------------------------------------------------------------------


def test_a_model_does_not_depend_on_what_it_is_stacked_with():
    pairs, y = factors_of(strength=1.0)
    x = joined(pairs)
    runs, live = [0, 0, 1, 2], torch.cat([LIVE, LIVE[:1]])
    schedule = Schedule(max_epochs=60, patience=4, lr=5e-3, lr_patience=2, hidden=HIDDEN)
    together = trained(x, y, models_of(runs, live), schedule=schedule)
    assert len(set(together["epochs"].tolist())) > 2
    for model, run in enumerate(runs):
        by_itself = trained(x, y, models_of([run], live[[model]]), schedule=schedule)
        for name, array in by_itself.items():
            np.testing.assert_allclose(array[0], together[name][model], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_removed_has_no_influence(frozen):
    pairs, y = factors_of()
    x, models = joined(pairs), models_of([0, 0], LIVE[[2, 2]])
    before = trained(x, y, models, frozen=frozen)
    changed = [
        (down.flip(0), up.roll(7, 0)) if module in (0, 3) else (down, up) for module, (down, up) in enumerate(pairs)
    ]
    after = trained(joined(changed), y, models, frozen=frozen)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    whole = models_of([0, 0])
    assert not np.allclose(trained(x, y, whole)["log_loss"], trained(joined(changed), y, whole)["log_loss"])


def test_the_projections_of_removed_modules_never_move():
    pairs, y = factors_of()
    split = split_of()
    blocks = Blocks(joined(pairs), SHAPES, gaussians(), split.train)
    models = models_of([0], LIVE[[1]].repeat_interleave(SIZE**2, 1))  # without module 1, the only one of its group
    stack = ProjectionStack(blocks, y, split, models, CLASSES, seed=0, hidden=HIDDEN)
    state = train(stack, Schedule(max_epochs=3, patience=9)).state
    moved = {name: not torch.equal(state[name], start) for name, start in blocks.start.items()}
    assert moved == {"P0": True, "Q0": True, "P1": False, "Q1": False, "P2": True, "Q2": True}


@pytest.mark.parametrize("frozen", [True, False])
def test_zero_updates_are_zero_blocks_and_train(frozen):
    pairs, y = factors_of()
    pairs[0][1][::3] = 0
    pairs[2][1][:] = 0  # a module that no LoRA has changed
    x = joined(pairs)
    blocks = Blocks(x, SHAPES, gaussians(), split_of().train)
    projected = project(x, torch.arange(80)[None], blocks.groups, blocks.start)[0].unflatten(1, (len(SHAPES), -1))
    assert not projected[::3, 0].any() and not projected[:, 2].any() and projected[1, 0].any()
    assert not blocks.all_rows(blocks.start)[:, :, 2 * SIZE**2 : 3 * SIZE**2].any()
    assert all(np.isfinite(array).all() for array in trained(x, y, models_of([0, 1]), frozen=frozen).values())


def test_inputs_are_left_as_they_are():
    pairs, y = factors_of()
    x, start = joined(pairs), gaussians()
    before = x.clone()
    trained(x, y, models_of([0]), start=start)
    assert torch.equal(x, before)
    for side, again in zip(start, gaussians(), strict=True):
        assert all(torch.equal(matrix, other) for matrix, other in zip(side, again, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Learning
# ----------------------------------------------------------------------------------------------------------------------


def test_learned_projections_see_what_random_ones_miss():
    """The class lies in one direction among many, of which random projections keep little."""
    shapes = [(1, 64, 64)] * 2
    pairs, y = factors_of(160, shapes, strength=1.0)
    x = joined(pairs, torch.float32)
    schedule = Schedule(max_epochs=60, patience=60, hidden=(32, 32))
    learned, frozen = (
        trained(x, y, models_of([0, 1]), shapes=shapes, frozen=frozen, schedule=schedule) for frozen in (False, True)
    )
    first = trained(x, y, models_of([0, 1]), shapes=shapes, schedule=Schedule(1, 1, hidden=(32, 32)))
    assert (learned["validation_loss"] < 0.7 * first["validation_loss"]).all()
    accuracy = [(arrays["predicted"][:, 12:] == y[63:].numpy()).mean() for arrays in (learned, frozen)]
    assert accuracy[0] > accuracy[1] + 0.1


def test_same_seed_same_bits_and_another_seed_other_bits():
    pairs, y = factors_of()
    x = joined(pairs, torch.float32)
    first, second, other = (trained(x, y, models_of([0, 1]), seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["log_loss"], other["log_loss"])


def test_the_test_rows_never_touch_training():
    pairs, y = factors_of()
    x = joined(pairs, torch.float32)
    changed = x.clone()
    changed[:, 63:] = changed[:, 63:].flip(1)
    first, second = (trained(inputs, y, models_of([0])) for inputs in (x, changed))
    assert np.array_equal(first["log_loss"][:, :12], second["log_loss"][:, :12])
    assert not np.array_equal(first["log_loss"][:, 12:], second["log_loss"][:, 12:])
    assert all(np.array_equal(first[name], second[name]) for name in ("train_f1", "epochs", "validation_loss"))


def test_parameters_are_counted():
    pairs, y = factors_of()
    blocks = Blocks(joined(pairs), SHAPES, gaussians(), split_of().train)
    stack = ProjectionStack(blocks, y, split_of(), models_of([0]), CLASSES, seed=0, hidden=HIDDEN)
    counted = sum(parameter.numel() for parameter in stack.params.values())
    assert count_parameters(SHAPES, CLASSES, HIDDEN, SIZE) == counted
