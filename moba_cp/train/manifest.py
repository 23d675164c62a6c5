"""What a checkpoint's folder has to hold, byte for byte: size and SHA-256 of every file, by the rank that wrote it.

``manifest.json`` is one JSON object and, as a last line, the SHA-256 of the lines before it, so that damage to the
manifest is damage too. A hash finds accidents; it does not say who wrote a file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_CHUNK = 1 << 24


class Damage(ValueError):
    """A checkpoint is not what was written; the message names the file."""


def entry(path: Path, rank: int) -> dict[str, Any]:
    """What the manifest says of the file ``path``, which ``rank`` wrote."""
    return {"size": path.stat().st_size, "sha256": _sha256(path), "rank": rank}


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write ``content``, whose ``files`` are entries by name, as the manifest of ``folder``; it is on the disk when
    this returns."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_synced(folder / NAME, text + hashlib.sha256(text.encode()).hexdigest() + "\n")
    sync_folder(folder)


def read(folder: Path) -> dict[str, Any]:
    """The content of the manifest of ``folder``.

    Raises:
        Damage: it is not there, or not as it was written.
    """
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise Damage(f"{folder / NAME}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Damage(f"{folder / NAME}: is damaged") from None
    text = "".join(lines[:-1])
    if not lines or lines[-1] != hashlib.sha256(text.encode()).hexdigest() + "\n":
        raise Damage(f"{folder / NAME}: is damaged")
    return json.loads(text)


def check_sizes(folder: Path, content: dict[str, Any]) -> None:
    """Raise Damage unless each file of the manifest is there in its size; quick."""
    for name, expected in content["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise Damage(f"{folder / name}: {error.strerror}") from None
        if size != expected["size"]:
            raise Damage(f"{folder / name}: has {size} bytes, {expected['size']} were written")


def check_hashes(folder: Path, content: dict[str, Any], part: int = 0, parts: int = 1) -> None:
    """Raise Damage unless every file of the manifest, or one part of ``parts`` of them, holds what was written."""
    # The largest first, so that parts are about equal.
    names = sorted(content["files"], key=lambda name: (-content["files"][name]["size"], name))
    for name in names[part::parts]:
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise Damage(f"{folder / name}: {error.strerror}") from None
        if found != content["files"][name]["sha256"]:
            raise Damage(f"{folder / name}: holds other bytes than were written (SHA-256 {found[:12]}...)")


def write_synced(path: Path, text: str) -> None:
    """Write ``text`` into ``path``; it is on the disk when this returns."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
