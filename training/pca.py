"""Principal components of rows that may be too wide and too many for memory, exact or iterative.

Shape letters: N rows, F columns, k components, c columns of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from training.exact import exact_dtype

NUMBERS_AT_ONCE = 2**24  # of x, worked on at a time, in float64 128 MiB; a handful of such blocks are held
GRAM_SIDE = 3_000  # up to so many rows or columns a Gram matrix is formed (72 MB); beyond, blocks are iterated
OVERSAMPLING = 28  # columns of the iterated block above k
CONVERGED = 8e-4  # share of the variance that the iteration may leave
SINGLE = 10 * torch.finfo(torch.float32).eps  # rounding, as a share, of sums of products in float32


class Matrix(Protocol):
    """Rows too many for memory, as PCA takes them: a shape (N, F), and a split like a tensor's."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def split(self, length: int, dim: int = 0) -> Iterable[Tensor]:
        """Yield blocks of at most ``length`` rows, or with ``dim`` 1 columns, in order, on the device to compute on.

        The blocks are the same for the same length, also for other rows of the same columns.
        """


class PCA:
    """Principal components of centred, unscaled rows (Pearson, 1901).

    Where x has at most ``gram_side`` rows or columns: exact, by the smaller Gram matrix in float64, XᵀX [F, F] or, for
    more columns than rows, XXᵀ [N, N] (Sirovich, 1987). Otherwise by block Lanczos from a random block (see
    `_krylov`): x is read once for its largest number, once for each of about 4 (spectra that fall) to 20 (pure noise
    of 70,000 rows) products with XXᵀ in float32, on a GPU in float64, and once more to make the components orthonormal
    in float64. It stops where the variance explained by the k components falls short of the best by an estimated 8e-4
    of it; on all spectra tried it was less than 1e-3.

    Where XXᵀ is used, x is read by blocks of columns, components are combinations of train rows, and only blocks of
    them are ever formed: the memory does not depend on F. So x is read again when rows are transformed.

    Of each component the entry of largest magnitude is positive. A component whose variance is rounding is zero by
    convention: at most max(N, F)·eps(float64) of the largest, or ``SINGLE`` after products in float32.

    Args:
        n_components: Components wanted; see `num_components` for k.
        gram_side: Rows or columns up to which a Gram matrix is formed.
        numbers_at_once: Numbers of x to work on at a time.
        products: dtype of the iteration's products; None: see `exact_dtype`.

    Attributes:
        explained_variance_: Variance along each component, over N - 1, float64[k].
        passes_: How many times x was read to fit.
    """

    def __init__(
        self,
        n_components: int = 100,
        gram_side: int = GRAM_SIDE,
        numbers_at_once: int = NUMBERS_AT_ONCE,
        products: torch.dtype | None = None,
    ):
        self.n_components, self.gram_side, self.numbers_at_once = n_components, gram_side, numbers_at_once
        self.products = products

    @property
    def mean_(self) -> Tensor:
        """Column means, float64[F]."""
        return torch.cat([mean for mean, _ in self._directions()])

    @property
    def components_(self) -> Tensor:
        """Orthonormal (or zero) rows, of falling variance, float64[k, F]: formed where asked for."""
        components = torch.cat([directions for _, directions in self._directions()], dim=1)
        return components * _peaks(components).sign()[:, None]

    def fit(self, x: Tensor | Matrix) -> PCA:
        """Learn components of train rows x, float[N, F] with N at least 2, and return self."""
        _check_shape(x)
        rows, columns = x.shape
        if rows < 2:
            raise ValueError("PCA needs at least 2 train rows to see any variance; use more train samples")
        k = num_components(self.n_components, rows, columns)
        self._train, self._length = x, self._block(rows)
        if rows < columns and rows <= self.gram_side:
            values = self._fit_rows(x, k)
        elif columns <= self.gram_side:
            values = self._fit_columns(x, k)
        else:
            values = self._krylov(x, k)
        self.explained_variance_ = values / (rows - 1)
        return self

    def transform(self, x: Tensor | Matrix) -> Tensor:
        """Compute scores ``(x - mean_) @ components_.T`` of rows x, float[N, F] with the fitted F: float32[N, k]."""
        _check_shape(x)
        if x.shape[1] != self._train.shape[1]:
            raise ValueError(f"PCA was fitted on {self._train.shape[1]} columns, got {x.shape[1]}; pass the same ones")
        scores = self._scores_by_rows(x) if self._left is None else self._scores_by_columns(x)
        bound = torch.finfo(torch.float32).max
        return scores.clamp(-bound, bound).float()

    def _scores_by_rows(self, x: Tensor | Matrix) -> Tensor:
        """Compute scores by components that are there as a whole."""
        scores = []
        for block in x.split(self._block(x.shape[1])):
            _check_values(block)
            scores.append((block.double() - self._mean) @ self._right.mT)
        return torch.cat(scores) * _peaks(self._right).sign()

    def _scores_by_columns(self, x: Tensor | Matrix) -> Tensor:
        """Compute scores by components that are formed in blocks beside x."""
        scores, peaks = 0, 0
        for block, (mean, directions) in zip(x.split(self._length, dim=1), self._directions(), strict=True):
            _check_values(block)
            scores = scores + (block.double() - mean) @ directions.mT
            largest = _peaks(directions)
            peaks = torch.where(largest.abs() > abs(peaks), largest, peaks)  # of equal ones the first
        return scores * peaks.sign()

    def _block(self, numbers: int) -> int:
        """Return the number of columns (or rows) of so many numbers to work on at a time."""
        return max(1, self.numbers_at_once // numbers)

    def _directions(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield column means float64[c] and components float64[k, c] but for their signs, by blocks of columns."""
        if self._left is None:
            yield self._mean, self._right
            return
        for block, mean in _centred_columns(self._train, self._length):
            yield mean, self._left @ block

    # -- exact --------------------------------------------------------------------------------------------------------

    def _fit_rows(self, x: Tensor | Matrix, k: int) -> Tensor:
        """Compute leading eigenpairs of XXᵀ, exactly; return the values [k], falling, 0 where they are rounding."""
        gram = sum(block @ block.mT for block, _ in _centred_columns(x, self._length))
        self.passes_ = 1
        values, vectors = _leading(gram, k, _exact_rounding(x))
        self._set_left(values, vectors)
        return values

    def _fit_columns(self, x: Tensor | Matrix, k: int) -> Tensor:
        """Compute leading eigenpairs of XᵀX, exactly; return the values as `_fit_rows` does."""
        length, total, gram = self._block(x.shape[1]), 0, 0
        for block in x.split(length):
            _check_values(block)
            total = total + block.double().sum(0)
        self._mean = total / x.shape[0]
        for block in x.split(length):
            centred = block.double() - self._mean
            gram = gram + centred.mT @ centred
        self.passes_ = 2
        values, vectors = _leading(gram, k, _exact_rounding(x))
        self._left, self._right = None, torch.where(values[:, None] > 0, vectors.mT, 0)  # (k, F)
        return values

    def _set_left(self, values: Tensor, vectors: Tensor) -> None:
        """Keep what takes centred train rows to components: eigenvectors [N, k] over singular values, [k, N]."""
        scale = torch.where(values > 0, 1 / torch.where(values > 0, values, 1).sqrt(), 0)
        self._left = vectors.mT * scale[:, None]

    # -- iterative ----------------------------------------------------------------------------------------------------

    def _krylov(self, x: Tensor | Matrix, k: int) -> Tensor:
        """Compute leading eigenpairs of XXᵀ by block Lanczos (Golub & Underwood, 1977); return as `_fit_rows` does.

        Rayleigh-Ritz on the Krylov space span(Q, AQ, A²Q, ...), A = XXᵀ, of a random block Q of k + 28 columns, which
        needs no gaps in the spectrum (Musco & Musco, 2015). Each block is made orthogonal to all before it, so the
        basis, float[N, k + 28] a pass, is what takes memory. See `_converged` for when it stops. Works on x / scale,
        the largest magnitude, so that squares neither overflow float32 nor vanish in it.
        """
        rows, scale, device = x.shape[0], 0.0, torch.device("cpu")
        for block in x.split(self._length, dim=1):
            _check_values(block)
            scale, device = max(scale, block.abs().max().item()), block.device
        self.passes_ = 1
        scale = scale or 1.0
        width = min(k + OVERSAMPLING, rows)
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(rows, width, generator=generator).to(device, self.products or exact_dtype(device))
        q = torch.linalg.qr(q).Q  # (N, k + 28)
        basis: list[Tensor] = []
        core = torch.zeros(0, 0, dtype=torch.float64, device=device)  # basisᵀ·A·basis
        explained: list[float] = []
        while True:
            basis.append(q)
            product = self._gram_times(x, q, scale)
            column = torch.cat([block.mT @ product for block in basis]).double()
            core = pad(core, (0, width, 0, width))
            core[:, -width:], core[-width:] = column, column.mT
            explained.append(torch.linalg.eigvalsh(core)[-k:].sum().item())
            if _converged(explained) or (len(basis) + 1) * width > rows:
                break
            q = _orthogonal_to(basis, product)
        leading = torch.linalg.eigh(core).eigenvectors.flip(1)[:, :k].split(width)
        vectors = sum(block.double() @ part for block, part in zip(basis, leading, strict=True))  # (N, k)
        basis.clear()
        return self._refined(x, torch.linalg.qr(vectors).Q)

    def _refined(self, x: Tensor | Matrix, vectors: Tensor) -> Tensor:
        """Solve the problem within the span of orthonormal vectors [N, k] in float64, in one pass over x."""
        core = 0
        for block, _ in _centred_columns(x, self._length):
            projected = vectors.mT @ block  # (k, c)
            core = core + projected @ projected.mT
        self.passes_ += 1
        values, turn = _leading(core, len(core), SINGLE)
        self._set_left(values, vectors @ turn)
        return values

    def _gram_times(self, x: Tensor | Matrix, q: Tensor, scale: float) -> Tensor:
        """Compute XXᵀ·q / scale² of the centred rows X, in q's dtype [N, b], in one pass over x."""
        product = torch.zeros_like(q)
        for block, _ in _centred_columns(x, self._length):
            centred = block.to(q.dtype)  # centred before: a mean far above the deviation would drown it in float32
            product.addmm_(centred, centred.mT @ q / scale / scale)
        self.passes_ += 1
        return product


def num_components(n_components: int, rows: int, columns: int) -> int:
    """Return k, the number of components of centred rows: the least of those wanted, N - 1 and F."""
    return min(n_components, rows - 1, columns)


def _centred_columns(x: Tensor | Matrix, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of whole columns of x less their mean, float64[N, c], and the mean, float64[c]."""
    for block in x.split(length, dim=1):
        _check_values(block)
        wide = block.to(torch.float64, copy=True)
        mean = wide.mean(0)
        yield wide.sub_(mean), mean


def _peaks(directions: Tensor) -> Tensor:
    """Return the entry of largest magnitude of each row, the first of equal ones: [k, c] -> [k]."""
    return directions.gather(1, directions.abs().argmax(1, keepdim=True))[:, 0]


def _exact_rounding(x: Tensor | Matrix) -> float:
    """Return the share of the largest eigenvalue that is rounding in a Gram matrix of float64."""
    return max(x.shape) * torch.finfo(torch.float64).eps


def _leading(gram: Tensor, k: int, rounding: float) -> tuple[Tensor, Tensor]:
    """Return the k largest eigenvalues of a Gram matrix, 0 up to this share of the first, and vectors [., k]."""
    values, vectors = torch.linalg.eigh(gram)  # ascending
    return _without_rounding(values.flip(0)[:k], rounding), vectors.flip(1)[:, :k]


def _orthogonal_to(basis: list[Tensor], product: Tensor) -> Tensor:
    """Orthonormalise a block [N, b] against all blocks of the basis; the block is overwritten."""
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


def _check_shape(x: Tensor | Matrix) -> None:
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
