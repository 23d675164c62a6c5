"""dK, dV and dQ of blocks of 64 keys: a program keeps the block, and its two consumers take turns with tiles of rows.

Legend: D head dim, B = 2 * BN = 64 keys; a tile is BM rows by the whole block. Tables, producer and arguments are those
of :mod:`.dkdv`.

The block's scores fit one warpgroup, so each consumer has a tile of its own, with dK and dV of all keys for the rows
that it saw, and they exchange nothing before the end: then the second hands its sums to the first, which stores both.

Barriers: ``q_full`` and ``q_empty`` as in :mod:`.dkdv`, each tile read by one consumer; ``given`` the second consumer
has stored dK, then dV, in shared memory; ``taken`` the first has read dK.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common import LOG2E
from .dkdv import _add, _produce, _store, read_task_info
from .shared import barrier, store_rows


@gluon.jit
def _step(
    b_dk, b_dv, i, half: gl.constexpr, part, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s, out_row_s,
    q_full, q_empty, o_n, n_keys, scale_log2,
    MASKED: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    MMA: gl.constexpr, MMA_D: gl.constexpr,
):  # fmt: skip
    """One tile of rows against the block: adds to dK and dV, and writes dQ of the tile."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    PROBS: gl.constexpr = gl.DotOperandLayout(0, MMA_D, 2)
    stage = i % STAGES
    mbarrier.wait(q_full.index(stage), i // STAGES % 2)
    fence_async_shared()
    zero = gl.zeros([KEYS, BM], gl.float32, MMA)  # [KEYS, BM]
    s = warpgroup_mma(k_s, q_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [KEYS, BM]
    dp = warpgroup_mma(v_s, do_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [KEYS, BM]
    s = warpgroup_mma_wait(1, deps=[s])
    b_lse = lse_s.index(stage).load(COLUMNS)  # [BM]
    b_p = gl.exp2(s * scale_log2 - b_lse[None, :])  # [KEYS, BM]
    if MASKED:
        limit = gl.minimum(limit_s.index(stage).load(COLUMNS), n_keys)  # [BM]
        b_p = gl.where(o_n[:, None] < limit[None, :], b_p, 0.0)
    p = gl.convert_layout(b_p.to(q_s.dtype), PROBS)  # [KEYS, BM]
    b_dv = warpgroup_mma(p, do_s.index(stage), b_dv, is_async=True)  # [KEYS, D]
    # The other consumer multiplies meanwhile; registers are short.
    dp, b_dv, p = warpgroup_mma_wait(0, deps=[dp, b_dv, p])  # [KEYS, BM], [KEYS, D], [KEYS, BM]
    b_delta = delta_s.index(stage).load(COLUMNS)  # [BM]
    b_ds = (b_p * (dp - b_delta[None, :])).to(q_s.dtype)  # [KEYS, BM]
    ds = gl.convert_layout(b_ds, PROBS)  # [KEYS, BM]
    b_dk = warpgroup_mma(ds, q_s.index(stage), b_dk, is_async=True)  # [KEYS, D]
    ds_t = ds_s.index(half)  # [KEYS, BM]
    ds_t.store(b_ds)
    fence_async_shared()
    barrier()
    zero_q = gl.zeros([BM, D], gl.float32, MMA_D)  # [BM, D]
    b_dq = warpgroup_mma(ds_t.permute((1, 0)), k_s, zero_q, use_acc=False, is_async=True)  # [BM, D]
    out_row = out_row_s.index(stage).load(gl.SliceLayout(1, MMA_D))  # [BM]
    b_dk, b_dq, ds = warpgroup_mma_wait(0, deps=[b_dk, b_dq, ds])  # [KEYS, D], [BM, D], [KEYS, BM]
    mbarrier.arrive(q_empty.index(stage), count=1)
    store_rows(part, out_row, b_dq, D)
    return b_dk, b_dv


@gluon.jit
def _consume(
    half: gl.constexpr, part, dk, dv, begin, current_end, end, key, page, n_keys, i_sum, scale, s_dkr, s_dkh,
    sum_k, sum_v, block_size, k_s, v_s, q_s, do_s, ds_s, sum_s, lse_s, delta_s, limit_s, out_row_s,
    kv_full, q_full, q_empty, given, taken,
    D: gl.constexpr, BM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    """A consumer, with every other tile; up to row ``middle`` some rows do not see all keys."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    MMA_D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    scale_log2 = scale * LOG2E
    o_n = gl.arange(0, KEYS, layout=gl.SliceLayout(1, MMA))  # [KEYS]
    b_dk = gl.zeros([KEYS, D], gl.float32, MMA_D)  # [KEYS, D]
    b_dv = gl.zeros([KEYS, D], gl.float32, MMA_D)  # [KEYS, D]
    middle = gl.minimum(begin + gl.maximum(current_end - begin, 0), end)
    middle = gl.where(n_keys < KEYS, end, middle)
    mbarrier.wait(kv_full, 0)
    i = 0 + half
    first = begin + half * BM
    for _ in range(first, middle, 2 * BM):
        b_dk, b_dv = _step(  # [KEYS, D], [KEYS, D]
            b_dk, b_dv, i, half, part, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s, out_row_s,
            q_full, q_empty, o_n, n_keys, scale_log2, True, D, BM, KEYS, STAGES, MMA, MMA_D,
        )  # fmt: skip
        i += 2
    for _ in range(begin + i * BM, end, 2 * BM):
        b_dk, b_dv = _step(
            b_dk, b_dv, i, half, part, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s, out_row_s,
            q_full, q_empty, o_n, n_keys, scale_log2, False, D, BM, KEYS, STAGES, MMA, MMA_D,
        )  # fmt: skip
        i += 2
    if half == 1:
        sum_s.store(b_dk)
        barrier()
        mbarrier.arrive(given, count=1)
        mbarrier.wait(taken, 0)
        sum_s.store(b_dv)
        barrier()
        mbarrier.arrive(given, count=1)
    else:
        mbarrier.wait(given, 0)
        b_dk += sum_s.load(MMA_D)
        barrier()
        mbarrier.arrive(taken, count=1)
        mbarrier.wait(given, 1)
        b_dv += sum_s.load(MMA_D)
        b_dk = b_dk * scale
        o_row = key.to(gl.int64) * s_dkr + page * s_dkh
        if i_sum >= 0:
            if DIRECT:
                _add(sum_k, sum_v, b_dk, b_dv, i_sum.to(gl.int64) * block_size * D, D, 0, n_keys)
            else:
                _add(dk, dv, b_dk, b_dv, o_row, s_dkr, 0, n_keys)
        else:
            _store(dk, dv, b_dk, b_dv, o_row, s_dkr, 0, n_keys, DIRECT)


@gluon.jit(do_not_specialize=["first_head"])
def dkdv_rows_kernel(
    q, dout, k_desc, v_desc, k, v, part, dk, dv, sum_k, sum_v, table, stats, task_info,
    scale, room, block_size, first_head, s_kr, s_kh, s_vr, s_vh, s_dkr, s_dkh,
    SHARE: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, KEY_TILES: gl.constexpr,
    DQ: gl.constexpr, DIRECT: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Arguments as of :func:`.dkdv.dkdv_kernel`, for KEY_TILES 1 and DQ."""
    i_list, begin, end, current_end, n_keys, first_key, page, i_sum, _ = read_task_info(
        task_info, gl.program_id(0), 0, KEY_TILES
    )

    dtype: gl.constexpr = k_desc.dtype
    KEYS: gl.constexpr = 2 * BN
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ONE: gl.constexpr = mbarrier.MBarrierLayout()
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BM], dtype)
    k_s = gl.allocate_shared_memory(dtype, [KEYS, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [KEYS, D], v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], Q_LAYOUT)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], Q_LAYOUT)
    ds_s = gl.allocate_shared_memory(dtype, [2, KEYS, BM], DS_LAYOUT)
    sum_s = gl.allocate_shared_memory(gl.float32, [KEYS, D], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ROWS)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ROWS)
    limit_s = gl.allocate_shared_memory(gl.int32, [STAGES, BM], ROWS)
    out_row_s = gl.allocate_shared_memory(gl.int32, [STAGES, BM], ROWS)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], ONE)
    given = gl.allocate_shared_memory(gl.int64, [1], ONE)
    taken = gl.allocate_shared_memory(gl.int64, [1], ONE)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(given, count=1)
    mbarrier.init(taken, count=1)
    # A tile of rows is complete when the copies of the producer's 128 threads are, and its stores: one arrival more.
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=129)
        mbarrier.init(q_empty.index(i), count=1)
    fence_async_shared()
    # Exit only here: barrier setup overlaps with the task-record loads issued above.
    if i_list < 0:
        return
    dk_page = (page - first_head).to(gl.int64)
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), part, dk, dv, begin, current_end, end, first_key, dk_page, n_keys, i_sum, scale,
                s_dkr, s_dkh, sum_k, sum_v, block_size, k_s, v_s, q_s, do_s, ds_s, sum_s, lse_s, delta_s, limit_s,
                out_row_s, kv_full, q_full, q_empty, given, taken, D, BM, KEYS, STAGES, DIRECT,
            )),
            (_consume, (
                gl.constexpr(1), part, dk, dv, begin, current_end, end, first_key, dk_page, n_keys, i_sum, scale,
                s_dkr, s_dkh, sum_k, sum_v, block_size, k_s, v_s, q_s, do_s, ds_s, sum_s, lse_s, delta_s, limit_s,
                out_row_s, kv_full, q_full, q_empty, given, taken, D, BM, KEYS, STAGES, DIRECT,
            )),
            (_produce, (
                q, dout, k_desc, v_desc, k, v, table, stats, room, begin, end, n_keys, first_key,
                page * s_kh, page * s_vh, s_kr, s_vr, k_s, v_s, q_s, do_s, lse_s, delta_s, limit_s, out_row_s,
                kv_full, q_full, q_empty, D, BM, BN, STAGES, SHARE, True,
            )),
        ],
        [4, 4],
        # 168 registers for each of 384 threads on average; those that the producer gives up go to the consumers.
        [252 - REGISTERS // 2, REGISTERS],
    )  # fmt: skip
