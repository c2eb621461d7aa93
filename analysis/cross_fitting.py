"""Cross-fitting: layers chosen on four folds of the test LoRAs and measured on the fifth.

The ranking chooses the top layers on the rows that they are then measured on, which makes their accuracy, and what
their removal costs, look larger than they are. Here each test LoRA is predicted by what the other folds chose. No layer
is trained again: of finished predictions the choice alone changes.

Shape letters as in evidence.py, and k of the top layers, S of distinct sets of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from analysis.chance import ChanceTest, permuted
from analysis.draws import exceedance, stream
from analysis.evidence import Evidence
from analysis.layers import order_of

FOLDS = 5
LEAST_UNITS = 10  # test LoRAs (groups), below which a fold would hold one
UNION_PERMUTATIONS = 200  # each chooses the top k six times
MISSING = ("folds", "sets", "runs", "first", "vote", "union", "top_alone", "beats_all")


@dataclass(frozen=True)
class TrainedSets:
    """Predictions that were trained for the cross-fitted removal; each may be empty or None.

    Attributes:
        why: The reason why nothing is cross-fitted, such as layers chosen on other rows; None: it is.
        removed: By representation, the classes of the test LoRAs without each of the distinct sets of top layers (in
            the order of `Choice.sets`), int[S, R, T].
        alone: Those by the ranking representation with each set alone, int[S, R, T].
        all_layers: Those by the ranking representation with all layers, int[R, T].
        not_run: The reason, by representation, for each that is left out.
    """

    why: str | None = None
    removed: dict[str, np.ndarray] = field(default_factory=dict)
    alone: np.ndarray | None = None
    all_layers: np.ndarray | None = None
    not_run: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The order of the layers that all folds but one give.

    Attributes:
        fold: Of each test LoRA, int[T].
        orders: Layers, most predictive first on all folds but each, int[folds, L].
        top_k: k.
    """

    fold: np.ndarray
    orders: np.ndarray
    top_k: int

    @classmethod
    def of(cls, evidence: Evidence) -> Choice | None:
        """Choose by the ranking's rule: accuracy, then validation accuracy, then validation loss; None of too few."""
        if len(np.unique(evidence.test_groups)) < LEAST_UNITS:
            return None
        fold = folds_of(evidence.truth, evidence.test_groups, evidence.seed)
        return cls(fold, orders_without(evidence, fold), evidence.top_k)

    @property
    def sets(self) -> list[list[int]]:
        """The distinct sets of top layers, each ascending."""
        return [list(layers) for layers in sorted(set(map(tuple, self._top)))]

    @property
    def set_of_fold(self) -> np.ndarray:
        """The position among ``sets`` of the set that all folds but each chose, int[folds]."""
        sets = self.sets
        return np.array([sets.index(top) for top in self._top])

    @property
    def _top(self) -> list[list[int]]:
        return np.sort(self.orders[:, : self.top_k], axis=1).tolist()

    def composite(self, of_fold: np.ndarray) -> np.ndarray:
        """Return of each LoRA the prediction that is its fold's, int[folds, R, T] -> int[R, T]."""
        return of_fold[self.fold, :, np.arange(len(self.fold))].T


def folds_of(y: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return the fold of each LoRA, int[T]: stratified by class, the LoRAs of a group together.

    Large groups first, in random order among equals, each goes to the fold that has least of its classes, then to the
    smallest. scikit-learn's `StratifiedGroupKFold` refuses classes that all have fewer LoRAs than there are folds.
    """
    group = np.unique(groups, return_inverse=True)[1]
    of_group = np.zeros((group.max() + 1, y.max() + 1))
    np.add.at(of_group, (group, y), 1)
    sizes, of_class = of_group.sum(1), np.maximum(of_group.sum(0), 1)
    drawn = stream(seed, "folds").permutation(len(sizes))
    per_fold, fold_of_group = np.zeros((FOLDS, y.max() + 1)), np.empty(len(sizes), int)
    for number in drawn[np.argsort(-sizes[drawn], kind="stable")].tolist():
        alike = (per_fold / of_class) @ of_group[number]
        fold = np.lexsort((per_fold.sum(1), np.round(alike, 12)))[0]
        per_fold[fold] += of_group[number]
        fold_of_group[number] = fold
    return fold_of_group[group]


def orders_without(evidence: Evidence, fold: np.ndarray) -> np.ndarray:
    """Return the layers in the order that the test LoRAs outside of each fold give, int[folds, L]."""
    correct = (evidence.layer_predictions() == evidence.truth).mean(1)  # (L, T)
    ties = _ties(evidence)
    return np.stack([order_of(correct[:, fold != number].mean(1), *ties) for number in range(FOLDS)])


def _ties(evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores by which equal accuracies are ordered, float[L] each."""
    return evidence.layer_validation().mean((1, 2)), -evidence.layer_validation_loss()


def vote_of(predicted: np.ndarray) -> np.ndarray:
    """Return the class that most layers predict, the better ranked where they tie: int[k, R, T] -> int[R, T]."""
    votes = (predicted[:, None] == predicted[None]).sum(1)  # (k, R, T): how many predict the same class as this one
    return np.take_along_axis(predicted, votes.argmax(0)[None], 0)[0]


def cross_fitted(evidence: Evidence, trained: TrainedSets) -> dict:
    """Return accuracies and drops whose layers were not chosen on the LoRAs that they are measured on.

    Each stands beside the ordinary figure; ``optimism`` is the difference.

    Args:
        evidence: The evidence.
        trained: What was trained for the removal of the sets that the folds chose.
    """
    choice = None if trained.why else Choice.of(evidence)
    if choice is None:
        why = trained.why or f"fewer than {LEAST_UNITS} independent test units"
        return {"why": why, **dict.fromkeys(MISSING), "drops": {}, "not_run": {}}
    layers = evidence.layer_predictions()
    first, ordinary = choice.composite(layers[choice.orders[:, 0]]), layers[evidence.ranking[0]]
    alone = None if trained.alone is None else choice.composite(trained.alone[choice.set_of_fold])
    runs = [len(predicted[0]) for predicted in (*trained.removed.values(), trained.alone) if predicted is not None]
    return {
        "why": None,
        "folds": FOLDS,
        "sets": len(choice.sets),
        "runs": max(runs, default=None),
        "first": _estimate(evidence, first) | _beside(evidence, first, ordinary),
        **_top_together(evidence, choice),
        "top_alone": None if alone is None else _estimate(evidence, alone),
        "beats_all": _beats_all(evidence, first, alone, trained.all_layers),
        "drops": _drops(evidence, choice, trained.removed),
        "not_run": dict(trained.not_run),
    }


def _estimate(evidence: Evidence, predicted: np.ndarray) -> dict:
    """Return accuracy, interval, and tests against chance of one classifier, int[R, T]."""
    correct, test = predicted == evidence.truth, ChanceTest.of(evidence, [predicted])
    return evidence.draws.estimate(correct, evidence.draws.accuracies([correct])[0]) | {
        "p": test.p[0],
        "above_null": test.above_null[0],
        "above_chance": test.above_chance[0],
    }


def _beside(evidence: Evidence, predicted: np.ndarray, ordinary: np.ndarray) -> dict:
    """Return the ordinary accuracy, and by how much it is above the cross-fitted one, int[R, T] each."""
    accuracy = (ordinary == evidence.truth).mean()
    return {"ordinary": accuracy, "optimism": accuracy - (predicted == evidence.truth).mean()}


def _top_together(evidence: Evidence, choice: Choice) -> dict:
    """Return what the top k know together: their vote, and the share of LoRAs that at least one of them recognises."""
    predicted, tops = evidence.layer_predictions(), choice.orders[:, : choice.top_k]
    vote = choice.composite(np.stack([vote_of(predicted[top]) for top in tops]))
    ordinary = predicted[evidence.ranking[: evidence.top_k]]
    recognised = predicted == evidence.truth  # (L, R, T)
    union = choice.composite(np.stack([recognised[top].any(0) for top in tops]))
    ordinary_union = recognised[evidence.ranking[: evidence.top_k]].any(0).mean()
    chance, ordinary_chance = union_by_chance(evidence, choice)
    return {
        "vote": _estimate(evidence, vote) | _beside(evidence, vote, vote_of(ordinary)),
        "union": {
            **evidence.draws.estimate(union, evidence.draws.accuracies([union])[0]),
            "by_chance": chance.mean(),
            "p": exceedance(np.array([union.mean()]), chance[:, None])[0],
            "ordinary": ordinary_union,
            "ordinary_by_chance": ordinary_chance.mean(),
            "ordinary_p": exceedance(np.array([ordinary_union]), ordinary_chance[:, None])[0],
            "optimism": ordinary_union - union.mean(),
        },
    }


def union_by_chance(evidence: Evidence, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """Return what the top k recognise together on permuted test labels, by which they are chosen again.

    Returns:
        Cross-fitted, and chosen and measured on the same rows, float[B] each.
    """
    predicted, top_k = evidence.layer_predictions(), choice.top_k
    count = min(UNION_PERMUTATIONS, evidence.permutations)
    predicted = predicted.astype(np.min_scalar_type(len(evidence.classes)))  # indexed many times
    labels = permuted(evidence.truth, evidence.test_groups, count, stream(evidence.seed, "unions"))
    inside = choice.fold == np.arange(FOLDS)[:, None]  # (folds, T)
    hits = np.empty((count, FOLDS, len(predicted)))  # of each layer in each fold, mean over runs
    for layer, of_layer in enumerate(predicted):
        said = np.stack([(of_layer == label).mean(0) for label in range(len(evidence.classes))], axis=1)  # (T, C)
        hits[:, :, layer] = said[np.arange(len(said)), labels] @ inside.T
    sizes, ties = inside.sum(1), _ties(evidence)
    crossed, ordinary = np.zeros(count), np.empty(count)
    for draw, (drawn, of_fold) in enumerate(zip(labels.astype(predicted.dtype), hits, strict=True)):
        total = of_fold.sum(0)
        top = order_of(total / len(drawn), *ties)[:top_k]
        ordinary[draw] = (predicted[top] == drawn).any(0).mean()
        for rows, size, hit in zip(inside, sizes, of_fold, strict=True):
            top = order_of((total - hit) / (len(drawn) - size), *ties)[:top_k]
            crossed[draw] += (predicted[top][..., rows] == drawn[rows]).any(0).mean(0).sum() / len(drawn)
    return crossed, ordinary


def _beats_all(
    evidence: Evidence, first: np.ndarray, alone: np.ndarray | None, all_layers: np.ndarray | None
) -> dict | None:
    """Compare the first layer, and the top k alone, with all layers, in the runs that all of them have: int[R, T]."""
    if all_layers is None:
        return None
    candidates = {"first": first} if alone is None else {"first": first, "top_alone": alone}
    runs = min(len(predicted) for predicted in (*candidates.values(), all_layers))
    correct = {name: predicted[:runs] == evidence.truth for name, predicted in candidates.items()}
    whole = all_layers[:runs] == evidence.truth
    records = evidence.draws.differences([(hits, whole) for hits in correct.values()])
    return dict.fromkeys(("first", "top_alone")) | dict(zip(correct, records, strict=True))


def _drops(evidence: Evidence, choice: Choice, removed: dict[str, np.ndarray]) -> dict[str, dict]:
    """Return the cost of the removal of the top k by representation, as one family.

    Args:
        evidence: The evidence.
        choice: Of the folds.
        removed: As in `TrainedSets`.
    """
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    ordinary = []
    for name, of_set in removed.items():
        whole, ablated = (
            evidence.predicted(condition, name)[: of_set.shape[1]] for condition in ("baseline", "ablation")
        )
        pairs.append((whole == evidence.truth, choice.composite(of_set[choice.set_of_fold]) == evidence.truth))
        ordinary.append((whole == evidence.truth).mean() - (ablated == evidence.truth).mean())
    records = evidence.draws.differences(pairs) if pairs else []
    drops = {}
    for name, drop, record in zip(removed, ordinary, records, strict=True):
        drop_cf = record.pop("difference")
        drops[name] = {"drop": drop, "drop_cf": drop_cf, **record, "optimism": drop - drop_cf}
    return drops
