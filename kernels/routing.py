"""The routing index: which visits each block receives, in tasks of fixed size; built on the device without a sync.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, n blocks, S selected blocks per row,
S' = S + 1 where rows also see their current block, else S.

A *visit* is one row of one head looking at one block. Within a KV head, visit ``(t * G + g) * S' + slot`` is that of
row ``t``, head ``g`` of the group, to its selected block ``slot``, or to its current block (``slot == S``). Where the
heads of a group share their selection, they make a visit together: here G is 1 then, and the kernels of attention find
SHARE rows for each visit, those of a token's group, which lie side by side. A *list* holds the visits of one (KV head,
block) in ascending order: rows of that block come first, gathers are nearly contiguous, and the order is the same in
every run. A *task* is up to R successive visits of a list, so a block that is visited often has many tasks.

The lists come from a counting sort. A program counts the visits per block of a tile of rows; counts become offsets by a
running sum over tiles and, in the last program to be done with that, over lists; a second walk over the tile writes
each visit to its offset. The index of all heads is made once, serves forward and backward and all storages, and is cut
into tasks for any range of heads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import SLICED, cdiv, check_limit, launch_options, on_device

# Entries of the table of counts, tiles x lists: 32 MiB.
COUNT_ENTRIES = 1 << 23
MIN_TILE_ROWS = 64
# Where there are more tiles than the first number, a program sums up so many of them at a time: it waits for each step,
# and with few heads there are few programs to fill the GPU meanwhile.
MANY_TILES, TILES_AT_ONCE = 512, 256
# Lists that the last program to finish sums up at a time.
SIZES_AT_ONCE = 4096


class Routing(NamedTuple):
    """Lists of visits of [Hkv, n] blocks."""

    flat: Tensor
    """int32; ``visits``, then ``list_start``: one tensor, so that an operator can hand it on."""
    n_visits: int

    @property
    def visits(self) -> Tensor:
        """[N * Hq * S'], or [N * Hkv * S'] where a group shares its selection: the lists one after the other; entries
        past the last list are undefined."""
        return self.flat[: self.n_visits]

    @property
    def list_start(self) -> Tensor:
        """[Hkv * n + 1], where each list begins in ``visits``, and where the last one ends."""
        return self.flat[self.n_visits :]


# Fields of a task: 32 bytes, which a program loads at once.
RECORD = tl.constexpr(8)


class Tasks(NamedTuple):
    """Pieces of all lists, and how a kernel finds those of some KV heads; see :func:`read_task`."""

    table: Tensor
    """[n_entries, 8] int32: list, -1 in an empty entry; begin and end in ``visits``; number of keys of the list's
    block, row of its first key in the storage, and head there; where the list begins if it has several tasks, else -1;
    0.

    List ``l`` has the entries from ``list_start[l] // R + l`` on. That leaves room for its tasks, needs no sum over
    lists, and bounds the number of entries without a value from the device."""
    rows: int
    """R."""

    def count(self, n_visits: int, n_lists: int) -> int:
        """Bound of the entries of ``n_lists`` successive lists with at most ``n_visits`` visits."""
        return n_visits // self.rows + n_lists + 1


@triton.jit
def visit_block(
    visit, m_visit, i_h, block_indices, current_block, visible, page_row, s_ct, s_pages,
    G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Block ids of visits of KV head ``i_h``, -1 where there is none, or none in this storage."""
    row = visit // SLOTS  # [STEP]
    slot = visit - row * SLOTS  # [STEP]
    t = (row // G).to(tl.int64)  # [STEP]
    head = i_h * G + row % G  # [STEP]
    block = tl.load(block_indices + t * s_ct + head * S + slot, mask=m_visit & (slot < S), other=-1)  # [STEP]
    if SLOTS > S:
        m_current = m_visit & (slot == S)  # [STEP]
        seen = tl.load(visible + t, mask=m_current, other=0)  # [STEP]
        block = tl.where(seen > 0, tl.load(current_block + t, mask=m_current, other=-1), block)
    page = tl.load(page_row + i_h * s_pages + block, mask=block >= 0, other=-1)  # [STEP]
    return tl.where(page >= 0, block, -1)


@triton.jit(do_not_specialize=["n_visits", "n_blocks", "s_pages"], do_not_specialize_on_alignment=SLICED)
def _count_kernel(
    block_indices, current_block, visible, page_row, counts, list_start,
    n_visits, n_blocks, tile_visits, s_ct, s_pages,
    G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    p_counts = counts + (i_h * tl.num_programs(0) + i_t).to(tl.int64) * n_blocks
    o_v = tl.arange(0, STEP)  # [STEP]
    if (i_t == 0) & (i_h == 0):
        tl.store(list_start, 0)
    for b in range(0, n_blocks, STEP):
        tl.store(p_counts + b + o_v, 0, mask=b + o_v < n_blocks)
    tl.debug_barrier()
    begin = i_t * tile_visits
    # In this order the sum stays below 2^31.
    end = begin + tl.minimum(tile_visits, n_visits - begin)
    for v in range(begin, end, STEP):
        visit = v + o_v  # [STEP]
        block = visit_block(  # [STEP]
            visit, visit < end, i_h, block_indices, current_block, visible, page_row, s_ct, s_pages, G, S, SLOTS
        )
        tl.atomic_add(p_counts + block, 1, mask=block >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_tiles", "n_blocks"], do_not_specialize_on_alignment=SLICED)
def _running_sum_kernel(counts, list_start, n_tiles, n_blocks, BT: tl.constexpr, BB: tl.constexpr, SIZES: tl.constexpr):
    i_b, i_h = tl.program_id(0), tl.program_id(1)
    o_b = i_b * BB + tl.arange(0, BB)  # [BB]
    o_t = tl.arange(0, BT)  # [BT]
    p_counts = counts + i_h.to(tl.int64) * n_tiles * n_blocks + o_b[None, :]  # [1, BB]
    total = tl.zeros([BB], dtype=tl.int32)  # [BB]
    for t in range(0, n_tiles, BT):
        m = (t + o_t < n_tiles)[:, None] & (o_b < n_blocks)[None, :]  # [BT, BB]
        p = p_counts + (t + o_t).to(tl.int64)[:, None] * n_blocks  # [BT, BB]
        b_count = tl.load(p, mask=m, other=0)  # [BT, BB]
        tl.store(p, total[None, :] + tl.cumsum(b_count, 0) - b_count, mask=m)
        total += tl.sum(b_count, 0)
    # Shifted by one entry, so that an inclusive sum over lists gives where each list begins.
    tl.store(list_start + 1 + i_h * n_blocks + o_b, total, mask=o_b < n_blocks)
    # The first entry counts the programs that have finished. The last one sums up, and resets the entry to 0.
    tl.debug_barrier()
    if tl.atomic_add(list_start, 1) == tl.num_programs(0) * tl.num_programs(1) - 1:
        n_lists = n_blocks * tl.num_programs(1)
        o_l = tl.arange(0, SIZES)  # [SIZES]
        start = 0
        for i in range(0, n_lists, SIZES):
            p = list_start + 1 + i + o_l
            b_size = tl.load(p, mask=i + o_l < n_lists, other=0)  # [SIZES]
            tl.store(p, start + tl.cumsum(b_size, 0), mask=i + o_l < n_lists)
            start += tl.sum(b_size, 0)
        tl.store(list_start, 0)


@triton.jit(do_not_specialize=["n_visits", "n_blocks", "s_pages"], do_not_specialize_on_alignment=SLICED)
def _scatter_kernel(
    block_indices, current_block, visible, page_row, counts, list_start, visits,
    n_visits, n_blocks, tile_visits, s_ct, s_pages,
    G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    p_counts = counts + (i_h * tl.num_programs(0) + i_t).to(tl.int64) * n_blocks
    p_start = list_start + i_h * n_blocks
    begin = i_t * tile_visits
    # In this order the sum stays below 2^31.
    end = begin + tl.minimum(tile_visits, n_visits - begin)
    o_v = tl.arange(0, STEP)  # [STEP]
    block = visit_block(  # [STEP]
        begin + o_v, begin + o_v < end, i_h, block_indices, current_block, visible, page_row, s_ct, s_pages, G, S, SLOTS
    )
    for v in range(begin, end, STEP):
        # Loads of the next step's blocks overlap with this step's wait for its counts.
        ahead = v + STEP + o_v  # [STEP]
        next_block = visit_block(  # [STEP]
            ahead, ahead < end, i_h, block_indices, current_block, visible, page_row, s_ct, s_pages, G, S, SLOTS
        )
        m_v = block >= 0  # [STEP]
        earlier = (block[:, None] == block[None, :]) & (o_v[None, :] < o_v[:, None])  # [STEP, STEP]
        o_out = tl.load(p_start + block, mask=m_v, other=0) + tl.sum(earlier.to(tl.int32), 1)  # [STEP]
        o_out += tl.load(p_counts + block, mask=m_v, other=0, cache_modifier=".cg")
        tl.store(visits + o_out, v + o_v, mask=m_v)
        # All threads read the counts before any is incremented, and see the increments in the next step.
        tl.debug_barrier()
        tl.atomic_add(p_counts + block, 1, mask=m_v, sem="relaxed")
        tl.debug_barrier()
        block = next_block


@triton.jit(
    do_not_specialize=["first_list", "n_lists", "n_blocks", "n_entries", "steps", "s_row", "s_head"],
    do_not_specialize_on_alignment=SLICED,
)
def _task_kernel(
    list_start, page_row, page_head, length, table, first_list, n_lists, n_blocks, n_entries, task_rows, steps,
    s_row, s_head, s_head_n, BLOCK: tl.constexpr,
):  # fmt: skip
    first_entry = tl.load(list_start + first_list) // task_rows + first_list
    o_p = first_entry + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_p = o_p < n_entries  # [BLOCK]
    # The last list whose entries begin at or before this one.
    low = tl.zeros([BLOCK], tl.int32) + first_list  # [BLOCK]
    high = low + n_lists - 1  # [BLOCK]
    for _ in range(0, steps):
        middle = (low + high + 1) // 2  # [BLOCK]
        is_before = tl.load(list_start + middle) // task_rows + middle <= o_p  # [BLOCK]
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle - 1)
    start, end = tl.load(list_start + low), tl.load(list_start + low + 1)  # [BLOCK]
    begin = start + (o_p - start // task_rows - low) * task_rows  # [BLOCK]
    i_h, i_b = low // n_blocks, low % n_blocks  # [BLOCK]
    first_key = tl.load(page_row + i_h * s_row + i_b)  # [BLOCK]
    is_task = (begin < end) & (first_key >= 0)  # [BLOCK]
    p_table = table + o_p * RECORD  # [BLOCK]
    tl.store(p_table, tl.where(is_task, low, -1), mask=m_p)
    tl.store(p_table + 1, begin, mask=m_p)
    tl.store(p_table + 2, tl.minimum(begin + task_rows, end), mask=m_p)
    tl.store(p_table + 3, tl.load(length + i_b), mask=m_p)
    tl.store(p_table + 4, first_key.to(tl.int32), mask=m_p)
    tl.store(p_table + 5, tl.load(page_head + i_h * s_head + i_b * s_head_n), mask=m_p)
    tl.store(p_table + 6, tl.where(end - start > task_rows, start, -1), mask=m_p)
    tl.store(p_table + 7, 0, mask=m_p)


@triton.jit
def read_task(tasks, n_entries, task_rows, list_start, first_list, n_lists, i):
    """What :class:`Tasks` has in entry ``i`` of the lists from ``first_list`` on, but the last number.

    Lists are counted from there, -1 is none; ``list_start`` points at the first of these ``n_lists`` lists.
    """
    entry = tl.load(list_start) // task_rows + first_list + i
    m = entry < n_entries
    p_task = tasks + entry * RECORD
    i_list = tl.load(p_task, mask=m, other=-1) - first_list
    begin = tl.load(p_task + 1, mask=m, other=0)
    end = tl.load(p_task + 2, mask=m, other=0)
    n_keys = tl.load(p_task + 3, mask=m, other=0)
    first_key = tl.load(p_task + 4, mask=m, other=0)
    page = tl.load(p_task + 5, mask=m, other=0)
    split = tl.load(p_task + 6, mask=m, other=-1)
    return tl.where(i_list < n_lists, i_list, -1), begin, end, n_keys, first_key, page, split


def build_routing(
    block_indices: Tensor, current_block: Tensor | None, visible: Tensor | None, page_row: Tensor
) -> Routing:
    """Index of the visits of all rows to the blocks of one storage, or of several together.

    Args:
        block_indices: [N, Hq, S] int32 block ids, or [N, Hkv, S] where a group shares them, -1 for none; the last two
            dimensions contiguous. N * Hq * S' < 2^31.
        current_block, visible: [N] int32 or None; a row with ``visible == 0`` does not visit its current block.
        page_row: [Hkv, n] int64, -1 where a block is in none of them; unit stride in n.
    """
    n_rows, n_heads, n_selected = block_indices.shape
    n_kv, n_blocks = page_row.shape
    group, slots = n_heads // n_kv, n_selected + (current_block is not None)
    n_visits, n_lists = n_rows * group * slots, n_kv * n_blocks
    device = block_indices.device

    tile_rows = MIN_TILE_ROWS
    while cdiv(n_rows, tile_rows) * n_lists > COUNT_ENTRIES and tile_rows < n_rows:
        tile_rows *= 2
    n_tiles = cdiv(n_rows, tile_rows)
    counts = torch.empty(n_kv, n_tiles, n_blocks, dtype=torch.int32, device=device)
    index = Routing(torch.empty(n_kv * n_visits + n_lists + 1, dtype=torch.int32, device=device), n_kv * n_visits)
    list_start, visits = index.list_start, index.visits

    inputs = dict(block_indices=block_indices, current_block=current_block, visible=visible, page_row=page_row)
    numbers = dict(
        n_visits=n_visits, n_blocks=n_blocks, tile_visits=tile_rows * group * slots,
        s_ct=block_indices.stride(0), s_pages=page_row.stride(0),
    )  # fmt: skip
    constants = dict(G=group, S=n_selected, SLOTS=slots)
    with on_device(block_indices):
        _count_kernel[(n_tiles, n_kv)](
            **inputs, counts=counts, list_start=list_start, **numbers, **constants, STEP=128, **launch_options(4)
        )
        many = n_tiles > MANY_TILES
        _running_sum_kernel[(cdiv(n_blocks, 32), n_kv)](
            counts=counts, list_start=list_start, n_tiles=n_tiles, n_blocks=n_blocks,
            BT=TILES_AT_ONCE if many else 64, BB=32, SIZES=SIZES_AT_ONCE, **launch_options(8 if many else 4),
        )  # fmt: skip
        _scatter_kernel[(n_tiles, n_kv)](
            **inputs, counts=counts, list_start=list_start, visits=visits, **numbers, **constants, STEP=64,
            **launch_options(2),
        )  # fmt: skip
    return index


def cut_tasks(index: Routing, task_rows: int, pages, kv_heads: slice | None = None) -> Tasks:
    """Tasks of up to ``task_rows`` visits from the lists of an index.

    Args:
        pages: a :class:`moba_cp.blocks.Pages` of fewer than 2^31 rows, with ``row`` of unit stride and ``length``
            contiguous. Lists of blocks that are not in this storage have no tasks.
        kv_heads: make tasks for the lists of these KV heads alone, and read no others; all if it is None.
    """
    n_kv, n_blocks = pages.row.shape
    kv_heads = slice(0, n_kv) if kv_heads is None else kv_heads
    n_heads = kv_heads.stop - kv_heads.start
    n_entries = index.n_visits // task_rows + n_kv * n_blocks
    check_limit("the number of rows of a storage of K and V", pages.k.shape[0], "use more ranks")
    tasks = Tasks(torch.empty(n_entries, RECORD.value, dtype=torch.int32, device=index.flat.device), task_rows)
    first, some = kv_heads.start * n_blocks, n_heads * n_blocks
    # One more than a slice of these heads may read, wherever in a task its lists begin.
    programs = min(n_entries, tasks.count(index.n_visits // n_kv * n_heads, some) + 1)
    with on_device(index.flat):
        _task_kernel[(cdiv(programs, 256),)](
            list_start=index.list_start, page_row=pages.row, page_head=pages.head, length=pages.length,
            table=tasks.table, first_list=first, n_lists=some, n_blocks=n_blocks, n_entries=n_entries,
            task_rows=task_rows, steps=(some - 1).bit_length(), s_row=pages.row.stride(0),
            s_head=pages.head.stride(0), s_head_n=pages.head.stride(1), BLOCK=256, **launch_options(4),
        )  # fmt: skip
    return tasks
