"""Where a context's tensors are on a GPU, and what many contexts leave there."""

import gc
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moba_cp import CPContext, MoBAConfig, moba_attention
from tests.helpers.distributed import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("backend", [None, "nccl", "cpu:gloo,cuda:nccl", "gloo"])
def test_tables_are_on_the_gpu_where_the_group_serves_it(backend):
    device = "cpu" if backend == "gloo" else "cuda"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]
        if device == "cuda":
            groups.append(init_device_mesh("cuda", (1, 1), mesh_dim_names=("data", "cp"))["cp"])
        for group in groups:
            cp = CPContext(group, "zigzag", 128)
            assert cp.device.type == cp.positions.device.type == device
            q = torch.randn(128, 2, 32, device=device, requires_grad=True)
            moba_attention(*(cp.shard(x) for x in (q, q, q)), MoBAConfig(16, 3), cp=cp).sum().backward()
            assert q.grad.isfinite().all()
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="cp's tables are on cpu; pass CPContext"):
        moba_attention(
            *[torch.randn(128, 2, 32, device="cuda")] * 3, MoBAConfig(16, 3), cp=CPContext(None, seq_len=128)
        )


def _watching() -> int:
    return sum(thread.name == "moba_cp collectives" for thread in threading.enumerate())


def _many_contexts(rank):
    """Threads that watch, and bytes of memory, after some and after many contexts; threads without the group."""
    group, found = dist.new_group([0, 1]), []
    for number in range(200):
        cp = CPContext(group, "zigzag", 2048, exchange="kv")
        q = torch.randn(1024, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        moba_attention(q, q, q, MoBAConfig(64, 4), cp=cp).sum().backward()
        if number in (9, 199):
            torch.cuda.synchronize()
            found.append((_watching(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    dist.barrier()
    dist.destroy_process_group(group)
    del group, cp, q
    gc.collect()
    return found, _watching()


def test_many_contexts_on_gpus_share_a_thread_and_memory():
    for (some, many), after in run_ranks(2, _many_contexts, backend="nccl", timeout=300):
        assert some[0] == many[0] == 1, "a thread for each context"
        # A stream of its own for each would take 2 MiB or more on each of the 32 that PyTorch hands out.
        assert many[1] - some[1] < 2**20 and many[2] - some[2] < 2**25, f"bytes grew from {some[1:]} to {many[1:]}"
        assert after == 0
