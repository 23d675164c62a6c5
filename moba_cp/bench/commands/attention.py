"""``moba-cp bench attention``: the options of :mod:`..attention`."""

import argparse

from ...outputs import output_file
from ..shape import CHART_SHAPE, SHAPES

DENSE = ("cudnn", "flash", "fa4")
SPARSE = ("nsa", "msa", "fa4-tiles", "cudnn-tiles")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``moba-cp bench attention``."""
    parser.add_argument(
        "--shapes", nargs="+", default=list(SHAPES), metavar="T,HQ,HKV,D,B,K[,sum|max]",
        help="with sum or max the query heads of a KV head share their selection (default: eleven over the range)",
    )  # fmt: skip
    parser.add_argument(
        "--dense", nargs="*", choices=DENSE, help="what to compare with (default: all that are installed)"
    )
    parser.add_argument(
        "--sparse", nargs="*", choices=SPARSE,
        help="sparse attention of others to compare shared selections with (default: all that are installed)",
    )  # fmt: skip
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs, of dense attention too")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each, after two to warm up")
    parser.add_argument("--deterministic", action="store_true", help="time the deterministic mode")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write rows and environment to FILE")
    parser.add_argument(
        "--chart",
        type=output_file(".png"),
        metavar="FILE",
        help="also time 8K to 1M tokens and draw time against T to this PNG",
    )
    parser.add_argument("--chart-shape", default=CHART_SHAPE, metavar="HQ,HKV,D,B,K", help="(default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from .. import attention

    return attention.main(args)
