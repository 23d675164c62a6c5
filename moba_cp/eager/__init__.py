"""The primitives in plain PyTorch: the same functions, with the same arguments, as :mod:`moba_cp.kernels`.

:mod:`.select` chooses blocks, :mod:`.attention` attends to them, :mod:`.decoding` chooses and attends for few rows,
:mod:`.index_choice` chooses for an index branch, which learns by :mod:`.index_gradients` from :mod:`.masses`,
:mod:`.exchange` plans what moves between ranks and :mod:`.movement` packs and joins it; :mod:`.tokenwise` is the rest
of a layer but its products of matrices, and :mod:`.key_conv` a short convolution over keys. They serve any device and
any floating dtype, float64 included; the kernels are tested against them.
"""

from .attention import attend, attend_backward, index_size, routing_index, row_sums
from .decoding import attend_few, select_few
from .exchange import (
    count_choices,
    count_rows,
    list_pairs,
    list_rows,
    pick_cheapest,
    relay_request,
    row_ids,
    sum_up,
    weigh_blocks,
    write_request,
)
from .index_choice import index_select
from .index_gradients import index_loss
from .key_conv import convolve, convolve_backward
from .movement import add_pages, add_rows, copy_pages, gather_rows, merge_rows, pack_kv_shard, sum_partial_grads
from .select import block_means, given_blocks, select_blocks, select_by_keys
from .tokenwise import rms_norm, rms_norm_backward, split_rotate, split_rotate_backward, swiglu, swiglu_backward

__all__ = [
    "add_pages", "add_rows", "attend", "attend_backward", "attend_few", "block_means", "convolve", "convolve_backward",
    "copy_pages", "count_choices", "count_rows", "gather_rows", "given_blocks", "index_loss", "index_select",
    "index_size", "list_pairs", "list_rows", "merge_rows", "pack_kv_shard", "pick_cheapest", "relay_request",
    "rms_norm", "rms_norm_backward", "routing_index", "row_ids", "row_sums", "select_blocks", "select_by_keys",
    "select_few", "split_rotate", "split_rotate_backward", "sum_partial_grads", "sum_up", "swiglu", "swiglu_backward",
    "weigh_blocks", "write_request",
]  # fmt: skip
