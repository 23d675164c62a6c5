"""What an index branch learns from: the KL divergence from what attention gives blocks to the softmax of their scores,
and its gradients.

Legend: R rows, g KV heads, G query heads of each, D head dim, T keys of attention; m queries of the scorer for each KV
head, MP the power of two from m on, d their width; K keys of the scorer, n blocks, B block size, S chosen blocks of a
row, SP a power of two that is at least S. A block is represented by one key, its mean (KEYS = 0), or by its B keys, of
whose scores it has the highest (KEYS = B).

Where all earlier blocks count, a slice of rows has what attention gives each of them in memory, which becomes the
gradient of its score: :mod:`.masses` writes the first, :func:`_index_rows_kernel` reads it twice, for the softmax and
for the gradients of rows, and :func:`_index_keys_kernel` adds up those of keys. A tile has all MP queries of a few
rows. Where chosen blocks count, a program of :mod:`.index_chosen` does a row and reads no other blocks, and the keys'
gradients come by lists of the rows that chose a block. Everything is added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuned
from .common import (
    cdiv,
    check_head_dim,
    check_unit_stride,
    dot_precision,
    launch_options,
    next_power_of_2,
    on_device,
    padded_dim,
)
from .index_chosen import _index_chosen_kernel
from .masses import FAR, _index_masses_kernel, _positive
from .routing import build_routing

# Of each of the tables of rows and blocks at a time.
TABLE_BYTES = 1 << 27


@triton.jit
def _added(x, BM: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr):
    """[BM, BN], the sums over the queries of each row of x [BM * MP, BN]."""
    return tl.sum(tl.reshape(x, [BM, MP, BN]), 1)


@triton.jit
def _repeated(x, BM: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr):
    """[BM * MP, BN], the rows of x [BM, BN] for each of their queries."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], [BM, MP, BN]), [BM * MP, BN])


@triton.jit
def _key_tile(
    keys, start, i_b, lo, o_d, n_keys, n_blocks, s_kr,
    KEYS: tl.constexpr, D: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Keys [BK, BD] that represent blocks: the means of those from i_b on, or block i_b's keys from lo on; their rows
    and which are there [BK]."""
    o_k = lo + tl.arange(0, BK)  # [BK]
    if KEYS == 0:
        o_r = (i_b + o_k).to(tl.int64)  # [BK]
        m_k = o_r < n_blocks  # [BK]
    else:
        o_r = tl.load(start + i_b) + o_k  # [BK]
        m_k = (o_k < KEYS) & (o_r < n_keys)  # [BK]
    p_k = keys + o_r[:, None] * s_kr + o_d[None, :]  # [BK, BD]
    return tl.load(p_k, mask=m_k[:, None] & (o_d < D)[None, :], other=0.0), o_r, m_k


@triton.jit(do_not_specialize=["n_rows", "n_keys", "n_blocks"])
def _index_rows_kernel(
    queries, weights, keys, start, first, current_block, masses, scores, best, loss, dqueries, dweights,
    n_rows, n_keys, n_blocks, s_qt, s_qh, s_qm, s_wt, s_wh, s_kr, s_kh,
    H: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """loss [R, g], dqueries [R, g, m, d], dweights [R, g, m]; masses [R, g, n] become the gradients of scores. scores
    and best [R, g, n]: room for the scores, and, by keys, for which of a block's keys has it."""
    i_m, i_h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)  # [BM]
    o_r = tl.arange(0, BM * MP)  # [BM * MP]
    o_d = tl.arange(0, BD)  # [BD]
    m_m = o_m < n_rows  # [BM]
    b_first = tl.load(first + o_m, mask=m_m, other=FAR)  # [BM]
    b_current = tl.load(current_block + o_m, mask=m_m, other=-1)  # [BM]
    oldest, newest = tl.min(b_first, 0), tl.max(b_current, 0) - 1
    o_t = (i_m * BM + o_r // MP).to(tl.int64)  # [BM * MP]
    m_r = (o_t < n_rows) & (o_r % MP < M)  # [BM * MP]
    p_q = queries + o_t[:, None] * s_qt + i_h.to(tl.int64) * s_qh + (o_r % MP)[:, None] * s_qm + o_d[None, :]
    b_q = tl.load(p_q, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)  # [BM * MP, BD]
    b_w = tl.load(weights + o_t * s_wt + i_h * s_wh + o_r % MP, mask=m_r, other=0.0)  # [BM * MP]
    p_row = (o_m.to(tl.int64) * H + i_h)[:, None] * n_blocks  # [BM, 1]
    keys += i_h.to(tl.int64) * s_kh

    # Of a row's scores the maximum, and the sum of their exponentials below it; and the sum of masses.
    b_max = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    b_sum = tl.zeros([BM], dtype=tl.float32)  # [BM]
    # By keys a block at a time, of which one column is stored.
    COLUMNS: tl.constexpr = BN if KEYS == 0 else 1
    # Added up by columns: Triton 3.6 and 3.7 fail to compile a sum in a loop whose result is read twice.
    b_masses = tl.zeros([BM, COLUMNS], dtype=tl.float32)  # [BM, COLUMNS]
    TILE: tl.constexpr = BN if KEYS == 0 else BK
    W: tl.constexpr = KEYS if KEYS > 0 else 1
    o_n = tl.arange(0, COLUMNS)  # [COLUMNS]
    for i_b in range(oldest, newest + 1, COLUMNS):
        m_n = (i_b + o_n)[None, :] >= b_first[:, None]  # [BM, COLUMNS]
        m_n = m_n & ((i_b + o_n)[None, :] < b_current[:, None])
        if KEYS == 0:
            b_k, _, _ = _key_tile(keys, start, i_b, 0, o_d, n_keys, n_blocks, s_kr, KEYS, D, BN)  # [BN, BD]
            product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM * MP, BN]
            score = _added(b_w[:, None] * _positive(product), BM, MP, BN)  # [BM, BN]
        else:
            highest = tl.full([BM], float("-inf"), tl.float32)  # [BM]
            at = tl.zeros([BM], dtype=tl.int32)  # [BM]
            for lo in range(0, KEYS, BK):
                b_k, _, m_k = _key_tile(keys, start, i_b, lo, o_d, n_keys, n_blocks, s_kr, KEYS, D, BK)  # [BK, BD]
                product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM * MP, BK]
                some = _added(b_w[:, None] * _positive(product), BM, MP, BK)  # [BM, BK]
                some = tl.where(m_k[None, :], some, float("-inf"))
                here = tl.max(some, 1)  # [BM]
                o_k = lo + tl.arange(0, BK)  # [BK]
                # The first key that has it.
                number = tl.min(tl.where(some == here[:, None], o_k[None, :], KEYS), 1)  # [BM]
                here = tl.where(tl.max((some != some).to(tl.int32), 1) > 0, float("nan"), here)
                at = tl.where(here > highest, number, at)
                highest = tl.where((here > highest) | (here != here), here, highest)
            score = highest[:, None]  # [BM, 1]
            tl.store(best + p_row + i_b + o_n[None, :], at[:, None], mask=m_n)
        tl.store(scores + p_row + i_b + o_n[None, :], score, mask=m_n)
        b_masses += tl.load(masses + p_row + i_b + o_n[None, :], mask=m_n, other=0.0)
        score = tl.where(m_n, score, float("-inf"))
        higher = tl.maximum(b_max, tl.max(score, 1))  # [BM]
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # [BM]
        b_sum = b_sum * tl.exp(b_max - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
        b_max = higher
    # What was stored by some threads is read by others.
    tl.debug_barrier()

    b_total = tl.sum(b_masses, 1)  # [BM]
    nothing = b_total == 0.0  # [BM]
    b_lse = tl.where(nothing, 0.0, b_max + tl.log(b_sum))  # [BM]
    b_share = 1.0 / tl.where(nothing, 1.0, b_total)  # [BM]
    b_loss = tl.zeros([BM], dtype=tl.float32)  # [BM]
    b_dq = tl.zeros([BM * MP, BD], dtype=tl.float32)  # [BM * MP, BD]
    b_dw = tl.zeros([BM * MP], dtype=tl.float32)  # [BM * MP]
    for i_b in range(oldest, newest + 1, COLUMNS):
        m_n = (i_b + o_n)[None, :] >= b_first[:, None]  # [BM, COLUMNS]
        m_n = m_n & ((i_b + o_n)[None, :] < b_current[:, None])
        p_n = p_row + i_b + o_n[None, :]  # [BM, COLUMNS]
        log = tl.load(scores + p_n, mask=m_n, other=0.0) - b_lse[:, None]  # [BM, COLUMNS]
        target = tl.load(masses + p_n, mask=m_n, other=0.0) * b_share[:, None]  # [BM, COLUMNS]
        b_loss += tl.sum(tl.where(target == 0.0, 0.0, target * (tl.log(target) - log)), 1)
        # Threads that hold the same entry have all read it before one of them writes it.
        tl.debug_barrier()
        b_ds = tl.where(m_n & ~nothing[:, None], tl.exp(log) - target, 0.0)  # [BM, COLUMNS]
        tl.store(masses + p_n, b_ds, mask=m_n)
        for lo in range(0, W, TILE):
            b_k, _, _ = _key_tile(keys, start, i_b, lo, o_d, n_keys, n_blocks, s_kr, KEYS, D, TILE)  # [TILE, BD]
            b_of_keys = b_ds
            if KEYS > 0:
                at = tl.load(best + p_n, mask=m_n, other=-1)  # [BM, 1]
                b_of_keys = tl.where(at == (lo + tl.arange(0, TILE))[None, :], b_ds, 0.0)  # [BM, TILE]
            b_of_keys = _repeated(b_of_keys, BM, MP, TILE)  # [BM * MP, TILE]
            product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM * MP, TILE]
            b_dw += tl.sum(_positive(product) * b_of_keys, 1)
            b_dp = tl.where(product > 0.0, b_of_keys * b_w[:, None], 0.0).to(NARROW)  # [BM * MP, TILE]
            b_dq += tl.dot(b_dp, b_k.to(NARROW), input_precision="ieee")
    tl.store(loss + o_m.to(tl.int64) * H + i_h, b_loss, mask=m_m)
    o_out = (o_t * H + i_h) * M + o_r % MP  # [BM * MP]
    tl.store(dqueries + o_out[:, None] * D + o_d[None, :], b_dq, mask=m_r[:, None] & (o_d < D)[None, :])
    tl.store(dweights + o_out, b_dw, mask=m_r)


@triton.jit(do_not_specialize=["n_rows", "n_keys", "n_blocks"])
def _index_keys_kernel(
    queries, weights, keys, start, first, current_block, gradients, best, visits, list_start, dkeys,
    n_rows, n_keys, n_blocks, s_qt, s_qh, s_qm, s_wt, s_wh, s_kr, s_kh, s_dr, s_dh,
    H: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, KEYS: tl.constexpr, S: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Adds to dkeys [K, g, d], of all rows and their gradients [R, g, n], of the candidates (S = 0), or of the rows
    that chose a block and their gradients [R, g, S]. best: which of the block's keys each is of; unless by means."""
    i_h = tl.program_id(1)
    BY_BLOCK: tl.constexpr = (KEYS > 0) | (S > 0)
    CHUNKS: tl.constexpr = (KEYS + BN - 1) // BN if KEYS > 0 else 1
    i_b, lo = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS * BN
    if not BY_BLOCK:
        i_b = i_b * BN
    o_n = tl.arange(0, BN)  # [BN]
    o_d = tl.arange(0, BD)  # [BD]
    o_m = tl.arange(0, BM)  # [BM]
    o_r = tl.arange(0, BM * MP)  # [BM * MP]
    b_k, o_k, m_k = _key_tile(
        keys + i_h.to(tl.int64) * s_kh, start, i_b, lo, o_d, n_keys, n_blocks, s_kr, KEYS, D, BN
    )  # [BN, BD], [BN], [BN]
    if BY_BLOCK and KEYS == 0:
        m_k = m_k & (o_n == 0)
    p_queries = queries + i_h.to(tl.int64) * s_qh + (o_r % MP)[:, None] * s_qm + o_d[None, :]  # [BM * MP, BD]
    begin, end = 0, n_rows
    if S > 0:
        begin, end = tl.load(list_start + i_h * n_blocks + i_b), tl.load(list_start + i_h * n_blocks + i_b + 1)
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)  # [BN, BD]
    for i in range(begin, end, BM):
        m_m, m_r = i + o_m < end, i + o_r // MP < end  # [BM], [BM * MP]
        if S > 0:
            visit = tl.load(visits + i + o_m, mask=m_m, other=0)  # [BM]
            o_e = ((visit // S).to(tl.int64) * H + i_h) * S + visit % S  # [BM]
            o_t = (tl.load(visits + i + o_r // MP, mask=m_r, other=0) // S).to(tl.int64)  # [BM * MP]
            wanted = True
        else:
            b_first = tl.load(first + i + o_m, mask=m_m, other=FAR)  # [BM]
            b_current = tl.load(current_block + i + o_m, mask=m_m, other=-1)  # [BM]
            o_e = ((i + o_m).to(tl.int64) * H + i_h) * n_blocks + i_b  # [BM]
            o_t = (i + o_r // MP).to(tl.int64)  # [BM * MP]
            until = i_b + (1 if BY_BLOCK else BN)
            wanted = (tl.min(b_first, 0) < until) & (tl.max(b_current, 0) > i_b)
            m_m = m_m & (b_first <= i_b) & (b_current > i_b)
        if wanted:
            if BY_BLOCK:
                b_ds = tl.load(gradients + o_e, mask=m_m, other=0.0)[:, None]  # [BM, 1]
                at = tl.zeros([BM], dtype=tl.int32)  # [BM]
                if KEYS > 0:
                    at = tl.load(best + o_e, mask=m_m, other=-1)
                b_ds = tl.where(at[:, None] == (lo + o_n)[None, :], b_ds, 0.0)  # [BM, BN]
            else:
                m_n = (i_b + o_n)[None, :] >= b_first[:, None]  # [BM, BN]
                m_n = m_n & ((i_b + o_n)[None, :] < b_current[:, None])
                b_ds = tl.load(gradients + o_e[:, None] + o_n[None, :], mask=m_n, other=0.0)  # [BM, BN]
            m_q = m_r & (o_r % MP < M)  # [BM * MP]
            b_q = tl.load(p_queries + o_t[:, None] * s_qt, mask=m_q[:, None] & (o_d < D)[None, :], other=0.0)
            b_w = tl.load(weights + o_t * s_wt + i_h * s_wh + o_r % MP, mask=m_q, other=0.0)  # [BM * MP]
            product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM * MP, BN]
            b_dp = tl.where(product > 0.0, _repeated(b_ds, BM, MP, BN) * b_w[:, None], 0.0).to(NARROW)
            b_dk += tl.dot(tl.trans(b_dp), b_q.to(NARROW), input_precision="ieee")
    p_out = dkeys + o_k[:, None] * s_dr + i_h.to(tl.int64) * s_dh + o_d[None, :]  # [BN, BD]
    m_out = m_k[:, None] & (o_d < D)[None, :]  # [BN, BD]
    tl.store(p_out, tl.load(p_out, mask=m_out, other=0.0) + b_dk, mask=m_out)


def index_loss(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    queries: Tensor,
    weights: Tensor,
    keys: Tensor,
    table,
    by_mean: bool,
    chosen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`moba_cp.eager.index_loss`; q, k, queries and keys are float32, bfloat16 or float16, the others are
    float32."""
    (n_rows, n_heads, m, dim), n_blocks, block_size = queries.shape, table.n_blocks, table.block_size
    check_head_dim(q.shape[2])
    q, k, queries, weights, keys = (check_unit_stride(x) for x in (q, k, queries, weights, keys))
    made = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=q.device)
    loss, dqueries, dweights = made(n_rows, n_heads), made(n_rows, n_heads, m, dim), made(n_rows, n_heads, m)
    dkeys = torch.zeros(keys.shape, dtype=torch.float32, device=q.device)
    if n_rows == 0 or n_blocks == 0:
        return loss.sum() * 0, dqueries.zero_(), dweights.zero_(), dkeys
    width, members = 0 if by_mean else block_size, next_power_of_2(m)
    start, first, current_block = (x.contiguous() for x in (table.start, table.first, table.current_block))
    group, precision = q.shape[1] // n_heads, dot_precision(q.dtype)
    tile = tuned.index_rows_tile(dim, members, width, q.dtype)
    attended = dict(
        k=k, start=start, n_keys=k.shape[0], s_qt=q.stride(0), s_qh=q.stride(1), s_kt=k.stride(0),
        s_kh=k.stride(1), s_lt=lse.stride(0), s_lh=lse.stride(1), scale=scale, H=n_heads, G=group, D=q.shape[2],
        BD=padded_dim(q.shape[2]), B=block_size, PRECISION=precision,
    )  # fmt: skip
    # Products with gradients of scores: what float16 would round to zero is multiplied in float32.
    narrow = dict(
        PRECISION=dot_precision(queries.dtype), NARROW=tl.bfloat16 if queries.dtype == torch.bfloat16 else tl.float32
    )
    scored = dict(
        keys=keys, start=start, n_blocks=n_blocks, n_keys=keys.shape[0], s_qt=queries.stride(0),
        s_qh=queries.stride(1), s_qm=queries.stride(2), s_wt=weights.stride(0), s_wh=weights.stride(1),
        s_kr=keys.stride(0), s_kh=keys.stride(1), H=n_heads, M=m, MP=members, KEYS=width, D=dim, BD=padded_dim(dim),
        BM=tile.bm, **narrow,
    )  # fmt: skip
    of_keys = dict(dkeys=dkeys, s_dr=dkeys.stride(0), s_dh=dkeys.stride(1), BN=tile.bn if by_mean else tile.bk)
    by_block = n_blocks * (1 if by_mean else cdiv(width, tile.bk))
    with on_device(q):
        if chosen is not None:
            n_slots = chosen.shape[2]
            chosen = torch.where(chosen >= 0, chosen + first[:, None, None], chosen)
            gradients, best = made(n_rows, n_heads, n_slots), made(n_rows, n_heads, n_slots, dtype=torch.int32)
            padded = max(16, next_power_of_2(m)), max(16, next_power_of_2(n_slots)), max(16, next_power_of_2(group))
            _index_chosen_kernel[(n_rows, n_heads)](
                q=q, lse=lse, queries=queries, weights=weights, keys=keys, chosen=chosen, loss=loss, dqueries=dqueries,
                dweights=dweights, gradients=gradients, best=best, n_scored=keys.shape[0], s_it=queries.stride(0),
                s_ih=queries.stride(1), s_im=queries.stride(2), s_wt=weights.stride(0), s_wh=weights.stride(1),
                s_ir=keys.stride(0), s_ik=keys.stride(1), M=m, BM=padded[0], KEYS=width, DI=dim, BI=padded_dim(dim),
                S=n_slots, SP=padded[1], BG=padded[2], BN=min(64, max(16, next_power_of_2(block_size))),
                NARROW=narrow["NARROW"], **attended, **launch_options(4),
            )  # fmt: skip
            lists = build_routing(chosen, None, None, start.new_zeros(n_heads, n_blocks))
            _index_keys_kernel[(by_block, n_heads)](
                queries=queries, weights=weights, first=first, current_block=current_block, gradients=gradients,
                best=best, visits=lists.visits, list_start=lists.list_start, n_rows=n_rows, S=n_slots, **of_keys,
                **scored, **launch_options(tile.warps),
            )  # fmt: skip
            return loss.sum(), dqueries, dweights, dkeys
        step = min(n_rows, max(1, TABLE_BYTES // (4 * n_heads * n_blocks)))
        masses, scores = made(2, step, n_heads, n_blocks)
        best = made(1 if by_mean else step, n_heads, n_blocks, dtype=torch.int32)
        of_masses = tuned.masses_tile(q.shape[2], block_size, q.dtype)
        for lo in range(0, n_rows, step):
            some = slice(lo, min(lo + step, n_rows))
            n_some, tables = some.stop - lo, dict(first=first[some], current_block=current_block[some])
            _index_masses_kernel[(cdiv(n_some, of_masses.bm), cdiv(n_blocks, of_masses.bn), n_heads)](
                q=q[some], lse=lse[some], masses=masses, n_rows=n_some, n_blocks=n_blocks, BM=of_masses.bm,
                BN=of_masses.bn, BK=of_masses.bk, **tables, **attended, **launch_options(of_masses.warps),
            )  # fmt: skip
            inputs = dict(queries=queries[some], weights=weights[some], n_rows=n_some, **tables, **scored)
            _index_rows_kernel[(cdiv(n_some, tile.bm), n_heads)](
                masses=masses, scores=scores, best=best, loss=loss[some], dqueries=dqueries[some],
                dweights=dweights[some], BN=tile.bn, BK=tile.bk, **inputs, **launch_options(tile.warps),
            )  # fmt: skip
            _index_keys_kernel[(cdiv(n_blocks, tile.bn) if by_mean else by_block, n_heads)](
                gradients=masses, best=best, visits=first, list_start=first, S=0, **of_keys, **inputs,
                **launch_options(tile.warps),
            )  # fmt: skip
    return loss.sum(), dqueries, dweights, dkeys
