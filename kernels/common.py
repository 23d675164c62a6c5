"""What every launch needs: padded sizes, device guards, checks of inputs, constants."""

import contextlib

import torch
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# Kernels work with powers of two: exp(x) = exp2(x * LOG2E), log(x) = log2(x) * LN2.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Arguments that are tables, or slices of tables, whose alignment varies. Their entries are loaded one by one, so a
# kernel specialized on their alignment would gain nothing, and take seconds to compile.
SLICED = ("list_start", "current_block", "visible", "page_row", "page_head", "block_indices", "lse", "delta")


def on_device(x: Tensor):
    """Context in which launches go to the GPU that holds ``x``; nothing to do on the CPU (Triton's interpreter)."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


def launch_options(num_warps: int, fused: bool = True) -> dict[str, int | bool]:
    """Options of every launch. Whether a product and a sum may be rounded together is said in all of them: Triton's
    default changes with its version."""
    return {"num_warps": num_warps, "enable_fp_fusion": fused}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes 15 microseconds on the host, and a launch needs several."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def padded_dim(dim: int) -> int:
    """Tile extent for a head dim: a power of two, and at least what one matrix instruction takes."""
    return max(16, next_power_of_2(dim))


def check_unit_stride(x: Tensor) -> Tensor:
    """``x`` itself, or a copy where its last dimension is not contiguous (an expanded gradient, say)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_limit(name: str, value: int, fix: str) -> None:
    """Raise ValueError for a count that kernels keep in 32 bits and that does not fit."""
    if value >= 2**31:
        raise ValueError(f"{name} is {value}, and the kernels count it in 31 bits, up to {2**31 - 1}; {fix}")


def check_head_dim(dim: int) -> None:
    """Raise ValueError for a head dim no tile was made for."""
    if dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim={dim} is above {MAX_HEAD_DIM}, the largest the kernels take; use smaller heads")


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 inputs are multiplied as float32, never as tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"
