"""Sending query rows to blocks: the owner attends to its blocks for them and answers with partial results.

Legend: P ranks, L local tokens, Hq query heads, Hkv key/value heads, D head dim, S = k - 1 chosen blocks per row,
N rows received in one stage, M rows sent in one stage, m blocks owned by a rank. The owner sees the rows as one query
head, and its (KV head, block) pairs as blocks of one KV head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..blocks import Pages
from .comm import Communicator
from .geometry import BlockGeometry
from .plan import RowLists


class RowStage:
    """The rows that move in one stage."""

    def __init__(
        self,
        lists: RowLists,
        sizes: list,
        stage: int,
        heads: slice,
        chosen: Tensor,
        owned: Pages,
        geometry: BlockGeometry,
        comm: Communicator,
        keep: bool,
    ):
        """``sizes`` are the host's copy of ``lists.sizes``; ``heads`` are the query heads of which rows may be sent;
        ``owned`` this rank's pages."""
        receive, send = ([row[:-1] for row in side] for side in sizes)
        self.receive, self.send = receive[stage], send[stage]
        begin = sum(map(sum, send[:stage]))
        self.n_slots = chosen.shape[2]
        slot = lists.slots[begin : begin + sum(self.send)].long()
        n_rows = chosen.shape[0]
        self.slot = slot % self.n_slots
        self.token = slot // self.n_slots % n_rows
        self.head = slot // self.n_slots // n_rows
        self.chosen, self.place, self.stage = chosen, lists.place, stage
        self.geometry, self.comm, self.keep = geometry, comm, keep
        self.owned, self.heads = owned, heads
        self._received: tuple[Tensor, Tensor] | None = None
        self._routing: list[Tensor] = []

    def send_forward(self, q: Tensor) -> Callable[[], None]:
        """Start sending rows of q [L, Hq, D] with the blocks they want; a collective call."""
        wait = self.comm.all_to_all(_pack([q[self.token, self.head], self._ids()]), self.send, self.receive, "rows")
        dim, dtype = q.shape[2], q.dtype

        def arrive() -> None:
            self._received = _unpack(wait(), [(dim, dtype), (self.n_slots, self._id_dtype)])

        return arrive

    def answer_forward(self, scale: float) -> Callable[[], tuple[Tensor, Tensor]]:
        """Attend for the rows received and start sending partial results back; a collective call.

        Returns:
            A function that waits and returns out [M, D] and lse [M], wide, for the rows this rank sent.
        """
        q, ids = self._received
        pages = _single_head(self.owned, self.geometry, self.comm.rank)
        out, lse = ops.attend(q[:, None], pages, ids.int()[:, None], None, None, scale, index=self._routing)
        if not self.keep:
            self._received = None
        wait = self.comm.all_to_all(torch.cat([out[:, 0], lse], 1), self.receive, self.send, "partial_outputs")

        def arrive() -> tuple[Tensor, Tensor]:
            answer = wait()
            return answer[:, :-1], answer[:, -1]

        return arrive

    def send_backward(self, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor) -> Callable[[], None]:
        """Start sending what the gradients of the rows need; a collective call. lse, delta [L, Hq] are final."""
        at = self.token, self.head
        wide = torch.stack([lse[at], delta[at]], 1)
        again = [] if self.keep else [q[at], self._ids()]
        packed = _pack([dout[at].to(q.dtype), wide, *again])
        wait = self.comm.all_to_all(packed, self.send, self.receive, "rows_backward")
        layout = [(q.shape[2], q.dtype), (2, wide.dtype)]
        if not self.keep:
            layout += [(q.shape[2], q.dtype), (self.n_slots, self._id_dtype)]

        def arrive() -> None:
            self._gradients, self._sums, *again = _unpack(wait(), layout)
            if not self.keep:
                self._received = tuple(again)

        return arrive

    def answer_backward(self, scale: float, owned: Tensor, dtype: torch.dtype, deterministic: bool):
        """Gradients for the rows received: dK and dV are added to ``owned``, dq goes back; a collective call.

        Args:
            owned: [L + X, Hkv, 2, D] wide, the owner's gradients.
            dtype: dtype of dq on the wire.

        Returns:
            A function that waits and returns dq [M, D] wide for the rows this rank sent.
        """
        (q, ids), dout, sums = self._received, self._gradients, self._sums
        lse, delta = sums[:, :1].contiguous(), sums[:, 1:].contiguous()
        pages = _single_head(self.owned, self.geometry, self.comm.rank)
        dq = torch.zeros(q.shape[0], 1, q.shape[1], dtype=owned.dtype, device=q.device)
        ops.attend_backward(
            q[:, None], pages, ids.int()[:, None], None, None, scale, dout[:, None], lse, delta, deterministic,
            index=self._routing, into=(dq, owned[:, :, 0], owned[:, :, 1]),
        )  # fmt: skip
        self._gradients = self._sums = None
        if not self.keep:
            self._received = None
        wait = self.comm.all_to_all(dq[:, 0].to(dtype), self.receive, self.send, "row_gradients")
        return lambda: wait().to(dq.dtype)

    def index(self) -> Tensor:
        """[L, heads, S] int32: which of the rows sent stands for this slot of the stage's heads, -1 for none."""
        index = torch.full_like(self.chosen[:, self.heads], -1, memory_format=torch.contiguous_format)
        rows = torch.arange(self.slot.numel(), dtype=index.dtype, device=index.device)
        index[self.token, self.head - self.heads.start, self.slot] = rows
        return index

    @property
    def _id_dtype(self) -> torch.dtype:
        return id_dtype(self.geometry, self.place.shape[0])

    def _ids(self) -> Tensor:
        """[M, S]: for each row sent, the pairs its owner attends to, numbered by the owner; -1 for none."""
        n_kv = self.place.shape[0]
        chosen = self.chosen[self.token, self.head]
        block = chosen.long().clamp(min=0)
        kv_head = (self.head // (self.chosen.shape[1] // n_kv))[:, None]
        target = self.geometry.owner[block].gather(1, self.slot[:, None])
        wanted = (chosen >= 0) & (self.place[kv_head, block] == self.stage * self.comm.size + target)
        pair = kv_head * self.geometry.owned_count[target] + self.geometry.place[block]
        return torch.where(wanted, pair, -1).to(self._id_dtype)


def id_dtype(geometry: BlockGeometry, n_kv: int) -> torch.dtype:
    """Integer dtype in which the (KV head, block) pairs of any one rank can be numbered."""
    return torch.int16 if n_kv * max(ids.numel() for ids in geometry.owned) < 2**15 else torch.int32


def _single_head(owned: Pages, geometry: BlockGeometry, rank: int) -> Pages:
    """This rank's (KV head, block) pairs as blocks of one KV head: number ``head * m + place``."""
    ids = geometry.owned[rank]
    n_kv = owned.row.shape[0]
    return Pages(
        owned.k,
        owned.v,
        owned.row[:, ids].reshape(1, -1),
        owned.head[:, ids].reshape(1, -1),
        owned.length[ids].repeat(n_kv),
        owned.block_size,
    )


def _pack(parts: list[Tensor]) -> Tensor:
    """Rows of several tensors [N, width] side by side as bytes: [N, bytes]."""
    return torch.cat([_flat(x).view(torch.uint8).view(x.shape[0], x.shape[1] * x.itemsize) for x in parts], 1)


def _unpack(packed: Tensor, layout: list[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Inverse of :func:`_pack`: [N, width] of each dtype."""
    parts = packed.split([width * dtype.itemsize for width, dtype in layout], 1)
    return [_flat(x).view(dtype).view(packed.shape[0], width) for x, (width, dtype) in zip(parts, layout, strict=True)]


def _flat(x: Tensor) -> Tensor:
    """A flat copy that starts where any dtype may: ``contiguous()`` leaves the strides of a single row as they are."""
    return x.clone(memory_format=torch.contiguous_format).view(-1)
