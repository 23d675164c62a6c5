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
    producer_registers: int = 0
    """Registers of a thread of the producer, in the kernels of :mod:`.hopper`; 0 for the portable ones."""


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether a GPU is NVIDIA's compute capability 9; AMD's MI300 calls itself 9.4."""
    is_cuda = device.type == "cuda" and torch.version.hip is None
    return is_cuda and torch.cuda.get_device_capability(device)[0] == 9


def select_tile(dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, blocks and warps of a tile of the selection, the same on every GPU that :mod:`.select` serves."""
    if dtype == torch.float32:
        return 32, 32, 4
    return 64, 32, 4


class ScoreTile(NamedTuple):
    """Launch shape of the scores of :mod:`.select_gated`."""

    bm: int
    """Rows, with all their heads that choose together."""
    bn: int
    """Blocks."""
    bk: int
    """Keys at a time, where a block is scored by its keys."""
    warps: int


def score_tile(dtype: torch.dtype, members: int, block_size: int, dim: int) -> ScoreTile:
    """For ``members`` heads that choose together, a power of two; by means if ``block_size`` is 0. The same on every
    GPU."""
    narrow = dtype == torch.float32 or dim > 128
    rows, keys = 32 if dtype == torch.float32 else 64 if narrow else 128, _keys(block_size or 16, 32 if narrow else 128)
    return ScoreTile(max(1, rows // members), 8 if block_size else 32 if narrow else 128, keys, 4 if narrow else 8)


class IndexTile(NamedTuple):
    """Launch shape of a kernel of an index branch; not timed yet."""

    bm: int
    """Rows."""
    bn: int
    """Blocks."""
    bk: int
    """Keys at a time, where a block is scored by its keys."""
    warps: int


def index_tile(dim: int, block_size: int) -> IndexTile:
    """Of the exact scores of :mod:`.index_choice`, in float64; by means if ``block_size`` is 0."""
    rows = 64 if dim <= 64 else 32
    return IndexTile(rows, 8 if block_size else 32, _keys(block_size or 16, 32), 4)


def index_rows_tile(dim: int, n_queries: int, block_size: int, dtype: torch.dtype) -> IndexTile:
    """Of the scores and gradients of :mod:`.index_gradients`, whose rows have ``n_queries`` each, a power of two."""
    rows, keys = (32, 32) if dtype == torch.float32 or dim > 128 else (64, 64)
    return IndexTile(max(1, rows // n_queries), keys, _keys(block_size or 16, keys), 4)


def masses_tile(dim: int, block_size: int, dtype: torch.dtype) -> IndexTile:
    """Of what attention gives blocks, in :mod:`.index_gradients`."""
    narrow = dtype == torch.float32 or dim > 128
    return IndexTile(32 if narrow else 128, 8, _keys(block_size, 32 if narrow else 64), 4 if narrow else 8)


def _keys(block_size: int, most: int) -> int:
    """Keys per tile: the block itself where it is short."""
    return min(most, max(16, next_power_of_2(block_size)))


def forward_tile(
    dim: int, block_size: int, dtype: torch.dtype, device: torch.device, specialized: bool = False
) -> Tile:
    """Tile of the forward kernels; the short-block kernel serves where ``block_size <= bn``."""
    bd = padded_dim(dim)
    if specialized and (tile := specialized_tile("forward", dim, block_size)):
        return tile
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


def dkdv_tile(dim: int, block_size: int, dtype: torch.dtype, device: torch.device, specialized: bool = False) -> Tile:
    """Tile of the dK/dV kernel."""
    bd = padded_dim(dim)
    if specialized and (tile := specialized_tile("dkdv", dim, block_size)):
        return tile
    if dtype == torch.float32:
        return Tile(16 if bd > 128 else 32, _keys(block_size, 32), 512, 4, 1)
    if not is_hopper(device):
        return Tile(32, _keys(block_size, 64 if bd <= 128 else 32), 1024, 4 if bd <= 64 else 8, 1)
    if bd > 128:
        return Tile(32, _keys(block_size, 64), 1024, 8, 1)
    # Five stages: one for the row numbers, the rest keep two tiles of gathered rows in flight.
    bn = _keys(block_size, 128)
    # With even choices a block has about k times its length in visits; longer lists pay for float32 sums in memory.
    rows = 8192 if 256 <= block_size <= 1024 else 4096 if bd == 128 else 2048
    return Tile(64, bn, rows, 8 if bn * bd > 64 * 64 else 4, 5)


def dq_tile(dim: int, block_size: int, dtype: torch.dtype, device: torch.device, specialized: bool = False) -> Tile:
    """Tile of the dQ kernel."""
    bd = padded_dim(dim)
    if specialized and (tile := specialized_tile("dq", dim, block_size)):
        return tile
    if dtype == torch.float32:
        return Tile(32, _keys(block_size, 32), 32, 4, 1)
    if not is_hopper(device) or bd > 128:
        return Tile(64, _keys(block_size, 32), 64, 4, 1)
    return Tile(64, _keys(block_size, 64), 64, 4, 2)


def dq_by_atomics(
    dim: int, block_size: int, dtype: torch.dtype, device: torch.device, specialized: bool = False
) -> bool:
    """Whether dQ of blocks longer than a tile of keys is summed by atomics, rather than by a kernel of its own."""
    own_kernel = specialized and any(specialized_tile(name, dim, block_size) for name in ("dkdv", "dq"))
    return block_size <= 1024 and not own_kernel


def specialized_tile(name: str, dim: int, block_size: int) -> Tile | None:
    """Tile of a kernel of :mod:`.hopper`: ``forward``, ``dkdv`` or ``dq``; None where the portable one serves."""
    kinds = {64: "half", 128: "short"}
    return SPECIALIZED.get((name, dim, kinds.get(block_size, "long" if block_size <= 1024 else "longer")))


# Where the kernels of :mod:`.hopper` serve: those that were correct and over 2 % faster than the portable ones in one
# run (Triton 3.6.0, bf16, 131,072 tokens; 65,536 at D = 64 and B = 4096). The comment on each: milliseconds of the
# portable kernel and of this one on an H100, for D = 64 and the gradients of B = 4096 on an H200. Where two kernels
# replace one with atomics, that one and the two together took 7.85 and 6.37 at D = 128, 5.02 and 4.17 at D = 64.
SPECIALIZED = {
    # These three on an H200, whole passes without selection. Of 64 (4) heads with one selection for a group, k = 16:
    # B = 64, 65,536 tokens: 18.6, 16.4; B = 128, 131,072 tokens: 47.4, 36.7. Of 16 heads, B = 128, k = 8: 6.82, 5.75.
    ("forward", 128, "half"): Tile(64, 64, 1024, 4, 4, 72),
    ("forward", 128, "short"): Tile(64, 128, 1024, 4, 4, 72),
    ("dkdv", 128, "half"): Tile(64, 64, 4096, 4, 4, 40),  # 64 (4) heads as above, backward with dQ: 43.4, 29.2
    ("forward", 128, "long"): Tile(64, 128, 1024, 4, 2, 56),  # 4 heads, B = 512, k = 8: 3.19, 2.21
    ("forward", 128, "longer"): Tile(64, 128, 512, 4, 2, 56),  # 1 head, B = 4096, k = 12: 5.49, 4.08
    ("dkdv", 128, "short"): Tile(64, 128, 4096, 4, 3, 40),  # 4 heads, B = 128, k = 8, dQ too: 2.02, 1.79
    ("dkdv", 128, "long"): Tile(64, 128, 8192, 4, 4, 40),  # 4 heads, B = 512, k = 8: 4.76, 3.24
    ("dkdv", 128, "longer"): Tile(64, 128, 4096, 4, 4, 40),  # 1 head, B = 4096, k = 12: 11.8, 7.86
    ("dq", 128, "long"): Tile(64, 64, 1024, 4, 3, 40),  # 4 heads, B = 512, k = 8: 3.82, 3.13
    ("dq", 128, "longer"): Tile(64, 64, 256, 4, 3, 40),  # 1 head, B = 4096, k = 12: 7.09, 5.38
    ("forward", 64, "long"): Tile(64, 128, 1024, 4, 4, 56),  # 4 heads, B = 512, k = 8: 1.81, 1.64
    ("forward", 64, "longer"): Tile(64, 128, 256, 4, 4, 56),  # 2 heads, B = 4096, k = 8: 1.97, 1.78
    ("dkdv", 64, "short"): Tile(128, 128, 2048, 4, 3, 40),  # 4 heads, B = 128, k = 8, dQ too: 1.33, 1.09
    ("dkdv", 64, "long"): Tile(64, 128, 8192, 4, 4, 40),  # 4 heads, B = 512, k = 8: with dQ by _dq_kernel
    ("dkdv", 64, "longer"): Tile(64, 128, 4096, 4, 4, 40),  # 2 heads, B = 4096, k = 8: 5.05, 3.40
}
