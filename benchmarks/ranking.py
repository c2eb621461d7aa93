"""Phase 1, stacked against one at a time: the same classifiers on the same data, epochs and cores, in one run.

    python benchmarks/ranking.py [--layers 16] [--runs 1] [--epochs 10] [--repeats 5]
    python benchmarks/ranking.py --layers 128 --runs 10 --device cuda

The rival is the textbook loop: one nn.Sequential, one DataLoader and one default torch.optim.Adam at a time. Both do
the forward and backward pass of every minibatch, the update, and validation once an epoch; neither stops early. They
alternate, and the last line is the ratio of their median times per model and step. The loop trains at most
``--textbook`` of the classifiers: each takes as long as the next.

Both train with TF32 on a GPU. How near is the stacked step to what it cannot do without? Its arithmetic is compared
with a large matrix product (the floor on a CPU), its optimiser's traffic of 7 floats a parameter with a large copy (the
floor on a GPU).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from joblib import Parallel, delayed, parallel_config
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiment.settings import STACK_PARAMETERS, count_cores
from experiment.threads import set_own_stream
from training.classifier import DROPOUT, HIDDEN, ClassifierStack, Models
from training.stacks import Schedule, Split, start_thread, train

SAMPLES, FEATURES, CLASSES = 1000, 7, 10
BATCH = 32
WIDTHS = (FEATURES, *HIDDEN, CLASSES)
PARAMETERS = sum((a + 1) * b for a, b in pairwise(WIDTHS))
# Multiplications and additions of a minibatch: forward, weight gradients, and input gradients of all layers but one.
OPERATIONS = 2 * BATCH * (3 * sum(a * b for a, b in pairwise(WIDTHS)) - WIDTHS[0] * WIDTHS[1])


def textbook(x: torch.Tensor, y: torch.Tensor, split: Split, layers: list[int], epochs: int) -> None:
    """Train one classifier per layer, one after the other; minibatches come from the host, as they commonly do."""
    device, train_rows = x.device, split.train.cpu()
    on_host, classes = x.cpu(), y.cpu()
    for layer in layers:
        blocks = [
            module
            for fan_in, fan_out in pairwise(WIDTHS[:-1])
            for module in (nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(DROPOUT))
        ]
        model = nn.Sequential(*blocks, nn.Linear(HIDDEN[-1], CLASSES)).to(device)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=10)
        criterion = nn.CrossEntropyLoss()
        dataset = TensorDataset(on_host[layer, train_rows], classes[train_rows])
        batches = DataLoader(dataset, batch_size=BATCH, shuffle=True)
        for _ in range(epochs):
            model.train()
            for inputs, labels in batches:
                optimiser.zero_grad()
                criterion(model(inputs.to(device)), labels.to(device)).backward()
                optimiser.step()
            model.eval()
            with torch.no_grad():
                scheduler.step(criterion(model(x[layer, split.validation]), y[split.validation]).item())


def stacked(x: torch.Tensor, y: torch.Tensor, split: Split, models: list[tuple[int, int]], epochs: int) -> None:
    """Train classifiers, (layer, run) each, in stacks of the size that the program uses, and as many at once."""
    size = STACK_PARAMETERS[x.device.type] // PARAMETERS
    schedule = Schedule(epochs, epochs + 1, BATCH, lr_patience=10)

    stacks = [(x, y, split, models[start : start + size], schedule) for start in range(0, len(models), size)]
    if x.device.type == "cuda":
        for stack in stacks:
            train_stack(*stack)
    else:
        with parallel_config("loky", inner_max_num_threads=1):
            Parallel(count_cores())(delayed(train_stack)(*stack) for stack in stacks)


def train_stack(
    x: torch.Tensor, y: torch.Tensor, split: Split, models: list[tuple[int, int]], schedule: Schedule
) -> None:
    """Train classifiers, (layer, run) each, in one stack."""
    start_thread(x.device)
    source, run = (torch.tensor(column) for column in zip(*models, strict=True))
    train(ClassifierStack(x, y, split, Models(source, run), CLASSES, seed=0), schedule)


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of a call, the device's work included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def limits(device: torch.device) -> tuple[float, float]:
    """Measure this machine's best: operations a second of a large matrix product, bytes a second of a large copy."""
    size = 4096
    a, b = torch.randn(2, size, size, device=device)
    source, target = torch.empty(2, 2**28 if device.type == "cuda" else 2**26, device=device)
    products = [seconds(lambda: a @ b, device) for _ in range(6)]
    copies = [seconds(lambda: target.copy_(source), device) for _ in range(6)]
    return 2 * size**3 / statistics.median(products), 2 * 4 * source.numel() / statistics.median(copies)


def main() -> None:
    """Alternate the two and print the ratio."""
    parser = argparse.ArgumentParser(description="Time the stacked ranking against the textbook loop.")
    parser.add_argument("--layers", type=int, default=16, help="layers to rank (16)")
    parser.add_argument("--runs", type=int, default=1, help="classifiers of each layer (1)")
    parser.add_argument("--textbook", type=int, default=16, help="classifiers that the textbook loop trains (16)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each (10)")
    parser.add_argument("--repeats", type=int, default=5, help="alternations; the medians count (5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    if device.type == "cuda":
        start_thread(device)  # TF32 for all
        set_own_stream(device)  # on the default one no step can be recorded
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.layers, SAMPLES, FEATURES, generator=generator).to(device)
    y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator).to(device)
    split = Split(torch.arange(0, 700), torch.arange(700, 800), torch.arange(800, SAMPLES)).to(device)
    models = [(layer, run) for run in range(args.runs) for layer in range(args.layers)]
    textbook_layers = [layer for layer, _ in models[: args.textbook]]
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {count_cores()} workers"
    steps = args.epochs * -(-700 // BATCH)
    print(f"torch {torch.__version__}, {machine}; {len(models)} classifiers, {args.epochs} epochs, {steps} steps each")

    textbook(x, y, split, textbook_layers[:4], 1)  # warm up
    stacked(x, y, split, models, 1)
    times: dict[str, list[float]] = {"textbook": [], "stacked": []}
    for _ in range(args.repeats):
        duration = seconds(lambda: textbook(x, y, split, textbook_layers, args.epochs), device)
        times["textbook"].append(1e3 * duration / steps / len(textbook_layers))
        duration = seconds(lambda: stacked(x, y, split, models, args.epochs), device)
        times["stacked"].append(1e3 * duration / steps / len(models))
        latest = "  ".join(f"{name} {values[-1]:.4f} ms" for name, values in times.items())
        print(f"{latest} per model and step", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    latest = ", ".join(f"{name} {value:.4f} ms" for name, value in medians.items())
    print(f"median: {latest} per model and step")
    operations, bytes_copied = limits(device)
    step = medians["stacked"] / 1e3
    print(
        f"the stacked step: {OPERATIONS / step / 1e9:.0f} GFLOP/s, {OPERATIONS / step / operations:.0%} of a large "
        f"matrix product; {7 * 4 * PARAMETERS / step / 1e9:.1f} GB/s of optimiser traffic, "
        f"{7 * 4 * PARAMETERS / step / bytes_copied:.0%} of a large copy"
    )
    print(f"ratio: {medians['textbook'] / medians['stacked']:.2f}")


if __name__ == "__main__":
    main()
