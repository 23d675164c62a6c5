"""The forward of blocks of one tile of keys: K and V stay while the rows of a task pass.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, S' visits per row
(see :mod:`..routing`). A tile is BM visits by the BN keys of a block. Two groups of warps take tiles in turn; a third
one gathers their rows, and K and V of the next task, so that the work, bound by memory, never waits. Programs stay for
many tasks.
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

from .shared import LN2, barrier, load_block, read_task


@gluon.jit
def _produce(
    q, k_desc, v_desc, k, v, visits, visible, tasks, list_start, page_row, page_head, length,
    n_tasks, places, task_rows, first_list, n_lists, n_blocks, n_heads,
    s_qt, s_qh, s_kr, s_kh, s_vr, s_vh, s_row, s_head, s_head_n,
    q_s, k_s, v_s, place_s, limit_s, q_full, q_empty, kv_full, kv_empty,
    G: gl.constexpr, S: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_f = gl.arange(0, BM, layout=FLAT)
    o_m = gl.arange(0, BM, layout=gl.SliceLayout(1, WIDE))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
    i = 0
    i_kv = 0
    for i_task in range(gl.program_id(0), n_tasks, gl.num_programs(0)):
        i_list, begin, end = read_task(tasks, places, task_rows, list_start, first_list, n_lists, i_task)
        # A place without a task has no rows.
        end = gl.where(i_list < 0, begin, end)
        i_list = gl.maximum(i_list, 0)
        flat = gl.load(visits + begin + o_f, mask=begin + o_f < end, other=0)
        wide = gl.load(visits + begin + o_m, mask=begin + o_m < end, other=0)
        i_h = i_list // n_blocks
        i_b = i_list % n_blocks
        n_keys = gl.load(length + i_b)
        if begin < end:
            key = gl.load(page_row + i_h * s_row + i_b).to(gl.int32)
            page = gl.load(page_head + i_h * s_head + i_b * s_head_n)
            buf = i_kv % 2
            full = kv_full.index(buf)
            mbarrier.wait(kv_empty.index(buf), i_kv // 2 % 2 ^ 1)
            load_block(k_desc, k, key, page * s_kh, s_kr, n_keys, full, k_s.index(buf), BN, D)
            load_block(v_desc, v, key, page * s_vh, s_vr, n_keys, full, v_s.index(buf), BN, D)
            i_kv += 1
        for r in range(begin, end, BM):
            stage = i % STAGES
            m_f = r + o_f < end
            row = flat // SLOTS
            slot = flat - row * SLOTS
            t = row // G
            limit = gl.where(m_f, n_keys, 0)
            if SLOTS > S:
                m_own = m_f & (slot == S)
                limit = gl.where(m_own, gl.minimum(gl.load(visible + t, mask=m_own, other=0), n_keys), limit)
            place = gl.where(m_f, (t * n_heads + i_h * G + row % G) * SLOTS + slot, -1)
            row = wide // SLOTS
            offset = (row // G).to(gl.int64) * s_qt + (i_h * G + row % G).to(gl.int64) * s_qh
            mbarrier.wait(q_empty.index(stage), i // STAGES % 2 ^ 1)
            async_copy.async_copy_global_to_shared(q_s.index(stage), q + offset[:, None] + o_d[None, :])
            async_copy.mbarrier_arrive(q_full.index(stage), increment_count=False)
            place_s.index(stage).store(place)
            limit_s.index(stage).store(limit)
            barrier()
            mbarrier.arrive(q_full.index(stage), count=1)
            ahead = r + BM
            flat = gl.load(visits + ahead + o_f, mask=ahead + o_f < end, other=0)
            wide = gl.load(visits + ahead + o_m, mask=ahead + o_m < end, other=0)
            i += 1
    async_copy.wait_group(0)


@gluon.jit
def _consume(
    half: gl.constexpr, part, part_lse, tasks, list_start, n_tasks, places, task_rows, first_list, n_lists, scale_log2,
    q_s, k_s, v_s, place_s, limit_s, q_full, q_empty, kv_full, kv_empty,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(0, MMA_O, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, MMA))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
    i_kv = 0
    base = 0
    i_list, begin, end = read_task(tasks, places, task_rows, list_start, first_list, n_lists, gl.program_id(0))
    for i_task in range(gl.program_id(0), n_tasks, gl.num_programs(0)):
        n_tiles = gl.where(i_list < 0, 0, (end - begin + BM - 1) // BM)
        next_task = i_task + gl.num_programs(0)
        i_list, begin, end = read_task(tasks, places, task_rows, list_start, first_list, n_lists, next_task)
        k_t = k_s.index(i_kv % 2)
        v_t = v_s.index(i_kv % 2)
        if n_tiles > 0:
            mbarrier.wait(kv_full.index(i_kv % 2), i_kv // 2 % 2)
        # Tiles are counted through all tasks; even ones are the first group's.
        for i in range(base + (base + half) % 2, base + n_tiles, 2):
            stage = i % STAGES
            q_t = q_s.index(stage)
            mbarrier.wait(q_full.index(stage), i // STAGES % 2)
            fence_async_shared()
            zero = gl.zeros([BM, BN], gl.float32, MMA)
            s = warpgroup_mma(q_t, k_t.permute((1, 0)), zero, use_acc=False, is_async=True)
            limit = limit_s.index(stage).load(ROWS)
            s = warpgroup_mma_wait(0, deps=[s])
            s = gl.where(o_n[None, :] < limit[:, None], s, float("-inf"))
            b_max = gl.max(s, 1)
            b_shift = gl.where(b_max == float("-inf"), 0.0, b_max * scale_log2)
            b_p = gl.exp2(s * scale_log2 - b_shift[:, None])
            b_sum = gl.sum(b_p, 1)
            p = gl.convert_layout(b_p.to(q_t.dtype), PROBS)
            b_o = warpgroup_mma(p, v_t, gl.zeros([BM, D], gl.float32, MMA_O), use_acc=False, is_async=True)
            place = place_s.index(stage).load(ROWS)
            gl.store(part_lse + place, (b_shift + gl.log2(b_sum)) * LN2, mask=place >= 0)
            b_norm = 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)
            b_o, p = warpgroup_mma_wait(0, deps=[b_o, p])
            b_o = b_o * gl.convert_layout(b_norm, gl.SliceLayout(1, MMA_O))[:, None]
            # The rows of Q are done with: the output passes through their place, to leave in whole lines.
            q_t.store(b_o.to(q_t.dtype))
            barrier()
            place = place_s.index(stage).load(gl.SliceLayout(1, WIDE))
            p_o = part + place.to(gl.int64)[:, None] * D + o_d[None, :]
            gl.store(p_o, q_t.load(WIDE), mask=(place >= 0)[:, None])
            barrier()
            mbarrier.arrive(q_empty.index(stage), count=1)
        if n_tiles > 0:
            mbarrier.arrive(kv_empty.index(i_kv % 2), count=1)
            i_kv += 1
        base += n_tiles


@gluon.jit(do_not_specialize=["n_tasks", "places", "first_list", "n_lists"])
def short_block_kernel(
    q, k_desc, v_desc, k, v, part, part_lse, visits, tasks, list_start, visible, page_row, page_head, length,
    scale_log2, n_tasks, places, task_rows, first_list, n_lists, n_blocks, n_heads,
    s_qt, s_qh, s_kr, s_kh, s_vr, s_vh, s_row, s_head, s_head_n,
    G: gl.constexpr, S: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ONE: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], gl.NVMMASharedLayout.get_default_for([BM, D], dtype))
    k_s = gl.allocate_shared_memory(dtype, [2, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, BN, D], v_desc.layout)
    place_s = gl.allocate_shared_memory(gl.int32, [STAGES, BM], ROWS)
    limit_s = gl.allocate_shared_memory(gl.int32, [STAGES, BM], ROWS)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=2)
        mbarrier.init(kv_empty.index(i), count=2)
    # A tile of rows has come when the copies of the 128 threads that fetch have, and what they stored beside.
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=129)
        mbarrier.init(q_empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), part, part_lse, tasks, list_start, n_tasks, places, task_rows, first_list, n_lists,
                scale_log2, q_s, k_s, v_s, place_s, limit_s, q_full, q_empty, kv_full, kv_empty, D, BM, BN, STAGES,
            )),
            (_consume, (
                gl.constexpr(1), part, part_lse, tasks, list_start, n_tasks, places, task_rows, first_list, n_lists,
                scale_log2, q_s, k_s, v_s, place_s, limit_s, q_full, q_empty, kv_full, kv_empty, D, BM, BN, STAGES,
            )),
            (_produce, (
                q, k_desc, v_desc, k, v, visits, visible, tasks, list_start, page_row, page_head, length,
                n_tasks, places, task_rows, first_list, n_lists, n_blocks, n_heads,
                s_qt, s_qh, s_kr, s_kh, s_vr, s_vh, s_row, s_head, s_head_n,
                q_s, k_s, v_s, place_s, limit_s, q_full, q_empty, kv_full, kv_empty, G, S, SLOTS, D, BM, BN, STAGES,
            )),
        ],
        [4, 4],
        [252 - REGISTERS // 2, REGISTERS],
    )  # fmt: skip
