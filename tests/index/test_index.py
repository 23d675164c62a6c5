"""The scorer's choice and its loss against the plain loops: values, gradients, ties, documents, slices."""

import pytest
import torch

from moba_cp import eager
from moba_cp import reference as attention_reference
from moba_cp.eager import index_choice
from moba_cp.index import reference
from tests.helpers.index_inputs import BLOCK, DOCUMENTS, TOP_K, inputs


@pytest.fixture(params=["as they come", "a few elements"])
def scratch(request, monkeypatch):
    """Slices of rows and tiles of keys, down to a row and a block."""
    if request.param == "a few elements":
        monkeypatch.setattr(index_choice, "CPU_ELEMENTS", 200)


@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_the_choice_is_the_references(documents, score, scratch):
    x = inputs(DOCUMENTS[documents])
    expected = reference.select_blocks(*x.scorer, BLOCK, TOP_K, score, x.bounds)
    assert (expected >= 0).any()
    got = eager.index_select(x.queries, x.weights, x.block_keys(score), x.table, score == "mean", TOP_K, 0, False)
    assert got.dtype == torch.int32 and torch.equal(got.long(), expected)


@pytest.mark.parametrize("full", [True, False], ids=["all candidates", "chosen blocks"])
@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_the_loss_and_its_gradients_are_the_references(documents, score, full, scratch):
    x = inputs(DOCUMENTS[documents])
    scale = 0.7
    chosen = None if full else reference.select_blocks(*x.scorer, BLOCK, TOP_K, score, x.bounds)
    if full:
        _, lse = attention_reference.full_attention(x.q, x.k, x.v, x.bounds, scale, True)
    else:
        # Its block ids go through all documents.
        ids = torch.where(chosen >= 0, chosen + x.table.first[:, None, None], -1).repeat_interleave(3, 1)
        _, lse = attention_reference.moba_attention(x.q, x.k, x.v, BLOCK, TOP_K, x.bounds, scale, True, ids)
    for tensor in x.scorer:
        tensor.requires_grad_()
    scores = reference.block_scores(*x.scorer, BLOCK, score, x.bounds)
    expected = reference.index_loss(scores, reference.block_masses(x.q, x.k, lse, BLOCK, scale, x.bounds), chosen)
    grads = torch.autograd.grad(expected, x.scorer)
    assert expected > 0.1 and all(grad.abs().max() > 1e-3 for grad in grads)
    with torch.no_grad():
        total, dqueries, dweights, dkeys = eager.index_loss(
            x.q, x.k, lse, scale, x.queries, x.weights, x.block_keys(score), x.table, score == "mean",
            None if full else chosen.int(),
        )  # fmt: skip
    for got, want in zip((dqueries, dweights, x.spread(dkeys, score)), grads):
        torch.testing.assert_close(got / 2, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(total / 2, expected.detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("score", ["mean", "max"])
def test_the_loss_differs_as_its_gradient_says(score):
    """By finite differences, of nothing but values."""
    x = inputs([0, 80], n_kv=1)
    _, lse = attention_reference.full_attention(x.q, x.k, x.v, None, 0.5, True)
    step = [torch.randn_like(tensor) for tensor in x.scorer]

    def at(distance: float):
        moved = inputs([0, 80], n_kv=1)
        for tensor, direction in zip(moved.scorer, step):
            tensor += distance * direction
        of_scorer = moved.queries, moved.weights, moved.block_keys(score), moved.table, score == "mean", None
        value, *grads, dkeys = eager.index_loss(x.q, x.k, lse, 0.5, *of_scorer)
        return value, [*grads, moved.spread(dkeys, score)]

    slope = sum((grad * direction).sum() for grad, direction in zip(at(0.0)[1], step))
    torch.testing.assert_close((at(1e-7)[0] - at(-1e-7)[0]) / 2e-7, slope, rtol=1e-6, atol=1e-6)


def test_equal_scores_go_to_the_newer_block_and_nan_to_the_end():
    x = inputs([0, 96], n_kv=1)
    x.keys[:] = x.keys[0]
    x.keys[48:64] = float("nan")
    for score in ("mean", "max"):
        of_scorer = x.queries.abs(), x.weights.abs(), x.block_keys(score), x.table, score == "mean"
        got = eager.index_select(*of_scorer, 5, 0, False)[:, 0]
        assert got[-1].tolist() == [4, 2, 1, 0]
        recent = eager.index_select(*of_scorer, 4, 2, True)[:, 0]
        assert recent[-1].tolist() == [4, 3, 0] and recent[16].tolist() == [0, -1, -1]


def test_scores_do_not_depend_on_what_is_computed_beside_them():
    x = inputs([0, 100]).to(torch.float32)
    of_blocks = index_choice.Keys(x.block_keys("mean")[:, 0], x.table, True)
    queries, weights = x.queries[:, 0], x.weights[:, 0]
    whole = index_choice.block_scores(queries, weights, of_blocks, slice(0, 6), True)
    for rows in (slice(3, 4), slice(50, 83)):
        for blocks in (slice(2, 3), slice(1, 5)):
            some = index_choice.block_scores(queries[rows], weights[rows], of_blocks, blocks, True)
            assert torch.equal(some, whole[rows, blocks])


def test_a_row_whose_blocks_get_nothing_counts_nothing():
    x = inputs([0, 64], n_kv=1, group=1)
    lse = torch.full((64, 1), 1e4, dtype=torch.float64)
    found = eager.index_loss(
        x.q, x.k, lse, 1.0, x.queries, x.weights, x.block_keys("mean"), x.table, True, None
    )  # fmt: skip
    assert all((y == 0).all() for y in found)
