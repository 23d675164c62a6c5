"""``moba-cp bench exchange``: the options of :mod:`..exchange`."""

import argparse
from dataclasses import fields

from ...cp.options import MODES, WIRE_DTYPES
from ...outputs import output_file
from ..links import Links
from ..shape import add_arguments as add_shape_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_shape_arguments(parser, heads=32, kv_heads=8, gate="concentrated")
    parser.add_argument("--gate-layer", type=int, help="--gate may be a file: its layer (default: the middle one)")
    parser.add_argument("--ranks", default="2,4,8,16,32,64", help="numbers of ranks, by commas (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="T (default: 1048576 on a GPU, 65536 on a CPU: some seconds)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--modes", default=",".join(MODES), help="by commas (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep what was received for backward")
    parser.add_argument("--gradient-dtype", choices=WIRE_DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--row-weight", type=float, help="see ExchangeOptions (default: 4 in a node, 1 between nodes)")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--no-copy-engines", action="store_true", help="GPUs of a node map no memory of each other")
    parser.add_argument("--nodes", type=int, default=1, help="nodes to count per P, 0 for all (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="where to count: cpu, cuda, or auto for a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    for speed in fields(Links):
        option = f"--{speed.name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=speed.default, help=speed.metadata["help"])
    parser.add_argument("--json", type=output_file(".json"), help="write settings and table here")
    parser.add_argument("--plot", type=output_file(".png"), help="write a chart of bytes against P here (PNG)")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from .. import exchange

    return exchange.main(args)
