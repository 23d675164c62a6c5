"""Exact full attention across ranks, for the full layers of hybrids: a ring, or all-gather by slices of heads.

Legend: L local tokens, P ranks, Hq query heads, Hkv key/value heads, D head dim.
Wide means float32, or float64 for float64 inputs.
"""

import torch
from torch import Tensor

from ...transforms import once_differentiable, without_autocast
from ..calls import Where, enter_call
from ..comm import ring_bytes
from ..compiling import outside_graphs
from ..context import CPContext, check_context
from . import allgather as full_gather
from . import ring as full_ring
from .schedule import schedule_of

METHODS = {"ring": full_ring, "allgather": full_gather}
# Below this a ring's steps are too short to hide their latency.
SMALL_BYTES = 64 << 20


@outside_graphs
def full_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cp: CPContext, method: str, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Causal attention of local queries to the whole sequence; a collective call.

    Args:
        q: [L, Hq, D]; k, v: [L, Hkv, D], this rank's share.
        scale: factor of the scores.
        cp: the context.
        method: ``ring``, ``allgather``, or ``auto`` to choose by size.
        backend: local kernels, see :func:`moba_cp.dense.choose_backend`.
        deterministic: bit-identical gradients from run to run.

    Returns:
        out [L, Hq, D] in q's dtype, lse [L, Hq] wide and without gradient.
    """
    check_context(cp, q)
    if torch.is_inference_mode_enabled():
        # Tables that this call makes outlive it, and serve training too.
        with torch.inference_mode(False), torch.no_grad():
            return full_attention(q, k, v, scale, cp, method, backend, deterministic)
    if method != "auto" and method not in METHODS:
        raise ValueError(f"method={method!r} is not one of auto, {', '.join(METHODS)}")
    if method == "auto":
        method = choose_method(k, cp)
    return _FullAcrossRanks.apply(q, k, v, scale, cp, METHODS[method], backend, deterministic)


def choose_method(k: Tensor, cp: CPContext) -> str:
    """``allgather`` where K and V of the whole sequence are small and nearly all of it is seen, else ``ring``."""
    small = 2 * k.nbytes * cp.size <= SMALL_BYTES
    return "allgather" if small and cp.size > 1 and max(schedule_of(cp).hops) == cp.size - 1 else "ring"


class _FullAcrossRanks(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, scale: float, cp: CPContext, method, backend: str, deterministic: bool):
        where = Where.forward(cp.comm.layer)
        enter_call(cp.comm, where, "full", q.shape[1], k.shape[1:])
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse = method.forward(q, k, v, scale, cp, backend, deterministic, where)
        out = out.to(q.dtype)
        for counters in cp.comm.counters_of(where):
            counters.dense_ring += ring_bytes(k, cp.size)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = scale, cp, method, backend, deterministic
        ctx.layer = where.layer
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout, _dlse):
        q, k, v, out, lse = ctx.saved_tensors
        scale, cp, method, backend, deterministic = ctx.rest
        where = Where.backward(ctx.layer)
        enter_call(cp.comm, where, "full")
        dq, dk, dv = method.backward(q, k, v, dout.contiguous(), out, lse, scale, cp, backend, deterministic, where)
        for counters in cp.comm.counters_of(where):
            counters.dense_ring += 2 * ring_bytes(k, cp.size)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None
