"""Attention of rows to the blocks of one storage, forward and backward: slice by slice, each a few launches.

:mod:`.work` says how a call is cut into slices, :mod:`.launches` runs the kernels for one of them.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, n blocks, S selected blocks per
row, S' = S + 1 where rows also see their current block, else S. ``block_indices`` is [N, Hq, S], or [N, Hkv, S] where
the query heads of a KV head share their selection.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .common import check_head_dim, check_limit, check_unit_stride
from .launches import Gradients, Slice, launch_backward, launch_forward
from .routing import build_routing
from .work import (
    Call,
    backward_work,
    cached_work,
    cut,
    forward_work,
    index_size,
    kernel_share,
    selecting_together,
)


def attend(
    q: Tensor,
    pages,
    block_indices: Tensor,
    current_block: Tensor | None,
    visible: Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None = None,
    index: Tensor | None = None,
    kv_heads: slice | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    overwrite_out: bool = False,
    task_cache: dict | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`moba_cp.eager.attend`; q is float32, bfloat16 or float16, and wide means float32.

    Args:
        index: of :func:`routing_index`, made here for these ``pages`` if it is None.
        out: the output has unit stride in D.
        task_cache: the first call stores the tasks of all heads in it, and the others reuse them.
        scratch_bytes: bound of the memory for partial results, kept by working in slices of heads and rows; by default
            FORWARD_SCRATCH, or the size of q if that is more.
    """
    check_head_dim(q.shape[2])
    out_dtype = out_dtype or torch.float32
    if index is None and kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        attend(
            q[:, at], pages.of_heads(kv_heads), _of_heads(block_indices, at, q), current_block, visible, scale,
            out_dtype,
            out=tuple(x[:, at] for x in out), overwrite_out=overwrite_out, scratch_bytes=scratch_bytes,
        )  # fmt: skip
        return out
    q, pages, block_indices = _kernel_inputs(q, pages, block_indices)
    n_rows, n_heads, dim = q.shape
    n_slots = block_indices.shape[2] + (current_block is not None)
    kv_heads = _all_or(kv_heads, pages.row.shape[0])
    if n_slots * n_rows * n_heads * pages.row.shape[1] * pages.k.shape[0] == 0:
        if out is not None and overwrite_out:
            at = pages.query_heads(kv_heads, n_heads)
            out[0][:, at], out[1][:, at] = 0, -torch.inf
        return out or (
            torch.zeros(n_rows, n_heads, dim, dtype=out_dtype, device=q.device),
            torch.full((n_rows, n_heads), -torch.inf, dtype=torch.float32, device=q.device),
        )
    join = out is not None and not overwrite_out
    out, lse = out or (
        torch.empty(n_rows, n_heads, dim, dtype=out_dtype, device=q.device),
        torch.empty(n_rows, n_heads, dtype=torch.float32, device=q.device),
    )

    call = Call(q, pages, block_indices, current_block, visible, scale, kv_heads, index, scratch_bytes)
    work = cached_work("forward", lambda heads: forward_work(call, heads), call, task_cache)
    for i in range(len(work.rows)):
        for some_heads in cut(kv_heads, work.kv_step):
            part = Slice(call, work, i, some_heads)
            launch_forward(part, out[part.rows, part.heads], lse[part.rows, part.heads], join)
    return out, lse


def attend_backward(
    q: Tensor,
    pages,
    block_indices: Tensor,
    current_block: Tensor | None,
    visible: Tensor | None,
    scale: float,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    deterministic: bool = False,
    local_dtype: torch.dtype | None = None,
    index: Tensor | None = None,
    kv_heads: slice | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    overwrite_dkv: bool = False,
    overwrite_dq: bool = False,
    dkdv_done: Callable[[], None] | None = None,
    task_cache: dict | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moba_cp.eager.attend_backward`; lse and delta are float32, and wide means float32.

    Args:
        deterministic: bit-identical results from run to run.
        local_dtype: float32 sums of dk and dv exist for a few heads at a time.
        index: used where rows need not be cut, else made again.
        out: dq, dk and dv have unit stride in D.
        dkdv_done: called once all kernels that write dk and dv are launched; dQ may be computed after.
        scratch_bytes: as in :func:`attend`, by default BACKWARD_SCRATCH or the size of q.
    """
    assert out is None or local_dtype is None and out[1].stride() == out[2].stride()
    check_head_dim(q.shape[2])
    if index is None and kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        attend_backward(
            q[:, at], pages.of_heads(kv_heads), _of_heads(block_indices, at, q), current_block, visible, scale,
            dout[:, at], lse[:, at], delta[:, at], deterministic, out=(out[0][:, at], *out[1:]),
            overwrite_dkv=overwrite_dkv, overwrite_dq=overwrite_dq, dkdv_done=dkdv_done, scratch_bytes=scratch_bytes,
        )  # fmt: skip
        return out
    q, pages, block_indices = _kernel_inputs(q, pages, block_indices)
    q, dout = _row_major(q), _row_major(dout.to(q.dtype))
    if q.stride(0) != dout.stride(0):
        q, dout = q.contiguous(), dout.contiguous()
    lse, delta = lse.contiguous(), delta.contiguous()
    n_rows, n_heads, dim = q.shape
    check_limit("the number of rows of q, times heads,", q.stride(0) // dim * n_rows, "use more ranks")
    n_slots = block_indices.shape[2] + (current_block is not None)
    kv_heads = _all_or(kv_heads, pages.row.shape[0])
    grad_dtype = local_dtype or torch.float32
    nothing = n_slots * n_rows * n_heads * pages.row.shape[1] * pages.k.shape[0] == 0
    new = torch.zeros if nothing or local_dtype is None else torch.empty
    if out is None:
        dk, dv = (new(x.shape, dtype=grad_dtype, device=q.device) for x in (pages.k, pages.v))
        if nothing:
            return torch.zeros(n_rows, n_heads, dim, dtype=grad_dtype, device=q.device), dk, dv
        dq = torch.empty(n_rows, n_heads, dim, dtype=grad_dtype, device=q.device)
    else:
        dq, dk, dv = out
        if nothing:
            if overwrite_dkv:
                dk.zero_(), dv.zero_()
            if overwrite_dq:
                dq[:, pages.query_heads(kv_heads, n_heads)] = 0
            if dkdv_done is not None:
                dkdv_done()
            return out

    call = Call(q, pages, block_indices, current_block, visible, scale, kv_heads, index, scratch_bytes)
    make = lambda heads: backward_work(call, heads, dout, deterministic, local_dtype is not None, overwrite_dkv)
    work = cached_work("backward", make, call, task_cache)
    if overwrite_dkv and not work.direct:
        if dk.dtype == torch.float32:
            dk.zero_(), dv.zero_()
        else:
            dk, dv, dkdv_done = _wide_sums(dk, dv, dkdv_done)
    grads = Gradients(dout, lse, delta, dq, dk, dv, add_dq=out is not None and not overwrite_dq)
    head_slices = cut(kv_heads, work.kv_step)
    for some_heads in head_slices:
        if local_dtype is not None and not work.direct:
            shape = 2, pages.k.shape[0], some_heads.stop - some_heads.start, dim
            sum_k, sum_v = torch.zeros(shape, dtype=torch.float32, device=q.device)
            grads = replace(grads, dk=sum_k, dv=sum_v, first_head=some_heads.start)
        for i in range(len(work.rows)):
            is_last = some_heads is head_slices[-1] and i == len(work.rows) - 1
            part = Slice(call, work, i, some_heads)
            launch_backward(part, grads, deterministic, dkdv_done if is_last else None)
        if local_dtype is not None and not work.direct:
            dk[:, some_heads], dv[:, some_heads] = grads.dk, grads.dv
    return out or (dq, dk, dv)


def routing_index(
    q: Tensor, block_indices: Tensor, current_block: Tensor | None, visible: Tensor | None, page_row: Tensor
) -> Tensor | None:
    """Which rows visit each block: made once for all calls of :func:`attend` and :func:`attend_backward` on these rows.

    Args:
        page_row: [Hkv, n] int64, -1 for blocks that no call with this index attends to. The index may serve several
            storages, each with some of the blocks.

    Returns:
        int32, see :class:`.routing.Routing`; None where rows have to be cut, and an index made for each slice.
    """
    n_kv, n_blocks = page_row.shape
    share = selecting_together(q, block_indices)
    if index_size(q, n_kv, n_blocks, block_indices.shape[2] + (current_block is not None), share) == 0:
        return None
    return build_routing(_whole_slots(block_indices, q), current_block, visible, page_row).flat


def _wide_sums(dk: Tensor, dv: Tensor, dkdv_done: Callable[[], None] | None):
    """Sums to which slices of rows add instead of dk and dv, and what to call then instead of ``dkdv_done``."""
    sum_k, sum_v = torch.zeros(2, *dk.shape, dtype=torch.float32, device=dk.device)

    def round_off() -> None:
        dk.copy_(sum_k), dv.copy_(sum_v)
        if dkdv_done is not None:
            dkdv_done()

    return sum_k, sum_v, round_off


def _kernel_inputs(q: Tensor, pages, block_indices: Tensor):
    if not (all(x.stride(-1) == 1 for x in (pages.k, pages.v, pages.row)) and pages.length.is_contiguous()):
        k, v, row = (check_unit_stride(x) for x in (pages.k, pages.v, pages.row))
        pages = replace(pages, k=k, v=v, row=row, length=pages.length.contiguous())
    return check_unit_stride(q), pages, _whole_slots(block_indices, q)


def _of_heads(block_indices: Tensor, heads: slice, q: Tensor) -> Tensor:
    """The selection of some query heads of q, all those of some KV heads."""
    share = selecting_together(q, block_indices)
    return block_indices[:, heads.start // share : heads.stop // share]


def _whole_slots(block_indices: Tensor, q: Tensor) -> Tensor:
    """``block_indices`` with all slots of a row side by side, and for each query head where too many share one."""
    share = selecting_together(q, block_indices)
    if kernel_share(share) < share:
        return block_indices.repeat_interleave(share, 1)
    return (
        block_indices
        if block_indices.stride(2) == 1 and block_indices.stride(1) == block_indices.shape[2]
        else block_indices.contiguous()
    )


def _all_or(kv_heads: slice | None, n_kv: int) -> slice:
    return slice(0, n_kv) if kv_heads is None else kv_heads


def _row_major(x: Tensor) -> Tensor:
    """``x`` [N, Hq, D] itself if its rows of D lie at multiples of D, heads next to one another; else a copy."""
    dim = x.shape[2]
    fits = x.stride(2) == 1 and x.stride(1) == dim and x.stride(0) % dim == 0
    return x if fits and x.stride(0) // dim * x.shape[0] < 2**31 else x.contiguous()
