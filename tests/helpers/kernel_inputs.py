"""Inputs of the kernel tests, where they run, and outputs that show what was written and what was not."""

import contextlib
import math
from dataclasses import replace

import torch

from moba_cp import eager
from moba_cp.blocks import block_table, local_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 64


class Problem:
    """Random rows, keys and a selection; ``lengths`` are documents."""

    def __init__(self, lengths, heads, dim, block_size, top_k, dtype=torch.float32, seed=0, device=DEVICE):
        g = torch.Generator().manual_seed(seed)
        n, (n_q, n_kv) = sum(lengths), heads
        draw = lambda h: torch.randn(n, h, dim, generator=g).to(device, dtype)
        self.q, self.k, self.v, self.dout = draw(n_q), draw(n_kv), draw(n_kv), draw(n_q)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        self.top_k, self.scale, self.block_size = top_k, dim**-0.5, block_size
        self.table = block_table(n, block_size, self.cu_seqlens, device)
        self.means = eager.block_means(self.k, self.table.start, self.table.length, block_size)
        self.chosen = eager.select_blocks(self.q, self.means, self.table.first, self.table.current_block, top_k)
        self.pages = local_pages(self.k, self.v, self.table)
        self.own, self.visible = self.table.current_block, self.table.offset + 1

    @property
    def visits(self):
        return self.chosen, self.own, self.visible


def exact(p: Problem, pages=None):
    """out, lse, delta and the three gradients by the plain PyTorch path in float64."""
    pages = pages or p.pages
    pages = replace(pages, k=pages.k.double(), v=pages.v.double())
    out, lse = eager.attend(p.q.double(), pages, *p.visits, p.scale)
    delta = eager.row_sums(p.dout.double(), out)
    grads = eager.attend_backward(p.q.double(), pages, *p.visits, p.scale, p.dout.double(), lse, delta)
    return out, lse, delta, grads


def close(actual, expected, rounding=1e-5):
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=1e-5)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, neither contiguous nor at the start of their storage; unit stride in the last dimension."""
    wide = torch.full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 8), math.nan, dtype=x.dtype, device=x.device)
    view = wide[1:, 1:-1, 8:]
    view.copy_(x)
    return view


@contextlib.contextmanager
def poisoned():
    """Every ``torch.empty`` is full of NaN (or a large negative number) and lies between guards, checked at the end."""
    real_empty, buffers = torch.empty, []

    def empty(*size, dtype=torch.float32, device=None):
        size = tuple(size[0]) if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        value = math.nan
        if not dtype.is_floating_point:
            value = 77 if dtype == torch.uint8 else max(-(2**20), torch.iinfo(dtype).min)
        n = math.prod(size)
        buffer = torch.full((n + 2 * GUARD,), value, dtype=dtype, device=device)
        buffer[:GUARD] = buffer[n + GUARD :] = 77
        buffers.append(buffer)
        return buffer[GUARD : n + GUARD].view(size)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = real_empty
    for buffer in buffers:
        assert (buffer[:GUARD] == 77).all() and (buffer[-GUARD:] == 77).all(), "a kernel wrote outside its output"
