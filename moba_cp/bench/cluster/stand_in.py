"""Two GPUs stand in for the first and the last of P ranks: what copy engines make of more GPUs than there are.

In the zigzag layout the first rank sees all others' K and V and gets the fewest shares of gradients back; the last one
sees half and gets the most. What one copies from others, others copy from the other. So if each of two GPUs does the
work of one of them, and reads the other one's memory in place of everybody's, both compute, and copy in both
directions, what they would among P ranks. The choice of blocks is the real one. Results mean nothing: where other
ranks' keys should be, there are those of the other GPU.

It says nothing of what more than two GPUs do to each other: links that they share, and waiting for the slowest.

Legend: T tokens, P ranks.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...cp.comm import Communicator
from ...cp.context import CPContext
from ...cp.straddle import owned_means
from ...cp.symmetric_memory import PeerMemory, peer_memory
from .inputs import Shape, make_inputs
from .measure import MOBA, Layer, Limits, exchange_options, measure, overlap
from .ranks import Ranks
from .replay import ReplayCommunicator
from .rows import Row

PART = "stand-in"
MODE = "allgather"
"""The mode in which copy engines do everything, and nothing depends on what other ranks want."""


class StandInMemory(PeerMemory):
    """Memory of P ranks, of which one is here and another on the other GPU, whose memory is read for that of all."""

    def __init__(self, pair: PeerMemory, rank: int, size: int):
        super().__init__(rank, size)
        self._pair, self._partner = pair, size - 1 - rank

    def at(self, name: str, stage: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See :meth:`PeerMemory.at`; ``shape`` begins with P, what belongs to each rank."""
        there = super().at(name, stage, rank, shape, dtype)
        if name != "kv" or rank == self.rank:
            return there
        # The other GPU has laid out its own K and V alone.
        return there[self._partner].expand(shape)

    def meet(self) -> None:
        """See :meth:`PeerMemory.meet`."""
        self._pair.meet()

    def _allocate(self, name: str, nbytes: int) -> list[Tensor]:
        buffers = self._pair._allocate(f"stand-in {name}", nbytes)
        here, there = buffers[self._pair.rank], buffers[1 - self._pair.rank]
        return [here if rank == self.rank else there for rank in range(self.size)]

    def _settle(self) -> None:
        self._pair._settle()


class StandInCommunicator(ReplayCommunicator):
    """One of P ranks, with the means of all blocks and memory of two."""

    def __init__(self, memory: StandInMemory, means: Tensor):
        super().__init__(None)
        self.rank, self.size = memory.rank, memory.size
        self._memory, self._means = memory, means

    def peers(self, device: torch.device | None = None) -> PeerMemory:
        """See :meth:`Communicator.peers`."""
        return self._memory

    def _all_gather(self, x: Tensor):
        assert x.shape == self._means.shape[1:], "only means are gathered"
        self._means[self.rank] = x
        return lambda: self._means

    def _watch(self, event: torch.cuda.Event, what: str) -> None:
        """No group has a timeout here; meeting has one."""


class _Rank(Communicator):
    """A rank's number, for its share of everything."""

    def __init__(self, rank: int, size: int):
        super().__init__(None)
        self.rank, self.size = rank, size


def able(modes: Sequence[str]) -> list[str]:
    """Those of ``modes`` in which two GPUs can stand in for more, or the mode alone."""
    asked = {mode: exchange_options(mode) for mode in modes}
    return [name for name, options in asked.items() if options.mode == MODE and options.copy_engines] or [MODE]


def stand_in(
    shape: Shape, n_tokens: int, size: int, modes: Sequence[str], limits: Limits, ranks: Ranks
) -> Iterator[Row]:
    """Rows with the wire on and off, of the slower of both; collective over the first two ranks."""
    pair = peer_memory(ranks.group(2))
    reason = ""
    if shape.layout != "zigzag":
        reason = f"skipped: in the {shape.layout} layout the first and the last rank are not each other's match"
    elif n_tokens % (2 * size * shape.moba.block_size):
        reason = f"skipped: with {n_tokens} tokens, blocks would lie on two of {size} ranks"
    elif pair is None:
        reason = "skipped: the GPUs do not map each other's memory"
    if reason:
        yield Row(PART, n_tokens, size, f"{MOBA} {MODE}", note=reason)
        return
    memory = StandInMemory(pair, 0 if ranks.rank == 0 else size - 1, size)
    comm = StandInCommunicator(memory, _means(shape, n_tokens, size, ranks.device))
    layer = Layer(shape, n_tokens, size, ranks, comm, present=2)
    candidates = [layer.moba(mode, ranks_per_node=size) for mode in able(modes)]
    for candidate, row in zip(candidates, measure(layer, PART, candidates, limits, lambda name: 0.0), strict=True):
        if row.both is not None:
            off = overlap(layer, candidate, limits)
            row.off_forward, row.off_both, row.off_error = off.off_forward, off.off_both, off.off_error
            row.note = off.note
        yield row


def _means(shape: Shape, n_tokens: int, size: int, device: torch.device) -> Tensor:
    """[P, m, Hkv, D]: mean keys of the blocks of every rank."""
    means = []
    for rank in range(size):
        cp = CPContext(_Rank(rank, size), shape.layout, n_tokens, device=device)
        k = make_inputs(shape, n_tokens, cp.positions, device)[1]
        means.append(owned_means(k, cp.geometry(shape.moba.block_size), rank))
    return torch.stack(means)
