"""Slabs of K and V, and sums of shares of their gradients, against plain PyTorch."""

import pytest
import torch

from moba_cp import eager, kernels
from tests.helpers.kernel_inputs import DEVICE

# Before the first row, inside of a tile of rows, behind all of them.
CUTS = [0, 37, 95]


def _by_head(slab, cut: int):
    """A slab of three heads of 95 rows as [3, 95, 2, 40]."""
    before, after = slab[: 3 * cut], slab[3 * cut :]
    return torch.cat([before.view(3, cut, 2, 40), after.view(3, 95 - cut, 2, 40)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_packs(cut, dtype):
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(90, 5, 40, generator=g).to(DEVICE, dtype)[:, 1:4] for _ in range(2))
    for module in (kernels, eager):
        slab = torch.full((3 * 95, 2, 40), torch.nan, device=DEVICE, dtype=dtype)
        module.pack_kv_shard(k, v, slab, cut)
        rows = _by_head(slab, cut)
        assert torch.equal(rows[:, :90, 0], k.transpose(0, 1)) and torch.equal(rows[:, :90, 1], v.transpose(0, 1))
        assert rows[:, 90:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shares", [[], [(0, 285)], [(0, 3), (1, 1), (3, 285), (0, 285)]], ids=str)
def test_sums(shares, cut, dtype):
    """Shares have some rows of the slab, lie in any order, and leave out what nobody is to read."""
    g = torch.Generator().manual_seed(1)
    own = torch.randn(3 * 95, 2, 40, generator=g).to(DEVICE, dtype)
    arrived = torch.full((2000, 2, 40), torch.nan, device=DEVICE, dtype=dtype)
    expected, places = own.to(torch.float32, copy=True), []
    for i, (first, end) in enumerate(shares):
        share = torch.randn(end - first, 2, 40, generator=g).to(DEVICE, dtype)
        places.append((1500 - 500 * i, first, end))
        arrived[places[i][0] :][: end - first] = share
        expected[first:end] += share.float()
    places = torch.tensor(places, dtype=torch.int64, device=DEVICE).view(-1, 3)
    results = []
    for module in (kernels, eager):
        both = torch.full((2, 90, 5, 40), 7.0, device=DEVICE, dtype=dtype)
        module.sum_partial_grads(own, arrived, places, *both[:, :, 1:4], cut)
        results.append(both)
    assert torch.equal(results[1][0, :, 2], _by_head(expected, cut)[1, :90, 0].to(dtype))
    # The interpreter's bfloat16 is not rounded to the nearest.
    close = 0 if dtype == torch.float32 or DEVICE == "cuda" else 2**-7
    torch.testing.assert_close(*results, rtol=close, atol=0)
    assert (results[0][:, :, ::4] == 7).all()
