"""The convolution over keys against plain PyTorch: rows to the bit, sums over rows in float64."""

import pytest
import torch

from moba_cp import CPContext, eager, kernels, ops
from moba_cp.cp.key_conv import convolve_keys, convolve_next_keys
from moba_cp.kernels import key_conv
from tests.helpers.distributed import run_threads
from tests.helpers.kernel_inputs import DEVICE, poisoned, strided

# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# Documents; heads and head dim: an odd number of pairs, one that fills a tile, the least and the largest.
SHAPES = {
    "odd": ([1, 2, 3, 4, 5, 6, 200], 3, 10),
    "tile": ([65, 63], 2, 64),
    "pair": ([1, 5000], 1, 2),
    "wide": ([7, 1, 13], 2, 256),
    "none": ([0], 2, 8),
}


def make(lengths, heads, dim, width, dtype):
    """k, dout, weight, and how many rows before each are of its document."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float32).to(DEVICE, dtype)
    inside = torch.cat([torch.arange(n).clamp_max(width - 1) for n in lengths]).to(DEVICE, torch.uint8)
    rows = sum(lengths), heads, dim
    return draw(*rows), draw(*rows), draw(heads * dim // 2, width), inside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_plain_pytorch(name, width, dtype):
    k, dout, weight, inside = make(*SHAPES[name], width, dtype)
    with poisoned():
        out = kernels.convolve(strided(k), weight, inside)
        dk, dweight = kernels.convolve_backward(strided(dout), strided(k), weight, inside)
    expected_dk, _ = eager.convolve_backward(dout, k, weight, inside)
    assert torch.equal(out, eager.convolve(k, weight, inside)) and torch.equal(dk, expected_dk)
    assert out.is_contiguous() and dk.is_contiguous()
    _, exact = eager.convolve_backward(dout.double(), k.double(), weight.double(), inside)
    assert dweight.dtype == torch.float32 and dweight.shape == weight.shape
    torch.testing.assert_close(dweight.double(), exact, rtol=1e-5, atol=1e-6 * len(k) ** 0.5)


@pytest.mark.parametrize("width", [3, 5])
def test_rows_are_the_same_bits_among_any(width):
    """A piece of a document, or a window of one row, as decoding and other ranks compute them."""
    k, _, weight, inside = make([300], 2, 12, width, DTYPES[-1])
    out, reach = kernels.convolve(k, weight, inside), width - 1
    for begin, end in ((reach, reach + 1), (131, 132), (64, 300)):
        piece = kernels.convolve(k[begin - reach : end].contiguous(), weight, inside[: end - begin + reach])
        assert torch.equal(piece[reach:], out[begin:end])


@pytest.mark.parametrize("n", [1, 2, 37])
def test_next_keys_are_those_of_the_whole(n, monkeypatch):
    monkeypatch.setattr("moba_cp.cp.key_conv.backend", lambda k: kernels)
    k, _, weight, inside = make([60], 2, 12, 3, DTYPES[-1])
    whole = torch.stack([kernels.convolve(x, weight, inside) for x in (k, k.flip(0))])
    sequences = torch.stack([k, k.flip(0)])
    for begin in (2, 20):
        ours = convolve_next_keys(sequences[:, begin : begin + n], sequences[:, begin - 2 : begin], weight)
        assert torch.equal(ours, whole[:, begin : begin + n])


def test_a_document_keeps_its_nan():
    k, dout, weight, inside = make([5, 6], 1, 4, 3, DTYPES[-1])
    k[4], dout[5] = float("nan"), float("nan")
    out = kernels.convolve(k, weight, inside)
    dk, dweight = kernels.convolve_backward(dout, k, weight, inside)
    assert out[4].isnan().all() and out[:4].isfinite().all() and out[5:].isfinite().all()
    assert dk[5].isnan().all() and dk[:5].isfinite().all() and dk[6:].isfinite().all() and dweight.isnan().all()


def test_gradients_are_the_same_bits_every_time():
    k, dout, weight, inside = make([700, 1300], 2, 12, 5, DTYPES[-1])
    assert len(k) > 2 * key_conv.TILE // 8
    first = kernels.convolve_backward(dout, k, weight, inside)
    for _ in range(3):
        again = kernels.convolve_backward(dout, k, weight, inside)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def _of_a_rank(comm, layout, bounds, k, weight, dout):
    cp = CPContext(comm, layout, len(k), bounds, device=DEVICE)
    leaves = [cp.shard(k).requires_grad_(), weight.clone().requires_grad_()]
    assert ops.backend(k) is kernels
    out = convolve_keys(*leaves, cp)
    out.backward(cp.shard(dout))
    return cp.unshard(out.detach()), cp.unshard(leaves[0].grad), leaves[1].grad


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_several_ranks_equal_one(layout, width):
    """Keys to the bit: blocks are chosen by them."""
    lengths = [1, 2, 17, 0, 28]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    k, dout, weight, _ = make(lengths, 2, 12, width, DTYPES[-1])
    ((out, dk, dweight),) = run_threads(1, _of_a_rank, "contiguous", bounds, k, weight, dout)
    with poisoned():
        parts = run_threads(3, _of_a_rank, layout, bounds, k, weight, dout)
    rounding = 4 * torch.finfo(k.dtype).eps
    for there, grad, _ in parts:
        assert torch.equal(there, out)
        torch.testing.assert_close(grad, dk, rtol=rounding, atol=rounding)
    together = sum(of_weight.double() for *_, of_weight in parts)
    torch.testing.assert_close(together, dweight.double(), rtol=rounding, atol=8 * rounding)
