"""MoBA attention across ranks.

Tails of straddling blocks go to the owners; block means are all-gathered; local queries choose among all blocks. Then
either all K and V come here, some heads at a time (:mod:`.allgather`), or what is needed is planned: the chosen blocks
come here, or query rows go there (:mod:`.exchange`).

Legend: L local tokens, X extra rows (assembled straddling blocks), Hq query heads, Hkv key/value heads, D head dim,
S = k - 1 chosen blocks per row.
"""

import torch
from torch import Tensor

from ..config import MoBAConfig
from ..dtypes import WIDE
from ..ops import backend
from ..transforms import once_differentiable, without_autocast
from .allgather.strategy import Gathering
from .calls import Call
from .comm import BACKWARD, ring_bytes
from .compiling import outside_graphs
from .context import CPContext, check_context
from .exchange import strategy as planned
from .options import GATHERING_MODES
from .queries import OutputGradient, Queries
from .straddle import assemble, assemble_backward, gather_means, owned_pages


@outside_graphs
def moba_attention(q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, scale: float, cp: CPContext):
    """MoBA attention of local queries to the whole sequence; a collective call.

    Args:
        q: [L, Hq, D]; k, v: [L, Hkv, D], this rank's share.

    Returns:
        out [L, Hq, D] in q's dtype, lse [L, Hq] wide and without gradient.

    Raises:
        ValueError: q is not this rank's share of ``cp``'s sequence, or on another kind of device.
    """
    check_context(cp, q)
    if torch.is_inference_mode_enabled():
        # Buffers and tables made by the way outlive it, and serve training too.
        with torch.inference_mode(False), torch.no_grad():
            return moba_attention(q, k, v, config, scale, cp)
    if cp.size == 1:
        return _MoBAAcrossRanks.apply(q, k, v, config, scale, cp, None, None)
    cp.comm.direction = ""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    what = "moba", q.shape[1], k.shape[1:], str(q.dtype), config.block_size, config.top_k
    call = Call(cp.comm, what, wanted)
    # Where other ranks want gradients, this one has to take part in their backward pass.
    anchor = torch.empty(0, dtype=torch.float32, requires_grad=True) if torch.is_grad_enabled() and not wanted else None
    out, lse = _MoBAAcrossRanks.apply(q, k, v, config, scale, cp, call, anchor)
    return out if anchor is None or call.anybody_wants() else out.detach(), lse


class _MoBAAcrossRanks(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, config: MoBAConfig, scale: float, cp: CPContext, call: Call | None, _anchor):
        geometry, comm, mode = cp.geometry(config.block_size), cp.comm, cp.exchange.mode
        comm.direction = ""
        k_rows, v_rows = assemble(k, v, geometry, comm)
        gathering = Gathering(k, cp, config.block_size) if comm.size > 1 and mode in GATHERING_MODES else None
        at_once = gathering is not None and gathering.costs.at_once(q.shape[0] * q.shape[1], config.top_k)
        # By grad mode, which is equal on all ranks; what requires a gradient need not be.
        differentiated = call is not None and call.differentiates
        # What goes to everybody need not wait for anybody's choice.
        stages = gathering.stages(k_rows, v_rows, False, differentiated) if at_once else None

        means = gather_means(k_rows, geometry, comm, call)
        chosen = backend(q).select_blocks(q, means, geometry.first, geometry.own, config.top_k)
        ready, saved = comm.mark(q), None
        if not at_once:
            owned = owned_pages(k_rows, v_rows, geometry)
            plan = planned.make_plan(chosen, owned, ready, cp)
        rows = Queries.of(q, chosen, geometry, scale, k.shape[1])
        if not at_once:
            out, lse, saved = planned.forward(rows, owned, plan, gathering and gathering.costs, ready, cp, call)
        gathers = saved is None
        if gathers:
            for counters in comm.books():
                counters.planned += gathering.costs.bytes_of(comm.rank)
            if at_once:
                out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=WIDE[q.dtype])
            for stage in stages or gathering.stages(k_rows, v_rows, False, differentiated):
                gathering.attend(stage, rows, (out, lse), overwrite_out=at_once)
            saved = gathering.take_kept()
        out = out.to(q.dtype)
        for counters in comm.books():
            counters.dense_ring += ring_bytes(k, comm.size)
        # Nothing that takes memory may hang on ctx by itself: a checkpoint drops only what autograd has saved, and
        # backward needs the choice, the plan and the log-sum-exp of one and the same forward.
        ctx.save_for_backward(q, k, v, out, lse, chosen, rows.index, *saved)
        ctx.gathering, ctx.call = gathering if gathers else None, call
        ctx.config, ctx.scale, ctx.cp, ctx.layer = config, scale, cp, comm.layer
        ctx.mark_non_differentiable(lse)
        if cp.observer is not None:
            # At the end: where it fails, nothing is left half done.
            cp.observer(comm.layer, chosen, k.shape[1], config.block_size)
        return out, lse

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout, _dlse):
        q, k, v, out, lse, chosen, index, *saved = ctx.saved_tensors
        cp, config, gathering = ctx.cp, ctx.config, ctx.gathering
        geometry, comm = cp.geometry(config.block_size), cp.comm
        comm.layer, comm.direction = ctx.layer, BACKWARD
        comm.enter_call("moba")
        if ctx.call is not None:
            ctx.call.check()
        rows = Queries(q, chosen, geometry, ctx.scale, index)
        k_rows, v_rows = assemble(k, v, geometry, comm)
        stages = gathering.stages(k_rows, v_rows, True, kept=saved) if gathering is not None else None
        output = OutputGradient(dout, lse, backend(dout).row_sums(dout, out), config.deterministic)
        if stages is None:
            dq, grads = planned.backward(saved, rows, output, owned_pages(k_rows, v_rows, geometry), cp)
        else:
            # Gradients of straddling blocks are sums yet to be completed.
            dtype = lse.dtype if geometry.straddles else k.dtype
            dq, grads = q.new_empty(q.shape), k.new_empty(2, *k_rows.shape, dtype=dtype)
            for stage in stages:
                gathering.attend_backward(stage, rows, output, dq, *grads)
            gathering.wait()
        dk, dv = assemble_backward(*grads, geometry, comm)
        for counters in comm.books():
            counters.dense_ring += 2 * ring_bytes(k, comm.size)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None
