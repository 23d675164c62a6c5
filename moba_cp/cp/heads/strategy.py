"""Attention where tokens are exchanged for heads, a stage of some heads after the other.

While a stage is computed, the rows of the next one come, and the results of the one before return. :class:`Attention`
says what is computed: it knows nothing of the exchange, and has for each stage all rows of a team of ranks in the order
of the sequence.

Legend as in :mod:`.tables`; n query heads of a stage and m units.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...dtypes import WIDE
from ..calls import Where
from ..comm import wait_for
from .collectives import Collectives, Part, Stage

Saved = list[Tensor | None]


class Attention(Protocol):
    """Attention of some heads to all rows of a team; a collective call of the ranks that have the same heads."""

    def forward(self, number: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *more: Tensor) -> tuple[Tensor, Saved]:
        """Of stage ``number``: writes out [R, n, D] of q [R, n, D] and k, v [R, m, D]; ``more``: the stage's heads of
        what else :meth:`HeadExchange.forward` was given.

        Returns:
            lse [R, n], wide, and what is to be saved for backward.
        """

    def backward(
        self,
        number: int,
        saved: Saved,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        dkdv_done: Callable[[], None],
    ) -> None:
        """Writes gradients.

        Args:
            number: of the stage.
            saved: of the same heads' forward pass.
            inputs: q, k, v, dout [R, n, D], lse [R, n] wide, and what :meth:`HeadExchange.backward` was
                given beside them.
            grads: dq, dk, dv, written in their dtypes; dk and dv have equal strides.
            dkdv_done: to be called once dk and dv are on their way to be written; dq may follow.
        """


Transport = Collectives


class HeadExchange:
    """The passes of one call; between them it holds no tensors of the call."""

    def __init__(self, transport: Transport, attention: Attention, keep: bool):
        """``keep``: the inputs that came here in forward serve backward too."""
        self.transport, self._attention, self._keep = transport, attention, keep
        self.n_saved = [0] * len(transport.tables.stages)
        """Of each stage: tensors that its forward pass saved."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, where: Where, needs_grad: bool, more: Sequence[Part] = ()
    ) -> tuple[Tensor, Tensor, Saved]:
        """out [L, Hq, D] in q's dtype, lse [L, Hq] wide, and what :meth:`backward` needs; ``more``: what the attention
        takes beside q, k and v, and saves itself if its backward pass needs it."""
        transport, attention, saved = self.transport, self._attention, []
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=WIDE[q.dtype])
        parts, targets = [*self._qkv(q, k, v), *more], [_of_queries(out), _of_queries(lse)]
        if needs_grad:
            wire = self._gradient_dtype(k)
            later = [*(() if self._keep else parts[:3]), *map(_of_queries, (out, lse, lse))]
            transport.reserve(later, [Part(k, True, wire), Part(v, True, wire), _of_queries(q)])
        for stage in self._stages(parts, targets, [], where):
            q_heads, k_heads, v_heads, *rest = stage.inputs
            out_heads, _ = transport.results(stage, targets)
            lse_heads, of_stage = attention.forward(stage.number, q_heads, k_heads, v_heads, out_heads, *rest)
            transport.give_back(stage, targets, slice(0, 2), [out_heads, lse_heads], where)
            if needs_grad and self._keep:
                of_stage = [*of_stage, *transport.kept(stage, 3)]
            saved += of_stage
            self.n_saved[stage.number] = len(of_stage)
        return out, lse, saved

    def backward(
        self,
        saved: Saved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out_or_delta: Tensor,
        lse: Tensor,
        dout: Tensor,
        where: Where,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq [L, Hq, D], dk, dv [L, Hkv, D]; dk and dv are wide where units share KV heads.

        Args:
            out_or_delta: what the :class:`Attention` needs beside lse [L, Hq]: the output [L, Hq, D], or row sums of
                output and gradient [L, Hq].
        """
        transport, attention, tables = self.transport, self._attention, self.transport.tables
        dq = q.new_empty(q.shape)
        if tables.shares_kv:
            dk, dv = k.new_zeros(2, *k.shape, dtype=WIDE[k.dtype])
        else:
            dk, dv = k.new_empty(2, *k.shape)
        n_kept, by_stage = 3 if self._keep else 0, []
        for count in self.n_saved:
            by_stage.append(saved[:count])
            saved = saved[count:]
        kept = [of_stage[len(of_stage) - n_kept :] for of_stage in by_stage] if self._keep else []
        parts = [*(() if self._keep else self._qkv(q, k, v)), *map(_of_queries, (dout, lse, out_or_delta))]
        wire = self._gradient_dtype(k)
        targets = [Part(dk, True, wire), Part(dv, True, wire), _of_queries(dq)]
        for stage in self._stages(parts, targets, kept, where):
            dk_heads, dv_heads, dq_heads = transport.results(stage, targets)

            def dkdv_done(stage: Stage = stage, of_kv: tuple[Tensor, Tensor] = (dk_heads, dv_heads)) -> None:
                transport.give_back(stage, targets, slice(0, 2), of_kv, where)

            of_stage = by_stage[stage.number]
            of_stage = of_stage[: len(of_stage) - n_kept]
            grads = dq_heads, dk_heads, dv_heads
            attention.backward(stage.number, of_stage, stage.inputs, grads, dkdv_done)
            transport.give_back(stage, targets, slice(2, 3), [dq_heads], where)
        return dq, dk, dv

    def _qkv(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Part, Part, Part]:
        return _of_queries(q), Part(k, True, k.dtype), Part(v, True, v.dtype)

    def _gradient_dtype(self, k: Tensor) -> torch.dtype:
        """Of dK and dV on the wire: where nobody adds to them they are rounded once, here or there."""
        return self.transport.tables.wire if self.transport.tables.shares_kv else k.dtype

    def _stages(self, parts: list[Part], targets: list[Part], kept: list[Saved], where: Where) -> Iterator[Stage]:
        """All stages, each with its inputs; after the last one the current stream waits for all that returns."""
        transport = self.transport
        units, comm = transport.tables.stages, transport.comm
        transport.open_pass(parts, targets, where)
        ready = comm.record_event(parts[0].tokens)

        def begin(number: int) -> Stage:
            stage = Stage(number, units[number])
            transport.begin(stage, parts, ready, where)
            return stage

        ahead, before, done = [begin(number) for number in range(min(transport.ahead, len(units)))], None, []
        for number in range(len(units)):
            stage = ahead.pop(0)
            stage.inputs = [*(kept[number] if kept else ()), *stage.wait()]
            stage.wait = None
            yield stage
            stage.inputs = None
            if before is not None:
                done += transport.collect(before)
            before = stage
            if number + transport.ahead < len(units):
                ahead.append(begin(number + transport.ahead))
        done += transport.collect(before)
        transport.close_pass()
        for event in done:
            wait_for(event)


def _of_queries(tokens: Tensor) -> Part:
    return Part(tokens, False, tokens.dtype)
