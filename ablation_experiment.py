"""Rank LoRA layers by how well they predict the fine-tuning concept, remove the best, and compare representations.

    python ablation_experiment.py --dataset=1k --top-k=5

Three phases over a collection of LoRAs whose concept is known: every layer alone (which predict?), every
representation without the top-k layers (does prediction survive?), every representation with all layers (which is
best?), and controls that show what the answers mean. Writes top_layers.json, results.json, results.txt, samples.csv,
predictions.npz, report.html and figures/ to <output-dir>/ablation_<dataset>/. Everything meets here; only tests and
benchmarks import this module.

Shape letters: N LoRAs, L layers.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `end_at_signals`; Python would show where it was interrupted

from experiment.flags import parse_arguments
from experiment.signals import end_at_signals
from loras.names import escape_output, spreadsheet_cell

if __name__ == "__main__":  # before the imports that take seconds: how to end, --help, and what is mistyped
    escape_output()
    end_at_signals()
    parse_arguments(sys.argv[1:])

import argparse
import csv
import io
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import data
from data import Collection, CollectionError
from experiment import activations, checks, estimates, forecast, model_files, store
from experiment.arrays import FLAT, SKETCHES, WEIGHTS
from experiment.cluster import connect
from experiment.datasets import locate, results_folder
from experiment.engine import Engine
from experiment.extraction import CHECKED, Extracted, extract
from experiment.header import describe, environment
from experiment.phases import UNITS, Experiment, emptied, without_oversized
from experiment.plans import TrainingError
from experiment.settings import (
    FIGURE_FOLDER,
    Networks,
    Settings,
    UsageError,
    check_places,
    count_cores,
    memory_of,
    resolve,
)
from experiment.units import FAILURES, FAULTS, OutOfMemory, one_memory_error, reason_of
from loras import building
from loras.building import Progress, say
from report import text
from report.cautions import UNFINISHED, letters_without_font, missing_line
from report.text import Content
from report.wording import top_layers as top_layers_text
from representations import COMPUTED, REPRESENTATIONS

# ----------------------------------------------------------------------------------------------------------------------
# Lines and time on the way
# ----------------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds by phase."""

    PHASES = ("index", "features", "ranking", "autoencoders", "ablation", "baseline", "analysis", "splits", "models")

    def __init__(self):
        self.seconds = dict.fromkeys(self.PHASES, 0.0)
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def timing(self) -> dict[str, float]:
        """Return seconds of each phase and in total, to the millisecond."""
        seconds = self.seconds | {"total": time.perf_counter() - self.start}
        return {name: round(value, 3) for name, value in seconds.items()}


# ----------------------------------------------------------------------------------------------------------------------
# From arguments to files
# ----------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, networks: Networks) -> int:
    """Run the whole experiment; return 0, or 3 where a representation could not be run.

    Raises:
        UsageError: A flag cannot be used.
        CollectionError: The collection cannot be used. The output folder is left as it was.
    """
    settings = resolve(args, networks)
    cluster = connect(args.scheduler, args.insecure_cluster) if args.scheduler else None
    # One thread for each product: sums of several are rounded otherwise, and the workers use all cores already.
    engine = Engine(settings.devices, count_cores(), cluster)
    with closing(engine), threadpool_limits(1, "blas"):
        code = carry_out(args, settings, engine)
    return 0 if code == 3 and args.partial_ok else code


def carry_out(args: argparse.Namespace, settings: Settings, engine: Engine) -> int:
    """Do what `run` does, with workers."""
    progress = Progress()
    cache = (args.cache_dir or args.output_dir / ".cache").absolute()  # workers may have begun in another folder
    fitted = any(REPRESENTATIONS[name].made == "autoencoder" for name in settings.representations)
    say(text.settings_lines(settings.config(), environment(settings, engine), args.output_dir, fitted))
    if engine.cluster is not None:
        say(f"cluster   workers at {args.scheduler}: {engine.count_workers()} now; others may come, and leave")
    target = results_folder(args.output_dir, args.dataset)
    check_places(target)
    name, folder = locate(args.dataset, args.data_dir, progress)
    watch = Stopwatch()
    with watch.phase("index"):
        collection = data.index_as_asked(args, folder, name, progress)
    plan = make_plan(settings, collection, engine, cache)
    with only_process(target):
        with watch.phase("features"):
            collection, plan, extracted = read_weights(args, settings, (collection, plan), cache, engine, progress)
        plan.header["dataset"]["fingerprint"] = extracted.fingerprint
        plan.header["figures"] = {"style": args.figure_style, "letters_without_font": ""}
        plan = without_oversized_train(plan, collection, extracted)
        plan.header["dataset"]["findings"] = [notice.record() for notice in collection.notices]
        for line in text.notice_lines(plan.header):
            say(line)
        if finished := finished_results(target, plan.header):
            drawn = redraw(target, finished, args.figure_style)
            done = f"Drawn anew: {target / FIGURE_FOLDER}. Else nothing to do" if drawn else "Nothing to do"
            done += f": {target} holds the results of these settings on these files."
            content = text.content_of(finished)
            say("\n".join([*text.console_lines(finished, content), *text.end_lines(finished, target, done)]))
            return 3 if finished["representations_not_run"] or finished["not_done"] else 0
        # What the run will read: damaged, it is computed again now, where that can still be done.
        known = collection, plan.needed, cache, settings.device, engine, progress, args.skip_bad
        found = extract(*known, thorough=True, activations=plan.activations)
        extracted = replace(found, checked=extracted.checked)
        building.remove_temporaries(extracted.folder)
        if finished_units := len(list((extracted.folder / UNITS).glob("*.npz"))):
            say(f"cache     {finished_units} finished units of work in {extracted.folder / UNITS}")
        # Nobody else is at work in this folder, under this name of this machine.
        engine.begin(extracted.folder, store.digest([platform.node(), str(target.absolute())]))
        experiment = Experiment(settings, collection, plan.selected, plan.rows, extracted, engine, progress)
        results = plan.header | run_phases(experiment, plan.chosen, plan.not_run, watch)
        results = conclude(target, experiment, results, watch)
    missing = [*plan.not_run, *results["not_done"]]
    left_out = f"; not run, and results.txt says why: {', '.join(missing)}" if missing else ""
    written = f"Written to {target} ({results['timing']['total']:.0f} s){left_out}"
    say("\n".join(text.end_lines(results, target, written)))
    return 3 if missing else 0


def conclude(target: Path, experiment: Experiment, results: dict, watch: Stopwatch) -> dict:
    """Analyse the results of the phases, and write them: at once, with what the analysis adds, and with what is kept.

    So a run that ends in its analysis leaves the results of its phases, and one that ends while classifiers are kept
    leaves the analysis; the same command then goes on.
    """
    parts = {"analysis": analyse} | ({"splits": more_splits} if experiment.settings.splits > 1 else {})
    parts |= {} if experiment.settings.save_models == () else {"model": partial(keep_models, target)}
    results |= {"analysis": None, "splits": None, "model": None, "not_done": dict.fromkeys(parts, UNFINISHED)}
    results["config"]["stack"]["smaller"] = experiment.planner.smaller_stacks
    if written_before(target, results) is None:
        write_results(target, experiment, results | {"timing": watch.timing()})
    results["not_done"], drawn = {}, None
    for part, do in parts.items():
        if part == "model":
            results["not_done"][part] = UNFINISHED
            drawn = write_results(target, experiment, results | {"timing": watch.timing()})
            del results["not_done"][part]
        try:
            with one_memory_error():
                results[part] = do(experiment, results, watch)
        except FAULTS:
            raise
        except (TrainingError, *FAILURES) as error:
            results["not_done"][part] = reason_of(error)
            say(missing_line(part, results["not_done"][part]))
    results["timing"] = watch.timing()
    write_results(target, experiment, results, shown=True, drawn=drawn)
    return results


def read_weights(
    args: argparse.Namespace,
    settings: Settings,
    indexed: tuple[Collection, CollectionPlan],
    cache: Path,
    engine: Engine,
    progress: Progress,
) -> tuple[Collection, CollectionPlan, Extracted]:
    """Extract features and check the weights; return them with the collection and plan that are left.

    These are less the files that --skip-bad leaves out, and keep copies and epochs on one side of the split.

    Raises:
        CollectionError: Weights are NaN or infinite, copies have several labels, or files have changed.
    """
    collection, plan = indexed
    flags = {"strict": args.strict, "skip_bad": args.skip_bad, "keep_twins": settings.keep_twins}
    check = partial(checks.check_collection, seed=settings.seed, layers=settings.layers, **flags)
    while True:
        try:
            how = settings.device, engine, progress, args.skip_bad, check
            memory = int(estimates.PASS_SHARE * memory_of(torch.device("cpu")))
            extracted = extract(collection, plan.needed, cache, *how, memory, activations=plan.activations)
        except CollectionError as error:
            if not (args.skip_bad and error.files):
                raise
            before, collection = len(collection.skipped), data.without(collection, error.files)
            say(text.skipped_lines(collection.skipped_records[before:], "left out, found on reading the weights"))
            plan = make_plan(settings, collection, engine, cache, plan)
        else:
            collection = checks.apply(collection, extracted.checked)
            if collection.together:
                plan = make_plan(settings, collection, engine, cache, plan)
            return collection, plan, extracted


@dataclass(frozen=True)
class CollectionPlan:
    """The work on a collection.

    ``selected`` bool[L] are the layers that --layers keeps, ``rows`` the parts of the split, ``chosen`` the
    representations that can run, ``not_run`` why others cannot, ``needed`` the arrays to extract; ``header`` is what
    results.json says before the first number, ``lines`` what was said of all this, ``activations`` the recorded inputs.
    """

    selected: np.ndarray
    rows: dict[str, np.ndarray]
    chosen: list[str]
    not_run: dict[str, str]
    needed: list[str]
    header: dict
    lines: list[str]
    activations: activations.Activations | None


def without_oversized_train(plan: CollectionPlan, collection: Collection, extracted: Extracted) -> CollectionPlan:
    """Return the plan without train LoRAs that are far too large, which its header names."""
    rows, left_out = without_oversized(collection, plan.rows, extracted)
    dataset = plan.header["dataset"]
    dataset["split_sizes"]["train"] = len(rows["train"])
    dataset["not_trained_on"] = [collection.files[row].path for row in left_out]
    return replace(plan, rows=rows)


def make_plan(
    settings: Settings, collection: Collection, engine: Engine, cache: Path, before: CollectionPlan | None = None
) -> CollectionPlan:
    """Check what is asked for against the collection, and print it: what is left out, and what the rest takes.

    Where ``before`` was said of more files, only what differs is: not what is known of each file, nor the estimate.

    Raises:
        UsageError: More layers are to be removed than there are.
        CollectionError: The labels or groups make no classification task, or the activations are of other modules.
    """
    recorded = settings.activations and activations.read(settings.activations, collection)
    rows, selected = checks.check_task(collection, settings)
    choice = checks.choose_representations(settings, collection, selected, rows, cache)
    chosen, not_run, left_out, costs = choice.chosen, choice.not_run, choice.left_out, choice.costs
    read = [*chosen, *checks.held_out_beside(settings, collection, chosen, costs, cache)]
    needed = {*CHECKED, *(name for name in read if REPRESENTATIONS[name].made in COMPUTED)}
    needed |= {WEIGHTS for name in read if estimates.reads_packed(name, settings.sketch_flat)}
    needed |= {SKETCHES for name in chosen if REPRESENTATIONS[name].made in FLAT and settings.sketch_flat}
    header = describe(settings, collection, rows, selected) | {"environment": environment(settings, engine)}
    header["config"] |= {"left_out": left_out, "activations": recorded and recorded.digest}
    lines = text.collection_lines(header, len(chosen), with_skipped=before is None)
    if recorded:
        lines.append(f"inputs    8 of each of {len(recorded.inputs)} modules, of {settings.activations}")
    lines += [text.not_run_line(name, reason) for name, reason in (not_run | left_out).items()]
    if new := [line for line in lines if before is None or line not in before.lines]:
        say("\n".join(new))
    if before is None:
        speed = engine.call(partial(estimates.Speed.measure, settings.device))
        packed = estimates.bytes_of_packed(settings, collection, read, cache)
        say("\n".join(forecast.lines(costs, chosen, speed, cache, packed, engine.count_workers(), engine.streams)))
    return CollectionPlan(selected, rows, chosen, not_run, sorted(needed), header, lines, recorded)


@contextmanager
def only_process(target: Path) -> Iterator[None]:
    """Hold the folder of results for this process.

    A job that Slurm has started again waits for its earlier start, which may still be at work on a node that has lost
    touch with Slurm.

    Raises:
        UsageError: Another process holds it.
    """
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    wait = (lambda holder: say(f"waiting for {holder}, which is at work in {target}")) if restarted else None
    with ExitStack() as held:
        try:
            held.enter_context(building.locked(target.with_name(f".{target.name}.lock"), wait))
        except building.LockedError as error:
            mend = "Wait, or give another --output-dir."
            if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
                mend = "srun starts a copy for each task: give it --ntasks=1, and workers by --scheduler."
            raise UsageError(f"{target}: {error} is at work in it. {mend}") from None
        yield


def run_phases(experiment: Experiment, chosen: list[str], not_run: dict[str, str], watch: Stopwatch) -> dict:
    """Run the three phases and print each result as it arrives; add what cannot be run to ``not_run``."""
    settings, layers = experiment.settings, experiment.layers
    say(f"\nPhase 1: each of {len(layers)} layers alone, on 7 statistics\n{text.LAYER_HEADER}")
    with watch.phase("ranking"):
        ranking = experiment.rank()
    for rank, record in enumerate(ranking[: settings.top_k], 1):
        say(text.layer_row(rank, record, settings.num_runs))
    top = [record["layer"] for record in ranking[: settings.top_k]]
    removed = [depth for depth, layer in enumerate(layers) if layer.name in top]
    for name, reason in without_units(experiment, chosen, removed).items():
        leave_out(not_run, name, reason)
    with watch.phase("autoencoders"):
        for name, reason in experiment.fit([name for name in chosen if name not in not_run], [removed, []]).items():
            leave_out(not_run, name, reason)
    entries = {}
    for condition, without, title in (
        ("ablation", removed, f"Phase 2: without {top_layers_text(settings.top_k)}"),
        ("baseline", [], "Phase 3: with all layers"),
    ):
        say(f"\n{title}\n{text.RESULT_HEADER}")
        names = [name for name in chosen if name not in not_run]
        with watch.phase(condition):
            entries[condition] = evaluate(experiment, names, without, condition, not_run)
    return {
        "layer_ranking": ranking,
        "top_layers": top,
        "ablation_results": {name: entry for name, entry in entries["ablation"].items() if name not in not_run},
        "baseline_results": entries["baseline"],
        "representations_not_run": [{"representation": name, "reason": not_run[name]} for name in not_run],
    }


def evaluate(
    experiment: Experiment, names: list[str], removed: list[int], condition: str, not_run: dict[str, str]
) -> dict[str, dict]:
    """Evaluate representations and print each as it arrives; return their entries in results.json."""
    entries = {}
    for name, entry in experiment.evaluate(names, removed, condition):
        if isinstance(entry, str):
            leave_out(not_run, name, entry)
        else:
            entries[name] = entry
            say(text.result_row(name, entry))
    return entries


def leave_out(not_run: dict[str, str], name: str, reason: str) -> None:
    """Note and print why a representation cannot be run."""
    not_run[name] = reason
    say(text.not_run_line(name, reason))


def without_units(experiment: Experiment, names: list[str], removed: list[int]) -> dict[str, str]:
    """Return why there is nothing left of a representation where layers are removed, by its name."""
    reason = f"without {top_layers_text(len(removed))} no pair is whole"
    if len(experiment.inputs.pairs) == 0:
        reason = "--layers leaves no pair whole"
    return dict.fromkeys(emptied(experiment, names, removed), reason)


def analyse(experiment: Experiment, results: dict, watch: Stopwatch) -> dict:
    """Analyse what the numbers of the phases mean, beside controls where these are asked for."""
    from experiment import controls  # takes half a second, with what it analyses by, as do figures below

    with watch.phase("analysis"):
        return controls.analyse(experiment, run_both_ways(results), say)


def more_splits(experiment: Experiment, results: dict, watch: Stopwatch) -> dict:
    """Repeat the phases on other splits."""
    from experiment.repeated import repeat

    with watch.phase("splits"):
        return repeat(experiment, run_both_ways(results), say)


def keep_models(target: Path, experiment: Experiment, results: dict, watch: Stopwatch) -> dict:
    """Keep classifiers beside the results, for predict.py."""
    from experiment import models

    with watch.phase("models"):
        return models.keep(experiment, results, target)


def run_both_ways(results: dict) -> list[str]:
    """Return the representations that were run with and without the top layers."""
    return [name for name in results["baseline_results"] if name in results["ablation_results"]]


def finished_results(target: Path, header: dict) -> dict | None:
    """Return the results in a folder; None if they are not whole, or of other inputs or program."""
    results = written_before(target, header)
    whole = results and not results["not_done"] and all((target / name).exists() for name in RESULT_FILES)
    if whole and not model_files.is_whole(target, results):  # then the rest is left where it is, and replaced
        results["not_done"] = {"model": "model/ is missing or damaged"}
        building.write_atomically(target / "results.json", building.canonical_json(results, indent=2))
        whole = False
    return results if whole else None


def written_before(target: Path, header: dict) -> dict | None:
    """Return results in a folder, whole or not; None if there are none of these inputs, settings and program."""
    try:
        finished = building.read_object(target / "results.json") or {}
        datasets = [{**results["dataset"], "path": ""} for results in (finished, header)]  # where it lies may change
        configs = [{**results["config"], "stack": ""} for results in (finished, header)]  # stacks may have been smaller
        same = finished["schema_version"] == header["schema_version"] and configs[0] == configs[1]
        same = same and datasets[0] == datasets[1] and finished["environment"]["code"] == header["environment"]["code"]
        return finished if same and isinstance(finished["not_done"], dict) else None
    except (LookupError, TypeError):  # none, or not written by this program
        return None


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------


def top_layers(experiment: Experiment, results: dict, *_: object) -> bytes:
    """Return the content of top_layers.json."""
    return building.canonical_json(results["layer_ranking"][: experiment.settings.top_k], indent=2)


def samples(experiment: Experiment, *_: object) -> bytes:
    """Return the content of samples.csv: a line for each LoRA; no cell is a formula to a spreadsheet."""
    part_of_row = {row: part for part, rows in experiment.rows.items() for row in rows.tolist()}
    columns = ["file", "label", "split"]
    if experiment.collection.groups is not None:
        columns.append("group")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    for row, file in enumerate(experiment.collection.files):
        part = part_of_row.get(row, "none")
        part = {"validation": "val"}.get(part, part)
        cells = (file.path, file.label, part, file.group)[: len(columns)]
        writer.writerow([cell and spreadsheet_cell(cell) for cell in cells])
    return table.getvalue().encode()


def text_page(_: Experiment, results: dict, content: Content, __: dict[str, bytes]) -> bytes:
    """Return the content of results.txt."""
    return text.render_text(results, content).encode(errors="backslashreplace")


def report_page(_: Experiment, results: dict, content: Content, drawn: dict[str, bytes]) -> bytes:
    """Return the content of report.html."""
    from report import page

    return page.render_page(results, drawn, content)


# Of the experiment, its results, their sentences, and their figures by file name.
RESULT_FILES: dict[str, Callable[[Experiment, dict, Content, dict[str, bytes]], bytes]] = {
    "top_layers.json": top_layers,
    "results.txt": text_page,
    "report.html": report_page,
    "samples.csv": samples,
    "predictions.npz": lambda experiment, *_: store.packed_arrays(experiment.predictions.arrays()),
    # The last, so that the others are there when it is.
    "results.json": lambda _, results, *__: building.canonical_json(results, indent=2),
}
RENDERED = ("results.txt", "report.html", "results.json")  # of results.json and the figures alone


def write_results(
    target: Path,
    experiment: Experiment | None,
    results: dict,
    shown: bool = False,
    drawn: dict[str, bytes] | None = None,
) -> dict[str, bytes]:
    """Write all result files, results.json last; move what is there of other settings to previous/<n>/ first.

    What there is of these settings, with something ``not_done``, they replace.

    Args:
        target: The folder.
        experiment: The experiment; None writes the figures and ``RENDERED`` anew, in place of those that are there.
        results: Its results; figures that cannot be drawn are added to ``not_done``.
        shown: Whether the answers are printed too.
        drawn: The figures, where they have been drawn; they are returned.
    """
    before = written_before(target, results)
    if results["analysis"] and drawn is None:
        from report import figures

        results["figures"]["letters_without_font"] = figures.without_font(results)
        for line in letters_without_font(results):
            say(line)
    content = text.content_of(results)
    if shown and content.answers:
        say("\n".join(text.console_lines(results, content)))
    drawn = drawn_figures(results, content) if drawn is None else drawn
    contents = {f"{FIGURE_FOLDER}/{name}": drawn[name] for name in drawn if "/" not in name}  # others: on the page
    earlier = {path.relative_to(target).as_posix() for path in (target / FIGURE_FOLDER).glob("[!.]*")}
    earlier |= {name for name in RESULT_FILES if experiment and (target / name).exists()}
    for name in RESULT_FILES if experiment else RENDERED:
        contents[name] = RESULT_FILES[name](experiment, results, content, drawn)
    if before is None and (target / model_files.FOLDER).exists():
        earlier.add(model_files.FOLDER)
    keep = bool(experiment) and not (before and before["not_done"])
    store.replace_all(target, contents, sorted(earlier - contents.keys()), keep)
    return drawn


def redraw(target: Path, results: dict, style: str) -> bool:
    """Draw figures of finished results anew, if they have another style, or boxes for letters that have a font now.

    They, and the files that tell of them, are made from results.json alone. Return whether anything was drawn.
    """
    before = results["figures"]
    if not results["analysis"] or (before["style"] == style and not before["letters_without_font"]):
        return False
    from report import figures

    results["figures"] = {"style": style, "letters_without_font": figures.without_font(results)}
    if results["figures"] != before:
        write_results(target, None, results)
    return results["figures"] != before


def drawn_figures(results: dict, content: Content) -> dict[str, bytes]:
    """Return the figures that can be drawn, by file name; others are added to ``not_done`` of the results."""
    if not content.findings:
        return {}
    from report import figures

    return figures.draw(results, content.findings, partial(attempt_figure, results["not_done"]))


def attempt_figure(not_done: dict[str, str], name: str, draw: Callable[[], None]) -> None:
    """Draw a figure; note where it fails."""
    try:
        with one_memory_error():
            draw()
    except FAILURES as error:
        not_done[f"figure {name}"] = reason_of(error)
        say(missing_line(f"figure {name}", not_done[f"figure {name}"]))


def main(arguments: list[str] | None = None, networks: Networks = Networks()) -> int:  # noqa: B008 (it is frozen)
    """Run the program; return its exit code.

    0 done, 2 bad flags or input, 3 done but for representations that cannot run, 130 interrupted. As a program it ends
    by `experiment.signals` at a signal.

    Args:
        arguments: Of the command line.
        networks: Widths of the networks.
    """
    escape_output()
    try:
        with one_memory_error():
            return run(parse_arguments(arguments), networks)
    except (UsageError, CollectionError) as error:
        print(error.shown() if isinstance(error, CollectionError) else f"error: {error}", file=sys.stderr)
    except TrainingError as error:
        print(f"error: {error}. Try another --seed or --device.", file=sys.stderr)
    except BrokenPipeError:
        end_unheard()
    except OSError as error:
        print(f"error: {building.fault_of(error)}. The same command continues where this one stopped.", file=sys.stderr)
    except OutOfMemory as error:
        mend = "Try another --device, or fewer workers (OMP_NUM_THREADS)."
        print(f"error: out of memory: {error}. {mend}", file=sys.stderr)
    except KeyboardInterrupt:  # where it was called by another program
        print("\nInterrupted. The same command continues where this one stopped.", file=sys.stderr)
        return 130
    return 2


def end_unheard() -> None:
    """Say that nobody reads the output any more, if anybody reads errors; Python would say it again when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        fault = "nobody reads the output any more (a broken pipe)"
        print(f"error: {fault}. The same command continues where this one stopped.", file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(nowhere, 2)


if __name__ == "__main__":
    sys.exit(main())
