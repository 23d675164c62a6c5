"""The exchange in all its modes: equal to one rank, bytes as planned, never more than the cheapest way."""

import itertools
import os
import types

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moba_cp import CPContext, MoBAConfig, full_attention, moba_attention, reference
from moba_cp.cp import moba
from moba_cp.cp.allgather.copies import CopyEngines
from moba_cp.cp.allgather.stages import GatherTables
from moba_cp.cp.allgather.strategy import Collectives
from moba_cp.cp.comm import Communicator
from moba_cp.cp.exchange.costs import WireCosts
from moba_cp.cp.exchange.tables import DecisionTables, WireTables, build_decision_tables
from moba_cp.cp.geometry import BlockGeometry
from moba_cp.cp.layout import LAYOUTS
from moba_cp.cp.options import SEQUENCE_MODES, ExchangeOptions, Weighing
from moba_cp.cp.symmetric_memory import PeerMemory
from tests.cp.test_moba import NAMES, across_ranks
from tests.helpers.cases import Case, random_case, relative_error, run_reference
from tests.helpers.distributed import run_ranks, run_threads
from tests.helpers.gathering import GatheringFrom

MOVED = ("kv", "kv_gradients", "rows", "partial_outputs", "rows_backward", "row_gradients")


def _options(size: int, index: int) -> ExchangeOptions:
    """Different stages, keeping and nodes for neighbouring cases; every mode sees all of them."""
    nodes = [None] + [n for n in (2, 3) if size % n == 0] + [size]
    return ExchangeOptions(
        mode=SEQUENCE_MODES[index % len(SEQUENCE_MODES)],
        stages=1 + index // 4 % 3,
        keep=index // 12 % 2 == 1,
        ranks_per_node=nodes[index % len(nodes)],
    )


def _moved(counters: dict) -> int:
    return sum(counters.get(f"sent_{kind}_bytes", 0) for kind in MOVED)


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mode_equals_one_rank(layout, size):
    for index in range(14):
        case = random_case(100 * size + index // 4, multiple=2 * size)
        expected = run_reference(case)
        options = _options(size, index)
        for results, _ in run_threads(size, across_ranks, case, layout, False, options):
            for name, actual, want in zip(NAMES, results, expected, strict=True):
                assert relative_error(actual, want) < 1e-10, f"{index} {options} {name}"


def _on_gloo(rank: int, size: int, layout: str):
    worst = 0.0
    for index, mode in enumerate(SEQUENCE_MODES):
        case = random_case(7 + index, multiple=2 * size)
        options = ExchangeOptions(mode, stages=2, ranks_per_node=2 if index % 2 else None)
        results, _ = across_ranks(dist.group.WORLD, case, layout, False, options)
        errors = [relative_error(a, e) for a, e in zip(results, run_reference(case), strict=True)]
        worst = max(worst, *errors)
    return worst


def _nodes(rank: int):
    found = []
    # Launchers that say how many nodes there are say so of all ranks; here the number changes from case to case.
    os.environ.pop("GROUP_WORLD_SIZE", None)
    for ranks, local in (([0, 1, 2, 3], "2"), ([0, 1, 2, 3], "4"), ([0, 2], "2"), ([0, 1, 2], "2"), ([0, 1, 2, 3], "")):
        group = dist.new_group(ranks)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", local)
            if rank in ranks:
                found.append(CPContext(group, "contiguous", 24).exchange.ranks_per_node)
    return found


def _unequal_nodes(rank: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROUP_WORLD_SIZE", "2")
        patch.setenv("LOCAL_WORLD_SIZE", "4" if rank < 4 else "2")
        return CPContext(dist.group.WORLD, "contiguous", 24).exchange.ranks_per_node


def test_unequal_nodes_count_as_unknown_on_every_rank():
    assert run_ranks(6, _unequal_nodes) == [None] * 6


def test_nodes_follow_from_the_launcher():
    every = run_ranks(4, _nodes)
    assert every[0] == [2, 4, 1, None, None] and every[3] == [2, 4, None]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_mode_on_gloo(layout):
    assert max(run_ranks(4, _on_gloo, 4, layout)) < 1e-10


def _many_on_gloo(rank: int, size: int, n_cases: int):
    """(worst relative error, selections that differ from the reference's) over random cases, layouts and options."""
    worst, different = 0.0, 0
    for index in range(n_cases):
        case, layout = random_case(5000 + 100 * size + index, multiple=2 * size), LAYOUTS[index % 3]
        seen = []
        observer = lambda layer, chosen, *rest: seen.append(chosen)
        group = dist.group.WORLD
        results, _ = across_ranks(group, case, layout, False, _options(size, index), observer=observer)
        expected = reference.select_blocks(case.q, case.k, case.block_size, case.top_k, case.cu_seqlens).int()
        mine = CPContext(group, layout, case.q.shape[0], case.cu_seqlens).shard(expected)
        different += not torch.equal(seen[0], mine)
        errors = [relative_error(a, e) for a, e in zip(results, run_reference(case), strict=True)]
        worst = max(worst, *errors)
    return worst, different


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
def test_two_hundred_cases_on_gloo(size):
    for worst, different in run_ranks(size, _many_on_gloo, size, 36, timeout=900):
        assert different == 0 and worst < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["refetch", "keep"])
def test_bytes_are_as_planned_and_auto_is_cheapest(dtype, keep):
    for seed, size in ((1, 2), (2, 3), (3, 4), (4, 8)):
        case = random_case(seed, multiple=2 * size).to(dtype)
        total = {}
        for mode, layout in itertools.product(SEQUENCE_MODES, ("contiguous", "zigzag")):
            counters = [
                c
                for _, c in run_threads(
                    size, across_ranks, case, layout, False, ExchangeOptions(mode, keep=keep, row_weight=1)
                )
            ]
            moved = sum(map(_moved, counters))
            assert moved == sum(c["planned_bytes"] for c in counters), f"{mode} {layout} P={size}"
            total[mode, layout] = moved
        for layout in ("contiguous", "zigzag"):
            cheapest = min(total[mode, layout] for mode in ("kv", "query", "allgather"))
            assert total["auto", layout] <= 1.02 * cheapest


def test_rows_count_more_within_a_node():
    """The heavier rows are, the fewer of them auto sends, and the more blocks come instead."""
    assert ExchangeOptions(ranks_per_node=8).weighing(16) == Weighing(4, 1, 8, 8)
    assert ExchangeOptions(ranks_per_node=8).weighing(4) == Weighing(4, 1, 4, 4)
    assert ExchangeOptions().weighing(8) == Weighing(4, 1, 1, 1)
    assert ExchangeOptions(row_weight=2).weighing(8) == Weighing(2, 2, 1, 1)
    case = random_case(9, multiple=8)
    sent = []
    for weight in (0.2, 1, 1e5):
        options = GatheringFrom("auto", row_weight=weight, share=1.0)
        counters = [c for _, c in run_threads(4, across_ranks, case, "zigzag", False, options)]
        kinds = [sum(c.get(f"sent_{kind}_bytes", 0) for c in counters) for kind in ("rows", "kv")]
        sent.append(kinds)
    rows, blocks = zip(*sent)
    assert rows[0] > rows[1] > rows[2] == 0 and blocks[0] < blocks[1] < blocks[2]
    # Where there are no rows nobody meets to send none; with the last weight nor to send results back.
    assert not any(kind.startswith(("sent_rows", "sent_partial")) for c in counters for kind in c)


def test_auto_mixes_fetched_blocks_and_sent_rows():
    """A block that all queries of rank 1 choose is fetched; blocks that few of them choose get the rows."""
    g = torch.Generator().manual_seed(0)
    n, block = 1024, 64
    q, k, v, dout = (torch.randn(n, 1, 32, generator=g, dtype=torch.float64) for _ in range(4))
    k[:block] += 4 * q[n // 2 :].mean(0)
    q[n // 2 :] += q[n // 2 :].mean(0) * 40
    case = Case(q, k, v, dout, torch.tensor([0, n], dtype=torch.int32), block, 3)
    moved = {}
    for mode in SEQUENCE_MODES:
        counters = [c for _, c in run_threads(2, across_ranks, case, "contiguous", False, ExchangeOptions(mode))]
        moved[mode] = sum(map(_moved, counters))
        if mode == "auto":
            assert counters[1]["received_kv_bytes"] > 0 and counters[1]["sent_rows_bytes"] > 0
    assert moved["auto"] < 0.9 * min(moved["kv"], moved["query"], moved["allgather"])


def test_auto_gathers_where_everything_is_needed():
    n = 256
    q, k, v, dout = (torch.randn(n, 4, 8, dtype=torch.float64) for _ in range(4))
    case = Case(q, k[:, :1], v[:, :1], dout, torch.tensor([0, n], dtype=torch.int32), 16, 16)
    options = GatheringFrom("auto", share=0.4)
    counters = [c for _, c in run_threads(2, across_ranks, case, "zigzag", False, options)]
    assert all("sent_rows_bytes" not in c for c in counters)
    assert all(c["planned_bytes"] == 2 * (n // 2) * 8 * 8 * 3 for c in counters)


def _between_nodes(comm, case, options, per_node):
    """Bytes of blocks that this rank sent to other nodes in forward and backward."""
    crossed = 0
    plain = comm.all_to_all

    def watched(x, send, receive, kind, where):
        nonlocal crossed
        if kind in ("kv", "kv_gradients"):
            row = x.element_size() * x.shape[1:].numel()
            crossed += row * sum(n for p, n in enumerate(send) if p // per_node != comm.rank // per_node)
        return plain(x, send, receive, kind, where)

    comm.all_to_all = watched
    across_ranks(comm, case, "contiguous", False, options)
    return crossed


def test_a_block_crosses_the_network_once_per_node():
    # Every query of the second node wants every block: without nodes each of its 3 ranks would fetch all of them.
    n, size, per_node = 96 * 2, 6, 3
    q, k, v, dout = (torch.randn(n, 1, 8, dtype=torch.float64) for _ in range(4))
    case = Case(q, k, v, dout, torch.tensor([0, n], dtype=torch.int32), 16, 12)
    once, each = (
        sum(run_threads(size, _between_nodes, case, ExchangeOptions("kv", ranks_per_node=nodes), per_node))
        for nodes in (per_node, None)
    )
    rows = n // 2
    assert each == 3 * rows * 2 * 8 * 8 * 3
    assert once == each // 3


def test_deterministic_from_run_to_run():
    case = random_case(12, multiple=8).to(torch.float32)
    runs = [run_threads(4, across_ranks, case, "zigzag", False, "auto", True) for _ in range(5)]
    for run in runs[1:]:
        for (first, _), (again, _) in zip(runs[0], run, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _twice_backward(comm, case: Case, options: ExchangeOptions):
    cp = CPContext(comm, "zigzag", case.q.shape[0], case.cu_seqlens, exchange=options)
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    out = moba_attention(*leaves, MoBAConfig(case.block_size, case.top_k), cp=cp)
    gradients = []
    for _ in range(2):
        out.backward(cp.shard(case.dout), retain_graph=True)
        gradients.append([x.grad.clone() for x in leaves])
    return gradients, _hangs_on(out.grad_fn.made.way)


@pytest.mark.parametrize("mode", SEQUENCE_MODES)
@pytest.mark.parametrize("keep", [False, True], ids=["refetch", "keep"])
def test_backward_runs_twice_and_lets_go_of_keys_and_values(mode, keep):
    case = random_case(3, multiple=4)
    for (once, twice), held in run_threads(2, _twice_backward, case, ExchangeOptions(mode, keep=keep)):
        assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))
        assert not held


KEPT_WITH_THE_CONTEXT = (
    CPContext, Communicator, BlockGeometry, PeerMemory, WireTables, DecisionTables, GatherTables, moba.OwnedTables,
    Collectives, CopyEngines,
)  # fmt: skip


def _hangs_on(x) -> int:
    """Bytes of the tensors that can be reached from an object, those left out that are kept with its context."""
    if isinstance(x, torch.Tensor):
        return x.untyped_storage().nbytes()
    if isinstance(x, (*KEPT_WITH_THE_CONTEXT, types.ModuleType)):
        return 0
    if isinstance(x, dict):
        return sum(map(_hangs_on, x.values()))
    if isinstance(x, (list, tuple)):
        return sum(map(_hangs_on, x))
    return _hangs_on(vars(x)) if hasattr(x, "__dict__") and not isinstance(x, type) else 0


def _under_a_checkpoint(comm, case: Case, options: ExchangeOptions):
    """Gradients; bytes beside what autograd saves, and those that it saves without a checkpoint."""
    cp = CPContext(comm, "zigzag", case.q.shape[0], case.cu_seqlens, exchange=options)
    config = MoBAConfig(case.block_size, case.top_k)
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        moba_attention(*leaves, config, cp=cp)
    out = checkpoint(lambda *x: moba_attention(*x, config, cp=cp), *leaves, use_reentrant=False)
    beside = _hangs_on(vars(out.grad_fn))
    out.backward(cp.shard(case.dout))
    return [cp.unshard(x.grad) for x in leaves], beside + _hangs_on(vars(out.grad_fn)), sum(saved.values())


@pytest.mark.parametrize("mode", SEQUENCE_MODES)
def test_autograd_sees_all_that_backward_needs(mode):
    """A checkpoint drops what autograd has saved, and only that."""
    case, saved = random_case(3, multiple=4), {}
    expected = run_reference(case)[1:4]
    for keep in (False, True):
        runs = run_threads(2, _under_a_checkpoint, case, ExchangeOptions(mode, keep=keep))
        for gradients, beside, saved[keep] in runs:
            assert all(relative_error(a, e) < 1e-9 for a, e in zip(gradients, expected, strict=True))
            assert beside == 0
    assert saved[True] > saved[False]


def _chosen_anew(comm, case: Case, options: ExchangeOptions, again: bool):
    """Gradients of a checkpointed layer that chooses by the means in the first forward, and by their opposites in
    those after it; without ``again`` always by these."""
    comm.signs = iter([1, -1] if again else [-1, -1])
    cp = CPContext(comm, "zigzag", case.q.shape[0], case.cu_seqlens, exchange=options)
    config = MoBAConfig(case.block_size, case.top_k)
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    out = checkpoint(lambda *x: moba_attention(*x, config, cp=cp), *leaves, use_reentrant=False)
    out.backward(cp.shard(case.dout))
    return [cp.unshard(x.grad) for x in leaves]


@pytest.mark.parametrize("mode", ["kv", "query", "allgather"])
def test_backward_after_another_choice_uses_the_plan_of_that(mode, monkeypatch):
    """What is computed again may choose otherwise; no block that it chose may go without its gradient."""
    real = moba.gather_means
    monkeypatch.setattr(moba, "gather_means", lambda k, *rest: next(rest[3].signs) * real(k, *rest))
    tensors = (torch.randn(256, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    case = Case(*tensors, torch.tensor([0, 256], dtype=torch.int32), 16, 3)
    runs = [run_threads(2, _chosen_anew, case, ExchangeOptions(mode), again) for again in (True, False)]
    for ours, expected in zip(*runs, strict=True):
        assert all(torch.equal(a, e) for a, e in zip(ours, expected, strict=True))
    first = run_reference(case)[1:4]
    assert any(relative_error(a, e) > 1e-3 for a, e in zip(runs[0][0], first, strict=True)), "the choice is the same"


def _hybrid(comm):
    """Counters by layer after forward and backward of a full layer, a MoBA layer and another full layer."""
    cp = CPContext(comm, "zigzag", 128)
    x = torch.randn(64, 2, 8, requires_grad=True)
    y = x
    for layer, kind in enumerate(("full", "moba", "full"), start=1):
        comm.layer = f"layer {layer}"
        y = full_attention(y, y, y, cp=cp) if kind == "full" else moba_attention(y, y, y, MoBAConfig(16, 3), cp=cp)
    y.sum().backward()
    return {layer: counters.summary() for layer, counters in comm.by_layer.items()}


def test_counters_by_layer_keep_layers_apart():
    for layers in run_threads(2, _hybrid):
        assert layers["layer 1"] == layers["layer 3"]
        ring = 3 * 2 * 64 * 2 * 8 * 4
        assert all(counters["dense_ring_bytes"] == ring for counters in layers.values())
        full = {name for name in layers["layer 1"] if name.startswith("sent_full")}
        assert any("gradients" in name for name in full) and not full & layers["layer 2"].keys()


def test_costs():
    # bf16, D = 128, k = 8: K, V twice and float32 gradients; per row q twice, dout, float32 output and dq, and change.
    costs = WireCosts.of(torch.bfloat16, 128, 7, ExchangeOptions())
    assert costs.kv_token == 16 * 128
    assert costs.row == 14 * 128 + 2 * 2 * 7 + 3 * 4
    kept = WireCosts.of(torch.bfloat16, 128, 7, ExchangeOptions(keep=True))
    assert kept.kv_token == 12 * 128 and kept.row == 12 * 128 + 2 * 7 + 3 * 4
    narrow = WireCosts.of(torch.bfloat16, 128, 7, ExchangeOptions(gradient_dtype="input"))
    assert narrow.kv_token == 12 * 128 and narrow.row == 12 * 128 + 2 * 2 * 7 + 3 * 4


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(mode="both"), "exchange mode='both' is not one of auto, kv, query, allgather"),
        (dict(stages=0), "exchange stages=0 is not an integer between 1 and 64"),
        (dict(gradient_dtype="fp8"), "exchange gradient_dtype='fp8' is not one of input, float32"),
        (dict(ranks_per_node=0), "exchange ranks_per_node=0 is not a positive integer"),
        (dict(ranks_per_node=2.0), "exchange ranks_per_node=2.0 is not a positive integer"),
        (dict(row_weight=0), "exchange row_weight=0 is not a number in"),
        (dict(row_weight="much"), "exchange row_weight='much' is not a number in"),
        (dict(copy_engines=1), "exchange copy_engines=1 is not True or False"),
    ],
)
def test_bad_options_are_named(kwargs, says):
    with pytest.raises(ValueError, match=says):
        ExchangeOptions(**kwargs)


def test_prices_are_exact_whatever_the_default_dtype():
    geometry = CPContext(None, "contiguous", 64, device="cpu").geometry(16)
    costs, weighing = WireCosts(kv_token=2048, row=1833), Weighing(4, 1, 1, 1)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        prices = build_decision_tables(geometry, 1, 1, costs, weighing).prices
    finally:
        torch.set_default_dtype(before)
    assert prices.token.tolist() == [2048] and prices.row.tolist() == [4 * 1833]
    assert prices.row.dtype == prices.token.dtype == torch.float64
