"""The phases: layers are ranked, representations are learned, and evaluated with and without the top layers.

An experiment is a collection under one split and one set of settings. Every training is a stack of models, and a
finished stack is a unit of work: each is trained once, by whichever worker is free.

Shape letters: N LoRAs, L layers, F features, R runs, K conditions, V and T validation and test LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from analysis.chance import permuted
from analysis.draws import stream
from analysis.evidence import Predictions
from data import Collection, CollectionError
from experiment import store
from experiment.engine import Engine
from experiment.estimates import Estimate, Estimates, Speed
from experiment.extraction import Extracted, layer_sizes, update_norms
from experiment.inputs import Description, Inputs
from experiment.plans import Plan, Planner, TrainingError
from experiment.samples import Samples
from experiment.settings import RUNS_IN_STACK, Settings
from experiment.units import Unit, Units
from loras.lora_files import Layer
from loras.weight_checks import oversized
from representations import RANKING, REPRESENTATIONS, UPDATES
from training.splits import split_rows

UNITS = "units"  # the folder of finished ones, beside the features
STAGES = {"ablation": "phase 2", "baseline": "phase 3", "grouped": "split by groups"}  # of progress, by condition
Progress = Callable[..., None]  # of stage, units done, units in all, and the share of the work; see `building.Progress`


def split_collection(collection: Collection, seed: int) -> dict[str, np.ndarray]:
    """Return the rows of each part of a collection's split, by `split_rows` of its labels and groups.

    Raises:
        CollectionError: No split was found that keeps groups apart.
    """
    try:
        return split_rows(collection.y, seed, collection.groups)
    except ValueError as error:
        by, mend = collection.group_words
        raise CollectionError([f"{collection.root}: {by}: {error}. {mend}"]) from error


def without_oversized(
    collection: Collection, rows: dict[str, np.ndarray], extracted: Extracted
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Return the parts of a split without train LoRAs that are far too large, and the rows of these.

    One of them would decide the mean and scale of all that is learned from, and all others would be equal. They are
    told by the train LoRAs alone; validation and test LoRAs stay, as nothing is learned from them. Nothing changes
    where a class would be left without any to learn from.
    """
    train, labels = rows["train"], [collection.files[row].label for row in rows["train"]]
    sizes = [layer_sizes(extracted.shards(RANKING))[train], update_norms(extracted.shards(UPDATES))[train]]
    left = np.delete(train, out := oversized(labels, np.concatenate(sizes, axis=1)))
    if len(np.unique(collection.y[left])) < len(np.unique(collection.y[train])):
        return rows, []
    return rows | {"train": left}, train[out].tolist()


class Experiment:
    """A collection under one split and one set of settings, and what its phases find.

    Args:
        settings: What is asked for.
        collection: The LoRAs.
        selected: The layers that the experiment is about, bool[L of the files].
        rows: Row indices of ``train``, ``validation`` and ``test``.
        extracted: Features and packed weights of the collection.
        engine: Does the units.
        progress: Called with stage, units done, units in all, and the share of the work.

    Attributes:
        inputs: What classifiers read.
        predictions: Of all finished classifiers.
        ranking: Layers, most predictive first, int64[L]; None before `rank`.
    """

    def __init__(
        self,
        settings: Settings,
        collection: Collection,
        selected: np.ndarray,
        rows: dict[str, np.ndarray],
        extracted: Extracted,
        engine: Engine,
        progress: Progress,
    ):
        self.settings, self.collection, self.selected = settings, collection, selected
        self.rows, self.extracted = rows, extracted
        self.engine, self.progress = engine, progress
        self.estimates = Estimates(settings, collection, selected, rows)
        units = Units(extracted.folder / UNITS, _common_key(settings, collection, selected, rows, extracted))
        engine.begin(extracted.folder)
        shared = engine.folder if engine.in_processes and settings.device.type == "cpu" else None
        description = Description(settings, Samples.of(collection), selected, rows, extracted, units, shared)
        self.inputs = Inputs(description, settings.device)
        self.planner = Planner(settings, self.inputs, units, engine)
        held_out = self.planner.held_out
        self.predictions = Predictions(rows=held_out, y=collection.y[held_out])
        self.ranking: np.ndarray | None = None

    @property
    def layers(self) -> list:
        """The L layers that the experiment is about, in the network's order."""
        return self.inputs.layers

    # -- phase 1 ------------------------------------------------------------------------------------------------------

    def rank(self) -> list[dict]:
        """Train classifiers on each layer alone; return records as in top_layers.json, most predictive first.

        Raises:
            TrainingError: A training diverged, or memory ran out.
        """
        layers, runs = self.layers, self.settings.num_runs
        models = [(layer, run) for run in range(runs) for layer in range(len(layers))]
        live = np.ones(len(REPRESENTATIONS[RANKING].feature_names), bool)
        plan = self.planner.plan_classifiers(self.inputs.ranking_source(), live, models, "ranking")
        self.progress(plan.label, 0, len(plan.todo))  # so that its time is counted from now
        try:
            scores = self.planner.carry_out(plan, self.progress)
        except TrainingError as error:
            raise TrainingError(f"the layers cannot be ranked: {error}") from error
        by_layer = {name: a.reshape(runs, len(layers), *a.shape[1:]).swapaxes(0, 1) for name, a in scores.items()}
        self.predictions.layers = {name: by_layer[name] for name in ("predicted", "log_loss", "epochs")}  # (L, runs, .)
        records = [_record(layer, depth, by_layer) for depth, layer in enumerate(layers)]
        self.ranking = self._order(records, by_layer["validation_loss"].mean(1))
        return [records[depth] for depth in self.ranking.tolist()]

    def _order(self, records: list[dict], losses: np.ndarray) -> np.ndarray:
        """Return the layers, most predictive first, int64[L].

        Ties: by validation accuracy, validation loss, depth; never by test accuracy where validation is to choose.
        """
        metrics = ["accuracy", "val_accuracy"] if self.settings.rank_by == "test" else ["val_accuracy"]
        keys = [(*(-record[metric] for metric in metrics), loss) for record, loss in zip(records, losses, strict=True)]
        return np.array(sorted(range(len(records)), key=lambda depth: (keys[depth], depth)))

    # -- what is learned ----------------------------------------------------------------------------------------------

    def fit(self, names: list[str], conditions: list[list[int]]) -> dict[str, str]:
        """Fit what is learned from the weights; return why it failed, by representation.

        Args:
            names: The representations.
            conditions: Lists of removed layers, under each of which components are fitted.
        """
        fitted = {name: units for name in names if (units := self.inputs.fitting_units(name, conditions))}
        failed: dict[str, str] = {}
        costs = _costs([(self.estimates.fitting(name), units) for name, units in fitted.items()], self.settings)
        work = [(name, unit) for name, units in fitted.items() for unit in units]
        begun = sorted((unit for _, unit in work), key=lambda unit: -costs[unit.path])
        tally = Tally(self.progress, f"fitting {', '.join(fitted)}", costs)
        outcomes = self.engine.do([unit for _, unit in work], begun, tally)
        for (name, _), reason in zip(work, outcomes, strict=True):
            if reason:
                failed.setdefault(name, reason)
        for name in names:
            if REPRESENTATIONS[name].made == "autoencoder" and name not in failed:
                for key, _, label in self.inputs.learned.autoencoder_stacks(name):
                    self.planner.note_smaller([key], label)
        return failed

    # -- phases 2 and 3 -----------------------------------------------------------------------------------------------

    def evaluate(self, names: list[str], removed: list[int], condition: str) -> Iterator[tuple[str, dict | str]]:
        """Train on representations without some layers; yield each one's entry in results.json, or why there is none.

        Args:
            names: The representations; of learned ones, those that `fit` has fitted.
            removed: Positions of the layers that are left out.
            condition: "baseline", "ablation" or another, for the progress and predictions.npz.
        """
        plans = {name: self.plan(name, removed, condition) for name in names}
        costs = _costs([(self.estimates.training(name), plan.todo) for name, plan in plans.items()], self.settings)
        todo = [unit for plan in plans.values() for unit in plan.todo]
        tally = Tally(self.progress, STAGES.get(condition, condition), costs)
        outcomes = self.engine.do(todo, _to_begin(plans.values(), costs), tally)
        for name, plan in plans.items():
            reasons = {next(outcomes) for _ in plan.todo}
            yield name, max(reasons) or self._entry(name, plan, self.inputs.weights.without(removed), condition)

    def plan(self, name: str, removed: list[int], condition: str) -> Plan:
        """Plan the classifiers of one representation without some layers."""
        kept, label = self.inputs.weights.without(removed), f"{condition} {name}"
        live = self.inputs.live(name, kept)
        if REPRESENTATIONS[name].made == "kernel":
            return self.planner.plan_kernels(name, live[None], label)
        models = [(0, run) for run in range(self.settings.num_runs)]
        at_most = RUNS_IN_STACK[self.settings.device.type]
        how = live, models, label, at_most, condition == "baseline"  # of which parameters are read later
        return self.planner.plan_classifiers(self.inputs.source(name, kept), *how)

    def _entry(self, name: str, plan: Plan, kept: np.ndarray, condition: str) -> dict:
        """Return what results.json holds of finished classifiers of layers ``kept`` bool[L]; keep their predictions."""
        scores = self.planner.load_scores(plan)
        kinds = [kind for kind in ("predicted", "log_loss", "epochs") if kind in scores]  # an SVM has no losses, epochs
        self.predictions.conditions.setdefault(condition, {})[name] = {kind: scores[kind] for kind in kinds}
        metrics = [f"{part}_{metric}" for metric in ("accuracy", "f1") for part in ("train", "val", "test")]
        return {
            **self.inputs.describe(name, kept),
            **{m: {"mean": mean(scores[m]), "std": deviation(scores[m]), "runs": scores[m].tolist()} for m in metrics},
        }

    # -- controls -----------------------------------------------------------------------------------------------------

    def train_under(self, name: str, kept: np.ndarray) -> dict[str, np.ndarray]:
        """Train a representation under conditions kept bool[K, R, L], layers kept in each run.

        Equal conditions are trained once, and on a CPU those of the phases not again. Where no input is left nothing is
        trained: that predicts the largest class of the test rows.

        Returns:
            ``predicted`` int32[K, R, V + T], and ``attribution`` float32[K, R, L] of one that is computed by layer.

        Raises:
            TrainingError: A training diverged, or memory ran out.
        """
        conditions, runs, layers = kept.shape
        masks = np.concatenate([kept, np.broadcast_to(np.arange(runs)[:, None], (conditions, runs, 1))], axis=2)
        distinct, position = np.unique(masks.reshape(-1, layers + 1), axis=0, return_inverse=True)
        live = self.inputs.live(name, distinct[:, :layers].astype(bool))
        trainable = live.any(1)
        largest = np.bincount(self.collection.y[self.rows["test"]]).argmax()
        arrays = {"predicted": np.full((len(distinct), len(self.planner.held_out)), largest, np.int32)}
        if trainable.any():
            plan = self._plan_under(name, live[trainable], distinct[trainable, layers].tolist())
            self.progress(plan.label, 0, len(plan.todo))
            scores = self.planner.carry_out(plan, self.progress)
            if "attribution" in scores:
                arrays["attribution"] = np.zeros((len(distinct), layers), np.float32)
            for kind, array in arrays.items():
                array[trainable] = scores[kind]
        return {kind: array[position].reshape(conditions, runs, -1) for kind, array in arrays.items()}

    def _plan_under(self, name: str, live: np.ndarray, runs: list[int]) -> Plan:
        """Plan classifiers of a representation that see the inputs ``live`` bool[M, F], each in its run."""
        label, on_cpu = f"controls {name}", self.settings.device.type == "cpu"
        if REPRESENTATIONS[name].made == "kernel":
            return self.planner.plan_kernels(name, live, label)
        source, models = self.inputs.source(name, self.inputs.weights.without([])), [(0, run) for run in runs]
        return self.planner.plan_classifiers(source, live, models, label, 1 if on_cpu else None)

    def again(self, collection: Collection, rows: dict[str, np.ndarray] | None, num_runs: int) -> Experiment:
        """Return the same experiment on the same files with other labels, groups or split.

        Args:
            collection: The files with their labels and groups.
            rows: Of another split, from which `without_oversized` is still to take; None: the same rows. Those are
                less them already, and of what is left others may seem far too large.
            num_runs: R.
        """
        rows = self.rows if rows is None else without_oversized(collection, rows, self.extracted)[0]
        settings = replace(self.settings, num_runs=num_runs)
        again = Experiment(settings, collection, self.selected, rows, self.extracted, self.engine, self.progress)
        again.planner.smaller_stacks = self.planner.smaller_stacks  # one report of all that is trained
        return again


def on_permuted_labels(experiment: Experiment, count: int, purpose: str) -> Iterator[Experiment]:
    """Yield an experiment with one run on labels that are permuted before training, so many times.

    Labels of groups are permuted as in the permutation test.

    Args:
        experiment: The one on the true labels.
        count: How often.
        purpose: Decides the permutations, with the seed.
    """
    collection = experiment.collection
    groups = np.arange(len(collection.y)) if collection.groups is None else collection.groups
    for y in permuted(collection.y, groups, count, stream(experiment.settings.seed, purpose)):
        pairs = zip(collection.files, y.tolist(), strict=True)
        files = tuple(replace(file, label=collection.classes[c]) for file, c in pairs)
        yield experiment.again(replace(collection, files=files), None, 1)


def _record(layer: Layer, depth: int, scores: dict[str, np.ndarray]) -> dict:
    """Return the record of a layer as in top_layers.json, given scores [L, R] of all."""
    return {
        "layer": layer.name,
        "accuracy": mean(scores["test_accuracy"][depth]),
        "accuracy_std": deviation(scores["test_accuracy"][depth]),
        "val_accuracy": mean(scores["val_accuracy"][depth]),
        "module": layer.module,
        "role": layer.role,
        "block": layer.block or None,
    }


class Tally:
    """The progress of units, by what each is estimated to cost, of those that are still to be done.

    Args:
        progress: Called with stage, units done, units in all, and the share of the work that is done.
        stage: The stage.
        costs: Seconds of each unit by its path, of which only the ratios count.
    """

    def __init__(self, progress: Progress, stage: str, costs: dict[Path, float]):
        self.progress, self.stage, self.costs = progress, stage, costs
        left = [path for path in costs if not store.is_whole(path)]
        self.done, self.cost, self.whole = len(costs) - len(left), 0.0, sum(costs[path] for path in left)
        if left:
            progress(stage, self.done, len(costs), 0.0)  # so that its time is counted from now

    def __call__(self, path: Path) -> None:
        """Count a unit that is done."""
        self.done += 1
        self.cost += self.costs[path]
        self.progress(
            self.stage, min(self.done, len(self.costs)), len(self.costs), self.cost / max(self.cost, self.whole)
        )


def _costs(work: Iterable[tuple[Estimate, Sequence[Unit]]], settings: Settings) -> dict[Path, float]:
    """Return about how long each unit takes, by its path, given the estimates of what units do together."""
    speed = Speed.usual(settings.device)
    costs = {}
    for estimate, units in work:
        costs |= {unit.path: estimate.seconds(speed, 1) / len(units) for unit in units}
    return costs


def _to_begin(plans: Iterable[Plan], costs: dict[Path, float]) -> list[Unit]:
    """Return the units of plans in the order in which to begin them: those of plans of many units last.

    So these fill up the end: on a GPU most plans are one unit, and beside a last one of many steps it would idle.
    Among plans of as many units, as most are on a CPU, those of the largest come first: what is left then takes no
    longer than what is done has.
    """
    units_of_plans = [plan.todo for plan in plans if plan.todo]
    in_order = sorted(units_of_plans, key=lambda units: (len(units), -costs[units[0].path]))
    return [unit for units in in_order for unit in units]


def _common_key(
    settings: Settings, collection: Collection, selected: np.ndarray, rows: dict[str, np.ndarray], extracted: Extracted
) -> dict:
    """Return what every unit depends on beside its own key."""
    return {
        "code": store.code_digest(
            *("training", "experiment/inputs", "experiment/modules", "experiment/networks", "experiment/resident"),
            *("experiment/units", "experiment/plans", "experiment/samples", "experiment/store"),
        ),
        "features": extracted.suffix,
        "torch": torch.__version__,
        "device": settings.device.type,
        "seed": settings.seed,
        "layers": store.array_digest(selected),
        "labels and split": store.array_digest(collection.y, *rows.values()),
    }


def emptied(experiment: Experiment, names: Iterable[str], removed: list[int]) -> list[str]:
    """Return the representations of which nothing is left without some layers, such as no whole pair."""
    inputs = experiment.inputs
    kept = inputs.weights.without(removed)
    return [name for name in names if not inputs.kept_units(name, kept).any()]


def mean(values: np.ndarray) -> float:
    """Return the mean, rounded so that the order of equal terms cannot decide a tie."""
    return round(float(np.mean(values)), 12)


def deviation(values: np.ndarray) -> float:
    """Return the sample standard deviation (ddof 1), 0 for a single value."""
    return round(float(np.std(values, ddof=1)), 12) if len(values) > 1 else 0.0
