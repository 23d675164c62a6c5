"""Layouts and the context: who holds what."""

import numpy as np
import pytest
import torch

from moba_cp import CPContext
from moba_cp.cp.layout import LAYOUTS, positions_of, rank_segments
from tests.helpers.distributed import run_threads


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_token_is_held_once(layout, size):
    cu_seqlens = np.array([0, 2, 2, 7, 12]) * 2 * size
    segments = rank_segments(layout, int(cu_seqlens[-1]), size, cu_seqlens)
    positions = [positions_of(s) for s in segments]
    assert len({len(p) for p in positions}) == 1
    assert sorted(np.concatenate(positions)) == list(range(cu_seqlens[-1]))


def test_zigzag_pairs_the_first_chunk_with_the_last():
    segments = rank_segments("zigzag", 24, 3, np.array([0, 24]))
    assert segments == [[(0, 4), (20, 4)], [(4, 4), (16, 4)], [(8, 8)]]


def test_zigzag_per_document():
    segments = rank_segments("zigzag_per_document", 12, 2, np.array([0, 4, 12]))
    assert segments == [[(0, 1), (3, 3), (10, 2)], [(1, 2), (6, 4)]]


@pytest.mark.parametrize(
    "layout, seq_len, cu, says",
    [
        ("zigzag", 100001, None, r"seq_len=100001 is not divisible by 2 \* cp_size = 6 \(zigzag layout\); use 100002"),
        ("contiguous", 100, None, r"seq_len=100 is not divisible by cp_size = 3 \(contiguous layout\); use 102"),
        ("zigzag_per_document", 12, [0, 5, 12], r"length of document 0=5 is not divisible by 2 \* cp_size = 6"),
        ("zigzag", 3, None, r"seq_len=3 .* use 6"),
        ("zigzag", 0, None, r"seq_len=0 is not positive"),
        ("zig", 12, None, r"layout='zig' is not one of contiguous, zigzag, zigzag_per_document"),
        ("zigzag", 12, [0, 5], r"cu_seqlens=\[0, 5\] must start at 0"),
    ],
)
def test_bad_lengths_are_named(layout, seq_len, cu, says):
    def build(comm):
        with pytest.raises(ValueError, match=says):
            CPContext(comm, layout, seq_len, None if cu is None else torch.tensor(cu))

    run_threads(3, build)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shard_and_unshard_are_inverse(layout):
    x = torch.randn(5, 24, 3)

    def roundtrip(comm):
        cp = CPContext(comm, layout, 24, torch.tensor([0, 12, 24]))
        mine = cp.shard(x, dim=1)
        assert torch.equal(mine, x[:, cp.positions])
        assert torch.equal(cp.document_positions, cp.positions % 12)
        assert torch.equal(cp.document_starts, cp.positions // 12 * 12)
        assert torch.equal(cp.unshard(mine, dim=1), x)
        with pytest.raises(ValueError, match="dimension 0 of x has length 5, not seq_len=24"):
            cp.shard(x)

    run_threads(2, roundtrip)
