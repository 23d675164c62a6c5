"""Is a result right? Nothing is timed before it was held against float64.

On one device sampled rows must be as near to float64 as 16 bit allow. Across ranks a result may be at most twice as far
from float64 as one device's, gradients that were rounded on their way three times.

Legend: T tokens, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, B block size, n blocks, k top-k. A
result is [out, dq, dk, dv].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import MoBAConfig, eager
from ..blocks import block_table, local_pages
from ..dense import plain
from ..ops import backend

NAMES = ("out", "dq", "dk", "dv")
ROWS = 24
BOUND = 2e-2
"""Of 16 bit results, relative to the largest value of a row or block: plain PyTorch reaches 3e-3 to 8e-3."""


def select(q: Tensor, k: Tensor, config: MoBAConfig) -> Tensor:
    """[T, Hq, k - 1] int32, the blocks that one device selects for one document: q [T, Hq, D], k [T, Hkv, D]; [T, Hkv,
    k - 1] where the heads of a group share them."""
    table, gate = block_table(q.shape[0], config.block_size, None, q.device), config.gate
    rows, how = (table.first, table.current_block), (gate.shared_by_group, gate.min_recent, gate.sink)
    if gate.score == "max":
        return backend(q).select_by_keys(q, k, table.start, *rows, config.block_size, config.top_k, *how)
    means = backend(k).block_means(k, table.start, table.length, config.block_size)
    return backend(q).select_blocks(q, means, *rows, config.top_k, *how)


def exact_moba(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, selection: Tensor, config: MoBAConfig) -> list[Tensor]:
    """[out, dq, dk, dv, lse] in float64 under a selection [T, Hq or Hkv, k - 1]; q, dout [T, Hq, D], k, v [T, Hkv,
    D]."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    table = block_table(q.shape[0], config.block_size, None, q.device)
    arguments = q, local_pages(k, v, table), selection, table.current_block, table.offset + 1, q.shape[2] ** -0.5
    out, lse = eager.attend(*arguments)
    return [out, *eager.attend_backward(*arguments, dout, lse, eager.row_sums(dout, out)), lse]


def exact_full(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv] of full causal attention in float64; q, dout [T, Hq, D], k, v [T, Hkv, D]."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    scale = q.shape[2] ** -0.5
    out, lse = plain.attention(q, k, v, True, scale)
    return [out, *plain.attention_backward(q, k, v, True, scale, dout, lse, eager.row_sums(dout, out))]


def judge_moba(inputs: Sequence[Tensor], results: Sequence[Tensor], lse: Tensor, config: MoBAConfig):
    """Judge MoBA of one document on one device by its last KV head, whatever the length.

    Args:
        inputs: q [T, Hq, D], k, v [T, Hkv, D], dout [T, Hq, D].
        results: out, dq [T, Hq, D], dk, dv [T, Hkv, D].
        lse: [T, Hq].

    Returns:
        The relative errors by name, and what is wrong or None.
    """
    q, k, v, dout = inputs
    group, table = q.shape[1] // k.shape[1], block_table(q.shape[0], config.block_size, None, q.device)
    together = 1 if config.shared_by_group == "none" else group
    selection = select(q, k, config)[:, -group // together :]
    means = backend(k).block_means(k, table.start, table.length, config.block_size)[:, -1]
    problem = selection_problem(q[:, -together:], means, selection[:, -1], table, config.shared_by_group == "max")
    if problem:
        return {}, problem
    exact = exact_moba(q[:, -group:], k[:, -1:], v[:, -1:], dout[:, -group:], selection, config)
    out, dq, dk, dv = results
    ours = [out[:, -group:], dq[:, -group:], dk[:, -1:], dv[:, -1:], lse[:, -group:]]
    errors = relative_errors(ours, exact, config.block_size)
    bad = [f"{name} is wrong by {error:.1e}" for name, error in errors.items() if not error < BOUND]
    return errors, "; ".join(bad) or None


def selection_problem(q: Tensor, means: Tensor, selection: Tensor, table, by_maximum: bool = False) -> str | None:
    """Whether sampled rows took the blocks of highest score, up to the rounding of a score.

    Args:
        q: [T, M, D], heads that select together.
        means: [n, D], mean keys of the blocks.
        selection: [T, k - 1].
        by_maximum: a block's score is the maximum over the heads, else their sum.
    """
    rows = torch.linspace(0, q.shape[0] - 1, 257, dtype=torch.float64, device=q.device).long()
    score = q[rows].double() @ means.double().T
    score = score.amax(1) if by_maximum else score.sum(1)
    rounding = 2e-6 * (q[rows].double().abs() @ means.double().abs().T).sum(1).amax(-1)
    block = torch.arange(means.shape[0], device=q.device)
    candidate = block < table.current_block[rows, None]
    taken = (selection[rows][:, :, None] == block).any(1)
    worst = score.masked_fill(~taken, torch.inf).amin(-1)
    best = score.masked_fill(taken | ~candidate, -torch.inf).amax(-1)
    complete = taken.sum(-1) == candidate.sum(-1).clamp(max=selection.shape[1])
    right = complete & ~(taken & ~candidate).any(-1) & (worst - best >= -rounding)
    return None if right.all() else f"the selection of token {rows[~right][0].item()} is wrong"


def relative_errors(results: Sequence[Tensor], exact: Sequence[Tensor], block_size: int) -> dict[str, float]:
    """Errors of out and dq (and lse, if it is there) of sampled rows, relative to the largest value of each row, and of
    dk and dv of a block in the middle, relative to its largest value. NaN counts as infinite."""
    n_tokens = exact[0].shape[0]
    rows = torch.linspace(0, n_tokens - 1, ROWS, dtype=torch.float64, device=exact[0].device).long()
    middle = max(0, n_tokens // block_size // 2 - 1) * block_size
    errors = {}
    for name, ours, right in zip((*NAMES, "lse"), results, exact, strict=False):
        by_block = name in ("dk", "dv")
        here = slice(middle, middle + block_size) if by_block else rows
        off, size = (ours[here].double() - right[here]).abs(), right[here].abs()
        dims = (0, 2) if by_block else (-1,)
        error = (off.amax(dims) / size.amax(dims).clamp(min=1e-2)).amax().item()
        errors[name] = error if error == error else float("inf")
    return errors


def distances(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Largest absolute error of each tensor."""
    return [(ours.double() - right).abs().max().item() for ours, right in zip(results, exact, strict=True)]


def allowance(name: str, one_device: float, rounded: bool) -> float:
    """How far from float64 a result across ranks may be where one device's is ``one_device`` away; of :data:`NAMES`.

    ``rounded`` says that gradients were rounded before they were summed.
    """
    return (3 if rounded and name != "out" else 2) * one_device + 1e-5


def too_far(
    results: Sequence[Tensor], exact: Sequence[Tensor], one_device: Sequence[float], rounded: bool
) -> str | None:
    """What is further from float64 than one device's result, whose :func:`distances` are given, allows; or None.

    ``rounded`` says that gradients were rounded before they were summed.
    """
    for name, error, allowed in zip(NAMES, distances(results, exact), one_device, strict=True):
        if not error <= allowance(name, allowed, rounded):
            return f"{name} is off by {error:.1e}, one rank by {allowed:.1e}"
    return None
