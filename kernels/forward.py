"""Attention of routed rows to blocks: one partial output and log-sum-exp per visit.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, S' visits per row
(see :mod:`.routing`). A tile is BM rows by BN keys; a visit has SHARE rows, G where a group shares its selection.

Where a block fits one tile of keys, a program keeps it and loops over the visits of its task (``_short_block_kernel``):
the work is bound by memory, and K and V are read once per task. A program of ``_long_block_kernel`` keeps one tile of
visits and loops over the keys of a longer block. A visit to a row's current block sees a prefix of it. A list begins
with those visits, in order, so tiles that see few keys stop early and the work on current blocks stays causal.
"""

import triton
import triton.language as tl

from .common import LN2, SLICED
from .routing import read_task


@triton.jit
def visit_rows(
    visits, visible, o_r, m_r, i_h, n_keys, n_heads, G: tl.constexpr, SHARE: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """For the rows at ``o_r`` of the lists, SHARE for each visit: token, query head, row of the partial output, and
    number of keys seen (0 if masked)."""
    visit = tl.load(visits + o_r // SHARE, mask=m_r, other=0)  # [BM]
    row = visit // SLOTS  # [BM]
    slot = visit - row * SLOTS  # [BM]
    t = (row // (G // SHARE)).to(tl.int64)  # [BM]
    # Heads that share a selection are numbered together.
    shared = (i_h * (G // SHARE) + row % (G // SHARE)).to(tl.int64)  # [BM]
    limit = tl.where(m_r, n_keys, 0)  # [BM]
    if SLOTS > S:
        m_current = m_r & (slot == S)  # [BM]
        limit = tl.where(m_current, tl.minimum(tl.load(visible + t, mask=m_current, other=0), n_keys), limit)
    o_part = ((t * (n_heads // SHARE) + shared) * SLOTS + slot) * SHARE + o_r % SHARE  # [BM]
    return t, shared * SHARE + o_r % SHARE, o_part, limit


@triton.jit(
    do_not_specialize=["n_entries", "first_list", "n_lists", "n_blocks", "n_heads"],
    do_not_specialize_on_alignment=SLICED,
)
def _short_block_kernel(
    q, k, v, part, part_lse, visits, tasks, list_start, visible,
    scale_log2, n_entries, task_rows, first_list, n_lists, n_blocks, n_heads,
    s_qt, s_qh, s_kr, s_kh, s_vr, s_vh,
    G: tl.constexpr, SHARE: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_list, begin, end, n_keys, first_key, page, _ = read_task(
        tasks, n_entries, task_rows, list_start, first_list, n_lists, tl.program_id(0)
    )
    if i_list < 0:
        return
    i_h = i_list // n_blocks
    begin, end = begin * SHARE, end * SHARE
    first_key, page = first_key.to(tl.int64), page.to(tl.int64)
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)  # [BM], [BN], [BD]
    m_d = o_d < D  # [BD]
    key = first_key + o_n  # [BN]
    m_kv = (o_n < n_keys)[:, None] & m_d[None, :]  # [BN, BD]
    b_k = tl.load(k + key[:, None] * s_kr + page * s_kh + o_d[None, :], mask=m_kv, other=0.0)  # [BN, BD]
    b_v = tl.load(v + key[:, None] * s_vr + page * s_vh + o_d[None, :], mask=m_kv, other=0.0)  # [BN, BD]

    for r in tl.range(begin, end, BM, num_stages=STAGES):
        m_m = r + o_m < end  # [BM]
        t, head, o_part, limit = visit_rows(  # [BM] each
            visits, visible, r + o_m, m_m, i_h, n_keys, n_heads, G, SHARE, S, SLOTS
        )
        p_q = q + t[:, None] * s_qt + head[:, None] * s_qh + o_d[None, :]  # [BM, BD]
        b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [BM, BN]
        b_s = tl.where(o_n[None, :] < limit[:, None], b_s, float("-inf"))
        b_max = tl.max(b_s, 1)  # [BM]
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_p = tl.exp2(b_s - b_max[:, None])  # [BM, BN]
        b_sum = tl.sum(b_p, 1)  # [BM]
        b_o = tl.dot(b_p.to(v.dtype.element_ty), b_v, input_precision=PRECISION)  # [BM, BD]
        b_o *= (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
        tl.store(part_lse + o_part, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)
        p_o = part + o_part[:, None] * D + o_d[None, :]  # [BM, BD]
        tl.store(p_o, b_o.to(part.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])


@triton.jit
def _key_tile(
    n, b_o, b_max, b_sum, b_q, p_k, p_v, limit, n_keys, o_n, m_d, s_kr, s_vr, scale_log2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the softmax over a long block: BN keys from ``n`` on against the tile's visits."""
    m_k, m_v = m_d[:, None], m_d[None, :]  # [BD, BN], [BN, BD]
    if MASKED:
        m_n = n + o_n < n_keys  # [BN]
        m_k, m_v = m_n[None, :] & m_k, m_n[:, None] & m_v
    b_k = tl.load(p_k + n * s_kr, mask=m_k, other=0.0)  # [BD, BN]
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale_log2  # [BM, BN]
    if MASKED:
        b_s = tl.where((n + o_n)[None, :] < limit[:, None], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))  # [BM]
    # While all scores of a row are -inf, -inf - -inf would be NaN.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # [BM]
    b_p = tl.exp2(b_s - b_shift[:, None])  # [BM, BN]
    b_scale = tl.exp2(b_max - b_shift)  # [BM]
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)  # [BM]
    b_v = tl.load(p_v + n * s_vr, mask=m_v, other=0.0)  # [BN, BD]
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_scale[:, None], input_precision=PRECISION)  # [BM, BD]
    return b_o, b_new, b_sum


@triton.jit(
    do_not_specialize=["n_entries", "first_list", "n_lists", "n_blocks", "n_heads"],
    do_not_specialize_on_alignment=SLICED,
)
def _long_block_kernel(
    q, k, v, part, part_lse, visits, tasks, list_start, visible,
    scale_log2, n_entries, task_rows, first_list, n_lists, n_blocks, n_heads,
    s_qt, s_qh, s_kr, s_kh, s_vr, s_vh,
    G: tl.constexpr, SHARE: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_list, begin, end, n_keys, first_key, page, _ = read_task(
        tasks, n_entries, task_rows, list_start, first_list, n_lists, tl.program_id(0)
    )
    if i_list < 0:
        return
    i_h = i_list // n_blocks
    begin, end = begin * SHARE, end * SHARE
    first_key, page = first_key.to(tl.int64), page.to(tl.int64)
    # A block may be longer than 31 bits of elements.
    s_kr, s_vr = tl.cast(s_kr, tl.int64), tl.cast(s_vr, tl.int64)
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)  # [BM], [BN], [BD]
    m_d = o_d < D  # [BD]
    p_k = k + (first_key + o_n)[None, :] * s_kr + page * s_kh + o_d[:, None]  # [BD, BN]
    p_v = v + (first_key + o_n)[:, None] * s_vr + page * s_vh + o_d[None, :]  # [BN, BD]

    m_m = begin + o_m < end  # [BM]
    t, head, o_part, limit = visit_rows(  # [BM] each
        visits, visible, begin + o_m, m_m, i_h, n_keys, n_heads, G, SHARE, S, SLOTS
    )
    p_q = q + t[:, None] * s_qt + head[:, None] * s_qh + o_d[None, :]  # [BM, BD]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
    b_max = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    b_sum = tl.zeros([BM], tl.float32)  # [BM]
    b_o = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
    # Tiles of keys that every row sees entirely need no mask.
    n_unmasked = tl.min(tl.where(m_m, limit, n_keys), 0) // BN * BN
    for n in tl.range(0, n_unmasked, BN, num_stages=STAGES):
        b_o, b_max, b_sum = _key_tile(  # [BM, BD], [BM], [BM]
            n, b_o, b_max, b_sum, b_q, p_k, p_v, limit, n_keys, o_n, m_d, s_kr, s_vr, scale_log2, False, PRECISION
        )
    for n in tl.range(n_unmasked, tl.max(limit, 0), BN, num_stages=STAGES):
        b_o, b_max, b_sum = _key_tile(
            n, b_o, b_max, b_sum, b_q, p_k, p_v, limit, n_keys, o_n, m_d, s_kr, s_vr, scale_log2, True, PRECISION
        )

    b_o *= (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    tl.store(part_lse + o_part, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)
    p_o = part + o_part[:, None] * D + o_d[None, :]  # [BM, BD]
    tl.store(p_o, b_o.to(part.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
