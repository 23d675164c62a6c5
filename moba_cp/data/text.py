"""Documents: the files that training reads, and which of them are held out.

A document is a file (or, where there is only one file, a part of it), read as bytes: token = byte, vocabulary 256.
Only sizes and the first bytes are read up front, so a corpus may be larger than memory. The first bytes show which
files are no text (compressed, images, UTF-16).
"""

import hashlib
import json
import os
import sysconfig
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from .config import DataConfig

VOCABULARY = 256
# Enough bytes to tell files apart, few enough to read them from many files.
_HEAD_BYTES = 65536
_NOT_STANDARD_LIBRARY = ("site-packages", "dist-packages", "__pycache__")
# The first bytes of file formats that are no text -> the format.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"%PDF": "PDF",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_UNREADABLE = "not readable"
# What a folder of `moba-cp train` holds from its first step on.
_RUN_FILES = ("log.jsonl", "config.yaml", "versions.json")


@dataclass(frozen=True)
class Document:
    """``length`` bytes of the file ``path``, from byte ``start``."""

    path: Path
    start: int
    length: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes ``[start, stop)`` of the document as [stop - start] uint8."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start + start)
                data = file.read(stop - start)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from None
        if len(data) != stop - start:
            raise ValueError(f"{self.path}: became shorter while training; it had {self.start + self.length} bytes")
        return np.frombuffer(data, dtype=np.uint8)


@dataclass(frozen=True)
class Corpus:
    """Training and validation documents, each in a fixed order, and a fingerprint that changes when they do."""

    source: str
    training: tuple[Document, ...]
    validation: tuple[Document, ...]
    fingerprint: str
    left_out: tuple[tuple[str, int], ...] = ()
    """Why files were left out, and how many; the most frequent first."""
    json_lines: int = 0
    """Files that hold JSON objects line by line; their keys, quotes and escapes are trained on too."""

    @property
    def training_bytes(self) -> int:
        return sum(document.length for document in self.training)

    @property
    def validation_bytes(self) -> int:
        return sum(document.length for document in self.validation)


def open_corpus(config: DataConfig, run_folder: Path | None = None) -> Corpus:
    """Find the documents and hold out ``validation_share`` of them.

    The hash of a file's size and first bytes decides whether it is held out, not its name or order: copies of a file
    are never on both sides, and adding files moves no others. Of a single file the tail is held out.

    Args:
        config: where the files are.
        run_folder: the folder of the run that is to read them. What it holds is never data.

    Raises:
        ValueError: nothing readable is there, everything is empty, there is less than one sequence on either side, or
            the data is what the run would write into.
    """
    root, files = _find_files(config, run_folder)
    digest, keyed, left_out, json_lines = hashlib.blake2b(digest_size=16), [], Counter(), 0
    for path in files:
        head, size, problem = _read_head(path)
        if problem is not None and (config.not_text != "take" or problem == _UNREADABLE):
            if config.not_text == "refuse":
                raise ValueError(
                    f"{path}: {problem}, no text; remove it, narrow data.pattern or set data.not_text: skip"
                )
            left_out[problem] += 1
            continue
        key = int.from_bytes(hashlib.blake2b(b"%d\0" % size + head, digest_size=8).digest(), "big")
        digest.update(f"{path.relative_to(root)}\0{size}\0{key}\n".encode("utf-8", "surrogateescape"))
        if size:
            json_lines += _is_json_lines(head)
            keyed.append((key, Document(path, 0, size)))
    if not keyed:
        raise ValueError(f"data.path={_source(config)}: {_why_nothing(len(files), left_out)}")

    if config.validation_share == 0:
        training, validation = [document for _, document in keyed], []
    elif len(keyed) == 1:
        whole = keyed[0][1]
        cut = whole.length - max(1, round(whole.length * config.validation_share))
        training, validation = [Document(whole.path, 0, cut)], [Document(whole.path, cut, whole.length - cut)]
    else:
        # With few files, all or none may fall below the share: put at least one file on either side.
        keys = sorted({key for key, _ in keyed})
        below = bisect_left(keys, int(config.validation_share * 2**64))
        bound = keys[min(max(below, 1), len(keys) - 1)]
        training = [document for key, document in keyed if key >= bound]
        validation = [document for key, document in keyed if key < bound]
    counts = tuple(left_out.most_common())
    corpus = Corpus(_source(config), tuple(training), tuple(validation), digest.hexdigest(), counts, json_lines)
    _check_length(config, corpus)
    return corpus


def _check_length(config: DataConfig, corpus: Corpus) -> None:
    if corpus.training_bytes < config.seq_len:
        raise ValueError(
            f"data.path={corpus.source}: {corpus.training_bytes} bytes to train on are fewer than one sequence, "
            f"data.seq_len={config.seq_len}; give more text or a smaller seq_len"
        )
    if config.validation_share and corpus.validation_bytes < config.seq_len:
        raise ValueError(
            f"data.path={corpus.source}: {corpus.validation_bytes} validation bytes are fewer than one sequence, "
            f"data.seq_len={config.seq_len}; raise data.validation_share, set it to 0, or give more text"
        )


def _find_files(config: DataConfig, run_folder: Path | None) -> tuple[Path, list[Path]]:
    """The folder that paths are relative to, and the files in a fixed order, those of training runs left out."""
    standard_library = config.path is None
    root = Path(sysconfig.get_path("stdlib") if standard_library else config.path).expanduser().absolute()
    pattern = config.pattern or ("*.py" if standard_library else "*")
    if not root.exists():
        raise ValueError(f"data.path={root}: no such file or folder")
    own = run_folder.absolute().resolve() if run_folder is not None else None
    if own == root.resolve():
        raise ValueError(
            f"data.path={root}: is run.directory too, where the run writes; name another folder for the run"
        )
    if not root.is_dir():
        return root.parent, [root]
    files = []
    for folder, folders, names in os.walk(root, onerror=_refuse):
        if folder != str(root) and (Path(folder).resolve() == own or set(_RUN_FILES) <= set(names)):
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _NOT_STANDARD_LIBRARY)
        files += [Path(folder, n) for n in names if not n.startswith(".") and fnmatch(n, pattern)]
    if not files:
        raise ValueError(f"data.path={root}: no file there matches data.pattern={pattern!r}")
    return root, sorted(files, key=lambda path: path.relative_to(root).parts)


def _read_head(path: Path) -> tuple[bytes, int, str | None]:
    """The first bytes of a file, its size, and what it is if it is no text that can be read."""
    try:
        # Opening a pipe or a device could block forever.
        if not path.is_file():
            return b"", 0, _UNREADABLE
        with open(path, "rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(_HEAD_BYTES)
    except OSError:
        return b"", 0, _UNREADABLE
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    return head, size, kind or ("binary" if b"\0" in head else None)


def _is_json_lines(head: bytes) -> bool:
    if not head.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(head.partition(b"\n")[0]), dict)
    except ValueError:
        return False


def _why_nothing(n_files: int, left_out: Counter) -> str:
    if n_files == 1 and left_out:
        (kind,) = left_out
        return f"{kind}, no text; give text, or set data.not_text: take to train on its bytes"
    kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
    if not left_out:
        return f"all {n_files} files are empty; give text"
    return f"none of {n_files} files is text ({kinds}); give text, or set data.not_text: take to train on their bytes"


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _source(config: DataConfig) -> str:
    return config.path if config.path is not None else "null (the standard library)"
