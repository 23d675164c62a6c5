"""Full attention across ranks where tokens are exchanged for heads (:mod:`..heads`).

Between ranks with the same heads, if there are several, a ring or an all-gather serves.

Legend: L local tokens, Hq query heads, Hkv key/value heads, R rows and n query heads of a stage, D head dim.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ..calls import Where
from ..context import CPContext
from ..heads.choice import head_ranks
from ..heads.copies import team_transport
from ..heads.local import LocalFull
from ..heads.strategy import HeadExchange, Saved
from ..heads.tables import HeadTables, build_head_tables
from . import allgather, ring
from .choice import without_heads


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cp: CPContext, backend: str, deterministic: bool, where: Where
):
    """out [L, Hq, D] in q's dtype, lse [L, Hq] wide, of q [L, Hq, D], k, v [L, Hkv, D]; a collective call."""
    out, lse, _ = _exchange(q, k, scale, cp, backend, deterministic, where).forward(q, k, v, where, False)
    return out, lse


def backward(q, k, v, dout, out, lse, scale: float, cp: CPContext, backend: str, deterministic: bool, where: Where):
    """dq [L, Hq, D], dk, dv [L, Hkv, D] in any dtype; dout, out like q, lse [L, Hq] wide; a collective call."""
    exchange = _exchange(q, k, scale, cp, backend, deterministic, where)
    return exchange.backward([], q, k, v, out, lse, dout, where)


def _exchange(
    q: Tensor, k: Tensor, scale: float, cp: CPContext, backend: str, deterministic: bool, where: Where
) -> HeadExchange:
    h = head_ranks(cp, q, k, None, forced=True).h
    key = h, q.shape[1], k.shape[1:], k.dtype
    tables = cp.cached(HeadTables, key, lambda: build_head_tables(cp, h, q, k))
    if tables.inner.size == 1:
        attention = LocalFull(scale, tables.inner, backend, deterministic)
    else:
        attention = _FullOfHeads(scale, tables.inner, backend, deterministic, where)
    return HeadExchange(team_transport(cp, key, tables), attention, False)


class _FullOfHeads:
    """Full attention of some heads among the ranks that have them, see :class:`..heads.strategy.Attention`."""

    def __init__(self, scale: float, context: CPContext, backend: str, deterministic: bool, where: Where):
        self._rest = scale, context, backend, deterministic, where

    def forward(self, number: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Saved]:
        """See :class:`..heads.strategy.Attention`."""
        result, lse = self._way(k).forward(q, k, v, *self._rest)
        out.copy_(result)
        return lse, []

    def backward(
        self,
        number: int,
        saved: Saved,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        dkdv_done: Callable[[], None],
    ) -> None:
        """See :class:`..heads.strategy.Attention`."""
        q, k, v, dout, lse, out = inputs
        found = self._way(k).backward(q, k, v, dout, out, lse, *self._rest)
        for target, grad in zip(grads, found, strict=True):
            target.copy_(grad)
        dkdv_done()

    def _way(self, k: Tensor):
        return {"ring": ring, "allgather": allgather}[without_heads(k, self._rest[1])]
