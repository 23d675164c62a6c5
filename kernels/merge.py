"""Joining partial results: of a row's visits, with what other storages gave, and of single rows.

Legend: N query rows, Hq query heads, D head dim, S' visits per row. All arithmetic in float32. A pair is one row of one
head. Visits, and so the pairs of those that have some, are counted in 31 bits (see :mod:`.work`); pairs of single rows
are not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import SLICED, cdiv, check_unit_stride, launch_options, on_device, padded_dim
from .routing import visit_block

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["n_rows", "n_heads"], do_not_specialize_on_alignment=SLICED)
def _merge_visits_kernel(
    part, part_lse, out, lse, n_rows, n_heads, s_ot, s_oh, s_lt, s_lh,
    SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < n_rows * n_heads
    m_d = o_d < D
    place = o_m.to(tl.int64) * SLOTS
    t = (o_m // n_heads).to(tl.int64)
    head = o_m % n_heads
    p_out = out + (t * s_ot + head * s_oh)[:, None] + o_d[None, :]
    p_lse = lse + t * s_lt + head * s_lh
    b_max = tl.full([BM], float("-inf"), tl.float32)
    if JOIN:
        b_before = tl.load(p_lse, mask=m_m, other=float("-inf"))
        b_max = b_before
    for s in range(SLOTS):
        b_max = tl.maximum(b_max, tl.load(part_lse + place + s, mask=m_m, other=float("-inf")))
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, BD], tl.float32)
    if JOIN:
        b_sum = tl.exp2((b_before - b_shift) * LOG2E)
        # What saw nothing yet was never written.
        m_o = (b_before != float("-inf"))[:, None] & m_d[None, :]
        b_out = b_sum[:, None] * tl.load(p_out, mask=m_o, other=0.0).to(tl.float32)
    for s in range(SLOTS):
        b_lse = tl.load(part_lse + place + s, mask=m_m, other=float("-inf"))
        b_weight = tl.exp2((b_lse - b_shift) * LOG2E)
        # A visit that never happened has lse -inf, and its partial output was never written.
        m_o = (b_lse != float("-inf"))[:, None] & m_d[None, :]
        b_part = tl.load(part + (place + s)[:, None] * D + o_d[None, :], mask=m_o, other=0.0).to(tl.float32)
        b_out += b_weight[:, None] * b_part
        b_sum += b_weight
    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    tl.store(p_lse, b_max + tl.log(b_sum), mask=m_m)


def merge_visits(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, join: bool = False) -> None:
    """Join the partial results of each row's visits.

    Args:
        part: [N, Hq, S', D], undefined where ``part_lse`` is -inf.
        part_lse: [N, Hq, S'] float32, natural log, -inf for a visit that did not happen.
        out: [N, Hq, D], written: 0 for rows without visits.
        lse: [N, Hq] float32, written: -inf for rows without visits.
        join: what ``out`` and ``lse`` hold counts as one visit more; ``out`` may hold anything where ``lse`` is -inf.
    """
    n_rows, n_heads, slots, dim = part.shape
    block = padded_dim(dim)
    bm = max(1, 4096 // block)
    with on_device(part):
        _merge_visits_kernel[(cdiv(n_rows * n_heads, bm),)](
            part, part_lse, out, lse, n_rows, n_heads, out.stride(0), out.stride(1), lse.stride(0), lse.stride(1),
            SLOTS=slots, D=dim, BD=block, BM=bm, JOIN=join, **launch_options(4),
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "s_pages"], do_not_specialize_on_alignment=SLICED)
def _sum_visits_kernel(
    part, out, block_indices, current_block, visible, page_row, n_rows, scale, s_ot, s_oh, s_ct, s_pages,
    G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < n_rows * G
    m_d = o_d < D
    t = (o_m // G).to(tl.int64)
    head = i_h * G + o_m % G
    place = (i_h * n_rows * G + o_m).to(tl.int64) * SLOTS
    b_sum = tl.zeros([BM, BD], tl.float32)
    for s in range(SLOTS):
        block = visit_block(
            o_m * SLOTS + s, m_m, i_h, block_indices, current_block, visible, page_row, s_ct, s_pages, G, S, SLOTS
        )
        m_p = (block >= 0)[:, None] & m_d[None, :]
        b_sum += tl.load(part + (place + s)[:, None] * D + o_d[None, :], mask=m_p, other=0.0).to(tl.float32)
    p_out = out + t[:, None] * s_ot + head[:, None] * s_oh + o_d[None, :]
    m_o = m_m[:, None] & m_d[None, :]
    b_sum *= scale
    if ADD:
        b_sum += tl.load(p_out, mask=m_o, other=0.0).to(tl.float32)
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_o)


def sum_visits(
    part: Tensor, out: Tensor, block_indices, current_block, visible, page_row: Tensor, scale: float, add: bool
) -> None:
    """out [N, Hq, D] = scale * sum of part [Hkv, N, G, S', D] over the visits that happened: with a block here; to
    ``add`` that to out instead."""
    n_kv, n_rows, group, slots, dim = part.shape
    block = padded_dim(dim)
    bm = max(1, 4096 // block)
    with on_device(part):
        _sum_visits_kernel[(cdiv(n_rows * group, bm), n_kv)](
            part, out, block_indices, current_block, visible, page_row, n_rows, scale,
            out.stride(0), out.stride(1), block_indices.stride(0), page_row.stride(0),
            G=group, S=block_indices.shape[2], SLOTS=slots, D=dim, BD=block, BM=bm, ADD=add, **launch_options(4),
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _scale_rows_kernel(
    x, out, n_rows, scale, s_ot, s_oh,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m = (o_m < n_rows * G)[:, None] & (o_d < D)[None, :]
    t = (o_m // G).to(tl.int64)
    head = i_h * G + o_m % G
    b_x = tl.load(x + (i_h * n_rows * G + o_m).to(tl.int64)[:, None] * D + o_d[None, :], mask=m, other=0.0)
    p_out = out + t[:, None] * s_ot + head[:, None] * s_oh + o_d[None, :]
    b_x *= scale
    if ADD:
        b_x += tl.load(p_out, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out, b_x.to(out.dtype.element_ty), mask=m)


def scale_rows(x: Tensor, out: Tensor, scale: float, add: bool) -> None:
    """out [N, Hq, D] = scale * x [Hkv, N, G, D]; to ``add`` that to out instead."""
    n_kv, n_rows, group, dim = x.shape
    block = padded_dim(dim)
    bm = max(1, 4096 // block)
    with on_device(x):
        _scale_rows_kernel[(cdiv(n_rows * group, bm), n_kv)](
            x,
            out,
            n_rows,
            scale,
            out.stride(0),
            out.stride(1),
            G=group,
            D=dim,
            BD=block,
            BM=bm,
            ADD=add,
            **launch_options(4),
        )


@triton.jit(do_not_specialize=["n_pairs", "n_heads"], do_not_specialize_on_alignment=SLICED)
def _merge_rows_kernel(
    out, lse, part, part_lse, index, n_pairs, n_heads, s_ot, s_oh, s_lt, s_lh, s_part, s_part_lse,
    SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < n_pairs
    m_d = o_d < D
    b_any = tl.full([BM], -1, tl.int32)
    for s in range(SLOTS):
        b_any = tl.maximum(b_any, tl.load(index + o_m * SLOTS + s, mask=m_m, other=-1))
    if tl.max(b_any, 0) < 0:
        return
    # Rows without a part stay as they are, and are not touched.
    m_m = b_any >= 0
    t, head = o_m // n_heads, o_m % n_heads
    p_out = out + (t * s_ot + head * s_oh)[:, None] + o_d[None, :]
    b_out = tl.load(p_out, mask=m_m[:, None] & m_d[None, :], other=0.0)
    if HAS_LSE:
        p_lse = lse + t * s_lt + head * s_lh
        b_lse = tl.load(p_lse, mask=m_m, other=float("-inf"))
    for s in range(SLOTS):
        place = tl.load(index + o_m * SLOTS + s, mask=m_m, other=-1).to(tl.int64)
        m_s = place >= 0
        b_part = tl.load(part + place[:, None] * s_part + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
        if HAS_LSE:
            b_new = tl.load(part_lse + place * s_part_lse, mask=m_s, other=float("-inf"))
            b_max = tl.maximum(b_lse, b_new)
            b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
            b_a, b_b = tl.exp(b_lse - b_shift), tl.exp(b_new - b_shift)
            b_sum = b_a + b_b
            b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
            b_out = b_out * (b_a * b_norm)[:, None] + b_part * (b_b * b_norm)[:, None]
            b_lse = b_max + tl.log(b_sum)
        else:
            b_out += b_part
    tl.store(p_out, b_out, mask=m_m[:, None] & m_d[None, :])
    if HAS_LSE:
        tl.store(p_lse, b_lse, mask=m_m)


def merge_rows(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, index: Tensor) -> None:
    """Join partial results of single rows into ``out`` and ``lse``, in place and in the order of the slots.

    Args:
        out: [N, Hq, D] float32, unit stride in D; lse: [N, Hq] float32.
        part: [M, D] float32, unit stride in D; part_lse: [M] float32; any stride in M.
        index: [N, Hq, S] int32 contiguous, which partial result belongs to each slot, -1 for none.
    """
    _on_rows(out, lse, part, part_lse, index)


def add_rows(out: Tensor, part: Tensor, index: Tensor) -> None:
    """Add single rows to ``out`` [N, Hq, D], in place; part [M, D] and index [N, Hq, S] as in :func:`merge_rows`."""
    _on_rows(out, None, part, None, index)


def _on_rows(out: Tensor, lse: Tensor | None, part: Tensor, part_lse: Tensor | None, index: Tensor) -> None:
    n_rows, n_heads, dim = out.shape
    if part.shape[0] == 0 or index.numel() == 0:
        return
    block = padded_dim(dim)
    bm = max(1, 4096 // block)
    lse_strides = (0, 0) if lse is None else lse.stride()
    with on_device(out):
        _merge_rows_kernel[(cdiv(n_rows * n_heads, bm),)](
            out, lse, part, part_lse, index, n_rows * n_heads, n_heads, *out.stride()[:2], *lse_strides, part.stride(0),
            0 if part_lse is None else part_lse.stride(0),
            SLOTS=index.shape[2], D=dim, BD=block, BM=bm, HAS_LSE=lse is not None, **launch_options(4),
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_pairs", "n_heads"])
def _row_sums_kernel(
    a, b, sums, n_pairs, n_heads, s_at, s_ah, s_bt, s_bh, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < n_pairs
    m = m_m[:, None] & (o_d < D)[None, :]
    t, head = o_m // n_heads, o_m % n_heads
    b_a = tl.load(a + (t * s_at + head * s_ah)[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(b + (t * s_bt + head * s_bh)[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    tl.store(sums + o_m, tl.sum(b_a * b_b, 1), mask=m_m)


def row_sums(a: Tensor, b: Tensor) -> Tensor:
    """Sums of ``a * b`` over D in float32: a, b [N, Hq, D] -> [N, Hq]. With dout and out: the backward's ``delta``."""
    a, b = check_unit_stride(a), check_unit_stride(b)
    n_rows, n_heads, dim = a.shape
    sums = torch.empty(n_rows, n_heads, dtype=torch.float32, device=a.device)
    block = padded_dim(dim)
    bm = max(1, 4096 // block)
    if sums.numel():
        with on_device(a):
            _row_sums_kernel[(cdiv(n_rows * n_heads, bm),)](
                a, b, sums, n_rows * n_heads, n_heads, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
                D=dim, BD=block, BM=bm, **launch_options(4),
            )  # fmt: skip
    return sums
