"""The check of a collection by its weights: copies, epochs, untrained LoRAs and outliers, before anything is trained.

It looks at what the pass over the weights has left, and reads again only files that look like copies of others.

Shape letters: N LoRAs, L layers, P modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from data import Collection, CollectionError, check_classes, keep_together, noted, select_layers
from experiment import store
from experiment.arrays import DIGESTS
from experiment.extraction import layer_sizes, update_norms
from experiment.phases import split_collection
from loras import copies, lora_files
from loras.notices import Notice
from loras.weight_checks import weight_notices
from representations import RANKING, UPDATES


def check_collection(
    collection: Collection,
    shards_of: Callable[[str], store.Shards],
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
        shards_of: Returns the array of a name, see `extraction.CHECKED`.
        seed: Of the split.
        layers: Pattern of --layers.
        keep_twins: Whether copies and epochs stay where the split puts them.
        strict: Whether notices are faults.
        skip_bad: Whether files with faults can be left out.

    Returns:
        ``notices``, and ``groups`` of rows that are to be on one side of the split; or why the collection is refused:
        ``findings`` of files that can be left out, or ``faults``.
    """
    paths, labels = [file.path for file in collection.files], [file.label for file in collection.files]
    sizes, norms = layer_sizes(shards_of(RANKING)), update_norms(shards_of(UPDATES))
    # Of factors that are not zero the norm is not either, though the feature, in float32, may be.
    norms[(norms == 0) & (sizes.reshape(*norms.shape, 2) > 0).all(2)] = np.finfo(np.float32).smallest_subnormal
    twins = _find_copies(collection, shards_of(DIGESTS), sizes)
    if findings := copies.contradictions(paths, labels, twins):
        return {"findings": [(*finding.files, finding.reason, True) for finding in findings]}
    epochs = copies.find_epochs(paths, [copies.session_id(file.header.fields) for file in collection.files], twins)
    if keep_twins:  # the checkpoints of a LoRA stay together all the same
        lora_of = collection.choice.lora_of
        epochs = [rows for rows in epochs if len({lora_of.get(paths[row], row) for row in rows}) > 1]
    notices = weight_notices(paths, labels, collection.modules, norms, select_layers(collection, layers))
    notices += copies.twin_notices(paths, labels, twins, epochs, keep_twins, strict)
    groups = [] if keep_twins else copies.joined(len(paths), [*twins, *epochs])
    try:
        left = noted(collection, notices, strict, skip_bad)
        if left.skipped != collection.skipped:
            return {"findings": [(*entry, True) for entry in left.skipped[len(collection.skipped) :]]}
        if groups:
            grouped = keep_together(collection, groups)
            check_classes(grouped)
            split_collection(grouped, seed)
    except CollectionError as error:
        return {"faults": error.findings}
    return {"notices": [asdict(notice) for notice in notices], "groups": groups}


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
