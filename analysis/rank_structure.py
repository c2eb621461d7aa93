"""Question 5, whether rank structure matters: effective rank by concept, and complexity.

Shape letters as in evidence.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats

from analysis.draws import ALPHA
from analysis.evidence import Evidence, none_for_nan, spearman

SAME_RANK = 1e-3  # effective ranks that differ by no more are rounding
NO_UPDATE = "no module has both of its layers among those looked at"


def rank_structure(
    evidence: Evidence, updates: np.ndarray, features: np.ndarray, described: np.ndarray, recall: np.ndarray
) -> dict:
    """Test whether the effective rank of updates differs by concept, and correlates with a concept's complexity.

    Where no module's effective rank varies, as at rank 1, the norm of the update is tested instead; where no module
    has both of its layers there is no update, and nothing is tested.

    Args:
        evidence: The evidence.
        updates: Effective rank and Frobenius norm of each update, float[N, P, 2 or more], of the modules of which both
            layers are among those of ``evidence``, in their order.
        features: Of each layer, standardised, float64[M, L, F], whose spread about a class's mean is one measure of its
            complexity.
        described: The LoRAs that they are of, int[M].
        recall: Share of each class that is recognised, float[C], NaN where that is not known: the other measure.
    """
    ranks, norms = updates[..., 0].astype(float), updates[..., 1].astype(float)
    answerable = _varies(ranks)
    layers_of = Counter(layer.module for layer in evidence.layers)
    modules = [module for module, layers in layers_of.items() if layers == 2]
    tested, why = None, NO_UPDATE
    if modules:
        tested = "effective rank" if answerable else "norm of the update"
        rank = ranks.max(initial=0)  # 1 of LoRAs of rank 1
        why = f"not answerable at rank {rank:.3g}: the effective rank never varies"
    records = rank_by_concept(evidence, modules, ranks if answerable else norms, SAME_RANK if answerable else 0.0)
    spread = spread_of_classes(features, evidence.y[described], len(evidence.classes))
    return {
        "answerable": answerable,
        "why": None if answerable else why,
        "tested": tested,
        "modules": records,
        "num_significant": sum(record["significant"] for record in records),
        "complexity": _complexity(evidence, ranks if answerable else None, norms, spread, recall),
    }


def _varies(ranks: np.ndarray) -> bool:
    """Test whether the effective ranks float[N, P] of any module vary; a zero update has no rank to differ by."""
    nonzero = ranks > 0
    largest = np.where(nonzero, ranks, -np.inf).max(0, initial=0)
    smallest = np.where(nonzero, ranks, np.inf).min(0, initial=np.inf)
    return bool((largest - smallest > SAME_RANK).any())


def _complexity(
    evidence: Evidence, ranks: np.ndarray | None, norms: np.ndarray, spread: np.ndarray, recall: np.ndarray
) -> dict:
    """Correlate the effective rank (the norm where ranks are None) of each concept's updates with its complexity.

    Args:
        evidence: The evidence.
        ranks: Effective rank of each update, float[N, P].
        norms: Norm of each update, float[N, P].
        spread: Of each class's features, float[C], NaN where it is not known.
        recall: Of each class, float[C], likewise.
    """
    rank_of_class, norm_of_class = _class_means(evidence, ranks), _class_means(evidence, norms)
    measure = norm_of_class if ranks is None else rank_of_class
    known_spread, known_recall = none_for_nan(spread), none_for_nan(recall)

    def correlation(other: np.ndarray) -> dict | None:
        if None in measure:
            return None
        known = ~np.isnan(other)
        return spearman(np.array(measure)[known], other[known])

    return {
        "by_class": [
            {
                "class": name,
                "effective_rank": rank_of_class[label],
                "norm": norm_of_class[label],
                "spread": known_spread[label],
                "recall": known_recall[label],
            }
            for label, name in enumerate(evidence.classes)
        ],
        "spearman_spread": correlation(spread),
        "spearman_recall": correlation(recall),
    }


def _class_means(evidence: Evidence, values: np.ndarray | None) -> list[float | None]:
    """Return the mean of float[N, P] over each class and all modules; None of each class where there are none."""
    if values is None or values.shape[1] == 0:
        return [None] * len(evidence.classes)
    return [values[evidence.y == label].mean() for label in range(len(evidence.classes))]


def rank_by_concept(evidence: Evidence, modules: Sequence[str], tested: np.ndarray, same: float) -> list[dict]:
    """Test float[N, P] by class (Kruskal-Wallis), once for each module; p adjusted by false discovery rate.

    Of a group, the LoRAs of one class count as one, their mean: they are not independent. A module whose numbers differ
    by no more than ``same`` has p = 1.
    """
    groups = np.arange(len(evidence.y)) if evidence.groups is None else evidence.groups
    units, of_unit = np.unique(np.stack([groups, evidence.y]), axis=1, return_inverse=True)
    sizes = np.bincount(of_unit.ravel())
    classes = range(len(evidence.classes))
    records = []
    for module, values in zip(modules, tested.T, strict=True):
        of_units = np.bincount(of_unit.ravel(), weights=values) / sizes
        statistic, p = 0.0, 1.0
        if np.ptp(of_units) > same:
            statistic, p = stats.kruskal(*(of_units[units[1] == label] for label in classes))
        medians = [np.median(values[evidence.y == label]) for label in classes]
        effect = statistic / (len(sizes) - 1)  # ε², the share of the ranks' variance that classes explain
        records.append({"module": module, "statistic": statistic, "effect": effect, "p": p, "median_by_class": medians})
    adjusted = stats.false_discovery_control([record["p"] for record in records]) if records else []
    return [record | {"p_fdr": p, "significant": p < ALPHA} for record, p in zip(records, adjusted, strict=True)]


def spread_of_classes(features: np.ndarray, y: np.ndarray, num_classes: int) -> np.ndarray:
    """Return root mean square distances of features float[M, L, F] from their class's mean, float64[C]; else NaN."""
    spread = np.full(num_classes, np.nan)
    for label in np.unique(y):
        of_class = features[y == label]
        spread[label] = np.sqrt(np.square(of_class - of_class.mean(0)).mean())
    return spread


def coinciding(features: np.ndarray, names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return features that are one and the same number in every LoRA and layer, and those that never vary.

    Args:
        features: Of some LoRAs, float[M, L, F].
        names: Of the F features.
    """
    columns = features.reshape(-1, len(names)).astype(float).T
    scale = np.abs(columns).max(1)
    constant: list[str] = []
    groups: list[list[int]] = []
    for index, (name, column) in enumerate(zip(names, columns, strict=True)):
        if np.ptp(column) <= 1e-5 * scale[index]:
            constant.append(name)
            continue
        slack = 1e-9 * scale[index]
        same = [group for group in groups if np.allclose(column, columns[group[0]], rtol=1e-4, atol=slack)]
        if same:
            same[0].append(index)
        else:
            groups.append([index])
    return [[names[index] for index in group] for group in groups if len(group) > 1], constant
