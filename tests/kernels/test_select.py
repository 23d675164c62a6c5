import pytest
import torch

from moba_cp import eager, kernels
from tests.helpers.kernel_inputs import DEVICE, Problem, poisoned, strided


def select_both(p: Problem, q=None, means=None):
    q, means = p.q if q is None else q, p.means if means is None else means
    with poisoned():
        ours = kernels.select_blocks(strided(q), means, p.table.first, p.table.current_block, p.top_k)
    return ours, eager.select_blocks(q, means, p.table.first, p.table.current_block, p.top_k)


@pytest.mark.parametrize("top_k", [2, 4, 13])
@pytest.mark.parametrize("lengths", [[190], [90, 0, 50]], ids=str)
def test_random(lengths, top_k):
    ours, expected = select_both(Problem(lengths, (2, 1), 40, 16, top_k, seed=top_k))
    assert torch.equal(ours, expected)


def test_more_blocks_than_one_tile_of_any_kernel():
    # Best blocks spread over 300 blocks: a top-k of tiles that are never merged would lose some.
    p = Problem([300 * 16], (1, 1), 16, 16, 9)
    rows = torch.tensor([0, 17, 2000, 4799], device=DEVICE)
    ours = kernels.select_blocks(p.q[rows], p.means, p.table.first[rows], p.table.current_block[rows], p.top_k)
    assert torch.equal(ours, p.chosen[rows])


def test_ties_go_to_the_newer_block():
    p = Problem([215], (2, 1), 16, 16, 5)
    q, means = p.q.sign(), torch.randint(-1, 2, p.means.shape).to(p.means)
    means[3] = means[11] = means[12]
    ours, expected = select_both(p, q, means)
    assert torch.equal(ours, expected)
    zeros, _ = select_both(p, torch.zeros_like(q), -means)
    own = p.table.current_block[:, None, None]
    newest = own - 1 - torch.arange(4, device=DEVICE)
    assert torch.equal(zeros, torch.where(newest >= 0, newest, -1).expand_as(zeros).int())


def test_nan_ranks_below_minus_infinity():
    p = Problem([180], (1, 1), 16, 16, 6)
    q, means = p.q.abs() + 1, p.means.clone()
    means[2, 0, 0], means[4, 0, 3], means[7, 0, 1], means[9, 0, 2] = torch.nan, -torch.inf, torch.inf, torch.nan
    ours, expected = select_both(p, q, means)
    assert torch.equal(ours, expected)
    assert (ours[-1] == 7).any() and not (ours[-1] == 2).any()


def test_rows_do_not_depend_on_one_another():
    p = Problem([200], (2, 2), 32, 16, 4)
    some = torch.arange(37, 190, 11, device=DEVICE)
    ours = kernels.select_blocks(p.q[some], p.means, p.table.first[some], p.table.current_block[some], p.top_k)
    assert torch.equal(ours, kernels.select_blocks(p.q, p.means, p.table.first, p.table.current_block, p.top_k)[some])


def test_nothing_to_choose():
    p = Problem([40], (2, 1), 32, 16, 1)
    assert kernels.select_blocks(p.q, p.means, p.table.first, p.table.current_block, 1).shape == (40, 2, 0)
    none = kernels.select_blocks(p.q, p.means[:0], p.table.first, p.table.current_block, 3)
    assert none.shape == (40, 2, 2) and (none == -1).all()
