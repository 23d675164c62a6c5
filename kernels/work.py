"""How attention over one storage is cut: into slices that bound the scratch memory, and into tasks.

Legend: N query rows, Hq query heads, Hkv key/value heads, D head dim, n blocks, S' visits per row, see
:mod:`.routing`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import hopper, tuned
from .backward import DQ_ATOMIC, DQ_NONE, DQ_PART
from .common import cdiv
from .routing import Routing, Tasks, build_routing, cut_tasks
from .tuned import Tile

# At 131,072 tokens of 16 heads, D = 128, these keep forward and backward, gradients included, within 3 GiB. Where q is
# larger, scratch may be as large as q.
FORWARD_SCRATCH = 5 << 28
BACKWARD_SCRATCH = 3 << 28
# A KV head whose rows are cut needs an index for each slice, has half-filled tasks, and adds to dK and dV in memory. So
# it may take more before that: an eighth above the scratch (with eight KV heads and top-8 its partial results are as
# large as q, and tables come on top), or this, which serves a query head's 1,048,576 rows.
WHOLE_HEAD = 9 << 28
# Indices of visits are int32, and a task or a tile may reach past the last visit before it is masked. The backward's
# table has three numbers for each visit.
MAX_VISITS = 2**31 - 2**16
MAX_TABLE_VISITS = MAX_VISITS // 3
# Of the backward's tables, for each visit.
VISIT_BYTES = 20
# Rows of a visit that the smallest tile of a task holds.
MAX_SHARE = 32


class Call(NamedTuple):
    """What a call of :func:`.attention.attend` or its backward is asked to do; arguments as there."""

    q: Tensor
    pages: object
    block_indices: Tensor
    current_block: Tensor | None
    visible: Tensor | None
    scale: float
    kv_heads: slice
    index: Tensor | None
    scratch_bytes: int | None

    @property
    def n_slots(self) -> int:
        """S'."""
        return self.block_indices.shape[2] + (self.current_block is not None)

    @property
    def share(self) -> int:
        """Query heads that share a selection: 1, or G."""
        return selecting_together(self.q, self.block_indices)


class Work(NamedTuple):
    """How a call is carried out; the same for storages of the same layout that have some heads each."""

    tile: Tile
    """Of the forward, or of the dK/dV kernel."""
    rows: list[slice]
    """Slices of rows; each has an index and tasks of its own, for all heads."""
    kv_step: int
    """Most KV heads at a time."""
    visits: list[tuple[Tensor, Tensor | None, Tensor | None]]
    """block_indices, current_block and visible of each slice; the two lists that follow are by slice too."""
    routings: list[Routing]
    tasks: list[Tasks]
    mode: int = DQ_NONE.value
    """What computes dQ; this and the rest are of the backward."""
    direct: bool = False
    """Lists of one task store their final dk and dv, rounded; only longer lists have float32 sums."""
    dq_tile: Tile | None = None
    dq_tasks: list[Tasks | None] = []


def forward_work(call: Call, task_heads: slice | None) -> Work:
    """Work of a forward, with tasks of ``task_heads``; None for all."""
    q, pages, n_slots = call.q, call.pages, call.n_slots
    scratch = call.scratch_bytes or max(FORWARD_SCRATCH, q.nbytes)
    shape = q.shape[0], q.shape[1] // pages.row.shape[0], call.kv_heads, n_slots
    row_slices, kv_step = _slices(*shape, _row_bytes(q, n_slots), 0, scratch)
    specialized = hopper.serves(q, pages, call.scale, share=call.share)
    tile = tuned.forward_tile(q.shape[2], pages.block_size, q.dtype, q.device, specialized)
    visits, routings = _index(call, row_slices)
    tasks = [cut_tasks(routing, task_visits(tile, call.share), pages, task_heads) for routing in routings]
    return Work(tile, row_slices, kv_step, visits, routings, tasks)


def backward_work(
    call: Call, task_heads: slice | None, dout: Tensor, deterministic: bool, local: bool, overwrite_dkv: bool
) -> Work:
    """Work of a backward; ``local``: it has a ``local_dtype``."""
    q, pages = call.q, call.pages
    kind = q.shape[2], pages.block_size, q.dtype, q.device
    specialized = hopper.serves(q, pages, call.scale, dout, call.share)
    tile = tuned.dkdv_tile(*kind, specialized and not deterministic)
    dq_tile = tuned.dq_tile(*kind, specialized)
    by_atomics = tuned.dq_by_atomics(*kind, specialized) and not deterministic
    mode = (DQ_PART if pages.block_size <= tile.bn else DQ_ATOMIC if by_atomics else DQ_NONE).value
    row_slices, kv_step, direct = _backward_slices(call, mode, tile, local, overwrite_dkv)
    visits, routings = _index(call, row_slices)
    cut_all = lambda tile: [cut_tasks(x, task_visits(tile, call.share), pages, task_heads) for x in routings]
    tasks, dq_tasks = cut_all(tile), [None] * len(routings)
    if mode == DQ_NONE.value:
        dq_tasks = cut_all(dq_tile)
    return Work(tile, row_slices, kv_step, visits, routings, tasks, mode, direct, dq_tile, dq_tasks)


def cached_work(name: str, make: Callable[[slice | None], Work], call: Call, task_cache: dict | None) -> Work:
    """``make`` for the tasks of the call's heads; with ``task_cache`` for those of all heads, once for each number of
    heads that calls have."""
    if task_cache is None:
        return make(call.kv_heads)
    key, tables = (name, call.kv_heads.stop - call.kv_heads.start), (call.pages.row, call.pages.head)
    if key not in task_cache:
        task_cache[key] = tables, make(None)
    same = all(x is y for x, y in zip(task_cache[key][0], tables, strict=True))
    assert same, "calls that share their work are to have one table of blocks"
    return task_cache[key][1]


def index_size(q: Tensor, n_kv: int, n_blocks: int, n_slots: int, share: int = 1) -> int:
    """See :func:`moba_cp.eager.index_size`."""
    n_rows, n_heads, _ = q.shape
    if n_rows * n_heads * n_slots * n_blocks == 0:
        return 0
    # torch.compile asks with sizes that are symbols: these are compared, not counted through, and have no nbytes.
    scratch = max(FORWARD_SCRATCH, q.numel() * q.element_size())
    row_step, _ = _steps(n_rows, n_heads // n_kv, n_kv, n_slots, _row_bytes(q, n_slots), 0, scratch)
    n_visits = n_rows * n_heads // kernel_share(share) * n_slots
    return n_visits + n_kv * n_blocks + 1 if n_rows <= row_step else 0


def selecting_together(q: Tensor, block_indices: Tensor) -> int:
    """How many of the heads of q [N, Hq, D] share each selection of ``block_indices`` [N, Hq or Hkv, S]."""
    return q.shape[1] // max(1, block_indices.shape[1])


def kernel_share(share: int) -> int:
    """How many of ``share`` query heads with one selection the kernels take together: all, or each alone."""
    return share if share <= MAX_SHARE else 1


def task_visits(tile: Tile, share: int) -> int:
    """Visits per task, each of ``share`` rows."""
    return tile.task_rows // share


def whole_head_bytes(scratch_bytes: int) -> int:
    """What a KV head may take before its rows are cut. A scratch below the kernels' own was asked for, and is kept."""
    most = scratch_bytes + scratch_bytes // 8
    return most if scratch_bytes < BACKWARD_SCRATCH else max(most, WHOLE_HEAD)


def count_sums(n_rows: int, row_visits: int, n_lists: int, most_visits: int) -> int:
    """How many of ``n_lists`` lists can be longer than a task of ``most_visits``, at ``row_visits`` per row of Q."""
    return min(n_lists, n_rows * row_visits // most_visits)


def part_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of one visit's part of dQ: float16 could overflow where the sum does not."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def cut(whole: slice, step: int) -> list[slice]:
    """Even slices of at most ``step``: the last one should not be a sliver."""
    total = whole.stop - whole.start
    step = cdiv(total, cdiv(total, step))
    return [slice(i, min(i + step, whole.stop)) for i in range(whole.start, whole.stop, step)]


def _index(call: Call, row_slices: list[slice]):
    """block_indices, current_block and visible of each slice of rows, and its routing: the call's index if there is but
    one slice."""
    some = lambda x, rows: None if x is None else x[rows].contiguous()
    visits = [
        (call.block_indices[rows], some(call.current_block, rows), some(call.visible, rows)) for rows in row_slices
    ]
    if call.index is not None and len(row_slices) == 1:
        return visits, [Routing(call.index, call.q.shape[0] * call.block_indices.shape[1] * call.n_slots)]
    return visits, [build_routing(*tables, call.pages.row) for tables in visits]


def _row_bytes(q: Tensor, n_slots: int) -> int:
    """Scratch of a forward for one row of one head."""
    return n_slots * (q.shape[2] * q.element_size() + 4)


def _slices(
    n_rows: int,
    group: int,
    kv_heads: slice,
    n_slots: int,
    row_bytes: int,
    head_bytes: int,
    scratch_bytes: int,
    at_once: int = MAX_VISITS,
) -> tuple[list[slice], int]:
    """Slices of rows, and KV heads at a time, each of ``group`` query heads, for scratch of ``row_bytes`` per row and
    query head, and ``head_bytes`` per KV head; ``at_once`` bounds the visits of some rows of some heads.

    Heads are cut first, because fewer rows make shorter lists; rows only where one KV head is too much by itself, or
    where an index would outgrow 32 bits.
    """
    n_kv = kv_heads.stop - kv_heads.start
    row_step, kv_step = _steps(n_rows, group, n_kv, n_slots, row_bytes, head_bytes, scratch_bytes, at_once)
    return cut(slice(0, n_rows), row_step), kv_step


def _steps(
    n_rows: int,
    group: int,
    n_kv: int,
    n_slots: int,
    row_bytes: int,
    head_bytes: int,
    scratch_bytes: int,
    at_once: int = MAX_VISITS,
) -> tuple[int, int]:
    """Most rows, and KV heads, at a time; arguments as of :func:`_slices`."""
    head = n_rows * row_bytes * group + head_bytes
    if head <= whole_head_bytes(scratch_bytes):
        scratch_bytes = max(scratch_bytes, head)
    bound = scratch_bytes // head, at_once // (n_rows * group * n_slots)
    kv_step = max(1, min(n_kv, *bound))
    row_step = min(
        max(scratch_bytes - kv_step * head_bytes, scratch_bytes // 4) // (row_bytes * group * kv_step),
        MAX_VISITS // (n_kv * group * n_slots),
        at_once // (kv_step * group * n_slots),
    )
    return max(1, row_step), kv_step


def _backward_slices(
    call: Call, mode: int, dkdv_tile: Tile, local: bool, overwrite_dkv: bool
) -> tuple[list[slice], int, bool]:
    """Slices of rows, KV heads at a time, and :attr:`Work.direct`.

    That is possible if gradients are overwritten and all rows are in one slice.
    """
    q, pages, n_slots = call.q, call.pages, call.n_slots
    n_rows, n_heads, dim = q.shape
    group, scratch = n_heads // pages.row.shape[0], call.scratch_bytes or max(BACKWARD_SCRATCH, q.nbytes)
    row_bytes = dim * 4 if mode == DQ_ATOMIC.value else n_slots * dim * part_dtype(q.dtype).itemsize
    shape = n_rows, group, call.kv_heads, n_slots, row_bytes + cdiv(n_slots * VISIT_BYTES, call.share)
    if local or overwrite_dkv:
        row_visits, n_blocks = group // call.share * n_slots, pages.row.shape[1]
        n_sums = count_sums(n_rows, row_visits, n_blocks, task_visits(dkdv_tile, call.share))
        sums = 8 * dim * n_sums * pages.block_size
        if mode == DQ_NONE.value:
            # Parts of dQ take the place of the sums.
            sums = max(0, sums - n_rows * group * row_bytes)
        row_slices, kv_step = _slices(*shape, sums, scratch, MAX_TABLE_VISITS)
        if len(row_slices) == 1:
            return row_slices, kv_step, True
    head_bytes = 8 * dim * pages.k.shape[0] if local else 0
    return *_slices(*shape, head_bytes, scratch, MAX_TABLE_VISITS), False
