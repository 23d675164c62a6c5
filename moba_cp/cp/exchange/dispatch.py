"""Sending query rows to blocks: the owner attends to its blocks for them and answers with partial results.

Legend: P ranks, L local tokens, Hq query heads, Hkv key/value heads, D head dim, S = k - 1 chosen blocks per row,
N rows received in one stage, M rows sent in one stage, m blocks owned by a rank. The owner sees the rows as one query
head, and its (KV head, block) pairs as blocks of one KV head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...blocks import Pages
from ...ops import backend, integer_backend
from ..comm import Communicator, used_here
from ..geometry import BlockGeometry
from .negotiate import RowLists


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
        self.slots = lists.slots[begin : begin + sum(self.send)]
        self.chosen, self.place = chosen, lists.place
        self.geometry, self.comm, self.keep = geometry, comm, keep
        self.owned, self.heads = owned, heads
        self._received: tuple[Tensor, Tensor] | None = None
        self._index: Tensor | None = None

    n_tensors = 3
    """How many :meth:`tensors` gives."""

    def tensors(self) -> list[Tensor | None]:
        """What forward leaves for :meth:`restore` before backward."""
        return [self._index, *(self._received or (None, None))]

    def restore(self, tensors: list[Tensor | None]) -> None:
        """Take what :meth:`tensors` gave."""
        self._index, *received = tensors
        self._received = None if received[0] is None else tuple(received)

    def send_forward(self, q: Tensor) -> Callable[[], None]:
        """Start sending rows of q [L, Hq, D] with the blocks they want; a collective call."""
        waits = self._there("rows", self._rows_of(q), self._ids())

        def arrive() -> None:
            self._received = waits[0](), self._numbers(waits[1]())

        return arrive

    def answer_forward(self, scale: float) -> Callable[[], tuple[Tensor, Tensor]]:
        """Attend for the rows received and start sending partial results back; a collective call.

        Returns:
            A function that waits and returns out [M, D] and lse [M], wide, for the rows this rank sent.
        """
        q, ids = self._received
        pages = _single_head(self.owned, self.geometry, self.comm.rank)
        rows = q[:, None], ids[:, None], None, None
        self._index = backend(q).routing_index(*rows, pages.row)
        out, lse = backend(q).attend(q[:, None], pages, *rows[1:], scale, index=self._index)
        if not self.keep:
            self._received = None
        waits = self._back("partial_outputs", out[:, 0], lse[:, 0])
        return lambda: tuple(wait() for wait in waits)

    def send_backward(self, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor) -> Callable[[], None]:
        """Start sending what the gradients of the rows need; a collective call. lse, delta [L, Hq] are final."""
        sums = self._rows_of(torch.stack([lse, delta], 2))
        again = () if self.keep else (self._rows_of(q), self._ids())
        waits = self._there("rows_backward", self._rows_of(dout, q.dtype), sums, *again)

        def arrive() -> None:
            self._gradients, self._sums, *again = (wait() for wait in waits)
            if not self.keep:
                self._received = again[0], self._numbers(again[1])

        return arrive

    def answer_backward(self, scale: float, owned: Tensor, dtype: torch.dtype, deterministic: bool):
        """Gradients for the rows received: dK and dV are added to ``owned``, dq goes back; a collective call.

        Args:
            owned: [2, L + X, Hkv, D] wide, the owner's gradients of K and V.
            dtype: dtype of dq on the wire.

        Returns:
            A function that waits and returns dq [M, D] wide for the rows this rank sent.
        """
        (q, ids), dout, sums = self._received, self._gradients, self._sums
        lse, delta = sums[:, :1].contiguous(), sums[:, 1:].contiguous()
        pages = _single_head(self.owned, self.geometry, self.comm.rank)
        dq = torch.zeros(q.shape[0], 1, q.shape[1], dtype=owned.dtype, device=q.device)
        backend(q).attend_backward(
            q[:, None], pages, ids[:, None], None, None, scale, dout[:, None], lse, delta, deterministic,
            index=self._index, out=(dq, *owned),
        )  # fmt: skip
        self._gradients = self._sums = None
        if not self.keep:
            self._received = None
        (wait,) = self._back("row_gradients", dq[:, 0].to(dtype))
        return lambda: wait().to(dq.dtype)

    def index(self) -> Tensor:
        """[L, heads, S] int32: which of the rows sent stands for this slot of the stage's heads, -1 for none."""
        n_rows, _, n_slots = self.chosen.shape
        shape = self.heads.stop - self.heads.start, n_rows, n_slots
        used_here(self.slots)
        index = torch.full(shape, -1, dtype=torch.int32, device=self.chosen.device)
        at = self.slots.long() - self.heads.start * n_rows * n_slots
        index.view(-1)[at] = torch.arange(at.numel(), dtype=torch.int32, device=index.device)
        return index.transpose(0, 1).contiguous()

    def _rows_of(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[M, D] of x [L, Hq, D], for each row sent."""
        return backend(x).gather_rows(x, self.slots, self.n_slots, dtype or x.dtype)

    def _ids(self) -> Tensor:
        """For each row sent, the pairs its owner attends to, numbered by the owner; -1 for none.

        As bytes [M, ...], which every transport takes.
        """
        geometry, n_kv = self.geometry, self.place.shape[0]
        key = "numbers", n_kv
        if key not in geometry.tables:
            count = geometry.owned_count[geometry.owner]
            geometry.tables[key] = torch.arange(n_kv, device=count.device)[:, None] * count + geometry.place
        ids = integer_backend(self.chosen).row_ids(
            self.chosen, self.slots, self.place, geometry.tables[key], id_dtype(geometry, n_kv)
        )
        return ids.view(-1).view(torch.uint8).view(ids.shape[0], self.n_slots * ids.itemsize)

    def _numbers(self, ids: Tensor) -> Tensor:
        """[M, S] int32 of what :meth:`_ids` made."""
        dtype = id_dtype(self.geometry, self.place.shape[0])
        return ids.view(-1).view(dtype).view(ids.shape[0], self.n_slots).int()

    # Parts of a row go as messages of their own: side by side they would have to be packed, and unpacked again.

    def _there(self, kind: str, *parts: Tensor) -> list[Callable[[], Tensor]]:
        return [self.comm.all_to_all(x, self.send, self.receive, kind) for x in parts]

    def _back(self, kind: str, *parts: Tensor) -> list[Callable[[], Tensor]]:
        return [self.comm.all_to_all(x, self.receive, self.send, kind) for x in parts]


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
