"""Block attention of rows over one storage: launches of the kernels, slice by slice (see :mod:`.work`).

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, n blocks, S selected blocks per
row, S' = S + 1 where rows also see their current block, else S.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import hopper
from .backward import DQ_ATOMIC, DQ_NONE, FACTS, _finish_kernel, _key_kernel, _query_kernel, _visit_table_kernel
from .common import (
    cdiv,
    check_head_dim,
    check_limit,
    check_unit_stride,
    dot_precision,
    launch_options,
    next_power_of_2,
    on_device,
    padded_dim,
)
from .forward import _long_block_kernel, _short_block_kernel
from .merge import merge_visits, scale_rows, sum_visits
from .routing import Routing, Tasks, build_routing
from .tuned import Tile
from .work import Call, Work, backward_work, cached_work, cut, forward_work, index_size, part_dtype, sum_places

LOG2E = 1.4426950408889634


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
    """Attention of rows to those of their blocks that lie in ``pages``.

    Args:
        q: [N, Hq, D] float32, bfloat16 or float16.
        pages: a :class:`moba_cp.blocks.Pages`; Hkv is ``pages.row.shape[0]``.
        block_indices: [N, Hq, S] int32 block ids seen whole; -1, or a block not in ``pages``, is skipped.
        current_block: [N] int32, block id of which only the first ``visible[t]`` keys are seen; None for none.
        visible: [N] int32, with ``current_block``.
        scale: factor of the scores.
        out_dtype: of the output; float32 if it is None.
        scratch_bytes: bound of the memory for partial results, kept by working in slices of heads and rows; by default
            FORWARD_SCRATCH, or the size of q if that is more.
        index: of :func:`routing_index`, made here for these ``pages`` if it is None.
        kv_heads: with ``out``: the KV heads to compute; all if it is None.
        out: the output, with unit stride in D, and the log-sum-exp over other keys: the result is merged into both.
            The output may hold anything where the log-sum-exp is -inf.
        overwrite_out: ``out`` holds nothing yet and is overwritten; its output may have any dtype.
        task_cache: a dict, empty at first, for calls that differ only in ``kv_heads``, ``out`` and the storages. These
            must have the same layout, and ``q``, ``block_indices``, ``index``, ``pages.row`` and ``pages.head`` must be
            the same objects. The first call stores the tasks of all heads in it, and the others reuse them.

    Returns:
        out [N, Hq, D] and lse [N, Hq] float32; a row that sees nothing has out 0 and lse -inf.
    """
    check_head_dim(q.shape[2])
    out_dtype = out_dtype or torch.float32
    if index is None and kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        some = q[:, at], pages.of_heads(kv_heads), block_indices[:, at], current_block, visible, scale, out_dtype
        attend(*some, out=tuple(x[:, at] for x in out), overwrite_out=overwrite_out, scratch_bytes=scratch_bytes)
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
    for rows, visits, routing, tasks in zip(work.rows, work.visits, work.routings, work.tasks, strict=True):
        for some in cut(kv_heads, work.kv_step):
            _attend_slice(q, pages, *visits, scale, out, lse, join, routing, work.tile, tasks, rows, some)
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
    """Gradients of :func:`attend`, as the part that this storage has in the attention over all storages.

    Args:
        dout: [N, Hq, D] in q's dtype, gradient of the final output.
        lse: [N, Hq] float32, log-sum-exp over everything the row sees, in all storages.
        delta: [N, Hq] float32, row sums of ``dout * out`` of the final output.
        deterministic: bit-identical results from run to run.
        local_dtype: dtype of the three gradients where ``pages`` are :func:`moba_cp.blocks.local_pages`; float32
            sums of dk and dv then exist for a few heads at a time.
        scratch_bytes: as in :func:`attend`, by default BACKWARD_SCRATCH or the size of q.
        index, kv_heads: as in :func:`attend`; the index is used where rows need not be cut, else made again.
        out: dq, dk and dv to add the gradients to; new tensors if it is None. They are float32 with unit stride in D,
            dk and dv have equal strides, and ``local_dtype`` is None.
        overwrite_dkv: dk and dv of ``out`` hold nothing yet, and may have any dtype. Rows of blocks in ``pages`` are
            overwritten, others are kept or zeroed, so one call must cover all blocks of the storage.
        overwrite_dq: dq of ``out`` holds nothing yet, and may have any dtype, because this is the first storage.
        dkdv_done: called once all kernels that write dk and dv are launched; dQ may be computed after.
        task_cache: as in :func:`attend`.

    Returns:
        dq [N, Hq, D], and dk, dv shaped like the storages, zero where no page lies; float32 unless ``local_dtype``.
    """
    assert out is None or local_dtype is None and out[1].stride() == out[2].stride()
    check_head_dim(q.shape[2])
    if index is None and kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        rows = dout[:, at], lse[:, at], delta[:, at]
        some = (
            q[:, at],
            pages.of_heads(kv_heads),
            block_indices[:, at],
            current_block,
            visible,
            scale,
            *rows,
            deterministic,
        )
        rest = dict(overwrite_dkv=overwrite_dkv, overwrite_dq=overwrite_dq, dkdv_done=dkdv_done)
        attend_backward(*some, scratch_bytes=scratch_bytes, out=(out[0][:, at], *out[1:]), **rest)
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
    how = dout, deterministic, local_dtype is not None, overwrite_dkv
    work = cached_work("backward", lambda heads: backward_work(call, heads, *how), call, task_cache)
    if overwrite_dkv and not work.direct:
        if dk.dtype == torch.float32:
            dk.zero_(), dv.zero_()
        else:
            dk, dv, dkdv_done = _wide_sums(dk, dv, dkdv_done)
    head_slices = cut(kv_heads, work.kv_step)
    for some_heads in head_slices:
        heads = some_heads.stop - some_heads.start
        sums = dk, dv, None, None, 0
        if work.direct:
            n_sums = sum_places(n_rows, n_heads * heads // pages.row.shape[0] * n_slots, pages, heads, work.tile)
            shape = 2, n_sums * pages.block_size, dim
            sums = dk, dv, *torch.zeros(shape, dtype=torch.float32, device=q.device), 0
        elif local_dtype is not None:
            shape = 2, pages.k.shape[0], heads, dim
            sums = *torch.zeros(shape, dtype=torch.float32, device=q.device), None, None, some_heads.start
        for i, rows in enumerate(work.rows):
            rest = dout, lse, delta, deterministic, out is not None and not overwrite_dq, dq, *sums
            done = dkdv_done if some_heads is head_slices[-1] and rows is work.rows[-1] else None
            _backward_slice(q, pages, *work.visits[i], scale, *rest, work, i, some_heads, done)
        if local_dtype is not None and not work.direct:
            dk[:, some_heads], dv[:, some_heads] = sums[:2]
    return out or (dq, dk, dv)


def routing_index(
    q: Tensor, block_indices: Tensor, current_block: Tensor | None, visible: Tensor | None, page_row: Tensor
) -> Tensor | None:
    """What :func:`attend` and :func:`attend_backward` of the same rows share: which rows visit each block.

    Args:
        page_row: [Hkv, n] int64, -1 for blocks that nobody will attend to by this index. It may serve several storages,
            each with some of the blocks.

    Returns:
        int32, see :class:`.routing.Routing`; None where rows have to be cut, and an index made for each slice.
    """
    n_kv, n_blocks = page_row.shape
    if index_size(q, n_kv, n_blocks, block_indices.shape[2] + (current_block is not None)) == 0:
        return None
    return build_routing(_whole_slots(block_indices), current_block, visible, page_row).flat


def _wide_sums(dk: Tensor, dv: Tensor, dkdv_done: Callable[[], None] | None):
    """What slices of rows add to in place of dk and dv, and what to call once they have, in place of ``dkdv_done``."""
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
    return check_unit_stride(q), pages, _whole_slots(block_indices)


def _whole_slots(block_indices: Tensor) -> Tensor:
    """``block_indices`` [N, Hq, S] with all slots of a row side by side."""
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


class _Slice:
    """What forward and backward launches share for some rows of some KV heads: these, their blocks and compile-time
    constants."""

    def __init__(
        self, q: Tensor, pages, block_indices: Tensor, current_block: Tensor | None, rows: slice, kv_heads: slice
    ):
        """``block_indices`` and ``current_block`` are of these rows."""
        n_kv, self.n_blocks = pages.row.shape
        group = q.shape[1] // n_kv
        self.n_slots = block_indices.shape[2] + (current_block is not None)
        self.block_size = pages.block_size
        self.heads = pages.query_heads(kv_heads, q.shape[1])
        self.n_heads = self.heads.stop - self.heads.start
        self.q = q[rows, self.heads]
        self.n_rows = self.q.shape[0]
        self.n_visits = self.n_rows * self.n_heads * self.n_slots
        self.k, self.v, self.length = pages.k, pages.v, pages.length
        self.row, self.head = pages.row[kv_heads], pages.head[kv_heads]
        self.lists = slice(kv_heads.start * self.n_blocks, kv_heads.stop * self.n_blocks + 1)
        self.pages = self.row, self.head, self.length
        self.strides = (*self.q.stride()[:2], *self.k.stride()[:2], *self.v.stride()[:2])
        self.page_strides = self.row.stride(0), *self.head.stride()
        self.constants = dict(
            G=group, S=block_indices.shape[2], SLOTS=self.n_slots, D=q.shape[2], BD=padded_dim(q.shape[2]),
            PRECISION=dot_precision(q.dtype),
        )  # fmt: skip

    def grid(self, tasks: Tasks, programs: int = 1) -> tuple[int]:
        """Programs for all tasks of the slice, ``programs`` each."""
        return (tasks.count(self.n_visits, self.row.numel()) * programs,)

    def task_args(self, tasks: Tasks) -> tuple[int, ...]:
        """What :func:`read_task` wants beside the tensors."""
        return tasks.table.shape[0], tasks.rows, self.lists.start, self.row.numel()


def _attend_slice(
    q, pages, block_indices, current_block, visible, scale, out, lse, join: bool, routing: Routing, tile: Tile,
    tasks: Tasks, rows: slice, kv_heads: slice,
) -> None:  # fmt: skip
    part = _Slice(q, pages, block_indices, current_block, rows, kv_heads)
    shape = part.n_rows, part.n_heads, part.n_slots
    parts = torch.empty(*shape, q.shape[2], dtype=q.dtype, device=q.device)
    parts_lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    kernel = _short_block_kernel if pages.block_size <= tile.bn else _long_block_kernel
    with on_device(q):
        if tile.fetch_registers:
            hopper.launch_forward(part, tile, tasks, routing, visible, parts, parts_lse, scale * LOG2E)
        else:
            kernel[part.grid(tasks)](
                part.q, part.k, part.v, parts, parts_lse, routing.visits, tasks.table, routing.list_start[part.lists],
                visible, scale * LOG2E, *part.task_args(tasks), part.n_blocks, part.n_heads, *part.strides,
                **part.constants, BM=tile.bm, BN=tile.bn, STAGES=tile.stages, **launch_options(tile.warps),
            )  # fmt: skip
    merge_visits(parts, parts_lse, out[rows, part.heads], lse[rows, part.heads], join)


def _backward_slice(
    q, pages, block_indices, current_block, visible, scale, dout, lse, delta, deterministic, add: bool, dq, dk, dv,
    sum_k, sum_v, first_head: int, work: Work, i_rows: int, kv_heads: slice, dkdv_done: Callable[[], None] | None,
) -> None:  # fmt: skip
    tile, mode, routing, key_tasks = work.tile, work.mode, work.routings[i_rows], work.tasks[i_rows]
    rows = work.rows[i_rows]
    part = _Slice(q, pages, block_indices, current_block, rows, kv_heads)
    key_tiles = cdiv(pages.block_size, tile.bn)
    dout, lse, delta, dq = (x[rows, part.heads] for x in (dout, lse, delta, dq))
    n_rows, group = part.n_rows, part.constants["G"]
    shape = part.row.shape[0], n_rows, group
    if mode == DQ_ATOMIC.value:
        part_dq = torch.zeros(*shape, q.shape[2], dtype=torch.float32, device=q.device)
    else:
        part_dq = torch.empty(*shape, part.n_slots, q.shape[2], dtype=part_dtype(q.dtype), device=q.device)
    table = torch.empty(3, part.n_visits, dtype=torch.int32, device=q.device)
    stats = torch.empty(part.n_visits, dtype=torch.int64, device=q.device)
    facts = torch.empty(*part.grid(key_tasks, FACTS.value + key_tiles), dtype=torch.int32, device=q.device)
    turn = None
    if deterministic:
        turn = torch.zeros(1 + part.row.numel() * key_tiles, dtype=torch.int32, device=q.device)
    list_start = routing.list_start[part.lists]
    constants = dict(D=q.shape[2], BD=padded_dim(q.shape[2]), PRECISION=dot_precision(q.dtype))
    inputs = part.q, part.k, part.v, dout
    with on_device(q):
        _visit_table_kernel[part.grid(key_tasks)](
            routing.visits, key_tasks.table, list_start, visible, lse, delta, table, stats, facts,
            n_rows * group * part.n_slots, *part.task_args(key_tasks), part.n_blocks, part.n_visits,
            q.stride(0) // q.shape[2], lse.stride(0), delta.stride(0),
            G=group, S=block_indices.shape[2], SLOTS=part.n_slots, BLOCK=512,
            KEY_TILES=key_tiles, BN=tile.bn, TILES=min(8, next_power_of_2(key_tiles)), **launch_options(4),
        )  # fmt: skip
        rest = dk, dv, sum_k, sum_v, table, stats, facts
        if tile.fetch_registers:
            hopper.launch_keys(part, tile, key_tasks, key_tiles, dout, part_dq, *rest, scale, first_head)
        else:
            _key_kernel[part.grid(key_tasks, key_tiles)](
                *inputs, part_dq, *rest, turn, scale, part.n_visits, pages.block_size, first_head,
                *part.strides[2:], *dk.stride()[:2], **constants,
                SLOTS=part.n_slots, BM=tile.bm, BN=tile.bn, KEY_TILES=key_tiles, DQ=mode,
                ORDERED=deterministic, DIRECT=sum_k is not None, STAGES=tile.stages, **launch_options(tile.warps),
            )  # fmt: skip
        if sum_k is not None:
            _finish_kernel[(part.row.numel(), cdiv(pages.block_size, 32))](
                sum_k, sum_v, dk, dv, list_start, *part.pages,
                part.n_visits, key_tasks.rows, part.row.numel(), part.n_blocks, pages.block_size,
                *dk.stride()[:2], *part.page_strides, D=q.shape[2], BD=padded_dim(q.shape[2]), BN=32,
                **launch_options(4),
            )  # fmt: skip
        if dkdv_done is not None:
            dkdv_done()
        tile, query_tasks = work.query_tile, work.query_tasks[i_rows]
        if mode == DQ_NONE.value and tile.fetch_registers:
            hopper.launch_queries(part, tile, query_tasks, dout, part_dq, table, stats, list_start, scale)
        elif mode == DQ_NONE.value:
            _query_kernel[part.grid(query_tasks)](
                *inputs, part_dq, table, stats, query_tasks.table, list_start,
                scale, part.n_visits, *part.task_args(query_tasks), *part.strides[2:], **constants,
                BM=tile.bm, BN=tile.bn, STAGES=tile.stages, **launch_options(tile.warps),
            )  # fmt: skip
    if mode == DQ_ATOMIC.value:
        scale_rows(part_dq, dq, scale, add)
    else:
        sum_visits(part_dq, dq, block_indices[:, part.heads], current_block, visible, part.row, scale, add)
