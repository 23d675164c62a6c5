"""Long documents that any machine has: the sources of its Python, package by package.

A package's files, one behind another in the order of their paths, each under a line that names it, are one text, in
which names defined in one file are used in others thousands of bytes later. It is cut into documents of exactly the
length that a run trains on; what is left at the end is dropped. Tokens are bytes, or those of a tokenizer that is made
for the text (:mod:`.tokens`). Folders, not files, are held out for validation, and others for fine-tuning, by the hash
of their path.
"""

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from ..data.indexed import MASK, write_index
from .tokens import Bytes, Pieces, token_mask, train_tokenizer

TRAINING, TUNING, VALIDATION = "training", "tuning", "validation"
TUNING_VALIDATION = "tuning_validation"
DESCRIPTION = "corpus.json"
# Share of the folders of each split but training.
_SHARES = {VALIDATION: 0.04, TUNING: 0.08, TUNING_VALIDATION: 0.03}
_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3")
# Bytes of a line in the mean: more is a table or was made by a program.
_LONGEST_LINES = 120
# A text in three quotes that begins a line: what describes a module, a class or a function.
_DOCSTRING = re.compile(rb"^[ \t]*[rRuU]?(\"\"\"|''')(.+?)\1", re.MULTILINE | re.DOTALL)


def installed_sources() -> tuple[Path, ...]:
    """The standard library and the folder of installed packages that PyTorch is in."""
    return Path(sysconfig.get_path("stdlib")), Path(torch.__file__).resolve().parents[1]


def build_corpora(
    folder: Path,
    lengths: Iterable[int],
    roots: Iterable[Path],
    pattern: str = "*.py",
    most: int | None = None,
    held_out: int | None = None,
    vocabulary: int | None = None,
) -> dict:
    """Write ``folder/LENGTH/SPLIT`` (.bin and .idx) for each length and split, unless they are there.

    Args:
        folder: where they go.
        lengths: tokens of a document; the text of the shorter ones is that of the longest one.
        roots: folders whose subfolders are packages.
        pattern: which files.
        most: bytes of text to take; None for all.
        held_out: of the longest length, documents of each validation, spread evenly; None for all.
        vocabulary: tokens of a tokenizer that is trained on the training split; None for bytes.

    Returns:
        what ``corpus.json`` in the folder says: for each split tokens, bytes, documents by length, and a hash; the
        packages with most text; the bytes of a package's text in the median and at the most.

    Raises:
        ValueError: a split has less than one document.
    """
    lengths = sorted(lengths)
    asked = {"lengths": lengths, "roots": [str(root) for root in roots], "pattern": pattern, "most": most}
    asked |= {"held_out": held_out, "vocabulary": vocabulary}
    description = folder / DESCRIPTION
    if description.is_file() and (known := json.loads(description.read_text()))["asked"] == asked:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    splits = (TRAINING, TUNING, VALIDATION, TUNING_VALIDATION)
    packages: dict[str, list[list[bytes]]] = {split: [] for split in splits}
    sizes: dict[str, int] = {}
    taken = 0
    for package, files in groupby(_files(roots, pattern), key=lambda file: file[0]):
        texts: dict[str, list[bytes]] = {split: [] for split in splits}
        for _, name, content in files:
            texts[_split_of(name)].append(b"# file: %s\n%s\n" % (name.encode("utf-8", "replace"), content))
        if most is not None and taken >= most:
            break
        sizes[package] = sum(len(text) for part in texts.values() for text in part)
        taken += sizes[package]
        for split, parts in texts.items():
            packages[split].append(parts)
    if vocabulary is None:
        tokenizer: Bytes | Pieces = Bytes()
    else:
        train_tokenizer(folder, [file for parts in packages[TRAINING] for file in parts], vocabulary)
        tokenizer = Pieces(folder)
    facts = {"asked": asked, "splits": {}}
    for split, its in packages.items():
        encoded = [tokenizer.encode(parts) for parts in its if parts]
        tokens = np.concatenate([one[: len(one) // lengths[-1] * lengths[-1]] for one in encoded] or [np.empty(0)])
        if split.endswith(VALIDATION) and held_out is not None:
            tokens = _spread(tokens, lengths[-1], held_out)
        if not len(tokens):
            raise ValueError(
                f"the sources of {', '.join(asked['roots'])}: {split} has less than one document of {lengths[-1]} "
                f"{tokenizer.unit}; name folders with more text (--data)"
            )
        facts["splits"][split] = _write_split(folder, split, lengths, tokens, tokenizer)
    by_size = sorted(sizes.items(), key=lambda item: -item[1])
    facts |= {
        "packages": len(sizes),
        "largest": dict(by_size[:10]),
        "package_bytes": {"median": int(np.median(list(sizes.values()))), "most": by_size[0][1]},
    }
    partial = description.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    partial.replace(description)
    return json.loads(description.read_text())


def _spread(tokens: np.ndarray, length: int, most: int) -> np.ndarray:
    """``most`` of the documents of ``length`` tokens, evenly spread, if there are more; else all."""
    documents = tokens.reshape(-1, length)
    n = len(documents)
    return documents[[i * n // most for i in range(most)]].ravel() if n > most else tokens


def corpus_lines(facts: dict) -> list[str]:
    """What :func:`build_corpora` says, for people."""
    splits, unit = facts["splits"], "bytes" if facts["asked"]["vocabulary"] is None else "tokens"
    lines = [
        f"text: {sum(x['bytes'] for x in splits.values()) / 1e6:.1f} MB of {facts['packages']} packages, the largest "
        + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in list(facts["largest"].items())[:5])
        + f" MB; a package has {facts['package_bytes']['median'] / 1e3:.0f} kB in the median"
    ]
    for name, split in splits.items():
        documents = ", ".join(f"{count} of {int(length):,} {unit}" for length, count in split["documents"].items())
        wide = f" of {split['bytes'] / split['tokens']:.3f} bytes" if unit == "tokens" else ""
        lines.append(
            f"{name}: {split['tokens'] / 1e6:.1f} M {unit}{wide}, documents: {documents}; hash {split['hash']}"
        )
    return lines


def _files(roots: Iterable[Path], pattern: str) -> Iterator[tuple[str, str, bytes]]:
    """Package, path and content of each file, in the order of packages and paths; no content comes twice."""
    seen = set()
    for root in roots:
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder; name one with subfolders of text")
        # Files at the top are one package together.
        for top in sorted(root.iterdir(), key=lambda path: (path.is_dir(), path.name)):
            if top.name.startswith(".") or top.name in _LEFT_OUT:
                continue
            for path in [top] if top.is_file() else _walk(top):
                if not path.match(pattern):
                    continue
                try:
                    content = path.read_bytes()
                    content.decode("utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                digest = hashlib.blake2b(content, digest_size=16).digest()
                if digest in seen or len(content) > _LONGEST_LINES * (content.count(b"\n") + 1):
                    continue
                seen.add(digest)
                package = top.name if top.is_dir() else root.name
                yield package, str(path.relative_to(root)), content


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _LEFT_OUT)
        yield from (Path(place, name) for name in sorted(names))


def _split_of(name: str) -> str:
    """By the folder of a file, and for files at the top, which are modules, by the file."""
    folder = str(Path(name).parent)
    key = hashlib.blake2b((name if folder == "." else folder).encode("utf-8", "replace"), digest_size=8).digest()
    at = int.from_bytes(key, "big") / 2**64
    for split, share in _SHARES.items():
        if at < share:
            return split
        at -= share
    return TRAINING


def _write_split(folder: Path, split: str, lengths: list[int], tokens: np.ndarray, tokenizer: Bytes | Pieces) -> dict:
    """Write a split for each length; returns its facts."""
    widths = tokenizer.widths(tokens)
    text_bytes = int(widths.sum())
    mask = None
    if split.startswith(TUNING):
        mask = token_mask(widths, docstring_mask(tokenizer.text(tokens)))
    described = {
        "tokens": tokenizer.describe(),
        "n_tokens": len(tokens),
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes / len(tokens),
        "mask": mask is not None,
        "inputs": ["Python sources"],
    }
    for length in lengths:
        _write(folder / str(length) / split, tokens, length, mask, described)
    return {
        "bytes": text_bytes,
        "tokens": len(tokens),
        "documents": {n: len(tokens) // n for n in lengths},
        "hash": hashlib.sha256(tokens.tobytes()).hexdigest()[:16],
    }


def _write(prefix: Path, tokens: np.ndarray, length: int, mask: np.ndarray | None, described: dict) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.full(len(tokens) // length, length, np.int32)
    tokens.tofile(prefix.with_name(prefix.name + ".bin"))
    if mask is not None:
        beside = prefix.with_name(prefix.name + MASK)
        mask.tofile(beside.with_name(beside.name + ".bin"))
        write_index(beside, lengths, np.dtype(np.uint8))
    text = json.dumps(described | {"documents": len(lengths)}) + "\n"
    prefix.with_name(prefix.name + ".json").write_text(text, encoding="utf-8")
    write_index(prefix, lengths, tokens.dtype)


def docstring_mask(text: bytes) -> np.ndarray:
    """[len(text)] uint8: 1 for what stands in the three quotes of docstrings, and the quotes that end it."""
    mask = np.zeros(len(text), np.uint8)
    for found in _DOCSTRING.finditer(text):
        mask[found.start(2) : found.end()] = 1
    return mask
