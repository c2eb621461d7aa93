"""The collection in the plane: components against scikit-learn's, what is planted apart or merged, and what is kept."""

from dataclasses import replace

import numpy as np
import pytest
from planting import evidence_of, mapped_of
from sklearn.decomposition import PCA
from test_attention import schema_faults

from analysis.collection_map import KEPT, Mapped, collection_map, plane, separations


def features_of(rows: int = 60, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)) * np.arange(width, 0, -1) + 3


# ----------------------------------------------------------------------------------------------------------------------
# Components
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [np.arange(40), np.random.default_rng(1).permutation(60)[:30]])
def test_of_a_linear_kernel_they_are_the_principal_components_of_the_columns(columns):
    features = features_of()
    points, shares = plane(features @ features[columns].T, columns)
    reference = PCA(8).fit(features[columns])
    expected = reference.transform(features)[:, :2]
    np.testing.assert_allclose(points * np.sign((points * expected).sum(0)), expected, atol=1e-8)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_[:2])


def test_a_centred_kernel_gives_the_same_and_so_does_another_scale():
    features, columns = features_of(), np.arange(40)
    points, shares = plane(features @ features[columns].T, columns)
    centred = features - features[columns].mean(0)
    again, shares_again = plane(centred @ centred[columns].T, columns)
    np.testing.assert_allclose(np.abs(again), np.abs(points), atol=1e-8)
    larger, shares_larger = plane(1e12 * features @ features[columns].T, columns)
    np.testing.assert_allclose(larger, 1e6 * points, rtol=1e-6)
    np.testing.assert_allclose(shares_again, shares)
    np.testing.assert_allclose(shares_larger, shares)


def test_other_rows_change_nothing_of_the_columns_rows():
    features, columns = features_of(), np.arange(40)
    changed = np.concatenate([features[:40], 5 * features_of(20, seed=7)])
    first, second = (plane(x @ x[columns].T, columns) for x in (features, changed))
    np.testing.assert_array_equal(first[0][:40], second[0][:40])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("value", [0, 1, 1e30])
def test_a_kernel_without_variance_is_one_point(value):
    points, shares = plane(np.full((10, 6), value, np.float32), np.arange(6))
    assert not points.any() and not shares.any()


def test_a_kernel_of_one_direction_has_one_component():
    line = np.arange(10.0)
    points, shares = plane(np.outer(line, line[:6]).astype(np.float32), np.arange(6))
    assert shares == pytest.approx([1, 0]) and not points[:, 1].any()
    assert np.abs(np.diff(points[:, 0])) == pytest.approx(np.ones(9), rel=1e-5)
    assert not plane(np.eye(4)[:, :2], np.arange(2))[0].any()  # of two LoRAs there is no plane


def test_an_update_that_is_zero_is_somewhere():
    features = features_of()
    features[5] = features[50] = 0
    points, _ = plane(features @ features[:40].T, np.arange(40))
    assert np.isfinite(points).all()
    np.testing.assert_allclose(points[5], points[50], atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# What is separated
# ----------------------------------------------------------------------------------------------------------------------


def test_separations_by_hand():
    """Two LoRAs of class 0, one of class 1, one of class 2, at these distances from the three means."""
    distances = np.array([[1, 2, 9], [3, 2, 9], [2, 1, 9], [9, 9, 9]])
    found = separations(distances, np.array([0, 0, 1, 2]))
    # 0 and 1: half of the first's and all of the second's; 0 and 2: all, and half of a LoRA at equal distances.
    np.testing.assert_allclose(found, [[0.5, 0.75, 0.75], [0.75, 0.5, 0.75], [0.75, 0.75, 0.5]])
    missing = separations(distances[:3], np.array([0, 0, 1]))
    assert np.isnan(missing[2]).all() and np.isnan(missing[:, 2]).all() and not np.isnan(missing[:2, :2]).any()


def test_planted_classes_stand_apart_or_are_merged():
    evidence = evidence_of(classes=5, each=40, tested=15)
    places = np.array([[0, 0], [0, 0], [40, 0], [0, 40], [0, 0.1]], float)
    features = places[evidence.y] + np.random.default_rng(0).normal(size=(200, 2))
    train = evidence.rows["train"]
    (panel,) = collection_map(evidence, [Mapped("all", "", features @ features[train].T, train)])["panels"]
    separates = panel["separates"]
    assert separates["distinct"] == ["class 2", "class 3"] and separates["above_null"]
    assert separates["merged"] == [["class 0", "class 1", "class 4"]]
    assert 0.4 < separates["accuracy"] < 0.85 and separates["chance"] == pytest.approx(0.2)
    low, high = separates["interval"]
    assert low < separates["accuracy"] < high
    assert sum(panel["explained"]) == pytest.approx(1) and np.abs(panel["points"]).max() == 1


def test_noise_separates_nothing():
    above = []
    for seed in range(20):
        evidence = replace(evidence_of(classes=3, each=30, tested=12), seed=seed, resamples=100, permutations=200)
        mapped = mapped_of(evidence.y, evidence.rows["train"], {"all": 0.0, "a": 0.0}, seed=seed)
        panels = collection_map(evidence, mapped)["panels"]
        above += [any(panel["separates"]["above_null"] for panel in panels)]
        sections = [panel["separates"] for panel in panels]
        assert not any(section["distinct"] for section in sections)
        assert not any(section["merged"] for section in sections if not section["above_null"])
    assert np.mean(above) <= 0.2


def test_classes_of_fewer_than_five_test_loras_are_compared_with_none():
    evidence = evidence_of(classes=4, each=20, tested=8)
    test, of_first = evidence.rows["test"], np.arange(4) == 0
    kept = np.where(of_first[evidence.y[test]], np.cumsum(of_first[evidence.y[test]]) <= 4, True)
    evidence = replace(evidence, rows=evidence.rows | {"test": test[kept]})
    places = np.array([[0, 0], [40, 0], [0, 40], [40, 40]], float)
    features, train = places[evidence.y], evidence.rows["train"]
    (panel,) = collection_map(evidence, [Mapped("all", "", features @ features[train].T, train)])["panels"]
    assert panel["separates"]["compared"] == 3
    assert panel["separates"]["distinct"] == ["class 1", "class 2", "class 3"]


# ----------------------------------------------------------------------------------------------------------------------
# What is kept
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("each", "tested", "tests"), [(30, 10, 50), (400, 100, 500), (500, 300, 1000)])
def test_at_most_a_thousand_are_kept_test_loras_first_as_evenly_of_classes_as_possible(each, tested, tests):
    evidence = replace(evidence_of(classes=5, each=each, tested=tested), resamples=50, permutations=50)
    mapped = mapped_of(evidence.y, evidence.rows["train"][::7], {"all": 3.0})
    section = collection_map(evidence, mapped)
    assert len(section["labels"]) == min(KEPT, tests + len(evidence.rows["train"]))
    assert section["parts"] == ["test"] * tests + ["train"] * (len(section["labels"]) - tests)
    for part in set(section["parts"]):
        counts = np.bincount(np.array(section["labels"])[np.array(section["parts"]) == part], minlength=5)
        assert np.ptp(counts) <= 1
    assert not schema_faults(section, "collection_map")
    again = collection_map(evidence, mapped)
    np.testing.assert_array_equal(section["panels"][0]["points"], again["panels"][0]["points"])


def test_classes_without_test_or_train_loras_are_neither_apart_nor_merged():
    evidence = evidence_of(classes=4, each=20, tested=8)
    rows = dict(evidence.rows)
    rows["test"] = rows["test"][evidence.y[rows["test"]] != 1]
    rows["train"] = rows["train"][evidence.y[rows["train"]] != 2]
    evidence = replace(evidence, rows=rows)
    section = collection_map(evidence, mapped_of(evidence.y, rows["train"], {"all": 50.0}))
    separates = section["panels"][0]["separates"]
    named = [*separates["distinct"], *(name for group in separates["merged"] for name in group)]
    assert "class 1" not in named and "class 2" not in named
    assert not schema_faults(section, "collection_map")
