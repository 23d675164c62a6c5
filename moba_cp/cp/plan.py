"""From the chosen blocks: which blocks move, and to whom.

Every rank knows who owns which block, so a request is a bitmap of fixed size per owner and one all-to-all is all the
negotiation there is.

Legend: P ranks, n blocks, m_p blocks owned by rank p, Hkv key/value heads, L local tokens, k top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .comm import Communicator
from .geometry import BlockGeometry


@dataclass(frozen=True)
class BlockPlan:
    """The (KV head, block) pairs this rank receives and those it sends, each in the order of the wire."""

    want_head: Tensor
    """int64, KV head of each pair received; by owner, then head, then block."""
    want_block: Tensor
    """int64, block id of each pair received."""
    give_head: Tensor
    """int64, KV head of each pair sent; by requester, then head, then block."""
    give_block: Tensor
    """int64, block id of each pair sent."""
    receive_rows: list[int]
    """rows of K and V received from each rank."""
    send_rows: list[int]
    """rows of K and V sent to each rank."""


def needed_blocks(chosen: Tensor, geometry: BlockGeometry, n_kv: int) -> Tensor:
    """[Hkv, n] bool: blocks of other ranks that local queries chose, or lie in.

    Args:
        chosen: [L, Hq, k - 1] int32, -1 for none.
    """
    n = geometry.n_blocks
    need = torch.zeros(n_kv, n + 1, dtype=torch.bool, device=chosen.device)
    by_head = chosen.long().view(chosen.shape[0], n_kv, -1).transpose(0, 1).flatten(1)
    need.scatter_(1, torch.where(by_head < 0, n, by_head), True)
    need[:, geometry.own.long()] = True
    return need[:, :n] & (geometry.row < 0)


def plan_blocks(need: Tensor, geometry: BlockGeometry, comm: Communicator) -> BlockPlan:
    """Tell the owners what is needed here and learn what others need; a collective call.

    Args:
        need: [Hkv, n] bool, see :func:`needed_blocks`.
    """
    n_kv, device = need.shape[0], need.device
    n_owned = [ids.numel() for ids in geometry.owned]
    mine = geometry.owned[comm.rank]
    # The request bitmap lists owner, head, block: this is also the order of the wire.
    request = torch.cat([need[:, ids].flatten() for ids in geometry.owned])
    head = torch.cat([torch.arange(n_kv, device=device).repeat_interleave(m) for m in n_owned])
    block = torch.cat([ids.repeat(n_kv) for ids in geometry.owned])
    owner = torch.repeat_interleave(
        torch.arange(comm.size, device=device),
        torch.tensor([n_kv * m for m in n_owned], device=device),
        output_size=block.numel(),
    )
    asked = comm.all_to_all(
        request.to(torch.uint8), [n_kv * m for m in n_owned], [n_kv * len(mine)] * comm.size, "requests"
    )().view(comm.size, n_kv, -1)

    want = request.nonzero()[:, 0]
    requester, give_head, give = asked.nonzero().unbind(1)
    give_block = mine[give]
    length = geometry.length.long()
    receive = torch.bincount(owner[want], weights=length[block[want]].double(), minlength=comm.size)
    send = torch.bincount(requester, weights=length[give_block].double(), minlength=comm.size)
    sizes = torch.stack([receive, send]).long().tolist()

    comm.counters.needed += want.numel()
    comm.counters.remote += n_kv * int(geometry.remote_candidate.sum())
    return BlockPlan(head[want], block[want], give_head, give_block, sizes[0], sizes[1])
