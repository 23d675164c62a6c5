"""Among how many ranks tokens are exchanged for heads: as asked, or in ``auto`` by predicted times.

Host arithmetic, of training and of the benchmarks. Legend as in :mod:`.costs`.
"""

import logging
from collections import deque
from typing import NamedTuple

import torch

from ..allgather import costs as gather_costs
from ..allgather import stages as gather_stages
from ..context import CPContext
from ..links import Links, links_of
from ..options import ExchangeOptions
from . import nodes
from .costs import HeadCosts

# Fitted to figures of H200s, see tests/cp/test_predictions.py. Attention to shards: tasks are less full, by such a part
# of the time for each further rank, and less where heads share K and V. Copies: the part of their time by which they
# slow attention down, of K and V with packing and sums, and of rows.
SHARD_LOSS, COPY_LOSS, ROWS_LOSS = 0.045, 0.125, 0.065
# Bytes per second of rows that nothing hides, and of a rank's own rows, which are copied too and take from attention.
ROWS_RATE, OWN_RATE = 3.5e11, 1.1e12
# By heads, a stage's barriers and launches, and what a host takes to issue one, forward and backward.
STAGE_SECONDS, HOST_SECONDS = 6e-5, 6.6e-3
LEAST_GAIN = 0.97
"""Of the predicted time: less is within what predictions are off."""
DENSE_FLOPS, RING_LOSS = 4.5e14, 0.08
"""Of full attention: FLOP/s forward and backward, and what a ring costs of its time."""

log = logging.getLogger(__name__)


class Layer(NamedTuple):
    """What the choice depends on."""

    size: int
    """P."""
    n_local: int
    """L."""
    heads: tuple[int, int]
    """Hq and Hkv."""
    dim: int
    dtype: torch.dtype
    moba: tuple[int, int] | None
    """Block size and top-k; None for full attention."""


class TeamSize(NamedTuple):
    """How many ranks exchange tokens for heads."""

    h: int
    why: str


def team_size(options: ExchangeOptions, size: int) -> int:
    """The most ranks that may exchange tokens for heads by copies: all, or those of a node."""
    per_node = options.ranks_per_node
    return size if per_node is None or per_node >= size else per_node


def choose_team(layer: Layer, options: ExchangeOptions) -> TeamSize:
    """h for ``auto``, where copy engines serve within a node: all its ranks, or 1, whatever takes the shorter time by
    prediction.

    Tokens are only exchanged for heads where that hides behind a forward pass, so that no plan could be much better;
    and within a node only among all its ranks: with half of them, on four H200s, an all-gather between the halves took
    half as long again as one of all four.
    """
    most = team_size(options, layer.size)
    h = max(h for h in range(1, most + 1) if layer.size % h == most % h == layer.heads[0] % h == 0)
    compute, n_rows = pass_seconds(layer), layer.n_local * h
    kind = "full attention" if layer.moba is None else "MoBA"
    what = f"{kind} of {layer.size * layer.n_local} tokens on {layer.size} ranks"
    costs = HeadCosts(h, layer.n_local, layer.heads, layer.dim, layer.dtype, options)
    if (
        h < most
        or h == 1
        or n_rows < 2 * max(512, (layer.moba or (0,))[0])
        or costs.forward_bytes / gather_costs.COPY_RATE > compute / (1 + gather_costs.BACKWARD)
    ):
        return TeamSize(1, f"{what}: heads stay where they are, too few or too short to be exchanged among all")
    without, with_heads = seconds_without(layer, options), seconds_with(layer, h, options)
    chosen = with_heads < LEAST_GAIN * without
    said = "tokens are exchanged for heads" if chosen else "heads stay where they are"
    numbers = f"about {1e3 * with_heads:.2f} ms with heads over {h} ranks, {1e3 * without:.2f} without"
    return TeamSize(h if chosen else 1, f"{what}: {said}, {numbers}")


def choose_across_nodes(
    layer: Layer, options: ExchangeOptions, links: Links, by_copies: bool, on_gpu: bool
) -> TeamSize:
    """h for ``auto`` on several nodes, whatever takes the shortest time by prediction.

    Args:
        by_copies: copy engines serve within nodes.
        on_gpu: attention takes what it does on an H100, and what moves meanwhile is hidden; a CPU hides nothing.
    """
    if by_copies:
        links = links._replace(near_rate=max(links.near_rate, gather_costs.COPY_RATE))
    compute, hidden = (pass_seconds(layer) if on_gpu else 0.0), (0.5 if on_gpu else 0.0)
    shape = layer.size, layer.n_local, layer.heads, layer.dim, layer.dtype
    if layer.moba is None:
        kind, found = "full attention", nodes.full_predictions(*shape, options, links, compute, hidden)
        best = nodes.first_of(found)
    else:
        kind, found = "MoBA", nodes.predictions(*shape, options, links, compute, hidden)
        best = nodes.choose(found, options.ranks_per_node or 1)
    times = ", ".join(f"{1e3 * one.seconds:.3g} ms with {one.h}" for one in found)
    rates = f"{links.near_rate / 1e9:.3g} GB/s within nodes, {links.far_rate / 1e9:.3g} between"
    said = f"exchanged for heads by {best.h} ranks" if best.h > 1 else "not exchanged for heads"
    what = f"{kind} of {layer.size * layer.n_local} tokens on {layer.size} ranks, {rates}"
    return TeamSize(best.h, f"{what}: tokens are {said} ({times})")


def head_ranks(
    cp: CPContext, q: torch.Tensor, k: torch.Tensor, moba: tuple[int, int] | None, forced: bool = False
) -> TeamSize:
    """Among how many ranks a layer exchanges tokens for heads, 1 for none: as the context's options say. A collective
    call; in ``auto`` rank 0 logs what was chosen and why.

    Args:
        q: [L, Hq, D].
        k: [L, Hkv, D].
        moba: block size and top-k; None for full attention.
        forced: the layer itself asks for it: where the context's options name no number among all ranks, but on several
            nodes as ``auto`` does, if it does at all.

    Raises:
        ValueError: the number does not divide the ranks, or the heads.
    """
    options, size, n_heads = cp.exchange, cp.size, q.shape[1]
    if size == 1:
        return TeamSize(1, "one rank")
    most = team_size(options, size)
    across = most < size
    if options.mode == "auto" and options.head_ranks is None and (across or not forced):
        if moba is None and not across:
            # Four GPUs took as long by heads as by a ring.
            return TeamSize(1, "full attention")
        layer = Layer(size, q.shape[0], (n_heads, k.shape[1]), q.shape[2], q.dtype, moba)
        by_copies = cp.team_peers(most) is not None
        if across:
            links = links_of(cp.comm, most, cp.device, options.measure_links)
            chosen = choose_across_nodes(layer, options, links, by_copies, q.is_cuda)
        elif by_copies:
            chosen = choose_team(layer, options)
        else:
            return TeamSize(1, "no memory that ranks read of one another")
        key = size, layer.heads, moba, chosen.h
        if cp.rank == 0 and key not in _said:
            _said.add(key)
            _news.append(chosen.why)
            log.info(chosen.why)
        if chosen.h > 1 or not forced:
            return chosen
    everywhere = options.mode == "heads" or (forced and options.head_ranks in (None, 1))
    if options.mode == "heads" and options.head_ranks not in (None, size):
        raise ValueError(
            f"exchange head_ranks={options.head_ranks} leaves other ranks to exchange with, of cp_size={size}, and "
            "mode='heads' says nothing of them; use mode='auto', 'kv', 'query' or 'allgather' with head_ranks"
        )
    h = size if everywhere else options.head_ranks or 1
    if size % h:
        raise ValueError(f"exchange head_ranks={h} does not divide cp_size={size}; {_fitting(n_heads, size)}")
    if n_heads % h:
        raise ValueError(
            f"tokens are exchanged for heads among {h} ranks, which do not divide the {n_heads} query heads; "
            f"{_fitting(n_heads, size)}"
        )
    return TeamSize(h, "asked for")


def _fitting(n_heads: int, size: int) -> str:
    fits = [h for h in range(2, size + 1) if size % h == n_heads % h == 0]
    return f"use exchange head_ranks={fits[-1]} with mode='auto'" if fits else "use exchange mode='auto'"


_said: set[tuple] = set()
"""Ranks, heads, kind of layer and h: sequences of other lengths are not told of again."""
_news: deque[str] = deque(maxlen=64)


def news() -> list[str]:
    """What rank 0 has logged since this was called before."""
    lines = list(_news)
    _news.clear()
    return lines


def seconds_without(layer: Layer, options: ExchangeOptions) -> float:
    """Forward and backward pass of a layer whose K and V come to all ranks by copy engines, or around a ring."""
    return _between(layer, 1, options)


def seconds_with(layer: Layer, h: int, options: ExchangeOptions) -> float:
    """Forward and backward pass where every ``h`` ranks exchange tokens for heads, and the others all K and V."""
    costs = HeadCosts(h, layer.n_local, layer.heads, layer.dim, layer.dtype, options)
    n_bytes, stages = costs.forward_bytes + costs.backward_bytes, len(costs.stages)
    moving = costs.exposed_bytes / ROWS_RATE + ROWS_LOSS * n_bytes / gather_costs.COPY_RATE
    own = n_bytes / (h - 1) / OWN_RATE
    seconds = _between(layer, h, options) + moving + own + 2 * stages * STAGE_SECONDS
    return max(seconds, stages * HOST_SECONDS)


def pass_seconds(layer: Layer) -> float:
    """Forward and backward pass of one rank's part of the work, as one device would do it."""
    n_rows, n_tokens = layer.n_local * layer.heads[0], layer.size * layer.n_local
    if layer.moba is None:
        return 3.5 * 2 * n_rows * n_tokens * layer.dim / DENSE_FLOPS
    return gather_costs.pass_seconds(n_rows, layer.dim, *layer.moba, n_tokens)


def _between(layer: Layer, h: int, options: ExchangeOptions) -> float:
    """What attention takes among the ranks with the same heads, of every ``h`` ranks one, if all K and V come."""
    compute, others = pass_seconds(layer), layer.size // h
    if others == 1:
        return compute
    if layer.moba is None:
        return (1 + RING_LOSS) * compute
    costs = HeadCosts(h, layer.n_local, layer.heads, layer.dim, layer.dtype, options)
    # Of K and V of a token and head, and of their gradients.
    coming, leaving = (2 * layer.dim * x.itemsize for x in (layer.dtype, options.wire_dtype(layer.dtype)))
    stages = gather_stages.heads_of_stages(costs.units, options.stages, layer.size * layer.n_local * coming, compute)
    # Nothing hides how K and V of the first stage come in a backward pass, and gradients of the last one leave.
    first, last = (stage.stop - stage.start for stage in (stages[0], stages[-1]))
    again = 0 if options.keep else coming
    seconds = nodes.SEEN * (others - 1) * h * layer.n_local / gather_costs.COPY_RATE
    exposed = seconds * (first * again + last * leaving)
    copies = seconds * costs.units * (coming + again + leaving)
    shards = SHARD_LOSS * (others - 1) / costs.unit * compute
    return max(compute + shards + exposed + COPY_LOSS * copies, len(stages) * gather_stages.HOST_SECONDS)
