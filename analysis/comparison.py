"""Question 3, which representation is best; what explains concepts as cheaply; groups and shuffled labels.

Nothing is trained in this folder but the small scikit-learn classifiers of `cheap_explanations`. Shape letters as in
evidence.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.chance import ChanceTest, f1_weights
from analysis.draws import ALPHA, ROUNDING, Draws, exceedance, stream
from analysis.evidence import Evidence, share_of_largest

CONDITIONS = ("baseline", "ablation")
LEARNED, FIXED = "update_learned", ("update_frozen", "update_sketch")  # projections of updates
CHALLENGED, CHALLENGERS = "stats", ("ensemble", "spectral")  # the third hypothesis is about these by name
RESPONSE = ("update_response", "update_sketch")  # of recorded inputs, and of random directions
# Asked for by name, whatever is best: the third hypothesis, and the worth of learning projections and of inputs.
ASKED = [(name, CHALLENGED) for name in CHALLENGERS] + [(LEARNED, name) for name in FIXED] + [RESPONSE]
ITERATIONS, TREES = 2000, 300  # of a logistic regression, and of a random forest
CHEAP_ROWS = 10_000  # train rows that a cheap explanation is fitted on at most
LEAST_SHUFFLES = 19  # of which the best of 20 has p = 0.05; fewer decide nothing


# ----------------------------------------------------------------------------------------------------------------------
# Representations
# ----------------------------------------------------------------------------------------------------------------------


def compare_representations(evidence: Evidence, names: Sequence[str]) -> dict:
    """Compare representations over the same test LoRAs and runs, with and without the ablation, and each with itself.

    Args:
        evidence: The evidence.
        names: Of the representations, in the order of their table.
    """
    correct = {
        condition: {name: evidence.predicted(condition, name) == evidence.truth for name in names}
        for condition in CONDITIONS
    }
    baseline, ablation = (correct[condition] for condition in CONDITIONS)
    lost = evidence.draws.differences([(baseline[name], ablation[name]) for name in names])
    drops = {name: {"drop": record.pop("difference"), **record} for name, record in zip(names, lost, strict=True)}
    return {
        "conditions": {condition: _condition(evidence, condition, correct[condition]) for condition in CONDITIONS},
        "drops": drops,
        "significant_losses": [name for name, record in drops.items() if record["significant"] and record["drop"] > 0],
    }


def best_on_validation(evidence: Evidence, condition: str, names: Sequence[str]) -> str | None:
    """Return the representation of the highest validation accuracy, then macro-F1, then the first; None of none.

    What is chosen on test rows looks better on them than it is.
    """
    return max(names, key=lambda name: _on_validation(evidence, condition, name), default=None)  # the first of equals


def _on_validation(evidence: Evidence, condition: str, name: str) -> tuple[float, float]:
    """Return accuracy and macro-F1 on validation LoRAs, means over runs, rounded so that equal ones are equal."""
    truth, size = evidence.y[evidence.rows["validation"]], len(evidence.classes)
    predicted = evidence.validation_predictions(condition, name)
    hits, weights = (predicted == truth).mean(0), f1_weights(predicted[None], truth, size)[0]
    return round(hits.mean(), 12), round((hits * weights[truth]).mean(), 12)


def _tied_on_validation(evidence: Evidence, condition: str, names: Sequence[str], chosen: str) -> list[str]:
    """Return the other representations of the same validation accuracy, over which macro-F1 or the order decides."""
    accuracy = {name: _on_validation(evidence, condition, name)[0] for name in names}
    return [name for name in names if name != chosen and accuracy[name] == accuracy[chosen]]


def _condition(evidence: Evidence, condition: str, correct: dict[str, np.ndarray]) -> dict:
    """Compare representations under a condition, with chance and with the best of them.

    The best one is chosen on validation LoRAs; where it is not above permuted labels itself, there is none. The
    comparisons with it, and with all layers those of ``ASKED``, are one family.

    Args:
        evidence: The evidence.
        condition: Of ``CONDITIONS``.
        correct: The test LoRAs that each recognises, bool[R, T], by name.
    """
    names, draws = list(correct), evidence.draws
    test = ChanceTest.of(evidence, [evidence.predicted(condition, name) for name in names])
    by_name = dict(zip(names, test.accuracy, strict=True))
    drawn = draws.accuracies([correct[name] for name in names])
    chosen = best_on_validation(evidence, condition, names)
    best = chosen if test.above_null[names.index(chosen)] else None
    pairs = [(best, name) for name in names if best not in (None, name)]
    if condition == "baseline":
        asked = [pair for pair in ASKED if set(pair) <= set(names)]
        pairs += [pair for pair in asked if pair not in pairs and pair[::-1] not in pairs]
    compared = draws.differences([(correct[first], correct[second]) for first, second in pairs])
    comparisons = [{"a": a, "b": b, **record} for (a, b), record in zip(pairs, compared, strict=True)]
    with_best = [record for record in comparisons if record["a"] == best]
    return {
        "chosen": chosen,
        "tied_on_validation": _tied_on_validation(evidence, condition, names, chosen),
        "best": best,
        "best_by_test": None if best is None else max(names, key=by_name.get),
        "best_above_chance": best is not None and bool(test.above_chance[names.index(best)]),
        "above_null": [name for name, above in zip(names, test.above_null, strict=True) if above],
        "above_chance": [name for name, above in zip(names, test.above_chance, strict=True) if above],
        "p_family": dict(zip(names, test.p_family, strict=True)),
        "p_f1": None if test.p_f1 is None else dict(zip(names, test.p_f1, strict=True)),
        "needed": test.margin + test.guessed[names.index(chosen)],
        "intervals": dict(zip(names, draws.intervals(test.accuracy, drawn), strict=True)),
        "comparisons": comparisons,
        "ties": [record["b"] for record in with_best if abs(record["difference"]) < ROUNDING],
        "not_worse": [record["b"] for record in with_best if not record["significant"] or record["difference"] < 0],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Explanations that need no weights
# ----------------------------------------------------------------------------------------------------------------------


def cheap_explanations(
    evidence: Evidence,
    features: dict[str, np.ndarray | None],
    best: np.ndarray,
    attempt: Callable[[str, Callable], object] = lambda _, do: do(),
) -> dict:
    """Test whether something simpler than the weights predicts the concept as well.

    Of each, logistic regression and a random forest are fitted, and the better one on validation rows is tested. It is
    as good as the weights where it is above permuted labels, as one of all these explanations, and the weights'
    advantage is not above 0. Advantages are one family too.

    Args:
        evidence: The evidence.
        features: By name, float[N, F]; None where there are none to learn from.
        best: Predictions of the best representation, int[R, T].
        attempt: Of a name and a function: gives what that returns, or None where it fails, which it notes.
    """
    records: dict[str, object] = dict.fromkeys(features)
    tried = {
        name: attempt(f"cheap explanation by {name}", lambda columns=columns: _best_of_two(evidence, columns))
        for name, columns in features.items()
        if columns is not None
    }
    fitted = {name: found for name, found in tried.items() if found is not None}
    if not fitted:
        return records | {"as_good": []}
    predictions, as_good = [predicted[None] for _, predicted in fitted.values()], []
    all_p = ChanceTest.of(evidence, predictions).p_family
    weights = best == evidence.truth
    differences = evidence.draws.differences([(weights, predicted == evidence.truth) for predicted in predictions])
    for (name, (classifier, predicted)), p, record in zip(fitted.items(), all_p, differences, strict=True):
        correct, advantage = (predicted == evidence.truth)[None], record["interval"]
        records[name] = evidence.draws.estimate(correct, evidence.draws.accuracies([correct])[0]) | {
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
        ("logistic regression", LogisticRegression(max_iter=ITERATIONS)),
        ("random forest", RandomForestClassifier(TREES, random_state=evidence.seed % 2**32)),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            fitted = make_pipeline(StandardScaler(), classifier).fit(features[train], evidence.y[train])
        if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
            name = f"{name}, not converged in {ITERATIONS:,} iterations"
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


def grouped_split(evidence: Evidence, unused: Sequence[str], grouped: tuple | None, tried: bool = True) -> dict:
    """Return the accuracy on a split that keeps groups together, where the experiment's own did not; else None.

    The representation may know the groups rather than the concept, where it is above permuted labels on the
    experiment's own split and, on the other, its accuracy may be chance or is less: by an interval of the difference
    of two independent shares (square-and-add: Newcombe, "Interval estimation for the difference between independent
    proportions", Statistics in Medicine 1998).
    """
    missing = dict.fromkeys(("column", "representation", "random_split", "grouped_split", "interval", "chance"))
    result = {"unused": list(unused), **missing, "may_be_groups": None}
    if grouped is None:
        why = "these groups allow no split, or all that was run is fitted to the split"
        return result | {"why": why if tried else "no other split was tried (--controls=none)"}
    column, name, truth, groups, predicted = grouped
    correct = predicted == truth
    draws = Draws(groups, evidence.resamples, evidence.seed)
    low, high = draws.intervals(correct.mean(), draws.accuracies([correct])[0])
    own = evidence.predicted("baseline", name)
    random_split, chance = (own == evidence.truth).mean(), share_of_largest(truth)
    own_low, _ = evidence.draws.intervals(random_split, evidence.draws.accuracies([own == evidence.truth])[0])
    less = random_split - correct.mean() > np.hypot(random_split - own_low, high - correct.mean())
    return result | {
        "column": column,
        "representation": name,
        "random_split": random_split,
        "grouped_split": correct.mean(),
        "interval": (low, high),
        "chance": chance,
        "may_be_groups": bool(ChanceTest.of(evidence, [own]).above_null[0] and (low <= chance or less)),
    }


def null_shuffles(evidence: Evidence, shuffled: np.ndarray) -> dict:
    """Compare the best layer of rankings on shuffled labels, float[shuffles, L], with the best of the first run.

    Fewer than 19 shuffles can give no p below 0.05, and decide nothing.
    """
    largest = shuffled.max(1)
    observed = (evidence.layer_predictions()[:, 0] == evidence.truth).mean(1).max()
    p = exceedance(np.array([observed]), largest[:, None])[0] if len(largest) >= LEAST_SHUFFLES else None
    return {
        "shuffles": len(largest),
        "largest": largest,
        "observed": observed,
        "p": p,
        "significant": None if p is None else p <= ALPHA + ROUNDING,
    }
