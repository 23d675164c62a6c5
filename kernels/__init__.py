"""Triton kernels, in the order in which one attention call runs them.

:mod:`.means` computes block representatives, :mod:`.select` scores and top-k, :mod:`.routing` which rows visit a block,
:mod:`.forward` their attention, :mod:`.merge` joins partial results, :mod:`.backward` computes gradients.
:mod:`.attention` is their public side: :mod:`.work` cuts a call into slices, :mod:`.launches` runs the kernels for one.
:mod:`.tuned` has the tile shapes, and says where a kernel of :mod:`.hopper` replaces one of :mod:`.select`,
:mod:`.forward` or :mod:`.backward`; :func:`serving` says in one line whether those serve a GPU.

For the exchange between ranks :mod:`.exchange.choices` counts what rows selected, :mod:`.exchange.decision` decides
what moves, :mod:`.exchange.requests` writes and reads the requests, and :mod:`.pages` and :mod:`.rows` copy blocks and
rows. :mod:`.kv_shards` packs K and V for the all-gather.

:mod:`.index_choice` chooses blocks for an index branch, and :mod:`.index_gradients` is what it learns from.

:mod:`.decoding` selects and attends for few rows with many keys behind them, as a model that generates has them.

:mod:`.tokenwise` is the rest of a transformer layer but its products of matrices, and :mod:`.key_conv` a short
convolution over keys.

Functions have the arguments of their twins in :mod:`moba_cp.eager`. They serve float32, bfloat16 and float16 on a GPU,
and on the CPU under ``TRITON_INTERPRET=1``. Kernels know no autograd.

Vocabulary: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` tile values, ``s_`` strides,
CAPITALS compile-time constants.
"""

from . import hopper, hopper_check
from .attention import attend, attend_backward, routing_index
from .decoding import attend_few, select_few
from .exchange.choices import count_choices, count_rows, list_rows
from .exchange.decision import pick_cheapest, weigh_blocks
from .exchange.requests import list_pairs, relay_request, sum_up, write_request
from .given import given_blocks
from .hopper import serving
from .index_choice import index_select
from .index_gradients import index_loss
from .key_conv import convolve, convolve_backward
from .kv_shards import pack_kv_shard, sum_partial_grads
from .means import block_means
from .merge import add_rows, merge_rows, row_sums
from .pages import add_pages, copy_pages
from .rows import gather_rows, row_ids
from .select import select_blocks
from .select_gated import select_by_keys
from .tokenwise import rms_norm, rms_norm_backward, split_rotate, split_rotate_backward, swiglu, swiglu_backward
from .work import index_size

hopper.check_with(hopper_check.compare)

__all__ = [
    "add_pages", "add_rows", "attend", "attend_backward", "attend_few", "block_means", "convolve", "convolve_backward",
    "copy_pages", "count_choices", "count_rows", "gather_rows", "given_blocks", "index_loss", "index_select",
    "index_size", "list_pairs", "list_rows", "merge_rows", "pack_kv_shard", "pick_cheapest", "relay_request",
    "rms_norm", "rms_norm_backward", "routing_index", "row_ids", "row_sums", "select_blocks", "select_by_keys",
    "select_few", "serving", "split_rotate", "split_rotate_backward", "sum_partial_grads", "sum_up", "swiglu",
    "swiglu_backward", "weigh_blocks", "write_request",
]  # fmt: skip
