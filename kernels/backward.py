"""Gradients of attention along the same index.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, S' visits per row
(see :mod:`.routing`). A tile is BM rows by BN keys; a visit has SHARE rows, 1, or G where a group shares its selection,
and lists are walked by rows. With the log-sum-exp of all that a row sees, and ``delta = rowsum(dout * out)``, every
(row, key) pair is independent of the others.

``_dkdv_kernel``: a program keeps BN keys of a block with their dK and dV in float32 registers, and walks over the
visits of its task. It can also produce dQ: as one partial per visit where a block is one tile of keys, or by float32
atomics. ``_dq_kernel`` computes dQ alone, a tile of visits against a whole block: two matrix products more, no atomics.

``_visit_table_kernel`` first writes a table, in the order of the lists, with what the other two need of each visit, so
that they need no dependent loads: row of Q and dout, row of its partial dQ (the first of SHARE), number of keys it
sees, log-sum-exp (base 2) and delta. These two stay in the order of Q's rows where a visit has several, side by side.
The table's kernel also writes what ``_dkdv_kernel`` has to know of each task, and its *edges*: for each tile of keys
the first visit that sees some of it. The visits before it belong to rows of this block that end before the tile; if
rows are in order, they come first in the list.

If a list is one task, its program stores dK and dV. The tasks of a longer list add theirs by atomics, in the
deterministic mode one after the other in the order of the list; programs then take their numbers from a counter, so
that a program waits only for programs that have started. If gradients are overwritten and all rows are in one slice,
lists of one task store the final gradients, rounded to the dtype of the output, and ``_finish_kernel`` writes those of
the longer lists from their float32 sums.
"""

import triton
import triton.language as tl

from .common import LOG2E, SLICED
from .routing import read_task

DQ_NONE = tl.constexpr(0)
DQ_PART = tl.constexpr(1)
DQ_ATOMIC = tl.constexpr(2)
# Of a task, before its edges; see :func:`_read_task_info`.
TASK_INFO = tl.constexpr(8)


@triton.jit(
    do_not_specialize=["n_visits", "n_entries", "first_list", "n_lists", "n_blocks"],
    do_not_specialize_on_alignment=SLICED,
)
def _visit_table_kernel(
    visits, tasks, list_start, visible, lse, delta, table, stats, task_info,
    n_visits, n_entries, task_rows, first_list, n_lists, n_blocks, room, s_token, s_lt, s_dt,
    G: tl.constexpr, SHARE: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    KEY_TILES: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``task_info`` [programs, 8 + KEY_TILES] is what :func:`_read_task_info` reads."""
    i_list, begin, end, n_keys, first_key, page, split = read_task(
        tasks, n_entries, task_rows, list_start, first_list, n_lists, tl.program_id(0)
    )
    first = tl.load(list_start)
    p_info = task_info + tl.program_id(0).to(tl.int64) * (TASK_INFO + KEY_TILES)
    tl.store(p_info, i_list)
    if i_list < 0:
        return
    i_h = i_list // n_blocks
    p_edges = p_info + TASK_INFO
    o_n = tl.arange(0, TILES)  # [TILES]
    current_end, first_other = begin, end
    for n in range(0, KEY_TILES, TILES):
        tl.store(p_edges + n + o_n, ((begin if SLOTS == S else end) - first) * SHARE, mask=n + o_n < KEY_TILES)
    tl.debug_barrier()
    for r in range(begin, end, BLOCK):
        o_v = r + tl.arange(0, BLOCK)  # [BLOCK]
        m_v = o_v < end  # [BLOCK]
        visit = tl.load(visits + o_v, mask=m_v, other=0)  # [BLOCK]
        row = visit // SLOTS  # [BLOCK]
        t = row // (G // SHARE)  # [BLOCK]
        head = i_h * G + row % (G // SHARE) * SHARE  # [BLOCK]
        limit = tl.full([BLOCK], 2147483647, tl.int32)  # [BLOCK]
        if SLOTS > S:
            m_current = m_v & (visit % SLOTS == S)  # [BLOCK]
            limit = tl.load(visible + t, mask=m_current, other=2147483647)
            current_end = tl.maximum(current_end, tl.max(tl.where(m_current, o_v + 1, 0), 0))
            first_other = tl.minimum(first_other, tl.min(tl.where(m_v & (visit % SLOTS != S), o_v, end), 0))
            if current_end > r:
                for n in range(0, KEY_TILES, TILES):
                    sees = m_current[:, None] & (limit[:, None] > (n + o_n)[None, :] * BN)  # [BLOCK, TILES]
                    edge = tl.min(tl.where(sees, o_v[:, None], end), 0) - first  # [TILES]
                    tl.atomic_min(p_edges + n + o_n, edge * SHARE, mask=n + o_n < KEY_TILES, sem="relaxed")
        p_table = table + o_v - first  # [BLOCK]
        tl.store(p_table, t * s_token + head, mask=m_v)
        tl.store(p_table + room, (i_h * n_visits + visit) * SHARE, mask=m_v)
        tl.store(p_table + 2 * room, limit, mask=m_v)
        if SHARE == 1:
            b_lse = tl.load(lse + t.to(tl.int64) * s_lt + head, mask=m_v, other=0.0)  # [BLOCK]
            b_delta = tl.load(delta + t.to(tl.int64) * s_dt + head, mask=m_v, other=0.0)  # [BLOCK]
            tl.store(stats + o_v - first, _pack(b_lse, b_delta), mask=m_v)
    if SLOTS > S:
        for n in range(0, KEY_TILES, TILES):
            tl.atomic_min(p_edges + n + o_n, (first_other - first) * SHARE, mask=n + o_n < KEY_TILES, sem="relaxed")
    i_sum = _sum_index(i_list, split - first, n_lists, room, task_rows)
    tl.store(p_info + 1, (end - first) * SHARE)
    tl.store(p_info + 2, (current_end - first) * SHARE)
    tl.store(p_info + 3, n_keys)
    tl.store(p_info + 4, first_key)
    tl.store(p_info + 5, page)
    tl.store(p_info + 6, tl.where(split >= 0, i_sum.to(tl.int32), -1))
    tl.store(p_info + 7, (begin - split) // task_rows)


@triton.jit(do_not_specialize=["n_pairs", "n_heads"], do_not_specialize_on_alignment=SLICED)
def _row_stats_kernel(lse, delta, stats, n_pairs, n_heads, s_token, s_lt, s_dt, BLOCK: tl.constexpr):
    """``stats`` in the order of Q's rows, where heads share a selection: a visit has SHARE of them side by side."""
    o_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_m = o_m < n_pairs  # [BLOCK]
    t, head = (o_m // n_heads).to(tl.int64), o_m % n_heads  # [BLOCK], [BLOCK]
    b_lse = tl.load(lse + t * s_lt + head, mask=m_m, other=0.0)  # [BLOCK]
    b_delta = tl.load(delta + t * s_dt + head, mask=m_m, other=0.0)  # [BLOCK]
    tl.store(stats + t * s_token + head, _pack(b_lse, b_delta), mask=m_m)


@triton.jit
def _read_task_info(task_info, i_task, i_n, KEY_TILES: tl.constexpr):
    """What a program of task ``i_task`` and tile of keys ``i_n`` has to know, by loads that do not wait for each other.

    The list, or -1 for none; the first row that sees some of the tile, the end of the task, and the end of its visits
    to current blocks; the number of keys of the block, the row of the first, their head; the index of the float32 sums
    if the list has several tasks, else -1; and then the task's number in the list. Rows are SHARE for each visit, and
    counted from the slice's first.
    """
    p_info = task_info + i_task.to(tl.int64) * (TASK_INFO + KEY_TILES)
    i_list, end, current_end = tl.load(p_info), tl.load(p_info + 1), tl.load(p_info + 2)
    n_keys, first_key, page = tl.load(p_info + 3), tl.load(p_info + 4), tl.load(p_info + 5)
    i_sum, number = tl.load(p_info + 6), tl.load(p_info + 7)
    return i_list, tl.load(p_info + TASK_INFO + i_n), end, current_end, n_keys, first_key, page, i_sum, number


@triton.jit
def _pack(lse, delta):
    """Log-sum-exp, made one of base 2, and delta as one 64-bit number."""
    low = (lse * LOG2E).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return delta.to(tl.int32, bitcast=True).to(tl.int64) << 32 | low


@triton.jit
def _unpack(stats):
    """Log-sum-exp (base 2) and delta from one 64-bit number: a thread needs many, and loads them in half the steps."""
    lse = (stats & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    return lse, (stats >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _sum_index(i_list, start, n_lists, room, task_rows):
    """Number of a split list among the min(lists, visits // R) sums: lists longer than R start at different
    multiples of it."""
    return tl.where(n_lists <= room // task_rows, i_list, start // task_rows).to(tl.int64)


@triton.jit
def _key_tile(
    r, end, b_k, b_v, b_dk, b_dv, q, dout, dq, table, stats, room, scale_log2, n_keys, o_m, o_n, o_d, m_d,
    MASKED: tl.constexpr, SHARE: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, DQ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows against the program's keys: adds to dk and dv, writes dq."""
    o_r = r + o_m  # [BM]
    o_v = o_r // SHARE  # [BM]
    m_m = o_r < end  # [BM]
    m_md = m_m[:, None] & m_d[None, :]  # [BM, BD]
    row = tl.load(table + o_v, mask=m_m, other=0).to(tl.int64) + o_r % SHARE  # [BM]
    b_lse, b_delta = _unpack(tl.load(stats + (o_v if SHARE == 1 else row), mask=m_m, other=0))  # [BM], [BM]
    b_q = tl.load(q + row[:, None] * D + o_d[None, :], mask=m_md, other=0.0)  # [BM, BD]
    b_do = tl.load(dout + row[:, None] * D + o_d[None, :], mask=m_md, other=0.0)  # [BM, BD]
    b_st = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
    b_pt = tl.exp2(b_st * scale_log2 - b_lse[None, :])  # [BN, BM]
    if MASKED:
        limit = tl.minimum(tl.load(table + 2 * room + o_v, mask=m_m, other=0), n_keys)  # [BM]
        b_pt = tl.where(o_n[:, None] < limit[None, :], b_pt, 0.0)
    b_dv = tl.dot(b_pt.to(dout.dtype.element_ty), b_do, b_dv, input_precision=PRECISION)  # [BN, BD]
    b_dpt = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, BM]
    b_dst = (b_pt * (b_dpt - b_delta[None, :])).to(q.dtype.element_ty)  # [BN, BM]
    b_dk = tl.dot(b_dst, b_q, b_dk, input_precision=PRECISION)  # [BN, BD]
    if DQ != DQ_NONE:
        b_dq = tl.dot(tl.trans(b_dst), b_k, input_precision=PRECISION)  # [BM, BD]
        o_dq = tl.load(table + room + o_v, mask=m_m, other=0).to(tl.int64)  # [BM]
        if DQ == DQ_PART:
            p_dq = dq + (o_dq + o_r % SHARE)[:, None] * D + o_d[None, :]  # [BM, BD]
            tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_md)
        else:
            p_dq = dq + (o_dq // (SHARE * SLOTS) * SHARE + o_r % SHARE)[:, None] * D + o_d[None, :]
            tl.atomic_add(p_dq, b_dq, mask=m_md, sem="relaxed")
    return b_dk, b_dv


@triton.jit(do_not_specialize=["first_head"])
def _dkdv_kernel(
    q, k, v, dout, dq, dk, dv, sum_k, sum_v, table, stats, task_info, turn,
    scale, room, block_size, first_head, s_kr, s_kh, s_vr, s_vh, s_dkr, s_dkh,
    SHARE: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, KEY_TILES: tl.constexpr, DQ: tl.constexpr, ORDERED: tl.constexpr,
    DIRECT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if ORDERED:
        # turn[0] counts the programs that have started; the rest holds, for each list and key tile, the task whose
        # turn it is.
        i = tl.atomic_add(turn, 1)
    else:
        i = tl.program_id(0)
    i_n = i % KEY_TILES
    i_task = i // KEY_TILES
    i_list, edge, end, current_end, n_keys, first_key, page, i_sum, number = _read_task_info(
        task_info, i_task, i_n, KEY_TILES
    )
    if i_list < 0:
        return
    begin = tl.load(task_info + i_task.to(tl.int64) * (TASK_INFO + KEY_TILES) + TASK_INFO)
    # Skip, in whole tiles, the rows of this block that end before this tile of keys.
    begin += (edge - begin) // BM * BM
    o_m, o_n, o_d = tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BD)  # [BM], [BN], [BD]
    m_d = o_d < D  # [BD]
    key, page = first_key.to(tl.int64) + o_n, page.to(tl.int64)  # [BN], scalar
    m_kv = (o_n < n_keys)[:, None] & m_d[None, :]  # [BN, BD]
    b_k = tl.load(k + key[:, None] * s_kr + page * s_kh + o_d[None, :], mask=m_kv, other=0.0)  # [BN, BD]
    b_v = tl.load(v + key[:, None] * s_vr + page * s_vh + o_d[None, :], mask=m_kv, other=0.0)  # [BN, BD]
    scale_log2 = scale * LOG2E

    b_dk = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
    b_dv = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
    # Tiles up to the last visit to a current block need a mask, and all do where the block ends within this tile of
    # keys. Elsewhere every row sees every key; rows past the end of the task are zero and add nothing.
    middle = tl.minimum(begin + (tl.maximum(current_end - begin, 0) + BM - 1) // BM * BM, end)
    middle = tl.where(n_keys < i_n * BN + BN, end, middle)
    for r in tl.range(begin, middle, BM, num_stages=STAGES):
        b_dk, b_dv = _key_tile(  # [BN, BD], [BN, BD]
            r, end, b_k, b_v, b_dk, b_dv, q, dout, dq, table, stats, room, scale_log2, n_keys, o_m, o_n, o_d, m_d,
            True, SHARE, SLOTS, D, DQ, PRECISION,
        )  # fmt: skip
    for r in tl.range(middle, end, BM, num_stages=STAGES):
        b_dk, b_dv = _key_tile(
            r, end, b_k, b_v, b_dk, b_dv, q, dout, dq, table, stats, room, scale_log2, n_keys, o_m, o_n, o_d, m_d,
            False, SHARE, SLOTS, D, DQ, PRECISION,
        )  # fmt: skip

    b_dk *= scale
    o_dk = key[:, None] * s_dkr + (page - first_head) * s_dkh + o_d[None, :]  # [BN, BD]
    if DIRECT:
        o_sum = (i_sum.to(tl.int64) * block_size + o_n)[:, None] * D + o_d[None, :]  # [BN, BD]
        p_dk, p_dv = sum_k + o_sum, sum_v + o_sum  # [BN, BD] each
    else:
        p_dk, p_dv = dk + o_dk, dv + o_dk
    if i_sum >= 0:
        if ORDERED:
            p_turn = turn + 1 + i_list * KEY_TILES + i_n
            while tl.atomic_add(p_turn, 0, sem="acquire") != number:
                pass
            tl.debug_barrier()
        tl.atomic_add(p_dk, b_dk, mask=m_kv, sem="relaxed")
        tl.atomic_add(p_dv, b_dv, mask=m_kv, sem="relaxed")
        if ORDERED:
            tl.debug_barrier()
            tl.atomic_add(p_turn, 1, sem="release")
    elif DIRECT:
        tl.store(dk + o_dk, b_dk.to(dk.dtype.element_ty), mask=m_kv)
        tl.store(dv + o_dk, b_dv.to(dv.dtype.element_ty), mask=m_kv)
    else:
        # Of several slices of rows an earlier one may have stored its part; they run one after the other.
        b_dk += tl.load(p_dk, mask=m_kv, other=0.0)
        b_dv += tl.load(p_dv, mask=m_kv, other=0.0)
        tl.store(p_dk, b_dk, mask=m_kv)
        tl.store(p_dv, b_dv, mask=m_kv)


@triton.jit(do_not_specialize=["n_lists", "n_blocks", "room", "s_row", "s_head"], do_not_specialize_on_alignment=SLICED)
def _finish_kernel(
    sum_k, sum_v, dk, dv, list_start, page_row, page_head, length,
    room, task_rows, n_lists, n_blocks, block_size, s_dkr, s_dkh, s_row, s_head, s_head_n,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_list = tl.program_id(0)
    first = tl.load(list_start)
    start = tl.load(list_start + i_list)
    n_visits = tl.load(list_start + i_list + 1) - start
    is_split = n_visits > task_rows
    if (n_visits > 0) & (n_visits <= task_rows):
        return
    i_h, i_b = i_list // n_blocks, i_list % n_blocks
    first_key = tl.load(page_row + i_h * s_row + i_b)
    if first_key < 0:
        return
    o_n, o_d = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BD)  # [BN], [BD]
    key = first_key + o_n  # [BN]
    n_keys = tl.load(length + i_b)
    m = (o_n < n_keys)[:, None] & (o_d < D)[None, :]  # [BN, BD]
    # A block without visits has gradient zero.
    m_sum = (o_n < tl.where(is_split, n_keys, 0))[:, None] & (o_d < D)[None, :]  # [BN, BD]
    i_sum = _sum_index(i_list, start - first, n_lists, room, task_rows)
    o_sum = (i_sum * block_size + o_n)[:, None] * D + o_d[None, :]  # [BN, BD]
    b_dk = tl.load(sum_k + o_sum, mask=m_sum, other=0.0)  # [BN, BD]
    b_dv = tl.load(sum_v + o_sum, mask=m_sum, other=0.0)  # [BN, BD]
    page = tl.load(page_head + i_h * s_head + i_b * s_head_n).to(tl.int64)
    o_dk = key[:, None] * s_dkr + page * s_dkh + o_d[None, :]  # [BN, BD]
    tl.store(dk + o_dk, b_dk.to(dk.dtype.element_ty), mask=m)
    tl.store(dv + o_dk, b_dv.to(dv.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["n_entries", "first_list", "n_lists"], do_not_specialize_on_alignment=SLICED)
def _dq_kernel(
    q, k, v, dout, part, table, stats, tasks, list_start,
    scale, room, n_entries, task_rows, first_list, n_lists, s_kr, s_kh, s_vr, s_vh,
    SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_list, begin, end, n_keys, first_key, page, _ = read_task(
        tasks, n_entries, task_rows, list_start, first_list, n_lists, tl.program_id(0)
    )
    first = tl.load(list_start)
    if i_list < 0:
        return
    first_key, page = first_key.to(tl.int64), page.to(tl.int64)
    # A block may be longer than 31 bits of elements.
    s_kr, s_vr = tl.cast(s_kr, tl.int64), tl.cast(s_vr, tl.int64)
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)  # [BM], [BN], [BD]
    m_d = o_d < D  # [BD]
    p_k = k + (first_key + o_n)[:, None] * s_kr + page * s_kh + o_d[None, :]  # [BN, BD]
    p_v = v + (first_key + o_n)[None, :] * s_vr + page * s_vh + o_d[:, None]  # [BD, BN]

    o_r = (begin - first) * SHARE + o_m  # [BM]
    o_v = o_r // SHARE  # [BM]
    m_m = o_v < end - first  # [BM]
    m_md = m_m[:, None] & m_d[None, :]  # [BM, BD]
    row = tl.load(table + o_v, mask=m_m, other=0).to(tl.int64) + o_r % SHARE  # [BM]
    o_dq = tl.load(table + room + o_v, mask=m_m, other=0).to(tl.int64) + o_r % SHARE  # [BM]
    limit = tl.minimum(tl.load(table + 2 * room + o_v, mask=m_m, other=0), n_keys)  # [BM]
    b_lse, b_delta = _unpack(tl.load(stats + (o_v if SHARE == 1 else row), mask=m_m, other=0))  # [BM], [BM]
    b_q = tl.load(q + row[:, None] * D + o_d[None, :], mask=m_md, other=0.0)  # [BM, BD]
    b_do = tl.load(dout + row[:, None] * D + o_d[None, :], mask=m_md, other=0.0)  # [BM, BD]
    b_dq = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
    scale_log2 = scale * LOG2E
    for n in tl.range(0, tl.max(limit, 0), BN, num_stages=STAGES):
        m_n = n + o_n < n_keys  # [BN]
        b_k = tl.load(p_k + n * s_kr, mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
        b_v = tl.load(p_v + n * s_vr, mask=m_n[None, :] & m_d[:, None], other=0.0)  # [BD, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [BM, BN]
        b_p = tl.where((n + o_n)[None, :] < limit[:, None], tl.exp2(b_s - b_lse[:, None]), 0.0)  # [BM, BN]
        b_dp = tl.dot(b_do, b_v, input_precision=PRECISION)  # [BM, BN]
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(q.dtype.element_ty)  # [BM, BN]
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
    p_dq = part + o_dq[:, None] * D + o_d[None, :]  # [BM, BD]
    tl.store(p_dq, b_dq.to(part.dtype.element_ty), mask=m_md)
