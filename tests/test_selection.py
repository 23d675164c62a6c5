"""Gates beside MoBA's own, and selections from outside, on one device against the reference."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moba_cp import CPContext, KVCache, MoBAConfig, moba_attention, reference
from moba_cp.bench import judge
from tests.helpers.cases import random_case, relative_error, run
from tests.helpers.selections import (
    draw_config,
    draw_indices,
    first_blocks,
    numbers_in_documents,
    reference_results,
    reference_selection,
)

NAMES = ("out", "dq", "dk", "dv", "lse")


def _equal(actual, expected, label=""):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert relative_error(a, e) < 1e-12, f"{label} {name}"


def _with_selection(case, config, **how):
    """[out, dq, dk, dv, lse] and the selection."""
    seen = []

    def attention(*qkv, return_lse):
        out, lse, selection = moba_attention(
            *qkv, config, cu_seqlens=case.cu_seqlens, return_lse=True, return_selection=True, **how
        )
        seen.append(selection)
        return out, lse

    return run(attention, case), seen[0]


@pytest.mark.parametrize("seed", range(16))
def test_any_gate_is_the_reference_s(seed):
    case, rng = random_case(seed), random.Random(seed)
    for _ in range(2):
        config = draw_config(rng, case)
        chosen = reference_selection(case, config)
        results, selection = _with_selection(case, config)
        assert torch.equal(selection, numbers_in_documents(case, chosen)), config
        _equal(results, reference_results(case, chosen), config)
        # Given back, it is the same to the bit.
        again, given = _with_selection(case, MoBAConfig(config.block_size, 1), block_indices=selection)
        assert torch.equal(given, selection)
        for name, a, b in zip(NAMES, again, results, strict=True):
            assert torch.equal(a, b), (config, name)


@pytest.mark.parametrize("shared", [False, True], ids=["each head", "shared"])
@pytest.mark.parametrize("seed", range(6))
def test_any_selection_from_outside(seed, shared):
    case = random_case(100 + seed)
    indices = draw_indices(case, seed, shared, seed)
    first, _ = first_blocks(case)
    chosen = torch.where(indices < 0, -1, indices + first[:, None, None])
    results, selection = _with_selection(
        case, MoBAConfig(case.block_size, 1), block_indices=indices, check_indices=True
    )
    assert torch.equal(selection, indices)
    _equal(results, reference_results(case, chosen))


@pytest.mark.parametrize("seed", range(4))
def test_what_is_no_past_block_is_passed_over_and_repeats_count_once(seed):
    case = random_case(200 + seed)
    g = torch.Generator().manual_seed(seed)
    n_slots = 9
    wild = torch.randint(-3, 12, (case.q.shape[0], case.q.shape[1], n_slots), generator=g).int()
    wild[:, :, 0] = torch.randint(-(2**31), 2**31 - 1, wild.shape[:2], generator=g).int()
    wild[::3, :, 5] = 2**31 - 1
    first, own = first_blocks(case)
    inside = (wild >= 0) & (wild < own[:, None, None])
    once = torch.where(inside, wild, -1)
    for slot in range(1, n_slots):
        again = (once[..., :slot] == once[..., slot : slot + 1]).any(-1)
        once[..., slot] = torch.where(again, -1, once[..., slot])
    results, selection = _with_selection(case, MoBAConfig(case.block_size, 1), block_indices=wild)
    assert torch.equal(selection, once)
    # The reference takes repeats as it finds them: they hide nothing and count once.
    _equal(results, reference_results(case, torch.where(inside, wild + first[:, None, None], -1)))


@pytest.mark.parametrize(
    "number, says",
    [
        (-2, "block -2 for row 40 .*neither a block nor -1"),
        (2, "block 2 for row 40 .*its own block, which is always attended to; name each of the blocks 0 to 1 at most"),
        (3, "block 3 for row 40 .*behind its own block, 2"),
        (0, "block 0 for row 40 .*more than once"),
    ],
)
def test_a_check_names_the_first_row(number, says):
    q, k = torch.randn(96, 4, 8, dtype=torch.float64), torch.randn(96, 2, 8, dtype=torch.float64)
    indices = torch.full((96, 2, 2), -1, dtype=torch.int32)
    indices[40:, 1, 0], indices[40:, 1, 1] = 0, number
    how = {"block_indices": indices, "check_indices": True}
    for context in ({}, {"cp": CPContext(None, "zigzag", 96)}):
        with pytest.raises(ValueError, match=says if not context else says.replace("row", "token")):
            moba_attention(q, k, k, MoBAConfig(16, 3), **how, **context)
    indices[40:, 1, 1] = 1
    moba_attention(q, k, k, MoBAConfig(16, 3), **how)
    # The first row of a document has nothing to name.
    with pytest.raises(ValueError, match="for row 48 .*; name none there"):
        moba_attention(q, k, k, MoBAConfig(16, 3), cu_seqlens=torch.tensor([0, 48, 96]), **how)


@pytest.mark.parametrize(
    "indices, says",
    [
        ([1, 2], "block_indices is a list; pass int32 .64, 4, S., or .64, 2, S. for one selection of the heads"),
        (torch.zeros(64, 2, 3), "dtype torch.float32"),
        (torch.zeros(64, 3, 3, dtype=torch.int32), r"shape \(64, 3, 3\).*; pass int32 \[64, 4, S\]"),
        (torch.zeros(63, 2, 3, dtype=torch.int32), r"shape \(63, 2, 3\)"),
        (torch.zeros(64, 2, 64, dtype=torch.int32), "S up to 63"),
        (torch.zeros(64, 2, dtype=torch.int32), r"shape \(64, 2\)"),
    ],
)
def test_wrong_tensors_are_named(indices, says):
    q, k = torch.randn(64, 4, 8), torch.randn(64, 2, 8)
    with pytest.raises(ValueError, match=says):
        moba_attention(q, k, k, MoBAConfig(16, 3), block_indices=indices)
    with pytest.raises(ValueError, match="check_indices=True, but there are no block_indices"):
        moba_attention(q, k, k, MoBAConfig(16, 3), check_indices=True)


def test_batches_and_longer_keys():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, h, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    config = MoBAConfig(16, 3, shared_by_group="max", min_recent=1)
    out, lse, selection = moba_attention(q, k, v, config, return_lse=True, return_selection=True)
    assert selection.shape == (2, 70, 2, 2)
    assert torch.equal(moba_attention(q, k, v, config, block_indices=selection), out)
    # The last rows of each sequence alone.
    part, some = moba_attention(q[:, 40:], k, v, config, return_selection=True)
    assert torch.equal(some, selection[:, 40:])
    torch.testing.assert_close(part, out[:, 40:], rtol=0, atol=1e-12)
    given = moba_attention(q[:, 40:], k, v, config, block_indices=some, check_indices=True)
    assert torch.equal(given, part)
    expected = reference.moba_attention(q[1], k[1], v[1], 16, 3, None, None, False, None, None, *config.gate)
    torch.testing.assert_close(out[1], expected, rtol=0, atol=1e-12)


def test_no_blocks_at_all_is_the_own_block():
    q, k = torch.randn(64, 4, 8, dtype=torch.float64), torch.randn(64, 2, 8, dtype=torch.float64)
    none = torch.empty(64, 2, 0, dtype=torch.int32)
    out, selection = moba_attention(q, k, k, MoBAConfig(16, 4), block_indices=none, return_selection=True)
    assert selection.shape == none.shape
    assert torch.equal(out, moba_attention(q, k, k, MoBAConfig(16, 1)))


@pytest.mark.parametrize("score", ["mean", "max"])
def test_nan_and_infinity_choose_as_the_reference_says(score):
    """A maximum takes no notice of NaN, a sum does; what is always taken is taken whatever its score."""
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(96, h, 8, generator=g, dtype=torch.float64).abs() + 0.1 for h in (4, 2))
    k[3, 0, 2], k[17, 0, 1], k[40, 1, 0], k[50, 1, 5] = torch.nan, -torch.inf, torch.inf, torch.nan
    q[90:, 1, 3] = torch.nan
    for sharing in ("none", "sum", "max"):
        for sink in (False, True):
            config = MoBAConfig(16, 4, shared_by_group=sharing, score=score, sink=sink)
            _, selection = moba_attention(q, k, k, config, return_selection=True)
            expected = reference.select_blocks(q, k, 16, 4, None, *config.gate)
            assert torch.equal(selection, expected.int()), (sharing, sink)


def test_ties_go_to_the_newer_block_in_every_gate():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(160, 4, 8, generator=g, dtype=torch.float64)
    k = torch.randn(1, 2, 8, generator=g, dtype=torch.float64).expand(160, 2, 8).contiguous()
    own = torch.arange(160) // 16
    for sharing in ("none", "sum", "max"):
        for score in ("mean", "max"):
            config = MoBAConfig(16, 4, shared_by_group=sharing, score=score)
            _, selection = moba_attention(q, k, k, config, return_selection=True)
            newest = own[:, None, None] - 1 - torch.arange(3)
            assert torch.equal(selection, torch.where(newest >= 0, newest, -1).expand_as(selection).int())
            _, selection = moba_attention(q, k, k, replace(config, sink=True), return_selection=True)
            assert (selection[16:] == 0).any(-1).all()


def test_shapes_on_the_meta_device_and_compiled_as_one_graph():
    q, k, v = (torch.randn(64, h, 8, device="meta") for h in (4, 2, 2))
    config = MoBAConfig(16, 3, shared_by_group="sum", score="max", min_recent=1, sink=True)
    out, selection = moba_attention(q, k, v, config, return_selection=True)
    assert out.is_meta and selection.shape == (64, 2, 2) and selection.is_meta
    given = torch.zeros(64, 4, 5, dtype=torch.int32, device="meta")
    out, selection = moba_attention(q, k, v, config, block_indices=given, check_indices=True, return_selection=True)
    assert selection.shape == given.shape and selection.dtype == torch.int32

    def loss(q, k, v, given):
        out, selection = moba_attention(q, k, v, config, return_selection=True)
        return (out * moba_attention(q, k, v, config, block_indices=given, check_indices=True)).sum(), selection

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (70, 90, 50):
        leaves = [torch.randn(n, h, 8, requires_grad=True) for h in (4, 2, 2)]
        given = torch.full((n, 2, 3), -1, dtype=torch.int32)
        given[20:, :, 1] = 0
        (plain, expected), (ours, selection) = loss(*leaves, given), compiled(*leaves, given)
        assert torch.equal(selection, expected)
        grads = torch.autograd.grad(plain, leaves), torch.autograd.grad(ours, leaves)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="names block 9 for row 30"):
        given[30, 0, 0] = 9
        compiled(*leaves, given)


def test_what_results_are_judged_by_is_what_is_selected():
    """`moba-cp verify` and the benchmarks hold a config's attention against its own gate."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(200, h, 8, generator=g, dtype=torch.float64) for h in (4, 2))
    for sharing in ("none", "sum"):
        for score in ("mean", "max"):
            config = MoBAConfig(16, 5, False, sharing, score, 1, True)
            _, selection = moba_attention(q, k, k, config, return_selection=True)
            assert torch.equal(judge.select(q, k, config), selection)


def test_the_page_s_example():
    names = {}
    page = (Path(__file__).parents[1] / "docs" / "selections.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], names)
    names["out"].sum().backward()
    assert names["selection"].shape == (1024, 2, 3) and names["q"].grad.isfinite().all()


@pytest.mark.parametrize("n_rows", [1, 30], ids=["few rows", "many rows"])
def test_a_cache_takes_any_gate(n_rows):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 100, h, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    for sharing in ("none", "sum", "max"):
        for score in ("mean", "max"):
            config = MoBAConfig(16, 3, shared_by_group=sharing, score=score, sink=True)
            cache = KVCache(16)
            cache.append(k, v)
            out = cache.moba_attention(q[:, -n_rows:], config)
            expected = moba_attention(q, k, v, config)[:, -n_rows:]
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
