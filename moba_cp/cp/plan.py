"""Who sends what to whom: every rank's decision, told to the owners in one all-to-all of fixed size.

Everybody knows who can serve which block, so a request is a bitmap and needs no lengths. From the bitmaps both sides
list the same pairs in the same order. All of it stays on the device; only the sizes of the messages come to the host,
in one copy that is read when the first transfer starts.

Legend: P ranks, n blocks, Hkv key/value heads, L local tokens, Hq query heads, S = k - 1 chosen blocks per row. A pair
is (KV head, block), numbered ``head * n + block``. A stage is one of the parts in which remote work is done.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .comm import Communicator, HostCopy
from .decide import Decision, stage_of
from .geometry import BlockGeometry


@dataclass(frozen=True)
class Hop:
    """One transfer of blocks: which ranks can serve which blocks to this one."""

    served: list[Tensor]
    """per rank, int64 ids of the blocks it serves."""
    peers: list[bool]
    """ranks this one asks, and is asked by; not itself."""


@dataclass(frozen=True)
class PairLists:
    """Pairs that move in one hop, and how many rows each rank gets; lists run by stage, rank, head, block."""

    want: Tensor
    """int64 pairs received; entries past the counts are meaningless."""
    give: Tensor
    """int64 pairs sent; entries past the counts are meaningless."""
    sizes: Tensor
    """[2, stages, P + 1] int64: rows received from (0) and sent to (1) each rank, and in the last column pairs."""


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
class PairOrder:
    """The pairs that one side of a hop can move, and the order in which a list has those that do.

    Entry 0 stands for none, so that a running sum over the entries has a zero in front.
    """

    pairs: Tensor
    """[1 + m] int64, by stage, rank, head, block."""
    index: Tensor
    """[1 + m] int64, where the flag of each is in the message."""
    weight: Tensor
    """[2, 1 + m] int64: 1 and the tokens of each, 0 in front."""
    bounds: Tensor
    """[stages * P + 1] int64, where each (stage, rank) ends among the entries, with a 0 in front."""


@dataclass(frozen=True)
class HopTables:
    """What is the same in every call of a hop: lists by rank, stage, head, block, and where they stand in a message."""

    want: Tensor
    """int64 pairs that this rank can ask for."""
    want_order: PairOrder
    """what becomes of them."""
    give: Tensor
    """int64 pairs that this rank can be asked for, once for every peer."""
    give_order: PairOrder
    """what becomes of them; ``index`` counts from the first of what is received."""
    send: list[int]
    """bytes of the request to each rank."""
    receive: list[int]
    """bytes of the request from each rank."""
    message: Tensor
    """int64, for every byte sent: its place in the headers [P, width] followed by a byte for each pair in ``want``."""
    headers: Tensor
    """[P, width] int64, places of the headers in what is received."""
    asked: Tensor
    """int64, place of the byte for each pair in ``give``."""


@dataclass(frozen=True)
class WireTables:
    """Tables of one context for one block size and number of KV heads; building them waits for the device, once."""

    stages: int
    """parts of the remote work"""
    hops: list[HopTables]
    """one, or the hop between nodes and the one within."""


def build_wire_tables(
    geometry: BlockGeometry, n_kv: int, stages: int, ranks_per_node: int | None, rank: int
) -> WireTables:
    """:class:`WireTables` of one rank."""
    size = len(geometry.owned)
    stage = stage_of(n_kv, geometry.n_blocks, stages, geometry.row.device)
    header = 8 * (stages + 1)
    if ranks_per_node in (None, 1) or ranks_per_node >= size:
        hops = [(Hop(geometry.owned, [p != rank for p in range(size)]), header)]
    else:
        between, within = node_hops(geometry, rank, ranks_per_node)
        hops = [(between, 0), (within, header)]
    return WireTables(stages, [_hop_tables(hop, geometry, stage, stages, rank, width) for hop, width in hops])


def _hop_tables(hop: Hop, geometry: BlockGeometry, stage: Tensor, stages: int, rank: int, width: int) -> HopTables:
    n_kv, n = stage.shape
    device, size = stage.device, len(hop.peers)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    pairs = [_pairs(ids, stage.flatten(), n_kv, n) for ids in hop.served]
    wants = [ids if peer else empty for ids, peer in zip(pairs, hop.peers, strict=True)]
    gives = [pairs[rank] if peer else empty for peer in hop.peers]

    message, headers, asked, sent, read = [], [], [], 0, 0
    for p in range(size):
        head = torch.arange(width, device=device)
        message += [p * width + head, size * width + sent + torch.arange(wants[p].numel(), device=device)]
        headers.append(read + head)
        asked.append(read + width + torch.arange(gives[p].numel(), device=device))
        sent += wants[p].numel()
        read += width + gives[p].numel()
    want, give, asked = torch.cat(wants), torch.cat(gives), torch.cat(asked)
    return HopTables(
        want=want,
        want_order=_order(wants, torch.arange(want.numel(), device=device), geometry, stage, stages),
        give=give,
        give_order=_order(gives, asked, geometry, stage, stages),
        send=[width + ids.numel() for ids in wants],
        receive=[width + ids.numel() for ids in gives],
        message=torch.cat(message),
        headers=torch.stack(headers),
        asked=asked,
    )


def _order(lists: list[Tensor], index: Tensor, geometry: BlockGeometry, stage: Tensor, stages: int) -> PairOrder:
    """:class:`PairOrder` of the pairs of each rank, whose flags are at ``index``; ``stage`` [Hkv, n]."""
    pairs, size = torch.cat(lists), len(lists)
    rank = torch.cat([torch.full_like(ids, p) for p, ids in enumerate(lists)])
    place = stage.flatten()[pairs] * size + rank
    by_place = place.argsort(stable=True)
    pairs = pairs[by_place]
    tokens = geometry.length.long()[pairs % max(1, geometry.n_blocks)]
    return PairOrder(
        pairs=_behind_zero(pairs),
        index=_behind_zero(index[by_place]),
        weight=_behind_zero(torch.stack([torch.ones_like(tokens), tokens])),
        bounds=_behind_zero(torch.bincount(place, minlength=stages * size).cumsum(0)),
    )


def _behind_zero(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 0))


def ask(
    tables: HopTables, need: Tensor, wire: WireTables, comm: Communicator, header: Tensor
) -> tuple[PairLists, Tensor, Tensor]:
    """Send each peer the bitmap of what is needed from it; a collective call.

    Args:
        need: [Hkv, n] bool; pairs that no peer serves are passed over.
        header: [P, width] uint8, sent along to every rank, peer or not.

    Returns:
        the lists; asked [Hkv, n] bool, what any peer wants from here; and the headers received, [P, width].
    """
    n_kv, n = need.shape
    wanted = need.flatten().to(torch.uint8)[tables.want]
    message = torch.cat([header.flatten(), wanted])[tables.message]
    arrived = comm.all_to_all(message, tables.send, tables.receive, "requests")()
    asked = arrived[tables.asked]
    want, want_sizes = _listed(wanted, tables.want_order, wire.stages)
    give, give_sizes = _listed(arrived, tables.give_order, wire.stages)
    union = torch.zeros(n_kv * n, dtype=torch.uint8, device=need.device).scatter_reduce_(0, tables.give, asked, "amax")
    return (
        PairLists(want, give, torch.stack([want_sizes, give_sizes])),
        union.view(n_kv, n).bool(),
        arrived[tables.headers],
    )


def _pairs(ids: Tensor, stage: Tensor, n_kv: int, n: int) -> Tensor:
    """All pairs of the blocks ``ids``, by stage, head, block."""
    pairs = (torch.arange(n_kv, device=ids.device)[:, None] * n + ids).flatten()
    return pairs[stage[pairs].argsort(stable=True)]


def _listed(flags: Tensor, order: PairOrder, stages: int) -> tuple[Tensor, Tensor]:
    """Flagged pairs by stage, rank, head, block; and rows per (stage, rank), with pairs per stage behind them."""
    if order.pairs.numel() == 1:
        sizes = torch.zeros(stages, (order.bounds.numel() - 1) // stages + 1, dtype=torch.int64, device=flags.device)
        return order.pairs[1:], sizes
    moved = flags[order.index] * order.weight
    sums = moved.cumsum(1)
    # Those that do not move all go to entry 0.
    ordered = torch.empty_like(order.pairs).scatter_(0, sums[0] * moved[0], order.pairs)
    pairs, rows = sums[:, order.bounds].diff().view(2, stages, -1)
    return ordered[1:], torch.cat([rows, pairs.sum(1, keepdim=True)], 1)


@dataclass(frozen=True)
class RowLists:
    """Query rows that go to blocks of other ranks."""

    slots: Tensor
    """int32 indices into the flattened [Hq, L, S] slots whose rows are sent, by stage, owner, head, token; entries past
    the counts are meaningless."""
    place: Tensor
    """[Hkv, n] int32, ``stage * P + owner`` of the blocks that their owners attend to, -1 for others."""
    sizes: Tensor
    """[2, stages, P + 1] int64: rows received from (0) and sent to (1) each rank; the last column is unused."""


@dataclass(frozen=True)
class Plan:
    """Everything that moves for one call on one rank."""

    hops: list[PairLists]
    """blocks: one hop, or the hop between nodes and the one within."""
    rows: RowLists
    numbers: HostCopy
    """sizes of all lists and every rank's cost, on their way to the host."""

    def sizes(self, part: int) -> list:
        """Sizes of a hop, or of the rows (``part = -1``), as nested lists [2][stages][P + 1]."""
        return self.numbers.get()[: len(self.hops) + 1][part].tolist()

    def facts(self) -> tuple[int, int, int, int, int]:
        """Of all ranks: bytes moved. Of this one: needed pairs, candidates elsewhere, bytes, rows of the hottest pair.

        Bytes are those of forward and backward, between requester and owner; headers not counted.
        """
        return tuple(self.numbers.get()[-1].flatten()[:5].tolist())


def negotiate(
    decision: Decision, chosen: Tensor, geometry: BlockGeometry, wire: WireTables, comm: Communicator
) -> Plan:
    """Tell the owners; a collective call that does not wait for the device.

    Args:
        decision: this rank's, see :func:`moba_cp.cp.decide.decide`.
        chosen: [L, Hq, S] int32.
    """
    size, device, stages, n_kv = comm.size, chosen.device, wire.stages, decision.fetch.shape[0]
    if decision.with_rows:
        slots, row_counts = ops.list_rows(chosen, decision.place, decision.fetch, stages * size)
        row_counts = row_counts.view(stages, size)
    else:
        slots = torch.empty(0, dtype=torch.int32, device=device)
        row_counts = torch.zeros(stages, size, dtype=torch.int64, device=device)
    total = decision.cost.sum().expand(size, 1)
    header = torch.cat([row_counts.T, total], 1).contiguous().view(torch.uint8).view(size, -1)

    inner, asked, headers = ask(wire.hops[-1], decision.fetch, wire, comm, header)
    hops = [inner]
    if len(wire.hops) == 2:
        # For all of the node: what its ranks want from here that lies on other nodes, and what this rank wants itself.
        fetch = (asked | decision.fetch) & geometry.elsewhere
        outer, _, _ = ask(wire.hops[0], fetch, wire, comm, header[:, :0])
        hops = [outer, inner]

    received = headers.contiguous().view(torch.int64).view(size, stages + 1)
    pad = torch.zeros(stages, 1, dtype=torch.int64, device=device)
    row_sizes = torch.stack([torch.cat([received[:, :-1].T, pad], 1), torch.cat([row_counts, pad], 1)])
    facts = torch.zeros_like(row_sizes)
    remote = geometry.n_candidates * n_kv
    # Every rank's header also went to itself, so that the sum is the same everywhere.
    mine = decision.needed, remote, decision.cost.sum(), decision.hottest
    facts.view(-1)[:5] = torch.stack([received[:, -1].sum(), *mine])
    numbers = HostCopy(torch.stack([*(h.sizes for h in hops), row_sizes, facts]))
    place = torch.where(decision.fetch, -1, decision.place)
    return Plan(hops, RowLists(slots, place, row_sizes), numbers)
