"""Predictions under their names, and rank correlation."""

import numpy as np
import pytest
from scipy import stats

from analysis.evidence import Predictions, spearman


def test_predictions_are_named_as_in_predictions_npz():
    held_out = np.arange(4)
    predictions = Predictions(held_out, held_out % 2)
    predictions.controls["stats"] = {"names": np.array(["all"]), "kept": np.ones((1, 1, 2)), "predicted": np.zeros(4)}
    predictions.conditions["ablation"] = {"spectral": {"predicted": np.ones(4), "epochs": np.ones(1)}}
    predictions.conditions["baseline"] = {"stats": {"predicted": np.ones(4)}, "spectral": {"predicted": np.zeros(4)}}
    predictions.layers |= {"predicted": np.zeros((2, 1, 4)), "log_loss": np.ones((2, 1, 4))}
    arrays = predictions.arrays()
    assert list(arrays) == [
        "rows",
        "y",
        "layers/predicted",
        "layers/log_loss",
        "ablation/spectral/predicted",
        "ablation/spectral/epochs",
        "baseline/stats/predicted",
        "baseline/spectral/predicted",
        "controls/stats/names",
        "controls/stats/kept",
        "controls/stats/predicted",
    ]
    assert arrays["controls/stats/kept"] is predictions.controls["stats"]["kept"] and arrays["rows"] is held_out


def test_spearman_is_scipys_and_knows_its_limits():
    a, b = np.array([1.0, 2, 3, 4, 5, 6]), np.array([2.0, 1, 4, 3, 6, 5])
    result = spearman(a, b)
    assert result["r"] == pytest.approx(stats.spearmanr(a, b).statistic)
    half = 1.959964 * np.sqrt((1 + result["r"] ** 2 / 2) / 3)  # Bonett & Wright, n - 3
    assert result["interval"] == pytest.approx(np.tanh(np.arctanh(result["r"]) + np.array([-half, half])))
    exact = stats.permutation_test(
        (a,), lambda x: stats.spearmanr(x, b).statistic, permutation_type="pairings", n_resamples=1000
    )
    assert result["p"] == pytest.approx(exact.pvalue)
    many = np.random.default_rng(0).normal(size=(2, 30))
    assert spearman(*many)["p"] == pytest.approx(stats.spearmanr(*many).pvalue)
    assert spearman(a[:5], a[:5])["p"] == pytest.approx(2 / 120) and spearman(a, -a)["interval"][1] < -0.99


def test_four_numbers_or_a_constant_have_no_rank_correlation():
    a = np.arange(6.0)
    assert spearman(a[:4], a[:4]) is None and spearman(a, np.ones(6)) is None and spearman(a[:5], a[:5]) is not None
