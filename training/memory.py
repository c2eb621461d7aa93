"""Errors of libraries where memory runs out, told from all others."""

from __future__ import annotations

import torch

# Of torch and the libraries that it calls, which raise RuntimeError for much else too.
WORDS = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # its own memory lies on the GPU
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
CLASSES = (RuntimeError, torch.AcceleratorError)  # by name: a class of ours may quote such words


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, of a CPU or a GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) in CLASSES and any(word in str(error) for word in WORDS)
