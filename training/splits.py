"""Train, validation and test rows of a collection: stratified by class, and with groups that stay together.

scikit-learn's stratified splitters can leave a rare class out of a part, which is why rows are allotted here.

Shape letters: N LoRAs, C classes.
"""

from __future__ import annotations

import math
import warnings
from itertools import islice, product

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from training.stacks import numpy_stream, seed_of

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
NEAR = 0.02  # of a class on the wrong side of the shares, on average: other folds are not tried
FOLDS = 10
NUMBERS_AT_ONCE = 2**20  # of ways to part the folds times classes


def split_rows(y: np.ndarray, seed: int, groups: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Draw stratified rows for ``train``, ``validation`` and ``test`` (70/10/20), fixed by labels, groups and seed.

    Validation has max(round(0.1 N), C) rows and test max(round(0.2 N), C); every class has a row in each part.
    With groups, all rows of a group are in one part, and sizes are as near to these shares as groups allow.

    Args:
        y: Class of each sample, every class at least three times, int64[N].
        seed: Of the draw.
        groups: Group of each sample, int64[N]; None: each sample is its own.

    Returns:
        Sorted row indices of each part.

    Raises:
        ValueError: No split of these groups has every class in each part.
    """
    if groups is not None and len(np.unique(groups)) < len(y):
        part_of_row = _split_groups(y, groups, seed_of(seed, "split") % 2**32)
        return {name: np.flatnonzero(part_of_row == part) for part, name in enumerate(SHARES)}
    sizes = np.bincount(y)
    test = _allot(max(round(SHARES["test"] * len(y)), len(sizes)), sizes, most=sizes - 2)
    validation = _allot(max(round(SHARES["validation"] * len(y)), len(sizes)), sizes, most=sizes - test - 1)
    generator = numpy_stream(seed, "split")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SHARES}
    for label in range(len(sizes)):
        rows = generator.permutation(np.flatnonzero(y == label))
        ends = np.cumsum([test[label], validation[label]])
        for name, part in zip(("test", "validation", "train"), np.split(rows, ends), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def _split_groups(y: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return the part (position in ``SHARES``) of each row, int64[N], the same for all rows of a group.

    scikit-learn deals the groups into ten stratified folds, of which those sets are taken as parts that are nearest to
    the shares, among all that have every class in each part. Rare classes may need fewer folds; up to ten groups are a
    fold each, so that all ways to part them are tried.
    """
    group = np.unique(groups, return_inverse=True)[1]
    count, best, nearest = group.max() + 1, None, math.inf
    for folds in range(min(FOLDS, np.bincount(y).max()), 2, -1):
        if count <= FOLDS:
            fold = np.random.default_rng(seed).permutation(count)[group]
        else:
            fold = _stratified_folds(y, group, folds, seed)
        per_fold = np.zeros((fold.max() + 1, y.max() + 1), np.int64)
        np.add.at(per_fold, (fold, y), 1)
        part_of_fold, distance = _nearest_parts(per_fold)
        if distance < nearest:
            best, nearest = part_of_fold[fold], distance
        if nearest < NEAR or count <= FOLDS:
            break
    if best is None:
        raise ValueError(f"no split of the {count} groups was found that has every class in each part")
    return best


def _stratified_folds(y: np.ndarray, group: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row, int64[N], by scikit-learn's `StratifiedGroupKFold`."""
    fold = np.empty(len(y), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer members than folds
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for number, (_, rows) in enumerate(splitter.split(y, y, group)):
            fold[rows] = number
    return fold


def _nearest_parts(per_fold: np.ndarray) -> tuple[np.ndarray | None, float]:
    """Search for the parts of folds that are nearest to the shares in every class.

    Args:
        per_fold: Samples of each fold and class, int64[folds, C].

    Returns:
        Part of each fold, int64[folds], and by how much of a class the parts miss the shares, on average; None and
        infinity where each choice leaves a part without a class.
    """
    ideal = np.array(list(SHARES.values()))[:, None]  # (3, 1)
    ways = product(range(len(SHARES)), repeat=len(per_fold))
    length = max(1, NUMBERS_AT_ONCE // per_fold.shape[1])
    best, nearest = None, math.inf
    while block := list(islice(ways, length)):
        parts = np.array(block)  # (ways, folds)
        counts = np.stack([(parts == part) @ per_fold for part in range(len(SHARES))], axis=1)  # (ways, 3, C)
        distance = np.abs(counts / per_fold.sum(0) - ideal).sum(1).mean(1) / 2  # (ways,)
        distance[(counts == 0).any((1, 2))] = np.inf
        first = int(distance.argmin())
        if distance[first] < nearest:
            best, nearest = parts[first], float(distance[first])
    return best, nearest


def _allot(total: int, sizes: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Share ``total`` among classes in proportion to their sizes, each between 1 and ``most``, by largest remainder."""
    ideal = total * sizes / sizes.sum()
    shares = np.clip(np.floor(ideal).astype(int), 1, most)
    while shares.sum() != total:
        step = 1 if shares.sum() < total else -1
        movable = shares < most if step == 1 else shares > 1
        need = np.where(movable, step * (ideal - shares), -np.inf)
        shares[np.argmax(need)] += step
    return shares
