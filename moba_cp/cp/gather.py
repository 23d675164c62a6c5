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

from .comm import used_here
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
        self.returning: Callable[[], torch.cuda.Event | None] | None = None
        """Sums of a stage's shares, yet to be issued; see :meth:`Stage.give_back`."""
        self._summed: torch.cuda.Event | None = None

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
        key = "gathered", self.n_kv, len(self.heads), with_own
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

    def stages(self, k_rows: Tensor, v_rows: Tensor, backward: bool, differentiated: bool = True) -> Iterator[Stage]:
        """The stages one after the other; the storages of each and the next travel while the one before is computed.

        Args:
            k_rows, v_rows: [L + X, Hkv, D].
            backward: what was kept in forward does not travel again.
            differentiated: forward will be followed by backward.
        """
        if self.memory is not None:
            rows = self.comm.size * max(h.stop - h.start for h in self.heads) * self.geometry.widest
            self.memory.open_pass(f"rank {self.comm.rank} in {self.comm.direction}{self.comm.layer}")
            self.memory.reserve("kv", rows * 2 * self.dim * self.dtype.itemsize)
            if differentiated:
                # Before activations fill what is left.
                self.memory.reserve("gradients", rows * 2 * self.dim * self.wire.itemsize)
        self.returning = None
        kind = CollectiveStage if self.memory is None else PeerStage
        ready = self.comm.mark(k_rows)
        with (self.comm if self.memory is None else self.memory).beside(ready):
            used_here(k_rows, v_rows)

        def begin(number: int) -> Stage:
            stage = kind(self, self.heads[number])
            stage.begin(k_rows, v_rows, ready, self.kept.get(number) if backward else None)
            return stage

        ahead = [begin(number) for number in range(min(2, len(self.heads)))]
        return self._in_turn(ahead, begin, self.options.keep and differentiated and not backward)

    def sum_up(self) -> None:
        """Issue the sums that are yet to be."""
        if self.returning is not None:
            self._summed, self.returning = self.returning(), None

    def wait(self) -> None:
        """Let the current stream wait for dK and dV of all stages."""
        self.sum_up()
        if self._summed is not None:
            torch.cuda.current_stream().wait_event(self._summed)

    def _in_turn(self, ahead: list[Stage], begin: Callable[[int], Stage], keep: bool) -> Iterator[Stage]:
        for number in range(len(self.heads)):
            stage = ahead.pop(0)
            if keep:
                self.kept[number] = stage.storage().clone()
            yield stage
            stage.finish()
            if number + 2 < len(self.heads):
                ahead.append(begin(number + 2))
        if self.memory is not None:
            self.memory.close_pass()
