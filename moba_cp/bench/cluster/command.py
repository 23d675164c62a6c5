"""``moba-cp bench cluster``: attention and a training step on several ranks, under torchrun.

Equality with one rank is checked first; then the first 1, 2, 4, ... ranks measure while the others wait.
"""

import argparse
from pathlib import Path

import torch

from ...config import MoBAConfig
from ...cp.layout import LAYOUTS, rank_segments
from ..environment import environment
from ..gates import GATES
from .chart import draw
from .check import check
from .goals import judge, lines
from .inputs import Shape
from .measure import DEFAULT_MODES, Limits, exchange_options
from .parts import PARTS, Settings, standing_in
from .ranks import Ranks
from .rows import Report, header

TOKENS = tuple(2**i for i in range(15, 21))
DEFAULT_PARTS = ("attention", "overlap", "training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--tokens", help="lengths T, by commas (default: 32768 to 1048576; with --nodes 65536)")
    parser.add_argument(
        "--modes",
        default=",".join(DEFAULT_MODES),
        help="of the exchange, by commas; auto:2 for a row_weight, and options behind: -rounded for gradient_dtype "
        "input, -keep, -nccl for no copy engines (%(default)s)",
    )
    parser.add_argument("--parts", help=f"by commas, of {', '.join(PARTS)} (default: all but nodes; with --nodes: it)")
    parser.add_argument("--ranks", help="numbers of ranks, by commas (default: 1, 2, 4, ... as there are)")
    parser.add_argument("--heads", type=int, default=16, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, help="default: as many as query heads")
    parser.add_argument("--dim", type=int, default=128, help="head dim (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--layout", choices=LAYOUTS[:2], default="zigzag", help="default: %(default)s")
    parser.add_argument("--gate", choices=GATES, default="uniform", help="what queries choose (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each, after warming up (%(default)s)")
    parser.add_argument("--max-ms", type=float, default=1000.0, help="skip dense passes that take longer (%(default)s)")
    parser.add_argument("--check-tokens", type=int, default=16384, help="T of the check before (default: %(default)s)")
    parser.add_argument("--training-tokens", default="131072", help="T of the training step (default: %(default)s)")
    parser.add_argument("--stand-in", help="let two GPUs stand in for the first and last of so many ranks, by commas")
    parser.add_argument("--nodes", type=int, default=1, help="let one machine act as so many nodes (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds until a hanging collective ends the run")
    parser.add_argument("--json", type=Path, help="write environment, settings and rows here, row by row")
    parser.add_argument("--chart", type=Path, help="draw speed-up and efficiency against ranks here (PNG)")
    parser.add_argument("--profile", type=Path, help="write where the time goes on rank 0 here, as text")


def main(args: argparse.Namespace) -> int:
    """Check, measure, print; 1 on every rank if a check fails."""
    settings = _settings(args)
    ranks = Ranks(args.device, args.nodes, args.timeout)
    try:
        return _run(settings, ranks, args)
    finally:
        ranks.close()


def _run(settings: Settings, ranks: Ranks, args: argparse.Namespace) -> int:
    _check_sizes(settings, ranks)
    where = environment() | {"ranks": str(ranks.size), "nccl": _nccl()}
    report = Report(where, settings.described(), args.json if ranks.first else None)
    if ranks.first:
        print(", ".join(f"{name} {value}" for name, value in where.items()))
        print(", ".join(f"{name} {value}" for name, value in report.settings.items()), flush=True)
    problem = check(settings.shape, settings.check_tokens, list(settings.modes), settings.sizes, ranks)
    if problem is not None:
        if ranks.first:
            print(f"{problem}; nothing is published", flush=True)
        return 1
    if ranks.first:
        print(
            f"on {settings.sizes} ranks results equal one rank's at T={settings.check_tokens}\n{header()}", flush=True
        )
    for part in settings.parts:
        PARTS[part](settings, ranks, report)
    standing_in(settings, ranks, report)
    if ranks.first:
        _finish(report, args)
    ranks.meet()
    return 0


def _finish(report: Report, args: argparse.Namespace) -> None:
    if any(row.part in ("attention", "overlap") for row in report.rows):
        report.goals = judge(report)
        print("\ngoal / measured / met or missed", *lines(report.goals), sep="\n", flush=True)
    report.write()
    if args.chart and not draw(str(args.chart), report):
        print(f"{args.chart} is not drawn: nothing was measured both on one rank and on more")


def _settings(args: argparse.Namespace) -> Settings:
    """The options, checked.

    Raises:
        ValueError: one is wrong; the message names it, its value and the rule.
    """
    if args.nodes < 1:
        raise ValueError(f"nodes={args.nodes} is not positive; use 1 for the machine as it is")
    modes = tuple(dict.fromkeys(args.modes.split(",")))
    for mode in modes:
        exchange_options(mode)
    default = ("nodes",) if args.nodes > 1 else DEFAULT_PARTS
    parts = _words("parts", args.parts, tuple(PARTS)) if args.parts else default
    if ("nodes" in parts) != (args.nodes > 1) or "nodes" in parts and len(parts) > 1:
        raise ValueError(
            f"parts={','.join(parts)} with nodes={args.nodes}: the part nodes, and no other, goes with --nodes 2 or "
            "more, since links between such nodes are not those of the machine; run the command twice"
        )
    if args.stand_in and args.nodes > 1:
        raise ValueError(f"stand-in={args.stand_in} with nodes={args.nodes}: nodes share no memory; leave one out")
    for name in ("repeats", "check_tokens", "heads", "dim"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name.replace('_', '-')}={getattr(args, name)} is not positive; use 1 or more")
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    if kv_heads < 1 or args.heads % kv_heads:
        raise ValueError(f"kv-heads={kv_heads} does not divide heads={args.heads}")
    for name in ("max_ms", "timeout"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name.replace('_', '-')}={getattr(args, name)} is not above 0")
    for path in (args.json, args.chart, args.profile):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder {path.absolute().parent} is not there; make it first")
    tokens = args.tokens or ("65536" if args.nodes > 1 else ",".join(map(str, TOKENS)))
    return Settings(
        shape=Shape(args.heads, kv_heads, args.dim, MoBAConfig(args.block_size, args.top_k), args.layout, args.gate),
        tokens=_numbers("tokens", tokens),
        training_tokens=_numbers("training-tokens", args.training_tokens),
        check_tokens=args.check_tokens,
        modes=modes,
        parts=parts,
        sizes=_numbers("ranks", args.ranks) if args.ranks else (),
        stand_in=_numbers("stand-in", args.stand_in) if args.stand_in else (),
        limits=Limits(args.repeats, args.max_ms),
        nodes=args.nodes,
        profile=args.profile,
    )


def _check_sizes(settings: Settings, ranks: Ranks) -> None:
    """Take the ranks there are where none were named, and see that every length fits them."""
    if not settings.sizes:
        settings.sizes = tuple(ranks.sizes)
    if settings.stand_in and (ranks.size < 2 or min(settings.stand_in) < 2):
        raise ValueError(
            f"stand-in={','.join(map(str, settings.stand_in))} on {ranks.size} ranks: two stand in for two or more; "
            "start 2 under torchrun"
        )
    for size in settings.sizes:
        if size not in ranks.sizes:
            raise ValueError(
                f"ranks={size} is none of {', '.join(map(str, ranks.sizes))}, the powers of two up to the {ranks.size} "
                "ranks of this run; leave it out or start more under torchrun"
            )
        lengths = {"tokens": settings.tokens, "check-tokens": (settings.check_tokens,)}
        if "training" in settings.parts:
            lengths["training-tokens"] = settings.training_tokens
        for name, values in lengths.items():
            for n_tokens in values:
                try:
                    rank_segments(settings.shape.layout, n_tokens, size, None)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None


def _words(name: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(text.split(",")))
    for word in words:
        if word not in known:
            raise ValueError(f"{name}={text!r}: {word!r} is not one of {', '.join(known)}")
    return words


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        numbers = (0,)
    if numbers[0] < 1:
        raise ValueError(f"{name}={text!r} is not a list of positive whole numbers; use e.g. 65536,131072")
    return numbers


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
