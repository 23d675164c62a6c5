"""All K and V to every rank, by collectives and by copies between memories that ranks read of one another."""

import collections
import threading
import types
import warnings

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, full_attention, moba_attention
from moba_cp.cp import moba
from moba_cp.cp import symmetric_memory as peer
from moba_cp.cp.allgather import copies
from moba_cp.cp.allgather import costs as gather_costs
from moba_cp.cp.allgather import stages as gather_stages
from moba_cp.cp.allgather.strategy import AllGather
from moba_cp.cp.layout import LAYOUTS
from moba_cp.cp.options import ExchangeOptions
from tests.cp.test_moba import NAMES, across_ranks, fits, in_context
from tests.helpers import distributed
from tests.helpers.cases import Case, random_case, relative_error, run, run_reference
from tests.helpers.distributed import run_ranks, run_threads
from tests.helpers.gathering import GatheringFrom

OPTIONS = [
    ExchangeOptions("allgather"),
    ExchangeOptions("allgather", stages=3, keep=True),
    ExchangeOptions("allgather", stages=64),
    GatheringFrom("auto", gradient_dtype="input"),
]


def _run(comm, shared: bool, case: Case, layout: str, options: ExchangeOptions, deterministic=False):
    comm = comm.share_memory() if shared else comm
    results, counters = across_ranks(comm, case, layout, False, options, deterministic)
    return results, counters, comm.memory


@pytest.mark.parametrize("shared", [False, True], ids=["collectives", "copies"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_equals_one_rank(size, layout, shared):
    seen = 0
    for seed in range(4):
        case = random_case(500 * size + seed, multiple=2 * size)
        if not fits(layout, case, size):
            continue
        expected, options = run_reference(case), OPTIONS[seed]
        for results, counters, peers in run_threads(size, _run, shared, case, layout, options):
            seen += 1
            for name, actual, want in zip(NAMES, results, expected, strict=True):
                assert relative_error(actual, want) < 1e-9, f"seed {seed} {options} {name}"
            arrived = [counters.get(f"received_{kind}_bytes", 0) for kind in ("kv", "kv_gradients")]
            assert sum(arrived) == counters["planned_bytes"]
            assert peers is None or peers.barriers > 0 and peers.nbytes > 0
    assert seen >= 2 * size


def _aligned(n_kv: int = 4) -> Case:
    """One document of 32 blocks; nothing straddles on 2 and 4 ranks."""
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(512, 4, 16, generator=g, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(512, n_kv, 16, generator=g, dtype=torch.float64) for _ in range(2))
    return Case(q, k, v, dout, torch.tensor([0, 512], dtype=torch.int32), 16, 3)


def test_copies_bring_only_what_queries_can_see():
    """Zigzag on two ranks: rank 0 sees all of rank 1, and rank 1 the first half of rank 0."""
    options = ExchangeOptions("allgather")
    first, second = (c for _, c, _ in run_threads(2, _run, True, _aligned(), "zigzag", options))
    half = 128 * 4 * 2 * 16 * 8
    assert first["received_kv_bytes"] == second["sent_kv_bytes"] == 2 * 2 * half
    assert second["received_kv_bytes"] == first["sent_kv_bytes"] == 2 * half
    assert first["received_kv_gradients_bytes"] == second["sent_kv_gradients_bytes"] == half
    assert second["received_kv_gradients_bytes"] == 2 * half
    everything = [c for _, c, _ in run_threads(2, _run, False, _aligned(), "zigzag", options)]
    assert all(c["received_kv_bytes"] == 4 * half for c in everything)


def test_one_copy_from_each_rank(monkeypatch):
    """Zigzag on four ranks: rank r sees both parts of higher ranks' slabs, which adjoin, and the first of lower ones'.
    Shares of gradients return likewise."""
    copied = collections.Counter()

    def count(targets, sources, copy=copies._copy):
        copied[tuple(sorted(len(x) for x in sources))] += 1
        copy(targets, sources)

    monkeypatch.setattr(copies, "_copy", count)
    run_threads(4, _run, True, _aligned(n_kv=2), "zigzag", ExchangeOptions("allgather", stages=2))
    # Two stages: K and V in forward and backward, and gradients.
    assert copied == {(64,) * lower + (128,) * (3 - lower): 2 * 3 for lower in range(4)}


@pytest.mark.parametrize("keep", [False, True], ids=["refetch", "keep"])
def test_heads_travel_in_stages_of_limited_size(keep, monkeypatch):
    head, expected = 512 * 2 * 16 * 8, run_reference(_aligned())
    monkeypatch.setattr(gather_stages, "HOST_SECONDS", 0.0)
    for limit, stages in ((1 << 30, 2), (4 * head, 2), (3 * head, 3), (2 * head, 3), (2 * head - 1, 4), (1, 4)):
        monkeypatch.setattr(gather_stages, "STAGE_BYTES", limit)
        results = run_threads(4, _run, True, _aligned(), "zigzag", ExchangeOptions("allgather", keep=keep))
        # In backward the ranks meet twice in each stage, also where nothing but gradients travels.
        assert all(peers.barriers == 3 * stages for *_, peers in results), limit
        for actual, *_ in results:
            assert all(relative_error(a, want) < 1e-9 for a, want in zip(actual, expected, strict=True)), limit


@pytest.mark.parametrize(
    "n_kv, stages, limit, expected",
    [
        (16, 2, 100, [8, 8]),  # short: as many as asked for
        (16, 2, 15, [4, 8, 4]),
        (16, 2, 2, [1, 2, 2, 2, 2, 2, 2, 2, 1]),
        (16, 2, 1, [1] * 16),
        (16, 2, 0.5, [1] * 16),  # a head is not cut
        (16, 1, 100, [16]),
        (16, 1, 16, [16]),
        (16, 1, 7, [3, 5, 5, 3]),
        (8, 64, 100, [1] * 8),
        (5, 2, 3, [1, 1, 2, 1]),
        (8, 5, 100, [1] * 8),
        (12, 5, 100, [2] * 6),
        (3, 2, 2, [1, 1, 1]),
        (1, 2, 1, [1]),
        (1, 2, 100, [1]),
    ],
)
def test_heads_of_stages(n_kv, stages, limit, expected, monkeypatch):
    """``limit`` in heads."""
    monkeypatch.setattr(gather_stages, "STAGE_BYTES", int(1000 * limit))
    cuts = gather_stages.heads_of_stages(n_kv, stages, 1000)
    assert [cut.stop - cut.start for cut in cuts] == expected
    assert cuts[0].start == 0 and cuts[-1].stop == n_kv
    assert all(a.stop == b.start for a, b in zip(cuts[:-1], cuts[1:]))


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (1.0, [1, 2, 2, 2, 2, 2, 2, 2, 1]),  # the device is busy for longer than the host
        (14e-3, [4] * 4),  # twice the bytes at the most, and no short stages that the host is late for
        (26e-3, [2] * 8),
        (1e-9, [4] * 4),
    ],
)
def test_short_stages_are_joined_until_the_host_keeps_up(seconds, expected, monkeypatch):
    monkeypatch.setattr(gather_stages, "STAGE_BYTES", 2000)
    cuts = gather_stages.heads_of_stages(16, 2, 1000, seconds)
    assert [cut.stop - cut.start for cut in cuts] == expected


@pytest.mark.parametrize("shared", [False, True], ids=["collectives", "copies"])
def test_deterministic_from_run_to_run(shared):
    case = _aligned().to(torch.float32)
    runs = [run_threads(4, _run, shared, case, "zigzag", ExchangeOptions("allgather"), True) for _ in range(3)]
    for other in runs[1:]:
        for (first, *_), (again, *_) in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


_here = threading.local()
"""What a rank of :func:`_two_sequences` has."""


def _two_sequences(comm):
    """A short sequence, a longer one, the short one again: buffers grow, and slots go on in turn."""
    _here.memory = comm.share_memory().memory
    cp = CPContext(comm, "zigzag", 512, exchange=ExchangeOptions("allgather"))
    results, sizes = [], []
    for case in (_aligned(1), _aligned(4), _aligned(1)):
        config = MoBAConfig(case.block_size, case.top_k)
        leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
        out = moba_attention(*leaves, config, cp=cp)
        with torch.no_grad():
            assert torch.equal(moba_attention(*leaves, config, cp=cp), out)
        out.backward(cp.shard(case.dout))
        results.append([cp.unshard(x) for x in (out, *(x.grad for x in leaves))])
        sizes.append(comm.memory.nbytes)
    return results, sizes


def test_sequences_of_different_sizes_share_the_memory(monkeypatch):
    def from_present_buffers(targets, sources, copy=copies._copy):
        present = {x.untyped_storage().data_ptr() for parts in _here.memory._buffers.values() for x in parts}
        assert all(x.untyped_storage().data_ptr() in present for x in sources)
        copy(targets, sources)

    monkeypatch.setattr(copies, "_copy", from_present_buffers)
    monkeypatch.setattr(peer, "_ROUND", 1)
    expected = [run_reference(_aligned(n_kv))[:4] for n_kv in (1, 4, 1)]
    for results, (short, longer, again) in run_threads(2, _two_sequences):
        assert short < longer == again
        for actual, want in zip(results, expected, strict=True):
            assert all(relative_error(a, e) < 1e-9 for a, e in zip(actual, want, strict=True))


def _layers_of_one_sequence(comm, shapes):
    """Results of layers that differ in head dim and dtype, and have one context."""
    cp = CPContext(comm.share_memory(), "zigzag", 512, exchange=ExchangeOptions("allgather", stages=1))
    return [in_context(cp, _layer(*one)) for one in shapes]


def _layer(dim: int, dtype: torch.dtype) -> Case:
    g = torch.Generator().manual_seed(dim)
    inputs = (torch.randn(512, 5, dim, generator=g).to(dtype) for _ in range(4))
    return Case(*inputs, torch.tensor([0, 512], dtype=torch.int32), 16, 3)


def test_layers_that_are_cut_otherwise_have_tables_of_their_own(monkeypatch):
    """As many stages of other heads."""
    monkeypatch.setattr(gather_stages, "STAGE_BYTES", 4 * 16 * 512 * 2 * 8)
    monkeypatch.setattr(gather_stages, "HOST_SECONDS", 0.0)
    shapes = [(16, torch.float64), (20, torch.float64), (16, torch.float32), (16, torch.float64)]
    cuts = [gather_stages.heads_of_stages(5, 1, 512 * 2 * dim * dtype.itemsize) for dim, dtype in shapes]
    assert len(cuts[0]) == len(cuts[1]) and cuts[0] != cuts[1]
    expected = [run_reference(_layer(*one).to(torch.float64)) for one in shapes]
    for results in run_threads(2, _layers_of_one_sequence, shapes):
        for actual, want, (_, dtype) in zip(results, expected, shapes, strict=True):
            most = 1e-9 if dtype == torch.float64 else 1e-4
            assert all(relative_error(a, e) < most for a, e in zip(actual, want, strict=True))


@pytest.mark.parametrize("gradient_dtype", ["float32", "input"])
@pytest.mark.parametrize("shared", [False, True], ids=["collectives", "copies"])
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_travel_in_their_dtype(size, shared, gradient_dtype, monkeypatch):
    monkeypatch.setattr(peer, "_ROUND", 1)
    case = _aligned().to(torch.bfloat16)
    # One rank's, of the same choice: rounded means make another one than exact means.
    expected = run(moba_attention, case, MoBAConfig(case.block_size, case.top_k))
    options = ExchangeOptions("allgather", stages=4, gradient_dtype=gradient_dtype)
    for results, counters, peers in run_threads(size, _run, shared, case, "zigzag", options):
        arrived = {kind: counters[f"received_{kind}_bytes"] for kind in ("kv", "kv_gradients")}
        assert sum(arrived.values()) == counters["planned_bytes"]
        for name, actual, want in zip(NAMES, results, expected, strict=True):
            assert relative_error(actual, want) < 0.02, name
        if shared:
            # Stages of one head: three slots of K and V, and two of gradients.
            head = 512 * 2 * 16 * 2
            slots = 3 * head + 2 * head * (2 if gradient_dtype == "float32" else 1)
            assert slots <= peers.nbytes <= 9 / 8 * slots


def _evaluates(comm):
    """Memory after a pass without gradients of inputs that could have some, and after one with."""
    comm.share_memory()
    sizes, case = [], _aligned()
    cp = CPContext(comm, "zigzag", 512, exchange=ExchangeOptions("allgather"))
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            moba_attention(*leaves, MoBAConfig(case.block_size, case.top_k), cp=cp)
        sizes.append(comm.memory.nbytes)
    return sizes


def test_evaluation_makes_no_room_for_gradients():
    for without, with_gradients in run_threads(2, _evaluates):
        assert without < with_gradients


def _asks_for_too_much(comm, case: Case):
    """What two passes raise where no rank has memory."""
    cp = CPContext(comm.share_memory(), "zigzag", 512, exchange=ExchangeOptions("allgather"))
    leaves = [cp.shard(x) for x in (case.q, case.k, case.v)]
    errors = []
    for _ in range(2):
        with pytest.raises(peer.MissingMemory) as raised:
            moba_attention(*leaves, MoBAConfig(case.block_size, case.top_k), cp=cp)
        errors.append(str(raised.value))
    return errors


def test_missing_memory_is_said_again(monkeypatch):
    def none(self, name, nbytes):
        raise peer.MissingMemory("rank 1: out of memory")

    monkeypatch.setattr(distributed.ThreadPeerMemory, "_allocate", none)
    assert run_threads(2, _asks_for_too_much, _aligned()) == [["rank 1: out of memory"] * 2] * 2


def _tries_again(comm, case: Case, fails_in: str):
    """What a pass raises that fails in the middle on all ranks, and the results of one after it."""
    comm.share_memory()
    options = ExchangeOptions("allgather", stages=4)
    failing = [fails_in != "observer"]

    def observer(*args):
        if fails_in == "observer" and not failing[0]:
            failing[0] = True
            raise MemoryError("full")

    cp = CPContext(comm, "zigzag", 512, exchange=options, observer=observer)
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError) as raised:
        name = {"forward": "attend", "backward": "attend_backward"}.get(fails_in)
        real, calls = getattr(AllGather, name or "attend"), []

        def second_fails(*args, **how):
            calls.append(0)
            if name and len(calls) == 2:
                raise MemoryError("full")
            return real(*args, **how)

        # Ranks that are threads share the class.
        way = AllGather if name is None else type("Failing", (AllGather,), {name: second_fails})
        patch.setattr(comm, "way", way, raising=False)
        moba_attention(*leaves, MoBAConfig(case.block_size, case.top_k), cp=cp).sum().backward()
    return str(raised.value), in_context(cp, case)


def _of_this_rank(transport, ops, call):
    return getattr(call.comm, "way", AllGather)(transport, ops, call)


@pytest.mark.parametrize("fails_in", ["forward", "backward", "observer"])
def test_a_pass_after_one_that_failed_alike_on_all_ranks_is_right(fails_in, monkeypatch):
    monkeypatch.setattr(moba, "AllGather", _of_this_rank)
    case = _aligned()
    expected = run_reference(case)
    for error, results in run_threads(2, _tries_again, case, fails_in):
        assert error == "full"
        for name, actual, want in zip(NAMES, results, expected, strict=True):
            assert relative_error(actual, want) < 1e-9, name


def _fails_elsewhere(comm):
    """What a rank is told when the ranks' passes failed at different places."""
    memory = comm.share_memory().memory
    memory.open_pass("layer 1")
    for _ in range(comm.rank):
        memory.next_stage()
    with pytest.raises(RuntimeError) as raised:
        memory.open_pass("layer 2")
    return str(raised.value)


def test_a_pass_that_failed_at_different_places_cannot_be_mended():
    says = "layer 2: an earlier pass failed after different (stages, barriers) of the ranks, [(0, 0), (1, 0)]; "
    assert run_threads(2, _fails_elsewhere) == [says + "all ranks have to start again"] * 2


def _after_validation(comm, case: Case, options: ExchangeOptions, shared: bool):
    """Results of a training step after inference mode made everything that is kept by then."""
    comm = comm.share_memory() if shared else comm
    # All buffers that training needs.
    in_context(CPContext(comm, "zigzag", 512, exchange=options), case)
    cp = CPContext(comm, "zigzag", 512, exchange=options)
    with torch.inference_mode():
        shares = [cp.shard(x) for x in (case.q, case.k, case.v)]
        for attend in (moba_attention, full_attention):
            config = (MoBAConfig(case.block_size, case.top_k),) if attend is moba_attention else ()
            out = attend(*shares, *config, cp=cp)
            out += 1
            assert cp.unshard(out).shape == case.q.shape
    full = in_context(cp, case, full=True)
    return in_context(cp, case), full


@pytest.mark.parametrize("shared", [False, True], ids=["collectives", "copies"])
@pytest.mark.parametrize("mode", ["allgather", "auto", "kv", "query"])
def test_training_after_validation_in_inference_mode(mode, shared):
    case = _aligned()
    expected = run_reference(case), run_reference(case, full=True)
    for results in run_threads(2, _after_validation, case, ExchangeOptions(mode), shared):
        for ours, wanted in zip(results, expected, strict=True):
            for name, actual, want in zip(NAMES, ours, wanted, strict=True):
                assert relative_error(actual, want) < 1e-9, name


def _ways(comm, options: ExchangeOptions, shared: bool):
    cp = CPContext(comm.share_memory() if shared else comm, "zigzag", 512, exchange=options)
    case = _aligned()
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    out = moba_attention(*leaves, MoBAConfig(case.block_size, case.top_k), cp=cp)
    way = out.grad_fn.made.way
    return isinstance(way, AllGather), isinstance(way, AllGather) and isinstance(way.transport, copies.CopyEngines)


@pytest.mark.parametrize(
    "options, rate, expected",
    [
        (ExchangeOptions(), 3e11, (False, False)),
        (ExchangeOptions(), 1e20, (True, True)),
        (ExchangeOptions(ranks_per_node=4), 1e20, (True, True)),
        (ExchangeOptions(ranks_per_node=2, head_ranks=1), 1e20, (False, False)),
        (ExchangeOptions(copy_engines=False), 1e20, (False, False)),
        (ExchangeOptions(mode="kv"), 1e20, (False, False)),
        (ExchangeOptions(mode="allgather", ranks_per_node=2), 3e11, (True, False)),
        (GatheringFrom(), 3e11, (True, True)),
    ],
)
def test_auto_gathers_where_copies_hide(options, rate, expected, monkeypatch):
    """A sequence so short that copies take longer than attention, unless they are very fast."""
    monkeypatch.setattr(gather_costs, "COPY_RATE", rate)
    assert run_threads(4, _ways, options, True) == [expected] * 4


def test_auto_plans_where_nobody_reads_anothers_memory(monkeypatch):
    monkeypatch.setattr(gather_costs, "COPY_RATE", 1e20)
    assert run_threads(2, _ways, ExchangeOptions(), False) == [(False, False)] * 2


@pytest.mark.parametrize(
    "dim, block_size, top_k, measured",
    [(128, 128, 8, 9.41e-3), (128, 512, 8, 12.55e-3), (64, 128, 8, 6.08e-3), (128, 4096, 12, 73.9e-3)],
)
def test_the_estimate_of_a_forward_pass(dim, block_size, top_k, measured):
    """That of one H100, 131,072 tokens and 16 heads, within a few tens of percent."""
    assert 0.7 < gather_costs.forward_seconds(131072 * 16, dim, block_size, top_k) / measured < 1.4


def test_one_rank_has_no_peer_memory():
    assert CPContext(None, "contiguous", 1024).peers is None


@pytest.mark.parametrize(
    "backends, expected",
    [("cuda:nccl", "mapped"), ("cpu:gloo,cuda:nccl", "mapped"), ("cpu:gloo,cuda:gloo", None)],
)
def test_groups_that_also_serve_the_cpu_have_peer_memory(backends, expected, monkeypatch):
    """The trainer's are such; a group's backend then has no single name."""

    class Group:
        pass

    monkeypatch.setattr(peer.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(peer.dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(peer, "_mapped", lambda group: "mapped")
    assert peer.peer_memory(types.SimpleNamespace(group=Group(), memory=None)) == expected


class _Unequal:
    """Memory that rank 0 has and rank 1 cannot even ask for."""

    def __init__(self, group, token):
        if dist.get_rank(group) == 1:
            raise ImportError("no such module")
        peer._agree("", group, "2 MiB for copies")


def _looks_for_memory(rank, memories):
    group = dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(torch.cuda, "current_device", lambda: rank)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=device))
        patch.setattr(peer, "SymmetricMemory", memories)
        found = peer._mapped(group)
    return found is None, [str(warning.message) for warning in said]


def test_a_rank_without_memory_is_named_once_and_nobody_waits_for_it():
    (first, said), other = run_ranks(2, _looks_for_memory, _Unequal)
    assert first and other == (True, [])
    assert len(said) == 1 and said[0].count("rank 1: no such module (") == 1 and said[0].count("rank") == 1
