"""Inputs that several test files share: the golden files and random packed batches."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moba_cp import MoBAConfig, full_attention, moba_attention, reference

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))


@dataclass
class Case:
    """A packed batch; ``expected`` holds out, dq, dk, dv where they are known."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    cu_seqlens: torch.Tensor
    block_size: int
    top_k: int
    expected: list[torch.Tensor] | None = None

    def to(self, dtype) -> "Case":
        """The same inputs in another dtype; nothing is expected of them."""
        tensors = (x.to(dtype) for x in (self.q, self.k, self.v, self.dout))
        return Case(*tensors, self.cu_seqlens, self.block_size, self.top_k)


def golden(path: Path) -> Case:
    """What MoBA's authors' ``moba_naive`` computed in float32."""
    z = np.load(path)
    inputs = [torch.from_numpy(z[name]) for name in ("q", "k", "v", "dout", "cu_seqlens")]
    expected = [torch.from_numpy(z[name]) for name in ("out", "dq", "dk", "dv")]
    return Case(*inputs, int(z["block_size"]), int(z["top_k"]), expected)


def random_case(seed: int, multiple: int = 1, dtype=torch.float64) -> Case:
    """Random lengths, heads, blocks and documents; each document's length is a multiple of ``multiple``.

    Some batches have a hot block, whose keys most queries like; some have documents of zero length.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(options):
        return options[int(torch.randint(len(options), (1,), generator=g))]

    block_size, top_k = draw([16, 32, 48]), draw([1, 2, 3, 4, 6])
    n_kv, group, dim = draw([1, 2, 3]), draw([1, 2, 4]), draw([8, 32, 40])
    n_docs = draw([1, 1, 2, 3, 5])
    most = max(1, 260 // (multiple * n_docs))
    lengths = [multiple * draw(range(1, most + 1)) for _ in range(n_docs)]
    if draw([0, 0, 1]):
        lengths.insert(draw(range(n_docs + 1)), 0)
    cu_seqlens = torch.tensor([0] + lengths).cumsum(0).int()
    n = int(cu_seqlens[-1])
    q, dout = (torch.randn(n, n_kv * group, dim, generator=g, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(n, n_kv, dim, generator=g, dtype=torch.float64) for _ in range(2))
    if draw([0, 1]):
        k[:block_size] += 2 * q.mean((0, 1))
    return Case(*(x.to(dtype) for x in (q, k, v, dout)), cu_seqlens, block_size, top_k)


def run(attention, case: Case, *args, **kwargs) -> list[torch.Tensor]:
    """[out, dq, dk, dv, lse] of ``attention(q, k, v, *args, return_lse=True, **kwargs)``."""
    leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = attention(*leaves, *args, return_lse=True, **kwargs)
    out.backward(case.dout)
    return [out.detach(), *(x.grad for x in leaves), lse.detach()]


def run_reference(case: Case, full: bool = False, chosen: torch.Tensor | None = None) -> list[torch.Tensor]:
    """[out, dq, dk, dv, lse] of the reference, under the given selection if there is one."""
    if full:
        return run(reference.full_attention, case, cu_seqlens=case.cu_seqlens)
    return run(reference.moba_attention, case, case.block_size, case.top_k, case.cu_seqlens, chosen=chosen)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    worst = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return float("inf") if worst.isnan() else worst.item()


def compile_and_compare(device, kind: str = "moba") -> None:
    """Attention compiled as one graph that serves every length, forward and backward, with documents too."""

    def loss(q, k, v, cu_seqlens=None):
        if kind == "full":
            return full_attention(q, k, v, cu_seqlens=cu_seqlens).square().sum()
        return moba_attention(q, k, v, MoBAConfig(32, 2), cu_seqlens=cu_seqlens).square().sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for lengths in ([50], [70], [40], [20, 50], [30, 17, 5]):
        leaves = [torch.randn(sum(lengths), h, 16, device=device, requires_grad=True) for h in (2, 1, 1)]
        documents = torch.tensor([0, *lengths]).cumsum(0).int().to(device) if len(lengths) > 1 else None
        expected = torch.autograd.grad(loss(*leaves, documents), leaves)
        for actual, plain in zip(torch.autograd.grad(compiled(*leaves, documents), leaves), expected, strict=True):
            torch.testing.assert_close(actual, plain)
    # The first length's own, then one for any length, and the same with documents.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


class Largest(TorchDispatchMode):
    """The largest number of elements that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out
