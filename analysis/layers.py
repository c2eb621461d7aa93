"""What single layers tell: which of them predict the concept, and whether they know different things.

The first and the fourth question of analysis.py. Shape letters: N LoRAs, n test LoRAs, L layers in the network's order,
R runs, C classes, B draws.
"""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from analysis.evidence import ALPHA, Evidence, exceedance, interval, spearman

COARSE_CLASSES = 4  # classes below which no clusters of them are looked for
CLUSTER_DISTANCE = 0.5  # 1 - CKA at which layers count as different


# ----------------------------------------------------------------------------------------------------------------------
# 1. Which layers predict?
# ----------------------------------------------------------------------------------------------------------------------

_PROJECTION = re.compile(
    r"_(to_(?:[qkv]|out)|add_[qkv]_proj|to_add_out|[qkvo]_proj|out_proj|(?:gate|up|down)_proj|qkv|proj_in|proj_out"
    r"|ff_net|ff_context_net|fc[12]|conv\w*)(?:_\d+)?(?:_proj)?$"
)
_ATTENTION = re.compile(r"_(attn\d?|self_attn|cross_attn|img_attn|txt_attn)(?:_|$)")
_BLOCK = re.compile(
    r"(?:^|_)((?:down|up)_blocks_\d+|mid_block|(?:single_)?transformer_blocks_\d+|(?:double|single)_blocks_\d+"
    r"|layers_\d+|blocks_\d+)"
)


def place(module: str) -> dict[str, str | None]:
    """What a module's canonical name tells of its place: projection, kind of attention, block; None where it does not.

    Example:
        >>> place("unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0")
        {'projection': 'to_out', 'attention': 'attn2', 'block': 'down_blocks_0'}
    """
    found = {"projection": _PROJECTION, "attention": _ATTENTION, "block": _BLOCK}
    matches = {name: pattern.search(module) for name, pattern in found.items()}
    return {name: match[1] if match else None for name, match in matches.items()}


def layer_ranking(e: Evidence) -> dict:
    """Each layer alone: accuracy, p against chance, how stable the ranking is, and where in the network it is high."""
    predicted = e.predicted("layers")  # (L, R, n)
    correct = predicted == e.truth
    accuracy, drawn = correct.mean((1, 2)), e.draws.accuracies(list(correct), runs=False)  # (L,), (L, B)
    null = e.null(predicted)
    p, p_family = exceedance(accuracy, null), exceedance(accuracy, null.max(1, keepdims=True))
    validation = e.validated("layers").mean((1, 2))
    intervals, in_top = interval(drawn), top_share(drawn, e.top_k)
    records = [
        {
            "layer": layer.name,
            "depth": depth,
            "module": layer.module,
            "role": layer.role,
            **place(layer.module),
            "accuracy": accuracy[depth],
            "val_accuracy": validation[depth],
            "interval": intervals[depth],
            "p": p[depth],
            "p_family": p_family[depth],
            "above_null": p_family[depth] < ALPHA,
            "top_k_share": in_top[depth],
        }
        for depth, layer in enumerate(e.layers)
    ]
    groups: dict[str, dict] = {}
    for kind in ("role", "projection", "attention", "block"):
        values = np.array([record[kind] or "" for record in records])
        groups[kind] = {
            value: {
                "layers": int((values == value).sum()),
                "mean": accuracy[values == value].mean(),
                "interval": interval(drawn[values == value].mean(0)),
            }
            for value in dict.fromkeys(values.tolist())
            if value
        }
    return {
        "chance": e.chance,
        "null_band": interval(null.ravel()),
        "null_max": np.quantile(null.max(1), 1 - ALPHA),
        "num_above_null": int((p_family < ALPHA).sum()),
        "records": records,
        "stability": {"kendall_w": kendall_w(correct.mean(2)), "runs": correct.shape[1]},
        "rankings": rankings_agree(accuracy, validation, e.top_k),
        "depth": spearman(np.arange(len(accuracy)), accuracy),
        "groups": groups,
    }


def top_share(drawn: np.ndarray, top_k: int) -> np.ndarray:
    """How often each layer is among the top k of draws float[L, B]: float64[L], whose sum is k.

    Layers that tie for the last places share them: else the first ones in the network would always win.
    """
    last = np.partition(drawn, -top_k, axis=0)[-top_k]  # (B,)
    above, level = drawn > last, drawn == last
    return (above + level * ((top_k - above.sum(0)) / level.sum(0))).mean(1)


def kendall_w(scores: np.ndarray) -> float | None:
    """Kendall's W of float[L, R]: 1 where all runs rank the layers alike, about 1 / R where at random.

    ``chi² / (R (L - 1))`` of Friedman's test, corrected for ties; None for one run or fewer than three layers.
    """
    layers, runs = scores.shape
    if runs < 2 or layers < 3 or (np.ptp(scores, axis=0) == 0).all():
        return None
    return float(stats.friedmanchisquare(*scores).statistic / (runs * (layers - 1)))


def rankings_agree(a: np.ndarray, b: np.ndarray, top_k: int) -> dict:
    """How far two rankings of the layers agree, given their scores."""
    top = [set(np.argsort(-scores, kind="stable")[:top_k].tolist()) for scores in (a, b)]
    constant = np.ptp(a) == 0 or np.ptp(b) == 0
    found = None if constant else stats.kendalltau(a, b)
    return {
        "kendall_tau": found.statistic if found else None,
        "p": found.pvalue if found else None,
        "same_top_k": len(top[0] & top[1]),
    }


# ----------------------------------------------------------------------------------------------------------------------
# 4. Do layers carry different information?
# ----------------------------------------------------------------------------------------------------------------------


def layer_information(e: Evidence, features: np.ndarray, described: np.ndarray) -> dict:
    """How differently layers predict, what several know that one does not, and which are alike.

    Args:
        e: The evidence.
        features: Of each layer, standardised, float64[M, L, F].
        described: The LoRAs that they are of, int[M].
    """
    predicted = e.predicted("layers")  # (L, R, n)
    disagreement, kappa = agreement(predicted, len(e.classes))
    top, others = e.ranking[: e.top_k], e.ranking[e.top_k :]
    apart = ~np.eye(len(predicted), dtype=bool)
    tree, clusters = layer_clusters(features)
    train = np.isin(described, e.rows["train"])
    of_class = concept_clusters(features[train], e.y[described[train]], len(e.classes))
    return {
        "disagreement": {"mean": disagreement[apart].mean(), "top_k": disagreement[np.ix_(top, top)]},
        "kappa": {"mean": kappa[apart].mean(), "top_k": kappa[np.ix_(top, top)]},
        "union": _union(e, predicted[top]),
        "clusters": {
            "linkage": tree,
            "order": hierarchy.leaves_list(tree),
            "of_layer": clusters,
            "threshold": CLUSTER_DISTANCE,
            "count": int(clusters.max()),
            "members": [_members(e, cluster, clusters) for cluster in range(1, int(clusters.max()) + 1)],
        },
        "concept_clusters": None if of_class is None else {"of_class": of_class, "count": int(of_class.max())},
        "coarse": None if of_class is None else _coarse_and_fine(e, predicted, top, others, of_class),
    }


def _union(e: Evidence, predicted: np.ndarray) -> dict:
    """What the top k, int[k, R, n], know that the best of them alone does not.

    ``any_of_top_k`` is the share of LoRAs that at least one of them recognises, which guessing raises too:
    ``any_by_chance`` is the same for labels that are drawn anew. ``vote`` is what most of them say, the better ranked
    where they tie: what a single answer can have of it.
    """
    votes = (predicted[:, None] == predicted[None]).sum(1)  # (k, R, n): how many say what this one says
    vote = np.take_along_axis(predicted, votes.argmax(0)[None], 0)[0] == e.truth
    said = np.stack([(predicted == c).any(0).mean() for c in range(len(e.classes))])
    by_chance = (said * np.bincount(e.truth, minlength=len(e.classes))).sum() / len(e.truth)
    best, union = predicted[0] == e.truth, (predicted == e.truth).any(0)
    drawn = e.draws.accuracies([best, union, vote])
    return {
        "best_alone": best.mean(),
        "any_of_top_k": union.mean(),
        "any_by_chance": by_chance,
        "gain": union.mean() - best.mean(),
        "interval": interval(drawn[1] - drawn[0]),
        "vote": vote.mean(),
        "vote_gain": vote.mean() - best.mean(),
        "vote_interval": interval(drawn[2] - drawn[0]),
    }


def agreement(predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Disagreement and Cohen's kappa (1960) of every two layers' predictions int[L, R, n], run by run: float64[L, L].

    Kappa is ``(agreement - expected) / (1 - expected)``, expected from how often each of the two says each class; 1
    where both always say one and the same.
    """
    layers, runs, n = predicted.shape
    predicted = predicted.astype(np.min_scalar_type(num_classes))  # compared many times
    agree = np.stack([(predicted == of_layer).sum((1, 2)) for of_layer in predicted]) / (runs * n)
    expected = np.zeros((layers, layers))
    for c in range(num_classes):
        share = (predicted == c).mean(2)  # (L, R)
        expected += share @ share.T / runs
    certain = expected >= 1 - 1e-12
    return 1 - agree, np.where(certain, 1.0, (agree - expected) / np.where(certain, 1.0, 1 - expected))


def linear_cka(features: np.ndarray) -> np.ndarray:
    """Linear CKA of every two layers' features (Kornblith et al., 2019), float[N, L, F] -> float64[L, L].

    ``|XᵀY|² / (|XᵀX| |YᵀY|)`` of centred columns; 1 for features that are a rotation of each other, 0 for uncorrelated
    ones and, by convention, for a layer without any variance.
    """
    n, layers, width = features.shape
    x = features.reshape(n, -1).astype(np.float64)
    x = x - x.mean(0)
    gram = (x.T @ x).reshape(layers, width, layers, width)
    cross = np.square(gram).sum((1, 3))  # (L, L)
    norm = np.sqrt(np.diag(cross))
    scale = np.outer(norm, norm)
    return np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 0)


def layer_clusters(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average linkage of layers on 1 - CKA, float64[L - 1, 4], and the cluster of each layer, from 1, int[L]."""
    distance = np.clip(1 - linear_cka(features), 0, None)
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), "average")
    return tree, hierarchy.fcluster(tree, CLUSTER_DISTANCE, "distance")


def concept_clusters(features: np.ndarray, y: np.ndarray, num_classes: int) -> np.ndarray | None:
    """Cluster of each class, from 1, int[C]: Ward's method on class means of standardised features float[N, L, F].

    As many clusters as the root of C, rounded. None below four classes, where coarse and fine are one, and where a
    class is not among y.
    """
    if num_classes < COARSE_CLASSES or len(np.unique(y)) < num_classes:
        return None
    means = np.stack([features[y == c].mean(0).ravel() for c in range(num_classes)])
    return hierarchy.fcluster(hierarchy.linkage(means, "ward"), round(math.sqrt(num_classes)), "maxclust")


def _coarse_and_fine(
    e: Evidence, predicted: np.ndarray, top: np.ndarray, others: np.ndarray, of_class: np.ndarray
) -> dict | None:
    """Whether the top layers tell clusters of concepts apart, and others concepts within a cluster.

    Coarse: share of LoRAs whose cluster is right, from 0 (chance) to 1. Fine: of those, share whose concept is right,
    likewise. Chance is the largest cluster, and the largest class within each cluster. None where either is all there
    is among the test LoRAs.
    """
    if len(others) == 0:
        return None
    cluster = of_class[e.truth]
    coarse_chance = np.bincount(cluster).max() / len(cluster)
    sizes = np.bincount(e.truth, minlength=len(of_class))
    largest = np.array([sizes[of_class == c].max() for c in range(1, of_class.max() + 1)])
    fine_chance = largest.sum() / len(cluster)
    if max(coarse_chance, fine_chance) == 1:
        return None
    right = predicted == e.truth  # (L, R, n)
    right_cluster = np.stack([of_class[of_layer] == cluster for of_layer in predicted])
    drawn = e.draws.accuracies([*right_cluster, *right], runs=False)
    hits = np.concatenate([right_cluster.mean((1, 2)), right.mean((1, 2))])[:, None]

    def scores(of: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        in_cluster, exact = values[of].mean(0), values[len(predicted) + of].mean(0)
        fine = exact / np.maximum(in_cluster, 1 / len(cluster))
        return (in_cluster - coarse_chance) / (1 - coarse_chance), (fine - fine_chance) / (1 - fine_chance)

    def apart(values: np.ndarray) -> np.ndarray:
        (a, b), (c, d) = scores(top, values), scores(others, values)
        return (a - b) - (c - d)

    told = {name: scores(of, hits) for name, of in (("top_k", top), ("others", others))}
    return {name: {"coarse": coarse[0], "fine": fine[0]} for name, (coarse, fine) in told.items()} | {
        "difference": apart(hits)[0],
        "interval": interval(apart(drawn)),
    }


def _members(e: Evidence, cluster: int, clusters: np.ndarray) -> dict:
    inside = [layer for layer, c in zip(e.layers, clusters, strict=True) if c == cluster]
    projections = [place(layer.module)["projection"] or "other" for layer in inside]
    return {
        "cluster": cluster,
        "layers": len(inside),
        "roles": dict(sorted(Counter(layer.role for layer in inside).items())),
        "projections": dict(sorted(Counter(projections).items())),
    }
