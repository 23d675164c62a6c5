"""``moba-cp bench cluster``: attention on several ranks, under torchrun.

Equality with one rank is checked first; then the first 1, 2, 4, ... ranks measure while the others wait.
"""

import argparse

import torch

from ...cp.layout import rank_segments
from ..chart import draw
from ..environment import described, environment
from ..rows import Report, Row, Table, number, ratio, short
from ..shape import GATES, Shape, whole_numbers
from .chart import panels
from .check import check
from .measure import FULL, MOBA, Layer, Limits, dense_estimate, measure, overlap
from .modes import PARTS, exchange_options, shares_heads
from .predict import predictions
from .profile import write_profile
from .ranks import Ranks

TABLE = Table(
    (
        ("part", 9, lambda row: row.part),
        ("T", 6, lambda row: short(row.tokens)),
        ("P", 3, lambda row: str(row.ranks)),
        ("what", 28, lambda row: row.name),
        ("fwd ms", 9, number("forward")),
        ("fwd+bwd", 9, number("both")),
        ("spread", 8, number("both_spread")),
        ("GB", 8, number("received_gb", 3)),
        ("pred GB", 9, number("predicted_gb", 3)),
        ("pred ms", 9, number("predicted_ms")),
        ("GiB", 7, number("peak_gib")),
        ("on/off f", 10, ratio("forward", "off_forward")),
        ("f+b", 7, ratio("both", "off_both")),
    )
)


def main(args: argparse.Namespace) -> int:
    """Check, measure, print; 1 on every rank if a check fails."""
    settings = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
    shape = _parse(args)
    if args.device == "auto" and not torch.cuda.is_available():
        raise ValueError(
            "bench cluster measures GPUs, and this machine has none that PyTorch sees; name --device cpu and a small "
            "layer, as docs/bench_cluster.md does"
        )
    ranks = Ranks(args.device, args.timeout)
    try:
        _check_sizes(args, ranks)
        where = environment(ranks.device) | {"ranks": str(ranks.size), "nccl": _nccl()}
        report = Report(where, settings, TABLE, args.json if ranks.first else None)
        return _run(shape, args, ranks, report)
    finally:
        ranks.close()


def _run(shape: Shape, args: argparse.Namespace, ranks: Ranks, report: Report) -> int:
    ranks.print(", ".join(f"{name} {value}" for name, value in (report.environment | report.settings).items()))
    problem = check(shape, args.check_tokens, args.modes, args.ranks, ranks)
    if problem is not None:
        ranks.print(f"{problem}; nothing is published")
        return 1
    ranks.print(f"on {args.ranks} ranks results equal one rank's at T={args.check_tokens}\n{TABLE.header()}")
    for n_tokens in args.tokens:
        for size in args.ranks:
            if ranks.rank < size:
                _measure(shape, args, ranks, report, n_tokens, size)
                if ranks.on_gpu:
                    torch.cuda.empty_cache()
            ranks.barrier()
    if ranks.first and args.chart:
        drawn = panels(report.rows)
        if drawn:
            draw(args.chart, drawn, f"one layer: {shape}\n{described(report.environment, 'torch', 'triton', 'nccl')}")
        else:
            print(f"{args.chart} is not drawn: nothing was measured both on one rank and on more")
    ranks.barrier()
    return 0


def _measure(shape: Shape, args: argparse.Namespace, ranks: Ranks, report: Report, n_tokens: int, size: int) -> None:
    """All parts with one length on the first ``size`` ranks; collective over these."""

    def add(rows: list[Row]) -> None:
        for row in rows if ranks.first else ():
            report.add(row)

    def late(what: str) -> bool:
        """Whether the time for measurements is over; says so in a row."""
        if ranks.elapsed(size) <= args.seconds:
            return False
        note = f"skipped: {args.seconds:.0f} s are over; give more by --seconds, or fewer --tokens or --modes"
        add([Row("skipped", what, n_tokens, size, note=note)])
        return True

    if late("all"):
        return
    try:
        layer = Layer(shape, n_tokens, size, ranks)
    except torch.OutOfMemoryError:
        layer = None
    if ranks.problem(None if layer else "out of memory", size):
        return add([Row("skipped", "all", n_tokens, size, note="out of memory")])
    names = [mode for mode in args.modes if shares_heads(mode, shape, size)]
    modes = [layer.moba(mode) for mode in names] if size > 1 else [layer.moba("auto", MOBA)]
    able = modes
    if "attention" in args.parts:
        ranks.say(f"attention of {n_tokens} tokens on {size} ranks")
        rows = measure(layer, "attention", modes, args.limits, lambda name: 0.0)
        for name, predicted in predictions(layer, names).items() if size > 1 else ():
            row = next(row for row in rows if row.name == name)
            row.predicted_gb, row.predicted_ms = predicted.predicted_gb, predicted.predicted_ms
        add(rows)
        able = [candidate for candidate, row in zip(modes, rows, strict=True) if not row.note]
        add(_measure_dense(layer, args.limits, report.rows))
    for candidate in able if "overlap" in args.parts and size > 1 else ():
        if late(f"overlap of {candidate.name}"):
            return None
        add([overlap(layer, candidate, args.limits)])
    if args.profile is not None:
        write_profile(args.profile, layer, modes)
    return None


def _measure_dense(layer: Layer, limits: Limits, before: list[Row]) -> list[Row]:
    """Rows of our full attention and of PyTorch's; ``before`` are those of shorter sequences, on the first rank."""

    def estimate(name: str) -> float:
        return layer.ranks.most(dense_estimate(layer, name, before) if layer.ranks.first else 0.0, layer.size)

    candidates = [layer.full()]
    n_ours = 1
    if layer.size > 1 and shares_heads("heads", layer.shape, layer.size):
        candidates.append(layer.full("heads", f"{FULL} heads"))
        n_ours = 2
    if estimate(candidates[0].name) <= limits.most_ms:
        candidates += layer.torch()
    rows = measure(layer, "attention", candidates, limits, estimate)
    for candidate, row in zip(candidates[n_ours:], rows[n_ours:], strict=True):
        if row.both is not None:
            row.note = layer.disagreement(candidates[0], candidate) or ""
    return rows


def _parse(args: argparse.Namespace) -> Shape:
    """Check the options and put lists in the place of texts.

    Raises:
        ValueError: one is wrong; the message names it, its value and the rule.
    """
    if args.gate not in GATES:
        raise ValueError(f"gate={args.gate!r} is not one of {', '.join(GATES)}")
    shape = Shape.of(args)
    args.modes = tuple(dict.fromkeys(args.modes.split(",")))
    for mode in args.modes:
        exchange_options(mode)
    args.parts = args.parts.split(",")
    if not {*args.parts} <= {*PARTS}:
        raise ValueError(f"parts={','.join(args.parts)!r} is not a list of {', '.join(PARTS)}")
    for name in ("repeats", "check_tokens", "max_ms", "timeout", "seconds"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name.replace('_', '-')}={getattr(args, name)} is not positive")
    args.tokens = whole_numbers("tokens", args.tokens)
    args.ranks = whole_numbers("ranks", args.ranks) if args.ranks else ()
    args.limits = Limits(args.repeats, args.max_ms)
    return shape


def _check_sizes(args: argparse.Namespace, ranks: Ranks) -> None:
    """Take the ranks there are where none were named, and see that every length fits them."""
    args.ranks = args.ranks or tuple(ranks.sizes)
    for size in args.ranks:
        if size not in ranks.sizes:
            raise ValueError(
                f"ranks={size} is none of {', '.join(map(str, ranks.sizes))}, the powers of two up to the {ranks.size} "
                "ranks of this run; leave it out or start more under torchrun"
            )
        for name, n_tokens in (("check-tokens", args.check_tokens), *(("tokens", n) for n in args.tokens)):
            try:
                rank_segments(args.layout, n_tokens, size, None)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
