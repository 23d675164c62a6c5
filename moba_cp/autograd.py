"""MoBA and full attention on one device, each as a pair of PyTorch operators with their gradients.

``torch.compile`` and FakeTensor see opaque operators. What they run is chosen in :mod:`moba_cp.ops`, and of full
attention in :mod:`moba_cp.dense`.

Legend: T tokens, those of q where keys have more, Hq query heads, Hkv key/value heads, D head dim, k top-k.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dense
from .blocks import (
    BlockTable,
    block_count,
    block_table,
    check_cu_seqlens,
    check_rows_fit,
    fitted_block_size,
    local_pages,
)
from .config import Gate
from .dtypes import WIDE
from .given import fault_message, first_fault, numbers_in_documents
from .ops import backend
from .transforms import refuse_second_derivatives, without_autocast


def _table(q: Tensor, k: Tensor, block_size: int, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> BlockTable:
    """Block geometry of the keys, and the rows of q in it; kept from call to call but where boundaries are on a GPU."""
    n_tokens = k.shape[0]
    n_rows = None if q.shape[0] == n_tokens and cu_seqlens_k is None else q.shape[0]
    cu_rows, cu_keys = (None, cu_seqlens) if cu_seqlens_k is None else (cu_seqlens, cu_seqlens_k)
    sizes = n_tokens, fitted_block_size(block_size, n_tokens)
    stream = table_stream(k.device)
    if stream is None or any(x is not None and not x.is_cpu for x in (cu_rows, cu_keys)):
        return block_table(*sizes, cu_keys, k.device, n_rows, cu_rows)
    bounds = [None if x is None else bytes_of(x) for x in (cu_keys, cu_rows)]
    return _kept_table(*sizes, *bounds, k.device, n_rows, stream)


# Layers of a model, and their backward passes, follow one another with the same documents. Few are kept, since their
# rows are on the device.
@lru_cache(maxsize=2)
def _kept_table(
    n_tokens: int,
    block_size: int,
    bounds: bytes | None,
    row_bounds: bytes | None,
    device: torch.device,
    n_rows: int | None,
    _stream: int,
) -> BlockTable:
    cu_keys, cu_rows = (None if x is None else bounds_of(x) for x in (bounds, row_bounds))
    return block_table(n_tokens, block_size, cu_keys, device, n_rows, cu_rows)


def bytes_of(cu_seqlens: Tensor) -> bytes:
    """Numbers on the host [n], as what a table made of them is found by, whoever changes them later."""
    return cu_seqlens.long().numpy().tobytes()


def bounds_of(bounds: bytes) -> Tensor:
    """[n] int64 from :func:`bytes_of`."""
    return torch.from_numpy(np.frombuffer(bounds, np.int64).copy())


def table_stream(device: torch.device) -> int | None:
    """The stream for which tables on ``device`` may be kept: made on one they may not be ready on another. None while a
    CUDA graph is captured: what that computes exists only once it is replayed, and belongs to the graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


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
    cu_seqlens_k: Tensor | None = None,
    given: Tensor | None = None,
    check_given: bool = False,
    shared_by_group: str = "none",
    score: str = "mean",
    min_recent: int = 0,
    sink: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [T, Hq, D] in q's dtype, lse [T, Hq] wide, the selection [T, G, S] int32 of block ids, and the kernels'
    routing index for the backward (empty where there is none).

    Args:
        given: [T, G, S] int32, numbers of blocks within each row's document, which are attended to instead of those
            that the gate would choose.
        check_given: raise ValueError where that names what it must not; waits for the device.
        shared_by_group, score, min_recent, sink: the fields of :class:`moba_cp.config.Gate`.
    """
    table = _table(q, k, block_size, cu_seqlens, cu_seqlens_k)
    ops, rows = backend(q), (table.first, table.current_block)
    if given is not None:
        if check_given and (fault := first_fault(given, *rows)) is not None:
            raise ValueError(fault_message(*fault))
        block_indices = ops.given_blocks(given, *rows)
    elif score == "max":
        block_indices = ops.select_by_keys(
            q, k, table.start, *rows, table.block_size, top_k, shared_by_group, min_recent, sink
        )
    else:
        means = ops.block_means(k, table.start, table.length, block_size)
        block_indices = ops.select_blocks(q, means, *rows, top_k, shared_by_group, min_recent, sink)
    pages = local_pages(k, v, table)
    index = ops.routing_index(q, block_indices, table.current_block, table.visible, pages.row)
    out, lse = ops.attend(
        q, pages, block_indices, table.current_block, table.visible, scale, out_dtype=q.dtype, index=index
    )
    return out, lse, block_indices, block_indices.new_empty(0) if index is None else index


@torch.library.custom_op("moba_cp::numbers_in_documents", mutates_args=())
def numbers_in_documents_op(
    selection: Tensor,
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """A selection of :func:`moba_attention_op` in the numbers in which it takes one from outside."""
    return numbers_in_documents(selection, _table(q, k, block_size, cu_seqlens, cu_seqlens_k).first)


@numbers_in_documents_op.register_fake
def _(selection, q, k, cu_seqlens, block_size, cu_seqlens_k=None):
    return torch.empty_like(selection, memory_format=torch.contiguous_format)


@torch.library.custom_op("moba_cp::moba_attention_backward", mutates_args=())
@without_autocast
def moba_attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    index: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    scale: float,
    deterministic: bool,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in their inputs' dtype."""
    table = _table(q, k, block_size, cu_seqlens, cu_seqlens_k)
    ops = backend(q)
    delta = ops.row_sums(dout, out)
    return ops.attend_backward(
        q, local_pages(k, v, table), block_indices, table.current_block, table.visible, scale, dout, lse, delta,
        deterministic, local_dtype=q.dtype, index=index if index.numel() else None,
    )  # fmt: skip


@moba_attention_op.register_fake
def _(
    q,
    k,
    v,
    cu_seqlens,
    block_size,
    top_k,
    scale,
    deterministic,
    cu_seqlens_k=None,
    given=None,
    check_given=False,
    *gate,
):
    n_tokens, n_heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(n_tokens, n_heads, dtype=WIDE[q.dtype])
    shape = n_tokens, Gate(*gate).n_groups(n_heads, k.shape[1]), top_k - 1
    block_indices = q.new_empty(shape if given is None else given.shape, dtype=torch.int32)
    n_blocks = block_count(k.shape[0], block_size, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)
    share = n_heads // block_indices.shape[1]
    index_size = backend(q).index_size(q, k.shape[1], n_blocks, block_indices.shape[2] + 1, share)
    return out, lse, block_indices, q.new_empty(index_size, dtype=torch.int32)


@moba_attention_backward_op.register_fake
def _(dout, q, k, v, out, lse, block_indices, index, cu_seqlens, block_size, scale, deterministic, cu_seqlens_k=None):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, block_size, _top_k, scale, deterministic, cu_seqlens_k, *_gate = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k)
    ctx.options = block_size, scale, deterministic
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dout, _dlse, _dindices, _dindex):
    *saved, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
    grads = moba_attention_backward_op(dout, *saved, cu_seqlens, *ctx.options, cu_seqlens_k)
    return *grads, *[None] * 12


moba_attention_op.register_autograd(_backward, setup_context=_save)
moba_attention_backward_op.register_autograd(refuse_second_derivatives)


def full_kernels(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    backend: str,
    deterministic: bool,
) -> tuple[dense.Ranges, Any]:
    """What the rows of q [T, Hq, D] see of k, and the backend of :mod:`moba_cp.dense` that serves; boundaries are on
    the CPU, and the other arguments are those of :func:`moba_cp.full_attention`."""
    rows = _bounds(q, cu_seqlens)
    keys = _bounds(k, cu_seqlens_k) if cu_seqlens is None or cu_seqlens_k is not None else rows
    key = q.shape[0], k.shape[0], rows, keys, q.device
    stream = table_stream(q.device)
    ranges = _ranges(*key) if stream is None else _kept_ranges(*key, stream)
    return ranges, dense.choose_backend(q, ranges, backend, deterministic)


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> bytes:
    return bytes_of(torch.tensor([0, x.shape[0]], dtype=torch.int64) if cu_seqlens is None else cu_seqlens)


def _ranges(
    n_rows: int, n_tokens: int, row_bounds: bytes, key_bounds: bytes, _device: torch.device, _stream: int | None = None
) -> dense.Ranges:
    """What rows see of a sequence that they are, or whose documents they end."""
    ends = bounds_of(row_bounds), bounds_of(key_bounds)
    cu_rows, cu_seqlens = (x.numpy() for x in ends)
    check_cu_seqlens(ends[0], n_rows), check_cu_seqlens(ends[1], n_tokens)
    tokens = [(0, n_tokens)]
    if row_bounds == key_bounds:
        return dense.build_ranges(tokens, tokens, cu_seqlens)
    check_rows_fit(*ends)
    lengths = np.diff(cu_rows)
    rows = [(int(end - n), int(n)) for end, n in zip(cu_seqlens[1:], lengths) if n]
    return dense.build_ranges(rows, tokens, cu_seqlens)


# Layers of a model, and their backward passes, follow one another with the same documents.
_kept_ranges = lru_cache(maxsize=8)(_ranges)


@torch.library.custom_op("moba_cp::full_attention", mutates_args=())
@without_autocast
def full_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
    deterministic: bool,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] in q's dtype, and lse [Hq, T] wide, as the kernels give it; arguments as of
    :func:`full_kernels`."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    ranges, kernels = full_kernels(q, k, cu_seqlens, cu_seqlens_k, backend, deterministic)
    partials = dense.Partials(q)
    dense.attend(q, k, v, ranges, scale, kernels, partials)
    out, lse = partials.result()
    return out.to(q.dtype).contiguous(), lse.t().contiguous()


@torch.library.custom_op("moba_cp::full_attention_backward", mutates_args=())
@without_autocast
def full_attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
    deterministic: bool,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in their inputs' dtype; lse is [Hq, T]."""
    q, k, v, dout = (x.contiguous() for x in (q, k, v, dout))
    ranges, kernels = full_kernels(q, k, cu_seqlens, cu_seqlens_k, backend, deterministic)
    sums = dense.Sum(q), dense.Sum(k), dense.Sum(v)
    dense.attend_backward(q, k, v, ranges, scale, kernels, dout, out, lse.t(), *sums, deterministic)
    dq, dk, dv = (x.narrow().contiguous() for x in sums)
    return dq, dk, dv


@full_attention_op.register_fake
def _(q, k, v, cu_seqlens, scale, backend, deterministic, cu_seqlens_k=None):
    n_tokens, n_heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(n_heads, n_tokens, dtype=WIDE[q.dtype])


@full_attention_backward_op.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, scale, backend, deterministic, cu_seqlens_k=None):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_full(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.options, cu_seqlens_k = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k)
    ctx.mark_non_differentiable(output[1])


def _backward_full(ctx, dout, _dlse):
    *saved, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
    grads = full_attention_backward_op(dout, *saved, cu_seqlens, *ctx.options, cu_seqlens_k)
    return *grads, None, None, None, None, None


full_attention_op.register_autograd(_backward_full, setup_context=_save_full)
full_attention_backward_op.register_autograd(refuse_second_derivatives)
