"""Tokenized documents in a pair of files, PREFIX.bin and PREFIX.idx: Megatron-core's IndexedDataset.

PREFIX.bin holds the tokens of all documents one behind another. PREFIX.idx holds ``MMIDIDX\\0\\0``, the version 1
(uint64), the code of the dtype (uint8), the numbers of sequences and of document boundaries (uint64 each), the length
of each sequence (int32), where each begins in PREFIX.bin (int64, bytes), and the first sequence of each document with
the number of sequences last (int64). A document may consist of several sequences, as Megatron-LM's
preprocess_data.py makes them of sentences; they lie behind one another. Megatron-core reads and writes the same, but
imports PyTorch, checks by ``assert``, and notices a truncated file only where it is read.
"""

import json
import os
import struct
from functools import cached_property
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
MASK = "_mask"


def prefix_of(path: str | Path) -> Path | None:
    """PREFIX, if ``path`` is PREFIX, PREFIX.bin or PREFIX.idx of a pair of files; else None."""
    path = Path(path).expanduser()
    if path.suffix in (".bin", ".idx") and path.is_file():
        path = path.with_suffix("")
        return path if _with(path, ".idx").is_file() or _with(path, ".bin").is_file() else None
    return path if _with(path, ".idx").is_file() and not path.is_dir() else None


class IndexedDocuments:
    """The documents of a pair of files; tokens are read when asked for.

    Args:
        prefix: PREFIX.

    Raises:
        ValueError: a file is missing, is no such file, or is shorter than the other one says.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        index, self._bin = _with(self.prefix, ".idx"), _with(self.prefix, ".bin")
        self.paths = index, self._bin
        for file in (index, self._bin):
            if not file.is_file():
                raise ValueError(f"{file}: no such file; {self.prefix} needs both its .bin and its .idx")
        with open(index, "rb") as stream:
            head = stream.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise ValueError(f"{index}: not the index of an IndexedDataset; build it again")
        _, version, code, n_sequences, n_bounds = _HEADER.unpack(head)
        if version != 1 or code not in _DTYPES:
            raise ValueError(f"{index}: version {version}, dtype {code}: not tokens that can be read; build it again")
        size = _HEADER.size + 12 * n_sequences + 8 * n_bounds
        if index.stat().st_size < size:
            raise ValueError(f"{index}: truncated, {index.stat().st_size} of {size} bytes; build it again")
        self.dtype = np.dtype(_DTYPES[code])
        mapped = np.memmap(index, np.uint8, "r")
        lengths = mapped[_HEADER.size :][: 4 * n_sequences].view(np.int32)
        bounds = mapped[_HEADER.size + 12 * n_sequences :][: 8 * n_bounds].view(np.int64)
        if n_bounds < 1 or bounds[0] != 0 or bounds[-1] != n_sequences:
            raise ValueError(f"{index}: its documents do not cover its sequences; build it again")
        ends = np.cumsum(lengths, dtype=np.int64)
        self.n_tokens = int(ends[-1]) if n_sequences else 0
        if self._bin.stat().st_size < self.n_tokens * self.dtype.itemsize:
            last = int(np.searchsorted(ends, self._bin.stat().st_size // self.dtype.itemsize, side="right"))
            raise ValueError(
                f"{self._bin}: truncated, {self._bin.stat().st_size} of {self.n_tokens * self.dtype.itemsize} bytes; "
                f"document {int(np.searchsorted(bounds, last, side='right')) - 1} is not whole: build it again"
            )
        starts = np.concatenate([[0], ends])[bounds]
        self.starts = starts[:-1]
        """[n] int64, first token of each document in PREFIX.bin."""
        self.lengths = np.diff(starts)
        """[n] int64, tokens of each document."""

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, mapped: only what is used is read."""
        if not self.n_tokens:
            return np.zeros(0, self.dtype)
        return np.memmap(self._bin, self.dtype, "r", shape=(self.n_tokens,))

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``[start, stop)`` of a document."""
        first = int(self.starts[document])
        return self.tokens[first + start : first + stop]

    @cached_property
    def description(self) -> dict:
        """What ``moba-cp data build`` wrote beside them; {} for files made by something else."""
        file = _with(self.prefix, ".json")
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError:
            raise ValueError(f"{file}: not JSON; build it again, or remove it") from None


def write_index(prefix: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write PREFIX.idx for documents of these ``lengths`` [n] that PREFIX.bin holds one behind another."""
    n = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    partial = _with(prefix, ".idx.partial")
    with open(partial, "wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, _CODES[np.dtype(dtype)], n, n + 1))
        stream.write(np.ascontiguousarray(lengths, "<i4").tobytes())
        stream.write(((ends - lengths) * np.dtype(dtype).itemsize).astype("<i8").tobytes())
        stream.write(np.arange(n + 1, dtype="<i8").tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(_with(prefix, ".idx"))


def _with(prefix: Path, suffix: str) -> Path:
    """PREFIX with something behind it; dots in its name stay."""
    return prefix.with_name(prefix.name + suffix)
