"""Full attention across NCCL ranks that share one GPU, and a ring's memory.

Ranks are processes: on a GPU all backward passes of one process run in one thread, where ranks would wait for ever.
"""

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, full_attention
from moba_cp.cp.comm import Communicator
from moba_cp.cp.layout import LAYOUTS
from tests.cp.test_full import METHODS, NAMES, across_ranks, batch
from tests.helpers.cases import run, run_reference
from tests.helpers.distributed import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(case):
    for name in ("q", "k", "v", "dout"):
        setattr(case, name, getattr(case, name).cuda())
    return case


def worst(results, exact) -> list[float]:
    return [(a.double().cpu() - e.cpu()).abs().max().item() for a, e in zip(results, exact)]


def _on_nccl(rank, size):
    """Per batch, layout and method: errors against float64 across ranks and on one, and whether bits repeat."""
    report = []
    for heads in ((4, 4), (8, 2)):
        for packed in (False, True):
            case = on_gpu(batch(7, 2048, 8, torch.bfloat16, heads, 64))
            if not packed:
                case.cu_seqlens = torch.tensor([0, 2048], dtype=torch.int32)
            exact = run_reference(case.to(torch.float64), full=True)
            one = worst(run(full_attention, case, cu_seqlens=case.cu_seqlens), exact)
            for layout in LAYOUTS:
                for method in METHODS:
                    rest = dist.group.WORLD, case, layout, method, "cuda"
                    ours = worst(across_ranks(*rest)[0], exact)
                    first, second = (across_ranks(*rest, deterministic=True)[0] for _ in range(2))
                    repeats = all(torch.equal(x, y) for x, y in zip(first, second))
                    report.append((f"{heads} packed={packed} {layout} {method}", ours, one, repeats))
    return report


@pytest.fixture(scope="module")
def nccl_reports():
    return run_ranks(4, _on_nccl, 4, backend="nccl")


def test_bf16_is_within_twice_the_error_of_one_rank(nccl_reports):
    for report in nccl_reports:
        assert len(report) == 2 * 2 * len(LAYOUTS) * len(METHODS)
        for label, ours, one, _ in report:
            for name, error, allowed in zip(NAMES, ours, one):
                assert error <= 2 * allowed + 1e-5, f"{label} {name}: {error} against {allowed}"


def test_deterministic_gradients_repeat_across_ranks(nccl_reports):
    for report in nccl_reports:
        for label, _, _, repeats in report:
            assert repeats, label


class _Echo(Communicator):
    """One rank of several without the others: whatever is received has the right shape and no meaning."""

    # Nobody is there to compare them with.
    checks_calls = False

    def __init__(self, rank, size):
        super().__init__(None)
        self.rank, self.size = rank, size

    def _all_to_all(self, x, send, receive, what):
        out = torch.ones(sum(receive), *x.shape[1:], dtype=x.dtype, device=x.device)
        return lambda: out


def test_a_ring_needs_two_shards_of_memory():
    n, size, heads, dim = 8192, 4, 8, 128
    cp = CPContext(_Echo(1, size), "zigzag", n * size, device="cuda")
    q, k, v = (torch.randn(n, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    peaks = []
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        full_attention(q, k, v, cp=cp, method="ring")
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    shard = k.nbytes + v.nbytes
    # Besides the shards: the joined result in float32, one step's result, and log-sum-exps.
    results = 2 * q.nbytes + q.nbytes + 8 * n * heads * 4
    assert peaks[-1] <= 2 * shard + results + (4 << 20), f"{peaks} against shards of {shard}"
