"""A short causal convolution over keys, each channel by itself, within documents and across ranks.

Each key gets a weighted part of the keys just before it, so that keys of one thing resemble one another, and a block's
mean tells more of what is in it. It comes after the rotary embedding, linear and with one weight for both channels that
are turned together: it commutes with the turn, and scores depend on distances alone, as without it. At zero weights it
changes nothing.

Legend: L tokens of this rank, g key heads, D head dim, w width, P ranks, N rows that each rank gives the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..dtypes import WIDE
from ..host import to_device
from ..transforms import once_differentiable, without_autocast
from .calls import Where
from .context import CPContext
from .layout import Segments, positions_of

# Rows of a slice: what is wide exists for one at a time.
_SLICE = 2**16
_KIND = "key_convolution"


@dataclass(frozen=True)
class _Halo:
    """What the keys before each key are, by context and width."""

    inside: Tensor
    """[L] int64, how many of the w - 1 keys before each are of its document, and lie before it on this rank too."""
    tails: Tensor
    """[N] int64, local rows that the ranks show one another: the last of each segment."""
    n_tails: int
    """So many of them are rows of their own, the others repeat one of them."""
    rows: Tensor
    """[n] int64, local rows that reach rows of other segments."""
    sources: Tensor
    """[n, w - 1] int64, where among the P N rows shown the key is that stands 1, 2, ... before; -1 if it is inside,
    -2 if there is none."""


def convolve_keys(k: Tensor, weight: Tensor, context: CPContext) -> Tensor:
    """Keys with a part of those before them; differentiable, both passes are collective calls where there are ranks.

    Args:
        k: [L, g, D], turned by the rotary embedding, whose pairs are channels ``i`` and ``i + D / 2``.
        weight: [g D / 2, w], the weight of each key itself first. Its gradient is of this rank's rows, like those of
            other weights.
        context: documents, and which tokens are here.

    Returns:
        [L, g, D]: ``k[t] + sum of weight[:, j] * k[t - j]`` over the ``j`` for which that key is of the same document.
    """
    return _Convolve.apply(k, weight, context)


class _Convolve(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, k, weight, context):
        ctx.save_for_backward(k, weight)
        ctx.context = context
        return forward(k, weight, context, context.comm.layer)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout):
        k, weight = ctx.saved_tensors
        return *backward(dout, k, weight, ctx.context, ctx.context.comm.layer), None


def forward(k: Tensor, weight: Tensor, context: CPContext, layer: str) -> Tensor:
    """:func:`convolve_keys` without gradients; ``layer`` is whose bytes are counted."""
    factors, halo = _factors(weight, k), _halo_of(context, weight.shape[1])
    shown = _show(k, halo, context, Where.forward(layer))
    out = torch.empty_like(k)
    for begin in range(0, k.shape[0], _SLICE):
        rows = slice(begin, min(begin + _SLICE, k.shape[0]))
        out[rows] = _added(factors, k[rows], lambda j: _shifted(k, rows, -j, halo))
    if shown is not None:
        out[halo.rows] = _added(factors, k[halo.rows], lambda j: _before(k, shown, j, halo)).to(out.dtype)
    return out


def _added(factors: Tensor, here: Tensor, before: Callable[[int], Tensor]) -> Tensor:
    """Keys ``here`` with their parts of those ``before(j)``, j tokens earlier; wide. In one order wherever these come
    from, so that keys depend neither on the number of ranks nor on how many come at once."""
    here = here.to(factors.dtype)
    total = here + factors[0] * here
    for j in range(1, len(factors)):
        total += factors[j] * before(j)
    return total


def convolve_next_keys(k: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    """:func:`convolve_keys` of b sequences that grow, on one device and without gradients, to the bit.

    Args:
        k: [b, n, g, D], the next keys of each.
        before: [b, w - 1, g, D], the keys just before them as they were given; zeros where there are none.
        weight: [g D / 2, w].

    Returns:
        [b, n, g, D].
    """
    factors, reach, rows = _factors(weight, k), before.shape[1], torch.cat([before, k], 1)
    out = torch.empty_like(k)
    for begin in range(0, k.shape[1], _SLICE):
        end = min(begin + _SLICE, k.shape[1])
        earlier = lambda j: rows[:, reach + begin - j : reach + end - j].to(factors.dtype)
        out[:, begin:end] = _added(factors, k[:, begin:end], earlier)
    return out


def backward(dout: Tensor, k: Tensor, weight: Tensor, context: CPContext, layer: str) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward`'s k [L, g, D] and weight [g D / 2, w], in their dtypes."""
    factors, halo = _factors(weight, k), _halo_of(context, weight.shape[1])
    dk, sums = torch.empty_like(k), torch.zeros_like(factors)
    for begin in range(0, k.shape[0], _SLICE):
        rows = slice(begin, min(begin + _SLICE, k.shape[0]))
        grad, here = dout[rows].to(factors.dtype), k[rows].to(factors.dtype)
        sums[0] += (grad * here).sum(0)
        total = grad + factors[0] * grad
        for j in range(1, len(factors)):
            behind = _shifted(dout, rows, j, halo)
            sums[j] += (behind * here).sum(0)
            total += factors[j] * behind
        dk[rows] = total
    shown = _show(k, halo, context, Where.backward(layer))
    if shown is not None:
        grad, dshown = dout[halo.rows].to(factors.dtype), shown.new_zeros(shown.shape, dtype=factors.dtype)
        for j in range(1, len(factors)):
            source = halo.sources[:, j - 1]
            # Where nothing is read, nothing is added, to whichever row.
            apart = (source >= 0)[:, None, None]
            sums[j] += (grad * shown[source.clamp_min(0)].to(grad.dtype)).masked_fill_(~apart, 0).sum(0)
            dshown.index_add_(0, source.clamp_min(0), (factors[j] * grad).masked_fill_(~apart, 0))
        equal = [len(halo.tails)] * context.size
        returned = context.comm.all_to_all(dshown, equal, equal, _KIND + "_gradients", Where.backward(layer))()
        returned = returned.unflatten(0, (context.size, -1)).sum(0)[: halo.n_tails]
        tails = halo.tails[: halo.n_tails]
        grad = dout[tails].to(factors.dtype)
        total = grad + factors[0] * grad + returned
        for j in range(1, len(factors)):
            at = (tails + j).clamp_max(len(dout) - 1)
            reached = (tails + j < len(dout)) & (halo.inside[at] >= j)
            total += (factors[j] * dout[at].to(grad.dtype)).masked_fill_(~reached[:, None, None], 0)
        dk[tails] = total.to(dk.dtype)
    halves = sums.unflatten(-1, (2, -1)).sum(-2)
    return dk, halves.flatten(1).t().to(weight.dtype)


def _factors(weight: Tensor, k: Tensor) -> Tensor:
    """[w, g, D] wide, the weight of each channel."""
    half = weight.to(WIDE[k.dtype]).t().reshape(weight.shape[1], k.shape[-2], k.shape[-1] // 2)
    return torch.cat([half, half], -1)


def _shifted(x: Tensor, rows: slice, by: int, halo: _Halo) -> Tensor:
    """Wide: of each of the rows that which stands ``by`` behind it in x [L, ...], or before it where that is negative;
    zeros where the two are not one inside the other's reach."""
    out = x.new_zeros((rows.stop - rows.start, *x.shape[1:]), dtype=WIDE[x.dtype])
    first, last = max(rows.start + by, 0), min(rows.stop + by, len(x))
    if first < last:
        later = slice(first, last) if by > 0 else slice(first - by, last - by)
        apart = halo.inside[later] < abs(by)
        out[first - by - rows.start : last - by - rows.start] = x[first:last].masked_fill(apart[:, None, None], 0)
    return out


def _before(k: Tensor, shown: Tensor, j: int, halo: _Halo) -> Tensor:
    """[n, g, D] wide: the keys ``j`` before those of ``halo.rows``, zeros where there is none."""
    source = halo.sources[:, j - 1, None, None]
    here, there = k[(halo.rows - j).clamp_min(0)], shown[source[:, 0, 0].clamp_min(0)]
    return torch.where(source >= 0, there, here).masked_fill_(source == -2, 0).to(WIDE[k.dtype])


def _show(k: Tensor, halo: _Halo, context: CPContext, where: Where) -> Tensor | None:
    """[P N, g, D], the last keys of all ranks' segments; None on one rank."""
    if context.size == 1:
        return None
    return context.comm.all_gather(k[halo.tails], _KIND, where).flatten(0, 1)


def _halo_of(context: CPContext, width: int) -> _Halo:
    return context.cached(_Halo, width, lambda: _build_halo(context, width))


def _build_halo(context: CPContext, width: int) -> _Halo:
    reach = width - 1
    # On the host, where a GPU need not be waited for.
    positions, bounds = positions_of(context.segments[context.rank]), context.cu_seqlens.numpy().astype(np.int64)
    depths = positions - bounds[np.searchsorted(bounds, positions, side="right") - 1]
    run = np.concatenate([[True], np.diff(positions) != 1]).nonzero()[0]
    adjacent = np.arange(len(positions)) - np.repeat(run, np.diff([*run, len(positions)]))
    there = np.minimum(depths, reach)
    inside = np.minimum(there, adjacent)
    tails = [_tails(segments, reach) for segments in context.segments]
    n = max(len(rows) for rows, _ in tails)
    shown = np.concatenate([np.pad(at, (0, n - len(at)), mode="edge") for _, at in tails])
    order = np.argsort(shown, kind="stable")
    rows = np.flatnonzero(inside < there)
    wanted = positions[rows, None] - np.arange(1, width)
    found = order[np.searchsorted(shown[order], wanted).clip(0, len(order) - 1)]
    distance = np.arange(1, width)
    sources = np.where(distance <= inside[rows, None], -1, np.where(distance <= there[rows, None], found, -2))
    assert context.size > 1 or not len(rows)
    assert (shown[sources[sources >= 0]] == wanted[sources >= 0]).all()
    own, _ = tails[context.rank]
    made = (inside, np.pad(own, (0, n - len(own)), mode="edge"), rows, sources)
    with torch.inference_mode(False):
        of_rows, of_tails, at, source = (to_device(torch.from_numpy(x), context.device) for x in made)
    return _Halo(of_rows, of_tails, len(own), at, source)


def _tails(segments: Segments, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """The last ``reach`` tokens of each segment: local rows, and global positions."""
    begin, rows, positions = 0, [], []
    for start, length in segments:
        last = np.arange(max(0, length - reach), length)
        rows.append(begin + last)
        positions.append(start + last)
        begin += length
    return np.concatenate(rows), np.concatenate(positions)
