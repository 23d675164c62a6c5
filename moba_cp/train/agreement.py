"""Ranks that do the same: what one of them decides, all follow, and what they were given must be equal.

Objects travel through torch.distributed's pickles, between the ranks of one run alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

# Of a corpus so many bytes are read and compared: all of most, and of a larger one a part of each file.
_CONTENT_BYTES = 256 << 20
_PIECE = 1 << 16
_SHOWN = 80


def all_values(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank; a collective call."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_first(decide: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What ``decide()`` returns on the first rank, on all of them; a collective call.

    Raises:
        ValueError, OSError: on all ranks, what ``decide`` raised on the first.
    """
    result: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            result[0] = decide()
        except (ValueError, OSError) as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    if result[1] is not None:
        raise result[1]
    return result[0]


def require_equal(values: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Refuse to go on unless every rank has equal ``values``: nested dicts by name, of what JSON can hold.

    A collective call; of equal values only digests travel.

    Raises:
        ValueError: on all ranks, with the first name whose values differ, both values and where they stand.
    """
    digests = {name: hashlib.sha256(_canonical(value).encode()).hexdigest() for name, value in values.items()}
    every = all_values(digests, group)
    # All ranks know all digests, so all of them go on here or none.
    names = {name for told in every for name in {**told, **every[0]} if told.get(name) != every[0].get(name)}
    if not names:
        return
    mine = {name: value for name, value in values.items() if name in names}
    flat = all_values({key: _canonical(x) for name, value in mine.items() for key, x in _flat(value, name)}, group)
    for rank, theirs in enumerate(flat):
        for key in {**flat[0], **theirs}:
            here, there = flat[0].get(key, "nothing"), theirs.get(key, "nothing")
            if here != there:
                raise ValueError(
                    f"{key} is {_short(there)} on rank {rank} but {_short(here)} on rank 0; start every rank with the "
                    "same command, config, files and versions"
                )


def content_of(paths: Iterable[Path], limit: int = _CONTENT_BYTES) -> dict[str, str]:
    """A digest of each file's content, by path: of all bytes where all files together have at most ``limit``, else of
    the first, the last and evenly spaced pieces of each.

    Raises:
        ValueError: a file cannot be read.
    """
    paths = sorted(set(paths))
    return {str(path): _content(path, max(2 * _PIECE, limit // max(1, len(paths)))) for path in paths}


def digest_of(content: dict[str, str]) -> str:
    """One digest of what :func:`content_of` returned, wherever the files lie."""
    return hashlib.sha256("\n".join(content.values()).encode()).hexdigest()


def _content(path: Path, limit: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            pieces = -(-size // _PIECE)
            read = min(pieces, limit // _PIECE)
            for i in range(read):
                # The first and the last among them.
                file.seek(i * (pieces - 1) // max(1, read - 1) * _PIECE)
                digest.update(file.read(_PIECE))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return f"{size}:{digest.hexdigest()}"


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, x in value.items() for pair in _flat(x, f"{name}.{key}")]
    return [(name, value)]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
