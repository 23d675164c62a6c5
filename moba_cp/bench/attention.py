"""``moba-cp bench attention``: MoBA on one GPU beside dense attention, on the same tensors in the same run.

Every shape is first checked against float64 on sampled rows; a shape that fails is not timed. Times include everything:
block means, selection, index, attention, merge.

Legend: T tokens, Hq query heads, Hkv key/value heads, D head dim, B block size, k top-k.
"""

import argparse
import statistics
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import MoBAConfig, dense, full_attention, moba_attention
from .chart import Curve, Panel, draw
from .environment import described, environment
from .judge import judge_moba, select
from .peers import PEERS, Inputs
from .rows import Report, Row, Table, find, number
from .shape import CHART_SHAPE, SHAPES
from .timing import Candidate, time_passes

PART, MOBA = "attention", "moba"
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
CHART_TOKENS = tuple(2**i for i in range(13, 21))
# Dense attention on more tokens would take minutes: its time grows with the square of T.
DENSE_MOST = 131072
STYLES = {
    "cudnn": ("dense, cuDNN", "tab:red"),
    "flash": ("dense, FlashAttention-2", "tab:orange"),
    "fa4": ("dense, flash-attn-4", "tab:green"),
}


def main(args: argparse.Namespace) -> int:
    """Check, measure, print a table; 1 if a check fails."""
    shapes = [parse_shape(text, 6, ("sum", "max")) for text in args.shapes]
    chart_shape = parse_shape(args.chart_shape, 5)
    if not torch.cuda.is_available():
        raise ValueError("bench attention measures a GPU, and this machine has none that PyTorch sees")
    if args.dense is None:
        args.dense = [*DENSE, *(["fa4"] if _has_fa4() else [])]
    if args.sparse is None:
        args.sparse = [name for name, peer in PEERS.items() if peer.is_installed]
    where = environment(torch.device("cuda"))
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    table = Table(
        (
            ("T, Hq, Hkv, D, B, k", 33, lambda row: ", ".join(map(str, (row.tokens, *row.shape)))),
            ("what", 12, lambda row: row.name),
            ("fwd ms", 10, number("forward")),
            ("spread", 8, number("forward_spread")),
            ("fwd+bwd", 10, number("both")),
            ("spread", 8, number("both_spread")),
            ("GiB", 7, number("peak_gib")),
            ("over MoBA", 16, lambda row: _over_moba(report.rows, row)),
        )
    )
    report = Report(where, {"graph": args.graph, "deterministic": args.deterministic}, table, args.json)
    print(table.header())
    drawn = [(tokens, *chart_shape) for tokens in CHART_TOKENS] if args.chart else []
    for shape in dict.fromkeys([*shapes, *drawn]):
        problem = _measure(shape, args, report)
        if problem:
            print(f"{shape}: {problem}; nothing more is measured")
            return 1
    if args.chart:
        curve = [row for row in report.rows if (row.tokens, *row.shape) in drawn]
        n_q, n_kv, dim, block_size, top_k = chart_shape
        title = (
            f"{n_q} query heads, {n_kv} KV heads, head dim {dim}, block {block_size}, top-k {top_k}, bf16, causal\n"
            f"{described(where, 'torch', 'triton')}"
        )
        draw(args.chart, panels(curve), title)
    return 0


def parse_shape(text: str, count: int, words: tuple[str, ...] = ()) -> tuple[int | str, ...]:
    """``text`` as ``count`` positive integers, and perhaps one of ``words``.

    Raises:
        ValueError: it is something else.
    """
    parts = text.split(",")
    last = [parts.pop().strip()] if len(parts) == count + 1 and parts[-1].strip() in words else []
    if len(parts) != count or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        example = SHAPES[4] if count == 6 else CHART_SHAPE
        also = f", and {' or '.join(words)} or nothing behind them" if words else ""
        raise ValueError(
            f"shape {text!r} is not {count} positive integers with commas between{also}; use e.g. {example}"
        )
    return *(int(part) for part in parts), *last


def panels(rows: list[Row]) -> list[Panel]:
    """Time against T, of rows that differ in T alone.

    Where dense attention was not measured it is drawn dashed, with the square of T from its longest measured sequence.
    """
    tokens = sorted({row.tokens for row in rows})
    out = []
    for title, pick in (("forward", lambda row: row.forward), ("forward + backward", lambda row: row.both)):
        ours = [(row.tokens, pick(row)) for row in rows if row.name == MOBA]
        curves = [Curve("MoBA, this library", ours, {"color": "tab:blue"})]
        for name, (label, color) in STYLES.items():
            measured = sorted((row.tokens, pick(row)) for row in rows if row.name == name)
            if not measured:
                continue
            curves.append(Curve(label, measured, {"color": color, "marker": "s"}))
            last, time = measured[-1]
            beyond = [(n, time * (n / last) ** 2) for n in tokens if n >= last]
            if len(beyond) > 1:
                style = {"color": color, "marker": "s", "linestyle": "--", "fillstyle": "none"}
                curves.append(Curve(f"{label}, extrapolated", beyond, style))
        out.append(Panel("tokens", "ms", curves, title))
    return out


def _measure(shape: tuple[int | str, ...], args: argparse.Namespace, report: Report) -> str | None:
    """Add the rows of one shape, or tell what is wrong with its results."""
    n_tokens, n_q, n_kv, dim, block_size, top_k, *shared = shape
    gate = {"shared_by_group": shared[0]} if shared else {}
    config = MoBAConfig(block_size, top_k, deterministic=args.deterministic, **gate)
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(n_tokens, h, dim, generator=g, device="cuda", dtype=torch.bfloat16) for h in (n_q, n_kv, n_kv, n_q)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    row = Row(PART, MOBA, n_tokens, shape=shape[1:])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = moba_attention(*leaves, config, return_lse=True)
    out.backward(dout)
    torch.cuda.synchronize()
    row.peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    torch.cuda.empty_cache()
    results = [out.detach(), *(x.grad for x in leaves)]
    row.errors, problem = judge_moba([*(x.detach() for x in leaves), dout], results, lse.detach(), config)
    if problem:
        return problem
    del out, lse, results
    torch.cuda.empty_cache()
    _time(row, Candidate(MOBA, lambda: moba_attention(*leaves, config), dout, leaves, inference=True), args)
    report.add(row)
    for name in args.dense if n_tokens <= DENSE_MOST else ():
        other = Row(PART, name, n_tokens, shape=shape[1:])
        same = [r for r in report.rows if (r.name, r.tokens, *r.shape[:3]) == (name, *shape[:4])]
        if same:
            # Dense attention does not depend on the block size and on top-k.
            other = replace(same[0], shape=shape[1:])
        else:
            try:
                _time(other, _dense(name, leaves, dout), args)
            except (RuntimeError, ValueError) as error:
                other.note = f"does not take this shape: {str(error).splitlines()[0][:100]}"
        report.add(other)
    if shared and args.sparse:
        inputs = Inputs(leaves, dout, select(leaves[0].detach(), leaves[1].detach(), config), block_size)
        for name in args.sparse:
            report.add(_peer_row(name, inputs, shape, args))
            torch.cuda.empty_cache()
    return None


def _peer_row(name: str, inputs: Inputs, shape: tuple[int | str, ...], args: argparse.Namespace) -> Row:
    """Times of sparse attention of others, with what they compute instead; or why there are none."""
    row = Row(PART, name, shape[0], shape=shape[1:], note=PEERS[name].differs)
    try:
        candidate = PEERS[name].make(inputs)
        forward = time_passes(candidate, False, args.repeats, warm_up=2)
        row.forward, row.forward_spread = statistics.median(forward), max(forward) - min(forward)
        row.fill(forward, time_passes(candidate, True, args.repeats, warm_up=2))
    # Whatever a library of others raises, the other rows are wanted.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:150]
        row.note += f"; {'forward' if row.forward is None else 'backward'} failed, {type(error).__name__}: {reason}"
    return row


def _time(row: Row, candidate: Candidate, args: argparse.Namespace) -> None:
    row.fill(*(time_passes(candidate, both, args.repeats, warm_up=2, graph=args.graph) for both in (False, True)))


def _has_fa4() -> bool:
    return dense.BACKENDS["fa4"].refusal(torch.empty(1, 1, 128, device="cuda", dtype=torch.bfloat16), False) is None


def _dense(name: str, leaves: list[torch.Tensor], dout: torch.Tensor) -> Candidate:
    """Dense causal attention by one of PyTorch's backends or by flash-attn-4, on q, k, v and dout [T, heads, D]."""
    if name == "fa4":
        return Candidate(name, lambda: full_attention(*leaves, backend="fa4"), dout, leaves, inference=True)
    heads_first = [x.detach().transpose(0, 1)[None].requires_grad_() for x in leaves]
    grouped = leaves[0].shape[1] != leaves[1].shape[1]

    def forward() -> torch.Tensor:
        with sdpa_kernel(DENSE[name]):
            return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=grouped)

    return Candidate(name, forward, dout.transpose(0, 1)[None], heads_first, inference=True)


def _over_moba(rows: list[Row], row: Row) -> str:
    """A dense row's times over MoBA's, forward and forward + backward."""
    same = [other for other in rows if other.shape == row.shape]
    moba = find(same, PART, row.tokens, 1, MOBA)
    if row.name == MOBA or moba is None or row.both is None:
        return ""
    return f"{row.forward / moba.forward:.2f}x / {row.both / moba.both:.2f}x"
