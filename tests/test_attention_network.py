from itertools import chain

import numpy as np
import pytest
import torch
from making import recorded
from sklearn.decomposition import KernelPCA
from torch import nn
from torch.nn import functional

from training.attention import (
    COORDINATES,
    LABEL_SMOOTHING,
    NORM_HIDDEN,
    SCHEDULE,
    TOKEN,
    AttentionStack,
    count_parameters,
    deletion,
    initial_parameters,
    logits,
    loss_gradients,
    module_tokens,
    parameter_shapes,
    parameters_of,
    predict_logits,
    read_out,
    train_attention,
)
from training.classifier import Models
from training.stacks import Schedule, Split, dropout_masks, gather, random_bits, stream, train

CLASSES, MODULES, HIDDEN = 3, 5, 8
NARROW = Schedule(max_epochs=4, patience=9, lr=5e-3, weight_decay=0.01, hidden=(HIDDEN,))


def problem(samples=90, dtype=torch.float64, seed=0):
    """Return tokens of which those of modules 1 and 3 hold the class, the classes, and a split."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % CLASSES
    x = torch.randn(1, samples, MODULES, TOKEN, generator=generator, dtype=dtype)
    for module in (1, 3):
        x[0, torch.arange(samples), module, y] += 3
    split = Split(torch.arange(0, 61), torch.arange(61, 75), torch.arange(75, samples))
    return x.flatten(2), y, split


def runs(*run, live=None):
    return Models(torch.zeros(len(run), dtype=torch.int64), torch.tensor(run), live)


def masks(*removed):
    live = torch.ones(len(removed), MODULES, dtype=torch.bool)
    for model, modules in enumerate(removed):
        live[model, list(modules)] = False
    return live


# ----------------------------------------------------------------------------------------------------------------------
# Tokens
# ----------------------------------------------------------------------------------------------------------------------


def kernel_of(samples=60, width=50, seed=0):
    """Return a kernel of updates with a decaying spectrum, and their norms."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, width)) * np.geomspace(3, 0.3, width) + 0.2
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return (x @ x.T).astype(np.float32), rng.lognormal(size=samples)


def standardised(x, train):
    return (x - x[train].mean(0)) / x[train].std(0)


@pytest.mark.parametrize("landmarks", [45, 40])
def test_coordinates_are_those_of_scikit_learns_kernel_pca(landmarks):
    kernel, norm = kernel_of()
    train = np.arange(45)
    columns = train[:landmarks]
    tokens = module_tokens(kernel[:, columns], train, columns, norm)
    in_blocks = module_tokens(kernel[:, columns], train, columns, norm, numbers_at_once=7 * landmarks)
    np.testing.assert_allclose(tokens, in_blocks, rtol=1e-4, atol=1e-5)
    assert tokens.shape == (60, TOKEN) and tokens.dtype == np.float32
    reference = KernelPCA(COORDINATES, kernel="precomputed", eigen_solver="dense").fit(kernel[np.ix_(columns, columns)])
    expected = standardised(reference.transform(kernel[:, columns].astype(np.float64)), train)
    signs = np.sign((expected * tokens[:, :COORDINATES]).sum(0))
    np.testing.assert_allclose(tokens[:, :COORDINATES] * signs, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(tokens[:, -1], standardised(np.log(norm), train), rtol=1e-4, atol=1e-5)


def test_components_that_are_not_there_are_zero():
    kernel, norm = kernel_of(width=6)  # five directions about the mean of normalised updates, or six
    tokens = module_tokens(kernel[:, :45], np.arange(45), np.arange(45), norm)
    assert (tokens[:, 6:COORDINATES] == 0).all() and (np.abs(tokens[:, :5]).max(0) > 1).all()
    few = module_tokens(kernel[:, :4], np.arange(4), np.arange(4), norm)
    assert (few[:, 3:COORDINATES] == 0).all() and np.abs(few[:, :3]).max() > 0


@pytest.mark.parametrize("width", [6, 200])
def test_equal_updates_have_no_coordinates(width):
    rng = np.random.default_rng(0)
    row = rng.standard_normal(width).astype(np.float32)
    x = row / np.linalg.norm(row) + 1e-7 * rng.standard_normal((60, width)).astype(np.float32)  # rounding
    tokens = module_tokens(3 * (x @ x.T)[:, :45], np.arange(45), np.arange(45), np.full(60, 0.1))
    assert (tokens == 0).all()


def test_zero_updates_have_zeros_and_change_nothing_for_others():
    kernel, norm = kernel_of()
    zero = np.array([3, 17, 50, 59])  # in train and test rows
    kernel[zero], kernel[:, zero], norm[zero] = 0, 0, 0
    train = np.arange(45)
    tokens = module_tokens(kernel[:, train], train, train, norm)
    assert (tokens[zero] == 0).all() and np.isfinite(tokens).all()
    others = np.setdiff1d(np.arange(60), zero)
    new_train = np.flatnonzero(np.isin(others, train))
    without = module_tokens(kernel[np.ix_(others, others[new_train])], new_train, new_train, norm[others])
    np.testing.assert_array_equal(tokens[others], without)


def test_a_module_without_updates_among_train_rows_is_all_zeros():
    kernel, norm = kernel_of()
    norm[:45] = 0
    assert (module_tokens(np.zeros_like(kernel)[:, :45], np.arange(45), np.arange(45), norm) == 0).all()


def test_test_rows_do_not_change_the_tokens_of_others():
    kernel, norm = kernel_of()
    train = np.arange(45)
    before = module_tokens(kernel[:, train], train, train, norm)
    changed, other_norm = kernel.copy(), norm.copy()
    changed[50:], other_norm[50:] = 7, 1e9
    after = module_tokens(changed[:, train], train, train, other_norm)
    np.testing.assert_array_equal(before[:50], after[:50])
    assert np.abs(after[50:]).max() <= 10


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """The network of one model as a list of textbook modules."""

    def __init__(self, params):
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(COORDINATES, HIDDEN, bias=False) for _ in range(MODULES))
        self.norm = nn.ModuleList(
            nn.Sequential(nn.Linear(1, NORM_HIDDEN), nn.GELU(), nn.Linear(NORM_HIDDEN, HIDDEN, bias=False))
            for _ in range(MODULES)
        )
        self.embedding = nn.Embedding(MODULES, HIDDEN)
        self.tanh, self.sigmoid = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.score = nn.Linear(HIDDEN, 1, bias=False)
        self.classes = nn.Linear(HIDDEN, CLASSES)
        self.layer_norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.double()
        for m in range(MODULES):
            self.project[m].weight.data = params["token_weight"][m].T.clone()
            self.norm[m][0].weight.data = params["norm_weight0"][m].T.clone()
            self.norm[m][0].bias.data = params["norm_bias0"][m][0].clone()
            self.norm[m][2].weight.data = params["norm_weight1"][m].T.clone()
        self.embedding.weight.data = params["embedding"][:, 0].clone()
        linear = {"gate_tanh": self.tanh, "gate_sigmoid": self.sigmoid, "gate_score": self.score}
        for name, layer in (linear | {"class_weight": self.classes}).items():
            layer.weight.data = params[name].T.clone()
        self.classes.bias.data = params["class_bias"][0].clone()

    def forward(self, x, kept, masks=None):
        x = x.unflatten(1, (MODULES, TOKEN))
        vectors = []
        for m in range(MODULES):
            normed = self.layer_norm(self.project[m](x[:, m, :COORDINATES]))
            h = functional.gelu(normed + self.norm[m](x[:, m, COORDINATES:]) + self.embedding.weight[m])
            vectors.append(h if masks is None else h * masks[m])
        h = torch.stack(vectors, 1)  # (B, P, H)
        scores = self.score(torch.tanh(self.tanh(h)) * torch.sigmoid(self.sigmoid(h)))[..., 0]  # (B, P)
        attention = torch.softmax(torch.where(kept, scores, torch.tensor(-1e9, dtype=x.dtype)), 1)
        return self.classes((attention[..., None] * h).sum(1))


def alone(x, y, split, params, run, live, *, seed, epochs):
    """Train one model by the textbook loop, with torch.optim.AdamW; return its validation losses."""
    model = Reference(params)
    optimiser = torch.optim.AdamW(model.parameters(), lr=NARROW.lr, weight_decay=NARROW.weight_decay)
    losses = []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(split.train), generator=stream(seed, run, "order", epoch))
        dropout, module_dropout = (stream(seed, run, key, epoch) for key in ("dropout", "module dropout"))
        for rows in split.train[order].split(32):
            bits = random_bits(MODULES * len(rows) * HIDDEN, [dropout]).view(MODULES, len(rows), HIDDEN)
            masks = dropout_masks(0.2, bits, x.dtype)
            bits = random_bits(MODULES * len(rows), [module_dropout]).view(MODULES, len(rows))
            kept = (dropout_masks(0.2, bits, x.dtype) > 0).T & live
            kept[~kept.any(1)] = live
            optimiser.zero_grad()
            loss = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
            loss(model(x[0, rows], kept, masks), y[rows]).backward()
            optimiser.step()
        with torch.no_grad():
            scores = model(x[0, split.validation], live.expand(len(split.validation), -1))
            losses.append(functional.cross_entropy(scores, y[split.validation]).item())
    return losses


Recorded = recorded(AttentionStack)


def test_every_model_of_a_stack_trains_as_plain_torch_does():
    x, y, split = problem()
    live = masks((), (1,), (0, 1, 2, 3))  # of the third, module dropout would often leave nothing
    models = runs(0, 1, 1, live=live)
    stack = Recorded(x, y, split, models, CLASSES, seed=7, hidden=HIDDEN)
    initial = {name: parameter.detach().clone() for name, parameter in stack.params.items()}
    train(stack, NARROW)
    stacked = torch.stack(stack.seen, dim=1)  # (M, epochs)
    for m, run in enumerate(models.run.tolist()):
        start = {name: parameter[m] for name, parameter in initial.items()}
        losses = alone(x, y, split, start, run, live[m], seed=7, epochs=NARROW.max_epochs)
        torch.testing.assert_close(stacked[m], torch.tensor(losses, dtype=x.dtype), rtol=1e-9, atol=0)


@pytest.mark.parametrize("live", [None, masks((), (1,), (0, 1, 2, 3), range(MODULES))])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_gradients_by_hand_are_those_of_autograd(live, rate):
    x, y, split = problem()
    network = {"hidden": HIDDEN, "dropout": rate, "module_dropout": rate}
    stack = AttentionStack(x, y, split, runs(0, 0, 1, 2, live=live), CLASSES, seed=7, **network)
    seen = 0
    for size in chain.from_iterable(stack.begin(1)):  # the last minibatch is smaller
        rows, kept, dropped = stack.minibatch(size)
        params = {name: parameter.clone().requires_grad_() for name, parameter in stack.params.items()}
        tokens = gather(x, stack.source, rows)
        scores = logits(params, tokens, kept, dropped).flatten(0, 1)
        losses = nn.CrossEntropyLoss(reduction="sum", label_smoothing=LABEL_SMOOTHING)
        (losses(scores, y[rows].flatten()) / rows.shape[1]).backward()
        by_hand = loss_gradients(stack.params, tokens, y[rows], kept, dropped)
        for parameter, gradient in zip(params.values(), by_hand, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-15)
        seen += rows.shape[1]
    assert seen == len(split.train)


def test_a_model_does_not_depend_on_what_it_is_stacked_with():
    x, y, split = problem(dtype=torch.float32)
    live = masks((), (1, 3), (0, 2), (4,), (1, 3))
    models = runs(0, 0, 1, 2, 2, live=live)
    schedule = Schedule(max_epochs=40, patience=2, lr=2e-2, weight_decay=0.01, hidden=(HIDDEN,))
    together = train_attention(x, y, split, models, CLASSES, schedule=schedule, seed=3)
    assert len(set(together["epochs"].tolist())) > 2
    for m in range(5):
        single = Models(models.source[[m]], models.run[[m]], live[[m]])
        by_itself = train_attention(x, y, split, single, CLASSES, schedule=schedule, seed=3)
        assert set(by_itself) == set(together)
        for name, array in by_itself.items():
            np.testing.assert_allclose(array[0], together[name][m], rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_removed_module_has_no_influence():
    x, y, split = problem(dtype=torch.float32)
    models = runs(0, 1, live=masks((1,), (1, 4)))
    changed = x.clone().unflatten(2, (MODULES, TOKEN))
    changed[:, :, 1] = 9
    changed[:, :, 1, :3] *= torch.randn(x.shape[1], 3)
    first, second = (
        train_attention(inputs, y, split, models, CLASSES, schedule=NARROW, seed=3)
        for inputs in (x, changed.flatten(2))
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)
    start = initial_parameters(models, MODULES, CLASSES, HIDDEN, 3, like=x)
    shrunk = start["token_weight"][:, 1] * (1 - NARROW.lr * NARROW.weight_decay) ** (2 * NARROW.max_epochs)
    np.testing.assert_allclose(first["parameters.token_weight"][:, 1], shrunk, rtol=1e-3)  # by weight decay only
    all_modules = train_attention(x, y, split, runs(0, 1), CLASSES, schedule=NARROW, seed=3)
    assert not np.array_equal(all_modules["log_loss"], first["log_loss"])


def test_masks_that_mask_nothing_are_none():
    x, y, split = problem(dtype=torch.float32)
    first, second = (
        train_attention(x, y, split, runs(0, 1, live=live), CLASSES, schedule=NARROW, seed=3)
        for live in (None, masks((), ()))
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_without_any_module_the_bias_predicts():
    x, y, split = problem(dtype=torch.float32)
    live = masks(range(MODULES), ())
    trained = train_attention(x, y, split, runs(0, 0, live=live), CLASSES, schedule=NARROW, seed=3)
    assert len(set(trained["predicted"][0].tolist())) == 1 < len(set(trained["predicted"][1].tolist()))
    out = read_out(parameters_of(trained), x, split.test, y, live)
    assert (out["attention"][0] == 0).all() and (out["contribution"][0] == 0).all()


def test_module_dropout_drops_its_share_and_never_all():
    x, y, split = problem(dtype=torch.float32)
    live = masks((), (0, 1, 2), (0, 1, 2, 3))
    stack = AttentionStack(x, y, split, runs(0, 0, 0, live=live), CLASSES, seed=0, hidden=HIDDEN)
    sizes = chain.from_iterable(chain.from_iterable(map(stack.begin, range(40))))
    kept = torch.cat([stack.minibatch(size)[1] for size in sizes], dim=2)  # (M, P, rows)
    assert kept.any(1).all() and not (kept & ~live[:, :, None]).any()
    assert kept[0].float().mean() == pytest.approx(0.8, abs=0.01)
    assert kept[2, 4].all()
    both = kept[0, 3] | kept[0, 4]  # the second model drops what the first does, unless nothing would be left
    assert torch.equal(kept[0, 3:, both], kept[1, 3:, both]) and kept[1, 3:, ~both].all()


def test_initial_parameters_and_their_number():
    models = runs(0, 0, 1)
    params = initial_parameters(models, 40, CLASSES, HIDDEN, 5, like=torch.zeros(1))
    assert count_parameters(40, CLASSES, HIDDEN) == sum(parameter[0].numel() for parameter in params.values())
    bound = params["token_weight"].abs().max().item() * COORDINATES**0.5
    assert 0.99 < bound <= 1
    for parameter in params.values():
        assert torch.equal(parameter[0], parameter[1]) and not torch.equal(parameter[0], parameter[2])
    fewer = initial_parameters(models, 7, CLASSES, HIDDEN, 5, like=torch.zeros(1))
    assert torch.equal(fewer["token_weight"], params["token_weight"][:, :7])
    masked = initial_parameters(runs(0, 0, 1, live=torch.rand(3, 40) > 0.5), 40, CLASSES, HIDDEN, 5, torch.zeros(1))
    assert all(torch.equal(masked[name], params[name]) for name in params)
    assert parameter_shapes(40, CLASSES)["gate_tanh"] == (64, 64)  # by default


def test_training_finds_the_modules_that_hold_the_class():
    x, y, split = problem(samples=300, dtype=torch.float32)
    split = Split(torch.arange(0, 200), torch.arange(200, 250), torch.arange(250, 300))
    schedule = Schedule(max_epochs=60, patience=20, lr=5e-3, weight_decay=0.01, hidden=(16,))
    trained = train_attention(x, y, split, runs(0, 1, live=masks((), (1, 3))), CLASSES, schedule=schedule, seed=0)
    right = (trained["predicted"][:, 50:] == y[split.test].numpy()).mean(1)
    assert right[0] > 0.9 and right[1] < 0.6 and trained["train_accuracy"][0] > 0.9
    out = read_out(parameters_of(trained), x, split.test, y, masks((), (1, 3)))
    for name in ("attention", "contribution", "gradients"):
        of_modules = out[name][0].reshape(-1, MODULES).mean(0)
        assert set(of_modules.argsort()[-2:].tolist()) == {1, 3}, name
    assert out["attention"][0][:, [1, 3]].sum(1).mean() > 0.8
    predicted = deletion(parameters_of(trained), x, split.test, [[1, 3, 0, 2, 4], [0, 2, 4, 1, 3]], [2])[0, :, 0]
    planted_first, planted_last = (predicted == y[split.test].numpy()).mean(1)
    assert planted_first < 0.6 < 0.9 < planted_last


def test_same_seed_same_bits_and_test_rows_never_touch_training():
    x, y, split = problem(dtype=torch.float32)
    changed = x.clone()
    changed[:, split.test] = 1e6
    first, second, other = (
        train_attention(inputs, y, split, runs(0, 1), CLASSES, schedule=NARROW, seed=seed)
        for inputs, seed in ((x, 0), (changed, 0), (x, 1))
    )
    end = len(split.validation)
    for arrays in (first, second):
        arrays |= {f"validation {name}": arrays[name][:, :end] for name in ("predicted", "log_loss")}
    assert all(np.array_equal(first[name], second[name]) for name in set(first) - {"predicted", "log_loss"})
    assert not np.array_equal(first["log_loss"][:, end:], second["log_loss"][:, end:])
    assert not np.array_equal(first["log_loss"], other["log_loss"])


def test_parameters_are_returned_where_asked():
    x, y, split = problem(dtype=torch.float32)
    schedule = Schedule(max_epochs=1, patience=1)
    trained = train_attention(x, y, split, runs(0), CLASSES, schedule=schedule, seed=0, keep_parameters=False)
    assert not parameters_of(trained)
    trained = train_attention(x, y, split, runs(0), CLASSES, schedule=schedule, seed=0)
    shapes = {name: array.shape[1:] for name, array in parameters_of(trained).items()}
    assert shapes == parameter_shapes(MODULES, CLASSES) and SCHEDULE.weight_decay == 0.01
    assert all(array.dtype == np.float32 for array in parameters_of(trained).values())


# ----------------------------------------------------------------------------------------------------------------------
# Read-outs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    x, y, split = problem()
    live = masks((), (1,), (0, 3))
    arrays = train_attention(x, y, split, runs(0, 1, 2, live=live), CLASSES, schedule=NARROW, seed=0)
    return x, y, split, live, parameters_of(arrays), arrays


def test_what_modules_add_is_the_score_less_the_bias(trained):
    x, y, split, live, parameters, arrays = trained
    params = {name: torch.as_tensor(array).double() for name, array in parameters.items()}
    scores = predict_logits(params, x, torch.zeros(3, dtype=torch.int64), split.test, live)  # (M, n, C)
    np.testing.assert_array_equal(scores.argmax(2), arrays["predicted"][:, len(split.validation) :])
    out = read_out(parameters, x, split.test, y, live)
    assert {name: array.shape for name, array in out.items()} == {
        "attention": (3, 15, MODULES),
        "contribution": (3, 15, MODULES),
        "gradients": (3, MODULES),
    }
    np.testing.assert_allclose(out["attention"].sum(2), 1, rtol=1e-6)
    assert (out["attention"] > 0).any(1)[live.numpy()].all()
    for name, array in out.items():
        assert (array.reshape(3, -1, MODULES).transpose(0, 2, 1)[~live.numpy()] == 0).all(), name
    # Over the classes, each module adds a_m H_c h_m: by predictions with that module's attention alone.
    added = (scores - params["class_bias"]).numpy()
    truth = y[split.test].numpy()
    own = np.take_along_axis(added, truth[None, :, None], 2)[..., 0]
    np.testing.assert_allclose(out["contribution"].sum(2), own - added.mean(2), rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_the_predicted_classes_scores(trained):
    x, y, split, live, parameters, _ = trained
    out = read_out(parameters, x, split.test, y, live)
    params = {name: torch.as_tensor(array).double() for name, array in parameters.items()}
    for m in range(3):
        of_model = {name: parameter[[m]] for name, parameter in params.items()}
        total = np.zeros(MODULES)
        for row in split.test:
            token = x[:, [row]].clone().requires_grad_()
            logits(of_model, token, live[[m], :, None]).max().backward()
            total += np.abs((token * token.grad).detach().view(MODULES, TOKEN).sum(1).numpy())
        np.testing.assert_allclose(out["gradients"][m], total / len(split.test), rtol=1e-5, atol=1e-9)


def test_read_outs_in_blocks_are_those_of_all_rows(trained):
    x, y, split, live, parameters, _ = trained
    orders = np.array([[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]])
    whole, in_blocks = (
        read_out(parameters, x, split.test, y, live, numbers_at_once=numbers)
        | {"deletion": deletion(parameters, x, split.test, orders, [0, 2], numbers_at_once=numbers)}
        for numbers in (2**24, 1)
    )
    for name in whole:
        np.testing.assert_allclose(whole[name], in_blocks[name], rtol=1e-5, atol=1e-9)


def test_deletion_masks_the_first_modules_of_each_order(trained):
    x, _, split, _, parameters, _ = trained
    params = {name: torch.as_tensor(array).double() for name, array in parameters.items()}
    orders, counts = np.array([[4, 3, 2, 1, 0], [1, 0, 2, 4, 3]]), [0, 1, 3, MODULES]
    predicted = deletion(parameters, x, split.test, orders, counts)
    assert predicted.shape == (3, 2, 4, 15) and predicted.dtype == np.int32
    for o, order in enumerate(orders):
        for k, count in enumerate(counts[:-1]):
            kept = masks(order[:count])[:, :, None]
            expected = logits(params, x[:, split.test].expand(3, -1, -1), kept).argmax(2)
            np.testing.assert_array_equal(predicted[:, o, k], expected)
    bias = parameters["class_bias"][:, 0].argmax(1)
    assert (predicted[:, :, -1] == bias[:, None, None]).all()  # all are masked
