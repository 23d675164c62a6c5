"""MoBA attention where what moves is planned: selected blocks come here, or query rows go to them.

While current and local blocks are computed the first stage travels, while a stage is computed the next one travels.
Partial results are merged by their log-sum-exp. Backward: the same again with gradients, which return to the owners.
Some heads' local work is left for the end, to hide what the last stage returns.

Legend: L local tokens, X extra rows (assembled straddling blocks), Hq query heads, Hkv key/value heads, D head dim,
S = k - 1 selected blocks per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks import Pages
from ...dtypes import WIDE
from ...eager.exchange import Pairs
from ...ops import integer_backend
from ..allgather.strategy import AllGather, Transport
from ..calls import Call, Where
from ..comm import record_stream
from ..context import CPContext
from ..options import ExchangeOptions
from ..ways import Attended, OutputGradient, Queries
from . import dispatch, fetch
from .costs import WireCosts
from .dispatch import RowStage
from .fetch import BlockStage
from .plan import PairLists, Plan, PlanStats, RowLists, Sizes, make_plan
from .policy import Directions
from .tables import (
    DecisionTables,
    WireTables,
    build_decision_tables,
    build_wire_tables,
    number_dtype,
)


class ExchangeTables(NamedTuple):
    """What is the same in every call of a layer's shape."""

    wire: WireTables
    decision: DecisionTables
    grad_dtype: torch.dtype
    """Of gradients that travel."""


def build_exchange_tables(cp: CPContext, block_size: int, n_slots: int, k: Tensor) -> ExchangeTables:
    """Tables for keys such as k [L, Hkv, D] and ``n_slots`` selected blocks per row."""
    geometry, options, (_, n_kv, dim) = cp.geometry(block_size), cp.exchange, k.shape
    # Layers that select more blocks, or have other heads' dim, share them: they are large.
    wire = cp.cached(
        WireTables,
        (block_size, n_kv),
        lambda: build_wire_tables(geometry, n_kv, options.stages, options.ranks_per_node),
    )
    of_layer = k.dtype, dim, n_slots, options, number_dtype(geometry, n_kv)
    costs, directions = WireCosts.of(*of_layer), None
    if options.mode == "auto" and options.ranks_per_node is not None and options.row_weight is None:
        directions = Directions.of(*of_layer)
    decision = build_decision_tables(geometry, n_kv, options.stages, costs, options.weighing(cp.size), directions)
    return ExchangeTables(wire, decision, options.wire_dtype(k.dtype))


class _Stage(NamedTuple):
    """One part of the remote work; blocks or rows may be missing where no rank has any of them."""

    kv_heads: slice
    """All KV heads that it is about."""
    blocks: BlockStage | None
    rows: RowStage | None


class Exchange:
    """A :class:`..ways.Way`."""

    def __init__(
        self,
        tables: ExchangeTables | None,
        options: ExchangeOptions,
        instead: Transport | None,
        ops,
        cp: CPContext,
        call: Call,
        n_heads: int,
    ):
        """
        Args:
            tables: None on one rank, which exchanges nothing.
            instead: in ``auto``: what all-gathers where a plan would save little.
            ops: the backend that serves q, see :func:`moba_cp.ops.backend`.
            n_heads: Hq.
        """
        self._tables, self._options, self._instead = tables, options, instead
        self._ops, self._comm, self._call = ops, cp.comm, call
        self._n_heads = n_heads
        self._int_ops = None
        self._plan: Plan | None = None
        self._ready: torch.cuda.Event | None = None

    def start(self, owned: Pages, where: Where, saved: list[Tensor | None] | None = None) -> None:
        """Everything depends on the selection."""

    def plan(self, block_indices: Tensor, owned: Pages) -> None:
        """This rank's decision, told to the owners."""
        if self._tables is None:
            return
        comm, (wire, decision, _) = self._comm, self._tables
        self._ready, self._int_ops = comm.record_event(block_indices), integer_backend(block_indices)
        with comm.on_comm_stream(self._ready):
            if self._options.mode != "kv":
                block_indices = self._of_query_heads(block_indices)
            self._plan = make_plan(
                block_indices, decision, wire, self._options.mode, self._int_ops, comm, self._call.where
            )

    def forward(self, queries: Queries, owned: Pages) -> Attended:
        """See :class:`..ways.Way`; after :meth:`plan`."""
        q, comm, ops, ready = queries.q, self._comm, self._ops, self._ready
        # Local blocks need no transfer; meanwhile the plan's sizes are copied to the host.
        out = torch.empty(q.shape, dtype=WIDE[q.dtype], device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=out.dtype, device=q.device)
        ops.attend(q, owned, *queries.seen, index=queries.index, out=(out, lse))
        if self._tables is None:
            return Attended(out, lse, [], self)
        plan, self._plan, self._ready = self._plan, None, None
        with comm.on_comm_stream(ready):
            # This waits for nothing more: the plan's sizes, for which the host waits next, were sent later.
            self._call.check()
            numbers = plan.numbers.get()
            sizes = Sizes.of(numbers)
            gathers = self._gathers(sizes.stats)
            stages = [] if gathers else self._stages(plan, sizes, queries, owned, self._call.where)
        if gathers:
            return AllGather(self._instead, ops, self._call).forward(queries, owned, (out, lse))
        record_stream(plan.rows.slots)

        def begin(stage: _Stage):
            with comm.on_comm_stream(ready):
                return stage.blocks and stage.blocks.fetch(), stage.rows and stage.rows.send_rows(q)

        def compute(stage: _Stage, waits):
            arrive, rows = waits
            answer = stage.rows.answer(rows, queries.seen.scale) if stage.rows else None
            for pages in arrive() if stage.blocks else ():
                ops.attend(q, pages, *queries.seen, index=queries.index, kv_heads=stage.kv_heads, out=(out, lse))
            return answer

        def collect(stage: _Stage, answer):
            if answer is not None:
                stage.rows.merge(answer, out, lse)

        _pipeline(stages, begin, compute, collect)
        return Attended(out, lse, _saved(plan, numbers, stages), self)

    def backward(
        self, saved: list[Tensor | None], queries: Queries, output: OutputGradient, owned: Pages, where: Where
    ) -> tuple[Tensor, Tensor]:
        """See :class:`..ways.Way`; dq, dk and dv are wide."""
        q, comm, ops = queries.q, self._comm, self._ops
        stages = self._restored(saved, queries, owned, where)
        wide, grad_dtype = output.lse.dtype, None if self._tables is None else self._tables.grad_dtype
        ready = comm.record_event(q)

        def begin(stage: _Stage):
            with comm.on_comm_stream(ready):
                return (
                    stage.blocks and stage.blocks.fetch(),
                    stage.rows and stage.rows.send_gradients(q, output.dout, output.lse, output.delta),
                )

        waits = begin(stages[0]) if stages else None
        kv_grads = torch.zeros(2, *owned.k.shape, dtype=wide, device=q.device)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        of_rows = output.dout, output.lse, output.delta, output.deterministic

        def attend_backward(pages: Pages, kv_heads: slice, dk: Tensor, dv: Tensor, **how) -> None:
            ops.attend_backward(
                q, pages, *queries.seen, *of_rows, index=queries.index, kv_heads=kv_heads, out=(dq, dk, dv), **how
            )

        local = _local_parts(owned.row.shape[0], comm.size)
        attend_backward(owned, local[0], *kv_grads)

        def compute(stage: _Stage, waits):
            arrive, rows = waits
            answer = finish = None
            if stage.rows:
                answer = stage.rows.answer_gradients(
                    rows, queries.seen.scale, kv_grads, grad_dtype, output.deterministic
                )
            if stage.blocks:
                storages = arrive()
                parts = stage.blocks.new_gradients(storages)
                overwrite = stage.blocks.writes_all
                for pages, part in zip(storages, parts, strict=True):
                    attend_backward(pages, stage.kv_heads, part[:, :1], part[:, 1:], overwrite_dkv=overwrite)
                finish = stage.blocks.return_grads(storages, parts, kv_grads, grad_dtype)
            return answer, finish

        def collect(stage: _Stage, started):
            answer, finish = started
            if answer is not None:
                stage.rows.add(answer, dq)
            if finish is not None:
                finish()

        def last() -> None:
            for kv_heads in local[1:]:
                attend_backward(owned, kv_heads, *kv_grads)

        _pipeline(stages, begin, compute, collect, waits, last)
        return dq, kv_grads

    def _of_query_heads(self, block_indices: Tensor) -> Tensor:
        """[L, Hq, S]: a row that travels is one of a query head, whether or not its group shares a selection."""
        n_groups = block_indices.shape[1]
        if n_groups == self._n_heads:
            return block_indices
        return block_indices.repeat_interleave(self._n_heads // n_groups, 1)

    def _gathers(self, stats: PlanStats) -> bool:
        """Whether ``auto`` is to all-gather; counts what the plan says."""
        gathers = self._instead is not None and stats.total_bytes >= self._instead.tables.better_from
        for counters in self._comm.counters_of(self._call.where):
            counters.needed += stats.needed
            counters.remote += stats.candidates
            counters.hottest = max(counters.hottest, stats.hottest)
            counters.planned += 0 if gathers else stats.bytes
        return gathers

    def _stages(self, plan: Plan, sizes: Sizes, queries: Queries, owned: Pages, where: Where) -> list[_Stage]:
        """The remote work as planned."""
        wire, keep, comm, ops = self._tables.wire, self._options.keep, self._comm, self._ops
        blocks = rows = None
        if self._options.mode != "query" or wire.geometry.straddles:
            blocks = fetch.block_stages(plan.hops, sizes, plan.fetch, owned, wire.geometry, keep, ops, comm, where)
        # Where no rank sends any rows, none takes part in sending them.
        if sizes.stats.total_rows:
            block_indices = self._of_query_heads(queries.seen.block_indices)
            rows = dispatch.row_stages(
                plan.rows, sizes, block_indices, owned, wire, keep, ops, self._int_ops, comm, where
            )  # fmt: skip
        missing = [None] * wire.stages
        return [_Stage(*parts) for parts in zip(wire.kv_heads, blocks or missing, rows or missing, strict=True)]

    def _restored(self, saved: list[Tensor | None], queries: Queries, owned: Pages, where: Where) -> list[_Stage]:
        """The stages of which :func:`_saved` took the tensors."""
        if not saved:
            return []
        mask, numbers, slots, dest, *rest = saved
        hops = []
        for _ in self._tables.wire.hops:
            want_ids, want_before, give_ids, give_before, *rest = rest
            hops.append(PairLists(Pairs(want_ids, want_before), Pairs(give_ids, give_before)))
        sizes, plan = Sizes.of(numbers), Plan(mask, hops, RowLists(slots, dest), None)
        stages = self._stages(plan, sizes, queries, owned, where)
        blocks = [stage.blocks for stage in stages if stage.blocks]
        rows = [stage.rows for stage in stages if stage.rows]
        n_rows = dispatch.N_SAVED * len(rows)
        if blocks:
            fetch.restore(blocks, rest[: len(rest) - n_rows])
        if rows:
            dispatch.restore(rows, rest[len(rest) - n_rows :])
            record_stream(slots)
        return stages


def _saved(plan: Plan, numbers: Tensor, stages: list[_Stage]) -> list[Tensor | None]:
    """All tensors of a plan and its stages, for :meth:`Exchange._restored`."""
    lists = [x for hop in plan.hops for pairs in (hop.want, hop.give) for x in pairs]
    blocks = [stage.blocks for stage in stages if stage.blocks]
    rows = [stage.rows for stage in stages if stage.rows]
    parts = [*(fetch.saved_of(blocks) if blocks else ()), *(dispatch.saved_of(rows) if rows else ())]
    return [plan.fetch, numbers, plan.rows.slots, plan.rows.dest, *lists, *parts]


def _pipeline(stages: list[_Stage], begin, compute, collect, waits=None, last=lambda: None) -> None:
    """Run the stages so that one travels while the one before is computed; ``waits`` if the first has begun.

    ``last`` is computed while the results of the last stage travel.
    """
    done = None
    for index, stage in enumerate(stages):
        now = begin(stage) if waits is None else waits
        waits = begin(stages[index + 1]) if index + 1 < len(stages) else None
        answer = compute(stage, now)
        if done is not None:
            collect(*done)
        done = stage, answer
    last()
    if done is not None:
        collect(*done)


def _local_parts(n_kv: int, size: int) -> list[slice]:
    """KV heads of the parts in which blocks that lie here get their gradients."""
    half = (n_kv + 1) // 2
    return [slice(0, half), slice(half, n_kv)] if size > 1 and n_kv > 1 else [slice(0, n_kv)]
