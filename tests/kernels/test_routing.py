from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from moba_cp.blocks import Pages
from moba_cp.kernels import routing
from moba_cp.kernels.work import MAX_VISITS
from tests.helpers.kernel_inputs import DEVICE, Problem, poisoned


def expected_lists(chosen, own, visible, page_row):
    """Visits of every (KV head, block) by plain loops."""
    n_rows, n_heads, n_chosen = chosen.shape
    n_kv, n_blocks = page_row.shape
    group, slots = n_heads // n_kv, n_chosen + (own is not None)
    lists = [[] for _ in range(n_kv * n_blocks)]
    for h in range(n_kv):
        for t in range(n_rows):
            for g in range(group):
                blocks = chosen[t, h * group + g].tolist()
                if own is not None:
                    blocks.append(int(own[t]) if visible[t] > 0 else -1)
                for slot, block in enumerate(blocks):
                    if block >= 0 and page_row[h, block] >= 0:
                        lists[h * n_blocks + block].append((t * group + g) * slots + slot)
    return lists


@pytest.mark.parametrize("with_own", [True, False], ids=["own", "chosen"])
@pytest.mark.parametrize(
    "count_entries, sizes, tile_rows",
    [(1 << 23, 4096, 64), (1, 16, 64), (1 << 23, 4096, 4)],
    ids=["small tiles", "one tile, long sums", "many tiles"],
)
def test_lists_are_sorted_and_complete(monkeypatch, with_own, count_entries, sizes, tile_rows):
    monkeypatch.setattr(routing, "COUNT_ENTRIES", count_entries)
    monkeypatch.setattr(routing, "SIZES_AT_ONCE", sizes)
    monkeypatch.setattr(routing, "MIN_TILE_ROWS", tile_rows)
    # Of 80 tiles at most 32 at a time.
    monkeypatch.setattr(routing, "MANY_TILES", 40)
    monkeypatch.setattr(routing, "TILES_AT_ONCE", 32)
    p = Problem([130, 0, 190], (4, 2), 16, 16, 4)
    own, visible = (p.own, p.visible.clone()) if with_own else (None, None)
    if with_own:
        visible[5:9] = 0
    row = p.pages.row.clone()
    row[1, 3] = row[0, 7] = -1
    with poisoned():
        index = routing.build_routing(p.chosen, own, visible, row)
    expected = expected_lists(p.chosen, own, visible, row)
    starts = index.list_start.tolist()
    assert starts[0] == 0
    for i, visits in enumerate(expected):
        assert index.visits[starts[i] : starts[i + 1]].tolist() == visits


SIZES = [0, 5, 1, 0, 64, 130, 3, 0, 32, 33, 31, 0]


def _index(sizes) -> routing.Routing:
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    flat = torch.zeros(starts[-1] + 20, dtype=torch.int32).tolist() + starts
    return routing.Routing(torch.tensor(flat, dtype=torch.int32, device=DEVICE), starts[-1] + 20)


def _pages(n_kv: int, n_blocks: int) -> Pages:
    """Pages of which no two numbers are the same, in no order."""
    number = torch.arange(n_kv * n_blocks, device=DEVICE).flip(0).view(n_kv, n_blocks)
    length = 1000 + torch.arange(n_blocks, dtype=torch.int32, device=DEVICE)
    storage = torch.zeros(1, 1, 1, device=DEVICE)
    # Heads need not be the same number for all blocks, nor lie side by side.
    heads = torch.stack([number, 100 + number], 2).int()[..., 1]
    return Pages(storage, storage, 10_000 + number, heads, length, 2048)


def _expected(starts: list[int], pages: Pages, lists: range) -> list[list[int]]:
    """What a table has of the tasks of some lists."""
    length, row, head = pages.length.tolist(), pages.row.flatten().tolist(), pages.head.flatten().tolist()
    return [
        [i, starts[i] + r, min(starts[i] + r + 32, starts[i + 1]), length[i % len(length)], row[i], head[i]]
        + [starts[i] if SIZES[i] > 32 else -1, 0]
        for i in lists
        for r in range(0, SIZES[i], 32)
    ]


def test_tasks_cover_each_list_once():
    index, pages = _index(SIZES), _pages(1, 12)
    with poisoned():
        tasks = routing.cut_tasks(index, 32, pages, slice(0, 1))
    expected = _expected(index.list_start.tolist(), pages, range(len(SIZES)))
    assert [row for row in tasks.table.tolist() if row[0] >= 0] == expected


@triton.jit
def _read_kernel(tasks, list_start, out, places, task_rows, first_list, n_lists, n: tl.constexpr):
    i = tl.program_id(0)
    i_list, begin, end, n_keys, first_key, page, split = routing.read_task(
        tasks, places, task_rows, list_start, first_list, n_lists, i
    )
    tl.store(out + i, i_list)
    tl.store(out + n + i, begin)
    tl.store(out + 2 * n + i, end)
    tl.store(out + 3 * n + i, n_keys)
    tl.store(out + 4 * n + i, first_key)
    tl.store(out + 5 * n + i, page)
    tl.store(out + 6 * n + i, split)


def _read(tasks: routing.Tasks, index: routing.Routing, first: int, last: int, n_visits: int) -> list[list[int]]:
    """The tasks that programs for lists first .. last find."""
    count = tasks.count(n_visits, last - first)
    out = torch.full((7, count), -7, dtype=torch.int32, device=DEVICE)
    part = index.list_start[first : last + 1]
    _read_kernel[(count,)](tasks.table, part, out, tasks.table.shape[0], 32, first, last - first, n=count)
    return [row for row in out.T.tolist() if row[0] >= 0]


@pytest.mark.parametrize("lists", [(0, 12), (3, 6), (6, 12), (0, 1), (5, 6)])
def test_programs_find_the_tasks_of_their_lists(lists):
    index, pages, (first, last) = _index(SIZES), _pages(1, 12), lists
    tasks = routing.cut_tasks(index, 32, pages, slice(0, 1))
    expected = _expected(index.list_start.tolist(), pages, range(first, last))
    found = _read(tasks, index, first, last, sum(SIZES[first:last]))
    assert found == [[i - first, *rest] for i, *rest, _ in expected]


@pytest.mark.parametrize("heads, part", [((0, 1), (0, 1)), ((1, 3), (1, 3)), ((1, 4), (2, 3)), ((2, 4), (3, 4))])
def test_tasks_of_some_heads_serve_these_and_parts_of_them(heads, part):
    """4 heads of 3 blocks, of which one is elsewhere."""
    starts = [0, *torch.tensor(SIZES).cumsum(0).tolist()]
    n_visits = 4 * max(sum(SIZES[3 * h : 3 * h + 3]) for h in range(4))
    flat = [0] * n_visits + starts
    index = routing.Routing(torch.tensor(flat, dtype=torch.int32, device=DEVICE), n_visits)
    pages = _pages(4, 3)
    pages.row[3, 0] = -1
    with poisoned():
        tasks = routing.cut_tasks(index, 32, pages, slice(*heads))
    first, last = 3 * part[0], 3 * part[1]
    expected = _expected(starts, pages, range(first, last))
    found = _read(tasks, index, first, last, n_visits // 4 * (part[1] - part[0]))
    assert found == [[i - first, *rest] for i, *rest, _ in expected if i != 9]


def test_as_many_visits_as_places_can_be_numbered():
    """The last task of the longest index ends where its list does, although a whole task would end past 2^31."""
    task_rows = 8192
    starts = [0, MAX_VISITS - 5, MAX_VISITS]
    list_start = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    index = SimpleNamespace(list_start=list_start, flat=list_start, n_visits=MAX_VISITS)
    table = routing.cut_tasks(index, task_rows, _pages(1, 2), slice(0, 1)).table
    found = table[table[:, 0] >= 0]
    assert found.shape[0] == -(-starts[1] // task_rows) + 1
    assert found[-1, :3].tolist() == [1, *starts[1:]]
    begin, end = found[:, 1], found[:, 2]
    assert (end - begin).sum() == MAX_VISITS and (end > begin).all()
