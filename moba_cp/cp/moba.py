"""MoBA attention across ranks.

Forward: tails of straddling blocks go to the owners; block means are all-gathered; local queries choose among all
blocks; the blocks they need come from their owners while the local ones are computed; partial results are merged by
their log-sum-exp. Backward: the blocks come again, the gradients of fetched blocks go back to the owners.

Legend: L local tokens, Hq query heads, Hkv key/value heads, D head dim, k top-k.
"""

import torch
from torch import Tensor

from .. import ops
from ..attention import row_sums
from ..config import MoBAConfig
from .context import CPContext
from .exchange import BlockExchange, assemble, assemble_backward, gather_means, owned_pages
from .plan import needed_blocks, plan_blocks


def moba_attention(q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, scale: float, cp: CPContext):
    """MoBA attention of local queries to the whole sequence; a collective call.

    Args:
        q: [L, Hq, D]; k, v: [L, Hkv, D], this rank's share.

    Returns:
        out [L, Hq, D] in q's dtype, lse [L, Hq] wide and without gradient.
    """
    return _MoBAAcrossRanks.apply(q, k, v, config, scale, cp)


class _MoBAAcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, config: MoBAConfig, scale: float, cp: CPContext):
        geometry, comm = cp.geometry(config.block_size), cp.comm
        own, visible = geometry.own, geometry.visible
        k_rows, v_rows = assemble(k, v, geometry, comm)
        means = gather_means(k_rows, geometry, comm)
        chosen = ops.select_blocks(q, means, geometry.first, own, config.top_k)

        exchange = BlockExchange(
            plan_blocks(needed_blocks(chosen, geometry, k.shape[1]), geometry, comm), geometry, comm
        )
        arrive = exchange.fetch(k_rows, v_rows)
        local = ops.attend(q, owned_pages(k_rows, v_rows, geometry), chosen, own, visible, scale)
        remote = ops.attend(q, arrive(), chosen, own, visible, scale)
        out, lse = ops.merge(*zip(local, remote))
        out = out.to(q.dtype)

        comm.counters.dense_ring += _ring_bytes(k, comm.size)
        ctx.save_for_backward(q, k, v, out, lse, chosen)
        ctx.exchange, ctx.config, ctx.scale = exchange, config, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _dlse):
        q, k, v, out, lse, chosen = ctx.saved_tensors
        exchange, config, scale = ctx.exchange, ctx.config, ctx.scale
        geometry, comm = exchange.geometry, exchange.comm
        own, visible = geometry.own, geometry.visible
        rest = scale, dout, lse, row_sums(dout, out), config.deterministic

        k_rows, v_rows = assemble(k, v, geometry, comm)
        arrive = exchange.fetch(k_rows, v_rows)
        dq, dk, dv = ops.attend_backward(q, owned_pages(k_rows, v_rows, geometry), chosen, own, visible, *rest)
        dq_remote, dk_remote, dv_remote = ops.attend_backward(q, arrive(), chosen, own, visible, *rest)
        add = exchange.give_back(dk_remote, dv_remote)
        dq += dq_remote
        add(dk, dv)
        dk, dv = assemble_backward(dk, dv, geometry, comm)

        comm.counters.dense_ring += 2 * _ring_bytes(k, comm.size)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _ring_bytes(k: Tensor, size: int) -> int:
    """Bytes of K and V that a dense ring brings to each rank in one direction."""
    return 2 * (size - 1) * k.nbytes
