"""Work on the streams of a GPU is ordered, and memory that several of them use is not given out again too soon."""

import pytest
import torch

from moba_cp import CPContext, MoBAConfig, full_attention, moba_attention
from moba_cp.cp.options import ExchangeOptions
from tests.helpers import streams
from tests.helpers.cases import random_case
from tests.helpers.distributed import run_threads
from tests.helpers.streams import rank_of, watched


def _passes(communicator, case, layout, options, full, calls):
    """The races of some calls of a layer, each in a context of its own as in training."""
    comm, mine = rank_of(communicator)
    with mine:
        for _ in range(calls):
            cp = CPContext(comm, layout, case.q.shape[0], case.cu_seqlens, exchange=options)
            leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
            if full:
                out = full_attention(*leaves, cp=cp, method=full)
            else:
                out = moba_attention(*leaves, MoBAConfig(case.block_size, case.top_k, True), cp=cp)
            (out * cp.shard(case.dout)).sum().backward()
            del leaves, out, cp
    return mine.races, mine.shared


KV = ExchangeOptions("kv")
EXCHANGES = {
    "kv": KV,
    "kv, four stages": ExchangeOptions("kv", stages=4),
    "kv, kept": ExchangeOptions("kv", keep=True),
    "query": ExchangeOptions("query"),
    "auto": ExchangeOptions("auto", row_weight=0.05),
    "all-gather": ExchangeOptions("allgather", copy_engines=False),
    "kv, nodes": ExchangeOptions("kv", ranks_per_node=2),
    "auto, nodes": ExchangeOptions("auto", ranks_per_node=2),
    "heads": ExchangeOptions("heads", copy_engines=False),
    "heads around auto": ExchangeOptions("auto", head_ranks=2, copy_engines=False),
}
# 8 query heads and 2 KV heads, two documents, blocks that straddle.
CASE = random_case(7, 8, torch.float32)


def _races(layout, options, full=None):
    with watched():
        found = run_threads(4, _passes, CASE, layout, options, full, 2)
    assert all(shared for _, shared in found), "no memory was used by several streams"
    return sorted({race for races, _ in found for race in races})


@pytest.mark.parametrize("name", EXCHANGES)
def test_moba(name):
    """Two calls in contexts of their own: the second may be given what the first gives back."""
    layout = "zigzag" if list(EXCHANGES).index(name) % 2 else "contiguous"
    assert _races(layout, EXCHANGES[name]) == []


@pytest.mark.parametrize("method", ["ring", "allgather", "heads"])
def test_full(method):
    assert _races("zigzag", ExchangeOptions(copy_engines=False), method) == []


def test_memory_given_back_too_soon_is_found(monkeypatch):
    monkeypatch.setattr(streams, "_record_stream", lambda *tensors: None)
    assert any("given out again" in after for _, after in _races("zigzag", ExchangeOptions("kv", stages=4)))


def test_work_that_does_not_wait_is_found(monkeypatch):
    monkeypatch.setattr(streams._Work, "wait", lambda work: None)
    assert any(before.startswith("kv all-to-all") for before, _ in _races("zigzag", KV))
