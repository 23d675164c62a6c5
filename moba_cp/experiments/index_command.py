"""``moba-cp experiment index-branch``: the options. :mod:`.index_branch`, which does it, is imported only to run it."""

import argparse
from pathlib import Path

from ..outputs import check_writable, output_file
from ..train.command import add_overrides

VARIANTS = ("full", "moba", "mean", "max")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file whose layers have index branches and a schedule "
                        "that begins with full attention, or a packaged one's name")  # fmt: skip
    add_overrides(parser)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="RUN", help="train some: full "
                        "(full attention throughout), moba (blocks by mean keys, after the same warm-up), mean and max "
                        "(index branches with that score); the others may go on elsewhere (default: all)")  # fmt: skip
    parser.add_argument(
        "--directory", default="runs/index-branch", help="folder of the four runs (default: %(default)s)"
    )
    parser.add_argument(
        "--picture",
        type=output_file(".png"),
        metavar="PNG",
        help="the chart (default: index-branch.png in the directory)",
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
    from .index_branch import main

    return main(args)
