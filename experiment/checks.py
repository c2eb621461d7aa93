"""Checks before anything is trained, of the experiment and of its pre-flight: the task, what can run, the weights.

The check of the weights finds copies, epochs, untrained LoRAs and outliers. That of the experiment looks at what its
pass over the weights has left, and reads again only files that look like copies of others.

Shape letters: N LoRAs, L layers, P modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data import Collection, CollectionError, check_classes, keep_together, noted, select_layers
from experiment import estimates, store
from experiment.arrays import DIGESTS, FLAT
from experiment.columns import HELD_OUT_BY, check_columns
from experiment.estimates import Estimates
from experiment.extraction import layer_sizes, update_norms
from experiment.modules import left_by_default
from experiment.phases import split_collection
from experiment.settings import Settings, UsageError
from loras import copies, lora_files
from loras.notices import Notice
from loras.recipe import header_columns
from loras.weight_checks import weight_notices
from representations import RANKING, REPRESENTATIONS, UPDATES


def check_task(collection: Collection, settings: Settings) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the rows of each part of the split, and the layers that --layers keeps, bool[L].

    Raises:
        CollectionError: The labels or groups make no classification task, or --layers names no layer.
        UsageError: More layers are to be removed than there are, or a column is not there.
    """
    check_classes(collection)
    check_columns(collection, settings)
    return split_collection(collection, settings.seed), chosen_layers(collection, settings)


def chosen_layers(collection: Collection, settings: Settings) -> np.ndarray:
    """Return the layers that --layers keeps, bool[L].

    Raises:
        CollectionError: It names no layer.
        UsageError: More layers are to be removed than there are.
    """
    selected = select_layers(collection, settings.layers)
    if settings.top_k >= selected.sum():
        matching = f" that match {settings.layers}" if settings.layers else ""
        raise UsageError(f"--top-k {settings.top_k}: these LoRAs have {selected.sum()} layers{matching}. Give fewer.")
    return selected


@dataclass(frozen=True)
class Choice:
    """The representations that can run; why others cannot, or are left out unless asked for by name; what each costs.

    ``not_run`` and ``left_out`` map names to reasons.
    """

    chosen: list[str]
    not_run: dict[str, str]
    left_out: dict[str, str]
    costs: Estimates


def choose_representations(
    settings: Settings, collection: Collection, selected: np.ndarray, rows: dict[str, np.ndarray], cache: Path
) -> Choice:
    """Choose the representations that fit a collection, the memory and the cache folder.

    Args:
        settings: What is asked for.
        collection: The LoRAs.
        selected: The layers that the experiment is about, bool[L].
        rows: Row indices of ``train``, ``validation`` and ``test``.
        cache: The folder for packed weights.
    """
    flat = [name for name in settings.representations if REPRESENTATIONS[name].made in FLAT]
    not_run = {name: collection.mixed_ranks for name in flat if collection.mixed_ranks}
    left_out = left_by_default(collection, selected, settings.device) if settings.all_representations else {}
    chosen = [name for name in settings.representations if name not in not_run | left_out]
    costs = Estimates(settings, collection, selected, rows)
    not_run |= estimates.unfit(costs, chosen)
    not_run |= estimates.without_room(settings, collection, [name for name in chosen if name not in not_run], cache)
    return Choice([name for name in chosen if name not in not_run], not_run, left_out, costs)


def held_out_beside(
    settings: Settings, collection: Collection, chosen: list[str], costs: Estimates, cache: Path
) -> list[str]:
    """Return the representations that --holdout trains beside those chosen, as far as memory and cache have room."""
    names = [name for name in HELD_OUT_BY if settings.holdout and name not in chosen]
    unfit = estimates.unfit(costs, names)
    names = [name for name in names if name not in unfit]
    without_room = estimates.without_room(settings, collection, names, cache) if names else {}
    return [name for name in names if name not in without_room]


def check_collection(collection: Collection, shards_of: Callable[[str], store.Shards], **flags: object) -> dict:
    """Return what the weights of a collection show, as a JSON object; see `check_by_weights`.

    Args:
        collection: The LoRAs.
        shards_of: Returns the array of a name, see `extraction.CHECKED`.
        flags: Of `check_by_weights`.
    """
    sizes, norms = layer_sizes(shards_of(RANKING)), update_norms(shards_of(UPDATES))
    # Of factors that are not zero the norm is not either, though the feature, in float32, may be.
    norms[(norms == 0) & (sizes.reshape(*norms.shape, 2) > 0).all(2)] = np.finfo(np.float32).smallest_subnormal
    return check_by_weights(collection, norms, _find_copies(collection, shards_of(DIGESTS), sizes), **flags)


def check_by_weights(
    collection: Collection,
    norms: np.ndarray,
    twins: list[list[int]],
    *,
    seed: int,
    layers: str | None = None,
    keep_twins: bool = False,
    strict: bool = False,
    skip_bad: bool = False,
) -> dict:
    """Return what the weights of a collection show, as a JSON object.

    Args:
        collection: The LoRAs.
        norms: Of the update of each module, float[N, P].
        twins: Groups of rows that are copies of one another.
        seed: Of the split.
        layers: Pattern of --layers.
        keep_twins: Whether copies and epochs stay where the split puts them.
        strict: Whether notices are faults.
        skip_bad: Whether files with faults can be left out.

    Returns:
        ``notices``, and ``groups`` of rows that are to be on one side of the split; or why the collection is refused:
        ``findings`` of files that can be left out, or ``faults``, beside which ``notices`` say where groups come from.
    """
    paths, labels = [file.path for file in collection.files], [file.label for file in collection.files]
    if findings := copies.contradictions(paths, labels, twins):
        return {"findings": [(*finding.files, finding.reason, True) for finding in findings]}
    epochs = copies.find_epochs(paths, [copies.session_id(file.header.fields) for file in collection.files], twins)
    lora_of = collection.choice.lora_of  # checkpoints of a LoRA that were asked for stay together in any case
    epochs = [rows for rows in epochs if len({lora_of.get(paths[row], row) for row in rows}) > 1]
    notices = weight_notices(paths, labels, collection.modules, norms, select_layers(collection, layers))
    notices += copies.twin_notices(paths, labels, twins, epochs, keep_twins, strict)
    groups = [] if keep_twins else copies.joined(len(paths), [*twins, *epochs])
    records = [asdict(notice) for notice in notices]
    try:
        left = noted(collection, notices, strict, skip_bad)
        if left.skipped != collection.skipped:
            return {"findings": [(*entry, True) for entry in left.skipped[len(collection.skipped) :]]}
        if groups:
            grouped = keep_together(collection, groups)
            check_classes(grouped)
            split_collection(grouped, seed)
    except CollectionError as error:
        return {"faults": error.findings, "notices": [] if strict else records}
    return {"notices": records, "groups": groups}


def apply(collection: Collection, checked: dict) -> Collection:
    """Return a collection with the notices and groups that its check has found."""
    notices = [
        Notice(**notice | {"files": tuple(notice["files"]), "groups": tuple(map(tuple, notice["groups"]))})
        for notice in checked["notices"]
    ]
    return keep_together(noted(collection, notices, strict=False, skip_bad=False), checked["groups"])


def _find_copies(collection: Collection, digests: store.Shards, sizes: np.ndarray) -> list[list[int]]:
    """Return the groups of rows of files that hold the same weights.

    Raises:
        CollectionError: A file that looks like another's copy cannot be read again.
    """
    files, root = collection.files, collection.root

    def read(row: int) -> np.ndarray:
        path = root / files[row].path
        try:
            return lora_files.read_weights(path, files[row].header).weights
        except (lora_files.LoraFileError, OSError) as error:
            raise CollectionError([f"{path}: {error}"]) from error

    digest_of_row = [digest.tobytes() for digest in digests.whole()]
    return copies.find_copies(digest_of_row, sizes, [file.layout for file in files], read)


# ----------------------------------------------------------------------------------------------------------------------
# Columns
# ----------------------------------------------------------------------------------------------------------------------


def group_columns(collection: Collection) -> dict[str, dict[str, str]]:
    """Return columns and header fields that look like groups which no split keeps together, with each file's value.

    Each file has a value, and most share it with another; either the column is called a group, or all LoRAs of one
    value are of one class while classes have several values, as of the artists or sets of images of a concept.
    """
    if collection.group_column is not None:
        return {}
    columns = {}
    for name, values_by_file in (collection.columns | header_columns(collection.files)).items():
        if name == collection.label_column or len(values_by_file) < len(collection.files):
            continue
        values, group = np.unique([values_by_file[file.path] for file in collection.files], return_inverse=True)
        pairs = len(np.unique(np.stack([group, collection.y]), axis=1).T)
        nested = pairs == len(values) > len(collection.classes)
        if 2 * len(values) <= len(group) and len(values) > 1 and (nested or "group" in name.lower()):
            columns[name] = values_by_file
    return columns
