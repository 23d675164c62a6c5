"""Selection and attention of few query rows with many keys behind them.

Legend: N query rows, Hq query heads, Hkv key/value heads, D head dim, n blocks, S selected blocks per row.
"""

from torch import Tensor

from ..blocks import Pages
from .attention import attend
from .select import select_blocks


def select_few(
    q: Tensor, means: Tensor, first: Tensor, current_block: Tensor, top_k: int, most: int | None = None
) -> Tensor:
    """:func:`.select.select_blocks` of few rows.

    The kernels sum a score in another order than for many rows, so where two scores differ by no more than their
    rounding, a row may get another block than it would there. Equal scores: the higher id, as always.

    Args:
        most: the most candidates of a row; n if it is None.
    """
    return select_blocks(q, means, first, current_block, top_k)


def attend_few(
    q: Tensor, pages: Pages, block_indices: Tensor, current_block: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`.attention.attend` of few rows: out [N, Hq, D] in q's dtype, lse [N, Hq] wide."""
    return attend(q, pages, block_indices, current_block, visible, scale, out_dtype=q.dtype)
