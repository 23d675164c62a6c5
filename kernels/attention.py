"""Block attention of rows over one storage: launches of the kernels, slice by slice (see :mod:`.work`).

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, n blocks, S selected blocks per
row, S' = S + 1 where rows also see their current block, else S.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import hopper
from .backward import DQ_ATOMIC, DQ_NONE, TASK_INFO, _dkdv_kernel, _dq_kernel, _finish_kernel, _visit_table_kernel
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
from .routing import Tasks, build_routing
from .tuned import Tile
from .work import Call, Work, backward_work, cached_work, count_sums, cut, forward_work, index_size, part_dtype

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
        attend(
            q[:, at], pages.of_heads(kv_heads), block_indices[:, at], current_block, visible, scale, out_dtype,
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
            part = _Slice(call, work, i, some_heads)
            _attend_slice(part, work.tile, work.tasks[i], out[part.rows, part.heads], lse[part.rows, part.heads], join)
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
        attend_backward(
            q[:, at], pages.of_heads(kv_heads), block_indices[:, at], current_block, visible, scale,
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
    grads = _Gradients(dout, lse, delta, dq, dk, dv, add_dq=out is not None and not overwrite_dq)
    head_slices = cut(kv_heads, work.kv_step)
    for some_heads in head_slices:
        heads = some_heads.stop - some_heads.start
        if work.direct:
            n_sums = count_sums(n_rows, n_heads * heads // pages.row.shape[0] * n_slots, pages, heads, work.tile)
            shape = 2, n_sums * pages.block_size, dim
            sum_k, sum_v = torch.zeros(shape, dtype=torch.float32, device=q.device)
            grads = replace(grads, sum_k=sum_k, sum_v=sum_v)
        elif local_dtype is not None:
            shape = 2, pages.k.shape[0], heads, dim
            sum_k, sum_v = torch.zeros(shape, dtype=torch.float32, device=q.device)
            grads = replace(grads, dk=sum_k, dv=sum_v, first_head=some_heads.start)
        for i in range(len(work.rows)):
            is_last = some_heads is head_slices[-1] and i == len(work.rows) - 1
            part = _Slice(call, work, i, some_heads)
            _backward_slice(part, work, i, grads, deterministic, dkdv_done if is_last else None)
        if local_dtype is not None and not work.direct:
            dk[:, some_heads], dv[:, some_heads] = grads.dk, grads.dv
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


@dataclass(frozen=True)
class _Gradients:
    """What a backward reads of the output, and the gradients that it writes."""

    dout: Tensor
    """[N, Hq, D]."""
    lse: Tensor
    """[N, Hq] float32."""
    delta: Tensor
    """[N, Hq] float32."""
    dq: Tensor
    """[N, Hq, D]."""
    dk: Tensor
    """[R, heads, D], the storage's, or float32 sums of the heads from ``first_head`` on."""
    dv: Tensor
    """Like ``dk``."""
    add_dq: bool
    """Whether dq is added to what ``dq`` holds."""
    sum_k: Tensor | None = None
    """[places * B, D] float32, sums of lists that are longer than a task, where the others are stored at once."""
    sum_v: Tensor | None = None
    """Like ``sum_k``."""
    first_head: int = 0


class _Slice:
    """What the launches share for some rows of some KV heads: their tensors, strides and compile-time constants."""

    def __init__(self, call: Call, work: Work, i_rows: int, kv_heads: slice):
        q, pages = call.q, call.pages
        n_kv, self.n_blocks = pages.row.shape
        self.rows, self.routing = work.rows[i_rows], work.routings[i_rows]
        block_indices, self.current_block, self.visible = work.visits[i_rows]
        self.scale, self.block_size = call.scale, pages.block_size
        self.n_slots = call.n_slots
        self.heads = pages.query_heads(kv_heads, q.shape[1])
        self.n_heads = self.heads.stop - self.heads.start
        self.block_indices = block_indices[:, self.heads]
        self.q = q[self.rows, self.heads]
        self.n_rows, _, self.dim = self.q.shape
        self.n_visits = self.n_rows * self.n_heads * self.n_slots
        self.k, self.v, self.length = pages.k, pages.v, pages.length
        self.page_row, self.page_head = pages.row[kv_heads], pages.head[kv_heads]
        self.n_kv, self.n_lists = self.page_row.shape[0], self.page_row.numel()
        self.first_list = kv_heads.start * self.n_blocks
        self.list_start = self.routing.list_start[self.first_list : self.first_list + self.n_lists + 1]
        self.group, self.n_selected = q.shape[1] // n_kv, block_indices.shape[2]
        self.q_strides = dict(s_qt=self.q.stride(0), s_qh=self.q.stride(1))
        self.kv_strides = dict(
            s_kr=self.k.stride(0), s_kh=self.k.stride(1), s_vr=self.v.stride(0), s_vh=self.v.stride(1)
        )
        self.visit_constants = dict(G=self.group, S=self.n_selected, SLOTS=self.n_slots)
        self.dot_constants = dict(D=self.dim, BD=padded_dim(self.dim), PRECISION=dot_precision(q.dtype))

    def grid(self, tasks: Tasks, programs: int = 1) -> tuple[int]:
        """Programs for all tasks of the slice, ``programs`` each."""
        return (tasks.count(self.n_visits, self.n_lists) * programs,)

    def task_args(self, tasks: Tasks) -> dict[str, int]:
        """What :func:`read_task` wants besides the tensors and R."""
        return dict(n_entries=tasks.table.shape[0], first_list=self.first_list, n_lists=self.n_lists)


def _attend_slice(part: _Slice, tile: Tile, tasks: Tasks, out: Tensor, lse: Tensor, join: bool) -> None:
    """``out`` and ``lse`` are those of the slice."""
    q = part.q
    shape = part.n_rows, part.n_heads, part.n_slots
    parts = torch.empty(*shape, part.dim, dtype=q.dtype, device=q.device)
    parts_lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    kernel = _short_block_kernel if part.block_size <= tile.bn else _long_block_kernel
    with on_device(q):
        if tile.fetch_registers:
            hopper.launch_forward(part, tile, tasks, parts, parts_lse, part.scale * LOG2E)
        else:
            kernel[part.grid(tasks)](
                q=q, k=part.k, v=part.v, part=parts, part_lse=parts_lse,
                visits=part.routing.visits, tasks=tasks.table, list_start=part.list_start, visible=part.visible,
                scale_log2=part.scale * LOG2E, task_rows=tasks.rows, **part.task_args(tasks),
                n_blocks=part.n_blocks, n_heads=part.n_heads, **part.q_strides, **part.kv_strides,
                **part.visit_constants, **part.dot_constants, BM=tile.bm, BN=tile.bn, STAGES=tile.stages,
                **launch_options(tile.warps),
            )  # fmt: skip
    merge_visits(parts, parts_lse, out, lse, join)


def _backward_slice(
    part: _Slice, work: Work, i_rows: int, grads: _Gradients, deterministic: bool,
    dkdv_done: Callable[[], None] | None,
) -> None:  # fmt: skip
    tile, mode, tasks = work.tile, work.mode, work.tasks[i_rows]
    q, k, v = part.q, part.k, part.v
    key_tiles = cdiv(part.block_size, tile.bn)
    dout, lse, delta, dq = (x[part.rows, part.heads] for x in (grads.dout, grads.lse, grads.delta, grads.dq))
    shape = part.n_kv, part.n_rows, part.group
    if mode == DQ_ATOMIC.value:
        part_dq = torch.zeros(*shape, part.dim, dtype=torch.float32, device=q.device)
    else:
        part_dq = torch.empty(*shape, part.n_slots, part.dim, dtype=part_dtype(q.dtype), device=q.device)
    table = torch.empty(3, part.n_visits, dtype=torch.int32, device=q.device)
    stats = torch.empty(part.n_visits, dtype=torch.int64, device=q.device)
    task_info = torch.empty(*part.grid(tasks, TASK_INFO.value + key_tiles), dtype=torch.int32, device=q.device)
    turn = None
    if deterministic:
        turn = torch.zeros(1 + part.n_lists * key_tiles, dtype=torch.int32, device=q.device)
    dk_strides = dict(s_dkr=grads.dk.stride(0), s_dkh=grads.dk.stride(1))
    with on_device(q):
        _visit_table_kernel[part.grid(tasks)](
            visits=part.routing.visits, tasks=tasks.table, list_start=part.list_start, visible=part.visible,
            lse=lse, delta=delta, table=table, stats=stats, task_info=task_info,
            n_visits=part.n_rows * part.group * part.n_slots, task_rows=tasks.rows, **part.task_args(tasks),
            n_blocks=part.n_blocks, room=part.n_visits,
            s_token=q.stride(0) // part.dim, s_lt=lse.stride(0), s_dt=delta.stride(0),
            **part.visit_constants, BLOCK=512, KEY_TILES=key_tiles, BN=tile.bn,
            TILES=min(8, next_power_of_2(key_tiles)), **launch_options(4),
        )  # fmt: skip
        if tile.fetch_registers:
            hopper.launch_dkdv(part, tile, tasks, key_tiles, dout, part_dq, grads, table, stats, task_info)
        else:
            _dkdv_kernel[part.grid(tasks, key_tiles)](
                q=q, k=k, v=v, dout=dout, dq=part_dq, dk=grads.dk, dv=grads.dv, sum_k=grads.sum_k, sum_v=grads.sum_v,
                table=table, stats=stats, task_info=task_info, turn=turn,
                scale=part.scale, room=part.n_visits, block_size=part.block_size, first_head=grads.first_head,
                **part.kv_strides, **dk_strides, SLOTS=part.n_slots, **part.dot_constants,
                BM=tile.bm, BN=tile.bn, KEY_TILES=key_tiles, DQ=mode, ORDERED=deterministic, DIRECT=work.direct,
                STAGES=tile.stages, **launch_options(tile.warps),
            )  # fmt: skip
        if work.direct:
            _finish_kernel[(part.n_lists, cdiv(part.block_size, 32))](
                sum_k=grads.sum_k, sum_v=grads.sum_v, dk=grads.dk, dv=grads.dv, list_start=part.list_start,
                page_row=part.page_row, page_head=part.page_head, length=part.length,
                room=part.n_visits, task_rows=tasks.rows, n_lists=part.n_lists, n_blocks=part.n_blocks,
                block_size=part.block_size, **dk_strides, s_row=part.page_row.stride(0),
                s_head=part.page_head.stride(0), s_head_n=part.page_head.stride(1),
                D=part.dim, BD=padded_dim(part.dim), BN=32, **launch_options(4),
            )  # fmt: skip
        if dkdv_done is not None:
            dkdv_done()
        if mode == DQ_NONE.value:
            _launch_dq(part, work.dq_tile, work.dq_tasks[i_rows], dout, part_dq, table, stats)
    if mode == DQ_ATOMIC.value:
        scale_rows(part_dq, dq, part.scale, grads.add_dq)
    else:
        sum_visits(
            part_dq, dq, part.block_indices, part.current_block, part.visible, part.page_row, part.scale, grads.add_dq
        )


def _launch_dq(part: _Slice, tile: Tile, tasks: Tasks, dout: Tensor, part_dq: Tensor, table, stats) -> None:
    """Partial dQ of every visit, where the kernel of dK and dV does not produce it."""
    if tile.fetch_registers:
        hopper.launch_dq(part, tile, tasks, dout, part_dq, table, stats)
        return
    with on_device(part.q):
        _dq_kernel[part.grid(tasks)](
            q=part.q, k=part.k, v=part.v, dout=dout, part=part_dq, table=table, stats=stats,
            tasks=tasks.table, list_start=part.list_start, scale=part.scale, room=part.n_visits,
            task_rows=tasks.rows, **part.task_args(tasks), **part.kv_strides, **part.dot_constants,
            BM=tile.bm, BN=tile.bn, STAGES=tile.stages, **launch_options(tile.warps),
        )  # fmt: skip
