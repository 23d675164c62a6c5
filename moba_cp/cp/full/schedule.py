"""Full attention across ranks on paper: what every rank sees of every other, and how far each shard must travel.

Legend: T tokens, P ranks, L local tokens. The shard of a rank is its K and V.
"""

from functools import cached_property

import numpy as np

from ...dense import Ranges, build_ranges
from ..context import CPContext
from ..layout import Segments


class FullSchedule:
    """One rank's view of causal attention over the sequence; host arithmetic, done once per context."""

    def __init__(self, segments: list[Segments], rank: int, cu_seqlens: np.ndarray):
        """``segments`` lists every rank's tokens, ``cu_seqlens`` [n_docs + 1] the documents."""
        self._segments, self._rank, self._bounds = segments, rank, cu_seqlens
        self._ranges: dict[int, Ranges] = {}

    def ranges(self, source: int) -> Ranges:
        """What this rank's rows see of the shard of rank ``source``."""
        if source not in self._ranges:
            self._ranges[source] = build_ranges(self._segments[self._rank], self._segments[source], self._bounds)
        return self._ranges[source]

    @cached_property
    def whole(self) -> Ranges:
        """What this rank's rows see of the whole sequence in global order."""
        return build_ranges(self._segments[self._rank], [(0, int(self._bounds[-1]))], self._bounds)

    @cached_property
    def hops(self) -> list[int]:
        """Per rank: how many ranks further round the ring its shard is seen, the last of them counted."""
        first, last = _document_extent(self._segments, self._bounds)
        size = len(self._segments)
        hops = [0] * size
        for rank in range(size):
            seen = ((last[rank] >= first) & (last[rank] >= 0)).any(1)
            for source in np.flatnonzero(seen).tolist():
                hops[source] = max(hops[source], (rank - source) % size)
        return hops


def schedule_of(cp: CPContext) -> FullSchedule:
    """The context's schedule; built at the first call and kept."""
    bounds = cp.cu_seqlens.numpy().astype(np.int64)
    return cp.cached(FullSchedule, None, lambda: FullSchedule(cp.segments, cp.rank, bounds))


def _document_extent(segments: list[Segments], cu_seqlens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[P, n_docs] first and last position of each document on each rank; a document not there: T and -1."""
    shape = len(segments), len(cu_seqlens) - 1
    first = np.full(shape, cu_seqlens[-1], np.int64)
    last = np.full(shape, -1, np.int64)
    for rank, runs in enumerate(segments):
        for start, length in runs:
            # Documents begin at or before what they cover: [a, b) are those that this run touches.
            a = np.searchsorted(cu_seqlens, start, side="right") - 1
            b = np.searchsorted(cu_seqlens, start + length, side="left")
            here = slice(a, b)
            begin, end = cu_seqlens[here], cu_seqlens[a + 1 : b + 1]
            full = end > begin
            first[rank, here] = np.where(
                full, np.minimum(first[rank, here], np.maximum(begin, start)), first[rank, here]
            )
            last[rank, here] = np.where(
                full, np.maximum(last[rank, here], np.minimum(end, start + length) - 1), last[rank, here]
            )
    return first, last
