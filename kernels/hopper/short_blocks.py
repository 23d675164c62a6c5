"""The forward of blocks that fit a tile of keys: a program keeps K and V of its block, and rows stream past.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, S' visits per row
(see :mod:`..routing`). A tile is 2 * BM rows by BN keys, of which a block has up to all. A program has a task: rows of
one list, one tile after the other.

The work is bound by memory: a row is read, and a partial output of its size written, for 4 * B * D operations. The
producer warpgroup therefore keeps STAGES tiles of gathered rows in flight, and the two consumers, each with BM of a
tile's rows, go their own pace. Tasks in the order of their first rows, so that those which run together read the same
queries, and storing partial outputs as what the L2 cache drops first, changed nothing.

Barriers: ``kv_full`` K and V have arrived; ``q_full``, one for each buffer, rows, where their output goes and their
limits have arrived; ``q_empty`` both consumers have read them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common import LN2, SLICED
from .shared import barrier, copy_rows, in_each_warp, load_blocks, read_task, store_rows, tiles_of_keys


@gluon.jit
def _visits(visits, o_r, end, SHARE: gl.constexpr):
    """The visits of the rows ``o_r`` of a list, 0 past its end."""
    return gl.load(visits + o_r // SHARE, mask=o_r < end, other=0)


@gluon.jit
def _produce(
    q, k_desc, v_desc, k, v, visits, visible, i_h, begin, end, n_keys, n_heads, first_key, k_column, v_column,
    s_qt, s_qh, s_kr, s_vr, q_s, k_s, v_s, out_row_s, limit_s, kv_full, q_full, q_empty,
    G: gl.constexpr, SHARE: gl.constexpr, S: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))  # [D]
    o_m = gl.arange(0, BM, layout=gl.SliceLayout(1, WIDE))  # [BM]
    o_f = gl.arange(0, 2 * BM, layout=FLAT)  # [2 * BM]
    # These loads are in flight while those of K and V are issued.
    upper = _visits(visits, begin + o_m, end, SHARE)  # [BM]
    lower = _visits(visits, begin + BM + o_m, end, SHARE)  # [BM]
    flat = _visits(visits, begin + o_f, end, SHARE)  # [2 * BM]
    load_blocks(k_desc, v_desc, k, v, first_key, k_column, v_column, s_kr, s_vr, n_keys, kv_full, k_s, v_s, BN, D)
    i = 0
    for r in range(begin, end, 2 * BM):
        buf = i % STAGES
        mbarrier.wait(q_empty.index(buf), i // STAGES % 2 ^ 1)
        for half in gl.static_range(2):
            visit = upper if half == 0 else lower  # [BM]
            row = visit // SLOTS  # [BM]
            # Heads that share a selection are numbered together.
            head = (i_h * (G // SHARE) + row % (G // SHARE)) * SHARE + (r + half * BM + o_m) % SHARE  # [BM]
            offset = (row // (G // SHARE)).to(gl.int64) * s_qt + head.to(gl.int64) * s_qh  # [BM]
            offset = gl.multiple_of(offset, 8)
            copy_rows(q_s.index(2 * buf + half), q + offset[:, None] + o_d[None, :])
        async_copy.mbarrier_arrive(q_full.index(buf), increment_count=False)
        m_r = r + o_f < end  # [2 * BM]
        row = flat // SLOTS  # [2 * BM]
        slot = flat - row * SLOTS  # [2 * BM]
        t = row // (G // SHARE)  # [2 * BM]
        shared = i_h * (G // SHARE) + row % (G // SHARE)  # [2 * BM]
        limit = gl.where(m_r, n_keys, 0)  # [2 * BM]
        if SLOTS > S:
            m_current = m_r & (slot == S)  # [2 * BM]
            seen = gl.minimum(gl.load(visible + t, mask=m_current, other=0), n_keys)  # [2 * BM]
            limit = gl.where(m_current, seen, limit)
        out_row = ((t * (n_heads // SHARE) + shared) * SLOTS + slot) * SHARE + (r + o_f) % SHARE  # [2 * BM]
        out_row_s.index(buf).store(gl.where(m_r, out_row, -1))
        limit_s.index(buf).store(limit)
        barrier()
        mbarrier.arrive(q_full.index(buf), count=1)
        ahead = r + 2 * BM
        upper = _visits(visits, ahead + o_m, end, SHARE)
        lower = _visits(visits, ahead + BM + o_m, end, SHARE)
        flat = _visits(visits, ahead + o_f, end, SHARE)
        i += 1
    async_copy.wait_group(0)


@gluon.jit
def _consume(
    half: gl.constexpr, part, part_lse, begin, end, scale_log2, q_s, k_s, v_s, out_row_s, limit_s,
    kv_full, q_full, q_empty, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: half ``half`` of the rows of each tile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, MMA))  # [BN]
    mbarrier.wait(kv_full, 0)
    i = 0
    for _ in range(begin, end, 2 * BM):
        buf = i % STAGES
        mbarrier.wait(q_full.index(buf), i // STAGES % 2)
        fence_async_shared()
        zero = gl.zeros([BM, BN], gl.float32, MMA)  # [BM, BN]
        s = warpgroup_mma(q_s.index(2 * buf + half), k_s.permute((1, 0)), zero, use_acc=False, is_async=True)
        _, whole = tiles_of_keys(limit_s.index(buf).load(in_each_warp(2 * BM)), BN)
        limit = limit_s.index(buf).slice(half * BM, BM).load(ROWS)  # [BM]
        out_row = out_row_s.index(buf).slice(half * BM, BM).load(ROWS)  # [BM]
        s = warpgroup_mma_wait(0, deps=[s])  # [BM, BN]
        mbarrier.arrive(q_empty.index(buf), count=1)
        if whole == 0:
            s = gl.where(o_n[None, :] < limit[:, None], s, float("-inf"))
        b_max = gl.max(s, 1)  # [BM]
        b_shift = gl.where(b_max == float("-inf"), 0.0, b_max * scale_log2)  # [BM]
        b_p = gl.exp2(s * scale_log2 - b_shift[:, None])  # [BM, BN]
        b_sum = gl.sum(b_p, 1)  # [BM]
        p = gl.convert_layout(b_p.to(q_s.dtype), gl.DotOperandLayout(0, MMA_O, 2))  # [BM, BN]
        zero_o = gl.zeros([BM, D], gl.float32, MMA_O)  # [BM, D]
        b_o = warpgroup_mma(p, v_s, zero_o, use_acc=False, is_async=True)  # [BM, D]
        gl.store(part_lse + out_row, (b_shift + gl.log2(b_sum)) * LN2, mask=out_row >= 0)
        b_norm = 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)  # [BM]
        b_o, p = warpgroup_mma_wait(0, deps=[b_o, p])  # [BM, D], [BM, BN]
        b_o = b_o * gl.convert_layout(b_norm, gl.SliceLayout(1, MMA_O))[:, None]
        store_rows(part, out_row, b_o, D)
        i += 1


@gluon.jit(
    do_not_specialize=["n_entries", "first_list", "n_lists", "n_blocks", "n_heads"],
    do_not_specialize_on_alignment=SLICED,
)
def short_block_kernel(
    q, k_desc, v_desc, k, v, part, part_lse, visits, tasks, list_start, visible,
    scale_log2, n_entries, first_list, n_lists, n_blocks, n_heads, s_qt, s_qh, s_kr, s_kh, s_vr, s_vh,
    TASK_ROWS: gl.constexpr, G: gl.constexpr, SHARE: gl.constexpr, S: gl.constexpr, SLOTS: gl.constexpr,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Arguments as of :func:`..forward._short_block_kernel`; ``k_desc``, ``v_desc`` fetch boxes of BN rows."""
    i_list, begin, end, n_keys, first_key, page, _ = read_task(
        tasks, n_entries, TASK_ROWS, list_start, first_list, n_lists, gl.program_id(0)
    )

    dtype: gl.constexpr = k_desc.dtype
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ONE: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(dtype, [2 * STAGES, BM, D], gl.NVMMASharedLayout.get_default_for([BM, D], dtype))
    k_s = gl.allocate_shared_memory(dtype, [BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [BN, D], v_desc.layout)
    out_row_s = gl.allocate_shared_memory(gl.int32, [STAGES, 2 * BM], ROWS)
    limit_s = gl.allocate_shared_memory(gl.int32, [STAGES, 2 * BM], ROWS)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], ONE)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    mbarrier.init(kv_full, count=1)
    # A tile of rows is complete when the copies of the producer's 128 threads are, and its stores: one arrival more.
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=129)
        mbarrier.init(q_empty.index(i), count=2)
    fence_async_shared()
    # Exit only here: barrier setup overlaps with the task-record loads issued above.
    if i_list < 0:
        return
    i_h = i_list // n_blocks
    begin, end = begin * SHARE, end * SHARE
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), part, part_lse, begin, end, scale_log2, q_s, k_s, v_s, out_row_s, limit_s,
                kv_full, q_full, q_empty, D, BM, BN, STAGES,
            )),
            (_consume, (
                gl.constexpr(1), part, part_lse, begin, end, scale_log2, q_s, k_s, v_s, out_row_s, limit_s,
                kv_full, q_full, q_empty, D, BM, BN, STAGES,
            )),
            (_produce, (
                q, k_desc, v_desc, k, v, visits, visible, i_h, begin, end, n_keys, n_heads, first_key,
                page * s_kh, page * s_vh, s_qt, s_qh, s_kr, s_vr, q_s, k_s, v_s, out_row_s, limit_s,
                kv_full, q_full, q_empty, G, SHARE, S, SLOTS, D, BM, BN, STAGES,
            )),
        ],
        [4, 4],
        # 168 registers for each of 384 threads on average; those that the producer gives up go to the consumers.
        [252 - REGISTERS // 2, REGISTERS],
    )  # fmt: skip
