"""The experiment on several splits of one collection: means, their intervals, and how far the rankings agree.

Splits of one collection share most of their LoRAs, so their results differ less than those of as many collections
would; the intervals account for that.

Shape letters as in evidence.py, and S splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from analysis.draws import LEVEL, ROUNDING
from analysis.evidence import Evidence
from analysis.layers import kendall_tau, kendall_w

LEAST_SPLITS = 5  # below which there is a range and no interval
SHARES, DIFFERENCES = (0.0, 1.0), (-1.0, 1.0)  # within which they lie


@dataclass(frozen=True)
class SplitOutcome:
    """Results on one split.

    Attributes:
        ranking: Layers, most predictive first, int[L].
        trained: Number of train LoRAs.
        tested: The test LoRAs, int[T].
        chosen_by: The LoRAs that rank the layers, int[T or V].
        recognised: Number of runs in which each layer alone recognises each of them, int[L, T].
        runs: Number of runs.
        baseline: Test accuracies with all layers, by representation.
        ablation: Those without the top k of this split.
        validation: Validation accuracies with all layers.
    """

    ranking: np.ndarray
    trained: int
    tested: np.ndarray
    chosen_by: np.ndarray
    recognised: np.ndarray
    runs: int
    baseline: dict[str, float]
    ablation: dict[str, float]
    validation: dict[str, float]

    @property
    def accuracies(self) -> np.ndarray:
        """The test accuracy of each layer alone, mean over runs, float64[L]."""
        return self.recognised.mean(1) / self.runs

    @classmethod
    def of(cls, evidence: Evidence, names: Sequence[str], chosen_by: str = "test") -> SplitOutcome:
        """Return what the comparison needs of a split's evidence.

        Args:
            evidence: The evidence.
            names: Representations that were run with and without the top k.
            chosen_by: The part of the split that ranks the layers.
        """

        def accuracies(condition: str) -> dict[str, float]:
            return {name: float((evidence.predicted(condition, name) == evidence.truth).mean()) for name in names}

        correct = evidence.layer_predictions() == evidence.truth  # (L, R, T)
        return cls(
            evidence.ranking,
            len(evidence.rows["train"]),
            evidence.rows["test"],
            evidence.rows[chosen_by],
            correct.sum(1, dtype=np.uint16),
            correct.shape[1],
            accuracies("baseline"),
            accuracies("ablation"),
            {name: float(evidence.validated("baseline", name).mean()) for name in names},
        )


def across_splits(
    outcomes: Sequence[SplitOutcome],
    layers: Sequence[str],
    top_k: int,
    not_run: dict[str, str],
    splits_not_run: dict[str, str],
) -> dict:
    """Return ``splits`` of results.json.

    Args:
        outcomes: Of the splits that could be done; the first is the ordinary one.
        layers: Names of the layers in the network's order.
        top_k: Number of layers that each split removed.
        not_run: The reason, by representation, for each that is left out because a split could not do it.
        splits_not_run: The reason, by number, for each split that is left out.
    """
    names = [name for name in outcomes[0].baseline if name not in not_run]
    ratio = float(np.mean([len(outcome.tested) / outcome.trained for outcome in outcomes]))
    best = max(names, key=lambda name: round(sum(outcome.validation[name] for outcome in outcomes), 9), default=None)
    accuracy = np.stack([outcome.accuracies for outcome in outcomes], axis=1)  # (L, S)
    top = np.stack([np.isin(np.arange(len(layers)), outcome.ranking[:top_k]) for outcome in outcomes], axis=1)
    pairs = list(combinations(range(len(outcomes)), 2))
    taus = [kendall_tau(accuracy[:, a], accuracy[:, b])["kendall_tau"] for a, b in pairs]
    known = [tau for tau in taus if tau is not None]
    return {
        "splits": len(outcomes),
        "best": best,
        "representations": {name: _representation(outcomes, name, best, ratio) for name in names},
        "kendall_w": kendall_w(accuracy),
        "kendall_tau": np.mean(known) if known else None,
        "same_top_k": np.mean([(top[:, a] & top[:, b]).sum() for a, b in pairs]) if pairs else None,
        "layers": [
            {
                "layer": name,
                "in_top_k": top[i].mean(),
                "mean_accuracy": accuracy[i].mean(),
                "sd": _deviation(accuracy[i]),
            }
            for i, name in enumerate(layers)
        ],
        "first": _first_elsewhere(outcomes, layers, ratio),
        "not_run": not_run,
        "splits_not_run": splits_not_run,
    }


def _representation(outcomes: Sequence[SplitOutcome], name: str, best: str, ratio: float) -> dict:
    """Summarise accuracies with and without the top layers, their difference, and that with the best."""
    baseline, ablation, of_best = (
        np.array([getattr(outcome, condition)[of] for outcome in outcomes])
        for condition, of in (("baseline", name), ("ablation", name), ("baseline", best))
    )
    return {
        "baseline": summary(baseline, ratio, SHARES),
        "ablation": summary(ablation, ratio, SHARES),
        "drop": summary(baseline - ablation, ratio, DIFFERENCES),
        "behind_best": None if name == best else summary(of_best - baseline, ratio, DIFFERENCES),
    }


def _first_elsewhere(outcomes: Sequence[SplitOutcome], layers: Sequence[str], ratio: float) -> dict | None:
    """Summarise the accuracy of the first split's first layer on other splits, by LoRAs that did not choose it."""
    chosen, values = int(outcomes[0].ranking[0]), []
    for outcome in outcomes[1:]:
        unseen = ~np.isin(outcome.tested, outcomes[0].chosen_by)
        if unseen.any():
            values.append(outcome.recognised[chosen, unseen].mean() / outcome.runs)
    return {"layer": layers[chosen], **summary(np.array(values), ratio, SHARES)} if values else None


def summary(values: np.ndarray, ratio: float, bounds: tuple[float, float]) -> dict:
    """Return mean, deviation, range and interval of a result on several splits, float[S].

    The mean of S splits varies by ``sqrt(1 / S + n_test / n_train) sd``, as their train and test LoRAs overlap, with
    Student's t of S - 1. No interval is given of fewer than five, or of equal values, which show no variation.

    Args:
        values: One of each split.
        ratio: n_test / n_train.
        bounds: The least and the largest possible value.

    Source:
        Nadeau & Bengio, "Inference for the generalization error", Machine Learning 2003 (the corrected resampled t).
    """
    mean, deviation, bound = values.mean(), _deviation(values), None
    if len(values) >= LEAST_SPLITS and deviation > ROUNDING:
        half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.sqrt(1 / len(values) + ratio) * deviation
        bound = np.clip((mean - half, mean + half), *bounds)
    return {
        "mean": mean,
        "sd": deviation,
        "min": values.min(),
        "max": values.max(),
        "values": values,
        "interval": bound,
    }


def _deviation(values: np.ndarray) -> float | None:
    """Return the sample standard deviation; None of one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else None
