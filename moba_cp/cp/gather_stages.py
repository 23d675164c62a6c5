"""The stages of :mod:`.gather`: some heads' K and V on their way to all ranks, and the gradients' way back.

Legend: P ranks, L local tokens, X extra rows, W most rows (local and extra) of any rank, Hq query heads, Hkv key/value
heads, H KV heads of a stage, D head dim. Slabs and storages are those of :mod:`.gather`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..blocks import Pages
from .comm import Communicator, used_here
from .geometry import BlockGeometry
from .peer import PeerMemory

# Of peer memory, by buffer. Between the end of a stage and the next use of its storage lie packing, a meeting and
# copies: with two, attention to the stage between would have to be longer than all that.
SLOTS = {"kv": 3, "gradients": 2}


@dataclass(frozen=True)
class Part:
    """Rows of a slab: those before the cut, or the others."""

    half: int
    rows: slice
    """of the slab"""
    of_rank: slice
    """the same rows of one head, as the rank numbers them"""


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

    def parts(self, heads: slice) -> list[Part]:
        """The parts that a slab of these heads has rows in."""
        count, cut, widest = heads.stop - heads.start, self.geometry.cut, self.geometry.widest
        ends = (0, count * cut, count * widest)
        of_rank = slice(0, cut), slice(cut, widest)
        return [Part(i, slice(ends[i], ends[i + 1]), of_rank[i]) for i in range(2) if ends[i] < ends[i + 1]]

    def page_row(self, with_own: bool) -> Tensor:
        """[Hkv, n] int64, row of its stage's storage at which each block begins that this rank can see, -1 for others;
        made once."""
        geometry = self.geometry
        key = "gathered", self.heads[-1].stop, len(self.heads), with_own
        if key not in geometry.tables:
            device, cut, widest = geometry.owner.device, geometry.cut, geometry.widest
            sees = torch.from_numpy(geometry.sees[self.comm.rank]).to(device)
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
            geometry.tables[key] = torch.where(visible, torch.cat(rows), -1)
        return geometry.tables[key]


class Stage:
    """Some heads: their storage and its gradients."""

    ahead = 2
    """Stages that have begun when the first of them is computed."""

    def __init__(self, layer: Layer, heads: slice):
        self.layer, self.heads = layer, heads
        self.count, self.rank, self.size = heads.stop - heads.start, layer.comm.rank, layer.comm.size
        self.rows = self.count * layer.geometry.widest
        self.parts = layer.parts(heads)
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
        row = self.layer.page_row(with_own)
        head = geometry.no_head.expand(*row.shape)
        return Pages(storage[:, :1], storage[:, 1:], row, head, geometry.length, geometry.block_size)

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
        for part in self.parts:
            k, v = (x[part.of_rank, self.heads] for x in (k_rows, v_rows))
            ops.pack_slab(k, v, slab[part.rows].unflatten(0, (self.count, -1)))

    def _sum(self, part: Part, grads: Tensor, shares: Tensor, dk: Tensor, dv: Tensor, skip: int = -1) -> None:
        """``shares`` [S, rows of the part, 2, D]. What nobody attends to, tails of others' blocks, becomes anything."""
        used_here(dk, dv)
        own = grads.unflatten(0, (self.size, -1))[self.rank, part.rows].unflatten(0, (self.count, -1))
        sums = (x[part.of_rank, self.heads] for x in (dk, dv))
        ops.sum_shares(own, shares.unflatten(1, (self.count, -1)), *sums, skip)


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
        for slab, sees in zip(grads.unflatten(0, (self.size, -1)), self.layer.geometry.sees[self.rank], strict=True):
            for part in self.parts:
                if not sees[part.half]:
                    slab[part.rows] = 0
        return grads

    def give_back(self, grads, dk, dv):
        comm, counts = self.layer.comm, [self.rows] * self.size
        with comm.beside(comm.mark(grads)):
            wait = comm.all_to_all(grads, counts, counts, "kv_gradients")
            used_here(grads)
            issued = comm.mark(grads)

        def finish() -> torch.cuda.Event | None:
            with comm.beside(issued):
                arrived = wait().unflatten(0, (self.size, -1))
                for part in self.parts:
                    self._sum(part, grads, arrived[:, part.rows], dk, dv, skip=self.rank)
                return comm.mark(grads)

        return finish


class PeerStage(Stage):
    ahead = SLOTS["kv"]

    def begin(self, k_rows, v_rows, ready, kept):
        layer, memory = self.layer, self.layer.memory
        self.number = memory.next_stage()
        with memory.beside(ready):
            slabs = self._slabs("kv", self.rank, layer.dtype)
            if kept is None:
                memory.claim("kv", self.number)
                self._pack(k_rows, v_rows, slabs[self.rank])
            moves = [] if kept is not None else [(p, part) for p in self._others() for part in self._seen(self.rank, p)]

            def start() -> tuple[Tensor, torch.cuda.Event | None]:
                # Also where nothing moves: it says that what others gave in earlier stages has been read here.
                memory.meet()
                for p, part in moves:
                    slabs[p, part.rows].copy_(self._slabs("kv", p, layer.dtype)[p, part.rows], non_blocking=True)
                return slabs.flatten(0, 1) if kept is None else kept, layer.comm.mark(k_rows)

            sent = [part for p in self._others() for part in self._seen(p, self.rank)] if kept is None else []
            sizes = self._bytes(sent, layer.dtype), self._bytes([part for _, part in moves], layer.dtype)
            self._wait = layer.comm.copied("kv", *sizes, start)

    def gradients(self):
        self.layer.memory.claim("gradients", self.number)
        return self._slabs("gradients", self.rank, self.layer.wire).flatten(0, 1)

    def give_back(self, grads, dk, dv):
        layer, memory = self.layer, self.layer.memory
        with memory.beside(layer.comm.mark(grads)):
            sees_me = layer.geometry.sees[:, self.rank]
            givers = [(part, [p for p in self._others() if sees_me[p, part.half]]) for part in self.parts]
            moves = [(p, part) for part, ranks in givers for p in ranks]

            def start() -> tuple[Tensor, torch.cuda.Event | None]:
                memory.meet()
                # What was given in the stage before has been copied by all, and summed here.
                memory.release("gradients", self.number - 1, layer.comm.mark(grads))
                n_rows = sum(part.rows.stop - part.rows.start for _, part in moves)
                arrived, begin = grads.new_empty(n_rows, 2, layer.dim, dtype=layer.wire), 0
                for p, part in moves:
                    share = self._slabs("gradients", p, layer.wire)[self.rank, part.rows]
                    arrived[begin : begin + len(share)].copy_(share, non_blocking=True)
                    begin += len(share)
                return arrived, layer.comm.mark(grads)

            sent = [part for p in self._others() for part in self._seen(self.rank, p)]
            sizes = self._bytes(sent, layer.wire), self._bytes([part for _, part in moves], layer.wire)
            wait = layer.comm.copied("kv_gradients", *sizes, start)
            issued = layer.comm.mark(grads)

        def finish() -> torch.cuda.Event | None:
            with memory.beside(issued):
                arrived, begin = wait(), 0
                for part, ranks in givers:
                    n_rows = part.rows.stop - part.rows.start
                    shares = arrived[begin : begin + len(ranks) * n_rows].view(len(ranks), n_rows, 2, layer.dim)
                    self._sum(part, grads, shares, dk, dv)
                    begin += len(ranks) * n_rows
                done = layer.comm.mark(grads)
            memory.release("gradients", self.number, done)
            return done

        return finish

    def finish(self):
        self.layer.memory.release("kv", self.number, self.layer.comm.mark(self.storage()))

    def _slabs(self, name: str, rank: int, dtype: torch.dtype) -> Tensor:
        """[P, H * W, 2, D]: what a rank has of this stage in a buffer."""
        return self.layer.memory.at(name, self.number, rank, (self.size, self.rows, 2, self.layer.dim), dtype)

    def _others(self) -> list[int]:
        """The other ranks, each rank's next one first, so that not all read from the same."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]

    def _seen(self, viewer: int, owner: int) -> list[Part]:
        return [part for part in self.parts if self.layer.geometry.sees[viewer, owner, part.half]]

    def _bytes(self, parts: list[Part], dtype: torch.dtype) -> int:
        return sum(part.rows.stop - part.rows.start for part in parts) * 2 * self.layer.dim * dtype.itemsize
