"""The console script ``moba-cp``: finds the command, runs it, and turns errors into one line.

A command is a module with ``add_arguments(parser)`` and ``main(arguments) -> int``, imported only when it is called.
"""

import argparse
import importlib
import os
import sys
import time
import traceback

from moba_cp import __version__

# Words of the command -> module, what it does. One line adds a command.
COMMANDS = {
    "train": ("moba_cp.train.command", "train a model by a YAML config"),
    "bench attention": ("moba_cp.bench.attention", "time MoBA on one GPU beside dense attention; table, JSON, chart"),
    "bench cluster": ("moba_cp.bench.cluster.command", "measure attention and training over several ranks"),
    "bench exchange": ("moba_cp.bench.exchange", "count the bytes of each exchange mode for any number of ranks"),
    "bench full": ("moba_cp.bench.full", "measure what one rank computes of full attention across ranks"),
    "bench peer": ("moba_cp.bench.peer", "try which layouts and batches ours and PyTorch's context_parallel serve"),
    "experiment switch": ("moba_cp.experiments.switch", "train MoBA, full, and MoBA then full; draw the losses"),
}

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130
# Long enough for a launcher to end this rank after another rank's error, which is the one worth reading.
_SECONDS_FOR_OTHERS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Run ``moba-cp`` with ``argv`` (default: the process's arguments); returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    words = _command(argv)
    if words is None:
        return _help(argv)
    parser = _Parser(prog=f"moba-cp {words}", description=_sentence(COMMANDS[words][1]), allow_abbrev=False)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    show_traceback = "--traceback" in argv or bool(os.environ.get("MOBA_CP_TRACEBACK"))
    try:
        module = importlib.import_module(COMMANDS[words][0])
        module.add_arguments(parser)
        arguments = parser.parse_args(argv[len(words.split()) :])
        return module.main(arguments)
    except KeyboardInterrupt:
        return _fail(words, "interrupted", INTERRUPTED)
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        return _fail(words, _describe(error), USER_ERROR if isinstance(error, (ValueError, OSError)) else BUG)


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an exception, so that it gets one line as every other does."""

    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


def _command(argv: list[str]) -> str | None:
    """The longest beginning of ``argv`` that names a command."""
    for count in (2, 1):
        if " ".join(argv[:count]) in COMMANDS:
            return " ".join(argv[:count])
    return None


def _help(argv: list[str]) -> int:
    lines = ["usage: moba-cp COMMAND ...", "", "commands:"]
    width = max(map(len, COMMANDS))
    lines += [f"  {words.ljust(width)}  {text}" for words, (_, text) in COMMANDS.items()]
    lines += ["", "moba-cp COMMAND --help tells the options of one"]
    if argv and argv[0] == "--version":
        print(f"moba-cp {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print("\n".join(lines))
        return 0
    names = ", ".join(COMMANDS)
    print(f"moba-cp: {' '.join(argv[:2])!r} is not a command; use one of: {names}", file=sys.stderr)
    return USER_ERROR


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("moba_cp"):
        return f'needs the package {error.name}; install with: pip install -e ".[train]" in the checkout'
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip() if lines else ""
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _fail(words: str, text: str, code: int) -> int:
    """Print ``text`` as one line and end; does not return on one of several ranks that have begun to work together."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and (rank != 0 or _of_another_rank(text)):
        # Usually every rank meets the same error, or this one follows from another rank's: one line is enough.
        time.sleep(_SECONDS_FOR_OTHERS)
    place = f" (rank {rank})" if rank else ""
    print(f"moba-cp {words}{place}: error: {text}", file=sys.stderr, flush=True)
    if size > 1:
        # Other ranks may wait in a collective; tidying up would wait for them.
        sys.stdout.flush()
        os._exit(code)
    return code


def _of_another_rank(text: str) -> bool:
    """Whether an error is the transport's: a peer went away."""
    return any(word in text for word in ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo"))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


if __name__ == "__main__":
    sys.exit(main())
