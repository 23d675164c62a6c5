import pytest
import torch

from moba_cp import eager, kernels
from moba_cp.kernels import select_gated
from tests.helpers.kernel_inputs import DEVICE, Problem, poisoned, strided

# Sharing, blocks that are always taken, and query and KV heads: groups of one, three, eight and four.
CASES = [
    ("none", 1, True, (2, 2)),
    ("sum", 0, False, (6, 2)),
    ("max", 0, False, (8, 1)),
    ("sum", 2, False, (4, 1)),
    ("max", 1, True, (3, 1)),
    ("none", 0, False, (3, 1)),
]


def _by_means(p: Problem, gate):
    with poisoned():
        ours = kernels.select_blocks(strided(p.q), p.means, p.table.first, p.table.current_block, p.top_k, *gate)
    return ours, eager.select_blocks(p.q, p.means, p.table.first, p.table.current_block, p.top_k, *gate)


def _by_keys(p: Problem, gate):
    rows = p.table.start, p.table.first, p.table.current_block, p.block_size, p.top_k
    with poisoned():
        ours = kernels.select_by_keys(strided(p.q), strided(p.k), *rows, *gate)
    return ours, eager.select_by_keys(p.q, p.k, *rows, *gate)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_random(case, monkeypatch):
    """With scores of a few rows at a time."""
    monkeypatch.setattr(select_gated, "SCORE_BYTES", 4 * 7 * 40)
    *gate, heads = case
    p = Problem([70, 0, 20], heads, 24, 16, 5, seed=heads[0])
    for select in (_by_means, _by_keys):
        ours, expected = select(p, gate)
        assert ours.shape[1] == (heads[0] if gate[0] == "none" else heads[1])
        assert torch.equal(ours, expected), select.__name__


def test_more_blocks_than_a_tile_and_blocks_that_are_no_power_of_two():
    p = Problem([45 * 48 + 5], (2, 1), 16, 48, 9)
    rows = torch.tensor([0, 17, 2000, 2160], device=DEVICE)
    ranges = p.table.first[rows], p.table.current_block[rows]
    ours = kernels.select_blocks(p.q[rows], p.means, *ranges, p.top_k, "max", 1, True)
    assert torch.equal(ours, eager.select_blocks(p.q[rows], p.means, *ranges, p.top_k, "max", 1, True))
    ours = kernels.select_by_keys(p.q[rows], p.k, p.table.start, *ranges, 48, p.top_k, "sum", 1, True)
    assert torch.equal(ours, eager.select_by_keys(p.q[rows], p.k, p.table.start, *ranges, 48, p.top_k, "sum", 1, True))


def test_nan_ties_and_signed_zeros():
    for sharing in ("none", "sum", "max"):
        p = Problem([100], (2, 1) if sharing == "none" else (4, 2), 16, 16, 5)
        p.q, p.k = p.q.sign(), torch.randint(-1, 2, p.k.shape, device=DEVICE).to(p.k)
        p.k[2 * 16 : 3 * 16] = p.k[4 * 16 : 5 * 16]
        p.k[3 * 16 + 3, 0, 0], p.k[5 * 16 : 6 * 16, -1, 1], p.k[16, 0, 2] = torch.nan, torch.nan, torch.inf
        p.means = eager.block_means(p.k, p.table.start, p.table.length, 16)
        for select in (_by_means, _by_keys):
            ours, expected = select(p, (sharing, 0, True))
            assert torch.equal(ours, expected), (sharing, select.__name__)


def test_the_last_block_s_keys_end_with_the_storage():
    """Rows of the second document see the first one's last block in their tile, but never choose it."""
    p = Problem([37, 3], (2, 1), 16, 16, 3)
    storage = torch.full((p.k.shape[0] + 64, *p.k.shape[1:]), torch.nan, device=DEVICE)
    storage[: p.k.shape[0]] = p.k
    rows = p.table.start, p.table.first, p.table.current_block, 16, 3
    ours = kernels.select_by_keys(p.q, storage[: p.k.shape[0]], *rows)
    assert torch.equal(ours, eager.select_by_keys(p.q, p.k, *rows))


def test_rows_do_not_depend_on_one_another():
    p = Problem([80], (4, 2), 32, 16, 4)
    some = torch.arange(37, 80, 11, device=DEVICE)
    few, all_rows = (p.table.first[some], p.table.current_block[some]), (p.table.first, p.table.current_block)
    whole = kernels.select_blocks(p.q, p.means, *all_rows, p.top_k, "sum")
    assert torch.equal(kernels.select_blocks(p.q[some], p.means, *few, p.top_k, "sum"), whole[some])
    whole = kernels.select_by_keys(p.q, p.k, p.table.start, *all_rows, 16, p.top_k, "max")
    assert torch.equal(kernels.select_by_keys(p.q[some], p.k, p.table.start, *few, 16, p.top_k, "max"), whole[some])


@pytest.mark.parametrize("n_slots", [0, 1, 5, 63])
def test_given_blocks(n_slots):
    p = Problem([70, 0, 45], (4, 2), 16, 16, 2)
    g = torch.Generator().manual_seed(n_slots)
    given = torch.randint(-3, 9, (115, 2, n_slots + 1), generator=g).int().to(DEVICE)
    given[::5] = torch.randint(-(2**31), 2**31 - 1, given[::5].shape, generator=g).int().to(DEVICE)
    given = given[:, :, 1:]
    ranges = p.table.first, p.table.current_block
    with poisoned():
        ours = kernels.given_blocks(given, *ranges)
    assert torch.equal(ours, eager.given_blocks(given, *ranges))


def test_nothing_to_choose():
    p = Problem([40], (4, 2), 32, 16, 1)
    ranges = p.table.first, p.table.current_block
    assert kernels.select_blocks(p.q, p.means, *ranges, 1, "sum").shape == (40, 2, 0)
    none = kernels.select_blocks(p.q, p.means[:0], *ranges, 3, "max")
    assert none.shape == (40, 2, 2) and (none == -1).all()
    none = kernels.select_by_keys(p.q[:0], p.k, p.table.start, *(x[:0] for x in ranges), 16, 3)
    assert none.shape == (0, 4, 2)
