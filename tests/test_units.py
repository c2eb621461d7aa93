"""Units of work: found by their keys, and trained in smaller stacks where memory runs out."""

import numpy as np
import pytest
import torch

from experiment.units import OutOfMemory, Units, one_memory_error
from experiment.workers import TaskFailedError

ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([True, False])}
KEY = {"kind": "classifier", "seed": 1, "models": [1, 2]}


def test_a_unit_is_found_by_its_key_whatever_the_order(tmp_path):
    units = Units(tmp_path)
    units.save(KEY, ARRAYS)
    again = Units(tmp_path).load(dict(reversed(KEY.items())))
    assert again.keys() == ARRAYS.keys()
    np.testing.assert_array_equal(again["a"], ARRAYS["a"])
    assert list(units.load(KEY, ["b"])) == ["b"]
    others = [
        units.path(KEY | {"seed": 2}),
        Units(tmp_path / "other").path(KEY),
        Units(tmp_path, {"code": "x"}).path(KEY),
    ]
    assert units.path(KEY).exists() and not any(path.exists() for path in others)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), MemoryError("numpy"), RuntimeError("DefaultCPUAllocator: can't allocate memory.")],
)
def test_every_library_s_want_of_memory_is_one_error(error):
    with pytest.raises(OutOfMemory) as raised, one_memory_error():
        raise error
    assert str(raised.value) == str(error).rstrip(". ") and raised.value.__cause__ is error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes") as raised, one_memory_error():
        raise RuntimeError("shapes differ")
    assert not isinstance(raised.value, MemoryError)


def test_an_error_of_ours_that_quotes_the_allocator_stays_itself():
    with pytest.raises(TaskFailedError), one_memory_error():
        raise TaskFailedError("out of memory with one model at a time: DefaultCPUAllocator: can't allocate memory")


def test_a_stack_that_does_not_fit_is_trained_in_halves_and_stays_one_unit(tmp_path, capsys):
    units, sizes = Units(tmp_path), []

    def compute(stack):
        sizes.append(len(stack))
        if len(stack) > 2:
            raise torch.OutOfMemoryError("Tried to allocate a lot.")
        return {"predicted": np.array(stack)}

    key = {"kind": "classifier", "models": list(range(5))}
    task = units.task(key, compute, list(range(5)), "ranking")
    assert not task.finished()
    task.run()
    assert task.finished() and sizes == [5, 2, 2, 1]
    arrays = units.load(key)
    assert arrays["predicted"].tolist() == list(range(5)) and arrays["stack"].tolist() == [2] * 5
    assert units.smaller_stack([key]) == 2
    assert "ranking: 5 models do not fit the memory: trying 2 at once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("no."), "out of memory with one model at a time: no"),
        (FloatingPointError("training diverged"), "training diverged"),
    ],
)
def test_a_task_that_cannot_be_done_says_why_and_leaves_nothing(tmp_path, error, reason):
    def compute(_):
        raise error

    task = Units(tmp_path).task(KEY, compute, [1], "ranking")
    with pytest.raises(TaskFailedError, match=f"^{reason}$"):
        task.run()
    assert not task.finished() and list(tmp_path.iterdir()) == []
