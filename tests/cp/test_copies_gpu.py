"""Copies between the memories of several GPUs: equal to one rank, whoever is late."""

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, moba_attention
from moba_cp.cp.layout import LAYOUTS
from moba_cp.cp.options import ExchangeOptions
from moba_cp.cp.symmetric_memory import SymmetricMemory
from tests.cp.test_exchange_gpu import CASES, WIDE_CASES, _as_good_as_one_rank, _batch, _errors, _on_one_rank
from tests.cp.test_moba import across_ranks, divides
from tests.helpers.distributed import run_ranks
from tests.helpers.gathering import GatheringFrom

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def _needs(n: int):
    return pytest.param(n, marks=pytest.mark.skipif(GPUS < n, reason=f"needs {n} GPUs, there are {GPUS}"))


SIZES = [_needs(2), _needs(4)]
pytestmark = pytest.mark.gpu

OPTIONS = [
    ExchangeOptions("allgather"),
    ExchangeOptions("allgather", stages=8, keep=True),
    GatheringFrom("auto", stages=1),
    ExchangeOptions("allgather", gradient_dtype="input"),
]


def _layouts(args: dict, size: int) -> list[str]:
    """Those that the documents of a batch divide by."""
    cu_seqlens = torch.tensor([0, *args["lengths"]]).cumsum(0)
    return [layout for layout in LAYOUTS if divides(layout, cu_seqlens, size)]


def _equal_one_rank(rank):
    """[(label, errors across ranks, errors of one rank, repeats, bytes moved)]."""
    report = []
    for name, args in (CASES | WIDE_CASES).items():
        case, _, exact, one = _on_one_rank(args)
        for layout in _layouts(args, dist.get_world_size()):
            for options in OPTIONS:
                runs = [
                    across_ranks(dist.group.WORLD, case, layout, False, options, deterministic=True) for _ in range(2)
                ]
                repeats = all(torch.equal(a, b) for a, b in zip(*(results for results, _ in runs), strict=True))
                moved = runs[0][1]["received_kv_bytes"]
                report.append((f"{name} {layout} {options}", _errors(runs[0][0], exact), one, repeats, moved))
    cp = CPContext(dist.group.WORLD, "zigzag", 4096)
    assert isinstance(cp.peers, SymmetricMemory) and cp.peers.nbytes > 0
    return report


@pytest.mark.parametrize("size", SIZES)
def test_equals_one_rank(size):
    moved, n_layouts = 0, sum(len(_layouts(args, size)) for args in (CASES | WIDE_CASES).values())
    # Up to eight ranks, whole documents divide in most batches, whole sequences in all.
    assert n_layouts >= len(CASES | WIDE_CASES) * (len(LAYOUTS) - 1)
    for report in run_ranks(size, _equal_one_rank, backend="nccl", gpus=size, timeout=300):
        assert len(report) == n_layouts * len(OPTIONS)
        for label, errors, one, repeats, bytes_ in report:
            moved += bytes_
            assert repeats, f"{label}: not deterministic"
            # Two shares that are rounded, and a sum that is.
            _as_good_as_one_rank(label, errors, one, 3 if "'input'" in label else 2)
    assert moved > 0


LATE = {
    "refetch": ExchangeOptions("allgather", stages=8),
    "keep": ExchangeOptions("allgather", stages=8, keep=True),
    "rounded": ExchangeOptions("allgather", stages=4, gradient_dtype="input"),
    "one stage": ExchangeOptions("allgather", stages=1),
}


def _late(rank):
    """By options, how many of 40 passes, over two sequences in turn and with ranks late in turn, differ from the first
    two."""
    return {name: differing_passes(rank, options) for name, options in LATE.items()}


def differing_passes(rank: int, options: ExchangeOptions, n_passes: int = 40) -> int:
    """How many passes, over two sequences in turn and with ranks late in turn, differ from the first two."""
    size = dist.get_world_size()
    batches = [_batch(7, [8192], (8, 8), 128, 256, 4), _batch(8, [1480, 568], (8, 4), 64, 128, 3)]
    assert all(divides("zigzag", torch.tensor([0, b.q.shape[0]]), size) for b in batches)
    contexts = [CPContext(dist.group.WORLD, "zigzag", b.q.shape[0], exchange=options) for b in batches]
    assert isinstance(contexts[0].peers, SymmetricMemory)
    generator, first, different = torch.Generator().manual_seed(rank), {}, 0
    for number in range(n_passes):
        case, cp = batches[number % 2], contexts[number % 2]
        leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]

        def linger() -> None:
            if number % size == rank:
                torch.cuda._sleep(int(torch.randint(1, 40_000_000, (), generator=generator)))

        linger()
        if number % 7 == 0:
            with torch.no_grad():
                moba_attention(*leaves, MoBAConfig(case.block_size, case.top_k), cp=cp)
        out = moba_attention(*leaves, MoBAConfig(case.block_size, case.top_k, deterministic=True), cp=cp)
        linger()
        out.backward(cp.shard(case.dout))
        results = [out.detach(), *(x.grad for x in leaves)]
        expected = first.setdefault(number % 2, results)
        different += not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    return different


@pytest.mark.parametrize("size", SIZES)
def test_whoever_is_late_results_are_the_same(size):
    assert run_ranks(size, _late, backend="nccl", gpus=size, timeout=300) == [dict.fromkeys(LATE, 0)] * size


def _in_groups(rank):
    """[(ranks, errors across ranks, errors of one rank)] of the groups this rank is in, the smallest first."""
    size = dist.get_world_size()
    members = [[0], [0, 1], list(range(size)), [size - 2, size - 1], [0, size - 1], list(range(size))]
    groups, report = [dist.new_group(ranks) for ranks in members], []
    # The second batch needs larger buffers.
    for args in (CASES["packed, GQA"], CASES["one document"]):
        case, _, exact, one = _on_one_rank(args)
        for ranks, group in zip(members, groups, strict=True):
            if rank in ranks:
                results, _ = across_ranks(group, case, "zigzag", False, ExchangeOptions("allgather"))
                report.append((ranks, _errors(results, exact), one))
                cp = CPContext(group, "zigzag", 4096)
                assert isinstance(cp.peers, SymmetricMemory) == (len(ranks) > 1), f"{ranks}: {cp.peers}"
    return report


@pytest.mark.parametrize("size", SIZES)
def test_groups_of_different_sizes_one_after_another(size):
    """Ranks that have made memory in a smaller group before, and others that have not."""
    for rank, report in enumerate(run_ranks(size, _in_groups, backend="nccl", gpus=size, timeout=200)):
        assert len(report) >= 2 * (2 if 1 < rank < size - 2 else 3)
        for ranks, errors, one in report:
            _as_good_as_one_rank(str(ranks), errors, one)
