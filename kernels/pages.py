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
    """First storage row of the program's pair, -1 if it is in another storage; its head, and how many keys it has."""
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
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m = (o_m < n_keys)[:, None] & (o_d < D)[None, :]  # [BM, BD]
    key = (start + o_m)[:, None]  # [BM, 1]
    p_out = out + (tl.load(offset + tl.program_id(0)) + o_m)[:, None] * 2 * D + o_d[None, :]  # [BM, BD]
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
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m = (o_m < n_keys)[:, None] & (o_d < D)[None, :]  # [BM, BD]
    at = (start + o_m)[:, None] * s_r + page * s_h + o_d[None, :]  # [BM, BD]
    p_arrived = arrived + (first + o_m)[:, None] * 2 * D + o_d[None, :]  # [BM, BD]
    b_k = tl.load(p_arrived, mask=m, other=0.0).to(tl.float32)  # [BM, BD]
    b_v = tl.load(p_arrived + D, mask=m, other=0.0).to(tl.float32)  # [BM, BD]
    tl.store(dk + at, tl.load(dk + at, mask=m, other=0.0) + b_k, mask=m)
    tl.store(dv + at, tl.load(dv + at, mask=m, other=0.0) + b_v, mask=m)


def copy_pages(pages, pairs: Tensor, offset: Tensor, out: Tensor) -> None:
    """See :func:`moba_cp.eager.copy_pages`."""
    if not _has_work(pages, pairs, out):
        return
    k, v = check_unit_stride(pages.k), check_unit_stride(pages.v)
    grid, constants = _launch(pages, pairs, out)
    with on_device(out):
        _copy_kernel[grid](
            k=k, v=v, row=pages.row, head=pages.head, length=pages.length, pairs=pairs, offset=offset, out=out,
            n_blocks=pages.row.shape[1], s_kr=k.stride(0), s_kh=k.stride(1), s_vr=v.stride(0), s_vh=v.stride(1),
            s_row=pages.row.stride(0), s_head=pages.head.stride(0), s_head_n=pages.head.stride(1),
            **constants, **launch_options(4),
        )  # fmt: skip


def add_pages(
    dk: Tensor, dv: Tensor, pages, pairs: Tensor, offset: Tensor, arrived: Tensor, begin: int, end: int
) -> None:
    """See :func:`moba_cp.eager.add_pages`."""
    if not _has_work(pages, pairs, arrived):
        return
    assert dk.stride() == dv.stride() and dk.stride(2) == 1 and dk.dtype == dv.dtype == torch.float32
    grid, constants = _launch(pages, pairs, arrived)
    with on_device(arrived):
        _add_kernel[grid](
            dk=dk, dv=dv, row=pages.row, head=pages.head, length=pages.length, pairs=pairs, offset=offset,
            arrived=arrived, begin=begin, end=end, n_blocks=pages.row.shape[1], s_r=dk.stride(0), s_h=dk.stride(1),
            s_row=pages.row.stride(0), s_head=pages.head.stride(0), s_head_n=pages.head.stride(1),
            **constants, **launch_options(4),
        )  # fmt: skip


def _has_work(pages, pairs: Tensor, message: Tensor) -> bool:
    """Whether there is anything to do."""
    assert message.is_contiguous() and message.shape[1] == 2
    assert pages.row.stride(1) == 1 and pages.length.is_contiguous() and pairs.is_contiguous()
    return pairs.numel() > 0 and message.shape[0] > 0 and pages.k.shape[0] > 0


def _launch(pages, pairs: Tensor, message: Tensor):
    """Grid and compile-time constants."""
    dim = message.shape[2]
    block = padded_dim(dim)
    bm = max(1, min(4096 // block, next_power_of_2(pages.block_size)))
    return (pairs.numel(), cdiv(pages.block_size, bm)), dict(D=dim, BD=block, BM=bm)
