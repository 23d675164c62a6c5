"""What commands write: a name that cannot be written, or is taken, is refused before the work is done."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path


def output_file(suffix: str) -> Callable[[str], Path]:
    """The type of an option that names a file to write, or to replace, whose name ends in ``suffix``."""

    def checked(text: str) -> Path:
        path = Path(text)
        # Such as /dev/stdout, or a pipe.
        if path.exists() and not path.is_file() and not path.is_dir():
            return path
        # A mistyped name must not replace a document by a picture.
        if path.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {suffix}; name a file that does")
        # Of several ranks the first one writes, and other machines need not have its folders.
        if os.environ.get("RANK", "0") != "0":
            return path
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}; make it first")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise argparse.ArgumentTypeError(f"{text!r}: {str(path.parent)!r} is not writable; name another folder")
        return path

    return checked


def check_writable(name: str, folder: Path) -> None:
    """Raise ValueError unless files can be written into ``folder``, which is made if need be; makes nothing itself.

    Args:
        name: the option or key that names the folder, for the message.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{name}={folder}: {'' if there == folder else f'{there} '}is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={folder}: {there} is not writable; name another folder, or make it writable")


def check_new(name: str, folder: Path, overwrite: bool) -> None:
    """Raise ValueError unless a model can be written into ``folder``, which is empty or ``overwrite`` is given.

    Args:
        name: as in :func:`check_writable`.
    """
    check_writable(name, folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{name}={folder}: holds files; name another folder, or replace a model in it (--overwrite)")
