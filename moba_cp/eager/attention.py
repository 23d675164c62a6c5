"""The attention primitives in vectorised PyTorch: any device, any floating dtype, float64 included.

They take the same arguments as the Triton kernels and follow the same plan. A *visit* is one query row of one head
looking at one block. Visits are sorted by block, cut into tasks of at most ``TASK_ROWS`` rows, and each task is one
small dense attention. Nothing of size tokens x tokens is ever made.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, n blocks,
S chosen blocks per row, E visits, R rows per task, W keys of a task. Wide means float32, or float64 for float64 inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Pages
from ..dtypes import wide_dtype

TASK_ROWS = 128
SCRATCH_ELEMENTS = 1 << 24
# Scores, or products that are summed to scores, at a time: on a CPU they stay in its cache.
CACHE_ELEMENTS = 1 << 18


def _sum_in_place(x: Tensor) -> Tensor:
    """Sum over dimension 0, pair by pair; ``x`` is overwritten.

    Additions are elementwise, in an order that follows from the length of that dimension alone. So the rounding of an
    element does not depend on what is summed beside it, as it does in a matrix product or in ``x.sum(0)``.
    """
    n = x.shape[0]
    while n > 1:
        half = n // 2
        x[:half] += x[n - half : n]
        n -= half
    return x[0]


def block_means(k: Tensor, start: Tensor, length: Tensor, block_size: int) -> Tensor:
    """Mean key of every block.

    Args:
        k: [R, Hkv, D].
        start: [n] int64, first row of each block.
        length: [n] int32, rows of each block; 0 for an entry that stands for no block.
        block_size: B, the largest length.

    Returns:
        [n, Hkv, D] in k's dtype, zero for entries of length 0.
    """
    n, (_, n_heads, dim) = start.numel(), k.shape
    means = k.new_zeros(n, n_heads, dim)
    if k.shape[0] == 0:
        return means
    # Where no block is complete, none is a candidate, and the order of the sums does not matter.
    width = max(1, min(block_size, int(length.max()))) if n else 1
    step = max(1, SCRATCH_ELEMENTS // (width * n_heads * dim))
    offset = torch.arange(width, device=k.device)[:, None]
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        inside = offset < length[lo:hi]
        rows = torch.where(inside, start[lo:hi] + offset, 0)
        keys = k[rows].double().masked_fill(~inside[..., None, None], 0)
        total = _sum_in_place(keys) / length[lo:hi].clamp(min=1)[:, None, None]
        means[lo:hi] = total.to(wide_dtype(k.dtype)).to(k.dtype)
    return means


def _ordered_bits(score: Tensor) -> Tensor:
    """int64 that sorts as ``score`` (float64) does, with -0.0 equal to 0.0 and NaN below every number."""
    bits = (score + 0.0).view(torch.int64)
    bits = bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)
    return torch.where(score.isnan(), torch.iinfo(torch.int64).min + 1, bits)


def _elements_at_once(x: Tensor) -> int:
    return SCRATCH_ELEMENTS if x.is_cuda else CACHE_ELEMENTS


def _scores(q: Tensor, means: Tensor) -> Tensor:
    """Scores [H, N, n], wide, of rows q [H, N, D] and block means [H, n, D].

    A score is the float64 sum of :func:`_sum_in_place`, rounded to the wide dtype: a function of its row and its mean
    alone. So equal means have equal scores, and scores are the same on any number of ranks.
    """
    rows, keys = q.double(), means.double()
    if q.dtype == torch.float64:
        score = rows.new_empty(*rows.shape[:2], keys.shape[1])
        step = max(1, _elements_at_once(q) // max(1, keys[0].numel()))
        for of_head, head_rows, head_keys in zip(score, rows, keys):
            for lo in range(0, rows.shape[1], step):
                some = head_rows[lo : lo + step].T[:, :, None]
                of_head[lo : lo + step] = _sum_in_place(some * head_keys.T[:, None, :])
        return score
    # The products are exact in float64. A sum of them in any order is off by at most D * 2 ** -53 times the norms:
    # where that cannot change what it is rounded to, the order does not matter.
    score = torch.matmul(rows, keys.transpose(1, 2))
    norms = rows.norm(dim=-1)[:, :, None] * (keys.norm(dim=-1) * (q.shape[2] * 2.0**-51))[:, None, :]
    wide = wide_dtype(q.dtype)
    unsure = ((score - norms).to(wide) != (score + norms).to(wide)) & score.isfinite()
    head, row, block = unsure.nonzero(as_tuple=True)
    step = max(1, SCRATCH_ELEMENTS // q.shape[2])
    for some in zip(*(x.split(step) for x in (head, row, block))):
        head, row, block = some
        score[some] = _sum_in_place((rows[head, row] * keys[head, block]).T.contiguous())
    return score.to(wide)


def select_blocks(q: Tensor, means: Tensor, first: Tensor, own: Tensor, top_k: int) -> Tensor:
    """The ``top_k - 1`` best blocks of every row and head.

    Args:
        q: [N, Hq, D].
        means: [n, Hkv, D].
        first, own: [N] int32; the candidates of row ``t`` are the blocks ``first[t] <= id < own[t]``.
        top_k: blocks per query, the own block included.

    Returns:
        [N, Hq, top_k - 1] int32, best first, -1 where there are fewer candidates. Equal scores: the higher id.
    """
    n_rows, n_heads, dim = q.shape
    n, n_kv, _ = means.shape
    chosen = torch.full((n_rows, n_heads, top_k - 1), -1, dtype=torch.int32, device=q.device)
    n_take = min(top_k - 1, n)
    if n_take == 0:
        return chosen
    keys = means.transpose(0, 1)
    block = torch.arange(n, device=q.device)
    never = torch.iinfo(torch.int64).min
    step = max(1, _elements_at_once(q) // (n_heads * n))
    for lo in range(0, n_rows, step):
        hi = min(lo + step, n_rows)
        rows = q[lo:hi].view(hi - lo, n_kv, n_heads // n_kv, dim).transpose(0, 1)
        score = _scores(rows.flatten(1, 2), keys).double()
        score = score.view(n_kv, hi - lo, -1, n).transpose(0, 1).flatten(1, 2)
        candidate = (block >= first[lo:hi, None]) & (block < own[lo:hi, None])
        rank = torch.where(candidate[:, None], _ordered_bits(score), never).flip(-1)
        rank, order = rank.sort(dim=-1, descending=True, stable=True)
        best = (n - 1 - order[..., :n_take]).int()
        chosen[lo:hi, :, :n_take] = torch.where(rank[..., :n_take] == never, -1, best)
    return chosen


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


def _visits(pages: Pages, kv_head: int, chosen: Tensor, own: Tensor | None, visible: Tensor | None):
    """Blocks and limits [N, G, S'] of the visits whose block lies in ``pages``; chosen [N, G, S]."""
    here = pages.row[kv_head] >= 0
    found = (chosen >= 0) & here[chosen.long().clamp(min=0)] if here.numel() else chosen >= 0
    blocks = torch.where(found, chosen, -1)
    limits = pages.length[blocks.long().clamp(min=0)] if here.numel() else blocks
    if own is not None:
        mine = torch.where(here[own.long()] & (visible > 0), own, -1)[:, None, None].expand(-1, chosen.shape[1], 1)
        seen = visible[:, None, None].expand(-1, chosen.shape[1], 1)
        blocks, limits = torch.cat([mine, blocks], -1), torch.cat([seen, limits], -1)
    return blocks, limits


class _Head:
    """One KV head's tasks over one storage, and the gathers that forward and backward share."""

    def __init__(self, q, pages: Pages, kv_head: int, chosen, own, visible):
        group = q.shape[1] // pages.row.shape[0]
        heads = slice(kv_head * group, (kv_head + 1) * group)
        blocks, limits = _visits(pages, kv_head, chosen[:, heads], own, visible)
        self.n_slots = blocks.shape[-1]
        self.pages, self.kv_head, self.heads = pages, kv_head, heads
        task_rows = min(TASK_ROWS, max(16, q.shape[0] * group))
        self.tasks = _tasks(blocks, limits, pages.row.shape[1], task_rows)
        self.wide = wide_dtype(q.dtype)
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
) -> tuple[Tensor, Tensor]:
    """Attention of rows to those of their blocks that lie in ``pages``.

    Args:
        q: [N, Hq, D].
        pages: the storage; Hkv is ``pages.row.shape[0]``.
        chosen: [N, Hq, S] int32 block ids seen whole; -1, or a block not in ``pages``, is skipped.
        own: [N] int32, block id of which only the first ``visible[t]`` keys are seen; None for none.
        visible: [N] int32, with ``own``.
        scale: factor of the scores.
        out_dtype: of the output; wide if it is None.
        index: of :func:`routing_index`.
        kv_heads: with ``into``: the KV heads to do; all if it is None.
        into: wide out and lse over other keys, to join the result to; out may hold anything where lse is -inf.
        whole: there are no other keys: ``into`` holds nothing yet, and out may have any dtype.
        shared: of calls that differ in ``kv_heads``, ``into`` and the storages alone, which are laid out alike, with
            the very same ``q``, ``chosen``, ``index``, ``pages.row`` and ``pages.head``: the kernels leave in it what
            serves the calls that follow; not used here.

    Returns:
        out [N, Hq, D] and lse [N, Hq] wide; a row that sees nothing has out 0 and lse -inf.
    """
    if kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        q, pages, chosen = q[:, at], pages.of_heads(kv_heads), chosen[:, at]
    out, lse = _attend(q, pages, chosen, own, visible, scale)
    if into is None:
        return out.to(out_dtype or out.dtype), lse
    to_out, to_lse = into if kv_heads is None else (x[:, at] for x in into)
    if not whole:
        before = torch.where(to_lse[..., None] == -torch.inf, 0, to_out)
        out, lse = merge([before, out], [to_lse, lse])
    to_out.copy_(out), to_lse.copy_(lse)
    return into


def _attend(q: Tensor, pages: Pages, chosen: Tensor, own: Tensor | None, visible: Tensor | None, scale: float):
    """:func:`attend`: out and lse, wide."""
    n_rows, n_heads, dim = q.shape
    wide = wide_dtype(q.dtype)
    out = torch.zeros(n_rows, n_heads, dim, dtype=wide, device=q.device)
    lse = torch.full((n_rows, n_heads), -torch.inf, dtype=wide, device=q.device)
    for kv_head in range(pages.row.shape[0]):
        head = _Head(q, pages, kv_head, chosen, own, visible)
        group = head.heads.stop - head.heads.start
        part = torch.zeros(n_rows * group * head.n_slots, dim, dtype=wide, device=q.device)
        part_lse = torch.full((n_rows * group * head.n_slots,), -torch.inf, dtype=wide, device=q.device)
        for tasks in head.chunks():
            rows, storage_head = head.key_rows(tasks)
            score = head.scores(head.gather_rows(q, tasks), pages.k[rows, storage_head].to(wide), scale, tasks)
            real = head.tasks.visit[tasks] >= 0
            visit_lse = score.logsumexp(-1)
            prob = (score - visit_lse[..., None].masked_fill(~real[..., None], 0)).exp()
            value = torch.matmul(prob, pages.v[rows, storage_head].to(wide))
            visit = head.tasks.visit[tasks][real]
            part[visit] = value[real]
            part_lse[visit] = visit_lse[real]
        out[:, head.heads], lse[:, head.heads] = merge(
            part.view(n_rows, group, head.n_slots, dim).unbind(2), part_lse.view(n_rows, group, head.n_slots).unbind(2)
        )
    return out, lse


def attend_backward(
    q: Tensor,
    pages: Pages,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attend`, as the part that this storage has in the attention over all storages.

    Args:
        dout: [N, Hq, D], gradient of the final output.
        lse: [N, Hq], log-sum-exp over everything the row sees, in all storages.
        delta: [N, Hq], row sums of ``dout * out`` of the final output.
        deterministic: accepted for symmetry with the kernels; this path always is, on any number of threads.
        local_dtype: dtype of the three gradients where ``pages`` are :func:`moba_cp.blocks.local_pages`.
        index, kv_heads: as in :func:`attend`.
        into: wide dq, dk and dv to add to instead of new ones; dk and dv with equal strides; not with ``local_dtype``.
        fresh: dk and dv of ``into`` hold nothing yet, and may have any dtype: the rows of the blocks here are written,
            others are left or zeroed, so that one call has to serve the whole storage.
        whole: no other storage has a part in dq: that of ``into`` holds nothing yet, and may have any dtype.
        keys_done: called once dk and dv are on their way to be written; dq may follow.
        shared: as in :func:`attend`.

    Returns:
        dq [N, Hq, D], and dk, dv shaped like the storages, zero where no page lies; wide unless ``local_dtype``.
    """
    if kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        q, pages, chosen = q[:, at], pages.of_heads(kv_heads), chosen[:, at]
        dout, lse, delta = dout[:, at], lse[:, at], delta[:, at]
    targets = into or (None, None, None)
    if kv_heads is not None and into is not None:
        targets = into[0][:, at], *into[1:]
    sums = [
        torch.zeros(x.shape, dtype=lse.dtype, device=q.device) if target is None or new else target
        for x, target, new in zip((q, pages.k, pages.v), targets, (whole, fresh, fresh))
    ]
    _add_gradients(q, pages, chosen, own, visible, scale, dout, lse, delta, *sums)
    if into is not None:
        for target, total in zip(targets, sums):
            if target is not total:
                target.copy_(total)
    if keys_done is not None:
        keys_done()
    return into or tuple(x.to(local_dtype or x.dtype) for x in sums)


def _add_gradients(
    q: Tensor, pages: Pages, chosen: Tensor, own: Tensor | None, visible: Tensor | None, scale: float,
    dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """:func:`attend_backward`: add to dq, dk and dv, wide."""
    n_rows, n_heads, dim = q.shape
    wide = dq.dtype
    for kv_head in range(pages.row.shape[0]):
        head = _Head(q, pages, kv_head, chosen, own, visible)
        group = head.heads.stop - head.heads.start
        part = torch.zeros(n_rows * group * head.n_slots, dim, dtype=wide, device=q.device)
        for tasks in head.chunks():
            rows, storage_head = head.key_rows(tasks)
            q_rows, do_rows = head.gather_rows(q, tasks), head.gather_rows(dout, tasks)
            k_rows, v_rows = pages.k[rows, storage_head].to(wide), pages.v[rows, storage_head].to(wide)
            score = head.scores(q_rows, k_rows, scale, tasks)
            prob = (score - head.gather_rows(lse, tasks)[..., None]).exp()
            dprob = torch.matmul(do_rows, v_rows.transpose(1, 2))
            dscore = prob * (dprob - head.gather_rows(delta, tasks)[..., None]) * scale
            real = head.tasks.visit[tasks] >= 0
            part[head.tasks.visit[tasks][real]] = torch.matmul(dscore, k_rows)[real]
            of_tasks = torch.matmul(dscore.transpose(1, 2), q_rows), torch.matmul(prob.transpose(1, 2), do_rows)
            head.add_keys((dk, dv), of_tasks, rows, storage_head, tasks)
        dq[:, head.heads] += part.view(n_rows, group, head.n_slots, dim).sum(2)


def routing_index(
    q: Tensor, chosen: Tensor, own: Tensor | None, visible: Tensor | None, page_row: Tensor
) -> Tensor | None:
    """Which rows visit each block, for :func:`attend` and :func:`attend_backward` over any storages of these blocks.

    Args:
        q: [N, Hq, D].
        chosen, own, visible: as in :func:`attend`.
        page_row: [Hkv, n] int64, -1 for blocks that nobody will attend to by this index.

    Returns:
        int32 that the kernels understand; None where there is nothing to share, as always here.
    """
    return None


def index_size(q: Tensor, n_kv: int, n_blocks: int, n_slots: int) -> int:
    """Elements of what :func:`routing_index` returns for ``n_slots`` visits per row and head; 0 for None."""
    return 0


def row_sums(a: Tensor, b: Tensor) -> Tensor:
    """Wide sums of ``a * b`` over D: a, b [N, Hq, D] -> [N, Hq]. Of dout and out: ``delta`` of the backward."""
    wide = wide_dtype(a.dtype)
    return torch.linalg.vecdot(a.to(wide), b.to(wide))


def merge(outs, lses) -> tuple[Tensor, Tensor]:
    """Join partial results over disjoint sets of keys: outs of [..., D], lses of [...], both wide."""
    lse = torch.stack(list(lses)).logsumexp(0)
    shift = lse.masked_fill(lse == -torch.inf, 0)
    out = torch.zeros_like(outs[0])
    for part, part_lse in zip(outs, lses):
        out += part * (part_lse - shift).exp()[..., None]
    return out, lse
