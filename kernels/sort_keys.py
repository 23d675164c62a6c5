"""Scores as integers that sort like them, ``-0.0`` like ``0.0``, NaN below every number, no score below all; and the
best S of each row of them.

Legend: BM rows, S selected blocks per row, SLOTS the power of two from S on, BN blocks of a tile.
"""

import triton
import triton.language as tl

# No candidate, then NaN, then -inf (-2139095041) and all numbers.
EMPTY = tl.constexpr(-(2**31))
NAN = tl.constexpr(-(2**31) + 1)
# Of what is taken whatever its score: above +inf, and below the keys of slots that are not used.
ALWAYS = tl.constexpr(2**31 - 2)


@triton.jit
def ordered(score):
    """int32 that sorts as the float32 scores do."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(score != score, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def score_of(sort_key):
    """The float32 score of which this is the key: :func:`ordered` is its own inverse but for NaN's bits and -0.0."""
    return (sort_key ^ ((sort_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def nothing_kept(S: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr):
    """The best of BM rows before any block was seen [BM, SLOTS]: slots beyond S hold keys above all others and are
    never replaced."""
    o_s = tl.arange(0, SLOTS)  # [SLOTS]
    lowest = (tl.full([SLOTS], EMPTY, tl.int64) << 32) + o_s  # [SLOTS]
    highest = tl.full([SLOTS], 0x7FFFFFFF, tl.int64) << 32  # [SLOTS]
    return tl.where(o_s < S, lowest, highest + o_s)[None, :] + tl.zeros([BM, 1], tl.int64)  # [BM, SLOTS]


@triton.jit
def keep_best(kept, worst, sort_key, newest, BN: tl.constexpr):
    """kept [BM, SLOTS] and its least key of each row [BM], with the better ones of sort_key [BM, BN] in it; these are
    of the blocks ``newest``, ``newest - 1``, ..."""
    o_n = tl.arange(0, BN)  # [BN]
    best = tl.max(sort_key, 1)  # [BM]
    better = best > (worst >> 32).to(tl.int32)  # [BM]
    while tl.max(better.to(tl.int32), 0) > 0:
        column = tl.min(tl.where(sort_key == best[:, None], o_n[None, :], BN), 1)  # [BM]
        key = (best.to(tl.int64) << 32) + (newest - column)  # [BM]
        kept = tl.where((kept == worst[:, None]) & better[:, None], key[:, None], kept)
        worst = tl.min(kept, 1)
        sort_key = tl.where(o_n[None, :] == column[:, None], EMPTY, sort_key)
        best = tl.max(sort_key, 1)
        better = best > (worst >> 32).to(tl.int32)
    return kept, worst


@triton.jit
def store_best(block_indices, kept, o_m, m_m, i_h, H: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr):
    """Writes block_indices [N, H, S] of some rows o_m and one head from what was kept."""
    kept = tl.sort(kept, dim=1, descending=True)
    block = tl.where((kept >> 32) == EMPTY, -1, (kept & 0xFFFFFFFF).to(tl.int32))  # [BM, SLOTS]
    # The keys of the unused slots sort in front.
    o_out = tl.arange(0, SLOTS) - (SLOTS - S)  # [SLOTS]
    p_indices = block_indices + (o_m.to(tl.int64)[:, None] * H + i_h) * S + o_out[None, :]  # [BM, SLOTS]
    tl.store(p_indices, block, mask=m_m[:, None] & (o_out >= 0)[None, :])
