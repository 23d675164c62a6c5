"""Copies of rows by a GPU's copy engines, also where rows do not follow one another."""

import contextlib
import ctypes
from functools import lru_cache

import torch
from torch import Tensor

_ANY_DIRECTION = 4


def copy_rows(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` to ``target`` on the current stream; both [n, ...] of one shape and dtype, and each of their rows
    without gaps."""
    if target.is_contiguous() and source.is_contiguous() or not source.is_cuda or (copy := _copy_2d()) is None:
        target.copy_(source, non_blocking=True)
        return
    size, width = source.element_size(), source[0].nbytes
    error = copy(
        target.data_ptr(), target.stride(0) * size, source.data_ptr(), source.stride(0) * size, width, len(source),
        _ANY_DIRECTION, torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"CUDA error {error} in a copy of {len(source)} rows of {width} bytes")


@lru_cache
def _copy_2d():
    """``cudaMemcpy2DAsync`` of the runtime that PyTorch has loaded; PyTorch copies such rows by a kernel. None where it
    is not found."""
    with contextlib.suppress(OSError, AttributeError):
        function = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}").cudaMemcpy2DAsync
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        function.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
        function.restype = ctypes.c_int
        return function
    return None
