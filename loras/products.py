"""Matrices that are made of several tensors of a file, and the places of tensors in its data.

A pair of a down and an up stands for the update up·down. Other adapters write an update as another product of small
factors, which is up·down exactly, with a larger rank:

- LoCon in Tucker form, up·mid·down: the mid is multiplied into the down.
- LoHa (Hyeon-Woo et al., "FedPara", ICLR 2022), (a1·b1) * (a2·b2) entry by entry: the up is the row-wise Khatri-Rao
  product of a1 and a2, the down the column-wise one of b1 and b2, the rank r².
- LoKr (Edalati et al., "KronA", 2022), the Kronecker product of w1 and w2: the up is that of their ups, the down that
  of their downs. A factor that is whole is a pair of itself and an identity of its narrow side.
- A convolution in groups (PEFT): the up is block-diagonal, a block for each group.

Shape letters: r rank, n columns (inputs, with a convolution's kernel), o rows (outputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from loras.layouts import Layout

BYTES_OF_TYPE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
FLOAT_TYPES = tuple(BYTES_OF_TYPE)
INTEGER_TYPES = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")  # of an alpha
IDENTITY = "identity"  # the type of a factor that no file holds
LARGE_RANK = 256  # of a Tucker form, above which its product is formed by matrix products


class Run(NamedTuple):
    """Weights of one type that lie in the data as in the layout: first byte, first column and end in the flat array."""

    dtype: str
    byte: int
    start: int
    stop: int


class Factor(NamedTuple):
    """A tensor that a matrix is made of: type, first byte in the data, and shape; ``transposed`` where it is used so.

    Of type `IDENTITY` it is an identity matrix.
    """

    dtype: str
    byte: int
    shape: tuple[int, ...]
    transposed: bool = False


class Product(NamedTuple):
    """A layer that is made of tensors: by a row of `PRODUCTS`, with what else that asks for, and its columns."""

    kind: str
    factors: tuple[Factor, ...]
    start: int
    stop: int
    arguments: tuple[int, ...] = ()


@dataclass(frozen=True)
class Places:
    """A layout, and the places of its numbers in the data of a file; ``alphas`` are (module, type, first byte)."""

    layout: Layout
    runs: tuple[Run, ...]
    alphas: tuple[tuple[str, str, int], ...]
    products: tuple[Product, ...]

    @property
    def numbers(self) -> int:
        """The numbers that are held at once at most: the weights, and the tensors that products are made of."""
        tensors = {(factor.byte, factor.shape) for product in self.products for factor in product.factors}
        return self.layout.width + sum(prod(shape) for _, shape in tensors)


def tucker(down: np.ndarray, mid: np.ndarray) -> np.ndarray:
    """Multiply a mid [r, r, kernel ...] into a down [r, in ...] of kernel 1: float64[r, in, kernel ...].

    LyCORIS writes the update of a convolution as up·mid·down.
    """
    wide, core = (tensor.astype(np.float64) for tensor in (down, mid))
    kernel = "dhw"[3 - (core.ndim - 2) :]
    return np.einsum(f"ij{kernel},jc->ic{kernel}", core, wide.reshape(len(wide), -1), optimize=len(wide) > LARGE_RANK)


def khatri_rao_rows(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the Kronecker products of the rows of two ups: [o, r], [o, r] -> [o, r²]."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    return first[:, :, None] * second[:, None, :]


def khatri_rao_columns(*factors: np.ndarray) -> np.ndarray:
    """Return the Kronecker products of the columns of two downs, of which each may have its core: [r², n]."""
    half = len(factors) // 2
    first, second = (_with_core(*part) for part in (factors[:half], factors[half:]))
    return first[:, None, :] * second[None, :, :]


def kronecker(first: np.ndarray, *second: np.ndarray) -> np.ndarray:
    """Return the Kronecker product of two matrices, of which the second may have its core."""
    return np.kron(first.reshape(len(first), -1).astype(np.float64), _with_core(*second))


def _with_core(matrix: np.ndarray, core: np.ndarray | None = None) -> np.ndarray:
    """Return a matrix float64[r, n], with its core [r, r, kernel ...] multiplied into it where it has one."""
    whole = matrix.astype(np.float64) if core is None else tucker(matrix, core)
    return whole.reshape(len(whole), -1)


def block_diagonal(up: np.ndarray, groups: int) -> np.ndarray:
    """Return the up of a convolution in groups, [o, r / groups ...], as it acts on all of the r: [o, r]."""
    blocks = up.reshape(groups, len(up) // groups, -1)
    whole = np.zeros((groups, blocks.shape[1], groups, blocks.shape[2]), up.dtype)
    whole[np.arange(groups), :, np.arange(groups)] = blocks
    return whole


def expert(up: np.ndarray, experts: int, number: int) -> np.ndarray:
    """Return the up of one of several experts, which PEFT stacks as [o, r · experts], the experts last."""
    return up.reshape(len(up), -1, experts)[:, :, number]


def matrix(tensor: np.ndarray) -> np.ndarray:
    """Return a tensor as it is."""
    return tensor


PRODUCTS: dict[str, Callable[..., np.ndarray]] = {
    "matrix": matrix,
    "tucker": tucker,
    "khatri-rao rows": khatri_rao_rows,
    "khatri-rao columns": khatri_rao_columns,
    "kronecker": kronecker,
    "block diagonal": block_diagonal,
    "expert": expert,
}
