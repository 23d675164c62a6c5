"""Selection by other gates than MoBA's own: shared by the heads of a group, by the best key of a block, or with blocks
that are always taken.

Legend: N query rows, Hq query heads, Hkv key/value heads, D head dim, n blocks, B block size, S = top_k - 1; M heads
that choose together, 1 or Hq // Hkv, and MP the power of two from M on.

A program has all M heads of a few rows in one tile, so that one matrix product scores them and a reduction within the
tile joins their scores. By keys, the maximum over a block's keys is taken chunk by chunk: scores are stored nowhere.
The best blocks are kept as in :mod:`.select`.
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
from .sort_keys import ALWAYS, EMPTY, keep_best, nothing_kept, ordered, score_of, store_best


@triton.jit
def _joined(sort_key, m_member, SUM: tl.constexpr, BM: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr):
    """Keys [BM, BN] of the sums, or maxima, over the MP heads of each row: sort_key [BM * MP, BN]; those of heads that
    are none, m_member [BM * MP], do not count."""
    if MP == 1:
        return sort_key
    if SUM:
        score = tl.where(m_member[:, None], score_of(sort_key), 0.0)  # [BM * MP, BN]
        return ordered(tl.sum(tl.reshape(score, [BM, MP, BN]), 1))
    sort_key = tl.where(m_member[:, None], sort_key, EMPTY)
    return tl.max(tl.reshape(sort_key, [BM, MP, BN]), 1)


@triton.jit(do_not_specialize=["n_rows", "n_keys"])
def _gated_kernel(
    q, keys, start, first, current_block, block_indices,
    n_rows, n_keys, s_qt, s_qh, s_kr, s_kh,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SUM: tl.constexpr,
    MIN_RECENT: tl.constexpr, SINK: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """B = 0: keys [n, Hkv, D] are means; otherwise [R, Hkv, D], with block j at rows start[j] to start[j] + B."""
    # Late rows have the most candidates: they start first, so that the last programs to run are short.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)  # [BM]
    o_r = tl.arange(0, BM * MP)  # [BM * MP]
    o_n = tl.arange(0, BN)  # [BN]
    o_d = tl.arange(0, BD)  # [BD]
    m_m = o_m < n_rows  # [BM]
    b_first = tl.load(first + o_m, mask=m_m, other=2147483647)  # [BM]
    b_current = tl.load(current_block + o_m, mask=m_m, other=-1)  # [BM]
    oldest = tl.maximum(tl.min(b_first, 0), 0)
    newest = tl.max(b_current, 0) - 1

    o_t = i_m * BM + o_r // MP  # [BM * MP]
    m_member = o_r % MP < M  # [BM * MP]
    o_h = i_h * M + o_r % MP  # [BM * MP]
    p_q = q + o_t.to(tl.int64)[:, None] * s_qt + o_h.to(tl.int64)[:, None] * s_qh + o_d[None, :]  # [BM * MP, BD]
    m_q = ((o_t < n_rows) & m_member)[:, None] & (o_d < D)[None, :]  # [BM * MP, BD]
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [BM * MP, BD]
    p_keys = keys + (i_h * M // G).to(tl.int64) * s_kh + o_d[:, None]  # [BD, 1]

    kept = nothing_kept(S, SLOTS, BM)  # [BM, SLOTS]
    worst = tl.min(kept, 1)  # [BM]
    for behind in range(0, newest - oldest + 1, BN):
        o_b = newest - behind - o_n  # [BN]
        if B == 0:
            p_tile = p_keys + o_b.to(tl.int64)[None, :] * s_kr  # [BD, BN]
            b_keys = tl.load(p_tile, mask=(o_b >= oldest)[None, :] & (o_d < D)[:, None], other=0.0)  # [BD, BN]
            of_heads = ordered(tl.dot(b_q, b_keys, input_precision=PRECISION))  # [BM * MP, BN]
            sort_key = _joined(of_heads, m_member, SUM, BM, MP, BN)  # [BM, BN]
        else:
            sort_key = tl.full([BM, BN], EMPTY, tl.int32)  # [BM, BN]
            for column in range(0, tl.minimum(BN, newest - behind - oldest + 1)):
                begin = tl.load(start + newest - behind - column)
                best = tl.full([BM * MP, BK], EMPTY, tl.int32)  # [BM * MP, BK]
                for i_k in range(0, B, BK):
                    o_k = i_k + tl.arange(0, BK)  # [BK]
                    p_tile = p_keys + (begin + o_k)[None, :] * s_kr  # [BD, BK]
                    m_k = o_k < B  # [BK]
                    # A block that is nobody's candidate may be shorter than B, and the storage end there.
                    m_tile = (m_k & (begin + o_k < n_keys))[None, :] & (o_d < D)[:, None]  # [BD, BK]
                    b_keys = tl.load(p_tile, mask=m_tile, other=0.0)  # [BD, BK]
                    of_keys = ordered(tl.dot(b_q, b_keys, input_precision=PRECISION))  # [BM * MP, BK]
                    best = tl.maximum(best, tl.where(m_k[None, :], of_keys, EMPTY))
                of_heads = tl.max(best, 1)[:, None]  # [BM * MP, 1]
                of_block = _joined(of_heads, m_member, SUM, BM, MP, 1)  # [BM, 1]
                sort_key = tl.where(o_n[None, :] == column, of_block, sort_key)
        candidate = (o_b[None, :] >= b_first[:, None]) & (o_b[None, :] < b_current[:, None])  # [BM, BN]
        if MIN_RECENT > 0:
            sort_key = tl.where(o_b[None, :] >= b_current[:, None] - MIN_RECENT, ALWAYS, sort_key)
        if SINK:
            sort_key = tl.where(o_b[None, :] == b_first[:, None], ALWAYS, sort_key)
        sort_key = tl.where(candidate, sort_key, EMPTY)
        kept, worst = keep_best(kept, worst, sort_key, newest - behind, BN)

    store_best(block_indices, kept, o_m, m_m, i_h, H, S, SLOTS)


def select_gated(
    q: Tensor,
    keys: Tensor,
    start: Tensor | None,
    first: Tensor,
    current_block: Tensor,
    block_size: int,
    top_k: int,
    shared_by_group: str,
    min_recent: int,
    sink: bool,
) -> Tensor:
    """:func:`.select.select_blocks` with ``keys`` as means and ``block_size`` 0, or :func:`select_by_keys`."""
    n_rows, n_heads, dim = q.shape
    check_head_dim(dim)
    n_slots, group = top_k - 1, n_heads // keys.shape[1]
    together = 1 if shared_by_group == "none" else group
    n_selections = n_heads // together
    if n_slots == 0 or n_rows == 0 or keys.shape[0] == 0:
        return torch.full((n_rows, n_selections, n_slots), -1, dtype=torch.int32, device=q.device)
    q, keys = check_unit_stride(q), check_unit_stride(keys)
    block_indices = torch.empty(n_rows, n_selections, n_slots, dtype=torch.int32, device=q.device)
    # As in select.py: nothing follows N.
    members = next_power_of_2(together)
    bm, bn, bk, warps = tuned.gated_tile(dim, q.dtype, members, block_size)
    with on_device(q):
        _gated_kernel[(cdiv(n_rows, bm), n_selections)](
            q=q, keys=keys, start=first if start is None else start.contiguous(), first=first.contiguous(),
            current_block=current_block.contiguous(), block_indices=block_indices, n_rows=n_rows,
            n_keys=keys.shape[0], s_qt=q.stride(0), s_qh=q.stride(1), s_kr=keys.stride(0), s_kh=keys.stride(1),
            H=n_selections, G=group, M=together, MP=members, SUM=shared_by_group == "sum",
            MIN_RECENT=min_recent, SINK=sink, B=block_size, BK=bk,
            D=dim, BD=padded_dim(dim), S=n_slots, SLOTS=max(2, next_power_of_2(n_slots)),
            BM=bm, BN=bn, PRECISION=dot_precision(q.dtype), **launch_options(warps),
        )  # fmt: skip
    return block_indices


def select_by_keys(
    q: Tensor,
    k: Tensor,
    start: Tensor,
    first: Tensor,
    current_block: Tensor,
    block_size: int,
    top_k: int,
    shared_by_group: str = "none",
    min_recent: int = 0,
    sink: bool = False,
) -> Tensor:
    """See :func:`moba_cp.eager.select_by_keys`; q is float32, bfloat16 or float16, and k has its dtype.

    A row's result does not depend on the other rows.
    """
    gate = shared_by_group, min_recent, sink
    return select_gated(q, k, start, first, current_block, block_size, top_k, *gate)
