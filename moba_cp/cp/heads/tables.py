"""Which heads and rows go where when tokens are exchanged for heads. Host arithmetic, once per context and shape.

Every h consecutive ranks of the group, a *team*, exchange tokens for heads: each of them then has the rows of all of
the team, in the order of the sequence, and its share of the heads. Ranks at the same place of their teams have the same
heads, and together the whole sequence: they attend by a context of their own, the *inner* one. With one team that
is one rank.

A *unit* is some query heads and the KV head that they attend with. Where the ranks of a team do not outnumber the KV
heads, a unit is a KV head with its whole group; otherwise ranks share KV heads, and a unit is a part of a group. All
ranks have equally many units.

Legend: P ranks, h ranks of a team, L local tokens, R = h L rows, Hq query heads, Hkv key/value heads, U units of a
rank, u query heads of a unit, D head dim.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...host import to_device
from ..comm import Communicator
from ..context import CPContext
from ..layout import Segments
from .costs import HeadCosts


@dataclass(frozen=True)
class HeadTables:
    """What is the same in every call of a layer's shape."""

    inner: CPContext
    """Of the ranks with the same heads."""
    rank: int
    """This rank's number in the group."""
    size: int
    """P."""
    team: range
    """The ranks that exchange tokens for heads, this one among them."""
    runs: list[list[tuple[int, int, int]]]
    """For each rank of the team: its runs of tokens, as first local row, first of the R rows here, and length."""
    n_local: int
    """L."""
    n_kv: int
    """Hkv."""
    units: int
    """U."""
    unit: int
    """u."""
    stages: list[slice]
    """Units of each stage."""
    wire: torch.dtype
    """Of partial gradients of K and V, where ranks share KV heads."""

    @property
    def place(self) -> int:
        """This rank's place in its team."""
        return self.rank - self.team.start

    @property
    def n_rows(self) -> int:
        """R."""
        return len(self.team) * self.n_local

    @cached_property
    def counts(self) -> list[int]:
        """[P] rows that each rank of the group gives this one, and is given."""
        return [self.n_local if rank in self.team else 0 for rank in range(self.size)]

    @cached_property
    def kv_heads(self) -> list[list[int]]:
        """[h][U] the KV head of every unit of each rank of the team."""
        n_units = len(self.team) * self.units
        flat = [index * self.n_kv // n_units for index in range(n_units)]
        return [flat[i : i + self.units] for i in range(0, n_units, self.units)]

    @property
    def shares_kv(self) -> bool:
        """Whether units share KV heads, so that gradients of K and V have to be summed."""
        return len(self.team) * self.units > self.n_kv

    @cached_property
    def order(self) -> Tensor | None:
        """[R] int64, which of the rows as they come, the team's first rank's first, each row here is; None where they
        come in order."""
        source = np.empty(self.n_rows, np.int64)
        for place, runs in enumerate(self.runs):
            for first, at, length in runs:
                source[at : at + length] = place * self.n_local + np.arange(first, first + length)
        if (source == np.arange(self.n_rows)).all():
            return None
        return to_device(torch.from_numpy(source), self.inner.device)

    @cached_property
    def order_back(self) -> Tensor | None:
        """The inverse of :attr:`order`."""
        if self.order is None:
            return None
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(self.n_rows, device=back.device)
        return back


def build_head_tables(cp: CPContext, h: int, q: Tensor, k: Tensor) -> HeadTables:
    """:class:`HeadTables` for teams of ``h`` ranks; q [L, Hq, D], k [L, Hkv, D]."""
    n_local, n_heads, dim = q.shape
    costs = HeadCosts(h, n_local, (n_heads, k.shape[1]), dim, q.dtype, cp.exchange)
    first = cp.rank - cp.rank % h
    return HeadTables(
        inner=cp.cached(CPContext, h, lambda: inner_context(cp, h)),
        rank=cp.rank,
        size=cp.size,
        team=range(first, first + h),
        runs=team_runs(cp.segments[first : first + h]),
        n_local=n_local,
        n_kv=k.shape[1],
        units=costs.units,
        unit=costs.unit,
        stages=costs.stages,
        wire=cp.exchange.wire_dtype(k.dtype),
    )


def inner_context(cp: CPContext, h: int) -> CPContext:
    """The context of the ranks that have the same heads; a collective call where there are several."""
    if cp.size == h:
        return CPContext(Communicator(None), cp.layout, cp.seq_len, cp.cu_seqlens, cp.device, "kv")
    per_node = cp.exchange.ranks_per_node
    options = replace(cp.exchange, head_ranks=1, ranks_per_node=None if per_node is None else max(1, per_node // h))
    return CPContext(cp.comm.strided(h), cp.layout, cp.seq_len, cp.cu_seqlens, cp.device, options)


def team_runs(segments: list[Segments]) -> list[list[tuple[int, int, int]]]:
    """For each rank of a team, its runs of tokens, as first local row, first row among the team's tokens by position,
    and length. ``segments``: those of each rank."""
    pieces = sorted((start, place, length) for place, runs in enumerate(segments) for start, length in runs)
    at, row_of = 0, {}
    for start, _, length in pieces:
        row_of[start] = at
        at += length
    found = []
    for runs in segments:
        local, mine = 0, []
        for start, length in runs:
            mine.append((local, row_of[start], length))
            local += length
        found.append(mine)
    return found
