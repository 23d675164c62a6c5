"""Who holds which tokens of a sequence that is spread over ranks. Host arithmetic only.

Legend: T tokens, P ranks, L = T / P tokens per rank. A segment ``(start, length)`` is a run of global positions; a
rank's tokens are its segments in the order listed.
"""

from typing import Literal, get_args

import numpy as np

Layout = Literal["contiguous", "zigzag", "zigzag_per_document"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

Segments = list[tuple[int, int]]


def rank_segments(layout: Layout, seq_len: int, size: int, cu_seqlens: np.ndarray) -> list[Segments]:
    """Segments of every rank.

    ``contiguous`` gives rank ``r`` the ``r``-th of P equal parts. ``zigzag`` cuts the sequence into 2P chunks and
    gives rank ``r`` the chunks ``r`` and ``2P - 1 - r``, which balances causal work. ``zigzag_per_document`` does that
    to each document.

    Args:
        layout: one of :data:`LAYOUTS`.
        seq_len: T.
        size: P.
        cu_seqlens: [n_docs + 1] document boundaries.

    Raises:
        ValueError: unknown layout, or a length that does not divide; the message says which length would.
    """
    check_layout(layout)
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} is not positive; a sequence needs at least one token")
    if layout == "contiguous":
        _require_multiple("seq_len", seq_len, size, "cp_size", layout)
        length = seq_len // size
        return [[(rank * length, length)] for rank in range(size)]
    if layout == "zigzag":
        _require_multiple("seq_len", seq_len, 2 * size, "2 * cp_size", layout)
        return [_merged(_zigzag(0, seq_len, rank, size)) for rank in range(size)]
    for index, length in enumerate(np.diff(cu_seqlens)):
        _require_multiple(f"length of document {index}", int(length), 2 * size, "2 * cp_size", layout)
    documents = list(zip(cu_seqlens[:-1].tolist(), np.diff(cu_seqlens).tolist()))
    return [
        _merged([piece for start, length in documents for piece in _zigzag(start, length, rank, size)])
        for rank in range(size)
    ]


def check_layout(layout: str) -> None:
    """Raise ValueError unless ``layout`` is one of :data:`LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")


def positions_of(segments: Segments) -> np.ndarray:
    """[L] int64, global position of each local token."""
    return ragged_arange(np.array([s for s, _ in segments], np.int64), np.array([n for _, n in segments], np.int64))


def ragged_arange(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of ``arange(starts[i], starts[i] + lengths[i])`` for all i, int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


def _zigzag(start: int, length: int, rank: int, size: int) -> Segments:
    chunk = length // (2 * size)
    return [(start + rank * chunk, chunk), (start + (2 * size - 1 - rank) * chunk, chunk)]


def _merged(segments: Segments) -> Segments:
    """Join segments that follow one another; drop empty ones."""
    merged: Segments = []
    for start, length in segments:
        if length == 0:
            continue
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return merged


def _require_multiple(name: str, value: int, divisor: int, rule: str, layout: str) -> None:
    if value % divisor:
        fits = -(-value // divisor) * divisor
        raise ValueError(f"{name}={value} is not divisible by {rule} = {divisor} ({layout} layout); use {fits}")
