"""Attention over modules: means and intervals by hand and by simulation, what is planted is found, and nothing else."""

import json
from dataclasses import replace

import numpy as np
import pytest
from planting import all_tested, attended_of, evidence_of
from scipy import stats
from test_house import _differences, documented

from analysis.attention import Shares, above_permuted, attention, deletion_curves, effective_number
from analysis.draws import Draws, means
from analysis.questions import plain

MODULES = [f"module {i}" for i in range(12)]


def schema_faults(section: dict, name: str) -> list[str]:
    """Differences between a section of the analysis, as strict JSON, and docs/results.md."""
    content = json.loads(json.dumps(plain(section), allow_nan=False))
    return list(_differences(content, documented("results.json").below["analysis"].below[name], name))


def planted(modules=MODULES, classes=4, each=10, **shape):
    evidence = all_tested(np.arange(classes * each) % classes)
    return evidence, attended_of(classes, evidence.truth, list(modules), **shape)


# ----------------------------------------------------------------------------------------------------------------------
# Means of real numbers
# ----------------------------------------------------------------------------------------------------------------------


def test_of_one_run_the_interval_is_students_of_loras_or_of_equal_groups():
    values = np.random.default_rng(0).gamma(2, size=(3, 1, 40))
    mean, bounds = means(values, np.arange(40))
    expected = stats.t.interval(0.95, 39, values[:, 0].mean(1), stats.sem(values[:, 0], axis=1))
    np.testing.assert_allclose(mean, values.mean((1, 2)))
    np.testing.assert_allclose(bounds.T, expected)
    of_groups = values[:, 0].reshape(3, 10, 4).mean(2)
    expected = stats.t.interval(0.95, 9, of_groups.mean(1), stats.sem(of_groups, axis=1))
    np.testing.assert_allclose(means(values, np.arange(40) // 4)[1].T, expected)


@pytest.mark.parametrize("groups", [np.arange(60), np.repeat(np.arange(12), [1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 5, 5])])
def test_the_variance_is_that_of_draws_of_loras_and_runs(groups):
    generator = np.random.default_rng(1)
    values = generator.normal(size=(2, 4, 60)) + generator.normal(size=(2, 4, 1)) / 2
    draws = Draws(groups, 8000, 0)
    mean, bounds = means(values, groups)
    drawn = draws.accuracies(list(values))
    np.testing.assert_allclose(drawn.mean(1), mean, atol=0.02)
    # Student's t of at least one and at most G - 1 degrees: what is left of the half widths is the error.
    half = (bounds[:, 1] - bounds[:, 0]) / 2
    assert (half >= 0.95 * draws.quantile(0.975) * drawn.std(1)).all()
    one_run = values[:, :1]
    drawn = draws.accuracies(list(one_run)).std(1) * np.sqrt(draws.inflation) * draws.quantile(0.975)
    np.testing.assert_allclose(np.diff(means(one_run, groups)[1])[:, 0] / 2, drawn, rtol=0.05)


def test_draws_of_ones_and_zeros_are_those_of_booleans():
    correct = np.random.default_rng(0).random((3, 50)) < 0.5
    draws = Draws(np.arange(50), 100, 0)
    as_numbers, as_booleans = draws.accuracies([correct.astype(float), correct])
    np.testing.assert_allclose(as_numbers, as_booleans, rtol=1e-12)


def test_a_single_group_has_no_interval():
    mean, bounds = means(np.arange(6.0).reshape(1, 2, 3), np.zeros(3, int))
    assert mean == pytest.approx(2.5) and np.isnan(bounds).all()


@pytest.mark.parametrize(("runs", "size"), [(1, 1), (3, 1), (10, 1), (3, 5)])
def test_intervals_of_attention_cover_the_truth(runs, size):
    """Of skewed attention, in which runs, groups and LoRAs differ; the truth is that of very many.

    A single run shows nothing of how others would differ: there they do not.
    """
    run_spread = 0.3 if runs > 1 else 0.0

    def drawn(generator, runs, loras):
        logits = np.where(np.arange(8) < 2, 2.0, 0.0) + run_spread * generator.normal(size=(runs, 1, 8))
        logits = logits + 0.5 * generator.normal(size=(1, loras // size, 8)).repeat(size, 1)
        weights = np.exp(logits + 0.5 * generator.normal(size=(runs, loras, 8)))
        return np.moveaxis(weights / weights.sum(-1, keepdims=True), -1, 0)

    generator, trials = np.random.default_rng(2), 200
    truth = np.mean([drawn(generator, 60, 60).mean((1, 2)) for _ in range(40)], axis=0)
    covered = []
    for _ in range(trials):
        shares = Shares(*[drawn(generator, runs, 40)] * 2, np.arange(40) // size)
        low, high = shares.record()["interval"].T
        covered.append((low <= truth) & (truth <= high))
    assert np.mean(covered) > 0.9


# ----------------------------------------------------------------------------------------------------------------------
# What is planted
# ----------------------------------------------------------------------------------------------------------------------


def test_planted_modules_have_the_attention_and_what_they_add_is_of_their_class():
    evidence, attended = planted(planted=(1, 5, 9), runs=3)
    section = attention(evidence, attended)
    share = np.array([record["attention"] for record in section["modules"]])
    added = np.array([record["contribution"] for record in section["modules"]])
    assert set(np.argsort(-share)[:3]) == set(np.argsort(-added)[:3]) == {1, 5, 9}
    assert share.sum() == pytest.approx(1) and share[[1, 5, 9]].sum() > 0.85
    np.testing.assert_allclose(share, attended.attention.mean((0, 1)))
    np.testing.assert_allclose(added, attended.contribution.mean((0, 1)))
    assert section["permuted"]["above"] == [MODULES[i] for i in (1, 5, 9)]
    assert 2.5 < section["effective_number"]["number"] < 5
    assert section["deletion"]["against_random"]["hurts_more"]
    for label, record in enumerate(section["classes"]):
        of_class = attended.contribution[:, evidence.truth == label].mean((0, 1))
        np.testing.assert_allclose(record["contribution"], of_class, atol=1e-6)
        assert (record["contribution_low"] <= record["contribution"]).all() and record["loras"] == 10
    assert not schema_faults(section, "attention")


def test_sums_by_block_and_projection_are_those_of_their_modules():
    evidence, attended = planted(planted=(0,))
    attended = replace(attended, blocks=[""] * 4 + ["a"] * 5 + ["b"] * 3)
    section = attention(evidence, attended)
    share = [record["attention"] for record in section["modules"]]
    assert [(record["block"], record["modules"]) for record in section["blocks"]] == [("a", 5), ("b", 3)]
    for record, members in zip(section["blocks"], (share[4:9], share[9:]), strict=True):
        assert record["attention"] == pytest.approx(sum(members))
        assert record["interval"][0] < record["attention"] < record["interval"][1]
    assert sum(record["attention"] for record in section["projections"]) == pytest.approx(1)
    assert section["modules"][0]["block"] is None and section["modules"][4]["block"] == "a"


def test_attention_that_is_all_alike_or_all_on_one_has_the_effective_number_it_should():
    alike, one = np.full((8, 2, 30), 1 / 8), np.zeros((8, 2, 30))
    one[3] = 1
    for share, number in ((alike, 8), (one, 1)):
        found = effective_number(Shares(share, share, np.arange(30)))
        assert list(found.values()) == pytest.approx([number] * 3)
        assert np.isfinite(Shares(share, share, np.arange(30)).record()["interval"]).all()


def test_runs_that_choose_other_modules_are_not_spread_over_all_of_these():
    share = np.zeros((8, 2, 30))
    share[:2, 0] = 1 / 2
    share[4:8, 1] = 1 / 4
    found = effective_number(Shares(share, share, np.arange(30)))
    assert found == pytest.approx({"number": 3, "min": 2, "max": 4})


def test_agreement_is_scipys_tau_of_the_mean_attention():
    evidence, attended = planted(planted=(2, 3))
    section = attention(evidence, attended)["agreement"]
    share = attended.attention.mean((0, 1))
    place = np.argsort(attended.ranks_of_ranking)  # of each module in the ranking
    for name, scores in (("ranking", -place), ("gradients", attended.gradients.mean(0))):
        assert section[name]["kendall_tau"] == pytest.approx(stats.kendalltau(share, scores).statistic)
        low, high = section[name]["interval"]
        assert -1 <= low < section[name]["kendall_tau"] < high <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Deletion and permuted labels
# ----------------------------------------------------------------------------------------------------------------------


def test_curves_and_areas_are_the_mean_accuracies():
    evidence, attended = planted(planted=(0, 6))
    section = deletion_curves(evidence.draws, attended)
    for name in ("attention", "layers"):
        accuracy = attended.deletion[name].mean((0, 2))
        np.testing.assert_allclose(section["curves"][name]["accuracy"], accuracy)
        height = np.trapezoid(accuracy, attended.counts) / np.ptp(attended.counts)
        assert section["curves"][name]["area"] == pytest.approx(height)
    areas = [section[part]["area"] for part in ("random",)] + [section["curves"]["attention"]["area"]]
    assert section["against_random"]["difference"] == pytest.approx(areas[0] - areas[1])
    assert section["random"]["orders"] == 20


def test_an_order_that_is_none_hurts_more_than_random_as_rarely_as_it_should():
    hurts, trials = [], 120
    for draw in range(trials):
        evidence, attended = planted(each=5, draw=draw)
        order = attended.deletion | {"attention": np.roll(attended.deletion["random 20"], draw % 3, axis=-1)}
        del order["layers"]
        section = deletion_curves(evidence.draws, replace(attended, deletion=order))
        hurts.append(section["against_random"]["hurts_more"])
        assert section["against_layers"] is None
    assert np.mean(hurts) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_few_random_orders_decide_nothing():
    evidence, attended = planted(planted=(0,))
    for kept in (0, 1, 18):
        names = ["attention", "layers", *(f"random {i + 1}" for i in range(kept))]
        fewer = replace(attended, deletion={name: attended.deletion[name] for name in names})
        section = attention(evidence, fewer)
        assert not schema_faults(section, "attention")
        compared = section["deletion"]["against_random"]
        assert (compared is None) == (kept == 0) and not (compared and compared["hurts_more"])


@pytest.mark.parametrize("runs", [1, 3])
def test_where_nothing_is_planted_a_module_is_above_permuted_labels_at_most_once_in_twenty(runs):
    generator, trials = np.random.default_rng(3), 600
    _, attended = planted()
    above = 0
    for _ in range(trials):
        shares = generator.dirichlet(np.full(12, 5.0), 19 + runs)
        attended = replace(attended, permuted=shares[runs:], attention=shares[:runs, None])
        above += bool(above_permuted(attended)["above"])
    assert above / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials) and (above > 0 or runs > 1)


def test_a_module_is_above_permuted_labels_only_where_every_run_gives_it_more():
    """Each of three runs prefers a module of its own, beside one that all prefer."""
    _, attended = planted()
    shares = np.full((3, 10, 12), 0.02)
    shares[:, :, 0] = 0.4
    shares[np.arange(3), :, 1 + np.arange(3)] = 0.4
    section = above_permuted(replace(attended, attention=shares))
    assert section["above"] == [MODULES[0]] and section["least"] == pytest.approx([0.4, *[0.02] * 11])


def test_runs_that_order_modules_alike_or_at_random_have_the_w_they_should():
    evidence, attended = planted(runs=3)
    alike = np.repeat(np.random.default_rng(0).dirichlet(np.ones(12), (1, 40)), 3, axis=0)
    assert attention(evidence, replace(attended, attention=alike))["stability"]["kendall_w"] == pytest.approx(1)
    random = np.random.default_rng(1).dirichlet(np.ones(12), (3, 40))
    assert attention(evidence, replace(attended, attention=random))["stability"]["kendall_w"] < 0.8
    assert attention(evidence, replace(attended, attention=alike[:1]))["stability"]["kendall_w"] is None


def test_fewer_trainings_on_permuted_labels_decide_nothing_and_none_give_none():
    evidence, attended = planted(planted=(0,), trainings=18)
    section = attention(evidence, attended)
    assert not section["permuted"]["decided"] and section["permuted"]["above"] == []
    assert {record["above_permuted"] for record in section["modules"]} == {None}
    assert section["modules"][0]["p_permuted"] == pytest.approx(1 / 19) and not schema_faults(section, "attention")
    evidence, attended = planted(planted=(0,), trainings=0)
    section = attention(evidence, attended)
    assert section["permuted"] is None and section["modules"][0]["p_permuted"] is None
    assert not schema_faults(section, "attention")


# ----------------------------------------------------------------------------------------------------------------------
# Extremes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("modules", "decided"), [(2, False), (3, False), (4, True)])
def test_random_orders_of_too_few_modules_decide_nothing(modules, decided):
    evidence, attended = planted(MODULES[:modules], planted=(0,))
    compared = attention(evidence, attended)["deletion"]["against_random"]
    assert (compared["p_orders"] is not None) == (compared["hurts_more"] is not None) == decided


@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize(("classes", "each"), [(2, 1), (3, 4)])
def test_few_modules_and_few_loras(modules, classes, each):
    section = attention(*planted(MODULES[:modules], classes, each, planted=(0,), runs=1))
    assert not schema_faults(section, "attention")
    alone = [record["attention"] is not None and record["low"] is None for record in section["classes"]]
    assert alone == [each == 1] * classes  # one LoRA shows no variance


def test_a_sample_of_the_test_loras_takes_its_own_groups_and_classes():
    groups = np.arange(120) // 3
    evidence = replace(evidence_of(classes=3, each=40, tested=10), groups=groups)
    tested = np.flatnonzero(evidence.truth > 0)[::3]
    attended = replace(attended_of(3, evidence.truth[tested], MODULES), tested=tested)
    section = attention(evidence, attended)
    assert section["loras"] == len(tested) and not schema_faults(section, "attention")
    assert [record["loras"] for record in section["classes"]] == [0, 4, 3]
    assert section["classes"][0]["contribution"] is None
    bounds = means(np.moveaxis(attended.attention, -1, 0), evidence.test_groups[tested])[1]
    assert (np.diff(bounds)[:, 0] > 0).all()
