"""The scorer's choice and its loss against the plain loops: values, gradients, ties, documents, slices."""

from dataclasses import dataclass

import pytest
import torch

from moba_cp import CPContext
from moba_cp import reference as attention_reference
from moba_cp.index import choice, loss, reference
from moba_cp.index.choice import Keys
from moba_cp.index.tables import index_tables

BLOCK, TOP_K = 16, 3
DOCUMENTS = {"one": [0, 100], "packed": [0, 7, 7, 71, 100], "whole blocks": [0, 64, 96]}


@dataclass
class Inputs:
    """One layer's tensors, float64: of attention q, k, v, of the scorer queries, weights, keys."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    queries: torch.Tensor
    weights: torch.Tensor
    keys: torch.Tensor
    bounds: torch.Tensor

    @property
    def scorer(self):
        return self.queries, self.weights, self.keys


def inputs(bounds, seed=0, n_kv=2, group=3, m=3, dim=8) -> Inputs:
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    n = bounds[-1]
    q, k, v = draw(n, n_kv * group, dim), *draw(2, n, n_kv, dim)
    mixed = draw(n, n_kv, m * dim + dim + m)
    return Inputs(
        q, k, v, mixed[..., : m * dim].unflatten(2, (m, dim)).clone(), mixed[..., -m:].clone(),
        mixed[..., m * dim : m * dim + dim].clone(), torch.tensor(bounds),
    )  # fmt: skip


def keys_of(x: Inputs, head: int, score: str) -> Keys:
    tables = index_tables(CPContext(None, "contiguous", len(x.q), cu_seqlens=x.bounds), BLOCK)
    of_head = x.keys[:, head]
    if score == "mean":
        means = [of_head[s : s + n].mean(0) if n else of_head[0] * 0 for s, n in zip(tables.start, tables.length)]
        return Keys(torch.stack(means), tables, True)
    return Keys(torch.cat([of_head, of_head.new_zeros(1, of_head.shape[1])]), tables, False)


def spread(dkeys: torch.Tensor, keys: Keys) -> torch.Tensor:
    """Gradients of tokens' keys [T, d], of those of what represents their blocks."""
    tables = keys.tables
    return dkeys[tables.current] / tables.length[tables.current, None] if keys.by_mean else dkeys[:-1]


@pytest.fixture(params=["as they come", "a few elements"])
def scratch(request, monkeypatch):
    """Slices of rows and tiles of keys, down to a row and a block."""
    if request.param == "a few elements":
        monkeypatch.setattr(choice, "CPU_ELEMENTS", 200)


@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_the_choice_is_the_references(documents, score, scratch):
    x = inputs(DOCUMENTS[documents])
    expected = reference.select_blocks(*x.scorer, BLOCK, TOP_K, score, x.bounds)
    assert (expected >= 0).any()
    for head in range(2):
        got = choice.select_blocks(x.queries[:, head], x.weights[:, head], keys_of(x, head, score), TOP_K)
        assert got.dtype == torch.int32 and torch.equal(got.long(), expected[:, head])


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
        tables = index_tables(CPContext(None, "contiguous", len(x.q), cu_seqlens=x.bounds), BLOCK)
        ids = torch.where(chosen >= 0, chosen + tables.first[:, None, None], -1).repeat_interleave(3, 1)
        _, lse = attention_reference.moba_attention(x.q, x.k, x.v, BLOCK, TOP_K, x.bounds, scale, True, ids)
    for tensor in x.scorer:
        tensor.requires_grad_()
    scores = reference.block_scores(*x.scorer, BLOCK, score, x.bounds)
    expected = reference.index_loss(scores, reference.block_masses(x.q, x.k, lse, BLOCK, scale, x.bounds), chosen)
    grads = torch.autograd.grad(expected, x.scorer)
    assert expected > 0.1 and all(grad.abs().max() > 1e-3 for grad in grads)
    total = 0
    with torch.no_grad():
        for head in range(2):
            keys = keys_of(x, head, score)
            attended = loss.Attended(
                x.q[:, 3 * head : 3 * head + 3], x.k[:, head], lse[:, 3 * head : 3 * head + 3], scale
            )
            dkeys = torch.zeros_like(keys.rows)
            of_head = None if full else chosen[:, head].int()
            of_scorer = x.queries[:, head], x.weights[:, head], keys, of_head
            value, dqueries, dweights = loss.index_loss(attended, *of_scorer, dkeys)
            total += value
            for got, want in zip((dqueries, dweights, spread(dkeys, keys)), grads):
                torch.testing.assert_close(got / 2, want[:, head], rtol=0, atol=1e-12)
    torch.testing.assert_close(total / 2, expected.detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("score", ["mean", "max"])
def test_the_loss_differs_as_its_gradient_says(score):
    """By finite differences, of nothing but values."""
    x = inputs([0, 80], n_kv=1)
    _, lse = attention_reference.full_attention(x.q, x.k, x.v, None, 0.5, True)
    attended = loss.Attended(x.q, x.k[:, 0], lse, 0.5)
    step = [torch.randn_like(tensor) for tensor in x.scorer]

    def at(distance: float):
        moved = inputs([0, 80], n_kv=1)
        for tensor, direction in zip(moved.scorer, step):
            tensor += distance * direction
        keys = keys_of(moved, 0, score)
        dkeys = torch.zeros_like(keys.rows)
        value, *grads = loss.index_loss(attended, moved.queries[:, 0], moved.weights[:, 0], keys, None, dkeys)
        return value, [*grads, spread(dkeys, keys)]

    slope = sum((grad * direction[:, 0]).sum() for grad, direction in zip(at(0.0)[1], step))
    torch.testing.assert_close((at(1e-7)[0] - at(-1e-7)[0]) / 2e-7, slope, rtol=1e-6, atol=1e-6)


def test_equal_scores_go_to_the_newer_block_and_nan_to_the_end():
    x = inputs([0, 96], n_kv=1)
    x.keys[:] = x.keys[0]
    x.keys[48:64] = float("nan")
    for score in ("mean", "max"):
        got = choice.select_blocks(x.queries[:, 0].abs(), x.weights[:, 0].abs(), keys_of(x, 0, score), 5)
        assert got[-1].tolist() == [4, 2, 1, 0]
        recent = choice.select_blocks(x.queries[:, 0].abs(), x.weights[:, 0].abs(), keys_of(x, 0, score), 4, 2, True)
        assert recent[-1].tolist() == [4, 3, 0] and recent[16].tolist() == [0, -1, -1]


def test_scores_do_not_depend_on_what_is_computed_beside_them():
    x = inputs([0, 100])
    queries, weights, keys = (y.float() for y in x.scorer)
    x.keys = keys
    of_blocks = keys_of(x, 0, "mean")
    whole = choice.block_scores(queries[:, 0], weights[:, 0], of_blocks, slice(0, 6), True)
    for rows in (slice(3, 4), slice(50, 83)):
        for blocks in (slice(2, 3), slice(1, 5)):
            some = choice.block_scores(queries[rows, 0], weights[rows, 0], of_blocks, blocks, True)
            assert torch.equal(some, whole[rows, blocks])


def test_a_row_whose_blocks_get_nothing_counts_nothing():
    x = inputs([0, 64], n_kv=1, group=1)
    lse = torch.full((64, 1), 1e4, dtype=torch.float64)
    attended = loss.Attended(x.q, x.k[:, 0], lse, 1.0)
    keys = keys_of(x, 0, "mean")
    dkeys = torch.zeros_like(keys.rows)
    found = loss.index_loss(attended, x.queries[:, 0], x.weights[:, 0], keys, None, dkeys)
    assert all((y == 0).all() for y in (*found, dkeys))
