"""The choice between blocks and rows, against the plain PyTorch path: integers, so equal to the last bit."""

import pytest
import torch

from moba_cp import kernels
from moba_cp.eager import exchange as decision
from moba_cp.eager.exchange import BlockTables, Prices
from tests.helpers.kernel_inputs import DEVICE, poisoned

UNIT = 1 << 16


def _case(heads: int, n: int, size: int, sharing: int, seed: int):
    """counts, place, rows, tables, prices: of rank 0 of ``size``; small numbers, so that prices are often equal."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(high, shape, generator=g)
    counts = torch.stack([draw(3, 4, heads, n) * draw(2, 1, heads, n), draw(8, 4, heads, n) * (UNIT // 4)])
    owner = draw(size, n).sort().values
    elsewhere = owner != 0
    tables = BlockTables(owner, 1 + draw(4, n).int(), elsewhere, (draw(6, n) == 0) & elsewhere)
    far = torch.arange(size) >= size // 2
    weight = torch.where(far, 1.0, 4.0).double()
    prices = Prices(3, 2, torch.full_like(weight, 3), 2 * weight, UNIT, sharing, far, torch.tensor(7 * heads))
    rows = draw(5, 4, 3, size).int()
    place = torch.where(elsewhere, owner, -1).expand(heads, n).int().contiguous()
    move = lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
    tables, prices = (type(t)(*map(move, t)) for t in (tables, prices))
    return move(counts), move(place), move(rows), tables, prices


@pytest.mark.parametrize("mode", decision.CANDIDATES)
@pytest.mark.parametrize("sharing", [1, 3])
@pytest.mark.parametrize("heads, n, size", [(3, 67, 40), (1, 300, 2), (2, 5, 4), (1, 3, 150)], ids=str)
def test_candidates_and_the_cheapest(heads, n, size, sharing, mode):
    counts, place, rows, tables, prices = _case(heads, n, size, sharing, n)
    counts = counts if mode == "auto" else counts[:1].contiguous()
    rows = {"auto": rows, "kv": None, "query": rows[:, :1].contiguous()}[mode]
    with poisoned():
        ours = kernels.weigh_blocks(counts, tables, prices, mode)
        picked = kernels.pick_cheapest(ours, rows, place, tables, prices)
    expected = decision.weigh_blocks(counts, tables, prices, mode)
    best = decision.pick_cheapest(expected, rows, place, tables, prices)
    for name, a, e in zip((*expected._fields, "fetch", "place", "costs"), (*ours, *picked), (*expected, *best)):
        assert a.dtype == e.dtype and torch.equal(a, e), name
    assert ours.stats[0] > 0 or n < 5


def test_prices_by_hand():
    """Two blocks of each of two other ranks; the first of rank 1 is worth fetching, everything of rank 2 is."""
    tensor = lambda x, dtype=torch.int64: torch.tensor(x, dtype=dtype, device=DEVICE)
    tables = BlockTables(
        tensor([0, 1, 1, 2, 2]),
        tensor([4] * 5, torch.int32),
        tensor([False, True, True, True, True], torch.bool),
        tensor([False] * 5, torch.bool),
    )
    chose = tensor([[[9, 8, 1, 1, 1]]])
    counts = torch.stack([chose, chose * UNIT])
    place = tensor([[-1, 1, 1, 2, 2]], torch.int32)
    rows = tensor([[[0, 0, 0], [0, 1, 2], [0, 9, 2]]], torch.int32)
    price = tensor([1.0] * 3, torch.float64)
    far = tensor([False, False, True], torch.bool)
    for module in (decision, kernels):
        alone = Prices(1, 1, price, price, UNIT, 1, far, tensor(2))
        weighed = module.weigh_blocks(counts, tables, alone, "auto")
        assert weighed.fetched.tolist() == [[0, 3, 1, 1, 1]] and weighed.stats.tolist() == [4, 9, 0]
        assert weighed.tokens.tolist() == [[0, 8, 8], [0, 4, 0], [0, 0, 0]]
        fetch, goes, costs = module.pick_cheapest(weighed, rows, place, tables, alone)
        assert fetch.tolist() == [[False, True, False, False, False]]
        assert goes.tolist() == [[-1, -1, 1, 2, 2]] and costs.tolist() == [0, 5, 2, 7]
        # All of rank 2's blocks are needed: six ranks share them, so that 8 tokens cost less than 2 rows.
        shared = alone._replace(sharing=6)
        weighed = module.weigh_blocks(counts, tables, shared, "auto")
        assert weighed.fetched.tolist() == [[0, 3, 1, 3, 3]] and weighed.stats.tolist() == [4, 9, 2]
        fetch, goes, costs = module.pick_cheapest(weighed, rows, place, tables, shared)
        assert fetch.tolist() == [[False, True, False, True, True]] and costs.tolist() == [0, 5, 8, 13]


def test_equal_prices_take_the_first():
    tensor = lambda x, dtype=torch.int64: torch.tensor(x, dtype=dtype, device=DEVICE)
    one, no = tensor([True], torch.bool), tensor([False], torch.bool)
    tables = BlockTables(tensor([0]), tensor([2], torch.int32), one, no)
    price = tensor([1.0], torch.float64)
    prices = Prices(1, 1, price, price, UNIT, 1, no, tensor(1))
    rows = tensor([[[0], [1], [2]]], torch.int32)
    for module in (decision, kernels):
        # Worth fetching from exactly 2 rows on.
        for share, bits in ((2 * UNIT, 3), (2 * UNIT - 1, 1)):
            weighed = module.weigh_blocks(tensor([[[[2]]], [[[share]]]]), tables, prices, "auto")
            assert weighed.fetched.tolist() == [[bits]]
        fetch, _, costs = module.pick_cheapest(weighed, 2 * rows[:, [0, 2, 1]], tensor([[0]]).int(), tables, prices)
        assert fetch.item() and costs.tolist() == [2, 2]


def test_everything_where_that_costs_hardly_more():
    """One kind of transfer is better than two at almost the same price."""
    tensor = lambda x, dtype=torch.int64: torch.tensor(x, dtype=dtype, device=DEVICE)
    one, no = tensor([True] * 2, torch.bool), tensor([False] * 2, torch.bool)
    price = tensor([1.0], torch.float64)
    prices = Prices(1, 1, price, price, UNIT, 1, no[:1], tensor(1))
    counts = tensor([[[[2000, 1]]], [[[2000 * UNIT, UNIT]]]])
    rows = tensor([[[0], [1], [2001]]], torch.int32)
    for module in (decision, kernels):
        for lengths, comes in (([990, 10], True), ([980, 20], False)):
            tables = BlockTables(tensor([0, 0]), tensor(lengths, torch.int32), one, no)
            weighed = module.weigh_blocks(counts, tables, prices, "auto")
            assert weighed.fetched.tolist() == [[3, 1]]
            place = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
            assert module.pick_cheapest(weighed, rows, place, tables, prices)[0].tolist() == [[True, comes]]


def test_large_numbers():
    """2^31 - 1 visits at a full share, and bytes beyond 32 bits."""
    tensor = lambda x, dtype=torch.int64: torch.tensor(x, dtype=dtype, device=DEVICE)
    many, length = 2**31 - 1, 2**30
    no = tensor([False], torch.bool)
    tables = BlockTables(tensor([0]), tensor([length], torch.int32), ~no, no)
    price = tensor([2048.0], torch.float64)
    prices = Prices(2048, 1832, price, tensor([1832.0], torch.float64), UNIT, 1, no, tensor(1))
    counts = tensor([[[[many] * 3]], [[[many * UNIT] * 3]]]).transpose(2, 3).contiguous()
    rows = tensor([[[0], [0], [many]]], torch.int32)
    for module in (decision, kernels):
        weighed = module.weigh_blocks(counts, tables, prices, "auto")
        assert weighed.fetched.tolist() == [[3]] * 3 and weighed.tokens.tolist() == [[3 * length]] * 2 + [[0]]
        place = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)
        fetch, _, costs = module.pick_cheapest(weighed, rows, place, tables, prices)
        assert not fetch.any() and costs.tolist() == [many * 1832] * 2


def test_no_blocks():
    empty = lambda dtype: torch.zeros(0, dtype=dtype, device=DEVICE)
    tables = BlockTables(empty(torch.int64), empty(torch.int32), empty(torch.bool), empty(torch.bool))
    price = torch.ones(2, dtype=torch.float64, device=DEVICE)
    prices = Prices(1, 1, price, price, UNIT, 1, price > 1, torch.ones((), dtype=torch.int64, device=DEVICE))
    counts = torch.zeros(2, 1, 3, 0, dtype=torch.int64, device=DEVICE)
    place = torch.zeros(3, 0, dtype=torch.int32, device=DEVICE)
    for module in (decision, kernels):
        weighed = module.weigh_blocks(counts, tables, prices, "auto")
        assert weighed.fetched.shape == (3, 0) and not weighed.stats.any() and not weighed.tokens.any()
        fetch, goes, costs = module.pick_cheapest(weighed, None, place, tables, prices)
        assert fetch.shape == goes.shape == (3, 0) and costs.tolist() == [0, 0, 0]
