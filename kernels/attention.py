"""Block attention of rows over one storage: launches of the kernels, slice by slice (see :mod:`.work`).

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, n blocks, S chosen blocks per row,
S' = S + 1 where rows also see their own block, else S.
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
from .work import Call, Work, backward_work, cut, forward_work, index_size, part_dtype, shared_work, sum_places

LOG2E = 1.4426950408889634


def attend(
    q: Tensor,
    pages,
    chosen: Tensor,
    own: Tensor | None,
    visible: Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None = None,
    index: Tensor | None = None,
    kv_heads: slice | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    whole: bool = False,
    shared: dict | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of rows to those of their blocks that lie in ``pages``.

    Args:
        q: [N, Hq, D] float32, bfloat16 or float16.
        pages: a :class:`moba_cp.blocks.Pages`; Hkv is ``pages.row.shape[0]``.
        chosen: [N, Hq, S] int32 block ids seen whole; -1, or a block not in ``pages``, is skipped.
        own: [N] int32, block id of which only the first ``visible[t]`` keys are seen; None for none.
        visible: [N] int32, with ``own``.
        scale: factor of the scores.
        out_dtype: of the output; float32 if it is None.
        scratch_bytes: bound of the memory for partial results, kept by working in slices of heads and rows; by default
            FORWARD_SCRATCH, or the size of q if that is more.
        index: of :func:`routing_index`, made here for these ``pages`` if it is None.
        kv_heads: with ``into``: the KV heads to do; all if it is None.
        into: out with unit stride in D and lse, of other keys, to join the result to; out may hold anything where lse
            is -inf.
        whole: there are no other keys: ``into`` holds nothing yet, and out may have any dtype.
        shared: of calls that differ in ``kv_heads``, ``into`` and the storages alone, which are laid out alike, with
            the very same ``q``, ``chosen``, ``index``, ``pages.row`` and ``pages.head``: the first leaves here what
            serves the others, the tasks of all heads among it.

    Returns:
        out [N, Hq, D] and lse [N, Hq] float32; a row that sees nothing has out 0 and lse -inf.
    """
    check_head_dim(q.shape[2])
    out_dtype = out_dtype or torch.float32
    if index is None and kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        some = q[:, at], pages.of_heads(kv_heads), chosen[:, at], own, visible, scale, out_dtype
        attend(*some, into=tuple(x[:, at] for x in into), whole=whole, scratch_bytes=scratch_bytes)
        return into
    q, pages, chosen = _kernel_inputs(q, pages, chosen)
    n_rows, n_heads, dim = q.shape
    n_slots = chosen.shape[2] + (own is not None)
    kv_heads = _all_or(kv_heads, pages.row.shape[0])
    if n_slots * n_rows * n_heads * pages.row.shape[1] * pages.k.shape[0] == 0:
        if into is not None and whole:
            at = pages.query_heads(kv_heads, n_heads)
            into[0][:, at], into[1][:, at] = 0, -torch.inf
        return into or (
            torch.zeros(n_rows, n_heads, dim, dtype=out_dtype, device=q.device),
            torch.full((n_rows, n_heads), -torch.inf, dtype=torch.float32, device=q.device),
        )
    out, lse = into or (
        torch.empty(n_rows, n_heads, dim, dtype=out_dtype, device=q.device),
        torch.empty(n_rows, n_heads, dtype=torch.float32, device=q.device),
    )
    join = into is not None and not whole

    call = Call(q, pages, chosen, own, visible, scale, kv_heads, index, scratch_bytes)
    work = shared_work("forward", lambda heads: forward_work(call, heads), call, shared)
    for rows, visits, routing, tasks in zip(work.rows, work.visits, work.routings, work.tasks, strict=True):
        for some in cut(kv_heads, work.kv_step):
            _attend_slice(q, pages, *visits, scale, out, lse, join, routing, work.tile, tasks, rows, some)
    return out, lse


def attend_backward(
    q: Tensor,
    pages,
    chosen: Tensor,
    own: Tensor | None,
    visible: Tensor | None,
    scale: float,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    deterministic: bool = False,
    local_dtype: torch.dtype | None = None,
    index: Tensor | None = None,
    kv_heads: slice | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    fresh: bool = False,
    whole: bool = False,
    keys_done: Callable[[], None] | None = None,
    shared: dict | None = None,
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
        into: dq, dk and dv to add to instead of new ones; float32, unit stride in D, dk and dv with equal strides; not
            with ``local_dtype``.
        fresh: dk and dv of ``into`` hold nothing yet, and may have any dtype: the rows of the blocks here are written,
            others are left or zeroed, so that one call has to serve the whole storage.
        whole: no other storage has a part in dq: that of ``into`` holds nothing yet, and may have any dtype.
        keys_done: called once all kernels that write dk and dv are launched; dQ may be computed after.
        shared: as in :func:`attend`.

    Returns:
        dq [N, Hq, D], and dk, dv shaped like the storages, zero where no page lies; float32 unless ``local_dtype``.
    """
    assert into is None or local_dtype is None and into[1].stride() == into[2].stride()
    check_head_dim(q.shape[2])
    if index is None and kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        rows = dout[:, at], lse[:, at], delta[:, at]
        some = q[:, at], pages.of_heads(kv_heads), chosen[:, at], own, visible, scale, *rows, deterministic
        rest = dict(fresh=fresh, whole=whole, keys_done=keys_done)
        attend_backward(*some, scratch_bytes=scratch_bytes, into=(into[0][:, at], *into[1:]), **rest)
        return into
    q, pages, chosen = _kernel_inputs(q, pages, chosen)
    q, dout = _row_major(q), _row_major(dout.to(q.dtype))
    if q.stride(0) != dout.stride(0):
        q, dout = q.contiguous(), dout.contiguous()
    lse, delta = lse.contiguous(), delta.contiguous()
    n_rows, n_heads, dim = q.shape
    check_limit("the number of rows of q, times heads,", q.stride(0) // dim * n_rows, "use more ranks")
    n_slots = chosen.shape[2] + (own is not None)
    kv_heads = _all_or(kv_heads, pages.row.shape[0])
    grad_dtype = local_dtype or torch.float32
    nothing = n_slots * n_rows * n_heads * pages.row.shape[1] * pages.k.shape[0] == 0
    new = torch.zeros if nothing or local_dtype is None else torch.empty
    if into is None:
        dk, dv = (new(x.shape, dtype=grad_dtype, device=q.device) for x in (pages.k, pages.v))
        if nothing:
            return torch.zeros(n_rows, n_heads, dim, dtype=grad_dtype, device=q.device), dk, dv
        dq = torch.empty(n_rows, n_heads, dim, dtype=grad_dtype, device=q.device)
    else:
        dq, dk, dv = into
        if nothing:
            if fresh:
                dk.zero_(), dv.zero_()
            if whole:
                dq[:, pages.query_heads(kv_heads, n_heads)] = 0
            if keys_done is not None:
                keys_done()
            return into

    call = Call(q, pages, chosen, own, visible, scale, kv_heads, index, scratch_bytes)
    how = dout, deterministic, local_dtype is not None, fresh
    work = shared_work("backward", lambda heads: backward_work(call, heads, *how), call, shared)
    if fresh and not work.direct:
        if dk.dtype == torch.float32:
            dk.zero_(), dv.zero_()
        else:
            dk, dv, keys_done = _wide_sums(dk, dv, keys_done)
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
            rest = dout, lse, delta, deterministic, into is not None and not whole, dq, *sums
            done = keys_done if some_heads is head_slices[-1] and rows is work.rows[-1] else None
            _backward_slice(q, pages, *work.visits[i], scale, *rest, work, i, some_heads, done)
        if local_dtype is not None and not work.direct:
            dk[:, some_heads], dv[:, some_heads] = sums[:2]
    return into or (dq, dk, dv)


def routing_index(
    q: Tensor, chosen: Tensor, own: Tensor | None, visible: Tensor | None, page_row: Tensor
) -> Tensor | None:
    """What :func:`attend` and :func:`attend_backward` of the same rows share: which rows visit each block.

    Args:
        page_row: [Hkv, n] int64, -1 for blocks that nobody will attend to by this index. It may serve several storages,
            each with some of the blocks.

    Returns:
        int32, see :class:`.routing.Routing`; None where rows have to be cut, and an index made for each slice.
    """
    n_kv, n_blocks = page_row.shape
    if index_size(q, n_kv, n_blocks, chosen.shape[2] + (own is not None)) == 0:
        return None
    return build_routing(_whole_slots(chosen), own, visible, page_row).flat


def _wide_sums(dk: Tensor, dv: Tensor, keys_done: Callable[[], None] | None):
    """What slices of rows add to in place of dk and dv, and what to call once they have, in place of ``keys_done``."""
    sum_k, sum_v = torch.zeros(2, *dk.shape, dtype=torch.float32, device=dk.device)

    def round_off() -> None:
        dk.copy_(sum_k), dv.copy_(sum_v)
        if keys_done is not None:
            keys_done()

    return sum_k, sum_v, round_off


def _kernel_inputs(q: Tensor, pages, chosen: Tensor):
    if not (all(x.stride(-1) == 1 for x in (pages.k, pages.v, pages.row)) and pages.length.is_contiguous()):
        k, v, row = (check_unit_stride(x) for x in (pages.k, pages.v, pages.row))
        pages = replace(pages, k=k, v=v, row=row, length=pages.length.contiguous())
    return check_unit_stride(q), pages, _whole_slots(chosen)


def _whole_slots(chosen: Tensor) -> Tensor:
    """``chosen`` [N, Hq, S] with all slots of a row side by side."""
    return chosen if chosen.stride(2) == 1 and chosen.stride(1) == chosen.shape[2] else chosen.contiguous()


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

    def __init__(self, q: Tensor, pages, chosen: Tensor, own: Tensor | None, rows: slice, kv_heads: slice):
        """``chosen`` and ``own`` are of these rows."""
        n_kv, self.n_blocks = pages.row.shape
        group = q.shape[1] // n_kv
        self.n_slots = chosen.shape[2] + (own is not None)
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
            G=group, S=chosen.shape[2], SLOTS=self.n_slots, D=q.shape[2], BD=padded_dim(q.shape[2]),
            PRECISION=dot_precision(q.dtype),
        )  # fmt: skip

    def grid(self, tasks: Tasks, programs: int = 1) -> tuple[int]:
        """Programs for all tasks of the slice, ``programs`` each."""
        return (tasks.count(self.n_visits, self.row.numel()) * programs,)

    def task_args(self, tasks: Tasks) -> tuple[int, ...]:
        """What :func:`read_task` wants beside the tensors."""
        return tasks.table.shape[0], tasks.rows, self.lists.start, self.row.numel()


def _attend_slice(
    q, pages, chosen, own, visible, scale, out, lse, join: bool, routing: Routing, tile: Tile, tasks: Tasks,
    rows: slice, kv_heads: slice,
) -> None:  # fmt: skip
    part = _Slice(q, pages, chosen, own, rows, kv_heads)
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
    q, pages, chosen, own, visible, scale, dout, lse, delta, deterministic, add: bool, dq, dk, dv, sum_k, sum_v,
    first_head: int, work: Work, i_rows: int, kv_heads: slice, keys_done: Callable[[], None] | None,
) -> None:  # fmt: skip
    tile, mode, routing, key_tasks = work.tile, work.mode, work.routings[i_rows], work.tasks[i_rows]
    rows = work.rows[i_rows]
    part = _Slice(q, pages, chosen, own, rows, kv_heads)
    key_tiles = cdiv(pages.block_size, tile.bn)
    dout, lse, delta, dq = (x[rows, part.heads] for x in (dout, lse, delta, dq))
    n_rows, group = part.n_rows, part.constants["G"]
    shape = part.row.shape[0], n_rows, group
    if mode == DQ_ATOMIC.value:
        into = torch.zeros(*shape, q.shape[2], dtype=torch.float32, device=q.device)
    else:
        into = torch.empty(*shape, part.n_slots, q.shape[2], dtype=part_dtype(q.dtype), device=q.device)
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
            G=group, S=chosen.shape[2], SLOTS=part.n_slots, BLOCK=512,
            KEY_TILES=key_tiles, BN=tile.bn, TILES=min(8, next_power_of_2(key_tiles)), **launch_options(4),
        )  # fmt: skip
        rest = dk, dv, sum_k, sum_v, table, stats, facts
        if tile.fetch_registers:
            hopper.launch_keys(part, tile, key_tasks, key_tiles, dout, into, *rest, scale, first_head)
        else:
            _key_kernel[part.grid(key_tasks, key_tiles)](
                *inputs, into, *rest, turn, scale, part.n_visits, pages.block_size, first_head,
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
        if keys_done is not None:
            keys_done()
        tile, query_tasks = work.query_tile, work.query_tasks[i_rows]
        if mode == DQ_NONE.value and tile.fetch_registers:
            hopper.launch_queries(part, tile, query_tasks, dout, into, table, stats, list_start, scale)
        elif mode == DQ_NONE.value:
            _query_kernel[part.grid(query_tasks)](
                *inputs, into, table, stats, query_tasks.table, list_start,
                scale, part.n_visits, *part.task_args(query_tasks), *part.strides[2:], **constants,
                BM=tile.bm, BN=tile.bn, STAGES=tile.stages, **launch_options(tile.warps),
            )  # fmt: skip
    if mode == DQ_ATOMIC.value:
        scale_rows(into, dq, scale, add)
    else:
        sum_visits(into, dq, chosen[:, part.heads], own, visible, part.row, scale, add)
