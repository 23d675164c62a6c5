"""Equality with one rank, before anything is measured: numbers of wrong results are never published.

The rule is the project's: the selection is one rank's, and outputs and gradients are at most twice as far from float64
as one rank's are. Gradients of full attention may be three times as far: the library's kernels give each rank's part in
the inputs' precision; and so may gradients of MoBA that travel rounded. One rank itself must be as near to float64 as
its precision allows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import CPContext, eager, full_attention, moba_attention
from ...blocks import block_table, local_pages
from ...cp.options import ExchangeOptions
from ...dense import plain
from ...ops import backend
from ..attention_check import BOUND
from .inputs import Shape, make_inputs
from .measure import exchange_options
from .ranks import Ranks

NAMES = ("out", "dq", "dk", "dv")
FULL_METHODS = ("ring", "allgather")


def check(shape: Shape, n_tokens: int, modes: list[str], sizes: Sequence[int], ranks: Ranks) -> str | None:
    """What is wrong on any rank, or None; collective over all ranks, which all get the same answer."""
    everything = torch.arange(n_tokens)
    inputs = make_inputs(shape, n_tokens, everything, ranks.device)
    chosen = _one_rank_selection(shape, *inputs[:2])
    wrong: list[str] = []
    for name, exact, one in (
        ("MoBA", _exact_moba(shape, inputs, chosen), lambda *leaves: moba_attention(*leaves, shape.moba)),
        ("full", _exact_full(inputs), full_attention),
    ):
        results = _run(one, inputs)
        errors = _errors(results, exact)
        for part, error, right in zip(NAMES, errors, exact, strict=True):
            relative = error / right.abs().max().item()
            if not relative < BOUND:
                wrong.append(f"{name} on one rank: {part} is wrong by {relative:.1e}")
        del results
        for size in sizes:
            if 1 < size and ranks.rank < size:
                for mode in modes if name == "MoBA" else FULL_METHODS:
                    problem = _compare(shape, n_tokens, inputs, exact, errors, chosen, name, mode, size, ranks)
                    wrong += [problem] if problem else []
        del exact
    return ranks.problem("; ".join(wrong) or None, ranks.size)


def _compare(shape, n_tokens, inputs, exact, one_rank, chosen, name, mode, size, ranks) -> str | None:
    """What is wrong with ``mode`` on ``size`` ranks; collective over these."""
    seen = []
    options = exchange_options(mode, min(size, ranks.per_node)) if name == "MoBA" else ExchangeOptions()
    rounds = name == "full" or options.gradient_dtype == "input"
    cp = CPContext(
        ranks.group(size), shape.layout, n_tokens, device=ranks.device,
        exchange=options,
        observer=lambda layer, selection, n_kv, block_size: seen.append(selection),
    )  # fmt: skip
    local = [cp.shard(x) for x in inputs]
    if name == "MoBA":
        results = _run(lambda *leaves: moba_attention(*leaves, shape.moba, cp=cp), local)
    else:
        results = _run(lambda *leaves: full_attention(*leaves, cp=cp, method=mode), local)
    errors = _errors(results, [cp.shard(x) for x in exact])
    where = f"{name} by {mode} on {size} ranks: "
    if seen and not torch.equal(seen[0], cp.shard(chosen)):
        return where + "the selection is not one rank's"
    for part, error, allowed in zip(NAMES, errors, one_rank, strict=True):
        if not error <= (3 if rounds and part != "out" else 2) * allowed + 1e-5:
            return where + f"{part} is off by {error:.1e}, one rank by {allowed:.1e}"
    return None


def _run(attention, inputs: list[Tensor]) -> list[Tensor]:
    """[out, dq, dk, dv]."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    out = attention(*leaves)
    out.backward(inputs[3])
    return [out.detach(), *(x.grad for x in leaves)]


def _errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [(a.double() - e).abs().max().item() for a, e in zip(results, exact, strict=True)]


def _one_rank_selection(shape: Shape, q: Tensor, k: Tensor) -> Tensor:
    table = block_table(q.shape[0], shape.moba.block_size, None, q.device)
    means = backend(k).block_means(k, table.start, table.length, table.block_size)
    return backend(q).select_blocks(q, means, table.first, table.own, shape.moba.top_k)


def _exact_moba(shape: Shape, inputs: list[Tensor], chosen: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv] in float64 under the given selection."""
    q, k, v, dout = (x.double() for x in inputs)
    table = block_table(q.shape[0], shape.moba.block_size, None, q.device)
    at = q, local_pages(k, v, table), chosen, table.own, table.offset + 1, shape.dim**-0.5
    out, lse = eager.attend(*at)
    return [out, *eager.attend_backward(*at, dout, lse, eager.row_sums(dout, out))]


def _exact_full(inputs: list[Tensor]) -> list[Tensor]:
    q, k, v, dout = (x.double() for x in inputs)
    scale = q.shape[2] ** -0.5
    out, lse = plain.attention(q, k, v, True, scale)
    return [out, *plain.attention_backward(q, k, v, True, scale, dout, lse, eager.row_sums(dout, out))]
