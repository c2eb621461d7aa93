"""The networks that benchmarks/gpu.py trains, in small and in the program's stacks, and its ceilings and step times.

Shape letters: M models, N samples, P modules, F inputs.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ranking import PARAMETERS
from sd15_zoo import MODULES, SHAPES

import autoencoders
from experiment.settings import AUTOENCODER_PARAMETERS, RUNS_IN_STACK, STACK_PARAMETERS
from representations import SKETCH
from training import attention, projections
from training.classifier import ClassifierStack, Models
from training.recorded import Recorded
from training.stacks import Adam, Schedule, Split, train

CLASSES = 10
FLOATS_MOVED = 10  # a parameter and step: weights read twice, gradients written once, and seven of Adam


@dataclass(frozen=True)
class Bench:
    """The circumstances of a section.

    Attributes:
        device: Trains.
        scratch: Folder for what sections write, and share.
        out: Folder to keep logs in; None: they are not kept.
        deadline: When the section must be done, by `time.monotonic`.
        against: Result file of the same collection whose accuracies are compared; None: they are not.
    """

    device: torch.device
    scratch: Path
    out: Path | None = None
    deadline: float = math.inf
    against: Path | None = None

    @property
    def small(self) -> bool:
        """All in miniature, as on a CPU it only shows that it runs."""
        return self.device.type == "cpu"

    def left(self) -> float:
        """Return the seconds left to the section."""
        return self.deadline - time.monotonic()


def synchronise(device: torch.device) -> None:
    """Wait for all that the device does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], None], device: torch.device, times: int = 5, warm: int = 2) -> float:
    """Return the median seconds of a call, the device's work included."""
    durations = []
    for call in range(warm + times):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        if call >= warm:
            durations.append(time.perf_counter() - start)
    return statistics.median(durations)


# ----------------------------------------------------------------------------------------------------------------------
# Ceilings
# ----------------------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device) -> float:
    """Measure bytes a second of a large copy, read and written."""
    source, target = torch.empty(2, 2**29 if device.type == "cuda" else 2**24, device=device)
    return 8 * len(source) / seconds(lambda: target.copy_(source), device)


def ceilings(bench: Bench) -> str:
    """Measure the machine's best."""
    device = bench.device
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}")
    if not bench.small:
        about = torch.cuda.get_device_properties(device)
        print(
            f"{about.name}: {about.multi_processor_count} multiprocessors, {about.total_memory / 2**30:.0f} GiB, "
            f"L2 {about.L2_cache_size / 2**20:.0f} MiB"
        )
    copied = copy_bandwidth(device)
    side = 512 if bench.small else 8192
    a, b = torch.randn(2, side, side, device=device)
    product = 2 * side**3 / seconds(lambda: a @ b, device)
    number = torch.zeros(64, device=device)

    def thousand() -> None:
        for _ in range(1000):
            number.add_(1)

    launch = 1e3 * seconds(thousand, device)
    repeated = 1e3 * seconds(Recorded(thousand, device), device)
    return (
        f"copy {copied / 1e9:.0f} GB/s, TF32 product {product / 1e12:.1f} TFLOP/s, "
        f"a launch {launch:.2f} us, in a recording {repeated:.2f} us"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------


def split_of(samples: int, device: torch.device) -> Split:
    """Return 70 % of rows to train on, 10 % to validate, 20 % to test."""
    train_rows, validation = samples * 7 // 10, samples // 10
    sizes = [train_rows, validation, samples - train_rows - validation]
    return Split(*torch.arange(samples).split(sizes)).to(device)


def drawn(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Draw standard normal numbers: of small shapes on the CPU, the same for all devices; of large ones on the device.

    So stacks of the program's size do not wait for the host.
    """
    where = torch.device("cpu") if math.prod(shape) < 2**22 else device
    generator = torch.Generator(where).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=where).to(device)


def classes_of(samples: int, device: torch.device) -> torch.Tensor:
    """Return a class for each sample."""
    return (torch.arange(samples) % CLASSES).to(device)


def classifiers(
    device: torch.device, samples: int, features: int, sources: int, models: int, masked: bool = False, **network
) -> ClassifierStack:
    """Make classifiers: source after source, then the next run; with ``masked`` each reads columns of its own.

    The sources hold more or less of the class, so that some learn longer than others.
    """
    x, y = drawn(sources, samples, features, device=device), classes_of(samples, device)
    if samples * features < 2**22:
        x += (
            torch.linspace(0, 1, sources, device=device)[:, None, None] * torch.eye(CLASSES, features, device=device)[y]
        )
    position = torch.arange(models)
    live = torch.rand(models, features, generator=torch.Generator().manual_seed(1)) < 0.8 if masked else None
    chosen = Models(position % sources, position // sources, live)
    return ClassifierStack(x, y, split_of(samples, device), chosen, CLASSES, seed=0, **network)


class FixedDraws:
    """A stand-in for the noise of autoencoders: the same numbers on every device."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, purpose: str, *shape: int) -> torch.Tensor:
        """Return numbers that depend on the purpose and the shape alone."""
        return drawn(*shape, device=self.device, seed=len(purpose))


def encoders(
    device: torch.device,
    name: str,
    samples: int,
    features: int,
    models: int,
    hidden: tuple[int, ...] | None = None,
    fixed: bool = False,
) -> autoencoders.AutoencoderStack:
    """Make autoencoders; ``fixed``: without dropout, and with noise that is the same on every device."""
    x = drawn(models, samples, features, device=device)
    stack = autoencoders.AutoencoderStack(name, x, split_of(samples, device), 0, hidden=hidden)
    if fixed:
        stack.kind = replace(stack.kind, dropout=0.0)
        stack.draws.normal = FixedDraws(device)
    return stack


def attentions(device: torch.device, samples: int, modules: int, models: int, **network) -> attention.AttentionStack:
    """Make networks of gated attention, a run each; but for the first, each lacks a module."""
    x, y = drawn(1, samples, modules * attention.TOKEN, device=device), classes_of(samples, device)
    live = torch.ones(models, modules, dtype=torch.bool)
    live[torch.arange(1, models), torch.arange(1, models) % modules] = False
    chosen = Models(torch.zeros(models, dtype=torch.int64), torch.arange(models), live)
    return attention.AttentionStack(x, y, split_of(samples, device), chosen, CLASSES, seed=0, **network)


def projected(
    device: torch.device, samples: int, shapes: list[tuple[int, int, int]], models: int, **network
) -> projections.ProjectionStack:
    """Make networks of learned projections, a run each, of modules of these shapes (r, in, out)."""
    columns = sum(rank * (wide + high) for rank, wide, high in shapes)
    x, y, split = drawn(1, samples, columns, device=device), classes_of(samples, device), split_of(samples, device)
    generator = torch.Generator().manual_seed(0)
    sides = [[shape[side] for shape in shapes] for side in (2, 1)]  # P is [out, 8], Q [in, 8]
    start = tuple([torch.randn(side, SKETCH, generator=generator) for side in of_all] for of_all in sides)
    blocks = projections.Blocks(x, shapes, start, split.train)
    chosen = Models(torch.zeros(models, dtype=torch.int64), torch.arange(models))
    network = {"hidden": projections.HIDDEN, "batch_size": projections.SCHEDULE.batch_size} | network
    return projections.ProjectionStack(blocks, y, split, chosen, CLASSES, seed=0, **network)


@dataclass(frozen=True)
class Case:
    """A stack to be trained.

    Attributes:
        make: Makes it on a device.
        weight_decay: Of its training.
    """

    make: Callable[[torch.device], object]
    weight_decay: float = 0.0


def small_cases(fixed: bool) -> dict[str, Case]:
    """Return a small stack of every network; ``fixed``: without dropout, and with the same noise on every device."""
    dropout = {"dropout": 0.0} if fixed else {}
    narrow = {"hidden": (64, 64, 64), **dropout}
    shapes = [(2, 24, 16), (2, 16, 24), (2, 24, 16), (1, 20, 20)]
    cases = {
        "classifier": partial(classifiers, samples=200, features=40, sources=3, models=6, **narrow),
        "classifier, masked": partial(
            classifiers, samples=200, features=40, sources=1, models=5, masked=True, **narrow
        ),
        **{
            name: partial(encoders, name=name, samples=200, features=40, models=4, hidden=(64, 32), fixed=fixed)
            for name in autoencoders.AUTOENCODERS
        },
        "projections": partial(projected, samples=200, shapes=shapes, models=3, batch_size=32, **narrow),
    }
    gone = {"dropout": 0.0, "module_dropout": 0.0} if fixed else {}
    attended = partial(attentions, samples=200, modules=6, models=3, hidden=16, **gone)
    return {name: Case(make) for name, make in cases.items()} | {"attention": Case(attended, weight_decay=0.01)}


# ----------------------------------------------------------------------------------------------------------------------
# Steps
# ----------------------------------------------------------------------------------------------------------------------


def autoencoders_in_stack(name: str, width: int, samples: int) -> int:
    """Return how many autoencoders of layers so wide of SD1.5 the program trains in one stack on a GPU."""
    layers = sum(rows * columns == width for rows, columns in SHAPES.values())
    parameters = autoencoders.num_parameters(name, width) + samples * width // 5
    count = math.ceil(layers * parameters / AUTOENCODER_PARAMETERS["cuda"])
    return math.ceil(layers / min(count, layers))


def program_cases(samples: int = 1000) -> dict[str, Case]:
    """Return the stacks that the program trains on a GPU, of 1,000 SD1.5 LoRAs."""
    layers, runs = len(SHAPES), RUNS_IN_STACK["cuda"]
    in_stack = min(runs * layers, STACK_PARAMETERS["cuda"] // PARAMETERS)
    cases = {
        f"ranking 7 x {in_stack}": Case(
            partial(classifiers, samples=samples, features=7, sources=layers, models=in_stack)
        )
    }
    for label, features, models in (
        ("stats", 896, runs),
        ("update_sketch", 4096, runs),
        ("contrastive's", 14_144, runs),
        ("flat_vec", 99_648, 1),
        ("flat_vec", 99_648, runs),
    ):
        make = partial(classifiers, samples=samples, features=features, sources=1, models=models)
        cases[f"{label} {features:,} x {models}"] = Case(make)
    for name in autoencoders.AUTOENCODERS:
        for width in (320, 1280):
            models = autoencoders_in_stack(name, width, samples)
            make = partial(encoders, name=name, samples=samples, features=width, models=models)
            cases[f"{name} {width:,} x {models}"] = Case(make)
    shapes = [(1, wide, high) for wide, high in MODULES.values()]
    attended = partial(attentions, samples=samples, modules=len(MODULES), models=runs)
    cases[f"attention {len(MODULES)} x {runs}"] = Case(attended, attention.SCHEDULE.weight_decay)
    cases[f"projections {len(MODULES)} x {runs}"] = Case(
        partial(projected, samples=samples, shapes=shapes, models=runs)
    )
    return cases


COLUMNS = ("as it is", "recorded", "of a copy", "drawing", "epoch", "GiB")


def make_step(network, optimiser: Adam, size: int) -> None:
    """Make the step of a minibatch of so many rows."""
    optimiser.step(network.params, network.gradients(size))


def step_milliseconds(network, function: Callable[[], None], count: int, device: torch.device) -> float:
    """Measure a step, of so many in an epoch that is drawn before."""
    durations = []
    for _ in range(4):
        next(network.begin(1))
        synchronise(device)
        start = time.perf_counter()
        for _ in range(count):
            function()
        synchronise(device)
        durations.append((time.perf_counter() - start) / count)
    return 1e3 * statistics.median(durations[1:])


def step_figures(case: Case, device: torch.device, copied: float, epochs: int) -> dict[str, str]:
    """Measure a stack: milliseconds of a step of a whole minibatch, of drawing an epoch, and of an epoch of `train`.

    Args:
        case: The stack.
        device: Trains it.
        copied: Bytes a second of a large copy.
        epochs: To train for the last of these figures, which holds recording and validation too.
    """
    network = case.make(device)
    optimiser = Adam(network.params, case.weight_decay)
    models = len(next(iter(network.params.values())))
    optimiser.begin(torch.full((models,), 1e-3, dtype=torch.float64), 0)
    sizes = next(network.begin(1))
    count = sizes.count(sizes[0])
    step = partial(make_step, network, optimiser, sizes[0])
    recording = Recorded(step, device, network.generators)
    plain, recorded = (step_milliseconds(network, function, count, device) for function in (step, recording))
    is_recorded = recording.records or device.type == "cpu"
    del step, recording, optimiser  # memory, for the training
    parameters = sum(parameter.numel() for parameter in network.params.values())
    share = 4 * FLOATS_MOVED * parameters / (recorded / 1e3) / copied
    drawing = 1e3 * seconds(lambda: list(network.begin(1)), device, times=3, warm=1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    schedule = Schedule(epochs, epochs + 1, weight_decay=case.weight_decay)
    epoch = 1e3 * seconds(lambda: train(network, schedule), device, times=1, warm=0) / epochs
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    said = f"{recorded:.3f}" if is_recorded else "no memory"
    return dict(
        zip(
            COLUMNS,
            (f"{plain:.3f}", said, f"{share:.0%}", f"{drawing:.2f}", f"{epoch:.1f}", f"{peak:.1f}"),
            strict=True,
        )
    )


def steps(bench: Bench) -> str:
    """Measure the steps of every stack of the program, and print a table in milliseconds."""
    device, copied = bench.device, copy_bandwidth(bench.device)
    print(f"{'ms; network, inputs x models':<28}{''.join(f'{column:>10}' for column in COLUMNS)}", flush=True)
    cases = small_cases(fixed=False) if bench.small else program_cases()
    summary = []
    for label, case in cases.items():
        if bench.left() < 5:
            print("no time for more")
            break
        try:
            figures = step_figures(case, device, copied, 2 if bench.small else 10)
            line = "".join(f"{figures[column]:>10}" for column in COLUMNS)
            summary.append(f"{label} {figures['recorded']} ({figures['of a copy']})")
        except Exception as error:  # an out of memory, say: the others are measured all the same
            line = f" {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{label:<28}{line}", flush=True)
        gc.collect()
        if not bench.small:
            torch.cuda.empty_cache()
    return f"ms recorded (of a copy): {', '.join(summary[:2])}; {len(summary)} of {len(cases)} stacks measured"
