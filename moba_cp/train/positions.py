"""Loss by the position of a token in its document: whether a model uses a long context shows there alone."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.loss import IGNORED_LABEL

# The first range; each further one is as long as all before it.
_FIRST = 128


class LossByPosition:
    """Sums of losses and of labels by ranges of positions, 0 to 127, 128 to 255, 256 to 511 and so on.

    Args:
        longest: tokens of the longest document.
        device: of what is added.
        width: positions of each range, for ranges of one width; None for ranges that double.
    """

    def __init__(self, longest: int, device: torch.device, width: int | None = None):
        self._width = width
        last = max(longest - 1, 0) // (_FIRST if width is None else width)
        n_ranges = max(1, last.bit_length() + 1) if width is None else last + 1
        self._sums = torch.zeros(n_ranges, 2, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, labels: Tensor, positions: Tensor) -> None:
        """Add what this rank has: loss [L], labels [L] int64, positions in documents [L] int64."""
        # The exponent of 2 that frexp gives is exact, which a logarithm is not: 0 for 0, 1 for 1, 2 for 2 and 3.
        if self._width is None:
            index = torch.frexp((positions // _FIRST).double()).exponent.long()
        else:
            index = positions // self._width
        index = index.clamp(max=len(self._sums) - 1)
        has = labels != IGNORED_LABEL
        values = torch.stack([torch.where(has, loss, 0).double(), has.double()], 1)
        self._sums.index_add_(0, index, values)

    def reduce(self, group: dist.ProcessGroup | None = None) -> tuple[float | None, list[dict]]:
        """The mean loss over all ranks, None without labels, and that of each range that has labels, as
        ``{"from", "to", "loss", "labels"}``; collective over ``group``."""
        dist.all_reduce(self._sums, group=group)
        rows = self._sums.tolist()
        total, labels = (sum(column) for column in zip(*rows))
        ranges = [
            {"from": self._end(i - 1), "to": self._end(i) - 1, "loss": loss / n, "labels": int(n)}
            for i, (loss, n) in enumerate(rows)
            if n
        ]
        return (total / labels if labels else None), ranges

    def _end(self, i: int) -> int:
        """The first position behind range ``i``; 0 for -1."""
        if self._width is not None:
            return (i + 1) * self._width
        return _FIRST << i if i >= 0 else 0
