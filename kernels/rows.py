"""Packing the query rows that go to blocks on other ranks.

Legend: N local rows, H query heads, S selected blocks per row, D head dim, M rows sent. A *slot* is an index into
[H, N, S]: that of the row of token ``slot // S % N`` and head ``slot // S // N``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, check_unit_stride, launch_options, next_power_of_2, on_device, padded_dim


@triton.jit(do_not_specialize=["m_rows", "n_rows"])
def _gather_rows_kernel(
    x, slots, out, m_rows, n_rows, s_xt, s_xh, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m = (o_m < m_rows)[:, None] & (o_d < D)[None, :]  # [BM, BD]
    row = tl.load(slots + o_m, mask=o_m < m_rows, other=0) // S  # [BM]
    t, head = (row % n_rows).to(tl.int64), (row // n_rows).to(tl.int64)  # [BM], [BM]
    b_x = tl.load(x + (t * s_xt + head * s_xh)[:, None] + o_d[None, :], mask=m, other=0.0)  # [BM, BD]
    tl.store(out + o_m[:, None] * D + o_d[None, :], b_x.to(out.dtype.element_ty), mask=m)


def gather_rows(x: Tensor, slots: Tensor, n_slots: int, dtype: torch.dtype) -> Tensor:
    """See :func:`moba_cp.eager.gather_rows`."""
    x = check_unit_stride(x)
    n_rows, _, dim = x.shape
    out = torch.empty(slots.numel(), dim, dtype=dtype, device=x.device)
    if out.numel():
        block = padded_dim(dim)
        bm = max(1, 4096 // block)
        with on_device(x):
            _gather_rows_kernel[(cdiv(slots.numel(), bm),)](
                x=x, slots=slots, out=out, m_rows=slots.numel(), n_rows=n_rows, s_xt=x.stride(0), s_xh=x.stride(1),
                S=n_slots, D=dim, BD=block, BM=bm, **launch_options(4),
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["m_rows", "n_rows", "n_heads", "n_blocks"])
def _row_ids_kernel(
    block_indices, slots, dest, number, ids, m_rows, n_rows, n_heads, n_blocks,
    G: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_s = tl.arange(0, BS)  # [BS]
    m_m = o_m < m_rows  # [BM]
    slot = tl.load(slots + o_m, mask=m_m, other=0)  # [BM]
    row = slot // S  # [BM]
    t, head = (row % n_rows).to(tl.int64), row // n_rows  # [BM], [BM]
    p_indices = block_indices + (t * n_heads + head) * S  # [BM]
    at_head = (head // G).to(tl.int64) * n_blocks  # [BM]
    target = tl.load(dest + at_head + tl.load(p_indices + slot % S, mask=m_m, other=0), mask=m_m, other=0)  # [BM]
    m = m_m[:, None] & (o_s < S)[None, :]  # [BM, BS]
    block = tl.load(p_indices[:, None] + o_s[None, :], mask=m, other=-1)  # [BM, BS]
    at = at_head[:, None] + block  # [BM, BS]
    wanted = (block >= 0) & (tl.load(dest + at, mask=block >= 0, other=-1) == target[:, None])  # [BM, BS]
    b_id = tl.where(wanted, tl.load(number + at, mask=wanted, other=0), -1)  # [BM, BS]
    tl.store(ids + o_m[:, None] * S + o_s[None, :], b_id.to(ids.dtype.element_ty), mask=m)


def row_ids(block_indices: Tensor, slots: Tensor, dest: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`moba_cp.eager.exchange.row_ids`."""
    n_rows, n_heads, n_slots = block_indices.shape
    n_kv, n_blocks = dest.shape
    block_indices, dest, number = block_indices.contiguous(), dest.contiguous(), number.contiguous()
    ids = torch.empty(slots.numel(), n_slots, dtype=dtype, device=block_indices.device)
    if ids.numel():
        width = next_power_of_2(n_slots)
        bm = max(1, 1024 // width)
        with on_device(block_indices):
            _row_ids_kernel[(cdiv(slots.numel(), bm),)](
                block_indices=block_indices, slots=slots, dest=dest, number=number, ids=ids,
                m_rows=slots.numel(), n_rows=n_rows, n_heads=n_heads, n_blocks=n_blocks,
                G=n_heads // n_kv, S=n_slots, BS=width, BM=bm, **launch_options(4),
            )  # fmt: skip
    return ids
