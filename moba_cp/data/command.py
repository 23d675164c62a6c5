"""``moba-cp data build``: text, JSON lines or Parquet into tokens that the trainer and Megatron-LM read."""

import argparse
import os
import sys
import time
from pathlib import Path

# Off a terminal, seconds between two lines of progress.
_SECONDS_BETWEEN_LINES = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files and folders: text (a file is a "
                        "document), .jsonl (a line is one; .gz, .zst, .bz2 too), .parquet (a row is one)")  # fmt: skip
    parser.add_argument("--to", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json of Hugging Face's tokenizers, or a folder "
                        "with one (default: bytes are tokens)")  # fmt: skip
    parser.add_argument("--pattern", metavar="GLOB", help="which files of folders, by name (default: all)")
    parser.add_argument("--field", default="text", metavar="NAME", help="of JSONL and Parquet (default: text)")
    parser.add_argument("--mask-field", metavar="NAME", help="field with a list of [begin, end]: the characters "
                        "that are learned; all others are read only (fine-tuning)")  # fmt: skip
    parser.add_argument(
        "--begin-token", default="none", metavar="TOKEN", help="put before each document (default: none)"
    )
    parser.add_argument("--end-token", default="auto", metavar="TOKEN", help="behind each document; auto: the "
                        "end-of-sequence token that the tokenizer's folder names, if any; none")  # fmt: skip
    parser.add_argument("--bad", choices=("skip", "refuse"), default="skip", help="lines that are no JSON, empty "
                        "documents, text that is no UTF-8: leave out and say which, or end with an error")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--overwrite", action="store_true", help="replace PREFIX if it is there")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    from ..outputs import check_writable
    from . import report
    from .build import BuildOptions, build

    prefix = Path(arguments.to).expanduser()
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    if prefix.is_dir():
        raise ValueError(f"--to={prefix}: is a folder, and data.path={prefix} would mean it; name another PREFIX")
    if prefix.with_name(prefix.name + ".idx").exists() and not arguments.overwrite:
        raise ValueError(f"--to={prefix}: {prefix}.idx is there; name another PREFIX, or replace it (--overwrite)")
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers={arguments.workers} is below 1; use 1 or more")
    check_writable("--to", prefix.parent)
    options = BuildOptions(
        inputs=tuple(arguments.inputs),
        prefix=str(prefix),
        tokenizer=arguments.tokenizer,
        pattern=arguments.pattern,
        field=arguments.field,
        mask_field=arguments.mask_field,
        begin=arguments.begin_token,
        end=arguments.end_token,
        bad=arguments.bad,
    )
    workers = arguments.workers or len(os.sched_getaffinity(0))
    with _Progress() as progress:
        made = build(options, workers, progress)
    # Names of files need not be text.
    print(*(line.encode("utf-8", "backslashreplace").decode() for line in report.lines(made, prefix)), sep="\n")
    report.draw_lengths(made.lengths, prefix.with_name(prefix.name + ".lengths.png"))
    return 0


class _Progress:
    """A bar on a terminal, else a line now and then, on stderr."""

    def __init__(self):
        self.bar, self.shown = None, time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            if self.bar is None:
                self.bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True)
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.shown >= _SECONDS_BETWEEN_LINES:
            self.shown = time.monotonic()
            print(f"{100 * done / max(total, 1):.0f} % of {total / 1e6:,.0f} MB", file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
