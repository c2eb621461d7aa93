"""Settings: what the experiment does, resolved from the flags and checked before anything is read."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import joblib
import torch

from experiment.store import PREVIOUS
from loras import building, digits_activations, label_tables
from loras.command_line import suggestion
from loras.headers import read_header
from loras.keys import LoraFileError
from loras.memory import host_memory
from loras.names import plain
from representations import OF_WEIGHTS, REPRESENTATIONS
from training import attention, projections
from training.classifier import DROPOUT, HIDDEN
from training.stacks import Schedule

# Parameters in a stack: of 4 classifiers of one layer for a CPU, near whose caches they stay; of 130 for a GPU, so that
# its threads, and several GPUs, have a share of the ranking.
STACK_PARAMETERS = {"cpu": 2_200_000, "cuda": 70_000_000}
# Of 4 to 12 autoencoders for a CPU: enough stacks to keep its threads busy to the end.
AUTOENCODER_PARAMETERS = {"cpu": 7_000_000, "cuda": 70_000_000}
STREAMS = 4  # units at once on a GPU: one alone leaves most of it idle
FIGURE_FOLDER = "figures"  # in the folder of results, beside these files
MODEL_FOLDER = "model"  # likewise
RESULT_NAMES = ("top_layers.json", "results.txt", "report.html", "samples.csv", "predictions.npz", "results.json")
TRIES = 3  # to write into a folder that others make and remove too
QUICK = {"max_epochs": 30, "patience": 5}  # of --quick, of networks that read modules
# Of which a new file's prediction does not depend on how its updates are factorised.
KEPT = ("update_sketch", "update_kernel", "update_spectrum", "update_views", "update_attention")
RUNS_IN_STACK = {"cpu": 1, "cuda": 10}  # of one representation, so that more runs find the first ones finished


class UsageError(ValueError):
    """A flag that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Networks:
    """Widths of hidden layers; None stands for those that a network has by default."""

    classifier: tuple[int, ...] = HIDDEN
    autoencoder: tuple[int, ...] | None = None
    attention: tuple[int, ...] | None = None
    projection: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Settings:
    """The experiment that is asked for, all flags resolved."""

    top_k: int
    num_runs: int
    rank_by: str
    seed: int
    splits: int
    quick: bool
    devices: tuple[torch.device, ...]  # a CPU, or GPUs
    representations: tuple[str, ...]
    all_representations: bool  # asked for by no name: the costly ones are left out where they would take long
    layers: str | None  # pattern; see `data.select_layers`
    controls: str  # one of `flags.LEVELS`
    null_shuffles: int  # rankings to train on shuffled labels
    sketch_flat: bool  # representations of all weights read a sketch of each layer
    keep_twins: bool  # copies and epochs of one training stay where the split puts them
    holdout: str | None  # the column of whose values each is held out in turn
    label_bins: int | None  # quantile bins of labels that are numbers
    also: tuple[str, ...] | None  # other columns to predict; None: all that can be
    activations: Path | None  # inputs of modules, recorded from the base model
    save_models: tuple[str, ...] | None  # representations whose classifiers are kept; None: the best
    classifier: Schedule
    autoencoder: Schedule
    attention: Schedule
    projection: Schedule

    @property
    def device(self) -> torch.device:
        """The device of the main process."""
        return self.devices[0]

    def config(self) -> dict:
        """Return what results.json keeps of the settings: all that decides the numbers, no path and no machine."""
        return {
            "top_k": self.top_k,
            "num_runs": self.num_runs,
            "rank_by": self.rank_by,
            "seed": self.seed,
            "splits": self.splits,
            "quick": self.quick,
            "device": self.device.type,
            "representations": list(self.representations),
            "layers": self.layers,
            "controls": self.controls,
            "null_shuffles": self.null_shuffles,
            "sketch_flat": self.sketch_flat,
            "keep_twins": self.keep_twins,
            "holdout": self.holdout,
            "label_bins": self.label_bins,
            "also": None if self.also is None else list(self.also),
            "activations": None,  # a digest of what is read of them, once the modules are known
            "save_models": None if self.save_models is None else list(self.save_models),
            "classifier": {"hidden": list(self.classifier.hidden), "dropout": DROPOUT} | _numbers(self.classifier),
            "autoencoder": _numbers(self.autoencoder) | _hidden(self.autoencoder),
            "attention": _numbers(self.attention) | _hidden(self.attention),
            "projection": _numbers(self.projection) | _hidden(self.projection),
            "stack": {
                "parameters": STACK_PARAMETERS[self.device.type],
                "autoencoder_parameters": AUTOENCODER_PARAMETERS[self.device.type],
                "runs": RUNS_IN_STACK[self.device.type],
            },
        }


def _numbers(schedule: Schedule) -> dict:
    """Return the numbers of a schedule by name, but for the widths of its networks."""
    return {name: value for name, value in asdict(schedule).items() if name != "hidden"}


def _hidden(schedule: Schedule) -> dict:
    """Return the widths of a schedule's networks, where they are not those of each network's own row."""
    return {} if schedule.hidden is None else {"hidden": list(schedule.hidden)}


def resolve(args: argparse.Namespace, networks: Networks = Networks()) -> Settings:
    """Return the settings that the flags ask for.

    Raises:
        UsageError: A flag is out of range or names what is not there.
    """
    _check_numbers(args)
    _check_collection_flags(args)
    check_activations(args.activations)
    check_writable("--output-dir", args.output_dir)
    if args.cache_dir is not None:
        check_writable("--cache-dir", args.cache_dir)
    quick = args.quick
    controls = args.controls or ("none" if quick else "basic")
    return Settings(
        top_k=args.top_k,
        num_runs=args.num_runs or (3 if quick else 10),
        rank_by=args.rank_by,
        seed=args.seed,
        splits=args.splits,
        quick=quick,
        devices=resolve_devices(args.device),
        representations=resolve_representations(args.representations, args.activations),
        all_representations=args.representations == "all",
        layers=args.layers,
        controls=controls,
        null_shuffles=args.null_shuffles,
        sketch_flat=args.sketch_flat,
        keep_twins=args.keep_twins,
        holdout=args.holdout,
        label_bins=args.label_bins,
        also=resolve_columns(args.also, controls),
        activations=args.activations,
        save_models=resolve_kept(args.save_models),
        classifier=Schedule(
            max_epochs=30 if quick else 1000, patience=5 if quick else 20, lr_patience=10, hidden=networks.classifier
        ),
        autoencoder=Schedule(max_epochs=8 if quick else 100, patience=5 if quick else 15, hidden=networks.autoencoder),
        attention=replace(attention.SCHEDULE, hidden=networks.attention, **(QUICK if quick else {})),
        projection=replace(projections.SCHEDULE, hidden=networks.projection, **(QUICK if quick else {})),
    )


def _check_numbers(args: argparse.Namespace) -> None:
    if args.top_k < 1:
        raise UsageError(f"--top-k {args.top_k}: at least one layer is to be removed. Give 1 or more.")
    if args.num_runs is not None and args.num_runs < 1:
        raise UsageError(f"--num-runs {args.num_runs}: at least one run is needed. Give 1 or more.")
    if args.splits < 1:
        raise UsageError(f"--splits {args.splits}: at least one split is needed. Give 1 or more.")
    if args.label_bins is not None and args.label_bins < 2:
        raise UsageError(f"--label-bins {args.label_bins}: at least two bins make classes. Give 2 or more.")
    if args.null_shuffles < 0:
        raise UsageError(f"--null-shuffles {args.null_shuffles}: a negative number. Give 0 or more.")


def _check_collection_flags(args: argparse.Namespace) -> None:
    if not args.dataset:
        raise UsageError("--dataset: empty. Give a folder of LoRAs, or leave it out.")
    if args.labels is not None and (fault := label_tables.table_fault(args.labels)):
        raise UsageError(f"--labels {args.labels}: {fault}")
    columns = {"--label-column": args.label_column, "--group-column": args.group_column, "--holdout": args.holdout}
    for flag, value in columns.items():
        if value is not None and not value.strip():
            raise UsageError(f"{flag}: empty. Name a column, or leave it out.")
    if args.layers is not None and not all(map(str.strip, args.layers.split(","))):
        raise UsageError(f"--layers {args.layers}: an empty pattern. Give a part of a layer's name, or leave it out.")


def resolve_representations(names: str, activations: Path | None = None) -> tuple[str, ...]:
    """Return the representations of a comma list, or all, in the order of the table.

    Raises:
        UsageError: A name is not in the table, or reads ``activations`` that are not there, or none reads them.
    """
    choice = OF_WEIGHTS if activations is None else tuple(REPRESENTATIONS)
    asked = list(choice) if names == "all" else [name.strip() for name in names.split(",")]
    if unknown := [name for name in asked if name not in REPRESENTATIONS]:
        near = "".join(suggestion(name, (*choice, "all")) for name in unknown)
        shown = plain(",".join(unknown))
        raise UsageError(f"--representations {shown}: not known.{near} Choose from {', '.join(choice)}.")
    if without := [name for name in asked if name not in choice]:
        mend = "Give --activations a file of them; docs/activations.md says how to record it."
        raise UsageError(f"--representations {','.join(without)}: it reads inputs of modules. {mend}")
    if activations is not None and set(asked) <= set(OF_WEIGHTS):
        mend = "Add update_response to --representations, or leave it out."
        raise UsageError(f"--activations {plain(os.fspath(activations))}: no representation reads it. {mend}")
    return tuple(name for name in REPRESENTATIONS if name in asked)


def check_activations(path: Path | None) -> None:
    """Refuse a file of --activations that is no safetensors file; what it holds is looked at beside the LoRAs.

    That of the built-in digits may be written with them.
    """
    if path is None or (path.name == digits_activations.NAME and not os.path.lexists(path)):
        return
    shown = f"--activations {plain(os.fspath(path))}"
    try:
        read_header(path)
    except LoraFileError as error:
        raise UsageError(f"{shown}: {error}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{shown}: {getattr(error, 'strerror', None) or error}. Give another file.") from error


def resolve_columns(names: str | None, controls: str) -> tuple[str, ...] | None:
    """Return the columns of --also, in its order; None stands for all that can be predicted.

    Raises:
        UsageError: A name is empty.
    """
    if names is None:
        return None if controls == "all" else ()
    if names in ("all", "none"):
        return None if names == "all" else ()
    columns = [name.strip() for name in names.split(",")]
    if not all(columns):
        raise UsageError(f"--also {plain(names)}: an empty name. Name columns, or leave it out.")
    return tuple(dict.fromkeys(columns))


def resolve_kept(names: str) -> tuple[str, ...] | None:
    """Return the representations of --save-models; None stands for the best.

    Raises:
        UsageError: A name is not among those whose classifiers can be kept.
    """
    if names in ("best", "none"):
        return None if names == "best" else ()
    asked = [name.strip() for name in names.split(",")]
    if unknown := [name for name in asked if name not in KEPT]:
        near = "".join(suggestion(name, (*KEPT, "best", "none")) for name in unknown)
        shown = plain(",".join(unknown))
        raise UsageError(f"--save-models {shown}: cannot be kept.{near} Choose from {', '.join(KEPT)}, best or none.")
    return tuple(name for name in KEPT if name in asked)


def check_writable(flag: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before any work is done for it.

    A file is written there and removed, with all folders that were made for it: what the system says of permissions is
    not the whole truth, to root least of all.
    """
    nearest = nearest_of(folder)
    shown = f"{flag} {plain(os.fspath(folder))}"
    if not nearest.is_dir():
        raise UsageError(f"{shown}: {plain(os.fspath(nearest))} is not a folder that can be written to. Give another.")
    for attempt in range(TRIES):
        try:
            with building.made(folder), tempfile.TemporaryFile(dir=folder):
                return
        except (OSError, ValueError) as error:
            # Another run that begins at the same moment may have removed what both had made.
            if not isinstance(error, FileNotFoundError) or attempt == TRIES - 1:
                reason = getattr(error, "strerror", None) or error
                raise UsageError(f"{shown}: nothing can be written there ({reason}). Give another.") from error


def nearest_of(path: Path) -> Path:
    """Return what there is of a path: itself, or the nearest of its parents."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def check_places(folder: Path) -> None:
    """Refuse a folder of results whose name cannot be, or that holds something else in the place of one of them.

    Through a link files elsewhere would be moved; and to find it at the end would be late.
    """
    try:
        os.lstat(nearest_of(folder.parent) / f".{folder.name}.lock")  # the longest name
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(f"--output-dir: {plain(os.fspath(folder))}: {error.strerror}. Give another.") from error
    for place in (folder, folder / FIGURE_FOLDER, folder / MODEL_FOLDER, folder / PREVIOUS):
        is_link = place.is_symlink() and place != folder
        if os.path.lexists(place) and (is_link or not place.is_dir()):
            fault = "a link" if is_link else "a file"
            raise UsageError(f"{plain(os.fspath(place))}: {fault} in the place of a folder of results. Remove it.")
    for place in (folder / name for name in RESULT_NAMES):
        if place.is_dir():
            raise UsageError(f"{plain(os.fspath(place))}: a folder in the place of a file of results. Remove it.")
    if folder.is_dir():
        check_writable("--output-dir", folder)


def resolve_devices(name: str) -> tuple[torch.device, ...]:
    """Return the torch devices of a --device flag: a CPU, one GPU, or all that are visible.

    Raises:
        UsageError: It is no device of a supported kind, or it is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device. Give auto, cpu, cuda or cuda:N.") from error
    if device.type not in STACK_PARAMETERS:
        raise UsageError(f"--device {name}: not supported. Give auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        if not gpus and not torch.backends.cuda.is_built():
            raise UsageError(f"--device {name}: this torch is built without CUDA. Install one with it, or give cpu.")
        found = f"there {'is' if gpus == 1 else 'are'} {gpus or 'no'} GPU{'s' * (gpus != 1)} here"
        raise UsageError(f"--device {name}: {found}. Give cpu, or one that is there.")
    if device.type == "cuda":
        have_repeatable_products()
    if name == "cuda":
        return tuple(torch.device("cuda", index) for index in range(gpus))
    return (device,)


def have_repeatable_products() -> None:
    """Have cuBLAS choose the same kernels from run to run where several streams work; before the first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def count_cores() -> int:
    """Return how many CPU cores this process may use: as its affinity, cgroup, Slurm job and OMP_NUM_THREADS allow."""
    limits = [os.environ.get(name, "") for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS")]
    return min([joblib.cpu_count(), *(int(limit) for limit in limits if limit.isdecimal() and int(limit) > 0)])


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that a device has for this process, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()
