"""Copying blocks out of a storage, and adding gradients of blocks to where they lie, for the exchange between ranks.

Legend: n blocks, B block size, D head dim, R rows of a message. A pair is (KV head, block), numbered
``head * n + block``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, check_unit_stride, launch_options, next_power_of_2, on_device, padded_dim


@triton.jit
def _page(pairs, row, head, length, n_blocks, s_row, s_head, s_head_n):
    """First storage row of the program's pair, -1 if it is elsewhere; its head there, and how many keys it has."""
    pair = tl.load(pairs + tl.program_id(0))
    i_h, i_b = pair // n_blocks, pair % n_blocks
    start = tl.load(row + i_h * s_row + i_b)
    page = tl.load(head + i_h * s_head + i_b * s_head_n).to(tl.int64)
    return start, page, tl.load(length + i_b)


@triton.jit
def _copy_kernel(
    k, v, row, head, length, pairs, offset, out, n_blocks, s_kr, s_kh, s_vr, s_vh, s_row, s_head, s_head_n,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    start, page, n_keys = _page(pairs, row, head, length, n_blocks, s_row, s_head, s_head_n)
    if start < 0:
        return
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m = (o_m < n_keys)[:, None] & (o_d < D)[None, :]
    key = (start + o_m)[:, None]
    p_out = out + (tl.load(offset + tl.program_id(0)) + o_m)[:, None] * 2 * D + o_d[None, :]
    tl.store(p_out, tl.load(k + key * s_kr + page * s_kh + o_d[None, :], mask=m), mask=m)
    tl.store(p_out + D, tl.load(v + key * s_vr + page * s_vh + o_d[None, :], mask=m), mask=m)


@triton.jit(do_not_specialize=["begin", "end"])
def _add_kernel(
    dk, dv, row, head, length, pairs, offset, arrived, begin, end, n_blocks, s_r, s_h, s_row, s_head, s_head_n,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    start, page, n_keys = _page(pairs, row, head, length, n_blocks, s_row, s_head, s_head_n)
    first = tl.load(offset + tl.program_id(0))
    if (start < 0) | (first < begin) | (first >= end):
        return
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m = (o_m < n_keys)[:, None] & (o_d < D)[None, :]
    at = (start + o_m)[:, None] * s_r + page * s_h + o_d[None, :]
    p_arrived = arrived + (first + o_m)[:, None] * 2 * D + o_d[None, :]
    b_k = tl.load(p_arrived, mask=m, other=0.0).to(tl.float32)
    b_v = tl.load(p_arrived + D, mask=m, other=0.0).to(tl.float32)
    tl.store(dk + at, tl.load(dk + at, mask=m, other=0.0) + b_k, mask=m)
    tl.store(dv + at, tl.load(dv + at, mask=m, other=0.0) + b_v, mask=m)


def copy_pages(pages, pairs: Tensor, offset: Tensor, out: Tensor) -> None:
    """See :func:`moba_cp.eager.copy_pages`."""
    if not _launched(pages, pairs, out):
        return
    k, v = check_unit_stride(pages.k), check_unit_stride(pages.v)
    grid, constants = _launch(pages, pairs, out)
    with on_device(out):
        _copy_kernel[grid](
            k, v, pages.row, pages.head, pages.length, pairs, offset, out, pages.row.shape[1],
            *k.stride()[:2], *v.stride()[:2], pages.row.stride(0), *pages.head.stride(),
            **constants, **launch_options(4),
        )  # fmt: skip


def add_pages(
    dk: Tensor, dv: Tensor, pages, pairs: Tensor, offset: Tensor, arrived: Tensor, begin: int, end: int
) -> None:
    """See :func:`moba_cp.eager.add_pages`."""
    if not _launched(pages, pairs, arrived):
        return
    assert dk.stride() == dv.stride() and dk.stride(2) == 1 and dk.dtype == dv.dtype == torch.float32
    grid, constants = _launch(pages, pairs, arrived)
    with on_device(arrived):
        _add_kernel[grid](
            dk, dv, pages.row, pages.head, pages.length, pairs, offset, arrived, begin, end, pages.row.shape[1],
            *dk.stride()[:2], pages.row.stride(0), *pages.head.stride(), **constants, **launch_options(4),
        )  # fmt: skip


def _launched(pages, pairs: Tensor, message: Tensor) -> bool:
    """Whether there is anything to do."""
    assert message.is_contiguous() and message.shape[1] == 2
    assert pages.row.stride(1) == 1 and pages.length.is_contiguous() and pairs.is_contiguous()
    return pairs.numel() > 0 and message.shape[0] > 0 and pages.k.shape[0] > 0


def _launch(pages, pairs: Tensor, message: Tensor):
    dim = message.shape[2]
    block = padded_dim(dim)
    bm = max(1, min(4096 // block, next_power_of_2(pages.block_size)))
    return (pairs.numel(), cdiv(pages.block_size, bm)), dict(D=dim, BD=block, BM=bm)
