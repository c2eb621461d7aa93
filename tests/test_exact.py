"""Factorisations for a GPU, on the CPU beside LAPACK's: the same products, orthonormal or zero columns."""

import numpy as np
import pytest
import torch

import representations
from representations import coupling, matrix_norms, spectral, update_measures, update_spectrum
from training import kernels
from training.exact import BATCHED, eigenvectors, exact_dtype, gram_schmidt, qr, svdvals, triangle
from training.kernels import Updates, cosines


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ill_conditioned(rows, columns, condition):
    """Matrices whose singular values fall from 1 to 1 / condition."""
    u, v = torch.linalg.qr(gaussian(3, rows, columns)).Q, torch.linalg.qr(gaussian(3, columns, columns, seed=1)).Q
    return u * torch.logspace(0, -np.log10(condition), columns, dtype=torch.float64) @ v.mT


CASES = {
    "gaussian": gaussian(5, 40, 6),
    "one column": gaussian(5, 40, 1),
    "square": gaussian(5, 6, 6),
    "wide": gaussian(5, 4, 9),
    "zero": torch.zeros(5, 40, 6, dtype=torch.float64),
    "zero columns": gaussian(5, 40, 6) * torch.tensor([0, 1, 1, 0, 1, 0]),
    "rank 2": gaussian(5, 40, 2) @ gaussian(5, 2, 6, seed=1),
    "equal columns": gaussian(5, 40, 1).expand(5, 40, 6),
    "1e6": ill_conditioned(40, 6, 1e6),
    "1e12": ill_conditioned(40, 6, 1e12),
    "1e20": ill_conditioned(40, 6, 1e20),
    "hardly tall": ill_conditioned(7, 6, 1e15),
    "many columns": ill_conditioned(300, 128, 1e12),
    "large": gaussian(5, 40, 6) * 1e30,
    "small": gaussian(5, 40, 6) * 1e-40,
    "sizes apart": gaussian(5, 40, 6) * torch.logspace(30, -40, 6, dtype=torch.float64),
}


@pytest.mark.parametrize("a", CASES.values(), ids=CASES)
def test_gram_schmidts_factors_multiply_to_the_matrix_and_its_columns_are_orthonormal_or_zero(a):
    before = a.clone()
    q, r = gram_schmidt(a)
    assert torch.equal(a, before)
    count, rows, columns = a.shape
    k = min(rows, columns)
    assert q.shape == (count, rows, k) and r.shape == (count, k, columns)
    error = torch.linalg.vector_norm(q @ r - a, dim=1)  # of each column, as a share of it
    assert (error <= 3e-14 * torch.linalg.vector_norm(a, dim=1)).all()
    size = torch.linalg.vector_norm(q, dim=1)
    assert ((size == 0) | ((size - 1).abs() < 1e-14)).all()
    assert (q.mT @ q - torch.diag_embed((size > 0).double())).abs().max() < 1e-13
    if columns < rows:
        assert (r.tril(-1) == 0).all() and (r.diagonal(dim1=1, dim2=2) >= 0).all()
        assert (r[size == 0] == 0).all()
    expected = torch.linalg.svdvals(a)
    torch.testing.assert_close(torch.linalg.svdvals(r), expected, rtol=0, atol=1e-13 * expected.max().item())


def test_what_depends_on_others_is_zero_in_both_factors():
    x = gaussian(4, 50, 3)
    q, r = gram_schmidt(torch.stack([x[..., 0], 0 * x[..., 0], x[..., 1], x[..., 0] - 3 * x[..., 1], x[..., 2]], 2))
    assert (torch.linalg.vector_norm(q, dim=1) > 0).tolist() == [[True, False, True, False, True]] * 4
    assert (r[:, [1, 3]] == 0).all()


def test_a_cpu_keeps_lapacks():
    a = gaussian(3, 20, 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(qr(a), torch.linalg.qr(a), strict=True))
    assert torch.equal(triangle(a), torch.linalg.qr(a, mode="r").R)
    assert exact_dtype("cpu") == torch.float32 and exact_dtype("cuda:1") == torch.float64


def test_a_gpu_does_without_lapacks():
    a = torch.zeros(3, 20, 4, device="meta", dtype=torch.float64)
    q, r = qr(a)
    assert q.shape == (3, 20, 4) and r.shape == triangle(a).shape == (3, 4, 4) and q.device == a.device


@pytest.mark.parametrize("side", [3, BATCHED + 1])
def test_decompositions_of_any_side_are_torchs(side):
    a = gaussian(2, side, side)
    assert torch.equal(svdvals(a), torch.linalg.svdvals(a))
    assert torch.equal(eigenvectors(a @ a.mT), torch.linalg.eigh(a @ a.mT).eigenvectors)


FACTORS = {
    "plain": (gaussian(7, 3, 20), gaussian(7, 15, 3, seed=1)),
    "rank 1": (gaussian(7, 1, 20), gaussian(7, 15, 1, seed=1)),
    "deficient": (gaussian(7, 1, 20).expand(7, 3, 20), gaussian(7, 15, 3, seed=1)),
    "padded": (gaussian(7, 3, 20) * torch.tensor([1, 1, 0])[:, None], gaussian(7, 15, 3, seed=1)),
    "zero": (gaussian(7, 3, 20), torch.zeros(7, 15, 3, dtype=torch.float64)),
    "zero down": (torch.zeros(7, 3, 20, dtype=torch.float64), gaussian(7, 15, 3, seed=1)),
    "r > in": (gaussian(7, 6, 4), gaussian(7, 15, 6, seed=1)),
    "1e12": (ill_conditioned(20, 3, 1e12).mT, gaussian(3, 15, 3, seed=1)),
}


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_updates_are_the_same_by_either_factorisation(monkeypatch, factors, orthogonal):
    down, up = factors
    scale = torch.linspace(-2, 3, len(down), dtype=torch.float64)
    theirs = Updates.from_factors(down, up, scale, orthogonal=orthogonal)
    monkeypatch.setattr(kernels, "qr", gram_schmidt)
    ours = Updates.from_factors(down, up, scale, orthogonal=orthogonal)
    assert ours.down.shape == theirs.down.shape and ours.up.shape == theirs.up.shape
    torch.testing.assert_close(ours.up @ ours.down, theirs.up @ theirs.down, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.norm, theirs.norm, rtol=1e-12, atol=0)
    if not orthogonal:
        size = torch.linalg.vector_norm(ours.down, dim=2)
        assert ((size == 0) | ((size - 1).abs() < 1e-6)).all()
    views = 3 if orthogonal else 1
    torch.testing.assert_close(
        cosines(ours, ours, views=views), cosines(theirs, theirs, views=views), rtol=0, atol=2e-6
    )


def test_features_are_the_same_by_either_factorisation(monkeypatch):
    def features():
        for down, up in FACTORS.values():
            yield [spectral(down), matrix_norms(up)]
            yield [function(down, up) for function in (coupling, update_spectrum, update_measures)]

    theirs = list(features())
    monkeypatch.setattr(representations, "triangle", lambda a: gram_schmidt(a)[1])
    for ours, expected in zip(features(), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
