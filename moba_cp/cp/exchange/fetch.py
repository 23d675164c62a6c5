"""Moving blocks between ranks, and their gradients back, by one hop or two.

Legend: P ranks, n blocks, L local tokens, X extra rows, Hkv key/value heads, D head dim, W rows received in one stage,
m pairs of a list.
K and V of one row travel together. A pair is (KV head, block), numbered ``head * n + block``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...blocks import Pages
from ...dtypes import WIDE
from ...eager.exchange import Pairs
from ...ops import backend
from ..comm import Communicator, used_here
from ..geometry import BlockGeometry
from .negotiate import PairLists


class HopStage:
    """The pairs of one hop that move in one stage."""

    def __init__(self, lists: PairLists, sizes: list, stage: int, geometry: BlockGeometry, comm: Communicator):
        """``sizes`` are the host's copy of ``lists.sizes``."""
        (want_rows, want), (give_rows, give) = (
            ([row[:-1] for row in side], [row[-1] for row in side]) for side in sizes
        )
        self.receive, self.send = want_rows[stage], give_rows[stage]
        self._rows: Tensor | None = None
        self.want, self._want_offset = _of_stage(lists.want, want, want_rows, stage)
        self.give, self.give_offset = _of_stage(lists.give, give, give_rows, stage)
        self.geometry, self.comm = geometry, comm

    def rows(self, n_kv: int) -> Tensor:
        """[Hkv, n] int64, row of the wire at which each pair received begins, -1 for the others; kept."""
        if self._rows is None:
            rows = torch.full((n_kv, self.geometry.n_blocks), -1, dtype=torch.int64, device=self.want.device)
            rows.view(-1)[self.want] = self._want_offset
            self._rows = rows
        return self._rows

    def set_rows(self, rows: Tensor) -> None:
        """Take what :meth:`rows` returned in forward."""
        self._rows = rows

    def fetch(self, sources: list[Pages]) -> Callable[[], Tensor]:
        """Start sending pairs found in ``sources`` and receiving others; a collective call.

        Returns:
            A function that waits and returns what was received, [W, 2, D], for :meth:`pages`.
        """
        packed = sources[0].k.new_empty(sum(self.send), 2, sources[0].k.shape[2])
        for source in sources:
            backend(packed).copy_pages(source, self.give, self.give_offset, packed)
        # Made before the transfer starts: who waits for that finds both.
        self.rows(sources[0].row.shape[0])
        return self.comm.all_to_all(packed, self.send, self.receive, "kv")

    def pages(self, received: Tensor) -> Pages:
        """The pages in what :meth:`fetch` received: one-head storages [W, 1, D]."""
        geometry, row = self.geometry, self._rows
        head = geometry.no_head.expand(*row.shape)
        return Pages(received[:, :1], received[:, 1:], row, head, geometry.length, geometry.block_size)

    def give_back(self, grads: Tensor, targets: list[tuple[Pages, Tensor, Tensor]], dtype) -> Callable[[], None]:
        """Start sending gradients of received rows to where the rows came from; a collective call.

        Args:
            grads: [W, 2, D] wide, of K and V.
            targets: storages in which the rows lie, and their dk and dv, to which what arrives is added.
            dtype: dtype on the wire.

        Returns:
            A function that waits and adds what arrived, in rank order.
        """
        wait = self.comm.all_to_all(grads.to(dtype), self.receive, self.send, "kv_gradients")

        def finish() -> None:
            arrived, begin, offset = wait(), 0, self.give_offset
            used_here(self.give, offset)
            for count in self.send:
                for pages, dk, dv in targets if count else ():
                    backend(arrived).add_pages(dk, dv, pages, self.give, offset, arrived, begin, begin + count)
                begin += count

        return finish


def _of_stage(pairs: Pairs, counts: list[int], rows: list[list[int]], stage: int) -> tuple[Tensor, Tensor]:
    """[m] int64 each: the pairs that move in a stage, and the row of the wire at which each begins; ``counts`` and
    ``rows`` (by rank) are those of all stages."""
    part = slice(sum(counts[:stage]), sum(counts[: stage + 1]))
    return pairs.ids[part], pairs.before[part] - sum(map(sum, rows[:stage]))


class BlockStage:
    """All hops of one stage: blocks come to this rank, directly or through a rank of its node."""

    def __init__(self, hops: list[HopStage], owned: Pages, fetch: Tensor, keep: bool):
        """``owned``: pages of this rank's own blocks; ``fetch`` [Hkv, n] bool: what this rank itself asked for."""
        self.hops, self.owned, self.fetch_mask, self.keep = hops, owned, fetch, keep
        self._received: list[Tensor | None] = [None] * len(hops)

    @property
    def n_tensors(self) -> int:
        """How many :meth:`tensors` gives."""
        return 2 * len(self.hops)

    def tensors(self) -> list[Tensor | None]:
        """What forward leaves for :meth:`restore` before backward."""
        return [*(hop.rows(self.fetch_mask.shape[0]) for hop in self.hops), *self._received]

    def restore(self, tensors: list[Tensor | None]) -> None:
        """Take what :meth:`tensors` gave."""
        count = len(self.hops)
        for hop, rows in zip(self.hops, tensors[:count], strict=True):
            hop.set_rows(rows)
        self._received = list(tensors[count:])

    def fetch(self) -> Callable[[], list[Pages]]:
        """Start; returns a function that waits for the storages in which this rank's blocks are."""
        if self._received[0] is not None:
            return lambda: self._pages(self._received)
        first = self.hops[0].fetch([self.owned])
        if len(self.hops) == 1:
            waits = [first]
        else:
            outer = first()
            waits = [lambda: outer, self.hops[1].fetch([self.owned, self.hops[0].pages(outer)])]

        def wait() -> list[Pages]:
            received = [wait() for wait in waits]
            if self.keep:
                self._received = received
            return self._pages(received)

        return wait

    def _pages(self, received: list[Tensor]) -> list[Pages]:
        storages = [hop.pages(x) for hop, x in zip(self.hops, received, strict=True)]
        for pages in storages:
            used_here(pages.k, pages.row)
        return storages

    def visible(self, storages: list[Pages]) -> list[Pages]:
        """The storages with only those blocks that this rank itself asked for."""
        used_here(self.fetch_mask)
        return [
            Pages(p.k, p.v, torch.where(self.fetch_mask, p.row, -1), p.head, p.length, p.block_size) for p in storages
        ]

    @property
    def writes_all(self) -> bool:
        """Whether every row of the storages belongs to a block that this rank attends to."""
        return len(self.hops) == 1

    def new_gradients(self, pages: Pages) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[W, 2, D] wide for :meth:`give_back`, and those of K and of V as the storages lie; zeros where not all are
        written."""
        rows, _, dim = pages.k.shape
        new = pages.k.new_empty if self.writes_all else pages.k.new_zeros
        grads = new(rows, 2, dim, dtype=WIDE[pages.k.dtype])
        return grads, (grads[:, :1], grads[:, 1:])

    def give_back(self, storages: list[Pages], grads: list[Tensor], owned: Tensor, dtype) -> Callable[[], None]:
        """Start sending gradients back; a collective call.

        Args:
            storages: as :meth:`fetch` gave them; grads: for each, [W, 2, D] wide.
            owned: [2, L + X, Hkv, D] wide, the owner's gradients, to which those that arrive are added.

        Returns:
            A function that waits and adds.
        """
        mine = self.owned, *owned
        if len(self.hops) == 1:
            return self.hops[0].give_back(grads[0], [mine], dtype)
        outer, inner = grads
        # A rank of this node gives back what it got from here, or through here from another node.
        relayed = storages[0], outer[:, :1], outer[:, 1:]
        self.hops[1].give_back(inner, [mine, relayed], dtype)()
        return self.hops[0].give_back(outer, [mine], dtype)
