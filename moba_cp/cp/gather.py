"""MoBA attention where all K and V come to every rank, some heads at a time: stages of whole heads.

Where nearly everything is needed anyway, this needs no plan, and a stage has all blocks in one storage: outputs and dQ
are written once, in their dtype, and so are dK and dV by the sums of all ranks' shares. While a stage is computed, the
next one's K and V arrive, and the gradients of the one before return.

Between GPUs that map each other's memory (:mod:`.peer`) copy engines move it all, and only what a rank's queries can
see. Elsewhere it is an all-gather and an all-to-all.

Legend: P ranks, L local tokens, X extra rows, W most rows (local and extra) of any rank, Hq query heads, Hkv key/value
heads, H KV heads of a stage, D head dim, n blocks. A rank's *slab* of a stage is [H * W, 2, D], K beside V: first the
rows before the geometry's cut, head by head, then the others. A *storage* is the slabs of all ranks.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .context import CPContext
from .gather_costs import GatherCosts
from .gather_stages import CollectiveStage, Part, PeerStage, Stage

# What arrives in a stage takes a GPU most of a millisecond, a few times what starting a stage takes the host.
STAGE_BYTES = 256 << 20


class Gathering:
    """What the calls of one layer, forward and backward, have in common."""

    def __init__(self, k: Tensor, cp: CPContext, block_size: int):
        """``k`` [L, Hkv, D]."""
        self.geometry, self.comm, self.options = cp.geometry(block_size), cp.comm, cp.exchange
        self.n_kv, self.dim, self.dtype = k.shape[1], k.shape[2], k.dtype
        self.memory = cp.peers
        self.wire = self.options.wire_dtype(k.dtype)
        by_copies = self.memory is not None
        self.costs = GatherCosts(self.geometry, self.n_kv, self.dim, self.dtype, self.options, by_copies)
        n_stages = max(self.options.stages, -(-self.costs.arriving_bytes // STAGE_BYTES))
        # More of them where that makes them more even.
        n_stages = -(-self.n_kv // max(1, self.n_kv // n_stages))
        cuts = [self.n_kv * s // n_stages for s in range(n_stages + 1)]
        self.heads = [slice(*cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)]
        self.kept: dict[int, Tensor] = {}
        """Storages of stages that arrived in forward and serve backward too."""

    def parts(self, heads: slice) -> list[Part]:
        """The parts that a slab of these heads has rows in."""
        count, cut, widest = heads.stop - heads.start, self.geometry.cut, self.geometry.widest
        ends = (0, count * cut, count * widest)
        of_rank = slice(0, cut), slice(cut, widest)
        return [Part(i, slice(ends[i], ends[i + 1]), of_rank[i]) for i in range(2) if ends[i] < ends[i + 1]]

    def page_row(self, heads: slice, with_own: bool) -> Tensor:
        """[Hkv, n] int64, row of a stage's storage at which each block begins that this rank can see."""
        geometry = self.geometry
        key = "gathered", self.n_kv, heads.start, heads.stop, with_own
        if key not in geometry.tables:
            device = geometry.owner.device
            count, cut, widest = heads.stop - heads.start, geometry.cut, geometry.widest
            sees = torch.from_numpy(geometry.sees[self.comm.rank]).to(device)
            half = (geometry.owner_row >= cut).long()
            head = torch.arange(count, device=device)[:, None]
            early = head * cut + geometry.owner_row
            late = count * cut + head * (widest - cut) + geometry.owner_row - cut
            row = geometry.owner * count * widest + torch.where(half == 0, early, late)
            own = geometry.owner == self.comm.rank
            visible = torch.where(own, with_own, sees[geometry.owner, half])
            table = torch.full((self.n_kv, geometry.n_blocks), -1, dtype=torch.int64, device=device)
            table[heads] = torch.where(visible, row, -1)
            geometry.tables[key] = table
        return geometry.tables[key]

    def stages(self, k_rows: Tensor, v_rows: Tensor, backward: bool = False) -> Iterator[Stage]:
        """The stages one after the other; the storages of each and the next travel while the one before is computed.

        Args:
            k_rows, v_rows: [L + X, Hkv, D].
            backward: what was kept in forward does not travel again.
        """
        if self.memory is not None:
            rows = self.comm.size * max(h.stop - h.start for h in self.heads) * self.geometry.widest
            self.memory.reserve("kv", rows * 2 * self.dim * self.dtype.itemsize)
            if backward:
                self.memory.reserve("gradients", rows * 2 * self.dim * self.wire.itemsize)
        kind = CollectiveStage if self.memory is None else PeerStage
        ready = self.comm.mark(k_rows)

        def begin(number: int) -> Stage:
            stage = kind(self, self.heads[number])
            stage.begin(k_rows, v_rows, ready, self.kept.get(number) if backward else None)
            return stage

        ahead = [begin(number) for number in range(min(2, len(self.heads)))]
        return self._in_turn(ahead, begin, backward)

    def _in_turn(self, ahead: list[Stage], begin: Callable[[int], Stage], backward: bool) -> Iterator[Stage]:
        for number in range(len(self.heads)):
            stage = ahead.pop(0)
            if self.options.keep and not backward:
                self.kept[number] = stage.storage().clone()
            yield stage
            stage.finish()
            if number + 2 < len(self.heads):
                ahead.append(begin(number + 2))
