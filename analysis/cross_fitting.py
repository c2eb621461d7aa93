"""Cross-fitting: layers chosen on four folds of the test LoRAs and measured on the fifth.

The ranking chooses the top layers on the rows that they are then measured on, which makes their accuracy, and what
their removal costs, look larger than they are. Here each test LoRA is predicted by what the other folds chose. No layer
is trained again: of finished predictions the choice alone changes.

Shape letters as in evidence.py, and k of the top layers, S of distinct sets of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from analysis.chance import ChanceTest, guessed, permuted
from analysis.draws import ALPHA, exceedance, stream
from analysis.evidence import Evidence
from analysis.layers import order_of, vote_of

FOLDS = 5
LEAST_UNITS = 10  # test LoRAs (groups), below which a fold would hold one
PERMUTATIONS, DRAWS = 200, 400  # each chooses the layers again, for every fold
MISSING = ("folds", "sets", "runs", "first", "vote", "union", "top_alone", "beats_all")


@dataclass(frozen=True)
class TrainedSets:
    """Predictions that were trained for the cross-fitted removal; each may be empty or None.

    Attributes:
        why: The reason why nothing is cross-fitted: the layers are chosen on other rows; None: it is. There is one set
            then, the top k.
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


@dataclass(frozen=True)
class Composite:
    """Predictions of all test LoRAs, each by what the other folds chose.

    Attributes:
        first: By the first layer, int[R, T].
        vote: By the vote of the top k, int[R, T].
        union: The LoRAs that at least one of the top k recognises, bool[R, T].
    """

    first: np.ndarray
    vote: np.ndarray
    union: np.ndarray

    @classmethod
    def of(cls, predicted: np.ndarray, labels: np.ndarray, choice: Choice) -> Composite:
        """Put together the predictions of layers int[L, R, T] that a choice gives."""
        first, vote = np.empty_like(predicted[0]), np.empty_like(predicted[0])
        union = np.empty(first.shape, bool)
        for number, order in enumerate(choice.orders):
            rows = np.flatnonzero(choice.fold == number)
            top = predicted[order[: choice.top_k]][..., rows]
            first[:, rows], vote[:, rows], union[:, rows] = top[0], vote_of(top), (top == labels[rows]).any(0)
        return cls(first, vote, union)


def choices_again(
    evidence: Evidence, fold: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> Iterator[tuple[Choice, np.ndarray]]:
    """Yield the choice of each draw, by its labels int[B, T] and weights float[B, T], and the order of all folds."""
    predicted = evidence.layer_predictions()
    inside = (fold == np.arange(FOLDS)[:, None]).astype(float)  # (folds, T)
    hits = np.empty((len(labels), FOLDS, len(predicted)))  # of each layer in each fold, mean over runs
    for layer, of_layer in enumerate(predicted):
        said = np.stack([(of_layer == label).mean(0) for label in range(len(evidence.classes))], axis=1)  # (T, C)
        hits[:, :, layer] = (said[np.arange(len(said)), labels] * weights) @ inside.T
    sizes, ties = weights @ inside.T, _ties(evidence)  # (B, folds)
    for of_fold, size in zip(hits, sizes, strict=True):
        total, others = of_fold.sum(0), size.sum() - size
        orders = [order_of((total - hit) / rest, *ties) for hit, rest in zip(of_fold, others, strict=True)]
        yield Choice(fold, np.stack(orders), evidence.top_k), order_of(total / size.sum(), *ties)


def by_chance(evidence: Evidence, fold: np.ndarray, runs: int) -> dict[str, np.ndarray]:
    """Return what permuted test labels give where they also choose the layers, float[B] each.

    ``first`` and ``vote``: by how much the accuracy is above that of the same predictions on permuted labels on average
    (`guessed`). ``top_alone``: that of the vote in the first ``runs`` of the runs, for the classifier of the top k,
    which is not trained for each permutation. ``union``, and ``ordinary_union`` chosen and measured on the same rows:
    the shares themselves.
    """
    count = min(PERMUTATIONS, evidence.permutations)
    labels = permuted(evidence.truth, evidence.test_groups, count, stream(evidence.seed, "chosen by chance"))
    predicted = evidence.layer_predictions().astype(np.min_scalar_type(len(evidence.classes)))  # indexed many times
    result: dict[str, list[float]] = {"first": [], "vote": [], "top_alone": [], "union": [], "ordinary_union": []}
    again = choices_again(evidence, fold, labels, np.ones(labels.shape))
    for drawn, (choice, order) in zip(labels, again, strict=True):
        composite = Composite.of(predicted, drawn, choice)
        said = {"first": composite.first, "vote": composite.vote, "top_alone": composite.vote[:runs]}
        for name, classes in said.items():
            result[name].append((classes == drawn).mean() - guessed(classes[None], drawn)[0])
        result["union"].append(composite.union.mean())
        result["ordinary_union"].append((predicted[order[: evidence.top_k]] == drawn).any(0).mean())
    return {name: np.array(values) for name, values in result.items()}


def drawn_again(evidence: Evidence, fold: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return accuracies of `Composite` in draws of test LoRAs that also choose the layers, float[B] each.

    The folds' choices depend on each other's LoRAs, so that a composite varies more than its LoRAs alone would make it.
    Where layers are about equal this overstates by how much.

    Args:
        evidence: The evidence.
        fold: Of each test LoRA, int[T].
        weights: How often each draw has each test LoRA, float[B, T].
    """
    predicted = evidence.layer_predictions().astype(np.min_scalar_type(len(evidence.classes)))
    labels, result = np.broadcast_to(evidence.truth, weights.shape), {"first": [], "vote": [], "union": []}
    for weight, (choice, _) in zip(weights, choices_again(evidence, fold, labels, weights), strict=True):
        composite = Composite.of(predicted, evidence.truth, choice)
        correct = {"first": composite.first == evidence.truth, "vote": composite.vote == evidence.truth}
        for name, hits in (correct | {"union": composite.union}).items():
            result[name].append(hits.mean(0) @ weight / weight.sum())
    return {name: np.array(values) for name, values in result.items()}


def cross_fitted(evidence: Evidence, trained: TrainedSets) -> dict:
    """Return accuracies and drops whose layers were not chosen on the LoRAs that they are measured on.

    Each stands beside the ordinary figure; ``optimism`` is the difference.

    Args:
        evidence: The evidence.
        trained: What was trained for the removal of the sets that the folds chose.
    """
    missing = {**dict.fromkeys(MISSING), "drops": {}, "not_run": {}}
    if trained.why:
        return {"why": trained.why, **missing, **_chosen_elsewhere(evidence, trained)}
    if (choice := Choice.of(evidence)) is None:
        return {"why": f"fewer than {LEAST_UNITS} test LoRAs or groups", **missing}
    alone = None if trained.alone is None else choice.composite(trained.alone[choice.set_of_fold])
    runs = [len(predicted[0]) for predicted in (*trained.removed.values(), trained.alone) if predicted is not None]
    group = np.unique(evidence.test_groups, return_inverse=True)[1]
    share = np.full(group.max() + 1, 1 / (group.max() + 1))
    count = min(DRAWS, evidence.resamples)
    weights = stream(evidence.seed, "choices").multinomial(len(share), share, size=count)[:, group].astype(float)
    layers = evidence.layer_predictions()
    null = by_chance(evidence, choice.fold, layers.shape[1] if alone is None else len(alone))
    drawn = drawn_again(evidence, choice.fold, weights)
    composite = Composite.of(layers, evidence.truth, choice)
    top = layers[evidence.ranking[: evidence.top_k]]
    return {
        "why": None,
        "folds": FOLDS,
        "sets": len(choice.sets),
        "runs": max(runs, default=None),
        "first": _estimate(evidence, composite.first, drawn["first"], null["first"])
        | _beside(evidence, composite.first, top[0]),
        "vote": _estimate(evidence, composite.vote, drawn["vote"], null["vote"])
        | _beside(evidence, composite.vote, vote_of(top)),
        "union": _union(evidence, composite.union, drawn["union"], (top == evidence.truth).any(0).mean(), null),
        "top_alone": None if alone is None else _top_alone(evidence, alone, null["top_alone"]),
        "beats_all": _beats_all(evidence, composite.first, alone, trained.all_layers, drawn["first"], weights),
        "drops": drops_of(evidence, choice, trained.removed),
        "not_run": dict(trained.not_run),
    }


def _chosen_elsewhere(evidence: Evidence, trained: TrainedSets) -> dict:
    """Compare the first layer, and the top k alone, with all layers, where no test LoRA took part in their choice."""
    first, alone = evidence.layer_predictions()[evidence.ranking[0]], None
    result, candidates = {}, {"first": first}
    if trained.alone is not None:
        candidates["top_alone"] = alone = trained.alone[0]
        correct, p = alone == evidence.truth, ChanceTest.of(evidence, [alone]).p[0]
        record = evidence.draws.estimate(correct, evidence.draws.accuracies([correct])[0])
        result["top_alone"] = record | {"p": p, "above_null": bool(p < ALPHA)}
    if trained.all_layers is not None:
        runs = min(len(predicted) for predicted in (*candidates.values(), trained.all_layers))
        whole = trained.all_layers[:runs] == evidence.truth
        pairs = [(predicted[:runs] == evidence.truth, whole) for predicted in candidates.values()]
        records = evidence.draws.differences(pairs)
        result["beats_all"] = {"top_alone": None} | dict(zip(candidates, records, strict=True))
    return result


def _estimate(evidence: Evidence, predicted: np.ndarray, drawn: np.ndarray, null: np.ndarray) -> dict:
    """Return accuracy, interval, and comparison with chance of one composite classifier.

    Args:
        evidence: The evidence.
        predicted: Its classes, int[R, T].
        drawn: Its accuracy in draws, float[B].
        null: By how much permuted labels are above their average, of `by_chance`.
    """
    correct = predicted == evidence.truth
    p = exceedance(correct.mean() - guessed(predicted[None], evidence.truth), null[:, None])[0]
    return evidence.draws.estimate(correct, drawn) | {"p": p, "above_null": bool(p < ALPHA)}


def _top_alone(evidence: Evidence, predicted: np.ndarray, null: np.ndarray) -> dict:
    """Return `_estimate` of the classifier of the top k alone, int[R, T].

    Its runs may agree with each other more than those of the vote: the larger p of the two counts.
    """
    drawn = evidence.draws.accuracies([predicted == evidence.truth])[0]
    record = _estimate(evidence, predicted, drawn, null)
    p = max(record["p"], ChanceTest.of(evidence, [predicted]).p[0])
    return record | {"p": p, "above_null": bool(p < ALPHA)}


def _beside(evidence: Evidence, predicted: np.ndarray, ordinary: np.ndarray) -> dict:
    """Return the ordinary accuracy, and by how much it is above the cross-fitted one, int[R, T] each."""
    accuracy = (ordinary == evidence.truth).mean()
    return {"ordinary": accuracy, "optimism": accuracy - (predicted == evidence.truth).mean()}


def _union(
    evidence: Evidence, recognised: np.ndarray, drawn: np.ndarray, ordinary: float, null: dict[str, np.ndarray]
) -> dict:
    """Return the share of LoRAs that at least one of the top k recognises, bool[R, T], beside what chance gives."""
    return {
        **evidence.draws.estimate(recognised, drawn),
        "by_chance": null["union"].mean(),
        "p": exceedance(np.array([recognised.mean()]), null["union"][:, None])[0],
        "ordinary": ordinary,
        "ordinary_by_chance": null["ordinary_union"].mean(),
        "ordinary_p": exceedance(np.array([ordinary]), null["ordinary_union"][:, None])[0],
        "optimism": ordinary - recognised.mean(),
    }


def _beats_all(
    evidence: Evidence,
    first: np.ndarray,
    alone: np.ndarray | None,
    all_layers: np.ndarray | None,
    drawn: np.ndarray,
    weights: np.ndarray,
) -> dict | None:
    """Compare the first layer, and the top k alone, with all layers, in the runs that all of them have: int[R, T].

    Args:
        evidence: The evidence.
        first: Cross-fitted.
        alone: Cross-fitted.
        all_layers: Of the same representation.
        drawn: Accuracy of the first layer in draws that also choose it, float[B].
        weights: Those draws, float[B, T].
    """
    if all_layers is None:
        return None
    candidates = {"first": first} if alone is None else {"first": first, "top_alone": alone}
    runs = min(len(predicted) for predicted in (*candidates.values(), all_layers))
    shares = {name: (predicted[:runs] == evidence.truth).mean(0) for name, predicted in candidates.items()}  # (T,)
    whole = (all_layers[:runs] == evidence.truth).mean(0)
    by_lora = np.stack(list(shares.values())) - whole
    accuracies = [(weights @ share) / weights.sum(1) for share in shares.values()]
    accuracies[0] = drawn
    differences = np.stack(accuracies) - (weights @ whole) / weights.sum(1)
    records = evidence.draws.family(by_lora, differences)
    return dict.fromkeys(("first", "top_alone")) | dict(zip(candidates, records, strict=True))


def drops_of(evidence: Evidence, choice: Choice, removed: dict[str, np.ndarray]) -> dict[str, dict]:
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
