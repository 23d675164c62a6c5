"""Moving blocks between ranks, and their gradients back, by one hop or two.

Legend: P ranks, n blocks, L local tokens, X extra rows, Hkv key/value heads, D head dim, W rows received in one stage,
m pairs of a list.
K and V of one row travel together. A pair is (KV head, block), numbered ``head * n + block``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...blocks import Pages
from ...dtypes import WIDE
from ...eager.exchange import Pairs
from ..calls import Where
from ..comm import Communicator, record_stream
from ..geometry import BlockGeometry
from .plan import PairLists, Sizes


@dataclass
class HopStage:
    """The pairs of one hop that move in one stage."""

    send: list[int]
    """rows sent to each rank"""
    receive: list[int]
    """rows received from each rank"""
    want: Tensor
    """[m] int64, the pairs received."""
    want_offset: Tensor
    """[m] int64, the row of the wire at which each begins."""
    give: Tensor
    """[m] int64, the pairs sent."""
    give_offset: Tensor
    """[m] int64, the row of the wire at which each begins."""
    rows: Tensor | None = None
    """[Hkv, n] int64, row of the wire at which each pair received begins, -1 for the others; made by the first
    :meth:`BlockStage.fetch`."""


@dataclass
class BlockStage:
    """All hops of one stage: blocks come to this rank, directly or through a rank of its node."""

    hops: list[HopStage]
    owned: Pages
    """of this rank's own blocks"""
    fetch_mask: Tensor
    """[Hkv, n] bool, what this rank itself asked for."""
    keep: bool
    """What was received in forward serves backward too."""
    geometry: BlockGeometry
    ops: Any
    """see :func:`moba_cp.ops.backend`"""
    comm: Communicator
    where: Where
    received: list[Tensor | None]
    """[W, 2, D] for each hop."""

    def fetch(self) -> Callable[[], list[Pages]]:
        """Start moving blocks; a collective call.

        Returns:
            A function that waits for the storages, which show only the blocks that this rank itself asked for.
        """
        if self.received[0] is not None:
            waits = [lambda x=x: x for x in self.received]
        elif len(self.hops) == 1:
            waits = [self._hop(self.hops[0], [self.owned])]
        else:
            outer = self._hop(self.hops[0], [self.owned])()
            waits = [lambda: outer, self._hop(self.hops[1], [self.owned, self._pages(self.hops[0], outer)])]

        def wait() -> list[Pages]:
            received = [wait() for wait in waits]
            if self.keep:
                self.received = received
            storages = [self._pages(hop, x) for hop, x in zip(self.hops, received, strict=True)]
            record_stream(self.fetch_mask, *(x for pages in storages for x in (pages.k, pages.row)))
            return [replace(pages, row=torch.where(self.fetch_mask, pages.row, -1)) for pages in storages]

        return wait

    @property
    def writes_all(self) -> bool:
        """Whether every row of the storages belongs to a block that this rank attends to."""
        return len(self.hops) == 1

    def new_gradients(self, storages: list[Pages]) -> list[Tensor]:
        """[W, 2, D] wide for each storage of :meth:`fetch`; zeros where not all are written."""
        grads = []
        for pages in storages:
            rows, _, dim = pages.k.shape
            new = pages.k.new_empty if self.writes_all else pages.k.new_zeros
            grads.append(new(rows, 2, dim, dtype=WIDE[pages.k.dtype]))
        return grads

    def return_grads(
        self, storages: list[Pages], grads: list[Tensor], kv_grads: Tensor, dtype: torch.dtype
    ) -> Callable[[], None]:
        """Start sending gradients back; a collective call.

        Args:
            storages: of :meth:`fetch`.
            grads: of :meth:`new_gradients`.
            kv_grads: [2, L + X, Hkv, D] wide, the owner's gradients, to which those that arrive are added.
            dtype: on the wire.

        Returns:
            A function that waits and adds.
        """
        mine = self.owned, *kv_grads
        if len(self.hops) == 1:
            return self._return(self.hops[0], grads[0], [mine], dtype)
        outer, inner = grads
        # A rank of this node gives back what it got from here, or through here from another node.
        relayed = replace(storages[0], row=self.hops[0].rows), outer[:, :1], outer[:, 1:]
        self._return(self.hops[1], inner, [mine, relayed], dtype)()
        return self._return(self.hops[0], outer, [mine], dtype)

    def _hop(self, hop: HopStage, sources: list[Pages]) -> Callable[[], Tensor]:
        """Start sending pairs found in ``sources`` and receiving others, [W, 2, D]."""
        packed = sources[0].k.new_empty(sum(hop.send), 2, sources[0].k.shape[2])
        for source in sources:
            self.ops.copy_pages(source, hop.give, hop.give_offset, packed)
        if hop.rows is None:
            # Issued before the transfer, so that waiting for that covers this too.
            hop.rows = torch.full(self.fetch_mask.shape, -1, dtype=torch.int64, device=hop.want.device)
            hop.rows.view(-1)[hop.want] = hop.want_offset
        return self.comm.all_to_all(packed, hop.send, hop.receive, "kv", self.where)

    def _pages(self, hop: HopStage, received: Tensor) -> Pages:
        """The pages in what a hop received: one-head storages [W, 1, D]."""
        head = self.geometry.head_zero.expand(*hop.rows.shape)
        return Pages(received[:, :1], received[:, 1:], hop.rows, head, self.geometry.length, self.geometry.block_size)

    def _return(
        self, hop: HopStage, grads: Tensor, targets: list[tuple[Pages, Tensor, Tensor]], dtype: torch.dtype
    ) -> Callable[[], None]:
        """Start sending gradients of received rows to where the rows came from.

        Args:
            grads: [W, 2, D] wide, of K and V.
            targets: storages in which the rows lie, and their dk and dv, to which what arrives is added.

        Returns:
            A function that waits and adds what arrived, in rank order.
        """
        wait = self.comm.all_to_all(grads.to(dtype), hop.receive, hop.send, "kv_gradients", self.where)

        def finish() -> None:
            arrived, begin = wait(), 0
            record_stream(hop.give, hop.give_offset)
            for count in hop.send:
                for pages, dk, dv in targets if count else ():
                    self.ops.add_pages(dk, dv, pages, hop.give, hop.give_offset, arrived, begin, begin + count)
                begin += count

        return finish


def block_stages(
    hops: list[PairLists],
    sizes: Sizes,
    fetch: Tensor,
    owned: Pages,
    geometry: BlockGeometry,
    keep: bool,
    ops,
    comm: Communicator,
    where: Where,
) -> list[BlockStage]:
    """All stages of a plan, of the blocks ``fetch`` [Hkv, n]."""
    stages = [BlockStage([], owned, fetch, keep, geometry, ops, comm, where, [None] * len(hops)) for _ in sizes.rows[0]]
    for lists, (received, sent) in zip(hops, sizes.hops, strict=True):
        for number, stage in enumerate(stages):
            want, want_offset = _of_stage(lists.want, received, number)
            give, give_offset = _of_stage(lists.give, sent, number)
            stage.hops.append(HopStage(sent[number][:-1], received[number][:-1], want, want_offset, give, give_offset))
    return stages


def _of_stage(pairs: Pairs, sizes: list[list[int]], stage: int) -> tuple[Tensor, Tensor]:
    """[m] int64 each: the pairs that move in a stage, and the row of the wire at which each begins; ``sizes`` are those
    of one side, [stages][P + 1]."""
    begin = sum(row[-1] for row in sizes[:stage])
    part = slice(begin, begin + sizes[stage][-1])
    return pairs.ids[part], pairs.before[part] - sum(sum(row[:-1]) for row in sizes[:stage])


def saved_of(stages: list[BlockStage]) -> list[Tensor | None]:
    """What forward leaves for :func:`restore` before backward."""
    return [x for stage in stages for x in (*(hop.rows for hop in stage.hops), *stage.received)]


def restore(stages: list[BlockStage], saved: list[Tensor | None]) -> None:
    """Take what :func:`saved_of` gave."""
    for stage in stages:
        for hop in stage.hops:
            hop.rows, *saved = saved
        count = len(stage.hops)
        stage.received, saved = list(saved[:count]), saved[count:]
