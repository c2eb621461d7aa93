"""The rate at which the experiment calls a layer predictive where none is: at most one collection in twenty.

    python benchmarks/type_one_error.py [--collections 200] [--layers 24] [--processes 2]

Small collections are drawn at random, LoRAs by layers by seven statistics, split 70/10/20 as the program does it, and
ranked with the stacked trainer on a short schedule. `analysis.layers.layer_ranking` then tests every layer,
family-wise by the maximum over layers; a collection counts where any layer is above chance. There are three kinds:

- null: labels have nothing to do with the features. At most 5 % of them (and two standard errors) may count: the last
  line.
- grouped: labels are the same within groups of 2 to 8 LoRAs, whose features share an effect of the group three times as
  large as what differs within it; no group is in two parts of the split. Whole groups are permuted, and at most as many
  may count; what a test that permutes LoRAs one by one would say of the same predictions stands beside it.
- planted: as these two, but one layer knows a little of the class. A test that never calls anything would pass the
  above: the share of collections in which that layer is called is the power.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from analysis.evidence import ALPHA, Evidence, Predictions, stream
from analysis.layers import layer_ranking
from loras.lora_files import Layer
from training.classifier import Models, train_classifiers
from training.splits import split_rows
from training.stacks import Schedule, Split, standardise, start_thread

LORAS, CLASSES = 240, 4
FEATURES, RUNS = 7, 2
GROUPS, GROUPED_CLASSES = 48, 2
GROUP_EFFECT = 3.0  # its deviation, in standard deviations of the noise
PLANTED, SIGNAL = 0, {"planted": 1.0, "grouped, planted": 5.0}  # the layer, and its class means' distance from 0
SCHEDULE = Schedule(max_epochs=20, patience=5, hidden=(32, 32, 32))
KINDS = ("null", "grouped", "planted", "grouped, planted")


def draw(kind: str, number: int, layers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Draw statistics float32[N, L, 7], labels int[N] and groups int[N] (None without) of one collection."""
    generator = stream("type one error", kind, number)
    if kind.startswith("grouped"):
        classes, groups = GROUPED_CLASSES, np.repeat(np.arange(GROUPS), generator.integers(2, 9, GROUPS))
        y = generator.permutation(np.arange(GROUPS) % classes)[groups]
        x = GROUP_EFFECT * generator.normal(size=(GROUPS, layers, FEATURES))[groups]
    else:
        classes, groups = CLASSES, None
        y, x = generator.permutation(np.arange(LORAS) % classes), np.zeros((LORAS, layers, FEATURES))
    x += generator.normal(size=x.shape)
    if kind in SIGNAL:
        x[:, PLANTED] += SIGNAL[kind] * generator.normal(size=(classes, FEATURES))[y] / FEATURES**0.5
    return x.astype(np.float32), y, groups


def ranked(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None) -> Evidence:
    """Train each layer's classifiers, in one stack, and return their predictions."""
    rows, (_, layers, _), classes = split_rows(y, 0, groups), x.shape, int(y.max()) + 1
    split = Split(*(torch.from_numpy(rows[part]) for part in ("train", "validation", "test")))
    inputs = standardise(torch.from_numpy(x).transpose(0, 1).contiguous(), split.train)
    source, run = (torch.from_numpy(index.ravel()) for index in np.indices((layers, RUNS)))
    labels, models = torch.from_numpy(y), Models(source, run)
    trained = train_classifiers(inputs, labels, split, models, classes, schedule=SCHEDULE, seed=0)
    predicted = trained["predicted"].reshape(layers, RUNS, -1)
    layer_table = [Layer(f"layer {d}", f"module_{d // 2}", ("down", "up")[d % 2], (1, 8), "F32") for d in range(layers)]
    names = [str(c) for c in range(classes)]
    held_out = np.concatenate([rows["validation"], rows["test"]])
    predictions = Predictions(held_out, y[held_out], {"predicted": predicted})
    return Evidence(layer_table, names, y, rows, groups, np.arange(layers), 1, predictions, 0)


def test_layers(layers: int, trial: tuple[str, int]) -> tuple[str, int, int, bool, float]:
    """Test the layers of one collection.

    Returns:
        Kind, layers called, layers called when LoRAs are permuted one by one, whether the planted layer is called, and
        its accuracy.
    """
    kind, number = trial
    evidence = ranked(*draw(kind, number, layers))
    ranking = layer_ranking(evidence)
    count = count_without_groups = ranking["num_above_null"]
    if evidence.groups is not None:
        count_without_groups = layer_ranking(replace(evidence, groups=None))["num_above_null"]
    planted = ranking["records"][PLANTED]
    return kind, count, count_without_groups, planted["above_null"], float(planted["accuracy"])


def share(name: str, called: np.ndarray) -> float:
    """Print and return the share of collections."""
    print(f"{name:62}{called.mean():8.1%}   {int(called.sum())} of {len(called)}")
    return float(called.mean())


def main() -> None:
    """Draw, rank and test all collections, and print how many called any layer predictive."""
    parser = argparse.ArgumentParser(description="Count the collections without signal that are said to have some.")
    parser.add_argument("--collections", type=int, default=200, help="of each kind (200)")
    parser.add_argument("--layers", type=int, default=24, help="of each collection (24)")
    parser.add_argument("--processes", type=int, default=2, help="that work at the same time (2)")
    args = parser.parse_args()
    print(
        f"{os.cpu_count()} cores ({platform.machine()}), {args.processes} processes, torch {torch.__version__}; "
        f"{args.collections} collections of a kind, {args.layers} layers, {RUNS} runs"
    )
    trials = [(kind, number) for number in range(args.collections) for kind in KINDS]
    context, start = multiprocessing.get_context("spawn"), partial(start_thread, torch.device("cpu"))
    results: dict[str, list] = {kind: [] for kind in KINDS}
    with ProcessPoolExecutor(args.processes, context, start) as pool:
        for kind, *numbers in pool.map(partial(test_layers, args.layers), trials, chunksize=4):
            results[kind].append(numbers)
    counts = {kind: np.array(numbers, float) for kind, numbers in results.items()}

    bound = ALPHA + 2 * (ALPHA * (1 - ALPHA) / args.collections) ** 0.5
    print("collections in which any layer is called predictive")
    null = share("null", counts["null"][:, 0] > 0)
    grouped = share("grouped, whole groups permuted", counts["grouped"][:, 0] > 0)
    share("grouped, LoRAs permuted one by one (not what is done)", counts["grouped"][:, 1] > 0)
    for kind in SIGNAL:
        accuracy, chance = counts[kind][:, 3].mean(), 1 / (GROUPED_CLASSES if "grouped" in kind else CLASSES)
        share(f"{kind}, the layer itself (accuracy {accuracy:.0%}, chance {chance:.0%})", counts[kind][:, 2] > 0)
    within = "within" if max(null, grouped) <= bound else "above"
    print(f"bound: {bound:.1%} (5 % and two standard errors of {args.collections}); null and grouped are {within} it")
    print(f"figure: {100 * null:.1f} %")
    if within == "above":
        sys.exit(1)


if __name__ == "__main__":
    main()
