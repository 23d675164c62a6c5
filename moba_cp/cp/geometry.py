"""Which rank owns which block, and where its rows lie. Host arithmetic, done once per context and block size.

The owner of a block is the rank that holds its first token. A block whose tokens are not all on its owner in one run
*straddles*: the owner then keeps an assembled copy of it in extra rows behind its own, and the ranks that hold the
rest of it (its tails) send that to the owner before anything else happens.

Legend: T tokens, P ranks, L local tokens, n blocks of all documents, X extra rows, B block size.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..host import to_device
from .layout import Segments, positions_of, ragged_arange


@dataclass(frozen=True)
class BlockGeometry:
    """Blocks as one rank sees them; tensors are on the context's device."""

    rank: int
    """the rank whose view this is"""
    block_size: int
    length: Tensor
    """[n] int32, tokens of each block."""
    first: Tensor
    """[L] int32, first block of each local token's document."""
    current_block: Tensor
    """[L] int32, block of each local token."""
    visible: Tensor
    """[L] int32, keys of its current block that each local token sees: its position in the block plus one."""
    row: Tensor
    """[n] int64, row of each owned block's first token among local and extra rows; -1 for blocks of other ranks."""
    owner: Tensor
    """[n] int64, rank that owns each block."""
    owner_row: Tensor
    """[n] int64, row of each block's first token on its owner."""
    most_rows: int
    """most rows, local and extra, that any rank has."""
    cut: int
    """rows of every rank are looked at in two parts, those before this row and the others; no block lies in both."""
    sees: np.ndarray
    """[P, P, 2] bool: whether some token of rank i can select, or lies in, a block in each part of rank j's rows."""
    owned: list[Tensor]
    """per rank, [m_p] int64: the blocks it owns, ascending."""
    owned_count: Tensor
    """[P] int64, how many blocks each rank owns."""
    local_index: Tensor
    """[n] int64, index of each block among those of its owner."""
    remote_candidate: Tensor
    """[n] bool, blocks of other ranks that some local token can select or lies in."""
    straddles: bool
    """whether any block of any rank straddles."""
    n_extra: int
    """X, extra rows of this rank."""
    copy_from: Tensor
    """int64 local rows that belong to straddling blocks of this rank."""
    copy_to: Tensor
    """int64 their extra rows, counted from 0."""
    tail_from: Tensor
    """int64 local rows sent to other ranks as tails, by destination."""
    tail_to: Tensor
    """int64 extra rows that take received tails, by source."""
    tail_send: list[int]
    """rows of tails sent to each rank."""
    tail_receive: list[int]
    """rows of tails received from each rank."""

    @property
    def n_blocks(self) -> int:
        return self.length.numel()

    @cached_property
    def is_remote(self) -> Tensor:
        """[n] bool, blocks of other ranks."""
        return self.row < 0

    @cached_property
    def always_fetched(self) -> Tensor:
        """[n] bool, blocks of other ranks in which local tokens lie."""
        lies_in = torch.zeros_like(self.is_remote)
        lies_in[self.current_block.long()] = True
        return lies_in & self.is_remote

    @cached_property
    def any_row(self) -> Tensor:
        """[n] int64, zeros: stands for the row of each block where any storage may hold it."""
        return torch.zeros_like(self.row)

    @cached_property
    def head_zero(self) -> Tensor:
        """[1, 1] int32, zero: the only head of a storage that has no others."""
        return self.current_block.new_zeros(1, 1)

    @cached_property
    def n_remote_candidates(self) -> Tensor:
        """[] int64, blocks in ``remote_candidate``."""
        return self.remote_candidate.sum()


def build_geometry(segments: list[Segments], rank: int, cu_seqlens: np.ndarray, block_size: int, device):
    """:class:`BlockGeometry` of ``rank``; ``segments`` lists every rank's tokens, ``cu_seqlens`` [n_docs + 1]."""
    size = len(segments)
    start, length, cu_blocks = _blocks(cu_seqlens, block_size)
    piece = _pieces(segments, start, int(cu_seqlens[-1]))
    n = len(start)

    is_first = piece["offset"] == 0
    owner = np.empty(n, np.int64)
    owner[piece["block"][is_first]] = piece["rank"][is_first]
    # In place: every piece of the block is on the owner, one behind the other.
    head_row = np.empty(n, np.int64)
    head_row[piece["block"][is_first]] = piece["local"][is_first]
    fits = (piece["rank"] == owner[piece["block"]]) & (piece["local"] == head_row[piece["block"]] + piece["offset"])
    in_place = np.ones(n, bool)
    in_place[piece["block"][~fits]] = False

    # First extra row of each straddling block, as its owner counts them.
    extra_row = np.zeros(n, np.int64)
    n_extra = np.zeros(size, np.int64)
    for p in range(size):
        extra = np.flatnonzero((owner == p) & ~in_place)
        extra_row[extra] = np.cumsum(length[extra]) - length[extra]
        n_extra[p] = length[extra].sum()
    n_local = np.array([sum(count for _, count in runs) for runs in segments])
    owner_row = np.where(in_place, head_row, n_local[owner] + extra_row)
    mine = owner == rank

    assembled = ~in_place[piece["block"]]
    owner_of_piece = owner[piece["block"]]
    copy = assembled & (owner_of_piece == rank) & (piece["rank"] == rank)
    send = assembled & (owner_of_piece != rank) & (piece["rank"] == rank)
    receive = assembled & (owner_of_piece == rank) & (piece["rank"] != rank)

    def rows(which, key, by=None):
        which = np.flatnonzero(which)
        if by is not None:
            # Pieces are in global order, so sender and receiver list the rows of one pair of ranks alike.
            which = which[np.argsort(by[which], kind="stable")]
        begin = piece["local"] if key == "local" else extra_row[piece["block"]] + piece["offset"]
        return to_device(torch.from_numpy(ragged_arange(begin[which], piece["length"][which])), device)

    def counts(which, by):
        return np.bincount(by[which], weights=piece["length"][which], minlength=size).astype(int).tolist()

    first, current_block, offset = _local_blocks(segments[rank], cu_seqlens, cu_blocks, block_size)
    # In zigzag all ranks see the first half of each rank's rows, and only lower-numbered ranks the second.
    cut = int(n_local[0]) // 2
    most_rows = int((n_local + n_extra).max())
    if ((owner_row < cut) & (owner_row + length > cut)).any():
        cut = most_rows
    reachable = _reachable(piece, cu_blocks, size, n)
    part = owner_row >= cut
    sees = np.zeros((size, size, 2), bool)
    for p in range(size):
        for half in range(2):
            sees[:, p, half] = reachable[:, (owner == p) & (part == half)].any(1)
    owned = [np.flatnonzero(owner == p) for p in range(size)]
    local_index = np.empty(n, np.int64)
    for ids in owned:
        local_index[ids] = np.arange(len(ids))

    def tensor(x, dtype):
        return to_device(torch.from_numpy(np.ascontiguousarray(x)).to(dtype), device)

    return BlockGeometry(
        rank=rank,
        block_size=block_size,
        length=tensor(length, torch.int32),
        first=tensor(first, torch.int32),
        current_block=tensor(current_block, torch.int32),
        visible=tensor(offset + 1, torch.int32),
        row=tensor(np.where(mine, owner_row, -1), torch.int64),
        owner=tensor(owner, torch.int64),
        owner_row=tensor(owner_row, torch.int64),
        most_rows=most_rows,
        cut=cut,
        sees=sees,
        owned=[tensor(ids, torch.int64) for ids in owned],
        owned_count=tensor([len(ids) for ids in owned], torch.int64),
        local_index=tensor(local_index, torch.int64),
        remote_candidate=tensor(reachable[rank] & ~mine, torch.bool),
        straddles=bool((~in_place).any()),
        n_extra=int(n_extra[rank]),
        copy_from=rows(copy, "local"),
        copy_to=rows(copy, "extra"),
        tail_from=rows(send, "local", owner_of_piece),
        tail_to=rows(receive, "extra", piece["rank"]),
        tail_send=counts(send, owner_of_piece),
        tail_receive=counts(receive, piece["rank"]),
    )


def _blocks(cu_seqlens: np.ndarray, block_size: int):
    """start [n], length [n] of all blocks, and cu_blocks [n_docs + 1]."""
    doc_length = np.diff(cu_seqlens)
    doc_blocks = -(-doc_length // block_size)
    cu_blocks = np.concatenate([[0], np.cumsum(doc_blocks)])
    in_doc = ragged_arange(np.zeros_like(doc_blocks), doc_blocks) * block_size
    start = np.repeat(cu_seqlens[:-1], doc_blocks) + in_doc
    length = np.minimum(block_size, np.repeat(cu_seqlens[1:], doc_blocks) - start)
    return start, length, cu_blocks


def _pieces(segments: list[Segments], start: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """Largest runs of tokens that lie in one block and one segment, in global order."""
    seg_rank = np.array([r for r, runs in enumerate(segments) for _ in runs])
    seg_start = np.array([s for runs in segments for s, _ in runs])
    seg_local = np.concatenate([np.cumsum([0] + [n for _, n in runs])[:-1] for runs in segments if runs])
    order = np.argsort(seg_start)
    seg_rank, seg_start, seg_local = seg_rank[order], seg_start[order], seg_local[order]
    cut = np.union1d(start, seg_start)
    block = np.searchsorted(start, cut, side="right") - 1
    seg = np.searchsorted(seg_start, cut, side="right") - 1
    return {
        "block": block,
        "offset": cut - start[block],
        "length": np.diff(np.append(cut, seq_len)),
        "rank": seg_rank[seg],
        "local": seg_local[seg] + cut - seg_start[seg],
    }


def _local_blocks(segments: Segments, cu_seqlens: np.ndarray, cu_blocks: np.ndarray, block_size: int):
    """first, current_block, offset [L] of a rank's tokens, see :class:`moba_cp.blocks.BlockTable`."""
    position = positions_of(segments)
    doc = np.searchsorted(cu_seqlens, position, side="right") - 1
    in_doc = position - cu_seqlens[doc]
    return cu_blocks[doc], cu_blocks[doc] + in_doc // block_size, in_doc % block_size


def _reachable(piece: dict[str, np.ndarray], cu_blocks: np.ndarray, size: int, n: int) -> np.ndarray:
    """[P, n] bool, blocks that some token of each rank can select or lies in: its document's, up to its current one."""
    doc_first = cu_blocks[np.searchsorted(cu_blocks, piece["block"], side="right") - 1]
    step = np.zeros((size, n + 1), np.int64)
    np.add.at(step, (piece["rank"], doc_first), 1)
    np.add.at(step, (piece["rank"], piece["block"] + 1), -1)
    return np.cumsum(step, 1)[:, :n] > 0
