"""Counting and listing the blocks that rows selected, for the exchange between ranks, without a device sync.

Legend: N rows (tokens), Hq query heads, Hkv key/value heads, G = Hq // Hkv, S selected blocks per row, n blocks. A
*slot* is one selected block of one row and head. A *destination* (``dest``) is where a row goes that wants a block: one
number per owner and stage (``stage * owners + owner``), -1 for blocks of this rank. A row goes to a destination once,
for its first slot that has it.

A program reads BM rows of one query head; SP is S, padded. Programs of all heads are in flight together: their slots
are neighbours in memory, and fewer of them add to the same counters. For the same reason there are R copies of the
counters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cdiv, check_limit, launch_options, next_power_of_2, on_device

TILE_SLOTS = 1024
# Copies of counters: at most so many, and so many (KV head, block) entries in all, 16 MiB with shares.
COUNT_COPIES = 32
COUNT_ENTRIES = 1 << 20
ROW_COPIES = 16


@triton.jit
def _slots(
    block_indices, table, n_rows, n_blocks, s_t,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Tile and query head of this program, the blocks of its slots [BM, SP] and what ``table`` [Hkv, n] holds for
    them, -1 where there is none."""
    i_m = tl.program_id(0) // H
    i_q = tl.program_id(0) % H
    o_m = tl.arange(0, BM)
    o_s = tl.arange(0, SP)  # [SP]
    m = (o_m < n_rows - i_m * BM)[:, None] & (o_s < S)[None, :]  # [BM, SP]
    p_indices = block_indices + (i_m * BM).to(tl.int64) * s_t + i_q * S
    block = tl.load(p_indices + o_m[:, None] * s_t + o_s[None, :], mask=m, other=-1)  # [BM, SP]
    value = tl.load(table + i_q // G * n_blocks + block, mask=block >= 0, other=-1)  # [BM, SP]
    return i_m, i_q, block, value


@triton.jit
def _column(x, s, SP: tl.constexpr):
    """Column ``s`` of x [BM, SP], as [BM, 1]; without going to memory again."""
    return tl.sum(tl.where((tl.arange(0, SP) == s)[None, :], x, 0), 1)[:, None]


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _count_kernel(
    block_indices, open_dest, counts, n_rows, n_blocks, s_t,
    R: tl.constexpr, UNIT: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # scalar, scalar, [BM, SP], [BM, SP]
    i_m, i_q, block, dest = _slots(block_indices, open_dest, n_rows, n_blocks, s_t, H, G, S, SP, BM)
    n_kv = H // G
    p_counts = counts + (i_m % R * n_kv + i_q // G) * n_blocks + block  # [BM, SP]
    tl.atomic_add(p_counts, 1, mask=block >= 0, sem="relaxed")
    if UNIT > 0:
        together = tl.zeros([BM, SP], tl.int32)  # [BM, SP]
        for s in range(S):
            together += (dest == _column(dest, s, SP)).to(tl.int32)
        part = UNIT // tl.maximum(together, 1)  # [BM, SP]
        tl.atomic_add(p_counts + R * n_kv * n_blocks, part.to(tl.int64), mask=dest >= 0, sem="relaxed")


@triton.jit
def _first(at, wants, S: tl.constexpr, SP: tl.constexpr):
    """``wants`` [BM, SP], a bit for each candidate, cleared where an earlier slot of the row with the same destination
    ``at`` [BM, SP] has it too."""
    o_s = tl.arange(0, SP)  # [SP]
    for s in range(S - 1):
        later = (at == _column(at, s, SP)) & (o_s > s)[None, :]  # [BM, SP]
        wants = tl.where(later, wants & ~_column(wants, s, SP), wants)  # [BM, SP]
    return wants


@triton.jit(do_not_specialize=["n_rows", "n_blocks", "n_owners"])
def _rows_kernel(
    block_indices, dest, fetched, rows, n_rows, n_blocks, n_owners, s_t,
    R: tl.constexpr, C: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    _, i_q, block, at = _slots(block_indices, dest, n_rows, n_blocks, s_t, H, G, S, SP, BM)
    bits = tl.load(fetched + i_q // G * n_blocks + block, mask=at >= 0, other=-1)  # [BM, SP]
    wants = _first(at, ~bits & ((1 << C) - 1), S, SP)  # [BM, SP]
    owner = tl.where(wants > 0, at % n_owners, -1)  # [BM, SP]
    lowest = tl.min(tl.min(tl.where(wants > 0, owner, n_owners), 1), 0)
    highest = tl.max(tl.max(owner, 1), 0)
    p_rows = rows + tl.program_id(0) % R * C * n_owners
    for p in range(lowest, highest + 1):
        here = tl.where(owner == p, wants, 0)  # [BM, SP]
        for c in tl.static_range(C):
            count = tl.sum(tl.sum((here >> c) & 1, 1), 0)
            tl.atomic_add(p_rows + c * n_owners + p, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_rows", "n_blocks", "n_tiles"])
def _list_kernel(
    block_indices, dest, counts, ends, slots, n_rows, n_blocks, n_tiles, s_t,
    WRITE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    i_m, i_q, _, at = _slots(block_indices, dest, n_rows, n_blocks, s_t, H, G, S, SP, BM)
    at = tl.where(_first(at, (at >= 0).to(tl.int32), S, SP) > 0, at, -1)  # [BM, SP]
    lowest = tl.min(tl.min(tl.where(at >= 0, at, 2147483647), 1), 0)
    highest = tl.max(tl.max(at, 1), 0)
    # By head, then by token.
    i_tile = i_q * (n_tiles // H) + i_m
    row = i_q.to(slots.dtype.element_ty) * n_rows + i_m * BM + tl.arange(0, BM)  # [BM]
    slot = row[:, None] * S + tl.arange(0, SP)[None, :]  # [BM, SP]
    for p in range(lowest, highest + 1):
        here = (at == p).to(tl.int32)  # [BM, SP]
        p_tile = p * n_tiles + i_tile
        if WRITE:
            o_tile = tl.load(ends + p_tile) - tl.load(counts + p_tile)
            flat = tl.reshape(here, [BM * SP])  # [BM * SP]
            o_out = o_tile + tl.cumsum(flat, 0) - 1  # [BM * SP]
            tl.store(slots + o_out, tl.reshape(slot, [BM * SP]), mask=flat > 0)
        else:
            tl.store(counts + p_tile, tl.sum(tl.sum(here, 1), 0))


def count_choices(block_indices: Tensor, open_dest: Tensor, unit: int) -> Tensor:
    """See :func:`moba_cp.eager.exchange.count_choices`."""
    numbers, n_tiles, constants = _launch(block_indices, open_dest)
    # A power of two.
    copies = max(1, min(COUNT_COPIES, n_tiles, COUNT_ENTRIES // max(1, open_dest.numel())))
    copies = 1 << copies.bit_length() - 1
    counts = torch.zeros(2 if unit else 1, copies, *open_dest.shape, dtype=torch.int64, device=block_indices.device)
    if n_tiles:
        with on_device(block_indices):
            _count_kernel[(n_tiles,)](
                block_indices=block_indices, open_dest=open_dest, counts=counts, **numbers, R=copies, UNIT=unit,
                **constants, **launch_options(4),
            )  # fmt: skip
    return counts


def count_rows(block_indices: Tensor, dest: Tensor, fetched: Tensor, n_candidates: int, n_owners: int) -> Tensor:
    """See :func:`moba_cp.eager.exchange.count_rows`."""
    numbers, n_tiles, constants = _launch(block_indices, dest)
    rows = torch.zeros(ROW_COPIES, n_candidates, n_owners, dtype=torch.int32, device=block_indices.device)
    if n_tiles:
        with on_device(block_indices):
            _rows_kernel[(n_tiles,)](
                block_indices=block_indices, dest=dest, fetched=fetched, rows=rows, n_owners=n_owners, **numbers,
                R=ROW_COPIES, C=n_candidates, **constants, **launch_options(4),
            )  # fmt: skip
    return rows


def list_rows(block_indices: Tensor, dest: Tensor, n_dests: int) -> tuple[Tensor, Tensor]:
    """See :func:`moba_cp.eager.exchange.list_rows`."""
    numbers, n_tiles, constants = _launch(block_indices, dest)
    dtype = torch.int32 if block_indices.numel() < 2**31 else torch.int64
    slots = torch.empty(block_indices.numel(), dtype=dtype, device=block_indices.device)
    if not n_tiles:
        return slots, torch.zeros(n_dests, dtype=torch.int32, device=block_indices.device)
    check_limit("the number of destinations for rows, times tiles of them,", n_dests * n_tiles, "use fewer stages")
    counts = torch.zeros(n_dests, n_tiles, dtype=torch.int32, device=block_indices.device)
    inputs = dict(block_indices=block_indices, dest=dest, counts=counts, slots=slots, n_tiles=n_tiles)
    with on_device(block_indices):
        _list_kernel[(n_tiles,)](**inputs, ends=counts, **numbers, WRITE=False, **constants, **launch_options(4))
        ends = counts.flatten().cumsum(0, dtype=torch.int32)
        _list_kernel[(n_tiles,)](**inputs, ends=ends, **numbers, WRITE=True, **constants, **launch_options(4))
    return slots, ends.view(n_dests, n_tiles)[:, -1]


def _launch(block_indices: Tensor, table: Tensor):
    """Numbers, programs and constants of a launch over all slots of ``block_indices`` [N, Hq, S]."""
    n_rows, n_heads, n_slots = block_indices.shape
    assert block_indices.numel() == 0 or block_indices.stride(2) == 1 and block_indices.stride(1) == n_slots
    assert table.is_contiguous()
    padded = next_power_of_2(max(1, n_slots))
    bm = max(1, TILE_SLOTS // padded)
    constants = dict(H=n_heads, G=n_heads // table.shape[0], S=n_slots, SP=padded, BM=bm)
    n_tiles = cdiv(n_rows, bm) * n_heads if block_indices.numel() else 0
    numbers = dict(n_rows=n_rows, n_blocks=table.shape[1], s_t=block_indices.stride(0))
    return numbers, n_tiles, constants
