"""Choosing between blocks and rows by the counts, for the exchange between ranks, without a device sync.

Every function has the name, and to the last bit the result, of its twin in :mod:`moba_cp.eager.exchange`: prices are
compared in float64, in the same order of operations, none of them fused.

Legend: P ranks (owners), Hkv key/value heads, n blocks, C candidates, R copies of counters. A program reads BLOCK of
the Hkv * n (KV head, block) pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cdiv, check_limit, launch_options, on_device

BLOCK = 128
# Owners that a program sums tokens for at a time.
OWNERS = 16


@triton.jit
def _needed(
    counts, owners, elsewhere, always, n_pairs, n_blocks, UNIT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a program's pairs: number, mask, block, owner, slots that selected it, share, and whether it is
    needed."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < n_pairs  # [BLOCK]
    block = o % n_blocks  # [BLOCK]
    p_counts = counts + tl.arange(0, R)[:, None] * n_pairs + o[None, :]  # [R, BLOCK]
    n_slots = tl.sum(tl.load(p_counts, mask=m[None, :], other=0), 0)
    share = n_slots  # [BLOCK]
    if UNIT > 0:
        share = tl.sum(tl.load(p_counts + R * n_pairs, mask=m[None, :], other=0), 0)
    owner = tl.load(owners + block, mask=m, other=0).to(tl.int32)  # [BLOCK]
    is_elsewhere = tl.load(elsewhere + block, mask=m, other=0) != 0  # [BLOCK]
    is_needed = (n_slots > 0) & is_elsewhere | (tl.load(always + block, mask=m, other=0) != 0)  # [BLOCK]
    return o, m, block, owner, n_slots, share, is_needed


@triton.jit
def _token_price(token, far, stats, far_candidates, owner, m, SHARING: tl.constexpr):
    """float64 price of a token by owner."""
    price = tl.load(token + owner, mask=m, other=0.0)  # [BLOCK]
    if SHARING > 1:
        needed = tl.load(stats + 2).to(tl.float64) / tl.load(far_candidates).to(tl.float64)
        sharers = 1 + (SHARING - 1) * tl.minimum(needed, 1.0)
        price = tl.where(tl.load(far + owner, mask=m, other=0) != 0, price / sharers, price)
    return price


@triton.jit(do_not_specialize=["n_pairs", "n_blocks"])
def _far_kernel(
    counts, owners, elsewhere, always, far, stats, n_pairs, n_blocks,
    UNIT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, m, _, owner, _, _, is_needed = _needed(counts, owners, elsewhere, always, n_pairs, n_blocks, 0, R, BLOCK)
    is_far = tl.load(far + owner, mask=m, other=0) != 0  # [BLOCK]
    tl.atomic_add(stats + 2, tl.sum((is_needed & is_far).to(tl.int64), 0), sem="relaxed")


@triton.jit(do_not_specialize=["n_pairs", "n_blocks", "n_owners"])
def _weigh_kernel(
    counts, owners, lengths, elsewhere, always, token, row, far, far_candidates, fetched, stats, tokens,
    n_pairs, n_blocks, n_owners,
    MODE: tl.constexpr, C: tl.constexpr, SHARING: tl.constexpr, OWNERS: tl.constexpr,
    UNIT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o, m, block, owner, n_slots, share, is_needed = _needed(
        counts, owners, elsewhere, always, n_pairs, n_blocks, UNIT, R, BLOCK
    )
    length = tl.load(lengths + block, mask=m, other=0)  # [BLOCK]
    is_always = (tl.load(always + block, mask=m, other=0) != 0).to(tl.int32)  # [BLOCK]
    bits = is_needed.to(tl.int32)  # [BLOCK]
    if MODE == "query":
        bits = is_always
    if MODE == "auto":
        # [BLOCK]
        price = _token_price(token, far, stats, far_candidates, owner, m, SHARING) * (length.to(tl.float64) * UNIT)
        is_worth = share.to(tl.float64) * tl.load(row + owner, mask=m, other=0.0) >= price  # [BLOCK]
        bits |= ((is_needed & is_worth).to(tl.int32) | is_always) << 1
        bits |= is_always << 2
    tl.store(fetched + o, bits, mask=m)
    tl.atomic_add(stats, tl.sum(is_needed.to(tl.int64), 0), sem="relaxed")
    tl.atomic_max(stats + 1, tl.max(n_slots, 0), sem="relaxed")

    # Neighbouring blocks have few owners.
    lowest = tl.min(tl.where(bits > 0, owner, n_owners), 0)
    highest = tl.max(tl.where(bits > 0, owner, -1), 0)
    for p in range(lowest, highest + 1, OWNERS):
        o_p = p + tl.arange(0, OWNERS)  # [OWNERS]
        is_owner = owner[:, None] == o_p[None, :]  # [BLOCK, OWNERS]
        for c in tl.static_range(C):
            length_of_c = tl.where((bits >> c) & 1 > 0, length, 0).to(tl.int64)  # [BLOCK]
            total = tl.sum(tl.where(is_owner, length_of_c[:, None], 0), 0)  # [OWNERS]
            tl.atomic_add(tokens + c * n_owners + o_p, total, mask=total > 0, sem="relaxed")


@triton.jit
def _cheapest(
    tokens, rows, token, row, far, far_candidates, stats, kv_token, row_bytes, owner, m, n_owners,
    LESS: tl.constexpr, SHARING: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Candidate, and bytes, at the lowest price for each ``owner`` [BLOCK], the first of equal ones."""
    best = tl.zeros([BLOCK], tl.int32)  # [BLOCK]
    cost = tl.zeros([BLOCK], tl.int64)  # [BLOCK]
    lowest = tl.zeros([BLOCK], tl.float64)  # [BLOCK]
    token_price = _token_price(token, far, stats, far_candidates, owner, m, SHARING)  # [BLOCK]
    row_price = tl.load(row + owner, mask=m, other=0.0)  # [BLOCK]
    for c in tl.static_range(C):
        n_tokens = tl.load(tokens + c * n_owners + owner, mask=m, other=0)  # [BLOCK]
        n_rows = tl.zeros([BLOCK], tl.int64)  # [BLOCK]
        if R > 0:
            o_r = tl.arange(0, R)[:, None] * C + c  # [R, 1]
            n_rows = tl.sum(tl.load(rows + o_r * n_owners + owner[None, :], mask=m[None, :], other=0).to(tl.int64), 0)
        price = n_tokens.to(tl.float64) * token_price + n_rows.to(tl.float64) * row_price  # [BLOCK]
        is_lower = price < lowest  # [BLOCK]
        if c == 0:
            is_lower = m
            if C > 1:
                price = price * tl.full([BLOCK], LESS, tl.float64)
        best = tl.where(is_lower, c, best)
        cost = tl.where(is_lower, n_tokens * kv_token + n_rows * row_bytes, cost)
        lowest = tl.where(is_lower, price, lowest)
    return best, cost


@triton.jit(do_not_specialize=["n_pairs", "n_blocks", "n_owners", "kv_token", "row_bytes"])
def _pick_kernel(
    fetched, stats, tokens, rows, dest, owners, token, row, far, far_candidates, fetch, sent_dest, costs,
    n_pairs, n_blocks, n_owners, kv_token, row_bytes,
    LESS: tl.constexpr, SHARING: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < n_pairs  # [BLOCK]
    owner = tl.load(owners + o % n_blocks, mask=m, other=0).to(tl.int32)  # [BLOCK]
    best, b_cost = _cheapest(
        tokens, rows, token, row, far, far_candidates, stats, kv_token, row_bytes, owner, m, n_owners,
        LESS, SHARING, C, R, BLOCK,
    )  # fmt: skip
    comes = (tl.load(fetched + o, mask=m, other=0) >> best) & 1  # [BLOCK]
    tl.store(fetch + o, comes, mask=m)
    tl.store(sent_dest + o, tl.where(comes > 0, -1, tl.load(dest + o, mask=m, other=-1)), mask=m)
    if tl.program_id(0) == 0:
        total = tl.zeros([BLOCK], tl.int64)  # [BLOCK]
        for p in range(0, n_owners, BLOCK):
            o_p = p + tl.arange(0, BLOCK)  # [BLOCK]
            best, b_cost = _cheapest(
                tokens, rows, token, row, far, far_candidates, stats, kv_token, row_bytes, o_p, o_p < n_owners,
                n_owners, LESS, SHARING, C, R, BLOCK,
            )  # fmt: skip
            tl.store(costs + o_p, b_cost, mask=o_p < n_owners)
            total += b_cost
        tl.store(costs + n_owners, tl.sum(total, 0))


class Weighed(NamedTuple):
    """As :class:`moba_cp.eager.exchange.Weighed`."""

    fetched: Tensor
    stats: Tensor
    tokens: Tensor


def weigh_blocks(counts: Tensor, tables, prices, mode: str) -> Weighed:
    """See :func:`moba_cp.eager.exchange.weigh_blocks`."""
    with_shares, copies, n_kv, n_blocks = counts.shape
    n_pairs, n_owners, n_candidates = n_kv * n_blocks, prices.token.numel(), 3 if mode == "auto" else 1
    assert counts.is_contiguous() and (with_shares == 2) == (mode == "auto")
    check_limit("the number of counters of (KV head, block) pairs", counts.numel(), "use larger blocks")
    sums = torch.zeros(3 + n_candidates * n_owners, dtype=torch.int64, device=counts.device)
    weighed = Weighed(
        torch.empty(n_kv, n_blocks, dtype=torch.int32, device=counts.device),
        sums[:3],
        sums[3:].view(n_candidates, n_owners),
    )
    if not n_pairs:
        return weighed
    grid = (cdiv(n_pairs, BLOCK),)
    inputs = dict(
        counts=counts, owners=tables.owner, elsewhere=tables.elsewhere, always=tables.always, far=prices.far,
        n_pairs=n_pairs, n_blocks=n_blocks,
    )  # fmt: skip
    constants = dict(UNIT=prices.unit if mode == "auto" else 0, R=copies, BLOCK=BLOCK)
    with on_device(counts):
        if prices.sharing > 1:
            _far_kernel[grid](**inputs, stats=sums, **constants, **launch_options(4))
        _weigh_kernel[grid](
            **inputs, lengths=tables.length, token=prices.token, row=prices.row, far_candidates=prices.far_candidates,
            fetched=weighed.fetched, stats=weighed.stats, tokens=weighed.tokens, n_owners=n_owners,
            MODE=mode, C=n_candidates, SHARING=prices.sharing, OWNERS=OWNERS, **constants,
            **launch_options(4, fused=False),
        )  # fmt: skip
    return weighed


def pick_cheapest(weighed: Weighed, rows: Tensor | None, dest: Tensor, tables, prices) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moba_cp.eager.exchange.pick_cheapest`."""
    n_pairs, n_blocks, (n_candidates, n_owners) = dest.numel(), dest.shape[1], weighed.tokens.shape
    assert dest.is_contiguous() and (rows is None or rows.is_contiguous())
    fetch = torch.empty(dest.shape, dtype=torch.uint8, device=dest.device)
    sent_dest = torch.empty(dest.shape, dtype=torch.int32, device=dest.device)
    costs = torch.empty(n_owners + 1, dtype=torch.int64, device=dest.device)
    copies = 0 if rows is None else rows.shape[0]
    with on_device(dest):
        _pick_kernel[(max(1, cdiv(n_pairs, BLOCK)),)](
            fetched=weighed.fetched, stats=weighed.stats, tokens=weighed.tokens,
            rows=weighed.tokens if rows is None else rows, dest=dest, owners=tables.owner,
            token=prices.token, row=prices.row, far=prices.far, far_candidates=prices.far_candidates,
            fetch=fetch, sent_dest=sent_dest, costs=costs, n_pairs=n_pairs, n_blocks=max(1, n_blocks),
            n_owners=n_owners, kv_token=prices.kv_token, row_bytes=prices.row_bytes,
            LESS=prices.all_for_less, SHARING=prices.sharing, C=n_candidates, R=copies, BLOCK=BLOCK,
            **launch_options(4, fused=False),
        )  # fmt: skip
    return fetch.view(torch.bool), sent_dest, costs
