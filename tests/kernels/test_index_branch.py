"""The index branch's kernels against plain PyTorch: the choice bit for bit, loss and gradients to rounding."""

import pytest
import torch

from moba_cp import eager, kernels
from moba_cp import reference as attention_reference
from moba_cp.blocks import BlockTable
from moba_cp.kernels import index_choice, index_gradients
from tests.helpers.index_inputs import inputs
from tests.helpers.kernel_inputs import DEVICE, poisoned

SHAPES = {
    "three queries of eight": dict(bounds=[0, 7, 7, 57, 80], m=3, dim=8, head_dim=16, group=3),
    "short blocks": dict(bounds=[0, 60], m=1, dim=22, n_kv=1, group=1, block_size=8),
    "blocks longer than a tile": dict(bounds=[0, 150], m=2, dim=16, n_kv=1, group=2, block_size=48),
}
GATES = dict(zip(SHAPES, [(5, 0, False), (4, 2, True), (3, 1, False)]))


def on(device, table: BlockTable) -> BlockTable:
    rows = table.current_block, table.first, table.offset
    return BlockTable(table.block_size, *(x.to(device) for x in (table.start, table.length, *rows)))


def cut(x: torch.Tensor) -> torch.Tensor:
    """The same values on the device, as some heads of a larger tensor of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 2, *x.shape[2:]), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[:, 1:-1] = x
    return wide[:, 1:-1]


def select(backend, x, score, *how):
    table = on(DEVICE, x.table)
    arguments = cut(x.queries), cut(x.weights), cut(x.block_keys(score)), table, score == "mean"
    return backend.index_select(*arguments, *how).cpu()


@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_choice_is_plain_pytorchs(score, shape, monkeypatch):
    """With scores of a few rows at a time."""
    monkeypatch.setattr(index_choice, "SCORE_BYTES", 4 * 2 * 7 * 40)
    x = inputs(**SHAPES[shape]).to(torch.float32)
    expected = select(eager, x, score, *GATES[shape])
    with poisoned():
        got = select(kernels, x, score, *GATES[shape])
    assert got.dtype == torch.int32 and (got >= 0).any() and torch.equal(got, expected)


@pytest.mark.parametrize("score", ["mean", "max"])
def test_sums_whose_order_matters_are_rounded_alike(score):
    """Terms that cancel but for what an order keeps and another loses; and NaN, infinities and ties."""
    x = inputs([0, 144], m=2, dim=22, n_kv=1).to(torch.float32)
    large = torch.tensor([2.0**30, -(2.0**30)]).repeat(11) * torch.randn(22, generator=torch.Generator().manual_seed(0))
    x.queries[::2] = large + x.queries[::2]
    x.keys[:] = large.flip(0) * (1 + 1e-6 * x.keys)
    x.keys[32:48], x.keys[64:80] = x.keys[:16], x.keys[:16]
    x.keys[50, 0, 3], x.keys[96:112], x.keys[113, 0, 0] = torch.nan, torch.nan, torch.inf
    orders = (
        x.queries.double() @ x.keys[:, 0].double().T,
        (x.queries.double().flip(-1) @ x.keys[:, 0].double().flip(-1).T),
    )
    assert (orders[0].nan_to_num() != orders[1].nan_to_num()).any()
    assert torch.equal(select(kernels, x, score, 8, 0, False), select(eager, x, score, 8, 0, False))


@pytest.mark.parametrize("dim", [1, 2, 6, 16, 22, 24, 100])
def test_columns_are_added_in_the_order_of_plain_pytorch(dim):
    x = torch.randn(dim, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (dim,))
    columns = index_choice._columns(dim, torch.device("cpu")).long()
    y = torch.where(columns >= 0, x[columns.clamp(min=0)], 0)
    while y.numel() > 1:
        y = y.unflatten(0, (2, -1)).sum(0)
    assert y[0] == eager.select._sum_in_place(x.clone()) and sorted(columns[columns >= 0].tolist()) == [*range(dim)]


def learn(backend, x, lse, score, chosen):
    """Of every third row, as on a rank that has them: some programs serve one row, and the interpreter is slow."""
    some, table = slice(None, None, 3), on(DEVICE, x.table)
    rows = (y[some] for y in (table.current_block, table.first, table.offset))
    table = BlockTable(table.block_size, table.start, table.length, *rows)
    of_layer = cut(x.q[some]), cut(x.k), lse[some].to(DEVICE), 0.7
    of_scorer = cut(x.queries[some]), cut(x.weights[some]), cut(x.block_keys(score)), table, score == "mean"
    return [
        y.cpu() for y in backend.index_loss(*of_layer, *of_scorer, None if chosen is None else chosen[some].to(DEVICE))
    ]


@pytest.mark.parametrize("full", [True, False], ids=["all candidates", "chosen blocks"])
@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients(shape, score, full, monkeypatch):
    """In float32, with tables of a few rows at a time, against float64."""
    monkeypatch.setattr(index_gradients, "TABLE_BYTES", 4 * 2 * 7 * 40)
    wide = inputs(**SHAPES[shape])
    x = wide.to(torch.float32)
    _, lse = attention_reference.full_attention(wide.q, wide.k, wide.v, wide.bounds, 0.7, True)
    chosen = None if full else eager.index_select(
        wide.queries, wide.weights, wide.block_keys(score), wide.table, score == "mean", 4, 0, False
    )  # fmt: skip
    expected = learn(eager, wide, lse, score, chosen)
    assert expected[0] > 0.3 and all(y.abs().max() > 1e-2 for y in expected)
    with poisoned():
        got = learn(kernels, x, lse.float(), score, chosen)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["mean", "max"])
def test_float16_loses_no_small_gradients(score):
    wide = inputs(**SHAPES["three queries of eight"])
    x = wide.to(torch.float16)
    wide = x.to(torch.float64)
    wide.weights = x.weights.double() * 1e-6
    x.weights *= 1e-6
    _, lse = attention_reference.full_attention(wide.q, wide.k, wide.v, wide.bounds, 0.7, True)
    for ours, theirs in zip(learn(kernels, x, lse.float(), score, None), learn(eager, wide, lse, score, None)):
        assert (ours.double() - theirs).norm() <= 2e-3 * theirs.norm()


@pytest.mark.parametrize("score", ["mean", "max"])
def test_rows_that_get_nothing_and_nan(score):
    x = inputs([0, 64], n_kv=1, group=1).to(torch.float32)
    lse = torch.full((64, 1), 1e4)
    chosen = select(kernels, x, score, 3, 0, False)
    for of_chosen in (None, chosen):
        assert all((y == 0).all() for y in learn(kernels, x, lse, score, of_chosen))
        # Of keys that a row does not attend to scores may be anything.
        low = learn(kernels, x, torch.full((64, 1), -1e4), score, of_chosen)
        assert all(y.isfinite().all() for y in low)
        lse[42] = torch.nan
        assert learn(kernels, x, lse, score, of_chosen)[0].isnan()
        lse[42] = 1e4


def test_nothing_to_choose_and_no_rows():
    x = inputs([0, 40]).to(torch.float32)
    assert select(kernels, x, "mean", 1, 0, False).shape == (40, 2, 0)
    none = [y[:0] for y in (x.queries, x.weights)]
    table = on(DEVICE, x.table)
    empty = BlockTable(
        16, table.start, table.length, *(y[:0] for y in (table.current_block, table.first, table.offset))
    )
    rows = [y.to(DEVICE) for y in none]
    found = kernels.index_select(*rows, x.block_keys("mean").to(DEVICE), empty, True, 3, 0, False)
    assert found.shape == (0, 2, 2)
    attended = x.q[:0].to(DEVICE), x.k.to(DEVICE), x.q[:0, :, 0].to(DEVICE), 1.0
    loss, *grads = kernels.index_loss(*attended, *rows, x.block_keys("mean").to(DEVICE), empty, True, None)
    assert loss == 0 and grads[2].shape == (3, 2, 8) and (grads[2] == 0).all()
