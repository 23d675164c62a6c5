"""Block representatives: the mean key of every block.

Legend: R storage rows, Hkv key/value heads, D head dim, n blocks. One program reduces one block of one head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check_unit_stride, launch_options, next_power_of_2, on_device, padded_dim


@triton.jit
def _means_kernel(
    k, start, length, means,
    s_kr, s_kh, s_mb, s_mh,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_b, i_h = tl.program_id(0), tl.program_id(1)
    n_rows = tl.load(length + i_b)
    o_d = tl.arange(0, BD)  # [BD]
    o_r = tl.arange(0, ROWS)  # [ROWS]
    p_k = k + tl.load(start + i_b).to(tl.int64) * s_kr + i_h.to(tl.int64) * s_kh
    # One partial sum per row of the tile: the order of the additions depends on the block's length alone, so a mean
    # is the same on whatever rank it is computed.
    b_sum = tl.zeros([ROWS, BD], dtype=tl.float32)  # [ROWS, BD]
    for r in range(0, n_rows, ROWS):
        m_k = (r + o_r < n_rows)[:, None] & (o_d < D)[None, :]  # [ROWS, BD]
        b_k = tl.load(p_k + (r + o_r).to(tl.int64)[:, None] * s_kr + o_d[None, :], mask=m_k, other=0.0)  # [ROWS, BD]
        b_sum += b_k.to(tl.float32)
    b_mean = tl.sum(b_sum, 0) / tl.maximum(n_rows, 1).to(tl.float32)  # [BD]
    p_mean = means + i_b.to(tl.int64) * s_mb + i_h * s_mh + o_d  # [BD]
    tl.store(p_mean, b_mean.to(means.dtype.element_ty), mask=o_d < D)


def block_means(k: Tensor, start: Tensor, length: Tensor, block_size: int) -> Tensor:
    """See :func:`moba_cp.eager.block_means`; k is float32, bfloat16 or float16, and summed in float32."""
    k = check_unit_stride(k)
    n, (_, n_heads, dim) = start.numel(), k.shape
    means = torch.empty(n, n_heads, dim, dtype=k.dtype, device=k.device)
    if means.numel():
        with on_device(k):
            _means_kernel[(n, n_heads)](
                k=k, start=start, length=length, means=means,
                s_kr=k.stride(0), s_kh=k.stride(1), s_mb=means.stride(0), s_mh=means.stride(1),
                D=dim, BD=padded_dim(dim), ROWS=min(64, next_power_of_2(block_size)), **launch_options(4),
            )  # fmt: skip
    return means
