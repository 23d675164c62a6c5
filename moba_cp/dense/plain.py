"""Attention of a rectangle of rows and keys in plain PyTorch: any device, any floating dtype, float64 included.

Rows are taken in slices, so that memory grows with the number of keys, not with its square.

Legend: N query rows, R key rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim.
Wide means float32, or float64 for float64 inputs.
"""

import torch
from torch import Tensor

from ..dtypes import WIDE
from ..eager.attention import finite_lse
from ..eager.select import SCRATCH_ELEMENTS

ROWS = 256


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of all rows to all keys, or of each row to one key more than the row before, the last to all.

    Args:
        q: [N, Hq, D].
        k, v: [R, Hkv, D]; R >= N >= 1 if ``causal``.
        scale: factor of the scores.

    Returns:
        out [N, Hq, D] and lse [N, Hq], both wide.
    """
    wide, n_kv = WIDE[q.dtype], k.shape[1]
    out = torch.empty(q.shape, dtype=wide, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=wide, device=q.device)
    for rows, n_keys in _slices(q, k.shape[0], causal):
        kt, vt = (x[:n_keys].to(wide).transpose(0, 1) for x in (k, v))
        score = _scores(_grouped(q[rows], n_kv, wide), kt, rows.stop - rows.start, causal, scale)
        row_lse = score.logsumexp(-1)
        n = rows.stop - rows.start
        out[rows] = _ungrouped(torch.matmul((score - finite_lse(row_lse)[..., None]).exp(), vt), n)
        lse[rows] = _ungrouped(row_lse[..., None], n)[..., 0]
    return out, lse


def attention_backward(q, k, v, causal, scale, dout, lse, delta) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention` as a part of an attention over more keys: dq [N, Hq, D], dk, dv [R, Hkv, D], wide.

    Args:
        dout: [N, Hq, D], gradient of the final output.
        lse: [N, Hq], log-sum-exp over all keys of the row, here and elsewhere.
        delta: [N, Hq], row sums of ``dout * out`` of the final output.
    """
    wide, n_kv = WIDE[q.dtype], k.shape[1]
    dq = torch.empty(q.shape, dtype=wide, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (k, v))
    for rows, n_keys in _slices(q, k.shape[0], causal):
        n = rows.stop - rows.start
        kt, vt = (x[:n_keys].to(wide).transpose(0, 1) for x in (k, v))
        q_rows, do_rows = (_grouped(x[rows], n_kv, wide) for x in (q, dout))
        row_lse, row_delta = (_grouped(x[rows][..., None], n_kv, wide) for x in (lse, delta))
        prob = (_scores(q_rows, kt, n, causal, scale) - finite_lse(row_lse)).exp()
        dscore = prob * (torch.matmul(do_rows, vt.transpose(1, 2)) - row_delta) * scale
        dq[rows] = _ungrouped(torch.matmul(dscore, kt), n)
        dk[:n_keys] += torch.matmul(dscore.transpose(1, 2), q_rows).transpose(0, 1)
        dv[:n_keys] += torch.matmul(prob.transpose(1, 2), do_rows).transpose(0, 1)
    return dq, dk, dv


def _slices(q: Tensor, n_keys: int, causal: bool):
    """Slices of rows, each with the number of keys that its last row sees."""
    n_rows, n_heads, _ = q.shape
    step = max(1, min(ROWS, SCRATCH_ELEMENTS // (n_heads * n_keys)))
    for lo in range(0, n_rows, step):
        hi = min(lo + step, n_rows)
        yield slice(lo, hi), n_keys - (n_rows - hi) if causal else n_keys


def _grouped(x: Tensor, n_kv: int, wide: torch.dtype) -> Tensor:
    """[c, Hq, D] -> [Hkv, c * G, D]."""
    c, n_heads, dim = x.shape
    return x.to(wide).reshape(c, n_kv, n_heads // n_kv, dim).transpose(0, 1).reshape(n_kv, -1, dim)


def _ungrouped(x: Tensor, n_rows: int) -> Tensor:
    """[Hkv, c * G, D] -> [c, Hq, D]."""
    return x.view(x.shape[0], n_rows, -1, x.shape[-1]).transpose(0, 1).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, n_rows: int, causal: bool, scale: float) -> Tensor:
    """Masked, scaled scores [Hkv, c * G, keys] of grouped rows q [Hkv, c * G, D] and keys k [Hkv, keys, D]."""
    score = torch.matmul(q, k.transpose(1, 2)) * scale
    if not causal:
        return score
    n_keys = k.shape[1]
    last = torch.arange(n_keys - n_rows, n_keys, device=q.device).repeat_interleave(q.shape[1] // n_rows)
    return score.masked_fill(torch.arange(n_keys, device=q.device) > last[:, None], -torch.inf)
