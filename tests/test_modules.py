"""Kernels, tokens and factors of whole modules, the networks that read them, and what is read of these afterwards."""

import numpy as np
import pytest
import torch
from making import NARROW, planted_collection, write_collection
from test_controls import experiment_on

import ablation_experiment
from data import index_collection
from experiment import networks, readings
from experiment.engine import Engine
from experiment.networks import NETWORKS, Module, left_by_default
from experiment.phases import on_permuted_labels
from experiment.settings import resolve
from representations import REPRESENTATIONS

NAMES = ["stats", "update_views", "update_attention", "update_frozen", "update_learned"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """60 LoRAs of 3 classes, 4 modules of which some carry the class."""
    root = tmp_path_factory.mktemp("modules") / "planted"
    planted_collection(root, per_class=20)
    return experiment_on(root, root.parent / "cache", "--top-k=1", f"--representations={','.join(NAMES)}")


def test_every_network_is_a_row_that_is_trained():
    assert list(NETWORKS) == [name for name, row in REPRESENTATIONS.items() if row.made == "trained"]


def test_what_networks_are_evaluated_on_counts_numbers_of_whole_modules(planted):
    results = planted.predictions.conditions
    assert set(NAMES) == set(results["baseline"]) == set(results["ablation"])
    kept, inputs = planted.inputs.weights.without([0]), planted.inputs
    assert inputs.count_layers("update_attention", kept) == 2 * (len(inputs.pairs) - 1)
    assert inputs.count_features("update_attention", kept) == 33 * (len(inputs.pairs) - 1)
    assert inputs.count_features("update_learned", kept) == 64 * (len(inputs.pairs) - 1)
    assert inputs.count_features("update_views", kept) == len(inputs.pairs) - 1


def test_factors_multiply_to_updates_of_norm_one(planted):
    modules, rows = planted.inputs.modules, np.arange(len(planted.collection.files))
    factors, read = modules.factors()[0], planted.extracted.factor_reader(planted.collection)
    assert factors.shape == (len(rows), sum(module.numbers for module in modules.shapes))
    start = 0
    for pair, module in zip(modules.pairs, modules.shapes, strict=True):
        down, up, scale = read(pair, rows)
        formed = scale[:, None, None] * (up @ down)
        own = factors[:, start : start + module.numbers]
        split = module.rank * module.inputs
        product = own[:, split:].unflatten(1, (module.outputs, module.rank)) @ own[:, :split].unflatten(
            1, (module.rank, module.inputs)
        )
        torch.testing.assert_close(product, formed / torch.linalg.vector_norm(formed, dim=(1, 2), keepdim=True))
        start += module.numbers


def test_tokens_know_no_labels_and_are_standardised_on_train_rows(planted):
    tokens = planted.inputs.modules.tokens()
    assert tokens.shape == (1, len(planted.collection.files), 33 * len(planted.inputs.pairs))
    train = tokens[0, planted.inputs.split.train]
    moving = train.std(0) > 0
    torch.testing.assert_close(train[:, moving].mean(0), torch.zeros(int(moving.sum())), atol=1e-5, rtol=0)
    again = next(on_permuted_labels(planted, 1, "a test"))
    assert (again.collection.y != planted.collection.y).any()
    for module in range(len(planted.inputs.pairs)):
        own, other = (e.inputs.modules.unlabelled.module(module) for e in (planted, again))
        np.testing.assert_array_equal(own, other)
    weighted = [e.inputs.modules.kernels("update_views").module(0) for e in (planted, again)]
    assert (weighted[0] != weighted[1]).any()  # its views are weighted by labels


def test_networks_are_read_after_the_phases(planted):
    attended = readings.attended(planted, NAMES, with_permuted=False)
    runs, tested, modules = 3, len(planted.rows["test"]), len(planted.inputs.pairs)
    assert attended.attention.shape == attended.contribution.shape == (runs, tested, modules)
    np.testing.assert_allclose(attended.attention.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(attended.gradients.sum(-1), np.ones(runs))
    whole = planted.predictions.conditions["baseline"]["update_attention"]["predicted"][:, -tested:]
    right = whole == planted.collection.y[planted.rows["test"]]
    assert attended.counts[0] == 0 and attended.permuted is None
    for correct in attended.deletion.values():  # with nothing masked it is the classifier of the baseline
        np.testing.assert_array_equal(correct[:, 0], right)
    assert sorted(attended.ranks_of_ranking.tolist()) == list(range(modules))
    best = planted.layers[planted.ranking[0]].module
    assert attended.modules[attended.ranks_of_ranking[0]] == best


def test_modules_are_masked_by_the_validation_accuracy_of_their_better_layer(planted):
    validation = planted.rows["validation"]
    predicted = planted.predictions.layers["predicted"][..., : len(validation)]
    of_layer = (predicted == planted.collection.y[validation]).mean((1, 2))
    better = of_layer[planted.inputs.members].max(1)[readings.by_validation(planted)]
    assert (np.diff(better) <= 1e-12).all()


def test_gradients_that_are_all_zero_have_no_shares():
    np.testing.assert_allclose(readings.shares(np.array([[1.0, 3.0], [0.0, 0.0]])), [[0.25, 0.75], [0, 0]])


def test_nothing_is_read_of_what_was_not_run(planted):
    assert readings.attended(planted, ["stats", "update_views"], with_permuted=False) is None
    assert readings.mapped(planted, ["stats", "update_attention"], None) == []


def test_loras_are_drawn_by_all_layers_and_by_the_best_modules(planted):
    whole, *alone = readings.mapped(planted, NAMES, None)
    assert whole.layers == "all" and len(alone) == min(3, len(planted.inputs.pairs))
    assert alone[0].layers == planted.layers[planted.ranking[0]].module
    modules = planted.inputs.modules
    expected = sum(modules.unlabelled.module(m).astype(float) for m in range(len(planted.inputs.pairs)))
    np.testing.assert_allclose(whole.kernel, expected, rtol=1e-6, atol=1e-6)
    backwards = [module.name for module in modules.shapes[::-1]]
    assert [panel.layers for panel in readings.mapped(planted, NAMES, backwards)][1:] == backwards[:3]


@pytest.mark.parametrize(
    ("loras", "modules", "inputs", "device", "trained"),
    [
        (1999, 64, 320, "cpu", True),
        (2000, 64, 320, "cpu", False),
        (100, 65, 320, "cpu", False),
        (100, 64, 10**9, "cpu", False),
    ],
)
def test_networks_that_read_factors_are_left_out_where_they_would_take_long(loras, modules, inputs, device, trained):
    left = left_by_default([Module("m", 1, inputs, 320)] * modules, loras, torch.device(device))
    assert left.keys() == (set() if trained else {"update_learned", "update_frozen"})


def test_a_representation_that_is_left_out_is_run_where_its_name_is_given(tmp_path, monkeypatch):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=6)
    monkeypatch.setattr(networks, "FEW_LORAS", 5)
    for flag, chosen in (("all", False), ("stats,update_learned", True)):
        args = ablation_experiment.parse_arguments(["--dataset", str(root), "--top-k=1", f"--representations={flag}"])
        settings = resolve(args, NARROW)
        plan = ablation_experiment.make_plan(settings, index_collection(root), Engine(settings.devices), tmp_path)
        assert ("update_learned" in plan.chosen) == chosen
        assert ("update_learned" in plan.header["config"]["left_out"]) != chosen and not plan.not_run
