"""Requests between ranks and the lists that follow from them, in plain PyTorch.

A request is bytes: to each rank a header of int64 (how many rows it gets in each stage, then the bytes of this rank's
whole decision, and how many rows it sends in all), then a byte for each pair that it serves, 1 if that is wanted. A
pair is (KV head, block), numbered ``head * n + block``. The tables, the same in every call, are made by
:mod:`moba_cp.cp.exchange.tables`.

Legend: P ranks, n blocks, Hkv key/value heads. *Sizes* are [2, stages, P + 1] int64: rows received from (0) and sent to
(1) each rank, and in the last column pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

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
    """[m] int64, where it says whether the pair moves: the pair itself, or a place in what is received."""
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
        source: int64, for every byte its place in the headers of all ranks followed by the flags [Hkv * n].
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
    facts: Tensor,
    candidates: Tensor,
    n_kv: int,
    out: Tensor,
) -> None:
    """What the host has to know besides the sizes of lists of pairs.

    Args:
        arrived: uint8, the requests received, one of every rank.
        header_at: [P] int64, where in it each header begins.
        ends, costs: as in :func:`write_request`.
        facts: int64, needed pairs and rows of the hottest one first, see :class:`moba_cp.eager.decision.Weighed`.
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
    out[1].view(-1)[:6] = torch.stack([cost, facts[0], candidates * n_kv, costs[-1], facts[1], rows])


def _lengths(ends: Tensor) -> Tensor:
    """[places] int64, from where each part of a list ends."""
    return torch.nn.functional.pad(ends, (1, 0)).diff().long()
