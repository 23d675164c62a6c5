"""What the gradient kernels find laid out beforehand; the gradients themselves are tested in test_attend.py."""

import pytest
import torch

from moba_cp import kernels
from moba_cp.kernels import backward, launches, tuned
from tests.helpers.kernel_inputs import DEVICE, Problem, poisoned

# Tokens, B, keys per tile, visits per task.
SHAPES = {
    "two tiles": (150, 64, 32, 512),
    "many tiles": (500, 320, 32, 4096),
    "short last tile": (150, 80, 32, 512),
    "split lists": (300, 64, 32, 40),
    "more than a step": (900, 600, 128, 4096),
}
GROUP, SLOTS = 2, 3


def expected_facts(visits, task, task_rows: int, first: tuple[int, int], room: int, p: Problem) -> list[int]:
    """By plain loops: what a program has to know of a task, and the first visit that sees each tile of keys.

    ``first`` are the first list and the first visit of the slice, from which both are counted.
    """
    i_list, begin, end, n_keys, first_key, head, start, _ = task
    own_end, edges = begin, {}
    for place in range(begin, end):
        limit = 2**31 - 1
        if visits[place] % SLOTS == SLOTS - 1:
            limit = int(p.visible[visits[place] // SLOTS // GROUP])
            own_end = place + 1
        for n in range(p.key_tiles):
            if limit > n * p.bn:
                edges.setdefault(n, place)
    first_list, first = first
    i_sum = i_list - first_list if p.own.max() < room // task_rows else (start - first) // task_rows
    split = [i_sum, (begin - start) // task_rows] if start >= 0 else [-1, None]
    facts = [i_list - first_list, end - first, own_end - first, n_keys, first_key, head, *split]
    return facts + [edges.get(n, end) - first for n in range(p.key_tiles)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["sorted", "any order"])
def test_facts_of_tasks(monkeypatch, shape, order):
    """For rows in order, where own rows lead a list, and in any order, where they need not; the second of two heads."""
    tokens, block_size, bn, task_rows = SHAPES[shape]
    p = Problem([tokens - 41, 41], (2 * GROUP, 2), 16, block_size, SLOTS)
    p.key_tiles, p.bn = -(-block_size // bn), bn
    if order == "any order":
        at = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        p.q, p.dout, p.chosen, p.own, p.visible = p.q[at], p.dout[at], p.chosen[at], p.own[at], p.visible[at]
    # Some rows see nothing of their own block, some nothing else.
    p.visible[3:9], p.chosen[11:30] = 0, -1
    tile = tuned.dkdv_tile(16, block_size, torch.float32, p.q.device)
    monkeypatch.setattr(tuned, "dkdv_tile", lambda *_: tile._replace(bn=bn, task_rows=task_rows))
    noting = _Noting()
    monkeypatch.setattr(launches, "_visit_table_kernel", noting)
    index = kernels.routing_index(p.q, *p.visits, p.pages.row)
    stats = torch.zeros(tokens, 2 * GROUP, device=DEVICE)
    out = [torch.zeros_like(x) for x in (p.q, p.k, p.v)]
    with poisoned():
        kernels.attend_backward(
            p.q, p.pages, *p.visits, p.scale, p.dout, stats, stats, index=index, kv_heads=slice(1, 2), out=out
        )
    visits, table, list_start, all_facts = noting.seen
    n_blocks = p.pages.row.shape[1]
    first = n_blocks, list_start[0]
    first_place = first[1] // task_rows + n_blocks
    programs = zip(table[first_place:], all_facts)
    found = [(task, facts) for task, facts in programs if n_blocks <= task[0] < 2 * n_blocks]
    assert [task for task in table if n_blocks <= task[0]] == [task for task, _ in found]
    assert len(found) > 1 and any(task[6] >= 0 for task, _ in found) == (shape == "split lists")
    for task, facts in found:
        expected = expected_facts(visits, task, task_rows, first, tokens * GROUP * SLOTS, p)
        assert [x if y is not None else None for x, y in zip(facts, expected, strict=True)] == expected
    assert sum(facts[0] >= 0 for facts in all_facts) == len(found)


class _Noting:
    """In the place of the kernel: launches it, and notes its lists, tasks and what it lays out of them."""

    def __getitem__(self, grid):
        def launch(visits, tasks, list_start, task_info, **rest):
            backward._visit_table_kernel[grid](
                visits=visits, tasks=tasks, list_start=list_start, task_info=task_info, **rest
            )
            self.seen = [x.tolist() for x in (visits, tasks, list_start, task_info.view(grid[0], -1))]

        return launch
