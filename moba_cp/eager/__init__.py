"""The primitives in plain PyTorch: the twin of :mod:`moba_cp.kernels`."""

from .attention import (
    add_pages,
    add_rows,
    attend,
    attend_backward,
    block_means,
    copy_pages,
    gather_rows,
    merge,
    merge_rows,
    pack_slab,
    row_sums,
    select_blocks,
    sum_shares,
)

__all__ = [
    "add_pages",
    "add_rows",
    "attend",
    "attend_backward",
    "block_means",
    "copy_pages",
    "gather_rows",
    "merge",
    "merge_rows",
    "pack_slab",
    "row_sums",
    "select_blocks",
    "sum_shares",
]
