"""MoBA attention where all K and V come to every rank, some heads at a time: stages of whole heads.

Where nearly everything is needed anyway, this needs no plan, and a stage has all blocks in one storage: outputs and dQ
are written once, in their dtype, and so are dK and dV by the sums of all ranks' partial gradients. While a stage is
computed, K and V of the next one, or with copy engines of the next two, arrive, and the gradients of the one before
return. :class:`Collectives` move them by an all-gather and an all-to-all, :class:`.copies.CopyEngines` between GPUs
that map each other's memory.

Legend: P ranks, L local tokens, X extra rows, Hq query heads, H KV heads of a stage, W rows of a packed KV shard and
head, D head dim. Packed shards and storages are those of :mod:`.stages`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...blocks import Pages
from ...dtypes import WIDE
from ..calls import Call, Where
from ..comm import Communicator, record_stream, wait_for
from ..context import CPContext
from ..ways import Attended, OutputGradient, Queries
from .copies import CopyEngines
from .stages import GatherTables, Stage, build_gather_tables


class Collectives:
    """Moves the stages of a layer by collectives: all rows, also those that no rank can see."""

    ahead = 2
    """Stages that have begun when the first of them is computed."""

    def __init__(self, tables: GatherTables, comm: Communicator):
        self.tables, self.comm = tables, comm
        self.on_comm_stream = comm.on_comm_stream

    def open_pass(self, needs_grad: bool, where: Where) -> None:
        """The stages of a pass begin."""

    def close_pass(self) -> None:
        """All its stages were issued."""

    def begin(self, stage: Stage, pack: Callable[[Tensor], None], ready: torch.cuda.Event | None, where: Where) -> None:
        """Start moving a stage's packed KV shards, once the device has passed ``ready``.

        Args:
            pack: writes this rank's shard to the [H * W, 2, D] that it is given.
        """
        if stage.kept is not None:
            stage.storage = stage.kept
            return
        with self.comm.on_comm_stream(ready):
            shard = torch.empty(
                stage.n_rows, 2, self.tables.dim, dtype=self.tables.dtype, device=self.tables.geometry.owner.device
            )
            pack(shard)
            wait = self.comm.all_gather_async(shard, "kv", where)
        stage.wait = lambda: wait().flatten(0, 1)

    def grads_memory(self, stage: Stage) -> Tensor:
        """[P * H * W, 2, D], as it will travel, for this rank's partial gradients of the storage; rows that this rank
        can see hold anything."""
        grads = stage.storage.new_empty(stage.storage.shape, dtype=self.tables.wire)
        # Rows that this rank cannot see are sent too.
        for shard, seen in zip(grads.split(stage.n_rows), self.tables.seen_here[stage.count], strict=True):
            shard[: seen.start], shard[seen.stop :] = 0, 0
        return grads

    def return_grads(
        self, stage: Stage, grads: Tensor, sum_up: Callable[[Tensor], None], where: Where
    ) -> Callable[[], torch.cuda.Event | None]:
        """Start returning partial gradients.

        Args:
            grads: of :meth:`grads_memory`, written by what the current stream does before this.
            sum_up: adds up what others return, [M, 2, D].

        Returns:
            A function that issues ``sum_up``, and returns the event that follows it; None where it is done. Better
            called late: where all streams share one queue of the GPU (CUDA_DEVICE_MAX_CONNECTIONS=1), what waits there
            holds up what was issued after it.
        """
        comm, counts = self.comm, [stage.n_rows] * self.tables.size
        with comm.on_comm_stream(comm.record_event(grads)):
            wait = comm.all_to_all(grads, counts, counts, "kv_gradients", where)
            record_stream(grads)
            issued = comm.record_event(grads)

        def finish() -> torch.cuda.Event | None:
            with comm.on_comm_stream(issued):
                sum_up(wait())
                return comm.record_event(grads)

        return finish

    def finish(self, stage: Stage) -> None:
        """All that needs the storage was issued."""


Transport = Collectives | CopyEngines


def build_transport(cp: CPContext, block_size: int, q: Tensor, k: Tensor, top_k: int) -> Transport:
    """What moves the stages of a layer with such queries [L, Hq, D] and keys [L, Hkv, D], and its tables."""
    geometry, memory, n_rows = cp.geometry(block_size), cp.peers, q.shape[0] * q.shape[1]
    tables = build_gather_tables(geometry, tuple(k.shape), k.dtype, cp.exchange, memory is not None, n_rows, top_k)
    return Collectives(tables, cp.comm) if memory is None else CopyEngines(tables, cp.comm, memory)


class AllGather:
    """A :class:`..ways.Way`."""

    def __init__(self, transport: Transport, ops, call: Call):
        """``ops``: the backend that serves q, see :func:`moba_cp.ops.backend`."""
        self.transport, self.ops, self._call = transport, ops, call
        self._stages: Iterator[Stage] | None = None
        self._kept: list[Tensor] = []
        self._task_cache: dict = {}
        """Tasks that attention to all stages of a pass shares."""
        self._returning: Callable[[], torch.cuda.Event | None] | None = None
        self._summed: torch.cuda.Event | None = None

    def start(self, owned: Pages, where: Where, saved: list[Tensor | None] | None = None) -> None:
        """Start the first stages. While one is computed the next ones' storages arrive.

        Raises:
            RuntimeError: an earlier pass failed on this rank, or a rank has no memory for copies.
        """
        transport, tables = self.transport, self.transport.tables
        backward, needs_grad = saved is not None, self._call.needs_grad
        transport.open_pass(backward or needs_grad, where)
        self._returning, self._task_cache, self._kept = None, {}, []
        ready = transport.comm.record_event(owned.k)
        with transport.on_comm_stream(ready):
            record_stream(owned.k, owned.v)

        def begin(number: int) -> Stage:
            heads = tables.heads[number]
            count = heads.stop - heads.start
            stage = Stage(heads, count, count * tables.geometry.most_rows, saved[number] if saved else None)

            def pack(shard: Tensor) -> None:
                self.ops.pack_kv_shard(owned.k[:, heads], owned.v[:, heads], shard, tables.geometry.cut)

            transport.begin(stage, pack, ready, where)
            return stage

        ahead = [begin(number) for number in range(min(transport.ahead, len(tables.heads)))]
        self._stages = self._in_turn(ahead, begin, tables.keep and needs_grad and not backward)

    def plan(self, block_indices: Tensor, owned: Pages) -> None:
        """Nothing depends on the selection."""

    def forward(self, queries: Queries, owned: Pages, so_far: tuple[Tensor, Tensor] | None = None) -> Attended:
        """See :class:`..ways.Way`; ``so_far``: out and lse of the blocks that this rank owns, to which the others' are
        joined."""
        q = queries.q
        if self._stages is None:
            self.start(owned, self._call.where)
        for counters in self.transport.comm.counters_of(self._call.where):
            counters.planned += self.transport.tables.planned_bytes
        out, lse = so_far or (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=WIDE[q.dtype]))
        for stage in self._stages:
            self.attend(stage, queries, (out, lse), so_far is None)
        kept, self._kept, self._stages = self._kept, [], None
        return Attended(out, lse, kept, self)

    def backward(
        self, saved: list[Tensor | None], queries: Queries, output: OutputGradient, owned: Pages, where: Where
    ) -> tuple[Tensor, Tensor]:
        """See :class:`..ways.Way`; after :meth:`start`."""
        q, k = queries.q, owned.k
        # Gradients of straddling blocks are sums yet to be completed.
        dtype = output.lse.dtype if self.transport.tables.geometry.straddles else k.dtype
        dq, grads = q.new_empty(q.shape), k.new_empty(2, *k.shape, dtype=dtype)
        for stage in self._stages:
            self.attend_backward(stage, queries, output, dq, grads, where)
        self._stages = None
        self._sum_up()
        wait_for(self._summed)
        return dq, grads

    def attend(self, stage: Stage, queries: Queries, out: tuple[Tensor, Tensor], overwrite_out: bool) -> None:
        """Attention to a stage's heads.

        Args:
            out: out [L, Hq, D] and lse [L, Hq], see :func:`moba_cp.eager.attend`.
            overwrite_out: ``out`` holds nothing yet; otherwise it holds the attention to this rank's blocks.
        """
        self.ops.attend(
            queries.q,
            self._pages(stage, overwrite_out),
            *queries.seen,
            index=queries.index,
            kv_heads=stage.heads,
            out=out,
            overwrite_out=overwrite_out,
            task_cache=self._task_cache,
        )

    def attend_backward(
        self, stage: Stage, queries: Queries, output: OutputGradient, dq: Tensor, kv_grads: Tensor, where: Where
    ) -> None:
        """Gradients of a stage's heads; a collective call.

        Args:
            dq: [L, Hq, D], written in its dtype.
            kv_grads: dk and dv, [2, L + X, Hkv, D], written once :meth:`_sum_up` was called after the last stage.
        """
        pages, tables = self._pages(stage, True), self.transport.tables
        grads = self.transport.grads_memory(stage)
        dk, dv = kv_grads

        def sum_up(arrived: Tensor) -> None:
            # Rows that no rank attends to, tails of other ranks' blocks, get any values.
            record_stream(dk, dv)
            own = grads[tables.rank * stage.n_rows : (tables.rank + 1) * stage.n_rows]
            sums = dk[:, stage.heads], dv[:, stage.heads]
            self.ops.sum_partial_grads(own, arrived, tables.partial_at[stage.count], *sums, tables.geometry.cut)

        def dkdv_done() -> None:
            self._sum_up()
            self._returning = self.transport.return_grads(stage, grads, sum_up, where)

        self.ops.attend_backward(
            queries.q,
            pages,
            *queries.seen,
            output.dout,
            output.lse,
            output.delta,
            output.deterministic,
            index=queries.index,
            kv_heads=stage.heads,
            out=(dq, grads[:, :1], grads[:, 1:]),
            overwrite_dkv=True,
            overwrite_dq=True,
            dkdv_done=dkdv_done,
            task_cache=self._task_cache,
        )

    def _sum_up(self) -> None:
        """Issue the sums of the stage before, whose partial gradients were sent while this stage was computed."""
        if self._returning is not None:
            self._summed, self._returning = self._returning(), None

    def _pages(self, stage: Stage, with_owned: bool) -> Pages:
        """The blocks of a stage's storage that this rank can see, those that it owns among them or not; waits for the
        storage."""
        tables, storage = self.transport.tables, self._arrived(stage)
        row, head = tables.all_pages if with_owned else tables.other_pages
        geometry = tables.geometry
        return Pages(storage[:, :1], storage[:, 1:], row, head, geometry.length, geometry.block_size)

    @staticmethod
    def _arrived(stage: Stage) -> Tensor:
        if stage.storage is None:
            stage.storage = stage.wait()
        return stage.storage

    def _in_turn(self, ahead: list[Stage], begin: Callable[[int], Stage], keep: bool) -> Iterator[Stage]:
        """All stages; the pass ends with the last."""
        n_stages, transport = len(self.transport.tables.heads), self.transport
        for number in range(n_stages):
            stage = ahead.pop(0)
            if keep:
                self._kept.append(self._arrived(stage).clone())
            yield stage
            transport.finish(stage)
            if number + transport.ahead < n_stages:
                ahead.append(begin(number + transport.ahead))
        self._task_cache = {}
        transport.close_pass()
