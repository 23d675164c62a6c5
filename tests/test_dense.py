"""Dense attention on one device: ranges against brute force, the plain backend, sums, and the choice of kernels."""

import importlib
import sys

import numpy as np
import pytest
import torch
import triton

from moba_cp import dense, full_attention
from moba_cp.cp.layout import LAYOUTS, positions_of, rank_segments
from moba_cp.dense import backends, plain, sums
from tests.helpers.cases import relative_error


def seen_by_hand(rows, keys, cu_seqlens) -> np.ndarray:
    """[N, R] bool: same document, key not after the row."""
    row, key = positions_of(rows)[:, None], positions_of(keys)[None]
    document = lambda position: np.searchsorted(cu_seqlens, position, side="right")
    return (document(row) == document(key)) & (key <= row)


def seen_by_rectangles(ranges) -> np.ndarray:
    """[N, R] int: how many rectangles show a key to a row."""
    seen = np.zeros((ranges.n_rows, ranges.n_keys), int)
    for row, n_rows, key, n_keys, causal in ranges.rectangles:
        shape = np.ones((n_rows, n_keys), int)
        seen[row : row + n_rows, key : key + n_keys] += np.tril(shape, n_keys - n_rows) if causal else shape
    return seen


def seen_by_calls(calls, ranges) -> np.ndarray:
    """[N, R] int: how many calls show a key to a row."""
    seen = np.zeros((ranges.n_rows, ranges.n_keys), int)
    for call in calls:
        rows, keys = np.arange(ranges.n_rows)[call.rows], np.arange(ranges.n_keys)[call.keys]
        cu_rows = [0, len(rows)] if call.cu_rows is None else call.cu_rows.tolist()
        cu_keys = [0, len(keys)] if call.cu_keys is None else call.cu_keys.tolist()
        assert cu_rows[-1] == len(rows) and cu_keys[-1] == len(keys)
        assert call.max_rows == max(np.diff(cu_rows)) and call.max_keys == max(np.diff(cu_keys))
        for a, b, c, d in zip(cu_rows, cu_rows[1:], cu_keys, cu_keys[1:]):
            shape = np.ones((b - a, d - c), int)
            seen[np.ix_(rows[a:b], keys[c:d])] += np.tril(shape, d - c - b + a) if call.causal else shape
    return seen


def random_documents(generator, n_tokens: int, multiple: int) -> np.ndarray:
    cuts = generator.integers(0, n_tokens // multiple + 1, size=generator.integers(0, 7)) * multiple
    return np.sort(np.concatenate([[0, n_tokens], cuts]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranges_show_exactly_what_causality_allows(layout, size):
    generator = np.random.default_rng(size)
    for _ in range(6):
        n_tokens = 2 * size * int(generator.integers(1, 7))
        bounds = random_documents(generator, n_tokens, 2 * size if layout == "zigzag_per_document" else 1)
        segments = rank_segments(layout, n_tokens, size, bounds)
        for rank in range(size):
            for keys in (*segments, [(0, n_tokens)]):
                ranges = dense.build_ranges(segments[rank], keys, bounds)
                expected = seen_by_hand(segments[rank], keys, bounds)
                assert (seen_by_rectangles(ranges) == expected).all()
                for calls in (
                    ranges.calls(torch.device("cpu")),
                    ranges.single_calls(),
                    ranges.single_calls(squares=True),
                ):
                    assert (seen_by_calls(calls, ranges) == expected).all()


def test_ring_steps_are_as_few_calls_as_they_can_be():
    # One document, zigzag over 4 ranks: own step one causal square, other steps one full rectangle.
    segments = rank_segments("zigzag", 64, 4, np.array([0, 64]))
    shapes = [dense.build_ranges(segments[1], source, np.array([0, 64])).rectangles for source in segments]
    assert shapes == [
        ((0, 16, 0, 8, False),),
        ((0, 16, 0, 16, True),),
        ((8, 8, 0, 16, False),),
        ((8, 8, 0, 16, False),),
    ]
    # Many documents dealt out one by one: still one call a step.
    bounds = np.arange(0, 65, 8)
    segments = rank_segments("zigzag_per_document", 64, 4, bounds)
    for source in segments:
        assert len(dense.build_ranges(segments[2], source, bounds).calls(torch.device("cpu"))) == 1


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("n, m", [(1, 2), (1, 300), (300, 300), (270, 600)])
def test_plain_attention_of_a_rectangle(n, m, causal):
    torch.manual_seed(n + m)
    q, k, v = (torch.randn(x, h, 8, dtype=torch.float64, requires_grad=True) for x, h in ((n, 4), (m, 2), (m, 2)))
    score = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(2, 1)) * 0.3
    if causal:
        score = score.masked_fill(torch.ones(n, m).tril(m - n) == 0, -torch.inf)
    expected = torch.einsum("hnm,mhd->nhd", score.softmax(-1), v.repeat_interleave(2, 1))
    dout = torch.randn_like(expected)
    expected.backward(dout)
    with torch.no_grad():
        out, lse = plain.attention(q, k, v, causal, 0.3)
        delta = (dout * out).sum(-1)
        grads = plain.attention_backward(q, k, v, causal, 0.3, dout, lse, delta)
    assert relative_error(out, expected) < 1e-12
    assert relative_error(lse, score.logsumexp(-1).T) < 1e-12
    for actual, x in zip(grads, (q, k, v)):
        assert relative_error(actual, x.grad) < 1e-12


def test_partials_join_any_rows_and_keep_a_single_result():
    torch.manual_seed(0)
    q, k, v = torch.randn(10, 2, 8), torch.randn(30, 2, 8), torch.randn(30, 2, 8)
    expected = plain.attention(q, k, v, False, 1.0)
    partials = dense.Partials(q)
    first = plain.attention(q, k[:9], v[:9], False, 1.0)
    partials.add(*first, slice(0, 10))
    assert partials.result()[0] is first[0]
    odd = torch.arange(1, 10, 2)
    partials.add(*plain.attention(q[odd], k[9:], v[9:], False, 1.0), odd)
    partials.add(*plain.attention(q[:1], k[9:], v[9:], False, 1.0), slice(0, 1))
    for row in (2, 4, 6, 8):
        partials.add(*plain.attention(q[row : row + 1], k[9:], v[9:], False, 1.0), slice(row, row + 1))
    for actual, want in zip(partials.result(), expected):
        torch.testing.assert_close(actual, want)


def test_partials_without_a_result_are_empty():
    out, lse = dense.Partials(torch.randn(3, 2, 8)).result()
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_sums_are_wide():
    like, half = torch.zeros(4, 1, 1, dtype=torch.bfloat16), torch.full((2, 1, 1), 2.0**-8, dtype=torch.bfloat16)
    total = dense.Sum(like)
    total.add(torch.ones_like(like), slice(0, 4))
    # Half a unit in the last place of bfloat16 is lost at once; two of them must not be.
    total.add(half, torch.tensor([0, 2]))
    total.add(half, torch.tensor([0, 2]))
    assert total.narrow().flatten().tolist() == [1 + 2**-7, 1, 1 + 2**-7, 1]
    wide = torch.ones(4, 1, 1)
    total.add_to(wide)
    assert wide.flatten().tolist() == [2 + 2**-7, 2, 2 + 2**-7, 2]


def test_a_sum_of_one_part_is_zero_elsewhere():
    total = dense.Sum(torch.zeros(4, 1, 1))
    total.add(torch.ones(2, 1, 1), slice(1, 3))
    assert total.narrow().flatten().tolist() == [0, 1, 1, 0]
    assert dense.Sum(torch.zeros(2, 1, 1)).narrow().flatten().tolist() == [0, 0]


@pytest.fixture
def interpreted_merge(monkeypatch):
    """:func:`moba_cp.kernels.merge.merge_partial` under Triton's interpreter, whatever the rest of the process does."""
    from moba_cp.kernels import merge

    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", True)
        yield importlib.reload(merge).merge_partial
    importlib.reload(merge)


@pytest.mark.parametrize("picked", [False, True], ids=["all rows", "some rows"])
def test_merge_kernel(interpreted_merge, picked):
    torch.manual_seed(0)
    n, heads, dim = 21, 3, 24
    rows = torch.randperm(n)[:17] if picked else None
    n_part = n if rows is None else len(rows)
    out, lse = torch.randn(n, heads, dim), torch.randn(heads, n).t()
    out[4], lse[4] = 0, -torch.inf
    part = torch.randn(n_part, 2 * heads, dim)[:, ::2].to(torch.float16)
    part_lse = torch.randn(n_part, heads)
    part_lse[0, 0], part_lse[1, 1] = -torch.inf, torch.nan
    expected, expected_lse = out.clone(), lse.clone()
    sums._merge_partial(expected, expected_lse, part, part_lse, slice(0, n) if rows is None else rows)
    interpreted_merge(out, lse, part, part_lse, rows)
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)
    assert out.isnan().sum() == dim


def test_no_tokens():
    q = torch.zeros(0, 2, 8, requires_grad=True)
    full_attention(q, q, q).sum().backward()
    assert q.grad.shape == q.shape


def test_backends_refuse_politely():
    q = torch.randn(16, 2, 8)
    for name in ("cudnn", "flash"):
        with pytest.raises(ValueError, match=f"backend='{name}' cannot serve: .*; use backend='auto'"):
            full_attention(q, q, q, backend=name)
    with pytest.raises(ValueError, match="backend='fast' is not one of auto, fa4, cudnn, flash, plain"):
        full_attention(q, q, q, backend="fast")
    assert dense.choose_backend(q, dense.build_ranges([(0, 16)], [(0, 16)], np.array([0, 16]))).name == "plain"


def test_a_broken_flash_attn_4_is_not_used(monkeypatch):
    backends._flash_attn_cute.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    try:
        q = torch.randn(16, 2, 8)
        with pytest.raises(ValueError, match="flash-attn-4 cannot be imported"):
            full_attention(q, q, q, backend="fa4")
        assert full_attention(q, q, q).shape == q.shape
    finally:
        backends._flash_attn_cute.cache_clear()


class _JointPlain(backends.Plain):
    """The plain backend in the calls of the fused ones, with a fault if asked for."""

    def __init__(self, fault=None):
        self.fault = fault

    def calls(self, ranges, device):
        return ranges.calls(device)

    def _each(self, call):
        for a, b in zip(call.cu_rows, call.cu_rows[1:]):
            yield slice(a, b)

    def forward(self, q, k, v, call, scale):
        if self.fault == "raises":
            raise RuntimeError("no kernel image")
        parts = [plain.attention(q[s], k[s], v[s], True, scale) for s in self._each(call)]
        out, lse = (torch.cat(part) for part in zip(*parts))
        return out, lse * (1 / 0.7 if self.fault == "lse" else 1)

    def backward(self, q, k, v, call, scale, dout, out, lse, deterministic):
        delta = torch.linalg.vecdot(dout, out)
        each = self._each(call)
        parts = [plain.attention_backward(q[s], k[s], v[s], True, scale, dout[s], lse[s], delta[s]) for s in each]
        dq, dk, dv = (torch.cat(part) for part in zip(*parts))
        return dq, dk.roll(1, 1) if self.fault == "heads" else dk, dv


@pytest.mark.parametrize(
    "fault, said",
    [
        (None, None),
        ("raises", "failed (RuntimeError: no kernel image)"),
        ("lse", "was wrong in lse by 42.9%"),
        ("heads", "was wrong in dk by "),
    ],
)
def test_a_young_backend_is_tried_before_it_is_used(fault, said):
    found = backends.disagreement(_JointPlain(fault), torch.device("cpu"), torch.float32, 16)
    assert found == said if said is None else found.startswith(said)
