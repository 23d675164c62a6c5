"""What is cheaper: fetch a block, or send the rows that chose it. Local to one rank; nothing waits for the device.

Legend: L local tokens, P ranks, Hq query heads, Hkv key/value heads, G = Hq // Hkv, S = k - 1 chosen blocks per row,
n blocks. A row is a (token, query head) pair. A stage is one of the parts in which remote work is done.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .geometry import BlockGeometry
from .options import WireCosts

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
    row_weight: float,
) -> Decision:
    """Choose between blocks and rows.

    Per owner, the cheapest of: fetch all, send all rows, and a mix in which a block is fetched if its tokens cost less
    than its share of the rows that would go instead (a row that wants several blocks of one owner is sent once, and
    counts in each of them by a part). Blocks that local tokens lie in are always fetched.

    Args:
        chosen: [L, Hq, S] int32 block ids, -1 for none.
        mode: ``auto``, ``kv`` or ``query``.
        row_weight: how much more a byte of rows counts in ``auto``.
    """
    size, row = len(geometry.owned), round(costs.row * row_weight)
    place, open_place = _places(geometry, n_kv, stages)
    always = geometry.passing.expand(n_kv, -1)
    chose, share = ops.count_choices(chosen, open_place, _SHARE if mode == "auto" else 0)
    everything = (chose > 0) & geometry.elsewhere | always

    if mode == "kv":
        candidates = everything[None]
    elif mode == "query":
        candidates = always[None].contiguous()
    else:
        worth = share * row >= geometry.length.long() * costs.kv_token * _SHARE
        candidates = torch.stack([everything, (everything & worth) | always, always])
    tokens = _tokens(candidates, geometry, size) * costs.kv_token
    rows = ops.count_rows(chosen, place, candidates, size) if mode != "kv" else torch.zeros_like(tokens)
    best, cost = (tokens + rows * row).argmin(0), tokens + rows * costs.row
    fetch = candidates.gather(0, best[geometry.owner].expand(1, n_kv, -1))[0]
    return Decision(fetch, place, mode != "kv", everything.sum(), chose.max(), cost.gather(0, best[None])[0])


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
