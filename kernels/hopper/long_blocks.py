"""The forward of blocks longer than a tile of keys: a program keeps a tile of rows and loops over the block's keys.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, S' visits per row
(see :mod:`..routing`). A tile is 2 * BM visits by BN keys. A program has a task: rows of one list, one tile after the
other, each against the whole block.

The producer warpgroup loads tiles of K and V into a ring of STAGES buffers, and gathers the rows of Q of the next tile
while the current one is computed (two buffers). Each consumer warpgroup has BM of the rows. In one step it computes the
softmax of a tile of keys, then issues the product with V and the scores of the next tile together: meanwhile the other
consumer computes its softmax. (Issuing the scores earlier was slower, because of copies between registers.)

Barriers, one for each buffer: ``k_full``, ``v_full`` a tile of keys has arrived; ``k_empty``, ``v_empty`` both
consumers are done with it; ``q_full`` rows, where their output goes and their limits have arrived; ``q_empty`` both
consumers are done with them. All warpgroups take tiles in the same order. There is no deadlock: the producer waits for
a buffer only until both consumers have read what it passed on one round before, and it waits for ``q_empty`` of the
tile before only when two tiles of keys of the current one are in flight.
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
from .shared import barrier, copy_rows, in_each_warp, load_block, publish, read_task, store_rows, tiles_of_keys


@gluon.jit
def _gather_rows(
    q, visits, visible, i_h, n_keys, n_heads, s_qt, s_qh, r, end, buf, q_s, offset_s, out_row_s, limit_s,
    G: gl.constexpr, S: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Starts the copies of a tile's rows of Q, and stores where their output goes and their limits. Returns how many
    tiles of keys they see."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_r = r + gl.arange(0, 2 * BM, layout=FLAT)  # [2 * BM]
    m_r = o_r < end  # [2 * BM]
    visit = gl.load(visits + o_r, mask=m_r, other=0)  # [2 * BM]
    row = visit // SLOTS  # [2 * BM]
    slot = visit - row * SLOTS  # [2 * BM]
    t = row // G  # [2 * BM]
    head = i_h * G + row % G  # [2 * BM]
    limit = gl.where(m_r, n_keys, 0)  # [2 * BM]
    if SLOTS > S:
        m_current = m_r & (slot == S)  # [2 * BM]
        seen = gl.minimum(gl.load(visible + t, mask=m_current, other=0), n_keys)  # [2 * BM]
        limit = gl.where(m_current, seen, limit)
    offset_s.store(t.to(gl.int64) * s_qt + head.to(gl.int64) * s_qh)
    out_row_s.index(buf).store(gl.where(m_r, (t * n_heads + head) * SLOTS + slot, -1))
    limit_s.index(buf).store(limit)
    barrier()
    n_tiles, _ = tiles_of_keys(limit_s.index(buf).load(in_each_warp(2 * BM)), BN)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))  # [D]
    for half in gl.static_range(2):
        offset = offset_s.slice(half * BM, BM).load(gl.SliceLayout(1, WIDE))  # [BM]
        offset = gl.multiple_of(offset, 8)
        copy_rows(q_s.index(2 * buf + half), q + offset[:, None] + o_d[None, :])
    async_copy.commit_group()
    return n_tiles


@gluon.jit
def _produce(
    q, k_desc, v_desc, k, v, visits, visible, i_h, begin, end, n_keys, n_heads, first_key, k_column, v_column,
    s_qt, s_qh, s_kr, s_vr, q_s, k_s, v_s, offset_s, out_row_s, limit_s, barriers,
    G: gl.constexpr, S: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    n_tiles = _gather_rows(
        q, visits, visible, i_h, n_keys, n_heads, s_qt, s_qh, begin, end, 0, q_s, offset_s, out_row_s, limit_s,
        G, S, SLOTS, D, BM, BN,
    )  # fmt: skip
    i = 0
    i_kv = 0
    for r in range(begin, end, 2 * BM):
        ahead = r + 2 * BM < end
        buf = (i + 1) % 2
        next_tiles = n_tiles
        for j in range(n_tiles):
            stage = i_kv % STAGES
            parity = i_kv // STAGES % 2 ^ 1
            n = j * BN
            mbarrier.wait(k_empty.index(stage), parity)
            load_block(
                k_desc, k, first_key + n, k_column, s_kr, n_keys - n, k_full.index(stage), k_s.index(stage), BN, D
            )
            mbarrier.wait(v_empty.index(stage), parity)
            load_block(
                v_desc, v, first_key + n, v_column, s_vr, n_keys - n, v_full.index(stage), v_s.index(stage), BN, D
            )
            i_kv += 1
            # The first tile of K and V is loaded together with the first rows.
            if i_kv == 1:
                publish(q_full.index(0))
            # The next rows are gathered while these are computed, once two tiles of keys are in flight.
            if ahead & (j == gl.minimum(1, n_tiles - 1)):
                mbarrier.wait(q_empty.index(buf), (i + 1) // 2 % 2 ^ 1)
                next_tiles = _gather_rows(
                    q, visits, visible, i_h, n_keys, n_heads, s_qt, s_qh, r + 2 * BM, end, buf,
                    q_s, offset_s, out_row_s, limit_s, G, S, SLOTS, D, BM, BN,
                )  # fmt: skip
        if ahead:
            publish(q_full.index(buf))
        n_tiles = next_tiles
        i += 1


@gluon.jit
def _step(
    s, b_o, b_max, b_sum, limit, n, scale_log2, i_kv, q_t, k_s, v_s, k_full, k_empty, v_full, v_empty,
    MASKED: gl.constexpr, LAST: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    MMA: gl.constexpr, MMA_O: gl.constexpr,
):  # fmt: skip
    """The tile of keys at ``n``, whose scores are computed: softmax, product with V, and the next tile's scores."""
    if MASKED:
        o_n = n + gl.arange(0, BN, layout=gl.SliceLayout(0, MMA))  # [BN]
        s = gl.where(o_n[None, :] < limit[:, None], s, float("-inf"))  # [BM, BN]
    b_new = gl.maximum(b_max, gl.max(s, 1))  # [BM]
    # A row whose scores are all -inf so far must not make NaN of -inf - -inf.
    b_shift = gl.where(b_new == float("-inf"), 0.0, b_new * scale_log2)  # [BM]
    b_p = gl.exp2(s * scale_log2 - b_shift[:, None])  # [BM, BN]
    b_scale = gl.exp2(b_max * scale_log2 - b_shift)  # [BM]
    b_sum = b_sum * b_scale + gl.sum(b_p, 1)  # [BM]
    p = gl.convert_layout(b_p.to(q_t.dtype), gl.DotOperandLayout(0, MMA_O, 2))  # [BM, BN]
    b_o = b_o * gl.convert_layout(b_scale, gl.SliceLayout(1, MMA_O))[:, None]  # [BM, D]
    if not LAST:
        stage = (i_kv + 1) % STAGES
        mbarrier.wait(k_full.index(stage), (i_kv + 1) // STAGES % 2)
        zero = gl.zeros([BM, BN], gl.float32, MMA)  # [BM, BN]
        next_s = warpgroup_mma(q_t, k_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [BM, BN]
    before = i_kv % STAGES
    mbarrier.wait(v_full.index(before), i_kv // STAGES % 2)
    b_o = warpgroup_mma(p, v_s.index(before), b_o, is_async=True)
    if LAST:
        b_o, p = warpgroup_mma_wait(0, deps=[b_o, p])  # [BM, D], [BM, BN]
    else:
        s, b_o, p = warpgroup_mma_wait(0, deps=[next_s, b_o, p])  # [BM, BN], [BM, D], [BM, BN]
        mbarrier.arrive(k_empty.index(stage), count=1)
    mbarrier.arrive(v_empty.index(before), count=1)
    return s, b_o, b_new, b_sum


@gluon.jit
def _consume(
    half: gl.constexpr, part, part_lse, begin, end, scale_log2, q_s, k_s, v_s, out_row_s, limit_s, barriers,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: half ``half`` of the rows of each tile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    i = 0
    i_kv = 0
    for _ in range(begin, end, 2 * BM):
        buf = i % 2
        mbarrier.wait(q_full.index(buf), i // 2 % 2)
        n_tiles, whole = tiles_of_keys(limit_s.index(buf).load(in_each_warp(2 * BM)), BN)
        n_whole = gl.minimum(whole, n_tiles - 1)
        limit = limit_s.index(buf).slice(half * BM, BM).load(gl.SliceLayout(1, MMA))  # [BM]
        q_t = q_s.index(2 * buf + half)  # [BM, D]

        stage = i_kv % STAGES
        mbarrier.wait(k_full.index(stage), i_kv // STAGES % 2)
        zero = gl.zeros([BM, BN], gl.float32, MMA)  # [BM, BN]
        s = warpgroup_mma(q_t, k_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [BM, BN]
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        b_max = gl.full([BM], float("-inf"), gl.float32, gl.SliceLayout(1, MMA))  # [BM]
        b_sum = gl.zeros([BM], gl.float32, gl.SliceLayout(1, MMA))  # [BM]
        b_o = gl.zeros([BM, D], gl.float32, MMA_O)  # [BM, D]
        for j in range(0, n_whole):
            s, b_o, b_max, b_sum = _step(  # [BM, BN], [BM, D], [BM], [BM]
                s, b_o, b_max, b_sum, limit, j * BN, scale_log2, i_kv, q_t, k_s, v_s,
                k_full, k_empty, v_full, v_empty, False, False, BM, BN, STAGES, MMA, MMA_O,
            )  # fmt: skip
            i_kv += 1
        for j in range(n_whole, n_tiles - 1):
            s, b_o, b_max, b_sum = _step(
                s, b_o, b_max, b_sum, limit, j * BN, scale_log2, i_kv, q_t, k_s, v_s,
                k_full, k_empty, v_full, v_empty, True, False, BM, BN, STAGES, MMA, MMA_O,
            )  # fmt: skip
            i_kv += 1
        if whole == n_tiles:
            s, b_o, b_max, b_sum = _step(
                s, b_o, b_max, b_sum, limit, (n_tiles - 1) * BN, scale_log2, i_kv, q_t, k_s, v_s,
                k_full, k_empty, v_full, v_empty, False, True, BM, BN, STAGES, MMA, MMA_O,
            )  # fmt: skip
        else:
            s, b_o, b_max, b_sum = _step(
                s, b_o, b_max, b_sum, limit, (n_tiles - 1) * BN, scale_log2, i_kv, q_t, k_s, v_s,
                k_full, k_empty, v_full, v_empty, True, True, BM, BN, STAGES, MMA, MMA_O,
            )  # fmt: skip
        i_kv += 1

        out_row = out_row_s.index(buf).slice(half * BM, BM).load(gl.SliceLayout(1, MMA))
        mbarrier.arrive(q_empty.index(buf), count=1)
        b_shift = gl.where(b_max == float("-inf"), 0.0, b_max * scale_log2)  # [BM]
        gl.store(part_lse + out_row, (b_shift + gl.log2(b_sum)) * LN2, mask=out_row >= 0)
        b_norm = 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)  # [BM]
        b_o = b_o * gl.convert_layout(b_norm, gl.SliceLayout(1, MMA_O))[:, None]
        store_rows(part, out_row, b_o, D)
        i += 1


@gluon.jit(
    do_not_specialize=["n_entries", "first_list", "n_lists", "n_blocks", "n_heads"],
    do_not_specialize_on_alignment=SLICED,
)
def long_block_kernel(
    q, k_desc, v_desc, k, v, part, part_lse, visits, tasks, list_start, visible,
    scale_log2, n_entries, first_list, n_lists, n_blocks, n_heads, s_qt, s_qh, s_kr, s_kh, s_vr, s_vh,
    TASK_ROWS: gl.constexpr, G: gl.constexpr, S: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Arguments as of :func:`..forward._long_block_kernel`; ``k_desc``, ``v_desc`` fetch boxes of BN rows."""
    i_list, begin, end, n_keys, first_key, page, _ = read_task(
        tasks, n_entries, TASK_ROWS, list_start, first_list, n_lists, gl.program_id(0)
    )

    dtype: gl.constexpr = k_desc.dtype
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ONE: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(dtype, [4, BM, D], gl.NVMMASharedLayout.get_default_for([BM, D], dtype))
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], v_desc.layout)
    offset_s = gl.allocate_shared_memory(gl.int64, [2 * BM], ROWS)
    out_row_s = gl.allocate_shared_memory(gl.int32, [2, 2 * BM], ROWS)
    limit_s = gl.allocate_shared_memory(gl.int32, [2, 2 * BM], ROWS)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    # Exit only here: barrier setup overlaps with the task-record loads issued above.
    if i_list < 0:
        return
    i_h = i_list // n_blocks
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), part, part_lse, begin, end, scale_log2,
                q_s, k_s, v_s, out_row_s, limit_s, barriers, D, BM, BN, STAGES,
            )),
            (_consume, (
                gl.constexpr(1), part, part_lse, begin, end, scale_log2,
                q_s, k_s, v_s, out_row_s, limit_s, barriers, D, BM, BN, STAGES,
            )),
            (_produce, (
                q, k_desc, v_desc, k, v, visits, visible, i_h, begin, end, n_keys, n_heads, first_key,
                page * s_kh, page * s_vh, s_qt, s_qh, s_kr, s_vr,
                q_s, k_s, v_s, offset_s, out_row_s, limit_s, barriers, G, S, SLOTS, D, BM, BN, STAGES,
            )),
        ],
        [4, 4],
        # 168 registers for each of 384 threads on average; those that the producer gives up go to the consumers.
        [252 - REGISTERS // 2, REGISTERS],
    )  # fmt: skip
