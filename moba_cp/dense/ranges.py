"""Which keys of a storage each query row sees under causal attention, as rectangles. Host arithmetic only.

Rows and keys are runs of global positions, in ascending order. What a row sees, the keys of its own document at or
before its position, is then one range of the storage, and rows that follow one another see either the same range or
one key more each: full rectangles and causal trapezoids.

Legend: N query rows, R key rows. A segment ``(start, length)`` is a run of global positions.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..host import to_device


class Rectangle(NamedTuple):
    """Rows ``row .. row + n_rows`` and keys ``key .. key + n_keys`` of the storage.

    If ``causal``, the last row sees all the keys and each row before it one fewer (n_keys >= n_rows); otherwise every
    row sees all of them.
    """

    row: int
    n_rows: int
    key: int
    n_keys: int
    causal: bool


class Call(NamedTuple):
    """One call of an attention kernel: rectangles with disjoint rows and disjoint keys, one behind the other."""

    rows: slice | Tensor
    """which query rows take part: a slice, or int64 indices."""
    keys: slice | Tensor
    """which key rows take part: a slice, or int64 indices."""
    causal: bool
    max_rows: int
    """rows of the longest rectangle."""
    max_keys: int
    """keys of the longest rectangle."""
    cu_rows: Tensor | None = None
    """[rectangles + 1] int32 boundaries among the rows taken; None for one rectangle taken alone."""
    cu_keys: Tensor | None = None
    """[rectangles + 1] int32 boundaries among the keys taken; None likewise."""


@dataclass(frozen=True)
class Ranges:
    """What the rows of one rank see of one storage."""

    n_rows: int
    """N."""
    n_keys: int
    """R."""
    rectangles: tuple[Rectangle, ...]
    """in ascending order of rows; a row that sees nothing is in none, every other row in exactly one."""
    one_document: bool
    """whether the whole sequence is one document, so that shapes are the same from batch to batch."""
    _calls: dict = field(default_factory=dict, repr=False, compare=False)

    def calls(self, device: torch.device) -> list[Call]:
        """Few calls that cover all rectangles; built once per device."""
        if device not in self._calls:
            self._calls[device] = [_joint_call(group, device) for group in _groups(self.rectangles)]
        return self._calls[device]

    def single_calls(self, squares: bool = False) -> list[Call]:
        """One call per rectangle; with ``squares`` a causal trapezoid becomes a full rectangle and a causal square."""
        calls = []
        for row, n_rows, key, n_keys, causal in self.rectangles:
            if squares and causal and n_keys > n_rows:
                calls.append(_single_call(row, n_rows, key, n_keys - n_rows, False))
                key, n_keys = key + n_keys - n_rows, n_rows
            calls.append(_single_call(row, n_rows, key, n_keys, causal))
        return calls


def build_ranges(rows, keys, cu_seqlens: np.ndarray) -> Ranges:
    """Ranges of the rows at positions ``rows`` in a storage of the keys at positions ``keys``.

    Args:
        rows, keys: lists of segments, ascending and disjoint.
        cu_seqlens: [n_docs + 1] int64, document boundaries of the whole sequence.
    """
    row_start, row_length, row_offset = _table(rows)
    key_start, key_length, key_offset = _table(keys)
    one_document = int((np.diff(cu_seqlens) > 0).sum()) == 1
    if not len(row_start) or not len(key_start):
        return Ranges(int(row_length.sum()), int(key_length.sum()), (), one_document)
    bounds = np.unique(
        np.concatenate([row_start, row_start + row_length, key_start, key_start + key_length, cu_seqlens])
    )

    def keys_before(position: np.ndarray) -> np.ndarray:
        segment = np.searchsorted(key_start, position, side="right") - 1
        inside = np.minimum(position - key_start[segment], key_length[segment])
        return np.where(segment < 0, 0, key_offset[segment] + inside)

    # Between two bounds all positions share document and segments.
    start, end = bounds[:-1], bounds[1:]
    segment = np.searchsorted(row_start, start, side="right") - 1
    held = (segment >= 0) & (start < row_start[segment] + row_length[segment])
    start, end, segment = start[held], end[held], segment[held]
    document = cu_seqlens[np.searchsorted(cu_seqlens, start, side="right") - 1]
    first, until = keys_before(document), keys_before(end)
    run = {
        "row": row_offset[segment] + start - row_start[segment],
        "n_rows": end - start,
        "key": first,
        "n_keys": until - first,
        "causal": keys_before(start) < until,
    }
    run = {name: values[until > first] for name, values in run.items()}
    return Ranges(
        n_rows=int(row_length.sum()),
        n_keys=int(key_length.sum()),
        rectangles=_merged(run),
        one_document=one_document,
    )


def _table(segments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """start, length, offset in the storage of each segment."""
    start, length = np.array(segments, np.int64).reshape(-1, 2).T
    assert (np.diff(start) >= length[:-1]).all(), "segments are not ascending and disjoint"
    return start, length, np.cumsum(length) - length


def _merged(run: dict[str, np.ndarray]) -> tuple[Rectangle, ...]:
    """Join neighbours that together are one rectangle."""
    if not len(run["row"]):
        return ()
    grown = np.where(run["causal"], run["n_rows"], 0)
    joins = (
        (run["row"][1:] == (run["row"] + run["n_rows"])[:-1])
        & (run["key"][1:] == run["key"][:-1])
        & (run["causal"][1:] == run["causal"][:-1])
        & (run["n_keys"][1:] == run["n_keys"][:-1] + grown[1:])
    )
    begin = np.flatnonzero(np.concatenate([[True], ~joins]))
    last = np.append(begin[1:], len(run["row"])) - 1
    columns = run["row"][begin], np.add.reduceat(run["n_rows"], begin), run["key"][begin], run["n_keys"][last]
    return tuple(Rectangle(*values) for values in zip(*(c.tolist() for c in columns), run["causal"][begin].tolist()))


def _groups(rectangles) -> list[list[Rectangle]]:
    """Rectangles of one mask whose keys follow one another, as few groups as come of taking the first that fits."""
    groups: list[list[Rectangle]] = []
    for rectangle in rectangles:
        for group in groups:
            last = group[-1]
            if last.causal == rectangle.causal and last.key + last.n_keys <= rectangle.key:
                group.append(rectangle)
                break
        else:
            groups.append([rectangle])
    return groups


def _single_call(row: int, n_rows: int, key: int, n_keys: int, causal: bool) -> Call:
    return Call(slice(row, row + n_rows), slice(key, key + n_keys), causal, n_rows, n_keys)


def _joint_call(group: list[Rectangle], device: torch.device) -> Call:
    row, n_rows, key, n_keys, _ = (np.array(column, np.int64) for column in zip(*group))

    def boundaries(lengths):
        return to_device(torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)), device)

    return Call(
        rows=_selector(row, n_rows, device),
        keys=_selector(key, n_keys, device),
        causal=group[0].causal,
        max_rows=int(n_rows.max()),
        max_keys=int(n_keys.max()),
        cu_rows=boundaries(n_rows),
        cu_keys=boundaries(n_keys),
    )


def _selector(start: np.ndarray, length: np.ndarray, device: torch.device) -> slice | Tensor:
    if (start[1:] == (start + length)[:-1]).all():
        return slice(int(start[0]), int(start[-1] + length[-1]))
    picked = np.concatenate([np.arange(s, s + n) for s, n in zip(start, length)])
    return to_device(torch.from_numpy(picked), device)
