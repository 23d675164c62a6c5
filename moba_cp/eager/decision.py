"""Choosing between blocks and rows by what was counted, for the exchange between ranks, in plain PyTorch.

Up to three candidates are compared per owner: everything that is needed is fetched, a mix, or only what must be. See
:mod:`moba_cp.cp.exchange.decide` for the rule, and :mod:`moba_cp.eager.choices` for the counts.

Legend: P ranks (owners), Hkv key/value heads, n blocks, C candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

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
    facts: Tensor
    """[3] int64: pairs of other ranks that are needed in one way or the other; most rows that chose one pair, wherever
    it lies; needed pairs of far owners, 0 where ``sharing`` is 1."""
    tokens: Tensor
    """[C, P] int64, tokens of all KV heads that come from each owner."""


def weigh_blocks(counts: Tensor, tables: BlockTables, prices: Prices, mode: str) -> Weighed:
    """The candidates of exchange ``mode``, by the ``counts`` of :func:`moba_cp.eager.choices.count_choices`."""
    sums = counts.sum(1)
    everything = (sums[0] > 0) & tables.elsewhere | tables.always
    facts = torch.stack([everything.sum(), sums[0].amax() if sums[0].numel() else sums.sum(), sums.new_zeros(())])
    if prices.sharing > 1:
        facts[2] = (everything & prices.far[tables.owner]).sum()
    always = tables.always.expand_as(everything)
    candidates = [always if mode == "query" else everything]
    if mode == "auto":
        price = _token_prices(prices, facts)[tables.owner] * (tables.length.double() * prices.unit)
        worth = sums[1] * prices.row[tables.owner] >= price
        candidates += [(everything & worth) | always, always]
    candidates = torch.stack(candidates)
    tokens = (candidates * tables.length.long()).sum(1)
    zero = tokens.new_zeros(len(candidates), prices.token.numel())
    bit = 1 << torch.arange(len(candidates), dtype=torch.int32, device=counts.device)
    fetched = (candidates * bit[:, None, None]).sum(0, dtype=torch.int32)
    return Weighed(fetched, facts, zero.scatter_add_(1, tables.owner.expand_as(tokens), tokens))


def pick_cheapest(
    weighed: Weighed, rows: Tensor | None, place: Tensor, tables: BlockTables, prices: Prices
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidate with the lowest price for each owner, the first of equal ones; with three of them the price of the
    first, everything, counts ``prices.all_for_less``.

    Args:
        rows: [R, C, P] int32, to be summed over R: rows sent for each candidate; None if there are none.
        place: [Hkv, n] int32, where a row goes that wants a block, -1 for blocks that are here.

    Returns:
        fetch [Hkv, n] bool; ``place`` with -1 also for what is fetched; and [P + 1] int64, bytes by owner, then in all.
    """
    tokens = weighed.tokens
    rows = torch.zeros_like(tokens) if rows is None else rows.sum(0)
    price = tokens * _token_prices(prices, weighed.facts) + rows * prices.row
    if len(price) > 1:
        price[0] *= prices.all_for_less
    best = price.argmin(0)
    fetch = (weighed.fetched >> best[tables.owner] & 1).bool()
    cost = (tokens * prices.kv_token + rows * prices.row_bytes).gather(0, best[None])[0]
    return fetch, torch.where(fetch, -1, place), torch.cat([cost, cost.sum(0, keepdim=True)])


def _token_prices(prices: Prices, facts: Tensor) -> Tensor:
    """[P] float64, price of a token by owner, where ranks share what is needed."""
    if prices.sharing == 1:
        return prices.token
    needed = (facts[2] / prices.far_candidates.double()).clamp(max=1)
    # Not in the default dtype, which a model's builder may have set to bfloat16.
    sharers = 1 + (prices.sharing - 1) * needed
    return torch.where(prices.far, prices.token / sharers, prices.token)
