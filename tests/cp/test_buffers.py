"""What is said to stand for other ranks' rows is what is asked for."""

import pytest
import torch

from moba_cp import CPContext, ExchangeOptions, MoBAConfig, full_attention, moba_attention
from moba_cp.cp import symmetric_memory
from moba_cp.cp.allgather import stages as gather_stages
from moba_cp.cp.buffers import buffer_bytes
from moba_cp.cp.heads.choice import Layer
from tests.helpers.distributed import run_threads


def _mapped(comm, options: ExchangeOptions, heads: tuple[int, int], full: bool) -> int:
    """Bytes that this rank has given after a forward and a backward pass."""
    cp = CPContext(comm.share_memory(), "zigzag", 512, exchange=options)
    n_heads, n_kv = heads
    q, k, v = (torch.randn(512 // comm.size, n, 16, requires_grad=True) for n in (n_heads, n_kv, n_kv))
    if full:
        full_attention(q, k, v, cp=cp, method="heads").sum().backward()
    else:
        moba_attention(q, k, v, MoBAConfig(16, 3), cp=cp).sum().backward()
    found = {cp.peers} | {cp.team_peers(h) for h in (2, 4) if comm.size % h == 0}
    inner = [made for made in cp._cache.values() if isinstance(made, CPContext)]
    found |= {context.peers for context in inner if context.size > 1}
    return sum(memory.nbytes for memory in found if memory is not None)


@pytest.mark.parametrize("limit", [1 << 30, 4 * 512 * 2 * 16 * 4, 1], ids=["two stages", "four heads", "one head"])
@pytest.mark.parametrize("gradient_dtype", ["float32", "input"])
@pytest.mark.parametrize(
    "mode, head_ranks, size, heads, full",
    [
        ("allgather", None, 4, (8, 8), False),
        ("allgather", None, 2, (8, 2), False),
        ("heads", None, 4, (8, 8), False),
        ("heads", None, 4, (8, 2), False),
        ("heads", None, 2, (8, 4), True),
        ("allgather", 2, 4, (8, 4), False),
    ],
)
def test_buffers_are_those_predicted(mode, head_ranks, size, heads, full, gradient_dtype, limit, monkeypatch):
    monkeypatch.setattr(symmetric_memory, "_ROUND", 1)
    monkeypatch.setattr(gather_stages, "STAGE_BYTES", limit)
    options = ExchangeOptions(mode, head_ranks, gradient_dtype=gradient_dtype)
    layer = Layer(size, 512 // size, heads, 16, torch.float32, None if full else (16, 3))
    predicted = buffer_bytes(layer, options)
    for mapped in run_threads(size, _mapped, options, heads, full):
        # Parts of a slot begin at multiples of 256 bytes.
        assert predicted <= mapped <= predicted + 16 * 256, (predicted, mapped)
