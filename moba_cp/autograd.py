"""MoBA attention on one device as a pair of PyTorch operators, with their gradients.

``torch.compile`` and FakeTensor see two opaque operators; what they run is chosen in :mod:`moba_cp.ops`.

Legend: T tokens, Hq query heads, Hkv key/value heads, D head dim, k top-k.
"""

from functools import lru_cache

import torch
from torch import Tensor

from .blocks import BlockTable, block_count, block_table, fitted_block_size, local_pages
from .dtypes import WIDE
from .ops import backend
from .transforms import refuse_second_derivatives, without_autocast


@lru_cache(maxsize=8)
def _one_document(n_tokens: int, block_size: int, device: torch.device, stream: int) -> BlockTable:
    return block_table(n_tokens, block_size, None, device)


def _table(x: Tensor, block_size: int, cu_seqlens: Tensor | None) -> BlockTable:
    """Block geometry of the tokens of ``x``; kept from call to call where there are no documents."""
    block_size = fitted_block_size(block_size, x.shape[0])
    if cu_seqlens is not None:
        return block_table(x.shape[0], block_size, cu_seqlens, x.device)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        # What a CUDA graph computes exists only once it is replayed, and belongs to the graph.
        return block_table(x.shape[0], block_size, None, x.device)
    # A table made on one stream may not be ready on another.
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return _one_document(x.shape[0], block_size, x.device, stream)


@torch.library.custom_op("moba_cp::moba_attention", mutates_args=())
@without_autocast
def moba_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    top_k: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [T, Hq, D] in q's dtype, lse [T, Hq] wide, chosen [T, Hq, k - 1] int32, and the kernels' routing index for
    the backward (empty where there is none)."""
    table = _table(q, block_size, cu_seqlens)
    ops = backend(q)
    means = ops.block_means(k, table.start, table.length, block_size)
    chosen = ops.select_blocks(q, means, table.first, table.own, top_k)
    pages = local_pages(k, v, table)
    index = ops.routing_index(q, chosen, table.own, table.visible, pages.row)
    out, lse = ops.attend(q, pages, chosen, table.own, table.visible, scale, out_dtype=q.dtype, index=index)
    return out, lse, chosen, chosen.new_empty(0) if index is None else index


@torch.library.custom_op("moba_cp::moba_attention_backward", mutates_args=())
@without_autocast
def moba_attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    index: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in their inputs' dtype."""
    table = _table(q, block_size, cu_seqlens)
    ops = backend(q)
    delta = ops.row_sums(dout, out)
    return ops.attend_backward(
        q, local_pages(k, v, table), chosen, table.own, table.visible, scale, dout, lse, delta,
        deterministic, local_dtype=q.dtype, index=index if index.numel() else None,
    )  # fmt: skip


@moba_attention_op.register_fake
def _(q, k, v, cu_seqlens, block_size, top_k, scale, deterministic):
    n_tokens, n_heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(n_tokens, n_heads, dtype=WIDE[q.dtype])
    chosen = q.new_empty(n_tokens, n_heads, top_k - 1, dtype=torch.int32)
    n_blocks = block_count(n_tokens, block_size, cu_seqlens)
    return out, lse, chosen, q.new_empty(backend(q).index_size(q, k.shape[1], n_blocks, top_k), dtype=torch.int32)


@moba_attention_backward_op.register_fake
def _(dout, q, k, v, out, lse, chosen, index, cu_seqlens, block_size, scale, deterministic):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, block_size, _top_k, scale, deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.options = block_size, scale, deterministic
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dout, _dlse, _dchosen, _dindex):
    *saved, cu_seqlens = ctx.saved_tensors
    grads = moba_attention_backward_op(dout, *saved, cu_seqlens, *ctx.options)
    return *grads, None, None, None, None, None


moba_attention_op.register_autograd(_backward, setup_context=_save)
moba_attention_backward_op.register_autograd(refuse_second_derivatives)
