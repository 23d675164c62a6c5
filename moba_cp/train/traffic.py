"""What the ranks add up at the end of a step: loss, and the bytes that attention moved, in all and by layer."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..cp.comm import Communicator, HostCopy
from ..cp.counters import Counters
from ..host import to_device

_SUMMED = ("sent_bytes", "received_bytes", "planned_bytes", "dense_ring_bytes")


class StepTotals:
    """A step's sums over all ranks, on their way to the host; making it is a collective call that waits for nothing.

    Args:
        loss_sum: [] float64, this rank's.
        labels: [] int64, of all ranks.
        norm: [] float32, of the gradient of all ranks.
        index_sum: [] float64, of this rank's index branches; None where there are none.
        comm: the communicator of this rank's context group, whose counters cover the step.
        group: all ranks of the run; None where these are all of torch.distributed.
    """

    def __init__(
        self,
        loss_sum: Tensor,
        labels: Tensor,
        norm: Tensor,
        comm: Communicator,
        group: dist.ProcessGroup | None = None,
        index_sum: Tensor | None = None,
    ):
        self._comm, self._layers = comm, list(comm.by_layer.items())
        counted = _numbers(comm.counters) + [x for _, counters in self._layers for x in _numbers(counters)]
        counted = to_device(torch.tensor(counted, dtype=torch.float64), loss_sum.device)
        every = loss_sum.new_empty(dist.get_world_size(group), 4 + counted.numel())
        index_sum = torch.zeros_like(loss_sum) if index_sum is None else index_sum
        sums = [loss_sum, labels.double(), norm.double().to(loss_sum.device), index_sum]
        mine = torch.cat([torch.stack(sums), counted])
        dist.all_gather(list(every.unbind()), mine, group=group)
        # Column by column: a list as an index is a tensor that the host waits for.
        total = every[:, 0].sum() + every[:, 2].sum() + every[:, 3].sum()
        self.nonfinite = (~total.isfinite()).float()
        """[] float32 on the device: 1 where the loss or the gradient of some rank is not finite, else 0; equal on all
        ranks."""
        self._host = HostCopy(every)

    def get(self) -> tuple[float, int, float, dict[str, Any], float]:
        """Wait for what was computed before this was made, and for that alone.

        Returns:
            loss per label; labels; norm; and the log's ``exchange`` entry: bytes summed over ranks, the share of remote
            blocks that was needed (None where nothing was planned: one rank, full layers, all-gather), the bytes that
            the busiest rank received over the mean (0 where nothing moved), rank 0's bytes by kind, and for each layer
            its bytes, needed share and most rows of one rank that chose one (KV head, block); and the loss of index
            branches per label.
        """
        every = self._host.get()
        loss_sum, labels, norm = every[:, 0].sum().item(), int(every[0, 1]), every[:, 2].max().item()
        total, *by_layer = every[:, 4:].unflatten(1, (1 + len(self._layers), -1)).unbind(1)
        received = total[:, _SUMMED.index("received_bytes")]
        kinds = {name: n for name, n in self._comm.counters.summary().items() if n and name.endswith("_bytes")}
        return (
            loss_sum / max(1, labels),
            labels,
            norm,
            {
                **_summed(total),
                "imbalance": round((received.max() / received.mean()).item(), 4) if received.any() else 0.0,
                "first_rank": {name: n for name, n in kinds.items() if name not in _SUMMED},
                "layers": {name: _summed(n) for (name, _), n in zip(self._layers, by_layer, strict=True)},
            },
            every[:, 3].sum().item() / max(1, labels),
        )


def _numbers(counters: Counters) -> list[int]:
    moved = counters.summary()
    return [*(moved[name] for name in _SUMMED), counters.needed, counters.remote, counters.hottest]


def _summed(numbers: Tensor) -> dict[str, Any]:
    """[ranks, 7] of :func:`_numbers` as a log entry."""
    *moved, needed, remote, _ = numbers.sum(0).tolist()
    return {name: int(n) for name, n in zip(_SUMMED, moved, strict=True)} | {
        "needed_share": round(needed / remote, 4) if remote else None,
        "hottest_rows": int(numbers[:, -1].max()),
    }
