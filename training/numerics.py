"""Numbers of vectors and matrices that features are made of: singular values, correlations, Gini coefficients.

Undefined values are 0, such as a ratio at norm 0 or the correlation of a constant. Shape letters: N samples, F values.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.exact import svdvals, triangle

ROUNDING = 1e-12  # a value below this share of its scale is float64 rounding, hence zero


def singular_values(a: Tensor) -> Tensor:
    """Compute singular values, by way of the small triangle of a QR factorisation, which has the same ones.

    Values of at most 1e-12 of the largest become 0: they are noise, which standardising would blow up.

    Shapes: a float[N, rows, cols]; the k = min(rows, cols) singular values, descending, float64[N, k].
    """
    rows, cols = a.shape[1:]
    if min(rows, cols) == 1:  # a vector's only singular value is its norm; rank-one LoRAs are all vectors
        return torch.linalg.vector_norm(a.double(), dim=(1, 2))[:, None]
    small = a.double() if rows == cols else triangle_of_any(a.double())
    return without_rounding(svdvals(small))


def triangle_of_any(a: Tensor) -> Tensor:
    """Return R of the QR factorisation of a [N, rows, cols], or of its transpose if that is taller: [N, k, k]."""
    return triangle(a if a.shape[1] >= a.shape[2] else a.mT)


def condition_number(s: Tensor, longer_side: int) -> Tensor:
    """Return the largest singular value over the smallest that float32 tells from zero, [N, 1]; 0 if all are 0."""
    cutoff = s[:, :1] * longer_side * torch.finfo(torch.float32).eps
    return s[:, :1] / torch.where(s > cutoff, s, torch.inf).amin(1, keepdim=True)


def sorted_rows(x: Tensor) -> Tensor:
    """Sort rows of x [N, F], ascending, in x's dtype or float32; on a CPU by numpy, 20 times as fast as torch."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()  # numpy has no bfloat16
    return torch.from_numpy(np.sort(wide.numpy(), axis=1))


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return the quotient a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def entropy_of(p: Tensor) -> Tensor:
    """Return the Shannon entropy, in nats, of the rows of p [N, F]: [N]."""
    return -torch.xlogy(p, p).sum(1)


def gini(x: Tensor) -> Tensor:
    """Return the Gini coefficient of rows of x [N, F], nonnegative: [N, 1]; 0 where all are equal, or 0."""
    n = x.shape[1]
    rank = 2 * torch.arange(n, dtype=x.dtype, device=x.device) + 1 - n  # of ascending values: 1 - n to n - 1
    share = ratio(sorted_rows(x) @ rank, n * x.sum(1))[:, None]
    return torch.where(share > ROUNDING, share, 0)


def without_rounding(descending: Tensor) -> Tensor:
    """Set entries of rows [N, F] that are rounding, as a share of the first, to 0."""
    return torch.where(descending > ROUNDING * descending[:, :1], descending, 0)  # not >=, or rows of zeros fail


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine between the rows of a and b [N, F]: [N, 1]; 0 where one is zero."""
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return ratio((a * b).sum(1), norms)[:, None]


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of the rows of a and b [N, F]: [N, 1]; 0 where one is constant up to rounding."""
    constant = torch.zeros(len(a), 1, dtype=torch.bool, device=a.device)
    for x in (a, b):
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)  # three times as fast as aminmax along rows
        constant |= high - low <= ROUNDING * torch.maximum(low.abs(), high.abs())
    return torch.where(constant, 0, cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)))
