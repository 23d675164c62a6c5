"""An index branch's scores of blocks, the blocks with the highest, and the scores' gradients.

Legend: L rows, R of a slice, g KV heads, m queries of the scorer for each, d their width, n blocks, W keys that a block
is represented by (1, its mean, or all B), K keys in all, S selected blocks of a row. Wide means float32, or float64 for
float64 inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import BlockTable
from ..dtypes import WIDE
from .select import _ordered_bits, _scores

# Elements of a temporary at most, on a GPU and on a CPU.
SCRATCH_ELEMENTS, CPU_ELEMENTS = 1 << 26, 1 << 20
MOST_ROWS = 4096


def elements_at_once(x: Tensor) -> int:
    """Elements of a temporary beside ``x`` at most."""
    return SCRATCH_ELEMENTS if x.is_cuda else CPU_ELEMENTS


def row_slices(table: BlockTable, x: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of ``x`` [L, ...] that have candidates, so many at a time that something for each of their blocks is not
    large; and the blocks among which are the candidates of all of them."""
    step = max(1, min(MOST_ROWS, elements_at_once(x) // (4 * max(1, table.n_blocks))))
    for lo in range(0, x.shape[0], step):
        rows = slice(lo, min(lo + step, x.shape[0]))
        since, until = int(table.first[rows].min()), int(table.current_block[rows].max())
        if since < until:
            yield rows, slice(since, until)


def is_candidate(table: BlockTable, rows: slice, blocks: slice) -> Tensor:
    """[rows, blocks] bool."""
    block = torch.arange(blocks.start, blocks.stop, device=table.first.device)
    return (block >= table.first[rows, None]) & (block < table.current_block[rows, None])


@dataclass(frozen=True)
class Keys:
    """The scorer's keys of one KV head, through the whole sequence."""

    rows: Tensor
    """[K, d]: mean keys of all blocks; or all keys and behind them a row of zeros."""
    table: BlockTable
    by_mean: bool

    @property
    def width(self) -> int:
        """W."""
        return 1 if self.by_mean else self.table.block_size

    def tiles(self, blocks: slice, n_queries: int) -> Iterator[slice]:
        """``blocks``, so many at a time that scores of their keys by ``n_queries`` queries are not large."""
        step = max(1, elements_at_once(self.rows) // (n_queries * self.width))
        for lo in range(blocks.start, blocks.stop, step):
            yield slice(lo, min(lo + step, blocks.stop))

    def at(self, blocks: slice) -> Tensor | slice:
        """Which rows represent the blocks, W of each in order."""
        if self.by_mean:
            return blocks
        offset, table = torch.arange(self.width, device=self.rows.device), self.table
        rows = table.start[blocks, None] + offset
        return torch.where(offset < table.length[blocks, None], rows, self.rows.shape[0] - 1).flatten()

    def largest(self, scores: Tensor, blocks: slice) -> tuple[Tensor, Tensor]:
        """A block's score [R, n] of those of its keys [R, n * W], and which key's that is [R, n]."""
        scores = scores.unflatten(1, (-1, self.width))
        if not self.by_mean:
            short = torch.arange(self.width, device=scores.device) >= self.table.length[blocks, None]
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


def index_select(
    queries: Tensor,
    weights: Tensor,
    keys: Tensor,
    table: BlockTable,
    by_mean: bool,
    top_k: int,
    min_recent: int,
    sink: bool,
) -> Tensor:
    """[L, g, top_k - 1] int32, the candidates with the highest scores, best first, counted within the row's document;
    -1 where there are fewer.

    Equal scores: the more recent block. NaN ranks below every number. What is always taken comes first.

    Args:
        queries: [L, g, m, d]; weights: [L, g, m] wide.
        keys: [K, g, d], mean keys of all blocks; or, unless ``by_mean``, all keys and behind them a row of zeros.
        table: of blocks of which none is empty, and of these rows.
        min_recent: so many of the newest candidates are always taken.
        sink: the oldest candidate is always taken.
    """
    how = table, top_k, min_recent, sink
    of_heads = [
        _select(queries[:, head], weights[:, head], Keys(keys[:, head], table, by_mean), *how)
        for head in range(queries.shape[1])
    ]
    return torch.stack(of_heads, 1)


def _select(
    queries: Tensor, weights: Tensor, keys: Keys, table: BlockTable, top_k: int, min_recent: int, sink: bool
) -> Tensor:
    """[L, S], of one KV head."""
    chosen = torch.full((queries.shape[0], top_k - 1), -1, dtype=torch.int32, device=queries.device)
    never, always = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    for rows, blocks in row_slices(table, queries):
        n_take = min(top_k - 1, blocks.stop - blocks.start)
        scores = block_scores(queries[rows], weights[rows], keys, blocks, True)
        block = torch.arange(blocks.start, blocks.stop, device=queries.device)
        first, taken = table.first[rows, None], block >= table.current_block[rows, None] - min_recent
        if sink:
            taken |= block == first
        sort_key = torch.where(taken, always, _ordered_bits(scores.double()))
        sort_key = torch.where(is_candidate(table, rows, blocks), sort_key, never).flip(1)
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
