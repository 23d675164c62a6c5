"""Merging partial results: of a row's visits, of several storages, of single rows, and of steps of full attention.

Legend: N query rows, Hq query heads, D head dim, S' visits per row. All arithmetic is in float32. A pair is one row of
one head; a tile is BM pairs by BD columns, D padded to a power of two. Visits, and so the pairs that have some, are
counted in 31 bits (see :mod:`.work`); pairs of single rows are counted in 64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, SLICED, cdiv, check_unit_stride, launch_options, next_power_of_2, on_device, padded_dim
from .routing import visit_block

# Elements of a tile, and pairs of a tile where steps of full attention are merged.
TILE = 4096
STEP_PAIRS = 32


@triton.jit
def merge_pair(b_out, b_lse, b_part, b_part_lse):
    """Merges a partial result over other keys into a tile: outputs [BM, BD], log-sum-exps [BM], natural logarithms."""
    b_max = tl.maximum(b_lse, b_part_lse)  # [BM]
    # Where neither side saw a key, both are -inf: without this, -inf - -inf would be NaN.
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)  # [BM]
    b_old, b_new = tl.exp(b_lse - b_shift), tl.exp(b_part_lse - b_shift)  # [BM], [BM]
    b_sum = b_old + b_new  # [BM]
    b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)  # [BM]
    b_out = b_out * (b_old * b_norm)[:, None] + b_part * (b_new * b_norm)[:, None]  # [BM, BD]
    return b_out, b_max + tl.log(b_sum)


@triton.jit
def _all_have_read():
    """To be called between loading and overwriting the same memory.

    Every warp that holds a part of a pair's output loads its log-sum-exp, and one warp stores it: the compiler loads a
    small tensor for each layout again rather than move it. A late warp, whose process had to give the GPU to another,
    would find the merged value there, and weigh the output by that.
    """
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n_rows", "n_heads"], do_not_specialize_on_alignment=SLICED)
def _merge_visits_kernel(
    part, part_lse, out, lse, n_rows, n_heads, s_ot, s_oh, s_lt, s_lh,
    SHARE: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Merges all visits of a pair at once: first their maximum, then one sum of weighted outputs in a fixed order."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m_m = o_m < n_rows * n_heads  # [BM]
    m_d = o_d < D  # [BD]
    o_part = (o_m // SHARE).to(tl.int64) * (SHARE * SLOTS) + o_m % SHARE  # [BM]
    t = (o_m // n_heads).to(tl.int64)  # [BM]
    head = o_m % n_heads  # [BM]
    p_out = out + (t * s_ot + head * s_oh)[:, None] + o_d[None, :]  # [BM, BD]
    p_lse = lse + t * s_lt + head * s_lh  # [BM]
    b_max = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    if JOIN:
        b_before = tl.load(p_lse, mask=m_m, other=float("-inf"))  # [BM]
        b_max = b_before  # [BM]
    for s in range(SLOTS):
        b_max = tl.maximum(b_max, tl.load(part_lse + o_part + s * SHARE, mask=m_m, other=float("-inf")))
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)  # [BM]
    b_sum = tl.zeros([BM], tl.float32)  # [BM]
    b_out = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
    if JOIN:
        b_sum = tl.exp2((b_before - b_shift) * LOG2E)  # [BM]
        # The output of a pair that saw no key yet was never written.
        m_o = (b_before != float("-inf"))[:, None] & m_d[None, :]  # [BM, BD]
        b_out = b_sum[:, None] * tl.load(p_out, mask=m_o, other=0.0).to(tl.float32)  # [BM, BD]
    for s in range(SLOTS):
        b_lse = tl.load(part_lse + o_part + s * SHARE, mask=m_m, other=float("-inf"))  # [BM]
        b_weight = tl.exp2((b_lse - b_shift) * LOG2E)  # [BM]
        # A visit that never happened has lse -inf, and its partial output was never written.
        m_o = (b_lse != float("-inf"))[:, None] & m_d[None, :]  # [BM, BD]
        b_part = tl.load(part + (o_part + s * SHARE)[:, None] * D + o_d[None, :], mask=m_o, other=0.0)  # [BM, BD]
        b_part = b_part.to(tl.float32)
        b_out += b_weight[:, None] * b_part
        b_sum += b_weight
    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]  # [BM, BD]
    if JOIN:
        _all_have_read()
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    tl.store(p_lse, b_max + tl.log(b_sum), mask=m_m)


def merge_visits(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, join: bool = False) -> None:
    """Merge the partial results of each row's visits.

    Args:
        part: [N, Hq / share, S', share, D], undefined where ``part_lse`` is -inf; ``share`` heads have one selection.
        part_lse: [N, Hq / share, S', share] float32, natural log, -inf for a visit that did not happen.
        out: [N, Hq, D], written: 0 for rows without visits.
        lse: [N, Hq] float32, written: -inf for rows without visits.
        join: what ``out`` and ``lse`` hold is merged as one more visit; ``out`` may hold anything where ``lse`` is
            -inf.
    """
    _, _, slots, share, dim = part.shape
    n_rows, n_heads, _ = out.shape
    block = padded_dim(dim)
    bm = max(1, TILE // block)
    with on_device(part):
        _merge_visits_kernel[(cdiv(n_rows * n_heads, bm),)](
            part=part, part_lse=part_lse, out=out, lse=lse, n_rows=n_rows, n_heads=n_heads,
            s_ot=out.stride(0), s_oh=out.stride(1), s_lt=lse.stride(0), s_lh=lse.stride(1),
            SHARE=share, SLOTS=slots, D=dim, BD=block, BM=bm, JOIN=join, **launch_options(4),
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "s_pages"], do_not_specialize_on_alignment=SLICED)
def _sum_visits_kernel(
    part, out, block_indices, current_block, visible, page_row, n_rows, scale, s_ot, s_oh, s_ct, s_pages,
    G: tl.constexpr, SHARE: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m_m = o_m < n_rows * G  # [BM]
    m_d = o_d < D  # [BD]
    t = (o_m // G).to(tl.int64)  # [BM]
    head = i_h * G + o_m % G  # [BM]
    o_part = (i_h * n_rows * (G // SHARE) + o_m // SHARE).to(tl.int64) * (SHARE * SLOTS) + o_m % SHARE  # [BM]
    b_sum = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
    for s in range(SLOTS):
        block = visit_block(  # [BM]
            o_m // SHARE * SLOTS + s, m_m, i_h, block_indices, current_block, visible, page_row, s_ct, s_pages,
            G // SHARE, S, SLOTS,
        )  # fmt: skip
        m_p = (block >= 0)[:, None] & m_d[None, :]  # [BM, BD]
        p_part = part + (o_part + s * SHARE)[:, None] * D + o_d[None, :]  # [BM, BD]
        b_sum += tl.load(p_part, mask=m_p, other=0.0).to(tl.float32)
    p_out = out + t[:, None] * s_ot + head[:, None] * s_oh + o_d[None, :]  # [BM, BD]
    m_o = m_m[:, None] & m_d[None, :]  # [BM, BD]
    b_sum *= scale
    if ADD:
        b_sum += tl.load(p_out, mask=m_o, other=0.0).to(tl.float32)
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_o)


def sum_visits(
    part: Tensor, out: Tensor, block_indices, current_block, visible, page_row: Tensor, scale: float, add: bool
) -> None:
    """out [N, Hq, D] = scale * sum of part [Hkv, N, G / share, S', share, D] over the visits that happened, those to a
    block of this storage; with ``add`` that is added to out."""
    n_kv, n_rows, n_shared, slots, share, dim = part.shape
    group = n_shared * share
    block = padded_dim(dim)
    bm = max(1, TILE // block)
    with on_device(part):
        _sum_visits_kernel[(cdiv(n_rows * group, bm), n_kv)](
            part=part, out=out, block_indices=block_indices, current_block=current_block, visible=visible,
            page_row=page_row, n_rows=n_rows, scale=scale,
            s_ot=out.stride(0), s_oh=out.stride(1), s_ct=block_indices.stride(0), s_pages=page_row.stride(0),
            G=group, SHARE=share, S=block_indices.shape[2], SLOTS=slots, D=dim, BD=block, BM=bm, ADD=add,
            **launch_options(4),
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _scale_rows_kernel(
    x, out, n_rows, scale, s_ot, s_oh,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m = (o_m < n_rows * G)[:, None] & (o_d < D)[None, :]  # [BM, BD]
    t = (o_m // G).to(tl.int64)  # [BM]
    head = i_h * G + o_m % G  # [BM]
    b_x = tl.load(x + (i_h * n_rows * G + o_m).to(tl.int64)[:, None] * D + o_d[None, :], mask=m, other=0.0)  # [BM, BD]
    p_out = out + t[:, None] * s_ot + head[:, None] * s_oh + o_d[None, :]  # [BM, BD]
    b_x *= scale
    if ADD:
        b_x += tl.load(p_out, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out, b_x.to(out.dtype.element_ty), mask=m)


def scale_rows(x: Tensor, out: Tensor, scale: float, add: bool) -> None:
    """out [N, Hq, D] = scale * x [Hkv, N, G, D]; with ``add`` that is added to out."""
    n_kv, n_rows, group, dim = x.shape
    block = padded_dim(dim)
    bm = max(1, TILE // block)
    with on_device(x):
        _scale_rows_kernel[(cdiv(n_rows * group, bm), n_kv)](
            x=x, out=out, n_rows=n_rows, scale=scale, s_ot=out.stride(0), s_oh=out.stride(1),
            G=group, D=dim, BD=block, BM=bm, ADD=add, **launch_options(4),
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_pairs", "n_heads"], do_not_specialize_on_alignment=SLICED)
def _merge_rows_kernel(
    out, lse, part, part_lse, index, n_pairs, n_heads, s_ot, s_oh, s_lt, s_lh, s_part, s_part_lse,
    SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m_m = o_m < n_pairs  # [BM]
    m_d = o_d < D  # [BD]
    b_any = tl.full([BM], -1, tl.int32)  # [BM]
    for s in range(SLOTS):
        b_any = tl.maximum(b_any, tl.load(index + o_m * SLOTS + s, mask=m_m, other=-1))
    if tl.max(b_any, 0) < 0:
        return
    # A pair without a partial result is neither read nor written.
    m_m = b_any >= 0
    t, head = o_m // n_heads, o_m % n_heads  # [BM], [BM]
    p_out = out + (t * s_ot + head * s_oh)[:, None] + o_d[None, :]  # [BM, BD]
    b_out = tl.load(p_out, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
    if HAS_LSE:
        p_lse = lse + t * s_lt + head * s_lh  # [BM]
        b_lse = tl.load(p_lse, mask=m_m, other=float("-inf"))  # [BM]
    for s in range(SLOTS):
        o_part = tl.load(index + o_m * SLOTS + s, mask=m_m, other=-1).to(tl.int64)  # [BM]
        m_s = o_part >= 0  # [BM]
        # [BM, BD]
        b_part = tl.load(part + o_part[:, None] * s_part + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
        if HAS_LSE:
            b_part_lse = tl.load(part_lse + o_part * s_part_lse, mask=m_s, other=float("-inf"))  # [BM]
            b_out, b_lse = merge_pair(b_out, b_lse, b_part, b_part_lse)  # [BM, BD], [BM]
        else:
            b_out += b_part
    _all_have_read()
    tl.store(p_out, b_out, mask=m_m[:, None] & m_d[None, :])
    if HAS_LSE:
        tl.store(p_lse, b_lse, mask=m_m)


def merge_rows(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, index: Tensor) -> None:
    """See :func:`moba_cp.eager.merge_rows`; all are float32 with unit stride in D, but the contiguous ``index``."""
    _on_rows(out, lse, part, part_lse, index)


def add_rows(out: Tensor, part: Tensor, index: Tensor) -> None:
    """See :func:`moba_cp.eager.add_rows`; tensors as in :func:`merge_rows`."""
    _on_rows(out, None, part, None, index)


def _on_rows(out: Tensor, lse: Tensor | None, part: Tensor, part_lse: Tensor | None, index: Tensor) -> None:
    n_rows, n_heads, dim = out.shape
    if part.shape[0] == 0 or index.numel() == 0:
        return
    block = padded_dim(dim)
    bm = max(1, TILE // block)
    lse_strides = (0, 0) if lse is None else lse.stride()
    with on_device(out):
        _merge_rows_kernel[(cdiv(n_rows * n_heads, bm),)](
            out=out, lse=lse, part=part, part_lse=part_lse, index=index, n_pairs=n_rows * n_heads, n_heads=n_heads,
            s_ot=out.stride(0), s_oh=out.stride(1), s_lt=lse_strides[0], s_lh=lse_strides[1],
            s_part=part.stride(0), s_part_lse=0 if part_lse is None else part_lse.stride(0),
            SLOTS=index.shape[2], D=dim, BD=block, BM=bm, HAS_LSE=lse is not None, **launch_options(4),
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_pairs", "n_heads"])
def _row_sums_kernel(
    a, b, sums, n_pairs, n_heads, s_at, s_ah, s_bt, s_bh, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m_m = o_m < n_pairs  # [BM]
    m = m_m[:, None] & (o_d < D)[None, :]  # [BM, BD]
    t, head = o_m // n_heads, o_m % n_heads  # [BM], [BM]
    b_a = tl.load(a + (t * s_at + head * s_ah)[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)  # [BM, BD]
    b_b = tl.load(b + (t * s_bt + head * s_bh)[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)  # [BM, BD]
    tl.store(sums + o_m, tl.sum(b_a * b_b, 1), mask=m_m)


def row_sums(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`moba_cp.eager.row_sums`; sums are float32."""
    a, b = check_unit_stride(a), check_unit_stride(b)
    n_rows, n_heads, dim = a.shape
    sums = torch.empty(n_rows, n_heads, dtype=torch.float32, device=a.device)
    block = padded_dim(dim)
    bm = max(1, TILE // block)
    if sums.numel():
        with on_device(a):
            _row_sums_kernel[(cdiv(n_rows * n_heads, bm),)](
                a=a, b=b, sums=sums, n_pairs=n_rows * n_heads, n_heads=n_heads,
                s_at=a.stride(0), s_ah=a.stride(1), s_bt=b.stride(0), s_bh=b.stride(1),
                D=dim, BD=block, BM=bm, **launch_options(4),
            )  # fmt: skip
    return sums


@triton.jit
def _merge_partial_kernel(
    out, lse, part, part_lse, rows, n_pairs,
    s_ot, s_oh, s_lt, s_lh, s_pt, s_ph, s_plt, s_plh,
    HQ: tl.constexpr, D: tl.constexpr, HAS_ROWS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m_m = o_m < n_pairs  # [BM]
    m_o = m_m[:, None] & (o_d < D)[None, :]  # [BM, BD]
    t, head = o_m // HQ, o_m % HQ  # [BM], [BM]
    # Row of the output.
    o_t = t  # [BM]
    if HAS_ROWS:
        o_t = tl.load(rows + t, mask=m_m, other=0)
    p_lse = lse + o_t * s_lt + head * s_lh  # [BM]
    b_lse = tl.load(p_lse, mask=m_m, other=0.0)  # [BM]
    b_part_lse = tl.load(part_lse + t * s_plt + head * s_plh, mask=m_m, other=0.0)  # [BM]
    p_out = out + (o_t * s_ot + head * s_oh)[:, None] + o_d[None, :]  # [BM, BD]
    b_out = tl.load(p_out, mask=m_o, other=0.0)  # [BM, BD]
    p_part = part + (t * s_pt + head * s_ph)[:, None] + o_d[None, :]  # [BM, BD]
    b_part = tl.load(p_part, mask=m_o, other=0.0).to(tl.float32)  # [BM, BD]
    b_out, b_lse = merge_pair(b_out, b_lse, b_part, b_part_lse)  # [BM, BD], [BM]
    _all_have_read()
    tl.store(p_out, b_out, mask=m_o)
    tl.store(p_lse, b_lse, mask=m_m)


def merge_partial(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor | None = None) -> None:
    """Merge a partial result over other keys into ``out`` and ``lse``, in place.

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
        _merge_partial_kernel[(cdiv(n_pairs, STEP_PAIRS),)](
            out=out, lse=lse, part=part, part_lse=part_lse, rows=rows, n_pairs=n_pairs,
            s_ot=out.stride(0), s_oh=out.stride(1), s_lt=lse.stride(0), s_lh=lse.stride(1),
            s_pt=part.stride(0), s_ph=part.stride(1), s_plt=part_lse.stride(0), s_plh=part_lse.stride(1),
            HQ=n_heads, D=dim, HAS_ROWS=rows is not None, BM=STEP_PAIRS, BD=next_power_of_2(dim),
            **launch_options(4),
        )  # fmt: skip
