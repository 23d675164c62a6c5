"""The exchange with the kernels, on the CPU: Triton's interpreter on every rank."""

import pytest
import torch
import torch.distributed as dist

from moba_cp import eager, ops
from moba_cp.cp.options import MODES, ExchangeOptions
from tests.cases import Case, run_reference
from tests.cp.test_moba import NAMES, across_ranks
from tests.distributed import run_ranks

SIZE = 3


def _batch() -> Case:
    """Two documents that nobody's share ends with, and a block that most rows choose."""
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(168, 4, 16, generator=g) for _ in range(2))
    k, v = (torch.randn(168, 2, 16, generator=g) for _ in range(2))
    k[:16] += q.mean((0, 1))
    return Case(q, k, v, dout, torch.tensor([0, 108, 168], dtype=torch.int32), 16, 4)


def _results(rank):
    case = _batch()
    assert ops.backend(case.q) is not eager
    options = [ExchangeOptions(mode) for mode in MODES]
    options.append(ExchangeOptions("auto", stages=3, keep=True, row_weight=1))
    return [
        [x.tolist() for x in across_ranks(dist.group.WORLD, case, layout, False, o, deterministic=n % 2 == 1)[0]]
        for n, o in enumerate(options)
        for layout in ("zigzag", "contiguous")
    ]


@pytest.mark.timeout(280)
def test_equals_one_rank(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    exact = run_reference(_batch().to(torch.float64))
    for report in run_ranks(SIZE, _results, timeout=250):
        assert len(report) == 2 * (len(MODES) + 1)
        for number, results in enumerate(report):
            for name, result, expected in zip(NAMES, results, exact, strict=True):
                error = (torch.tensor(result, dtype=torch.float64) - expected).abs().max()
                assert error <= 2e-5 * expected.abs().max(), f"{number} {name}: {error}"
