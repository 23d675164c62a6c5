"""Block means, scores and top-k in vectorised PyTorch, rounded alike however many rows or blocks are computed together.

Legend: N query rows, Hq query heads, Hkv key/value heads, D head dim, n blocks. Wide means float32, or float64 for
float64 inputs.
"""

from collections.abc import Callable

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
    """The ``top_k - 1`` best blocks of every row and head, by their mean keys.

    Args:
        q: [N, Hq, D].
        means: [n, Hkv, D].
        first, current_block: [N] int32; the candidates of row ``t`` are the blocks
            ``first[t] <= id < current_block[t]``.
        top_k: blocks per query, the current block included.
        shared_by_group: ``sum`` or ``max``: the heads of a group share the blocks with the highest sum, or maximum, of
            their scores; ``none``: each has its own.
        min_recent: so many of the newest candidates are always taken.
        sink: the oldest candidate, the document's first block, is always taken.

    Returns:
        [N, G, top_k - 1] int32, best first, -1 where there are fewer candidates; G is Hq, or Hkv where heads share.
        Equal scores: the higher id. What is always taken comes first, the newest in front.
    """
    n, n_kv, _ = means.shape
    keys = means.transpose(0, 1)

    def score(rows: Tensor, _current: Tensor) -> Tensor:
        return _scores(rows.flatten(1, 2), keys).view(*rows.shape[:3], n)

    step = max(1, _elements_at_once(q) // (q.shape[1] * max(1, n)))
    return _select(q, n_kv, n, score, step, first, current_block, top_k, shared_by_group, min_recent, sink)


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
    """:func:`select_blocks` where a block's score is the highest of the products of the row and the block's keys.

    Args:
        k: [R, Hkv, D].
        start: [n] int64, first row of each block in k; of candidates all ``block_size`` rows are there.
    """
    n, n_kv = start.numel(), k.shape[1]
    offset = torch.arange(block_size, device=k.device)
    at_once = _elements_at_once(q)
    step = max(1, at_once // (q.shape[1] * block_size))

    def score(rows: Tensor, current: Tensor) -> Tensor:
        until = int(current.max())
        found = torch.full((*rows.shape[:3], n), -torch.inf, dtype=WIDE[q.dtype], device=q.device)
        blocks = max(1, at_once // (rows[..., 0].numel() * block_size))
        for lo in range(0, until, blocks):
            hi = min(lo + blocks, until)
            # The last rows of a storage may be no whole block, and those of none are never candidates.
            at = (start[lo:hi, None] + offset).clamp(max=k.shape[0] - 1)
            keys = k[at.flatten()].transpose(0, 1)
            of_keys = _scores(rows.flatten(1, 2), keys).view(*rows.shape[:3], hi - lo, block_size)
            found[..., lo:hi] = _largest(of_keys, -1)
        return found

    return _select(q, n_kv, n, score, step, first, current_block, top_k, shared_by_group, min_recent, sink)


def _select(
    q: Tensor,
    n_kv: int,
    n: int,
    score: Callable[[Tensor, Tensor], Tensor],
    step: int,
    first: Tensor,
    current_block: Tensor,
    top_k: int,
    shared_by_group: str,
    min_recent: int,
    sink: bool,
) -> Tensor:
    """:func:`select_blocks` of ``step`` rows at a time; ``score`` gives scores [Hkv, rows, G, n], wide, of rows
    [Hkv, rows, G, D] and their current blocks [rows, 1], right for candidates."""
    n_rows, n_heads, _ = q.shape
    group = n_heads // n_kv
    n_groups = n_heads if shared_by_group == "none" else n_kv
    block_indices = torch.full((n_rows, n_groups, top_k - 1), -1, dtype=torch.int32, device=q.device)
    n_take = min(top_k - 1, n)
    if n_take == 0 or n_rows == 0:
        return block_indices
    block = torch.arange(n, device=q.device)
    never, always = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    for lo in range(0, n_rows, step):
        hi = min(lo + step, n_rows)
        oldest, current = first[lo:hi, None], current_block[lo:hi, None]
        rows = q[lo:hi].unflatten(1, (n_kv, group)).transpose(0, 1)
        scores = score(rows, current)
        if shared_by_group == "sum":
            total = scores[:, :, 0]
            for member in range(1, group):
                total = total + scores[:, :, member]
            scores = total[:, :, None]
        elif shared_by_group == "max":
            scores = _largest(scores, 2)[:, :, None]
        candidate = (block >= oldest) & (block < current)
        taken = candidate & (block >= current - min_recent)
        if sink:
            taken |= candidate & (block == oldest)
        by_row = _ordered_bits(scores.double()).transpose(0, 1).flatten(1, 2)
        rank = torch.where(candidate[:, None], torch.where(taken[:, None], always, by_row), never).flip(-1)
        rank, order = rank.sort(dim=-1, descending=True, stable=True)
        best = (n - 1 - order[..., :n_take]).int()
        block_indices[lo:hi, :, :n_take] = torch.where(rank[..., :n_take] == never, -1, best)
    return block_indices


def _largest(score: Tensor, dim: int) -> Tensor:
    """The maximum over a dimension; NaN only where all are NaN."""
    largest = score.masked_fill(score.isnan(), -torch.inf).amax(dim)
    return largest.masked_fill(score.isnan().all(dim), torch.nan)


def given_blocks(block_indices: Tensor, first: Tensor, current_block: Tensor) -> Tensor:
    """A selection from outside, as block ids that are safe to attend to.

    Args:
        block_indices: [N, G, S] int32, numbers of blocks within each row's document.
        first, current_block: [N] int32, as of :func:`select_blocks`.

    Returns:
        [N, G, S] int32 ids of candidates, each in its slot; -1 for what is none, and for a block that an earlier slot
        of the row names.
    """
    first, current_block = first[:, None, None], current_block[:, None, None]
    inside = (block_indices >= 0) & (block_indices < current_block - first)
    found = torch.where(inside, block_indices + first, -1)
    result = found.clone()
    for slot in range(1, found.shape[2]):
        again = (found[..., :slot] == found[..., slot : slot + 1]).any(-1)
        result[..., slot].masked_fill_(again, -1)
    return result
