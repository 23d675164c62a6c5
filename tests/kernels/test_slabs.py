"""Slabs of K and V, and sums of shares of their gradients, against plain PyTorch."""

import pytest
import torch

from moba_cp import eager, kernels
from tests.kernels.inputs import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packs(dtype):
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(90, 5, 40, generator=g).to(DEVICE, dtype)[:, 1:4] for _ in range(2))
    ours = torch.full((3, 100, 2, 40), torch.nan, device=DEVICE, dtype=dtype)
    expected = ours.clone()
    kernels.pack_slab(k, v, ours)
    eager.pack_slab(k, v, expected)
    assert torch.equal(expected[1, :90, 0], k[:, 1]) and torch.equal(expected[2, :90, 1], v[:, 2])
    assert torch.equal(ours[:, :90], expected[:, :90])
    assert ours[:, 90:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_shares, skip", [(0, -1), (1, -1), (3, -1), (3, 1)])
def test_sums(n_shares, skip, dtype):
    g = torch.Generator().manual_seed(1)
    own = torch.randn(3, 100, 2, 40, generator=g).to(DEVICE)
    # Every second of a larger message: shares need not follow one another.
    shares = torch.randn(n_shares, 2, 3, 100, 2, 40, generator=g).to(DEVICE, dtype)[:, 1]
    if skip >= 0:
        shares[skip] = torch.nan
    results = []
    for module in (kernels, eager):
        both = torch.full((2, 90, 5, 40), 7.0, device=DEVICE, dtype=dtype)
        module.sum_shares(own, shares, *both[:, :, 1:4], skip)
        results.append(both)
    expected = sum((x.float() for i, x in enumerate(shares) if i != skip), own)[:, :90]
    assert torch.allclose(results[1][0, :, 2].float(), expected[1, :, 0], atol=0.05)
    # The interpreter's bfloat16 is not rounded to the nearest.
    close = 0 if dtype == torch.float32 or DEVICE == "cuda" else 2**-7
    torch.testing.assert_close(*results, rtol=close, atol=0)
    assert (results[0][:, :, ::4] == 7).all()
