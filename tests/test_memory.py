"""The analysis of thousands of layers works in parts: the same numbers, and little memory beside them."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from limits import peak_of_memory

from analysis.chance import ChanceTest
from analysis.draws import PART, Draws, exceedance, parts_of
from analysis.evidence import Evidence, Predictions
from analysis.layers import layer_information, layer_ranking, linear_cka, top_share
from analysis.questions import standardised
from loras.lora_files import Layer

MOST = 500 * 2**20


@pytest.mark.parametrize(("count", "size", "block"), [(10, 3, 7), (1, 100, 7), (0, 5, 7), (7, 0, 7), (9, 2, 18)])
def test_parts_hold_every_row_once_and_no_more_than_a_block(count, size, block):
    parts = parts_of(count, size, block)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert all(first.stop == second.start for first, second in pairwise(parts))
    assert all((part.stop - part.start) * size <= block or part.stop - part.start == 1 for part in parts)


@pytest.mark.parametrize("block", [1, 300, 2_000, 10**9])
def test_cka_in_parts_is_that_of_all_layers_at_once(block):
    features = np.random.default_rng(0).normal(size=(30, 13, 5))
    columns = (features - features.mean(0)).reshape(30, -1)
    cross = np.square((columns.T @ columns).reshape(13, 5, 13, 5)).sum((1, 3))
    whole = cross / np.sqrt(np.outer(np.diag(cross), np.diag(cross)))
    np.testing.assert_allclose(linear_cka(features, block), whole, rtol=1e-12)


def test_cka_of_many_layers_takes_little_memory():
    features = np.random.default_rng(0).normal(size=(20, 600, 7))
    tracemalloc.start()
    linear_cka(features)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 * 2**20  # all inner products at once take 135 MiB, and their squares as many


def test_draws_in_parts_are_those_of_all_layers_at_once():
    """Of so many layers that there are several parts."""
    layers, count = 500, 10_000
    assert layers * count > PART
    drawn = np.random.default_rng(0).integers(0, 20, (layers, count)) / 20
    last = np.partition(drawn, -3, axis=0)[-3]
    above, tied = drawn > last, drawn == last
    expected = (above + tied * ((3 - above.sum(0)) / tied.sum(0))).mean(1)
    np.testing.assert_array_equal(top_share(drawn, 3), expected)
    assert top_share(drawn, 3).sum() == pytest.approx(3)
    observed = drawn[:, 0]
    whole = (1 + (observed - 1e-9 <= drawn.T).sum(0)) / (1 + count)
    np.testing.assert_array_equal(exceedance(observed, drawn.T), whole)


def test_differences_in_parts_are_those_of_all_at_once():
    """Of 500 pairs in 10,000 draws: each as in a family whose others are copies of it, which changes no interval."""
    generator, groups = np.random.default_rng(0), np.arange(40)
    first, second = generator.random((1, 40)) < 0.7, generator.random((1, 40)) < 0.4
    draws = Draws(groups, 10_000, seed=0)
    few, many = draws.differences([(first, second)] * 3), draws.differences([(first, second)] * 500)
    assert few[0]["difference"] == pytest.approx(first.mean() - second.mean())
    for record in (few[1], many[0], many[450]):
        np.testing.assert_array_equal(record["interval"], few[0]["interval"])
        assert record["p"] == few[0]["p"]


def test_features_are_standardised_layer_by_layer():
    features = np.random.default_rng(0).normal(3, 2, (50, 40, 7)).astype(np.float32)
    features[:, 5, 2] = 4
    scaled = features.astype(float)
    mean, std = scaled.mean(0), scaled.std(0)
    expected = np.clip(np.where(std > 0, (scaled - mean) / np.where(std > 0, std, 1), 0), -10, 10)
    np.testing.assert_array_equal(standardised(features), expected)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [60, 1_000])
def test_the_analysis_of_2000_layers_adds_less_than_500_mib_at_a_time(samples):
    layers, classes, generator = 2_000, 10, np.random.default_rng(0)
    y = np.minimum(generator.geometric(0.3, samples) - 1, classes - 1)  # unequal classes, which take more
    parts = np.split(np.arange(samples), [int(0.6 * samples), int(0.8 * samples)])
    rows = dict(zip(("train", "validation", "test"), parts, strict=True))
    held_out = np.concatenate(parts[1:])
    shape = (layers, 10, len(held_out))
    predicted = np.where(generator.random(shape) < 0.4, y[held_out], generator.integers(0, classes, shape))
    arrays = {"predicted": predicted, "log_loss": generator.random(shape).astype(np.float32)}
    described = [
        Layer(f"m{i // 2}.{role}", f"m{i // 2}", role, (1, 4), "F32")
        for i, role in enumerate(("down", "up") * (layers // 2))
    ]
    names = [str(label) for label in range(classes)]
    evidence = Evidence(
        described, names, y, rows, None, np.arange(layers), 5, Predictions(held_out, y[held_out], arrays), 0
    )
    features = generator.normal(size=(samples, layers, 7)).astype(np.float32)
    with peak_of_memory() as of_test:
        test = ChanceTest.of(evidence, list(evidence.layer_predictions()))
    with peak_of_memory() as of_ranking:
        layer_ranking(evidence, test)
    with peak_of_memory() as of_features:
        features = standardised(features)
    with peak_of_memory() as of_information:
        layer_information(evidence, test, features, np.arange(samples))
    assert max(added.bytes for added in (of_test, of_ranking, of_features, of_information)) < MOST
