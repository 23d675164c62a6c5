"""Fold a partial attention result into an accumulated one, in place.

Legend: N rows, M rows of the accumulator (M >= N), Hq query heads, D head dim. A pair is one row of one head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, launch_options, next_power_of_2, on_device

BLOCK_PAIRS = 32


@triton.jit
def _fold_kernel(
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    p_rows,
    n_pairs,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    stride_lse_head,
    stride_part_row,
    stride_part_head,
    stride_part_lse_row,
    stride_part_lse_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_block = tl.program_id(0).to(tl.int64)
    o_pair = i_block * BLOCK_P + tl.arange(0, BLOCK_P)
    o_dim = tl.arange(0, BLOCK_D)
    m_pair = o_pair < n_pairs
    m_tile = m_pair[:, None] & (o_dim < DIM)[None, :]
    o_row, o_head = o_pair // HEADS, o_pair % HEADS
    o_into = o_row
    if HAS_ROWS:
        o_into = tl.load(p_rows + o_row, mask=m_pair, other=0)

    p_lse += o_into * stride_lse_row + o_head * stride_lse_head
    b_lse = tl.load(p_lse, mask=m_pair, other=0.0)
    b_part_lse = tl.load(
        p_part_lse + o_row * stride_part_lse_row + o_head * stride_part_lse_head, mask=m_pair, other=0.0
    )
    b_max = tl.maximum(b_lse, b_part_lse)
    # Nothing seen on either side: keep zero and -inf instead of making NaN.
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_old, b_new = tl.exp(b_lse - b_shift), tl.exp(b_part_lse - b_shift)
    b_sum = b_old + b_new
    b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)

    p_out += (o_into * stride_out_row + o_head * stride_out_head)[:, None] + o_dim[None, :]
    b_out = tl.load(p_out, mask=m_tile, other=0.0)
    o_part = (o_row * stride_part_row + o_head * stride_part_head)[:, None] + o_dim[None, :]
    b_part = tl.load(p_part + o_part, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_out, b_out * (b_old * b_norm)[:, None] + b_part * (b_new * b_norm)[:, None], mask=m_tile)
    tl.store(p_lse, b_shift + tl.log(b_sum), mask=m_pair)


def fold(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor | None = None) -> None:
    """Join a partial result over other keys into ``out`` and ``lse``, in place.

    Args:
        out: [M, Hq, D] float32, unit stride in D.
        lse: [M, Hq] float32, any strides; -inf where nothing was seen yet (there ``out`` is 0).
        part: [N, Hq, D] in any floating dtype, unit stride in D.
        part_lse: [N, Hq] float32, any strides.
        rows: [N] int64, row of ``out`` that each row of ``part`` belongs to, all different; None if N = M.
    """
    n_rows, n_heads, dim = part.shape
    assert out.dtype == lse.dtype == part_lse.dtype == torch.float32
    assert out.stride(2) == part.stride(2) == 1 and (rows is not None or out.shape == part.shape)
    n_pairs = n_rows * n_heads
    if n_pairs == 0:
        return
    with on_device(out):
        _fold_kernel[(cdiv(n_pairs, BLOCK_PAIRS),)](
            out, lse, part, part_lse, rows, n_pairs,
            *out.stride()[:2], *lse.stride(), *part.stride()[:2], *part_lse.stride(),
            HEADS=n_heads, DIM=dim, HAS_ROWS=rows is not None, BLOCK_P=BLOCK_PAIRS, BLOCK_D=next_power_of_2(dim),
            **launch_options(4),
        )  # fmt: skip
