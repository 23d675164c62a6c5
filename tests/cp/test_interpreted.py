"""The exchange with the kernels, on the CPU: Triton's interpreter on every rank, and memory that starts as NaN."""

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, eager, moba_attention, ops
from moba_cp.cp import comm
from moba_cp.cp.options import ExchangeOptions
from tests.cp.test_moba import NAMES, across_ranks
from tests.helpers.cases import Case, run_reference
from tests.helpers.distributed import FilePeerMemory, run_ranks
from tests.helpers.gathering import GatheringFrom
from tests.helpers.selections import first_blocks, numbers_in_documents, reference_results, reference_selection

SIZE = 4


def _straddling() -> Case:
    """Two documents that nobody's share ends with, and a block that most rows choose."""
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(104, 4, 16, generator=g) for _ in range(2))
    k, v = (torch.randn(104, 2, 16, generator=g) for _ in range(2))
    k[:16] += q.mean((0, 1))
    return Case(q, k, v, dout, torch.tensor([0, 70, 104], dtype=torch.int32), 16, 3)


def _aligned() -> Case:
    """One document whose blocks lie whole on one rank; the last quarters each like a block that the other does not."""
    g = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(128, 2, 16, generator=g) for _ in range(4))
    for quarter in (2, 3):
        likes = torch.randn(16, generator=g)
        q[32 * quarter : 32 * (quarter + 1)] += 3 * likes
        k[16 * (quarter - 2) : 16 * (quarter - 1)] += 3 * likes
    return Case(q, k, v, dout, torch.tensor([0, 128], dtype=torch.int32), 16, 2)


# Batch, layout, options, and whether ranks read one another's memory.
RUNS = [
    (_straddling, "zigzag", ExchangeOptions("auto"), False),
    (_straddling, "contiguous", ExchangeOptions("auto", stages=3, keep=True, row_weight=1), False),
    (_straddling, "zigzag", ExchangeOptions("kv", ranks_per_node=2), False),
    (_straddling, "contiguous", ExchangeOptions("query"), False),
    (_straddling, "zigzag", ExchangeOptions("allgather"), False),
    (_aligned, "contiguous", ExchangeOptions("kv"), False),
    (_aligned, "contiguous", ExchangeOptions("kv", ranks_per_node=2), False),
    (_aligned, "zigzag", ExchangeOptions("allgather"), False),
    (_straddling, "zigzag", ExchangeOptions("allgather"), True),
    (_aligned, "zigzag", ExchangeOptions("allgather", keep=True), True),
    (_aligned, "contiguous", GatheringFrom("auto"), True),
    (_straddling, "zigzag", ExchangeOptions("heads"), False),
    (_straddling, "contiguous", ExchangeOptions("heads", keep=True), True),
    (_aligned, "zigzag", ExchangeOptions("kv", head_ranks=2), False),
]


def _results(rank, folder):
    new_empty, empty = torch.Tensor.new_empty, torch.empty
    torch.Tensor.new_empty = lambda *args, **kwargs: _poisoned(new_empty(*args, **kwargs))
    torch.empty = lambda *args, **kwargs: _poisoned(empty(*args, **kwargs))
    results = []
    memory = FilePeerMemory(folder)
    for number, (batch, layout, options, shared) in enumerate(RUNS):
        case, used = batch(), memory.nbytes
        group = comm.Communicator(dist.group.WORLD)
        group.memory = memory if shared else None
        assert ops.backend(case.q) is not eager
        ours, _ = across_ranks(group, case, layout, False, options, deterministic=number % 2 == 1)
        assert shared or memory.nbytes == used
        results.append([x.tolist() for x in ours])
    assert memory.nbytes > 0
    return results


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    """``x`` full of NaN, of numbers that are no row or block, or of bytes and flags that are set."""
    if x.is_floating_point():
        return x.fill_(torch.nan)
    return x.fill_(1 if x.dtype == torch.bool else min(1_000_003, torch.iinfo(x.dtype).max))


@pytest.mark.timeout(280)
def test_equals_one_rank(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    exact = {batch: run_reference(batch().to(torch.float64)) for batch in (_straddling, _aligned)}
    for report in run_ranks(SIZE, _results, tmp_path, timeout=250):
        for (batch, layout, options, _), results in zip(RUNS, report, strict=True):
            for name, result, expected in zip(NAMES, results, exact[batch], strict=True):
                error = (torch.tensor(result, dtype=torch.float64) - expected).abs().max()
                assert error <= 2e-5 * expected.abs().max(), f"{batch.__name__} {layout} {options} {name}: {error}"


GATES = [
    (ExchangeOptions("kv", ranks_per_node=2), dict(shared_by_group="max", sink=True)),
    (ExchangeOptions("query"), dict(shared_by_group="sum", min_recent=1)),
    (ExchangeOptions("heads"), dict(shared_by_group="max", score="max")),
]


def _with_gates(rank):
    """For each gate [out, dq, dk, dv] and the selection, and whether that gives the same bits when it is given back."""
    torch.empty, results, case = (lambda *a, real=torch.empty, **k: _poisoned(real(*a, **k))), [], _straddling()
    for options, gate in GATES:
        cp = CPContext(dist.group.WORLD, "zigzag", len(case.q), case.cu_seqlens, exchange=options)
        config, found, selection = MoBAConfig(16, case.top_k, True, **gate), [], None
        for _ in range(2):
            leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
            how = {} if selection is None else {"block_indices": selection, "check_indices": True}
            out, selection = moba_attention(*leaves, config, cp=cp, return_selection=True, **how)
            out.backward(cp.shard(case.dout))
            found.append([out.detach(), *(x.grad for x in leaves)])
        same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        results.append(([cp.unshard(x).tolist() for x in found[0]], cp.unshard(selection).tolist(), same))
    return results


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_other_gates_equal_one_rank(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = _straddling()
    for report in run_ranks(SIZE, _with_gates, timeout=250):
        for (options, gate), (results, numbers, same) in zip(GATES, report, strict=True):
            label, numbers = f"{options} {gate}", torch.tensor(numbers)
            assert same, label
            assert torch.equal(
                numbers, numbers_in_documents(case, reference_selection(case, MoBAConfig(16, case.top_k, **gate)))
            )
            chosen = torch.where(numbers < 0, -1, numbers + first_blocks(case)[0][:, None, None])
            exact = reference_results(case.to(torch.float64), chosen)
            for name, result, expected in zip(NAMES, results, exact, strict=False):
                error = (torch.tensor(result, dtype=torch.float64) - expected).abs().max()
                assert error <= 2e-5 * expected.abs().max(), f"{label} {name}: {error}"
