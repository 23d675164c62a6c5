"""Rows and blocks on their way between ranks, in vectorised PyTorch: gathered, joined, added, packed.

Legend: N query rows, H heads, Hq query heads, Hkv key/value heads, D head dim, n blocks, S slots of a row.
"""

import torch
from torch import Tensor

from ..blocks import Pages
from ..dtypes import WIDE
from .attention import merge


def gather_rows(x: Tensor, slots: Tensor, n_slots: int, dtype: torch.dtype) -> Tensor:
    """Rows of x [N, H, D] at slots [M] int32, indices into [H, N, n_slots] -> [M, D] in ``dtype``."""
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
    for rows in index.long().unbind(2):
        there, at = rows >= 0, rows.clamp(min=0)
        joined, joined_lse = merge([out, part[at]], [lse, torch.where(there, part_lse[at], -torch.inf)])
        out.copy_(torch.where(there[..., None], joined, out))
        lse.copy_(joined_lse)


def add_rows(out: Tensor, part: Tensor, index: Tensor) -> None:
    """Add single rows to ``out`` [N, Hq, D], in place; part [M, D] and index [N, Hq, S] as in :func:`merge_rows`."""
    if part.shape[0] == 0:
        return
    for rows in index.long().unbind(2):
        out += torch.where((rows >= 0)[..., None], part[rows.clamp(min=0)], 0)


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


def pack_kv_shard(k: Tensor, v: Tensor, shard: Tensor, cut: int) -> None:
    """Lay K beside V: first each head's rows before the cut, head by head, then the others likewise.

    Args:
        k, v: [R, H, D].
        shard: [H * W, 2, D] contiguous, W >= R; what is kept for rows past R is left as it is.
    """
    for rows, part in _shard_parts(k, shard, cut):
        part[:, :, 0], part[:, :, 1] = k[rows].transpose(0, 1), v[rows].transpose(0, 1)


def sum_partial_grads(own_part: Tensor, parts: Tensor, spans: Tensor, dk: Tensor, dv: Tensor, cut: int) -> None:
    """Write the sums of all ranks' partial gradients of some rows; the sums are wide.

    Args:
        own_part: [H * W, 2, D] contiguous, any floating dtype: this rank's part, laid out as by :func:`pack_kv_shard`.
        parts: [M, 2, D] contiguous, any floating dtype: what the other ranks return.
        spans: [S, 3] int64: part i begins at row ``spans[i, 0]`` of ``parts`` and has the shard's rows
            ``spans[i, 1] .. spans[i, 2]``. They are summed in this order.
        dk, dv: [R, H, D] with R <= W and equal strides, written in their dtype.
    """
    total = own_part.to(WIDE[own_part.dtype], copy=True)
    for start, first, end in spans.tolist():
        total[first:end] += parts[start : start + end - first]
    for rows, part in _shard_parts(dk, total, cut):
        dk[rows], dv[rows] = part[:, :, 0].transpose(0, 1).to(dk.dtype), part[:, :, 1].transpose(0, 1).to(dv.dtype)


def _shard_parts(rows: Tensor, shard: Tensor, cut: int) -> list[tuple[slice, Tensor]]:
    """For rows [R, H, D]: those before the cut and the others, and where they lie in a shard, [H, rows, 2, D]."""
    n_rows, n_heads, _ = rows.shape
    before, after = shard.tensor_split([n_heads * cut])
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
