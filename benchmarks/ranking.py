"""Phase 1, stacked against one at a time: the same classifiers on the same data, epochs and cores, in one run.

    python benchmarks/ranking.py [--layers 16] [--epochs 5] [--repeats 5]

The rival is the textbook loop: one nn.Sequential, one DataLoader and one default torch.optim.Adam at a time. Both do
the forward and backward pass of every minibatch, the update, and validation once an epoch; neither stops early. They
alternate, and the last line is the ratio of their median times per model and step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from ablation_experiment import STACK_PARAMETERS
from stacked_training import DROPOUT, HIDDEN, ClassifierStack, Models, Schedule, Split, train

SAMPLES, FEATURES, CLASSES, BATCH = 1000, 7, 10, 32


def textbook(x: torch.Tensor, y: torch.Tensor, split: Split, epochs: int) -> None:
    """Train one classifier per layer, one after the other."""
    for layer in range(len(x)):
        sizes = (FEATURES, *HIDDEN)
        blocks = [
            module
            for fan_in, fan_out in pairwise(sizes)
            for module in (nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(DROPOUT))
        ]
        model = nn.Sequential(*blocks, nn.Linear(HIDDEN[-1], CLASSES)).to(x.device)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=10)
        criterion = nn.CrossEntropyLoss()
        batches = DataLoader(TensorDataset(x[layer, split.train], y[split.train]), batch_size=BATCH, shuffle=True)
        for _ in range(epochs):
            model.train()
            for inputs, labels in batches:
                optimiser.zero_grad()
                criterion(model(inputs), labels).backward()
                optimiser.step()
            model.eval()
            with torch.no_grad():
                scheduler.step(criterion(model(x[layer, split.validation]), y[split.validation]).item())


def stacked(x: torch.Tensor, y: torch.Tensor, split: Split, epochs: int) -> None:
    """Train the same classifiers in stacks of the size that the program uses."""
    parameters = sum((a + 1) * b for a, b in zip((FEATURES, *HIDDEN), (*HIDDEN, CLASSES), strict=True))
    size = STACK_PARAMETERS[x.device.type] // parameters
    for source in torch.arange(len(x)).split(size):
        models = Models(source, torch.zeros_like(source))
        train(
            ClassifierStack(x, y, split, models, CLASSES, seed=0), Schedule(epochs, epochs + 1, BATCH, lr_patience=10)
        )


def main() -> None:
    """Alternate the two and print the ratio."""
    parser = argparse.ArgumentParser(description="Time the stacked ranking against the textbook loop.")
    parser.add_argument("--layers", type=int, default=16, help="classifiers to train (16)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each (5)")
    parser.add_argument("--repeats", type=int, default=5, help="alternations; the medians count (5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.layers, SAMPLES, FEATURES, generator=generator).to(device)
    y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator).to(device)
    split = Split(torch.arange(0, 700), torch.arange(700, 800), torch.arange(800, SAMPLES)).to(device)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {on}; {args.layers} layers, {args.epochs} epochs of {-(-700 // BATCH)} steps")

    model_steps = args.layers * args.epochs * -(-700 // BATCH)
    times: dict[str, list[float]] = {"textbook": [], "stacked": []}
    for function in (textbook, stacked):
        function(x[:8], y, split, 1)  # warm up
    for _ in range(args.repeats):
        for function in (textbook, stacked):
            start = time.perf_counter()
            function(x, y, split, args.epochs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[function.__name__].append(1e3 * (time.perf_counter() - start) / model_steps)
        print(
            "  ".join(f"{name} {seconds[-1]:.3f} ms" for name, seconds in times.items()),
            "per model and step",
            flush=True,
        )
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"median: textbook {medians['textbook']:.3f} ms, stacked {medians['stacked']:.3f} ms per model and step")
    print(f"ratio: {medians['textbook'] / medians['stacked']:.2f}")


if __name__ == "__main__":
    main()
