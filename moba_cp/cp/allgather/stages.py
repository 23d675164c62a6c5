"""The stages of :mod:`.strategy`: some heads' K and V on their way to all ranks, and the gradients' way back.

Legend: P ranks, L local tokens, X extra rows, W most rows (local and extra) of any rank, Hq query heads, Hkv key/value
heads, H KV heads of a stage, D head dim. Slabs and storages are those of :mod:`.strategy`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks import Pages
from ...ops import backend
from ..comm import Communicator, used_here
from ..geometry import BlockGeometry
from ..symmetric_memory import PeerMemory

# Of peer memory, by buffer. Between the end of a stage and the next use of its storage lie packing, a meeting and
# copies: with two, attention to the stage between would have to be longer than all that.
SLOTS = {"kv": 3, "gradients": 2}


class Moves(NamedTuple):
    """What copy engines bring in the stages that have one slot of a buffer."""

    storage: Tensor
    """[P * H * W, 2, D]: this rank's slot."""
    sources: list[Tensor]
    """Rows to read of other ranks' slots, each rank's next one first, so that not all read from the same."""
    targets: list[Tensor]
    """Where K and V go in this rank's slot; none for shares of gradients, which go to new memory, one by one."""
    n_rows: list[int]
    """Of each source."""
    sizes: tuple[int, int]
    """Bytes that others read here, and that this rank reads."""


@dataclass(frozen=True)
class Layer:
    """What all stages of one layer have in common."""

    comm: Communicator
    geometry: BlockGeometry
    memory: PeerMemory | None
    """Where copy engines serve."""
    heads: list[slice]
    """KV heads of each stage."""
    dim: int
    dtype: torch.dtype
    """Of K and V."""
    wire: torch.dtype
    """Of gradients that travel."""

    def seen(self, viewer: int, owner: int, count: int) -> slice:
        """The rows of ``owner``'s slab of ``count`` heads that another rank can see: the slab's two parts adjoin."""
        early, late = self.geometry.sees[viewer, owner]
        cut, end = count * self.geometry.cut, count * self.geometry.widest
        return slice(0 if early else cut, end if late else cut)

    def others(self) -> list[int]:
        """The other ranks, each rank's next one first."""
        return [(self.comm.rank + i) % self.comm.size for i in range(1, self.comm.size)]

    def share_places(self, count: int) -> Tensor:
        """[P - 1, 3] int64: where the shares of this rank's slab of ``count`` heads are in what others return, see
        :func:`moba_cp.eager.sum_partial_grads`; made once.

        Copy engines bring what each of the others can see, in their order; a collective brings slabs of all ranks.
        """
        key = "share places", count, self.memory is None
        if key not in self.geometry.tables:
            slab, begin, places = count * self.geometry.widest, 0, []
            for p in self.others():
                rows = self.seen(p, self.comm.rank, count)
                places.append((p * slab, 0, slab) if self.memory is None else (begin, rows.start, rows.stop))
                begin += rows.stop - rows.start
            # Not to wait for what was issued before.
            self.geometry.tables[key] = torch.tensor(places, dtype=torch.int64).to(
                self.geometry.owner.device, non_blocking=True
            )
        return self.geometry.tables[key]

    def page_table(self, with_own: bool) -> tuple[Tensor, Tensor]:
        """[Hkv, n] int64, row of its stage's storage at which each block begins that this rank can see, -1 for others;
        and [Hkv, n] int32, its head there. Made once."""
        geometry = self.geometry
        key = "gathered", tuple(heads.stop for heads in self.heads), with_own
        if key not in geometry.tables:
            device, cut, widest = geometry.owner.device, geometry.cut, geometry.widest
            sees = torch.from_numpy(geometry.sees[self.comm.rank]).to(device, non_blocking=True)
            is_late = geometry.owner_row >= cut
            own = geometry.owner == self.comm.rank
            visible = torch.where(own, with_own, sees[geometry.owner, is_late.long()])
            rows = []
            for heads in self.heads:
                count = heads.stop - heads.start
                head = torch.arange(count, device=device)[:, None]
                early = head * cut + geometry.owner_row
                late = count * cut + head * (widest - cut) + geometry.owner_row - cut
                rows.append(geometry.owner * count * widest + torch.where(is_late, late, early))
            row = torch.where(visible, torch.cat(rows), -1)
            geometry.tables[key] = row, geometry.no_head.expand(*row.shape)
        return geometry.tables[key]


class Stage:
    """Some heads: their storage and its gradients."""

    ahead = 2
    """Stages that have begun when the first of them is computed."""

    def __init__(self, layer: Layer, heads: slice):
        self.layer, self.heads = layer, heads
        self.count, self.rank, self.size = heads.stop - heads.start, layer.comm.rank, layer.comm.size
        self.rows = self.count * layer.geometry.widest
        self._storage: Tensor | None = None
        self._wait: Callable[[], Tensor]

    def begin(self, k_rows: Tensor, v_rows: Tensor, ready: torch.cuda.Event | None, kept: Tensor | None) -> None:
        """Start moving this stage's slabs of K and V, once the device has passed ``ready``; a collective call."""
        raise NotImplementedError

    def storage(self) -> Tensor:
        """[P * H * W, 2, D], once it has arrived; rows that nobody here can see hold anything."""
        if self._storage is None:
            self._storage = self._wait()
        return self._storage

    def pages(self, with_own: bool) -> Pages:
        """The blocks of the storage that this rank can see, its own among them or not."""
        storage, geometry = self.storage(), self.layer.geometry
        table = self.layer.page_table(with_own)
        return Pages(storage[:, :1], storage[:, 1:], *table, geometry.length, geometry.block_size)

    def gradients(self) -> Tensor:
        """[P * H * W, 2, D], as it will travel, for this rank's shares of the gradients of the storage; it holds
        anything."""
        raise NotImplementedError

    def give_back(self, grads: Tensor, dk: Tensor, dv: Tensor) -> Callable[[], torch.cuda.Event | None]:
        """Start returning shares; a collective call.

        Args:
            grads: of :meth:`gradients`, written by what the current stream does before this.
            dk, dv: [L + X, Hkv, D], of which this stage's heads are written.

        Returns:
            A function that issues the sums of what returns to this rank, and returns the event that follows them; None
            where they are done. Better called late: where all streams share one queue of the GPU
            (CUDA_DEVICE_MAX_CONNECTIONS=1), what waits there holds up what was issued after it.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """All that needs the storage was issued."""

    def _pack(self, k_rows: Tensor, v_rows: Tensor, slab: Tensor) -> None:
        backend(slab).pack_kv_shard(k_rows[:, self.heads], v_rows[:, self.heads], slab, self.layer.geometry.cut)

    def _own(self, storage: Tensor) -> Tensor:
        """[H * W, 2, D], this rank's slab."""
        return storage[self.rank * self.rows : (self.rank + 1) * self.rows]

    def _sum(self, grads: Tensor, arrived: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Write dk, dv [L + X, Hkv, D] of this stage's heads.

        Args:
            grads: of :meth:`gradients`. What nobody attends to, tails of others' blocks, becomes anything.
            arrived: [M, 2, D], what others return; see :meth:`Layer.share_places`.
        """
        used_here(dk, dv)
        sums, layer = (x[:, self.heads] for x in (dk, dv)), self.layer
        backend(arrived).sum_partial_grads(
            self._own(grads), arrived, layer.share_places(self.count), *sums, layer.geometry.cut
        )


class CollectiveStage(Stage):
    def begin(self, k_rows, v_rows, ready, kept):
        if kept is not None:
            self._storage = kept
            return
        comm = self.layer.comm
        with comm.beside(ready):
            slab = k_rows.new_empty(self.rows, 2, self.layer.dim)
            self._pack(k_rows, v_rows, slab)
            wait = comm.all_gather_async(slab, "kv")
        self._wait = lambda: wait().flatten(0, 1)

    def gradients(self):
        grads = self.storage().new_empty(self.size * self.rows, 2, self.layer.dim, dtype=self.layer.wire)
        # What this rank cannot see travels too.
        for p, slab in enumerate(grads.split(self.rows)):
            seen = self.layer.seen(self.rank, p, self.count)
            slab[: seen.start], slab[seen.stop :] = 0, 0
        return grads

    def give_back(self, grads, dk, dv):
        comm, counts = self.layer.comm, [self.rows] * self.size
        with comm.beside(comm.mark(grads)):
            wait = comm.all_to_all(grads, counts, counts, "kv_gradients")
            used_here(grads)
            issued = comm.mark(grads)

        def finish() -> torch.cuda.Event | None:
            with comm.beside(issued):
                self._sum(grads, wait(), dk, dv)
                return comm.mark(grads)

        return finish


class PeerStage(Stage):
    ahead = SLOTS["kv"]

    def begin(self, k_rows, v_rows, ready, kept):
        layer, memory = self.layer, self.layer.memory
        self.number = memory.next_stage()
        with memory.beside(ready):
            moves = self._moves("kv", layer.dtype)
            if kept is None:
                memory.claim("kv", self.number)
                self._pack(k_rows, v_rows, self._own(moves.storage))

            def start() -> tuple[Tensor, torch.cuda.Event | None]:
                # Also where nothing moves: it says that what others gave in earlier stages has been read here.
                _meet(memory)
                if kept is None:
                    _copy(moves.targets, moves.sources)
                return moves.storage if kept is None else kept, layer.comm.mark(k_rows)

            self._wait = layer.comm.copied("kv", *(moves.sizes if kept is None else (0, 0)), start)

    def gradients(self):
        self.layer.memory.claim("gradients", self.number)
        return self._moves("gradients", self.layer.wire).storage

    def give_back(self, grads, dk, dv):
        layer, memory = self.layer, self.layer.memory
        moves, ready = self._moves("gradients", layer.wire), layer.comm.mark(grads)
        with memory.beside(ready):

            def start() -> tuple[Tensor, torch.cuda.Event | None]:
                _meet(memory)
                # What was given in the stage before has been copied by all, and summed here.
                memory.release("gradients", self.number - 1, layer.comm.mark(grads))
                arrived = grads.new_empty(sum(moves.n_rows), 2, layer.dim)
                _copy(arrived.split(moves.n_rows), moves.sources)
                return arrived, layer.comm.mark(grads)

            wait = layer.comm.copied("kv_gradients", *moves.sizes, start)

        def finish() -> torch.cuda.Event | None:
            with memory.beside(ready):
                self._sum(grads, wait(), dk, dv)
                done = layer.comm.mark(grads)
            # In a replay nobody meets, and this alone says when the slot was read.
            memory.release("gradients", self.number, done)
            return done

        return finish

    def finish(self):
        self.layer.memory.release("kv", self.number, self.layer.comm.mark(self.storage()))

    def _moves(self, name: str, dtype: torch.dtype) -> Moves:
        """What moves of buffer ``name`` in this stage: "kv", or shares of "gradients". Made once for each slot."""
        layer, memory = self.layer, self.layer.memory
        key = name, dtype, memory.slot(name, self.number), self.count, layer.dim, memory.generation
        if key not in layer.geometry.tables:
            shape, row_bytes = (self.size, self.rows, 2, layer.dim), 2 * layer.dim * dtype.itemsize
            slabs = memory.at(name, self.number, self.rank, shape, dtype)
            sources, targets, leaving = [], [], 0
            for p in layer.others():
                owner, viewer = (p, self.rank) if name == "kv" else (self.rank, p)
                rows = layer.seen(viewer, owner, self.count)
                if rows.start < rows.stop:
                    sources.append(memory.at(name, self.number, p, shape, dtype)[owner, rows])
                    targets += [slabs[owner, rows]] if name == "kv" else []
                back = layer.seen(owner, viewer, self.count)
                leaving += back.stop - back.start
            n_rows = [len(x) for x in sources]
            sizes = leaving * row_bytes, sum(n_rows) * row_bytes
            layer.geometry.tables[key] = Moves(slabs.flatten(0, 1), sources, targets, n_rows, sizes)
        return layer.geometry.tables[key]


def _meet(memory: PeerMemory) -> None:
    memory.meetings += 1
    memory.meet()


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
