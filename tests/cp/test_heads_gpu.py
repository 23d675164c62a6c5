"""Tokens exchanged for heads between GPUs, in bfloat16 with the kernels: by NCCL, and by copies."""

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, full_attention, moba_attention
from moba_cp.cp.heads import copies
from moba_cp.cp.layout import LAYOUTS
from moba_cp.cp.options import ExchangeOptions
from tests.cp.test_copies_gpu import GPUS, SIZES, _layouts, differing_passes
from tests.cp.test_exchange_gpu import CASES, _as_good_as_one_rank, _errors, _on_one_rank
from tests.cp.test_moba import across_ranks
from tests.helpers.cases import run, run_reference
from tests.helpers.distributed import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]

NARROWEST = {"in place": 0, "packed": 1 << 30}
"""Bytes of a row from which on it is copied as it lies."""


def _selection(group, case, layout: str, options: ExchangeOptions) -> torch.Tensor:
    """[T, Hq, k - 1], what all ranks select."""
    seen = []
    cp = CPContext(
        group, layout, case.q.shape[0], case.cu_seqlens, case.q.device, options, observer=lambda *x: seen.append(x[1])
    )
    with torch.no_grad():
        moba_attention(*(cp.shard(x) for x in (case.q, case.k, case.v)), MoBAConfig(case.block_size, case.top_k), cp=cp)
    return cp.unshard(seen[0])


def _equal_one_rank(rank, runs: list[ExchangeOptions]):
    """[(label, errors across ranks, errors of one rank, repeats, the selection is one rank's)]."""
    report, group, size = [], dist.group.WORLD, dist.get_world_size()
    for name, args in CASES.items():
        case, chosen, exact, one = _on_one_rank(args)
        if case.q.shape[1] % size:
            continue
        exact_full = run_reference(case.to(torch.float64), full=True)
        one_full = _errors(run(full_attention, case, cu_seqlens=case.cu_seqlens), exact_full)
        for index, options in enumerate(runs):
            for layout in _layouts(args, size):
                copies.NARROWEST_ROW = list(NARROWEST.values())[len(report) % 2]
                twice = [across_ranks(group, case, layout, False, options, deterministic=True)[0] for _ in range(2)]
                repeats = all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
                same = torch.equal(_selection(group, case, layout, options), chosen.int())
                report.append((f"{name} {layout} {options}", _errors(twice[0], exact), one, repeats, same))
            if index < 2:
                full, _ = across_ranks(group, case, "zigzag", True, options)
                report.append((f"full {name} {options}", _errors(full, exact_full), one_full, True, True))
    return report


def _holds(report, least: int) -> None:
    assert len(report) >= least
    for label, errors, one, repeats, same in report:
        assert repeats, f"{label}: not deterministic"
        assert same, f"{label}: the selection is not one rank's"
        # Where ranks share a KV head, each part of its gradient is rounded before the sum is.
        _as_good_as_one_rank(label, errors, one, 3)


NCCL = [
    ExchangeOptions("heads", copy_engines=False),
    ExchangeOptions("kv", head_ranks=2, copy_engines=False),
    ExchangeOptions("heads", keep=True, stages=8, copy_engines=False),
    ExchangeOptions("allgather", head_ranks=2, copy_engines=False),
]


def test_four_ranks_on_one_gpu():
    for report in run_ranks(4, _equal_one_rank, NCCL, backend="nccl", timeout=300):
        _holds(report, 8)


COPIES = [ExchangeOptions("heads"), ExchangeOptions("heads", keep=True, stages=8), ExchangeOptions("heads", stages=1)]


@pytest.mark.parametrize("size", SIZES)
def test_copies_equal_one_rank(size):
    teams = [ExchangeOptions("allgather", head_ranks=2)] if size > 2 else []
    for report in run_ranks(size, _equal_one_rank, COPIES + teams, backend="nccl", gpus=size, timeout=300):
        _holds(report, 8)


def _late(rank):
    """By options, how many of 24 passes, over two sequences in turn and with ranks late in turn, differ from the first
    two."""
    return {
        f"{options} {name}": _differing_passes(rank, options, narrowest)
        for options in COPIES
        for name, narrowest in NARROWEST.items()
    }


def _differing_passes(rank: int, options: ExchangeOptions, narrowest: int) -> int:
    copies.NARROWEST_ROW = narrowest
    return differing_passes(rank, options, 24)


@pytest.mark.parametrize("size", SIZES)
def test_whoever_is_late_results_are_the_same(size):
    for report in run_ranks(size, _late, backend="nccl", gpus=size, timeout=300):
        assert len(report) == 6 and not any(report.values()), report


def test_layouts_are_seen():
    assert all(_layouts(args, 4) for args in CASES.values()) and len(LAYOUTS) == 3
