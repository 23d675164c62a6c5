import pytest
import torch

from moba_cp import eager, kernels
from tests.helpers.kernel_inputs import DEVICE, Problem, poisoned, strided


@pytest.mark.parametrize("lengths, block_size, dim", [([100], 16, 40), ([50, 0, 3, 79], 48, 32), ([1], 16, 64)])
def test_block_means(lengths, block_size, dim):
    p = Problem(lengths, (2, 2), dim, block_size, 2)
    with poisoned():
        means = kernels.block_means(strided(p.k), p.table.start, p.table.length, block_size)
    expected = eager.block_means(p.k.double(), p.table.start, p.table.length, block_size)
    torch.testing.assert_close(means, expected.float())
    assert (means[p.table.length == 0] == 0).all()


def test_no_blocks():
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert kernels.block_means(torch.zeros(0, 2, 32, device=DEVICE), none, none.int(), 16).shape == (0, 2, 32)
