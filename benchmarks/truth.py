"""Coverage of intervals, and claims where there is nothing to claim, in collections whose truth is known.

    python benchmarks/truth.py [--draws 2000] [--processes 2] [--rows WORD]

Predictions whose truth is known are drawn, and the program's own functions are asked. A row is one kind of answer over
a grid of cells, each of ``--draws`` collections: what is promised, the mean of the cells with its standard error, and
the cell that is furthest from the promise. The exit code is 1 where a mean or a cell breaks its promise by more than
three standard errors. Inside, 400 bootstrap draws and 399 permutations stand for the program's 10,000: the former widen
intervals by nothing, the latter make claims a little rarer.

On 2 cores (x86_64), 6 minutes a process: accuracies are covered in 96.4 % (no cell below 91.3), single differences in
97.4 (90.9), families of 13 jointly in 97.3 (94.7); no claim on nothing is made in more than 5.0 % of any cell.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from analysis.chance import ChanceTest
from analysis.comparison import compare_representations
from analysis.draws import Draws, stream
from analysis.evidence import Evidence, Predictions
from analysis.layers import depth_trend, layer_information
from analysis.questions import QUESTIONS
from loras.lora_files import Layer

RESAMPLES, PERMUTATIONS = 400, 399
BATCH, LARGE = 50, [40] + [1] * 20  # collections that share bootstrap draws; sizes of groups, one of 40 LoRAs
HYPOTHESIS = {question.key: question.hypothesis for question in QUESTIONS}
WIDTHS = (46, 22, 9, 6, 7, 9)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is counted.
        counts: Yields the number of successes, 0 to 1 each, of a cell's collections, given the cell, its generator and
            the number of collections.
        cells: Arguments of each cell.
        mean: The least and the largest share that is promised on average.
        cell: Likewise of each cell.
        least: Whether the cell with the least share is the worst, else the one with the largest.
        share: Of ``--draws`` that a cell has: what trains takes longer.
    """

    name: str
    counts: Callable[[tuple, np.random.Generator, int], Iterator[float]]
    cells: list[tuple]
    mean: tuple[float, float] = (0.0, 1.0)
    cell: tuple[float, float] = (0.0, 1.0)
    least: bool = True
    share: float = 1.0


COVERS = {"mean": (0.94, 0.975), "cell": (0.9, 1.0)}
JOINTLY = {"mean": (0.93, 1.0), "cell": (0.93, 1.0)}
ON_NOTHING = {"mean": (0.0, 0.05), "cell": (0.0, 0.05), "least": False}
POWER = {"mean": (0.8, 1.0)}


# ----------------------------------------------------------------------------------------------------------------------
# Collections of known truth
# ----------------------------------------------------------------------------------------------------------------------


def groups_of(sizes: list[int]) -> np.ndarray:
    """Return the group of each LoRA, int[T]."""
    return np.repeat(np.arange(len(sizes)), sizes)


def recognised(
    generator: np.random.Generator, sizes: list[int], truths: list[float], runs: int, collections: int
) -> np.ndarray:
    """Draw the LoRAs that classifiers of known accuracies recognise, bool[collections, classifiers, runs, T].

    Six tenths of the answers are decided by how difficult a LoRA's group is to all classifiers and runs.
    """
    difficulty = generator.random((collections, 1, 1, len(sizes)))[..., groups_of(sizes)]
    own = generator.random((collections, len(truths), runs, sum(sizes)))
    return np.where(generator.random(own.shape) < 0.6, difficulty, own) < np.array(truths)[:, None, None]


def layers_of(blocks: int, modules: int) -> list[Layer]:
    """Return down and up factors of some modules in each of some blocks."""
    names = [f"net_layers_{block}_m{module}_to_q" for block in range(blocks) for module in range(modules)]
    return [Layer(f"{name}.{role}", name, role, (4, 4), "F32") for name in names for role in ("down", "up")]


def evidence_of(
    y: np.ndarray, seed: int, groups: np.ndarray | None = None, layers: int = 0, validation: int = 0
) -> Evidence:
    """Return evidence without predictions: the first LoRAs are validation rows, the others test rows."""
    every = np.arange(len(y))
    rows = {"train": every[:0], "validation": every[:validation], "test": every[validation:]}
    names = [str(label) for label in range(y.max() + 1)]
    described, predictions = layers_of(layers // 2, 1), Predictions(every, y)
    return Evidence(described, names, y, rows, groups, np.arange(layers), 5, predictions, seed, RESAMPLES, PERMUTATIONS)


def new_seed(generator: np.random.Generator) -> int:
    """Draw a seed."""
    return int(generator.integers(2**31))


def covers(bounds: np.ndarray, truth: np.ndarray | float) -> np.ndarray:
    """Test whether intervals float[..., 2] hold the truth."""
    return (bounds[..., 0] <= truth + 1e-9) & (truth - 1e-9 <= bounds[..., 1])


# ----------------------------------------------------------------------------------------------------------------------
# Intervals
# ----------------------------------------------------------------------------------------------------------------------


def accuracy_covered(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether the interval of an accuracy holds the truth."""
    sizes, runs, truth = cell
    for start in range(0, collections, BATCH):
        count, draws = min(BATCH, collections - start), Draws(groups_of(sizes), RESAMPLES, new_seed(generator))
        correct = recognised(generator, sizes, [truth], runs, count)[:, 0]
        yield from covers(draws.intervals(correct.mean((1, 2)), draws.accuracies(list(correct))), truth)


def difference_covered(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether the interval of a single difference of accuracies holds the truth."""
    sizes, runs, truths = cell
    for start in range(0, collections, BATCH):
        count, draws = min(BATCH, collections - start), Draws(groups_of(sizes), RESAMPLES, new_seed(generator))
        correct = recognised(generator, sizes, truths, runs, count)
        drawn = draws.accuracies([*correct[:, 0], *correct[:, 1]])
        by_lora = correct.mean(2)
        for i in range(count):
            difference = by_lora[i, :1] - by_lora[i, 1:], (drawn[i] - drawn[count + i])[None]
            (record,) = draws.family(*difference, np.array([runs]))
            yield covers(record["interval"], truths[0] - truths[1])


def family_covered(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether all of thirteen differences with the best are in their intervals."""
    sizes, truths = cell
    draws = None
    for number in range(collections):
        if number % BATCH == 0:
            draws = Draws(groups_of(sizes), RESAMPLES, new_seed(generator))
        best, *others = recognised(generator, sizes, truths, 1, 1)[0]
        records = draws.differences([(best, other) for other in others])
        bounds = np.array([record["interval"] for record in records])
        yield covers(bounds, truths[0] - np.array(truths[1:])).all()


def family_called(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether any of thirteen equal classifiers is said to differ from the best."""
    for held in family_covered((cell[0], [0.7] * 14), generator, collections):
        yield not held


def rows_of_intervals() -> list[Row]:
    """Return the rows of intervals of accuracies and differences."""
    sizes = [[1] * n for n in (20, 50, 100, 200)] + [[5] * n for n in (4, 10, 20, 40)] + [[1, 2, 3, 8] * 10]
    truths = (0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.995)
    pairs = [[0.3, 0.3], [0.6, 0.5], [0.97, 0.9], [0.9, 0.2], [0.995, 0.05]]
    families = product(([1] * 50, [1] * 200, [5] * 20), ([0.6] * 14, [0.95] + [0.9] * 6 + [0.4] * 7, [0.99] * 14))
    return [
        Row("accuracies", accuracy_covered, list(product(sizes, (1, 3), truths)), **COVERS),
        Row("accuracies, a group of 40 among 20", accuracy_covered, list(product([LARGE], (1, 3), truths))),
        Row("single differences", difference_covered, list(product(sizes, (1, 3), pairs)), **COVERS),
        Row("single differences, a group of 40 among 20", difference_covered, list(product([LARGE], (1, 3), pairs))),
        Row("families of 13 differences, jointly", family_covered, list(families), **JOINTLY),
        Row("any of 13 equal ones differs", family_called, [([1] * 60,), ([5] * 20,), (LARGE,)], **ON_NOTHING),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Chance
# ----------------------------------------------------------------------------------------------------------------------


def classes_of(cell: tuple, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw classes int[T], the same within groups, in the cell's shares; return the groups int[T] too."""
    sizes, shares = cell
    groups, ends = groups_of(sizes), np.round(np.cumsum(shares) * len(sizes)).astype(int)
    return generator.permutation(np.searchsorted(ends, np.arange(len(sizes)), side="right"))[groups], groups


def guesses(generator: np.random.Generator, cell: tuple, layers: int, groups: np.ndarray) -> np.ndarray:
    """Draw predictions that are the same within groups and say some class as often as each likes, int[L, 1, T]."""
    count, says = len(cell[1]), generator.random((layers, groups.max() + 1))
    often = np.linspace(1 / count, 1, layers)[:, None]  # how often a layer says the largest class
    others = generator.integers(1, count, says.shape)
    return np.where(says < often, 0, others)[:, None, groups]


def layer_called(which: str, cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether any of 24 layers that know nothing is called."""
    for _ in range(collections):
        y, groups = classes_of(cell, generator)
        test = ChanceTest.of(evidence_of(y, new_seed(generator), groups), list(guesses(generator, cell, 24, groups)))
        yield getattr(test, which).any()


def layer_found(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether a layer that knows some LoRAs is called beside 23 that know nothing."""
    *kind, known = cell
    for _ in range(collections):
        y, groups = classes_of(tuple(kind), generator)
        predicted = guesses(generator, tuple(kind), 24, groups)
        knows = generator.random(groups.max() + 1)[groups] < known
        predicted[0, 0] = np.where(knows, y, generator.permutation(y))
        yield ChanceTest.of(evidence_of(y, new_seed(generator), groups), list(predicted)).above_null[0]


def right_as_guessing(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether a layer is above chance that is right as often as guessing the largest class is."""
    for _ in range(collections):
        y, groups = classes_of(cell, generator)
        right = generator.random(len(y)) < cell[1][0]
        predicted = np.where(right, y, (y + generator.integers(1, len(cell[1]), len(y))) % len(cell[1]))
        yield ChanceTest.of(evidence_of(y, new_seed(generator), groups), [predicted[None]]).above_chance[0]


def compared(known: list[float], generator: np.random.Generator) -> dict:
    """Compare representations, each of which knows a share of the LoRAs, on 20 validation and 60 test rows."""
    y = generator.permutation(np.arange(80) % 4)
    names = ["stats", "spectral", "ensemble", *(f"other {i}" for i in range(len(known) - 3))]
    evidence = evidence_of(y, new_seed(generator), validation=20)
    for condition in ("baseline", "ablation"):
        evidence.predictions.conditions[condition] = {
            name: {"predicted": np.where(generator.random(80) < share, y, generator.integers(0, 4, (2, 80)))}
            for name, share in zip(names, known, strict=True)
        }
    return compare_representations(evidence, names)


def best_called(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether the best of representations that know nothing is above chance."""
    for _ in range(collections):
        yield compared([0.0] * cell[0], generator)["conditions"]["baseline"]["best"] is not None


def rows_of_chance() -> list[Row]:
    """Return the rows of tests against permuted labels and guessing."""
    equal, unequal = (0.25,) * 4, (0.7, 0.2, 0.1)
    kinds = [([1] * 60, equal), ([2, 8, 3, 5] * 5, (0.5, 0.5)), (LARGE, (0.5, 0.5)), ([1] * 100, unequal)]
    found = [([1] * 60, equal, 0.5), ([5] * 20, (0.5, 0.5), 0.9), ([1] * 120, unequal, 0.35)]
    return [
        Row("any of 24 layers knows something", partial(layer_called, "above_null"), kinds, **ON_NOTHING),
        Row("any of 24 layers is above chance", partial(layer_called, "above_chance"), kinds, **ON_NOTHING),
        Row("the layer that knows is found", layer_found, found, **POWER),
        Row("as good as guessing is above it", right_as_guessing, [([1] * 100, unequal)], **ON_NOTHING),
        Row("there is a best representation", best_called, [(3,), (13,)], **ON_NOTHING),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Hypotheses that nothing decides
# ----------------------------------------------------------------------------------------------------------------------


def depth_decided(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether later layers are said to predict more, or less, where only blocks differ, at random."""
    blocks, of_block, trend = cell
    evidence = replace(evidence_of(np.arange(4) % 2, 0), layers=layers_of(blocks, 4))
    block, up = np.repeat(np.arange(blocks), 8), np.arange(8 * blocks) % 2
    for _ in range(collections):
        accuracy = 0.4 + 0.2 * up + trend * block / blocks + of_block * generator.normal(size=blocks)[block]
        accuracy += 0.03 * generator.normal(size=len(block))
        depth = depth_trend(evidence, accuracy, accuracy > 0)
        yield HYPOTHESIS["layers"]({"layers": {"depth": depth}})["outcome"] in ("confirmed", "refuted")


def better_decided(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether ensemble or spectral are said to be better or worse than stats, which knows as much."""
    for _ in range(collections):
        sections = {"representations": compared([cell[0]] * 6, generator)}
        yield HYPOTHESIS["representations"](sections)["outcome"] in ("confirmed", "refuted")


def coarse_decided(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether the fourth hypothesis is decided: the first five know a cluster, others nothing or as much."""
    layers, exact, others = cell
    y = np.arange(120) % 6  # clusters: odd and even classes
    features = np.repeat((y % 2)[:, None, None].astype(float), layers, axis=1) + 1e-3 * (y[:, None, None] // 2)
    for _ in range(collections):
        evidence = evidence_of(y, new_seed(generator), layers=layers, validation=30)
        shape = (layers, 1, len(y))
        in_cluster = (y + 2 * generator.integers(0, 3, shape)) % 6
        knows = np.where(generator.random(shape) < exact, y, in_cluster)
        predicted = generator.integers(0, 6, shape)
        last = layers if others else 5
        predicted[:last] = np.where(generator.random((last, 1, len(y))) < 0.8, knows[:last], predicted[:last])
        evidence.predictions.layers |= {"predicted": predicted, "log_loss": np.zeros(shape)}
        test = ChanceTest.of(evidence, list(evidence.layer_predictions()))
        evidence = replace(evidence, rows=evidence.rows | {"train": np.arange(len(y))})  # of the features alone
        section = layer_information(evidence, test, features, np.arange(len(y)))
        yield HYPOTHESIS["layer_information"]({"layer_information": section})["outcome"] in ("confirmed", "refuted")


def rows_of_hypotheses() -> list[Row]:
    """Return the rows of hypotheses about collections in which there is nothing to decide, and of a trend."""
    coarse = [(24, 0.0, False), (128, 0.0, False), (24, 0.3, True)]
    return [
        Row("a trend of depth", depth_decided, [(6, 0.1, 0), (9, 0.1, 0), (24, 0.1, 0), (24, 0, 0)], **ON_NOTHING),
        Row("a trend that is there", depth_decided, [(12, 0.02, 0.2)], **POWER),
        Row("ensemble or spectral against stats", better_decided, [(0.3,), (0.7,), (0.97,)], **ON_NOTHING),
        Row("top layers know clusters, others concepts", coarse_decided, coarse, **ON_NOTHING, share=0.5),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Removal, layers chosen elsewhere, and several splits, where these modules are there
# ----------------------------------------------------------------------------------------------------------------------


STRUCTURES = {  # by verdict, the share of the accuracy above chance that layers kept, bool[..., L], have
    "localized": lambda kept: kept[..., :6].mean(-1),  # six hold everything
    "distributed": lambda kept: kept.mean(-1),  # each holds as much
    "redundant": lambda kept: np.minimum(1, 4 * kept.mean(-1)),  # any quarter is enough
}


def removed(verdict: str, generator: np.random.Generator) -> dict:
    """Return ``robustness`` of a planted structure of 64 layers, 200 test LoRAs and two runs."""
    from analysis.removal import robustness
    from analysis.removal_plan import Order, plan_controls

    y, left = np.arange(200) % 4, STRUCTURES[verdict]
    alone = left(np.eye(64, dtype=bool))
    evidence = evidence_of(y, new_seed(generator), layers=64)
    predicted = predicted_by(generator, y, 0.2 + 0.6 * alone / alone.max())
    evidence.predictions.layers |= {"predicted": predicted, "log_loss": np.zeros(predicted.shape)}
    conditions = plan_controls(Order.of_layers(evidence), runs=2, draws=39, points=32, seed=evidence.seed)
    return robustness(evidence, conditions, predicted_by(generator, y, 0.9 * left(conditions.kept[:, 0])))


def predicted_by(generator: np.random.Generator, y: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Draw predictions int[K, 2, T] that are right on a share of LoRAs float[K], more difficult ones for all alike."""
    recognises = generator.random((1, 1, len(y))) < known[:, None, None]
    return np.where(recognises, y, generator.integers(0, int(y.max()) + 1, (len(known), 2, len(y))))


def verdict_right(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether the verdict is the structure's."""
    for _ in range(collections):
        yield removed(cell[0], generator)["verdict"] == cell[0]


def share_covered(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether the interval of the share that survives without the top five of 64 layers holds the truth."""
    for _ in range(collections):
        bounds = removed(cell[0], generator)["survives"]["interval"]
        yield covers(np.array(bounds), STRUCTURES[cell[0]](np.arange(64) >= 5))


def step_covered(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether the interval of the steepest step of the removal curve holds the truth; the window is a tenth."""
    for _ in range(collections):
        section = removed(cell[0], generator)["steepest"]
        yield covers(np.array(section["interval"]), cell[1])


def rows_of_removal() -> list[Row]:
    """Return the rows of shares that survive a removal and of verdicts."""
    if find_spec("analysis.removal_plan") is None:
        return []
    cells, steps = [(verdict,) for verdict in STRUCTURES], [("localized", 1.0), ("distributed", 0.1)]
    return [
        Row("share that survives", share_covered, cells, mean=(0.9, 1.0), cell=(0.9, 1.0), share=0.1),
        Row("steepest step of a removal", step_covered, steps, mean=(0.9, 1.0), cell=(0.9, 1.0), share=0.1),
        Row("verdict of a planted structure", verdict_right, cells, share=0.1, **POWER),
    ]


def first_covered(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether the interval of the cross-fitted first of 64 equal layers holds their accuracy."""
    from analysis.cross_fitting import TrainedSets, cross_fitted

    tested, known = cell
    y = np.arange(20 + tested) % 4
    for _ in range(collections):
        evidence = evidence_of(y, new_seed(generator), layers=64, validation=20)
        shape = (64, 1, len(y))
        predicted = np.where(generator.random(shape) < known, y, generator.integers(0, 4, shape))
        evidence.predictions.layers |= {"predicted": predicted, "log_loss": np.zeros(shape)}
        first = cross_fitted(evidence, TrainedSets())["first"]
        yield covers(np.array(first["interval"]), known + (1 - known) / 4)


def rows_of_cross_fitting() -> list[Row]:
    """Return the row of the first layer, chosen on other LoRAs than it is measured on."""
    if find_spec("analysis.cross_fitting") is None:
        return []
    return [Row("first of 64 equal layers", first_covered, [(40, 0.2), (100, 0.2)], cell=(0.9, 1.0), share=0.1)]


def split_covered(cell: tuple, generator: np.random.Generator, collections: int) -> Iterator[float]:
    """Yield whether the interval over splits holds the mean over all of them, of results that splits share in part."""
    from analysis.across_splits import summary

    splits, ratio = cell
    for _ in range(collections):
        shared = ratio**0.5 * generator.normal()  # of the collection: all splits overlap
        values = 0.5 + 0.05 * (shared + generator.normal(size=splits))
        yield covers(np.array(summary(values, ratio, (0.0, 1.0))["interval"]), 0.5)


def rows_of_splits() -> list[Row]:
    """Return the row of intervals over splits."""
    if find_spec("analysis.across_splits") is None:
        return []
    return [Row("means over splits", split_covered, [(5, 0.25), (10, 0.25)], mean=(0.93, 1.0), cell=(0.9, 1.0))]


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------

ROWS = (rows_of_intervals, rows_of_chance, rows_of_hypotheses, rows_of_removal, rows_of_cross_fitting, rows_of_splits)


def share_of_cell(row: Row, number: int, collections: int) -> float:
    """Return the share of successes in one cell."""
    return float(np.mean(list(row.counts(row.cells[number], stream("truth", row.name, number), collections))))


def promised(row: Row) -> str:
    """Return the promise as text, in percent."""
    (low, high), least = row.mean, row.cell[0]
    parts = [f"at least {100 * low:g}" if high == 1 and low else ""]
    if high < 1:
        parts = [f"{100 * low:g} to {100 * high:g}" if low else f"at most {100 * high:g}"]
    if least and least != low:
        parts.append(f"no cell < {100 * least:g}")
    return ", ".join(part for part in parts if part) or "-"


def line(row: Row, shares: np.ndarray, collections: int) -> tuple[str, bool]:
    """Return a row of the table, and whether its promise is broken by more than three standard errors."""
    number = int(shares.argmin() if row.least else shares.argmax())
    mean, worst = shares.mean(), shares[number]
    error = float(np.sqrt((shares * (1 - shares)).sum() / collections) / len(shares))

    def beyond(value: float, bounds: tuple[float, float], count: int) -> bool:
        slack = [3 * (bound * (1 - bound) / count) ** 0.5 for bound in bounds]
        return value < bounds[0] - slack[0] or value > bounds[1] + slack[1]

    broken = beyond(mean, row.mean, collections * len(shares)) or beyond(worst, row.cell, collections)
    where = ", ".join(f"{len(part)} groups" if isinstance(part, list) and len(part) > 3 else str(part)
                      for part in row.cells[number])  # fmt: skip
    texts = (row.name, promised(row), f"{100 * mean:.1f}", f"{100 * error:.1f}", str(len(shares)), f"{100 * worst:.1f}")
    text = "".join(f"{cell:<{width}}" for cell, width in zip(texts, WIDTHS, strict=True))
    return f"{text}{where}{'   BROKEN' if broken else ''}", broken


def main() -> None:
    """Simulate all rows and print them as they are finished."""
    parser = argparse.ArgumentParser(description="Compare what the answers say with known truth.")
    parser.add_argument("--draws", type=int, default=2000, help="collections in each cell (2000)")
    parser.add_argument("--processes", type=int, default=2, help="that work at the same time (2)")
    parser.add_argument("--rows", default="", help="only rows whose name has this in it (all)")
    args = parser.parse_args()
    rows = [row for make in ROWS for row in make() if args.rows in row.name]
    print(f"{os.cpu_count()} cores ({platform.machine()}), {args.processes} processes, numpy {np.__version__}, "
          f"{args.draws} collections in a cell, {RESAMPLES} bootstrap draws, {PERMUTATIONS} permutations")  # fmt: skip
    titles = ("percent of collections", "promised", "measured", "SE", "cells", "worst")
    print("".join(f"{title:<{width}}" for title, width in zip(titles, WIDTHS, strict=True)) + "in", flush=True)
    start, broken = time.perf_counter(), 0
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        pending = []
        for row in rows:
            count = max(10, round(args.draws * row.share))
            pending.append((row, count, [pool.submit(share_of_cell, row, i, count) for i in range(len(row.cells))]))
        for row, count, futures in pending:
            text, is_broken = line(row, np.array([future.result() for future in futures]), count)
            print(text, flush=True)
            broken += is_broken
    print(f"{time.perf_counter() - start:.0f} s; {broken} of {len(rows)} promises broken by more than 3 SE")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
