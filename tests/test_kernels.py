import math
import threading

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import KernelCenterer
from sklearn.svm import SVC, LinearSVC

from training import kernels
from training.kernels import (
    GRID,
    KERNELS,
    Kernel,
    Limits,
    UpdateKernels,
    Updates,
    alignments,
    classify,
    classify_each,
    cosines,
    own_cosines,
)

PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in training: products as small as these take threads longer to share than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def factors(n, rank, wide, high, seed=0, ranks=None):
    """Down, up and scale of n updates; of LoRA i only ``ranks[i]`` of the rank are not padding."""
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(n, rank, wide, generator=g), torch.randn(n, high, rank, generator=g)
    for i, own in enumerate(ranks or ()):
        down[i, own:], up[i, :, own:] = 0, 0
    return down, up, torch.rand(n, generator=g) * 3 - 1


def formed(down, up, scale):
    """The updates themselves, flattened, float64[N, out * in]."""
    return (scale.double()[:, None, None] * (up.double() @ down.double())).flatten(1).numpy()


def near(actual, expected, rows, columns, share=1e-6):
    """Equal up to a share of the product of the norms of the two updates."""
    bound = share * np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(columns, axis=1))
    assert (np.abs(np.asarray(actual) - expected) <= bound).all()


def reader(modules):
    return lambda p, rows: tuple(x[rows] for x in modules[p])


def split(n, train=0.6):
    order = np.random.default_rng(5).permutation(n)
    ends = round(train * n), round((train + 1) / 2 * n)
    return dict(zip(PARTS, map(np.sort, np.split(order, ends)), strict=True))


def planted(n=90, classes=3, modules=4, informative=(1,), seed=0, strength=1.0):
    """Modules of noise; in the informative ones an update of the class is added, as further rows of the rank."""
    y = np.arange(n) % classes
    factors_of_modules = []
    for p in range(modules):
        down, up, _ = factors(n, 3, 10, 8, seed=100 * seed + p)
        concept_down, concept_up, _ = factors(classes, 3, 10, 8, seed=100 * seed + 50 + p)
        if p in informative:
            down, up = torch.cat([down, concept_down[y]], 1), torch.cat([up, strength * concept_up[y]], 2)
        factors_of_modules.append((down, up, torch.ones(n)))
    return factors_of_modules, y


def kernels_of(modules, rows, **more):
    return UpdateKernels(reader(modules), len(modules), rows["train"], len(modules[0][0]), **more)


def test_accuracy(trained, y, rows):
    return (trained["predicted"][:, len(rows["validation"]) :] == y[rows["test"]]).mean(1)


test_accuracy.__test__ = False


# ----------------------------------------------------------------------------------------------------------------------
# The kernel of one module
# ----------------------------------------------------------------------------------------------------------------------


def module_kernel(down, up, scale, columns=None, at_once=2**22):
    """Inner products of the updates of one module, all or those with some columns, float64[N, n]."""
    rows = Updates.from_factors(down, up, scale, at_once)
    if columns is None:
        return own_cosines(rows, at_once)[0] * rows.norm[:, None] * rows.norm
    return cosines(rows, rows[columns], at_once)[0] * rows.norm[:, None] * rows.norm[columns]


def test_two_updates_by_hand():
    down, up = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), torch.tensor([[[1.0], [1.0]], [[2.0], [-1.0]]])
    # [[1, 2], [1, 2]] and, times -2, [[6, 0], [-3, 0]]: products 10, -2 (6 - 3) and 4 (36 + 9).
    kernel = module_kernel(down, up, torch.tensor([1.0, -2.0]))
    assert kernel.flatten().tolist() == pytest.approx([10, -6, -6, 180])


# Of small ranks, where factors are multiplied, and of large ones, where blocks of updates are.
SHAPES = {"rank 1": (1, 12, 9), "rank 3": (3, 30, 40), "large rank": (8, 11, 6), "wider than high": (4, 3, 50)}


@pytest.mark.parametrize("at_once", [1, 300, 2**22])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equal_to_forming_the_updates_for_mixed_ranks(shape, at_once):
    rank = shape[0]
    updates = factors(17, *shape, ranks=[1 + i % rank for i in range(17)])
    w = formed(*updates)
    kernel = module_kernel(*updates, at_once=at_once)
    assert kernel.dtype == torch.float64
    near(kernel, w @ w.T, w, w)
    columns = torch.tensor([3, 16, 0, 7])
    near(module_kernel(*updates, columns, at_once), w @ w[columns].T, w, w[columns])


def test_both_ways_are_tried_above(monkeypatch):
    def ways(shape):
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "addcmul_", lambda total, *_: asked.append(1) or total)
            module_kernel(*factors(4, *shape))
        return bool(asked)

    assert [ways(shape) for shape in SHAPES.values()] == [True, True, False, False]


def test_ranks_that_are_padded_are_the_same_updates():
    down, up, scale = factors(6, 2, 12, 9)
    padded = torch.cat([down, torch.zeros(6, 5, 12)], 1), torch.cat([up, torch.zeros(9, 5)[None].expand(6, 9, 5)], 2)
    w = formed(down, up, scale)
    near(module_kernel(*padded, scale), module_kernel(down, up, scale).numpy(), w, w)


@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_gauge(spread):
    """Also where the gauge is so uneven that float32 products of the factors themselves would be off."""
    down, up, scale = factors(9, 4, 12, 15)
    gauge = torch.randn(9, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gauge = torch.linalg.qr(gauge).Q @ torch.diag(torch.tensor([1, spread, 1 / spread, 1], dtype=torch.float64))
    other = gauge @ down.double(), up.double() @ torch.linalg.inv(gauge)
    w = formed(down, up, scale)
    near(module_kernel(*other, scale), module_kernel(down, up, scale).numpy(), w, w)


def test_scale_multiplies_and_zero_updates_have_zero_products():
    down, up, scale = factors(5, 2, 12, 9)
    up[2] = 0
    unscaled = module_kernel(down, up, torch.ones(5))
    w = formed(down, up, scale)
    near(module_kernel(down, up, scale), (unscaled * scale.double() * scale.double()[:, None]).numpy(), w, w)
    assert (unscaled[2] == 0).all() and (unscaled[:, 2] == 0).all()
    assert (module_kernel(down, up, torch.zeros(5)) == 0).all()


@pytest.mark.parametrize("size", [1e-30, 1e18])
def test_very_small_and_very_large_updates(size):
    down, up, scale = factors(5, 2, 12, 9)
    w = formed(down, up * size, scale)
    near(module_kernel(down, up * size, scale), w @ w.T, w, w)


# ----------------------------------------------------------------------------------------------------------------------
# Views of one module
# ----------------------------------------------------------------------------------------------------------------------


def view_cosines(down, up, scale, columns=None, at_once=2**22):
    """Cosines of the three views of the updates of one module, all or those with some columns, float64[3, N, n]."""
    rows = Updates.from_factors(down, up, scale, at_once, orthogonal=True)
    return own_cosines(rows, at_once, 3) if columns is None else cosines(rows, rows[columns], at_once, 3)


def formed_views(down, up, scale):
    """The views themselves, of norm 1 or 0, and their cosines, float64[3, N, N]."""
    w = scale.double()[:, None, None] * (up.double() @ down.double())
    views = [x.flatten(1).numpy() for x in (w, w @ w.mT, w.mT @ w)]
    sizes = [np.linalg.norm(x, axis=1, keepdims=True) for x in views]
    views = [np.divide(x, size, out=np.zeros_like(x), where=size > 0) for x, size in zip(views, sizes, strict=True)]
    return np.stack([x @ x.T for x in views])


def test_views_of_two_updates_by_hand():
    # [[1, 0], [0, 0]] and, times -2, [[0, 0], [3, 4]]: they share neither rows nor columns that are not 0, but read
    # 1 of e1, and (3 e1 + 4 e2) / 5. A third that writes with both rows, and reads e1 alone.
    down, up = (
        torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]], [[2.0, 0.0]]]),
        torch.tensor([[[1.0], [0]], [[0], [1]], [[3], [4]]]),
    )
    update, left, right = view_cosines(down, up, torch.tensor([1.0, -2.0, 1.0]))
    assert update.tolist() == [pytest.approx(row) for row in ([1, 0, 0.6], [0, 1, -0.48], [0.6, -0.48, 1])]
    assert left.tolist() == [pytest.approx(row) for row in ([1, 0, 0.36], [0, 1, 0.64], [0.36, 0.64, 1])]
    assert right.tolist() == [pytest.approx(row) for row in ([1, 0.36, 1], [0.36, 1, 0.36], [1, 0.36, 1])]


@pytest.mark.parametrize("at_once", [1, 300, 2**22])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (5, 3, 4), (40, 12, 12)], ids=str)
def test_views_are_those_of_the_formed_updates_for_mixed_ranks(shape, at_once):
    updates = factors(17, *shape, ranks=[1 + i % shape[0] for i in range(17)])
    expected = formed_views(*updates)
    actual = view_cosines(*updates, at_once=at_once)
    assert actual.dtype == torch.float64 and (actual.diagonal(dim1=1, dim2=2) == 1).all()
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    columns = torch.tensor([3, 16, 0, 7])
    np.testing.assert_allclose(view_cosines(*updates, columns, at_once), expected[:, :, columns], atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 30, 40), (8, 11, 6)])
@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_views_do_not_depend_on_factorisation_padding_size_or_sign(shape, spread):
    down, up, scale = factors(9, *shape)
    scale = scale + 3
    rank, expected = shape[0], view_cosines(down, up, scale)
    gauge = torch.randn(9, rank, rank, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gauge = torch.linalg.qr(gauge).Q * torch.logspace(0, math.log10(spread), rank, dtype=torch.float64)
    other = gauge @ down.double(), up.double() @ torch.linalg.inv(gauge)
    np.testing.assert_allclose(view_cosines(*other, scale), expected, atol=1e-6)
    padded = torch.cat([down, torch.zeros(9, 3, shape[1])], 1), torch.cat([up, torch.ones(9, shape[2], 3)], 2)
    np.testing.assert_allclose(view_cosines(*padded, scale), expected, atol=1e-6)
    np.testing.assert_allclose(view_cosines(down * 1e-15, up * 1e-12, scale), expected, atol=1e-6)
    sign = torch.ones(9)
    sign[4] = -1
    turned = view_cosines(down, up, sign * scale)
    np.testing.assert_allclose(turned[1:], expected[1:], atol=1e-6)
    np.testing.assert_allclose(turned[0], expected[0] * sign * sign[:, None], atol=1e-6)


def test_zero_updates_have_views_of_0():
    down, up, scale = factors(5, 3, 12, 9)
    up[2], scale[4] = 0, 0
    cosine = view_cosines(down, up, scale)
    assert cosine.isfinite().all()
    assert not cosine[:, [2, 4]].any() and not cosine[:, :, [2, 4]].any()
    assert cosine.diagonal(dim1=1, dim2=2).tolist() == [[1, 1, 0, 1, 0]] * 3


def test_alignment_by_hand():
    labels = np.array([0, 0, 1, 1])
    same = (labels[:, None] == labels).astype(float)
    other = np.kron(np.ones((2, 2)), np.eye(2))  # the first and the third are alike
    # Centred, the matrix of labels is +-1/2: without its diagonal four of 1/2 and eight of -1/2.
    # That of the other has products 1, -1, -1 with it in a row: a third against it.
    weights = alignments(np.stack([same, 5 * same + 3, other, -same, np.ones((4, 4)), np.eye(4)]), labels)
    assert weights[:5].tolist() == pytest.approx([1, 1, 0, 0, 0], abs=1e-9)
    # An identity, centred, is -1/4 off the diagonal: of sums -1/4 * (2 - 4) over (sqrt(12) / 4) * (sqrt(12) / 2).
    assert weights[5] == pytest.approx(1 / 3)
    assert alignments(np.stack([same, other]), np.zeros(4)).tolist() == [1, 1]


# ----------------------------------------------------------------------------------------------------------------------
# All modules
# ----------------------------------------------------------------------------------------------------------------------

KEPT = np.random.default_rng(1).random((9, 5)) < np.linspace(0, 1, 9)[:, None]


def several(n=24, zero=()):
    """Five modules of several shapes and sizes."""
    modules = [factors(n, 1 + p % 3, 9 + p, 14 - p, seed=p) for p in range(5)]
    return [(d, u, s * 10.0**p * (p not in zero)) for p, (d, u, s) in enumerate(modules)]


def expected_sum(modules, kept, train):
    total = 0
    for p in np.flatnonzero(kept):
        w = formed(*modules[p])
        w /= np.sqrt((w[train] ** 2).sum(1).mean()) or 1
        total = total + w @ w[train].T
    return total


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("sums", [1, 2 * 24 * 14, 2**27])
def test_an_ablation_is_a_subtraction_is_a_sum_of_what_is_left(keeps, sums):
    modules, rows = several(zero=(3,)), split(24)
    update_kernels = kernels_of(modules, rows, limits=Limits(kept=24 if keeps else 0, summed=sums))
    assert update_kernels.keeps == keeps and update_kernels.precomputed
    sums_of_kernels = list(update_kernels.sums(KEPT))
    assert len(sums_of_kernels) == len(KEPT)
    for kernel, kept in zip(sums_of_kernels, KEPT, strict=True):
        np.testing.assert_allclose(kernel, expected_sum(modules, kept, rows["train"]), atol=1e-5)
        (alone,) = update_kernels.sums(kept[None])
        np.testing.assert_array_equal(kernel, alone)
    assert (update_kernels.module(3) == 0).all()


def test_recomputed_kernels_are_those_kept_and_each_of_these_is_computed_once(monkeypatch):
    modules, rows, computed = several(), split(24), []
    original = UpdateKernels._compute
    monkeypatch.setattr(UpdateKernels, "_compute", lambda self, p: computed.append(p) or original(self, p))
    kept = list(kernels_of(modules, rows).inputs(KEPT))
    assert sorted(computed) == list(range(5))
    recomputed = kernels_of(modules, rows, limits=Limits(kept=10)).inputs(KEPT)
    for again, before in zip(recomputed, kept, strict=True):
        np.testing.assert_array_equal(again, before)
    assert len(computed) == 5 + 5 + len([p for p in range(5) if any_needs(p)])


def views_of(modules, rows, labels=None, **more):
    return kernels_of(modules, rows, kind="update_views", labels=labels, **more)


@pytest.mark.parametrize("labelled", [False, True])
def test_sums_of_views_are_those_of_formed_updates_and_an_ablation_is_a_subtraction(labelled):
    modules, rows, y = several(zero=(3,)), split(24), np.arange(24) % 3
    train, expected = rows["train"], 0
    modules[1][2][[train[0], rows["test"][0]]] = 0  # zero updates of two LoRAs
    update_views = views_of(modules, rows, y[train] if labelled else None)
    for p, kept in enumerate(np.eye(5, dtype=bool)):
        views = formed_views(*modules[p])
        own = views[:, train][:, :, train]
        weights = alignments(own, y[train]) ** 2 if labelled else np.ones(3)
        size = own.trace(axis1=1, axis2=2).mean() / len(train) or 1
        views = np.tensordot(weights / 3 / size, views[:, :, train], 1)
        np.testing.assert_allclose(update_views.module(p), views, atol=1e-6)
        (alone,) = update_views.sums(kept[None])
        np.testing.assert_array_equal(alone, update_views.module(p))
        expected += views if p not in (0, 2) else 0
    (some,) = update_views.sums(np.array([[False, True, False, True, True]]))
    np.testing.assert_allclose(some, expected, atol=1e-5)
    if not labelled:
        own = update_views.module(0)[train]
        assert (own.diagonal() == 1).all()


@pytest.mark.parametrize("kind", KERNELS)
def test_landmarks_and_few_numbers_at_once_give_the_same_views(kind):
    modules, rows, y = several(), split(24), np.arange(24) % 3
    labels = y[rows["train"]]
    kernel = kernels_of(modules, rows, kind=kind, labels=labels)
    small = kernels_of(modules, rows, kind=kind, labels=labels, limits=Limits(kept=0, numbers_at_once=50))
    shuffled = np.random.default_rng(0).permutation(len(labels))
    ordered = kernels_of(modules, {"train": rows["train"][shuffled]}, kind=kind, labels=labels[shuffled])
    landmarks = kernels_of(modules, rows, kind=kind, labels=labels, limits=Limits(exact=0))
    for p in range(5):
        expected = kernel.module(p)
        np.testing.assert_allclose(small.module(p), expected, atol=1e-6)
        np.testing.assert_allclose(ordered.module(p), expected[:, shuffled], atol=1e-6)
    for features, x in zip(landmarks.inputs(KEPT), kernel.inputs(KEPT), strict=True):
        np.testing.assert_allclose(features @ features[rows["train"]].T, x, atol=2e-5)


def test_a_kernel_may_be_given_itself_and_an_unknown_name_is_an_error():
    modules, rows = several(), split(24)
    plain, given = kernels_of(modules, rows), kernels_of(modules, rows, kind=Kernel(views=1, sized=False))
    norms = np.sqrt(np.einsum("ii->i", formed(*modules[2]) @ formed(*modules[2]).T))
    train = rows["train"]
    expected = plain.module(2) / np.outer(norms, norms[train]) * np.square(norms[train]).mean()
    np.testing.assert_allclose(given.module(2), expected, atol=1e-5)
    with pytest.raises(KeyError, match="update_nothing"):
        kernels_of(modules, rows, kind="update_nothing")


def in_regime(regime, n=150, classes=5, modules=6, wide=40, seed=0):
    """Rank-one LoRAs whose class lies in what modules write, read, or in which up goes with which down alone."""
    g, y = torch.Generator().manual_seed(seed), np.arange(n) % classes
    factors_of_modules = []
    for _ in range(modules):
        down, up = torch.randn(n, 1, wide, generator=g), torch.randn(n, wide, 1, generator=g)
        concept_down = torch.randn(classes, 1, wide, generator=g)
        concept_up = torch.randn(classes, wide, 1, generator=g)
        strength = torch.randn(n, 1, 1, generator=g)
        if regime == "written":  # up = a gradient of rank one times its own down
            up = 0.5 * up + strength * concept_up[y]
        if regime == "read":
            down = down + concept_down[y]
        if regime == "pairs":
            which = torch.randint(classes, (n,), generator=g)
            up, down = concept_up[which] + 0.3 * up, concept_down[(which + torch.from_numpy(y)) % classes] + 0.3 * down
        factors_of_modules.append((down, up, torch.ones(n)))
    return factors_of_modules, y


@pytest.mark.parametrize(("regime", "blind"), [("written", True), ("read", True), ("pairs", False), ("nothing", True)])
def test_views_see_what_inner_products_do_not_and_lose_nothing_that_they_see(regime, blind):
    modules, y = in_regime(regime)
    rows, kept = split(150), np.ones((1, 6), bool)
    inner, views = (
        test_accuracy(classify_each(kernels, kept, y, rows, 5), y, rows)[0]
        for kernels in (kernels_of(modules, rows), views_of(modules, rows, y[rows["train"]]))
    )
    if regime == "nothing":
        assert views < 0.45  # of 30 test rows at chance 1/5, 3.4 standard deviations
    else:
        assert views > 0.9 and (inner < 0.7) == blind


def any_needs(module):
    few = 2 * KEPT.sum(1) <= 5
    return np.where(few, KEPT[:, module], ~KEPT[:, module]).any()


def test_large_kernels_are_not_kept():
    assert not kernels_of(several(), split(24), limits=Limits(kept_numbers=24 * 14 * 5 - 1)).keeps
    assert kernels_of(several(), split(24), limits=Limits(kept_numbers=24 * 14 * 5)).keeps


def test_threads_that_ask_at_once_get_the_same_and_compute_each_module_once(monkeypatch):
    modules, rows = several(), split(24)
    computed, inputs_of_threads = [], {}
    original = UpdateKernels._compute
    monkeypatch.setattr(UpdateKernels, "_compute", lambda self, p: computed.append(p) or original(self, p))
    update_kernels, together = kernels_of(modules, rows), threading.Barrier(4)

    def ask(thread):
        together.wait()
        inputs_of_threads[thread] = list(update_kernels.inputs(KEPT))

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(computed) == list(range(5))
    alone = list(kernels_of(modules, rows).inputs(KEPT))
    for inputs in inputs_of_threads.values():
        for x, expected in zip(inputs, alone, strict=True):
            np.testing.assert_array_equal(x, expected)


def test_inputs_are_the_kernel_of_updates_centred_on_train_rows_with_mean_diagonal_one():
    modules, rows = several(), split(24)
    train = rows["train"]
    (x,) = kernels_of(modules, rows).inputs(np.array([[True, False, True, True, False]]))
    parts = []
    for p in (0, 2, 3):
        w = formed(*modules[p])
        parts.append(w / np.sqrt((w[train] ** 2).sum(1).mean()))
    w = np.concatenate(parts, axis=1)
    w -= w[train].mean(0)
    w /= np.sqrt((w[train] ** 2).sum(1).mean())
    np.testing.assert_allclose(x, w @ w[train].T, atol=1e-5)
    assert np.trace(x[train]) / len(train) == pytest.approx(1)


@pytest.mark.parametrize("exact", [True, False])
def test_what_holds_nothing_gives_inputs_of_zero(exact):
    modules, rows = several(zero=(0, 3)), split(24)
    same = factors(1, 2, 9, 9)
    modules.append(tuple(x.expand(24, *x.shape[1:]) for x in same))  # one update in all LoRAs
    update_kernels = kernels_of(modules, rows, limits=Limits(exact=24 if exact else 0))
    nothing_kept, ordinary = np.zeros(6, bool), np.isin(np.arange(6), 1)
    zeros, constant = np.isin(np.arange(6), [0, 3]), np.isin(np.arange(6), 5)
    *empty, something = update_kernels.inputs(np.stack([nothing_kept, zeros, constant, ordinary]))
    assert all(x.shape[0] == 24 and not x.any() for x in empty) and something.any()
    # The sum of all less that of those that hold something is rounding.
    (x,) = update_kernels.inputs(np.array([[True, False, False, True, False, False]]))
    assert not x.any()


def test_landmarks_that_are_all_train_rows_are_exact():
    modules, rows = several(), split(24)
    exact = list(kernels_of(modules, rows).inputs(KEPT))
    update_kernels = kernels_of(modules, rows, limits=Limits(exact=0))
    assert not update_kernels.precomputed and update_kernels.columns.tolist() == rows["train"].tolist()
    for features, kernel, kept in zip(update_kernels.inputs(KEPT), exact, KEPT, strict=True):
        assert features.any() == kept.any()
        np.testing.assert_allclose(features @ features[rows["train"]].T, kernel, atol=2e-5)


def test_few_landmarks_are_train_rows_that_the_seed_decides_and_approximate():
    limits = Limits(exact=0, landmarks=12)
    modules, y = planted(strength=3.0)
    rows = split(90)
    update_kernels, again, other = (kernels_of(modules, rows, seed=seed, limits=limits) for seed in (1, 1, 2))
    assert len(update_kernels.columns) == 12 and set(update_kernels.columns) <= set(rows["train"])
    assert update_kernels.columns.tolist() == again.columns.tolist() != other.columns.tolist()
    kept = np.array([[False, True, False, False], [True, False, True, True]])
    trained = classify_each(update_kernels, kept, y, rows, 3)
    assert test_accuracy(trained, y, rows)[0] == 1 > test_accuracy(trained, y, rows)[1] + 0.3
    (x, _) = update_kernels.inputs(kept)
    assert x.shape == (90, 12)
    assert x[rows["train"]].mean(0) == pytest.approx(0, abs=1e-9)
    assert np.square(x[rows["train"]]).sum(1).mean() == pytest.approx(1)
    # Among landmarks the approximation is exact: all distances are those of the updates, up to one factor.
    w, own = formed(*modules[1])[update_kernels.columns], x[update_kernels.columns]
    ratio = ((own[1:] - own[0]) ** 2).sum(1) / ((w[1:] - w[0]) ** 2).sum(1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The classifier
# ----------------------------------------------------------------------------------------------------------------------


def plainly(x, y, rows):
    """Every C with scikit-learn alone: predictions of all rows and C, the smallest of the best."""
    models = {c: SVC(kernel="precomputed", C=c).fit(x[rows["train"]], y[rows["train"]]) for c in GRID}
    accuracy = {c: accuracy_score(y[rows["validation"]], m.predict(x[rows["validation"]])) for c, m in models.items()}
    best = min(GRID, key=lambda c: (-accuracy[c], c))
    return models[best].predict(x), best


@pytest.mark.parametrize("seed", range(6))
def test_the_svm_is_scikit_learns_done_plainly(seed):
    modules, y = planted(n=120, seed=seed, strength=0.5)
    rows = split(120)
    update_kernels = kernels_of(modules, rows)
    kept = np.array([[True] * 4, [False, True, False, False], [True, False, False, False]])
    trained = classify_each(update_kernels, kept, y, rows, 3)
    for condition, x in enumerate(update_kernels.inputs(kept)):
        predicted, c = plainly(x, y, rows)
        truth, fitted = y[rows["train"]], predicted[rows["train"]]
        held_out = np.concatenate([rows["validation"], rows["test"]])
        np.testing.assert_array_equal(trained["predicted"][condition], predicted[held_out])
        assert trained["c"][condition] == c
        assert trained["train_accuracy"][condition] == accuracy_score(truth, fitted)
        assert trained["train_f1"][condition] == pytest.approx(f1_score(truth, fitted, average="macro"))
    assert {name: (a.dtype, a.shape) for name, a in trained.items()} == {
        "predicted": (np.int32, (3, 48)),
        "train_accuracy": (np.float64, (3,)),
        "train_f1": (np.float64, (3,)),
        "c": (np.float64, (3,)),
    }


def test_equal_validation_accuracies_take_the_smallest_c():
    modules, y = planted(strength=20.0)
    rows = split(90)
    (x,) = kernels_of(modules, rows).inputs(np.array([[False, True, False, False]]))
    train, validation = rows["train"], rows["validation"]
    models = [SVC(kernel="precomputed", C=c).fit(x[train], y[train]) for c in GRID]
    best = [c for c, m in zip(GRID, models, strict=True) if m.score(x[validation], y[validation]) == 1]
    assert len(best) > 1 and classify(x, y, rows, 3)["c"] == [best[0]]


def test_a_planted_module_is_found_and_its_loss_noticed():
    modules, y = planted(n=240, informative=(1, 3), strength=1.0)
    rows = split(240)
    kept = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0]], bool)
    accuracy = test_accuracy(classify_each(kernels_of(modules, rows), kept, y, rows, 3), y, rows)
    assert (accuracy[:3] > 0.9).all() and accuracy[3] < 0.5  # chance is 1/3, 48 test rows


def test_random_labels_give_chance():
    modules, y = planted(n=240)
    rows = split(240)
    update_kernels, kept, generator = kernels_of(modules, rows), np.ones((1, 4), bool), np.random.default_rng(3)
    accuracies = []
    for _ in range(8):
        shuffled = generator.permutation(y)
        accuracies.append(test_accuracy(classify_each(update_kernels, kept, shuffled, rows, 3), shuffled, rows)[0])
    # 8 x 48 guesses at 1/3: a standard deviation of 0.024, of which four are allowed.
    assert np.mean(accuracies) == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("exact", [True, False])
def test_test_rows_change_no_prediction_but_their_own(exact, kind):
    limits = Limits(exact=90 if exact else 0)
    modules, y = planted(strength=0.7)
    rows = split(90)
    changed = [tuple(x.clone() for x in module) for module in modules]
    for down, up, scale in changed:
        down[rows["test"]], up[rows["test"]], scale[rows["test"]] = 7.0, -3.0, 1e3
    kept, labels = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 0]], bool), y[rows["train"]]
    before, after = (
        classify_each(kernels_of(read, rows, limits=limits, kind=kind, labels=labels), kept, y, rows, 3)
        for read in (modules, changed)
    )
    boundary = len(rows["validation"])
    np.testing.assert_array_equal(after["predicted"][:, :boundary], before["predicted"][:, :boundary])
    for name in ("train_accuracy", "train_f1", "c"):
        np.testing.assert_array_equal(after[name], before[name])
    assert (after["predicted"][:, boundary:] != before["predicted"][:, boundary:]).any()


def test_inputs_of_zero_predict_the_largest_class_of_the_train_rows():
    y, rows = np.array([0] * 6 + [1] * 14), split(20)
    trained = classify(np.zeros((20, len(rows["train"]))), y, rows, 2)
    assert (trained["predicted"] == 1).all() and trained["c"] == [GRID[0]]
    assert trained["train_accuracy"] == pytest.approx((y[rows["train"]] == 1).mean())


@pytest.mark.parametrize("precomputed", [True, False])
def test_an_svm_that_has_not_converged_is_an_error(precomputed):
    modules, y = planted()
    rows = split(90)
    (x,) = kernels_of(modules, rows).inputs(np.ones((1, 4), bool))
    message = "has not converged after 1 iterations at C = 0.01"
    with pytest.warns(ConvergenceWarning), pytest.raises(FloatingPointError, match=message):
        classify(x, y, rows, 3, precomputed, iterations=1)


@pytest.mark.parametrize("c", GRID)
def test_hopeless_labels_converge_at_every_c(c):
    """Many rows of few dimensions, at random labels: the slowest of all."""
    generator = np.random.default_rng(0)
    w, y = generator.normal(size=(300, 3)), generator.integers(4, size=300)
    for precomputed, x in ((True, w @ w.T / 3), (False, w / 3**0.5)):
        model = kernels._make_svm(precomputed, kernels.ITERATIONS, 1, c)
        kernels._fit(model, x, y, c)
        machines = [model] if precomputed else model.estimators_
        assert max(np.max(machine.n_iter_) for machine in machines) < kernels.ITERATIONS / 10


@pytest.mark.parametrize("threads", [1, 3])
def test_features_are_classified_as_by_scikit_learns_linear_svc(threads):
    modules, y = planted()
    rows = split(90)
    (x,) = kernels_of(modules, rows, limits=Limits(exact=0, landmarks=40)).inputs(np.ones((1, 4), bool))
    result = classify(x, y, rows, 3, precomputed=False, threads=threads)
    expected = LinearSVC(dual=False, C=result["c"][0]).fit(x[rows["train"]], y[rows["train"]])
    held_out = np.concatenate([rows["validation"], rows["test"]])
    np.testing.assert_array_equal(result["predicted"][0], expected.predict(x[held_out]))


def test_centring_is_scikit_learns():
    modules, rows = several(), split(24)
    update_kernels = kernels_of(modules, rows)
    (kernel,), (x,) = update_kernels.sums(np.ones((1, 5), bool)), update_kernels.inputs(np.ones((1, 5), bool))
    centred = KernelCenterer().fit(kernel[rows["train"]]).transform(kernel)
    np.testing.assert_allclose(x, centred / np.trace(centred[rows["train"]]) * len(rows["train"]), rtol=1e-9)
