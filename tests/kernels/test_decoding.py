"""Few rows with many keys behind them: each row for itself."""

import pytest
import torch

from moba_cp import KVCache, MoBAConfig, eager, kernels, moba_attention, reference
from moba_cp.blocks import block_table, local_pages
from tests.helpers.kernel_inputs import DEVICE, close, poisoned, strided


class Few:
    """The last ``rows`` of each document of random ``keys``."""

    def __init__(self, rows, keys, heads, dim, block_size, top_k, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda n, h: torch.randn(n, h, dim, generator=g).to(DEVICE, dtype)
        self.q, self.k, self.v = draw(sum(rows), heads[0]), draw(sum(keys), heads[1]), draw(sum(keys), heads[1])
        self.cu_rows, self.cu_keys = (torch.tensor([0, *x]).cumsum(0).int() for x in (rows, keys))
        self.top_k, self.scale = top_k, dim**-0.5
        self.table = block_table(sum(keys), block_size, self.cu_keys, DEVICE, sum(rows), self.cu_rows)
        self.means = eager.block_means(self.k, self.table.start, self.table.length, block_size)
        self.ranges = self.table.first, self.table.current_block
        self.pages = local_pages(self.k, self.v, self.table)


SHAPES = [
    ([1], [190], (4, 2), 40, 16, 4),
    ([2, 0, 3], [150, 33, 47], (2, 1), 16, 32, 3),
    ([1, 1], [300, 9], (2, 2), 64, 160, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_many_rows_do(shape):
    p = Few(*shape)
    chosen = eager.select_blocks(p.q, p.means, *p.ranges, p.top_k)
    with poisoned():
        ours = kernels.select_few(strided(p.q), strided(p.means), *p.ranges, p.top_k)
        k, v = strided(p.k), strided(p.v)
        out, lse = kernels.attend_few(
            strided(p.q), local_pages(k, v, p.table), chosen, p.table.current_block, p.table.visible, p.scale
        )
    assert torch.equal(ours, chosen)
    pages = local_pages(p.k.double(), p.v.double(), p.table)
    expected = eager.attend(p.q.double(), pages, chosen, p.table.current_block, p.table.visible, p.scale)
    close(out, expected[0]), close(lse, expected[1])


def test_more_blocks_than_one_program_scores():
    p = Few([2], [400 * 16], (1, 1), 16, 16, 9)
    expected = eager.select_blocks(p.q, p.means, *p.ranges, 9)
    assert torch.equal(kernels.select_few(p.q, p.means, *p.ranges, 9), expected)
    assert torch.equal(kernels.select_few(p.q, p.means, *p.ranges, 9, most=399), expected)
    many = Few([1], [70 * 16], (1, 1), 16, 16, 64)
    assert torch.equal(
        kernels.select_few(many.q, many.means, *many.ranges, 64),
        eager.select_blocks(many.q, many.means, *many.ranges, 64),
    )


@pytest.mark.parametrize("dim", [16, 40, 64, 128])
def test_every_slot_is_written_whatever_the_rounding(dim):
    """Sums that cancel: a score that is rounded in two ways would be above itself."""
    p = Few([3], [40 * 16], (4, 2), dim, 16, 9)
    half = dim // 2
    q, means = p.q.clone(), p.means.clone()
    q[..., half:], means[..., half:] = -q[..., :half], means[..., :half] * (1 + 2**-20)
    with poisoned():
        ours = kernels.select_few(q, means, *p.ranges, 9)
    assert all(len(set(row)) == 8 and 0 <= min(row) and max(row) < 40 for row in ours.flatten(0, 1).tolist())


def test_ties_and_nan():
    p = Few([2], [300], (2, 1), 16, 16, 6)
    newest = p.table.current_block[:, None, None] - torch.arange(1, 6, device=DEVICE)
    zeros = kernels.select_few(torch.zeros_like(p.q), -p.means, *p.ranges, 6)
    assert torch.equal(zeros, newest.expand_as(zeros).int())
    q, means = p.q.abs() + 1, p.means.clone()
    means[2, 0, 0], means[4, 0, 3], means[7, 0, 1], means[9, 0, 2] = torch.nan, -torch.inf, torch.inf, torch.nan
    assert torch.equal(kernels.select_few(q, means, *p.ranges, 6), eager.select_blocks(q, means, *p.ranges, 6))


def test_nothing_to_choose_and_nothing_to_see():
    p = Few([1], [40], (2, 1), 32, 16, 1)
    assert kernels.select_few(p.q, p.means, *p.ranges, 1).shape == (1, 2, 0)
    assert (kernels.select_few(p.q, p.means, *p.ranges, 3, most=0) == -1).all()
    none = torch.full((1, 2, 2), -1, dtype=torch.int32, device=DEVICE)
    out, lse = kernels.attend_few(p.q, p.pages, none, p.table.current_block, 0 * p.table.visible, p.scale)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_rows_at_the_end_of_longer_keys_through_all_kernels():
    """Forward and backward of the public function, more rows than a tile has."""
    p = Few([70, 30], [200, 90], (2, 1), 16, 32, 3)
    leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    documents = dict(cu_seqlens=p.cu_rows.to(DEVICE), cu_seqlens_k=p.cu_keys.to(DEVICE))
    out, lse = moba_attention(*leaves, MoBAConfig(32, 3), return_lse=True, **documents)
    exact = [x.detach().double().cpu().requires_grad_() for x in leaves]
    wanted, wanted_lse = reference.moba_attention(*exact, 32, 3, p.cu_rows, None, True, cu_seqlens_k=p.cu_keys)
    close(out.cpu(), wanted), close(lse.cpu(), wanted_lse)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    grads = torch.autograd.grad((out * weight.to(DEVICE)).sum(), leaves)
    for actual, expected in zip(grads, torch.autograd.grad((wanted * weight).sum(), exact), strict=True):
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_in_pieces_and_padded():
    """Kernels for many rows and for few, one after the other, on one storage."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 90, h, 16, generator=g).to(DEVICE) for h in (2, 1, 1))
    padding, cache, outs, at = torch.tensor([0, 21], device=DEVICE), KVCache(16), [], 0
    for size in (40, 30, 1, 1, 18):
        piece, at = slice(at, at + size), at + size
        cache.append(k[:, piece], v[:, piece])
        outs.append(cache.moba_attention(q[:, piece], MoBAConfig(16, 3), padding=padding))
    out = torch.cat(outs, 1)
    for i, skip in enumerate((0, 21)):
        expected = reference.moba_attention(*(x[i, skip:].double().cpu() for x in (q, k, v)), 16, 3)
        close(out[i, skip:].cpu(), expected)
        assert (out[i, :skip] == 0).all()
