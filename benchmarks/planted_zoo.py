"""LoRAs of one rank and width whose class is planted in one way, drawn at random: what can a representation see?

    python benchmarks/planted_zoo.py written-640-1 OUT [--count 300] [--seed 0]

A collection is named by the way in which it holds the class, the width, and the rank of its LoRAs: 1, 4, or "mixed" (1,
2, 4 or 8, as a file draws). 16 modules, each width x width; ten classes in turn; files
``OUT/<class>/<number>.safetensors``.

Each LoRA has its own random down factor d of variance 1/width, as trainers begin, which hardly moves; its up factor is
what one step of gradient descent makes of it, ``up = G_c d + NOISE z`` with noise z of the size of the first term. The
gradient of class c is ``G_c = Σ_k u_k a_kᵀ / sqrt(16)``, k = 1..16, with normal directions u_k that the update writes
and a_k that it reads:

- written: the u_k are the class's own, the a_k those of all classes; so the class shows in what ΔW writes, while the
  sign and size with which a LoRA writes it are chance, as its d is.
- read: the a_k are the class's own, the u_k those of all classes. Here the down factor moves a little towards a_k.
- both: both are the class's own.
- scale: G is that of all classes; in class c the update is 1.2^c times as large, with a deviation of 10 % from file to
  file and module to module.
- pairs: G_c is a signed permutation of the inputs, the class's own. Each factor alone is normal noise in every class:
  only which up goes with which down tells the class.

A LoRA's updates have a common size, log-normal with a deviation of its kind's ``strength``, as rates and steps of
trainings differ. The numbers of ``KINDS`` are chosen so that kernels separate as on LoRAs of real trainings (support
vector machines on inner products of ΔW, on their cosines, and on those of ΔWΔWᵀ and ΔWᵀΔW, four collections):

    collection       ΔW  cosine  ΔWΔWᵀ  ΔWᵀΔW
    written-640-1    17      86    100     15
    read-320-1       95     100     20     60
    both-64-1        85      98     71     19

File i depends on the name, the seed and on i alone: the first files of a larger collection are those of a smaller one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CLASSES, DIRECTIONS = 10, 16
MODULES = tuple(f"transformer.transformer_blocks.{i}.attn1.{name}" for i in range(8) for name in ("to_q", "to_v"))
NOISE = 2.0
STEP, JITTER = 1.2, 0.1  # of the kind "scale"
UP_SIZE = 0.01
MIXED = (1, 2, 4, 8)
WIDTHS, RANKS = (64, 320, 640), ("1", "4", "mixed")


@dataclass(frozen=True)
class Kind:
    """A way to hold the class.

    Attributes:
        writes: Whether the directions that are written are the class's own.
        reads: Likewise those that are read.
        moves: How far the down factor has moved, as a share of the gradient's part of it.
        strength: Deviation of the logarithm of a LoRA's size.
    """

    writes: bool = False
    reads: bool = False
    moves: float = 0.0
    strength: float = 0.1


KINDS = {
    "written": Kind(writes=True),
    "read": Kind(reads=True, moves=0.7, strength=0.03),
    "both": Kind(writes=True, reads=True, moves=0.2),
    "scale": Kind(),
    "pairs": Kind(),
}


@dataclass(frozen=True)
class Planted:
    """A collection, by what it is named after; ``carrying`` are the first modules that hold the class."""

    kind: str
    width: int
    rank: str
    noise: float = NOISE
    carrying: int = len(MODULES)

    @classmethod
    def named(cls, name: str) -> Planted:
        """Return the collection of a name such as ``written-640-1``; ValueError where there is none."""
        kind, width, rank = [*name.split("-"), "", ""][:3]
        if kind not in KINDS or not width.isdigit() or rank not in RANKS:
            raise ValueError(f"{name}: no planted collection. Give KIND-WIDTH-RANK, such as written-640-1.")
        return cls(kind, int(width), rank)


@lru_cache(maxsize=2 * len(MODULES))
def _directions(seed: int, module: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw what each class writes and what it reads, float32[CLASSES, width, DIRECTIONS] each; class 0: of all."""
    generator = np.random.default_rng([seed, 1, module])
    return tuple(generator.standard_normal((2, CLASSES, width, DIRECTIONS), dtype=np.float32))


@lru_cache(maxsize=2 * len(MODULES) * CLASSES)
def _permutation(seed: int, module: int, concept: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the order and the signs of a class's permutation of inputs, int64[width] and float[width]."""
    generator = np.random.default_rng([seed, 2, module, concept])
    return generator.permutation(width), generator.choice([-1.0, 1.0], width)


def _gradient_step(planted: Planted, seed: int, module: int, concept: int, down: np.ndarray) -> tuple:
    """Return ``G_c d``, of variance 1, float[width, r], and the down factor's own gradient, float[r, width]."""
    if planted.kind == "pairs":
        order, signs = _permutation(seed, module, concept, planted.width)
        return (down[:, order] * signs).T * planted.width**0.5, 0.0
    kind, (written, read) = KINDS[planted.kind], _directions(seed, module, planted.width)
    u, a = written[concept * kind.writes], read[concept * kind.reads]  # (width, DIRECTIONS)
    response = a.T @ down.T  # (DIRECTIONS, r), of variance 1
    return u @ response / DIRECTIONS**0.5, response.T @ a.T / planted.width


def draw(number: int, planted: Planted, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the layers of LoRA ``number`` by name, float32; its class is the number modulo ten."""
    generator, kind = np.random.default_rng([seed, 0, number]), KINDS[planted.kind]
    rank = int(generator.choice(MIXED)) if planted.rank == "mixed" else int(planted.rank)
    strength = np.exp(kind.strength * generator.standard_normal())
    layers = {}
    for module, name in enumerate(MODULES):
        concept = number % CLASSES if module < planted.carrying else 0
        size = strength
        if planted.kind == "scale":
            size = STEP**concept * np.exp(JITTER * generator.standard_normal())
        down = generator.standard_normal((rank, planted.width)) / planted.width**0.5
        up, moved = _gradient_step(planted, seed, module, concept, down)
        up = up + planted.noise * generator.standard_normal(up.shape)
        layers[f"{name}.lora.down.weight"] = (down + kind.moves * moved).astype(np.float32)
        layers[f"{name}.lora.up.weight"] = (UP_SIZE * size * up).astype(np.float32)
    return layers


def write_zoo(out: Path, count: int, planted: Planted, seed: int = 0) -> None:
    """Write ``count`` LoRAs below ``out``, which must be empty or not there: else FileExistsError."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name another folder, or remove it")
    for number in range(count):
        path = out / str(number % CLASSES) / f"{number:06}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(layer) for name, layer in draw(number, planted, seed).items()}, path)


def main() -> None:
    """Write a collection."""
    parser = argparse.ArgumentParser(description="Write random LoRAs whose class is planted in one way.")
    parser.add_argument("name", metavar="KIND-WIDTH-RANK", help=f"kinds {', '.join(KINDS)}; rank {', '.join(RANKS)}")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be empty or not there")
    parser.add_argument("--count", type=int, default=300, help="number of LoRAs (300)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other LoRAs and directions (0)")
    args = parser.parse_args()
    try:
        write_zoo(args.out, args.count, Planted.named(args.name), args.seed)
    except (FileExistsError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
