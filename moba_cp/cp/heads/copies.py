"""Tokens for heads, and back, by copy engines, between GPUs that map each other's memory (:mod:`..symmetric_memory`).

Each rank writes its rows where the others attend to them, in the order of the sequence, and reads its rows of their
results. Legend as in :mod:`.collectives`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..calls import Where
from ..comm import Communicator, record_stream
from ..context import CPContext
from ..copying import ReadyCopy, can_be_ready, copy_rows, issue, ready_copy
from ..symmetric_memory import MissingMemory, PeerMemory
from .collectives import Collectives, Part, Stage
from .tables import HeadTables

SLOTS = 2
"""Of each buffer: while a stage is computed the next one comes into the other slot, and the one before returns."""
NARROWEST_ROW = 128
"""Bytes: a stage's heads of a row are packed on their way if they are fewer. Between two H200s copies of rows brought
287 GB/s at 128 bytes, and 370 to 390 from 256 on, as many as without gaps; packing cost a tenth of a pass."""
_ALIGNED = 256


class CopyEngines(Collectives):
    """Moves the stages of a pass by copies; ``memory`` is that of the team's ranks."""

    def __init__(self, tables: HeadTables, comm: Communicator, memory: PeerMemory):
        super().__init__(tables, comm)
        self._memory = memory
        # Views and numbers are made once for each slot: a pass asks for them hundreds of times, and short sequences
        # wait for the host.
        self._ready: dict[tuple, list[ReadyCopy]] = {}
        self._slots: dict[tuple, list[Tensor]] = {}
        self._generation = -1

    def open_pass(self, parts: Sequence[Part], targets: Sequence[Part], where: Where) -> None:
        """The stages of a pass begin; a collective call.

        Raises:
            RuntimeError: an earlier pass failed on this rank, or a rank has no memory for copies.
        """
        self._memory.open_pass(f"rank {self.tables.rank} in {where.name}")
        try:
            self.reserve(parts, targets)
        except MissingMemory:
            # Raised on all ranks, and nothing was issued yet.
            self._memory.close_pass()
            raise

    def reserve(self, parts: Sequence[Part], targets: Sequence[Part]) -> None:
        """See :meth:`.collectives.Collectives.reserve`."""
        widest = Stage(0, max(self.tables.stages, key=lambda units: units.stop - units.start))
        for name, those in (("heads", parts), ("results", targets)):
            self._memory.reserve(name, SLOTS, self._places(those, widest)[-1])

    def close_pass(self) -> None:
        """All its stages were issued."""
        self._memory.close_pass()

    def begin(self, stage: Stage, parts: Sequence[Part], ready: torch.cuda.Event | None, where: Where) -> None:
        """See :meth:`.collectives.Collectives.begin`."""
        memory, tables, comm = self._memory, self.tables, self.comm
        stage.copied = memory.next_stage()
        with memory.on_copy_stream(ready):
            record_stream(*(part.tokens for part in parts))

            def start() -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
                # Past the first barrier nobody attends to what the slots held: all of that was given back on this
                # stream. Past the second all rows are here, and nobody reads results of the stages before any more.
                _barrier(memory)
                by_rank = [self._outgoing(part, stage) for part in parts]
                self._copy("heads", stage, parts, slice(0, len(parts)), by_rank)
                _barrier(memory)
                arrived = tuple(self._slot("heads", stage, tables.place, parts))
                return arrived, comm.record_event(arrived[0])

            moved = self._moved(parts, stage)
            stage.wait = comm.copied("to_heads", moved, moved, start, where)

    def results(self, stage: Stage, targets: Sequence[Part]) -> list[Tensor]:
        """See :meth:`.collectives.Collectives.results`."""
        return self._slot("results", stage, self.tables.place, targets)

    def give_back(
        self, stage: Stage, targets: Sequence[Part], which: slice, heads: Sequence[Tensor], where: Where
    ) -> None:
        """See :meth:`.collectives.Collectives.give_back`."""
        memory, tables, comm = self._memory, self.tables, self.comm
        for own, x in zip(self._slot("results", stage, tables.place, targets)[which], heads, strict=True):
            if own.data_ptr() != x.data_ptr():
                own.copy_(x)
        ready = comm.record_event(heads[0])
        with memory.on_copy_stream(ready):

            def start() -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
                _barrier(memory)
                arrived = tuple(self._incoming(target, stage) for target in targets[which])
                self._copy("results", stage, targets, which, arrived)
                return arrived, comm.record_event(heads[0])

            record_stream(*(target.tokens for target in targets[which]))
            moved = self._moved(targets[which], stage)
            wait = comm.copied("to_tokens", moved, moved, start, where)

        def finish() -> torch.cuda.Event | None:
            with memory.on_copy_stream(ready):
                for rows, target in zip(wait(), targets[which], strict=True):
                    if not self._in_place(target, stage) or rows.data_ptr() != self._by_rank(target, stage).data_ptr():
                        self._unpack(rows.transpose(0, 1), target, stage)
                return comm.record_event(heads[0])

        stage.returning.append(finish)

    def kept(self, stage: Stage, count: int) -> list[Tensor]:
        """See :meth:`.collectives.Collectives.kept`."""
        return [x.clone() for x in stage.inputs[:count]]

    def _copy(self, name: str, stage: Stage, parts: Sequence[Part], which: slice, rows: Sequence[Tensor]) -> None:
        """Copy ``rows``, [L, h, n, ...] of each of ``parts[which]``, to "heads" of all ranks of the team, or from their
        "results"."""
        memory, tables, outward = self._memory, self.tables, name == "heads"

        def pairs():
            for place in self._turns():
                for index, there in enumerate(self._slot(name, stage, place, parts)[which]):
                    for first, at, length in tables.runs[tables.place]:
                        yield index, rows[index][first : first + length, place], there[at : at + length]

        if not can_be_ready(rows[0]):
            for _, mine, there in pairs():
                copy_rows(*((there, mine) if outward else (mine, there)))
            return
        self._look_for_new_buffers()
        of_rows = tuple((x.shape, x.stride(), x.dtype) for x in rows)
        key = name, memory.slot(name, stage.copied), stage.units.start, stage.units.stop, which.start, of_rows
        if key not in self._ready:
            self._ready[key] = [ready_copy(index, rows[index], mine, there) for index, mine, there in pairs()]
        issue(self._ready[key], rows, outward)

    def _turns(self) -> list[int]:
        """Places of the team, each rank's next one first and its own last, so that not all go to the same."""
        h = len(self.tables.team)
        return [(self.tables.place + i) % h for i in range(1, h + 1)]

    def _outgoing(self, part: Part, stage: Stage) -> Tensor:
        """[L, h, n, ...]: the stage's heads of each rank of the team, without gaps between the heads of a row."""
        if self._in_place(part, stage):
            return self._by_rank(part, stage)
        return self._packed(part, stage).unflatten(0, (len(self.tables.team), -1)).transpose(0, 1)

    def _incoming(self, target: Part, stage: Stage) -> Tensor:
        """[L, h, n, ...] to which each rank's results come: where they belong, or new memory."""
        if self._in_place(target, stage):
            return self._by_rank(target, stage)
        shape = len(self.tables.team), self.tables.n_local, *self._shape(target, stage)[1:]
        return target.tokens.new_empty(shape, dtype=target.wire).transpose(0, 1)

    def _in_place(self, part: Part, stage: Stage) -> bool:
        """Whether a stage's heads of *tokens* are copied from or to where they are."""
        if part.wire != part.tokens.dtype or (part.is_kv and self.tables.shares_kv):
            return False
        return self._row_bytes(part, stage) >= NARROWEST_ROW and part.tokens[:1].is_contiguous()

    def _slot(self, name: str, stage: Stage, place: int, parts: Sequence[Part]) -> list[Tensor]:
        """*Heads* of all ``parts`` in a stage's slot of a rank's buffer."""
        self._look_for_new_buffers()
        units, kinds = stage.units, tuple(part.kind for part in parts)
        key = name, self._memory.slot(name, stage.copied), place, units.start, units.stop, kinds
        if key not in self._slots:
            ends, found = self._places(parts, stage), []
            slot = self._memory.at(name, stage.copied, place, (ends[-1],), torch.uint8)
            for begin, part in zip(ends, parts, strict=False):
                n_bytes = self.tables.n_rows * self._row_bytes(part, stage)
                found.append(slot[begin : begin + n_bytes].view(part.wire).view(self._shape(part, stage)))
            self._slots[key] = found
        return self._slots[key]

    def _look_for_new_buffers(self) -> None:
        """Forget what was made for buffers that have been replaced."""
        if self._generation != self._memory.generation:
            self._ready.clear(), self._slots.clear()
            self._generation = self._memory.generation

    def _places(self, parts: Sequence[Part], stage: Stage) -> list[int]:
        """Bytes at which the *heads* of ``parts`` begin in a slot, and its end."""
        places = [0]
        for part in parts:
            n_bytes = self.tables.n_rows * self._row_bytes(part, stage)
            places.append(places[-1] + -(-n_bytes // _ALIGNED) * _ALIGNED)
        return places

    def _row_bytes(self, part: Part, stage: Stage) -> int:
        """Of a row of a stage's *heads*."""
        return self._n_heads(part, stage) * part.head_bytes

    def _moved(self, parts: Sequence[Part], stage: Stage) -> int:
        """Bytes of a stage that come from other ranks."""
        h = len(self.tables.team)
        total = self.tables.n_rows * sum(self._row_bytes(part, stage) for part in parts)
        return total // h * (h - 1)


def _barrier(memory: PeerMemory) -> None:
    memory.barriers += 1
    memory.barrier()


def team_transport(cp: CPContext, key: tuple, tables: HeadTables) -> Collectives:
    """What moves the stages of layers with such tables, kept with the context as they are; a collective call.

    Args:
        key: by which the context keeps ``tables``.
    """

    def build() -> Collectives:
        memory = cp.team_peers(len(tables.team))
        return Collectives(tables, cp.comm) if memory is None else CopyEngines(tables, cp.comm, memory)

    return cp.cached(Collectives, key, build)
