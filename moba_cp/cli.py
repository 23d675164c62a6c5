"""The console script ``moba-cp``: finds the command, runs it, and turns errors into one line.

A command is a module with ``add_arguments(parser)`` and ``main(arguments) -> int``, imported only when it is called.
The module imports what is slow, or belongs to an extra, inside ``main``, so that ``--help`` is quick and always works.
"""

import argparse
import importlib
import importlib.metadata
import os
import re
import sys
import time
import traceback
from pathlib import Path

from moba_cp import __version__

# Command -> its module, what it does. To add a command, add a line.
COMMANDS = {
    "train": ("moba_cp.train.command", "train a model by a YAML config"),
    "plan": ("moba_cp.train.plan_command", "say whether a run fits on so many GPUs, and how fast it would be"),
    "plot": ("moba_cp.train.plot_command", "draw runs: loss against steps, tokens and hours, and by position"),
    "config": ("moba_cp.train.config_command", "explain every key of a training config, or print one whole"),
    "import": ("moba_cp.train.import_command", "write a config that begins with an existing model's weights"),
    "export": ("moba_cp.train.export_command", "write a trained model for transformers or Megatron-LM"),
    "eval": ("moba_cp.train.eval_command", "loss, perplexity and bits per byte of a model, by position"),
    "generate": ("moba_cp.train.generate_command", "what a model says after a prompt of any length"),
    "data build": ("moba_cp.data.command", "make tokens of text, JSON lines or Parquet, for training"),
    "data show": ("moba_cp.data.show", "print what tokenized data, or a sequence of it, holds"),
    "bench attention": (
        "moba_cp.bench.commands.attention",
        "time MoBA on one GPU beside dense attention",
    ),
    "bench cluster": ("moba_cp.bench.commands.cluster", "measure attention over several ranks"),
    "bench exchange": (
        "moba_cp.bench.commands.exchange",
        "count bytes of each exchange mode for any number of ranks",
    ),
    "bench transformers": (
        "moba_cp.bench.commands.hf",
        "time a model in transformers: a training step, a long prompt, tokens after it",
    ),
    "doctor": ("moba_cp.doctor.command", "check machines, and what lies between ranks; a line each, PASS or FAIL"),
    "verify": ("moba_cp.verify", "hold attention and a training step on these machines against one rank and float64"),
    "experiment switch": ("moba_cp.experiments.command", "train MoBA, full, and MoBA then full; draw the losses"),
    "experiment index-branch": (
        "moba_cp.experiments.index_command",
        "train with blocks that index branches choose, and with full attention; draw the losses",
    ),
    "experiment": ("moba_cp.experiments.grid_command", "the paper's charts from grids of training runs, that resume"),
}

# Command -> a line that runs, for its --help. Commands with an EXAMPLES of their own have none here.
_EXAMPLES = {
    "train": "moba-cp train demo --set data.path=/data/books --set run.directory=runs/books",
    "plan": "moba-cp plan hybrid/llama_8b_1m --gpus 64 --gpu h100",
    "plot": "moba-cp plot runs/books runs/books-full --to runs.png",
    "config": "moba-cp config --section attention",
    "import": "moba-cp import /models/llama --to llama.yaml",
    "export": "moba-cp export runs/books --to /models/books",
    "eval": "moba-cp eval runs/books --sequences 8",
    "generate": "moba-cp generate runs/books --prompt-file question.txt --max-tokens 400",
    "data build": "moba-cp data build /data/books --to tokens/books --workers 4",
    "data show": "moba-cp data show tokens/books --document 0",
    "bench attention": "moba-cp bench attention --json attention.json",
    "bench cluster": "torchrun --nproc-per-node 4 --no-python moba-cp bench cluster --json cluster.json",
    "bench exchange": "moba-cp bench exchange --tokens 65536 --ranks 2,8",
    "bench transformers": "moba-cp bench transformers --json transformers.json",
    "experiment index-branch": "moba-cp experiment index-branch hybrid/index_branch --directory runs/index",
    "experiment switch": "moba-cp experiment switch hybrid/switch_90_10 --directory runs/switch",
}
_EXIT_CODES = """exit codes: 0 done, 1 an error of the run or of this library, 2 a wrong option, config or file,
3 doctor or verify found something wrong, or plan that a run does not fit, 75 asked to stop and saved,
130 interrupted"""

# What users install beside the package itself, in the order in which a missing package is looked for.
_EXTRAS = ("train", "data", "metrics", "hf")
# Modules that PyPI has under another name.
_PYPI_NAMES = {"megatron": "megatron-core", "yaml": "pyyaml"}

# What a value that is given by mistake fills the screen with.
_LONG = re.compile(r"(\S{200})\S{250,}(\S{50})")

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130
# Time for the launcher to end this rank if another rank failed first: that rank's error is the one worth reading.
_SECONDS_FOR_OTHERS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Run ``moba-cp`` with ``argv`` (default: the process's arguments); returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    words = _command(argv)
    if words is None:
        return _help(argv)
    parser = _Parser(prog=f"moba-cp {words}", description=_sentence(COMMANDS[words][1]), allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from"
    )
    show_traceback = "--traceback" in argv or bool(os.environ.get("MOBA_CP_TRACEBACK"))
    try:
        module = importlib.import_module(COMMANDS[words][0])
        module.add_arguments(parser)
        parser.epilog = getattr(module, "EXAMPLES", None) or f"example:\n  {_EXAMPLES[words]}\n\n{_EXIT_CODES}"
        arguments = parser.parse_args(argv[len(words.split()) :])
        return module.main(arguments)
    except KeyboardInterrupt as interrupt:
        return _fail(words, str(interrupt) or "interrupted", INTERRUPTED)
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        return _fail(words, _describe(error), USER_ERROR if isinstance(error, (ValueError, OSError)) else BUG)


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises ValueError for a wrong option, which is then reported in one line."""

    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


def _command(argv: list[str]) -> str | None:
    """The longest beginning of ``argv`` that names a command."""
    for count in (2, 1):
        if " ".join(argv[:count]) in COMMANDS:
            return " ".join(argv[:count])
    return None


def _help(argv: list[str]) -> int:
    """Answer a command line that names no command: list the commands, or those that begin with its first word."""
    if argv[:1] == ["--version"]:
        print(f"moba-cp {__version__}")
        return 0
    group = argv[0] if argv and any(words.startswith(f"{argv[0]} ") for words in COMMANDS) else ""
    listed = {words: text for words, (_, text) in COMMANDS.items() if words.startswith(group)}
    rest = argv[1:] if group else argv
    if rest and rest[0] not in ("-h", "--help"):
        print(f"moba-cp: {' '.join(argv[:2])!r} is not a command; use one of: {', '.join(listed)}", file=sys.stderr)
        return USER_ERROR
    width = max(map(len, listed))
    print(f"usage: {' '.join(['moba-cp', *group.split()])} COMMAND ...", "", "commands:", sep="\n")
    print(*(f"  {words.ljust(width)}  {text}" for words, text in listed.items()), sep="\n")
    print("", "moba-cp COMMAND --help tells the options of one, with an example", "", _EXIT_CODES, sep="\n")
    return 0


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("moba_cp"):
        return f"needs the package {error.name}; install with: {_how_to_install(error.name or '')}"
    if isinstance(error, FileNotFoundError) and error.filename:
        folder = Path(os.fsdecode(error.filename)).parent
        return f"{error.filename}: no such file" + ("" if folder.is_dir() else f", and no folder {folder}")
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip() if lines else ""
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _how_to_install(module: str) -> str:
    """The command that installs what ``module`` belongs to. moba-cp is not on PyPI: its extra works in a checkout."""
    module = module.partition(".")[0]
    package = _PYPI_NAMES.get(module, module)
    try:
        requirements = [text.partition(";") for text in importlib.metadata.requires("moba-cp") or ()]
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for extra in _EXTRAS:
        of_extra = [name.strip() for name, _, marker in requirements if f"{extra!r}" in marker.replace('"', "'")]
        if not any(name.lower().startswith(package) for name in of_extra):
            continue
        checkout = Path(__file__).parents[1]
        if (checkout / "setup.cfg").is_file():
            return f'pip install -c constraints.txt -e ".[{extra}]" in {checkout}'
        return "pip install " + " ".join(f"'{name}'" for name in of_extra)
    return f"pip install {package}"


def _fail(words: str, text: str, code: int) -> int:
    """Print ``text`` as one line and end; does not return where there are several ranks."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and (rank != 0 or _of_another_rank(text)):
        # Usually all ranks have the same error, or this error follows from another rank's: one line is enough.
        # A rank that has ended with an error of its own has said it: where a launcher is slow, this one need not.
        time.sleep(_SECONDS_FOR_OTHERS * (4 if " ended at step " in text else 1))
    place = f" (rank {rank})" if rank else ""
    # Names of files need not be text.
    text = _LONG.sub(r"\1...\2", text.encode("utf-8", "backslashreplace").decode())
    print(f"moba-cp {words}{place}: error: {text}", file=sys.stderr, flush=True)
    if size > 1:
        # Other ranks may wait in a collective, and closing the process group would wait for them.
        sys.stdout.flush()
        os._exit(code)
    return code


def _of_another_rank(text: str) -> bool:
    """Whether an error is that a peer went away."""
    return any(
        word in text for word in ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo", "RankLost")
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


if __name__ == "__main__":
    sys.exit(main())
