"""Ranks that do not make the same calls, or of which only some want gradients."""

import re

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, full_attention, moba_attention
from moba_cp.cp.calls import TAG_BYTES, Call
from moba_cp.cp.comm import ExchangeError
from moba_cp.cp.options import SEQUENCE_MODES, ExchangeOptions
from tests.cp.test_moba import NAMES, in_context
from tests.helpers.cases import Case, relative_error, run_reference
from tests.helpers.distributed import run_ranks, run_threads

CONFIG = MoBAConfig(16, 3)


def _case() -> Case:
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(384, heads, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2, 4))
    return Case(q, k, v, dout, torch.tensor([0, 384], dtype=torch.int32), 16, 3)


def _leaves_out(cp: CPContext, kinds: str, left_out: int | None) -> str:
    """What a rank is told where rank 1 leaves out one of the layers; "" for nothing."""
    case = _case()
    x = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    try:
        for layer, kind in enumerate(kinds, start=1):
            cp.comm.layer = f"layer {layer}"
            if layer == left_out and cp.rank == 1:
                continue
            out = moba_attention(*x, CONFIG, cp=cp) if kind == "m" else full_attention(*x, cp=cp, method="ring")
        out.sum().backward()
    except ExchangeError as error:
        return str(error)
    return ""


def _then_all_is_well(cp: CPContext) -> list[float]:
    cp.comm.layer = "the last layer"
    results = in_context(cp, _case())
    return [relative_error(a, e) for a, e in zip(results, run_reference(_case()), strict=True)]


def _threads(comm, mode: str):
    cp = CPContext(comm, "zigzag", 384, exchange=mode)
    return _leaves_out(cp, "mmm", None), _leaves_out(cp, "mmm", 2), _then_all_is_well(cp)


@pytest.mark.parametrize("mode", SEQUENCE_MODES)
def test_a_call_left_out_is_an_error_on_all_ranks(mode):
    for rank, (before, error, after) in enumerate(run_threads(3, _threads, mode)):
        assert before == ""
        # Six calls before, with backward passes of the last layer alone.
        assert f"rank {rank} of 3: its attention call 6, the forward of layer {3 if rank == 1 else 2}, is" in error
        assert max(after) < 1e-9, dict(zip(NAMES, after, strict=True))


def _without_names(rank):
    """What is said of batches that have a context each and layers without names, of which rank 1 leaves one out."""
    case = _case()
    for left_out in (None, 2, None):
        cp = CPContext(dist.group.WORLD, "zigzag", 384)
        shares = [cp.shard(x) for x in (case.q, case.k, case.v)]
        try:
            for layer in (1, 2):
                if layer != left_out or rank != 1:
                    with torch.no_grad():
                        moba_attention(*shares, CONFIG, cp=cp)
        except ExchangeError as error:
            return str(error)
    return ""


def _on_gloo(rank):
    cp = CPContext(dist.group.WORLD, "zigzag", 384)
    error, after = _leaves_out(cp, "mm", 1), _then_all_is_well(CPContext(dist.group.WORLD, "zigzag", 384))
    return error, after, _without_names(rank)


def test_a_call_left_out_is_an_error_on_gloo():
    for rank, (error, after, unnamed) in enumerate(run_ranks(2, _on_gloo)):
        # The last call of the second batch meets the first of the third.
        assert "the forward of an unnamed layer, is another one" in unnamed
        assert f"rank {rank} of 2: its attention call 1, the forward of layer {1 + rank}, is another one" in error
        assert max(after) < 1e-9


def _some_want(comm, options: ExchangeOptions, shared: bool, wanted: dict[int, str]):
    """Gradients on each rank, by name, of which only some want some."""
    cp = CPContext(comm.share_memory() if shared else comm, "zigzag", 384, exchange=options)
    case = _case()
    leaves = {name: cp.shard(getattr(case, name)) for name in "qkv"}
    for name in wanted.get(comm.rank, ""):
        leaves[name].requires_grad_()
    out = moba_attention(*leaves.values(), CONFIG, cp=cp)
    if out.requires_grad:
        out.backward(cp.shard(case.dout))
    nothing = torch.zeros(())
    return out.requires_grad, [
        relative_error(x.grad, cp.shard(want)) if x.requires_grad else nothing
        for x, want in zip(leaves.values(), run_reference(case)[1:4], strict=True)
    ]


@pytest.mark.parametrize("mode, shared", [*((mode, False) for mode in SEQUENCE_MODES), ("allgather", True)])
@pytest.mark.parametrize("wanted", [{0: "q"}, {1: "kv", 2: "q"}, {}], ids=str)
def test_ranks_want_different_gradients(wanted, mode, shared):
    options = ExchangeOptions(mode, stages=2, keep=True)
    for required, errors in run_threads(3, _some_want, options, shared, wanted):
        assert required == bool(wanted)
        assert max(errors) < 1e-9


def _without_grad_mode(comm):
    cp, case = CPContext(comm, "zigzag", 384), _case()
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    with torch.set_grad_enabled(comm.rank == 0), pytest.raises(ExchangeError) as raised:
        moba_attention(*leaves, CONFIG, cp=cp)
    return str(raised.value)


def test_gradients_that_some_ranks_cannot_give_are_an_error_on_all():
    for rank, error in enumerate(run_threads(2, _without_grad_mode)):
        assert error.startswith(f"rank {rank} of 2: ranks [0] want gradients of the forward of an unnamed layer, but")
        assert "ranks [1] compute it in torch.no_grad" in error


def _contexts_differ(comm, change: dict):
    """The last rank makes another context, or calls another kind of layer, than the others."""
    given = {"layout": "contiguous", "seq_len": 96, "cu_seqlens": [0, 40, 96], "exchange": "kv", "block_size": 16}
    given |= {"top_k": 2, "heads": 4, "kv_heads": 2, "dim": 8, "dtype": torch.float64, "full": False}
    mine = given | (change if comm.rank == comm.size - 1 else {})
    cp = CPContext(comm, mine["layout"], mine["seq_len"], mine["cu_seqlens"], exchange=mine["exchange"])
    q = torch.ones(cp.local_len, mine["heads"], mine["dim"], dtype=mine["dtype"])
    k = q[:, : mine["kv_heads"]]
    try:
        if mine["full"]:
            full_attention(q, k, k, cp=cp)
        else:
            moba_attention(q, k, k, MoBAConfig(mine["block_size"], mine["top_k"]), cp=cp)
    except ExchangeError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seq_len": 192, "cu_seqlens": [0, 40, 192]}, "seq_len is 192 on rank 2 but 96 on rank 0"),
        ({"layout": "zigzag"}, "layout is zigzag on rank 2 but contiguous on rank 0"),
        (
            {"cu_seqlens": [0, 41, 96]},
            r"cu_seqlens is \('\w+', \[0, 41, 96\]\) on rank 2 but \('\w+', \[0, 40, 96\]\) on",
        ),
        (
            {"exchange": "query"},
            r"exchange is ExchangeOptions\(mode='query'.* on rank 2 but ExchangeOptions\(mode='kv'",
        ),
        ({"block_size": 32}, "block_size is 32 on rank 2 but 16 on rank 0"),
        ({"top_k": 3}, "top_k is 3 on rank 2 but 2 on rank 0"),
        ({"heads": 8}, "heads of q is 8 on rank 2 but 4 on rank 0"),
        ({"kv_heads": 4}, "heads of k and v is 4 on rank 2 but 2 on rank 0"),
        ({"dim": 16}, "head_dim is 16 on rank 2 but 8 on rank 0"),
        ({"dtype": torch.float32}, "dtype is torch.float32 on rank 2 but torch.float64 on rank 0"),
        ({"full": True}, "kind is full on rank 2 but moba on rank 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_rank_with_another_context_is_named_on_all(change, said):
    results = run_threads(3, _contexts_differ, change)
    for rank, result in enumerate(results):
        assert re.match(f"rank {rank} of 3: {said}", result), result
    assert run_threads(3, _contexts_differ, {}) == [None] * 3


def _later_documents_differ(comm):
    """Two contexts of one group, the second with other documents on rank 1."""
    x = torch.ones(32, 2, 8, dtype=torch.float64)
    for bounds in ([0, 48, 64], [0, 32 - 16 * comm.rank, 64]):
        try:
            moba_attention(x, x, x, CONFIG, cp=CPContext(comm, "contiguous", 64, bounds, exchange="kv"))
        except ExchangeError as error:
            return str(error)
    return ""


def test_other_documents_in_a_later_context_are_another_call():
    for error in run_threads(2, _later_documents_differ):
        assert "its attention call 2, the forward of an unnamed layer, is another one than that of other ranks" in error


class _Later:
    """Tags on their way to the host: there, but not at once."""

    def __init__(self, tags: torch.Tensor):
        self._tags, self._asked = tags, 0

    def ready(self) -> bool:
        self._asked += 1
        return self._asked > 1

    def get(self) -> torch.Tensor:
        return self._tags


def _replayed(comm) -> tuple[str, str]:
    """What a rank is told by the call after one that a replay gave the tags of another call, and after a real one."""
    said = []
    for checks in (False, True):
        comm.checks_calls = checks
        call = Call(comm, ("shape",), False, False)
        comm.checks_calls = True
        call.arrive(_Later(torch.full((comm.size, TAG_BYTES), 7, dtype=torch.uint8)))
        try:
            Call(comm, ("shape",), False, False)
            said.append("")
        except ExchangeError as error:
            said.append(str(error))
    return tuple(said)


def test_a_replayed_call_is_not_compared_later():
    for replayed, real in run_threads(2, _replayed):
        assert replayed == "" and "is another one than that of other ranks" in real
