"""A short causal convolution over rows of keys, each pair of channels by weights of its own, and its gradients.

Legend: L rows, g key heads, D head dim, w width. Wide means float32, or float64 for float64 inputs; inside everything
is wide.
"""

import torch
from torch import Tensor

from ..dtypes import WIDE

# Rows of a slice: what is wide exists for one at a time.
_SLICE = 2**16


def convolve(k: Tensor, weight: Tensor, inside: Tensor) -> Tensor:
    """Rows with a part of those before them: ``k[t] + sum of weight[:, j] * k[t - j]`` over j from 0 to ``inside[t]``.

    Products and sums are rounded one by one, in the order of j, so that a row's result is the same to the bit wherever
    it is computed, and among whichever rows.

    Args:
        k: [L, g, D]; channels ``i`` and ``i + D / 2`` have one weight.
        weight: [g D / 2, w] floating, the weight of each row itself first.
        inside: [L] uint8, how many of the w - 1 rows before each it gets a part of.

    Returns:
        [L, g, D] in k's dtype, contiguous.
    """
    factors, out = _factors(weight, k), torch.empty(k.shape, dtype=k.dtype, device=k.device)
    for begin in range(0, len(k), _SLICE):
        rows = slice(begin, min(begin + _SLICE, len(k)))
        here = k[rows].to(factors.dtype)
        total = here + factors[0] * here
        for j in range(1, len(factors)):
            total += factors[j] * _shifted(k, rows, -j, inside)
        out[rows] = total
    return out


def convolve_backward(dout: Tensor, k: Tensor, weight: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`convolve`: k's [L, g, D] in its dtype, contiguous, and weight's [g D / 2, w] wide; dout
    [L, g, D] in k's dtype."""
    factors, dk = _factors(weight, k), torch.empty(k.shape, dtype=k.dtype, device=k.device)
    sums = torch.zeros_like(factors)
    for begin in range(0, len(k), _SLICE):
        rows = slice(begin, min(begin + _SLICE, len(k)))
        grad, here = dout[rows].to(factors.dtype), k[rows].to(factors.dtype)
        sums[0] += (grad * here).sum(0)
        total = grad + factors[0] * grad
        for j in range(1, len(factors)):
            behind = _shifted(dout, rows, j, inside)
            sums[j] += (behind * here).sum(0)
            total += factors[j] * behind
        dk[rows] = total
    return dk, sums.unflatten(-1, (2, -1)).sum(-2).flatten(1).t()


def _factors(weight: Tensor, k: Tensor) -> Tensor:
    """[w, g, D] wide, the weight of each channel."""
    half = weight.to(WIDE[k.dtype]).t().reshape(weight.shape[1], k.shape[-2], k.shape[-1] // 2)
    return torch.cat([half, half], -1)


def _shifted(x: Tensor, rows: slice, by: int, inside: Tensor) -> Tensor:
    """Wide: of each of the rows that which stands ``by`` behind it in x [L, ...], or before it where that is negative;
    zeros where the later of the two gets no part of the earlier."""
    out = x.new_zeros((rows.stop - rows.start, *x.shape[1:]), dtype=WIDE[x.dtype])
    first, last = max(rows.start + by, 0), min(rows.stop + by, len(x))
    if first < last:
        later = slice(first, last) if by > 0 else slice(first - by, last - by)
        apart = inside[later] < abs(by)
        out[first - by - rows.start : last - by - rows.start] = x[first:last].masked_fill(apart[:, None, None], 0)
    return out
