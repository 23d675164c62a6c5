"""Selections shared by a query group where only a GPU shows it: low precision, the kernels for Hopper, determinism."""

import pytest
import torch

from moba_cp import kernels
from moba_cp.blocks import block_table, local_pages
from moba_cp.kernels import tuned
from tests.helpers.kernel_inputs import poisoned
from tests.kernels.test_kernels_gpu import BF16, FP16, FP32, chosen_mask, gradients, plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = 19
# (Hq, Hkv), D, B, blocks chosen besides a row's own, dtype; 19 random batches of each.
KINDS = [
    ((32, 2), 128, 128, 3, BF16), ((16, 1), 128, 64, 7, BF16), ((8, 1), 128, 128, 15, BF16),
    ((16, 2), 64, 128, 4, BF16), ((8, 2), 128, 256, 3, BF16), ((16, 4), 64, 512, 1, FP16),
    ((6, 2), 72, 48, 3, FP16), ((12, 1), 128, 64, 2, FP32),
]  # fmt: skip


def draw_selection(table, n_kv: int, n_slots: int, g: torch.Generator, sink: bool) -> torch.Tensor:
    """[N, Hkv, S] int32: candidates at random, some slots empty; with ``sink`` most rows choose their first block."""
    n_rows, n_blocks = table.current_block.numel(), table.start.numel()
    block = torch.arange(n_blocks, device="cuda")
    candidate = (block >= table.first[:, None]) & (block < table.current_block[:, None])
    score = torch.rand(n_rows, n_kv, n_blocks, generator=g, device="cuda")
    if sink:
        score += (block == table.first[:, None])[:, None]
    score = score.masked_fill(~candidate[:, None], -1)
    best = score.topk(min(n_slots, n_blocks), -1)
    empty = torch.rand(best.values.shape, generator=g, device="cuda") < 0.1
    chosen = torch.where((best.values < 0) | empty, -1, best.indices).int()
    return torch.nn.functional.pad(chosen, (0, n_slots - chosen.shape[2]), value=-1).contiguous()


def batch(kind, seed: int, n_tokens: int | None = None):
    """q, k, v, dout, table, the selection."""
    (n_q, n_kv), dim, block_size, n_slots, dtype = kind
    g = torch.Generator("cuda").manual_seed(seed)
    draw = lambda n: int(torch.randint(n, (1,), generator=g, device="cuda"))
    n = n_tokens or 1 + draw(max(800, (n_slots + 3) * block_size))
    cuts = sorted(draw(n + 1) for _ in range(draw(3)))
    cu_seqlens = torch.tensor([0, *cuts, n], dtype=torch.int32, device="cuda")
    tensors = [torch.randn(n, h, dim, generator=g, device="cuda").to(dtype) for h in (n_q, n_kv, n_kv, n_q)]
    table = block_table(n, block_size, cu_seqlens, "cuda")
    return *tensors, table, draw_selection(table, n_kv, n_slots, g, bool(draw(2)))


def attention(q, k, v, dout, table, chosen, deterministic=False):
    """[out, dq, dk, dv] by the kernels."""
    pages, scale = local_pages(k, v, table), q.shape[2] ** -0.5
    visits = chosen, table.current_block, table.visible
    index = kernels.routing_index(q, *visits, pages.row)
    out, lse = kernels.attend(q, pages, *visits, scale, out_dtype=q.dtype, index=index)
    delta = kernels.row_sums(dout, out)
    return out, *kernels.attend_backward(
        q, pages, *visits, scale, dout, lse, delta, deterministic, local_dtype=q.dtype, index=index
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_shapes_are_as_good_as_plain_torch(kind):
    for seed in range(SHAPES):
        q, k, v, dout, table, chosen = batch(kind, seed)
        with poisoned():
            ours = attention(q, k, v, dout, table, chosen)
        for_each = chosen.repeat_interleave(q.shape[1] // k.shape[1], 1)
        mask, scale = chosen_mask(for_each, table), q.shape[2] ** -0.5
        exact = gradients(lambda *x: plain(*x, mask, scale), *(x.double() for x in (q, k, v, dout)))
        rough = gradients(lambda *x: plain(*x, mask, scale), q, k, v, dout)
        for name, x, y, z, factor in zip(("out", "dq", "dk", "dv"), ours, rough, exact, (2, 3, 3, 3), strict=True):
            error = lambda a: (a.double() - z).abs().max().item()
            assert error(x) <= factor * error(y) + 1e-5, f"{name}, seed {seed}, tokens {q.shape[0]}"


@pytest.mark.parametrize("block_size", [64, 128])
def test_long_documents_as_with_a_copy_for_each_head(block_size, monkeypatch):
    """Lists of many tasks, against the portable kernels and one head's selection after the other."""
    q, k, v, dout, table, chosen = batch(((32, 2), 128, block_size, 7, BF16), block_size, n_tokens=20_000)
    ours = attention(q, k, v, dout, table, chosen)
    monkeypatch.setattr(tuned, "SPECIALIZED", {})
    theirs = attention(q, k, v, dout, table, chosen.repeat_interleave(16, 1))
    for x, y in zip(ours, theirs, strict=True):
        error = (x.float() - y.float()).abs()
        assert error.max() < 2e-2 * y.abs().max() and error.mean() < 1e-2 * y.float().abs().mean()


@pytest.mark.parametrize("block_size", [64, 128, 512])
def test_deterministic_mode_repeats_bit_for_bit(block_size):
    inputs = batch(((32, 2), 128, block_size, 7, BF16), block_size, n_tokens=20_000)
    first = attention(*inputs, deterministic=True)
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(attention(*inputs, deterministic=True), first, strict=True))


def test_the_forward_repeats_bit_for_bit():
    """Whatever the order in which its tasks run."""
    inputs = batch(((32, 2), 128, 128, 15, BF16), 0, n_tokens=20_000)
    first = attention(*inputs)[0]
    assert all(torch.equal(attention(*inputs)[0], first) for _ in range(20))
