"""Tokens exchanged for heads: equal to one rank, alone and with another way between ranks with the same heads."""

import ctypes
import random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, full_attention, moba_attention, reference
from moba_cp.cp import copying
from moba_cp.cp.allgather import costs as gather_costs
from moba_cp.cp.comm import Communicator
from moba_cp.cp.heads import choice, copies
from moba_cp.cp.heads.choice import Layer, choose_team, head_ranks
from moba_cp.cp.heads.tables import build_head_tables
from moba_cp.cp.layout import LAYOUTS
from moba_cp.cp.options import SEQUENCE_MODES, ExchangeOptions
from moba_cp.passes import AttentionPasses
from moba_cp.train.config import TrainConfig
from moba_cp.train.plan import plan_run
from tests.cp.test_moba import NAMES, across_ranks, divides, fits, in_context
from tests.helpers.cases import Case, random_case, relative_error, run_reference
from tests.helpers.distributed import run_ranks, run_threads

SIZES = [2, 3, 4, 6, 8]
TEAMS = [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)]
"""Ranks, and those of a team, where several have the same heads."""


def _batch(seed: int, size: int, h: int, layout: str) -> Case:
    """A random batch for ``size`` ranks whose query heads divide by ``h``: some KV heads for each rank, one for each,
    one for several, and numbers that do not divide at all."""
    rng = random.Random(seed)
    case = random_case(seed, multiple=2 * size if layout == "zigzag_per_document" else 1)
    n = case.q.shape[0] // (2 * size) * 2 * size
    if n < case.q.shape[0] or n == 0:
        n += 2 * size
        longer = torch.cat([case.cu_seqlens[:-1], torch.tensor([n], dtype=torch.int32)])
        case.cu_seqlens = longer
    heads = h * rng.choice([1, 2, 3, 4])
    n_kv = rng.choice([m for m in range(1, heads + 1) if heads % m == 0])
    g = torch.Generator().manual_seed(seed)
    dim = rng.choice([8, 24])
    q, k, v, dout = (torch.randn(n, m, dim, generator=g, dtype=torch.float64) for m in (heads, n_kv, n_kv, heads))
    if rng.random() < 0.5:
        k[: case.block_size] += 2 * q.mean((0, 1))
    return Case(q, k, v, dout, case.cu_seqlens, case.block_size, case.top_k)


def _options(seed: int, size: int, h: int) -> ExchangeOptions:
    rng = random.Random(seed)
    rest = {
        "keep": rng.random() < 0.5,
        "stages": rng.choice([1, 2, 64]),
        "gradient_dtype": rng.choice(["float32", "input"]),
        "ranks_per_node": rng.choice([None, 1, h, size]),
    }
    return ExchangeOptions("heads", **rest) if h == size else ExchangeOptions(rng.choice(SEQUENCE_MODES), h, **rest)


def _watched(group, case: Case, layout: str, full: bool, options: ExchangeOptions):
    """:func:`across_ranks` and the selection of the whole sequence."""
    seen = []
    observer = None if full else lambda layer, selection, n_kv, block_size: seen.append(selection)
    cp = CPContext(group, layout, case.q.shape[0], case.cu_seqlens, exchange=options, observer=observer)
    results = in_context(cp, case, full, deterministic=case.top_k % 2 == 0)
    return results, cp.unshard(seen[0]) if seen else None


def _watched_copies(comm: Communicator, *args):
    """:func:`_watched` where ranks read one another's memory."""
    return _watched(comm.share_memory(), *args)


def _holds(size: int, h: int, layout: str, seed: int, on_rank=_watched) -> None:
    case, options = _batch(seed, size, h, layout), _options(seed, size, h)
    label = f"P={size} h={h} {layout} seed {seed} {options} q {tuple(case.q.shape)} kv {case.k.shape[1]}"
    assert divides(layout, case.cu_seqlens, size), label
    chosen = reference.select_blocks(case.q, case.k, case.block_size, case.top_k, case.cu_seqlens)
    for full in (False, True):
        expected = run_reference(case, full)
        for results, selection in run_threads(size, on_rank, case, layout, full, options):
            for name, actual, want in zip(NAMES, results, expected, strict=True):
                assert relative_error(actual, want) < 1e-10, f"{label} full={full} {name}"
            assert full or torch.equal(selection, chosen.int()), label


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_equal_one(size, layout):
    _holds(size, size, layout, seed=size)


@pytest.mark.parametrize("size, h", TEAMS)
def test_teams_equal_one_rank(size, h):
    layout = LAYOUTS[(size + h) % len(LAYOUTS)]
    _holds(size, h, layout, 10 * size + h)


@pytest.mark.parametrize("narrowest", [0, 1 << 30], ids=["in place", "packed"])
@pytest.mark.parametrize("size, h", [(2, 2), (4, 4), (6, 3)])
def test_copies_equal_one_rank(size, h, narrowest, monkeypatch):
    """Memory that ranks read starts as NaN."""
    monkeypatch.setattr(copies, "NARROWEST_ROW", narrowest)
    for seed in range(2):
        _holds(size, h, LAYOUTS[(size + seed) % 3], 100 * size + seed, _watched_copies)


def _copy_2d(there, pitch_there, here, pitch, width, n_rows, kind, stream):
    """``cudaMemcpy2DAsync`` of host memory."""
    for i in range(n_rows):
        ctypes.memmove(there + i * pitch_there, here + i * pitch, width)
    return 0


def _second_call(comm: Communicator, case: Case, layout: str, full: bool, options: ExchangeOptions):
    """:func:`_watched_copies`, where the context has served other tensors before."""
    seen = []
    observer = None if full else lambda layer, selection, n_kv, block_size: seen.append(selection)
    cp = CPContext(comm.share_memory(), layout, case.q.shape[0], case.cu_seqlens, exchange=options, observer=observer)
    before = Case(2 * case.q, case.k.flip(0), 3 * case.v, case.dout, case.cu_seqlens, case.block_size, case.top_k)
    in_context(cp, before, full, deterministic=case.top_k % 2 == 0)
    results = in_context(cp, case, full, deterministic=case.top_k % 2 == 0)
    return results, cp.unshard(seen[1]) if seen else None


@pytest.mark.parametrize("narrowest", [0, 1 << 30], ids=["in place", "packed"])
@pytest.mark.parametrize("size, h", [(2, 2), (6, 3)])
def test_copies_that_were_made_ready(size, h, narrowest, monkeypatch):
    """As on GPUs: a call's copies are numbers that an earlier call has left."""
    monkeypatch.setattr(copies, "NARROWEST_ROW", narrowest)
    monkeypatch.setattr(copies, "can_be_ready", lambda tensor: True)
    monkeypatch.setattr(copying, "_copy_2d", lambda: _copy_2d)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    for seed in range(2):
        _holds(size, h, LAYOUTS[(size + seed) % 3], 100 * size + seed, _second_call)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size, h", [*((n, n) for n in SIZES), *TEAMS])
def test_a_hundred_and_fifty_cases(size, h, layout):
    for seed in range(5):
        _holds(size, h, layout, 1000 * size + 100 * h + seed, (_watched, _watched_copies)[seed % 2])


def _on_gloo(rank: int):
    """Worst relative errors, in groups that overlap; ranks go through those that they are in by themselves."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [1, 2])]
    runs = [(dist.group.WORLD, 4), (dist.group.WORLD, 2), *((pair, 2) for pair in pairs if dist.get_rank(pair) >= 0)]
    report = []
    for seed, (group, h) in enumerate(runs):
        size = dist.get_world_size(group)
        seed = seed if size == 4 else 100
        case, options = _batch(seed, size, h, "zigzag"), _options(seed, size, h)
        full = h == 2 and size == 4
        results, _ = across_ranks(group, case, "zigzag", full, options)
        report.append(max(relative_error(a, e) for a, e in zip(results, run_reference(case, full), strict=True)))
    return report


def test_gloo_and_groups_that_overlap():
    reports = run_ranks(4, _on_gloo)
    assert [len(report) for report in reports] == [3, 4, 4, 3]
    assert max(max(report) for report in reports) < 1e-10


def _counted(comm: Communicator, case: Case, full: bool, options: ExchangeOptions):
    return across_ranks(comm, case, "zigzag", full, options)[1]


@pytest.mark.parametrize("keep", [False, True], ids=["refetch", "keep"])
def test_bytes_are_those_of_heads(keep):
    """Float64: 8 bytes of everything; of a token and rank P - 1 of P parts move."""
    case = _case(heads=4, n_kv=2, n=128)
    for seen in run_threads(2, _counted, case, False, ExchangeOptions("heads", keep=keep)):
        # Half of this rank's 64 rows' heads: Q, K, V and out, and the log-sum-exp of each query head.
        q, kv, lse = 64 * 2 * 8 * 8, 64 * 1 * 8 * 8, 64 * 2 * 8
        there = q + 2 * kv
        assert seen["sent_to_heads_bytes"] == there * (1 if keep else 2) + q + 2 * lse
        assert seen["sent_to_tokens_bytes"] == q + lse + q + 2 * kv
        assert seen["received_to_heads_bytes"] == seen["sent_to_heads_bytes"]
        assert seen["dense_ring_bytes"] == 3 * 2 * 64 * 2 * 8 * 8


def test_parts_count_as_the_whole():
    """The way between ranks with the same heads counts for the context's group, and the dense ring once."""
    case = _case(heads=4, n_kv=2, n=128)
    for seen in run_threads(4, _counted, case, False, ExchangeOptions("allgather", head_ranks=2)):
        assert seen["received_kv_bytes"] > 0 and seen["received_to_heads_bytes"] > 0
        assert seen["dense_ring_bytes"] == 3 * 3 * 2 * 32 * 2 * 8 * 8


def _case(heads: int, n_kv: int, n: int) -> Case:
    g = torch.Generator().manual_seed(heads)
    q, k, v, dout = (torch.randn(n, m, 8, generator=g, dtype=torch.float64) for m in (heads, n_kv, n_kv, heads))
    return Case(q, k, v, dout, torch.tensor([0, n], dtype=torch.int32), 16, 3)


def _stages(comm: Communicator, heads: int, n_kv: int, stages: int):
    cp = CPContext(comm, "zigzag", 64, exchange=ExchangeOptions("heads", stages=stages))
    q, k = torch.empty(cp.local_len, heads, 8), torch.empty(cp.local_len, n_kv, 8)
    tables = build_head_tables(cp, comm.size, q, k)
    return tables.unit, tables.kv_heads, [(s.start, s.stop) for s in tables.stages], tables.shares_kv


def test_heads_are_shared_out():
    def shared_out(size, heads, n_kv, stages=2):
        first, *others = run_threads(size, _stages, heads, n_kv, stages)
        assert all(other == first for other in others)
        return first

    assert shared_out(2, 8, 4) == (2, [[0, 1], [2, 3]], [(0, 1), (1, 2)], False)
    assert shared_out(2, 8, 8, 1) == (1, [[0, 1, 2, 3], [4, 5, 6, 7]], [(0, 4)], False)
    # Two ranks for every KV head.
    assert shared_out(4, 8, 2) == (2, [[0], [0], [1], [1]], [(0, 1)], True)
    assert shared_out(4, 4, 1) == (1, [[0]] * 4, [(0, 1)], True)
    # Three KV heads of four query heads each, six of which are a rank's: the second KV head is there on both.
    assert shared_out(2, 12, 3) == (2, [[0, 0, 1], [1, 2, 2]], [(0, 1), (1, 2), (2, 3)], True)


def _says(comm: Communicator, options: ExchangeOptions, heads: int) -> str:
    cp = CPContext(comm, "contiguous", 16 * comm.size, exchange=options)
    x = torch.zeros(16, heads, 8)
    with pytest.raises(ValueError) as raised:
        moba_attention(x, x, x, MoBAConfig(16, 2), cp=cp)
    return str(raised.value)


@pytest.mark.parametrize(
    "options, heads, said",
    [
        (
            ExchangeOptions("heads"),
            6,
            "among 4 ranks, which do not divide the 6 query heads; use exchange head_ranks=2",
        ),
        (ExchangeOptions("heads"), 3, "among 4 ranks, which do not divide the 3 query heads; use exchange mode='auto'"),
        (ExchangeOptions("kv", head_ranks=3), 6, "head_ranks=3 does not divide cp_size=4; use exchange head_ranks=2"),
        (ExchangeOptions("heads", head_ranks=2), 4, "head_ranks=2 leaves other ranks to exchange with, of cp_size=4"),
    ],
    ids=["heads", "no number", "ranks", "mode"],
)
def test_numbers_that_do_not_divide_are_named(options, heads, said):
    for text in run_threads(4, _says, options, heads):
        assert said in text


def test_a_number_of_ranks_is_positive():
    with pytest.raises(ValueError, match="head_ranks=0 is not a positive integer"):
        ExchangeOptions(head_ranks=0)
    cp = CPContext(None, seq_len=32, exchange="heads")
    x = torch.empty(32, 3, 8)
    assert head_ranks(cp, x, x, None).h == 1, "one rank has nobody to exchange with"


def _method(comm: Communicator, case: Case):
    cp = CPContext(comm, "zigzag", case.q.shape[0], case.cu_seqlens)
    x = [cp.shard(x) for x in (case.q, case.k, case.v)]
    out = full_attention(*x, cp=cp, method="heads")
    return cp.unshard(out), cp.counters.summary()["sent_to_heads_bytes"]


def test_full_attention_asks_for_heads_by_itself():
    case = _case(heads=4, n_kv=2, n=64)
    for out, sent in run_threads(2, _method, case):
        assert relative_error(out, run_reference(case, full=True)[0]) < 1e-12 and sent > 0


def _passes(comm: Communicator, case: Case, kind: str, options: ExchangeOptions):
    """Gradients by the two passes; the routing index is dropped between them, and nobody wants any the first time."""
    cp = CPContext(comm, "zigzag", case.q.shape[0], case.cu_seqlens, exchange=options)
    passes = AttentionPasses(kind, MoBAConfig(case.block_size, case.top_k), case.q.shape[2] ** -0.5, cp, "a layer")
    q, k, v, dout = (cp.shard(x) for x in (case.q, case.k, case.v, case.dout))
    evaluated, _ = passes.forward(q, k, v, False)
    out, kept = passes.forward(q, k, v, True)
    assert torch.equal(evaluated, out)
    grads = passes.backward(kept.without_index(), q, k, v, out, dout)
    # Once more: what was kept is still there.
    again = passes.backward(kept, q, k, v, out, dout)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    return [cp.unshard(x) for x in (out, *grads)], cp.comm.by_layer.keys()


@pytest.mark.parametrize("kind", ["moba", "full"])
@pytest.mark.parametrize("options", [ExchangeOptions("heads"), ExchangeOptions("kv", 2, keep=True)], ids=["4", "2"])
def test_the_passes_of_a_layer(options, kind):
    case = _case(heads=4, n_kv=2, n=128)
    expected = run_reference(case, kind == "full")
    for results, layers in run_threads(4, _passes, case, kind, options):
        assert set(layers) == {"a layer"}
        for name, actual, want in zip(NAMES, results, expected, strict=False):
            assert relative_error(actual, want) < 1e-10, name


def _wants(comm: Communicator, case: Case, wanted: dict[int, str]):
    cp = CPContext(comm, "zigzag", case.q.shape[0], exchange="heads")
    leaves = {name: cp.shard(getattr(case, name)) for name in "qkv"}
    for name in wanted.get(comm.rank, ""):
        leaves[name].requires_grad_()
    out = moba_attention(*leaves.values(), MoBAConfig(16, 3), cp=cp)
    if out.requires_grad:
        out.backward(cp.shard(case.dout))
    return out.requires_grad, [
        relative_error(x.grad, cp.shard(want)) if x.requires_grad else 0.0
        for x, want in zip(leaves.values(), run_reference(case)[1:4], strict=True)
    ]


@pytest.mark.parametrize("wanted", [{0: "q"}, {1: "kv", 2: "q"}, {}], ids=str)
def test_ranks_want_different_gradients(wanted):
    for required, errors in run_threads(4, _wants, _case(heads=4, n_kv=2, n=128), wanted):
        assert required == bool(wanted) and max(errors) < 1e-10


def test_strange_strides():
    """Heads first in memory, and gradients of a sum, which have no strides at all."""

    def on_rank(comm):
        case = _case(heads=4, n_kv=2, n=64)
        cp = CPContext(comm, "zigzag", 64, exchange="heads")
        leaves = [
            cp.shard(x).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (case.q, case.k, case.v)
        ]
        moba_attention(*leaves, MoBAConfig(16, 3), cp=cp).sum().backward()
        return [cp.unshard(x.grad) for x in leaves]

    case = _case(heads=4, n_kv=2, n=64)
    case.dout = torch.ones_like(case.dout)
    for results in run_threads(2, on_rank):
        for actual, want in zip(results, run_reference(case)[1:4], strict=True):
            assert relative_error(actual, want) < 1e-10


def test_golden_layouts_fit():
    """The batches of these tests divide in every layout."""
    assert all(fits(layout, _batch(seed, 4, 2, layout), 4) for layout in LAYOUTS for seed in range(20))


def _layer(size: int, n_tokens: int, heads=(16, 16), moba=(512, 8)) -> Layer:
    return Layer(size, n_tokens // size, heads, 128, torch.bfloat16, moba)


def test_auto_predicts_which_way_is_faster():
    """Figures of four GPUs are in test_predictions.py."""
    options = ExchangeOptions()
    long = choose_team(_layer(4, 524288), options)
    assert long.h == 4
    assert long.why.startswith("MoBA of 524288 tokens on 4 ranks: tokens are exchanged for heads, about 46")
    assert long.why.endswith("without")
    assert choose_team(_layer(4, 65536), options).h == 1, "the host issues copies no faster"
    short = choose_team(_layer(4, 8192), options)
    assert short.h == 1 and "heads stay where they are, about" in short.why
    assert choose_team(_layer(4, 524288, (32, 1)), options).h == 1, "K and V of one head are nothing to gather"
    assert choose_team(_layer(4, 524288, (15, 15)), options).h == 1, "nothing divides"
    assert choose_team(_layer(8, 524288, (12, 12)), options).h == 1, "eight ranks, and four of them gained nothing"
    assert choose_team(_layer(16, 1 << 20), ExchangeOptions(ranks_per_node=8)).h == 8, "teams lie within nodes"
    assert choose_team(_layer(2, 131072, moba=None), options).h == 2
    # Two KV heads on each rank: what comes back at the end is half of everything.
    assert choose_team(_layer(2, 1 << 20, (4, 4), (64, 2)), options).h == 1


def _auto(comm: Communicator, case: Case, shared: bool, options: ExchangeOptions):
    cp = CPContext(comm.share_memory() if shared else comm, "zigzag", case.q.shape[0], exchange=options)
    return in_context(cp, case), in_context(cp, case, full=True), cp.counters.summary().get("sent_to_heads_bytes", 0)


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared memory"])
def test_auto_exchanges_heads_where_that_is_faster(shared, monkeypatch, caplog):
    """As if copies and stages took no time, and where ranks read one another's memory."""
    monkeypatch.setattr(gather_costs, "COPY_RATE", 1e20)
    monkeypatch.setattr(choice, "ROWS_RATE", 1e20)
    monkeypatch.setattr(choice, "OWN_RATE", 1e20)
    monkeypatch.setattr(choice, "STAGE_SECONDS", 0.0)
    monkeypatch.setattr(choice, "HOST_SECONDS", 0.0)
    case = _case(heads=4, n_kv=2, n=2048)
    alone = CPContext(None, "zigzag", 2048)
    expected = [in_context(alone, case, full) for full in (False, True)]
    caplog.set_level("INFO", "moba_cp")
    choice._said.clear()
    choice.news()
    for options in (ExchangeOptions(), ExchangeOptions(head_ranks=1)):
        for *both, sent in run_threads(2, _auto, case, shared, options):
            assert (sent > 0) == (shared and options.head_ranks is None)
            for results, wanted in zip(both, expected, strict=True):
                for name, actual, want in zip(NAMES, results, wanted, strict=True):
                    assert relative_error(actual, want) < 1e-9, name
    said = [record.message for record in caplog.records]
    assert len(said) == shared, "once, and of MoBA alone: full layers stay with ring or all-gather"
    assert choice.news() == said and choice.news() == []
    assert all("tokens are exchanged for heads" in line for line in said)


@pytest.mark.parametrize(
    "exchange, said",
    [
        (ExchangeOptions("heads"), "exchange.mode=heads: 8 ranks are to exchange tokens for heads"),
        (ExchangeOptions("kv", 3), "exchange.head_ranks=3: 3 ranks .* use mode auto, and head_ranks one of"),
        (ExchangeOptions("heads", 2), "exchange.head_ranks=2 with mode=heads, which is for all 8 .* or use mode auto"),
    ],
    ids=["heads", "ranks", "both"],
)
def test_a_run_ends_before_it_starts_where_heads_do_not_divide(exchange, said):
    config = TrainConfig(exchange=exchange)
    with pytest.raises(ValueError, match=said):
        plan_run(config, 8)
