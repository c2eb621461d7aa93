"""LoRA files and collections for tests."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experiment.settings import Networks

FILE_NAME = "pytorch_lora_weights.safetensors"


def write_lora(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> Path:
    """Write a safetensors file, with its folders; ``metadata`` becomes the ``metadata.json`` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    if metadata is not None:
        (path.parent / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    return path


def module_names(modules: int) -> list[str]:
    """Names of attention projections as diffusers writes them, in the network's order."""
    return [f"unet.down_blocks.0.attentions.{m}.transformer_blocks.0.attn1.to_q" for m in range(modules)]


def lora(modules: int = 2, rank: int = 2, width: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of one LoRA with Gaussian weights, down and up of each module in the network's order."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in module_names(modules):
        tensors[f"{module}.lora.down.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{module}.lora.up.weight"] = torch.randn(width, rank, generator=generator)
    return tensors


def write_collection(root: Path, classes: int = 2, per_class: int = 3, **shape: int) -> Path:
    """Folders ``class_<c>/<i>/`` with a weight file each, all of one shape (see `lora`), without metadata."""
    for c in range(classes):
        for i in range(per_class):
            write_lora(root / f"class_{c}" / f"{i:04}" / FILE_NAME, lora(seed=c * per_class + i, **shape))
    return root


def legacy_name(module: str, role: str) -> str:
    """Attention projections as early diffusers wrote them."""
    *path, projection = module.removesuffix(".0").split(".")
    return f"{'.'.join(path)}.processor.{projection}_lora.{role}.weight"


_AB = {"down": "A", "up": "B"}
# How writers name a factor of an attention projection that diffusers calls by a name in `module_names`' way.
STYLES = {
    "diffusers": lambda module, role: f"{module}.lora.{role}.weight",
    "diffusers text encoder": lambda module, role: f"{module}.lora_linear_layer.{role}.weight",
    "diffusers legacy": legacy_name,
    "PEFT": lambda module, role: f"base_model.model.{module}.lora_{_AB[role]}.weight",
    "PEFT with adapter name": lambda module, role: f"{module}.lora_{_AB[role]}.default.weight",
    "PEFT bare": lambda module, role: f"diffusion_model.{module}.lora_{_AB[role]}",
    "kohya": lambda module, role: f"lora_{module.replace('.', '_')}.lora_{role}.weight",
}


def planted_collection(
    root: Path,
    *,
    classes: int = 3,
    per_class: int = 20,
    modules: int = 4,
    rank: int = 2,
    width: int = 8,
    informative: tuple[int, ...] = (1, 4, 6),
    seed: int = 0,
    shuffle: bool = False,
) -> list[str]:
    """A collection where only the layers at the depths ``informative`` carry the class, in their scale.

    Class c scales them by 2**c, with a jitter of 5 % from file to file. All other weights are class-free noise.
    With ``shuffle`` the labels are permuted, and nothing carries the class.

    Returns:
        Names of the informative layers.
    """
    generator = np.random.default_rng(seed)
    concepts = np.repeat(np.arange(classes), per_class)
    labels = generator.permutation(concepts) if shuffle else concepts
    names = list(lora(modules))
    for i, (concept, label) in enumerate(zip(concepts, labels, strict=True)):
        tensors = lora(modules, rank, width, seed=int(generator.integers(2**62)))
        for depth in informative:
            tensors[names[depth]] *= 2.0 ** int(concept) * (1 + 0.05 * generator.standard_normal())
        path = root / f"class_{label}" / f"{i:04}" / FILE_NAME
        write_lora(path, tensors, {"category_label": f"class_{label}"})
    return [names[depth] for depth in informative]


# Hidden layers of another width: the same program, in a fraction of the time.
NARROW = Networks(classifier=(32, 32, 32), attention=(16,), projection=(32, 32, 32))


@contextmanager
def quick_runs() -> Iterator[None]:
    """Let runs of this process draw no figures and fit small forests: most of the time of a small one goes there."""
    import ablation_experiment

    analyse = ablation_experiment.analyse

    def with_small_forests(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("analysis.comparison.TREES", 10)
            return analyse(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation_experiment, "drawn_figures", lambda *_: {})
        patch.setattr(ablation_experiment, "analyse", with_small_forests)
        yield


def recorded(stack: type) -> type:
    """Return a class of stacks that remember the validation losses of each epoch in ``seen``."""

    class Recorded(stack):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = []

        def validation_losses(self):
            self.seen.append(super().validation_losses())
            return self.seen[-1]

    return Recorded
