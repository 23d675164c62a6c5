"""Equality with one rank, before anything is measured: numbers of wrong results are never published.

The selection must be one rank's, and outputs and gradients must be nearly as close to float64 as one rank's are, by the
rule of :mod:`moba_cp.bench.judge`. One rank itself must be as close to float64 as its precision allows.
"""

from collections.abc import Sequence

import torch

from ..judge import BOUND, NAMES, distances, exact_full, exact_moba, select, too_far
from ..shape import Shape
from .measure import Layer
from .modes import exchange_options
from .ranks import Ranks

FULL_METHODS = ("ring", "allgather")


def check(shape: Shape, n_tokens: int, modes: Sequence[str], sizes: Sequence[int], ranks: Ranks) -> str | None:
    """What is wrong on any rank, or None; collective over all ranks, which all get the same answer."""
    one = Layer(shape, n_tokens, 1, ranks)
    layers = {size: Layer(shape, n_tokens, size, ranks) for size in sizes if 1 < size and ranks.rank < size}
    inputs = [*(x.detach() for x in one.leaves), one.dout]
    selection = select(*inputs[:2], shape.moba)
    wrong: list[str] = []
    for name, ways in (("MoBA", modes), ("full", FULL_METHODS)):
        exact = exact_moba(*inputs, selection, shape.moba)[:4] if name == "MoBA" else exact_full(*inputs)
        alone = one.moba("auto") if name == "MoBA" else one.full()
        allowed = distances(alone.results(), exact)
        for part, error, right in zip(NAMES, allowed, exact, strict=True):
            relative = error / right.abs().max().item()
            if not relative < BOUND:
                wrong.append(f"{name} on one rank: {part} is wrong by {relative:.1e}")
        for size, layer in layers.items():
            for way in ways:
                ranks.say(f"checking {name} by {way} on {size} ranks")
                problem = _compare(layer, name, way, exact, allowed, selection)
                if problem:
                    wrong.append(f"{name} by {way} on {size} ranks: {problem}")
    return ranks.problem("; ".join(wrong) or None, ranks.size)


def _compare(layer: Layer, name: str, way: str, exact, allowed, selection) -> str | None:
    """What is wrong with one way; collective over the layer's ranks."""
    seen = []
    if name == "MoBA":
        candidate = layer.moba(way, observer=lambda layer, selection, n_kv, block_size: seen.append(selection))
    else:
        candidate = layer.full(way)
    results = candidate.results()
    if seen and not torch.equal(seen[0], layer.shard(selection)):
        return "the selection is not one rank's"
    # Each rank's gradients of full attention come in the inputs' precision.
    rounded = name == "full" or exchange_options(way).gradient_dtype == "input"
    return too_far(results, [layer.shard(x) for x in exact], allowed, rounded)
