"""A stand-in for CUDA graphs on a CPU: a tape of the operations of one call, which it then repeats.

As a graph, it repeats each operation on the same tensors with the same numbers from Python, whatever Python would do
by then; and it refuses what a capture refuses: to look at numbers, to copy from Python, unregistered generators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training import recorded

ops = torch.ops.aten
# Numbers are looked at, or the shape of what comes depends on them.
LOOKS = {ops._local_scalar_dense, ops.nonzero, ops.equal, ops.masked_select, ops._unique2, ops.unique_consecutive,
         ops.unique_dim, ops.bincount, ops.repeat_interleave}  # fmt: skip
INDEXED = {ops.index, ops.index_put, ops.index_put_, ops._index_put_impl_}
FROM_PYTHON = {ops.lift_fresh, ops.lift, ops.lift_fresh_copy}  # torch.tensor([...])
EMPTY = {ops.empty, ops.empty_like, ops.empty_strided, ops.new_empty, ops.new_empty_strided, ops.empty_permuted}


class Refused(RuntimeError):
    """Raised where a capture would fail, or freeze what it should not."""


class Tape(TorchDispatchMode):
    """Records the operations that are done within it."""

    def __init__(self, generators: Sequence[torch.Generator] = ()):
        super().__init__()
        self.generators = {generator._cdata for generator in generators}
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Do an operation and note it."""
        kwargs = kwargs or {}
        self._check(func, args, kwargs)
        results = func(*args, **kwargs)
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [
            isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs for leaf in tree_leaves(results)
        ]
        packet = func.overloadpacket
        if packet not in EMPTY and (any(fresh) or func._schema.is_mutable):
            self.calls.append((func, args, kwargs, tree_leaves(results), fresh))
        return results

    def _check(self, func, args, kwargs) -> None:
        packet = func.overloadpacket
        if packet in LOOKS or packet in FROM_PYTHON:
            raise Refused(f"{func} within a recording")
        indices = args[1] if packet in INDEXED else []
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise Refused(f"{func} with a mask within a recording")
        generator = kwargs.get("generator")
        known = generator is not None and generator._cdata in self.generators
        if torch.Tag.nondeterministic_seeded in func.tags and not known:
            raise Refused(f"{func} draws from a generator that is not registered")

    @torch.no_grad()
    def repeat(self) -> None:
        """Do all of it again."""
        for func, args, kwargs, results, fresh in self.calls:
            again = tree_leaves(func(*args, **kwargs))
            for result, new, is_fresh in zip(results, again, fresh, strict=True):
                if is_fresh:
                    result.copy_(new)


def record(function: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
    """Record a function, in place of `training.recorded.record`: the first repetition is the recording itself."""
    tape, begun = Tape(generators), []
    with tape:
        function()

    def repeat() -> None:
        if begun:
            tape.repeat()
        begun.append(True)

    return repeat


def use_tape(monkeypatch) -> None:
    """Let a CPU record as a GPU does."""
    monkeypatch.setattr(recorded, "is_recorded", lambda device: True)
    monkeypatch.setattr(recorded, "record", record)
