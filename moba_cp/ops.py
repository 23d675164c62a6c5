"""Which backend serves a tensor: :mod:`moba_cp.kernels`, in Triton, or :mod:`moba_cp.eager`, in plain PyTorch.

Both have the same functions with the same arguments. Kernels serve float32, bfloat16 and float16 on a GPU, and on the
CPU under ``TRITON_INTERPRET=1``, but bfloat16, which the interpreter computes wrongly; everything else, float64 and
plain CPU tensors, is eager's.
"""

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from . import eager

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_HEAD_DIMS = range(1, 257)


@lru_cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend(x: Tensor):
    """The module that serves q, k, v or anything of their kind, ``x`` [..., D] floating."""
    return tokenwise_backend(x) if x.shape[-1] in KERNEL_HEAD_DIMS else eager


def tokenwise_backend(x: Tensor):
    """The module that serves the rows of a layer, ``x`` [..., any width] floating."""
    fits = x.dtype in KERNEL_DTYPES and (x.is_cuda or x.dtype != torch.bfloat16)
    return integer_backend(x) if fits else eager


def integer_backend(x: Tensor):
    """The module that plans an exchange by integers ``x``, whatever the dtype of q, k and v."""
    if (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _has_triton():
        from . import kernels

        return kernels
    return eager
