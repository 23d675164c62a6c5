"""Equality with one rank, before anything is measured: numbers of wrong results are never published.

The selection must be one rank's, and outputs and gradients must be nearly as close to float64 as one rank's are, by the
rule of :mod:`moba_cp.bench.judge`. One rank itself must be as close to float64 as its precision allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..judge import BOUND, NAMES, allowance, distances, exact_full, exact_moba, select
from ..shape import Shape
from .measure import Layer
from .modes import exchange_options, shares_heads
from .ranks import Ranks

FULL_METHODS = ("ring", "allgather", "heads")
BOUND_32 = 1e-4
"""Of float32 results, as :data:`~moba_cp.bench.judge.BOUND` is of 16 bit ones: plain PyTorch reaches 1e-6."""


@dataclass(frozen=True)
class Deviation:
    """How far one result is from what it should be, the most of all ranks."""

    what: str
    """MoBA or full attention, by which way, on how many ranks."""
    part: str
    """``selection`` (the share that differs), or a tensor: one of :data:`~moba_cp.bench.judge.NAMES`."""
    error: float
    """On one rank relative to the largest value; across ranks the largest error."""
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether it is near enough; NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        if self.part == "selection":
            return f"{self.what}: the selection is not one rank's"
        return f"{self.what}: {self.part} is off by {self.error:.1e}, allowed are {self.allowed:.1e}"


def check(shape: Shape, n_tokens: int, modes: Sequence[str], sizes: Sequence[int], ranks: Ranks) -> str | None:
    """What is wrong on any rank, or None; collective over all ranks, which all get the same answer."""
    return "; ".join(str(one) for one in deviations(shape, n_tokens, modes, sizes, ranks) if not one.holds) or None


def deviations(
    shape: Shape, n_tokens: int, modes: Sequence[str], sizes: Sequence[int], ranks: Ranks
) -> list[Deviation]:
    """Of every way on every number of ranks; collective over all ranks, which all get the same list."""
    one = Layer(shape, n_tokens, 1, ranks)
    layers = {size: Layer(shape, n_tokens, size, ranks) for size in sizes if 1 < size and ranks.rank < size}
    inputs = [*(x.detach() for x in one.leaves), one.dout]
    selection = select(*inputs[:2], shape.moba)
    bound = BOUND if inputs[0].itemsize == 2 else BOUND_32
    found: list[Deviation] = []
    for name, ways in (("MoBA", modes), ("full", FULL_METHODS)):
        exact = exact_moba(*inputs, selection, shape.moba)[:4] if name == "MoBA" else exact_full(*inputs)
        alone = one.moba("auto") if name == "MoBA" else one.full()
        off = distances(alone.results(), exact)
        for part, error, right in zip(NAMES, off, exact, strict=True):
            found.append(Deviation(f"{name} on one rank", part, error / right.abs().max().item(), bound))
        # Every rank has computed the same: one that is further off than others must not allow itself more for that.
        off = [min(errors) for errors in zip(*ranks.gathered(off, ranks.size), strict=True)]
        for size, layer in layers.items():
            for way in ways:
                if not shares_heads("heads" if way == "heads" else way if name == "MoBA" else "auto", shape, size):
                    continue
                ranks.say(f"checking {name} by {way} on {size} ranks")
                found += _compare(layer, name, way, exact, off, selection)
    return worst(found, ranks)


def worst(found: list[Deviation], ranks: Ranks) -> list[Deviation]:
    """Of each deviation the one of the rank that is furthest off; collective over all ranks."""
    by_name: dict[tuple[str, str], list[Deviation]] = {}
    for one in (one for those in ranks.gathered(found, ranks.size) for one in those):
        by_name.setdefault((one.what, one.part), []).append(one)
    return [max(those, key=lambda one: (not one.holds, one.error)) for those in by_name.values()]


def _compare(layer: Layer, name: str, way: str, exact, off, selection) -> list[Deviation]:
    """Of one way, on this rank; collective over the layer's ranks."""
    what, seen = f"{name} by {way} on {layer.size} ranks", []
    if name == "MoBA":
        candidate = layer.moba(way, observer=lambda layer, selection, n_kv, block_size: seen.append(selection))
    else:
        candidate = layer.full(way)
    results = candidate.results()
    found = []
    if seen:
        found.append(Deviation(what, "selection", (seen[0] != layer.shard(selection)).double().mean().item(), 0.0))
    # Each rank's gradients of full attention come in the inputs' precision.
    rounded = name == "full" or exchange_options(way).gradient_dtype == "input"
    for part, error, alone in zip(NAMES, distances(results, [layer.shard(x) for x in exact]), off, strict=True):
        found.append(Deviation(what, part, error, allowance(part, alone, rounded)))
    return found
