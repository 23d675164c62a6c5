"""Sampled rows of a measured result against float64: a wrong kernel's speed is never published."""

import torch
from torch import Tensor

from ..blocks import block_table
from ..ops import backend

ROWS = 24
# Of bfloat16 results, over the largest value: what plain PyTorch reaches in bfloat16 is 3e-3 to 8e-3.
BOUND = 2e-2


def check(q, k, v, dout, out, lse, grads, config) -> tuple[dict[str, float], str | None]:
    """Errors of out, lse, dq of sampled rows of a head, and of dk, dv of a block's keys; what is wrong, or None.

    Args:
        q, dout, out: [T, Hq, D]; k, v: [T, Hkv, D]; lse: [T, Hq]; grads: dq, dk, dv.
        config: the :class:`MoBAConfig` they were computed with.
    """
    n_tokens, n_heads, dim = q.shape
    size, group = config.block_size, n_heads // k.shape[1]
    table = block_table(n_tokens, size, None, q.device)
    means = backend(k).block_means(k, table.start, table.length, size)
    chosen = backend(q).select_blocks(q, means, table.first, table.own, config.top_k)
    head, kv = n_heads - 1, k.shape[1] - 1
    problem = _selection_problem(q[:, head], means[:, kv], chosen[:, head], table)
    if problem:
        return {}, problem
    one = [x[:, head].double() for x in (q, dout, out)] + [x[:, kv].double() for x in (k, v)]
    rows = torch.linspace(0, n_tokens - 1, ROWS, device=q.device).long().unique()
    wrong = _row_errors(*one, lse[:, head], grads[0][:, head], chosen[:, head], rows, size, dim**-0.5)
    block = max(0, n_tokens // size // 2 - 1)
    heads = slice(kv * group, (kv + 1) * group)
    group_rows = [x[:, heads] for x in (q, dout, out, lse)]
    key_grads = grads[1][:, kv], grads[2][:, kv]
    wrong |= _block_errors(*group_rows, *one[3:], chosen[:, heads], block, size, *key_grads, dim**-0.5)
    bad = [f"{name} is wrong by {error:.1e}" for name, error in wrong.items() if not error < BOUND]
    return wrong, "; ".join(bad) or None


def _selection_problem(q: Tensor, means: Tensor, chosen: Tensor, table) -> str | None:
    """Whether sampled rows of one head [T, D] chose best, up to the rounding of a score; chosen [T, k - 1]."""
    rows = torch.linspace(0, q.shape[0] - 1, 257, device=q.device).long()
    score = q[rows].double() @ means.double().T
    rounding = 2e-6 * (q[rows].double().abs() @ means.double().abs().T).amax(-1)
    block = torch.arange(means.shape[0], device=q.device)
    candidate = block < table.own[rows, None]
    taken = (chosen[rows][:, :, None] == block).any(1)
    worst = score.masked_fill(~taken, torch.inf).amin(-1)
    best = score.masked_fill(taken | ~candidate, -torch.inf).amax(-1)
    full = taken.sum(-1) == candidate.sum(-1).clamp(max=chosen.shape[1])
    right = full & ~(taken & ~candidate).any(-1) & (worst - best >= -rounding)
    return None if right.all() else f"the selection of token {rows[~right][0].item()} is wrong"


def _row_errors(q, dout, out, k, v, lse, dq, chosen, rows, size: int, scale: float) -> dict[str, float]:
    """One head, float64 [T, D]."""
    worst = dict.fromkeys(("out", "lse", "dq"), 0.0)
    for t in rows.tolist():
        starts = [b * size for b in chosen[t].tolist() if b >= 0]
        keys = [torch.arange(s, s + size, device=q.device) for s in starts]
        keys = torch.cat([*keys, torch.arange(t // size * size, t + 1, device=q.device)])
        score = k[keys] @ q[t] * scale
        prob = score.softmax(0)
        ds = prob * (v[keys] @ dout[t] - dout[t] @ out[t]) * scale
        expected = {"out": prob @ v[keys], "lse": score.logsumexp(0), "dq": ds @ k[keys]}
        for name, actual in (("out", out[t]), ("lse", lse[t]), ("dq", dq[t])):
            error = (actual - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-2)
            worst[name] = max(worst[name], error.item() if error == error else float("inf"))
    return worst


def _block_errors(q, dout, out, lse, k, v, chosen, block, size, dk, dv, scale) -> dict[str, float]:
    """dk and dv of one block from all rows of its head group [T, G, D] that see it; k, v [T, D] float64."""
    keys = torch.arange(block * size, min((block + 1) * size, k.shape[0]), device=q.device)
    expected_dk, expected_dv = torch.zeros_like(k[keys]), torch.zeros_like(k[keys])
    for g in range(q.shape[1]):
        rows = torch.cat([keys, (chosen[:, g] == block).any(-1).nonzero()[:, 0]])
        rows_q, rows_do = q[rows, g].double(), dout[rows, g].double()
        prob = (rows_q @ k[keys].T * scale - lse[rows, g].double()[:, None]).exp()
        prob = prob.masked_fill((rows[:, None] < keys) & (rows[:, None] // size == block), 0)
        delta = (rows_do * out[rows, g].double()).sum(-1, keepdim=True)
        expected_dv += prob.T @ rows_do
        expected_dk += (prob * (rows_do @ v[keys].T - delta) * scale).T @ rows_q
    errors = {}
    for name, actual, expected in (("dk", dk[keys], expected_dk), ("dv", dv[keys], expected_dv)):
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-2)
        errors[name] = error.item() if error == error else float("inf")
    return errors
