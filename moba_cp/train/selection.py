"""What MoBA layers select, in a few numbers: how far back, how evenly, and how often a document's first block."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..cp.context import CPContext


class SelectionStatistics:
    """Sums over one forward pass, as ``CPContext(..., observer=statistics)``; set ``context`` before the pass.

    Legend: L local tokens, Hq query heads, S = k - 1 selected blocks of a row, n blocks of all documents.
    """

    def __init__(self) -> None:
        self.context: CPContext | None = None
        self._layers: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: str, selection: Tensor, n_kv_heads: int, block_size: int) -> None:
        context = self.context
        bounds = context.cu_seqlens.to(selection.device, torch.int64)
        blocks = (bounds.diff() + block_size - 1) // block_size
        firsts = torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])
        document = torch.searchsorted(bounds, context.document_starts, right=True) - 1
        first = firsts[document][:, None, None]
        current = first + (context.document_positions // block_size)[:, None, None]
        # A head at a time: a whole selection in 64 bits would be large.
        sums, counts = selection.new_zeros(3, dtype=torch.float64), firsts.new_zeros(int(firsts[-1]))
        for head in selection.unbind(1):
            chosen = head.long()[:, None]
            has = chosen >= 0
            ages = torch.where(has, current - chosen, 0).sum()
            beginnings = (has & (chosen == first)).sum()
            sums += torch.stack([has.sum(), ages, beginnings]).double()
            counts += torch.bincount(chosen[has], minlength=counts.numel())
        self._layers[layer] = sums, counts

    def result(self) -> dict[str, dict[str, float]]:
        """For each layer, over all its queries and heads: ``age``, the mean of how many blocks lie between a query's
        block and a selected one, plus 1; ``first_block``, the share of the selected blocks that begin their document;
        ``entropy``, in bits, of how often each block is selected, over its largest value, that of equal numbers.
        A collective call of the context group."""
        found = {}
        for layer, (sums, counts) in self._layers.items():
            dist.all_reduce(sums, group=self.context.comm.group)
            dist.all_reduce(counts, group=self.context.comm.group)
            n, ages, firsts = sums.tolist()
            if not n:
                continue
            shares = counts[counts > 0].double() / n
            entropy = -(shares * shares.log2()).sum().item()
            most = math.log2(counts.numel()) if counts.numel() > 1 else 1.0
            found[layer] = {
                "age": round(ages / n, 3),
                "first_block": round(firsts / n, 4),
                "entropy": round(entropy / most, 4),
            }
        return found
