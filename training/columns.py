"""Inputs without the columns that no classifier can learn from: constant ones, and those that no model of a stack sees.

Standardised, a column that is constant over the train rows is 0 in all rows: it adds nothing to an activation, and its
weights of the first layer get no gradient. The same holds of a masked one. Without them the model is the same, if the
other weights start as they would with them: see `training.classifier.initial_weights`. Of a layer's 32 singular values
29 are constant where all LoRAs have rank 1.

Shape letters: M models, S input sources, N samples, F features, K those that are held.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.stacks import Stored

WORTHWHILE = 1 / 8  # of the columns: fewer save little of a step, and a stack without masked ones holds a copy


class Held(NamedTuple):
    """Inputs of which only some columns are held: ``x`` float[S, N, K], and ``columns`` bool[F], None for all."""

    x: Tensor | Stored
    columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of all inputs, (S, N, F)."""
        sources, samples, held = self.x.shape
        return sources, samples, held if self.columns is None else len(self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs held."""
        return self.x.nbytes


def without_constant(x: Tensor) -> Held:
    """Leave out the columns of standardised inputs float[S, N, F] that are 0 in all rows of all sources."""
    return _held(Held(x), x.flatten(0, 1).any(0))


def without_masked(x: Tensor | Stored | Held, live: Tensor | None) -> Held:
    """Leave out the columns that no model sees; ``live`` bool[M, F], None for all. What is stored is left as it is."""
    held = x if isinstance(x, Held) else Held(x)
    return held if live is None or isinstance(held.x, Stored) else _held(held, live.any(0).to(held.x.device))


def _held(held: Held, needed: Tensor) -> Held:
    """Return the inputs with those of their columns that are needed, bool[F], where that leaves out enough of them."""
    before = torch.ones_like(needed) if held.columns is None else held.columns
    columns = before & needed
    count = int(columns.sum())
    if not 0 < count <= (1 - WORTHWHILE) * held.x.shape[2]:
        return held
    return Held(held.x.index_select(2, columns[before].nonzero().squeeze(1)), columns)
