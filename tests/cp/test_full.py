"""Full attention across ranks, both methods, against one rank's reference."""

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, full_attention
from moba_cp.cp.full import allgather as full_gather
from moba_cp.cp.full import attention as full
from moba_cp.cp.full.schedule import FullSchedule
from moba_cp.cp.layout import LAYOUTS, rank_segments
from tests.helpers.cases import Case, relative_error, run_reference
from tests.helpers.distributed import run_ranks, run_threads

NAMES = ("out", "dq", "dk", "dv", "lse")
METHODS = ("ring", "allgather")


def batch(seed: int, n_tokens: int, multiple: int, dtype=torch.float64, heads=(6, 3), dim: int = 8) -> Case:
    """Documents of random lengths, some of them zero; ``heads`` are query and KV heads."""
    g = torch.Generator().manual_seed(seed)
    n_cuts = int(torch.randint(6, (1,), generator=g))
    cuts = torch.randint(n_tokens // multiple + 1, (n_cuts,), generator=g) * multiple
    cu_seqlens = torch.cat([torch.tensor([0, n_tokens]), cuts, cuts[:1]]).sort().values.int()
    shapes = [
        (n_tokens, heads[0], dim),
        (n_tokens, heads[1], dim),
        (n_tokens, heads[1], dim),
        (n_tokens, heads[0], dim),
    ]
    q, k, v, dout = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return Case(q, k, v, dout, cu_seqlens, 16, 1)


def across_ranks(group, case: Case, layout: str, method: str, device="cpu", **options):
    """Whole-sequence [out, dq, dk, dv, lse] as one rank of ``group`` computes them, and the counters."""
    cp = CPContext(group, layout, case.q.shape[0], case.cu_seqlens, device=device)
    leaves = [cp.shard(x.to(device)).requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = full_attention(*leaves, cp=cp, return_lse=True, method=method, **options)
    out.backward(cp.shard(case.dout.to(device)))
    counters = cp.counters.summary()
    return [cp.unshard(x) for x in (out, *(x.grad for x in leaves), lse)], counters


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_equal_one(method, layout, size, monkeypatch):
    # One KV head per slice, so that slices follow one another.
    monkeypatch.setattr(full_gather, "SLICE_BYTES", 0)
    for seed in range(4):
        multiple = 2 * size if layout == "zigzag_per_document" else 1
        case = batch(seed, 2 * size * (5 + seed), multiple)
        expected = run_reference(case, full=True)
        for results, _ in run_threads(size, across_ranks, case, layout, method):
            for name, actual, want in zip(NAMES, results, expected):
                assert relative_error(actual, want) < 1e-10, f"seed {seed} {name}"


def _on_gloo(rank, size):
    """Worst relative error of each layout and method, for two batches."""
    report = []
    for layout in LAYOUTS:
        for method in METHODS:
            for seed in (1, 2):
                case = batch(seed, 12 * size, 2 * size if layout == "zigzag_per_document" else 1)
                results, _ = across_ranks(dist.group.WORLD, case, layout, method)
                worst = max(relative_error(a, e) for a, e in zip(results, run_reference(case, full=True)))
                report.append((f"{layout} {method} {seed}", worst))
    return report


@pytest.mark.parametrize("size", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 8))])
def test_ranks_equal_one_on_gloo(size):
    for report in run_ranks(size, _on_gloo, size):
        assert len(report) == 12
        for label, worst in report:
            assert worst < 1e-10, label


def test_low_precision_does_not_drift_with_ranks():
    case = batch(3, 256, 16, torch.float64, heads=(4, 2), dim=32)
    exact, low = run_reference(case, full=True), case.to(torch.bfloat16)
    error = lambda results: [(a.double() - e).abs().max().item() for a, e in zip(results, exact)]
    one = error(run_reference(low, full=True))
    for method in METHODS:
        for results, _ in run_threads(8, across_ranks, low, "zigzag", method):
            for name, ours, plain in zip(NAMES, error(results), one):
                assert ours <= 2 * plain + 1e-5, f"{method} {name}"


def test_a_ring_moves_every_shard_once():
    case = batch(0, 64, 64)
    case.cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
    shard = 2 * 16 * 3 * 8 * 8
    for _, seen in run_threads(4, across_ranks, case, "zigzag", "ring"):
        # Forward and backward bring K and V of the three others; gradients of four shards take four hops each.
        assert seen["received_full_kv_bytes"] == seen["sent_full_kv_bytes"] == 2 * 3 * shard
        assert seen["received_full_kv_gradients_bytes"] == 4 * shard
        assert seen["dense_ring_bytes"] == 3 * 3 * shard


def test_a_ring_moves_only_what_is_seen():
    # Contiguous: rank 0 is seen by rank 1 alone (one document over both), ranks 2 and 3 by nobody else.
    case = batch(0, 64, 64)
    case.cu_seqlens = torch.tensor([0, 5, 32, 48, 64], dtype=torch.int32)
    results = run_threads(4, across_ranks, case, "contiguous", "ring")
    shard = 2 * 16 * 3 * 8 * 8
    received = [seen.get("received_full_kv_bytes", 0) for _, seen in results]
    returned = [seen.get("received_full_kv_gradients_bytes", 0) for _, seen in results]
    assert received == [0, 2 * shard, 0, 0]
    assert returned == [shard, shard, 0, 0]
    for result, _ in results:
        for actual, want in zip(result, run_reference(case, full=True)):
            assert relative_error(actual, want) < 1e-10


def test_a_shard_passes_through_ranks_that_do_not_see_it():
    # Zigzag over 4 ranks, 8 tokens a chunk: chunks 4 and 5 are one document, on ranks 3 and 2. Rank 2 is the last of
    # the ring behind rank 3, and ranks 0 and 1 between them see nothing of it.
    case = batch(0, 64, 64)
    case.cu_seqlens = torch.tensor([0, 8, 16, 24, 32, 48, 56, 64], dtype=torch.int32)
    bounds = case.cu_seqlens.long().numpy()
    assert FullSchedule(rank_segments("zigzag", 64, 4, bounds), 0, bounds).hops == [0, 0, 0, 3]
    for results, _ in run_threads(4, across_ranks, case, "zigzag", "ring"):
        for actual, want in zip(results, run_reference(case, full=True)):
            assert relative_error(actual, want) < 1e-10


def test_size_chooses_the_method():
    small, cp = torch.zeros(16, 2, 8), CPContext(None, seq_len=32)
    assert full.choose_method(small, small, cp) == "ring", "one rank has nobody to gather from"

    def choose(comm, n_local, cu_seqlens):
        cp = CPContext(comm, "contiguous", 2 * n_local, cu_seqlens)
        k = torch.empty(n_local, 2, 128, dtype=torch.bfloat16, device="meta")
        return full.choose_method(k, k, cp)

    assert run_threads(2, choose, 1024, None) == ["allgather"] * 2
    assert run_threads(2, choose, 1 << 20, None) == ["ring"] * 2
    assert run_threads(2, choose, 1024, torch.tensor([0, 1024, 2048])) == ["ring"] * 2


def test_unknown_method_is_named():
    cp, q = CPContext(None, seq_len=32), torch.zeros(32, 2, 8)
    with pytest.raises(ValueError, match="method='tree' is not one of auto, ring, allgather, heads"):
        full_attention(q, q, q, cp=cp, method="tree")
