"""The pre-flight, ``python data.py inspect``: what a folder holds, and everything for which an experiment refuses it.

It checks by the functions that the experiment checks by, and says the same. What headers show comes at once; then each
file is read once. An experiment stops at the first kind of fault; here all that can be seen is said in one go.

Shape letters: N LoRAs, L layers, P modules.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import data
from data import Collection, CollectionError, check_classes, index_as_asked, without
from experiment import activations, checks, contents
from experiment.datasets import locate, results_folder
from experiment.flags import parse_arguments
from experiment.phases import split_collection
from experiment.settings import Settings, UsageError, check_places, count_cores, resolve
from loras import inspection as inspecting
from loras import labels as labelling
from loras.building import Progress
from loras.command_line import program_path
from loras.flags import NAMED_DATASETS
from loras.lora_files import LoraFileError
from loras.names import discard_output, plain
from loras.notices import Finding
from representations import REPRESENTATIONS

NOT_CHECKED = "weights: not read; NaN, copies, epochs, untrained LoRAs and outliers were not checked"
CHECKED = "weights: read and checked for NaN, copies, epochs, untrained LoRAs and outliers"
AGAIN = "mend what the errors say, then look again"


def run(args: argparse.Namespace) -> int:
    """Inspect a folder; return 0, or 2 where the experiment would refuse it."""
    preflight = Preflight(args)
    try:
        preflight.inspect()
    except BrokenPipeError:  # whoever reads has seen enough
        discard_output()
    except (LoraFileError, OSError) as error:  # files have changed while they were looked at
        print(f"error: {args.path}: {error}", file=sys.stderr)
        return 2
    return 2 if preflight.refused else 0


@dataclass
class Preflight:
    """One inspection of a folder.

    Attributes:
        args: The flags.
        refused: Why an experiment would refuse the folder, as its errors say.
        skippable: Whether --skip-bad would leave out files for which it is refused.
        unlabelled: Whether labels are passed over, to look at the rest, as they cannot be read.
        other_labels: Columns that would make classes, where the labels do not.
    """

    args: argparse.Namespace
    refused: list[str] = field(default_factory=list)
    skippable: bool = False
    unlabelled: bool = False
    other_labels: list[str] = field(default_factory=list)

    def inspect(self) -> None:
        """Print what headers show, then what the weights do, and what to do next."""
        args, progress = self.args, Progress(log=sys.stderr)
        try:
            if not args.path:
                raise UsageError("FOLDER: empty. Give a folder of LoRAs.")
            settings = resolve(_with(args, dataset=args.path))
            check_places(results_folder(args.output_dir, args.path))
            name, folder = locate(args.path, args.data_dir, progress, train=False)
        except UsageError as error:
            self._refuse([str(error).removeprefix("--dataset ")])
            self._finish({}, [])
            return
        collection = self._index(name, folder, progress)
        if collection is None or self.refused:
            self._finish(self._look_at(settings, collection, progress) if collection else {}, [])
            return
        collection = by_header = self._with_scales(collection, progress)
        shown, lines = self._describe(settings, collection), [NOT_CHECKED]
        if not args.json:
            place = f"{args.path}, which is {folder}" if args.path in NAMED_DATASETS else args.path
            text = contents.content_lines(place, shown, args.all) + contents.cost_lines(shown)
            _print(text + contents.notice_lines(shown["notices"]))
        self._check_task(settings, collection)
        if not args.headers_only:
            collection = self._check_weights(settings, collection, progress)
            lines = [CHECKED, *_weights_lines(by_header, collection)]
        if args.json and collection.files != by_header.files:
            shown = self._describe(settings, collection)
        shown["notices"] = [notice.record() for notice in collection.notices]
        self._finish(shown | {"weights_checked": not args.headers_only}, lines)

    def _look_at(self, settings: Settings, collection: Collection, progress: Progress) -> dict:
        """Print more that is to be mended in what is refused, and return what it holds if that is all of it."""
        shown = {}
        if self.unlabelled:
            shown = contents.contents_of(collection, np.ones(len(collection.layers), bool))
            if not self.args.json:
                _print(contents.content_lines(self.args.path, shown, self.args.all))
        if not self.args.headers_only:
            self._check_weights(settings, collection, progress)
        return shown

    # -- headers ------------------------------------------------------------------------------------------------------

    def _index(self, name: str, folder: Path, progress: Progress) -> Collection | None:
        """Return the collection; where it is refused, less the files for which it is, or else without its labels."""
        try:
            return index_as_asked(self.args, folder, name, progress)
        except CollectionError as error:
            self._refuse(error.findings)
        rest = None if self.args.skip_bad else self._rest(name, folder, progress)
        self.skippable = rest is not None
        if rest is None:
            rest = self._rest(name, folder, progress, unlabelled=True)
            self.unlabelled = rest is not None
        return rest

    def _rest(self, name: str, folder: Path, progress: Progress, unlabelled: bool = False) -> Collection | None:
        """Return the collection less the files for which it is refused; None where that is no collection either."""
        try:
            return index_as_asked(_with(self.args, skip_bad=True), folder, name, progress, unlabelled)
        except CollectionError:
            return None

    def _with_scales(self, collection: Collection, progress: Progress) -> Collection:
        """Return the collection with the scales of alpha tensors; those that cannot be used the weights will show."""
        files, faults = inspecting.with_scales(collection.root, progress.track(collection.files, "scales"))
        if faults and self.args.headers_only:
            self.skippable = True
            self._refuse([finding.line(collection.root) for finding in faults])
        return replace(collection, files=tuple(files))

    def _check_task(self, settings: Settings, collection: Collection) -> bool:
        """Refuse labels, groups and layers that make no experiment; return whether they make one."""
        lines = []
        try:
            check_classes(collection)
            split_collection(collection, settings.seed)
        except CollectionError as error:
            lines += error.findings
            values = labelling.column_values(collection.root, [f.path for f in collection.files], collection.table)
            fitting = labelling.would_make_classes(values, len(collection.files))
            self.other_labels = [name for name in fitting if name != collection.label_column]
        try:
            checks.check_columns(collection, settings)
            checks.chosen_layers(collection, settings)
        except (CollectionError, UsageError) as error:
            lines += getattr(error, "findings", [str(error)])
        lines += activations.faults(settings.activations, collection)
        self._refuse(lines)
        return not lines

    def _describe(self, settings: Settings, collection: Collection) -> dict:
        """Return what the folder holds, and what an experiment on it takes; also where it would be refused."""
        try:
            selected = data.select_layers(collection, settings.layers)
        except CollectionError:
            selected = np.ones(len(collection.layers), bool)
        count = len(collection.files)
        rows = {"train": np.arange(round(0.7 * count)), "validation": np.arange(round(0.1 * count))}
        cache = self.args.cache_dir or self.args.output_dir / ".cache"
        choice = checks.choose_representations(settings, collection, selected, rows, cache)
        if choice.costs.pairs == 0:
            of_pairs = [name for name in choice.chosen if REPRESENTATIONS[name].unit == "pair"]
            not_run = choice.not_run | dict.fromkeys(of_pairs, "--layers leaves no pair whole")
            choice = replace(choice, chosen=[name for name in choice.chosen if name not in not_run], not_run=not_run)
        torch.set_num_threads(1)  # as each worker has
        workers = count_cores() if settings.device.type == "cpu" else len(settings.devices)
        return contents.contents_of(collection, selected) | contents.costs_of(settings, choice, workers)

    # -- weights ------------------------------------------------------------------------------------------------------

    def _check_weights(self, settings: Settings, collection: Collection, progress: Progress) -> Collection:
        """Return the collection with what its weights show, less the files that --skip-bad leaves out for it.

        Without --skip-bad files with faults are refused, and the others are looked at for more such files. Where
        anything is refused, what concerns the collection as a whole would be said of a part of it, and is not.
        """
        root, skip_bad, whole = collection.root, self.args.skip_bad, not self.refused
        checked, faults = inspecting.check_files(root, progress.track(collection.files, "weights"))
        flags = {"strict": self.args.strict, "skip_bad": skip_bad, "keep_twins": settings.keep_twins}
        flags |= {"seed": settings.seed, "layers": settings.layers if whole else None}
        bad = [(path, finding.reason) for finding in faults for path in finding.files]
        rest, lines = collection, []
        while True:
            lines += [] if skip_bad else [Finding((path,), reason).line(root) for path, reason in bad]
            if bad:
                try:
                    rest = without(rest, bad)
                except CollectionError as error:  # none is left
                    self._refuse(error.findings)
                    return collection
                if skip_bad and whole and not self._check_task(settings, rest):
                    return rest
            norms = np.stack([checked[file.path].norms for file in rest.files])
            twins = inspecting.twins_of(root, rest.files, checked)
            outcome = checks.check_by_weights(rest, norms, twins, **flags)
            bad = [entry[:2] for entry in outcome.get("findings", [])]
            if not bad:
                break
        if lines:
            self.skippable = True
            self._refuse(lines)
            return collection
        self._refuse(outcome.get("faults", []) if whole else [])
        return checks.apply(rest, {"groups": []} | outcome)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _refuse(self, lines: list[str]) -> None:
        """Print errors at once, and keep them."""
        if lines:
            self.refused += lines
            print(CollectionError(lines).shown(), file=sys.stderr, flush=True)

    def _finish(self, shown: dict, lines: list[str]) -> None:
        """Print what weights have shown and what to do next; with --json all there is."""
        step = self._next()
        if not self.args.json:
            _print([*lines, f"next:    {step}"])
            return
        all_letters = "utf" in (sys.stdout.encoding or "").lower()
        shown |= {"refused": self.refused, "next": step}
        _print([json.dumps(shown, indent=2, ensure_ascii=not all_letters)])

    def _next(self) -> str:
        """Return the command that runs the experiment, or what to do for it."""
        args = self.args
        if not self.refused:
            return command("ablation_experiment.py", args, f"--dataset={shlex.quote(args.path)}")
        look = ["inspect", shlex.quote(args.path)]
        writes = labelling.label_command(Path(args.path))
        if self.unlabelled and any(f"`{writes}`" in line for line in self.refused):  # where they advise it
            return f"{writes} writes a table of labels to fill in"
        if self.other_labels:
            other = _with(args, label_column=self.other_labels[0])
            return f"{AGAIN}; or by other labels: {command('data.py', other, *look)}"
        if self.skippable:
            skipping = _with(args, skip_bad=True)
            return f"{AGAIN}; or leave those files out: {command('data.py', skipping, *look)}"
        return f"{AGAIN}: {command('data.py', args, *look)}"


def _with(args: argparse.Namespace, **changed: object) -> argparse.Namespace:
    """Return flags of which some are others."""
    return argparse.Namespace(**vars(args) | changed)


def _weights_lines(by_header: Collection, collection: Collection) -> list[str]:
    """Return what weights have shown that headers did not."""
    skipped = collection.skipped_records[len(by_header.skipped) :]
    notices = [notice.record() for notice in collection.notices[len(by_header.notices) :]]
    left = [contents.left_line(collection.class_counts)] if skipped else []
    return [*contents.skipped_lines(skipped), *contents.notice_lines(notices), *left]


def command(program: str, args: argparse.Namespace, *words: str) -> str:
    """Return a command line of this project, for a shell, with the flags of the experiment that are not as by default.

    Args:
        program: The file that is run.
        args: The flags.
        words: Behind the program, quoted.
    """
    flags, usual = [], vars(parse_arguments([]))
    for name, default in usual.items():
        value, flag = getattr(args, name, default), f"--{name.replace('_', '-')}"
        if value != default:
            flags.append(flag if value is True else f"{flag}={shlex.quote(str(value))}")
    return plain(" ".join(["python", program_path(program), *words, *flags]))


def _print(lines: Iterable[str]) -> None:
    print("\n".join(lines), flush=True)
