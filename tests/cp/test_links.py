"""Across nodes: the speed of links, who exchanges tokens for heads, and blocks or rows for all ranks together."""

import os
import random

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext
from moba_cp.cp import links
from moba_cp.cp.comm import Communicator
from moba_cp.cp.exchange.costs import WireCosts
from moba_cp.cp.exchange.policy import FACTORS, Directions, PolicyTables, busiest, factor_of
from moba_cp.cp.heads.choice import Layer, choose_across_nodes
from moba_cp.cp.links import ASSUMED, Links, links_of
from moba_cp.cp.options import ExchangeOptions
from tests.cp.test_heads import _case
from tests.cp.test_moba import NAMES, in_context
from tests.helpers import hosts, slow_link
from tests.helpers.cases import relative_error
from tests.helpers.distributed import run_ranks, run_threads


def _measured(rank):
    comm, device = Communicator(dist.group.WORLD), torch.device("cpu")
    calls = []
    whole = links._measure
    links._measure = lambda *args: calls.append(args) or whole(*args)
    found = [links_of(comm, per_node, device, True) for per_node in (2, 1, 2)]
    again = links_of(Communicator(dist.group.WORLD), 2, device, True)
    return found, again, len(calls), links_of(comm, 2, device, False), dict(comm.counters.sent)


def test_links_are_measured_once_by_all_ranks():
    everybody = run_ranks(4, _measured)
    for (two, one, same), again, calls, off, counted in everybody:
        assert two == same == again == everybody[0][0][0] and one == everybody[0][0][1], "all ranks know the same"
        assert calls == 2, "once for each number of ranks on a node"
        assert off == ASSUMED and not counted, "nothing of this is part of a layer"
        assert one.near_rate == one.far_rate, "no rank has a neighbour"
        for number in (*two, *one):
            assert number > 0 and torch.tensor(number).log2().frac() == 0, "a power of two"
        assert two.far_rate > 1e6 and two.far_seconds < 10


def test_threads_assume():
    assert run_threads(2, lambda comm: links_of(comm, 1, torch.device("cpu"), True)) == [ASSUMED] * 2


def _h(links: Links, size: int = 16, heads=(32, 8), per_node: int = 8, moba=(512, 8), **options) -> int:
    layer = Layer(size, (1 << 20) // size, heads, 128, torch.bfloat16, moba)
    return choose_across_nodes(layer, ExchangeOptions(ranks_per_node=per_node, **options), links, True, True).h


@pytest.mark.parametrize("far_gbit", [1, 10, 50, 200, 400])
def test_heads_are_exchanged_within_nodes(far_gbit):
    far = far_gbit / 8 * 1e9
    assert _h(Links(3e11, far, 2e-5, 5e-5)) == 8
    assert _h(Links(3e11, far, 2e-5, 5e-5), 64) == 8, "64 ranks do not divide 32 heads"
    assert _h(Links(3e11, far, 2e-5, 5e-5), heads=(12, 12)) == 4
    assert _h(Links(3e11, far, 2e-5, 5e-5), heads=(7, 7)) == 1


def test_heads_are_exchanged_by_nobody_or_by_all_where_that_is_faster():
    slow_within = Links(1e9, 1e10, 2e-5, 5e-5)
    layer = Layer(16, 1 << 16, (64, 1), 128, torch.bfloat16, (512, 8))
    found = choose_across_nodes(layer, ExchangeOptions(ranks_per_node=8), slow_within, False, True)
    assert found.h == 1, "queries of 64 heads would move over slow links, and there is one head of keys"
    assert "tokens are not exchanged for heads" in found.why and "1 GB/s within nodes, 10 between" in found.why
    # With 16 nodes a rank needs blocks of all of them, but only its share of the heads of everything.
    many = Links(3e11, 1e9, 2e-5, 5e-5)
    assert _h(many, size=32, heads=(32, 32), per_node=2) == 32
    assert _h(many, size=32, heads=(32, 2), per_node=2) == 2


DIRECTIONS = Directions(token=((8, 0), (8, 8)), row=((4, 4), (4, 8)))
"""Of float32, by head dim: K and V come, twice, and their gradients go; queries go, outputs come."""


def _offered(*of_ranks) -> torch.Tensor:
    """[P, policies, P, 2] of {(policy, owner): (tokens, rows)} of each rank."""
    offered = torch.zeros(len(of_ranks), len(FACTORS), len(of_ranks), 2, dtype=torch.float64)
    for rank, moved in enumerate(of_ranks):
        for at, numbers in moved.items():
            offered[rank][at] = torch.tensor(numbers, dtype=torch.float64)
    return offered


def test_bytes_of_the_busiest_direction():
    tables = PolicyTables.of(DIRECTIONS, 2, 1, torch.device("cpu"))
    # Rank 0 asks for 100 tokens: 800 come, then 800 come and 800 go.
    assert busiest(_offered({(0, 1): (100, 0)}, {}), tables).tolist() == [1600, 0, 0]
    # Rank 1 asks for as much: what comes to one leaves the other.
    assert busiest(_offered({(0, 1): (100, 0)}, {(0, 0): (100, 0)}), tables).tolist() == [800 + 1600, 0, 0]
    assert busiest(_offered({(1, 1): (0, 100)}, {}), tables).tolist() == [0, 400 + 800, 0]
    # Rows of rank 0 and blocks for rank 1 load the same direction.
    assert busiest(_offered({(0, 1): (0, 100)}, {(0, 0): (100, 0)}), tables)[0] == 1200 + 1600


def test_ranks_of_a_node_share_its_links():
    tables = PolicyTables.of(DIRECTIONS, 4, 2, torch.device("cpu"))
    asks = _offered({(0, 2): (10, 0)}, {(0, 3): (30, 0)}, {}, {})
    assert busiest(asks, tables)[0] == 40 * 16


def test_all_ranks_take_one_policy():
    tables = PolicyTables.of(DIRECTIONS, 2, 1, torch.device("cpu"))
    mixed = _offered(
        {(0, 1): (0, 100), (1, 1): (110, 0), (2, 1): (0, 100)}, {(0, 0): (100, 0), (1, 0): (100, 0), (2, 0): (0, 150)}
    )
    assert busiest(mixed, tables).tolist() == [2800, 880 + 1680, 250 * 4 + 100 * 4 + 150 * 8]
    assert factor_of(mixed, tables) == FACTORS[1], "all blocks: no direction gets more than the other"
    mixed[:, 1] *= 1.2
    mixed[:, 2] *= 1.2
    assert factor_of(mixed, tables) == FACTORS[0]
    mixed[:, 2] /= 2
    assert factor_of(mixed, tables) == FACTORS[2]


@pytest.mark.parametrize("seed", range(20))
def test_directions_add_up_to_the_costs(seed):
    rng = random.Random(seed)
    dtype, ids = rng.choice([torch.float64, torch.float32, torch.bfloat16]), rng.choice([torch.int16, torch.int32])
    options = ExchangeOptions(keep=rng.random() < 0.5, gradient_dtype=rng.choice(["input", "float32"]))
    layer = dtype, rng.randint(1, 256), rng.randint(0, 31), options, ids
    costs, directions = WireCosts.of(*layer), Directions.of(*layer)
    assert sum(map(sum, directions.token)) == costs.kv_token and sum(map(sum, directions.row)) == costs.row


def test_full_layers_share_the_links_between_nodes():
    options = ExchangeOptions(ranks_per_node=8)
    layer = lambda n_tokens: Layer(16, n_tokens // 16, (32, 8), 128, torch.bfloat16, None)
    slow, fast = Links(3e11, 1e9, 2e-5, 5e-5), Links(3e11, 5e10, 2e-5, 5e-5)
    found = choose_across_nodes(layer(131072), options, slow, True, True)
    assert found.h == 8 and found.why.startswith("full attention of 131072 tokens on 16 ranks, 300 GB/s within nodes")
    assert choose_across_nodes(layer(131072), options, fast, True, True).h == 1, "attention hides a ring"
    assert choose_across_nodes(layer(8 << 20), options, slow, True, True).h == 1, "of the longest too, a slow one"


def _both(group, case, per_node: int, full: bool):
    """Results of ``auto``, and what moved."""
    cp = CPContext(group, "zigzag", case.q.shape[0], exchange=ExchangeOptions(ranks_per_node=per_node))
    return in_context(cp, case, full), cp.counters.summary()


@pytest.mark.parametrize("full", [False, True], ids=["moba", "full"])
@pytest.mark.parametrize("per_node", [1, 2])
def test_auto_on_several_nodes_equals_one_rank(per_node, full):
    case = _case(heads=4, n_kv=4 if full else 2, n=1024)
    expected = in_context(CPContext(None, "zigzag", 1024), case, full)
    for results, counted in run_threads(4, _both, case, per_node, full):
        assert (counted.get("sent_to_heads_bytes", 0) > 0) == (per_node == 2 or full)
        for name, actual, want in zip(NAMES, results, expected, strict=True):
            assert relative_error(actual, want) < 1e-9, name


@pytest.mark.multinode
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make network namespaces")
def test_auto_is_near_the_best_way_on_a_slow_link(tmp_path):
    if reason := hosts.missing():
        pytest.skip(reason)
    ways = ["auto", "heads", "kv-heads2", "query-heads2", "allgather"]
    with hosts.TwoHosts() as two:
        rows = slow_link.measured(two, 20, 1024, 2, tmp_path, ways)
    for gate in slow_link.GATES:
        of = {row["mode"]: row for row in rows if row["gate"] == gate}
        auto = of.pop("auto")
        assert auto["mb"] <= 1.05 * min(row["mb"] for row in of.values()), (gate, auto, of)
        # CPUs take their time to plan, and other programs take it from them.
        assert auto["ms"] <= 1.3 * min(row["ms"] for row in of.values()), (gate, auto, of)
        assert of["allgather"]["mb"] > 2 * auto["mb"]
