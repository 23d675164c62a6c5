"""Copies of rows by a GPU's copy engines, also where rows do not follow one another."""

import contextlib
import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_ANY_DIRECTION = 4


def copy_rows(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` to ``target`` on the current stream; both [n, ...] of one shape and dtype, and each of their rows
    without gaps."""
    if target.is_contiguous() and source.is_contiguous() or not can_be_ready(source):
        target.copy_(source, non_blocking=True)
    else:
        issue([ready_copy(0, source, source, target)], [source], True)


class ReadyCopy(NamedTuple):
    """A copy of rows between memory that stays and a tensor that is another one in each call, in numbers: a host needs
    a quarter of the time for it, and there are hundreds in a pass."""

    index: int
    """Of the tensor, among those of a call."""
    offset: int
    """Bytes from its first element to the rows' first."""
    pitch: int
    """Bytes from one of its rows to the next."""
    there: int
    """Address of the other side, which stays."""
    pitch_there: int
    width: int
    """Bytes of a row."""
    n_rows: int


def ready_copy(index: int, tensor: Tensor, rows: Tensor, there: Tensor) -> ReadyCopy:
    """The copy between ``rows``, a view of ``tensor``, and ``there``; both [n, ...], each row without gaps."""
    size = rows.element_size()
    offset, width = rows.data_ptr() - tensor.data_ptr(), there[0].nbytes
    return ReadyCopy(
        index, offset, rows.stride(0) * size, there.data_ptr(), there.stride(0) * size, width, len(rows)
    )  # fmt: skip


def can_be_ready(tensor: Tensor) -> bool:
    """Whether :func:`issue` serves ``tensor``."""
    return tensor.is_cuda and _copy_2d() is not None


def issue(copies: Sequence[ReadyCopy], tensors: Sequence[Tensor], from_tensors: bool) -> None:
    """Make ``copies`` on the current stream, from ``tensors`` to what stays, or the other way; tensors have the strides
    of those that the copies were made ready with."""
    copy, stream = _copy_2d(), torch.cuda.current_stream().cuda_stream
    begins = [x.data_ptr() for x in tensors]
    for index, offset, pitch, there, pitch_there, width, n_rows in copies:
        here = begins[index] + offset
        if from_tensors:
            error = copy(there, pitch_there, here, pitch, width, n_rows, _ANY_DIRECTION, stream)
        else:
            error = copy(here, pitch, there, pitch_there, width, n_rows, _ANY_DIRECTION, stream)
        if error:
            raise RuntimeError(
                f"CUDA error {error} in a copy of {n_rows} rows of {width} bytes; exchange copy_engines=False does "
                "without"
            )


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
