"""Questions 1 and 4: which layers predict the concept, and whether they carry different information.

Concepts and the attribution to layers stand here too. Shape letters as in evidence.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from analysis.chance import ChanceTest
from analysis.draws import ALPHA, PART, interval, parts_of
from analysis.evidence import LEAST_CORRELATED, Evidence, none_for_nan, spearman

COARSE_CLASSES = 4  # classes below which no clusters of them are looked for
CLUSTER_DISTANCE = 0.5  # 1 - CKA at which layers count as different
LEAST_OTHERS = 2  # layers beside the top ones, below which these are compared with none
LEAST_RANKED = 3  # layers that differ, below which rankings are not compared


# ----------------------------------------------------------------------------------------------------------------------
# 1. Which layers predict?
# ----------------------------------------------------------------------------------------------------------------------


def layer_ranking(evidence: Evidence, test: ChanceTest) -> dict:
    """Return accuracy and p of each layer alone, the ranking's stability, and averages by place in the network.

    Args:
        evidence: The evidence.
        test: Of the L layers.
    """
    correct = evidence.layer_predictions() == evidence.truth  # (L, R, T)
    accuracy, validation = test.accuracy, evidence.layer_validation().mean((1, 2))  # (L,)
    null_band = interval(test.null.ravel())
    drawn = evidence.draws.accuracies(list(correct), resample_runs=False)  # (L, B)
    intervals, in_top = evidence.draws.intervals(accuracy, drawn), top_share(drawn, evidence.top_k)
    kinds = ("role", "projection", "attention", "block")
    places = {kind: [getattr(layer, kind) for layer in evidence.layers] for kind in kinds}
    records = [
        {
            "layer": layer.name,
            "depth": depth,
            "module": layer.module,
            **{kind: values[depth] or None for kind, values in places.items()},
            "accuracy": accuracy[depth],
            "val_accuracy": validation[depth],
            "interval": intervals[depth],
            "p": test.p[depth],
            "p_family": test.p_family[depth],
            "p_f1": None if test.p_f1 is None else test.p_f1[depth],
            "above_null": test.above_null[depth],
            "above_chance": test.above_chance[depth],
            "top_k_share": in_top[depth],
        }
        for depth, layer in enumerate(evidence.layers)
    ]
    groups = {kind: _by_place(values, accuracy, drawn, test.above_null) for kind, values in places.items()}
    first = evidence.ranking[0]
    return {
        "chance": evidence.chance,
        "null_band": null_band,
        "needed": test.guessed[first] + test.margin,
        "num_above_null": int(test.above_null.sum()),
        "num_above_chance": int(test.above_chance.sum()),
        "num_above_null_f1": None if test.p_f1 is None else int((test.p_f1 < ALPHA).sum()),
        "records": records,
        "stability": {"kendall_w": kendall_w(correct.mean(2)), "runs": correct.shape[1]},
        "rankings": compare_rankings(evidence, accuracy, validation),
        "depth": depth_trend(evidence, accuracy, test.above_null),
        "groups": groups,
        "better_role": _better_role(groups["role"]) if test.above_null.any() else None,
    }


def depth_trend(evidence: Evidence, accuracy: np.ndarray, above_null: np.ndarray) -> dict:
    """Correlate depth with accuracy float[L], over blocks, less what the role of a layer explains.

    Layers of a block share much, and down and up factors alternate and differ in what they know: over single layers
    chance decides a trend in half of the collections that have none. So of each layer the mean accuracy of its role is
    subtracted, and blocks, in the network's order, are what is correlated, each by its mean. ``why`` says why there is
    no answer, and is None where there is one. A module outside of all blocks is a block of its own.
    """
    blocks = [layer.block or layer.module for layer in evidence.layers]
    roles, names = np.array([layer.role for layer in evidence.layers]), list(dict.fromkeys(blocks))
    rest = accuracy.copy()
    for role in np.unique(roles):
        rest[roles == role] -= accuracy[roles == role].mean()
    means = np.array([rest[[block == name for block in blocks]].mean() for name in names])
    correlation, why = None, None
    if len(names) < LEAST_CORRELATED:
        why = f"fewer than {LEAST_CORRELATED} blocks"
    elif above_null.sum() < LEAST_CORRELATED:
        why = f"fewer than {LEAST_CORRELATED} layers are above chance"
    else:
        correlation = spearman(np.arange(len(names)), np.round(means, 12))
        why = "all blocks are equally accurate" if correlation is None else None
    missing = dict.fromkeys(("r", "interval", "p"))
    return {"blocks": len(names), "why": why, **(correlation or missing)}


def _better_role(roles: dict[str, dict]) -> str | None:
    """Return the role whose layers are more accurate, their intervals apart; None where they overlap."""
    if len(roles) < 2:
        return None
    (second, first) = sorted(roles, key=lambda role: roles[role]["mean"])[-2:]
    return first if roles[first]["interval"][0] > roles[second]["interval"][1] else None


def _by_place(places: list[str], accuracy: np.ndarray, drawn: np.ndarray, above_null: np.ndarray) -> dict[str, dict]:
    """Average the layers of each place, in the network's order; those without a place are left out."""
    values = np.array(places)
    return {
        value: {
            "layers": int((values == value).sum()),
            "mean": accuracy[values == value].mean(),
            "interval": interval(drawn[values == value].mean(0)),
            "above_null": int(above_null[values == value].sum()),
        }
        for value in dict.fromkeys(places)
        if value
    }


def top_share(drawn: np.ndarray, top_k: int) -> np.ndarray:
    """Return the share of draws float[L, B] in which each layer is among the top k: float64[L], whose sum is k.

    Layers that tie for the last places share them: else the first ones in the network would always win.
    """
    last, shared, shares = np.empty(drawn.shape[1]), np.empty(drawn.shape[1]), np.empty(len(drawn))
    for part in parts_of(*drawn.shape[::-1]):
        columns = drawn[:, part]
        last[part] = np.partition(columns, -top_k, axis=0)[-top_k]
        shared[part] = (top_k - (columns > last[part]).sum(0)) / (columns == last[part]).sum(0)
    for part in parts_of(*drawn.shape):
        shares[part] = ((drawn[part] > last) + (drawn[part] == last) * shared).mean(1)
    return shares


def kendall_w(scores: np.ndarray) -> float | None:
    """Return Kendall's W of float[L, R]: 1 where all runs rank the layers alike, about 1 / R where at random.

    ``chi² / (R (L - 1))`` of Friedman's test, corrected for ties. Layers of equal scores in all runs, such as those
    that always say the same class, count once: else they agree with each other alone. None for one run or fewer than
    three layers that differ.
    """
    distinct = np.unique(np.round(scores, 12), axis=0)
    layers, runs = distinct.shape
    if runs < 2 or layers < LEAST_RANKED or (np.ptp(distinct, axis=0) == 0).all():
        return None
    return float(stats.friedmanchisquare(*distinct).statistic / (runs * (layers - 1)))


def kendall_tau(a: np.ndarray, b: np.ndarray) -> dict:
    """Return Kendall's tau of two scores float[L] of the layers, and its p; None of fewer than three that differ."""
    distinct = np.unique(np.round(np.stack([a, b]), 12), axis=1)
    if distinct.shape[1] < LEAST_RANKED or (np.ptp(distinct, axis=1) == 0).any():
        return {"kendall_tau": None, "p": None}
    test = stats.kendalltau(*distinct)
    return {"kendall_tau": test.statistic, "p": test.pvalue}


def order_of(*scores: np.ndarray) -> np.ndarray:
    """Return the layers in the order of scores float[L], highest first, int[L]; later scores break ties, then depth.

    Scores are rounded to 12 decimals, as those of the ranking are: sums in another order must not decide a tie.
    """
    return np.lexsort([-np.round(score, 12) for score in reversed(scores)])


def compare_rankings(evidence: Evidence, accuracy: np.ndarray, validation: np.ndarray) -> dict:
    """Compare the rankings of the layers by test and by validation accuracy, float[L] each, ties broken as there."""
    loss = evidence.layer_validation_loss()
    top = [
        set(order[: evidence.top_k].tolist())
        for order in (order_of(accuracy, validation, -loss), order_of(validation, -loss))
    ]
    return kendall_tau(accuracy, validation) | {"same_top_k": len(top[0] & top[1])}


# ----------------------------------------------------------------------------------------------------------------------
# 4. Do layers carry different information?
# ----------------------------------------------------------------------------------------------------------------------


def layer_information(evidence: Evidence, test: ChanceTest, features: np.ndarray, described: np.ndarray) -> dict:
    """Compare layers with each other: their answers, what several know that one does not, and their features.

    Args:
        evidence: The evidence.
        test: Of the L layers.
        features: Of each layer, standardised, float64[M, L, F].
        described: The LoRAs that they are of, int[M].
    """
    predicted = evidence.layer_predictions()  # (L, R, T)
    disagreement, kappa = disagreement_and_kappa(predicted, len(evidence.classes))
    top = evidence.ranking[: evidence.top_k]
    of_two_layers = ~np.eye(len(predicted), dtype=bool)
    answers = {
        name: {"mean": of_pairs[of_two_layers].mean(), "top_k": of_pairs[np.ix_(top, top)]}
        for name, of_pairs in (("disagreement", disagreement), ("kappa", kappa))
    }
    del disagreement, kappa  # float[L, L] each
    tree, clusters = layer_clusters(features)
    train = np.isin(described, evidence.rows["train"])
    of_class = concept_clusters(features[train], evidence.y[described[train]], len(evidence.classes))
    count = int(clusters.max())
    return {
        **answers,
        "union": _union(evidence, predicted[top]),
        "clusters": {
            "linkage": tree,
            "order": hierarchy.leaves_list(tree),
            "of_layer": clusters,
            "threshold": CLUSTER_DISTANCE,
            "count": count,
            "members": [_members(evidence, cluster, clusters) for cluster in range(1, count + 1)],
        },
        "concept_clusters": None if of_class is None else {"of_class": of_class, "count": int(of_class.max())},
        "coarse": None if of_class is None else _coarse_and_fine(evidence, test, of_class),
    }


def _union(evidence: Evidence, predicted: np.ndarray) -> dict:
    """Compare what the top k, int[k, R, T], know together with what the best of them knows alone.

    ``any_of_top_k`` is the share of LoRAs that at least one of them recognises, which guessing raises too: what chance
    gives stands in cross_fitting.py, as the choice of the top k is part of it.
    """
    truth = evidence.truth
    best, union, vote = predicted[0] == truth, (predicted == truth).any(0), vote_of(predicted) == truth
    of_union, of_vote = evidence.draws.differences([(union, best), (vote, best)])
    return {
        "best_alone": best.mean(),
        "any_of_top_k": union.mean(),
        "gain": of_union["difference"],
        "interval": of_union["interval"],
        "vote": vote.mean(),
        "vote_gain": of_vote["difference"],
        "vote_interval": of_vote["interval"],
    }


def vote_of(predicted: np.ndarray) -> np.ndarray:
    """Return the class that most of k layers predict, int[k, R, T] -> int[R, T]; the better ranked where they tie."""
    flat = predicted.reshape(len(predicted), -1)
    cells = flat.astype(np.int64) * flat.shape[1] + np.arange(flat.shape[1])  # one for each class of each run and LoRA
    votes = np.bincount(cells.ravel())[cells]  # (k, R * T): how many predict the same class as this one
    return np.take_along_axis(flat, votes.argmax(0)[None], 0)[0].reshape(predicted.shape[1:])


def disagreement_and_kappa(predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return disagreement and Cohen's kappa (1960) of every two layers int[L, R, T], run by run: float64[L, L] each.

    Kappa is ``(agreement - expected) / (1 - expected)``, expected from how often each of the two predicts each class; 1
    where both always predict one and the same.
    """
    layers, runs, size = predicted.shape
    predicted = predicted.astype(np.min_scalar_type(num_classes))  # compared many times
    agreement = np.stack([(predicted == of_layer).sum((1, 2)) for of_layer in predicted]) / (runs * size)
    expected = np.zeros((layers, layers))
    for label in range(num_classes):
        share = (predicted == label).mean(2)  # (L, R)
        expected += share @ share.T / runs
    certain = expected >= 1 - 1e-12
    return 1 - agreement, np.where(certain, 1.0, (agreement - expected) / np.where(certain, 1.0, 1 - expected))


def linear_cka(features: np.ndarray, block: int = PART) -> np.ndarray:
    """Return linear CKA of every two layers' features (Kornblith et al., 2019), float[M, L, F] -> float64[L, L].

    ``|XᵀY|² / (|XᵀX| |YᵀY|)`` of centred columns; 1 for features that are a rotation of each other, 0 for uncorrelated
    ones and, by convention, for a layer without any variance.

    Args:
        features: float[M, L, F].
        block: Inner products that are held at a time.
    """
    size, layers, width = features.shape
    columns = features.reshape(size, -1).astype(np.float64)
    columns -= columns.mean(0)
    cross = np.empty((layers, layers))
    for part in parts_of(layers, layers * width**2, block):
        rows, rest = slice(part.start * width, part.stop * width), slice(part.start * width, None)
        gram = columns[:, rows].T @ columns[:, rest]  # with those from the part on: the others are known
        np.square(gram, out=gram)
        cross[part, part.start :] = gram.reshape(part.stop - part.start, width, -1, width).sum((1, 3))
        cross[part.start :, part] = cross[part, part.start :].T
    norm = np.sqrt(np.diag(cross))
    scale = np.outer(norm, norm)
    return np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 0)


def layer_clusters(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return average linkage of layers on 1 - CKA, float64[L - 1, 4], and the cluster of each, from 1, int[L]."""
    distance = np.clip(1 - linear_cka(features), 0, None)
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), "average")
    return tree, hierarchy.fcluster(tree, CLUSTER_DISTANCE, "distance")


def concept_clusters(features: np.ndarray, y: np.ndarray, num_classes: int) -> np.ndarray | None:
    """Return the cluster of each class, from 1, int[C]: Ward's method on class means of features float[M, L, F].

    As many clusters as the root of C, rounded. None below four classes, where coarse and fine are one, and where a
    class is not among y.
    """
    if num_classes < COARSE_CLASSES or len(np.unique(y)) < num_classes:
        return None
    means = np.stack([features[y == label].mean(0).ravel() for label in range(num_classes)])
    return hierarchy.fcluster(hierarchy.linkage(means, "ward"), round(math.sqrt(num_classes)), "maxclust")


def _coarse_and_fine(evidence: Evidence, test: ChanceTest, of_class: np.ndarray) -> dict:
    """Compare the top layers with the others: in separating clusters of concepts, and concepts within a cluster.

    Coarse: share of LoRAs whose cluster is right, from 0 (chance) to 1. Fine: of those, share whose concept is right,
    likewise. Chance is the largest cluster, and the largest class within each cluster. The top layers are those by
    validation, the others those that know something, family-wise: the lucky ones of many that know nothing would all
    be right about concepts on the very LoRAs that they are compared on.
    ``why`` says why there is no answer, and is None where there is one.
    """
    predicted, k = evidence.layer_predictions(), evidence.top_k
    by_validation = order_of(evidence.layer_validation().mean((1, 2)), -evidence.layer_validation_loss())
    top, others = by_validation[:k], [layer for layer in by_validation[k:].tolist() if test.above_null[layer]]
    cluster, sizes = of_class[evidence.truth], np.bincount(evidence.truth, minlength=len(of_class))
    largest = np.array([sizes[of_class == label].max() for label in range(1, of_class.max() + 1)])
    chance = {"coarse": np.bincount(cluster).max() / len(cluster), "fine": largest.sum() / len(cluster)}
    missing = dict.fromkeys(("top_k", "others", "coarse", "fine"))
    top_layers = "the top layer" if k == 1 else f"the top {k}"
    if len(others) < LEAST_OTHERS:
        return missing | {"why": f"fewer than {LEAST_OTHERS} layers beside {top_layers} are above chance"}
    if max(chance.values()) == 1:
        return missing | {"why": "all test LoRAs are of one cluster, or each of a cluster of its own"}
    right = predicted == evidence.truth  # (L, R, T)
    right_cluster = np.stack([of_class[of_layer] == cluster for of_layer in predicted])

    def means(hits: np.ndarray, of_draws: bool) -> list[np.ndarray]:
        """Return the mean share of hits bool[L, R, T] of the top layers and of the others, in each draw or as seen."""
        shares = evidence.draws.accuracies(list(hits), resample_runs=False) if of_draws else hits.mean((1, 2))[:, None]
        return [shares[layers].mean(0) for layers in (top, others)]

    def scores(in_cluster: np.ndarray, exact: np.ndarray) -> dict[str, np.ndarray]:
        """Return the coarse and the fine score of some layers, from 0, chance, to 1."""
        values = {"coarse": in_cluster, "fine": exact / np.maximum(in_cluster, 1 / len(cluster))}
        return {name: (value - chance[name]) / (1 - chance[name]) for name, value in values.items()}

    of_top, of_others = map(scores, means(right_cluster, False), means(right, False))
    drawn_top, drawn_others = map(scores, means(right_cluster, True), means(right, True))
    return {
        "top_k": {name: value[0] for name, value in of_top.items()},
        "others": {name: value[0] for name, value in of_others.items()},
        **{
            name: {
                "difference": sign * (of_top[name] - of_others[name])[0],
                "interval": interval(sign * (drawn_top[name] - drawn_others[name])),
            }
            for name, sign in (("coarse", 1), ("fine", -1))  # what is expected is positive
        },
        "why": None,
    }


def _members(evidence: Evidence, cluster: int, clusters: np.ndarray) -> dict:
    """Count the roles and projections of a cluster's layers."""
    inside = [layer for layer, number in zip(evidence.layers, clusters, strict=True) if number == cluster]
    projections = [layer.projection or "other" for layer in inside]
    return {
        "cluster": cluster,
        "layers": len(inside),
        "roles": dict(sorted(Counter(layer.role for layer in inside).items())),
        "projections": dict(sorted(Counter(projections).items())),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Concepts, and the attribution to layers
# ----------------------------------------------------------------------------------------------------------------------


def recalls(evidence: Evidence, predicted: np.ndarray) -> np.ndarray:
    """Return the share of each class's test LoRAs that is recognised, mean over runs: int[..., R, T] -> float[..., C].

    NaN of a class without a test LoRA.
    """
    correct = (predicted == evidence.truth).mean(-2)
    sizes = np.bincount(evidence.truth, minlength=len(evidence.classes))
    of_class = [correct[..., evidence.truth == label].sum(-1) for label in range(len(evidence.classes))]
    sums = np.stack(of_class, axis=-1)
    return np.divide(sums, sizes, out=np.full(sums.shape, np.nan), where=sizes > 0)


def concepts(evidence: Evidence, names: Sequence[str]) -> dict:
    """Return the recall of each concept by each layer alone, and its drop by the ablation; None without a test LoRA."""
    baseline = {name: recalls(evidence, evidence.predicted("baseline", name)) for name in names}
    ablation = {name: recalls(evidence, evidence.predicted("ablation", name)) for name in names}
    return {
        "classes": list(evidence.classes),
        "recall": none_for_nan(recalls(evidence, evidence.layer_predictions())),
        "baseline": {name: none_for_nan(baseline[name]) for name in names},
        "drop": {name: none_for_nan(baseline[name] - ablation[name]) for name in names},
    }


def attribution(evidence: Evidence, name: str, shares: np.ndarray, accuracy: np.ndarray) -> dict:
    """Compare gradient attribution of the all-layer classifier, float[R, L], with layers' own accuracies, float[L]."""
    by_layer = shares.mean(0)
    correlation = spearman(accuracy, by_layer) or {"r": None, "interval": None, "p": None}
    return {
        "representation": name,
        "by_layer": by_layer / (by_layer.sum() or 1.0),
        "spearman": correlation["r"],
        "interval": correlation["interval"],
        "p": correlation["p"],
        "same_top_k": len(set(order_of(by_layer)[: evidence.top_k]) & set(evidence.ranking[: evidence.top_k].tolist())),
    }
