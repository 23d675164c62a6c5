"""Planning the exchange between ranks, on integers, in plain PyTorch: counting, deciding, listing, requesting.

First rows are counted: how many selected each block, and how many would travel to its owner. By these counts up to
three candidates are compared per owner: everything that is needed is fetched, a mix, or only what must be
(:mod:`moba_cp.cp.exchange` has the rule). Then each rank tells the owners.

A request is bytes: to each rank a header of int64 (how many rows it gets in each stage, then the bytes of this rank's
whole decision, and how many rows it sends in all), then a byte for each pair that it serves, 1 if that is wanted. A
pair is (KV head, block), numbered ``head * n + block``.

Legend: N rows (tokens), Hq query heads, Hkv key/value heads, G = Hq // Hkv, S selected blocks per row, n blocks,
P ranks (owners), C candidates. A *slot* is one selected block of one row and head. A *destination* (``dest``) is where
a row goes that wants a block: one number per owner and stage (``stage * owners + owner``), -1 for blocks that are here.
A row goes to a destination once, for its first slot that has it. *Sizes* are [2, stages, P + 1] int64: rows received
from (0) and sent to (1) each rank, and in the last column pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def count_choices(block_indices: Tensor, open_dest: Tensor, unit: int) -> Tensor:
    """How many slots chose each block, and the shares of rows that would go to it.

    Args:
        block_indices: [N, Hq, S] int32 block ids, -1 for none.
        open_dest: [Hkv, n] int32 destinations; -1 also where rows are not to be counted.
        unit: a row's share is ``unit`` over the number of its slots with the same destination; 0 for no shares.

    Returns:
        [1 or 2, R, Hkv, n] int64, to be summed over R: numbers of slots, and if ``unit`` is not 0 the shares, which are
        0 where ``open_dest`` is -1.
    """
    counts = torch.zeros(2 if unit else 1, 1, *open_dest.shape, dtype=torch.int64, device=block_indices.device)
    for head, block, dest in _by_head(block_indices, open_dest):
        at = block.clamp(min=0).flatten()
        counts[0, 0, head].scatter_add_(0, at, (block >= 0).long().flatten())
        if unit:
            together = torch.zeros_like(dest)
            for slot in range(dest.shape[-1]):
                together += (dest == dest[..., slot : slot + 1]) & (dest >= 0)
            part = unit // together.clamp(min=1) * (dest >= 0)
            counts[1, 0, head].scatter_add_(0, at, part.flatten())
    return counts


def count_rows(block_indices: Tensor, dest: Tensor, fetched: Tensor, n_candidates: int, n_owners: int) -> Tensor:
    """Rows sent to each owner, for several candidates of what is fetched instead.

    Args:
        block_indices: [N, Hq, S] int32.
        dest: [Hkv, n] int32.
        fetched: [Hkv, n] int32, bit ``c`` says that candidate ``c`` fetches the block.

    Returns:
        [R, candidates, owners] int32, to be summed over R.
    """
    rows = torch.zeros(1, n_candidates, n_owners, dtype=torch.int32, device=block_indices.device)
    for head, block, at in _by_head(block_indices, dest):
        for candidate, counts in enumerate(rows[0]):
            fetch = (fetched[head] >> candidate & 1).bool()
            first = _first(torch.where((block >= 0) & ~fetch[block.clamp(min=0)], at, -1))
            counts.scatter_add_(0, at.clamp(min=0).flatten() % n_owners, first.int().flatten())
    return rows


def list_rows(block_indices: Tensor, dest: Tensor, n_dests: int) -> tuple[Tensor, Tensor]:
    """The slots whose rows are sent; ``dest`` [Hkv, n] int32 is -1 also for blocks that are fetched.

    Returns:
        int32 indices into the flattened [Hq, N, S] slots, int64 where there are 2^31 or more, by destination, head,
        token, slot, as many as there are slots at all: those past the last end mean nothing; and [dests] int32, where
        each destination's part of the list ends.
    """
    dests = [torch.where(_first(at), at, n_dests) for _, _, at in _by_head(block_indices, dest)]
    flat = torch.cat(dests, 1).transpose(0, 1).flatten()
    counts = torch.zeros(n_dests + 1, dtype=torch.int32, device=block_indices.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    dtype = torch.int32 if flat.numel() < 2**31 else torch.int64
    return flat.argsort(stable=True).to(dtype), counts[:-1].cumsum(0, dtype=torch.int32)


def _by_head(block_indices: Tensor, dest: Tensor):
    """(KV head, blocks, destinations) of its group's slots, [N, G, S] int64 each."""
    group = block_indices.shape[1] // dest.shape[0]
    for head, table in enumerate(dest.long()):
        block = block_indices[:, head * group : (head + 1) * group].long()
        yield head, block, torch.where(block >= 0, table[block.clamp(min=0)], -1)


def _first(at: Tensor) -> Tensor:
    """[N, G, S] bool, slots whose row is sent: the first of each destination; ``at`` [N, G, S], -1 for none."""
    first = at >= 0
    for slot in range(1, at.shape[-1]):
        first[..., slot] &= ~(at[..., :slot] == at[..., slot : slot + 1]).any(-1)
    return first


def row_ids(block_indices: Tensor, slots: Tensor, dest: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    """The blocks that each row wants where it is sent: those of all its slots with this destination.

    Args:
        block_indices: [N, H, S] int32 block ids, -1 for none.
        slots: [M] int32, indices into [H, N, S] of selected blocks.
        dest: [Hkv, n] int32, where a row goes that wants a block, -1 for nowhere.
        number: [Hkv, n], what a (KV head, block) is called there.
        dtype: of the result.

    Returns:
        [M, S] numbers, -1 for slots that want something else.
    """
    n_rows, n_heads, n_slots = block_indices.shape
    slot = slots.long()
    row = slot // n_slots
    token, head = row % n_rows, row // n_rows
    block = block_indices[token, head].long()
    at = (head // (n_heads // dest.shape[0]))[:, None], block.clamp(min=0)
    goes = dest[at]
    wanted = (block >= 0) & (goes == goes.gather(1, (slot % n_slots)[:, None]))
    return torch.where(wanted, number[at], -1).to(dtype)


CANDIDATES = {"auto": 3, "kv": 1, "query": 1}
"""Candidates by exchange mode: everything, mix and the least; everything; the least."""


ALL_FOR_LESS = 0.985
"""Everything is fetched where that costs hardly more than the cheapest way: one kind of transfer takes less time than
two. With this factor on its price a decision stays within 2 % of the lowest price, with weights of 1 of the least
bytes."""


class BlockTables(NamedTuple):
    """Blocks as one rank sees them; the same in every call."""

    owner: Tensor
    """[n] int64, rank that owns each block."""
    length: Tensor
    """[n] int32, tokens of each block."""
    elsewhere: Tensor
    """[n] bool, blocks of other ranks."""
    always: Tensor
    """[n] bool, blocks of other ranks that are fetched whatever the counts say."""


class Prices(NamedTuple):
    """What is paid per owner; the same in every call. float64 has room for any number of bytes: with weights of 1
    comparisons are exact."""

    kv_token: int
    """bytes of a token of a fetched (KV head, block)"""
    row_bytes: int
    """bytes of a row"""
    token: Tensor
    """[P] float64, price of a token that comes for this rank alone."""
    row: Tensor
    """[P] float64, price of a row."""
    unit: int
    """the share of a row that goes to one block, as it was counted"""
    sharing: int
    """m, ranks that can share a token which comes from far away; 1 where that makes no difference"""
    far: Tensor
    """[P] bool, owners whose tokens are shared: with a share p of their blocks needed here, ``1 + (m - 1) p`` ranks pay
    for them."""
    far_candidates: Tensor
    """[] int64, at least 1: (KV head, block) pairs of far owners that can be needed here."""
    all_for_less: float = ALL_FOR_LESS
    """factor of the price of fetching everything"""


class Weighed(NamedTuple):
    """The candidates and what they move."""

    fetched: Tensor
    """[Hkv, n] int32, bit ``c`` says that candidate ``c`` fetches the block."""
    stats: Tensor
    """[3] int64: pairs of other ranks that are needed in one way or the other; most rows that chose one pair, wherever
    it lies; needed pairs of far owners, 0 where ``sharing`` is 1."""
    tokens: Tensor
    """[C, P] int64, tokens of all KV heads that come from each owner."""


def weigh_blocks(counts: Tensor, tables: BlockTables, prices: Prices, mode: str) -> Weighed:
    """The candidates of exchange ``mode``, by the ``counts`` of :func:`count_choices`."""
    sums = counts.sum(1)
    everything = (sums[0] > 0) & tables.elsewhere | tables.always
    stats = torch.stack([everything.sum(), sums[0].amax() if sums[0].numel() else sums.sum(), sums.new_zeros(())])
    if prices.sharing > 1:
        stats[2] = (everything & prices.far[tables.owner]).sum()
    always = tables.always.expand_as(everything)
    candidates = [always if mode == "query" else everything]
    if mode == "auto":
        price = token_prices(prices, stats)[tables.owner] * (tables.length.double() * prices.unit)
        worth = sums[1] * prices.row[tables.owner] >= price
        candidates += [(everything & worth) | always, always]
    candidates = torch.stack(candidates)
    tokens = (candidates * tables.length.long()).sum(1)
    zero = tokens.new_zeros(len(candidates), prices.token.numel())
    bit = 1 << torch.arange(len(candidates), dtype=torch.int32, device=counts.device)
    fetched = (candidates * bit[:, None, None]).sum(0, dtype=torch.int32)
    return Weighed(fetched, stats, zero.scatter_add_(1, tables.owner.expand_as(tokens), tokens))


def pick_cheapest(
    weighed: Weighed, rows: Tensor | None, dest: Tensor, tables: BlockTables, prices: Prices
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidate with the lowest price for each owner, the first of equal ones; with three of them the price of the
    first, everything, counts ``prices.all_for_less``.

    Args:
        rows: [R, C, P] int32, to be summed over R: rows sent for each candidate; None if there are none.
        dest: [Hkv, n] int32, where a row goes that wants a block, -1 for blocks that are here.

    Returns:
        fetch [Hkv, n] bool; ``dest`` with -1 also for what is fetched; and [P + 1] int64, bytes by owner, then in all.
    """
    tokens = weighed.tokens
    rows = torch.zeros_like(tokens) if rows is None else rows.sum(0)
    price = tokens * token_prices(prices, weighed.stats) + rows * prices.row
    if len(price) > 1:
        price[0] *= prices.all_for_less
    best = price.argmin(0)
    fetch = (weighed.fetched >> best[tables.owner] & 1).bool()
    cost = (tokens * prices.kv_token + rows * prices.row_bytes).gather(0, best[None])[0]
    return fetch, torch.where(fetch, -1, dest), torch.cat([cost, cost.sum(0, keepdim=True)])


def token_prices(prices: Prices, stats: Tensor) -> Tensor:
    """[P] float64, price of a token by owner, where ranks share what is needed."""
    if prices.sharing == 1:
        return prices.token
    needed = (stats[2] / prices.far_candidates.double()).clamp(max=1)
    # Not in the default dtype, which a model's builder may have set to bfloat16.
    sharers = 1 + (prices.sharing - 1) * needed
    return torch.where(prices.far, prices.token / sharers, prices.token)


TOTALS = 2
"""Numbers in a header behind those of the stages."""

PAIR = 1 << 40
"""A running sum counts pairs in units of this, or of a smaller one where there are many, and their tokens below."""


class PairTables(NamedTuple):
    """The pairs that can move in one hop: m entries, first those that this rank can ask for, then those that it can be
    asked for, once for every peer; each side by stage, rank, head, block."""

    n_want: int
    """entries of the first side"""
    pairs: Tensor
    """[m] int64."""
    flag_at: Tensor
    """[m] int64, where it says whether the pair moves: the pair itself, or an index into what is received."""
    weight: Tensor
    """[m] int64, ``unit`` plus the tokens of the pair."""
    bounds: Tensor
    """[2, stages * P + 1] int64, entries before each (stage, rank) of a side, and before the side's end."""
    unit: int = PAIR
    """what one pair counts in the running sum"""


def write_request(need: Tensor, source: Tensor, ends: Tensor | None = None, costs: Tensor | None = None) -> Tensor:
    """The request to all ranks, uint8.

    Args:
        need: [Hkv, n] bool.
        source: int64, for every byte its index into the headers of all ranks followed by the flags [Hkv * n].
        ends: [stages * P] int32, where the rows of each (stage, rank) end in the list of rows; None for no headers.
        costs: [P + 1] int64, of which the last is sent.
    """
    flags = need.flatten().to(torch.uint8)
    if ends is None:
        return flags[source]
    size = costs.numel() - 1
    totals = [x.long().expand(size, 1) for x in (costs[-1:], ends[-1:])]
    header = torch.cat([_lengths(ends).view(-1, size).T, *totals], 1)
    return torch.cat([header.contiguous().view(torch.uint8).flatten(), flags])[source]


def relay_request(fetch: Tensor, arrived: Tensor, asked_at: Tensor) -> Tensor:
    """[Hkv, n] bool: what this rank fetches, for itself or for its node; blocks that lie here may be among it.

    Args:
        fetch: [Hkv, n] bool, what it needs itself.
        arrived: uint8, the requests of its node.
        asked_at: [peers, Hkv * n] int64, where the flag of each pair is in these, -1 for pairs not served.
    """
    asked = (asked_at >= 0) & (arrived[asked_at.clamp(min=0)] != 0)
    return fetch | asked.any(0).view(fetch.shape)


class Pairs(NamedTuple):
    """Pairs that move to or from a rank, by stage, rank, head, block; entries past the counts mean nothing."""

    ids: Tensor
    """int64, the pairs."""
    before: Tensor
    """int64, tokens of those before each, over all stages."""


def list_pairs(need: Tensor, arrived: Tensor, tables: PairTables, sizes: Tensor) -> tuple[Pairs, Pairs]:
    """The pairs that move.

    Args:
        need: [Hkv, n] bool, what this rank asked for.
        arrived: uint8, the requests received.
        sizes: [2, stages, P + 1] int64, written.

    Returns:
        the pairs received, and those sent.
    """
    n_want = tables.n_want
    flags = torch.cat([need.flatten()[tables.flag_at[:n_want]], arrived[tables.flag_at[n_want:]] != 0])
    moved = flags * tables.weight
    before = torch.nn.functional.pad(moved.cumsum(0), (1, 0))
    parts = before[tables.bounds].diff().view(2, sizes.shape[1], -1)
    sizes[..., :-1] = parts % tables.unit
    sizes[..., -1] = (parts // tables.unit).sum(-1)
    tokens = before % tables.unit
    sides = []
    for side in (slice(0, n_want), slice(n_want, None)):
        order = flags[side].logical_not().byte().argsort(stable=True)
        sides.append(Pairs(tables.pairs[side][order], (tokens[:-1] - tokens[side.start])[side][order]))
    return tuple(sides)


def sum_up(
    arrived: Tensor,
    header_at: Tensor,
    ends: Tensor,
    costs: Tensor,
    stats: Tensor,
    candidates: Tensor,
    n_kv: int,
    out: Tensor,
) -> None:
    """What the host has to know besides the sizes of lists of pairs.

    Args:
        arrived: uint8, the requests received, one of every rank.
        header_at: [P] int64, where in it each header begins.
        ends, costs: as in :func:`write_request`.
        stats: int64, needed pairs and rows of the hottest one first, see :class:`Weighed`.
        candidates: [] int64, blocks of other ranks that could have been needed, by each of the ``n_kv`` KV heads.
        out: [2, 2, stages, P + 1] int64, written: sizes of the lists of rows, with 0 in the last column; then six
            numbers: the bytes of all ranks' decisions, needed pairs, pairs that could have been, the bytes of this
            rank's decision, rows of the hottest pair, rows that all ranks send.
    """
    size, stages = header_at.numel(), out.shape[2]
    byte = torch.arange(8 * (stages + TOTALS), device=arrived.device)
    received = arrived[header_at[:, None] + byte].view(torch.int64)
    out.zero_()
    out[0, 0, :, :-1] = received[:, :stages].T
    out[0, 1, :, :-1] = _lengths(ends).view(stages, size)
    # Every rank's header also went to itself, so that these sums are the same everywhere.
    cost, rows = received[:, stages:].sum(0)
    out[1].view(-1)[:6] = torch.stack([cost, stats[0], candidates * n_kv, costs[-1], stats[1], rows])


def _lengths(ends: Tensor) -> Tensor:
    """[dests] int64, from where each destination's part of a list ends."""
    return torch.nn.functional.pad(ends, (1, 0)).diff().long()
