"""What the numbers mean: controls, curves, intervals, and a verdict on each question.

Pure functions on finished predictions and cached features; nothing is trained here but the small scikit-learn
classifiers of `cheap_explanations`. Questions 1 and 4 are answered in layers.py, 2 in controls.py, 3 and 5 here.

Shape letters: N LoRAs, n test LoRAs, L layers in the network's order, P modules, R runs, C classes, B draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from scipy import stats
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.evidence import (
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
from analysis.hypotheses import hypotheses
from analysis.layers import layer_information, layer_ranking, rankings_agree
from analysis.removal import Conditions, conditional_importance, robustness

CHEAP_ROWS = 10_000  # train rows that a cheap explanation is fitted on at most
FEATURE_NUMBERS = 2**24  # of features that what describes them only (CKA, clusters, spread) looks at, at most
CLIP = 10.0  # standard deviations beyond which a feature is an outlier of a heavy tail, as in training
SAME_RANK = 1e-3  # effective ranks that differ by no more are rounding
NO_UPDATE = "no module has both of its layers among those looked at"


@dataclass(frozen=True)
class Controls:
    """What was computed to compare with; each may be empty or None.

    Attributes:
        level: As --controls gives it.
        conditions: Of each representation, the conditions and what test LoRAs are taken for, int[K, R, n].
        attributed: Representation, and shares of its gradient attribution, float[R, L].
        cheap: Features of explanations without weights, float[N, F] or None each.
        unused: Columns that look like groups and were not used.
        grouped: Of a split by the first of them that allows one: the column, representation, and truth int[m], groups
            int[m] and predictions int[R, m] of its test LoRAs.
        shuffled: Accuracy of each layer on shuffled labels, one run, float[shuffles, L].
    """

    level: str
    conditions: dict[str, tuple[Conditions, np.ndarray]] = field(default_factory=dict)
    attributed: tuple[str, np.ndarray] | None = None
    cheap: dict[str, np.ndarray | None] = field(default_factory=dict)
    unused: Sequence[str] = ()
    grouped: tuple[str, str, np.ndarray, np.ndarray, np.ndarray] | None = None
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
    intervals = {
        condition: {name: interval(drawn[condition, name]) for name in names} for condition in ("baseline", "ablation")
    }
    null = best_by_chance(e, [e.predicted(f"baseline/{name}") for name in names])
    p = exceedance(np.array([accuracy["baseline", name] for name in names]), null[:, None])
    p_family = dict(zip(names, p, strict=True))
    near = [
        ({one["a"], one["b"]} - {best}).pop()
        for one in pairs["baseline"]
        if best in (one["a"], one["b"]) and one["p_holm"] >= ALPHA
    ]
    return {
        "best": best,
        "p_family": p_family,
        # With unequal classes one may know more than permuted labels do, and less than always guessing the largest.
        "best_above_chance": p_family[best] < ALPHA and intervals["baseline"][best][0] > e.chance,
        "intervals": intervals,
        "drops": {name: {"drop": one.pop("difference"), **one} for name, one in zip(names, drops, strict=True)},
        "pairs": pairs,
        "indistinguishable_from_best": near,
    }


def best_by_chance(e: Evidence, predicted: Sequence[np.ndarray]) -> np.ndarray:
    """The accuracy on permuted test labels of the best of some classifiers, int[R, n] each, float64[B]."""
    by_runs: dict[int, list[np.ndarray]] = {}
    for one in predicted:
        by_runs.setdefault(len(one), []).append(one)
    return np.max([e.null(np.stack(alike)).max(1) for alike in by_runs.values()], axis=0)


def _with_holm(found: list[dict]) -> list[dict]:
    return [one | {"p_holm": p} for one, p in zip(found, holm([one["p"] for one in found]), strict=True)]


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
        effect = statistic / (len(sizes) - 1)  # ε², the share of the ranks' variance that classes explain
        records.append({"module": module, "statistic": statistic, "effect": effect, "p": p, "median_by_class": medians})
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
    agreed = rankings_agree(accuracy, by_layer, e.top_k)
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
    nulls = dict.fromkeys(("column", "representation", "random_split", "grouped_split", "interval"))
    told = {"unused": list(unused), **nulls}
    if grouped is None:
        return told | {"why": "these groups allow no split, or all that was run is fitted to the split"}
    column, name, truth, groups, predicted = grouped
    correct = predicted == truth
    drawn = Draws(groups, RESAMPLES, e.seed).accuracies([correct])[0]
    return told | {
        "column": column,
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
