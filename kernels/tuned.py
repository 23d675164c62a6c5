"""Tile shapes by problem, so that nothing is autotuned at a user's first step.

The Hopper entries were measured on an H100 (see the README's table). Other GPUs get smaller tiles that fit their shared
memory. Choices depend on the head dim, block size and dtype alone, never on the number of rows.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from .common import next_power_of_2, padded_dim


class Tile(NamedTuple):
    """Launch shape of one attention kernel."""

    bm: int
    """Visits per tile."""
    bn: int
    """Keys per tile."""
    task_rows: int
    """Visits per task."""
    warps: int
    stages: int
    specialized: bool = False
    """Whether it is for a kernel of :mod:`.hopper`."""


@lru_cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def select_tile(dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, blocks and warps of a tile of the selection. The same on every GPU, so that selections are too."""
    if dtype == torch.float32:
        return 32, 32, 4
    return 64, 64, 4


def _keys(block_size: int, most: int) -> int:
    """Keys per tile: the block itself where it is short."""
    return min(most, max(16, next_power_of_2(block_size)))


def forward_tile(
    dim: int, block_size: int, dtype: torch.dtype, device: torch.device, specialized: bool = False
) -> Tile:
    """Tile of the forward kernels; the short-block kernel serves where ``block_size <= bn``."""
    bd = padded_dim(dim)
    if specialized:
        if block_size <= 128:
            return Tile(64, 128, 1024, 12, 5 if dim == 128 else 8, True)
        return Tile(64, 128, 1024 if block_size <= 1024 else 256, 12, 2 if dim == 128 else 4, True)
    if dtype == torch.float32:
        bn = _keys(block_size, 32)
        return Tile(32, bn, 128 if block_size <= bn else 32, 4, 1)
    if not is_hopper(device):
        bn = _keys(block_size, 64 if bd <= 128 else 32)
        return Tile(64, bn, 256 if block_size <= bn else 64, 4, 2)
    if block_size <= 128:
        bn = _keys(block_size, 128 if bd <= 128 else 64)
        return Tile(64, bn, 1024 if block_size <= bn else 64, 4, 3 if bd == 128 else 2)
    return Tile(64, 64, 64, 4, 2 if bd > 128 else 3)


def key_tile(
    dim: int, block_size: int, dtype: torch.dtype, device: torch.device, specialized: bool = False
) -> Tile:
    """Tile of the backward kernel that holds keys."""
    bd = padded_dim(dim)
    rows = 8192 if 256 <= block_size <= 1024 else 4096 if bd == 128 else 2048
    if specialized:
        # Half of dQ is 64 columns of 64 rows, or 64 rows.
        bm = 128 if dim == 64 and block_size == 128 else 64
        return Tile(bm, 128, rows, 12, 3 if block_size == 128 else 4, True)
    if dtype == torch.float32:
        return Tile(16 if bd > 128 else 32, _keys(block_size, 32), 512, 4, 1)
    if not is_hopper(device):
        return Tile(32, _keys(block_size, 64 if bd <= 128 else 32), 1024, 4 if bd <= 64 else 8, 1)
    if bd > 128:
        return Tile(32, _keys(block_size, 64), 1024, 8, 1)
    # Five stages: one for the row numbers, the rest keep two tiles of gathered rows on their way.
    bn = _keys(block_size, 128)
    # With even choices a block has about k times its length in visits; longer lists pay for float32 sums in memory.
    return Tile(64, bn, rows, 8 if bn * bd > 64 * 64 else 4, 5)


def query_tile(
    dim: int, block_size: int, dtype: torch.dtype, device: torch.device, specialized: bool = False
) -> Tile:
    """Tile of the backward kernel that holds queries."""
    bd = padded_dim(dim)
    if specialized:
        return Tile(64, 64, 1024 if block_size <= 1024 else 256, 12, 3, True)
    if dtype == torch.float32:
        return Tile(32, _keys(block_size, 32), 32, 4, 1)
    if not is_hopper(device) or bd > 128:
        return Tile(64, _keys(block_size, 32), 64, 4, 1)
    return Tile(64, _keys(block_size, 64), 64, 4, 2)


def dq_by_atomics(dim: int, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether dQ of blocks longer than a tile of keys is summed by atomics, rather than by a kernel of its own."""
    return block_size <= 1024
