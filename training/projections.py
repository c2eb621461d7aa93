"""The networks of ``update_learned`` and ``update_frozen``: projections of updates, learned or not, and a classifier.

Of module m the classifier reads ``P_mᵀ ΔW_m Q_m``, P [out, 8] and Q [in, 8]: one layer of a network that is equivariant
to the two sides of an update (Putterman et al., "Learning on LoRAs", 2024). The block of a module is normalised for
each LoRA, so that its direction counts and its size does not, and standardised by the train rows' blocks *at the
start*, once for all. ``update_learned`` trains P and Q with the classifier, ``update_frozen`` leaves them as they
start: all else, randomness too, is the same, so that the difference of the two is what learning the projection is
worth.

Shape letters: M models, N LoRAs, P modules, G modules of one shape, W numbers of all factors of a LoRA, B minibatch,
r rank, k = 8 the sides of a block, F = k²·P, H hidden, C classes, V and T validation and test rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from training.classifier import DROPOUT, ClassifierStack, Models, log_losses, logits, predictions, train_classifiers
from training.stacks import CLIP, NUMBERS_AT_ONCE, Schedule, Split, mean_and_scale, rows_at_once, train

SCHEDULE = Schedule(max_epochs=200, patience=10, batch_size=64, lr=2e-3, lr_patience=10)
HIDDEN = (128, 128, 128)  # as accurate as 512 wide, and trained in a fifth of the time
Shape = tuple[int, int, int]  # r, in, out of a module's updates


@dataclass(frozen=True)
class Group:
    """Modules of one shape, which are projected by one product of matrices.

    ``modules`` int64[G] are their positions among all, ``columns`` int64[G] where the factors of each begin in a row.
    """

    shape: Shape
    modules: Tensor
    columns: Tensor

    def gather(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the factors of rows int64[M, B] from all, x float[1, N, W]; nothing else of x is copied.

        Returns:
            down float[M·G, r·B, in] and up float[M·G, r·B, out]: the rows of a minibatch stand side by side.
        """
        rank, wide, high = self.shape
        first = rows[:, None] * x.shape[2] + self.columns[:, None]  # (M, G, B), where the factors begin in all numbers
        numbers, stacked = x.view(-1), first.shape[0] * first.shape[1]
        row_of_down = first[:, :, None] + torch.arange(0, rank * wide, wide, device=x.device)[:, None]  # (M, G, r, B)
        down = numbers.unfold(0, wide, 1).index_select(0, row_of_down.flatten())
        up = numbers.unfold(0, high * rank, 1).index_select(0, first.flatten() + rank * wide)
        up = up.view(stacked, rows.shape[1], high, rank).permute(0, 3, 1, 2)  # (M·G, r, B, out)
        return down.view(stacked, -1, wide), up.reshape(stacked, -1, high)


def group_modules(shapes: Sequence[Shape], device: torch.device | str = "cpu") -> list[Group]:
    """Return the groups of modules of one shape, in the order of the first of each."""
    columns = np.cumsum([0, *(rank * (wide + high) for rank, wide, high in shapes)])
    members: dict[Shape, list[int]] = {}
    for module, shape in enumerate(shapes):
        members.setdefault(tuple(shape), []).append(module)
    return [
        Group(shape, torch.tensor(modules, device=device), torch.tensor(columns[modules], device=device))
        for shape, modules in members.items()
    ]


def project(x: Tensor, rows: Tensor, groups: list[Group], projections: dict[str, Tensor]) -> Tensor:
    """Compute the blocks ``PᵀΔWQ`` of rows, each divided by the root of the mean square of its entries.

    So the entries of a block have mean square 1; those of a zero update, or one that the projections do not see, are 0.

    Args:
        x: Factors of all modules side by side, float[1, N, W]; see `train_projections`.
        rows: Rows of each model, int64[M, B].
        groups: Of the modules.
        projections: ``P0`` float[M, G, k, out] and ``Q0`` float[M, G, k, in] of the first group, transposed, and so on.

    Returns:
        Blocks in the order of the modules, each row by row, float[M, B, P·k²].
    """
    blocks = []
    for number, group in enumerate(groups):
        p, q = (projections[f"{side}{number}"] for side in "PQ")
        sides = (len(rows), len(group.modules), p.shape[2], group.shape[0], rows.shape[1])  # (M, G, k, r, B)
        down, up = group.gather(x, rows)
        # A CPU multiplies k rows by many columns several times as fast as many rows by k columns.
        left = torch.bmm(p.flatten(0, 1), up.mT).view(sides)[:, :, :, None].unbind(4)  # r times (M, G, k, 1, B)
        right = torch.bmm(q.flatten(0, 1), down.mT).view(sides)[:, :, None].unbind(4)  # r times (M, G, 1, k, B)
        block = left[0] * right[0]
        for column, row in zip(left[1:], right[1:], strict=True):
            block = torch.addcmul(block, column, row)  # (M, G, k, k, B)
        blocks.append(normalised(block.flatten(2, 3)))
    joined = torch.cat(blocks, 1)  # (M, P, k², B)
    if len(groups) > 1:
        joined = joined.index_select(1, torch.cat([group.modules for group in groups]).argsort())
    return joined.permute(0, 3, 1, 2).flatten(2)


def normalised(blocks: Tensor) -> Tensor:
    """Divide blocks [..., k², B] by the root of the mean square of each; 0 stays 0, and passes no gradient."""
    square = blocks.square().mean(-2, keepdim=True)
    seen = square > 0
    return blocks * torch.where(seen, torch.where(seen, square, 1).rsqrt(), 0)


class Blocks:
    """The blocks of all LoRAs under projections that may move, standardised by the train rows' blocks at the start.

    Takes the place of classifier inputs float[1, N, F]; see `ClassifierStack`.

    Args:
        x: Factors of all modules side by side, float[1, N, W]; see `train_projections`.
        shapes: (r, in, out) of each module.
        start: P float[out, k] of each module, and Q float[in, k].
        train_rows: Row indices to learn mean and scale from, int64[n].
        numbers_at_once: Numbers of x to work on at a time.

    Attributes:
        start: The projections there, stacked as `project` takes them, M = 1.
        shape: (1, N, F).
        columns: Columns of a module, k².
    """

    def __init__(
        self,
        x: Tensor,
        shapes: Sequence[Shape],
        start: tuple[Sequence[Tensor], Sequence[Tensor]],
        train_rows: Tensor,
        numbers_at_once: int = NUMBERS_AT_ONCE,
    ):
        self.x, self.device, self.dtype = x, x.device, x.dtype
        self.groups = group_modules(shapes, x.device)
        self.start = {}
        for number, group in enumerate(group_modules(shapes)):
            for side, matrices in zip("PQ", start, strict=True):
                stacked = torch.stack([matrices[module].mT for module in group.modules.tolist()])
                self.start[f"{side}{number}"] = stacked.to(x.device, x.dtype)[None]
        self.columns = start[0][0].shape[1] ** 2
        self.shape = (1, x.shape[1], len(shapes) * self.columns)
        self.length = rows_at_once(max(x.shape[2], self.shape[2]), numbers_at_once, x.device)
        self.mean, self.scale = mean_and_scale(
            project(x, rows[None], self.groups, self.start)[0] for rows in train_rows.split(self.length)
        )

    def rows(self, rows: Tensor, projections: dict[str, Tensor]) -> Tensor:
        """Return blocks of each model's rows under each model's projections, int64[M, B] -> float[M, B, F]."""
        blocks = project(self.x, rows, self.groups, projections)
        standard = blocks.sub(self.mean.to(self.dtype)).mul(self.scale.to(self.dtype))
        standard.detach().clamp_(-CLIP, CLIP)  # in place and unseen by autograd: what is clipped passes its gradient
        return standard

    def all_rows(self, projections: dict[str, Tensor]) -> Tensor:
        """Return blocks of all rows under the projections of one model, float[1, N, F]."""
        parts = torch.arange(self.shape[1], device=self.device).split(self.length)
        return torch.cat([self.rows(part[None], projections) for part in parts], dim=1)


class ProjectionStack(ClassifierStack):
    """M classifiers of blocks, whose projections are trained with them.

    The classifiers are those of a `ClassifierStack` of the blocks at the start: the same parameters by the same names,
    minibatches and dropout masks. With them come ``P0``, ``Q0`` and so on, see `project`.

    Args:
        x: The blocks.
        y: Class of each sample, int64[N].
        split: Train and validation rows; the test rows are read for nothing.
        models: The run and the live columns of each model.
        num_classes: C.
        seed: Of all streams.
        network: See `ClassifierStack`.
    """

    def __init__(self, x: Blocks, y: Tensor, split: Split, models: Models, num_classes: int, *, seed: int, **network):
        super().__init__(x, y, split, models, num_classes, seed=seed, **network)
        for name, matrices in x.start.items():
            self.params[name] = matrices.repeat(len(models.run), 1, 1, 1)
        self._place()

    def _place(self) -> None:
        super()._place()
        # The same numbers as the parameters, which are updated in place; autograd's leaves.
        self.leaves = {name: tensor.detach().requires_grad_() for name, tensor in _projections(self.params).items()}

    def inputs(self, rows: Tensor) -> Tensor:
        """Return the standardised blocks of each model's rows, int64[M, B] -> float[M, B, F]."""
        x = self.x.rows(rows, self.leaves)
        return x if self.live is None else x * self.live

    def backpropagate(self, x: Tensor, y: Tensor, masks: Tensor | None) -> list[Tensor]:
        """Compute the gradients of the classifiers by hand, and from there those of the projections by autograd."""
        super().backpropagate(x.detach(), y, masks)
        errors = self._memory_for(x.shape[1])[1][0]  # of the first layer, (M, B, H)
        below = torch.bmm(errors, self.params["weight0"].mT)  # (M, B, F)
        gradients = torch.autograd.grad(x, list(self.leaves.values()), below)
        self.kept_gradients |= {
            name: gradient.contiguous() for name, gradient in zip(self.leaves, gradients, strict=True)
        }
        return list(self.kept_gradients.values())

    def validation_losses(self) -> Tensor:
        """Return the mean cross-entropy over the validation rows, [M]."""
        classifiers, rows = _classifiers(self.params), self.split.validation
        parts = rows.split(max(1, self.x.length // len(self.source)))
        scores = [logits(classifiers, self.inputs(part.expand(len(self.source), -1))) for part in parts]
        return log_losses(torch.cat(scores, dim=1), self.y[rows]).mean(1)


def _projections(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the projections among the parameters of a stack."""
    return {name: tensor for name, tensor in params.items() if name.startswith(("P", "Q"))}


def _classifiers(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of the classifiers among those of a stack."""
    return {name: tensor for name, tensor in params.items() if not name.startswith(("P", "Q"))}


def _by_column(models: Models, columns: int) -> Models:
    """Return the models with a column for each of the ``columns`` numbers of a module, in place of one."""
    live = None if models.live is None else models.live.repeat_interleave(columns, dim=1)
    return Models(models.source, models.run, live)


def train_projections(
    x: Tensor,
    y: Tensor,
    split: Split,
    models: Models,
    num_classes: int,
    *,
    shapes: Sequence[Shape],
    start: tuple[Sequence[Tensor], Sequence[Tensor]],
    frozen: bool,
    schedule: Schedule,
    seed: int,
    dropout: float = DROPOUT,
) -> dict[str, np.ndarray]:
    """Train a stack of networks and return what each of them predicts.

    Args:
        x: Factors of all modules side by side, module-major, on the training device, float32[1, N, W]: of each module
            down [r, in], then up [out, r], row by row; the rows of down are orthonormal, and up·down has norm 1, see
            `training.kernels.Updates`. A zero update is all zeros.
        y: Class of each sample, same device, int64[N].
        split: Rows to train on, to stop early by, and to test on; same device.
        models: The run of each model, and its modules, ``live`` bool[M, P]; the others are inputs that are 0. All read
            source 0.
        num_classes: C.
        shapes: (r, in, out) of each module.
        start: The projections to start at: P float[out, k] of each module, and Q float[in, k].
        frozen: Keep them as they are.
        schedule: Hidden widths (None: `HIDDEN`), epochs, patience, learning rate.
        seed: Of all random streams.
        dropout: Probability of dropping a hidden activation.

    Returns:
        Arrays by name, as `train_classifiers` returns them, without attribution.
    """
    blocks = Blocks(x, shapes, start, split.train)
    models = _by_column(models, blocks.columns)
    schedule = replace(schedule, hidden=schedule.hidden or HIDDEN)
    if frozen:
        inputs = blocks.all_rows(blocks.start)
        return train_classifiers(inputs, y, split, models, num_classes, schedule=schedule, seed=seed, dropout=dropout)
    network = {"hidden": schedule.hidden, "dropout": dropout, "batch_size": schedule.batch_size}
    trained = train(ProjectionStack(blocks, y, split, models, num_classes, seed=seed, **network), schedule)
    return {
        "epochs": trained.epochs.numpy(),
        "best_epoch": trained.best_epoch.numpy(),
        "validation_loss": trained.best_loss.numpy(),
        **_predictions(trained.state, blocks, y, split),
    }


def _predictions(state: dict[str, Tensor], blocks: Blocks, y: Tensor, split: Split) -> dict[str, np.ndarray]:
    """Predict all rows, see `predictions`; model by model, as each reads blocks of its own."""
    source = torch.zeros(1, dtype=torch.int64, device=blocks.device)
    results = []
    for model in range(len(state["weight0"])):
        params = {name: tensor[[model]] for name, tensor in state.items()}
        inputs = blocks.all_rows(_projections(params))
        results.append(predictions(_classifiers(params), inputs, y, split, source))
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def count_parameters(shapes: Sequence[Shape], num_classes: int, hidden: tuple[int, ...], size: int) -> int:
    """Return the number of parameters of one network whose blocks are ``size`` x ``size``, projections included."""
    widths = (size * size * len(shapes), *hidden, num_classes)
    classifier = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))
    return classifier + size * sum(wide + high for _, wide, high in shapes)
