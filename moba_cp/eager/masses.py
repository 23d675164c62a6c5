"""What attention gives blocks: its softmax added up over a block's keys and over the query heads of one KV head.

Legend: R query rows, G query heads of the KV head, D head dim, T keys, B block size, n blocks, S blocks of a row. Wide
means float32, or float64 for float64 inputs.
"""

import torch
from torch import Tensor

from .select import _elements_at_once


def block_masses(q: Tensor, k: Tensor, lse: Tensor, start: Tensor, block_size: int, scale: float) -> Tensor:
    """The masses of all rows in all blocks.

    Args:
        q: [R, G, D].
        k: [T, D].
        lse: [R, G] wide, the log-sum-exp of the scores of all keys that a row attends to.
        start: [n] int64, first key of each block.
        block_size: B; a block of which there are fewer keys in k may get anything.
        scale: factor of the scores.

    Returns:
        [R, n] wide; of a block that a row does not attend to, or not whole, a number that means nothing.
    """
    masses = lse.new_empty(q.shape[0], start.numel())
    rows = (q.to(lse.dtype) * scale).flatten(0, 1)
    offset = torch.arange(block_size, device=k.device)
    step = max(1, _elements_at_once(q) // max(1, rows.shape[0] * block_size))
    for lo in range(0, start.numel(), step):
        at = (start[lo : lo + step, None] + offset).clamp(max=k.shape[0] - 1)
        scores = (rows @ k[at.flatten()].to(lse.dtype).T).unflatten(0, lse.shape).sub_(lse[..., None])
        masses[:, lo : lo + step] = _added_up(scores, block_size)
    return masses


def selected_masses(q: Tensor, k: Tensor, lse: Tensor, start: Tensor, block_size: int, scale: float) -> Tensor:
    """:func:`block_masses` of some blocks of each row, all of whose keys it attends to.

    Args:
        start: [R, S] int64, first key of each block; -1 for none.

    Returns:
        [R, S] wide, 0 for none.
    """
    masses = lse.new_empty(start.shape)
    offset = torch.arange(block_size, device=k.device)
    step = max(1, _elements_at_once(q) // max(1, start.shape[1] * block_size * q.shape[2]))
    for lo in range(0, q.shape[0], step):
        some = slice(lo, lo + step)
        at = (start[some].clamp(min=0)[..., None] + offset).clamp(max=k.shape[0] - 1)
        keys = k[at.flatten(1)].to(lse.dtype)
        scores = torch.bmm(q[some].to(lse.dtype) * scale, keys.transpose(1, 2)).sub_(lse[some, :, None])
        masses[some] = _added_up(scores, block_size)
    return masses.masked_fill_(start < 0, 0)


def _added_up(scores: Tensor, block_size: int) -> Tensor:
    """[R, n] of scores [R, G, n * B] less their log-sum-exp; overwritten. Those above 0 are of keys that are not
    attended to: they must not become infinite."""
    return scores.clamp_(max=0).exp_().unflatten(2, (-1, block_size)).sum((1, 3))
