import pytest
import torch

from moba_cp.kernels import routing
from tests.kernels.inputs import DEVICE, Problem, poisoned


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
@pytest.mark.parametrize("count_entries", [1 << 23, 1], ids=["small tiles", "one tile"])
def test_lists_are_sorted_and_complete(monkeypatch, with_own, count_entries):
    monkeypatch.setattr(routing, "COUNT_ENTRIES", count_entries)
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


def test_tasks_cover_each_list_once():
    sizes = torch.tensor([0, 5, 1, 0, 64, 130, 3])
    starts = torch.cat([torch.zeros(1), sizes.cumsum(0)]).int().to(DEVICE)
    with poisoned():
        tasks = routing.cut_tasks(starts, int(sizes.sum()) + 20, 32)
    table = tasks.table.T.tolist()
    expected = [
        [i, int(starts[i]) + r, min(int(starts[i]) + r + 32, int(starts[i + 1]))]
        for i, size in enumerate(sizes.tolist())
        for r in range(0, size, 32)
    ]
    assert table[: len(expected)] == expected
    assert all(row[0] == -1 for row in table[len(expected) :])
