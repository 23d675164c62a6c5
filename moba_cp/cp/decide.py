"""What is cheaper: fetch a block, or send the rows that chose it. Local to one rank; nothing waits for the device.

Legend: L local tokens, P ranks, Hq query heads, Hkv key/value heads, G = Hq // Hkv, S = k - 1 chosen blocks per row,
n blocks. A row is a (token, query head) pair. A stage is one of the parts in which remote work is done.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import BlockGeometry
from .options import WireCosts

# A row's share in a block is counted in integers, so that the decision does not depend on the order of additions.
_SHARE = 1 << 16


@dataclass(frozen=True)
class Decision:
    """What one rank asks of the others."""

    fetch: Tensor
    """[Hkv, n] bool, blocks whose K and V come here."""
    send: Tensor
    """[L, Hq, S] bool: the row goes to the owner of the block in this slot; once per owner and stage."""
    served: Tensor
    """[L, Hq, S] bool: the block in this slot is attended to by its owner."""
    needed: Tensor
    """[] int64, (KV head, block) pairs of other ranks that are needed here in one way or the other."""
    cost: Tensor
    """[P] int64, bytes between this rank and each owner, forward and backward, at this decision."""


def stage_of(n_kv: int, n_blocks: int, stages: int, device) -> Tensor:
    """[Hkv, n] int64, the stage that each (KV head, block) belongs to.

    Whole heads where there are enough of them, so that a row is not sent once per stage; parts of heads otherwise.
    """
    head = torch.arange(n_kv, device=device)[:, None]
    if n_kv >= stages:
        return (head * stages // n_kv).expand(-1, n_blocks).contiguous()
    index = head * n_blocks + torch.arange(n_blocks, device=device)
    return index * stages // max(1, n_kv * n_blocks)


def decide(chosen: Tensor, geometry: BlockGeometry, n_kv: int, stages: int, costs: WireCosts, mode: str) -> Decision:
    """Choose between blocks and rows.

    Per owner, the cheapest of: fetch all, send all rows, and a mix in which a block is fetched if its tokens cost less
    than its share of the rows that would go instead. Blocks that local tokens lie in are always fetched.

    Args:
        chosen: [L, Hq, S] int32 block ids, -1 for none.
        mode: ``auto``, ``kv`` or ``query``.
    """
    n = geometry.n_blocks
    stage = stage_of(n_kv, n, stages, chosen.device)
    heads = torch.arange(chosen.shape[1], device=chosen.device) // (chosen.shape[1] // n_kv)
    block = chosen.long().clamp(min=0)
    remote = (chosen >= 0) & (geometry.row < 0)[block]
    lies_in = torch.zeros(n, dtype=torch.bool, device=chosen.device)
    lies_in[geometry.own.long()] = True
    lies_in &= geometry.row < 0
    # Where each slot's row would go: one number per owner and stage, -1 for nowhere.
    place = torch.where(remote, geometry.owner[block] * stages + stage[heads[:, None], block], -1)
    pair = heads[:, None] * n + block

    need = _count(pair, remote, n_kv * n).view(n_kv, n) > 0
    always = lies_in.expand(n_kv, n)
    fetch_all = need | always
    everything = Decision(fetch_all, torch.zeros_like(remote), torch.zeros_like(remote), fetch_all.sum(), None)
    if mode == "kv":
        return _with_cost(everything, geometry, stages, place, costs)

    open_slot = remote & ~lies_in[block]
    nothing = _rows(open_slot, always, place, fetch_all)
    if mode == "query":
        return _with_cost(nothing, geometry, stages, place, costs)

    share = _SHARE // _multiplicity(torch.where(open_slot, place, -1)).clamp(min=1)
    rows = _count(pair, open_slot, n_kv * n, share).view(n_kv, n)
    worth = rows * costs.row >= geometry.length.long() * costs.kv_token * _SHARE
    mixed = (need & worth) | always
    mix = _rows(open_slot & ~mixed[heads[:, None], block], mixed, place, fetch_all)

    options = [_with_cost(d, geometry, stages, place, costs) for d in (everything, mix, nothing)]
    best = torch.stack([d.cost for d in options]).argmin(0)
    fetch, served = everything.fetch & False, remote & False
    for index, option in enumerate(options):
        here = best[geometry.owner] == index
        fetch |= option.fetch & here
        served |= option.served & here[block]
    return _with_cost(_rows(served, fetch, place, fetch_all), geometry, stages, place, costs)


def _rows(served: Tensor, fetch: Tensor, place: Tensor, needed: Tensor) -> Decision:
    return Decision(fetch, _first_of_place(torch.where(served, place, -1)), served, needed.sum(), None)


def _with_cost(d: Decision, geometry: BlockGeometry, stages: int, place: Tensor, costs: WireCosts) -> Decision:
    size = len(geometry.owned)
    tokens = (d.fetch * geometry.length.long()).sum(0)
    kv = torch.zeros(size, dtype=torch.int64, device=tokens.device).scatter_add_(0, geometry.owner, tokens)
    rows = _count(place.clamp(min=0) // stages, d.send, size)
    return Decision(d.fetch, d.send, d.served, d.needed, kv * costs.kv_token + rows * costs.row)


def _count(index: Tensor, mask: Tensor, n: int, weight: Tensor | None = None) -> Tensor:
    """[n] int64, how often each index occurs under the mask; torch.bincount would wait for the device."""
    weight = mask.long() if weight is None else mask * weight
    zero = torch.zeros(n, dtype=torch.int64, device=index.device)
    return zero.scatter_add_(0, index.flatten(), weight.flatten())


def _multiplicity(place: Tensor) -> Tensor:
    """[..., S]: how many slots of the row have the same place; meaningless where place is -1."""
    count = torch.zeros_like(place)
    for slot in range(place.shape[-1]):
        count += place == place[..., slot : slot + 1]
    return count


def _first_of_place(place: Tensor) -> Tensor:
    """[..., S] bool: the first slot of the row with its place; False where place is -1."""
    first = place >= 0
    for slot in range(1, place.shape[-1]):
        first[..., slot] &= (place[..., :slot] != place[..., slot : slot + 1]).all(-1)
    return first
