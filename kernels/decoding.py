"""Selection and attention of few query rows with many keys behind them, as when tokens are generated one by one.

Elsewhere a program has a tile of rows, and few rows would leave most of a GPU idle. Here the blocks of a row, and the
keys of a block, are spread over programs, and there is no routing: each program attends to one piece of one block for
one row of one head. Products are sums of float32 in the order of D, without matrix instructions: the work is bound by
memory.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, n blocks, S selected blocks per
row, S' = S + 1. A pair is one row of one head, and has its number in [N, Hq].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LN2,
    LOG2E,
    SLICED,
    cdiv,
    check_head_dim,
    check_unit_stride,
    launch_options,
    next_power_of_2,
    on_device,
    padded_dim,
)
from .sort_keys import EMPTY, ordered

# Blocks that a program scores; no fewer than a row may select.
SCORED = 64
# Keys of a block that a program attends to.
PIECE = 128


@triton.jit(do_not_specialize=["n_tiles"])
def _best_of_tile_kernel(
    q, means, first, current_block, scored, sort_keys, n_tiles, s_qt, s_qh, s_mb, s_mh,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The S best of BN candidates of a pair, as numbers that sort by score and then by block; all are different.

    Numbers are compared as ``scored`` holds them, [pairs, tiles, BN]: rows and columns of a comparison have different
    layouts, for which the compiler may sum a score twice, and round it in two ways.
    """
    i_pair, i_n = tl.program_id(0), tl.program_id(1)
    t, head = (i_pair // HQ).to(tl.int64), i_pair % HQ
    o_d = tl.arange(0, BD)  # [BD]
    b_q = tl.load(q + t * s_qt + head * s_qh + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BD]
    o_b = tl.load(first + t) + i_n * BN + tl.arange(0, BN)  # [BN]
    candidate = o_b < tl.load(current_block + t)  # [BN]
    p_mean = means + o_b.to(tl.int64)[:, None] * s_mb + (head // G) * s_mh + o_d[None, :]  # [BN, BD]
    b_mean = tl.load(p_mean, mask=candidate[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)  # [BN, BD]
    score = tl.sum(b_mean * b_q[None, :], 1)  # [BN]
    i_tile = i_pair.to(tl.int64) * n_tiles + i_n
    p_scored = scored + i_tile * BN + tl.arange(0, BN)  # [BN]
    tl.store(p_scored, (tl.where(candidate, ordered(score), EMPTY).to(tl.int64) << 32) + o_b)
    tl.debug_barrier()
    key = tl.load(p_scored, cache_modifier=".cg")  # [BN]
    place = tl.sum((key[None, :] > key[:, None]).to(tl.int32), 1)  # [BN]
    tl.store(sort_keys + i_tile * S + place, key, mask=place < S)


@triton.jit(do_not_specialize=["n_keys"])
def _best_of_all_kernel(sort_keys, block_indices, n_keys, S: tl.constexpr, BM: tl.constexpr):
    """Of the numbers of one pair, the places of BM among all of them."""
    i_pair, i_m = tl.program_id(0), tl.program_id(1)
    p_keys = sort_keys + i_pair.to(tl.int64) * n_keys
    o_m = i_m * BM + tl.arange(0, BM)  # [BM]
    lowest = -(2**63)
    b_key = tl.load(p_keys + o_m, mask=o_m < n_keys, other=lowest)  # [BM]
    place = tl.zeros([BM], tl.int32)  # [BM]
    for n in range(0, n_keys, BM):
        o_n = n + tl.arange(0, BM)  # [BM]
        b_other = tl.load(p_keys + o_n, mask=o_n < n_keys, other=lowest)  # [BM]
        place += tl.sum((b_other[None, :] > b_key[:, None]).to(tl.int32), 1)
    block = tl.where((b_key >> 32) == EMPTY, -1, (b_key & 0xFFFFFFFF).to(tl.int32))  # [BM]
    tl.store(block_indices + i_pair.to(tl.int64) * S + place, block, mask=(o_m < n_keys) & (place < S))


@triton.jit(do_not_specialize=["n_pieces", "s_row"], do_not_specialize_on_alignment=SLICED)
def _piece_kernel(
    q, k, v, block_indices, current_block, visible, page_row, page_head, length, part, part_lse,
    scale_log2, n_pieces, s_qt, s_qh, s_kr, s_kh, s_vr, s_vh, s_row, s_head, s_head_n,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    S: tl.constexpr, SLOTS: tl.constexpr, PIECE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attention of one pair to PIECE keys of the block in one of its slots, the last of which is the current block."""
    i_pair, slot, i_piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t, head = (i_pair // HQ).to(tl.int64), i_pair % HQ
    i_h = head // G
    if slot < S:
        block = tl.load(block_indices + i_pair.to(tl.int64) * S + slot)
    else:
        block = tl.load(current_block + t)
    at = tl.maximum(block, 0)
    row = tl.load(page_row + i_h * s_row + at)
    limit = tl.load(length + at)
    if slot == S:
        limit = tl.minimum(limit, tl.load(visible + t))
    limit = tl.where((block >= 0) & (row >= 0), limit, 0)
    page = tl.load(page_head + i_h * s_head + at * s_head_n).to(tl.int64)
    o_part = (i_pair.to(tl.int64) * SLOTS + slot) * n_pieces + i_piece
    begin = i_piece * PIECE
    if begin >= limit:
        tl.store(part_lse + o_part, float("-inf"))
        return
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < D  # [BD]
    b_q = tl.load(q + t * s_qt + head * s_qh + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    p_k = k + page * s_kh + o_d[None, :]  # [1, BD]
    p_v = v + page * s_vh + o_d[None, :]  # [1, BD]
    b_o = tl.zeros([BD], tl.float32)  # [BD]
    b_max = float("-inf")
    b_sum = 0.0
    for n in range(begin, tl.minimum(begin + PIECE, limit), BN):
        o_n = n + tl.arange(0, BN)  # [BN]
        m = (o_n < limit)[:, None] & m_d[None, :]  # [BN, BD]
        key = (row + o_n)[:, None]  # [BN, 1]
        b_k = tl.load(p_k + key * s_kr, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
        b_v = tl.load(p_v + key * s_vr, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
        b_s = tl.sum(b_k * b_q[None, :], 1) * scale_log2  # [BN]
        b_s = tl.where(o_n < limit, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 0))
        # While all scores are -inf, -inf - -inf would be NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_shift)  # [BN]
        b_old = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_old + tl.sum(b_p, 0)
        b_o = b_o * b_old + tl.sum(b_p[:, None] * b_v, 0)
        b_max = b_new
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    tl.store(part_lse + o_part, (b_shift + tl.log2(b_sum)) * LN2)
    tl.store(part + o_part * D + o_d, b_o / tl.where(b_sum == 0.0, 1.0, b_sum), mask=m_d)


@triton.jit(do_not_specialize=["n_parts"])
def _merge_pieces_kernel(part, part_lse, out, lse, n_parts, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """Merges what one pair got from its pieces."""
    i_pair = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)  # [BD]
    b_o = tl.zeros([BD], tl.float32)  # [BD]
    b_max = float("-inf")
    b_sum = 0.0
    for n in range(0, n_parts, BM):
        o_m = n + tl.arange(0, BM)  # [BM]
        b_lse = tl.load(part_lse + i_pair * n_parts + o_m, mask=o_m < n_parts, other=float("-inf")) * LOG2E  # [BM]
        # What saw no key was never written.
        m_o = (b_lse != float("-inf"))[:, None] & (o_d < D)[None, :]  # [BM, BD]
        b_part = tl.load(part + (i_pair * n_parts + o_m)[:, None] * D + o_d[None, :], mask=m_o, other=0.0)  # [BM, BD]
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp2(b_lse - b_shift)  # [BM]
        b_old = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_old + tl.sum(b_weight, 0)
        b_o = b_o * b_old + tl.sum(b_weight[:, None] * b_part, 0)
        b_max = b_new
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    tl.store(lse + i_pair, (b_shift + tl.log2(b_sum)) * LN2)
    b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)
    tl.store(out + i_pair * D + o_d, b_o.to(out.dtype.element_ty), mask=o_d < D)


def select_few(
    q: Tensor, means: Tensor, first: Tensor, current_block: Tensor, top_k: int, most: int | None = None
) -> Tensor:
    """See :func:`moba_cp.eager.select_few`; q is float32, bfloat16 or float16, and means have its dtype."""
    n_rows, n_heads, dim = q.shape
    check_head_dim(dim)
    n_slots, most = top_k - 1, means.shape[0] if most is None else most
    if n_slots == 0 or n_rows == 0 or most == 0:
        return torch.full((n_rows, n_heads, n_slots), -1, dtype=torch.int32, device=q.device)
    q, means = check_unit_stride(q), check_unit_stride(means)
    pairs, n_tiles = n_rows * n_heads, cdiv(most, SCORED)
    scored = torch.empty(pairs, n_tiles * SCORED, dtype=torch.int64, device=q.device)
    sort_keys = torch.empty(pairs, n_tiles * n_slots, dtype=torch.int64, device=q.device)
    block_indices = torch.empty(n_rows, n_heads, n_slots, dtype=torch.int32, device=q.device)
    with on_device(q):
        _best_of_tile_kernel[(pairs, n_tiles)](
            q=q, means=means, first=first, current_block=current_block, scored=scored, sort_keys=sort_keys,
            n_tiles=n_tiles, s_qt=q.stride(0), s_qh=q.stride(1), s_mb=means.stride(0), s_mh=means.stride(1),
            HQ=n_heads, G=n_heads // means.shape[1], D=dim, BD=padded_dim(dim), S=n_slots, BN=SCORED,
            # Each lane of a warp adds up the same products. If it did not round its own, scores would differ between
            # lanes, and two candidates might take the same place.
            **launch_options(4, fused=False),
        )  # fmt: skip
        n_keys = n_tiles * n_slots
        _best_of_all_kernel[(pairs, cdiv(n_keys, 64))](
            sort_keys=sort_keys, block_indices=block_indices, n_keys=n_keys, S=n_slots, BM=64, **launch_options(4)
        )
    return block_indices


def attend_few(
    q: Tensor, pages, block_indices: Tensor, current_block: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`moba_cp.eager.attend_few`; q is float32, bfloat16 or float16, and lse is float32."""
    n_rows, n_heads, dim = q.shape
    check_head_dim(dim)
    q, k, v, row = (check_unit_stride(x) for x in (q, pages.k, pages.v, pages.row))
    out = torch.empty(n_rows, n_heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(n_rows, n_heads, dtype=torch.float32, device=q.device)
    pairs, n_slots, n_pieces = n_rows * n_heads, block_indices.shape[2] + 1, cdiv(pages.block_size, PIECE)
    if pairs == 0:
        return out, lse
    n_parts, block = n_slots * n_pieces, padded_dim(dim)
    part = torch.empty(pairs, n_parts, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(pairs, n_parts, dtype=torch.float32, device=q.device)
    with on_device(q):
        _piece_kernel[(pairs, n_slots, n_pieces)](
            q=q, k=k, v=v, block_indices=block_indices.contiguous(), current_block=current_block, visible=visible,
            page_row=row, page_head=pages.head, length=pages.length, part=part, part_lse=part_lse,
            scale_log2=scale * LOG2E.value, n_pieces=n_pieces, s_qt=q.stride(0), s_qh=q.stride(1),
            s_kr=k.stride(0), s_kh=k.stride(1), s_vr=v.stride(0), s_vh=v.stride(1), s_row=row.stride(0),
            s_head=pages.head.stride(0), s_head_n=pages.head.stride(1), HQ=n_heads, G=n_heads // row.shape[0],
            D=dim, BD=block, S=n_slots - 1, SLOTS=n_slots, PIECE=PIECE, BN=max(16, min(PIECE, 8192 // block)),
            **launch_options(4),
        )  # fmt: skip
        _merge_pieces_kernel[(pairs,)](
            part=part, part_lse=part_lse, out=out, lse=lse, n_parts=n_parts, D=dim, BD=block,
            BM=min(64, next_power_of_2(n_parts)), **launch_options(4),
        )  # fmt: skip
    return out, lse
