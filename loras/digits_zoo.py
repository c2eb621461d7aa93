"""A built-in collection of real LoRAs: one per sample, trained on scikit-learn's digits; the class is the digit.

A small text-conditioned denoiser is trained once on all 1,797 digits by flow matching (Lipman et al., 2023), in
the shape of a diffusion transformer (Peebles & Xie, 2023): self-attention ``attn1``, cross-attention to a
prompt ``attn2``, MLP. Then every sample of the collection is a LoRA (Hu et al., 2022), fine-tuned on 4 to 16
images of one digit, with the same new prompt word for every concept, so that the class cannot be read off the
prompt. The files have the layout and the names of the field::

    <out>/3/00013/pytorch_lora_weights.safetensors    transformer.transformer_blocks.0.attn1.to_q.lora.down.weight
    <out>/3/00013/metadata.json                       category_label, image_group, num_images, rank, ...

LoRA i is the same whatever the size of the collection, so 100 LoRAs are the first 100 of 1,000. A collection may also
hold each LoRA at several steps of its training, and a table whose column ``step`` makes each of them a sample::

    <out>/metadata.csv                                            file_name, category_label, step, image_group
    <out>/3/00013/checkpoint-8/pytorch_lora_weights.safetensors   a metadata.json beside it, as above

All randomness
comes from generators seeded by a hash of (seed, purpose, index). The same seed gives the same bytes on one
machine: all is trained by one thread, as small tensors gain little from two, and on a busy machine lose all.

Shape letters: N images, M LoRAs in a stack, S steps, B minibatch, T image tokens, P prompt tokens, D width,
r rank, H heads.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from sklearn.datasets import load_digits
from torch import Tensor

from loras.building import (
    METADATA_NAME,
    WEIGHTS_NAME,
    locked,
    partial_folder,
    read_object,
    write_atomically,
    write_lora,
)
from loras.names import plain

Report = Callable[..., None]  # stage, done, total, and the share of the work where it is another; see `Progress`
Weights = dict[str, Tensor]  # frozen base model, by name
Factors = dict[str, tuple[Tensor, Tensor]]  # module -> (down float[M, r, in], up float[M, out, r])

CLASSES, IMAGE_GROUPS = 10, 5
TOKENS, PATCH = 16, 4  # 16 patches of 2x2 pixels
WIDTH, MLP_WIDTH = 64, 128
HEADS, BLOCKS = 4, 4
NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["a", "picture", "of", "concept", *NUMERALS]
BASE_STEPS, BASE_BATCH, BASE_LR = 600, 128, 2e-3
RANK = 4
LORA_STEPS, LORA_BATCH, LORA_LR = 60, 8, 1e-3
MIN_IMAGES, MAX_IMAGES = 4, 16
STACK = 100  # LoRAs trained as one tensor program; part of the recipe, as sums may round by stack size
PROGRESS_EVERY = 10  # steps, between reports
CHECKPOINT_EVERY = 50  # base steps, after which a stopped training continues
LORA_MODULES = [
    f"transformer_blocks.{block}.{attention}.{projection}"
    for block in range(BLOCKS)
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
]
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam, by the names of torch
RECIPE_NAME, TABLE_NAME = "recipe.json", "metadata.csv"
MAX_SHOWN = 1000  # characters of another recipe in a message

# Measured on a core of a server CPU; a guide for the announcement, not a promise.
SECONDS_BASE, SECONDS_PER_LORA, BYTES_PER_LORA = 45.0, 0.23, 82_000  # bytes in blocks of 4 KiB


def estimate(count: int, steps: Sequence[int] = ()) -> tuple[float, int]:
    """Estimate the cost of building ``count`` LoRAs from nothing, each as it is at these steps.

    Returns:
        Seconds on a core, in steps of whole stacks as only whole stacks are trained, and bytes on disk.
    """
    trained = math.ceil(count / STACK) * STACK
    return SECONDS_BASE + SECONDS_PER_LORA * trained, BYTES_PER_LORA * count * max(1, len(steps))


def build(out: Path, count: int, *, seed: int = 0, progress: Report | None = None, steps: Sequence[int] = ()) -> None:
    """Train a collection of ``count`` LoRAs and put it at ``out``; do nothing if it exists already.

    Another process that is training it is waited for.

    The work is done in ``<out>.partial`` beside ``out``, which is renamed when whole: a folder named ``out`` is
    never half-built. Calling this again continues a build that was interrupted; LoRAs that are whole are kept, and the
    bytes are those of an uninterrupted build. The base model stays beside ``out`` as
    ``base-model-seed<seed>.safetensors`` and serves collections of other sizes.

    Args:
        out: Folder to make. Its parents are made too.
        count: Number of LoRAs, at least 1. LoRA i has class ``i % 10`` and image group ``(i // 10) % 5``.
        seed: Names the collection; any integer.
        progress: Called as ``progress(stage, done, total)``, with stage "base model" in steps, then "LoRAs" in
            LoRAs, and on the way to these with the share of the work. What it raises ends the build, which can be
            continued.
        steps: Of ``LORA_STEPS`` those at which each LoRA is kept, ascending; none: only as it is at the end.

    Raises:
        ValueError: ``count`` is below 1, or the steps are none of the training's.
        FileExistsError: ``out`` or ``<out>.partial`` is something else than this collection.
        OSError: The record of what is at ``out`` or ``<out>.partial`` cannot be read.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if list(steps) != sorted({*steps} & {*range(1, LORA_STEPS + 1)}):
        raise ValueError(f"steps must ascend from 1 to {LORA_STEPS} at most, not {list(steps)}")
    out = Path(out)
    recipe = _recipe(seed, count, steps)
    if out.exists():
        _check_whole_collection(out, recipe)
        return

    def check(partial: Path) -> None:
        _check_same_collection(partial, recipe, "Remove it, or finish it with its own settings")

    with partial_folder(out, check, _say_waiting) as partial:
        if partial is None:  # another process has put something at ``out`` meanwhile
            _check_whole_collection(out, recipe)
            return
        write_atomically(partial / RECIPE_NAME, json.dumps(recipe).encode())
        base_path = out.parent / f"base-model-seed{seed}.safetensors"
        with one_thread():
            _build_loras(partial, base_path, (count, seed, steps), progress or (lambda *_: None))


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _say_waiting(holder: str) -> None:
    print(f"waiting for {holder}, which trains the same collection", flush=True)


def _build_loras(folder: Path, base_path: Path, what: tuple[int, int, Sequence[int]], report: Report) -> None:
    """Train and write the LoRAs that are not in a folder yet, and the base model before them.

    ``what`` are count, seed and steps, as of `build`.
    """
    count, seed, steps = what
    images, labels = load_images()
    groups = image_groups(labels, seed)
    base = _load_or_train_base(base_path, images, labels, seed, report)
    if steps:
        write_atomically(folder / TABLE_NAME, _table(count, steps))
    for first in range(0, count, STACK):
        end = min(first + STACK, count)
        missing = [i for i in range(first, end) if not all(map(_is_whole, _folders(folder, i, steps)))]
        if missing:
            # The whole stack, even for one missing LoRA: its bytes then depend on neither count nor history.
            plans = [plan_lora(seed, i, groups) for i in range(first, first + STACK)]

            def report_steps(done: int, first: int = first, end: int = end) -> None:
                report("LoRAs", first, count, (first + (end - first) * done / LORA_STEPS) / count)

            def save_step(step: int, factors: Factors, missing: list = missing, plans: list = plans) -> None:
                for i in missing:
                    place = _folders(folder, i, steps)[steps.index(step)] if steps else _folder(folder, i)
                    _save_lora(place, plans[i % STACK], factors, i % STACK)

            train_stack(base, images, plans, report=report_steps, keep=(steps or (LORA_STEPS,), save_step))
        report("LoRAs", end, count)


def is_built_here(folder: Path) -> bool:
    """Return whether a folder says that it is, or will become, a collection that this module builds.

    Anyone can write that: a folder is the program's own only where it lies in the program's own place.

    Raises:
        OSError: Its recipe cannot be read.
    """
    recipe = read_object(folder / RECIPE_NAME)
    return recipe is not None and recipe.get("built_by") == "digits_zoo"


def load_images() -> tuple[Tensor, np.ndarray]:
    """Load scikit-learn's digits as patches: pixels scaled to [-1, 1], 8x8 cut into 16 patches of 2x2.

    Returns images float32[1797, T, 4], patches in reading order, and labels int64[1797].
    """
    digits = load_digits()
    pixels = torch.from_numpy(digits.images / 8.0 - 1.0).float()
    patches = pixels.reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4)  # N, patch row, patch column, 2, 2
    return patches.reshape(-1, TOKENS, PATCH).contiguous(), digits.target


def image_groups(labels: np.ndarray, seed: int) -> dict[tuple[int, int], Tensor]:
    """Draw five disjoint groups of each class's images: (digit, group) -> indices, int64[about 36].

    A LoRA draws from one group only, so that a split by group keeps images apart.
    """
    groups = {}
    for digit in range(CLASSES):
        indices = torch.from_numpy(np.flatnonzero(labels == digit))
        order = torch.randperm(len(indices), generator=_generator(seed, "image groups", digit))
        parts = indices[order].tensor_split(IMAGE_GROUPS)
        groups |= {(digit, group): part for group, part in enumerate(parts)}
    return groups


def denoise(weights: Weights, x: Tensor, t: Tensor, prompt: Tensor, factors: Factors | None = None) -> Tensor:
    """Predict the velocity with the denoiser, for M prompts, each with its own B images and its own LoRA.

    A module with factors (down, up) computes ``W x + up (down x)``: the update is ``up @ down``, scale 1.

    Args:
        weights: The base model.
        x: Noisy images, float[M, B, T, 4].
        t: Times in [0, 1], 1 is pure noise, float[M, B].
        prompt: Word indices, int64[M, P].
        factors: None for the base model alone.

    Returns:
        Prediction of ``noise - image``, float[M, B, T, 4].
    """
    factors = factors or {}
    (stack, batch), width = t.shape, weights["position"].shape[1]
    time = _linear(weights, "time.1", F.silu(_linear(weights, "time.0", _sinusoids(t, width), factors)), factors)
    h = _linear(weights, "patch_in", x, factors) + weights["position"] + time[:, :, None]
    h = h.reshape(stack, batch * TOKENS, width)
    # Not weights["words"][prompt]: the gradient of indexing is summed by threads in whatever order they come.
    words = F.embedding(prompt, weights["words"]) + weights["word_position"]  # M, P, D
    for block in range(BLOCKS):
        name = f"transformer_blocks.{block}"
        norm = F.layer_norm(h, (width,))
        h = h + _attention(weights, f"{name}.attn1", norm, norm, stack * batch, factors)
        # Images of one LoRA share its prompt, so all their tokens can be the queries of one attention.
        h = h + _attention(weights, f"{name}.attn2", F.layer_norm(h, (width,)), words, stack, factors)
        hidden = F.gelu(_linear(weights, f"{name}.mlp.0", F.layer_norm(h, (width,)), factors))
        h = h + _linear(weights, f"{name}.mlp.1", hidden, factors)
    return _linear(weights, "patch_out", F.layer_norm(h, (width,)), factors).reshape(x.shape)


def _attention(weights: Weights, name: str, x: Tensor, context: Tensor, sequences: int, factors: Factors) -> Tensor:
    """Compute multi-head attention of x float[M, B*T, D] to context float[M, any, D], cut into separate sequences."""

    def heads(projection: str, source: Tensor) -> Tensor:  # sequences, H, tokens, D / H
        y = _linear(weights, f"{name}.{projection}", source, factors)
        return y.reshape(sequences, -1, HEADS, y.shape[-1] // HEADS).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(heads("to_q", x), heads("to_k", context), heads("to_v", context))
    return _linear(weights, f"{name}.to_out.0", mixed.transpose(1, 2).reshape(x.shape), factors)


def _linear(weights: Weights, name: str, x: Tensor, factors: Factors) -> Tensor:
    """Compute ``x W^T``, plus ``(x down^T) up^T`` where the module has factors."""
    y = F.linear(x, weights[f"{name}.weight"])
    if name not in factors:
        return y
    down, up = factors[name]
    return y.baddbmm_(x @ down.mT, up.mT)  # in place: copies of y were a large part of the time


def _sinusoids(t: Tensor, width: int) -> Tensor:
    """Compute sines and cosines of t at D/2 frequencies from 1 to 1,000 (Vaswani et al., 2017), float[M, B, D]."""
    angles = t[..., None] * torch.logspace(0, 3, width // 2, dtype=t.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def init_base(seed: int, width: int = WIDTH) -> Weights:
    """Draw a random base model: matrices N(0, 1 / inputs), embeddings N(0, 1), positions N(0, 0.02^2)."""
    mlp_width = width * MLP_WIDTH // WIDTH
    linears = {"patch_in": (width, PATCH), "time.0": (width, width), "time.1": (width, width)}
    linears |= dict.fromkeys(LORA_MODULES, (width, width))
    for block in range(BLOCKS):
        linears[f"transformer_blocks.{block}.mlp.0"] = (mlp_width, width)
        linears[f"transformer_blocks.{block}.mlp.1"] = (width, mlp_width)
    linears["patch_out"] = (PATCH, width)
    generator = _generator(seed, "base init", 0)
    weights = {"words": torch.randn(len(WORDS), width, generator=generator)}
    weights["word_position"] = 0.02 * torch.randn(4, width, generator=generator)
    weights["position"] = 0.02 * torch.randn(TOKENS, width, generator=generator)
    for name, (rows, columns) in linears.items():
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
    return weights


def train_base(
    images: Tensor,
    labels: np.ndarray,
    seed: int,
    report: Report,
    width: int = WIDTH,
    checkpoint: Path | None = None,
) -> Weights:
    """Train the denoiser on all digits with prompts such as "a picture of seven".

    Flow matching: ``x_t = (1 - t) x + t noise``, t uniform, mean squared error to ``noise - x``. The word
    "concept" is never seen here: it is the new word that every LoRA is trained with. ``images`` are
    float32[N, T, 4], ``labels`` int64[N]; ``report`` is called every ``PROGRESS_EVERY`` steps; ``width`` is D.
    A training that was stopped continues at its ``checkpoint``, to the same weights.
    """
    weights = {name: tensor.requires_grad_() for name, tensor in init_base(seed, width).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=BASE_LR)
    generator = _generator(seed, "base batches", 0)
    prompts = torch.tensor([_prompt(NUMERALS[digit]) for digit in labels])
    first = 0 if checkpoint is None else _continue_at(checkpoint, seed, weights, optimizer, generator)
    for step in range(first, BASE_STEPS):
        chosen = torch.randint(len(images), (BASE_BATCH,), generator=generator)
        t = torch.rand(BASE_BATCH, 1, generator=generator)
        x = images[chosen][:, None]  # every image has its own prompt: M = batch, B = 1
        noise = torch.randn(x.shape, generator=generator)
        loss = flow_loss(weights, x, t, noise, prompts[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Linear decay to zero: the last steps average out the noise of the batches.
        optimizer.param_groups[0]["lr"] = BASE_LR * (1 - (step + 1) / BASE_STEPS)
        if checkpoint is not None and (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < BASE_STEPS:
            _save_checkpoint(checkpoint, seed, step + 1, weights, optimizer, generator)
        if (step + 1) % PROGRESS_EVERY == 0 or step + 1 == BASE_STEPS:
            report("base model", step + 1, BASE_STEPS)
    return {name: tensor.detach() for name, tensor in weights.items()}


def _save_checkpoint(
    path: Path, seed: int, step: int, weights: Weights, optimizer: torch.optim.Adam, generator: torch.Generator
) -> None:
    """Write all that a training is continued from; the learning rate follows from the step."""
    tensors = {f"weight {name}": weight.detach() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"{moment} {name}": tensor for moment, tensor in optimizer.state[weight].items()}
    tensors["generator"] = generator.get_state()
    write_atomically(path, save(tensors, {"recipe": _base_recipe(seed), "step": str(step)}))


def _continue_at(
    path: Path, seed: int, weights: Weights, optimizer: torch.optim.Adam, generator: torch.Generator
) -> int:
    """Restore a training from its checkpoint; return the steps that are done, 0 where there is none of its recipe."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("recipe") != _base_recipe(seed):
                return 0
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (FileNotFoundError, SafetensorError):
        return 0  # absent or cut short
    step = int(facts["step"])
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weight {name}"])
            optimizer.state[weight] = {moment: tensors[f"{moment} {name}"] for moment in MOMENTS}
    optimizer.param_groups[0]["lr"] = BASE_LR * (1 - step / BASE_STEPS)
    generator.set_state(tensors["generator"])
    print(f"the base model is continued at step {step} of {BASE_STEPS}", flush=True)
    return step


def flow_loss(
    weights: Weights, x: Tensor, t: Tensor, noise: Tensor, prompt: Tensor, factors: Factors | None = None
) -> Tensor:
    """Compute the flow-matching loss of each of the M models: mean squared error to ``noise - x``, float[M].

    ``x`` are clean images, ``noise`` is of the same shape; the other arguments are those of ``denoise``.
    """
    mix = t[:, :, None, None]
    predicted = denoise(weights, (1 - mix) * x + mix * noise, t, prompt, factors)
    return (predicted - (noise - x)).square().mean(dim=(1, 2, 3))


def _prompt(word: str) -> list[int]:
    return [WORDS.index(w) for w in ("a", "picture", "of", word)]


def _load_or_train_base(path: Path, images: Tensor, labels: np.ndarray, seed: int, report: Report) -> Weights:
    """Load the base model from its file if the recipe is the same, else train it and keep it there.

    Collections of several sizes share it: one process trains it, the others wait.
    """
    recipe, checkpoint = _base_recipe(seed), path.with_name(f"{path.name}.partial")
    with locked(path.with_name(f".{path.name}.lock"), _say_waiting):
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("recipe") == recipe:
                    return load_file(path)
        except (FileNotFoundError, SafetensorError):
            pass  # absent or cut short: train it again
        weights = train_base(images, labels, seed, report, checkpoint=checkpoint)
        write_atomically(path, save(weights, {"recipe": recipe}))
        checkpoint.unlink(missing_ok=True)
        return weights


@dataclass(frozen=True)
class LoraPlan:
    """All random draws of one LoRA, from its own generator."""

    digit: int
    group: int  # 0 to 4, within the digit
    images: Tensor  # int64[4 to 16], without repetition, all of one image group
    picks: Tensor  # int64[S, B], which image
    t: Tensor  # float32[S, B]
    noise: Tensor  # float32[S, B, T, 4]
    downs: Tensor  # float32[modules, r, D]


def plan_lora(
    seed: int,
    index: int,
    groups: dict[tuple[int, int], Tensor],
    modules: int = len(LORA_MODULES),
    rank: int = RANK,
    width: int = WIDTH,
) -> LoraPlan:
    """Draw LoRA ``index``: its images, minibatches and noise, and down factors as PEFT draws them, U(±1 / sqrt(D)).

    Wider downs, N(0, 1 / r^2) as in diffusers, hide the concept: training then moves them too little to matter,
    and a probe on all layers' statistics fell from 88 to 69 % (300 LoRAs, chance 10).
    """
    digit, group = index % CLASSES, index // CLASSES % IMAGE_GROUPS
    pool = groups[digit, group]
    generator = _generator(seed, "lora", index)
    num_images = int(torch.randint(MIN_IMAGES, MAX_IMAGES + 1, (1,), generator=generator))
    images = pool[torch.randperm(len(pool), generator=generator)[:num_images]]
    picks = images[torch.randint(num_images, (LORA_STEPS, LORA_BATCH), generator=generator)]
    t = torch.rand(LORA_STEPS, LORA_BATCH, generator=generator)
    noise = torch.randn(LORA_STEPS, LORA_BATCH, TOKENS, PATCH, generator=generator)
    downs = (2 * torch.rand(modules, rank, width, generator=generator) - 1) / math.sqrt(width)
    return LoraPlan(digit, group, images, picks, t, noise, downs)


def train_stack(
    base: Weights,
    images: Tensor,
    plans: list[LoraPlan],
    modules: list[str] = LORA_MODULES,
    report: Callable[[int], None] = lambda steps: None,
    keep: tuple[Sequence[int], Callable[[int, Factors], None]] = ((), lambda step, factors: None),
) -> Factors:
    """Fine-tune all planned LoRAs at once, as one tensor program over frozen, shared base weights.

    The loss is summed over the stack, so that each LoRA gets exactly its own gradient, and Adam works element
    by element: every LoRA is trained as if alone. Up factors start at zero, so training starts at the base model.
    ``images`` are float[N, T, 4]; the dtype of ``base`` is that of the training and of the factors returned.
    ``modules`` are those that the down factors of the plans are of, in their order; ``report`` is called with the
    steps that are done, every ``PROGRESS_EVERY``; the function in ``keep`` with each of its steps and the factors then.
    """
    dtype = base["position"].dtype
    downs = torch.stack([plan.downs for plan in plans], dim=1).to(dtype)  # modules, M, r, D
    factors = {
        module: (down.clone().requires_grad_(), torch.zeros_like(down.mT).contiguous().requires_grad_())
        for module, down in zip(modules, downs, strict=True)
    }
    optimizer = torch.optim.Adam([factor for pair in factors.values() for factor in pair], lr=LORA_LR)
    prompt = torch.tensor([_prompt("concept")] * len(plans))
    for step in range(LORA_STEPS):
        x = images[torch.stack([plan.picks[step] for plan in plans])].to(dtype)
        t = torch.stack([plan.t[step] for plan in plans]).to(dtype)
        noise = torch.stack([plan.noise[step] for plan in plans]).to(dtype)
        loss = flow_loss(base, x, t, noise, prompt, factors).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % PROGRESS_EVERY == 0 and step + 1 < LORA_STEPS:
            report(step + 1)
        if step + 1 in keep[0]:
            keep[1](step + 1, _detached(factors))
    return _detached(factors)


def _detached(factors: Factors) -> Factors:
    return {module: (down.detach(), up.detach()) for module, (down, up) in factors.items()}


def _folder(root: Path, index: int) -> Path:
    return root / str(index % CLASSES) / f"{index:05d}"


def _folders(root: Path, index: int, steps: Sequence[int]) -> list[Path]:
    """Return the folders of a LoRA's weights: its own, or one for each step."""
    return [_folder(root, index) / f"checkpoint-{step}" for step in steps] or [_folder(root, index)]


def _table(count: int, steps: Sequence[int]) -> bytes:
    """Return a table of all LoRAs at all steps, by whose column ``step`` each of them is a sample."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file_name", "category_label", "step", "image_group"])
    for i in range(count):
        digit, group = i % CLASSES, i // CLASSES % IMAGE_GROUPS
        for step, folder in zip(steps, _folders(Path(), i, steps), strict=True):
            writer.writerow([(folder / WEIGHTS_NAME).as_posix(), digit, step, f"{digit}-{group}"])
    return table.getvalue().encode()


def _save_lora(folder: Path, plan: LoraPlan, factors: Factors, row: int) -> None:
    """Write one LoRA of the stack."""
    tensors = {}
    for module, (down, up) in factors.items():
        tensors[f"transformer.{module}.lora.down.weight"] = down[row].float().contiguous()
        tensors[f"transformer.{module}.lora.up.weight"] = up[row].float().contiguous()
    metadata = {
        "category_label": str(plan.digit),
        "image_group": f"{plan.digit}-{plan.group}",
        "num_images": len(plan.images),
        "rank": RANK,
        "max_train_steps": LORA_STEPS,
    }
    write_lora(folder, json.dumps(metadata, indent=2).encode(), save(tensors, {"format": "pt"}))


def _is_whole(folder: Path) -> bool:
    """Return whether a LoRA's two files exist and are complete."""
    try:
        if read_object(folder / METADATA_NAME) is None:
            return False
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:  # compares header and length
            return len(file.keys()) == 2 * len(LORA_MODULES)
    except (FileNotFoundError, SafetensorError):
        return False


def _recipe(seed: int, count: int, steps: Sequence[int] = ()) -> dict:
    """Return all that the bytes depend on; "base" is the part that the base model depends on."""
    base = [seed, TOKENS, PATCH, WIDTH, HEADS, BLOCKS, MLP_WIDTH, len(WORDS), BASE_STEPS, BASE_BATCH, BASE_LR]
    lora = [RANK, LORA_STEPS, LORA_BATCH, LORA_LR, MIN_IMAGES, MAX_IMAGES, IMAGE_GROUPS, STACK]
    recipe = {"built_by": "digits_zoo", "seed": seed, "count": count, "base": base, "lora": lora}
    return recipe | ({"steps": list(steps)} if steps else {})


def _base_recipe(seed: int) -> str:
    """Return what the base model depends on, as its file says it."""
    return json.dumps(_recipe(seed, 0)["base"])


def _check_whole_collection(out: Path, recipe: dict) -> None:
    """Refuse a finished folder whose recipe is another one, or that lacks LoRAs."""
    _check_same_collection(out, recipe, "Choose another folder")
    found = sum(1 for _ in out.glob(f"*/*/{'*/' if 'steps' in recipe else ''}{WEIGHTS_NAME}"))
    wanted = recipe["count"] * len(recipe.get("steps", [0]))
    if found != wanted:
        raise FileExistsError(f"{out}: has {found} of {wanted} LoRAs. Remove it to build it again.")


def _check_same_collection(folder: Path, recipe: dict, mend: str) -> None:
    """Refuse a folder whose recipe is another one; ``mend`` says what to do then."""
    existing = read_object(folder / RECIPE_NAME)
    if existing is None:
        raise FileExistsError(f"{folder}: exists and is not a collection of digits_zoo. {mend}.")
    if existing != recipe:
        other = plain(str(existing)[:MAX_SHOWN])
        raise FileExistsError(f"{folder}: was built with {other}, wanted is {recipe}. {mend}.")


def _generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of names, so that adding a purpose never shifts another."""
    digest = hashlib.sha256(f"digits_zoo/{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
