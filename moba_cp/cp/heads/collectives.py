"""Tokens for heads, and back, by all-to-all.

Legend as in :mod:`.tables`; *tokens* are this rank's [L, H, ...] with all H heads, of queries or of keys, and *heads*
the team's [R, n, ...] with this rank's n heads of a stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..calls import Where
from ..comm import Communicator, record_stream
from .tables import HeadTables


@dataclass
class Stage:
    """Some units of one pass."""

    number: int
    """Among those of the pass."""
    units: slice
    copied: int = 0
    """Its number among all stages that copy engines moved."""
    wait: Callable[[], list[Tensor]] | None = None
    """Waits for what :meth:`Collectives.begin` moves."""
    inputs: list[Tensor] | None = None
    """*Heads*, once they have arrived, or those that forward kept."""
    returning: list[Callable[[], torch.cuda.Event | None]] = field(default_factory=list)
    """Put what returns where it belongs, and give the events that follow."""

    @property
    def count(self) -> int:
        """Units."""
        return self.units.stop - self.units.start


@dataclass(frozen=True)
class Part:
    """One of the tensors that move: *tokens*, whole."""

    tokens: Tensor
    """[L, H, ...]; where results return to it, it holds anything, or zeros if units share its heads."""
    is_kv: bool
    """Of KV heads; otherwise of query heads."""
    wire: torch.dtype
    """Of *heads*."""

    @cached_property
    def kind(self) -> tuple:
        """What *heads* of a stage depend on."""
        return self.is_kv, self.wire, self.tokens.shape[2:]

    @cached_property
    def head_bytes(self) -> int:
        """Of one of the *heads* in a row."""
        return self.tokens.shape[2:].numel() * self.wire.itemsize


class Collectives:
    """Moves the stages of a pass by all-to-all."""

    ahead = 2
    """Stages that have begun when the first of them is computed."""

    def __init__(self, tables: HeadTables, comm: Communicator):
        self.tables, self.comm = tables, comm

    def open_pass(self, parts: Sequence[Part], targets: Sequence[Part], where: Where) -> None:
        """The stages of a pass begin, which brings ``parts`` here and results back to ``targets``."""

    def reserve(self, parts: Sequence[Part], targets: Sequence[Part]) -> None:
        """Make room for a pass that is to follow; of tensors only shapes and dtypes count."""

    def close_pass(self) -> None:
        """All its stages were issued."""

    def begin(self, stage: Stage, parts: Sequence[Part], ready: torch.cuda.Event | None, where: Where) -> None:
        """Start bringing a stage's heads of all ``parts``, once the device has passed ``ready``."""
        counts = self.tables.counts
        with self.comm.on_comm_stream(ready):
            record_stream(*(part.tokens for part in parts))
            packed = tuple(self._packed(part, stage) for part in parts)
            wait = self.comm.all_to_all(packed, counts, counts, "to_heads", where)
        order = self.tables.order
        stage.wait = lambda: [x if order is None else x[order] for x in wait()]

    def results(self, stage: Stage, targets: Sequence[Part]) -> list[Tensor]:
        """Memory for a stage's results, *heads*, that are to return to ``targets``; it holds anything."""
        device = self.tables.inner.device
        return [torch.empty(self._shape(target, stage), dtype=target.wire, device=device) for target in targets]

    def give_back(
        self, stage: Stage, targets: Sequence[Part], which: slice, heads: Sequence[Tensor], where: Where
    ) -> None:
        """Start returning some of a stage's results to ``targets[which]``; :meth:`collect` puts them there.

        Args:
            heads: what :meth:`results` gave for these, or other tensors like them.
        """
        comm, counts, back = self.comm, self.tables.counts, self.tables.order_back
        with comm.on_comm_stream(comm.record_event(heads[0])):
            record_stream(*heads)
            packed = tuple(x if back is None else x[back] for x in heads)
            wait = comm.all_to_all(packed, counts, counts, "to_tokens", where)
            issued = comm.record_event(heads[0])

        def finish() -> torch.cuda.Event | None:
            with comm.on_comm_stream(issued):
                for arrived, target in zip(wait(), targets[which], strict=True):
                    record_stream(target.tokens)
                    self._unpack(arrived.unflatten(0, (len(self.tables.team), -1)), target, stage)
                return comm.record_event(heads[0])

        stage.returning.append(finish)

    def collect(self, stage: Stage) -> list[torch.cuda.Event | None]:
        """Put all that returns of a stage where it belongs; the events that follow. Better called late: where all
        streams share one queue of the GPU (CUDA_DEVICE_MAX_CONNECTIONS=1), what waits there holds up what was issued
        after it."""
        finishing, stage.returning = stage.returning, []
        return [finish() for finish in finishing]

    def kept(self, stage: Stage, count: int) -> list[Tensor]:
        """The first ``count`` of a stage's inputs, to be kept beyond its computation."""
        return stage.inputs[:count]

    def _shape(self, part: Part, stage: Stage) -> tuple[int, ...]:
        """Of *heads*."""
        return self.tables.n_rows, self._n_heads(part, stage), *part.tokens.shape[2:]

    def _n_heads(self, part: Part, stage: Stage) -> int:
        """n."""
        return stage.count * (1 if part.is_kv else self.tables.unit)

    def _packed(self, part: Part, stage: Stage) -> Tensor:
        """[h * L, n, ...], the heads of the team's first rank first."""
        tables = self.tables
        h, n_local = len(tables.team), tables.n_local
        if part.is_kv and tables.shares_kv:
            heads = [head for of_rank in tables.kv_heads for head in of_rank[stage.units]]
            by_rank = part.tokens[:, heads].unflatten(1, (h, stage.count))
        else:
            by_rank = self._by_rank(part, stage)
        return by_rank.transpose(0, 1).reshape(h * n_local, *by_rank.shape[2:])

    def _by_rank(self, part: Part, stage: Stage) -> Tensor:
        """[L, h, n, ...]: a view of the stage's heads of each rank of the team."""
        width = 1 if part.is_kv else self.tables.unit
        by_rank = part.tokens.unflatten(1, (len(self.tables.team), -1))
        return by_rank[:, :, stage.units.start * width : stage.units.stop * width]

    def _unpack(self, arrived: Tensor, target: Part, stage: Stage) -> None:
        """Put arrived [h, L, n, ...] where it belongs, or add it there."""
        tables = self.tables
        if not (target.is_kv and tables.shares_kv):
            self._by_rank(target, stage).copy_(arrived.transpose(0, 1))
            return
        # One by one, in the order of the ranks: the sums are the same from run to run.
        for of_rank, part in zip(tables.kv_heads, arrived, strict=True):
            for index, head in enumerate(of_rank[stage.units]):
                target.tokens[:, head] += part[:, index]
