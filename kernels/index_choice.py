"""The choice of an index branch: scores of blocks by its queries and keys, and the blocks with the highest.

Legend: L rows, g KV heads, m queries of the scorer for each, d their width, K keys, n blocks, B block size,
S = top_k - 1. A block is represented by one key, its mean (KEYS = 0), or by its B keys, of whose scores it has the
highest.

A product of a query and a key is the float64 sum of its terms in a fixed order, rounded to float32, so that the choice
is the same on any number of ranks and that of :mod:`moba_cp.eager`. Tensor cores add in another order. Where that could
change what a sum is rounded to, the block's score is marked, and computed again in the fixed order by a kernel of its
own: about one product in a million. Nothing after a product may be fused: eager PyTorch rounds each step.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuned
from .common import cdiv, check_head_dim, launch_options, next_power_of_2, on_device, padded_dim
from .select_gated import _choose_kernel
from .sort_keys import NAN, ordered

# Of scores at a time.
SCORE_BYTES = 1 << 27
# Above the keys of all scores: of a maximum over NaN, and of a score that is to be computed again.
HAS_NAN, UNSURE = tl.constexpr(2**31 - 2), tl.constexpr(2**31 - 1)
# Entries that a program looks through for marks.
MARKS = 1024


@triton.jit
def _above(score):
    """int32 that sorts as the scores do, NaN above them."""
    return tl.where(score != score, HAS_NAN, ordered(score))


@triton.jit
def _below(key):
    """The same with NaN below them."""
    return tl.where(key == HAS_NAN, NAN, key)


@triton.jit
def _score_tile(p_q, m_q, p_w, m_m, b_k, s_q, M: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Sort keys [BM, BN], marked where unsure, of the scores of keys b_k [BD, BN]; p_q [BM, BD], p_w [BM]."""
    # Two sums of d products differ by less than d * 2 ** -52 times the norms.
    b_bound = tl.sqrt(tl.sum(b_k * b_k, 0)) * (D * 2.0**-51)  # [BN]
    score = tl.zeros([BM, BN], dtype=tl.float32)  # [BM, BN]
    unsure = tl.zeros([BM, BN], dtype=tl.int1)  # [BM, BN]
    for i in range(0, M):
        b_q = tl.load(p_q + i * s_q, mask=m_q, other=0.0)  # [BM, BD]
        b_w = tl.load(p_w + i, mask=m_m, other=0.0)  # [BM]
        product = tl.dot(b_q, b_k, out_dtype=tl.float64)  # [BM, BN]
        bound = tl.sqrt(tl.sum(b_q * b_q, 1))[:, None] * b_bound[None, :]  # [BM, BN]
        highest = (product + bound).to(tl.float32)  # [BM, BN]
        # What is below zero counts as zero, whatever it is.
        unsure = unsure | (((product - bound).to(tl.float32) != highest) & (highest > 0.0))
        narrow = product.to(tl.float32)  # [BM, BN]
        score += b_w[:, None] * tl.where(narrow < 0.0, 0.0, narrow)
    return tl.where(unsure, UNSURE, _above(score))


@triton.jit(do_not_specialize=["n_rows", "n_keys", "n_blocks"])
def _index_score_kernel(
    queries, weights, keys, start, first, current_block, sort_keys,
    n_rows, n_keys, n_blocks, s_qt, s_qh, s_qm, s_wt, s_wh, s_kr, s_kh,
    H: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Keys [L, g, n] of the scores of candidates, marked where unsure; queries and keys are float64."""
    # Late rows have the most candidates: they start first, so that the last programs to run are short.
    i_m, i_h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    begin_n = tl.program_id(2) * BN
    o_m = i_m * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < n_rows  # [BM]
    oldest = tl.min(tl.load(first + o_m, mask=m_m, other=2147483647), 0)
    newest = tl.max(tl.load(current_block + o_m, mask=m_m, other=-1), 0) - 1
    if (begin_n <= newest) & (begin_n + BN > oldest):
        o_n = tl.arange(0, BN)  # [BN]
        o_d = tl.arange(0, BD)  # [BD]
        m_q = m_m[:, None] & (o_d < D)[None, :]  # [BM, BD]
        p_q = queries + o_m.to(tl.int64)[:, None] * s_qt + i_h.to(tl.int64) * s_qh + o_d[None, :]  # [BM, BD]
        p_w = weights + o_m.to(tl.int64) * s_wt + i_h * s_wh  # [BM]
        p_keys = keys + i_h.to(tl.int64) * s_kh + o_d[:, None]  # [BD, 1]
        if KEYS == 0:
            o_b = begin_n + o_n  # [BN]
            m_tile = (o_b < n_blocks)[None, :] & (o_d < D)[:, None]  # [BD, BN]
            b_k = tl.load(p_keys + o_b.to(tl.int64)[None, :] * s_kr, mask=m_tile, other=0.0)  # [BD, BN]
            key = _score_tile(p_q, m_q, p_w, m_m, b_k, s_qm, M, D, BM, BN)  # [BM, BN]
        else:
            key = tl.full([BM, BN], -(2**31), tl.int32)  # [BM, BN]
            CHUNKS: tl.constexpr = (KEYS + BK - 1) // BK
            for i in range(0, tl.minimum(BN, newest + 1 - begin_n) * CHUNKS):
                column = i // CHUNKS
                begin = tl.load(start + begin_n + column)
                o_k = i % CHUNKS * BK + tl.arange(0, BK)  # [BK]
                # A block that is nobody's candidate may be shorter than B, and the keys end there.
                m_k = (o_k < KEYS) & (begin + o_k < n_keys)  # [BK]
                m_tile = m_k[None, :] & (o_d < D)[:, None]  # [BD, BK]
                b_k = tl.load(p_keys + (begin + o_k)[None, :] * s_kr, mask=m_tile, other=0.0)  # [BD, BK]
                of_keys = _score_tile(p_q, m_q, p_w, m_m, b_k, s_qm, M, D, BM, BK)  # [BM, BK]
                of_keys = tl.where(m_k[None, :], of_keys, -(2**31))
                best = tl.maximum(key, tl.max(of_keys, 1)[:, None])  # [BM, BN]
                key = tl.where(o_n[None, :] == column, best, key)
        p_out = sort_keys + (o_m.to(tl.int64) * H + i_h)[:, None] * n_blocks + (begin_n + o_n)[None, :]  # [BM, BN]
        tl.store(p_out, _below(key), mask=m_m[:, None] & (begin_n + o_n < n_blocks)[None, :])


@triton.jit
def _sum_in_order(x, BK: tl.constexpr, BD: tl.constexpr, LEVELS: tl.constexpr):
    """[BK], the sums over the columns of x [BK, BD], half of them added to the other half until one is left."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [BK, 2, BD >> (level + 1)]), 1)
    return tl.reshape(x, [BK])


@triton.jit(do_not_specialize=["n_entries", "n_keys", "n_blocks"])
def _index_again_kernel(
    queries, weights, keys, start, first, current_block, sort_keys, column,
    n_entries, n_keys, n_blocks, s_qt, s_qh, s_qm, s_wt, s_wh, s_kr, s_kh,
    H: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, LEVELS: tl.constexpr,
    MARKS: tl.constexpr,
):  # fmt: skip
    """Computes what is marked in sort_keys again."""
    o_e = tl.program_id(0).to(tl.int64) * MARKS + tl.arange(0, MARKS)  # [MARKS]
    marked = tl.load(sort_keys + o_e, mask=o_e < n_entries, other=0) == UNSURE  # [MARKS]
    left = tl.sum(marked.to(tl.int32), 0)
    o_d = tl.load(column + tl.arange(0, BD))  # [BD]
    m_d = o_d >= 0  # [BD]
    W: tl.constexpr = KEYS if KEYS > 0 else 1
    while left > 0:
        entry = tl.min(tl.where(marked, o_e, 9223372036854775807), 0)
        row, i_h, i_b = entry // n_blocks // H, entry // n_blocks % H, entry % n_blocks
        # Elsewhere is whatever was in memory.
        if (i_b >= tl.load(first + row)) & (i_b < tl.load(current_block + row)):
            begin = i_b
            if KEYS > 0:
                begin = tl.load(start + i_b)
            key = -(2**31)
            for lo in range(0, W, BK):
                o_k = lo + tl.arange(0, BK)  # [BK]
                m_k = (o_k < W) & (begin + o_k < n_keys)  # [BK]
                p_k = keys + (begin + o_k)[:, None] * s_kr + i_h * s_kh + o_d[None, :]  # [BK, BD]
                b_k = tl.load(p_k, mask=m_k[:, None] & m_d[None, :], other=0.0)  # [BK, BD]
                score = tl.zeros([BK], dtype=tl.float32)  # [BK]
                for i in range(0, M):
                    b_q = tl.load(queries + row * s_qt + i_h * s_qh + i * s_qm + o_d, mask=m_d, other=0.0)  # [BD]
                    b_w = tl.load(weights + row * s_wt + i_h * s_wh + i)
                    narrow = _sum_in_order(b_k * b_q[None, :], BK, BD, LEVELS).to(tl.float32)  # [BK]
                    score += b_w * tl.where(narrow < 0.0, 0.0, narrow)
                of_keys = tl.where(m_k, _above(score), -(2**31))  # [BK]
                key = tl.maximum(key, tl.max(of_keys, 0))
            tl.store(sort_keys + entry, _below(key))
        marked = marked & (o_e != entry)
        left -= 1


@lru_cache
def _columns(dim: int, device: torch.device) -> Tensor:
    """[BD] int32: where a row is loaded from, -1 for nothing, so that adding halves of it adds as
    :func:`moba_cp.eager.select._sum_in_place` adds a row of ``dim``."""
    lengths = [dim]
    while lengths[-1] > 1:
        lengths.append((lengths[-1] + 1) // 2)
    slots = [0]
    for n in reversed(lengths[:-1]):
        half = n // 2
        slots += [n - half + i if 0 <= i < half else -1 for i in slots]
    return torch.tensor(slots + [-1] * (padded_dim(dim) - len(slots)), dtype=torch.int32, device=device)


def index_select(
    queries: Tensor, weights: Tensor, keys: Tensor, table, by_mean: bool, top_k: int, min_recent: int, sink: bool
) -> Tensor:
    """See :func:`moba_cp.eager.index_select`; queries and keys are float32, bfloat16 or float16, weights float32."""
    (n_rows, n_heads, m, dim), n_blocks = queries.shape, table.n_blocks
    check_head_dim(dim)
    n_slots = top_k - 1
    if n_slots == 0 or n_rows == 0 or n_blocks == 0:
        return torch.full((n_rows, n_heads, n_slots), -1, dtype=torch.int32, device=queries.device)
    first, current_block, start = (x.contiguous() for x in (table.first, table.current_block, table.start))
    chosen = torch.empty(n_rows, n_heads, n_slots, dtype=torch.int32, device=queries.device)
    step = max(1, SCORE_BYTES // (4 * n_heads * n_blocks))
    sort_keys = torch.empty(min(step, n_rows), n_heads, n_blocks, dtype=torch.int32, device=queries.device)
    keys, weights = keys.double().contiguous(), weights.contiguous()
    width = 0 if by_mean else table.block_size
    bm, bn, bk, warps = tuned.index_tile(dim, width)
    select_bm, select_bn, select_warps = tuned.select_tile(dim, torch.float32)
    levels = (padded_dim(dim)).bit_length() - 1
    with on_device(queries):
        for lo in range(0, n_rows, step):
            some = slice(lo, min(lo + step, n_rows))
            rows, of_rows = queries[some].double().contiguous(), weights[some]
            n_some, tables = some.stop - lo, dict(first=first[some], current_block=current_block[some])
            inputs = dict(
                queries=rows, weights=of_rows, keys=keys, start=start, sort_keys=sort_keys, **tables,
                n_keys=keys.shape[0], n_blocks=n_blocks, s_qt=rows.stride(0), s_qh=rows.stride(1),
                s_qm=rows.stride(2), s_wt=weights.stride(0), s_wh=weights.stride(1), s_kr=keys.stride(0),
                s_kh=keys.stride(1), H=n_heads, M=m, KEYS=width, BK=bk, BD=padded_dim(dim),
            )  # fmt: skip
            _index_score_kernel[(cdiv(n_some, bm), n_heads, cdiv(n_blocks, bn))](
                **inputs, n_rows=n_some, D=dim, BM=bm, BN=bn, **launch_options(warps, fused=False)
            )
            n_entries = n_some * n_heads * n_blocks
            _index_again_kernel[(cdiv(n_entries, MARKS),)](
                **inputs, column=_columns(dim, queries.device), n_entries=n_entries, LEVELS=levels, MARKS=MARKS,
                **launch_options(4, fused=False),
            )  # fmt: skip
            _choose_kernel[(cdiv(n_some, select_bm), n_heads)](
                q=rows, means=keys, sort_keys=sort_keys, **tables, block_indices=chosen[some], n_rows=n_some,
                n_blocks=n_blocks, s_qt=0, s_qh=0, s_mb=0, s_mh=0, H=n_heads, G=1, SCORED=True, MIN_RECENT=min_recent,
                SINK=sink, D=dim, BD=padded_dim(dim), S=n_slots, SLOTS=max(2, next_power_of_2(n_slots)),
                BM=select_bm, BN=select_bn, PRECISION="ieee", **launch_options(select_warps),
            )  # fmt: skip
    return torch.where(chosen >= 0, chosen - first[:, None, None], chosen)
