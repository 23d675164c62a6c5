"""What every way across ranks takes and gives; :func:`moba_cp.cp.moba.choose` says which one serves a call.

Legend: L local tokens, X extra rows (assembled straddling blocks), Hq query heads, Hkv key/value heads, D head dim,
S = k - 1 selected blocks per row.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ..blocks import Pages
from .calls import Where


class Seen(NamedTuple):
    """What each query row sees, in the order in which the backends take it."""

    block_indices: Tensor
    """[L, Hq, S] int32 block ids, -1 for none; a row sees these whole."""
    current: Tensor
    """[L] int32, the block that each row lies in."""
    visible: Tensor
    """[L] int32, keys of its current block that a row sees."""
    scale: float


@dataclass(frozen=True)
class Queries:
    """This rank's query rows."""

    q: Tensor
    """[L, Hq, D]."""
    seen: Seen
    index: Tensor | None
    """Of all blocks wherever they lie, see :func:`moba_cp.eager.routing_index`: a call passes over those that its
    storage does not have."""


@dataclass(frozen=True)
class OutputGradient:
    """What the backward pass knows of each row's output."""

    dout: Tensor
    """[L, Hq, D]."""
    lse: Tensor
    """[L, Hq] wide, over all that the row sees."""
    delta: Tensor
    """[L, Hq] wide, row sums of dout * out."""
    deterministic: bool


class Attended(NamedTuple):
    """The result of a forward pass."""

    out: Tensor
    """[L, Hq, D], wide or in q's dtype."""
    lse: Tensor
    """[L, Hq], wide."""
    saved: list[Tensor | None]
    """All that backward needs and that depends on what was selected. Tensors alone, so that autograd keeps them: where
    a checkpoint computes the layer again it drops these, and backward gets those of one and the same forward."""
    way: "Way"
    """What :meth:`Way.backward` is to be called on."""


class Way(Protocol):
    """One call's way across ranks; all methods are collective calls.

    Between forward and backward it holds no tensors of the call.
    """

    def start(self, owned: Pages, where: Where, saved: list[Tensor | None] | None = None) -> None:
        """Start what does not depend on the selection; ``owned`` are the blocks of this rank.

        ``saved``: what forward saved, if this is the backward pass.
        """

    def plan(self, block_indices: Tensor, owned: Pages) -> None:
        """The selection [L, Hq, S] has been made: start what depends on it alone. Does not wait for the device."""

    def forward(self, queries: Queries, owned: Pages) -> Attended:
        """Attention of the queries to all that they see."""

    def backward(
        self, saved: list[Tensor | None], queries: Queries, output: OutputGradient, owned: Pages, where: Where
    ) -> tuple[Tensor, Tensor]:
        """dq [L, Hq, D], and dk and dv as [2, L + X, Hkv, D], in any dtype."""
