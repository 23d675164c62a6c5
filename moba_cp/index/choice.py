"""The scorer's scores of blocks, the blocks with the highest, and the scores' gradients; of one KV head.

Legend: R rows, m queries of the scorer for the KV head, d their width, n blocks, W keys that a block is represented by
(1, its mean, or all B), K keys in all, S selected blocks of a row. Wide means float32, or float64 for float64 inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import WIDE
from ..eager.select import _ordered_bits, _scores
from .tables import IndexTables

# Elements of a temporary at most, on a GPU and on a CPU.
SCRATCH_ELEMENTS, CPU_ELEMENTS = 1 << 26, 1 << 20
MOST_ROWS = 4096


def elements_at_once(x: Tensor) -> int:
    """Elements of a temporary beside ``x`` at most."""
    return SCRATCH_ELEMENTS if x.is_cuda else CPU_ELEMENTS


def row_slices(tables: IndexTables, x: Tensor) -> Iterator[slice]:
    """The rows of ``x`` [L, ...], so many at a time that something for each of their blocks is not large."""
    step = max(1, min(MOST_ROWS, elements_at_once(x) // (4 * max(1, tables.n_blocks))))
    for lo in range(0, x.shape[0], step):
        yield slice(lo, min(lo + step, x.shape[0]))


@dataclass(frozen=True)
class Keys:
    """The scorer's keys of one KV head, through the whole sequence."""

    rows: Tensor
    """[K, d]: mean keys of all blocks; or all keys and behind them a row of zeros."""
    tables: IndexTables
    by_mean: bool

    @property
    def width(self) -> int:
        """W."""
        return 1 if self.by_mean else self.tables.block_size

    def tiles(self, blocks: slice, n_queries: int) -> Iterator[slice]:
        """``blocks``, so many at a time that scores of their keys by ``n_queries`` queries are not large."""
        step = max(1, elements_at_once(self.rows) // (n_queries * self.width))
        for lo in range(blocks.start, blocks.stop, step):
            yield slice(lo, min(lo + step, blocks.stop))

    def at(self, blocks: slice) -> Tensor | slice:
        """Which rows represent the blocks, W of each in order."""
        return blocks if self.by_mean else self.tables.key_rows(blocks, self.rows.shape[0] - 1).flatten()

    def largest(self, scores: Tensor, blocks: slice) -> tuple[Tensor, Tensor]:
        """A block's score [R, n] of those of its keys [R, n * W], and which key's that is [R, n]."""
        scores = scores.unflatten(1, (-1, self.width))
        if not self.by_mean:
            short = torch.arange(self.width, device=scores.device) >= self.tables.length[blocks, None]
            scores = scores.masked_fill(short, -torch.inf)
        return scores.max(-1)


def block_scores(queries: Tensor, weights: Tensor, keys: Keys, blocks: slice, exact: bool) -> Tensor:
    """[R, n] wide, scores of the complete ones of ``blocks``.

    Args:
        queries: [R, m, d]; weights: [R, m] wide.
        exact: a score is a function of its row and its block alone, whatever is computed beside it, so that it is the
            same on any number of ranks.
    """
    parts = [
        keys.largest(_weighted(_products(queries, keys.rows[keys.at(tile)], exact), weights), tile)[0]
        for tile in keys.tiles(blocks, queries.shape[0] * queries.shape[1])
    ]
    return torch.cat(parts, 1) if parts else weights.new_zeros(queries.shape[0], 0)


def block_scores_backward(
    queries: Tensor, weights: Tensor, keys: Keys, blocks: slice, dscores: Tensor, dkeys: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`block_scores` by the queries [R, m, d] and their weights [R, m], wide; that by the keys is
    added to ``dkeys`` [K, d] wide. A maximum's goes to the first key that has it."""
    wide_queries = queries.to(weights.dtype)
    dqueries, dweights = torch.zeros_like(wide_queries), torch.zeros_like(weights)
    for tile in keys.tiles(blocks, queries.shape[0] * queries.shape[1]):
        at = keys.at(tile)
        rows = keys.rows[at].to(weights.dtype)
        products = _products(queries, rows, False)
        _, best = keys.largest(_weighted(products, weights), tile)
        some = dscores[:, tile.start - blocks.start : tile.stop - blocks.start]
        of_keys = products.new_zeros(*some.shape, keys.width).scatter_(2, best[..., None], some[..., None]).flatten(1)
        positive = products.relu()
        dweights += torch.einsum("rmk,rk->rm", positive, of_keys)
        dproducts = (positive > 0) * (of_keys[:, None] * weights[..., None])
        dqueries += dproducts @ rows
        dkeys[at] += dproducts.flatten(0, 1).T @ wide_queries.flatten(0, 1)
    return dqueries, dweights


def select_blocks(
    queries: Tensor, weights: Tensor, keys: Keys, top_k: int, min_recent: int = 0, sink: bool = False
) -> Tensor:
    """[L, top_k - 1] int32, the candidates with the highest scores, best first, counted within the row's document; -1
    where there are fewer.

    Equal scores: the more recent block. NaN ranks below every number. What is always taken comes first.

    Args:
        queries: [L, m, d]; weights: [L, m] wide.
        min_recent: so many of the newest candidates are always taken.
        sink: the oldest candidate is always taken.
    """
    tables = keys.tables
    chosen = torch.full((queries.shape[0], top_k - 1), -1, dtype=torch.int32, device=queries.device)
    never, always = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    for rows in row_slices(tables, queries):
        blocks = tables.candidates_of(rows)
        n = blocks.stop - blocks.start
        n_take = min(top_k - 1, n)
        if not n_take:
            continue
        scores = block_scores(queries[rows], weights[rows], keys, blocks, True)
        block = torch.arange(blocks.start, blocks.stop, device=queries.device)
        first, current, candidate = (
            tables.first[rows, None],
            tables.current[rows, None],
            tables.is_candidate(rows, blocks),
        )
        taken = block >= current - min_recent
        if sink:
            taken |= block == first
        sort_key = torch.where(candidate, torch.where(taken, always, _ordered_bits(scores.double())), never).flip(1)
        sort_key, order = sort_key.sort(dim=1, descending=True, stable=True)
        best = blocks.stop - 1 - order[:, :n_take] - first
        chosen[rows, :n_take] = torch.where(sort_key[:, :n_take] == never, -1, best).int()
    return chosen


def _products(queries: Tensor, rows: Tensor, exact: bool) -> Tensor:
    """[R, m, K] wide: queries [R, m, d], rows [K, d]."""
    flat = queries.flatten(0, 1)
    if exact:
        return _scores(flat[None], rows[None])[0].unflatten(0, queries.shape[:2])
    wide = WIDE[queries.dtype]
    return (flat.to(wide) @ rows.to(wide).T).unflatten(0, queries.shape[:2])


def _weighted(products: Tensor, weights: Tensor) -> Tensor:
    """[R, K]: the sum over the queries, in their order, of weight times positive part."""
    total = weights[:, 0, None] * products[:, 0].relu()
    for number in range(1, products.shape[1]):
        total = total + weights[:, number, None] * products[:, number].relu()
    return total
