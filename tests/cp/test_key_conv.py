"""The convolution over keys, against plain loops, and on several ranks against one."""

import pytest
import torch

from moba_cp import CPContext
from moba_cp.cp.key_conv import convolve_keys
from moba_cp.eager import key_conv as eager_key_conv
from tests.helpers.distributed import run_threads

G, D = 2, 4
BOUNDS = {
    "one": [0, 48],
    "several": [0, 1, 3, 20, 20, 48],
}


def _plain(k, weight, bounds):
    """Row by row."""
    rows = []
    factors = weight.view(G, D // 2, -1).repeat(1, 2, 1)
    for begin, end in zip(bounds, bounds[1:]):
        for t in range(begin, end):
            reached = range(min(weight.shape[1], t - begin + 1))
            rows.append(k[t] + sum(factors[..., j] * k[t - j] for j in reached))
    return torch.stack(rows)


def _inputs(width, dtype=torch.float64, n=48):
    generator = torch.Generator().manual_seed(width)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return make(n, G, D), make(G * D // 2, width), make(n, G, D)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("rows", [1, 7, 2**16])
def test_one_rank_does_what_loops_do(name, width, rows, monkeypatch):
    monkeypatch.setattr(eager_key_conv, "_SLICE", rows)
    k, weight, dout = _inputs(width)
    results = []
    for function in (
        lambda k, w: convolve_keys(k, w, CPContext(None, "contiguous", 48, BOUNDS[name])),
        lambda k, w: _plain(k, w, BOUNDS[name]),
    ):
        leaves = [x.clone().requires_grad_() for x in (k, weight)]
        out = function(*leaves)
        out.backward(dout)
        results.append([out.detach(), *(x.grad for x in leaves)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def _of_a_rank(comm, layout, bounds, k, weight, dout):
    cp = CPContext(comm, layout, len(k), bounds)
    leaves = [cp.shard(k).requires_grad_(), weight.clone().requires_grad_()]
    out = convolve_keys(*leaves, cp)
    out.backward(cp.shard(dout))
    return cp.unshard(out.detach()), cp.unshard(leaves[0].grad), leaves[1].grad


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("layout", "name"),
    [("contiguous", "several"), ("zigzag", "one"), ("zigzag", "several"), ("zigzag_per_document", "one"),
     ("zigzag_per_document", "short")],
)  # fmt: skip
@pytest.mark.parametrize("width", [3, 5])
def test_several_ranks_equal_one(ranks, layout, name, width):
    """Segments of one or two tokens too, whose keys come from several others."""
    bounds = {**BOUNDS, "short": [0, 2 * ranks, 6 * ranks, 6 * ranks, 48]}[name]
    k, weight, dout = _inputs(width)
    ((out, dk, dweight),) = run_threads(1, _of_a_rank, "contiguous", bounds, k, weight, dout)
    parts = run_threads(ranks, _of_a_rank, layout, bounds, k, weight, dout)
    for there, grad, _ in parts:
        assert torch.equal(there, out)
        torch.testing.assert_close(grad, dk, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(of_weight for *_, of_weight in parts), dweight, rtol=0, atol=1e-12)


def test_keys_are_the_same_bits_whatever_the_ranks():
    """Blocks are chosen by keys' means, which must not depend on the number of ranks."""
    k, weight, dout = _inputs(5, torch.bfloat16)
    ((out, *_),) = run_threads(1, _of_a_rank, "contiguous", BOUNDS["several"], k, weight, dout)
    for there, *_ in run_threads(4, _of_a_rank, "zigzag", BOUNDS["several"], k, weight, dout):
        assert torch.equal(there, out)


def test_a_document_keeps_its_nan():
    k, weight, _ = _inputs(3)
    k[19] = float("nan")
    out = convolve_keys(k, weight, CPContext(None, "contiguous", 48, [0, 20, 48]))
    assert out[20:].isfinite().all() and out[19].isnan().all() and out[:19].isfinite().all()


def test_it_commutes_with_the_rotary_embedding():
    """Scores depend on distances alone: a document moved by some positions has the same."""
    torch.manual_seed(0)
    angles = torch.arange(64, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1])
    k, weight, _ = _inputs(3, n=8)
    q = torch.randn(8, G, D, dtype=torch.float64)

    def turned(x, first):
        cos, sin = (f(angles[first : first + len(x)])[:, None] for f in (torch.cos, torch.sin))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    scores = []
    for first in (0, 37):
        keys = convolve_keys(turned(k, first), weight, CPContext(None, "contiguous", 8))
        scores.append(torch.einsum("tgd,sgd->gts", turned(q, first), keys))
    torch.testing.assert_close(*scores, rtol=0, atol=1e-12)
