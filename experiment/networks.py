"""Networks that read whole modules: one row for each representation that is "trained", what it reads and how.

Their models are stacked, cached and masked like those of the multilayer perceptron; a column of ``live`` is a module.

Shape letters: M models, N LoRAs, P modules, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiment.settings import Settings
from representations import SKETCH, projection
from training import attention, projections
from training.classifier import Models
from training.stacks import Schedule, Split


class Module(NamedTuple):
    """A module as networks see it: its canonical name and the sides of its factors; the rank is the collection's."""

    name: str
    rank: int
    inputs: int
    outputs: int

    @property
    def numbers(self) -> int:
        """Numbers of the two factors."""
        return self.rank * (self.inputs + self.outputs)


@dataclass(frozen=True)
class Network:
    """A row of the table.

    Attributes:
        reads: "tokens" of modules (see `attention.module_tokens`) or their "factors".
        schedule: Returns the schedule that its models train by.
        parameters: Counts the parameters of a model, of the modules, C, and the schedule.
        train: Trains a stack, as `attention.train_attention` does, of inputs, classes, split, models, C, the modules,
            schedule, seed, and whether to keep the parameters of one that can be read afterwards.
    """

    reads: str
    schedule: Callable[[Settings], Schedule]
    parameters: Callable[[Sequence[Module], int, Schedule], int]
    train: Callable[[Tensor, Tensor, Split, Models, int, Sequence[Module], Schedule, int, bool], dict[str, np.ndarray]]


def _attention_parameters(modules: Sequence[Module], num_classes: int, schedule: Schedule) -> int:
    return attention.count_parameters(len(modules), num_classes, *(schedule.hidden or ()))


def _train_attention(
    x: Tensor,
    y: Tensor,
    split: Split,
    models: Models,
    num_classes: int,
    _: Sequence[Module],
    schedule: Schedule,
    seed: int,
    keep_parameters: bool,
) -> dict[str, np.ndarray]:
    how = {"schedule": schedule, "seed": seed, "keep_parameters": keep_parameters}
    return attention.train_attention(x, y, split, models, num_classes, **how)


def _projection_parameters(modules: Sequence[Module], num_classes: int, schedule: Schedule) -> int:
    hidden = schedule.hidden or projections.HIDDEN
    return projections.count_parameters([module[1:] for module in modules], num_classes, hidden, SKETCH)


def _projections(frozen: bool) -> Network:
    """Return the row of projections that are learned, or stay as they begin: at those of ``update_sketch``."""

    def train(
        x: Tensor,
        y: Tensor,
        split: Split,
        models: Models,
        num_classes: int,
        modules: Sequence[Module],
        schedule: Schedule,
        seed: int,
        _: bool,
    ) -> dict[str, np.ndarray]:
        left = [projection(module.name, "P", module.outputs) for module in modules]
        right = [projection(module.name, "Q", module.inputs) for module in modules]
        return projections.train_projections(
            x,
            y,
            split,
            models,
            num_classes,
            shapes=[module[1:] for module in modules],
            start=(left, right),
            frozen=frozen,
            schedule=schedule,
            seed=seed,
        )

    return Network("factors", lambda settings: settings.projection, _projection_parameters, train)


NETWORKS = {
    "update_attention": Network("tokens", lambda settings: settings.attention, _attention_parameters, _train_attention),
    "update_frozen": _projections(frozen=True),
    "update_learned": _projections(frozen=False),
}
FEW_LORAS, FEW_MODULES = 2_000, 64  # up to which a CPU trains networks that read factors, unless told to
FACTORS_GIB = 4  # of factors of all updates, up to which they are read, unless told to


def left_by_default(modules: Sequence[Module], num_samples: int, device: torch.device) -> dict[str, str]:
    """Return the networks that are not trained unless their names are asked for, and why."""
    size = 4 * num_samples * sum(module.numbers for module in modules) / 2**30
    if size > FACTORS_GIB:
        reason = f"the factors of all updates take {size:.1f} GiB; by default at most {FACTORS_GIB} are read"
    elif device.type == "cuda" or (num_samples < FEW_LORAS and len(modules) <= FEW_MODULES):
        return {}
    else:
        reason = f"by default only on a GPU, or for fewer than {FEW_LORAS:,} LoRAs of at most {FEW_MODULES} modules"
    return {name: reason for name, network in NETWORKS.items() if network.reads == "factors"}
