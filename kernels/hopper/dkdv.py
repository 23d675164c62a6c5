"""dK and dV: a program keeps a tile of keys and loops over the rows of its task. If that is the whole block, dQ too.

Legend: N query rows, Hq query heads, Hkv key/value heads, D head dim, B block size, S' visits per row (see
:mod:`..routing`). A tile is BM visits by 2 * BN keys; the tables that :mod:`..backward` lays out describe each visit
and each task.

The producer warpgroup loads K and V, then gathers Q, dout and statistics of one tile of rows after the other into a
ring of STAGES buffers. Each consumer warpgroup has BN of the keys, with their dK and dV [BN, D] in float32 registers.
Scores are computed transposed, keys by rows, so that probabilities and dS are already laid out as the left operand, in
registers, of the products that follow.

A multiprocessor runs one program at a time, so nothing overlaps with the beginning and the end of a program: a program
therefore reads all that it has to know of its task in one step, while it initializes its barriers.

Barriers: ``q_full`` a tile of rows has arrived; ``q_empty`` both consumers are done with it; ``kv_full`` K and V have
arrived; ``ds_full`` both consumers have stored their part of dS. dQ sums over the keys of both: each stores its dS, and
computes half of dQ, 64 by 64, so that BM * D is 128 * 64. It does so a tile later, together with that tile's part of
dK: by then the other's dS has come, so neither waits, and while one computes its softmax the other multiplies. Two
buffers are enough for dS: a consumer that stores for tile i + 2 has waited for the other's dS of tile i + 1, which the
other stores after its last read of tile i. There is no deadlock, because consumers take tiles in the same order, and
the producer waits only for tiles that it has already passed on.
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

from ..backward import _read_task_info
from ..common import LOG2E
from .shared import barrier, copy_rows, exchange, load_blocks, out_rows, q_rows, side_by_side, store_rows, unpack

read_task_info = gluon.jit(_read_task_info.fn)


@gluon.jit
def _produce(
    q, dout, k_desc, v_desc, k, v, table, stats, room, begin, end, n_keys, first_key, k_column, v_column,
    s_kr, s_vr, k_s, v_s, q_s, do_s, lse_s, delta_s, limit_s, out_row_s, kv_full, q_full, q_empty,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, SHARE: gl.constexpr, DQ: gl.constexpr,
):  # fmt: skip
    """The producer. ``first_key`` is the program's first key, ``n_keys`` how many there are from it on."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))  # [D]
    o_m = gl.arange(0, BM, layout=gl.SliceLayout(1, WIDE))  # [BM]
    o_f = gl.arange(0, BM, layout=FLAT)  # [BM]
    # These loads are in flight while those of K and V are issued.
    row = q_rows(table, begin + o_m, end, SHARE)  # [BM]
    stats_row = begin + o_f  # [BM]
    if SHARE > 1:
        stats_row = q_rows(table, begin + o_f, end, SHARE)
    load_blocks(k_desc, v_desc, k, v, first_key, k_column, v_column, s_kr, s_vr, n_keys, kv_full, k_s, v_s, 2 * BN, D)
    b_stats = gl.load(stats + stats_row, mask=begin + o_f < end, other=0)  # [BM]
    limit = gl.load(table + 2 * room + (begin + o_f) // SHARE, mask=begin + o_f < end, other=0)  # [BM]
    out_row = limit
    if DQ:
        out_row = out_rows(table + room, begin + o_f, end, SHARE)
    if SHARE > 1:
        # What depends on a load is loaded a tile later.
        stats_row = q_rows(table, begin + BM + o_f, end, SHARE)
    i = 0
    for r in range(begin, end, BM):
        stage = i % STAGES
        mbarrier.wait(q_empty.index(stage), i // STAGES % 2 ^ 1)
        offset = row.to(gl.int64)[:, None] * D + o_d[None, :]  # [BM, D]
        # Rows past the end are zero, and add nothing.
        m_row = (r + o_m < end)[:, None]  # [BM, 1]
        copy_rows(q_s.index(stage), q + offset, mask=m_row)
        copy_rows(do_s.index(stage), dout + offset, mask=m_row)
        async_copy.mbarrier_arrive(q_full.index(stage), increment_count=False)
        b_lse, b_delta = unpack(b_stats)  # [BM], [BM]
        lse_s.index(stage).store(b_lse)
        delta_s.index(stage).store(b_delta)
        limit_s.index(stage).store(limit)
        if DQ:
            out_row_s.index(stage).store(out_row)
        barrier()
        mbarrier.arrive(q_full.index(stage), count=1)
        ahead = r + BM
        row = q_rows(table, ahead + o_m, end, SHARE)
        if SHARE == 1:
            stats_row = ahead + o_f
        b_stats = gl.load(stats + stats_row, mask=ahead + o_f < end, other=0)
        limit = gl.load(table + 2 * room + (ahead + o_f) // SHARE, mask=ahead + o_f < end, other=0)
        if DQ:
            out_row = out_rows(table + room, ahead + o_f, end, SHARE)
        if SHARE > 1:
            stats_row = q_rows(table, ahead + BM + o_f, end, SHARE)
        i += 1
    async_copy.wait_group(0)


@gluon.jit
def _issue_dq(i, half: gl.constexpr, k_s, ds_s, ds_full, D: gl.constexpr):
    """Starts this consumer's half of dQ of tile ``i``: some columns of all rows, or all columns of some."""
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    mbarrier.wait(ds_full.index(i % 2), i // 2 % 2)
    ds_t = ds_s.index(i % 2)  # [2 * BN, BM]
    if D == 128:
        ds_half, k_half = ds_t, k_s.slice(half * 64, 64, dim=1)
    else:
        ds_half, k_half = ds_t.slice(half * 64, 64, dim=1), k_s
    zero = gl.zeros([64, 64], gl.float32, HALF)
    return warpgroup_mma(ds_half.permute((1, 0)), k_half, zero, use_acc=False, is_async=True)  # [64, 64]


@gluon.jit
def _step(
    b_dk, b_dv, dq_row, i, half: gl.constexpr, part, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s, out_row_s,
    q_full, q_empty, ds_full, o_n, n_keys, scale_log2,
    FIRST: gl.constexpr, MASKED: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, DQ: gl.constexpr, MMA: gl.constexpr, MMA_D: gl.constexpr,
):  # fmt: skip
    """One tile of rows against this consumer's keys: adds to dK and dV, stores dS, and writes dQ of the tile before, to
    rows ``dq_row`` [64]. Returns dK, dV and the rows of the tile's own dQ."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    PROBS: gl.constexpr = gl.DotOperandLayout(0, MMA_D, 2)
    stage = i % STAGES
    k_t = k_s.slice(half * BN, BN)  # [BN, D]
    v_t = v_s.slice(half * BN, BN)  # [BN, D]
    mbarrier.wait(q_full.index(stage), i // STAGES % 2)
    fence_async_shared()
    zero = gl.zeros([BN, BM], gl.float32, MMA)  # [BN, BM]
    s = warpgroup_mma(k_t, q_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [BN, BM]
    dp = warpgroup_mma(v_t, do_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)  # [BN, BM]
    s = warpgroup_mma_wait(1, deps=[s])
    b_lse = lse_s.index(stage).load(COLUMNS)  # [BM]
    b_p = gl.exp2(s * scale_log2 - b_lse[None, :])  # [BN, BM]
    if MASKED:
        limit = gl.minimum(limit_s.index(stage).load(COLUMNS), n_keys)  # [BM]
        b_p = gl.where(o_n[:, None] < limit[None, :], b_p, 0.0)
    p = gl.convert_layout(b_p.to(q_s.dtype), PROBS)  # [BN, BM]
    b_dv = warpgroup_mma(p, do_s.index(stage), b_dv, is_async=True)  # [BN, D]
    dp = warpgroup_mma_wait(1, deps=[dp])  # [BN, BM]
    b_delta = delta_s.index(stage).load(COLUMNS)  # [BM]
    b_ds = (b_p * (dp - b_delta[None, :])).to(q_s.dtype)  # [BN, BM]
    ds = gl.convert_layout(b_ds, PROBS)  # [BN, BM]
    b_dk = warpgroup_mma(ds, q_s.index(stage), b_dk, is_async=True)  # [BN, D]
    if DQ:
        if D == 128:
            next_row = out_row_s.index(stage).load(dq_row.type.layout)  # [64]
        else:
            next_row = out_row_s.index(stage).slice(half * 64, 64).load(dq_row.type.layout)  # [64]
        if FIRST:
            b_dk, b_dv, p, ds = warpgroup_mma_wait(0, deps=[b_dk, b_dv, p, ds])
        else:
            b_dq = _issue_dq(i - 1, half, k_s, ds_s, ds_full, D)  # [64, 64]
            # [BN, D], [BN, D], [64, 64], [BN, BM], [BN, BM]
            b_dk, b_dv, b_dq, p, ds = warpgroup_mma_wait(0, deps=[b_dk, b_dv, b_dq, p, ds])
        ds_s.index(i % 2).slice(half * BN, BN).store(b_ds)
        fence_async_shared()
        barrier()
        mbarrier.arrive(ds_full.index(i % 2), count=1)
        if not FIRST:
            store_rows(part + (half * 64 if D == 128 else 0), dq_row, b_dq, D)
        dq_row = next_row
    else:
        b_dk, b_dv, p, ds = warpgroup_mma_wait(0, deps=[b_dk, b_dv, p, ds])  # [BN, D], [BN, D], [BN, BM], [BN, BM]
    mbarrier.arrive(q_empty.index(stage), count=1)
    return b_dk, b_dv, dq_row


@gluon.jit
def _consume(
    half: gl.constexpr, part, dk, dv, begin, current_end, end, key, page, n_keys, i_sum, scale, s_dkr, s_dkh,
    first_n, sum_k, sum_v, block_size, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s, out_row_s,
    kv_full, q_full, q_empty, ds_full,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, DQ: gl.constexpr,
    DIRECT: gl.constexpr,
):  # fmt: skip
    """A consumer, with BN keys; up to visit ``middle`` some rows do not see all of them."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    MMA_D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    scale_log2 = scale * LOG2E
    o_n = first_n + half * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, MMA))  # [BN]
    b_dk = gl.zeros([BN, D], gl.float32, MMA_D)  # [BN, D]
    b_dv = gl.zeros([BN, D], gl.float32, MMA_D)  # [BN, D]
    masked = (gl.maximum(current_end - begin, 0) + BM - 1) // BM * BM
    middle = gl.minimum(begin + masked, end)
    middle = gl.where(n_keys < first_n + 2 * BN, end, middle)
    mbarrier.wait(kv_full, 0)
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    dq_row = gl.full([64], -1, gl.int32, gl.SliceLayout(1, HALF))  # [64]
    i = 0
    if DQ:
        # A task that computes dQ has a tile.
        b_dk, b_dv, dq_row = _step(  # [BN, D], [BN, D], [64]
            b_dk, b_dv, dq_row, i, half, part, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s, out_row_s,
            q_full, q_empty, ds_full, o_n, n_keys, scale_log2, True, True, D, BM, BN, STAGES, DQ, MMA, MMA_D,
        )  # fmt: skip
        i += 1
        begin += BM
        middle = gl.maximum(middle, begin)
    for _ in range(begin, middle, BM):
        b_dk, b_dv, dq_row = _step(  # [BN, D], [BN, D], [64]
            b_dk, b_dv, dq_row, i, half, part, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s, out_row_s,
            q_full, q_empty, ds_full, o_n, n_keys, scale_log2, False, True, D, BM, BN, STAGES, DQ, MMA, MMA_D,
        )  # fmt: skip
        i += 1
    for _ in range(middle, end, BM):
        b_dk, b_dv, dq_row = _step(  # [BN, D], [BN, D], [64]
            b_dk, b_dv, dq_row, i, half, part, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s, out_row_s,
            q_full, q_empty, ds_full, o_n, n_keys, scale_log2, False, False, D, BM, BN, STAGES, DQ, MMA, MMA_D,
        )  # fmt: skip
        i += 1
    if DQ:
        b_dq = warpgroup_mma_wait(0, deps=[_issue_dq(i - 1, half, k_s, ds_s, ds_full, D)])  # [64, 64]
        store_rows(part + (half * 64 if D == 128 else 0), dq_row, b_dq, D)
    b_dk = b_dk * scale
    if i_sum >= 0:
        if DIRECT:
            _add(sum_k, sum_v, b_dk, b_dv, i_sum.to(gl.int64) * block_size * D, D, first_n + half * BN, n_keys)
        else:
            _add(dk, dv, b_dk, b_dv, key.to(gl.int64) * s_dkr + page * s_dkh, s_dkr, first_n + half * BN, n_keys)
    else:
        o_row = key.to(gl.int64) * s_dkr + page * s_dkh
        _store(dk, dv, b_dk, b_dv, o_row, s_dkr, first_n + half * BN, n_keys, DIRECT)


@gluon.jit
def _offsets(first_row, s_row, first, n_keys, dtype: gl.constexpr, BN: gl.constexpr, D: gl.constexpr):
    """Offsets of BN keys of a block, from ``first`` on, and the mask of those that exist."""
    LAYOUT: gl.constexpr = side_by_side(D, dtype)
    o_n = first + gl.arange(0, BN, layout=gl.SliceLayout(1, LAYOUT))  # [BN]
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))  # [D]
    return first_row + o_n.to(gl.int64)[:, None] * s_row + o_d[None, :], (o_n < n_keys)[:, None]


@gluon.jit
def _add(dk, dv, b_dk, b_dv, first_row, s_row, first, n_keys):
    """Adds to float32 sums, to which other programs add too."""
    o, m = _offsets(first_row, s_row, first, n_keys, gl.float32, b_dk.shape[0], b_dk.shape[1])  # [BN, D], [BN, 1]
    gl.atomic_add(dk + o, exchange(b_dk, gl.float32), mask=m, sem="relaxed")
    gl.atomic_add(dv + o, exchange(b_dv, gl.float32), mask=m, sem="relaxed")


@gluon.jit
def _store(dk, dv, b_dk, b_dv, first_row, s_row, first, n_keys, DIRECT: gl.constexpr):
    dtype: gl.constexpr = dk.dtype.element_ty
    o, m = _offsets(first_row, s_row, first, n_keys, dtype, b_dk.shape[0], b_dk.shape[1])  # [BN, D], [BN, 1]
    b_dk = exchange(b_dk, dtype)  # [BN, D]
    b_dv = exchange(b_dv, dtype)  # [BN, D]
    if not DIRECT:
        # Of several slices of rows an earlier one may have stored its part; they run one after the other.
        b_dk += gl.load(dk + o, mask=m, other=0.0)
        b_dv += gl.load(dv + o, mask=m, other=0.0)
    gl.store(dk + o, b_dk, mask=m)
    gl.store(dv + o, b_dv, mask=m)


@gluon.jit(do_not_specialize=["first_head"])
def dkdv_kernel(
    q, dout, k_desc, v_desc, k, v, part, dk, dv, sum_k, sum_v, table, stats, task_info,
    scale, room, block_size, first_head, s_kr, s_kh, s_vr, s_vh, s_dkr, s_dkh,
    SHARE: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, KEY_TILES: gl.constexpr,
    DQ: gl.constexpr, DIRECT: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Arguments as of :func:`..backward._dkdv_kernel`; ``k_desc``, ``v_desc`` fetch boxes of 2 * BN rows."""
    i_task = gl.program_id(0) // KEY_TILES
    i_n = gl.program_id(0) % KEY_TILES
    i_list, begin, end, current_end, n_keys, first_key, page, i_sum, _ = read_task_info(
        task_info, i_task, i_n, KEY_TILES
    )

    dtype: gl.constexpr = k_desc.dtype
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ONE: gl.constexpr = mbarrier.MBarrierLayout()
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * BN, BM], dtype)
    k_s = gl.allocate_shared_memory(dtype, [2 * BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2 * BN, D], v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], Q_LAYOUT)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], Q_LAYOUT)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ROWS)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ROWS)
    limit_s = gl.allocate_shared_memory(gl.int32, [STAGES, BM], ROWS)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], ONE)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    ds_s = k_s
    out_row_s = limit_s
    ds_full = q_full
    if DQ:
        ds_s = gl.allocate_shared_memory(dtype, [2, 2 * BN, BM], DS_LAYOUT)
        out_row_s = gl.allocate_shared_memory(gl.int32, [STAGES, BM], ROWS)
        ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
        for i in gl.static_range(2):
            mbarrier.init(ds_full.index(i), count=2)
    mbarrier.init(kv_full, count=1)
    # A tile of rows is complete when the copies of the producer's 128 threads are, and its stores: one arrival more.
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=129)
        mbarrier.init(q_empty.index(i), count=2)
    fence_async_shared()
    # Exit only here: barrier setup overlaps with the task-record loads issued above.
    if i_list < 0:
        return
    first_n = i_n * 2 * BN
    dk_page = (page - first_head).to(gl.int64)
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), part, dk, dv, begin, current_end, end, first_key, dk_page, n_keys, i_sum, scale,
                s_dkr, s_dkh, first_n, sum_k, sum_v, block_size, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s,
                out_row_s, kv_full, q_full, q_empty, ds_full, D, BM, BN, STAGES, DQ, DIRECT,
            )),
            (_consume, (
                gl.constexpr(1), part, dk, dv, begin, current_end, end, first_key, dk_page, n_keys, i_sum, scale,
                s_dkr, s_dkh, first_n, sum_k, sum_v, block_size, k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s, limit_s,
                out_row_s, kv_full, q_full, q_empty, ds_full, D, BM, BN, STAGES, DQ, DIRECT,
            )),
            (_produce, (
                q, dout, k_desc, v_desc, k, v, table, stats, room, begin, end, n_keys - first_n, first_key + first_n,
                page * s_kh, page * s_vh, s_kr, s_vr,
                k_s, v_s, q_s, do_s, lse_s, delta_s, limit_s, out_row_s,
                kv_full, q_full, q_empty, D, BM, BN, STAGES, SHARE, DQ,
            )),
        ],
        [4, 4],
        # 168 registers for each of 384 threads on average; those that the producer gives up go to the consumers.
        [252 - REGISTERS // 2, REGISTERS],
    )  # fmt: skip
