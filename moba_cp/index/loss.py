"""What the scorer learns from: the KL divergence to what attention gives the blocks, and its gradient; of one KV head.

Rows come in slices, and their keys in tiles: nothing is as large as rows times keys.

Legend: L local tokens, R rows of a slice, G query heads of the KV head, D head dim, T tokens of the whole sequence,
n blocks, B block size, S selected blocks of a row; m, d and K as in :mod:`.choice`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import backend
from .choice import Keys, block_scores, block_scores_backward, row_slices
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
    tables, total, ops = keys.tables, weights.new_zeros(()), backend(attended.q)
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
                masses = _masses_of(attended, tables, rows, ids, blocks)
        if masses is None:
            start, lse = tables.start[blocks], attended.lse[rows]
            masses = ops.block_masses(attended.q[rows], attended.k, lse, start, tables.block_size, attended.scale)
        scores = block_scores(queries[rows], weights[rows], keys, blocks, False)
        divergence, dscores = _divergence(scores, masses, counted)
        total += divergence
        dqueries[rows], dweights[rows] = block_scores_backward(
            queries[rows], weights[rows], keys, blocks, dscores, dkeys
        )
    return total, dqueries, dweights


def _masses_of(attended: Attended, tables: IndexTables, rows: slice, ids: Tensor, blocks: slice) -> Tensor:
    """[R, n] wide, what attention gives the blocks ``ids`` [R, S], -1 for none; 0 for others."""
    start = torch.where(ids >= 0, tables.start[ids.clamp(min=0)], -1)
    found = backend(attended.q).selected_masses(
        attended.q[rows], attended.k, attended.lse[rows], start, tables.block_size, attended.scale
    )
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
