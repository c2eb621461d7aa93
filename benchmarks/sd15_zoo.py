"""A collection in the shape of Stable Diffusion 1.5 LoRAs, drawn at random: for timing, and for what can be planted.

    python benchmarks/sd15_zoo.py N OUT [--seed 0] [--workers 1]

Rank-one LoRAs of the query and value projections of all 32 attentions (Rombach et al., 2022): 64 modules, 128
matrices, 99,648 numbers, 0.4 MB a file, as ``OUT/<class>/<number>.safetensors`` in float32, ten classes in turn.

All numbers are normal: a down factor's with the deviation of PEFT's initial weights, 1/sqrt(3·in), an up factor's with
0.01. Only the modules ``PLANTED`` carry the class, in two ways.

- Scale: the entries of their up factor have the deviation 0.01·g·1.1^c in class c = 0..9; g, log-normal with a
  deviation of 10 %, differs from file to file and module to module. So a single layer predicts the class in part.
- Direction: up = 0.01·g·1.1^c·(sqrt(3/4)·z + s·u_c/2) and down = (sqrt(3/4)·z' + s·v/2) / sqrt(3·in) with noise z, z',
  a direction u_c of each class and module, v of each module, and the sign s = ±1 of each file and module. It
  leaves the deviations as they are and cannot be seen in the mean of a factor, as s decides its sign, but it can
  in that of their product.

File i depends on the seed and on i alone: the first files of a larger collection are those of a smaller one.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CLASSES = 10
TEXT = 768  # width of the text encoder, which attn2.to_v reads
NUMBERS = 99_648
UP_STD, STEP, JITTER = 0.01, 1.1, 0.1
SHARE = 0.25  # of a planted factor's variance is the direction's


def _attentions() -> dict[str, int]:
    """Return the width of each of the 16 transformer blocks by name, in the network's order."""
    down = [(f"down_blocks.{block}", 320 * 2**block, 2) for block in (0, 1, 2)]
    up = [(f"up_blocks.{block}", 320 * 2 ** (3 - block), 3) for block in (1, 2, 3)]
    return {
        f"unet.{block}.attentions.{i}.transformer_blocks.0": width
        for block, width, count in [*down, ("mid_block", 1280, 1), *up]
        for i in range(count)
    }


# Module -> (in, out).
MODULES = {
    f"{block}.{attention}.{projection}": (TEXT if (attention, projection) == ("attn2", "to_v") else width, width)
    for block, width in _attentions().items()
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_v")
}
# Layer, as the files name it -> shape; down before up.
SHAPES = {
    f"{module}.lora.{role}.weight": shape
    for module, (n_in, n_out) in MODULES.items()
    for role, shape in (("down", (1, n_in)), ("up", (n_out, 1)))
}
PLANTED = tuple(
    f"unet.{block}.transformer_blocks.0.{projection}"
    for block, projection in (
        ("down_blocks.1.attentions.0", "attn2.to_v"),
        ("mid_block.attentions.0", "attn2.to_q"),
        ("up_blocks.1.attentions.2", "attn1.to_v"),
        ("up_blocks.2.attentions.1", "attn2.to_v"),
    )
)
assert len(MODULES) == 64 and sum(rows * cols for rows, cols in SHAPES.values()) == NUMBERS


@lru_cache(maxsize=1)
def _layout() -> tuple[np.ndarray, dict[str, slice]]:
    """Return the deviation of every number of a file, float32[NUMBERS], and the slice of each layer."""
    ends = np.cumsum([0, *(rows * cols for rows, cols in SHAPES.values())]).tolist()
    places = {name: slice(a, b) for name, a, b in zip(SHAPES, ends[:-1], ends[1:], strict=True)}
    deviations = np.full(NUMBERS, UP_STD, dtype=np.float32)
    for name, (rows, cols) in SHAPES.items():
        if rows == 1:
            deviations[places[name]] = (3 * cols) ** -0.5
    return deviations, places


@lru_cache(maxsize=64)
def _directions(seed: int, planted: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the directions u_c [CLASSES, out] and v [in] of a planted module, float32, of unit variance."""
    n_in, n_out = MODULES[PLANTED[planted]]
    generator = np.random.default_rng([seed, 1, planted])
    return tuple(generator.standard_normal(shape, dtype=np.float32) for shape in ((CLASSES, n_out), n_in))


def draw(number: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the layers of LoRA ``number`` by name, each float32 of its shape; its class is the number modulo ten."""
    concept = number % CLASSES
    deviations, places = _layout()
    generator = np.random.default_rng([seed, 0, number])
    drawn = generator.standard_normal(NUMBERS + 2 * len(PLANTED), dtype=np.float32)
    values, extra = drawn[:NUMBERS], drawn[NUMBERS:].reshape(2, len(PLANTED)).astype(float)
    for i, module in enumerate(PLANTED):
        down, up = (values[places[f"{module}.lora.{role}.weight"]] for role in ("down", "up"))  # views
        u, v = _directions(seed, i)
        for factor, direction, scale in ((down, v, 1), (up, u[concept], np.exp(JITTER * extra[0, i]) * STEP**concept)):
            factor *= scale * (1 - SHARE) ** 0.5
            factor += scale * SHARE**0.5 * np.copysign(1, extra[1, i]) * direction
    values *= deviations
    return {name: values[places[name]].reshape(shape) for name, shape in SHAPES.items()}


def write_lora(number: int, out: Path, seed: int) -> None:
    """Write LoRA ``number`` below ``out``, in the folder of its class."""
    save_file(draw(number, seed), out / str(number % CLASSES) / f"{number:06}.safetensors")


def write_zoo(out: Path, count: int, seed: int = 0, workers: int = 1) -> None:
    """Write ``count`` LoRAs below ``out`` by so many processes.

    The folder must be empty or not there: else FileExistsError.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name another folder, or remove it")
    for concept in range(min(count, CLASSES)):
        (out / str(concept)).mkdir(parents=True, exist_ok=True)
    write = partial(write_lora, out=out, seed=seed)
    if workers == 1:
        for number in range(count):
            write(number)
        return
    with get_context("fork").Pool(workers) as pool:  # workers have what is imported here
        pool.map(write, range(count), chunksize=20)


def main() -> None:
    """Write a collection and print how fast."""
    parser = argparse.ArgumentParser(description="Write random LoRAs of Stable Diffusion 1.5's shapes.")
    parser.add_argument("count", metavar="N", type=int, help="number of LoRAs, 0.4 MB each")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be empty or not there")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other LoRAs and directions (0)")
    parser.add_argument("--workers", type=int, default=1, help="processes that write (1)")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        write_zoo(args.out, args.count, args.seed, args.workers)
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    seconds = time.perf_counter() - start
    print(f"{args.count} LoRAs of {len(SHAPES)} layers, {NUMBERS:,} numbers each, in {seconds:.1f} s")
    print(f"figure: {args.count / seconds:.0f} files/s")


if __name__ == "__main__":
    main()
