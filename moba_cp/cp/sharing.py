"""A sequence put together from the ranks' shares, differentiably.

Legend: T tokens, P ranks, L local tokens.
"""

import torch
from torch import Tensor

from .compiling import outside_graphs


def check_length(x: Tensor, dim: int, length: int, what: str) -> None:
    """Raise ValueError unless dimension ``dim`` of ``x`` has ``length`` tokens, the context's ``what``."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}; pass a tensor")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is not a dimension of x, whose shape is {tuple(x.shape)}")
    if x.shape[dim] != length:
        raise ValueError(f"dimension {dim} of x has length {x.shape[dim]}, not {what}={length}")


@outside_graphs
def unshard(x: Tensor, dim: int, cp) -> Tensor:
    """The whole sequence from every rank's share ``x``, whose dimension ``dim`` has L tokens; a collective call.

    ``cp`` is a :class:`moba_cp.CPContext`, whose method this is.
    """
    check_length(x, dim, cp.local_len, "local_len")
    return _Unshard.apply(x.movedim(dim, 0), cp).movedim(0, dim)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cp):
        ctx.cp = cp
        gathered = cp.comm.gather_uncounted(x).flatten(0, 1)
        whole = torch.empty_like(gathered)
        whole[cp.gathered_positions.to(x.device)] = gathered
        return whole

    @staticmethod
    def backward(ctx, grad):
        return _SumOfShares.apply(grad, ctx.cp), None


class _SumOfShares(torch.autograd.Function):
    """This rank's share [L, ...] of the sum of every rank's [T, ...]; it and unshard are each other's derivatives."""

    @staticmethod
    def forward(ctx, x, cp):
        ctx.cp = cp
        arrived = cp.comm.all_to_all_uncounted(x[cp.gathered_positions.to(x.device)]).unflatten(0, (cp.size, -1))
        return arrived.sum(0)

    @staticmethod
    def backward(ctx, grad):
        return _Unshard.apply(grad, ctx.cp), None
