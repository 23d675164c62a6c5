"""Counting and listing the blocks that rows chose, for the exchange between ranks; nothing waits for the device.

Legend: N rows (tokens), Hq query heads, Hkv key/value heads, G = Hq // Hkv, S chosen blocks per row, n blocks. A
*slot* is one chosen block of one row and head. A *place* is where a row goes that wants a block: one number per owner
and stage (``stage * owners + owner``), -1 for blocks that are here. A row goes to a place once, by its first
slot that wants to.

A program looks at BM rows of one query head; SP is S, padded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, next_power_of_2, on_device

TILE_SLOTS = 1024


@triton.jit
def _slots(chosen, table, n_rows, n_blocks, s_t, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr):
    """Blocks of a tile's slots [BM, SP] and what ``table`` [Hkv, n] holds for them, -1 where there is none."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_s = tl.arange(0, SP)
    i_q = tl.program_id(1)
    m = (o_m < n_rows)[:, None] & (o_s < S)[None, :]
    block = tl.load(chosen + o_m.to(tl.int64)[:, None] * s_t + i_q * S + o_s[None, :], mask=m, other=-1)
    value = tl.load(table + i_q // G * n_blocks + block, mask=block >= 0, other=-1)
    return block, value


@triton.jit
def _column(chosen, table, s, n_rows, n_blocks, s_t, G: tl.constexpr, S: tl.constexpr, BM: tl.constexpr):
    """Slot ``s`` of a tile's rows: block and table's value [BM]."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_q = tl.program_id(1)
    block = tl.load(chosen + o_m.to(tl.int64) * s_t + i_q * S + s, mask=o_m < n_rows, other=-1)
    return block, tl.load(table + i_q // G * n_blocks + block, mask=block >= 0, other=-1)


@triton.jit(do_not_specialize=["n_rows"])
def _count_kernel(
    chosen, open_place, chose, share, n_rows, n_blocks, s_t,
    G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    block, place = _slots(chosen, open_place, n_rows, n_blocks, s_t, G, S, SP, BM)
    first = tl.program_id(1) // G * n_blocks
    tl.atomic_add(chose + first + block, 1, mask=block >= 0, sem="relaxed")
    if UNIT > 0:
        together = tl.zeros([BM, SP], tl.int32)
        for s in range(S):
            _, other = _column(chosen, open_place, s, n_rows, n_blocks, s_t, G, S, BM)
            together += ((place == other[:, None]) & (other >= 0)[:, None]).to(tl.int32)
        part = UNIT // tl.maximum(together, 1)
        tl.atomic_add(share + first + block, part.to(tl.int64), mask=place >= 0, sem="relaxed")


@triton.jit
def _first_slots(
    chosen, place, fetched, n_rows, n_blocks, s_t, ALL: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Places [BM, SP], and a bit per candidate where the row is sent for the slot; ``fetched`` [Hkv, n] has the bits of
    the candidates that fetch the block."""
    block, at = _slots(chosen, place, n_rows, n_blocks, s_t, G, S, SP, BM)
    bits = tl.load(fetched + tl.program_id(1) // G * n_blocks + block, mask=block >= 0, other=ALL)
    wants = tl.where(at >= 0, ALL & ~bits, 0)
    o_s = tl.arange(0, SP)
    for s in range(S - 1):
        other_block, other = _column(chosen, place, s, n_rows, n_blocks, s_t, G, S, BM)
        other_bits = tl.load(fetched + tl.program_id(1) // G * n_blocks + other_block, mask=other_block >= 0, other=ALL)
        same = (at == other[:, None]) & (other >= 0)[:, None] & (o_s > s)[None, :]
        wants = tl.where(same, wants & other_bits[:, None], wants)
    return at, wants


@triton.jit(do_not_specialize=["n_rows"])
def _rows_kernel(
    chosen, place, fetched, rows, n_rows, n_blocks, n_owners, s_t,
    C: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    at, wants = _first_slots(chosen, place, fetched, n_rows, n_blocks, s_t, (1 << C) - 1, G, S, SP, BM)
    if tl.max(tl.max(wants, 1), 0) == 0:
        return
    owner = tl.where(at >= 0, at % n_owners, -1)
    for p in range(n_owners):
        here = tl.where(owner == p, wants, 0)
        for c in tl.static_range(C):
            count = tl.sum(tl.sum((here >> c) & 1, 1), 0)
            tl.atomic_add(rows + c * n_owners + p, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def _list_kernel(
    chosen, place, fetched, counts, ends, slots, n_rows, n_blocks, n_tiles, s_t,
    WRITE: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    at, wants = _first_slots(chosen, place, fetched, n_rows, n_blocks, s_t, 1, G, S, SP, BM)
    lowest = tl.min(tl.min(tl.where(wants > 0, at, 2147483647), 1), 0)
    highest = tl.max(tl.max(tl.where(wants > 0, at, -1), 1), 0)
    i_tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    slot = (tl.program_id(1) * n_rows + o_m)[:, None] * S + tl.arange(0, SP)[None, :]
    if highest >= 0:
        for p in range(lowest, highest + 1):
            here = ((at == p) & (wants > 0)).to(tl.int32)
            p_tile = p * n_tiles + i_tile
            if WRITE:
                o_tile = tl.load(ends + p_tile) - tl.load(counts + p_tile)
                flat = tl.reshape(here, [BM * SP])
                place_in = o_tile + tl.cumsum(flat, 0) - 1
                tl.store(slots + place_in, tl.reshape(slot, [BM * SP]), mask=flat > 0)
            else:
                tl.store(counts + p_tile, tl.sum(tl.sum(here, 1), 0))


def count_choices(chosen: Tensor, open_place: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """See :func:`moba_cp.choices.count_choices`."""
    shape, grid, constants = _launch(chosen, open_place)
    chose = torch.zeros(open_place.shape, dtype=torch.int32, device=chosen.device)
    share = torch.zeros(open_place.shape, dtype=torch.int64, device=chosen.device)
    if chosen.numel():
        with on_device(chosen):
            _count_kernel[grid](chosen, open_place, chose, share, *shape, **constants, UNIT=unit, num_warps=4)
    return chose.long(), share


def count_rows(chosen: Tensor, place: Tensor, fetch: Tensor, n_owners: int) -> Tensor:
    """See :func:`moba_cp.choices.count_rows`."""
    (n_rows, n_blocks, s_t), grid, constants = _launch(chosen, place)
    rows = torch.zeros(fetch.shape[0], n_owners, dtype=torch.int64, device=chosen.device)
    if chosen.numel():
        with on_device(chosen):
            _rows_kernel[grid](
                chosen, place, _bits(fetch), rows, n_rows, n_blocks, n_owners, s_t,
                C=fetch.shape[0], **constants, num_warps=4,
            )  # fmt: skip
    return rows


def list_rows(chosen: Tensor, place: Tensor, fetch: Tensor, n_places: int) -> tuple[Tensor, Tensor]:
    """See :func:`moba_cp.choices.list_rows`."""
    (n_rows, n_blocks, s_t), grid, constants = _launch(chosen, place)
    n_tiles = grid[0] * grid[1]
    slots = torch.empty(chosen.numel(), dtype=torch.int32, device=chosen.device)
    counts = torch.zeros(n_places, n_tiles, dtype=torch.int32, device=chosen.device)
    if chosen.numel():
        inputs = chosen, place, _bits(fetch[None]), counts
        numbers = n_rows, n_blocks, n_tiles, s_t
        with on_device(chosen):
            _list_kernel[grid](*inputs, counts, slots, *numbers, WRITE=False, **constants, num_warps=4)
            ends = counts.flatten().cumsum(0, dtype=torch.int32)
            _list_kernel[grid](*inputs, ends, slots, *numbers, WRITE=True, **constants, num_warps=4)
    return slots, counts.sum(1)


def _launch(chosen: Tensor, table: Tensor):
    """Numbers, grid and constants of a launch over all slots of ``chosen`` [N, Hq, S]."""
    n_rows, n_heads, n_slots = chosen.shape
    assert chosen.numel() == 0 or chosen.stride(2) == 1 and chosen.stride(1) == n_slots
    assert table.is_contiguous() and chosen.numel() < 2**31
    padded = next_power_of_2(max(1, n_slots))
    bm = max(1, TILE_SLOTS // padded)
    constants = dict(G=n_heads // table.shape[0], S=n_slots, SP=padded, BM=bm)
    return (n_rows, table.shape[1], chosen.stride(0)), (cdiv(n_rows, bm), n_heads), constants


def _bits(fetch: Tensor) -> Tensor:
    """fetch [C, Hkv, n] bool -> [Hkv, n] int32 with a bit for each of C."""
    bit = 1 << torch.arange(fetch.shape[0], dtype=torch.int32, device=fetch.device)
    return (fetch * bit[:, None, None]).sum(0, dtype=torch.int32)
