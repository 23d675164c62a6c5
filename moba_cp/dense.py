"""Causal attention of rows to a contiguous range of keys each: what full-attention layers compute locally.

Rows are taken in slices, so that memory grows with the number of keys, not with its square.

Legend: N query rows, R key rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim.
Wide means float32, or float64 for float64 inputs.
"""

import torch
from torch import Tensor

from .eager import SCRATCH_ELEMENTS, wide_dtype

ROWS = 256


def _slices(first: Tensor, last: Tensor, n_heads: int):
    """(rows, keys) slices: each slice of rows with the smallest range of keys that covers what they see."""
    first, last = first.tolist(), last.tolist()
    lo = 0
    while lo < len(first):
        begin, end, hi = first[lo], last[lo] + 1, lo + 1
        while hi < len(first) and hi - lo < ROWS:
            wider = min(begin, first[hi]), max(end, last[hi] + 1)
            # Stop where the next row looks somewhere else (a new document or chunk), or where scratch would overflow.
            jump = abs(last[hi] - last[hi - 1]) > ROWS or first[hi] != first[hi - 1]
            if jump or (hi + 1 - lo) * n_heads * (wider[1] - wider[0]) > SCRATCH_ELEMENTS:
                break
            (begin, end), hi = wider, hi + 1
        yield slice(lo, hi), slice(begin, end)
        lo = hi


def _grouped(x: Tensor, n_kv: int, wide: torch.dtype) -> Tensor:
    """[c, Hq, D] -> [Hkv, c * G, D]."""
    c, n_heads, dim = x.shape
    return x.to(wide).view(c, n_kv, n_heads // n_kv, dim).transpose(0, 1).reshape(n_kv, -1, dim)


def _ungrouped(x: Tensor, n_rows: int) -> Tensor:
    """[Hkv, c * G, D] -> [c, Hq, D]."""
    return x.view(x.shape[0], n_rows, -1, x.shape[-1]).transpose(0, 1).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, first: Tensor, last: Tensor, begin: int, scale: float) -> Tensor:
    """Masked, scaled scores [Hkv, c * G, keys] of grouped rows q [Hkv, c * G, D] and keys k [Hkv, keys, D]."""
    score = torch.matmul(q, k.transpose(1, 2)) * scale
    key = torch.arange(begin, begin + k.shape[1], device=q.device)
    seen = (key >= first[:, None]) & (key <= last[:, None])
    return score.masked_fill(~seen.repeat_interleave(q.shape[1] // first.numel(), 0), -torch.inf)


def range_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float):
    """Attention of each row ``t`` to the keys ``first[t] .. last[t]``.

    Args:
        q: [N, Hq, D].
        k, v: [R, Hkv, D].
        first, last: [N] int64, inclusive; every row sees at least one key.
        scale: factor of the scores.

    Returns:
        out [N, Hq, D] and lse [N, Hq], both wide.
    """
    wide, n_kv = wide_dtype(q.dtype), k.shape[1]
    out = torch.empty(q.shape, dtype=wide, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=wide, device=q.device)
    for rows, keys in _slices(first, last, q.shape[1]):
        kt, vt = (x[keys].to(wide).transpose(0, 1) for x in (k, v))
        score = _scores(_grouped(q[rows], n_kv, wide), kt, first[rows], last[rows], keys.start, scale)
        row_lse = score.logsumexp(-1)
        n = rows.stop - rows.start
        out[rows] = _ungrouped(torch.matmul((score - row_lse[..., None]).exp(), vt), n)
        lse[rows] = _ungrouped(row_lse[..., None], n)[..., 0]
    return out, lse


def range_attention_backward(q, k, v, first, last, scale, dout, lse, delta):
    """Gradients of :func:`range_attention`: dq [N, Hq, D], dk, dv [R, Hkv, D], all wide.

    Args:
        dout: [N, Hq, D]; lse, delta: [N, Hq], delta being the row sums of ``dout * out``.
    """
    wide, n_kv = wide_dtype(q.dtype), k.shape[1]
    dq = torch.empty(q.shape, dtype=wide, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (k, v))
    for rows, keys in _slices(first, last, q.shape[1]):
        kt, vt = (x[keys].to(wide).transpose(0, 1) for x in (k, v))
        q_rows, do_rows = (_grouped(x[rows], n_kv, wide) for x in (q, dout))
        row_lse, row_delta = (_grouped(x[rows][..., None], n_kv, wide) for x in (lse, delta))
        prob = (_scores(q_rows, kt, first[rows], last[rows], keys.start, scale) - row_lse).exp()
        dscore = prob * (torch.matmul(do_rows, vt.transpose(1, 2)) - row_delta) * scale
        dq[rows] = _ungrouped(torch.matmul(dscore, kt), rows.stop - rows.start)
        dk[keys] += torch.matmul(dscore.transpose(1, 2), q_rows).transpose(0, 1)
        dv[keys] += torch.matmul(prob.transpose(1, 2), do_rows).transpose(0, 1)
    return dq, dk, dv
