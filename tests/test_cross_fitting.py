"""Cross-fitting: the choice of layers does not see the LoRAs that it is measured on, by simulation on known truth."""

from dataclasses import replace

import numpy as np

from analysis.cross_fitting import FOLDS, Choice, TrainedSets, cross_fitted, drops_of, folds_of, orders_without
from analysis.evidence import Evidence, Predictions
from analysis.layers import order_of, vote_of
from loras.lora_files import Layer


def evidence_of(predicted: np.ndarray, y: np.ndarray, *, top_k: int = 5, groups=None, draws: int = 40) -> Evidence:
    """Evidence of layers that predict int[L, R, T] of test LoRAs y, with nothing to know on two validation LoRAs."""
    layers, runs, tested = predicted.shape
    held_out = np.concatenate([np.zeros((layers, runs, 2), int), predicted], axis=2)
    arrays = {"predicted": held_out, "log_loss": np.ones(held_out.shape)}
    rows = {"train": np.zeros(0, int), "validation": np.arange(2), "test": np.arange(2, tested + 2)}
    described = [Layer(f"layer {d}", f"m_{d // 2}_to_q", ("down", "up")[d % 2], (2, 4), "F32") for d in range(layers)]
    all_y = np.concatenate([[0, 1], y])
    ranking = order_of((predicted == y).mean((1, 2)))
    classes = [f"class {c}" for c in range(y.max() + 1)]
    predictions = Predictions(np.arange(len(all_y)), all_y, arrays)
    return Evidence(described, classes, all_y, rows, groups, ranking, top_k, predictions, 0, draws, 40)


def noisy(y: np.ndarray, shape: tuple[int, ...], right: float, generator: np.random.Generator) -> np.ndarray:
    """Predictions int[shape, T] that are right with a probability, and else any class."""
    guessed = generator.integers(0, y.max() + 1, (*shape, len(y)))
    return np.where(generator.random(guessed.shape) < right, y, guessed)


def test_folds_are_stratified_and_keep_groups_together():
    y = np.repeat(np.arange(4), [40, 20, 7, 3])
    fold = folds_of(y, np.arange(len(y)), 0)
    for label in range(4):
        assert np.ptp(np.bincount(fold[y == label], minlength=FOLDS)) <= 1
    assert np.ptp(np.bincount(fold)) <= 2
    assert (fold != folds_of(y, np.arange(len(y)), 1)).any()
    groups = np.random.default_rng(0).integers(0, 18, len(y))
    fold = folds_of(y, groups, 0)
    assert len(np.unique(np.stack([groups, fold]), axis=1).T) == 18
    assert (np.bincount(fold, minlength=FOLDS) > 0).all()
    assert np.ptp(np.bincount(folds_of(np.arange(20), np.arange(20), 0))) == 0  # each class once


def test_the_choice_for_a_fold_does_not_depend_on_its_labels():
    generator = np.random.default_rng(0)
    y = np.arange(40) % 4
    evidence = evidence_of(noisy(y, (12, 2), 0.2, generator), y)
    fold = folds_of(y, np.arange(40), 0)
    before = orders_without(evidence, fold)
    for number in range(FOLDS):
        labels = evidence.y.copy()
        inside = 2 + np.flatnonzero(fold == number)
        labels[inside] = generator.permutation(labels[inside])
        after = orders_without(replace(evidence, y=labels), fold)
        np.testing.assert_array_equal(after[number], before[number])
        assert (after != before).any()  # the others saw them


def test_the_first_of_equal_layers_is_as_good_as_any():
    """64 layers that are right on 23.5 %, 20 test LoRAs: the first looks much better than it is."""
    generator, y = np.random.default_rng(1), np.arange(20) % 10
    results = [cross_fitted(evidence_of(noisy(y, (64, 3), 0.15, generator), y), TrainedSets()) for _ in range(25)]
    ordinary, crossed = (np.array([result["first"][key] for result in results]) for key in ("ordinary", "accuracy"))
    error = crossed.std(ddof=1) / 5
    assert abs(crossed.mean() - 0.235) < 3 * error < 0.08
    assert ordinary.mean() > 0.235 + 0.1
    inside = [result["first"]["interval"][0] <= 0.235 <= result["first"]["interval"][1] for result in results]
    assert np.mean(inside) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 25)
    votes = np.array([result["vote"]["optimism"] for result in results])
    assert votes.mean() > 0.05


def test_a_union_of_guesses_is_what_choosing_again_gives():
    generator, y = np.random.default_rng(2), np.arange(30) % 6
    results = [cross_fitted(evidence_of(noisy(y, (32, 1), 0, generator), y), TrainedSets()) for _ in range(20)]
    unions = [result["union"] for result in results]
    for observed, chance in (("accuracy", "by_chance"), ("ordinary", "ordinary_by_chance")):
        differences = np.array([union[observed] - union[chance] for union in unions])
        assert abs(differences.mean()) < 3 * differences.std(ddof=1) / np.sqrt(20)
    assert np.mean([union["ordinary"] - union["accuracy"] for union in unions]) > 0.05
    claims = [[result[kind]["p"] < 0.05 for kind in ("first", "vote", "union")] for result in results]
    assert (np.mean(claims, axis=0) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20)).all()


def plurality(predicted: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Classes that most of the layers int[L, T] say, ties by chance: a classifier of all these layers, int[T]."""
    counts = np.stack([(predicted == label).sum(0) for label in range(predicted.max() + 1)])
    return (counts + generator.random(counts.shape) / 2).argmax(0)


def test_the_drop_is_not_larger_for_having_been_chosen():
    """24 equal layers, all of them read by a plurality vote: without any five of them it loses the same."""
    generator, y = np.random.default_rng(3), np.arange(40) % 4
    many = np.arange(20_000) % 4
    population = noisy(many, (24,), 0.12, generator)  # of which the truth is known
    whole, less = (np.mean(plurality(population[:count], generator) == many) for count in (24, 19))
    truth, records = whole - less, []
    for _ in range(40):
        layers = noisy(y, (24,), 0.12, generator)
        evidence = evidence_of(layers[:, None], y, draws=400)
        without = {"baseline": layers, "ablation": np.delete(layers, evidence.ranking[:5], 0)}
        for condition, rest in without.items():
            predicted = np.concatenate([[0, 1], plurality(rest, generator)])[None]
            evidence.predictions.conditions[condition] = {"vote": {"predicted": predicted}}
        choice = Choice.of(evidence)
        removed = np.stack([plurality(np.delete(layers, top, 0), generator)[None] for top in choice.sets])
        records.append(drops_of(evidence, choice, {"vote": removed})["vote"])
    crossed, ordinary = (np.array([record[key] for record in records]) for key in ("drop_cf", "drop"))
    error = crossed.std(ddof=1) / np.sqrt(40)
    assert abs(crossed.mean() - truth) < 3 * error < 0.05
    assert ordinary.mean() > truth + 0.02 and ordinary.mean() - crossed.mean() > 0.02
    inside = [low - 1e-9 <= truth <= high + 1e-9 for low, high in (record["interval"] for record in records)]
    assert np.mean(inside) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 40)


def test_the_first_layer_beats_all_layers_where_these_lose_it():
    generator, y = np.random.default_rng(4), np.arange(100) % 4
    layers = noisy(y, (10, 2), 0.1, generator)
    layers[3] = noisy(y, (2,), 0.8, generator)
    evidence = evidence_of(layers, y, top_k=1)
    everything = noisy(y, (2,), 0.4, generator)
    sets = Choice.of(evidence).sets
    assert sets == [[3]]
    trained = TrainedSets(alone=layers[[3]], all_layers=everything)
    result = cross_fitted(evidence, trained)
    assert result["sets"] == 1 and result["runs"] == 2 and result["first"]["optimism"] == 0
    assert result["beats_all"]["first"]["interval"][0] > 0 and result["beats_all"]["top_alone"]["significant"]
    assert result["top_alone"]["accuracy"] == result["first"]["accuracy"] > 0.8 and result["top_alone"]["p"] < 0.05
    without = cross_fitted(evidence, TrainedSets(all_layers=everything))
    assert without["top_alone"] is None and without["beats_all"]["top_alone"] is None and without["runs"] is None
    assert cross_fitted(evidence, TrainedSets())["beats_all"] is None


def test_nothing_is_cross_fitted_of_few_units_or_of_layers_chosen_elsewhere():
    y = np.arange(36) % 3
    predicted = noisy(y, (6, 1), 0.5, np.random.default_rng(5))
    few = evidence_of(predicted, y, groups=np.concatenate([[8, 8], np.arange(36) // 4]))
    assert Choice.of(few) is None
    assert "fewer than 10" in cross_fitted(few, TrainedSets())["why"]
    enough = evidence_of(predicted, y)
    result = cross_fitted(enough, TrainedSets(why="on validation rows"))
    assert result["why"] == "on validation rows" and result["first"] is None and result["drops"] == {}
    assert result.keys() == cross_fitted(enough, TrainedSets()).keys()


def test_top_layers_alone_in_fewer_runs_than_the_ranking_are_not_called_for_that():
    """Three runs of guesses vary more than the vote of ten, by which the choice of layers is accounted for."""
    generator, y, trials = np.random.default_rng(6), np.arange(60) % 4, 20
    called = 0
    for _ in range(trials):
        evidence = replace(evidence_of(generator.integers(0, 4, (8, 10, 60)), y, draws=2), permutations=100)
        alone = generator.integers(0, 4, (len(Choice.of(evidence).sets), 3, 60))
        called += cross_fitted(evidence, TrainedSets(alone=alone))["top_alone"]["above_null"]
    assert called <= trials * (0.05 + 3 * np.sqrt(0.05 * 0.95 / trials))


def test_where_validation_chooses_the_top_layers_themselves_are_compared_with_all():
    generator, y = np.random.default_rng(7), np.arange(60) % 3
    layers, everything = noisy(y, (6, 3), 0.8, generator), noisy(y, (2,), 0.2, generator)
    trained = TrainedSets(why="on validation rows", alone=layers[:1], all_layers=everything)
    evidence = evidence_of(layers, y, draws=300)
    result = cross_fitted(evidence, trained)
    assert result["first"] is None and result["top_alone"]["accuracy"] == (layers[0] == y).mean()
    assert result["top_alone"]["above_null"] and result["beats_all"]["top_alone"]["interval"][0] > 0
    assert result["beats_all"]["first"]["interval"][0] > 0
    without = cross_fitted(evidence, replace(trained, alone=None))
    assert without["top_alone"] is None and without["beats_all"]["top_alone"] is None


def test_a_vote_ties_for_the_better_ranked():
    predicted = np.array([[[0, 1, 2]], [[1, 1, 0]], [[1, 2, 1]]])
    np.testing.assert_array_equal(vote_of(predicted), [[1, 1, 2]])
    many = np.random.default_rng(8).integers(0, 5, (9, 2, 30))
    for run, lora in np.ndindex(2, 30):
        said = many[:, run, lora].tolist()
        assert vote_of(many)[run, lora] == max(said, key=said.count)
