"""Requests and the lists that follow from them: against the plain PyTorch path, and against lists made by hand."""

import pytest
import torch

from moba_cp import CPContext, kernels
from moba_cp.cp.calls import Where
from moba_cp.cp.exchange import tables
from moba_cp.cp.exchange.tables import build_wire_tables
from moba_cp.cp.options import ExchangeOptions
from moba_cp.eager import exchange as requests
from tests.helpers.distributed import run_threads
from tests.helpers.kernel_inputs import DEVICE, poisoned

BLOCK_SIZE = 16

# ranks, ranks per node, KV heads, stages, documents, layout, share of pairs that are wanted
CASES = [
    (2, None, 2, 2, [96, 64], "zigzag", 0.5),
    (4, 2, 3, 2, [200, 24, 32], "zigzag", 0.3),
    (4, 2, 1, 3, [256], "contiguous", 1.0),
    (3, None, 2, 1, [30, 0, 18], "contiguous", 0.0),
    (6, 3, 1, 1, [48], "contiguous", 0.7),
]


def _by_hand(fetch, geometry, rank, per_node, stages):
    """Pairs [(want, give)] and rows [2][stages][P + 1] of each hop; ``fetch`` lists [Hkv, n] of every rank."""
    n_kv, n = fetch[0].shape
    size, owner, length = len(fetch), geometry.owner.tolist(), geometry.length.tolist()
    order = [(h * stages // n_kv if n_kv >= stages else (h * n + b) * stages // (n_kv * n), h, b)
             for h in range(n_kv) for b in range(n)]  # fmt: skip
    node, index = (lambda r: r // per_node), (lambda r: r % per_node)
    wants = lambda r, h, b: owner[b] != r and bool(fetch[r][h, b])
    if per_node == 1:
        hops = [lambda to, by, h, b: to != by and owner[b] == by and wants(to, h, b)]
    else:
        within = lambda to, by, h, b: (
            to != by and node(to) == node(by) and index(owner[b]) == index(by) and wants(to, h, b)
        )
        between = lambda to, by, h, b: (
            node(to) != node(by) and index(to) == index(by) and owner[b] == by
            and (wants(to, h, b) or any(within(r, to, h, b) for r in range(size)))
        )  # fmt: skip
        hops = [between, within]
    expected = []
    for moves in hops:
        lists, sizes = [], []
        for to_by in ((lambda p: (rank, p)), (lambda p: (p, rank))):
            moved = [(s, p, h, b) for s, h, b in order for p in range(size) if moves(*to_by(p), h, b)]
            lists.append([h * n + b for s, p, h, b in sorted(moved)])
            rows = [[sum(length[b] for s, q, _, b in moved if (s, q) == (stage, p)) for p in range(size)]
                    for stage in range(stages)]  # fmt: skip
            sizes.append([of + [sum(s == stage for s, *_ in moved)] for stage, of in enumerate(rows)])
        expected.append((*lists, sizes))
    return expected


def _ends(rank, stages, size):
    """A strided view, as the kernel that lists rows leaves it."""
    counts = torch.randint(5, (stages * size, 3), generator=torch.Generator().manual_seed(rank), dtype=torch.int32)
    return counts.to(DEVICE).flatten().cumsum(0, dtype=torch.int32).view(-1, 3)[:, -1]


def _costs(rank, size):
    return torch.arange(size + 1, device=DEVICE) + (rank + 1) * 2**40 + 77


def _fetch(rank, case, n):
    _, _, n_kv, *_, share = case
    return torch.rand(n_kv, n, generator=torch.Generator().manual_seed(50 + rank)) < share


def _rank(comm, case):
    size, per_node, n_kv, stages, lengths, layout, _ = case
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    options = ExchangeOptions(stages=stages, ranks_per_node=per_node)
    cp = CPContext(comm, layout, sum(lengths), cu_seqlens, device=DEVICE, exchange=options)
    geometry, where = cp.geometry(BLOCK_SIZE), Where.forward("a layer")
    wire = build_wire_tables(geometry, n_kv, stages, per_node)
    n = geometry.n_blocks
    fetches = [_fetch(p, case, n) for p in range(size)]
    # A rank decides to fetch blocks of other ranks only.
    fetch = fetches[comm.rank].to(DEVICE) & geometry.is_remote
    expected = _by_hand(fetches, geometry, comm.rank, per_node or 1, stages)
    ends, costs = _ends(comm.rank, stages, size), _costs(comm.rank, size)
    facts = torch.tensor([5, 6, 7], device=DEVICE)

    for module in (requests, kernels):
        with poisoned():
            numbers = torch.empty((len(wire.hops) + 2, 2, stages, size + 1), dtype=torch.int64, device=DEVICE)
            inner, found = wire.hops[-1], []
            request = module.write_request(fetch, inner.source, ends, costs)
            arrived = comm.all_to_all(request, inner.send, inner.receive, "requests", where)()
            found.append((inner, fetch, arrived))
            if len(wire.hops) == 2:
                outer = wire.hops[0]
                need = module.relay_request(fetch, arrived, inner.asked_at)
                request = module.write_request(need, outer.source)
                found.insert(0, (outer, need, comm.all_to_all(request, outer.send, outer.receive, "requests", where)()))
            lists = [module.list_pairs(f, a, t.pairs, numbers[i]) for i, (t, f, a) in enumerate(found)]
            module.sum_up(
                arrived, inner.header_at, ends, costs, facts, geometry.n_remote_candidates, n_kv, numbers[-2:]
            )
        for (want, give), of_hop, (all_want, all_give, sizes) in zip(lists, numbers, expected, strict=False):
            assert of_hop.tolist() == sizes
            for side, pairs in ((want, all_want), (give, all_give)):
                assert side.ids[: len(pairs)].tolist() == pairs
                tokens = geometry.length.long()[side.ids[: len(pairs)] % n]
                assert torch.equal(side.before[: len(pairs)], tokens.cumsum(0) - tokens)
        counts = [_ends(p, stages, size).diff(prepend=ends.new_zeros(1)).view(stages, size) for p in range(size)]
        received = [[of[s, comm.rank].item() for of in counts] + [0] for s in range(stages)]
        sent = [[*row, 0] for row in counts[comm.rank].tolist()]
        assert numbers[-2].tolist() == [received, sent]
        total = sum(_costs(p, size)[-1].item() for p in range(size))
        candidates = int(geometry.remote_candidate.sum()) * n_kv
        all_rows = sum(int(of.sum()) for of in counts)
        facts_out = [total, 5, candidates, costs[-1].item(), 6, all_rows]
        assert numbers[-1].flatten().tolist() == facts_out + [0] * (numbers[-1].numel() - 6)
    return sum(len(want) + len(give) for want, give, _ in expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_lists_what_moves(case):
    moved = run_threads(case[0], _rank, case)
    assert all(moved) == (case[-1] > 0)


def test_sums_of_many_pairs_are_packed_closer(monkeypatch):
    """As with more pairs than the usual unit has room for."""
    monkeypatch.setattr(tables, "PAIR", 1 << 62)
    case = CASES[0]
    assert tables.pair_unit(2, 100) == 128
    assert all(run_threads(case[0], _rank, case))
