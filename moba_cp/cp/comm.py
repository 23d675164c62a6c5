"""The two collectives that context parallelism uses, over a torch.distributed group.

All-to-all and all-gather alone: they run unchanged on gloo with CPU tensors and on NCCL, and large batches of
point-to-point operations, which have been seen to hang NCCL, are never made.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed it; the old name warns there, the new one is missing before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Counters:
    """What moved since the last :meth:`reset`, on this rank; bytes between this rank and others."""

    sent: dict[str, int] = field(default_factory=dict)
    """Bytes sent to other ranks, by kind of message."""
    received: dict[str, int] = field(default_factory=dict)
    """Bytes received from other ranks, by kind of message."""
    dense_ring: int = 0
    """Bytes a dense ring would have received for the same calls."""
    needed: int = 0
    """(KV head, block) pairs fetched from other ranks."""
    remote: int = 0
    """(KV head, block) pairs of other ranks that some local query could have chosen."""

    def add(self, kind: str, sent: int, received: int) -> None:
        """Count one message."""
        self.sent[kind] = self.sent.get(kind, 0) + sent
        self.received[kind] = self.received.get(kind, 0) + received

    def reset(self) -> None:
        """Start again from zero."""
        self.__init__()

    def summary(self) -> dict[str, int | float]:
        """Flat numbers for a log."""
        flat = {f"sent_{kind}_bytes": n for kind, n in sorted(self.sent.items())}
        flat |= {f"received_{kind}_bytes": n for kind, n in sorted(self.received.items())}
        return flat | {
            "sent_bytes": sum(self.sent.values()),
            "received_bytes": sum(self.received.values()),
            "dense_ring_bytes": self.dense_ring,
            "needed_share": self.needed / self.remote if self.remote else 0.0,
        }


class Communicator:
    """Collectives over one process group, with bytes counted.

    Tests replace it by ranks that are threads of one process.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.counters = Counters()

    def all_gather(self, x: Tensor, kind: str) -> Tensor:
        """Equal-sized ``x`` of every rank, stacked: [P, *x.shape]."""
        return self.start_all_gather(x, kind)()

    def start_all_gather(self, x: Tensor, kind: str) -> Callable[[], Tensor]:
        """:meth:`all_gather`, as a function that waits; ``x`` may not be changed before it is called."""
        others = x.nbytes * (self.size - 1)
        self.counters.add(kind, others, others)
        return self._all_gather(x.contiguous())

    def gather_uncounted(self, x: Tensor) -> Tensor:
        """:meth:`all_gather` for what is not part of an attention layer."""
        return self._all_gather(x.contiguous())()

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int], kind: str) -> Callable[[], Tensor]:
        """Send ``send[p]`` rows of ``x`` to each rank p and receive ``receive[p]`` rows from it.

        Args:
            x: [sum(send), ...], the rows for rank 0 first.

        Returns:
            A function that waits for the transfer and returns [sum(receive), ...], the rows of rank 0 first. ``x`` may
            not be changed before it is called.
        """
        row = x.element_size() * x.shape[1:].numel()
        self.counters.add(kind, (sum(send) - send[self.rank]) * row, (sum(receive) - receive[self.rank]) * row)
        return self._all_to_all(x.contiguous(), send, receive)

    def _all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: x[None]
        out = x.new_empty(self.size, *x.shape)
        work = _all_gather_single(out.view(-1), x.view(-1), group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out

        return wait

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: x
        out = x.new_empty(sum(receive), *x.shape[1:])
        work = dist.all_to_all_single(out, x, receive, send, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out

        return wait
