"""Descriptions of weight matrices: pure functions from matrices to features, and the one table of them.

Matrix-wise functions take ``float[N, rows, cols]`` and return ``float32[N, F]``; pair-wise functions take the two
factors of an update ΔW = s·up·down. ``REPRESENTATIONS`` lists them all with their feature names: a new one is a
function and a row there. ``MEASURES`` are computed like pair-wise ones, but for the analysis: no classifier reads them.

Shape letters: ``N`` samples, ``F`` features, ``r`` rank, ``n = rows * cols`` values of one matrix,
``k = min(rows, cols)`` singular values.

Numbers: any float dtype comes in, all is computed in float64 on the input's device, float32 leaves. Moments are
population moments, kurtosis is Pearson's (normal: 3), quantiles interpolate linearly. Undefined values are 0 (a ratio
at norm 0, a correlation or a skewness of a constant, everything spectral of a zero matrix); so are missing entries
(the tenth of four singular values). Every function refuses, with a ValueError that states the mend, input of the wrong
shape or dtype, empty input, and NaN, Inf or values beyond float32's range.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from training.exact import triangle
from training.numerics import (
    ROUNDING,
    condition_number,
    cosine,
    entropy_of,
    gini,
    pearson,
    ratio,
    singular_values,
    sorted_rows,
    without_rounding,
)

TOP = 10  # leading singular values and Fourier magnitudes that become features
BINS = 50  # histogram bins of the entropy
SKETCH = 8  # rows and columns of an update's sketch
QUANTILES = (0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95)
BLOCK = 2**18  # values worked on at a time: 2 MiB in float64 stay in a CPU's cache


class Shared:
    """A batch of matrices, and the parts that several features share: one sort, SVD and FFT, each when first asked.

    Args:
        w: Weight matrices, float[N, rows, cols]. Left untouched.
    """

    def __init__(self, w: Tensor):
        _check("w", w, "[N, rows, cols]")
        self.weights = w.detach()
        self.features: dict[str, Tensor] = {}

    def feature(self, name: str) -> Tensor:
        """Return the matrix-wise representation of this name, computed once, float32[N, F]."""
        if name not in self.features:
            self.features[name] = REPRESENTATIONS[name].function(self)
        return self.features[name]

    @cached_property
    def matrix(self) -> Tensor:
        """The weights, float64[N, rows, cols]."""
        return self.weights.double()

    @cached_property
    def sorted(self) -> Tensor:
        """Values of each matrix, ascending, float64[N, n]; sorted before they are widened, which is cheaper."""
        return sorted_rows(self.weights.flatten(1)).double()

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the values, float64[N, 1]; of a constant exactly that, so that its centred values are 0."""
        low, high = self.sorted[:, :1], self.sorted[:, -1:]
        return torch.where(low == high, low, self.sorted.mean(1, keepdim=True))

    @cached_property
    def centred(self) -> Tensor:
        """Values less their mean, ascending, float64[N, n]."""
        return self.sorted - self.mean

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Standard deviation, skewness and kurtosis (all 0 for a constant), each float64[N, 1]."""
        square = self.centred.square()
        variance = square.mean(1, keepdim=True)
        third = (square * self.centred).mean(1, keepdim=True)
        fourth = square.square().mean(1, keepdim=True)
        return variance.sqrt(), ratio(third, variance**1.5), ratio(fourth, variance.square())

    @cached_property
    def quantiles(self) -> Tensor:
        """The seven ``QUANTILES``, float64[N, 7]."""
        at = torch.tensor(QUANTILES, dtype=torch.float64, device=self.sorted.device) * (self.sorted.shape[1] - 1)
        return torch.lerp(self.sorted[:, at.floor().long()], self.sorted[:, at.ceil().long()], at.frac())

    @cached_property
    def singular_values(self) -> Tensor:
        """All singular values, descending, float64[N, k]."""
        return singular_values(self.matrix)

    @cached_property
    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """Magnitudes of the coefficients of the 2-D FFT, in no particular order: float64[N, a] and float64[N, b].

        A real matrix's coefficients come in conjugate pairs of equal magnitude: half of them are computed. The
        first are those that occur once, the second those that occur twice, so that n = a + 2b.
        """
        rows, cols = self.matrix.shape[1:]
        # The long side is halved; the FFT of the transpose is the same, transposed.
        wide = self.matrix if rows <= cols else self.matrix.mT
        half = torch.fft.rfft2(wide)  # (N, short, long // 2 + 1)
        size = (half.real.square() + half.imag.square()).sqrt()  # thrice as fast as abs; no float32 overflows squared
        # Column 0 is its own partner, and so is the last where the long side is even.
        paired = (max(rows, cols) + 1) // 2
        once = torch.cat([size[:, :, :1], size[:, :, paired:]], dim=2)
        return once.flatten(1), size[:, :, 1:paired].flatten(1)


def shared(w: Tensor | Shared) -> Shared:
    """Wrap a batch for sharing; return an already wrapped batch as it is."""
    return w if isinstance(w, Shared) else Shared(w)


def effective_rank(s: Tensor) -> Tensor:
    """Return the exponentiated entropy of the normalised spectrum (Roy & Vetterli, 2007).

    ``exp(-sum_i p_i log p_i)`` with ``p_i = s_i / sum_j s_j`` and ``0 log 0 = 0``. 1 for a rank-one matrix, k for k
    equal singular values, unchanged when the matrix is rescaled. A zero matrix has effective rank 0 by convention.

    Args:
        s: Nonnegative singular values, any order, float[N, k].

    Returns:
        Effective rank, dimensionless, in {0} or [1, k], float[N].

    Example:
        >>> effective_rank(torch.tensor([[3.0, 0.0], [2.0, 2.0], [0.0, 0.0]]))
        tensor([1., 2., 0.])
    """
    total = s.sum(1, keepdim=True)
    return torch.where(total[:, 0] > 0, entropy_of(ratio(s, total)).exp(), 0)


def stats(w: Tensor | Shared) -> Tensor:
    """Compute seven statistics of the values (networks described by such: Unterthiner et al., 2020).

    Mean, std, median, min, max, skewness ``m3 / m2^1.5``, kurtosis ``m4 / m2^2``. Blind to the order of the
    entries. Skewness and kurtosis of a constant are 0 by convention.

    Shapes: w float[N, rows, cols] or its `Shared`; features in the table's order, float32[N, 7].
    """
    batch = shared(w)
    std, skewness, kurtosis = batch.moments
    median = batch.quantiles[:, QUANTILES.index(0.50), None]
    return _leave(batch.mean, std, median, batch.sorted[:, :1], batch.sorted[:, -1:], skewness, kurtosis)


def spectral(w: Tensor | Shared) -> Tensor:
    """Compute leading singular values and the shape of the spectrum (effective rank: Roy & Vetterli, 2007).

    σ1..σ10; each over the sum of *all*; effective rank; condition number σ1/σmin, σmin the smallest above σ1·max(rows,
    cols)·eps(float32); the gaps σ1-σ2..σ9-σ10; nuclear norm. Unchanged by rotations; shares, effective rank and
    condition number also by rescaling. σ is 0 beyond the rank, and a zero matrix has 0 everywhere.

    Shapes: w float[N, rows, cols] or its `Shared`; features in the table's order, float32[N, 32].
    """
    batch = shared(w)
    s = batch.singular_values
    leading, nuclear = _leading(s), s.sum(1, keepdim=True)
    gaps = leading[:, :-1] - leading[:, 1:]
    rank, condition = effective_rank(s)[:, None], condition_number(s, max(batch.weights.shape[1:]))
    return _leave(leading, ratio(leading, nuclear), rank, condition, gaps, nuclear)


def matrix_norms(w: Tensor | Shared) -> Tensor:
    """Compute five matrix norms and two ratios of them (Golub & Van Loan, Matrix Computations, section 2.3).

    Frobenius, nuclear ``sum s``, spectral ``max s``, L1 (largest column sum of magnitudes), L∞ (largest row sum);
    nuclear/Frobenius in [1, sqrt(k)], spectral/Frobenius in [1/sqrt(k), 1]. Rescaling scales the norms and leaves the
    ratios. For a rank-one matrix both ratios are 1; for a zero matrix 0 by convention.

    Shapes: w float[N, rows, cols] or its `Shared`; features in the table's order, float32[N, 7].
    """
    batch = shared(w)
    frobenius = torch.linalg.vector_norm(batch.matrix, dim=(1, 2))[:, None]
    nuclear, largest = batch.singular_values.sum(1, keepdim=True), batch.singular_values[:, :1]
    magnitudes = batch.matrix.abs()
    columns, rows = (magnitudes.sum(dim).amax(1, keepdim=True) for dim in (1, 2))
    ratios = ratio(nuclear, frobenius), ratio(largest, frobenius)
    return _leave(frobenius, nuclear, largest, columns, rows, *ratios)


def distribution(w: Tensor | Shared) -> Tensor:
    """Measure the spread of the values (quantiles as in Unterthiner et al., 2020).

    Quantiles 5, 10, 25, 50, 75, 90, 95 %; interquartile range; mean absolute deviation about the mean; std/abs(mean);
    skewness; kurtosis. Blind to the order of the entries. Skewness and kurtosis of a constant are 0 by convention, and
    so is std/abs(mean) where the mean is 0 up to float64 rounding.

    Shapes: w float[N, rows, cols] or its `Shared`; features in the table's order, float32[N, 12].
    """
    batch = shared(w)
    std, skewness, kurtosis = batch.moments
    interquartile = batch.quantiles[:, QUANTILES.index(0.75), None] - batch.quantiles[:, QUANTILES.index(0.25), None]
    deviation = batch.centred.abs().mean(1, keepdim=True)
    # A mean of 0 comes out as about 1e-17 of the values: std over that would be noise.
    mean = torch.where(batch.mean.abs() > ROUNDING * std, batch.mean.abs(), 0)
    return _leave(batch.quantiles, interquartile, deviation, ratio(std, mean), skewness, kurtosis)


def frequency(w: Tensor | Shared) -> Tensor:
    """Compute magnitudes of the 2-D Fourier transform (fine-tuning in that domain: Gao et al., 2024).

    Of the magnitudes of all rows·cols coefficients: the ten largest, mean, std, max, and the ten largest's share of
    the energy ``sum |c|^2``. Unchanged by circular shifts of rows or columns. A constant has a single magnitude, that
    of its sum, and share 1; a zero matrix has share 0 by convention.

    Shapes: w float[N, rows, cols] or its `Shared`; features in the table's order, float32[N, 14].
    """
    once, twice = shared(w).magnitudes
    n = once.shape[1] + 2 * twice.shape[1]

    def average(single: Tensor, paired: Tensor) -> Tensor:
        return (single.sum(1, keepdim=True) + 2 * paired.sum(1, keepdim=True)) / n

    pairs = twice.topk(min(TOP // 2, twice.shape[1]), dim=1).values
    candidates = torch.cat([once, pairs, pairs], dim=1)
    largest = without_rounding(candidates.topk(min(TOP, n), dim=1).values)  # (N, at most 10), descending
    mean = average(once, twice)
    std = average((once - mean).square(), (twice - mean).square()).sqrt()
    share = ratio(largest.square().sum(1, keepdim=True), n * average(once.square(), twice.square()))
    return _leave(_leading(largest), mean, std, largest[:, :1], share)


def info_theoretic(w: Tensor | Shared) -> Tensor:
    """Compute the entropy of the histogram of the values (Shannon, 1948).

    ``-sum_i p_i log p_i`` in nats over 50 equal bins from min to max, the last one closed; and the same over log 50.
    log 50 and 1 for evenly filled bins; unchanged by rescaling. A constant has 0 by convention.

    Shapes: w float[N, rows, cols] or its `Shared`; features in the table's order, float32[N, 2].
    """
    values = shared(w).sorted
    low, high = values[:, :1], values[:, -1:]
    # The edges of numpy.histogram, operation for operation, so that its counts come out, exactly.
    edges = torch.arange(BINS, dtype=torch.float64, device=values.device) * ((high - low) / BINS) + low  # (N, 50)
    below = torch.searchsorted(values, edges)  # number of values below each bin, (N, 50)
    counts = below.diff(dim=1, append=torch.full_like(below[:, :1], values.shape[1]))
    entropy = entropy_of(counts.double() / values.shape[1])[:, None]  # a constant fills the last bin: 0
    return _leave(entropy, entropy / math.log(BINS))


def ensemble(w: Tensor | Shared) -> Tensor:
    """Join spectral, matrix_norms, distribution, frequency and info_theoretic, side by side in this order.

    Shapes: w float[N, rows, cols] or its `Shared`; features in the table's order, float32[N, 67].
    """
    batch = shared(w)
    return torch.cat([batch.feature(name) for name in ENSEMBLE], dim=1)


def coupling(down: Tensor, up: Tensor, scale: Tensor | None = None) -> Tensor:
    """Measure the relation of the two factors of an update (LoRA: Hu et al., 2022).

    Of down and upᵀ, the narrower padded with zero columns: Pearson correlation and cosine of the entries; Frobenius
    norm of the update s·up·down, which is never formed; Pearson correlation of the r singular values. Only the norm is
    unchanged when (up, down) becomes (up·G⁻¹, G·down). Correlations of constants and of single values, and the cosine
    of a zero factor, are 0 by convention.

    Args:
        down: First factors, float[N, r, in].
        up: Second factors, float[N, out, r].
        scale: s = alpha / rank of each update, float[N]; None: 1.

    Returns:
        Features in the table's order, float32[N, 4].
    """
    down, up, scale = (x.double() for x in _pair(down, up, scale))
    rank, width = down.shape[1], max(down.shape[2], up.shape[1])
    a, b = (pad(x, (0, width - x.shape[2])).flatten(1) for x in (down, up.mT))  # (N, r * width)
    down_r, up_r = _triangles(down, up)
    norm = scale.abs() * torch.linalg.vector_norm(up_r @ down_r.mT, dim=(1, 2))
    # A factor narrower than r has fewer than r singular values; the missing ones are 0.
    s, t = (pad(singular_values(x), (0, rank - min(x.shape[1:]))) for x in (down_r, up_r))
    return _leave(pearson(a, b), cosine(a, b), norm[:, None], pearson(s, t))


def update_sketch(down: Tensor, up: Tensor, module_id: str | Sequence[str], scale: Tensor | None = None) -> Tensor:
    """Project the update at random, but always alike, whatever its factors (invariance: Putterman et al., 2024).

    ``PᵀΔWQ = s·(Pᵀup)(down·Q)``, P [out, 8] and Q [in, 8] Gaussian of variance 1/8, decided by the module's name
    alone: a module is seen from the same side in every adapter. Linear in ΔW; the expected square of its norm is ΔW's.
    Unchanged when (up, down) becomes (up·G⁻¹, G·down).

    Shapes: arguments as of `coupling`, and the canonical name of the module that all N updates are of, or N names; the
    8 x 8 sketch, row by row, float32[N, 64].
    """
    return _sketched(down, up, module_id, scale, lambda module: projection(module, "Q", down.shape[2]))


def update_response(
    down: Tensor, up: Tensor, module_id: str | Sequence[str], scale: Tensor | None, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Project what the update adds to the output for 8 inputs of its module (probes: ProbeX, Horwitz et al., 2025).

    ``PᵀΔWaᵀ = s·(Pᵀup)(down·aᵀ)``, a [8, in] inputs as recorded from the base model, P [out, 8] that of
    `update_sketch`, of variance 1/8: a number is in the unit of the module's output. What the update does to other
    inputs is not seen. Linear in ΔW; a zero update gives zeros. Unchanged when (up, down) becomes (up·G⁻¹, G·down).

    Args:
        down: First factors, float[N, r, in].
        up: Second factors, float[N, out, r].
        module_id: Canonical name of the module that all N updates are of, or N names.
        scale: s = alpha / rank of each update, float[N]; None: 1.
        inputs: Of each module, float[8, in]; others are left alone. A module without is a ValueError.

    Returns:
        The 8 x 8 responses, those of a row of P side by side, float32[N, 64].
    """

    def read(module: str) -> Tensor:
        a = inputs.get(module)
        if a is None or a.shape != (SKETCH, down.shape[2]):
            shape = "none" if a is None else list(a.shape)
            raise ValueError(f"inputs of {module} must be float[8, {down.shape[2]}], got {shape}; record them again")
        _check(f"inputs of {module}", a, "[8, in]")
        return a.double().mT

    return _sketched(down, up, module_id, scale, read)


def _sketched(
    down: Tensor,
    up: Tensor,
    module_id: str | Sequence[str],
    scale: Tensor | None,
    right: Callable[[str], Tensor],
) -> Tensor:
    """Return ``s·(Pᵀup)(down·R)`` row by row, float32[N, 64]; ``right`` gives R float64[in, 8] of a module."""
    down, up, scale = (x.double() for x in _pair(down, up, scale))
    rows = defaultdict(list)
    for row, module in enumerate([module_id] * len(down) if isinstance(module_id, str) else module_id):
        rows[module].append(row)
    sketch = torch.empty(len(down), SKETCH, SKETCH, dtype=torch.float64, device=down.device)
    for module, module_rows in rows.items():  # one product for all updates of a module: no projection is copied
        index = torch.tensor(module_rows, device=down.device)
        p = projection(module, "P", up.shape[1]).to(up.device)  # (out, 8)
        q = right(module).to(down.device)  # (in, 8)
        sketch[index] = (up[index].mT @ p).mT @ (down[index] @ q)
    return _leave((scale[:, None, None] * sketch).flatten(1))


def update_spectrum(down: Tensor, up: Tensor, scale: Tensor | None = None) -> Tensor:
    """Compute the spectrum of the update and the concentration of its rows and columns.

    Of ``s·up·down``, which is never formed: σ1..σ10; each over the sum of *all*; effective rank; stable rank ``sum σ² /
    σ1²`` (Rudelson & Vershynin, 2007); participation ratio ``(sum σ²)² / sum σ⁴``; condition number, as in `spectral`;
    nuclear and Frobenius norm; of the norms of its rows, then of its columns, the largest over their mean, and the Gini
    coefficient (1912): 0 where all are equal, 1 - 1/n where one of n is not 0. Unchanged when (up, down) becomes
    (up·G⁻¹, G·down), by the sign of s, and, all but σ and norms of the update, by rescaling. A zero update has 0
    everywhere; values of at most 1e-12 of the product of the factors' norms are rounding, hence 0.

    Shapes: arguments as of `coupling`; features in the table's order, float32[N, 30].
    """
    down, up, scale = (x.double() for x in _pair(down, up, scale))
    s, cutoff, (down_r, up_r) = _update_values(down, up, scale)
    leading, nuclear, norm = _leading(s), s.sum(1, keepdim=True), torch.linalg.vector_norm(s, dim=1)[:, None]
    squares = ratio(s, s[:, :1]).square()  # of shares of the largest, as no fourth power of these overflows
    stable = squares.sum(1, keepdim=True)
    ranks = effective_rank(s)[:, None], stable, ratio(stable.square(), squares.square().sum(1, keepdim=True))
    spread = []
    # The other factor's orthonormal part leaves norms of rows, or of columns, as they are.
    for side in (torch.linalg.vector_norm(up @ down_r.mT, dim=2), torch.linalg.vector_norm(up_r @ down, dim=1)):
        side = torch.where((side > cutoff) & (nuclear > 0), side, 0)
        spread += [ratio(side.amax(1, keepdim=True), side.mean(1, keepdim=True)), gini(side)]
    condition = condition_number(s, max(up.shape[1], down.shape[2]))
    return _leave(leading, ratio(leading, nuclear), *ranks, condition, nuclear, norm, *spread)


def update_measures(down: Tensor, up: Tensor, scale: Tensor | None = None) -> Tensor:
    """Compute effective rank (Roy & Vetterli, 2007) and Frobenius norm of the update, and its scale.

    Of singular values as in `update_spectrum`: effective rank in {0} or [1, r]. Unchanged when (up, down) becomes
    (up·G⁻¹, G·down), and the effective rank when the update is rescaled. Both are 0 for a zero update.

    Shapes: arguments as of `coupling`; features in the table's order, float32[N, 3].
    """
    down, up, scale = (x.double() for x in _pair(down, up, scale))
    s = _update_values(down, up, scale)[0]
    norm = torch.linalg.vector_norm(s, dim=1)
    return _leave(effective_rank(s)[:, None], norm[:, None], scale[:, None])


def matrix_features(w: Tensor, names: Iterable[str], block: int = BLOCK) -> dict[str, Tensor]:
    """Compute several matrix-wise representations out of one sort, one SVD and one FFT per matrix.

    Args:
        w: Weight matrices, float[N, rows, cols].
        names: Names of computed rows whose unit is "layer"; another is a ValueError.
        block: Values to work on at a time on a CPU.

    Returns:
        Features by name, in the order asked for, each float32[N, F].
    """
    names = _checked_names(names, "layer")
    _check("w", w, "[N, rows, cols]")
    parts = []
    for matrices in w.split(samples_at_once(w, block=block)):
        batch = Shared(matrices)
        parts.append({name: batch.feature(name) for name in names})
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def pair_features(
    down: Tensor,
    up: Tensor,
    module_id: str | Sequence[str],
    scale: Tensor | None,
    names: Iterable[str],
    block: int = BLOCK,
    inputs: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute several pair-wise representations of updates of equal shape, whatever their modules.

    Args:
        down: First factors, float[N, r, in].
        up: Second factors, float[N, out, r].
        module_id: Canonical name of the module that all N updates are of, or N names.
        scale: s = alpha / rank of each update, float[N]; None: 1.
        names: Names of computed rows whose unit is "pair", of either table; another is a ValueError.
        block: Values to work on at a time on a CPU.
        inputs: Of each module, float[8, in], which "response" rows read.

    Returns:
        Features by name, in the order asked for, each float32[N, F].
    """
    functions = {name: FEATURES[name].function for name in _checked_names(names, "pair")}
    more = {name: (inputs or {},) if FEATURES[name].made == "response" else () for name in functions}
    pair = _pair(down, up, scale)
    length = samples_at_once(down, up, block=block)
    modules = [module_id] * len(down) if isinstance(module_id, str) else module_id
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    for start in range(0, len(down), length):
        rows = slice(start, start + length)
        down_block, up_block, scale_block = (x[rows] for x in pair)
        for name, function in functions.items():
            parts[name].append(function(down_block, up_block, modules[rows], scale_block, *more[name]))
    return {name: torch.cat(blocks) for name, blocks in parts.items()}


def _check(name: str, x: Tensor, shape: str) -> None:
    """Refuse all but finite floating tensors of such a shape, in words that state the mend."""
    if x.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} must be float{shape}, got shape {list(x.shape)}; reshape it")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")
    if x.numel() == 0:
        raise ValueError(f"{name} holds no values, shape {list(x.shape)}; skip empty batches")
    # NaN and Inf survive min and max: one pass, no copy. As float32, so that no power overflows float64.
    if not torch.stack(torch.aminmax(x)).float().isfinite().all():
        bad = x.numel() - int(x.float().isfinite().sum())
        raise ValueError(f"{name}: {bad} of {x.numel()} values are NaN, Inf or beyond float32; drop their samples")


def _checked_names(names: Iterable[str], unit: str) -> list[str]:
    """Return the names, if the tables have all of them as computed by this unit."""
    names, known = list(names), [name for name, row in FEATURES.items() if row.unit == unit and row.made in COMPUTED]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown} not computed by {unit}; choose from {', '.join(known)}")
    return names


def _pair(down: Tensor, up: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the checked factors and scales; scale 1 where none is given."""
    if scale is None:
        scale = torch.ones(len(down), dtype=torch.float64, device=down.device)
    _check("down", down, "[N, r, in]")
    _check("up", up, "[N, out, r]")
    _check("scale", scale, "[N]")
    if not len(down) == len(up) == len(scale) or down.shape[1] != up.shape[2]:
        shapes = f"{list(down.shape)}, {list(up.shape)} and {list(scale.shape)}"
        raise ValueError(
            f"N or r differ: down [N, r, in], up [N, out, r] and scale [N] are {shapes}; "
            "pass both factors as stored, neither swapped nor transposed"
        )
    return down.detach(), up.detach(), scale.detach()


def _leave(*columns: Tensor) -> Tensor:
    """Join columns side by side in float32; beyond its range, its largest number, so that all is finite."""
    largest = torch.finfo(torch.float32).max
    return torch.cat(columns, dim=1).clamp(-largest, largest).float()


def samples_at_once(*tensors: Tensor, block: int = BLOCK) -> int:
    """Return the number of samples to work on at a time; a GPU has no such cache, and wants larger operations."""
    values = block if tensors[0].device.type == "cpu" else 64 * block
    return max(1, values // sum(tensor[0].numel() for tensor in tensors))


def _triangles(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return R of ``downᵀ = Q·R`` and of ``up = Q'·R'``, down [N, r, in], up [N, out, r]: [N, at most r, r] each.

    The update has the singular values and the norm of R'·Rᵀ.
    """
    if down.shape[1] == 1:  # vectors: R is their norm, up to a sign, and QR takes many times as long
        return tuple(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (down, up))
    return tuple(triangle(x) for x in (down.mT, up))


def _update_values(down: Tensor, up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return singular values of updates, the cutoff of rounding in those of up·down [N, 1], factors' `_triangles`."""
    down_r, up_r = _triangles(down, up)
    largest = torch.linalg.vector_norm(down_r, dim=(1, 2)) * torch.linalg.vector_norm(up_r, dim=(1, 2))
    cutoff = ROUNDING * largest[:, None]
    s = singular_values(up_r @ down_r.mT)
    return torch.where(s > cutoff, s, 0) * scale.abs()[:, None], cutoff, (down_r, up_r)


def _leading(descending: Tensor) -> Tensor:
    """Return the first ten columns, zero columns for missing ones."""
    return pad(descending[:, :TOP], (0, max(0, TOP - descending.shape[1])))


@lru_cache(maxsize=4096)
def projection(module_id: str, side: str, length: int) -> Tensor:
    """Draw the fixed projection of one side of a module, normal with variance 1/8, float64[length, 8]."""
    seed = int.from_bytes(hashlib.sha256(f"{module_id}/{side}".encode()).digest(), "big")
    drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal((length, SKETCH))
    return torch.from_numpy(drawn / math.sqrt(SKETCH))


@dataclass(frozen=True)
class Representation:
    """A row of the table; what the experiment does with it follows from ``unit`` and ``made``.

    Attributes:
        name: As on the command line and in the results.
        unit: "layer" or "pair": what goes when a layer is removed, that layer or the whole module.
        made: "computed" (by a function of a matrix or of an update's two factors), "flat" (the weights themselves),
            "pca" (components of them), "autoencoder" (learned from them, see autoencoders.py), "kernel" (of updates,
            see training/kernels.py), "trained" (by a network of its own, see experiment/networks.py) or "response"
            (computed of the factors and of inputs of the module, which are recorded from the base model).
        feature_names: Names of the columns of a unit; their number is the width. Empty where the data decides it.
        source: The paper that the idea is from.
        joins: Other representations whose features these are; empty for all but a few.
        function: Computes it where ``made`` is in ``COMPUTED``: of a matrix, float[N, rows, cols] or `Shared`; of a
            pair, as ``function(down, up, module_id, scale)``, where it is "response" also of inputs by module.
    """

    name: str
    unit: str
    made: str
    feature_names: tuple[str, ...]
    source: str
    function: Callable[..., Tensor] | None = None
    joins: tuple[str, ...] = ()


def _numbered(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}_{i}" for i in range(1, count + 1))


_STATS = ("mean", "std", "median", "min", "max", "skewness", "kurtosis")
_SIGMAS = (*_numbered("sigma", 10), *_numbered("sigma_share", 10))
_SPECTRAL = (*_SIGMAS, "effective_rank", "condition_number", *_numbered("gap", 9), "nuclear_norm")
_NORMS = ("frobenius", "nuclear", "spectral", "l1", "linf", "nuclear_to_frobenius", "spectral_to_frobenius")
_SPREAD = ("interquartile_range", "mean_absolute_deviation", "std_to_mean", "skewness", "kurtosis")
_DISTRIBUTION = (*(f"quantile_{100 * q:02.0f}" for q in QUANTILES), *_SPREAD)
_COUPLING = ("entries_correlation", "entries_cosine", "update_norm", "singular_values_correlation")
_SPECTRUM = (*_SIGMAS, "effective_rank", "stable_rank", "participation_ratio", "condition_number", "nuclear_norm")
_SPECTRUM += ("frobenius_norm", *(f"{x}_norms_{y}" for x in ("row", "column") for y in ("max_to_mean", "gini")))
_FREQUENCY = (*_numbered("magnitude", 10), "mean", "std", "max", "energy_share_of_10")
_INFO = ("entropy", "normalised_entropy")
_SKETCH = _numbered("sketch", SKETCH * SKETCH)
_RESPONSE = tuple(f"response_{i}_to_{j}" for i in range(1, SKETCH + 1) for j in range(1, SKETCH + 1))
_TOKEN = (*_numbered("component", 32), "log_norm")

ENSEMBLE = {"spectral": _SPECTRAL, "matrix_norms": _NORMS, "distribution": _DISTRIBUTION}
ENSEMBLE |= {"frequency": _FREQUENCY, "info_theoretic": _INFO}
_ALL = tuple(f"{part}.{feature}" for part, features in ENSEMBLE.items() for feature in features)
_UPDATES = ("effective_rank", "norm", "scale")


def _by_factors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda down, up, module_id, scale: function(down, up, scale)


COMPUTED = ("computed", "response")  # in the one pass over the weights
MAPPED = "update_views"  # the kernel by which LoRAs are drawn in the plane
RANKING = "stats"  # the representation by which single layers are ranked
REPRESENTATIONS: dict[str, Representation] = {
    row.name: row
    for row in (
        Representation("flat_vec", "layer", "flat", (), "Eilertsen et al., 2020, Classifying the classifier"),
        Representation("stats", "layer", "computed", _STATS, "Unterthiner et al., 2020", stats),
        Representation("pca", "layer", "pca", (), "Pearson, 1901"),
        Representation("spectral", "layer", "computed", _SPECTRAL, "Roy & Vetterli, 2007", spectral),
        Representation("matrix_norms", "layer", "computed", _NORMS, "Golub & Van Loan, section 2.3", matrix_norms),
        Representation("distribution", "layer", "computed", _DISTRIBUTION, "Unterthiner et al., 2020", distribution),
        Representation("coupling", "pair", "computed", _COUPLING, "LoRA: Hu et al., 2022", _by_factors(coupling)),
        Representation("frequency", "layer", "computed", _FREQUENCY, "FourierFT: Gao et al., 2024", frequency),
        Representation("info_theoretic", "layer", "computed", _INFO, "Shannon, 1948", info_theoretic),
        Representation("ensemble", "layer", "computed", _ALL, "the five that it joins", ensemble, tuple(ENSEMBLE)),
        Representation("vae", "layer", "autoencoder", (), "Kingma & Welling, 2014"),
        Representation("contrastive", "layer", "autoencoder", (), "SimCLR: Chen et al., 2020"),
        Representation("denoising", "layer", "autoencoder", (), "Vincent et al., 2008"),
        Representation("update_sketch", "pair", "computed", _SKETCH, "Putterman et al., 2024", update_sketch),
        Representation("update_kernel", "pair", "kernel", (), "SVM: Cortes & Vapnik, 1995"),
        Representation(
            "update_spectrum", "pair", "computed", _SPECTRUM, "Rudelson, 2007", _by_factors(update_spectrum)
        ),
        Representation("update_views", "pair", "kernel", (), "kernel alignment: Cortes et al., 2012"),
        Representation("update_attention", "pair", "trained", _TOKEN, "gated attention: Ilse et al., 2018"),
        Representation("update_frozen", "pair", "trained", _SKETCH, "Putterman et al., 2024"),
        Representation("update_learned", "pair", "trained", _SKETCH, "Putterman et al., 2024"),
        Representation("update_response", "pair", "response", _RESPONSE, "Horwitz et al., 2025", update_response),
    )
}
OF_WEIGHTS = tuple(name for name, row in REPRESENTATIONS.items() if row.made != "response")  # and of nothing else
UPDATES = "updates"  # effective rank, norm and scale of each update: for the analysis, no classifier reads them
MEASURES: dict[str, Representation] = {
    UPDATES: Representation(UPDATES, "pair", "computed", _UPDATES, "Roy & Vetterli, 2007", _by_factors(update_measures))
}
FEATURES = REPRESENTATIONS | MEASURES
