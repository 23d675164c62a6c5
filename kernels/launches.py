"""Launches of the kernels of :mod:`.forward` and :mod:`.backward` for one slice of rows and KV heads.

Legend: N query rows, Hq query heads, D head dim, B block size, R storage rows; those of the slice where it has some.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import hopper
from .backward import (
    DQ_ATOMIC,
    DQ_NONE,
    TASK_INFO,
    _dkdv_kernel,
    _dq_kernel,
    _finish_kernel,
    _row_stats_kernel,
    _visit_table_kernel,
)
from .common import LOG2E, cdiv, dot_precision, launch_options, next_power_of_2, on_device, padded_dim
from .forward import _long_block_kernel, _short_block_kernel
from .merge import merge_visits, scale_rows, sum_visits
from .routing import Tasks
from .tuned import Tile
from .work import Call, Work, count_sums, part_dtype, task_visits


@dataclass(frozen=True)
class Gradients:
    """What a backward reads of the output, and the gradients that it writes; of a call, all rows and heads."""

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
    first_head: int = 0
    sum_k: Tensor | None = None
    """[n_sums * B, D] float32, sums of lists of several tasks of a slice, if lists of one task store their final
    gradients."""
    sum_v: Tensor | None = None
    """Like ``sum_k``."""


class Slice:
    """Some rows and some KV heads of a call, as its launches want them: tensors, strides, compile-time constants."""

    def __init__(self, call: Call, work: Work, i_rows: int, kv_heads: slice):
        q, pages = call.q, call.pages
        self.work, self.i_rows, self.tasks = work, i_rows, work.tasks[i_rows]
        n_kv, self.n_blocks = pages.row.shape
        self.rows, self.routing = work.rows[i_rows], work.routings[i_rows]
        block_indices, self.current_block, self.visible = work.visits[i_rows]
        self.scale, self.block_size = call.scale, pages.block_size
        self.n_slots = call.n_slots
        self.heads = pages.query_heads(kv_heads, q.shape[1])
        self.n_heads = self.heads.stop - self.heads.start
        # Query heads that share a selection, and so the rows of a visit.
        self.share = call.share
        self.block_indices = block_indices[:, self.heads.start // self.share : self.heads.stop // self.share]
        self.q = q[self.rows, self.heads]
        self.n_rows, _, self.dim = self.q.shape
        self.n_visits = self.n_rows * self.n_heads // self.share * self.n_slots
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
        self.visit_constants = dict(G=self.group, SHARE=self.share, S=self.n_selected, SLOTS=self.n_slots)
        self.dot_constants = dict(D=self.dim, BD=padded_dim(self.dim), PRECISION=dot_precision(q.dtype))

    def grid(self, tasks: Tasks, programs: int = 1) -> tuple[int]:
        """Programs for all tasks of the slice, ``programs`` each."""
        return (tasks.count(self.n_visits, self.n_lists) * programs,)

    def task_args(self, tasks: Tasks) -> dict[str, int]:
        """What :func:`.routing.read_task` wants besides the tensors and R."""
        return dict(n_entries=tasks.table.shape[0], first_list=self.first_list, n_lists=self.n_lists)


def launch_forward(part: Slice, out: Tensor, lse: Tensor, join: bool) -> None:
    """Attention of a slice's rows, written to ``out`` and ``lse`` of the slice, or merged into them if ``join``."""
    q, tile, tasks = part.q, part.work.tile, part.tasks
    shape = part.n_rows, part.n_heads // part.share, part.n_slots, part.share
    parts = torch.empty(*shape, part.dim, dtype=q.dtype, device=q.device)
    parts_lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    kernel = _short_block_kernel if part.block_size <= tile.bn else _long_block_kernel
    with on_device(q):
        if tile.producer_registers:
            hopper.launch_forward(part, tile, tasks, parts, parts_lse, part.scale * LOG2E.value)
        else:
            kernel[part.grid(tasks)](
                q=q, k=part.k, v=part.v, part=parts, part_lse=parts_lse,
                visits=part.routing.visits, tasks=tasks.table, list_start=part.list_start, visible=part.visible,
                scale_log2=part.scale * LOG2E.value, task_rows=tasks.rows, **part.task_args(tasks),
                n_blocks=part.n_blocks, n_heads=part.n_heads, **part.q_strides, **part.kv_strides,
                **part.visit_constants, **part.dot_constants, BM=tile.bm, BN=tile.bn, STAGES=tile.stages,
                **launch_options(tile.warps),
            )  # fmt: skip
    merge_visits(parts, parts_lse, out, lse, join)


def launch_backward(part: Slice, grads: Gradients, deterministic: bool, dkdv_done: Callable[[], None] | None) -> None:
    """Gradients of a slice's rows, written or added to those of ``grads``, which are of the whole call."""
    work, tasks = part.work, part.tasks
    tile, mode = work.tile, work.mode
    q, k, v = part.q, part.k, part.v
    key_tiles = cdiv(part.block_size, tile.bn)
    dout, lse, delta, dq = (x[part.rows, part.heads] for x in (grads.dout, grads.lse, grads.delta, grads.dq))
    # A kernel that computes no dQ gets something else in its place; what that needs takes the place of the sums.
    part_dq = q if mode == DQ_NONE.value else _parts_of_dq(part)
    if work.direct:
        row_visits = part.n_heads // part.share * part.n_slots
        n_sums = count_sums(part.n_rows, row_visits, part.n_lists, task_visits(tile, part.share))
        shape = 2, n_sums * part.block_size, part.dim
        sum_k, sum_v = torch.zeros(shape, dtype=torch.float32, device=q.device)
        grads = replace(grads, sum_k=sum_k, sum_v=sum_v)
        del sum_k, sum_v
    table = torch.empty(3, part.n_visits, dtype=torch.int32, device=q.device)
    s_token = q.stride(0) // part.dim
    n_stats = part.n_visits if part.share == 1 else part.n_rows * s_token
    stats = torch.empty(n_stats, dtype=torch.int64, device=q.device)
    task_info = torch.empty(*part.grid(tasks, TASK_INFO.value + key_tiles), dtype=torch.int32, device=q.device)
    turn = None
    if deterministic:
        turn = torch.zeros(1 + part.n_lists * key_tiles, dtype=torch.int32, device=q.device)
    dk_strides = dict(s_dkr=grads.dk.stride(0), s_dkh=grads.dk.stride(1))
    with on_device(q):
        _visit_table_kernel[part.grid(tasks)](
            visits=part.routing.visits, tasks=tasks.table, list_start=part.list_start, visible=part.visible,
            lse=lse, delta=delta, table=table, stats=stats, task_info=task_info,
            n_visits=part.n_visits // part.n_kv, task_rows=tasks.rows, **part.task_args(tasks),
            n_blocks=part.n_blocks, room=part.n_visits,
            s_token=s_token, s_lt=lse.stride(0), s_dt=delta.stride(0),
            **part.visit_constants, BLOCK=512, KEY_TILES=key_tiles, BN=tile.bn,
            TILES=min(8, next_power_of_2(key_tiles)), **launch_options(4),
        )  # fmt: skip
        if part.share > 1:
            n_pairs = part.n_rows * part.n_heads
            _row_stats_kernel[(cdiv(n_pairs, 1024),)](
                lse=lse, delta=delta, stats=stats, n_pairs=n_pairs, n_heads=part.n_heads,
                s_token=s_token, s_lt=lse.stride(0), s_dt=delta.stride(0), BLOCK=1024, **launch_options(4),
            )  # fmt: skip
        if tile.producer_registers:
            hopper.launch_dkdv(part, tile, tasks, key_tiles, dout, part_dq, grads, table, stats, task_info)
        else:
            _dkdv_kernel[part.grid(tasks, key_tiles)](
                q=q, k=k, v=v, dout=dout, dq=part_dq, dk=grads.dk, dv=grads.dv, sum_k=grads.sum_k, sum_v=grads.sum_v,
                table=table, stats=stats, task_info=task_info, turn=turn,
                scale=part.scale, room=part.n_visits, block_size=part.block_size, first_head=grads.first_head,
                **part.kv_strides, **dk_strides, SHARE=part.share, SLOTS=part.n_slots, **part.dot_constants,
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
            grads = replace(grads, sum_k=None, sum_v=None)
            part_dq = _parts_of_dq(part)
            _launch_dq(part, work.dq_tile, work.dq_tasks[part.i_rows], dout, part_dq, table, stats)
    if mode == DQ_ATOMIC.value:
        scale_rows(part_dq, dq, part.scale, grads.add_dq)
    else:
        sum_visits(
            part_dq, dq, part.block_indices, part.current_block, part.visible, part.page_row, part.scale, grads.add_dq
        )


def _parts_of_dq(part: Slice) -> Tensor:
    """Memory for dQ of a slice: sums of its rows where atomics add to them, else a part for each visit."""
    shape, device = (part.n_kv, part.n_rows, part.group, part.dim), part.q.device
    if part.work.mode == DQ_ATOMIC.value:
        return torch.zeros(shape, dtype=torch.float32, device=device)
    shape = part.n_kv, part.n_rows, part.group // part.share, part.n_slots, part.share, part.dim
    return torch.empty(shape, dtype=part_dtype(part.q.dtype), device=device)


def _launch_dq(part: Slice, tile: Tile, tasks: Tasks, dout: Tensor, part_dq: Tensor, table, stats) -> None:
    """Partial dQ of every visit, where the kernel of dK and dV does not produce it."""
    if tile.producer_registers:
        hopper.launch_dq(part, tile, tasks, dout, part_dq, table, stats)
        return
    with on_device(part.q):
        _dq_kernel[part.grid(tasks)](
            q=part.q, k=part.k, v=part.v, dout=dout, part=part_dq, table=table, stats=stats,
            tasks=tasks.table, list_start=part.list_start, scale=part.scale, room=part.n_visits,
            task_rows=tasks.rows, **part.task_args(tasks), **part.kv_strides, SHARE=part.share, **part.dot_constants,
            BM=tile.bm, BN=tile.bn, STAGES=tile.stages, **launch_options(tile.warps),
        )  # fmt: skip
