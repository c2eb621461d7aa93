"""The classifiers that a run keeps in ``model/`` beside its results, for predict.py.

Multilayer perceptrons are trained once more, as units of their own: those of the phases keep no parameters. Of support
vector machines the coefficients are kept, and the factors of the LoRAs that these belong to. Nothing is kept untried:
all held-out LoRAs are predicted from what is written, and `same` says how many predictions are the experiment's.

Shape letters: N LoRAs, n of them, R runs, C classes, P modules, m columns of a kernel, V and T validation and test
LoRAs.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis import calibration
from analysis.calibration import Norms, Usual
from experiment import store
from experiment.extraction import update_norms
from experiment.inputs import Inputs
from experiment.model_files import FOLDER, Made, identity_of, write_manifest, write_tensors, written_whole
from experiment.phases import Experiment
from experiment.plans import Training, TrainingError
from experiment.predictors import PARAMETERS, Predicted, Rows, decisions_of_pairs, joined, packed_factors, predict
from experiment.settings import KEPT, count_cores
from experiment.units import FAILURES, FAULTS, Unit, one_memory_error, reason_of
from loras.building import fault_of
from representations import REPRESENTATIONS, UPDATES
from training import attention
from training.classifier import DROPOUT, HIDDEN, ClassifierStack, Models, predictions
from training.columns import Held
from training.kernels import Limits, UpdateKernels, fit_svm, landmark_map
from training.stacks import mean_and_scale, rows_at_once, scaled, train

LIMIT = 2**30  # bytes of the factors that are kept of one representation
BEST_OF = ("update_spectrum", "update_sketch")  # of which --save-models=best keeps the better one
KERNELS = ("update_views", "update_kernel")  # and the first of these that was run
ONLY_TO_READ = ("file", "layers", "usual")  # of a record, what no result is
NUMBERS_AT_ONCE = 2**26  # of features, kernels or tokens of held-out LoRAs that are predicted: 256 to 512 MiB
FACTORS_AT_ONCE = 2**24  # numbers of their factors of a module, which are worked on in several copies

# A record, its tensors, and what the experiment predicts, int[R, V + T].
Parts = tuple[dict, dict[str, Made], np.ndarray]


def keep(experiment: Experiment, results: dict, target: Path, limit: int = LIMIT) -> dict:
    """Write ``model/`` of what --save-models asks for; return `model` of results.json.

    Args:
        experiment: All phases done.
        results: Its results.
        target: The folder of results.
        limit: Bytes of factors at most, of each representation.

    Raises:
        TrainingError: It cannot be written.
        DamagedError: What it reads is damaged.
    """
    entries = results["baseline_results"]
    names, not_kept = choose(experiment.settings.save_models, entries)
    kept, files = [], {}
    try:
        with written_whole(target) as folder:
            for name in names:
                try:
                    with one_memory_error():
                        record, tensors = _calibrated(experiment, *_make(experiment, name, limit))
                except FAULTS:
                    raise
                except (TrainingError, *FAILURES) as error:  # the others can be kept all the same
                    not_kept.append({"representation": name, "reason": reason_of(error)})
                    continue
                record["file"] = f"{name}.safetensors"
                files[record["file"]], record["bytes"] = write_tensors(folder / record["file"], tensors)
                kept.append(record)
            kept.sort(key=lambda record: -record["validation_accuracy"])  # of equals the order is that of `choose`
            write_manifest(folder, _manifest(experiment, results, kept, files))
        if not kept:
            shutil.rmtree(target / FOLDER)
    except store.DamagedError:
        raise
    except OSError as error:  # a full disk, say: the results can be written all the same
        raise TrainingError(f"it cannot be written ({fault_of(error)})") from error
    experiment.inputs.release()
    told = [{key: record[key] for key in record if key not in ONLY_TO_READ} for record in kept]
    return {"kept": told, "bytes": sum(record["bytes"] for record in kept), "not_kept": not_kept}


def choose(asked: tuple[str, ...] | None, entries: dict[str, dict]) -> tuple[list[str], list[dict]]:
    """Return the representations to keep, the best of the experiment first, and why others that were asked for are not.

    Args:
        asked: Their names; None: the better one of `BEST_OF`, and the first of `KERNELS`, as far as they were run.
        entries: `baseline_results` of results.json.
    """

    def worst_first(name: str) -> tuple[float, int]:
        return entries[name]["val_accuracy"]["mean"], -KEPT.index(name)

    if asked is None:
        best = max((name for name in BEST_OF if name in entries), key=worst_first, default=None)
        kernel = next((name for name in KERNELS if name in entries), None)
        asked = tuple(name for name in (best, kernel) if name in entries)
        reason = f"none of {', '.join((*BEST_OF, *KERNELS))} was run with all layers"
        missing = [] if asked else [{"representation": None, "reason": reason}]
    else:
        reason = "it was not run with all layers"
        missing = [{"representation": name, "reason": reason} for name in asked if name not in entries]
    return sorted((name for name in asked if name in entries), key=worst_first, reverse=True), missing


def _make(experiment: Experiment, name: str, limit: int) -> Parts:
    made = {"computed": _classifiers, "kernel": _kernel, "trained": _attention}[REPRESENTATIONS[name].made]
    return made(experiment, name, limit)


def _manifest(experiment: Experiment, results: dict, kept: list[dict], files: dict[str, str]) -> dict:
    """Return what manifest.json says, but for versions and digest."""
    collection, shapes = experiment.collection, experiment.inputs.modules.shapes
    read = {module.name for module in shapes}
    others = [module for module in (*collection.modules, *collection.left_out_layers) if module not in read]
    return {
        "results": identity_of(results),
        "dataset": {"name": collection.name, "num_samples": len(collection.files)},
        "classes": collection.classes,
        "modules": [{"module": module.name, "inputs": module.inputs, "outputs": module.outputs} for module in shapes],
        "passed_over": others,
        "kept": kept,
        "files": files,
    }


def _calibrated(
    experiment: Experiment, record: dict, tensors: dict[str, Made], expected: np.ndarray
) -> tuple[dict, dict[str, Made]]:
    """Return record and tensors with what turns scores into probabilities, and says what is unlike those of training.

    Raises:
        ValueError: A score is not finite, or a machine on landmarks is no better than one that always guesses.
    """
    rows, predicted = experiment.rows, _tried(experiment, record, tensors)
    if not (np.isfinite(predicted.scores).all() and np.isfinite(predicted.distance).all()):
        raise ValueError("its scores are not finite")
    norms = _norms(experiment)
    usual_norms, boundary = Norms.of(norms[rows["train"]]), len(rows["validation"])
    surprise = usual_norms.surprise(norms[experiment.planner.held_out])
    measures = np.column_stack([predicted.distance, surprise])
    measured, measured_on = calibration.rows_of_bound(boundary, len(measures) - boundary)
    usual = Usual.of(measures[measured], measured_on)
    unlike = usual.is_unlike(usual.scores(measures[boundary:]))
    validation, test = predicted.scores[:, :boundary], predicted.scores[:, boundary:]
    y = experiment.collection.y
    accuracy = float((predicted.classes[:, :boundary] == y[rows["validation"]]).mean())
    guessed = np.bincount(y[rows["validation"]]).max() / boundary  # by who always names one class
    if record["landmarks"] is not None and accuracy <= guessed:
        said = f"fitted to {record['landmarks']} LoRAs, whose factors fit, it is right on {100 * accuracy:.1f} %"
        raise ValueError(f"{said} of the validation LoRAs, and always naming one class on {100 * guessed:.1f} %")
    temperature = calibration.fit_temperature(validation, y[rows["validation"]])
    record |= {
        "validation_accuracy": accuracy,
        "validation": {"loras": boundary, "chance": float(guessed)},
        "runs": len(predicted.classes),
        "same": float((predicted.classes == expected)[:, boundary:].mean()),
        "temperature": temperature,
        "log_loss": calibration.log_loss(test, y[rows["test"]], temperature),
        "log_loss_before": calibration.log_loss(test, y[rows["test"]], 1.0),
        "flagged": float(unlike.mean()) if usual.bound is not None and measured_on == "validation" else None,
        "usual": asdict(usual),
    }
    tensors |= {"norm_mean": Made.of(usual_norms.mean), "norm_spread": Made.of(usual_norms.spread)}
    return record, tensors


def _norms(experiment: Experiment) -> np.ndarray:
    """Return the norms of the updates that are read, float32[N, P]."""
    return update_norms(experiment.extracted.shards(UPDATES))[:, experiment.inputs.pairs]


def _tried(experiment: Experiment, record: dict, tensors: dict[str, Made]) -> Predicted:
    """Predict the held-out LoRAs, validation rows first, from what is to be written, in blocks that memory holds."""
    held_out, name, norms = experiment.planner.held_out, record["representation"], _norms(experiment)
    computed, pairs = REPRESENTATIONS[name].made == "computed", experiment.inputs.pairs
    largest = max(math.prod(layer.shape) for layer in experiment.inputs.samples.packed_layout.layers)
    width = len(tensors["columns"].make()) if computed else max(*tensors["own"].shape, len(pairs) * attention.TOKEN)
    stage, parts, done = f"to be kept: {name} predicts", [], 0
    for block in np.array_split(held_out, min(len(held_out), -(-len(held_out) * width // NUMBERS_AT_ONCE))):
        factors = _reader(experiment, block)

        def read(module: int, part: np.ndarray | None, factors=factors, block=block, done=done) -> tuple[Tensor, ...]:
            experiment.progress(stage, done + len(block) * module // len(pairs), len(held_out))
            return factors(module, part)

        features = experiment.extracted.load(name, block)[:, pairs].reshape(len(block), -1) if computed else None
        rows = Rows(norms[block], features, read, max(1, FACTORS_AT_ONCE // largest))
        parts.append(experiment.engine.call(partial(predict, record, partial(_made, tensors), rows)))
        done += len(block)
        experiment.progress(stage, done, len(held_out))
    return joined(parts)


def _made(tensors: dict[str, Made], name: str) -> Tensor:
    return torch.as_tensor(tensors[name].make())


def _reader(experiment: Experiment, rows: np.ndarray) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return a reader of the factors of these LoRAs, or of those at given positions among them.

    It is asked for the position of a module among those of the experiment.
    """
    modules = experiment.inputs.modules
    read = experiment.extracted.factor_reader(modules.samples, modules.read_packed)

    def factors(module: int, part: np.ndarray | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(x.cpu() for x in read(modules.pairs[module], rows if part is None else rows[part]))

    return factors


def _kept_rows(experiment: Experiment, numbers: int) -> np.ndarray:
    """Return the train rows of so many numbers that distances are taken to, int64."""
    train = experiment.rows["train"]
    return train[calibration.evenly(experiment.collection.y[train], calibration.most_train_rows(numbers))]


# ----------------------------------------------------------------------------------------------------------------------
# Multilayer perceptrons
# ----------------------------------------------------------------------------------------------------------------------


def _classifiers(experiment: Experiment, name: str, _: int) -> Parts:
    plan = experiment.plan(name, [], "baseline")
    code, inputs = store.code_digest("experiment/models"), experiment.inputs
    keys = [{**key, "kind": "model", "code": code} for key in plan.keys]
    units = [
        inputs.description.units.unit(
            key, inputs.description, partial(_train, training=unit.compute.keywords["training"]), unit.stack, name
        )
        for key, unit in zip(keys, plan.todo, strict=True)
    ]
    parts = _done(experiment, keys, units)
    arrays = {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}
    expected = experiment.planner.load_scores(plan)["predicted"]
    _check_same(arrays["predicted"], expected)
    parameters = {kind: Made.of(array) for kind, array in arrays.items() if kind.startswith(PARAMETERS)}
    record = {"representation": name, "kind": "layers", "layers": len(parameters) // 2, "landmarks": None}
    tensors = experiment.engine.call(lambda: _preprocessing(experiment, name))
    return record | {"dtype": "float32"}, parameters | tensors, expected


def _train(inputs: Inputs, stack: list[int], training: Training) -> dict[str, np.ndarray]:
    """Train models of a stack as `plans` does, where all columns are live; return their parameters too."""
    settings, schedule = training.settings, training.settings.classifier
    source, run = (torch.tensor(column) for column in zip(*(training.models[i] for i in stack), strict=True))
    x, columns = _held(inputs.read(training.source))
    y = torch.from_numpy(training.y).to(inputs.device)
    how = {"hidden": schedule.hidden or HIDDEN, "dropout": DROPOUT, "batch_size": schedule.batch_size}
    network = ClassifierStack(
        x, y, inputs.split, Models(source, run), training.num_classes, seed=settings.seed, columns=columns, **how
    )
    trained = train(network, schedule)
    predicted = predictions(trained.state, x, y, inputs.split, source.to(x.device))["predicted"]
    parameters = {f"{PARAMETERS}{name}": value.cpu().numpy() for name, value in trained.state.items()}
    return {"predicted": predicted} | parameters


def _held(x: Tensor | Held) -> Held:
    return x if isinstance(x, Held) else Held(x)


def _preprocessing(experiment: Experiment, name: str) -> dict[str, Made]:
    """Return what standardises the features of a LoRA as those of the experiment, and train LoRAs to compare with.

    See `training.stacks.standardise`, whose blocks of rows these are: the mean is the same to the bit.
    """
    inputs = experiment.inputs
    columns = _held(inputs.read(inputs.source(name, inputs.weights.without([])))).columns
    x, rows = inputs.features(name).flatten(1), inputs.split.train
    length = rows_at_once(x.numel() // x.shape[-2], device=x.device)
    mean, scale = mean_and_scale(x[part, :] for part in rows.split(length))
    columns = torch.ones(x.shape[1], dtype=torch.bool, device=x.device) if columns is None else columns
    kept = torch.from_numpy(_kept_rows(experiment, int(columns.sum()))).to(x.device)
    near = scaled(x[kept], mean, scale)[:, columns].half()
    tensors = {"columns": columns, "mean": mean[0, columns], "scale": scale[0, columns], "train": near}
    return {kind: Made.of(tensor.cpu()) for kind, tensor in tensors.items()}


def _check_same(predicted: np.ndarray, expected: np.ndarray) -> None:
    """Refuse what was trained once more, and predicts otherwise than before; int[R, n] or int[n] each.

    Raises:
        TrainingError: It does. Units of a run may be of several kinds of machines, which round otherwise.
    """
    if others := int((predicted != expected).sum()):
        said = f"trained again it predicts {others} of {expected.size} held-out LoRAs otherwise"
        over = f", over {len(expected)} runs" if expected.ndim == 2 else ""
        raise TrainingError(f"{said}{over}: another kind of machine trained it before")


def _done(experiment: Experiment, keys: list[dict], units: list[Unit]) -> list[dict[str, np.ndarray]]:
    """Do units; return their arrays.

    Raises:
        TrainingError: One failed.
    """
    for done, reason in enumerate(experiment.engine.do(units), 1):
        experiment.progress(f"to be kept: {units[0].label}", done, len(units))
        if reason:
            raise TrainingError(reason)
    return [experiment.inputs.description.units.load(key) for key in keys]


# ----------------------------------------------------------------------------------------------------------------------
# Support vector machines
# ----------------------------------------------------------------------------------------------------------------------


def _kernel(experiment: Experiment, name: str, limit: int) -> Parts:
    """Return a support vector machine: the experiment's own, or one on fewer LoRAs where its factors are too large."""
    plan = experiment.plan(name, [], "baseline")
    expected = experiment.planner.load_scores(plan)["predicted"]
    arrays = _fitted(experiment, name, None)
    _check_same(arrays["predicted"], expected[0])
    for dtype in ("float16", "float32"):
        record, tensors = _machine(experiment, name, arrays, dtype)
        if _bytes_of(tensors) > limit:
            break
        if dtype == "float32" or (_tried(experiment, record, tensors).classes == expected).all():
            return record, tensors, expected
    one = _bytes_of(_machine(experiment, name, arrays, "float16")[1]) / len(arrays["columns"])
    landmarks = min(int(limit / one), len(experiment.rows["train"]))
    if landmarks < experiment.inputs.samples.num_classes:
        raise ValueError(f"the factors of one LoRA take {one / 2**20:.1f} MiB: too few of them fit {limit / 2**20:.0f}")
    record, tensors = _machine(experiment, name, _fitted(experiment, name, landmarks), "float16")
    return record | {"landmarks": landmarks}, tensors, expected


def _bytes_of(tensors: dict[str, Made]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _fitted(experiment: Experiment, name: str, landmarks: int | None) -> dict[str, np.ndarray]:
    """Return the arrays of `_fit_kernel`, a unit of its own."""
    inputs, settings = experiment.inputs, experiment.settings
    (baseline,) = experiment.plan(name, [], "baseline").keys
    key = {**baseline, "kind": "model", "landmarks": landmarks, "code": store.code_digest("experiment/models")}
    how = {"name": name, "y": inputs.samples.y, "num_classes": inputs.samples.num_classes, "landmarks": landmarks}
    threads = 1 if settings.device.type == "cpu" else count_cores()
    fit = partial(_fit_kernel, **how, threads=threads)
    unit = inputs.description.units.unit(key, inputs.description, fit, [0], name, in_main=True)
    (arrays,) = _done(experiment, [key], [unit])
    return {kind: array[0] for kind, array in arrays.items()}


def _fit_kernel(
    inputs: Inputs, _: list[int], name: str, y: np.ndarray, num_classes: int, landmarks: int | None, threads: int
) -> dict[str, np.ndarray]:
    """Fit a support vector machine as `training.kernels.classify` does; return what predicts from uncentred kernels.

    Returns:
        ``predicted`` int32[1, V + T]; ``columns`` int64[1, m], the LoRAs that new ones are compared with, and their
        kernel with themselves, ``own`` float64[1, m]; ``coefficients``, ``intercept`` and ``counts``, see
        `predictors.by_pairs`, or float64[1, D, m], float64[1, D] and none where ``columns`` are landmarks; ``weights``
        and ``sizes`` of `UpdateKernels`.

    Raises:
        ValueError: The kernel is nothing but rounding.
    """
    of = inputs.modules.kernels(name)
    if landmarks is not None:
        limits = Limits(kept=0, exact=0, landmarks=landmarks)
        of = inputs.modules.kernels_of(name, y[inputs.rows["train"]], limits)
    (kernel,) = of.sums(np.ones((1, of.num_modules), bool))
    x = of.normalised(kernel.copy())
    if not x[of.train].any():
        raise ValueError("it tells no LoRA from another: its kernel is nothing but rounding")
    model, _ = fit_svm(x, y, inputs.rows, of.precomputed, threads=threads)
    held_out = np.concatenate([inputs.rows["validation"], inputs.rows["test"]])
    arrays = {"predicted": model.predict(x[held_out]).astype(np.int32), "weights": of.weights, "sizes": of.sizes}
    arrays |= (_pairs_of if of.precomputed else _rest_of)(model, of, kernel, num_classes)
    return {kind: array[None] for kind, array in arrays.items()}


def _pairs_of(model: object, of: UpdateKernels, kernel: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Return the coefficients of the support vectors; the mean of a row cancels, as those of a pair sum to 0."""
    own = kernel[of.train]
    means = own.mean(0)
    size = (np.diag(own) - own.mean(1) - means + means.mean()).mean()  # of the centred kernel's diagonal
    sign = -1 if num_classes == 2 else 1  # scikit-learn turns that of two classes
    coefficients, counts, support = sign * model.dual_coef_ / size, model.n_support_.astype(np.int64), model.support_
    centre = decisions_of_pairs(means[None, support], coefficients, counts)
    intercept = sign * model.intercept_ - np.array([decision[0] for *_, decision in centre])
    return {
        "coefficients": coefficients,
        "intercept": intercept,
        "counts": counts,
        "columns": of.columns[support],
        "own": np.diag(own)[support],
    }


def _rest_of(model: object, of: UpdateKernels, kernel: np.ndarray, _: int) -> dict[str, np.ndarray]:
    """Return the coefficients of landmarks."""
    turn = landmark_map(kernel[of.columns])  # (m, k)
    features = kernel[of.train] @ turn
    mean = features.mean(0)
    divisor = math.sqrt(np.square(features - mean).sum(1).mean())
    weight = np.concatenate([machine.coef_ for machine in model.estimators_]) / divisor  # (D, k)
    intercept = np.array([float(np.squeeze(machine.intercept_)) for machine in model.estimators_])
    return {
        "coefficients": weight @ turn.T,
        "intercept": intercept - weight @ mean,
        "counts": np.zeros(0, np.int64),
        "columns": of.columns,
        "own": kernel[of.columns, np.arange(len(of.columns))],
    }


def _machine(
    experiment: Experiment, name: str, arrays: dict[str, np.ndarray], dtype: str
) -> tuple[dict, dict[str, Made]]:
    """Return record and tensors of a fitted support vector machine, whose factors are in a dtype."""
    kind = "pairs" if len(arrays["counts"]) else "rest"
    record = {"representation": name, "kind": kind, "landmarks": None, "dtype": dtype}
    tensors = {
        part: Made.of(arrays[part]) for part in ("coefficients", "intercept", "counts", "own", "weights", "sizes")
    }
    read = np.flatnonzero(arrays["weights"].any(1) & (arrays["sizes"] > 0)).tolist()
    return record, tensors | _factors(experiment, arrays["columns"], read, dtype)


def _factors(experiment: Experiment, rows: np.ndarray, modules: list[int], dtype: str) -> dict[str, Made]:
    """Return the factors of LoRAs in a dtype, of one module in memory at a time."""
    read = _reader(experiment, rows)

    @lru_cache(maxsize=1)
    def packed(module: int) -> tuple[Tensor, Tensor, Tensor]:
        return packed_factors(*read(module), getattr(torch, dtype))

    layers, tensors = experiment.inputs.samples.packed_layout.layers, {}
    for module in modules:
        pair = experiment.inputs.modules.pairs[module]
        for part, name in enumerate(("down", "up")):
            shape = (len(rows), *layers[2 * pair + part].shape)
            tensors[f"{name}.{module}"] = Made(dtype, shape, lambda m=module, k=part: packed(m)[k].numpy())
        tensors[f"size.{module}"] = Made("float64", (len(rows),), lambda m=module: packed(m)[2].numpy())
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# Attention over modules
# ----------------------------------------------------------------------------------------------------------------------


def _attention(experiment: Experiment, name: str, limit: int) -> Parts:
    """Return the networks, whose parameters the phases have kept, and what makes tokens of new updates."""
    plan, of = experiment.plan(name, [], "baseline"), experiment.inputs.modules.unlabelled
    arrays = experiment.planner.load_scores(plan)
    factors = _factors(experiment, of.columns, list(range(of.num_modules)), "float32")
    if (size := _bytes_of(factors)) > limit:
        few = f"more than {limit / 2**20:.0f}"
        raise ValueError(f"the factors of {len(of.columns)} LoRAs take {size / 2**20:.0f} MiB, {few}")
    parameters = {f"{PARAMETERS}{kind}": Made.of(array) for kind, array in attention.parameters_of(arrays).items()}
    tensors = experiment.engine.call(lambda: _components(experiment, of))
    x = experiment.inputs.read(experiment.inputs.source(name, experiment.inputs.weights.without([])))[0]
    tensors["train"] = Made.of(x[torch.from_numpy(_kept_rows(experiment, x.shape[1])).to(x.device)].half().cpu())
    record = {"representation": name, "kind": "attention", "landmarks": None, "dtype": "float32"}
    return record, parameters | tensors | factors, arrays["predicted"]


def _components(experiment: Experiment, of: UpdateKernels) -> dict[str, Made]:
    """Return the maps from kernels to standardised tokens; see `training.attention.module_tokens`."""
    norms, tensors = _norms(experiment).astype(np.float64), {}
    for module in range(of.num_modules):
        kernel, norm = of.module(module), norms[:, module]
        train, fitted = of.train[norm[of.train] > 0], np.flatnonzero(norm[of.columns] > 0)
        if not (len(train) and len(fitted)):
            of.sizes[module] = 0
            continue
        centerer, vectors = attention.components(kernel[np.ix_(of.columns[fitted], fitted)].astype(np.float64))
        turn = np.zeros((len(of.columns), attention.COORDINATES))
        turn[fitted, : vectors.shape[1]] = vectors
        shift = -(centerer.K_fit_rows_ @ turn[fitted])
        token = np.concatenate([kernel[train] @ turn + shift, np.log(norm[train])[:, None]], axis=1)
        mean, scale = mean_and_scale([torch.from_numpy(token)])
        parts = {"map": turn, "shift": shift, "mean": mean, "scale": scale}
        tensors |= {f"{kind}.{module}": Made.of(part) for kind, part in parts.items()}
    return tensors | {
        "weights": Made.of(of.weights),
        "sizes": Made.of(of.sizes),
        "own": Made.of(np.ones(len(of.columns))),
    }
