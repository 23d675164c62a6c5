"""Who sends what to whom: every rank's decision, told to the owners in one all-to-all of fixed size.

Everybody knows who can serve which block, so a request is a flag for each and needs no lengths. From the flags both
sides list the same pairs in the same order. All of it stays on the device; only the sizes of the messages come to the
host, in one copy that is read when the first transfer starts.

Legend: P ranks, n blocks, Hkv key/value heads, L local tokens, Hq query heads, S = k - 1 chosen blocks per row. A pair
is (KV head, block), numbered ``head * n + block``. A stage is one of the parts in which remote work is done.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...eager.exchange import Pairs
from ...ops import integer_backend
from ..comm import Communicator, HostCopy
from ..geometry import BlockGeometry
from .decide import Decision
from .tables import HopTables, WireTables


@dataclass(frozen=True)
class PairLists:
    """Pairs that move in one hop, and how many rows each rank gets."""

    want: Pairs
    """pairs received"""
    give: Pairs
    """pairs sent"""
    sizes: Tensor
    """[2, stages, P + 1] int64: rows received from (0) and sent to (1) each rank, and in the last column pairs."""


@dataclass(frozen=True)
class RowLists:
    """Query rows that go to blocks of other ranks."""

    slots: Tensor
    """int32 or int64 indices into the flattened [Hq, L, S] slots whose rows are sent, by stage, owner, head, token;
    entries past the counts are meaningless."""
    place: Tensor
    """[Hkv, n] int32, ``stage * P + owner`` of the blocks that their owners attend to, -1 for others."""
    sizes: Tensor
    """[2, stages, P + 1] int64: rows received from (0) and sent to (1) each rank; the last column is unused."""


class Facts(NamedTuple):
    """Numbers of a plan. Bytes are those of forward and backward, between requester and owner, headers not counted."""

    total_bytes: int
    """of all ranks' decisions"""
    needed: int
    """pairs of other ranks that this rank needs in one way or the other"""
    candidates: int
    """pairs of other ranks that it could have needed"""
    bytes: int
    """of this rank's decision"""
    hottest: int
    """local rows of the pair that most of them chose"""
    total_rows: int
    """that all ranks send"""


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

    def facts(self) -> Facts:
        """What :func:`moba_cp.eager.exchange.sum_up` found."""
        return Facts(*self.numbers.get()[-1].flatten()[: len(Facts._fields)].tolist())


def negotiate(
    decision: Decision, chosen: Tensor, geometry: BlockGeometry, wire: WireTables, comm: Communicator
) -> Plan:
    """Tell the owners; a collective call that does not wait for the device.

    Args:
        decision: this rank's, see :func:`moba_cp.cp.exchange.decide.decide`.
        chosen: [L, Hq, S] int32.
    """
    size, device, stages = comm.size, chosen.device, wire.stages
    if decision.with_rows:
        slots, ends = integer_backend(chosen).list_rows(chosen, decision.place, stages * size)
    else:
        slots = torch.empty(0, dtype=torch.int32, device=device)
        ends = torch.zeros(stages * size, dtype=torch.int32, device=device)
    n_hops = len(wire.hops)
    numbers = torch.empty(n_hops + 2, 2, stages, size + 1, dtype=torch.int64, device=device)

    inner = wire.hops[-1]
    request = integer_backend(decision.fetch).write_request(decision.fetch, inner.source, ends, decision.costs)
    arrived = _ask(inner, request, comm)
    hops = [_lists(inner, decision.fetch, arrived, numbers[n_hops - 1])]
    if n_hops == 2:
        # For all of the node: what its ranks want from here that lies on other nodes, and what this rank wants itself.
        outer = wire.hops[0]
        need = integer_backend(decision.fetch).relay_request(decision.fetch, arrived, inner.asked_at)
        from_nodes = _ask(outer, integer_backend(need).write_request(need, outer.source), comm)
        hops.insert(0, _lists(outer, need, from_nodes, numbers[0]))
    facts, candidates, n_kv = decision.facts, geometry.n_candidates, decision.fetch.shape[0]
    integer_backend(arrived).sum_up(
        arrived, inner.header_at, ends, decision.costs, facts, candidates, n_kv, numbers[n_hops:]
    )
    return Plan(hops, RowLists(slots, decision.place, numbers[n_hops]), HostCopy(numbers))


def _ask(tables: HopTables, request: Tensor, comm: Communicator) -> Tensor:
    """The requests received, uint8; a collective call."""
    return comm.all_to_all(request, tables.send, tables.receive, "requests")()


def _lists(tables: HopTables, need: Tensor, arrived: Tensor, sizes: Tensor) -> PairLists:
    return PairLists(*integer_backend(need).list_pairs(need, arrived, tables.pairs, sizes), sizes)
