"""``moba-cp experiment switch``: the options. The experiment (:mod:`.switch`) is imported only to run it."""

import argparse
from pathlib import Path

from ..outputs import check_writable, output_file
from ..train.command import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file whose attention is MoBA, or a packaged one's name")
    add_overrides(parser)
    parser.add_argument("--until", type=float, default=0.9, help="fraction of the steps with MoBA (default: 0.9)")
    parser.add_argument("--directory", default="runs/switch", help="folder of the three runs (default: %(default)s)")
    parser.add_argument(
        "--picture", type=output_file(".png"), metavar="PNG", help="the chart (default: switch.png in the directory)"
    )
    parser.add_argument("--redraw", action="store_true", help="draw the runs in the directory, train nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier runs")


def main(args: argparse.Namespace) -> int:
    """Run the experiment; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    check_writable("--directory", Path(args.directory))
    # PyTorch and Megatron-core take seconds to import, and --help needs neither.
    from .switch import main

    return main(args)
