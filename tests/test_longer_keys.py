"""Queries that are the last tokens of longer keys, and a batch dimension, against the reference."""

import pytest
import torch

from moba_cp import CPContext, MoBAConfig, full_attention, moba_attention, reference
from tests.helpers.cases import relative_error

CONFIG = MoBAConfig(16, 3)


def _case(rows, keys, heads=(4, 2), dim=8, dtype=torch.float64, seed=0):
    """Leaves q, k, v, and the ends of the documents among rows and keys."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n, h: torch.randn(n, h, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (rows, keys)]
    return [draw(sum(rows), heads[0]), draw(sum(keys), heads[1]), draw(sum(keys), heads[1])], *ends


def _results(attention, leaves, **how):
    out, lse = attention(*leaves, return_lse=True, **how)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, lse, *torch.autograd.grad((out * weight).sum(), leaves)]


ATTENTION = {
    "moba": (lambda *x, **how: moba_attention(*x, CONFIG, **how), reference.moba_attention),
    "full": (full_attention, reference.full_attention),
}


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize(
    "rows, keys",
    [([30], [130]), ([1], [97]), ([1, 1, 1], [5, 64, 90]), ([20, 0, 33], [70, 40, 33]), ([0, 7], [0, 64])],
    ids=str,
)
def test_rows_are_the_last_of_their_documents_keys(kind, rows, keys):
    leaves, ends, ends_k = _case(rows, keys)
    how = {} if len(rows) == 1 else {"cu_seqlens": ends, "cu_seqlens_k": ends_k}
    ours, plain = ATTENTION[kind]
    shape = (16, 3) if kind == "moba" else ()
    for actual, expected in zip(
        _results(ours, leaves, **how), _results(lambda *x, **h: plain(*x, *shape, **h), leaves, **how)
    ):
        assert relative_error(actual, expected) < 1e-12
    # The reference itself: the last rows of what all rows give.
    q, k, v = leaves
    whole = torch.zeros(len(k), 4, 8, dtype=q.dtype)
    last = reference._last_rows(len(q), len(k), ends, ends_k, "cpu")
    whole[last] = q.detach()
    all_rows = ours(whole, k, v, cu_seqlens=ends_k)
    torch.testing.assert_close(ours(q, k, v, **how), all_rows[last])


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("n_rows", [64, 20])
def test_a_batch_is_documents(kind, n_rows):
    q, k, v = (
        torch.randn(3, n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in ((n_rows, 4), (64, 2), (64, 2))
    )
    attention = ATTENTION[kind][0]
    out, lse = attention(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    for i in range(3):
        one, one_lse = attention(q[i], k[i], v[i], return_lse=True)
        torch.testing.assert_close(out[i], one)
        torch.testing.assert_close(lse[i], one_lse)
    single = attention(q[:1], k[:1], v[:1])
    torch.testing.assert_close(single, out[:1])
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    parts = [torch.autograd.grad(attention(q[i], k[i], v[i]).square().sum(), (q, k, v)) for i in range(3)]
    for grad, *of_parts in zip(grads, *parts):
        torch.testing.assert_close(grad, sum(of_parts))


@pytest.mark.parametrize("n_rows", [20, 5])
def test_a_batch_of_none_has_nothing(n_rows):
    q = torch.randn(0, n_rows, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 0, 20, 2, 8, dtype=torch.float64).unbind()
    out, selection = moba_attention(q, k, v, MoBAConfig(16, 3), return_selection=True)
    full = full_attention(q, k, v)
    assert out.shape == full.shape == q.shape and selection.shape == (0, n_rows, 4, 2)
    (out.sum() + full.sum()).backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_no_rows_among_keys(kind, batch):
    """As when all that a step computes belongs to other sequences: nothing comes out, and no gradient."""
    shape = () if batch is None else (batch,)
    q, k, v = (
        torch.randn(*shape, n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in ((0, 4), (20, 2), (20, 2))
    )
    how = {} if batch else {"cu_seqlens": torch.tensor([0, 0, 0]), "cu_seqlens_k": torch.tensor([0, 7, 20])}
    out, lse = ATTENTION[kind][0](q, k, v, return_lse=True, **how)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_a_batch_of_one_across_ranks_is_its_sequence():
    q, k, v = torch.randn(3, 1, 64, 2, 8)
    cp = CPContext(None, "zigzag", 64)
    torch.testing.assert_close(moba_attention(q, k, v, CONFIG, cp=cp), moba_attention(q, k, v, CONFIG))


def _good():
    return dict(q=torch.randn(8, 4, 8), k=torch.randn(32, 2, 8), v=torch.randn(32, 2, 8))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(cu_seqlens=torch.tensor([0, 8])), r"cu_seqlens says where documents end in q alone; pass cu_seqlens_k"),
        (dict(cu_seqlens_k=torch.tensor([0, 32])), r"cu_seqlens_k has 1 documents but cu_seqlens none"),
        (
            dict(cu_seqlens=torch.tensor([0, 4, 8]), cu_seqlens_k=torch.tensor([0, 32])),
            r"cu_seqlens_k has 1 documents but cu_seqlens 2",
        ),
        (
            dict(cu_seqlens=torch.tensor([0, 4, 8]), cu_seqlens_k=torch.tensor([0, 3, 32])),
            r"document 0 has 4 queries in cu_seqlens but 3 keys",
        ),
        (dict(cu_seqlens=torch.tensor([0, 8]), cu_seqlens_k=torch.tensor([0, 31])), r"end at the number of tokens, 32"),
        (dict(cu_seqlens=torch.tensor([0, 8]), cu_seqlens_k=[0, 32]), r"cu_seqlens_k is a list"),
        (dict(cp=CPContext(None, "zigzag", 32)), r"across ranks they must have as many"),
        (
            dict(q=torch.randn(2, 8, 4, 8), k=torch.randn(3, 9, 2, 8), v=torch.randn(3, 9, 2, 8)),
            r"they must have as many sequences",
        ),
        (
            {name: torch.randn(2, 8, 2, 8) for name in "qkv"} | dict(cu_seqlens=torch.tensor([0, 16])),
            r"passed with a batch dimension, whose sequences are documents",
        ),
        (
            {name: torch.randn(2, 8, 2, 8) for name in "qkv"} | dict(cp=CPContext(None, "zigzag", 16)),
            r"q has 2 sequences",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, says):
    for attention in (lambda **x: moba_attention(config=CONFIG, **x), full_attention):
        with pytest.raises(ValueError, match=says):
            attention(**(_good() | change))


def test_compiled_for_growing_keys():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda *x: moba_attention(*x, CONFIG), fullgraph=True, backend="aot_eager", dynamic=True)
    for n_keys in (40, 41, 70):
        q, k, v = torch.randn(6, 2, 8), torch.randn(n_keys, 1, 8), torch.randn(n_keys, 1, 8)
        torch.testing.assert_close(compiled(q, k, v), moba_attention(q, k, v, CONFIG))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
