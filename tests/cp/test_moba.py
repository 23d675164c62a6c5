"""MoBA and full attention across ranks against one rank."""

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, full_attention, moba_attention, reference
from moba_cp.cp import straddle
from moba_cp.cp.comm import Communicator
from moba_cp.cp.layout import LAYOUTS, rank_segments
from tests.helpers.cases import GOLDEN, Case, golden, random_case, relative_error, run, run_reference
from tests.helpers.distributed import run_ranks, run_threads

NAMES = ("out", "dq", "dk", "dv", "lse")


def across_ranks(group, case: Case, layout: str, full: bool, exchange="auto", deterministic=False, observer=None):
    """Whole-sequence [out, dq, dk, dv, lse] and the counters, as one rank of ``group`` computes them."""
    cp = CPContext(group, layout, case.q.shape[0], case.cu_seqlens, exchange=exchange, observer=observer)
    return in_context(cp, case, full, deterministic), cp.counters.summary()


def in_context(cp: CPContext, case: Case, full: bool = False, deterministic: bool = False) -> list[torch.Tensor]:
    """Whole-sequence [out, dq, dk, dv, lse]."""
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    if full:
        out, lse = full_attention(*leaves, cp=cp, return_lse=True)
    else:
        config = MoBAConfig(case.block_size, case.top_k, deterministic)
        out, lse = moba_attention(*leaves, config, cp=cp, return_lse=True)
    out.backward(cp.shard(case.dout))
    return [cp.unshard(x) for x in (out, *(x.grad for x in leaves), lse)]


def fits(layout: str, case: Case, size: int) -> bool:
    return divides(layout, case.cu_seqlens, size)


def divides(layout: str, cu_seqlens: torch.Tensor, size: int) -> bool:
    """Whether a batch can be spread over ``size`` ranks in a layout."""
    try:
        rank_segments(layout, int(cu_seqlens[-1]), size, cu_seqlens.numpy())
    except ValueError:
        return False
    return True


def selection_across_ranks(group, case, layout) -> torch.Tensor:
    """[T, Hq, k - 1], what all ranks select."""
    seen = []
    cp = CPContext(
        group, layout, case.q.shape[0], case.cu_seqlens, case.q.device, observer=lambda *x: seen.append(x[1])
    )
    with torch.no_grad():
        moba_attention(*(cp.shard(x) for x in (case.q, case.k, case.v)), MoBAConfig(case.block_size, case.top_k), cp=cp)
    return cp.unshard(seen[0])


def _golden_on_gloo(rank, size):
    """Every golden file in every layout that divides: list of (label, worst relative error, selection is equal)."""
    report = []
    for path in GOLDEN:
        case = golden(path)
        for layout in LAYOUTS:
            if not fits(layout, case, size):
                continue
            results, _ = across_ranks(dist.group.WORLD, case, layout, full=False)
            worst = max(relative_error(a, e) for a, e in zip(results, case.expected))
            expected = reference.select_blocks(case.q, case.k, case.block_size, case.top_k, case.cu_seqlens)
            same = torch.equal(selection_across_ranks(dist.group.WORLD, case, layout), expected.int())
            report.append((f"{path.stem} {layout}", worst, same))
    return report


@pytest.mark.parametrize("size, cases", [(2, 11), (3, 2), (4, 11)])
def test_golden_on_gloo(size, cases):
    for report in run_ranks(size, _golden_on_gloo, size):
        for label, worst, same_selection in report:
            assert same_selection, label
            assert worst < 1e-5, label
        assert len(report) >= cases, "the golden files that divide were not all seen"


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_ranks_equal_one(layout, size):
    for seed in range(4):
        case = random_case(1000 * size + seed, multiple=2 * size)
        for full in (False, True):
            expected = run_reference(case, full)
            for results, _ in run_threads(size, across_ranks, case, layout, full):
                for name, actual, want in zip(NAMES, results, expected):
                    assert relative_error(actual, want) < 1e-10, f"seed {seed} full={full} {name}"


def test_many_ranks_equal_one_whatever_unwritten_rows_hold(monkeypatch):
    """Attention reads a straddling block in its assembled copy alone, so kernels leave the gradients of its local rows
    as they are."""
    inner, poisoned = straddle.assemble_backward, []

    def assemble_backward(dk, dv, geometry, comm, where):
        for rows in (geometry.copy_from, geometry.tail_from):
            dk[rows] = dv[rows] = torch.nan
            poisoned.append(rows.numel())
        return inner(dk, dv, geometry, comm, where)

    monkeypatch.setattr("moba_cp.cp.moba.assemble_backward", assemble_backward)
    case = random_case(3, multiple=6)
    expected = run_reference(case)
    for results, _ in run_threads(3, across_ranks, case, "contiguous", False):
        for name, actual, want in zip(NAMES, results, expected):
            assert relative_error(actual, want) < 1e-10, name
    assert sum(poisoned[::2]) and sum(poisoned[1::2])


@pytest.mark.parametrize("size", [2, 16])
def test_ranks_choose_alike_among_equal_keys(size):
    """Every block has the same mean: a selection that differs is off by far more than rounding."""
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        n, dim = 32 * 18, (16, 40, 64)[seed]
        q, v, dout = (torch.randn(n, h, dim, generator=g, dtype=torch.float64) for h in (3, 1, 3))
        k = torch.randn(1, 1, dim, generator=g, dtype=torch.float64).expand(n, -1, -1).contiguous()
        case = Case(q, k, v, dout, torch.tensor([0, n], dtype=torch.int32), 16, 3)
        expected = run_reference(case)
        for results, _ in run_threads(size, across_ranks, case, "zigzag", False):
            for name, actual, want in zip(NAMES, results, expected):
                # With equal keys the gradient of a query is zero.
                assert name == "dq" or relative_error(actual, want) < 1e-10, f"seed {seed} {name}"


def _poisoned(what: str) -> Case:
    """Two documents, two KV heads; NaN or infinity lies in the first document and head."""
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(160, 4, 8, generator=g, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(160, 2, 8, generator=g, dtype=torch.float64) for _ in range(2))
    if what in ("block of -inf", "first key -inf"):
        # Scores of -inf, not of both signs.
        q[:, :2, 3] = q[:, :2, 3].abs() + 0.1
        k[32 : 48 if what == "block of -inf" else 33, 0, 3] = -torch.inf
    elif what == "NaN in a value":
        v[21, 0, 3] = torch.nan
    elif what == "NaN in a query":
        q[70, 1, 3] = torch.nan
    else:
        k[21, 0, 3] = {"NaN in a key": torch.nan, "-inf in a key": -torch.inf, "inf in a key": torch.inf}[what]
    return Case(q, k, v, dout, torch.tensor([0, 80, 160], dtype=torch.int32), 16, 3)


POISON = (
    "block of -inf", "first key -inf", "NaN in a value", "NaN in a query", "NaN in a key", "-inf in a key",
    "inf in a key",
)  # fmt: skip


@pytest.mark.parametrize("what", POISON)
def test_ranks_agree_on_what_nan_and_infinity_reach(what):
    case = _poisoned(what)
    one = run(moba_attention, case, MoBAConfig(16, 3), cu_seqlens=case.cu_seqlens)
    for x in one:
        heads = x.shape[1] // 2
        assert x[80:].isfinite().all() and x[:, heads:].isfinite().all()
    if what == "block of -inf":
        assert relative_error(one[0], run_reference(case)[0]) < 1e-12
    for mode in ("kv", "query", "allgather"):
        for results, _ in run_threads(5, across_ranks, case, "contiguous", False, mode):
            for name, actual, want in zip(NAMES, results, one, strict=True):
                torch.testing.assert_close(actual, want, rtol=1e-10, atol=1e-10, equal_nan=True, msg=f"{mode} {name}")
    for results, _ in run_threads(2, across_ranks, case, "contiguous", True):
        for name, x in zip(NAMES, results, strict=True):
            assert x[80:].isfinite().all() and x[:, x.shape[1] // 2 :].isfinite().all(), f"full {name}"


def _counted(comm: Communicator, case: Case):
    return across_ranks(comm, case, "contiguous", full=False, exchange="kv")[1]


def test_counters_say_what_moved():
    # Two ranks, two blocks each, top-k of everything: rank 1 needs both blocks of rank 0 and nothing goes back but
    # their gradients.
    q, k, v, dout = (torch.randn(64, 1, 8) for _ in range(4))
    case = Case(q, k, v, dout, torch.tensor([0, 64], dtype=torch.int32), 16, 4)
    first, second = run_threads(2, _counted, case)
    block = 16 * 8 * 4
    assert first["sent_kv_bytes"] == second["received_kv_bytes"] == 2 * (2 * 2 * block)
    assert first["received_kv_bytes"] == second["sent_kv_bytes"] == 0
    assert first["received_kv_gradients_bytes"] == second["sent_kv_gradients_bytes"] == 2 * 2 * block
    assert first["received_means_bytes"] == second["received_means_bytes"] == 2 * 8 * 4
    assert first["dense_ring_bytes"] == second["dense_ring_bytes"] == 3 * 2 * 2 * block
    assert first["needed_share"] is None and second["needed_share"] == 1


def test_only_chosen_blocks_move():
    case = random_case(1, multiple=4)
    n = 512
    q, k, v, dout = (torch.randn(n, 2, 8, dtype=torch.float64) for _ in range(4))
    # Every query likes block 3 best, and no other remote block.
    k[48:64] += 100 * torch.sign(q.mean(0))
    q = q.mean(0, keepdim=True).expand(n, -1, -1).contiguous()
    case = Case(q, k, v, dout, torch.tensor([0, n], dtype=torch.int32), 16, 2)
    counters = run_threads(4, _counted, case)
    pair = 2 * 16 * 8 * 8
    for rank, seen in enumerate(counters):
        assert seen["received_kv_bytes"] == (0 if rank == 0 else 2 * 2 * pair)
        assert seen["received_bytes"] < seen["dense_ring_bytes"] / 4 or rank == 0


def test_context_misuse_is_named():
    cp = CPContext(None, seq_len=32)
    q = torch.randn(32, 1, 8)
    with pytest.raises(ValueError, match="cu_seqlens was passed together with cp"):
        moba_attention(q, q, q, MoBAConfig(16, 2), cu_seqlens=torch.tensor([0, 32]), cp=cp)
    with pytest.raises(ValueError, match="q has 31 tokens but rank 0 of 1 holds 32 of seq_len=32"):
        moba_attention(q[1:], q[1:], q[1:], MoBAConfig(16, 2), cp=cp)


def test_one_rank_with_a_context_is_one_device():
    case = random_case(7, multiple=2)
    cp = CPContext(None, "zigzag", case.q.shape[0], case.cu_seqlens)
    out = moba_attention(case.q, case.k, case.v, MoBAConfig(case.block_size, case.top_k), cp=cp)
    assert relative_error(out, run_reference(case)[0]) < 1e-12
