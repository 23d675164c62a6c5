"""``moba-cp experiment NAME...``: the options. What they start (:mod:`.grid`) is imported only to run it."""

import argparse
import time
from pathlib import Path

from ..outputs import check_writable
from ..train.command import add_overrides

NAMES = (
    "retrieval",
    "scaling-law",
    "position-loss",
    "granularity",
    "layerwise-hybrid",
    "training-hybrid",
    "sliding-window",
    "key-conv",
    "block-size",
)
SCALES = ("tiny", "small", "paper")
EXAMPLES = """examples:
  moba-cp experiment scaling-law --scale small --dry-run
  moba-cp experiment scaling-law granularity --scale small --gpus 2 --budget-seconds 500
  moba-cp experiment all --scale small --redraw

Start the same command again to go on: runs that are done are skipped.

exit codes: 0 done, 1 a run failed, 2 a wrong option or config"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("names", nargs="+", metavar="NAME", choices=(*NAMES, "all"), help=f"{', '.join(NAMES)}, or all")
    parser.add_argument("--scale", choices=SCALES, default="small", help="tiny: seconds on a CPU; small: one GPU or a "
                        "few; paper: its sizes, for a cluster (default: small)")  # fmt: skip
    parser.add_argument("--directory", metavar="FOLDER", help="of the runs, charts and tables (default: "
                        "runs/experiments-SCALE)")  # fmt: skip
    parser.add_argument("--gpus", type=int, metavar="N", help="runs side by side, one a GPU (default: as many as are "
                        "here; on a CPU 1)")  # fmt: skip
    parser.add_argument("--per-gpu", type=int, default=1, metavar="N", help="runs side by side on each GPU: small "
                        "models leave it idle between kernels (default: 1)")  # fmt: skip
    parser.add_argument("--seeds", type=int, metavar="N", help="train with seeds 0 to N - 1 (default: the scale's)")
    parser.add_argument("--budget-seconds", type=float, metavar="S", help="begin no run that would not end within so "
                        "many seconds from now (default: none)")  # fmt: skip
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="folders whose subfolders are packages of text, in "
                        "place of the installed Python packages; scale paper takes --set data.path=...")  # fmt: skip
    parser.add_argument("--pattern", default="*.py", metavar="GLOB", help="which files of them (default: *.py)")
    parser.add_argument("--write-configs", action="store_true", help="train nothing; write a config for each run that "
                        "is not done, for moba-cp train on any number of GPUs, and take over what is done")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would run and what it would cost")
    parser.add_argument("--redraw", action="store_true", help="train nothing; charts and tables of what is done")
    add_overrides(parser, "scale's config")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    started = time.monotonic()
    # PyTorch takes seconds to import.
    from .start import start

    for name in ("gpus", "per_gpu", "seeds", "budget_seconds"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')}={value} is not above 0")
    names = NAMES if "all" in arguments.names else tuple(dict.fromkeys(arguments.names))
    folder = Path(arguments.directory or f"runs/experiments-{arguments.scale}")
    check_writable("--directory", folder)
    return start(arguments, names, folder, started)
