"""What the scorer learns from: the KL divergence to what attention gives the blocks, and its gradient; of one KV head.

Rows come in slices, and their keys in tiles: nothing is as large as rows times keys.

Legend: L local tokens, R rows of a slice, G query heads of the KV head, D head dim, T tokens of the whole sequence,
n blocks, B block size, S selected blocks of a row; m, d and K as in :mod:`.choice`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .choice import Keys, block_scores, block_scores_backward, elements_at_once, row_slices
from .tables import IndexTables


class Attended(NamedTuple):
    """What attention did with the queries of one KV head."""

    q: Tensor
    """[L, G, D]."""
    k: Tensor
    """[T, D], the keys of the whole sequence."""
    lse: Tensor
    """[L, G] wide, over all that a row attends to."""
    scale: float
    """Of the scores."""


def index_loss(
    attended: Attended, queries: Tensor, weights: Tensor, keys: Keys, chosen: Tensor | None, dkeys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence summed over rows [] wide, and its gradients by the queries and their weights, like these and wide;
    that by the keys is added to ``dkeys`` [K, d] wide.

    A row counts the blocks in ``chosen``, or all its candidates; what attention gives them is made to sum to one. One
    to whose blocks it gives nothing counts nothing.

    Args:
        queries: [L, m, d]; weights: [L, m] wide.
        chosen: [L, S] int32, of :func:`.choice.select_blocks`; None for all candidates.
    """
    tables, total = keys.tables, weights.new_zeros(())
    dqueries, dweights = weights.new_zeros(queries.shape), torch.zeros_like(weights)
    for rows in row_slices(tables, queries):
        blocks = tables.candidates_of(rows)
        if blocks.start == blocks.stop:
            continue
        counted, masses = tables.is_candidate(rows, blocks), None
        if chosen is not None:
            ids = torch.where(chosen[rows] >= 0, chosen[rows] + tables.first[rows, None], -1)
            counted &= _marked(ids, blocks)
            # Of few blocks their keys are gathered for each row; of many all are looked at.
            if ids.shape[1] < blocks.stop - blocks.start:
                masses = _selected_masses(attended, tables, rows, ids, blocks)
        if masses is None:
            masses = block_masses(attended, tables, rows, blocks)
        scores = block_scores(queries[rows], weights[rows], keys, blocks, False)
        divergence, dscores = _divergence(scores, masses, counted)
        total += divergence
        dqueries[rows], dweights[rows] = block_scores_backward(
            queries[rows], weights[rows], keys, blocks, dscores, dkeys
        )
    return total, dqueries, dweights


def block_masses(attended: Attended, tables: IndexTables, rows: slice, blocks: slice) -> Tensor:
    """[R, n] wide: the softmax of the rows in each of the blocks, summed over the heads; right for complete ones."""
    q, lse = attended.q[rows].to(attended.lse.dtype) * attended.scale, attended.lse[rows]
    masses = lse.new_empty(q.shape[0], blocks.stop - blocks.start)
    step = max(1, elements_at_once(q) // (q.shape[0] * q.shape[1] * tables.block_size))
    for lo in range(blocks.start, blocks.stop, step):
        tile = slice(lo, min(lo + step, blocks.stop))
        keys = attended.k[tables.key_rows(tile, 0).flatten()].to(q.dtype)
        scores = (q.flatten(0, 1) @ keys.T).unflatten(0, q.shape[:2]).sub_(lse[..., None])
        # The keys of later tokens: their scores say nothing, and must not become infinite.
        weights = scores.clamp_(max=0).exp_().unflatten(2, (-1, tables.block_size))
        masses[:, lo - blocks.start : tile.stop - blocks.start] = weights.sum((1, 3))
    return masses


def _selected_masses(attended: Attended, tables: IndexTables, rows: slice, ids: Tensor, blocks: slice) -> Tensor:
    """:func:`block_masses` of the blocks ``ids`` [R, S] alone, -1 for none; 0 for others."""
    masses = attended.lse.new_zeros(ids.shape[0], blocks.stop - blocks.start + 1)
    q, lse, k = attended.q[rows], attended.lse[rows], attended.k
    offset = torch.arange(tables.block_size, device=q.device)
    step = max(1, elements_at_once(q) // max(1, ids.shape[1] * tables.block_size * q.shape[2]))
    for lo in range(0, ids.shape[0], step):
        some = slice(lo, lo + step)
        at = tables.start[ids[some].clamp(min=0)][..., None] + offset
        keys = k[at.flatten(1)].to(lse.dtype)
        scores = torch.bmm(q[some].to(lse.dtype) * attended.scale, keys.transpose(1, 2)) - lse[some, :, None]
        found = scores.clamp_(max=0).exp_().unflatten(2, (-1, tables.block_size)).sum((1, 3))
        # The last column takes what is none.
        column = torch.where(ids[some] >= 0, ids[some] - blocks.start, masses.shape[1] - 1)
        masses[some].scatter_(1, column, found)
    return masses[:, :-1]


def _marked(ids: Tensor, blocks: slice) -> Tensor:
    """[R, n] bool, the blocks that are among a row's ``ids`` [R, S]."""
    n = blocks.stop - blocks.start
    marks = torch.zeros(ids.shape[0], n + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, torch.where(ids >= 0, ids - blocks.start, n), True)[:, :-1]


def _divergence(scores: Tensor, masses: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence summed over rows, and its gradient by the scores [R, n]; both count where ``counted``."""
    masses = masses.masked_fill(~counted, 0)
    sums = masses.sum(1, keepdim=True)
    # NaN stays: it is to be seen.
    nothing = sums == 0
    target = masses / sums.masked_fill(nothing, 1)
    scores = scores.masked_fill(~counted, -torch.inf).masked_fill(nothing, 0)
    logs = scores.log_softmax(1)
    # Where a block does not count, 0 times -inf is no number.
    terms = torch.xlogy(target, target) - (target * logs).masked_fill(~counted, 0)
    divergence = terms.masked_fill(nothing, 0).sum()
    return divergence, (logs.exp() - target).masked_fill(~counted | nothing, 0)
