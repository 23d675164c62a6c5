"""Where all ranks' K and V lie in the stages of an all-gather: tables made once for a context.

Legend: P ranks, L local tokens, W most rows (local and extra) of any rank, n blocks, Hkv key/value heads, H KV heads of
a stage, D head dim. The packed KV shard of a rank in a stage is [H * W, 2, D], K beside V: first the rows before the
geometry's cut, head by head, then the others. A *storage* is the packed shards of all ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...host import to_device
from ..geometry import BlockGeometry
from ..options import ExchangeOptions
from .costs import GatherCosts, pass_seconds

# K and V of the whole sequence in a stage: copies take most of a millisecond, and memory of a few such stages stays. On
# four GPUs attention takes as long forward, and twice that backward.
STAGE_BYTES = 256 << 20
# What a host takes to start a stage, forward and backward: on four H200s 262,144 tokens of 16 KV heads took 32.9 ms in
# nine stages, and attention alone a quarter of 81.7; 131,072 tokens took 13.5 to 14.2 ms in four. Stages for which the
# device takes less are made larger, up to twice the bytes.
HOST_SECONDS = 3e-3


def heads_of_stages(
    n_kv: int, stages: int, head_bytes: int, seconds: float = math.inf, long: float = 1.0
) -> list[slice]:
    """KV heads of each stage: in ``stages`` stages, or in more where K and V of one would take over STAGE_BYTES.

    Long stages have a half before and a half behind: nothing hides how the first one's K and V come in backward, nor
    how the last one's gradients return.

    Args:
        head_bytes: of K and V of the whole sequence, one head.
        seconds: that the device takes for all heads, forward and backward.
        long: two stages are long from this part of STAGE_BYTES on.
    """
    busy = math.ceil(n_kv * HOST_SECONDS / seconds)
    most = max(STAGE_BYTES // head_bytes, min(busy, 2 * STAGE_BYTES // head_bytes))
    most = max(1, min(n_kv // stages, most))
    edge = most // 2 if most < n_kv and 2 * most * head_bytes > long * STAGE_BYTES else 0
    if (-(-(n_kv - 2 * edge) // most) + 2) * HOST_SECONDS > seconds:
        edge = 0
    middle = n_kv - 2 * edge
    n_middle = -(-middle // most)
    cuts = [0, *(edge + middle * i // n_middle for i in range(n_middle + 1)), n_kv]
    return [slice(begin, end) for begin, end in zip(cuts[:-1], cuts[1:], strict=True) if begin < end]


@dataclass
class Stage:
    """Some heads of one pass."""

    heads: slice
    """KV heads."""
    count: int
    """H."""
    n_rows: int
    """H * W, of a packed KV shard."""
    kept: Tensor | None = None
    """The storage that forward kept: it does not travel again."""
    storage: Tensor | None = None
    """[P * H * W, 2, D], once it has arrived; rows that nobody here can see hold anything."""
    wait: Callable[[], Tensor] | None = None
    """Waits for the storage."""
    number: int = 0
    """Counted through all passes, where copy engines move it."""


@dataclass(frozen=True)
class GatherTables:
    """What is the same in every call of a layer's shape."""

    geometry: BlockGeometry
    heads: list[slice]
    """KV heads of each stage."""
    dim: int
    dtype: torch.dtype
    """Of K and V."""
    wire: torch.dtype
    """Of gradients that travel."""
    keep: bool
    """Storages of forward serve backward too."""
    by_copies: bool
    """Copy engines bring what a rank's queries can see; otherwise collectives bring everything."""
    at_once: bool
    """Nothing is to be planned: it is known beforehand that this way is the cheapest, or it is asked for."""
    planned_bytes: int
    """That reach this rank, forward and backward."""
    better_from: float
    """``auto`` all-gathers where plans of all ranks together would move so many bytes."""

    @property
    def rank(self) -> int:
        """Whose tables they are."""
        return self.geometry.rank

    @property
    def size(self) -> int:
        """P."""
        return len(self.geometry.owned)

    def seen(self, viewer: int, owner: int, count: int) -> slice:
        """The rows of ``owner``'s packed shard of ``count`` heads that another rank can see: its two parts adjoin."""
        early, late = self.geometry.sees[viewer, owner]
        cut, end = count * self.geometry.cut, count * self.geometry.most_rows
        return slice(0 if early else cut, end if late else cut)

    @cached_property
    def others(self) -> list[int]:
        """The other ranks, each rank's next one first."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]

    @cached_property
    def counts(self) -> set[int]:
        """H of all stages."""
        return {heads.stop - heads.start for heads in self.heads}

    @cached_property
    def seen_here(self) -> dict[int, list[slice]]:
        """H -> for each rank, the rows of its packed shard that this rank can see."""
        return {count: [self.seen(self.rank, p, count) for p in range(self.size)] for count in self.counts}

    @cached_property
    def partial_at(self) -> dict[int, Tensor]:
        """H -> [P - 1, 3] int64: where the partial gradients of this rank's packed shard are in what others return, see
        :func:`moba_cp.eager.sum_partial_grads`.

        Copy engines bring what each of the others can see, in their order; a collective brings shards of all ranks.
        """
        tables = {}
        for count in self.counts:
            shard, begin, spans = count * self.geometry.most_rows, 0, []
            for p in self.others:
                rows = self.seen(p, self.rank, count)
                spans.append((begin, rows.start, rows.stop) if self.by_copies else (p * shard, 0, shard))
                begin += rows.stop - rows.start
            tables[count] = to_device(torch.tensor(spans, dtype=torch.int64), self.geometry.owner.device)
        return tables

    @cached_property
    def all_pages(self) -> tuple[Tensor, Tensor]:
        """:meth:`_page_table` of all blocks that this rank can see."""
        return self._page_table(True)

    @cached_property
    def other_pages(self) -> tuple[Tensor, Tensor]:
        """:meth:`_page_table` of those that other ranks own."""
        return self._page_table(False)

    def _page_table(self, with_owned: bool) -> tuple[Tensor, Tensor]:
        """[Hkv, n] int64, row of its stage's storage at which each block begins that this rank can see, -1 for others;
        and [Hkv, n] int32, its head there."""
        geometry = self.geometry
        device, cut, widest = geometry.owner.device, geometry.cut, geometry.most_rows
        sees = to_device(torch.from_numpy(geometry.sees[self.rank]), device)
        is_late = geometry.owner_row >= cut
        owned = geometry.owner == self.rank
        visible = torch.where(owned, with_owned, sees[geometry.owner, is_late.long()])
        rows = []
        for heads in self.heads:
            count = heads.stop - heads.start
            head = torch.arange(count, device=device)[:, None]
            early = head * cut + geometry.owner_row
            late = count * cut + head * (widest - cut) + geometry.owner_row - cut
            rows.append(geometry.owner * count * widest + torch.where(is_late, late, early))
        row = torch.where(visible, torch.cat(rows), -1)
        return row, geometry.head_zero.expand(*row.shape)


def build_gather_tables(
    geometry: BlockGeometry,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    options: ExchangeOptions,
    by_copies: bool,
    n_rows: int,
    top_k: int,
) -> GatherTables:
    """:class:`GatherTables` of the geometry's rank.

    Args:
        shape: (L, Hkv, D) of k.
        n_rows: local (token, query head) pairs.
    """
    n_local, n_kv, dim = shape
    costs = GatherCosts(geometry, n_kv, dim, dtype, options, by_copies)
    seconds = pass_seconds(n_rows, dim, geometry.block_size, top_k, len(geometry.owned) * n_local)
    head_bytes = len(geometry.owned) * geometry.most_rows * 2 * dim * dtype.itemsize
    return GatherTables(
        geometry=geometry,
        heads=heads_of_stages(n_kv, options.stages, head_bytes, seconds),
        dim=dim,
        dtype=dtype,
        wire=options.wire_dtype(dtype),
        keep=options.keep,
        by_copies=by_copies,
        at_once=costs.at_once(n_rows, top_k),
        planned_bytes=costs.bytes_of(geometry.rank),
        better_from=costs.better_from,
    )
