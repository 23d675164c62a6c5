"""Block means, scores and top-k in vectorised PyTorch, rounded alike however many rows or blocks are computed together.

Legend: N query rows, Hq query heads, Hkv key/value heads, D head dim, n blocks. Wide means float32, or float64 for
float64 inputs.
"""

import torch
from torch import Tensor

from ..dtypes import WIDE

# Elements of a temporary at most.
SCRATCH_ELEMENTS = 1 << 24
# Scores, or products that are summed to scores, at a time: on a CPU they stay in its cache.
CACHE_ELEMENTS = 1 << 18


def _sum_in_place(x: Tensor) -> Tensor:
    """Sum over dimension 0, pair by pair; ``x`` is overwritten.

    Additions are elementwise, in an order that follows from the length of that dimension alone. So the rounding of an
    element does not depend on what is summed beside it, as it does in a matrix product or in ``x.sum(0)``.
    """
    n = x.shape[0]
    while n > 1:
        half = n // 2
        x[:half] += x[n - half : n]
        n -= half
    return x[0]


def block_means(k: Tensor, start: Tensor, length: Tensor, block_size: int) -> Tensor:
    """Mean key of every block.

    Args:
        k: [R, Hkv, D].
        start: [n] int64, first row of each block.
        length: [n] int32, rows of each block; 0 for an entry that stands for no block.
        block_size: B, the largest length.

    Returns:
        [n, Hkv, D] in k's dtype, zero for entries of length 0.
    """
    n, (_, n_heads, dim) = start.numel(), k.shape
    means = k.new_zeros(n, n_heads, dim)
    if k.shape[0] == 0:
        return means
    # Where no block is complete, none is a candidate, and the order of the sums does not matter.
    width = max(1, min(block_size, int(length.max()))) if n else 1
    step = max(1, SCRATCH_ELEMENTS // (width * n_heads * dim))
    offset = torch.arange(width, device=k.device)[:, None]
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        inside = offset < length[lo:hi]
        rows = torch.where(inside, start[lo:hi] + offset, 0)
        keys = k[rows].double().masked_fill(~inside[..., None, None], 0)
        total = _sum_in_place(keys) / length[lo:hi].clamp(min=1)[:, None, None]
        means[lo:hi] = total.to(WIDE[k.dtype]).to(k.dtype)
    return means


def _ordered_bits(score: Tensor) -> Tensor:
    """int64 that sorts as ``score`` (float64) does, with -0.0 equal to 0.0 and NaN below every number."""
    bits = (score + 0.0).view(torch.int64)
    bits = bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)
    return torch.where(score.isnan(), torch.iinfo(torch.int64).min + 1, bits)


def _elements_at_once(x: Tensor) -> int:
    return SCRATCH_ELEMENTS if x.is_cuda else CACHE_ELEMENTS


def _scores(q: Tensor, means: Tensor) -> Tensor:
    """Scores [H, N, n], wide, of rows q [H, N, D] and block means [H, n, D].

    A score is the float64 sum of :func:`_sum_in_place`, rounded to the wide dtype: a function of its row and its mean
    alone. So equal means have equal scores, and scores are the same on any number of ranks.
    """
    rows, keys = q.double(), means.double()
    if q.dtype == torch.float64:
        score = rows.new_empty(*rows.shape[:2], keys.shape[1])
        step = max(1, _elements_at_once(q) // max(1, keys[0].numel()))
        for of_head, head_rows, head_keys in zip(score, rows, keys):
            for lo in range(0, rows.shape[1], step):
                some = head_rows[lo : lo + step].T[:, :, None]
                of_head[lo : lo + step] = _sum_in_place(some * head_keys.T[:, None, :])
        return score
    # The products are exact in float64. A sum of them in any order is off by at most D * 2 ** -53 times the norms:
    # where that cannot change what it is rounded to, the order does not matter.
    score = torch.matmul(rows, keys.transpose(1, 2))
    norms = rows.norm(dim=-1)[:, :, None] * (keys.norm(dim=-1) * (q.shape[2] * 2.0**-51))[:, None, :]
    wide = WIDE[q.dtype]
    unsure = ((score - norms).to(wide) != (score + norms).to(wide)) & score.isfinite()
    head, row, block = unsure.nonzero(as_tuple=True)
    step = max(1, SCRATCH_ELEMENTS // q.shape[2])
    for some in zip(*(x.split(step) for x in (head, row, block))):
        head, row, block = some
        score[some] = _sum_in_place((rows[head, row] * keys[head, block]).T.contiguous())
    return score.to(wide)


def select_blocks(q: Tensor, means: Tensor, first: Tensor, current_block: Tensor, top_k: int) -> Tensor:
    """The ``top_k - 1`` best blocks of every row and head.

    Args:
        q: [N, Hq, D].
        means: [n, Hkv, D].
        first, current_block: [N] int32; the candidates of row ``t`` are the blocks
            ``first[t] <= id < current_block[t]``.
        top_k: blocks per query, the current block included.

    Returns:
        [N, Hq, top_k - 1] int32, best first, -1 where there are fewer candidates. Equal scores: the higher id.
    """
    n_rows, n_heads, dim = q.shape
    n, n_kv, _ = means.shape
    block_indices = torch.full((n_rows, n_heads, top_k - 1), -1, dtype=torch.int32, device=q.device)
    n_take = min(top_k - 1, n)
    if n_take == 0:
        return block_indices
    keys = means.transpose(0, 1)
    block = torch.arange(n, device=q.device)
    never = torch.iinfo(torch.int64).min
    step = max(1, _elements_at_once(q) // (n_heads * n))
    for lo in range(0, n_rows, step):
        hi = min(lo + step, n_rows)
        rows = q[lo:hi].view(hi - lo, n_kv, n_heads // n_kv, dim).transpose(0, 1)
        score = _scores(rows.flatten(1, 2), keys).double()
        score = score.view(n_kv, hi - lo, -1, n).transpose(0, 1).flatten(1, 2)
        candidate = (block >= first[lo:hi, None]) & (block < current_block[lo:hi, None])
        rank = torch.where(candidate[:, None], _ordered_bits(score), never).flip(-1)
        rank, order = rank.sort(dim=-1, descending=True, stable=True)
        best = (n - 1 - order[..., :n_take]).int()
        block_indices[lo:hi, :, :n_take] = torch.where(rank[..., :n_take] == never, -1, best)
    return block_indices
