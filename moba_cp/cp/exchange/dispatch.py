"""Sending query rows to blocks: the owner attends to its blocks for them and answers with partial results.

Legend: P ranks, L local tokens, Hq query heads, Hkv key/value heads, D head dim, S = k - 1 selected blocks per row,
N rows received in one stage, M rows sent in one stage, m blocks owned by a rank. The owner sees the rows as one query
head, and its (KV head, block) pairs as blocks of one KV head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...blocks import Pages
from ..calls import Where
from ..comm import Communicator
from .plan import RowLists, Sizes
from .tables import WireTables


@dataclass
class RowStage:
    """The rows that move in one stage."""

    send: list[int]
    """rows sent to each rank"""
    receive: list[int]
    """rows received from each rank"""
    slots: Tensor
    """[M] int32, indices into the flattened [Hq, L, S] slots whose rows are sent."""
    heads: slice
    """the query heads of which rows may be sent"""
    dest: Tensor
    """[Hkv, n] int32, see :class:`.plan.RowLists`."""
    block_indices: Tensor
    """[L, Hq, S] int32."""
    owned: Pages
    """of this rank"""
    wire: WireTables
    keep: bool
    """What was received in forward serves backward too."""
    ops: Any
    int_ops: Any
    """The backends of floats and of integers, see :mod:`moba_cp.ops`."""
    comm: Communicator
    where: Where
    received: tuple[Tensor, Tensor] | None = None
    """q [N, D], and the pairs that each row attends to, [N, S] int32, as this rank numbers them; -1 for none."""
    index: Tensor | None = None
    """Their routing index."""

    def send_rows(self, q: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start sending rows of q [L, Hq, D] with the blocks they want; a collective call."""
        return self._send("rows", self._rows_of(q), self._numbers())

    def answer(self, wait: Callable[[], tuple[Tensor, Tensor]], scale: float) -> Callable[[], tuple[Tensor, Tensor]]:
        """Attend for the rows received and start sending partial results back; a collective call.

        Returns:
            A function that waits for out [M, D] and lse [M], wide, of the rows this rank sent.
        """
        q, numbers = wait()
        numbers = self._read(numbers)
        pages = self._single_head()
        rows = q[:, None], numbers[:, None], None, None
        self.index = self.ops.routing_index(*rows, pages.row)
        out, lse = self.ops.attend(q[:, None], pages, *rows[1:], scale, index=self.index)
        if self.keep:
            self.received = q, numbers
        return self._return("partial_outputs", out[:, 0], lse[:, 0])

    def merge(self, wait: Callable[[], tuple[Tensor, Tensor]], out: Tensor, lse: Tensor) -> None:
        """Join the partial results of :meth:`answer` to out [L, Hq, D] and lse [L, Hq], wide."""
        part, part_lse = wait()
        if part.shape[0]:
            self.ops.merge_rows(out[:, self.heads], lse[:, self.heads], part, part_lse, self._sent_at())

    def send_gradients(self, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Start sending what the gradients of the rows need; a collective call. lse, delta [L, Hq] are final."""
        sums = self._rows_of(torch.stack([lse, delta], 2))
        again = () if self.received else (self._rows_of(q), self._numbers())
        return self._send("rows_backward", self._rows_of(dout, q.dtype), sums, *again)

    def answer_gradients(
        self, wait: Callable[[], tuple[Tensor, ...]], scale: float, kv_grads: Tensor, dtype: torch.dtype, deterministic
    ) -> Callable[[], tuple[Tensor]]:
        """Gradients for the rows received: dK and dV are added to ``kv_grads``, dq goes back; a collective call.

        Args:
            kv_grads: [2, L + X, Hkv, D] wide, the owner's gradients of K and V.
            dtype: dtype of dq on the wire.

        Returns:
            A function that waits for dq [M, D] of the rows this rank sent.
        """
        dout, sums, *again = wait()
        q, numbers = self.received or (again[0], self._read(again[1]))
        lse, delta = sums[:, :1].contiguous(), sums[:, 1:].contiguous()
        dq = torch.zeros(q.shape[0], 1, q.shape[1], dtype=kv_grads.dtype, device=q.device)
        self.ops.attend_backward(
            q[:, None], self._single_head(), numbers[:, None], None, None, scale, dout[:, None], lse, delta,
            deterministic, index=self.index, out=(dq, *kv_grads),
        )  # fmt: skip
        return self._return("row_gradients", dq[:, 0].to(dtype))

    def add(self, wait: Callable[[], tuple[Tensor]], dq: Tensor) -> None:
        """Add what :meth:`answer_gradients` brings to dq [L, Hq, D], wide."""
        (part,) = wait()
        if part.shape[0]:
            self.ops.add_rows(dq[:, self.heads], part.to(dq.dtype), self._sent_at())

    def _sent_at(self) -> Tensor:
        """[L, heads, S] int32: which of the rows sent stands for this slot of the stage's heads, -1 for none."""
        n_rows, _, n_slots = self.block_indices.shape
        shape = self.heads.stop - self.heads.start, n_rows, n_slots
        index = torch.full(shape, -1, dtype=torch.int32, device=self.block_indices.device)
        at = self.slots.long() - self.heads.start * n_rows * n_slots
        index.view(-1)[at] = torch.arange(at.numel(), dtype=torch.int32, device=index.device)
        return index.transpose(0, 1).contiguous()

    def _rows_of(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[M, D] of x [L, Hq, D], for each row sent."""
        return self.ops.gather_rows(x, self.slots, self.block_indices.shape[2], dtype or x.dtype)

    def _numbers(self) -> Tensor:
        """For each row sent, the pairs its owner attends to, numbered by the owner; -1 for none.

        As bytes [M, ...], which every transport takes.
        """
        numbers = self.int_ops.row_ids(
            self.block_indices, self.slots, self.dest, self.wire.number, self.wire.number_dtype
        )
        return numbers.view(-1).view(torch.uint8).view(numbers.shape[0], numbers.shape[1] * numbers.itemsize)

    def _read(self, numbers: Tensor) -> Tensor:
        """[N, S] int32 of what :meth:`_numbers` made."""
        n_slots = self.block_indices.shape[2]
        return numbers.view(-1).view(self.wire.number_dtype).view(numbers.shape[0], n_slots).int()

    def _send(self, kind: str, *parts: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return self.comm.all_to_all(parts, self.send, self.receive, kind, self.where)

    def _return(self, kind: str, *parts: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return self.comm.all_to_all(parts, self.receive, self.send, kind, self.where)

    def _single_head(self) -> Pages:
        """This rank's (KV head, block) pairs as blocks of one KV head: number ``head * m + index``."""
        ids, owned = self.wire.own_blocks, self.owned
        return Pages(
            owned.k,
            owned.v,
            owned.row[:, ids].reshape(1, -1),
            owned.head[:, ids].reshape(1, -1),
            owned.length[ids].repeat(owned.row.shape[0]),
            owned.block_size,
        )


def row_stages(
    lists: RowLists,
    sizes: Sizes,
    block_indices: Tensor,
    owned: Pages,
    wire: WireTables,
    keep: bool,
    ops,
    int_ops,
    comm: Communicator,
    where: Where,
) -> list[RowStage]:
    """All stages of a plan."""
    receive, send = ([row[:-1] for row in side] for side in sizes.rows)
    group, begin, stages = block_indices.shape[1] // owned.row.shape[0], 0, []
    for number, kv_heads in enumerate(wire.kv_heads):
        end = begin + sum(send[number])
        stages.append(
            RowStage(
                send=send[number],
                receive=receive[number],
                slots=lists.slots[begin:end],
                heads=slice(kv_heads.start * group, kv_heads.stop * group),
                dest=lists.dest,
                block_indices=block_indices,
                owned=owned,
                wire=wire,
                keep=keep,
                ops=ops,
                int_ops=int_ops,
                comm=comm,
                where=where,
            )
        )
        begin = end
    return stages


N_SAVED = 3
"""Tensors that forward leaves for backward in each stage."""


def saved_of(stages: list[RowStage]) -> list[Tensor | None]:
    """What forward leaves for :func:`restore` before backward."""
    return [x for stage in stages for x in (stage.index, *(stage.received or (None, None)))]


def restore(stages: list[RowStage], saved: list[Tensor | None]) -> None:
    """Take what :func:`saved_of` gave."""
    for number, stage in enumerate(stages):
        stage.index, *received = saved[N_SAVED * number : N_SAVED * (number + 1)]
        stage.received = None if received[0] is None else tuple(received)
