"""Selection by other gates than MoBA's own: shared by the heads of a group, by the best key of a block, or with blocks
that are always taken.

Legend: N query rows, Hq query heads, Hkv key/value heads, D head dim, n blocks, B block size, S = top_k - 1; M heads
that choose together, 1 or Hq // Hkv, and MP the power of two from M on.

Where heads choose together, or by keys, one kernel scores and another chooses, some rows after the other, so that
scores take bounded memory. A tile of scores has all M heads of a few rows: one matrix product, and a reduction within
the tile that joins them. Otherwise one kernel does both, as in :mod:`.select`.
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

# Of scores at a time.
SCORE_BYTES = 1 << 28


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


@triton.jit(do_not_specialize=["n_rows", "n_keys", "n_blocks"])
def _score_kernel(
    q, keys, start, first, current_block, sort_keys,
    n_rows, n_keys, n_blocks, s_qt, s_qh, s_kr, s_kh,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SUM: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [N, H, n] of the scores of candidates. B = 0: keys [n, Hkv, D] are means, of which a program takes all;
    otherwise [R, Hkv, D], with block j at rows start[j] to start[j] + B, and a program takes BN blocks."""
    # Late rows have the most candidates: they start first, so that the last programs to run are short.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < n_rows  # [BM]
    oldest = tl.maximum(tl.min(tl.load(first + o_m, mask=m_m, other=2147483647), 0), 0)
    newest = tl.max(tl.load(current_block + o_m, mask=m_m, other=-1), 0) - 1
    o_r = tl.arange(0, BM * MP)  # [BM * MP]
    o_n = tl.arange(0, BN)  # [BN]
    o_d = tl.arange(0, BD)  # [BD]
    o_t = i_m * BM + o_r // MP  # [BM * MP]
    m_member = o_r % MP < M  # [BM * MP]
    o_h = i_h * M + o_r % MP  # [BM * MP]
    p_q = q + o_t.to(tl.int64)[:, None] * s_qt + o_h.to(tl.int64)[:, None] * s_qh + o_d[None, :]  # [BM * MP, BD]
    m_q = ((o_t < n_rows) & m_member)[:, None] & (o_d < D)[None, :]  # [BM * MP, BD]
    p_keys = keys + (i_h * M // G).to(tl.int64) * s_kh + o_d[:, None]  # [BD, 1]
    p_out = sort_keys + (o_m.to(tl.int64) * H + i_h)[:, None] * n_blocks  # [BM, 1]
    if B == 0:
        b_q = tl.load(p_q, mask=m_q, other=0.0)  # [BM * MP, BD]
        for begin_n in tl.range(oldest // BN * BN, newest + 1, BN, num_stages=STAGES):
            o_b = begin_n + o_n  # [BN]
            m_tile = (o_b < n_blocks)[None, :] & (o_d < D)[:, None]  # [BD, BN]
            b_keys = tl.load(p_keys + o_b.to(tl.int64)[None, :] * s_kr, mask=m_tile, other=0.0)  # [BD, BN]
            sort_key = ordered(tl.dot(b_q, b_keys, input_precision=PRECISION))  # [BM * MP, BN]
            sort_key = _joined(sort_key, m_member, SUM, BM, MP, BN)  # [BM, BN]
            tl.store(p_out + o_b[None, :], sort_key, mask=m_m[:, None] & (o_b < n_blocks)[None, :])
    else:
        begin_n = tl.program_id(2) * BN
        if (begin_n <= newest) & (begin_n + BN > oldest):
            b_q = tl.load(p_q, mask=m_q, other=0.0)  # [BM * MP, BD]
            sort_key = tl.full([BM * MP, BN], EMPTY, tl.int32)  # [BM * MP, BN]
            CHUNKS: tl.constexpr = (B + BK - 1) // BK
            for i in range(0, BN * CHUNKS):
                column = i // CHUNKS
                begin = tl.load(start + tl.minimum(begin_n + column, n_blocks - 1))
                o_k = i % CHUNKS * BK + tl.arange(0, BK)  # [BK]
                # A block that is nobody's candidate may be shorter than B, and the storage end there.
                m_tile = ((o_k < B) & (begin + o_k < n_keys))[None, :] & (o_d < D)[:, None]  # [BD, BK]
                b_keys = tl.load(p_keys + (begin + o_k)[None, :] * s_kr, mask=m_tile, other=0.0)  # [BD, BK]
                of_keys = tl.dot(b_q, b_keys, input_precision=PRECISION)  # [BM * MP, BK]
                if B % BK != 0:
                    of_keys = tl.where((o_k < B)[None, :], of_keys, float("nan"))
                # A maximum takes no notice of NaN, where it has anything else.
                best = tl.maximum(sort_key, ordered(tl.max(of_keys, 1))[:, None])  # [BM * MP, BN]
                sort_key = tl.where(o_n[None, :] == column, best, sort_key)
            sort_key = _joined(sort_key, m_member, SUM, BM, MP, BN)  # [BM, BN]
            o_b = begin_n + o_n  # [BN]
            tl.store(p_out + o_b[None, :], sort_key, mask=m_m[:, None] & (o_b < n_blocks)[None, :])


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _choose_kernel(
    q, means, sort_keys, first, current_block, block_indices,
    n_rows, n_blocks, s_qt, s_qh, s_mb, s_mh,
    H: tl.constexpr, G: tl.constexpr, SCORED: tl.constexpr, MIN_RECENT: tl.constexpr, SINK: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best blocks by sort_keys [N, H, n] if they are SCORED, otherwise by scores of q and means, of each of H heads
    for itself."""
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)  # [BM]
    o_n = tl.arange(0, BN)  # [BN]
    o_d = tl.arange(0, BD)  # [BD]
    m_m = o_m < n_rows  # [BM]
    b_first = tl.load(first + o_m, mask=m_m, other=2147483647)  # [BM]
    b_current = tl.load(current_block + o_m, mask=m_m, other=-1)  # [BM]
    oldest = tl.maximum(tl.min(b_first, 0), 0)
    newest = tl.max(b_current, 0) - 1
    if not SCORED:
        p_q = q + o_m.to(tl.int64)[:, None] * s_qt + i_h.to(tl.int64) * s_qh + o_d[None, :]  # [BM, BD]
        b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)  # [BM, BD]
    p_means = means + (i_h // G).to(tl.int64) * s_mh + o_d[:, None]  # [BD, 1]
    p_scored = sort_keys + (o_m.to(tl.int64) * H + i_h)[:, None] * n_blocks  # [BM, 1]

    kept = nothing_kept(S, SLOTS, BM)  # [BM, SLOTS]
    worst = tl.min(kept, 1)  # [BM]
    for behind in range(0, newest - oldest + 1, BN):
        o_b = newest - behind - o_n  # [BN]
        candidate = (o_b[None, :] >= b_first[:, None]) & (o_b[None, :] < b_current[:, None])  # [BM, BN]
        if SCORED:
            sort_key = tl.load(p_scored + o_b[None, :], mask=candidate, other=EMPTY)  # [BM, BN]
        else:
            p_tile = p_means + o_b.to(tl.int64)[None, :] * s_mb  # [BD, BN]
            b_mean = tl.load(p_tile, mask=(o_b >= oldest)[None, :] & (o_d < D)[:, None], other=0.0)  # [BD, BN]
            sort_key = ordered(tl.dot(b_q, b_mean, input_precision=PRECISION))  # [BM, BN]
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
    first, current_block = first.contiguous(), current_block.contiguous()
    start = first if start is None else start.contiguous()
    n_blocks = start.numel() if block_size else keys.shape[0]
    # As in select.py: no tile follows N.
    members = next_power_of_2(together)
    score_tile, (bm, bn, warps) = tuned.score_tile(q.dtype, members, block_size, dim), tuned.select_tile(dim, q.dtype)
    scored = together > 1 or block_size > 0
    # Tiles of means on their way at a time: two with the queries' are more than every GPU's shared memory holds.
    stages = 2 if tuned.is_hopper(q.device) else 1
    step = max(1, SCORE_BYTES // (4 * n_selections * n_blocks)) if scored else n_rows
    rows = min(step, n_rows) if scored else 0
    sort_keys = torch.empty(rows, n_selections, n_blocks, dtype=torch.int32, device=q.device)
    with on_device(q):
        for lo in range(0, n_rows, step):
            some = slice(lo, min(lo + step, n_rows))
            n_some, of_rows = some.stop - lo, dict(first=first[some], current_block=current_block[some])
            shared = dict(
                q=q[some], n_rows=n_some, n_blocks=n_blocks, s_qt=q.stride(0), s_qh=q.stride(1), H=n_selections,
                G=group, D=dim, BD=padded_dim(dim), PRECISION=dot_precision(q.dtype), sort_keys=sort_keys, **of_rows,
            )  # fmt: skip
            if scored:
                parts = cdiv(n_blocks, score_tile.bn) if block_size else 1
                _score_kernel[(cdiv(n_some, score_tile.bm), n_selections, parts)](
                    keys=keys, start=start, n_keys=keys.shape[0], s_kr=keys.stride(0), s_kh=keys.stride(1),
                    M=together, MP=members, SUM=shared_by_group == "sum", B=block_size, BK=score_tile.bk,
                    BM=score_tile.bm, BN=score_tile.bn, STAGES=stages, **shared, **launch_options(score_tile.warps),
                )  # fmt: skip
            _choose_kernel[(cdiv(n_some, bm), n_selections)](
                means=keys, block_indices=block_indices[some], s_mb=keys.stride(0), s_mh=keys.stride(1),
                SCORED=scored, MIN_RECENT=min_recent, SINK=sink, S=n_slots,
                SLOTS=max(2, next_power_of_2(n_slots)), BM=bm, BN=bn, **shared, **launch_options(warps),
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
