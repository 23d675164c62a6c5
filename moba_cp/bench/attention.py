"""``moba-cp bench attention``: MoBA on one GPU beside dense attention, on the same tensors in the same run.

Every shape is first checked against float64 on sampled rows; a shape that fails is not timed. Times include everything:
block means, selection, index, attention, merge.

Legend: T tokens, Hq query heads, Hkv key/value heads, D head dim, B block size, k top-k.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import MoBAConfig, dense, full_attention, moba_attention
from .attention_chart import draw
from .attention_check import check
from .environment import environment

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# T, Hq, Hkv, D, B, k
SHAPES = (
    "8192,16,16,128,128,8",
    "32768,16,16,128,128,8",
    "131072,16,16,128,128,8",
    "32768,16,16,128,512,3",
    "131072,16,16,128,512,8",
    "131072,32,8,128,512,8",
    "131072,16,16,64,128,8",
    "131072,16,16,128,4096,12",
)
CHART_SHAPE = "16,16,128,512,8"
CHART_TOKENS = tuple(2**i for i in range(13, 21))
# Dense attention on more tokens would take minutes: its time grows with the square of T.
DENSE_MOST = 131072


@dataclass
class Time:
    """Median and spread (largest minus smallest) of repeated runs, ms."""

    forward: float
    forward_spread: float
    forward_backward: float
    forward_backward_spread: float


@dataclass
class Row:
    """One shape's measurements."""

    shape: tuple[int, ...]
    """T, Hq, Hkv, D, B, k"""
    moba: Time
    peak_gib: float
    """Most memory of forward and backward above the inputs; output and gradients are included."""
    errors: dict[str, float]
    """Largest error of the sampled rows over the largest value, against float64."""
    dense: dict[str, Time] = field(default_factory=dict)

    def factor(self, name: str) -> tuple[float, float]:
        """Dense time over ours, forward and forward + backward."""
        other = self.dense[name]
        return other.forward / self.moba.forward, other.forward_backward / self.moba.forward_backward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``moba-cp bench attention``."""
    parser.add_argument(
        "--shapes", nargs="+", default=list(SHAPES), metavar="T,HQ,HKV,D,B,K", help="default: eight over the range"
    )
    parser.add_argument(
        "--dense", nargs="*", choices=[*DENSE, "fa4"], help="what to compare with (default: all that are installed)"
    )
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs, of dense attention too")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each, after two to warm up")
    parser.add_argument("--deterministic", action="store_true", help="time the deterministic mode")
    parser.add_argument("--json", metavar="FILE", help="write rows and environment to FILE")
    parser.add_argument("--chart", metavar="FILE", help="also time 8K to 1M tokens and draw time against T to this PNG")
    parser.add_argument("--chart-shape", default=CHART_SHAPE, metavar="HQ,HKV,D,B,K", help="(default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Check, measure, print a table; 1 if a check fails."""
    shapes = [parse_shape(text, 6) for text in args.shapes]
    chart_shape = parse_shape(args.chart_shape, 5)
    if not torch.cuda.is_available():
        raise ValueError("bench attention measures a GPU, and this machine has none that PyTorch sees")
    if args.dense is None:
        args.dense = [*DENSE, *(["fa4"] if _has_fa4() else [])]
    where = environment()
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    rows = _measure_all(shapes, args)
    curve = _measure_all([(t, *chart_shape) for t in CHART_TOKENS], args) if args.chart and rows else []
    if rows is None or curve is None:
        return 1
    if args.chart:
        draw(args.chart, curve, where)
    if args.json:
        with open(args.json, "w") as file:
            content = {"environment": where, "rows": [asdict(r) for r in rows], "curve": [asdict(r) for r in curve]}
            json.dump(content, file, indent=1)
    return 0


def parse_shape(text: str, count: int) -> tuple[int, ...]:
    """``text`` as ``count`` positive integers.

    Raises:
        ValueError: it is something else.
    """
    parts = text.split(",")
    if len(parts) != count or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        example = SHAPES[4] if count == 6 else CHART_SHAPE
        raise ValueError(f"shape {text!r} is not {count} positive integers with commas between; use e.g. {example}")
    return tuple(int(part) for part in parts)


def _measure_all(shapes, args) -> list[Row] | None:
    print(f"{'T, Hq, Hkv, D, B, k':30s} {'MoBA fwd / fwd+bwd ms':>24s} {'spread':>13s} {'peak GiB':>9s}  dense")
    rows, dense_times = [], {}
    for shape in shapes:
        row, problem = _measure(shape, args, dense_times)
        if problem:
            print(f"{shape}: {problem}; nothing is published")
            return None
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _measure(shape, args, dense_times: dict) -> tuple[Row | None, str | None]:
    """One shape's row, or what is wrong with it; ``dense_times`` keeps dense times of shapes seen before."""
    n_tokens, n_q, n_kv, dim, block_size, top_k = shape
    config = MoBAConfig(block_size, top_k, deterministic=args.deterministic)
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(n_tokens, h, dim, generator=g, device="cuda", dtype=torch.bfloat16) for h in (n_q, n_kv, n_kv, n_q)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = moba_attention(*leaves, config, return_lse=True)
    out.backward(dout)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    errors, problem = check(*(x.detach() for x in leaves), dout, out.detach(), lse, [x.grad for x in leaves], config)
    if problem:
        return None, problem
    del out, lse
    moba = _time(lambda: moba_attention(*leaves, config), leaves, dout, args)
    row = Row(shape, moba, peak, errors)
    for name in args.dense if n_tokens <= DENSE_MOST else ():
        key = name, *shape[:4]
        if key not in dense_times:
            dense_times[key] = _time_dense(name, leaves, dout, args)
        if dense_times[key]:
            row.dense[name] = dense_times[key]
    return row, None


def _time(forward, leaves, dout, args) -> Time:
    """Times of ``forward()``, without and with its backward."""

    def forward_backward():
        for x in leaves:
            x.grad = None
        forward().backward(dout)

    def forward_alone():
        with torch.no_grad():
            forward()

    runs = []
    for function in (forward_alone, forward_backward):
        runs.append(_run(_captured(function) if args.graph else function, args.repeats))
        for x in leaves:
            x.grad = None
    return Time(*(f(times) for times in runs for f in (statistics.median, lambda t: max(t) - min(t))))


def _captured(function):
    """A replay of ``function`` as a CUDA graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _run(function, repeats: int) -> list[float]:
    """Times of runs that follow one another without a pause, as the layers of a model do."""
    for _ in range(2):
        function()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in zip(marks, marks[1:])]


def _has_fa4() -> bool:
    return dense.BACKENDS["fa4"].refusal(torch.empty(1, 1, 128, device="cuda", dtype=torch.bfloat16), False) is None


def _time_dense(name: str, leaves, dout, args) -> Time | None:
    """Dense causal attention by one of PyTorch's backends or by flash-attn-4; None where it does not take the shape."""
    if name == "fa4":

        def forward():
            return full_attention(*leaves, backend="fa4")
    else:
        dout = dout.transpose(0, 1)[None]
        leaves = [x.detach().transpose(0, 1)[None].requires_grad_() for x in leaves]
        grouped = leaves[0].shape[1] != leaves[1].shape[1]

        def forward():
            with sdpa_kernel(DENSE[name]):
                return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=grouped)

    try:
        return _time(forward, leaves, dout, args)
    except (RuntimeError, ValueError) as error:
        print(f"{name} does not take {tuple(leaves[0].shape)}: {str(error).splitlines()[0][:100]}")
        return None


def _line(row: Row) -> str:
    time = row.moba
    text = f"{', '.join(map(str, row.shape)):30s} {time.forward:11.2f} / {time.forward_backward:10.2f}"
    text += f" {time.forward_spread:5.2f} / {time.forward_backward_spread:5.2f} {row.peak_gib:9.2f}"
    for name, other in row.dense.items():
        factors = row.factor(name)
        text += f"  {name} {other.forward:.2f} / {other.forward_backward:.2f} = {factors[0]:.2f}x / {factors[1]:.2f}x"
    return text
