"""An all-gather by copy engines, between GPUs that map each other's memory (:mod:`..symmetric_memory`).

Only what a rank's queries can see is copied. Legend as in :mod:`.stages`.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..calls import Where
from ..comm import Communicator
from ..symmetric_memory import MissingMemory, PeerMemory
from .stages import GatherTables, Stage

# Slots of each buffer of peer memory. Between the end of a stage and the next use of its slot are packing, a barrier
# and copies: with two slots, attention to the stage in between would have to take longer than all of these.
SLOTS = {"kv": 3, "gradients": 2}


class Moves(NamedTuple):
    """What copy engines bring in the stages that have one slot of a buffer."""

    storage: Tensor
    """[P * H * W, 2, D]: this rank's slot."""
    sources: list[Tensor]
    """Rows to read of other ranks' slots, each rank's next one first, so that not all read from the same."""
    targets: list[Tensor]
    """Where K and V go in this rank's slot; none for partial gradients, which go to new memory, one by one."""
    n_rows: list[int]
    """Of each source."""
    sizes: tuple[int, int]
    """Bytes that others read here, and that this rank reads."""


class CopyEngines:
    """Moves the stages of a layer; see :class:`.strategy.Collectives`."""

    ahead = SLOTS["kv"]

    def __init__(self, tables: GatherTables, comm: Communicator, memory: PeerMemory):
        self.tables, self.comm, self._memory = tables, comm, memory
        self._moves: dict[tuple[str, int, int], Moves] = {}
        self._generation = -1

    def open_pass(self, needs_grad: bool, where: Where) -> None:
        """The stages of a pass begin; a collective call.

        Raises:
            RuntimeError: an earlier pass failed on this rank, or a rank has no memory for copies.
        """
        tables, memory = self.tables, self._memory
        rows = tables.size * max(tables.counts) * tables.geometry.most_rows
        memory.open_pass(f"rank {tables.rank} in {where.name}")
        try:
            memory.reserve("kv", SLOTS["kv"], rows * 2 * tables.dim * tables.dtype.itemsize)
            if needs_grad:
                # Before activations fill what is left.
                memory.reserve("gradients", SLOTS["gradients"], rows * 2 * tables.dim * tables.wire.itemsize)
        except MissingMemory:
            # Raised on all ranks, and nothing was issued yet.
            memory.close_pass()
            raise

    def close_pass(self) -> None:
        """All its stages were issued."""
        self._memory.close_pass()

    def on_comm_stream(self, after: torch.cuda.Event | None):
        """See :meth:`..comm.Communicator.on_comm_stream`."""
        return self._memory.on_copy_stream(after)

    def begin(self, stage: Stage, pack: Callable[[Tensor], None], ready: torch.cuda.Event | None, where: Where) -> None:
        """Start moving a stage's packed KV shards, once the device has passed ``ready``."""
        memory, kept = self._memory, stage.kept
        stage.number = memory.next_stage()
        with memory.on_copy_stream(ready):
            moves = self._moves_of("kv", stage)
            if kept is None:
                memory.claim("kv", stage.number)
                own = self.tables.rank * stage.n_rows
                pack(moves.storage[own : own + stage.n_rows])

            def start() -> tuple[Tensor, torch.cuda.Event | None]:
                # Also if nothing moves: the others learn that what they gave in earlier stages was read here.
                _barrier(memory)
                if kept is None:
                    _copy(moves.targets, moves.sources)
                storage = moves.storage if kept is None else kept
                return storage, self.comm.record_event(storage)

            stage.wait = self.comm.copied("kv", *(moves.sizes if kept is None else (0, 0)), start, where)

    def grads_memory(self, stage: Stage) -> Tensor:
        """[P * H * W, 2, D] for this rank's partial gradients of the storage; it holds anything."""
        self._memory.claim("gradients", stage.number)
        return self._moves_of("gradients", stage).storage

    def return_grads(
        self, stage: Stage, grads: Tensor, sum_up: Callable[[Tensor], None], where: Where
    ) -> Callable[[], torch.cuda.Event | None]:
        """Start returning partial gradients; see :meth:`.strategy.Collectives.return_grads`."""
        comm, memory, moves = self.comm, self._memory, self._moves_of("gradients", stage)
        ready = comm.record_event(grads)
        with memory.on_copy_stream(ready):

            def start() -> tuple[Tensor, torch.cuda.Event | None]:
                _barrier(memory)
                # Past the barrier all ranks have copied what this one gave in the stage before, and summed theirs.
                memory.release("gradients", stage.number - 1, comm.record_event(grads))
                arrived = grads.new_empty(sum(moves.n_rows), 2, self.tables.dim)
                _copy(arrived.split(moves.n_rows), moves.sources)
                return arrived, comm.record_event(grads)

            wait = comm.copied("kv_gradients", *moves.sizes, start, where)

        def finish() -> torch.cuda.Event | None:
            with memory.on_copy_stream(ready):
                sum_up(wait())
                done = comm.record_event(grads)
            # In a replay there is no barrier, and this alone says when the slot was read.
            memory.release("gradients", stage.number, done)
            return done

        return finish

    def finish(self, stage: Stage) -> None:
        """All that needs the storage was issued."""
        self._memory.release("kv", stage.number, self.comm.record_event(stage.storage))

    def _moves_of(self, name: str, stage: Stage) -> Moves:
        """What moves of buffer ``name`` in this stage: "kv", or partial "gradients". Made once for each slot."""
        memory, tables = self._memory, self.tables
        if self._generation != memory.generation:
            # The buffers have been replaced.
            self._moves.clear()
            self._generation = memory.generation
        key = name, memory.slot(name, stage.number), stage.count
        if key not in self._moves:
            dtype = tables.dtype if name == "kv" else tables.wire
            shape, row_bytes = (tables.size, stage.n_rows, 2, tables.dim), 2 * tables.dim * dtype.itemsize
            shards = memory.at(name, stage.number, tables.rank, shape, dtype)
            sources, targets, leaving = [], [], 0
            for p in tables.others:
                owner, viewer = (p, tables.rank) if name == "kv" else (tables.rank, p)
                rows = tables.seen(viewer, owner, stage.count)
                if rows.start < rows.stop:
                    sources.append(memory.at(name, stage.number, p, shape, dtype)[owner, rows])
                    targets += [shards[owner, rows]] if name == "kv" else []
                back = tables.seen(owner, viewer, stage.count)
                leaving += back.stop - back.start
            n_rows = [len(x) for x in sources]
            sizes = leaving * row_bytes, sum(n_rows) * row_bytes
            self._moves[key] = Moves(shards.flatten(0, 1), sources, targets, n_rows, sizes)
        return self._moves[key]


def _barrier(memory: PeerMemory) -> None:
    memory.barriers += 1
    memory.barrier()


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
