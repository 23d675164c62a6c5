"""Packed shards of K and V for the all-gather, and the sums of the partial gradients that other ranks return.

Legend: R rows of a rank, W most rows of any rank, H heads, D head dim, S parts. A *shard* [H * W, 2, D] has K beside V
for some heads: first each head's rows before the cut, head by head, then the others likewise.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, check_unit_stride, launch_options, next_power_of_2, on_device, padded_dim

# Programs that pack; each loops over many tiles. Packing runs at the same time as attention, whose programs fill a
# multiprocessor each, and should leave most of these to it. Sums are waited for, so they use the whole GPU.
PACK_PROGRAMS = 32
# Elements of K, or of V, that a program loads at a time.
PACK_TILE, SUM_TILE = 1 << 14, 1 << 12


@triton.jit
def _shard_row(o_m, i_h, n_heads, cut, widest):
    """Where rows of a head lie in a shard."""
    return tl.where(o_m < cut, i_h * cut + o_m, n_heads * cut + i_h * (widest - cut) + o_m - cut)


@triton.jit(do_not_specialize=["n_rows", "n_heads", "cut", "widest", "tiles"])
def _pack_kernel(
    k, v, shard, n_rows, n_heads, cut, widest, tiles, s_kr, s_kh, s_vr, s_vh,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BD)  # [BD]
    tiles_per_head = (n_rows + BM - 1) // BM
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_h = (i // tiles_per_head).to(tl.int64)
        o_m = (i % tiles_per_head * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
        m = (o_m < n_rows)[:, None] & (o_d < D)[None, :]  # [BM, BD]
        b_k = tl.load(k + (o_m * s_kr + i_h * s_kh)[:, None] + o_d[None, :], mask=m, other=0.0)  # [BM, BD]
        b_v = tl.load(v + (o_m * s_vr + i_h * s_vh)[:, None] + o_d[None, :], mask=m, other=0.0)  # [BM, BD]
        p_shard = shard + (_shard_row(o_m, i_h, n_heads, cut, widest) * 2 * D)[:, None] + o_d[None, :]  # [BM, BD]
        tl.store(p_shard, b_k, mask=m)
        tl.store(p_shard + D, b_v, mask=m)


@triton.jit(do_not_specialize=["n_rows", "cut", "widest", "n_parts"])
def _sum_kernel(
    own_part, parts, spans, dk, dv, n_rows, cut, widest, n_parts, s_kr, s_kh,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m = (o_m < n_rows)[:, None] & (o_d < D)[None, :]  # [BM, BD]
    row = _shard_row(o_m, i_h, tl.num_programs(1), cut, widest)  # [BM]
    o_own_part = (row * 2 * D)[:, None] + o_d[None, :]  # [BM, BD]
    b_dk = tl.load(own_part + o_own_part, mask=m, other=0.0).to(tl.float32)  # [BM, BD]
    b_dv = tl.load(own_part + o_own_part + D, mask=m, other=0.0).to(tl.float32)  # [BM, BD]
    for i in range(n_parts):
        start, first, end = tl.load(spans + 3 * i), tl.load(spans + 3 * i + 1), tl.load(spans + 3 * i + 2)
        m_part = m & ((row >= first) & (row < end))[:, None]  # [BM, BD]
        p_part = parts + ((start + row - first) * 2 * D)[:, None] + o_d[None, :]  # [BM, BD]
        b_dk += tl.load(p_part, mask=m_part, other=0.0).to(tl.float32)
        b_dv += tl.load(p_part + D, mask=m_part, other=0.0).to(tl.float32)
    o_out = (o_m * s_kr + i_h * s_kh)[:, None] + o_d[None, :]  # [BM, BD]
    tl.store(dk + o_out, b_dk.to(dk.dtype.element_ty), mask=m)
    tl.store(dv + o_out, b_dv.to(dv.dtype.element_ty), mask=m)


def pack_kv_shard(k: Tensor, v: Tensor, shard: Tensor, cut: int) -> None:
    """See :func:`moba_cp.eager.pack_kv_shard`."""
    k, v = check_unit_stride(k), check_unit_stride(v)
    n_rows, n_heads, _ = k.shape
    widest = _widest(k, shard)
    if k.numel():
        constants = _constants(k, PACK_TILE)
        tiles = cdiv(n_rows, constants["BM"]) * n_heads
        with on_device(k):
            _pack_kernel[(min(tiles, PACK_PROGRAMS),)](
                k=k, v=v, shard=shard, n_rows=n_rows, n_heads=n_heads, cut=cut, widest=widest, tiles=tiles,
                s_kr=k.stride(0), s_kh=k.stride(1), s_vr=v.stride(0), s_vh=v.stride(1),
                **constants, **launch_options(8),
            )  # fmt: skip


def sum_partial_grads(own_part: Tensor, parts: Tensor, spans: Tensor, dk: Tensor, dv: Tensor, cut: int) -> None:
    """See :func:`moba_cp.eager.sum_partial_grads`."""
    widest = _widest(dk, own_part)
    assert parts.is_contiguous() and parts.shape[1:] == own_part.shape[1:] and spans.is_contiguous()
    assert dk.stride() == dv.stride() and dk.stride(2) == 1 and dk.dtype == dv.dtype
    if dk.numel():
        constants = _constants(dk, SUM_TILE)
        with on_device(dk):
            _sum_kernel[(cdiv(dk.shape[0], constants["BM"]), dk.shape[1])](
                own_part=own_part, parts=parts, spans=spans, dk=dk, dv=dv, n_rows=dk.shape[0], cut=cut, widest=widest,
                n_parts=len(spans), s_kr=dk.stride(0), s_kh=dk.stride(1), **constants, **launch_options(4),
            )  # fmt: skip


def _widest(rows: Tensor, shard: Tensor) -> int:
    """W of a shard for rows [R, H, D]."""
    n_rows, n_heads, dim = rows.shape
    widest, rest = divmod(shard.shape[0], n_heads)
    assert shard.is_contiguous() and shard.shape[1:] == (2, dim) and rest == 0 and n_rows <= widest
    return widest


def _constants(rows: Tensor, tile: int) -> dict[str, int]:
    n_rows, _, dim = rows.shape
    block = padded_dim(dim)
    return dict(D=dim, BD=block, BM=max(1, min(tile // block, next_power_of_2(n_rows))))
