"""Principal components of rows that may be too many for memory, exact or iterative.

Shape letters: N rows, F columns, k components.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

NUMBERS_AT_ONCE = 2**24  # of x, worked on at a time
GRAM_ROWS = 8_000  # up to this many rows or columns a Gram matrix is formed (512 MB); beyond, blocks are iterated
OVERSAMPLING = 28  # columns of the iterated block above k
CONVERGED = 8e-4  # share of the variance that the iteration may leave
SINGLE = 10 * torch.finfo(torch.float32).eps  # rounding, as a share, of sums of products in float32


class Rows(Protocol):
    """Rows too many for memory, as PCA takes them: a shape (N, F), and a split that yields blocks of rows in order."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def split(self, length: int) -> Iterable[Tensor]:
        """Yield blocks of ``length`` rows, the last maybe shorter, float[rows, F], on the device to compute on."""


class PCA:
    """Principal components of centred, unscaled rows (Pearson, 1901).

    Where x has at most ``gram_rows`` rows or columns: exact, by the smaller Gram matrix in float64, XᵀX [F, F] or, for
    more columns than rows, XXᵀ [N, N] mapped back (Sirovich, 1987). Otherwise by block Lanczos from a random block
    (see `_krylov`): x is read by row blocks only, once for the mean and once for each of about 4 (spectra that fall)
    to 20 (pure noise of 70,000 rows) products with XᵀX in float32. It stops where the variance explained by the k
    components falls short of the best by an estimated 8e-4 of it; on all spectra tried it was less than 1e-3.

    Of each component the entry of largest magnitude is positive. A component whose variance is rounding is zero by
    convention: at most max(N, F)·eps(float64) of the largest, or ``SINGLE`` after products in float32.

    Args:
        n_components: Components wanted; see `num_components` for k.
        gram_rows: Rows or columns up to which a Gram matrix is formed.
        numbers_at_once: Numbers of x to work on at a time.

    Attributes:
        mean_: Column means, float64[F].
        components_: Orthonormal (or zero) rows, of falling variance, float64[k, F].
        explained_variance_: Variance along each, over N - 1, float64[k].
        passes_: How many times x was read.
    """

    def __init__(self, n_components: int = 100, gram_rows: int = GRAM_ROWS, numbers_at_once: int = NUMBERS_AT_ONCE):
        self.n_components, self.gram_rows, self.numbers_at_once = n_components, gram_rows, numbers_at_once

    def fit(self, x: Tensor | Rows) -> PCA:
        """Learn mean and components of train rows x, float[N, F] with N at least 2, and return self.

        `Rows` with at most ``gram_rows`` rows and more columns than rows are gathered into one tensor.
        """
        _check_shape(x)
        rows, columns = x.shape
        if rows < 2:
            raise ValueError("PCA needs at least 2 train rows to see any variance; use more train samples")
        wide, small = columns > rows, min(rows, columns) <= self.gram_rows
        if wide and small and not isinstance(x, Tensor):
            x = torch.cat(list(self._row_blocks(x)))
        total, largest = 0, 0.0
        for block in self._row_blocks(x):
            _check_values(block)
            total = total + block.double().sum(0)
            largest = max(largest, block.abs().max().item())
        self.mean_ = total / rows
        self.passes_ = 1
        k = num_components(self.n_components, rows, columns)
        values, directions = self._gram(x, k, wide) if small else self._krylov(x, k, largest or 1.0)
        peak = directions.gather(1, directions.abs().argmax(1, keepdim=True))  # (k, 1)
        self.components_ = torch.where(values[:, None] > 0, directions * peak.sign(), 0)
        self.explained_variance_ = values / (rows - 1)
        return self

    def transform(self, x: Tensor | Rows) -> Tensor:
        """Compute scores ``(x - mean_) @ components_.T`` of rows x, float[N, F] with the fitted F: float32[N, k]."""
        _check_shape(x)
        if x.shape[1] != len(self.mean_):
            raise ValueError(f"PCA was fitted on {len(self.mean_)} columns, got {x.shape[1]}; pass the same ones")
        scores = []
        for block in self._row_blocks(x):
            _check_values(block)
            scores.append((block.double() - self.mean_) @ self.components_.mT)
        largest = torch.finfo(torch.float32).max
        return torch.cat(scores).clamp(-largest, largest).float()

    def _length(self, numbers: int) -> int:
        """Return the number of rows (or columns) of so many numbers to work on at a time."""
        return max(1, self.numbers_at_once // numbers)

    def _row_blocks(self, x: Tensor | Rows) -> Iterable[Tensor]:
        return x.split(self._length(x.shape[1]))

    def _centred_rows(self, x: Tensor | Rows) -> Iterator[Tensor]:
        """Yield blocks of rows of x less the mean, in float64."""
        for block in self._row_blocks(x):
            yield block.double() - self.mean_

    def _centred_columns(self, x: Tensor) -> Iterator[Tensor]:
        """Yield blocks of whole columns of x less their mean, in float64."""
        length = self._length(len(x))
        for block, mean in zip(x.split(length, dim=1), self.mean_.split(length), strict=True):
            yield block.double() - mean

    def _gram(self, x: Tensor | Rows, k: int, wide: bool) -> tuple[Tensor, Tensor]:
        """Compute the leading k eigenpairs of XᵀX, exactly.

        Returns:
            Values, falling, 0 where they are rounding, float64[k], and vectors, of any length where the value is 0,
            float64[k, F].
        """
        side = min(x.shape)
        gram = torch.zeros(side, side, dtype=torch.float64, device=self.mean_.device)
        for block in self._centred_columns(x) if wide else self._centred_rows(x):
            gram += block @ block.mT if wide else block.mT @ block
        self.passes_ += 1
        values, vectors = torch.linalg.eigh(gram)  # ascending
        values, directions = values.flip(0)[:k], vectors.flip(1)[:, :k].mT
        values = _without_rounding(values, max(x.shape) * torch.finfo(torch.float64).eps)
        if wide:  # from (k, N) to (k, F)
            directions = torch.cat([directions @ block for block in self._centred_columns(x)], dim=1)
            directions = directions / torch.where(values > 0, values.sqrt(), 1)[:, None]
            self.passes_ += 1
        return values, directions

    def _krylov(self, x: Tensor | Rows, k: int, scale: float) -> tuple[Tensor, Tensor]:
        """Compute the leading k eigenpairs of XᵀX, as `_gram` does, by block Lanczos (Golub & Underwood, 1977).

        Rayleigh-Ritz on the Krylov space span(Q, AQ, A²Q, ...), A = XᵀX, of a random block Q of k + 28 columns, which
        needs no gaps in the spectrum (Musco & Musco, 2015). Each block is made orthogonal to all before it, so the
        basis, float32[F, k + 28] a pass, is what takes memory. See `_converged` for when it stops. Works on x / scale,
        the largest magnitude, so that squares neither overflow float32 nor vanish in it.
        """
        columns = x.shape[1]
        width = min(k + OVERSAMPLING, columns)
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(columns, width, generator=generator).to(self.mean_.device)
        q = torch.linalg.qr(q).Q  # (F, k + 28)
        basis: list[Tensor] = []
        core = torch.zeros(0, 0, dtype=torch.float64, device=q.device)  # basisᵀ·A·basis
        explained: list[float] = []
        while True:
            basis.append(q)
            product = self._gram_times(x, q, scale)
            column = torch.cat([block.mT @ product for block in basis]).double()
            core = pad(core, (0, width, 0, width))
            core[:, -width:], core[-width:] = column, column.mT
            explained.append(torch.linalg.eigvalsh(core)[-k:].sum().item())
            if _converged(explained) or (len(basis) + 1) * width > columns:
                break
            q = _orthogonal_to(basis, product)
        values, vectors = torch.linalg.eigh(core)
        leading = vectors.flip(1)[:, :k].split(width)
        directions = sum(block.double() @ part for block, part in zip(basis, leading, strict=True))  # (F, k)
        # Orthonormal up to float32 by now; the factorisation makes it up to float64.
        return scale**2 * _without_rounding(values.flip(0)[:k], SINGLE), torch.linalg.qr(directions).Q.mT

    def _gram_times(self, x: Tensor | Rows, q: Tensor, scale: float) -> Tensor:
        """Compute XᵀX·q / scale² of the centred rows X, in float32 [F, b], in one pass over x."""
        product = torch.zeros_like(q)
        for block in self._centred_rows(x):
            centred = block.float()  # centred before: a mean far above the deviation would drown it in float32
            product.addmm_(centred.mT, centred @ q / scale / scale)
        self.passes_ += 1
        return product


def num_components(n_components: int, rows: int, columns: int) -> int:
    """Return k, the number of components of centred rows: the least of those wanted, N - 1 and F."""
    return min(n_components, rows - 1, columns)


def _orthogonal_to(basis: list[Tensor], product: Tensor) -> Tensor:
    """Orthonormalise a block [F, b] against all blocks of the basis; the block is overwritten."""
    q = product
    for _ in range(2):  # a second time, for what rounding has left of the first
        for block in basis:
            q -= block @ (block.mT @ q)
        q = torch.linalg.qr(q).Q
    return q


def _converged(explained: list[float]) -> bool:
    """Decide whether sums of Ritz values, one a step, are within CONVERGED of their limit.

    Their gains fall about geometrically, so what is left is estimated from the last two (Aitken, 1926); right after
    strong directions were found and before weak ones are, that is too little, hence never less than the last gain,
    and twice in a row.
    """
    gains = [after - before for before, after in pairwise(explained)]
    left = []
    for before, gain in pairwise(gains):
        further = gain**2 / (before - gain) if gain < before else math.inf
        left.append(max(gain, further) if gain > SINGLE * explained[-1] else 0.0)
    return len(left) > 1 and max(left[-2:]) <= CONVERGED * explained[-1]


def _without_rounding(falling: Tensor, share: float) -> Tensor:
    """Set values [k] that are at most this share of the first to 0."""
    return torch.where(falling > share * falling[:1], falling, 0)  # not >=, or values that are all 0 fail


def _check_shape(x: Tensor | Rows) -> None:
    """Refuse rows that are no matrix, or an empty one."""
    if len(x.shape) != 2 or 0 in x.shape:
        raise ValueError(f"x must be float[N, F] and hold values, got shape {list(x.shape)}; reshape it")


def _check_values(block: Tensor) -> None:
    """Refuse a block of rows with values that are no finite floating-point numbers of float32's range."""
    if not block.is_floating_point():
        raise ValueError(f"x must be floating point, got {block.dtype}; convert it with .float()")
    # NaN and Inf survive min and max: one pass, no copy.
    if not torch.stack(torch.aminmax(block)).float().isfinite().all():
        bad = block.numel() - int(block.float().isfinite().sum())
        raise ValueError(f"x: {bad} of {block.numel()} values are NaN, Inf or beyond float32; drop their samples")
