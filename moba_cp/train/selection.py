"""What MoBA layers select, in a few numbers: how far back, how evenly, how often a document's first block and the most
recent one, and how alike in the heads of a group and in rows that follow one another."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..cp.context import CPContext


class SelectionStatistics:
    """Sums over one forward pass, as ``CPContext(..., observer=statistics)``; set ``context`` before the pass.

    Legend: L local tokens, G heads of a selection (query heads, or KV heads whose groups share it), S selected blocks
    of a row, n blocks of all documents.
    """

    def __init__(self) -> None:
        self.context: CPContext | None = None
        self._layers: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: str, selection: Tensor, n_kv_heads: int, block_size: int) -> None:
        context = self.context
        bounds = context.cu_seqlens.to(selection.device, torch.int64)
        blocks = (bounds.diff() + block_size - 1) // block_size
        firsts = torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])
        starts, positions = context.document_starts, context.document_positions
        document = torch.searchsorted(bounds, starts, right=True) - 1
        first = firsts[document][:, None]
        current = first + (positions // block_size)[:, None]
        follows = (starts[1:] == starts[:-1]) & (positions[1:] == positions[:-1] + 1)
        group, before = selection.shape[1] // n_kv_heads, None
        # A head at a time: a whole selection in 64 bits would be large.
        sums, counts = selection.new_zeros(8, dtype=torch.float64), firsts.new_zeros(int(firsts[-1]))
        for number, head in enumerate(selection.unbind(1)):
            chosen = head.long()
            has = chosen >= 0
            ages = torch.where(has, current - chosen, 0)
            zero = ages.new_zeros(())
            of_head = [has.sum(), ages.sum(), (has & (chosen == first)).sum(), (ages == 1).sum()]
            of_head += [(has[1:] & follows[:, None]).sum(), _shared(head[1:][follows], head[:-1][follows])]
            of_head += [has.sum(), _shared(head, before)] if number % group else [zero, zero]
            sums += torch.stack(of_head).double()
            counts += torch.bincount(chosen[has], minlength=counts.numel())
            before = head
        self._layers[layer] = sums, counts

    def result(self) -> dict[str, dict[str, float]]:
        """For each layer, over all its queries and heads: ``age``, the mean of how many blocks lie between a query's
        block and a selected one, plus 1; ``first_block``, the share of the selected blocks that begin their document;
        ``recent``, of those right before the query's own; ``entropy``, in bits, of how often each block is selected,
        over its largest value, that of equal numbers; ``row_overlap``, the share of a row's blocks that the row before
        it in its document selected too; and ``group_overlap``, of a head's blocks that the head before it in its group
        selected too, where heads select for themselves. A collective call of the context group."""
        found = {}
        for layer, (sums, counts) in self._layers.items():
            dist.all_reduce(sums, group=self.context.comm.group)
            dist.all_reduce(counts, group=self.context.comm.group)
            n, ages, firsts, recent, of_rows, in_rows, of_heads, in_heads = sums.tolist()
            if not n:
                continue
            shares = counts[counts > 0].double() / n
            entropy = -(shares * shares.log2()).sum().item()
            most = math.log2(counts.numel()) if counts.numel() > 1 else 1.0
            found[layer] = {
                "age": round(ages / n, 3),
                "first_block": round(firsts / n, 4),
                "recent": round(recent / n, 4),
                "entropy": round(entropy / most, 4),
            }
            if of_rows:
                found[layer]["row_overlap"] = round(in_rows / of_rows, 4)
            if of_heads:
                found[layer]["group_overlap"] = round(in_heads / of_heads, 4)
        return found


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """[] int64, how many blocks are both in a row of a [N, S] and in the same row of b; none is in either twice."""
    both = torch.cat([a, b], 1).sort(1).values
    return ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum()
