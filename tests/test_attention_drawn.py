"""Attention on drawn inputs: ties, huge and tiny values, documents of every length; and that no token sees a later one.

By default some cases of each; ``MOBA_CP_TEST_CASES=2000`` (hypothesis) and the ``slow`` tests draw more.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moba_cp import MoBAConfig, moba_attention, reference
from tests.helpers.cases import Case, run, run_reference

CASES = int(os.environ.get("MOBA_CP_TEST_CASES", "40"))
DRAWN = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw, dtype):
    """A batch of at most 256 tokens; values of few kinds (so that scores tie), or spread over many magnitudes."""
    block_size, top_k = draw(st.sampled_from([16, 32, 48, 64])), draw(st.integers(1, 8))
    n_kv, group, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([8, 16, 24, 40]))
    lengths = draw(
        st.lists(st.integers(0, 128), min_size=1, max_size=4).filter(lambda lengths: 0 < sum(lengths) <= 256)
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, kind = sum(lengths), draw(st.sampled_from(["normal", "few", "equal", "spread"]))

    def values(heads):
        x = torch.randn(n, heads, dim, generator=g, dtype=torch.float64)
        if kind == "few":
            x = x.round()
        elif kind == "equal":
            x = x[:1].expand_as(x).contiguous()
        elif kind == "spread":
            x = x * 10.0 ** torch.randint(-6, 3, (n, heads, 1), generator=g)
        return x.to(dtype)

    q, dout = values(n_kv * group), values(n_kv * group)
    k, v = values(n_kv), values(n_kv)
    return Case(q, k, v, dout, torch.tensor([0, *lengths]).cumsum(0).int(), block_size, top_k)


def _moba(case):
    return run(moba_attention, case, MoBAConfig(case.block_size, case.top_k), cu_seqlens=case.cu_seqlens)


def _errors(results, exact, case):
    """Largest difference of out, dq, dk, dv and lse, each over the largest value of its kind that such inputs can
    give: gradients may cancel to nothing."""
    q, k, v, dout = (x.double().abs().max().item() for x in (case.q, case.k, case.v, case.dout))
    through = dout * v * case.q.shape[-1] ** -0.5
    kinds = (0.0, through * k, through * q, dout, 0.0)
    return [
        (ours.double() - wide.double()).abs().max().item() / max(wide.double().abs().max().item(), kind, 1e-30)
        for ours, wide, kind in zip(results, exact, kinds, strict=True)
    ]


@settings(max_examples=CASES, **DRAWN)
@given(cases(torch.float64))
def test_drawn_float64(case):
    assert max(_errors(_moba(case), run_reference(case), case)) < 1e-10


@settings(max_examples=CASES, **DRAWN)
@given(cases(torch.float32))
def test_drawn_float32(case):
    """At most twice (gradients: three times) as far from float64, under the same selection, as plain PyTorch is."""
    chosen = reference.select_blocks(case.q, case.k, case.block_size, case.top_k, case.cu_seqlens)
    exact = run_reference(case.to(torch.float64), chosen=chosen)
    ours, plain = _errors(_moba(case), exact, case), _errors(run_reference(case), exact, case)
    # A score of 1e5 has steps of 0.008 in float32: its weight is known to a percent, whoever computes it.
    score = case.q.double().norm(dim=-1).max() * case.k.double().norm(dim=-1).max() * case.q.shape[-1] ** -0.5
    allowed = 1e-5 + 2**-22 * score.item()
    for name, mine, low in zip(("out", "dq", "dk", "dv", "lse"), ours, plain, strict=True):
        assert mine <= (3 if name.startswith("d") else 2) * low + allowed, name


def _a_later_token_changes_nothing(seed, dtype):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    n, block_size, top_k, n_kv, group = draw(2, 300), 16 * draw(1, 4), draw(1, 6), draw(1, 3), draw(1, 4)
    q = torch.randn(n, n_kv * group, 16, generator=g, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(n, n_kv, 16, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    config, at = MoBAConfig(block_size, top_k), draw(1, n)
    before, lse = moba_attention(q, k, v, config, return_lse=True)
    for x in (q, k, v):
        x[at:] = 100 * torch.randn(n - at, *x.shape[1:], generator=g, dtype=torch.float64).to(dtype)
    after, lse_after = moba_attention(q, k, v, config, return_lse=True)
    assert torch.equal(before[:at], after[:at]) and torch.equal(lse[:at], lse_after[:at]), f"seed {seed}, token {at}"
    assert not torch.equal(before[at:], after[at:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_later_token_changes_no_bit(dtype):
    for seed in range(20):
        _a_later_token_changes_nothing(seed, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_later_token_changes_no_bit_many(dtype):
    for seed in range(100, 300):
        _a_later_token_changes_nothing(seed, dtype)
