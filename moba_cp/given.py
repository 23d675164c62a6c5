"""Selections that come from outside or go there: blocks numbered within the query's own document.

Legend: T query rows, Hq query heads, Hkv key/value heads, G heads of a selection (Hq, or Hkv where the heads of a group
share it), S blocks per row and head.
"""

import torch
from torch import Tensor

from .config import MAX_TOP_K

# Numbers that are looked at together.
_AT_ONCE = 1 << 24


def check_block_indices(block_indices: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless ``block_indices`` is a selection for q [T, Hq, D] and k [., Hkv, D], whatever its
    values."""
    n_rows, n_heads, n_kv = q.shape[0], q.shape[1], k.shape[1]
    rule = f"pass int32 [{n_rows}, {n_heads}, S]"
    if n_kv != n_heads:
        rule += f", or [{n_rows}, {n_kv}, S] for one selection of the heads of each group,"
    rule += f" with S up to {MAX_TOP_K - 1}, on q's device"
    if not isinstance(block_indices, Tensor):
        raise ValueError(f"block_indices is a {type(block_indices).__name__}; {rule}")
    shape = tuple(block_indices.shape)
    fits = len(shape) == 3 and shape[0] == n_rows and shape[1] in (n_heads, n_kv) and shape[2] < MAX_TOP_K
    if not fits or block_indices.dtype != torch.int32 or block_indices.device != q.device:
        raise ValueError(
            f"block_indices has shape {shape}, dtype {block_indices.dtype} and lies on {block_indices.device}; {rule}"
        )


def first_fault(block_indices: Tensor, first: Tensor, current_block: Tensor) -> tuple[int, int, int, int] | None:
    """(row, head of the selection, the number named there, the number of the row's own block) of the first row that
    names what it must not; None if there is none. Waits for the device.

    Args:
        block_indices: [T, G, S] int32.
        first, current_block: [T] int32, see :class:`.blocks.BlockTable`.
    """
    if block_indices.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "check_indices=True waits for the device, which a CUDA graph cannot; check before capture, and leave it out"
        )
    own = current_block - first
    step = max(1, _AT_ONCE // max(1, block_indices[:1].numel()))
    for lo in range(0, block_indices.shape[0], step):
        given = block_indices[lo : lo + step]
        limit = own[lo : lo + step, None, None]
        named = given.sort(-1).values
        again = torch.zeros_like(named, dtype=torch.bool)
        again[..., 1:] = (named[..., 1:] == named[..., :-1]) & (named[..., 1:] >= 0)
        wrong = (named < -1) | (named >= limit) | again
        if wrong.any():
            row, head, slot = wrong.nonzero()[0].tolist()
            return lo + row, head, int(named[row, head, slot]), int(limit[row, 0, 0])
    return None


def fault_message(row: int, head: int, number: int, own: int, what: str = "row") -> str:
    """What is wrong with a :func:`first_fault`."""
    if number < -1:
        said = "which is neither a block nor -1 for none"
    elif number < own:
        said = "more than once"
    elif number == own:
        said = "its own block, which is always attended to"
    else:
        said = f"which lies behind its own block, {own}, or not in its document"
    rule = f"name each of the blocks 0 to {own - 1} at most once" if own else "name none"
    return (
        f"block_indices names block {number} for {what} {row} (head {head} of the selection), {said}; {rule} there, "
        "and put -1 in the slots that are left"
    )


def numbers_in_documents(selection: Tensor, first: Tensor) -> Tensor:
    """A selection of block ids [T, G, S] as numbers within each row's document, -1 for none; first [T] int32."""
    return torch.where(selection < 0, selection, selection - first[:, None, None])
