"""All hand-crafted features of Stable Diffusion 1.5 LoRAs: one shared pass against numpy and scipy matrix by matrix.

    python benchmarks/features.py [--samples 32] [--repeats 5] [--rank 1] [--device cpu]

The pass stacks matrices of equal shape and computes every representation that is "computed", by layer or pair, as the
program does: 128 matrices and 64 pairs a LoRA, 99,648 numbers at rank one, drawn at random in the shapes of
sd15_zoo.py. Its rival is the plain script: a loop over samples and layers that calls numpy and scipy, each
representation written from its docstring on its own, the ensemble by computing its five parts. The two alternate,
their results are compared, and the last line is the ratio of their median times per LoRA.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from sd15_zoo import MODULES

from representations import REPRESENTATIONS, Shared, matrix_features, pair_features, samples_at_once

MATRIX = [name for name, row in REPRESENTATIONS.items() if (row.unit, row.made) == ("layer", "computed")]
PAIR = [name for name, row in REPRESENTATIONS.items() if (row.unit, row.made) == ("pair", "computed")]
AGREEMENT = 1e-4  # largest relative difference allowed between the two ways

Lora = list[tuple[np.ndarray, np.ndarray]]  # the down and up factor of each module, in the order of MODULES
Features = dict[str, np.ndarray]  # name -> features float32[samples, layers or modules, F]


def draw(samples: int, rank: int) -> list[Lora]:
    """Draw LoRAs of the zoo's modules with normal weights of a realistic size, float32."""
    generator = np.random.default_rng(0)

    def normal(std: float, *shape: int) -> np.ndarray:
        return std * generator.standard_normal(shape, dtype=np.float32)

    return [
        [(normal((3 * n_in) ** -0.5, rank, n_in), normal(0.01, n_out, rank)) for n_in, n_out in MODULES.values()]
        for _ in range(samples)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The plain way: one matrix at a time
# ----------------------------------------------------------------------------------------------------------------------


def plain_stats(w: np.ndarray) -> list:
    """Compute mean, std, median, min, max, skewness, kurtosis."""
    x = w.ravel()
    return [x.mean(), x.std(), np.median(x), x.min(), x.max(), scipy.stats.skew(x), scipy.stats.kurtosis(x) + 3]


def plain_spectral(w: np.ndarray) -> list:
    """Compute leading singular values, their shares, effective rank, condition number, gaps, nuclear norm."""
    s = np.linalg.svd(w, compute_uv=False)
    top = np.zeros(10)
    top[: len(s)] = s[:10]
    p = s[s > 0] / s.sum()
    smallest = s[s > s[0] * max(w.shape) * np.finfo(np.float32).eps].min()
    return [*top, *(top / s.sum()), np.exp(-(p * np.log(p)).sum()), s[0] / smallest, *(top[:-1] - top[1:]), s.sum()]


def plain_matrix_norms(w: np.ndarray) -> list:
    """Compute Frobenius, nuclear, spectral, L1, L∞ norms and two ratios."""
    frobenius, nuclear = np.linalg.norm(w, "fro"), np.linalg.norm(w, "nuc")
    spectral, l1, linf = np.linalg.norm(w, 2), np.linalg.norm(w, 1), np.linalg.norm(w, np.inf)
    return [frobenius, nuclear, spectral, l1, linf, nuclear / frobenius, spectral / frobenius]


def plain_distribution(w: np.ndarray) -> list:
    """Compute quantiles, interquartile range, mean absolute deviation, std / abs(mean), skewness, kurtosis."""
    x = w.ravel()
    q = np.quantile(x, [0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95])
    deviation = np.abs(x - x.mean()).mean()
    return [*q, q[4] - q[2], deviation, x.std() / abs(x.mean()), scipy.stats.skew(x), scipy.stats.kurtosis(x) + 3]


def plain_frequency(w: np.ndarray) -> list:
    """Compute the ten largest magnitudes of the Fourier transform, mean, std, max, and the ten's energy share."""
    magnitudes = np.abs(np.fft.fft2(w)).ravel()
    top = np.sort(magnitudes)[::-1][:10]
    share = (top**2).sum() / (magnitudes**2).sum()
    return [*top, magnitudes.mean(), magnitudes.std(), magnitudes.max(), share]


def plain_info_theoretic(w: np.ndarray) -> list:
    """Compute the entropy of a histogram of 50 bins, and the same over log 50."""
    counts = np.histogram(w, bins=50)[0]
    p = counts[counts > 0] / w.size
    entropy = -(p * np.log(p)).sum()
    return [entropy, entropy / np.log(50)]


def plain_ensemble(w: np.ndarray) -> list:
    """Compute the five parts again, as a plain script computes one representation after the other."""
    parts = (plain_spectral, plain_matrix_norms, plain_distribution, plain_frequency, plain_info_theoretic)
    return [feature for part in parts for feature in part(w)]


def plain_coupling(down: np.ndarray, up: np.ndarray, module: str) -> list:
    """Compute correlation and cosine of padded entries, the update's norm, correlation of singular values."""
    width = max(down.shape[1], len(up))
    a = np.pad(down, ((0, 0), (0, width - down.shape[1]))).ravel()
    b = np.pad(up.T, ((0, 0), (0, width - len(up)))).ravel()
    norm = np.sqrt(((up.T @ up) * (down @ down.T)).sum())  # of up @ down, which a plain script need not form either
    s, t = (np.linalg.svd(factor, compute_uv=False) for factor in (down, up))
    spectra = np.corrcoef(s, t)[0, 1] if len(s) > 1 else 0
    return [np.corrcoef(a, b)[0, 1], a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), norm, spectra]


@cache
def plain_projection(module: str, side: str, length: int) -> np.ndarray:
    """Draw the fixed projection of one side of a module, once, as a plain script would too."""
    seed = int.from_bytes(hashlib.sha256(f"{module}/{side}".encode()).digest(), "big")
    return np.random.Generator(np.random.PCG64(seed)).normal(0, np.sqrt(1 / 8), (length, 8))


def plain_update_sketch(down: np.ndarray, up: np.ndarray, module: str) -> list:
    """Compute the update between two fixed random projections."""
    p, q = plain_projection(module, "P", len(up)), plain_projection(module, "Q", down.shape[1])
    return list(((p.T @ up) @ (down @ q)).ravel())


def plain_gini(x: np.ndarray) -> float:
    """Compute the Gini coefficient: half of the mean difference of two values, over their mean."""
    return np.abs(x[:, None] - x).mean() / (2 * x.mean())


def plain_update_spectrum(down: np.ndarray, up: np.ndarray, module: str) -> list:
    """Compute the spectrum of the update, its ranks, condition and norms, and how its rows and columns differ."""
    w = up @ down
    core = np.linalg.qr(up)[1] @ np.linalg.qr(down.T)[1].T  # a plain script need not decompose the whole update either
    s = np.linalg.svd(core, compute_uv=False)
    top = np.zeros(10)
    top[: len(s)] = s[:10]
    p = s[s > 0] / s.sum()
    smallest = s[s > s[0] * max(w.shape) * np.finfo(np.float32).eps].min()
    square = (s**2).sum()
    ranks = [np.exp(-(p * np.log(p)).sum()), square / s[0] ** 2, square**2 / (s**4).sum()]
    spread = []
    for norms in (np.linalg.norm(w, axis=1), np.linalg.norm(w, axis=0)):
        spread += [norms.max() / norms.mean(), plain_gini(norms)]
    return [*top, *(top / s.sum()), *ranks, s[0] / smallest, s.sum(), np.sqrt(square), *spread]


def plain(loras: list[Lora], device: torch.device) -> Features:
    """Compute every representation of every layer and module, one by one; on the CPU, whatever the device."""
    features = defaultdict(list)
    for lora in loras:
        rows = defaultdict(list)
        for module, factors in zip(MODULES, lora, strict=True):
            down, up = (factor.astype(np.float64) for factor in factors)
            for w in (down, up):
                for name in MATRIX:
                    rows[name].append(globals()[f"plain_{name}"](w))
            for name in PAIR:
                rows[name].append(globals()[f"plain_{name}"](down, up, module))
        for name, row in rows.items():
            features[name].append(row)
    return {name: np.array(rows, dtype=np.float32) for name, rows in features.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The shared pass: all matrices of one shape at once
# ----------------------------------------------------------------------------------------------------------------------


def matrices_by_shape(loras: list[Lora], device: torch.device) -> Iterator[tuple[list[int], list[int], torch.Tensor]]:
    """Yield samples, layers and the stacked matrices of each shape."""
    places = defaultdict(list)
    for sample, lora in enumerate(loras):
        for layer, w in enumerate(factor for factors in lora for factor in factors):
            places[w.shape].append((sample, layer, torch.from_numpy(w)))
    for group in places.values():
        sample, layer, matrices = zip(*group, strict=True)
        yield list(sample), list(layer), torch.stack(matrices).to(device)


def pairs_by_shape(loras: list[Lora], device: torch.device) -> Iterator[tuple]:
    """Yield samples, module numbers, stacked down and up factors and module names of each pair of shapes."""
    places = defaultdict(list)
    for sample, lora in enumerate(loras):
        for number, (module, (down, up)) in enumerate(zip(MODULES, lora, strict=True)):
            row = (sample, number, torch.from_numpy(down), torch.from_numpy(up), module)
            places[down.shape, up.shape].append(row)
    for group in places.values():
        sample, number, down, up, modules = zip(*group, strict=True)
        yield list(sample), list(number), torch.stack(down).to(device), torch.stack(up).to(device), modules


def one_pass(loras: list[Lora], device: torch.device) -> Features:
    """Compute every representation of every layer and module, those of one shape together."""
    counts = {"layer": 2 * len(MODULES), "pair": len(MODULES)}
    widths = {name: (counts[REPRESENTATIONS[name].unit], len(REPRESENTATIONS[name].feature_names)) for name in NAMES}
    arrays = {name: np.empty((len(loras), *shape), dtype=np.float32) for name, shape in widths.items()}
    for sample, layer, w in matrices_by_shape(loras, device):
        for name, features in matrix_features(w, MATRIX).items():
            arrays[name][sample, layer] = features.cpu().numpy()
    for sample, number, down, up, modules in pairs_by_shape(loras, device):
        for name, features in pair_features(down, up, modules, None, PAIR).items():
            arrays[name][sample, number] = features.cpu().numpy()
    return arrays


NAMES = MATRIX + PAIR
# The parts of the pass, in an order in which each finds what it shares already computed.
PARTS: dict[str, Callable] = {
    "sort": lambda batch: batch.sorted,
    "moments": lambda batch: batch.moments,
    "quantiles": lambda batch: batch.quantiles,
    "singular values": lambda batch: batch.singular_values,
    "FFT": lambda batch: batch.magnitudes,
    "largest of the FFT": lambda batch: batch.feature("frequency"),
    "norms": lambda batch: batch.feature("matrix_norms"),
    "histogram": lambda batch: batch.feature("info_theoretic"),
    "all else": lambda batch: [batch.feature(name) for name in MATRIX],
}


def time_of_parts(loras: list[Lora], device: torch.device) -> dict[str, float]:
    """Measure milliseconds per LoRA of each part of the pass."""
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, function: Callable, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent[part] += 1e3 * (time.perf_counter() - start) / len(loras)
        return result

    for _, _, w in timed("stacking", lambda: list(matrices_by_shape(loras, device))):
        for block in w.split(samples_at_once(w)):
            batch = timed("checks", Shared, block)
            for part, function in PARTS.items():
                timed(part, function, batch)
    for _, _, down, up, modules in timed("stacking", lambda: list(pairs_by_shape(loras, device))):
        for name in PAIR:
            timed(name, pair_features, down, up, modules, None, [name])
    return spent


def largest_difference(ours: Features, theirs: Features) -> tuple[float, str]:
    """Return the largest relative difference between the two ways, and the feature that has it."""
    worst = []
    for name in NAMES:
        a, b = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        difference = np.nan_to_num(np.abs(a - b) / np.where(b == 0, 1, np.abs(b)), nan=np.inf)
        feature = np.unravel_index(difference.argmax(), difference.shape)[-1]
        worst.append((float(difference.max()), f"{name}.{REPRESENTATIONS[name].feature_names[feature]}"))
    return max(worst)


def main() -> None:
    """Alternate the two ways, compare them, and print the ratio."""
    parser = argparse.ArgumentParser(description="Time all hand-crafted features against numpy and scipy.")
    parser.add_argument("--samples", type=int, default=32, help="LoRAs of the shared pass; the plain way takes 4 (32)")
    parser.add_argument("--repeats", type=int, default=5, help="alternations; the medians count (5)")
    parser.add_argument("--rank", type=int, default=1, help="rank of the LoRAs (1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    loras = draw(args.samples, args.rank)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, {machine}")
    print(f"{args.samples} LoRAs of {len(MODULES)} modules, rank {args.rank}; {args.repeats} alternations")

    few = loras[:4]
    theirs = plain(few, device)  # warms up, as the next line does
    ours = {name: features[: len(few)] for name, features in one_pass(loras, device).items()}
    worst, feature = largest_difference(ours, theirs)
    times: dict[str, list[float]] = {"plain": [], "one_pass": []}
    parts = []
    for _ in range(args.repeats):
        for function, samples in ((plain, few), (one_pass, loras)):
            start = time.perf_counter()
            function(samples, device)  # its results come back to the CPU: nothing is left running
            times[function.__name__].append(1e3 * (time.perf_counter() - start) / len(samples))
        parts.append(time_of_parts(loras, device))
        print(f"plain {times['plain'][-1]:.1f} ms, one pass {times['one_pass'][-1]:.2f} ms per LoRA", flush=True)
    print("one pass, ms per LoRA by part (measured separately)")
    for part in parts[0]:
        print(f"  {part:20} {statistics.median(times_of_parts[part] for times_of_parts in parts):7.3f}")
    print(f"largest relative difference between the two: {worst:.1e} ({feature})")
    if not worst <= AGREEMENT:
        sys.exit(f"error: the two ways differ by more than {AGREEMENT}")
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    print(f"figure: {medians['one_pass']:.2f} ms/LoRA")
    print(f"ratio: {medians['plain'] / medians['one_pass']:.1f}")


if __name__ == "__main__":
    main()
