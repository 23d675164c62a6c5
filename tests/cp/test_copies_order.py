"""Copies between memories that ranks read of one another: whatever touches the same bytes is ordered.

Ranks are threads and everything happens at once, so that a missing wait changes no result. Instead two streams of each
rank, the current one and the one for copies, have vector clocks: an event carries its stream's clock to whoever waits
for it, a meeting those of all ranks. Two accesses to the same bytes, one of them a write, have to know of one another.
"""

import contextlib
import threading

import pytest
import torch

from moba_cp import CPContext, MoBAConfig, eager, moba_attention
from moba_cp.cp import comm
from moba_cp.cp import symmetric_memory as peer
from moba_cp.cp.allgather import copies
from moba_cp.cp.allgather import strategy as gather
from moba_cp.cp.heads import copies as head_copies
from moba_cp.cp.heads import strategy as heads
from moba_cp.cp.options import ExchangeOptions
from tests.helpers import distributed
from tests.helpers.cases import Case
from tests.helpers.distributed import ThreadPeerMemory, run_threads
from tests.helpers.streams import access_of, join, unordered

COMPUTING, COPYING = "computing", "copying"
ALL = {
    "slab is packed", "copy reads", "copy writes", "forward reads", "backward reads", "dQ reads",
    "gradients are written", "sum reads", "sum writes", "sums are used",
}  # fmt: skip
ALL_OF_HEADS = {
    "copy reads", "copy writes", "forward reads", "backward reads", "dQ reads", "gradients are written",
    "dQ is written", "output is written", "results are used",
}  # fmt: skip


class Streams:
    """Clocks of all ranks' streams, and accesses to buffers and sums so far."""

    def __init__(self):
        self.here = threading.local()
        self.clocks: dict[tuple[int, str], dict] = {}
        self.accesses: dict[int, list] = {}
        """By address."""
        self.buffers: list[torch.Tensor] = []
        """All that were ever looked at: nothing else is to take their addresses."""
        self.races: set[tuple[str, str]] = set()

    def enter(self, rank: int) -> None:
        """This thread is ``rank``."""
        self.here.stream = rank, COMPUTING
        # Autograd runs backward passes of CPU tensors in the thread that asks for them.
        for name in (COMPUTING, COPYING):
            self.clocks[rank, name] = {(rank, name): 0}

    def event(self) -> dict:
        return dict(self.clocks[self.here.stream])

    def wait(self, event: dict | None) -> None:
        join(self.clocks[self.here.stream], event or {})

    @contextlib.contextmanager
    def entered(self, after: dict):
        before, self.here.stream = self.here.stream, (self.here.stream[0], COPYING)
        self.wait(after)
        yield
        self.here.stream = before

    def access(self, x: torch.Tensor, what: str, writes: bool = False) -> None:
        seen = self.accesses.get(x.untyped_storage().data_ptr())
        if seen is None or x.numel() == 0:
            return
        clock = self.clocks[self.here.stream]
        clock[self.here.stream] += 1
        now = access_of(x, writes, self.here.stream, clock[self.here.stream], what)
        self.races |= {(other.what, what) for other in unordered(now, seen, clock)}
        seen.append(now)


class WatchedMemory(ThreadPeerMemory):
    """Memory of ranks that are threads, with clocks."""

    streams: Streams

    def barrier(self):
        super().barrier()
        for event in self._comm._swap(self.streams.event()):
            self.streams.wait(event)

    def _allocate(self, name, nbytes):
        buffers = super()._allocate(name, nbytes)
        self.streams.buffers.append(buffers[self.rank])
        self.streams.accesses[buffers[self.rank].untyped_storage().data_ptr()] = []
        self._comm._meet()
        return buffers


@pytest.fixture
def streams(monkeypatch) -> Streams:
    found = Streams()

    def watch(module, name, accesses):
        real = getattr(module, name)

        def watched(*args, **kwargs):
            accesses(*args, **kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    def copied(targets, sources):
        for target, source in zip(targets, sources, strict=False):
            found.access(source, "copy reads")
            found.access(target, "copy writes", True)

    def sums(own, shares, places, dk, dv, cut):
        found.access(own, "sum reads")
        found.buffers.append(dk)
        found.accesses.setdefault(dk.untyped_storage().data_ptr(), [])
        found.access(dk, "sum writes", True)

    def gradients(q, pages, *rest, out, dkdv_done, **how):
        def done():
            found.access(out[1], "gradients are written", True)
            dkdv_done()

        found.access(pages.k, "backward reads")
        real_backward(q, pages, *rest, out=out, dkdv_done=done, **how)
        found.access(pages.k, "dQ reads")
        found.access(out[0], "dQ is written", True)

    real_backward = eager.attend_backward
    monkeypatch.setattr(eager, "attend_backward", gradients)

    def attends(q, pages, *args, out, **how):
        found.access(pages.k, "forward reads")
        found.access(out[0], "output is written", True)

    watch(eager, "attend", attends)
    watch(eager, "pack_kv_shard", lambda k, v, slab, cut: found.access(slab, "slab is packed", True))
    watch(eager, "sum_partial_grads", sums)

    def used(*args):
        dq, grads = real_way(*args)
        found.access(grads[0], "sums are used")
        return dq, grads

    real_way = gather.AllGather.backward
    monkeypatch.setattr(gather.AllGather, "backward", used)
    watch(copies, "_copy", copied)

    def copied_rows(target, source):
        found.buffers.append(target)
        found.accesses.setdefault(target.untyped_storage().data_ptr(), [])
        copied([target], [source])

    watch(head_copies, "copy_rows", copied_rows)
    for name, last in (("forward", 2), ("backward", 3)):

        def results_used(*args, real=getattr(heads.HeadExchange, name), last=last):
            results = real(*args)
            for x in results[:last]:
                found.access(x, "results are used")
            return results

        monkeypatch.setattr(heads.HeadExchange, name, results_used)
    monkeypatch.setattr(comm.Communicator, "record_event", lambda self, x: found.event())
    monkeypatch.setattr(comm.Communicator, "_watch", lambda self, event, what: None)
    for module in (comm, gather, peer, heads):
        monkeypatch.setattr(module, "wait_for", found.wait)
    monkeypatch.setattr(
        comm.SideStream, "entered",
        lambda self, after: contextlib.nullcontext() if after is None else found.entered(after),
    )  # fmt: skip
    monkeypatch.setattr(WatchedMemory, "streams", found, raising=False)
    monkeypatch.setattr(distributed, "ThreadPeerMemory", WatchedMemory)
    return found


def _case(n_kv: int) -> Case:
    g = torch.Generator().manual_seed(n_kv)
    q, k, v, dout = (torch.randn(128, n_kv, 8, generator=g, dtype=torch.float64) for _ in range(4))
    return Case(q, k, v, dout, torch.tensor([0, 128], dtype=torch.int32), 16, 3)


def _layers(comm, streams: Streams, layers, options: ExchangeOptions):
    """Evaluation, a training step, and evaluation between forward and backward; ``layers``: KV heads of each."""
    streams.enter(comm.rank)
    comm.share_memory()
    cp = CPContext(comm, "zigzag", 128, exchange=options)

    def forward(n_kv: int, learns: bool):
        case = _case(n_kv)
        leaves = [cp.shard(x).requires_grad_(learns) for x in (case.q, case.k, case.v)]
        return moba_attention(*leaves, MoBAConfig(16, 3), cp=cp), cp.shard(case.dout)

    for between in (0, 1):
        for n_kv in layers:
            forward(n_kv, False)
        outs = [forward(n_kv, True) for n_kv in layers]
        for out, dout in reversed(outs):
            for n_kv in layers[:between]:
                forward(n_kv, False)
            out.backward(dout)


@pytest.mark.parametrize("keep", [False, True], ids=["refetch", "keep"])
@pytest.mark.parametrize("layers", [(1,), (2, 1), (5, 4), (3, 6, 3)], ids=str)
def test_accesses_are_ordered(layers, keep, streams):
    """Passes of odd and even numbers of stages, a head each; buffers grow."""
    run_threads(2, _layers, streams, layers, ExchangeOptions("allgather", stages=64, keep=keep))
    # What is kept in forward is not read where others read.
    expected = ALL - {"backward reads", "dQ reads"} if keep else ALL
    assert {what for seen in streams.accesses.values() for *_, what in seen} == expected
    assert not streams.races


@pytest.mark.parametrize("keep", [False, True], ids=["refetch", "keep"])
@pytest.mark.parametrize("narrowest", [0, 1 << 30], ids=["in place", "packed"])
@pytest.mark.parametrize("layers", [(2,), (4, 2), (10, 8), (6, 12, 6)], ids=str)
def test_accesses_of_heads_are_ordered(layers, narrowest, keep, streams, monkeypatch):
    """Like :func:`test_accesses_are_ordered`, half of the heads on each rank; and with all-gathers between."""
    monkeypatch.setattr(head_copies, "NARROWEST_ROW", narrowest)
    run_threads(2, _layers, streams, layers, ExchangeOptions("heads", stages=64, keep=keep))
    expected = ALL_OF_HEADS - {"backward reads", "dQ reads"} if keep else ALL_OF_HEADS
    found = {what for seen in streams.accesses.values() for *_, what in seen}
    # What was packed is unpacked elsewhere.
    assert found == (expected if narrowest == 0 else expected - {"results are used"})
    assert not streams.races


@pytest.mark.parametrize(
    "what, races",
    [
        ("barrier", {("output is written", "copy reads"), ("copy writes", "forward reads")}),
        ("wait", {("forward reads", "copy writes"), ("output is written", "copy reads")}),
        ("slots", {("copy reads", "output is written")}),
    ],
)
def test_what_is_not_ordered_among_heads_is_found(what, races, streams, monkeypatch):
    """Without meetings, without waiting for attention, with one slot."""
    if what == "barrier":
        monkeypatch.setattr(WatchedMemory, "barrier", ThreadPeerMemory.barrier)
    elif what == "wait":
        monkeypatch.setattr(comm.SideStream, "entered", lambda self, after: streams.entered({}))
    else:
        monkeypatch.setattr(head_copies, "SLOTS", 1)
    run_threads(2, _layers, streams, (12,), ExchangeOptions("heads", stages=64))
    assert races <= streams.races, streams.races


@pytest.mark.parametrize(
    "name, race",
    [
        ("claim", ("copy reads", "gradients are written")),
        ("release", ("forward reads", "slab is packed")),
        ("barrier", ("slab is packed", "copy reads")),
    ],
)
def test_what_is_not_ordered_is_found(name, race, streams, monkeypatch):
    """Without claims, releases or meetings."""
    monkeypatch.setattr(WatchedMemory, name, lambda self, *args: None)
    if name == "barrier":
        monkeypatch.setattr(WatchedMemory, name, ThreadPeerMemory.barrier)
    run_threads(2, _layers, streams, (6,), ExchangeOptions("allgather", stages=64))
    assert race in streams.races
