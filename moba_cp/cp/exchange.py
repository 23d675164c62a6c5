"""Moving blocks between ranks, and their gradients back, by one hop or two.

Legend: P ranks, n blocks, L local tokens, X extra rows, Hkv key/value heads, D head dim, W rows received in one stage.
K and V of one row travel together. A pair is (KV head, block), numbered ``head * n + block``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Pages
from ..eager import wide_dtype
from .comm import Communicator, used_here
from .geometry import BlockGeometry
from .plan import PairLists


class Rows(NamedTuple):
    """The rows of a list of pairs, one entry per row in the order of the wire."""

    head: Tensor
    block: Tensor
    in_block: Tensor
    """int64 each."""


class HopStage:
    """The pairs of one hop that move in one stage."""

    def __init__(self, lists: PairLists, sizes: list, stage: int, geometry: BlockGeometry, comm: Communicator):
        """``sizes`` are the host's copy of ``lists.sizes``."""
        (want_rows, want), (give_rows, give) = (
            ([row[:-1] for row in side], [row[-1] for row in side]) for side in sizes
        )
        self.receive, self.send = want_rows[stage], give_rows[stage]
        self.want = lists.want[sum(want[:stage]) : sum(want[: stage + 1])]
        self.give = lists.give[sum(give[:stage]) : sum(give[: stage + 1])]
        self.geometry, self.comm = geometry, comm

    def fetch(self, sources: list[Pages], n_kv: int) -> Callable[[], Pages]:
        """Start sending pairs found in ``sources`` and receiving others; a collective call.

        Returns:
            A function that waits and returns the pages received: one-head storages [W, 1, D].
        """
        at = self._rows(self.give, 0, sum(self.send))
        packed = _read(sources[0], at)
        for source in sources[1:]:
            here = source.row[at.head, at.block] >= 0
            packed = torch.where(here[:, None, None], _read(source, at), packed)
        wait = self.comm.all_to_all(packed, self.send, self.receive, "kv")
        geometry = self.geometry

        def pages() -> Pages:
            received = wait()
            n, device = geometry.n_blocks, received.device
            length = geometry.length.long()[self.want % n]
            row = torch.full((n_kv * n,), -1, dtype=torch.int64, device=device)
            row[self.want] = length.cumsum(0) - length
            head = torch.zeros(n_kv, n, dtype=torch.int32, device=device)
            return Pages(
                received[:, :1], received[:, 1:], row.view(n_kv, n), head, geometry.length, geometry.block_size
            )

        return pages

    def give_back(self, grads: Tensor, add: Callable[[Rows, Tensor], None], dtype: torch.dtype) -> Callable[[], None]:
        """Start sending gradients of received rows to where the rows came from; a collective call.

        Args:
            grads: [W, 2, D] wide, of K and V.
            add: adds gradients [rows, 2, D] wide to the rows they belong to; within one call all rows differ.
            dtype: dtype on the wire.

        Returns:
            A function that waits and adds what arrived, in rank order.
        """
        wide = grads.dtype
        wait = self.comm.all_to_all(grads.to(dtype), self.receive, self.send, "kv_gradients")

        def finish() -> None:
            begin = 0
            for arrived in wait().split(self.send):
                if arrived.shape[0]:
                    add(self._rows(self.give, begin, arrived.shape[0]), arrived.to(wide))
                begin += arrived.shape[0]

        return finish

    def _rows(self, pairs: Tensor, begin: int, count: int) -> Rows:
        """Rows ``begin .. begin + count`` of the wire that carries ``pairs``."""
        n = self.geometry.n_blocks
        end = self.geometry.length.long()[pairs % n].cumsum(0)
        wire = torch.arange(begin, begin + count, device=pairs.device)
        index = torch.searchsorted(end, wire, right=True)
        pair = pairs[index]
        length = self.geometry.length.long()[pair % n]
        return Rows(pair // n, pair % n, wire - (end[index] - length))


def _read(pages: Pages, at: Rows) -> Tensor:
    """[rows, 2, D], K beside V; anything for rows that are not in ``pages``."""
    start = pages.row[at.head, at.block]
    row = torch.where(start >= 0, start + at.in_block, 0)
    head = pages.head[at.head, at.block].long()
    if pages.k.shape[0] == 0:
        return pages.k.new_zeros(row.numel(), 2, pages.k.shape[2])
    return torch.stack([pages.k[row, head], pages.v[row, head]], 1)


class BlockStage:
    """All hops of one stage: blocks come to this rank, directly or through a rank of its node."""

    def __init__(self, hops: list[HopStage], owned: Pages, fetch: Tensor, keep: bool):
        """``owned``: pages of this rank's own blocks; ``fetch`` [Hkv, n] bool: what this rank itself asked for."""
        self.hops, self.owned, self.fetch_mask, self.keep = hops, owned, fetch, keep
        self._pages: list[Pages] | None = None

    def fetch(self) -> Callable[[], list[Pages]]:
        """Start; returns a function that waits for the storages in which this rank's blocks are."""
        if self._pages is not None:
            kept = self._pages
            return lambda: kept
        n_kv = self.owned.row.shape[0]
        first = self.hops[0].fetch([self.owned], n_kv)
        if len(self.hops) == 1:
            waits = [first]
        else:
            outer = first()
            waits = [lambda: outer, self.hops[1].fetch([self.owned, outer], n_kv)]

        def wait() -> list[Pages]:
            storages = [pages() for pages in waits]
            for pages in storages:
                used_here(pages.k, pages.row, pages.head)
            if self.keep:
                self._pages = storages
            return storages

        return wait

    def visible(self, storages: list[Pages]) -> list[Pages]:
        """The storages with only those blocks that this rank itself asked for."""
        return [
            Pages(p.k, p.v, torch.where(self.fetch_mask, p.row, -1), p.head, p.length, p.block_size) for p in storages
        ]

    def new_gradients(self, pages: Pages) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Zeros [W, 2, D] wide for :meth:`give_back`, and those of K and of V as the storages lie."""
        rows, _, dim = pages.k.shape
        grads = pages.k.new_zeros(rows, 2, dim, dtype=wide_dtype(pages.k.dtype))
        return grads, (grads[:, :1], grads[:, 1:])

    def give_back(self, storages: list[Pages], grads: list[Tensor], owned: Tensor, dtype) -> Callable[[], None]:
        """Start sending gradients back; a collective call.

        Args:
            storages: as :meth:`fetch` gave them; grads: for each, [W, 2, D] wide.
            owned: [L + X, Hkv, 2, D] wide, the owner's gradients, to which those that arrive are added.

        Returns:
            A function that waits and adds.
        """

        def add_owned(at: Rows, arrived: Tensor) -> None:
            owned[self.owned.row[at.head, at.block] + at.in_block, at.head] += arrived

        if len(self.hops) == 1:
            return self.hops[0].give_back(grads[0], add_owned, dtype)
        outer, inner = grads
        # One flat buffer for both targets of the inner hop, so that an index says which.
        n_kv, dim = owned.shape[1], owned.shape[3]
        flat = torch.cat([torch.zeros_like(owned).view(-1, 2, dim), outer])
        base = owned.shape[0] * n_kv

        def add_relayed(at: Rows, arrived: Tensor) -> None:
            mine, theirs = self.owned.row[at.head, at.block], storages[0].row[at.head, at.block]
            row = torch.where(mine >= 0, (mine + at.in_block) * n_kv + at.head, base + theirs + at.in_block)
            flat[row] += arrived

        self.hops[1].give_back(inner, add_relayed, dtype)()
        owned += flat[:base].view_as(owned)
        return self.hops[0].give_back(flat[base:], add_owned, dtype)
