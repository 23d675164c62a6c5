"""Whether work on several CUDA streams is ordered, seen without a GPU.

Ranks are threads and everything happens at once, so that a missing wait changes no result. Instead each rank's streams
have vector clocks: the one that computes, the one on which messages are packed, and the transport's own. An operator of
PyTorch reads and writes memory on the stream that is current; two accesses to the same bytes on two streams, one of
them a write, have to know of one another. And as PyTorch's allocator does, memory that is given back is given out again
on the stream it was made on, at once but for streams that were recorded for it: what other streams have still to do
with it by then is a race too.
"""

import contextlib
import sys
import threading
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from moba_cp.cp import comm
from tests.helpers.distributed import ThreadCommunicator

COMPUTING, PACKING, SENDING = "computing", "packing", "sending"
Clock = dict[Hashable, int]
"""How much of each stream's work is known to be done."""
# Allocates without writing, or only looks.
_NO_ACCESS = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided", "aten.set_")


def join(clock: Clock, other: Clock) -> None:
    """Let ``clock`` know what ``other`` knows."""
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


class Access(NamedTuple):
    """Of bytes of a storage, by what, on which stream and when."""

    begin: int
    end: int
    writes: bool
    stream: Hashable
    tick: int
    what: str


def access_of(x: torch.Tensor, writes: bool, stream: Hashable, tick: int, what: str) -> Access:
    """``what`` reads or writes ``x``, which is not empty."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    begin = x.storage_offset() * x.element_size()
    return Access(begin, begin + (last + 1) * x.element_size(), writes, stream, tick, what)


def unordered(now: Access, seen: Iterable[Access], clock: Clock) -> list[Access]:
    """Those of ``seen`` that touch the same bytes as ``now``, one of both a write, and of which ``clock`` does not
    know."""
    return [
        other
        for other in seen
        if now.begin < other.end
        and other.begin < now.end
        and (now.writes or other.writes)
        and clock.get(other.stream, 0) < other.tick
    ]


class _Memory:
    """One storage: on which stream it was made, who used it, and for which streams it was recorded."""

    def __init__(self, storage: torch.UntypedStorage, stream: str, what: str):
        self.weak, self.stream, self.what = StorageWeakRef(storage), stream, what
        self.accesses: dict[tuple, Access] = {}
        """The last one of each kind on the same bytes, by a stream."""
        self.last: dict[str, Access] = {}
        self.recorded: set[str] = set()
        self.freed: Clock | None = None


class Streams(TorchDispatchMode):
    """The streams of one rank, entered in its thread; :attr:`races` says which accesses are not ordered."""

    def __init__(self):
        super().__init__()
        self.clocks: dict[str, Clock] = {name: {} for name in (COMPUTING, PACKING, SENDING)}
        self.host: Clock = {}
        self.current = COMPUTING
        self.memories: dict[int, _Memory] = {}
        self.several: dict[int, _Memory] = {}
        """Of these, what several streams used."""
        self.given_back: list[_Memory] = []
        self.races: set[tuple[str, str]] = set()
        self.shared = 0
        """Storages that several streams used."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Where plain PyTorch reads a number, the host would wait for the stream: kernels of the library never do.
        kwargs, name = kwargs or {}, str(function)
        self.look_for_freed()
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in given}
        out = function(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        is_view = bool(made) and all(x.untyped_storage().data_ptr() in storages for x in made)
        changed = [given[i] for i, x in enumerate(_arguments(function, args, kwargs)) if x]
        if not (is_view and not changed) and not name.startswith(_NO_ACCESS):
            for x in given:
                self.access(x, name, any(x is y for y in changed))
        for x in made:
            if x.untyped_storage().data_ptr() not in storages:
                self.allocate(x, name)
                if not name.startswith(_NO_ACCESS):
                    self.access(x, name, True)
        return out

    def look_for_freed(self) -> None:
        for key, memory in [x for x in self.several.items() if x[1].weak.expired()]:
            del self.several[key]
            self.shared += 1
            memory.freed = {}
            for stream in memory.recorded:
                join(memory.freed, self.clocks[stream])
            self.given_back.append(memory)

    def allocate(self, x: torch.Tensor, what: str) -> None:
        """New memory on the current stream, which may be any that was given back there."""
        self.tick()
        for memory in [m for m in self.given_back if m.stream == self.current]:
            self.given_back.remove(memory)
            known = dict(self.clocks[self.current])
            join(known, memory.freed)
            for stream, user in memory.last.items():
                if stream != self.current and known.get(stream, 0) < user.tick:
                    again = f"memory of {memory.what} ({memory.stream}) given out again"
                    self.races.add((f"{user.what} ({stream})", again))
        storage = x.untyped_storage()
        self.memories[storage.data_ptr()] = _Memory(storage, self.current, what)

    def tick(self) -> None:
        clock = self.clocks[self.current]
        join(clock, self.host)
        clock[self.current] = clock.get(self.current, 0) + 1

    def access(self, x: torch.Tensor, what: str, writes: bool) -> None:
        """``what`` reads or writes ``x`` on the current stream."""
        if x.numel() == 0:
            return
        self.tick()
        storage, clock = x.untyped_storage(), self.clocks[self.current]
        memory = self.memories.get(storage.data_ptr())
        if memory is None or memory.weak.expired():
            # Made before anybody looked.
            memory = self.memories[storage.data_ptr()] = _Memory(storage, COMPUTING, "an input")
        now = access_of(x, writes, self.current, clock[self.current], what)
        for other in unordered(now, memory.accesses.values(), clock):
            self.races.add((f"{other.what} ({other.stream})", f"{what} ({self.current})"))
        memory.accesses[now[:4]] = memory.last[self.current] = now
        if len(memory.last) > 1:
            self.several[storage.data_ptr()] = memory

    @contextlib.contextmanager
    def on(self, stream: str, after: Clock | None = None) -> Iterator[None]:
        """Work is issued to ``stream`` meanwhile."""
        before, self.current = self.current, stream
        join(self.clocks[stream], after or {})
        try:
            yield
        finally:
            self.current = before

    def event(self) -> Clock:
        return dict(self.clocks[self.current])


def _arguments(function, args, kwargs) -> list[bool]:
    """Of each tensor among the arguments, in the order of ``tree_leaves``, whether the operator writes it."""
    found = []
    declared = {argument.name: argument for argument in function._schema.arguments}
    positional = [a for a in function._schema.arguments if not a.kwarg_only]
    for argument, value in [*zip(positional, args, strict=False), *((declared[n], x) for n, x in kwargs.items())]:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        found += [writes for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
    return found


_here = threading.local()


def streams() -> Streams:
    """Those of the rank whose thread this is."""
    return _here.streams


class WatchedCommunicator(ThreadCommunicator):
    """A thread's communicator that issues messages as on a GPU, with clocks."""

    def record_event(self, x):
        return streams().event()

    def on_comm_stream(self, after):
        return streams().on(PACKING, after)

    def _made(self, ranks):
        return self._watched(super()._made(ranks))

    def _watched(self, part: ThreadCommunicator) -> "WatchedCommunicator":
        return WatchedCommunicator(part.rank, part.size, part._board, part._barrier, part._turn)

    def _transported(self, transport, x, *rest):
        watch, what = streams(), rest[-1]
        # The board's own operators are not the transport's.
        with _disable_current_modes():
            out = transport(x, *rest)()
        # Received into memory of the stream that asks.
        watch.allocate(out, what)
        with watch.on(SENDING, watch.event()):
            watch.access(x, f"{what} sends", False)
            watch.access(out, f"{what} receives", True)
            done = watch.event()
        return self._started(_Work(done), x, out, what)

    def _all_gather(self, x, what):
        return self._transported(super()._all_gather, x, what)

    def _all_to_all(self, x, send, receive, what):
        return self._transported(super()._all_to_all, x, send, receive, what)


class _Work:
    def __init__(self, done: Clock):
        self._done = done

    def wait(self) -> None:
        watch = streams()
        join(watch.clocks[watch.current], self._done)


def _record_stream(*tensors) -> None:
    watch = streams()
    watch.look_for_freed()
    for x in tensors:
        memory = watch.memories.get(x.untyped_storage().data_ptr())
        if memory is not None:
            memory.recorded.add(watch.current)


def _wait_for(event: Clock | None) -> None:
    watch = streams()
    join(watch.clocks[watch.current], event or {})


class _HostCopy:
    """:class:`moba_cp.cp.comm.HostCopy` of a tensor on a GPU."""

    def __init__(self, x):
        watch = streams()
        watch.access(x, "copy to the host", False)
        # On a GPU it is a copy.
        self._host, self._event = x.clone(), watch.event()

    def ready(self) -> bool:
        return False

    def get(self):
        join(streams().host, self._event)
        return self._host


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """The library takes its tensors for tensors on a GPU; around ``run_threads``."""
    with contextlib.ExitStack() as stack:
        for name, stub in (("record_stream", _record_stream), ("wait_for", _wait_for)):
            real = getattr(comm, name)
            for module in [m for n, m in list(sys.modules.items()) if n.startswith("moba_cp.")]:
                if getattr(module, name, None) is real:
                    stack.enter_context(mock.patch.object(module, name, stub))
        for name in ("__init__", "ready", "get"):
            stack.enter_context(mock.patch.object(comm.HostCopy, name, getattr(_HostCopy, name)))
        from_numpy = torch.from_numpy
        # On a GPU tables are copied there, on the stream that is current.
        stack.enter_context(mock.patch.object(torch, "from_numpy", lambda x: from_numpy(x).clone()))
        yield


def rank_of(communicator: ThreadCommunicator) -> tuple[WatchedCommunicator, Streams]:
    """The communicator of this thread's rank as one with clocks, and its streams, which are to be entered."""
    _here.streams = Streams()
    c = communicator
    return WatchedCommunicator(c.rank, c.size, c._board, c._barrier, c._turn), _here.streams
