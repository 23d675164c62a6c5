"""The attention primitives in vectorised PyTorch: any device, any floating dtype, float64 included.

They take the same arguments as the Triton kernels and follow the same plan. A *visit* is one query row of one head
looking at one block. Visits are sorted by block, cut into tasks of at most ``TASK_ROWS`` rows, and each task is one
small dense attention. Nothing of size tokens x tokens is ever made.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, n blocks,
S selected blocks per row, E visits, R rows per task, W keys of a task. Wide means float32, or float64 for float64
inputs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Pages
from ..dtypes import WIDE
from .select import SCRATCH_ELEMENTS

TASK_ROWS = 128


class _Tasks(NamedTuple):
    """Visits of one KV head in tasks of R rows; ``visit`` indexes the [N, G, S'] grid of visits, flattened."""

    visit: Tensor
    """[n_tasks, R] int64, -1 for padding."""
    limit: Tensor
    """[n_tasks, R] int64, keys of the block each visit sees; 0 for padding."""
    block: Tensor
    """[n_tasks] int64."""


def _tasks(blocks: Tensor, limits: Tensor, n_blocks: int, task_rows: int) -> _Tasks:
    """Sort visits by block and cut them: blocks, limits [N, G, S'], block -1 where there is no visit."""
    flat = blocks.flatten()
    visit = (flat >= 0).nonzero()[:, 0]
    block, order = flat[visit].long().sort(stable=True)
    visit = visit[order]
    count = torch.bincount(block, minlength=n_blocks)
    n_tasks = (count + task_rows - 1) // task_rows
    task_start = n_tasks.cumsum(0) - n_tasks
    in_block = torch.arange(visit.numel(), device=flat.device) - (count.cumsum(0) - count)[block]
    slot = task_start[block] * task_rows + in_block
    total = int(n_tasks.sum())
    padded = torch.full((total * task_rows,), -1, dtype=torch.int64, device=flat.device)
    padded[slot] = visit
    limit = torch.where(padded >= 0, limits.flatten()[padded.clamp(min=0)].long(), 0)
    task_block = torch.repeat_interleave(torch.arange(n_blocks, device=flat.device), n_tasks, output_size=total)
    return _Tasks(padded.view(total, task_rows), limit.view(total, task_rows), task_block)


def _visits(pages: Pages, kv_head: int, block_indices: Tensor, current_block: Tensor | None, visible: Tensor | None):
    """Blocks and limits [N, G, S'] of the visits whose block lies in ``pages``; block_indices [N, G, S]."""
    here = pages.row[kv_head] >= 0
    found = (block_indices >= 0) & here[block_indices.long().clamp(min=0)] if here.numel() else block_indices >= 0
    blocks = torch.where(found, block_indices, -1)
    limits = pages.length[blocks.long().clamp(min=0)] if here.numel() else blocks
    if current_block is not None:
        mine = torch.where(here[current_block.long()] & (visible > 0), current_block, -1)[:, None, None].expand(
            -1, block_indices.shape[1], 1
        )
        seen = visible[:, None, None].expand(-1, block_indices.shape[1], 1)
        blocks, limits = torch.cat([mine, blocks], -1), torch.cat([seen, limits], -1)
    return blocks, limits


class _Head:
    """One KV head's tasks over one storage, and the gathers that forward and backward share."""

    def __init__(self, q, pages: Pages, kv_head: int, block_indices, current_block, visible):
        group = q.shape[1] // pages.row.shape[0]
        heads = slice(kv_head * group, (kv_head + 1) * group)
        if block_indices.shape[1] == q.shape[1]:
            of_group = block_indices[:, heads]
        else:
            of_group = block_indices[:, kv_head, None].expand(-1, group, -1)
        blocks, limits = _visits(pages, kv_head, of_group, current_block, visible)
        self.n_slots = blocks.shape[-1]
        self.pages, self.kv_head, self.heads = pages, kv_head, heads
        task_rows = min(TASK_ROWS, max(16, q.shape[0] * group))
        self.tasks = _tasks(blocks, limits, pages.row.shape[1], task_rows)
        self.wide = WIDE[q.dtype]
        # As many keys as are seen of any block: blocks may be far longer than any document.
        most = int(self.tasks.limit.max()) if self.tasks.limit.numel() else 0
        self.width = min(pages.block_size, (most + 15) // 16 * 16)
        self.chunk = max(1, SCRATCH_ELEMENTS // (task_rows * (self.width + q.shape[2])))

    def chunks(self):
        """Slices of tasks small enough for the scratch limit."""
        n_tasks = self.tasks.block.numel()
        for lo in range(0, n_tasks, self.chunk):
            yield slice(lo, min(lo + self.chunk, n_tasks))

    def gather_rows(self, x: Tensor, tasks: slice) -> Tensor:
        """x [N, Hq, ...] -> [tasks, R, ...], zero where a task is padded."""
        visit = self.tasks.visit[tasks]
        rows = x[:, self.heads].flatten(0, 1)[visit.clamp(min=0) // self.n_slots].to(self.wide)
        return rows.masked_fill((visit < 0).view(*visit.shape, *[1] * (rows.dim() - 2)), 0)

    def key_rows(self, tasks: slice) -> tuple[Tensor, Tensor]:
        """Storage row of every key of every task's block [tasks, W], and the head [tasks, 1]."""
        block = self.tasks.block[tasks]
        offset = torch.arange(self.width, device=block.device)
        last = (self.pages.length[block].long() - 1)[:, None]
        rows = self.pages.row[self.kv_head, block][:, None] + torch.minimum(offset, last)
        return rows, self.pages.head[self.kv_head, block].long()[:, None]

    def scores(self, q_rows: Tensor, k_rows: Tensor, scale: float, tasks: slice) -> Tensor:
        """Masked, scaled scores [tasks, R, W]."""
        offset = torch.arange(self.width, device=q_rows.device)
        score = torch.matmul(q_rows, k_rows.transpose(1, 2)) * scale
        return score.masked_fill(offset >= self.tasks.limit[tasks][..., None], -torch.inf)

    def add_keys(self, totals, parts, rows: Tensor, storage_head: Tensor, tasks: slice) -> None:
        """Add what each task gives its block's keys to sums over the storage, in a fixed order.

        Args:
            totals: sums shaped like the storage.
            parts: for each of them [tasks, W, D], overwritten.
            rows, storage_head: of :meth:`key_rows`.
        """
        block = self.tasks.block[tasks]
        # Tasks of a block are neighbours: sum them pair by pair into the first. An index_put_ that accumulates adds in
        # whatever order threads come.
        number = torch.arange(block.numel(), device=block.device) - torch.searchsorted(block, block)
        step = 1
        while (late := (number % (2 * step) == step).nonzero()[:, 0]).numel():
            for part in parts:
                part[late - step] += part[late]
            step *= 2
        first = (number == 0).nonzero()[:, 0]
        # A short block's missing keys were read from its last row.
        inside = torch.arange(self.width, device=block.device) < self.pages.length[block[first]][:, None]
        at = rows[first][inside], storage_head.expand_as(rows)[first][inside]
        for total, part in zip(totals, parts, strict=True):
            total[at] += part[first][inside]


def attend(
    q: Tensor,
    pages: Pages,
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
) -> tuple[Tensor, Tensor]:
    """Attention of rows to those of their blocks that lie in ``pages``.

    Args:
        q: [N, Hq, D].
        pages: the storage; Hkv is ``pages.row.shape[0]``.
        block_indices: [N, Hq, S] int32 block ids seen whole; -1, or a block not in ``pages``, is skipped. [N, Hkv, S]
            where the query heads of a KV head see the same.
        current_block: [N] int32, block id of which only the first ``visible[t]`` keys are seen; None for none.
        visible: [N] int32, with ``current_block``.
        scale: factor of the scores.
        out_dtype: of the output; wide if it is None.
        index: of :func:`routing_index`.
        kv_heads: with ``out``: the KV heads to compute; all if it is None.
        out: the output and the log-sum-exp over other keys, wide: the result is merged into both. The output may hold
            anything where the log-sum-exp is -inf.
        overwrite_out: ``out`` holds nothing yet and is overwritten; its output may have any dtype.
        task_cache: a dict, empty at first, for calls that differ only in ``kv_heads``, ``out`` and the storages. These
            must have the same layout, and ``q``, ``block_indices``, ``index``, ``pages.row`` and ``pages.head`` must be
            the same objects. The kernels keep their tasks in it; this path does not use it.

    Returns:
        out [N, Hq, D] and lse [N, Hq] wide; a row that sees nothing has out 0 and lse -inf.
    """
    is_new, wide = out is None, WIDE[q.dtype]
    if out is None:
        out = (
            torch.empty(q.shape, dtype=out_dtype or wide, device=q.device),
            torch.empty(q.shape[:2], dtype=wide, device=q.device),
        )
    for kv_head in range(pages.row.shape[0])[kv_heads or slice(None)]:
        head = _Head(q, pages, kv_head, block_indices, current_block, visible)
        part, part_lse = _attend_head(head, q, scale)
        to_out, to_lse = out[0][:, head.heads], out[1][:, head.heads]
        if not (is_new or overwrite_out):
            before = torch.where(to_lse[..., None] == -torch.inf, 0, to_out)
            part, part_lse = merge([before, part], [to_lse, part_lse])
        to_out.copy_(part), to_lse.copy_(part_lse)
    return out


def _attend_head(head: _Head, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`attend` of one KV head: out [N, G, D] and lse [N, G] of its query heads, wide."""
    pages, n_rows, dim, group = head.pages, q.shape[0], q.shape[2], head.heads.stop - head.heads.start
    part = torch.zeros(n_rows * group * head.n_slots, dim, dtype=head.wide, device=q.device)
    part_lse = torch.full((n_rows * group * head.n_slots,), -torch.inf, dtype=head.wide, device=q.device)
    for tasks in head.chunks():
        rows, storage_head = head.key_rows(tasks)
        score = head.scores(head.gather_rows(q, tasks), pages.k[rows, storage_head].to(head.wide), scale, tasks)
        real = head.tasks.visit[tasks] >= 0
        visit_lse = score.logsumexp(-1)
        prob = (score - finite_lse(visit_lse)[..., None]).exp()
        value = torch.matmul(prob, pages.v[rows, storage_head].to(head.wide))
        visit = head.tasks.visit[tasks][real]
        part[visit] = value[real]
        part_lse[visit] = visit_lse[real]
    parts, lses = part.view(n_rows, group, head.n_slots, dim), part_lse.view(n_rows, group, head.n_slots)
    return merge(parts.unbind(2), lses.unbind(2))


def attend_backward(
    q: Tensor,
    pages: Pages,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attend`, as the part that this storage has in the attention over all storages.

    Args:
        dout: [N, Hq, D], gradient of the final output.
        lse: [N, Hq], log-sum-exp over everything the row sees, in all storages.
        delta: [N, Hq], row sums of ``dout * out`` of the final output.
        deterministic: accepted for symmetry with the kernels; this path always is, on any number of threads.
        local_dtype: dtype of the three gradients where ``pages`` are :func:`moba_cp.blocks.local_pages`.
        index, kv_heads: as in :func:`attend`.
        out: dq, dk and dv to add the gradients to; new tensors if it is None. They are wide, dk and dv have equal
            strides, and ``local_dtype`` is None.
        overwrite_dkv: dk and dv of ``out`` hold nothing yet, and may have any dtype. Rows of blocks in ``pages`` are
            overwritten, others are kept or zeroed, so one call must cover all blocks of the storage.
        overwrite_dq: dq of ``out`` holds nothing yet, and may have any dtype, because this is the first storage.
        dkdv_done: called once dk and dv are on their way to be written; dq may follow.
        task_cache: as in :func:`attend`.

    Returns:
        dq [N, Hq, D], and dk, dv shaped like the storages, zero where no page lies; wide unless ``local_dtype``.
    """
    new_dq, new_dkv = out is None or overwrite_dq, out is None or overwrite_dkv
    dq = torch.empty(q.shape, dtype=lse.dtype, device=q.device) if out is None else out[0]
    sums = [torch.zeros(x.shape, dtype=lse.dtype, device=q.device) for x in (pages.k, pages.v)] if new_dkv else out[1:]
    for kv_head in range(pages.row.shape[0])[kv_heads or slice(None)]:
        head = _Head(q, pages, kv_head, block_indices, current_block, visible)
        part = _head_gradients(head, q, scale, dout, lse, delta, sums)
        if new_dq:
            dq[:, head.heads] = part
        else:
            dq[:, head.heads] += part
    if out is not None and overwrite_dkv:
        for target, total in zip(out[1:], sums, strict=True):
            target.copy_(total)
    if dkdv_done is not None:
        dkdv_done()
    return out or tuple(x.to(local_dtype or x.dtype) for x in (dq, *sums))


def _head_gradients(
    head: _Head, q: Tensor, scale: float, dout: Tensor, lse: Tensor, delta: Tensor, sums: Sequence[Tensor]
) -> Tensor:
    """:func:`attend_backward` of one KV head: dq [N, G, D] of its query heads, wide. Adds dk and dv to ``sums``."""
    pages, n_rows, dim, group = head.pages, q.shape[0], q.shape[2], head.heads.stop - head.heads.start
    part = torch.zeros(n_rows * group * head.n_slots, dim, dtype=head.wide, device=q.device)
    for tasks in head.chunks():
        rows, storage_head = head.key_rows(tasks)
        q_rows, do_rows = head.gather_rows(q, tasks), head.gather_rows(dout, tasks)
        k_rows, v_rows = (x[rows, storage_head].to(head.wide) for x in (pages.k, pages.v))
        score = head.scores(q_rows, k_rows, scale, tasks)
        prob = (score - finite_lse(head.gather_rows(lse, tasks))[..., None]).exp()
        dprob = torch.matmul(do_rows, v_rows.transpose(1, 2))
        dscore = prob * (dprob - head.gather_rows(delta, tasks)[..., None]) * scale
        real = head.tasks.visit[tasks] >= 0
        part[head.tasks.visit[tasks][real]] = torch.matmul(dscore, k_rows)[real]
        of_tasks = torch.matmul(dscore.transpose(1, 2), q_rows), torch.matmul(prob.transpose(1, 2), do_rows)
        head.add_keys(sums, of_tasks, rows, storage_head, tasks)
    return part.view(n_rows, group, head.n_slots, dim).sum(2)


def routing_index(
    q: Tensor, block_indices: Tensor, current_block: Tensor | None, visible: Tensor | None, page_row: Tensor
) -> Tensor | None:
    """Which rows visit each block, for :func:`attend` and :func:`attend_backward` over any storages of these blocks.

    Args:
        q: [N, Hq, D].
        block_indices, current_block, visible: as in :func:`attend`.
        page_row: [Hkv, n] int64, -1 for blocks that nobody will attend to by this index.

    Returns:
        int32 that the kernels understand; None where there is nothing to share, as always here.
    """
    return None


def index_size(q: Tensor, n_kv: int, n_blocks: int, n_slots: int, share: int = 1) -> int:
    """Elements of what :func:`routing_index` returns for ``n_slots`` visits per row and selection, where each is shared
    by ``share`` query heads; 0 for None."""
    return 0


def row_sums(a: Tensor, b: Tensor) -> Tensor:
    """Wide sums of ``a * b`` over D: a, b [N, Hq, D] -> [N, Hq]. Of dout and out: ``delta`` of the backward."""
    wide = WIDE[a.dtype]
    return torch.linalg.vecdot(a.to(wide), b.to(wide))


def finite_lse(lse: Tensor) -> Tensor:
    """What to subtract from scores: where all of them are -inf, nothing, so that their keys have no weight."""
    return lse.masked_fill(lse == -torch.inf, 0)


def merge(outs, lses) -> tuple[Tensor, Tensor]:
    """Join partial results over disjoint sets of keys: outs of [..., D], lses of [...], both wide."""
    lse = torch.stack(list(lses)).logsumexp(0)
    shift = finite_lse(lse)
    out = torch.zeros_like(outs[0])
    for part, part_lse in zip(outs, lses):
        out += part * (part_lse - shift).exp()[..., None]
    return out, lse
