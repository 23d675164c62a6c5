"""A short causal convolution over keys, each channel by itself, within documents and across ranks.

Each key gets a weighted part of the keys just before it, so that keys of one thing resemble one another, and a block's
mean tells more of what is in it. It comes after the rotary embedding, linear and with one weight for both channels that
are turned together: it commutes with the turn, and scores depend on distances alone, as without it. At zero weights it
changes nothing.

Every key is made by ``convolve`` of one of the backends, whose rows are the same to the bit wherever they are computed:
keys depend neither on the number of ranks nor on how many come at once.

Legend: L tokens of this rank, g key heads, D head dim, w width, P ranks, N rows that each rank gives the others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..host import to_device
from ..ops import backend
from ..transforms import once_differentiable, without_autocast
from .calls import Where
from .context import CPContext
from .layout import Segments, positions_of

_KIND = "key_convolution"


@dataclass(frozen=True)
class _Halo:
    """What the keys before each key are, by context and width."""

    inside: Tensor
    """[L] uint8, how many of the w - 1 keys before each are of its document, and lie before it on this rank too."""
    tails: Tensor
    """[N] int64, local rows that the ranks show one another: the last of each segment."""
    n_tails: int
    """So many of them are rows of their own, the others repeat one of them."""
    rows: Tensor
    """[n] int64, local rows that reach rows of other segments."""
    windows: Tensor
    """[n, w] int64, local rows of each of them and the w - 1 keys before it, oldest first; any row for those that lie
    elsewhere."""
    apart: Tensor
    """[n, w, 1, 1] bool, which of a window's keys lie elsewhere."""
    sources: Tensor
    """[n, w] int64, where those are among the P N rows shown; any for the others."""
    reach: Tensor
    """[n w] uint8, how many keys before it the last of each window gets a part of; 0 for the others."""
    behind: Tensor
    """[n_tails, w] int64, local rows of each tail and of the w - 1 keys behind it, the last first."""
    reach_behind: Tensor
    """[n_tails w] uint8, how many of the keys right behind a tail get a part of it; 0 where it is another's row."""


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
    halo, ops = _halo_of(context, weight.shape[1]), backend(k)
    shown = _show(k, halo, context, Where.forward(layer))
    out = ops.convolve(k, weight, halo.inside)
    if shown is not None:
        windows = torch.where(halo.apart, shown[halo.sources], k[halo.windows])
        out[halo.rows] = ops.convolve(windows.flatten(0, 1), weight, halo.reach).view(windows.shape)[:, -1]
    return out


def convolve_next_keys(k: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    """:func:`convolve_keys` of b sequences that grow, on one device and without gradients, to the bit.

    Args:
        k: [b, n, g, D], the next keys of each.
        before: [b, w - 1, g, D], the keys just before them as they were given; zeros where there are none.
        weight: [g D / 2, w].

    Returns:
        [b, n, g, D].
    """
    earlier, rows = before.shape[1], torch.cat([before, k], 1)
    inside = torch.full(rows.shape[:2], earlier, dtype=torch.uint8, device=k.device)
    inside[:, :earlier] = 0
    return backend(k).convolve(rows.flatten(0, 1), weight, inside.flatten()).view(rows.shape)[:, earlier:]


def backward(dout: Tensor, k: Tensor, weight: Tensor, context: CPContext, layer: str) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward`'s k [L, g, D] and weight [g D / 2, w], in their dtypes."""
    halo = _halo_of(context, weight.shape[1])
    dk, dweight = backend(k).convolve_backward(dout, k, weight, halo.inside)
    shown = _show(k, halo, context, Where.backward(layer))
    if shown is not None:
        _backward_across(dout, shown, weight, halo, context, layer, dk, dweight)
    return dk, dweight.to(weight.dtype)


def _backward_across(
    dout: Tensor,
    shown: Tensor,
    weight: Tensor,
    halo: _Halo,
    context: CPContext,
    layer: str,
    dk: Tensor,
    dweight: Tensor,
) -> None:
    """What ranks owe one another: gradients of the keys ``shown`` return to their ranks, where ``dk`` [L, g, D] is
    written once more for them, and ``dweight`` [g D / 2, w] gets their parts."""
    wide, ops = dweight.dtype, backend(dout)
    half = weight.to(wide).t().unflatten(1, (dout.shape[1], -1))[1:].flip(0)
    # As in a window without its last key: [w - 1, g, D], the weights of each channel, and [n, w - 1], where keys are.
    factors, apart, sources = torch.cat([half, half], -1), halo.apart[:, :-1], halo.sources[:, :-1]
    grad = dout[halo.rows, None].to(wide)
    # Nothing is added for keys that lie here, whatever is multiplied.
    products = torch.where(apart, grad * shown[sources].to(wide), 0).unflatten(-1, (2, -1))
    dweight[:, 1:] += products.sum((0, 3)).flip(0).flatten(1).t()
    parts, dshown = torch.where(apart, factors * grad, 0), shown.new_zeros(shown.shape, dtype=wide)
    for i in range(len(factors)):
        # No key gets two parts in one call: their order would be another every time.
        dshown.index_add_(0, sources[:, i], parts[:, i])
    equal = [len(halo.tails)] * context.size
    returned = context.comm.all_to_all(dshown, equal, equal, _KIND + "_gradients", Where.backward(layer))()
    returned = returned.unflatten(0, (context.size, -1)).sum(0)[: halo.n_tails]
    # Rounded once: what was written to dk is computed again, wide, as a convolution that goes back.
    behind = dout[halo.behind].to(wide)
    again = ops.convolve(behind.flatten(0, 1), weight, halo.reach_behind).view(behind.shape)[:, -1]
    dk[halo.tails[: halo.n_tails]] = (again + returned).to(dk.dtype)


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
    distance = np.arange(reach, -1, -1)
    wanted = positions[rows, None] - distance
    found = order[np.searchsorted(shown[order], wanted).clip(0, len(order) - 1)]
    apart = (distance > inside[rows, None]) & (distance <= there[rows, None])
    windows = (rows[:, None] - distance).clip(0)
    assert context.size > 1 or not len(rows)
    assert (shown[found[apart]] == wanted[apart]).all()
    own, _ = tails[context.rank]
    behind = (own[:, None] + distance).clip(max=len(positions) - 1)
    gets = (distance > 0) & (own[:, None] + distance < len(positions)) & (inside[behind] >= distance)
    # The last row of a window is what it is for.
    last = lambda reach: np.where(distance == 0, reach[:, None], 0).flatten().astype(np.uint8)
    padded = np.pad(own, (0, n - len(own)), mode="edge")
    of_windows = (rows, windows, apart[..., None, None], found, last(there[rows]), behind, last(gets.sum(1)))
    with torch.inference_mode(False):
        of_rows, of_tails, *others = (
            to_device(torch.from_numpy(x), context.device) for x in (inside.astype(np.uint8), padded, *of_windows)
        )
    return _Halo(of_rows, of_tails, len(own), *others)


def _tails(segments: Segments, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """The last ``reach`` tokens of each segment: local rows, and global positions."""
    begin, rows, positions = 0, [], []
    for start, length in segments:
        last = np.arange(max(0, length - reach), length)
        rows.append(begin + last)
        positions.append(start + last)
        begin += length
    return np.concatenate(rows), np.concatenate(positions)
