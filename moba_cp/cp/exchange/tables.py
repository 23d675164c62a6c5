"""What is the same in every call: who can serve which blocks to whom, what they cost, and where the flags of a request
stand.

Legend: P ranks, n blocks, Hkv key/value heads, m blocks owned by this rank. A pair is (KV head, block), numbered
``head * n + block``. A stage is one of the parts in which remote work is done.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...eager.exchange import PAIR, TOTALS, BlockTables, PairTables, Prices
from ...host import to_device
from ..geometry import BlockGeometry
from ..options import Weighing
from .costs import WireCosts
from .policy import Directions, PolicyTables

# A row's share in a block is counted in integers, so that the decision does not depend on the order of additions.
ROW_SHARE = 1 << 16


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


@dataclass(frozen=True)
class DecisionTables:
    """What a decision between blocks and rows goes by; see :func:`.plan.decide`."""

    blocks: BlockTables
    prices: Prices
    dest: Tensor
    """[Hkv, n] int32, ``stage * P + owner`` of blocks of other ranks, -1 for those that are here."""
    open_dest: Tensor
    """[Hkv, n] int32, the same with -1 also for blocks that are fetched in any case."""
    policy: PolicyTables | None
    """By which ranks of several nodes decide together; None where each does by itself."""


def build_decision_tables(
    geometry: BlockGeometry,
    n_kv: int,
    stages: int,
    costs: WireCosts,
    weighing: Weighing,
    directions: Directions | None = None,
) -> DecisionTables:
    """:class:`DecisionTables` of ``geometry``'s rank.

    Args:
        weighing: how ``auto`` compares blocks and rows.
        directions: the same bytes as ``costs`` by direction, where ranks of several nodes are to decide together.
    """
    size, device = len(geometry.owned), geometry.owner.device
    far = torch.arange(size, device=device) // weighing.per_node != geometry.rank // weighing.per_node
    candidates = (geometry.remote_candidate & far[geometry.owner]).sum() * n_kv
    # Not in the default dtype, which a model's builder may have set to bfloat16.
    weight = far.double() * weighing.far + (~far).double() * weighing.near
    prices = Prices(
        kv_token=costs.kv_token,
        row_bytes=costs.row,
        token=torch.full_like(weight, costs.kv_token),
        row=costs.row * weight,
        unit=ROW_SHARE,
        sharing=weighing.sharing if weighing.per_node < size else 1,
        far=far,
        far_candidates=candidates.clamp(min=1),
    )
    dest = stage_of(n_kv, geometry.n_blocks, stages, device) * size + geometry.owner
    dest = torch.where(geometry.is_remote, dest, -1).int()
    blocks = BlockTables(geometry.owner, geometry.length, geometry.is_remote, geometry.always_fetched)
    policy = None
    if directions is not None and weighing.per_node < size:
        policy = PolicyTables.of(directions, size, weighing.per_node, device)
    return DecisionTables(blocks, prices, dest, torch.where(geometry.always_fetched, -1, dest), policy)


@dataclass(frozen=True)
class Hop:
    """One transfer of blocks: which ranks can serve which blocks to this one."""

    served: list[Tensor]
    """per rank, int64 ids of the blocks it serves."""
    peers: list[bool]
    """ranks this one asks, and is asked by; not itself."""


def node_hops(geometry: BlockGeometry, rank: int, ranks_per_node: int) -> tuple[Hop, Hop]:
    """Two hops: between ranks of equal index in their nodes, then within the node.

    Rank ``j`` of a node fetches, for all of its node, what the ranks ``j`` of other nodes own, so that a block crosses
    the network once per node.
    """
    size = len(geometry.owned)
    index, node = rank % ranks_per_node, rank // ranks_per_node
    between = Hop(geometry.owned, [p != rank and p % ranks_per_node == index for p in range(size)])
    by_index = [torch.cat(geometry.owned[j::ranks_per_node]).sort().values for j in range(ranks_per_node)]
    within = Hop(
        [by_index[p % ranks_per_node] for p in range(size)],
        [p != rank and p // ranks_per_node == node for p in range(size)],
    )
    return between, within


@dataclass(frozen=True)
class HopTables:
    """What is the same in every call of a hop."""

    pairs: PairTables
    """what this rank can ask for and be asked for."""
    send: list[int]
    """bytes of the request to each rank."""
    receive: list[int]
    """bytes of the request from each rank."""
    source: Tensor
    """int64, for every byte sent its index into the headers of all ranks followed by a flag for each pair."""
    header_at: Tensor
    """[P] int64, where the headers begin in what is received."""
    asked_at: Tensor | None
    """[peers, Hkv * n] int64, where the flag of each pair is in what is received, -1 for pairs not served; None unless
    another hop brings what is asked for here."""


@dataclass(frozen=True)
class WireTables:
    """Tables of one context for one block size and number of KV heads; building them waits for the device, once."""

    geometry: BlockGeometry
    stages: int
    """parts of the remote work"""
    kv_heads: list[slice]
    """of each stage, or more"""
    hops: list[HopTables]
    """one, or the hop between nodes and the one within."""
    number: Tensor
    """[Hkv, n] int64, what its owner calls each pair: ``head * m + index``."""
    number_dtype: torch.dtype
    """in which these travel"""
    own_blocks: Tensor
    """[m] int64, the blocks of this rank."""


def build_wire_tables(geometry: BlockGeometry, n_kv: int, stages: int, ranks_per_node: int | None) -> WireTables:
    """:class:`WireTables` of ``geometry``'s rank."""
    size, rank = len(geometry.owned), geometry.rank
    stage = stage_of(n_kv, geometry.n_blocks, stages, geometry.row.device)
    header = 8 * (stages + TOTALS)
    if ranks_per_node in (None, 1) or ranks_per_node >= size:
        hops = [(Hop(geometry.owned, [p != rank for p in range(size)]), header, False)]
    else:
        between, within = node_hops(geometry, rank, ranks_per_node)
        hops = [(between, 0, False), (within, header, True)]
    count = geometry.owned_count[geometry.owner]
    return WireTables(
        geometry=geometry,
        stages=stages,
        kv_heads=[heads_of_stage(n_kv, stages, number) for number in range(stages)],
        hops=[_hop_tables(*hop, geometry, stage, stages, rank) for hop in hops],
        number=torch.arange(n_kv, device=count.device)[:, None] * count + geometry.local_index,
        number_dtype=number_dtype(geometry, n_kv),
        own_blocks=geometry.owned[rank],
    )


def number_dtype(geometry: BlockGeometry, n_kv: int) -> torch.dtype:
    """Integer dtype in which the (KV head, block) pairs of any one rank can be numbered."""
    return torch.int16 if n_kv * max(ids.numel() for ids in geometry.owned) < 2**15 else torch.int32


def _hop_tables(
    hop: Hop, width: int, relays: bool, geometry: BlockGeometry, stage: Tensor, stages: int, rank: int
) -> HopTables:
    """:class:`HopTables` of one hop, whose headers have ``width`` bytes; ``relays`` if another hop brings what is asked
    for in it; ``stage`` [Hkv, n]."""
    n_kv, n = stage.shape
    device, size = stage.device, len(hop.peers)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    served = [_pairs(ids, stage.flatten(), n_kv, n) for ids in hop.served]
    wants = [ids if peer else empty for ids, peer in zip(served, hop.peers, strict=True)]
    gives = [served[rank] if peer else empty for peer in hop.peers]

    source, header_at, flag_at, asked_at, read = [], [], [], [], 0
    for p in range(size):
        head = torch.arange(width, device=device)
        source += [p * width + head, size * width + wants[p]]
        header_at.append(read)
        flag_at.append(read + width + torch.arange(gives[p].numel(), device=device))
        read += width + gives[p].numel()
        if relays and hop.peers[p]:
            asked_at.append(
                torch.full((n_kv * n,), -1, dtype=torch.int64, device=device).scatter_(0, gives[p], flag_at[p])
            )
    want = _by_dest(wants, torch.cat(wants), stage, stages)
    give = _by_dest(gives, torch.cat(flag_at), stage, stages)
    pairs = torch.cat([want[0], give[0]])
    tokens = geometry.length.long()[pairs % max(1, n)]
    unit = pair_unit(pairs.numel(), int(tokens.sum()))
    return HopTables(
        pairs=PairTables(
            n_want=want[0].numel(),
            pairs=pairs,
            flag_at=torch.cat([want[1], give[1]]),
            weight=tokens + unit,
            bounds=torch.stack([want[2], want[0].numel() + give[2]]),
            unit=unit,
        ),
        send=[width + ids.numel() for ids in wants],
        receive=[width + ids.numel() for ids in gives],
        source=torch.cat(source),
        header_at=to_device(torch.tensor(header_at, dtype=torch.int64), device),
        asked_at=torch.stack(asked_at) if relays else None,
    )


def pair_unit(n_pairs: int, n_tokens: int) -> int:
    """What a pair counts in a running sum of pairs and, below it, their tokens: ``PAIR`` where all of them fit."""
    fits = n_tokens < PAIR and n_pairs < 2**63 // PAIR
    unit = PAIR if fits else 1 << n_tokens.bit_length()
    if n_pairs >= 2**63 // unit:
        raise ValueError(
            f"{n_pairs} (KV head, block) pairs with {n_tokens} tokens in all can move to and from a rank, and a "
            f"running sum of both in 63 bits has room for {2**63 // unit - 1} of so many tokens; use larger blocks, "
            "or share the KV heads among more tensor-parallel ranks"
        )
    return unit


def _pairs(ids: Tensor, stage: Tensor, n_kv: int, n: int) -> Tensor:
    """All pairs of the blocks ``ids``, by stage, head, block."""
    pairs = (torch.arange(n_kv, device=ids.device)[:, None] * n + ids).flatten()
    return pairs[stage[pairs].argsort(stable=True)]


def _by_dest(lists: list[Tensor], flag_at: Tensor, stage: Tensor, stages: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of all ranks and where their flags are, by stage, rank, head, block; and [stages * P + 1] where each
    (stage, rank) begins, and the last ends."""
    pairs, size = torch.cat(lists), len(lists)
    rank = torch.cat([torch.full_like(ids, p) for p, ids in enumerate(lists)])
    dest = stage.flatten()[pairs] * size + rank
    by_dest = dest.argsort(stable=True)
    ends = torch.bincount(dest, minlength=stages * size).cumsum(0)
    return pairs[by_dest], flag_at[by_dest], torch.nn.functional.pad(ends, (1, 0))
