"""Answers on predictions and features in which the answer is planted, against references, and on degenerate ones."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from analysis import evidence, questions
from analysis.evidence import Evidence, exceedance
from analysis.layers import agreement, kendall_w, linear_cka, place, top_share
from analysis.questions import Controls, analyse, best_by_chance, representations
from analysis.removal import plan_controls, robustness
from loras.lora_files import Layer
from training.classifier import Models, train_classifiers
from training.stacks import Schedule, Split, standardise


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch):
    monkeypatch.setattr(evidence, "RESAMPLES", 2000)
    monkeypatch.setattr(evidence, "PERMUTATIONS", 2000)


def evidence_of(
    *, layers=12, classes=6, each=40, tested=20, runs=2, top_k=3, names=("stats", "spectral"), groups=None, seed=0
) -> Evidence:
    """Evidence whose predictions are guessed: of each class ``each`` LoRAs, of which ``tested`` are test rows."""
    y = np.arange(classes * each) % classes
    places = np.arange(len(y)) // classes  # of a LoRA among those of its class
    last, validated = each - tested, max(1, (each - tested) // 4)
    parts = {"train": places < last - validated, "test": places >= last}
    rows = {part: np.flatnonzero(where) for part, where in parts.items()}
    rows["validation"] = np.flatnonzero(~parts["train"] & ~parts["test"])
    described = [Layer(f"layer {d}", f"m_{d // 2}_to_q", ("down", "up")[d % 2], (2, 4), "F32") for d in range(layers)]
    generator, held_out = np.random.default_rng(1), len(rows["validation"]) + len(rows["test"])
    keys = {"layers": (layers, runs)} | {f"{c}/{name}": (runs,) for c in ("baseline", "ablation") for name in names}
    predictions = {
        f"{key}/predicted": generator.integers(0, classes, (*shape, held_out), dtype=np.int32)
        for key, shape in keys.items()
    }
    labels = [f"class {c}" for c in range(classes)]
    return Evidence(described, labels, y, rows, groups, np.arange(layers), top_k, predictions, seed)


def held_out(e: Evidence) -> np.ndarray:
    return e.y[np.concatenate([e.rows["validation"], e.rows["test"]])]


def tell(e: Evidence, name: str, knows: np.ndarray, says: np.ndarray | None = None) -> None:
    """Let predictions be right (or say something else) where ``knows``, and leave them guessed elsewhere."""
    key = f"{name}/predicted"
    e.predictions[key] = np.where(knows, held_out(e) if says is None else says, e.predictions[key]).astype(np.int32)


def share(e: Evidence, of: float | np.ndarray) -> np.ndarray:
    """A share of the held-out LoRAs, the same of each class, and others in each run where ``of`` has runs."""
    order = np.arange(len(held_out(e))) // len(e.classes)
    return order % 20 < 20 * np.asarray(of)[..., None]


def features_of(e: Evidence, width: int = 7, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(e.y), len(e.layers), width)).astype(np.float32)


def updates_of(e: Evidence, modules: int | None = None, rank_one: bool = False) -> np.ndarray:
    modules = len(e.layers) // 2 if modules is None else modules
    updates = np.random.default_rng(3).uniform(1, 4, (len(e.y), modules, 2)).astype(np.float32)
    if rank_one:
        updates[..., 0] = 1
    return updates


def controls_of(e: Evidence, cheap: bool = False) -> Controls:
    """All sections (cheap explanations, which take a second, where asked for), with guessed predictions."""
    generator, layers, n = np.random.default_rng(4), len(e.layers), len(e.truth)
    roles = [layer.role for layer in e.layers]
    planned = plan_controls(e.ranking, roles, e.top_k, runs=2, draws=5, points=11, conditional=True, seed=0)
    predicted = generator.integers(0, len(e.classes), (len(planned.names), 2, n))
    return Controls(
        level="all",
        conditions={"stats": (planned, predicted)},
        attributed=("stats", generator.random((2, layers))),
        cheap={"norms": generator.normal(size=(len(e.y), 3)), "metadata": None} if cheap else {},
        unused=["artist"],
        grouped=("artist", "stats", e.truth, np.arange(n) // 2, e.predicted("baseline/stats")),
        shuffled=generator.random((3, layers)),
    )


def analysed(e: Evidence, controls: Controls | None = None, **more) -> dict:
    """The analysis, as strict JSON gives it back."""
    names = list(dict.fromkeys(key.split("/")[1] for key in e.predictions if key.startswith("baseline/")))
    inputs = {"stats_features": features_of(e), "updates": updates_of(e), "samples": {}} | more
    found = analyse(e, names, controls=controls or Controls("basic"), **inputs)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def outcome(found: dict, part: str) -> dict:
    (one,) = (one for one in found["hypotheses"] if part in one["hypothesis"])
    return one


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_the_same_inputs_give_the_same_answers_and_stay_as_they_were():
    e, samples = evidence_of(), {"spectral": (np.ones((5, 3, 2)), ["a", "b"])}
    controls, features, updates = controls_of(e), features_of(e), updates_of(e)
    before = copy.deepcopy((e.predictions, e.rows, e.y, controls, features, updates, samples))
    first = analysed(e, controls, stats_features=features, updates=updates, samples=samples)
    again = analysed(evidence_of(), controls, stats_features=features, updates=updates, samples=samples)
    assert json.dumps(first) == json.dumps(again)
    np.testing.assert_equal((e.predictions, e.rows, e.y), before[:3])
    np.testing.assert_equal(copy.deepcopy(controls.__dict__["shuffled"]), before[3].shuffled)
    np.testing.assert_equal(controls.conditions["stats"][1], before[3].conditions["stats"][1])
    np.testing.assert_equal((features, updates, samples), before[4:])


def test_guesses_are_called_guesses_everywhere():
    e = evidence_of()
    found = analysed(e, controls_of(e, cheap=True))
    assert found["layers"]["num_above_null"] == 0
    assert found["robustness"]["stats"]["verdict"] == "no signal"
    assert found["representations"]["indistinguishable_from_best"]
    assert not found["representations"]["best_above_chance"]
    assert found["rank_structure"]["num_significant"] == 0
    assert found["cheap"]["as_good"] == []
    assert {one["outcome"] for one in found["hypotheses"]} <= {"undecided", "not answerable"}


DEGENERATE = {
    "two layers": {"layers": 2, "top_k": 1},
    "top layer only": {"top_k": 1},
    "all layers but one removed": {"top_k": 11},
    "two classes": {"classes": 2},
    "one run": {"runs": 1},
    "one test LoRA of each class": {"tested": 1, "each": 6},
    "one representation": {"names": ("stats",)},
    "negative seed": {"seed": -3},
    "three layers, of which one has no partner": {"layers": 3, "top_k": 1},
}


@pytest.mark.parametrize("sizes", DEGENERATE.values(), ids=DEGENERATE)
def test_every_section_has_an_answer_for_small_numbers(sizes):
    e = evidence_of(**sizes)
    analysed(e, controls_of(e, cheap=e.seed < 0 or len(e.truth) < 10))


def test_no_representation_and_no_controls():
    found = analysed(evidence_of(names=()), Controls("none"))
    assert found["representations"] is None and found["robustness"] == {} and found["cheap"] is None
    assert outcome(found, "beats stats")["outcome"] == "not answerable"
    assert outcome(found, "graceful")["outcome"] == "not answerable"


@pytest.mark.parametrize("said", ["one class", "truth"])
def test_all_predictions_equal(said):
    e = evidence_of()
    for key, values in e.predictions.items():
        e.predictions[key] = np.broadcast_to(held_out(e) if said == "truth" else 0, values.shape)
    planned, predicted = controls_of(e).conditions["stats"]
    same = np.broadcast_to(e.truth if said == "truth" else 0, predicted.shape)
    found = analysed(e, Controls("all", {"stats": (planned, same)}, ("stats", np.zeros((2, 12)))))
    assert found["layers"]["num_above_null"] == (12 if said == "truth" else 0)
    assert found["layers"]["stability"]["kendall_w"] is None
    assert found["layers"]["depth"] is None and found["attribution"]["spearman"] is None
    assert [record["top_k_share"] for record in found["layers"]["records"]] == [0.25] * 12
    assert found["layer_information"]["kappa"]["mean"] == 1
    assert found["representations"]["pairs"]["baseline"][0]["p"] == 1
    assert found["robustness"]["stats"]["verdict"] == ("redundant" if said == "truth" else "no signal")


def test_constant_features_are_no_clusters_of_anything():
    e = evidence_of()
    found = analysed(e, stats_features=np.ones((len(e.y), 12, 7), np.float32), updates=np.ones((len(e.y), 6, 2)))
    assert found["layer_information"]["clusters"]["count"] == 12
    assert found["rank_structure"]["num_significant"] == 0
    assert found["rank_structure"]["complexity"]["spearman_spread"] is None


def test_a_representation_of_one_run_beside_others_of_several():
    e = evidence_of(names=("stats", "update_kernel"), runs=3)
    for condition in ("baseline", "ablation"):
        e.predictions[f"{condition}/update_kernel/predicted"] = held_out(e)[None]
    found = analysed(e)["representations"]
    assert found["best"] == "update_kernel" and found["indistinguishable_from_best"] == []
    assert found["intervals"]["baseline"]["update_kernel"] == [1, 1]
    assert found["p_family"]["update_kernel"] < 0.05 < found["p_family"]["stats"]
    assert found["drops"]["update_kernel"] == {"drop": 0, "interval": [0, 0], "p": 1, "p_holm": 1}


def test_a_class_without_a_test_row_has_no_recall():
    e = evidence_of(classes=4)
    kept = e.rows["test"][e.y[e.rows["test"]] != 2]
    predictions = {key: values[..., : values.shape[-1] - 20] for key, values in e.predictions.items()}
    e = replace(e, rows=e.rows | {"test": kept}, predictions=predictions)
    found = analysed(e, controls_of(e))
    assert [recall is None for recall in found["concepts"]["recall"][0]] == [False, False, True, False]
    assert found["concepts"]["drop"]["stats"][2] is None
    assert found["rank_structure"]["complexity"]["by_class"][2]["recall"] is None


def test_a_number_that_is_not_finite_is_refused():
    assert questions.plain({"a": np.float32(0.5), 1: [np.int64(2), None, np.bool_(True), -1e-12]}) == {
        "a": 0.5,
        "1": [2, None, True, 0.0],
    }
    with pytest.raises(ValueError, match="not finite"):
        questions.plain([math.inf])


# -- 1. which layers predict -------------------------------------------------------------------------------------------


def test_a_layer_that_knows_half_of_the_classes_is_found_and_no_other():
    e = evidence_of()
    knows = np.zeros((12, 1, len(held_out(e))), bool)
    knows[5] = held_out(e) < 3
    tell(e, "layers", knows)
    found = analysed(e)
    assert [record["above_null"] for record in found["layers"]["records"]] == [depth == 5 for depth in range(12)]
    record = found["layers"]["records"][5]
    low, high = record["interval"]
    assert low < record["accuracy"] < high and record["top_k_share"] == 1 and record["p_family"] < 0.001
    assert record["val_accuracy"] == pytest.approx((e.validated("layers")[5]).mean())
    recall = np.array(found["concepts"]["recall"])
    assert (recall[5, :3] == 1).all() and (np.delete(recall, 5, 0) < 0.5).all() and (recall[5, 3:] < 0.5).all()


@pytest.mark.parametrize(("slope", "expected"), [(1, "confirmed"), (-1, "refuted"), (0, "undecided")])
def test_later_layers_predict_more(slope, expected):
    e = evidence_of()
    tell(e, "layers", share(e, np.full((12, 1), 0.5) + slope * np.linspace(-0.4, 0.4, 12)[:, None]))
    found = analysed(e)
    assert outcome(found, "later layers")["outcome"] == expected
    if slope:
        assert found["layers"]["depth"]["r"] * slope > 0.9
        assert found["layers"]["rankings"]["kendall_tau"] > 0.5 and found["layers"]["stability"]["kendall_w"] > 0.8


def test_four_layers_in_perfect_order_are_no_proof():
    e = evidence_of(layers=4, top_k=1)
    tell(e, "layers", share(e, np.linspace(0.2, 0.8, 4)[:, None]))
    found = analysed(e)
    assert found["layers"]["depth"]["r"] == pytest.approx(1)
    assert found["layers"]["depth"]["p"] == pytest.approx(2 / 24)
    assert outcome(found, "later layers")["outcome"] == "undecided"


def test_accuracy_by_role_and_place():
    e = evidence_of()
    tell(e, "layers", share(e, 0.6 * (np.arange(12)[:, None] % 2)))
    groups = analysed(e)["layers"]["groups"]
    assert groups["role"]["down"]["interval"][1] < groups["role"]["up"]["interval"][0]
    assert groups["projection"]["to_q"]["layers"] == 12 and groups["attention"] == {}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", ("to_q", "attn1", "mid_block")),
        ("transformer_single_transformer_blocks_7_attn_to_k", ("to_k", "attn", "single_transformer_blocks_7")),
        ("base_model_model_model_layers_12_self_attn_q_proj", ("q_proj", "self_attn", "layers_12")),
        ("unet_up_blocks_1_resnets_0_conv1", ("conv1", None, "up_blocks_1")),
        ("something_else", (None, None, None)),
    ],
)
def test_the_place_of_a_module(module, expected):
    assert tuple(place(module).values()) == expected


def test_places_in_the_top_k_are_shared_where_layers_tie():
    drawn = np.array([[0.5, 0.9], [0.5, 0.8], [0.5, 0.8], [0.1, 0.7]])
    np.testing.assert_allclose(top_share(drawn, 2), [(2 / 3 + 1) / 2, (2 / 3 + 0.5) / 2, (2 / 3 + 0.5) / 2, 0])
    many = np.random.default_rng(0).integers(0, 5, (9, 50)) / 5
    assert top_share(many, 4).sum() == pytest.approx(4)


def test_kendalls_w_is_the_textbooks():
    scores = np.random.default_rng(0).normal(size=(8, 5))  # no ties
    sums = stats.rankdata(scores, axis=0).sum(1)
    textbook = 12 * np.square(sums - sums.mean()).sum() / (5**2 * (8**3 - 8))
    assert kendall_w(scores) == pytest.approx(textbook)
    assert kendall_w(np.tile(np.arange(8.0)[:, None], 3)) == pytest.approx(1)
    assert kendall_w(scores[:, :1]) is None and kendall_w(scores[:2]) is None


# -- 3. which representation -------------------------------------------------------------------------------------------


def test_the_best_of_several_is_compared_with_the_best_that_chance_gives():
    e = evidence_of(names=[f"guess {i}" for i in range(15)], runs=3)
    guesses = [e.predicted(f"baseline/guess {i}") for i in range(15)]
    null = e.null(np.stack(guesses))
    np.testing.assert_array_equal(best_by_chance(e, guesses), null.max(1))
    fewer = best_by_chance(e, [guesses[0], guesses[1][:1]])
    np.testing.assert_array_equal(fewer, np.maximum(null[:, 0], e.null(guesses[1][None, :1])[:, 0]))
    accuracies = np.array([(guess == e.truth).mean() for guess in guesses])
    found = analysed(e)["representations"]
    assert (exceedance(accuracies, null) < 0.05).any()  # by itself; not where fourteen others guess too
    assert min(found["p_family"].values()) > 0.05 and found["best_above_chance"] is False


def test_more_than_permuted_labels_but_less_than_the_largest_class_is_not_above_chance():
    e = evidence_of(classes=2, each=60, names=("stats", "spectral"), runs=1)
    few = np.concatenate([e.rows["test"][e.truth == 0], e.rows["test"][e.truth == 1][:5]])
    e = replace(e, rows=e.rows | {"test": few})  # 20 of one class and 5 of the other
    says = np.concatenate([e.y[e.rows["validation"]], np.ones(6), np.zeros(14), np.ones(5)]).astype(np.int32)
    e.predictions.update(dict.fromkeys(e.predictions, says[None]))  # 19 of 25 are right
    found = representations(e, ["stats", "spectral"])
    assert found["p_family"]["stats"] < 0.05 and e.chance == 0.8 and not found["best_above_chance"]


def test_representations_are_compared_in_pairs():
    e = evidence_of(names=("stats", "spectral", "ensemble", "flat_vec"))
    for name, known in (("stats", 0.5), ("spectral", 0.5), ("ensemble", 0.95)):
        tell(e, f"baseline/{name}", share(e, known))
        tell(e, f"ablation/{name}", share(e, known if name != "stats" else 0.1))
    found = analysed(e)
    compared = found["representations"]
    assert compared["best"] == "ensemble" and compared["indistinguishable_from_best"] == []
    assert compared["p_family"]["ensemble"] == pytest.approx(1 / 2001) and compared["p_family"]["flat_vec"] > 0.05
    pairs = {(one["a"], one["b"]): one for one in compared["pairs"]["baseline"]}
    assert len(pairs) == 6 and pairs["stats", "spectral"]["p_holm"] > 0.5
    low, high = pairs["stats", "ensemble"]["interval"]
    assert low < pairs["stats", "ensemble"]["difference"] < high < 0 and pairs["stats", "ensemble"]["p_holm"] < 0.05
    assert compared["drops"]["stats"]["interval"][0] > 0.2 and compared["drops"]["stats"]["p_holm"] < 0.05
    assert compared["drops"]["ensemble"]["p_holm"] > 0.05
    assert np.mean(found["concepts"]["drop"]["stats"]) == pytest.approx(compared["drops"]["stats"]["drop"])
    told = outcome(found, "beats stats")
    assert told["outcome"] == "confirmed" and "ensemble" in told["why"] and told["interval"] == [-high, -low]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"stats": 0.9, "spectral": 0.3, "ensemble": 0.4}, "refuted"),
        ({"stats": 0.9, "spectral": 0.3, "ensemble": 0.9}, "undecided"),
        ({"stats": 0.9, "spectral": 0.3}, "undecided"),  # nobody asked the ensemble
        ({"stats": 0.9}, "not answerable"),
    ],
)
def test_ensemble_or_spectral_beats_stats(known, expected):
    e = evidence_of(names=tuple(known))
    for name, of in known.items():
        tell(e, f"baseline/{name}", share(e, of))
    assert outcome(analysed(e), "beats stats")["outcome"] == expected


def test_three_wins_out_of_three_are_no_proof():
    e = evidence_of(classes=3, tested=1, each=6)
    tell(e, "baseline/stats", np.True_)
    tell(e, "baseline/spectral", np.True_, (held_out(e) + 1) % 3)
    (pair,) = analysed(e)["representations"]["pairs"]["baseline"]
    assert pair["difference"] == 1 and pair["p"] == 0.25  # of the 8 ways to exchange the two, 2 are as extreme


# -- 4. different information ------------------------------------------------------------------------------------------


def test_kappa_and_disagreement_are_scikit_learns():
    predicted = np.random.default_rng(0).integers(0, 4, (3, 1, 50))
    disagreement, kappa = agreement(predicted, 4)
    for a in range(3):
        for b in range(3):
            assert kappa[a, b] == pytest.approx(cohen_kappa_score(predicted[a, 0], predicted[b, 0]))
            assert disagreement[a, b] == pytest.approx((predicted[a] != predicted[b]).mean())
    twice = agreement(np.repeat(predicted, 2, axis=1), 4)
    np.testing.assert_allclose(twice, (disagreement, kappa))
    assert (agreement(np.zeros((2, 1, 5), int), 3)[1] == 1).all()


def test_cka_is_the_papers_and_sees_through_rotations():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 3, 5))
    x[:, 2] = 3 * x[:, 0] @ np.linalg.qr(generator.normal(size=(5, 5)))[0]
    found = linear_cka(x)
    a, b = (x[:, i] - x[:, i].mean(0) for i in (0, 1))
    gram_a, gram_b = a @ a.T, b @ b.T
    assert found[0, 1] == pytest.approx((gram_a * gram_b).sum() / np.linalg.norm(gram_a) / np.linalg.norm(gram_b))
    assert found[0, 2] == pytest.approx(1) and found[0, 1] < 0.5
    np.testing.assert_allclose(np.diag(found), 1)


def test_layers_with_the_same_features_are_one_cluster():
    e = evidence_of()
    features = features_of(e)
    features[:, 7] = 2 * features[:, 2] + 1
    clusters = analysed(e, stats_features=features)["layer_information"]["clusters"]
    assert clusters["of_layer"][7] == clusters["of_layer"][2] and clusters["count"] == 11
    assert sum(member["layers"] for member in clusters["members"]) == 12
    assert sorted(clusters["order"]) == list(range(12)) and len(clusters["linkage"]) == 11


def test_standardised_features_forget_scale_and_outliers():
    x = np.random.default_rng(0).normal(size=(500, 2, 3))
    x[0, 0, 0], x[:, 1, 1] = 1e6, 7
    found = questions.standardised(x)
    assert np.abs(found).max() == questions.CLIP and (found[:, 1, 1] == 0).all()
    assert found[:, 1, 0].mean() == pytest.approx(0, abs=1e-12) and found[:, 1, 0].std() == pytest.approx(1)


def test_what_the_union_of_the_top_layers_knows():
    e = evidence_of(layers=8, top_k=3)
    knows = np.zeros((8, 1, len(held_out(e))), bool)
    for layer in range(3):
        knows[layer] = held_out(e) // 2 == layer  # two classes each
    tell(e, "layers", knows)
    union = analysed(e)["layer_information"]["union"]
    assert union["any_of_top_k"] == 1 and union["best_alone"] < 0.55 and union["interval"][0] > 0.4
    assert union["any_of_top_k"] > union["any_by_chance"] + 0.3


def test_the_union_of_guesses_is_what_chance_gives_and_a_vote_of_them_gains_nothing():
    union = analysed(evidence_of(tested=200, each=230))["layer_information"]["union"]
    assert union["gain"] > 0.2 and union["any_of_top_k"] == pytest.approx(union["any_by_chance"], abs=0.03)
    assert union["vote_interval"][0] <= 0 <= union["vote_interval"][1]


@pytest.mark.parametrize(("swapped", "expected"), [(False, "confirmed"), (True, "refuted")])
def test_top_layers_separate_clusters_and_others_concepts_within_them(swapped, expected):
    e = evidence_of(classes=6)
    features = features_of(e) / 10 + 5 * (e.y % 2)[:, None, None]  # two clusters: even and odd classes
    generator, truth = np.random.default_rng(5), held_out(e)
    of_cluster = (truth + 2 * generator.integers(0, 3, (2, len(truth)))) % 6  # the cluster is right, the class guessed
    coarse = (np.arange(12) < 3) != swapped
    tell(e, "layers", share(e, 0.8) & coarse[:, None, None], of_cluster)
    tell(e, "layers", share(e, 0.8) & ~coarse[:, None, None])
    found = analysed(e, stats_features=features)
    of_class = found["layer_information"]["concept_clusters"]["of_class"]
    assert len(set(of_class[::2])) == len(set(of_class[1::2])) == 1 and of_class[0] != of_class[1]
    assert outcome(found, "clusters of concepts")["outcome"] == expected
    scores = found["layer_information"]["coarse"]["others" if swapped else "top_k"]
    assert scores["coarse"] > 0.6 and scores["fine"] < 0.2


# -- 5. rank structure -------------------------------------------------------------------------------------------------


def test_an_effective_rank_that_differs_by_class_is_found_in_its_module_only():
    e = evidence_of()
    updates = updates_of(e)
    updates[:, 4, 0] += e.y / 2
    found = analysed(e, updates=updates)["rank_structure"]
    assert found["answerable"] and found["why"] is None and found["tested"] == "effective rank"
    assert [record["p_fdr"] < 0.05 for record in found["modules"]] == [p == 4 for p in range(6)]
    assert found["num_significant"] == 1 and found["modules"][4]["module"] == "m_4_to_q"
    medians = found["modules"][4]["median_by_class"]
    assert medians == pytest.approx([np.median(updates[e.y == c, 4, 0]) for c in range(6)])
    ranks = updates[..., 0].astype(float)
    p = [stats.kruskal(*(ranks[e.y == c, m] for c in range(6))).pvalue for m in range(6)]
    np.testing.assert_allclose([record["p"] for record in found["modules"]], p, atol=1e-8)
    np.testing.assert_allclose(
        [record["p_fdr"] for record in found["modules"]], stats.false_discovery_control(p), atol=1e-8
    )


def test_at_rank_one_the_norm_is_tested_instead():
    e = evidence_of()
    updates = updates_of(e, rank_one=True)
    updates[:, 0, 1] += e.y
    updates[:, 1, 0] += 1e-7 * e.y  # rounding
    found = analysed(e, updates=updates)
    structure = found["rank_structure"]
    assert not structure["answerable"] and "rank 1" in structure["why"] and structure["tested"] == "norm of the update"
    assert structure["num_significant"] == 1 and structure["modules"][0]["p_fdr"] < 1e-6
    assert structure["complexity"]["by_class"][0]["effective_rank"] is None
    told = outcome(found, "effective rank")
    assert told["outcome"] == "not answerable" and told["number"] is None and "rank 1" in told["why"]


def test_a_module_whose_rank_never_varies_is_no_finding_beside_one_that_does():
    e = evidence_of()
    updates = updates_of(e)
    updates[:, 2, 0] = 1 + 1e-6 * e.y
    assert analysed(e, updates=updates)["rank_structure"]["modules"][2]["p"] == 1


def test_layers_without_a_partner_have_no_update():
    e = evidence_of(layers=6)
    layers = [*e.layers[:4], e.layers[5], Layer("layer 6", "m_6_to_q", "down", (2, 4), "F32")]
    e = replace(e, layers=layers)
    found = analysed(e, updates=updates_of(e, 2))["rank_structure"]
    assert [record["module"] for record in found["modules"]] == ["m_0_to_q", "m_1_to_q"]


def test_no_pair_at_all_is_not_answerable():
    e = evidence_of(layers=8)
    single = [Layer(f"layer {d}", f"m_{d}", "down", (2, 4), "F32") for d in range(8)]
    e = replace(e, layers=single)
    found = analysed(e, updates=updates_of(e, 0))
    structure = found["rank_structure"]
    assert not structure["answerable"] and structure["modules"] == [] and structure["tested"] is None
    assert structure["complexity"]["spearman_recall"] is None and "both of its layers" in structure["why"]
    assert outcome(found, "effective rank")["outcome"] == "not answerable"


def test_loras_of_one_group_are_one_witness():
    each, classes = 40, 3
    groups = np.arange(each * classes) % classes + classes * (np.arange(each * classes) // classes // 10)
    e = evidence_of(classes=classes, each=each, groups=groups)  # 4 groups of 10 for each class
    effect = np.random.default_rng(0).normal(size=(12, 6))[groups]
    updates = np.stack([2 + effect + 0.01 * updates_of(e)[..., 0], updates_of(e)[..., 1]], axis=-1)
    assert stats.kruskal(*(updates[e.y == c, 0, 0] for c in range(3))).pvalue < 0.001  # every LoRA a witness: fooled
    found = analysed(e, updates=updates)
    assert found["rank_structure"]["num_significant"] == 0
    assert found["permuted"] == "groups" and found["units"] == 6


@pytest.mark.parametrize(("sign", "expected"), [(1, "confirmed"), (-1, "refuted")])
def test_effective_rank_goes_with_complexity(sign, expected):
    e = evidence_of(classes=8)
    features = features_of(e) * (1 + 0.4 * e.y)[:, None, None] + 10 * e.y[:, None, None]
    updates = updates_of(e)
    updates[..., 0] += sign * e.y[:, None]
    found = analysed(e, stats_features=features, updates=updates)
    assert outcome(found, "effective rank")["outcome"] == expected
    spread = [one["spread"] for one in found["rank_structure"]["complexity"]["by_class"]]
    assert spread == sorted(spread)


def test_features_that_coincide_and_those_that_never_vary_are_named():
    x = np.random.default_rng(0).random((10, 4, 5))
    x[..., 3], x[..., 4] = x[..., 1], 2
    assert questions.coinciding(x, list("abcde")) == ([["b", "d"]], ["e"])
    found = analysed(evidence_of(), samples={"spectral": (x, list("abcde")), "plain": (x[..., :2], ["a", "b"])})
    assert found["rank_structure"]["coinciding"] == {"spectral": [["b", "d"]]}
    assert found["rank_structure"]["constant"] == {"spectral": ["e"]}


# -- attribution, cheap explanations, groups, shuffles -----------------------------------------------------------------


def test_attribution_that_agrees_with_the_ranking():
    e = evidence_of()
    tell(e, "layers", share(e, np.linspace(0.9, 0.1, 12)[:, None]))
    found = analysed(e, Controls("basic", attributed=("stats", np.tile(np.linspace(12, 1, 12), (3, 1)))))["attribution"]
    assert found["spearman"] > 0.9 and found["interval"][0] > 0.8 and found["same_top_k"] == 3
    assert sum(found["by_layer"]) == pytest.approx(1) and found["representation"] == "stats"


@pytest.mark.parametrize(("known", "as_good"), [(0.2, ["metadata"]), (1.0, [])])
def test_a_cheap_explanation_as_good_as_the_weights_is_named(known, as_good):
    e = evidence_of()
    tell(e, "baseline/stats", share(e, known))
    generator = np.random.default_rng(0)
    tells = np.where(generator.random(len(e.y)) < 0.7, e.y, generator.integers(0, 6, len(e.y)))
    cheap = {"metadata": np.eye(6)[tells], "norms": generator.normal(size=(len(e.y), 4)), "ranks and shapes": None}
    found = analysed(e, Controls("basic", cheap=cheap))["cheap"]
    assert found["as_good"] == as_good and found["ranks and shapes"] is None
    assert found["metadata"]["p"] < 0.001 < 0.05 < found["norms"]["p"]
    assert found["metadata"]["accuracy"] == pytest.approx(0.75, abs=0.1)


def test_a_leak_through_groups_shows_in_the_grouped_split():
    e = evidence_of()
    tell(e, "baseline/stats", share(e, 0.95))
    grouped = ("artist", "stats", e.truth, np.arange(120) // 10, np.random.default_rng(0).integers(0, 6, (2, 120)))
    found = analysed(e, Controls("basic", unused=["artist"], grouped=grouped))["groups"]
    assert found["random_split"] > 0.9 and found["interval"][1] < 0.4 and found["unused"] == ["artist"]


def test_shuffled_labels_against_the_best_layer():
    e = evidence_of()
    tell(e, "layers", share(e, 0.5 * (np.arange(12) == 3)[:, None]))
    found = analysed(e, Controls("basic", shuffled=np.full((19, 12), 0.2)))["null_shuffles"]
    assert found["p"] == 1 / 20 and found["observed"] > 0.5 and found["largest"] == [0.2] * 19


def test_norms_are_those_of_the_factors_and_the_updates():
    weights = np.random.default_rng(0).normal(1, 2, (4, 3, 50))
    described = np.stack([weights.mean(2), weights.std(2)], axis=-1)
    found = questions.norms(described, np.full((4, 1, 2), 7.0))
    np.testing.assert_allclose(found[:, :3], np.linalg.norm(weights, axis=2) / np.sqrt(50))
    assert found.shape == (4, 4) and (found[:, 3] == 7).all()


def test_some_rows_are_all_where_they_are_few_and_else_of_every_class():
    assert questions.some_rows(np.zeros(5, int), 9, 0).tolist() == [0, 1, 2, 3, 4]
    y = np.repeat([0, 1, 2], [900, 90, 3])
    few = questions.some_rows(y, 33, 0)
    assert (np.diff(few) > 0).all() and np.bincount(y[few]).tolist() == [15, 15, 3]
    assert few.tolist() != list(range(33))


# -- 2. trained under the planned conditions ---------------------------------------------------------------------------

LAYERS, CLASSES, LORAS, RUNS, TOP_K = 12, 4, 280, 2, 2
DROPOUT, SCHEDULE = 0.1, Schedule(max_epochs=30, patience=10, hidden=(32, 32, 32))


@pytest.fixture
def one_thread():
    """As the program trains; on many small products several threads may take far longer than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def planted(where: str) -> tuple[np.ndarray, np.ndarray]:
    """Statistics float32[N, L, 7] of layers that know the class: one, each a little, each all of it, or none."""
    generator = np.random.default_rng(7)
    y, x = np.arange(LORAS) % CLASSES, generator.normal(size=(LORAS, LAYERS, 7))
    means = generator.normal(size=(CLASSES, LAYERS, 7))
    means /= np.linalg.norm(means, axis=2, keepdims=True)
    strength = {
        "one layer": 8.0 * (np.arange(LAYERS) == 4),
        "a little in each": np.full(LAYERS, 0.9),
        "all in each": np.full(LAYERS, 8.0),
        "none": np.zeros(LAYERS),
    }[where]
    return (x + strength[:, None] * means[y]).astype(np.float32), y


def trained_robustness(where: str) -> dict:
    """Layers ranked, conditions planned and trained as one stack each, and what is concluded."""
    x, y = planted(where)
    part = np.arange(LORAS) // CLASSES % 7  # 3 of 7 to train on, 1 to stop by, 3 to test on
    rows = {name: np.flatnonzero(np.isin(part, of)) for name, of in (("train", (0, 2, 4)), ("validation", (6,)))}
    rows["test"] = np.flatnonzero(np.isin(part, (1, 3, 5)))
    split, labels = Split(*(torch.from_numpy(one) for one in rows.values())), torch.from_numpy(y)

    def train(features: np.ndarray, models: Models) -> np.ndarray:
        read = standardise(torch.from_numpy(features), split.train)
        trained = train_classifiers(read, labels, split, models, CLASSES, schedule=SCHEDULE, seed=0, dropout=DROPOUT)
        return trained["predicted"].reshape(-1, RUNS, len(rows["validation"]) + len(rows["test"]))

    source, run = (torch.from_numpy(of.ravel()) for of in np.indices((LAYERS, RUNS)))
    alone = train(np.ascontiguousarray(x.swapaxes(0, 1)), Models(source, run))
    validation = alone[..., : len(rows["validation"])] == y[rows["validation"]]
    ranking = np.argsort(-validation.mean((1, 2)), kind="stable")
    layers = [Layer(f"layer {d}", f"m_{d // 2}", ("down", "up")[d % 2], (1, 4), "F32") for d in range(LAYERS)]
    roles = [layer.role for layer in layers]
    planned = plan_controls(ranking, roles, TOP_K, runs=RUNS, draws=20, points=11, seed=0)
    live = torch.from_numpy(planned.kept.reshape(-1, LAYERS)).repeat_interleave(7, dim=1)
    run = torch.arange(RUNS).repeat(len(planned.names))
    predicted = train(x.reshape(1, LORAS, -1), Models(torch.zeros_like(run), run, live))
    e = Evidence(layers, list("abcd"), y, rows, None, ranking, TOP_K, {}, 0)
    return robustness(e, planned, predicted[..., len(rows["validation"]) :])


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("one layer", "localized"),
        ("a little in each", "distributed"),
        ("all in each", "redundant"),
        ("none", "no signal"),
    ],
)
def test_classifiers_trained_on_what_is_planted_come_to_its_verdict(one_thread, where, expected):
    found = trained_robustness(where)
    assert found["verdict"] == expected, found
