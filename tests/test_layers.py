"""Single layers: planted signals, statistics against references, and what layers know together."""

from dataclasses import replace

import numpy as np
import pytest
from planting import analysed, evidence_of, features_of, held_out, outcome, plant, share
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from analysis.chance import ChanceTest
from analysis.draws import ALPHA
from analysis.layers import (
    compare_rankings,
    depth_trend,
    disagreement_and_kappa,
    kendall_tau,
    kendall_w,
    layer_information,
    linear_cka,
    order_of,
    top_share,
)
from analysis.questions import Controls
from loras.lora_files import Layer


def in_blocks(blocks, modules):
    """Return evidence whose layers are down and up factors of some modules in each of some blocks."""
    layers = [
        Layer(f"{b}_m{m}.{role}", f"{b}_m{m}_to_q", role, (2, 4), "F32", f"layer {b}")
        for b in range(blocks)
        for m in range(modules)
        for role in ("down", "up")
    ]
    return replace(evidence_of(layers=2), layers=layers), np.repeat(np.arange(blocks), 2 * modules)


def decided(record):
    return record["r"] is not None and record["p"] < ALPHA and not record["interval"][0] <= 0 <= record["interval"][1]


def test_a_layer_that_knows_half_of_the_classes_is_found_and_no_other():
    evidence = evidence_of()
    knows = np.zeros((12, 1, len(held_out(evidence))), bool)
    knows[5] = held_out(evidence) < 3
    plant(evidence, knows)
    result = analysed(evidence)
    assert [record["above_null"] for record in result["layers"]["records"]] == [depth == 5 for depth in range(12)]
    record = result["layers"]["records"][5]
    low, high = record["interval"]
    assert low < record["accuracy"] < high and record["top_k_share"] == 1 and record["p_family"] < 0.001
    assert record["val_accuracy"] == pytest.approx((evidence.layer_validation()[5]).mean())
    recall = np.array(result["concepts"]["recall"])
    assert (recall[5, :3] == 1).all() and (np.delete(recall, 5, 0) < 0.5).all() and (recall[5, 3:] < 0.5).all()


@pytest.mark.parametrize(("slope", "expected"), [(1, "confirmed"), (-1, "refuted"), (0, "undecided")])
def test_later_layers_predict_more(slope, expected):
    evidence = evidence_of()
    plant(evidence, share(evidence, np.full((12, 1), 0.5) + slope * np.linspace(-0.4, 0.4, 12)[:, None]))
    result = analysed(evidence)
    assert outcome(result, "later layers")["outcome"] == expected
    if slope:
        assert result["layers"]["depth"]["r"] * slope > 0.9
        assert result["layers"]["rankings"]["kendall_tau"] > 0.5 and result["layers"]["stability"]["kendall_w"] > 0.8


def test_four_blocks_in_perfect_order_are_no_answer():
    evidence = evidence_of(layers=8, top_k=1)
    plant(evidence, share(evidence, np.linspace(0.2, 0.8, 8)[:, None]))
    result = analysed(evidence)
    assert result["layers"]["depth"] == {
        "blocks": 4, "why": "fewer than 5 blocks", "r": None, "interval": None, "p": None}  # fmt: skip
    record = outcome(result, "later layers")
    assert record["outcome"] == "not answerable" and "5 blocks" in record["why"]


def test_one_layer_above_chance_has_no_depth_to_speak_of():
    evidence = evidence_of(layers=24)
    plant(evidence, share(evidence, 0.9 * (np.arange(24)[:, None] == 20)))
    record = outcome(analysed(evidence), "later layers")
    assert record["outcome"] == "not answerable" and "5 layers" in record["why"]


@pytest.mark.parametrize("blocks", [6, 16])
def test_effects_that_a_block_shares_are_a_trend_in_no_more_than_a_twentieth(blocks):
    (evidence, block), generator, trials, called = in_blocks(blocks, 4), np.random.default_rng(0), 100, np.zeros(2)
    for _ in range(trials):
        accuracy = 0.5 + 0.1 * generator.normal(size=blocks)[block] + 0.03 * generator.normal(size=len(block))
        called += (
            decided(depth_trend(evidence, accuracy, accuracy > 0)),
            stats.spearmanr(np.arange(len(block)), accuracy).pvalue < ALPHA,  # over layers: fooled
        )
    assert called[0] / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5 < 0.25 < called[1] / trials


def test_alternating_roles_hide_no_trend():
    (evidence, block), generator, found, trials = in_blocks(12, 1), np.random.default_rng(0), 0, 40
    up = np.array([layer.role == "up" for layer in evidence.layers])
    for _ in range(trials):
        accuracy = 0.3 + 0.4 * up + 0.01 * block + 0.02 * generator.normal(size=len(block))
        found += depth_trend(evidence, accuracy, accuracy > 0)["r"] > 0.5
    assert found / trials > 0.9


def test_accuracy_by_role_and_place():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.6 * (np.arange(12)[:, None] % 2)))
    section = analysed(evidence)["layers"]
    groups = section["groups"]
    assert groups["role"]["down"]["interval"][1] < groups["role"]["up"]["interval"][0]
    assert section["better_role"] == "up"
    assert groups["projection"]["q"]["layers"] == 12 and groups["attention"] == groups["block"] == {}
    assert [groups["role"][role]["above_null"] for role in ("down", "up")] == [0, 6]


def test_sums_by_block_are_those_of_a_loop_over_its_layers():
    evidence, names = evidence_of(layers=7), ["TE layer 0", "IN01", "IN01", "IN02", "IN02", "IN02", ""]
    layers = [replace(layer, block=name) for layer, name in zip(evidence.layers, names, strict=True)]
    evidence = replace(evidence, layers=layers)
    plant(evidence, share(evidence, np.array([0, 0.8, 0.5, 0, 0, 0.9, 0])[:, None]))
    section = analysed(evidence)["layers"]
    blocks, records = section["groups"]["block"], section["records"]
    assert list(blocks) == ["TE layer 0", "IN01", "IN02"] and records[6]["block"] is None
    for name, block in blocks.items():
        inside = [record for record in records if record["block"] == name]
        assert block["layers"] == len(inside) == names.count(name)
        assert block["mean"] == pytest.approx(np.mean([record["accuracy"] for record in inside]))
        assert block["above_null"] == sum(record["above_null"] for record in inside)
        assert block["interval"][0] < block["mean"] < block["interval"][1]
    assert blocks["TE layer 0"]["interval"] == pytest.approx(records[0]["interval"], abs=0.05)
    assert [block["above_null"] for block in blocks.values()] == [0, 2, 1]
    assert section["depth"]["blocks"] == 4  # a layer outside of all blocks is one of its own


def test_roles_that_do_not_differ_have_no_better_one():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.6))
    assert analysed(evidence)["layers"]["better_role"] is None


def test_roles_that_know_nothing_have_no_better_one_however_they_guess():
    evidence = evidence_of(classes=2, each=40)
    evidence.y[evidence.rows["test"]] = np.arange(40) % 4 == 0
    says = np.array([0, 1] * 6)[:, None, None]
    plant(evidence, np.ones((12, 1, 1), bool), says=says)
    result = analysed(evidence)["layers"]
    assert result["groups"]["role"]["down"]["mean"] > 0.7 and result["better_role"] is None


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


def test_layers_that_always_say_the_same_do_not_agree_about_a_ranking():
    generator, same = np.random.default_rng(0), np.full((20, 5), 0.25)
    two = generator.random((2, 5))
    assert kendall_w(np.concatenate([two[:1], same])) is None  # two that differ
    assert kendall_w(np.concatenate([two, same])) == kendall_w(np.concatenate([two, same[:1]]))
    assert kendall_w(same) is None
    a, b = generator.random((2, 6))
    tau = kendall_tau(np.append(a, [0.5] * 9), np.append(b, [0.5] * 9))
    assert tau == kendall_tau(np.append(a, 0.5), np.append(b, 0.5))
    assert tau["kendall_tau"] == pytest.approx(stats.kendalltau(np.append(a, 0.5), np.append(b, 0.5)).statistic)
    assert kendall_tau(np.ones(9), a[:1].repeat(9)) == kendall_tau(a[:2], b[:2]) == {"kendall_tau": None, "p": None}


def test_ties_of_the_top_k_are_broken_as_the_ranking_breaks_them():
    accuracy, validation, loss = np.array([0.5, 0.5 + 1e-15, 0.5, 0.4]), np.array([0.1, 0.1, 0.3, 0.9]), [3, 2, 1, 0]
    assert order_of(accuracy, validation, -np.array(loss)).tolist() == [2, 1, 0, 3]
    assert order_of(accuracy).tolist() == [0, 1, 2, 3]
    evidence = evidence_of(layers=4, top_k=1)
    evidence.predictions.layers["log_loss"] = np.array(loss, float)[:, None, None] + np.zeros((4, 2, 150))
    assert compare_rankings(evidence, accuracy, validation)["same_top_k"] == 0  # 2 by test, 3 by validation
    assert (
        compare_rankings(evidence, accuracy, np.array([0.1, 0.1, 0.1, 0.0]))["same_top_k"] == 1
    )  # 2 by its loss, both


def test_kappa_and_disagreement_are_scikit_learns():
    predicted = np.random.default_rng(0).integers(0, 4, (3, 1, 50))
    disagreement, kappa = disagreement_and_kappa(predicted, 4)
    for a in range(3):
        for b in range(3):
            assert kappa[a, b] == pytest.approx(cohen_kappa_score(predicted[a, 0], predicted[b, 0]))
            assert disagreement[a, b] == pytest.approx((predicted[a] != predicted[b]).mean())
    twice = disagreement_and_kappa(np.repeat(predicted, 2, axis=1), 4)
    np.testing.assert_allclose(twice, (disagreement, kappa))
    assert (disagreement_and_kappa(np.zeros((2, 1, 5), int), 3)[1] == 1).all()


def test_cka_is_the_papers_and_sees_through_rotations():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 3, 5))
    x[:, 2] = 3 * x[:, 0] @ np.linalg.qr(generator.normal(size=(5, 5)))[0]
    result = linear_cka(x)
    a, b = (x[:, i] - x[:, i].mean(0) for i in (0, 1))
    gram_a, gram_b = a @ a.T, b @ b.T
    assert result[0, 1] == pytest.approx((gram_a * gram_b).sum() / np.linalg.norm(gram_a) / np.linalg.norm(gram_b))
    assert result[0, 2] == pytest.approx(1) and result[0, 1] < 0.5
    np.testing.assert_allclose(np.diag(result), 1)


def test_layers_with_the_same_features_are_one_cluster():
    evidence = evidence_of()
    features = features_of(evidence)
    features[:, 7] = 2 * features[:, 2] + 1
    clusters = analysed(evidence, statistics=features)["layer_information"]["clusters"]
    assert clusters["of_layer"][7] == clusters["of_layer"][2] and clusters["count"] == 11
    assert sum(member["layers"] for member in clusters["members"]) == 12
    assert sorted(clusters["order"]) == list(range(12)) and len(clusters["linkage"]) == 11


def test_what_the_union_of_the_top_layers_knows():
    evidence = evidence_of(layers=8, top_k=3)
    knows = np.zeros((8, 1, len(held_out(evidence))), bool)
    for layer in range(3):
        knows[layer] = held_out(evidence) // 2 == layer  # two classes each
    plant(evidence, knows)
    result = analysed(evidence)
    union, crossed = result["layer_information"]["union"], result["cross_fitted"]["union"]
    assert union["any_of_top_k"] == 1 and union["best_alone"] < 0.55 and union["interval"][0] > 0.4
    assert crossed["ordinary"] == 1 > crossed["ordinary_by_chance"] + 0.3


def test_the_union_of_guesses_is_what_chance_gives_and_a_vote_of_them_gains_nothing():
    result = analysed(evidence_of(tested=200, each=230))
    union, crossed = result["layer_information"]["union"], result["cross_fitted"]["union"]
    assert union["gain"] > 0.2 and union["any_of_top_k"] == pytest.approx(crossed["ordinary_by_chance"], abs=0.03)
    assert union["vote_interval"][0] <= 0 <= union["vote_interval"][1]


def plant_clusters(evidence, cluster_layers, exact_of_clusters, exact_of_others):
    """Let some layers know the cluster of each LoRA, odd or even, and the others nothing where they are not right.

    Each is right on its share of the LoRAs; where it is not, the former say a class of the same cluster, the latter one
    of the other. A share of None leaves layers guessed.
    """
    generator, truth = np.random.default_rng(5), held_out(evidence)
    others = ~cluster_layers
    for layers, exact, step in ((cluster_layers, exact_of_clusters, 2), (others, exact_of_others, 1)):
        if exact is not None:
            shape = (len(layers), 2, len(truth))
            wrong = (truth + step + 2 * generator.integers(0, 2, shape)) % 6
            says = np.where(generator.random(shape) < exact, truth, wrong)
            plant(evidence, layers[:, None, None], says=says)


@pytest.mark.parametrize(
    ("swapped", "exact_of_clusters", "exact_of_others", "expected"),
    [
        (False, 0.7, 0.4, "confirmed"),
        (True, 0.4, 0.8, "refuted"),
        (False, 0.6, None, "not answerable"),  # the others know nothing
        (False, 0.6, 0.15, "not answerable"),  # hardly more than that
    ],
)
def test_top_layers_separate_clusters_and_others_concepts_within_them(
    swapped, exact_of_clusters, exact_of_others, expected
):
    evidence = evidence_of(classes=6)
    features = features_of(evidence) / 10 + 5 * (evidence.y % 2)[:, None, None]  # two clusters: even and odd classes
    cluster_layers = (np.arange(12) < 3) != swapped
    plant_clusters(evidence, cluster_layers, exact_of_clusters, exact_of_others)
    result = analysed(evidence, statistics=features)
    of_class = result["layer_information"]["concept_clusters"]["of_class"]
    assert len(set(of_class[::2])) == len(set(of_class[1::2])) == 1 and of_class[0] != of_class[1]
    record, coarse = outcome(result, "clusters of concepts"), result["layer_information"]["coarse"]
    assert record["outcome"] == expected
    if expected == "not answerable":
        assert record["why"] == coarse["why"] and "beside the top 3" in record["why"] and coarse["top_k"] is None
    else:
        knows = coarse["others" if swapped else "top_k"]
        assert knows["coarse"] == 1 and knows["fine"] < 0.7
        lesser = min(coarse["coarse"]["difference"], coarse["fine"]["difference"])
        assert record["number"] == lesser


def test_the_lucky_ones_of_many_that_know_nothing_confirm_nothing():
    """Compare top layers that know clusters with 61 that know nothing: at a p of 0.05 each, three of these seem to."""
    confirmed, trials = 0, 12
    for seed in range(trials):
        evidence = replace(evidence_of(layers=64, seed=seed), resamples=100, permutations=199)
        generator = np.random.default_rng(seed)
        evidence.predictions.layers["predicted"] = generator.integers(0, 6, (64, 2, len(held_out(evidence))))
        plant_clusters(evidence, np.arange(64) < 3, 0.4, None)
        test = ChanceTest.of(evidence, list(evidence.layer_predictions()))
        features = np.zeros((len(evidence.y), 64, 1)) + 5 * (evidence.y % 2)[:, None, None]
        section = layer_information(evidence, test, features, np.arange(len(evidence.y)))["coarse"]
        confirmed += section["why"] is None and all(section[part]["interval"][0] > 0 for part in ("coarse", "fine"))
    assert confirmed / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_what_a_layer_would_have_to_reach_is_what_the_best_of_guesses_stays_below():
    evidence = evidence_of(classes=3, each=6, tested=2)  # six test LoRAs
    section = analysed(evidence)["layers"]
    assert section["needed"] > 0.6  # of six, four
    test = ChanceTest.of(evidence, list(evidence.layer_predictions()))
    assert section["needed"] == pytest.approx(test.guessed[0] + np.quantile(test.margins, 0.95))


def test_attribution_that_agrees_with_the_ranking():
    evidence = evidence_of()
    plant(evidence, share(evidence, np.linspace(0.9, 0.1, 12)[:, None]))
    result = analysed(evidence, Controls("basic", attributed=("stats", np.tile(np.linspace(12, 1, 12), (3, 1)))))[
        "attribution"
    ]
    assert result["spearman"] > 0.9 and result["interval"][0] > 0.8 and result["same_top_k"] == 3
    assert sum(result["by_layer"]) == pytest.approx(1) and result["representation"] == "stats"
