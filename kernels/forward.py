"""Attention of routed rows to blocks: one partial output and log-sum-exp per visit.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, S' visits per row
(see :mod:`.routing`). A tile is BM visits by BN keys.

Where a block fits one tile of keys, a program keeps it and walks over the visits of its task (``_short_block_kernel``):
the work is bound by memory, and K and V are read once per task. Longer blocks are streamed past one tile of visits
(``_long_block_kernel``). A visit to a row's current block sees a prefix of it. A list begins with those visits, in
order, so tiles that see few keys stop early and the work on current blocks stays causal.
"""

import triton
import triton.language as tl

from .common import SLICED
from .routing import read_task

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visit_rows(visits, visible, o_v, m_v, i_h, n_keys, G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr):
    """For places ``o_v`` of the index: row, query head, place in [N, Hq, S'], and number of keys seen (0 if masked)."""
    visit = tl.load(visits + o_v, mask=m_v, other=0)
    row = visit // SLOTS
    slot = visit - row * SLOTS
    t = (row // G).to(tl.int64)
    head = (i_h * G + row % G).to(tl.int64)
    limit = tl.where(m_v, n_keys, 0)
    if SLOTS > S:
        m_current = m_v & (slot == S)
        limit = tl.where(m_current, tl.minimum(tl.load(visible + t, mask=m_current, other=0), n_keys), limit)
    return t, head, slot, limit


@triton.jit(
    do_not_specialize=["places", "first_list", "n_lists", "n_blocks", "n_heads"],
    do_not_specialize_on_alignment=SLICED,
)
def _short_block_kernel(
    q, k, v, part, part_lse, visits, tasks, list_start, visible,
    scale_log2, places, task_rows, first_list, n_lists, n_blocks, n_heads,
    s_qt, s_qh, s_kr, s_kh, s_vr, s_vh,
    G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_list, begin, end, n_keys, first_key, page, _ = read_task(
        tasks, places, task_rows, list_start, first_list, n_lists, tl.program_id(0)
    )
    if i_list < 0:
        return
    i_h = i_list // n_blocks
    first_key, page = first_key.to(tl.int64), page.to(tl.int64)
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    m_d = o_d < D
    key = first_key + o_n
    m_kv = (o_n < n_keys)[:, None] & m_d[None, :]
    b_k = tl.load(k + key[:, None] * s_kr + page * s_kh + o_d[None, :], mask=m_kv, other=0.0)
    b_v = tl.load(v + key[:, None] * s_vr + page * s_vh + o_d[None, :], mask=m_kv, other=0.0)

    for r in tl.range(begin, end, BM, num_stages=STAGES):
        m_m = r + o_m < end
        t, head, slot, limit = visit_rows(visits, visible, r + o_m, m_m, i_h, n_keys, G, S, SLOTS)
        p_q = q + t[:, None] * s_qt + head[:, None] * s_qh + o_d[None, :]
        b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        b_s = tl.where(o_n[None, :] < limit[:, None], b_s, float("-inf"))
        b_max = tl.max(b_s, 1)
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_p = tl.exp2(b_s - b_max[:, None])
        b_sum = tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(v.dtype.element_ty), b_v, input_precision=PRECISION)
        b_o *= (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
        place = (t * n_heads + head) * SLOTS + slot
        tl.store(part_lse + place, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)
        p_o = part + place[:, None] * D + o_d[None, :]
        tl.store(p_o, b_o.to(part.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])


@triton.jit(
    do_not_specialize=["places", "first_list", "n_lists", "n_blocks", "n_heads"],
    do_not_specialize_on_alignment=SLICED,
)
def _long_block_kernel(
    q, k, v, part, part_lse, visits, tasks, list_start, visible,
    scale_log2, places, task_rows, first_list, n_lists, n_blocks, n_heads,
    s_qt, s_qh, s_kr, s_kh, s_vr, s_vh,
    G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_list, begin, end, n_keys, first_key, page, _ = read_task(
        tasks, places, task_rows, list_start, first_list, n_lists, tl.program_id(0)
    )
    if i_list < 0:
        return
    i_h = i_list // n_blocks
    first_key, page = first_key.to(tl.int64), page.to(tl.int64)
    # A block may be longer than 31 bits of elements.
    s_kr, s_vr = tl.cast(s_kr, tl.int64), tl.cast(s_vr, tl.int64)
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    m_d = o_d < D
    p_k = k + (first_key + o_n)[None, :] * s_kr + page * s_kh + o_d[:, None]
    p_v = v + (first_key + o_n)[:, None] * s_vr + page * s_vh + o_d[None, :]

    m_m = begin + o_m < end
    t, head, slot, limit = visit_rows(visits, visible, begin + o_m, m_m, i_h, n_keys, G, S, SLOTS)
    p_q = q + t[:, None] * s_qt + head[:, None] * s_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    # Tiles of keys that every row sees whole need no mask.
    whole = tl.min(tl.where(m_m, limit, n_keys), 0) // BN * BN
    for n in tl.range(0, whole, BN, num_stages=STAGES):
        b_k = tl.load(p_k + n * s_kr, mask=m_d[:, None], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale_log2
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # A row whose scores are all -inf so far must not make NaN of -inf - -inf.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_scale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_v = tl.load(p_v + n * s_vr, mask=m_d[None, :], other=0.0)
        b_o = tl.dot(b_p.to(v.dtype.element_ty), b_v, b_o * b_scale[:, None], input_precision=PRECISION)
        b_max = b_new
    for n in tl.range(whole, tl.max(limit, 0), BN, num_stages=STAGES):
        m_n = n + o_n < n_keys
        b_k = tl.load(p_k + n * s_kr, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale_log2
        b_s = tl.where((n + o_n)[None, :] < limit[:, None], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_scale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_v = tl.load(p_v + n * s_vr, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_o = tl.dot(b_p.to(v.dtype.element_ty), b_v, b_o * b_scale[:, None], input_precision=PRECISION)
        b_max = b_new

    b_o *= (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    place = (t * n_heads + head) * SLOTS + slot
    tl.store(part_lse + place, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)
    p_o = part + place[:, None] * D + o_d[None, :]
    tl.store(p_o, b_o.to(part.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
