"""The index branch of one layer on one sequence, on one rank or many.

The scorer reads what attention's own projection reads, and no gradient goes back there: it learns alone.

Legend: L local tokens, T tokens of the whole sequence, P ranks, Hq query heads, g KV heads, D head dim, m queries of
the scorer for each KV head, d their width, n blocks, K keys that stand for blocks (n, or T and one of zeros behind
them), S selected blocks of a row. Wide means float32, or float64 for float64 inputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import BlockTable
from ..config import MoBAConfig
from ..cp.calls import Where
from ..cp.context import CPContext
from ..cp.moba import owned_means, owned_tables
from ..cp.straddle import assemble
from ..dtypes import WIDE
from ..ops import backend
from .config import IndexConfig
from .tables import index_tables


class Projected(NamedTuple):
    """What the scorer makes of local tokens; or its gradients, wide."""

    queries: Tensor
    """[L, g, m, d]."""
    keys: Tensor
    """[L, g, d]."""
    weights: Tensor
    """[L, g, m] wide."""


class Scored(NamedTuple):
    """The same with what stands for the blocks of the whole sequence."""

    queries: Tensor
    """[L, g, m, d]."""
    keys: Tensor
    """[K, g, d]."""
    weights: Tensor
    """[L, g, m] wide."""


@dataclass(frozen=True)
class IndexBranch:
    """The scorer of one layer. On a rank of a group, :meth:`gather` and :meth:`learn` are collective calls."""

    config: IndexConfig
    moba: MoBAConfig
    """Block size, top-k, and which blocks are always taken."""
    context: CPContext
    layer: str
    """The layer's name, in counters and messages."""
    n_kv: int
    """g."""

    @property
    def tables(self) -> BlockTable:
        """Where blocks lie."""
        return index_tables(self.context, self.moba.block_size)

    def empty(self, hidden: Tensor) -> Projected:
        """Room for what :meth:`split` writes, of the tokens of ``hidden`` [L, H]."""
        n, g, m, d = hidden.shape[0], self.n_kv, self.config.heads, self.config.dim
        weights = hidden.new_empty(n, g, m, dtype=WIDE[hidden.dtype])
        return Projected(hidden.new_empty(n, g, m, d), hidden.new_empty(n, g, d), weights)

    def split(self, mixed: Tensor, cos: Tensor, sin: Tensor, out: Projected) -> None:
        """Turned queries, turned keys and the queries' weights out of one projection.

        Args:
            mixed: [n, width]: of each KV head its queries, its key and its weights.
            cos, sin: [n, D / 2] wide, of the angles by which the layer's heads turn.
        """
        m, d = self.config.heads, self.config.dim
        wide = mixed.to(WIDE[mixed.dtype]).unflatten(1, (self.n_kv, -1))
        turned = self._turn(wide[..., : (m + 1) * d].unflatten(2, (m + 1, d)), cos, sin)
        out.queries.copy_(turned[:, :, :m])
        out.keys.copy_(turned[:, :, m])
        torch.mul(wide[..., (m + 1) * d :], (m * d) ** -0.5, out=out.weights)

    def split_backward(self, grads: Projected, cos: Tensor, sin: Tensor) -> Tensor:
        """[n, width] wide, the gradient of :meth:`split`'s projection."""
        m, d = self.config.heads, self.config.dim
        turned = torch.cat([grads.queries, grads.keys[:, :, None]], 2)
        flat = self._turn(turned, cos, -sin).flatten(2)
        return torch.cat([flat, grads.weights * (m * d) ** -0.5], 2).flatten(1)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Each pair (i, i + d / 2) of x [n, g, heads, d] turned by its token's angle, at the frequencies of width d."""
        low, high = x.chunk(2, -1)
        step = cos.shape[1] // low.shape[-1]
        cos, sin = (angle[:, None, None, ::step] for angle in (cos, sin))
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def gather(self, projected: Projected) -> Scored:
        """``projected`` with the mean keys of all blocks, or with all keys; a collective call."""
        keys, context, comm = projected.keys, self.context, self.context.comm
        if not self._by_mean:
            whole = self._whole(keys, "index_keys")
            return Scored(
                projected.queries, torch.cat([whole, whole.new_zeros(1, *whole.shape[1:])]), projected.weights
            )
        ops, tables = backend(keys), self.tables
        if context.size == 1:
            means = ops.block_means(keys, tables.start, tables.length, self.moba.block_size)
            return Scored(projected.queries, means, projected.weights)
        # As the means of attention's own keys: each is computed in one place, by the owner of the block.
        geometry, where = context.geometry(self.moba.block_size), Where.forward(self.layer)
        if geometry.straddles:
            half = self.config.dim // 2
            halves = (part.contiguous() for part in (keys[..., :half], keys[..., half:]))
            keys = torch.cat(assemble(*halves, geometry, comm, where), -1)
        means = owned_means(keys, owned_tables(context, geometry, self.n_kv), geometry, ops)
        every = comm.all_gather(means, "index_means", where)
        return Scored(projected.queries, every[geometry.owner, geometry.local_index], projected.weights)

    def choose(self, scored: Scored) -> Tensor:
        """[L, g, S] int32, the blocks with the highest scores, counted within the row's document; -1 for none."""
        config = self.moba
        how = self._by_mean, config.top_k, config.min_recent, config.sink
        return backend(scored.queries).index_select(scored.queries, scored.weights, scored.keys, self.tables, *how)

    def learn(
        self,
        scored: Scored,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        scale: float,
        chosen: Tensor | None,
    ) -> tuple[Tensor, Projected]:
        """The loss, and its gradients; a collective call.

        Args:
            q: [L, Hq, D]; k: [L, g, D]; lse: [L, Hq] wide: of attention, whose scores have the factor ``scale``.
            chosen: [L, g, S] of :meth:`choose`; None where attention is full: then all blocks count.

        Returns:
            [] wide, the divergence of this rank's rows, summed over them, the mean over KV heads; and its gradients by
            what was projected.
        """
        group, ops = q.shape[1] // self.n_kv, backend(q)
        # A head at a time across ranks: all keys of all heads may be more than there is room for.
        parts = [slice(0, self.n_kv)] if self.context.size == 1 else [slice(i, i + 1) for i in range(self.n_kv)]
        found = []
        for part in parts:
            heads = slice(part.start * group, part.stop * group)
            of_scorer = scored.queries[:, part], scored.weights[:, part], scored.keys[:, part]
            attended = q[:, heads], self._whole(k[:, part], "index_attended"), lse[:, heads], scale
            found.append(
                ops.index_loss(
                    *attended, *of_scorer, self.tables, self._by_mean, None if chosen is None else chosen[:, part]
                )
            )
        totals, *grads = zip(*found)
        total = torch.stack(totals).sum() / self.n_kv
        dqueries, dweights, dkeys = (torch.cat(of_parts, 1).div_(self.n_kv) for of_parts in grads)
        return total, Projected(dqueries, self._own_gradients(dkeys), dweights)

    @property
    def _by_mean(self) -> bool:
        return self.config.score == "mean"

    def _whole(self, x: Tensor, kind: str) -> Tensor:
        """[T, ...] of every rank's [L, ...]."""
        context = self.context
        if context.size == 1:
            return x
        gathered = context.comm.all_gather(x.contiguous(), kind, Where.forward(self.layer)).flatten(0, 1)
        whole = torch.empty_like(gathered)
        whole[context.gathered_positions] = gathered
        return whole

    def _own_gradients(self, dkeys: Tensor) -> Tensor:
        """The gradients of local keys [L, g, d], of what each rank's rows give what stands for blocks [K, g, d]."""
        context, where, tables = self.context, Where.forward(self.layer), self.tables
        if self._by_mean:
            if context.size > 1:
                dkeys = context.comm.all_gather(dkeys, "index_gradients", where).sum(0)
            return dkeys[tables.current_block] / tables.length[tables.current_block, None, None]
        dkeys = dkeys[:-1]
        if context.size == 1:
            return dkeys
        rows = [context.local_len] * context.size
        arrived = context.comm.all_to_all(dkeys[context.gathered_positions], rows, rows, "index_gradients", where)()
        return arrived.unflatten(0, (context.size, -1)).sum(0)
