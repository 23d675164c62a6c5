"""What context parallelism moves over a torch.distributed group: two collectives, and copies within a node.

All-to-all and all-gather alone: they run unchanged on gloo with CPU tensors and on NCCL, and large batches of
point-to-point operations, which have been seen to hang NCCL, are never made.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from .calls import UNNAMED_LAYER, ExchangeError, Where, ledger_of
from .counters import Counters
from .watchdog import Monitor

# PyTorch 2.13 renamed it; the old name warns there, the new one is missing before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def wait_for(event: torch.cuda.Event | None) -> None:
    """Let the current stream wait for ``event``; None has happened."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


class SideStream:
    """A stream of high priority; made at the first use."""

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None

    def entered(self, after: torch.cuda.Event | None):
        """Context in which work is issued to this stream, once it has passed ``after``; nothing for None."""
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
        """Name of the layer that is called next, for counters and error messages: a model sets it, a call reads it."""
        self.memory: Any = None
        """Memory that all ranks read, where a caller has such; see :func:`.symmetric_memory.peer_memory`."""
        self.within: Communicator | None = None
        """The communicator of a larger group of which this one's calls are parts, see :meth:`strided`."""
        self._state = _state_of(group)
        self.calls = ledger_of(group)
        """The attention calls of all contexts of this group."""
        self.context_number: tuple[int, int] | None = None
        """What :meth:`.calls.Ledger.context` returned for this communicator's context."""

    checks_calls = True
    """Whether calls are counted, and compared with those of other ranks."""

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

    def all_gather(self, x: Tensor, kind: str, where: Where) -> Tensor:
        """Equal-sized ``x`` of every rank, stacked: [P, *x.shape]."""
        return self.all_gather_async(x, kind, where)()

    def all_gather_async(self, x: Tensor, kind: str, where: Where, uncounted: int = 0) -> Callable[[], Tensor]:
        """:meth:`all_gather` that returns at once; the function it returns waits. ``uncounted`` bytes of ``x`` are no
        payload."""
        others = (x.nbytes - uncounted) * (self.size - 1)
        self._count(kind, others, others, where)
        what = f"{kind} all-gather in {where.name}"
        return self._guarded(what, lambda: self._all_gather(x.contiguous(), what))

    def gather_uncounted(self, x: Tensor) -> Tensor:
        """:meth:`all_gather` for what is not part of an attention layer."""
        what = f"all-gather in {self.layer}"
        return self._guarded(what, lambda: self._all_gather(x.contiguous(), what))()

    def gather_on_host(self, x: Tensor) -> Tensor:
        """:meth:`gather_uncounted` of a small tensor in host memory, back in host memory; it waits for the GPU only
        where the group has no backend for CPUs."""
        if self.group is None or "cpu" in dist.get_backend_config(self.group):
            return self.gather_uncounted(x)
        return self.gather_uncounted(x.cuda()).cpu()

    def all_to_all_uncounted(
        self, x: Tensor, send: list[int] | None = None, receive: list[int] | None = None
    ) -> Tensor:
        """``send[p]`` rows of ``x`` to each rank p and ``receive[p]`` from it, by default an equal part of them to and
        from each; for what is not part of a layer."""
        equal, what = [x.shape[0] // self.size] * self.size, f"all-to-all in {self.layer}"
        return self._guarded(what, lambda: self._all_to_all(x.contiguous(), send or equal, receive or equal, what))()

    def all_to_all(
        self, x: Tensor | tuple[Tensor, ...], send: list[int], receive: list[int], kind: str, where: Where
    ) -> Callable[[], Any]:
        """Send ``send[p]`` rows of ``x`` to each rank p and receive ``receive[p]`` rows from it.

        Args:
            x: [sum(send), ...], the rows for rank 0 first; or several tensors of so many rows, each a message of its
                own: side by side in one they would have to be packed, and unpacked again.

        Returns:
            A function that waits for the transfer and returns [sum(receive), ...], the rows of rank 0 first, for each
            tensor. ``x`` may not be changed before it is called.
        """
        parts = x if isinstance(x, tuple) else (x,)
        row = sum(part.element_size() * part.shape[1:].numel() for part in parts)
        self._count(kind, (sum(send) - send[self.rank]) * row, (sum(receive) - receive[self.rank]) * row, where)
        what = f"{kind} all-to-all in {where.name}"

        def start() -> Callable[[], Any]:
            waits = [self._all_to_all(part.contiguous(), send, receive, what) for part in parts]
            return (lambda: tuple(wait() for wait in waits)) if isinstance(x, tuple) else waits[0]

        return self._guarded(what, start)

    def copied(
        self,
        kind: str,
        sent: int,
        received: int,
        start: Callable[[], tuple[Any, torch.cuda.Event | None]],
        where: Where,
    ) -> Callable[[], Any]:
        """Bytes that copy engines move between ranks.

        Args:
            start: starts the copies on the current stream; returns what holds them, a tensor or several, and the event
                that follows.

        Returns:
            A function that lets the current stream wait for the copies and returns what holds them.
        """
        self._count(kind, sent, received, where)
        what = f"{kind} copy in {where.name}"

        def started() -> Callable[[], Any]:
            out, event = start()

            def wait() -> Any:
                wait_for(event)
                if event is not None:
                    self._watch(event, what)
                return out

            return wait

        return self._guarded(what, started)

    def record_event(self, x: Tensor) -> torch.cuda.Event | None:
        """This point of the current stream, for :meth:`on_comm_stream`; None where ``x`` is not on a GPU."""
        return torch.cuda.current_stream().record_event() if x.is_cuda else None

    def on_comm_stream(self, after: torch.cuda.Event | None):
        """Context in which work is issued to the communication stream, once it has passed ``after``.

        Packing a message and sending it must not queue behind the attention that it is to overlap with, nor wait until
        that leaves room on the GPU: the stream has high priority. (NCCL's own has under TORCH_NCCL_HIGH_PRIORITY=1.)
        """
        return self._state.side.entered(after)

    def strided(self, step: int) -> "Communicator":
        """Of this rank and every ``step``-th before and after it in the group: their calls are parts of this group's
        calls, and count as such. A collective call."""
        return self._part(range(self.rank % step, self.size, step))

    def consecutive(self, count: int) -> "Communicator":
        """Of this rank and those of the group with which it makes up ``count`` ranks in a row; see :meth:`strided`."""
        first = self.rank - self.rank % count
        return self._part(range(first, first + count))

    def _part(self, ranks: range) -> "Communicator":
        """Of some ranks of the group, this one among them; all ranks call it, each with its own."""
        part = self._made(ranks)
        part.counters, part.by_layer, part.within = self.counters, self.by_layer, self
        return part

    def _made(self, ranks: range) -> "Communicator":
        return Communicator(subgroup(self.group, ranks))

    def count_ring(self, k: Tensor, times: int, where: Where) -> None:
        """Count what a dense ring of the group brings in a pass, some ``times`` K and V; k [L, Hkv, D]."""
        if self.within is None:
            for counters in self.counters_of(where):
                counters.dense_ring += times * ring_bytes(k, self.size)

    def reset_counters(self) -> None:
        """Start all counters again from zero."""
        self.counters.reset()
        self.by_layer.clear()

    def counters_of(self, where: Where) -> tuple[Counters, Counters]:
        """The counters of all layers and those of one."""
        if where.layer not in self.by_layer:
            self.by_layer[where.layer] = Counters()
        return self.counters, self.by_layer[where.layer]

    def _count(self, kind: str, sent: int, received: int, where: Where) -> None:
        for counters in self.counters_of(where):
            counters.sent[kind] += sent
            counters.received[kind] += received

    def _guarded(self, what: str, start: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
        """``start()`` and the waiting it returns, with errors that say who failed at what."""
        name = f"rank {self.rank} of {self.size}: {what}"

        def failed(error: RuntimeError) -> ExchangeError:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return ExchangeError(f"{name} failed, another rank has left or hangs: {lines[0]}")

        try:
            wait = start()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise failed(error) from error

        def guarded():
            try:
                return wait()
            except RuntimeError as error:
                raise failed(error) from error

        return guarded

    def _all_gather(self, x: Tensor, what: str) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: x[None]
        out = x.new_empty(self.size, *x.shape)
        work = _all_gather_single(out.view(-1), x.view(-1), group=self.group, async_op=True)
        return self._started(work, x, out, what)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], what: str) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: x
        out = x.new_empty(sum(receive), *x.shape[1:])
        work = dist.all_to_all_single(out, x, receive, send, group=self.group, async_op=True)
        return self._started(work, x, out, what)

    def _started(self, work: dist.Work, x: Tensor, out: Tensor, what: str) -> Callable[[], Tensor]:
        sent = [x]

        def wait() -> Tensor:
            work.wait()
            # Both were allocated on the communication stream: what is packed or received next must not take their
            # memory too soon.
            record_stream(*sent, out)
            sent.clear()
            if out.is_cuda:
                self._watch(torch.cuda.current_stream().record_event(), what)
            return out

        return wait

    def _watch(self, event: torch.cuda.Event, what: str) -> None:
        # On a GPU waiting returns at once.
        self._state.monitor(self).watch(event, what)


class _GroupState:
    """What all communicators of a group share, of which there is one for every batch; it ends with the group."""

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


_groups: "weakref.WeakKeyDictionary[dist.ProcessGroup, _GroupState]" = weakref.WeakKeyDictionary()


def _state_of(group: dist.ProcessGroup | None) -> _GroupState:
    return _GroupState() if group is None else _groups.setdefault(group, _GroupState())


_subgroups: "weakref.WeakKeyDictionary[dist.ProcessGroup, dict[range, dist.ProcessGroup]]" = weakref.WeakKeyDictionary()


def subgroup(group: dist.ProcessGroup, ranks: range) -> dist.ProcessGroup:
    """The group of some ranks of ``group``, given by their numbers in it; made once, by a collective call of these
    ranks alone.

    ``dist.new_group`` wants all ranks of the program, or names the group by how many groups the process is in, which
    need not be the same on all of its ranks; here it is named by the group that it is a part of.
    """
    made = _subgroups.setdefault(group, {})
    if ranks not in made:
        among, default = dist.get_process_group_ranks(group), dist.group.WORLD
        members = [among[rank] for rank in ranks]
        # Where a device is bound, NCCL would split the default group's communicator, for which it needs all its ranks.
        bound, default.bound_device_id = default.bound_device_id, None
        try:
            made[ranks], _ = c10d._new_process_group_helper(
                len(ranks),
                members.index(dist.get_rank()),
                members,
                dist.Backend(dist.get_backend_config(group)),
                c10d._get_default_store(),
                f"moba_cp {group.group_name} {ranks.start} {ranks.step}",
                timeout=_timeout_of(group) or c10d.default_pg_timeout,
            )
        finally:
            default.bound_device_id = bound
        c10d._world.pg_group_ranks[made[ranks]] = {member: rank for rank, member in enumerate(members)}
    return made[ranks]


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    for device in ("cuda", "cpu"):
        # It has no such backend, or one that does not say.
        with contextlib.suppress(RuntimeError, AttributeError):
            return group._get_backend(torch.device(device)).options._timeout
    return None


def record_stream(*tensors: Tensor) -> None:
    """Tell the allocator that ``tensors``, made on another stream, are used on the current one: their memory is free
    for others only after both are done with it."""
    on_gpu = [x for x in tensors if x.is_cuda]
    current = torch.cuda.current_stream() if on_gpu else None
    for x in on_gpu:
        x.record_stream(current)


def ring_bytes(k: Tensor, size: int) -> int:
    """Bytes of K and V that a dense ring of ``size`` ranks brings to each of them in one direction; k [L, Hkv, D]."""
    return 2 * (size - 1) * k.nbytes
