"""Question 3, which representation is best; what explains concepts as cheaply; groups and shuffled labels.

Nothing is trained in this folder but the small scikit-learn classifiers of `cheap_explanations`. Shape letters as in
evidence.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.evidence import (
    ALPHA,
    Draws,
    Evidence,
    estimate,
    exceedance,
    holm,
    interval,
    sign_p,
    stream,
)

CONDITIONS = ("baseline", "ablation")
CHEAP_ROWS = 10_000  # train rows that a cheap explanation is fitted on at most


# ----------------------------------------------------------------------------------------------------------------------
# Representations
# ----------------------------------------------------------------------------------------------------------------------


def compare_representations(evidence: Evidence, names: Sequence[str]) -> dict:
    """Compare all with all over the same test LoRAs and runs, with and without the ablation, and each with itself."""
    keys = [(condition, name) for condition in CONDITIONS for name in names]
    correct = {key: evidence.predicted(*key) == evidence.truth for key in keys}
    drawn = dict(zip(keys, evidence.draws.accuracies(list(correct.values())), strict=True))
    accuracy = {key: values.mean() for key, values in correct.items()}

    def difference(a: tuple[str, str], b: tuple[str, str]) -> dict:
        """Return a's accuracy minus b's, with its interval and p."""
        differences = drawn[a] - drawn[b]
        p = max(float(sign_p(differences)), evidence.draws.least_p(correct[a], correct[b]))
        return {"difference": accuracy[a] - accuracy[b], "interval": interval(differences), "p": p}

    pairs = {}
    for condition in CONDITIONS:
        name_pairs = list(combinations(names, 2))
        differences = _with_holm([difference((condition, a), (condition, b)) for a, b in name_pairs])
        pairs[condition] = [{"a": a, "b": b, **record} for (a, b), record in zip(name_pairs, differences, strict=True)]
    lost = _with_holm([difference(("baseline", name), ("ablation", name)) for name in names])
    drops = {name: {"drop": record.pop("difference"), **record} for name, record in zip(names, lost, strict=True)}
    best = max(names, key=lambda name: accuracy["baseline", name])
    intervals = {condition: {name: interval(drawn[condition, name]) for name in names} for condition in CONDITIONS}
    null = best_by_chance(evidence, [evidence.predicted("baseline", name) for name in names])
    p = exceedance(np.array([accuracy["baseline", name] for name in names]), null[:, None])
    p_family = dict(zip(names, p, strict=True))
    return {
        "best": best,
        "p_family": p_family,
        # With unequal classes one may know more than permuted labels do, and less than always guessing the largest.
        "best_above_chance": p_family[best] < ALPHA and intervals["baseline"][best][0] > evidence.chance,
        "intervals": intervals,
        "drops": drops,
        "pairs": pairs,
        "indistinguishable_from_best": [
            ({pair["a"], pair["b"]} - {best}).pop()
            for pair in pairs["baseline"]
            if best in (pair["a"], pair["b"]) and not pair["significant"]
        ],
        "significant_losses": [name for name, record in drops.items() if record["significant"] and record["drop"] > 0],
    }


def best_by_chance(evidence: Evidence, predicted: Sequence[np.ndarray]) -> np.ndarray:
    """Return the accuracy on permuted test labels of the best of some classifiers, int[R, T] each, float64[B]."""
    by_runs: dict[int, list[np.ndarray]] = {}
    for classes in predicted:
        by_runs.setdefault(len(classes), []).append(classes)
    return np.max([evidence.null(np.stack(stacked)).max(1) for stacked in by_runs.values()], axis=0)


def _with_holm(records: list[dict]) -> list[dict]:
    """Add p of a family of tests after Holm's correction, and whether that is significant."""
    adjusted = holm([record["p"] for record in records])
    return [record | {"p_holm": p, "significant": p < ALPHA} for record, p in zip(records, adjusted, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Explanations that need no weights
# ----------------------------------------------------------------------------------------------------------------------


def cheap_explanations(evidence: Evidence, features: dict[str, np.ndarray | None], best: np.ndarray) -> dict:
    """Test whether something simpler than the weights predicts the concept as well.

    Of each, logistic regression and a random forest are fitted, and the better one on validation rows is tested. It is
    as good as the weights where it is above permuted labels and the weights' advantage is not above 0.

    Args:
        evidence: The evidence.
        features: By name, float[N, F]; None where there are none to learn from.
        best: Predictions of the best representation, int[R, T].
    """
    records: dict[str, object] = dict.fromkeys(features)
    as_good = []
    for name, columns in features.items():
        if columns is None:
            continue
        classifier, predicted = _best_of_two(evidence, columns)
        correct = (predicted == evidence.truth)[None]
        p = float(exceedance(correct.mean(), evidence.null(predicted[None, None]))[0])
        weights, cheap = evidence.draws.accuracies([best == evidence.truth, correct])
        advantage = interval(weights - cheap)
        records[name] = estimate(correct, cheap) | {
            "classifier": classifier,
            "train_rows": min(len(evidence.rows["train"]), CHEAP_ROWS),
            "p": p,
            "advantage_of_weights": advantage,
            "weights_worse": advantage[1] < 0,
        }
        if p < ALPHA and advantage[0] <= 0:
            as_good.append(name)
    return records | {"as_good": as_good}


def _best_of_two(evidence: Evidence, features: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the better of two scikit-learn classifiers on validation rows, and its predictions of test rows int[T]."""
    train = stream(evidence.seed, "rows of cheap explanations").permutation(evidence.rows["train"])[:CHEAP_ROWS]
    validation = evidence.rows["validation"]
    scored = []
    for name, classifier in (
        ("logistic regression", LogisticRegression(max_iter=2000)),
        ("random forest", RandomForestClassifier(300, random_state=evidence.seed % 2**32)),
    ):
        fitted = make_pipeline(StandardScaler(), classifier).fit(features[train], evidence.y[train])
        accuracy = (fitted.predict(features[validation]) == evidence.y[validation]).mean()
        scored.append((accuracy, name, fitted))
    _, name, fitted = max(scored, key=lambda candidate: candidate[0])
    return name, fitted.predict(features[evidence.rows["test"]])


def norms(statistics: np.ndarray, updates: np.ndarray) -> np.ndarray:
    """Return how large factors and updates are, and nothing else, float[N, L + P].

    A factor's root mean square, from its mean and standard deviation (the first two of ``stats``), is its Frobenius
    norm up to a number that all LoRAs share.
    """
    mean, std = statistics[..., 0].astype(float), statistics[..., 1].astype(float)
    return np.concatenate([np.hypot(mean, std), updates[..., 1]], axis=1)


# ----------------------------------------------------------------------------------------------------------------------
# The same experiment on another split, and on shuffled labels
# ----------------------------------------------------------------------------------------------------------------------


def grouped_split(evidence: Evidence, unused: Sequence[str], grouped: tuple | None) -> dict:
    """Return the accuracy on a split that keeps groups together, where the experiment's own did not; else None."""
    missing = dict.fromkeys(("column", "representation", "random_split", "grouped_split", "interval"))
    result = {"unused": list(unused), **missing}
    if grouped is None:
        return result | {"why": "these groups allow no split, or all that was run is fitted to the split"}
    column, name, truth, groups, predicted = grouped
    correct = predicted == truth
    drawn = Draws(groups, evidence.resamples, evidence.seed).accuracies([correct])[0]
    return result | {
        "column": column,
        "representation": name,
        "random_split": (evidence.predicted("baseline", name) == evidence.truth).mean(),
        "grouped_split": correct.mean(),
        "interval": interval(drawn),
    }


def null_shuffles(evidence: Evidence, shuffled: np.ndarray) -> dict:
    """Compare the best layer of rankings on shuffled labels, float[shuffles, L], with the best of the first run."""
    largest = shuffled.max(1)
    observed = (evidence.layer_predictions()[:, 0] == evidence.truth).mean(1).max()
    p = exceedance(np.array([observed]), largest[:, None])[0]
    significant = p < ALPHA
    ahead_of_all = p <= 1.001 / (1 + len(largest))  # the least p of so many shuffles, but for rounding
    return {
        "shuffles": len(largest),
        "largest": largest,
        "observed": observed,
        "p": p,
        "significant": significant,
        "ahead_of_all": ahead_of_all,
        "as_expected": ahead_of_all or significant,  # few shuffles cannot give a significant p
    }
