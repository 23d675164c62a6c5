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
    routing: list[list[Tensor]]
    """What attending to each storage in forward left for backward."""


class _MoBAAcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, config: MoBAConfig, scale: float, cp: CPContext):
        geometry, comm = cp.geometry(config.block_size), cp.comm
        comm.direction = ""
        own, visible = geometry.own, geometry.visible
        k_rows, v_rows = assemble(k, v, geometry, comm)
        means = gather_means(k_rows, geometry, comm)
        chosen = ops.select_blocks(q, means, geometry.first, own, config.top_k)
        if cp.observer is not None:
            cp.observer(comm.layer, chosen, k.shape[1], config.block_size)
        owned = owned_pages(k_rows, v_rows, geometry)

        ready = comm.mark(q)
        with comm.beside(ready):
            plan = _plan(chosen, owned, cp) if comm.size > 1 and cp.exchange.mode != "allgather" else None
        out = torch.empty(q.shape, dtype=wide_dtype(q.dtype), device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=out.dtype, device=q.device)
        local = _local_parts(k.shape[1], comm.size)
        routing: list[list[Tensor]] = [[] for _ in local]

        def attend(pages: Pages, kv_heads: slice, index: list[Tensor]) -> None:
            at = _query_heads(kv_heads, q.shape[1] // k.shape[1])
            ops.attend(
                q[:, at], pages.of_heads(kv_heads), chosen[:, at], own, visible, scale, index=index,
                into=(out[:, at], lse[:, at]),
            )  # fmt: skip

        # What lies here waits for nobody; meanwhile the plan's sizes come to the host.
        for kv_heads, index in zip(local, routing):
            attend(owned, kv_heads, index)
        with comm.beside(ready):
            stages = _stages(plan, chosen, owned, config, cp)

        def begin(stage: _Stage):
            with comm.beside(ready):
                return stage.blocks and stage.blocks.fetch(), stage.rows and stage.rows.send_forward(q)

        def compute(stage: _Stage, waits):
            answer = None
            if stage.rows:
                waits[1]()
                answer = stage.rows.answer_forward(scale)
            for pages in stage.blocks.visible(waits[0]()) if stage.blocks else ():
                stage.routing.append([])
                attend(pages, stage.kv_heads, stage.routing[-1])
            return answer

        def collect(stage: _Stage, answer):
            if answer is not None:
                part, part_lse = answer()
                if part.shape[0]:
                    ops.merge_rows(out[:, stage.heads], lse[:, stage.heads], part, part_lse, stage.rows.index())

        _pipeline(stages, begin, compute, collect)
        out = out.to(q.dtype)
        for counters in comm.books():
            counters.dense_ring += ring_bytes(k, comm.size)
        ctx.save_for_backward(q, k, v, out, lse, chosen)
        ctx.stages, ctx.config, ctx.scale, ctx.cp, ctx.layer = stages, config, scale, cp, comm.layer
        ctx.routing = routing
        # The blocks themselves are assembled again in backward; until then only the plan and the routing are kept.
        for stage in stages:
            _set_owned(stage, None)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _dlse):
        q, k, v, out, lse, chosen = ctx.saved_tensors
        cp, config, scale = ctx.cp, ctx.config, ctx.scale
        geometry, comm = cp.geometry(config.block_size), cp.comm
        own, visible, deterministic = geometry.own, geometry.visible, config.deterministic
        comm.layer, comm.direction = ctx.layer, BACKWARD
        delta, wire = ops.row_sums(dout, out), cp.exchange.wire_dtype(q.dtype)
        k_rows, v_rows = assemble(k, v, geometry, comm)
        owned = owned_pages(k_rows, v_rows, geometry)
        for stage in ctx.stages:
            _set_owned(stage, owned)

        def attend_backward(pages: Pages, kv_heads: slice, index: list[Tensor], dk: Tensor, dv: Tensor) -> None:
            at = _query_heads(kv_heads, q.shape[1] // k.shape[1])
            ops.attend_backward(
                q[:, at], pages.of_heads(kv_heads), chosen[:, at], own, visible, scale, dout[:, at], lse[:, at],
                delta[:, at], deterministic, index=index, into=(dq[:, at], dk, dv),
            )  # fmt: skip

        ready = comm.mark(q)

        def begin(stage: _Stage):
            with comm.beside(ready):
                return (
                    stage.blocks and stage.blocks.fetch(),
                    stage.rows and stage.rows.send_backward(q, dout, lse, delta),
                )

        waits = begin(ctx.stages[0]) if ctx.stages else None
        grads = torch.zeros(*k_rows.shape[:2], 2, k.shape[2], dtype=lse.dtype, device=k.device)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        local = list(zip(_local_parts(k.shape[1], comm.size), ctx.routing, strict=True))

        def attend_local(parts) -> None:
            for kv_heads, index in parts:
                attend_backward(owned, kv_heads, index, grads[:, :, 0], grads[:, :, 1])

        attend_local(local[:1])

        def compute(stage: _Stage, waits):
            answer = finish = None
            if stage.rows:
                waits[1]()
                answer = stage.rows.answer_backward(scale, grads, wire, deterministic)
            if stage.blocks:
                storages, parts = waits[0](), []
                for pages, index in zip(stage.blocks.visible(storages), stage.routing, strict=True):
                    part, of_kv = stage.blocks.new_gradients(pages)
                    attend_backward(pages, stage.kv_heads, index, *of_kv)
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
        dk, dv = assemble_backward(grads[:, :, 0], grads[:, :, 1], geometry, comm)
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
    """KV heads of the parts in which blocks that lie here are attended to."""
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


def _stages(plan, chosen: Tensor, owned, config: MoBAConfig, cp: CPContext) -> list[_Stage]:
    """The remote work, as planned, or as an all-gather; this is where the host waits for the plan's sizes."""
    geometry, comm, options = cp.geometry(config.block_size), cp.comm, cp.exchange
    if comm.size == 1:
        return []
    n_kv, count = owned.row.shape[0], options.stages
    group = chosen.shape[1] // n_kv
    costs = WireCosts.of(owned.k.dtype, owned.k.shape[2], chosen.shape[2], options, id_dtype(geometry, n_kv))
    if plan is not None:
        decision, plan = plan
        total, needed, remote, planned, hottest = plan.facts()
        for counters in comm.books():
            counters.needed += needed
            counters.remote += remote
            counters.hottest = max(counters.hottest, hottest)
    everything = (comm.size - 1) * geometry.widest * n_kv * costs.kv_token
    gather = plan is None or options.mode == "auto" and total >= options.allgather_share * comm.size * everything
    for counters in comm.books():
        counters.planned += everything if gather else planned
    if gather:
        cuts = [n_kv * s // min(count, n_kv) for s in range(min(count, n_kv) + 1)]
        heads = [slice(*cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)]
        return [
            _Stage(h, _query_heads(h, group), GatherStage(h, owned, geometry, comm, options.keep), None, [])
            for h in heads
        ]

    hop_sizes = [plan.sizes(hop) for hop in range(len(plan.hops))]
    row_sizes = plan.sizes(-1)
    with_blocks = options.mode != "query" or geometry.straddles
    stages = []
    for stage in range(count):
        hops = [HopStage(lists, s, stage, geometry, comm) for lists, s in zip(plan.hops, hop_sizes, strict=True)]
        blocks = BlockStage(hops, owned, decision.fetch, options.keep) if with_blocks else None
        rows, kv_heads = None, heads_of_stage(n_kv, count, stage)
        heads = _query_heads(kv_heads, group)
        if options.mode != "kv" and chosen.shape[2]:
            rows = RowStage(plan.rows, row_sizes, stage, heads, chosen, owned, geometry, comm, options.keep)
        stages.append(_Stage(kv_heads, heads, blocks, rows, []))
    return stages


def _query_heads(kv_heads: slice, group: int) -> slice:
    return slice(kv_heads.start * group, kv_heads.stop * group)


def _set_owned(stage: _Stage, owned) -> None:
    for part in (stage.blocks, stage.rows):
        if part is not None:
            part.owned = owned
