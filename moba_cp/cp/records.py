"""What a forward pass of MoBA across ranks leaves for its backward pass, and where the blocks lie that a rank owns.

Legend: n blocks, Hkv key/value heads.
"""

from typing import Any, NamedTuple

from torch import Tensor

from .calls import Call
from .comm import Communicator
from .geometry import BlockGeometry
from .heads.strategy import HeadExchange
from .ways import Way


class OwnedTables(NamedTuple):
    """Where the blocks that this rank owns lie; m of them, or n with those of other ranks."""

    row: Tensor
    """[m] int64, the first row of each."""
    length: Tensor
    """[m] int32, tokens of each."""
    most: int
    """the most blocks that any rank owns"""
    page_row: Tensor
    """[Hkv, n] int64, the first row of each block, -1 for those of other ranks."""
    page_head: Tensor
    """[Hkv, n] int32, the KV head."""


class Pass(NamedTuple):
    """A forward pass: what its backward pass needs beside tensors. It holds no tensors of the call itself."""

    scale: float
    deterministic: bool
    call: Call
    comm: Communicator
    geometry: BlockGeometry
    tables: OwnedTables
    way: Way
    ops: Any

    @property
    def indices(self) -> list[int]:
        """Which of the tensors that depend on the selection are routing indices."""
        return [1]


class HeadPass(NamedTuple):
    """Like :class:`Pass`, where tokens were exchanged for heads."""

    call: Call
    exchange: HeadExchange
    ops: Any

    @property
    def indices(self) -> list[int]:
        """See :attr:`Pass.indices`: of each stage the second."""
        n_saved = self.exchange.n_saved
        return [sum(n_saved[:number]) + 1 for number in range(len(n_saved))]
