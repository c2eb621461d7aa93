"""Collections in the shapes of SDXL and Llama 3 8B LoRAs, drawn at random: for time and memory of wide LoRAs.

    python benchmarks/wide_zoo.py {sdxl,llama} N OUT [--rank 8] [--seed 0]
    python benchmarks/whole_run.py --dataset=OUT --quick

- sdxl: every linear module of the transformer blocks of Stable Diffusion XL's UNet (Podell et al., 2023), in kohya's
  names and float16: 722 modules, 21,278,720 numbers at rank 8, 43 MB a file.
- llama: the query and value projections of Llama 3 8B (Meta, 2024), in PEFT's names and float32: 64 modules, 3,407,872
  numbers at rank 8, 14 MB a file.

Files lie as ``OUT/<class>/<number>.safetensors``, two classes in turn. Numbers are normal, as in `sd15_zoo`: a down
factor's deviation is 1/sqrt(3·in), an up factor's 0.01; in class 1 that of every tenth module's up is
1.3 times as large.
File i depends on the seed and on i alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CLASSES = 2
UP_STD, STEP, PLANTED = 0.01, 1.3, 10
TEXT = 2048  # width of SDXL's text encoders, which attn2 reads


def _sdxl() -> Iterator[tuple[str, int, int]]:
    """Yield name, inputs and outputs of SDXL's modules: 11 transformers of 2 or 10 blocks."""
    places = [(f"input_blocks_{block}_1", 640, 2) for block in (4, 5)]
    places += [(f"input_blocks_{block}_1", 1280, 10) for block in (7, 8)]
    places += [("middle_block_1", 1280, 10)]
    places += [(f"output_blocks_{block}_1", 1280, 10) for block in (0, 1, 2)]
    places += [(f"output_blocks_{block}_1", 640, 2) for block in (3, 4, 5)]
    for place, width, depth in places:
        yield f"lora_unet_{place}_proj_in", width, width
        for i in range(depth):
            block = f"lora_unet_{place}_transformer_blocks_{i}"
            for attention, reads in (("attn1", width), ("attn2", TEXT)):
                yield f"{block}_{attention}_to_q", width, width
                yield f"{block}_{attention}_to_k", reads, width
                yield f"{block}_{attention}_to_v", reads, width
                yield f"{block}_{attention}_to_out_0", width, width
            yield f"{block}_ff_net_0_proj", width, 8 * width
            yield f"{block}_ff_net_2", 4 * width, width
        yield f"lora_unet_{place}_proj_out", width, width


def _llama() -> Iterator[tuple[str, int, int]]:
    """Yield name, inputs and outputs of Llama's modules: grouped queries, so that values are narrower."""
    for i in range(32):
        attention = f"base_model.model.model.layers.{i}.self_attn"
        yield f"{attention}.q_proj", 4096, 4096
        yield f"{attention}.v_proj", 4096, 1024


# Kind -> modules (name, in, out), keys of down and up, dtype, and whether each module has its alpha.
KINDS = {
    "sdxl": (tuple(_sdxl()), ("lora_down", "lora_up"), np.float16, True),
    "llama": (tuple(_llama()), ("lora_A", "lora_B"), np.float32, False),
}
assert len(KINDS["sdxl"][0]) == 722 and len(KINDS["llama"][0]) == 64


def draw(kind: str, number: int, rank: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw LoRA ``number`` by name of its tensors; its class is the number modulo two."""
    modules, (down, up), dtype, has_alpha = KINDS[kind]
    generator, tensors = np.random.default_rng([seed, number]), {}
    for position, (module, n_in, n_out) in enumerate(modules):
        size = UP_STD * (STEP if number % CLASSES and position % PLANTED == 0 else 1)
        drawn = generator.standard_normal(rank * (n_in + n_out), dtype=np.float32)
        first, second = drawn[: rank * n_in].reshape(rank, n_in), drawn[rank * n_in :].reshape(n_out, rank)
        tensors[f"{module}.{down}.weight"] = (first * (3 * n_in) ** -0.5).astype(dtype)
        tensors[f"{module}.{up}.weight"] = (second * size).astype(dtype)
        if has_alpha:
            tensors[f"{module}.alpha"] = np.array(rank, dtype)
    return tensors


def write_zoo(kind: str, out: Path, count: int, rank: int = 8, seed: int = 0) -> None:
    """Write ``count`` LoRAs below ``out``, which must be empty or not there: else FileExistsError."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name another folder, or remove it")
    for concept in range(min(count, CLASSES)):
        (out / f"concept-{concept}").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        save_file(draw(kind, number, rank, seed), out / f"concept-{number % CLASSES}" / f"{number:04}.safetensors")


def main() -> None:
    """Write a collection and print its size."""
    parser = argparse.ArgumentParser(description="Write random LoRAs of SDXL's or Llama's shapes.")
    parser.add_argument("kind", choices=sorted(KINDS), help="whose modules")
    parser.add_argument("count", metavar="N", type=int, help="number of LoRAs: 43 MB (sdxl) or 14 MB (llama) each")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be empty or not there")
    parser.add_argument("--rank", type=int, default=8, help="of every module (8)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other LoRAs (0)")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        write_zoo(args.kind, args.out, args.count, args.rank, args.seed)
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    modules, seconds = KINDS[args.kind][0], time.perf_counter() - start
    numbers = args.rank * sum(n_in + n_out for _, n_in, n_out in modules)
    print(f"{args.count} LoRAs of {len(modules)} modules, {numbers:,} numbers each, in {seconds:.1f} s")


if __name__ == "__main__":
    main()
