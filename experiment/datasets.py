"""The folder that --dataset means: one of the user's, or the built-in digits, which are trained in its place."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from experiment.flags import BUILT_IN_SIZES, BUILT_IN_STEPS
from experiment.settings import UsageError
from loras import building, digits_activations, digits_zoo
from loras.building import Progress
from loras.command_line import suggestion
from loras.flags import NAMED_DATASETS
from loras.names import plain

RECORDED = "inputs of the base model's modules, for --activations"
BUILT_IN = Path("data") / "built-in-digits"  # holds the collections that are trained here


def locate(name: str, data_dir: Path | None, progress: Progress, train: bool = True) -> tuple[str, Path]:
    """Return name and folder of a collection; train the built-in one if it is to be used and not there.

    Args:
        name: What --dataset says: a folder, or one of ``NAMED_DATASETS``.
        data_dir: The parent of folders of these names; None: data, where the digits may take their place.
        progress: Shows the training.
        train: Whether the digits are trained; else they are refused where they are not there.

    Raises:
        UsageError: There is no such collection, and none is trained in its place.
    """
    if name not in NAMED_DATASETS:
        shown = f"--dataset {plain(name)}"
        if not os.path.isdir(name):
            fault = "a file, not a folder" if os.path.lexists(name) else "no such folder"
            near = suggestion(name, NAMED_DATASETS)
            raise UsageError(f"{shown}: {fault}.{near} Give a folder of LoRAs, or {', '.join(NAMED_DATASETS)}.")
        begun = digits_zoo.is_built_here(Path(name)) or os.path.lexists(Path(name) / building.IMPORT_NAME)
        if name.rstrip("/").endswith(".partial") and begun:
            raise UsageError(f"{shown}: a half-built collection. Finish it with the command that began it.")
        return name_of(name), Path(name)
    folder = (data_dir or Path("data")) / name
    if folder.is_dir():
        return name, folder
    mend = f"`python data.py import SOURCE {shlex.quote(str(folder))}` puts a published collection there"
    if data_dir is not None:
        raise UsageError(f"{folder}: no such folder. {mend}; or leave out --data-dir for the digits.")
    if name not in BUILT_IN_SIZES or os.path.lexists(folder):  # a link to nowhere is no reason to train digits
        raise UsageError(f"{folder}: no such folder. {mend}; or name its parent with --data-dir.")
    built_in, count, steps = BUILT_IN / name, BUILT_IN_SIZES[name], BUILT_IN_STEPS.get(name, ())
    if not built_in.is_dir():
        seconds, size = digits_zoo.estimate(count, steps)
        cost = f"about {seconds / 60:.1f} minutes on a CPU core, {size / 2**20:.0f} MiB on disk"
        if not train:
            trains = f"`python ablation_experiment.py --dataset={name} --quick` trains the built-in digits ({cost})"
            raise UsageError(f"{folder}: no such folder, and no {built_in}. {trains} and runs on them; {mend}.")
        loras = f"{count} LoRAs" + (f" at {len(steps)} steps each" if steps else "")
        print(
            f"There is no {folder}: training the built-in digits, {loras}, into {built_in}, once ({cost})",
            flush=True,
        )
    try:
        digits_zoo.build(built_in, count, progress=progress, steps=steps)  # returns at once where it is whole
    except FileExistsError as error:
        raise UsageError(str(error)) from error
    _record_activations(progress)
    return name, built_in


def _record_activations(progress: Progress) -> None:
    """Write the inputs of the base model's modules beside it, once; a folder that cannot be written to is named."""
    path = BUILT_IN / digits_activations.NAME
    try:
        written = digits_activations.write_beside(BUILT_IN)
    except OSError as error:
        print(f"{path}: inputs of modules cannot be written ({error.strerror or error})", file=progress.log, flush=True)
    else:
        if written:
            print(f"{path}: {RECORDED}", file=progress.log, flush=True)


def name_of(dataset: str) -> str:
    """Return the name of what --dataset says, by which its folder of results is called."""
    return dataset if dataset in NAMED_DATASETS else Path(os.path.abspath(dataset)).name


def results_folder(output_dir: Path, dataset: str) -> Path:
    """Return the folder of the results on what --dataset says."""
    return output_dir / f"ablation_{name_of(dataset)}"


def is_built_in(folder: Path) -> bool:
    """Return whether a folder is one that `locate` builds; a recipe in another folder is a claim of its owner."""
    places = {os.path.abspath(BUILT_IN / name) for name in BUILT_IN_SIZES}
    return os.path.abspath(folder) in places and digits_zoo.is_built_here(folder)
