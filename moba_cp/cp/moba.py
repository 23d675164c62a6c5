"""MoBA attention across ranks.

Forward: tails of straddling blocks go to the owners; block means are all-gathered; local queries choose among all
blocks; then blocks come here or query rows go there, in stages: while own and local blocks are computed the first
stage travels, while a stage is computed the next one travels. Partial results are merged by their log-sum-exp.
Backward: the same again with gradients, which return to the owners. Some heads' local work is left for the end, to hide
what the last stage returns.

Legend: L local tokens, X extra rows (assembled straddling blocks), Hq query heads, Hkv key/value heads, D head dim,
S = k - 1 chosen blocks per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..blocks import Pages
from ..config import MoBAConfig
from ..eager import wide_dtype
from .comm import BACKWARD, ring_bytes
from .context import CPContext
from .decide import decide, heads_of_stage
from .exchange import BlockStage, HopStage
from .gather import GatherStage
from .options import WireCosts
from .plan import negotiate
from .rows import RowStage, id_dtype
from .straddle import assemble, assemble_backward, gather_means, owned_pages


def moba_attention(q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, scale: float, cp: CPContext):
    """MoBA attention of local queries to the whole sequence; a collective call.

    Args:
        q: [L, Hq, D]; k, v: [L, Hkv, D], this rank's share.

    Returns:
        out [L, Hq, D] in q's dtype, lse [L, Hq] wide and without gradient.
    """
    return _MoBAAcrossRanks.apply(q, k, v, config, scale, cp)


class _Stage(NamedTuple):
    """One part of the remote work; blocks or rows may be missing where no rank has any of them."""

    kv_heads: slice
    """All KV heads that it is about."""
    heads: slice
    """The query heads of these."""
    blocks: BlockStage | GatherStage | None
    rows: RowStage | None


class _MoBAAcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, config: MoBAConfig, scale: float, cp: CPContext):
        geometry, comm = cp.geometry(config.block_size), cp.comm
        comm.direction = ""
        own, visible = geometry.own, geometry.visible
        k_rows, v_rows = assemble(k, v, geometry, comm)
        owned = owned_pages(k_rows, v_rows, geometry)
        means = gather_means(k_rows, geometry, comm)
        ready = comm.mark(q)

        def begin(stage: _Stage):
            with comm.beside(ready):
                return stage.blocks and stage.blocks.fetch(), stage.rows and stage.rows.send_forward(q)

        # What goes to everybody need not wait for anybody's choice.
        is_planned = comm.size > 1 and cp.exchange.mode != "allgather"
        stages = [] if is_planned else _gather_stages(q, owned, cp)
        waits = begin(stages[0]) if stages else None
        chosen = ops.select_blocks(q, means, geometry.first, own, config.top_k)
        if cp.observer is not None:
            cp.observer(comm.layer, chosen, k.shape[1], config.block_size)
        ready = comm.mark(q)
        with comm.beside(ready):
            plan = _plan(chosen, owned, cp) if is_planned else None

        # What lies here waits for nobody; meanwhile the plan's sizes come to the host.
        out = torch.empty(q.shape, dtype=wide_dtype(q.dtype), device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=out.dtype, device=q.device)
        # One index of all blocks, wherever they lie: a call passes over those that its storage has not.
        index = ops.routing_index(q, chosen, own, visible, geometry.somewhere.expand(k.shape[1], -1))

        def attend(pages: Pages, kv_heads: slice | None) -> None:
            ops.attend(q, pages, chosen, own, visible, scale, index=index, kv_heads=kv_heads, into=(out, lse))

        attend(owned, None)
        if is_planned:
            with comm.beside(ready):
                stages = _stages(plan, q, chosen, owned, cp)

        def compute(stage: _Stage, waits):
            answer = None
            if stage.rows:
                waits[1]()
                answer = stage.rows.answer_forward(scale)
            for pages in stage.blocks.visible(waits[0]()) if stage.blocks else ():
                attend(pages, stage.kv_heads)
            return answer

        def collect(stage: _Stage, answer):
            if answer is not None:
                part, part_lse = answer()
                if part.shape[0]:
                    ops.merge_rows(out[:, stage.heads], lse[:, stage.heads], part, part_lse, stage.rows.index())

        _pipeline(stages, begin, compute, collect, waits)
        out = out.to(q.dtype)
        for counters in comm.books():
            counters.dense_ring += ring_bytes(k, comm.size)
        ctx.save_for_backward(q, k, v, out, lse, chosen, index)
        ctx.stages, ctx.config, ctx.scale, ctx.cp, ctx.layer = stages, config, scale, cp, comm.layer
        # The blocks themselves are assembled again in backward; until then only the plan and the index are kept.
        for stage in stages:
            _set_owned(stage, None)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _dlse):
        q, k, v, out, lse, chosen, index = ctx.saved_tensors
        cp, config, scale = ctx.cp, ctx.config, ctx.scale
        geometry, comm = cp.geometry(config.block_size), cp.comm
        own, visible, deterministic = geometry.own, geometry.visible, config.deterministic
        comm.layer, comm.direction = ctx.layer, BACKWARD
        delta, wire = ops.row_sums(dout, out), cp.exchange.wire_dtype(q.dtype)
        k_rows, v_rows = assemble(k, v, geometry, comm)
        owned = owned_pages(k_rows, v_rows, geometry)
        for stage in ctx.stages:
            _set_owned(stage, owned)

        def attend_backward(pages: Pages, kv_heads: slice, dk: Tensor, dv: Tensor, fresh: bool = False) -> None:
            ops.attend_backward(
                q, pages, chosen, own, visible, scale, dout, lse, delta, deterministic,
                index=index, kv_heads=kv_heads, into=(dq, dk, dv), fresh=fresh,
            )  # fmt: skip

        ready = comm.mark(q)

        def begin(stage: _Stage):
            with comm.beside(ready):
                return (
                    stage.blocks and stage.blocks.fetch(),
                    stage.rows and stage.rows.send_backward(q, dout, lse, delta),
                )

        waits = begin(ctx.stages[0]) if ctx.stages else None
        grads = torch.zeros(2, *k_rows.shape, dtype=lse.dtype, device=k.device)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        local = _local_parts(k.shape[1], comm.size)

        def attend_local(parts: list[slice]) -> None:
            for kv_heads in parts:
                attend_backward(owned, kv_heads, *grads)

        attend_local(local[:1])

        def compute(stage: _Stage, waits):
            answer = finish = None
            if stage.rows:
                waits[1]()
                answer = stage.rows.answer_backward(scale, grads, wire, deterministic)
            if stage.blocks:
                storages, parts = waits[0](), []
                for pages in stage.blocks.visible(storages):
                    part, of_kv = stage.blocks.new_gradients(pages)
                    attend_backward(pages, stage.kv_heads, *of_kv, stage.blocks.writes_all)
                    parts.append(part)
                finish = stage.blocks.give_back(storages, parts, grads, wire)
            return answer, finish

        def collect(stage: _Stage, started):
            answer, finish = started
            if answer is not None:
                part = answer()
                if part.shape[0]:
                    ops.add_rows(dq[:, stage.heads], part, stage.rows.index())
            if finish is not None:
                finish()

        _pipeline(ctx.stages, begin, compute, collect, waits, lambda: attend_local(local[1:]))
        for stage in ctx.stages:
            _set_owned(stage, None)
        dk, dv = assemble_backward(*grads, geometry, comm)
        for counters in comm.books():
            counters.dense_ring += 2 * ring_bytes(k, comm.size)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _pipeline(stages, begin, compute, collect, waits=None, last=lambda: None) -> None:
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


def _plan(chosen: Tensor, owned, cp: CPContext):
    """This rank's decision, told to the owners; a collective call that does not wait for the device."""
    options, geometry = cp.exchange, cp.geometry(owned.block_size)
    n_kv, dim = owned.row.shape[0], owned.k.shape[2]
    costs = WireCosts.of(owned.k.dtype, dim, chosen.shape[2], options, id_dtype(geometry, n_kv))
    weighing = options.weighing(cp.size)
    decision = decide(chosen, geometry, n_kv, options.stages, costs, options.mode, weighing, cp.rank)
    return decision, negotiate(decision, chosen, geometry, cp.wire(owned.block_size, n_kv), cp.comm)


def _stages(plan, q: Tensor, chosen: Tensor, owned: Pages, cp: CPContext) -> list[_Stage]:
    """The remote work as planned; this is where the host waits for the plan's sizes."""
    geometry, comm, options = cp.geometry(owned.block_size), cp.comm, cp.exchange
    n_kv = owned.row.shape[0]
    decision, plan = plan
    facts = plan.facts()
    for counters in comm.books():
        counters.needed += facts.needed
        counters.remote += facts.candidates
        counters.hottest = max(counters.hottest, facts.hottest)
    if options.mode == "auto" and facts.total_bytes >= options.allgather_share * comm.size * _gathered_bytes(owned, cp):
        return _gather_stages(q, owned, cp)
    for counters in comm.books():
        counters.planned += facts.bytes

    hop_sizes = [plan.sizes(hop) for hop in range(len(plan.hops))]
    row_sizes = plan.sizes(-1)
    with_blocks = options.mode != "query" or geometry.straddles
    stages = []
    for stage in range(options.stages):
        hops = [HopStage(lists, s, stage, geometry, comm) for lists, s in zip(plan.hops, hop_sizes, strict=True)]
        blocks = BlockStage(hops, owned, decision.fetch, options.keep) if with_blocks else None
        rows, kv_heads = None, heads_of_stage(n_kv, options.stages, stage)
        heads = owned.query_heads(kv_heads, chosen.shape[1])
        # Where nobody sends any, nobody takes part in sending them.
        if facts.total_rows:
            rows = RowStage(plan.rows, row_sizes, stage, heads, chosen, owned, geometry, comm, options.keep)
        stages.append(_Stage(kv_heads, heads, blocks, rows))
    return stages


def _gather_stages(q: Tensor, owned: Pages, cp: CPContext) -> list[_Stage]:
    """The remote work as an all-gather of some heads after the others."""
    geometry, comm, options = cp.geometry(owned.block_size), cp.comm, cp.exchange
    if comm.size == 1:
        return []
    n_kv = owned.row.shape[0]
    for counters in comm.books():
        counters.planned += _gathered_bytes(owned, cp)
    cuts = [n_kv * s // min(options.stages, n_kv) for s in range(min(options.stages, n_kv) + 1)]
    heads = [slice(*cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)]
    return [
        _Stage(h, owned.query_heads(h, q.shape[1]), GatherStage(h, owned, geometry, comm, options.keep), None)
        for h in heads
    ]


def _gathered_bytes(owned: Pages, cp: CPContext) -> int:
    """Bytes that an all-gather brings to a rank, and takes from it, in forward and backward."""
    tokens = (cp.size - 1) * cp.geometry(owned.block_size).widest * owned.row.shape[0]
    # What a row costs does not matter here.
    return tokens * WireCosts.of(owned.k.dtype, owned.k.shape[2], 0, cp.exchange).kv_token


def _set_owned(stage: _Stage, owned) -> None:
    for part in (stage.blocks, stage.rows):
        if part is not None:
            part.owned = owned
