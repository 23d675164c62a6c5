"""Where the blocks of a sequence lie, as the rows of one rank see them.

Legend: T tokens of the whole sequence, L of this rank, n blocks of all documents, B block size, P ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..blocks import block_table
from ..cp.context import CPContext
from ..cp.layout import positions_of


@dataclass(frozen=True)
class IndexTables:
    """Made once for a context and block size."""

    block_size: int
    start: Tensor
    """[n] int64, first token of each block in the whole sequence."""
    length: Tensor
    """[n] int64, tokens of each block."""
    first: Tensor
    """[L] int64, first block of each local token's document."""
    current: Tensor
    """[L] int64, block of each local token; its candidates are ``first <= id < current``."""
    bounds: np.ndarray
    """[2, L], ``first`` and ``current`` in the host's memory."""

    @property
    def n_blocks(self) -> int:
        return self.start.numel()

    def candidates_of(self, rows: slice) -> slice:
        """Blocks among which are the candidates of all these rows."""
        first, current = self.bounds[:, rows]
        since, until = int(first.min()), int(current.max())
        return slice(since, max(since, until))

    def is_candidate(self, rows: slice, blocks: slice) -> Tensor:
        """[rows, blocks] bool."""
        block = torch.arange(blocks.start, blocks.stop, device=self.first.device)
        return (block >= self.first[rows, None]) & (block < self.current[rows, None])

    def key_rows(self, blocks: slice, beyond: int) -> Tensor:
        """[blocks, B] int64, tokens of the blocks; ``beyond`` where a block is shorter."""
        offset = torch.arange(self.block_size, device=self.start.device)
        return torch.where(offset < self.length[blocks, None], self.start[blocks, None] + offset, beyond)


def index_tables(context: CPContext, block_size: int) -> IndexTables:
    """Kept with the context."""

    def build() -> IndexTables:
        with torch.inference_mode(False):
            table = block_table(context.seq_len, block_size, context.cu_seqlens, torch.device("cpu"))
            # Not those on the device, for which the host would wait.
            positions = torch.from_numpy(positions_of(context.segments[context.rank]))
            first, current = (x[positions].long() for x in (table.first, table.current_block))
            # Behind them the table has entries that stand for no block.
            n = int((table.length > 0).sum())
            here = [x.to(context.device) for x in (table.start[:n], table.length[:n].long(), first, current)]
            return IndexTables(block_size, *here, torch.stack([first, current]).numpy())

    return context.cached(IndexTables, block_size, build)
