"""Which layouts and batches full attention across ranks serves, ours and PyTorch's ``context_parallel``: by trying.

    torchrun --nproc-per-node 2 -m moba_cp.cli bench peer

Each way runs forward and backward on all ranks; its output and gradients are held against float64 on one rank. It is
right if it errs at most twice (gradients: three times) as much as the same maths in the same dtype on one rank. Ranks
may share a GPU.

Legend: T tokens, P ranks, L = T / P local tokens, H heads, D head dim.
"""

import argparse
import os
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import CPContext, full_attention
from .environment import environment

T, HEADS, DIM = 1024, 4, 64
ONE = (0, T)
EVEN = (0, 256, 640, T)
"""Documents whose lengths are multiples of 2 * P for P up to 64."""
UNEVEN = (0, 301, 302, T)
NAMES, FACTORS = ("out", "dq", "dk", "dv"), (2, 3, 3, 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``moba-cp bench peer``: none."""


def main(args: argparse.Namespace) -> int:
    """Try every way and print a table; 1 if a way of ours is not right."""
    if not torch.cuda.is_available():
        raise SystemExit("bench peer needs a CUDA device: PyTorch's context_parallel serves no CPU kernels")
    if "RANK" not in os.environ:
        raise ValueError("bench peer runs on several ranks: start it by torchrun --nproc-per-node 2 -m moba_cp.cli")
    device = _start()
    rows = [(name, batch, verdict(way, bounds, device)) for name, batch, bounds, way in our_ways() + peer_ways()]
    if dist.get_rank() == 0:
        env = environment()
        print(f"{env['gpu']}, torch {env['torch']}, commit {env['commit']}; {dist.get_world_size()} ranks")
        for name, batch, said in rows:
            print(f"{name:48}{batch:34}{said}", flush=True)
    return int(any(name.startswith("moba_cp") and said != "right" for name, _, said in rows))


def _start() -> torch.device:
    rank, here, n_here = (int(os.environ[x]) for x in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    n_gpus = torch.cuda.device_count()
    if n_here > n_gpus:
        # NCCL refuses two ranks on one GPU unless they look like two hosts.
        os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    torch.cuda.set_device(here % n_gpus)
    dist.init_process_group("nccl", timeout=timedelta(seconds=90))
    return torch.device("cuda", here % n_gpus)


def our_ways() -> list[tuple[str, str, tuple[int, ...], Callable]]:
    """(name, batch, document boundaries, way) of ours; a way takes q, k, v, dout [T, H, D] and the boundaries.

    It gives out, dq, dk, dv [T, H, D], the same on every rank.
    """
    return [
        ("moba_cp, zigzag", "one document", ONE, _ours("zigzag")),
        ("moba_cp, contiguous", "one document", ONE, _ours("contiguous")),
        ("moba_cp, zigzag", "packed documents", UNEVEN, _ours("zigzag")),
        ("moba_cp, contiguous", "packed documents", UNEVEN, _ours("contiguous")),
        ("moba_cp, zigzag per document", "packed, lengths divide by 2 P", EVEN, _ours("zigzag_per_document")),
    ]


def peer_ways() -> list[tuple[str, str, tuple[int, ...], Callable]]:
    """The same of PyTorch's."""
    from torch.distributed.device_mesh import init_device_mesh

    peer = _Peer(init_device_mesh("cuda", (dist.get_world_size(),)))
    return [
        ("context_parallel", "one document", ONE, peer.causal),
        ("context_parallel, load balancing off", "one document", ONE, peer.contiguous),
        ("context_parallel, a mask", "packed documents", UNEVEN, peer.masked),
        ("context_parallel, document by document", "packed documents", UNEVEN, peer.by_document),
        ("context_parallel, document by document", "packed, lengths divide by 2 P", EVEN, peer.by_document),
        ("FlexAttention, private _ContextParallel", "packed documents", UNEVEN, peer.flex),
    ]


def verdict(way: Callable, bounds: tuple[int, ...], device: torch.device) -> str:
    """``right``, ``wrong: ...`` with the largest errors, or the exception's text; every rank computes the same."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = [torch.randn(T, HEADS, DIM, generator=generator).to(device, dtype) for _ in range(4)]
    exact = _one_rank([x.double() for x in tensors], bounds)
    plain = _one_rank(tensors, bounds)
    try:
        results = way(*tensors, bounds)
    except Exception as error:  # what it says is what the table is for
        # A bare assert says nothing but its own line.
        text = (str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line or "").splitlines()[0]
        return f"{type(error).__name__}: {text}"
    for name, ours, low, want, factor in zip(NAMES, results, plain, exact, FACTORS):
        error, allowed = ((x.double() - want).abs().max().item() for x in (ours, low))
        if not error <= factor * allowed + 1e-5:
            return f"wrong: {name} is off by {error:.1e}, on one rank by {allowed:.1e}"
    return "right"


def _one_rank(tensors: list[Tensor], bounds: tuple[int, ...]) -> list[Tensor]:
    """out, dq, dk, dv [T, H, D] with every product in the dtype of q, k, v, dout [T, H, D]."""
    q, k, v = (x.transpose(0, 1).detach().requires_grad_() for x in tensors[:3])
    score = (q @ k.transpose(1, 2) * DIM**-0.5).masked_fill(~_mask(bounds, q.device), -torch.inf)
    out = score.softmax(-1) @ v
    out.backward(tensors[3].transpose(0, 1))
    return [x.detach().transpose(0, 1) for x in (out, q.grad, k.grad, v.grad)]


def _mask(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """[T, T], true where a row sees a key."""
    document = _documents(bounds, device)
    return (document[:, None] == document).tril()


def _documents(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """[T], the document of every token."""
    lengths = torch.tensor(bounds, device=device).diff()
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths)


def _ours(layout: str) -> Callable:
    def way(q, k, v, dout, bounds):
        cp = CPContext(dist.group.WORLD, layout, T, cu_seqlens=torch.tensor(bounds), device=q.device)
        leaves = [cp.shard(x).requires_grad_() for x in (q, k, v)]
        out = full_attention(*leaves, cp=cp, method="ring")
        out.backward(cp.shard(dout))
        return [cp.unshard(x) for x in (out.detach(), *(x.grad for x in leaves))]

    return way


class _Peer:
    """PyTorch's context_parallel over ``mesh``, by its public function, and with FlexAttention by a private class."""

    def __init__(self, mesh):
        self._mesh = mesh

    def causal(self, q, k, v, dout, bounds):
        return self._sdpa((q, k, v, dout), is_causal=True)

    def contiguous(self, q, k, v, dout, bounds):
        return self._sdpa((q, k, v, dout), balanced=False, is_causal=True)

    def masked(self, q, k, v, dout, bounds):
        rows = _mask(bounds, q.device).chunk(self._mesh.size())[self._mesh.get_local_rank()]
        return self._sdpa((q, k, v, dout), balanced=False, attn_mask=rows[None, None].contiguous())

    def by_document(self, q, k, v, dout, bounds):
        parts = [
            self._sdpa([x[first:last] for x in (q, k, v, dout)], is_causal=True)
            for first, last in zip(bounds, bounds[1:])
        ]
        return [torch.cat(x) for x in zip(*parts)]

    def _sdpa(self, tensors, balanced: bool = True, **options) -> list[Tensor]:
        """out, dq, dk, dv of a sequence under context_parallel and scaled_dot_product_attention."""
        from torch.distributed.tensor.experimental import _attention, context_parallel
        from torch.distributed.tensor.experimental._attention import context_parallel_unshard

        buffers = [x.transpose(0, 1)[None].clone() for x in tensors]
        plain, before = F.scaled_dot_product_attention, _attention._cp_options.enable_load_balance
        _attention._cp_options.enable_load_balance = balanced
        try:
            with context_parallel(
                self._mesh, buffers=buffers, buffer_seq_dims=[2] * 4, no_restore_buffers=set(buffers)
            ):
                leaves = [x.detach().requires_grad_() for x in buffers[:3]]
                out = F.scaled_dot_product_attention(*leaves, **options)
                out.backward(buffers[3])
            results = [out.detach(), *(x.grad for x in leaves)]
            whole = context_parallel_unshard(self._mesh, results, [2] * 4)
        finally:
            # It leaves its own in place where what runs inside fails.
            F.scaled_dot_product_attention = plain
            _attention._cp_options.enable_load_balance = before
        return [x[0].transpose(0, 1) for x in whole]

    def flex(self, q, k, v, dout, bounds):
        from torch.distributed.tensor.experimental._attention import (
            _context_parallel_shard,
            _ContextParallel,
            _HeadTailLoadBalancer,
            context_parallel_unshard,
        )
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        class Attention(nn.Module):
            def forward(self, q, k, v, block_mask):
                return flex_attention(q, k, v, block_mask=block_mask)

        document = _documents(bounds, q.device)

        def seen(b, h, row, key):
            return (document[row] == document[key]) & (key <= row)

        attention, kind = Attention(), _ContextParallel.AttentionType.FLEX
        _ContextParallel(seq_dim=2, attention_type=kind)._apply(attention, self._mesh)
        balancer = _HeadTailLoadBalancer(T, self._mesh.size(), q.device)
        whole = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v, dout)]
        whole.append(create_block_mask(seen, 1, 1, T, T, device=q.device.type))
        *local, block_mask = _context_parallel_shard(self._mesh, whole, [2] * 5, balancer)
        leaves = [x.detach().requires_grad_() for x in local[:3]]
        out = attention(*leaves, block_mask)
        out.backward(local[3])
        results = [out.detach(), *(x.grad for x in leaves)]
        return [x[0].transpose(0, 1) for x in context_parallel_unshard(self._mesh, results, [2] * 4, balancer)]
