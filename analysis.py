"""What the numbers mean: controls, curves, intervals, and a verdict on each question.

Pure functions on finished predictions and cached features; nothing is trained here but the small scikit-learn
classifiers of `cheap_explanations`. The second question has a module of its own, controls.py.

Shape letters: N LoRAs, n test LoRAs, L layers in the network's order, P modules, R runs, C classes, B draws.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from controls import Conditions, conditional_importance, robustness
from evidence import (
    ALPHA,
    LEVEL,
    PERMUTATIONS,
    RESAMPLES,
    Draws,
    Evidence,
    estimate,
    exceedance,
    holm,
    interval,
    sign_p,
    spearman,
    stream,
)

STEEP = 0.5  # of the range of a removal curve, above which a step is none of a graceful degradation
COARSE_CLASSES = 4  # classes below which no clusters of them are looked for
CHEAP_ROWS = 10_000  # train rows that a cheap explanation is fitted on at most
FEATURE_NUMBERS = 2**24  # of features that what describes them only (CKA, clusters, spread) looks at, at most
CLIP = 10.0  # standard deviations beyond which a feature is an outlier of a heavy tail, as in training
SAME_RANK = 1e-3  # effective ranks that differ by no more are rounding
NO_UPDATE = "no module has both of its layers among those looked at"
CLUSTER_DISTANCE = 0.5  # 1 - CKA at which layers count as different


@dataclass(frozen=True)
class Controls:
    """What was computed to compare with; each may be empty or None.

    Attributes:
        level: As --controls gives it.
        conditions: Of each representation, the conditions and what test LoRAs are taken for, int[K, R, n].
        attributed: Representation, and shares of its gradient attribution, float[R, L].
        cheap: Features of explanations without weights, float[N, F] or None each.
        unused: Columns that look like groups and were not used.
        grouped: Of a split by the first of them that allows one: representation, and truth int[m], groups int[m] and
            predictions int[R, m] of its test LoRAs.
        shuffled: Accuracy of each layer on shuffled labels, one run, float[shuffles, L].
    """

    level: str
    conditions: dict[str, tuple[Conditions, np.ndarray]] = field(default_factory=dict)
    attributed: tuple[str, np.ndarray] | None = None
    cheap: dict[str, np.ndarray | None] = field(default_factory=dict)
    unused: Sequence[str] = ()
    grouped: tuple[str, np.ndarray, np.ndarray, np.ndarray] | None = None
    shuffled: np.ndarray | None = None


def analyse(
    e: Evidence,
    names: Sequence[str],
    stats_features: np.ndarray,
    updates: np.ndarray,
    samples: dict[str, tuple[np.ndarray, Sequence[str]]],
    controls: Controls,
) -> dict:
    """The answers to the five questions, as `analysis` of results.json.

    Args:
        e: The evidence.
        names: Representations that were run with and without the top layers.
        stats_features: Statistics of each layer, float[N, L, 7].
        updates: Effective rank and Frobenius norm of each update, float[N, P, 2 or more]; see `rank_structure`.
        samples: Features of some LoRAs by representation, float[., L, F], with their names.
        controls: What to compare with.
    """
    # By validation: what is compared with explanations without weights must not be chosen by what it is tested on.
    best = max(names, key=lambda name: e.validated(f"baseline/{name}").mean(), default=None)
    best_predicted = e.predicted(f"baseline/{best}") if best else e.predicted("layers")[e.ranking[0]]
    described = some_rows(e.y, FEATURE_NUMBERS // math.prod(stats_features.shape[1:]), e.seed)
    features = standardised(stats_features[described])
    found: dict[str, object] = {
        "controls": controls.level,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "permutations": PERMUTATIONS,
        "permuted": "LoRAs" if e.groups is None else "groups",
        "units": len(np.unique(e.test_groups)),
        "rows_described": len(described),
        "layers": layer_ranking(e),
        "robustness": {name: robustness(e, *measured) for name, measured in controls.conditions.items()},
        "representations": representations(e, names) if names else None,
        "layer_information": layer_information(e, features, described),
        "rank_structure": rank_structure(e, updates, features, described, recalls(e, best_predicted)),
        "concepts": concepts(e, names),
    }
    merged = {name: coinciding(*sample) for name, sample in samples.items()}
    found["rank_structure"]["coinciding"] = {name: same for name, (same, _) in merged.items() if same}
    found["rank_structure"]["constant"] = {name: constant for name, (_, constant) in merged.items() if constant}
    conditional = [
        conditional_importance(e, conditions, predicted)
        for conditions, predicted in controls.conditions.values()
        if any(name.startswith("plus ") for name in conditions.names)
    ]
    if conditional:
        found["conditional"] = conditional[0]
    accuracy = np.array([record["accuracy"] for record in found["layers"]["records"]])
    found["attribution"] = attribution(e, *controls.attributed, accuracy) if controls.attributed else None
    found["rank_structure"]["complexity"]["recall_by"] = best
    found["cheap"] = cheap_explanations(e, controls.cheap, best_predicted) if controls.cheap else None
    if controls.cheap:
        found["cheap"]["compared_with"] = best
    found["groups"] = grouped_split(e, controls.unused, controls.grouped) if controls.unused else None
    found["null_shuffles"] = null_shuffles(e, controls.shuffled) if controls.shuffled is not None else None
    found["hypotheses"] = hypotheses(found)
    return plain(found)


def some_rows(y: np.ndarray, at_most: int, seed: int) -> np.ndarray:
    """Rows of y, all or as evenly from its classes as ``at_most`` of them can be drawn, int64[n], ascending."""
    if len(y) <= at_most:
        return np.arange(len(y))
    drawn = stream(seed, "rows described").permutation(len(y))
    by_class, sizes = drawn[np.argsort(y[drawn], kind="stable")], np.bincount(y)
    place = np.arange(len(y)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # among those of its class
    return np.sort(by_class[np.argsort(place, kind="stable")[: max(1, at_most)]])


def standardised(features: np.ndarray) -> np.ndarray:
    """Each feature of each layer with mean 0 and variance 1, then clipped: float[N, L, F] -> float64[N, L, F].

    A constant one (see `stacked_training.mean_and_scale`) is 0.
    """
    x = features.astype(np.float64)
    std, largest = x.std(0), np.abs(x).max(0)
    x -= x.mean(0)
    return np.clip(np.divide(x, std, out=np.zeros_like(x), where=std > 1e-6 * largest), -CLIP, CLIP)


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
        "rankings": _agreement(accuracy, validation, e.top_k),
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


def _agreement(a: np.ndarray, b: np.ndarray, top_k: int) -> dict:
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
# 3. Which representation is best?
# ----------------------------------------------------------------------------------------------------------------------


def representations(e: Evidence, names: Sequence[str]) -> dict:
    """All against all over the same test LoRAs and runs, with and without the ablation; and what the ablation costs."""
    keys = [(condition, name) for condition in ("baseline", "ablation") for name in names]
    correct = {key: e.predicted("/".join(key)) == e.truth for key in keys}
    drawn = dict(zip(keys, e.draws.accuracies(list(correct.values())), strict=True))
    accuracy = {key: values.mean() for key, values in correct.items()}

    def difference(a: tuple[str, str], b: tuple[str, str]) -> dict:
        apart = drawn[a] - drawn[b]
        p = max(float(sign_p(apart)), e.draws.least_p(correct[a], correct[b]))
        return {"difference": accuracy[a] - accuracy[b], "interval": interval(apart), "p": p}

    pairs = {}
    for condition in ("baseline", "ablation"):
        found = [difference((condition, a), (condition, b)) for a, b in combinations(names, 2)]
        pairs[condition] = [
            {"a": a, "b": b, **one} for (a, b), one in zip(combinations(names, 2), _with_holm(found), strict=True)
        ]
    drops = _with_holm([difference(("baseline", name), ("ablation", name)) for name in names])
    best = max(names, key=lambda name: accuracy["baseline", name])
    near = [
        ({one["a"], one["b"]} - {best}).pop()
        for one in pairs["baseline"]
        if best in (one["a"], one["b"]) and one["p_holm"] >= ALPHA
    ]
    return {
        "best": best,
        "intervals": {
            condition: {name: interval(drawn[condition, name]) for name in names}
            for condition in ("baseline", "ablation")
        },
        "drops": {name: {"drop": one.pop("difference"), **one} for name, one in zip(names, drops, strict=True)},
        "pairs": pairs,
        "indistinguishable_from_best": near,
    }


def _with_holm(found: list[dict]) -> list[dict]:
    return [one | {"p_holm": p} for one, p in zip(found, holm([one["p"] for one in found]), strict=True)]


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


# ----------------------------------------------------------------------------------------------------------------------
# 5. Does rank structure matter?
# ----------------------------------------------------------------------------------------------------------------------


def rank_structure(
    e: Evidence, updates: np.ndarray, features: np.ndarray, described: np.ndarray, recall: np.ndarray
) -> dict:
    """Whether the effective rank of updates differs by concept, and goes with how complex a concept is.

    Where no module's effective rank varies, as at rank 1, the norm of the update is tested instead; where no module
    has both of its layers there is no update, and nothing is tested.

    Args:
        e: The evidence.
        updates: Effective rank and Frobenius norm of each update, float[N, P, 2 or more], of the modules of which both
            layers are among those of ``e``, in their order.
        features: Of each layer, standardised, float64[M, L, F], whose spread about a class's mean is one measure of its
            complexity.
        described: The LoRAs that they are of, int[M].
        recall: How well each class is recognised, float[C], NaN where that is not known: the other one.
    """
    ranks, norms = updates[..., 0].astype(float), updates[..., 1].astype(float)
    there = ranks > 0  # a zero update has no rank to differ by
    spans = np.where(there, ranks, -np.inf).max(0, initial=0) - np.where(there, ranks, np.inf).min(0, initial=np.inf)
    answerable = bool((spans > SAME_RANK).any())
    tested = ranks if answerable else norms
    layers_of = Counter(layer.module for layer in e.layers)
    modules = [module for module, layers in layers_of.items() if layers == 2]
    records = rank_by_concept(e, modules, tested, SAME_RANK if answerable else 0.0)
    of_class = [e.y == c for c in range(len(e.classes))]
    spread = spread_of_classes(features, e.y[described], len(e.classes))
    rank_of_class, norm_of_class = (
        [values[members].mean() if modules else None for members in of_class] for values in (ranks, norms)
    )
    measure = np.array(rank_of_class if answerable else norm_of_class)
    rank = ranks.max(initial=0)  # 1 of LoRAs of rank 1
    why = f"not answerable at rank {rank:.3g}: the effective rank never varies" if modules else NO_UPDATE

    def correlation(other: np.ndarray) -> dict | None:
        there = ~np.isnan(other)
        return spearman(measure[there], other[there]) if modules else None

    return {
        "answerable": answerable,
        "why": None if answerable else why,
        "tested": ("effective rank" if answerable else "norm of the update") if modules else None,
        "modules": records,
        "num_significant": sum(record["p_fdr"] < ALPHA for record in records),
        "complexity": {
            "by_class": [
                {
                    "class": name,
                    "effective_rank": rank_of_class[c] if answerable else None,
                    "norm": norm_of_class[c],
                    "spread": known(spread)[c],
                    "recall": known(recall)[c],
                }
                for c, name in enumerate(e.classes)
            ],
            "spearman_spread": correlation(spread),
            "spearman_recall": correlation(recall),
        },
    }


def rank_by_concept(e: Evidence, modules: Sequence[str], tested: np.ndarray, same: float) -> list[dict]:
    """Kruskal-Wallis tests of float[N, P] by class, one for each module; p adjusted by false discovery rate.

    Of a group, the LoRAs of one class count as one, their mean: they are no independent witnesses. A module whose
    numbers differ by no more than ``same`` has nothing to tell.
    """
    units, of_unit = np.unique(
        np.stack([np.arange(len(e.y)) if e.groups is None else e.groups, e.y]), axis=1, return_inverse=True
    )
    sizes = np.bincount(of_unit.ravel())
    records = []
    for module, values in zip(modules, tested.T, strict=True):
        of_units = np.bincount(of_unit.ravel(), weights=values) / sizes
        samples = [of_units[units[1] == c] for c in range(len(e.classes))]
        statistic, p = (0.0, 1.0) if np.ptp(of_units) <= same else stats.kruskal(*samples)
        medians = [np.median(values[e.y == c]) for c in range(len(e.classes))]
        records.append({"module": module, "statistic": statistic, "p": p, "median_by_class": medians})
    adjusted = stats.false_discovery_control([record["p"] for record in records]) if records else []
    return [record | {"p_fdr": p} for record, p in zip(records, adjusted, strict=True)]


def spread_of_classes(features: np.ndarray, y: np.ndarray, num_classes: int) -> np.ndarray:
    """Root mean square distance of features float[N, L, F] from their class's mean, float64[C]; NaN without any."""
    spread = np.full(num_classes, np.nan)
    for c in np.unique(y):
        spread[c] = np.sqrt(np.square(features[y == c] - features[y == c].mean(0)).mean())
    return spread


def coinciding(features: np.ndarray, names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Features that are one and the same number in every LoRA and layer, and those that never vary.

    Args:
        features: Of some LoRAs, float[N, L, F].
        names: Of the F features.
    """
    x = features.reshape(-1, len(names)).astype(float)
    scale = np.abs(x).max(0)
    constant = [name for f, name in enumerate(names) if np.ptp(x[:, f]) <= 1e-5 * scale[f]]
    groups: list[list[int]] = []
    for f, name in enumerate(names):
        if name in constant:
            continue
        for group in groups:
            if np.allclose(x[:, f], x[:, group[0]], rtol=1e-4, atol=1e-9 * scale[f]):
                group.append(f)
                break
        else:
            groups.append([f])
    return [[names[f] for f in group] for group in groups if len(group) > 1], constant


# ----------------------------------------------------------------------------------------------------------------------
# Concepts, attribution, and explanations that need no weights
# ----------------------------------------------------------------------------------------------------------------------


def recalls(e: Evidence, predicted: np.ndarray) -> np.ndarray:
    """Share of each class's test LoRAs that is recognised, mean over runs: int[..., R, n] -> float64[..., C].

    NaN of a class without a test LoRA.
    """
    correct = (predicted == e.truth).mean(-2)
    sizes = np.bincount(e.truth, minlength=len(e.classes))
    sums = np.stack([correct[..., e.truth == c].sum(-1) for c in range(len(e.classes))], axis=-1)
    return np.divide(sums, sizes, out=np.full(sums.shape, np.nan), where=sizes > 0)


def known(values: np.ndarray) -> np.ndarray:
    """The same with None for NaN: what there is no number for."""
    return np.where(np.isnan(values), None, values)


def concepts(e: Evidence, names: Sequence[str]) -> dict:
    """Recall of each concept from each layer alone, and what the ablation takes from it; None without a test LoRA."""
    baseline = {name: recalls(e, e.predicted(f"baseline/{name}")) for name in names}
    ablation = {name: recalls(e, e.predicted(f"ablation/{name}")) for name in names}
    return {
        "classes": list(e.classes),
        "recall": known(recalls(e, e.predicted("layers"))),
        "baseline": {name: known(baseline[name]) for name in names},
        "drop": {name: known(baseline[name] - ablation[name]) for name in names},
    }


def attribution(e: Evidence, name: str, shares: np.ndarray, accuracy: np.ndarray) -> dict:
    """Gradient attribution of the all-layer classifier, float[R, L], against single layers' accuracies, float[L]."""
    by_layer = shares.mean(0)
    agreed = _agreement(accuracy, by_layer, e.top_k)
    found = spearman(accuracy, by_layer) or {"r": None, "interval": None, "p": None}
    return {
        "representation": name,
        "by_layer": by_layer / (by_layer.sum() or 1.0),
        "spearman": found["r"],
        "interval": found["interval"],
        "p": found["p"],
        "same_top_k": agreed["same_top_k"],
    }


def cheap_explanations(e: Evidence, features: dict[str, np.ndarray | None], best: np.ndarray) -> dict:
    """Whether something simpler than the weights tells the concept as well.

    Of each, logistic regression and a random forest are fitted, and the better one on validation rows is tested. It is
    as good as the weights where it is above permuted labels and the weights' advantage is not above 0.

    Args:
        e: The evidence.
        features: By name, float[N, F]; None where there are none to learn from.
        best: Predictions of the best representation, int[R, n].
    """
    found: dict[str, object] = dict.fromkeys(features)
    as_good = []
    for name, x in features.items():
        if x is None:
            continue
        classifier, predicted = _best_of_two(e, x)
        correct = (predicted == e.truth)[None]
        p = float(exceedance(correct.mean(), e.null(predicted[None, None]))[0])
        weights, cheap = e.draws.accuracies([best == e.truth, correct])
        found[name] = estimate(correct, cheap) | {
            "classifier": classifier,
            "train_rows": min(len(e.rows["train"]), CHEAP_ROWS),
            "p": p,
            "advantage_of_weights": interval(weights - cheap),
        }
        if p < ALPHA and interval(weights - cheap)[0] <= 0:
            as_good.append(name)
    return found | {"as_good": as_good}


def _best_of_two(e: Evidence, x: np.ndarray) -> tuple[str, np.ndarray]:
    """The better of two scikit-learn classifiers on validation rows, and its predictions of the test rows, int[n]."""
    train = stream(e.seed, "rows of cheap explanations").permutation(e.rows["train"])[:CHEAP_ROWS]
    scored = []
    for name, classifier in (
        ("logistic regression", LogisticRegression(max_iter=2000)),
        ("random forest", RandomForestClassifier(300, random_state=e.seed % 2**32)),
    ):
        fitted = make_pipeline(StandardScaler(), classifier).fit(x[train], e.y[train])
        accuracy = (fitted.predict(x[e.rows["validation"]]) == e.y[e.rows["validation"]]).mean()
        scored.append((accuracy, name, fitted))
    _, name, fitted = max(scored, key=lambda one: one[0])
    return name, fitted.predict(x[e.rows["test"]])


def norms(stats_features: np.ndarray, updates: np.ndarray) -> np.ndarray:
    """How large factors and updates are, and nothing else, float[N, L + P].

    A factor's root mean square, from its mean and standard deviation (the first two of ``stats``), is its Frobenius
    norm up to a number that all LoRAs share.
    """
    mean, std = stats_features[..., 0].astype(float), stats_features[..., 1].astype(float)
    return np.concatenate([np.hypot(mean, std), updates[..., 1]], axis=1)


def grouped_split(e: Evidence, unused: Sequence[str], grouped: tuple | None) -> dict:
    """What a split gives that keeps groups together, where the experiment's own did not; nulls where there is none."""
    told = {"unused": list(unused), **dict.fromkeys(("representation", "random_split", "grouped_split", "interval"))}
    if grouped is None:
        return told | {"why": "these groups allow no split, or all that was run is fitted to the split"}
    name, truth, groups, predicted = grouped
    correct = predicted == truth
    drawn = Draws(groups, RESAMPLES, e.seed).accuracies([correct])[0]
    return told | {
        "representation": name,
        "random_split": (e.predicted(f"baseline/{name}") == e.truth).mean(),
        "grouped_split": correct.mean(),
        "interval": interval(drawn),
    }


def null_shuffles(e: Evidence, shuffled: np.ndarray) -> dict:
    """The best layer of rankings trained on shuffled labels, float[shuffles, L], against the best of the first run."""
    largest = shuffled.max(1)
    observed = (e.predicted("layers")[:, 0] == e.truth).mean(1).max()
    p = exceedance(np.array([observed]), largest[:, None])[0]
    return {"shuffles": len(largest), "largest": largest, "observed": observed, "p": p}


# ----------------------------------------------------------------------------------------------------------------------
# Hypotheses
# ----------------------------------------------------------------------------------------------------------------------


def hypotheses(found: dict) -> list[dict]:
    """The experiment's five hypotheses, each confirmed, refuted or undecided, given the sections of the analysis."""
    return list(_hypotheses(found))


def _hypotheses(found: dict) -> Iterator[dict]:
    depth = found["layers"]["depth"] or {"r": None, "interval": None, "p": None}
    yield _outcome(
        "later layers predict more",
        "Spearman correlation of depth and accuracy",
        depth["r"],
        depth["interval"],
        partial(_sign, depth["p"]),
        "fewer than four layers, or all of one accuracy" if depth["r"] is None else "",
        signal=found["layers"]["num_above_null"] > 0,
    )
    curves = found.get("robustness", {}).get("stats") or next(iter(found.get("robustness", {}).values()), None)
    step = (curves or {}).get("largest_step") or {"share": None, "interval": None}
    yield _outcome(
        "degradation is graceful",
        "largest step of the removal curve, as a share of its range",
        step["share"],
        step["interval"],
        lambda low, high: "confirmed" if high <= STEEP else "refuted" if low > STEEP else "undecided",
        "" if step["interval"] is not None else "no removal curve that is above chance and has four steps or more",
    )
    yield _better_than_stats(found.get("representations"))
    coarse = found["layer_information"]["coarse"] or {"difference": None, "interval": None}
    yield _outcome(
        "top layers separate clusters of concepts, others within them",
        "coarse less fine score of the top layers, less that of the others",
        coarse["difference"],
        coarse["interval"],
        partial(_sign, 0.0),
        ""
        if coarse["interval"] is not None
        else f"no clusters of concepts ({COARSE_CLASSES} classes or more have some)",
        signal=found["layers"]["num_above_null"] > 0,
    )
    structure = found["rank_structure"]
    spread = structure["complexity"]["spearman_spread"] or {"r": None, "interval": None, "p": None}
    yield _outcome(
        "effective rank goes with the complexity of the concept",
        "Spearman correlation over concepts of effective rank and spread of features",
        spread["r"] if structure["answerable"] else None,
        spread["interval"] if structure["answerable"] else None,
        partial(_sign, spread["p"]),
        structure["why"] or ("" if spread["r"] is not None else f"fewer than {COARSE_CLASSES} classes"),
    )


def _sign(p: float, low: float, high: float) -> str:
    """Above 0, below, or neither; an interval of few numbers may be narrower than their p allows."""
    return "undecided" if p >= ALPHA or low <= 0 <= high else "confirmed" if low > 0 else "refuted"


def _outcome(
    hypothesis: str,
    measure: str,
    number: float | None,
    bounds: Sequence[float] | None,
    decide: Callable[[float, float], str],
    why_not: str,
    signal: bool = True,
) -> dict:
    """``decide(low, high)`` of an interval; undecided where no layer is above chance."""
    outcome, why = "not answerable", why_not
    if bounds is not None:
        outcome, why = decide(*bounds), ""
        if not signal:
            outcome, why = "undecided", "no layer is above chance"
    return {
        "hypothesis": hypothesis,
        "outcome": outcome,
        "measure": measure,
        "number": number,
        "interval": bounds,
        "why": why,
    }


def _better_than_stats(compared: dict | None) -> dict:
    """Ensemble or spectral beats stats: confirmed by one of them after Holm's correction for two."""
    found = []
    for one in compared["pairs"]["baseline"] if compared else ():
        if "stats" in (one["a"], one["b"]) and {one["a"], one["b"]} & {"ensemble", "spectral"}:
            sign = 1 if one["b"] == "stats" else -1
            low, high = sorted(sign * np.asarray(one["interval"]))
            found.append((sign * one["difference"], low, high, one["p"], one["b"] if sign < 0 else one["a"]))
    told = {"hypothesis": "ensemble or spectral beats stats", "measure": "difference of test accuracies"}
    if not found:
        return told | {"outcome": "not answerable", "number": None, "interval": None, "why": "they were not all run"}
    corrected = holm([p for *_, p, _ in found])
    number, low, high, _, name = max(found, key=lambda one: one[0])
    wins = any(p < ALPHA and difference > 0 for p, (difference, *_) in zip(corrected, found, strict=True))
    loses = [p < ALPHA and difference < 0 for p, (difference, *_) in zip(corrected, found, strict=True)]
    outcome = "confirmed" if wins else "refuted" if loses == [True, True] else "undecided"
    return told | {"outcome": outcome, "number": number, "interval": [low, high], "why": f"the better one is {name}"}


def plain(value: object) -> object:
    """The same as JSON knows it: lists for arrays, Python's numbers, rounded to 9 decimals (a p of 0 is less).

    Raises:
        ValueError: A number is not finite.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            raise ValueError("a number of the analysis is not finite")
        return round(float(value), 9) + 0.0  # never -0.0
    return value
