"""The arrays that the pass over the weights leaves: features, packed weights, sketches of these, digests.

Each has a row for each LoRA; rows of many files are computed at once. Shape letters: see extraction.py.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import torch

from data import Collection, LoraFile
from loras.layouts import Layer, Layout, by_layout
from representations import FEATURES, matrix_features, pair_features

if TYPE_CHECKING:  # scipy is imported where it is called, with scikit-learn
    from scipy.sparse import csr_matrix

FLAT = ("flat", "pca", "autoencoder")  # made of all weights, or of sketches of them
WEIGHTS = "weights"  # the name under which the packed weights are kept, beside the features
# Their sketches instead, of at most so many numbers a layer; numbers may differ with another library.
SKETCHES, SKETCH_WIDTH = f"sketches-{version('scikit-learn')}", 256
DIGESTS = "digests"  # and a digest of what is read of each file, uint8[N, 32]


def row_of(collection: Collection, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Return dtype and shape of a LoRA's row of an array: features [L or P, F], packed weights [W], or a digest."""
    if name == DIGESTS:
        return np.dtype(np.uint8), (hashlib.sha256().digest_size,)
    if name == WEIGHTS:
        return np.dtype(np.float32), (collection.packed_layout.width,)
    if name == SKETCHES:
        return np.dtype(np.float32), (sum(widths_of(collection.packed_layout, True)),)
    units = collection.layers if FEATURES[name].unit == "layer" else collection.modules
    return np.dtype(np.float32), (len(units), len(FEATURES[name].feature_names))


def allocate(collection: Collection, names: list[str], rows: int) -> dict[str, np.ndarray]:
    """Return an array for a shard of each name."""
    kinds = {name: row_of(collection, name) for name in names}
    return {name: np.empty((rows, *shape), dtype) for name, (dtype, shape) in kinds.items()}


def fill(
    arrays: dict,
    collection: Collection,
    files: list[LoraFile],
    weights: list[np.ndarray],
    scales: list[dict],
    device: torch.device,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Compute or copy the rows of files, into arrays of just these; ``inputs`` are float32[8, in] by module."""
    # Matrices [n, rows, cols] of each layer, with the n rows of the arrays that they are of.
    matrices: list[list[tuple[list[int], torch.Tensor]]] = [[] for _ in collection.layers]
    for members in by_layout(file.layout for file in files):
        layout = files[members[0]].layout
        flat = np.stack([weights[i] for i in members])
        if WEIGHTS in arrays:
            arrays[WEIGHTS][members] = _packed(flat, layout, collection.packed_layout)
        on_device = torch.from_numpy(flat).to(device)
        for depth, (layer, columns) in enumerate(zip(layout.layers, layout.columns, strict=True)):
            matrices[depth].append((members, on_device[:, columns].unflatten(1, layer.shape)))
    _fill_matrix_features(arrays, matrices)
    on_device = {module: torch.from_numpy(given).to(device) for module, given in (inputs or {}).items()}
    _fill_pair_features(arrays, collection, matrices, scales, on_device)


def _packed(flat: np.ndarray, layout: Layout, packed: Layout) -> np.ndarray:
    """Return flattened weights of files of one layout as they are packed: zeros where a rank falls short.

    float32[n, W of the layout] -> float32[n, W of the packed layout]. A down is given rows of zeros, an up columns, so
    that their product stays what it was.
    """
    if [layer.shape for layer in layout.layers] == [layer.shape for layer in packed.layers]:
        return flat
    padded = np.zeros((len(flat), packed.width), np.float32)
    places = zip(layout.layers, layout.columns, packed.layers, packed.columns, strict=True)
    for layer, columns, wide, wide_columns in places:
        (rows, cols), to = layer.shape, padded[:, wide_columns].reshape(-1, *wide.shape)  # a view
        to[:, :rows, :cols] = flat[:, columns].reshape(-1, rows, cols)
    return padded


def widths_of(layout: Layout, sketched: bool) -> list[int]:
    """Return how many numbers of each layer there are: all its weights, or those of its sketch."""
    widths = [math.prod(layer.shape) for layer in layout.layers]
    return [min(width, SKETCH_WIDTH) for width in widths] if sketched else widths


def sketching(layer: Layer) -> csr_matrix | None:
    """Return the fixed projection of a layer, float32[256, weights]: sparse, random (Li, Hastie & Church, 2006).

    The name and the role of its module decide it, with its number of weights. None for a layer of at most 256 weights,
    which is its own sketch. On average distances stay as they are.
    """
    from sklearn.random_projection import SparseRandomProjection

    width = math.prod(layer.shape)
    if width <= SKETCH_WIDTH:
        return None
    seed = np.frombuffer(hashlib.sha256(f"{layer.module}/{layer.role}".encode()).digest(), "<u4")
    projection = SparseRandomProjection(SKETCH_WIDTH, random_state=np.random.RandomState(seed))
    return projection.fit(np.zeros((1, width), np.float32)).components_


def sketched(flat: np.ndarray, layout: Layout, projections: list[csr_matrix | None]) -> np.ndarray:
    """Return the sketches of flattened weights, float32[n, W] -> float32[n, at most 256 a layer], always on the CPU."""
    parts = []
    for columns, projection in zip(layout.columns, projections, strict=True):
        weights = flat[:, columns]
        parts.append(weights if projection is None else (projection @ weights.T).T)
    return np.concatenate(parts, axis=1)


def _fill_matrix_features(arrays: dict, matrices: list) -> None:
    """Compute features by layer of files; all matrices of one shape, whatever file and layer, at once."""
    names = [name for name in arrays if name in FEATURES and FEATURES[name].unit == "layer"]
    groups = defaultdict(list)
    for depth, batches in enumerate(matrices):
        for members, batch in batches:
            groups[batch.shape[1:]].append((members, depth, batch))
    for group in groups.values() if names else ():
        row = [i for members, _, _ in group for i in members]
        depths = [depth for members, depth, _ in group for _ in members]
        features = matrix_features(torch.cat([batch for _, _, batch in group]), names)
        for name in names:
            arrays[name][row, depths] = features[name].cpu().numpy()


def _fill_pair_features(
    arrays: dict, collection: Collection, matrices: list, scales: list[dict], inputs: dict[str, torch.Tensor]
) -> None:
    """Compute features by pair of files; all pairs of one shape, whatever file and module, at once."""
    names = [name for name in arrays if name in FEATURES and FEATURES[name].unit == "pair"]
    groups = defaultdict(list)
    for p, module in enumerate(collection.modules):
        # In the network's order a module's up follows its down.
        for (members, downs), (_, ups) in zip(matrices[2 * p], matrices[2 * p + 1], strict=True):
            groups[downs.shape[1:], ups.shape[1:]].append((members, p, module, downs, ups))
    for group in groups.values() if names else ():
        row = [i for members, *_ in group for i in members]
        position, module = zip(*((p, module) for members, p, module, *_ in group for _ in members), strict=True)
        downs, ups = (torch.cat([entry[k] for entry in group]) for k in (3, 4))
        scale = torch.tensor([scales[i][m] for i, m in zip(row, module, strict=True)], device=downs.device)
        features = pair_features(downs, ups, module, scale, names, inputs=inputs)
        for name in names:
            arrays[name][row, position] = features[name].cpu().numpy()
