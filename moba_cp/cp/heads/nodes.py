"""Across nodes: among how many ranks tokens are exchanged for heads, by predicted times.

Host arithmetic. Legend: P ranks in nodes of m, h ranks of a team, L local tokens, Hq query heads, Hkv key/value heads,
D head dim.
"""

from typing import NamedTuple

import torch

from ..links import Links
from ..options import ExchangeOptions
from .costs import HeadCosts

SEEN, NEEDED = 0.75, 0.5
"""Of other ranks' K and V: what a rank's queries can see in the zigzag layout; and of that what they select, which is
known only once they have. A concentrated gate needs less, a uniform one all of it."""
LEAST_GAIN = 0.97
"""Of the predicted time: less is within what predictions are off."""
MESSAGES = 6
"""That follow one another in a stage, forward and backward."""


class Predicted(NamedTuple):
    """What a layer takes, forward and backward, with some ranks exchanging tokens for heads and the others blocks."""

    h: int
    near_bytes: float
    """That reach a rank from its node, and from other nodes."""
    far_bytes: float
    seconds: float


def predictions(
    size: int,
    n_local: int,
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    options: ExchangeOptions,
    links: Links,
    compute: float,
    hidden: float,
) -> list[Predicted]:
    """Of every h that divides heads and ranks: none (1), parts of a node, and all P ranks.

    Args:
        size: P; ``options.ranks_per_node`` (m) divides it.
        n_local: L.
        heads: Hq and Hkv.
        links: their speeds.
        compute: seconds of attention itself, in which what comes from other nodes is hidden.
        hidden: the part of the time on near links that attention hides.
    """
    per_node = options.ranks_per_node or 1
    n_nodes = size // per_node
    e, g = dtype.itemsize, options.wire_dtype(dtype).itemsize
    token = heads[1] * 2 * dim * (e * (1 if options.keep else 2) + g)
    # A block crosses once for all ranks of a node; these share their node's cards.
    visible = n_local * SEEN * NEEDED * token
    far_blocks = (n_nodes - 1) * visible
    found = []
    for h in range(1, size + 1):
        within = per_node % h == 0
        if heads[0] % h or not (within or h == size):
            continue
        costs = HeadCosts(h, n_local, heads, dim, dtype, options)
        exchanged = costs.forward_bytes + costs.backward_bytes
        if within:
            # Between ranks of the node with the same heads, and passed on to them, unless there is one.
            units = costs.h * costs.units / heads[1] if h > 1 else 1.0
            others = per_node // h - 1
            far = far_blocks * units
            near = exchanged + others * (visible * units + far)
            near_hops = (h > 1) + (others > 0)
        else:
            far = exchanged * (size - per_node) / (size - 1)
            near, near_hops = exchanged - far, 0
        seconds = max(compute, far / links.far_rate) + (1 - hidden) * near / links.near_rate
        # Messages between nodes follow one another as often in every case, and so decide nothing.
        seconds += MESSAGES * options.stages * near_hops * links.near_seconds
        found.append(Predicted(h, near, far, seconds))
    return found


def full_predictions(
    size: int,
    n_local: int,
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    options: ExchangeOptions,
    links: Links,
    compute: float,
    hidden: float,
) -> list[Predicted]:
    """:func:`predictions` of full attention, of which a ring brings all K and V between ranks with the same heads.

    The rank whose neighbour in the ring is on another node gets over far links what others get over near ones. With
    teams of a node all ranks share in that.
    """
    per_node = options.ranks_per_node or 1
    token = 2 * dim * (2 * dtype.itemsize + options.wire_dtype(dtype).itemsize)
    found = []
    for h in range(1, size + 1):
        if heads[0] % h or not (per_node % h == 0 or h == size):
            continue
        costs = HeadCosts(h, n_local, heads, dim, dtype, options)
        near = costs.forward_bytes + costs.backward_bytes if h > 1 else 0
        far = (size // h - 1) * h * n_local * (costs.units if h > 1 else heads[1]) * token
        if h == size:
            far = near * (size - per_node) / (size - 1)
            near -= far
        seconds = max(compute, far / links.far_rate) + (1 - hidden) * near / links.near_rate
        found.append(Predicted(h, near, far, seconds))
    return found


def choose(found: list[Predicted], per_node: int) -> Predicted:
    """The fastest; of those about as fast the one with the largest teams within nodes: fewer ranks ask one another for
    blocks, and none passes on to its neighbours what came from other nodes."""
    return first_of(sorted(found, key=lambda one: (one.h > per_node, -one.h)))


def first_of(found: list[Predicted]) -> Predicted:
    """The first, or whichever after it is clearly faster."""
    best, *others = found
    for one in others:
        if one.seconds < LEAST_GAIN * best.seconds:
            best = one
    return best
