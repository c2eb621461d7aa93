import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA

from training.pca import PCA, _converged, num_components


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def low_rank(rows, cols, rank, seed=0):
    return gaussian(rows, rank, seed=seed) @ gaussian(rank, cols, seed=seed + 1)


def close(got, expected, rtol=1e-4, atol=1e-9):
    np.testing.assert_allclose(np.asarray(got, dtype=np.float64), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (12, 12), (5, 400), (300, 7)])
def test_is_scikit_learns(shape):
    x, new = gaussian(*shape) * torch.linspace(3, 0.1, shape[1]) + 5, gaussian(4, shape[1], seed=9)
    k = min(6, shape[0] - 1, shape[1])
    ours, theirs = PCA(6, numbers_at_once=16).fit(x), SklearnPCA(k, svd_solver="full").fit(x.double().numpy())
    close(ours.mean_, theirs.mean_, rtol=1e-9)
    close(ours.explained_variance_, theirs.explained_variance_, rtol=1e-9)
    signs = np.sign((ours.components_.numpy() * theirs.components_).sum(1))
    close(ours.components_.numpy() * signs[:, None], theirs.components_, rtol=1e-6, atol=1e-9)
    close(ours.transform(new).numpy() * signs, theirs.transform(new.double().numpy()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, columns, k", [(30, 8, 6), (30, 4, 4), (5, 9, 4)])
def test_components_are_the_least_of_those_wanted_rows_less_one_and_columns(rows, columns, k):
    assert num_components(6, rows, columns) == k == len(PCA(6).fit(gaussian(rows, columns)).components_)


class Blocks:
    """What PCA takes in place of a tensor: a shape, and blocks; counts how many numbers it gave at once."""

    def __init__(self, x):
        self.x, self.shape, self.largest = x, tuple(x.shape), 0

    def split(self, length, dim=0):
        for block in self.x.split(length, dim):
            self.largest = max(self.largest, block.numel())
            yield block


def spectrum(kind, n, columns):
    """n rows whose centred matrix has, up to the noise, singular values of this kind."""
    noise = gaussian(n, columns, seed=3)
    if kind == "noise":
        return noise
    if kind in ("planted", "strong"):  # three directions above the noise; in the second case far above it
        strength = {"planted": 0.3, "strong": 3.0}[kind]
        return noise + strength * low_rank(n, columns, 3, seed=5)
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    return u @ torch.diag(torch.arange(1.0, len(v) + 1) ** -0.1) @ v  # "slow": falls by half over all


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize("kind", ["noise", "planted", "strong", "slow"])
def test_of_many_rows_explains_what_an_exact_one_does(kind, shape):
    sizes = {"gram_side": 100, "numbers_at_once": 64 * shape[1]}
    x, k = spectrum(kind, *shape) + 2, 10
    pca, rows = PCA(k, **sizes).fit(x), Blocks(x)
    centred = x.double() - x.double().mean(0)
    best = torch.linalg.eigvalsh(centred.mT @ centred)[-k:].sum()
    explained = (centred @ pca.components_.mT).square().sum()
    assert 1 - 1e-3 < explained / best < 1 + 1e-9
    close(pca.explained_variance_.sum() * (shape[0] - 1), explained, rtol=1e-5)
    close(pca.components_ @ pca.components_.mT, torch.eye(k), atol=1e-9)
    assert (pca.components_.gather(1, pca.components_.abs().argmax(1, keepdim=True)) > 0).all()
    # The same from rows that are only ever there in blocks, bit for bit, and again.
    again = PCA(k, **sizes).fit(rows)
    assert torch.equal(again.components_, pca.components_) and again.passes_ == pca.passes_
    assert torch.equal(again.transform(rows), pca.transform(x)) and rows.largest <= sizes["numbers_at_once"]


@pytest.mark.parametrize("kind", ["noise", "strong"])
def test_a_gpus_products_in_float64_find_the_same(kind):
    x, k = spectrum(kind, 300, 420) + 2, 5
    single = PCA(k, gram_side=100).fit(x)
    double = PCA(k, gram_side=100, products=torch.float64).fit(x)
    assert double.passes_ == single.passes_
    close(double.explained_variance_, single.explained_variance_, rtol=1e-5)
    assert not torch.equal(double.components_, single.components_)
    close(double.explained_variance_.sum(), PCA(k).fit(x).explained_variance_.sum(), rtol=1e-3)


@pytest.mark.parametrize("shape", [(30, 80), (80, 30)])
def test_of_few_rows_or_columns_is_exact_for_row_blocks_too(shape):
    x = gaussian(*shape)
    assert torch.equal(PCA(5).fit(Blocks(x)).components_, PCA(5).fit(x).components_)


def test_of_many_rows_keeps_the_conventions():
    def fit(rows):
        return PCA(6, gram_side=20).fit(rows)

    two = fit(low_rank(90, 70, 2) + 3)
    assert (two.components_[2:] == 0).all() and (two.components_[:2].norm(dim=1) - 1).abs().max() < 1e-9
    assert two.passes_ < 8
    x = gaussian(90, 70)
    for scale in (2.0**-70, 2.0**70):  # neither do squares overflow float32, nor vanish in it
        assert torch.equal(fit(scale * x).components_, fit(x).components_)
        close(fit(scale * x).explained_variance_ / scale**2, fit(x).explained_variance_, rtol=1e-9)
    constant = fit(torch.full((90, 70), 0.1) + torch.arange(70))
    assert (constant.components_ == 0).all() and (constant.explained_variance_ == 0).all()


def test_of_many_rows_stops_when_little_is_left():
    # Variances that fall tenfold from one direction to the next: two products find all, of 17 that would have room.
    x = gaussian(700, 600) * torch.logspace(0, -60, 600, dtype=torch.float64)
    assert PCA(6, gram_side=20).fit(x).passes_ <= 6
    # Gains of 100, 10, 1, 0.1 percent: the rest is about a ninth of the last gain, but never taken for less than it.
    assert not _converged([1.0])
    assert not _converged([1.0, 2.0, 2.1])
    assert not _converged([1.0, 2.0, 2.1, 2.11])
    assert not _converged([1.0, 2.0, 2.1, 2.11, 2.111])
    assert _converged([1.0, 2.0, 2.1, 2.11, 2.111, 2.1111])


def test_refuses_row_blocks_that_it_cannot_use():
    x = gaussian(90, 70)
    pca = PCA(3, gram_side=20).fit(x)
    x[40, 3] = math.nan
    for refused in (PCA(3, gram_side=20).fit, pca.transform):
        with pytest.raises(ValueError, match="1 of 6300 values are NaN"):
            refused(Blocks(x))
    with pytest.raises(ValueError, match="1 of 700 values are NaN"):  # the fifth of nine blocks of ten rows
        PCA(3, numbers_at_once=700).fit(Blocks(x))
    with pytest.raises(ValueError, match=r"must be float\[N, F\] and hold values, got shape \[5\]"):
        PCA(3, gram_side=20).fit(Blocks(torch.ones(5)))


def test_learns_from_train_rows_only_and_refuses_what_it_cannot_use():
    x = gaussian(9, 20)
    kept, pca = x.clone(), PCA(4).fit(x)
    mean, components = pca.mean_.clone(), pca.components_.clone()
    scores = pca.transform(gaussian(3, 20, seed=5) * 100)
    assert torch.equal(pca.mean_, mean) and torch.equal(pca.components_, components) and torch.equal(x, kept)
    assert scores.shape == (3, 4) and scores.dtype == torch.float32
    for bad, message in [
        (x[:1], "at least 2 train rows"),
        (x[0], "reshape"),
        (x.log(), "values are NaN"),
        (x[:, :0], "hold values"),
        (x.long(), "floating point"),
        (x.double() * 1e300, "beyond float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            PCA().fit(bad)
    with pytest.raises(ValueError, match="fitted on 20 columns, got 19"):
        pca.transform(x[:, :19])


def test_signs_width_and_bits():
    for shape, k in [((9, 20), 8), ((20, 9), 9), ((200, 150), 100)]:
        x = gaussian(*shape)
        pca, again = PCA().fit(x), PCA().fit(x)
        assert pca.components_.shape == (k, shape[1])
        assert torch.equal(pca.components_, again.components_)
        assert (pca.components_.gather(1, pca.components_.abs().argmax(1, keepdim=True)) > 0).all()
        close(pca.components_ @ pca.components_.mT, torch.eye(k), atol=1e-9)
        close(pca.transform(x).double().var(0), pca.explained_variance_, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (2, 3)])
def test_of_constant_rows_is_zero(shape):
    x = torch.full(shape, 0.1) + torch.arange(shape[1])
    pca = PCA().fit(x)
    assert (pca.components_ == 0).all() and (pca.explained_variance_ == 0).all()
    assert (pca.transform(x + 1) == 0).all()


@pytest.mark.parametrize("shape", [(6, 50), (50, 6)])
def test_components_beyond_the_rank_are_zero(shape):
    x = gaussian(shape[0], 2).double() @ gaussian(2, shape[1], seed=1).double() + 3
    pca = PCA().fit(x)
    assert (pca.components_[2:] == 0).all() and (pca.components_[:2].norm(dim=1) - 1).abs().max() < 1e-9
    close(pca.transform(x).double() @ pca.components_ + pca.mean_, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gram_side", [100, 10])
def test_blocks_of_columns_give_what_the_whole_does_and_hold_little_whatever_the_width(gram_side):
    x, new = gaussian(30, 4000) + 1, gaussian(7, 4000, seed=4)
    whole = PCA(5, gram_side=gram_side).fit(x)
    for at_once in (30 * 150, 30 * 999):
        rows, others = Blocks(x), Blocks(torch.cat([x[:9], new]))
        pca = PCA(5, gram_side=gram_side, numbers_at_once=at_once).fit(rows)
        close(pca.explained_variance_, whole.explained_variance_, rtol=1e-5)
        close(pca.transform(others), whole.transform(others.x), rtol=1e-3, atol=1e-3)
        assert max(rows.largest, others.largest) <= at_once
        assert pca.passes_ == whole.passes_
