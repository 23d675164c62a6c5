"""What context parallelism moves over a torch.distributed group: two collectives, and copies within a node.

All-to-all and all-gather alone: they run unchanged on gloo with CPU tensors and on NCCL, and large batches of
point-to-point operations, which have been seen to hang NCCL, are never made.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .calls import ExchangeError, ledger_of
from .counters import Counters
from .watchdog import Monitor

# PyTorch 2.13 renamed it; the old name warns there, the new one is missing before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


UNNAMED_LAYER = "an unnamed layer"
"""A layer's name where the model gives none."""
BACKWARD = "the backward of "
"""What stands before a layer's name in the errors of its backward pass."""


def wait_for(event: torch.cuda.Event | None) -> None:
    """Let the current stream wait for ``event``; None has happened."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


class SideStream:
    """A stream that goes before others; made at the first use."""

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None

    def beside(self, after: torch.cuda.Event | None):
        """Context in which work is issued beside the current stream, once it has passed ``after``; nothing for None."""
        if after is None:
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(priority=-1)
        self._stream.wait_event(after)
        return torch.cuda.stream(self._stream)


class HostCopy:
    """A small tensor on its way from the device to the host; :meth:`get` waits for it, once."""

    def __init__(self, x: Tensor):
        self._event = None
        self._host = x
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def ready(self) -> bool:
        """Whether :meth:`get` would not wait."""
        return self._event is None or self._event.query()

    def get(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host


class Communicator:
    """Collectives over one process group, with bytes counted and failures named.

    Tests replace it by ranks that are threads of one process.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.counters = Counters()
        self.by_layer: dict[str, Counters] = {}
        """The same counts apart for each layer, by its name."""
        self.layer = UNNAMED_LAYER
        """What is being computed, for counters and error messages; whoever calls a layer sets it."""
        self.direction = ""
        """Put before the layer in error messages."""
        self.memory: Any = None
        """Memory that all ranks read, where a caller has such; see :func:`.symmetric_memory.peer_memory`."""
        self._common = _in_common(group)
        self._what = ""
        self.calls = ledger_of(group)
        """The attention calls of all contexts of this group."""
        self._context: tuple[int, int] | None = None

    checks_calls = True
    """Whether calls are counted, and compared with those of other ranks."""

    def enter_call(self, *what) -> int:
        """An attention call of the current layer begins, or its backward pass; ``what`` says more of it, the same on
        all ranks.

        Returns:
            A digest of all calls so far.

        Raises:
            ExchangeError: by now it is known that an earlier call was not the same on all ranks.
        """
        if self.size == 1 or not self.checks_calls:
            return 0
        pending = self.calls.pending
        while pending and pending[0].look():
            pending.popleft()
        self._context = self.calls.context(self._context)
        return self.calls.enter((self._context[1], self.direction, self.layer, *what))

    def ranks_per_node(self) -> int | None:
        """Ranks of this group on each node, from LOCAL_WORLD_SIZE as launchers set it.

        None where that is not set, or where nodes do not hold equally many consecutive ranks of the group.
        """
        local, launchers = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_WORLD_SIZE")
        if self.group is None or not local:
            return None
        if launchers and int(local) * int(launchers) != dist.get_world_size():
            # A launch with unequal nodes: this node's size says nothing of the others, which would conclude otherwise.
            return None
        nodes = [rank // int(local) for rank in dist.get_process_group_ranks(self.group)]
        count = nodes.count(nodes[0])
        even = [i // count for i in range(self.size)]
        starts = nodes[::count]
        same = len(set(starts)) == len(starts) and all(node == starts[i] for node, i in zip(nodes, even))
        return count if same and self.size % count == 0 else None

    def all_gather(self, x: Tensor, kind: str) -> Tensor:
        """Equal-sized ``x`` of every rank, stacked: [P, *x.shape]."""
        return self.all_gather_async(x, kind)()

    def all_gather_async(self, x: Tensor, kind: str, uncounted: int = 0) -> Callable[[], Tensor]:
        """:meth:`all_gather` that returns at once; the function it returns waits. ``uncounted`` bytes of ``x`` are no
        payload."""
        others = (x.nbytes - uncounted) * (self.size - 1)
        self._count(kind, others, others)
        return self._guarded(f"{kind} all-gather", lambda: self._all_gather(x.contiguous()))

    def gather_uncounted(self, x: Tensor) -> Tensor:
        """:meth:`all_gather` for what is not part of an attention layer."""
        return self._guarded("all-gather", lambda: self._all_gather(x.contiguous()))()

    def all_to_all_uncounted(self, x: Tensor) -> Tensor:
        """An equal part of ``x`` [P * n, ...] to each rank, and one from each, for what is not part of a layer."""
        rows = [x.shape[0] // self.size] * self.size
        return self._guarded("all-to-all", lambda: self._all_to_all(x.contiguous(), rows, rows))()

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int], kind: str) -> Callable[[], Tensor]:
        """Send ``send[p]`` rows of ``x`` to each rank p and receive ``receive[p]`` rows from it.

        Args:
            x: [sum(send), ...], the rows for rank 0 first.

        Returns:
            A function that waits for the transfer and returns [sum(receive), ...], the rows of rank 0 first. ``x`` may
            not be changed before it is called.
        """
        row = x.element_size() * x.shape[1:].numel()
        self._count(kind, (sum(send) - send[self.rank]) * row, (sum(receive) - receive[self.rank]) * row)
        return self._guarded(f"{kind} all-to-all", lambda: self._all_to_all(x.contiguous(), send, receive))

    def copied(
        self, kind: str, sent: int, received: int, start: Callable[[], tuple[Tensor, torch.cuda.Event | None]]
    ) -> Callable[[], Tensor]:
        """Bytes that copy engines move between ranks.

        Args:
            start: starts the copies on the current stream; returns what holds them, and the event that follows.

        Returns:
            A function that lets the current stream wait for the copies and returns what holds them.
        """
        self._count(kind, sent, received)

        def started() -> Callable[[], Tensor]:
            what = self._what
            out, event = start()

            def wait() -> Tensor:
                wait_for(event)
                if event is not None:
                    self._watch(event, what)
                return out

            return wait

        return self._guarded(f"{kind} copy", started)

    def mark(self, x: Tensor) -> torch.cuda.Event | None:
        """This point of the current stream, for :meth:`beside`; None where ``x`` is not on a GPU."""
        return torch.cuda.current_stream().record_event() if x.is_cuda else None

    def beside(self, after: torch.cuda.Event | None):
        """Context in which work is issued beside the current stream, once it has passed ``after``.

        Packing a message and sending it must not queue behind the attention that it is to overlap with, nor wait until
        that leaves room on the GPU: the stream goes before others. (NCCL's own does under TORCH_NCCL_HIGH_PRIORITY=1.)
        """
        return self._common.side.beside(after)

    def reset_counters(self) -> None:
        """Start all counters again from zero."""
        self.counters.reset()
        self.by_layer.clear()

    def books(self) -> tuple[Counters, Counters]:
        """The counters of all layers and those of the current one."""
        if self.layer not in self.by_layer:
            self.by_layer[self.layer] = Counters()
        return self.counters, self.by_layer[self.layer]

    def _count(self, kind: str, sent: int, received: int) -> None:
        for counters in self.books():
            counters.sent[kind] += sent
            counters.received[kind] += received

    def _guarded(self, what: str, start: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
        """``start()`` and the waiting it returns, with errors that say who failed at what and where."""
        self._what = f"{what} in {self.direction}{self.layer}"
        name = f"rank {self.rank} of {self.size}: {self._what}"

        def failed(error: RuntimeError) -> ExchangeError:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return ExchangeError(f"{name} failed, another rank has left or hangs: {lines[0]}")

        try:
            wait = start()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise failed(error) from error

        def guarded() -> Tensor:
            try:
                return wait()
            except RuntimeError as error:
                raise failed(error) from error

        return guarded

    def _all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: x[None]
        out = x.new_empty(self.size, *x.shape)
        return self._started(_all_gather_single(out.view(-1), x.view(-1), group=self.group, async_op=True), x, out)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: x
        out = x.new_empty(sum(receive), *x.shape[1:])
        return self._started(dist.all_to_all_single(out, x, receive, send, group=self.group, async_op=True), x, out)

    def _started(self, work: dist.Work, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
        what, sent = self._what, [x]

        def wait() -> Tensor:
            work.wait()
            # Both were made on the stream beside: what is packed or received next must not take their memory too soon.
            used_here(*sent, out)
            sent.clear()
            if out.is_cuda:
                self._watch(torch.cuda.current_stream().record_event(), what)
            return out

        return wait

    def _watch(self, event: torch.cuda.Event, what: str) -> None:
        # On a GPU waiting returns at once.
        self._common.monitor(self).watch(event, what)


class _InCommon:
    """What the communicators of a group have in common, which are made for every batch; it ends with the group."""

    def __init__(self):
        self.side = SideStream()
        self._monitor: Monitor | None = None
        self._lock = threading.Lock()

    def monitor(self, comm: Communicator) -> Monitor:
        """The group's monitor, started at the first call; backward calls from threads of autograd's."""
        if self._monitor is None:
            with self._lock:
                if self._monitor is None:
                    self._monitor = Monitor(comm.group, f"rank {comm.rank} of {comm.size}")
        return self._monitor


_groups: "weakref.WeakKeyDictionary[dist.ProcessGroup, _InCommon]" = weakref.WeakKeyDictionary()


def _in_common(group: dist.ProcessGroup | None) -> _InCommon:
    return _InCommon() if group is None else _groups.setdefault(group, _InCommon())


def used_here(*tensors: Tensor) -> None:
    """Tell the allocator that ``tensors``, made on the stream beside, are used on the current one: what takes their
    memory after them has to wait for both."""
    on_gpu = [x for x in tensors if x.is_cuda]
    here = torch.cuda.current_stream() if on_gpu else None
    for x in on_gpu:
        x.record_stream(here)


def ring_bytes(k: Tensor, size: int) -> int:
    """Bytes of K and V that a dense ring of ``size`` ranks brings to each of them in one direction; k [L, Hkv, D]."""
    return 2 * (size - 1) * k.nbytes
