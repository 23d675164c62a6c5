"""Documents into PREFIX.bin and PREFIX.idx, by several processes; a build that was stopped goes on where it was.

While it goes on, PREFIX.build/ holds what is done: each process writes a unit's tokens into a file of their own, and
the first process appends these, in order, to ``tokens.bin`` and notes in ``done.jsonl`` how long that is then. What a
stop leaves behind is cut off to what is noted, so that it costs the units that were being worked on.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np

from .encode import make_encoder
from .indexed import MASK, write_index
from .inputs import Bad, Unit, find_units, first_line_of, lines_in, read_unit

# Bad documents that the report names; all are in PREFIX.bad.jsonl.
_NAMED = 20
# Characters of each unit's first document that are compared with the tokenizers library itself.
_COMPARED = 20_000


@dataclass(frozen=True)
class BuildOptions:
    """What decides the tokens."""

    inputs: tuple[str, ...]
    """Files and folders."""
    prefix: str
    """PREFIX of what is made."""
    tokenizer: str | None = None
    """``tokenizer.json`` or a folder with it; None: bytes."""
    pattern: str | None = None
    """Which files of folders, as a shell pattern for the name; None: all."""
    field: str = "text"
    """Of JSONL and Parquet."""
    mask_field: str | None = None
    """Of JSONL and Parquet: ranges of characters of which a loss is taken."""
    begin: str = "none"
    """Token before each document."""
    end: str = "auto"
    """Token behind each document."""
    bad: str = "skip"
    """Documents that cannot be used: ``skip`` or ``refuse``."""


@dataclass
class Result:
    """What became of a unit; without its tokens, which are in files."""

    documents: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents."""
    lines: int = 0
    """Lines of a unit of JSONL, to place those of the next one."""
    bad: list[Bad] = field(default_factory=list)


@dataclass
class Report:
    """What a build made."""

    documents: int
    tokens: int
    text_bytes: int
    bad: int
    """Documents that were left out."""
    named: list[str]
    """The first of these, with file, line and reason."""
    reasons: dict[str, int]
    seconds: float
    lengths: np.ndarray
    """[documents] int32, tokens of each."""


def build(options: BuildOptions, workers: int, progress: Callable[[int, int], None] | None = None) -> Report:
    """Build PREFIX.bin, .idx and .json, and PREFIX_mask.bin and .idx where there is a mask.

    Args:
        options: what to build.
        workers: processes.
        progress: called with the bytes of input done, and all there are.

    Raises:
        ValueError: the inputs or the tokenizer are not there, or a document is bad and to be refused.
    """
    started = time.monotonic()
    encoder = make_encoder(options.tokenizer, options.begin, options.end)
    units = find_units(list(options.inputs), options.pattern)
    signature = _signature(options, units, encoder.describe())
    journal = Journal(Path(options.prefix), signature, options.mask_field is not None)
    total, done = sum(unit.size for unit in units), sum(unit.size for unit in units[: journal.n_done])
    lines = _lines_before(units, journal)
    for index, result in _results(options, units, journal, workers):
        lines = lines if units[index].start else 0
        result.bad = [Bad(x.file, x.line + lines, x.reason) for x in result.bad]
        journal.append(index, result)
        lines += result.lines
        done += units[index].size
        if progress is not None:
            progress(done, total)
    return _finish(journal, encoder, options, time.monotonic() - started)


class Journal:
    """PREFIX.build/: what is done of a build, so that another one goes on from there.

    Args:
        prefix: PREFIX.
        signature: of the options and inputs; what a build of another one left is removed.
        masked: there is a mask for the tokens.
    """

    def __init__(self, prefix: Path, signature: str, masked: bool):
        self.prefix, self.folder = prefix, prefix.with_name(prefix.name + ".build")
        self.parts = ("tokens", "lengths", *(("mask",) if masked else ()))
        named = self.folder / "signature"
        if self.folder.exists() and (not named.is_file() or named.read_text() != signature):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{prefix}: another build is writing it (it holds {self.folder}/lock)") from None
        named.write_text(signature)
        self._file = self.folder / "done.jsonl"
        self.records = self._read()
        files = {part: self.folder / f"{part}.bin" for part in self.parts}
        ends = {part: sum(record[part] for record in self.records) for part in self.parts}
        if any(ends[part] > (file.stat().st_size if file.is_file() else 0) for part, file in files.items()):
            # What was noted as done is not there, so nothing of it is.
            self._file.unlink()
            self.records, ends = [], dict.fromkeys(files, 0)
        for part, file in files.items():
            with open(file, "ab") as stream:
                stream.truncate(ends[part])

    @property
    def n_done(self) -> int:
        """Units whose tokens are in ``tokens.bin``."""
        return len(self.records)

    def unit_file(self, index: int, part: str) -> Path:
        """Where the process that has unit ``index`` writes its tokens, its mask or its result."""
        return self.folder / f"{index:07d}.{part}"

    def append(self, index: int, result: Result) -> None:
        """Take over the files of unit ``index``, the next one."""
        assert index == self.n_done
        record = asdict(result)
        for part in self.parts:
            file = self.unit_file(index, part)
            record[part] = file.stat().st_size
            with open(file, "rb") as source, open(self.folder / f"{part}.bin", "ab") as target:
                shutil.copyfileobj(source, target, 2**22)
                target.flush()
                os.fsync(target.fileno())
        with open(self._file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.records.append(record)
        for part in (*self.parts, "json"):
            self.unit_file(index, part).unlink()

    def _read(self) -> list[dict]:
        if not self._file.is_file():
            return []
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self._file.write_text("".join(whole), encoding="utf-8")
        return [json.loads(line) for line in whole]


def _results(options: BuildOptions, units: list[Unit], journal: Journal, workers: int) -> Iterator[tuple[int, Result]]:
    """The result of each unit that is not done, in order; processes are a few units ahead."""
    todo = iter(range(journal.n_done, len(units)))
    if workers == 1:
        _start_worker(options)
        for index in todo:
            yield index, _work(units[index], journal.folder, index)
        return
    waiting: dict[int, Future] = {}
    # A process of its own needs no state of this one, whose threads a fork would break.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (options,))
    try:
        following = journal.n_done
        while True:
            # One unit that takes long must not let the others pile up without end.
            while len(waiting) < 4 * workers and (index := next(todo, None)) is not None:
                waiting[index] = pool.submit(_work, units[index], journal.folder, index)
            if following not in waiting:
                return
            wait([waiting[following]], return_when=FIRST_COMPLETED)
            yield following, waiting.pop(following).result()
            following += 1
    except BrokenProcessPool:
        raise ValueError(
            "a process of the build was ended, by the system if memory ran out; start the same command again, perhaps "
            "with fewer --workers: it goes on where it was"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict = {}


def _start_worker(options: BuildOptions) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if (parent := parent_process()) is not None:
        # A first process that is killed cannot end the others, which would wait for work for ever.
        Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _worker["options"], _worker["encoder"] = options, make_encoder(options.tokenizer, options.begin, options.end)


def _work(unit: Unit, folder: Path, index: int) -> Result:
    """Encode a unit into its files, or find there what an earlier build has done of it."""
    stem = folder / f"{index:07d}"
    finished = stem.with_suffix(".json")
    if finished.is_file():
        known = json.loads(finished.read_text(encoding="utf-8"))
        return Result(**known | {"bad": [Bad(**x) for x in known["bad"]]})
    options, encoder, result = _worker["options"], _worker["encoder"], Result()
    masked = options.mask_field is not None
    tokens, lengths, masks = [], [], []
    for document in read_unit(unit, options.field, options.mask_field):
        if isinstance(document, Bad):
            if options.bad == "refuse":
                line = document.line + first_line_of(unit)
                raise ValueError(
                    f"{document.file}:{line}: {document.reason}; mend it, or leave such out with --bad skip"
                )
            result.bad.append(document)
            continue
        if masked:
            ids, mask = encoder.encode_masked(document.text, document.learned or [])
            masks.append(mask)
        else:
            if not tokens and not encoder.compare(document.text[:_COMPARED]):
                print("note: gigatoken gives other tokens than the tokenizers library here; the build goes on more "
                      "slowly by the latter", file=sys.stderr)  # fmt: skip
            ids = encoder.encode(document.text)
        tokens.append(ids)
        lengths.append(len(ids))
        result.documents += 1
        result.text_bytes += len(document.text) if document.text.isascii() else len(document.text.encode("utf-8"))
    if unit.kind == "jsonl":
        result.lines = lines_in(unit)
    _write(stem.with_suffix(".tokens"), tokens)
    _write(stem.with_suffix(".lengths"), [np.array(lengths, np.int32)])
    if masked:
        _write(stem.with_suffix(".mask"), masks)
    partial = stem.with_suffix(".json.partial")
    partial.write_text(json.dumps(asdict(result)), encoding="utf-8")
    partial.replace(finished)
    return result


def _write(file: Path, arrays: list[np.ndarray]) -> None:
    with open(file, "wb") as stream:
        for array in arrays:
            stream.write(memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b"")
        stream.flush()
        os.fsync(stream.fileno())


def _lines_before(units: list[Unit], journal: Journal) -> int:
    """Lines of its file before the first unit that is not done, by what is noted of those that are."""
    first = index = journal.n_done
    while first and index < len(units) and units[first - 1].files == units[index].files:
        first -= 1
    return sum(record["lines"] for record in journal.records[first:index])


def _signature(options: BuildOptions, units: list[Unit], tokens: dict) -> str:
    """Of all that decides what is built: the options, the tokenizer, and the size and time of each input file."""
    files = sorted({file for unit in units for file in unit.files})
    states = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    what = [asdict(options) | {"tokenizer": None}, {**tokens, "name": None}, [asdict(unit) for unit in units], states]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _finish(journal: Journal, encoder, options: BuildOptions, seconds: float) -> Report:
    """Put the files in their places, the index last: without it there is nothing that could be read."""
    prefix, folder = journal.prefix, journal.folder
    lengths = np.fromfile(folder / "lengths.bin", np.int32)
    bad = [f"{x['file']}:{x['line']}: {x['reason']}" for record in journal.records for x in record["bad"]]
    if not lengths.any():
        first = f"; the first: {bad[0]}" if bad else ""
        shutil.rmtree(folder)
        raise ValueError(f"no document can be used of {', '.join(options.inputs)}: {len(bad)} are bad{first}")
    reasons = Counter(x["reason"].partition(" (")[0].partition(":")[0] for r in journal.records for x in r["bad"])
    text_bytes = sum(record["text_bytes"] for record in journal.records)
    report = Report(len(lengths), int(lengths.sum(dtype=np.int64)), text_bytes, len(bad), bad[:_NAMED],
                    dict(reasons.most_common()), seconds, lengths)  # fmt: skip
    for suffix in (".idx", ".json", f"{MASK}.idx"):
        prefix.with_name(prefix.name + suffix).unlink(missing_ok=True)
    description = {
        "tokens": encoder.describe(),
        "documents": report.documents,
        "n_tokens": report.tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": round(text_bytes / report.tokens, 4),
        "mask": options.mask_field is not None,
        "field": options.field,
        "inputs": list(options.inputs),
        "left_out": report.bad,
    }
    listing = prefix.with_name(prefix.name + ".bad.txt")
    listing.unlink(missing_ok=True)
    if bad:
        # Names of files need not be text.
        listing.write_text("".join(f"{line}\n" for line in bad), encoding="utf-8", errors="surrogateescape")
    if hasattr(encoder, "copy_to"):
        encoder.copy_to(prefix.with_name(prefix.name + ".tokenizer"))
    if options.mask_field is not None:
        mask = prefix.with_name(prefix.name + MASK)
        (folder / "mask.bin").replace(mask.with_name(mask.name + ".bin"))
        write_index(mask, lengths, np.dtype(np.uint8))
    (folder / "tokens.bin").replace(prefix.with_name(prefix.name + ".bin"))
    prefix.with_name(prefix.name + ".json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    write_index(prefix, lengths, encoder.dtype)
    shutil.rmtree(folder)
    return report
