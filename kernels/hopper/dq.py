"""dQ of long blocks: a program keeps a tile of rows and loops over the keys of the block.

Legend: N query rows, Hq query heads, Hkv key/value heads, D head dim, B block size, S' visits per row (see
:mod:`..routing`). A tile is 2 * BM visits by BN keys; the table that :mod:`..backward` lays out describes each visit.

Warpgroups, tiles and barriers are those of :mod:`.long_blocks`, with rows of dout in addition to those of Q, and one
barrier for K and V of a tile: K is needed twice, for scores and for dQ, so both are kept until the tile's dQ is added.
That product is issued together with the next tile's scores, so a consumer holds two tiles of keys, and STAGES is 3.
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

from ..common import LOG2E, SLICED
from .shared import (
    barrier,
    copy_rows,
    in_each_warp,
    load_blocks,
    publish,
    read_task,
    store_rows,
    tiles_of_keys,
    unpack,
)


@gluon.jit
def _limits(table, room, r, end, n_keys, BM: gl.constexpr):
    """Number of keys that each row of a tile sees, in every warp."""
    o_v = r + gl.arange(0, 2 * BM, layout=in_each_warp(2 * BM))  # [2 * BM]
    return gl.minimum(gl.load(table + 2 * room + o_v, mask=o_v < end, other=0), n_keys)


@gluon.jit
def _gather_rows(
    q, dout, table, room, r, end, n_keys, buf, q_s, do_s, row_s,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Starts the copies of a tile's rows of Q and dout. Returns how many tiles of keys they see."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_v = r + gl.arange(0, 2 * BM, layout=FLAT)  # [2 * BM]
    row_s.store(gl.load(table + o_v, mask=o_v < end, other=0))
    n_tiles, _ = tiles_of_keys(_limits(table, room, r, end, n_keys, BM), BN)
    barrier()
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))  # [D]
    for half in gl.static_range(2):
        row = row_s.slice(half * BM, BM).load(gl.SliceLayout(1, WIDE)).to(gl.int64)  # [BM]
        offset = row[:, None] * D + o_d[None, :]  # [BM, D]
        copy_rows(q_s.index(2 * buf + half), q + offset)
        copy_rows(do_s.index(2 * buf + half), dout + offset)
    async_copy.commit_group()
    return n_tiles


@gluon.jit
def _produce(
    q, dout, k_desc, v_desc, k, v, table, room, begin, end, n_keys, first_key, k_column, v_column, s_kr, s_vr,
    q_s, do_s, k_s, v_s, row_s, q_full, q_empty, kv_full, kv_empty,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer."""
    n_tiles = _gather_rows(q, dout, table, room, begin, end, n_keys, 0, q_s, do_s, row_s, D, BM, BN)
    i = 0
    i_kv = 0
    for r in range(begin, end, 2 * BM):
        ahead = r + 2 * BM < end
        buf = (i + 1) % 2
        next_tiles = n_tiles
        for j in range(n_tiles):
            stage = i_kv % STAGES
            n = j * BN
            full = kv_full.index(stage)
            mbarrier.wait(kv_empty.index(stage), i_kv // STAGES % 2 ^ 1)
            load_blocks(
                k_desc, v_desc, k, v, first_key + n, k_column, v_column, s_kr, s_vr, n_keys - n, full,
                k_s.index(stage), v_s.index(stage), BN, D,
            )  # fmt: skip
            i_kv += 1
            # The first tile of K and V is loaded together with the first rows.
            if i_kv == 1:
                publish(q_full.index(0))
            # The next rows are gathered while these are computed, once two tiles of keys are in flight.
            if ahead & (j == gl.minimum(1, n_tiles - 1)):
                mbarrier.wait(q_empty.index(buf), (i + 1) // 2 % 2 ^ 1)
                next_tiles = _gather_rows(
                    q, dout, table, room, r + 2 * BM, end, n_keys, buf, q_s, do_s, row_s, D, BM, BN,
                )  # fmt: skip
        if ahead:
            publish(q_full.index(buf))
        n_tiles = next_tiles
        i += 1


@gluon.jit
def _step(
    s, dp, b_dq, b_lse, b_delta, limit, n, scale_log2, i_kv, q_t, do_t, k_s, v_s, kv_full, kv_empty,
    MASKED: gl.constexpr, LAST: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    MMA: gl.constexpr, MMA_Q: gl.constexpr,
):  # fmt: skip
    """The tile of keys at ``n``, whose scores and dP are computed: adds its part of dQ, issues the next tile's."""
    b_ds = gl.exp2(s * scale_log2 - b_lse[:, None]) * (dp - b_delta[:, None])  # [BM, BN]
    if MASKED:
        o_n = n + gl.arange(0, BN, layout=gl.SliceLayout(0, MMA))  # [BN]
        b_ds = gl.where(o_n[None, :] < limit[:, None], b_ds, 0.0)
    b_ds = gl.convert_layout(b_ds.to(q_t.dtype), gl.DotOperandLayout(0, MMA_Q, 2))
    if not LAST:
        stage = (i_kv + 1) % STAGES
        mbarrier.wait(kv_full.index(stage), (i_kv + 1) // STAGES % 2)
        zero = gl.zeros([BM, BN], gl.float32, MMA)  # [BM, BN]
        next_s = warpgroup_mma(q_t, k_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [BM, BN]
        next_dp = warpgroup_mma(do_t, v_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [BM, BN]
    b_dq = warpgroup_mma(b_ds, k_s.index(i_kv % STAGES), b_dq, is_async=True)  # [BM, D]
    if LAST:
        b_dq, b_ds = warpgroup_mma_wait(0, deps=[b_dq, b_ds])  # [BM, D], [BM, BN]
    else:
        s, dp, b_dq, b_ds = warpgroup_mma_wait(0, deps=[next_s, next_dp, b_dq, b_ds])
    mbarrier.arrive(kv_empty.index(i_kv % STAGES), count=1)
    return s, dp, b_dq


@gluon.jit
def _consume(
    half: gl.constexpr, part, table, stats, room, begin, end, n_keys, scale_log2, q_s, do_s, k_s, v_s,
    q_full, q_empty, kv_full, kv_empty,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: half ``half`` of the rows of each tile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    MMA_Q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    i = 0
    i_kv = 0
    for r in range(begin, end, 2 * BM):
        buf = i % 2
        o_v = r + half * BM + gl.arange(0, BM, layout=ROWS)  # [BM]
        limit = gl.load(table + 2 * room + o_v, mask=o_v < end, other=0)  # [BM]
        b_lse, b_delta = unpack(gl.load(stats + o_v, mask=o_v < end, other=0))  # [BM], [BM]
        n_tiles, whole = tiles_of_keys(_limits(table, room, r, end, n_keys, BM), BN)
        mbarrier.wait(q_full.index(buf), i // 2 % 2)
        n_whole = gl.minimum(whole, n_tiles - 1)
        limit = gl.minimum(limit, n_keys)
        q_t = q_s.index(2 * buf + half)  # [BM, D]
        do_t = do_s.index(2 * buf + half)  # [BM, D]

        stage = i_kv % STAGES
        mbarrier.wait(kv_full.index(stage), i_kv // STAGES % 2)
        zero = gl.zeros([BM, BN], gl.float32, MMA)  # [BM, BN]
        s = warpgroup_mma(q_t, k_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [BM, BN]
        dp = warpgroup_mma(do_t, v_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [BM, BN]
        s, dp = warpgroup_mma_wait(0, deps=[s, dp])  # [BM, BN], [BM, BN]
        b_dq = gl.zeros([BM, D], gl.float32, MMA_Q)  # [BM, D]
        for j in range(0, n_whole):
            s, dp, b_dq = _step(  # [BM, BN], [BM, BN], [BM, D]
                s, dp, b_dq, b_lse, b_delta, limit, j * BN, scale_log2, i_kv, q_t, do_t, k_s, v_s, kv_full, kv_empty,
                False, False, BM, BN, STAGES, MMA, MMA_Q,
            )  # fmt: skip
            i_kv += 1
        for j in range(n_whole, n_tiles - 1):
            s, dp, b_dq = _step(
                s, dp, b_dq, b_lse, b_delta, limit, j * BN, scale_log2, i_kv, q_t, do_t, k_s, v_s, kv_full, kv_empty,
                True, False, BM, BN, STAGES, MMA, MMA_Q,
            )  # fmt: skip
            i_kv += 1
        if whole == n_tiles:
            s, dp, b_dq = _step(
                s, dp, b_dq, b_lse, b_delta, limit, (n_tiles - 1) * BN, scale_log2, i_kv, q_t, do_t, k_s, v_s,
                kv_full, kv_empty, False, True, BM, BN, STAGES, MMA, MMA_Q,
            )  # fmt: skip
        else:
            s, dp, b_dq = _step(
                s, dp, b_dq, b_lse, b_delta, limit, (n_tiles - 1) * BN, scale_log2, i_kv, q_t, do_t, k_s, v_s,
                kv_full, kv_empty, True, True, BM, BN, STAGES, MMA, MMA_Q,
            )  # fmt: skip
        i_kv += 1

        mbarrier.arrive(q_empty.index(buf), count=1)
        store_rows(part, gl.load(table + room + o_v, mask=o_v < end, other=-1), b_dq, D)
        i += 1


@gluon.jit(do_not_specialize=["n_entries", "first_list", "n_lists"], do_not_specialize_on_alignment=SLICED)
def dq_kernel(
    q, dout, k_desc, v_desc, k, v, part, table, stats, tasks, list_start,
    scale, room, n_entries, first_list, n_lists, s_kr, s_kh, s_vr, s_vh,
    TASK_ROWS: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Arguments as of :func:`..backward._dq_kernel`; ``k_desc``, ``v_desc`` fetch boxes of BN rows."""
    i_list, begin, end, n_keys, first_key, page, _ = read_task(
        tasks, n_entries, TASK_ROWS, list_start, first_list, n_lists, gl.program_id(0)
    )
    first = gl.load(list_start)

    dtype: gl.constexpr = k_desc.dtype
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ONE: gl.constexpr = mbarrier.MBarrierLayout()
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [4, BM, D], Q_LAYOUT)
    do_s = gl.allocate_shared_memory(dtype, [4, BM, D], Q_LAYOUT)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], v_desc.layout)
    row_s = gl.allocate_shared_memory(gl.int32, [2 * BM], ROWS)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
    kv_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=2)
    fence_async_shared()
    # Exit only here: barrier setup overlaps with the task-record loads issued above.
    if i_list < 0:
        return
    begin -= first
    end -= first
    scale_log2 = scale * LOG2E
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), part, table, stats, room, begin, end, n_keys, scale_log2,
                q_s, do_s, k_s, v_s, q_full, q_empty, kv_full, kv_empty, D, BM, BN, STAGES,
            )),
            (_consume, (
                gl.constexpr(1), part, table, stats, room, begin, end, n_keys, scale_log2,
                q_s, do_s, k_s, v_s, q_full, q_empty, kv_full, kv_empty, D, BM, BN, STAGES,
            )),
            (_produce, (
                q, dout, k_desc, v_desc, k, v, table, room, begin, end, n_keys, first_key, page * s_kh, page * s_vh,
                s_kr, s_vr, q_s, do_s, k_s, v_s, row_s, q_full, q_empty, kv_full, kv_empty, D, BM, BN, STAGES,
            )),
        ],
        [4, 4],
        # 168 registers for each of 384 threads on average; those that the producer gives up go to the consumers.
        [252 - REGISTERS // 2, REGISTERS],
    )  # fmt: skip
