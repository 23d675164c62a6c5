"""Some heads of K and V laid side by side for other ranks, and the sums of what these return.

Legend: R rows of a rank, H heads, D head dim, S shares. A *slab* is [H, R, 2, D]: K beside V, head by head.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import SLICED, cdiv, check_unit_stride, on_device, padded_dim


@triton.jit(do_not_specialize=["n_rows", "slab_rows"], do_not_specialize_on_alignment=SLICED)
def _pack_kernel(
    k, v, slab, n_rows, slab_rows, s_kr, s_kh, s_vr, s_vh, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):
    i_h = tl.program_id(1).to(tl.int64)
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_d = tl.arange(0, BD)
    m = (o_m < n_rows)[:, None] & (o_d < D)[None, :]
    p_slab = slab + ((i_h * slab_rows + o_m) * 2 * D)[:, None] + o_d[None, :]
    tl.store(p_slab, tl.load(k + (o_m * s_kr + i_h * s_kh)[:, None] + o_d[None, :], mask=m), mask=m)
    tl.store(p_slab + D, tl.load(v + (o_m * s_vr + i_h * s_vh)[:, None] + o_d[None, :], mask=m), mask=m)


@triton.jit(do_not_specialize=["n_rows", "slab_rows", "n_shares", "skip"], do_not_specialize_on_alignment=SLICED)
def _sum_kernel(
    own, shares, dk, dv, n_rows, slab_rows, n_shares, skip, s_share, s_kr, s_kh,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_d = tl.arange(0, BD)
    m = (o_m < n_rows)[:, None] & (o_d < D)[None, :]
    o_slab = ((i_h * slab_rows + o_m) * 2 * D)[:, None] + o_d[None, :]
    b_dk = tl.load(own + o_slab, mask=m, other=0.0).to(tl.float32)
    b_dv = tl.load(own + o_slab + D, mask=m, other=0.0).to(tl.float32)
    p_share = shares + o_slab
    for i in range(n_shares):
        if i != skip:
            b_dk += tl.load(p_share, mask=m, other=0.0).to(tl.float32)
            b_dv += tl.load(p_share + D, mask=m, other=0.0).to(tl.float32)
        p_share += s_share
    o_out = (o_m * s_kr + i_h * s_kh)[:, None] + o_d[None, :]
    tl.store(dk + o_out, b_dk.to(dk.dtype.element_ty), mask=m)
    tl.store(dv + o_out, b_dv.to(dv.dtype.element_ty), mask=m)


def pack_slab(k: Tensor, v: Tensor, slab: Tensor) -> None:
    """See :func:`moba_cp.eager.pack_slab`."""
    k, v = check_unit_stride(k), check_unit_stride(v)
    _check(k, slab)
    if k.numel():
        grid, constants = _launch(k)
        with on_device(k):
            _pack_kernel[grid](k, v, slab, k.shape[0], slab.shape[1], *k.stride()[:2], *v.stride()[:2], **constants)


def sum_shares(own: Tensor, shares: Tensor, dk: Tensor, dv: Tensor, skip: int = -1) -> None:
    """See :func:`moba_cp.eager.sum_shares`."""
    _check(dk, own)
    assert shares.shape[1:] == own.shape and (len(shares) == 0 or shares[0].is_contiguous())
    assert dk.stride() == dv.stride() and dk.stride(2) == 1 and dk.dtype == dv.dtype
    if dk.numel():
        grid, constants = _launch(dk)
        with on_device(dk):
            _sum_kernel[grid](
                own, shares, dk, dv, dk.shape[0], own.shape[1], len(shares), skip, shares.stride(0),
                *dk.stride()[:2], **constants,
            )  # fmt: skip


def _check(rows: Tensor, slab: Tensor) -> None:
    n_rows, n_heads, dim = rows.shape
    assert slab.is_contiguous() and slab.shape[::2] == (n_heads, 2) and slab.shape[3] == dim
    assert n_rows <= slab.shape[1]


def _launch(rows: Tensor):
    n_rows, n_heads, dim = rows.shape
    block = padded_dim(dim)
    bm = max(1, 4096 // block)
    return (cdiv(n_rows, bm), n_heads), dict(D=dim, BD=block, BM=bm, num_warps=4)
