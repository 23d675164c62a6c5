"""Full attention across ranks by all-gather: K and V of a few heads of the whole sequence at a time.

The heads after them are on their way while these are computed with. A slice of heads is as large as one shard of K and
V, or ``SLICE_BYTES`` where that is more.

Legend: T tokens, L local tokens, P ranks, Hq query heads, Hkv key/value heads, h KV heads of a slice, D head dim.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ... import dense
from ...dtypes import WIDE
from ..calls import Where
from ..context import CPContext
from .schedule import schedule_of

SLICE_BYTES = 32 << 20


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cp: CPContext, backend: str, deterministic: bool, where: Where
):
    """out [L, Hq, D] in any dtype, lse [L, Hq] wide, of q [L, Hq, D], k, v [L, Hkv, D]; a collective call."""
    ranges = schedule_of(cp).whole
    kernels = dense.choose_backend(q, ranges, backend, deterministic)
    outs, lses = [], []
    for _, q_heads, k_whole, v_whole in _slices(q, k, v, cp, where):
        partials = dense.Partials(q_heads)
        dense.attend(q_heads, k_whole, v_whole, ranges, scale, kernels, partials)
        out, lse = partials.result()
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def backward(q, k, v, dout, out, lse, scale: float, cp: CPContext, backend: str, deterministic: bool, where: Where):
    """dq [L, Hq, D], dk, dv [L, Hkv, D] in any dtype; dout, out like q, lse [L, Hq] wide; a collective call."""
    ranges, order = schedule_of(cp).whole, cp.gathered_positions
    kernels = dense.choose_backend(q, ranges, backend, deterministic)
    counts = [cp.local_len] * cp.size
    dqs, returns = [], []
    for heads, q_heads, k_whole, v_whole in _slices(q, k, v, cp, where):
        dout_heads, out_heads, lse_heads = (x[:, heads].contiguous() for x in (dout, out, lse))
        dq, dk, dv = dense.Sum(q_heads), dense.Sum(k_whole), dense.Sum(v_whole)
        dense.attend_backward(
            q_heads,
            k_whole,
            v_whole,
            ranges,
            scale,
            kernels,
            dout_heads,
            out_heads,
            lse_heads,
            dq,
            dk,
            dv,
            deterministic,
        )
        dqs.append(dq.narrow())
        shape = k_whole.shape[0], 2, *k_whole.shape[1:]
        grads = k.new_empty(shape, dtype=WIDE[k.dtype])
        dk.write_to(grads[:, 0])
        dv.write_to(grads[:, 1])
        returns.append(cp.comm.all_to_all(grads[order], counts, counts, "full_kv_gradients", where))
        if len(returns) > 1:
            returns[-2] = _summed(returns[-2](), cp.size)
    returns[-1] = _summed(returns[-1](), cp.size)
    dk, dv = torch.cat(returns, 2).unbind(1)
    return torch.cat(dqs, 1), dk, dv


def _slices(
    q: Tensor, k: Tensor, v: Tensor, cp: CPContext, where: Where
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(query heads, q of these [L, h * G, D], K, V of these [T, h, D] in global order) per slice; a collective call."""
    n_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    step = max(1, n_kv // cp.size, min(n_kv, SLICE_BYTES * n_kv // (2 * k.nbytes * cp.size)))
    row_of = torch.empty_like(cp.gathered_positions)
    row_of[cp.gathered_positions] = torch.arange(row_of.numel(), device=k.device)

    def start(lo: int) -> Callable[[], Tensor]:
        heads = slice(lo, lo + step)
        return cp.comm.all_gather_async(torch.stack([k[:, heads], v[:, heads]], 1), "full_kv", where)

    wait = start(0)
    for lo in range(0, n_kv, step):
        gathered = wait().flatten(0, 1)
        if lo + step < n_kv:
            wait = start(lo + step)
        heads = slice(lo * group, (lo + step) * group)
        yield heads, q[:, heads].contiguous(), gathered[:, 0][row_of], gathered[:, 1][row_of]


def _summed(arrived: Tensor, size: int) -> Tensor:
    """Sum over ranks, in rank order: [P * L, ...] -> [L, ...]."""
    parts = arrived.chunk(size)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
