"""``moba-cp train CONFIG``: the options. What they start (:mod:`.start`) is imported only to run it."""

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file, or the name of a packaged one such as demo or hybrid/switch_90_10"
    )
    add_overrides(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from a checkpoint, or from the newest of a run's folder (default: run.directory); auto: begin, go "
        "on or say that all steps are done (exit code 0), whichever run.directory calls for: one command to requeue",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in run.directory")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, write nothing")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: check for N ranks")


def add_overrides(parser: argparse.ArgumentParser, of: str = "file") -> None:
    """The option ``--set``, as every command that reads a config has it; ``of``: what it replaces values of."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help=f"replace a value of the {of}; may be repeated",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    # Tensors of a long sequence are gigabytes, of sizes that differ: without segments that grow, what is free between
    # them is lost. PyTorch reads this when it is imported.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # PyTorch and Megatron-core take seconds to import: --help and a typing error do not wait for them.
    from .start import start

    return start(arguments)
