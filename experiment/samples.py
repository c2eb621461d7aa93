"""Samples: what training needs to know of a collection, small enough to travel to every worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data import Collection
from loras.lora_files import Layer, Layout


@dataclass(frozen=True, eq=False)
class Samples:
    """N LoRAs of L layers.

    Attributes:
        y: Class of each, int64[N].
        num_classes: Number of classes.
        layers: The layers, in the network's order.
        pair_of_layer: Position of each layer's module, int64[L].
        packed_layout: The layout of packed weights.
    """

    y: np.ndarray
    num_classes: int
    layers: tuple[Layer, ...]
    pair_of_layer: np.ndarray
    packed_layout: Layout

    @classmethod
    def of(cls, collection: Collection) -> Samples:
        """Return those of a collection."""
        parts = collection.layers, collection.pair_of_layer, collection.packed_layout
        return cls(collection.y, len(collection.classes), *parts)

    @property
    def count(self) -> int:
        """The number N of LoRAs."""
        return len(self.y)
