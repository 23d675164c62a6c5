"""What an index branch learns from: the KL divergence to what attention gives the blocks, and its gradient.

Rows come in slices, and their keys in tiles: nothing is as large as rows times keys.

Legend: L local tokens, R rows of a slice, g KV heads, G query heads of each, D head dim, T tokens of the whole
sequence, n blocks, B block size, S selected blocks of a row; m, d and K as in :mod:`.index_choice`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import BlockTable
from .index_choice import Keys, block_scores, block_scores_backward, is_candidate, row_slices
from .masses import block_masses, selected_masses


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
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    queries: Tensor,
    weights: Tensor,
    keys: Tensor,
    table: BlockTable,
    by_mean: bool,
    chosen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The divergence summed over rows and KV heads [] wide, and its gradients by the queries, their weights and the
    keys, like these and wide.

    A row counts the blocks in ``chosen``, or all its candidates; what attention gives them is made to sum to one. One
    to whose blocks it gives nothing counts nothing.

    Args:
        q: [L, g * G, D]; k: [T, g, D]; lse: [L, g * G] wide: of attention, whose scores have the factor ``scale``.
        queries, weights, keys, table, by_mean: as of :func:`.index_choice.index_select`.
        chosen: [L, g, S] int32, what that returned; None for all candidates.
    """
    n_heads, group = queries.shape[1], q.shape[1] // queries.shape[1]
    total, dqueries, dweights = weights.new_zeros(()), weights.new_zeros(queries.shape), torch.zeros_like(weights)
    dkeys = weights.new_zeros(keys.shape)
    for head in range(n_heads):
        heads = slice(head * group, (head + 1) * group)
        total += _of_head(
            Attended(q[:, heads], k[:, head], lse[:, heads], scale),
            queries[:, head],
            weights[:, head],
            Keys(keys[:, head], table, by_mean),
            None if chosen is None else chosen[:, head],
            (dqueries[:, head], dweights[:, head], dkeys[:, head]),
        )
    return total, dqueries, dweights, dkeys


def _of_head(
    attended: Attended,
    queries: Tensor,
    weights: Tensor,
    keys: Keys,
    chosen: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The divergence of one KV head, whose gradients are written to ``grads``."""
    table, total, (dqueries, dweights, dkeys) = keys.table, weights.new_zeros(()), grads
    for rows, blocks in row_slices(table, queries):
        counted, masses = is_candidate(table, rows, blocks), None
        if chosen is not None:
            ids = torch.where(chosen[rows] >= 0, chosen[rows] + table.first[rows, None], -1).long()
            counted &= _marked(ids, blocks)
            # Of few blocks their keys are gathered for each row; of many all are looked at.
            if ids.shape[1] < blocks.stop - blocks.start:
                masses = _masses_of(attended, table, rows, ids, blocks)
        if masses is None:
            start, lse = table.start[blocks], attended.lse[rows]
            masses = block_masses(attended.q[rows], attended.k, lse, start, table.block_size, attended.scale)
        scores = block_scores(queries[rows], weights[rows], keys, blocks, False)
        divergence, dscores = _divergence(scores, masses, counted)
        total += divergence
        dqueries[rows], dweights[rows] = block_scores_backward(
            queries[rows], weights[rows], keys, blocks, dscores, dkeys
        )
    return total


def _masses_of(attended: Attended, table: BlockTable, rows: slice, ids: Tensor, blocks: slice) -> Tensor:
    """[R, n] wide, what attention gives the blocks ``ids`` [R, S], -1 for none; 0 for others."""
    start = torch.where(ids >= 0, table.start[ids.clamp(min=0)], -1)
    found = selected_masses(attended.q[rows], attended.k, attended.lse[rows], start, table.block_size, attended.scale)
    masses = found.new_zeros(ids.shape[0], blocks.stop - blocks.start + 1)
    # The last column takes what is none.
    column = torch.where(ids >= 0, ids - blocks.start, masses.shape[1] - 1)
    return masses.scatter_(1, column, found)[:, :-1]


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
