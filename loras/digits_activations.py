"""Inputs of the modules of the built-in digits' base model, recorded once, for --activations.

64 digits, each at a time of its own from image to noise, and the prompt that every LoRA is trained with. Of each module
that a LoRA changes, the file beside the base model has an input of every image: float32[64, in], by canonical module.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loras.building import write_atomically
from loras.digits_zoo import LORA_MODULES, WORDS, Weights, denoise, load_images, one_thread
from loras.keys import canonical_module

SEED = 0  # of the collections that the program builds
NAME = f"activations-seed{SEED}.safetensors"
BASE_NAME = f"base-model-seed{SEED}.safetensors"
INPUTS = 64
VERSION = 1  # of which of an image's inputs is taken
PROMPT = ("a", "picture", "of", "concept")


def write_beside(folder: Path) -> Path | None:
    """Record the inputs beside a base model, unless that is done; return the file if it has been written.

    The same base model gives the same bytes on one machine. Nothing is written where there is none.

    Raises:
        OSError: The file cannot be written.
    """
    base, path = folder / BASE_NAME, folder / NAME
    if not (recipe := _recipe_of(base)):
        return None
    recipe = json.dumps({"base": recipe, "inputs": INPUTS, "prompt": PROMPT, "seed": SEED, "version": VERSION})
    if _recipe_of(path) == recipe:
        return None
    with one_thread():
        inputs = record(load_file(base))
    write_atomically(path, save({canonical_module(name): rows for name, rows in inputs.items()}, {"recipe": recipe}))
    return path


def _recipe_of(path: Path) -> str | None:
    """Return what a file says that it was made of; None where it is not there, or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("recipe")
    except (FileNotFoundError, SafetensorError):
        return None


def record(weights: Weights) -> dict[str, Tensor]:
    """Return the inputs of each module of the base model, float32[64, in].

    Image i is at time (i + 1/2) / 64. Of the tokens of an image, or the words of the prompt, its input is one, in turn.
    """
    images, _ = load_images()
    generator = torch.Generator().manual_seed(SEED)
    x = images[torch.randperm(len(images), generator=generator)[:INPUTS]][None]
    noise = torch.randn(x.shape, generator=generator)
    t = ((torch.arange(INPUTS) + 0.5) / INPUTS)[None]
    mix = t[:, :, None, None]
    prompt, seen = torch.tensor([[WORDS.index(word) for word in PROMPT]]), _Seen(weights)
    with torch.no_grad(), seen:
        denoise(weights, (1 - mix) * x + mix * noise, t, prompt)
    return {name: _one_of_each(seen.inputs[name]) for name in LORA_MODULES}


def _one_of_each(inputs: Tensor) -> Tensor:
    """Return an input of each image, float[64, in], of those of all tokens, float[1, 64 T, in], or of P words."""
    rows, image = inputs[0], torch.arange(INPUTS)
    tokens = max(1, len(rows) // INPUTS)
    return rows[(image * tokens + image % tokens) % len(rows)].contiguous()


class _Seen(TorchFunctionMode):
    """A record of the inputs of linear modules while the denoiser computes, by module."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.module_of = {id(weights[f"{name}.weight"]): name for name in LORA_MODULES}
        self.inputs: dict[str, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call a function of torch; note the input where it is a module's."""
        if function is F.linear and (name := self.module_of.get(id(args[1]))):
            self.inputs[name] = args[0].clone()
        return function(*args, **(kwargs or {}))
