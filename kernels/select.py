"""Scores and top-k in one pass: which blocks each query visits besides its current block.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, n blocks, S = top_k - 1.

A program holds a tile of rows and streams the block means from the newest candidate to the oldest. Scores become
integers (see :mod:`.sort_keys`). The best S of a row live in registers as 64-bit keys, score above block id, in no
order. While any row of the tile has a score above its S-th best, every row's best new score replaces its worst kept
one; on long sequences most tiles need few such passes. Newest first and a strict comparison make the newer block win a
tie.

Where :func:`.hopper.selects` is true, :mod:`.hopper.select` serves instead, with the same result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hopper, tuned
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
from .select_gated import select_gated
from .sort_keys import EMPTY, keep_best, nothing_kept, ordered, store_best


@triton.jit(do_not_specialize=["n_rows"])
def _select_kernel(
    q, means, first, current_block, block_indices,
    n_rows, s_qt, s_qh, s_mb, s_mh,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    S: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Late rows have the most candidates: they start first, so that the last programs to run are short.
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

    p_q = q + o_m.to(tl.int64)[:, None] * s_qt + i_h.to(tl.int64) * s_qh + o_d[None, :]  # [BM, BD]
    b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)  # [BM, BD]
    p_means = means + (i_h // G).to(tl.int64) * s_mh + o_d[:, None]  # [BD, 1]

    kept = nothing_kept(S, SLOTS, BM)  # [BM, SLOTS]
    worst = tl.min(kept, 1)  # [BM]
    for behind in range(0, newest - oldest + 1, BN):
        o_b = newest - behind - o_n  # [BN]
        p_tile = p_means + o_b.to(tl.int64)[None, :] * s_mb  # [BD, BN]
        b_mean = tl.load(p_tile, mask=(o_b >= oldest)[None, :] & (o_d < D)[:, None], other=0.0)  # [BD, BN]
        sort_key = ordered(tl.dot(b_q, b_mean, input_precision=PRECISION))  # [BM, BN]
        candidate = (o_b[None, :] >= b_first[:, None]) & (o_b[None, :] < b_current[:, None])  # [BM, BN]
        sort_key = tl.where(candidate, sort_key, EMPTY)
        kept, worst = keep_best(kept, worst, sort_key, newest - behind, BN)

    store_best(block_indices, kept, o_m, m_m, i_h, HQ, S, SLOTS)


def select_blocks(
    q: Tensor,
    means: Tensor,
    first: Tensor,
    current_block: Tensor,
    top_k: int,
    shared_by_group: str = "none",
    min_recent: int = 0,
    sink: bool = False,
) -> Tensor:
    """See :func:`moba_cp.eager.select_blocks`; q is float32, bfloat16 or float16, and means have its dtype.

    A row's result does not depend on the other rows.
    """
    if shared_by_group != "none" or min_recent or sink:
        gate = shared_by_group, min_recent, sink
        return select_gated(q, means, None, first, current_block, 0, top_k, *gate)
    n_rows, n_heads, dim = q.shape
    check_head_dim(dim)
    n_slots = top_k - 1
    if n_slots == 0 or n_rows == 0 or means.shape[0] == 0:
        return torch.full((n_rows, n_heads, n_slots), -1, dtype=torch.int32, device=q.device)
    q, means = check_unit_stride(q), check_unit_stride(means)
    block_indices = torch.empty(n_rows, n_heads, n_slots, dtype=torch.int32, device=q.device)
    first, current_block = first.contiguous(), current_block.contiguous()
    if hopper.selects(q, n_slots):
        with on_device(q):
            hopper.launch_select(q, means, first, current_block, block_indices)
        return block_indices
    # Kernel and tile must not follow N: a score is then summed in the same order on any number of ranks.
    bm, bn, warps = tuned.select_tile(dim, q.dtype)
    with on_device(q):
        _select_kernel[(cdiv(n_rows, bm), n_heads)](
            q=q, means=means, first=first, current_block=current_block, block_indices=block_indices, n_rows=n_rows,
            s_qt=q.stride(0), s_qh=q.stride(1), s_mb=means.stride(0), s_mh=means.stride(1),
            HQ=n_heads, G=n_heads // means.shape[1], D=dim, BD=padded_dim(dim),
            S=n_slots, SLOTS=max(2, next_power_of_2(n_slots)), BM=bm, BN=bn,
            PRECISION=dot_precision(q.dtype), **launch_options(warps),
        )  # fmt: skip
    return block_indices
