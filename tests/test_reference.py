"""The reference against the golden files and the rules of selection."""

import pytest
import torch

from moba_cp import MoBAConfig, full_attention, moba_attention, reference
from tests.helpers.cases import GOLDEN, golden, relative_error, run_reference


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path):
    case = golden(path)
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), run_reference(case), case.expected):
        assert relative_error(actual, expected) < 1e-5, name


def _one_dim(q_value, block_values, block_size=16, tail=1):
    """One head of dim 1 whose block means are ``block_values``; the last query sees all of them as candidates."""
    k = torch.tensor(block_values, dtype=torch.float64).repeat_interleave(block_size)
    k = torch.cat([k, torch.zeros(tail, dtype=torch.float64)])[:, None, None]
    q = torch.full_like(k, q_value)
    return q, k


@pytest.mark.parametrize(
    "blocks, chosen",
    [
        ([1.0, 3.0, 2.0], [1, 2]),
        ([2.0, 2.0, 2.0], [2, 1]),
        ([0.0, -0.0, -1.0], [1, 0]),
        ([float("nan"), -float("inf"), -2.0], [2, 1]),
        ([float("nan"), float("nan"), 1.0], [2, 1]),
        ([float("inf"), 1.0, float("inf")], [2, 0]),
    ],
    ids=["best first", "tie to the newer", "zeros tie", "NaN below -inf", "NaN ties to the newer", "inf ties"],
)
def test_ranking(blocks, chosen):
    q, k = _one_dim(1.0, blocks)
    assert reference.select_blocks(q, k, 16, 3)[-1, 0].tolist() == chosen


def test_own_and_last_blocks_are_never_candidates():
    q, k = torch.randn(2, 100, 2, 8, dtype=torch.float64)
    chosen = reference.select_blocks(q, k, 16, 4, torch.tensor([0, 40, 40, 100]))
    own = torch.cat([torch.arange(40) // 16, 3 + torch.arange(60) // 16])
    first = torch.cat([torch.zeros(40), torch.full((60,), 3)])
    for slot in range(3):
        taken = chosen[:, :, slot]
        expected_count = (own - first).clamp(max=3)
        assert ((taken >= 0) == (slot < expected_count)[:, None]).all()
        assert ((taken < own[:, None]) & (taken >= first[:, None]) | (taken < 0)).all()


def test_top_k_one_is_the_own_block_alone():
    q, k, v = torch.randn(3, 48, 1, 8, dtype=torch.float64)
    out = reference.moba_attention(q, k, v, 16, 1)
    apart = [reference.full_attention(*(x[lo : lo + 16] for x in (q, k, v))) for lo in (0, 16, 32)]
    torch.testing.assert_close(out, torch.cat(apart))


def test_top_k_of_all_blocks_is_full_attention():
    q, k, v = torch.randn(3, 75, 2, 8, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(reference.moba_attention(q, k, v, 16, 5), expected.transpose(0, 1))
    torch.testing.assert_close(reference.full_attention(q, k, v), expected.transpose(0, 1))


def test_no_gradient_flows_through_the_selection():
    q, k, v = torch.randn(3, 64, 1, 8, dtype=torch.float64)
    k.requires_grad_()
    out = reference.moba_attention(q, k, v, 16, 2)
    out[-1].sum().backward()
    chosen = reference.select_blocks(q, k, 16, 2)[-1, 0, 0].item()
    touched = (k.grad.abs().sum((1, 2)) > 0).nonzero()[:, 0].tolist()
    assert touched == [*range(16 * chosen, 16 * chosen + 16), *range(48, 64)]


@pytest.mark.parametrize("attend", ["moba", "full"])
def test_a_row_whose_scores_are_all_minus_infinity_gets_nothing(attend):
    """By the reference as by what is held against it: out 0, lse -inf, and no part in the gradient of V."""
    q, k, v = torch.randn(3, 40, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # The first tokens of two documents see themselves alone, and their scores are -inf; all others see numbers too.
    for first in (0, 20):
        k[first, 0, 2], q[first : first + 20, 0, 2] = -torch.inf, 1.0
    documents, results = torch.tensor([0, 20, 40], dtype=torch.int32), []
    for path in ("reference", "library"):
        leaf = v.clone().requires_grad_()
        if attend == "full":
            function = reference.full_attention if path == "reference" else full_attention
            out, lse = function(q, k, leaf, cu_seqlens=documents, return_lse=True)
        elif path == "reference":
            out, lse = reference.moba_attention(q, k, leaf, 16, 2, documents, return_lse=True)
        else:
            out, lse = moba_attention(q, k, leaf, MoBAConfig(16, 2), documents, return_lse=True)
        out.sum().backward()
        results.append([out.detach(), lse.detach(), leaf.grad])
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)
    out, lse, dv = results[0]
    assert not out[[0, 20]].any() and (lse[[0, 20]] == -torch.inf).all() and out.isfinite().all()
    assert not dv[[0, 20]].any() and (dv[[1, 21]] != 0).all()
