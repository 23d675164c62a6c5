"""Exact full attention across ranks, for the full layers of hybrids: a ring, all-gather by slices of heads, or tokens
exchanged for heads.

Legend: L local tokens, P ranks, Hq query heads, Hkv key/value heads, D head dim.
Wide means float32, or float64 for float64 inputs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...transforms import once_differentiable, without_autocast
from ..calls import Where, agree, enter_call
from ..compiling import outside_graphs
from ..context import CPContext, check_context, signature
from ..heads.choice import head_ranks
from . import allgather as full_gather
from . import heads as full_heads
from . import ring as full_ring
from .choice import without_heads

METHODS = {"ring": full_ring, "allgather": full_gather, "heads": full_heads}


@outside_graphs
def full_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cp: CPContext, method: str, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Causal attention of local queries to the whole sequence; a collective call.

    Args:
        q: [L, Hq, D]; k, v: [L, Hkv, D], this rank's share.
        scale: factor of the scores.
        cp: the context.
        method: ``ring``, ``allgather``, ``heads``, or ``auto`` to choose by the context's options and by size.
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


def choose_method(q: Tensor, k: Tensor, cp: CPContext) -> str:
    """``heads`` where the context's options ask for it; otherwise what :func:`.choice.without_heads` says."""
    return "heads" if head_ranks(cp, q, k, None).h > 1 else without_heads(k, cp)


class Pass(NamedTuple):
    """A forward pass: what its backward pass needs beside tensors."""

    scale: float
    cp: CPContext
    method: Any
    """:mod:`.ring`, :mod:`.allgather` or :mod:`.heads`"""
    backend: str
    deterministic: bool
    layer: str

    @property
    def indices(self) -> list[int]:
        """No tensor of full attention is a routing index, see :class:`..moba.Pass`."""
        return []


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cp: CPContext, method: str, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor, Pass]:
    """The forward pass of :func:`full_attention` without autograd; a collective call.

    Returns:
        out [L, Hq, D] in q's dtype, lse [L, Hq] wide, and what :func:`backward_pass` is called with.
    """
    if method != "auto" and method not in METHODS:
        raise ValueError(f"method={method!r} is not one of auto, {', '.join(METHODS)}")
    way = METHODS[choose_method(q, k, cp) if method == "auto" else method]
    where = Where.forward(cp.comm.layer)
    if not cp.comm.calls.count:
        agree(cp.comm, signature(cp, q, k, kind="full", block_size=None, top_k=None, gate=None))
    enter_call(cp.comm, where, "full", cp.digest, q.shape[1], k.shape[1:])
    out, lse = way.forward(*(x.contiguous() for x in (q, k, v)), scale, cp, backend, deterministic, where)
    cp.comm.count_ring(k, 1, where)
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
    cp.comm.count_ring(k, 2, where)
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
