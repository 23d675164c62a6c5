"""What attention gives blocks: its softmax added up over a block's keys and over the query heads of one KV head.

Legend: R query rows, g KV heads, G query heads of each, D head dim, T keys, B block size, n blocks.
"""

import triton
import triton.language as tl

from .common import LOG2E

FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _positive(x):
    """The positive part; a NaN stays one."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _weights(b_q, b_k, b_lse, m_n, scale, PRECISION: tl.constexpr):
    """The softmax [BM, BN] of rows in keys; scores above the log-sum-exp are of keys that are not attended to."""
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * (scale * LOG2E) - (b_lse * LOG2E)[:, None]  # [BM, BN]
    # A NaN stays one.
    b_s = tl.where(b_s > 0.0, 0.0, b_s)
    return tl.where(m_n[None, :], tl.exp2(b_s), 0.0)


@triton.jit(do_not_specialize=["n_rows", "n_keys", "n_blocks"])
def _index_masses_kernel(
    q, k, lse, start, first, current_block, masses,
    n_rows, n_keys, n_blocks, s_qt, s_qh, s_kt, s_kh, s_lt, s_lh, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """masses [R, g, n] of the candidates."""
    # Late rows have the most candidates: they start first, so that the last programs to run are short.
    i_m, i_h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(2)
    begin_n = tl.program_id(1) * BN
    o_m = i_m * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < n_rows  # [BM]
    oldest = tl.min(tl.load(first + o_m, mask=m_m, other=FAR), 0)
    newest = tl.max(tl.load(current_block + o_m, mask=m_m, other=-1), 0) - 1
    if (begin_n <= newest) & (begin_n + BN > oldest):
        o_n = tl.arange(0, BN)  # [BN]
        o_d = tl.arange(0, BD)  # [BD]
        m_d = o_d < D  # [BD]
        CHUNKS: tl.constexpr = (B + BK - 1) // BK
        b_mass = tl.zeros([BM, BN], dtype=tl.float32)  # [BM, BN]
        for i_g in range(0, G):
            i_q = i_h * G + i_g
            p_q = q + o_m.to(tl.int64)[:, None] * s_qt + i_q.to(tl.int64) * s_qh + o_d[None, :]  # [BM, BD]
            b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
            b_lse = tl.load(lse + o_m.to(tl.int64) * s_lt + i_q * s_lh, mask=m_m, other=0.0)  # [BM]
            for i in range(0, tl.minimum(BN, newest + 1 - begin_n) * CHUNKS):
                column = i // CHUNKS
                begin = tl.load(start + begin_n + column)
                o_k = i % CHUNKS * BK + tl.arange(0, BK)  # [BK]
                # A block that is nobody's candidate may be shorter than B, and the keys end there.
                m_k = (o_k < B) & (begin + o_k < n_keys)  # [BK]
                p_k = k + (begin + o_k)[None, :] * s_kt + i_h.to(tl.int64) * s_kh + o_d[:, None]  # [BD, BK]
                b_k = tl.load(p_k, mask=m_k[None, :] & m_d[:, None], other=0.0)  # [BD, BK]
                some = tl.sum(_weights(b_q, b_k, b_lse, m_k, scale, PRECISION), 1)  # [BM]
                b_mass += tl.where(o_n[None, :] == column, some[:, None], 0.0)
        p_out = masses + (o_m.to(tl.int64) * H + i_h)[:, None] * n_blocks + (begin_n + o_n)[None, :]  # [BM, BN]
        tl.store(p_out, b_mass, mask=m_m[:, None] & (begin_n + o_n < n_blocks)[None, :])
