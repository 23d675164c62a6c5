"""Blocks copied into messages, and their gradients added where they lie, against the plain PyTorch path."""

import pytest
import torch

from moba_cp import eager, kernels
from moba_cp.blocks import Pages
from tests.helpers.kernel_inputs import DEVICE, strided

BLOCK = 48


def _storage(seed: int):
    """Pages of 2 KV heads and 7 blocks, some short, some elsewhere; pairs to copy, their offsets and rows."""
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor([48, 48, 17, 48, 1, 48, 30], dtype=torch.int32)
    n, n_kv, dim = length.numel(), 2, 40
    k, v = (strided(torch.randn(400, n_kv, dim, generator=g)) for _ in range(2))
    start = 11 + length.long().cumsum(0) - length
    row = start.expand(n_kv, -1).clone()
    row[0, 2] = row[1, 3] = row[1, 5] = -1
    head = torch.arange(n_kv, dtype=torch.int32)[:, None].expand(-1, n)
    pages = Pages(*(x.to(DEVICE) for x in (k, v, row, head, length)), BLOCK)
    pairs = torch.randperm(n_kv * n, generator=g)[:11]
    rows = length.long()[pairs % n]
    return pages, pairs.to(DEVICE), (rows.cumsum(0) - rows).to(DEVICE), int(rows.sum()), g


def test_copies():
    pages, pairs, offset, n_rows, _ = _storage(0)
    ours, expected = (torch.full((n_rows, 2, 40), 7.0, device=DEVICE) for _ in range(2))
    kernels.copy_pages(pages, pairs, offset, ours)
    eager.copy_pages(pages, pairs, offset, expected)
    assert torch.equal(ours, expected)
    assert (ours == 7).any() and not (ours == 7).all(), "blocks that are elsewhere are left as they are"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adds(dtype):
    pages, pairs, offset, n_rows, g = _storage(1)
    arrived = torch.randn(n_rows, 2, 40, generator=g).to(DEVICE, dtype)
    both = torch.randn(400, 2, 2, 40, generator=g).to(DEVICE)
    ours, expected = both.clone(), both.clone()
    middle = int(offset[5])
    for begin, end in ((middle, n_rows), (0, middle)):
        for module, into in ((kernels, ours), (eager, expected)):
            module.add_pages(into[:, :, 0], into[:, :, 1], pages, pairs, offset, arrived, begin, end)
    assert torch.equal(ours, expected) and not torch.equal(ours, both)


def test_nothing_to_move():
    pages, pairs, offset, _, _ = _storage(2)
    message = torch.empty(0, 2, 40, device=DEVICE)
    into = torch.zeros(400, 2, 2, 40, device=DEVICE)
    for module in (kernels, eager):
        module.copy_pages(pages, pairs[:0], offset[:0], message)
        module.add_pages(into[:, :, 0], into[:, :, 1], pages, pairs[:0], offset[:0], message, 0, 0)
    assert not into.any()
