"""What an index branch learns from the blocks that it chose: loss and gradients of one row.

Legend: R rows, g KV heads, G query heads of each, BG at least G, D head dim, T keys of attention, B block size; m
queries of the scorer for each KV head, BM at least m, d their width, S chosen blocks, SP at least S. A block is
represented by one key, its mean (KEYS = 0), or by its B keys, of whose scores it has the highest (KEYS = B).
"""

import triton
import triton.language as tl

from .masses import _positive, _weights


@triton.jit(do_not_specialize=["n_keys", "n_scored"])
def _index_chosen_kernel(
    q, k, lse, queries, weights, keys, start, chosen, loss, dqueries, dweights, gradients, best,
    n_keys, n_scored, s_qt, s_qh, s_kt, s_kh, s_lt, s_lh, s_it, s_ih, s_im, s_wt, s_wh, s_ir, s_ik, scale,
    H: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
    BN: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, KEYS: tl.constexpr, DI: tl.constexpr, BI: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A row: loss [R, g], dqueries [R, g, m, d], dweights [R, g, m]; gradients of scores and best [R, g, S]. The
    scorer's queries and keys have the strides s_i, the width DI, padded BI."""
    i_r, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_g = tl.arange(0, BG)  # [BG]
    o_m = tl.arange(0, BM)  # [BM]
    o_n = tl.arange(0, BN)  # [BN]
    o_s = tl.arange(0, SP)  # [SP]
    o_d = tl.arange(0, BD)  # [BD]
    o_i = tl.arange(0, BI)  # [BI]
    m_g, m_m, m_d, m_i = o_g < G, o_m < M, o_d < D, o_i < DI
    p_q = q + i_r * s_qt + (i_h * G + o_g)[:, None].to(tl.int64) * s_qh + o_d[None, :]  # [BG, BD]
    b_q = tl.load(p_q, mask=m_g[:, None] & m_d[None, :], other=0.0)  # [BG, BD]
    b_lse = tl.load(lse + i_r * s_lt + (i_h * G + o_g) * s_lh, mask=m_g, other=0.0)  # [BG]
    p_i = queries + i_r * s_it + i_h.to(tl.int64) * s_ih + o_m[:, None] * s_im + o_i[None, :]  # [BM, BI]
    b_i = tl.load(p_i, mask=m_m[:, None] & m_i[None, :], other=0.0)  # [BM, BI]
    b_w = tl.load(weights + i_r * s_wt + i_h * s_wh + o_m, mask=m_m, other=0.0)  # [BM]
    p_chosen = chosen + (i_r * H + i_h) * S
    k += i_h.to(tl.int64) * s_kh
    keys += i_h.to(tl.int64) * s_ik

    b_mass = tl.zeros([SP], dtype=tl.float32)  # [SP]
    b_at = tl.zeros([SP], dtype=tl.int32)  # [SP]
    for i_s in range(0, S):
        i_b = tl.load(p_chosen + i_s)
        begin = tl.load(start + tl.maximum(i_b, 0))
        # What is none has no keys.
        end = tl.where(i_b < 0, begin, tl.minimum(begin + B, n_keys))
        some = tl.zeros([BG], dtype=tl.float32)  # [BG]
        highest = float("-inf")
        at = 0
        for lo in range(0, B, BN):
            m_n = (lo + o_n < B) & (begin + lo + o_n < end)  # [BN]
            o_k = begin + lo + o_n  # [BN]
            b_k = tl.load(k + o_k[None, :] * s_kt + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)
            some += tl.sum(_weights(b_q, b_k, b_lse, m_n, scale, PRECISION), 1)
            if KEYS > 0:
                p_k = keys + o_k[None, :] * s_ir + o_i[:, None]  # [BI, BN]
                b_key = tl.load(p_k, mask=m_n[None, :] & m_i[:, None], other=0.0)  # [BI, BN]
                product = tl.dot(b_i, b_key, input_precision=PRECISION)  # [BM, BN]
                score = tl.sum(b_w[:, None] * _positive(product), 0)  # [BN]
                score = tl.where(m_n, score, float("-inf"))
                here = tl.max(score, 0)
                # The first key that has it.
                number = tl.min(tl.where(score == here, lo + o_n, B - 1), 0)
                at = tl.where(here > highest, number, at)
                highest = tl.maximum(highest, here)
        b_mass = tl.where(o_s == i_s, tl.sum(tl.where(m_g, some, 0.0), 0), b_mass)
        b_at = tl.where(o_s == i_s, at, b_at)

    ids = tl.load(p_chosen + o_s, mask=o_s < S, other=-1)  # [SP]
    counted = ids >= 0  # [SP]
    o_k = ids.to(tl.int64)  # [SP]
    if KEYS > 0:
        o_k = tl.load(start + ids, mask=counted, other=0) + b_at
    m_k = counted & (o_k < n_scored)  # [SP]
    b_key = tl.load(keys + o_k[:, None] * s_ir + o_i[None, :], mask=m_k[:, None] & m_i[None, :], other=0.0)  # [SP, BI]
    product = tl.dot(b_i, tl.trans(b_key), input_precision=PRECISION)  # [BM, SP]
    score = tl.where(counted, tl.sum(b_w[:, None] * _positive(product), 0), float("-inf"))  # [SP]
    total = tl.sum(b_mass, 0)
    nothing = total == 0.0
    highest = tl.where(nothing, 0.0, tl.max(score, 0))
    log = score - highest  # [SP]
    log = log - tl.where(nothing, 0.0, tl.log(tl.sum(tl.exp(log), 0)))
    target = b_mass / tl.where(nothing, 1.0, total)  # [SP]
    term = tl.where(target == 0.0, 0.0, target * (tl.log(target) - log))  # [SP]
    tl.store(loss + i_r * H + i_h, tl.sum(term, 0))
    b_ds = tl.where(counted, tl.exp(log) - target, 0.0)  # [SP]
    b_ds = tl.where(nothing, 0.0, b_ds)
    o_out = (i_r * H + i_h) * S + o_s  # [SP]
    tl.store(gradients + o_out, b_ds, mask=o_s < S)
    if KEYS > 0:
        tl.store(best + o_out, b_at, mask=o_s < S)
    o_out = (i_r * H + i_h) * M + o_m  # [BM]
    tl.store(dweights + o_out, tl.sum(_positive(product) * b_ds[None, :], 1), mask=m_m)
    b_dp = tl.where(product > 0.0, b_ds[None, :] * b_w[:, None], 0.0).to(NARROW)  # [BM, SP]
    b_dq = tl.dot(b_dp, b_key.to(NARROW), input_precision="ieee")  # [BM, BI]
    tl.store(dqueries + o_out[:, None] * DI + o_i[None, :], b_dq, mask=m_m[:, None] & m_i[None, :])
