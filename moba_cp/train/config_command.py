"""``moba-cp config``: every key of a training config, or a config with all that it leaves out."""

import argparse
import sys

from .command import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="print this file, or packaged one, with "
                        "all keys (default: explain the keys)")  # fmt: skip
    add_overrides(parser)
    parser.add_argument("--section", metavar="NAME", help="explain only the keys with this beginning")
    parser.add_argument("--markdown", action="store_true", help="explain as docs/config.md does")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    if arguments.config is not None or arguments.overrides:
        from .config import TrainConfig
        from .yaml_config import load, to_yaml

        if arguments.config is None:
            raise ValueError("--set without CONFIG: name the file whose values it replaces")
        if arguments.section is not None or arguments.markdown:
            raise ValueError("CONFIG with --section or --markdown: these explain keys, and CONFIG is printed whole")
        print(to_yaml(load(TrainConfig, arguments.config, arguments.overrides)), end="")
        return 0
    from .config_keys import all_keys, as_markdown, as_text

    keys = all_keys()
    if arguments.section is not None:
        chosen = [key for key in keys if (key.path + ".").startswith(arguments.section.rstrip(".") + ".")]
        chosen = chosen or [key for key in keys if key.path.startswith(arguments.section)]
        if not chosen:
            names = ", ".join(key.path for key in keys if key.is_section)
            raise ValueError(f"--section={arguments.section}: no such section or key; use one of {names}")
        keys = chosen
    sys.stdout.write(as_markdown(keys) if arguments.markdown else as_text(keys) + "\n")
    return 0
