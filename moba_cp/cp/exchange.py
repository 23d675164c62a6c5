"""Moving blocks between ranks, and their gradients back.

Legend: P ranks, L local tokens, X extra rows (assembled straddling blocks), Hkv key/value heads, D head dim,
B block size, W rows received. K and V of one row travel together.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..blocks import Pages
from .comm import Communicator
from .geometry import BlockGeometry
from .plan import BlockPlan


def assemble(k: Tensor, v: Tensor, geometry: BlockGeometry, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Local rows followed by this rank's straddling blocks: k, v [L, Hkv, D] -> [L + X, Hkv, D]; a collective call."""
    if not geometry.straddles:
        return k, v
    local = torch.stack([k, v], 1)
    tails = comm.all_to_all(local[geometry.tail_from], geometry.tail_send, geometry.tail_receive, "tails")()
    extra = local.new_empty(geometry.n_extra, *local.shape[1:])
    extra[geometry.copy_to] = local[geometry.copy_from]
    extra[geometry.tail_to] = tails
    return torch.cat([k, extra[:, 0]]), torch.cat([v, extra[:, 1]])


def assemble_backward(dk: Tensor, dv: Tensor, geometry: BlockGeometry, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`assemble`: dk, dv [L + X, Hkv, D] -> [L, Hkv, D]; a collective call."""
    if not geometry.straddles:
        return dk, dv
    n_local = dk.shape[0] - geometry.n_extra
    grads = torch.stack([dk, dv], 1)
    local, extra = grads[:n_local], grads[n_local:]
    tails = comm.all_to_all(extra[geometry.tail_to], geometry.tail_receive, geometry.tail_send, "tail_gradients")()
    # A row of a straddling block is nowhere else, so the gradient in its place is still zero.
    local[geometry.copy_from] = extra[geometry.copy_to]
    local[geometry.tail_from] = tails
    return local[:, 0], local[:, 1]


def gather_means(k: Tensor, geometry: BlockGeometry, comm: Communicator) -> Tensor:
    """Mean key of every block of the sequence, [n, Hkv, D] in k's dtype; k [L + X, Hkv, D]; a collective call."""
    mine = geometry.owned[comm.rank]
    widest = max(ids.numel() for ids in geometry.owned)
    means = k.new_zeros(widest, *k.shape[1:])
    means[: mine.numel()] = ops.block_means(k, geometry.row[mine], geometry.length[mine], geometry.block_size)
    return comm.all_gather(means, "means").flatten(0, 1)[geometry.gathered]


def owned_pages(k: Tensor, v: Tensor, geometry: BlockGeometry) -> Pages:
    """Pages of the blocks this rank owns; k, v [L + X, Hkv, D]."""
    n_kv = k.shape[1]
    head = torch.arange(n_kv, device=k.device, dtype=torch.int32)[:, None].expand(-1, geometry.n_blocks)
    return Pages(k, v, geometry.row.expand(n_kv, -1), head, geometry.length, geometry.block_size)


class BlockExchange:
    """One layer's transfer of the blocks in a :class:`BlockPlan`."""

    def __init__(self, plan: BlockPlan, geometry: BlockGeometry, comm: Communicator):
        self.plan, self.geometry, self.comm = plan, geometry, comm

    def fetch(self, k: Tensor, v: Tensor) -> Callable[[], Pages]:
        """Start sending owned blocks and receiving needed ones; a collective call.

        Args:
            k, v: [L + X, Hkv, D].

        Returns:
            A function that waits and returns the pages of the received blocks: one-head storages [W, 1, D].
        """
        plan, geometry = self.plan, self.geometry
        rows, heads = self._owned_rows(0, sum(plan.send_rows))
        # Rows of one block and head: [.., 2, D], K beside V.
        packed = torch.stack([k[rows, heads], v[rows, heads]], 1)
        wait = self.comm.all_to_all(packed, plan.send_rows, plan.receive_rows, "kv")

        def pages() -> Pages:
            received = wait()
            length = geometry.length[plan.want_block].long()
            row = torch.full((k.shape[1], geometry.n_blocks), -1, dtype=torch.int64, device=k.device)
            row[plan.want_head, plan.want_block] = length.cumsum(0) - length
            head = torch.zeros_like(row, dtype=torch.int32)
            return Pages(received[:, :1], received[:, 1:], row, head, geometry.length, geometry.block_size)

        return pages

    def give_back(self, dk: Tensor, dv: Tensor) -> Callable[[Tensor, Tensor], None]:
        """Start sending the gradients of received blocks to their owners; a collective call.

        Args:
            dk, dv: [W, 1, D] wide.

        Returns:
            A function ``add(dk, dv)`` that waits and adds what arrived, in rank order, to the owner's wide
            gradients [L + X, Hkv, D], in place.
        """
        plan = self.plan
        wait = self.comm.all_to_all(torch.cat([dk, dv], 1), plan.receive_rows, plan.send_rows, "kv_gradients")

        def add(dk: Tensor, dv: Tensor) -> None:
            begin = 0
            for arrived in wait().split(plan.send_rows):
                # One requester never asks for a block twice: within it all rows differ.
                at = self._owned_rows(begin, arrived.shape[0])
                dk[at] += arrived[:, 0]
                dv[at] += arrived[:, 1]
                begin += arrived.shape[0]

        return add

    def _owned_rows(self, begin: int, count: int) -> tuple[Tensor, Tensor]:
        """Row and KV head of sent rows ``begin .. begin + count``, in the order of the wire."""
        plan, geometry = self.plan, self.geometry
        length = geometry.length[plan.give_block].long()
        end = length.cumsum(0)
        wire = torch.arange(begin, begin + count, device=end.device)
        pair = torch.searchsorted(end, wire, right=True)
        in_block = wire - (end - length)[pair]
        return geometry.row[plan.give_block[pair]] + in_block, plan.give_head[pair]
