"""What is cheaper: fetch a block, or send the rows that chose it. Local to one rank; nothing waits for the device.

Legend: L local tokens, P ranks, Hq query heads, Hkv key/value heads, G = Hq // Hkv, S = k - 1 chosen blocks per row,
n blocks. A row is a (token, query head) pair. A stage is one of the parts in which remote work is done.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...eager.exchange import CANDIDATES, BlockTables, Prices
from ...ops import integer_backend
from ..geometry import BlockGeometry
from ..options import Weighing, WireCosts

# A row's share in a block is counted in integers, so that the decision does not depend on the order of additions.
_SHARE = 1 << 16


@dataclass(frozen=True)
class Decision:
    """What one rank asks of the others."""

    fetch: Tensor
    """[Hkv, n] bool, blocks whose K and V come here. Rows go to the owners of the other blocks that they chose."""
    place: Tensor
    """[Hkv, n] int32, ``stage * P + owner`` of the blocks to which rows go, -1 for those that are here or come here."""
    with_rows: bool
    """whether there can be rows to send."""
    facts: Tensor
    """int64, see :class:`moba_cp.eager.exchange.Weighed`."""
    costs: Tensor
    """[P + 1] int64, ``cost``, and the sum of it."""

    @property
    def needed(self) -> Tensor:
        """[] int64, (KV head, block) pairs of other ranks that are needed here in one way or the other."""
        return self.facts[0]

    @property
    def cost(self) -> Tensor:
        """[P] int64, bytes between this rank and each owner, forward and backward, at this decision."""
        return self.costs[:-1]


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
    size, n_candidates = len(geometry.owned), CANDIDATES[mode]
    tables, place, open_place = _tables(geometry, n_kv, stages)
    prices = _prices(geometry, n_kv, costs, weighing, rank)
    ops = integer_backend(chosen)
    counts = ops.count_choices(chosen, open_place, _SHARE if mode == "auto" else 0)
    weighed = ops.weigh_blocks(counts, tables, prices, mode)
    rows = ops.count_rows(chosen, place, weighed.fetched, n_candidates, size) if mode != "kv" else None
    fetch, place, bytes_ = ops.pick_cheapest(weighed, rows, place, tables, prices)
    return Decision(fetch, place, mode != "kv", weighed.stats, bytes_)


def _prices(geometry: BlockGeometry, n_kv: int, costs: WireCosts, weighing: Weighing, rank: int) -> Prices:
    """What tokens and rows count; made once."""
    key = "prices", n_kv, costs, weighing, rank
    if key not in geometry.tables:
        size, device = len(geometry.owned), geometry.owner.device
        far = torch.arange(size, device=device) // weighing.per_node != rank // weighing.per_node
        candidates = (geometry.remote_candidate & far[geometry.owner]).sum() * n_kv
        # Not in the default dtype, which a model's builder may have set to bfloat16.
        weight = far.double() * weighing.far + (~far).double() * weighing.near
        geometry.tables[key] = Prices(
            kv_token=costs.kv_token,
            row_bytes=costs.row,
            token=torch.full_like(weight, costs.kv_token),
            row=costs.row * weight,
            unit=_SHARE,
            sharing=weighing.sharing if weighing.per_node < size else 1,
            far=far,
            far_candidates=candidates.clamp(min=1),
        )
    return geometry.tables[key]


def _tables(geometry: BlockGeometry, n_kv: int, stages: int) -> tuple[BlockTables, Tensor, Tensor]:
    """The blocks; [Hkv, n] int32, ``stage * P + owner`` of those of other ranks, -1 for those that are here; and the
    same with -1 also for blocks that are fetched in any case. Made once."""
    key = "places", n_kv, stages
    if key not in geometry.tables:
        place = stage_of(n_kv, geometry.n_blocks, stages, geometry.row.device) * len(geometry.owned) + geometry.owner
        place = torch.where(geometry.elsewhere, place, -1).int()
        tables = BlockTables(geometry.owner, geometry.length, geometry.elsewhere, geometry.passing)
        geometry.tables[key] = tables, place, torch.where(geometry.passing, -1, place)
    return geometry.tables[key]
