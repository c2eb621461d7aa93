"""Single layers: planted signals, statistics against references, and what layers know together."""

import numpy as np
import pytest
from planting import analysed, evidence_of, features_of, held_out, outcome, plant, share
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from analysis.layers import disagreement_and_kappa, kendall_w, linear_cka, place, top_share
from analysis.questions import Controls


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


def test_four_layers_in_perfect_order_are_no_proof():
    evidence = evidence_of(layers=4, top_k=1)
    plant(evidence, share(evidence, np.linspace(0.2, 0.8, 4)[:, None]))
    result = analysed(evidence)
    assert result["layers"]["depth"]["r"] == pytest.approx(1)
    assert result["layers"]["depth"]["p"] == pytest.approx(2 / 24)
    assert outcome(result, "later layers")["outcome"] == "undecided"


def test_accuracy_by_role_and_place():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.6 * (np.arange(12)[:, None] % 2)))
    section = analysed(evidence)["layers"]
    groups = section["groups"]
    assert groups["role"]["down"]["interval"][1] < groups["role"]["up"]["interval"][0]
    assert section["better_role"] == "up"
    assert groups["projection"]["to_q"]["layers"] == 12 and groups["attention"] == {}


def test_roles_that_do_not_differ_have_no_better_one():
    evidence = evidence_of()
    plant(evidence, share(evidence, 0.6))
    assert analysed(evidence)["layers"]["better_role"] is None


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
    union = analysed(evidence)["layer_information"]["union"]
    assert union["any_of_top_k"] == 1 and union["best_alone"] < 0.55 and union["interval"][0] > 0.4
    assert union["any_of_top_k"] > union["any_by_chance"] + 0.3


def test_the_union_of_guesses_is_what_chance_gives_and_a_vote_of_them_gains_nothing():
    union = analysed(evidence_of(tested=200, each=230))["layer_information"]["union"]
    assert union["gain"] > 0.2 and union["any_of_top_k"] == pytest.approx(union["any_by_chance"], abs=0.03)
    assert union["vote_interval"][0] <= 0 <= union["vote_interval"][1]


@pytest.mark.parametrize(("swapped", "expected"), [(False, "confirmed"), (True, "refuted")])
def test_top_layers_separate_clusters_and_others_concepts_within_them(swapped, expected):
    evidence = evidence_of(classes=6)
    features = features_of(evidence) / 10 + 5 * (evidence.y % 2)[:, None, None]  # two clusters: even and odd classes
    generator, truth = np.random.default_rng(5), held_out(evidence)
    of_cluster = (truth + 2 * generator.integers(0, 3, (2, len(truth)))) % 6  # the cluster is right, the class guessed
    coarse = (np.arange(12) < 3) != swapped
    plant(evidence, share(evidence, 0.8) & coarse[:, None, None], says=of_cluster)
    plant(evidence, share(evidence, 0.8) & ~coarse[:, None, None])
    result = analysed(evidence, statistics=features)
    of_class = result["layer_information"]["concept_clusters"]["of_class"]
    assert len(set(of_class[::2])) == len(set(of_class[1::2])) == 1 and of_class[0] != of_class[1]
    assert outcome(result, "clusters of concepts")["outcome"] == expected
    scores = result["layer_information"]["coarse"]["others" if swapped else "top_k"]
    assert scores["coarse"] > 0.6 and scores["fine"] < 0.2


def test_attribution_that_agrees_with_the_ranking():
    evidence = evidence_of()
    plant(evidence, share(evidence, np.linspace(0.9, 0.1, 12)[:, None]))
    result = analysed(evidence, Controls("basic", attributed=("stats", np.tile(np.linspace(12, 1, 12), (3, 1)))))[
        "attribution"
    ]
    assert result["spearman"] > 0.9 and result["interval"][0] > 0.8 and result["same_top_k"] == 3
    assert sum(result["by_layer"]) == pytest.approx(1) and result["representation"] == "stats"
