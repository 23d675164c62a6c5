"""Where the blocks lie that a rank owns.

Legend: L local tokens, X extra rows (assembled straddling blocks), n blocks, Hkv key/value heads, D head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Pages
from .context import CPContext
from .geometry import BlockGeometry


class OwnedTables(NamedTuple):
    """Where the blocks that this rank owns lie; m of them, or n with those of other ranks."""

    row: Tensor
    """[m] int64, the first row of each."""
    length: Tensor
    """[m] int32, tokens of each."""
    most: int
    """the most blocks that any rank owns"""
    page_row: Tensor
    """[Hkv, n] int64, the first row of each block, -1 for those of other ranks."""
    page_head: Tensor
    """[Hkv, n] int32, the KV head."""


def owned_tables(cp: CPContext, geometry: BlockGeometry, n_kv: int) -> OwnedTables:
    """Built at the first call and kept with the context."""

    def build() -> OwnedTables:
        mine, most = geometry.owned[cp.rank], max(ids.numel() for ids in geometry.owned)
        head = torch.arange(n_kv, device=geometry.row.device, dtype=torch.int32)[:, None]
        table = geometry.row.expand(n_kv, -1), head.expand(-1, geometry.n_blocks)
        return OwnedTables(geometry.row[mine], geometry.length[mine], most, *table)

    return cp.cached(OwnedTables, (geometry.block_size, n_kv), build)


def owned_pages(k: Tensor, v: Tensor, tables: OwnedTables, geometry: BlockGeometry) -> Pages:
    """Pages of the blocks this rank owns; k, v [L + X, Hkv, D]."""
    return Pages(k, v, tables.page_row, tables.page_head, geometry.length, geometry.block_size)
