"""Files of documents, cut into units of work: text, JSON lines (compressed too) and Parquet.

A unit is so small that one that is lost costs seconds: a range of bytes of a JSONL file, some row groups of a Parquet
file, or some text files. The document of a line belongs to the unit in which the line begins.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

UNIT_BYTES = 16 * 2**20
_JSONL = (".jsonl", ".ndjson", ".json")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
# What some programs put in front of UTF-8; it belongs to no document.
_SIGNATURE = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Unit:
    """Work for one process."""

    kind: str
    """``text``, ``jsonl`` or ``parquet``."""
    files: tuple[str, ...]
    """One, or several text files."""
    start: int
    """First byte or row group of the file."""
    stop: int
    """One behind the last; -1 for a file that can only be read from its beginning."""
    size: int
    """Bytes on the disk, for the progress."""


@dataclass(frozen=True)
class Document:
    """One document of an input file."""

    line: int
    """Of the file, counted from 1; in JSONL from the unit's first."""
    text: str
    learned: list[tuple[int, int]] | None
    """The ranges of characters that a loss is taken of; None: no such field was asked for."""


@dataclass(frozen=True)
class Bad:
    """A document that cannot be used."""

    file: str
    line: int
    reason: str


def find_units(paths: list[str], pattern: str | None, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The units of all files that ``paths`` name or hold, in the order given, folders sorted by name.

    Raises:
        ValueError: a path is not there, or nothing matches.
    """
    units: list[Unit] = []
    texts: list[str] = []
    size = 0

    def close_texts() -> None:
        nonlocal texts, size
        if texts:
            units.append(Unit("text", tuple(texts), 0, -1, size))
        texts, size = [], 0

    for file in _files(paths, pattern):
        kind, length = _kind(file), os.path.getsize(file)
        if kind == "text":
            if size + length > unit_bytes:
                close_texts()
            texts.append(file)
            size += length
            continue
        close_texts()
        if kind == "parquet":
            units += _row_groups(file, unit_bytes)
        elif _suffix(file) in _COMPRESSED:
            units.append(Unit("jsonl", (file,), 0, -1, length))
        else:
            starts = range(0, max(length, 1), unit_bytes)
            units += [
                Unit("jsonl", (file,), a, min(a + unit_bytes, length), min(unit_bytes, length - a)) for a in starts
            ]
    close_texts()
    return units


def read_unit(unit: Unit, field: str, mask_field: str | None) -> Iterator[Document | Bad]:
    """The documents of a unit, and what is wrong with the others, in the order of the file.

    Raises:
        ValueError: a file is damaged, so that what comes behind cannot be read.
        OSError: a file cannot be opened.
    """
    if unit.kind == "text":
        for file in unit.files:
            yield _decoded(file, None, Path(file).read_bytes())
        return
    if unit.kind == "parquet":
        yield from _read_rows(unit, field, mask_field)
        return
    try:
        yield from _read_lines(unit, field, mask_field)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(unit.files[0], error) from None


def count_lines(file: str, stop: int) -> int:
    """Line breaks in the first ``stop`` bytes of a file."""
    count, left = 0, stop
    with open(file, "rb") as stream:
        while left and (data := stream.read(min(left, 2**24))):
            count += data.count(b"\n")
            left -= len(data)
    return count


def first_line_of(unit: Unit) -> int:
    """How many lines of its file stand before a unit of JSONL."""
    if unit.kind != "jsonl" or unit.start == 0:
        return 0
    with open(unit.files[0], "rb") as stream:
        stream.seek(unit.start - 1)
        stream.readline()
        return count_lines(unit.files[0], stream.tell())


def lines_in(unit: Unit) -> int:
    """Lines that begin in a unit of JSONL."""
    if unit.stop < 0:
        return 0
    # A line begins behind each line break, and at the file's beginning.
    first = max(unit.start - 1, 0)
    with open(unit.files[0], "rb") as stream:
        stream.seek(first)
        return stream.read(max(unit.stop - 1 - first, 0)).count(b"\n") + (unit.start == 0)


def _files(paths: list[str], pattern: str | None) -> list[str]:
    found: list[str] = []
    for name in paths:
        path = Path(name).expanduser()
        if not path.exists():
            raise ValueError(f"{name}: no such file or folder")
        if not path.is_dir():
            found.append(str(path))
            continue
        for folder, folders, names in os.walk(path, onerror=_refuse):
            folders[:] = sorted(x for x in folders if not x.startswith("."))
            names = sorted(x for x in names if not x.startswith(".") and fnmatch(x, pattern or "*"))
            found += [os.path.join(folder, x) for x in names if os.path.isfile(os.path.join(folder, x))]
    if not found:
        raise ValueError(f"{', '.join(paths)}: no file there matches {pattern or '*'!r}")
    twice = {x for x in found if found.count(x) > 1} if len(found) < 10_000 else set()
    if twice:
        raise ValueError(f"{min(twice)}: named twice; its documents would be in the data twice")
    return found


def _refuse(error: OSError) -> None:
    raise error


def _suffix(file: str) -> str:
    return Path(file).suffix.lower()


def _kind(file: str) -> str:
    last = _suffix(file)
    suffix = _suffix(Path(file).stem) if last in _COMPRESSED else last
    if last in _COMPRESSED and suffix not in _JSONL:
        raise ValueError(
            f"{file}: compressed, and not JSON lines by its name; unpack it first, or name it .jsonl{last}"
        )
    return "parquet" if suffix == ".parquet" else "jsonl" if suffix in _JSONL else "text"


def _row_groups(file: str, unit_bytes: int) -> list[Unit]:
    metadata = _parquet(file).metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    units, start, size = [], 0, 0
    for i, n in enumerate(sizes):
        if size and size + n > 2 * unit_bytes:
            units.append(Unit("parquet", (file,), start, i, size))
            start, size = i, 0
        size += n
    return [*units, Unit("parquet", (file,), start, len(sizes), size)] if sizes else []


def _parquet(file: str):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def _lines(unit: Unit) -> Iterator[bytes]:
    (file,) = unit.files
    with _open(file) as stream:
        if unit.stop < 0:
            yield from stream
            return
        if unit.start:
            # The line in which the unit begins belongs to the one before, unless it begins exactly here.
            stream.seek(unit.start - 1)
            stream.readline()
        at = stream.tell()
        while at < unit.stop and (line := stream.readline()):
            at += len(line)
            yield line


def _open(file: str):
    kind = _COMPRESSED.get(_suffix(file))
    if kind is None:
        return open(file, "rb", buffering=2**20)
    if kind == "gzip":
        return gzip.open(file, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression=kind), 2**20)


def _read_lines(unit: Unit, field: str, mask_field: str | None) -> Iterator[Document | Bad]:
    for number, line in enumerate(_lines(unit), 1):
        if number == 1 and unit.start == 0:
            line = line.removeprefix(_SIGNATURE)
        if line.strip():
            yield _read_json(unit.files[0], number, line, field, mask_field)


def _read_json(file: str, number: int, line: bytes, field: str, mask_field: str | None) -> Document | Bad:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad(file, number, _not_utf8(line, error))
    except ValueError as error:
        return Bad(file, number, f"no JSON: {error}")
    except RecursionError:
        return Bad(file, number, "no JSON that can be read: nested too deeply")
    if not isinstance(record, dict):
        return Bad(file, number, f"a JSON {type(record).__name__}, not an object with fields")
    if field not in record:
        return Bad(file, number, f"no field {field!r}; there are {', '.join(map(repr, list(record)[:8])) or 'none'}")
    return _checked(file, number, record[field], record.get(mask_field) if mask_field else None, field, mask_field)


def _read_rows(unit: Unit, field: str, mask_field: str | None) -> Iterator[Document | Bad]:
    (file,) = unit.files
    parquet = _parquet(file)
    columns = [field, *([mask_field] if mask_field else ())]
    names = parquet.schema_arrow.names
    if missing := [name for name in columns if name not in names]:
        raise ValueError(f"{file}: no column {missing[0]!r}; there are {', '.join(names)}")
    number = sum(parquet.metadata.row_group(i).num_rows for i in range(unit.start))
    for batch in _batches(parquet, unit, columns):
        learned = batch.column(mask_field).to_pylist() if mask_field else [None] * batch.num_rows
        for text, mask in zip(_values(batch.column(field)), learned):
            number += 1
            if isinstance(text, bytes):
                document = _decoded(file, number, text)
                text = document.text if isinstance(document, Document) else None
                if text is None:
                    yield document
                    continue
            yield _checked(file, number, text, mask, field, mask_field)


def _batches(parquet, unit: Unit, columns: list[str]) -> Iterator:
    import pyarrow

    try:
        yield from parquet.iter_batches(256, row_groups=range(unit.start, unit.stop), columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(unit.files[0], error) from None


def _values(column) -> list:
    """Of a column's rows; text as bytes, since nothing has seen to it that it is UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return (column.cast(pyarrow.large_binary()) if is_text else column).to_pylist()


def _damaged(file: str, error: Exception) -> Exception:
    """What to raise where reading a file ends in ``error``."""
    if isinstance(error, OSError) and error.filename:
        return error
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(f"{file}: damaged or cut off ({reason[0]}); get it whole again, or leave it out")


def _checked(file: str, number: int, text: Any, learned: Any, field: str, mask_field: str | None) -> Document | Bad:
    if not isinstance(text, str):
        return Bad(file, number, f"field {field!r} holds {'null' if text is None else type(text).__name__}, not text")
    if not text:
        return Bad(file, number, "empty document")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Bad(file, number, f"half of a surrogate pair at character {error.start}, which is no text")
    if mask_field is None:
        return Document(number, text, None)
    ranges = [] if learned is None else learned
    if not isinstance(ranges, list) or not all(_is_range(x, len(text)) for x in ranges):
        return Bad(
            file, number, f"field {mask_field!r} is no list of [begin, end] within the text's {len(text)} characters"
        )
    return Document(number, text, [tuple(x) for x in ranges])


def _is_range(value: Any, length: int) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(x) is int for x in value)
    return pair and 0 <= value[0] <= value[1] <= length


def _decoded(file: str, row: int | None, data: bytes) -> Document | Bad:
    """The document of a row, or that of a whole file."""
    number, data = row or 1, data.removeprefix(_SIGNATURE)
    if not data:
        return Bad(file, number, "empty document")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Bad(file, number, "UTF-16, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
    try:
        return Document(number, data.decode("utf-8"), None)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1 if row is None else row
        return Bad(file, line, _not_utf8(data, error))


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    column = error.start - data.rfind(b"\n", 0, error.start)
    return f"not UTF-8 (byte 0x{data[error.start]:02x} at column {column})"
