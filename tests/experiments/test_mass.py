"""The share of the softmax inside chosen blocks, against plain loops, and in a model that is trained."""

import pytest
import torch

from moba_cp.experiments.mass import block_sizes, mass_inside


def test_the_share_is_that_of_loops():
    torch.manual_seed(0)
    length, block, positions = 50, 8, torch.tensor([27, 33, 49])
    q, k = torch.randn(3, 4, 16), torch.randn(length, 2, 16)
    found = mass_inside(q, k, positions, 0.5, block, [1, 2, 4])
    sums = torch.zeros(3)
    for n, t in enumerate(positions.tolist()):
        for h in range(4):
            keys = k[: t + 1, h // 2]
            weights = (keys @ q[n, h] * 0.5).softmax(0)
            # A block before the current one is whole.
            earlier = [(k[b * block : (b + 1) * block, h // 2].mean(0) @ q[n, h], b) for b in range(t // block)]
            order = [t // block] + [b for _, b in sorted(earlier, reverse=True)]
            for i, top_k in enumerate((1, 2, 4)):
                sums[i] += sum(weights[b * block : (b + 1) * block].sum() for b in order[:top_k])
    assert torch.allclose(found, sums / 12, atol=1e-5)
    assert found[0] < found[1] < found[2] < 1


def test_all_blocks_hold_all():
    q, k = torch.randn(2, 2, 8), torch.randn(32, 2, 8)
    assert mass_inside(q, k, torch.tensor([30, 31]), 1.0, 8, [9])[0] == pytest.approx(1, abs=1e-5)


def test_block_sizes_follow_the_length():
    assert block_sizes(32768) == [64, 128, 256, 512, 1024, 2048, 4096] and block_sizes(512) == [16, 32, 64]
