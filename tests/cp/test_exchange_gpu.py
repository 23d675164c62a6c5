"""The exchange across NCCL ranks that share one GPU, in bfloat16 with the kernels."""

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, moba_attention
from moba_cp.blocks import block_table
from moba_cp.cp.layout import LAYOUTS
from moba_cp.cp.options import SEQUENCE_MODES, ExchangeOptions
from moba_cp.ops import backend
from tests.cp.test_moba import NAMES, across_ranks, selection_across_ranks
from tests.helpers.cases import Case, run, run_reference
from tests.helpers.distributed import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZE = 4
MIB = 2**20


def _batch(seed: int, lengths: list[int], heads: tuple[int, int], dim: int, block_size: int, top_k: int) -> Case:
    """Packed documents in bfloat16 on the GPU, with one hot block."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    q, dout = (torch.randn(n, heads[0], dim, generator=g) for _ in range(2))
    k, v = (torch.randn(n, heads[1], dim, generator=g) for _ in range(2))
    k[:block_size] += q.mean((0, 1))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Case(*(x.bfloat16().cuda() for x in (q, k, v, dout)), cu_seqlens, block_size, top_k)


def _one_rank_selection(case: Case) -> torch.Tensor:
    table = block_table(case.q.shape[0], case.block_size, case.cu_seqlens, "cuda")
    means = backend(case.k).block_means(case.k, table.start, table.length, table.block_size)
    return backend(case.q).select_blocks(case.q, means, table.first, table.current_block, case.top_k)


def _errors(results, exact) -> list[float]:
    return [(a.double() - e.double()).abs().max().item() for a, e in zip(results, exact, strict=True)]


def _on_one_rank(args: dict):
    """A batch, its selection, its results in float64 and how far off one rank's are."""
    case = _batch(**args)
    chosen = _one_rank_selection(case)
    exact = run_reference(case.to(torch.float64), chosen=chosen.long())
    config = MoBAConfig(case.block_size, case.top_k)
    one = _errors(run(moba_attention, case, config, cu_seqlens=case.cu_seqlens), exact)
    return case, chosen, exact, one


def _as_good_as_one_rank(label: str, errors: list[float], one: list[float], times: float = 2) -> None:
    for name, error, allowed in zip(NAMES, errors, one, strict=True):
        assert error <= times * allowed + 1e-5, f"{label} {name}: {error} against {allowed} on one rank"


CASES = {
    "packed, GQA": dict(seed=1, lengths=[1016, 8, 1024], heads=(8, 2), dim=64, block_size=64, top_k=4),
    "straddling": dict(seed=2, lengths=[1480, 56], heads=(4, 4), dim=128, block_size=112, top_k=3),
    "one document": dict(seed=3, lengths=[4096], heads=(8, 1), dim=32, block_size=128, top_k=8),
}


def _on_nccl(rank):
    """[(label, errors across ranks, errors of one rank, same selection, repeats)]."""
    report = []
    for name, args in CASES.items():
        case, chosen, exact, one = _on_one_rank(args)
        for layout in LAYOUTS:
            same = torch.equal(selection_across_ranks(dist.group.WORLD, case, layout), chosen)
            for index, mode in enumerate(SEQUENCE_MODES):
                options = ExchangeOptions(mode, stages=1 + index, ranks_per_node=2 if index % 2 else None)
                results, _ = across_ranks(dist.group.WORLD, case, layout, False, options, deterministic=True)
                again, _ = across_ranks(dist.group.WORLD, case, layout, False, options, deterministic=True)
                repeats = all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
                report.append((f"{name} {layout} {mode}", _errors(results, exact), one, same, repeats))
                if rank == 0:
                    print(*report[-1], flush=True)
    return report


def test_bf16_with_kernels_on_nccl():
    for report in run_ranks(SIZE, _on_nccl, backend="nccl", timeout=400):
        assert len(report) == len(CASES) * len(LAYOUTS) * len(SEQUENCE_MODES)
        for label, errors, one, same, repeats in report:
            assert same, f"{label}: selection differs from one rank's"
            assert repeats, f"{label}: not deterministic"
            _as_good_as_one_rank(label, errors, one)


# What the kernels of moba_cp.kernels.hopper serve.
WIDE_CASES = {
    "long blocks": dict(seed=4, lengths=[4096], heads=(4, 2), dim=128, block_size=256, top_k=4),
    "long blocks, packed": dict(seed=5, lengths=[2512, 1584], heads=(4, 4), dim=128, block_size=256, top_k=3),
    "short blocks": dict(seed=6, lengths=[4096], heads=(8, 2), dim=64, block_size=128, top_k=5),
}


def _by_atomics(rank):
    """[(label, errors across ranks, errors of one rank)], not deterministic."""
    report = []
    for name, args in WIDE_CASES.items():
        case, _, exact, one = _on_one_rank(args)
        for index, mode in enumerate(SEQUENCE_MODES):
            options = ExchangeOptions(mode, stages=1 + index % 3, ranks_per_node=2 if index % 2 else None)
            results, _ = across_ranks(dist.group.WORLD, case, "zigzag", False, options)
            report.append((f"{name} {mode}", _errors(results, exact), one))
    return report


def test_bf16_with_wide_kernels_on_nccl():
    for report in run_ranks(SIZE, _by_atomics, backend="nccl", timeout=400):
        assert len(report) == len(WIDE_CASES) * len(SEQUENCE_MODES)
        for label, errors, one in report:
            _as_good_as_one_rank(label, errors, one)


def _hundred_runs(rank):
    case = _batch(5, [2048], (8, 2), 64, 64, 4)
    options = ExchangeOptions("auto")
    first, _ = across_ranks(dist.group.WORLD, case, "zigzag", False, options, deterministic=True)
    same = 0
    for _ in range(100):
        again, _ = across_ranks(dist.group.WORLD, case, "zigzag", False, options, deterministic=True)
        same += all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return same


def test_a_hundred_runs_are_bit_identical():
    assert run_ranks(SIZE, _hundred_runs, backend="nccl", timeout=400) == [100] * SIZE


def _peak_memory(rank, stages: int):
    """MiB above what is there before forward and backward, fetching everything."""
    case = _batch(6, [65536], (16, 16), 64, 256, 16)
    cp = CPContext(dist.group.WORLD, "zigzag", 65536, exchange=ExchangeOptions("kv", stages=stages))
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    dout = cp.shard(case.dout)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        moba_attention(*leaves, MoBAConfig(256, 16), cp=cp).backward(dout)
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
    return peak


def test_more_stages_need_less_memory():
    two, eight = (run_ranks(SIZE, _peak_memory, stages, backend="nccl", timeout=300) for stages in (2, 8))
    print(f"peak MiB above the inputs, per rank: 2 stages {two}, 8 stages {eight}")
    assert max(eight) < 0.8 * max(two)
