"""All K and V to everybody, a few heads at a time: for when nearly everything is needed anyway.

Legend: P ranks, L local tokens, X extra rows, R most rows (local and extra) of any rank, Hkv key/value heads, D head
dim, n blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..blocks import Pages
from ..eager import wide_dtype
from .comm import Communicator
from .geometry import BlockGeometry


class GatherStage:
    """All-gather of some heads; the same calls as :class:`moba_cp.cp.exchange.BlockStage`."""

    def __init__(self, heads: slice, owned: Pages, geometry: BlockGeometry, comm: Communicator, keep: bool):
        self.heads, self.owned, self.geometry, self.comm, self.keep = heads, owned, geometry, comm, keep
        self._pages: list[Pages] | None = None

    def fetch(self) -> Callable[[], list[Pages]]:
        """Start; returns a function that waits for the pages of all ranks' blocks: storage [P * R, heads, D]."""
        if self._pages is not None:
            kept = self._pages
            return lambda: kept
        k, v = self.owned.k[:, self.heads], self.owned.v[:, self.heads]
        # K beside V of each head, as the owner's gradients lie.
        padded = k.new_empty(self.geometry.widest, k.shape[1], 2, k.shape[2])
        torch.stack([k, v], 2, out=padded[: k.shape[0]])
        padded[k.shape[0] :] = 0
        wait = self.comm.all_gather_async(padded, "kv")

        def storages() -> list[Pages]:
            gathered = wait().flatten(0, 1)
            geometry, n_kv = self.geometry, self.owned.row.shape[0]
            row = torch.full((n_kv, geometry.n_blocks), -1, dtype=torch.int64, device=gathered.device)
            # This rank's own blocks are attended to in place, not here.
            place = geometry.owner * geometry.widest + geometry.owner_row
            row[self.heads] = torch.where(geometry.row < 0, place, -1)
            head = torch.zeros_like(row, dtype=torch.int32)
            head[self.heads] = torch.arange(k.shape[1], dtype=torch.int32, device=row.device)[:, None]
            pages = [Pages(gathered[:, :, 0], gathered[:, :, 1], row, head, geometry.length, geometry.block_size)]
            if self.keep:
                self._pages = pages
            return pages

        return storages

    def visible(self, storages: list[Pages]) -> list[Pages]:
        """All of them."""
        return storages

    @property
    def writes_all(self) -> bool:
        """Whether every row that another rank will add belongs to a block of that rank."""
        return not self.geometry.straddles

    def new_gradients(self, pages: Pages) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[P * R, heads, 2, D] wide for :meth:`give_back`, and those of K and of V as the storages lie; zeros where not
        all that matter are written."""
        rows, heads, dim = pages.k.shape
        new = pages.k.new_empty if self.writes_all else pages.k.new_zeros
        grads = new(rows, heads, 2, dim, dtype=wide_dtype(pages.k.dtype))
        return grads, (grads[:, :, 0], grads[:, :, 1])

    def give_back(self, storages: list[Pages], grads: list[Tensor], owned: Tensor, dtype) -> Callable[[], None]:
        """Start sending gradients to the owners; see :meth:`moba_cp.cp.exchange.BlockStage.give_back`.

        Args:
            grads: one [P * R, heads, 2, D] wide.
        """
        counts = [self.geometry.widest] * self.comm.size
        wait = self.comm.all_to_all(grads[0].to(dtype), counts, counts, "kv_gradients")

        def finish() -> None:
            arrived = wait().unflatten(0, (self.comm.size, -1))
            ops.add_shares(*owned[:, :, self.heads], arrived, self.comm.rank)

        return finish
