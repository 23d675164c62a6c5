"""What is cheaper: fetch a block, or send the rows that chose it. Local to one rank; nothing waits for the device.

Legend: L local tokens, P ranks, Hq query heads, Hkv key/value heads, G = Hq // Hkv, S = k - 1 chosen blocks per row,
n blocks. A row is a (token, query head) pair. A stage is one of the parts in which remote work is done.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .geometry import BlockGeometry
from .options import Weighing, WireCosts

# A row's share in a block is counted in integers, so that the decision does not depend on the order of additions.
_SHARE = 1 << 16


@dataclass(frozen=True)
class Decision:
    """What one rank asks of the others."""

    fetch: Tensor
    """[Hkv, n] bool, blocks whose K and V come here. Rows go to the owners of the other blocks that they chose."""
    place: Tensor
    """[Hkv, n] int32, ``stage * P + owner`` of blocks of other ranks, -1 for those that are here."""
    with_rows: bool
    """whether there can be rows to send."""
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


def decide(
    chosen: Tensor,
    geometry: BlockGeometry,
    n_kv: int,
    stages: int,
    costs: WireCosts,
    mode: str,
    weighing: Weighing,
    rank: int,
) -> Decision:
    """Choose between blocks and rows.

    Per owner, the cheapest of: fetch all, send all rows, and a mix in which a block is fetched if its tokens cost less
    than its share of the rows that would go instead (a row that wants several blocks of one owner is sent once, and
    counts in each of them by a part). Blocks that local tokens lie in are always fetched.

    Args:
        chosen: [L, Hq, S] int32 block ids, -1 for none.
        mode: ``auto``, ``kv`` or ``query``.
        weighing: how ``auto`` compares blocks and rows. A block that comes from another node counts by this rank's part
            in it: with ``m`` ranks on the node and a share ``p`` of the blocks of other nodes needed here, it serves
            ``1 + (m - 1) p`` ranks if the others choose as many and independently.
        rank: this one.
    """
    size = len(geometry.owned)
    place, open_place = _places(geometry, n_kv, stages)
    always = geometry.passing.expand(n_kv, -1)
    chose, share = ops.count_choices(chosen, open_place, _SHARE if mode == "auto" else 0)
    everything = (chose > 0) & geometry.elsewhere | always

    if mode == "kv":
        candidates = everything[None]
    elif mode == "query":
        candidates = always[None].contiguous()
    else:
        token_price, row_price = _prices(everything, geometry, costs, weighing, rank)
        price = token_price[geometry.owner] * (geometry.length.double() * _SHARE)
        worth = share * row_price[geometry.owner] >= price
        candidates = torch.stack([everything, (everything & worth) | always, always])
    tokens = _tokens(candidates, geometry, size)
    rows = ops.count_rows(chosen, place, candidates, size) if mode != "kv" else torch.zeros_like(tokens)
    cost = tokens * costs.kv_token + rows * costs.row
    if mode == "auto":
        best = (tokens * token_price + rows * row_price).argmin(0)
        cost = cost.gather(0, best[None])
        fetch = candidates.gather(0, best[geometry.owner].expand(1, n_kv, -1))[0]
    else:
        fetch = candidates[0]
    return Decision(fetch, place, mode != "kv", everything.sum(), chose.max(), cost[0])


def _prices(
    everything: Tensor, geometry: BlockGeometry, costs: WireCosts, weighing: Weighing, rank: int
) -> tuple[Tensor, Tensor]:
    """[P] float64 each: what a token of a block, and a row, count by owner; ``everything`` [Hkv, n] is needed here.

    float64 has room for any number of bytes: with weights of 1 the comparison is exact.
    """
    key = "prices", weighing, rank, costs
    if key not in geometry.tables:
        device, node = everything.device, rank // weighing.per_node
        near = torch.arange(len(geometry.owned), device=device) // weighing.per_node == node
        # Not in the default dtype, which a model's builder may have set to bfloat16.
        row_price = costs.row * (near.double() * weighing.near + (~near).double() * weighing.far)
        far_blocks = ~near[geometry.owner]
        candidates = (geometry.remote_candidate & far_blocks).sum() * everything.shape[0]
        geometry.tables[key] = near, row_price, far_blocks, candidates.clamp(min=1)
    near, row_price, far_blocks, candidates = geometry.tables[key]
    needed = ((everything & far_blocks).sum() / candidates.double()).clamp(max=1)
    sharers = torch.where(near, 1.0, 1.0 + (weighing.sharing - 1) * needed)
    return costs.kv_token / sharers.double(), row_price


def _places(geometry: BlockGeometry, n_kv: int, stages: int) -> tuple[Tensor, Tensor]:
    """``place`` of :class:`Decision`, and the same with -1 also for blocks that are fetched in any case; kept."""
    key = "places", n_kv, stages
    if key not in geometry.tables:
        place = stage_of(n_kv, geometry.n_blocks, stages, geometry.row.device) * len(geometry.owned) + geometry.owner
        place = torch.where(geometry.elsewhere, place, -1).int()
        geometry.tables[key] = place, torch.where(geometry.passing, -1, place)
    return geometry.tables[key]


def _tokens(fetch: Tensor, geometry: BlockGeometry, size: int) -> Tensor:
    """[C, P] int64, tokens of all KV heads that come from each owner; fetch [C, Hkv, n] bool."""
    tokens = (fetch * geometry.length.long()).sum(1)
    # torch.bincount would wait for the device.
    zero = torch.zeros(fetch.shape[0], size, dtype=torch.int64, device=fetch.device)
    return zero.scatter_add_(1, geometry.owner.expand(fetch.shape[0], -1), tokens)
