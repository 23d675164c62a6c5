"""What attention gives blocks, by the kernels and by plain PyTorch in float64."""

from dataclasses import replace

import pytest
import torch

from moba_cp import eager, kernels
from tests.helpers.kernel_inputs import DEVICE, Problem, poisoned, strided


@pytest.mark.parametrize(
    "group, dim, block_size, dtype",
    [(1, 32, 16, torch.float32), (3, 40, 48, torch.float32), (17, 32, 16, torch.float16)],
    ids=["one head", "odd sizes", "a large group, 16 bits"],
)
def test_masses(group, dim, block_size, dtype):
    p = Problem([5 * block_size // 2, block_size + 3], (2 * group, 2), dim, block_size, 3, dtype)
    heads = slice(group, 2 * group)
    q, k = strided(p.q)[:, heads], strided(p.k)[:, 1]
    _, lse = eager.attend(p.q.double(), _wide(p.pages), *p.visits, p.scale)
    lse = lse[:, heads]
    start = p.table.start[p.table.length == block_size]
    narrow = strided(lse.float()[..., None].expand(-1, -1, 8).contiguous())[..., 0]
    with poisoned():
        got = kernels.block_masses(q, k, narrow, start, block_size, p.scale)
    exact = q.double(), k.double(), lse
    # A kernel's program serves one row of these: the interpreter takes its time.
    some = slice(block_size, None, 5)
    expected = eager.block_masses(*exact, start, block_size, p.scale)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)

    ids = p.chosen[:, heads.start].long()
    begins = torch.where(ids >= 0, p.table.start[ids.clamp(min=0)], -1)
    with poisoned():
        got = kernels.selected_masses(q[some], k, narrow[some], begins[some], block_size, p.scale)
    ids, begins, exact = ids[some], begins[some], (q[some].double(), k.double(), lse[some])
    expected = eager.selected_masses(*exact, begins, block_size, p.scale)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert (got[ids < 0] == 0).all() and (got[ids >= 0] > 0).all()
    # What a row attends to whole is the same by either.
    column = torch.searchsorted(start, begins.clamp(min=0))
    whole = eager.block_masses(*exact, start, block_size, p.scale).gather(1, column)
    torch.testing.assert_close(expected[ids >= 0], whole[ids >= 0])


def _wide(pages):
    return replace(pages, k=pages.k.double(), v=pages.v.double())


def test_scores_of_keys_that_are_not_attended_to_do_not_become_infinite():
    q, k = torch.full((3, 1, 32), 100.0, device=DEVICE), torch.full((16, 32), 100.0, device=DEVICE)
    start, lse = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(3, 1, device=DEVICE)
    lse[1] = float("nan")
    found = kernels.block_masses(q, k, lse, start, 16, 1.0)
    assert found[0] == 16 and found[2] == 16 and found[1].isnan()
    assert eager.block_masses(q, k, lse, start, 16, 1.0).nan_to_num(-1).equal(found.nan_to_num(-1))
    assert kernels.block_masses(q[:0], k, lse[:0], start, 16, 1.0).shape == (0, 1)
    assert kernels.selected_masses(q, k, lse, start.new_zeros(3, 0), 16, 1.0).shape == (3, 0)
