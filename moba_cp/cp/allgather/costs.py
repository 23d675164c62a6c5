"""What it takes to bring all K and V of a layer to every rank. Host arithmetic, of training and of ``bench exchange``.

Legend: P ranks, L local tokens, W most rows (local and extra) of any rank, Hkv key/value heads, D head dim.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..geometry import BlockGeometry
from ..options import ExchangeOptions

# Of H100s and H200s with NVLink: bytes per second that copy engines bring, and what a forward pass takes for a row of
# one head to visit one block, in seconds per element of D: for the row, and for each of the block's tokens.
COPY_RATE = 3e11
VISIT_SECONDS = 3.7e-12, 4.8e-15
# The time of a backward pass over that of a forward pass. This and the next one fit the figures of H200s that are in
# tests/cp/test_predictions.py.
BACKWARD = 1.94
# For each block of the sequence, in seconds per row and element of D: what selecting takes, and what rows that lie
# farther apart take longer to fetch.
SELECT_SECONDS = 9.6e-15


def forward_seconds(n_rows: int, dim: int, block_size: int, top_k: int) -> float:
    """About what a forward pass of ``n_rows`` (token, query head) pairs takes, but for the selection."""
    per_row, per_token = VISIT_SECONDS
    return n_rows * top_k * dim * (per_row + per_token * block_size)


def pass_seconds(n_rows: int, dim: int, block_size: int, top_k: int, n_tokens: int) -> float:
    """What a forward and a backward pass take, the selection included; ``n_tokens``: of the whole sequence."""
    selecting = n_rows * dim * n_tokens / block_size * SELECT_SECONDS
    return (1 + BACKWARD) * forward_seconds(n_rows, dim, block_size, top_k) + selecting


@dataclass(frozen=True)
class GatherCosts:
    """What an all-gather moves, and whether a plan would be better; the same on all ranks."""

    geometry: BlockGeometry
    """of any rank"""
    n_kv: int
    dim: int
    dtype: torch.dtype
    options: ExchangeOptions
    by_copies: bool
    """Copy engines bring what a rank's queries can see; otherwise collectives bring everything."""

    @property
    def size(self) -> int:
        """P."""
        return len(self.geometry.owned)

    @property
    def arriving_bytes(self) -> int:
        """K and V of all other ranks, padded to W rows each: the most that reaches a rank in a pass."""
        return (self.size - 1) * self.geometry.most_rows * self._token_bytes

    def bytes_of(self, rank: int) -> int:
        """Bytes that reach ``rank``, forward and backward."""
        rows = self._rows
        return self._bytes(rows[rank].sum(), rows[:, rank].sum())

    @property
    def total_bytes(self) -> int:
        """Bytes that reach all ranks together, forward and backward."""
        total = self._rows.sum()
        return self._bytes(total, total)

    def at_once(self, n_rows: int, top_k: int) -> bool:
        """Whether nothing is to be planned, for ``n_rows`` local (token, query head) pairs.

        In ``auto``, whether copy engines bring K and V in less time than a forward pass takes.
        """
        if self.options.mode != "auto":
            return self.options.mode == "allgather"
        computing = forward_seconds(n_rows, self.dim, self.geometry.block_size, top_k)
        return self.by_copies and self.arriving_bytes / COPY_RATE <= computing

    def instead_of(self, planned_bytes: float) -> bool:
        """Whether ``auto`` all-gathers where plans of all ranks together would move so much, forward and backward."""
        return planned_bytes >= self.better_from

    @property
    def better_from(self) -> float:
        """Bytes of all ranks' plans from which on ``auto`` all-gathers."""
        return self.options.share_to_gather(self.by_copies) * self.total_bytes

    @cached_property
    def _rows(self) -> np.ndarray:
        """[P, P] int64, rows of rank j that come to rank i."""
        geometry = self.geometry
        parts = np.array([geometry.cut, geometry.most_rows - geometry.cut])
        comes = geometry.sees if self.by_copies else np.ones_like(geometry.sees)
        return (comes * parts).sum(2) * (1 - np.eye(self.size, dtype=np.int64))

    def _bytes(self, arriving: np.int64, leaving: np.int64) -> int:
        """Of rows that arrive, and of rows that leave and whose gradients come back."""
        times = 1 if self.options.keep else 2
        gradient_bytes = self._token_bytes // self.dtype.itemsize * self.options.wire_dtype(self.dtype).itemsize
        return self._token_bytes * int(arriving) * times + gradient_bytes * int(leaving)

    @property
    def _token_bytes(self) -> int:
        """K and V of a token, all heads."""
        return self.n_kv * 2 * self.dim * self.dtype.itemsize
