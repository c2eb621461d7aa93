"""Probes: other columns, predicted from features that are there already by linear classifiers.

A probe is a support vector machine on the linear kernel of a representation's standardised features, of all layers,
with C chosen by validation. The split is that of the experiment, on whose train LoRAs features were fitted; LoRAs
without a value of the column take no part. Nothing that is learned is fitted again: of labels autoencoders and `pca`
know nothing, and of `update_views` the views are summed without the weights that labels give them.

Shape letters: N LoRAs, F features, K columns, n train LoRAs of a probe, V and T validation and test LoRAs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import torch

from analysis import probes as telling
from analysis.evidence import choose_rows
from experiment import store
from experiment.columns import columns_of
from experiment.inputs import Inputs, StoredRows
from experiment.networks import NETWORKS
from experiment.units import Unit, reason_of
from loras.label_bins import bins_of, in_order, number_of
from representations import REPRESENTATIONS
from training.exact import exact_dtype
from training.kernels import NOTHING, classify
from training.stacks import standardise

if TYPE_CHECKING:
    from experiment.phases import Experiment

MOST_VALUES = 50  # of a column that is probed
MOST_COLUMNS = 100  # that are probed without being named: p are times their number
MOST_LISTED = 20  # columns that are left out for one reason
MOST_TRAIN = 2_000  # LoRAs that a probe is trained on
NAMED_BINS = 4  # of a named column of more numbers, unless --label-bins says how many
LEAST_EACH = 3  # LoRAs of each value on average, as ids have fewer
LEAST_TEST = 10  # test LoRAs with a value, below which nothing could be seen
NUMBERS_AT_ONCE = 2**24  # of features worked on at a time: 64 MiB in float32
LABEL = "the label, or divided as that"


def probe_columns(experiment: Experiment, names: Sequence[str]) -> dict | None:
    """Return ``analysis.also`` of results.json; None where it is not asked for.

    Args:
        experiment: All phases done.
        names: Representations that were run.
    """
    if experiment.settings.also == ():
        return None
    columns, left_out = choose_columns(experiment)
    not_probed = {name: reason for name in names if (reason := why_not(name))}
    found: dict[str, dict[str, np.ndarray]] = {}
    if columns:
        units = plan_probes(experiment, [name for name in names if name not in not_probed], columns)
        progress, outcomes = experiment.progress, experiment.engine.do([unit for _, unit in units.values()])
        for done, (name, reason) in enumerate(zip(units, outcomes, strict=True), 1):
            progress("probes", done, len(units))
            if reason:
                not_probed[name] = reason
                continue
            arrays = experiment.inputs.description.units.load(units[name][0], ["predicted", "failure"])
            if all(arrays["failure"].tolist()):  # of every column
                not_probed[name] = str(arrays["failure"][0])
            else:
                found[name] = arrays
    told = [_probed(experiment, column, i, found) for i, column in enumerate(columns)]
    left_out |= {column.name: "no representation could be probed" for column in told if not column.predicted}
    told = [column for column in told if column.predicted]
    keep_predictions(experiment, told)
    seed, progress = experiment.settings.seed, partial(experiment.progress, "tests of other columns")
    return {
        "columns": telling.tell(told, seed, progress=progress),
        **listed(left_out),
        "not_probed": [{"representation": name, "reason": reason} for name, reason in not_probed.items()],
        "most_train": MOST_TRAIN,
    }


def listed(left_out: dict[str, str]) -> dict[str, list[dict]]:
    """Return ``left_out``, the first twenty columns of each reason, and ``left_out_more``, the number of its others."""
    counts, first = Counter(left_out.values()), []
    seen: Counter[str] = Counter()
    for name, reason in left_out.items():
        if seen[reason] < MOST_LISTED:
            first.append({"column": name, "reason": reason})
        seen[reason] += 1
    more = {reason: count - MOST_LISTED for reason, count in counts.items() if count > MOST_LISTED}
    return {
        "left_out": first,
        "left_out_more": [{"reason": reason, "columns": count} for reason, count in more.items()],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Columns
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Column:
    """A column that is probed.

    Attributes:
        name: Its name.
        values: Its values, or bins.
        y: Value of each LoRA, int16[N]; -1 for none.
        train: The LoRAs that probes are trained on, int32[n].
        bins: Number of quantile bins that its numbers were put in; None: they were not.
    """

    name: str
    values: tuple[str, ...]
    y: np.ndarray
    train: np.ndarray
    bins: int | None


def choose_columns(experiment: Experiment) -> tuple[list[Column], dict[str, str]]:
    """Return the columns that are probed, and why others are not, by name.

    Of columns that divide the LoRAs alike the first is probed. Of more than a hundred that are not named those of the
    table and the metadata.json files go first, then those of the fewest values, then the first.
    """
    collection, asked = experiment.collection, experiment.settings.also
    columns, chosen, left_out = columns_of(collection), [], {}
    why_of = {_partition(collection.y): LABEL}  # a column that divides the LoRAs so is not probed again
    for name in columns if asked is None else asked:
        column = LABEL if name == collection.label_column else _column(experiment, name, columns[name])
        if isinstance(column, str):
            left_out[name] = column
        elif (divided := _partition(column.y)) in why_of:
            left_out[name] = why_of[divided]
        else:
            why_of[divided] = f"divided as {name}"
            chosen.append(column)
    if asked is None and len(chosen) > MOST_COLUMNS:
        first = sorted(chosen, key=lambda column: (column.name not in collection.columns, len(column.values)))
        beyond = {*first[MOST_COLUMNS:]}
        words = f"only {MOST_COLUMNS} of {len(chosen):,} columns are probed unless they are named"
        left_out |= {column.name: words for column in chosen if column in beyond}
        chosen = [column for column in chosen if column not in beyond]
    return chosen, left_out


def _column(experiment: Experiment, name: str, value_of: dict[str, str]) -> Column | str:
    """Return a column as it is probed, or why it is not, given the value of each file that has one, by path."""
    files, rows, settings = experiment.collection.files, experiment.rows, experiment.settings
    value_of = {file.path: value_of[file.path] for file in files if file.path in value_of}
    value_of, bins = _binned(value_of, settings.label_bins or (NAMED_BINS if name in (settings.also or ()) else None))
    values = in_order(value_of.values())
    if len(values) < 2:
        return "one value"
    if len(values) > MOST_VALUES:
        return f"{len(values):,} values, more than {MOST_VALUES}"
    if LEAST_EACH * len(values) > len(value_of):
        return f"{len(values)} values among {len(value_of)} LoRAs, fewer than {LEAST_EACH} LoRAs of each"
    position = {value: i for i, value in enumerate(values)}
    y = np.array([position.get(value_of.get(file.path), -1) for file in files], np.int16)
    train, validation, test = (part[y[part] >= 0] for part in (rows["train"], rows["validation"], rows["test"]))
    if len(test) < LEAST_TEST or not len(validation):
        part, count = ("test", len(test)) if len(test) < LEAST_TEST else ("validation", 0)
        return f"of {part} LoRAs {count or 'none'} {'has' if count < 2 else 'have'} a value, which shows nothing"
    if len(np.intersect1d(y[train], y[test])) < 2:
        return "fewer than two of its values are among train LoRAs and among test LoRAs"
    chosen = train[choose_rows(y[train], MOST_TRAIN, settings.seed, f"probe {name}")]
    return Column(name, tuple(values), y, chosen.astype(np.int32), bins)


def _binned(value_of: dict[str, str], bins: int | None) -> tuple[dict[str, str], int | None]:
    """Return values in bins, and their number, where these are asked for and all are numbers, too many to be values."""
    distinct = set(value_of.values())
    if bins is None or not bins <= MOST_VALUES < len(distinct) or any(number_of(text) is None for text in distinct):
        return value_of, None
    if len({number_of(text) for text in distinct}) < bins:  # some are written in several ways
        return value_of, None
    return dict(zip(value_of, bins_of(list(value_of.values()), bins), strict=True)), bins


def _partition(y: np.ndarray) -> bytes:
    """Return what columns that divide the LoRAs alike have in common, whatever their values are called."""
    _, first, group = np.unique(y, return_index=True, return_inverse=True)
    return np.where(y < 0, -1, first[group]).astype(np.int64).tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# Probes
# ----------------------------------------------------------------------------------------------------------------------


def why_not(name: str) -> str:
    """Return why a representation is not probed; empty where it is."""
    if REPRESENTATIONS[name].made != "trained" or NETWORKS[name].reads == "tokens":
        return ""
    return "reads the features of update_sketch" if name == "update_frozen" else "learned from the concept"


def plan_probes(
    experiment: Experiment, names: Sequence[str], columns: Sequence[Column]
) -> dict[str, tuple[dict, Unit]]:
    """Return key and unit of the probes of each representation, one of all columns, which share what is read.

    The kernels of all modules lie in the memory of the main process, which therefore does that unit.
    """
    inputs = experiment.inputs
    everything, description = inputs.weights.without([]), inputs.description
    common = {"kind": "probe", "code": store.code_digest("experiment/probes"), "sklearn": version("scikit-learn")}
    common |= {"columns": [store.array_digest(column.y, column.train) for column in columns]}
    targets, models = [(column.y, column.train) for column in columns], list(range(len(columns)))
    planned = {}
    for name in names:
        key = common | {"inputs": asdict(inputs.source(name, everything)), "models": models} | inputs.depends_on(name)
        compute, in_main = partial(probe, name=name, targets=targets), name == "update_kernel"
        planned[name] = key, description.units.unit(key, description, compute, models, f"probes of {name}", in_main)
    return planned


def probe(
    inputs: Inputs, stack: list[int], name: str, targets: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Train the probes of a representation.

    Args:
        inputs: Of the experiment.
        stack: Positions of the columns among the targets.
        name: Of the representation.
        targets: Of each column, the value of each LoRA int16[N], -1 for none, and the LoRAs to train on int32[n].

    Returns:
        ``predicted`` int16[K, V + T], -1 for LoRAs without a value; the chosen ``c``, float64[K]; and ``failure``,
        str[K], the reason why the probe of a column failed, empty where it did not.
    """
    held_out = np.concatenate([inputs.rows["validation"], inputs.rows["test"]])
    predicted, c = np.full((len(stack), len(held_out)), -1, np.int16), np.zeros(len(stack))
    failures = [""] * len(stack)
    by_rows: dict[bytes, list[int]] = defaultdict(list)
    for i, position in enumerate(stack):
        by_rows[targets[position][1].tobytes()].append(i)
    for members in by_rows.values():
        train = targets[stack[members[0]]][1]
        kernel = linear_kernel(inputs, name, train, held_out)
        for i in members:
            y = targets[stack[i]][0]
            try:
                predicted[i], c[i] = _classified(kernel, y[train], y[held_out], len(inputs.rows["validation"]))
            except (FloatingPointError, ValueError) as error:  # of this column: the others are predicted all the same
                failures[i] = reason_of(error)
    return {"predicted": predicted, "c": c, "failure": np.array(failures)}


def _classified(
    kernel: np.ndarray, y_train: np.ndarray, y_held_out: np.ndarray, validation: int
) -> tuple[np.ndarray, float]:
    """Return predicted values of the held-out LoRAs, the first of which are ``validation`` ones, and the chosen C."""
    count, known = len(y_train), np.flatnonzero(y_held_out >= 0)
    rows = {"train": np.arange(count), "validation": count + known[known < validation]}
    rows["test"] = count + known[known >= validation]
    y = np.concatenate([y_train, y_held_out]).astype(np.int64)
    found, predicted = classify(kernel, y, rows, int(y.max()) + 1), np.full(len(y_held_out), -1, np.int16)
    predicted[known] = found["predicted"][0]
    return predicted, float(found["c"][0])


def linear_kernel(inputs: Inputs, name: str, train: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return inner products of train LoRAs, then others, with the train LoRAs, over the mean of the train diagonal.

    float[n + V + T, n]. Features are summed over in blocks of columns, so that weights of any width fit the memory.
    """
    rows, modules = np.concatenate([train, others]), inputs.modules
    blocks: Iterator[torch.Tensor] | None = None
    if REPRESENTATIONS[name].made == "kernel":
        kernels = modules.unlabelled if name == "update_views" else modules.kernels(name)
        (x,) = kernels.inputs(inputs.live(name, inputs.weights.without([]))[None])
        if kernels.precomputed:
            place = {row: i for i, row in enumerate(kernels.columns.tolist())}
            kernel = x[rows][:, [place[row] for row in train.tolist()]]
        else:
            blocks = iter([torch.from_numpy(x)])
    else:
        blocks = features(inputs, name)
    if blocks is not None:
        kernel = _products(blocks, rows, len(train), inputs.device)
    size = np.trace(kernel[: len(train)]) / len(train)
    if size <= NOTHING:
        return np.zeros_like(kernel)
    kernel /= size
    return kernel


def _products(blocks: Iterator[torch.Tensor], rows: np.ndarray, count: int, device: torch.device) -> np.ndarray:
    """Return inner products of rows int[m] with the first ``count`` of them, given blocks of columns float[N, w]."""
    products, index = torch.zeros(len(rows), count, dtype=exact_dtype(device), device=device), torch.from_numpy(rows)
    for block in blocks:
        x = block.index_select(0, index.long().to(block.device)).to(products)
        products.addmm_(x, x[:count].mT)
    return products.cpu().numpy()


def features(inputs: Inputs, name: str) -> Iterator[torch.Tensor]:
    """Yield the features of all layers, standardised on the train rows, in blocks of columns float32[N, w]."""
    everything, width = inputs.weights.without([]), max(1, NUMBERS_AT_ONCE // inputs.samples.count)
    if REPRESENTATIONS[name].made == "flat":
        weights = StoredRows(inputs.raw, np.arange(inputs.samples.count), inputs.weights.spans(everything))
        for block in weights.split(width, dim=1):
            yield standardise(block, inputs.split.train)
        return
    if name in NETWORKS:
        x = inputs.modules.read(NETWORKS[name].reads)
    else:
        x = inputs.read(inputs.source(name, everything)).x  # constant columns, which are left out, are 0
    yield from x[0].split(width, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# What is analysed and kept
# ----------------------------------------------------------------------------------------------------------------------


def _probed(
    experiment: Experiment, column: Column, position: int, found: dict[str, dict[str, np.ndarray]]
) -> telling.Probed:
    """Return what is known of the column at a position, less the LoRAs without a value, given what `probe` found."""
    collection, y = experiment.collection, column.y.astype(np.int64)
    rows = {part: of_part[y[of_part] >= 0] for part, of_part in experiment.rows.items()}
    failures = {name: str(arrays["failure"][position]) for name, arrays in found.items()}
    known = y[experiment.planner.held_out] >= 0
    return telling.Probed(
        name=column.name,
        values=column.values,
        y=y,
        concept=collection.y,
        rows=rows,
        groups=np.arange(len(y)) if collection.groups is None else collection.groups,
        trained_on=len(column.train),
        bins=column.bins,
        predicted={name: found[name]["predicted"][position, known] for name in found if not failures[name]},
        failed={name: reason for name, reason in failures.items() if reason},
    )


def keep_predictions(experiment: Experiment, columns: Sequence[telling.Probed]) -> None:
    """Keep the predictions of each column for predictions.npz, with its rows and values."""
    for i, column in enumerate(columns):
        rows = np.concatenate([column.rows["validation"], column.rows["test"]])
        kept = {"rows": rows, "y": column.y[rows]}
        kept |= {f"{name}/predicted": of_name for name, of_name in column.predicted.items()}
        experiment.predictions.further |= {f"also/{i}/{kind}": array for kind, array in kept.items()}
