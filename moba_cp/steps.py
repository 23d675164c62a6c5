"""One token more for each sequence of a cache, with the lengths on the device.

Elsewhere the host knows how long sequences are, and what it launches depends on that. Here nothing does, so a CUDA
graph of one such step serves all that follow while there is room.

Legend: b sequences, Hq query heads, Hkv key/value heads, D head dim, B block size, L tokens so far, C tokens there is
room for, M blocks there are means for.
"""

import torch
from torch import Tensor

from .blocks import BlockTable, local_pages
from .cache import KVCache
from .config import MoBAConfig
from .ops import backend
from .transforms import without_autocast


class Step:
    """What all layers of a model share in a step; ``cache.step = step`` lets a cache's calls be served by it.

    Sequences have no padding, equal lengths, and room for one token more.
    """

    def __init__(self, device: torch.device):
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        """[1] int64, L: the new token's place."""
        self.averaged: set[int] = set()
        """Caches, by ``id``, of which a step brings the means up to date."""
        self._tables: dict[tuple, BlockTable] = {}

    def begin(self) -> None:
        """A step begins, with a new position: tables are to be made again."""
        self._tables.clear()

    def append(self, cache: KVCache, k: Tensor, v: Tensor) -> None:
        """k, v [b, 1, Hkv, D] of the new token; the cache's length stays what it was."""
        for storage, x in zip(cache.storage, (k, v), strict=False):
            storage.index_copy_(1, self.position, x.to(storage.dtype))

    @torch.no_grad()
    @without_autocast
    def moba_attention(self, cache: KVCache, q: Tensor, config: MoBAConfig, scale: float) -> Tensor:
        """Of the new token to all keys: q and the result [b, 1, Hq, D]."""
        k, _, means = cache.storage
        batch, capacity, size, n_blocks = k.shape[0], k.shape[1], cache.block_size, means.shape[1]
        self.averaged.add(id(cache))
        # The last complete block, whose mean may be there already; without one it goes where nobody looks.
        block = (self.position + 1) // size - 1  # [1]
        sequence = torch.arange(batch, device=k.device)
        start = block.clamp(min=0) * size + sequence * capacity
        length = torch.where(block >= 0, size, 0).int().expand(batch).contiguous()
        rows = k.flatten(0, 1)
        mean = backend(rows).block_means(rows, start, length, size)
        at = torch.where(block >= 0, block, n_blocks - 1) + sequence * n_blocks
        means.view(-1, *k.shape[2:]).index_copy_(0, at, mean)
        return cache.attend(q, self._table(cache), config, scale, capacity // size)

    @torch.no_grad()
    @without_autocast
    def full_attention(self, cache: KVCache, q: Tensor, scale: float) -> Tensor:
        """Exact attention of the new token, as to blocks of which all are selected: q and the result [b, 1, Hq, D]."""
        k, v, _ = cache.storage
        table, rows = self._table(cache), q.flatten(0, 1)
        number = torch.arange(k.shape[1] // cache.block_size + 1, dtype=torch.int32, device=k.device)
        block = table.first[:, None] + number  # [b, n]
        block = torch.where(block < table.current_block[:, None], block, -1)
        every = block[:, None].expand(-1, q.shape[2], -1).contiguous()
        pages = local_pages(k.flatten(0, 1), v.flatten(0, 1), table)
        out, _ = backend(rows).attend_few(rows, pages, every, table.current_block, table.visible, scale)
        return out.view(q.shape)

    def _table(self, cache: KVCache) -> BlockTable:
        """Where blocks lie in [b * C] rows, and the new tokens in them; made once in a step for caches of one shape."""
        k, _, means = cache.storage
        key = k.shape[0], k.shape[1], means.shape[1], cache.block_size
        if key not in self._tables:
            batch, capacity, n_blocks, size = key
            sequence = torch.arange(batch, device=k.device)[:, None]
            in_sequence = torch.arange(n_blocks, device=k.device) * size  # [M]
            of_block = (self.position + 1 - in_sequence).clamp(min=0, max=size).expand(batch, n_blocks)
            first = (sequence * n_blocks)[:, 0]
            self._tables[key] = BlockTable(
                block_size=size,
                start=torch.where(of_block > 0, in_sequence + sequence * capacity, 0).flatten(),
                length=of_block.flatten().int(),
                current_block=(first + self.position // size).int(),
                first=first.int(),
                offset=(self.position % size).expand(batch).int(),
            )
        return self._tables[key]
