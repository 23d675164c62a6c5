"""What it takes to exchange tokens for heads. Host arithmetic, of training and of ``bench exchange``.

Legend: P ranks, h ranks of a team, L local tokens, Hq query heads, Hkv key/value heads, U units of a rank, u query
heads of a unit, D head dim; see :mod:`.tables`.
"""

import math
from dataclasses import dataclass

import torch

from ...dtypes import WIDE
from ..allgather.stages import heads_of_stages
from ..options import ExchangeOptions

# A stage may take so many times what one of an all-gather may: attention to half of a rank's heads at once is faster
# than to one at a time, and twice as many stages keep the host busy. On four H200s 524,288 tokens of 16 heads took
# 49.7 ms so, and 52.3 in stages of one head.
_LARGER = 4
# The part of that from which on the first stage and the last one are halves: 262,144 tokens of 16 heads in two stages
# took 23.9 ms on four H200s, and 20.9 without communication; 2.5 of the difference is how the first one came and the
# last one returned.
_LONG = 0.5


@dataclass(frozen=True)
class HeadCosts:
    """Of a layer; the same on all ranks."""

    h: int
    n_local: int
    """L."""
    heads: tuple[int, int]
    """Hq and Hkv."""
    dim: int
    dtype: torch.dtype
    options: ExchangeOptions

    @property
    def unit(self) -> int:
        """u."""
        n_heads, n_kv = self.heads
        return math.gcd(n_heads // self.h, n_heads // n_kv)

    @property
    def units(self) -> int:
        """U."""
        return self.heads[0] // self.h // self.unit

    @property
    def stages(self) -> list[slice]:
        """Units of each stage."""
        head_bytes = self.h * self.n_local * (self.unit + 2) * self.dim * self.dtype.itemsize
        most = min(self.units, self.options.stages)
        return heads_of_stages(self.units, most, -(-head_bytes // _LARGER), long=_LONG)

    def stage_bytes(self, full: bool) -> tuple[int, int]:
        """Bytes of a stage's rows of the team, and of its results, of whichever pass has more; of ``full`` attention or
        of MoBA."""
        units = max(stage.stop - stage.start for stage in self.stages)
        query, kv = units * self.unit * self.dim * self.dtype.itemsize, 2 * units * self.dim * self.dtype.itemsize
        sums, wire = units * self.unit * WIDE[self.dtype].itemsize, self._gradient_dtype.itemsize
        # Forward has Q, K, V; backward beside them the output's gradient, log-sum-exp and row sums, or the output.
        there = (0 if self.options.keep and not full else query + kv) + query + sums + (query if full else sums)
        back = query + 2 * units * self.dim * wire
        rows = self.h * self.n_local
        return rows * max(query + kv, there), rows * max(query + sums, back)

    @property
    def forward_bytes(self) -> int:
        """Bytes that reach a rank in a forward pass: Q, K, V, and the output with its log-sum-exp."""
        return self._others * (self._query + self._kv + self._query + self._sums)

    @property
    def backward_bytes(self) -> int:
        """In a backward pass: Q, K, V unless they were kept, the output's gradient, log-sum-exp and row sums, and what
        returns."""
        again = 0 if self.options.keep else self._query + self._kv
        grads = self._query + 2 * self.units * self.dim * self._gradient_dtype.itemsize
        return self._others * (again + self._query + 2 * self._sums + grads)

    @property
    def exposed_bytes(self) -> int:
        """Of these, what comes before a pass can compute, or returns after it has: of the first stage and the last. In
        a backward pass dK and dV of the last one return while its dQ is computed."""
        stages, part = self.stages, self._others / self.units
        first, last = (part * (stage.stop - stage.start) for stage in (stages[0], stages[-1]))
        again = 0 if self.options.keep else self._query + self._kv
        coming = self._query + self._kv + again + self._query + 2 * self._sums
        return round(first * coming + last * (self._query + self._sums + self._query))

    @property
    def _gradient_dtype(self) -> torch.dtype:
        """Of dK and dV that return: where ranks share KV heads they are sums yet to be completed."""
        return self.options.wire_dtype(self.dtype) if self.h * self.units > self.heads[1] else self.dtype

    @property
    def _others(self) -> int:
        """Rows of the others that come here; as many of ours return."""
        return (self.h - 1) * self.n_local

    @property
    def _query(self) -> int:
        return self.heads[0] // self.h * self.dim * self.dtype.itemsize

    @property
    def _kv(self) -> int:
        return 2 * self.units * self.dim * self.dtype.itemsize

    @property
    def _sums(self) -> int:
        return self.heads[0] // self.h * WIDE[self.dtype].itemsize
