"""Exact full attention across ranks, for the full layers of hybrids: a ring, or all-gather by slices of heads.

Legend: L local tokens, P ranks, Hq query heads, Hkv key/value heads, D head dim.
Wide means float32, or float64 for float64 inputs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...transforms import once_differentiable, without_autocast
from ..calls import Where, agree, enter_call
from ..comm import ring_bytes
from ..compiling import outside_graphs
from ..context import CPContext, check_context, signature
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
    return _FullAcrossRanks.apply(q, k, v, scale, cp, method, backend, deterministic)


def choose_method(k: Tensor, cp: CPContext) -> str:
    """``allgather`` where K and V of the whole sequence are small and nearly all of it is seen, else ``ring``."""
    small = 2 * k.nbytes * cp.size <= SMALL_BYTES
    return "allgather" if small and cp.size > 1 and max(schedule_of(cp).hops) == cp.size - 1 else "ring"


class Pass(NamedTuple):
    """A forward pass: what its backward pass needs beside tensors."""

    scale: float
    cp: CPContext
    method: Any
    """:mod:`.ring` or :mod:`.allgather`"""
    backend: str
    deterministic: bool
    layer: str


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cp: CPContext, method: str, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor, Pass]:
    """The forward pass of :func:`full_attention` without autograd; a collective call.

    Returns:
        out [L, Hq, D] in q's dtype, lse [L, Hq] wide, and what :func:`backward_pass` is called with.
    """
    if method != "auto" and method not in METHODS:
        raise ValueError(f"method={method!r} is not one of auto, {', '.join(METHODS)}")
    way = METHODS[choose_method(k, cp) if method == "auto" else method]
    where = Where.forward(cp.comm.layer)
    if not cp.comm.calls.count:
        agree(cp.comm, signature(cp, q, k, kind="full", block_size=None, top_k=None))
    enter_call(cp.comm, where, "full", cp.digest, q.shape[1], k.shape[1:])
    out, lse = way.forward(*(x.contiguous() for x in (q, k, v)), scale, cp, backend, deterministic, where)
    for counters in cp.comm.counters_of(where):
        counters.dense_ring += ring_bytes(k, cp.size)
    return out.to(q.dtype), lse, Pass(scale, cp, way, backend, deterministic, where.layer)


def backward_pass(
    made: Pass, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in their inputs' dtype, from what :func:`forward_pass` returned; a collective call."""
    scale, cp, way, backend, deterministic, layer = made
    where = Where.backward(layer)
    enter_call(cp.comm, where, "full")
    q, k, v, dout = (x.contiguous() for x in (q, k, v, dout))
    dq, dk, dv = way.backward(q, k, v, dout, out, lse, scale, cp, backend, deterministic, where)
    for counters in cp.comm.counters_of(where):
        counters.dense_ring += 2 * ring_bytes(k, cp.size)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _FullAcrossRanks(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, scale: float, cp: CPContext, method: str, backend: str, deterministic: bool):
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse, ctx.made = forward_pass(q, k, v, scale, cp, method, backend, deterministic)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout, _dlse):
        return *backward_pass(ctx.made, *ctx.saved_tensors, dout), None, None, None, None, None
