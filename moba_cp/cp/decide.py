"""What is cheaper: fetch a block, or send the rows that chose it. Local to one rank; nothing waits for the device.

Legend: L local tokens, P ranks, Hq query heads, Hkv key/value heads, G = Hq // Hkv, S = k - 1 chosen blocks per row,
n blocks. A row is a (token, query head) pair. A stage is one of the parts in which remote work is done.
"""

from dataclasses import dataclass
from typing import NamedTuple

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
    hottest: Tensor
    """[] int64, most local rows that chose one (KV head, block), wherever it lies."""
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


def heads_of_stage(n_kv: int, stages: int, stage: int) -> slice:
    """The KV heads of which :func:`stage_of` puts anything into ``stage``, or more."""
    if n_kv < stages:
        return slice(0, n_kv)
    return slice(-(-stage * n_kv // stages), -(-(stage + 1) * n_kv // stages))


def decide(chosen: Tensor, geometry: BlockGeometry, n_kv: int, stages: int, costs: WireCosts, mode: str) -> Decision:
    """Choose between blocks and rows.

    Per owner, the cheapest of: fetch all, send all rows, and a mix in which a block is fetched if its tokens cost less
    than its share of the rows that would go instead (a row that wants several blocks of one owner is sent once, and
    counts in each of them by a part). Blocks that local tokens lie in are always fetched.

    Args:
        chosen: [L, Hq, S] int32 block ids, -1 for none.
        mode: ``auto``, ``kv`` or ``query``.
    """
    places = (geometry.owner * stages + stage_of(n_kv, geometry.n_blocks, stages, chosen.device)).int()
    heads = [_HeadSlots.of(chosen, geometry, head, places) for head in range(n_kv)]
    lies_in = torch.zeros(geometry.n_blocks, dtype=torch.bool, device=chosen.device)
    lies_in[geometry.own.long()] = True
    lies_in &= geometry.row < 0
    always = lies_in.expand(n_kv, -1)
    chose = torch.stack([head.count(head.remote) for head in heads])
    everything = (chose > 0) | always

    if mode == "kv":
        fetch = everything
    elif mode == "query":
        fetch = always
    else:
        share = torch.stack([head.count(head.remote, head.share(~lies_in)) for head in heads])
        worth = share * costs.row >= geometry.length.long() * costs.kv_token * _SHARE
        candidates = torch.stack([everything, (everything & worth) | always, always])
        cost = torch.stack([_cost(fetch, heads, geometry, stages, costs) for fetch in candidates])
        best = cost.argmin(0)[geometry.owner]
        fetch = candidates.gather(0, best.expand(1, n_kv, -1))[0]

    served = torch.cat([head.open(fetch) for head in heads], 1)
    send = torch.cat([head.first(fetch) for head in heads], 1)
    hottest = torch.stack([head.count(head.chose).max() for head in heads]).max()
    return Decision(fetch, send, served, everything.sum(), hottest, _cost(fetch, heads, geometry, stages, costs))


class _HeadSlots(NamedTuple):
    """The chosen slots of one KV head's group, [L, G, S] each."""

    kv_head: int
    n_blocks: int
    block: Tensor
    """int32 block id, 0 where there is none."""
    chose: Tensor
    """bool, there is a block in this slot."""
    remote: Tensor
    """bool, the block lies on another rank."""
    place: Tensor
    """int32, where the row would go: one number per owner and stage."""

    @classmethod
    def of(cls, chosen: Tensor, geometry: BlockGeometry, kv_head: int, places: Tensor) -> "_HeadSlots":
        """Slots of ``kv_head``; places [Hkv, n] int32, where a row that wants a block would go."""
        group = chosen.shape[1] // places.shape[0]
        slots = chosen[:, kv_head * group : (kv_head + 1) * group]
        block = slots.clamp(min=0)
        chose = slots >= 0
        remote = chose & (geometry.row < 0)[block]
        return cls(kv_head, geometry.n_blocks, block, chose, remote, places[kv_head][block])

    def open(self, fetch: Tensor) -> Tensor:
        """Slots whose block lies elsewhere and does not come here; fetch [Hkv, n] bool."""
        return self.remote & ~fetch[self.kv_head][self.block]

    def first(self, fetch: Tensor) -> Tensor:
        """Open slots that are the first of their row with their place: for these the row is sent."""
        slots = self.open(fetch)
        first = slots.clone()
        for slot in range(1, slots.shape[-1]):
            same = self.place[..., :slot] == self.place[..., slot : slot + 1]
            first[..., slot] &= ~(same & slots[..., :slot]).any(-1)
        return first

    def share(self, open_block: Tensor) -> Tensor:
        """The part of its row's cost that each slot bears, in units of 1 / _SHARE; open_block [n] bool."""
        slots = self.remote & open_block[self.block]
        together = torch.zeros_like(self.place)
        for slot in range(slots.shape[-1]):
            together += (self.place == self.place[..., slot : slot + 1]) & slots[..., slot : slot + 1]
        return _SHARE // together.clamp(min=1) * slots

    def count(self, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """[n] int64, slots under the mask per block, by weight."""
        return _count(self.block, mask if weight is None else mask * weight, self.n_blocks)


def _cost(fetch: Tensor, heads: list[_HeadSlots], geometry: BlockGeometry, stages: int, costs: WireCosts) -> Tensor:
    """[P] int64 bytes to and from each owner."""
    size = len(geometry.owned)
    tokens = _count(geometry.owner, (fetch * geometry.length).sum(0), size)
    rows = sum(_count(head.place // stages, head.first(fetch), size) for head in heads)
    return tokens * costs.kv_token + rows * costs.row


def _count(index: Tensor, weight: Tensor, n: int) -> Tensor:
    """[n] int64 sums of weights by index; torch.bincount would wait for the device."""
    zero = torch.zeros(n, dtype=torch.int64, device=index.device)
    return zero.scatter_add_(0, index.flatten().long(), weight.flatten().long())
