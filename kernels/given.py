"""A selection from outside as block ids that are safe to attend to.

Legend: N query rows, G heads of the selection, S blocks per row and head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, launch_options, next_power_of_2, on_device


@triton.jit(do_not_specialize=["n_pairs"])
def _given_kernel(
    block_indices, first, current_block, result, n_pairs, s_t, s_g, s_s,
    G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_s = tl.arange(0, SLOTS)  # [SLOTS]
    m_m = o_m < n_pairs  # [BM]
    mask = m_m[:, None] & (o_s < S)[None, :]  # [BM, SLOTS]
    b_first = tl.load(first + o_m // G, mask=m_m, other=0)[:, None]  # [BM, 1]
    b_current = tl.load(current_block + o_m // G, mask=m_m, other=0)[:, None]  # [BM, 1]
    p_given = block_indices + (o_m // G * s_t + o_m % G * s_g)[:, None] + (o_s * s_s)[None, :]  # [BM, SLOTS]
    b_block = tl.load(p_given, mask=mask, other=-1)  # [BM, SLOTS]
    inside = (b_block >= 0) & (b_block < b_current - b_first)  # [BM, SLOTS]
    b_block = tl.where(inside, b_block + b_first, -1)
    for slot in range(0, S - 1):
        b_one = tl.max(tl.where((o_s == slot)[None, :], b_block, -1), 1)  # [BM]
        again = (b_block == b_one[:, None]) & (o_s > slot)[None, :]  # [BM, SLOTS]
        b_block = tl.where(again, -1, b_block)
    tl.store(result + o_m[:, None] * S + o_s[None, :], b_block, mask=mask)


def given_blocks(block_indices: Tensor, first: Tensor, current_block: Tensor) -> Tensor:
    """See :func:`moba_cp.eager.given_blocks`."""
    n_rows, n_groups, n_slots = block_indices.shape
    result = torch.empty(block_indices.shape, dtype=torch.int32, device=block_indices.device)
    if result.numel() == 0:
        return result
    n_pairs, bm = n_rows * n_groups, 64
    with on_device(block_indices):
        _given_kernel[(cdiv(n_pairs, bm),)](
            block_indices=block_indices, first=first.contiguous(), current_block=current_block.contiguous(),
            result=result, n_pairs=n_pairs, s_t=block_indices.stride(0), s_g=block_indices.stride(1),
            s_s=block_indices.stride(2), G=n_groups, S=n_slots, SLOTS=next_power_of_2(n_slots), BM=bm,
            **launch_options(4),
        )  # fmt: skip
    return result
