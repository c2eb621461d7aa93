import hashlib
import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import representations
from representations import (
    COMPUTED,
    ENSEMBLE,
    MEASURES,
    REPRESENTATIONS,
    Shared,
    coupling,
    effective_rank,
    matrix_features,
    shared,
    singular_values,
    update_measures,
    update_sketch,
    update_spectrum,
)

MATRIX = [name for name, row in REPRESENTATIONS.items() if (row.unit, row.made) == ("layer", "computed")]
TABLE = REPRESENTATIONS | MEASURES
PAIR = [name for name, row in TABLE.items() if row.unit == "pair" and row.made in COMPUTED]
SHAPES = {
    "tall": (40, 6),
    "wide": (6, 40),
    "square": (12, 12),
    "1xn": (1, 64),
    "nx1": (63, 1),
    "2x3": (2, 3),
    "9x4": (9, 4),  # an odd long side
}
WIDTHS = {
    "stats": 7,
    "spectral": 32,
    "matrix_norms": 7,
    "distribution": 12,
    "coupling": 4,
    "frequency": 14,
    "info_theoretic": 2,
    "ensemble": 67,
    "update_sketch": 64,
    "update_spectrum": 30,
    "update_response": 64,
}
REFERENCED = [name for name in MATRIX if name in WIDTHS]
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 9)
quick = settings(deadline=None, max_examples=40)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair_features(down, *more, **how):
    """Features of pairs, of which the module "m" has inputs."""
    inputs = {"m": gaussian(8, down.shape[-1], seed=9)}
    return representations.pair_features(down, *more, inputs=inputs, **how)


def low_rank(n, rows, cols, rank, seed=0):
    return gaussian(n, rows, rank, seed=seed) @ gaussian(n, rank, cols, seed=seed + 1)


def orthogonal(n, seed):
    return torch.linalg.qr(gaussian(n, n, seed=seed, dtype=torch.float64)).Q


def named(name, w):
    """Features of a single matrix as a dict from feature name to number."""
    row = REPRESENTATIONS[name]
    return dict(zip(row.feature_names, row.function(w[None])[0].tolist(), strict=True))


def close(got, expected, rtol=1e-4, atol=1e-9):
    np.testing.assert_allclose(np.asarray(got, dtype=np.float64), expected, rtol=rtol, atol=atol)


# 1. By hand


def test_spectral_of_a_diagonal():
    f = named("spectral", torch.diag(torch.tensor([1.0, 4.0, 3.0])))
    assert [f[f"sigma_{i}"] for i in range(1, 11)] == pytest.approx([4, 3, 1] + [0] * 7)
    assert [f[f"sigma_share_{i}"] for i in range(1, 5)] == pytest.approx([0.5, 0.375, 0.125, 0])
    assert [f[f"gap_{i}"] for i in range(1, 10)] == pytest.approx([1, 2, 1] + [0] * 6)
    assert (f["condition_number"], f["nuclear_norm"]) == pytest.approx((4, 8))
    entropy = -(0.5 * math.log(0.5) + 0.375 * math.log(0.375) + 0.125 * math.log(0.125))
    assert f["effective_rank"] == pytest.approx(math.exp(entropy))


def test_shares_divide_by_the_sum_of_all_singular_values_not_of_ten():
    f = named("spectral", torch.eye(20))
    assert f["sigma_share_1"] == pytest.approx(1 / 20)
    assert f["effective_rank"] == pytest.approx(20)


def test_planted_singular_values_are_recovered():
    planted = torch.tensor([9.0, 5.0, 2.0, 0.5], dtype=torch.float64)
    w = orthogonal(30, 1)[:, :4] @ torch.diag(planted) @ orthogonal(4, 2)
    close(singular_values(w[None])[0], planted, rtol=1e-12)
    close(singular_values(w.mT[None])[0], planted, rtol=1e-12)


def test_condition_number_leaves_out_what_float32_cannot_tell_from_zero():
    eps = torch.finfo(torch.float32).eps
    w = torch.diag(torch.tensor([1.0, 0.5, 2.9 * eps], dtype=torch.float64))  # the cutoff is 3 eps
    assert named("spectral", w)["condition_number"] == pytest.approx(2)
    w[2, 2] = 3.1 * eps
    assert named("spectral", w)["condition_number"] == pytest.approx(1 / (3.1 * eps))


def test_norms_of_a_small_matrix():
    f = named("matrix_norms", torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    assert f == pytest.approx(
        {
            "frobenius": 5,
            "nuclear": 7,
            "spectral": 4,
            "l1": 4,
            "linf": 4,
            "nuclear_to_frobenius": 1.4,
            "spectral_to_frobenius": 0.8,
        }
    )
    f = named("matrix_norms", torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]))
    assert (f["l1"], f["linf"]) == (9, 15)  # column |3| + |-6|, row 4 + 5 + 6


def test_stats_of_four_values():
    f = named("stats", torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    # mean 1, deviations -1 -1 -1 3: m2 = 3, m3 = 6, m4 = 21
    assert f == pytest.approx(
        {
            "mean": 1,
            "std": 3**0.5,
            "median": 0,
            "min": 0,
            "max": 4,
            "skewness": 6 / 3**1.5,
            "kurtosis": 21 / 9,
        }
    )


def test_distribution_of_0_to_100():
    f = named("distribution", torch.arange(101.0).reshape(1, 101).flip(1))
    for q in (5, 10, 25, 50, 75, 90, 95):
        assert f[f"quantile_{q:02d}"] == pytest.approx(q)
    assert f["interquartile_range"] == pytest.approx(50)
    assert f["mean_absolute_deviation"] == pytest.approx(2 * 50 * 51 / 2 / 101)
    assert f["std_to_mean"] == pytest.approx(math.sqrt((101**2 - 1) / 12) / 50)


def test_frequency_of_a_cosine():
    # Two periods over 16 samples: magnitude n / 2 = 8 at frequencies 2 and -2, nothing elsewhere.
    f = named("frequency", torch.cos(2 * math.pi * 2 * torch.arange(16, dtype=torch.float64) / 16)[None])
    assert [f[f"magnitude_{i}"] for i in range(1, 11)] == pytest.approx([8, 8] + [0] * 8)
    assert (f["mean"], f["max"], f["energy_share_of_10"]) == pytest.approx((1, 8, 1))
    assert f["std"] == pytest.approx(math.sqrt(2 * 64 / 16 - 1))


def test_entropy_of_evenly_filled_bins_is_log_50():
    f = named("info_theoretic", torch.arange(100.0).reshape(10, 10))
    assert f == pytest.approx({"entropy": math.log(50), "normalised_entropy": 1})
    # Half of the values in the first bin, half in the (closed) last.
    assert named("info_theoretic", torch.tensor([[0.0, 1.0]]))["entropy"] == pytest.approx(math.log(2))


def test_coupling_of_small_factors():
    down = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    f = dict(zip(REPRESENTATIONS["coupling"].feature_names, coupling(down[None], down[None])[0], strict=True))
    assert f["entries_correlation"] == pytest.approx(1)
    assert f["entries_cosine"] == pytest.approx(1)
    assert f["update_norm"] == pytest.approx(math.hypot(9, 16))
    assert f["singular_values_correlation"] == pytest.approx(1)
    turned = torch.tensor([[0.0, 3.0], [4.0, 0.0]])  # upᵀ: no entry where down has one
    assert coupling(down[None], turned.mT[None])[0, 1] == 0


def test_coupling_pads_the_narrower_factor_with_zero_columns():
    down, up = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0], [2.0], [2.0]]])
    correlation, cosine, norm, _ = coupling(down, up, torch.tensor([-2.0]))[0].tolist()
    assert cosine == pytest.approx(5 / (math.sqrt(5) * 3))
    assert correlation == pytest.approx(np.corrcoef([1, 2, 0], [1, 2, 2])[0, 1])
    assert norm == pytest.approx(2 * math.sqrt(5) * 3)  # a norm, whatever the sign of the scale


def test_update_sketch_is_the_definition():
    down, up, scale = gaussian(3, 2, 5), gaussian(3, 7, 2, seed=1), torch.tensor([1.0, 0.5, -2.0])

    def drawn(side, length):
        seed = int.from_bytes(hashlib.sha256(f"blocks.0.attn/{side}".encode()).digest(), "big")
        return np.random.Generator(np.random.PCG64(seed)).normal(0, math.sqrt(1 / 8), (length, 8))

    update = scale.numpy()[:, None, None] * (up.double() @ down.double()).numpy()
    expected = drawn("P", 7).T @ update @ drawn("Q", 5)
    close(update_sketch(down, up, "blocks.0.attn", scale), expected.reshape(3, 64), rtol=1e-5, atol=1e-6)


def test_measures_of_a_diagonal_update():
    down, up = torch.diag(torch.tensor([3.0, 1.0]))[None], torch.diag(torch.tensor([2.0, 6.0]))[None]
    # Singular values 6, 6, times -0.5; norms as they are.
    assert update_measures(down, up, torch.tensor([-0.5]))[0].tolist() == pytest.approx([2, math.hypot(3, 3), -0.5])
    assert update_measures(down, up * torch.tensor([1.0, 0.0]))[0].tolist() == pytest.approx([1, 6, 1])


def spectrum(down, up, scale=None):
    """`update_spectrum` of a single update, as a dict from feature name to number."""
    row = REPRESENTATIONS["update_spectrum"]
    return dict(zip(row.feature_names, update_spectrum(down[None], up[None], scale)[0].tolist(), strict=True))


def test_update_spectrum_of_a_diagonal():
    # diag(4, 2) after a core: singular values 12 and 6, times -0.5 (6 and 3); of three rows and two columns.
    down = torch.diag(torch.tensor([4.0, 2.0]))
    f = spectrum(down, torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]), torch.tensor([-0.5]))
    assert [f[f"sigma_{i}"] for i in range(1, 11)] == pytest.approx([6, 3] + [0] * 8)
    assert [f[f"sigma_share_{i}"] for i in range(1, 4)] == pytest.approx([2 / 3, 1 / 3, 0])
    assert f["effective_rank"] == pytest.approx(math.exp(math.log(3) - 2 / 3 * math.log(2)))
    assert (f["stable_rank"], f["participation_ratio"]) == pytest.approx((45 / 36, 45**2 / (36**2 + 81)))
    assert (f["condition_number"], f["nuclear_norm"], f["frobenius_norm"]) == pytest.approx((2, 9, math.sqrt(45)))
    # Row norms 6, 3, 0: mean 3; differences of ordered pairs 2 (3 + 6 + 3), over 9, over twice the mean.
    assert (f["row_norms_max_to_mean"], f["row_norms_gini"]) == pytest.approx((2, 24 / 9 / 6))
    assert (f["column_norms_max_to_mean"], f["column_norms_gini"]) == pytest.approx((4 / 3, 2 * 3 / 4 / 9))


def test_update_spectrum_has_the_shares_of_all_singular_values_and_equal_ones_count_each():
    f = spectrum(torch.eye(20), torch.eye(20))
    assert f["sigma_share_10"] == pytest.approx(1 / 20)
    for feature in ("effective_rank", "stable_rank", "participation_ratio", "nuclear_norm"):
        assert f[feature] == pytest.approx(20)
    for feature in ("row_norms_max_to_mean", "column_norms_max_to_mean", "condition_number"):
        assert f[feature] == pytest.approx(1)
    assert f["row_norms_gini"] == f["column_norms_gini"] == 0


def test_one_row_that_is_not_zero_is_all_the_concentration_there_is():
    up = torch.zeros(5, 2)
    up[3] = torch.tensor([1.0, -2.0])
    f = spectrum(gaussian(2, 9), up)
    assert (f["row_norms_max_to_mean"], f["row_norms_gini"]) == pytest.approx((5, 4 / 5))
    assert f["stable_rank"] == f["participation_ratio"] == pytest.approx(1) and f["sigma_2"] == 0


# 2. Reference


def reference(name, w):
    """Slow and literal: one matrix at a time, numpy and scipy in float64."""
    w = np.asarray(w, dtype=np.float64)
    x = w.ravel()
    if name == "stats":
        return [x.mean(), x.std(), np.median(x), x.min(), x.max(), scipy.stats.skew(x), scipy.stats.kurtosis(x) + 3]
    if name == "spectral":
        s = scipy.linalg.svdvals(w)
        top = np.pad(s, (0, 10))[:10]
        kept = s[s > s[0] * max(w.shape) * np.finfo(np.float32).eps]
        rank = np.exp(scipy.stats.entropy(s))
        return [*top, *(top / s.sum()), rank, s[0] / kept[-1], *(top[:-1] - top[1:]), s.sum()]
    if name == "matrix_norms":
        norms = [np.linalg.norm(w, order) for order in ("fro", "nuc", 2, 1, np.inf)]
        return [*norms, norms[1] / norms[0], norms[2] / norms[0]]
    if name == "distribution":
        q = np.quantile(x, [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
        shape = [scipy.stats.skew(x), scipy.stats.kurtosis(x, fisher=False)]
        return [*q, q[4] - q[2], np.abs(x - x.mean()).mean(), x.std() / abs(x.mean()), *shape]
    if name == "frequency":
        c = np.abs(scipy.fft.fft2(w)).ravel()
        top = np.pad(np.sort(c)[::-1], (0, 10))[:10]
        return [*top, c.mean(), c.std(), c.max(), (top**2).sum() / (c**2).sum()]
    if name == "info_theoretic":
        entropy = scipy.stats.entropy(np.histogram(x, 50)[0])
        return [entropy, entropy / np.log(50)]
    return [value for part in ENSEMBLE for value in reference(part, w)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", REFERENCED)
def test_features_are_those_of_scipy(name, shape, dtype):
    w = (gaussian(3, *shape, seed=7) * 0.02 + 0.003).to(dtype)
    for got, matrix in zip(REPRESENTATIONS[name].function(w), w, strict=True):
        close(got, reference(name, matrix.double()))


@pytest.mark.parametrize("name", REFERENCED)
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_features_are_those_of_scipy(name, rank):
    w = low_rank(2, 12, 30, rank)  # in float32: the spectrum's tail is float32 rounding, and is seen as scipy sees it
    for got, matrix in zip(REPRESENTATIONS[name].function(w), w, strict=True):
        close(got, reference(name, matrix))


def test_more_than_ten_singular_values_and_many_values():
    w = gaussian(1, 70, 90, seed=3)
    close(REPRESENTATIONS["ensemble"].function(w)[0], reference("ensemble", w[0]))


@quick
@given(st.integers(2, 300), SEEDS, st.sampled_from([1e-30, 0.7, 7e20]), st.sampled_from([0.0, 1.1, 1e3]), st.booleans())
def test_histogram_counts_are_numpys(n, seed, scale, offset, on_edges):
    x = ((gaussian(n, seed=seed) + offset) * scale).double().numpy()
    if on_edges:  # ties, and a value that a rounding away from numpy's edge would move to the next bin
        edges = np.linspace(x.min(), x.max(), 51)
        x = np.concatenate([edges, edges[np.random.default_rng(seed).integers(51, size=n)]])
    expected = scipy.stats.entropy(np.histogram(x, 50)[0])
    close(named("info_theoretic", torch.from_numpy(x)[None])["entropy"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(4, 20, 33), (4, 33, 20), (1, 9, 30), (6, 3, 4), (6, 3, 40), (2, 8, 8)])
def test_coupling_is_numpys_on_the_formed_update(shape):
    r, n_in, n_out = shape
    down, up, scale = gaussian(3, r, n_in), gaussian(3, n_out, r, seed=1) + 0.3, torch.tensor([2.0, -0.25, 1.0])
    for i, got in enumerate(coupling(down, up, scale).tolist()):
        d, u = down[i].double().numpy(), up[i].double().numpy()
        width = max(n_in, n_out)
        a = np.pad(d, ((0, 0), (0, width - n_in))).ravel()
        b = np.pad(u.T, ((0, 0), (0, width - n_out))).ravel()
        s, t = (np.pad(x, (0, r - len(x))) for x in (scipy.linalg.svdvals(d), scipy.linalg.svdvals(u)))
        spectra = np.corrcoef(s, t)[0, 1] if r > 1 else 0
        norm = np.linalg.norm(scale[i].item() * u @ d)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        close(got, [np.corrcoef(a, b)[0, 1], cosine, norm, spectra], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 20, 33), (4, 33, 20), (1, 9, 30), (6, 3, 4), (6, 3, 40), (2, 8, 8), (12, 12, 9)])
def test_measures_are_scipys_of_the_formed_update(shape, dtype):
    r, n_in, n_out = shape
    down, up, scale = gaussian(3, r, n_in, dtype=dtype), gaussian(3, n_out, r, seed=1).to(dtype), torch.arange(3.0) - 2
    for got, d, u, s in zip(update_measures(down, up, scale).tolist(), down, up, scale.tolist(), strict=True):
        values = scipy.linalg.svdvals((s * u.double() @ d.double()).numpy())
        rank = np.exp(scipy.stats.entropy(values)) if s else 0
        close(got, [rank, np.linalg.norm(values), s], rtol=1e-6)


def spectrum_reference(w):
    """Slow and literal, of the formed update, numpy and scipy in float64."""
    s = scipy.linalg.svdvals(w)
    top, square = np.pad(s, (0, 10))[:10], (s**2).sum()
    kept = s[s > s[0] * max(w.shape) * np.finfo(np.float32).eps]
    ranks = [np.exp(scipy.stats.entropy(s)), square / s[0] ** 2, square**2 / (s**4).sum()]
    spread = []
    for norms in (np.linalg.norm(w, axis=1), np.linalg.norm(w, axis=0)):
        gini = np.abs(norms[:, None] - norms).mean() / 2 / norms.mean()
        spread += [norms.max() / norms.mean(), gini]
    return [*top, *(top / s.sum()), *ranks, s[0] / kept[-1], s.sum(), math.sqrt(square), *spread]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 20, 33), (4, 33, 20), (1, 9, 30), (6, 3, 4), (6, 3, 40), (2, 8, 8), (12, 12, 9)])
def test_update_spectrum_is_scipys_of_the_formed_update(shape, dtype):
    r, n_in, n_out = shape
    down, up, scale = gaussian(3, r, n_in, dtype=dtype), gaussian(3, n_out, r, seed=1).to(dtype), torch.arange(3.0) - 2
    f = update_spectrum(down, up, scale)
    for got, d, u, s in zip(f[:2].tolist(), down, up, scale.tolist(), strict=False):
        close(got, spectrum_reference((s * u.double() @ d.double()).numpy()), rtol=1e-6)
    assert (f[2] == 0).all()


# 3. Property


@quick
@given(SIZES, SIZES, SEEDS)
def test_bounds(rows, cols, seed):
    w = gaussian(rows, cols, seed=seed)
    k, f = min(rows, cols), {**named("ensemble", w), **named("stats", w)}
    slack = 1 + 1e-6
    assert 1 / slack <= f["spectral.effective_rank"] <= k * slack
    assert f["spectral.condition_number"] >= 1 / slack
    assert 1 / slack <= f["matrix_norms.nuclear_to_frobenius"] <= math.sqrt(k) * slack
    assert 1 / math.sqrt(k) / slack <= f["matrix_norms.spectral_to_frobenius"] <= slack
    assert 0 < f["frequency.energy_share_of_10"] <= slack
    assert 0 <= f["info_theoretic.entropy"] <= math.log(min(50, rows * cols)) * slack
    assert 0 <= f["info_theoretic.normalised_entropy"] <= slack
    assert f["min"] <= f["distribution.quantile_05"] <= f["median"] <= f["distribution.quantile_95"] <= f["max"]
    if rows * cols > 1:  # Pearson's inequality
        assert f["kurtosis"] >= f["skewness"] ** 2 + 1 - 1e-4


# How a feature answers to w -> c·w with c > 0: scaled by c, or not at all.
UNSCALED = (
    "share",
    "effective_rank",
    "condition_number",
    "skewness",
    "kurtosis",
    "_to_",
    "entropy",
)


@quick
@given(SIZES, SIZES, SEEDS, st.sampled_from([2.0**-40, 0.25, 8.0, 2.0**30]))
def test_scaling_law_of_every_matrix_feature(rows, cols, seed, c):
    w = gaussian(rows, cols, seed=seed)  # c is a power of two: rounding and histogram bins stay as they are
    for name in ("stats", "ensemble"):
        before, after = named(name, w), named(name, c * w)
        for feature, value in before.items():
            factor = 1 if any(part in feature for part in UNSCALED) else c
            assert after[feature] == pytest.approx(value * factor, rel=1e-5, abs=1e-7 * factor), feature


@quick
@given(SIZES, SIZES, SEEDS)
def test_rotations_leave_the_spectrum_and_are_noticed_by_the_rest(rows, cols, seed):
    w = gaussian(rows, cols, seed=seed, dtype=torch.float64)
    turned = orthogonal(rows, seed) @ w @ orthogonal(cols, seed + 1)
    before, after = named("spectral", w), named("spectral", turned)
    assert after == pytest.approx(before, rel=1e-5, abs=1e-6)
    if rows * cols > 3:
        for name in ("stats", "distribution", "frequency"):
            assert named(name, turned) != pytest.approx(named(name, w), rel=1e-5, abs=1e-6)


@quick
@given(SIZES, SIZES, SEEDS)
def test_order_of_the_entries_matters_to_the_spectrum_only(rows, cols, seed):
    w = gaussian(rows, cols, seed=seed)
    order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(seed))
    shuffled = w.flatten()[order].reshape(rows, cols)
    for name in ("stats", "distribution", "info_theoretic"):
        assert named(name, shuffled) == named(name, w)
    shifted = w.roll((1, 2), (0, 1))
    assert named("frequency", shifted) == pytest.approx(named("frequency", w), rel=1e-5, abs=1e-6)
    if min(rows, cols) > 2:
        assert named("spectral", shifted) == pytest.approx(named("spectral", w), rel=1e-5, abs=1e-6)


def test_the_spectrum_notices_the_order_of_the_entries():
    w = torch.diag(torch.tensor([1.0, 1.0, 1.0]))
    assert named("spectral", w) != pytest.approx(named("spectral", w.flatten().sort().values.reshape(3, 3)))


@quick
@given(st.integers(2, 6), SIZES, SIZES, SEEDS)
def test_gauge(r, n_in, n_out, seed):
    down, up = gaussian(1, r, n_in, seed=seed).double(), gaussian(1, n_out, r, seed=seed + 1).double()
    gauge = orthogonal(r, seed + 2) @ torch.diag(torch.linspace(0.5, 3, r).double()) @ orthogonal(r, seed + 3)
    other_down, other_up = gauge @ down, up @ torch.linalg.inv(gauge)
    size = (up @ down).norm().item()
    sketch, same = update_sketch(down, up, "m"), update_sketch(other_down, other_up, "m")
    assert (sketch - same).abs().max() <= 1e-5 * size
    before, after = coupling(down, up)[0], coupling(other_down, other_up)[0]
    assert after[2] == pytest.approx(before[2].item(), rel=1e-5)
    close(update_measures(other_down, other_up), update_measures(down, up), rtol=1e-5)
    close(update_spectrum(other_down, other_up), update_spectrum(down, up), rtol=1e-5)
    # What does not claim the invariance notices the gauge: the cosine, and statistics of the factor.
    assert abs(after[1] - before[1]) > 1e-6
    assert named("stats", other_down[0]) != pytest.approx(named("stats", down[0]), rel=1e-5)


@quick
@given(st.integers(1, 12), SIZES, SIZES, SEEDS, st.sampled_from([-(2.0**-40), 0.25, -8.0, 2.0**30]))
def test_bounds_and_scaling_law_of_update_spectrum(r, n_in, n_out, seed, c):
    down, up = gaussian(r, n_in, seed=seed), gaussian(n_out, r, seed=seed + 1)
    before, after = spectrum(down, up), spectrum(down, up, torch.tensor([c]))
    k, slack = min(r, n_in, n_out), 1 + 1e-6
    stable, participation, effective = (before[f] for f in ("stable_rank", "participation_ratio", "effective_rank"))
    assert 1 / slack <= stable <= participation * slack <= effective * slack**2 <= k * slack**3
    for side, n in (("row", n_out), ("column", n_in)):
        assert 1 / slack <= before[f"{side}_norms_max_to_mean"] <= n * slack
        assert 0 <= before[f"{side}_norms_gini"] <= 1 - 1 / n + 1e-6
    for feature, value in before.items():
        scaled = feature.endswith("_norm") or feature in [f"sigma_{i}" for i in range(1, 11)]
        assert after[feature] == pytest.approx(value * (abs(c) if scaled else 1), rel=1e-6, abs=0), feature


@quick
@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), SEEDS)
def test_rotations_leave_the_spectrum_of_an_update_and_order_leaves_its_concentration(r, n_in, n_out, seed):
    down, up = gaussian(r, n_in, seed=seed).double(), gaussian(n_out, r, seed=seed + 1).double()
    before = spectrum(down, up)
    rotated = spectrum(down @ orthogonal(n_in, seed + 2), orthogonal(n_out, seed + 3) @ up)
    spread = [name for name in before if "_norms_" in name]
    assert {n: v for n, v in rotated.items() if n not in spread} == pytest.approx(
        {n: v for n, v in before.items() if n not in spread}, rel=1e-5, abs=1e-6
    )
    assert all(rotated[name] != pytest.approx(before[name], rel=1e-6) for name in spread)
    assert spectrum(down.flip(1), up.roll(1, 0)) == pytest.approx(before, rel=1e-5, abs=1e-6)


@quick
@given(SEEDS, st.floats(-100, 100))
def test_update_sketch_is_linear_and_coupling_scales_its_norm(seed, s):
    down, up, scale = gaussian(2, 3, 11, seed=seed), gaussian(2, 5, 3, seed=seed + 1), torch.full((2,), s)
    close(update_sketch(down, up, "m", scale), scale[0] * update_sketch(down, up, "m"), rtol=1e-4, atol=1e-4)
    plain, scaled = coupling(down, up), coupling(down, up, scale)
    close(scaled[:, 2], abs(scale[0]) * plain[:, 2], rtol=1e-5)
    assert torch.equal(scaled[:, [0, 1, 3]], plain[:, [0, 1, 3]])
    rank, norm, of = update_measures(down, up, scale).T
    assert torch.equal(norm, scaled[:, 2]) or norm.tolist() == pytest.approx(scaled[:, 2].tolist(), rel=1e-6)
    assert torch.equal(of, scale) and rank.tolist() == pytest.approx(
        (update_measures(down, up)[:, 0] * (scale != 0)).tolist(), rel=1e-5
    )


def test_update_sketch_keeps_norms_on_average_and_knows_its_module():
    down, up = gaussian(1, 2, 20), gaussian(1, 30, 2, seed=1)
    sketches = torch.cat([update_sketch(down, up, f"module.{i}") for i in range(100)])
    assert len(sketches.unique(dim=0)) == 100
    # The mean of 100 squared norms, each with a standard deviation of about 0.5: six of its own are allowed.
    share = sketches.square().sum(1).mean() / (up[0] @ down[0]).square().sum()
    assert share == pytest.approx(1, abs=0.3)


def test_pairs_of_several_modules_at_once_are_those_of_one_at_a_time():
    down, up, scale = gaussian(6, 2, 20), gaussian(6, 30, 2, seed=1), torch.arange(6.0)
    modules = ["b", "a", "b", "c", "a", "a"]
    expected = torch.cat(
        [update_sketch(down[i : i + 1], up[i : i + 1], modules[i], scale[i : i + 1]) for i in range(6)]
    )
    close(update_sketch(down, up, modules, scale), expected)
    features = pair_features(down, up, modules, scale, ["update_sketch", "coupling"], block=250)  # two pairs to a block
    close(features["update_sketch"], expected)
    close(features["coupling"], coupling(down, up, scale))


def test_update_sketch_ignores_every_seed_flag():
    down, up = gaussian(2, 3, 4), gaussian(2, 5, 3, seed=1)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    before = update_sketch(down, up, "m")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(update_sketch(down, up, "m"), before)


@quick
@given(SIZES, SEEDS)
def test_effective_rank_of_equal_values_is_their_number(k, seed):
    s = torch.cat([torch.full((k,), 0.3), torch.zeros(2)])[None].double()
    assert effective_rank(s).item() == pytest.approx(k)
    assert effective_rank(gaussian(1, k, seed=seed).abs() + 1e-3).item() <= k * (1 + 1e-6)


# 4. Contract, over the whole table


def pairs(n=6, r=4, n_in=24, n_out=17, dtype=torch.float32):
    return gaussian(n, r, n_in, dtype=dtype), gaussian(n, n_out, r, seed=1, dtype=dtype), torch.linspace(0.5, 2, n)


def compute(name, n=6, dtype=torch.float32, rows=slice(None)):
    """Features of the rows chosen out of a fixed batch of n, matrix-wise or pair-wise."""
    if name in MATRIX:
        return REPRESENTATIONS[name].function(gaussian(n, 5, 30, dtype=dtype)[rows])
    down, up, scale = (x[rows] for x in pairs(n, dtype=dtype))
    return pair_features(down, up, "m", scale, [name])[name]


MADE = {*COMPUTED, "flat", "pca", "autoencoder", "kernel", "trained"}


def test_the_table():
    first = ["flat_vec", "stats", "pca", "spectral", "matrix_norms", "distribution", "coupling", "frequency"]
    last = ["info_theoretic", "ensemble", "vae", "contrastive", "denoising", "update_sketch", "update_kernel"]
    assert list(REPRESENTATIONS)[:17] == first + last + ["update_spectrum", "update_views"]
    for name, row in REPRESENTATIONS.items():
        assert row.name == name and row.source
        assert row.unit in {"layer", "pair"} and row.made in MADE
        assert (row.function is not None) == (row.made in COMPUTED)
        assert bool(row.feature_names) == (row.made in {*COMPUTED, "trained"})
        assert len(row.feature_names) == len(set(row.feature_names))
        assert len(row.feature_names) == WIDTHS.get(name, 0) or name not in first + last
        assert row.unit == "pair" or row.function is None or row.function.__name__ == name


def test_measures_are_no_representations():
    assert list(MEASURES) == ["updates"] and not MEASURES.keys() & REPRESENTATIONS.keys()
    row = MEASURES["updates"]
    assert (row.name, row.unit, row.made) == ("updates", "pair", "computed")
    assert row.feature_names == ("effective_rank", "norm", "scale")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MATRIX + PAIR)
def test_width_dtype_and_finite(name, dtype):
    f = compute(name, dtype=dtype)
    assert f.shape == (6, len(TABLE[name].feature_names))
    assert f.dtype == torch.float32
    assert f.isfinite().all()


@pytest.mark.parametrize("name", MATRIX + PAIR)
def test_a_batch_is_its_samples_one_at_a_time_in_any_order(name):
    batch = compute(name)
    alone = torch.cat([compute(name, rows=slice(i, i + 1)) for i in range(6)])
    close(batch, alone, rtol=1e-6, atol=1e-7)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(compute(name, rows=order), batch[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MATRIX)
def test_input_is_untouched_and_may_be_a_view_or_need_gradients(name):
    w = gaussian(4, 6, 10)
    kept, f = w.clone(), REPRESENTATIONS[name].function
    expected = f(w)
    assert torch.equal(w, kept)
    close(f(w.mT.contiguous().mT), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(f(w.requires_grad_()), expected)
    assert not f(w).requires_grad


@pytest.mark.parametrize("name", PAIR)
def test_factors_are_untouched(name):
    given_ = pairs()
    kept = [x.clone() for x in given_]
    pair_features(*given_[:2], "m", given_[2], [name])
    assert all(torch.equal(x, y) for x, y in zip(given_, kept, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("name", MATRIX)
def test_nan_and_inf_are_refused_with_their_number(name, bad):
    w = gaussian(3, 4, 5, dtype=torch.float64)
    w[1, 2, 3] = w[2, 0, 0] = bad
    with pytest.raises(ValueError, match="2 of 60 values are NaN, Inf or beyond float32"):
        REPRESENTATIONS[name].function(w)


@pytest.mark.parametrize("which", ["down", "up", "scale"])
@pytest.mark.parametrize("name", PAIR)
def test_nan_in_a_pair_is_refused(name, which):
    down, up, scale = pairs()
    {"down": down, "up": up, "scale": scale}[which].view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=f"{which}: 1 of"):
        pair_features(down, up, "m", scale, [name])


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.ones(4, 5), r"w must be float\[N, rows, cols\], got shape \[4, 5\]; reshape"),
        (torch.ones(2, 4, 5, dtype=torch.int64), "convert it with .float()"),
        (torch.ones(0, 4, 5), "skip empty batches"),
        (torch.ones(3, 0, 5), "skip empty batches"),
    ],
)
@pytest.mark.parametrize("name", MATRIX)
def test_wrong_input_is_refused_in_words(name, w, message):
    with pytest.raises(ValueError, match=message):
        REPRESENTATIONS[name].function(w)
    with pytest.raises(ValueError, match=message):
        matrix_features(w, [name])


@pytest.mark.parametrize("name", PAIR)
def test_pairs_that_do_not_fit_are_refused_in_words(name):
    down, up, scale = pairs()
    for wrong in [(up, down, scale), (down, up.mT, scale), (down[:2], up, scale), (down, up, scale[:5])]:
        with pytest.raises(ValueError, match="neither swapped nor transposed"):
            pair_features(*wrong[:2], "m", wrong[2], [name])
    with pytest.raises(ValueError, match=r"down must be float\[N, r, in\]"):
        pair_features(down[0], up, "m", scale, [name])


def test_names_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"coupling.+choose from stats, spectral"):
        matrix_features(gaussian(2, 3, 4), ["stats", "coupling"])
    with pytest.raises(ValueError, match="choose from coupling, update_sketch"):
        pair_features(*pairs()[:2], "m", None, ["stats"])


def test_several_at_once_are_each_alone_whatever_the_blocks():
    w = gaussian(7, 5, 30)
    down, up, scale = pairs()
    alone = {name: REPRESENTATIONS[name].function(w) for name in MATRIX}
    alone_pair = {"update_sketch": update_sketch(down, up, "m", scale), "coupling": coupling(down, up, scale)}
    for block in (1, 400, 2**20):
        together = matrix_features(w, iter(reversed(MATRIX)), block)
        assert list(together) == MATRIX[::-1]
        for name in MATRIX:
            close(together[name], alone[name], rtol=1e-6, atol=1e-7)
        for name, f in pair_features(down, up, "m", scale, iter(alone_pair), block).items():
            close(f, alone_pair[name], rtol=1e-6, atol=1e-7)
    assert matrix_features(w, []) == {}


def test_one_sort_one_svd_one_fft_for_all(monkeypatch):
    calls = []

    def counted(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or original(*a, **k))

    counted(representations, "sorted_rows")
    counted(torch.linalg, "svdvals")
    counted(torch.fft, "rfft2")
    matrix_features(gaussian(3, 4, 9), MATRIX)
    assert sorted(calls) == ["rfft2", "sorted_rows", "svdvals"]


def test_a_wrapped_batch_stands_for_the_batch():
    w = gaussian(3, 4, 9)
    m = shared(w)
    assert shared(m) is m and isinstance(m, Shared)
    for name in MATRIX:
        assert torch.equal(REPRESENTATIONS[name].function(m), REPRESENTATIONS[name].function(w))


def test_scale_none_is_one():
    down, up, _ = pairs()
    for name in PAIR:
        with_ones, without = (pair_features(down, up, "m", s, [name])[name] for s in (torch.ones(6), None))
        assert torch.equal(with_ones, without)


# 5. Degenerate

DEGENERATE_SHAPES = [(1, 1), (1, 2), (2, 1), (3, 3), (4, 30), (30, 4), (1, 7)]


@pytest.mark.parametrize("shape", DEGENERATE_SHAPES)
def test_a_zero_matrix_is_zero_everywhere(shape):
    for features in matrix_features(torch.zeros(2, *shape), MATRIX).values():
        assert (features == 0).all()


@pytest.mark.parametrize("value", [0.1, -3.0, 1e-30, 1e30])
@pytest.mark.parametrize("shape", DEGENERATE_SHAPES)
def test_a_constant(shape, value):
    w = torch.full(shape, value, dtype=torch.float64)
    size, n = abs(value), w.numel()
    s, d, e = named("stats", w), named("distribution", w), named("ensemble", w)
    assert (s["std"], s["skewness"], s["kurtosis"]) == (0, 0, 0)  # exactly, though a mean of 0.1s is not 0.1
    assert s["mean"] == s["median"] == s["min"] == s["max"] == pytest.approx(value)
    for feature in ("interquartile_range", "mean_absolute_deviation", "std_to_mean", "skewness", "kurtosis"):
        assert d[feature] == 0
    assert e["info_theoretic.entropy"] == e["info_theoretic.normalised_entropy"] == 0
    # Rank one, a single Fourier coefficient.
    assert e["spectral.sigma_1"] == pytest.approx(size * math.sqrt(n))
    assert e["frequency.magnitude_1"] == pytest.approx(size * n)
    assert [e[f"frequency.magnitude_{i}"] for i in range(2, 11)] == [0] * 9
    assert e["frequency.energy_share_of_10"] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (8, 9), (9, 8)])
def test_rank_one(shape):
    w = gaussian(shape[0], 1).double() @ gaussian(1, shape[1], seed=1).double()
    f = named("ensemble", w)
    assert f["spectral.sigma_1"] == pytest.approx(w.norm().item())
    assert [f[f"spectral.sigma_{i}"] for i in range(2, 11)] == [0] * 9  # not 1e-17
    assert [f[f"spectral.gap_{i}"] for i in range(2, 10)] == [0] * 8
    for feature in ("effective_rank", "condition_number", "sigma_share_1"):
        assert f[f"spectral.{feature}"] == pytest.approx(1)
    assert f["matrix_norms.nuclear_to_frobenius"] == pytest.approx(1)
    assert f["matrix_norms.spectral_to_frobenius"] == pytest.approx(1)


def test_fewer_than_ten_values():
    f = named("frequency", torch.tensor([[1.0, 3.0]]))  # coefficients 4 and -2
    assert [f[f"magnitude_{i}"] for i in range(1, 11)] == pytest.approx([4, 2] + [0] * 8)
    assert (f["mean"], f["std"], f["energy_share_of_10"]) == pytest.approx((3, 1, 1))


def test_a_single_value():
    s, e = named("stats", torch.tensor([[-2.0]])), named("ensemble", torch.tensor([[-2.0]]))
    assert (s["mean"], s["std"], s["median"], s["kurtosis"]) == (-2, 0, -2, 0)
    assert (e["spectral.sigma_1"], e["spectral.condition_number"], e["matrix_norms.l1"]) == (2, 1, 2)
    assert (e["frequency.max"], e["frequency.std"]) == (2, 0)


@pytest.mark.parametrize("values", [[1.0, -1.0], [0.1, 0.2, -0.3], [0.7, -0.1, -0.6]])
def test_std_to_mean_is_0_at_mean_0_even_where_rounding_leaves_a_trace(values):
    assert named("distribution", torch.tensor([values], dtype=torch.float64))["std_to_mean"] == 0


def test_a_large_offset_does_not_cost_the_moments():
    x = torch.cat([gaussian(500), torch.zeros(12)]).double()
    near, far = named("stats", x[None]), named("stats", (x + 1e6)[None])
    for feature in ("std", "skewness", "kurtosis"):
        assert far[feature] == pytest.approx(near[feature], rel=1e-5)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 3e38])
def test_the_ends_of_float32_stay_finite(size):
    w = (gaussian(2, 4, 6).clamp(-1, 1).double() * size).float()
    for features in matrix_features(w, MATRIX).values():
        assert features.isfinite().all()
    for features in pair_features(w, w.mT, "m", None, PAIR).values():
        assert features.isfinite().all()


@pytest.mark.parametrize("r", [1, 3])
def test_a_fresh_lora_has_a_zero_update(r):
    down, up = gaussian(2, r, 8), torch.zeros(2, 5, r)
    assert (coupling(down, up) == 0).all()
    assert (update_sketch(down, up, "m") == 0).all()
    assert update_measures(down, up).tolist() == [[0, 0, 1]] * 2
    assert (update_spectrum(down, up) == 0).all()


def test_factors_that_cancel_give_a_zero_update_not_the_spectrum_of_rounding():
    # Every entry is 0.1·c + 0.2·c - 0.3·c, which float64 rounds to about 1e-17.
    down = torch.tensor([0.1, 0.7], dtype=torch.float64).expand(1, 3, 2)
    up = torch.tensor([[0.1, 0.2, -0.3]], dtype=torch.float64)[None]
    assert (up @ down).any()
    assert update_measures(down, up)[0].tolist() == [0, 0, 1]
    assert (update_spectrum(down, up) == 0).all()


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (1, 6), (6, 1), (7, 5)])
def test_update_spectrum_of_rank_one(n_in, n_out):
    f = spectrum(gaussian(1, n_in, seed=3), gaussian(n_out, 1, seed=4))
    for feature in ("sigma_share_1", "effective_rank", "stable_rank", "participation_ratio", "condition_number"):
        assert f[feature] == pytest.approx(1)
    assert f["sigma_1"] == pytest.approx(f["nuclear_norm"]) == pytest.approx(f["frobenius_norm"])
    assert all(f[f"sigma_{i}"] == 0 for i in range(2, 11))
    for side, n in (("row", n_out), ("column", n_in)):
        assert n > 1 or (f[f"{side}_norms_max_to_mean"], f[f"{side}_norms_gini"]) == (1, 0)


@pytest.mark.parametrize("value", [0.1, -3.0, 1e-18, 1e18])
def test_update_spectrum_of_equal_rows_and_columns_is_not_that_of_rounding(value):
    f = spectrum(torch.full((3, 7), value), torch.full((11, 3), value))
    assert [f[f"sigma_{i}"] for i in range(1, 4)] == pytest.approx([3 * value**2 * math.sqrt(77), 0, 0])
    assert (f["row_norms_gini"], f["column_norms_gini"], f["stable_rank"]) == (0, 0, 1)
    assert f["row_norms_max_to_mean"] == f["column_norms_max_to_mean"] == pytest.approx(1)


def test_correlations_of_constants_and_of_single_values_are_0():
    ones, single = torch.ones(1, 2, 4), torch.full((1, 1, 1), 3.0)
    correlation, cosine, _, spectra = coupling(ones, gaussian(1, 4, 2))[0].tolist()
    assert correlation == 0 and cosine != 0 and abs(spectra) == pytest.approx(1)
    assert coupling(single, -single)[0].tolist() == [0, -1, 9, 0]
    # Equal singular values, up to rounding: orthogonal rows.
    equal = orthogonal(6, 0)[None, :3]
    assert coupling(equal, gaussian(1, 7, 3).double())[0, 3] == 0
