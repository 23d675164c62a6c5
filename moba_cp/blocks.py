"""Where the key/value blocks of a packed batch lie.

Legend: T tokens of all documents, B block size, n blocks. Blocks are numbered through all documents in order,
so that one integer, the block id, names a block together with its document. Block ``j`` of a document that
starts at token ``s`` and has ``len`` tokens covers ``[s + jB, s + min((j + 1)B, len))``.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .config import BLOCK_SIZE_MULTIPLE
from .host import to_device


@dataclass(frozen=True)
class BlockTable:
    """Geometry of the blocks of one packed batch; built by :func:`block_table` without waiting for the device.

    Tables [T] are by query row. There are fewer rows than tokens where queries are the last tokens of their documents.

    ``start`` and ``length`` may carry trailing entries of length 0: their number is an upper bound that follows
    from T and the number of documents alone. No query ever refers to those.
    """

    block_size: int
    start: Tensor
    """[n] int64, first token of each block."""
    length: Tensor
    """[n] int32, tokens in each block: B except for a document's last."""
    current_block: Tensor
    """[T] int32, block id of each token."""
    first: Tensor
    """[T] int32, first block id of each token's document; a token's candidates are ``first <= id < current_block``."""
    offset: Tensor
    """[T] int32, position of each token within its block."""

    @property
    def n_blocks(self) -> int:
        return self.start.numel()

    @cached_property
    def visible(self) -> Tensor:
        """[T] int32, keys of its current block that each token sees."""
        return self.offset + 1

    @cached_property
    def row(self) -> Tensor:
        """[n] int64, first token of each block, -1 for entries of length 0."""
        return torch.where(self.length > 0, self.start, -1)

    @cached_property
    def _heads(self) -> dict[int, Tensor]:
        return {}

    def heads(self, n_heads: int) -> Tensor:
        """[n_heads, n] int32, the head itself for every block; made once."""
        if n_heads not in self._heads:
            self._heads[n_heads] = torch.arange(n_heads, device=self.start.device, dtype=torch.int32)
        return self._heads[n_heads][:, None].expand(-1, self.n_blocks)


@dataclass(frozen=True)
class Pages:
    """Key/value blocks lying in a storage, found by (KV head, block id).

    The storage is the local K and V themselves, or a buffer of blocks received from other ranks: nothing is copied
    into place. Rows of different pages never overlap.
    """

    k: Tensor
    """[R, H', D] with unit stride in D."""
    v: Tensor
    """[R, H', D] with unit stride in D."""
    row: Tensor
    """[Hkv, n] int64, storage row of the first token of each block; -1 where the block is not in this storage."""
    head: Tensor
    """[Hkv, n] int32, index of the head within the storage."""
    length: Tensor
    """[n] int32, tokens in each block."""
    block_size: int

    def of_heads(self, heads: slice) -> "Pages":
        """The pages of some KV heads, in the same storage."""
        return replace(self, row=self.row[heads], head=self.head[heads])

    def query_heads(self, heads: slice, n_heads: int) -> slice:
        """The query heads, of ``n_heads`` in all, whose groups share some of the KV heads."""
        group = n_heads // self.row.shape[0]
        return slice(heads.start * group, heads.stop * group)


def local_pages(k: Tensor, v: Tensor, table: BlockTable) -> Pages:
    """Pages of a storage that holds all tokens of ``table`` in order: k, v [T, Hkv, D]."""
    n_heads = k.shape[1]
    return Pages(k, v, table.row.expand(n_heads, -1), table.heads(n_heads), table.length, table.block_size)


def check_cu_seqlens_kind(cu_seqlens: Tensor, name: str = "cu_seqlens") -> None:
    """Raise ValueError unless ``cu_seqlens`` is a tensor of boundaries, whatever their values."""
    rule = "pass a 1-D int32 tensor [0, end of document 1, ..., number of tokens]"
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{name} is a {type(cu_seqlens).__name__}; {rule}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; {rule}")


def check_cu_seqlens(cu_seqlens: Tensor, n_tokens: int) -> None:
    """Raise ValueError unless ``cu_seqlens`` cuts ``n_tokens`` tokens into documents.

    Values on a GPU are checked there (a device-side assertion), because reading them would stall the host.
    """
    check_cu_seqlens_kind(cu_seqlens)
    ok = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == n_tokens) & (cu_seqlens.diff() >= 0).all()
    if cu_seqlens.is_cuda:
        torch._assert_async(ok)
    elif not ok:
        raise ValueError(
            f"cu_seqlens={cu_seqlens.tolist() if cu_seqlens.numel() <= 16 else '[...]'} must start at 0, never "
            f"decrease and end at the number of tokens, {n_tokens}"
        )


def check_rows_fit(cu_rows: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError unless no document has more query rows than keys; on a GPU, a device-side assertion."""
    ok = (cu_rows.diff() <= cu_seqlens.diff()).all()
    if ok.is_cuda:
        torch._assert_async(ok)
    elif not ok.is_meta and not ok:
        at = int((cu_rows.diff() > cu_seqlens.diff()).nonzero()[0])
        raise ValueError(
            f"document {at} has {int(cu_rows.diff()[at])} queries in cu_seqlens but {int(cu_seqlens.diff()[at])} keys "
            "in cu_seqlens_k; queries are the last tokens of their document's keys, so there cannot be more of them"
        )


def fitted_block_size(block_size: int, n_tokens: int) -> int:
    """A block size no larger than it takes to hold ``n_tokens`` in one block: the blocks are the same."""
    return min(block_size, (n_tokens // BLOCK_SIZE_MULTIPLE + 1) * BLOCK_SIZE_MULTIPLE)


def block_count(n_tokens: int, block_size: int, cu_seqlens: Tensor | None) -> int:
    """Entries of the block table: each document has at most one short block, so no value from the device is needed."""
    n_docs = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    return n_tokens // block_size + min(n_docs, n_tokens)


def block_table(
    n_tokens: int,
    block_size: int,
    cu_seqlens: Tensor | None,
    device,
    n_rows: int | None = None,
    cu_rows: Tensor | None = None,
) -> BlockTable:
    """Block geometry of ``n_tokens`` packed keys, and where the query rows lie in it.

    Args:
        n_tokens: T.
        block_size: B.
        cu_seqlens: [n_docs + 1] int, document boundaries; None for one document.
        device: where the tables go.
        n_rows: query rows, if they are not all tokens but the last ones of each document.
        cu_rows: [n_docs + 1] int, boundaries of the documents among these rows; None for one document.
    """
    if cu_seqlens is None:
        # Made on the device: a CUDA graph cannot hold a copy from the host's memory.
        cu_seqlens = torch.arange(2, device=device) * n_tokens
    else:
        check_cu_seqlens(cu_seqlens, n_tokens)
        cu_seqlens = to_device(cu_seqlens.long(), device)
    if n_rows is not None and cu_rows is not None:
        check_cu_seqlens(cu_rows, n_rows)
        cu_rows = to_device(cu_rows.long(), device)
        check_rows_fit(cu_rows, cu_seqlens)
    elif n_rows is not None:
        cu_rows = torch.arange(2, device=device) * n_rows
    n_docs = cu_seqlens.numel() - 1
    n_max = block_count(n_tokens, block_size, cu_seqlens)

    doc_length = cu_seqlens.diff()
    doc_blocks = (doc_length + block_size - 1) // block_size
    cu_blocks = torch.cat([doc_blocks.new_zeros(1), doc_blocks.cumsum(0)])

    block = torch.arange(n_max, device=device)
    # Documents of zero length own no block and no token; right=True steps over them.
    doc = torch.searchsorted(cu_blocks, block, right=True).sub_(1).clamp_(max=n_docs - 1)
    in_doc = (block - cu_blocks[doc]) * block_size
    length = (doc_length[doc] - in_doc).clamp(min=0, max=block_size)
    start = torch.where(length > 0, cu_seqlens[doc] + in_doc, 0)

    if n_rows is None or cu_rows is None:
        token = torch.arange(n_tokens, device=device)
        doc = torch.searchsorted(cu_seqlens, token, right=True).sub_(1)
        position = token - cu_seqlens[doc]
    else:
        row = torch.arange(n_rows, device=device)
        doc = torch.searchsorted(cu_rows, row, right=True).sub_(1)
        # The last row of a document is its last key.
        position = row - cu_rows[doc + 1] + doc_length[doc]
    first = cu_blocks[doc]
    return BlockTable(
        block_size=block_size,
        start=start,
        length=length.int(),
        current_block=(first + position // block_size).int(),
        first=first.int(),
        offset=(position % block_size).int(),
    )
