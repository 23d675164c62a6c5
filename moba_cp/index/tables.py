"""Where the blocks of a sequence lie, as the rows of one rank see them."""

import torch

from ..blocks import BlockTable, block_table
from ..cp.context import CPContext
from ..cp.layout import positions_of
from ..host import to_device


def index_tables(context: CPContext, block_size: int) -> BlockTable:
    """The blocks of the whole sequence, none of them empty, by this rank's rows. Kept with the context."""

    def build() -> BlockTable:
        with torch.inference_mode(False):
            table = block_table(context.seq_len, block_size, context.cu_seqlens, torch.device("cpu"))
            # Not those on the device, for which the host would wait.
            positions = torch.from_numpy(positions_of(context.segments[context.rank]))
            rows = (x[positions] for x in (table.current_block, table.first, table.offset))
            # Behind them the table has entries that stand for no block.
            n = int((table.length > 0).sum())
            return BlockTable(
                block_size, *(to_device(x, context.device) for x in (table.start[:n], table.length[:n], *rows))
            )

    return context.cached(BlockTable, ("of this rank", block_size), build)
