"""Attention of some heads on one rank that has the whole sequence, by the functions of one device.

Legend: T tokens, n query heads, m KV heads, D head dim, k top-k. See :class:`.strategy.Attention`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ... import dense
from ...blocks import BlockTable, block_table, fitted_block_size, local_pages
from ...config import MoBAConfig
from ...dtypes import WIDE
from ..context import CPContext
from ..full.schedule import schedule_of
from .strategy import Saved


@dataclass(frozen=True)
class LocalMoBA:
    """MoBA; what is saved is the selection, [T, n, k - 1] or one of each KV head, and the routing index, which may be
    missing in backward."""

    config: MoBAConfig
    scale: float
    context: CPContext
    """Of one rank."""
    ops: Any
    """The backend that serves q, see :func:`moba_cp.ops.backend`."""

    @property
    def table(self) -> BlockTable:
        """Where the blocks lie; built at the first call and kept with the context."""
        cp = self.context
        size = fitted_block_size(self.config.block_size, cp.seq_len)
        return cp.cached(BlockTable, size, lambda: block_table(cp.seq_len, size, cp.cu_seqlens, cp.device))

    def forward(
        self, number: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, given: Tensor | None = None
    ) -> tuple[Tensor, Saved]:
        """See :class:`.strategy.Attention`; ``given``: a selection [T, n, k - 1], or one of each KV head, by block
        ids."""
        table, ops = self.table, self.ops
        if given is None:
            selection = self._select(q, k)
        else:
            # What came here may be overwritten by the next stage but one.
            selection = given.clone()
        index = self._index(q, selection, table, k.shape[1])
        seen = selection, table.current_block, table.visible, self.scale
        lse = q.new_empty(q.shape[:2], dtype=WIDE[q.dtype])
        ops.attend(q, local_pages(k, v, table), *seen, index=index, out=(out, lse), overwrite_out=True)
        return lse, [selection, index]

    def backward(
        self,
        number: int,
        saved: Saved,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        dkdv_done: Callable[[], None],
    ) -> None:
        """See :class:`.strategy.Attention`."""
        (q, k, v, dout, lse, delta), (selection, index), table = inputs, saved, self.table
        if index is None:
            index = self._index(q, selection, table, k.shape[1])
        self.ops.attend_backward(
            q,
            local_pages(k, v, table),
            selection,
            table.current_block,
            table.visible,
            self.scale,
            dout,
            lse,
            delta,
            self.config.deterministic,
            index=index,
            out=tuple(grads),
            overwrite_dkv=True,
            overwrite_dq=True,
            dkdv_done=dkdv_done,
        )

    def _select(self, q: Tensor, k: Tensor) -> Tensor:
        gate, table, ops, top_k = self.config.gate, self.table, self.ops, self.config.top_k
        rows, how = (table.first, table.current_block), (gate.shared_by_group, gate.min_recent, gate.sink)
        if gate.score == "max":
            return ops.select_by_keys(q, k, table.start, *rows, table.block_size, top_k, *how)
        means = ops.block_means(k, table.start, table.length, table.block_size)
        return ops.select_blocks(q, means, *rows, top_k, *how)

    def _index(self, q: Tensor, selection: Tensor, table: BlockTable, n_kv: int) -> Tensor | None:
        rows = table.row.expand(n_kv, -1)
        return self.ops.routing_index(q, selection, table.current_block, table.visible, rows)


@dataclass(frozen=True)
class LocalFull:
    """Full attention; nothing is saved."""

    scale: float
    context: CPContext
    """Of one rank."""
    backend: str
    """Kernels, see :func:`moba_cp.dense.choose_backend`."""
    deterministic: bool

    def forward(self, number: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Saved]:
        """See :class:`.strategy.Attention`."""
        ranges = schedule_of(self.context).whole
        kernels = dense.choose_backend(q, ranges, self.backend, self.deterministic)
        partials = dense.Partials(q)
        dense.attend(q, k, v, ranges, self.scale, kernels, partials)
        result, lse = partials.result()
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
        """See :class:`.strategy.Attention`."""
        q, k, v, dout, lse, out = inputs
        ranges = schedule_of(self.context).whole
        kernels = dense.choose_backend(q, ranges, self.backend, self.deterministic)
        sums = dense.Sum(q), dense.Sum(k), dense.Sum(v)
        dense.attend_backward(q, k, v, ranges, self.scale, kernels, dout, out, lse, *sums, self.deterministic)
        for total, target in zip(sums, grads, strict=True):
            if target.dtype == q.dtype:
                target.copy_(total.narrow())
            else:
                total.write_to(target)
        dkdv_done()
