"""The primitives in plain PyTorch: the same functions, with the same arguments, as :mod:`moba_cp.kernels`.

:mod:`.attention` is the computing, :mod:`.movement` what travels between ranks; :mod:`.choices`, :mod:`.decision` and
:mod:`.requests` plan the exchange. They serve any device and any floating dtype, float64 included, and what the kernels
do is held against them.
"""

from .attention import attend, attend_backward, block_means, index_size, routing_index, row_sums, select_blocks
from .choices import count_choices, count_rows, list_rows, row_ids
from .decision import pick_cheapest, weigh_blocks
from .movement import add_pages, add_rows, copy_pages, gather_rows, merge_rows, pack_slab, sum_shares
from .requests import list_pairs, relay_request, sum_up, write_request

__all__ = [
    "add_pages", "add_rows", "attend", "attend_backward", "block_means", "copy_pages", "count_choices",
    "count_rows", "gather_rows", "index_size", "list_pairs", "list_rows", "merge_rows", "pack_slab",
    "pick_cheapest", "relay_request", "routing_index", "row_ids", "row_sums", "select_blocks", "sum_shares",
    "sum_up", "weigh_blocks", "write_request",
]  # fmt: skip
