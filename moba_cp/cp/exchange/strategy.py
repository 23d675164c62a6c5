"""MoBA attention where what moves is planned: the blocks that were chosen come here, or query rows go to them.

While own and local blocks are computed the first stage travels, while a stage is computed the next one travels. Partial
results are merged by their log-sum-exp. Backward: the same again with gradients, which return to the owners. Some
heads' local work is left for the end, to hide what the last stage returns.

Legend: L local tokens, X extra rows (assembled straddling blocks), Hq query heads, Hkv key/value heads, D head dim,
S = k - 1 chosen blocks per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks import Pages
from ...dtypes import WIDE
from ...eager.exchange import Pairs
from ...ops import backend
from ..allgather.costs import GatherCosts
from ..calls import Call
from ..comm import HostCopy
from ..context import CPContext
from ..options import WireCosts
from ..queries import OutputGradient, Queries
from .decide import decide, heads_of_stage
from .dispatch import RowStage, id_dtype
from .fetch import BlockStage, HopStage
from .negotiate import PairLists, Plan, RowLists, negotiate


class _Stage(NamedTuple):
    """One part of the remote work; blocks or rows may be missing where no rank has any of them."""

    kv_heads: slice
    """All KV heads that it is about."""
    heads: slice
    """The query heads of these."""
    blocks: BlockStage | None
    rows: RowStage | None

    @property
    def parts(self) -> list[BlockStage | RowStage]:
        """Those that there are."""
        return [part for part in (self.blocks, self.rows) if part is not None]


def make_plan(chosen: Tensor, owned: Pages, ready: torch.cuda.Event | None, cp: CPContext):
    """This rank's decision, told to the owners; a collective call that does not wait for the device.

    Args:
        chosen: [L, Hq, S] int32.
        owned: the blocks that this rank has.
        ready: the choice of blocks has been made.

    Returns:
        Decision and plan for :func:`forward`; None on one rank.
    """
    if cp.size == 1:
        return None
    options, geometry = cp.exchange, cp.geometry(owned.block_size)
    n_kv, dim = owned.row.shape[0], owned.k.shape[2]
    costs = WireCosts.of(owned.k.dtype, dim, chosen.shape[2], options, id_dtype(geometry, n_kv))
    with cp.comm.beside(ready):
        decision = decide(
            chosen, geometry, n_kv, options.stages, costs, options.mode, options.weighing(cp.size), cp.rank
        )
        return decision, negotiate(decision, chosen, geometry, cp.wire(owned.block_size, n_kv), cp.comm)


def forward(
    rows: Queries,
    owned: Pages,
    plan,
    everything: GatherCosts | None,
    ready: torch.cuda.Event | None,
    cp: CPContext,
    call: Call | None,
) -> tuple[Tensor, Tensor, list[Tensor | None] | None]:
    """Out [L, Hq, D] and lse [L, Hq], wide, and what :func:`backward` needs; a collective call.

    The last is None, and out and lse hold only what this rank has itself, if ``auto`` is to all-gather instead.
    Otherwise it is tensors alone, all that depends on what was chosen, so that autograd keeps them: where a checkpoint
    computes the layer again, it drops these, and backward gets those of one and the same forward.

    Args:
        rows: this rank's queries.
        owned: the blocks that it has.
        plan: of :func:`make_plan`.
        everything: in ``auto``: what all-gathering takes.
        ready: the choice of blocks has been made.
        call: what all ranks are to be at; None for one rank.
    """
    q, comm = rows.q, cp.comm
    # What lies here waits for nobody; meanwhile the plan's sizes come to the host.
    out = torch.empty(q.shape, dtype=WIDE[q.dtype], device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=out.dtype, device=q.device)
    rows.attend(owned, None, (out, lse))
    stages = []
    if plan is not None:
        decision, plan = plan
        with comm.beside(ready):
            # The host waits here anyway, for what was sent later.
            call.check()
            if _gather_instead(plan, everything, cp):
                return out, lse, None
            stages = _stages(plan, decision.fetch, rows.chosen, owned, cp)

    def begin(stage: _Stage):
        with comm.beside(ready):
            return stage.blocks and stage.blocks.fetch(), stage.rows and stage.rows.send_forward(q)

    def compute(stage: _Stage, waits):
        answer = None
        if stage.rows:
            waits[1]()
            answer = stage.rows.answer_forward(rows.scale)
        for pages in stage.blocks.visible(waits[0]()) if stage.blocks else ():
            rows.attend(pages, stage.kv_heads, (out, lse))
        return answer

    def collect(stage: _Stage, answer):
        if answer is not None:
            part, part_lse = answer()
            if part.shape[0]:
                backend(out).merge_rows(out[:, stage.heads], lse[:, stage.heads], part, part_lse, stage.rows.index())

    _pipeline(stages, begin, compute, collect)
    return out, lse, _saved(plan, decision.fetch, stages) if plan is not None else []


def backward(
    saved: list[Tensor | None], rows: Queries, output: OutputGradient, owned: Pages, cp: CPContext
) -> tuple[Tensor, Tensor]:
    """dq [L, Hq, D] and those of K and V, [2, L + X, Hkv, D], wide; a collective call.

    Args:
        saved: of :func:`forward`.
        rows: the queries, with what they chose then.
    """
    q, comm, n_kv = rows.q, cp.comm, owned.row.shape[0]
    wide, wire = output.lse.dtype, cp.exchange.wire_dtype(q.dtype)
    stages = _restored(saved, rows.chosen, owned, cp)
    ready = comm.mark(q)

    def begin(stage: _Stage):
        with comm.beside(ready):
            return (
                stage.blocks and stage.blocks.fetch(),
                stage.rows and stage.rows.send_backward(q, output.dout, output.lse, output.delta),
            )

    waits = begin(stages[0]) if stages else None
    grads = torch.zeros(2, *owned.k.shape, dtype=wide, device=q.device)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    local = _local_parts(n_kv, comm.size)

    def attend_local(parts: list[slice]) -> None:
        for kv_heads in parts:
            rows.attend_backward(owned, kv_heads, (dq, *grads), output)

    attend_local(local[:1])

    def compute(stage: _Stage, waits):
        answer = finish = None
        if stage.rows:
            waits[1]()
            answer = stage.rows.answer_backward(rows.scale, grads, wire, output.deterministic)
        if stage.blocks:
            storages, parts = waits[0](), []
            for pages in stage.blocks.visible(storages):
                part, of_kv = stage.blocks.new_gradients(pages)
                rows.attend_backward(pages, stage.kv_heads, (dq, *of_kv), output, overwrite_dkv=stage.blocks.writes_all)
                parts.append(part)
            finish = stage.blocks.give_back(storages, parts, grads, wire)
        return answer, finish

    def collect(stage: _Stage, started):
        answer, finish = started
        if answer is not None:
            part = answer()
            if part.shape[0]:
                backend(dq).add_rows(dq[:, stage.heads], part, stage.rows.index())
        if finish is not None:
            finish()

    _pipeline(stages, begin, compute, collect, waits, lambda: attend_local(local[1:]))
    return dq, grads


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


def _gather_instead(plan: Plan, everything: GatherCosts | None, cp: CPContext) -> bool:
    """Whether ``auto`` is to all-gather; counts what the plan says. Here the host waits for the plan's sizes."""
    comm, facts = cp.comm, plan.facts()
    for counters in comm.books():
        counters.needed += facts.needed
        counters.remote += facts.candidates
        counters.hottest = max(counters.hottest, facts.hottest)
    if cp.exchange.mode == "auto" and everything.instead_of(facts.total_bytes):
        return True
    for counters in comm.books():
        counters.planned += facts.bytes
    return False


def _stages(plan: Plan, fetch: Tensor, chosen: Tensor, owned: Pages, cp: CPContext) -> list[_Stage]:
    """The remote work as planned, of the blocks ``fetch`` [Hkv, n] and rows of ``chosen`` [L, Hq, S]."""
    geometry, comm, options = cp.geometry(owned.block_size), cp.comm, cp.exchange
    n_kv, total_rows = owned.row.shape[0], plan.facts().total_rows
    hop_sizes = [plan.sizes(hop) for hop in range(len(plan.hops))]
    row_sizes = plan.sizes(-1)
    with_blocks = options.mode != "query" or geometry.straddles
    stages = []
    for stage in range(options.stages):
        hops = [HopStage(lists, s, stage, geometry, comm) for lists, s in zip(plan.hops, hop_sizes, strict=True)]
        blocks = BlockStage(hops, owned, fetch, options.keep) if with_blocks else None
        rows, kv_heads = None, heads_of_stage(n_kv, options.stages, stage)
        heads = owned.query_heads(kv_heads, chosen.shape[1])
        # Where nobody sends any, nobody takes part in sending them.
        if total_rows:
            rows = RowStage(plan.rows, row_sizes, stage, heads, chosen, owned, geometry, comm, options.keep)
        stages.append(_Stage(kv_heads, heads, blocks, rows))
    return stages


def _saved(plan: Plan, fetch: Tensor, stages: list[_Stage]) -> list[Tensor | None]:
    """All tensors of a plan and its stages, for :func:`_restored`."""
    lists = [x for hop in plan.hops for pairs in (hop.want, hop.give) for x in pairs]
    parts = [x for stage in stages for part in stage.parts for x in part.tensors()]
    return [fetch, plan.numbers.get(), plan.rows.slots, plan.rows.place, *lists, *parts]


def _restored(saved: list[Tensor | None], chosen: Tensor, owned: Pages, cp: CPContext) -> list[_Stage]:
    """The stages of which :func:`_saved` took the tensors."""
    if not saved:
        return []
    fetch, numbers, slots, place, *rest = saved
    hops = []
    # Behind the sizes of hops are those of rows, and the facts.
    for _ in range(numbers.shape[0] - 2):
        want_ids, want_before, give_ids, give_before, *rest = rest
        hops.append(PairLists(Pairs(want_ids, want_before), Pairs(give_ids, give_before), numbers))
    plan = Plan(hops, RowLists(slots, place, numbers), HostCopy(numbers))
    stages = _stages(plan, fetch, chosen, owned, cp)
    for part in (part for stage in stages for part in stage.parts):
        part.restore(rest[: part.n_tensors])
        rest = rest[part.n_tensors :]
    return stages
