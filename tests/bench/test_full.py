"""The parts of ``bench full`` that need no GPU: the ring with instant transfers, and the check before the timing."""

import argparse

import pytest
import torch

from moba_cp import CPContext, full_attention
from moba_cp.bench import full as bench
from moba_cp.bench.environment import environment
from tests.helpers.cases import Case, relative_error, run, run_reference

SIZE = 4


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(128, h, 16, dtype=torch.bfloat16) for h in (4, 2, 2, 4))
    return Case(q, k, v, dout, torch.tensor([0, 128], dtype=torch.int32), 16, 1)


def one_rank(case, rank, layout, ring=bench.InstantRing):
    comm = ring(rank, SIZE)
    cp = CPContext(comm, layout, 128)
    comm.fill(case.k, case.v, cp.rank_positions())
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    out = full_attention(*leaves, cp=cp, method="ring")
    out.backward(cp.shard(case.dout))
    return cp, out.detach(), leaves[0].grad


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ring", [bench.InstantRing, bench.CopyingRing])
def test_an_instant_ring_gives_a_rank_its_real_output(case, layout, ring):
    expected = run_reference(case.to(torch.float64), full=True)
    for rank in range(SIZE):
        cp, out, dq = one_rank(case, rank, layout, ring)
        assert relative_error(out, cp.shard(expected[0])) < 2e-2
        assert relative_error(dq, cp.shard(expected[1])) < 2e-2


def test_exact_rows_are_exact(case):
    position = torch.tensor([0, 5, 127])
    out, dq = bench._exact_rows(case.q, case.k, case.v, position, case.dout[position])
    expected = run_reference(case.to(torch.float64), full=True)
    assert relative_error(out, expected[0][position]) < 1e-12
    assert relative_error(dq, expected[1][position]) < 1e-12


def test_the_check_passes_what_is_right_and_nothing_else(case):
    dense = run(full_attention, case)
    cp, out, dq = one_rank(case, 1, "zigzag")
    check = lambda out, dq: bench._wrong(case.q, case.k, case.v, cp, out, dq, cp.shard(case.dout), dense[:2])
    assert check(out, dq) is None
    assert check(out * 1.05, dq).startswith("out is off by")
    assert check(out, dq.roll(1, 0)).startswith("dq is off by")
    assert check(out * torch.nan, dq).startswith("out is off by nan")


def test_candidates_take_turns_each_after_work_of_its_own(monkeypatch):
    ran = []

    def time_once(candidate, backward):
        ran.append((candidate.name, backward))
        if candidate.name == "fails":
            raise RuntimeError
        return {"dense": 100.0, "ring": 30.0}[candidate.name] * (3 if backward else 1)

    monkeypatch.setattr(bench, "time_once", time_once)
    candidates = [bench.Candidate(name, None, None, []) for name in ("dense", "fails", "ring")]
    rows = bench._timed(candidates, argparse.Namespace(repeats=3, ranks=4))
    assert [(row.name, row.forward, row.forward_backward) for row in rows] == [("dense", 100, 300), ("ring", 30, 90)]
    assert rows[0].share is None and (rows[1].share, rows[1].share_backward) == (1.2, 1.2)
    dense, ring = [("dense", b) for b in (True, False, True)], [("ring", b) for b in (True,) * 4 + (False, True)]
    assert ran == dense + [("fails", True)] + ring + ring + dense + ring + dense


def test_the_environment_is_complete():
    assert all(isinstance(value, str) and value for value in environment().values())
