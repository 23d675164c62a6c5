"""The attention primitives in vectorised PyTorch: any device, any floating dtype, float64 included.

They take the same arguments as the Triton kernels and follow the same plan. A *visit* is one query row of one head
looking at one block. Visits are sorted by block, cut into tasks of at most ``TASK_ROWS`` rows, and each task is one
small dense attention. Nothing of size tokens x tokens is ever made.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, n blocks,
S chosen blocks per row, E visits, R rows per task, W keys of a task. Wide means float32, or float64 for float64 inputs.
"""

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
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of rows to those of their blocks that lie in ``pages``.

    Args:
        q: [N, Hq, D].
        pages: the storage; Hkv is ``pages.row.shape[0]``.
        chosen: [N, Hq, S] int32 block ids seen whole; -1, or a block not in ``pages``, is skipped.
        own: [N] int32, block id of which only the first ``visible[t]`` keys are seen; None for none.
        visible: [N] int32, with ``own``.
        scale: factor of the scores.
        into: wide out and lse over other keys, to join the result to; out may hold anything where lse is -inf.

    Returns:
        out [N, Hq, D] and lse [N, Hq], both wide; a row that sees nothing has out 0 and lse -inf.
    """
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
    if into is not None:
        before = torch.where(into[1][..., None] == -torch.inf, 0, into[0])
        for target, joined in zip(into, merge([before, out], [into[1], lse]), strict=True):
            target.copy_(joined)
        return into
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
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attend`, as the part that this storage has in the attention over all storages.

    Args:
        dout: [N, Hq, D], gradient of the final output.
        lse: [N, Hq], log-sum-exp over everything the row sees, in all storages.
        delta: [N, Hq], row sums of ``dout * out`` of the final output.
        deterministic: accepted for symmetry with the kernels; this path always is, on any number of threads.
        into: wide dq, dk and dv to add to instead of new ones; dk and dv with equal strides.

    Returns:
        dq [N, Hq, D], and dk, dv shaped like the storages, zero where no page lies; all wide.
    """
    n_rows, n_heads, dim = q.shape
    wide = wide_dtype(q.dtype)
    dq, dk, dv = into or (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (q, pages.k, pages.v))
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
    return dq, dk, dv


def row_sums(a: Tensor, b: Tensor) -> Tensor:
    """Wide sums of ``a * b`` over D: a, b [N, Hq, D] -> [N, Hq]. Of dout and out: ``delta`` of the backward."""
    wide = wide_dtype(a.dtype)
    return torch.linalg.vecdot(a.to(wide), b.to(wide))


def gather_rows(x: Tensor, slots: Tensor, n_slots: int, dtype: torch.dtype) -> Tensor:
    """Rows of x [N, H, D] at slots [M] int32, places in [H, N, n_slots] -> [M, D] in ``dtype``."""
    row = slots.long() // n_slots
    return x[row % x.shape[0], row // x.shape[0]].to(dtype)


def merge_rows(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, index: Tensor) -> None:
    """Join partial results of single rows into ``out`` and ``lse``, in place and in the order of the slots.

    Args:
        out: [N, Hq, D], lse: [N, Hq], wide.
        part: [M, D], part_lse: [M], wide.
        index: [N, Hq, S] int32, which partial result belongs to each slot, -1 for none.
    """
    if part.shape[0] == 0:
        return
    for places in index.long().unbind(2):
        there, at = places >= 0, places.clamp(min=0)
        joined, joined_lse = merge([out, part[at]], [lse, torch.where(there, part_lse[at], -torch.inf)])
        out.copy_(torch.where(there[..., None], joined, out))
        lse.copy_(joined_lse)


def add_rows(out: Tensor, part: Tensor, index: Tensor) -> None:
    """Add single rows to ``out`` [N, Hq, D], in place; part [M, D] and index [N, Hq, S] as in :func:`merge_rows`."""
    if part.shape[0] == 0:
        return
    for places in index.long().unbind(2):
        out += torch.where((places >= 0)[..., None], part[places.clamp(min=0)], 0)


def merge(outs, lses) -> tuple[Tensor, Tensor]:
    """Join partial results over disjoint sets of keys: outs of [..., D], lses of [...], both wide."""
    lse = torch.stack(list(lses)).logsumexp(0)
    shift = lse.masked_fill(lse == -torch.inf, 0)
    out = torch.zeros_like(outs[0])
    for part, part_lse in zip(outs, lses):
        out += part * (part_lse - shift).exp()[..., None]
    return out, lse


def copy_pages(pages: Pages, pairs: Tensor, offset: Tensor, out: Tensor) -> None:
    """Copy K and V of the blocks ``pairs`` that lie in ``pages`` to ``out``; others leave their rows as they are.

    Args:
        pages: the storage.
        pairs: [m] int64, (KV head, block) as ``head * n + block``.
        offset: [m] int64, row of ``out`` at which each begins; the next one begins where it ends.
        out: [R, 2, D] contiguous, K beside V.
    """
    to, row, head = _page_rows(pages, pairs, offset, 0, out.shape[0])
    out[to, 0], out[to, 1] = pages.k[row, head], pages.v[row, head]


def add_pages(
    dk: Tensor, dv: Tensor, pages: Pages, pairs: Tensor, offset: Tensor, arrived: Tensor, begin: int, end: int
) -> None:
    """Add gradients of blocks to those of the storage where they lie; blocks that do not lie there are passed over.

    Args:
        dk, dv: gradients of ``pages.k`` and ``pages.v``, wide, with equal strides.
        pairs, offset: as in :func:`copy_pages`; those that begin in rows ``begin .. end``, all of them different, are
            added.
        arrived: [R, 2, D] contiguous, any floating dtype.
    """
    at, row, head = _page_rows(pages, pairs, offset, begin, end)
    dk[row, head] += arrived[at, 0].to(dk.dtype)
    dv[row, head] += arrived[at, 1].to(dv.dtype)


def pack_slab(k: Tensor, v: Tensor, slab: Tensor, cut: int) -> None:
    """Lay K beside V: first each head's rows before the cut, head by head, then the others likewise.

    Args:
        k, v: [R, H, D].
        slab: [H * W, 2, D] contiguous, W >= R; places of rows past R are left as they are.
    """
    for rows, part in _slab_parts(k, slab, cut):
        part[:, :, 0], part[:, :, 1] = k[rows].transpose(0, 1), v[rows].transpose(0, 1)


def sum_shares(own: Tensor, shares: Tensor, places: Tensor, dk: Tensor, dv: Tensor, cut: int) -> None:
    """Write the sums of all ranks' shares of the gradients of some rows; wide sums.

    Args:
        own: [H * W, 2, D] contiguous, any floating dtype: the share of this rank, a slab as of :func:`pack_slab`.
        shares: [M, 2, D] contiguous, any floating dtype: what others return.
        places: [S, 3] int64: share i begins at row ``places[i, 0]`` of ``shares`` and has the slab's rows
            ``places[i, 1] .. places[i, 2]``. They are summed in this order.
        dk, dv: [R, H, D] with R <= W and equal strides, written in their dtype.
    """
    total = own.to(wide_dtype(own.dtype), copy=True)
    for start, first, end in places.tolist():
        total[first:end] += shares[start : start + end - first]
    for rows, part in _slab_parts(dk, total, cut):
        dk[rows], dv[rows] = part[:, :, 0].transpose(0, 1).to(dk.dtype), part[:, :, 1].transpose(0, 1).to(dv.dtype)


def _slab_parts(rows: Tensor, slab: Tensor, cut: int) -> list[tuple[slice, Tensor]]:
    """For rows [R, H, D]: those before the cut and the others, and where they lie in a slab, [H, rows, 2, D]."""
    n_rows, n_heads, _ = rows.shape
    before, after = slab.tensor_split([n_heads * cut])
    parts = (0, min(cut, n_rows), before), (min(cut, n_rows), n_rows, after)
    return [(slice(a, b), x.view(n_heads, -1, *x.shape[1:])[:, : b - a]) for a, b, x in parts if a < b]


def _page_rows(pages: Pages, pairs: Tensor, offset: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the rows ``begin .. end`` of a message whose block lies in ``pages``: row of the message, row of the storage
    and its head, int64 each."""
    n = pages.row.shape[1]
    message = torch.arange(begin, end, device=pairs.device)
    index = torch.searchsorted(offset, message, right=True) - 1
    head, block = pairs[index] // n, pairs[index] % n
    start = pages.row[head, block]
    here = start >= 0
    row = start + message - offset[index]
    return message[here], row[here], pages.head[head, block].long()[here]
