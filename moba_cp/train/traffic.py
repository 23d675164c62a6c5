"""Bytes that attention moved between ranks in a step, for the log: summed over ranks, in all and by layer."""

from typing import Any

import torch
import torch.distributed as dist

from ..cp.comm import Communicator
from ..cp.counters import Counters

_SUMMED = ("sent_bytes", "received_bytes", "planned_bytes", "dense_ring_bytes")


def gather(
    loss_sum: torch.Tensor, comm: Communicator, group: dist.ProcessGroup | None = None
) -> tuple[float, dict[str, Any]]:
    """The loss summed over all ranks, and what moved; a collective call of all ranks of the run.

    Args:
        loss_sum: [] float64, this rank's.
        comm: the communicator of this rank's context group, whose counters cover the step.
        group: all ranks of the run; None where these are all of torch.distributed.

    Returns:
        the sum, and the log's ``exchange`` entry: bytes summed over ranks, the share of remote blocks that was needed
        (None where nothing was planned: one rank, full layers, all-gather), the bytes that the busiest rank received
        over the mean (0 where nothing moved), rank 0's bytes by kind, and for each layer its bytes, needed share and
        most rows of one rank that chose one (KV head, block).
    """
    layers = list(comm.by_layer.items())
    numbers = [loss_sum.item(), *_numbers(comm.counters)] + [x for _, counters in layers for x in _numbers(counters)]
    mine = torch.tensor(numbers, dtype=torch.float64, device=loss_sum.device)
    every = mine.new_empty(dist.get_world_size(group), mine.numel())
    dist.all_gather(list(every.unbind()), mine, group=group)
    total, *by_layer = every[:, 1:].unflatten(1, (1 + len(layers), -1)).unbind(1)
    received = total[:, _SUMMED.index("received_bytes")]
    kinds = {name: n for name, n in comm.counters.summary().items() if n and name.endswith("_bytes")}
    return every[:, 0].sum().item(), {
        **_summed(total),
        "imbalance": round((received.max() / received.mean()).item(), 4) if received.any() else 0.0,
        "first_rank": {name: n for name, n in kinds.items() if name not in _SUMMED},
        "layers": {name: _summed(numbers) for (name, _), numbers in zip(layers, by_layer, strict=True)},
    }


def _numbers(counters: Counters) -> list[int]:
    moved = counters.summary()
    return [*(moved[name] for name in _SUMMED), counters.needed, counters.remote, counters.hottest]


def _summed(numbers: torch.Tensor) -> dict[str, Any]:
    """[ranks, 7] of :func:`_numbers` as a log entry."""
    *moved, needed, remote, _ = numbers.sum(0).tolist()
    return {name: int(n) for name, n in zip(_SUMMED, moved, strict=True)} | {
        "needed_share": round(needed / remote, 4) if remote else None,
        "hottest_rows": int(numbers[:, -1].max()),
    }
