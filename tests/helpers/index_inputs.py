"""Inputs of the tests of index branches."""

from dataclasses import dataclass, replace

import torch

from moba_cp import CPContext
from moba_cp.blocks import BlockTable
from moba_cp.index.tables import index_tables

BLOCK, TOP_K = 16, 3
DOCUMENTS = {"one": [0, 100], "packed": [0, 7, 7, 71, 100], "whole blocks": [0, 64, 96]}


@dataclass
class Inputs:
    """One layer's tensors: of attention q, k, v, of the scorer queries, weights, keys."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    queries: torch.Tensor
    weights: torch.Tensor
    keys: torch.Tensor
    bounds: torch.Tensor
    block_size: int

    @property
    def scorer(self):
        return self.queries, self.weights, self.keys

    @property
    def table(self) -> BlockTable:
        context = CPContext(None, "contiguous", len(self.q), cu_seqlens=self.bounds)
        return index_tables(context, self.block_size)

    def block_keys(self, score: str) -> torch.Tensor:
        """[K, g, d], what represents blocks."""
        if score == "max":
            return torch.cat([self.keys, self.keys.new_zeros(1, *self.keys.shape[1:])])
        table = self.table
        return torch.stack([self.keys[s : s + n].mean(0) for s, n in zip(table.start, table.length)])

    def spread(self, dkeys: torch.Tensor, score: str) -> torch.Tensor:
        """Gradients of tokens' keys [T, g, d], of those of what represents their blocks."""
        table = self.table
        if score == "max":
            return dkeys[:-1]
        return dkeys[table.current_block] / table.length[table.current_block, None, None]

    def to(self, dtype: torch.dtype) -> "Inputs":
        wide = torch.promote_types(dtype, torch.float32)
        names = ("q", "k", "v", "queries", "keys")
        return replace(self, weights=self.weights.to(wide), **{name: getattr(self, name).to(dtype) for name in names})


def inputs(bounds, seed=0, n_kv=2, group=3, m=3, dim=8, head_dim=None, block_size=BLOCK) -> Inputs:
    """float64; ``bounds`` of documents, ``dim`` of the scorer, ``head_dim`` of attention, the same unless given."""
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    n, head_dim = bounds[-1], head_dim or dim
    q, k, v = draw(n, n_kv * group, head_dim), *draw(2, n, n_kv, head_dim)
    mixed = draw(n, n_kv, m * dim + dim + m)
    return Inputs(
        q, k, v, mixed[..., : m * dim].unflatten(2, (m, dim)).clone(), mixed[..., -m:].clone(),
        mixed[..., m * dim : m * dim + dim].clone(), torch.tensor(bounds), block_size,
    )  # fmt: skip
