"""What moves in a call: a block comes here, or rows go where it is, whichever is cheaper; and telling the owners.

Each rank decides for itself and tells the owners in one all-to-all of fixed size: all ranks know which blocks each of
them can serve, so a request is one flag for each of these and needs no lengths. From the flags both sides list the same
pairs in the same order. All of it stays on the device; only the sizes of the messages come to the host, in one copy
that is read when the first transfer starts.

Legend: L local tokens, P ranks, n blocks, Hq query heads, Hkv key/value heads, S = k - 1 selected blocks per row. A row
is a (token, query head) pair. A pair is (KV head, block), numbered ``head * n + block``. A stage is one of the parts in
which remote work is done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...eager.exchange import CANDIDATES, Pairs
from ..calls import Where
from ..comm import Communicator, HostCopy
from .policy import factor_of, offers, under
from .tables import ROW_SHARE, DecisionTables, HopTables, WireTables


@dataclass(frozen=True)
class Decision:
    """What one rank asks of the others."""

    fetch: Tensor
    """[Hkv, n] bool, blocks whose K and V come here. Rows go to the owners of the other blocks that they selected."""
    dest: Tensor
    """[Hkv, n] int32, ``stage * P + owner`` of the blocks to which rows go, -1 for those that are here or come here."""
    stats: Tensor
    """int64, see :class:`moba_cp.eager.exchange.Weighed`."""
    costs: Tensor
    """[P + 1] int64, ``cost``, and the sum of it."""

    @property
    def needed(self) -> Tensor:
        """[] int64, (KV head, block) pairs of other ranks that are needed here in one way or the other."""
        return self.stats[0]

    @property
    def cost(self) -> Tensor:
        """[P] int64, bytes between this rank and each owner, forward and backward, at this decision."""
        return self.costs[:-1]


def decide(
    block_indices: Tensor,
    tables: DecisionTables,
    mode: str,
    ops,
    of_all_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Decision:
    """Choose between blocks and rows.

    Per owner, the cheapest of: fetch all, send all rows, and a mix in which a block is fetched if its tokens cost less
    than its share of the rows that would go instead (a row that wants several blocks of one owner is sent once, and
    counts in each of them by a part). Blocks that local tokens lie in are always fetched. A block that comes from
    another node counts by this rank's part in it: with ``m`` ranks on the node and a share ``p`` of the blocks of other
    nodes needed here, it serves ``1 + (m - 1) p`` ranks if the others select as many and independently.

    Args:
        block_indices: [L, Hq, S] int32 block ids, -1 for none.
        mode: ``auto``, ``kv`` or ``query``.
        ops: the backend that serves these, see :func:`moba_cp.ops.integer_backend`.
        of_all_ranks: gathers a tensor of every rank, [P, ...]: then ranks of several nodes decide together, see
            :mod:`.policy`; otherwise each by itself.
    """
    size, prices = tables.prices.token.numel(), tables.prices
    counts = ops.count_choices(block_indices, tables.open_dest, ROW_SHARE if mode == "auto" else 0)
    weighed = ops.weigh_blocks(counts, tables.blocks, tables.prices, mode)
    rows = None
    if mode != "kv":
        rows = ops.count_rows(block_indices, tables.dest, weighed.fetched, CANDIDATES[mode], size)
    if of_all_ranks is not None and tables.policy is not None and mode == "auto":
        prices = under(prices, factor_of(of_all_ranks(offers(weighed, rows, prices)), tables.policy))
    fetch, dest, costs = ops.pick_cheapest(weighed, rows, tables.dest, tables.blocks, prices)
    return Decision(fetch, dest, weighed.stats, costs)


@dataclass(frozen=True)
class PairLists:
    """Pairs that move in one hop. Their sizes are [2, stages, P + 1]: rows received from (0) and sent to (1) each rank,
    and in the last column pairs."""

    want: Pairs
    """pairs received"""
    give: Pairs
    """pairs sent"""


@dataclass(frozen=True)
class RowLists:
    """Query rows that go to blocks of other ranks. Their sizes are like those of pairs; the last column is unused."""

    slots: Tensor
    """int32 or int64 indices into the flattened [Hq, L, S] slots whose rows are sent, by stage, owner, head, token;
    entries past the counts are meaningless."""
    dest: Tensor
    """[Hkv, n] int32, ``stage * P + owner`` of the blocks that their owners attend to, -1 for others."""


class PlanStats(NamedTuple):
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
    """local rows of the pair that most of them selected"""
    total_rows: int
    """that all ranks send"""


class Sizes(NamedTuple):
    """What the host has to know of a plan; sizes are nested lists [2][stages][P + 1]."""

    hops: list[list]
    """of each hop's lists of pairs"""
    rows: list
    stats: PlanStats

    @staticmethod
    def of(numbers: Tensor) -> "Sizes":
        """Of the host's copy of :attr:`Plan.numbers`."""
        *hops, rows = numbers[:-1].tolist()
        return Sizes(hops, rows, PlanStats(*numbers[-1].flatten()[: len(PlanStats._fields)].tolist()))


@dataclass(frozen=True)
class Plan:
    """Everything that moves for one call on one rank."""

    fetch: Tensor
    """[Hkv, n] bool, what this rank itself asked for."""
    hops: list[PairLists]
    """blocks: one hop, or the hop between nodes and the one within."""
    rows: RowLists
    numbers: HostCopy
    """sizes of all lists and what :func:`moba_cp.eager.exchange.sum_up` found, on their way to the host."""


def make_plan(
    block_indices: Tensor,
    decision_tables: DecisionTables,
    wire: WireTables,
    mode: str,
    ops,
    comm: Communicator,
    where: Where,
) -> Plan:
    """Decide, and tell the owners; a collective call that does not wait for the device. Arguments as of
    :func:`decide`."""
    decision = decide(
        block_indices, decision_tables, mode, ops, lambda x: comm.all_gather_async(x, "requests", where, x.nbytes)()
    )
    size, device, stages = comm.size, block_indices.device, wire.stages
    if mode != "kv":
        slots, ends = ops.list_rows(block_indices, decision.dest, stages * size)
    else:
        slots = torch.empty(0, dtype=torch.int32, device=device)
        ends = torch.zeros(stages * size, dtype=torch.int32, device=device)
    n_hops = len(wire.hops)
    numbers = torch.empty(n_hops + 2, 2, stages, size + 1, dtype=torch.int64, device=device)

    def ask(tables: HopTables, request: Tensor) -> Tensor:
        """The requests received, uint8."""
        return comm.all_to_all(request, tables.send, tables.receive, "requests", where)()

    def lists(tables: HopTables, need: Tensor, arrived: Tensor, sizes: Tensor) -> PairLists:
        return PairLists(*ops.list_pairs(need, arrived, tables.pairs, sizes))

    inner = wire.hops[-1]
    arrived = ask(inner, ops.write_request(decision.fetch, inner.source, ends, decision.costs))
    hops = [lists(inner, decision.fetch, arrived, numbers[n_hops - 1])]
    if n_hops == 2:
        # For all of the node: what its ranks want from here that lies on other nodes, and what this rank wants itself.
        outer = wire.hops[0]
        need = ops.relay_request(decision.fetch, arrived, inner.asked_at)
        hops.insert(0, lists(outer, need, ask(outer, ops.write_request(need, outer.source)), numbers[0]))
    candidates, n_kv = wire.geometry.n_remote_candidates, decision.fetch.shape[0]
    ops.sum_up(arrived, inner.header_at, ends, decision.costs, decision.stats, candidates, n_kv, numbers[n_hops:])
    return Plan(decision.fetch, hops, RowLists(slots, decision.dest), HostCopy(numbers))
