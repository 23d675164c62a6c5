"""``moba-cp bench transformers``: the options of :mod:`..hf`."""

import argparse

from ...outputs import output_file

PARTS = ("check", "train", "prefill")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``moba-cp bench transformers``."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--moba", nargs="+", type=_options, default=[(512, 8), (512, 3)], metavar="B,K",
                        help="block size and top-k; prompts take the first (default: 512,8 512,3)")  # fmt: skip
    parser.add_argument("--train-tokens", type=int, default=131_072, metavar="T", help="(default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=1_048_576, metavar="T", help="(default: %(default)s)")
    parser.add_argument("--piece", type=int, default=16_384, metavar="T", help="of a prompt (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=128_256, metavar="V", help="(default: %(default)s)")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write rows and environment to FILE")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from .. import hf

    return hf.main(args)


def _options(text: str) -> tuple[int, int]:
    try:
        block_size, top_k = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,K, such as 512,8") from None
    return block_size, top_k
