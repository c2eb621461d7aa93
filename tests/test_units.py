"""Units of work: found by their keys, and trained in smaller stacks where memory runs out."""

import numpy as np
import pytest
import torch

from experiment import store
from experiment.plans import TrainingError
from experiment.units import LARGE, OutOfMemory, Unit, Units, one_memory_error
from training import recorded
from training.memory import is_out_of_memory

ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([True, False])}
KEY = {"kind": "classifier", "seed": 1, "models": [1, 2]}
CPU = torch.device("cpu")


class Opened:
    """A description of inputs that opens to the device that they are asked for on."""

    def open(self, device):
        return device

    def forget(self, device):
        pass


def test_a_unit_is_found_by_its_key_whatever_the_order(tmp_path):
    units = Units(tmp_path)
    store.save_arrays(units.path(KEY), ARRAYS)
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
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError("numpy"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", 2),
    ],
)
def test_every_library_s_want_of_memory_is_one_error(error):
    with pytest.raises(OutOfMemory) as raised, one_memory_error():
        raise error
    assert str(raised.value) == str(error).rstrip(". ") and raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXsyevd`"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    ],
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(RuntimeError) as raised, one_memory_error():
        raise error
    assert raised.value is error and not is_out_of_memory(error)


def test_an_error_of_ours_that_quotes_the_allocator_stays_itself():
    with pytest.raises(TrainingError), one_memory_error():
        raise TrainingError("out of memory with one model at a time: DefaultCPUAllocator: CUDA error: out of memory")


class BrokenOff:
    """A recording whose end fails too, as after an error inside it."""

    def capture_begin(self, *_, **__):
        pass

    def capture_end(self):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_want_of_memory_inside_a_recording_is_told_and_not_how_that_ended(monkeypatch):
    def step():
        raise torch.OutOfMemoryError("Tried to allocate a lot.")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", BrokenOff)
    with pytest.raises(OutOfMemory, match="a lot"), one_memory_error():
        recorded.record(step, [])
    assert not recorded.capturing.locked()


def test_a_stack_that_does_not_fit_is_trained_in_halves_and_stays_one_unit(tmp_path):
    units, sizes = Units(tmp_path), []

    def compute(device, stack):
        sizes.append(len(stack))
        if len(stack) > 2:
            raise torch.OutOfMemoryError("Tried to allocate a lot.")
        return {"predicted": np.array(stack), "on": np.array(len(stack) * [device.type])}

    key = {"kind": "classifier", "models": list(range(5))}
    unit = units.unit(key, Opened(), compute, list(range(5)), "ranking")
    outcome = unit.attempt(CPU)
    assert (
        outcome.failure == "" and outcome.at_once == 2 and sizes == [5, 2, 2, 1] and not unit.path.exists()
    )  # who asked for it writes it
    arrays = outcome.arrays
    assert arrays["predicted"].tolist() == list(range(5)) and arrays["stack"].tolist() == [2] * 5
    assert arrays["on"].tolist() == ["cpu"] * 5
    store.save_arrays(unit.path, arrays)
    assert units.smaller_stack([key]) == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("no."), "out of memory with one model at a time: no"),
        (FloatingPointError("training diverged"), "training diverged"),
    ],
)
def test_a_unit_that_cannot_be_done_says_why_and_leaves_nothing(tmp_path, error, reason):
    def compute(*_):
        raise error

    unit = Units(tmp_path).unit(KEY, Opened(), compute, [1], "ranking")
    assert unit.attempt(CPU).failure == reason and unit.attempt(CPU).arrays is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("numbers", "written"), [(LARGE // 8 - 2, False), (LARGE // 8, True)])
def test_large_arrays_are_written_by_whoever_computes_them(tmp_path, numbers, written):
    unit = Unit(tmp_path / "a.npz", Opened(), lambda *_: {"a": np.zeros(numbers)}, [1], "large")
    outcome = unit.attempt(CPU)
    assert (outcome.arrays is None) == written == unit.path.exists() and outcome.failure == ""
    if written:
        assert store.load_arrays(unit.path)["a"].shape == (numbers,)
