"""Effective rank by concept, planted in one module or in complexity, and where it cannot differ."""

from dataclasses import replace

import numpy as np
import pytest
from planting import analysed, evidence_of, features_of, outcome, updates_of
from scipy import stats

from analysis.rank_structure import coinciding
from loras.lora_files import Layer


def test_an_effective_rank_that_differs_by_class_is_found_in_its_module_only():
    evidence = evidence_of()
    updates = updates_of(evidence)
    updates[:, 4, 0] += evidence.y / 2
    result = analysed(evidence, updates=updates)["rank_structure"]
    assert result["answerable"] and result["why"] is None and result["tested"] == "effective rank"
    assert [record["p_fdr"] < 0.05 for record in result["modules"]] == [p == 4 for p in range(6)]
    assert [record["significant"] for record in result["modules"]] == [p == 4 for p in range(6)]
    assert result["num_significant"] == 1 and result["modules"][4]["module"] == "m_4_to_q"
    medians = result["modules"][4]["median_by_class"]
    assert medians == pytest.approx([np.median(updates[evidence.y == c, 4, 0]) for c in range(6)])
    ranks = updates[..., 0].astype(float)
    p = [stats.kruskal(*(ranks[evidence.y == c, m] for c in range(6))).pvalue for m in range(6)]
    np.testing.assert_allclose([record["p"] for record in result["modules"]], p, atol=1e-8)
    np.testing.assert_allclose(
        [record["p_fdr"] for record in result["modules"]], stats.false_discovery_control(p), atol=1e-8
    )


def test_at_rank_one_the_norm_is_tested_instead():
    evidence = evidence_of()
    updates = updates_of(evidence, rank_one=True)
    updates[:, 0, 1] += evidence.y
    updates[:, 1, 0] += 1e-7 * evidence.y  # rounding
    result = analysed(evidence, updates=updates)
    structure = result["rank_structure"]
    assert not structure["answerable"] and "rank 1" in structure["why"] and structure["tested"] == "norm of the update"
    assert structure["num_significant"] == 1 and structure["modules"][0]["p_fdr"] < 1e-6
    assert structure["complexity"]["by_class"][0]["effective_rank"] is None
    record = outcome(result, "effective rank")
    assert record["outcome"] == "not answerable" and record["number"] is None and "rank 1" in record["why"]


def test_a_module_whose_rank_never_varies_is_no_finding_beside_one_that_does():
    evidence = evidence_of()
    updates = updates_of(evidence)
    updates[:, 2, 0] = 1 + 1e-6 * evidence.y
    assert analysed(evidence, updates=updates)["rank_structure"]["modules"][2]["p"] == 1


def test_layers_without_a_partner_have_no_update():
    evidence = evidence_of(layers=6)
    layers = [*evidence.layers[:4], evidence.layers[5], Layer("layer 6", "m_6_to_q", "down", (2, 4), "F32")]
    evidence = replace(evidence, layers=layers)
    result = analysed(evidence, updates=updates_of(evidence, 2))["rank_structure"]
    assert [record["module"] for record in result["modules"]] == ["m_0_to_q", "m_1_to_q"]


def test_no_pair_at_all_is_not_answerable():
    evidence = evidence_of(layers=8)
    single = [Layer(f"layer {d}", f"m_{d}", "down", (2, 4), "F32") for d in range(8)]
    evidence = replace(evidence, layers=single)
    result = analysed(evidence, updates=updates_of(evidence, 0))
    structure = result["rank_structure"]
    assert not structure["answerable"] and structure["modules"] == [] and structure["tested"] is None
    assert structure["complexity"]["spearman_recall"] is None and "both of its layers" in structure["why"]
    assert outcome(result, "effective rank")["outcome"] == "not answerable"


def test_loras_of_one_group_are_one_witness():
    each, classes = 40, 3
    groups = np.arange(each * classes) % classes + classes * (np.arange(each * classes) // classes // 10)
    evidence = evidence_of(classes=classes, each=each, groups=groups)  # 4 groups of 10 for each class
    effect = np.random.default_rng(0).normal(size=(12, 6))[groups]
    updates = np.stack([2 + effect + 0.01 * updates_of(evidence)[..., 0], updates_of(evidence)[..., 1]], axis=-1)
    assert (
        stats.kruskal(*(updates[evidence.y == c, 0, 0] for c in range(3))).pvalue < 0.001
    )  # every LoRA a witness: fooled
    result = analysed(evidence, updates=updates)
    assert result["rank_structure"]["num_significant"] == 0
    assert result["permuted"] == "groups" and result["units"] == 6


@pytest.mark.parametrize(("sign", "expected"), [(1, "confirmed"), (-1, "refuted")])
def test_effective_rank_goes_with_complexity(sign, expected):
    evidence = evidence_of(classes=8)
    features = features_of(evidence) * (1 + 0.4 * evidence.y)[:, None, None] + 10 * evidence.y[:, None, None]
    updates = updates_of(evidence)
    updates[..., 0] += sign * evidence.y[:, None]
    result = analysed(evidence, statistics=features, updates=updates)
    assert outcome(result, "effective rank")["outcome"] == expected
    spread = [record["spread"] for record in result["rank_structure"]["complexity"]["by_class"]]
    assert spread == sorted(spread)


def test_features_that_coincide_and_those_that_never_vary_are_named():
    x = np.random.default_rng(0).random((10, 4, 5))
    x[..., 3], x[..., 4] = x[..., 1], 2
    assert coinciding(x, list("abcde")) == ([["b", "d"]], ["e"])
    result = analysed(evidence_of(), samples={"spectral": (x, list("abcde")), "plain": (x[..., :2], ["a", "b"])})
    assert result["rank_structure"]["coinciding"] == {"spectral": [["b", "d"]]}
    assert result["rank_structure"]["constant"] == {"spectral": ["e"]}
