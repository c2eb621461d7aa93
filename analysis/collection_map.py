"""The collection in the plane: which LoRAs lie together by a kernel of their updates, and which classes that separates.

Kernel principal components of the train LoRAs (Schölkopf, Smola & Müller, "Nonlinear component analysis as a kernel
eigenvalue problem", Neural Computation 1998); other LoRAs are projected. A plane holds only a part of what a kernel
knows: classes that merge in it may still be predicted.

Shape letters as in evidence.py, and n the rows that components are fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import cdist, squareform
from sklearn.decomposition import KernelPCA

from analysis.chance import ChanceTest
from analysis.evidence import Evidence, choose_rows

KEPT = 1_000  # LoRAs whose places are kept in the results, at most
DIGITS = 4  # of a coordinate, the largest of a panel being 1
LEAST_LORAS = 5  # test LoRAs of a class, below which it is compared with none
DISTINCT, MERGED = 0.9, 0.75  # separations of two classes: from the first on distinct, below the second merged
LEAST_SHARE = 1e-9  # of a kernel's variance, below which a component is rounding


@dataclass(frozen=True)
class Mapped:
    """A kernel of the LoRAs, of all layers or of a module alone.

    Attributes:
        layers: ``all``, or the module's canonical id.
        block: Block of the module, empty where unknown or of all.
        kernel: Between all LoRAs and those that components are fitted on, float[N, n]; centred or not.
        columns: Rows of the latter, train LoRAs, int[n].
    """

    layers: str
    block: str
    kernel: np.ndarray
    columns: np.ndarray


def plane(kernel: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two kernel principal components of all rows, and the shares of variance that they hold.

    Fitted on the columns' own rows, whose variance the shares are of. A component that holds nothing, as of a kernel
    without variance, is 0 everywhere.

    Args:
        kernel: float[N, n].
        columns: Rows that the columns belong to, int[n].

    Returns:
        Coordinates float64[N, 2] and shares float64[2].
    """
    kernel = kernel.astype(float)
    fitted = kernel[columns]
    fitted = (fitted + fitted.T) / 2  # symmetric but for rounding
    total = np.trace(fitted) - fitted.mean() * len(fitted)  # of the centred kernel
    points, shares = np.zeros((len(kernel), 2)), np.zeros(2)
    largest = np.abs(fitted).max(initial=0.0)
    if len(columns) < 3 or total <= LEAST_SHARE * len(fitted) * largest:
        return points, shares
    components = KernelPCA(2, kernel="precomputed", remove_zero_eig=False, random_state=0).fit(fitted / largest)
    held = components.eigenvalues_ * largest / total
    kept = held > LEAST_SHARE
    points[:, kept] = components.transform(kernel / largest)[:, kept] * np.sqrt(largest)
    shares[kept] = np.minimum(1, held[kept])
    return points, shares


def collection_map(evidence: Evidence, mapped: Sequence[Mapped]) -> dict:
    """Return the LoRAs in the plane of each kernel, and which classes each plane separates.

    At most ``KEPT`` LoRAs are kept, test LoRAs first, then train LoRAs, as evenly of the classes as possible. What is
    separated is computed from all of them.

    Args:
        evidence: The evidence.
        mapped: The kernels.
    """
    kept = _kept(evidence)
    planes = [plane(panel.kernel, panel.columns) for panel in mapped]
    nearest = [_distances(evidence, points).argmin(1) for points, _ in planes]
    test = ChanceTest.of(evidence, [predicted[None] for predicted in nearest])
    panels = []
    for i, (panel, (points, shares)) in enumerate(zip(mapped, planes, strict=True)):
        scale = np.abs(points[kept]).max(initial=0.0) or 1.0
        separates = separation(evidence, points, nearest[i])
        separates |= {"p_family": test.p_family[i], "above_null": test.above_null[i]}
        if not test.above_null[i]:  # what is told apart or not is then chance
            separates |= {"distinct": [], "merged": []}
        panels.append(
            {
                "layers": panel.layers,
                "block": panel.block or None,
                "explained": shares,
                "points": (points[kept] / scale).round(DIGITS),
                "separates": separates,
            }
        )
    parts = np.where(np.isin(kept, evidence.rows["test"]), "test", "train")
    return {"classes": list(evidence.classes), "labels": evidence.y[kept], "parts": parts.tolist(), "panels": panels}


def _kept(evidence: Evidence) -> np.ndarray:
    """Return the rows of the LoRAs that are kept: test LoRAs, then train LoRAs, int[at most KEPT]."""
    rows = [np.arange(0)]
    for part in ("test", "train"):
        left, of_part = KEPT - sum(map(len, rows)), evidence.rows[part]
        if left > 0 and len(of_part):
            chosen = choose_rows(evidence.y[of_part], left, evidence.seed, f"collection map {part}")
            rows.append(of_part[chosen])
    return np.concatenate(rows)


def _distances(evidence: Evidence, points: np.ndarray) -> np.ndarray:
    """Return distances of the test LoRAs to the mean of each class's train LoRAs, float[T, C]; infinite without any."""
    train = evidence.rows["train"]
    means = np.full((len(evidence.classes), 2), np.inf)
    for label in np.unique(evidence.y[train]):
        means[label] = points[train][evidence.y[train] == label].mean(0)
    known = np.isfinite(means[:, 0])
    distances = np.full((len(evidence.truth), len(means)), np.inf)
    distances[:, known] = cdist(points[evidence.rows["test"]], means[known])
    return distances


def separation(evidence: Evidence, points: np.ndarray, nearest: np.ndarray) -> dict:
    """Return how many test LoRAs lie nearest to the mean of their class, and which classes that tells apart.

    Two classes are separated by the share of their test LoRAs, both classes counting alike, that are nearer to the mean
    of their own one: 1/2 where nothing tells them apart. A class is distinct where that is at least 0.9 with every
    other. Classes are merged where it is below 0.75 for every two of a group (complete linkage). Both are counts of
    these test LoRAs, without an interval. Classes of fewer than five test LoRAs are compared with none.

    Args:
        evidence: The evidence.
        points: Coordinates of all LoRAs, float[N, 2].
        nearest: Class of the nearest mean of each test LoRA, int[T].
    """
    correct = (nearest == evidence.truth)[None]
    estimate = evidence.draws.estimate(correct, evidence.draws.accuracies([correct])[0])
    separated = separations(_distances(evidence, points), evidence.truth)
    enough = np.bincount(evidence.truth, minlength=len(separated)) >= LEAST_LORAS
    present = np.flatnonzero(enough & ~np.isnan(separated).all(1))
    among = separated[np.ix_(present, present)]
    distinct, merged = [], []
    if len(present) > 1:
        others = ~np.eye(len(present), dtype=bool)
        least = [among[i][others[i]].min() for i in range(len(present))]
        distinct = [evidence.classes[label] for label, value in zip(present, least, strict=True) if value >= DISTINCT]
        tree = hierarchy.linkage(squareform(np.where(others, among, 0), checks=False), "complete")
        group_of = hierarchy.fcluster(tree, np.nextafter(MERGED, 0), "distance")
        groups = [present[group_of == group] for group in dict.fromkeys(group_of.tolist())]
        merged = [[evidence.classes[label] for label in group] for group in groups if len(group) > 1]
    return {
        **estimate,
        "chance": evidence.chance,
        "compared": len(present),
        "distinct": distinct,
        "merged": merged,
    }


def separations(distances: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the separation of every two classes, float[C, C], of test LoRAs at distances float[T, C] from the means.

    NaN where a class has no test LoRA or no mean; the diagonal is 1/2. Equal distances count half.
    """
    classes = distances.shape[1]
    nearer = np.full((classes, classes), np.nan)
    for label in np.unique(truth):
        of_class = distances[truth == label]
        own = of_class[:, label][:, None]
        nearer[label] = (own < of_class).mean(0) + (own == of_class).mean(0) / 2
    known = np.isfinite(distances).all(0)
    nearer[~known] = nearer[:, ~known] = np.nan
    return (nearer + nearer.T) / 2
