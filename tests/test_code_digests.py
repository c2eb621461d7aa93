"""Which edits of the program make finished work worthless: a cache key covers the modules that decide what it names.

The modules are found with ``ast``, by the imports of those that define what is kept under the key. What a key covers is
seen by an edit of each module in a copy of the source.
"""

from __future__ import annotations

import ast
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from making import write_collection
from test_house import FOLDERS, ROOT, name_of, parsed, product_files

import ablation_experiment
from data import index_collection
from experiment import extraction, store
from experiment.engine import Engine
from experiment.phases import Experiment, split_collection
from experiment.settings import resolve

CPU = torch.device("cpu")
# Without the folders themselves, which hold a docstring and nothing else: see the first test.
MODULES = {name_of(path).removesuffix(".py") for path in product_files() if path.name != "__init__.py"}
# Not experiment/phases and experiment/controls: which units they ask for decides nothing about what these hold.
UNITS = {"experiment/inputs", "experiment/plans", "experiment/units"}
DEFINED_IN = {  # what a key names -> the modules that define it
    "features": {"experiment/extraction"},
    "classifier of stats": UNITS,
    "classifier of vae": UNITS,
    "autoencoder": UNITS,
    "results": {"ablation_experiment"},
}
# Modules that a key leaves out on purpose, and with them all that only they import. They decide no number, or do so
# through what is in the key itself.
LEFT_OUT_OF_ALL = {
    "data",  # which files there are, in which order: the key has their paths and contents, labels and split
    "loras/notices",  # the words for what is wrong with a file
    "loras/names",  # how they are shown
    "loras/memory",  # what fits
    "loras/blocks",  # what layers are called in tables and figures
    "loras/building",  # how files are written, whole or not at all
    "experiment/engine",  # who computes
}
SETTINGS = "experiment/settings"  # what flags mean: the key has seed, device, schedule, and the models of a stack
THREADS = "experiment/threads"  # who computes, as the engine
LEFT_OUT = {
    "features": LEFT_OUT_OF_ALL,
    "classifier of stats": {*LEFT_OUT_OF_ALL, SETTINGS, THREADS, "autoencoders"},  # it reads nothing learned by them
    "classifier of vae": {*LEFT_OUT_OF_ALL, SETTINGS, THREADS},
    "autoencoder": {*LEFT_OUT_OF_ALL, SETTINGS, THREADS},
    "results": set(),
}


@cache
def imported(module: str) -> set[str]:
    """Return the modules of the program that a module imports; imports inside functions count."""
    names = set()
    for node in ast.walk(parsed(ROOT / f"{module}.py")):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import, which is not followed here"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.replace(".", "/") for name in names} & MODULES


def closure(modules: set[str], left_out: set[str]) -> set[str]:
    """Return modules and all that they import, directly or not; imports of those left out are not followed."""
    reached, unseen = set(), set(modules)
    while unseen:
        reached |= unseen
        unseen = {name for module in unseen - left_out for name in imported(module)} - reached
    return reached


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return index_collection(write_collection(tmp_path_factory.mktemp("collections") / "small", per_class=10))


def keys_of(collection) -> dict[str, str]:
    """Return the keys by which finished work is found; no weight is read and nothing is trained."""
    settings = resolve(ablation_experiment.parse_arguments(["--quick", "--device=cpu"]))
    weight_pass = extraction._Pass(collection, collection.root.parent / "cache", CPU)
    kept, rows = np.ones(len(collection.layers), bool), split_collection(collection, settings.seed)
    extracted = weight_pass.extracted("0123456789abcdef")
    experiment = Experiment(settings, collection, kept, rows, extracted, Engine([CPU]), lambda *_: None)
    inputs, planner = experiment.inputs, experiment.planner

    def classifier(name: str) -> str:
        source, live = inputs.source(name, kept), inputs.live(name, kept)
        plan = planner.plan_classifiers(source, live, [(0, 0)], name)
        return planner.units.path(plan.keys[0]).name

    return {
        "features": extracted.path("stats").name,
        "classifier of stats": classifier("stats"),
        "classifier of vae": classifier("vae"),
        "autoencoder": planner.units.path(inputs.learned.autoencoder_stacks("vae")[0][0]).name,
        "results": ablation_experiment.environment(settings, Engine([CPU]))["code"],
    }


@pytest.fixture(scope="module")
def covered(collection, tmp_path_factory) -> dict[str, set[str]]:
    """Return the modules that each key covers: those an edit of which changes it."""
    program = tmp_path_factory.mktemp("program")
    for path in [*product_files(), *ROOT.glob("*/*.html")]:
        (program / name_of(path)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, program / name_of(path))
    modules_of_key = {name: set() for name in DEFINED_IN}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROOT", program)
        patch.setattr(store, "_source", store._source.__wrapped__)  # reads again what has been edited
        before = keys_of(collection)
        for module in MODULES:
            path = program / f"{module}.py"
            source = path.read_bytes()
            path.write_bytes(source + b"# Edited.\n")
            after = keys_of(collection)
            path.write_bytes(source)
            for name, modules in modules_of_key.items():
                modules |= {module} if before[name] != after[name] else set()
        assert keys_of(collection) == before
    return modules_of_key


def test_a_folder_runs_nothing_of_its_own_when_it_is_imported():
    assert all(len(parsed(ROOT / folder / "__init__.py").body) == 1 for folder in FOLDERS)


@pytest.mark.parametrize("name", DEFINED_IN)
def test_a_key_covers_every_module_that_decides_what_it_names(covered, name):
    reached = closure(DEFINED_IN[name], LEFT_OUT[name])
    missing = reached - LEFT_OUT[name] - covered[name]
    assert not missing, f"an edit of {sorted(missing)} does not change the key of the {name}"
    assert LEFT_OUT[name] <= reached, "exceptions that are no longer needed"
    assert covered[name].isdisjoint(LEFT_OUT[name]), "exceptions that the key covers"


def test_an_edit_in_the_analysis_or_the_report_trains_nothing_again(covered):
    presenting = {module for module in MODULES if module.startswith(("analysis/", "report/"))}
    assert presenting and presenting <= covered["results"]
    assert all(modules.isdisjoint(presenting) for name, modules in covered.items() if name != "results")


def test_imports_are_followed_into_functions_and_not_beyond_what_is_left_out():
    assert "experiment/command" in imported("data")  # inside a function
    assert {"training/kernels", "training/classifier"} <= imported("experiment/plans")  # a module, and names of one
    reached = closure({"experiment/extraction"}, {"data", "experiment/engine"})
    assert "data" in reached and not {"loras/published", "experiment/settings"} & reached
    assert "loras/keys" in reached  # by way of loras/lora_files
