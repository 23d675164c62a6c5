"""``moba-cp bench cluster``: the options of :mod:`..cluster.run`."""

import argparse

from ...outputs import output_file
from ..cluster.modes import DEFAULT_MODES, PARTS
from ..shape import add_arguments as add_shape_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_shape_arguments(parser, heads=16, kv_heads=None, gate="uniform")
    parser.add_argument("--tokens", default="32768,131072,524288", help="lengths T, by commas (default: %(default)s)")
    parser.add_argument(
        "--modes",
        default=",".join(DEFAULT_MODES),
        help="of the exchange, by commas; auto:2 for a row_weight, and options behind: -rounded for gradient_dtype "
        "input, -keep, -nccl for no copy engines, -heads2 to exchange tokens for heads between every 2 ranks; heads "
        "only where the ranks divide the query heads (%(default)s)",
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="by commas (default: %(default)s)")
    parser.add_argument("--ranks", help="numbers of ranks, by commas (default: 1, 2, 4, ... as there are)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each, after warming up (%(default)s)")
    parser.add_argument("--max-ms", type=float, default=1000.0, help="skip dense passes that take longer (%(default)s)")
    parser.add_argument("--check-tokens", type=int, default=8192, help="T of the check before (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="begin no measurement later (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds until a hanging collective ends the run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--json", type=output_file(".json"), help="write environment, settings and rows here, row by row"
    )
    parser.add_argument("--chart", type=output_file(".png"), help="draw times and efficiency here (PNG)")
    parser.add_argument("--profile", type=output_file(".txt"), help="write where the time goes on rank 0 here")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from ..cluster import run

    return run.main(args)
